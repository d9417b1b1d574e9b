"""Cubic splines from the coarse points to the fine grid: the baseline that adds no small scales."""

import numpy as np
from scipy.interpolate import CubicSpline

from downscaling.fields.operators import BlockMean, Operator, Strided


def cubic(
  y: np.ndarray,
  operator: Operator,
  block: int = 1024,
  periodic: tuple[bool, ...] | None = None,
) -> np.ndarray:
  """The C² cubic spline through the coarse values, axis by axis; error O(h⁴) for smooth fields, h
  the coarse spacing.

  Args:
    y: [S, *coarse, C], equal spacing, at least 3 points an axis.
    operator: Strided (coarse point j lies on fine point j·factor; the spline passes through it) or
      an unweighted BlockMean (it lies in the middle of its block, whose mean the spline then only
      approximates).
    block: fields done at a time, in float64.
    periodic: is each axis; None for all of them. Beyond the outermost coarse points of another
      axis, their values are kept.
  Returns: [S, *fine, C] in y's dtype.
  Raises: ValueError for another operator or grid.
  """
  y = np.asarray(y)
  if not isinstance(operator, Strided) and not (
    isinstance(operator, BlockMean) and operator.weights is None
  ):
    raise ValueError(
      f"cubic interpolation needs coarse points on an even grid; {type(operator).__name__} has "
      "none: use a strided or an unweighted block mean operator."
    )
  if (
    y.ndim != len(operator.coarse) + 2
    or y.shape[1:-1] != operator.coarse
    or min(operator.coarse) < 3
  ):
    raise ValueError(
      f"coarse fields of shape {y.shape} came, need [samples, "
      f"{', '.join(map(str, operator.coarse))}, channels] with at least 3 points an axis: is "
      "config.grid.factor that of the data?"
    )
  closed = (True,) * len(operator.coarse) if periodic is None else periodic
  middle = isinstance(operator, BlockMean)
  out = np.empty(
    (len(y), *operator.fine, y.shape[-1]),
    y.dtype,
  )
  for first in range(0, len(y), block):
    part = np.asarray(y[first : first + block], np.float64)
    for axis, (factor, wrap) in enumerate(
      zip(operator.factors, closed, strict=True), start=1
    ):
      offset = (factor - 1) / 2 if middle else 0.0
      part = _along(part, axis, factor, offset, wrap)
    out[first : first + block] = part
  return out


def _along(
  y: np.ndarray, axis: int, factor: int, offset: float, periodic: bool
) -> np.ndarray:
  n = y.shape[axis]
  places = (np.arange(n * factor) - offset) / factor
  if not periodic:
    return CubicSpline(np.arange(n), y, axis=axis)(np.clip(places, 0, n - 1))
  # A periodic spline repeats its first value at the end.
  closed = np.concatenate([y, np.take(y, [0], axis)], axis)
  spline = CubicSpline(np.arange(n + 1), closed, axis=axis, bc_type="periodic")
  return spline(places % n)
