"""launch/rehearse.sh: starts, restarts and ends a group of processes as a cluster would.

Most tests need no jax.
"""

import os
import signal
import time

import pytest

from tests.test_distributed import numbers, rehearse, start, wait_for


def shell(code):
  return ["bash", "-c", code]


def alive(pid):
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  return True


def test_what_a_process_gets(tmp_path):
  code = "echo $JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS: $XLA_FLAGS; "
  code += "echo $PATH $$ >&2"
  flags = "--xla_a=1 --xla_force_host_platform_device_count=7 --xla_b=2"
  said = rehearse(2, 3, shell(code), XLA_FLAGS=flags, PIDFILE=str(tmp_path / "pids"))
  pids, lines = numbers(tmp_path / "pids"), said.splitlines()
  for i in (0, 1):
    (out,) = (
      line for line in lines if line.startswith(f"[{i}] {i} of 2 at 127.0.0.1:")
    )
    assert "--xla_a=1" in out
    assert "--xla_b=2" in out
    assert "=7" not in out
    assert out.endswith("--xla_force_host_platform_device_count=3")
    (error,) = (line for line in lines if line.startswith(f"[{i}] /"))
    assert error.endswith(f" {pids[i]}")
  assert "rehearse: 2 process(es) of 3 device(s): bash -c" in said
  assert "rehearse: all done" in said


def test_it_says_how_to_call_it():
  assert "need a number of processes and a job" in rehearse(
    "two", 1, shell("true"), code=1
  )
  assert "need a number of processes and a job" in rehearse(2, 1, [], code=1)


def test_killed_once_the_group_starts_again_and_agrees(tmp_path):
  """Process 1 kills itself as it has joined; process 0 waits for it in vain, until it is ended."""
  code = f"""
import os, pathlib
from downscaling.runtime import joining, processes
joining.start("on")
me, marker = processes.place()[0], pathlib.Path({str(tmp_path / "marker")!r})
processes.barrier("joined")
if me and not marker.exists():
  marker.touch()
  os.kill(os.getpid(), 9)
print("agreed", processes.gather("a", me))
"""
  began = time.monotonic()
  said = rehearse(2, 1, ["python", "-c", code], RESTARTS="2", GRACE="2")
  assert time.monotonic() - began < 60  # the heartbeat of jax alone takes 100 s
  assert said.count("rehearse: 2 process(es)") == 2
  assert "rehearse: a process ended with code 137; starting all again (1 of 2)" in said
  assert said.count("agreed [0, 1]") == 2


def test_an_error_is_not_tried_again(tmp_path):
  pids = tmp_path / "pids"
  process = start(
    2, 1, shell("[ $JAX_PROCESS_ID = 1 ] && exit 1; exec sleep 100"), pids, RESTARTS="3"
  )
  said, _ = process.communicate(timeout=20)
  assert process.returncode == 1
  assert said.count("process(es) of") == 1
  assert "ended with an error, which starting again would not mend" in said
  assert not any(alive(pid) for pid in numbers(pids).values())


@pytest.mark.parametrize(
  ("argv", "code"), [(["no-such-program"], 127), (["README.md"], 126)]
)
def test_what_the_shell_cannot_start_is_not_tried_again(argv, code):
  said = rehearse(
    2, 1, [argv[0] if code == 127 else f"./{argv[0]}"], code=code, RESTARTS="3"
  )
  assert said.count("process(es) of") == 1
  assert "which starting again would not mend" in said


def test_a_jobs_words_are_enough():
  """Without `downscaling` before them; a job that has no --workdir gets one."""
  said = rehearse(1, 1, ["doctor"])
  assert "all is well" in said
  said = rehearse(1, 1, ["generate", "--config=ks:smoke", "--dry_run"])
  assert "/runs/rehearsal" in said
  assert "dry run, nothing is written" in said


def test_an_error_counts_before_the_deaths_that_follow_it():
  """Both are dead when the group is looked at: that process 0 was aborted must not hide why."""
  code = "[ $JAX_PROCESS_ID = 0 ] && { kill -STOP $PPID; sleep 0.5; "
  code += "(sleep 0.5; kill -CONT $PPID) & kill -ABRT $$; }; "
  code += "sleep 0.2; exit 1"
  said = rehearse(2, 1, shell(code), code=1, RESTARTS="3")
  assert said.count("process(es) of") == 1, said


@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_waited_for(tmp_path, told):
  pids = tmp_path / "pids"
  code = (
    f"trap 'sleep 0.5; echo saved; exit 143' TERM; touch {tmp_path}/$JAX_PROCESS_ID; "
  )
  code += "while :; do sleep 0.05; done"
  process = start(2, 1, shell(code), pids, RESTARTS="3")
  wait_for(lambda: all((tmp_path / i).exists() for i in "01"), process, 20)
  process.send_signal(told)
  said, _ = process.communicate(timeout=20)
  assert process.returncode == 143, said
  assert said.count("] saved") == 2
  assert said.count("process(es) of") == 1
  assert "rehearse: stopped, as asked" in said
  assert not any(alive(pid) for pid in numbers(pids).values())


def test_one_that_does_not_listen_is_killed(tmp_path):
  pids = tmp_path / "pids"
  code = "[ $JAX_PROCESS_ID = 1 ] && { sleep 0.3; exit 75; }; "
  code += "trap '' TERM; while :; do sleep 0.1; done"
  began = time.monotonic()
  process = start(2, 1, shell(code), pids, RESTARTS="1", GRACE="1")
  said, _ = process.communicate(timeout=30)
  assert process.returncode == 75, said
  assert time.monotonic() - began > 2  # the grace, twice
  assert "code 75; starting all again (1 of 1)" in said
  assert "code 75; that was the last of 1 restart(s)" in said
  assert not any(alive(pid) for pid in numbers(pids).values())


def test_a_preempted_group_starts_again(tmp_path):
  """Process 1 is preempted; process 0 follows by itself the first time, is ended the second; the
  third is well.
  """
  code = f"""
    turn=$(ls {tmp_path} | wc -l)
    [ $JAX_PROCESS_ID = 1 ] && {{
      sleep 0.5; touch {tmp_path}/$turn; [ $turn = 2 ] && exit 0; exit 143;
    }}
    trap 'echo told; exit 143' TERM
    [ $turn = 0 ] && {{ sleep 1; echo followed; exit 143; }}
    [ $turn = 1 ] && while :; do sleep 0.1; done
    exit 0
  """
  said = rehearse(2, 1, shell(code), RESTARTS="2", GRACE="2")
  assert said.count("a process ended with code 143; starting all again") == 2
  first, second, _ = said.split("starting all again")
  assert "[0] followed" in first
  assert "[0] told" not in first
  assert "[0] told" in second


def test_a_signal_while_a_group_is_ended_stops_it_all(tmp_path):
  code = f"trap 'touch {tmp_path}/told; sleep 1; exit 143' TERM; "
  code += "[ $JAX_PROCESS_ID = 1 ] && { sleep 0.3; exit 9; }; "
  process = start(2, 1, shell(code + "while :; do sleep 0.05; done"), RESTARTS="3")
  wait_for((tmp_path / "told").exists, process, 20)
  process.send_signal(signal.SIGTERM)
  said, _ = process.communicate(timeout=20)
  assert process.returncode == 143, said
  assert said.count("process(es) of") == 1
