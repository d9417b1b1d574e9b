"""--dry_run: the plan's figures are the job's own, and nothing is written."""

import pathlib
import re

import numpy as np
import pytest

from downscaling import checks, experiment, jobs
from downscaling.assembly import prior, samples, worlds
from downscaling.datasets import simulated
from downscaling.runtime import mesh as meshes
from downscaling.runtime import supervision

VARIANTS = {
  "ks": ("quick", "full", "smoke", "series", "stationary"),
  "kolmogorov": ("8x", "16x", "cpu", "smoke"),
}


def _context(workdir, variant="smoke", name="ks", **changes):
  found = experiment.load(f"{name}:{variant}", **changes)
  return jobs.Workdir(found, pathlib.Path(workdir), meshes.make(), supervision.Stop())


def test_dry_run_says_sizes_and_writes_nothing(tmp_path):
  text = jobs.plan("pipeline", _context(tmp_path / "run"))
  assert not (tmp_path / "run").exists()
  assert "4 × cpu" in text
  assert (
    "1280 fields (192, 1) float32 in 6 shards" in text
  )  # (128 + 64 + 64 + 32 + 32) × 4 snapshots
  assert "256 × 256 points in 24 dimensions" in text
  assert "20 steps of batch 16 (4 a device, in 1 part(s)) = 320 samples" in text
  assert "112 fields (192,)" in text  # 3 sets × 16 conditions × 2 members + 16
  assert (
    "7 units of 8 conditions × 2 members, 7 a process, one a device at a time; 2 a set leave 2 of 4"
    in text
  )
  # 16 fields × 192 × 4 bytes, their misfits and the pointers to both, of two units: what a device
  # holds
  assert (
    len(
      re.findall(
        r"memory a device: [^,]* temporary \(compiled\), [^,]* parameters, 24.7 kB fields",
        text,
      )
    )
    == 1
  )


def test_dry_run_refuses_what_the_job_would_refuse(tmp_path):
  with pytest.raises(ValueError, match=r"Set --config.train.batch=4 or 8"):
    jobs.plan("train", _context(tmp_path, **{"train.batch": 6}))
  with pytest.raises(
    ValueError, match=r"factor 7 does not divide the grid of 192 points"
  ):
    jobs.plan("generate", _context(tmp_path, **{"grid.factor": 7}))


@pytest.mark.parametrize(
  ("name", "variant"),
  [(name, variant) for name, variants in VARIANTS.items() for variant in variants],
)
def test_every_variant_builds(tmp_path, name, variant):
  """What a typo in a config would break: every block is accepted by its constructor, and sizes fit
  each other.
  """
  ctx = _context(tmp_path, variant, name)
  c = ctx.experiment
  checks.check(c, ctx.mesh)
  worlds.group(c)
  stats = prior.unit_statistics(c)
  prior.network(c, stats)
  prior.optimizer(c)
  prior.noise_levels(c)
  samples.sampler(c, stats, prior.network(c, stats))
  rows = {
    which: {k: n * c.data.snapshots for k, n in c.data.trajectories(which).items()}
    for which in ("hfhr", "lflr")
  }
  assert min(rows["hfhr"]["train"], rows["lflr"]["train"]) >= c.debias.points
  assert rows["lflr"]["test"] >= c.debias.held_out >= c.sampling.conditions
  assert rows["hfhr"]["test"] >= c.sampling.conditions
  assert rows["hfhr"]["reference"] == c.evaluate.reference  # whole trajectories
  for stage in experiment.DEPENDS:
    assert "dir" not in c.identity(stage).get("data", {})


@pytest.mark.parametrize("name", ["ks", "kolmogorov"])
def test_no_trajectory_has_two_uses(tmp_path, name):
  """What is tuned on a split is never reported on it: ids of all splits are apart, in every
  variant.
  """
  for variant in VARIANTS[name]:
    ctx = _context(tmp_path, variant, name)
    for which, splits in (("hfhr", simulated.SPLITS), ("lflr", simulated.SPLITS[:3])):
      trajectories = ctx.experiment.data.trajectories(which)
      assert {*trajectories} == {*splits}
      plan = worlds.generation(ctx.experiment, tmp_path, which, meshes.rows(ctx.mesh))
      ids = {split: [] for split in splits}
      for split, _, found, _ in plan.shards():
        ids[split].append(found)
      whole = np.concatenate([np.concatenate(found) for found in ids.values()])
      assert len(np.unique(whole)) == len(whole) == sum(trajectories.values())
      assert whole.max() < 2**31  # ids are folded into keys as 32-bit words


def test_the_step_on_256_squared_compiles_for_256_devices(command, execute, tmp_path):
  """The plan of a pod, by the real command on whatever machine this is, and that its figures are
  those of the net.
  """
  argv = command(
    "train",
    tmp_path / "none",
    "--dry_run",
    "--devices=256",
    config="kolmogorov.py:8x",
    small=False,
  )
  done = execute([*argv, "--config.mesh.fsdp=8"])
  assert done.returncode == 0, done.stderr
  text = done.stdout + done.stderr
  assert "mesh {'data': 32, 'fsdp': 8}" in text
  work, steps = (
    float(re.search(p, text)[1])
    for p in (r"([\d.]+) GFLOP a step", r"(\d+) steps of batch")
  )
  low, high = map(float, re.search(r"([\d.]+) h to ([\d.]+) h on", text).groups())
  # on one H200, whose dense peak in bfloat16 is 989 TFLOP/s; two digits are printed
  assert low == pytest.approx(work * 1e9 * steps / 0.4 / 989e12 / 3600, rel=0.05)
  assert high == pytest.approx(4 * low, rel=0.05)
  assert "on one NVIDIA H200: 40% to 10% of its peak, which is an assumption" in text
  parameters = int(re.search(r"([\d,]+) parameters", text)[1].replace(",", ""))
  held = float(re.search(r"memory a device: ([\d.]+) MB state", text)[1])
  gathered = float(re.search(r"all-gather among 8 devices, ([\d.]+) MB", text)[1])
  assert (
    16 * parameters / 8e6 < held < 1.05 * 16 * parameters / 8e6
  )  # parameters, average, two moments; an eighth
  assert gathered == pytest.approx(
    4 * parameters / 1e6, rel=0.01
  )  # all but the small leaves; three digits are printed
  assert not (tmp_path / "none").exists()


def test_prior_does_not_depend_on_the_coarse_world(tmp_path):
  """A new coarse solver must not cost a training run."""
  one, two = (
    _context(tmp_path).experiment,
    _context(tmp_path, **{"coarse.dt": 0.05, "data.lflr.train": 64}).experiment,
  )
  assert one.identity("train") == two.identity("train")
  assert one.identity("data") != two.identity("data")
  assert one.identity("samples") != two.identity("samples")


def test_one_prior_serves_every_operator(tmp_path):
  other = {
    "grid.factor": 4,
    "grid.operator": "block_mean",
    "train.dir": str(tmp_path / "prior"),
  }
  one, two = _context(tmp_path).experiment, _context(tmp_path, **other).experiment
  assert one.identity("train") == two.identity("train")
  assert one.identity("samples") != two.identity("samples")
  assert two.folder(tmp_path / "run", "train") == tmp_path / "prior"
  assert one.folder(tmp_path / "run", "train") == tmp_path / "run" / "train"


def test_samples_do_not_depend_on_how_many_there_are(tmp_path):
  """So that an ensemble may grow, and its report with it."""
  counts = {
    "sampling.members": 4,
    "sampling.conditions": 8,
    "sampling.unconditional.fields": 8,
  }
  one, two = _context(tmp_path).experiment, _context(tmp_path, **counts).experiment
  for stage in ("samples", "report"):
    assert one.identity(stage) == two.identity(stage)
  unit = _context(tmp_path, **{"sampling.unit": (4, 2)}).experiment
  assert one.identity("samples") != unit.identity("samples")
  assert one.extent() != two.extent()
