"""The two worlds of an experiment: grids, C′, solvers, data sets and symmetries."""

import dataclasses
import functools
import pathlib

import jax
import numpy as np

from downscaling.assembly import time_series
from downscaling.datasets import generate, simulated
from downscaling.equations import protocol, rollouts
from downscaling.experiment import Experiment
from downscaling.fields import grid_symmetry, operators, symmetry
from downscaling.fields.domain import Domain
from downscaling.runtime import mesh as meshes

OPERATORS = {"strided": operators.Strided, "block_mean": operators.BlockMean}


def space(experiment: Experiment) -> tuple[int, ...]:
  """Fine points along each axis."""
  return domain(experiment).shape


def channels(experiment: Experiment) -> int:
  """Variables of a field."""
  return len(domain(experiment).channels)


def operator(experiment: Experiment) -> operators.Operator:
  """C′ of experiment.grid."""
  kind = OPERATORS[experiment.grid.operator]
  return kind.on(space(experiment), experiment.grid.factor)


def dataset(
  experiment: Experiment, workdir: pathlib.Path, which: str
) -> simulated.FieldsBuilder:
  """The data set of "hfhr" or "lflr"."""
  grid = space(experiment) if which == "hfhr" else operator(experiment).coarse
  folder = experiment.folder(workdir, "data")
  return simulated.make(experiment.data.name, which, folder, grid, channels(experiment))


def fine_solver(experiment: Experiment) -> protocol.FineSolver:
  """The solver of the true world."""
  return experiment.physics.Fine(
    points=experiment.grid.points, **_box(experiment), **experiment.fine
  )


def coarse_solver(experiment: Experiment) -> protocol.CoarseSolver:
  """The solver of the biased world."""
  points = experiment.grid.points // operator(experiment).factors[0]
  return experiment.physics.Coarse(
    points=points, **_box(experiment), **experiment.coarse
  )


def _box(experiment: Experiment) -> dict[str, float]:
  """The length of the box, of solvers that take one; the flow's is (2π)², a constant."""
  taken = {field.name for field in dataclasses.fields(experiment.physics.Fine)}
  return {"length": experiment.grid.length} if "length" in taken else {}


def equation(experiment: Experiment, which: str) -> protocol.WorldSolver:
  """The solver of "hfhr" or "lflr"."""
  return fine_solver(experiment) if which == "hfhr" else coarse_solver(experiment)


def precision(experiment: Experiment, which: str) -> str:
  """In which the solver of "hfhr" or "lflr" computes."""
  return equation(experiment, which).dtype


def simulating(
  experiment: Experiment, which: str, mesh: jax.sharding.Mesh
) -> jax.sharding.Mesh:
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
    rollout=lambda ids: _with_channels(rollout(ids), solver),
    check=functools.partial(rollouts.check, solver),
  )


def _with_channels(snapshots: jax.Array, solver: protocol.WorldSolver) -> jax.Array:
  """[T, S, *space, C]; solvers of one channel leave its axis out."""
  return snapshots[..., None] if len(solver.domain.channels) == 1 else snapshots


def group(experiment: Experiment) -> symmetry.Group:
  """The equation's symmetry group on the coarse grid."""
  return coarse_solver(experiment).group()


def moves(experiment: Experiment) -> symmetry.Moves:
  """The symmetries of the fine equation's grid, on [..., *space]."""
  solver = fine_solver(experiment)
  return symmetry.Moves(solver.symmetries, solver.move)


def shifts_freely(experiment: Experiment) -> bool:
  """Are all shifts along the last axis among the symmetries, so that modes do not correlate?"""
  along_last = grid_symmetry.shift(
    axis=domain(experiment).rank - 1, rank=domain(experiment).rank
  )
  return along_last in domain(experiment).symmetries


def coarse_moves(experiment: Experiment) -> symmetry.Moves:
  """The symmetries of the coarse grid, on [..., *coarse]: `group` without its table."""
  return symmetry.Moves(len(group(experiment)), fine_solver(experiment).move)


def coordinates(experiment: Experiment) -> dict[str, tuple[np.ndarray, dict[str, str]]]:
  """Coordinates of the sample store: positions in the equation's own length unit."""
  fine, coarse = domain(experiment), coarse_domain(experiment)
  of_coarse = coarse.coords("_coarse", " of the coarse points")
  return time_series.times(experiment) | fine.coords() | of_coarse


def domain(experiment: Experiment) -> Domain:
  """Axes, channels and symmetries of the fine fields."""
  return fine_solver(experiment).domain


def coarse_domain(experiment: Experiment) -> Domain:
  """The same of the coarse fields."""
  return domain(experiment).coarsen(operator(experiment))
