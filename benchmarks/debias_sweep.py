"""How good are the debiasing maps of Kuramoto–Sivashinsky snapshots, by points in the fit and by ε?

  python benchmarks/debias_sweep.py [--points=1024,4096,16384,65536] [--epsilons=0.01,0.002,0.0005]
                                    [--most=16384]
                                    [--maps=entropic,symmetric,gaussian,equivariant]
                                    [--bias=none,broken,cubic,square] [--draws=1]
                                    [--out=docs/results/ks]

Rows are independent of the fit: 4096 held-out biased snapshots are carried over and compared with
16 384 true ones.
floor: 4096 other true ones against the same. All sets have 4 snapshots a trajectory at the same
times, as the law still drifts a little between the first and the last. Sweeps over n at the last ε;
entropic over ε, too, at its largest n. entropic up to n = --most, symmetric up to a quarter of that
(its kernel is a mean over 48 images).
excess: displacement beyond the Bures bound. Writes sweep.json and sweep.png.

gaussian and equivariant are fitted as the debias job does it: with the largest group that the bias
respects, and with those steps of the recipe GMQM that rows outside the fit ask for; "all steps"
takes them all. Both stand at the end of a line. --bias changes the biased world further: broken, u
(1 + .3 sin x) + .4 cos x, is not alike everywhere; cubic, u + .05 u³, keeps the symmetry; square, u
+ .05 u², breaks its reflection; broken:full names the group to fit with.
floor, bound: the median and the highest of four other sets of true rows.

--draws: fits to so many independent sets of rows. Then each column of equivariant less that of
gaussian, on the same rows, is printed as mean ± standard error over the draws.
"""

import argparse
import json
import pathlib
import time

import jax
import numpy as np

from downscaling.debias import bias_symmetry, quantile_map
from downscaling.debias.entropic import entropic_map, sinkhorn
from downscaling.debias.equivariant import recipes, step_selection
from downscaling.equations import ks, rollouts
from downscaling.fields import quadratic as quadratic_terms
from downscaling.metrics import scoring
from downscaling.report import terminal

HELD, REFERENCE = 4096, 16384
FLOORS = 4
APART = 10**6  # trajectories between two draws
QUANTILE = {"quantile": False, "pooled_quantile": True}  # over the whole group?
RECIPES = {"gaussian": "G", "equivariant": "GMQM", "all steps": "GMQM"}
TURN = 2 * np.pi * np.arange(24)[:, None] / 24
BIASES = {
  "none": lambda u: u,
  "broken": lambda u: u * (1 + 0.3 * np.sin(TURN)) + 0.4 * np.cos(TURN),
  "cubic": lambda u: u + 0.05 * u**3,
  "square": lambda u: u + 0.05 * u**2,
}
TERM = quadratic_terms.burgers((24,))
COLUMNS = {
  "cov_rmse": "covRMSE", "sym_cov_rmse": "symcov", "melr_unweighted": "MELRu",
  "melr_weighted": "MELRw",
  "kld_sum": "KLD", "bispectrum": "bispec.", "transfer": "transf.", "flatness": "flatn.",
  "square_covariance": "sq.cov.", "corr_input": "corr", "excess": "excess",
}  # fmt: skip


def simulate(solver, first, count, snapshots):
  """[count, 24, 1] float32: snapshots of trajectories first, first + 1, ..."""
  ids = np.arange(first, first + -(-count // snapshots))
  with jax.enable_x64(True):
    u = np.concatenate(
      [
        np.asarray(rollouts.rollout(solver, part, snapshots=snapshots))
        for part in np.split(ids, 4)
      ]
    )
  return u.reshape(-1, u.shape[-1])[:count, :: u.shape[-1] // 24, None].astype(
    np.float32
  )


def by_recipe(kind, x, y, subgroup):
  """(map, what was chosen), as the debias job fits it; 4 rows a trajectory."""
  whole, ids = ks.group(24), np.arange(len(x)) // 4
  if subgroup == bias_symmetry.AUTO:
    subgroup = bias_symmetry.largest(x[..., 0], y[..., 0], whole, (ids, ids))[-1].name
  how = {
    "group": bias_symmetry.subgroups(whole, (24,))[subgroup],
    "quadratic": TERM,
    "towards": "stationary",
  }
  letters = RECIPES[kind]
  if kind == "equivariant":
    letters = step_selection.select(x[..., 0], y[..., 0], letters, **how).letters
  return recipes.fit(x, y, recipe=letters, **how), f"{subgroup}, {letters}"


def fit(kind, x, y, epsilon, subgroup):
  """(map, seconds, converged, what was chosen)."""
  began, group = time.perf_counter(), ks.group(24)
  if kind in RECIPES:
    made, chosen = by_recipe(kind, x, y, subgroup)
    return made, time.perf_counter() - began, True, chosen
  if kind in QUANTILE:
    pooled = group if QUANTILE[kind] else None
    made = quantile_map.fit(x, y, min(1000, len(x)), pooled)
    return made, time.perf_counter() - began, True, ""
  group = group if kind == "symmetric" else None
  done = sinkhorn.fit(
    x[..., 0],
    y[..., 0],
    epsilon=epsilon,
    threshold=2e-3,
    max_iterations=2000,
    group=group,
  )
  made = entropic_map.EntropicMap(y[..., 0], done.g, done.epsilon, (24, 1), group)
  return made, time.perf_counter() - began, done.converged, ""


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--points", default="1024,4096,16384,65536")
  parser.add_argument("--epsilons", default="0.01,0.002,0.0005")
  parser.add_argument("--most", type=int, default=16384)
  parser.add_argument("--maps", default="entropic,symmetric,gaussian,equivariant")
  parser.add_argument("--bias", default="none")
  parser.add_argument("--draws", type=int, default=1)
  parser.add_argument("--out", type=pathlib.Path)
  args = parser.parse_args()
  counts, epsilons = (
    [int(n) for n in args.points.split(",")],
    [float(e) for e in args.epsilons.split(",")],
  )
  biased, true = ks.Coarse(), ks.Fine()
  clouds = [
    [simulate(solver, draw * APART, max(counts), 4) for solver in (biased, true)]
    for draw in range(args.draws)
  ]
  held = simulate(biased, 10**9, HELD, 4)
  reference, floors = (
    simulate(true, first, n, 4)
    for first, n in ((10**9, REFERENCE), (2 * 10**9, FLOORS * HELD))
  )
  reference, group, rows = scoring.Reference(reference[..., 0]), ks.group(24), []

  def measured(mapped, source=None):
    found = scoring.measure(
      mapped[..., 0], reference, group=group, source=source, quadratic=TERM
    )
    return {k: found[k] for k in COLUMNS}

  def add(
    bias, name, n, epsilon, found, seconds=0.0, converged=True, chosen="", draw=0
  ):
    row = {
      "bias": bias,
      "draw": draw,
      "map": name,
      "points": n,
      "epsilon": epsilon,
      "seconds": seconds,
    }
    rows.append(row | {"converged": converged, "chosen": chosen} | found)
    shown = "".join(f"{terminal.shown(rows[-1][k]):>8}" for k in COLUMNS)
    print(
      f"{name:<12}{n:>6}{epsilon:>8g}{seconds:>7.1f}{shown}  "
      f"{chosen if converged else 'not converged'}",
      flush=True,
    )
    if args.out:
      args.out.mkdir(parents=True, exist_ok=True)
      (args.out / "sweep.json").write_text(json.dumps(rows, indent=1))

  print(
    f"{'map':<12}{'n':>6}{'ε':>8}{'s':>7}"
    + "".join(f"{h:>8}" for h in COLUMNS.values())
  )
  draws = [measured(part) for part in np.split(floors, FLOORS)]
  for name, of in (("floor", np.median), ("bound", np.max)):
    add(
      "",
      name,
      0,
      0.0,
      {
        k: None if draws[0][k] is None else float(of([d[k] for d in draws]))
        for k in COLUMNS
      },
    )
  for bias in args.bias.split(","):
    change, _, subgroup = bias.partition(":")
    changed = lambda u, change=change: BIASES[change](u).astype(np.float32)
    source = changed(held)
    if bias != "none":
      print(f"bias {bias}")
    add(bias, "raw", 0, 0.0, measured(source, source[..., 0]))
    for kind in args.maps.split(","):
      for n, epsilon in sweep(kind, counts, epsilons, args.most):
        for draw_number, (x, y) in enumerate(clouds):
          made, *facts = fit(
            kind, changed(x[:n]), y[:n], epsilon, subgroup or bias_symmetry.AUTO
          )
          add(
            bias,
            kind,
            n,
            0.0 if kind in {*RECIPES, *QUANTILE} else epsilon,
            measured(made(source), source[..., 0]),
            *facts,
            draw=draw_number,
          )
    if args.draws > 1:
      print_differences([row for row in rows if row["bias"] == bias], args.draws)
  if args.out:
    draw(rows, args.out / "sweep.png")


def print_differences(rows, draws):
  """equivariant less gaussian by column, mean ± standard error over the draws, for every n."""
  of = {(row["map"], row["points"], row["draw"]): row for row in rows}
  for n in dict.fromkeys(row["points"] for row in rows if row["map"] == "equivariant"):
    pairs = [
      (of["equivariant", n, draw], of["gaussian", n, draw]) for draw in range(draws)
    ]
    told = []
    for key, words in COLUMNS.items():
      apart = [ours[key] - theirs[key] for ours, theirs in pairs]
      error = np.std(apart, ddof=1) / np.sqrt(len(apart))
      told.append(f"{words} {np.mean(apart):+.4f} ± {error:.4f}")
    print(f"n {n}, equivariant − gaussian: {', '.join(told)}", flush=True)


def sweep(kind, counts, epsilons, most):
  """(n, ε) of the fits of one map."""
  top = {"entropic": most, "symmetric": most // 4}.get(kind, max(counts))
  mine = [n for n in counts if n <= top] or counts[:1]
  return [(n, epsilons[-1]) for n in mine] + [
    (mine[-1], e) for e in epsilons[:-1] if kind == "entropic"
  ]


def draw(rows, path):
  """Columns against n (at the last ε), and of entropic against ε (at its largest n), with the
  floor.
  """
  import matplotlib.pyplot as plt

  rows = [row for row in rows if row["bias"] in ("", "none")]
  kinds = [
    k
    for k in dict.fromkeys(r["map"] for r in rows)
    if k not in ("floor", "bound", "raw")
  ]
  shown = (
    "sym_cov_rmse",
    "melr_weighted",
    "kld_sum",
    "bispectrum",
    "square_covariance",
    "corr_input",
  )
  figure, axes = plt.subplots(
    2, len(shown), figsize=(3 * len(shown), 6), constrained_layout=True
  )
  for column, key in enumerate(shown):
    for ax, by, label in zip(
      axes[:, column],
      ("points", "epsilon"),
      ("points in the fit", "ε / mean cost"),
      strict=True,
    ):
      for kind in kinds if by == "points" else [k for k in kinds if k == "entropic"]:
        mine = [r for r in rows if r["map"] == kind]
        small, top = min(r["epsilon"] for r in mine), max(r["points"] for r in mine)
        mine = [
          r
          for r in mine
          if (r["epsilon"] == small if by == "points" else r["points"] == top)
        ]
        mine = sorted(mine, key=lambda r: r[by])
        ax.plot([r[by] for r in mine], [r[key] for r in mine], "o-", label=kind)
      if (floor := rows[0][key]) is not None:
        ax.axhline(floor, color="0.6", linestyle=":", label="floor")
      ax.set(xscale="log", xlabel=label, title=COLUMNS[key])
      if key != "corr_input":
        ax.set_yscale("log")
  axes[0, 0].legend(frameon=False)
  figure.savefig(path, dpi=110)


if __name__ == "__main__":
  main()
