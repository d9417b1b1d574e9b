"""Units of a store, as they are written by every process and read back.

A unit's marker holds the size, time and SHA-256 of its shards, the device that drew it, and which
store it is of.
"""

import itertools
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorstore

from downscaling.runtime import files, products, stage_folder, stores
from downscaling.sampling.ensemble_store import (
  FAILED,
  MARKERS,
  Layout,
  Unit,
  failed,
  find,
)


class Writer:
  """Writes units of one store: begin(), then finish() once another unit is under way."""

  def __init__(self, path: pathlib.Path, layout: Layout, kind: str):
    """kind: of the devices. Raises ValueError if the arrays are not cut as the units are, so that
    two units would share a shard.
    """
    self.path, self.layout, self.units = path, layout, path.with_suffix(".units")
    store = files.read_json(self.units / stage_folder.MARKER)["config_hash"]
    self.about = {"device": kind, "store": store}
    self.arrays = {name: array_of(path, name) for name in layout.drawn}
    for name, fields in layout.drawn.items():
      array, shape = self.arrays[name], (layout.conditions, layout.members, *fields)
      shard = array.chunk_layout.write_chunk.shape
      if (
        array.shape != shape
        or shard != (*layout.unit, *fields)
        or array.dtype.name != "float32"
      ):
        raise ValueError(
          f"{path}/{name} is {array.dtype.name} {array.shape} in shards of {shard}; need float32 "
          f"{shape} in shards of {(*layout.unit, *fields)}, a unit each: it was changed by another "
          f"program. Put the store back, or move it and {self.units} away to draw everything again."
        )

  def marker(self, unit: Unit) -> pathlib.Path:
    """The file that says that a unit is finished."""
    return self.units / unit.name

  def begin(
    self, unit: Unit, blocks: Mapping[str, np.ndarray], part: Unit | None
  ) -> list:
    """Starts the writing of a unit's blocks [c1 − c0, m1 − m0, ...]; what `part` of it holds
    already stays.
    """
    begun = []
    record = self.units / (FAILED + unit.name)
    for name, block in blocks.items():
      array = self.arrays[name]
      if part:
        block = block.copy()
        block[: part.c1 - part.c0, : part.m1 - part.m0] = (
          array[part.c0 : part.c1, part.m0 : part.m1].read().result()
        )
      if name == "sample":
        counts = failed(block).sum(axis=1)
        found = {
          str(unit.c0 + i): int(count) for i, count in enumerate(counts) if count
        }
        files.write_json(record, found) if found else record.unlink(missing_ok=True)
      begun.append(array[unit.c0 : unit.c1, unit.m0 : unit.m1].write(block))
    return begun

  def finish(self, unit: Unit, begun: list, part: Unit | None) -> None:
    """Returns once the unit is durable, as tensorstore syncs each file, and marked."""
    for future in begun:
      future.result()
    written = products.describe(self.path, shards(self.path, self.layout, unit))
    files.write_json(
      self.marker(unit), unit._asdict() | self.about | {"files": written}
    )
    if part:
      for name in (part.name, FAILED + part.name):
        (self.units / name).unlink(missing_ok=True)


def array_of(path: pathlib.Path, name: str):
  spec = {"driver": "zarr3", "kvstore": stores.kvstore(path / name)}
  return tensorstore.open(spec, open=True).result()


def shards(path: pathlib.Path, layout: Layout, unit: Unit) -> list[str]:
  """The files of a unit, below the store. One that holds nothing but NaN is not written."""
  place = (unit.c0 // layout.unit[0], unit.m0 // layout.unit[1])
  found = []
  for name, fields in layout.drawn.items():
    chunk = "/".join(
      map(
        str,
        (*place, *itertools.repeat(0, len(fields))),
      )
    )
    found.append(f"{name}/c/{chunk}")
  return [name for name in found if (path / name).exists()]


def damaged(
  path: pathlib.Path,
  record: Mapping | None = None,
  whole: bool = False,
) -> dict[str, dict[str, str]]:
  """{name of a unit's marker: {file: what is wrong with it}} of a store.

  "" stands for what is no unit's: metadata and coordinates. A file is named by its path below the
  store, the marker by its name.

  record: what the store's own marker says; read from there by default.
  whole: read every file; else only those whose size or time is another one than when written.
  """
  units = path.with_suffix(".units")
  record = record or files.read_json(units / stage_folder.MARKER)
  found = {"": products.changed(path, record.get("products", {}), whole)}
  if not record["complete"]:
    found[""] = {}  # metadata may still change
  for marker in sorted(units.glob(MARKERS)):
    try:
      said = files.read_json(marker)
    except ValueError:
      found[marker.name] = {marker.name: "is damaged"}
      continue
    wrong = products.changed(path, said.get("files", {}), whole)
    if said.get("store", record["config_hash"]) != record["config_hash"]:
      wrong[marker.name] = f"is of another store, {said['store']}"
    found[marker.name] = wrong
  return {unit: wrong for unit, wrong in found.items() if wrong}


def read(path: pathlib.Path):
  """The finished ensemble as a lazily read xarray.Dataset.

  Raises ValueError if units are missing, with their number, or a file is not what was written.
  """
  import xarray

  path = files.as_path(path)
  marker = path.with_suffix(".units") / stage_folder.MARKER
  if not path.exists() or not marker.exists():
    raise ValueError(
      f"{path} is no ensemble written by `sample` (no {marker}): run the sample job first."
    )
  found = files.read_json(marker)
  if not found["complete"]:
    fixed: dict[str, Any] = {
      k: tuple(v) if isinstance(v, list) else v
      for k, v in found["config"]["layout"].items()
    }
    size = found.get("size", {"conditions": 0, "members": 0})
    layout = Layout(size["conditions"], size["members"], **fixed)
    total, missing = len(layout.units()), len(find(path, layout).missing)
    raise ValueError(
      f"{path} holds {total - missing} of {total} units: run the same `sample` command again, it "
      "draws the rest."
    )
  wrong = damaged(path)
  if wrong:
    together = {
      name: what for of_unit in wrong.values() for name, what in of_unit.items()
    }
    raise products.Damaged(
      f"{path}: {products.words(together)}. `downscaling verify WORKDIR --repair` moves aside what "
      "is damaged; `downscaling sample` then draws that again."
    )
  return xarray.open_zarr(stores.store(path))
