"""Covariances of few rows, drawn towards a structured version of themselves by a weight that other
rows choose.

Where no shifts cut it into blocks, a covariance of d points has d (d + 1)/2 numbers, each with the
noise of all rows. Its structured version has far fewer: the standard deviation of every point, and

    stationary   correlations that depend on the distance along the axes alone (their mean over all
                 shifts); for laws that are alike everywhere one standard deviation as well; or
    tapered      correlations times a taper that falls to 0 at a distance (Gaspari & Cohn 1999, eq.
                 4.10)

The first needs a periodic grid, the second does not. The estimate is (1 − w) C + w T(C). The weight
makes it nearest to the covariance of rows that it was not made of, in the metric where T is the
identity, so that modes of little variance count as much as others. Never is a covariance drawn
towards the identity: that would fill empty modes.
"""

import functools
import math
from typing import NamedTuple

import numpy as np

from downscaling.debias.equivariant import moments

STRUCTURES = ("stationary", "tapered")
FOLDS = 5
TAPERS = (0.125, 0.25, 0.5)  # reaches that are tried, shares of the longest side


class Shrunk(NamedTuple):
  """What `shrink` returns.

  mean: [*space]; covariance: [1, n, n]; weight: w, in [0, 1]; structure: "stationary",
  "homogeneous", or "tapered to … points".
  """

  mean: np.ndarray
  covariance: np.ndarray
  weight: float
  structure: str


def shrink(
  parts: list[moments.Moments],
  group,
  frame: moments.Frame,
  towards: str,
  channels: int = 1,
) -> Shrunk:
  """The covariance that moments of several folds of rows say, with the weight that is best out of
  fold.

  Args:
    parts: of each fold; folds are best of trajectories, or of consecutive rows. group, frame: see
      Moments.averaged.
    towards: one of STRUCTURES.
    channels: if more than one, the first axis of the frame's grid is that of the channels. The
      covariance of each pair of channels gets the structure.
  Raises: ValueError for another.
  """
  whole = moments.total(parts)
  mean, covariance = whole.averaged(group, frame)
  folds = []
  for k, part in enumerate(parts):
    _, inside = moments.total(parts[:k] + parts[k + 1 :]).averaged(group, frame)
    _, outside = part.averaged(group, frame)
    folds.append((inside[0], outside[0]))
  space = frame.space if channels == 1 else frame.space[1:]
  candidates = _structures(towards, space)
  best = None
  for name, structure in candidates.items():
    goal = structure(covariance[0])
    weight, error = _weight(folds, structure, goal)
    if best is None or error < best[0]:
      best = (
        error,
        Shrunk(
          mean, ((1 - weight) * covariance[0] + weight * goal)[None], weight, name
        ),
      )
  assert best is not None  # there is always a structure
  return best[1]


def _weight(folds, structure, goal: np.ndarray) -> tuple[float, float]:
  """The w of least Σ |W ((1 − w) C + w T(C) − C′) W|², W = goal^−½, C′ of the rows outside; and
  that sum.
  """
  white = moments.root(goal[None], inverse=True)[0]
  along, length, apart = 0.0, 0.0, 0.0
  for inside, outside in folds:
    towards = white @ (structure(inside) - inside) @ white
    gap = white @ (outside - inside) @ white
    along += float((towards * gap).sum())
    length += float((towards**2).sum())
    apart += float((gap**2).sum())
  weight = min(max(along / length, 0.0), 1.0) if length > 0 else 0.0
  return weight, apart - 2 * weight * along + weight**2 * length


def stationary(covariance: np.ndarray, space: tuple[int, ...]) -> np.ndarray:
  """The same standard deviations [n], with correlations averaged over all shifts of the periodic
  grid; [n, n], PSD. n: points, or channels times points.
  """
  correlation, std = _correlation(covariance)
  return _over_shifts(correlation, space) * std[:, None] * std


def _over_shifts(matrix: np.ndarray, space: tuple[int, ...]) -> np.ndarray:
  """The mean over all shifts of the periodic grid, by the diagonal of its Fourier transform, [n,
  n]. Shifts move all channels alike.
  """
  n = math.prod(space)
  if len(matrix) > n:
    pairs = matrix.reshape(len(matrix) // n, n, -1, n).swapaxes(1, 2)
    return np.block(
      [[_over_shifts_of_pair(pair, space) for pair in row] for row in pairs]
    )
  return _over_shifts_of_pair(matrix, space)


def _over_shifts_of_pair(matrix: np.ndarray, space: tuple[int, ...]) -> np.ndarray:
  """`_over_shifts` of the covariance of one channel, or between two, [n, n]."""
  axes = tuple(range(len(space)))
  n = math.prod(space)
  rows = np.fft.fftn(matrix.reshape(*space, n), axes=axes).reshape(n, n)
  both = np.fft.ifftn(
    rows.reshape(n, *space),
    axes=tuple(a + 1 for a in axes),
  ).reshape(n, n)
  waves = np.diagonal(both)
  if (matrix == matrix.T).all():
    waves = waves.real  # of a symmetric matrix they are, but for rounding
  average = np.fft.ifftn(waves.reshape(space)).real  # of a shift, [*space]
  place = np.indices(space).reshape(len(space), n)
  apart = [
    (p[:, None] - p[None, :]) % size for p, size in zip(place, space, strict=True)
  ]
  return average[tuple(apart)]


def tapered(
  covariance: np.ndarray,
  space: tuple[int, ...],
  reach: float,
) -> np.ndarray:
  """The covariance times Gaspari and Cohn's function of the distance in points, 0 from `reach` on;
  [n, n], PSD.
  """
  place = np.indices(space).reshape(len(space), -1)
  apart = np.sqrt(sum((p[:, None] - p[None, :]) ** 2.0 for p in place))
  taper = gaspari_cohn(2 * apart / reach)
  channels = len(covariance) // len(taper)
  return covariance * np.tile(taper, (channels, channels))


def gaspari_cohn(r: np.ndarray) -> np.ndarray:
  """Their fifth-order function of a distance in units of its half reach: 1 at 0, 0 from 2 on (1999,
  eq. 4.10).
  """
  near = 1 - 5 / 3 * r**2 + 5 / 8 * r**3 + r**4 / 2 - r**5 / 4
  safe = np.maximum(r, 1.0)
  far = 4 - 5 * r + 5 / 3 * r**2 + 5 / 8 * r**3 - r**4 / 2 + r**5 / 12 - 2 / (3 * safe)
  return np.where(r <= 1, near, np.where(r < 2, far, 0.0))


def _structures(towards: str, space: tuple[int, ...]) -> dict:
  """Those that are tried, by name: [n, n] -> [n, n]."""
  if towards not in STRUCTURES:
    raise ValueError(
      f"towards={towards!r} is unknown; use one of {STRUCTURES}, or None for no shrinkage."
    )
  if towards == "stationary":
    return {
      "homogeneous": lambda c: _over_shifts(c, space),
      towards: lambda c: stationary(c, space),
    }
  reaches = [max(2.0, share * max(space)) for share in TAPERS]
  return {
    f"tapered to {r:g} points": functools.partial(tapered, space=space, reach=r)
    for r in reaches
  }


def _correlation(covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  std = np.sqrt(np.maximum(np.diagonal(covariance), 0.0))
  unit = np.where(
    std > 0,
    1 / np.where(std > 0, std, 1.0),
    0.0,
  )
  return covariance * unit[:, None] * unit, std
