"""Config blocks -> objects. The only place that reads config keys, so that no two jobs can read them differently."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from downscaling.common import operators, runs, symmetry
from downscaling.datasets import builders, generate, statistics
from downscaling.diffusion import denoiser, schedules, training, unet
from downscaling.equations import ks
from downscaling.sampling import gain as gains
from downscaling.sampling import guidance, solvers

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


def debias_options(config) -> dict[str, Any]:
  """Keywords of sinkhorn.debias from config.debias, less the sizes of the sets."""
  return {k: v for k, v in config.debias.items() if k not in ("points", "held_out")}


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
  known = {
    f.__name__: f
    for f in (schedules.vp_linear, schedules.tangent, schedules.power, schedules.exponential, schedules.edm)
  }
  return choose(known, block.pop("name"), "config.schedule.name")(**block)


def noise_levels(config):
  """(key, B) -> [B] noise levels to train on."""
  return functools.partial(schedules.training_sigmas, schedule=schedule(config), **config.noise)


def optimizer(config) -> optax.GradientTransformation:
  return training.optimizer(total_steps=config.train.total_steps, **config.optimizer)


# ---------------------------------------------------------------- samples

SOURCES = {"ot+diffusion": "ot", "raw+diffusion": "raw", "true+diffusion": "true", "unconditional": None}


def sampler(config, stats: statistics.Statistics, network: denoiser.Denoiser) -> Callable:
  """(keys [B], coarse fields [B, *coarse, C] or None, parameters) -> fields [B, *space, C], in data units."""
  c, op = config.sampling, operator(config)
  if c.start not in ("noise", "gaussian"):
    raise ValueError(f"config.sampling.start={c.start!r} is unknown; use noise or gaussian.")
  steps, shape = dict(c.levels), (*op.fine, len(stats.mean))
  levels = schedules.levels(**steps)
  high = schedules.levels(**steps | {"sigma_max": c.unconditional.sigma_max, "steps": c.unconditional.steps})
  gain = gains.Gain(op, gains.prior_variance(stats.spectrum))
  solve = _solver(config)

  def draw(keys, y, params):
    denoise = lambda x, sigma: network.apply({"params": params}, x, sigma)
    if y is None:  # nothing is known but the law: start from pure noise, far above the data
      x = solvers.initial(keys, shape, float(high[0]))
      return stats.restore(solve(denoise, x, high, keys))
    y = stats.normalise(y)
    guided = guidance.make(denoise=denoise, operator=op, y=y, gain=gain, **c.guidance)
    if c.start == "gaussian":
      x = gains.gaussian_start(keys, gain, y, float(levels[0]))
    else:
      x = solvers.initial(keys, shape, float(levels[0]))
    return stats.restore(solve(guided.denoise, x, levels, keys, last=guided.last))

  return draw


def _solver(config) -> Callable:
  known = {
    "euler_maruyama": functools.partial(solvers.euler_maruyama, schedule=schedule(config)),
    "heun": solvers.heun,
    "dpm_solver_pp_2m": solvers.dpm_solver_pp_2m,
    "dpm_solver_pp_2m_sde": solvers.dpm_solver_pp_2m_sde,
  }
  block = dict(config.sampling.solver)
  return functools.partial(choose(known, block.pop("name"), "config.sampling.solver.name"), **block)


def coordinates(config) -> dict[str, tuple[np.ndarray, dict[str, str]]]:
  """Coordinates of the sample store: positions in the equation's own length unit."""
  fine, coarse = operator(config).fine[0], operator(config).coarse[0]
  at = lambda n: np.arange(n) * (config.grid.length / n)
  about = {"long_name": "position", "units": "1"}
  return {"x": (at(fine), about), "x_coarse": (at(coarse), about | {"long_name": "position of the coarse points"})}


def group(config) -> symmetry.Group:
  """The equation's symmetry group on the coarse grid."""
  return ks.group(operator(config).coarse[0])
