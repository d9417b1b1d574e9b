"""Signals, agreement and the watchdog, in real processes."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest

from downscaling.runtime import supervision

ROOT = pathlib.Path(__file__).parents[2]
# A long call that gives up the GIL and returns to Python only at its end, as compilation does.
BUSY = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'x', b'y', 2_000_000_000)"


def spawn(code, **env):
  """A python process of `code`, its output piped, that prints 'ready' when it may be disturbed."""
  code = (
    "from downscaling.runtime import supervision\nimport sys, time\n"
    + textwrap.dedent(code)
  )
  return subprocess.Popen(
    [sys.executable, "-u", "-c", code], cwd=ROOT, env=os.environ | env, text=True,
    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
  )  # fmt: skip


def ready(process):
  assert process.stdout.readline() == "ready\n", process.communicate()[1]


@pytest.mark.parametrize("number", supervision.SIGNALS, ids=lambda number: number.name)
def test_a_signal_is_noticed_and_the_old_handler_comes_back(number):
  # The tests may themselves run under nohup, or in the background of a script.
  before = signal.signal(number, signal.SIG_DFL)
  try:
    with supervision.Stop() as stop:
      assert not stop()
      os.kill(os.getpid(), number)
      assert stop()
    assert signal.getsignal(number) is signal.SIG_DFL
  finally:
    signal.signal(number, before)


def test_what_nohup_ignores_stays_ignored():
  """Closing the terminal must not end the job."""
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with supervision.Stop() as stop:
      os.kill(os.getpid(), signal.SIGHUP)
      assert not stop()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
  finally:
    signal.signal(signal.SIGHUP, before)


def test_sigterm_ends_at_once_what_loses_nothing():
  """Within a call that never comes back to Python; without the thread this would take an hour."""
  process = spawn(f"""
    with supervision.Stop() as stop:
      with stop.interruptible("compiling"):
        print("ready")
        {BUSY}
  """)
  ready(process)
  began = time.monotonic()
  process.send_signal(signal.SIGTERM)
  _, said = process.communicate(timeout=60)
  assert process.returncode == supervision.STOPPED
  assert time.monotonic() - began < 30
  assert (
    said == "downscaling: stopped while compiling; run the same command to go on.\n"
  )


def test_a_hang_is_seen_its_stacks_are_shown_and_the_code_says_try_again():
  process = spawn(f"""
    def where_it_hangs():
      {BUSY}
    with supervision.Stop(silence=1.0) as stop:
      for _ in range(4):  # two seconds of work, with signs of life
        time.sleep(0.5)
        stop()
      print("ready")
      where_it_hangs()
  """)
  ready(process)
  _, said = process.communicate(timeout=60)
  assert process.returncode == supervision.HUNG
  assert "in where_it_hangs" in said
  assert "no sign of life for 1 s" in said


def test_one_that_waits_for_another_does_not_hang():
  process = spawn("""
    with supervision.Stop(silence=0.5) as stop:
      with stop.waiting():
        time.sleep(3)
      print("ready")
      time.sleep(60)
  """)
  ready(process)
  _, said = process.communicate(timeout=60)
  assert process.returncode == supervision.HUNG
  assert "no sign of life for 0.5 s" in said


def _pair(code, *arguments):
  """Two processes that have joined; code sees `stop`, connected, and `me`."""
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  joined = f"""
import jax
from downscaling.runtime import joining, processes
me = int({{me}})
with supervision.Stop() as stop:
  joining.start("on")
  stop.connect(processes.client(), jax.process_index(), 2)
  print("ready")
{textwrap.indent(textwrap.dedent(code), "  ")}
"""
  env = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
  pair = [
    spawn(joined.replace("{me}", str(i)), **env, JAX_PROCESS_ID=str(i)) for i in (0, 1)
  ]
  for process in pair:
    ready(process)
  return pair


@pytest.mark.parametrize("told", [0, 1])
def test_sigterm_to_one_stops_both_at_the_same_unit(told):
  """One polls ten times as fast as the other: both leave at the same count, and neither works a
  unit more.
  """
  pair = _pair("""
    for unit in range(100_000):
      time.sleep(0.1 if me else 0.01)
      processes.barrier("unit") if unit % 10 == 9 else None
      if stop():
        print("left at", unit)
        break
    processes.barrier("end")
    jax.distributed.shutdown()
  """)
  time.sleep(1.0)
  pair[told].send_signal(signal.SIGTERM)
  said = [process.communicate(timeout=90) for process in pair]
  assert [p.returncode for p in pair] == [0, 0], said
  assert said[0][0] == said[1][0]
  assert said[0][0].startswith("left at")


def test_each_may_leave_at_its_own_pace():
  """Ten times as fast, one has done ten times as much when it is told; the other does not have to
  make up for it.
  """
  pair = _pair("""
    units = 0
    while not stop.told():
      time.sleep(0.2 if me else 0.02)
      units += 1
    print("units", units)
    processes.barrier("end")
    print("and then", stop(), stop())
    jax.distributed.shutdown()
  """)
  time.sleep(2.0)
  pair[1].send_signal(signal.SIGTERM)
  said = [process.communicate(timeout=90)[0] for process in pair]
  fast, slow = (int(text.split()[1]) for text in said)
  assert fast > 3 * slow > 0
  assert all(
    "and then True True" in text for text in said
  )  # who polls after it leaves at once, on both


def test_both_end_at_once_where_nothing_can_be_lost():
  pair = _pair(f"""
    with stop.interruptible("compiling"):
      print("ready")
      {BUSY}
  """)
  for process in pair:
    ready(process)
  pair[1].send_signal(signal.SIGTERM)
  said = [process.communicate(timeout=60) for process in pair]
  assert [p.returncode for p in pair] == [supervision.STOPPED] * 2, said


def test_the_failure_of_one_is_told_to_the_other():
  pair = _pair("""
    if me:
      stop.failed("the disk is full")
      import os; os._exit(1)
    while True:
      time.sleep(0.1)
      stop()
  """)
  said = [process.communicate(timeout=60) for process in pair]
  assert [p.returncode for p in pair] == [1, 1], said
  assert "process 1: the disk is full" in said[0][1]
