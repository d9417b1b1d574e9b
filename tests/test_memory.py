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
# Peak resident size of a debias job beside what was there when its imports were done.
MEASURE = """
import pathlib, re, sys
import jax, orbax.checkpoint, scipy, tensorstore, xarray, zarr
import jax.numpy as jnp
from downscaling import experiment, jobs
from downscaling.runtime import mesh as meshes
from downscaling.runtime import supervision

def status(name):
  return 1024 * int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

jax.jit(lambda x: x @ x)(jnp.ones((8, 8))).block_until_ready()
keys = dict(argument.split("=", 1) for argument in sys.argv[3:])
config = experiment.load("ks:smoke", **keys)
work = jobs.Workdir(config, pathlib.Path(sys.argv[1]), meshes.make(), supervision.Stop())
job = jobs.JOBS[sys.argv[2]](work)
before = status("VmRSS")
job.run()
if job.name == "debias":
  print("took", status("VmHWM") - before)
  print("plan", job.peak())
"""


def took_and_plan(folder, **keys):
  environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
  given = [f"{key}={value}" for key, value in keys.items()]
  for job in ("generate", "debias"):  # a process each, so that one leaves no memory to the other
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, str(folder), job, *given]
    done = subprocess.run(
      command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=900
    )
    assert done.returncode == 0, done.stderr
  found = dict(line.split() for line in done.stdout.splitlines() if line.count(" ") == 1)
  return float(found["took"]), float(found["plan"])


@pytest.mark.slow
@pytest.mark.parametrize("points", [256, 8192])
def test_a_plan_of_debias_is_what_the_job_takes(tmp_path, points):
  """Within a quarter, where libraries dominate and where arrays do: 0.3 and 0.8 GB."""
  many = {"data.hfhr.train": points // 4, "data.lflr.train": points // 4, "data.shard": 512}
  took, plan = took_and_plan(
    tmp_path, **many, **{"debias.points": points, "debias.threshold": 1e-2}
  )
  assert plan == pytest.approx(took, rel=0.25)


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
  monkeypatch.setattr(rows, "BLOCK_BYTES", 7 * 4 * 192)  # 7 rows: the last block is a short one
  again = of.load()
  for key in whole:
    np.testing.assert_array_equal(again[key], whole[key])
  fine = rows.of(work, "hfhr", "train", numbers).read()
  expected = worlds.operator(work.experiment).apply(fine) if coarsen else fine
  np.testing.assert_array_equal(whole["u"], expected)


def test_fine_fields_are_never_there_as_a_whole_while_they_are_coarsened(work, monkeypatch):
  """512 fields of 768 bytes. Records of TFDS take several times their bytes while a block is read,
  and blocks of 8 kB are small beside that, so half of the whole is the bound.
  """
  numbers = rows.balanced(work.experiment, "hfhr", "train")
  of, fine = (rows.of(work, "hfhr", "train", numbers, coarsen) for coarsen in (True, False))
  monkeypatch.setattr(rows, "BLOCK_BYTES", 8192)
  of.read()  # what libraries keep from a first call is no part of it
  tracemalloc.start()
  of.read()
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < fine.nbytes / 2
