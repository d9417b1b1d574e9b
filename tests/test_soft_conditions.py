"""The observation noise of a map: its rows, its program, stored, read back, handed on; or why there
is none.
"""

import dataclasses

import jax
import numpy as np
import pytest

from downscaling import jobs
from downscaling.assembly import prior, samples
from downscaling.jobs import fitted_noise
from downscaling.runtime import files, supervision
from downscaling.runtime import mesh as meshes
from downscaling.sampling import conditional_sampler, ensemble, observation_noise
from tests.test_sampler import _config, _parts

SET = "equivariant+diffusion"


class Shifted:
  """A map that adds one."""

  def __call__(self, y):
    return y + 1


@pytest.fixture
def setting(tmp_path, monkeypatch):
  """(context, sampler, parameters, statistics) of the smoke config with 16 made-up calibration
  rows, and its map.
  """
  config = _config(**{"sampling.conditions": 4})
  stats, network, params = _parts(config)
  rows = np.random.default_rng(0).normal(size=(16, 1, 24, 1)).astype(np.float32)
  monkeypatch.setattr(
    fitted_noise, "stretches", lambda ctx, which, split, count: rows[:count]
  )
  monkeypatch.setattr(fitted_noise.maps, "load", lambda folder: Shifted())
  ctx = jobs.Workdir(config, tmp_path, meshes.make(1), supervision.Stop())
  return (
    ctx,
    samples.sampler(config, stats, network, prior.stand_in_table(config)),
    params,
    stats,
  )


def test_a_fit_is_made_once_said_and_handed_on(setting, tmp_path, capsys, monkeypatch):
  ctx, sampler, params, stats = setting
  monkeypatch.setattr(fitted_noise, "LEAST", 5)  # three units of two conditions
  first = fitted_noise.fits(ctx, tmp_path, "of the prior", sampler, params, stats)
  assert set(first) == {SET, "entropic+diffusion", "gaussian+diffusion"} & set(
    samples.sources(ctx.experiment)
  )
  said = capsys.readouterr().err
  assert (
    f"{SET}: observation noise {first[SET].std:g} of the data's standard deviation, χ²/d′"
    in said
  )
  record = files.read_json(tmp_path / fitted_noise.FILE)[SET]
  assert record["map"] == "equivariant"
  assert record["rows"] == "lflr calibration, 6 conditions of 4 members"
  np.testing.assert_allclose(
    record["std_in_data_units"], 2 * first[SET].std
  )  # the data's standard deviation is 2
  before = (tmp_path / fitted_noise.FILE).read_bytes()
  monkeypatch.setattr(fitted_noise, "_fit", lambda *_: pytest.fail("fitted again"))
  assert (
    fitted_noise.fits(ctx, tmp_path, "of the prior", sampler, params, stats) == first
  )
  assert (tmp_path / fitted_noise.FILE).read_bytes() == before
  assert (
    fitted_noise.attributes(first[SET], stats)["observation_noise_chi_squared"]
    == first[SET].chi2
  )


def test_the_fit_sees_the_maps_fields_and_the_samplers_own_misfits(
  setting, monkeypatch
):
  """χ² and corr of the first evaluation, s = 0, are those of the rows behind the map, drawn by keys
  of their own.
  """
  ctx, sampler, params, _ = setting
  monkeypatch.setattr(fitted_noise, "LEAST", 4)
  found = fitted_noise._fit(ctx, "equivariant", sampler, params, 1)
  y = fitted_noise._conditions(ctx, "equivariant")
  assert y.mean() == pytest.approx(1, abs=0.5)
  ids, members = (
    (fitted_noise.FIRST_ID + np.arange(4)).repeat(4),
    np.tile(np.arange(4), 4),
  )
  keys = ensemble.keys(
    ctx.experiment.seed, ids.astype(np.uint32), members.astype(np.uint32)
  )
  _, misfit = jax.jit(sampler)(
    keys, y.repeat(4, 0), conditional_sampler.Soft(params, np.zeros((1, 1), np.float32))
  )
  # Other programs: float32.
  assert found.exact[0] == pytest.approx(float(misfit.mean()), rel=1e-3)
  assert found.exact[1] == pytest.approx(1, abs=1e-6)  # an exact constraint


def test_what_the_sampler_is_handed(setting):
  _, _, params, _ = setting
  fit = observation_noise.Fit(
    0.05, 1.0, 0.999, (9.0, 1.0), ((0.0, 9.0, 1.0), (0.05, 1.0, 0.999))
  )
  assert fitted_noise.weights(params, None, 1) is params
  exact = observation_noise.Fit(0.0, 1.0, 1.0, (1.0, 1.0), ((0.0, 1.0, 1.0),))
  # The very program of true conditions.
  assert fitted_noise.weights(params, exact, 1) is params
  soft = fitted_noise.weights(params, fit, 2)
  assert soft.params is params
  np.testing.assert_allclose(soft.error, np.full((1, 1, 1), 0.0025))


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"observation_noise": "0.1"}, ""),
    ({"sets": ("true+diffusion", "raw+diffusion")}, ""),
    (
      {"guidance.name": "paper", "guidance.final": "overwrite"},
      "observation noise 0, as guidance 'paper' knows none",
    ),
  ],
)
def test_where_there_is_none(setting, tmp_path, capsys, changes, words):
  """A number holds for all sets; true and raw conditions are no map's; and Eq. 7 knows no noise,
  which is said.
  """
  ctx, sampler, params, stats = setting
  changes = {f"sampling.{k}": v for k, v in changes.items()}
  ctx = dataclasses.replace(ctx, experiment=ctx.experiment.changed(**changes))
  assert fitted_noise.fits(ctx, tmp_path, "of the prior", sampler, params, stats) == {}
  assert words in capsys.readouterr().err
  assert not (tmp_path / fitted_noise.FILE).exists()
