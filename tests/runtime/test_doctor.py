"""`downscaling doctor`, alone and in two processes."""

import re
import sys

import jax
import pytest

from downscaling.runtime import doctor, joining, processes
from downscaling.runtime import mesh as meshes
from tests.test_distributed import rehearse

FOUND = joining.Found("alone", "no launcher was found", 1)
ALONE = [sys.executable, "-m", "downscaling", "doctor"]


def test_alone_it_finds_the_devices_and_leaves_nothing(execute, tmp_path):
  done = execute([*ALONE, f"--workdir={tmp_path / 'new'}"])
  assert done.returncode == 0, done.stderr
  for words in (
    "start      alone: no launcher was found",
    "processes  1 on 1 host(s)",
    "4 × cpu",
    "psum       4 MB",
  ):
    assert words in done.stderr
  assert done.stderr.rstrip().endswith("all is well")
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("data", "fsdp"), [(4, 1), (2, 2), (1, 1)])
def test_all_is_well_on_any_mesh(tmp_path, data, fsdp):
  text, well = doctor.report(
    FOUND, meshes.make(data, fsdp), tmp_path / "a" / "b", {"config hash": "1"}
  )
  assert well, text
  assert (
    f"devices    {data * fsdp} × cpu, mesh {{'data': {data}, 'fsdp': {fsdp}}}" in text
  )
  assert ", 4 × cpu (cpu), memory " in text
  assert "b: written by process 0 and seen by all" in text
  assert text.endswith("\nall is well")
  assert not list(tmp_path.iterdir())


def test_any_other_names_of_axes():
  text, well = doctor.report(
    FOUND, jax.make_mesh((2, 2), ("rows", "columns")), None, {}
  )
  assert well, text


def test_a_wrong_sum_names_its_devices(monkeypatch):
  """A link that drops one device's part on two devices: devices 2 and 3 add only what they hold."""
  psum = jax.lax.psum
  broken = lambda v, axes: jax.numpy.where(
    jax.lax.axis_index(axes) < 2, psum(v, axes), v
  )
  monkeypatch.setattr(jax.lax, "psum", broken)
  text, well = doctor.report(FOUND, meshes.make(), None, {})
  assert not well
  assert "FIX: the sum over all devices is wrong on process 0 " in text
  assert "cpu:2, cpu:3: a device or a link is broken" in text


def test_whatever_a_device_raises_is_a_finding(monkeypatch):
  def fail(*_):
    raise RuntimeError("NCCL: unhandled system error\nstack")

  monkeypatch.setattr(doctor, "_psum", fail)
  text, well = doctor.report(FOUND, meshes.make(), None, {})
  assert not well
  assert (
    "FIX: process 0 cannot add over all devices (NCCL: unhandled system error): look at drivers"
    in text
  )


def test_a_folder_that_cannot_be_written(tmp_path):
  (tmp_path / "file").touch()
  text, well = doctor.report(FOUND, meshes.make(), tmp_path / "file" / "run", {})
  assert not well
  assert "run cannot be written (Not a directory): use another --workdir." in text
  assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_each_process_says_of_the_folder(tmp_path):
  judge = lambda *told: doctor._judge(tmp_path, *told)[1]
  assert judge("", ["", ""], ["", ""]) == []
  (blind,) = judge("", ["", "No such file or directory", ""], ["", "", "read-only"])
  assert (
    "process(es) 1 do not see what process 0 writes to its --workdir (No such file or directory)"
    in blind
  )
  (refused,) = judge("", ["", ""], ["", "read-only"])
  assert refused.startswith(
    f"{tmp_path} cannot be written by process(es) 1: mount it for writing there"
  )


def test_a_silent_peer_is_a_finding(monkeypatch):
  def gather(name, value, timeout):
    if name == "doctor/facts":
      raise TimeoutError("process 1 of 2 did not answer")
    return [value]

  monkeypatch.setattr(processes, "gather", gather)
  text, well = doctor.report(FOUND, meshes.make(), None, {})
  assert not well
  assert text.endswith("\nFIX: process 1 of 2 did not answer")


def test_a_slurm_job_without_srun_is_told(execute, monkeypatch):
  monkeypatch.setenv("SLURM_JOB_ID", "7")
  monkeypatch.setenv("SLURM_NTASKS", "8")
  done = execute(ALONE)
  assert done.returncode == 1
  assert done.stderr == (
    "downscaling: doctor: SLURM_NTASKS=8, but srun did not start this process: put srun before the "
    "command, or use --distributed=off for a job of one process.\n"
  )


def test_gpus_that_would_idle(execute, monkeypatch):
  monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
  monkeypatch.delenv("JAX_PLATFORMS", raising=False)
  done = execute(ALONE)
  assert done.returncode == 1
  assert "FIX: " in done.stderr
  assert (
    "has 8 GPUs, and its 1 process(es) use 0: start one process a GPU (Slurm: "
    in done.stderr
  )


def test_a_platform_that_is_not_installed(execute, monkeypatch):
  monkeypatch.setenv("JAX_PLATFORMS", "cuda")
  done = execute(ALONE)
  assert done.returncode == 1
  (said,) = [
    line for line in done.stderr.splitlines() if line.startswith("downscaling")
  ]
  assert "doctor: JAX_PLATFORMS=cuda, which cannot be used here" in said
  assert "pip install 'downscaling[cuda12]'" in said


def test_on_without_a_launcher_dies_and_says_what_is_missing(execute):
  done = execute([*ALONE, "--distributed=on"])
  assert done.returncode == 1
  needed = (
    "--distributed=on, but no launcher was found: no variable of a launcher is set"
  )
  assert needed in done.stderr
  assert "srun, mpirun" in done.stderr


def test_two_processes_that_share_nothing(tmp_path):
  """Other folders, made by their numbers, and other seeds: each finding is a line of its own."""
  each = "$JAX_PROCESS_ID"
  flags = f"--workdir={tmp_path}/{each} --config=configs/ks.py --config.seed={each}"
  set_apart = 'XLA_FLAGS="$XLA_FLAGS --xla_cpu_enable_fast_math=$JAX_PROCESS_ID"'
  command = f"{set_apart} JAX_DUMP_IR_TO=/tmp/{each} exec downscaling doctor {flags}"
  said = rehearse(2, 2, ["bash", "-c", command], code=1)
  assert "start      explicit: process 1 of 2, coordinator 127.0.0.1:" in said or (
    "start      explicit: process 0 of 2, coordinator 127.0.0.1:" in said
  )
  assert "processes  2 on 1 host(s)" in said
  assert said.count(", 2 × cpu (cpu), memory ") == 2
  assert "process(es) 1 do not see what process 0 writes" in said
  assert "FIX: config hash is" in said
  assert re.search(
    r"FIX: XLA_FLAGS is .*fast_math=0 on process 0 and .*=1 on process 1", said
  )
  assert "JAX_PROCESS_ID is" not in said
  assert "JAX_DUMP_IR_TO is" not in said
  said = rehearse(2, 2, ["downscaling", "doctor", f"--workdir={tmp_path}/shared"])
  assert "written by process 0 and seen by all" in said
  assert "all is well" in said
