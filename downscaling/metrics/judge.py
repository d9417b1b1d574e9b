"""Who says how good a number is: the reference, and how far true fields and the number itself may
vary.

A *floor* is the distribution of a metric over true sets with the size and the trajectories of the
judged set, compared with the same reference: [2.5 %, median, 97.5 %]. A value inside it is one that
true data have. Below it lies less than that of true data, which is luck or a leak, not merit.

An *interval* is the metric's own: the judged set's trajectories drawn anew with replacement. A
replicate has the sampling noise of the set twice, so its distances are too large; their spread
about their median is what is wanted. The printed interval is the value times the replicates over
their median.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import numpy as np

from downscaling.fields import symmetry
from downscaling.metrics import bootstrap, classifier, replicates
from downscaling.metrics.reference import Reference

LEVELS = (0.025, 0.5, 0.975)
CLASSIFIED = 100  # rows from which a classifier is trained
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
    for fields, rows in (
      (self.reference.fields, self.reference_rows),
      (self.more, self.more_rows),
    ):
      if len(fields) != len(rows):
        raise ValueError(
          f"{len(fields)} true fields, but {len(rows)} say where they come from: need one each."
        )

  def floor(self, rows: bootstrap.Rows) -> Quantiles:
    """{metric: [2.5 %, median, 97.5 %]} over true sets of the structure of `rows`; computed once a
    structure.
    """
    return self._of_true_sets(rows)[0]

  def band(self, rows: bootstrap.Rows) -> np.ndarray:
    """[3, K]: the same quantiles of the energy in each shell."""
    return self._of_true_sets(rows)[1]

  def transfer_band(self, rows: bootstrap.Rows) -> np.ndarray:
    """[3, K]: the same quantiles of the transfer into each shell, of an equation with a quadratic
    term.
    """
    fields, origin = self._pool
    weights = bootstrap.true_sets(origin, rows, self.draws, self.seed)
    return np.quantile(
      replicates.transfer(fields, weights, self.reference, self.quadratic),
      LEVELS,
      axis=0,
    )

  def interval(
    self, x: np.ndarray, rows: bootstrap.Rows, values: Mapping[str, float | None]
  ) -> Quantiles:
    """{metric: [2.5 %, 97.5 %]} of the values of the set x itself, for those metrics that have a
    floor.
    """
    drawn = self._metrics(x, bootstrap.judged(rows, self.draws, self.seed))
    found = {}
    for key, replicated in drawn.items():
      low, middle, high = np.quantile(replicated, LEVELS)
      if values.get(key) is not None and middle > 0:
        found[key] = [float(values[key] * edge / middle) for edge in (low, high)]
    return found

  def auc(
    self, x: np.ndarray, rows: bootstrap.Rows
  ) -> tuple[float, list[float], list[float]] | None:
    """(AUC, its interval, its floor as in `floor`) of a classifier that tells x from as many
    reference rows.

    None for fewer than CLASSIFIED rows, which teach no network anything.
    """
    if (
      len(x) < CLASSIFIED
      or min(rows.blocks, self.reference_rows.blocks) < classifier.LEAST
    ):
      return None
    count = min(len(x), len(self.reference.fields))
    some = _spread(len(self.reference.fields), count)
    other = (
      self.reference_rows.block[some] - 1 - self.reference_rows.block.max()
    )  # numbers of their own
    found = classifier.auc(
      x,
      rows.block,
      self.reference.fields[some],
      other,
      seed=self.seed,
      periodic=self.reference.periodic,
    )
    return found.auc, list(found.interval), self._auc_floor(rows, count)

  def _auc_floor(self, rows: bootstrap.Rows, count: int) -> list[float]:
    key = ("auc", *rows.structure)
    if key not in self._floors:
      fields, origin = self._pool
      sizes, periodic = (len(rows), count), self.reference.periodic
      found = classifier.floor(
        fields, origin.block, sizes, seed=self.seed, periodic=periodic
      )
      self._floors[key] = [
        found.interval[0],
        found.auc,
        found.interval[1],
      ]
    return self._floors[key]

  def _metrics(self, x, weights) -> dict[str, np.ndarray]:
    return replicates.metrics(
      x,
      weights,
      self.reference,
      moves=self.moves,
      group=self.group,
      quadratic=self.quadratic,
    )

  @functools.cached_property
  def _pool(self) -> tuple[np.ndarray, bootstrap.Rows]:
    fields = np.concatenate([self.reference.fields, self.more])
    return fields, bootstrap.joined(self.reference_rows, self.more_rows)

  def _of_true_sets(self, rows: bootstrap.Rows) -> tuple[Quantiles, np.ndarray]:
    if rows.structure not in self._floors:
      fields, origin = self._pool
      weights = bootstrap.true_sets(origin, rows, self.draws, self.seed)
      found = self._metrics(fields, weights)
      quantiles = {
        key: np.quantile(drawn, LEVELS).tolist() for key, drawn in found.items()
      }
      band = np.quantile(
        replicates.energies(fields, weights, self.reference.shells), LEVELS, axis=0
      )
      self._floors[rows.structure] = (quantiles, band)
    return self._floors[rows.structure]


def _spread(have: int, count: int) -> np.ndarray:
  """`count` of `have` row numbers, ascending and evenly spread over trajectories and times (golden
  section).
  """
  order = np.argsort(np.arange(have) * 0.6180339887 % 1)
  return np.sort(order[:count])


def inside(value: float | None, floor: list[float] | None) -> bool:
  """Is the value one that true data have?"""
  return value is not None and floor is not None and floor[0] <= value <= floor[2]
