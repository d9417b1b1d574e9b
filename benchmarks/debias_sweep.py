"""How good are the debiasing maps of Kuramoto–Sivashinsky snapshots, by points in the fit and by ε?

  python benchmarks/debias_sweep.py [--points=1024,4096,16384] [--epsilons=0.01,0.002,0.0005] [--most=16384]
                                    [--maps=entropic,symmetric] [--out=docs/results/ks]

Rows are independent of the fit: 4096 held-out biased snapshots are carried over and compared with 16 384 true ones, one
snapshot a trajectory. floor: 4096 other true ones against the same. Sweeps: over n at the last ε, over ε at the largest
n; symmetric up to n = --most/2 (its kernel is a mean over 48 images). corr, displacement: of a row and what it came
from. Writes sweep.json and sweep.png.
"""

import argparse
import json
import pathlib
import time

import jax
import numpy as np

from downscaling.debias import sinkhorn, transport
from downscaling.equations import ks, rollouts
from downscaling.evaluation import tables

HELD, REFERENCE = 4096, 16384
COLUMNS = ("cov_rmse", "sym_cov_rmse", "melr_unweighted", "melr_weighted", "kld_sum", "corr_input", "displacement")


def simulate(solver, first, count, snapshots):
  """[count, 24] float32: snapshots of trajectories first, first + 1, ..."""
  ids = np.arange(first, first + -(-count // snapshots))
  with jax.enable_x64(True):
    u = np.asarray(rollouts.rollout(solver, ids, snapshots=snapshots))
  return u.reshape(-1, u.shape[-1])[:count, :: u.shape[-1] // 24].astype(np.float32)


def fit(kind, x, y, epsilon):
  """(map, seconds, converged)."""
  group = ks.group(24) if kind == "symmetric" else None
  began = time.perf_counter()
  done = sinkhorn.fit(x, y, epsilon=epsilon, threshold=2e-3, max_iterations=2000, group=group)
  made = transport.EntropicMap(y, done.g, done.epsilon, (24, 1), group)
  return made, time.perf_counter() - began, done.converged


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--points", default="1024,4096,16384")
  parser.add_argument("--epsilons", default="0.01,0.002,0.0005")
  parser.add_argument("--most", type=int, default=16384)
  parser.add_argument("--maps", default="entropic,symmetric")
  parser.add_argument("--out", type=pathlib.Path)
  args = parser.parse_args()
  counts, epsilons = [int(n) for n in args.points.split(",")], [float(e) for e in args.epsilons.split(",")]
  biased, true, most = ks.Coarse(), ks.Fine(), max(counts)
  x, y = (simulate(solver, 0, most, 4) for solver in (biased, true))
  held = simulate(biased, 10**9, HELD, 1)
  reference, floor = (simulate(true, first, n, 1) for first, n in ((10**9, REFERENCE), (2 * 10**9, HELD)))
  reference, group, rows = tables.Reference(reference), ks.group(24), []

  def add(name, n, epsilon, mapped, seconds=0.0, converged=True):
    found = tables.measure(mapped, reference, group=group, source=None if name == "floor" else held)
    row = {"map": name, "points": n, "epsilon": epsilon, "seconds": seconds, "converged": converged}
    rows.append(row | {k: found[k] for k in COLUMNS})
    shown = "".join(f"{tables.shown(rows[-1][k]):>9}" for k in COLUMNS)
    print(f"{name:<11}{n:>7}{epsilon:>9g}{seconds:>8.1f}{shown}{'' if converged else '  not converged'}", flush=True)
    if args.out:
      args.out.mkdir(parents=True, exist_ok=True)
      (args.out / "sweep.json").write_text(json.dumps(rows, indent=1))

  heads = ("covRMSE", "symcov", "MELRu", "MELRw", "KLD sum", "corr", "displ.")
  print(f"{'map':<11}{'n':>7}{'ε':>9}{'s':>8}" + "".join(f"{h:>9}" for h in heads))
  add("floor", 0, 0.0, floor)
  add("raw", 0, 0.0, held)
  for kind in args.maps.split(","):
    top = most if kind == "entropic" else min(most, args.most // 2)
    sweep = [(n, epsilons[-1]) for n in counts if n < top] + [(top, e) for e in epsilons]
    for n, epsilon in sweep:
      made, seconds, converged = fit(kind, x[:n], y[:n], epsilon)
      add(kind, n, epsilon, made(held[..., None])[..., 0], seconds, converged)
  if args.out:
    draw(rows, args.out / "sweep.png")


def draw(rows, path):
  """Every column against n (at the last ε) and against ε (at the largest n), with the floor."""
  import matplotlib.pyplot as plt

  kinds = [k for k in dict.fromkeys(r["map"] for r in rows) if k not in ("floor", "raw")]
  shown = ("cov_rmse", "sym_cov_rmse", "melr_unweighted", "melr_weighted", "kld_sum", "corr_input")
  figure, axes = plt.subplots(2, len(shown), figsize=(3 * len(shown), 6), constrained_layout=True)
  for column, key in enumerate(shown):
    for line, (by, label) in enumerate((("points", "points in the fit"), ("epsilon", "ε / mean cost"))):
      ax = axes[line, column]
      for kind in kinds:
        mine = [r for r in rows if r["map"] == kind]
        small, top = min(r["epsilon"] for r in mine), max(r["points"] for r in mine)
        mine = [r for r in mine if (r["epsilon"] == small if by == "points" else r["points"] == top)]
        mine = sorted(mine, key=lambda r: r[by])
        ax.plot([r[by] for r in mine], [r[key] for r in mine], "o-", label=kind)
      if (floor := rows[0][key]) is not None:
        ax.axhline(floor, color="0.6", linestyle=":", label="floor")
      ax.set(xscale="log", xlabel=label, title=key.replace("_", " "))
      if key != "corr_input":
        ax.set_yscale("log")
  axes[0, 0].legend(frameon=False)
  figure.savefig(path, dpi=110)


if __name__ == "__main__":
  main()
