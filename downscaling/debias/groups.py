"""Which symmetries a map may use: the subgroups of an equation's group by name, and a test of the bias against each.

A map that commutes with a group is right only where the bias does. The test compares, point by point, the mean, the
standard deviation, the skewness and the size of slopes of raw and true fields. If the bias respects a group, each
difference is its own average over the group, up to sampling noise. Trajectories are the independent units, so the noise
is measured between them.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
import scipy.stats

from downscaling.common import symmetry
from downscaling.debias import moments
from downscaling.debias.equivariant import blocks

AUTO, FULL, TRIVIAL = "auto", "full", "trivial"
# Probability that a bias which respects the group is said to break it, at most: Bonferroni's bound over all points and
# statistics. Measured in tests/debias/test_groups.py.
FALSE_ALARM = 1e-3
UNITS = 512  # independent units at most; more trajectories are merged, as no quantile changes beyond
RUNS = 64  # units of rows that come without ids: so many runs of consecutive rows
ROUNDING = 1e-6  # standard errors below it, of statistics without unit, are rounding: some equations keep a mean
STATISTICS = ("mean", "standard deviation", "skewness", "slope")
SIGNED = np.array([True, False, True, False])  # which of them a change of sign turns round


# ---------------------------------------------------------------- subgroups


def subgroups(group: symmetry.Group, space: tuple[int, ...]) -> dict[str, symmetry.Group]:
  """Subgroups by name, the largest first; a name is left out if a larger subgroup's elements are the same.

      full         all elements
      shifts       translations of the grid that leave the sign of the field alone
      unsigned     all that leave it alone
      shifts_x     of these, the ones along the last axis
      reflection   elements that leave the first point where it is
      trivial      the identity

  group: of a grid of shape `space`.
  """
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
  for name, which in sorted(members.items(), key=lambda item: -item[1].sum()):
    if which.tobytes() not in seen:
      seen.add(which.tobytes())
      found[name] = symmetry.Group(group.index[which], group.sign[which])
  if len(group) == 1:  # of a group of one, both names are asked for
    found[TRIVIAL] = found[FULL]
  return found


def _translations(index: np.ndarray, space: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
  """Which elements translate the grid, and which of all move along the last axis alone; [G] bool each."""
  sources = np.unravel_index(index, space)
  points = np.unravel_index(np.arange(index.shape[1]), space)
  steps = [(s - p) % n for s, p, n in zip(sources, points, space, strict=True)]
  shift = np.all([(step == step[:, :1]).all(axis=1) for step in steps], axis=0)
  along = np.all([(step == 0).all(axis=1) for step in steps[:-1]], axis=0) | (len(space) == 1)
  return shift, along


def check_name(name: str, group: symmetry.Group, space: tuple[int, ...]) -> None:
  """Raises ValueError unless the name is "auto" or one of `subgroups`."""
  known = (AUTO, *subgroups(group, space))
  if name not in known:
    raise ValueError(f"config.debias.group={name!r} is unknown on this grid; use one of {', '.join(known)}.")


# ---------------------------------------------------------------- the test


class Profile(NamedTuple):
  """Statistics by point of one cloud and their noise. values: [4, n]; parts: of each unit, [U, 4, n], sum 0.

  values + Σ parts of a resampled set of units is what other units would have given, to first order.
  """

  values: np.ndarray
  parts: np.ndarray


def units(count: int, ids: np.ndarray | None) -> np.ndarray:
  """The independent unit of each row, [count]: its trajectory, or a run of consecutive rows where there are no ids."""
  if ids is None:
    return np.arange(count) * min(RUNS, count) // count
  found = np.unique(ids, return_inverse=True)[1].ravel()
  number = int(found.max()) + 1
  return found * min(UNITS, number) // number


def profile(rows: np.ndarray, ids: np.ndarray | None = None) -> Profile:
  """Of rows [S, *space]; ids: trajectory of each row, [S], or None.

  Mean, log standard deviation, skewness, and half the log of the mean square slope (central differences, all axes).
  """
  unit = units(len(rows), ids)
  count = len(rows)
  mean = sum(block.sum(axis=0) for _, block in blocks(rows)) / count
  powers = [sum(part) / count for part in zip(*(_powers(block, mean) for _, block in blocks(rows)), strict=True)]
  second, third, slope = powers
  tiny = np.finfo(float).tiny
  std = np.sqrt(np.maximum(second, tiny))
  skew = third / std**3
  parts = np.zeros((int(unit.max()) + 1, 4, mean.size))
  for place, block in blocks(rows):
    square, cube, gradient = (value for value in _each(block, mean))
    z = (block - mean) / std
    influence = np.stack(
      [
        block - mean,
        (square / std**2 - 1) / 2,
        cube / std**3 - skew - 3 * z - 1.5 * skew * (z**2 - 1),
        (gradient / np.maximum(slope, tiny) - 1) / 2,
      ],
      axis=1,
    )
    np.add.at(parts, unit[place], influence.reshape(len(block), 4, -1) / count)
  values = np.stack([mean, np.log(std), skew, np.log(np.maximum(slope, tiny)) / 2])
  return Profile(values.reshape(4, -1), parts)


def _each(block: np.ndarray, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Squares, cubes and squared slopes of every value, like block."""
  gone = block - mean
  slopes = [np.roll(gone, -1, axis) - np.roll(gone, 1, axis) for axis in range(1, block.ndim)]
  return gone**2, gone**3, sum(slope**2 for slope in slopes)


def _powers(block, mean):
  return tuple(value.sum(axis=0) for value in _each(block, mean))


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What the test says of one group.

  name, elements: of the group. worst: largest |difference from the group's average| in standard errors; limit: what
  sampling allows. statistic, point: where, None for all points together; size: the difference there (of means in standard deviations, of the
  standard deviation and of slopes a share). passes: worst ≤ limit.
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


def test(raw: Profile, true: Profile, group: symmetry.Group, name: str = "", alpha: float = FALSE_ALARM) -> Verdict:
  """Does the bias, raw less true, respect the group?

  Differences less their averages over the group, of each point and of all points together, are compared with Student
  quantiles at alpha over their number, two-sided. Points that are constant in either cloud are left out. Errors are
  stated as those of a normal deviate with the same probability, as few units have wide tails.
  """
  pool = moments.Pool.of(group)
  gap = _with_average(_broken(raw.values - true.values, pool))
  scale = np.ones((4, 1))
  scale[0] = np.exp(true.values[1]).mean()
  variance, weights = (scale * ROUNDING) ** 2, 0.0
  for cloud in (raw, true):
    freedom = max(len(cloud.parts) - 1, 1)
    part = (_with_average(_broken(cloud.parts, pool)) ** 2).sum(axis=0) * (freedom + 1) / freedom
    variance = variance + part
    weights = weights + part**2 / freedom
  alive = np.append(_varies(raw) & _varies(true), True)
  freedom = variance**2 / np.maximum(weights, np.finfo(float).tiny)
  errors = np.where(alive, np.abs(gap) / np.sqrt(variance), 0.0)
  tail = scipy.stats.t.logsf(errors, freedom)
  deviate = _deviate(tail)
  place = np.unravel_index(np.argmax(deviate), deviate.shape)
  size = gap[place] / scale[place[0], 0]
  limit = float(scipy.stats.norm.isf(alpha / (2 * gap.size)))
  point = int(place[1]) if place[1] < len(pool.orbit) else None
  return Verdict(name, len(group), float(deviate[place]), limit, STATISTICS[place[0]], point, float(size))


test.__test__ = False  # pytest takes names that begin so for tests of its own


def _deviate(log_tail: np.ndarray) -> np.ndarray:
  """The normal deviate with a tail of that logarithm; far out by −log p ≈ ½ z² + log z + ½ log 2π."""
  far = np.sqrt(np.maximum(-2 * log_tail - np.log(2 * np.pi), 1.0))
  far = np.sqrt(np.maximum(far**2 - 2 * np.log(far), 1.0))
  near = scipy.stats.norm.isf(np.exp(np.maximum(log_tail, -100.0)))
  return np.where(log_tail > -100, near, far)


def _varies(cloud: Profile) -> np.ndarray:
  """Which points vary, [n]."""
  return cloud.values[1] > np.log(np.finfo(float).tiny) / 2 + 1


def _with_average(values: np.ndarray) -> np.ndarray:
  """Values [..., n] and their mean over all points, [..., n + 1]: a shift of all is seen best so."""
  return np.concatenate([values, values.mean(axis=-1, keepdims=True)], axis=-1)


def _broken(values: np.ndarray, pool: moments.Pool) -> np.ndarray:
  """Values [..., 4, n] less their averages over the group: means over orbits, signed for what a sign turns round."""
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
  raw: np.ndarray, true: np.ndarray, group: symmetry.Group, ids: tuple[np.ndarray | None, np.ndarray | None]
) -> list[Verdict]:
  """Verdicts on subgroups from the largest down to the first that passes; the trivial one needs no test.

  raw, true: [S, *space], [R, *space]; ids: the trajectories of their rows, or None each.
  """
  clouds = [profile(rows, own) for rows, own in zip((raw, true), ids, strict=True)]
  verdicts: list[Verdict] = []
  for name, part in subgroups(group, raw.shape[1:]).items():
    verdicts.append(test(*clouds, part, name))
    if verdicts[-1].passes:
      break
  return verdicts
