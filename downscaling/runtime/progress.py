"""What a job says while it works: lines and bars of progress, from the main process only."""

import sys
import time

from downscaling.runtime import mesh as meshes
from downscaling.runtime import streams


def is_time(every: int, step: int, last: int) -> bool:
  """True at multiples of `every` and at the last step; every <= 0 means only there."""
  return step == last or (every > 0 and step % every == 0)


class Progress:
  """Reports progress with rate and ETA: a live bar on a terminal, a line now and then in a log.

  In a log, a line appears at most every `seconds`.
  with Progress("generate", total=64, unit="blocks") as bar:
    bar.advance(1, loss=0.3)
  """

  def __init__(
    self, name: str, total: int, unit: str, done: int = 0, seconds: float = 15.0
  ):
    self.name, self.total, self.unit, self.seconds = name, total, unit, seconds
    self.done = self.start = done
    self._began = self._said = time.monotonic()
    self._notes: dict[str, float] = {}
    self._bar = None

  def __enter__(self):
    if sys.stderr.isatty() and self.total > self.done and meshes.is_main():
      from rich import progress as rich_progress
      from rich.console import Console

      count = "{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}"
      self._bar = rich_progress.Progress(
        "{task.description}",
        rich_progress.BarColumn(),
        count,
        rich_progress.TimeElapsedColumn(),
        "ETA",
        rich_progress.TimeRemainingColumn(),
        "{task.fields[notes]}",
        console=Console(stderr=True),
        refresh_per_second=4,
      )
      self._task = self._bar.add_task(
        self.name, total=self.total, completed=self.done, unit=self.unit, notes=""
      )
      self._bar.start()
    return self

  def advance(self, count: int = 1, **notes: float) -> None:
    """Counts units of work as done; notes are shown behind the progress."""
    self.done += count
    self._notes |= notes
    words = []
    for name, value in self._notes.items():
      words.append(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
      )
    text = " ".join(words)
    if self._bar:
      self._bar.update(self._task, completed=self.done, notes=text)
      return
    now = time.monotonic()
    if now - self._said >= self.seconds or self.done >= self.total:
      self._said = now
      rate = (self.done - self.start) / max(now - self._began, 1e-9)
      eta = (self.total - self.done) / rate if rate else float("inf")
      counted = f"{self.name}: {self.done}/{self.total} {self.unit}"
      say(f"{counted}, {rate:.3g}/s, ETA {eta:.0f} s {text}".rstrip())

  def __exit__(self, *_):
    if self._bar:
      self._bar.stop()


def say(text: str) -> None:
  """Prints one line on stderr, from the main process only."""
  if meshes.is_main():
    print(streams.printable(text), file=sys.stderr, flush=True)
