"""launch/slurm.sbatch on a real Slurm of two nodes, both of them this machine, as root.

A job that is warned of its end saves, is queued again and goes on; one that is cancelled saves and
stays dead; one that is preempted goes on.
"""

import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from downscaling.jobs import verify
from downscaling.runtime import ledger
from tests.services.conftest import ROOT

pytestmark = [pytest.mark.services, pytest.mark.slow]
CONF = """
ClusterName=loop
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=10
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/%n.log
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MinJobAge=3600
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port=17001 CPUs=2 RealMemory=2000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port=17002 CPUs=2 RealMemory=2000
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
TASKS = (
  "--nodes=2",
  "--ntasks-per-node=1",
  "--cpus-per-task=1",
  "--gres=none",
  "--time=60",
)


def sh(*argv, **kwargs):
  return subprocess.run(
    [str(each) for each in argv],
    capture_output=True,
    text=True,
    check=True,
    timeout=120,
    **kwargs,
  ).stdout


def until(condition, seconds=400):
  """Waits; a requeued job starts after up to two minutes."""
  deadline = time.monotonic() + seconds
  while not (found := condition()):
    assert time.monotonic() < deadline, "waited in vain"
    time.sleep(0.5)
  return found


class Slurm:
  """A running one."""

  def __init__(self, folder, env):
    self.folder, self.env = folder, env

  def sbatch(self, *argv):
    """-> (number of the job, its log)."""
    log = self.folder / f"{time.monotonic_ns()}.log"
    said = sh("sbatch", *TASKS, f"--output={log}", *argv, cwd=ROOT, env=self.env)
    return said.split()[-1], log

  def state(self, job):
    said = sh("scontrol", "show", "job", job, env=self.env)
    return re.search(r"JobState=(\w+)", said)[1]

  def ended(self, job):
    until(
      lambda: self.state(job) not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")
    )
    return self.state(job)


@pytest.fixture(scope="module")
def slurm(debian, on_cpus, tmp_path_factory):
  if os.getuid():
    pytest.skip("Slurm and munge are started as root here")
  debian("munge", "munged")
  debian("slurm-wlm", "slurmctld")
  folder = tmp_path_factory.mktemp("slurm")
  for name in ("state", "n1", "n2"):
    (folder / name).mkdir()
  conf = folder / "slurm.conf"
  conf.write_text(CONF.format(host=socket.gethostname().split(".")[0], folder=folder))
  env = os.environ | on_cpus | {"SLURM_CONF": str(conf)}
  env["PATH"] = f"{os.path.dirname(sys.executable)}:{env['PATH']}"
  hosts = pathlib.Path("/etc/hosts")
  before = hosts.read_text()
  started = []
  try:
    if not re.search(r"\bn2\b", before):
      hosts.write_text(f"{before}127.0.0.1 n1 n2\n")
    if not pathlib.Path("/run/munge/munge.socket.2").exists():
      sh("install", "-d", "-o", "munge", "-g", "munge", "-m", "0755", "/run/munge")
      sh("runuser", "-u", "munge", "--", shutil.which("munged"))
    for argv in (
      ["slurmctld", "-D"],
      ["slurmd", "-D", "-N", "n1"],
      ["slurmd", "-D", "-N", "n2"],
    ):
      quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
      started.append(subprocess.Popen(argv, env=env, **quiet))
    until(lambda: sh("sinfo", "-h", "-o", "%D %t", env=env).strip() == "2 idle", 60)
    yield Slurm(folder, env)
    # What a failed test left running would keep its port.
    sh("scancel", "--signal=KILL", "--full", "--user=root", env=env)
    sh("scancel", "--user=root", env=env)
    until(lambda: not sh("squeue", "-h", env=env), 60)
  finally:
    for process in reversed(started):
      process.send_signal(signal.SIGTERM)
      process.wait(30)
    hosts.write_text(before)


def test_a_job_that_is_warned_preempted_and_cancelled(
  slurm, command, execute, tmp_path
):
  workdir = tmp_path / "run"
  assert execute(command("generate", workdir)).returncode == 0
  flags = ["--config=ks:smoke", f"--workdir={workdir}", "--config.data.shard=16"]
  flags += ["--config.train.total_steps=1000000", "--config.plan.log_every=50"]
  script = ROOT / "launch" / "slurm.sbatch"
  job, log = slurm.sbatch(script, "train", *flags, "--config.plan.eval_every=0")

  def steps():
    return [int(found) for found in re.findall(r"train: (\d+)/", log.read_text())]

  def resumed(times):
    return until(
      lambda: len(re.findall(r"going on from step \d+", log.read_text())) == times
    )

  until(lambda: log.exists() and steps())
  sh(
    "scancel", "--signal=USR1", "--batch", job, env=slurm.env
  )  # as Slurm does 300 s before the end
  resumed(1)
  saved = re.search(r"stopped at step (\d+) .* which is saved", log.read_text())
  assert saved
  assert f"going on from step {saved[1]}" in log.read_text()
  until(lambda: steps()[-1] > int(saved[1]))
  other, _ = slurm.sbatch("--partition=high", "--exclusive", "--wrap=sleep 1")
  resumed(2)
  assert slurm.ended(other) == "COMPLETED"
  until(lambda: steps()[-1] > int(saved[1]) + 50)
  sh("scancel", job, env=slurm.env)
  assert slurm.ended(job) == "CANCELLED"
  time.sleep(5)
  assert slurm.state(job) == "CANCELLED"


def test_two_ranks_join_and_an_error_is_not_tried_again(slurm, tmp_path):
  script = ROOT / "launch" / "slurm.sbatch"
  job, log = slurm.sbatch(script, "doctor")
  assert slurm.ended(job) == "COMPLETED"
  assert "start      Slurm: process 0 of 2, coordinator n1:" in log.read_text()
  assert "all is well" in log.read_text()
  job, log = slurm.sbatch(
    script, "train", "--config=ks:smoke", f"--workdir={tmp_path}/none"
  )
  assert slurm.ended(job) == "FAILED"
  assert (
    "data is missing or unfinished: run `downscaling generate` first" in log.read_text()
  )


def steps_of(log):
  """Steps of training that a log tells of."""
  return [int(found) for found in re.findall(r"train: (\d+)/", log.read_text())]


def test_training_that_is_queued_again_ends_with_the_same_bytes(
  slurm, command, execute, tmp_path
):
  """Warned once, saved in between two checkpoints, against one that was left alone."""
  data = tmp_path / "data-of"
  assert execute(command("generate", data)).returncode == 0
  script = ROOT / "launch" / "slurm.sbatch"
  flags = [
    "--config=ks:smoke",
    f"--config.data.dir={data}/data",
    "--config.data.shard=16",
  ]
  flags += ["--config.train.total_steps=800", "--config.plan.log_every=50"]
  flags += ["--config.plan.eval_every=0", "--config.plan.save_every=100000"]
  job, log = slurm.sbatch(script, "train", *flags, f"--workdir={tmp_path}/cut")
  until(lambda: log.exists() and steps_of(log))
  sh("scancel", "--signal=USR1", "--batch", job, env=slurm.env)
  assert slurm.ended(job) == "COMPLETED", log.read_text()
  assert re.search(r"going on from step \d+", log.read_text())
  alone, said = slurm.sbatch(script, "train", *flags, f"--workdir={tmp_path}/alone")
  assert slurm.ended(alone) == "COMPLETED", said.read_text()
  assert "going on from" not in said.read_text()
  # Every loss, and what the finished prior makes of calibration fields.
  for file in ("metrics.csv", "denoising_error.npz"):
    made = [
      (tmp_path / name / "train" / file).read_bytes() for name in ("cut", "alone")
    ]
    assert made[0] == made[1], file


def test_a_time_limit_is_no_end(slurm, command, execute, tmp_path):
  """Slurm warns 60 s before a limit of two minutes; the job saves, is queued again and goes on."""
  assert execute(command("generate", tmp_path)).returncode == 0
  script = ROOT / "launch" / "slurm.sbatch"
  flags = ["--config=ks:smoke", f"--workdir={tmp_path}", "--config.data.shard=16"]
  flags += ["--config.train.total_steps=1000000", "--config.plan.log_every=50"]
  limit = ("--time=2", "--signal=B:USR1@60")
  job, log = slurm.sbatch(*limit, script, "train", *flags, "--config.plan.eval_every=0")
  until(lambda: log.exists() and re.search(r"going on from step \d+", log.read_text()))
  assert "warned of the end" in log.read_text()
  sh("scancel", job, env=slurm.env)
  assert slurm.ended(job) == "CANCELLED"


# Process 1 of a job stands still once a file is there: no Python runs in it any more, and SIGTERM
# does not end it, but its heartbeats go on.
HANG = """
import ctypes, os, pathlib, threading, time

def stand_still(file):
  while not file.exists():
    time.sleep(0.1)
  file.unlink()  # the next attempt goes on
  ctypes.PyDLL(None).pause()

if os.environ.get("SLURM_PROCID") == "1":
  file = pathlib.Path(os.environ["HANG"])
  threading.Thread(target=stand_still, args=[file], daemon=True).start()
"""


def test_a_job_that_hangs_is_queued_again(slurm, command, execute, tmp_path):
  """Process 0 gives up with code 75; the one that hangs is killed, or aborts without process 0."""
  assert execute(command("generate", tmp_path)).returncode == 0
  (tmp_path / "hang").mkdir()
  (tmp_path / "hang" / "sitecustomize.py").write_text(HANG)
  path = f"{tmp_path / 'hang'}:{os.environ.get('PYTHONPATH', '')}"
  export = f"--export=ALL,PYTHONPATH={path},HANG={tmp_path / 'now'}"
  script = ROOT / "launch" / "slurm.sbatch"
  flags = ["--config=ks:smoke", f"--workdir={tmp_path}", "--config.data.shard=16"]
  flags += ["--config.train.total_steps=1000000", "--config.plan.log_every=50"]
  flags += ["--config.plan.eval_every=0", "--config.plan.save_every=50"]
  # Longer than it takes to compile.
  flags += ["--config.supervision.silence=75"]
  job, log = slurm.sbatch(export, script, "train", *flags)
  until(lambda: log.exists() and steps_of(log) and steps_of(log)[-1] > 100)
  (tmp_path / "now").touch()
  until(lambda: re.search(r"going on from step \d+", log.read_text()))
  said = log.read_text()
  assert re.search("0: .*no sign of life for 75 s", said)
  # Either is a higher code than 75, and srun ends with the highest.
  assert re.search("task 1: (Killed|Exited with exit code 134)", said)
  assert "slurm: ended with code 75, by itself or cancelled" in said
  reached = steps_of(log)[-1]
  until(lambda: steps_of(log)[-1] > reached)
  sh("scancel", job, env=slurm.env)
  assert slurm.ended(job) == "CANCELLED"


def test_every_job_by_two_ranks(slurm, tmp_path):
  """The pipeline job by job, and once more at once, which finds all of it done."""
  script, flags = (
    ROOT / "launch" / "slurm.sbatch",
    ("--config=ks:smoke", f"--workdir={tmp_path}"),
  )
  for name in ("generate", "debias", "train", "sample", "evaluate", "pipeline"):
    job, log = slurm.sbatch(script, name, *flags)
    assert slurm.ended(job) == "COMPLETED", log.read_text()
    assert f"0: downscaling {name}: " in log.read_text()
  assert "generate is done already" in log.read_text()
  assert verify.verify(tmp_path)[1]
  for stage in ("data", "debias", "train", "samples", "report"):
    assert len(ledger.read(tmp_path / stage)) == 2  # a process each


def test_what_keeps_ranks_from_joining_is_said_on_each(slurm, tmp_path):
  """A name that does not resolve, a port in use, a rank that dies: within a minute."""
  # As launch/slurm.sbatch has it: who waits for a rank that has ended in words is ended too.
  srun = "srun --label --kill-on-bad-exit=1 downscaling doctor"
  job, log = slurm.sbatch(
    "--export=ALL,JAX_COORDINATOR_ADDRESS=nowhere.invalid:1234", "--wrap", srun
  )
  began = time.monotonic()
  assert slurm.ended(job) == "FAILED"
  assert time.monotonic() - began < 90
  for rank in "01":
    assert re.search(rf"{rank}: .*nowhere.invalid", log.read_text()), log.read_text()
  with socket.create_server(("127.0.0.1", 0)) as taken:
    address = f"127.0.0.1:{taken.getsockname()[1]}"
    job, log = slurm.sbatch(
      f"--export=ALL,JAX_COORDINATOR_ADDRESS={address}", "--wrap", srun
    )
    assert slurm.ended(job) == "FAILED"
  assert re.search(rf"0: .*{address}", log.read_text()), log.read_text()
  missing = "srun --label bash -c '[ $SLURM_PROCID = 1 ] && exec sleep 70; exec downscaling doctor'"
  job, log = slurm.sbatch("--wrap", missing)
  until(lambda: log.exists() and "0: " in log.read_text(), 60)
  assert re.search(r"0: .*waiting for", until(lambda: waits(log), 60))
  sh("scancel", job, env=slurm.env)
  slurm.ended(job)


def waits(log):
  return log.read_text() if "waiting for" in log.read_text() else ""


def test_an_array_fills_one_store(slurm, command, execute, tmp_path):
  """Four tasks, one of them killed: the bytes of a single job. Then the ensemble grows."""
  workdir, alone = tmp_path / "run", tmp_path / "alone"
  keys = {"sampling.members": 120, "sampling.sets": ("true+diffusion",), "small": False}
  for job in ("generate", "debias", "train"):
    made = execute(command(job, workdir, **keys))
    assert made.returncode == 0, made.stderr
  shutil.copytree(workdir, alone)
  # With the flags of the tasks: another compilation rounds otherwise.
  assert execute(command("sample", alone, **keys), env=slurm.env).returncode == 0
  samples = workdir / "samples"
  script = ROOT / "launch" / "slurm.sbatch"
  flags = [f for f in command("sample", workdir, **keys)[3:] if f != "sample"]
  job, log = slurm.sbatch(
    "--nodes=1", "--array=0-3", "--exclude=", script, "sample", *flags
  )
  until(lambda: len([*samples.glob("true*.units/c*-m*.json")]) > 20)
  sh("scancel", "--signal=KILL", "--full", f"{job}_2", env=slurm.env)

  def states():
    said = sh("scontrol", "show", "job", job, env=slurm.env)
    return dict(
      zip(
        *(re.findall(rf"{k}=(\w+)", said) for k in ("ArrayTaskId", "JobState")),
        strict=True,
      )
    )

  until(
    lambda: (
      not {*states().values()} & {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING"}
    )
  )
  found = states()
  assert [found[task] for task in "013"] == ["COMPLETED"] * 3, log.read_text()
  assert drawn(samples) == drawn(alone / "samples")
  more = execute(
    command("sample", workdir, **keys | {"sampling.members": 124}), env=slurm.env
  )
  assert more.returncode == 0, more.stderr


def drawn(samples):
  """{file: bytes} of the arrays of a set; those of the root say when it was made."""
  found = (samples / "true+diffusion.zarr").glob("*/**/*")
  return {p.relative_to(samples): p.read_bytes() for p in found if p.is_file()}
