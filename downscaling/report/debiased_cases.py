"""The report's section on single debiased fields: y, T y, and the true field that is most like T y.

Columns compare sets. A reader also wants to see fields: is T y one that the truth could have made?
Its nearest true field is looked for among the reference and its images under the grid's symmetries.
How far it is, over the distance from a true field to its own nearest one, orders the rows: the
best, the median and the worst are shown.
"""

import numpy as np

from downscaling.fields import symmetry
from downscaling.report import figures, html_page
from downscaling.report.html_page import Panel, Section
from downscaling.report.results import Evidence

ROWS = 256  # debiased fields that are looked at
TARGETS = 4096  # true fields among which the nearest is looked for
CASES = {"best": 0.0, "median": 0.5, "worst": 1.0}  # quantiles of the distance


def nearest(
  x: np.ndarray, truth: np.ndarray, group: symmetry.Group
) -> tuple[np.ndarray, np.ndarray]:
  """(distances [S], fields [S, D]): of rows x [S, D], the nearest image under the group of a row of
  truth [R, D].

  Distances are root mean squares over points, in units of the field. One element of the group is in
  memory at a time.
  """
  x, truth = (np.asarray(a, np.float32) for a in (x, truth))
  sizes = (truth**2).sum(axis=1)
  best = np.full(len(x), np.inf, np.float32)
  fields = np.zeros_like(x)
  for index, sign in zip(group.index, group.sign, strict=True):
    moved = np.float32(sign) * truth[:, index]
    gap = (x**2).sum(axis=1)[:, None] + sizes - 2 * x @ moved.T
    closest = gap.argmin(axis=1)
    found = gap[np.arange(len(x)), closest]
    better = found < best
    best[better] = found[better]
    fields[better] = moved[closest[better]]
  return np.sqrt(np.maximum(best, 0) / x.shape[1]), fields


def section(e: Evidence) -> Section:
  """Of a report that has debiased fields on a line or a plane."""
  title = "Single debiased fields"
  if e.default not in e.coarse:
    return Section(
      "cases", title, "", html_page.job("debias", "No debiased fields yet:"), []
    )
  some = np.linspace(
    0, len(e.coarse[e.default]) - 1, min(ROWS, len(e.coarse[e.default]))
  ).astype(int)
  true_rows, floor = e.coarse_reference, e.coarse_floor
  assert true_rows is not None  # Evidence has checked it
  assert floor is not None
  shape = true_rows.shape[1:]
  flat = {
    name: np.reshape(e.coarse[name][some], (len(some), -1))
    for name in ("lflr", e.default)
  }
  reference = np.reshape(
    true_rows[:TARGETS],
    (min(TARGETS, len(true_rows)), -1),
  )
  true = np.reshape(
    floor[:ROWS],
    (min(ROWS, len(floor)), -1),
  )
  group = e.group or symmetry.trivial(reference.shape[1])
  apart, fields = nearest(flat[e.default], reference, group)
  usual = nearest(true, reference, group)[0]
  raw = nearest(flat["lflr"], reference, group)[0]
  order, panels = np.argsort(apart), {}
  for name, place in CASES.items():
    row = order[int(place * (len(order) - 1))]
    heading = (
      f"{name}: {apart[row] / np.median(usual):.2f} × the median true field's distance"
    )
    panels[heading] = {
      "lflr": flat["lflr"][row].reshape(shape),
      e.default: flat[e.default][row].reshape(shape),
      "reference": fields[row].reshape(shape),
    }
  draw = _draw(e, panels, shape)
  text = (
    f"y, T y by the map {e.default}, and the true field nearest to T y among {len(reference):,} "
    "and their images under the symmetries. Median distance to the nearest true field: "
    f"{np.median(raw):.3g} before the map, {np.median(apart):.3g} behind it, "
    f"{np.median(usual):.3g} for other true fields."
  )
  lead = (
    "The statistics of a set say nothing of one field. Is T y a field that the truth could "
    "have made?"
  )
  return Section(
    "cases",
    title,
    lead,
    "",
    [Panel("cases", draw, "Debiased fields beside true ones", text)],
  )


def _draw(e: Evidence, panels: dict, shape: tuple[int, ...]) -> figures.Draw:
  if len(shape) == 1:
    at = np.arange(shape[0]) * e.length / shape[0]
    return figures.beside(at, panels, e.u, e.length_unit)
  kinds = {"lflr": "y", e.default: "T y", "reference": "nearest truth"}
  shown = {
    f"{title.split(':')[0]}: {kinds[row]}": x
    for title, rows in panels.items()
    for row, x in rows.items()
  }
  return figures.images(
    shown,
    e.u,
    ("x", "y"),
    (0, e.length, 0, e.length),
  )
