"""Windows and stretches of trajectories: what they hold, and that they never straddle two."""

import numpy as np
import pytest

from downscaling.datasets import simulated, time_windows, training_batches
from downscaling.fields import statistics

TRAJECTORIES, SNAPSHOTS = 5, 6


class Rows:
  """A source as TFDS gives it: u [2, C] = (trajectory, time) at the points, C fields that differ by
  100.
  """

  def __init__(self, channels=1, count=TRAJECTORIES * SNAPSHOTS, snapshots=SNAPSHOTS):
    self.channels, self.count, self.snapshots = channels, count, snapshots

  def __len__(self):
    return self.count

  def __getitems__(self, indices):
    return [self._row(*divmod(i, self.snapshots)) for i in indices]

  def _row(self, trajectory, time):
    u = np.array([trajectory, time], np.float32)[:, None] + 100 * np.arange(
      self.channels, dtype=np.float32
    )
    return {"u": u, "trajectory": np.int64(trajectory), "time": np.float32(time)}


@pytest.mark.parametrize("channels", [1, 2])
def test_every_window_is_of_one_trajectory_in_order_of_time(channels):
  frames = 4
  source = time_windows.Windows(Rows(channels), SNAPSHOTS, frames)
  assert len(source) == TRAJECTORIES * 3
  seen = set()
  for example in source.__getitems__(list(range(len(source)))):
    u = example["u"].reshape(2, frames, channels)  # frame slowest
    trajectory, first = int(example["trajectory"]), int(example["time"])
    np.testing.assert_array_equal(
      u[0] - 100 * np.arange(channels), np.full((frames, channels), trajectory)
    )
    np.testing.assert_array_equal(u[1, :, 0], first + np.arange(frames))
    seen.add((trajectory, first))
  # Any start, each once.
  assert seen == {(t, s) for t in range(TRAJECTORIES) for s in range(3)}


def test_single_frames_are_the_source_itself():
  source = Rows()
  assert time_windows.view(source, SNAPSHOTS, 1) is source


def test_what_does_not_fit_is_refused():
  with pytest.raises(
    ValueError, match=r"--config.grid.frames=6 or fewer.*--config.data.snapshots=7"
  ):
    time_windows.Windows(Rows(), SNAPSHOTS, 7)
  with pytest.raises(ValueError, match="no whole trajectories of 7"):
    time_windows.Windows(Rows(), 7, 2)
  # Rows that count up to whole trajectories of another length: windows would run from one into the
  # next.
  with pytest.raises(ValueError, match="runs into another one"):
    time_windows.Windows(Rows(), 5, 3).__getitems__([3])


def test_batches_and_statistics_of_windows():
  """The pipeline normalises every frame by the statistics of its channel."""
  stats = statistics.Statistics(
    np.float32([1.0]), np.float32([2.0]), np.ones((2, 1), np.float32)
  )
  assert stats.repeated(1) is stats
  many = stats.repeated(3)
  assert (many.mean.shape, many.std.shape, many.spectrum.shape) == ((3,), (3,), (2, 3))
  batches = training_batches.Batches(
    time_windows.view(Rows(), SNAPSHOTS, 3), many, 8, seed=0
  )
  x = batches.rows(0, np.arange(8))["x"]
  assert x.shape == (8, 2, 3)
  # Times are 1 apart, divided by the std.
  np.testing.assert_allclose(np.diff(x[:, 1], axis=1), 0.5)
  np.testing.assert_array_equal(x[:, 0], x[:, 0, :1].repeat(3, 1))


def test_stretches_are_spread_and_do_not_overlap():
  rows = time_windows.stretches(TRAJECTORIES, SNAPSHOTS, 3)
  assert rows.shape == (10, 3)
  assert len(np.unique(rows)) == 30
  assert (rows // SNAPSHOTS == rows[:, :1] // SNAPSHOTS).all()
  assert (np.diff(rows, axis=1) == 1).all()
  assert len(set((rows[:TRAJECTORIES, 0] // SNAPSHOTS).tolist())) == TRAJECTORIES
  np.testing.assert_array_equal(
    time_windows.stretches(TRAJECTORIES, SNAPSHOTS, 1)[:, 0],
    simulated.spread(TRAJECTORIES, SNAPSHOTS),
  )
  assert time_windows.stretches(TRAJECTORIES, SNAPSHOTS, 7).shape == (0, 7)
