"""The map: ott's own transport, the plan's barycentric projection, blocks, files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from ott.geometry import pointcloud
from ott.problems.linear import linear_problem
from ott.solvers.linear import sinkhorn as ott_sinkhorn

from downscaling.debias.entropic import entropic_map
from downscaling.runtime import files


@pytest.fixture(scope="module")
def fitted():
  """ott's dense solve in float32 and the map from its potentials."""
  rng = np.random.default_rng(0)
  x, y = (
    s * rng.normal(size=(n, 6)).astype(np.float32) for n, s in ((90, 1.0), (110, 1.3))
  )
  cloud = pointcloud.PointCloud(jnp.asarray(x), jnp.asarray(y), epsilon=0.5)
  with jax.numpy_rank_promotion("allow"):  # ott's own
    out = ott_sinkhorn.Sinkhorn(threshold=1e-5, max_iterations=2000)(
      linear_problem.LinearProblem(cloud)
    )
  return x, y, out, entropic_map.EntropicMap(y, np.asarray(out.g), 0.5, (3, 2))


def test_equals_otts_dual_potentials_on_rows_not_in_the_fit(fitted):
  _, _, out, ours = fitted
  new = np.random.default_rng(1).normal(size=(40, 6)).astype(np.float32)
  with jax.numpy_rank_promotion("allow"):
    theirs = out.to_dual_potentials().transport(jnp.asarray(new))
  # two float32 paths to y − ½∇f: exponents of up to 40/.5 round by 1e-5
  np.testing.assert_allclose(
    ours(new.reshape(-1, 3, 2)).reshape(-1, 6), theirs, atol=1e-4
  )


def test_equals_the_barycentric_projection_on_the_fit(fitted):
  x, y, out, ours = fitted
  p = np.asarray(out.matrix, np.float64)
  np.testing.assert_allclose(
    ours(x.reshape(-1, 3, 2)).reshape(-1, 6), p @ y / p.sum(1, keepdims=True), atol=1e-4
  )


def test_blocks_change_nothing_and_one_program_serves_any_count(fitted, monkeypatch):
  ours = fitted[-1]
  rows = np.random.default_rng(2).normal(size=(53, 3, 2)).astype(np.float32)
  whole = ours(rows)
  monkeypatch.setattr(entropic_map, "BLOCK", 16)
  before = entropic_map._average._cache_size()
  # Another block size, the same sums.
  np.testing.assert_allclose(ours(rows), whole, atol=1e-6)
  np.testing.assert_array_equal(ours(rows[:7]), ours(rows)[:7])
  assert entropic_map._average._cache_size() == before + 1
  assert ours(rows[:0]).shape == (0, 3, 2)
  assert ours.effective_targets(rows[:0]).shape == (0,)


def test_effective_targets(fitted):
  _, y, out, ours = fitted
  rows = np.random.default_rng(3).normal(size=(30, 3, 2)).astype(np.float32)
  t = np.asarray(out.g, np.float64) - (
    (rows.reshape(-1, 1, 6).astype(np.float64) - y) ** 2
  ).sum(-1)
  w = scipy.special.softmax(t / 0.5, axis=1)
  np.testing.assert_allclose(
    ours.effective_targets(rows), np.exp(scipy.special.entr(w).sum(1)), rtol=1e-4
  )
  # the limits: a look-up, and a mean of all
  flat = np.zeros(110, np.float32)
  assert entropic_map.EntropicMap(y, flat, 1e-3, (3, 2)).effective_targets(
    y[:5].reshape(5, 3, 2)
  ) == pytest.approx(1)
  assert entropic_map.EntropicMap(y, flat, 1e6, (3, 2)).effective_targets(
    rows
  ) == pytest.approx(110, rel=1e-3)


def test_rows_that_cannot_be_mapped(fitted):
  ours = fitted[-1]
  rows = np.zeros((20, 3, 2), np.float32)
  rows[[2, 19], 1, 0] = np.nan, np.inf
  with pytest.raises(
    ValueError,
    match=r"the rows to map hold NaN or infinities in 2 of 20 rows \(2, 19\)",
  ):
    ours(rows)
  with pytest.raises(
    ValueError, match=r"rows of shape \(4, 2\) came, the map was fitted on \(3, 2\)"
  ):
    ours(np.zeros((5, 4, 2), np.float32))


def test_saved_and_loaded_is_the_same_map(fitted, tmp_path):
  ours = fitted[-1]
  rows = np.random.default_rng(4).normal(size=(9, 3, 2)).astype(np.float32)
  ours.save(tmp_path / "map")
  ours.save(tmp_path / "map")  # again over itself
  loaded = entropic_map.EntropicMap.load(tmp_path / "map")
  np.testing.assert_array_equal(loaded(rows), ours(rows))
  assert (loaded.epsilon, loaded.grid) == (0.5, (3, 2))
  assert sorted(p.name for p in (tmp_path / "map").iterdir()) == [
    "arrays.npz",
    "map.json",
  ]


def test_damaged_maps_are_named(fitted, tmp_path):
  folder = tmp_path / "map"
  with pytest.raises(
    FileNotFoundError, match=r"no debiasing map in .*: run `downscaling debias` first"
  ):
    entropic_map.EntropicMap.load(folder)
  fitted[-1].save(folder)
  whole = (folder / "arrays.npz").read_bytes()
  record = files.read_json(folder / "map.json")
  flipped = bytearray(whole)
  flipped[len(whole) // 2] ^= 1
  for damage in (bytes(flipped), whole[:-300], b""):
    (folder / "arrays.npz").write_bytes(damage)
    with pytest.raises(
      ValueError, match=r"arrays.npz is damaged .*run `downscaling debias` again"
    ) as caught:
      entropic_map.EntropicMap.load(folder)
    assert "\n" not in str(caught.value)
  np.savez(
    folder / "arrays.npz", target=fitted[1] + 1, g=np.asarray(fitted[2].g)
  )  # whole, but another map's
  with pytest.raises(ValueError, match=r"damaged or not map.json's \(target\)"):
    entropic_map.EntropicMap.load(folder)
  files.write_json(folder / "map.json", record | {"schema": 99})
  with pytest.raises(
    ValueError,
    match=r"schema and kind \(99, 'entropic'\), this version reads \(1, 'entropic'\)",
  ):
    entropic_map.EntropicMap.load(folder)
