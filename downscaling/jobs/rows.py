"""Which snapshots a job reads, how large they are, and reading them block by block."""

import dataclasses
import functools
import math

import numpy as np

from downscaling.assembly import samples, time_series, worlds
from downscaling.datasets import simulated, time_windows
from downscaling.experiment import Experiment
from downscaling.fields import operators
from downscaling.jobs.workdir import Workdir, readable
from downscaling.metrics import bootstrap
from downscaling.runtime import stores

# Of fine fields that are in memory at a time while they are coarsened.
BLOCK_BYTES = 2**26


@dataclasses.dataclass(frozen=True)
class Rows:
  """Snapshots of one split of one world, in data units; nothing is read before `read`.

  builder, split: where they lie. numbers: which rows of the split, [S]. operator: C′ that is
  applied to each, or None.
  """

  builder: simulated.FieldsBuilder
  split: str
  numbers: np.ndarray
  operator: operators.Operator | None = None

  @property
  def stored(self) -> tuple[int, ...]:
    """Shape of a field on disk, [*space, C]."""
    return self.builder.shape

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the array that `read` returns, [S, *space, C]."""
    if self.operator is None:
      return (len(self.numbers), *self.stored)
    return (len(self.numbers), *self.operator.coarse, self.stored[-1])

  @property
  def nbytes(self) -> int:
    """Of the array that `read` returns, which is float32."""
    return 4 * math.prod(self.shape)

  @property
  def block(self) -> int:
    """How many rows are read at a time."""
    return max(
      1,
      min(len(self.numbers), BLOCK_BYTES // (4 * math.prod(self.stored))),
    )

  def load(self) -> dict[str, np.ndarray]:
    """{"u": [S, *space, C] float32, "trajectory": [S]}. Raises as simulated.load."""
    fields = np.empty(self.shape, np.float32)
    trajectories = np.empty(len(self.numbers), np.int64)
    for start in range(0, len(self.numbers), self.block):
      part = slice(start, start + self.block)
      found = simulated.load(self.builder, self.split, index=self.numbers[part])
      u = found["u"]
      fields[part] = u if self.operator is None else self.operator.apply(u)
      trajectories[part] = found["trajectory"]
    return {"u": fields, "trajectory": trajectories}

  def read(self) -> np.ndarray:
    """All rows, [S, *space, C] float32."""
    return self.load()["u"]


# ---------------------------------------------------------------- numbers of rows


def balanced(experiment: Experiment, which: str, split: str, count: int | None = None):
  """Row numbers of a split, spread over trajectories and times: `count`, or all, [S]."""
  trajectories = experiment.data.trajectories(which)[split]
  snapshots = experiment.data.snapshots
  return simulated.balanced(trajectories, snapshots, count or trajectories * snapshots)


def judged(experiment: Experiment, which: str, split: str, count: int) -> np.ndarray:
  """Rows that are judged, [S]: spread over the split, or the frames of its first series."""
  if experiment.sampling.series.frames == 1:
    return balanced(experiment, which, split, count)
  return time_series.rows(experiment, which, split).reshape(-1)[:count]


def floor(experiment: Experiment) -> np.ndarray:
  """Rows of the floor split that join the reference in saying what true data do, [S].

  They are whole trajectories, and a quarter as many as the reference has: more would tell little,
  and cost as the square.
  """
  snapshots = experiment.data.snapshots
  have = experiment.data.hfhr.floor * snapshots
  count = max(2 * snapshots, experiment.evaluate.reference // 4)
  if experiment.sampling.series.frames > 1:
    there = time_series.rows(experiment, "hfhr", "floor").size
    return judged(experiment, "hfhr", "floor", min(count, there))
  return np.arange(min(count, have))


def conditions(experiment: Experiment, source: str) -> np.ndarray:
  """Rows of the test split behind the conditions, [K] or [K, L].

  They are of the coarse world, or of the fine one if source is samples.TRUE.
  """
  e = experiment
  count, length = e.sampling.conditions, e.sampling.series.frames
  if source == samples.TRUE:
    found = time_series.rows(e, "hfhr", "test")[:count]
    return found.reshape(-1, length) if length > 1 else found.reshape(-1)
  numbers = judged(e, "lflr", "test", e.debias.held_out)
  if length > 1:
    return _in_stretches(numbers, length)[:count]
  order = time_series.condition_rows(e)
  return numbers[:count] if order is None else numbers[order[:count]]


def _in_stretches(rows: np.ndarray, length: int) -> np.ndarray:
  """Rows [S, ...] as series [S // L, L, ...]."""
  whole = len(rows) // length * length
  return rows[:whole].reshape(-1, length, *rows.shape[1:])


def origin(experiment: Experiment, numbers: np.ndarray) -> bootstrap.Rows:
  """Trajectory and time of rows of a split, by their numbers [S]."""
  trajectory, snapshot = np.divmod(numbers, experiment.data.snapshots)
  data = experiment.data
  return bootstrap.Rows(trajectory, data.burn_in + data.spacing * snapshot)


# ---------------------------------------------------------------- rows themselves


def of(
  work: Workdir, which: str, split: str, numbers: np.ndarray, coarsen: bool = False
) -> Rows:
  """Those rows of a split; coarsen: as C′ sees them."""
  builder = worlds.dataset(work.experiment, work.path, which)
  operator = worlds.operator(work.experiment) if coarsen else None
  return Rows(builder, split, numbers, operator)


def windows(work: Workdir, split: str, count: int) -> np.ndarray:
  """Windows that the prior is made for, spread over the split: [S, *space, F·C], in data units."""
  e = work.experiment
  view = functools.partial(
    time_windows.view, snapshots=e.data.snapshots, frames=e.grid.frames
  )
  builder = worlds.dataset(e, work.path, "hfhr")
  return simulated.load(builder, split, count, view=view)["u"]


def stretches(
  work: Workdir, which: str, split: str, count: int | None = None
) -> np.ndarray:
  """The first series of a split, [S, L, *space, C]; single fields, L = 1, have that axis too."""
  numbers = time_series.rows(work.experiment, which, split)[:count]
  found = of(work, which, split, numbers.reshape(-1)).read()
  return found.reshape(*numbers.shape, *found.shape[1:])


def true_fields(work: Workdir, count: int) -> np.ndarray:
  """The held-out fine fields [K, *space, C] behind the conditions "true".

  Those of a larger count begin with these. Series are [K, L, *space, C].
  """
  found = stretches(work, "hfhr", "test", count)
  return found[:, 0] if work.experiment.sampling.series.frames == 1 else found


def condition_fields(work: Workdir, source: str) -> np.ndarray:
  """Coarse fields [K, *coarse, C]: behind the map `source`, or samples.RAW, or samples.TRUE.

  Series are [K, L, *coarse, C].
  """
  e = work.experiment
  count, length = e.sampling.conditions, e.sampling.series.frames
  if source == samples.TRUE:
    return np.asarray(worlds.operator(e).apply(true_fields(work, count)))
  rows = mapped(work, "held_out", (source,))[source]
  if length > 1:
    rows = _in_stretches(rows, length)
  if len(rows) < count:
    what = "fields" if length == 1 else f"series of {length} frames"
    raise ValueError(
      f"{count} conditions, but {len(rows)} debiased held-out {what}: set "
      f"--config.sampling.conditions={len(rows)} or fewer, or "
      f"--config.debias.held_out={length * count} in another --workdir."
    )
  order = time_series.condition_rows(e)
  return rows[:count] if order is None else rows[order[:count]]


def mapped(
  work: Workdir, name: str = "held_out", variables: tuple[str, ...] | None = None
) -> dict[str, np.ndarray]:
  """{"lflr" and every map, or `variables`: [S, *coarse, C]} of a store of the debias stage."""
  import xarray

  e, path = work.experiment, work.folder("debias") / f"{name}.zarr"
  shape = (-1, *worlds.operator(e).coarse, worlds.channels(e))
  with (
    readable(path, "debias"),
    xarray.open_zarr(stores.store(path), consolidated=False) as data,
  ):
    names = variables or ("lflr", *e.debias.maps)
    found = {key: np.asarray(data[key]).reshape(shape) for key in names}
    if not all(np.isfinite(x).all() for x in found.values()):
      raise ValueError("it holds NaN, or a file of it is missing")
  return found


def in_sample(work: Workdir) -> np.ndarray:
  """Which rows of the fit the in-sample rows are, [S]."""
  import xarray

  path = work.folder("debias") / "in_sample.zarr"
  with (
    readable(path, "debias"),
    xarray.open_zarr(stores.store(path), consolidated=False) as data,
  ):
    return np.asarray(data["row"])
