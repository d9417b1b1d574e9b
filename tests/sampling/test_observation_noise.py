"""The fit of the observation noise: planted noise of a Gaussian field is found again; bounds,
search.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from downscaling.diffusion import schedules
from downscaling.fields.operators import Strided
from downscaling.sampling import (
  conditional_sampler,
  gaussian_gain,
  observation_noise,
  solvers,
)

OP = Strided.on((48,), 4)


def recipe(field, **changes):
  """KS's sampler around the exact D of a Gaussian field of unit variance."""
  wiener = gaussian_gain.Gain(OP, gaussian_gain.prior_variance(field.spectrum))
  parts = {
    "denoise": lambda params, x, sigma: field.denoise(x, sigma),
    "shape": (48, 1),
    "levels": schedules.levels("edm", 16, 3.0, 3e-3),
    "high": schedules.levels("edm", 4, 80.0, 3e-3),
    "solve": functools.partial(solvers.dpm_solver_pp_2m_sde, eta=1.0),
    "start": "gaussian",
    "prior": wiener,
    "guide": wiener,
    "guidance": {"name": "wiener"},
    "select": None,
    "spread": 1.0,
    "members": 2,
    "normalise": lambda y: y,
    "restore": lambda x: x,
  }
  return conditional_sampler.Recipe(**parts | changes)


@pytest.fixture(scope="module")
def steep(gaussian):
  """Seven of twelve coarse modes have next to no variance: what y′ has there is noise, and the
  prior knows it.
  """
  return gaussian((48,), corner=1.2, slope=14.0)


def keys_of(rows):
  return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(0)))(
    jnp.arange(rows)
  )


@pytest.fixture(scope="module")
def measure(steep):
  """(conditions [K, 12, 1]) -> s -> (χ²/d′, corr); one program for all s."""
  sampler = conditional_sampler.sampler(recipe(steep))

  @jax.jit
  def program(y, std):
    fields, misfit = sampler(
      keys_of(len(y)), y, conditional_sampler.Soft(None, jnp.full((1, 1), std**2))
    )
    return OP.apply(fields), misfit

  def of(conditions):
    y = jnp.asarray(conditions, jnp.float32).repeat(2, 0)

    def at(std):
      seen, misfit = program(y, jnp.float32(std))
      return float(misfit.mean()), float(np.corrcoef(np.ravel(seen), np.ravel(y))[0, 1])

    return at

  of.program = program
  return of


def planted(field, std, count=256):
  """C′x + noise of `count` true fields, [K, 12, 1]."""
  truth = np.stack([field.draw(seed) for seed in range(count)])[:, ::4, None]
  return truth + std * np.random.default_rng(9).normal(size=truth.shape)


@pytest.mark.parametrize("std", [0.01, 0.03, 0.07])
def test_planted_noise_is_found_again(steep, measure, std):
  found = observation_noise.fit(measure(planted(steep, std)))
  # χ² is met to 5 %. The seven modes of little variance have χ² ∝ 1/s², the others 1 at any s: so s
  # is met to 4 %. 512 × 12 squares that are pairwise dependent add √(2/3072) = 3 %, rounding and 16
  # steps little.
  assert found.std == pytest.approx(std, rel=0.12)
  assert abs(math.log(found.chi2)) <= observation_noise.CLOSE
  assert found.exact[0] > 2  # what an exact y′ would have been told
  assert found.corr > 0.99
  assert not found.bounded
  assert (
    measure.program._cache_size() == 1
  )  # s is an operand: one program for every s and every fit


def test_exact_conditions_need_no_noise(steep, measure):
  """χ² is 1 at s = 0 where y′ = C′x: one evaluation, and the program's answer is that of an exact
  constraint.
  """
  found = observation_noise.fit(measure(planted(steep, 0.0)))
  assert (found.std, len(found.tried)) == (0.0, 1)
  sampler = conditional_sampler.sampler(recipe(steep))
  y = jnp.asarray(planted(steep, 0.0, 4), jnp.float32)
  soft = jax.jit(sampler)(
    keys_of(4), y, conditional_sampler.Soft(None, jnp.zeros((1, 1)))
  )
  hard = jax.jit(sampler)(keys_of(4), y, None)
  for one, other in zip(soft, hard, strict=True):
    # float32, two programs.
    np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-3)


def test_noise_stays_within_what_keeps_the_weather(steep, measure):
  """Planted .5: χ² asks for more than y′ can bear.

  And a χ² with a floor of its own, as that of a network, at any s.
  """
  found = observation_noise.fit(measure(planted(steep, 0.5)))
  assert found.bounded
  assert found.corr >= observation_noise.LEAST
  assert (
    found.std < 0.05
  )  # the prior takes a tenth of y′ to be noise, whatever the s, unless it is small
  lost = observation_noise.fit(lambda s: (2.0, 1.0 if s == 0 else 0.9))
  assert (lost.std, lost.bounded) == (0.0, True)
  floored = observation_noise.fit(
    lambda s: (1.2 + 1e-4 / max(s, 1e-3) ** 2, 1 - 0.62 * s**2)
  )
  assert floored.bounded
  # One per cent is left below it.
  assert floored.std == pytest.approx(
    math.sqrt((1 - observation_noise.LEAST) / 0.62), rel=0.02
  )
  assert floored.corr >= observation_noise.LEAST


@pytest.mark.parametrize("true", [2e-3, 0.02, 0.099])
def test_the_search_ends_in_few_steps(true):
  """χ² = ½ + ½(true/s)², as above: from .1 to .002 by halves of ln s."""
  chi2 = lambda s: 0.5 + 0.5 * min(true / max(s, 1e-4), 1e3) ** 2
  found = observation_noise.fit(lambda s: (chi2(s), 1 - s**2 / 2))
  assert abs(math.log(found.chi2)) <= observation_noise.CLOSE
  assert len(found.tried) <= observation_noise.MOST
  # There and back through what is stored.
  assert observation_noise.Fit.of(found.record()) == found


def test_a_fit_that_ran_away_is_refused():
  with pytest.raises(FloatingPointError, match="observation_noise=0"):
    observation_noise.fit(lambda s: (math.nan, math.nan))


# ---------------------------------------------------------------- what the noise does to the draws


def test_soft_conditions_have_their_posterior(gaussian):
  """An operand R, white, against dense algebra: mean and variance of 4096 members; the end is by
  the gain, with R.
  """
  field, std, members = gaussian((48,), corner=6.0), 0.3, 4096
  y = (OP.matrix() @ field.draw(0))[:, None]
  mean, cov = field.posterior(OP, y.ravel(), std)
  sampler = conditional_sampler.sampler(
    recipe(
      field,
      solve=solvers.dpm_solver_pp_2m,
      levels=schedules.levels("edm", 24, 3.0, 3e-3),
    )
  )
  many = jnp.broadcast_to(jnp.asarray(y, jnp.float32), (members, *y.shape))
  fields, _ = jax.jit(sampler)(
    keys_of(members), many, conditional_sampler.Soft(None, jnp.full((1, 1), std**2))
  )
  x = np.asarray(fields, np.float64)[..., 0]
  # Monte Carlo: √(tr/4096) of the mean, √(48/4096) of the covariance; 24 steps add as much again.
  assert np.linalg.norm(x.mean(0) - mean) / np.sqrt(np.trace(cov)) < 0.06
  assert np.trace(np.cov(x.T)) == pytest.approx(np.trace(cov), rel=0.05)
  # y′ is not forced: C′x spreads about it as the posterior says, and not at all if the last step
  # overwrote it.
  seen = (x @ OP.matrix().T - y.ravel()).std(0)
  np.testing.assert_allclose(
    seen, np.sqrt(np.diag(OP.matrix() @ cov @ OP.matrix().T)), rtol=0.1
  )


def test_noise_by_mode_matches_dense_algebra(gaussian):
  """R = Q diag(R_k) Qᵀ on the coarse grid: the gain, R z and draws of ε; a shape that does not fit
  is refused.
  """
  field = gaussian((48,), corner=6.0)
  modes = 0.02 + 0.3 * np.abs(np.fft.fftfreq(12))[:, None]
  soft = gaussian_gain.Gain(
    OP,
    gaussian_gain.prior_variance(field.spectrum),
    error=jnp.asarray(modes, jnp.float32),
  )
  dense = np.fft.ifft(np.fft.fft(np.eye(12), axis=0) * modes, axis=0).real
  r, sigma = np.random.default_rng(1).normal(size=(2, 12, 1)), 0.7
  cov = field._replace(
    spectrum=field.spectrum * sigma**2 / (field.spectrum + sigma**2)
  ).covariance()
  c = OP.matrix()
  exact = (cov @ c.T @ np.linalg.solve(c @ cov @ c.T + dense, r[..., 0].T)).T
  got = jax.jit(soft.correction)(jnp.asarray(r, jnp.float32), jnp.full(1, sigma))
  np.testing.assert_allclose(got[..., 0], exact, atol=1e-4)  # float32
  np.testing.assert_allclose(
    soft.apply_noise(jnp.asarray(r))[..., 0], r[..., 0] @ dense, atol=1e-5
  )
  white = jax.random.normal(jax.random.key(0), (20_000, 12, 1))
  drawn = np.asarray(soft.draw_noise(white))[..., 0]
  np.testing.assert_allclose(
    drawn.T @ drawn / len(drawn), dense, atol=0.01
  )  # entries of .1: √(2/20000) of that
  with pytest.raises(
    ValueError, match=r"need variances that broadcast against \[12, channels\]"
  ):
    gaussian_gain.Gain(
      OP, gaussian_gain.prior_variance(field.spectrum), error=jnp.ones((5, 1))
    )
  with pytest.raises(ValueError, match="knows white errors only"):
    gaussian_gain.Gain(
      OP,
      gaussian_gain.prior_variance(field.spectrum),
      error=jnp.asarray(modes),
      dense=True,
    )
