"""Windows and stretches of trajectories: several consecutive frames of one trajectory, taken
together.

The rows of a split lie trajectory by trajectory, in order of time (builders.py). A *window* is F
consecutive rows of one trajectory, folded into one field [*space, F·C] with the frame slowest:
channel f·C + c is channel c of frame f. A *stretch* is L consecutive rows, kept as rows; stretches
do not overlap. Neither holds rows of two trajectories.
"""

import numpy as np

from downscaling.datasets import simulated


class Windows:
  """All windows of a source, at random access: {"u": [*space, F·C], "trajectory", "time" (of the
  first frame)}.

  Args:
    source: random access to {"u": [*space, C], "trajectory", "time"}, with __getitems__.
    snapshots: rows a trajectory.
    frames: F, rows a window. A trajectory has snapshots − F + 1 windows, one for every start.
  Raises: ValueError if a trajectory is shorter than a window, or the source holds no whole
    trajectories.
  """

  def __init__(self, source, snapshots: int, frames: int):
    if not 1 <= frames <= snapshots:
      raise ValueError(
        f"windows of {frames} frames in trajectories of {snapshots} snapshots: set "
        f"--config.grid.frames={snapshots} or fewer, at least 1, or simulate "
        f"--config.data.snapshots={frames} or more."
      )
    if len(source) % snapshots:
      raise ValueError(
        f"{len(source)} rows are no whole trajectories of {snapshots} snapshots: was the data set "
        "made with another config.data.snapshots?"
      )
    self.source, self.snapshots, self.frames = source, snapshots, frames
    self.starts = snapshots - frames + 1

  def __len__(self) -> int:
    return len(self.source) // self.snapshots * self.starts

  def __getitem__(self, index: int) -> dict:
    return self.__getitems__([index])[0]

  def __getitems__(self, indices) -> list[dict]:
    """Raises ValueError where the rows of a window are not of one trajectory, in order of time."""
    trajectory, start = np.divmod(np.asarray(indices, np.int64), self.starts)
    rows = (trajectory * self.snapshots + start)[:, None] + np.arange(self.frames)
    examples = self.source.__getitems__(rows.reshape(-1).tolist())
    return [
      self._folded(examples[i : i + self.frames])
      for i in range(0, len(examples), self.frames)
    ]

  def _folded(self, frames: list[dict]) -> dict:
    times = [frame["time"] for frame in frames]
    if (
      len({int(frame["trajectory"]) for frame in frames}) > 1
      or not (np.diff(times) > 0).all()
    ):
      raise ValueError(
        f"a window of trajectory {frames[0]['trajectory']} from time {times[0]:g} runs into "
        f"another one or back in time: the data set does not have {self.snapshots} snapshots a "
        "trajectory in order of time. Generate it anew."
      )
    return frames[0] | {
      "u": np.concatenate(
        [frame["u"] for frame in frames],
        axis=-1,
      )
    }


def view(source, snapshots: int, frames: int):
  """The source itself for single frames, else its windows."""
  return source if frames == 1 else Windows(source, snapshots, frames)


def stretches(trajectories: int, snapshots: int, length: int) -> np.ndarray:
  """Row numbers [S, length] of all stretches of a split, one of every trajectory before another of
  each.

  A beginning of them is spread over trajectories and times as builders.spread is; at length 1 they
  are the same.
  """
  each = snapshots // length
  trajectory, place = np.divmod(simulated.spread(trajectories, each), max(each, 1))
  return (trajectory * snapshots + place * length)[:, None] + np.arange(length)
