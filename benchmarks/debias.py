"""One Sinkhorn solve by debias/sinkhorn.fit against ott's own solver on its dense PointCloud, on KS snapshots.

  python benchmarks/debias.py [--points=2048,4096] [--epsilon=0.001] [--rounds=5]

n biased against n coarsened true snapshots, d = 24, float32, the same ε (a share of the mean cost). ours: as the job
runs it, annealed and over-relaxed; ott: its defaults. iterations: to an L1 marginal error of 1e-3 (ours: the larger of
both marginals, ott: its columns), asked every 10. cpu, wall: per iteration, ten in one compiled call, in turns: median
CPU seconds of the process and least seconds on the clock. temp: the compiler's account of temporary memory of that
call. Ratios are ott over ours.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from downscaling.debias import geometry, sinkhorn  # first: it keeps ott's import warning to itself
from downscaling.equations import ks, rollouts

from ott.geometry import pointcloud  # isort: skip
from ott.problems.linear import linear_problem  # isort: skip
from ott.solvers.linear import sinkhorn as ott_sinkhorn  # isort: skip

THRESHOLD, CHUNK, MOST = 1e-3, 10, 5000


def clouds(n: int) -> tuple[np.ndarray, np.ndarray]:
  """Biased and coarsened true snapshots, [n, 24] float32 each, 4 a trajectory, less the truth's mean."""
  ids = np.arange(-(-n // 4))
  with jax.enable_x64(True):
    lflr, hfhr = (np.asarray(rollouts.rollout(s, ids, snapshots=4)) for s in (ks.Coarse(), ks.Fine()))
  x, y = (u.reshape(-1, 24)[:n].astype(np.float32) for u in (lflr, hfhr[..., ::8]))
  return x - geometry.centre(y), y - geometry.centre(y)


def compiled(function, *arguments):
  """(call without arguments, temporary bytes); the first call has been made."""
  program = jax.jit(function).lower(*arguments).compile()
  call = lambda: jax.block_until_ready(program(*arguments))
  call()
  return call, program.memory_analysis().temp_size_in_bytes


def ott_solve(x, y, epsilon, iterations: int, threshold: float):
  """ott's output on the dense cloud: (f, g, iterations done, converged)."""
  solver = ott_sinkhorn.Sinkhorn(threshold=threshold, inner_iterations=CHUNK, max_iterations=iterations)
  out = solver(linear_problem.LinearProblem(pointcloud.PointCloud(x, y, epsilon=epsilon)))
  return out.f, out.g, out.n_iters, out.converged


def measure(n: int, share: float, rounds: int) -> None:
  x, y = clouds(n)
  result = sinkhorn.fit(x, y, epsilon=share, threshold=THRESHOLD, max_iterations=MOST)
  x, y, epsilon = jnp.asarray(x), jnp.asarray(y), jnp.float32(result.epsilon)
  plain = jax.jit(lambda x, y, e: ott_solve(x, y, e, MOST, THRESHOLD))(x, y, epsilon)
  iterations = (result.history["iteration"][-1], int(plain[2]))
  ended = (result.converged, bool(plain[3]))
  chunk = lambda x, y, e, f, g: sinkhorn._chunk(geometry.Blockwise(x, y, e), f, g, CHUNK, 1.5)
  calls = (
    compiled(chunk, x, y, epsilon, result.f, result.g),
    compiled(lambda x, y, e: ott_solve(x, y, e, CHUNK, 0.0), x, y, epsilon),
  )
  cpu, wall = ([], []), ([], [])
  for _ in range(rounds):
    for i, (call, _) in enumerate(calls):
      began = time.process_time(), time.perf_counter()
      call()
      cpu[i].append((time.process_time() - began[0]) / CHUNK)
      wall[i].append((time.perf_counter() - began[1]) / CHUNK)
  rows = [(statistics.median(cpu[i]), min(wall[i]), iterations[i], calls[i][1] / 1e6) for i in (0, 1)]
  for name, row, done in zip(("ours", "ott dense"), rows, ended, strict=True):
    print(
      f"{n:<7}{name:<12}{row[0]:>10.4f}{row[1]:>10.4f}{row[2]:>12}{row[3]:>10.1f}{'' if done else '   not converged'}"
    )
  ratio = [b / a for a, b in zip(*rows, strict=True)]
  print(
    f"{'':<7}{'ratio':<12}" + "".join(f"{v:>{w}.1f}" for v, w in zip(ratio, (10, 10, 12, 10), strict=True)), flush=True
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--points", default="2048,4096")
  parser.add_argument("--epsilon", type=float, default=0.001)
  parser.add_argument("--rounds", type=int, default=5)
  args = parser.parse_args()
  print(f"{jax.default_backend()}, d 24, ε {args.epsilon:g} of the mean cost, {args.rounds} rounds, in turns")
  print(f"{'n':<7}{'':<12}{'cpu s/it':>10}{'wall s/it':>10}{'iterations':>12}{'temp MB':>10}")
  for n in map(int, args.points.split(",")):
    measure(n, args.epsilon, args.rounds)


if __name__ == "__main__":
  main()
