"""What the house asks of an equation, as types.

An equation is a module of this room (ks.py, kolmogorov.py) that has what `Equation` lists. Its
solvers are frozen dataclasses, so that they are hashable and can be static under jit. Nothing else
of an equation is read anywhere.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from downscaling.fields.domain import Domain
from downscaling.fields.quadratic import Quadratic
from downscaling.fields.symmetry import Group


@runtime_checkable
class Solver(Protocol):
  """What a rollout asks of a solver.

  dt: time step, in time units of the equation. stream: number of its random stream; solvers of
  different worlds have different ones, so that equal ids give unrelated initial conditions: the
  worlds are unpaired. block: of the config that its dt stands in, for messages. bound: no
  snapshot's rms is larger, or it is no solution; infinite where none is known. dtype: "float32" or
  "float64", in which it computes.
  """

  @property
  def dt(self) -> float: ...

  @property
  def stream(self) -> int: ...

  @property
  def block(self) -> str: ...

  @property
  def bound(self) -> float: ...

  @property
  def dtype(self) -> str: ...

  def start(self, key: jax.Array) -> jax.Array:
    """A random initial state, of any shape."""
    ...

  def advance(self, u: jax.Array, steps: int, /) -> jax.Array:
    """The state after `steps` steps of dt."""
    ...

  def output(self, u: jax.Array, /) -> jax.Array:
    """What is kept of a state, [*space]; [*space, C] of a domain with several channels."""
    ...


@runtime_checkable
class WorldSolver(Solver, Protocol):
  """What both solvers of an equation have besides.

  domain: of the fields that `output` keeps. length: of the box, in the equation's own unit. shared:
  constants by config key that the fine and the coarse solver must have alike, as the symmetries
  that maps keep hang on them.
  """

  @property
  def points(self) -> int: ...

  @property
  def length(self) -> float: ...

  @property
  def domain(self) -> Domain: ...

  @property
  def shared(self) -> Mapping[str, Any]: ...


@runtime_checkable
class FineSolver(WorldSolver, Protocol):
  """The true world.

  symmetries: number of elements of the group on the fine grid.
  """

  @property
  def symmetries(self) -> int: ...

  def move(self, u: jax.Array, element: int | jax.Array, /) -> jax.Array:
    """g·u for one element by index, which may be traced; u is [..., *space] on any grid that the
    symmetries keep.
    """
    ...

  def static(self) -> Mapping[str, np.ndarray]:
    """Known fields of the box that a network may see, by name, [*space] float32; {} for none."""
    ...


@runtime_checkable
class CoarseSolver(WorldSolver, Protocol):
  """The biased world, on few points."""

  def group(self) -> Group:
    """The symmetries that the output's grid keeps, as a table; elements in the order of
    FineSolver.move.
    """
    ...


@runtime_checkable
class Equation(Protocol):
  """A module of an equation.

  NAME: as config.data.name has it. RANK: number of space axes. SYMBOL: of the field, for reports.
  Fine, Coarse: make the solvers; keywords are the config's keys. quadratic: the quadratic term on a
  grid, or None where the equation has none.
  """

  NAME: str
  RANK: int
  SYMBOL: str

  @property
  def Fine(self) -> Callable[..., FineSolver]: ...

  @property
  def Coarse(self) -> Callable[..., CoarseSolver]: ...

  @property
  def quadratic(self) -> Callable[[tuple[int, ...]], Quadratic] | None: ...
