"""The report's pictures of fields: a gallery of samples, and rows of fields as images."""

import numpy as np

from downscaling.metrics.distances import Members
from downscaling.report import figures, html_page
from downscaling.report.html_page import Panel, Section
from downscaling.report.results import Evidence
from downscaling.report.themes import label

GALLERY = 4  # conditions drawn
MEMBERS = 8  # members drawn of a condition
STRIPES = 40  # snapshots in a picture of rows


def gallery(e: Evidence) -> Section:
  panels = []
  for name in [n for n in e.samples if n in e.conditions]:
    x, y, truth = e.samples[name], e.conditions.get(name), e.truth.get(name)
    chosen = np.unique(np.linspace(0, len(x) - 1, GALLERY).astype(int))
    if x.ndim == 3:
      draw = _curves(e, name, chosen)
      text = (
        f"{label(name)}: {_of_members(x)}. Dots are the coarse values each sample was asked "
        f"to pass through"
      )
      text += ", the dashed line the true field." if truth is not None else "."
    else:
      draw = _maps(
        e,
        _first(x, chosen[:3]),
        None if y is None else y[chosen[:3]],
        None if truth is None else truth[chosen[:3]],
      )
      text = f"{label(name)}: a line of pictures for every condition."
    panels.append(
      Panel(f"gallery_{name.replace('+', '_')}", draw, f"Samples, {label(name)}", text)
    )
  return Section(
    "gallery",
    "Samples",
    "",
    "" if panels else html_page.job("sample", "No samples yet:"),
    panels,
  )


def _of_members(x: Members) -> str:
  return (
    "one field a condition"
    if x.shape[1] == 1
    else f"{min(x.shape[1], MEMBERS)} of {x.shape[1]} members, the first in bold"
  )


def _first(x: Members, chosen: np.ndarray) -> np.ndarray:
  """The first members of some conditions, [k, ≤ MEMBERS, *space], read one condition at a time."""
  return np.stack([x[k][:MEMBERS].copy() for k in chosen])


def _curves(e: Evidence, name: str, chosen: np.ndarray) -> figures.Draw:
  x, y, truth = (
    _first(e.samples[name], chosen),
    e.conditions.get(name),
    e.truth.get(name),
  )
  at = np.arange(x.shape[2]) * e.length / x.shape[2]
  where = None if y is None else _places(e, at, np.shape(y)[1])
  panels = [
    {
      "members": members,
      "at": where,
      "condition": None if y is None else y[k],
      "truth": None if truth is None else truth[k],
    }
    for k, members in zip(chosen, x, strict=True)
  ]
  return figures.curves(at, panels, name, e.u, e.length_unit)


def _places(e: Evidence, at: np.ndarray, coarse: int) -> np.ndarray:
  """Where the coarse values sit: C′ of the coordinates, so that block means sit in their middle."""
  if e.operator is None or e.operator.coarse != (coarse,):
    return at[:: max(len(at) // coarse, 1)][:coarse]
  return np.asarray(e.operator.apply(at.astype(np.float32)[:, None]))[:, 0]


def _maps(
  e: Evidence, x: np.ndarray, y: np.ndarray | None, truth: np.ndarray | None
) -> figures.Draw:
  panels = {}
  for k in range(len(x)):
    number = f"{k + 1}: "
    if y is not None:
      panels[number + "condition"] = y[k]
    panels[number + "member 1"] = x[k, 0]
    if truth is not None:
      panels[number + "truth"] = truth[k]
    elif x.shape[1] > 1:
      panels[number + "member 2"] = x[k, 1]
  unit = f" ({e.length_unit})" if e.length_unit else ""
  return figures.images(
    panels, e.u, (f"x{unit}", f"y{unit}"), (0, e.length, 0, e.length)
  )


def rows(e: Evidence) -> Section:
  """Rows of fields as images: truth beside its samples, and reference beside samples."""
  panels = []
  if not e.samples or e.fine_reference is None or e.fine_reference.ndim != 2:
    text = "" if e.samples else html_page.job("sample", "No samples yet:")
    return Section(
      "pictures",
      "Fields beside fields",
      "",
      text or "<p>The maps above show whole fields.</p>",
      [],
    )
  for name, true in e.truth.items():
    kept, x, _ = e.firsts[name]
    true = true[kept]
    order = _by_phase(true)[:STRIPES]
    shown = {
      "truth": true[order],
      "one sample": x[order],
      "difference": x[order] - true[order],
    }
    text = (
      f"{label(name)}: {len(order)} held-out fields as rows, a sample of each from its coarse "
      f"points, the difference."
    )
    panels.append(_stripes(e, f"rows_{name}", shown, text))
  wanted = (f"{e.default}+diffusion", "raw+diffusion", "unconditional")
  chosen = {label(n): e.firsts[n].members for n in wanted if n in e.samples}
  sets = {
    "reference": e.fine_reference,
    **dict(list(chosen.items())[:2]),
  }
  count = min(STRIPES, *(len(x) for x in sets.values()))
  shown = {name: x[:count][_by_phase(x[:count])] for name, x in sets.items()}
  text = (
    f"{count} fields of each set, a row each: unpaired, so rows of one image have no partners "
    f"in the others."
  )
  panels.insert(0, _stripes(e, "rows_reference", shown, text))
  lead = (
    "Each row of an image is one field, coloured by its value. Rows are ordered by the phase "
    "of the strongest wave."
  )
  return Section("pictures", "Fields beside fields", lead, "", panels)


def _stripes(
  e: Evidence,
  name: str,
  shown: dict[str, np.ndarray],
  text: str,
) -> Panel:
  unit = f" ({e.length_unit})" if e.length_unit else ""
  extent = (0, e.length, 0, len(next(iter(shown.values()))))
  return Panel(
    name.replace("+", "_"),
    figures.images(shown, e.u, (f"x{unit}", "field"), extent),
    "Fields as rows",
    text,
  )


def _by_phase(x: np.ndarray) -> np.ndarray:
  """Order of the rows of [S, N] by the phase of the mode that is strongest over all of them."""
  modes = np.fft.rfft(np.asarray(x, np.float64), axis=1)
  strongest = 1 + int(np.argmax((np.abs(modes[:, 1:]) ** 2).mean(axis=0)))
  return np.argsort(np.angle(modes[:, strongest]), kind="stable")
