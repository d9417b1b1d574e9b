"""C′x = y′ as decorators of a denoiser: (D, operator, y′) -> D′, another denoiser of the same
signature.

| name | formula | exact for a Gaussian field | calls of D, gradients |
|---|---|---|---|
| paper | C′⁺y′ + (I − VVᵀ)[D − α∇ₓ‖C′D − y′‖²] (Wan et al. 2023, arXiv:2305.15618, eq. 7) | no | 1,
1 vjp |
| scaled | the same with α(1 + σ²/σ_d²) | no | 1, 1 vjp |
| wiener, measured | D + G_σ(y′ − C′D), sampling/gaussian_gain.py | yes, for wiener | 1, none |
| moment | D + σ²JᵀC′ᵀA⁻¹(y′ − C′D), J = ∂D/∂x (after ΠGDM, Song et al. 2023, ICLR) | yes, with
prior A | 1, 1 vjp |
| none | D | – | 1, none |

‖·‖² is the sum of squares over a sample's d′ coarse values. wiener and measured differ in the
variance that their gain was built on: the training spectrum's, or the network's own error. moment
takes either, and σ²J for the covariance that G has fixed. With observation noise A + R stands for
A. For the last call of a solver see `make`.
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
  """denoise: for the steps of a solver. last: for its last call. scored, last_scored: also giving
  χ²/d′ [B].

  χ² = rᵀA⁻¹r of the unguided misfit r = y′ − C′D, by the gain; NaN if there is no gain.
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
  """The guided denoiser and the one to end with.

  Args:
    name: one of NAMES.
    denoise: D of the unconditional prior.
    operator, y: C′ and y′ [B, *coarse, C], in the units of D's fields.
    alpha, normalise, data_std: of paper and scaled, see there.
    gain: needed by wiener (on prior_variance), measured (on measured_variance), moment (either) and
      final="gain".
    final: how paper and scaled end. "overwrite", as the paper: the observed points are set to y′,
      which leaves kinks beside them. "gain": D + G(y′ − C′D), which spreads the correction as the
      field's covariance does. Wiener, measured and moment always end with their gain.
    one_level: all rows of a call have one σ, as those of a solver have: the gain factorises A once,
      not once a row.
  """
  if name not in NAMES or final not in ("overwrite", "gain"):
    raise ValueError(
      f"guidance {name!r} with final={final!r}: use one of {', '.join(NAMES)}, with overwrite or "
      "gain."
    )
  if (
    gain is None
    and (name in ("wiener", "measured", "moment") or final == "gain")
    and name != "none"
  ):
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
  if name in ("wiener", "measured"):
    step = last = along_gain(denoise, operator, y, gain, one_level)
  elif name == "moment":
    step = moment(denoise, operator, y, gain, one_level)
    last = along_gain(denoise, operator, y, gain, one_level)
  elif name == "none":
    step = last = lambda x, sigma: (d := denoise(x, sigma), y - operator.apply(d))
  else:
    decorate = paper if name == "paper" else scaled
    extra = {} if name == "paper" else {"data_std": data_std}
    step = decorate(denoise, operator, y, alpha=alpha, normalise=normalise, **extra)
    last = step if final == "overwrite" else along_gain(denoise, operator, y, gain, one_level)
  return Guided(
    _plain(step), _plain(last), _scored(step, gain, one_level), _scored(last, gain, one_level)
  )


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
  denoise: Denoise, operator: Operator, y: jax.Array, *, alpha: float, normalise: str = "none"
) -> Step:
  """Eq. 7 of the paper. It is no posterior: a constant α is too weak where σ is large
  (docs/method.md has the figures).

  normalise: the paper's α is not public, and sources differ: "none" takes it as it stands, "divide"
  as α/(d′/d), "multiply" as α·d′/d, d and d′ the fine and coarse values of a sample. The authors'
  library (swirl-dynamics, class InfillFromSlices) has "divide" and .5 by default: 4 with "none"
  where every 8th value is observed.
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
  """Eq. 7 with α(1 + σ²/σ_d²): the gradient carries the Jacobian of D, about σ_d²/(σ_d² + σ²),
  which this undoes.
  """
  strength = alpha * _share(operator, normalise)
  return _eq7(denoise, operator, y, lambda sigma: strength * (1 + (sigma / data_std) ** 2))


def along_gain(
  denoise: Denoise, operator: Operator, y: jax.Array, gain: Gain, one_level: bool = False
) -> Step:
  """D + G_σ(y′ − C′D): no gradient, no overwriting, and C′D′ = y′ all the same (without observation
  noise).
  """

  def guided(x, sigma):
    denoised = denoise(x, sigma)
    misfit = y - operator.apply(denoised)
    return denoised + gain.correction(misfit, sigma[:1] if one_level else sigma), misfit

  return guided


def moment(
  denoise: Denoise, operator: Operator, y: jax.Array, gain: Gain, one_level: bool = False
) -> Step:
  """D + σ²Jᵀ C′ᵀ (A + R)⁻¹ (y′ − C′D): y′ is taken as Gaussian about C′D with the gain's A; σ²J is
  Cov[x₀ | x] where D is exact (Tweedie's second identity), so the correction knows the covariance
  at this very x.

  Where A is not C′(σ²J)C′ᵀ, C′D′ misses y′ − R(A + R)⁻¹r, what it should be; the gain makes up for
  the rest. A network needs that: without it the steps diverge on KS, as errors of A are multiplied
  at each.
  """
  hard = dataclasses.replace(gain, noise=0.0, error=None)

  def guided(x, sigma):
    denoised, pull = jax.vjp(lambda x: denoise(x, sigma), x)
    misfit = y - operator.apply(denoised)
    level = sigma[:1] if one_level else sigma
    weights = gain.solve(misfit, level)
    (along,) = pull(gain.adjoint(weights).astype(denoised.dtype))
    moved = denoised + sigma.reshape(-1, *(1,) * (x.ndim - 1)) ** 2 * along
    left = gain.apply_noise(weights) if gain.noisy else 0.0
    return moved + hard.correction(y - left - operator.apply(moved), level), misfit

  return guided


def _eq7(
  denoise: Denoise, operator: Operator, y: jax.Array, strength: Callable[[jax.Array], jax.Array]
) -> Step:
  def guided(x, sigma):
    def observed(x):
      denoised = denoise(x, sigma)
      return operator.apply(denoised), denoised

    seen, pull, denoised = jax.vjp(observed, x, has_aux=True)
    (gradient,) = pull(2 * (seen - y))
    a = strength(sigma.reshape(-1, *(1,) * (x.ndim - 1)))
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
  if y.ndim != len(operator.coarse) + 2 or y.shape[1:-1] != operator.coarse:
    raise ValueError(
      f"conditions of shape {y.shape} came, need [batch, {', '.join(map(str, operator.coarse))}, "
      "channels] for the operator: is the coarse grid the one the prior was trained for "
      "(config.grid)?"
    )
