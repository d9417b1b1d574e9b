"""How wrong each coarse KS scheme is: the paper's four figures for every scheme kept in
equations/ks.py.

  python benchmarks/ks_coarse.py [--seed=0] [--trajectories=2048]

Takes one to two minutes on two cores.

Rows: Coarse(...) with the seed against Fine with the same seed, strided to 24 points, 4 snapshots a
trajectory as configs/ks.py takes them. Floor: Fine with seed + 7 against Fine. Δ²: Σ (ln
value/paper)² over the four columns.
cpu s: process CPU seconds of the second, compiled, run of all trajectories.
"""

import argparse
import math
import time

import jax
import numpy as np

from downscaling.equations import ks, rollouts
from downscaling.fields.operators import Strided
from downscaling.metrics import distances, scoring, spectra

SCHEMES = (
  ("godunov", 96, "euler", 0.1),
  ("godunov", 96, "euler", 0.05),
  ("godunov", 96, "ars222", 0.05),
  ("godunov", 120, "ars222", 0.05),
  ("rusanov", 120, "ars222", 0.05),
  ("central", 72, "ars222", 0.05),
  ("half", 48, "euler", 0.02),
  ("godunov", 48, "euler", 0.1),
)
PAPER = tuple(scoring.PAPER["ks-8x"]["lflr"].values())
COLUMNS = ("covRMSE", "MELRu", "MELRw", "KLD sum", "Δ²", "cpu s")


def simulate(solver, seed: int, trajectories: int) -> tuple[np.ndarray, float]:
  """(snapshots [4 · trajectories, N] float64, CPU seconds of a compiled run)."""
  run = lambda: np.asarray(
    rollouts.rollout(solver, np.arange(trajectories), seed=seed, snapshots=4)
  )
  run()  # compiles
  began = time.process_time()
  u = run()
  return u.reshape(-1, u.shape[-1]), time.process_time() - began


def figures(pred: np.ndarray, ref: np.ndarray) -> tuple[float, ...]:
  """covRMSE, MELRu, MELRw and summed KLD, in the order of the paper's table."""
  melr = spectra.melr(spectra.energies(pred), spectra.energies(ref))
  return (
    distances.cov_rmse(pred, ref),
    melr["unweighted"],
    melr["weighted"],
    distances.kld(pred, ref)[0],
  )


def show(
  name: str, values, gap: float | None = None, seconds: float | None = None
) -> None:
  cells = [f"{v:.3f}" for v in values] + [
    "" if v is None else f"{v:.{d}f}" for v, d in ((gap, 2), (seconds, 1))
  ]
  print(f"{name:<30}" + "".join(f"{c:>9}" for c in cells).rstrip(), flush=True)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--trajectories", type=int, default=2048)
  args = parser.parse_args()
  strided = Strided.on((192,), 8)
  with jax.enable_x64(True):
    coarsen = lambda u: np.asarray(strided.apply(u[..., None]))[..., 0]
    fine, seconds = simulate(ks.Fine(), args.seed, args.trajectories)
    truth = coarsen(fine)
    print(f"{args.trajectories} trajectories × 4 snapshots, seed {args.seed}")
    print(
      f"{'scheme, cells, integrator, dt':<30}" + "".join(f"{c:>9}" for c in COLUMNS)
    )
    show("the paper's LFLR", PAPER)
    other, _ = simulate(ks.Fine(), args.seed + 7, args.trajectories)
    show(
      f"floor: Fine, seed {args.seed + 7}",
      figures(coarsen(other), truth),
      seconds=seconds,
    )
    for scheme, cells, integrator, dt in SCHEMES:
      u, seconds = simulate(
        ks.Coarse(scheme, cells, dt, integrator=integrator),
        args.seed,
        args.trajectories,
      )
      row = figures(u, truth)
      gap = sum(math.log(v / p) ** 2 for v, p in zip(row, PAPER, strict=True))
      show(f"{scheme} {cells} {integrator} {dt:g}", row, gap, seconds)


if __name__ == "__main__":
  main()
