"""Benchmarks run, at their smallest: a figure can only be measured again if the command that shows
it still works.
"""

import json
import math
import os
import pathlib
import sys

import numpy as np
import pytest

from downscaling.runtime import metric_writer

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
def test_accelerator_measures_every_row(execute, tmp_path):
  script = ROOT / "benchmarks" / "accelerator.py"
  two = os.environ | {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2"
  }  # the sampler is compiled for each
  done = execute(
    [sys.executable, str(script), "--size=small", "--seconds=0.2", f"--out={tmp_path}"],
    env=two,
  )
  assert done.returncode == 0, done.stderr
  found = json.loads((tmp_path / "accelerator.json").read_text())
  assert (found["device"], found["devices"]) == ("cpu", 2)
  assert [r["kind"] for r in found["rows"]] == ["training"] * 2 + ["sampling"] + [
    "Sinkhorn"
  ] * 3 + ["soft-min"]
  for row in found["rows"]:
    assert "failed" not in row, row["failed"]
    assert "skipped" not in row
    assert all(math.isfinite(v) and v > 0 for v in row.values() if isinstance(v, float))
    assert row.get("utilisation") is None  # nobody knows the peak of a CPU
  step = found["rows"][0]
  assert step["samples_per_second"] == pytest.approx(16 / step["seconds_per_step"])
  assert len(done.stdout.splitlines()) == 1 + len(found["rows"])


def test_accelerator_says_what_it_has_no_time_for(execute, tmp_path):
  script = ROOT / "benchmarks" / "accelerator.py"
  done = execute(
    [sys.executable, str(script), "--size=small", "--limit=0", f"--out={tmp_path}"]
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.count("skipped: 0 s have passed") == 7


def test_learning_curves_are_the_logged_losses(execute, finished, tmp_path):
  script, workdir = ROOT / "benchmarks" / "learning_curves.py", finished[0]
  picture = tmp_path / "curves.png"
  done = execute(
    [
      sys.executable,
      str(script),
      f"--runs=one={workdir},two={workdir}",
      "--every=8",
      f"--out={picture}",
    ]
  )
  assert done.returncode == 0, done.stderr
  steps, values = map(np.asarray, metric_writer.read_scalars(workdir / "train", "loss"))
  head, *lines = done.stdout.splitlines()
  assert head.split() == ["step", "one", "held-out", "two", "held-out"]
  assert len(lines) == steps[-1] // 8
  for end, line in zip(range(8, steps[-1] + 1, 8), lines, strict=True):
    mean = values[(steps > end - 8) & (steps <= end)].mean()
    assert line.split()[:2] == [str(end), f"{mean:.4f}"]
  assert picture.stat().st_size > 5000


@pytest.mark.slow
@pytest.mark.parametrize(
  "line",
  [
    "convolution.py --rounds=1 --only=1",
    "cost_growth.py --parts=solver --seconds=0.01 --largest=64",
    "debias_sweep.py --points=256 --epsilons=0.01 --most=512",
    "ensemble.py --units=3 --megabytes=1 --points=32",
    "gaussian.py --members=64",
    "kolmogorov_audit.py --states=2 --snapshots=2 --adjust=0.1 --spacing=0.1 --burn_in=0.1",
    "ks_coarse.py --trajectories=64",
    "series.py --members=8",
    "sinkhorn.py --points=256 --rounds=1 --solvers=dense,fused,ring,ott,ott-online",
    "training.py --rounds=1 --case=64x64",
  ],
)
def test_benchmark_runs(execute, line):
  script, *flags = line.split()
  done = execute([sys.executable, str(ROOT / "benchmarks" / script), *flags])
  assert done.returncode == 0, done.stderr
  assert any(char.isdigit() for char in done.stdout)
  assert "failed" not in done.stdout
