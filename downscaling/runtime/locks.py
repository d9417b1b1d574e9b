"""A lock file: one job at a time writes into a folder, on one host or on many that see the same
file system.

The file holds host, pid and since when, and is touched every BEAT seconds while the holder lives.
Whoever finds it asks whether the holder still does: on its own host the kernel knows; of another
host the file tells, which then does not change for PATIENCE seconds of ours, or is older than STALE
by the file system's own clock (clocks of hosts differ). A dead holder's lock is taken over; a live
holder is named and left alone.
"""

import contextlib
import datetime
import fcntl
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Iterator

from downscaling.runtime import files, progress

BEAT = 15.0  # seconds between two signs of life
# Seconds that another host's lock is watched: file systems may show changes a minute late, and of a
# job whose process 0 died, the other processes have ended by then (processes.start: after 100 s of
# silence).
PATIENCE = 120.0
STALE = 600.0  # seconds after which it need not be watched


class Held(OSError):
  """Another live job holds the lock, or has taken it over."""


class Lock:
  """A lock in our hands: `check` raises Held once it is not."""

  def __init__(self, path: pathlib.Path, token: str):
    self.path, self.token = path, token

  def check(self) -> None:
    """Call before anything is written: a machine that slept for an hour may have been given up by
    others.
    """
    if (found := _read(self.path)) is None or found.get("token") != self.token:
      raise Held(
        f"{self.path} is no longer ours, but {_words(found)}: this process was silent for so long "
        "that another took over. What it has finished is whole; let the other go on, or run this "
        "command again once it has ended."
      )


@contextlib.contextmanager
def hold(path: str | os.PathLike, what: str) -> Iterator[Lock]:
  """Holds the lock file `path`, in a folder that exists, for the length of the block.

  Args:
    what: that it protects, for the message.
  Raises: Held if another live job has it, naming host, pid and since when.
  """
  path, lock = pathlib.Path(path), None
  ended = threading.Event()
  while lock is None:
    if (found := _read(path)) is not None and not _dead(path, found):
      raise Held(
        f"{what} is being written by another job: {_words(found)}. Wait for it, or end it and run "
        "this command again; if it has died, its lock is taken over by itself."
      )
    lock = _take(path, found)

  def beat():
    while not ended.wait(BEAT):
      with contextlib.suppress(OSError, Held):  # the next check says what is wrong
        lock.check()
        os.utime(path)

  thread = threading.Thread(target=beat, name="lock", daemon=True)
  thread.start()
  try:
    yield lock
  finally:
    ended.set()
    thread.join()
    with contextlib.suppress(OSError, Held):
      lock.check()
      path.unlink()


def _take(path: pathlib.Path, dead: dict | None) -> Lock | None:
  """Puts our lock where there is none, or the dead one that was found; None if another was faster."""
  token = secrets.token_hex(8)
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  with _alone(path.parent):
    if (_read(path) or {}).get("token") != (dead or {}).get("token"):
      return None
    if dead is None and path.exists():
      raise Held(
        f"{path} is empty or not ours: look at it, and move it away if no job is running there."
      )
    if dead is not None:
      progress.say(f"{path}: taking over from {_words(dead)}, which is dead.")
      path.unlink()
    fresh = path.with_name(f".{path.name}.{token}")
    files.write_json(fresh, _here() | {"since": now, "token": token})
    try:
      os.link(fresh, path)  # all or nothing, and only one can
    except FileExistsError:
      return None
    except OSError:  # no hard links here: a moment in which two could meet
      if path.exists():
        return None
      os.replace(fresh, path)
    finally:
      fresh.unlink(missing_ok=True)
  return Lock(path, token)


@contextlib.contextmanager
def _alone(folder: pathlib.Path) -> Iterator[None]:
  """One process of this host at a time, where the file system can: two may find the same dead lock."""
  handle = os.open(folder, os.O_RDONLY)
  try:
    with contextlib.suppress(OSError):
      fcntl.flock(handle, fcntl.LOCK_EX)
    yield
  finally:
    os.close(handle)


def _read(path: pathlib.Path) -> dict | None:
  """None if there is none, or no JSON yet."""
  try:
    return files.read_json(path)
  except (FileNotFoundError, ValueError):
    return None


def _here() -> dict:
  return {
    "host": socket.gethostname(),
    "place": _place(),
    "pid": os.getpid(),
    "started": _started(os.getpid()),
  }


def _place() -> str:
  """Where a process number means the same: this boot of this host, and within it this container."""
  found = []
  with contextlib.suppress(OSError):
    found = [
      pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
      os.readlink("/proc/self/ns/pid"),
    ]
  return " ".join(found)


def _started(pid: int) -> str:
  """Start of a process in ticks since boot, as numbers are given again; "" where the system does
  not say.
  """
  try:
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
  except (OSError, IndexError):
    return ""


def _dead(path: pathlib.Path, found: dict) -> bool:
  """Is the holder gone? Of another host, this may take PATIENCE seconds."""
  here = _here()
  if (found.get("host"), found.get("place")) == (here["host"], here["place"]):
    try:
      os.kill(found["pid"], 0)
    except ProcessLookupError:
      return True
    except PermissionError:
      pass
    return _started(found["pid"]) != found["started"]
  deadline, first = time.monotonic() + PATIENCE, _changed(path)
  if _now(path.parent) - (first or 0) > STALE:
    return True
  progress.say(
    f"{path}: held by {_words(found)}; watching for up to {PATIENCE:g} s whether it still lives."
  )
  while time.monotonic() < deadline:
    if _changed(path) != first:
      return first is not None and _changed(path) is None  # gone by itself
    time.sleep(0.2)
  return True


def _changed(path: pathlib.Path) -> float | None:
  try:
    return path.stat().st_mtime
  except FileNotFoundError:
    return None


def _now(folder: pathlib.Path) -> float:
  """The file system's clock."""
  probe = folder / f".{secrets.token_hex(8)}.tmp"
  try:
    probe.touch()
    return probe.stat().st_mtime
  finally:
    probe.unlink(missing_ok=True)


def _words(found: dict | None) -> str:
  if not found:
    return "nobody"
  return f"host {found.get('host')}, pid {found.get('pid')}, since {found.get('since')}"
