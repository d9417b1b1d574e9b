r"""Samplers on a trained prior, quality against cost: our default against the paper's Eq. 7 at its
best; and many more.

  python benchmarks/sampling.py --workdir=runs/ks [--config=configs/ks.py:full]
    [--set train.total_steps=6000 ...]
    [--conditions=128] [--members=8] [--cases=rival|front|all|NAME,...]
    [--vary=solver.noise=1,1.03,1.06]
    [--factor=16] [--operator=block_mean] [--split=calibration] [--spread] [--seed=0] [--out=DIR]

WORKDIR holds the prior of that config, its error table and data/statistics.npz. Conditions are C′x
of held-out fine fields x. They are read from WORKDIR's data set, or simulated by the config's seed
where there is none, with the same result. --factor and --operator observe less, or otherwise, than
the config does: a prior of fine fields serves any C′.

Without --cases and --vary, and with `rival` among the cases: Eq. 7 is swept over its strength α on
conditions of the calibration split, with 256 Euler–Maruyama steps and with our best solver at 32
and 16 steps (sampling_rival.py). The best of each, the authors' library default (strength .5 over
the observed fraction, α = 4 for KS) and α = 1 are then drawn on test conditions beside our default,
all in turn, and our default's ratios to the best of them are printed.

Other cases are named in sampling_cases.py. "default" is what the config draws with, --vary the same
with each value of one key of config.sampling: fit what belongs to a prior, as solver.noise, with
--split=calibration and compare on the test fields. Errors are over the field's rms.

  calls       network calls a member: FLOPs of the whole sampler over those of one call, so a
              gradient (vjp) counts as what it costs
  ms, wall    milliseconds a member, medians over blocks in which the cases take turns; ms is
              processor time over the
              cores (other work on the machine hardly changes it), wall is wall time
  member, mean  RMSE to the truth, of single members and of the ensemble mean crps, energy  fair
  CRPS and energy score; those of climatology and of a cubic interpolation stand above the table
  melre       MELR of members against the truths, over the shells that hold the energy
  cov         covRMSE of members against fields of the reference split, over that of the truths: 1
              is the floor
  s/e         spread over error, 1 is right; in50, in90: coverage of the central intervals
  χ²          median misfit score at the lowest noise level; 1 where y′ is as far off as the prior
              expects
  second half ×κ  with --spread: members with their distance from the mean of their condition scaled
              (sampling.spread) by κ = 1/(s/e) of the first half of the conditions; on the second
              half, as drawn in the row above it

Below the table: energy of the members over that of the truths, some shells; the default over each
case, with the columns in which it is worse. --out writes sampling.json, .txt and sampling.png:
error against time, and against α.
"""

import argparse
import ast
import pathlib
import sys

import numpy as np
import sampling_bench
import sampling_cases
import sampling_rival

from downscaling import experiment
from downscaling.report import themes
from downscaling.runtime import files, provenance, stage_folder

DEFAULT = sampling_cases.DEFAULT
FORMATS = {
  "calls": ".1f",
  "ms": ".1f",
  "wall": ".1f",
  "member": ".3f",
  "mean": ".3f",
  "crps": ".4f",
  "energy": ".4f",
  "melre": ".3f",
  "cov": ".3f",
  "s/e": ".2f",
  "in50": ".2f",
  "in90": ".2f",
  "χ²": ".2f",
}


class Page:
  """Lines that are printed at once and kept for sampling.txt."""

  def __init__(self):
    self.lines = []

  def say(self, *lines: str) -> None:
    self.lines += lines
    print(*lines, sep="\n", flush=True)


def config_of(where, changes):
  pairs = (change.split("=", 1) for change in changes)
  return experiment.load(
    where, **{key: ast.literal_eval(value) for key, value in pairs}
  )


def line(name, row, formats=FORMATS):
  cells = [format(row[key], how) if key in row else "" for key, how in formats.items()]
  return "  ".join([f"{name:<24}", *(f"{cell:>7}" for cell in cells)])


def head(name, columns):
  return "  ".join([f"{name:<24}", *(f"{column:>7}" for column in columns)])


def sweep(bench, page, conditions, members):
  """Fits every variant of Eq. 7 on calibration conditions: {variant: sampling_rival.Fit}."""
  at, fits = bench.conditions("calibration", conditions), {}

  def measure(overrides):
    drawn = bench.draw({"": overrides}, at, members)[""]
    return bench.score(drawn.fields, at)

  for variant in sampling_rival.VARIANTS:
    fits[variant.name] = sampling_rival.fit(variant, measure)
    page.say(*sampling_rival.swept(variant.name, fits[variant.name]))
  return fits


def judge(bench, page, cases, at, members, spread):
  """Draws all cases in turn and scores them: {case: row}."""
  page.say(
    *(f"{name}: {scores(found)}" for name, found in bench.baselines(at).items()),
    head("", FORMATS),
  )
  rows = {}
  for name, drawn in bench.draw(cases, at, members).items():
    row = {
      "calls": bench.calls(cases[name]),
      "ms": 1e3 * drawn.cpu,
      "wall": 1e3 * drawn.wall,
    }
    rows[name] = row | bench.score(drawn.fields, at)
    if "runaways" not in rows[name]:
      rows[name]["χ²"] = float(np.median(drawn.misfit))
      rows[name]["spectrum"] = bench.spectrum(drawn.fields, at)
    page.say(line(name, rows[name]))
    if spread and "runaways" not in rows[name]:
      factor, plain, scaled = bench.halves(drawn.fields, at)
      page.say(
        line("  second half", plain), line(f"  second half ×{factor:.3f}", scaled)
      )
      rows[name] |= {"half": plain, "κ": factor, "half×κ": scaled}
  return rows


def scores(found):
  return f"error {found.error:.3f}, crps {found.crps:.4f}, energy {found.energy:.4f}"


def energies(rows):
  spectra = {name: row["spectrum"] for name, row in rows.items() if "spectrum" in row}
  shells = dict.fromkeys(next(iter(spectra.values()), {}), ".2f")
  return [
    head("energy / true, k =", shells),
    *(line(name, row, shells) for name, row in spectra.items()),
  ]


def compared(found):
  """Lines of sampling_rival.ratios."""
  columns = dict.fromkeys((*sampling_rival.COSTS, *sampling_rival.QUALITY), ".3f")
  lines = [head(f"{DEFAULT} over", columns) + "  worse in"]
  return lines + [
    f"{line(name, row, columns)}  {row['worse'] or 'nothing'}"
    for name, row in found.items()
  ]


def front(rows):
  """Names of the cases that no other beats in both time and member RMSE."""
  beaten = lambda a, b: b["ms"] <= a["ms"] and b["member"] <= a["member"] and b is not a
  return [
    name
    for name, row in rows.items()
    if not any(beaten(row, other) for other in rows.values())
  ]


def picture(rows, fits, path):
  """Member RMSE against milliseconds a member; where Eq. 7 was swept, also against its α."""
  figure = themes.page(8.0 if fits else 4.2)
  axes = np.atleast_1d(figure.subplots(2 if fits else 1))
  against_time(
    figure, axes[0], {name: row for name, row in rows.items() if "member" in row}
  )
  if fits:
    against_alpha(axes[1], rows, fits)
  figure.savefig(path, dpi=150)


def against_time(figure, axes, rows):
  """The front joined; colour is spread over error.

  Names stand in a column beside the axes, as dots crowd.
  """
  order = sorted(front(rows), key=lambda name: rows[name]["ms"])
  axes.plot(
    [rows[name]["ms"] for name in order],
    [rows[name]["member"] for name in order],
    color="0.7",
    zorder=0,
  )
  ms, member, spread = (
    [row[key] for row in rows.values()] for key in ("ms", "member", "s/e")
  )
  dots = axes.scatter(ms, member, c=spread, cmap="coolwarm", vmin=0.5, vmax=1.5)
  arrow = {"arrowstyle": "-", "color": "0.85", "linewidth": 0.5, "relpos": (0, 0.5)}
  names = sorted(rows, key=lambda name: rows[name]["member"])
  for i, name in enumerate(names):
    at, there = (
      (rows[name]["ms"], rows[name]["member"]),
      (1.04, i / max(len(names) - 1, 1)),
    )
    axes.annotate(
      name,
      at,
      there,
      textcoords="axes fraction",
      va="center",
      fontsize=6,
      arrowprops=arrow,
    )
  axes.margins(0.08, 0.08)
  axes.set(
    xscale="log",
    yscale="log",
    xlabel="ms a member",
    ylabel="RMSE of a member / rms of the field",
  )
  figure.colorbar(dots, label="spread / error", pad=0.3)


def against_alpha(axes, rows, fits):
  for name, fit in fits.items():
    by_alpha = fit.tried[fit.by_error[0]]
    alphas = [alpha for alpha in sorted(by_alpha) if "member" in by_alpha[alpha]]
    axes.plot(
      alphas,
      [by_alpha[alpha]["member"] for alpha in alphas],
      "o-",
      ms=3,
      label=f"Eq. 7, {name}",
    )
  axes.axhline(
    rows[DEFAULT]["member"], color="0.3", ls="--", label="our default, test conditions"
  )
  axes.set(
    xscale="log",
    yscale="log",
    xlabel="α of Eq. 7, calibration conditions",
    ylabel="RMSE of a member",
  )
  axes.legend(fontsize=6)


def varied(text):
  """{"KEY=V": {KEY: V}} for each value of "KEY=V1,V2,..."."""
  key, _, values = text.partition("=")
  return {
    f"{key}={value}": {key: ast.literal_eval(value)}
    for value in values.split(",")
    if value
  }


def arguments():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", required=True)
  parser.add_argument("--config", default="configs/ks.py:full")
  parser.add_argument(
    "--set",
    action="append",
    default=[],
    help="KEY=VALUE of the config, as the run had it",
  )
  parser.add_argument("--conditions", type=int, default=128)
  parser.add_argument("--members", type=int, default=8)
  parser.add_argument(
    "--cases",
    help="rival (the default without --vary), front, all, or names with commas",
  )
  parser.add_argument(
    "--vary",
    default="",
    help="KEY=V1,V2,...: the config's sampler with these values of a key",
  )
  parser.add_argument("--factor", type=int)
  parser.add_argument("--operator", choices=["strided", "block_mean"])
  parser.add_argument("--split", choices=["calibration", "test"], default="test")
  parser.add_argument(
    "--sweep",
    default="64,2",
    help="calibration conditions and members that Eq. 7 is swept on",
  )
  parser.add_argument("--spread", action="store_true", help="also with a fitted spread")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument(
    "--out", type=pathlib.Path, help="folder for sampling.json, .txt and .png"
  )
  args = parser.parse_args()
  asked = args.cases or ("" if args.vary else "rival")
  groups = {
    "rival": ["rival"],
    "front": sampling_cases.FRONT,
    "all": sampling_cases.CASES,
  }
  args.names = [
    name for part in asked.split(",") if part for name in groups.get(part, [part])
  ]
  strangers = [
    name for name in args.names if name not in ("rival", *sampling_cases.CASES)
  ]
  if strangers:
    parser.error(
      f"{strangers[0]!r} is no case; they are: rival, front, all, {', '.join(sampling_cases.CASES)}"
    )
  if "rival" in args.names and args.split != "test":
    parser.error(
      "the rival is fitted on the calibration split and judged on the test split: leave --split "
      "out."
    )
  return args


def main():
  args, page = arguments(), Page()
  given = {"factor": args.factor, "operator": args.operator}
  observed = {key: value for key, value in given.items() if value is not None}
  config = config_of(args.config, args.set)
  page.say(" ".join(["python benchmarks/sampling.py", *sys.argv[1:]]), "")
  bench = sampling_bench.Bench(config, args.workdir, args.seed, **observed)
  fits = {}
  if "rival" in args.names:
    fits = sweep(bench, page, *map(int, args.sweep.split(",")))
  cases = sampling_rival.contest(fits) if fits else {}
  cases |= {
    name: sampling_cases.CASES[name] for name in args.names if name != "rival"
  } | varied(args.vary)
  at = bench.conditions(args.split, args.conditions)
  rows = judge(bench, page, cases, at, args.members, args.spread)
  page.say("", *energies(rows))
  ratios = {}
  if "member" in rows.get(DEFAULT, {}) and len(rows) > 1:
    ratios = sampling_rival.ratios(rows)
    page.say("", *compared(ratios))
  if fits:
    page.say("", *sampling_rival.aims(rows, ratios))
  if args.out:
    about = {
      "device": f"{bench.mesh.size} × {bench.mesh.devices.flat[0].device_kind}",
      "conditions": args.conditions,
      "members": args.members,
      "seed": args.seed,
      "observed": observed,
      "split": args.split,
      "train": stage_folder.plain(config.train),
      "versions": provenance.versions(),
      "commit": provenance.commit(),
      "baselines": {
        name: found._asdict() for name, found in bench.baselines(at).items()
      },
    }
    args.out.mkdir(parents=True, exist_ok=True)
    written = about | {
      "sweep": {name: fit._asdict() for name, fit in fits.items()},
      "rows": rows,
      "ratios": ratios,
    }
    files.write_json(args.out / "sampling.json", written)
    (args.out / "sampling.txt").write_text("\n".join(page.lines) + "\n")
    picture(rows, fits, args.out / "sampling.png")


if __name__ == "__main__":
  main()
