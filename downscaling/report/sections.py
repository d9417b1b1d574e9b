"""The report's sections: each turns evidence into text, tables and figures, or says which job is
still to run.
"""

import json

import numpy as np

from downscaling.metrics import (
  bootstrap,
  calibration,
  distances,
  judge,
  scoring,
  spectra,
)
from downscaling.report import (
  debiased_cases,
  figures,
  galleries,
  html_page,
  map_fronts,
  published,
  run_cost,
  terminal,
)
from downscaling.report.html_page import Panel, Section
from downscaling.report.results import Evidence
from downscaling.report.themes import label

POOLED = 100_000  # values in a one-point density


def every(e: Evidence) -> list[Section]:
  """All sections in the order of the page."""
  return [
    part(e)
    for part in (
      scores,
      spectrum,
      density,
      galleries.gallery,
      galleries.rows,
      covariance,
      debiased_cases.section,
      transfer,
      fits,
      truth,
      run_cost.section,
      run,
    )
  ]


def _levels(e: Evidence) -> list[tuple[str, dict, np.ndarray, np.ndarray]]:
  """(coarse or fine, {row: fields}, reference, further true fields) for what there is."""
  out = []
  if e.coarse:
    out.append(("coarse", dict(e.coarse), e.coarse_reference, e.coarse_floor))
  if e.samples:
    rows = {name: first.members for name, first in e.firsts.items()}
    out.append(("fine", rows, e.fine_reference, e.fine_floor))
  return out


def _band(e: Evidence, level: str) -> np.ndarray:
  """[3, K]: energies of true sets, of the size that the first row of the level has."""
  judged, rows = (
    (e.coarse_judge, e.coarse) if level == "coarse" else (e.fine_judge, e.samples)
  )
  name, first = next(iter(rows.items()))
  return judged.band(e.origins.get(name) or bootstrap.single(len(first)))


# ---------------------------------------------------------------- tables


def scores(e: Evidence) -> Section:
  m, body = e.metrics, ""
  lead = (
    "Smaller is better, but for corr and amplitude, where 1 is right, and AUC, where .5 is. Each "
    "value stands with half of its 95 % interval. Shaded values lie inside what true data do: of "
    "true sets with as many rows of as many trajectories, compared with the same reference, 95 % "
    "lie between the numbers of the last rows."
  )
  if m["debias"]:
    body += "<h3>Coarse fields: before and after debiasing</h3>" + _table(
      e, "debias", terminal.DEBIAS_COLUMNS
    )
    if e.experiment in published.NUMBERS:
      body += (
        '<p class="note">Paper: Wan et al. 2023, Table 1. Its sample sizes, and so its '
        "floors, are not published; "
        "its KLD is read as a sum over dimensions. Its OT is an entropic map.</p>"
      )
    body += '<p class="note">symcov: covRMSE after averaging over the equation’s symmetries.</p>'
    body += "<h3>Coarse fields: higher orders</h3>" + _table(
      e, "debias", terminal.HIGHER_COLUMNS
    )
    body += "<h3>Coarse fields: what a map keeps of its input</h3>" + _table(
      e, "debias", terminal.KEPT_COLUMNS
    )
    body += map_fronts.note(e)
  else:
    body += html_page.job("debias", "No debiased fields yet:")
  if m["samples"]:
    body += "<h3>Fine samples</h3>" + _table(e, "samples", terminal.SAMPLE_COLUMNS)
    body += "<h3>Fine samples: members and conditions</h3>" + _table(
      e, "samples", terminal.MEMBER_COLUMNS
    )
    body += (
      '<p class="note">One member a condition is compared with the reference; variab. '
      "(spread of a condition’s "
      "members, in units of the field) and constr. (‖C′x − y′‖ / ‖C′x‖) see all members. MELRe: "
      "MELRu over the shells that hold 99.9999 % of the reference’s energy; beyond them rounding "
      "is measured. KLD is summed over points, in nats. corr(C′x): correlation of C′x with y′, "
      "less than 1 where the condition is not met exactly. χ²: misfit of the unguided denoiser to "
      "the condition, 1 where it is what the prior expects, large where the coarse field lies "
      "outside what the prior knows.</p>"
    )
  else:
    body += html_page.job("sample", "No samples yet:")
  swatch = '<p class="note"><span class="swatch"></span>inside what true data do'
  swatch += "; † fewer than 200 fields: what true data do is wide, and the shade says little</p>"
  return Section("scores", "Scores", lead, swatch + body, [])


def _table(e: Evidence, part: str, columns: dict[str, str]) -> str:
  table, kinds, rows = e.metrics[part], e.metrics["rows"], []
  for name, values in table.items():
    cells = [(f"{values['n']:,}", "", False), *(_cell(values, key) for key in columns)]
    few = "†" if values["n"] < bootstrap.FEW else ""
    chosen = " (default)" if name == e.default else ""
    rows.append(
      html_page.row(
        label(name) + chosen + few,
        cells,
        kinds.get(name, ""),
      )
    )
    paper = (
      published.beside(e.experiment, name)
      if columns is terminal.DEBIAS_COLUMNS
      else None
    )
    if paper:
      cells = [
        (terminal.shown(paper[k]) if k in paper else "", "", False) for k in columns
      ]
      title = f"{published.NAMES[name]}, the paper’s"
      rows.append(
        html_page.row(
          title,
          [("", "", False), *cells],
          kind="paper",
        )
      )
  if any(key in scoring.COMPARED for key in columns):
    rows += [
      _floor_row(count, floor, columns)
      for (count, _), floor in scoring.floors(table).items()
    ]
  return html_page.table(["", "n", *columns.values()], rows)


def _cell(values: dict, key: str) -> tuple[str, str, bool]:
  """(value, half of its interval, is it inside what true data do?)"""
  ends = values["interval"].get(key)
  below = "" if ends is None else f"± {terminal.shown((ends[1] - ends[0]) / 2)}"
  return (
    terminal.shown(values[key]),
    below,
    judge.inside(values[key], values["floor"].get(key)),
  )


def _floor_row(count: int, floor: dict, columns: dict[str, str]) -> str:
  cells = [(f"{count:,}", "", False)]
  for key in columns:
    known = floor.get(key) if key in scoring.COMPARED else None
    middle = "" if known is None else f"median {terminal.shown(known[1])}"
    cells.append((terminal.between(known), middle, False))
  return html_page.row("True data", cells, "95 % of true sets", "floor")


# ---------------------------------------------------------------- distributions


def spectrum(e: Evidence) -> Section:
  panels = []
  for level, rows, _, _ in _levels(e):
    judge = e.coarse_judge if level == "coarse" else e.fine_judge
    reference, shells = judge.reference.energies, judge.reference.shells
    judged = {name: x for name, x in rows.items() if not name.endswith("in-sample")}
    drawn = {name: spectra.energies(x, name, shells) for name, x in judged.items()}
    held = spectra.energy_holding_shells(reference)
    draw = figures.spectrum(reference, drawn, _band(e, level), held)
    text = {
      "coarse": (
        "Coarse fields. A debiased spectrum should lie in the grey band, where other true fields "
        "lie."
      ),
      "fine": (
        "Fine samples, one a condition. Right of the dotted line less than a millionth of the "
        "energy is left."
      ),
    }[level]
    panels.append(
      Panel(f"spectrum_{level}", draw, f"Energy spectra of {level} fields", text)
    )
  lead = (
    "Energy by wavenumber, and its ratio to the reference. "
    "Band: 95 % of true sets of that size."
  )
  return Section(
    "spectra",
    "Spectra",
    lead,
    "" if panels else html_page.job("debias", "Nothing to compare yet:"),
    panels,
  )


def density(e: Evidence) -> Section:
  panels = []
  for level, rows, ref, floor in _levels(e):
    pooled = {
      name: _pool(x) for name, x in (rows | {"reference": ref, "floor": floor}).items()
    }
    low = min(v.min() for v in pooled.values())
    high = max(v.max() for v in pooled.values())
    at = np.linspace(low, high, 400)
    values = {
      name: distances.kernel_density(x, at)
      for name, x in pooled.items()
      if np.ptp(x) > 0
    }
    if "reference" not in values or "floor" not in values:
      continue
    reference, second = values.pop("reference"), values.pop("floor")
    draw = figures.density(at, reference, values, second, e.u)
    panels.append(
      Panel(
        f"density_{level}",
        draw,
        f"Densities of {level} values",
        f"{level.capitalize()} values, all points pooled.",
      )
    )
  lead = (
    "How often each value occurs, all points together, on a log axis: the tails are where "
    "debiasing is hardest."
  )
  return Section(
    "densities",
    "One-point densities",
    lead,
    "" if panels else html_page.job("debias", "Nothing to compare yet:"),
    panels,
  )


def _pool(x: np.ndarray) -> np.ndarray:
  flat = np.asarray(x).reshape(-1)
  return flat[:: -(-flat.size // POOLED)].astype(np.float64)


def covariance(e: Evidence) -> Section:
  panels = []
  for level, rows, ref, _ in _levels(e):
    flat = ref.ndim == 2 and ref.shape[1] <= 512
    table = (
      (lambda x: distances.covariance(distances.rows(x, "fields")))
      if flat
      else _two_point
    )
    reference = table(ref)
    wanted = ("lflr", e.default) if level == "coarse" else (f"{e.default}+diffusion",)
    shown = [name for name in wanted if name in rows]
    for name in map(str, shown or list(rows)[:1]):
      pred = table(rows[name])
      draw = figures.covariances(
        {"reference": reference, label(name): pred, "difference": pred - reference},
        f"{e.unit or e.symbol}²",
      )
      what = (
        "covariance of every pair of points"
        if flat
        else "covariance with the centre point"
      )
      text = f"{label(name)}, {level}: {what}; the difference on its own scale."
      panels.append(
        Panel(
          f"covariance_{level}_{name.replace('+', '_')}",
          draw,
          f"Covariance, {label(name)}",
          text,
        )
      )
  return Section(
    "covariances",
    "Covariances",
    "",
    "" if panels else html_page.job("debias", "Nothing to compare yet:"),
    panels,
  )


def _two_point(x: np.ndarray) -> np.ndarray:
  """Covariance of every point with the centre one, [N₀, N₁] (or [1, N])."""
  x = np.asarray(x, np.float64) - np.mean(x, axis=0, dtype=np.float64)
  centre = x[(slice(None), *(n // 2 for n in x.shape[1:]))]
  return np.atleast_2d(np.tensordot(centre, x, axes=(0, 0)) / (len(x) - 1))


def transfer(e: Evidence) -> Section:
  """A statistic of third order that no spectrum shows: how the quadratic term moves energy between
  shells.
  """
  title = "Transfer between scales"
  if e.quadratic is None:
    return Section(
      "transfer",
      title,
      "",
      '<p class="note">The equation has no quadratic term.</p>',
      [],
    )
  if not e.coarse:
    return Section(
      "transfer", title, "", html_page.job("debias", "No debiased fields yet:"), []
    )
  judged = e.coarse_judge
  assert judged.group is not None  # of coarse rows there is one
  reference = judged.reference.higher(e.quadratic, judged.group)["transfer"]
  rows = {name: x for name, x in e.coarse.items() if not name.endswith("in-sample")}
  drawn = {name: map_fronts.transfer_of(x, judged) for name, x in rows.items()}
  name, first = next(iter(rows.items()))
  band = judged.transfer_band(e.origins.get(name) or bootstrap.single(len(first)))
  draw = figures.transfer(reference, drawn, band, e.symbol)
  text = (
    "Any Gaussian map has the right spectrum; only a map with the right third moments has "
    "the right transfer."
  )
  lead = "What the equation’s quadratic term takes from and gives to each shell, in coarse fields."
  return Section(
    "transfer", title, lead, "", [Panel("transfer", draw, "Transfer by shell", text)]
  )


# ---------------------------------------------------------------- the jobs behind it


def fits(e: Evidence) -> Section:
  panels, text = [], ""
  if e.coarse and (draw := map_fronts.draw(e)):
    caption = (
      "Debiasing maps on held-out fields: how far they move them beyond need, and the geometric "
      "mean of the errors of their statistics over the floors. Best is bottom left."
    )
    panels.append(Panel("front", draw, "Statistics against displacement", caption))
  if e.coarse and (draw := map_fronts.moved(e)):
    caption = (
      "Left: how far a held-out field is moved, over its own size, "
      "by quantile of the fields."
    )
    if e.effective_targets:
      caption += (
        " Right: over how many targets an entropic map averages; "
        "at 1 it looks up the nearest."
      )
    panels.append(Panel("moved", draw, "Displacement by quantile", caption))
  text += _health(e)
  record = e.convergence()
  if record:
    unit = "of mean cost" if e.mean_cost else "absolute"
    steps, epsilon, error = (values[-1] for values in record)
    caption = (
      f"Sinkhorn: after {int(steps):,} iterations, ε at {epsilon:.2g} ({unit}), the error is "
      f"{error:.1e}."
    )
    draw = figures.convergence(*record, e.threshold, unit)
    panels.append(Panel("sinkhorn", draw, "Marginal error by iteration", caption))
  else:
    text += html_page.job("debias", "No record of a Sinkhorn solve:")
  if e.loss is not None and len(e.loss[0]):
    steps, values = (np.asarray(v, np.float64) for v in e.loss)
    tail = values[-max(len(values) // 20, 1) :].mean()
    caption = (
      f"Training: {int(steps[-1]):,} steps; mean loss over the last twentieth of the record "
      f"{tail:.4g}."
    )
    panels.append(
      Panel("loss", figures.loss(steps, values), "Training loss by step", caption)
    )
  else:
    text += html_page.job("train", "No record of the training loss:")
  return Section(
    "fits", "Debiasing maps, Sinkhorn convergence, training loss", "", text, panels
  )


def _health(e: Evidence) -> str:
  """What the debias job found of its rows and maps: warnings in words, the rest as a count."""
  if not e.health:
    return ""
  told = [found for found in e.health if found["level"] != "ok"]
  pairs = [
    (f"{found['level']}, {label(found['map'] or 'all maps')}", found["message"])
    for found in told
  ]
  fine = len(e.health) - len(told)
  note = (
    f"{fine} of {len(e.health)} checks of rows and maps found nothing; all of them stand in "
    "diagnostics.json."
  )
  body = html_page.facts(pairs) if pairs else ""
  return f"<h3>Health of the maps</h3>{body}<p class='note'>{note}</p>"


def truth(e: Evidence) -> Section:
  title, found = "Against held-out truth", e.calibrations
  if not found:
    return Section(
      "truth",
      title,
      "",
      html_page.job(
        "sample", "No ensemble (two members or more) drawn for true coarse fields:"
      ),
      [],
    )
  lead = (
    "Fields the prior never saw were coarsened by C′ and sampled from their own coarse values. "
    "All errors are over the rms of the field. A right ensemble has spread / error 1, flat ranks, "
    "and intervals that hold the truth as often as they say."
  )
  head = [
    "",
    "K × M",
    "member RMSE",
    "mean RMSE",
    "spread",
    "spread / error",
    "CRPS",
    "energy",
    "in 50 %",
    "in 90 %",
    "pinned",
  ]
  rows = []
  for name, c in found.items():
    numbers = [
      c.member_rmse,
      c.mean_rmse,
      c.spread,
      c.spread_error,
      c.crps,
      c.energy,
    ]
    cells = [
      (f"{c.conditions} × {c.members}", "", False),
      *((terminal.shown(v), "", False) for v in numbers),
    ]
    cells += [
      (f"{100 * v:.0f} %", f"ideal {100 * c.ideal[level]:.0f} %", False)
      for level, v in c.coverage.items()
    ]
    rows.append(
      html_page.row(label(name), [*cells, (f"{100 * c.pinned:.3g} %", "", False)])
    )
    for kind, r in e.references[name].items():
      shown = [
        "",
        terminal.shown(r.error),
        "",
        "",
        "",
        terminal.shown(r.crps),
        terminal.shown(r.energy),
        "",
        "",
        "",
      ]
      rows.append(
        html_page.row(
          kind.capitalize(),
          [(text, "", False) for text in shown],
          "for comparison",
          "floor",
        )
      )
  note = (
    '<p class="note">Mean RMSE: of the ensemble mean. spread / error carries the factor √((M '
    "+ 1)/M) that a finite "
    "ensemble needs. CRPS is the fair one; energy is the same score of whole fields. Climatology: "
    "other true fields as members. Pinned points, which the constraint fixes, are left out of "
    "ranks and intervals. Ideal: what a perfect ensemble of M members covers.</p>"
  )
  panels = [
    Panel("ranks", figures.ranks({n: c.ranks for n, c in found.items()}), "Rank histogram",
          "Where the truth ranks among the members: ∪ means too little spread, ∩ too much, a "
          "slope bias."),
    Panel(
      "spread_error",
      figures.spread_error({n: calibration.by_condition(*e.whole(n)) for n in found}),
      "Spread and error by condition",
      "One dot a condition: does the ensemble know which conditions are hard?",
    ),
  ]  # fmt: skip
  return Section("truth", title, lead, html_page.table(head, rows) + note, panels)


def run(e: Evidence) -> Section:
  m, given = e.metrics, e.provenance
  command = html_page.escape(given.get("command") or "not recorded")
  body = f"<h3>Command</h3><pre class=wrap>{command}</pre>"
  seconds = [(stage, _duration(s)) for stage, s in m["seconds"].items()]
  if len(seconds) > 1:
    seconds.append(("together", _duration(sum(m["seconds"].values()))))
  blocks = {
    "Time of the stages": seconds,
    "Machine": m["machine"].items(),
    "Rows": [(label(k), v) for k, v in m["rows"].items()],
    "Seeds": m["seeds"].items(),
    "Sizes": [
      (k, " × ".join(map(str, v)) if isinstance(v, list) else v)
      for k, v in m["sizes"].items()
    ],
    "Versions": [
      *m["versions"].items(),
      ("commit", m["commit"] or "unknown"),
      ("config hash", m["config_hash"]),
    ],
  }
  parts = [
    f"<div><h3>{title}</h3>{html_page.facts(pairs)}</div>"
    for title, pairs in blocks.items()
    if pairs
  ]
  body += f'<div class="pair">{"".join(parts)}</div>'
  config = given.get("config")
  if config:
    text = html_page.escape(json.dumps(config, indent=2, default=str))
    body += (
      f"<details><summary>The whole configuration</summary><pre>{text}</pre></details>"
    )
  return Section("run", "How this was made", "", body, [])


def _duration(seconds: float) -> str:
  if seconds < 120:
    return f"{seconds:.3g} s"
  minutes = seconds / 60
  return f"{minutes:.3g} min" if minutes < 120 else f"{minutes / 60:.3g} h"
