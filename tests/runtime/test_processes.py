"""How processes find and hear each other: what the environment means, and two real processes that
agree.
"""

import os
import socket
import subprocess
import sys
import textwrap

import jax
import pytest

from downscaling.runtime import processes
from tests.test_distributed import rehearse

SLURM = dict(
  SLURM_JOB_ID="7", SLURM_STEP_NODELIST="n1", SLURM_NTASKS="2", SLURM_PROCID="0", SLURM_LOCALID="0"
)


@pytest.fixture
def env(monkeypatch):
  """env(**variables): those, and none else by which a launcher is known."""
  for name in [name for names in processes.VARIABLES.values() for name in names] + [
    "KUBERNETES_SERVICE_HOST"
  ]:
    monkeypatch.delenv(name, raising=False)
  return lambda **variables: [monkeypatch.setenv(name, value) for name, value in variables.items()]


@pytest.fixture
def initialize(monkeypatch):
  """What jax.distributed.initialize was called with; it joins nothing."""
  calls = []
  monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
  return calls


# ---------------------------------------------------------------- start


def test_nothing_found(env, initialize):
  assert processes.start("off") == processes.Found("alone", "--distributed=off", 1)
  found = processes.start("auto")
  assert (found.method, found.processes) == ("alone", 1)
  assert (
    found.why
    == "no launcher was found: explicit: nothing; Open MPI: nothing; Slurm: nothing; GKE: nothing"
  )
  with pytest.raises(
    processes.StartError, match=r"no launcher was found: explicit: nothing.*srun, mpirun.*=off"
  ):
    processes.start("on")
  with pytest.raises(ValueError, match="--distributed=yes is unknown; use auto, on or off"):
    processes.start("yes")
  assert not initialize


@pytest.mark.parametrize(
  ("values", "words"),
  [
    (
      (None, "2", None),
      "JAX_NUM_PROCESSES set, but not JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID: set all three",
    ),
    (
      ("h:1", "2", None),
      "JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES set, but not JAX_PROCESS_ID",
    ),
    (("h:1", "two", "0"), "JAX_NUM_PROCESSES=two, JAX_PROCESS_ID=0: need two whole numbers"),
    (("h:1", "2", "2"), "JAX_PROCESS_ID=2 of JAX_NUM_PROCESSES=2: number the processes 0 to 1"),
    (("h", "2", "0"), "JAX_COORDINATOR_ADDRESS=h: need host:port"),
  ],
)
@pytest.mark.parametrize("mode", ["auto", "on"])
def test_an_explicit_start_that_cannot_be(env, initialize, mode, values, words):
  env(**{name: value for name, value in zip(processes.EXPLICIT, values, strict=True) if value})
  with pytest.raises(processes.StartError, match=words):
    processes.start(mode)
  assert not initialize


def test_slurm(env, initialize):
  env(SLURM_JOB_ID="7", SLURM_NTASKS="8")
  found = processes.start("auto")
  assert found.method == "alone"
  assert (
    "Slurm: has SLURM_JOB_ID SLURM_NTASKS, lacks SLURM_STEP_NODELIST SLURM_PROCID SLURM_LOCALID"
    in found.why
  )
  assert (
    "SLURM_NTASKS is 8, but srun did not start this process: put srun before the command"
    in found.why
  )
  env(**SLURM | {"SLURM_NTASKS": "1"})
  assert processes.start("auto") == processes.Found("alone", "Slurm started one process only", 1)
  assert not initialize
  env(**SLURM)
  assert processes.start("auto", timeout=7, heartbeat=8).method == "Slurm"
  (arguments,) = initialize
  assert arguments == {
    "initialization_timeout": 7 + processes.MARGIN,
    "heartbeat_timeout_seconds": 8,
  }


def test_a_launcher_that_is_found_and_fails_is_fatal(env, monkeypatch):
  def fail(**_):
    raise RuntimeError("no route to host\nand a stack")

  monkeypatch.setattr(jax.distributed, "initialize", fail)
  env(**SLURM)
  with pytest.raises(
    processes.StartError, match=r"^Slurm was found .* together: no route to host\. Check that all"
  ):
    processes.start("auto")


def test_a_jax_that_hides_its_launchers(env, initialize, monkeypatch):
  from jax._src.clusters import cluster

  monkeypatch.delattr(cluster.ClusterEnv, "_cluster_types")
  env(**SLURM)
  assert processes.start("auto").method == "alone"
  assert not initialize
  assert processes.start("on").method == "jax's detection"
  assert len(initialize) == 1


def test_missing_peers_are_told_and_do_not_abort(env):
  """jax itself ends the program by SIGABRT there, with a stack of C++."""
  with socket.socket() as s, socket.socket() as t:
    s.bind(("127.0.0.1", 0))
    t.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1], t.getsockname()[1]]
  code = """
    import os
    from downscaling.runtime import processes
    try:
      processes.start("auto", timeout=2)
    except processes.StartError as error:
      print(error, flush=True)
      os._exit(1)
  """
  pair = []
  for i in (0, 1):
    mine = dict(zip(processes.EXPLICIT, (f"127.0.0.1:{ports[i]}", "2", str(i)), strict=True))
    pair.append(
      subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | mine,
        text=True,
        stdout=subprocess.PIPE,
      )
    )
  said = [process.communicate(timeout=60)[0] for process in pair]
  assert [process.returncode for process in pair] == [1, 1], said
  assert "this is process 0 of 2, and others are missing after 2 s" in said[0]
  assert f"nothing listens at 127.0.0.1:{ports[1]}, where process 0 should, after 2 s" in said[1]


# ---------------------------------------------------------------- agreement


def test_alone_it_is_all_trivial():
  assert processes.client() is None
  assert processes.gather("a", (1, "b")) == [[1, "b"]]  # as JSON gives it back, here as among many
  with pytest.raises(TypeError, match="not JSON serializable"):
    processes.gather("a", {1, 2})
  processes.barrier("b")
  assert processes.main_first("c", lambda: 3) == 3
  assert processes.main_only("c", lambda: (3,)) == [3]
  take = processes.counter("c")
  assert [take(), take()] == [0, 1]
  assert processes.counter("c")() == 0
  with pytest.raises(KeyError, match="mine"):
    processes.main_first("c", lambda: {}["mine"])
  processes.same_everywhere({"seed": 1})


def test_differences_name_all_keys():
  assert processes.differences([{"a": 1, "b": 2}, {"a": 1, "b": 2}]) == {}
  assert processes.differences([{"a": 1, "b": 2}, {"a": 1, "b": 3}, {"c": 0, "b": 4}]) == {
    "b": "b is 2 on process 0 and 3 on process 1",
    "a": "a is 1 on process 0 and absent on process 2",
    "c": "c is absent on process 0 and 0 on process 2",
  }


def test_two_processes_agree(tmp_path):
  """Every way of agreeing, in one pair: a pair takes seconds to start.

  No device may be started by it.
  """
  code = f"""
    import pathlib, time
    from jax._src import xla_bridge
    from downscaling.runtime import processes
    found = processes.start("auto")
    assert (found.method, found.processes) == ("explicit", 2)
    assert processes.start("on").method == "joined before"
    me, file = processes._place()[0], pathlib.Path({str(tmp_path / "file")!r})
    assert processes.gather("a", {{"me": me}}) == [{{"me": 0}}, {{"me": 1}}]
    for turn in range(5):  # the first to come must not read what was said the turn before
      time.sleep(0.1 * (me == turn % 2))
      assert processes.gather("turn", [turn, me]) == [[turn, 0], [turn, 1]]
    kept = processes.client().key_value_dir_get("downscaling/turn/")
    processes.barrier("looked")
    # The last turn, and the one before where the other is still clearing away.
    assert len(kept) in (2, 3), kept
    began = time.monotonic()
    time.sleep(0.5 * me)
    processes.barrier("b")
    assert time.monotonic() - began > 0.4
    def first():
      time.sleep(0.3)
      assert me or not file.exists()
      text = file.read_text() if me else "made"
      file.write_text(text)
      return text
    assert processes.main_first("file", first) == "made"
    assert processes.main_only("alone", lambda: ["by", me]) == ["by", 0]
    def alone():
      raise ValueError("alone")
    try:
      processes.main_only("alone", alone)
    except Exception as error:
      print(type(error).__name__, error)
    for turn in range(2):  # the second has numbers of its own
      take = processes.counter("units")
      while (number := take()) < 20:
        print("took", 20 * turn + number)
        time.sleep(0.01 * me)
      processes.barrier("taken")
    works = {{
      "fails": lambda: 1 / 0,
      "same": lambda: processes.same_everywhere({{"seed": me}}),
    }}
    for name, work in works.items():
      try:
        processes.main_first(name, work) if name == "fails" else work()
      except Exception as error:
        print(type(error).__name__, error)
    try:
      processes.gather("late", me, 0.5) if me == 0 else time.sleep(1.5)
    except TimeoutError as error:
      print(error)
    assert not xla_bridge.backends_are_initialized()
    processes.barrier("end")
    print("agreed")
  """
  said = rehearse(2, 1, ["python", "-c", textwrap.dedent(code)])
  assert "[0] ZeroDivisionError" in said
  assert "[1] PeerFailed process 0 failed: " in said
  assert "[1] PeerFailed process 0 failed: alone" in said
  taken = sorted(int(line.split()[-1]) for line in said.splitlines() if "] took " in line)
  assert taken == [*range(40)]  # each number once, whoever was faster
  for i in (0, 1):
    assert (
      f"[{i}] ValueError processes differ in seed: seed is 0 on process 0 and 1 on process 1. "
      "Start every" in said
    )
    assert f"[{i}] agreed" in said
  assert "[0] process 1 of 2 did not answer within 0.5 s (late): it hangs" in said


def test_the_end_of_process_0_is_no_timeout():
  """The store goes with it; jax then aborts the others, unless they are told before."""

  class Store:
    def key_value_set(self, *_):
      raise jax.errors.JaxRuntimeError("UNAVAILABLE: failed to connect\nmore")

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(processes, "client", Store)
    with pytest.raises(
      ConnectionError, match=r"process 0, .*, is gone .x: UNAVAILABLE: failed to connect.*again"
    ):
      processes.gather("x", 1)
