"""All metrics of many weightings of one set of rows: what bootstrap intervals and sampling floors
are made from.

Nothing is computed once a replicate that can be computed once a row: spectra, moments and waves are
sums of rows' own, one-dimensional distances come from shared histograms, covariances and kernels
from one pass over pairs. The values agree with those of `tables.measure` to about a hundredth; the
printed value itself is always measure's.
"""

from collections.abc import Callable

import numpy as np

from downscaling.fields import symmetry
from downscaling.metrics import (
  distances,
  higher_order,
  histograms,
  pairs,
  spectra,
  symmetrised,
  waves,
)
from downscaling.metrics.reference import Reference

SMALLEST = np.finfo(float).tiny


def metrics(
  x: np.ndarray,
  weights: np.ndarray,
  reference: Reference,
  *,
  moves: symmetry.Moves | None = None,
  group: symmetry.Group | None = None,
  quadratic: Callable[[np.ndarray], np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
  """Every metric with a floor of weighted rows, {key of tables.COMPARED: [B]}.

  Args:
    x: [S, *space]. weights: [B, S], whole numbers >= 0. reference: on the same grid.
    moves: of the grid's symmetries, for symcov; None leaves it out.
    group: the same as a table; makes these debias rows, with the columns of higher order.
    quadratic: of the equation, see higher_order.
  """
  x = np.asarray(x)
  found = _spectral(x, weights, reference)
  found |= _paired(x, weights, reference)
  kld, wass1 = histograms.distances_by_dimension(
    reference.flatten(x), weights, reference.flat
  )
  found |= {"kld_sum": kld, "kld_mean": kld / reference.flat.shape[1], "wass1": wass1}
  if moves is not None:
    found["sym_cov_rmse"] = _symmetric(
      x, weights, reference, moves, coarse=group is not None
    )
  if group is not None:
    found |= _higher(x, weights, reference, moves, group, quadratic)
  return found


def energies(
  x: np.ndarray, weights: np.ndarray, shells: spectra.Shells | None
) -> np.ndarray:
  """E(k) of every weighting, [B, K]; shells: of the reference."""
  share = weights / weights.sum(axis=1, keepdims=True)
  return share @ spectra.shell_energies(x, shells=shells)


def transfer(
  x: np.ndarray, weights: np.ndarray, reference: Reference, quadratic
) -> np.ndarray:
  """Re E[ŷ* N̂] by shell of every weighting, [B, K]; see higher_order."""
  return _weighted_moments(np.asarray(x), weights, reference, quadratic)["transfer"]


def _spectral(x, weights, reference) -> dict[str, np.ndarray]:
  found = energies(x, weights, reference.shells)
  each = [spectra.melr(energy, reference.energies) for energy in found]
  return {f"melr_{name}": np.array([row[name] for row in each]) for name in each[0]}


def _paired(x, weights, reference) -> dict[str, np.ndarray]:
  scale = reference.scale[0]
  rows, others = reference.centred(x), reference.centred(reference.fields)
  own_square, own_kernel = pairs.forms(rows, weights, None, scale)
  square, kernel = pairs.forms(rows, weights, others, scale)
  ref_square, ref_kernel = reference.own_forms
  means = weights @ rows / weights.sum(axis=1, keepdims=True)
  own_square -= (
    2 * pairs.along(rows, weights, means, scale)
    - (means**2).sum(axis=1) ** 2 / scale**2
  )
  square -= pairs.along(
    others,
    np.ones((1, len(others)), np.float32),
    means,
    scale,
  )
  sizes = weights.sum(axis=1), len(others)
  # A covariance divides by n − 1.
  factor, ref_factor = (count / (count - 1) for count in sizes)
  own_square, square, ref_square = (
    own_square * factor**2,
    square * factor * ref_factor,
    ref_square * ref_factor**2,
  )
  gap = np.maximum(own_square - 2 * square + ref_square, 0)
  apart = np.maximum(own_kernel - 2 * kernel + ref_kernel, 0)
  return {"cov_rmse": np.sqrt(gap / ref_square), "mmd": np.sqrt(apart)}


def _symmetric(x, weights, reference, moves, coarse: bool) -> np.ndarray:
  space = x.shape[1:]
  shells = None if coarse else spectra.energy_holding_shells(reference.energies)
  z = waves.waves(reference.anomalies(x), moves)
  mask = symmetrised.mask(space, shells)
  return waves.relative(z, weights, reference.symmetric(moves), mask, "point")


def _higher(x, weights, reference, moves, group, quadratic) -> dict[str, np.ndarray]:
  """Relative errors of the statistics of higher order that the reference has."""
  ref = reference.higher(quadratic, group)
  sums = _weighted_moments(x, weights, reference, quadratic)
  if "bispectrum" in sums:
    sums["bispectrum"] = higher_order.average_bispectrum(sums["bispectrum"], group)
  sums["flatness"] = sums["fourth"] / np.maximum(sums["second"] ** 2, SMALLEST)
  slope = np.maximum(sums["slope_second"] ** 2, SMALLEST)
  sums["gradient_flatness"] = sums["slope_fourth"] / slope
  found = {}
  for key in ("bispectrum", "transfer", "flatness", "gradient_flatness"):
    if key in sums and np.any(ref.get(key, 0)):
      found[key] = _relative(sums[key], ref[key])
  if moves is not None:
    z = waves.waves(reference.anomalies(x), moves, power=2)
    mask = symmetrised.mask(x.shape[1:], None)
    found["square_covariance"] = waves.relative(
      z, weights, reference.symmetric_squares(moves), mask, "group"
    )
  return found


def _weighted_moments(x, weights, reference, quadratic) -> dict[str, np.ndarray]:
  """{name: [B] or [B, K]}: moments that are linear in the rows."""
  share = weights / weights.sum(axis=1, keepdims=True, dtype=np.float64)
  flat, mean = reference.flatten(x), reference.scale[1]
  sums: dict[str, np.ndarray] = {}
  for first, block in distances.chunks(flat):
    part = share[:, first : first + len(block)]
    moments = higher_order.row_moments(
      block, mean, x.shape[1:], quadratic, reference.periodic
    )
    for name, rows in moments.items():
      sums[name] = sums.get(name, 0.0) + part @ rows
  return sums


def _relative(found: np.ndarray, ref: np.ndarray) -> np.ndarray:
  """‖found − ref‖ / ‖ref‖ of each weighting; found [B, ...]."""
  gap = np.abs(found - ref).reshape(len(found), -1)
  return np.linalg.norm(gap, axis=1) / np.linalg.norm(ref)
