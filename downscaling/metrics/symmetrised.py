"""Covariances of fine fields averaged over a symmetry group: distances.sym_cov_rmse without a table
or a [D, D] array.

An average over all shifts of the last axis couples only waves of one k along it. In Fourier space
it is a block [q, q] for each k, q the waves of the other axis (1 on a line), and its Frobenius norm
is that in real space.
"""

import math

import jax
import numpy as np

from downscaling.fields.symmetry import Moves
from downscaling.metrics import distances, spectra


def covariance(x: np.ndarray, moves: Moves) -> np.ndarray:
  """Mean over the group of g Cov gᵀ, [N//2 + 1, q, q]: E ŷ(p, k) ŷ*(p′, k), ŷ the DFT over D values
  divided by D.

  Args: x [S, *space], one or two axes of space; Cov is divided by S − 1. moves: on [..., *space],
    float32.
  """
  distances.rows(x, "fields")
  space, n, axes = x.shape[1:], x.shape[-1], tuple(range(1, x.ndim))
  mean, move = x.mean(axis=0, dtype=np.float64), jax.jit(moves.move)
  total = np.zeros(
    (n // 2 + 1, *(math.prod(space) // n,) * 2),
    complex,
  )
  for _, block in distances.chunks(x):
    block = (block - mean).astype(np.float32)
    for element in range(
      0, moves.count, n
    ):  # one of each lot that differs by shifts, which the blocks are blind to
      waves = np.fft.rfftn(
        np.asarray(move(block, element)),
        axes=axes,
      ) / math.prod(space)
      waves = waves.reshape(len(block), -1, n // 2 + 1).transpose(2, 1, 0)
      total += waves @ waves.conj().transpose(0, 2, 1)
  return total / ((len(x) - 1) * (moves.count // n))


def sym_cov_rmse(
  pred: np.ndarray, ref: np.ndarray, space: tuple[int, ...], shells: np.ndarray
) -> float:
  """‖Cov_pred − Cov_ref‖_F / ‖Cov_ref‖_F of two results of `covariance`, over the waves whose
  shells count.

  shells: mask [min(space)//2] of k = 1, 2, ..., e.g. spectra.energy_holding_shells; the mean and
    the corners are out.
  """
  weight = mask(space, shells)
  size = distances.positive(float((weight * np.abs(ref) ** 2).sum()))
  return math.sqrt(float((weight * np.abs(pred - ref) ** 2).sum()) / size)


def mask(space: tuple[int, ...], shells: np.ndarray | None) -> np.ndarray:
  """How often each entry of `covariance` counts in a norm over all waves, [N//2 + 1, q, q]; 0
  outside the shells.

  shells: see sym_cov_rmse; None for all waves, the mean and the corners among them.
  """
  number, twice = spectra.shell_numbers(space)
  number = number.reshape(-1, len(twice))
  if shells is None:
    counts = np.ones(number.T.shape, bool)
  else:
    # [k, q]
    counts = np.concatenate(
      [
        [False],
        shells,
        np.zeros(number.max(), bool),
      ]
    )[number].T
  return twice[:, None, None] * (counts[:, :, None] & counts[:, None, :])
