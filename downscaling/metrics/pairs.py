"""Sums over pairs of rows under many weightings at once: covariance products and kernel means of
bootstrap replicates.

With centred rows x_i and weights w that sum to n, the second moment M_w = Σ_i w_i x_i x_iᵀ / n
satisfies

    ⟨M_w, M_v⟩ = Σ_ij w_i v_j (x_i·x_j)² / n²,

and a kernel mean is Σ_ij w_i v_j k(x_i, x_j) / n². One pass over tiles of pairs therefore serves
all replicates. No array of all pairs is ever made, and none of [D, D].
"""

import functools
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np

from downscaling.metrics import distances

TILE = 2048


@functools.partial(jax.jit, static_argnames="within")
def _tile(x, y, left, right, scale, within):
  """Σ_ij left_bi right_bj f(x_i, y_j), [B], for f the squared product and the kernel; right is [1,
  J] for all ones.
  """
  inner = jnp.matmul(x, y.T, precision="highest")
  apart = (
    jnp.maximum(
      (x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * inner,
      0,
    )
    / scale
  )
  kernel = functools.reduce(
    operator.add, [a**2 / (a**2 + apart) for a in distances.MMD_LENGTHS]
  )
  square = (inner / scale) ** 2
  # All weights of y are alike: a sum over y first, then the weights of x.
  if not within:
    return tuple(left @ (f @ right[0]) for f in (square, kernel))
  return tuple((left * (right @ f.T)).sum(axis=1) for f in (square, kernel))


def forms(
  x: np.ndarray, weights: np.ndarray, y: np.ndarray | None, scale: float
) -> tuple[np.ndarray, np.ndarray]:
  """(⟨M_w, M⟩/scale², mean kernel), each [B] in float64, of weighted rows x with themselves or with
  all rows of y.

  Args:
    x: [S, D], centred. weights: [B, S]. y: [R, D], centred likewise and weighted evenly; None for x
      itself.
    scale: of squared distances, see distances.mmd.
  """
  within = y is None
  other = x if within else y
  even = np.ones((1, len(other)), np.float32)
  total = np.zeros((2, len(weights)))
  for first in range(0, len(x), TILE):
    rows, left = _padded(x, weights, first)
    for second in range(first if within else 0, len(other), TILE):
      columns, right = _padded(other, weights if within else even, second)
      twice = 2 if within and second > first else 1
      found = _tile(rows, columns, left, right, np.float32(scale), within)
      total += twice * np.asarray(found, np.float64)
  counts = weights.sum(axis=1, dtype=np.float64)
  square, kernel = total / (counts * (counts if within else len(other)))
  return square, kernel


def along(
  x: np.ndarray, weights: np.ndarray, directions: np.ndarray, scale: float
) -> np.ndarray:
  """mᵀ M_w m / scale² of every direction m [B, D] and weighting [B, S], or one weighting [1, S] for
  all; [B].

  With it second moments become covariances: ⟨M_w − m mᵀ, M_v − m′m′ᵀ⟩ needs no more than these.
  """
  counts = weights.sum(axis=1, dtype=np.float64)
  total = np.zeros(len(directions))
  for first, block in distances.chunks(x):
    square = (block @ directions.T) ** 2
    part = weights[:, first : first + len(block)]
    total += (part * square.T).sum(axis=1)
  return total / (counts * scale**2)


def _padded(
  x: np.ndarray, weights: np.ndarray, first: int
) -> tuple[np.ndarray, np.ndarray]:
  """A tile of rows and of their weights; padding has weight 0, so that one program serves every
  tile.
  """
  block = np.asarray(x[first : first + TILE], np.float32)
  part = weights[:, first : first + TILE]
  empty = min(TILE, _rounded(len(x))) - len(block)
  return np.pad(block, ((0, empty), (0, 0))), np.pad(part, ((0, 0), (0, empty)))


def _rounded(count: int) -> int:
  """The next power of two: few different shapes, few compilations."""
  return 1 << max(0, math.ceil(math.log2(count)))
