"""How fast priors learn: training loss and held-out denoising error by step, of several work
folders of the same data.

  python benchmarks/learning_curves.py --runs=wiener=runs/a,adaptive=runs/b [--every=250]
                                       [--out=curves.png]

Each WORKDIR holds a `train` of its own, e.g. with another config.model.preconditioning; those of
one seed and batch see the same fields and noise, so their losses differ by what the nets know. A
run that was cut short ends early.

  loss      mean over the --every steps before, of fields moved or not as the run was told
  held-out  the averaged prior's validation/error, where it was measured
"""

import argparse
import pathlib

import numpy as np

from downscaling.runtime import metric_writer


def curve(workdir, every):
  """{step: mean loss of the `every` steps up to it}, {step: held-out error}."""
  steps, values = map(np.asarray, metric_writer.read_scalars(workdir / "train", "loss"))
  ends = np.arange(every, steps[-1] + 1, every)
  loss = {
    int(e): float(values[(steps > e - every) & (steps <= e)].mean()) for e in ends
  }
  return loss, dict(
    zip(*metric_writer.read_scalars(workdir / "train", "validation/error"), strict=True)
  )


def draw(curves, path):
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(figsize=(7, 3.2), constrained_layout=True)
  for name, (loss, held_out) in curves.items():
    (line,) = axes.plot([*loss], [*loss.values()], "-", label=name)
    axes.plot(
      [*held_out],
      [*held_out.values()],
      "o",
      color=line.get_color(),
      markerfacecolor="none",
    )
  axes.set(
    xlabel="step",
    ylabel="weighted denoising error",
    title="line: training; rings: held-out, averaged",
  )
  values = np.concatenate([[*loss.values()] for loss, _ in curves.values()])
  axes.set_ylim(
    top=min(1.05 * values.max(), 1.5 * np.median(values))
  )  # the first steps of edm lie far above
  axes.legend(frameon=False)
  figure.savefig(path, dpi=110)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--runs", required=True)
  parser.add_argument("--every", type=int, default=250)
  parser.add_argument("--out", type=pathlib.Path)
  args = parser.parse_args()
  pairs = (run.split("=", 1) for run in args.runs.split(","))
  curves = {name: curve(pathlib.Path(workdir), args.every) for name, workdir in pairs}
  steps = sorted(set().union(*(loss for loss, _ in curves.values())))
  print(f"{'step':>6}" + "".join(f"{name:>10}{'held-out':>10}" for name in curves))
  for step in steps:
    cells = (
      f"{v[step]:>10.4f}" if step in v else " " * 10
      for pair in curves.values()
      for v in pair
    )
    print(f"{step:>6}" + "".join(cells))
  if args.out:
    draw(curves, args.out)


if __name__ == "__main__":
  main()
