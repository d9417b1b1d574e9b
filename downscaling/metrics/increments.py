"""Do series go on in time? Mean squared increments from frame to frame, over those of true series.

    I = E|x(t + Δ) − x(t)|² / E|x*(t + Δ) − x*(t)|²,   x* true, Δ the time between two frames

Over all points, members and conditions: of all steps, of those within windows, and of those across
seams, where another set of windows takes over. 1 is right: more means jumps, less that frames stick
together. By shells of the spectrum it is the melr of increments: the mean |ln| of their energies'
ratio, weighted by the truth's energy (spectra.py).

Beside it stands the same ratio of the conditions, over coarsened true series: debiasing acts on
snapshots and leaves to the coarse world how fast it moves, and series follow their conditions.

Below each set stands the same set with members exchanged from frame to frame: frames as good as
before, each with its own condition, but independent of each other beyond it, as draws of single
frames are.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from downscaling.metrics import spectra
from downscaling.metrics.distances import Members

KEYS = ("increment", "within", "seams", "melr", "condition")
EXCHANGED = ", members exchanged"  # after the name of a set


@dataclasses.dataclass(frozen=True)
class Series:
  """What the report knows of time.

  samples: {row: [K, M, L, *space]}. truth: {row: [K, L, *space]}, the series whose own C′x were the
    conditions.
  conditions: {row: y′ [K, L, *coarse]}. coarse_reference: [S, L, *coarse], C′ of the reference.
  reference, floor: [S, L, *space] each, independent true series.
  seams: [L − 1], does the step from frame l to l + 1 lead to another set of windows? spacing: Δ.
  """

  samples: Mapping[str, Members]
  truth: Mapping[str, np.ndarray]
  conditions: Mapping[str, np.ndarray]
  coarse_reference: np.ndarray
  reference: np.ndarray
  floor: np.ndarray
  seams: np.ndarray
  spacing: float

  def rows(self) -> dict[str, dict[str, float | None]]:
    """{row: {KEYS}} of the samples, of those with members exchanged where there are several, and of
    the floor.

    The floor is of as many true series as the rows have conditions. None: there are no such steps.
    """
    table, true = {}, _moves(self.reference[:, None])
    for name, x in self.samples.items():
      paced = {
        "condition": None
        if name not in self.conditions
        else self._pace(self.conditions[name])
      }
      table[name] = self._compared(_moves(x), true) | paced
      if x.shape[1] > 1:
        table[name + EXCHANGED] = self._compared(_moves(x, exchanged), true) | paced
    count = max(len(x) for x in self.samples.values())
    return table | {
      "floor": self._compared(_moves(self.floor[:count, None]), true)
      | {"condition": None}
    }

  def _pace(self, y: np.ndarray) -> float:
    drawn, true = (_moves(x[:, None])[0].mean() for x in (y, self.coarse_reference))
    return float(drawn / true)

  def _compared(self, drawn: tuple, true: tuple) -> dict[str, float | None]:
    each = drawn[0] / true[0].mean()
    part = lambda which: float(each[which].mean()) if which.any() else None
    return {
      "increment": float(each.mean()),
      "within": part(~self.seams),
      "seams": part(self.seams),
      "melr": spectra.melr(drawn[1], true[1])["weighted"],
    }


def _moves(
  x: Members, change: Callable = lambda members: members
) -> tuple[np.ndarray, np.ndarray]:
  """(mean square of every step [L − 1], energies of the increments by shell) of [K, M, L, *space].

  One condition at a time: ensembles are large. change: of its members [M, L, *space], before.
  """
  squares, energies = [], []
  for members in x:
    steps = np.diff(np.asarray(change(members), np.float64), axis=1)
    squares.append((steps**2).mean(axis=(0, *range(2, steps.ndim))))
    energies.append(
      spectra.energies(
        steps.reshape(-1, *steps.shape[2:]),
        "increments",
      )
    )
  return np.mean(squares, axis=0), np.mean(energies, axis=0)


def exchanged(members: np.ndarray) -> np.ndarray:
  """[M, L, *space]: frame l of member m becomes that of member m + l, around."""
  count, frames = np.shape(members)[:2]
  place = (np.arange(count)[:, None] + np.arange(frames)) % count
  return np.asarray(members)[place, np.arange(frames)]
