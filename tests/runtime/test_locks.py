"""Locks between real processes and, by forged files, between hosts."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from downscaling.runtime import files, locks

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path):
  return tmp_path / "lock.json"


def holder(path):
  """Another process that holds the lock until it is ended."""
  code = f"""
import time
from downscaling.runtime import locks
with locks.hold({str(path)!r}, "it"):
  print("held", flush=True)
  time.sleep(100)
"""
  process = subprocess.Popen(
    [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
  )
  assert process.stdout.readline() == "held\n"
  return process


def forge(path, **changes):
  """The lock of this very process, as another one would have it."""
  files.write_json(
    path,
    locks._here() | {"since": "2026-01-01T00:00:00+00:00", "token": "theirs"} | changes,
  )


def test_held_let_go_and_held_again(path):
  for _ in range(2):
    with locks.hold(path, "it") as lock:
      lock.check()
      with pytest.raises(
        locks.Held,
        match=rf"it is being written by another job: host .*, pid {os.getpid()}, since",
      ):
        locks.hold(path, "it").__enter__()
    assert list(path.parent.iterdir()) == []


def test_a_live_process_is_refused_and_a_dead_one_replaced(path):
  process = holder(path)
  with (
    pytest.raises(locks.Held, match=f"pid {process.pid}, since 20"),
    locks.hold(path, "it"),
  ):
    pass
  process.send_signal(signal.SIGKILL)
  process.communicate()
  with locks.hold(path, "it"):
    assert files.read_json(path)["pid"] == os.getpid()
  assert list(path.parent.iterdir()) == []


def test_a_number_given_to_another_process_is_no_life(path):
  """After a restart of a container the dead job's number is often our own."""
  forge(path, started="1")
  with locks.hold(path, "it") as lock:
    lock.check()


def test_another_hosts_lock_is_watched(path, monkeypatch):
  monkeypatch.setattr(locks, "PATIENCE", 0.6)
  forge(path, host="elsewhere")
  with locks.hold(path, "it"):  # it did not move: dead
    assert files.read_json(path)["host"] != "elsewhere"
  forge(path, host="elsewhere", token="alive")
  threading.Timer(0.2, os.utime, (path,)).start()
  with pytest.raises(locks.Held, match="host elsewhere"), locks.hold(path, "it"):
    pass
  assert files.read_json(path)["token"] == "alive"


def test_another_hosts_old_lock_need_not_be_watched(path):
  forge(path, host="elsewhere")
  os.utime(path, (time.time() - 700,) * 2)
  began = time.monotonic()
  with locks.hold(path, "it"):
    assert time.monotonic() - began < 10


def test_the_holder_gives_signs_of_life_and_notices_a_loss(path, monkeypatch):
  monkeypatch.setattr(locks, "BEAT", 0.05)
  with locks.hold(path, "it") as lock:
    os.utime(path, (1, 1))
    time.sleep(0.5)
    assert path.stat().st_mtime > 1
    forge(path, host="elsewhere")  # as one does who thought us dead
    with pytest.raises(locks.Held, match="no longer ours, but host elsewhere"):
      lock.check()
  assert files.read_json(path)["host"] == "elsewhere"  # and it is not ours to remove


def test_of_many_only_one_takes_a_dead_lock(path):
  forge(path, started="1")
  taken, refused = [], []
  gate = threading.Barrier(8)

  def try_it():
    gate.wait()
    try:
      with locks.hold(path, "it") as lock:
        taken.append(lock.token)
        time.sleep(0.5)
    except locks.Held:
      refused.append(1)

  threads = [threading.Thread(target=try_it) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert (len(taken), len(refused)) == (1, 7)


def test_a_file_that_is_no_lock_is_kept(path):
  path.write_text("mine")
  with pytest.raises(locks.Held, match="empty or not ours"), locks.hold(path, "it"):
    pass
  assert path.read_text() == "mine"
