"""--dry_run: the plan's figures are the job's own, and nothing is written."""

import importlib.util
import pathlib
import re

import pytest

from downscaling import build, jobs, plans
from downscaling.common import mesh as meshes
from downscaling.common import supervision

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "ks.py"


def _context(workdir, variant="smoke", **changes):
  spec = importlib.util.spec_from_file_location("ks_config", CONFIG)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config(variant)
  config.update_from_flattened_dict(changes)
  return jobs.Context(config, pathlib.Path(workdir), meshes.make(), supervision.Stop(), "downscaling")


def test_dry_run_says_sizes_and_writes_nothing(tmp_path):
  text = plans.describe("pipeline", _context(tmp_path / "run"))
  assert not (tmp_path / "run").exists()
  assert "4 × cpu" in text
  assert "1024 fields (192, 1) float32 in 4 shards" in text  # (128 + 64 + 64) × 4 snapshots, 64 trajectories a shard
  assert "256 × 256 points in 24 dimensions" in text
  assert "20 steps of batch 16 (4 a device, in 1 part(s)) = 320 samples" in text
  assert "112 fields (192,)" in text  # 3 sets × 16 conditions × 2 members + 16
  assert len(re.findall(r"memory a device: [^,]* temporary \(compiled\)", text)) == 1


def test_dry_run_refuses_what_the_job_would_refuse(tmp_path):
  with pytest.raises(ValueError, match=r"Set --config.train.batch=4 or 8"):
    plans.describe("train", _context(tmp_path, **{"train.batch": 6}))
  with pytest.raises(ValueError, match=r"factor 7 does not divide the grid of 192 points"):
    plans.describe("generate", _context(tmp_path, **{"grid.factor": 7}))


@pytest.mark.parametrize("variant", ["quick", "full", "smoke"])
def test_every_variant_builds(tmp_path, variant):
  """What a typo in a config would break: every block is accepted by its constructor, and sizes fit each other."""
  ctx = _context(tmp_path, variant)
  c = ctx.config
  stats = plans._statistics(c, ctx)
  build.denoising_network(c, stats)
  build.optimizer(c)
  build.noise_levels(c)
  build.sampler(c, stats, build.denoising_network(c, stats))
  rows = {which: {k: n * c.data.snapshots for k, n in c.data[which].items()} for which in ("hfhr", "lflr")}
  assert min(rows["hfhr"]["train"], rows["lflr"]["train"]) >= c.debias.points
  assert rows["lflr"]["test"] >= c.debias.held_out >= c.sampling.conditions
  assert rows["hfhr"]["test"] >= c.evaluate.reference
  judged = max(c.debias.held_out, min(4096, c.debias.points), c.sampling.unconditional.fields)
  assert rows["hfhr"]["validation"] >= judged  # a floor as large as every set
  for stage in build.IDENTITY:
    assert "dir" not in build.identity(c, stage).get("data", {})


def test_prior_does_not_depend_on_the_coarse_world(tmp_path):
  """A new coarse solver must not cost a training run."""
  one, two = _context(tmp_path).config, _context(tmp_path, **{"coarse.dt": 0.05, "data.lflr.train": 64}).config
  assert build.identity(one, "train") == build.identity(two, "train")
  assert build.identity(one, "data") != build.identity(two, "data")
  assert build.identity(one, "samples") != build.identity(two, "samples")
