"""Empirical quantile maps: planted biases, the group, what lies beyond, files, bad input."""

import numpy as np
import pytest

from downscaling import checks, experiment
from downscaling.debias import maps, quantile_map
from downscaling.equations import ks
from downscaling.fields import symmetry
from downscaling.jobs import evaluate
from downscaling.runtime import mesh as meshes

ROWS, POINTS, QUANTILES = 4000, 24, 200
BIASES = {
  "affine": lambda u: 1.7 * u - 0.4,
  "monotone": lambda u: u + 0.2 * u**3,
}


def cloud(seed, rows=ROWS):
  """Correlated fields of another law at every point, [rows, 24, 1]."""
  draw = np.random.default_rng(seed)
  spread = np.linspace(0.5, 2, POINTS)
  u = draw.normal(size=(rows, POINTS)) + draw.normal(size=(rows, 1))
  return (u * spread + np.linspace(-1, 1, POINTS))[..., None].astype(np.float32)


def test_it_is_the_identity_where_nothing_is_biased():
  """The same rows on both sides: the shift is 0, exactly."""
  u = cloud(0)
  made = quantile_map.fit(u, u, QUANTILES)
  np.testing.assert_array_equal(made(cloud(1)), cloud(1))


@pytest.mark.parametrize("bias", BIASES)
def test_a_planted_bias_is_removed(bias):
  """Of other rows: the map knows the inverse at every quantile, and is linear between them."""
  change = BIASES[bias]
  u, other = cloud(0), cloud(1)
  made = quantile_map.fit(change(u), u, QUANTILES)
  inner = ~made.outside(change(other))
  low, high = np.quantile(u, [0.5 / QUANTILES, 1 - 0.5 / QUANTILES], axis=0)
  within = (other > low) & (other < high)
  error = np.abs(made(change(other)) - other)
  # An affine bias has a linear inverse: rounding. The cubic one bends between two quantiles, which
  # lie at most a tail's .3 apart there.
  assert error[within].max() < (1e-5 if bias == "affine" else 0.05)
  assert inner.mean() > 0.9
  assert np.abs(change(other) - other)[within].mean() > 0.3


def test_between_quantiles_it_is_linear_and_beyond_it_shifts():
  rows = np.arange(10, dtype=np.float32).reshape(10, 1, 1)
  made = quantile_map.fit(rows, 2 * rows, 5)
  nodes = np.quantile(rows, [0.1, 0.3, 0.5, 0.7, 0.9])
  np.testing.assert_allclose(made(nodes.reshape(5, 1, 1)).ravel(), 2 * nodes, rtol=1e-6)
  middle = (nodes[1] + nodes[2]) / 2
  far = np.array([middle, -100, 100]).reshape(3, 1, 1)
  wanted = [2 * middle, -100 + nodes[0], 100 + nodes[-1]]
  np.testing.assert_allclose(made(far).ravel(), wanted, rtol=1e-6)
  assert made.outside(far).tolist() == [False, True, True]


def test_pooled_over_the_group_it_commutes_with_it():
  """And one curve serves all points of an orbit: KS has shifts, and reflection with a sign."""
  group = ks.group(POINTS)
  source, target = cloud(0, 1000), 1.3 * cloud(2, 1000) + 0.1
  made = quantile_map.fit(source, target, QUANTILES, group)
  y = cloud(1, 50)[..., 0]
  for element in range(len(group)):
    moved = np.asarray(group.act(element, y))
    np.testing.assert_allclose(
      made(moved[..., None])[..., 0],
      np.asarray(group.act(element, made(y[..., None])[..., 0])),
      atol=1e-5,  # quantiles of as many values in another order
    )
  # All rows of all points, with both signs, are one sample.
  values = source.ravel()
  nodes = np.quantile(np.concatenate([values, -values]), [0.5 / QUANTILES, 0.5])
  np.testing.assert_allclose(made.nodes[0, :, 0], nodes[0], atol=1e-5)


def test_pooled_over_the_trivial_group_it_is_the_map_of_each_point():
  source, target = cloud(0), cloud(2)
  alone = quantile_map.fit(source, target, QUANTILES)
  pooled = quantile_map.fit(source, target, QUANTILES, symmetry.trivial(POINTS))
  np.testing.assert_array_equal(alone.nodes, pooled.nodes)
  np.testing.assert_array_equal(alone.shift, pooled.shift)


def test_channels_have_quantiles_of_their_own():
  u = np.concatenate([cloud(0), cloud(1)], axis=-1)
  bias = np.array([1.0, -2.0], np.float32)
  made = quantile_map.fit(u + bias, u, QUANTILES, symmetry.trivial(POINTS))
  np.testing.assert_allclose(made(u + bias), u, atol=1e-5)


@pytest.mark.parametrize("name", ["quantile", "pooled_quantile"])
def test_the_job_fits_it_by_name_and_reads_it_back(name, tmp_path):
  setting = maps.Setting(ks.group(POINTS), quantiles=QUANTILES, mesh=meshes.make())
  source, target = cloud(0), cloud(2)
  made, facts = maps.fit(name, tmp_path, source, target, setting)
  assert facts["quantiles"] == QUANTILES
  made.save(tmp_path)
  y = cloud(3, 10)
  np.testing.assert_array_equal(maps.load(tmp_path)(y), made(y))


def test_the_report_interpolates_behind_it():
  """BCSD's rows stand beside those of the default map."""
  fitted = {"debias.maps": ("equivariant", "quantile"), "debias.quantiles": 64}
  found = evaluate.interpolated_sets(experiment.load("ks:smoke", **fitted))
  assert found == {"equivariant+cubic": "equivariant", "quantile+cubic": "quantile"}
  default = evaluate.interpolated_sets(experiment.load("ks:smoke"))
  assert list(default) == ["equivariant+cubic"]


def test_fewer_rows_than_quantiles_are_refused_before_anything_is_fitted():
  with pytest.raises(ValueError, match="200 quantiles of 100 rows a side"):
    quantile_map.fit(cloud(0, 100), cloud(1, 100), QUANTILES)
  asked = {"debias.maps": ("quantile",), "debias.map": "quantile"}
  with pytest.raises(ValueError, match=r"Set --config\.debias\.quantiles=256 or fewer"):
    checks.check(experiment.load("ks:smoke", **asked), meshes.make(1))
  checks.check(
    experiment.load("ks:smoke", **asked | {"debias.quantiles": 256}), meshes.make(1)
  )
