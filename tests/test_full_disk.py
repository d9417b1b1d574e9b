"""A disk that fills: one line that says so, what is whole stays, and with more room the same
command goes on.
"""

import contextlib
import shutil
import subprocess

import pytest

from downscaling.runtime import files, metric_writer, stage_folder
from tests.test_bad_input import one_line
from tests.test_jobs import same_samples


@pytest.fixture
def small_disk(tmp_path):
  """small_disk(bytes) -> a folder on a real file system of that size; small_disk(bytes) again gives
  it another size.
  """
  folder = tmp_path / "disk"
  folder.mkdir()
  mounted = []

  def resize(size):
    options = f"size={size}" if not mounted else f"remount,size={size}"
    try:
      subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder],
        check=True,
        capture_output=True,
      )
    except (OSError, subprocess.CalledProcessError) as error:
      pytest.skip(f"mounting a tmpfs needs root: {error}")
    mounted.append(folder)
    return folder

  yield resize
  with contextlib.suppress(subprocess.CalledProcessError):
    if mounted:
      subprocess.run(["umount", "--lazy", folder], check=True, capture_output=True)


def used(folder):
  """Bytes on disk."""
  return sum(p.lstat().st_blocks * 512 for p in folder.rglob("*"))


def test_a_disk_that_fills_while_training(small_disk, command, execute, finished):
  """A checkpoint takes .8 MB, or up to 3.5 by how TensorStore's threads fall: the first is laid
  there, not written.
  """
  workdir = small_disk(30_000_000)
  kept = min(
    (finished[0] / "train" / "checkpoints").iterdir(), key=lambda p: int(p.name)
  )
  shutil.copytree(kept, workdir / "train" / "checkpoints" / kept.name)
  shutil.copy(finished[0] / "train" / "metrics.csv", workdir / "train")
  marker = files.read_json(finished[0] / "train" / stage_folder.MARKER)
  files.write_json(
    workdir / "train" / stage_folder.MARKER, marker | {"complete": False}
  )
  small_disk(used(workdir) + 500_000)
  argv = command("train", workdir, **{"data.dir": finished[0] / "data"})
  said = one_line(execute(argv))
  assert "no space left" in said
  assert str(workdir) in said
  assert "Free some disk and run the same command" in said
  assert [
    p.name for p in (workdir / "train" / "checkpoints").iterdir() if p.name.isdigit()
  ] == [kept.name]
  small_disk(30_000_000)
  done = execute(argv)
  assert done.returncode == 0, done.stderr
  assert f"train: going on from step {kept.name}" in done.stderr
  assert metric_writer.read_scalars(
    workdir / "train", "loss"
  ) == metric_writer.read_scalars(finished[0] / "train", "loss")


@pytest.mark.slow
@pytest.mark.parametrize(
  ("job", "size"), [("generate", 500_000), ("debias", 60_000), ("train", 16_384)]
)
def test_a_disk_that_fills_elsewhere(small_disk, command, execute, finished, job, size):
  workdir = small_disk(size)
  argv = command(
    job, workdir, **({} if job == "generate" else {"data.dir": finished[0] / "data"})
  )
  done = execute(argv)
  assert done.returncode == 1, done.stderr
  assert "Traceback" not in done.stderr
  assert "no space left" in done.stderr.splitlines()[-1]
  assert "Free some disk and run the same command" in done.stderr.splitlines()[-1]
  small_disk(30_000_000)
  assert execute(argv).returncode == 0


def test_a_disk_that_fills_while_sampling(small_disk, command, execute, finished):
  workdir = small_disk(30_000_000)
  shutil.copytree(finished[0] / "debias", workdir / "debias")
  small_disk(used(workdir) + 100_000)  # a set of samples takes about 100 kB
  argv = command(
    "sample",
    workdir,
    **{f"{stage}.dir": finished[0] / stage for stage in ("data", "train")},
  )
  said = one_line(execute(argv))
  assert "no space left" in said
  assert "Free some disk and run the same command" in said
  marked = {p: p.stat().st_mtime_ns for p in workdir.glob("samples/*.units/c*-m*.json")}
  small_disk(30_000_000)
  done = execute(argv)
  assert done.returncode == 0, done.stderr
  assert {p: p.stat().st_mtime_ns for p in marked} == marked
  same_samples(finished[0] / "samples", workdir / "samples")
