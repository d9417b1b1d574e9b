"""Files that are written whole or not at all, JSON, and a clear message for a full disk.

Reading a file back never executes anything.
"""

import contextlib
import errno
import json
import os
import pathlib
import secrets
import socket
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

# How Python, orbax and Zarr say that a disk is full. TensorStore's RESOURCE_EXHAUSTED is not among
# them: it may also mean device memory.
_FULL_DISK = ("no space left", "enospc", "quota exceeded")


@contextlib.contextmanager
def all_or_nothing(
  path: str | os.PathLike, mode: str = "wb", newline: str | None = None
) -> Iterator[IO[Any]]:
  """Opens a file that is written whole or not at all; see `replacing`.

  Args:
    path: the file to write; its folder must exist.
    mode, newline: as for `open`.
  """
  with (
    replacing(path) as temporary,
    open(temporary, mode.replace("w", "x"), newline=newline) as file,
  ):
    yield file


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """A new path beside `path`, whose file replaces `path` if the block ends well.

  The file is on disk (fsync) before it is renamed, so a crash leaves the old file or the new one.
  After an exception the old file is unchanged and the temporary one is removed.
  """
  path = pathlib.Path(path)
  temporary = path.with_name(temporary_name(path.name))
  try:
    yield temporary
    with open(temporary, "rb") as file:
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def temporary_name(name: str) -> str:
  """A hidden name that no other process takes: in containers, all have process id 1."""
  return f".{name}.{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}.tmp"


def read_json(path: str | os.PathLike) -> dict:
  """Raises ValueError, naming the file, if it is not JSON."""
  try:
    return json.loads(pathlib.Path(path).read_text())
  except json.JSONDecodeError as error:
    raise ValueError(
      f"{path} is not valid JSON ({error}): it was damaged; move it away and run again."
    ) from None


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes JSON all or nothing. Non-finite numbers become null."""
  with all_or_nothing(path, "w") as file:
    json.dump(_finite(value), file, indent=1, allow_nan=False)
    file.write("\n")


def write_npz(path: str | os.PathLike, arrays: dict[str, Any]) -> None:
  """Writes an uncompressed .npz of named arrays, numbers or texts all or nothing."""
  with all_or_nothing(path) as file:
    # numpy's stub takes the names for its own keyword allow_pickle.
    np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]


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
  """Turns any "disk is full" error of the block into one OSError that says what to do.

  Args:
    path: what is being written. kept: what stays usable; both for the message.
  """
  try:
    yield
  except Exception as error:
    text = str(error).lower()
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    full = full or any(sign in text for sign in _FULL_DISK)
    if full and "free some disk" not in text:  # an inner block may have said it already
      raise OSError(
        errno.ENOSPC,
        f"no space left while writing {path}; {kept}. Free some disk and run the same command: it "
        "goes on from there.",
      ) from error
    raise
