"""Memory of jobs: what a plan says and what a process takes; nothing of a fine split as a whole."""

import os
import pathlib
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from downscaling import experiment, jobs
from downscaling.assembly import worlds
from downscaling.jobs import rows
from downscaling.runtime import mesh as meshes
from downscaling.runtime import supervision

ROOT = pathlib.Path(__file__).parents[1]
# Peak resident size of a job beside what was there when its imports were done.
MEASURE = """
import pathlib, re, sys
import jax, orbax.checkpoint, scipy, tensorstore, xarray, zarr
import jax.numpy as jnp
from downscaling import experiment, jobs
from downscaling.runtime import mesh as meshes
from downscaling.runtime import supervision

def status(name):
  return 1024 * int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

mesh = meshes.make()
jax.jit(lambda x: x @ x)(jnp.ones((8, 8))).block_until_ready()
keys = dict(argument.split("=", 1) for argument in sys.argv[3:])
config = experiment.load("ks:smoke", **keys)
work = jobs.Workdir(config, pathlib.Path(sys.argv[1]), mesh, supervision.Stop())
job = jobs.JOBS[sys.argv[2]](work)
before = status("VmRSS")
job.run()
print("took", status("VmHWM") - before)
print("plan", job.peak())
"""
# Of quick's sizes: rows of 8192 points, a network of 563,000 parameters, few steps of everything.
MID = {
  "data.shard": 4096,
  "data.hfhr.train": 4096,
  "data.lflr.train": 4096,
  "data.hfhr.reference": 2048,
  "data.hfhr.floor": 1024,
  "data.hfhr.test": 128,
  "data.hfhr.calibration": 128,
  "data.lflr.test": 256,
  "data.lflr.calibration": 128,
  "debias.points": 8192,
  "debias.held_out": 1024,
  "debias.threshold": 1e-2,
  "debias.minibatch.batch": 256,
  "model.channels": (32, 64, 96),
  "model.strides": (2, 2, 2),
  "model.embedding": 128,
  "train.batch": 128,
  "train.total_steps": 8,
  "watch.fields": 64,
  "sampling.conditions": 128,
  "sampling.members": 8,
  "sampling.unit": (64, 8),
  "sampling.unconditional.fields": 256,
  "evaluate.reference": 8192,
}


# What a process frees goes back to the system at once, and one chunk of a store is read at a time.
STEADY = {
  "MALLOC_ARENA_MAX": "1",
  "MALLOC_MMAP_THRESHOLD_": "1000000",
  "ZARR_ASYNC__CONCURRENCY": "1",
}


def took_and_plan(folder, keys, names=tuple(jobs.JOBS), **variables):
  """{job: (bytes that it took, bytes that its plan says)} of a whole run, or of some jobs.

  variables: of the environment.
  """
  # A cache of compiled programs would spare the compiler's memory in some runs.
  environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
  environment |= variables
  environment.pop("JAX_COMPILATION_CACHE_DIR")
  given = [f"{key}={value}" for key, value in keys.items()]
  found = {}
  for job in names:  # a process each, so that one leaves no memory to the other
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, str(folder), job, *given]
    done = subprocess.run(
      command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=900
    )
    assert done.returncode == 0, done.stderr
    said = dict(
      line.split() for line in done.stdout.splitlines() if line.count(" ") == 1
    )
    found[job] = float(said["took"]), float(said["plan"])
  return found


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{}, MID], ids=["smoke", "mid"])
def test_a_plan_is_what_a_job_takes(tmp_path, keys):
  """Within a quarter, where libraries dominate and where arrays do."""
  found = took_and_plan(tmp_path, keys)
  wrong = {
    job: said
    for job, said in found.items()
    if said[1] != pytest.approx(said[0], rel=0.25)
  }
  assert not wrong, found


@pytest.mark.slow
def test_evaluate_never_holds_an_ensemble(tmp_path):
  """64 conditions of 1024 members, then of 3072, drawn by a tiny network.

  The members between, 64 × 2048 fields of 192 float32, are 101 MB. A quarter of them, 25 MB, would
  be seen beside what RSS varies from run to run: 3 MB with STEADY, 60 MB without. All else is of
  one size in both runs: a block of conditions is 21 × 1024 or 7 × 3072 fields, a tile of pairs
  1024 × 1024. Distances between 3072 members of one condition would be 75 MB.
  """
  keys = {"sampling.sets": ("true+diffusion",), "sampling.unit": (4, 1024)}
  keys |= {"sampling.conditions": 64, "sampling.members": 1024}
  # Bytes are what counts here.
  keys |= {"sampling.levels.steps": 2, "model.channels": (4, 8), "model.embedding": 8}
  few = took_and_plan(tmp_path, keys, **STEADY)["evaluate"][0]
  keys["sampling.members"] = 3 * 1024
  again = ("sample", "evaluate")
  many = took_and_plan(tmp_path, keys, again, **STEADY)["evaluate"][0]
  extra = 4 * 192 * 64 * 2 * 1024
  assert many - few < extra / 4, (few, many)


@pytest.fixture
def work(finished):
  """The finished run, as a job sees it."""
  small = {"data.shard": 16, "sampling.unit": (2, 2)}
  config = experiment.load("ks:smoke", **small)
  return jobs.Workdir(config, finished[0], meshes.make(), supervision.Stop())


@pytest.mark.parametrize("coarsen", [False, True])
def test_rows_by_blocks_are_the_rows_at_once(work, monkeypatch, coarsen):
  numbers = rows.balanced(work.experiment, "hfhr", "train", 100)
  of = rows.of(work, "hfhr", "train", numbers, coarsen)
  whole = of.load()
  assert of.nbytes == whole["u"].nbytes
  assert of.shape == whole["u"].shape
  # 7 rows: the last block is a short one.
  monkeypatch.setattr(rows, "BLOCK_BYTES", 7 * 4 * 192)
  again = of.load()
  for key in whole:
    np.testing.assert_array_equal(again[key], whole[key])
  fine = rows.of(work, "hfhr", "train", numbers).read()
  expected = worlds.operator(work.experiment).apply(fine) if coarsen else fine
  np.testing.assert_array_equal(whole["u"], expected)


def test_fine_fields_are_never_there_as_a_whole_while_they_are_coarsened(
  work, monkeypatch
):
  """512 fields of 768 bytes. Records of TFDS take several times their bytes while a block is read,
  and blocks of 8 kB are small beside that, so half of the whole is the bound.
  """
  numbers = rows.balanced(work.experiment, "hfhr", "train")
  of, fine = (
    rows.of(work, "hfhr", "train", numbers, coarsen) for coarsen in (True, False)
  )
  monkeypatch.setattr(rows, "BLOCK_BYTES", 8192)
  of.read()  # what libraries keep from a first call is no part of it
  tracemalloc.start()
  of.read()
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < fine.nbytes / 2
