"""D(x, σ) ≈ E[x₀ | x₀ + σ·noise = x], preconditioned around any net; x₀ has zero mean and unit
variance.

Three preconditionings, one form, D = skip·x + out·net(inp·x, ln σ / 4), inp = 1/√(σ²+1):

  edm       scalars skip = 1/(σ²+1), out = σ/√(σ²+1) (Karras et al. 2022, arXiv:2206.00364,
            Table 1);
  wiener    skip and out act mode by mode of a basis (fields/basis.py), skip_k = S_k/(S_k+σ²),
            out_k = √(S_k σ²/(S_k+σ²)), with S the spectrum of the training data. A silent net is
            then the exact denoiser of a Gaussian field of that spectrum, and the net's output is
            coloured by the variance that is left. A steep tail of the data costs nothing.
  adaptive  wiener, whose net also sees z, in which all modes that stand out of the noise have one
            height, and returns a and b for a + b·z. b is a gain that follows the field: where it is
            rough the filter opens, where it is calm it closes (the local Wiener filter of Lee 1980,
            doi:10.1109/TPAMI.1980.4766994, learnt).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from downscaling.fields.basis import Basis, Trigonometric

SMALLEST = 1e-14  # of the largest variance of a mode: keeps ratios finite in float32


class Denoiser(nn.Module):
  """Attributes:
  net: module (x [B, *space, C], level [B]) -> [B, *space, C].
    adaptive: with 2·C channels in and out.
  spectrum: None for edm; else [*space, C], the variance of every mode (fields/statistics.py).
  basis: of the spectrum's modes; None for waves along every axis.
  gated: adaptive instead of wiener; needs a spectrum.
  static: None, or fields [*space, K] that the net sees beside x: net is (x, level, static) then. A
    net that shifts with its input cannot tell where in the box it is, which matters where the law
    of x₀ is not the same everywhere.
  """

  net: nn.Module
  spectrum: np.ndarray | None = None
  gated: bool = False
  static: np.ndarray | None = None
  basis: Basis | None = None

  def __call__(self, x: jax.Array, sigma: jax.Array) -> jax.Array:
    """Removes noise.

    Args:
      x: x₀ + σ·noise, [B, *space, C].
      sigma: noise standard deviation, [B], > 0, in units of x.
    Returns: the denoised field, like x.
    Raises: ValueError if sigma is not one value a sample.
    """
    if sigma.shape != x.shape[:1]:
      raise ValueError(
        f"sigma is {sigma.shape}, need {x.shape[:1]}: one noise level a sample. For a single level "
        "pass jnp.full(x.shape[0], sigma)."
      )
    s = sigma.reshape(-1, *(1,) * (x.ndim - 1))
    level = jnp.log(sigma) / 4
    inp = jax.lax.rsqrt(s**2 + 1)
    net = (
      self.net
      if self.static is None
      else lambda x, level: self.net(x, level, self.static)
    )
    if self.spectrum is None:
      return inp**2 * x + s * inp * net(inp * x, level)
    basis = self.basis or Trigonometric(x.shape[1:-1])
    spectrum = np.maximum(self.spectrum, SMALLEST * self.spectrum.max())
    half = jnp.asarray(basis.held(spectrum), x.dtype)[None]
    var, modes = half + s**2, basis.modes(x)
    if self.gated:
      full = jnp.asarray(self.spectrum, x.dtype)[None]
      axes = tuple(range(1, x.ndim - 1))
      # Of the modes' √S/(S+σ²)·x.
      power = jnp.mean(full / (full + s**2), axis=axes, keepdims=True)
      z = basis.fields(jnp.sqrt(half / power) / var * modes).astype(x.dtype)
      a, b = jnp.split(
        net(jnp.concatenate([inp * x, z], axis=-1), level),
        2,
        axis=-1,
      )
      found = a + b * z
    else:
      found = net(inp * x, level)
    coloured = s * jnp.sqrt(half / var) * basis.modes(found)
    return basis.fields(half / var * modes + coloured).astype(x.dtype)
