"""The ensemble on disk: one Zarr v3 store that grows, and beside it what is finished.

NAME.zarr    sample (condition, member, time if series, space, channel if several) float32, NaN
             where not yet drawn; misfit (condition, member) where the sampler tells it;
             coordinates; the coarse fields it was drawn from as condition_field. One shard a unit,
             so one writer a shard. A member that failed is NaN throughout and has an infinite
             misfit. The markers, not the NaN, say what is drawn.
NAME.units   stage.json: what the samples depend on, and how many conditions and members there are;
             one marker a finished unit, written after the unit's bytes are durable, with the
             digests of its shards and the device that drew it; beside it, if members of it failed,
             how many of each condition; lock.json while the store is made, grows or is marked; one
             drawing-*.json of every job that draws.

Every chunk and every index of a shard carries a crc32c.

Counts are no part of what samples depend on: with more conditions or members the arrays grow and
units are added. A unit at the old edge that grows is written once more, the fields that it had as
they were.
"""

import collections
import contextlib
import datetime
import hashlib
import pathlib
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import zarr
from zarr.errors import ZarrUserWarning

from downscaling.runtime import files, locks, products, provenance, stage_folder, stores
from downscaling.runtime.remote_paths import RemotePath

Coordinates = Mapping[str, tuple[np.ndarray, Mapping[str, str]]]
MARKERS = "c*-m*.json"
SHARDS = (("sample", "c"), ("misfit", "c"))  # where units lie in the store
FAILED = "failed-"  # before a marker's name: {condition's place: members that failed}


class Unit(NamedTuple):
  """Conditions [c0, c1) × members [m0, m1), by their place in the store."""

  c0: int
  c1: int
  m0: int
  m1: int

  @property
  def name(self) -> str:
    """Of its marker. An edge unit that has grown has another one."""
    return f"c{self.c0:06d}-{self.c1:06d}-m{self.m0:06d}-{self.m1:06d}.json"


class Layout(NamedTuple):
  """Shapes of one store. conditions, members: counts. unit: (conditions, members) drawn and written
  together.

  frames: of a series; 1: single fields, without a time axis. coarse: of a condition, with its time
    axis and channels.
  """

  conditions: int
  members: int
  space: tuple[int, ...]
  channels: int
  coarse: tuple[int, ...] | None
  unit: tuple[int, int]
  misfit: bool = False  # does the sampler tell one number a field beside it?
  frames: int = 1

  @property
  def made(self) -> tuple[int, ...]:
    """Of one field or series as a sampler returns it: ([L,] *space, C)."""
    return (*((self.frames,) if self.frames > 1 else ()), *self.space, self.channels)

  @property
  def fields(self) -> tuple[int, ...]:
    """The same as stored: without the channel axis if there is one channel."""
    return self.made[:-1] if self.channels == 1 else self.made

  @property
  def axes(self) -> tuple[str, ...]:
    """Names of time, if there is any, and space."""
    return (*(("time",) if self.frames > 1 else ()), *("y", "x")[-len(self.space) :])

  @property
  def drawn(self) -> dict[str, tuple[int, ...]]:
    """The arrays that units fill -> their axes after condition and member."""
    return {"sample": self.fields} | ({"misfit": ()} if self.misfit else {})

  def units(self) -> list[Unit]:
    kc, km = self.unit
    starts = (
      (c, m) for c in range(0, self.conditions, kc) for m in range(0, self.members, km)
    )
    return [
      Unit(
        c,
        min(c + kc, self.conditions),
        m,
        min(m + km, self.members),
      )
      for c, m in starts
    ]


class Found(NamedTuple):
  """missing: units to draw, in order. parts: {place in missing: the part of that unit that is
  finished}.
  """

  missing: list[Unit]
  parts: dict[int, Unit]


# ----------------------------------- opened by one process, under its lock


def open_stage(
  path: pathlib.Path,
  layout: Layout,
  seed: int,
  identity: Mapping,
  **stored: Any,
) -> stage_folder.Stage:
  """The folder of markers, refused if the samples there depend on anything else.

  stored: converted and defaults, as for stage_folder.open_stage.
  """
  fixed = {
    k: v
    for k, v in layout._asdict().items()
    if k not in ("conditions", "members", "frames")
  }
  fixed |= (
    {"frames": layout.frames} if layout.frames > 1 else {}
  )  # stores of single fields are older than series
  full = stage_folder.plain(dict(identity)) | {
    "seed": seed,
    "layout": stage_folder.plain(fixed),
    "dtype": "float32",
  }
  units = path.with_suffix(".units")
  if path.exists() and not (units / stage_folder.MARKER).exists():
    raise FileExistsError(
      f"{path} exists, but not its list of finished units {units}: it was not made by this job, or "
      "the list was moved. Nothing was touched: use another sampling.name or --workdir."
    )
  return stage_folder.open_stage(units, "sample", full, **stored)


def locked(path: pathlib.Path) -> contextlib.AbstractContextManager[locks.Lock]:
  """A block in which this job alone changes what several jobs share. It must be short."""
  return locks.hold(
    path.with_suffix(".units") / stage_folder.LOCK, str(path), wait=True
  )


def sweep(path: pathlib.Path) -> None:
  """Removes what dead writers left, where no other job draws."""
  files.sweep(path.with_suffix(".units"))
  if isinstance(path, RemotePath):
    return
  for lock in path.rglob("*.__lock"):  # TensorStore's, of a process that was killed
    lock.unlink(missing_ok=True)


def one_kind(path: pathlib.Path, kind: str, any_device: bool) -> None:
  """Writes down which kind of device draws. Raises ValueError for another one than before."""
  units = path.with_suffix(".units")
  record = files.read_json(units / stage_folder.MARKER)
  known = record.get("device_kinds", [])
  if kind in known:
    return
  if known and not any_device:
    raise ValueError(
      f"{path} was drawn on {', '.join(known)}; here is {kind}, which rounds otherwise, so a "
      "member would depend on who drew it. Draw on the same kind, or allow it by "
      "--config.sampling.any_device=True: each unit's marker says which device drew it."
    )
  stage_folder.write_marker(units, record | {"device_kinds": [*known, kind]})


def grow(
  path: pathlib.Path,
  stage: stage_folder.Stage,
  layout: Layout,
  ids,
  conditions,
  alone: Callable[[], object],
) -> None:
  """Writes down how many conditions and members there are to be, so that what is missing can be
  told.

  alone: raises if another job draws; called before a store grows.
  Raises: ValueError if there were more, or if those that there were have changed.
  """
  record = files.read_json(stage.path / stage_folder.MARKER)
  size = {
    "conditions": layout.conditions,
    "members": layout.members,
    "digest": digest(ids, conditions),
  }
  old = record.get("size") or {}
  if old == size:
    return
  for key in ("conditions", "members") if old else ():
    if size[key] < old[key]:
      raise ValueError(
        f"{path} holds {old[key]} {key}, {size[key]} were asked for: an ensemble grows, but "
        f"nothing is taken from it. Ask for {old[key]} or more; for a smaller one use another "
        "--config.label or --workdir."
      )
  if old:
    count = old["conditions"]
    if (
      digest(ids[:count], None if conditions is None else conditions[:count])
      != old["digest"]
    ):
      raise ValueError(
        f"{path} was drawn from other conditions: the first {count} must be those that it holds "
        "(fields and ids), new ones come after them. Nothing was touched: use another "
        "--config.label or --workdir."
      )
  if old:
    alone()
  stage_folder.write_marker(stage.path, record | {"size": size, "complete": False})


def create(
  path: pathlib.Path, layout: Layout, variables, attrs, about: Mapping[str, Mapping]
) -> None:
  """Metadata, coordinates and conditions, as large as the layout says; a kill in between is mended
  by the next call.

  Args:
    variables: see `variables`. about: attributes of sample and misfit.
  """
  finished = any(path.with_suffix(".units").glob(MARKERS))
  if finished and not (path / "sample").exists():
    raise ValueError(
      f"{path} lost its array `sample`, but {path.with_suffix('.units')} lists finished units: put "
      "the store back, or move that folder away to draw everything again."
    )
  group = zarr.open_group(
    stores.store(path), mode="a", zarr_format=3, use_consolidated=False
  )
  known = set(group.array_keys())
  root = files.read_json(path / "zarr.json")
  last = (
    (root.get("consolidated_metadata") or {})
    .get("metadata", {})
    .get("sample", {})
    .get("shape")
  )  # made last
  if last == [layout.conditions, layout.members, *layout.fields]:
    return
  (kc, km), tail = layout.unit, ("channel",) if layout.channels > 1 else ()
  for name, fields in layout.drawn.items():
    shape = (layout.conditions, layout.members, *fields)
    if name in known:
      stored = _array_of(group, name)
      if stored.shape != shape:
        stored.resize(shape)  # its metadata alone
      continue
    group.create_array(
      name, shape=shape, dtype="float32", fill_value=np.nan, shards=(kc, km, *fields),
      chunks=(1 if fields else kc, km, *fields), attributes=dict(about[name]),
      compressors=stores.CHECKED,
      dimension_names=("condition", "member", *((*layout.axes, *tail) if fields else ())),
    )  # fmt: skip
  for name, (values, dims, words) in variables.items():
    if name not in known:
      fill = np.nan if values.dtype.kind == "f" else 0
      group.create_array(
        name, shape=values.shape, dtype=values.dtype, chunks=values.shape, dimension_names=dims,
        attributes=words, compressors=stores.CHECKED,
        fill_value=fill,
      )  # fmt: skip
    stored = _array_of(group, name)
    if stored.shape != values.shape:
      stored.resize(values.shape)
    stored[...] = values
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  sizes = f"{layout.conditions} conditions, {layout.members} members"
  did = f"{now} downscaling sample, commit {provenance.commit()}: {sizes}"
  told = group.attrs.get("history")
  history = f"{told}\n{did}" if told else did
  about_it = {
    "Conventions": "CF-1.11",
    "source": f"downscaling {provenance.versions().get('downscaling', '')}".strip(),
  }
  group.attrs.update(
    about_it | dict(attrs) | {"history": history, "done_fraction": 0.0}
  )
  with warnings.catch_warnings():
    # xarray warns where consolidated metadata is missing, zarr where it is made: it lies outside
    # the v3 text.
    warnings.simplefilter("ignore", ZarrUserWarning)
    zarr.consolidate_metadata(stores.store(path))


def find(path: pathlib.Path, layout: Layout) -> Found:
  """What is missing, by the markers that are there."""
  names = {p.name for p in path.with_suffix(".units").glob(MARKERS)}
  missing = [u for u in layout.units() if u.name not in names]
  starts = {(u.c0, u.m0): place for place, u in enumerate(missing)}
  parts: dict[int, Unit] = {}
  expected = {u.name for u in layout.units()}
  for name in names - expected:  # of edge units that have grown since
    words = re.fullmatch(r"c(\d+)-(\d+)-m(\d+)-(\d+)\.json", name)
    if not words:
      continue
    part = Unit(*map(int, words.groups()))
    place = starts.get((part.c0, part.m0))
    if place is not None:
      parts[place] = max(
        part, parts.get(place, part), key=lambda u: (u.c1 - u.c0) * (u.m1 - u.m0)
      )
  return Found(missing, parts)


def say_done(path: pathlib.Path, layout: Layout, **attributes: int) -> int:
  """Sets done_fraction, and other attributes, as the markers have it; returns how many are missing.

  In one rename, as a reader may be looking; under the lock, as other jobs may do the same.
  """
  total = len(layout.units())
  with locked(path):
    missing = len(find(path, layout).missing)
    root = files.read_json(path / "zarr.json")
    told = {"done_fraction": round(1 - missing / total, 6)} | attributes
    if root["attributes"] | told != root["attributes"]:
      root["attributes"] |= told
      files.write_json(path / "zarr.json", root, seal=False)
  return missing


def complete(
  path: pathlib.Path, layout: Layout, summary: dict, attributes: dict
) -> None:
  """Marks the store complete, with the digests of its metadata, unless another job has."""
  units = path.with_suffix(".units")
  if files.read_json(units / stage_folder.MARKER)["complete"]:
    return
  say_done(path, layout, **attributes)
  with locked(path):
    record = files.read_json(units / stage_folder.MARKER)
    if not record["complete"]:
      done = {"complete": True, "summary": summary, "products": fixed(path)}
      stage_folder.write_marker(units, record | done)


def fixed(path: pathlib.Path) -> dict[str, list]:
  """Digests of the files of a store that no unit writes; see products.measure."""
  names = [
    str(each.relative_to(path))
    for each in sorted(path.rglob("*"))
    if _fixed(path, each)
  ]
  return products.describe(path, names)


def _fixed(path: pathlib.Path, file: pathlib.Path) -> bool:
  parts = file.relative_to(path).parts
  return not file.name.startswith(".") and parts[:2] not in SHARDS and file.is_file()


def _array_of(group: zarr.Group, name: str) -> zarr.Array:
  found = group[name]
  assert isinstance(found, zarr.Array)
  return found


def failed(fields: np.ndarray) -> np.ndarray:
  """Which members of fields [K, M, ...] failed, [K, M]: those that are NaN throughout."""
  return np.asarray(np.isnan(fields).reshape(*fields.shape[:2], -1).all(axis=2))


def failures(path: pathlib.Path) -> tuple[int, int]:
  """(members that failed, conditions that they are of) in the finished units of a store."""
  units, found = path.with_suffix(".units"), collections.Counter()
  for file in units.glob(FAILED + MARKERS):
    # Else its unit was broken off.
    if (units / file.name.removeprefix(FAILED)).exists():
      found.update(
        {int(place): count for place, count in files.read_json(file).items()}
      )
  return found.total(), len(found)


def digest(ids: np.ndarray, conditions: np.ndarray | None = None) -> str:
  """Of ids and, if there are any, coarse fields."""
  sha = hashlib.sha256(np.ascontiguousarray(ids, "<i8").tobytes())
  for y in (
    conditions if conditions is not None else ()
  ):  # one at a time: the array may be a memory map
    sha.update(np.ascontiguousarray(y, "<f4").tobytes())
  return sha.hexdigest()[:16]


def variables(
  layout: Layout, ids, conditions, coordinates: Coordinates, units: str
) -> dict[str, tuple]:
  """Everything but what is drawn: name -> (values, dimensions, attributes)."""
  member = {
    "long_name": "ensemble member",
    "standard_name": "realization",
    "units": "1",
  }
  found = {
    "condition": (ids, ("condition",), {"long_name": "condition id", "units": "1"}),
    "member": (np.arange(layout.members), ("member",), member),
  }
  points = dict(zip(layout.axes, layout.made[:-1], strict=True))
  if layout.coarse:
    *coarse, channels = layout.coarse
    time, space = layout.axes[: -len(layout.space)], layout.axes[-len(layout.space) :]
    axes = (
      *time,
      *(
        tuple(f"{a}_coarse" for a in space)
        if len(coarse) == len(layout.axes)
        else ("place",)
      ),
    )
    points |= dict(zip(axes, coarse, strict=True))
    field = np.asarray(conditions, np.float32)
    field, last = (field[..., 0], ()) if channels == 1 else (field, ("channel",))
    about = {"long_name": "coarse field sampled from", "units": units}
    found["condition_field"] = (field, ("condition", *axes, *last), about)
  for axis, count in points.items():
    values, about = coordinates.get(
      axis, (np.arange(count), {"long_name": "point number", "units": "1"})
    )
    if np.shape(values) != (count,):
      raise ValueError(
        f"coordinate {axis} has shape {np.shape(values)}, the fields have {count} points there."
      )
    found[axis] = (np.asarray(values), (axis,), dict(about))
  return found
