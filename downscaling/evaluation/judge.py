"""Who says how good a number is: the reference, and how far true fields and the number itself may vary.

A *floor* is the distribution of a metric over true sets with the size and the trajectories of the judged set, compared
with the same reference: [2.5 %, median, 97.5 %]. A value inside it is one that true data have. Below it lies less than
that of true data, which is luck or a leak, not merit.

An *interval* is the metric's own: the judged set's trajectories drawn anew with replacement. A replicate has the
sampling noise of the set twice, so its distances are too large; their spread about their median is what is wanted. The
printed interval is the value times the replicates over their median.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import numpy as np

from downscaling.common import symmetry
from downscaling.evaluation import bootstrap, replicates
from downscaling.evaluation.reference import Reference

LEVELS = (0.025, 0.5, 0.975)
Quantiles = dict[str, list[float]]


@dataclasses.dataclass(frozen=True, eq=False)
class Judge:
  """What a table of rows is judged by.

  Attributes:
    reference: the true set that rows are compared with. reference_rows: where it comes from.
    more: [P, *space] further true fields, for the floors. more_rows: where they come from.
    moves, group, quadratic: see replicates.metrics; a group makes a debias table.
    draws: how many replicates. seed: of them.
  """

  reference: Reference
  reference_rows: bootstrap.Rows
  more: np.ndarray
  more_rows: bootstrap.Rows
  moves: symmetry.Moves | None = None
  group: symmetry.Group | None = None
  quadratic: Callable[[np.ndarray], np.ndarray] | None = None
  draws: int = bootstrap.DRAWS
  seed: int = 0
  _floors: dict = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    for fields, rows in ((self.reference.fields, self.reference_rows), (self.more, self.more_rows)):
      if len(fields) != len(rows):
        raise ValueError(f"{len(fields)} true fields, but {len(rows)} say where they come from: need one each.")

  def floor(self, rows: bootstrap.Rows) -> Quantiles:
    """{metric: [2.5 %, median, 97.5 %]} over true sets of the structure of `rows`; computed once a structure."""
    return self._of_true_sets(rows)[0]

  def band(self, rows: bootstrap.Rows) -> np.ndarray:
    """[3, K]: the same quantiles of the energy in each shell."""
    return self._of_true_sets(rows)[1]

  def transfer_band(self, rows: bootstrap.Rows) -> np.ndarray:
    """[3, K]: the same quantiles of the transfer into each shell, of an equation with a quadratic term."""
    fields, origin = self._pool
    weights = bootstrap.true_sets(origin, rows, self.draws, self.seed)
    return np.quantile(replicates.transfer(fields, weights, self.reference, self.quadratic), LEVELS, axis=0)

  def interval(self, x: np.ndarray, rows: bootstrap.Rows, values: Mapping[str, float | None]) -> Quantiles:
    """{metric: [2.5 %, 97.5 %]} of the values of the set x itself, for those metrics that have a floor."""
    drawn = self._metrics(x, bootstrap.judged(rows, self.draws, self.seed))
    found = {}
    for key, replicated in drawn.items():
      low, middle, high = np.quantile(replicated, LEVELS)
      if values.get(key) is not None and middle > 0:
        found[key] = [float(values[key] * edge / middle) for edge in (low, high)]
    return found

  def _metrics(self, x, weights) -> dict[str, np.ndarray]:
    return replicates.metrics(x, weights, self.reference, moves=self.moves, group=self.group, quadratic=self.quadratic)

  @functools.cached_property
  def _pool(self) -> tuple[np.ndarray, bootstrap.Rows]:
    fields = np.concatenate([self.reference.fields, self.more])
    return fields, bootstrap.joined(self.reference_rows, self.more_rows)

  def _of_true_sets(self, rows: bootstrap.Rows) -> tuple[Quantiles, np.ndarray]:
    if rows.structure not in self._floors:
      fields, origin = self._pool
      weights = bootstrap.true_sets(origin, rows, self.draws, self.seed)
      found = self._metrics(fields, weights)
      quantiles = {key: np.quantile(drawn, LEVELS).tolist() for key, drawn in found.items()}
      band = np.quantile(replicates.energies(fields, weights), LEVELS, axis=0)
      self._floors[rows.structure] = (quantiles, band)
    return self._floors[rows.structure]


def inside(value: float | None, floor: list[float] | None) -> bool:
  """Is the value one that true data have?"""
  return value is not None and floor is not None and floor[0] <= value <= floor[2]
