"""Increments of series of known continuity: an AR(1) in time, cut where it should not be, and
exchanged members.
"""

import numpy as np
import pytest

from downscaling.metrics import increments

RHO, FRAMES, POINTS = 0.9, 9, 32
SEAMS = np.arange(FRAMES - 1) % 4 == 3  # steps 3 → 4 and 7 → 8


def chain(rng, *shape, rho=RHO):
  """[*shape, FRAMES, POINTS] of unit variance."""
  x = rng.normal(size=(*shape, FRAMES, POINTS))
  for t in range(1, FRAMES):
    x[..., t, :] = rho * x[..., t - 1, :] + np.sqrt(1 - rho**2) * x[..., t, :]
  return x


def rows(**samples):
  rng = np.random.default_rng(0)
  true, floor = chain(rng, 200), chain(rng, 200)
  paced = {
    name: 2 * x[:, 0, :, ::4] for name, x in samples.items()
  }  # conditions that move twice as far
  return increments.Series(
    samples, {}, paced, true[..., ::4], true, floor, SEAMS, 1.0
  ).rows()


def test_true_series_have_increments_of_one():
  found = rows(a=chain(np.random.default_rng(1), 40, 4))
  # 160 series × 32 points of a squared increment: √(2/5120) = .02 a step; the reference adds .006.
  for name in ("a", "floor"):
    assert found[name]["within"] == pytest.approx(1, abs=0.05)
    assert found[name]["seams"] == pytest.approx(1, abs=0.08)
    # 16 shells of two modes each: √(1/640) of an energy.
    assert found[name]["melr"] < 0.15
  assert all(list(row) == list(increments.KEYS) for row in found.values())
  assert found["a"]["condition"] == pytest.approx(4, rel=0.1)
  assert found["floor"]["condition"] is None
  # Members here share nothing but their law: exchanged, each step is between two independent
  # fields.
  apart = found["a, members exchanged"]
  assert apart["increment"] == pytest.approx(1 / (1 - RHO), rel=0.1)
  assert apart["melr"] == pytest.approx(np.log(1 / (1 - RHO)), rel=0.1)


def test_a_jump_at_the_seams_shows_there_alone():
  rng = np.random.default_rng(2)
  x = np.concatenate(
    [
      chain(rng, 40, 1)[:, :, :4],
      chain(rng, 40, 1)[:, :, 4:8],
      chain(rng, 40, 1)[:, :, 8:],
    ],
    axis=2,
  )
  found = rows(a=x)["a"]
  assert found["within"] == pytest.approx(1, abs=0.1)
  assert found["seams"] == pytest.approx(1 / (1 - RHO), rel=0.1)
  assert "a, members exchanged" not in rows(a=x)  # there is one member


def test_exchanged_members_are_the_same_fields_frame_by_frame():
  x = chain(np.random.default_rng(3), 4)
  y = increments.exchanged(x)
  np.testing.assert_array_equal(np.sort(x, axis=0), np.sort(y, axis=0))
  np.testing.assert_array_equal(y[1, 5], x[(1 + 5) % 4, 5])


def test_one_window_has_no_seams():
  rng = np.random.default_rng(0)
  true = chain(rng, 20)
  found = increments.Series(
    {"a": true[:, None]}, {}, {}, true, true, true, np.zeros(FRAMES - 1, bool), 1.0
  ).rows()
  assert found["a"]["seams"] is None
  assert found["a"]["within"] == pytest.approx(1)  # of itself
