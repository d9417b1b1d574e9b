"""One pure function that draws fields from a prior: where to start, which guidance, which solver,
who stays.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from downscaling.sampling import gaussian_gain, guidance, solvers
from downscaling.sampling.resampling import Resampling

STARTS = ("noise", "gaussian")
SELECTING = ("euler_maruyama", "dpm_solver_pp_2m_sde")  # solvers that draw noise and take `select`
# rms of a field over the data's standard deviation, beyond which it is a runaway and not a field
DIVERGED = 100.0


class Soft(NamedTuple):
  """What a sampler takes in place of the prior's parameters where y′ is not exact: C′x = y′ + ε.

  params: of the prior. error: the variance of ε by coarse mode, of normalised fields; see
  Gain.error. It is an operand, so that the sets of a job that differ in it alone share one program.
  """

  params: Any
  error: jax.Array


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What `sampler` puts together. All fields are of unit variance; normalise and restore lead there
  and back.

  Attributes:
    denoise: (parameters, x [B, *space, C], σ [B]) -> D.
    shape: of a field, (*space, C).
    levels, high: noise levels with a condition, and without.
    solve: a solver of sampling/solvers.py with its options.
    start: "gaussian": gain.gaussian_start by `prior`; "noise": noise of σ = levels[0] alone.
    prior: gain on the spectrum's variance.
    guide: gain that guidance goes by and misfits are scored by; None: none is at hand, and
      conditions are refused.
    guidance: name and options, for guidance.make.
    select: resampling among members, or None.
    spread: factor on the members' distance from the mean of their block; 1 leaves them as drawn.
      See `rescale`.
    members: M, of a condition in a batch.
    missing: what to say when `guide` is None.
  """

  denoise: Callable
  shape: tuple[int, ...]
  levels: np.ndarray
  high: np.ndarray
  solve: Callable
  start: str
  prior: gaussian_gain.Gain
  guide: gaussian_gain.Gain | None
  guidance: dict[str, Any]
  select: Resampling | None
  spread: float
  members: int
  normalise: Callable
  restore: Callable
  missing: str = ""


def sampler(recipe: Recipe) -> Callable:
  """(keys [B], y [B, *coarse, C] or None, parameters) -> (fields [B, *space, C], misfit [B]), in
  data units.

  B = conditions × members, members of a condition adjacent; misfit: χ²/d′ = rᵀ(A + R)⁻¹r/d′ of r =
  y′ − C′D at the lowest noise level, D unguided: 1 where y′ is as far off as the prior expects,
  larger where it lies outside what the prior knows; NaN without a condition. Fields beyond DIVERGED
  are NaN: whoever writes fields marks those as failed.
  """
  r = recipe
  if r.start not in STARTS:
    raise ValueError(f"config.sampling.start={r.start!r} is unknown; use {' or '.join(STARTS)}.")
  if not 0 < r.spread < math.inf or (r.spread != 1 and r.members < 2):
    raise ValueError(
      f"config.sampling.spread={r.spread:g} for {r.members} member(s) a unit: need a factor > 0 on "
      "the members' distance from their mean, and two members (sampling.unit); 1 leaves them as "
      "drawn."
    )

  def unconditional(keys, denoise):
    x = solvers.initial(
      keys, r.shape, float(r.high[0])
    )  # nothing is known but the law: from far above the data
    return r.restore(in_range(r.solve(denoise, x, r.high, keys))), jnp.full(
      len(keys), jnp.nan, jnp.float32
    )

  def draw(keys, y, params):
    prior, guide = r.prior, r.guide
    if isinstance(params, Soft):
      params, error = params
      prior = dataclasses.replace(prior, error=error)
      guide = guide and dataclasses.replace(guide, error=error)

    def denoise(x, sigma):
      return r.denoise(params, x, sigma)

    if y is None:
      return unconditional(keys, denoise)
    if guide is None:
      raise FileNotFoundError(r.missing)
    y = r.normalise(y)
    guided = guidance.make(
      denoise=denoise, operator=prior.operator, y=y, gain=guide, one_level=True, **r.guidance
    )
    if r.start == "gaussian":
      x = gaussian_gain.gaussian_start(keys, prior, y, float(r.levels[0]))
    else:
      x = solvers.initial(keys, r.shape, float(r.levels[0]))
    step, among = guided.denoise, {}
    if r.select is not None:
      step, among = guided.scored, {"select": r.select, "values": y[0].size}
    fields, misfit = r.solve(step, x, r.levels, keys, last=guided.last_scored, **among)
    return r.restore(rescale(in_range(fields), r.members, r.spread)), misfit

  return draw


def in_range(fields: jax.Array) -> jax.Array:
  """Normalised fields [B, *space, C], those NaN whose rms is beyond DIVERGED: a solver may run away
  and stay finite.
  """
  square = jnp.square(fields).mean(axis=tuple(range(1, fields.ndim)), keepdims=True)
  return jnp.where(square <= DIVERGED**2, fields, jnp.nan)


def rescale(fields: jax.Array, members: int, factor: float) -> jax.Array:
  """m + factor·(x − m) about the mean m of each block of members, fields [B, ...]; C′x = y′ holds
  as before.

  A member that failed, NaN throughout, stays so and has no part in the mean.

  Where y′ leaves almost nothing open, members differ by the sampler's own error, drawn anew for
  each: their mean is nearer to the truth than their spread says. The factor that makes spread and
  error equal is fitted on held-out conditions, for one operator, number of members and prior:
  1/(spread over error), as benchmarks/sampling.py prints it.
  """
  if factor == 1:
    return fields
  blocks = fields.reshape(-1, members, *fields.shape[1:])
  there = jnp.isfinite(blocks).all(axis=tuple(range(2, blocks.ndim)), keepdims=True)
  count = jnp.maximum(there.sum(axis=1, keepdims=True), 1)
  mean = jnp.where(there, blocks, 0).sum(axis=1, keepdims=True) / count
  return (mean + factor * (blocks - mean)).reshape(fields.shape)
