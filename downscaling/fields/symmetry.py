"""A finite group acting on gridded fields, as signed permutations of the grid points.

Shifts, reflections and rotations of a periodic grid move values and may flip their sign; nothing
else is needed for the equations of this house, and a table of indices works for any of them.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Group(NamedTuple):
  """(g·y)_i = sign[g] · y[index[g, i]] on flattened fields.

  index: [G, n] int, the source point of every point; sign: [G], +1 or −1. Element 0 is the
    identity.
  """

  index: np.ndarray
  sign: np.ndarray

  def __len__(self) -> int:
    return len(self.sign)

  def act(self, element: int | jax.Array, y: jax.Array) -> jax.Array:
    """g·y for one element; y is [..., n]."""
    return jnp.asarray(self.sign, y.dtype)[element] * jnp.take(
      y, jnp.asarray(self.index)[element], axis=-1
    )

  def inverse(self) -> "Group":
    """The group with every element replaced by its inverse."""
    return Group(np.argsort(self.index, axis=1), self.sign)

  def over_channels(self, channels: int, last: bool = False) -> "Group":
    """The group on fields of several channels, flattened channel by channel, [..., C·n].

    It moves the points of all channels alike. last: flattened point by point, [..., n·C].
    """
    if channels == 1:
      return self
    if last:
      index = self.index[..., None] * channels + np.arange(channels)
      return Group(index.reshape(len(self), -1), self.sign)
    points = self.index.shape[1]
    shifted = [self.index + points * channel for channel in range(channels)]
    return Group(np.concatenate(shifted, axis=1), self.sign)

  def average_covariance(self, cov: np.ndarray) -> np.ndarray:
    """Mean over the group of g Cov gᵀ, [n, n]: the covariance of a field whose law the group leaves
    alone.
    """
    total = np.zeros_like(cov)
    for index in self.index:  # signs cancel in pairs
      total += cov[np.ix_(index, index)]
    return total / len(self)


class Moves(NamedTuple):
  """A finite group by what it does, for grids whose table would be large.

  count: of elements. move: (x, element 0 … count − 1, which may be traced) -> g·x; who makes it
  says what x is. On a grid whose last axis has N points, elements i·N … i·N + N − 1 differ by
  shifts along that axis, all N of them.
  """

  count: int
  move: Callable


def trivial(n: int) -> Group:
  """The group of the identity alone, on n points."""
  return Group(np.arange(n)[None], np.ones(1))
