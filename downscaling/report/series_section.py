"""The report's section on series: a table of increments, and Hovmöller diagrams of samples beside
truth.
"""

import numpy as np

from downscaling.metrics.increments import EXCHANGED, exchanged
from downscaling.report import figures, html_page, terminal
from downscaling.report.html_page import Panel, Section
from downscaling.report.results import Evidence
from downscaling.report.themes import label

COLUMNS = {
  "increment": "all steps",
  "within": "within windows",
  "seams": "across seams",
  "melr": "MELRw",
  "condition": "its conditions",
}


def section(e: Evidence) -> Section:
  """Of a report that has series."""
  found = e.metrics["series"]
  lead = (
    "Do members go on in time? The mean squared increment from one frame to the next, over that "
    "of true series: more than 1 means jumps, less that frames stick together. Elsewhere on this "
    "page every frame is a field of its own."
  )
  rows = []
  for name, values in found.items():
    cells = [(terminal.shown(values[key]), "", False) for key in COLUMNS]
    if name == "floor":
      rows.append(html_page.row("Floor", cells, "true series, independent", "floor"))
    elif name.endswith(EXCHANGED):
      rows.append(
        html_page.row(
          "members exchanged", cells, "each frame from another member", "floor"
        )
      )
    else:
      rows.append(html_page.row(label(name), cells))
  note = (
    '<p class="note">Across seams: steps at which another set of windows takes over; they '
    "should be like the others. "
    "MELRw: mean |ln| of the increments’ energies over the truth’s, by shell. Members exchanged: "
    "the set above with each frame taken from another member, as good frame by frame, but "
    "independent in time beyond its condition. Its conditions: increments of the coarse series "
    "over those of coarsened true ones; debiasing acts frame by frame and does not change how "
    "fast the coarse world moves.</p>"
  )
  assert e.series is not None
  on_a_line = np.ndim(e.series.reference) == 3
  panels = [_hovmoeller(e, name) for name in e.series.truth] if on_a_line else []
  return Section(
    "series",
    "In time",
    lead,
    html_page.table(["", *COLUMNS.values()], rows) + note,
    panels,
  )


def _hovmoeller(e: Evidence, name: str) -> Panel:
  """Space across, time upwards: truth, one member, and what exchanged members make of it."""
  assert e.series is not None
  members, true = e.series.samples[name][0], e.series.truth[name][0]
  shown = {"truth": true, "one member": members[0]}
  if len(members) > 1:
    shown["members exchanged"] = exchanged(members)[0]
  unit = f" ({e.length_unit})" if e.length_unit else ""
  extent = (0, e.length, 0, len(true) * e.series.spacing)
  draw = figures.images(shown, e.u, (f"x{unit}", "time"), extent)
  text = (
    f"{label(name)}: a held-out series, a member drawn from its coarse points, and one with a "
    f"new member every frame."
  )
  return Panel(
    f"hovmoeller_{name.replace('+', '_')}",
    draw,
    f"Hovmöller diagrams, {label(name)}",
    text,
  )
