"""stdout and stderr that never end a job."""

import contextlib
import os
import sys
from typing import IO, Any


class Unbreakable:
  """A text stream to which nothing need be written: its reader may have gone, its disk be full.

  What cannot be written is lost; the job goes on.
  """

  def __init__(self, stream: IO[str]):
    self._stream = stream

  def write(self, text: str) -> int:
    """As of any stream."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
      self._stream.write(text)
    return len(text)

  def flush(self) -> None:
    """As of any stream."""
    with contextlib.suppress(OSError, ValueError):
      self._stream.flush()

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)


def unbreakable() -> None:
  """Makes stdout and stderr such streams; a closed one becomes os.devnull."""
  for name in ("stdout", "stderr"):
    stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115  (open to the end)
    setattr(sys, name, Unbreakable(stream))


def printable(text: str) -> str:
  """The text with control characters escaped, but for ends of lines.

  Names and values from files could otherwise move the cursor, colour the terminal or turn the text
  around.
  """
  return "".join(c if c == "\n" or c.isprintable() else ascii(c)[1:-1] for c in text)
