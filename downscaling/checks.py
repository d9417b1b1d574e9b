"""Relations between keys that a later job would stumble over, refused before anything is written.

Single keys are checked where a block is made (blocks.py). Every check here raises ValueError naming
the key, what came, what is needed and what to type.
"""

import jax
import jax.numpy as jnp

from downscaling.assembly import debiasing, prior, samples, time_series, worlds
from downscaling.debias import bias_symmetry, maps
from downscaling.debias.equivariant import recipes
from downscaling.equations import rollouts
from downscaling.experiment import Experiment
from downscaling.runtime import mesh as meshes
from downscaling.runtime import random_keys


def check(experiment: Experiment, mesh: jax.sharding.Mesh) -> None:
  """Refuses an experiment of which some job would fail on this mesh.

  Raises: ValueError naming the key, what came and what is needed.
  """
  splits(experiment)
  prior.check_batch(experiment, mesh)
  points = experiment.debias.points
  meshes.check_divides(points, mesh.size, "a cloud", "debias.points")
  _sinkhorn_kernel(experiment, mesh)
  _series(experiment)
  _solvers(experiment)
  _debiasing(experiment)
  samples.sources(experiment)
  _programs(experiment)


def splits(experiment: Experiment) -> None:
  """Every use finds as many snapshots as it asks for."""
  e, snapshots = experiment, experiment.data.snapshots
  needs = (
    ("debias.points", e.debias.points, "hfhr", "train"),
    ("debias.points", e.debias.points, "lflr", "train"),
    ("debias.held_out", e.debias.held_out, "lflr", "test"),
    ("train.batch", e.train.batch, "hfhr", "train"),
    ("sampling.conditions", e.sampling.conditions, "hfhr", "test"),
    ("evaluate.reference", e.evaluate.reference, "hfhr", "reference"),
  )
  for key, need, which, split in needs:
    have = e.data.trajectories(which)[split] * snapshots
    if need > have:
      raise ValueError(
        f"config.{key} asks for {need} {which} {split} snapshots: {have} can be had, {snapshots} a "
        "trajectory. Ask for as many, or simulate more: "
        f"--config.data.{which}.{split}={-(-need // snapshots)}."
      )
  if e.sampling.conditions > e.debias.held_out:
    raise ValueError(
      f"config.sampling.conditions={e.sampling.conditions}, but only "
      f"config.debias.held_out={e.debias.held_out} fields are debiased: set "
      f"--config.sampling.conditions={e.debias.held_out} or fewer, or raise held_out."
    )


def _sinkhorn_kernel(experiment: Experiment, mesh: jax.sharding.Mesh) -> None:
  """The Pallas kernel runs on the devices of the mesh."""
  if experiment.debias.path != "pallas":
    return
  from downscaling.debias.entropic import pallas_kernel  # a third of a second, for few

  platform = meshes.platform(mesh)
  if not pallas_kernel.supported(platform):
    raise ValueError(
      f"config.debias.path='pallas' on {platform!r}, for which that kernel is not made: it "
      "lowers for a GPU by CUDA and for a TPU. Use --config.debias.path=auto here."
    )


def _series(experiment: Experiment) -> None:
  """Trajectories hold the windows and series that are asked for."""
  e, snapshots = experiment, experiment.data.snapshots
  whole = time_series.plan(e)
  for key, frames in (
    ("grid.frames", whole.frames),
    ("sampling.series.frames", whole.series),
  ):
    if frames > snapshots:
      raise ValueError(
        f"config.{key}={frames}, but a trajectory has config.data.snapshots={snapshots}: windows "
        f"and series lie within one trajectory. Set --config.{key}={snapshots} or fewer, or "
        f"--config.data.snapshots={frames} in another --workdir."
      )
  windows = e.data.hfhr.train * (snapshots - whole.frames + 1)
  if e.train.batch > windows:
    raise ValueError(
      f"config.train.batch={e.train.batch}, but the training split has {windows} windows of "
      f"{whole.frames} frames: set --config.train.batch={windows} or fewer, or simulate more "
      "trajectories."
    )
  if whole.series > 1:
    _stretches(e, whole.series)


def _stretches(experiment: Experiment, length: int) -> None:
  """Splits hold enough series of `length` frames."""
  e, snapshots = experiment, experiment.data.snapshots
  asked = length * e.sampling.conditions
  needs = (
    ("debias.held_out", e.debias.held_out, "lflr", "test"),
    ("sampling.conditions", asked, "hfhr", "test"),
    # Two series at least, to compare increments with.
    ("evaluate.reference", 2 * length, "hfhr", "reference"),
  )
  a_trajectory = snapshots // length
  for key, need, which, split in needs:
    there = time_series.rows(e, which, split).size
    if need > there:
      raise ValueError(
        f"config.{key} asks for {need} {which} {split} frames in series of {length}: {there} can "
        f"be had, {a_trajectory} series a trajectory of {snapshots} snapshots. Ask for fewer, or "
        f"simulate more: --config.data.{which}.{split}={-(-need // (a_trajectory * length))}."
      )
  if asked > e.debias.held_out:
    raise ValueError(
      f"config.sampling.conditions={e.sampling.conditions} series of {length} frames, but only "
      f"config.debias.held_out={e.debias.held_out} fields are debiased: set "
      f"--config.sampling.conditions={e.debias.held_out // length} or fewer, or "
      f"--config.debias.held_out={asked}."
    )


def _solvers(experiment: Experiment) -> None:
  """Both solvers can be made, step onto the snapshots, and are forced alike."""
  data = experiment.data
  fine, coarse = worlds.fine_solver(experiment), worlds.coarse_solver(experiment)
  for solver in (fine, coarse):
    rollouts.step_counts(solver.dt, data.burn_in, data.spacing)
  for key, value in fine.shared.items():
    if coarse.shared[key] != value:
      raise ValueError(
        f"config.fine.{key}={value} and config.coarse.{key}={coarse.shared[key]}: the maps between "
        "the two worlds keep the symmetries that both have, so they must be forced alike. Set both "
        f"to the same {key}."
      )


def _debiasing(experiment: Experiment) -> None:
  """The default map is fitted, its recipe can be read, and batches can be filled."""
  block = experiment.debias
  if block.map not in block.maps:
    raise ValueError(
      f"config.debias.map={block.map!r} is not among config.debias.maps={block.maps}: add it there."
    )
  setting = debiasing.setting(experiment, "")
  recipes.letters(setting.recipe, setting.quadratic)
  coarse = worlds.operator(experiment).coarse
  bias_symmetry.check_name(setting.subgroup, setting.group, coarse)
  if {*maps.QUANTILE} & {*block.maps} and block.points < block.quantiles:
    raise ValueError(
      f"config.debias.quantiles={block.quantiles} of config.debias.points={block.points} rows: "
      f"need as many rows. Set --config.debias.quantiles={block.points} or fewer."
    )
  half = block.points // 2
  if "minibatch" in block.maps and block.minibatch.batch > half:
    raise ValueError(
      f"config.debias.minibatch.batch={block.minibatch.batch}: batch must lie in 1 … {half}, half "
      f"of debias.points. Set --config.debias.minibatch.batch={half} or fewer."
    )


def _programs(experiment: Experiment) -> None:
  """Builds every object once, and traces what is drawn without computing it."""
  e, space = experiment, worlds.space(experiment)
  prior.optimizer(e)
  prior.plan(e)
  prior.keep(e)
  stats = prior.unit_statistics(e)
  network = prior.network(e, stats)
  key = jax.eval_shape(lambda: random_keys.key(0, "plans"))
  values = e.grid.frames * worlds.channels(e)
  window = jax.ShapeDtypeStruct((1, *space, values), jnp.float32)
  variables = jax.eval_shape(network.init, key, window, jnp.ones(1))
  jax.eval_shape(lambda key: prior.noise_levels(e)(key, 4), key)
  rows, length = 2 * e.sampling.unit[1], e.sampling.series.frames
  keys = jax.ShapeDtypeStruct((rows,), key.dtype)
  time = () if length == 1 else (length,)
  y = jax.ShapeDtypeStruct(
    (rows, *time, *worlds.operator(e).coarse, 1),
    jnp.float32,
  )
  draw = samples.sampler(e, stats, network, prior.stand_in_table(e))
  jax.eval_shape(draw, keys, None, variables["params"])
  jax.eval_shape(draw, keys, y, variables["params"])
