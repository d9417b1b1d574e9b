import jax
import jax.numpy as jnp
import numpy as np
import pytest

from downscaling.fields import operators, symmetry

AREAS = np.random.default_rng(0).uniform(0.5, 2.0, (8, 12))
OPERATORS = {
  "strided 1-D": operators.Strided.on((24,), 8),
  "strided 2-D": operators.Strided.on((8, 12), 4),
  "mean 1-D": operators.BlockMean.on((24,), 8),
  "mean 2-D": operators.BlockMean.on((8, 12), 4),
  "strided unlike": operators.Strided.on((8, 12), (4, 3)),
  "mean unlike": operators.BlockMean.on((8, 12), (2, 6)),
  "areas unlike": operators.BlockMean.on((8, 12), (2, 3), AREAS),
  "areas 2-D": operators.BlockMean.on((8, 12), 4, AREAS),
  "dense": operators.Dense.on((8, 12), np.random.default_rng(1).normal(size=(5, 96))),
}


@pytest.mark.parametrize("op", OPERATORS.values(), ids=OPERATORS)
def test_moore_penrose(op, x64):
  """The four Penrose conditions against the dense matrix, in float64: rounding is 1e-14, a
  transposed axis is 1.
  """
  matrix = op.matrix()
  n = int(np.prod(op.coarse))
  eye = jnp.eye(n).reshape(n, *op.coarse, 1)
  inverse = np.asarray(op.pinv(eye)).reshape(n, -1).T
  np.testing.assert_allclose(inverse, np.linalg.pinv(matrix), atol=1e-12)


def test_factors_by_axis_against_their_definition():
  """Unlike axes and factors: a factor of the other axis, or one for both, gives another grid or
  other values.
  """
  x = np.random.default_rng(3).normal(size=(2, 8, 12, 1)).astype(np.float32)
  np.testing.assert_array_equal(OPERATORS["strided unlike"].apply(x), x[:, ::4, ::3])
  means = x[..., 0].reshape(2, 4, 2, 2, 6).mean((2, 4))
  got = OPERATORS["mean unlike"].apply(jnp.asarray(x))[..., 0]
  np.testing.assert_allclose(got, means, atol=1e-6)  # float32 sums of twelve
  assert OPERATORS["mean unlike"].factors == (2, 6)


@pytest.mark.parametrize("op", OPERATORS.values(), ids=OPERATORS)
def test_null_space_and_constraint(op):
  """float32: sums of at most 96 terms of size 1 round by less than 1e-5."""
  x = jax.random.normal(
    jax.random.key(0), (3, 2, *op.fine, 2)
  )  # leading axes and channels of any number
  y = jax.random.normal(jax.random.key(1), (3, 2, *op.coarse, 2))
  np.testing.assert_allclose(op.apply(op.project(x)), 0, atol=1e-5)
  np.testing.assert_allclose(op.project(op.project(x)), op.project(x), atol=1e-5)
  np.testing.assert_allclose(op.apply(op.constrain(x, y)), y, atol=1e-5)
  # The correction is the smallest: orthogonal to all that C′ cannot see.
  assert float(jnp.abs(jnp.vdot(op.constrain(x, y) - x, op.project(x)))) < 1e-3


def test_channels_do_not_mix():
  op = OPERATORS["areas 2-D"]
  x = jax.random.normal(jax.random.key(0), (2, *op.fine, 3))
  for c in range(3):
    np.testing.assert_array_equal(
      op.apply(x)[..., c], op.apply(x[..., c : c + 1])[..., 0]
    )


def test_area_weights_conserve_the_integral():
  op = OPERATORS["areas 2-D"]
  x = np.random.default_rng(2).normal(size=(1, 8, 12, 1)).astype(np.float32)
  cells = AREAS.reshape(2, 4, 3, 4).sum((1, 3))
  np.testing.assert_allclose(
    (np.asarray(op.apply(x))[0, ..., 0] * cells).sum(),
    (x[0, ..., 0] * AREAS).sum(),
    rtol=1e-5,
  )


def test_messages():
  with pytest.raises(
    ValueError,
    match=r"factor 5 does not divide the grid of 24 points: use one of \[2, 3, 4, 6, 8, 12\]",
  ):
    operators.Strided.on((24,), 5)
  with pytest.raises(
    ValueError, match=r"factor 5 does not divide the grid of 12 points"
  ):
    operators.BlockMean.on((10, 12), (5, 5))
  with pytest.raises(ValueError, match=r"2 factors \(2, 3\) came for a grid of 1 axes"):
    operators.Strided.on((24,), (2, 3))
  for coarse in ((5, 4), (4,)):
    with pytest.raises(
      ValueError, match=r"coarse points that divide the fine ones. Use BlockMean.on"
    ):
      operators.BlockMean((8, 12), coarse)
  with pytest.raises(ValueError, match=r"Was the operator built for another grid"):
    OPERATORS["strided 1-D"].apply(jnp.zeros((2, 24)))
  with pytest.raises(ValueError, match="rank 1"):
    operators.Dense.on((3,), np.array([[1.0, 0, 0], [2.0, 0, 0]]))
  with pytest.raises(ValueError, match="values > 0"):
    operators.BlockMean.on((4,), 2, np.array([1.0, 0, 1, 1]))


def test_group_average_is_invariant():
  """Averaging the covariance of shifts gives a circulant: every row the shift of the one before."""
  n = 6
  shifts = (np.arange(n)[None] + np.arange(n)[:, None]) % n
  group = symmetry.Group(shifts, np.ones(n))
  cov = np.cov(np.random.default_rng(0).normal(size=(n, 50)))
  mean = group.average_covariance(cov)
  np.testing.assert_allclose(mean[1], np.roll(mean[0], 1), atol=1e-12)
  np.testing.assert_allclose(np.trace(mean), np.trace(cov), atol=1e-12)
  y = jnp.arange(6.0)[None]
  np.testing.assert_array_equal(group.act(2, y)[0], np.roll(np.arange(6.0), -2))
  assert len(symmetry.trivial(4)) == 1
