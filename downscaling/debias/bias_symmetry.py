"""Which symmetries a map may use: the subgroups of an equation's group by name, and a test of the
bias against each.

A map that commutes with a group is right only where the bias does. The test compares, point by
point, the mean, the standard deviation, the skewness and the size of slopes of raw and true fields.
If the bias respects a group, each difference is its own average over the group, up to sampling
noise. Trajectories are the independent units, so the noise is measured between them.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
import scipy.stats

from downscaling.debias.equivariant import moments
from downscaling.debias.equivariant.equivariant_map import blocks
from downscaling.fields import symmetry

AUTO, FULL, TRIVIAL = "auto", "full", "trivial"
# Probability that a bias which respects the group is said to break it, at most: Bonferroni's bound
# over all points and statistics. Measured in tests/debias/test_bias_symmetry.py.
FALSE_ALARM = 1e-3
# Independent units at most; more trajectories are merged, as no quantile changes beyond.
UNITS = 512
RUNS = 64  # units of rows that come without ids: so many runs of consecutive rows
SOME = 4096  # rows that say where the middle of a law lies
REACH = 2.0  # standard deviations beyond which a value counts as if it were there
ROUNDING = 1e-6  # standard errors below it are rounding: some equations keep a mean
TINY = 1e-20  # variance of a point that does not vary, in units of the field's
SMALLEST = 1e-300  # probability that is told from 0
STATISTICS = ("mean", "standard deviation", "skewness", "slope")
# Which of them a change of sign turns round.
SIGNED = np.array([True, False, True, False])


# ---------------------------------------------------------------- subgroups


def subgroups(
  group: symmetry.Group, space: tuple[int, ...]
) -> dict[str, symmetry.Group]:
  """Subgroups by name, the largest first; a name is left out if a larger subgroup's elements are
  the same.

      full         all elements
      shifts       translations of the grid that leave the sign of the field alone
      unsigned     all that leave it alone
      shifts_x     of these, the ones along the last axis
      reflection   elements that leave the first point where it is
      trivial      the identity

  group: of a grid of shape `space`.
  """
  if len(group) == 1:  # both names may be asked for; and it may act on channels as well
    return {FULL: group, TRIVIAL: group}
  plain = group.sign > 0
  shift, along = _translations(group.index, space)
  members = {
    FULL: np.ones(len(group), bool),
    "shifts": plain & shift,
    "unsigned": plain,
    "shifts_x": plain & shift & along,
    "reflection": group.index[:, 0] == 0,
    TRIVIAL: plain & (group.index == np.arange(group.index.shape[1])).all(axis=1),
  }
  found: dict[str, symmetry.Group] = {}
  seen = set()
  for name, which in sorted(
    members.items(),
    key=lambda item: -item[1].sum(),
  ):
    if which.tobytes() not in seen:
      seen.add(which.tobytes())
      found[name] = symmetry.Group(group.index[which], group.sign[which])
  return found


def _translations(
  index: np.ndarray, space: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
  """Which elements translate the grid, and which of all move along the last axis alone; [G] bool
  each.
  """
  sources = np.unravel_index(index, space)
  points = np.unravel_index(np.arange(index.shape[1]), space)
  steps = [(s - p) % n for s, p, n in zip(sources, points, space, strict=True)]
  shift = np.all(
    [(step == step[:, :1]).all(axis=1) for step in steps],
    axis=0,
  )
  along = np.all(
    [(step == 0).all(axis=1) for step in steps[:-1]],
    axis=0,
  ) | (len(space) == 1)
  return shift, along


def check_name(name: str, group: symmetry.Group, space: tuple[int, ...]) -> None:
  """Raises ValueError unless the name is "auto" or one of `subgroups`."""
  known = (AUTO, *subgroups(group, space))
  if name not in known:
    raise ValueError(
      f"config.debias.group={name!r} is unknown on this grid; use one of {', '.join(known)}."
    )


# ---------------------------------------------------------------- the test


class Profile(NamedTuple):
  """Statistics by point of one cloud and their noise.

  values: the STATISTICS, in units of `Scale.unit`, [4, n]. without: the same less one unit of rows
    each, [U, 4, n].
  """

  values: np.ndarray
  without: np.ndarray


class Scale(NamedTuple):
  """What both clouds are measured by. centre, reach: by point, [*space]; values beyond centre ±
  reach count as there.

  Skewness of heavy tails hangs on single rows: without a reach the test raises false alarms. unit:
  [].
  """

  centre: np.ndarray
  reach: np.ndarray
  unit: float

  @classmethod
  def of(cls, one: np.ndarray, other: np.ndarray) -> "Scale":
    """Of two clouds [S, *space]: from quantiles, as a standard deviation hangs on outliers."""
    (a, s), (b, t) = (middle_and_width(rows) for rows in (one, other))
    wide = np.maximum(s, t)
    unit = float(np.sqrt((wide**2).mean()))
    return cls(
      (a + b) / 2,
      REACH * wide + np.abs(a - b) / 2,
      unit or 1.0,
    )


def middle_and_width(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Median, and standard deviation of a normal law with the same central 90 %, by point of rows [S,
  ...].
  """
  some = rows[
    np.linspace(
      0,
      len(rows) - 1,
      min(len(rows), SOME),
    ).astype(int)
  ]
  low, middle, high = np.quantile(
    np.asarray(some, np.float64), [0.05, 0.5, 0.95], axis=0
  )
  return middle, (high - low) / (2 * scipy.stats.norm.isf(0.05))


def units(count: int, ids: np.ndarray | None) -> np.ndarray:
  """The independent unit of each row, [count]: its trajectory, or a run of consecutive rows where
  there are no ids.
  """
  if ids is None:
    return np.arange(count) * min(RUNS, count) // count
  found = np.unique(ids, return_inverse=True)[1].ravel()
  number = int(found.max()) + 1
  return found * min(UNITS, number) // number


def profile(
  rows: np.ndarray,
  scale: Scale,
  ids: np.ndarray | None = None,
) -> Profile:
  """Of rows [S, *space]; ids: trajectory of each row, [S], or None.

  Mean, log standard deviation, skewness, and half the log of the mean square slope (central
  differences, all axes).
  """
  unit = units(len(rows), ids)
  number = int(unit.max()) + 1
  sums = np.zeros((number, 4, *rows.shape[1:]))
  for place, block in blocks(rows):
    v = np.clip(block - scale.centre, -scale.reach, scale.reach) / scale.unit
    slopes = [np.roll(v, -1, axis) - np.roll(v, 1, axis) for axis in range(1, v.ndim)]
    squares = sum(slope**2 for slope in slopes)
    np.add.at(
      sums,
      unit[place],
      np.stack([v, v**2, v**3, squares], axis=1),
    )
  sums = sums.reshape(number, 4, -1)
  count = np.bincount(unit)[:, None, None]
  total = sums.sum(axis=0)
  without = _statistics((total - sums) / np.maximum(len(rows) - count, 1))
  return Profile(_statistics(total / len(rows)), without)


def _statistics(means: np.ndarray) -> np.ndarray:
  """STATISTICS [..., 4, n] of the means of v, v², v³ and squared slopes, [..., 4, n]."""
  mean, square, cube, slope = np.moveaxis(means, -2, 0)
  variance = np.maximum(square - mean**2, TINY)
  third = cube - 3 * mean * square + 2 * mean**3
  return np.stack(
    [
      mean,
      np.log(variance) / 2,
      third / variance**1.5,
      np.log(np.maximum(slope, TINY)) / 2,
    ],
    axis=-2,
  )


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What the test says of one group.

  name, elements: of the group. worst: largest difference from the group's average, in standard
  errors. limit: what sampling allows. statistic, point: where it is; point None: in the mean over
  all points. size: the difference there, of means in units of the field's standard deviation, of
  standard deviations and slopes as a share.
  """

  name: str
  elements: int
  worst: float
  limit: float
  statistic: str
  point: int | None
  size: float

  @property
  def passes(self) -> bool:
    return self.worst <= self.limit


def judged(
  raw: Profile,
  true: Profile,
  group: symmetry.Group,
  name: str = "",
  alpha: float = FALSE_ALARM,
) -> Verdict:
  """Does the bias, raw less true, respect the group?

  Differences less their averages over the group, of each point and of all points together, are
  compared with Student quantiles at alpha over their number, two-sided. Points that are constant in
  either cloud are left out. Errors are stated as those of a normal deviate with the same
  probability, as few units have wide tails.
  """
  pool = moments.Pool.of(group)
  gap = _with_average(_broken(raw.values - true.values, pool))
  variance, weights = np.full(gap.shape, ROUNDING**2), 0.0
  for cloud in (raw, true):
    freedom = max(len(cloud.without) - 1, 1)
    apart = _with_average(_broken(cloud.without - cloud.without.mean(axis=0), pool))
    part = (apart**2).sum(axis=0) * freedom / (freedom + 1)  # the jackknife's
    variance = variance + part
    weights = weights + part**2 / freedom
  freedom = variance**2 / np.maximum(weights, np.finfo(float).tiny)
  alive = np.append(_varies(raw) & _varies(true), True)
  errors = np.where(alive, np.abs(gap) / np.sqrt(variance), 0.0)
  tail = scipy.stats.t.sf(errors, freedom)
  deviate = np.where(tail > SMALLEST, scipy.stats.norm.isf(tail), errors)
  place = np.unravel_index(np.argmax(deviate), deviate.shape)
  limit = float(scipy.stats.norm.isf(alpha / (2 * gap.size)))
  point = int(place[1]) if place[1] < len(pool.orbit) else None
  return Verdict(
    name,
    len(group),
    float(deviate[place]),
    limit,
    STATISTICS[place[0]],
    point,
    float(gap[place]),
  )


def _varies(cloud: Profile) -> np.ndarray:
  """Which points vary, [n]."""
  return cloud.values[1] > np.log(2 * TINY) / 2


def _with_average(values: np.ndarray) -> np.ndarray:
  """Values [..., n] and their mean, [..., n + 1], which shows a shift of all points best."""
  return np.concatenate(
    [values, values.mean(axis=-1, keepdims=True)],
    axis=-1,
  )


def _broken(values: np.ndarray, pool: moments.Pool) -> np.ndarray:
  """Values [..., 4, n] less their averages over the group: means over orbits, signed for what a
  sign turns round.
  """
  number = np.bincount(pool.orbit)
  out = np.empty_like(values)
  for k, signed in enumerate(SIGNED):
    sign = pool.sign if signed else np.ones(len(pool.orbit))
    own = values[..., k, :] * sign
    average = np.zeros((*own.shape[:-1], len(number)))
    np.add.at(average.T, pool.orbit, own.T)
    average /= number
    if signed:
      average[..., pool.odd] = 0.0
    out[..., k, :] = values[..., k, :] - average[..., pool.orbit] * sign
  return out


def largest(
  raw: np.ndarray,
  true: np.ndarray,
  group: symmetry.Group,
  ids: tuple[np.ndarray | None, np.ndarray | None],
) -> list[Verdict]:
  """Verdicts on subgroups from the largest down to the first that passes; the trivial one needs no
  test.

  raw, true: [S, *space], [R, *space]; ids: the trajectories of their rows, or None each.
  """
  scale = Scale.of(raw, true)
  biased, goal = profile(raw, scale, ids[0]), profile(true, scale, ids[1])
  verdicts: list[Verdict] = []
  for name, part in subgroups(group, raw.shape[1:]).items():
    verdicts.append(judged(biased, goal, part, name))
    if verdicts[-1].passes:
      break
  return verdicts
