r"""What a star means: how often independent true sets lie inside the floors of a report.

  python benchmarks/star.py --workdir=runs/ks-full --config=configs/ks.py:full [--sets=12]
                            [--out=DIR]

WORKDIR holds a finished `generate` of that config. Each set has the size and the trajectories of
the row that it stands
for: the held-out coarse fields, and the samples of true conditions. It is simulated anew, from
trajectories that nothing else uses, and judged by the same reference and floor as the report's
rows. 95 % are expected inside. Sets share the reference, so a reference that is by chance far from
the law moves all of them alike.
"""

import argparse
import os
import pathlib

import jax
import numpy as np

from downscaling import experiment, jobs
from downscaling.assembly import debiasing, samples, worlds
from downscaling.jobs import rows
from downscaling.metrics import bootstrap, judge, replicates
from downscaling.metrics.reference import Reference
from downscaling.runtime import mesh as meshes
from downscaling.runtime import progress, supervision

FIRST = 2_000_000_000  # ids beyond those of every split


def simulated(config, count: int, first: int, mesh) -> np.ndarray:
  """[count, snapshots, *space] of trajectories that no split has."""
  mine = worlds.simulating(config, "hfhr", mesh)
  with jax.enable_x64(True):
    plan = worlds.generation(config, pathlib.Path("unused"), "hfhr", meshes.rows(mine))
    ids = np.arange(first, first + -(-count // mine.size) * mine.size)
    fields = plan.rollout(jax.device_put(ids, meshes.rows(mine)))
  return np.asarray(fields, np.float32)[:count, ..., 0]


def like(config, source: str) -> bootstrap.Rows:
  """The structure of the coarse rows, or of the samples of true conditions."""
  if source == "coarse":
    numbers = rows.judged(config, "lflr", "test", config.debias.held_out)
  else:
    numbers = rows.conditions(config, samples.TRUE)
  return rows.origin(config, numbers.reshape(-1))


def judged_by(ctx, level: str) -> judge.Judge:
  """The judge of the report's coarse rows or of its samples."""
  c, op = ctx.experiment, worlds.operator(ctx.experiment)
  fields, origins = {}, {}
  numbers = {
    "reference": rows.judged(c, "hfhr", "reference", c.evaluate.reference),
    "floor": rows.floor(c),
  }
  for split, of_split in numbers.items():
    fields[split] = rows.of(ctx, "hfhr", split, of_split).read()
    origins[split] = rows.origin(c, of_split)
  if level == "coarse":
    fields = {split: np.asarray(op.apply(x)) for split, x in fields.items()}
    of_grid = {
      "moves": worlds.coarse_moves(c),
      "group": worlds.group(c),
      "quadratic": debiasing.quadratic(c),
    }
  else:
    of_grid = {"moves": worlds.moves(c)}
  fields = {split: x[..., 0] for split, x in fields.items()}
  return judge.Judge(
    Reference(fields["reference"]), origins["reference"], fields["floor"], origins["floor"],
    draws=c.evaluate.draws, seed=c.seed, **of_grid,
  )  # fmt: skip


def count_stars(
  ctx, level: str, sets: int
) -> tuple[bootstrap.Rows, dict[str, int], dict[str, list[float]]]:
  """(structure, {metric: how many of `sets` lie inside}, {metric: floor})."""
  c, op = ctx.experiment, worlds.operator(ctx.experiment)
  judged, structure = judged_by(ctx, level), like(ctx.experiment, level)
  floor = judged.floor(structure)
  inside = dict.fromkeys(floor, 0)
  number = np.unique(structure.block, return_inverse=True)[1]
  snapshot = np.round((structure.time - c.data.burn_in) / c.data.spacing).astype(int)
  with progress.Progress(f"star {level}", sets, "sets") as bar:
    for turn in range(sets):
      x = simulated(c, structure.blocks, FIRST + turn * 1_000_000, ctx.mesh)[
        number, snapshot
      ]
      if level == "coarse":
        x = np.asarray(op.apply(x[..., None]))[..., 0]
      even = np.ones((1, len(x)), np.float32)
      found = replicates.metrics(
        x,
        even,
        judged.reference,
        moves=judged.moves,
        group=judged.group,
        quadratic=judged.quadratic,
      )
      for key, (value,) in found.items():
        inside[key] += judge.inside(float(value), floor[key])
      bar.advance(1)
  return structure, inside, floor


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--config", default="configs/ks.py:full")
  parser.add_argument("--sets", type=int, default=12)
  parser.add_argument("--out", type=pathlib.Path)
  args = parser.parse_args()
  config = experiment.load(args.config)
  ctx = jobs.Workdir(config, args.workdir.absolute(), meshes.make(), supervision.Stop())
  lines = [
    f"{args.sets} independent true sets, how many lie inside the floor (95 % expected)"
  ]
  for level in ("coarse", "fine"):
    structure, inside, floor = count_stars(ctx, level, args.sets)
    lines.append(f"{level}: {len(structure)} fields of {structure.blocks} trajectories")
    for key, count in inside.items():
      low, middle, high = floor[key]
      lines.append(
        f"  {key:<20}{count:>3} of {args.sets}   floor {low:.4g} … {middle:.4g} … {high:.4g}"
      )
  text = "\n".join(lines)
  print(text)
  if args.out:
    args.out.mkdir(parents=True, exist_ok=True)
    temporary = args.out / f".star.{os.getpid()}.tmp"
    temporary.write_text(text + "\n", "utf-8")
    os.replace(temporary, args.out / "star.txt")


if __name__ == "__main__":
  main()
