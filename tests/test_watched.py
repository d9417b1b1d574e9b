"""What is drawn of a prior while it trains."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from downscaling.fields import statistics
from downscaling.jobs import unconditional_fields
from downscaling.report import themes
from downscaling.runtime import mesh as meshes


@pytest.mark.parametrize("shape", [(1, 24), (3, 24), (1, 16, 16), (3, 16, 16)], ids=str)
def test_a_gallery_has_a_panel_for_every_field(shape):
  """Of one field too: matplotlib then gives no array of axes unless it is told to."""
  fields = np.random.default_rng(0).normal(size=shape)
  figure = unconditional_fields.gallery(fields, 2 * fields)(themes.LIGHT)
  assert len(figure.axes) == 2 * len(fields)
  assert themes.pixels(unconditional_fields.gallery(fields, 2 * fields)).ndim >= 3


@pytest.mark.parametrize("lost", [3, 8])
def test_fields_that_ran_away_are_counted_and_end_no_training(lost):
  """White noise against white noise, some of it NaN: the spectrum is of the others; of none it is
  infinitely wrong.
  """
  mesh = meshes.make(1)  # one device draws all rows

  def sampler(keys, y, params):
    noise = jax.vmap(lambda key: jax.random.normal(key, (64, 1)))(keys)
    return jnp.where(
      (jnp.arange(len(keys)) < lost)[:, None, None], jnp.nan, noise
    ), None

  truth = np.random.default_rng(0).normal(size=(64, 64, 1)).astype(np.float32)
  stats = statistics.Statistics(
    np.zeros(1, np.float32), np.ones(1, np.float32), np.ones((64, 1), np.float32)
  )
  found = unconditional_fields.evaluator(sampler, mesh, 8, truth, stats, 0)(
    types.SimpleNamespace(ema=[{}])
  )
  assert found["diverged"] == lost
  if lost == 8:
    assert found["melr_weighted"] == found["melr_energy"] == np.inf
    assert "fields" not in found
  else:
    assert (
      found["melr_energy"] < 1
    )  # ln E(k) of 5 rows has a standard deviation of .45 about the truth's
    assert found["fields"].ndim >= 3
