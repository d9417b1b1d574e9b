"""Jobs that must end early: a signal, a failed peer, a hang.

A job polls `stop` once after every unit of work, equally often on every process. After one of
SIGNALS (from a scheduler or platform, or the first Ctrl-C) the poll turns true at the same unit on
all processes; the job saves and raises Interrupted. Where nothing can be lost (imports,
compilation, restoring), the process ends at once.

A thread listens for the signal, because Python runs signal handlers only between bytecodes, and so
never during compilation. Processes agree through the key-value store of jax's coordination service.
jax's preemption notice is not used: it swallows SIGTERM, so a job that does not poll could never be
ended.
"""

import contextlib
import faulthandler
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn, Protocol

HUNG = 75  # exit code of the watchdog: "try again", as sysexits.h has it
STOPPED = 143  # 128 + SIGTERM
# Schedulers warn by one or another of these before a time limit or a preemption; SIGHUP is a
# terminal that closes. Unhandled, each would end the process with nothing saved.
SIGNALS = (
  signal.SIGTERM,
  signal.SIGINT,
  signal.SIGUSR1,
  signal.SIGUSR2,
  signal.SIGHUP,
  signal.SIGXCPU,
)
_PERIOD = 0.5  # seconds between two looks at the peers
_ASKED, _FAILED, _AT = "downscaling/asked", "downscaling/failed", "downscaling/at/"


class Interrupted(Exception):
  """The job was asked to stop. It has saved its work and can be resumed."""


class PeerFailed(RuntimeError):
  """Another process of the job failed; its own log says more."""


class Store(Protocol):
  """The methods we use of jax's coordination client."""

  def key_value_set(
    self, key: str, value: str, allow_overwrite: bool = ...
  ) -> None: ...
  def key_value_try_get(self, key: str) -> str: ...
  def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str: ...


class Stop:
  """stop() -> bool: is it time to save and leave? Use it as a context manager on the main thread.

  Args:
    silence: seconds without a poll after which the process counts as hung. It then prints the
      stacks of all threads and ends with exit code 75, so that a supervisor restarts it. 0: never.
  """

  def __init__(self, silence: float = 0.0):
    self.silence = silence
    self._store: Any = None
    self._process, self._processes = 0, 1
    self._asked, self._agreed = threading.Event(), threading.Event()
    self._lock = threading.Lock()
    self._polls = self._leave_at = 0
    self._safe: list[str] = []
    self._told = False
    self._waits = 0
    self._beat = time.monotonic()
    self._ended = threading.Event()

  def __enter__(self):
    self._read, self._write = os.pipe()
    os.set_blocking(self._write, False)
    self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
    self._handlers = {s: signal.getsignal(s) for s in SIGNALS}
    if self._handlers[signal.SIGHUP] is signal.SIG_IGN:  # by nohup
      del self._handlers[signal.SIGHUP]
    self._listen()
    self._thread = threading.Thread(target=self._watch, name="supervision", daemon=True)
    self._thread.start()
    return self

  def __exit__(self, *_):
    self._ended.set()
    self._thread.join()
    for s, handler in self._handlers.items():
      signal.signal(s, handler)
    signal.set_wakeup_fd(self._wakeup)
    os.close(self._read)
    os.close(self._write)

  def _listen(self) -> None:
    def ask(signum, frame):
      again = self._asked.is_set() and signum == signal.SIGINT
      if again and time.monotonic() - self._asked_at > 1:
        raise KeyboardInterrupt  # the second Ctrl-C
      self._ask()

    for s in self._handlers:
      signal.signal(s, ask)

  def _ask(self) -> None:
    if not self._asked.is_set():
      self._asked_at = time.monotonic()
      self._asked.set()

  def connect(self, store: Store | None, process: int, processes: int) -> None:
    """Call it once the processes have joined; from then on they agree when to stop.

    store: of the coordination service; None for a single process.
    """
    self._process, self._processes = process, processes
    self._store = store if processes > 1 else None
    self._listen()  # jax.distributed has put its own handler there

  def __call__(self) -> bool:
    """One poll. Call it once after every unit of work, equally often on every process."""
    with self._lock:
      self._beat = time.monotonic()
      self._polls += 1
      polls, told = self._polls, self._told
    if self._store is None:
      return self._asked.is_set()
    if not told:
      return False
    # Bounded by the thread, which gives up on peers that do not answer.
    self._agreed.wait()
    return polls >= self._leave_at

  def told(self) -> bool:
    """True if any process was asked to stop. This is no poll: processes may call it at any pace.

    It turns true within a second on all processes. They must then meet, because they do not leave
    at the same unit.
    """
    self._beat = time.monotonic()
    return self._told or self._asked.is_set()

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """A block in which this process only waits for another one, so it does not count as hung.

    The other process has its own watchdog.
    """
    self._waits += 1
    try:
      yield
    finally:
      self._beat = time.monotonic()
      self._waits -= 1

  def beat(self) -> None:
    """Says that the job is alive. For long work between two polls."""
    self._beat = time.monotonic()

  @contextlib.contextmanager
  def interruptible(self, doing: str) -> Iterator[None]:
    """A block in which this process may end at any moment without loss. doing: for the message."""
    self._beat = time.monotonic()
    with self._lock:
      self._safe.append(doing)
    try:
      yield
    finally:
      with self._lock:
        self._safe.pop()
      self._beat = time.monotonic()

  def failed(self, text: str) -> None:
    """Tells the peers that this process fails, so that they do not wait for it."""
    store = self._store
    if store is not None:
      self._told = True  # so that our own thread leaves the last word to us
      with contextlib.suppress(Exception):
        store.key_value_set(
          _FAILED, f"process {self._process}: {text}", allow_overwrite=True
        )
      self._outlast_peers()

  def end(self, why: str) -> NoReturn:
    """Ends this process at once, from any thread, as it must not write any more."""
    self._end(1, why.rstrip("."))

  # ---------------------------------------------------------------- the thread

  def _watch(self) -> None:
    while not self._ended.is_set():
      if select.select([self._read], [], [], _PERIOD)[0]:
        os.read(self._read, 64)
        self._ask()
      if self._store is None:
        if self._asked.is_set():
          with self._lock:
            if self._safe:
              self._end(
                STOPPED,
                f"stopped while {self._safe[-1]}; run the same command to go on",
              )
      elif not self._told:
        self._look_at_peers()
      quiet = time.monotonic() - self._beat
      if self.silence and not self._waits and quiet > self.silence:
        faulthandler.dump_traceback(all_threads=True)
        self._end(
          HUNG,
          f"no sign of life for {self.silence:g} s: the stacks are above. Start it again: it goes "
          "on from what is saved. If it was only slow, raise --config.supervision.silence",
        )

  def _look_at_peers(self) -> None:
    text = self._get(_FAILED)
    if text:
      self._outlast_peers()
      self._end(1, f"another process failed and this one cannot go on alone ({text})")
    if self._asked.is_set() or self._get(_ASKED):
      with contextlib.suppress(Exception):
        self._store.key_value_set(_ASKED, str(self._process), allow_overwrite=True)
      self._agree()

  def _agree(self) -> None:
    """Agrees with all peers when to leave.

    They leave at the first poll that none has passed yet; or at once, if nothing can be lost on any
    of them.
    """
    with self._lock:
      self._told = True
      mine = [self._polls, bool(self._safe)]
    try:
      self._store.key_value_set(f"{_AT}{self._process}", json.dumps(mine))
      keys = [f"{_AT}{p}" for p in range(self._processes)]
      told = [
        json.loads(self._store.blocking_key_value_get(key, 60_000)) for key in keys
      ]
    except Exception as error:
      self._end(
        STOPPED, f"stopped; a peer did not answer ({str(error).splitlines()[0][:100]})"
      )
    if all(safe for _, safe in told):
      self._outlast_peers()
      self._end(
        STOPPED, "stopped while nothing could be lost; run the same command to go on"
      )
    self._leave_at = max(polls for polls, _ in told) + 1
    self._agreed.set()

  def _outlast_peers(self) -> None:
    """Process 0 holds the store, so it waits until its peers have read it and left."""
    if self._process == 0:
      time.sleep(4 * _PERIOD)

  def _get(self, key: str) -> str | None:
    try:
      return self._store.key_value_try_get(key)
    except Exception:
      # Not there, or the store is gone: then jax ends the process itself.
      return None

  def _end(self, code: int, text: str) -> NoReturn:
    """Ends the process at once."""
    if code != STOPPED or self._process == 0:
      print(f"downscaling: {text}.", file=sys.stderr, flush=True)
    os._exit(code)
