"""Files written all or nothing, JSON, and a full disk in words.

Nothing is executed when a file is read back.
"""

import contextlib
import errno
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np


def read_json(path: str | os.PathLike) -> dict:
  """Raises ValueError, naming the file, if it is not JSON."""
  try:
    return json.loads(pathlib.Path(path).read_text())
  except json.JSONDecodeError as error:
    raise ValueError(
      f"{path} is not valid JSON ({error}): it was damaged; move it away and run again."
    ) from None


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes all or nothing: a temporary file beside it, fsync, rename.

  Non-finite numbers become null.
  """
  path = pathlib.Path(path)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    with open(temporary, "w") as file:
      json.dump(_finite(value), file, indent=1, allow_nan=False)
      file.write("\n")
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
  if isinstance(value, dict):
    return {k: _finite(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_finite(v) for v in value]
  if isinstance(value, np.generic | np.ndarray):
    return _finite(value.tolist())
  if isinstance(value, float) and not np.isfinite(value):
    return None
  return value


@contextlib.contextmanager
def full_disk_in_words(path: str | os.PathLike, kept: str) -> Iterator[None]:
  """Turns the many faces of 'no space left' (Python, orbax, TensorStore, Zarr) into one OSError
  with path and fix.

  kept: what stays usable, for the message.
  """
  try:
    yield
  except Exception as error:
    text = str(error).lower()
    signs = (
      "no space left",
      "enospc",
      "quota exceeded",
    )  # TensorStore's RESOURCE_EXHAUSTED may also be device memory
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(
      sign in text for sign in signs
    )
    if full and "free some disk" not in text:  # said already, by one who knew more
      raise OSError(
        errno.ENOSPC,
        f"no space left while writing {path}; {kept}. Free some disk and run the same command: it "
        "goes on from there.",
      ) from error
    raise
