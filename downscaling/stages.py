"""Stages of a work folder as a config names them: where each lies, and what its result depends on."""

import math
import pathlib
from typing import Any

from downscaling import series
from downscaling.runtime import random_keys, stage_folder

# What each stage's result depends on; anything else may change between restarts.
IDENTITY = {
  "data": ("seed", "grid", "fine", "coarse", "data"),
  "debias": ("seed", "grid", "fine", "coarse", "data", "debias"),
  "samples": (
    *("seed", "grid", "fine", "coarse", "data", "debias"),
    *("noise", "schedule", "model", "optimizer", "train", "sampling"),
  ),
  "report": (
    *("experiment", "seed", "grid", "fine", "coarse", "data", "debias"),
    *("noise", "schedule", "model", "optimizer", "train", "sampling", "evaluate"),
  ),
  "train": ("seed", "grid", "fine", "data", "noise", "schedule", "model", "optimizer", "train"),
}


def identity(config, stage: str) -> dict[str, Any]:
  """The config blocks that the stage's result depends on, as plain values; where data and prior lie
  does not matter.
  """
  blocks = {key: stage_folder.plain(config[key]) for key in IDENTITY[stage]}
  unseen = (
    ("dir", "lflr") if stage == "train" else ("dir",)
  )  # the prior never sees the coarse world
  blocks["data"] = {k: v for k, v in blocks["data"].items() if k not in unseen}
  if stage == "train":  # nor a fine field of another split
    blocks["data"]["hfhr"] = {"train": blocks["data"]["hfhr"]["train"]}
  if stage != "data":  # data are simulated by the keys that they always were
    blocks["generator"] = random_keys.IDENTITY
  if "sampling" in blocks:  # counts decide how much there is, not what: an ensemble grows
    sampling = {
      k: v
      for k, v in blocks["sampling"].items()
      if k not in ("conditions", "members", "sets", "max_failed")
    }
    noise = observation_noise(config)
    sampling["observation_noise"] = "auto" if noise is None else noise
    few = {k: v for k, v in sampling["unconditional"].items() if k != "fields"}
    blocks["sampling"] = sampling | {"unconditional": few}
  if "train" in blocks:
    blocks["train"] = {k: v for k, v in blocks["train"].items() if k != "dir"}
  for block, key in (
    ("train", "augment"),
    ("model", "static"),
  ):  # folders older than these keys stay valid
    if block in blocks and not blocks[block].get(key):
      blocks[block].pop(key, None)
  if stage == "train":  # nor does it see C′: one prior serves every factor and operator
    blocks["grid"] = {k: v for k, v in blocks["grid"].items() if k not in ("factor", "operator")}
  if (
    "debias" in blocks
  ):  # another path rounds otherwise, as another number of devices does: no other result
    unseen = ("path", "save_seconds", "outlier")
    before = {"group": "full", "select": False}  # what was done before there were these keys
    seen = {k: v for k, v in blocks["debias"].items() if k not in unseen}
    blocks["debias"] = {k: v for k, v in seen.items() if before.get(k, "") != v}
  return series.settled(blocks, config, stage)


def observation_noise(config) -> float | None:
  """config.sampling.observation_noise as a number >= 0; None for "auto".

  Raises: ValueError for anything else.
  """
  given = config.sampling.observation_noise
  if given == "auto":
    return None
  try:
    value = float(given)
  except (TypeError, ValueError):
    value = math.nan
  if not 0 <= value < math.inf:
    raise ValueError(
      f"config.sampling.observation_noise={given!r}: need a number >= 0, the standard deviation of "
      "what y′ is off by, in data units; or auto, which fits it to each map."
    )
  return value


def extent(config) -> dict[str, Any]:
  """How much is to be drawn; grows from one call to the next, and what depends on it is made anew."""
  s = config.sampling
  return {
    "conditions": s.conditions,
    "members": s.members,
    "unconditional.fields": s.unconditional.fields,
    "sets": sorted(s.sets),
  }


def data_dir(config, workdir: pathlib.Path) -> pathlib.Path:
  return pathlib.Path(config.data.dir).expanduser() if config.data.dir else workdir / "data"


def folder(config, workdir: pathlib.Path, stage: str) -> pathlib.Path:
  """Where a stage lies; config.label keeps a second set of samples, and its report, beside the
  first.
  """
  if stage == "data":
    return data_dir(config, workdir)
  if stage == "train" and config.train.dir:
    return pathlib.Path(config.train.dir).expanduser()
  return workdir / (
    f"{stage}-{config.label}" if config.label and stage in ("samples", "report") else stage
  )
