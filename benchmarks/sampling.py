r"""Guidance × solver × steps on a trained prior: quality against cost, with Eq. 7 and 256 steps as the reference row.

  python benchmarks/sampling.py --workdir=runs/ks [--config=configs/ks.py:full] [--set train.total_steps=6000 ...]
    [--conditions=64] [--members=8] [--cases=front|all|default|NAME,...] [--vary=solver.noise=1,1.03,1.06]
    [--factor=16] [--operator=block_mean] [--split=validation] [--spread] [--seed=0] [--out=DIR]

WORKDIR holds a finished `generate` and `train` of that config. Conditions are C′x of held-out test fields x, which
neither the training nor the error table has seen; --factor and --operator observe less, or otherwise, than the config
does: a prior of fine fields serves any C′. "default" is what the config draws with, --vary the same with each value of
one key of config.sampling: fit what belongs to a prior, as solver.noise, on --split=validation and compare on the test
fields. Errors are over the field's rms.

  calls       network evaluations a member; a gradient (vjp) counts as another two
  ms          a member: of processor time over the cores on a CPU, where others may be at work; else of wall time
  member, mean  RMSE to the truth, of single members and of the ensemble mean
  crps, energy  fair CRPS and energy score; those of climatology and of a cubic interpolation stand above the table
  melre       MELR of members against the truths, over the shells that hold the energy
  cov         covRMSE of members against held-out fields, over that of the truths: 1 is the floor
  s/e         spread over error, 1 is right; in50, in90: coverage of the central intervals
  second half ×κ  with --spread: members with their distance from the mean of their condition scaled (sampling.spread)
              by κ = 1/(s/e) of the first half of the conditions; on the second half, as drawn in the row above it
  χ²          median misfit score at the lowest noise level; 1 where y′ is as far off as the prior expects

Below the table: energy of the members over that of the truths, some shells; each case over the reference, where that is
among the cases. --out writes sampling.json, .txt and the Pareto front sampling.png.
"""

import argparse
import ast
import importlib.util
import math
import os
import pathlib
import time

import jax
import numpy as np

from downscaling import build, context
from downscaling.baselines import interpolation
from downscaling.common import mesh as meshes
from downscaling.common import runs, supervision
from downscaling.diffusion import errors, training
from downscaling.evaluation import calibration, canvas, distances, spectra
from downscaling.sampling import draws

EQ7 = {
  "start": "noise", "guidance.name": "paper", "guidance.alpha": 1.0, "guidance.final": "overwrite",
  "solver.name": "euler_maruyama", "levels.name": "exponential", "levels.steps": 256, "levels.sigma_max": 150.0,
  "levels.sigma_min": 1e-3, "resample.strength": 0.0, "spread": 1.0,
}  # fmt: skip
LOW = {
  "start": "gaussian", "solver.name": "dpm_solver_pp_2m_sde", "solver.eta": 1.0, "solver.noise": 1.0,
  "levels.name": "edm", "levels.sigma_max": 3.0, "levels.sigma_min": 3e-3, "levels.rho": 7.0, "levels.steps": 16,
  "guidance.final": "gain", "guidance.variance": "measured", "resample.strength": 0.0, "resample.dead_zone": 3.0,
  "resample.below": 100.0, "spread": 1.0,
}  # fmt: skip
REFERENCE = "eq7 em 256"


def case(guidance, steps=16, eta=1.0, strength=0.0, **more):
  """Overrides of config.sampling for a low start; more: others, with __ for the dot."""
  more = {k.replace("__", "."): v for k, v in more.items()}
  return (
    LOW | {"guidance.name": guidance, "levels.steps": steps, "solver.eta": eta, "resample.strength": strength} | more
  )


HIGH = {"start": "noise", "levels__sigma_max": 80.0}
CASES = {
  REFERENCE: EQ7,
  "eq7 em 64": EQ7 | {"levels.steps": 64},
  "eq7 sde 32": case("paper", 32, guidance__alpha=1.0, guidance__final="overwrite", **HIGH),
  "scaled η2.5 16": case("scaled", 16, 2.5, guidance__alpha=3.0),
  "scaled η2.5 32": case("scaled", 32, 2.5, guidance__alpha=3.0),
  "wiener η1 16": case("wiener"),
  "wiener η5 16": case("wiener", 16, 5.0),
  "measured heun 16": case("measured", 16, solver__name="heun"),
  "measured ode 16": case("measured", 16, solver__name="dpm_solver_pp_2m"),
  "measured η1 16": case("measured"),
  "measured η1 32": case("measured", 32),
  "measured η5 16": case("measured", 16, 5.0),
  "measured η10 24": case("measured", 24, 10.0),
  "measured η10 32": case("measured", 32, 10.0),
  "measured noise η1 32": case("measured", 32, **HIGH),
  "measured+r1.6 η2.5 16": case("measured", 16, 2.5, 0.125, resample__dead_zone=1.6),
  "measured+r η5 8": case("measured", 8, 5.0, 0.125),
  "measured+r η5 16": case("measured", 16, 5.0, 0.125),
  "measured+r η5 24": case("measured", 24, 5.0, 0.125),
  "measured+r η10 16": case("measured", 16, 10.0, 0.125),
  "measured+r η10 24": case("measured", 24, 10.0, 0.125),
  "measured+r η10 32": case("measured", 32, 10.0, 0.125),
  "guided+r η10 16": case("measured", 16, 10.0, 0.125, levels__name="guided"),
  "guided+r η10 24": case("measured", 24, 10.0, 0.125, levels__name="guided"),
  "guided+r η10 32": case("measured", 32, 10.0, 0.125, levels__name="guided"),
  "measured+r η5 32": case("measured", 32, 5.0, 0.125),
  "moment η1 16": case("moment"),
  "moment η5 16": case("moment", 16, 5.0),
  "moment+r η5 8": case("moment", 8, 5.0, 0.125),
  "moment+r η5 12": case("moment", 12, 5.0, 0.125),
  "moment+r η5 16": case("moment", 16, 5.0, 0.125),
  "moment+r η10 12": case("moment", 12, 10.0, 0.125),
  "default": {},
}
FRONT = (
  REFERENCE, "scaled η2.5 32", "wiener η5 16", "measured η1 16", "measured η5 16", "measured η10 32",
  "measured+r1.6 η2.5 16", "measured+r η5 8", "measured+r η5 24", "measured+r η5 32", "measured+r η10 16",
  "measured+r η10 24", "measured+r η10 32", "guided+r η10 16", "guided+r η10 24", "guided+r η10 32", "moment η5 16",
  "moment+r η5 12", "moment+r η10 12",
)  # fmt: skip
LOWER_IS_BETTER = ("member", "mean", "crps", "energy", "melre", "cov")


class Bench:
  """The prior of a work folder and its held-out fields."""

  def __init__(self, config, workdir, conditions, members, seed=0, split="test", **observed):
    self.mesh, self.seed, self.members = meshes.make(), seed, members
    self.ctx = context.Context(config, pathlib.Path(workdir).absolute(), self.mesh, supervision.Stop(), "")
    self.ctx.need("data", "generate")
    stage = self.ctx.need("train", "train")
    self.stats = context.stage_statistics(self.ctx)
    self.network = build.denoising_network(config, self.stats)
    prior, space = runs.config_hash(stage.identity), build.space(config)
    self.params = training.load_prior(stage.path, prior, self.network, space, len(self.stats.mean), self.mesh)
    self.table = errors.load(stage.path, prior)
    self.config = config.copy_and_resolve_references()
    self.config.update_from_flattened_dict({f"grid.{k}": v for k, v in observed.items()})
    rows = context.load_rows(self.ctx, "hfhr", split)
    pick = np.random.default_rng(seed).permutation(len(rows))
    self.truth, self.reference = rows[pick[:conditions]], rows[pick[conditions:]][:16_384, ..., 0]
    self.y = np.asarray(build.operator(self.config).apply(self.truth))

  def draw(self, overrides):
    """(fields [K, M, *space], misfit [K, M], seconds a member of the processors and of the wall, calls a member)."""
    c = self.config.copy_and_resolve_references()
    c.update_from_flattened_dict({f"sampling.{k}": v for k, v in overrides.items()})
    c.sampling.unit = (len(self.y), self.members)
    rows, shape = meshes.rows(self.mesh), (len(self.y), self.members)
    y = jax.device_put(self.y.repeat(self.members, 0), rows)
    fold = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(self.seed), i))
    keys = jax.jit(fold, out_shardings=rows)(np.arange(len(y)))
    program = jax.jit(build.sampler(c, self.stats, self.network, self.table)).lower(keys, y, self.params).compile()
    wall, cpu = time.perf_counter(), time.process_time()
    fields, misfit = jax.block_until_ready(program(keys, y, self.params))
    cpu = (time.process_time() - cpu) / (os.cpu_count() or 1)
    seconds = (cpu / len(y), (time.perf_counter() - wall) / len(y))
    return np.asarray(fields)[..., 0].reshape(*shape, *fields.shape[1:-1]), np.reshape(misfit, shape), seconds, calls(c)

  def score(self, fields):
    """Quality of fields [K, M, *space]."""
    truth = self.truth[..., 0]
    found = calibration.calibrate(fields, truth)
    melr = spectra.melr(spectra.energies(fields.reshape(-1, *fields.shape[2:])), spectra.energies(truth))
    cov = distances.cov_rmse(fields[:, 0], self.reference) / distances.cov_rmse(truth, self.reference)
    return {
      "member": found.member_rmse, "mean": found.mean_rmse, "crps": found.crps, "energy": found.energy,
      "melre": melr["energy"], "cov": cov, "s/e": found.spread_error, "in50": found.coverage["0.5"],
      "in90": found.coverage["0.9"],
    }  # fmt: skip

  def spectrum(self, fields):
    """{k: energy of fields [K, M, *space] over the truths'}, up to nine shells that hold energy."""
    energy, truth = (spectra.energies(x.reshape(-1, *fields.shape[2:])) for x in (fields, self.truth))
    shells = [len(truth) * part // 16 for part in (1, 2, 3, 4, 5, 6, 8, 10, 12)]
    held = spectra.energy_holding_shells(truth)
    return {str(k): float(energy[k - 1] / truth[k - 1]) for k in shells if k and held[k - 1]}

  def halves(self, fields):
    """(κ fitted on the first half of the conditions, scores of the second as drawn, scores with κ)."""
    half, whole = len(fields) // 2, self.truth
    try:
      self.truth = whole[:half]
      factor = 1 / self.score(fields[:half])["s/e"]
      self.truth, rest = whole[half:], fields[half:]
      scaled = draws.rescale(rest.reshape(-1, *rest.shape[2:]), self.members, factor).reshape(rest.shape)
      return factor, self.score(rest), self.score(scaled)
    finally:
      self.truth = whole

  def rivals(self):
    """Scores of climatology and of an interpolation."""
    truth, found = self.truth[..., 0], {}
    found["climatology"] = calibration.climatology(self.reference[:256], truth)
    guess = interpolation.cubic(self.y, build.operator(self.config))[..., 0]
    return found | {"interpolation": calibration.single(guess, truth)}


def calls(config):
  """Network evaluations a member; a vjp costs about two more."""
  s = config.sampling
  each = (2 if s.solver.name == "heun" else 1) * (3 if s.guidance.name in ("paper", "scaled", "moment") else 1)
  last = 3 if s.guidance.name in ("paper", "scaled") and s.guidance.final == "overwrite" else 1
  return s.levels.steps * each + last


def config_of(where, changes):
  path, _, variant = where.partition(":")
  spec = importlib.util.spec_from_file_location("config", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config(*([variant] if variant else []))
  pairs = (change.split("=", 1) for change in changes)
  config.update_from_flattened_dict({key: ast.literal_eval(value) for key, value in pairs})
  return config


COLUMNS = {
  "calls": ".0f", "ms": ".1f", "member": ".3f", "mean": ".3f", "crps": ".4f", "energy": ".4f", "melre": ".3f",
  "cov": ".3f", "s/e": ".2f", "in50": ".2f", "in90": ".2f", "χ²": ".2f",
}  # fmt: skip


def line(name, row, columns=COLUMNS, sep="  "):
  cells = [format(row[k], how) if k in row else "" for k, how in columns.items()]
  return sep.join([f"{name:<22}", *(f"{c:>7}" for c in cells)])


def ratios(rows):
  """{case: {column: over the reference}}, and whether it is no worse anywhere."""
  base, found = rows[REFERENCE], {}
  for name, row in rows.items():
    found[name] = {k: row[k] / base[k] for k in ("ms", *LOWER_IS_BETTER)}
    distance = lambda r: abs(math.log(max(r["s/e"], 1e-9)))
    worse = [k for k in LOWER_IS_BETTER if row[k] > base[k]] + ["s/e"] * (distance(row) > distance(base))
    found[name]["worse"] = ", ".join(worse)
  return found


def front(rows):
  """Names of the cases that no other beats in both time and member RMSE."""
  beaten = lambda a, b: b["ms"] <= a["ms"] and b["member"] <= a["member"] and b is not a
  return [n for n, row in rows.items() if not any(beaten(row, other) for other in rows.values())]


def picture(rows, path):
  """Member RMSE against milliseconds a member, the front joined; colour is spread over error."""
  figure = canvas.page(4.2)
  axes = figure.subplots()
  order = sorted(front(rows), key=lambda n: rows[n]["ms"])
  axes.plot([rows[n]["ms"] for n in order], [rows[n]["member"] for n in order], color="0.7", zorder=0)
  ms, member = ([row[k] for row in rows.values()] for k in ("ms", "member"))
  dots = axes.scatter(ms, member, c=[row["s/e"] for row in rows.values()], cmap="coolwarm", vmin=0.5, vmax=1.5)
  # Names stand in a column beside the axes, as dots crowd where samplers are good.
  names = sorted(rows, key=lambda n: rows[n]["member"])
  for i, name in enumerate(names):
    at, there = (rows[name]["ms"], rows[name]["member"]), (1.04, i / max(len(names) - 1, 1))
    line = {"arrowstyle": "-", "color": "0.85", "linewidth": 0.5, "relpos": (0, 0.5)}
    axes.annotate(name, at, there, textcoords="axes fraction", va="center", fontsize=6, arrowprops=line)
  axes.margins(0.08, 0.08)
  axes.set(xscale="log", yscale="log", xlabel="ms a member", ylabel="RMSE of a member / rms of the field")
  figure.colorbar(dots, label="spread / error", pad=0.3)
  figure.savefig(path, dpi=150)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", required=True)
  parser.add_argument("--config", default="configs/ks.py:full")
  parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of the config, as the run had it")
  parser.add_argument("--conditions", type=int, default=64)
  parser.add_argument("--members", type=int, default=8)
  parser.add_argument("--cases", help="front (without --vary the default), all, or names with commas")
  parser.add_argument("--vary", default="", help="KEY=V1,V2,...: the config's sampler with these values of a key")
  parser.add_argument("--factor", type=int)
  parser.add_argument("--operator", choices=["strided", "block_mean"])
  parser.add_argument("--split", choices=["validation", "test"], default="test")
  parser.add_argument("--spread", action="store_true", help="also with a fitted spread")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--out", type=pathlib.Path, help="folder for sampling.json, .txt and .png")
  args = parser.parse_args()
  asked = args.cases or ("" if args.vary else "front")
  names = {"front": FRONT, "all": tuple(CASES), "": ()}.get(asked, tuple(asked.split(",")))
  if strangers := [n for n in names if n not in CASES]:
    parser.error(f"{strangers[0]!r} is no case; they are: {', '.join(CASES)}")
  cases = {name: CASES[name] for name in names} | varied(args.vary)
  observed = {k: v for k in ("factor", "operator") if (v := getattr(args, k)) is not None}
  config = config_of(args.config, args.set)
  bench = Bench(config, args.workdir, args.conditions, args.members, args.seed, args.split, **observed)
  about = {
    "device": f"{bench.mesh.size} × {bench.mesh.devices.flat[0].device_kind}", "conditions": args.conditions,
    "members": args.members, "seed": args.seed, "observed": observed, "split": args.split,
    "train": runs.plain(config.train), "versions": runs.versions(), "commit": runs.commit(),
    "rivals": {k: r._asdict() for k, r in bench.rivals().items()},
  }  # fmt: skip
  said = [
    f"{k}: error {r['error']:.3f}, crps {r['crps']:.4f}, energy {r['energy']:.4f}" for k, r in about["rivals"].items()
  ]
  said.append("  ".join([" " * 22, *(f"{k:>7}" for k in COLUMNS)]))
  print("\n".join(said), flush=True)
  rows = {}
  for name, overrides in cases.items():
    fields, misfit, (cpu, wall), count = bench.draw(overrides)
    on_cpu = jax.default_backend() == "cpu"
    rows[name] = {"calls": count, "ms": 1e3 * (cpu if on_cpu else wall), "wall_ms": 1e3 * wall}
    rows[name] |= bench.score(fields) | {"χ²": float(np.median(misfit)), "spectrum": bench.spectrum(fields)}
    said.append(line(name, rows[name]))
    print(said[-1], flush=True)
    if args.spread and name != REFERENCE:
      factor, plain, scaled = bench.halves(fields)
      said += [line("  second half", plain), line(f"  second half ×{factor:.3f}", scaled)]
      print("\n".join(said[-2:]), flush=True)
      rows[name] |= {"half": plain, "κ": factor, "half×κ": scaled}
    if args.out:
      args.out.mkdir(parents=True, exist_ok=True)
      runs.write_json(args.out / "sampling.json", about | {"rows": rows})
  below = ["", *energies(rows), *(["", *compare(rows)] if REFERENCE in rows else [])]
  print("\n".join(below))
  said += below
  if args.out:
    (args.out / "sampling.txt").write_text("\n".join(said) + "\n")
    picture(rows, args.out / "sampling.png")


def varied(text):
  """{"KEY=V": {KEY: V}} for each value of "KEY=V1,V2,..."."""
  key, _, values = text.partition("=")
  return {f"{key}={value}": {key: ast.literal_eval(value)} for value in values.split(",") if value}


def energies(rows):
  shells = dict.fromkeys(next(iter(rows.values()))["spectrum"], ".2f")
  return [line("energy / true, k =", {k: int(k) for k in shells}, dict.fromkeys(shells, "d"))] + [
    line(name, row["spectrum"], shells) for name, row in rows.items()
  ]


def compare(rows):
  columns = dict.fromkeys(("ms", *LOWER_IS_BETTER), ".3f")
  lines = ["  ".join([f"{'over ' + REFERENCE:<22}", *(f"{k:>7}" for k in columns)]) + "  worse in"]
  return lines + [f"{line(name, row, columns)}  {row['worse'] or 'nothing'}" for name, row in ratios(rows).items()]


if __name__ == "__main__":
  main()
