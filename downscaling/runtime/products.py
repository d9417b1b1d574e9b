"""The files of a finished stage: size, version and SHA-256 of each, as its marker holds them.

The version of a file is its time in ns; of an object, what its store tells (files.version).
`changed` reads small files; of others it looks at size and version, and reads them only where those
differ. So every job can ask it of what it reads. `downscaling verify` reads everything.

Left out are files that check themselves and may be deleted: checkpoints, which have a manifest, and
TensorBoard's events. Of a set of samples, every unit's marker holds the digests of its shards.
"""

import hashlib
import pathlib
from collections.abc import Iterable, Iterator

from downscaling.runtime import files, processes
from downscaling.runtime.remote_paths import RemotePath

MARKER, COPY, LOCK = "stage.json", "stage.copy.json", "lock.json"
_OWN = {MARKER, COPY, LOCK}
SMALL = 2**20  # bytes of a file that is always read
_FOLDERS = ("attempts", "checkpoints", "plugins")  # plugins: of a profile
_EVENTS = "events.out."
DAMAGED = ".damaged"  # behind the name of a file or checkpoint that was moved aside
# Folders of markers; the store beside each is looked at through them.
_STORES = (".units",)


class Damaged(ValueError):
  """Files are not what was written; the message says what to type."""


def listed(folder: pathlib.Path) -> list[pathlib.Path]:
  """The files whose digests the marker of a stage holds, in order."""
  return sorted(_walk(folder, folder))


def _walk(top: pathlib.Path, folder: pathlib.Path) -> Iterator[pathlib.Path]:
  for path in folder.iterdir():
    if path.name.startswith((".", _EVENTS)) or path.suffix == DAMAGED:
      continue
    if path.is_dir():
      drawn = path.suffix in _STORES or path.with_suffix(".units").is_dir()
      if path.name not in _FOLDERS and not drawn:
        yield from _walk(top, path)
    elif not (folder == top and path.name in _OWN):
      yield path


def measure(folder: pathlib.Path) -> dict[str, list]:
  """{path below the folder: [bytes, version, SHA-256]} of every file of a stage.

  The processes share the reading. Every process must call it.
  """
  paths = listed(folder) if not processes.place()[0] else []
  names = processes.main_only(
    f"products/{folder.name}", lambda: [str(path.relative_to(folder)) for path in paths]
  )
  me, count = processes.place()
  mine = describe(folder, names[me::count])
  found = {}
  for part in processes.gather(f"digests/{folder.name}", mine, processes.LONG):
    found |= part
  return {name: found[name] for name in names}


def of(folder: pathlib.Path) -> dict[str, list]:
  """The same by one process alone."""
  return describe(folder, [str(path.relative_to(folder)) for path in listed(folder)])


def describe(folder: pathlib.Path, names: Iterable[str]) -> dict[str, list]:
  """{name: [bytes, version, SHA-256]} of files below a folder."""
  return {name: _described(folder / name) for name in names}


def _described(path: pathlib.Path) -> list:
  if isinstance(path, RemotePath):
    data, version = path.fetch()
    return [len(data), version, hashlib.sha256(data).hexdigest()]
  about = path.stat()
  return [about.st_size, about.st_mtime_ns, files.sha256(path)]


def changed(
  folder: pathlib.Path, told: dict[str, list], whole: bool = False
) -> dict[str, str]:
  """{name: what is wrong with it} of files that are not those that were written.

  told: see `measure`. whole: read every file, and name those that are missing as well.
  """
  wrong = {}
  for name, (size, version, digest) in told.items():
    path = folder / name
    if not path.is_file():
      if whole:
        wrong[name] = "is missing"
      continue
    if not isinstance(path, RemotePath) and path.stat().st_size != size:
      wrong[name] = f"has {path.stat().st_size} bytes, {size} were written"
      continue
    read = whole or size <= SMALL or files.version(path) != version
    if read and files.sha256(path) != digest:
      wrong[name] = "is not what was written there: damaged, edited, or of another run"
  return wrong


def words(wrong: dict[str, str]) -> str:
  """What `changed` found, for a message: the first file, and how many more."""
  first, what = next(iter(wrong.items()))
  return f"{first} {what}" + (f", and {len(wrong) - 1} more" if len(wrong) > 1 else "")
