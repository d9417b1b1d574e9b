"""Ensembles that are larger than memory: members [K, M, *space], read a block of conditions at a
time.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

BLOCK = 2**22  # values of a block, as of distances.chunks


class Ensemble:
  """Members of K conditions, which a function reads.

  read: row numbers [k], ascending -> members [k, M, *space]. shape: (K, M, *space).
  An array becomes one by `of`. Slices and row numbers give arrays.
  """

  def __init__(
    self,
    read: Callable[[np.ndarray], np.ndarray],
    shape: tuple[int, ...],
  ):
    self._read = read
    self.shape = tuple(map(int, shape))

  @classmethod
  def of(cls, members: Any) -> "Ensemble":
    """members: an Ensemble, or an array [K, M, *space]."""
    if isinstance(members, Ensemble):
      return members
    array = np.asarray(members)
    return cls(lambda rows: array[rows], array.shape)

  @property
  def ndim(self) -> int:
    """Axes, those of conditions and members included."""
    return len(self.shape)

  @property
  def size(self) -> int:
    """Values of all members."""
    return math.prod(self.shape)

  def __len__(self) -> int:
    return self.shape[0]

  def __getitem__(self, rows) -> np.ndarray:
    """One condition's members [M, *space], or those of a slice or of row numbers."""
    if isinstance(rows, slice):
      return self._read(np.arange(len(self))[rows])
    numbers = np.asarray(rows)
    if numbers.ndim == 0:
      if not -len(self) <= numbers < len(self):
        raise IndexError(f"condition {numbers} of {len(self)}")
      return self._read(np.arange(len(self))[numbers : numbers + 1 or None])[0]
    return self._read(np.arange(len(self))[numbers])

  def __iter__(self) -> Iterator[np.ndarray]:
    for row in range(len(self)):
      yield self[row]

  def only(self, conditions: np.ndarray) -> "Ensemble":
    """Those conditions alone, by row number [k], ascending."""
    shape = (len(conditions), *self.shape[1:])
    return Ensemble(lambda rows: self._read(conditions[rows]), shape)

  def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
    """(which conditions, their members) block by block."""
    step = max(
      1,
      BLOCK // max(1, math.prod(self.shape[1:])),
    )
    for first in range(0, len(self), step):
      place = slice(first, min(first + step, len(self)))
      yield place, self[place]


def frames_as_rows(series: Ensemble) -> Ensemble:
  """Series [K, M, L, *space] as [K·L, M, *space], the frames of a condition after each other."""
  conditions, members, length, *space = series.shape

  def read(rows: np.ndarray) -> np.ndarray:
    condition, frame = np.divmod(rows, length)
    needed, place = np.unique(condition, return_inverse=True)
    return series[needed][place, :, frame]

  return Ensemble(read, (conditions * length, members, *space))
