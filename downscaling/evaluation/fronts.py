"""The report's section on debiasing maps: what each does to statistics of higher order, and the front that it lies on.

Any statistics can be had by forgetting the input, and any input kept by doing nothing: a map is judged by both, the
distance of what it makes from the truth and how far it moves what it is given.
"""

import math

import numpy as np

from downscaling.evaluation import figures, page, tables
from downscaling.evaluation.evidence import Evidence

LEVELS = np.linspace(0.005, 0.995, 100)
JUDGED = ("sym_cov_rmse", "melr_unweighted", "melr_weighted", "kld_sum", *tables.HIGHER)


def over_floor(table: dict, name: str) -> float | None:
  """Geometric mean of a row's columns JUDGED over their floors, each at least 1; None for a row without a floor."""
  floor = tables.floor_of(table, name)
  if floor is None:
    return None
  pairs = [(table[name][key], floor[key]) for key in JUDGED if table[name][key] is not None]
  ratios = [max(value / least, 1.0) for value, least in pairs if least]
  return math.exp(float(np.mean(np.log(ratios)))) if ratios else None


def points(e: Evidence) -> dict[str, tuple[float, float]]:
  """{row: (excess displacement, over_floor)} of held-out maps, and of the untouched input at 0."""
  table, found = e.metrics["debias"], {}
  for name, row in table.items():
    distance = None if name.endswith("in-sample") else over_floor(table, name)
    if distance is not None:
      moved = 0.0 if name == "lflr" else row["excess"]
      if moved is not None:
        found[name] = (max(moved, 0.0), distance)
  return found


def note(e: Evidence) -> str:
  """What the rows of the table of higher orders mean, and which map is which."""
  text = (
    "<p class='note'>corr: correlation of T y with y. excess: E|T y − y|² / E|y′|² beyond what the two covariances ask "
    "of any map (the Bures bound). Relative errors of the bispectrum, of the energy (vorticity: enstrophy) that the "
    "quadratic term moves between shells, of E y⁴/(E y²)² of the field and of its gradients, of the covariance of "
    "squares.</p>"
  )
  if e.maps:
    named = "; ".join(f"<b>{page.escape(row)}</b> is the map {page.escape(name)}" for row, name in e.maps.items())
    text += f"<p class='note'>{named}. Samples are drawn behind the row ot.</p>"
  return text


def moved(e: Evidence) -> figures.Draw | None:
  """‖T y − y‖ / ‖y‖ of held-out rows by quantile, and how many targets entropic maps average; None without maps."""
  y = e.coarse.get("lflr")
  rows = {} if y is None else {k: x for k, x in e.coarse.items() if k != "lflr" and k not in e.sources}
  if not rows:
    return None
  size = lambda x: np.linalg.norm(np.asarray(x, np.float64).reshape(len(x), -1), axis=1)
  shares = {name: np.quantile(size(x - y) / size(y), LEVELS) for name, x in rows.items() if x.shape == y.shape}
  targets = {
    name: (np.array([float(q) for q in found]), np.array(list(found.values())))
    for name, found in e.effective_targets.items()
  }
  return figures.moved(LEVELS, shares, targets)


def draw(e: Evidence) -> figures.Draw | None:
  """The front; None if there is no map to show."""
  found = points(e)
  more = {row: f" ({name})" for row, name in e.maps.items() if row != name}
  return figures.front(found, more) if len(found) > 1 else None
