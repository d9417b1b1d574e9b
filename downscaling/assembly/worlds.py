"""The two worlds of an experiment: grids, C′, solvers, data sets and symmetries."""

import functools
import pathlib

import jax
import numpy as np

from downscaling.assembly import time_series
from downscaling.datasets import generate, simulated
from downscaling.equations import rollouts
from downscaling.experiment import Experiment
from downscaling.fields import operators, symmetry
from downscaling.runtime import mesh as meshes

OPERATORS = {"strided": operators.Strided, "block_mean": operators.BlockMean}


def space(experiment: Experiment) -> tuple[int, ...]:
  """Fine points along each axis."""
  return (experiment.grid.points,) * experiment.physics.RANK


def operator(experiment: Experiment) -> operators.Operator:
  """C′ of experiment.grid."""
  kind = OPERATORS[experiment.grid.operator]
  return kind.on(space(experiment), experiment.grid.factor)


def dataset(experiment: Experiment, workdir: pathlib.Path, which: str) -> simulated.FieldsBuilder:
  """The data set of "hfhr" or "lflr"."""
  grid = space(experiment) if which == "hfhr" else operator(experiment).coarse
  folder = experiment.folder(workdir, "data")
  return simulated.make(experiment.data.name, which, folder, grid)


def equation(experiment: Experiment, which: str) -> rollouts.Solver:
  """The solver of "hfhr" or "lflr"."""
  room = experiment.physics
  # The flow's box is (2π)², a constant of its class.
  box = {"length": experiment.grid.length} if experiment.data.name == "ks" else {}
  if which == "hfhr":
    return room.Fine(points=experiment.grid.points, **box, **experiment.fine)
  return room.Coarse(points=operator(experiment).coarse[0], **box, **experiment.coarse)


def precision(experiment: Experiment, which: str) -> str:
  """In which the solver of "hfhr" or "lflr" computes."""
  return getattr(equation(experiment, which), "dtype", "float64")


def simulating(experiment: Experiment, which: str, mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
  """This process's devices for that solver.

  They are those of the mesh, or the host's CPU for float64 beside a TPU.
  """
  exact = precision(experiment, which) == "float64"
  return meshes.exact(mesh) if exact else meshes.local(mesh)


def generation(
  experiment: Experiment, workdir: pathlib.Path, which: str, sharding
) -> generate.Plan:
  """What to simulate of "hfhr" or "lflr"."""
  data, solver = experiment.data, equation(experiment, which)
  rollout = functools.partial(
    rollouts.rollout,
    solver,
    seed=experiment.seed,
    sharding=sharding,
    burn_in=data.burn_in,
    spacing=data.spacing,
    snapshots=data.snapshots,
  )
  return generate.Plan(
    builder=dataset(experiment, workdir, which),
    trajectories=data.trajectories(which),
    shard=data.shard,
    times=data.burn_in + data.spacing * np.arange(data.snapshots),
    rollout=lambda ids: rollout(ids)[..., None],
    check=functools.partial(rollouts.check, solver),
  )


def group(experiment: Experiment) -> symmetry.Group:
  """The equation's symmetry group on the coarse grid."""
  return equation(experiment, "lflr").group()


def moves(experiment: Experiment) -> symmetry.Moves:
  """The symmetries of the fine equation's grid, on [..., *space]."""
  solver = equation(experiment, "hfhr")
  return symmetry.Moves(solver.symmetries, solver.move)


def coarse_moves(experiment: Experiment) -> symmetry.Moves:
  """The symmetries of the coarse grid, on [..., *coarse]: `group` without its table."""
  return symmetry.Moves(len(group(experiment)), equation(experiment, "hfhr").move)


def coordinates(experiment: Experiment) -> dict[str, tuple[np.ndarray, dict[str, str]]]:
  """Coordinates of the sample store: positions in the equation's own length unit."""
  op = operator(experiment)
  length = equation(experiment, "hfhr").length
  about = {"long_name": "position", "units": "1"}
  coarse_about = about | {"long_name": "position of the coarse points"}
  found = time_series.times(experiment)
  names = ("y", "x")[-len(op.fine) :]
  for axis, fine, coarse in zip(names, op.fine, op.coarse, strict=True):
    found[axis] = (np.arange(fine) * (length / fine), about)
    found[f"{axis}_coarse"] = (np.arange(coarse) * (length / coarse), coarse_about)
  return found
