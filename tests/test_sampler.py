"""The sampler as config blocks make it: what it returns, what it needs, what it refuses; 1-D and
2-D.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from downscaling import checks, experiment
from downscaling.assembly import prior, samples, worlds
from downscaling.fields import statistics
from downscaling.runtime import mesh as meshes
from downscaling.sampling import conditional_sampler, gaussian_gain


def _config(name="ks", **changes):
  small = {"sampling.unit": (2, 4), "sampling.members": 4}
  return experiment.load(f"{name}:smoke", **small | changes)


def _parts(config):
  """Statistics of a steep spectrum, an untrained network and its parameters."""
  space = worlds.space(config)
  k = np.sqrt(
    sum(
      a**2
      for a in np.meshgrid(*[np.fft.fftfreq(n, 1 / n) for n in space], indexing="ij")
    )
  )
  spectrum = 1 / (1 + (k / 4) ** 4)
  std = np.float32([2.0])
  stats = statistics.Statistics(
    np.float32([0.5]), std, (spectrum / spectrum.mean())[..., None].astype(np.float32)
  )
  network = prior.network(config, stats)
  init = jax.jit(network.init)(
    jax.random.key(0), jnp.zeros((1, *space, 1)), jnp.ones(1)
  )
  return stats, network, init["params"]


def _draw(config, parts, table):
  stats, network, params = parts
  op, rows = worlds.operator(config), 8
  keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(1)))(
    jnp.arange(rows)
  )
  y = jax.random.normal(jax.random.key(2), (2, *op.coarse, 1)).repeat(4, 0)
  fields, misfit = jax.jit(samples.sampler(config, stats, network, table))(
    keys, y, params
  )
  return op, y, np.asarray(fields), np.asarray(misfit)


@pytest.mark.parametrize("name", ["ks", "kolmogorov"])
def test_fields_and_misfits(name):
  """Guidance by the measured error, with selection, on both equations: fields on y′, a score a row,
  NaN without y′.
  """
  config = _config(
    name, **{"sampling.guidance.name": "measured", "sampling.resample.strength": 0.1}
  )
  parts = _parts(config)
  op, y, fields, misfit = _draw(config, parts, prior.stand_in_table(config))
  assert fields.shape == (8, *worlds.space(config), 1)
  # float32, fields of size 2.
  np.testing.assert_allclose(op.apply(fields), y, atol=1e-4)
  assert misfit.shape == (8,)
  assert (misfit > 0).all()
  stats, network, params = parts
  keys = jax.random.split(jax.random.key(0), 4)
  free, none = jax.jit(
    lambda k, p: samples.sampler(config, stats, network)(k, None, p)
  )(keys, params)
  assert free.shape == (4, *worlds.space(config), 1)
  assert np.isnan(none).all()


def test_guided_levels():
  """By the table of the guidance, or by the spectrum if there is none; free fields need neither."""
  config = _config(
    **{"sampling.levels.name": "guided", "sampling.guidance.name": "measured"}
  )
  parts = _parts(config)
  op, y, fields, _ = _draw(config, parts, prior.stand_in_table(config))
  # float32, fields of size 2.
  np.testing.assert_allclose(op.apply(fields), y, atol=1e-4)
  found = [
    samples._noise_levels(config, _gain(config, parts, v))[0] for v in (1.0, 4.0)
  ]
  assert np.abs(np.log(found[0] / found[1])).max() > 0.02  # another gain, other levels
  edm = config.changed(**{"sampling.levels.name": "edm"})
  free = (samples._noise_levels(c, _gain(config, parts, 1.0))[1] for c in (config, edm))
  np.testing.assert_array_equal(*free)


def _gain(config, parts, power):
  return gaussian_gain.Gain(
    worlds.operator(config), gaussian_gain.prior_variance(parts[0].spectrum ** power)
  )


def test_a_soft_constraint_is_in_data_units():
  """Noise as large as the data: the fields no longer pass through y′, by about that much and not by
  σ_d times it.
  """
  config = _config(
    **{"sampling.guidance.name": "wiener", "sampling.observation_noise": "2.0"}
  )
  op, y, fields, _ = _draw(config, _parts(config), None)
  off = float(np.sqrt(np.mean((np.asarray(op.apply(fields)) - y) ** 2)))
  # y is a unit normal about 0, fields of std 2 about .5: the posterior's misfit has variance
  # between .25 × and 1 × 4.
  assert 0.5 < off < 3


def test_spread_is_about_the_mean_of_a_block():
  """Half the distance from the mean of each condition's members, which stays, as C′x = y′ does."""
  half = _config(**{"sampling.guidance.name": "wiener", "sampling.spread": 0.5})
  parts = _parts(half)
  op, y, narrow, misfit = _draw(half, parts, None)
  _, _, wide, same = _draw(_config(**{"sampling.guidance.name": "wiener"}), parts, None)
  narrow, wide = (x.reshape(2, 4, *x.shape[1:]) for x in (narrow, wide))
  # float32; fields of size 2.
  np.testing.assert_allclose(narrow.mean(1), wide.mean(1), atol=1e-4)
  np.testing.assert_allclose(narrow.std(1), wide.std(1) / 2, atol=1e-4)
  np.testing.assert_allclose(op.apply(narrow.reshape(8, *op.fine, 1)), y, atol=1e-4)
  np.testing.assert_array_equal(misfit, same)


def test_fields_that_ran_away_are_none():
  """A condition 10⁴ standard deviations off, and a solver whose noise grows: finite numbers that
  are no field.
  """
  config = _config(**{"sampling.guidance.name": "wiener"})
  stats, network, params = parts = _parts(config)
  _, y, fields, _ = _draw(config, parts, None)
  keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(1)))(
    jnp.arange(8)
  )
  far = jnp.where(jnp.arange(8)[:, None, None] < 4, 2e4, 1) * y
  beside, _ = jax.jit(samples.sampler(config, stats, network))(keys, far, params)
  assert np.isnan(beside[:4]).all()
  np.testing.assert_array_equal(beside[4:], fields[4:])
  config = config.changed(**{"sampling.solver.noise": 1e6})
  free, _ = jax.jit(lambda k, p: samples.sampler(config, stats, network)(k, None, p))(
    keys, params
  )
  assert np.isnan(free).all()


@pytest.mark.parametrize(
  "changes",
  [
    {"guidance.name": "measured"},
    {"guidance.name": "moment", "guidance.variance": "measured"},
  ],
)
def test_no_table_no_measured_error(changes):
  config = _config(**{f"sampling.{k}": v for k, v in changes.items()})
  assert samples.needs_table(config)
  with pytest.raises(
    FileNotFoundError,
    match="run `downscaling train` with the same --config and --workdir",
  ):
    jax.eval_shape(lambda: _draw(config, _parts(config), None))


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"spread": 0.0}, "config.sampling.spread=0: need a finite number, above 0"),
    ({"unit": (4, 1)}, "among 1 member"),
    ({"unit": (4, 4), "solver.name": "dpm_solver_pp_2m"}, "part by noise alone"),
    ({"unit": (4, 4), "solver.eta": 0.0}, "part by noise alone"),
    (
      {"unit": (4, 4), "resample.dead_zone": 0.5},
      "dead_zone=0.5: need a finite number, at least 1",
    ),
    ({"guidance.variance": "exact"}, "need one of gaussian, measured"),
    (
      {"guidance.name": "paper", "observation_noise": "0.1", "resample.strength": 0.0},
      "knows no observation noise",
    ),
    ({"observation_noise": "automatic"}, "need a number of at least 0, or auto"),
    ({"max_failed": 1.0}, "max_failed=1: need a finite number, at least 0 and below 1"),
    (
      {"levels.sigma_max": 200.0},
      "config.sampling.levels from 0.003 to 200, but the schedule vp_linear knows",
    ),
    (
      {"levels.sigma_min": 1e-4},
      "config.sampling.levels from 0.0001 to 3, but the schedule",
    ),
    (
      {"unconditional.sigma_max": 160.0},
      "config.sampling.unconditional from 0.003 to 160",
    ),
    (
      {"guidance.name": "wiener", "observation_noise": "-1", "resample.strength": 0.0},
      "need a number of at least 0",
    ),
  ],
)
def test_the_door(changes, words):
  base = {
    "sampling.resample.strength": 0.1,
    "sampling.members": 4,
    "sampling.unit": (4, 4),
  }
  keys = base | {f"sampling.{k}": v for k, v in changes.items()}
  with pytest.raises(ValueError, match=words):
    checks.check(_config(**keys), meshes.make(4))


def test_a_step_of_heun_above_the_schedule_is_refused():
  """With churn it first raises its level, by up to √2: from 120 that is beyond 152, where training
  ended.
  """
  solver = {
    "solver.name": "heun",
    "levels.name": "edm",
    "levels.sigma_max": 120.0,
    "resample.strength": 0.0,
  }
  config = _config(**{f"sampling.{k}": v for k, v in solver.items()})
  checks.check(config, meshes.make(4))
  config = config.changed(**{"sampling.solver.churn": 40.0})
  with pytest.raises(
    ValueError, match=r"levels from 0.003 to 169.\d+, but the schedule"
  ):
    checks.check(config, meshes.make(4))


def test_a_table_that_does_not_reach_the_levels_is_refused():
  config = _config()
  stats, network, _ = _parts(config)
  table = prior.stand_in_table(config)
  short = table._replace(sigmas=table.sigmas[:20], errors=table.errors[:20])
  with pytest.raises(
    ValueError,
    match=r"config.sampling.levels asks for noise levels from 0.003 to 3, the prior's",
  ):
    samples.sampler(config, stats, network, short)


def test_a_field_that_ran_away_does_not_move_its_block():
  """The mean that spreads are about is that of the members that are there."""
  x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6, 1)), jnp.float32)
  broken = x.at[2].set(jnp.nan)
  got, want = (
    conditional_sampler.rescale(broken, 4, 0.5),
    conditional_sampler.rescale(x, 4, 0.5),
  )
  assert np.isnan(got[2]).all()
  np.testing.assert_array_equal(got[4:], want[4:])
  kept = x[jnp.asarray([0, 1, 3])]
  np.testing.assert_allclose(
    got[jnp.asarray([0, 1, 3])], conditional_sampler.rescale(kept, 3, 0.5), atol=1e-6
  )  # float32


def test_auto_is_no_noise_until_conditions_bring_it():
  """The bytes of observation_noise=0 without draws.Soft; numbers and words that are the same have
  one identity.
  """
  auto, none = _config(), _config(**{"sampling.observation_noise": "0"})
  assert auto.sampling.observation_noise == "auto"
  assert samples.observation_noise(auto) is None
  parts = _parts(auto)
  table = prior.stand_in_table(auto)
  for one, other in zip(
    _draw(auto, parts, table)[2:], _draw(none, parts, table)[2:], strict=True
  ):
    np.testing.assert_array_equal(one, other)
  also = _config(**{"sampling.observation_noise": "0.00", "sampling.max_failed": 0.5})
  assert none.identity("samples") == also.identity("samples")
  assert none.identity("samples") != auto.identity("samples")
