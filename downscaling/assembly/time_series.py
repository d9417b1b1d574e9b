"""Series in time: experiment.grid.frames (F, of the prior) and experiment.sampling.series (L, O).

A condition is a stretch of L consecutive coarse snapshots of a trajectory, data.spacing apart. A
member is a series of L fine ones. It is drawn by windows of F frames; neighbouring windows share O
(sampling/stitching.py). F = L = 1: single fields.
"""

import numpy as np

from downscaling.datasets import time_windows
from downscaling.experiment import Experiment
from downscaling.sampling.stitching import Stitching

# In the attributes of the store: how its members hang together in time.
INDEPENDENT = (
  "Members are independent in time: the prior knows single fields, so member m of one condition "
  "does not go on in member m of the next"
)
FRAME_BY_FRAME = (
  "Frames of a member are independent in time, but for their conditions: the prior knows single "
  "fields, and drew each frame alone"
)
CONTINUOUS = (
  "A member goes on in time: its {series} frames were drawn together, by windows of {frames} "
  "frames with {overlap} in common. Members of different conditions are independent: member m of "
  "one does not go on in member m of the next"
)
GOLDEN_SECTION = 0.6180339887


def plan(experiment: Experiment) -> Stitching:
  """L, F and O. Raises ValueError where windows of F frames do not cover L."""
  series = experiment.sampling.series
  return Stitching(experiment.grid.frames, series.overlap, series.frames)


def comment(experiment: Experiment) -> str:
  """How members hang together in time."""
  whole = plan(experiment)
  if whole.frames > 1:
    return CONTINUOUS.format(
      series=whole.series, frames=whole.frames, overlap=whole.overlap
    )
  return FRAME_BY_FRAME if whole.series > 1 else INDEPENDENT


def times(experiment: Experiment) -> dict[str, tuple[np.ndarray, dict[str, str]]]:
  """The coordinate `time` of a store, from 0, in the equation's unit; none for single fields."""
  length = experiment.sampling.series.frames
  if length == 1:
    return {}
  about = {
    "long_name": "time since the first frame of the condition, in the equation's unit",
    "units": "1",
    "axis": "T",
  }
  return {"time": (np.arange(length) * experiment.data.spacing, about)}


def rows(experiment: Experiment, which: str, split: str) -> np.ndarray:
  """Row numbers [S, L] of the stretches of a split, those of the first conditions first."""
  trajectories = experiment.data.trajectories(which)[split]
  length = experiment.sampling.series.frames
  return time_windows.stretches(trajectories, experiment.data.snapshots, length)


def condition_rows(experiment: Experiment) -> np.ndarray | None:
  """Which held-out row each condition is, [S]: any beginning of it is spread over trajectories.

  None where the order of the rows is that already: series, or at most one row of a trajectory.
  Otherwise rows lie by trajectory. They are sorted by the fraction of a multiple of the golden
  section, which spreads every beginning evenly (the three-gap theorem).
  """
  if not experiment.spreads_conditions:
    return None
  count = experiment.debias.held_out
  return np.argsort(np.arange(count) * GOLDEN_SECTION % 1)


def as_rows(x: np.ndarray, experiment: Experiment, axis: int) -> np.ndarray:
  """Frames of series, at `axis`, as rows of their own beside the first axis.

  Single fields come back as they are. The frames of a series are alike, so distributions see fewer
  independent rows than there are: their floors are made of series as well.
  """
  if experiment.sampling.series.frames == 1:
    return x
  frames_second = np.moveaxis(x, axis, 1)
  return frames_second.reshape(-1, *frames_second.shape[2:])
