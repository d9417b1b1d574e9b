"""Debiasing maps of the Kolmogorov flow on 32² and 16² points: Table 1 of the paper, and what it
does not show.

  python benchmarks/flow_maps.py --data=runs/kolmogorov/data [--fine=128] [--points=32,16]
                                 [--maps=0.0003,G,GQG] [--rows=2048] [--out=docs/results/kolmogorov]

DATA holds a finished `generate` of configs/kolmogorov.py:cpu. Fits see all training rows; --rows
held-out biased rows are carried over and compared with as many true ones of the test split; floor:
as many of the validation split. 16² is every second point of 32², in both worlds, as C′ is strided.
A map is a number, ε of the entropic one as a share of the mean cost, or a recipe of steps
(debias/equivariant/recipes.py). in-sample: rows of the fit against the target rows of the fit, as
the paper's table seems to be: covRMSE and KLD then look better than any independent rows can.
excess: displacement beyond the Bures bound. Columns are of metrics/; KLD mean is a point's. Writes
maps.json.
"""

import argparse
import json
import pathlib
import time

import numpy as np

from downscaling.datasets import simulated
from downscaling.debias.entropic import entropic_map, sinkhorn
from downscaling.debias.equivariant import recipes
from downscaling.equations import kolmogorov
from downscaling.fields import quadratic as quadratic_terms
from downscaling.metrics import scoring

COLUMNS = {
  "cov_rmse": "covRMSE", "sym_cov_rmse": "symcov", "melr_unweighted": "MELRu",
  "melr_weighted": "MELRw",
  "kld_sum": "KLDsum", "kld_mean": "KLD", "transfer": "transf.", "flatness": "flatn.",
  "gradient_flatness": "∇flatn.",
  "square_covariance": "sq.cov.", "corr_input": "corr", "excess": "excess",
}  # fmt: skip
PAPER = {32: "kolmogorov-8x", 16: "kolmogorov-16x"}


def rows(data, which, fine, split, count=None):
  """[S, 32, 32] float32."""
  space = (fine, fine) if which == "hfhr" else (32, 32)
  found = simulated.load(
    simulated.make("kolmogorov", which, data, space), split, count
  )["u"][..., 0]
  return found[:, :: space[0] // 32, :: space[0] // 32]


def fit(kind, x, y, group):
  """(map, what is to say of it)."""
  try:
    epsilon = float(kind)
  except ValueError:
    term = quadratic_terms.advection(x.shape[1:-1])
    return recipes.fit(x, y, group=group, recipe=kind, quadratic=term), ""
  flat = [a.reshape(len(a), -1) for a in (x, y)]
  done = sinkhorn.fit(*flat, epsilon=epsilon, threshold=1e-3, max_iterations=3000)
  made = entropic_map.EntropicMap(flat[1], done.g, done.epsilon, x.shape[1:])
  return made, "" if done.converged else "not converged"


class Table:
  """Rows of one grid, printed as they come."""

  def __init__(self, points, reference, truth, group):
    self.group, self.rows, self.points = group, [], points
    self.references = {
      "held-out": scoring.Reference(reference),
      "in-sample": scoring.Reference(truth),
    }
    print(
      f"\n{points}²\n{'':<29}{'fit, s':>8}"
      + "".join(f"{h:>9}" for h in COLUMNS.values()),
      flush=True,
    )

  def add(self, name, mapped, source=None, *, seconds=None, of="held-out", note=""):
    found = scoring.measure(
      mapped,
      self.references[of],
      group=self.group,
      source=source,
      quadratic=quadratic_terms.advection(mapped.shape[1:]),
    )
    name += "" if of == "held-out" else ", in-sample"
    self.rows.append(
      {"points": self.points, "map": name, "seconds": seconds}
      | {k: found[k] for k in COLUMNS}
    )
    self.show(name, self.rows[-1], note)

  def show(self, name, row, note=""):
    cells = "".join(f"{scoring.shown(row.get(k)):>9}" for k in COLUMNS)
    seconds = "" if row.get("seconds") is None else f"{row['seconds']:.0f}"
    print(f"{name:<29}{seconds:>8}{cells}  {note}".rstrip(), flush=True)


def compare(points, args, sets):
  """The table of one grid."""
  every = 32 // points
  x, y, held, reference, floor = (a[:, ::every, ::every] for a in sets)
  group = kolmogorov.group(points)
  table = Table(points, reference, y, group)
  table.add("floor", floor)
  table.add("LFLR", held, held)
  for kind in args.maps.split(","):
    began = time.perf_counter()
    made, note = fit(kind, x[..., None], y[..., None], group)
    seconds, some = time.perf_counter() - began, x[: len(held)]
    name = f"entropic ε {kind}" if kind[0].isdigit() else kind
    table.add(name, made(held[..., None])[..., 0], held, seconds=seconds, note=note)
    if name != kind:
      table.add(name, made(some[..., None])[..., 0], some, of="in-sample")
  for name, row in scoring.PAPER[PAPER[points]].items():
    table.show(f"the paper's {name.upper()}", row)
  return table.rows


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--data", required=True)
  parser.add_argument("--fine", type=int, default=128)
  parser.add_argument("--points", default="32,16")
  parser.add_argument("--maps", default="0.0003,G,GQG")
  parser.add_argument("--rows", type=int, default=2048)
  parser.add_argument("--out", type=pathlib.Path)
  args = parser.parse_args()
  sets = (
    rows(args.data, "lflr", args.fine, "train"), rows(args.data, "hfhr", args.fine, "train"),
    rows(args.data, "lflr", args.fine, "test", args.rows),
    rows(args.data, "hfhr", args.fine, "test", args.rows),
    rows(args.data, "hfhr", args.fine, "validation", args.rows),
  )  # fmt: skip
  count = min(len(sets[0]), len(sets[1]))
  spread = lambda a: a[np.linspace(0, len(a) - 1, count).astype(int)]
  sets = (spread(sets[0]), spread(sets[1]), *sets[2:])
  print(f"{count} rows a side in the fits, {args.rows} held-out rows")
  found = [
    row
    for points in map(int, args.points.split(","))
    for row in compare(points, args, sets)
  ]
  if args.out:
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "maps.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
  main()
