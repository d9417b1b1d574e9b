"""How processes find each other: what the environment means, and real ones that miss each other."""

import os
import pathlib
import socket
import subprocess
import sys
import textwrap
import time

import jax
import pytest

from downscaling.runtime import joining, launchers

CASES = pathlib.Path(__file__).parents[3] / "shared" / "cases" / "launchers"
SLURM = dict(
  SLURM_JOB_ID="7",
  SLURM_STEP_NODELIST="localhost",
  SLURM_NTASKS="2",
  SLURM_PROCID="0",
  SLURM_LOCALID="0",
)
JAX = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
LOCAL = "127.0.0.1"


@pytest.fixture
def env(monkeypatch):
  """env(**variables): those, and none else by which a launcher is known."""
  for name in (
    *launchers.VARIABLES,
    "KUBERNETES_SERVICE_HOST",
    "TORCHELASTIC_USE_AGENT_STORE",
  ):
    monkeypatch.delenv(name, raising=False)
  return lambda **variables: [
    monkeypatch.setenv(name, value) for name, value in variables.items()
  ]


@pytest.fixture
def initialize(monkeypatch):
  """What jax.distributed.initialize was called with; it joins nothing, and nobody need listen."""
  calls = []
  monkeypatch.setattr(
    jax.distributed, "initialize", lambda **arguments: calls.append(arguments)
  )
  monkeypatch.setattr(joining, "_listens", lambda *_: True)
  return calls


def joined(calls):
  """(address, rank, count, local devices) of the only call."""
  (call,) = calls
  names = ("coordinator_address", "process_id", "num_processes", "local_device_ids")
  return tuple(call.get(name) for name in names)


# ---------------------------------------------------------------- what variables say


def test_nothing_found(env, initialize):
  env()
  assert joining.start("off") == joining.Found("alone", "--distributed=off", 1)
  found = joining.start("auto")
  assert (found.method, found.processes) == ("alone", 1)
  assert found.why == "no launcher was found: no variable of a launcher is set"
  needed = r"no launcher was found: no variable .*srun, mpirun.*=off"
  with pytest.raises(joining.StartError, match=needed):
    joining.start("on")
  with pytest.raises(
    ValueError, match="--distributed=yes is unknown; use auto, on or off"
  ):
    joining.start("yes")
  assert not initialize


@pytest.mark.parametrize(
  ("values", "words"),
  [
    (
      (None, "2", None),
      "JAX_NUM_PROCESSES=2 set, but not JAX_PROCESS_ID: set JAX_COORDINATOR",
    ),
    (("h:1", "2", None), "JAX_NUM_PROCESSES=2 set, but not JAX_PROCESS_ID"),
    (("h:1", None, "1"), "JAX_PROCESS_ID=1 set, but not JAX_NUM_PROCESSES"),
    (("h:1", "two", "0"), "JAX_NUM_PROCESSES=two: need a whole number"),
    (
      ("h:1", "2", "2"),
      "JAX_PROCESS_ID=2, JAX_NUM_PROCESSES=2: number the processes 0 to 1",
    ),
    (
      ("h:port", "2", "0"),
      "address h:port: need host:port of process 0, a port from 1 to 65535",
    ),
    (
      ("h:1", None, None),
      "ADDRESS is set, but nothing says which of how many processes this is",
    ),
  ],
)
@pytest.mark.parametrize("mode", ["auto", "on"])
def test_an_explicit_start_that_cannot_be(env, initialize, mode, values, words):
  env(**{name: value for name, value in zip(JAX, values, strict=True) if value})
  with pytest.raises(joining.StartError, match=words):
    joining.start(mode)
  assert not initialize


# file of ../shared/cases/launchers -> what `auto` does with it: (address, rank, count, local
# devices), words of a refusal, or "alone".
OUTCOMES = {
  "half_of_jax": "JAX_PROCESS_ID=2, JAX_NUM_PROCESSES=4.* nothing says where process 0 is",
  "indexed_job": ("127.0.0.1:1234", 3, 4, None),
  "indexed_job_alone": "alone",
  "maxtext": ("127.0.0.1:1234", 0, 2, None),
  "mpich_pmi": "PMI_RANK=1, PMI_SIZE=4: other processes are announced.*Set JAX_COORDINATOR_ADDRESS",
  "openmpi5_two_ranks": "OMPI_COMM_WORLD_SIZE=2: other processes are announced.*Set JAX_COORDINA",
  "openmpi5_with_address": ("127.0.0.1:23456", 0, 2, None),
  "skypilot": ("127.0.0.1:8476", 1, 2, None),
  "slurm_allocation_without_srun": "SLURM_NTASKS=8, but srun did not start this process: put srun",
  "slurm_and_address": ("127.0.0.1:23456", 1, 2, None),
  "slurm_one_task_per_node_eight_gpus": ("gpu-901:61586", 0, 2, None),
  "slurm_ssh_into_allocation": "alone",
  "torchrun": ("127.0.0.1:29500", 1, 2, None),
  "xpk_gpu": ("127.0.0.1:6002", 1, 2, None),
}


@pytest.mark.parametrize("name", OUTCOMES)
def test_an_environment_that_a_launcher_made(env, initialize, monkeypatch, name):
  file = CASES / f"{name}.env"
  if not file.exists():
    pytest.skip(f"{file} is not here")
  lines = [
    line for line in file.read_text().splitlines() if line and not line.startswith("#")
  ]
  values = dict(line.split("=", 1) for line in lines)
  env(**{key: value.replace("\\n", "\n") for key, value in values.items()})
  # gpu-901 is not of this network.
  monkeypatch.setattr(joining, "_resolves", lambda _: True)
  outcome = OUTCOMES[name]
  if outcome == "alone":
    assert joining.start("auto").method == "alone"
    assert not initialize
  elif isinstance(outcome, str):
    with pytest.raises(joining.StartError, match=outcome):
      joining.start("auto")
    assert not initialize
    assert joining.start("off").method == "alone"  # what the refusal says is a way out
  else:
    joining.start("auto")
    assert joined(initialize) == outcome


def test_every_environment_has_an_outcome():
  there = {file.stem for file in CASES.glob("*.env")}
  assert not there or there == OUTCOMES.keys()


def test_slurm(env, initialize, monkeypatch):
  env(SLURM_JOB_ID="7")
  found = joining.start("auto")
  assert found.method == "alone"
  assert (
    "SLURM_JOB_ID=7. This is a Slurm job: srun starts several processes" in found.why
  )
  env(**SLURM | {"SLURM_NTASKS": "1"})
  assert joining.start("auto") == joining.Found(
    "alone", "Slurm started one process only", 1
  )
  assert not initialize
  env(**SLURM)  # for job 7, jax takes this port
  assert joining.start("auto", timeout=7, heartbeat=8).method == "Slurm"
  assert initialize == [
    {
      "coordinator_address": "localhost:61447",
      "num_processes": 2,
      "process_id": 0,
      "initialization_timeout": 7 + joining.MARGIN,
      "heartbeat_timeout_seconds": 8,
    }
  ]
  # Named twice, jax's own variables count.
  env(JAX_COORDINATOR_ADDRESS=f"{LOCAL}:5", JAX_NUM_PROCESSES="3", JAX_PROCESS_ID="2")
  initialize.clear()
  assert joining.start("auto").method == "explicit"
  assert joined(initialize) == (f"{LOCAL}:5", 2, 3, None)


def test_mpirun_on_the_nodes_of_slurm(env, initialize):
  """mpirun's daemons are tasks of Slurm, whose numbers the ranks inherit: jax would take those."""
  ranks = {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8"}
  env(**SLURM, **ranks)
  with pytest.raises(
    joining.StartError, match=r"OMPI_COMM_WORLD_RANK=5, OMPI_COMM_WORLD_SIZE=8"
  ):
    joining.start("auto")
  env(JAX_COORDINATOR_ADDRESS=f"{LOCAL}:5")
  joining.start("auto")
  assert joined(initialize) == (f"{LOCAL}:5", 5, 8, None)


@pytest.mark.parametrize(
  ("visible", "expected"),
  [(None, [1]), ("0,1", [1]), ("3", None)],
  ids=["unset", "two", "one"],
)
def test_several_processes_on_a_host_take_a_device_each(
  env, initialize, monkeypatch, visible, expected
):
  """Where the launcher has hidden the others from each, jax's own count starts at 0."""
  env(RANK="1", WORLD_SIZE="4", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2", MASTER_ADDR=LOCAL)
  monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
  if visible:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
  joining.start("auto")
  assert joined(initialize) == (f"{LOCAL}:{launchers.PORT}", 1, 4, expected)


@pytest.mark.parametrize(
  ("variables", "address"),
  [
    ({"JAX_COORDINATOR_ADDRESS": "h"}, f"h:{launchers.PORT}"),
    ({"JAX_COORDINATOR_ADDRESS": "h", "JAX_COORDINATOR_PORT": "9"}, "h:9"),
    ({"JAX_COORDINATOR_ADDRESS": "h:7", "JAX_COORDINATOR_PORT": "9"}, "h:7"),
    ({"JAX_COORDINATOR_ADDRESS": "[::1]:7"}, "[::1]:7"),
    ({"JAX_COORDINATOR_ADDRESS": "fe80::2"}, f"[fe80::2]:{launchers.PORT}"),
    ({"JAX_COORDINATOR_IP": "10.0.0.1", "JAX_COORDINATOR_PORT": "9"}, "10.0.0.1:9"),
    ({"MASTER_ADDR": "h", "MASTER_PORT": "9"}, None),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "9"}, "h:9"),
  ],
)
def test_addresses(variables, address):
  place = launchers.place(variables)
  found = place.address if place else launchers.address(variables)
  assert found == address


def test_torchruns_own_store_keeps_its_port():
  ours = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "9"}
  place = launchers.place(ours | {"TORCHELASTIC_USE_AGENT_STORE": "True"})
  assert place is not None
  assert place.address == "h:10"


# ---------------------------------------------------------------- joining


def test_a_launcher_that_is_found_and_fails_is_fatal(env, initialize, monkeypatch):
  def fail(**_):
    raise RuntimeError("no route to host\nand a stack")

  monkeypatch.setattr(jax.distributed, "initialize", fail)
  env(**SLURM)
  needed = r"^Slurm was found .* together: no route to host\. Check that all"
  with pytest.raises(joining.StartError, match=needed):
    joining.start("auto")


def test_a_jax_that_hides_its_launchers(env, initialize, monkeypatch):
  """What jax knew, the address of Slurm's first process, must then be given."""
  from jax._src.clusters import cluster

  monkeypatch.delattr(cluster.ClusterEnv, "_cluster_types")
  env(**SLURM)
  with pytest.raises(
    joining.StartError, match=r"SLURM_NTASKS=2: .*Set JAX_COORDINATOR_ADDRESS"
  ):
    joining.start("auto")
  env(JAX_COORDINATOR_ADDRESS=f"{LOCAL}:5")
  assert joining.start("auto").method == "Slurm"
  assert len(initialize) == 1


@pytest.fixture
def kubernetes(monkeypatch):
  """kubernetes(**methods): jax detects it, and nothing else; each method is called bare."""
  from jax._src.clusters import cluster

  def detected(**methods):
    told = {"is_env_present": lambda: True, "opt_in_only_method": False}
    for name, method in (told | methods).items():
      told[name] = staticmethod(method) if callable(method) else method
    kind = type("K8sCluster", (), told)
    monkeypatch.setattr(cluster.ClusterEnv, "_cluster_types", [kind])

  return detected


def test_a_pod_without_a_service_account(env, initialize, kubernetes):
  """With the package `kubernetes`, jax's detection raises there, also while it joins."""

  def absent():
    raise RuntimeError("Service token file does not exist.")

  kubernetes(is_env_present=absent)
  assert joining.start("auto").method == "alone"
  assert not initialize
  env(JAX_COORDINATOR_ADDRESS=f"{LOCAL}:5", JAX_PROCESS_COUNT="2")
  env(JOB_COMPLETION_INDEX="1")
  joining.start("auto")
  assert joined(initialize) == (f"{LOCAL}:5", 1, 2, None)
  assert initialize[0]["cluster_detection_method"] == "deactivate"


def test_a_pod_of_an_indexed_job(env, initialize, kubernetes, monkeypatch):
  """The API knows how many there are and who is the first, and is asked nothing else."""
  kubernetes()
  assert joining.start("auto").method == "alone"  # no pod of an indexed Job
  env(JOB_COMPLETION_INDEX="0")
  kubernetes(get_process_count=lambda: 1)
  found = joining.start("auto")
  assert found == joining.Found("alone", "Kubernetes started one process only", 1)
  assert not initialize
  env(JOB_COMPLETION_INDEX="1", JAX_COORDINATOR_PORT="6")
  address = {"get_coordinator_address": lambda seconds, port: f"{LOCAL}:{port}"}
  kubernetes(get_process_count=lambda: 2, **address)
  assert joining.start("auto").method == "Kubernetes"
  assert joined(initialize) == (f"{LOCAL}:6", 1, 2, None)
  kubernetes(get_process_count=lambda: 1)  # more completions than processes at a time
  with pytest.raises(joining.StartError, match="number the processes 0 to 0"):
    joining.start("auto")
  monkeypatch.setattr(joining, "ANSWER", 0.1)
  kubernetes(get_process_count=lambda: time.sleep(5))
  with pytest.raises(
    joining.StartError, match=r"how many .* no answer in 0\.1 s\. Let the"
  ):
    joining.start("auto")


CODE = """
import os
from downscaling.runtime import joining
joining.RESOLVE, joining.NOTICE = 1.0, 0.5
try:
  joining.start("auto", timeout=2)
except joining.StartError as error:
  print(error, flush=True)
  os._exit(1)
"""


@pytest.fixture
def tried(env):
  """tried(*environments) -> what each process said, which ended by itself with code 1."""

  def tried(*environments):
    pair = [
      subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CODE)],
        env=os.environ | mine,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
      )
      for mine in environments
    ]
    said = [process.communicate(timeout=60)[0] for process in pair]
    assert [process.returncode for process in pair] == [1] * len(pair), said
    return said

  return tried


def explicit(address, rank):
  return dict(zip(JAX, (address, "2", str(rank)), strict=True))


def test_missing_peers_are_told_and_do_not_abort(tried):
  """jax itself ends the program by SIGABRT there, with a stack of C++."""
  with socket.socket() as s, socket.socket() as t:
    s.bind((LOCAL, 0))
    t.bind((LOCAL, 0))
    ports = [s.getsockname()[1], t.getsockname()[1]]
  said = tried(*(explicit(f"{LOCAL}:{ports[i]}", i) for i in (0, 1)))
  assert "this is process 0 of 2, and others are missing after 2 s" in said[0]
  assert "waiting for others, 1 of 2 s" in said[0]
  assert (
    f"nothing listens at {LOCAL}:{ports[1]}, where process 0 should, after 2 s"
    in said[1]
  )
  assert f"waiting for process 0 at {LOCAL}:{ports[1]}, 1 of 2 s" in said[1]


def test_a_name_that_does_not_resolve_and_a_port_in_use(tried):
  """The first was 300 s of silence on all ranks, the second a segmentation fault on the first."""
  with socket.create_server((LOCAL, 0)) as server:
    port = server.getsockname()[1]
    said = tried(
      explicit(f"{LOCAL}:{port}", 0),
      explicit("no-such-host.invalid:5", 0),
      explicit("no-such-host.invalid:5", 1),
    )
  assert (
    f"process 0 cannot listen at port {port} of {socket.gethostname()} (Address"
    in said[0]
  )
  assert "set JAX_COORDINATOR_ADDRESS with another port" in said[0]
  for words in said[1:]:
    assert "name no-such-host.invalid does not resolve on" in words
    assert "waiting for the name no-such-host.invalid to resolve" in words
