"""`kolmogorov.py:8x` and `:16x` from the equation to the report on their own 256², with next to no
data and steps.
"""

import json
import os
import subprocess

import pytest
import xarray

# Everything that costs time and nothing that costs shape: the grids, the network and the solvers
# stay the config's own.
TINY = {
  "data.burn_in": 0.2, "data.spacing": 0.1, "data.snapshots": 4, "data.shard": 2,
  "data.hfhr.train": 4, "data.hfhr.calibration": 2, "data.hfhr.test": 2, "data.hfhr.reference": 2,
  "data.hfhr.floor": 2,
  "data.lflr.train": 4, "data.lflr.calibration": 2, "data.lflr.test": 2,
  "debias.points": 16, "debias.held_out": 8, "debias.epsilon": 0.01, "debias.threshold": 1e-2,
  "debias.recipe": "GQG",
  "train.batch": 2, "train.total_steps": 2, "train.augment": True, "optimizer.warmup_steps": 1,
  "watch.fields": 1, "watch.steps": 1, "plan.log_every": 1, "plan.eval_every": 2,
  "plan.save_every": 2,
  "sampling.conditions": 2, "sampling.members": 2, "sampling.unit": (1, 2),
  "sampling.levels.steps": 2,
  "sampling.unconditional.fields": 2, "sampling.unconditional.steps": 2, "evaluate.reference": 8,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "coarse"), [("8x", 32), ("16x", 16)])
def test_the_whole_path_at_256_squared(command, tmp_path, variant, coarse):
  argv = command(
    "pipeline", tmp_path / "run", config=f"kolmogorov.py:{variant}", small=False, **TINY
  )
  one = os.environ | {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=1"
  }  # a batch of 2 is enough to wait for
  done = subprocess.run(argv, capture_output=True, text=True, timeout=1200, env=one)
  assert done.returncode == 0, done.stderr
  metrics = json.loads((tmp_path / "run" / "report" / "metrics.json").read_text())
  rows = metrics["samples"]
  assert {"equivariant+diffusion", "raw+diffusion", "true+diffusion"} <= set(rows)
  # Two steps teach nothing, but the constraint holds by the gain, which is float32: rounding of
  # values up to 20.
  assert all(
    rows[name]["constraint_rmse"] < 1e-4
    for name in ("equivariant+diffusion", "raw+diffusion", "true+diffusion")
  )
  stored = xarray.open_zarr(tmp_path / "run" / "samples" / "equivariant+diffusion.zarr")
  assert stored["sample"].shape == (2, 2, 256, 256)
  assert stored["y_coarse"].shape == (coarse,)
