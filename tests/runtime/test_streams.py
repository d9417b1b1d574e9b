"""Terminals that have gone and disks that are full, for what a job says."""

import io
import subprocess

from downscaling.runtime import streams


class Full(io.StringIO):
  """As a log on a full disk."""

  def write(self, text):
    raise OSError(28, "No space left on device")


def test_what_cannot_be_written_is_lost():
  stream = streams.Unbreakable(Full())
  assert stream.write("text") == 4
  closed = io.StringIO()
  closed.close()
  stream = streams.Unbreakable(closed)
  stream.write("text")
  stream.flush()
  kept = io.StringIO()
  print("text", file=streams.Unbreakable(kept), flush=True)
  assert kept.getvalue() == "text\n"
  assert not streams.Unbreakable(kept).isatty()


def test_a_job_ends_well_whatever_becomes_of_its_words(command, tmp_path):
  argv = command("generate", tmp_path / "run")
  shell = ["bash", "-c", '"$@" >&- 2>/dev/full', "sh", *argv]
  assert subprocess.run(shell, check=False, timeout=300).returncode == 0
  assert (tmp_path / "run" / "data" / "statistics.npz").exists()
