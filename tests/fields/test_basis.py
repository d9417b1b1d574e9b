"""Modes of fields on domains that are periodic, are not, or are along some axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from downscaling.diffusion import denoiser
from downscaling.fields import operators
from downscaling.fields.basis import Trigonometric
from downscaling.sampling import gaussian_gain

GRIDS = [
  ((12,), (True,)),
  ((12,), (False,)),
  ((6, 8), (True, True)),
  ((6, 8), (False, True)),
  ((6, 8), (True, False)),
  ((6, 7), (False, False)),
  ((5, 7), (True, False)),
]


@pytest.fixture(params=GRIDS, ids=str)
def basis(request):
  return Trigonometric(*request.param)


def covariance(basis, table):
  """Q diag(table) Qᵀ of one channel, [N, N], by the basis's own transforms."""
  n = int(np.prod(basis.space))
  unit = jnp.eye(n).reshape(n, *basis.space, 1)
  coloured = basis.fields(basis.modes(unit) * basis.held(table[None]))
  return np.asarray(coloured).reshape(n, n)


def random_table(basis, channels=1):
  """Variances that are those of real fields."""
  table = np.random.default_rng(0).uniform(0.1, 2.0, (*basis.space, channels))
  return basis.symmetrised(table[None])[0]


def test_fields_come_back(basis, x64):
  x = np.random.default_rng(1).standard_normal((3, *basis.space, 2))
  back = basis.fields(basis.modes(jnp.asarray(x)))
  np.testing.assert_allclose(back, x, atol=1e-12)


def test_power_is_that_of_the_field_and_numpy_agrees(basis, x64):
  x = np.random.default_rng(1).standard_normal((3, *basis.space, 2))
  axes = tuple(range(1, x.ndim - 1))
  power = basis.power(x)
  np.testing.assert_allclose(power.sum(axes), (x**2).sum(axes), rtol=1e-12)
  np.testing.assert_allclose(basis.power(jnp.asarray(x)), power, rtol=1e-10, atol=1e-12)
  # The mean of a field lies in the first mode alone.
  flat = basis.power(np.ones((1, *basis.space, 1)))
  assert flat.flat[0] == pytest.approx(np.prod(basis.space))
  assert np.abs(flat).sum() == pytest.approx(flat.flat[0])


def test_a_table_of_real_fields_is_symmetric_already(basis, x64):
  power = basis.power(np.random.default_rng(1).standard_normal((3, *basis.space, 2)))
  np.testing.assert_allclose(basis.symmetrised(power), power, rtol=1e-9, atol=1e-12)


def test_rows_make_the_covariance_that_an_operator_sees(basis, x64):
  matrix = np.random.default_rng(2).standard_normal((4, np.prod(basis.space)))
  table = random_table(basis)
  rows, diagonal = (
    basis.rows(matrix),
    np.asarray(basis.expanded(jnp.asarray(table)[None]))[0, :, 0],
  )
  whole = matrix @ covariance(basis, jnp.asarray(table)) @ matrix.T
  np.testing.assert_allclose((rows * diagonal) @ rows.T, whole, rtol=1e-9, atol=1e-9)


def test_the_gain_gives_the_conditional_mean(basis, x64):
  """Of a Gaussian field of any such domain: E[x | C′x = y] = ΣC′ᵀ(C′ΣC′ᵀ + R)⁻¹ y, channel by
  channel.
  """
  factors = tuple(2 if n % 2 == 0 else n for n in basis.space)
  op = operators.BlockMean.on(basis.space, factors)
  table, noise = random_table(basis, 2), (0.0, 0.3)
  gain = gaussian_gain.Gain(op, gaussian_gain.prior_variance(table), noise, basis=basis)
  y = np.random.default_rng(3).standard_normal((1, *op.coarse, 2))
  got = np.asarray(gain.correction(jnp.asarray(y), jnp.full(1, jnp.inf)))
  matrix = op.matrix()
  for channel, std in enumerate(noise):
    sigma = covariance(basis, jnp.asarray(table[..., channel : channel + 1]))
    seen = matrix @ sigma @ matrix.T + std**2 * np.eye(len(matrix))
    want = sigma @ matrix.T @ np.linalg.solve(seen, y[0, ..., channel].ravel())
    # prior_variance keeps its table in float32, whose rounding the inverse makes larger.
    np.testing.assert_allclose(got[0, ..., channel].ravel(), want, rtol=2e-5, atol=2e-5)


def test_a_silent_network_is_the_exact_denoiser(basis):
  """E[x | x + σn] of a Gaussian field whose modes are those of the basis."""
  table = random_table(basis)
  silent = denoiser.Denoiser(lambda x, level: jnp.zeros_like(x), table, basis=basis)
  x = np.random.default_rng(4).standard_normal((1, *basis.space, 1)).astype(np.float32)
  got = silent.apply({}, jnp.asarray(x), jnp.full(1, 0.7))
  sigma = covariance(basis, jnp.asarray(table, jnp.float32)).astype(np.float64)
  want = sigma @ np.linalg.solve(sigma + 0.7**2 * np.eye(len(sigma)), x.ravel())
  np.testing.assert_allclose(np.ravel(got), want, rtol=1e-4, atol=1e-5)  # float32


def test_waves_are_those_of_the_fft():
  basis = Trigonometric((6, 8))
  x = np.random.default_rng(5).standard_normal((2, 6, 8, 1)).astype(np.float32)
  np.testing.assert_array_equal(basis.modes(x), jnp.fft.rfftn(x, axes=(1, 2)))
  np.testing.assert_array_equal(
    basis.held(np.arange(48.0).reshape(6, 8, 1)),
    np.arange(48.0).reshape(6, 8, 1)[:, :5],
  )


def test_draws_of_the_prior_have_its_covariance():
  """gaussian_start without a condition that says anything, on a strip."""
  basis = Trigonometric((4, 6), (False, True))
  table = random_table(basis)
  op = operators.Strided.on((4, 6), (4, 6))
  gain = gaussian_gain.Gain(op, gaussian_gain.prior_variance(table), 1e3, basis=basis)
  keys = jax.random.split(jax.random.key(0, impl="threefry2x32"), 20000)
  y = jnp.zeros((len(keys), 1, 1, 1))
  drawn = jax.jit(lambda keys, y: gaussian_gain.gaussian_start(keys, gain, y, 0.0))(
    keys, y
  )
  found = np.cov(np.reshape(drawn, (len(keys), -1)).T)
  # A covariance of 20 000 rows is good to 2/√20000 of the variances, which are about 1.
  np.testing.assert_allclose(found, covariance(basis, jnp.asarray(table)), atol=0.06)


def test_refusals():
  with pytest.raises(
    ValueError, match="1 axes are said to be periodic or not, of a grid with 2"
  ):
    Trigonometric((4, 4), (True,))
  op = operators.Strided.on((8,), 2)
  with pytest.raises(
    ValueError, match=r"a basis of a grid \(6,\) for an operator on \(8,\)"
  ):
    gaussian_gain.Gain(op, lambda sigma: sigma, basis=Trigonometric((6,)))
  wide = operators.Strided.on((10000,), 2)
  with pytest.raises(ValueError, match="or of a domain that is not periodic"):
    gaussian_gain.Gain(
      wide, lambda sigma: sigma, basis=Trigonometric((10000,), (False,))
    )
