"""A fitted downscaler: opened from a folder alone, the job's own members, arrays and labels."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import xarray

import downscaling
from downscaling.debias import maps
from downscaling.equations import ks, rollouts
from downscaling.jobs import verify
from downscaling.runtime import files, stage_folder

KS = pathlib.Path(__file__).parents[1] / "pretrained" / "ks"
SET = "equivariant+diffusion"


@pytest.fixture(scope="module")
def workdir(finished, tmp_path_factory):
  """A finished run of the smoke config, without its data set."""
  folder = tmp_path_factory.mktemp("downscaler") / "run"
  for stage in ("debias", "train", "samples"):
    shutil.copytree(finished[0] / stage, folder / stage)
  (folder / "data").mkdir()
  for name in ("statistics.npz", stage_folder.MARKER):
    shutil.copyfile(finished[0] / "data" / name, folder / "data" / name)
  return folder


@pytest.fixture(scope="module")
def fitted(workdir):
  return downscaling.Downscaler.load(workdir)


def test_members_are_those_of_the_job_bit_for_bit(workdir, fitted):
  """With the run's unit, seed and noise; and the job's own rows before and after the map."""
  unit, seed = fitted.experiment.sampling.unit, fitted.experiment.seed
  with xarray.open_zarr(workdir / "samples" / f"{SET}.zarr") as stored:
    conditions = stored["condition_field"].values[..., None]
    drawn = fitted.sample(conditions, members=2, key=seed, unit=unit)
    np.testing.assert_array_equal(drawn[..., 0], stored["sample"].values)
  with xarray.open_zarr(
    workdir / "debias" / "held_out.zarr", consolidated=False
  ) as rows:
    mapped = fitted.debias(rows["lflr"].values[..., None])
    np.testing.assert_array_equal(mapped[..., 0], rows["equivariant"].values)


def test_members_do_not_depend_on_how_many_there_are(fitted):
  y = np.random.default_rng(0).normal(size=(3, 24, 1)).astype(np.float32)
  many = fitted.sample(y, members=5, unit=(2, 2), noise=0)
  assert many.shape == (3, 5, 192, 1)
  np.testing.assert_array_equal(
    fitted.sample(y[:2], members=3, unit=(2, 2), noise=0), many[:2, :3]
  )
  np.testing.assert_allclose(
    many[:, :, ::8], np.broadcast_to(y[:, None], (3, 5, 24, 1)), atol=1e-4
  )
  assert (
    np.abs(fitted.sample(y, members=5, key=1, unit=(2, 2), noise=0) - many).max() > 0.01
  )


def test_leading_axes_stay(fitted):
  y = np.random.default_rng(1).normal(size=(2, 3, 24, 1)).astype(np.float32)
  assert fitted.debias(y).shape == y.shape
  drawn = fitted.sample(y, members=2, unit=(6, 2))
  assert drawn.shape == (2, 3, 2, 192, 1)
  flat = fitted.sample(y.reshape(6, 24, 1), members=2, unit=(6, 2))
  np.testing.assert_array_equal(drawn.reshape(flat.shape), flat)
  assert fitted.sample(y[0, 0], members=2).shape == (2, 192, 1)


def test_labels_in_and_out(fitted):
  """A DataArray without an axis of channels, with a coordinate of its own and a history."""
  y = np.random.default_rng(2).normal(size=(3, 24)).astype(np.float32)
  labelled = xarray.DataArray(
    y,
    dims=("time", "lon"),
    coords={"time": [10, 20, 30], "lon": np.arange(24.0)},
    attrs={"units": "m", "history": "mine"},
    name="u",
  )
  mapped = fitted.debias(labelled)
  assert mapped.dims == ("time", "lon")
  np.testing.assert_array_equal(mapped.values, fitted.debias(y[..., None])[..., 0])
  assert mapped.attrs["history"] == "mine\ndebiased by the map equivariant"
  drawn = fitted.sample(mapped, members=2)
  assert drawn.dims == ("time", "member", "lon")
  assert drawn.name == "u"
  assert drawn.attrs["units"] == "m"
  np.testing.assert_array_equal(drawn["time"], [10, 20, 30])
  np.testing.assert_allclose(drawn["lon"], np.arange(192) / 3)  # a box of length 64
  np.testing.assert_array_equal(
    drawn.values, fitted.sample(mapped.values[..., None], 2)[..., 0]
  )
  channels = labelled.expand_dims("channel", axis=-1)
  assert fitted.sample(channels, members=2).dims == ("time", "member", "lon", "channel")


def test_what_it_saves_is_what_it_loads(workdir, fitted, tmp_path):
  """Also the noise that was fitted to the map; and a folder that holds anything is left alone."""
  fitted.save(tmp_path / "small")
  again = downscaling.Downscaler.load(tmp_path / "small")
  y = np.random.default_rng(3).normal(size=(2, 24, 1)).astype(np.float32)
  np.testing.assert_array_equal(again.sample(y, 2), fitted.sample(y, 2))
  noise = json.loads((workdir / "samples" / "observation_noise.json").read_text())
  assert again.noise == fitted.noise == noise[SET]["std"]
  assert not (tmp_path / "small" / "train" / "checkpoints").exists()
  text, well = verify.verify(tmp_path / "small")
  assert well, text
  with pytest.raises(FileExistsError, match="not empty"):
    fitted.save(tmp_path / "small")
  (tmp_path / "other").mkdir()
  (tmp_path / "other" / "mine.txt").write_text("mine")
  with pytest.raises(FileExistsError, match="not empty"):
    fitted.save(tmp_path / "other")
  assert [p.name for p in (tmp_path / "other").iterdir()] == ["mine.txt"]


def test_a_map_of_maps_is_saved_whole(workdir, fitted, tmp_path):
  """Maps of several channels, and chains, keep their parts in folders of their own."""
  run = shutil.copytree(workdir, tmp_path / "run")
  folder = run / "debias" / "equivariant"
  (folder / "arrays.npz").unlink()
  maps.Chain((fitted.map,)).save(folder)
  (folder / "checkpoints").mkdir()
  (folder / "checkpoints" / "left").write_text("behind")
  downscaling.Downscaler.load(run).save(tmp_path / "small")
  again = downscaling.Downscaler.load(tmp_path / "small")
  y = np.random.default_rng(5).normal(size=(2, 24, 1)).astype(np.float32)
  np.testing.assert_array_equal(again.debias(y), fitted.debias(y))
  assert not (tmp_path / "small" / "debias" / "equivariant" / "checkpoints").exists()


def test_another_map_by_its_name(workdir, fitted):
  other = downscaling.Downscaler.load(workdir, map="entropic")
  y = np.random.default_rng(4).normal(size=(2, 24, 1)).astype(np.float32)
  assert np.abs(other.debias(y) - fitted.debias(y)).max() > 1e-4
  with pytest.raises(
    FileNotFoundError, match=r"has no map 'optimal': it has \['entropic'"
  ):
    downscaling.Downscaler.load(workdir, map="optimal")


def test_what_it_refuses(fitted):
  y = np.zeros((2, 24, 1), np.float32)
  for wrong, words in (
    (y[..., 0], r"coarse fields of shape \(2, 24\): need \[..., 24, 1\]"),
    (y[:, :12], r"coarse fields of shape \(2, 12, 1\)"),
    (
      np.where(np.arange(24)[:, None] == 3, np.nan, y),
      "2 of 48 coarse values are not finite",
    ),
  ):
    for method in (fitted.debias, fitted.sample):
      with pytest.raises(ValueError, match=words):
        method(wrong)
  for options, words in (
    ({"members": 0}, "members=0: need at least 1"),
    ({"noise": -1}, "noise=-1: need a finite number of at least 0"),
    ({"unit": (0, 2)}, "config.sampling.unit"),
  ):
    with pytest.raises(ValueError, match=words):
      fitted.sample(y, **options)


def test_folders_that_are_none(workdir, tmp_path):
  load = downscaling.Downscaler.load
  with pytest.raises(FileNotFoundError, match="give a work folder in which"):
    load(tmp_path)
  partial = tmp_path / "run"
  shutil.copytree(workdir, partial)
  shutil.rmtree(partial / "train")
  with pytest.raises(FileNotFoundError, match="run `downscaling train`"):
    load(partial)
  marker = partial / "debias" / stage_folder.MARKER
  files.write_json(marker, files.read_json(marker) | {"schema": 99})
  with pytest.raises(ValueError, match="has schema 99, this version reads 1 and 2"):
    load(partial)


def test_pretrained_needs_no_config_file():
  """Fields that no fit has seen become an ensemble on them, in four statements."""
  with jax.enable_x64(True):
    y = rollouts.rollout(ks.Coarse(), np.arange(2_000_000_000, 2_000_000_002))[
      :, 0, :, None
    ]
  d = downscaling.Downscaler.load(KS)
  debiased = d.debias(np.float32(y))
  members = d.sample(debiased, members=2, unit=(2, 2), noise=0)
  assert members.shape == (2, 2, 192, 1)
  np.testing.assert_allclose(
    members[:, :, ::8], debiased[:, None].repeat(2, 1), atol=1e-4
  )
  assert 0.5 < members.std() / d.statistics.std[0] < 1.5


def test_import_alone_brings_nothing_slow():
  code = "import sys, downscaling; assert 'jax' not in sys.modules, 'jax'"
  subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
