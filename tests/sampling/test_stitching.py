"""Stitching: linear-Gaussian windows against dense algebra, an AR(1) in time, plain sampling where
one window does.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from downscaling.diffusion import schedules
from downscaling.fields.operators import Strided
from downscaling.sampling import gaussian_gain, guidance, solvers, stitching
from downscaling.sampling.stitching import Stitching

POINTS = 2  # AR(1) frames of two independent points


def chain(length, rho):
  """Covariance in time of a stationary AR(1) of unit variance."""
  return rho ** np.abs(np.subtract.outer(np.arange(length), np.arange(length)))


def exact(frames, rho):
  """E[x₀ | x₀ + σ·noise] of a window of AR(1) frames, [B, POINTS, F]."""
  values, vectors = np.linalg.eigh(chain(frames, rho))
  values, vectors = jnp.asarray(values, jnp.float32), jnp.asarray(vectors, jnp.float32)

  def denoise(x, sigma):
    weight = values[None] / (values[None] + sigma[:, None] ** 2)
    return ((x @ vectors) * weight[:, None]) @ vectors.T

  return denoise


def window_matrix(frames, rho, sigma):
  c = chain(frames, rho)
  return c @ np.linalg.inv(c + sigma**2 * np.eye(frames))


# ---------------------------------------------------------------- where windows lie, what counts


def test_places_and_weights():
  plan = Stitching(frames=4, overlap=2, series=8)
  np.testing.assert_array_equal(plan.rows, [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7]])
  # Edge frames (3 of the first window, 2 and 5 of the second, ...) count nothing where another
  # window knows better.
  np.testing.assert_allclose(plan.weights, [[1, 1, 1, 0], [0, 1, 1, 0], [0, 1, 1, 1]])
  np.testing.assert_array_equal(
    plan.seams, [False, True, False, True, False, True, False]
  )
  wide = Stitching(frames=6, overlap=4, series=10)
  total = np.bincount(wide.rows.ravel(), wide.weights.ravel())
  np.testing.assert_allclose(total, 1)
  one = Stitching(frames=3, overlap=1, series=5)
  # On the edge of both: alike.
  np.testing.assert_allclose(one.weights, [[1, 1, 0.5], [0.5, 1, 1]])
  apart = Stitching(frames=2, overlap=0, series=4)
  np.testing.assert_allclose(apart.weights, 1)


@pytest.mark.parametrize(
  ("sizes", "words"),
  [
    ((4, 2, 9), r"--config.sampling.series.frames=8 or 10\."),
    ((4, 4, 8), r"need 0 to 3.*--config.sampling.series.overlap=3\."),
    ((4, -1, 8), r"--config.sampling.series.overlap=0\."),
    ((4, 2, 3), r"--config.sampling.series.frames=4 or more"),
    ((0, 0, 3), "at least one frame"),
  ],
)
def test_windows_that_do_not_fit(sizes, words):
  with pytest.raises(ValueError, match=words):
    Stitching(*sizes)


# ---------------------------------------------------------------- the stitched denoiser


@pytest.mark.parametrize(
  "sizes", [(4, 2, 10), (3, 0, 9), (4, 3, 7), (6, 4, 12), (3, 1, 9)]
)
def test_a_linear_denoiser_against_its_matrix(sizes):
  """Σ_w P_wᵀ diag(weights) D P_w by dense algebra, on two points and different noise levels in a
  batch.
  """
  plan, rho = Stitching(*sizes), 0.8
  x = jax.random.normal(jax.random.key(0), (3, POINTS, plan.series))
  sigma = jnp.array([0.1, 1.0, 5.0])
  got = jax.jit(stitching.stitched(exact(plan.frames, rho), plan))(x, sigma)
  for row, s, found in zip(x, sigma, got, strict=True):
    whole = np.zeros((plan.series, plan.series))
    for places, weights in zip(plan.rows, plan.weights, strict=True):
      whole[np.ix_(places, places)] += weights[:, None] * window_matrix(
        plan.frames, rho, float(s)
      )
    np.testing.assert_allclose(
      found, np.asarray(row) @ whole.T, atol=1e-5
    )  # float32, values of order one


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("space", [(5,), (4, 3)])
def test_a_denoiser_that_gives_its_input_back_leaves_no_seam(space, channels):
  """What windows agree on comes out as it is: frames, points and channels in their places."""
  plan = Stitching(6, 4, 12)
  x = jax.random.normal(jax.random.key(1), (2, *space, plan.series * channels))
  got = jax.jit(stitching.stitched(lambda x, sigma: x, plan))(x, jnp.ones(2))
  # Shares such as ⅓ + ⅔ of float32 numbers.
  np.testing.assert_allclose(got, x, rtol=3e-7)


def test_one_window_is_plain_sampling_bit_for_bit():
  denoise, plan = exact(4, 0.9), Stitching(4, 2, 4)
  assert stitching.stitched(denoise, plan) is denoise
  table = np.ones((3, 5, 4), np.float32)
  assert stitching.extended(table, plan) is table


def test_errors_of_a_window_extended_to_a_series():
  """By each frame's place in the windows that hold it, with the denoiser's own weights; here
  channel 2f + c.
  """
  plan = Stitching(4, 2, 8)
  values = np.arange(8, dtype=np.float32)[None]  # frame f, channel c: 2f + c
  got = stitching.extended(values, plan).reshape(8, 2)
  np.testing.assert_array_equal(got[:, 0] / 2, [0, 1, 2, 1, 2, 1, 2, 3])
  np.testing.assert_array_equal(got[:, 1] - got[:, 0], 1)
  halves = stitching.extended(np.float32([0, 1, 4]), Stitching(3, 1, 5))
  # Frame 2: the mean of places 2 and 0.
  np.testing.assert_array_equal(halves, [0, 1, 2, 1, 4])


def test_frames_as_an_axis():
  x = np.arange(2 * 3 * 5 * 2).reshape(2, 3, 5, 2)  # [B, L, N, C]
  np.testing.assert_array_equal(stitching.fold(x)[1, 4], x[1, :, 4].reshape(-1))
  np.testing.assert_array_equal(stitching.unfold(stitching.fold(x), 3), x)


# ---------------------------------------------------------------- long series


def increments(plan, rho, eta, members=2048, steps=96):
  """Mean squared increments [L − 1] over the exact one, and the members, of unconditional draws."""
  draw = jax.jit(
    lambda keys: solvers.dpm_solver_pp_2m_sde(
      stitching.stitched(exact(plan.frames, rho), plan),
      solvers.initial(keys, (POINTS, plan.series), 40.0),
      schedules.levels("edm", steps, 40.0, 1e-2),
      keys,
      eta=eta,
    )
  )
  x = np.asarray(draw(jax.random.split(jax.random.key(3), members)), np.float64)
  return (np.diff(x, axis=-1) ** 2).mean((0, 1)) / (2 - 2 * rho), x


def test_a_long_series_is_continuous_across_seams():
  """Windows of 4 frames of an AR(1), 16 in all: steps across seams are as large as those within
  windows.

  Equal weights for all frames of a window have .97 within and 1.60 across, no overlap 1.0 and 5.0
  (covariances in closed form, see sampling/stitching.py).
  """
  plan = Stitching(4, 2, 16)
  ratio, _ = increments(plan, 0.8, eta=5.0)
  within, seams = ratio[~plan.seams], ratio[plan.seams]
  # 4096 draws of a squared increment: standard error √(2/4096) = .022 a step, .008 a mean over
  # seven.
  assert seams.mean() / within.mean() == pytest.approx(1, abs=0.03)
  # Closed form 1.06, and a few per cent for the size of 96 steps at η 5.
  assert ratio.max() < 1.2
  apart, _ = increments(Stitching(4, 0, 16), 0.8, eta=5.0, members=256)
  assert apart[3] > 4  # windows that know nothing of each other: 5


def test_members_depend_on_their_keys_alone():
  """A member drawn in another batch is the same but for the order of float32 sums."""
  plan = Stitching(4, 2, 8)
  _, many = increments(plan, 0.8, eta=1.0, members=8, steps=8)
  keys = jax.random.split(jax.random.key(3), 8)[5:6]
  alone = solvers.dpm_solver_pp_2m_sde(
    stitching.stitched(exact(4, 0.8), plan),
    solvers.initial(keys, (POINTS, 8), 40.0),
    schedules.levels("edm", 8, 40.0, 1e-2),
    keys,
    eta=1.0,
  )
  np.testing.assert_allclose(alone[0], many[5], atol=1e-4)


def test_guided_series_meet_their_conditions(gaussian):
  """One point in four of every frame observed, by the gain of the training spectrum: each frame
  meets its own.
  """
  field, op, plan = gaussian((16,)), Strided.on((16,), 4), Stitching(3, 1, 7)
  rng = np.random.default_rng(0)
  y = jnp.asarray(rng.normal(size=(4, 7, 4, 1)), jnp.float32)
  g = gaussian_gain.Gain(
    op, gaussian_gain.prior_variance(np.concatenate([field.spectrum] * 7, -1))
  )

  def draw(keys, y):
    denoise = stitching.stitched(field.denoise, plan)
    guided = guidance.make("wiener", denoise, op, y, gain=g)
    x = gaussian_gain.gaussian_start(keys, g, y, 3.0)
    fields = solvers.dpm_solver_pp_2m(
      guided.denoise, x, schedules.levels("edm", 12, 3.0, 1e-2), last=guided.last
    )
    return fields, jnp.zeros(len(keys))

  keys = jax.random.split(jax.random.key(0), 4)
  fields, _ = jax.jit(stitching.over_time(draw, 7))(keys, y)
  assert fields.shape == (4, 7, 16, 1)
  # float32, values of order one.
  np.testing.assert_allclose(op.apply(fields), y, atol=1e-5)
