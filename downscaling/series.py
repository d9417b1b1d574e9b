"""Series in time, as a config asks for them: config.grid.frames (F, of the prior) and
config.sampling.series (L, O).

A condition is a stretch of L consecutive coarse snapshots of a trajectory, config.data.spacing
apart; a member is a series of L fine ones, drawn by windows of F frames with O in common
(sampling/stitching.py). F = L = 1: single fields.
"""

from typing import Any

import numpy as np

from downscaling.datasets import time_windows
from downscaling.sampling.stitching import Stitching

# What a row of members is not, in the attributes of the store.
INDEPENDENT = (
  "Members are independent in time: the prior knows single fields, so member m of one condition "
  "does not go on in member m of the next"
)
FRAME_BY_FRAME = (
  "Frames of a member are independent in time, but for their conditions: the prior knows single "
  "fields, and drew each frame alone"
)
CONTINUOUS = (
  "A member goes on in time: its {series} frames were drawn together, by windows of {frames} frames with {overlap} in "
  "common. Members of different conditions are independent: member m of one does not go on in member m of the next"
)


def plan(config) -> Stitching:
  """L, F and O. Raises ValueError where windows of F frames do not cover L."""
  s = config.sampling.series
  return Stitching(config.grid.frames, s.overlap, s.frames)


def settled(blocks: dict[str, Any], config, stage: str) -> dict[str, Any]:
  """The blocks of a stage's identity with what it depends on of series.

  Single fields leave no trace, so work folders that are older than series stay valid. The data are
  the same snapshots whatever the prior makes of them; of debiasing only the choice of the held-out
  rows depends on L.
  """
  frames, length = config.grid.frames, config.sampling.series.frames
  if frames == 1 or stage in ("data", "debias"):
    blocks["grid"] = {k: v for k, v in blocks["grid"].items() if k != "frames"}
  if "sampling" in blocks and length == 1:
    blocks["sampling"] = {k: v for k, v in blocks["sampling"].items() if k != "series"}
    if condition_rows(config) is not None:
      blocks["sampling"]["order"] = "spread over trajectories"
  if stage == "debias" and length > 1:
    blocks["debias"] = blocks["debias"] | {"stretches": length}
  return blocks


def comment(config) -> str:
  """How members hang together in time."""
  whole = plan(config)
  if whole.frames > 1:
    return CONTINUOUS.format(series=whole.series, frames=whole.frames, overlap=whole.overlap)
  return FRAME_BY_FRAME if whole.series > 1 else INDEPENDENT


def times(config) -> dict[str, tuple[np.ndarray, dict[str, str]]]:
  """The coordinate `time` of a store, from 0, in the equation's own unit; none for single fields."""
  length = config.sampling.series.frames
  about = {
    "long_name": "time since the first frame of the condition, in the equation's unit",
    "units": "1",
    "axis": "T",
  }
  return {} if length == 1 else {"time": (np.arange(length) * config.data.spacing, about)}


def rows(config, which: str, split: str) -> np.ndarray:
  """Row numbers [S, L] of the stretches of a split, those of the first conditions first."""
  return time_windows.stretches(
    config.data[which][split], config.data.snapshots, config.sampling.series.frames
  )


def condition_rows(config) -> np.ndarray | None:
  """Which held-out row each condition is, [S]: any beginning of it is spread over the trajectories.

  None where the order of the rows is that already: series, and one row at most of a trajectory.
  Otherwise rows lie by trajectory; those whose multiple of the golden section has the smallest
  fraction are evenly spread (the three gaps).
  """
  count = config.debias.held_out
  if config.sampling.series.frames > 1 or count <= config.data.lflr.test:
    return None
  return np.argsort(np.arange(count) * 0.6180339887 % 1)


def as_rows(x: np.ndarray, config, axis: int) -> np.ndarray:
  """Frames of series, at `axis`, as rows of their own beside the first axis; single fields as they
  are.

  The frames of a series are alike, so distributions see fewer independent rows than there are:
  their floors are made of series as well.
  """
  if config.sampling.series.frames == 1:
    return x
  x = np.moveaxis(x, axis, 1)
  return x.reshape(-1, *x.shape[2:])


def check(config) -> None:
  """Refuses windows and series that the trajectories do not hold.

  Raises: ValueError naming the key, what came and what is needed.
  """
  c, snapshots, whole = config, config.data.snapshots, plan(config)
  for key, frames in (("grid.frames", whole.frames), ("sampling.series.frames", whole.series)):
    if frames > snapshots:
      raise ValueError(
        f"config.{key}={frames}, but a trajectory has config.data.snapshots={snapshots}: windows "
        f"and series lie within one trajectory. Set --config.{key}={snapshots} or fewer, or "
        f"--config.data.snapshots={frames} in another --workdir."
      )
  have = c.data.hfhr.train * (snapshots - whole.frames + 1)
  if c.train.batch > have:
    raise ValueError(
      f"config.train.batch={c.train.batch}, but the training split has {have} windows of "
      f"{whole.frames} frames: set --config.train.batch={have} or fewer, or simulate more "
      "trajectories."
    )
  if (length := whole.series) == 1:
    return
  needs = (
    ("debias.held_out", c.debias.held_out, "lflr", "test"),
    ("sampling.conditions", length * c.sampling.conditions, "hfhr", "test"),
    (
      "evaluate.reference",
      2 * length,
      "hfhr",
      "reference",
    ),  # two series, to compare increments with
  )
  for key, need, which, split in needs:
    if need > (there := rows(c, which, split).size):
      raise ValueError(
        f"config.{key} asks for {need} {which} {split} frames in series of {length}: {there} can "
        f"be had, {snapshots // length} series a trajectory of {snapshots} snapshots. Ask for "
        "fewer, or simulate more: "
        f"--config.data.{which}.{split}={-(-need // (snapshots // length * length))}."
      )
  if length * c.sampling.conditions > c.debias.held_out:
    raise ValueError(
      f"config.sampling.conditions={c.sampling.conditions} series of {length} frames, but only "
      f"config.debias.held_out={c.debias.held_out} fields are debiased: set "
      f"--config.sampling.conditions={c.debias.held_out // length} or fewer, or "
      f"--config.debias.held_out={length * c.sampling.conditions}."
    )
