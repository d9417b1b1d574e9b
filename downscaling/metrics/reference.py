"""The true set that others are compared with, and what many comparisons with it share, each
computed once.
"""

import functools

import numpy as np

from downscaling.fields import symmetry
from downscaling.fields.domain import Domain
from downscaling.metrics import (
  distances,
  higher_order,
  pairs,
  spectra,
  symmetrised,
  waves,
)


class Reference:
  """A reference set [R, *space] on a domain; None stands for a periodic box of equal sides.

  Raises ValueError for NaN, < 2 rows, or another grid than the domain's.
  """

  def __init__(self, fields: np.ndarray, domain: Domain | None = None):
    if domain is not None and np.shape(fields)[1:] != domain.shape:
      raise ValueError(
        f"the reference has the grid {np.shape(fields)[1:]}, its domain {domain.shape}: need "
        "[rows, *space] of that domain, one channel at a time."
      )
    self.shells = None if domain is None else spectra.shells_of(domain)
    self.periodic = (
      None if domain is None else tuple(axis.periodic for axis in domain.axes)
    )
    self.fields, self._higher, self._symmetric = np.asarray(fields), None, None
    self._squares = None
    self.flat = distances.rows(self.fields, "the reference")

  @functools.cached_property
  def energies(self) -> np.ndarray:
    return spectra.energies(self.fields, "the reference", self.shells)

  @functools.cached_property
  def kernel_term(self) -> float:
    return distances.kernel_ref_term(self.fields)

  @functools.cached_property
  def scale(self) -> tuple[float, np.ndarray]:
    """(twice the total variance, the mean [D]) that kernel distances are measured by."""
    return distances.kernel_scale(self.flat)

  def flatten(self, x: np.ndarray) -> np.ndarray:
    """[S, *space] -> [S, D]."""
    return np.asarray(x).reshape(len(x), -1)

  def centred(self, x: np.ndarray) -> np.ndarray:
    """Rows [S, *space] as [S, D] less the reference's mean."""
    return (self.flatten(x) - self.scale[1]).astype(np.float32)

  @functools.cached_property
  def own_forms(self) -> tuple[float, float]:
    """`pairs.forms` of the reference with itself."""
    even = np.ones((1, len(self.fields)), np.float32)
    square, kernel = pairs.forms(
      self.centred(self.fields),
      even,
      None,
      self.scale[0],
    )
    return float(square[0]), float(kernel[0])

  def higher(self, quadratic, group: symmetry.Group) -> dict[str, np.ndarray]:
    """Its statistics of higher order, computed once."""
    if self._higher is None or self._higher[:2] != (quadratic, group):
      self._higher = (quadratic, group, self._moments(quadratic, group))
    return self._higher[2]

  def _moments(self, quadratic, group: symmetry.Group) -> dict[str, np.ndarray]:
    return higher_order.higher_order(self.fields, quadratic, group, self.periodic)

  def symmetric(self, moves: symmetry.Moves) -> np.ndarray:
    """Its covariance averaged over a group, computed once."""
    if self._symmetric is None or self._symmetric[0] != moves:
      self._symmetric = (moves, symmetrised.covariance(self.fields, moves))
    return self._symmetric[1]

  def symmetric_squares(self, moves: symmetry.Moves) -> np.ndarray:
    """The same of the squared anomalies, as waves.blocks has it: [N//2 + 1, q, q]."""
    if self._squares is None or self._squares[0] != moves:
      even = np.ones((1, len(self.fields)), np.float32)
      z = waves.waves(self.anomalies(self.fields), moves, power=2)
      self._squares = (moves, np.concatenate([*waves.blocks(z, even, "group")]))
    return self._squares[1]

  def anomalies(self, x: np.ndarray) -> np.ndarray:
    """Rows [S, *space] less the reference's mean, float32."""
    return self.centred(x).reshape(np.shape(x))
