"""A lock file: one job at a time writes into a folder that one or many hosts see.

The file holds host, pid and start time of its holder, who touches it every BEAT seconds. A job that
finds a lock asks whether the holder is alive. On the same host, the kernel answers. For another
host, the holder counts as dead if the file does not change for PATIENCE seconds, or if it is older
than STALE by the file system's own clock (the clocks of hosts differ). A dead holder's lock is
taken over; a live holder is named and left alone.

On an object store the file says itself when its holder was last alive, by the holder's clock, and
it is made, renewed and taken over by compare-and-swap.
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
from collections.abc import Callable, Iterator

from downscaling.runtime import files, progress
from downscaling.runtime.remote_paths import RemotePath

BEAT = 15.0  # seconds between two signs of life
# Seconds that another host's lock is watched: file systems may show changes a minute late, and of a
# job whose process 0 died, the other processes have ended by then (joining.start: after 100 s of
# silence).
PATIENCE = 120.0
STALE = 600.0  # seconds after which it need not be watched


class Held(OSError):
  """Another live job holds the lock, or has taken it over."""


class Lock:
  """A lock that this process holds; `check` raises Held once it does not."""

  def __init__(self, path: pathlib.Path, token: str):
    self.path, self.token = path, token

  def check(self) -> None:
    """Raises Held if another job took the lock over. Call it before anything is written.

    A machine that slept for an hour may have been given up by others.
    """
    found = _read(self.path)
    if found is None or found.get("token") != self.token:
      raise Held(
        f"{self.path} is no longer ours, but {_words(found)}: this process was silent for so long "
        "that another took over. What it has finished is whole; let the other go on, or run this "
        "command again once it has ended."
      )

  def beat(self) -> None:
    """A sign of life. Raises Held as `check` does."""
    self.check()
    if not isinstance(self.path, RemotePath):
      return os.utime(self.path)
    version = self.path.version()
    found = _read(self.path) or {}
    if found.get("token") == self.token:
      self.path.swap(_signed(found), version)


@contextlib.contextmanager
def hold(
  path: str | os.PathLike,
  what: str,
  wait: bool = False,
  lost: Callable[[str], object] = lambda why: None,
) -> Iterator[Lock]:
  """Holds the lock file `path`, in an existing folder, for the length of the block.

  Args:
    what: the protected thing, for the message.
    wait: until another live job gives the lock back, as it holds it for a short time only.
    lost: called from a thread, with a reason, once another job has taken the lock over.
  Raises: Held if another live job has the lock; the message names host, pid and start time.
  """
  path, lock = files.as_path(path), None
  ended = threading.Event()
  while lock is None:
    found = _read(path)
    if found is not None and not _dead(path, found):
      if wait:
        time.sleep(0.2)
        continue
      raise Held(
        f"{what} is being written by another job: {_words(found)}. Wait for it, or end it and run "
        "this command again; if it has died, its lock is taken over by itself."
      )
    lock = _take(path, found)

  def beat():
    while not ended.wait(BEAT):
      try:
        lock.beat()
      except Held as error:
        return lost(str(error))
      except OSError:  # the file system is away for a while
        pass

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
  """Takes a free lock, or that of the holder `dead`; None if another job was faster."""
  token = secrets.token_hex(8)
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  expected = dead.get("token") if dead else None
  record = _here() | {"since": now, "token": token}
  with _alone(path.parent):
    version = path.version() if isinstance(path, RemotePath) else None
    current = _read(path) or {}
    if current.get("token") != expected:
      return None
    if dead is None and path.exists():
      raise Held(
        f"{path} is empty or not ours: look at it, and move it away if no job is running there."
      )
    if dead is not None:
      progress.say(f"{path}: taking over from {_words(dead)}, which is dead.")
    if isinstance(path, RemotePath) and version is not None:
      made = path.swap(_signed(record), version)
    else:
      if dead is not None:
        path.unlink()
      made = files.create_json(path, record)
  return Lock(path, token) if made else None


def _signed(record: dict) -> bytes:
  """The lock of an object store, with the time of now."""
  return files.sealed(record | {"seen": time.time()}).encode()


def holder(path: str | os.PathLike) -> str | None:
  """Who holds the lock file, in words; None if nobody alive does.

  It may take PATIENCE seconds, see `_dead`.
  """
  path = files.as_path(path)
  found = _read(path)
  return None if found is None or _dead(path, found) else _words(found)


@contextlib.contextmanager
def _alone(folder: pathlib.Path) -> Iterator[None]:
  """One process of this host at a time, if the file system has flock.

  Two processes may find the same dead lock. An object store compares and swaps instead.
  """
  if isinstance(folder, RemotePath):
    yield
    return
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
  """Where a process id means the same: this boot of this host, and this container on it."""
  found = []
  with contextlib.suppress(OSError):
    found = [
      pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
      os.readlink("/proc/self/ns/pid"),
    ]
  return " ".join(found)


def _started(pid: int) -> str:
  """Start of a process in ticks since boot, "" if unknown; process ids are used again."""
  try:
    words = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return words[19]
  except (OSError, IndexError):
    return ""


def dead_here(path: pathlib.Path) -> bool:
  """True if the holder was a process of this host, and is gone. Of other hosts it knows nothing."""
  found = _read(path)
  return found is not None and _is_here(found) and _gone(found)


def _is_here(found: dict) -> bool:
  here = _here()
  return all(found.get(name) == here[name] for name in ("host", "place"))


def _gone(found: dict) -> bool:
  """Has the holder, a process of this host, ended?"""
  try:
    os.kill(found["pid"], 0)
  except ProcessLookupError:
    return True
  except PermissionError:
    pass
  return _started(found["pid"]) != found["started"]


def _dead(path: pathlib.Path, found: dict) -> bool:
  """True if the holder is gone. For a holder on another host this may take PATIENCE seconds."""
  if _is_here(found):
    return _gone(found)
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


def silent(path: pathlib.Path) -> float:
  """Seconds since the last sign of life, by this host's clock. Raises: FileNotFoundError if the
  lock is gone.
  """
  seen = _changed(path)
  if seen is None:
    raise FileNotFoundError(f"{path} is not there")
  return time.time() - seen


def _changed(path: pathlib.Path) -> float | None:
  """When the holder was last alive."""
  if isinstance(path, RemotePath):
    return (_read(path) or {}).get("seen")
  try:
    return path.stat().st_mtime
  except FileNotFoundError:
    return None


def _now(folder: pathlib.Path) -> float:
  """The file system's clock; for an object store, this host's."""
  if isinstance(folder, RemotePath):
    return time.time()
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
