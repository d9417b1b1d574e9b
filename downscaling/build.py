"""Config blocks -> objects.

The only place that reads config keys, so that no two jobs can read them differently.
"""

import functools
import pathlib
import traceback
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from downscaling import door, series, stages
from downscaling.datasets import generate, simulated
from downscaling.debias import bias_symmetry, maps
from downscaling.debias.equivariant import moments
from downscaling.diffusion import (
  denoiser,
  error_table,
  schedules,
  train_loop,
  train_state,
  train_step,
  unet,
)
from downscaling.equations import kolmogorov, ks, rollouts
from downscaling.fields import operators, statistics, symmetry
from downscaling.runtime import checkpoints, random_keys, stage_folder
from downscaling.runtime import mesh as meshes
from downscaling.sampling import conditional_sampler, gaussian_gain, solvers, stitching
from downscaling.sampling.resampling import Resampling

EQUATIONS = {"ks": ks, "kolmogorov": kolmogorov}


def physics(config):
  """The room of config.data.name's equation: its Fine, Coarse, group, RANK."""
  return choose(EQUATIONS, config.data.name, "config.data.name")


def space(config) -> tuple[int, ...]:
  return (config.grid.points,) * physics(config).RANK


def operator(config) -> operators.Operator:
  """C′ of config.grid."""
  kinds = {"strided": operators.Strided, "block_mean": operators.BlockMean}
  return choose(kinds, config.grid.operator, "config.grid.operator").on(
    space(config), config.grid.factor
  )


def choose(known: dict, name: str, key: str):
  """known[name]; raises ValueError naming the key and what is known."""
  if name not in known:
    raise ValueError(f"{key}={name!r} is unknown; use one of {sorted(known)}.")
  return known[name]


# ---------------------------------------------------------------- data


def dataset(config, workdir: pathlib.Path, which: str) -> simulated.FieldsBuilder:
  grid = space(config) if which == "hfhr" else operator(config).coarse
  return simulated.make(config.data.name, which, stages.data_dir(config, workdir), grid)


def equation(config, which: str) -> rollouts.Solver:
  """The solver of "hfhr" or "lflr"."""
  room, box = physics(config), {k: v for k, v in config.grid.items() if k == "length"}
  if which == "hfhr":
    return room.Fine(points=config.grid.points, **box, **config.fine)
  return room.Coarse(points=operator(config).coarse[0], **box, **config.coarse)


def precision(config, which: str) -> str:
  """In which the solver of "hfhr" or "lflr" computes."""
  return getattr(equation(config, which), "dtype", "float64")


def simulating(config, which: str, mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
  """This process's devices for that solver: those of the mesh, or the host's CPU for float64 beside
  a TPU.
  """
  return meshes.exact(mesh) if precision(config, which) == "float64" else meshes.local(mesh)


def generation(config, workdir: pathlib.Path, which: str, sharding) -> generate.Plan:
  """What to simulate of "hfhr" or "lflr"."""
  d, solver = config.data, equation(config, which)
  times = {"burn_in": d.burn_in, "spacing": d.spacing, "snapshots": d.snapshots}
  rollout = functools.partial(
    rollouts.rollout, solver, seed=config.seed, sharding=sharding, **times
  )
  return generate.Plan(
    builder=dataset(config, workdir, which),
    trajectories=dict(d[which]),
    shard=d.shard,
    times=d.burn_in + d.spacing * np.arange(d.snapshots),
    rollout=lambda ids: rollout(ids)[..., None],
    check=functools.partial(rollouts.check, solver),
  )


SINKHORN = ("epsilon", "threshold", "max_iterations", "check_every", "path", "save_seconds")


def quadratic(config) -> str | None:
  """The name of the equation's quadratic term in moments.QUADRATIC; None if it has none."""
  return config.data.name if config.data.name in moments.QUADRATIC else None


def debias_setting(config, **of_job) -> maps.Setting:
  """What the fits of config.debias share. of_job: mesh, stop, agree."""
  c = config.debias
  whole = group(config)
  periodic = len(bias_symmetry.subgroups(whole, operator(config).coarse).get("shifts", whole)) > 1
  return maps.Setting(
    group=whole,
    subgroup=c.group,
    towards="stationary" if periodic else "tapered",
    select=c.select,
    outlier=c.outlier,
    quadratic=quadratic(config),
    sinkhorn={key: c[key] for key in SINKHORN},
    minibatch=dict(c.minibatch),
    recipe=c.recipe if isinstance(c.recipe, str) else tuple(map(tuple, c.recipe)),
    seed=config.seed,
    config_hash=stage_folder.config_hash(stages.identity(config, "debias")),
    **of_job,
  )


def in_sample_rows(config) -> np.ndarray:
  """Which rows of the fit are mapped for in_sample.zarr: as many as are held out, balanced over
  trajectories and times.

  A fit of some rows alone may lack a few of the balanced ones.
  """
  trajectories, snapshots = config.data.lflr.train, config.data.snapshots
  fitted = simulated.balanced(trajectories, snapshots, config.debias.points)
  some = simulated.balanced(
    trajectories, snapshots, min(config.debias.held_out, config.debias.points)
  )
  return np.flatnonzero(np.isin(fitted, some))


# ---------------------------------------------------------------- prior


def denoising_network(config, stats: statistics.Statistics) -> denoiser.Denoiser:
  """The untrained D(x, σ) of config.model, for windows of config.grid.frames. stats: of single
  frames.
  """
  block = dict(config.model) | {"remat": config.memory.remat}
  if (
    block["convolution"] == "auto"
    and config.memory.microbatches > 1
    and jax.default_backend() == "cpu"
  ):
    block["convolution"] = "im2col"  # microbatches are a loop: see unet.convolve
  preconditioning, names = (
    block.pop("preconditioning"),
    block.pop("static", ()),
  )  # KS is alike everywhere: no such key
  block["dtype"] = choose(
    {"float32": jnp.float32, "bfloat16": jnp.bfloat16}, block["dtype"], "config.model.dtype"
  )
  net = unet.UNet(**{k: tuple(v) if isinstance(v, list | tuple) else v for k, v in block.items()})
  net.check(space(config))
  spectrum = stats.repeated(config.grid.frames).spectrum
  known = {"edm": (None, False), "wiener": (spectrum, False), "adaptive": (spectrum, True)}
  fields = equation(config, "hfhr").static() if names else {}
  static = [choose(fields, name, "config.model.static") for name in names]
  return denoiser.Denoiser(
    net,
    *choose(known, preconditioning, "config.model.preconditioning"),
    static=np.stack(static, axis=-1) if static else None,
  )


def validation_rows(config) -> int:
  """Held-out windows on which the denoising error is followed."""
  return min(512, config.data.hfhr.calibration * (config.data.snapshots - config.grid.frames + 1))


def schedule(config) -> schedules.Schedule:
  block = dict(config.schedule)
  known = {
    f.__name__: f
    for f in (
      schedules.vp_linear,
      schedules.tangent,
      schedules.power,
      schedules.exponential,
      schedules.edm,
    )
  }
  return choose(known, block.pop("name"), "config.schedule.name")(**block)


def noise_levels(config):
  """(key, B) -> [B] noise levels to train on."""
  return functools.partial(schedules.training_sigmas, schedule=schedule(config), **config.noise)


def learning_rate(config) -> optax.Schedule:
  block = {k: v for k, v in config.optimizer.items() if k != "clip"}
  return train_state.learning_rate(total_steps=config.train.total_steps, **block)


def optimizer(config) -> optax.GradientTransformation:
  return train_state.optimizer(learning_rate(config), config.optimizer.clip)


def ema_decays(config) -> tuple[float, ...]:
  """The decays of config.train.ema_decay, which is one number or several."""
  decays = config.train.ema_decay
  decays = (decays,) if isinstance(decays, int | float) else tuple(decays)
  if not decays or not all(0 <= d < 1 for d in decays):
    raise ValueError(
      f"config.train.ema_decay={config.train.ema_decay}: each must lie in [0, 1), e.g. 0.999."
    )
  return decays


def training_plan(config) -> train_loop.Plan:
  return train_loop.Plan(
    total_steps=config.train.total_steps, profile=dict(config.profile), **config.plan
  )


def keep(config) -> checkpoints.Keep:
  """Which checkpoints stay.

  Raises ValueError for a policy that keeps none, or a metric that is never measured.
  """
  policy = checkpoints.Keep(**config.keep)
  if policy.last < 1 or min(policy.every, policy.best) < 0:
    raise ValueError(
      f"config.keep={dict(config.keep)}: last must be at least 1, every and best at least 0."
    )
  known = [
    f"validation/{name}"
    for name in ("error", *(f"error_at_sigma_{s:g}" for s in train_loop.SIGMAS))
  ]
  if policy.best and policy.metric not in (*known, *WATCHED):
    raise ValueError(
      f"config.keep.metric={policy.metric!r} is unknown; use one of {[*known, *WATCHED]}."
    )
  return policy


WATCHED = ("unconditional/melr_weighted", "unconditional/melr_energy")


def moves(config) -> symmetry.Moves:
  """The symmetries of the fine equation's grid, on [..., *space]."""
  solver = equation(config, "hfhr")
  return symmetry.Moves(solver.symmetries, solver.move)


def coarse_moves(config) -> symmetry.Moves:
  """The symmetries of the coarse grid, on [..., *coarse]: `group` without its table."""
  return symmetry.Moves(len(group(config)), equation(config, "hfhr").move)


def augmentation(config, stats: statistics.Statistics) -> symmetry.Moves | None:
  """Those on one normalised field [*space, C]; None where config.train.augment is off."""
  if not config.train.augment:
    return None
  (count, act), many = moves(config), stats.repeated(config.grid.frames)
  # A sign is one of u, not of u less its sampled mean.
  offset = np.asarray(many.mean / many.std, np.float32).reshape(*(1,) * len(space(config)), -1)

  def move(x, element):
    return jnp.moveaxis(act(jnp.moveaxis(x + offset, -1, 0), element), 0, -1) - offset

  return symmetry.Moves(count, move)


def update(
  config, stats: statistics.Statistics, network, mesh: jax.sharding.Mesh, specs
) -> Callable:
  """The training step of the config: (state, batch) -> (state, logs). stats: of single frames."""
  door.batch(config, mesh)
  return train_step.make_train_step(
    network,
    optimizer(config),
    noise_levels(config),
    ema_decays(config),
    mesh,
    specs,
    rate=learning_rate(config),
    log_every=config.plan.log_every,
    microbatches=config.memory.microbatches,
    moves=augmentation(config, stats),
  )


def initial_state(config, network, channels: int) -> Callable:
  """(key of the parameters, key of the run) -> TrainState at step 0."""
  averages = len(ema_decays(config))
  return lambda key, run: train_state.initial(
    network, optimizer(config), space(config), channels, averages, key, run
  )


# ---------------------------------------------------------------- samples

RAW, TRUE = (
  "lflr",
  "true",
)  # conditions that are no map's: as simulated, and of held-out fine fields


def default_set(config) -> str:
  """The set of samples that is drawn behind the default map."""
  return f"{config.debias.map}+diffusion"


def sources(config) -> dict[str, str | None]:
  """{set of samples: its conditions, a map's name or RAW or TRUE or None}, as config.sampling.sets
  asks for them.

  A set is named after the map that it is drawn behind; "default+diffusion" in the config means
  config.debias.map.
  """
  known = {default_set(config): config.debias.map}
  known |= {f"{name}+diffusion": name for name in config.debias.maps}
  known |= {"raw+diffusion": RAW, "true+diffusion": TRUE, "unconditional": None}
  asked = [default_set(config) if s == "default+diffusion" else s for s in config.sampling.sets]
  for name in asked:
    choose(known, name, "config.sampling.sets")
  if not asked:
    raise ValueError(
      "config.sampling.sets is empty, so nothing would be drawn: name some of "
      f"{['default+diffusion', *known]}."
    )
  return {name: source for name, source in known.items() if name in asked}


def needs_table(config) -> bool:
  """Whether conditional draws go by the prior's measured error (diffusion/error_table.py)."""
  block = config.sampling.guidance
  choose(
    dict.fromkeys(("gaussian", "measured")), block.variance, "config.sampling.guidance.variance"
  )
  return block.name == "measured" or (block.name != "wiener" and block.variance == "measured")


def error_levels(config) -> np.ndarray:
  """Noise levels of the table: all that a sampler of this schedule may meet."""
  given = schedule(config)
  return error_table.levels(given.sigma_min, given.sigma_max)


def stand_in_table(config) -> error_table.ErrorTable:
  """A table of the right shape, for programs that are compiled and never run."""
  levels = error_levels(config)
  return error_table.ErrorTable(
    levels, np.ones((len(levels), *space(config), config.grid.frames), np.float32)
  )


def sampler(
  config,
  stats: statistics.Statistics,
  network: denoiser.Denoiser,
  table: error_table.ErrorTable | None = None,
) -> Callable:
  """(keys [B], coarse fields [B, *coarse, C] or None, parameters) -> (fields [B, *space, C], misfit
  [B]); see draws.

  With series of L > 1 frames, an axis of them follows B. stats: of single frames. table:
  errors.load of the prior, where needs_table says so.
  """
  draw = _draw(config, stats, network, table)
  return draw if (length := series.plan(config).series) == 1 else stitching.over_time(draw, length)


def _draw(config, stats, network, table=None) -> Callable:
  """The sampler, the frames of a series folded into channels."""
  c, op, plan = config.sampling, operator(config), series.plan(config)
  stats = stats.repeated(plan.series)
  if (
    config.model.convolution == "auto" and jax.default_backend() == "cpu"
  ):  # solvers loop: see unet.convolve
    network = network.clone(net=network.net.clone(convolution="im2col"))
  options = {k: v for k, v in c.guidance.items() if k != "variance"}
  given = stages.observation_noise(config) or 0.0  # "auto" comes with the conditions: draws.Soft
  noise = tuple(float(given / s) for s in stats.std)
  with (
    jax.ensure_compile_time_eval()
  ):  # whoever puts a sampler together under jit: levels are numbers
    prior = guide = gaussian_gain.Gain(op, gaussian_gain.prior_variance(stats.spectrum), noise)
    if needs_table(config):
      variance = table and gaussian_gain.measured_variance(
        table.sigmas, stitching.extended(table.errors, plan)
      )
      guide = variance and gaussian_gain.Gain(op, variance, noise)
    door.noise_levels(config, schedule(config), table if needs_table(config) else None)
    levels, high = _noise_levels(c, guide or prior)
  window = lambda params: lambda x, sigma: network.apply({"params": params}, x, sigma)
  return conditional_sampler.sampler(
    conditional_sampler.Recipe(
      denoise=lambda params, x, sigma: stitching.stitched(window(params), plan)(x, sigma),
      shape=(*op.fine, len(stats.mean)),
      levels=levels,
      high=high,
      solve=_solver(config),
      start=c.start,
      prior=prior,
      guide=guide,
      guidance=options,
      select=resampling(config),
      spread=c.spread,
      members=c.unit[1],
      normalise=stats.normalise,
      restore=stats.restore,
      missing=f"config.sampling.guidance {dict(c.guidance)} goes by the prior's measured error, and there is no table "
      "of it: run `downscaling train` with the same --config and --workdir, which makes it, or "
      "use name=scaled.",
    )
  )


def _noise_levels(c, gain: gaussian_gain.Gain) -> tuple[np.ndarray, np.ndarray]:
  """With a condition and without; "guided" are by what the gain leaves open, and without a
  condition as "edm".
  """
  block = dict(c.levels)
  free = block | {"sigma_max": c.unconditional.sigma_max, "steps": c.unconditional.steps}
  if block["name"] != "guided":
    return schedules.levels(**block), schedules.levels(**free)
  low = gaussian_gain.levels(gain, block["steps"], block["sigma_max"], block["sigma_min"])
  return low, schedules.levels(**free | {"name": "edm"})


def resampling(config) -> Resampling | None:
  """Among the members of a unit that share a condition; None for strength 0."""
  c = config.sampling
  if not c.resample.strength:
    return None
  if c.solver.name not in conditional_sampler.SELECTING or (
    c.solver.name == "dpm_solver_pp_2m_sde" and not c.solver.eta > 0
  ):
    raise ValueError(
      f"config.sampling.resample.strength={c.resample.strength:g} with the solver "
      f"{dict(c.solver)}: copies of a member part by noise alone. Use "
      f"{' or '.join(conditional_sampler.SELECTING)} with eta > 0, or strength=0."
    )
  return Resampling(members=c.unit[1], **c.resample)


def watching_sampler(config, stats: statistics.Statistics, network: denoiser.Denoiser) -> Callable:
  """The sampler of one window, frames folded, with the steps of config.watch for its unconditional
  draws.
  """
  c = config.copy_and_resolve_references()
  c.sampling.unconditional.steps = c.watch.steps
  c.sampling.series.frames, c.sampling.series.overlap = c.grid.frames, 0
  return _draw(c, stats, network)


def _solver(config) -> Callable:
  """The solver with those of its block's keys that it takes: eta is the SDE's, churn is Heun's,
  noise of both.
  """
  block, given = dict(config.sampling.solver), schedule(config)
  known = {
    "euler_maruyama": lambda: functools.partial(solvers.euler_maruyama, schedule=given),
    "heun": lambda: functools.partial(
      solvers.heun, churn=block["churn"], noise_factor=block["noise"]
    ),
    "dpm_solver_pp_2m": lambda: solvers.dpm_solver_pp_2m,
    "dpm_solver_pp_2m_sde": lambda: functools.partial(
      solvers.dpm_solver_pp_2m_sde, eta=block["eta"], noise_factor=block["noise"]
    ),
  }
  return choose(known, block["name"], "config.sampling.solver.name")()


def coordinates(config) -> dict[str, tuple[np.ndarray, dict[str, str]]]:
  """Coordinates of the sample store: positions in the equation's own length unit."""
  op, length, found = operator(config), equation(config, "hfhr").length, series.times(config)
  for axis, fine, coarse in zip(("y", "x")[-len(op.fine) :], op.fine, op.coarse, strict=True):
    at = lambda n: np.arange(n) * (length / n)
    about = {"long_name": "position", "units": "1"}
    found[axis] = (at(fine), about)
    found[f"{axis}_coarse"] = (at(coarse), about | {"long_name": "position of the coarse points"})
  return found


def group(config) -> symmetry.Group:
  """The equation's symmetry group on the coarse grid."""
  return equation(config, "lflr").group()


# ---------------------------------------------------------------- the door


def check(config, mesh: jax.sharding.Mesh) -> None:
  """Refuses, before anything is written, what a later job would stumble over.

  Raises: ValueError naming the key, what came and what is needed.
  """
  try:
    door.sizes(config, mesh)
    series.check(config)
    _check_blocks(config)
  except (AttributeError, KeyError, TypeError) as error:
    where = traceback.extract_tb(error.__traceback__)[-1].filename
    ours = where in (__file__, door.__file__, series.__file__) or "ml_collections" in where
    if not (ours or "keyword argument" in str(error)):
      raise  # a defect of ours
    raise ValueError(f"the config has a key that nothing takes, or lacks one: {error}") from error


def _check_blocks(config) -> None:
  """Builds every object once and traces, without computing, what is drawn from it."""
  op, points, plan = operator(config), space(config), series.plan(config)
  for which in ("hfhr", "lflr"):
    rollouts.step_counts(equation(config, which).dt, config.data.burn_in, config.data.spacing)
  waves = [getattr(equation(config, which), "wave", None) for which in ("hfhr", "lflr")]
  if waves[0] != waves[1]:
    raise ValueError(
      f"config.fine.wave={waves[0]} and config.coarse.wave={waves[1]}: the maps between the two "
      "worlds keep the symmetries that both have, so they must be forced alike. Set both to the "
      "same wave."
    )
  door.debiasing(config, debias_setting(config), op.coarse)
  optimizer(config)
  ema_decays(config)
  training_plan(config)
  keep(config)
  sources(config)
  stats = statistics.Statistics(
    np.zeros(1, np.float32), np.ones(1, np.float32), np.ones((*points, 1), np.float32)
  )
  key = jax.eval_shape(lambda: random_keys.key(0, "plans"))
  network = denoising_network(config, stats)
  window = jax.ShapeDtypeStruct((1, *points, plan.frames), jnp.float32)
  variables = jax.eval_shape(network.init, key, window, jnp.ones(1))
  jax.eval_shape(lambda key: noise_levels(config)(key, 4), key)
  rows = 2 * config.sampling.unit[1]
  keys = jax.ShapeDtypeStruct((rows,), key.dtype)
  time = () if plan.series == 1 else (plan.series,)
  for y in (None, jax.ShapeDtypeStruct((rows, *time, *op.coarse, 1), jnp.float32)):
    jax.eval_shape(
      sampler(config, stats, network, stand_in_table(config)), keys, y, variables["params"]
    )
