"""Solvers against closed forms: order, the prior's spectrum, randomness by id."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from downscaling.diffusion import schedules
from downscaling.sampling import solvers

# Data std of a one-point Gaussian "field", and the range of σ.
S, HIGH, LOW = 0.7, 10.0, 0.1


def ideal(x, sigma):
  return x * (S**2 / (S**2 + sigma[:, None, None] ** 2))


def identity(x, sigma):
  return x


def order(steps, errors):
  return -np.polyfit(np.log(steps), np.log(np.abs(errors)), 1)[0]


@pytest.mark.parametrize("solver", [solvers.heun, solvers.dpm_solver_pp_2m])
def test_flows_are_second_order(x64, solver):
  """x₀ ~ N(0, S²): the flow from σ = HIGH to LOW multiplies x by √((S² + LOW²)/(S² + HIGH²))."""
  exact, steps = np.sqrt((S**2 + LOW**2) / (S**2 + HIGH**2)), [32, 64, 128]
  errors = []
  for n in steps:
    grid = HIGH * (LOW / HIGH) ** np.linspace(0, 1, n + 1)
    errors.append(
      float(solver(ideal, jnp.ones((1, 1, 1)), grid, last=identity)[0, 0, 0]) - exact
    )
  # Measured 2.01 (Heun), 2.0 (2M). A stale σ in Heun's corrector, or 2M without its last D,
  # measures 1.0.
  assert order(steps, errors) == pytest.approx(2, abs=0.15)


def variance(monkeypatch, solver, steps, grid, **options):
  """Exact variance of a linear sampler's result: row i starts from one unit draw of noise i alone,
  and squares add.
  """

  def one_hot(keys, step, shape, dtype):
    return jnp.where(jnp.arange(steps + 1) == step, 1.0, 0.0)[:, None, None].astype(
      dtype
    )

  monkeypatch.setattr(solvers, "noise", one_hot)
  start = jnp.where(jnp.arange(steps + 1) == steps, np.sqrt(S**2 + HIGH**2), 0.0)[
    :, None, None
  ]
  keys = jax.random.split(jax.random.key(0), steps + 1)
  return float((solver(ideal, start, grid, keys, last=identity, **options) ** 2).sum())


@pytest.mark.parametrize(
  ("name", "options", "expected"),
  [
    ("euler_maruyama", {"schedule": schedules.vp_linear()}, 1),
    ("euler_maruyama", {"schedule": schedules.edm()}, 1),
    ("dpm_solver_pp_2m_sde", {"eta": 1.0}, 2),
    ("dpm_solver_pp_2m_sde", {"eta": 2.5}, 2),
  ],
)
def test_weak_order_of_the_sdes(x64, monkeypatch, name, options, expected):
  """Started with the right variance S² + HIGH², the result must have S² + LOW²; no Monte Carlo in
  it.
  """
  steps, errors = [64, 128, 256], []
  for n in steps:
    grid = HIGH * (LOW / HIGH) ** np.linspace(0, 1, n + 1)
    errors.append(
      variance(monkeypatch, getattr(solvers, name), n, grid, **options)
      - (S**2 + LOW**2)
    )
  # Measured 1.02, 1.02, 1.99, 1.99. Noise of the wrong variance has order 0; D at a stale σ makes
  # the 2s 1.
  assert order(steps, errors) == pytest.approx(expected, abs=0.25)


@pytest.mark.parametrize(
  ("solver", "steps", "options"),
  [
    (solvers.euler_maruyama, 128, {"schedule": schedules.vp_linear()}),
    (solvers.heun, 24, {}),
    (solvers.heun, 32, {"churn": 4.0}),
    (solvers.dpm_solver_pp_2m, 32, {}),
    (solvers.dpm_solver_pp_2m_sde, 32, {"eta": 1.0}),
  ],
)
def test_unconditional_samples_have_the_priors_spectrum(
  gaussian, solver, steps, options
):
  field, members = gaussian((32,)), 4096
  keys = jax.random.split(jax.random.key(3), members)
  name = "exponential" if "schedule" in options else "edm"
  grid = schedules.levels(name, steps, 80.0, 1e-2)
  draw = jax.jit(
    lambda keys: solver(
      field.denoise, solvers.initial(keys, (32, 1), 80.0), grid, keys, **options
    )
  )
  modes = np.fft.rfft(np.asarray(draw(keys))[..., 0], axis=1, norm="ortho")
  ratio = (np.abs(modes) ** 2).mean(0) / field.spectrum[:17, 0]
  # One mode's variance is known to √(1/4096) = 1.6 % (2.2 % for the two real modes): 3 standard
  # errors, and 8 % for the bias of these step numbers (measured 4 to 8 %). A wrong noise term, or
  # no last call, shows as 20 % and more.
  np.testing.assert_allclose(ratio, 1, atol=0.06 + 0.08)


def test_a_noise_factor_undoes_a_blunt_denoiser(gaussian):
  """D told a level f times too high, all noise f times as strong: the sampler along levels f times
  as high, exactly.
  """
  field, f, keys = gaussian((16,)), 1.2, jax.random.split(jax.random.key(8), 6)
  grid, x = (
    schedules.levels("edm", 12, 20.0, 1e-2),
    solvers.initial(keys, (16, 1), 20.0 * f),
  )
  blunt = lambda x, sigma: field.denoise(x, f * sigma)
  for run, options in (
    (solvers.dpm_solver_pp_2m_sde, {"eta": 3.0}),
    (solvers.heun, {"churn": 4.0}),
  ):
    there = run(field.denoise, x, f * grid, keys, **options)
    # Rounding only. Without the factor the least noisy of 12 steps lacks a sixth of its noise:
    # differences of O(.1).
    np.testing.assert_allclose(
      run(blunt, x, grid, keys, noise_factor=f, **options), there, atol=2e-4
    )
    assert float(jnp.abs(run(blunt, x, grid, keys, **options) - there).max()) > 0.01


def test_a_member_does_not_depend_on_its_batch(gaussian):
  field = gaussian((16,))
  keys = jax.random.split(jax.random.key(4), 6)
  grid = schedules.levels("edm", 8, 20.0, 1e-2)
  run = lambda keys: solvers.dpm_solver_pp_2m_sde(
    field.denoise, solvers.initial(keys, (16, 1), 20.0), grid, keys
  )
  # Same draws, so float32 rounding in another batch shape only; one key a batch would differ by
  # O(1).
  np.testing.assert_allclose(run(keys)[2:5], run(keys[2:5]), atol=1e-5)
  assert float(jnp.abs(run(keys)[0] - run(keys)[1]).max()) > 0.1


def test_noise_is_that_of_key_and_step():
  keys = jax.random.split(jax.random.key(5), 3)
  got = solvers.noise(keys, 7, (4, 2))
  np.testing.assert_array_equal(
    got[1], jax.random.normal(jax.random.fold_in(keys[1], 7), (4, 2))
  )


def test_the_last_call_is_the_one_asked_for():
  grid, x = schedules.levels("edm", 4, 2.0, 0.1), jnp.ones((2, 3, 1))
  constant = lambda x, sigma: jnp.full_like(x, 5.0) + 0 * sigma[:, None, None]
  keys = jax.random.split(jax.random.key(6), 2)
  for run in (solvers.heun, solvers.dpm_solver_pp_2m, solvers.dpm_solver_pp_2m_sde):
    assert (run(ideal, x, grid, keys, last=constant) == 5).all()
  assert (
    solvers.euler_maruyama(
      ideal, x, grid, keys, schedule=schedules.vp_linear(), last=constant
    )
    == 5
  ).all()


def test_refusals():
  grid, x = schedules.levels("edm", 4, 2.0, 0.1), jnp.ones((1, 1, 1))
  with pytest.raises(ValueError, match="hand in keys"):
    solvers.heun(ideal, x, grid, churn=2.0)
  with pytest.raises(ValueError, match="hand in keys"):
    solvers.dpm_solver_pp_2m_sde(ideal, x, grid, None, eta=1.0)
  with pytest.raises(ValueError, match="eta=-1"):
    solvers.dpm_solver_pp_2m_sde(ideal, x, grid, None, eta=-1.0)
  for run in (solvers.heun, solvers.dpm_solver_pp_2m_sde):
    with pytest.raises(ValueError, match=r"solver\.noise.*need a number > 0"):
      run(ideal, x, grid, jax.random.split(jax.random.key(0), 1), noise_factor=0.0)


def test_levels_that_the_schedule_does_not_reach_are_refused():
  """Clipped in silence they gave 1.41 times the variance."""
  with pytest.raises(ValueError, match="to 200, but the schedule vp_linear knows"):
    solvers.euler_maruyama(
      lambda x, sigma: x,
      jnp.ones((2, 3, 1)),
      schedules.levels("edm", 4, 200.0, 0.1),
      None,
      schedule=schedules.vp_linear(),
    )
