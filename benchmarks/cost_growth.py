"""How the cost of the flow grows with its grid, beside KS: solver, training step, member-step;
measured, then on paper.

  python benchmarks/cost_growth.py [--seconds=2] [--out=docs/results/kolmogorov]

Takes 5 minutes on two cores.

Measured on KS (192 points, configs/ks.py:full) and on the flow at 64², 128² and 256²
(configs/kolmogorov.py:cpu with another grid); 512² and 1024² are compiled and not run. One device;
the least time of several, after a first that is not counted.

  solver       seconds a time unit and trajectory, of Fine with the config's dt (the flow's:
               1.28/N); one trajectory at a time for the flow, 64 together for KS
  training     seconds a step: forward, backward, Adam, average; batch 4 for the flow, 128 for KS
  member-step  seconds a member and call of the network, within the sampler's loop with the gain and
               noise; 4 members together for the flow, 64 for KS
  GFLOP        of the same unit: matrix products and convolutions; for solvers 2.5 n log₂ n a real
               transform of n points
  GB           memory traffic that the compiler expects of the same unit, for this device's program
  memory       that the compiled program needs at its batch, arguments, results and temporaries, in
               GB

Nets: "stem 2", whose blocks work on grids that grow with the field; "stem N/64", whose first layer
grows instead, so that blocks always see 64². growth: exponent p of N^p from the row above.
"""

import argparse
import dataclasses
import math
import pathlib
import shlex
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from downscaling import experiment
from downscaling.assembly import prior, samples, worlds
from downscaling.diffusion import train_loop, train_state
from downscaling.equations import kolmogorov, ks
from downscaling.fields import statistics
from downscaling.runtime import mesh as meshes
from downscaling.runtime import program_cost

MEASURED, PAPER = (64, 128, 256), (512, 1024)


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of one unit of work. points: N an axis. seconds: None on paper. flops, bytes: of the unit;
  memory: of the batch.
  """

  points: int
  seconds: float | None
  flops: float
  bytes: float
  memory: int


def config(name: str, points: int, stem: int, batch: int, members: int):
  """configs/NAME.py with another grid, net's stem, batch and unit, for one device."""
  keys = {
    "grid.points": points,
    "model.stem": stem,
    "train.batch": batch,
    "sampling.unit": (1, members),
    "sampling.members": members,
    # A table would be a constant of 200 MB.
    "sampling.guidance.name": "wiener",
    "sampling.resample.strength": 0.0,
  }
  if name == "kolmogorov":
    keys["fine.dt"] = 1.28 / points
  return experiment.load("ks:full" if name == "ks" else "kolmogorov:cpu", **keys)


def best(run: Callable[[], object], seconds: float) -> float:
  """Least time of run() in at least two runs after a first, and as many as fit in `seconds`."""
  jax.block_until_ready(run())
  taken, began = [], time.perf_counter()
  while len(taken) < 2 or time.perf_counter() - began < seconds:
    start = time.perf_counter()
    jax.block_until_ready(run())
    taken.append(time.perf_counter() - start)
  return min(taken)


def traffic(program) -> float:
  """Bytes accessed, a loop's body once."""
  found = program.cost_analysis()
  return float((found[0] if isinstance(found, list) else found)["bytes accessed"])


def held(program) -> int:
  m = program_cost.memory(program)
  return m["arguments"] + m["outputs"] + m["temporaries"] - m["aliased"]


def solver(of, batch: int, transforms: int, steps: int, seconds: float | None) -> Cost:
  """A time unit of one trajectory. transforms: real FFTs a step."""
  space = (of.points,) * (1 if isinstance(of, ks.Fine) else 2)
  advance = lambda u, count: jax.vmap(lambda x: of.advance(x, count))(u)
  u = (
    jax.vmap(of.start)(jax.random.split(jax.random.key(0), batch)) if seconds else None
  )
  shape = jax.eval_shape(jax.vmap(of.start), jax.random.split(jax.random.key(0), batch))
  one = jax.jit(lambda u: advance(u, 1)).lower(shape).compile()
  a_step, unit = None, 1 / of.dt
  if seconds:
    run = jax.jit(lambda u: advance(u, steps))
    a_step = best(lambda: run(u), seconds) / steps / batch * unit
  n = math.prod(space)
  return Cost(
    of.points,
    a_step,
    transforms * 2.5 * n * math.log2(n) * unit,
    traffic(one) / batch * unit,
    held(one),
  )


def network(c) -> tuple:
  """(statistics of a unit field, denoiser, mesh of one device)."""
  unit = np.ones((*worlds.space(c), 1), np.float32)
  stats = statistics.Statistics(np.zeros(1, np.float32), np.ones(1, np.float32), unit)
  return stats, prior.network(c, stats), meshes.make(1)


def train_step(c, seconds: float | None) -> Cost:
  """One training step at the config's batch."""
  stats, net, mesh = network(c)
  keys = jax.random.key(0), jax.random.key(1)
  start, target, specs = train_state.make(mesh, prior.initial_state(c, net, 1), *keys)
  x = jax.ShapeDtypeStruct(
    (c.train.batch, *worlds.space(c), 1), jnp.float32, sharding=meshes.rows(mesh)
  )
  program, flops = train_loop.compiled(
    prior.update(c, stats, net, mesh, specs.params), target, {"x": x}
  )
  a_step = None
  if seconds:
    held_state = [start(*keys)]
    batch = {
      "x": jax.device_put(
        np.random.default_rng(0).normal(size=x.shape).astype(np.float32), x.sharding
      )
    }

    def run():
      held_state[0], logs = program(held_state[0], batch)
      return held_state[0], logs

    a_step = best(run, seconds)
  return Cost(c.grid.points, a_step, flops, traffic(program), held(program))


def member_step(c, seconds: float | None) -> Cost:
  """One call of the network in the sampler's loop, of one member; drawn in units of the config's
  members.
  """
  stats, net, _ = network(c)
  members, op, loops = c.sampling.members, worlds.operator(c), 4
  c = c.changed(**{"sampling.levels.steps": loops})
  draw, keys = (
    samples.sampler(c, stats, net),
    jax.random.split(jax.random.key(0), members),
  )
  y = jax.ShapeDtypeStruct((members, *op.coarse, 1), jnp.float32)
  init = lambda: net.init(jax.random.key(0), jnp.zeros((1, *op.fine, 1)), jnp.ones(1))[
    "params"
  ]
  params = jax.eval_shape(init)
  program = jax.jit(draw).lower(keys, y, params).compile()
  # One ends the loop; the compiler counts a loop's body once.
  calls, seen = loops + 1, 2
  each = None
  if seconds:
    given = jnp.ones(y.shape), jax.jit(init)()
    each = best(lambda: program(keys, *given), seconds) / calls / members
  flops = program_cost.flops(draw, keys, y, params) / calls / members
  return Cost(
    c.grid.points, each, flops, traffic(program) / seen / members, held(program)
  )


def lines(title: str, rows: dict[str, Cost]) -> list[str]:
  """A table; rows of one kind of name follow each other, with the exponents of their growth."""
  growth = f"{'growth':>8}"
  columns = (
    f"{'seconds':>11}{growth}{'GFLOP':>11}{growth}{'GB':>10}{growth}{'memory':>9}"
  )
  head = f"{title:<34}{columns}"
  out, before = [head], {}
  for name, cost in rows.items():
    kind = name.partition("²")[2] if "²" in name else name
    said = "on paper" if cost.seconds is None else f"{cost.seconds:.4g}"
    cells = [
      (said, 11, "seconds"),
      (f"{cost.flops / 1e9:.4g}", 11, "flops"),
      (f"{cost.bytes / 1e9:.4g}", 10, "bytes"),
    ]
    text = "".join(
      f"{word:>{width}}{_growth(before.get(kind), cost, key):>8}"
      for word, width, key in cells
    )
    out.append(f"  {name:<32}{text}{cost.memory / 1e9:>9.3g}")
    before[kind] = cost
  return [*out, ""]


def _growth(before: Cost | None, now: Cost, key: str) -> str:
  a, b = getattr(before, key, None), getattr(now, key)
  return (
    f"{math.log(b / a) / math.log(now.points / before.points):.2f}" if a and b else ""
  )


def measure(part: str, grids: list[int], seconds: float, batch: int) -> dict[str, Cost]:
  """{name of a row: its cost}."""
  budget = lambda n: seconds if n in MEASURED else None
  if part == "solver":
    with jax.enable_x64(True):
      rows = {"KS 192": solver(ks.Fine(), 64, 8, 40, seconds)}
    return rows | {
      f"flow {n}²": solver(kolmogorov.Fine(n, 1.28 / n), 1, 16, 8, budget(n))
      for n in grids
    }
  of = {"training": train_step, "member-step": member_step}[part]
  rows = {"KS 192": of(config("ks", 192, 1, 128, 64), seconds)}
  flow = lambda n, stem: of(config("kolmogorov", n, stem, batch, 4), budget(n))
  rows |= {f"flow {n}², stem 2": flow(n, 2) for n in grids}
  if 128 in grids:
    rows["flow 128², stem N/64"] = rows["flow 128², stem 2"]
  return rows | {
    f"flow {n}², stem N/64": flow(n, n // 64) for n in grids if n in (256, 1024)
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--parts", default="solver,training,member-step")
  parser.add_argument("--seconds", type=float, default=2.0, help="a measurement")
  parser.add_argument(
    "--largest", type=int, default=1024, help="grid to go to; beyond 256 on paper"
  )
  parser.add_argument("--batch", type=int, default=4, help="of the flow's training")
  parser.add_argument("--out", type=pathlib.Path, help="folder for cost.txt")
  args = parser.parse_args()
  began = time.perf_counter()
  grids = [n for n in (*MEASURED, *PAPER) if n <= args.largest]
  units = {
    "solver": "solver: a time unit, a trajectory",
    "training": f"training step, batch {args.batch} (KS 128)",
    "member-step": "member-step",
  }
  text = [f"$ python {shlex.join(sys.argv)}", ""]
  for part in args.parts.split(","):
    found = lines(units[part], measure(part, grids, args.seconds, args.batch))
    print("\n".join(found), flush=True)
    text.extend(found)
  text.append(
    f"{time.perf_counter() - began:.0f} s in all, {jax.device_count()} × "
    f"{jax.devices()[0].device_kind}"
  )
  print(text[-1])
  if args.out:
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "cost.txt").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
  main()
