"""What equivariant maps are fitted on: sums over rows, and the closed forms that follow from them.

Every statistic is an array of sums over rows (only the range of a histogram is an extreme), so
blocks of rows, or hosts, add. Rows are [S, *space] float64, one channel; n = Πspace. Symmetry
enters once, after the sums: a law that the group leaves alone has the group average of its moments,
and pools the points of an orbit.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import numpy as np

from downscaling.fields import symmetry
from downscaling.fields.quadratic import Quadratic

# of the largest variance of a mode: below it float32 rounding is seen, and the mode is left out
CUT = 1e-10
RIDGE = 0.05
BINS, MOST = 2**16, 2**21  # of one histogram; of all histograms together


# ----------------------------------- second moments, in blocks where there are shifts


@dataclasses.dataclass(frozen=True, eq=False)
class Frame:
  """Coordinates in which a covariance that the group leaves alone falls into K blocks of m × m.

  If the group has all shifts along the last axis, the waves of that axis do not correlate: K = N//2
  + 1 Hermitian blocks (1-D: K variances). Otherwise one block of n × n. `others` are the group's
  elements up to those shifts: (source of each of the m rows, +1 or −1: the way the last axis runs).
  """

  space: tuple[int, ...]
  blocks: int
  others: tuple[tuple[np.ndarray, int], ...]

  @classmethod
  def of(cls, group: symmetry.Group, space: tuple[int, ...]) -> "Frame":
    """Raises ValueError if the group acts on another number of points."""
    points, last = math.prod(space), space[-1]
    if group.index.shape[1] != points:
      raise ValueError(
        f"the group moves {group.index.shape[1]} points, the rows have {points} {list(space)}: "
        f"build it for this grid, e.g. ks.group({last}), kolmogorov.group({last}), or "
        f"symmetry.trivial({points}) if there is none."
      )
    table = group.index.reshape(len(group), -1, last)
    row, column = table // last, table % last
    way = np.where(
      (column[:, :1, 1 % last] - column[:, :1, 0]) % last == 1,
      1,
      -1,
    )[..., None]
    plain = (row == row[..., :1]).all() and (
      column == (column[:, :1, :1] + way * np.arange(last)) % last
    ).all()
    still = (
      (row[..., 0] == np.arange(row.shape[1])).all(axis=1)
      & (way.ravel() == 1)
      & (group.sign > 0)
    )
    if not plain or last < 2 or len(set(column[still, 0, 0])) < last:
      return cls(space, 1, tuple((index, 1) for index in group.index))
    found = {
      (rows.tobytes(), int(w)): (rows, int(w))
      for rows, w in zip(row[..., 0], way.ravel(), strict=True)
    }
    return cls(space, last // 2 + 1, tuple(found.values()))

  def split(self, y: np.ndarray) -> np.ndarray:
    """y [S, *space] -> [K, m, S]: orthonormal waves of the last axis, complex; or y itself, real, K
    = 1.
    """
    return split(y, self.blocks)

  def average(self, blocks: np.ndarray) -> np.ndarray:
    """Mean over the group of g C gᵀ; blocks [K, m, m].

    Signs cancel in pairs; running backwards conjugates waves.
    """
    total = np.zeros_like(blocks)
    for rows, way in self.others:
      moved = blocks[:, rows[:, None], rows[None, :]]
      total += moved if way > 0 else moved.conj()
    return total / len(self.others)


def split(y: np.ndarray, blocks: int) -> np.ndarray:
  if blocks == 1:
    return y.reshape(1, len(y), -1).transpose(0, 2, 1)
  waves = np.fft.rfft(y, axis=-1, norm="ortho")
  return waves.reshape(len(y), -1, blocks).transpose(2, 1, 0)


def merge(z: np.ndarray, space: tuple[int, ...]) -> np.ndarray:
  """The inverse of `split`: [K, m, S] -> [S, *space]."""
  if len(z) == 1:
    return z.transpose(0, 2, 1).reshape(-1, *space)
  return np.fft.irfft(
    z.transpose(2, 1, 0),
    n=space[-1],
    axis=-1,
    norm="ortho",
  ).reshape(-1, *space)


def added(one, other):
  """The `+` of sums over rows: field by field."""
  return type(one)(*(a + b for a, b in zip(one, other, strict=True)))


class Moments(NamedTuple):
  """Sums over rows; `+` adds those of other rows, and a psum those of other hosts.

  count: []. total: Σ y, [*space]. square: Σ z zᴴ in the frame's coordinates z, [K, m, m].
  """

  count: np.ndarray
  total: np.ndarray
  square: np.ndarray

  __add__ = added

  @classmethod
  def of(cls, y: np.ndarray, frame: Frame) -> "Moments":
    z = frame.split(y)
    return cls(
      np.asarray(float(len(y))), y.sum(axis=0), z @ z.conj().transpose(0, 2, 1)
    )

  def averaged(
    self, group: symmetry.Group, frame: Frame
  ) -> tuple[np.ndarray, np.ndarray]:
    """Mean [*space] and covariance [K, m, m] of the law that the group leaves alone; the sum is
    divided by count.
    """
    mean = self.total.ravel() / self.count
    mean = (group.sign[:, None] * mean[group.index]).mean(axis=0).reshape(frame.space)
    z = frame.split(mean[None])
    return mean, frame.average(self.square / self.count) - z @ z.conj().transpose(
      0, 2, 1
    )


def total(parts: list[Moments]) -> Moments:
  """Of all parts together; one at least."""
  return functools.reduce(added, parts)


def root(
  a: np.ndarray,
  *,
  inverse: bool = False,
  cut: float = CUT,
) -> np.ndarray:
  """A^½, or the pseudo-inverse A^−½, of symmetric or Hermitian PSD blocks [K, m, m].

  Modes whose eigenvalue is below `cut` of the largest of all blocks count as empty in the inverse.
  """
  values, vectors = np.linalg.eigh(a)
  values = np.maximum(values, 0.0)
  if inverse:
    held = values > cut * values.max()
    values = np.where(
      held,
      1 / np.sqrt(np.where(held, values, 1.0)),
      0.0,
    )
  else:
    values = np.sqrt(values)
  return (vectors * values[:, None]) @ vectors.conj().transpose(0, 2, 1)


def optimal(
  a: np.ndarray,
  b: np.ndarray,
  cut: float = CUT,
) -> np.ndarray:
  """A^−½ (A^½ B A^½)^½ A^−½, the optimal linear map of N(0, A) onto N(0, B), [K, m, m]; PSD.

  Modes that A leaves empty (see `root`) are mapped to 0: nothing linear can fill them.
  """
  half, back = root(a), root(a, inverse=True, cut=cut)
  middle = half @ b @ half
  out = back @ root((middle + middle.conj().transpose(0, 2, 1)) / 2) @ back
  return (out + out.conj().transpose(0, 2, 1)) / 2


# ----------------------------------- quadratic terms and the energy they transfer


def shells(space: tuple[int, ...]) -> np.ndarray:
  """Shell of every mode of rfftn, [*half space] int: ⌊|k| + ½⌋ with k in waves a box; corners have
  their own.
  """
  first = np.meshgrid(
    *(np.fft.fftfreq(n, 1 / n) for n in space[:-1]),
    np.arange(space[-1] // 2 + 1.0),
    indexing="ij",
  )
  return np.floor(np.sqrt(sum(k**2 for k in first)) + 0.5).astype(int)


def waves(y: np.ndarray) -> np.ndarray:
  """rfftn over space of [S, *space], norm "ortho"."""
  return np.fft.rfftn(
    y,
    axes=tuple(range(1, y.ndim)),
    norm="ortho",
  )


def fields(z: np.ndarray, space: tuple[int, ...]) -> np.ndarray:
  """The inverse of `waves`."""
  return np.fft.irfftn(
    z,
    s=space,
    axes=tuple(range(1, z.ndim)),
    norm="ortho",
  )


def multiplicity(space: tuple[int, ...]) -> np.ndarray:
  """How many modes each mode of rfftn stands for: 2, but 1 at 0 and Nyquist of the last axis; [N//2
  + 1].
  """
  k = np.arange(space[-1] // 2 + 1)
  return np.where(
    (k == 0) | (2 * k == space[-1]),
    1.0,
    2.0,
  )


class Transfer(NamedTuple):
  """Sums over rows and over each shell, [K]: transfer Re ŷ*N̂, and power |N̂|² of the quadratic
  term; count [].
  """

  count: np.ndarray
  transfer: np.ndarray
  power: np.ndarray

  __add__ = added

  @classmethod
  def of(cls, y: np.ndarray, quadratic: Quadratic) -> "Transfer":
    z, term = waves(y), waves(quadratic(y))
    weight, shell = multiplicity(y.shape[1:]), shells(y.shape[1:]).ravel()
    sums = (
      weight * part.sum(axis=0)
      for part in (np.real(z.conj() * term), np.abs(term) ** 2)
    )
    return cls(
      np.asarray(float(len(y))), *(np.bincount(shell, s.ravel()) for s in sums)
    )


def response(y: np.ndarray, quadratic: Quadratic) -> np.ndarray:
  """d transfer_k / dτ_l at τ = 0 of y + Σ_l τ_l P_l N(y), mean over rows, [K, K].

  N(y) = B(y, y) gives Re E[N̂_k* (P_l N)ˆ_k + ŷ_k* (2B(y, P_l N))ˆ_k], and 2B(y, d) = N(y + d) −
  N(y) − N(d).
  """
  space, term = y.shape[1:], quadratic(y)
  z, waves_of_term, shell, weight = (
    waves(y),
    waves(term),
    shells(space),
    multiplicity(space),
  )
  out = np.diag(
    np.bincount(
      shell.ravel(), (weight * (np.abs(waves_of_term) ** 2).mean(axis=0)).ravel()
    )
  )
  for part in range(len(out)):
    d = fields(waves_of_term * (shell == part), space)
    change = waves(quadratic(y + d) - term - quadratic(d))
    out[:, part] += np.bincount(
      shell.ravel(), (weight * np.real(z.conj() * change).mean(axis=0)).ravel()
    )
  return out


def newton(
  gap: np.ndarray,
  matrix: np.ndarray,
  power: np.ndarray,
) -> np.ndarray:
  """τ [K] with matrix τ ≈ gap, in units where every shell has power 1; shells without power are
  left out.

  Directions weaker than RIDGE of the strongest are damped: N conserves energy, so that one
  direction hardly moves any.
  """
  unit = np.where(
    power > CUT * power.max(), 1 / np.sqrt(np.where(power > 0, power, 1.0)), 0.0
  )
  matrix, gap = matrix * unit[:, None] * unit, gap * unit
  ridge = (RIDGE * np.linalg.norm(matrix, 2)) ** 2
  return (
    np.linalg.solve(
      matrix.T @ matrix + ridge * np.eye(len(gap)),
      matrix.T @ gap,
    )
    * unit
  )


# ----------------------------------- one-point laws, pooled over orbits


class Pool(NamedTuple):
  """Orbits of the points: y_i has the law of sign_i · y_j for all j of one orbit; orbit [n], sign
  [n], odd [O].

  odd: the group also takes a point onto itself with the sign flipped, so the orbit's law is
    symmetric.
  """

  orbit: np.ndarray
  sign: np.ndarray
  odd: np.ndarray

  @classmethod
  def of(cls, group: symmetry.Group, character: np.ndarray | None = None) -> "Pool":
    """character: further signs [G], of a filter h with h∗(g·y) = character[g] g·(h∗y)."""
    signs = group.sign if character is None else group.sign * character
    orbit, sign, odd = (
      np.full(group.index.shape[1], -1),
      np.ones(group.index.shape[1]),
      [],
    )
    for i in range(len(orbit)):
      if orbit[i] < 0:
        orbit[group.index[:, i]], sign[group.index[:, i]] = len(odd), signs
        odd.append((sign[group.index[:, i]] != signs).any())
    return cls(orbit, sign, np.array(odd))

  def values(self, y: np.ndarray) -> np.ndarray:
    """y [S, *space] -> [S, n], signed as the orbit's representative."""
    return y.reshape(len(y), -1) * self.sign

  def range(self, v: np.ndarray) -> np.ndarray:
    """Lowest and highest of each orbit, [2, O]; those of other rows join by minimum and maximum."""
    low, high = np.full(len(self.odd), np.inf), np.full(len(self.odd), -np.inf)
    np.minimum.at(low, self.orbit, v.min(axis=0))
    np.maximum.at(high, self.orbit, v.max(axis=0))
    most = np.maximum(-low, high)
    return np.stack(
      [
        np.where(self.odd, -most, low),
        np.where(self.odd, most, high),
      ]
    )

  @property
  def bins(self) -> int:
    return max(2**10, min(BINS, MOST // len(self.odd)))

  def counts(self, v: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """Histogram [O, bins] of v [S, n] over reach [2, O]: sums, also over hosts; odd orbits are made
    symmetric.
    """
    low, width = reach[0], reach[1] - reach[0]
    per = np.where(
      width > 0,
      self.bins / np.where(width > 0, width, 1.0),
      0.0,
    )
    cell = ((v - low[self.orbit]) * per[self.orbit]).astype(np.int64)
    np.clip(cell, 0, self.bins - 1, out=cell)
    cell += self.orbit * self.bins
    out = np.bincount(
      cell.ravel(),
      minlength=len(self.odd) * self.bins,
    ).reshape(-1, self.bins)
    return np.where(
      self.odd[:, None],
      out + out[:, ::-1],
      out,
    )


def quantiles(
  counts: np.ndarray,
  reach: np.ndarray,
  levels: np.ndarray,
) -> np.ndarray:
  """Quantiles [O, T] of histograms [O, bins], linear within a bin; reach [2, O], levels [T] in (0,
  1).
  """
  bins = counts.shape[1]
  place = [
    np.interp(
      levels * c.sum(), np.concatenate([[0], np.cumsum(c)]), np.arange(bins + 1.0)
    )
    for c in counts
  ]
  return reach[0][:, None] + (reach[1] - reach[0])[:, None] * np.stack(place) / bins


# ---------------------------------------------------------------- random filters


def filters(
  group: symmetry.Group, space: tuple[int, ...]
) -> list[tuple[np.ndarray, np.ndarray]]:
  """Angular factors a(k) of filters that commute with the group up to a sign: [(a [*half space],
  character [G])].

  Products over the axes of 1 (even) and i·sgn k (odd, adjoint −a), tried on a random field; the
  first is 1.
  """
  y = np.random.default_rng(0).normal(size=(1, *space))
  moved = (group.sign[:, None] * y.ravel()[group.index]).reshape(-1, *space)
  out = []
  for parity in np.ndindex(*(2,) * len(space)):
    factor = np.ones(1, complex)
    for axis, (odd, n) in enumerate(zip(parity, space, strict=True)):
      k = (
        np.arange(n // 2 + 1.0) if axis == len(space) - 1 else np.fft.fftfreq(n, 1 / n)
      )
      one = (
        1j * np.sign(np.where(2 * np.abs(k) == n, 0, k))
        if odd
        else np.ones(len(k), complex)
      )
      factor = factor[..., None] * one if axis else one
    after = fields(waves(moved) * factor, space).reshape(len(group), -1)
    before = group.sign[:, None] * fields(waves(y) * factor, space).ravel()[group.index]
    character = np.sign((after * before).sum(axis=1))
    if np.abs(after - character[:, None] * before).max() < 1e-9:
      out.append((factor, character))
  return out


def draw(
  key: jax.Array,
  kinds: int,
  shells: int,
) -> tuple[int, np.ndarray]:
  """One random filter: which of `kinds` angular factors, and +1 or −1 for every shell, [shells]."""
  which, sign = jax.random.split(key)
  return int(jax.random.randint(which, (), 0, kinds)), np.asarray(
    jax.random.rademacher(sign, (shells,)), np.float64
  )
