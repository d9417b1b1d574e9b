"""The `evaluate` job's writer: metrics.json, figures as PNG, and one self-contained report.html.

Everything comes from arrays and records handed in (`Evidence`), which finished stages left on disk;
no live model.
"""

import os
from collections.abc import Sequence

import numpy as np

from downscaling.report import html_page, sections, series_section, terminal, themes
from downscaling.report.results import Evidence
from downscaling.runtime import files

__all__ = ["Evidence", "write"]


def write(folder: str | os.PathLike, evidence: Evidence) -> dict:
  """Writes folder/metrics.json, folder/NAME.png for every figure and folder/report.html; returns
  the metrics.

  The folder must exist (stage_folder.open_stage makes it). Raises ValueError, naming the row, for
  NaN or grids that differ; nothing is written then.
  """
  folder = files.as_path(folder)
  metrics = evidence.metrics
  parts = sections.every(evidence)
  if evidence.series is not None:
    parts.insert(-1, series_section.section(evidence))  # before how all was made
  body = [_head(evidence, parts)]
  for part in parts:
    pictures = []
    for panel in part.panels:
      png = themes.render(panel.draw)
      (folder / f"{panel.name}.png").write_bytes(png)
      pictures.append(html_page.picture(png, panel.alt, panel.caption))
    inner = part.html + (
      f'<div class="figures">{"".join(pictures)}</div>' if pictures else ""
    )
    body.append(html_page.section(part.anchor, part.title, part.lead, inner))
  html = html_page.document(
    f"{evidence.title}: statistical downscaling", "\n".join(body)
  )
  with files.all_or_nothing(folder / "report.html") as file:
    file.write(html.encode("utf-8"))
  files.write_json(folder / "metrics.json", metrics)
  return metrics


def write_index(folder: str | os.PathLike, title: str, channels: Sequence[str]) -> dict:
  """folder/report.html with a link to the report of every channel, and folder/metrics.json, which
  holds {"channels": {name: metrics}}; both from the folders that `write` has filled. Returns the
  metrics.
  """
  folder = files.as_path(folder)
  metrics = {
    "channels": {
      name: files.read_json(folder / name / "metrics.json") for name in channels
    }
  }
  links = "".join(
    f'<li><a href="{html_page.escape(name)}/report.html">{html_page.escape(name)}</a></li>'
    for name in channels
  )
  html = html_page.document(
    title, f"<h1>{html_page.escape(title)}</h1><ul>{links}</ul>"
  )
  with files.all_or_nothing(folder / "report.html") as file:
    file.write(html.encode("utf-8"))
  files.write_json(folder / "metrics.json", metrics)
  return metrics


def _head(e: Evidence, parts: list[sections.Section]) -> str:
  links = "".join(
    f'<a href="#{p.anchor}">{html_page.escape(p.title)}</a>' for p in parts
  )
  tiles = "".join(_tiles(e))
  if tiles:
    tiles = f'<div class="tiles">{tiles}</div>'
  return (
    f'<header><p class="kicker">Statistical downscaling</p><h1>{html_page.escape(e.title)}</h1>'
    f'<p class="lead">{html_page.escape(headline(e))}</p>{tiles}'
    f'<nav aria-label="sections">{links}</nav></header>'
  )


def headline(e: Evidence) -> str:
  """One or two sentences on what was run."""
  said = []
  coarse = np.shape(
    next(
      iter(e.coarse.values()),
      np.zeros((0, 0)),
    )
  )
  if e.coarse:
    kind = e.metrics["rows"].get("lflr", "").strip()
    by = f"the {e.default} map" if e.default else "several maps"
    said.append(
      f"{coarse[0]:,} {kind + ' ' if kind else ''}biased coarse fields of {_points(coarse[1:])} "
      f"were carried towards the statistics of the truth by {by}"
    )
  drawn = [n for n in e.samples if n.endswith("+diffusion")]
  if drawn:
    shape = e.samples[drawn[0]].shape
    said.append(
      f"a diffusion prior then drew {shape[1]:,} fine field{'s' if shape[1] > 1 else ''} of "
      f"{_points(shape[2:])} for each of {shape[0]:,} of them"
      if e.coarse
      else f"a diffusion prior drew {shape[1]:,} fields of {_points(shape[2:])} for each of "
      f"{shape[0]:,} coarse ones"
    )
  text = "; ".join(said) + "." if said else "No stage has finished yet."
  text = text[0].upper() + text[1:]
  return text + (" Every number stands beside what true data do." if said else "")


def _points(space: tuple[int, ...]) -> str:
  return " × ".join(map(str, space)) + " points"


def _tiles(e: Evidence) -> list[str]:
  """The few numbers a reader wants first."""
  out, m = [], e.metrics
  debias, samples, behind = m["debias"], m["samples"], f"{e.default}+diffusion"
  for key, name in (
    ("cov_rmse", "Covariance error, debiased"),
    ("melr_weighted", "Spectral error, debiased"),
  ):
    if {"lflr", e.default} <= {*debias}:
      out.append(_from_to(name, debias["lflr"], debias[e.default], key))
  if {behind, "raw+diffusion"} <= {*samples}:
    out.append(
      _from_to(
        "Spectral error, samples",
        samples["raw+diffusion"],
        samples[behind],
        "melr_weighted",
      )
    )
  for c in list(e.calibrations.values())[:1]:
    below = "of the field’s rms, a sample from true coarse values; "
    below += f"spread / error {c.spread_error:.2f}"
    out.append(
      html_page.tile(f"{100 * c.member_rmse:.3g} %", "Error against the truth", below)
    )
  return out


def _from_to(name: str, before: dict, after: dict, key: str) -> str:
  floor = after["floor"].get(key)
  below = f"{_TITLES[key]}, raw → debiased; true data {terminal.between(floor)}"
  return html_page.tile(
    f"<i>{terminal.shown(before[key])} →</i> {terminal.shown(after[key])}", name, below
  )


_TITLES = {"cov_rmse": "covRMSE", "melr_weighted": "MELRw"}
