"""Copies on this machine of files on an object store, for libraries that read local files alone.

They lie below DOWNSCALING_CACHE, by default ~/.cache/downscaling, and may be deleted while no job
runs. A file is fetched again when its version has changed. Processes of one host share the copies.
"""

import hashlib
import os
import pathlib

from downscaling.runtime import files
from downscaling.runtime.remote_paths import RemotePath


def place(folder: RemotePath) -> pathlib.Path:
  """Where the copies of a folder's files lie. Raises: OSError if it cannot be made."""
  cache = os.environ.get("DOWNSCALING_CACHE", "~/.cache/downscaling")
  name = f"{folder.name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}"
  here = pathlib.Path(cache).expanduser().absolute() / name
  try:
    here.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise OSError(
      error.errno,
      f"{here}, for copies of {folder}, cannot be made ({error.strerror}): set DOWNSCALING_CACHE "
      "to a folder with room.",
    ) from None
  return here


def pull(folder: RemotePath, here: pathlib.Path, pattern: str) -> None:
  """Makes the files of one level that match a pattern alike in both folders.

  Args:
    folder: on the object store. here: its copy.
    pattern: of names, as for glob.
  Raises: OSError if the store cannot be reached, or this machine's disk is full.
  """
  here.mkdir(parents=True, exist_ok=True)
  found = {path.name: (path, path.version()) for path in folder.glob(pattern)}
  for path in here.glob(pattern):
    if path.is_file() and path.name not in found and not path.name.startswith("."):
      path.unlink(missing_ok=True)
  for name, (path, version) in found.items():
    note = here / f".{name}.version"
    if not version:  # a folder
      continue
    if (here / name).exists() and _told(note) == version:
      continue
    data, version = path.fetch()
    with files.full_disk_in_words(here, f"{folder} is whole"):
      with files.all_or_nothing(here / name) as file:
        file.write(data)
      with files.all_or_nothing(note, "w") as file:
        file.write(version)


def tree(folder: RemotePath) -> pathlib.Path:
  """A copy of a folder, with the folders in it. Raises: as `pull`."""
  here = place(folder)
  for inner in sorted({path.parent for path in folder.rglob("*")}):
    pull(inner, here / inner.relative_to(folder), "*")
  return here


def _told(note: pathlib.Path) -> str:
  try:
    return note.read_text()
  except FileNotFoundError:
    return ""
