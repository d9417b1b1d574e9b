"""Is an ensemble right about its own uncertainty? Members [K, M, *space] against the truth [K,
*space] they aim at.

A perfect ensemble's truth is one more draw of the same law as its members. Then, for finite M,

    E|mean − truth|² = (1 + 1/M) σ²,   hence   √((M + 1)/M) · spread / RMSE(mean) → 1,

all ranks of the truth among the members are equally likely, and a central interval holds it as
often as it says.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from downscaling.metrics import distances
from downscaling.metrics.ensembles import Ensemble

PINNED = 0.01  # of the typical spread; points with less are fixed by the constraint
TILE = (
  512  # members along either edge of a tile of pairs; 2 MB, near what a cache holds
)


class Calibration(NamedTuple):
  """Scores of one ensemble; errors, spread, CRPS and energy score are divided by `rms`.

  rms: root mean square of the truth about its overall mean, units of the field.
  member_rmse, mean_rmse: of single members, of the ensemble mean.
  spread: √(mean variance of the members), divided by M − 1.
  spread_error: √((M + 1)/M) spread/mean_rmse; 1 is right, above 1 over-dispersed.
  crps: fair, mean|x − t| − Σ_i,j |x_i − x_j| / (2 M (M − 1)), a point at a time.
  energy: the same of whole fields, |·| being the root mean square over points: it sees how points
    go together.
  ranks: [M + 1] share of truths with so many members below them; ties are shared evenly.
  coverage: {level: share of truths inside the central interval}; ideal: the same for a perfect
    ensemble of M.
  pinned: share of points left out of ranks and coverage, since C′x = y′ fixes them.
  """

  conditions: int
  members: int
  rms: float
  member_rmse: float
  mean_rmse: float
  spread: float
  spread_error: float
  crps: float
  energy: float
  ranks: np.ndarray
  coverage: dict[str, float]
  ideal: dict[str, float]
  pinned: float

  def as_json(self) -> dict:
    """Plain lists and numbers."""
    return {**self._asdict(), "ranks": self.ranks.tolist()}


def calibrate(
  ensemble: distances.Members, truth: np.ndarray, levels: tuple[float, ...] = (0.5, 0.9)
) -> Calibration:
  """Scores ensemble [K, M, *space] against truth [K, *space], a block of conditions at a time.

  Raises ValueError for NaN (naming the array), shapes that do not belong together, or fewer than
  two members.
  """
  found, truth = distances.members(ensemble, "the ensemble"), np.asarray(truth)
  distances.rows(truth, "the truth", least=1)
  if truth.shape != (len(found), *found.shape[2:]):
    raise ValueError(
      f"the truth is {truth.shape} and the ensemble {found.shape}: need truth [K, *space] for "
      "[K, M, *space]."
    )
  k, m = found.shape[:2]
  if m < 2:
    raise ValueError(
      "the ensemble has 1 member: spread needs two. Draw more with --config.sampling.members=8."
    )
  truth = truth.reshape(k, -1)
  free, spread = _free_points(found)
  rms = _rms(truth)
  squares = np.zeros(2)
  crps, energy, ranks, inside = 0.0, 0.0, np.zeros(m + 1), np.zeros(len(levels))
  for place, block in _flat_blocks(found):
    true = truth[place].astype(np.float64)
    energy += _fair_energy(block, true)
    block = np.sort(block, axis=1)
    squares += (
      ((block - true[:, None]) ** 2).sum() / m,
      ((block.mean(axis=1) - true) ** 2).sum(),
    )
    crps += _fair_crps(block, true)
    ranks += _ranks(block[..., free], true[:, free])
    inside += [
      _inside(
        block[..., free],
        true[:, free],
        level,
      )
      for level in levels
    ]
  member_rmse, mean_rmse = np.sqrt(squares / truth.size) / rms
  held = k * int(free.sum())
  return Calibration(
    k, m, rms, float(member_rmse), float(mean_rmse), spread / rms,
    math.sqrt((m + 1) / m) * spread / rms / max(float(mean_rmse), 1e-30),
    crps / truth.size / rms, energy / k / rms, ranks / ranks.sum(),
    {f"{level:g}": float(n) / held for level, n in zip(levels, inside, strict=True)},
    {f"{level:g}": min(level, (m - 1) / (m + 1)) for level in levels},
    1 - float(free.mean()),
  )  # fmt: skip


class Reference(NamedTuple):
  """What a forecast must beat; over the rms of the truth, as in Calibration.

  The error is that of a single field.
  """

  error: float
  crps: float
  energy: float


def climatology(fields: np.ndarray, truth: np.ndarray) -> Reference:
  """The scores of an ensemble that knows the law and no condition: fields [R, *space], R ≥ 2, for
  every truth.
  """
  r, k = len(fields), len(truth)
  if r < 2:
    raise ValueError(f"{r} held-out field as climatology: need 2 or more.")
  fields = np.reshape(fields, (1, r, -1)).astype(np.float64)
  truth = np.reshape(truth, (k, -1)).astype(np.float64)
  ordered, sums = np.sort(fields, axis=1), np.zeros(3)
  # Pairs of members are the same for every truth: what the fair scores take off, from a truth that
  # is a member.
  pairs = np.array([_pairs(ordered).mean(), _field_pairs(fields)[0]])
  for true in truth:
    apart = fields[0] - true
    sums += (
      (apart**2).mean(),
      np.abs(apart).mean(),
      np.sqrt((apart**2).mean(axis=1)).mean(),
    )
  error, crps, energy = sums / k
  rms = _rms(truth)
  return Reference(
    math.sqrt(error) / rms, float(crps - pairs[0]) / rms, float(energy - pairs[1]) / rms
  )


def single(fields: np.ndarray, truth: np.ndarray) -> Reference:
  """The scores of one field a condition, e.g. an interpolation: [K, *space] both.

  CRPS is its mean absolute error.
  """
  if np.shape(fields) != np.shape(truth):
    raise ValueError(
      f"{np.shape(fields)} fields for a truth of {np.shape(truth)}: need one field a condition."
    )
  apart = np.reshape(fields, (len(truth), -1)).astype(np.float64) - np.reshape(
    truth, (len(truth), -1)
  )
  rms, squares = _rms(np.asarray(truth)), (apart**2).mean(axis=1)
  return Reference(
    math.sqrt(squares.mean()) / rms,
    float(np.abs(apart).mean()) / rms,
    float(np.sqrt(squares).mean()) / rms,
  )


def by_condition(
  ensemble: distances.Members, truth: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """(spread [K], error of the mean [K]) of every condition over the rms of the truth; a right
  ensemble has both alike.

  The spread carries the factor √((M + 1)/M). ensemble [K, M, *space], M ≥ 2; truth [K, *space].
  """
  k, m = ensemble.shape[:2]
  truth = np.reshape(truth, (k, -1))
  spread, error = [], []
  for place, block in _flat_blocks(distances.members(ensemble, "the ensemble")):
    variance = block.var(axis=1, ddof=1).mean(axis=1)
    spread.append(np.sqrt((m + 1) / m * variance))
    apart = block.mean(axis=1) - truth[place]
    error.append(np.sqrt((apart**2).mean(axis=1)))
  rms = _rms(truth)
  return np.concatenate(spread) / rms, np.concatenate(error) / rms


def _rms(truth: np.ndarray) -> float:
  rms = float(truth.std(dtype=np.float64))
  if rms == 0:
    raise ValueError(
      "the truth is one constant: errors relative to it have no meaning."
    )
  return rms


def _flat_blocks(ensemble: Ensemble) -> Iterator[tuple[slice, np.ndarray]]:
  """(which conditions, members [k, M, D] in float64) block by block."""
  for place, block in distances.finite_blocks(ensemble, "the ensemble"):
    yield place, block.reshape(*block.shape[:2], -1)


def _free_points(ensemble: Ensemble) -> tuple[np.ndarray, float]:
  """(mask [D] of points the constraint leaves free, overall spread)."""
  variance = np.zeros(math.prod(ensemble.shape[2:]))
  for _, block in _flat_blocks(ensemble):
    variance += block.var(axis=1, ddof=1).sum(axis=0)
  variance /= len(ensemble)
  typical = float(variance.mean())
  free = variance > PINNED**2 * typical
  return (free if free.any() else np.ones_like(free)), math.sqrt(typical)


def _fair_crps(ordered: np.ndarray, truth: np.ndarray) -> float:
  """Sum over conditions and points, for ordered members [B, M, D]."""
  return float((np.abs(ordered - truth[:, None]).mean(axis=1) - _pairs(ordered)).sum())


def _pairs(ordered: np.ndarray) -> np.ndarray:
  """Σ_i,j |x_i − x_j| / (2 M (M − 1)), [B, D]; the sum is 2 Σ_i (2i − M − 1) x_(i) for ordered
  members [B, M, D].
  """
  m = ordered.shape[1]
  return np.einsum(
    "m,bmd->bd",
    2.0 * np.arange(1, m + 1) - m - 1,
    ordered,
  ) / (m * (m - 1))


def _fair_energy(members: np.ndarray, truth: np.ndarray) -> float:
  """Sum over conditions of mean‖x − t‖ − Σ_i,j ‖x_i − x_j‖ / (2 M (M − 1)), ‖·‖ a root mean square;
  [B, M, D].
  """
  return float(
    (
      np.sqrt(((members - truth[:, None]) ** 2).mean(axis=2)).mean(axis=1)
      - _field_pairs(members)
    ).sum()
  )


def _field_pairs(members: np.ndarray) -> np.ndarray:
  """Σ_i,j ‖x_i − x_j‖ / (2 M (M − 1)), [B], by scalar products about the ensemble mean: no M²
  fields are made, and distances only for a tile of pairs at a time.
  """
  m = members.shape[1]
  return np.array([_distances(each) for each in members]) / (m * (m - 1))


def _distances(members: np.ndarray) -> float:
  """Σ_i<j ‖x_i − x_j‖ over members [M, D]."""
  centred = members - members.mean(axis=0)
  squares = (centred**2).mean(axis=1)
  tiles = [slice(first, first + TILE) for first in range(0, len(members), TILE)]
  total = 0.0
  for number, rows in enumerate(tiles):
    for columns in tiles[number:]:
      apart = centred[rows] @ centred[columns].T
      apart *= -2 / members.shape[1]
      apart += squares[rows, None]
      apart += squares[columns]
      np.sqrt(np.maximum(apart, 0, out=apart), out=apart)
      if rows == columns:  # every pair is there twice, and every member with itself
        np.fill_diagonal(apart, 0)
        apart /= 2
      total += apart.sum()
  return float(total)


def _ranks(ordered: np.ndarray, truth: np.ndarray) -> np.ndarray:
  """Counts [M + 1] of members below the truth; equal ones share the count among the ranks they
  leave possible.
  """
  m = ordered.shape[1]
  below = (ordered < truth[:, None]).sum(axis=1)
  ties = (ordered == truth[:, None]).sum(axis=1)
  counts = np.bincount(below[ties == 0], minlength=m + 1).astype(float)
  for low, tied in zip(
    below[ties > 0],
    ties[ties > 0],
    strict=True,
  ):
    counts[low : low + tied + 1] += 1 / (tied + 1)
  return counts


def _inside(ordered: np.ndarray, truth: np.ndarray, level: float) -> float:
  """How many truths lie in the central interval: members interpolated at positions p (M + 1), held
  to the extremes.

  With those positions a perfect ensemble of M members covers `level`, or (M − 1)/(M + 1) if that is
  less: exactly at members, to .03 between them (M = 5, Gaussian).
  """
  low, high = (_quantile(ordered, p) for p in (0.5 - level / 2, 0.5 + level / 2))
  return float(((low <= truth) & (truth <= high)).sum())


def _quantile(ordered: np.ndarray, p: float) -> np.ndarray:
  m = ordered.shape[1]
  place = min(max(p * (m + 1) - 1, 0.0), m - 1.0)
  i = min(int(place), m - 2)
  return ordered[:, i] + (place - i) * (ordered[:, i + 1] - ordered[:, i])
