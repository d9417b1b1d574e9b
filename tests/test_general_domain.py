"""Every job on a domain without the habits of the built-in equations.

Two channels in unlike units, axes of unlike length, one of them with two ends: see strip.py.
"""

import json
import pathlib
import sys

import numpy as np
import pytest
import strip
import xarray

from downscaling import Downscaler
from downscaling.assembly import worlds
from downscaling.debias import maps
from downscaling.debias.equivariant import recipes
from downscaling.experiment import load
from downscaling.fields import symmetry

CONFIG = """
import ml_collections

def get_config():
  config = ml_collections.ConfigDict()
  config.update(dict(
    experiment="strip",
    data=dict(
      name="strip", burn_in=1.0, spacing=4.0, snapshots=4, shard=64,
      hfhr=dict(train=256, calibration=64, test=64, reference=64, floor=64),
      lflr=dict(train=256, calibration=64, test=64),
    ),
    grid=dict(points=24, factor=4),
    debias=dict(
      points=512, epsilon=0.05, max_iterations=60, held_out=96, maps=("entropic", "gaussian"),
      map="gaussian",
    ),
    model=dict(channels=(8, 16), strides=(2, 2), embedding=32),
    optimizer=dict(warmup_steps=2),
    train=dict(batch=32, total_steps=40, ema_decay=0.9),
    plan=dict(log_every=10, eval_every=20, save_every=20),
    watch=dict(fields=8, steps=2),
    sampling=dict(
      sets=("default+diffusion", "true+diffusion", "unconditional"),
      conditions=16, members=4, unit=(8, 4), resample=dict(strength=0.0), levels=dict(steps=8),
      observation_noise=0.0, unconditional=dict(fields=32, steps=8),
    ),
    evaluate=dict(reference=256, draws=40),
  ))
  return config
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory, execute):
  """The work folder of a whole pipeline."""
  folder = tmp_path_factory.mktemp("strip")
  (folder / "config.py").write_text(CONFIG)
  argv = [
    sys.executable,
    strip.__file__,
    "pipeline",
    f"--config={folder / 'config.py'}",
  ]
  done = execute([*argv, f"--workdir={folder / 'run'}"])
  assert done.returncode == 0, done.stderr
  return folder / "run"


@pytest.fixture(scope="module", autouse=True)
def _known():
  strip.use()


def test_maps_carry_every_channel_and_what_they_have_in_common(run):
  with xarray.open_zarr(run / "debias/held_out.zarr", consolidated=False) as data:
    assert data["gaussian"].dims == ("row", "y", "x", "channel")
    rows = {
      name: np.asarray(data[name], np.float64)
      for name in ("lflr", "gaussian", "entropic")
    }
  # 96 rows: a mean over the strip hardly varies, so these are good to a tenth.
  assert rows["lflr"][..., 0].mean() == pytest.approx(11, abs=0.1)
  for name in ("gaussian", "entropic"):
    assert rows[name][..., 0].mean() == pytest.approx(10, abs=0.1)
    assert rows[name][..., 1].mean() == pytest.approx(35, abs=0.05)
  # cos² along y is 1/2 on average, and 1 for the mean; cos² + sin² along x is 1.
  share = np.where(np.arange(strip.WAVES + 1) == 0, 1.0, 0.5)[:, None]
  variance = 4 * (strip.law() ** 2 * share).sum()
  mapped = rows["gaussian"]
  # y is sampled at four points, whose cos² is 1/2 but for one wave.
  assert mapped[..., 0].var() == pytest.approx(variance, rel=0.25)
  correlation = np.corrcoef(mapped[..., 0].ravel(), mapped[..., 1].ravel())[0, 1]
  assert correlation == pytest.approx(0.8, abs=0.05)  # as strip.World.output mixes them
  assert isinstance(maps.load(run / "debias/gaussian"), maps.Scaled)


def test_members_meet_their_conditions_in_both_channels(run):
  store = xarray.open_zarr(run / "samples/gaussian+diffusion.zarr", consolidated=False)
  assert store["sample"].dims == ("condition", "member", "y", "x", "channel")
  assert store["sample"].shape == (16, 4, 16, 24, 2)
  np.testing.assert_allclose(store["y"], strip.Fine().y)
  assert store["y"].attrs["units"] == "km"
  seen = store["sample"].values[:, :, ::4, ::4]
  given = store["condition_field"].values[:, None]
  # Imposed exactly at the end; float32 of values about 35.
  np.testing.assert_allclose(seen, np.broadcast_to(given, seen.shape), atol=2e-4)
  spread = store["sample"].values.std(axis=1).mean(axis=(0, 1, 2))
  assert (spread > 0).all()


def test_a_report_for_every_channel(run):
  found = json.loads((run / "report/metrics.json").read_text())["channels"]
  assert [*found] == ["temperature", "salinity"]
  for name, metrics in found.items():
    assert (run / "report" / name / "report.html").exists()
    assert metrics["debias"]["gaussian"]["corr_input"] > 0.9
    assert metrics["samples"]["true+diffusion"]["constraint_rmse"] < 1e-5
    before, after = (metrics["debias"][row]["wass1"] for row in ("lflr", "gaussian"))
    assert after < before
  # Not two copies of one channel.
  assert found["temperature"]["samples"] != found["salinity"]["samples"]


def test_the_library_draws_both_channels(run):
  fitted = Downscaler.load(run)
  with xarray.open_zarr(run / "debias/held_out.zarr", consolidated=False) as data:
    y, mapped = np.asarray(data["lflr"][:2]), np.asarray(data["gaussian"][:2])
  np.testing.assert_allclose(fitted.debias(y), mapped, rtol=1e-5)
  drawn = np.asarray(fitted.sample(mapped, members=2))
  assert drawn.shape == (2, 2, 16, 24, 2)
  np.testing.assert_allclose(drawn[:, 0, ::4, ::4], mapped, atol=2e-4)


def test_a_plan(run, execute):
  argv = [
    sys.executable,
    strip.__file__,
    "pipeline",
    f"--config={run.parent / 'config.py'}",
  ]
  done = execute([*argv, f"--workdir={run.parent / 'planned'}", "--dry_run"])
  assert done.returncode == 0, done.stderr
  assert not (run.parent / "planned").exists()


def test_steps_that_know_one_channel_say_so():
  rows = np.random.default_rng(0).standard_normal((8, 4, 6, 2))
  with pytest.raises(
    ValueError, match=r"rows of 2 channels came.*Q: use the map 'gaussian'"
  ):
    recipes.fit(rows, rows, group=strip.Coarse().group(), recipe="GQ")


def test_a_gaussian_map_of_two_channels_is_the_optimal_one():
  """Against the closed form on all values at once, where no group helps."""
  rng = np.random.default_rng(0)
  mixing = rng.standard_normal((2, 12, 12)) / 3 + np.eye(12)
  source, target = (rng.standard_normal((4000, 12)) @ m for m in mixing)
  shape = (-1, 2, 3, 2)
  made = recipes.fit(
    source.reshape(shape), target.reshape(shape), group=symmetry.trivial(6), recipe="G"
  )
  a, b = (np.cov(x.T, bias=True) for x in (source, target))

  def root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values)) @ vectors.T

  half = root(a)
  back = np.linalg.inv(half)
  optimal = back @ root(half @ b @ half) @ back
  want = (source - source.mean(0)) @ optimal + target.mean(0)
  # The map returns float32.
  np.testing.assert_allclose(
    made(source.reshape(shape)).reshape(want.shape), want, atol=1e-4
  )


def test_grids_come_from_the_domain(tmp_path):
  path = pathlib.Path(tmp_path / "config.py")
  path.write_text(CONFIG)
  e = load(str(path))
  assert worlds.space(e) == (16, 24)
  assert worlds.operator(e).coarse == (4, 6)
  assert worlds.channels(e) == 2
