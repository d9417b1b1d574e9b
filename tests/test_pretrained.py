"""What lies in pretrained/: whole, small, and readable by the config that its card names."""

import hashlib
import pathlib

import jax
import numpy as np
import pytest

from downscaling import experiment
from downscaling.assembly import prior, worlds
from downscaling.debias import maps
from downscaling.diffusion import error_table, train_loop
from downscaling.fields import statistics
from downscaling.runtime import files, stage_folder
from downscaling.runtime import mesh as meshes

ROOT = pathlib.Path(__file__).parents[1]
KS = ROOT / "pretrained" / "ks"
UNLISTED = ("README.md", "SHA256SUMS")


@pytest.fixture(scope="module")
def config():
  return experiment.load("ks:full")


def test_every_file_is_the_one_that_the_card_lists():
  listed = dict(
    reversed(line.split("  ", 1))
    for line in (KS / "SHA256SUMS").read_text().splitlines()
  )
  there = {
    str(p.relative_to(KS))
    for p in KS.rglob("*")
    if p.is_file() and p.name not in UNLISTED
  }
  assert {*listed} == there
  for name, digest in listed.items():
    assert hashlib.sha256((KS / name).read_bytes()).hexdigest() == digest, name
  assert sum(p.stat().st_size for p in KS.rglob("*") if p.is_file()) < 4e6


def test_the_prior_is_that_of_the_config(config):
  marker = files.read_json(KS / "train" / stage_folder.MARKER)
  assert experiment.first_schema("train", marker["config"]) == config.identity("train")
  made_by = marker["config_hash"]
  stats = statistics.load(KS / "data" / "statistics.npz")
  network = prior.network(config, stats)
  params = train_loop.load_prior(
    KS / "train", made_by, network, worlds.space(config), 1, meshes.make()
  )
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
  table = error_table.load(KS / "train", made_by)
  # The network beats the best linear denoiser at σ = .3 of the data: .59 of its error is what was
  # measured.
  level = int(np.argmin(np.abs(table.sigmas - 0.3)))
  spectrum = stats.spectrum
  linear = spectrum * 0.09 / (spectrum + 0.09)
  assert table.errors[level].mean() < 0.7 * linear.mean()


def test_the_map_is_that_of_the_config(config):
  marker = files.read_json(KS / "debias" / stage_folder.MARKER)
  assert experiment.first_schema("debias", marker["config"]) == config.identity(
    "debias"
  )
  made = maps.load(KS / "debias" / config.debias.map)
  y = np.sin(np.arange(24) * 2 * np.pi * 3 / 24)[None, :, None].astype(np.float32)
  mapped = made(y)
  assert mapped.shape == y.shape
  # It commutes with a shift by one point, to the rounding of float32 in a network of four layers.
  np.testing.assert_allclose(
    made(np.roll(y, 1, axis=1)), np.roll(mapped, 1, axis=1), atol=1e-4
  )
