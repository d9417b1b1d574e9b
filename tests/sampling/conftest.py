"""A stationary Gaussian field: its denoiser is linear and known, and so is everything a sampler
should return.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from downscaling.fields.operators import Operator


class Field(NamedTuple):
  """Fields on `space` with spectrum S [*space, 1], mean variance 1."""

  space: tuple[int, ...]
  spectrum: np.ndarray

  @classmethod
  def on(cls, space, corner=3.0, slope=4.0):
    """S_k ∝ 1/(1 + (|k|/corner)^slope)."""
    axes = np.meshgrid(*[np.fft.fftfreq(n, 1 / n) for n in space], indexing="ij")
    k = np.sqrt(sum(a**2 for a in axes))
    s = 1 / (1 + (k / corner) ** slope)
    return cls(tuple(space), (s / s.mean())[..., None])

  def denoise(self, x, sigma):
    """E[x₀ | x₀ + σ·noise = x], mode by mode S/(S + σ²)."""
    axes = tuple(range(1, 1 + len(self.space)))
    s = jnp.asarray(self.spectrum, x.dtype)[None]
    weight = s / (s + sigma.reshape(-1, *(1,) * (x.ndim - 1)) ** 2)
    return jnp.fft.ifftn(jnp.fft.fftn(x, axes=axes) * weight, axes=axes).real.astype(
      x.dtype
    )

  def covariance(self) -> np.ndarray:
    """[N, N], float64."""
    n = math.prod(self.space)
    eye = np.eye(n).reshape(n, *self.space)
    axes = tuple(range(1, 1 + len(self.space)))
    return np.fft.ifftn(
      np.fft.fftn(eye, axes=axes) * self.spectrum[None, ..., 0], axes=axes
    ).real.reshape(n, n)

  def posterior(
    self, op: Operator, y: np.ndarray, noise: float = 0.0
  ) -> tuple[np.ndarray, np.ndarray]:
    """Mean [N] and covariance [N, N] of x given C′x + noise = y [n]: dense algebra in float64."""
    p, c = self.covariance(), op.matrix()
    k = p @ c.T @ np.linalg.inv(c @ p @ c.T + noise**2 * np.eye(len(c)))
    return k @ y, p - k @ c @ p

  def draw(self, seed: int) -> np.ndarray:
    """One field, [*space]."""
    white = np.random.default_rng(seed).normal(size=self.space)
    return np.fft.ifftn(np.fft.fftn(white) * np.sqrt(self.spectrum[..., 0])).real


@pytest.fixture(scope="session")
def gaussian():
  return Field.on
