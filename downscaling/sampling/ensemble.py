"""The `sample` job's core: a work list of (condition block × member block) drawn over the mesh into one Zarr store.

NAME.zarr    Zarr v3: sample (condition, member, [y,] x[, channel]) float32, NaN where not yet drawn; coordinates; the
             coarse fields it was drawn from as condition_field. One shard a unit, so one writer a shard.
NAME.units   beside it: stage.json (what the samples depend on) and one marker a finished unit, written after the unit's
             bytes are durable. A restart does the units without a marker.

Member m of condition c has the key fold_in(fold_in(key(seed), c), m): what it is depends on no device, unit or order.
Host and device memory hold two units, however large the ensemble.
"""

import datetime
import hashlib
import math
import pathlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorstore
import zarr

from downscaling.common import mesh as meshes
from downscaling.common import runs

Sampler = Callable[..., jax.Array]  # (keys [B], conditions or None[, weights]) -> fields
Coordinates = Mapping[str, tuple[np.ndarray, Mapping[str, str]]]

_SAY_DONE_SECONDS = 20.0  # between rewrites of the attribute done_fraction


class Unit(NamedTuple):
  """Conditions [c0, c1) × members [m0, m1), by their place in the store."""

  c0: int
  c1: int
  m0: int
  m1: int

  @property
  def name(self) -> str:
    return f"c{self.c0:06d}-m{self.m0:06d}.json"


class Layout(NamedTuple):
  """Shapes of one store. conditions, members: counts. unit: (conditions, members) drawn and written together."""

  conditions: int
  members: int
  space: tuple[int, ...]
  channels: int
  coarse: tuple[int, ...] | None
  unit: tuple[int, int]

  @property
  def fields(self) -> tuple[int, ...]:
    """Of one field as stored: without the channel axis if there is one channel."""
    return self.space if self.channels == 1 else (*self.space, self.channels)

  @property
  def axes(self) -> tuple[str, ...]:
    return ("y", "x")[-len(self.space) :]

  def units(self) -> Iterator[Unit]:
    kc, km = self.unit
    for c in range(0, self.conditions, kc):
      for m in range(0, self.members, km):
        yield Unit(c, min(c + kc, self.conditions), m, min(m + km, self.members))


def write_ensemble(
  path: pathlib.Path,
  *,
  conditions: np.ndarray | None,
  members: int,
  sampler: Sampler,
  space: tuple[int, ...],
  channels: int = 1,
  unit: tuple[int, int],
  mesh: jax.sharding.Mesh,
  seed: int,
  identity: Mapping,
  attrs: Mapping[str, str],
  stop: Callable[[], bool],
  condition_ids: np.ndarray | None = None,
  coordinates: Coordinates | None = None,
  sample_attrs: Mapping[str, str] | None = None,
  weights: Any = None,
) -> dict:
  """Draws what is missing of the ensemble and returns its summary (units, fields, seconds).

  Args:
    path: NAME.zarr; made if absent, continued if it is ours.
    conditions: coarse fields [K, *coarse, C], in the units `sampler` takes; None for an unconditional ensemble (K = 1).
    members: M, samples of each condition.
    sampler: pure and jittable, (keys [B], conditions [B, *coarse, C] or None[, weights]) -> fields [B, *space, C].
    space, channels: of a drawn field.
    unit: conditions × members drawn in one call; B, their product, must divide over the mesh.
    mesh: B is split over it.
    seed: of the whole ensemble.
    identity: what else the samples depend on (config blocks, checkpoint step): plain values.
    attrs: global attributes (title, config_hash, ...); Conventions, history and done_fraction are added.
    stop: polled before every unit; once true the unit in flight is finished and runs.Interrupted raised.
    condition_ids: [K] ids >= 0 that enter the keys and the coordinate; 0, 1, ... by default.
    coordinates: name (x, y, x_coarse, y_coarse) -> (values, attributes); point numbers by default.
    sample_attrs: units, long_name, ... of the variable `sample`.
    weights: tree of arrays for the sampler's third argument, kept out of the compiled program; None: it has but two.
  Raises:
    ValueError: impossible sizes, NaN in a condition, or a store of another identity (keys are named).
    FileExistsError: the store is not ours.
    FloatingPointError: a drawn field is not finite.
    OSError: the disk is full; what is marked done is whole.
  """
  path = pathlib.Path(path)
  layout = _layout(conditions, members, space, channels, unit)
  meshes.check_divides(math.prod(layout.unit), mesh.size, "a unit (conditions × members)", "sampling.unit")
  ids = _ids(condition_ids, layout.conditions)
  variables = _variables(layout, ids, conditions, coordinates or {})
  stage = _open(path, layout, ids, conditions, seed, identity)
  units = stage.path
  done = {p.name for p in units.glob("c*-m*.json")}
  with runs.full_disk_in_words(path, "its finished units are whole"):
    _create(path, layout, variables, attrs, sample_attrs or {}, fresh=not done)
  todo = [u for u in layout.units() if u.name not in done]
  began = time.monotonic()
  if todo:
    _draw(path, units, layout, todo, len(done), _jitted(sampler, weights, mesh, seed), ids, conditions, mesh, stop)
  summary = {"units": len(done) + len(todo), "fields": layout.conditions * layout.members}
  if not stage.complete:
    _say_done(path, 1.0)
    stage.finish(**summary, seconds=time.monotonic() - began)
  return summary | {"seconds": time.monotonic() - began, "drawn": len(todo)}


def read(path: pathlib.Path):
  """The finished ensemble as a lazily read xarray.Dataset. Raises ValueError if units are missing; says how many."""
  import xarray

  path = pathlib.Path(path)
  marker = path.with_suffix(".units") / runs.MARKER
  if not path.exists() or not marker.exists():
    raise ValueError(f"{path} is no ensemble written by `sample` (no {marker}): run the sample job first.")
  found = runs.read_json(marker)
  layout = Layout(**{k: tuple(v) if isinstance(v, list) else v for k, v in found["config"]["layout"].items()})
  if not found["complete"]:
    total, done = sum(1 for _ in layout.units()), len(list(marker.parent.glob("c*-m*.json")))
    raise ValueError(f"{path} holds {done} of {total} units: run the same `sample` command again, it draws the rest.")
  return xarray.open_zarr(path)


# ---------------------------------------------------------------- drawing


def _jitted(sampler: Sampler, weights, mesh, seed: int):
  rows, everywhere = meshes.rows(mesh), meshes.replicated(mesh)
  extra = () if weights is None else (jax.device_put(weights, everywhere),)

  def draw(condition_ids, member_ids, y, *extra):
    fold = jax.vmap(lambda c, m: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), c), m))
    return sampler(fold(condition_ids, member_ids), y, *extra).astype(np.float32)

  jitted = jax.jit(draw, in_shardings=(rows, rows, rows, *[everywhere] * len(extra)), out_shardings=rows)
  return lambda *inputs: jitted(*inputs, *extra)


def _draw(path, units, layout: Layout, todo, done: int, draw, ids, conditions, mesh, stop) -> None:
  """Every unit of todo: dispatch, and while the device works write the one before."""
  store = tensorstore.open(
    {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path.absolute() / "sample") + "/"}}, open=True
  ).result()
  total = done + len(todo)
  pending, said = None, time.monotonic()
  with runs.Progress("sample", total, "units", done=done) as bar:

    def finish(unit, fields):
      with runs.full_disk_in_words(path, "its finished units are whole"):
        _write(store, layout, unit, fields)
        runs.write_json(units / unit.name, unit._asdict())
      bar.advance(1)

    asked = False
    for unit in todo:
      if asked := stop():
        break
      fields = draw(*_inputs(layout, unit, ids, conditions, mesh))
      if pending:
        finish(*pending)
        if time.monotonic() - said > _SAY_DONE_SECONDS:
          _say_done(path, bar.done / total)
          said = time.monotonic()
      pending = unit, fields
    if pending:
      finish(*pending)
    if asked and bar.done < total:
      _say_done(path, bar.done / total)
      raise runs.Interrupted(f"sample stopped after {bar.done} of {total} units, which are on disk")


def _inputs(layout: Layout, unit: Unit, ids, conditions, mesh):
  """Row ids and conditions of a unit at its full size: the last rows of an incomplete one repeat its last."""
  kc, km = layout.unit
  c = np.minimum(np.arange(unit.c0, unit.c0 + kc), unit.c1 - 1).repeat(km)
  m = np.tile(np.minimum(np.arange(unit.m0, unit.m0 + km), unit.m1 - 1), kc)
  y = None if conditions is None else np.asarray(conditions[unit.c0 : unit.c1], np.float32)[c - unit.c0]
  return meshes.to_global(mesh, (ids[c].astype(np.uint32), m.astype(np.uint32), y), len(m))


def _write(store, layout: Layout, unit: Unit, fields: jax.Array) -> None:
  kc, km = layout.unit
  block = np.asarray(jax.device_get(fields)).reshape(kc, km, *layout.fields)[: unit.c1 - unit.c0, : unit.m1 - unit.m0]
  if not np.isfinite(block).all():
    c, m = np.argwhere(~np.isfinite(block))[0][:2]
    raise FloatingPointError(
      f"the field of condition {unit.c0 + c}, member {unit.m0 + m} is not finite: the guidance is too strong "
      "(sampling.alpha) or the prior is damaged. Finished units stay; a changed config needs another sampling.name."
    )
  store[unit.c0 : unit.c1, unit.m0 : unit.m1].write(block).result()  # durable: tensorstore syncs each file


# ---------------------------------------------------------------- the store


def _layout(conditions, members: int, space, channels: int, unit) -> Layout:
  space, unit = tuple(space), tuple(unit)
  if members < 1 or channels < 1 or len(unit) != 2 or min(unit) < 1:
    raise ValueError(f"{members} members, {channels} channels in units of {unit}: each must be at least 1.")
  if len(space) not in (1, 2):
    raise ValueError(f"fields on a grid {space} came, need [x] or [y, x].")
  if conditions is None:
    return Layout(1, members, space, channels, None, unit)
  if conditions.ndim < 3 or len(conditions) < 1:
    raise ValueError(f"conditions of shape {conditions.shape} came, need [conditions, *coarse, channels].")
  if bad := [i for i, y in enumerate(conditions) if not np.isfinite(y).all()]:
    raise ValueError(
      f"{len(bad)} of {len(conditions)} conditions hold NaN or infinity, first number {bad[0]}: repair or drop them."
    )
  return Layout(len(conditions), members, space, channels, conditions.shape[1:], unit)


def _digest(ids: np.ndarray, conditions: np.ndarray | None = None) -> str:
  digest = hashlib.sha256(np.ascontiguousarray(ids, "<i8").tobytes())
  for y in conditions if conditions is not None else ():  # one at a time: the array may be a memory map
    digest.update(np.ascontiguousarray(y, "<f4").tobytes())
  return digest.hexdigest()[:16]


def _ids(condition_ids, count: int) -> np.ndarray:
  ids = np.arange(count) if condition_ids is None else np.asarray(condition_ids)
  if ids.shape != (count,) or len(np.unique(ids)) != count or (ids < 0).any():
    raise ValueError(f"condition_ids of shape {ids.shape}: need {count} different numbers >= 0.")
  return ids


def _open(path, layout: Layout, ids, conditions, seed: int, identity: Mapping) -> runs.Stage:
  """The folder of markers, refused if the samples there depend on anything else."""
  full = runs.plain(dict(identity)) | {"seed": seed, "layout": runs.plain(layout._asdict()), "dtype": "float32"}
  full["conditions"] = _digest(ids) if conditions is None else _digest(ids, conditions)
  units = path.with_suffix(".units")
  if path.exists() and not (units / runs.MARKER).exists():
    raise FileExistsError(
      f"{path} exists, but not its list of finished units {units}: it was not made by this job, or the list was moved. "
      "Nothing was touched: use another sampling.name or --workdir."
    )
  return runs.open_stage(units, "sample", full)


def _variables(layout: Layout, ids, conditions, coordinates: Coordinates) -> dict[str, tuple]:
  """Everything but `sample`: name -> (values, dimensions, attributes)."""
  variables = {
    "condition": (ids, ("condition",), {"long_name": "condition id"}),
    "member": (np.arange(layout.members), ("member",), {"long_name": "ensemble member"}),
  }
  points = dict(zip(layout.axes, layout.space, strict=True))
  if layout.coarse:
    *coarse, channels = layout.coarse
    axes = tuple(f"{a}_coarse" for a in layout.axes) if len(coarse) == len(layout.axes) else ("place",)
    points |= dict(zip(axes, coarse, strict=True))
    field = np.asarray(conditions, np.float32)
    field, last = (field[..., 0], ()) if channels == 1 else (field, ("channel",))
    variables["condition_field"] = (field, ("condition", *axes, *last), {"long_name": "coarse field sampled from"})
  for axis, count in points.items():
    values, about = coordinates.get(axis, (np.arange(count), {"long_name": "point number"}))
    if np.shape(values) != (count,):
      raise ValueError(f"coordinate {axis} has shape {np.shape(values)}, the fields have {count} points there.")
    variables[axis] = (np.asarray(values), (axis,), dict(about))
  return variables


def _create(path, layout: Layout, variables, attrs, sample_attrs, fresh: bool) -> None:
  """Metadata, coordinates and conditions: what is there stays; a kill in between is mended by the next call."""
  group = zarr.open_group(path, mode="a", zarr_format=3, use_consolidated=False)
  known = set(group.array_keys())
  if not fresh and "sample" not in known:
    raise ValueError(
      f"{path} lost its array `sample`, but {path.with_suffix('.units')} lists finished units: put the store back, or "
      "move that folder away to draw everything again."
    )
  if runs.read_json(path / "zarr.json").get("consolidated_metadata"):  # made last
    return
  if "sample" not in known:
    kc, km = layout.unit
    tail = ("channel",) if layout.channels > 1 else ()
    group.create_array(
      "sample", shape=(layout.conditions, layout.members, *layout.fields), dtype="float32", fill_value=np.nan,
      shards=(kc, km, *layout.fields), chunks=(1, km, *layout.fields),
      dimension_names=("condition", "member", *layout.axes, *tail),
      attributes={"long_name": "sampled field"} | dict(sample_attrs),
    )  # fmt: skip
  for name, (values, dims, about) in variables.items():
    if name not in known:
      fill = np.nan if values.dtype.kind == "f" else 0
      group.create_array(
        name, shape=values.shape, dtype=values.dtype, chunks=values.shape, dimension_names=dims, attributes=about,
        fill_value=fill,
      )  # fmt: skip
    group[name][...] = values
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  made = {"Conventions": "CF-1.11", "history": f"{now} downscaling sample, commit {runs.commit()}"}
  group.attrs.update(dict(attrs) | made | {"done_fraction": 0.0})
  with warnings.catch_warnings():
    # xarray warns where consolidated metadata is missing, zarr where it is made: it lies outside the v3 text.
    warnings.simplefilter("ignore", zarr.errors.ZarrUserWarning)
    zarr.consolidate_metadata(path)


def _say_done(path, fraction: float) -> None:
  """Sets done_fraction in the root's JSON, in one rename, as a reader may be looking."""
  root = runs.read_json(path / "zarr.json")
  root["attributes"]["done_fraction"] = round(float(fraction), 6)
  runs.write_json(path / "zarr.json", root)
