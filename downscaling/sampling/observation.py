"""How far coarse fields are off: the variance R of ε in C′x = y′ + ε, fitted to conditions alone.

A map's fields y′ are not exact, and no truth is known behind them. But the prior knows how far a
right y′ lies from what it says itself: the misfit r = y′ − C′D of its unguided D has the variance
A + R (sampling/gain.py), so that

    χ²/d′ = E rᵀ(A + R)⁻¹r / d′ = 1

where R is right. χ² falls as R grows. R = s² is white, in units of the data's variance, and s the
smallest number for which χ²/d′ is 1, or LARGEST if none below it is. A larger s makes χ² small for
nothing: y′ and the fields' own coarse values then come apart, as their correlation says.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

SMALLEST, LARGEST = 1e-3, 0.1  # of s: at .1 a right C′x still has a correlation of .995 with y′
CLOSE = 0.05  # |ln χ²/d′| that is 1 to what a few dozen conditions can tell
MOST = 8  # programs' runs of one fit


@dataclasses.dataclass(frozen=True)
class Fit:
  """std: s, in standard deviations of the data, 3 digits. chi2: χ²/d′ there; 1 is what the prior expects.

  corr: of y′ and C′x over conditions, members, points. exact: the same two for s = 0. tried: every (s, χ²/d′, corr).
  """

  std: float
  chi2: float
  corr: float
  exact: tuple[float, float]
  tried: tuple[tuple[float, float, float], ...]

  @property
  def bounded(self) -> bool:
    """Is χ² still above 1 at the largest s?"""
    return self.std == LARGEST and math.log(self.chi2) > CLOSE

  def record(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  @classmethod
  def of(cls, record: dict[str, Any]) -> "Fit":
    pairs = {"exact": tuple(record["exact"]), "tried": tuple(map(tuple, record["tried"]))}
    return cls(**{k: record[k] for k in ("std", "chi2", "corr")}, **pairs)


def fit(measure: Callable[[float], tuple[float, float]]) -> Fit:
  """The smallest s with χ²/d′ = 1.

  Args:
    measure: s -> (χ²/d′, corr(y′, C′x)), the mean over conditions; one compiled program, s an operand.
  Raises: FloatingPointError if χ² is not finite.
  """
  tried = []

  def at(std: float) -> float:
    """ln χ²/d′ of a noise that is rounded to what is stored."""
    chi2, corr = measure(std)
    if not math.isfinite(chi2):
      raise FloatingPointError(
        f"χ² is {chi2:g} for an observation noise of {std:g} standard deviations, on calibration rows: the sampler ran "
        "away. See sampling.max_failed, or set --config.sampling.observation_noise=0."
      )
    tried.append((std, float(chi2), float(corr)))
    return math.log(max(chi2, 1e-12))

  def chosen() -> Fit:
    std, chi2, corr = min(tried, key=lambda found: abs(math.log(max(found[1], 1e-12))))
    return Fit(std, chi2, corr, tried[0][1:], tuple(tried))

  low, below = SMALLEST, at(0.0)  # so small an s is none
  if below <= CLOSE:
    return Fit(*tried[0], tried[0][1:], tuple(tried))
  high, above = LARGEST, at(LARGEST)
  if above >= -CLOSE:
    return Fit(*tried[1], tried[0][1:], tuple(tried))
  while len(tried) < MOST:
    middle = _between(low, below, high, above)
    found = at(middle)
    if abs(found) <= CLOSE:
      break
    low, below, high, above = (middle, found, high, above) if found > 0 else (low, below, middle, found)
  return chosen()


def _between(low: float, below: float, high: float, above: float) -> float:
  """Where ln χ² is about 0 between two s, as a line in ln s has it, but in the middle 80 %; 3 digits."""
  share = np.clip(below / (below - above), 0.1, 0.9)
  return float(f"{low * (high / low) ** share:.3g}")
