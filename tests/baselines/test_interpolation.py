"""Periodic cubic interpolation: through the points, fourth order, the same on either axis,
refusals.
"""

import numpy as np
import pytest

from downscaling.baselines import interpolation
from downscaling.fields.operators import BlockMean, Dense, Strided


@pytest.mark.parametrize("fine", [(48,), (24, 48)])
def test_passes_through_the_observed_points(fine):
  op = Strided.on(fine, 4)
  y = np.random.default_rng(0).normal(size=(3, *op.coarse, 2)).astype(np.float32)
  x = interpolation.cubic(y, op, block=2)
  assert x.shape == (3, *fine, 2)
  assert x.dtype == np.float32
  # Float64 inside, so one float32 rounding at most. Points half a cell off, or axes swapped, miss
  # by O(1).
  np.testing.assert_allclose(np.asarray(op.apply(x)), y, rtol=0, atol=5e-7)


def wave(points: int) -> np.ndarray:
  s = 2 * np.pi * np.arange(points) / points
  return np.exp(np.sin(s) + 0.3 * np.cos(2 * s))


@pytest.mark.parametrize("make", [Strided.on, BlockMean.on])
def test_fourth_order(make):
  """Halving the coarse spacing divides the error by 16; values at block centres stand in for the
  means.
  """
  errors = []
  for n in (32, 64, 128):
    op = make((8 * n,), 8)
    offset = 3.5 if isinstance(op, BlockMean) else 0
    s = 2 * np.pi * (8 * np.arange(n) + offset) / (8 * n)
    y = np.exp(np.sin(s) + 0.3 * np.cos(2 * s))[None, :, None]
    errors.append(np.abs(interpolation.cubic(y, op)[0, :, 0] - wave(8 * n)).max())
  order = -np.polyfit(np.log([32, 64, 128]), np.log(errors), 1)[0]
  # Measured 4.1; linear interpolation, or a spline that is not periodic (natural ends), gives 2.
  assert order == pytest.approx(4, abs=0.3)


def test_two_axes_are_a_tensor_product():
  op = Strided.on((32, 64), 4)
  one = lambda n: interpolation.cubic(wave(n)[None, :, None], Strided.on((4 * n,), 4))[
    0, :, 0
  ]
  y = wave(8)[:, None] * wave(16)[None]
  got = interpolation.cubic(y[None, ..., None], op)[0, ..., 0]
  # float64 rounding.
  np.testing.assert_allclose(got, one(8)[:, None] * one(16)[None], rtol=1e-12)


def test_shifting_the_input_shifts_the_output():
  """The seam at the period's end is no special place."""
  op = Strided.on((40,), 5)
  y = np.random.default_rng(1).normal(size=(1, 8, 1))
  np.testing.assert_allclose(
    interpolation.cubic(np.roll(y, 3, 1), op),
    np.roll(interpolation.cubic(y, op), 15, 1),
    atol=1e-12,
  )


def test_refusals():
  with pytest.raises(ValueError, match="even grid; Dense"):
    interpolation.cubic(np.zeros((1, 2, 1)), Dense.on((8,), np.eye(8)[:2]))
  with pytest.raises(ValueError, match=r"need \[samples, 6, channels\]"):
    interpolation.cubic(np.zeros((1, 8, 1)), Strided.on((24,), 4))
