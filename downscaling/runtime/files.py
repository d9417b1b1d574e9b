"""Files that are written whole or not at all, sealed JSON, and a clear message for a full disk.

A path may be on an object store (remote_paths.py). Reading a file back never executes anything. A
JSON object carries the SHA-256 of what it says, its seal: one that was damaged or edited is not
read as another one.
"""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import re
import secrets
import socket
import tempfile
from collections.abc import Iterable, Iterator
from typing import IO, Any

import numpy as np

from downscaling.runtime import remote_paths
from downscaling.runtime.remote_paths import RemotePath

# How Python, orbax and Zarr say that a disk is full. TensorStore's RESOURCE_EXHAUSTED is not among
# them: it may also mean device memory.
_FULL_DISK = ("no space left", "enospc", "quota exceeded")


def as_path(path: str | os.PathLike) -> pathlib.Path:
  """A path of this machine's file system, or SCHEME://BUCKET/FOLDER.

  Raises: ValueError for a scheme that is not known, or without a bucket.
  """
  if isinstance(path, RemotePath):
    return path
  text = os.fspath(path)
  return remote_paths.parse(text) if remote_paths.remote(text) else pathlib.Path(text)


def folder(path: str | os.PathLike) -> pathlib.Path:
  """The same as an absolute path, with ~ replaced."""
  return as_path(path).expanduser().absolute()


def version(path: pathlib.Path) -> int | str:
  """Changes when a file is written again: its time in ns, or the object's version."""
  if isinstance(path, RemotePath):
    return path.version()
  return path.stat().st_mtime_ns


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
  After an exception the old file is unchanged and the temporary one is removed. What belongs on an
  object store lies on this machine until it is sent.
  """
  path = as_path(path)
  if isinstance(path, RemotePath):
    with tempfile.TemporaryDirectory() as here:
      yield pathlib.Path(here) / path.name
      path.write_bytes((pathlib.Path(here) / path.name).read_bytes())
    return
  temporary = path.with_name(temporary_name(path.name))
  try:
    yield temporary
    with open(temporary, "rb") as file:
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def copy(
  source: pathlib.Path, target: pathlib.Path, paths: Iterable[pathlib.Path]
) -> None:
  """Copies those of the paths below `source` that are files to the same places below `target`."""
  for path in paths:
    if path.is_file():
      copied = target / path.relative_to(source)
      copied.parent.mkdir(parents=True, exist_ok=True)
      copied.write_bytes(path.read_bytes())


def temporary_name(name: str) -> str:
  """A hidden name that no other process takes: in containers, all have process id 1."""
  return f".{name}.{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}.tmp"


_TEMPORARY = re.compile(r"\..+-\d+-[0-9a-f]{8}\.tmp")


def temporary(path: pathlib.Path) -> bool:
  """Does the name look like one that `temporary_name` gave?"""
  return _TEMPORARY.fullmatch(path.name) is not None


def sweep(folder: pathlib.Path) -> int:
  """Removes the temporary files of dead writers below a folder; returns how many there were.

  Call it where nobody else can be writing. On an object store there are none.
  """
  if isinstance(folder, RemotePath):
    return 0
  litter = [path for path in folder.rglob(".*.tmp") if temporary(path)]
  for path in litter:
    path.unlink(missing_ok=True)
  return len(litter)


def make_new(fresh: pathlib.Path, path: pathlib.Path) -> bool:
  """Renames the file `fresh` to `path` if there is no such file yet; False if there is.

  Of several processes that try, one succeeds, unless the file system has no hard links.
  """
  try:
    os.link(fresh, path)
  except (FileExistsError, FileNotFoundError):
    # Not found: swept by who owns the folder.
    return False
  except OSError:  # no hard links here: a moment in which two could meet
    if path.exists():
      return False
    os.replace(fresh, path)
  finally:
    fresh.unlink(missing_ok=True)
  return True


SEAL = "seal"  # the last key of a JSON object: SHA-256 of the others


def read_json(path: str | os.PathLike) -> dict:
  """What `write_json` wrote, without its seal. A file that has none is read as it is.

  Raises: ValueError, naming the file, if it is not JSON, or not what was written.
  """
  try:
    found = json.loads(as_path(path).read_text())
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ValueError(
      f"{path} is not valid JSON ({error}): it was damaged; move it away and run again."
    ) from None
  if isinstance(found, dict) and SEAL in found and found.pop(SEAL) != _seal(found):
    raise ValueError(
      f"{path} does not say what was written there: it was damaged or edited. `downscaling verify "
      "WORKDIR` says what else was, and what to type."
    )
  return found


def write_json(path: str | os.PathLike, value: Any, seal: bool = True) -> None:
  """Writes JSON all or nothing. Non-finite numbers become null.

  seal: an object gets its seal. A file of another format's must not have one.
  """
  with all_or_nothing(path, "w") as file:
    file.write(_text(value, seal))


def create_json(path: str | os.PathLike, value: Any) -> bool:
  """The same if there is no such file yet; False if there is."""
  path = as_path(path)
  if isinstance(path, RemotePath):
    return path.swap(sealed(value).encode(), remote_paths.Version(""))
  fresh = path.with_name(temporary_name(path.name))
  write_json(fresh, value)
  return make_new(fresh, path)


def sealed(value: Any) -> str:
  """What `write_json` writes."""
  return _text(value, True)


def _text(value: Any, seal: bool) -> str:
  """JSON, one key a line."""
  # As a reader will have it.
  value = json.loads(json.dumps(_finite(value), allow_nan=False))
  if seal and isinstance(value, dict):
    value = value | {SEAL: _seal(value)}
  return json.dumps(value, indent=1) + "\n"


def _seal(value: dict) -> str:
  """SHA-256 of what a JSON object says, whatever the order of its keys."""
  text = json.dumps(value, sort_keys=True, separators=(",", ":"))
  return hashlib.sha256(text.encode()).hexdigest()


def sha256(path: str | os.PathLike) -> str:
  """Of a file, in hexadecimal."""
  with as_path(path).open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


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
