"""The table of the denoiser's error: closed form, symmetry, devices, and the file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from downscaling.diffusion import denoiser, error_table, unet
from downscaling.runtime import mesh as meshes
from downscaling.runtime import supervision

SPACE = (8, 16)


def _setting(count=256):
  """A silent net around an anisotropic Gaussian field: the exact denoiser, whose error is known."""
  kx, ky = np.meshgrid(*[np.fft.fftfreq(n, 1 / n) for n in SPACE], indexing="ij")
  spectrum = (
    1 / (1 + kx**2 + 3 * ky**2 + 2 * kx * ky) ** 2
  )  # neither isotropic nor the same under kx → −kx
  spectrum = (
    spectrum + np.roll(np.flip(spectrum), 1, (0, 1))
  ) / 2  # of a real field; it mends the Nyquist modes
  spectrum = (spectrum / spectrum.mean())[..., None].astype(np.float32)
  white = np.random.default_rng(0).normal(size=(count, *SPACE))
  x = (
    np.fft.ifft2(np.sqrt(spectrum[None, ..., 0]) * np.fft.fft2(white))
    .real[..., None]
    .astype(np.float32)
  )
  net = denoiser.Denoiser(
    unet.UNet(channels=(8,), strides=(2,), blocks=1, heads=0, embedding=16), spectrum
  )
  params = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, *SPACE, 1)), jnp.ones(1))[
    "params"
  ]
  return net, params, x, spectrum


def test_a_gaussian_field_has_its_closed_form(tmp_path):
  """S_k σ²/(S_k + σ²), mode by mode, kx and −kx apart; one device and four give the same table."""
  net, params, x, spectrum = _setting()
  sigmas = np.float32([0.05, 1.0, 20.0])
  table = error_table.tabulate(net, params, x, sigmas, meshes.make(4), seed=1)
  exact = (
    spectrum
    * sigmas[:, None, None, None] ** 2
    / (spectrum + sigmas[:, None, None, None] ** 2)
  )
  # 256 fields: a mode's |·|² has relative error 1/√256 = .06 (√2 of that where it is real); 384
  # modes, 4.5 errors.
  np.testing.assert_allclose(table.errors / exact, 1, atol=0.4)
  np.testing.assert_allclose((table.errors / exact).mean(axis=(1, 2, 3)), 1, atol=0.03)
  opposite = np.roll(np.flip(table.errors, (1, 2)), 1, (1, 2))
  np.testing.assert_array_equal(table.errors, opposite)
  assert (
    abs(np.log(table.errors[2, 1, 2, 0] / table.errors[2, -1, 2, 0])) > 0.5
  )  # truly another mode
  one = error_table.tabulate(net, params, x, sigmas, meshes.make(1), seed=1)
  np.testing.assert_allclose(
    one.errors, table.errors, rtol=1e-3
  )  # float32 sums; other noise would differ by 6 %


def test_levels_are_even_in_the_logarithm():
  levels = error_table.levels(1e-3, 100.0)
  assert (len(levels), levels[0], levels[-1]) == (44, np.float32(1e-3), np.float32(100))
  np.testing.assert_allclose(np.diff(np.log(levels)), np.log(1e5) / 43, rtol=1e-3)


def test_a_table_says_what_it_covers():
  table = error_table.ErrorTable(np.float32([0.1, 1.0]), np.ones((2, 8, 1), np.float32))
  error_table.check_covers(table, [0.1 * (1 - 1e-6), 1.0], "levels")
  for sigmas in ([0.09, 0.5], [0.2, 1.1]):
    with pytest.raises(
      ValueError, match=r"tabulated from 0.1 to 1: beyond them nothing is known"
    ):
      error_table.check_covers(table, sigmas, "levels")


def test_file_and_refusals(tmp_path):
  table = error_table.ErrorTable(
    np.float32([0.1, 1.0]),
    np.random.default_rng(0).uniform(0.1, 1, (2, 8, 1)).astype("f4"),
  )
  with pytest.raises(FileNotFoundError, match="run `downscaling train`"):
    error_table.load(tmp_path, "hash")
  error_table.save(tmp_path, table, "hash")
  for a, b in zip(error_table.load(tmp_path, "hash"), table, strict=True):
    np.testing.assert_array_equal(a, b)
  with pytest.raises(
    ValueError, match="belongs to a prior of config hash, this one is other"
  ):
    error_table.load(tmp_path, "other")
  path = tmp_path / error_table.FILE
  whole = path.read_bytes()
  np.savez(path, **table._asdict(), config_hash="hash", sha256="0" * 64)
  with pytest.raises(ValueError, match="has changed since it was written"):
    error_table.load(tmp_path, "hash")
  path.write_bytes(whole[:100])
  with pytest.raises(ValueError, match="is damaged"):
    error_table.load(tmp_path, "hash")
  assert [p.name for p in tmp_path.iterdir()] == [error_table.FILE]


def test_stops_and_says_what_is_wrong():
  net, params, x, _ = _setting(8)
  with pytest.raises(supervision.Interrupted, match="0 of 2 noise levels"):
    error_table.tabulate(
      net, params, x, np.float32([0.1, 1.0]), meshes.make(), seed=0, stop=lambda: True
    )
  with pytest.raises(ValueError, match="2 held-out fields for 4 devices"):
    error_table.tabulate(
      net, params, x[:2], np.float32([0.1, 1.0]), meshes.make(4), seed=0
    )
  broken = jax.tree.map(lambda p: p * jnp.nan, params)
  with pytest.raises(FloatingPointError, match="not finite"):
    error_table.tabulate(net, broken, x, np.float32([0.1, 1.0]), meshes.make(), seed=0)
