"""What a user can get wrong with the flow: steps beyond stability, grids that do not nest, groups
that do not fit.
"""

import dataclasses

import jax
import numpy as np
import pytest

from downscaling import checks, experiment, jobs
from downscaling.assembly import worlds
from downscaling.datasets import generate, simulated
from downscaling.equations import kolmogorov
from downscaling.runtime import mesh as meshes
from downscaling.runtime import supervision


@pytest.mark.parametrize(
  ("overrides", "needed"),
  [
    (
      {"fine.dt": 0.05},
      (
        "config.fine.dt=0.05 is not stable on 64² points",
        "Set --config.fine.dt=0.02, or less",
      ),
    ),
    (
      {"coarse.dt": 0.05},
      ("config.coarse.dt=0.05 is not stable on 32² points", "--config.coarse.dt=0.025"),
    ),
    (
      {"grid.factor": 3},
      (
        "factor 3 does not divide the grid of 64 points",
        "[2, 4, 8, 16, 32] (config.grid.factor)",
      ),
    ),
    (
      {"grid.factor": 1},
      ("32² cells cannot give 64² points", "--config.coarse.cells=64"),
    ),
    (
      {"grid.points": 96, "grid.factor": 8, "fine.dt": 0.01},
      (
        "A grid of 12 points does not keep the symmetry",
        "e.g. 16",
        "config.grid.points over config.grid.factor",
      ),
    ),
    (
      {"coarse.cells": 36},
      (
        "A grid of 36 points does not keep the symmetry",
        "e.g. 40 (config.coarse.cells)",
      ),
    ),
  ],
)
def test_refused_before_anything_is_written(
  execute, command, tmp_path, overrides, needed
):
  """As processes: one line, exit code 1, no folder."""
  done = execute(
    command(
      "generate",
      tmp_path / "run",
      config="kolmogorov.py:smoke",
      small=False,
      **overrides,
    )
  )
  assert done.returncode == 1, (done.stdout, done.stderr)
  (said,) = done.stderr.splitlines()
  assert said.startswith("downscaling: generate: ")
  assert all(part in said for part in needed), said
  assert not (tmp_path / "run").exists()


@pytest.fixture
def config():
  """A small config of the flow: 64² to 32², eight trajectories a shard, 100 steps a trajectory;
  config(key=value).
  """

  def make(**overrides):
    short = {"data.burn_in": 0.5, "data.spacing": 0.5}
    return experiment.load("kolmogorov:smoke", **short | overrides)

  return make


def test_a_blow_up_stops_the_job(config, monkeypatch, tmp_path):
  """A dt of seven times what is stable, the door believing in a slower flow: id and time are named,
  no field is kept.

  The fine world, which was finished before, stays; so does the right command's way: nothing half
  written lies about.
  """
  monkeypatch.setattr(kolmogorov, "FASTEST", 0.1)
  c = config(**{"coarse.dt": 0.25})
  checks.check(c, meshes.make())
  context = jobs.Workdir(c, tmp_path, meshes.make(), supervision.Stop(), "test")
  with pytest.raises(
    FloatingPointError,
    match=r"trajectory \d+ (is not finite|has an rms of \S+) at t = \d.*smaller dt",
  ):
    jobs.run("generate", context)
  assert len(simulated.load(worlds.dataset(c, tmp_path, "hfhr"), "train")["u"]) == 64
  assert not list(worlds.dataset(c, tmp_path, "lflr").data_path.iterdir())
  assert not context.done("data")


def test_a_blow_up_leaves_the_shards_before_it_whole(config, monkeypatch, tmp_path):
  """The last shard of four blows up: the others are as a healthy run writes them, and it is not
  there.
  """
  trajectories, mesh = (
    {"data.lflr": {"train": 16, "calibration": 8, "test": 8}},
    meshes.make(),
  )
  with jax.enable_x64(True):
    plan, healthy = (
      worlds.generation(
        config(**trajectories), tmp_path / name, "lflr", meshes.rows(mesh)
      )
      for name in ("run", "healthy")
    )
    monkeypatch.setattr(kolmogorov, "FASTEST", 0.1)
    wild = worlds.generation(
      config(**trajectories | {"coarse.dt": 0.25}), tmp_path, "lflr", meshes.rows(mesh)
    )
    plan = dataclasses.replace(
      plan,
      check=wild.check,
      rollout=lambda ids: (
        wild if np.asarray(ids)[0] == 1_500_000_000 else healthy
      ).rollout(ids),
    )
    with pytest.raises(
      FloatingPointError,
      match=r"trajectory 150000000\d .* at t = .*--config\.coarse\.dt",
    ):
      generate.generate(plan, mesh, lambda: False)
    generate.generate(healthy, mesh, lambda: False)
  before = [path for *_, path in plan.shards()][:3]
  assert {path.name for path in plan.builder.data_path.iterdir()} == {
    path.name for path in before
  }
  for path, same in zip(before, healthy.shards(), strict=False):
    assert path.read_bytes() == same[-1].read_bytes()
