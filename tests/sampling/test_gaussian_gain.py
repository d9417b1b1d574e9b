"""The gain: FFT against dense algebra in float64, C′G = I, tables, low start, misfit score."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from downscaling.fields.operators import BlockMean, Dense, Strided
from downscaling.runtime import program_cost
from downscaling.sampling import gaussian_gain, guidance

SIGMAS = np.array([0.05, 0.7, 30.0], np.float32)


OPERATORS = [
  Strided.on((24,), 4),
  Strided.on((12, 24), 4),
  Strided.on((15,), 5),
  BlockMean.on((24,), 4),
  BlockMean.on((12, 16), 4),
  Strided.on((12, 20), (3, 5)),
  BlockMean.on((12, 20), (4, 2)),
]


@pytest.mark.parametrize("op", OPERATORS, ids=lambda o: f"{type(o).__name__}{o.fine}")
def test_matches_dense_algebra(gaussian, op):
  field = gaussian(op.fine, corner=2.0)
  rng = np.random.default_rng(0)
  r = rng.normal(size=(len(SIGMAS), *op.coarse, 1)).astype(np.float32)
  circulant = gaussian_gain.Gain(op, gaussian_gain.prior_variance(field.spectrum))
  dense = gaussian_gain.Gain(
    op, gaussian_gain.prior_variance(field.spectrum), dense=True
  )
  both = jax.jit(
    lambda r, s: [
      (g.correction(r, s), g.misfit_score(r, s)) for g in (circulant, dense)
    ]
  )
  (got, score), (got_dense, score_dense) = jax.device_get(both(r, SIGMAS))
  c = op.matrix()
  for i, sigma in enumerate(SIGMAS.astype(np.float64)):
    s = field.spectrum * sigma**2 / (field.spectrum + sigma**2)
    cov = field._replace(spectrum=s).covariance()
    a = c @ cov @ c.T
    exact = (cov @ c.T @ np.linalg.solve(a, r[i].ravel())).reshape(*op.fine, 1)
    chi2 = r[i].ravel() @ np.linalg.solve(a, r[i].ravel()) / r[i].size
    # Float32 against float64, the condition number of A up to 1e2: 1e-4 of the largest value. A
    # fold that forgets a factor f, or H of the block mean, is off by that factor; an rfft half
    # taken on the wrong axis by O(1).
    for value in (got[i], got_dense[i]):
      np.testing.assert_allclose(value, exact, atol=1e-4 * np.abs(exact).max())
    np.testing.assert_allclose([score[i], score_dense[i]], chi2, rtol=2e-4)


@pytest.mark.parametrize(
  "op", [*OPERATORS, BlockMean.on((24,), 4, np.linspace(1, 2, 24))]
)
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_what_is_left_is_the_posteriors_variance(gaussian, op, noise):
  field = gaussian(op.fine, corner=2.0)
  got = jax.jit(
    gaussian_gain.Gain(op, gaussian_gain.prior_variance(field.spectrum), noise).left
  )(SIGMAS)
  c = op.matrix()
  for value, sigma in zip(got, SIGMAS.astype(np.float64), strict=True):
    s = field.spectrum * sigma**2 / (field.spectrum + sigma**2)
    cov = field._replace(spectrum=s).covariance()
    posterior = cov - cov @ c.T @ np.linalg.solve(
      c @ cov @ c.T + noise**2 * np.eye(len(c)), c @ cov
    )
    # float32, where at most nine tenths of the variance cancel, and the dense path adds rounding's
    # share; a forgotten factor of the fold is off by that factor
    assert value == pytest.approx(np.trace(posterior) / len(posterior), rel=3e-5)


def test_what_is_left_of_channels_with_noise_of_their_own(gaussian):
  """The mean of each channel's, where one spectrum serves both; on either path."""
  op, variance, sigma = (
    Strided.on((24,), 4),
    gaussian_gain.prior_variance(gaussian((24,)).spectrum),
    jnp.asarray([0.5]),
  )
  twice = lambda s: jnp.repeat(variance(s), 2, -1)
  alone = lambda dense: np.mean(
    [
      gaussian_gain.Gain(op, variance, noise, dense).left(sigma)[0]
      for noise in (0.0, 0.7)
    ]
  )
  left = lambda variance, dense: gaussian_gain.Gain(
    op, variance, (0.0, 0.7), dense
  ).left(sigma)[0]
  assert left(twice, False) == pytest.approx(alone(False), rel=1e-5)  # float32
  # One spectrum, shared.
  assert left(variance, False) == pytest.approx(alone(False), rel=1e-5)
  assert left(twice, True) == pytest.approx(
    alone(True), rel=3e-5
  )  # float32, and what rounding may take from the dense path


def test_guided_levels_take_equal_steps_of_what_is_left(gaussian):
  g = gaussian_gain.Gain(
    Strided.on((24,), 4),
    gaussian_gain.prior_variance(gaussian((24,), corner=2.0).spectrum),
  )
  levels = gaussian_gain.levels(g, 12, 1.0, 0.01)
  assert levels.dtype == np.float32
  np.testing.assert_allclose(levels[[0, -1]], [1.0, 0.01], rtol=1e-6)
  assert (np.diff(levels) < 0).all()
  left = np.log(np.asarray(g.left(jnp.asarray(levels))))
  np.testing.assert_allclose(
    np.diff(left), (left[-1] - left[0]) / 12, rtol=0.01
  )  # read off 256 levels
  geometric = np.log(np.asarray(g.left(jnp.geomspace(1.0, 0.01, 13))))
  assert np.ptp(np.diff(geometric)) > 0.3  # where even steps of ln σ are far from even
  flat = gaussian_gain.Gain(g.operator, lambda sigma: jnp.ones((len(sigma), 24, 1)))
  np.testing.assert_allclose(
    gaussian_gain.levels(flat, 12, 1.0, 0.01), np.geomspace(1.0, 0.01, 13), rtol=1e-5
  )


def test_any_operator_reproduces_its_observations(gaussian):
  rng = np.random.default_rng(1)
  weights = rng.uniform(0.5, 2.0, size=(24,))
  for op in (
    Dense.on((24,), rng.normal(size=(5, 24))),
    BlockMean.on((24,), 4, weights),
    Strided.on((24,), 3),
  ):
    g = gaussian_gain.Gain(op, gaussian_gain.prior_variance(gaussian((24,)).spectrum))
    y = jnp.asarray(
      rng.normal(size=(2, *op.coarse, 2)), jnp.float32
    )  # two channels share the spectrum
    for sigma in (0.01, 1.0, jnp.inf):
      x = jax.jit(g.correction)(y, jnp.full(2, sigma, jnp.float32))
      # C′G = I to float32 rounding.
      np.testing.assert_allclose(op.apply(x), y, atol=1e-5)


def test_channels_have_their_own_spectrum(gaussian):
  op = Strided.on((24,), 4)
  rough, smooth = (
    gaussian((24,), corner=8.0).spectrum,
    gaussian((24,), corner=2.0).spectrum,
  )
  both = gaussian_gain.Gain(
    op, gaussian_gain.prior_variance(np.concatenate([rough, smooth], -1))
  )
  r = jnp.asarray(np.random.default_rng(2).normal(size=(2, 6, 2)), jnp.float32)
  sigma = jnp.asarray([0.3, 3.0])
  got = jax.jit(both.correction)(r, sigma)
  for channel, spectrum in enumerate((rough, smooth)):
    alone = jax.jit(
      gaussian_gain.Gain(op, gaussian_gain.prior_variance(spectrum)).correction
    )(r[..., channel : channel + 1], sigma)
    np.testing.assert_allclose(got[..., channel : channel + 1], alone, atol=1e-6)


def test_at_no_noise_and_at_all_noise():
  s = np.array([[2.0], [0.5], [0.0], [0.5]])
  variance = gaussian_gain.prior_variance(s)(jnp.asarray([np.inf, 1e-3], jnp.float32))
  np.testing.assert_allclose(
    variance[0, :, 0], [2.0, 0.5, 2e-14, 0.5], rtol=1e-6
  )  # S itself, empty modes lifted
  # σ² where σ² is far below S.
  np.testing.assert_allclose(variance[1, :2, 0], 1e-6, rtol=1e-5)


def test_a_table_of_the_gaussian_error_is_the_wiener_gain(gaussian):
  field, op = gaussian((24,)), Strided.on((24,), 4)
  grid = np.geomspace(1e-3, 100, 60)
  table = (
    field.spectrum[None]
    * grid[:, None, None] ** 2
    / (field.spectrum[None] + grid[:, None, None] ** 2)
  )
  measured, exact = (
    jax.jit(gaussian_gain.measured_variance(grid, table)),
    jax.jit(gaussian_gain.prior_variance(field.spectrum)),
  )
  between = jnp.asarray(np.sqrt(grid[1:] * grid[:-1]), jnp.float32)
  # At the nodes float32 only; between them h²/8 times the curvature (≤ 1) of ln e, h = ln 10 ·
  # 5/59: 0.5 %.
  np.testing.assert_allclose(
    measured(jnp.asarray(grid, jnp.float32)),
    exact(jnp.asarray(grid, jnp.float32)),
    rtol=2e-4,
  )
  np.testing.assert_allclose(measured(between), exact(between), rtol=6e-3)
  # Beyond the table nothing is known: NaN, where a constant would be an answer. Rounding of the
  # ends is no beyond.
  assert np.isnan(measured(jnp.asarray([1e4, 1e-6, 101.0]))).all()
  ends = jnp.asarray([100 * (1 + 1e-6), 1e-3 * (1 - 1e-6)], jnp.float32)
  np.testing.assert_allclose(measured(ends)[:, :, 0], table[[-1, 0], :, 0], rtol=1e-4)
  r = jnp.ones((1, 6, 1))
  got, want = (
    jax.jit(gaussian_gain.Gain(op, v).correction)(r, jnp.asarray([0.4]))
    for v in (measured, exact)
  )
  np.testing.assert_allclose(got, want, atol=5e-3)


def test_low_start_has_the_posterior_plus_noise(gaussian):
  field, op, members = gaussian((16,)), Strided.on((16,), 4), 8192
  y = op.matrix() @ field.draw(0)
  mean, cov = field.posterior(op, y)
  g = gaussian_gain.Gain(op, gaussian_gain.prior_variance(field.spectrum))
  keys = jax.random.split(jax.random.key(1), members)
  many = jnp.broadcast_to(jnp.asarray(y, jnp.float32)[None, :, None], (members, 4, 1))
  x = np.asarray(
    jax.jit(lambda k, y: gaussian_gain.gaussian_start(k, g, y, 0.5))(keys, many)
  )[..., 0]
  # Monte Carlo: a mean to √(1.25/8192) = .012, a covariance entry to about 1.25·√(2/8192) = .02; 4
  # standard errors. One key for both draws would double the cross term, a prior in place of the
  # posterior adds O(1).
  np.testing.assert_allclose(x.mean(0), mean, atol=0.05)
  np.testing.assert_allclose(np.cov(x.T), cov + 0.25 * np.eye(16), atol=0.08)


@pytest.mark.parametrize("name", ["wiener", "moment"])
def test_a_dense_gain_factorises_once_a_level(gaussian, name):
  """FLOPs of a guided step of 32 rows at one level, an irregular operator: A = C′ΣC′ᵀ once, and not
  32 times.
  """
  field, rows = gaussian((64,)), 32
  op = BlockMean.on((64,), 4, np.linspace(1, 2, 64))
  g = gaussian_gain.Gain(op, gaussian_gain.prior_variance(field.spectrum))
  y = jnp.asarray(np.random.default_rng(0).normal(size=(rows, 16, 1)), jnp.float32)
  x, sigma = jnp.ones((rows, 64, 1)), jnp.full(rows, 0.5)
  once, each = (
    guidance.make(name, field.denoise, op, y, gain=g, one_level=one_level).scored
    for one_level in (True, False)
  )
  for got, want in zip(jax.jit(once)(x, sigma), jax.jit(each)(x, sigma), strict=True):
    # float32, A's condition 1e2.
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
  # A takes 2 · 16 · 16 · 128 FLOPs, 65 thousand, for a correction and as many for a score; C′ᵀ of
  # all rows 32 · 2 · 1024 = 65 thousand. So 32 times A is 17 times as much or more in all, and once
  # A is a small part.
  assert program_cost.flops(each, x, sigma) > 10 * program_cost.flops(once, x, sigma)


def test_misfit_score_is_one_where_the_prior_is_right(gaussian):
  field, op, rows = gaussian((24,)), Strided.on((24,), 4), 2048
  rng = np.random.default_rng(3)
  truth = np.linalg.cholesky(field.covariance()) @ rng.normal(size=(24, rows))
  truth = jnp.asarray(truth.T[..., None], jnp.float32)
  g, sigma = (
    gaussian_gain.Gain(op, gaussian_gain.prior_variance(field.spectrum)),
    jnp.full(rows, 0.6),
  )
  noisy = truth + 0.6 * jnp.asarray(rng.normal(size=truth.shape), jnp.float32)
  r = op.apply(truth - field.denoise(noisy, sigma))
  # Mean of rows·6 squares of unit normals: standard error √(2/12288) = .013.
  score = jax.jit(g.misfit_score)
  assert float(score(r, sigma).mean()) == pytest.approx(1, abs=0.05)
  assert float(score(3 * r, sigma).mean()) == pytest.approx(9, abs=0.45)


def test_refusals(gaussian):
  op = Strided.on((24,), 4)
  with pytest.raises(ValueError, match="negative or non-finite"):
    gaussian_gain.prior_variance(np.array([1.0, -1.0]))
  with pytest.raises(ValueError, match="ascending"):
    gaussian_gain.measured_variance([1.0, 0.5], np.ones((2, 24, 1)))
  with pytest.raises(ValueError, match="values <= 0"):
    gaussian_gain.measured_variance([0.5, 1.0], np.zeros((2, 24, 1)))
  with pytest.raises(
    ValueError, match=r"modes \(16,\), the basis of the fine grid has \(24,\)"
  ):
    gaussian_gain.Gain(
      op, gaussian_gain.prior_variance(gaussian((16,)).spectrum)
    ).correction(jnp.ones((1, 6, 1)), jnp.ones(1))
  with pytest.raises(ValueError, match="guidance 'scaled'"):
    gaussian_gain.Gain(
      BlockMean.on((200, 200), 2, np.ones((200, 200))),
      gaussian_gain.prior_variance(np.ones((200, 200, 1))),
    )
