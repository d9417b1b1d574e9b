"""How inexact coarse fields are: the variance R of ε in C′x = y′ + ε, fitted to conditions alone.

The fields y′ of a map are not exact, and no truth belongs to them. But the prior knows how far a
right y′ lies from its own estimate: the misfit r = y′ − C′D of the unguided D has the variance
A + R (sampling/gaussian_gain.py), so the right R gives

    χ²/d′ = E rᵀ(A + R)⁻¹r / d′ = 1

χ² falls as R grows. R = s² is white, in units of the data's variance. The fit is the smallest s for
which χ²/d′ is 1. There may be none, because a network's A is not exact; then the fit is the largest
s that keeps y′, that is corr(y′, C′x) ≥ LEAST. A larger s would gain nothing: where y′ leaves the
prior free, χ² is near 1 for any s.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

SMALLEST, LARGEST = 1e-3, 0.1  # of s; an ε of .1 alone gives a correlation of .995
FILE = "observation_noise.json"  # of a set of samples: what was fitted to each map
LEAST = 0.995  # of corr(y′, C′x): keeps the weather of y′
CLOSE = 0.05  # |ln χ²/d′| below which a few dozen conditions cannot tell it from 0
MOST = 9  # evaluations in one fit


@dataclasses.dataclass(frozen=True)
class Fit:
  """A fitted observation noise.

  std: s, in standard deviations of the data, 3 digits. chi2: χ²/d′ there; the prior expects 1.
  corr: of y′ and C′x over conditions, members, points. exact: (χ²/d′, corr) for s = 0.
  tried: (s, χ²/d′, corr) of every evaluation.
  """

  std: float
  chi2: float
  corr: float
  exact: tuple[float, float]
  tried: tuple[tuple[float, float, float], ...]

  @property
  def bounded(self) -> bool:
    """True if χ² is still above 1 because a larger s would lose y′."""
    return math.log(self.chi2) > CLOSE

  def record(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  @classmethod
  def of(cls, record: dict[str, Any]) -> "Fit":
    exact = tuple(record["exact"])
    tried = tuple(map(tuple, record["tried"]))
    return cls(record["std"], record["chi2"], record["corr"], exact, tried)


def fit(measure: Callable[[float], tuple[float, float]]) -> Fit:
  """The smallest s with χ²/d′ = 1, or else the largest with corr >= LEAST.

  Args:
    measure: s -> (χ²/d′, corr(y′, C′x)) over all conditions; one compiled program, s an operand.
  Raises: FloatingPointError if χ² is not finite.
  """
  tried = []

  def at(std: float) -> tuple[float, float]:
    """(ln χ²/d′, corr) at s."""
    chi2, corr = measure(std)
    if not math.isfinite(chi2):
      raise FloatingPointError(
        f"χ² is {chi2:g} for an observation noise of {std:g} standard deviations, on calibration "
        "rows: the sampler ran away. See sampling.max_failed, or set "
        "--config.sampling.observation_noise=0."
      )
    tried.append((std, float(chi2), float(corr)))
    return math.log(max(chi2, 1e-9)), corr

  if at(0.0)[0] <= CLOSE:
    return _chosen(tried)
  low, high = SMALLEST, LARGEST  # so small an s is none
  above, corr = at(high)
  while corr < LEAST and len(tried) < MOST:  # 1 − corr goes as s²
    high = _rounded(0.99 * high * math.sqrt((1 - LEAST) / (1 - corr)))
    above, corr = at(high)
  if corr < LEAST:
    return _chosen(tried, tried[0])  # any noise loses y′
  if above >= -CLOSE:
    return _chosen(tried)
  while len(tried) < MOST:
    middle = _rounded(math.sqrt(low * high))
    found, _ = at(middle)
    if abs(found) <= CLOSE:
      return _chosen(tried)
    low, high = (middle, high) if found > 0 else (low, middle)
  return _chosen(tried)


def _chosen(tried: list, found: tuple[float, float, float] | None = None) -> Fit:
  """The given (s, χ²/d′, corr), or the last one tried."""
  std, chi2, corr = found or tried[-1]
  return Fit(
    std,
    chi2,
    corr,
    exact=tried[0][1:],
    tried=tuple(tried),
  )


def _rounded(std: float) -> float:
  """Three digits, so that rounding errors of another machine give the same number."""
  return float(f"{std:.3g}")
