"""Schedules: the pairs invert each other, derivatives and limits are right, training levels fill
their strata.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from downscaling.diffusion import schedules

ALL = [
  schedules.vp_linear(),
  schedules.vp_linear(data_std=0.3),
  schedules.tangent(),
  schedules.power(),
  schedules.exponential(preserving=False),
  schedules.edm(),
]
NAMES = [f"{s.name}-{s.data_std}" for s in ALL]


@pytest.mark.parametrize("schedule", ALL, ids=NAMES)
def test_pairs_invert_each_other(schedule):
  sigma = jnp.asarray(
    np.geomspace(max(schedule.sigma_min, 1e-2), schedule.sigma_max, 50), jnp.float32
  )
  back = schedule.sigma(schedule.inverse(sigma))
  # Float32, worst for tan at its steep ends (1e-5). Plain differences of tangents miss by 5e-2 at
  # small σ; a missing ½ in ∫β or a missing data_std by more.
  np.testing.assert_allclose(back, sigma, rtol=1e-4)


@pytest.mark.parametrize("schedule", ALL, ids=NAMES)
def test_ends(schedule):
  np.testing.assert_allclose(
    schedule.sigma(jnp.asarray(1.0)), schedule.sigma_max, rtol=1e-5
  )
  assert float(schedule.sigma(jnp.asarray(0.0))) == pytest.approx(
    schedule.sigma_min
  )  # clipped, never 0


def test_vp_linear_has_the_known_largest_sigma():
  assert schedules.vp_linear().sigma_max == pytest.approx(
    152.17, abs=0.01
  )  # √(e^10.05 − 1), paper.md section 3


@pytest.mark.parametrize("schedule", ALL, ids=NAMES)
def test_scale_keeps_or_leaves_the_variance(schedule):
  t = jnp.linspace(0.05, 1, 20)
  if schedule.data_std is None:
    assert (schedule.scale(t) == 1).all()
  else:  # Var x_t = s² (σ_d² + σ²) = σ_d²; float32
    var = schedule.scale(t) ** 2 * (schedule.data_std**2 + schedule.curve(t) ** 2)
    np.testing.assert_allclose(var, schedule.data_std**2, rtol=1e-5)


@pytest.mark.parametrize(
  "make",
  [schedules.vp_linear, schedules.tangent, schedules.power, schedules.exponential],
)
def test_rates_are_the_derivatives(x64, make):
  schedule = make()
  t, d = jnp.linspace(0.1, 0.9, 9), 1e-5
  log_sigma = lambda t: jnp.log(schedule.curve(t))
  log_scale = lambda t: jnp.log(schedule.scale(t))
  got = schedule.rates(t)
  # Central differences: error O(d²) ~ 1e-10 × third derivative (≤ 1e4 here), in float64.
  for value, f in zip(got, (log_sigma, log_scale), strict=True):
    np.testing.assert_allclose(
      value, (f(t + d) - f(t - d)) / (2 * d), rtol=1e-5, atol=1e-7
    )


def test_vp_linear_scale_decays_at_half_beta(x64):
  """The forward SDE of β is dx = −½βx dt + √β dW: d ln s/dt = −β/2, and s²·2σσ̇ = β."""
  schedule, t = schedules.vp_linear(), jnp.linspace(0.05, 1, 20)
  beta = 0.1 + t * 19.9
  sigma_rate, scale_rate = schedule.rates(t)
  np.testing.assert_allclose(scale_rate, -beta / 2, rtol=1e-9)
  np.testing.assert_allclose(
    2 * schedule.scale(t) ** 2 * schedule.curve(t) ** 2 * sigma_rate, beta, rtol=1e-9
  )


@pytest.mark.parametrize("kind", ["uniform_time", "log_uniform"])
def test_training_levels_fill_every_stratum_once(kind):
  schedule, batch = schedules.vp_linear(), 64
  sigma = schedules.training_sigmas(jax.random.key(0), batch, schedule, kind)
  assert sigma.shape == (batch,)
  assert sigma.dtype == jnp.float32
  if kind == "uniform_time":
    u = schedule.inverse(sigma)
  else:
    u = jnp.log(sigma / schedule.sigma_min) / np.log(
      schedule.sigma_max / schedule.sigma_min
    )
  # Half a hundredth of a stratum for float32. Independent draws would leave about 37 % of the
  # strata empty.
  strata = np.asarray(u) * batch
  assert (strata >= np.arange(batch) - 0.005).all()
  assert (strata <= np.arange(batch) + 1.005).all()


def test_log_normal_levels_have_the_asked_moments():
  sigma = schedules.training_sigmas(
    jax.random.key(1), 4096, schedules.edm(), "log_normal", mean=-1.0, std=0.8
  )
  # Stratified: the error is far below the 0.8/√4096 = .013 of independent draws.
  assert float(jnp.log(sigma).mean()) == pytest.approx(-1.0, abs=2e-3)
  assert float(jnp.log(sigma).std()) == pytest.approx(0.8, abs=5e-3)


@pytest.mark.parametrize("kind", ["uniform_time", "log_uniform", "log_normal"])
def test_training_levels_stay_in_range(kind):
  schedule = schedules.edm(sigma_max=2.0, sigma_min=0.1)
  sigma = schedules.training_sigmas(jax.random.key(2), 512, schedule, kind)
  assert float(sigma.min()) >= np.float32(0.1)
  assert float(sigma.max()) <= 2.0


def test_levels():
  grid = schedules.levels("exponential", 256, 80.0, 1e-3)
  assert grid.shape == (257,)
  assert grid.dtype == np.float32
  np.testing.assert_allclose(grid[[0, -1]], [80.0, 1e-3], rtol=1e-6)
  np.testing.assert_allclose(
    grid[1:] / grid[:-1], (1e-3 / 80) ** (1 / 256), rtol=1e-5
  )  # one ratio throughout
  edm = schedules.levels("edm", 18, 80.0, 0.002, rho=7)
  # Karras et al.'s own grid of 18 levels begins 80, 57.586; theirs counts levels, ours steps: 17
  # steps.
  assert schedules.levels("edm", 17, 80.0, 0.002, rho=7)[1] == pytest.approx(
    57.586, abs=1e-3
  )
  assert (np.diff(edm) < 0).all()


@pytest.mark.parametrize(
  ("call", "words"),
  [
    (
      lambda: schedules.vp_linear().check_levels([0.1, 200.0]),
      "from 0.1 to 200, but the schedule vp_linear knows",
    ),
    (
      lambda: schedules.edm().check_levels([1e-3, 1.0], "sampling.levels"),
      "sampling.levels from 0.001 to 1, but",
    ),
    (lambda: schedules.levels("cosine", 4, 1.0, 0.1), "exponential or edm"),
    (lambda: schedules.levels("edm", 0, 1.0, 0.1), "steps >= 1"),
    (lambda: schedules.levels("edm", 4, 0.1, 1.0), "sigma_max > sigma_min"),
    (lambda: schedules.vp_linear(beta_min=0.0), "beta_min"),
    (lambda: schedules.edm(sigma_min=0.0), "sigma_min=0"),
    (lambda: schedules.vp_linear(data_std=0.0), "data_std"),
    (
      lambda: schedules.training_sigmas(
        jax.random.key(0), 4, schedules.edm(), "uniform"
      ),
      "log_uniform",
    ),
  ],
)
def test_refusals_say_what_to_type(call, words):
  with pytest.raises(ValueError, match=words):
    call()


def test_levels_beyond_the_schedule_are_none():
  """What no time has: NaN under jit, where clipping gave another level's answer; the ends are
  within, to rounding.
  """
  schedule = schedules.vp_linear()
  ends = jnp.asarray([schedule.sigma_min, schedule.sigma_max], jnp.float32)
  assert np.isfinite(schedule.inverse(ends)).all()
  assert np.isnan(
    schedule.inverse(jnp.asarray([-1.0, 1.01 * schedule.sigma_max]))
  ).all()
  schedule.check_levels(np.asarray(ends))
