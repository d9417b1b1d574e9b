"""One ensemble drawn by real processes: any topology, killed and told to stop at any moment, moved,
grown, locked.
"""

import contextlib
import os
import pathlib
import random
import re
import shutil
import signal
import sys
import time

import jax
import numpy as np
import pytest
import xarray

from downscaling.runtime import files as runtime_files
from downscaling.runtime import locks, stage_folder
from downscaling.sampling import ensemble
from tests.sampling import worker
from tests.test_distributed import numbers, rehearse, start, wait_for

never = lambda: False


def argv(path, conditions=24, members=6, seconds=0.0):
  return [
    sys.executable,
    "-W",
    "ignore",
    worker.__file__,
    path,
    conditions,
    members,
    seconds,
  ]


def files(path):
  """{file: bytes} of the arrays and their metadata; the root says when it was made."""
  found = (
    p for p in sorted(path.glob("*/**/*")) if p.is_file() and p.suffix != ".__lock"
  )
  return {p.relative_to(path): p.read_bytes() for p in found}


def markers(path):
  return {
    p.name: p.stat().st_mtime_ns for p in path.with_suffix(".units").glob("c*-m*.json")
  }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """24 × 6 in 18 units, drawn by one device of this process: the bytes that every other way must
  end at.
  """
  path = tmp_path_factory.mktemp("whole") / "a.zarr"
  assert worker.draw(path, 24, 6, never, jax.devices()[:1])["drawn"] == 18
  return path


def test_two_processes_draw_what_one_draws(whole, tmp_path):
  """2 × 2 devices against 1 × 1; both processes take part, and each unit is drawn once."""
  path = tmp_path / "a.zarr"
  said = rehearse(2, 2, argv(path, seconds=0.05))
  assert "[0] drawn 18 of 18" in said
  assert files(path) == files(whole)
  assert set(markers(path)) == set(markers(whole))
  assert not (tmp_path / "a.units" / "lock.json").exists()


def test_two_processes_make_an_ensemble_larger(whole, tmp_path):
  """22 × 5, every edge unit incomplete, to 24 × 6: each process keeps what is there of the units
  that it completes.
  """
  path = tmp_path / "a.zarr"
  worker.draw(path, 22, 5, never)
  before = ensemble.read(path).load()
  said = rehearse(2, 2, argv(path, seconds=0.05))
  assert (
    "[0] drawn 8 of 18" in said
  )  # five of the last members, two of the last conditions, one of both
  after, at_once = ensemble.read(path), ensemble.read(whole)
  for name in ("sample", "misfit"):
    np.testing.assert_array_equal(after[name][:22, :5], before[name])
  for name in (
    at_once.variables
  ):  # not file by file: what is no unit is cut as it was when there was less of it
    np.testing.assert_array_equal(after[name], at_once[name], err_msg=name)
  assert set(markers(path)) == set(markers(whole))


def test_sigterm_to_one_of_two_and_on_with_other_devices(whole, tmp_path):
  path, pids = tmp_path / "a.zarr", tmp_path / "pids"
  process = start(2, 1, argv(path, seconds=0.3), pids)
  wait_for(lambda: len(markers(path)) >= 2, process)
  os.kill(numbers(pids)[1], signal.SIGTERM)
  said, _ = process.communicate(timeout=60)
  assert process.returncode == 143, said
  first = markers(path)
  assert 2 <= len(first) < 18
  assert f"[0] sample stopped after {len(first)} of 18 units, which are on disk" in said
  assert worker.draw(path, 24, 6, never)["drawn"] == 18 - len(first)
  assert {name: markers(path)[name] for name in first} == first
  assert files(path) == files(whole)


def test_independent_jobs_fill_one_store(whole, tmp_path):
  """Three jobs that know nothing of each other, as tasks of an array; one is killed."""
  path = tmp_path / "a.zarr"
  lives = []
  for task in range(3):
    array = {
      f"SLURM_ARRAY_TASK_{n}": str(v)
      for n, v in (("ID", task), ("COUNT", 3), ("MIN", 0))
    }
    lives.append(
      start(1, 1, argv(path, seconds=0.4), tmp_path / f"pids{task}", **array)
    )
  wait_for(lambda: len(markers(path)) > 3, lives[0])
  with xarray.open_zarr(path) as data:  # while it grows; warnings are errors here
    assert data.sample.shape == (24, 6, 24)
    assert 0 <= data.attrs["done_fraction"] < 1
    assert 0 < np.isfinite(data.sample).all("x").sum() < 24 * 6
  os.kill(numbers(tmp_path / "pids2")[0], signal.SIGKILL)
  with pytest.raises(
    locks.Held, match="cannot grow while another job draws for it: host"
  ):
    worker.draw(path, 25, 6, never)
  said = [life.communicate(timeout=120)[0] for life in lives]
  assert files(path) == files(whole)
  assert set(markers(path)) == set(markers(whole))
  drawn = [int(re.search(r"drawn (\d+) of 18", words)[1]) for words in said[:2]]
  # Each did a share. A unit may be drawn twice: by the one that was killed, or at the same moment.
  assert min(drawn) >= 3
  assert 14 <= sum(drawn) <= 21
  assert ensemble.read(path).attrs["done_fraction"] == 1
  left = [
    p.name for p in path.with_suffix(".units").iterdir() if p.name not in markers(path)
  ]
  assert sorted(left)[-2:] == ["stage.copy.json", "stage.json"]
  # Of the one that was killed.
  assert all("drawing" in name for name in sorted(left)[:-2])
  worker.draw(path, 25, 6, never)  # which may not keep it from growing
  assert not [*path.with_suffix(".units").glob("drawing-*")]


def test_another_kind_of_device_is_refused_or_written_down(whole, tmp_path):
  path, units = tmp_path / "a.zarr", tmp_path / "a.units"
  for suffix in (".zarr", ".units"):
    shutil.copytree(whole.with_suffix(suffix), path.with_suffix(suffix))
  record = runtime_files.read_json(units / stage_folder.MARKER)
  assert record["device_kinds"] == ["cpu"]
  stage_folder.write_marker(units, record | {"device_kinds": ["NVIDIA H200"]})
  with pytest.raises(
    ValueError, match="was drawn on NVIDIA H200; here is cpu, which rounds"
  ):
    worker.draw(path, 24, 8, never)
  assert set(markers(path)) == set(markers(whole))
  worker.draw(path, 24, 8, never, any_device=True)
  record = runtime_files.read_json(units / stage_folder.MARKER)
  assert record["device_kinds"] == ["NVIDIA H200", "cpu"]
  said = [runtime_files.read_json(units / name)["device"] for name in markers(path)]
  assert said == ["cpu"] * 24


@pytest.mark.slow
def test_killed_at_ten_random_moments_on_any_topology(tmp_path):
  """1 × 1 device -> 2 × 1 -> 1 × 4, kill -9 to one process at ten moments and SIGTERM at two: each
  unit is finished once, none is missing, and the end is byte for byte what an undisturbed run on
  one device leaves."""
  dice, size, units = random.Random(0), {"conditions": 200, "members": 8}, 200
  topologies = (1, 1), (2, 1), (1, 4)
  rehearse(1, 1, argv(tmp_path / "straight.zarr", **size))
  path, pids = tmp_path / "moved.zarr", tmp_path / "pids"
  for life in range(12):
    before = markers(path)
    pids.unlink(missing_ok=True)
    process = start(
      *topologies[life % 3], argv(path, **size, seconds=0.15), pids, GRACE="2"
    )
    wait_for(pids.exists, process)
    if dice.random() < 0.8:  # else in its imports, its start, its compilation
      wait_for(lambda b=before: len(markers(path)) > len(b), process)
    time.sleep(dice.uniform(0, 0.6))
    with contextlib.suppress(ProcessLookupError):
      sent = signal.SIGTERM if life in (1, 5) else signal.SIGKILL
      os.kill(dice.choice([*numbers(pids).values()]), sent)
    process.communicate(timeout=120)
    assert {k: markers(path)[k] for k in before} == before, (
      "a finished unit was done again"
    )
  left = units - len(markers(path))
  assert left > 0, "it was done too soon"
  said = rehearse(*topologies[-1], argv(path, **size))
  assert f"drawn {left} of {units}" in said
  assert files(path) == files(tmp_path / "straight.zarr")


@pytest.mark.slow
def test_memory_is_flat(tmp_path):
  """Peak of a process that draws 4, 16 and 64 units of 8 MB. To 160 MB, 20 units: allocators keep
  what they have had, thread by thread, the more the busier the disk; measured up to 150 MB here and
  22 MB more for 160 units. The whole ensemble in memory would be half a gigabyte more."""
  code = """
import sys
import jax
import numpy as np
from downscaling.sampling import ensemble, solvers
count = int(sys.argv[2])
ensemble.write_ensemble(
  sys.argv[1], conditions=np.zeros((16 * count, 4, 4, 1), np.float32), members=32,
  space=(64, 64), unit=(16, 32),
  sampler=lambda keys, y: solvers.noise(keys, 0, (64, 64, 1)), devices=jax.devices(),
  seed=0, identity={},
  attrs={}, stop=lambda: False)
print(*(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
  peaks = []
  for count in (4, 16, 64):
    said = rehearse(
      1,
      1,
      [sys.executable, "-W", "ignore", "-c", code, tmp_path / f"{count}.zarr", count],
    )
    peaks.append(int(said.rpartition("VmHWM:")[2].split()[0]) / 1e3)
  assert max(peaks) - peaks[0] < 160, peaks


def test_a_worker_ends_like_the_program(tmp_path):
  """So that these tests test something: an error is one line and code 1."""
  (tmp_path / "a.zarr").mkdir()
  assert "worker: " in rehearse(1, 1, argv(tmp_path / "a.zarr"), code=1)
  assert [p.name for p in tmp_path.iterdir()] == ["a.zarr"]
  assert pathlib.Path(worker.__file__).exists()
  assert not (tmp_path / "a.units" / stage_folder.MARKER).exists()
