"""The blockwise geometry against dense float64, ott's own point cloud, and its own promise about
memory.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from ott.geometry import pointcloud
from ott.problems.linear import linear_problem
from ott.solvers.linear import sinkhorn as ott_sinkhorn

from downscaling.debias.entropic import ott_geometry, soft_min
from downscaling.runtime import mesh as mesh_lib


def clouds(n, m, d, seed=0):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(n, d)) * np.linspace(0.5, 1.5, d) + 0.3
  return x.astype(np.float32), (1.2 * rng.normal(size=(m, d))).astype(np.float32)


def dense_exponents(x, y, f, g, eps):
  x, y, f, g = (np.asarray(a, np.float64) for a in (x, y, f, g))
  cost = ((x[:, None, :] - y[None, :, :]) ** 2).sum(-1)
  return (f[:, None] + g[None, :] - cost) / eps


@functools.partial(jax.jit, static_argnames="tile")
def kernel_both_ways(x, y, f, g, eps, tile):
  cloud = ott_geometry.Blockwise(x, y, eps, tile)
  return [cloud.apply_lse_kernel(f, g, eps, axis=axis) for axis in (0, 1)]


# sizes of several tiles and a rest; of less than one tile; of 1 column a tile
@pytest.mark.parametrize(
  ("n", "m", "tile"), [(37, 53, (8, 16)), (5, 7, (256, 4096)), (9, 5, (4, 1))]
)
def test_lse_kernel_equals_dense_float64(n, m, tile):
  x, y = clouds(n, m, 6)
  rng = np.random.default_rng(1)
  f, g, eps = (
    rng.normal(size=n).astype(np.float32),
    rng.normal(size=m).astype(np.float32),
    0.3,
  )
  for axis, (got, sign) in enumerate(kernel_both_ways(x, y, f, g, eps, tile)):
    want = eps * scipy.special.logsumexp(
      dense_exponents(x, y, f, g, eps), axis=axis
    ) - (f if axis == 1 else g)
    # rounding: costs up to 60 in float32, 2⁻²⁴ · 60 · a few. A padded column that counts: up to log
    # 2 · ε = .2.
    np.testing.assert_allclose(got, want, atol=3e-5)
    np.testing.assert_array_equal(sign, 1.0)


@pytest.mark.parametrize("axis", [0, 1])
def test_signed_weights_equal_dense(axis):
  x, y = clouds(37, 53, 6)
  rng = np.random.default_rng(2)
  f, g, eps = np.zeros(37, np.float32), np.zeros(53, np.float32), 2.0
  vec = rng.normal(size=53 if axis == 1 else 37).astype(np.float32)
  cloud = ott_geometry.Blockwise(jnp.asarray(x), jnp.asarray(y), eps, (8, 16))
  got, sign = cloud.apply_lse_kernel(
    jnp.asarray(f), jnp.asarray(g), eps, vec=jnp.asarray(vec), axis=axis
  )
  kernel = np.exp(dense_exponents(x, y, f, g, eps))
  want = kernel @ vec if axis == 1 else vec @ kernel
  # relative to the sum of absolute terms, as signed terms cancel
  scale = kernel @ np.abs(vec) if axis == 1 else np.abs(vec) @ kernel
  assert np.abs(np.asarray(sign * jnp.exp(got / eps)) - want).max() < 1e-5 * scale.max()


@pytest.mark.parametrize("shift", [0.0, 4e4, -4e4])
def test_stale_potentials_neither_overflow_nor_vanish(shift):
  """exp(±shift/ε) is inf or 0 in float32: the second path must have been taken."""
  x, y = clouds(20, 30, 4)
  f, g, eps = np.full(20, shift, np.float32), np.zeros(30, np.float32), 0.1
  got, _ = kernel_both_ways(x, y, f, g, eps, (8, 16))[1]
  want = eps * scipy.special.logsumexp(dense_exponents(x, y, 0 * f, g, eps), axis=1)
  # the shift of 4e4 itself costs 4e4 · 2⁻²³ = 5e-3; without one, 1e-4
  np.testing.assert_allclose(got, want, atol=2e-2 if shift else 1e-4)


def test_nan_is_not_hidden():
  x, y = clouds(20, 30, 4)
  g = np.zeros(30, np.float32)
  g[3] = np.nan
  got, _ = kernel_both_ways(x, y, np.zeros(20, np.float32), g, 0.1, (8, 16))[1]
  assert np.isnan(np.asarray(got)).all()


def test_closed_forms_equal_dense_cost():
  x, y = clouds(37, 53, 6)
  cost = -dense_exponents(x, y, np.zeros(37), np.zeros(53), 1.0)
  cloud = ott_geometry.Blockwise(jnp.asarray(x), jnp.asarray(y), 1.0)
  # float32 sums of tens of terms
  np.testing.assert_allclose(cloud.mean_cost_matrix, cost.mean(), rtol=1e-5)
  v = np.random.default_rng(3).normal(size=(53, 2)).astype(np.float32)
  np.testing.assert_allclose(
    cloud.apply_cost(jnp.asarray(v), axis=1),
    cost @ v,
    atol=1e-4 * np.abs(cost).sum(1).max(),
  )
  w = np.ones(37, np.float32)
  np.testing.assert_allclose(
    cloud.apply_cost(jnp.asarray(w), axis=0), w @ cost, rtol=1e-4
  )
  assert cloud.shape == (37, 53)
  with pytest.raises(
    TypeError, match=r"37 × 53 cost matrix .* never makes: use lse_mode=True"
  ):
    _ = cloud.cost_matrix


def test_ott_solver_gives_the_same_potentials_on_its_dense_cloud_and_on_ours():
  x, y = clouds(150, 170, 8)
  eps = 0.2
  solver = ott_sinkhorn.Sinkhorn(
    threshold=1e-4, max_iterations=400, recenter_potentials=True
  )
  vec = jnp.asarray(np.random.default_rng(4).normal(size=(3, 150)), jnp.float32)

  @jax.jit
  def solve(cloud):
    out = solver(linear_problem.LinearProblem(cloud))
    return out.f, out.g, out.reg_ot_cost, out.apply(vec, axis=0), out.converged

  with jax.numpy_rank_promotion("allow"):  # ott's own
    dense = solve(pointcloud.PointCloud(jnp.asarray(x), jnp.asarray(y), epsilon=eps))
    ours = solve(ott_geometry.Blockwise(jnp.asarray(x), jnp.asarray(y), eps, (64, 32)))
  assert bool(dense[-1])
  assert bool(ours[-1])
  # both stop at the same check; costs reach 100, so float32 alone leaves 1e-5 · a few in f and g
  for one, other, tolerance in zip(ours, dense, (2e-4, 2e-4, 2e-4, 1e-5), strict=False):
    np.testing.assert_allclose(one, other, atol=tolerance)


def test_rows_may_be_sharded():
  x, y = clouds(64, 96, 5)
  mesh = mesh_lib.make()
  assert mesh.size == 4
  rng = np.random.default_rng(5)
  f, g = rng.normal(size=64).astype(np.float32), rng.normal(size=96).astype(np.float32)

  single = kernel_both_ways(x, y, f, g, 0.3, (16, 32))
  sharded = kernel_both_ways(
    *(jax.device_put(a, mesh_lib.rows(mesh)) for a in (x, y, f, g)), 0.3, (16, 32)
  )
  for (one, _), (four, _) in zip(single, sharded, strict=True):
    # the same sums, perhaps reordered: ulps of costs up to 60
    np.testing.assert_allclose(four, one, atol=2e-5)


def test_soft_average_equals_dense():
  x, y = clouds(37, 53, 6)
  g = np.random.default_rng(6).normal(size=53).astype(np.float32)
  for eps in (0.02, 0.5, 20.0):
    mean, entropy = soft_min.soft_average(
      jnp.asarray(x), jnp.asarray(y), jnp.asarray(g), eps, (8, 16)
    )
    w = scipy.special.softmax(dense_exponents(x, y, np.zeros(37), g, eps), axis=1)
    # weights err by the exponents' rounding, 60/ε · 2⁻²⁴ · a few = 5e-4 at the smallest ε
    np.testing.assert_allclose(mean, w @ y, atol=1e-5 + 3e-5 / eps)
    np.testing.assert_allclose(
      entropy, scipy.special.entr(w).sum(1), atol=1e-5 + 3e-5 / eps
    )
