"""A run's work folder as the jobs see it: its stages, what is done, and what finished stages left
for later ones.
"""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Iterator

import jax
import ml_collections
import numpy as np

from downscaling import build, series, stages
from downscaling.datasets import simulated, time_windows
from downscaling.debias.equivariant import moments
from downscaling.diffusion import error_table
from downscaling.fields import statistics
from downscaling.metrics import bootstrap
from downscaling.runtime import processes, stage_folder, supervision

# Stage -> what later jobs read of it. Moved away because it is damaged, it is made again from what
# the stage still has.
PRODUCTS = {
  "data": ("statistics.npz",),
  "debias": ("held_out.zarr", "in_sample.zarr", "diagnostics.json"),
  "train": ("prior",),
  "samples": (),  # stores by the sets of the config
  "report": ("report.html", "metrics.json"),
}
# What a job makes besides, that not every later job needs: without it the job runs again and makes
# just that.
BESIDES = {"train": (error_table.FILE,)}


@dataclasses.dataclass(frozen=True)
class Context:
  """config: locked ConfigDict. workdir: of the run. mesh: of all devices. stop: see supervision.
  command: argv.
  """

  config: ml_collections.ConfigDict
  workdir: pathlib.Path
  mesh: jax.sharding.Mesh
  stop: supervision.Stop
  command: str

  def stage(self, name: str) -> stage_folder.Stage:
    opened = lambda: stage_folder.open_stage(
      self.folder(name), name, stages.identity(self.config, name)
    )
    return processes.main_first(f"stage/{name}", opened)

  def folder(self, name: str) -> pathlib.Path:
    return stages.folder(self.config, self.workdir, name)

  def done(self, name: str, besides: bool = False) -> bool:
    """Is the stage complete and what later jobs read still there, and BESIDES? Makes no folder for
    the question.

    Raises as open_stage does if there is one.
    """
    named = {
      "debias": [f"{each}/map.json" for each in self.config.debias.maps],
      "samples": [
        f"{each}.{kind}" for each in build.sources(self.config) for kind in ("zarr", "units")
      ],
    }
    files = (
      stage_folder.MARKER,
      *PRODUCTS[name],
      *named.get(name, ()),
      *(BESIDES.get(name, ()) if besides else ()),
    )
    there = [(self.folder(name) / file).exists() for file in files]
    marked, *products = processes.gather(f"done/{name}", there)[
      0
    ]  # as process 0 sees it: all must answer alike
    if not marked:
      return False
    stage = self.stage(name)
    grown = name in ("samples", "report") and stage.summary.get("extent") != stages.extent(
      self.config
    )
    return stage.complete and all(products) and not grown

  def need(self, name: str, job: str) -> stage_folder.Stage:
    """A finished stage; raises FileNotFoundError naming the job that makes it."""
    if not self.done(name):
      raise FileNotFoundError(
        f"{self.folder(name)} is missing or unfinished: run `downscaling {job}` first, with the "
        "same --config and --workdir (or `downscaling pipeline`, which does all that is missing)."
      )
    return self.stage(name)


def stage_statistics(ctx: Context) -> statistics.Statistics:
  return statistics.load(stages.data_dir(ctx.config, ctx.workdir) / "statistics.npz")


def row_numbers(config, which: str, split: str, count: int | None = None) -> np.ndarray:
  """Which rows of a split `load_rows` takes, [S]."""
  trajectories, snapshots = config.data[which][split], config.data.snapshots
  return simulated.balanced(trajectories, snapshots, count or trajectories * snapshots)


def origin(config, numbers: np.ndarray) -> bootstrap.Rows:
  """Trajectory and time of rows of a split, by their numbers [S]."""
  trajectory, snapshot = np.divmod(numbers, config.data.snapshots)
  return bootstrap.Rows(trajectory, config.data.burn_in + config.data.spacing * snapshot)


def load_rows(ctx: Context, which: str, split: str, count: int | None = None) -> np.ndarray:
  """Snapshots [S, *space, C], in data units: `count` of the split, or all."""
  return load_numbered(ctx, which, split, row_numbers(ctx.config, which, split, count))


def load_numbered(ctx: Context, which: str, split: str, numbers: np.ndarray) -> np.ndarray:
  """Snapshots [S, *space, C], in data units, by their numbers [S] in the split."""
  return simulated.load(build.dataset(ctx.config, ctx.workdir, which), split, index=numbers)["u"]


def stretches(ctx: Context, which: str, split: str, count: int | None = None) -> np.ndarray:
  """The first series of a split, [S, L, *space, C]; single fields, L = 1, have that axis too."""
  rows = series.rows(ctx.config, which, split)[:count]
  found = simulated.load(
    build.dataset(ctx.config, ctx.workdir, which), split, index=rows.reshape(-1)
  )["u"]
  return found.reshape(*rows.shape, *found.shape[1:])


def load_windows(ctx: Context, split: str, count: int) -> np.ndarray:
  """Fields that the prior is made for, spread over the split: [S, *space, F·C] of HFHR, in data
  units.
  """
  c = ctx.config
  view = functools.partial(time_windows.view, snapshots=c.data.snapshots, frames=c.grid.frames)
  return simulated.load(build.dataset(c, ctx.workdir, "hfhr"), split, count, view=view)["u"]


def held_out_rows(ctx: Context, which: str, split: str, count: int) -> np.ndarray:
  """Snapshots [S, *space, C] that are judged: spread over the split, or the frames of its first
  series in order.
  """
  return load_numbered(ctx, which, split, held_out_numbers(ctx.config, which, split, count))


def held_out_numbers(config, which: str, split: str, count: int) -> np.ndarray:
  """Which rows of the split those are, [S]."""
  if config.sampling.series.frames == 1:
    return row_numbers(config, which, split, count)
  return series.rows(config, which, split).reshape(-1)[:count]


def quadratic_of(config):
  """The equation's quadratic term as a function, or None."""
  name = build.quadratic(config)
  return None if name is None else moments.QUADRATIC[name]


def conditions_of(ctx: Context, source: str) -> np.ndarray:
  """Coarse fields [K, *coarse, C]: debiased by the map `source`, or build.RAW, or build.TRUE.

  Series are [K, L, *coarse, C].
  """
  count, op = ctx.config.sampling.conditions, build.operator(ctx.config)
  if source == build.TRUE:
    return np.asarray(op.apply(true_rows(ctx, count)))
  rows = held_out(ctx)[source]
  if (length := ctx.config.sampling.series.frames) > 1:
    rows = rows[: len(rows) // length * length].reshape(-1, length, *rows.shape[1:])
  if len(rows) < count:
    what = "fields" if length == 1 else f"series of {length} frames"
    raise ValueError(
      f"{count} conditions, but {len(rows)} debiased held-out {what}: set "
      f"--config.sampling.conditions={len(rows)} or fewer, or "
      f"--config.debias.held_out={length * count} in another --workdir."
    )
  order = series.condition_rows(ctx.config)
  return rows[:count] if order is None else rows[order[:count]]


def floor_numbers(config) -> np.ndarray:
  """Rows of the floor split that join the reference in saying what true data do, [S]: whole
  trajectories.

  A quarter as many as the reference has: more would tell little, and cost as the square.
  """
  have = config.data.hfhr.floor * config.data.snapshots
  count = max(2 * config.data.snapshots, config.evaluate.reference // 4)
  if config.sampling.series.frames > 1:
    return held_out_numbers(
      config, "hfhr", "floor", min(count, series.rows(config, "hfhr", "floor").size)
    )
  return np.arange(min(count, have))


def condition_numbers(config, source: str) -> np.ndarray:
  """The rows of the test split behind the conditions [K] or [K, L] of `conditions_of`; of LFLR, or
  of HFHR if TRUE.
  """
  count, length = config.sampling.conditions, config.sampling.series.frames
  if source == build.TRUE:
    return series.rows(config, "hfhr", "test")[:count].reshape(
      -1, *([length] if length > 1 else [])
    )
  numbers = held_out_numbers(config, "lflr", "test", config.debias.held_out)
  if length > 1:
    return numbers[: len(numbers) // length * length].reshape(-1, length)[:count]
  order = series.condition_rows(config)
  return numbers[:count] if order is None else numbers[order[:count]]


def true_rows(ctx: Context, count: int) -> np.ndarray:
  """The held-out fine fields [K, *space, C] behind the conditions "true"; of a larger count, these
  are the first.

  Series are [K, L, *space, C].
  """
  found = stretches(ctx, "hfhr", "test", count)
  return found[:, 0] if ctx.config.sampling.series.frames == 1 else found


def held_out(ctx: Context, name: str = "held_out") -> dict[str, np.ndarray]:
  """{"lflr", and every map's name}: [S, *coarse, C] of the debias stage, before and after the maps."""
  import xarray

  path, shape = ctx.folder("debias") / f"{name}.zarr", (-1, *build.operator(ctx.config).coarse, 1)
  with readable(path, "debias"), xarray.open_zarr(path, consolidated=False) as data:
    rows = {key: np.asarray(data[key]).reshape(shape) for key in ("lflr", *ctx.config.debias.maps)}
    if not all(np.isfinite(x).all() for x in rows.values()):
      raise ValueError("it holds NaN, or a file of it is missing")
  return rows


def in_sample_rows(ctx: Context) -> np.ndarray:
  """Which rows of the fit the in-sample rows are, [S]."""
  import xarray

  path = ctx.folder("debias") / "in_sample.zarr"
  with readable(path, "debias"), xarray.open_zarr(path, consolidated=False) as data:
    return np.asarray(data["row"])


@contextlib.contextmanager
def readable(path: pathlib.Path, job: str) -> Iterator[None]:
  """Says of whatever zarr and its codecs raise for a damaged store which store, and what to do."""
  try:
    yield
  except Exception as error:  # each codec has its own kinds
    words = (str(error).splitlines() or [""])[0][:120]
    raise ValueError(
      f"{path} cannot be read ({type(error).__name__}: {words}): move it away and run `downscaling "
      f"{job}` again."
    ) from error


def by_row(config, stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Rows of the report, without channels: lflr, the default map, the other maps."""
  names = dict(
    sorted(stored.items(), key=lambda item: (item[0] != "lflr", item[0] != config.debias.map))
  )
  return {name: x[..., 0] for name, x in names.items()}
