"""Series in time, as a config asks for them: identities, refusals, and the whole pipeline on little
data.
"""

import json

import jax
import numpy as np
import pytest
import xarray

from downscaling import checks, experiment, jobs
from downscaling.assembly import prior, samples, time_series, worlds
from downscaling.fields import statistics
from downscaling.jobs import rows, sample
from downscaling.runtime import files, stage_folder, supervision
from downscaling.runtime import mesh as meshes
from downscaling.sampling import ensemble

# Trajectories of 6 frames, series of all 6 by windows of 4 that have 2 in common.
TINY = {
  "grid.frames": 4, "sampling.series.overlap": 2, "data.snapshots": 6,
  "data.shard": 8, "data.hfhr.train": 16, "data.hfhr.calibration": 8, "data.hfhr.test": 8,
  "data.hfhr.reference": 8,
  "data.hfhr.floor": 8, "data.lflr.calibration": 8,
  "data.lflr.train": 16, "data.lflr.test": 8, "debias.maps": ("gaussian",),
  "debias.map": "gaussian",
  "debias.points": 64, "debias.held_out": 40, "model.channels": (8, 8), "model.strides": (4, 4),
  "model.embedding": 8,
  "train.batch": 16, "train.total_steps": 4, "optimizer.warmup_steps": 1, "plan.log_every": 2,
  "plan.eval_every": 4,
  "plan.save_every": 4, "watch.fields": 4, "watch.steps": 2, "sampling.conditions": 4,
  "sampling.members": 2,
  "sampling.unit": (4, 2), "sampling.series.frames": 6, "sampling.levels.steps": 3,
  "sampling.unconditional.fields": 4,
  "sampling.unconditional.steps": 3, "evaluate.reference": 48,
}  # fmt: skip


def config(variant="series", **changes):
  return experiment.load(f"ks:{variant}", **changes)


# ---------------------------------------------------------------- identities


@pytest.mark.parametrize("stage", experiment.DEPENDS)
def test_what_does_not_decide_a_result_leaves_no_trace_in_an_identity(stage):
  """Single frames, and keys that may change between restarts: folders stay valid."""
  c = config("quick")
  assert "frames" not in c.identity(stage).get("grid", {})
  assert "series" not in c.identity(stage).get("sampling", {})
  free = {
    "sampling.members": 3,
    "sampling.conditions": 5,
    "sampling.max_failed": 0.5,
    "debias.path": "fused",
    "train.dir": "elsewhere",
    "plan.log_every": 7,
    "memory.microbatches": 2,
    "mesh.fsdp": 2,
    "label": "other",
  }
  assert c.changed(**free).identity(stage) == c.identity(stage)


def test_first_conditions_are_of_many_trajectories():
  """2048 held-out rows of 64 trajectories, 32 of each: 96 conditions meet nearly all, far apart in
  time.
  """
  c = config("quick", **{"debias.held_out": 2048, "data.lflr.test": 64})
  order = time_series.condition_rows(c)
  np.testing.assert_array_equal(np.sort(order), np.arange(2048))
  trajectory, turn = np.divmod(order[:96], 32)
  assert len(set(trajectory)) >= 60  # the widest gap, 34, may pass one over
  apart = [np.diff(np.sort(turn[trajectory == t])) for t in range(64)]
  # Gaps are numbers of Fibonacci's: 13, 21, 34.
  assert np.concatenate(apart).min() >= 13
  assert c.identity("samples")["order"]


@pytest.mark.parametrize(
  "changes", [{"debias.held_out": 64, "data.lflr.test": 64}, TINY]
)
def test_where_conditions_keep_the_order_of_the_rows(changes):
  """One row a trajectory, and series, are spread out as they lie; identities of older work folders
  stay.
  """
  c = config("series" if changes is TINY else "quick", **changes)
  assert time_series.condition_rows(c) is None
  assert "order" not in c.identity("samples")


def test_what_depends_on_series_and_what_does_not():
  """The data are the same snapshots; held-out rows of debiasing depend on L alone; the prior on F
  alone.
  """
  base = config(**TINY)
  other = {
    "frames": config(**TINY | {"grid.frames": 2, "sampling.series.overlap": 0}),
    "overlap": config(**TINY | {"sampling.series.overlap": 3}),
    "length": config(**TINY | {"sampling.series.frames": 4}),
  }
  changed = {
    name: {s for s in experiment.DEPENDS if _hash(base, s) != _hash(c, s)}
    for name, c in other.items()
  }
  assert changed == {
    "frames": {"train", "samples", "report"},
    "overlap": {"samples", "report"},
    "length": {"debias", "samples", "report"},
  }


def _hash(c, stage):
  return stage_folder.config_hash(c.identity(stage))


# ---------------------------------------------------------------- the door


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    (
      {"grid.frames": 7, "sampling.series.frames": 7},
      r"config.grid.frames=7.*--config.grid.frames=6 or fewer",
    ),
    ({"grid.frames": 0}, "config.grid.frames=0: need a whole number, at least 1"),
    (
      {"sampling.series.frames": 8},
      r"config.sampling.series.frames=8, but a trajectory has .*snapshots=6",
    ),
    ({"sampling.series.frames": 5}, r"--config.sampling.series.frames=4 or 6\."),
    ({"sampling.series.frames": 3}, r"--config.sampling.series.frames=4 or more"),
    (
      {"sampling.series.overlap": 4},
      r"need 0 to 3.*--config.sampling.series.overlap=3",
    ),
    (
      {"sampling.conditions": 9},
      r"asks for 54 hfhr test frames in series of 6: 48.*hfhr.test=9",
    ),
    (
      {"sampling.conditions": 7},
      r"held_out=40 fields.*conditions=6 or fewer, or --config.debias.held_out=42",
    ),
    (
      {"evaluate.reference": 49},
      r"evaluate.reference asks for 49 hfhr reference snapshots",
    ),
    (
      {"train.batch": 52, "grid.frames": 6, "data.hfhr.train": 11},
      r"has 11 windows of 6 frames",
    ),
  ],
)
def test_the_door(changes, words):
  with pytest.raises(ValueError, match=words):
    checks.check(config(**TINY | changes), meshes.make())


def test_what_attributes_say():
  assert time_series.comment(config("quick")).startswith(
    "Members are independent in time: the prior knows single fields"
  )
  assert (
    "6 frames were drawn together, by windows of 4 frames with 2 in common"
    in time_series.comment(config(**TINY))
  )
  alone = config(**TINY | {"grid.frames": 1, "sampling.series.overlap": 0})
  assert time_series.comment(alone).startswith(
    "Frames of a member are independent in time, but for their conditions"
  )


# ---------------------------------------------------------------- the sampler


@pytest.mark.parametrize(
  ("name", "guidance"), [("ks", "measured"), ("kolmogorov", "moment")]
)
def test_series_of_both_equations_meet_their_conditions(name, guidance):
  """Lines and planes, an untrained network: frames are an axis, each on its own coarse field."""
  small = {
    "sampling.levels.steps": 2,
    "sampling.guidance.name": guidance,
    "sampling.unit": (2, 2),
  }
  in_time = {
    "grid.frames": 2,
    "sampling.series.frames": 4,
    "sampling.series.overlap": 1,
  }
  c = experiment.load(f"{name}:smoke", **small | in_time)
  space, op = worlds.space(c), worlds.operator(c)
  ones = np.ones(1, np.float32)
  stats = statistics.Statistics(0 * ones, 2 * ones, np.ones((*space, 1), np.float32))
  network = prior.network(c, stats)
  params = jax.jit(network.init)(
    jax.random.key(0), np.zeros((1, *space, 2), np.float32), ones
  )["params"]
  y = jax.random.normal(jax.random.key(1), (2, 4, *op.coarse, 1))
  keys = jax.random.split(jax.random.key(2), 2)
  fields, misfit = jax.jit(samples.sampler(c, stats, network, prior.stand_in_table(c)))(
    keys, y, params
  )
  assert fields.shape == (2, 4, *space, 1)
  assert misfit.shape == (2,)
  # float32, fields of size 2.
  np.testing.assert_allclose(op.apply(fields), y, atol=1e-4)


# ---------------------------------------------------------------- the pipeline


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A whole pipeline in this process."""
  folder = tmp_path_factory.mktemp("series") / "run"
  ctx = jobs.Workdir(config(**TINY), folder, meshes.make(), supervision.Stop())
  checks.check(ctx.experiment, ctx.mesh)
  jobs.run("pipeline", ctx)
  return ctx


def test_the_pipeline_end_to_end(run):
  """Stores with an axis of time, conditions that are stretches in order of time, a report that
  knows both.
  """
  for name, source in samples.sources(run.experiment).items():
    with xarray.open_zarr(run.folder("samples") / f"{name}.zarr") as data:
      assert data["sample"].dims == ("condition", "member", "time", "x")
      assert data["sample"].shape == ((4, 2, 6, 192) if source else (1, 4, 6, 192))
      assert np.isfinite(data["sample"].values).all()
      np.testing.assert_array_equal(data["time"], np.arange(6.0))  # spacing 1
      assert "drawn together, by windows of 4 frames" in data.attrs["comment"]
      if source:
        assert data["condition_field"].dims == ("condition", "time", "x_coarse")
        seen, field = data["sample"].values[..., ::16], data["condition_field"].values
        noise = data.attrs.get("observation_noise", [0.0])[0]
        off = np.sqrt(np.mean((seen - field[:, None]) ** 2))
        # Exact, in float32 of size 3; or off by no more than what the fit took y′ to be off by.
        assert off < (1e-4 if noise == 0 else 2 * noise), (name, noise)
  fitted = files.read_json(run.folder("samples") / "observation_noise.json")
  assert [*fitted] == ["gaussian+diffusion"]
  true = rows.true_fields(run, 4)
  assert true.shape == (4, 6, 192, 1)
  # A field keeps its shape from one frame to the next, as frames of different trajectories do not.
  along, across = np.diff(true, axis=1), true[1:] - true[:-1]
  assert (along**2).mean() < 0.5 * (across**2).mean()
  stored = ensemble.read(run.folder("samples") / "true+diffusion.zarr")[
    "condition_field"
  ]
  np.testing.assert_array_equal(stored, true[:, :, ::16, 0])
  metrics = json.loads((run.folder("report") / "metrics.json").read_text())
  assert {"gaussian+diffusion", "gaussian+diffusion, members exchanged", "floor"} <= {
    *metrics["series"]
  }
  # 8 series of chaos.
  assert metrics["series"]["floor"]["increment"] == pytest.approx(1, abs=0.5)
  # Frames are rows.
  assert metrics["sizes"]["samples.gaussian+diffusion"] == [24, 2, 192]
  assert (run.folder("report") / "hovmoeller_true_diffusion.png").exists()


def test_members_do_not_depend_on_devices(run):
  """One device draws the same series as four, but for the order of float32 sums."""
  c, stats = run.experiment, run.statistics()
  network = prior.network(c, stats)
  params, table = sample.restored(run.stage("train"), c, network, 1, run.mesh)
  unit = ensemble.Unit(0, 4, 0, 2)
  y = rows.condition_fields(run, "true")
  layout = ensemble.layout_of(
    samples.sampler(c, stats, network, table), params, conditions=4, members=2, space=(192,),
    coarse=y.shape[1:],
    unit=(4, 2), frames=6,
  )  # fmt: skip
  with jax.default_device(jax.devices()[0]):
    ids, members, fields = ensemble.block(layout, unit, np.arange(4), y)
    drawn, _ = jax.jit(samples.sampler(c, stats, network, table))(
      ensemble.keys(c.seed, ids, members), fields, params
    )
  with xarray.open_zarr(run.folder("samples") / "true+diffusion.zarr") as data:
    stored = data["sample"].values
  np.testing.assert_allclose(
    np.asarray(drawn)[..., 0].reshape(stored.shape), stored, atol=1e-3
  )  # of size 3
