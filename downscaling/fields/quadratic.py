"""Quadratic terms of equations on a periodic grid, as data.

    N(y) = Σ_r (A_r∗y) · (B_r∗y),  or  C∗ of that sum,

with convolutions A_r, B_r and C given by their Fourier multipliers. Burgers' term has one product
and C = −½∂ₓ; the advection of vorticity has two products and no C. Equations make their own term;
maps, metrics and saved maps hold it as arrays and need no equation's name.
"""

import dataclasses
import functools
import hashlib
import operator

import numpy as np

ARRAYS = ("left", "right", "outer")


@dataclasses.dataclass(frozen=True, eq=False)
class Quadratic:
  """N on grids of shape `space`. Two terms are equal if their numbers are, so either may key a
  cache.

  space: points of each axis, [rank]. left, right: multipliers A_r and B_r on rfftn's half grid, [R,
  *half space] complex; empty where all are 1 and R = 1. outer: C, [*half space] complex, or empty
  for 1.
  """

  space: tuple[int, ...]
  left: np.ndarray
  right: np.ndarray
  outer: np.ndarray

  def __post_init__(self):
    half = (*self.space[:-1], self.space[-1] // 2 + 1)
    object.__setattr__(self, "space", tuple(map(int, self.space)))
    terms = self.left.shape[:1] if self.left.size else self.right.shape[:1]
    for name, shape in (
      ("left", (*terms, *half)),
      ("right", (*terms, *half)),
      ("outer", half),
    ):
      array = getattr(self, name)
      if array.size and array.shape != shape:
        raise ValueError(
          f"a quadratic term on {list(self.space)} points has {name!r} of shape {array.shape}, "
          f"need {shape}, or an empty array for multipliers of 1."
        )
    if bool(self.left.size) != bool(self.right.size) and terms != (1,):
      raise ValueError(
        f"a quadratic term of {terms[0]} products needs both left and right."
      )

  def __call__(self, y, xp=np):
    """N(y) of rows y [S, *space]; no dealiasing. xp: numpy, or jax.numpy for its arrays."""
    if y.shape[1:] != self.space:
      raise ValueError(
        f"rows of shape {y.shape[1:]} came, the quadratic term is of a grid {self.space}: make it "
        "for this grid."
      )
    axes = tuple(range(1, y.ndim))
    back = functools.partial(xp.fft.irfftn, s=self.space, axes=axes)
    total = y**2
    if self.left.size or self.right.size:
      waves = xp.fft.rfftn(y, axes=axes)
      left = [back(m[None] * waves) for m in self.left] if self.left.size else [y]
      right = [back(m[None] * waves) for m in self.right] if self.right.size else [y]
      products = [a * b for a, b in zip(left, right, strict=True)]
      total = functools.reduce(operator.add, products)
    return (
      back(self.outer[None] * xp.fft.rfftn(total, axes=axes))
      if self.outer.size
      else total
    )

  @functools.cached_property
  def _digest(self) -> bytes:
    digest = hashlib.sha256(repr(self.space).encode())
    for name in ARRAYS:
      array = np.ascontiguousarray(getattr(self, name), np.complex128)
      digest.update(repr(array.shape).encode() + array.tobytes())
    return digest.digest()

  def __eq__(self, other) -> bool:
    return isinstance(other, Quadratic) and self._digest == other._digest

  def __hash__(self) -> int:
    return hash(self._digest)


def burgers(space: tuple[int, ...]) -> Quadratic:
  """−½ ∂ₓ u² of u [S, N] on a box of length 2π.

  Units of length do not matter, as maps fit coefficients of their own.
  """
  none = np.zeros(0, complex)
  return Quadratic(
    tuple(space), none, none, -0.5j * derivative_waves(space[-1], half=True)
  )


def advection(space: tuple[int, ...]) -> Quadratic:
  """−u·∇ω of ω [S, N, N] with rows y, columns x, on (2π)²; u = ψ_y, v = −ψ_x, −Δψ = ω."""
  ky, kx = (
    np.fft.fftfreq(space[0], 1 / space[0])[:, None],
    np.arange(space[1] // 2 + 1.0)[None],
  )
  k2 = kx**2 + ky**2
  k2[0, 0] = np.inf
  along = derivative_waves(space[1], half=True)[None]
  up = derivative_waves(space[0], half=False)[:, None]
  minus_velocity = np.stack([-1j * (up / k2), 1j * (along / k2)])
  gradient = np.stack([1j * np.broadcast_to(k, k2.shape) for k in (along, up)])
  return Quadratic(tuple(space), minus_velocity, gradient, np.zeros(0, complex))


def derivative_waves(points: int, half: bool) -> np.ndarray:
  """Wavenumbers of a derivative on a box of length 2π, [points], or [points//2 + 1] of rfft's half.

  That of Nyquist's wave is 0, as its derivative is zero on its own points.
  """
  k = np.arange(points // 2 + 1.0) if half else np.fft.fftfreq(points, 1 / points)
  return np.where(2 * np.abs(k) == points, 0.0, k)
