"""An experiment: every key of a config, typed and checked, and what each stage's result depends on.

A config file is Python with `get_config(variant)`. It returns a ConfigDict of the keys that differ
from the defaults (blocks.py). The command line overrides any key by --config.key=value.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, Self

from downscaling import blocks
from downscaling.config_files import merged, read, resolve, split
from downscaling.equations import kolmogorov, ks
from downscaling.runtime import files, random_keys, settings
from downscaling.runtime.settings import Settings, count, text

EQUATIONS = {"ks": ks, "kolmogorov": kolmogorov}
# Blocks that each stage's result depends on.
DEPENDS = {
  "data": ("seed", "grid", "fine", "coarse", "data"),
  "debias": ("seed", "grid", "fine", "coarse", "data", "debias"),
  "train": (
    "seed",
    "grid",
    "fine",
    "data",
    "noise",
    "schedule",
    "model",
    "optimizer",
    "train",
  ),
}
DEPENDS["samples"] = (
  *DEPENDS["debias"],
  *("noise", "schedule", "model", "optimizer", "train", "sampling"),
)
DEPENDS["report"] = ("experiment", *DEPENDS["samples"], "evaluate")
# Kept in place of keys that a config of the first schema did not have yet: what was done then.
BEFORE = {"debias": {"group": "full", "select": False}}


@blocks.block
class Experiment(Settings):
  """All keys. fine and coarse hold the keywords of the equation's two solvers."""

  experiment: str = text("ks-8x", "name of the experiment, in titles")
  label: str = text(
    "",
    "of another set of samples of the same prior: WORKDIR/samples-LABEL",
    words=blocks.LABEL,
    read=blocks.file_name,
    free=True,
    example="second",
  )
  seed: int = count(0, "seed of all random numbers", least=0)
  mesh: blocks.Mesh = blocks.inner(blocks.Mesh)
  supervision: blocks.Supervision = blocks.inner(blocks.Supervision)
  grid: blocks.Grid = blocks.inner(blocks.Grid)
  fine: dict = dataclasses.field(default_factory=dict)
  coarse: dict = dataclasses.field(default_factory=dict)
  data: blocks.Data = blocks.inner(blocks.Data)
  debias: blocks.Debias = blocks.inner(blocks.Debias)
  schedule: blocks.Schedule = blocks.inner(blocks.Schedule)
  noise: blocks.Noise = blocks.inner(blocks.Noise)
  model: blocks.Model = blocks.inner(blocks.Model)
  optimizer: blocks.Optimizer = blocks.inner(blocks.Optimizer)
  train: blocks.Train = blocks.inner(blocks.Train)
  plan: blocks.Plan = blocks.inner(blocks.Plan)
  keep: blocks.Keep = blocks.inner(blocks.Keep)
  memory: blocks.Memory = blocks.inner(blocks.Memory)
  watch: blocks.Watch = blocks.inner(blocks.Watch)
  profile: blocks.Profile = blocks.inner(blocks.Profile)
  sampling: blocks.Sampling = blocks.inner(blocks.Sampling)
  evaluate: blocks.Evaluate = blocks.inner(blocks.Evaluate)

  def __post_init__(self):
    super().__post_init__()
    if self.data.name not in EQUATIONS:
      raise ValueError(
        f"config.data.name={self.data.name}: need one of {', '.join(sorted(EQUATIONS))} (the "
        "equation). E.g. --config.data.name=ks"
      )
    for name, solver in (("fine", self.physics.Fine), ("coarse", self.physics.Coarse)):
      object.__setattr__(self, name, keywords(solver, getattr(self, name), name))

  @property
  def physics(self):
    """The module of the equation: its Fine, Coarse, RANK and SYMBOL."""
    return EQUATIONS[self.data.name]

  @classmethod
  def of(cls, given: Mapping[str, Any]) -> Self:
    """An experiment from what differs from the defaults, a ConfigDict or a dict.

    Raises: ValueError naming the key, the value that came, what is needed and what to type.
    """
    return super().of(given)

  def changed(self, **keys: Any) -> Self:
    """A copy with other values: changed(**{"sampling.members": 4})."""
    return type(self).of(merged(self.differences(), keys))

  def defaults(self) -> dict[str, Any]:
    """All keys with their default values, of the same equation."""
    return type(self).of({"data": {"name": self.data.name}}).everything()

  def differences(self, results_only: bool = False) -> dict[str, Any]:
    """What differs from the defaults, as JSON has it. `of` makes the same experiment of it."""
    found = super().differences(results_only)
    for name, solver in (("fine", self.physics.Fine), ("coarse", self.physics.Coarse)):
      defaults = keywords(solver, {}, name)
      given = getattr(self, name)
      changed = {key: value for key, value in given.items() if value != defaults[key]}
      found = {key: value for key, value in found.items() if key != name}
      if changed:
        found[name] = changed
    return found

  # ---------------------------------------------------------------- stages

  def identity(self, stage: str) -> dict[str, Any]:
    """What the result of a stage depends on, as differences from the defaults.

    A key that is new in a later version has its default in older folders, so they stay valid.
    """
    every = self.differences(results_only=True)
    found = {key: every[key] for key in DEPENDS[stage] if key in every}
    # The prior sees the fine training split alone, and serves every C′.
    if stage == "train":
      found["data"] = _only_training(found.get("data", {}))
      found["grid"] = _without(found.get("grid", {}), "factor", "operator")
    # The snapshots are the same whatever the prior makes of them.
    if stage in ("data", "debias"):
      found["grid"] = _without(found.get("grid", {}), "frames")
    length = self.sampling.series.frames
    # Which rows are held out depends on the series.
    if stage == "debias" and length > 1:
      found["stretches"] = length
    if "sampling" in DEPENDS[stage] and self.spreads_conditions:
      found["order"] = "spread over trajectories"
    if stage != "data":
      found["generator"] = random_keys.IDENTITY
    return {key: value for key, value in found.items() if value != {}}

  @property
  def spreads_conditions(self) -> bool:
    """Conditions are spread over the trajectories: single fields, several of a trajectory."""
    single = self.sampling.series.frames == 1
    return single and self.debias.held_out > self.data.lflr.test

  def extent(self) -> dict[str, Any]:
    """How much is drawn. It may grow from one call to the next."""
    s = self.sampling
    return {
      "conditions": s.conditions,
      "members": s.members,
      "unconditional.fields": s.unconditional.fields,
      "sets": sorted(s.sets),
    }

  def folder(self, workdir: pathlib.Path, stage: str) -> pathlib.Path:
    """Where a stage lies. A label keeps a second set of samples, and its report, apart."""
    elsewhere = {"data": self.data.dir, "train": self.train.dir}.get(stage)
    if elsewhere:
      return files.as_path(elsewhere).expanduser()
    labelled = self.label and stage in ("samples", "report")
    return workdir / (f"{stage}-{self.label}" if labelled else stage)


def _without(given: dict, *names: str) -> dict:
  return {key: value for key, value in given.items() if key not in names}


def _only_training(data: dict) -> dict:
  kept = _without(data, "lflr", "hfhr")
  train = data.get("hfhr", {}).get("train")
  return kept if train is None else kept | {"hfhr": {"train": train}}


def first_schema(stage: str, found: Mapping[str, Any]) -> dict[str, Any]:
  """The identity of a stage that was made when markers held whole blocks.

  found: the marker's blocks. Raises ValueError for keys that no longer exist.
  """
  identity = of_blocks(found).identity(stage)
  told = {
    "generator": found.get("generator"),
    "order": found.get("sampling", {}).get("order"),
  }
  for key, value in told.items():
    identity.pop(key, None)
    if value is not None:
      identity[key] = value
  return identity


def of_blocks(found: Mapping[str, Any]) -> Experiment:
  """The experiment of a marker's blocks, or of several markers' blocks together.

  Markers of the first schema hold a few entries that are no keys: they tell how rows were chosen.
  """
  given = merged(found, {})
  given.pop("generator", None)
  debias, sampling = given.get("debias"), given.get("sampling")
  if sampling is not None:
    sampling.pop("order", None)
  if debias is not None:
    stretches = debias.pop("stretches", None)
    given["debias"] = BEFORE["debias"] | debias
    if stretches:
      given["sampling"] = {"series": {"frames": stretches}} | (sampling or {})
  return Experiment.of(given)


# ---------------------------------------------------------------- keywords of solvers


def keywords(
  solver: type,
  given: Mapping[str, Any],
  name: str,
) -> dict[str, Any]:
  """Keywords of an equation's solver, checked by their types; its own limits are the solver's."""
  fields = {
    f.name: f for f in dataclasses.fields(solver) if f.name not in ("points", "length")
  }
  for key in given:
    if key not in fields:
      raise ValueError(settings.unknown(name, key, fields))
  return {
    key: _typed(f"{name}.{key}", field, given.get(key, field.default))
    for key, field in fields.items()
  }


def _typed(key: str, field: dataclasses.Field, value: Any) -> Any:
  makers = {
    float: settings.number(0.0, "of the equation's solver"),
    int: settings.count(1, "of the equation's solver", least=0),
    str: text("", "of the equation's solver"),
  }
  rule = makers[field.type].metadata["rule"]
  return rule.check(key, value, field.default)


def load(config: str, **overrides: Any) -> Experiment:
  """The experiment of a config, and of keys that override it.

  Args:
    config: as for --config: a built-in one, as "ks:quick", or a Python file, which is executed.
    overrides: load("ks:quick", **{"sampling.members": 4}).
  Raises: FileNotFoundError if there is no such config; ValueError as `Experiment.of`; whatever the
    file raises.
  """
  return Experiment.of(merged(read(*split(resolve(config))), overrides))
