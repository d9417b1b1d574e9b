"""Do series go on in time? Mean squared increments from frame to frame, over those of true series.

    I = E|x(t + Δ) − x(t)|² / E|x*(t + Δ) − x*(t)|²,   x* true, Δ the time between two frames

Over all points, members and conditions: of all steps, of those within windows, and of those across seams, where another
set of windows takes over. 1 is right: more means jumps, less that frames stick together. By shells of the spectrum it
is the melr of increments: the mean |ln| of their energies' ratio, weighted by the truth's energy (spectra.py).

Beside it stands the same ratio of the conditions, over coarsened true series: debiasing acts on snapshots and leaves to
the coarse world how fast it moves, and series follow their conditions.

Below each set stands the same set with members exchanged from frame to frame: frames as good as before, each with its
own condition, but independent of each other beyond it, as draws of single frames are.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from downscaling.evaluation import spectra

KEYS = ("increment", "within", "seams", "melr", "condition")
EXCHANGED = ", members exchanged"  # after the name of a set


@dataclasses.dataclass(frozen=True)
class Series:
  """What the report knows of time.

  samples: {row: [K, M, L, *space]}. truth: {row: [K, L, *space]}, the series whose own C′x were the conditions.
  conditions: {row: y′ [K, L, *coarse]}. coarse_reference: [S, L, *coarse], C′ of the reference.
  reference, floor: [S, L, *space] each, independent true series.
  seams: [L − 1], does the step from frame l to l + 1 lead to another set of windows? spacing: Δ.
  """

  samples: Mapping[str, np.ndarray]
  truth: Mapping[str, np.ndarray]
  conditions: Mapping[str, np.ndarray]
  coarse_reference: np.ndarray
  reference: np.ndarray
  floor: np.ndarray
  seams: np.ndarray
  spacing: float

  def rows(self) -> dict[str, dict[str, float | None]]:
    """{row: {KEYS}} of the samples, of those with members exchanged where there are several, and of the floor.

    The floor is of as many true series as the rows have conditions. None: there are no such steps.
    """
    table, true = {}, _steps(self.reference[:, None])
    for name, x in self.samples.items():
      paced = {"condition": None if name not in self.conditions else self._pace(self.conditions[name])}
      table[name] = self._measured(x, true) | paced
      if np.shape(x)[1] > 1:
        table[name + EXCHANGED] = self._measured(exchanged(x), true) | paced
    count = max(len(x) for x in self.samples.values())
    return table | {"floor": self._measured(self.floor[:count, None], true) | {"condition": None}}

  def _pace(self, y: np.ndarray) -> float:
    return float(np.mean(_steps(y[:, None]) ** 2) / np.mean(_steps(self.coarse_reference[:, None]) ** 2))

  def _measured(self, x: np.ndarray, true: np.ndarray) -> dict[str, float | None]:
    steps = _steps(x)
    each = (steps**2).mean(axis=(0, 1, *range(3, steps.ndim))) / (true**2).mean()  # [L − 1]
    part = lambda which: float(each[which].mean()) if which.any() else None
    ratio = spectra.melr(*(spectra.energies(s.reshape(-1, *s.shape[3:]), "increments") for s in (steps, true)))
    return {
      "increment": float(each.mean()),
      "within": part(~self.seams),
      "seams": part(self.seams),
      "melr": ratio["weighted"],
    }


def _steps(x: np.ndarray) -> np.ndarray:
  """[K, M, L, *space] -> [K, M, L − 1, *space]."""
  return np.diff(np.asarray(x, np.float64), axis=2)


def exchanged(x: np.ndarray) -> np.ndarray:
  """[K, M, L, *space]: frame l of member m becomes that of member m + l, around."""
  members, frames = np.shape(x)[1:3]
  place = (np.arange(members)[:, None] + np.arange(frames)) % members
  return np.asarray(x)[:, place, np.arange(frames)]
