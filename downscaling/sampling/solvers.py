"""From noise to fields: each solver a plain lax.scan over descending noise levels.

A denoiser is D(x [B, *space, C], σ [B]) ≈ E[x₀ | x₀ + σ·noise = x]; dx/dσ = (x − D)/σ is the flow
it defines (Karras et al. 2022, arXiv:2206.00364, eq. 1 with s = 1). All solvers share one
signature,

    solver(denoise, x, levels, keys, *, last, ...) -> fields [B, *space, C]

and work on x = x₀ + σ·noise, except euler_maruyama, which is the paper's and works on s(t)·x. After
the step to levels[-1] the fields are denoised once more, by `last` (D itself if None; `lambda x,
sigma: x` leaves the call out), and what that returns is returned.

Randomness by id: member i at step k uses fold_in(keys[i], k), so neither batch split nor device
decides a draw.

The two that draw noise take `select`, a Resampling among members: then the denoiser returns (D,
χ²/d′ [B]) and each step, once D is known, lets the implausible members go before it moves and draws
its noise.

DPM-Solver++ is an exponential integrator: it takes the linear part x/σ of the flow exactly and D as
a polynomial in ln σ, here of degree one.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from downscaling.diffusion.schedules import Schedule
from downscaling.runtime import random_keys
from downscaling.sampling.resampling import Resampling

Denoise = Callable[[jax.Array, jax.Array], jax.Array]

START = random_keys.stream("start")  # the "step" whose noise a member starts from


def noise(
  keys: jax.Array, step: jax.Array | int, shape: tuple[int, ...], dtype=jnp.float32
) -> jax.Array:
  """Standard normal [B, *shape], row i from fold_in(keys[i], step); keys: [B] typed PRNG keys."""
  return jax.vmap(
    lambda key: jax.random.normal(jax.random.fold_in(key, step), shape, dtype)
  )(keys)


def initial(
  keys: jax.Array,
  shape: tuple[int, ...],
  sigma_max: float,
) -> jax.Array:
  """Pure noise of standard deviation sigma_max to start from, [B, *shape]; σ_max must dwarf the
  data's std.
  """
  return jnp.asarray(sigma_max, jnp.float32) * noise(keys, START, shape)


def euler_maruyama(
  denoise: Denoise,
  x: jax.Array,
  levels: np.ndarray,
  keys: jax.Array,
  *,
  schedule: Schedule,
  last: Denoise | None = None,
  select: Resampling | None = None,
  values: int = 0,
) -> jax.Array:
  """Reverse SDE of the schedule in its own time t and scale s; first order. One denoiser call a
  step, and the last.

    d(sx) = [(ṡ/s + 2σ̇/σ) sx − 2s(σ̇/σ) D] dt + s √(2σσ̇) dW,  t descending

  (Song et al. 2021, arXiv:2011.13456, eq. 6, with Tweedie's (D − x)/σ² for the score.) The paper
  takes 256 steps with σ decaying exponentially. x is given and returned unscaled. select, values:
  see dpm_solver_pp_2m_sde.

  Raises: ValueError for levels that the schedule does not reach.
  """
  schedule.check_levels(levels)
  sigmas = jnp.asarray(levels, x.dtype)
  t = schedule.inverse(sigmas)
  scale = schedule.scale(t)
  sigma_rate, scale_rate = schedule.rates(t)
  dt = t[1:] - t[:-1]

  def step(carry, inputs):
    scaled, weights = carry
    k, dt, sigma, s, sigma_rate, scale_rate = inputs
    denoised = _call(denoise, scaled / s, sigma)
    if select is not None:
      denoised, score = denoised
      weights = select.weigh(weights, score, values, sigma)
      weights, (scaled, denoised) = select.select(keys, k, weights, (scaled, denoised))
    drift = (scale_rate + 2 * sigma_rate) * scaled - 2 * s * sigma_rate * denoised
    spread = s * sigma * jnp.sqrt(2 * sigma_rate * -dt)
    return (
      scaled + drift * dt + spread * noise(keys, k, x.shape[1:], x.dtype),
      weights,
    ), None

  steps = (
    jnp.arange(len(dt)),
    dt,
    sigmas[:-1],
    scale[:-1],
    sigma_rate[:-1],
    scale_rate[:-1],
  )
  weights = None if select is None else select.start(len(x))
  (scaled, _), _ = jax.lax.scan(step, (x * scale[0], weights), steps)
  return _call(last or denoise, scaled / scale[-1], sigmas[-1])


def heun(
  denoise: Denoise,
  x: jax.Array,
  levels: np.ndarray,
  keys: jax.Array | None = None,
  *,
  churn: float = 0.0,
  noise_factor: float = 1.0,
  last: Denoise | None = None,
) -> jax.Array:
  """Heun's method on the flow; second order. Two denoiser calls a step, and the last.

  With churn > 0 each step first adds noise, σ -> σ(1 + γ), γ = min(churn/steps, √2 − 1) (Karras et
  al. 2022, Algorithm 2 with S_churn = churn, S_noise = noise_factor at all levels); then keys are
  needed.
  """
  check_noise_factor(noise_factor)
  if churn > 0 and keys is None:
    raise ValueError(
      f"heun with churn={churn:g} draws noise: hand in keys, [B], one a member; or set churn=0."
    )
  sigmas = jnp.asarray(levels, x.dtype)
  gamma = churned(churn, len(sigmas) - 1)

  def step(x, inputs):
    k, sigma, below = inputs
    if gamma > 0:
      assert keys is not None
      above = sigma * (1 + gamma)
      x = x + noise_factor * jnp.sqrt(above**2 - sigma**2) * noise(
        keys, k, x.shape[1:], x.dtype
      )
      sigma = above
    slope = (x - _call(denoise, x, sigma)) / sigma
    guess = x + (below - sigma) * slope
    slope_below = (guess - _call(denoise, guess, below)) / below
    return x + (below - sigma) * (slope + slope_below) / 2, None

  x, _ = jax.lax.scan(
    step,
    x,
    (jnp.arange(len(sigmas) - 1), sigmas[:-1], sigmas[1:]),
  )
  return _call(last or denoise, x, sigmas[-1])


def churned(churn: float, steps: int) -> float:
  """γ: by which share a step of `heun` raises its noise level first."""
  return min(churn / steps, 2**0.5 - 1)


def dpm_solver_pp_2m(
  denoise: Denoise,
  x: jax.Array,
  levels: np.ndarray,
  keys: jax.Array | None = None,
  *,
  last: Denoise | None = None,
) -> jax.Array:
  """DPM-Solver++(2M) on the flow (Lu et al. 2022, arXiv:2211.01095); second order. One call a step,
  and the last.

  The flow draws nothing: keys are not used.
  """
  return _multistep(denoise, x, levels, None, 0.0, last)


def dpm_solver_pp_2m_sde(
  denoise: Denoise,
  x: jax.Array,
  levels: np.ndarray,
  keys: jax.Array,
  *,
  eta: float = 1.0,
  noise_factor: float = 1.0,
  last: Denoise | None = None,
  select: Resampling | None = None,
  values: int = 0,
) -> jax.Array:
  """The same with noise: from σ = s to t, h = ln(s/t), E = 1 − e^{−(1+η)h},

    x ← (t/s) e^{−ηh} x + E [D + (h/2h_last)(D − D_last)] + f t √(1 − e^{−2ηh}) z

  η = 0 is the flow, η = 1 the usual reverse SDE (Song et al. 2021); a larger η forgets more of each
  step's error. One denoiser call a step, and the last.

  noise_factor: f, 1 for an exact D. A network takes small scales away with the noise, a little in
  each step, and what is gone does not come back; with f > 1 x is noisier than D is told, and D
  leaves more standing (S_noise of Karras et al. 2022). The flow (η = 0) draws no noise and knows no
  f. f is fitted on spectra or spread over error of held-out fields, for a prior and its solver.

  select: resampling among the members of a condition, for which denoise returns (D, χ²/d′); values:
  d′. It needs η > 0: without noise, copies of a member stay copies.
  """
  if eta < 0:
    raise ValueError(
      f"eta={eta:g}: need >= 0; 0 is the deterministic flow, 1 the reverse SDE."
    )
  check_noise_factor(noise_factor)
  if eta > 0 and keys is None:
    raise ValueError(
      f"dpm_solver_pp_2m_sde with eta={eta:g} draws noise: hand in keys, [B], one a member; or set "
      "eta=0."
    )
  if select is not None and eta == 0:
    raise ValueError(
      "resampling with eta=0: copies of a member would stay copies. Set eta=1 or more, or "
      "strength=0."
    )
  return _multistep(
    denoise,
    x,
    levels,
    keys if eta > 0 else None,
    eta,
    last,
    noise_factor,
    select,
    values,
  )


def check_noise_factor(factor: float) -> None:
  """Raises ValueError unless 0 < factor < ∞."""
  if not 0 < factor < float("inf"):
    raise ValueError(
      f"a factor of {factor:g} on the noise of a step (config.sampling.solver.noise): need a "
      "number > 0; 1 for an exact denoiser, 1.0 to 1.1 for a network."
    )


def _multistep(
  denoise, x, levels, keys, eta, last, noise_factor=1.0, select=None, values=0
):
  levels = jnp.asarray(levels, x.dtype)
  h = jnp.log(levels[:-1] / levels[1:])
  carry_on = jnp.concatenate(
    [
      jnp.zeros_like(h[:1]),
      h[1:] / (2 * h[:-1]),
    ]
  )  # the first step has no last D

  def step(carry, inputs):
    x, last_denoised, weights = carry
    k, sigma, below, h, weight = inputs
    denoised = _call(denoise, x, sigma)
    if select is not None:
      denoised, score = denoised
      weights = select.weigh(weights, score, values, sigma)
      weights, (x, denoised, last_denoised) = select.select(
        keys, k, weights, (x, denoised, last_denoised)
      )
    target = denoised + weight * (denoised - last_denoised)
    x = below / sigma * jnp.exp(-eta * h) * x - jnp.expm1(-(1 + eta) * h) * target
    if keys is not None:
      x = x + noise_factor * below * jnp.sqrt(-jnp.expm1(-2 * eta * h)) * noise(
        keys, k, x.shape[1:], x.dtype
      )
    return (x, denoised, weights), None

  inputs = (jnp.arange(len(h)), levels[:-1], levels[1:], h, carry_on)
  weights = None if select is None else select.start(len(x))
  (x, _, _), _ = jax.lax.scan(
    step,
    (x, jnp.zeros_like(x), weights),
    inputs,
  )
  return _call(last or denoise, x, levels[-1])


def _call(denoise: Denoise, x: jax.Array, sigma: jax.Array) -> jax.Array:
  return denoise(x, jnp.broadcast_to(sigma, x.shape[:1]))
