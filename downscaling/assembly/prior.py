"""The prior of an experiment: network, noise, optimiser, training step."""

import functools
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from downscaling.assembly import worlds
from downscaling.diffusion import (
  denoiser,
  error_table,
  schedules,
  train_loop,
  train_state,
  train_step,
  unet,
)
from downscaling.experiment import Experiment
from downscaling.fields import statistics, symmetry
from downscaling.runtime import checkpoints
from downscaling.runtime import mesh as meshes

PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
SCHEDULES = {
  "vp_linear": schedules.vp_linear,
  "tangent": schedules.tangent,
  "power": schedules.power,
  "exponential": schedules.exponential,
  "edm": schedules.edm,
}
WATCHED = ("unconditional/melr_weighted", "unconditional/melr_energy")


def network(experiment: Experiment, stats: statistics.Statistics) -> denoiser.Denoiser:
  """The untrained D(x, σ), for windows of grid.frames.

  stats: of single frames.
  """
  model, memory = experiment.model, experiment.memory
  convolution = model.convolution
  if convolution == "auto" and jax.default_backend() == "cpu":
    # Microbatches are a loop. Samplers are too, but take no gradient to the kernels.
    convolution = "im2col" if memory.microbatches > 1 else "edges"
  domain = worlds.domain(experiment)
  net = unet.UNet(
    channels=model.channels,
    strides=model.strides,
    blocks=model.blocks,
    stem=model.stem,
    heads=model.heads,
    embedding=model.embedding,
    periodic=tuple(axis.periodic for axis in domain.axes),
    convolution=convolution,
    dtype=PRECISIONS[model.dtype],
    remat=memory.remat,
  )
  net.check(domain.shape)
  spectrum = stats.repeated(experiment.grid.frames).spectrum
  known = {
    "edm": (None, False),
    "wiener": (spectrum, False),
    "adaptive": (spectrum, True),
  }
  spectral = known[model.preconditioning]
  return denoiser.Denoiser(
    net, *spectral, static=_static(experiment), basis=domain.basis()
  )


def _static(experiment: Experiment) -> np.ndarray | None:
  """Fields of the equation that the network sees, [*space, K]."""
  asked = experiment.model.static
  if not asked:
    return None
  known = worlds.fine_solver(experiment).static()
  for name in asked:
    if name not in known:
      raise ValueError(
        f"config.model.static={name!r} is unknown; use one of {sorted(known)}: these fields belong "
        f"to the equation {experiment.data.name!r}."
      )
  return np.stack([known[name] for name in asked], axis=-1)


def validation_rows(experiment: Experiment) -> int:
  """Calibration windows on which the denoising error is followed."""
  windows = experiment.data.snapshots - experiment.grid.frames + 1
  return min(512, experiment.data.hfhr.calibration * windows)


def schedule(experiment: Experiment) -> schedules.Schedule:
  """The noise schedule, with those keys that it takes."""
  block = experiment.schedule
  make = SCHEDULES[block.name]
  taken = inspect.signature(make).parameters
  return make(**{key: value for key, value in block.asdict().items() if key in taken})


def noise_levels(experiment: Experiment) -> Callable:
  """(key, B) -> [B] noise levels to train on."""
  return functools.partial(
    schedules.training_sigmas,
    schedule=schedule(experiment),
    **experiment.noise.asdict(),
  )


def learning_rate(experiment: Experiment) -> optax.Schedule:
  """Step -> learning rate."""
  block = experiment.optimizer
  return train_state.learning_rate(
    peak=block.peak,
    end=block.end,
    warmup_steps=block.warmup_steps,
    total_steps=experiment.train.total_steps,
  )


def optimizer(experiment: Experiment) -> optax.GradientTransformation:
  """Adam of experiment.optimizer."""
  return train_state.optimizer(learning_rate(experiment), experiment.optimizer.clip)


def plan(experiment: Experiment) -> train_loop.Plan:
  """When training logs, evaluates and saves."""
  return train_loop.Plan(
    total_steps=experiment.train.total_steps,
    profile=experiment.profile.asdict(),
    **experiment.plan.asdict(),
  )


def keep(experiment: Experiment) -> checkpoints.Keep:
  """Which checkpoints stay. Raises ValueError for a metric that is never measured."""
  policy = checkpoints.Keep(**experiment.keep.asdict())
  errors = ("error", *(f"error_at_sigma_{s:g}" for s in train_loop.SIGMAS))
  known = [*(f"validation/{name}" for name in errors), *WATCHED]
  if policy.best and policy.metric not in known:
    raise ValueError(
      f"config.keep.metric={policy.metric!r} is unknown; use one of {known}."
    )
  return policy


def augmentation(
  experiment: Experiment, stats: statistics.Statistics
) -> symmetry.Moves | None:
  """The equation's symmetries on one normalised field [*space, C]; None without train.augment."""
  if not experiment.train.augment:
    return None
  count, act = worlds.moves(experiment)
  many = stats.repeated(experiment.grid.frames)
  axes = len(worlds.space(experiment))
  # A sign is one of u, not of u less its sampled mean.
  offset = np.asarray(many.mean / many.std, np.float32).reshape(*(1,) * axes, -1)

  def move(x, element):
    channels_first = jnp.moveaxis(x + offset, -1, 0)
    return jnp.moveaxis(act(channels_first, element), 0, -1) - offset

  return symmetry.Moves(count, move)


def update(
  experiment: Experiment,
  stats: statistics.Statistics,
  network,
  mesh: jax.sharding.Mesh,
  specs,
) -> Callable:
  """The training step: (state, batch) -> (state, logs). stats: of single frames."""
  check_batch(experiment, mesh)
  return train_step.make_train_step(
    network,
    optimizer(experiment),
    noise_levels(experiment),
    experiment.train.ema_decay,
    mesh,
    specs,
    rate=learning_rate(experiment),
    log_every=experiment.plan.log_every,
    microbatches=experiment.memory.microbatches,
    moves=augmentation(experiment, stats),
  )


def check_batch(experiment: Experiment, mesh: jax.sharding.Mesh) -> None:
  """Raises ValueError unless a training batch divides over devices and microbatches."""
  microbatches = experiment.memory.microbatches
  what = "a batch" if microbatches == 1 else f"a batch in {microbatches} microbatches"
  meshes.check_divides(
    experiment.train.batch, mesh.size * microbatches, what, "train.batch"
  )


def initial_state(experiment: Experiment, network, channels: int) -> Callable:
  """(key of the parameters, key of the run) -> TrainState at step 0."""
  averages = len(experiment.train.ema_decay)
  space, adam = worlds.space(experiment), optimizer(experiment)

  def make(key, run):
    return train_state.initial(network, adam, space, channels, averages, key, run)

  return make


def error_levels(experiment: Experiment) -> np.ndarray:
  """Noise levels of the error table: all that a sampler of this schedule may meet."""
  given = schedule(experiment)
  return error_table.levels(given.sigma_min, given.sigma_max)


def stand_in_table(experiment: Experiment) -> error_table.ErrorTable:
  """A table of the right shape, for programs that are compiled and never run."""
  levels = error_levels(experiment)
  values = experiment.grid.frames * worlds.channels(experiment)
  shape = (len(levels), *worlds.space(experiment), values)
  return error_table.ErrorTable(levels, np.ones(shape, np.float32))


def unit_statistics(experiment: Experiment) -> statistics.Statistics:
  """Statistics of the right shape, for programs that are compiled and never run."""
  one = np.ones(worlds.channels(experiment), np.float32)
  spectrum = np.ones((*worlds.space(experiment), len(one)), np.float32)
  return statistics.Statistics(np.zeros_like(one), one, spectrum)
