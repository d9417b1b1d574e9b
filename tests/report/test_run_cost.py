"""The table of what a run cost: counts, seconds, seconds each, and KS's from the run that is
committed.
"""

import json
import pathlib
import re

from downscaling import experiment
from downscaling.report import results, run_cost

ROOT = pathlib.Path(__file__).parents[2]
COST = {
  "data": {"count": 2000, "seconds": 500.0, "devices": ["1 × cpu on 2 cores a host"]},
  "train": {
    "count": 1000, "seconds": 400.0, "devices": ["1 × cpu on 2 cores a host", "8 × NVIDIA H200"],
    "batch": 16, "median": 0.3,
  },
  "samples": {"count": 64, "seconds": None, "devices": []},
}  # fmt: skip


def cells(html):
  """{row: its cells} of the page's table, without small print."""
  rows = re.findall(
    r"<tr[^>]*><th scope=\"row\">(.*?)</th>(.*?)</tr>",
    re.sub(r"<small>.*?</small>", "", html),
  )
  return {name: re.findall(r"<td>(.*?)</td>", rest) for name, rest in rows}


def section(experiment, cost):
  return run_cost.section(
    results.Evidence(experiment=experiment, provenance={"cost": cost})
  )


def test_seconds_over_counts_beside_ks():
  found = cells(section("kolmogorov-8x", COST).html)
  assert found == {
    "Snapshot": ["2,000", "500", "0.250", "7e-04", "1 × cpu on 2 cores a host"],
    "Training step, batch 16": [
      "1,000",
      "400",
      "0.400",
      "0.513",
      "1 × cpu on 2 cores a host; 8 × NVIDIA H200",
    ],
    "of it, the step alone": ["", "", "0.300", "", ""],
    "Member": ["64", "", "–", "0.032", "not recorded"],
  }


def test_ks_beside_itself_is_not_shown():
  html = section("ks-8x", COST).html
  assert cells(html)["Snapshot"] == [
    "2,000",
    "500",
    "0.250",
    "1 × cpu on 2 cores a host",
  ]
  assert "KS" not in html


def test_nothing_recorded():
  assert section("kolmogorov-8x", {}).html == '<p class="note">Not recorded.</p>'


def test_the_figures_of_ks_are_those_of_its_committed_run():
  metrics = json.loads((ROOT / "docs" / "results" / "ks" / "metrics.json").read_text())
  config = experiment.load("ks:full")
  data = config.data
  trajectories = sum(
    sum(data.trajectories(world).values()) for world in ("hfhr", "lflr")
  )
  sets = [
    v
    for k, v in metrics["sizes"].items()
    if k.startswith("samples.") and not k.endswith("cubic")
  ]
  # Else its steps are not the config's.
  assert "--config.train" not in metrics["command"]
  counts = {
    "data": data.snapshots * trajectories,
    "train": config.train.total_steps,
    "samples": sum(k * m for k, m, _ in sets),
  }
  assert {
    stage: (counts[stage], metrics["seconds"][stage]) for stage in counts
  } == run_cost.KS
