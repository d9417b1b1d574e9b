"""Where the wall time of a stage goes, over all of its attempts and hosts.

An attempt is one process at work on one stage: STAGE/attempts/NAME.json says when it began, was
last seen and ended, on which devices, and the seconds that did not advance the work: compiling,
restoring, saving, waiting for input. `spend` marks such a time where it is spent, `saved` says that
all work so far is on disk. A killed attempt is known by the last sign of life, which a thread
writes every BEAT seconds.
"""

import contextlib
import dataclasses
import datetime
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Sequence

import jax

from downscaling.runtime import files, supervision

FOLDER = "attempts"
BEAT = 15.0  # seconds between two signs of life
KINDS = ("compiling", "restoring", "saving", "waiting for input")
# What jax tells of a compilation, with its seconds.
_COMPILING = (
  "/jax/core/compile/jaxpr_trace_duration",
  "/jax/core/compile/jaxpr_to_mlir_module_duration",
  "/jax/core/compile/backend_compile_duration",
)


class Attempt:
  """The account of this process at work on one stage; see the module."""

  def __init__(self, folder: pathlib.Path, process: int, devices: str):
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S")
    name = f"{now}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}.json"
    self.path = folder / FOLDER / name
    self._lock = threading.Lock()
    self._seconds: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    self._compiled: list[tuple[float, float]] = []
    self._began = self._saved = time.time()
    self._about = {"host": socket.gethostname(), "process": process, "devices": devices}

  def add(self, kind: str, began: float, ended: float) -> None:
    """Counts the time between two readings of time.time() as one of KINDS."""
    with self._lock:
      # Threads compile at a time, and one compilation may hold another.
      if kind == "compiling":
        self._compiled = merged([*self._compiled, (began, ended)])
      else:
        self._seconds[kind] += ended - began - overlap(self._compiled, began, ended)

  def saved(self) -> None:
    """All work so far is on disk."""
    self._saved = time.time()

  def write(self, outcome: str = "") -> None:
    """outcome: "done", "stopped" or "failed"; "" while it goes on."""
    with self._lock:
      spent = self._seconds | {"compiling": sum(b - a for a, b in self._compiled)}
    if outcome == "done":
      self.saved()
    record = self._about | {
      "began": self._began,
      "saved": self._saved,
      "seen": time.time(),
      "outcome": outcome,
      "seconds": {kind: round(seconds, 3) for kind, seconds in spent.items()},
    }
    files.write_json(self.path, record)


_at_work: list[Attempt] = []  # of this process; jobs of a pipeline follow each other


@contextlib.contextmanager
def attempt(folder: pathlib.Path, process: int, devices: str) -> Iterator[Attempt]:
  """Accounts for the block as an attempt at the stage in `folder`."""
  account, ended = Attempt(folder, process, devices), threading.Event()
  account.path.parent.mkdir(exist_ok=True)
  account.write()
  _listen()

  def beat():
    while not ended.wait(BEAT):
      with contextlib.suppress(OSError):  # a full disk is said by what cannot be saved
        account.write()

  thread = threading.Thread(target=beat, name="ledger", daemon=True)
  thread.start()
  _at_work.append(account)
  outcome = "failed"
  try:
    yield account
    outcome = "done"
  except supervision.Interrupted:
    outcome = "stopped"
    raise
  finally:
    _at_work.remove(account)
    ended.set()
    thread.join()
    with contextlib.suppress(OSError):
      account.write(outcome)


@contextlib.contextmanager
def spend(kind: str) -> Iterator[None]:
  """The block is one of KINDS. It does nothing where no attempt is under way."""
  began = time.time()
  try:
    yield
  finally:
    for account in _at_work[-1:]:
      account.add(kind, began, time.time())


def saved() -> None:
  """All work so far is on disk."""
  for account in _at_work[-1:]:
    account.saved()


_listening: list[bool] = []


def _listen() -> None:
  """Hears of every compilation from now on, once a process."""
  if _listening:
    return
  _listening.append(True)

  def compiled(event: str, duration_secs: float, **kwargs: str | int) -> None:
    if event in _COMPILING and _at_work:
      now = time.time()
      _at_work[-1].add("compiling", now - duration_secs, now)

  jax.monitoring.register_event_duration_secs_listener(compiled)


def merged(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
  """Spans of time as disjoint ones, in order."""
  found: list[tuple[float, float]] = []
  for began, ended in sorted(spans):
    if found and began <= found[-1][1]:
      found[-1] = (found[-1][0], max(found[-1][1], ended))
    else:
      found.append((began, ended))
  return found


def overlap(
  spans: Sequence[tuple[float, float]],
  began: float,
  ended: float,
) -> float:
  """Seconds of [began, ended] that lie in disjoint spans."""
  return sum(max(0.0, min(b, ended) - max(a, began)) for a, b in spans)


# ---------------------------------------------------------------- read


@dataclasses.dataclass(frozen=True)
class Account:
  """What became of the wall time of one stage, in seconds.

  attempts: how many jobs worked on it, hosts: on how many hosts. under_way: jobs that were alive a
  moment ago. wall: since the first start, until the last sign of life. apart: of it, when nobody
  was at work. busy: process-seconds of all attempts, which are the sum of productive, of `spent`
  and of lost (work since the last save of an attempt that ended by force).
  """

  attempts: int
  hosts: int
  under_way: int
  wall: float
  apart: float
  busy: float
  productive: float
  spent: dict[str, float]
  lost: float


def read(folder: pathlib.Path) -> list[dict]:
  """All attempts at a stage, in order of their beginnings. One that is damaged is left out."""
  found = []
  for path in (folder / FOLDER).glob("*.json"):
    with contextlib.suppress(ValueError):
      found.append(files.read_json(path))
  return sorted(found, key=lambda record: record["began"])


def began(folder: pathlib.Path) -> float:
  """When the first attempt at a stage began, as time.time() has it; infinity if there is none."""
  return min((record["began"] for record in read(folder)), default=float("inf"))


def account(folder: pathlib.Path, now: float | None = None) -> Account | None:
  """Of one stage; None if nobody has worked there. now: time.time(), for who is still alive."""
  records, now = read(folder), time.time() if now is None else now
  if not records:
    return None
  alive = [not r["outcome"] and now - r["seen"] < 4 * BEAT for r in records]
  spent: dict[str, float] = dict.fromkeys(KINDS, 0.0)
  lost = busy = 0.0
  for record, lives in zip(records, alive, strict=True):
    busy += record["seen"] - record["began"]
    for kind, seconds in record["seconds"].items():
      spent[kind] += seconds
    if not lives and record["outcome"] in ("", "failed"):
      lost += record["seen"] - max(record["saved"], record["began"])
  # What was spent after the last save is lost as well; it must not count twice.
  lost = min(lost, max(0.0, busy - sum(spent.values())))
  at_work = merged([(r["began"], r["seen"]) for r in records])
  wall = at_work[-1][1] - at_work[0][0]
  return Account(
    attempts=sum(r["process"] == 0 for r in records),
    hosts=len({r["host"] for r in records}),
    under_way=sum(
      lives and r["process"] == 0 for r, lives in zip(records, alive, strict=True)
    ),
    wall=wall,
    apart=wall - sum(b - a for a, b in at_work),
    busy=busy,
    productive=max(0.0, busy - sum(spent.values()) - lost),
    spent=spent,
    lost=lost,
  )


def seconds(folder: pathlib.Path) -> float:
  """Wall time that the attempts of process 0 took together."""
  return sum(r["seen"] - r["began"] for r in read(folder) if r["process"] == 0)


def devices(folder: pathlib.Path) -> list[str]:
  """The kinds and numbers of devices of all attempts, in words."""
  return sorted({r["devices"] for r in read(folder)})
