"""Does 128² stand for 256² as seen at 32² and 16²? The same flow states, carried on at 256², at
128² and at 64².

  python benchmarks/kolmogorov_audit.py [--states=12] [--snapshots=7]
                                        [--out=docs/results/kolmogorov]

Takes 10 minutes.

Developed 128² states (t = 40), put on 256² through Fourier space, are carried on by Fine(256, .005)
for 4 time units, in which the small scales that 128² has not can fill, and kept then and every 2.5
units on; beside them the same states by Fine(128, .01) and, cut to 64², by Fine(64, .02). All are
strided to 32² and to 16², as C′ has it. Columns:

  Δ log E   log of the mean energy of a shell, less that at 256²; ± its standard error, by the
            jackknife over states: a state's snapshots go together, and 256² and the other start
            from the same one. 2/3 dealiasing keeps waves to 85, 42 and 21; stride aliases those
            above 16 (8) onto the shells shown
  symcov    relative RMSE of the covariance, averaged over the flow's group, against 256²
  floor     symcov between two 128² sets as large that have no state in common: what sampling alone
            leaves
"""

import argparse
import pathlib
import shlex
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from downscaling.equations import kolmogorov
from downscaling.metrics import distances, spectra

BURN_IN, ADJUST, SPACING = 40.0, 4.0, 2.5
FACTORS = {32: "32²", 16: "16²"}


def flow(points: int) -> kolmogorov.Fine:
  """Fine with the dt that configs/kolmogorov.py has for the grid."""
  return kolmogorov.Fine(points, 1.28 / points)


def developed(solver, states: int, time_: float) -> np.ndarray:
  """[states, N, N] at time_, by id, one after the other: small memory, and both cores work on a
  field.
  """
  run = jax.jit(lambda key: solver.advance(solver.start(key), round(time_ / solver.dt)))
  return np.stack(
    [run(jax.random.fold_in(jax.random.PRNGKey(0), i)) for i in range(states)]
  )


def carried_on(
  solver, starts: np.ndarray, snapshots: int, adjust: float, spacing: float
) -> tuple[np.ndarray, float]:
  """(snapshots [states, S, 32, 32] strided, seconds a time unit and state) of starts on any grid,
  resampled to N².
  """

  @jax.jit
  def run(w):
    w = solver.advance(
      kolmogorov._resample(w, solver.points), round(adjust / solver.dt)
    )

    def snapshot(w, _):
      return solver.advance(w, round(spacing / solver.dt)), w

    last, kept = jax.lax.scan(snapshot, w, length=snapshots - 1)
    every = solver.points // 32
    return jnp.concatenate([kept, last[None]])[:, ::every, ::every]

  run(starts[0]).block_until_ready()  # compiles
  began = time.perf_counter()
  out = np.stack([np.asarray(run(w)) for w in starts])
  units = len(starts) * (adjust + spacing * (snapshots - 1))
  return out, (time.perf_counter() - began) / units


def log_ratio(
  fields: np.ndarray, reference: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """(Δ log E [shells], standard error) of paired sets [states, S, n, n], by the jackknife over
  states.
  """
  energy = [
    np.stack([spectra.shell_energies(x, "fields").mean(0) for x in rows])
    for rows in (fields, reference)
  ]  # [states, shells] each
  count = len(fields)
  without = [np.log((e.sum(0) - e) / (count - 1)) for e in energy]
  leave_one = without[0] - without[1]
  error = np.sqrt((count - 1) * leave_one.var(axis=0))
  return np.log(energy[0].mean(0) / energy[1].mean(0)), error


def sym_cov(fields: np.ndarray, reference: np.ndarray) -> float:
  n = fields.shape[-1]
  rows = lambda x: x.reshape(-1, n * n)
  return distances.sym_cov_rmse(rows(fields), rows(reference), kolmogorov.group(n))


def audit(
  states: int, snapshots: int, adjust: float, spacing: float, burn_in: float
) -> tuple[dict, np.ndarray, dict]:
  """({points: strided snapshots} of the same states, those of other states at 128², {points:
  seconds}).
  """
  starts = developed(flow(128), 2 * states, burn_in)
  kept, seconds = {}, {}
  for points in (256, 128, 64):
    kept[points], seconds[points] = carried_on(
      flow(points), starts[:states], snapshots, adjust, spacing
    )
  other, _ = carried_on(flow(128), starts[states:], snapshots, adjust, spacing)
  return kept, other, seconds


def table(kept: dict, other: np.ndarray, side: int) -> list[str]:
  """Lines on what a grid of side² sees."""
  look = lambda x: x[..., :: 32 // side, :: 32 // side]
  reference = look(kept[256])
  found = {points: log_ratio(look(kept[points]), reference) for points in (128, 64)}
  head = f"{'shell':>6}{'E at 256²':>12}" + "".join(
    f"{f'Δ log E, {p}²':>20}" for p in found
  )
  lines = [f"seen at {side}²", head]
  energy = spectra.energies(reference.reshape(-1, side, side))
  for k in range(side // 2):
    cells = "".join(f"{d[k]:>12.3f} ± {e[k]:.3f}" for d, e in found.values())
    lines.append(f"{k + 1:>6}{energy[k]:>12.4f}{cells}")
  largest = {p: int(np.abs(d).argmax()) for p, (d, _) in found.items()}
  lines.append(
    "largest: "
    + "; ".join(
      f"{p}² {found[p][0][k]:+.3f} ± {found[p][1][k]:.3f} (shell {k + 1})"
      for p, k in largest.items()
    )
  )
  covs = ", ".join(f"{p}² {sym_cov(look(kept[p]), reference):.3f}" for p in (128, 64))
  return [
    *lines,
    f"symcov against 256²: {covs}; floor {sym_cov(look(other), look(kept[128])):.3f}",
    "",
  ]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--states", type=int, default=12)
  parser.add_argument("--snapshots", type=int, default=7)
  parser.add_argument(
    "--adjust",
    type=float,
    default=ADJUST,
    help="time units at the new resolution before the first",
  )
  parser.add_argument("--spacing", type=float, default=SPACING)
  parser.add_argument("--burn_in", type=float, default=BURN_IN)
  parser.add_argument("--out", type=pathlib.Path, help="folder for audit.txt")
  args = parser.parse_args()
  began = time.perf_counter()
  kept, other, seconds = audit(
    args.states, args.snapshots, args.adjust, args.spacing, args.burn_in
  )
  lines = [f"$ python {shlex.join(sys.argv)}", ""]
  lines.append(
    f"{args.states} states × {args.snapshots} snapshots, {args.adjust:g} time units after they "
    f"were put on their grid and every {args.spacing:g} on"
  )
  lines.append(
    "seconds a time unit and state: "
    + ", ".join(f"{p}² {s:.3f}" for p, s in seconds.items())
  )
  lines.append("")
  for side in (32, 16):
    lines += table(kept, other, side)
  lines.append(
    f"{time.perf_counter() - began:.0f} s in all on {jax.devices()[0].device_kind}"
  )
  text = "\n".join(lines) + "\n"
  print(text, end="")
  if args.out:
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "audit.txt").write_text(text)


if __name__ == "__main__":
  main()
