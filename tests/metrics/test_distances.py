"""Distances against closed forms and scipy."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from downscaling.fields import operators, symmetry
from downscaling.metrics import distances


@pytest.fixture
def rng():
  return np.random.default_rng(0)


def cyclic(n):
  """Shifts of n points, and shifts with reflection and a change of sign."""
  i = np.arange(n)
  index = np.concatenate(
    [(i + s)[None] % n for s in range(n)] + [(s - i)[None] % n for s in range(n)]
  )
  return symmetry.Group(index, np.repeat([1.0, -1.0], n))


def test_covariance_of_known_scale(rng):
  """pred = c·ref has covariance c² Cov, so the error is c² − 1 exactly; a shift of the mean changes
  nothing.
  """
  ref = rng.normal(size=(50, 7))
  # Rounding only. Dividing by S in one place and S − 1 in another, or leaving the mean in, shows at
  # 1e-2.
  assert distances.cov_rmse(1.5 * ref + 3, ref) == pytest.approx(1.25, rel=1e-12)
  assert np.allclose(distances.covariance(ref), np.cov(ref.T), rtol=1e-12)


def test_large_fields_give_the_same_covariance_error(rng, monkeypatch):
  pred, ref = rng.normal(size=(300, 40)) * 1.2 + 1, rng.normal(size=(400, 40)) - 2
  dense = distances.cov_rmse(pred, ref)
  monkeypatch.setattr(distances, "DENSE_DIMENSIONS", 8)
  # Products of rows cancel to about 1e-8 of the norm; centring by the wrong set's mean shows at 1.
  assert distances.cov_rmse(pred, ref) == pytest.approx(dense, rel=1e-6)


def test_symmetric_covariance_sees_the_law_not_the_sample(rng):
  """A stationary field: the group average takes most of the sampling noise and leaves a true
  difference of scale.
  """
  group = cyclic(16)
  pred, ref = rng.normal(size=(2, 200, 16))
  floor, raw = distances.sym_cov_rmse(pred, ref, group), distances.cov_rmse(pred, ref)
  # 256 entries become 9 free ones: measured .135 against .40; without averaging they are equal.
  assert floor < 0.5 * raw
  # Scale 1.5 means 1.25; noise of 200 × 16 values is ±.03 on it.
  assert distances.sym_cov_rmse(1.5 * pred, ref, group) == pytest.approx(1.25, abs=0.12)
  moved = np.stack(
    [np.asarray(group.act(i % 32, y)) for i, y in enumerate(ref.astype(np.float32))]
  )
  assert distances.sym_cov_rmse(moved, ref, symmetry.trivial(16)) > 1e-2
  with pytest.raises(ValueError, match="moves 8 points, the fields have 16"):
    distances.sym_cov_rmse(pred, ref, cyclic(8))


@pytest.mark.parametrize("kind", ["normal", "few", "outlier", "heavy"])
def test_density_is_scipys(rng, kind):
  x = {
    "normal": rng.normal(size=3000),
    "few": rng.normal(size=12),
    "outlier": np.append(rng.normal(size=2000), 25.0),
    "heavy": rng.standard_t(3, size=2000),
  }[kind]
  at = np.linspace(-8, 8, 200)
  mine, theirs = distances.kernel_density(x, at), scipy.stats.gaussian_kde(x)(at)
  # Binning at 1/12 bandwidth: measured 1e-5 to 9e-5 of the peak. Silverman's rule or std with
  # ddof=0 (few): > 1e-2.
  assert np.abs(mine - theirs).max() < 3e-4 * theirs.max()
  # Tails down to 1e-12 of the peak are right too (an FFT would leave 1e-16 · peak noise, a clip a
  # plateau).
  seen = theirs > 1e-12 * theirs.max()
  assert np.abs(np.log(mine[seen] / theirs[seen])).max() < 0.05


def test_kld_of_two_gaussians(rng):
  """KL(N(m₁, s₁²) ‖ N(m₂, s₂²)) = ln(s₂/s₁) + (s₁² + (m₁ − m₂)²)/(2 s₂²) − ½, variances smoothed by
  1 + S^(−2/5).

  pred is the wider one: where it has no samples its kernel density is no Gaussian, whatever S.
  """
  n = 20_000
  s1, s2, gap = (
    math.sqrt(1 + n**-0.4) * s for s in (0.7, 1.0, 0.3 / math.sqrt(1 + n**-0.4))
  )
  exact = math.log(s2 / s1) + (s1**2 + gap**2) / (2 * s2**2) - 0.5
  ref, pred = 0.7 * rng.normal(size=(n, 2)), rng.normal(size=(n, 2)) + 0.3
  # .146 within 2 % of sampling noise; KL(pred ‖ ref) would be .25, log₂ .21.
  assert distances.kld(pred, ref)[1] == pytest.approx(exact, rel=0.05)
  assert distances.kld(pred, ref)[0] == pytest.approx(
    2 * distances.kld(pred, ref)[1], rel=1e-12
  )
  assert distances.kld(ref, ref)[0] == 0


def test_kld_is_the_integral_of_scipys_densities(rng):
  pred, ref = (
    rng.normal(size=(800, 3)) * [1, 0.6, 1.4] + [0, 0.5, 0],
    rng.normal(size=(1000, 3)),
  )
  at = np.linspace(-9, 9, 6001)
  direct = []
  for d in range(3):
    p, q = (scipy.stats.gaussian_kde(x[:, d])(at) for x in (ref, pred))
    safe = (p > 0) & (q > 0)
    direct.append(
      np.trapezoid(
        np.where(safe, p * np.log(np.where(safe, p, 1) / np.where(safe, q, 1)), 0), at
      )
    )
  # Quadrature at a third of a bandwidth and binning: measured 2e-4. A grid cut at the range of the
  # samples: 1e-2.
  assert np.allclose(distances.kld_by_dimension(pred, ref), direct, rtol=2e-3)


@pytest.mark.parametrize(("s", "r"), [(300, 300), (300, 450), (7, 501), (2, 3)])
def test_wasserstein_is_scipys(rng, s, r):
  pred, ref = rng.normal(size=(s, 5)) * 1.3, rng.normal(size=(r, 5))
  each = [scipy.stats.wasserstein_distance(pred[:, d], ref[:, d]) for d in range(5)]
  # Both exact.
  assert distances.wass1(pred, ref) == pytest.approx(np.mean(each), rel=1e-10)


def test_wasserstein_of_a_shift(rng):
  ref = rng.normal(size=(64, 3, 4))
  assert distances.wass1(ref[::-1] + 0.25, ref) == pytest.approx(0.25, rel=1e-12)


def plain_mmd(pred, ref):
  scale = 2 * np.trace(np.cov(ref.T))
  term = lambda x, y: np.mean(
    [
      sum(a**2 / (a**2 + ((p - q) ** 2).sum() / scale) for a in (0.2, 0.5, 0.9, 1.3))
      for p, q in itertools.product(x, y)
    ]
  )
  return math.sqrt(term(pred, pred) - 2 * term(pred, ref) + term(ref, ref))


def test_mmd_is_the_double_sum_in_any_tiling(rng, monkeypatch):
  pred, ref = (
    rng.normal(size=(33, 6)) + 0.7 + 50,
    rng.normal(size=(50, 6)) + 50,
  )  # 50: float32 distances cancel uncentred
  exact = plain_mmd(pred, ref)
  # float32 distances: 1e-6 of k, of which MMD is a square root of differences.
  assert distances.mmd(pred, ref) == pytest.approx(exact, abs=1e-4)
  monkeypatch.setattr(
    distances, "_TILE", 16
  )  # padding counted, or the diagonal tile taken twice, shows at 1e-1
  assert distances.mmd(pred, ref) == pytest.approx(exact, abs=1e-4)
  assert distances.mmd(pred, ref, distances.kernel_ref_term(ref)) == pytest.approx(
    exact, abs=1e-4
  )
  assert distances.mmd(ref, ref) < 1e-3


def test_mmd_ignores_units_and_refinement(rng):
  pred, ref = rng.normal(size=(200, 8)) * 1.3, rng.normal(size=(200, 8))
  value = distances.mmd(pred, ref)
  assert distances.mmd(1e3 * pred, 1e3 * ref) == pytest.approx(value, rel=1e-3)
  assert distances.mmd(np.repeat(pred, 4, 1), np.repeat(ref, 4, 1)) == pytest.approx(
    value, rel=1e-3
  )
  floor = distances.mmd(rng.normal(size=(200, 8)), ref)
  assert (
    value > 1.3 * floor
  )  # the kernel sees a scale of 1.3; with raw distances on 1e3 both would be equal


def test_all_distances_are_invariant_to_order_and_shape(rng):
  pred, ref = (
    rng.normal(size=(90, 4, 4)).astype(np.float32),
    rng.normal(size=(70, 4, 4)).astype(np.float32),
  )
  shuffled = pred.reshape(90, 16)[rng.permutation(90)]
  for metric in (
    distances.cov_rmse,
    distances.wass1,
    distances.mmd,
    lambda a, b: distances.kld(a, b)[0],
  ):
    assert metric(shuffled, ref.reshape(70, 16)) == pytest.approx(
      metric(pred, ref), rel=1e-4
    )


def test_two_draws_of_one_law_are_at_the_floor(rng):
  """Each metric of a second draw lies within a factor 1.5 of its floor; a draw of another law does
  not.
  """
  law = lambda: rng.normal(size=(1500, 12)) @ np.diag(np.linspace(0.5, 2, 12))
  ref, floor, same, other = law(), law(), law(), 1.4 * law()
  for metric in (
    distances.cov_rmse,
    distances.wass1,
    distances.mmd,
    lambda a, b: distances.kld(a, b)[0],
  ):
    least = metric(floor, ref)
    assert least / 1.5 < metric(same, ref) < 1.5 * least
    assert metric(other, ref) > 2 * least


def test_variability_is_the_spread_within_a_condition(rng):
  """Conditions 10 apart, members N(0, .3²): .3, whatever the conditions are."""
  ensemble = 10 * rng.normal(size=(60, 1, 20)) + 0.3 * rng.normal(size=(60, 16, 20))
  assert distances.variability(ensemble) == pytest.approx(
    0.3, rel=0.02
  )  # ddof=0 gives .290; over all rows, 10
  assert distances.variability(ensemble[:, :1]) is None


@pytest.mark.parametrize("make", [operators.Strided.on, operators.BlockMean.on])
def test_constraint(rng, make):
  operator = make((24,), 4)
  x = rng.normal(size=(5, 3, 24)).astype(np.float32)
  seen = np.asarray(operator.apply(x[..., None]))[..., 0]
  y = seen[:, 0]
  held = np.asarray(operator.constrain(x[..., None], y[:, None, :, None]))[..., 0]
  assert distances.constraint_rmse(held, y, operator) < 1e-6
  exact = (
    np.linalg.norm(seen - y[:, None], axis=-1) / np.linalg.norm(seen, axis=-1)
  ).mean()
  assert distances.constraint_rmse(x, y, operator) == pytest.approx(exact, rel=1e-5)
  with pytest.raises(ValueError, match="4 conditions for samples of 5"):
    distances.constraint_rmse(x, y[:4], operator)


def test_what_a_map_keeps_of_its_input(rng):
  y = rng.normal(size=(4000, 6))
  assert distances.corr_input(y, 2 * y + 5) == pytest.approx(1)
  assert distances.corr_input(y, -y) == pytest.approx(-1)
  # 24 000 values: ±.0065.
  assert abs(distances.corr_input(y, rng.normal(size=y.shape))) < 0.03
  anomaly = y - y.mean(axis=0)
  assert distances.displacement(y, y + 0.1 * anomaly) == pytest.approx(0.1)
  # 273 more on both sides change no number: °C and K give one displacement.
  assert distances.displacement(y + 273, y + 0.1 * anomaly + 273) == pytest.approx(0.1)
  assert distances.displacement(y, y) == 0
  # Which a correlation calls 1.
  assert distances.amplitude(0.01 * y, y) == pytest.approx(0.01)
  with pytest.raises(ValueError, match="the very rows y"):
    distances.corr_input(y, y[:10])


def test_persistence_is_the_correlation_of_neighbours(rng):
  """An autoregressive series with coefficient .8 has the lag-1 correlation .8."""
  steps = [rng.normal(size=(50, 3))]
  for _ in range(400):
    steps.append(0.8 * steps[-1] + 0.6 * rng.normal(size=(50, 3)))
  x = np.stack(steps).reshape(-1, 3)
  now = np.arange(len(x) - 50)
  # 60 000 values with a decorrelation time of 9 steps: ± .005.
  assert distances.persistence(x, now, now + 50) == pytest.approx(0.8, abs=0.02)
  assert distances.persistence(x, now[:1], now[:1] + 50) is None


@pytest.mark.parametrize(
  "metric", [distances.cov_rmse, distances.kld, distances.wass1, distances.mmd]
)
def test_bad_sets_are_named(rng, metric):
  good, bad = rng.normal(size=(10, 4)), rng.normal(size=(10, 4))
  bad[6, 2] = np.nan
  with pytest.raises(ValueError, match=r"pred holds NaN .* row 6 of 10"):
    metric(bad, good)
  with pytest.raises(ValueError, match="ref holds NaN"):
    metric(good, bad)
  with pytest.raises(ValueError, match="4 values a row and ref 3"):
    metric(good, good[:, :3])
  with pytest.raises(ValueError, match=r"pred has shape \(1, 4\)"):
    metric(good[:1], good)


def test_constant_sets_are_named(rng):
  good = rng.normal(size=(10, 4))
  with pytest.raises(ValueError, match="every row of ref is the same"):
    distances.cov_rmse(good, np.ones((10, 4)))
  flat = good.copy()
  flat[:, 3] = 1
  with pytest.raises(
    ValueError, match="pred has the same value in all 10 rows at point 3"
  ):
    distances.kld(flat, good)
