"""The door: sizes of a config that a later job would stumble over, refused before anything is
written.

Every check raises ValueError naming the key, what came, what is needed and what to type.
"""

import functools

import jax

from downscaling.debias import bias_symmetry, maps
from downscaling.debias.equivariant import recipes
from downscaling.diffusion import error_table, schedules
from downscaling.runtime import mesh as meshes
from downscaling.sampling import solvers

# of the mean cost; measured on KS, 2000 rows: an amplitude of .85 at .03, .52 at .1, .20 at .3, .06
# at 1
EPSILON = 0.3


def sizes(config, mesh: jax.sharding.Mesh) -> None:
  """Counts that must be positive, fit each other, or divide over the devices."""
  c, d = config, config.data
  for key in (
    "data.snapshots",
    "data.shard",
    "train.total_steps",
    "sampling.members",
    "sampling.unconditional.fields",
  ):
    if functools.reduce(getattr, key.split("."), c) < 1:
      raise ValueError(f"config.{key} must be at least 1: set --config.{key}=1 or more.")
  if not (c.debias.epsilon > 0 and c.debias.threshold > 0 and c.debias.max_iterations >= 1):
    raise ValueError(
      f"config.debias: epsilon={c.debias.epsilon:g} (a share of the mean cost) and "
      f"threshold={c.debias.threshold:g} must be > 0, max_iterations={c.debias.max_iterations} at "
      "least 1. E.g. --config.debias.epsilon=0.001"
    )
  needs = (
    *(("debias.points", c.debias.points, which, "train", 2) for which in ("hfhr", "lflr")),
    ("debias.held_out", c.debias.held_out, "lflr", "test", 2),
    ("train.batch", c.train.batch, "hfhr", "train", 1),
    ("sampling.conditions", c.sampling.conditions, "hfhr", "test", 1),
    ("evaluate.reference", c.evaluate.reference, "hfhr", "reference", 2),
  )
  for key, need, which, split, least in needs:
    have = d[which].get(split, 0) * d.snapshots
    if not least <= need <= have:
      raise ValueError(
        f"config.{key} asks for {need} {which} {split} snapshots: {least} to {have} can be had, "
        f"{d.snapshots} a trajectory. Ask for as many, or simulate more: "
        f"--config.data.{which}.{split}={-(-need // d.snapshots)}."
      )
  if c.sampling.conditions > c.debias.held_out:
    raise ValueError(
      f"config.sampling.conditions={c.sampling.conditions}, but only "
      f"config.debias.held_out={c.debias.held_out} fields are debiased: set "
      f"--config.sampling.conditions={c.debias.held_out} or fewer, or raise held_out."
    )
  if c.evaluate.draws < 40:
    raise ValueError(
      f"config.evaluate.draws={c.evaluate.draws}: the ends of a 95 % interval need 40 replicates "
      "at least. Set --config.evaluate.draws=200, or 40 for a quick look."
    )
  for block, least in (
    (c.plan, 0),
    (c.profile, 0),
    (c.memory, 0),
    (c.supervision, 0),
    (c.watch, 1),
  ):
    if bad := [key for key, value in block.items() if value < least]:
      raise ValueError(f"config: {bad[0]}={block[bad[0]]} must be at least {least}.")
  for key, value in (
    ("plan.log_every", c.plan.log_every),
    ("memory.microbatches", c.memory.microbatches),
  ):
    if value < 1:
      raise ValueError(f"config.{key}={value} must be at least 1.")
  batch(config, mesh)
  meshes.check_divides(c.debias.points, mesh.size, "a cloud", "debias.points")
  if c.debias.path == "pallas":
    from downscaling.debias.entropic import pallas_kernel  # a third of a second, for few

    if not pallas_kernel.supported(platform := meshes.platform(mesh)):
      raise ValueError(
        f"config.debias.path='pallas' on {platform!r}, for which that kernel is not made: it "
        "lowers for a GPU by CUDA and for a TPU. Use --config.debias.path=auto here."
      )
  if not 0 <= c.sampling.max_failed < 1:
    raise ValueError(
      f"config.sampling.max_failed={c.sampling.max_failed:g}: need the share of members that may "
      "fail, >= 0 and below 1, e.g. 0.05; 0 refuses the first."
    )
  if not isinstance(c.grid.factor, int):
    raise ValueError(
      f"config.grid.factor={c.grid.factor}: need one whole number for all axes, e.g. 8: the coarse "
      "solvers have as many points along each."
    )
  if len(c.sampling.unit) != 2 or min(c.sampling.unit) < 1:
    raise ValueError(
      f"config.sampling.unit={c.sampling.unit}: need conditions × members, e.g. (64,4), each at "
      "least 1."
    )


def debiasing(config, setting: maps.Setting, space: tuple[int, ...]) -> None:
  """Maps that are known, a recipe that can be read, batches that the rows can fill."""
  c = config.debias
  if strangers := [name for name in c.maps if name not in maps.FITS]:
    raise ValueError(
      f"config.debias.maps has {strangers[0]!r}, which is unknown; use some of {sorted(maps.FITS)}."
    )
  if c.map not in c.maps:
    raise ValueError(
      f"config.debias.map={c.map!r} is not among config.debias.maps={tuple(c.maps)}: add it there."
    )
  recipes.letters(setting.recipe, setting.quadratic)
  bias_symmetry.check_name(setting.subgroup, setting.group, space)
  if c.epsilon >= EPSILON:
    raise ValueError(
      f"config.debias.epsilon={c.epsilon:g} of the mean cost is too large to carry information: at "
      f"0.3 a map keeps a fifth of the fields' amplitude, at 1 nothing. Use less than {EPSILON:g}, "
      "e.g. --config.debias.epsilon=0.001."
    )
  if not c.outlier > 0:
    raise ValueError(
      f"config.debias.outlier={c.outlier:g}: rows beyond so many robust standard deviations are "
      "refused; need more than 0, e.g. 100."
    )
  if min(c.minibatch.batch, c.minibatch.passes) <= 0 or (
    "minibatch" in c.maps and c.minibatch.batch > c.points // 2
  ):
    raise ValueError(
      f"config.debias.minibatch={dict(c.minibatch)}: batch must lie in 1 … {c.points // 2} (half "
      "of debias.points), passes above 0."
    )


def batch(config, mesh: jax.sharding.Mesh) -> None:
  """A training batch divides over devices and microbatches."""
  parts, one = mesh.size * config.memory.microbatches, config.memory.microbatches == 1
  what = "a batch" if one else f"a batch in {config.memory.microbatches} microbatches"
  meshes.check_divides(config.train.batch, parts, what, "train.batch")


def noise_levels(
  config, schedule: schedules.Schedule, table: error_table.ErrorTable | None
) -> None:
  """Refuses noise levels that the prior was not trained on, or that its table of errors does not
  cover.

  table: of the guidance of conditional draws, if it has one.
  """
  c = config.sampling
  churn = c.solver.churn if c.solver.name == "heun" else 0.0
  draws = (
    ("config.sampling.levels", c.levels.sigma_max, c.levels.steps),
    ("config.sampling.unconditional", c.unconditional.sigma_max, c.unconditional.steps),
  )
  for key, sigma_max, steps in draws:
    met = [c.levels.sigma_min, sigma_max * (1 + solvers.churned(churn, max(steps, 1)))]
    schedule.check_levels(met, key)
    if table is not None and key == "config.sampling.levels":
      error_table.check_covers(table, met, key)
