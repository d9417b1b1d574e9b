"""Independent jobs that draw for one store: who they are, and where each begins.

Every job keeps a lock file of its own, drawing-TOKEN.json, beside the markers of units. While one
of them is alive, the store does not grow.
"""

import contextlib
import os
import pathlib
import secrets

from downscaling.runtime import locks

_PATTERN = "drawing-*.json"
_GOLDEN = 0.6180339887  # multiples of it, modulo 1, lie far from each other


def draw(units: pathlib.Path) -> contextlib.AbstractContextManager[locks.Lock]:
  """The block in which this job draws. Its lock says when other jobs took it for dead."""
  return locks.hold(units / f"drawing-{secrets.token_hex(8)}.json", str(units))


def others(units: pathlib.Path) -> int:
  """How many other jobs draw, by their signs of life; those that are long silent are removed."""
  alive = 0
  for path in units.glob(_PATTERN):
    with contextlib.suppress(FileNotFoundError):  # it has just ended
      if locks.silent(path) > locks.STALE or locks.dead_here(path):
        path.unlink()
      else:
        alive += 1
  return alive


def refuse(units: pathlib.Path, store: pathlib.Path) -> None:
  """Raises locks.Held, naming one, while other jobs draw."""
  for path in units.glob(_PATTERN):
    who = locks.holder(path)
    if who:
      raise locks.Held(
        f"{store} cannot grow while another job draws for it: {who}. Wait for it, or end it, and "
        "run this command again."
      )
    path.unlink(missing_ok=True)


def start(others: int) -> float:
  """Where this job begins, as a share of what is missing, in [0, 1).

  A task of a Slurm array begins by its number, any other job by how many are there before it.
  """
  try:
    number, count = (int(os.environ[f"SLURM_ARRAY_TASK_{n}"]) for n in ("ID", "COUNT"))
    first = int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0"))
  except (KeyError, ValueError):
    return others * _GOLDEN % 1
  return (number - first) / count % 1
