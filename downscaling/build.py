"""Config blocks -> objects. The only place that reads config keys, so that no two jobs can read them differently."""

import functools
import math
import pathlib
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from downscaling.common import checkpoints, operators, runs, symmetry
from downscaling.common import mesh as meshes
from downscaling.datasets import builders, generate, statistics
from downscaling.debias import job, maps, moments, recipes
from downscaling.diffusion import denoiser, schedules, steps, training, unet
from downscaling.diffusion import state as states
from downscaling.equations import kolmogorov, ks, rollouts
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
  if "sampling" in blocks:  # counts decide how much there is, not what: an ensemble grows
    sampling = {k: v for k, v in blocks["sampling"].items() if k not in ("conditions", "members")}
    few = {k: v for k, v in sampling["unconditional"].items() if k != "fields"}
    blocks["sampling"] = sampling | {"unconditional": few}
  if "debias" in blocks:  # another path rounds otherwise, as another number of devices does: no other result
    blocks["debias"] = {k: v for k, v in blocks["debias"].items() if k not in ("path", "save_seconds")}
  return blocks


def extent(config) -> dict[str, int]:
  """How much is to be drawn; grows from one call to the next, and what depends on it is made anew."""
  s = config.sampling
  return {"conditions": s.conditions, "members": s.members, "unconditional.fields": s.unconditional.fields}


def data_dir(config, workdir: pathlib.Path) -> pathlib.Path:
  return pathlib.Path(config.data.dir).expanduser() if config.data.dir else workdir / "data"


def folder(config, workdir: pathlib.Path, stage: str) -> pathlib.Path:
  """Where a stage lies; config.label keeps a second set of samples, and its report, beside the first."""
  if stage == "data":
    return data_dir(config, workdir)
  return workdir / (f"{stage}-{config.label}" if config.label and stage in ("samples", "report") else stage)


EQUATIONS = {"ks": ks, "kolmogorov": kolmogorov}


def physics(config):
  """The room of config.data.name's equation: its Fine, Coarse, group, RANK."""
  return choose(EQUATIONS, config.data.name, "config.data.name")


def space(config) -> tuple[int, ...]:
  return (config.grid.points,) * physics(config).RANK


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


def equation(config, which: str) -> rollouts.Solver:
  """The solver of "hfhr" or "lflr"."""
  room, box = physics(config), {k: v for k, v in config.grid.items() if k == "length"}
  if which == "hfhr":
    return room.Fine(points=config.grid.points, **box, **config.fine)
  return room.Coarse(points=operator(config).coarse[0], **box, **config.coarse)


def generation(config, workdir: pathlib.Path, which: str, sharding) -> generate.Plan:
  """What to simulate of "hfhr" or "lflr"."""
  d, solver = config.data, equation(config, which)
  times = {"burn_in": d.burn_in, "spacing": d.spacing, "snapshots": d.snapshots}
  rollout = functools.partial(rollouts.rollout, solver, seed=config.seed, sharding=sharding, **times)
  return generate.Plan(
    builder=dataset(config, workdir, which),
    trajectories=dict(d[which]),
    shard=d.shard,
    times=d.burn_in + d.spacing * np.arange(d.snapshots),
    rollout=lambda ids: rollout(ids)[..., None],
    check=rollouts.check_finite,
  )


SINKHORN = ("epsilon", "threshold", "max_iterations", "check_every", "path", "save_seconds")


def quadratic(config) -> str | None:
  """The name of the equation's quadratic term in moments.QUADRATIC; None if it has none."""
  return config.data.name if config.data.name in moments.QUADRATIC else None


def debias_setting(config, **of_job) -> maps.Setting:
  """What the fits of config.debias share. of_job: mesh, stop, agree."""
  c = config.debias
  return maps.Setting(
    group=group(config),
    quadratic=quadratic(config),
    sinkhorn={key: c[key] for key in SINKHORN},
    minibatch=dict(c.minibatch),
    recipe=c.recipe if isinstance(c.recipe, str) else tuple(map(tuple, c.recipe)),
    seed=config.seed,
    config_hash=runs.config_hash(identity(config, "debias")),
    **of_job,
  )


# ---------------------------------------------------------------- prior


def denoising_network(config, stats: statistics.Statistics) -> denoiser.Denoiser:
  """The untrained D(x, σ) of config.model."""
  block = dict(config.model) | {"remat": config.memory.remat}
  if block["convolution"] == "auto" and config.memory.microbatches > 1 and jax.default_backend() == "cpu":
    block["convolution"] = "im2col"  # microbatches are a loop: see unet.convolve
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


def learning_rate(config) -> optax.Schedule:
  block = {k: v for k, v in config.optimizer.items() if k != "clip"}
  return states.learning_rate(total_steps=config.train.total_steps, **block)


def optimizer(config) -> optax.GradientTransformation:
  return states.optimizer(learning_rate(config), config.optimizer.clip)


def ema_decays(config) -> tuple[float, ...]:
  """The decays of config.train.ema_decay, which is one number or several."""
  decays = config.train.ema_decay
  decays = (decays,) if isinstance(decays, int | float) else tuple(decays)
  if not decays or not all(0 <= d < 1 for d in decays):
    raise ValueError(f"config.train.ema_decay={config.train.ema_decay}: each must lie in [0, 1), e.g. 0.999.")
  return decays


def training_plan(config) -> training.Plan:
  return training.Plan(total_steps=config.train.total_steps, profile=dict(config.profile), **config.plan)


def keep(config) -> checkpoints.Keep:
  """Which checkpoints stay. Raises ValueError for a policy that keeps none, or a metric that is never measured."""
  policy = checkpoints.Keep(**config.keep)
  if policy.last < 1 or min(policy.every, policy.best) < 0:
    raise ValueError(f"config.keep={dict(config.keep)}: last must be at least 1, every and best at least 0.")
  known = [f"validation/{name}" for name in ("error", *(f"error_at_sigma_{s:g}" for s in training.SIGMAS))]
  if policy.best and policy.metric not in (*known, *WATCHED):
    raise ValueError(f"config.keep.metric={policy.metric!r} is unknown; use one of {[*known, *WATCHED]}.")
  return policy


WATCHED = ("unconditional/melr_weighted", "unconditional/melr_energy")


def update(config, network, mesh: jax.sharding.Mesh, specs) -> Callable:
  """The training step of the config: (state, batch) -> (state, logs)."""
  _check_batch(config, mesh)
  return steps.make_train_step(
    network,
    optimizer(config),
    noise_levels(config),
    ema_decays(config),
    mesh,
    specs,
    rate=learning_rate(config),
    log_every=config.plan.log_every,
    microbatches=config.memory.microbatches,
  )


def initial_state(config, network, channels: int) -> Callable:
  """(key of the parameters, key of the run) -> TrainState at step 0."""
  averages = len(ema_decays(config))
  return lambda key, run: states.initial(network, optimizer(config), space(config), channels, averages, key, run)


# ---------------------------------------------------------------- samples

SOURCES = {"ot+diffusion": "ot", "raw+diffusion": "raw", "true+diffusion": "true", "unconditional": None}


def sampler(config, stats: statistics.Statistics, network: denoiser.Denoiser) -> Callable:
  """(keys [B], coarse fields [B, *coarse, C] or None, parameters) -> fields [B, *space, C], in data units."""
  c, op = config.sampling, operator(config)
  if c.start not in ("noise", "gaussian"):
    raise ValueError(f"config.sampling.start={c.start!r} is unknown; use noise or gaussian.")
  if config.model.convolution == "auto" and jax.default_backend() == "cpu":  # solvers loop: see unet.convolve
    network = network.clone(net=network.net.clone(convolution="im2col"))
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


def watching_sampler(config, stats: statistics.Statistics, network: denoiser.Denoiser) -> Callable:
  """The sampler, with the steps of config.watch for its unconditional draws."""
  c = config.copy_and_resolve_references()
  c.sampling.unconditional.steps = c.watch.steps
  return sampler(c, stats, network)


def _solver(config) -> Callable:
  """The solver with those of its block's keys that it takes: eta is the SDE's, churn is Heun's."""
  block, given = dict(config.sampling.solver), schedule(config)
  known = {
    "euler_maruyama": lambda: functools.partial(solvers.euler_maruyama, schedule=given),
    "heun": lambda: functools.partial(solvers.heun, churn=block["churn"]),
    "dpm_solver_pp_2m": lambda: solvers.dpm_solver_pp_2m,
    "dpm_solver_pp_2m_sde": lambda: functools.partial(solvers.dpm_solver_pp_2m_sde, eta=block["eta"]),
  }
  return choose(known, block["name"], "config.sampling.solver.name")()


def coordinates(config) -> dict[str, tuple[np.ndarray, dict[str, str]]]:
  """Coordinates of the sample store: positions in the equation's own length unit."""
  op, length, found = operator(config), equation(config, "hfhr").length, {}
  for axis, fine, coarse in zip(("y", "x")[-len(op.fine) :], op.fine, op.coarse, strict=True):
    at = lambda n: np.arange(n) * (length / n)
    about = {"long_name": "position", "units": "1"}
    found[axis] = (at(fine), about)
    found[f"{axis}_coarse"] = (at(coarse), about | {"long_name": "position of the coarse points"})
  return found


def group(config) -> symmetry.Group:
  """The equation's symmetry group on the coarse grid."""
  return physics(config).group(operator(config).coarse[0])


# ---------------------------------------------------------------- the door


def check(config, mesh: jax.sharding.Mesh) -> None:
  """Refuses, before anything is written, what a later job would stumble over.

  Raises: ValueError naming the key, what came and what is needed.
  """
  try:
    _check_sizes(config, mesh)
    _check_blocks(config)
  except (AttributeError, KeyError, TypeError) as error:
    where = traceback.extract_tb(error.__traceback__)[-1].filename
    if not (where == __file__ or "ml_collections" in where or "keyword argument" in str(error)):
      raise  # a defect of ours
    raise ValueError(f"the config has a key that nothing takes, or lacks one: {error}") from error


def _check_sizes(config, mesh) -> None:
  c, d = config, config.data
  for key in ("data.snapshots", "data.shard", "train.total_steps", "sampling.members", "sampling.unconditional.fields"):
    if functools.reduce(getattr, key.split("."), c) < 1:
      raise ValueError(f"config.{key} must be at least 1: set --config.{key}=1 or more.")
  if not (c.debias.epsilon > 0 and c.debias.threshold > 0 and c.debias.max_iterations >= 1):
    raise ValueError(
      f"config.debias: epsilon={c.debias.epsilon:g} (a share of the mean cost) and threshold={c.debias.threshold:g} "
      f"must be > 0, max_iterations={c.debias.max_iterations} at least 1. E.g. --config.debias.epsilon=0.001"
    )
  floor = max(c.debias.held_out, min(c.debias.points, job.IN_SAMPLE_ROWS), c.sampling.unconditional.fields)
  needs = (
    *(("debias.points", c.debias.points, which, "train", 2) for which in ("hfhr", "lflr")),
    ("debias.held_out", c.debias.held_out, "lflr", "test", 2),
    ("train.batch", c.train.batch, "hfhr", "train", 1),
    ("sampling.conditions", c.sampling.conditions, "hfhr", "validation", 1),
    ("evaluate.reference", c.evaluate.reference, "hfhr", "test", 2),
    # the report's floors take as many independent rows as its largest set has
    ("debias.held_out, debias.points or sampling.unconditional.fields", floor, "hfhr", "validation", 2),
  )
  for key, need, which, split, least in needs:
    have = d[which].get(split, 0) * d.snapshots
    if not least <= need <= have:
      raise ValueError(
        f"config.{key} asks for {need} {which} {split} snapshots: {least} to {have} can be had, {d.snapshots} a "
        f"trajectory. Ask for as many, or simulate more: --config.data.{which}.{split}={-(-need // d.snapshots)}."
      )
  if c.sampling.conditions > c.debias.held_out:
    raise ValueError(
      f"config.sampling.conditions={c.sampling.conditions}, but only config.debias.held_out={c.debias.held_out} fields "
      f"are debiased: set --config.sampling.conditions={c.debias.held_out} or fewer, or raise held_out."
    )
  for block, least in ((c.plan, 0), (c.profile, 0), (c.memory, 0), (c.supervision, 0), (c.watch, 1)):
    if bad := [key for key, value in block.items() if value < least]:
      raise ValueError(f"config: {bad[0]}={block[bad[0]]} must be at least {least}.")
  for key, value in (("plan.log_every", c.plan.log_every), ("memory.microbatches", c.memory.microbatches)):
    if value < 1:
      raise ValueError(f"config.{key}={value} must be at least 1.")
  _check_batch(config, mesh)
  meshes.check_divides(c.debias.points, mesh.size, "a cloud", "debias.points")
  if len(c.sampling.unit) != 2 or min(c.sampling.unit) < 1:
    raise ValueError(
      f"config.sampling.unit={c.sampling.unit}: need conditions × members, e.g. (64,4), each at least 1."
    )
  devices = meshes.local(mesh).size
  if (fields := math.prod(c.sampling.unit)) % devices:
    raise ValueError(
      f"config.sampling.unit={tuple(c.sampling.unit)}: a unit of {fields} over {devices} devices of a process: each "
      f"draws as many fields. Make conditions × members a multiple of {devices}."
    )


def _check_maps(config) -> None:
  c = config.debias
  if strangers := [name for name in c.maps if name not in maps.FITS]:
    raise ValueError(f"config.debias.maps has {strangers[0]!r}, which is unknown; use some of {sorted(maps.FITS)}.")
  if c.map not in c.maps:
    raise ValueError(f"config.debias.map={c.map!r} is not among config.debias.maps={tuple(c.maps)}: add it there.")
  recipes.letters(debias_setting(config).recipe, quadratic(config))
  if min(c.minibatch.batch, c.minibatch.passes) <= 0 or ("minibatch" in c.maps and c.minibatch.batch > c.points // 2):
    raise ValueError(
      f"config.debias.minibatch={dict(c.minibatch)}: batch must lie in 1 … {c.points // 2} (half of debias.points), "
      "passes above 0."
    )


def _check_batch(config, mesh) -> None:
  parts, one = mesh.size * config.memory.microbatches, config.memory.microbatches == 1
  what = "a batch" if one else f"a batch in {config.memory.microbatches} microbatches"
  meshes.check_divides(config.train.batch, parts, what, "train.batch")


def _check_blocks(config) -> None:
  """Builds every object once and traces, without computing, what is drawn from it."""
  op, points = operator(config), space(config)
  for which in ("hfhr", "lflr"):
    rollouts.step_counts(equation(config, which).dt, config.data.burn_in, config.data.spacing)
  _check_maps(config)
  optimizer(config)
  ema_decays(config)
  training_plan(config)
  keep(config)
  stats = statistics.Statistics(np.zeros(1, np.float32), np.ones(1, np.float32), np.ones((*points, 1), np.float32))
  key = jax.eval_shape(jax.random.key, 0)
  network = denoising_network(config, stats)
  variables = jax.eval_shape(network.init, key, jax.ShapeDtypeStruct((1, *points, 1), jnp.float32), jnp.ones(1))
  jax.eval_shape(lambda key: noise_levels(config)(key, 4), key)
  keys = jax.ShapeDtypeStruct((4,), key.dtype)
  for y in (None, jax.ShapeDtypeStruct((4, *op.coarse, 1), jnp.float32)):
    jax.eval_shape(sampler(config, stats, network), keys, y, variables["params"])
