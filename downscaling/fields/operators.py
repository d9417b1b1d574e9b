"""C′, the known linear downsampling, as an object: apply, pseudo-inverse, projection on its null
space.

Fields are [..., *space, C]; an operator acts on the space axes of each channel alone. For every
operator

    C′ C′⁺ y = y      (rows of C′ are independent)      project(x) = (I − C′⁺C′) x = (I − V Vᵀ) x

with C′ = U Σ Vᵀ (Wan et al. 2023, arXiv:2305.15618, eq. 7).
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

Field = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Operator:
  """Linear map from fields on `fine` to fields on `coarse` (points per space axis)."""

  fine: tuple[int, ...]
  coarse: tuple[int, ...]
  # Is a coarse value a mean over a cell (True), the value of a point (False), or of no grid (None)?
  averages: ClassVar[bool | None] = None

  @property
  def factors(self) -> tuple[int, ...]:
    """Fine points a coarse one, axis by axis; of operators whose coarse side is a grid like the
    fine one.
    """
    return tuple(n // c for n, c in zip(self.fine, self.coarse, strict=True))

  def apply(self, x: Field) -> jax.Array:
    """C′x: [..., *fine, C] -> [..., *coarse, C]."""
    raise TypeError(
      f"{type(self).__name__} is abstract; use Strided, BlockMean or Dense."
    )

  def pinv(self, y: jax.Array) -> jax.Array:
    """C′⁺y, the smallest x with C′x = y: [..., *coarse, C] -> [..., *fine, C]."""
    raise TypeError(
      f"{type(self).__name__} is abstract; use Strided, BlockMean or Dense."
    )

  def project(self, x: jax.Array) -> jax.Array:
    """(I − C′⁺C′)x: what C′ cannot see of x, [..., *fine, C]."""
    return x - self.pinv(self.apply(x))

  def constrain(self, x: jax.Array, y: jax.Array) -> jax.Array:
    """The field nearest to x with C′x = y: [..., *fine, C]."""
    return x + self.pinv(y - self.apply(x))

  def matrix(self) -> np.ndarray:
    """C′ for one channel as a dense [n, N] array, n = Πcoarse, N = Πfine (float64; tests and small
    problems).
    """
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
      eye = jnp.eye(
        math.prod(self.fine),
        dtype=jnp.float64,
      ).reshape(-1, *self.fine, 1)
      return np.asarray(self.apply(eye)).reshape(len(eye), -1).T

  def _blocks(self, x: Field) -> Any:
    """[..., *fine, C] -> [..., c₀, f₀, c₁, f₁, ..., C], every axis split in (cell, place in the
    cell).
    """
    self._check(x, self.fine, "fine")
    lead = x.shape[: x.ndim - len(self.fine) - 1]
    split = [
      s for c, n in zip(self.coarse, self.fine, strict=True) for s in (c, n // c)
    ]
    return x.reshape(*lead, *split, x.shape[-1])

  def _check(self, x: Field, space: tuple[int, ...], which: str) -> None:
    if x.ndim <= len(space) or x.shape[-len(space) - 1 : -1] != space:
      raise ValueError(
        f"a field of shape {x.shape} came, {type(self).__name__} needs [..., "
        f"{', '.join(map(str, space))}, channels] on its {which} side. Was the operator built for "
        "another grid, or is the channel axis missing (x[..., None])?"
      )


def _lift(x: jax.Array, ndim: int) -> jax.Array:
  """x with leading axes of size one, to `ndim` axes."""
  return x.reshape((1,) * (ndim - x.ndim) + x.shape)


def _coarse_shape(
  fine: tuple[int, ...], factor: int | tuple[int, ...]
) -> tuple[int, ...]:
  """fine over factor, which is one number for all axes or one an axis.

  Raises ValueError if it does not divide.
  """
  factors = (
    (factor,) * len(fine) if isinstance(factor, int | np.integer) else tuple(factor)
  )
  if len(factors) != len(fine):
    raise ValueError(
      f"{len(factors)} factors {factors} came for a grid of {len(fine)} axes {fine}: need one an "
      "axis."
    )
  for n, f in zip(fine, factors, strict=True):
    if f < 1 or n % f:
      fits = [f for f in range(2, n) if n % f == 0]
      raise ValueError(
        f"factor {f} does not divide the grid of {n} points: use one of {fits} "
        "(config.grid.factor)."
      )
  return tuple(n // f for n, f in zip(fine, factors, strict=True))


def _check_cells(operator: Operator) -> None:
  """Raises ValueError unless every coarse cell holds as many fine points as every other, axis by
  axis.
  """
  fine, coarse = operator.fine, operator.coarse
  whole = len(fine) == len(coarse)
  whole = whole and all(
    c >= 1 and n % c == 0 for n, c in zip(fine, coarse, strict=True)
  )
  if not whole:
    raise ValueError(
      f"{type(operator).__name__} from a grid {fine} to {coarse}: need as many axes, and coarse "
      f"points that divide the fine ones. Use {type(operator).__name__}.on(fine, factor)."
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Strided(Operator):
  """Every factors[a]-th point of space axis a, beginning with the first; no averaging."""

  averages: ClassVar[bool | None] = False

  def __post_init__(self):
    _check_cells(self)

  @classmethod
  def on(
    cls,
    fine: tuple[int, ...],
    factor: int | tuple[int, ...],
  ) -> "Strided":
    """On a grid of `fine` points; factor: for all axes, or one an axis.

    Raises ValueError if it does not divide.
    """
    return cls(tuple(fine), _coarse_shape(fine, factor))

  def apply(self, x):
    self._check(x, self.fine, "fine")
    return x[(..., *[slice(None, None, f) for f in self.factors], slice(None))]

  def pinv(self, y):
    self._check(y, self.coarse, "coarse")
    lead = y.ndim - len(self.coarse) - 1
    spaced = [
      (0, f - 1, f - 1) for f in self.factors
    ]  # zeros after the last point, and between points
    return jax.lax.pad(
      y, jnp.zeros((), y.dtype), [(0, 0, 0)] * lead + spaced + [(0, 0, 0)]
    )


@dataclasses.dataclass(frozen=True, eq=False)
class BlockMean(Operator):
  """Mean over blocks of factors[a] points along axis a, weighted by cell areas if they are given.

  weights: [*fine], areas in any unit, > 0; None for equal cells.
  """

  averages: ClassVar[bool | None] = True
  weights: np.ndarray | None = None

  def __post_init__(self):
    _check_cells(self)

  @classmethod
  def on(
    cls,
    fine: tuple[int, ...],
    factor: int | tuple[int, ...],
    weights: np.ndarray | None = None,
  ) -> "BlockMean":
    """On a grid of `fine` points; factor: for all axes, or one an axis.

    Raises: ValueError if factor does not divide the grid or a weight is not positive.
    """
    fine = tuple(fine)
    if weights is not None:
      weights = np.asarray(weights, np.float64)
      if weights.shape != fine or not (
        np.isfinite(weights).all() and (weights > 0).all()
      ):
        raise ValueError(
          f"cell areas of shape {weights.shape}, need {fine} finite values > 0: one area a fine "
          "cell."
        )
    return cls(fine, _coarse_shape(fine, factor), weights)

  def _shares(self, dtype) -> jax.Array:
    """Weight of each fine cell in its block's mean, [c₀, f₀, ..., 1]; sums to 1 over a block."""
    w = np.ones(self.fine) if self.weights is None else self.weights
    w = np.asarray(self._blocks(w[..., None]))
    return jnp.asarray(w / w.sum(self._inner(w), keepdims=True), dtype)

  def _inner(self, blocks) -> tuple[int, ...]:
    return tuple(range(blocks.ndim - 2 * len(self.fine), blocks.ndim, 2))

  def apply(self, x):
    blocks = self._blocks(x)
    shares = self._shares(x.dtype)
    return (blocks * _lift(shares, blocks.ndim)).sum(self._inner(blocks))

  def pinv(self, y):
    self._check(y, self.coarse, "coarse")
    w = self._shares(y.dtype)
    # C′ᵀ (C′C′ᵀ)⁻¹; C′C′ᵀ is diagonal.
    w = w / (w**2).sum(self._inner(w), keepdims=True)
    lead = y.shape[: y.ndim - len(self.coarse) - 1]
    cells = y.reshape(
      *lead,
      *[s for c in self.coarse for s in (c, 1)],
      y.shape[-1],
    )
    return (cells * _lift(w, cells.ndim)).reshape(*lead, *self.fine, y.shape[-1])


@dataclasses.dataclass(frozen=True, eq=False)
class Dense(Operator):
  """Any matrix, stored with its pseudo-inverse: observations at chosen places, instrument kernels.

  array: [n, N], one row an observation, N = Πfine; inverse: [N, n]. The coarse side is one axis of
    n.
  """

  array: np.ndarray
  inverse: np.ndarray

  @classmethod
  def on(cls, fine: tuple[int, ...], array: np.ndarray) -> "Dense":
    """Raises ValueError if the matrix does not fit the grid or its rows are dependent."""
    array = np.asarray(array, np.float64)
    if array.ndim != 2 or array.shape[1] != math.prod(fine):
      raise ValueError(
        f"a matrix of shape {array.shape} came, need [n, {math.prod(fine)}] for the grid "
        f"{tuple(fine)}."
      )
    rank = np.linalg.matrix_rank(array)
    if rank < len(array):
      raise ValueError(
        f"the matrix has {len(array)} rows of rank {rank}: drop the dependent ones."
      )
    return cls(
      tuple(fine),
      (len(array),),
      array,
      np.linalg.pinv(array),
    )

  def apply(self, x):
    self._check(x, self.fine, "fine")
    lead = x.shape[: x.ndim - len(self.fine) - 1]
    flat = x.reshape(*lead, -1, x.shape[-1])
    return jnp.einsum(
      "nN,...Nc->...nc", jnp.asarray(self.array, x.dtype), flat, precision="highest"
    )

  def pinv(self, y):
    self._check(y, self.coarse, "coarse")
    flat = jnp.einsum(
      "Nn,...nc->...Nc", jnp.asarray(self.inverse, y.dtype), y, precision="highest"
    )
    return flat.reshape(
      *y.shape[:-2],
      *self.fine,
      y.shape[-1],
    )
