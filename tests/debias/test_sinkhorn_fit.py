"""The fit: closed forms, exact transport in the limit, marginals, precision, resuming, refusals."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special

from downscaling.debias.entropic import entropic_map, sinkhorn, sinkhorn_steps
from downscaling.runtime import checkpoints as checkpoints_lib
from downscaling.runtime import mesh as meshes
from downscaling.runtime import supervision


def normal(n, d, seed, scale=1.0):
  return (scale * np.random.default_rng(seed).normal(size=(n, d))).astype(np.float32)


def cost_matrix(x, y):
  x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
  return ((x[:, None, :] - y[None, :, :]) ** 2).sum(-1)


def plan(x, y, result):
  f, g = np.asarray(result.f, np.float64), np.asarray(result.g, np.float64)
  return np.exp((f[:, None] + g[None, :] - cost_matrix(x, y)) / result.epsilon)


def map_of(y, result):
  return entropic_map.EntropicMap(
    y, np.asarray(result.g), result.epsilon, (y.shape[1],)
  )


def root(a):
  values, vectors = np.linalg.eigh(a)
  return (vectors * np.sqrt(values)) @ vectors.T


def test_gaussian_to_gaussian_closed_form():
  """Janati et al. 2020 (arXiv:2006.02572), theorem 1, ε = 2σ²: the optimal plan is Gaussian with
  cross-covariance C = ½ A^½ (4 A^½ B A^½ + σ⁴)^½ A^-½ − ½ σ²; the map is x ↦ b + Cᵀ A⁻¹ (x − a),
  the cost |a − b|² + tr(A + B − 2C)."""
  n, rng = 1500, np.random.default_rng(0)
  mix_a, mix_b = np.array([[1.0, 0.0], [0.6, 0.8]]), np.array([[0.5, 0.3], [0.0, 1.4]])
  x = (rng.normal(size=(n, 2)) @ mix_a.T + [3.0, 0.0]).astype(np.float32)
  y = (rng.normal(size=(n, 2)) @ mix_b.T - [0.0, 1.0]).astype(np.float32)
  result = sinkhorn.fit(x, y, epsilon=0.1, threshold=1e-4)
  assert result.converged
  a, b, mean_a, mean_b = np.cov(x.T, ddof=0), np.cov(y.T, ddof=0), x.mean(0), y.mean(0)
  half, sigma2 = root(a), result.epsilon / 2
  inner = root(4 * half @ b @ half + sigma2**2 * np.eye(2))
  cross = half @ inner @ np.linalg.inv(half) / 2 - sigma2 / 2 * np.eye(2)
  cost = (
    ((mean_a - mean_b) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * np.trace(cross)
  )
  p = plan(x, y, result)
  # samples' own moments go into the closed form, so what is left is their non-Gaussianity: cost .03
  # %, map 1–2.6 % (4 seeds). ε for σ² = ε/2 moves the cost by 5 % and the map by 25 %, no ε by 10 %
  # and 27 %, C for Cᵀ the map 55 %.
  assert (p * cost_matrix(x, y)).sum() == pytest.approx(cost, rel=0.002)
  linear = mean_b + (x - mean_a) @ np.linalg.inv(a) @ cross
  inside = (
    np.linalg.norm((x - mean_a) @ np.linalg.inv(half), axis=1) < 2
  )  # tails of 1500 rows are thin
  gap = np.linalg.norm(map_of(y, result)(x)[inside] - linear[inside]) / np.linalg.norm(
    linear[inside] - mean_b
  )
  assert gap < 0.05


def test_small_epsilon_is_the_assignment():
  x, y = normal(60, 3, 1), normal(60, 3, 2, 1.5)
  result = sinkhorn.fit(
    x, y, epsilon=1e-3, momentum=1.0, max_iterations=4000, threshold=2e-3
  )
  assert result.converged
  cost = cost_matrix(x, y)
  best = cost[scipy.optimize.linear_sum_assignment(cost)].mean()
  entropic = (plan(x, y, result) * cost).sum()
  # 0 ≤ ⟨P, C⟩ − best ≤ ε log n for exact marginals; an L1 error of 2e-3 moves the cost by at most
  # 2e-3 · max C / 2.
  slack = 1e-3 * cost.max()
  assert best - slack <= entropic <= best + result.epsilon * math.log(60) + slack
  assert entropic == pytest.approx(best, abs=0.01)  # measured: 4e-4 above 1.8929


def test_one_dimension_is_sorted_quantiles():
  x, y = normal(200, 1, 3), np.exp(normal(200, 1, 4))
  result = sinkhorn.fit(x, y, epsilon=1e-3, threshold=1e-2)
  assert result.converged
  mapped = map_of(y, result)(x)
  order = np.argsort(x[:, 0])
  # blur: weights spread over about √ε = .08; measured .050 rms without the three largest, which
  # stand alone. A map that mirrors errs by 2.9, one to the mean by 1.5.
  error = mapped[order, 0] - np.sort(y[:, 0])
  assert np.sqrt((error[:-3] ** 2).mean()) < 0.08
  assert (np.diff(mapped[order, 0]) > -1e-4).all()


def test_identical_clouds_tend_to_the_identity():
  x = normal(100, 2, 5)
  gaps = []
  for epsilon in (1e-1, 1e-2, 1e-3):
    result = sinkhorn.fit(x, x, epsilon=epsilon)
    gaps.append(np.linalg.norm(map_of(x, result)(x) - x) / np.linalg.norm(x))
  # falls with ε, to nothing where neighbours are farther apart than √ε: measured .10, .029, .0039;
  # swapped rows: near 1
  assert gaps[0] > gaps[1] > gaps[2]
  assert gaps[2] < 0.01


def test_weights_are_as_many_copies_of_a_row():
  """Row i of weight k_i/Σk beside k_i copies of it, all of one weight: the same problem, so the
  same g and map.
  """
  x, y, rng = normal(60, 3, 20), normal(50, 3, 21, 1.4), np.random.default_rng(22)
  many, often = rng.integers(1, 5, 60), rng.integers(1, 5, 50)
  copies = sinkhorn.fit(
    x.repeat(many, 0),
    y.repeat(often, 0),
    epsilon=0.05,
    threshold=1e-6,
    max_iterations=5000,
  )
  weights = many / many.sum(), (often / often.sum()).astype(np.float32)
  once = sinkhorn.fit(
    x, y, epsilon=0.05, threshold=1e-6, max_iterations=5000, weights=weights
  )
  assert once.converged
  assert copies.converged
  assert once.mean_cost == pytest.approx(
    copies.mean_cost, rel=1e-5
  )  # float32 rows, sums in float64
  p = plan(x, y, once)
  # rounding of exponents of about 1/.05 leaves 1e-5 in all; uniform weights would err by .4
  assert np.abs(p.sum(1) - weights[0]).sum() < 3e-5
  assert np.abs(p.sum(0) - weights[1]).sum() < 3e-5
  gap = np.abs(map_of(y, once)(x) - map_of(y.repeat(often, 0), copies)(x)).max()
  # Of values of 1.4: marginals to 1e-6 leave potentials to 1e-4 ε or so.
  assert gap < 1e-3
  plain = sinkhorn.fit(x, y, epsilon=0.05, threshold=1e-6, max_iterations=5000)
  assert np.abs(map_of(y, plain)(x) - map_of(y, once)(x)).max() > 30 * gap


def test_both_marginals_are_what_history_says():
  x, y = normal(130, 4, 6), normal(90, 4, 7, 2.0)
  result = sinkhorn.fit(x, y, epsilon=0.02)
  p = plan(x, y, result)
  rows, columns = np.abs(p.sum(1) - 1 / 130).sum(), np.abs(p.sum(0) - 1 / 90).sum()
  assert result.converged
  # over-relaxed potentials err in both marginals: the larger is recorded (4e-5: float32 exponents)
  assert result.history["error"][-1] == pytest.approx(max(rows, columns), abs=4e-5)
  assert result.history["error"][-1] < 1e-3
  assert min(rows, columns) > 1e-4
  assert result.mean_cost == pytest.approx(cost_matrix(x, y).mean(), rel=1e-5)
  assert result.epsilon == pytest.approx(0.02 * result.mean_cost)


def test_float32_potentials_against_float64_numpy():
  """Far from the origin, where |x|² − 2xy + |y|² would lose all digits without centring."""
  x, y = normal(120, 6, 8) + 300, normal(110, 6, 9, 1.5) + 300
  result = sinkhorn.fit(x, y, epsilon=0.01, threshold=1e-5)
  cost, eps = cost_matrix(x, y), result.epsilon
  g = np.asarray(result.g, np.float64)
  for _ in range(3000):
    f = -eps * (
      np.log(120) + scipy.special.logsumexp((g[None, :] - cost) / eps, axis=1)
    )
    g = -eps * (
      np.log(110) + scipy.special.logsumexp((f[:, None] - cost) / eps, axis=0)
    )
  # the L1 error of 1e-5 times ε/(slowest rate) and 2⁻²⁴ of the cost; measured 2.6e-5 of the mean
  # cost. Without centring the products are 5e5 and their rounding .06, 3e-3 of it.
  for ours, exact in ((result.f, f), (result.g, g)):
    ours = np.asarray(ours, np.float64)
    assert (
      np.abs((ours - ours.mean()) - (exact - exact.mean())).max()
      < 1e-4 * result.mean_cost
    )


def test_float64_is_kept_where_it_is_on(x64):
  x, y = normal(40, 3, 10).astype(np.float64), normal(50, 3, 11).astype(np.float64)
  result = sinkhorn.fit(x, y, epsilon=0.05, threshold=1e-12, max_iterations=3000)
  assert result.f.dtype == jnp.float64
  # float32 stops at 1e-6
  assert np.abs(plan(x, y, result).sum(0) - 1 / 50).sum() < 1e-11


def test_one_compilation_serves_the_ladder():
  x, y = normal(33, 3, 12), normal(35, 3, 13)
  sinkhorn_steps.make_chunk.cache_clear()
  result = sinkhorn.fit(x, y, epsilon=0.01)
  assert len(set(result.history["epsilon"])) == 7  # 64, 32, ..., 1
  np.testing.assert_allclose(np.diff(np.log2(result.history["epsilon"][:7])), -1)
  chunk = sinkhorn_steps.make_chunk(
    iterations=10, momentum=1.5, path="dense", mesh=meshes.make(1)
  )
  assert chunk._cache_size() == 1


def test_a_fall_of_epsilon_leaves_the_scalings_in_their_range(monkeypatch):
  """Spread plans, a quarter of ε at a time: left to the scalings, a fall is (nm)³ = 10¹⁴, and to a
  power of 1.5.
  """
  monkeypatch.setattr(
    sinkhorn_steps, "_fused", lambda x, y, f, g, *_, **__: (f, g, jnp.float32(jnp.nan))
  )
  sinkhorn_steps.make_chunk.cache_clear()
  x, y = normal(256, 256, 16), normal(256, 256, 17, 1.3)
  assert sinkhorn.fit(
    x, y, epsilon=0.01, anneal=(64.0, 0.25), path="dense"
  ).converged  # no chunk was done again
  sinkhorn_steps.make_chunk.cache_clear()


def saved(folder, keep=3):
  return checkpoints_lib.Checkpoints(folder, "hash", keep=keep)


def stop_after(chunks):
  asked = iter([False] * chunks)
  return lambda: next(asked, True)


def test_stopped_and_resumed_is_undisturbed_bit_for_bit(tmp_path):
  """4 chunks = 2 + stop + 2; the stop falls on the ladder, so the rung must be found again too."""
  x, y = normal(70, 4, 14), normal(60, 4, 15)
  options = dict(epsilon=0.01, max_iterations=20, check_every=5, threshold=1e-5)
  whole = sinkhorn.fit(x, y, **options)
  assert not whole.converged
  saver = saved(tmp_path / "c")
  with pytest.raises(
    supervision.Interrupted,
    match=r"after 10 iterations, marginal error .*; the same command goes on",
  ):
    sinkhorn.fit(x, y, **options, checkpoints=saver, stop=stop_after(2))
  assert saver.steps() == [10]
  saver.close()
  saver = saved(tmp_path / "c")
  calls = []
  resumed = sinkhorn.fit(
    x, y, **options, checkpoints=saver, progress=lambda *call: calls.append(call)
  )
  assert len(calls) == 2
  assert resumed.history == whole.history
  np.testing.assert_array_equal(resumed.f, whole.f)
  np.testing.assert_array_equal(resumed.g, whole.g)
  again = sinkhorn.fit(
    x,
    y,
    **options,
    checkpoints=saver,
    progress=lambda *call: pytest.fail("nothing is left to do"),
  )
  np.testing.assert_array_equal(again.g, whole.g)
  with pytest.raises(ValueError, match="belong to other rows or another ladder"):
    sinkhorn.fit(x + 1e-3, y, **options, checkpoints=saver)
  saver.close()


def test_stop_before_the_first_chunk_saves_nothing(tmp_path):
  saver = saved(tmp_path / "c")
  with pytest.raises(supervision.Interrupted, match="after 0 iterations"):
    sinkhorn.fit(
      normal(9, 2, 0),
      normal(9, 2, 1),
      epsilon=0.1,
      checkpoints=saver,
      stop=lambda: True,
    )
  assert saver.steps() == []
  saver.close()


def with_nan(rows, *bad):
  rows = rows.copy()
  rows[list(bad), 0] = np.nan
  return rows


@pytest.mark.parametrize(
  ("source", "target", "options", "message"),
  [
    (
      with_nan(normal(20, 3, 0), 4, 7),
      normal(20, 3, 1),
      {},
      r"source rows hold NaN .* 2 of 20 rows \(4, 7\): drop",
    ),
    (
      normal(20, 3, 0),
      with_nan(normal(20, 3, 1), 2),
      {},
      r"target rows hold NaN .* 1 of 20 rows \(2\)",
    ),
    (
      normal(20, 3, 0),
      np.ones((20, 3), np.float32),
      {},
      "all 20 target rows are the same: a constant cloud",
    ),
    (
      normal(20, 3, 0),
      normal(20, 4, 1),
      {},
      r"source \(20, 3\) and target \(20, 4\) came, need .* of one d",
    ),
    (
      normal(1, 3, 0),
      normal(20, 3, 1),
      {},
      "1 source and 20 target rows came, a fit needs at least 2",
    ),
    (
      normal(20, 3, 0),
      normal(20, 3, 1),
      {"epsilon": 0.0},
      "epsilon=0.0, threshold=0.001: both must be > 0",
    ),
    (normal(20, 3, 0), normal(20, 3, 1), {"epsilon": -1.0}, "both must be > 0"),
    (
      normal(20, 3, 0),
      normal(20, 3, 1),
      {"epsilon": 1e-6},
      r"too small for float32: .* Use epsilon >= [23]\.\de-05",
    ),
    (
      normal(20, 3, 0),
      normal(20, 3, 1),
      {"anneal": (0.5, 0.5)},
      r"anneal=\(0.5, 0.5\): need a start >= 1",
    ),
    (normal(20, 3, 0), normal(20, 3, 1), {"momentum": 2.0}, "needs 1 <= momentum < 2"),
    (normal(20, 3, 0), normal(20, 3, 1), {"check_every": 0}, "both must be at least 1"),
    (
      normal(4, 3, 0),
      normal(4, 3, 1),
      {"weights": (np.ones(4), None)},
      "source weights sum to 4, a plan needs 1",
    ),
    (
      normal(4, 3, 0),
      normal(2, 3, 1),
      {"weights": (None, [0.5, 0.4999])},
      "target weights sum to 0.9999",
    ),
    (
      normal(4, 3, 0),
      normal(2, 3, 1),
      {"weights": (None, [1.0, 0.0])},
      "target weights hold 0: need > 0",
    ),
    (
      normal(2, 3, 0),
      normal(4, 3, 1),
      {"weights": ([np.nan, 1.0], None)},
      "source weights hold nan",
    ),
    (
      normal(2, 3, 0),
      normal(4, 3, 1),
      {"weights": ([0.5, np.inf], None)},
      "source weights hold inf",
    ),
    (
      normal(4, 3, 0),
      normal(2, 3, 1),
      {"weights": (np.full(2, 0.5), None)},
      r"weights are \(2,\), need \[4\]",
    ),
  ],
)
def test_refusals_say_what_to_change(source, target, options, message):
  with pytest.raises(ValueError, match=message) as caught:
    sinkhorn.fit(source, target, **{"epsilon": 0.1} | options)
  assert "\n" not in str(caught.value)


def test_smallest_epsilon_named_is_accepted_and_not_less():
  x, y = normal(20, 3, 0), normal(20, 3, 1)
  with pytest.raises(ValueError, match="too small") as caught:
    sinkhorn.fit(x, y, epsilon=1e-6)
  named = float(str(caught.value).split("epsilon >= ")[1].split(",")[0])
  sinkhorn.fit(x, y, epsilon=named, max_iterations=10)
  with pytest.raises(ValueError, match="too small"):
    sinkhorn.fit(x, y, epsilon=named / 1.3, max_iterations=10)


def test_divergence_is_said():
  """1.95 straight at a small ε diverges; the potentials before it are left as they were."""
  x, y = normal(100, 8, 16), normal(100, 8, 17, 2.0)
  with pytest.raises(
    FloatingPointError,
    match=r"potentials diverged after .* set momentum=1 \(it is 1.95\)",
  ):
    sinkhorn.fit(x, y, epsilon=1e-3, momentum=1.95, anneal=(1.0, 0.5))


def test_stall_is_said(monkeypatch, tmp_path):
  """float32 cannot reach 1e-9; the door, which would have said so, is held open."""
  monkeypatch.setattr(sinkhorn, "_rounding", lambda *_: 0.0)
  saver = saved(tmp_path / "c")
  with pytest.raises(
    ValueError,
    match=r"no longer falls \(\d+ iterations, .*\), threshold 1e-09: raise epsilon",
  ):
    sinkhorn.fit(
      normal(64, 2, 18),
      normal(64, 2, 19),
      epsilon=0.1,
      threshold=1e-9,
      check_every=5,
      checkpoints=saver,
    )
  assert len(saver.steps()) == 1
  saver.close()


def test_verdict_is_the_last_error_at_the_last_epsilon():
  history = {
    "iteration": [10, 20, 30],
    "epsilon": [4.0, 2.0, 1.0],
    "error": [1e-9, 1e-9, 0.5],
  }
  # Small errors at a larger ε do not count.
  assert sinkhorn._verdict(history, 1.0, 1e-3, 100) == ""
  assert sinkhorn._verdict(history, 1.0, 1e-3, 30) == "spent"
  assert (
    sinkhorn._verdict(history | {"error": [1.0, 1.0, 1e-4]}, 1.0, 1e-3, 30)
    == "converged"
  )
