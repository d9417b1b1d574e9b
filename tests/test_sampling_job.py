"""The `sample` job itself, killed and told to stop, moved from topology to topology: the bytes of
an undisturbed run on one device. Minutes: all of it is slow."""

import contextlib
import os
import random
import shutil
import signal
import sys
import time

import numpy as np
import pytest
import xarray

from tests.test_distributed import numbers, rehearse, start, wait_for

# Runs a job in which one function, the first time it is called, rests before it does anything, and
# says so by a file.
RESTS = """
import functools, importlib, os, pathlib, sys, time
module, _, name = os.environ["RESTS"].partition(":")
*path, last = name.split(".")
owner = functools.reduce(getattr, path, importlib.import_module(module))
work, rests = getattr(owner, last), [6.0]
def rest(*args, **kwargs):
  if rests:
    pathlib.Path(os.environ["FLAG"]).touch()
    time.sleep(rests.pop())
  return work(*args, **kwargs)
setattr(owner, last, rest)
from downscaling import main
sys.argv[0] = "downscaling"
main.run()
"""
# What rests when the signal comes, where, and what is then said.
PHASES = [
  (
    "downscaling.diffusion.train_loop:load_prior",
    (1, 1),
    "stopped while restoring the prior",
  ),
  (
    "downscaling.diffusion.train_loop:load_prior",
    (2, 1),
    "stopped while nothing could be lost",
  ),
  (
    "downscaling.sampling.ensemble_store:create",
    (1, 1),
    "stopped while compiling the sampler",
  ),
  (
    "downscaling.sampling.ensemble:_compiled",
    (1, 2),
    "stopped while compiling the sampler",
  ),
  (
    "downscaling.sampling.ensemble:_compiled",
    (2, 1),
    "stopped while nothing could be lost",
  ),
  ("downscaling.sampling.ensemble_units:Writer.begin", (2, 2), "sample stopped after"),
  ("downscaling.sampling.ensemble_units:Writer.finish", (1, 4), "sample stopped after"),
  ("downscaling.sampling.ensemble:_conclude", (2, 1), "sample stopped after"),
]


def files(workdir):
  """{file: bytes} of the arrays of all sets; the root of each says when it was made."""
  samples = workdir / "samples"
  return {
    p.relative_to(samples): p.read_bytes()
    for p in sorted(samples.glob("*.zarr/*/**/*"))
    if p.is_file()
  }


def markers(workdir):
  return {p: p.stat().st_mtime_ns for p in workdir.glob("samples/*.units/c*-m*.json")}


@pytest.fixture
def argv(finished, command):
  """argv(work folder) -> the command that samples there, from copies of the maps and the prior of
  `finished`.
  """

  def argv(workdir, **sampling):
    for stage in ("debias", "train"):
      shutil.copytree(finished[0] / stage, workdir / stage)
    keys = {f"sampling.{k}": v for k, v in sampling.items()}
    return command("sample", workdir, **{"data.dir": finished[0] / "data"} | keys)

  return argv


@pytest.mark.slow
def test_sigterm_in_each_phase_of_sampling(finished, argv, tmp_path):
  """One store through every phase and five topologies: 143 each time, no finished unit touched, the
  bytes of 1 × 1.
  """
  rehearse(1, 1, argv(tmp_path / "straight"))
  workdir, pids, flag = tmp_path / "cut", tmp_path / "pids", tmp_path / "flag"
  sample = argv(workdir)
  assert sample[1:3] == ["-m", "downscaling"]
  for rests, (count, devices), words in PHASES:
    before = markers(workdir)
    flag.unlink(missing_ok=True)
    rest = [sys.executable, "-c", RESTS, *sample[3:]]
    process = start(count, devices, rest, pids, RESTS=rests, FLAG=str(flag))
    wait_for(flag.exists, process)
    os.kill(numbers(pids)[count - 1], signal.SIGTERM)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 143, said
    assert words in said
    after = markers(workdir)
    assert {k: after.get(k) for k in before} == before, (
      "a finished unit was drawn again"
    )
    if not rests.endswith("_conclude"):  # of a set that may have been complete before
      assert (len(after) > len(before)) == words.startswith("sample stopped"), rests
  rehearse(1, 1, sample)
  assert files(workdir) == files(tmp_path / "straight")
  for name in (
    "equivariant+diffusion",
    "raw+diffusion",
    "true+diffusion",
    "unconditional",
  ):  # drawn by 1 × 4
    one, four = (
      xarray.open_zarr(w / "samples" / f"{name}.zarr") for w in (workdir, finished[0])
    )
    np.testing.assert_array_equal(one["sample"], four["sample"])


@pytest.mark.slow
def test_sampling_killed_and_moved(argv, tmp_path):
  """1 process -> 2 processes -> 1 process with 4 devices, kill -9 at ten random moments and SIGTERM
  at two: no finished unit again, none missing, and the bytes of an undisturbed run on one
  device."""
  size = {"conditions": 64, "members": 96, "unit": (8, 8), "unconditional.fields": 64}
  rehearse(1, 1, argv(tmp_path / "straight", **size))
  # A unit takes about 20 ms here: a life of .3 s must not be the last.
  units = 3 * 96 + 1
  assert len(markers(tmp_path / "straight")) == units
  workdir, pids, dice = tmp_path / "cut", tmp_path / "pids", random.Random(0)
  sample = argv(workdir, **size)
  for life in range(12):
    before = markers(workdir)
    pids.unlink(missing_ok=True)
    process = start(*((1, 1), (2, 1), (1, 4))[life % 3], sample, pids, GRACE="2")
    wait_for(pids.exists, process)
    if dice.random() < 0.8:  # else in its imports, its start, its compilation
      wait_for(lambda b=before: len(markers(workdir)) > len(b), process)
    time.sleep(dice.uniform(0, 0.3))
    with contextlib.suppress(ProcessLookupError):
      os.kill(
        dice.choice([*numbers(pids).values()]),
        signal.SIGTERM if life in (1, 5) else signal.SIGKILL,
      )
    process.communicate(timeout=120)
    after = markers(workdir)
    assert {k: after.get(k) for k in before} == before, (
      "a finished unit was drawn again"
    )
  assert (
    12 <= len(markers(workdir)) + 3 < units
  )  # three lives may have ended before their first unit
  rehearse(1, 4, sample)
  assert files(workdir) == files(tmp_path / "straight")
