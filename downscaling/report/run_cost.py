"""What a run cost: seconds a snapshot, a training step and a member, on which devices, beside those
of KS.
"""

from downscaling.report import html_page, terminal
from downscaling.report.html_page import Section
from downscaling.report.results import Evidence

ROWS = {
  "data": ("Snapshot", "both worlds together"),
  "train": ("Training step", "with evaluations and checkpoints"),
  "samples": ("Member", "a field of any of the sets"),
}
# The run of docs/results/ks: configs/ks.py:full, 192 points -> 24, training batch 128, 24 sampling
# steps (48 where there is no condition); two cores of an AMD EPYC, beside other work. (count,
# seconds), from its metrics.json.
KS = {
  "data": (151_552, 104.06),
  "train": (8000, 4102.14),
  "samples": (26_624, 853.51),
}


def section(e: Evidence) -> Section:
  """provenance["cost"]: {stage of ROWS: {"count", "seconds", "devices" [str]; of train also
  "batch", "median"}}.
  """
  title, found = "Cost", e.metrics["cost"]
  if not found:
    return Section("cost", title, "", '<p class="note">Not recorded.</p>', [])
  beside = not e.experiment.startswith("ks")
  head = [
    "",
    "how many",
    "seconds",
    "seconds each",
    *(["KS, each"] if beside else []),
    "devices",
  ]
  rows = []
  for stage, (name, under) in ROWS.items():
    if stage not in found:
      continue
    given, (count, seconds) = found[stage], KS[stage]
    if "batch" in given:
      name = f"{name}, batch {given['batch']}"
    rows.append(
      _row(
        name,
        under,
        given["count"],
        given["seconds"],
        beside and seconds / count,
        given["devices"],
      )
    )
    if "median" in given:
      rows.append(
        _row(
          "of it, the step alone",
          "median of the record",
          None,
          None,
          beside and "",
          [],
          given["median"],
        )
      )
  lead = (
    "Wall time of all calls of a stage over what they made. Resumed stages: the calls are added "
    "up, with compilation, waiting for data, and what an interruption lost and the next call made "
    "again."
  )
  note = (
    '<p class="note">KS: 192 points from 24, training batch 128, the run of docs/results/ks, '
    "on two cores of an AMD "
    "EPYC beside other work; compare it with runs on such a machine only.</p>"
  )
  return Section(
    "cost", title, lead, html_page.table(head, rows) + (note if beside else ""), []
  )


def _row(name, under, count, seconds, ks, devices, each=None) -> str:
  """ks: seconds each, "" for none, False for no such column."""
  if each is None and seconds is not None and count:
    each = seconds / count
  numbers = [
    "" if count is None else f"{count:,}",
    "" if seconds is None else f"{seconds:,.4g}",
    terminal.shown(each),
  ]
  if ks is not False:
    numbers.append(ks if ks == "" else terminal.shown(ks))
  words = "; ".join(devices) or ("not recorded" if count is not None else "")
  return html_page.row(
    name,
    [(text, "", False) for text in (*numbers, words)],
    under,
  )
