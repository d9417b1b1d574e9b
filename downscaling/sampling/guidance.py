"""Guidance: turns a denoiser D into D′, which also fits an observation C′x = y′.

| name | formula | exact for a Gaussian field | calls of D, gradients |
|---|---|---|---|
| paper | C′⁺y′ + (I − VVᵀ)[D − α∇ₓ‖C′D − y′‖²] (arXiv:2305.15618, eq. 7) | no | 1, 1 vjp |
| scaled | the same with α(1 + σ²/σ_d²) | no | 1, 1 vjp |
| wiener, measured | D + G_σ(y′ − C′D), sampling/gaussian_gain.py | yes, for wiener | 1, none |
| moment | D + σ²JᵀC′ᵀA⁻¹(y′ − C′D), J = ∂D/∂x | yes, with the prior's A | 1, 1 vjp |
| none | D | – | 1, none |

‖·‖² is the sum of squares over a sample's d′ coarse values. wiener and measured differ in the
variance behind their gain: that of the training spectrum, or the network's measured error. moment
(after ΠGDM, Song et al. 2023, ICLR) takes either gain, and replaces the covariance that G assumes
by σ²J. With observation noise, A + R replaces A. For the last call of a solver see `make`.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from downscaling.fields.operators import Operator
from downscaling.sampling.gaussian_gain import Gain
from downscaling.sampling.solvers import Denoise

NAMES = ("paper", "scaled", "wiener", "measured", "moment", "none")

# (x, σ) -> (D′, r = y′ − C′D of the unguided D)
Step = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


class Guided(NamedTuple):
  """A guided denoiser.

  denoise: for the steps of a solver. last: for its last call. scored, last_scored: the same, but
  they return (D′, χ²/d′ [B]) with χ² = rᵀA⁻¹r of the unguided misfit r = y′ − C′D; NaN without a
  gain.
  """

  denoise: Denoise
  last: Denoise
  scored: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
  last_scored: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def make(
  name: str,
  denoise: Denoise,
  operator: Operator,
  y: jax.Array,
  *,
  alpha: float = 1.0,
  normalise: str = "none",
  data_std: float = 1.0,
  gain: Gain | None = None,
  final: str = "overwrite",
  one_level: bool = False,
) -> Guided:
  """Builds the guided denoiser for the steps of a solver and for its last call.

  Args:
    name: one of NAMES.
    denoise: D of the unconditional prior.
    operator, y: C′ and y′ [B, *coarse, C], in the units of D's fields.
    alpha, normalise, data_std: options of paper and scaled, see there.
    gain: needed by wiener (built on prior_variance), measured (on measured_variance), moment
      (either) and final="gain".
    final: the last call of paper and scaled. "overwrite", as in the paper, sets the observed points
      to y′, which leaves kinks beside them. "gain" uses D + G(y′ − C′D), which spreads the
      correction as the field's covariance does. The other guidances always end with their gain.
    one_level: all rows of a call share one σ, as in every solver. A is then factorised once instead
      of once a row.
  Raises: ValueError for an unknown name, a missing gain, noise that the guidance cannot take, or
    conditions that do not fit the operator.
  """
  if name not in NAMES or final not in ("overwrite", "gain"):
    raise ValueError(
      f"guidance {name!r} with final={final!r}: use one of {', '.join(NAMES)}, with overwrite or "
      "gain."
    )
  needs_gain = name in ("wiener", "measured", "moment") or final == "gain"
  if gain is None and needs_gain and name != "none":
    raise ValueError(
      f"guidance {name!r} with final={final!r} needs a gain: build a Gain from the training "
      "spectrum."
    )
  if name in ("paper", "scaled") and gain is not None and gain.noisy:
    raise ValueError(
      f"guidance {name!r} sets C′x = y′ exactly and knows no observation noise: use wiener, "
      "measured or moment, or --config.sampling.observation_noise=0."
    )
  check(operator, y)
  if name == "none":
    step = last = _unguided(denoise, operator, y)
  elif name in ("paper", "scaled"):
    if name == "paper":
      step = paper(denoise, operator, y, alpha=alpha, normalise=normalise)
    else:
      step = scaled(
        denoise, operator, y, alpha=alpha, data_std=data_std, normalise=normalise
      )
    last = (
      step
      if gain is None or final == "overwrite"
      else along_gain(denoise, operator, y, gain, one_level)
    )
  else:
    assert gain is not None  # checked above
    last = along_gain(denoise, operator, y, gain, one_level)
    step = moment(denoise, operator, y, gain, one_level) if name == "moment" else last
  scored = _scored(step, gain, one_level)
  last_scored = _scored(last, gain, one_level)
  return Guided(_plain(step), _plain(last), scored, last_scored)


def _unguided(denoise: Denoise, operator: Operator, y: jax.Array) -> Step:
  def step(x, sigma):
    denoised = denoise(x, sigma)
    return denoised, y - operator.apply(denoised)

  return step


def _plain(step: Step) -> Denoise:
  return lambda x, sigma: step(x, sigma)[0]


def _scored(step: Step, gain: Gain | None, one_level: bool):
  def scored(x, sigma):
    guided, misfit = step(x, sigma)
    if gain is None:
      return guided, jnp.full(len(x), jnp.nan, x.dtype)
    return guided, gain.misfit_score(misfit, sigma[:1] if one_level else sigma)

  return scored


def paper(
  denoise: Denoise,
  operator: Operator,
  y: jax.Array,
  *,
  alpha: float,
  normalise: str = "none",
) -> Step:
  """Eq. 7 of Wan et al. 2023. It draws from no posterior: a constant α is too weak at large σ.

  docs/method.md has figures.

  normalise: the paper does not give its α, and sources differ. "none" takes α as it is, "divide"
    α/(d′/d), "multiply" α·d′/d, where d and d′ count the fine and coarse values of a sample. The
    authors' library (swirl-dynamics, class InfillFromSlices) uses "divide" with .5 by default; that
    is 4 with "none" if every 8th value is observed.
  """
  strength = alpha * _share(operator, normalise)
  return _eq7(denoise, operator, y, lambda sigma: strength)


def scaled(
  denoise: Denoise,
  operator: Operator,
  y: jax.Array,
  *,
  alpha: float,
  data_std: float = 1.0,
  normalise: str = "none",
) -> Step:
  """Eq. 7 with α(1 + σ²/σ_d²).

  The gradient contains the Jacobian of D, about σ_d²/(σ_d² + σ²); the factor cancels it.
  """
  strength = alpha * _share(operator, normalise)

  def growing(sigma):
    return strength * (1 + (sigma / data_std) ** 2)

  return _eq7(denoise, operator, y, growing)


def along_gain(
  denoise: Denoise,
  operator: Operator,
  y: jax.Array,
  gain: Gain,
  one_level: bool = False,
) -> Step:
  """D + G_σ(y′ − C′D): needs no gradient and no overwriting.

  Without observation noise, C′D′ = y′ holds exactly.
  """

  def guided(x, sigma):
    denoised = denoise(x, sigma)
    misfit = y - operator.apply(denoised)
    return denoised + gain.correction(misfit, sigma[:1] if one_level else sigma), misfit

  return guided


def moment(
  denoise: Denoise,
  operator: Operator,
  y: jax.Array,
  gain: Gain,
  one_level: bool = False,
) -> Step:
  """D + σ²Jᵀ C′ᵀ (A + R)⁻¹ (y′ − C′D), followed by a correction along the gain.

  y′ is taken as Gaussian about C′D with the gain's A. σ²J is Cov[x₀ | x] if D is exact (Tweedie's
  second identity), so the correction uses the covariance at this very x.

  If A differs from C′(σ²J)C′ᵀ, C′D′ misses its target y′ − R(A + R)⁻¹r; the gain then corrects the
  rest. A network needs that: without it the steps diverge on KS, because errors of A multiply from
  step to step.
  """
  hard = dataclasses.replace(gain, noise=0.0, error=None)

  def guided(x, sigma):
    denoised, pull = jax.vjp(lambda x: denoise(x, sigma), x)
    misfit = y - operator.apply(denoised)
    level = sigma[:1] if one_level else sigma
    weights = gain.solve(misfit, level)
    (along,) = pull(gain.adjoint(weights).astype(denoised.dtype))
    moved = denoised + _column(sigma, x) ** 2 * along
    left = gain.apply_noise(weights) if gain.noisy else 0.0
    return moved + hard.correction(y - left - operator.apply(moved), level), misfit

  return guided


def _column(sigma: jax.Array, x: jax.Array) -> jax.Array:
  """σ [B] -> [B, 1, ..., 1], of the rank of x."""
  return sigma.reshape(-1, *(1,) * (x.ndim - 1))


def _eq7(
  denoise: Denoise,
  operator: Operator,
  y: jax.Array,
  strength: Callable[[jax.Array], jax.Array | float],
) -> Step:
  def guided(x, sigma):
    def observed(x):
      denoised = denoise(x, sigma)
      return operator.apply(denoised), denoised

    seen, pull, denoised = jax.vjp(observed, x, has_aux=True)
    (gradient,) = pull(2 * (seen - y))
    a = strength(_column(sigma, x))
    return operator.constrain(denoised - a * gradient, y), y - seen

  return guided


def _share(operator: Operator, normalise: str) -> float:
  fine, coarse = 1, 1
  for n in operator.fine:
    fine *= n
  for n in operator.coarse:
    coarse *= n
  factors = {"none": 1.0, "divide": fine / coarse, "multiply": coarse / fine}
  if normalise not in factors:
    raise ValueError(f"normalise={normalise!r} is unknown; use {', '.join(factors)}.")
  return factors[normalise]


def check(operator: Operator, y: jax.Array) -> None:
  """Raises ValueError unless y is [B, *coarse, C] of this operator."""
  space = y.shape[1:-1]
  if y.ndim != len(operator.coarse) + 2 or space != operator.coarse:
    raise ValueError(
      f"conditions of shape {y.shape} came, need [batch, {', '.join(map(str, operator.coarse))}, "
      "channels] for the operator: is the coarse grid the one the prior was trained for "
      "(config.grid)?"
    )
