"""Covariances averaged over a symmetry group, of many weightings of one set of rows.

An average over all shifts of the last axis couples only waves of one k along it (symmetric.py).
Each k has a block [q, q], q the waves of the other axis, to which a row adds the mean over the
group of ẑ ẑᴴ. Blocks of replicates are sums of that under their weights; one k is in memory at a
time.
"""

import math
from collections.abc import Iterator

import jax
import numpy as np

from downscaling.fields.symmetry import Moves
from downscaling.metrics import distances

_VALUES = 2**23  # complex values of products held at a time


def waves(x: np.ndarray, moves: Moves, power: int = 1) -> np.ndarray:
  """[S, E, q, N//2 + 1] complex64: the DFT over D values divided by D, of each row moved by E
  elements of the group.

  x: [S, *space]. Elements that differ by a shift of the last axis count once. power: 2 for waves of
  squares, taken after the move because a square does not change its sign with the field.
  """
  space, n, axes = x.shape[1:], x.shape[-1], tuple(range(1, x.ndim))
  move = jax.jit(moves.move)
  lots = range(0, moves.count, n)
  out = np.empty(
    (len(x), len(lots), math.prod(space) // n, n // 2 + 1),
    np.complex64,
  )
  for first, block in distances.chunks(x):
    for number, element in enumerate(lots):
      moved = np.asarray(move(block.astype(np.float32), element))
      found = np.fft.rfftn(moved**power, axes=axes) / math.prod(space)
      out[first : first + len(block), number] = found.reshape(
        len(block), -1, n // 2 + 1
      )
  return out


def blocks(
  z: np.ndarray,
  weights: np.ndarray,
  mean: str,
) -> Iterator[np.ndarray]:
  """For every k, the covariance blocks [B, q, q] complex of all weightings [B, S] of `waves` z.

  mean: what is removed of each weighting. "point": the mean of every point, as a covariance does.
  "group": the mean that is left after an average over the group, which only k = 0 has.
  """
  for k in range(z.shape[-1]):
    yield _block(z[..., k], weights, mean == "point", mean == "group" and k == 0)


def _block(
  at: np.ndarray, weights: np.ndarray, by_point: bool, by_group: bool
) -> np.ndarray:
  """The block of one k, [B, q, q]; at: [S, E, q]. Which mean is removed, if any."""
  rows, lots, q = at.shape
  counts = weights.sum(axis=1)[:, None]
  share = (weights / counts).astype(np.float32)
  at = np.ascontiguousarray(at)
  columns, opposite = at.transpose(0, 2, 1), at.conj()
  out = np.empty((len(weights), q, q), np.complex64)
  step = max(1, _VALUES // max(1, rows * q))
  for first in range(0, q, step):
    # A row's own block. Products of matrices, as einsum makes no use of BLAS here.
    part = (columns[:, first : first + step] @ opposite) / np.float32(lots)
    summed = share @ part.reshape(rows, -1).view(np.float32)
    out[:, first : first + step] = summed.view(np.complex64).reshape(
      len(weights), -1, q
    )
  if by_point:
    each = (share @ at.reshape(rows, -1)).reshape(len(weights), lots, q)
    out -= (each.transpose(0, 2, 1) @ each.conj()) / np.float32(lots)
    out *= (counts / (counts - 1))[..., None]
  if by_group:
    whole = share @ at.mean(axis=1)
    out -= whole[:, :, None] * whole[:, None].conj()
  return out


def relative(
  z, weights, reference: np.ndarray, mask: np.ndarray, mean: str
) -> np.ndarray:
  """‖C_w − C‖ / ‖C‖ of all weightings, [B]; reference [N//2 + 1, q, q], mask [N//2 + 1, q, q]
  weighs its entries. Waves that count with none are left out.
  """
  gap = np.zeros(len(weights))
  for k in range(z.shape[-1]):
    kept = np.flatnonzero(mask[k].any(axis=1))
    if not len(kept):
      continue
    square = np.ix_(kept, kept)
    found = _block(
      z[:, :, kept, k], weights, mean == "point", mean == "group" and k == 0
    )
    apart = np.abs(found - reference[k][square]) ** 2
    gap += (mask[k][square] * apart).sum(axis=(1, 2), dtype=np.float64)
  size = float((mask * np.abs(reference) ** 2).sum())
  return np.sqrt(gap / distances.positive(size))
