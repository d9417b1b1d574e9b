"""Distances in one dimension at a time, of many weightings of one set of rows: KLD and Wass1 from
shared histograms.

The bins are those of distances.kernel_density: a twelfth of a bandwidth wide, each value shared
between the two nearest. A replicate is then a weighted sum of bins. Smoothed, it is the density;
added up, the distribution function.
"""

import math

import numpy as np
import scipy.sparse

from downscaling.metrics import distances

MOST_POINTS = 1024  # of a field; larger fields are seen at evenly spread points
_BINS = 1024


def points(count: int) -> np.ndarray:
  """Which of `count` points are seen: all, or MOST_POINTS of them, evenly spread."""
  if count <= MOST_POINTS:
    return np.arange(count)
  return (np.arange(MOST_POINTS) * count) // MOST_POINTS


def distances_by_dimension(
  x: np.ndarray, weights: np.ndarray, ref: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """(KLD summed over dimensions, Wass1 averaged over them), each [B], as distances.kld and
  distances.wass1 define them.

  x: [S, D]. weights: [B, S]. ref: [R, D]. Of larger fields MOST_POINTS dimensions stand for all.
  """
  seen = points(x.shape[1])
  counts = weights.sum(axis=1, dtype=np.float64)
  share = scipy.sparse.csr_matrix(weights / counts[:, None])
  kld, wass1 = np.zeros((2, len(weights)))
  for d in seen:
    one, other = (np.asarray(a[:, d], np.float64) for a in (x, ref))
    found = _one_dimension(one, share, float(counts.mean()), other)
    kld += found[0]
    wass1 += found[1]
  return kld * (x.shape[1] / len(seen)), wass1 / len(seen)


def _one_dimension(
  x: np.ndarray, share, count: float, ref: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  # Scott's rule, for as many rows as a replicate has.
  wide = float(x.std()) * count**-0.2
  wide_ref = float(ref.std(ddof=1)) * len(ref) ** -0.2
  low = min(x.min(), ref.min())
  high = max(x.max(), ref.max())
  size = min(_BINS, math.ceil((high - low) / wide * distances.CELLS) + 2)
  step = (high - low) / (size - 2)
  drawn = share @ _shared(x, low, step, size)
  true = _shared(ref, low, step, size).mean(axis=0)
  drawn, true = drawn.toarray(), np.asarray(true).ravel()
  gap = np.cumsum(drawn - true, axis=1)
  wass1 = step * np.abs(gap).sum(axis=1)
  at = np.linspace(
    ref.min() - 5 * wide_ref, ref.max() + 5 * wide_ref, _nodes(ref, wide_ref, wide)
  )
  centres = low + step * np.arange(size)
  p = _smooth(at, centres, wide_ref, step) @ true
  q = drawn @ _smooth(at, centres, wide, step).T
  p, q = np.maximum(p, 1e-300), np.maximum(q, 1e-300)
  return np.trapezoid(p * np.log(p / q), at, axis=1), wass1


def _shared(x: np.ndarray, low: float, step: float, size: int):
  """[S, bins] sparse: the share of each value in the two bins nearest to it."""
  place = (x - low) / step
  cell = np.minimum(place.astype(np.int64), size - 2)
  ahead = place - cell
  row = np.arange(len(x))
  value = np.concatenate([1 - ahead, ahead])
  return scipy.sparse.csr_matrix(
    (value, (np.tile(row, 2), np.concatenate([cell, cell + 1]))), (len(x), size)
  )


def _nodes(ref: np.ndarray, *widths: float) -> int:
  span = np.ptp(ref) + 10 * widths[0]
  return min(math.ceil(span / min(widths) * distances.NODES), _BINS) + 1


def _smooth(
  at: np.ndarray, centres: np.ndarray, width: float, step: float
) -> np.ndarray:
  """[P, bins]: a Gaussian kernel, narrowed by what sharing between bins has widened it."""
  variance = max(width**2 - step**2 / 6, width**2 / 2)
  return np.exp(-0.5 / variance * (at[:, None] - centres) ** 2) / math.sqrt(
    2 * math.pi * variance
  )
