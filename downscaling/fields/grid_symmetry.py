"""Symmetries of a grid told as data: shifts, reflections and signs, a few numbers each.

`symmetry.Group` holds a table of indices, which is large on a fine grid. Here a group is told by
its generators, so that a domain can carry it, write it to JSON, and pass it on to a coarser grid.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np

LARGEST_TABLE = 2**28  # bytes of the index table that `table` makes at most


@dataclasses.dataclass(frozen=True)
class Generator:
  """(g·y)[i] = sign · y[±i + shift], axis by axis, modulo the points of a periodic axis.

  flips: per axis, whether the axis is reversed (−i in place of i). shifts: per axis, in points.
  sign: +1 or −1, for all channels alike.
  """

  flips: tuple[bool, ...]
  shifts: tuple[int, ...]
  sign: int = 1

  def __post_init__(self):
    if len(self.flips) != len(self.shifts) or self.sign not in (1, -1):
      raise ValueError(
        f"a symmetry with flips {self.flips}, shifts {self.shifts} and sign {self.sign}: need one "
        "flip and one shift an axis, and a sign of 1 or -1."
      )

  def reduced(self, shape: Sequence[int]) -> "Generator":
    """The same with every shift in 0 … points − 1."""
    shifts = tuple(int(s) % n for s, n in zip(self.shifts, shape, strict=True))
    return Generator(tuple(map(bool, self.flips)), shifts, int(self.sign))

  def after(self, other: "Generator", shape: Sequence[int]) -> "Generator":
    """self·(other·y) as one element."""
    flips = tuple(a != b for a, b in zip(self.flips, other.flips, strict=True))
    moved = [
      -s if flip else s for flip, s in zip(other.flips, self.shifts, strict=True)
    ]
    shifts = tuple(m + s for m, s in zip(moved, other.shifts, strict=True))
    return Generator(flips, shifts, self.sign * other.sign).reduced(shape)

  def coarsened(self, factors: Sequence[int], cells: bool) -> "Generator | None":
    """The same on every factors[a]-th point, or on cells of as many points; None if it moves them
    off that grid.
    """
    shifts = []
    for flip, shift, factor in zip(self.flips, self.shifts, factors, strict=True):
      # A cell j holds the points j·f … j·f + f − 1; reversed, its first point comes from its last.
      whole, rest = divmod(shift - (factor - 1 if flip and cells else 0), factor)
      if rest:
        return None
      shifts.append(whole)
    return Generator(self.flips, tuple(shifts), self.sign)


def identity(rank: int) -> Generator:
  """The element that moves nothing."""
  return Generator((False,) * rank, (0,) * rank, 1)


def elements(generators: Iterable[Generator], shape: Sequence[int]) -> list[Generator]:
  """All elements of the group that the generators make on a grid, the identity first."""
  made = [g.reduced(shape) for g in generators]
  found = [identity(len(shape))]
  known = set(found)
  for element in found:  # grows while it is walked
    for generator in made:
      new = generator.after(element, shape)
      if new not in known:
        known.add(new)
        found.append(new)
  return found


def generators_of(
  group: Iterable[Generator], shape: Sequence[int]
) -> tuple[Generator, ...]:
  """A few elements of a group that make all of it."""
  chosen: list[Generator] = []
  known = {identity(len(shape))}
  for element in sorted(group, key=_simplicity):
    if element not in known:
      chosen.append(element)
      known = set(elements(chosen, shape))
  return tuple(chosen)


def _simplicity(element: Generator):
  return sum(element.flips), element.sign < 0, sum(element.shifts), element.shifts


def coarsened(
  generators: Sequence[Generator],
  shape: Sequence[int],
  factors: Sequence[int],
  cells: bool,
) -> tuple[Generator, ...]:
  """Generators of what a coarser grid keeps of a group.

  cells: the coarse points are means over cells, which a reflection moves otherwise than the points
    that a strided grid keeps.
  """
  coarse = tuple(n // f for n, f in zip(shape, factors, strict=True))
  kept = (g.coarsened(factors, cells) for g in elements(generators, shape))
  return generators_of({g.reduced(coarse) for g in kept if g is not None}, coarse)


def table(
  generators: Sequence[Generator], shape: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
  """(index [G, n], sign [G]) as symmetry.Group has them, the identity first.

  Raises ValueError where the table would be larger than LARGEST_TABLE bytes.
  """
  group, points = elements(generators, shape), math.prod(shape)
  if 8 * len(group) * points > LARGEST_TABLE:
    raise ValueError(
      f"{len(group)} symmetries of {points} points make a table of "
      f"{8 * len(group) * points / 1e9:.1f} GB: use the domain of the coarse grid, or the "
      "equation's `move`, which needs no table."
    )
  place = np.arange(points).reshape(shape)
  rows = []
  for g in group:
    source = [
      ((-np.arange(n) if flip else np.arange(n)) + shift) % n
      for flip, shift, n in zip(g.flips, g.shifts, shape, strict=True)
    ]
    rows.append(place[np.ix_(*source)].ravel())
  return np.stack(rows), np.array([float(g.sign) for g in group])


def shift(
  axis: int,
  rank: int,
  points: int = 1,
  sign: int = 1,
) -> Generator:
  """A shift along one of `rank` axes, by so many points."""
  shifts = tuple(points if a == axis else 0 for a in range(rank))
  return Generator((False,) * rank, shifts, sign)
