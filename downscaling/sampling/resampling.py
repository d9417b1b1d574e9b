"""Resampling among the members of one condition: implausible members are replaced by others.

Before guidance, D(x, σ) of a member in the wrong mode misses y′ by more than its error allows:

    χ² = rᵀA⁻¹r,  r = y′ − C′D(x, σ),  s = max(1, min χ²/d′)
    log w −= strength · max(χ²/s − dead_zone·d′, 0)

This holds for d′ ≤ 24 values of a coarse field; for more see below. When the effective size 1/Σw²
of a condition's members falls to ENOUGH of them, they are drawn again in proportion to w
(systematic resampling) and all w become equal; the noise of the step then separates the copies. The
dead zone spares members that are as uncertain as they should be. For a Gaussian field χ² has mean
d′ and standard deviation √(2d′), so 1.6 (d′ = 24) would leave it alone. But if y′ leaves much open,
D knows some states less well than others, and 1.6 would remove those from a right ensemble; hence
ZONE.

s is the misfit of a condition's best member. If y′ lies outside what the prior knows, as debiased
fields do a little, all members miss it; without s they would become copies of one. docs/method.md
has figures.

With more coarse values, χ²/d′ of right members concentrates about 1, with standard deviation
√(2/d′). The values measured at d′ = 24 are carried over in that unit, z = (χ²/d′ − 1)/√(2/d′): for
any d′ > 24 too, log w falls by .87 per unit of z beyond z = 6.9 (strength 1/8, dead zone 3):

    dead_zone(d′) = 1 + (dead_zone − 1) √(24/d′),   strength(d′) = strength √(24/d′)

Unscaled, at 32² = 1024 values, 3 and 1/8 would pass a member that is off by 45 standard deviations,
and take 5.7 from log w for each one beyond, at every step. A network's error covariance is never
accurate to that many nats, so small differences in χ² must not decide.

A member without a score (its D is not finite) has weight 0 from then on, and the others are weighed
without it. If no member of a condition has a score, nothing is resampled there.

Members of a condition depend on each other, so a block of members is the unit that can be drawn
again. The block draws its selection from the key of its first member, folded with the step.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from downscaling.runtime import random_keys

# Coarse values (of KS) for which strength and dead_zone are stated; fewer are treated alike.
REFERENCE = 24
# at ½, up to half of the members may weigh nothing to the end: error, CRPS and spread were worse on
# KS
ENOUGH = 0.75
# dead zone in units of d′, measured on KS: smaller ones take members that are right
# (docs/method.md)
ZONE = 3.0


@dataclasses.dataclass(frozen=True)
class Resampling:
  """Options of resampling.

  members: M of a condition, adjacent rows of a batch. strength: > 0. dead_zone: >= 1, in units of
  d′, for d′ ≤ 24. below: noise level under which members are weighed; above it D is vague and the
  selection would be random.

  Raises: ValueError for values that select nothing or everything.
  """

  members: int
  strength: float
  dead_zone: float = ZONE
  below: float = math.inf

  def __post_init__(self):
    if self.members < 2:
      raise ValueError(
        f"resampling among {self.members} member: need 2 or more a unit (sampling.unit), or "
        "strength 0."
      )
    if not (self.strength > 0 and self.dead_zone >= 1 and self.below > 0):
      raise ValueError(
        f"resampling with strength={self.strength:g}, dead_zone={self.dead_zone:g}, "
        f"below={self.below:g}: need strength > 0 (about 1/8), below > 0 and dead_zone >= 1 (about "
        f"{ZONE:g}): less drains the spread of a right ensemble."
      )

  def start(self, rows: int) -> jax.Array:
    """Log weights [B/M, M] of equal members. Raises ValueError unless M divides the rows."""
    if rows % self.members:
      raise ValueError(
        f"{rows} rows are no whole conditions of {self.members} members: make the batch a multiple."
      )
    return jnp.zeros((rows // self.members, self.members), jnp.float32)

  def weigh(
    self,
    log_weights: jax.Array,
    score: jax.Array,
    values: int,
    sigma: jax.Array | float,
  ) -> jax.Array:
    """Log weights after a step at level sigma, []. score: χ²/d′ [B]; values: d′."""
    score = score.reshape(log_weights.shape).astype(jnp.float32)
    known = jnp.isfinite(score)
    best = jnp.where(known, score, jnp.inf).min(axis=1, keepdims=True)
    score = jnp.where(known, score / jnp.maximum(best, 1), 0)
    share = min(1.0, math.sqrt(REFERENCE / values))
    zone = 1 + (self.dead_zone - 1) * share
    excess = jnp.maximum(score - zone, 0) * values
    strength = jnp.where(sigma < self.below, self.strength * share, 0)
    log_weights = log_weights - strength * excess
    log_weights = jnp.where(known, log_weights, -jnp.inf)
    heaviest = log_weights.max(axis=1, keepdims=True)
    return jnp.where(jnp.isfinite(heaviest), log_weights - heaviest, 0)

  def select(
    self, keys: jax.Array, step: jax.Array, log_weights: jax.Array, rows: Any
  ) -> tuple[jax.Array, Any]:
    """Resamples the members of every condition that is due; returns (log weights, rows).

    Args:
      keys: of the members, [B]. step: [], its number.
      rows: tree of [B, ...] that belong to the members.
    """

    def place_of(key):
      stream = jax.random.fold_in(key, random_keys.stream("selection"))
      return jax.random.uniform(jax.random.fold_in(stream, step))

    place = jax.vmap(place_of)(keys[:: self.members])
    share = jax.nn.softmax(log_weights, axis=1)
    # The margin is for rounding: a quarter of the members gone is due.
    due = 1 / (share**2).sum(axis=1) < ENOUGH * self.members + 1e-3
    stay = jnp.arange(self.members)
    drawn = jax.vmap(_systematic)(share, place)
    chosen = jnp.where(due[:, None], drawn, stay[None])

    def pick(x):
      split = x.reshape(*log_weights.shape, *x.shape[1:])
      return jax.vmap(lambda block, index: block[index])(split, chosen).reshape(x.shape)

    log_weights = jnp.where(due[:, None], jnp.zeros_like(log_weights), log_weights)
    return log_weights, jax.tree.map(pick, rows)


def _systematic(share: jax.Array, place: jax.Array) -> jax.Array:
  """Indices [M]: member i is drawn ⌊M share_i⌋ or ⌈M share_i⌉ times.

  place: in [0, 1), shifts the comb of M equally spaced draws.
  """
  members = share.shape[0]
  comb = (jnp.arange(members) + place) / members
  found = jnp.searchsorted(jnp.cumsum(share), comb, side="right")
  return jnp.minimum(found, members - 1)
