"""Ensembles read a block at a time give the numbers of arrays, and are never whole in memory."""

import numpy as np
import pytest

from downscaling.fields import operators
from downscaling.metrics import calibration, distances, ensembles, scoring
from downscaling.metrics.ensembles import Ensemble


class Watched(Ensemble):
  """Says how many conditions were read at most at a time."""

  def __init__(self, array):
    self.most = 0

    def read(rows):
      self.most = max(self.most, len(rows))
      return array[rows]

    super().__init__(read, array.shape)


@pytest.fixture
def members():
  return np.random.default_rng(0).normal(size=(13, 4, 24)).astype(np.float32)


@pytest.fixture
def small(monkeypatch):
  """Blocks of three conditions."""
  monkeypatch.setattr(ensembles, "BLOCK", 3 * 4 * 24)


def test_it_reads_as_an_array_does(members):
  x = Ensemble.of(members)
  assert (len(x), x.ndim, x.size, x.shape) == (13, 3, members.size, members.shape)
  np.testing.assert_array_equal(x[5], members[5])
  np.testing.assert_array_equal(x[-1], members[-1])
  np.testing.assert_array_equal(x[3:7], members[3:7])
  np.testing.assert_array_equal(x[[1, 5]], members[[1, 5]])
  np.testing.assert_array_equal(np.stack(list(x)), members)
  with pytest.raises(IndexError):
    x[13]


def test_some_of_the_conditions(members):
  kept = np.array([0, 4, 5, 12])
  x = Ensemble.of(members).only(kept).only(np.array([1, 3]))
  np.testing.assert_array_equal(x[:], members[[4, 12]])


def test_frames_as_rows():
  # Conditions, members, frames, points.
  series = np.random.default_rng(0).normal(size=(5, 2, 3, 8))
  rows = ensembles.frames_as_rows(Ensemble.of(series))
  assert rows.shape == (15, 2, 8)
  want = np.moveaxis(series, 2, 1).reshape(15, 2, 8)
  np.testing.assert_array_equal(rows[:], want)
  np.testing.assert_array_equal(rows[4:9], want[4:9])


def test_blocks_give_the_same_numbers_and_no_more_than_one_is_read(members, small):
  truth = np.random.default_rng(1).normal(size=(13, 24)).astype(np.float32)
  op = operators.Strided.on((24,), 4)
  watched = Watched(members)
  found = calibration.calibrate(watched, truth)
  assert found.crps == pytest.approx(
    calibration.calibrate(members, truth).crps, rel=1e-12
  )
  x = members.astype(np.float64)
  assert found.spread * found.rms == pytest.approx(
    np.sqrt(x.var(axis=1, ddof=1).mean()), rel=1e-6
  )
  assert distances.variability(watched) == pytest.approx(distances.variability(members))
  y = np.asarray(op.apply(truth[..., None]))[..., 0]
  one, other = (distances.constraint_rmse(e, y, op) for e in (watched, members))
  assert one == pytest.approx(other)
  first = scoring.first_members(watched)
  np.testing.assert_array_equal(first.members, members[:, 0])
  calibration.by_condition(watched, truth)
  assert watched.most == 3


def test_failed_members_are_found_in_any_block(members, small):
  members[7, :2], members[11] = np.nan, np.nan
  first = scoring.first_members(Ensemble.of(members))
  assert 11 not in first.conditions
  np.testing.assert_array_equal(first.members[7], members[7, 2])
  assert (~first.whole).sum() == 6
  members[9, 3, 5] = np.nan
  with pytest.raises(ValueError, match="samples: member 3 of condition 9 holds NaN"):
    scoring.first_members(Ensemble.of(members))
  with pytest.raises(ValueError, match="first in row 7 of 13"):
    distances.variability(Ensemble.of(members))
