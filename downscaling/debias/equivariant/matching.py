"""Statistics of any order matched by the least displacement: what is left of a law after its
covariance is right.

Let φ(y) [T] be statistics that the group leaves alone: energies, triads (third order), spectra of
squares and fourth powers of slopes (fourth). Of all small displacements that move their means by a
given gap, the one of least E|δ|² is

    δ = Σ_t λ_t ∇φ_t(y),   E[∇φ_s · ∇φ_t] λ = gap,

a Newton step on E φ. As φ is invariant, the step commutes with the group. Moving along gradients of
statistics is how microcanonical models draw samples (Bruna & Mallat 2019, arXiv:1801.02013); here
it moves fields that are nearly right, as little as their statistics ask. Near the target it
converges quadratically.

Rows are [S, *space] float64, one channel, and enter φ less their mean.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from downscaling.debias.equivariant import moments
from downscaling.fields import symmetry
from downscaling.fields.quadratic import Quadratic
from downscaling.runtime import mesh as meshes

MOST = 400  # statistics of one grid; triads of short waves beyond are left out
# In 2-D, waves up to it along either axis have a spectrum of squares of their own each.
LOW = 6
RIDGE = 1e-6  # of the largest eigenvalue of the Gram matrix in units of its diagonal
LARGEST = 0.2  # rms displacement of one step over the field's
# Of a statistic: more is no rounding, and the group does not leave it alone.
CLOSE = 1e-9
NUMBERS = 2**22  # in a block of gradients
ROWS = 1024  # mapped at a time; the last block is padded


def statistics(
  space: tuple[int, ...], quadratic: Quadratic | None
) -> Callable[[jax.Array], dict[str, jax.Array]]:
  """φ of one row y [*space], by name, each [its count].

  energy: |ŷ_k|² by wave (1-D) or shell. triads, 1-D: Re and Im ŷ_j ŷ_k ŷ*_{j+k}, 1 ≤ k ≤ j, j + k <
  N/2. transfer, with a quadratic term N: Re ŷ* N̂ by shell. squares: |(y²)ˆ_k|² by wave, in 2-D by
  |k_x| and |k_y| up to LOW, as large eddies are not isotropic, and by shell beyond; their sum is
  the mean of y⁴. pairs, 2-D: Re (y²)ˆ_k (y²)ˆ*_l of k_x = l_x and k_y > l_y, all up to LOW, with
  the same of the mirrored k_x: of these a forcing along y leaves some that are not 0. slopes: mean
  fourth power of the differences between neighbours.
  """
  shell = moments.shells(space).ravel()
  weight = np.broadcast_to(
    moments.multiplicity(space), moments.shells(space).shape
  ).ravel()
  bins = _squares(space)
  total = lambda values, place: jax.ops.segment_sum(
    values.ravel() * weight, place, place.max() + 1
  )
  by_shell = lambda values: total(values, shell)
  waves = lambda y: jnp.fft.rfftn(y) / math.prod(space)
  top = (space[0] - 1) // 2
  triads = sorted(
    ((j, k) for j in range(1, top) for k in range(1, j + 1) if j + k <= top), key=sum
  )
  above, below = np.tril_indices(2 * LOW + 1, -1)
  j, k = np.array(triads[: MOST // 2], int).reshape(-1, 2).T

  def of(y):
    z, square = waves(y), waves(y**2)
    found = {
      "energy": by_shell(jnp.abs(z) ** 2)[1:],
      "squares": total(jnp.abs(square) ** 2, bins),
    }
    if len(space) == 1:
      triad = z[j] * z[k] * jnp.conj(z[j + k])
      found |= {"triads": jnp.concatenate([triad.real, triad.imag])}
    if len(space) == 2:
      low = square[np.arange(-LOW, LOW + 1)][:, : LOW + 1]
      pair = lambda a: (a[above] * jnp.conj(a[below])).real
      found |= {"pairs": (pair(low) + pair(low[::-1])).ravel()}
    if quadratic is not None:
      term = waves(quadratic(y[None], jnp)[0])
      found |= {"transfer": by_shell((jnp.conj(z) * term).real)[1:]}
    slopes = [((jnp.roll(y, -1, axis) - y) ** 4).mean() for axis in range(len(space))]
    return found | {"slopes": functools.reduce(operator.add, slopes)[None]}

  return of


def _squares(space: tuple[int, ...]) -> np.ndarray:
  """Which value of `squares` every mode of rfftn counts in, [modes]: its shell, or one of (|k_x|,
  |k_y|) up to LOW.
  """
  shell = moments.shells(space)
  if len(space) == 2:
    ky, kx = (
      np.abs(np.fft.fftfreq(space[0], 1 / space[0])).astype(int)[:, None],
      np.arange(space[1] // 2 + 1)[None],
    )
    shell = np.where(
      (ky <= LOW) & (kx <= LOW), shell.max() + 1 + ky * (LOW + 1) + kx, shell
    )
  return np.unique(shell, return_inverse=True)[1].ravel()


@functools.cache
def _flat(
  space: tuple[int, ...], quadratic: Quadratic | None
) -> Callable[[jax.Array], jax.Array]:
  named = statistics(space, quadratic)
  return lambda y: jnp.concatenate(list(named(y).values()))


@functools.cache
def _values(space, quadratic) -> Callable:
  """(y [B, *space], weight [B]) -> Σ over rows of φ, [T].

  Like the next two in float64: called under meshes.float64.
  """
  return jax.jit(lambda y, weight: weight @ jax.vmap(_flat(space, quadratic))(y))


@functools.cache
def _gram(space, quadratic, kept: tuple[int, ...]) -> Callable:
  """(y, weight) -> Σ over rows of ∇φ_s · ∇φ_t of the kept statistics."""

  def gram(y, weight):
    some = lambda row: _flat(space, quadratic)(row)[jnp.array(kept)]
    jacobian = jax.vmap(jax.jacrev(some))(y).reshape(len(y), len(kept), -1)
    return jnp.einsum("b,bsi,bti->st", weight, jacobian, jacobian)

  return jax.jit(gram)


@functools.cache
def _displacement(space, quadratic) -> Callable:
  """(y [B, *space], λ [T]) -> Σ_t λ_t ∇φ_t(y), like y."""
  return jax.jit(
    lambda y, step: jax.vmap(jax.grad(lambda row: step @ _flat(space, quadratic)(row)))(
      y
    )
  )


def invariant(
  group: symmetry.Group, space: tuple[int, ...], quadratic: Quadratic | None
) -> np.ndarray:
  """Numbers, ascending, of the statistics that the group leaves alone and that are not 0, tried on
  a random field.
  """
  y = np.random.default_rng(0).normal(size=math.prod(space))
  moved = (group.sign[:, None] * y[group.index]).reshape(-1, *space)
  first, *others = (
    _sum(
      _values(space, quadratic),
      row[None],
      1,
    )
    for row in moved
  )
  apart = np.max(
    [np.abs(other - first) for other in others],
    axis=0,
    initial=0.0,
  )
  size = np.abs(first)
  return np.flatnonzero(
    (apart <= CLOSE * (size + size.mean())) & (size > CLOSE * size.mean())
  )


def _sum(program: Callable, rows: np.ndarray, size: int = ROWS) -> np.ndarray:
  """Σ over rows [S, *space] of a program of (block, weight), in blocks of one shape."""
  total = np.zeros(())
  for block, there in _padded(rows, size):
    with meshes.float64():
      total = total + np.asarray(program(jnp.asarray(block), jnp.asarray(there)))
  return total


def _padded(rows: np.ndarray, size: int):
  """(block [size, *space], 1 where a row is there [size])."""
  for first in range(0, len(rows), size):
    block = rows[first : first + size]
    there = (np.arange(size) < len(block)).astype(np.float64)
    yield (
      np.concatenate(
        [
          block,
          np.zeros((size - len(block), *rows.shape[1:])),
        ]
      ),
      there,
    )


class Sums(NamedTuple):
  """Sums over rows; `+` adds those of other rows. count: []; values: Σ φ, [T]; power: Σ|y|², []."""

  count: np.ndarray
  values: np.ndarray
  power: np.ndarray

  __add__ = moments.added

  @classmethod
  def of(cls, y: np.ndarray, quadratic: Quadratic | None) -> "Sums":
    """y: [S, *space], less the mean."""
    values = _sum(_values(y.shape[1:], quadratic), y)
    return cls(
      np.asarray(float(len(y))),
      values,
      np.asarray((y**2).sum()),
    )


def gram(
  y: np.ndarray,
  quadratic: Quadratic | None,
  kept: np.ndarray,
) -> np.ndarray:
  """Σ over rows of ∇φ_s · ∇φ_t of the kept statistics, [len(kept)]²; y [S, *space] is centred."""
  rows = max(
    1,
    min(
      ROWS,
      NUMBERS // (len(kept) * math.prod(y.shape[1:])),
    ),
  )
  return _sum(
    _gram(y.shape[1:], quadratic, tuple(map(int, kept))),
    y,
    rows,
  )


@dataclasses.dataclass(frozen=True, eq=False)
class Matching:
  """y + Σ_t λ_t ∇φ_t(y − mean). A row moves by at most `most` of its own size: cubic gradients run
  away far outside.

  coefficients: λ, 0 where the group does not leave φ_t alone, [T]; mean: [*space]; quadratic: see
    `statistics`.
  """

  kind: ClassVar[str] = "matching"
  coefficients: np.ndarray
  mean: np.ndarray
  most: float
  quadratic: Quadratic | None

  def __call__(self, y: np.ndarray) -> np.ndarray:
    moved, size = self._moved(y)
    share = np.linalg.norm(moved, axis=1) / size
    moved *= np.minimum(
      1.0,
      self.most / np.maximum(share, np.finfo(float).tiny),
    )[:, None]
    return y + moved.reshape(y.shape)

  def shares(self, y: np.ndarray) -> np.ndarray:
    """|displacement| / |y − mean| of each row before it is limited, [S]."""
    moved, size = self._moved(y)
    return np.linalg.norm(moved, axis=1) / size

  def outside(self, y: np.ndarray) -> np.ndarray:
    return self.shares(y) > self.most

  def _moved(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Displacements [S, n] and |y − mean| > 0 [S]."""
    rows, program = y - self.mean, _displacement(y.shape[1:], self.quadratic)
    moved = np.empty((len(y), math.prod(y.shape[1:])))
    for k, (block, there) in enumerate(_padded(rows, ROWS)):
      with meshes.float64():
        part = np.asarray(program(jnp.asarray(block), jnp.asarray(self.coefficients)))
      moved[k * ROWS : (k + 1) * ROWS] = part.reshape(len(part), -1)[: int(there.sum())]
    return moved, np.maximum(
      np.linalg.norm(rows.reshape(len(y), -1), axis=1), np.finfo(float).tiny
    )


def solve(
  now: Sums,
  goal: Sums,
  products: np.ndarray,
  kept: np.ndarray,
) -> np.ndarray:
  """λ [T] that moves the kept statistics by the gap, or by as much of it as LARGEST allows;
  products: mean of `gram`.

  Units are such that every gradient has length 1; directions weaker than RIDGE of the strongest are
  damped.
  """
  gap = (goal.values / goal.count - now.values / now.count)[kept]
  diagonal = np.diag(products)
  unit = np.where(
    diagonal > 0,
    1 / np.sqrt(np.where(diagonal > 0, diagonal, 1.0)),
    0.0,
  )
  values, vectors = np.linalg.eigh(products * unit[:, None] * unit)
  step = unit * (
    vectors
    @ ((vectors.T @ (gap * unit)) / (np.maximum(values, 0) + RIDGE * values.max()))
  )
  moved = math.sqrt(max(step @ products @ step, 0.0) / (now.power / now.count))
  out = np.zeros(len(now.values))
  out[kept] = step * min(
    1.0,
    LARGEST / max(moved, np.finfo(float).tiny),
  )
  return out
