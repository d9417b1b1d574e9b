"""`downscaling doctor`, alone and in two processes."""

import sys

from tests.test_distributed import rehearse

ALONE = [sys.executable, "-m", "downscaling", "doctor"]


def test_alone_it_finds_the_devices_and_leaves_nothing(execute, tmp_path):
  done = execute([*ALONE, f"--workdir={tmp_path / 'new'}"])
  assert done.returncode == 0, done.stderr
  for words in ("start      alone: no launcher was found", "processes  1 on 1 host(s)", "4 × cpu", "psum       4 MB"):
    assert words in done.stderr
  assert done.stderr.rstrip().endswith("all is well")
  assert not list(tmp_path.iterdir())


def test_a_slurm_job_without_srun_is_told(execute, monkeypatch):
  monkeypatch.setenv("SLURM_JOB_ID", "7")
  monkeypatch.setenv("SLURM_NTASKS", "8")
  done = execute(ALONE)
  assert done.returncode == 1
  assert "FIX: this is a Slurm job, but not a step of it: put srun before the command." in done.stderr
  assert "Slurm: has SLURM_JOB_ID SLURM_NTASKS, lacks SLURM_STEP_NODELIST SLURM_PROCID SLURM_LOCALID" in done.stderr


def test_on_without_a_launcher_dies_and_says_what_is_missing(execute):
  done = execute([*ALONE, "--distributed=on"])
  assert done.returncode == 1
  assert "--distributed=on, but no launcher was found: explicit: nothing; Open MPI: nothing" in done.stderr
  assert "srun, mpirun" in done.stderr


def test_half_an_explicit_start_dies(execute, monkeypatch):
  monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
  done = execute(ALONE)
  assert done.returncode == 1
  assert "JAX_NUM_PROCESSES set, but not JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID: set all three" in done.stderr


def test_two_processes_that_share_nothing(tmp_path):
  """Other folders, made by their numbers, and other seeds: each finding is a line of its own."""
  command = (
    f"exec downscaling doctor --workdir={tmp_path}/$JAX_PROCESS_ID --config=configs/ks.py --config.seed=$JAX_PROCESS_ID"
  )
  said = rehearse(2, 2, ["bash", "-c", command], code=1)
  assert "start      explicit: JAX_COORDINATOR_ADDRESS" in said
  assert "processes  2 on 1 host(s)" in said
  assert "process(es) 1 do not see what process 0 writes" in said
  assert "FIX: config hash is" in said
  said = rehearse(2, 2, ["downscaling", "doctor", f"--workdir={tmp_path}/shared"])
  assert "written by process 0 and seen by all" in said
  assert "all is well" in said
