"""How processes hear each other: two real ones that agree."""

import textwrap

import jax
import pytest

from downscaling.runtime import processes
from tests.test_distributed import rehearse


def test_alone_it_is_all_trivial():
  assert processes.client() is None
  # As JSON gives it back, here as among many.
  assert processes.gather("a", (1, "b")) == [[1, "b"]]
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
  assert processes.differences(
    [{"a": 1, "b": 2}, {"a": 1, "b": 3}, {"c": 0, "b": 4}]
  ) == {
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
    from downscaling.runtime import joining, processes
    found = joining.start("auto")
    assert (found.method, found.processes) == ("explicit", 2)
    assert joining.start("on").method == "joined before"
    me, file = processes.place()[0], pathlib.Path({str(tmp_path / "file")!r})
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
  taken = sorted(
    int(line.split()[-1]) for line in said.splitlines() if "] took " in line
  )
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
      ConnectionError,
      match=r"process 0, .*, is gone .x: UNAVAILABLE: failed to connect.*again",
    ):
      processes.gather("x", 1)
