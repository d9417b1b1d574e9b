"""Config blocks -> objects. The only place that reads config keys, so that no two jobs can read them differently."""

import functools
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from downscaling.common import operators
from downscaling.common import runs
from downscaling.datasets import builders, generate, statistics
from downscaling.diffusion import denoiser, schedules, training, unet
from downscaling.equations import ks

# What each stage's result depends on; anything else may change between restarts.
IDENTITY = {
  "data": ("seed", "grid", "fine", "coarse", "data"),
  "debias": ("seed", "grid", "fine", "coarse", "data", "debias"),
  "train": ("seed", "grid", "fine", "data", "noise", "schedule", "model", "optimizer", "train"),
}


def identity(config, stage: str) -> dict[str, Any]:
  """The config blocks that the stage's result depends on, as plain values; where the data lie does not matter."""
  blocks = {key: runs.plain(config[key]) for key in IDENTITY[stage]}
  unseen = ("dir", "lflr") if stage == "train" else ("dir",)  # the prior never sees the coarse world
  blocks["data"] = {k: v for k, v in blocks["data"].items() if k not in unseen}
  return blocks


def data_dir(config, workdir: pathlib.Path) -> pathlib.Path:
  return pathlib.Path(config.data.dir).expanduser() if config.data.dir else workdir / "data"


def space(config) -> tuple[int, ...]:
  return (config.grid.points,)


def operator(config) -> operators.Operator:
  """C′ of config.grid."""
  kinds = {"strided": operators.Strided, "block_mean": operators.BlockMean}
  return choose(kinds, config.grid.operator, "config.grid.operator").on(space(config), config.grid.factor)


def choose(known: dict, name: str, key: str):
  """known[name]; raises ValueError naming the key and what is known."""
  if name not in known:
    raise ValueError(f"{key}={name!r} is unknown; use one of {sorted(known)}.")
  return known[name]


# ---------------------------------------------------------------- data


def dataset(config, workdir: pathlib.Path, which: str) -> builders.FieldsBuilder:
  grid = space(config) if which == "hfhr" else operator(config).coarse
  return builders.make(config.data.name, which, data_dir(config, workdir), grid)


def generation(config, workdir: pathlib.Path, which: str, sharding) -> generate.Plan:
  """What to simulate of "hfhr" or "lflr"."""
  d, g = config.data, config.grid
  if which == "hfhr":
    solver = ks.Fine(points=g.points, length=g.length, **config.fine)
  else:
    solver = ks.Coarse(length=g.length, points=operator(config).coarse[0], **config.coarse)
  rollout = functools.partial(
    ks.rollout, solver, seed=config.seed, burn_in=d.burn_in, spacing=d.spacing, snapshots=d.snapshots, sharding=sharding
  )
  return generate.Plan(
    builder=dataset(config, workdir, which),
    trajectories=dict(d[which]),
    shard=d.shard,
    times=d.burn_in + d.spacing * np.arange(d.snapshots),
    rollout=lambda ids: rollout(ids)[..., None],
    check=ks.check_finite,
  )


# ---------------------------------------------------------------- prior


def denoising_network(config, stats: statistics.Statistics) -> denoiser.Denoiser:
  """The untrained D(x, σ) of config.model."""
  block = dict(config.model)
  preconditioning = block.pop("preconditioning")
  block["dtype"] = choose({"float32": jnp.float32, "bfloat16": jnp.bfloat16}, block["dtype"], "config.model.dtype")
  net = unet.UNet(**{k: tuple(v) if isinstance(v, list | tuple) else v for k, v in block.items()})
  net.check(space(config))
  spectrum = choose({"edm": None, "wiener": stats.spectrum}, preconditioning, "config.model.preconditioning")
  return denoiser.Denoiser(net, spectrum)


def validation_rows(config) -> int:
  """Held-out fields on which the denoising error is followed."""
  return min(512, config.data.hfhr.validation * config.data.snapshots)


def schedule(config) -> schedules.Schedule:
  block = dict(config.schedule)
  known = {f.__name__: f for f in (schedules.vp_linear, schedules.tangent, schedules.power, schedules.exponential, schedules.edm)}
  return choose(known, block.pop("name"), "config.schedule.name")(**block)


def noise_levels(config):
  """(key, B) -> [B] noise levels to train on."""
  return functools.partial(schedules.training_sigmas, schedule=schedule(config), **config.noise)


def optimizer(config):
  return training.optimizer(total_steps=config.train.total_steps, **config.optimizer)
