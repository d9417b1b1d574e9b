"""The report's section on debiasing maps: what each does to statistics of higher order, and the
front that it lies on.

Any statistics can be had by forgetting the input, and any input kept by doing nothing: a map is
judged by both, the distance of what it makes from the truth and how far it moves what it is given.
"""

import math

import numpy as np

from downscaling.metrics import judge, replicates, scoring
from downscaling.report import figures, html_page
from downscaling.report.results import Evidence

LEVELS = np.linspace(0.005, 0.995, 100)
JUDGED = (
  "sym_cov_rmse",
  "melr_unweighted",
  "melr_weighted",
  "kld_sum",
  *scoring.HIGHER,
)


def over_floor(table: dict, name: str) -> float | None:
  """Geometric mean of a row's columns JUDGED over the medians of their floors, each at least 1;
  None without any.
  """
  row = table[name]
  pairs = [(row[key], row["floor"].get(key)) for key in JUDGED]
  ratios = [
    max(value / floor[1], 1.0)
    for value, floor in pairs
    if value is not None and floor and floor[1]
  ]
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
    "<p class='note'>corr: correlation of anomalies of T y with those of y. amplitude: √(tr Cov T "
    "y / tr Cov y′), 1 is right. displaced: ‖T y − y‖ over the anomalies of y. excess: E|T y − "
    "y|² / tr Cov y′ beyond what the two covariances ask of any map (the Bures bound). Higher "
    "orders are relative errors: of the bispectrum; of the energy (vorticity: enstrophy) that the "
    "quadratic term moves between shells; of E y⁴/(E y²)² of the field and of its gradients; of "
    "the covariance of squares. AUC: how well a small network tells the row from true fields, .5 "
    "not at all.</p>"
  )
  if e.default:
    text += (
      f"<p class='note'>Samples are drawn behind the map "
      f"<b>{html_page.escape(e.default)}</b>, the default.</p>"
    )
  return text


def transfer_of(x: np.ndarray, judged: judge.Judge) -> np.ndarray:
  """Transfer by shell [K] of coarse rows [S, *coarse]."""
  even = np.ones((1, len(x)), np.float32)
  return replicates.transfer(x, even, judged.reference, judged.quadratic)[0]


def moved(e: Evidence) -> figures.Draw | None:
  """‖T y − y‖ / ‖y‖ of held-out rows by quantile, and how many targets entropic maps average; None
  without maps.
  """
  y = e.coarse.get("lflr")
  rows = {k: x for k, x in e.coarse.items() if k != "lflr" and k not in e.sources}
  if y is None or not rows:
    return None
  size = lambda x: np.linalg.norm(
    np.asarray(x, np.float64).reshape(len(x), -1),
    axis=1,
  )
  shares = {
    name: np.quantile(size(x - y) / size(y), LEVELS)
    for name, x in rows.items()
    if x.shape == y.shape
  }
  targets = {
    name: (np.array([float(q) for q in found]), np.array(list(found.values())))
    for name, found in e.effective_targets.items()
  }
  return figures.moved(LEVELS, shares, targets)


def draw(e: Evidence) -> figures.Draw | None:
  """The front; None if there is no map to show."""
  found = points(e)
  more = {} if e.default is None else {e.default: " (default)"}
  return figures.front(found, more) if len(found) > 1 else None
