"""The sampler: one pure function that draws fields, made of a start, guidance and a solver."""

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
# Solvers that draw noise and take `select`.
SELECTING = ("euler_maruyama", "dpm_solver_pp_2m_sde")
# rms of a field over the data's standard deviation, beyond which it is a runaway and not a field
DIVERGED = 100.0


class Soft(NamedTuple):
  """What a sampler takes instead of the prior's parameters if y′ is not exact: C′x = y′ + ε.

  params: parameters of the prior. error: variance of ε by coarse mode, for normalised fields; see
  Gain.error. It is an operand, so sets that differ only in it share one compiled program.
  """

  params: Any
  error: jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class Recipe:
  """The parts of a sampler. Its fields have unit variance; normalise and restore convert units.

  Attributes:
    denoise: (parameters, x [B, *space, C], σ [B]) -> D.
    shape: of a field, (*space, C).
    levels, high: noise levels with a condition, and without.
    solve: a solver of sampling/solvers.py with its options.
    start: "gaussian": gain.gaussian_start by `prior`; "noise": pure noise of σ = levels[0].
    prior: gain on the spectrum's variance.
    guide: gain for guidance and for the score of misfits; None if there is none, and conditions are
      then refused.
    guidance: name and options, for guidance.make.
    select: resampling among members, or None.
    spread: factor on the members' distance from the mean of their block; 1 leaves them as drawn.
      See `rescale`.
    members: M, members of a condition in a batch.
    missing: error message if a condition comes and `guide` is None.
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
  """Builds draw(keys [B], y [B, *coarse, C] or None, parameters) -> (fields, misfit).

  Conditions and fields are in data units.

  B = conditions × members; the members of a condition are adjacent. fields: [B, *space, C]; a
  field beyond DIVERGED is NaN, and so marked as failed when written.
  misfit: [B], χ²/d′ = rᵀ(A + R)⁻¹r/d′ of r = y′ − C′D at the lowest noise level, D unguided. It is
  1 if y′ is as far off as the prior expects, larger if y′ lies outside what the prior knows, and
  NaN without a condition.
  Raises: ValueError for an unknown start or an impossible spread.
  """
  r = recipe
  if r.start not in STARTS:
    raise ValueError(
      f"config.sampling.start={r.start!r} is unknown; use {' or '.join(STARTS)}."
    )
  possible = 0 < r.spread < math.inf and (r.spread == 1 or r.members >= 2)
  if not possible:
    raise ValueError(
      f"config.sampling.spread={r.spread:g} for {r.members} member(s) a unit: need a factor > 0 on "
      "the members' distance from their mean, and two members (sampling.unit); 1 leaves them as "
      "drawn."
    )

  def unconditional(keys, denoise):
    # Only the law of the fields is known, so the start is far above the data.
    x = solvers.initial(keys, r.shape, float(r.high[0]))
    fields = r.restore(in_range(r.solve(denoise, x, r.high, keys)))
    return fields, jnp.full(len(keys), jnp.nan, jnp.float32)

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
      denoise=denoise,
      operator=prior.operator,
      y=y,
      gain=guide,
      one_level=True,
      **r.guidance,
    )
    if r.start == "gaussian":
      x = gaussian_gain.gaussian_start(keys, prior, y, float(r.levels[0]))
    else:
      x = solvers.initial(keys, r.shape, float(r.levels[0]))
    step, among = guided.denoise, {}
    if r.select is not None:
      step, among = guided.scored, {"select": r.select, "values": y[0].size}
    fields, misfit = r.solve(
      step,
      x,
      r.levels,
      keys,
      last=guided.last_scored,
      **among,
    )
    return r.restore(rescale(in_range(fields), r.members, r.spread)), misfit

  return draw


def in_range(fields: jax.Array) -> jax.Array:
  """Replaces runaway fields by NaN; a solver may run away and stay finite.

  Args: fields: normalised, [B, *space, C]; a runaway's rms exceeds DIVERGED.
  """
  axes = tuple(range(1, fields.ndim))
  square = jnp.square(fields).mean(axis=axes, keepdims=True)
  return jnp.where(square <= DIVERGED**2, fields, jnp.nan)


def rescale(fields: jax.Array, members: int, factor: float) -> jax.Array:
  """m + factor·(x − m) about the mean m of each block of members, [B, ...]; keeps C′x = y′.

  A failed member (all NaN) stays so and does not enter the mean.

  If y′ leaves almost nothing open, members differ by the sampler's own error, drawn anew for each;
  their mean is then closer to the truth than their spread says. The factor that makes spread and
  error equal is fitted on held-out conditions, for one operator, number of members and prior. It is
  1/(spread over error), as benchmarks/sampling.py prints it.
  """
  if factor == 1:
    return fields
  blocks = fields.reshape(-1, members, *fields.shape[1:])
  axes = tuple(range(2, blocks.ndim))
  there = jnp.isfinite(blocks).all(axis=axes, keepdims=True)
  count = jnp.maximum(there.sum(axis=1, keepdims=True), 1)
  mean = jnp.where(there, blocks, 0).sum(axis=1, keepdims=True) / count
  return (mean + factor * (blocks - mean)).reshape(fields.shape)
