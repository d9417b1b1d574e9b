"""A fitted downscaler: what a finished work folder is, without its config file.

  d = Downscaler.load("pretrained/ks")
  fields = d.sample(d.debias(y), members=8)

A work folder qualifies once `debias` and `train` have finished. Its markers hold every setting.
"""

import dataclasses
import functools
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from downscaling import experiment as experiments
from downscaling.assembly import prior, samples, worlds
from downscaling.debias import maps
from downscaling.diffusion import error_table, train_loop
from downscaling.experiment import Experiment
from downscaling.fields import operators, statistics
from downscaling.fields.domain import Domain
from downscaling.runtime import files, products, stage_folder
from downscaling.runtime import mesh as meshes
from downscaling.runtime.remote_paths import RemotePath
from downscaling.sampling import conditional_sampler, ensemble, observation_noise

# Stages of a work folder that are read; `samples` may be missing.
STAGES = ("data", "debias", "train", "samples")
NOISE = pathlib.Path("samples") / observation_noise.FILE


@dataclasses.dataclass(frozen=True, eq=False)
class Downscaler:
  """A debiasing map and a diffusion prior that were fitted for each other.

  Made by `load`. Attributes:
    experiment: every setting of the run.
    folder: the work folder.
    map: (coarse fields [S, *coarse, C]) -> debiased ones. map_name: of it, e.g. "entropic".
    statistics: mean, standard deviation and spectrum of the fine training fields.
    params: of the prior's network, NumPy arrays.
    table: the prior's measured error, or None if the guidance needs none.
    noise: standard deviation of y′ behind the map, in standard deviations of the fine data.
  """

  experiment: Experiment
  folder: pathlib.Path
  map: Callable[[np.ndarray], np.ndarray]
  map_name: str
  statistics: statistics.Statistics
  params: Any
  table: error_table.ErrorTable | None
  noise: float

  # ---------------------------------------------------------------- made from files, and saved

  @classmethod
  def load(cls, folder: str | os.PathLike, map: str | None = None) -> "Downscaler":
    """Opens a work folder, or one that `save` has made.

    Args:
      folder: e.g. "runs/ks" or "pretrained/ks".
      map: the map to debias with; None for the run's default.
    Raises: FileNotFoundError if `debias` or `train` has not finished there; ValueError if the
      folder is damaged, or made by a version that this one does not read.
    """
    path = files.folder(folder)
    found = {stage: _marker(path, stage) for stage in STAGES}
    e = _experiment(path, found)
    name = e.debias.map if map is None else map
    trained = e.folder(path, "train")
    marker = _finished(
      found["train"] or _marker(path, "train", trained), trained, "train"
    )
    fitted = path / "debias" / name
    _finished(found["debias"], path / "debias", "debias")
    if not (fitted / "map.json").exists():
      there = sorted(p.parent.name for p in (path / "debias").glob("*/map.json"))
      raise FileNotFoundError(f"{path / 'debias'} has no map {name!r}: it has {there}.")
    stats = statistics.load(e.folder(path, "data") / "statistics.npz")
    network, space = prior.network(e, stats), worlds.space(e)
    wide = len(stats.mean) * e.grid.frames
    made_by = marker["config_hash"]
    loaded = train_loop.load_prior(
      trained, made_by, network, space, wide, meshes.make(1)
    )
    table = error_table.load(trained, made_by) if samples.needs_table(e) else None
    return cls(
      experiment=e,
      folder=path,
      map=maps.load(fitted),
      map_name=name,
      statistics=stats,
      params=jax.tree.map(np.asarray, loaded),
      table=table,
      noise=_fitted_noise(path, e, name),
    )

  def save(self, folder: str | os.PathLike) -> None:
    """Writes what `load` needs into a new folder: megabytes, without data and checkpoints.

    Raises: FileExistsError if the folder holds anything; ValueError for one on an object store.
    """
    target = files.folder(folder)
    if isinstance(target, RemotePath):
      raise ValueError(f"{target} is on an object store: save to a disk, then copy it.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
      raise FileExistsError(
        f"{target} is not empty: nothing was written. Use another folder."
      )
    e, source = self.experiment, self.folder
    partial = target.with_name(files.temporary_name(target.name))
    try:
      for stage in ("data", "debias", "train"):
        (partial / stage).mkdir(parents=True)
      data, trained = e.folder(source, "data"), e.folder(source, "train")
      files.copy(data, partial / "data", [data / "statistics.npz"])
      files.copy(trained, partial / "train", (trained / "prior").rglob("*"))
      if self.table is not None:
        files.copy(trained, partial / "train", [trained / error_table.FILE])
      for fitted in (source / "debias").glob("*/map.json"):
        for part in fitted.parent.iterdir():
          if part.name != "checkpoints":
            files.copy(source, partial, [part, *part.rglob("*")])
      if (source / NOISE).exists():
        files.copy(source, partial, [source / NOISE])
      # What it saves lies in one folder, wherever data and prior were.
      settings = e.changed(**{"data.dir": "", "train.dir": ""}).differences()
      for stage in ("data", "debias", "train"):
        record = files.read_json(e.folder(source, stage) / stage_folder.MARKER)
        told = products.of(partial / stage)
        stage_folder.write_marker(
          partial / stage, record | {"experiment": settings, "products": told}
        )
      if target.exists():
        target.rmdir()
      partial.rename(target)
    finally:
      shutil.rmtree(partial, ignore_errors=True)

  # ---------------------------------------------------------------- what it knows

  @functools.cached_property
  def operator(self) -> operators.Operator:
    """C′: fine fields [..., *space, C] -> coarse ones."""
    return worlds.operator(self.experiment)

  @property
  def domain(self) -> Domain:
    """Axes, channels and symmetries of the fine fields."""
    return worlds.domain(self.experiment)

  @property
  def fine(self) -> tuple[int, ...]:
    """Fine points along each axis."""
    return self.operator.fine

  @property
  def coarse(self) -> tuple[int, ...]:
    """Coarse points along each axis."""
    return self.operator.coarse

  @property
  def channels(self) -> int:
    """Values at a point."""
    return len(self.statistics.mean)

  def __repr__(self) -> str:
    grids = " -> ".join("×".join(map(str, shape)) for shape in (self.coarse, self.fine))
    return f"Downscaler({self.experiment.experiment}, {grids}, {self.folder})"

  # ---------------------------------------------------------------- what it does

  def debias(self, y):
    """Carries coarse, biased fields over to the law of coarsened true ones.

    Args:
      y: [..., *coarse, C], or an xarray.DataArray with or without an axis of channels; in the units
        of the data that the map was fitted to.
    Returns: fields like y, float32; of a DataArray, one with the same coordinates.
    Raises: ValueError for another shape, and for values that are not finite.
    """
    given = _Coarse(self, y)
    mapped = np.asarray(self.map(given.rows), np.float32)
    return given.like(mapped, f"debiased by the map {self.map_name}")

  def sample(
    self,
    y,
    members: int = 8,
    key: int = 0,
    *,
    unit: tuple[int, int] | None = None,
    noise: float | None = None,
  ):
    """Draws fine fields x that agree with coarse ones, C′x = y.

    Args:
      y: debiased coarse fields, as for `debias`; with series of L > 1 frames [..., L, *coarse, C].
      members: M, fields for each.
      key: seed of the ensemble; each new one compiles anew. Member m of condition k depends on it,
        on k and on m, not on how many there are.
      unit: conditions × members that are drawn together; None for as many conditions as come, up to
        the run's. With the run's own unit and seed, members are those of its job, bit for bit.
      noise: standard deviation of y about C′x, in the units of y; None for what the run has fitted
        to its map, 0 for exact conditions.
    Returns: [..., M, (L,) *space, C] float32; of a DataArray, one with an axis `member` and the
      fine positions. A field that the sampler could not draw is NaN.
    Raises: ValueError for another shape, for values that are not finite, and for sizes below 1.
    """
    given = _Coarse(self, y, self.experiment.sampling.series.frames)
    if members < 1:
      raise ValueError(f"members={members}: need at least 1.")
    if unit is None:
      conditions = min(len(given.rows), self.experiment.sampling.unit[0])
      unit = (conditions, self.experiment.sampling.unit[1])
    fields = self._drawn(
      given.rows,
      members,
      int(key),
      unit,
      self._relative(noise),
    )
    return given.fine(fields)

  def _drawn(
    self, y: np.ndarray, members: int, seed: int, unit, noise: float
  ) -> np.ndarray:
    """[K, M, (L,) *space, C] of conditions [K, (L,) *coarse, C]."""
    device, axes = jax.local_devices()[0], len(self.fine)
    weights = self.params
    if noise:
      error = np.full((1,) * (axes + 1), noise**2, np.float32)
      weights = conditional_sampler.Soft(self.params, error)
    layout = ensemble.layout_of(
      self._sampler(unit),
      weights,
      space=self.fine,
      coarse=y.shape[1:],
      channels=self.channels,
      conditions=len(y),
      members=members,
      unit=unit,
      frames=self.experiment.sampling.series.frames,
    )
    program = ensemble.compiled(
      self._sampler(unit),
      seed,
      layout,
      weights,
      [device],
    )[0]
    there = jax.device_put(weights, device)
    found = np.full(
      (len(y), members, *layout.made),
      np.nan,
      np.float32,
    )
    for each in layout.units():
      block = ensemble.block(layout, each, np.arange(len(y)), y)
      drawn = program(*jax.device_put(block, device), there)["sample"]
      whole = np.asarray(drawn).reshape(*unit, *layout.made)
      count, many = each.c1 - each.c0, each.m1 - each.m0
      found[each.c0 : each.c1, each.m0 : each.m1] = whole[:count, :many]
    return found

  @functools.cache  # noqa: B019 - as long as the downscaler lives
  def _sampler(self, unit: tuple[int, int]) -> Callable:
    e = self.experiment.changed(**{"sampling.unit": unit})
    return samples.sampler(
      e, self.statistics, prior.network(e, self.statistics), self.table
    )

  def _relative(self, noise: float | None) -> float:
    """Observation noise in standard deviations of the data."""
    if noise is None:
      return self.noise
    if not (math.isfinite(noise) and noise >= 0):
      raise ValueError(
        f"noise={noise}: need a finite number of at least 0, in the units of y."
      )
    return float(noise / np.mean(self.statistics.std))


class _Coarse:
  """Coarse fields that came as an array or a DataArray, as rows [K, (L,) *coarse, C]."""

  def __init__(self, downscaler: Downscaler, y: Any, frames: int = 1):
    self.of, self.given = downscaler, y
    self.labelled = hasattr(y, "dims") and hasattr(y, "coords")
    values = np.asarray(y, np.float32)
    need = (*((frames,) if frames > 1 else ()), *downscaler.coarse, downscaler.channels)
    # A DataArray of one channel usually has no axis for it.
    self.bare = self.labelled and downscaler.channels == 1 and values.shape[-1:] != (1,)
    if self.bare:
      values = values[..., None]
    if values.ndim < len(need) or values.shape[-len(need) :] != need:
      raise ValueError(
        f"coarse fields of shape {np.shape(y)}: need [..., {', '.join(map(str, need))}], the last "
        "axis for channels. For one field of one channel, pass y[None, ..., None]."
      )
    if not np.isfinite(values).all():
      count = int((~np.isfinite(values)).sum())
      raise ValueError(
        f"{count} of {values.size} coarse values are not finite: mend or drop them."
      )
    self.lead = values.shape[: values.ndim - len(need)]
    self.rows = values.reshape(-1, *need)
    self.time = frames > 1

  def like(self, rows: np.ndarray, history: str):
    """Rows as fields like those that came."""
    values = rows.reshape(*self.lead, *rows.shape[1:])
    if not self.labelled:
      return values
    values = values[..., 0] if self.bare else values
    return self.given.copy(data=values).assign_attrs(
      history=_history(self.given, history)
    )

  def fine(self, fields: np.ndarray):
    """Fine fields [K, M, ...] with the leading axes and labels of those that came."""
    values = fields.reshape(*self.lead, *fields.shape[1:])
    if not self.labelled:
      return values
    import xarray

    values = values[..., 0] if self.bare else values
    dims, axes = list(self.given.dims), len(self.of.fine)
    space = dims[len(dims) - axes - (not self.bare) :][:axes]
    lead = dims[: len(self.lead)]
    names = [*lead, "member", *dims[len(self.lead) :]]
    coords = {k: v for k, v in self.given.coords.items() if not {*v.dims} & {*space}}
    for name, (points, about) in zip(
      space, self.of.domain.coords().values(), strict=True
    ):
      coords[name] = (name, points, about)
    made = xarray.DataArray(values, dims=names, coords=coords, name=self.given.name)
    told = f"drawn by {self.of!r}"
    return made.assign_attrs(
      dict(self.given.attrs) | {"history": _history(self.given, told)}
    )


def _history(given, told: str) -> str:
  """The history attribute with one more line."""
  return "\n".join(filter(None, [given.attrs.get("history"), told]))


# ---------------------------------------------------------------- what a folder says


def _marker(
  path: pathlib.Path, stage: str, folder: pathlib.Path | None = None
) -> dict | None:
  """The marker of a stage; None if there is none."""
  file = (folder or path / stage) / stage_folder.MARKER
  return files.read_json(file) if file.exists() else None


def _finished(marker: dict | None, folder: pathlib.Path, job: str) -> dict:
  """The marker. Raises FileNotFoundError naming the job to run."""
  if marker is None or not marker.get("complete"):
    raise FileNotFoundError(
      f"{folder} is missing or unfinished: run `downscaling {job}` with the config and --workdir "
      "of this run. A Downscaler needs what `debias` and `train` make."
    )
  return marker


def _experiment(path: pathlib.Path, found: Mapping[str, dict | None]) -> Experiment:
  """The experiment that the markers of a work folder tell."""
  blocks: dict[str, Any] = {}
  for stage in ("train", "debias", "samples"):
    marker = found[stage]
    if marker is None:
      continue
    if marker.get("schema") not in (stage_folder.FIRST, stage_folder.SCHEMA):
      raise ValueError(
        f"{path / stage} has schema {marker.get('schema')}, this version reads "
        f"{stage_folder.FIRST} and {stage_folder.SCHEMA}: open it with the version that made it."
      )
    if "experiment" in marker:
      blocks = dict(marker["experiment"])
    else:
      blocks |= marker["config"]
  if not blocks:
    raise FileNotFoundError(
      f"{path} holds no {' or '.join(STAGES)} of a run: give a work folder in which `downscaling "
      "debias` and `downscaling train` have finished, or pretrained/ks of the repository."
    )
  return experiments.of_blocks(blocks)


def _fitted_noise(path: pathlib.Path, experiment: Experiment, map: str) -> float:
  """Observation noise behind a map: the run's number, or what it has fitted; 0 if neither."""
  std = np.mean(statistics.load(experiment.folder(path, "data") / "statistics.npz").std)
  given = samples.observation_noise(experiment)
  if given is not None:
    return float(given / std)
  if not (path / NOISE).exists():
    return 0.0
  record = files.read_json(path / NOISE).get(f"{map}+diffusion")
  return 0.0 if record is None else observation_noise.Fit.of(record).std
