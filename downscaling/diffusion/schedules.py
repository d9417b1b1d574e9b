"""Noise schedules: σ(t), its inverse and the scale s(t), and the noise levels to train on and to
sample along.

    x_t = s_t (x₀ + σ_t ε),  t in [0, 1],  σ growing from about 0

Variance preserving: s = σ_d / √(σ_d² + σ²), so that x_t keeps the variance σ_d² of the data;
exploding: s = 1 (Wan et al. 2023, arXiv:2305.15618; Karras et al. 2022, arXiv:2206.00364, Table 1).
σ carries the unit of the data.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

ROUNDING = 1e-5  # relative, of a level in float32


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
  """An invertible pair σ(t), t(σ) with its scale.

  Attributes:
    name: of the factory, for messages.
    curve, curve_inverse: σ(t) and t(σ), elementwise on any shape.
    sigma_min: smallest σ to train on or sample at, > 0; σ(0) itself may be 0.
    sigma_max: σ(1).
    data_std: σ_d of a variance preserving scale; None for an exploding one, s = 1.
  """

  name: str
  curve: Callable[[jax.Array], jax.Array]
  curve_inverse: Callable[[jax.Array], jax.Array]
  sigma_min: float
  sigma_max: float
  data_std: float | None

  def __post_init__(self):
    if self.data_std is not None and not self.data_std > 0:
      raise ValueError(
        f"schedule {self.name}: data_std={self.data_std} must be > 0; it is 1 for normalised data."
      )
    if not 0 < self.sigma_min < self.sigma_max:
      raise ValueError(
        f"schedule {self.name}: sigma_min={self.sigma_min:g} must lie above 0 and below "
        f"sigma_max={self.sigma_max:g}."
      )

  def sigma(self, t: jax.Array) -> jax.Array:
    """σ(t) >= sigma_min, any shape."""
    return jnp.maximum(self.curve(jnp.asarray(t)), self.sigma_min)

  def inverse(self, sigma: jax.Array) -> jax.Array:
    """t(σ), any shape, of 0 <= σ <= sigma_max; NaN beyond, as no t has such a σ.

    See check_levels.
    """
    sigma = jnp.asarray(sigma)
    inside = (sigma >= 0) & (sigma <= self.sigma_max * (1 + ROUNDING))
    return jnp.where(
      inside, self.curve_inverse(jnp.clip(sigma, 0.0, self.sigma_max)), jnp.nan
    )

  def check_levels(self, levels: np.ndarray, key: str = "noise levels") -> None:
    """Refuses noise levels that nothing was trained on, and that s(t) has no time for.

    Args:
      levels: numbers, any shape. key: what to call them, a config key if they come from one.
    Raises: ValueError unless sigma_min <= levels <= sigma_max, to float32's rounding.
    """
    levels = np.asarray(levels, np.float64)
    low, high = float(levels.min()), float(levels.max())
    if self.sigma_min * (1 - ROUNDING) <= low and high <= self.sigma_max * (
      1 + ROUNDING
    ):
      return
    raise ValueError(
      f"{key} from {low:g} to {high:g}, but the schedule {self.name} knows {self.sigma_min:g} to "
      f"{self.sigma_max:g}: the prior was trained on those alone. Sample within them, or train "
      "with a wider config.schedule."
    )

  def scale(self, t: jax.Array) -> jax.Array:
    """s(t), any shape; that of the unclipped σ."""
    t = jnp.asarray(t)
    if self.data_std is None:
      return jnp.ones_like(t)
    return self.data_std / jnp.sqrt(self.data_std**2 + self.curve(t) ** 2)

  def rates(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(d ln σ/dt, d ln s/dt) of the unclipped curves, any shape, t > 0."""
    t = jnp.asarray(t)
    one = jnp.ones_like(t)
    sigma, sigma_dot = jax.jvp(self.curve, (t,), (one,))
    s, s_dot = jax.jvp(self.scale, (t,), (one,))
    return sigma_dot / sigma, s_dot / s


def vp_linear(
  beta_min: float = 0.1,
  beta_max: float = 20.0,
  data_std: float = 1.0,
  sigma_min: float = 1e-3,
) -> Schedule:
  """Variance preserving with linear β: σ = σ_d √(exp(½(β_max − β_min)t² + β_min t) − 1); σ_max ≈
  152 by default.

  Song et al. 2021, arXiv:2011.13456, eq. 33; the schedule of the paper's KS experiment.
  """
  if not 0 < beta_min < beta_max:
    raise ValueError(
      f"beta_min={beta_min}, beta_max={beta_max}: need 0 < beta_min < beta_max, or σ(t) has no "
      "inverse."
    )
  slope = beta_max - beta_min

  def inverse(sigma):
    area = jnp.log1p(
      (sigma / data_std) ** 2
    )  # ∫β; the root is written so that small σ loses no digits
    return 2 * area / (beta_min + jnp.sqrt(beta_min**2 + 2 * slope * area))

  return Schedule(
    "vp_linear",
    lambda t: data_std * jnp.sqrt(jnp.expm1(slope * t**2 / 2 + beta_min * t)),
    inverse,
    sigma_min,
    data_std * math.sqrt(math.expm1(slope / 2 + beta_min)),
    data_std,
  )


def tangent(
  sigma_max: float = 100.0,
  start: float = -1.5,
  end: float = 1.5,
  data_std: float = 1.0,
  sigma_min: float = 1e-3,
  preserving: bool = True,
) -> Schedule:
  """σ = σ_max (tan θ − tan θ₀)/(tan θ₁ − tan θ₀), θ going evenly from `start` to `end` (radians,
  within ±π/2).
  """
  if not -math.pi / 2 < start < end < math.pi / 2:
    raise ValueError(
      f"tangent schedule from {start} to {end}: need -π/2 < start < end < π/2."
    )
  low, height = math.tan(start), math.tan(end) - math.tan(start)
  width = end - start

  # tan differences by their product form: the plain ones lose three digits at small σ in float32.
  def curve(t):
    return (
      sigma_max
      * jnp.sin(t * width)
      / (jnp.cos(start + t * width) * (math.cos(start) * height))
    )

  def inverse(sigma):
    v = sigma * (height / sigma_max)
    return jnp.arctan2(v, 1 + low * (low + v)) / width

  return Schedule(
    "tangent",
    curve,
    inverse,
    sigma_min,
    sigma_max,
    data_std if preserving else None,
  )


def power(
  sigma_max: float = 100.0, exponent: float = 3.0, data_std: float = 1.0, sigma_min: float = 1e-3,
  preserving: bool = True,
) -> Schedule:  # fmt: skip
  """σ = σ_max t^exponent."""
  if not exponent > 0:
    raise ValueError(
      f"power schedule with exponent={exponent}: need > 0, for σ must grow with t."
    )
  return Schedule(
    "power",
    lambda t: sigma_max * t**exponent,
    lambda sigma: (sigma / sigma_max) ** (1 / exponent),
    sigma_min,
    sigma_max,
    data_std if preserving else None,
  )


def exponential(
  sigma_max: float = 100.0,
  rate: float = 8.0,
  data_std: float = 1.0,
  sigma_min: float = 1e-3,
  preserving: bool = True,
) -> Schedule:
  """σ = σ_max (e^{rate·t} − 1)/(e^{rate} − 1): even in ln σ for large rate·t, and 0 at t = 0."""
  if not rate > 0:
    raise ValueError(
      f"exponential schedule with rate={rate}: need > 0, for σ must grow with t."
    )
  height = math.expm1(rate)
  return Schedule(
    "exponential",
    lambda t: sigma_max * jnp.expm1(rate * t) / height,
    lambda sigma: jnp.log1p(sigma * (height / sigma_max)) / rate,
    sigma_min,
    sigma_max,
    data_std if preserving else None,
  )


def edm(sigma_max: float = 80.0, sigma_min: float = 2e-3) -> Schedule:
  """Variance exploding with σ the time itself, in units of σ_max: σ = σ_max t, s = 1 (Karras et al.
  2022).
  """
  return Schedule(
    "edm",
    lambda t: sigma_max * t,
    lambda sigma: sigma / sigma_max,
    sigma_min,
    sigma_max,
    None,
  )


def training_sigmas(
  key: jax.Array,
  batch: int,
  schedule: Schedule,
  kind: str = "uniform_time",
  *,
  mean: float = -1.2,
  std: float = 1.2,
) -> jax.Array:
  """Noise levels to train on, [batch], within [sigma_min, sigma_max].

  One draw a stratum, u_i uniform in [i, i+1)/batch: every batch sees all levels. Then

    uniform_time   σ(u)                                        (the paper's)
    log_uniform    ln σ even between ln sigma_min and ln sigma_max
    log_normal     ln σ ~ N(mean, std²)                        (Karras et al. 2022, Table 1)

  Raises: ValueError for another kind.
  """
  u = (jnp.arange(batch) + jax.random.uniform(key, (batch,))) / batch
  low, high = schedule.sigma_min, schedule.sigma_max
  if kind == "uniform_time":
    sigma = schedule.sigma(u)
  elif kind == "log_uniform":
    sigma = low * (high / low) ** u
  elif kind == "log_normal":
    tiny = jnp.finfo(u.dtype).eps
    sigma = jnp.exp(mean + std * jax.scipy.special.ndtri(jnp.clip(u, tiny, 1 - tiny)))
  else:
    raise ValueError(
      f"training noise {kind!r} is unknown; use uniform_time, log_uniform or log_normal."
    )
  return jnp.clip(sigma, low, high)


def levels(
  name: str, steps: int, sigma_max: float, sigma_min: float, rho: float = 7.0
) -> np.ndarray:
  """Noise levels to sample along, descending from sigma_max to sigma_min, [steps + 1] float32.

    exponential   σ_k = σ_max (σ_min/σ_max)^{k/steps}           (the paper's)
    edm           σ_k = (σ_max^{1/ρ} + k/steps (σ_min^{1/ρ} − σ_max^{1/ρ}))^ρ (Karras et al. 2022,
                  eq. 5)

  A third kind goes by the prior and the operator: sampling.gaussian_gain.levels.

  Raises: ValueError for another name, steps < 1, or levels that do not descend.
  """
  if steps < 1 or not 0 < sigma_min < sigma_max:
    raise ValueError(
      f"{steps} steps from sigma {sigma_max:g} to {sigma_min:g}: need steps >= 1 and sigma_max > "
      "sigma_min > 0."
    )
  share = np.linspace(0.0, 1.0, steps + 1)
  if name == "exponential":
    grid = sigma_max * (sigma_min / sigma_max) ** share
  elif name == "edm":
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    grid = (high + share * (low - high)) ** rho
  else:
    raise ValueError(
      f"noise levels {name!r} are unknown; use exponential or edm, or guided for conditional "
      "samples."
    )
  return grid.astype(np.float32)
