"""Minibatch fits against full solves on KS snapshots, at equal wall time: what the held-out rows of
each map are worth.

  python benchmarks/minibatch.py [--targets=4096] [--trajectories=16384] [--epsilon=0.001]
                                 [--batch=1024] [--whole]

d = 24, float32, 4 snapshots a trajectory, no trajectory in two sets: 3/4 are source rows and, of
the true ones, targets; 1/8 are the test rows and their reference; 1/8 measure `rms` and `dual`, and
are the floor.

full:       debias/sinkhorn.fit of m source rows on m targets to an L1 marginal error of 1e-3; and
            the same ended with its ladder of ε (70 iterations).
full, all:  every source row on m targets, cut at the wall time that `full` took: its ladder may not
            have ended; with --whole also to 1e-3, however long it takes.
minibatch:  debias/minibatch.fit, streaming all source rows in shuffled passes, in that time and in
            parts of it; each rule at a quarter. Steps are what warm runs say fits, so the wall time
            printed is near it, not equal.

wall, cpu: seconds of the fit, compiled before. rows/n: passes over the source rows. rms, dual (in
units of ε, larger is better): see minibatch.fit. The rest are the metrics of metrics/ on the mapped
test rows; corr is corr(y, T y). `floor` is a true set of as many rows. One seed: read the first two
digits.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from downscaling.debias.entropic import entropic_map, minibatch, sinkhorn, soft_min
from downscaling.equations import ks, rollouts
from downscaling.metrics import distances, spectra

THRESHOLD, LADDER, MOST = 1e-3, 70, 5000
# At 25 the variance still is 3/4 of the last, and a set's snapshots are of different laws.
BURN_IN = 62.5
BLOCK = 1024  # trajectories integrated at a time
COLUMNS = (
  "wall",
  "cpu",
  "steps",
  "rows/n",
  "rms",
  "dual",
  "covRMSE",
  "MELRu",
  "MELRw",
  "KLD",
  "corr",
)


def rows(solver, ids: np.ndarray) -> np.ndarray:
  """Snapshots on 24 points, [4 len(ids), 24] float32, a trajectory's together."""
  with jax.enable_x64(True):
    blocks = [
      np.asarray(
        rollouts.rollout(solver, ids[k : k + BLOCK], burn_in=BURN_IN, snapshots=4)
      )
      for k in range(0, len(ids), BLOCK)
    ]
  u = np.concatenate(blocks).astype(np.float32)
  return u[..., :: u.shape[-1] // 24].reshape(-1, 24)


class Case:
  """m targets, and everything a row of the table is measured on."""

  def __init__(self, trajectories: int, share: float):
    ids = np.arange(trajectories)
    train, held, test = np.split(ids, [trajectories * 3 // 4, trajectories * 7 // 8])
    self.source, self.held, self.test = (
      rows(ks.Coarse(), part) for part in (train, held, test)
    )
    self.truth, self.floor, self.reference = (
      rows(ks.Fine(), part) for part in (train, held, test)
    )
    self.share, self.energies = share, spectra.energies(self.reference)

  def quality(self, mapped: np.ndarray) -> list[float]:
    melr = spectra.melr(spectra.energies(mapped), self.energies)
    return [
      distances.cov_rmse(mapped, self.reference),
      melr["unweighted"],
      melr["weighted"],
      distances.kld(mapped, self.reference)[0],
    ]

  def show(
    self, name: str, target, result, wall: float, cpu: float, steps: int, seen: int
  ) -> None:
    """Prints one map's row."""
    centre, g, eps = (
      soft_min.centre(target),
      jnp.asarray(result.g),
      np.float32(result.epsilon),
    )
    _, rms, dual = minibatch._held_out(
      jnp.asarray(self.held - centre), jnp.asarray(target - centre), g, eps
    )
    mapped = entropic_map.EntropicMap(target, np.asarray(g), result.epsilon, (24,))(
      self.test
    )
    figures = [
      wall,
      cpu,
      steps,
      seen / len(self.source),
      float(rms),
      float(dual) / result.epsilon,
    ]
    line(
      name, [*figures, *self.quality(mapped), distances.corr_input(self.test, mapped)]
    )


def line(name: str, figures: list) -> None:
  formats = (
    "9.2f",
    "9.2f",
    "8d",
    "9.2f",
    "9.3f",
    "9.2f",
    "9.4f",
    "9.4f",
    "9.4f",
    "9.4f",
    "9.3f",
  )
  cells = (
    " " * int(f.split(".")[0].rstrip("d")) if v is None else format(v, f)
    for v, f in zip(figures, formats, strict=True)
  )
  print(f"{name:<24}" + "".join(cells), flush=True)


def timed(call):
  """(result, wall seconds, CPU seconds)."""
  began = time.perf_counter(), time.process_time()
  result = call()
  jax.block_until_ready(result.g)
  return result, time.perf_counter() - began[0], time.process_time() - began[1]


def full(case: Case, target, source, iterations: int):
  """A full solve, compiled before: its warm run also gives the seconds of ten iterations."""
  solve = lambda most: sinkhorn.fit(
    source, target, epsilon=case.share, threshold=THRESHOLD, max_iterations=most
  )
  solve(10)
  ten = timed(lambda: solve(10))[1]
  most = (
    iterations if isinstance(iterations, int) else max(10, int(iterations / ten) * 10)
  )
  result, wall, cpu = timed(lambda: solve(most))
  return result, wall, cpu, result.history["iteration"][-1]


def stream(case: Case, target, size: int, wall: float, rule: str):
  """A minibatch fit of about `wall` seconds."""
  batch = minibatch.shuffled(case.source, size)
  fit = lambda steps: minibatch.fit(
    batch,
    target,
    held_out=case.held[:256],
    epsilon=case.share,
    steps=steps,
    rule=rule,
    check_every=steps,
  )
  fit(20)
  few, many = (
    min(timed(lambda steps=steps: fit(steps))[1] for _ in range(2))
    for steps in (20, 60)
  )
  steps = max(20, int((wall - few) / max(many - few, 1e-6) * 40) + 20)
  return *timed(lambda: fit(steps)), steps


def measure(case: Case, m: int, size: int, whole: bool) -> None:
  target = case.truth[:m]
  some = case.source[np.random.default_rng(0).permutation(len(case.source))[:m]]
  result, budget, cpu, steps = full(case, target, some, MOST)
  ended = "" if result.converged else " (not converged)"
  case.show(f"full{ended}", target, result, budget, cpu, steps, steps * len(some))
  result, wall, cpu, steps = full(case, target, some, LADDER)
  case.show("full, ladder alone", target, result, wall, cpu, steps, steps * len(some))
  result, wall, cpu, steps = full(case, target, case.source, budget)
  last = "" if result.history["epsilon"][-1] == result.epsilon else ", ladder cut"
  case.show(
    f"full, all{last}", target, result, wall, cpu, steps, steps * len(case.source)
  )
  if whole:
    result, wall, cpu, steps = full(case, target, case.source, MOST)
    case.show(
      f"full, all, {'whole' if result.converged else 'no end'}",
      target,
      result,
      wall,
      cpu,
      steps,
      steps * len(case.source),
    )
  for part, rule in (
    (1, "mixed"),
    (4, "mixed"),
    (4, "online"),
    (4, "sgd"),
    (16, "mixed"),
  ):
    result, wall, cpu, steps = stream(case, target, size, budget / part, rule)
    case.show(
      f"minibatch {rule}{f', 1/{part}' if part > 1 else ''}",
      target,
      result,
      wall,
      cpu,
      steps,
      result.rows,
    )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--targets", default="4096")
  parser.add_argument("--trajectories", type=int, default=16384)
  parser.add_argument("--epsilon", type=float, default=0.001)
  parser.add_argument("--batch", type=int, default=1024)
  parser.add_argument("--whole", action="store_true")
  args = parser.parse_args()
  sizes = [int(m) for m in args.targets.split(",")]
  if max(sizes) > 3 * args.trajectories:
    parser.error(
      f"{max(sizes)} targets of {3 * args.trajectories} true rows: raise --trajectories."
    )
  case = Case(args.trajectories, args.epsilon)
  print(
    f"{jax.default_backend()}, {len(case.source)} source rows, ε {args.epsilon:g}, batches of "
    f"{args.batch}"
  )
  for m in sizes:
    print(
      f"\n{f'{m} targets':<24}"
      + "".join(f"{c:>{8 if c == 'steps' else 9}}" for c in COLUMNS)
    )
    nothing = [None] * 6
    line("none", [*nothing, *case.quality(case.test), 1.0])
    line("floor", [*nothing, *case.quality(case.floor), None])
    measure(case, m, args.batch, args.whole)


if __name__ == "__main__":
  main()
