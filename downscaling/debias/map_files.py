"""Maps on disk: FOLDER/arrays.npz, and FOLDER/map.json with what the map is and every array's shape
and SHA-256.
"""

import hashlib
import os
import pathlib
from collections.abc import Mapping

import numpy as np

from downscaling.runtime import files

SCHEMA = 1


def save(
  folder: str | os.PathLike,
  kind: str,
  record: Mapping,
  arrays: Mapping[str, np.ndarray],
) -> None:
  """Writes the arrays and then, when they are durable, map.json."""
  folder = files.as_path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  files.write_npz(folder / "arrays.npz", dict(arrays))
  about = {
    name: {"shape": a.shape, "dtype": str(a.dtype), "sha256": _digest(a)}
    for name, a in arrays.items()
  }
  files.write_json(
    folder / "map.json", {"schema": SCHEMA, "kind": kind, **record, "arrays": about}
  )


def kind_of(folder: str | os.PathLike) -> str:
  """The kind of the map in a folder. Raises FileNotFoundError if there is none."""
  return str(_record(files.as_path(folder)).get("kind"))


def load(folder: str | os.PathLike, kind: str) -> tuple[dict, dict[str, np.ndarray]]:
  """(record, arrays) that `save` wrote.

  Raises: FileNotFoundError if there is no map; ValueError if it is damaged, of another kind or of
    another schema.
  """
  folder = files.as_path(folder)
  record = _record(folder)
  found = (record.get("schema"), record.get("kind"))
  if found != (SCHEMA, kind):
    raise ValueError(
      f"{folder}/map.json has schema and kind {found}, this version reads {(SCHEMA, kind)}."
    )
  try:
    with (
      (folder / "arrays.npz").open("rb") as file,
      np.load(file, allow_pickle=False) as stored,
    ):
      arrays = {name: stored[name] for name in record["arrays"]}
      wrong = sorted(set(stored.files) ^ set(arrays))
    wrong += [
      name
      for name, a in arrays.items()
      if _digest(a) != record["arrays"][name]["sha256"]
    ]
  except Exception as error:
    # Zipfile, zlib and numpy raise many kinds for a damaged file.
    wrong = [f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"]
  if wrong:
    raise damaged(folder, ", ".join(wrong))
  return record, arrays


def damaged(folder: str | os.PathLike, what: str) -> ValueError:
  return ValueError(
    f"{folder}/arrays.npz is damaged or not map.json's ({what}): move the folder away and run "
    "`downscaling debias` again, which goes on from what else it finds."
  )


def _record(folder: pathlib.Path) -> dict:
  if not (folder / "map.json").exists():
    raise FileNotFoundError(
      f"no debiasing map in {folder} (map.json is missing): run `downscaling debias` first."
    )
  return files.read_json(folder / "map.json")


def _digest(array: np.ndarray) -> str:
  return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
