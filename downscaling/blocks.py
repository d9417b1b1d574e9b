"""Every key of a config: its default, its range and what it means.

One class a block. A key marked `free` may change between restarts, as no result depends on it.
Values are checked when a block is made. Relations between keys are checked in checks.py.
"""

import dataclasses
import re
from typing import Any

from downscaling.runtime import files, settings
from downscaling.runtime.settings import (
  Settings,
  choice,
  count,
  counts,
  flag,
  names,
  number,
  numbers,
  text,
)

block = dataclasses.dataclass(frozen=True)


def inner(kind: type[Settings]) -> Any:
  """A block within a block."""
  return dataclasses.field(default_factory=kind)


def folder_name(value: Any) -> str:
  """A path of this file system or of an object store; "" for the default place."""
  if not isinstance(value, str):
    raise ValueError
  files.as_path(value)
  return value


def file_name(value: Any) -> str:
  """Part of the name of a folder."""
  if (
    not isinstance(value, str) or not re.fullmatch(r"[\w.+=-]*", value) or ".." in value
  ):
    raise ValueError
  return value


def noise_or_auto(value: Any) -> float | str:
  """ "auto", or a standard deviation."""
  if value == "auto":
    return value
  found = settings.real(value)
  if found < 0:
    raise ValueError
  return found


def recipe(value: Any) -> str | tuple:
  """Letters, or pairs of a letter and its options."""
  if isinstance(value, str):
    return value
  return tuple(tuple(step) for step in value)


FOLDER = 'a folder, gs://BUCKET/FOLDER or s3://BUCKET/FOLDER; "" for the default'
LABEL = "letters, digits and any of . _ + = -, without .. in it"


@block
class Mesh(Settings, key="mesh"):
  """Devices: batches are split over data × fsdp, the state of a training run over fsdp."""

  data: int = count(
    -1, "devices along data; -1 takes all that are left", least=-1, free=True
  )
  fsdp: int = count(1, "devices that share the state of training", free=True)


@block
class Supervision(Settings, key="supervision"):
  """When a process counts as hung."""

  silence: float = number(
    1800.0, "seconds without a finished unit of work", least=0, free=True
  )


@block
class Grid(Settings, key="grid"):
  """The fine grid and the operator C′ that leads to the coarse one."""

  points: int = count(192, "fine points along each axis", least=2)
  length: float = number(64.0, "length of the Kuramoto-Sivashinsky box", above=0)
  factor: int = count(8, "fine points a coarse point, one whole number for all axes")
  operator: str = choice(
    "strided", ("strided", "block_mean"), "how C′ makes a coarse value"
  )
  frames: int = count(1, "consecutive snapshots that the prior knows together")


@block
class FineSplits(Settings, key="data.hfhr"):
  """Trajectories of the fine world, by the use that they have."""

  train: int = count(12288, "trajectories that train the prior and the maps")
  calibration: int = count(2048, "trajectories that tune numbers")
  test: int = count(
    2048, "trajectories whose fields are drawn again from their coarse values"
  )
  reference: int = count(4096, "trajectories that results are compared with")
  floor: int = count(4096, "trajectories that say what other true data would have")


@block
class CoarseSplits(Settings, key="data.lflr"):
  """Trajectories of the coarse biased world, by the use that they have."""

  train: int = count(8192, "trajectories that the maps are fitted to")
  calibration: int = count(1024, "trajectories that tune numbers")
  test: int = count(4096, "trajectories that are debiased and judged")


@block
class Data(Settings, key="data"):
  """Two unpaired worlds of trajectories. Times are in the equation's unit."""

  name: str = text("ks", "the equation", words="the name of an equation")
  dir: str = text("", "where the data lie, WORKDIR/data by default", words=FOLDER,
                  read=folder_name, free=True, example="/data/ks")  # fmt: skip
  burn_in: float = number(25.0, "time before the first snapshot", least=0)
  spacing: float = number(12.5, "time between snapshots", above=0)
  snapshots: int = count(4, "snapshots a trajectory")
  shard: int = count(1024, "trajectories a file")
  hfhr: FineSplits = inner(FineSplits)
  lflr: CoarseSplits = inner(CoarseSplits)

  def trajectories(self, which: str) -> dict[str, int]:
    """{split: trajectories} of "hfhr" or "lflr"."""
    return self.hfhr.asdict() if which == "hfhr" else self.lflr.asdict()


MAPS = (
  "entropic", "equivariant", "gaussian", "minibatch", "pooled_quantile", "quantile", "rescaled",
  "symmetric",
)  # fmt: skip


@block
class Minibatch(Settings, key="debias.minibatch"):
  """The map "minibatch": entropic transport from a stream of rows."""

  batch: int = count(256, "rows a step")
  passes: float = number(3.0, "passes over the source", above=0)


@block
class Debias(Settings, key="debias"):
  """Maps from the coarse biased world to the coarsened true one."""

  maps: tuple = names(("gaussian", "equivariant", "entropic"), "maps that are fitted and judged",
                      known=MAPS, least=1)  # fmt: skip
  map: str = choice("equivariant", MAPS, "the default map: samples are drawn behind it")
  points: int = count(32768, "rows of each world in a fit", least=2)
  epsilon: float = number(
    0.0005,
    "entropic regularisation as a share of the mean cost; at .3 a map keeps a fifth of the "
    "fields' amplitude, at 1 none of it",
    least=1e-6,
    below=0.3,
  )
  threshold: float = number(
    1e-3, "error of the marginals at which Sinkhorn stops", above=0
  )
  max_iterations: int = count(2000, "Sinkhorn iterations at most")
  check_every: int = count(10, "iterations between two looks at the marginals")
  path: str = choice("auto", ("auto", "dense", "fused", "ring", "pallas"),
                     "how costs are computed; results agree to rounding", free=True)  # fmt: skip
  save_seconds: float = number(
    30.0, "seconds between two checkpoints", least=0, free=True
  )
  recipe: str | tuple = text("GMQM", "steps of the equivariant map, a letter each",
                             words="letters out of G, M, N, Q, T", read=recipe)  # fmt: skip
  select: bool = flag(True, "take only steps that improve rows outside the fit")
  group: str = text("auto", "symmetries that maps keep: auto finds the largest that the bias keeps",
                    words="auto, full, trivial or the name of a subgroup")  # fmt: skip
  outlier: float = number(100.0, "robust standard deviations beyond which a row is refused",
                          above=0, free=True)  # fmt: skip
  quantiles: int = count(
    1000, "quantiles of the maps quantile and pooled_quantile", least=2
  )
  minibatch: Minibatch = inner(Minibatch)
  held_out: int = count(4096, "coarse test snapshots that are debiased", least=2)


@block
class Schedule(Settings, key="schedule"):
  """Noise schedule; every σ is in units of the data's standard deviation."""

  name: str = choice("vp_linear", ("edm", "exponential", "power", "tangent", "vp_linear"),
                     "the schedule σ(t)")  # fmt: skip
  beta_min: float = number(0.1, "of vp_linear: rate of noise at the start", above=0)
  beta_max: float = number(20.0, "of vp_linear: rate of noise at the end", above=0)
  sigma_min: float = number(1e-3, "smallest noise level", above=0)
  sigma_max: float = number(100.0, "largest noise level of all but vp_linear", above=0)
  start: float = number(-1.5, "of tangent: angle at the start")
  end: float = number(1.5, "of tangent: angle at the end")
  exponent: float = number(3.0, "of power: exponent of time", above=0)
  rate: float = number(8.0, "of exponential: rate of growth", above=0)


@block
class Noise(Settings, key="noise"):
  """Noise levels that the prior is trained on."""

  kind: str = choice(
    "log_normal", ("log_normal", "log_uniform", "uniform_time"), "their law"
  )
  mean: float = number(-1.2, "of log_normal: mean of ln σ")
  std: float = number(1.6, "of log_normal: standard deviation of ln σ", above=0)


@block
class Model(Settings, key="model"):
  """The U-Net and its preconditioning."""

  channels: tuple = counts((32, 64, 128), "channels of each level")
  strides: tuple = counts((2, 2, 2), "coarsening on entering each level")
  blocks: int = count(1, "residual blocks a level")
  stem: int = count(1, "patch of the first layer; 1 keeps the full grid")
  heads: int = count(0, "attention heads at the coarsest level; 0 for none", least=0)
  embedding: int = count(128, "width of the noise embedding", least=2)
  convolution: str = choice(
    "auto", ("auto", "edges", "im2col", "lax"), "how convolutions are computed"
  )
  dtype: str = choice(
    "float32", ("bfloat16", "float32"), "precision of the network's arithmetic"
  )
  preconditioning: str = choice(
    "wiener", ("adaptive", "edm", "wiener"), "of the denoiser"
  )
  static: tuple = names((), "fields of the equation that the network sees beside x")


@block
class Optimizer(Settings, key="optimizer"):
  """Adam, with linear warm-up and cosine decay."""

  peak: float = number(3e-3, "peak learning rate", above=0)
  end: float = number(1e-6, "learning rate at the end", least=0)
  warmup_steps: int = count(500, "steps of warm-up", least=0)
  clip: float = number(1.0, "largest norm of a gradient", above=0)


@block
class Train(Settings, key="train"):
  """The training run."""

  batch: int = count(128, "fields a step, over all devices")
  total_steps: int = count(8000, "training steps")
  ema_decay: tuple = numbers((0.999,), "decays of the averages; the first average is the prior",
                             least=0, below=1)  # fmt: skip
  dir: str = text("", "where the prior lies, WORKDIR/train by default", words=FOLDER,
                  read=folder_name, free=True, example="/data/ks")  # fmt: skip
  augment: bool = flag(
    False, "move every field by a random symmetry, anew in each step"
  )


@block
class Plan(Settings, key="plan"):
  """How often things happen in training, in steps."""

  log_every: int = count(100, "steps between two log lines", free=True)
  eval_every: int = count(
    2000, "steps between two evaluations; 0: at the end", least=0, free=True
  )
  save_every: int = count(
    1000, "steps between two checkpoints; 0: at the end", least=0, free=True
  )
  save_minutes: float = number(10.0, "minutes between two checkpoints; 0: never by the clock",
                               least=0, free=True)  # fmt: skip


@block
class Keep(Settings, key="keep"):
  """Checkpoints that stay."""

  last: int = count(3, "newest checkpoints that stay", free=True)
  every: int = count(
    0, "keep each checkpoint whose step it divides; 0: none", least=0, free=True
  )
  best: int = count(0, "keep as many by the metric; 0: none", least=0, free=True)
  metric: str = text("validation/error", "metric of the best", words="the name of a metric",
                     free=True)  # fmt: skip


@block
class Memory(Settings, key="memory"):
  """Less memory for more time."""

  microbatches: int = count(1, "parts in which a device's rows are computed", free=True)
  remat: int = count(
    0, "finest levels whose activations are computed twice", least=0, free=True
  )


@block
class Watch(Settings, key="watch"):
  """Fields drawn at every evaluation of training, for their spectrum."""

  fields: int = count(256, "fields", free=True)
  steps: int = count(32, "sampling steps", free=True)


@block
class Profile(Settings, key="profile"):
  """A profiler trace for TensorBoard."""

  start_step: int = count(0, "first step of the trace", least=0, free=True)
  steps: int = count(0, "steps of the trace; 0: none", least=0, free=True)


@block
class Series(Settings, key="sampling.series"):
  """Conditions of consecutive snapshots, drawn by overlapping windows of grid.frames."""

  frames: int = count(1, "snapshots of a condition")
  overlap: int = count(0, "frames that neighbouring windows share", least=0)


@block
class Guidance(Settings, key="sampling.guidance"):
  """How samples are held to C′x = y′."""

  name: str = choice("measured", ("measured", "moment", "none", "paper", "scaled", "wiener"),
                     "the method; paper is Eq. 7 of Wan et al.")  # fmt: skip
  alpha: float = number(3.0, "strength of paper and scaled", least=0)
  normalise: str = choice(
    "none", ("divide", "multiply", "none"), "of paper: scale of the strength"
  )
  final: str = choice("gain", ("gain", "overwrite"), "how paper and scaled end")
  variance: str = choice(
    "measured", ("gaussian", "measured"), "of the gain: the prior's error"
  )


@block
class Resample(Settings, key="sampling.resample"):
  """Resampling among a condition's members in a unit."""

  strength: float = number(0.125, "strength of the selection; 0: none", least=0)
  dead_zone: float = number(
    3.0, "misfit below which nothing is selected, in units of d′", least=1
  )
  below: float = number(100.0, "noise level below which members are weighed", above=0)


SOLVERS = ("dpm_solver_pp_2m", "dpm_solver_pp_2m_sde", "euler_maruyama", "heun")


@block
class Solver(Settings, key="sampling.solver"):
  """The solver of the sampling equation."""

  name: str = choice("dpm_solver_pp_2m_sde", SOLVERS, "the method")
  eta: float = number(10.0, "of dpm_solver_pp_2m_sde: share of fresh noise", least=0)
  churn: float = number(0.0, "of heun: fresh noise", least=0)
  noise: float = number(1.0, "factor on fresh noise, above 1 for a prior that loses small scales",
                        above=0)  # fmt: skip


@block
class Levels(Settings, key="sampling.levels"):
  """Noise levels of conditional draws."""

  name: str = choice(
    "guided", ("edm", "exponential", "guided"), "how levels are spaced"
  )
  steps: int = count(24, "sampling steps")
  sigma_max: float = number(3.0, "first noise level", above=0)
  sigma_min: float = number(3e-3, "last noise level", above=0)
  rho: float = number(7.0, "of edm: exponent of the spacing", above=0)


@block
class Unconditional(Settings, key="sampling.unconditional"):
  """Fields drawn without a condition."""

  fields: int = count(2048, "fields", free=True)
  steps: int = count(48, "sampling steps")
  sigma_max: float = number(80.0, "first noise level", above=0)


@block
class Sampling(Settings, key="sampling"):
  """What is drawn, and how."""

  conditions: int = count(1024, "held-out coarse fields, or series of them", free=True)
  sets: tuple = names(("default+diffusion", "raw+diffusion", "true+diffusion", "unconditional"),
                      "sets that are drawn, named after the map before them", least=1,
                      free=True)  # fmt: skip
  series: Series = inner(Series)
  members: int = count(8, "members of each condition", free=True)
  unit: tuple = counts((64, 8), "conditions × members that are drawn and written together",
                       length=2)  # fmt: skip
  start: str = choice(
    "gaussian", ("gaussian", "noise"), "the first field: a Gaussian guess, or noise"
  )
  guidance: Guidance = inner(Guidance)
  observation_noise: float | str = text(
    "auto",
    "standard deviation of y′ in data units; auto fits it to each map",
    words="a number of at least 0, or auto",
    read=noise_or_auto,
  )
  any_device: bool = flag(
    False, "may a kind of device draw that has not drawn for the set before?", free=True
  )
  max_failed: float = number(0.05, "share of members that may fail before a set is refused",
                             least=0, below=1, free=True)  # fmt: skip
  resample: Resample = inner(Resample)
  spread: float = number(1.0, "factor on members' distance from their mean", above=0)
  solver: Solver = inner(Solver)
  levels: Levels = inner(Levels)
  unconditional: Unconditional = inner(Unconditional)


@block
class Evaluate(Settings, key="evaluate"):
  """The report."""

  reference: int = count(16384, "true fields to compare with", least=2)
  draws: int = count(200, "replicates behind intervals and floors", least=40)
