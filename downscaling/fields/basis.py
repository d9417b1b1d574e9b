"""The basis in which a field's modes are taken as uncorrelated.

The preconditioning of the denoiser, the table of its error and the gain of guided sampling all need
one variance a mode. What a mode is, a basis says. It is orthonormal and acts on each channel alone.

    x = Q c,   E c cᵀ = diag(variances),   tables hold one variance a mode and channel

`Trigonometric` serves boxes: Fourier waves along periodic axes, cosines (DCT-II) along the others.
"""

import dataclasses
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

Array = Any  # jax.Array or np.ndarray


class Basis(Protocol):
  """What a basis must do. Fields are [B, *space, C]; a table is [..., *table, C].

  space: points of each axis. table: the shape of a table of variances without its channels.
  """

  @property
  def space(self) -> tuple[int, ...]: ...

  @property
  def table(self) -> tuple[int, ...]: ...

  def modes(self, x: jax.Array) -> jax.Array:
    """Coefficients of x, in the layout that `held` gives a table."""
    ...

  def fields(self, modes: jax.Array) -> jax.Array:
    """The inverse of `modes`: [B, *space, C]."""
    ...

  def held(self, table: Array) -> Array:
    """The entries of a table [..., *table, C] that `modes` keeps a coefficient of."""
    ...

  def power(self, x: Array) -> Array:
    """|c|² of every mode, as a table: [B, *table, C]. Its sum over modes is that of x²."""
    ...

  def symmetrised(self, table: np.ndarray) -> np.ndarray:
    """A measured table made exactly as symmetric as that of any real field."""
    ...

  def rows(self, matrix: np.ndarray) -> np.ndarray:
    """R of C′ΣC′ᵀ = R diag(`expanded` variances) Rᵀ: [n, N] -> real [n, P]."""
    ...

  def expanded(self, table: jax.Array) -> jax.Array:
    """A table [B, *table, C] as the diagonal that `rows` belongs to, [B, P, C]."""
    ...


@dataclasses.dataclass(frozen=True)
class Trigonometric:
  """Waves along periodic axes, cosines along the others.

  space: points of each axis. periodic: of each axis; () stands for all of them.
  A table has one entry a point: along a periodic axis in the order of the FFT, along another from
  the mean to the finest cosine. Coefficients of waves are those of an FFT without a factor, so that
  |c|² of the orthonormal basis is their square over the points of the periodic axes.
  """

  space: tuple[int, ...]
  periodic: tuple[bool, ...] = ()

  def __post_init__(self):
    space = tuple(int(n) for n in self.space)
    periodic = tuple(bool(p) for p in self.periodic) or (True,) * len(space)
    if len(periodic) != len(space):
      raise ValueError(
        f"{len(periodic)} axes are said to be periodic or not, of a grid with {len(space)}: need "
        "one word an axis."
      )
    object.__setattr__(self, "space", space)
    object.__setattr__(self, "periodic", periodic)

  @property
  def table(self) -> tuple[int, ...]:
    """One entry a point."""
    return self.space

  @property
  def waves(self) -> bool:
    """Are all modes waves, so that operators which repeat along the axes are circulant?"""
    return all(self.periodic)

  def _axes(self, periodic: bool) -> tuple[int, ...]:
    """The axes of [B, *space, C] that are periodic, or those that are not."""
    return tuple(a for a, p in enumerate(self.periodic, start=1) if p is periodic)

  @property
  def _points(self) -> int:
    """Points of the periodic axes."""
    return math.prod(
      n
      for n, p in zip(
        self.space,
        self.periodic,
        strict=True,
      )
      if p
    )

  def modes(self, x: jax.Array) -> jax.Array:
    """Waves of the last periodic axis are its half spectrum, as of rfft."""
    for axis in self._axes(periodic=False):
      x = _cosines(x, axis)
    waves = self._axes(periodic=True)
    return jnp.fft.rfftn(x, axes=waves) if waves else x

  def fields(self, modes: jax.Array) -> jax.Array:
    """The inverse of `modes`."""
    waves = self._axes(periodic=True)
    x = modes
    if waves:
      x = jnp.fft.irfftn(
        x,
        [self.space[a - 1] for a in waves],
        axes=waves,
      )
    for axis in self._axes(periodic=False):
      x = _from_cosines(x, axis)
    return x

  def held(self, table: Array) -> Array:
    """The half of the last periodic axis."""
    if not any(self.periodic):
      return table
    last = self._axes(periodic=True)[-1] - len(self.space) - 2  # from the end
    half = slice(0, table.shape[last] // 2 + 1)
    return table[(..., half, *(slice(None),) * (-last - 1))]

  def power(self, x: Array) -> Array:
    """|c|² of all modes; NumPy arrays stay in NumPy and keep their precision."""
    if isinstance(x, np.ndarray):
      for axis in self._axes(periodic=False):
        x = _cosines_in_numpy(x, axis)
      waves = self._axes(periodic=True)
      return np.abs(np.fft.fftn(x, axes=waves)) ** 2 / self._points if waves else x**2
    for axis in self._axes(periodic=False):
      x = _cosines(x, axis)
    waves = self._axes(periodic=True)
    return jnp.abs(jnp.fft.fftn(x, axes=waves)) ** 2 / self._points if waves else x**2

  def symmetrised(self, table: np.ndarray) -> np.ndarray:
    """Waves k and −k of a real field have one variance: their mean; table [..., *space, C]."""
    axes = tuple(a - len(self.space) - 2 for a in self._axes(periodic=True))
    if not axes:
      return table
    opposite = np.roll(np.flip(table, axes), 1, axes)
    return (table + opposite) / 2

  def rows(self, matrix: np.ndarray) -> np.ndarray:
    """Real and imaginary parts of the matrix's rows beside each other; [n, 2N], or [n, N] if all
    modes are cosines.
    """
    rows = np.asarray(matrix).reshape(-1, *self.space)
    for axis in self._axes(periodic=False):
      rows = _cosines_in_numpy(rows, axis)
    waves = self._axes(periodic=True)
    if not waves:
      return rows.reshape(len(rows), -1)
    rows = np.fft.fftn(rows, axes=waves, norm="ortho").reshape(len(rows), -1)
    return np.concatenate([rows.real, rows.imag], 1)

  def expanded(self, table: jax.Array) -> jax.Array:
    """One variance for the real and one for the imaginary part."""
    flat = table.reshape(len(table), -1, table.shape[-1])
    return jnp.concatenate([flat, flat], 1) if any(self.periodic) else flat


def _cosines(x: jax.Array, axis: int) -> jax.Array:
  return jax.scipy.fft.dct(x, axis=axis, norm="ortho")


def _from_cosines(x: jax.Array, axis: int) -> jax.Array:
  return jax.scipy.fft.idct(x, axis=axis, norm="ortho")


def _cosines_in_numpy(x: np.ndarray, axis: int) -> np.ndarray:
  import scipy.fft

  return np.asarray(scipy.fft.dct(x, axis=axis, norm="ortho"))
