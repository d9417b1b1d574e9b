"""Spectra against sines, Parseval and closed forms."""

import math

import numpy as np
import pytest

from downscaling.fields import domain
from downscaling.fields.basis import Trigonometric
from downscaling.metrics import spectra


def test_sines_fall_in_their_shell():
  """a sin(2π m x) has energy a²/2 in shell m; the Nyquist wave a cos(π i), a²; the mean is left
  out.
  """
  n = 32
  x = np.arange(n) / n
  fields = np.stack(
    [7 + 3 * np.sin(2 * np.pi * 5 * x + 0.3), 2 * np.cos(np.pi * np.arange(n))]
  )
  expected = np.zeros((2, 16))
  expected[0, 4], expected[1, 15] = (
    4.5,
    4.0,
  )  # a Nyquist counted twice gives 8, a half spectrum not doubled 2.25
  assert np.allclose(spectra.shell_energies(fields), expected, atol=1e-12)


def test_waves_of_the_plane_fall_in_round_shells():
  n = 24
  x, y = np.meshgrid(*[np.arange(n) / n] * 2, indexing="ij")
  for m, shell in {
    (3, 4): 5,
    (-2, 1): 2,
    (0, 7): 7,
    (7, 0): 7,
    (1, 1): 1,
    (-5, -5): 7,
  }.items():
    energy = spectra.shell_energies(
      2 * np.cos(2 * np.pi * (m[0] * x + m[1] * y))[None]
    )[0]
    assert energy[shell - 1] == pytest.approx(2.0)
    assert energy.sum() == pytest.approx(2.0)


@pytest.mark.parametrize("n", [16, 17])
def test_parseval(n):
  x = np.random.default_rng(0).normal(size=(9, n)).astype(np.float32)
  exact = x.astype(np.float64).var(axis=1)
  assert np.allclose(
    spectra.shell_energies(x).sum(axis=1), exact, rtol=1e-12
  )  # float32 transforms: 1e-7


def test_parseval_in_the_plane_up_to_the_corners():
  """A field whose modes lie within the last whole shell loses nothing, also on a grid that is not
  square.
  """
  rng = np.random.default_rng(0)
  modes = np.fft.fftn(rng.normal(size=(3, 16, 24)), axes=(1, 2))
  size = np.hypot(
    *np.meshgrid(np.fft.fftfreq(16, 1 / 16), np.fft.fftfreq(24, 1 / 24), indexing="ij")
  )
  x = np.fft.ifftn(np.where(size < 7.5, modes, 0), axes=(1, 2)).real
  assert spectra.shell_energies(x).shape == (3, 8)
  assert np.allclose(
    spectra.shell_energies(x).sum(axis=1), x.var(axis=(1, 2)), rtol=1e-12
  )


def test_blocks_do_not_change_a_spectrum(monkeypatch):
  x = np.random.default_rng(0).normal(size=(10, 6, 6))
  whole = spectra.shell_energies(x)
  monkeypatch.setattr(spectra.distances, "_CHUNK", 100)
  assert np.array_equal(spectra.shell_energies(x), whole)


def test_melr_of_scaled_shells():
  reference = np.array([8.0, 1.0, 1.0, 1e-9])
  found = spectra.melr(reference * [1.0, math.e, math.exp(-2), math.exp(4)], reference)
  assert found["unweighted"] == pytest.approx(7 / 4)
  assert found["weighted"] == pytest.approx(3 / 10, abs=1e-8)
  assert found["energy"] == pytest.approx(
    1.0
  )  # the last shell holds 1e-10: left out; signed logs would give −1/3


def test_energy_holding_shells_are_the_fewest():
  reference = np.array([1e-9, 5.0, 4.0, 1.0 - 1e-9, 1e-9])
  assert spectra.energy_holding_shells(reference).tolist() == [
    False,
    True,
    True,
    True,
    False,
  ]
  assert spectra.energy_holding_shells(reference, 0.45).tolist() == [
    False,
    True,
    False,
    False,
    False,
  ]
  assert spectra.energy_holding_shells(np.ones(5)).all()


def test_empty_shells_stay_finite():
  assert np.isfinite(
    spectra.melr(np.array([1.0, 0.0]), np.array([1.0, 1e-3]))["unweighted"]
  )
  assert spectra.melr(np.array([1.0, 0.0]), np.array([1.0, 0.0]))["unweighted"] == 0
  with pytest.raises(ValueError, match="no energy in any shell"):
    spectra.melr(np.ones(2), np.zeros(2))
  with pytest.raises(ValueError, match="12 and 96 shells"):
    spectra.melr(np.ones(12), np.ones(96))


def test_the_band_holds_two_standard_errors():
  """White noise, S and R rows: the ratio of two spectra leaves a band of two standard errors in 5 %
  of the shells.
  """
  rng = np.random.default_rng(0)
  other, reference = (
    spectra.shell_energies(rng.normal(size=(s, 400))) for s in (300, 900)
  )
  off = np.abs(other.mean(0) / reference.mean(0) - 1) > spectra.band(other, 900)
  assert (
    0.01 < off.mean() < 0.1
  )  # 200 shells: 4.6 % ± 1.5 %; forgetting 1/R gives 8.3 ± 2, forgetting √ much more


def test_bad_fields_are_named():
  x = np.ones((4, 8))
  x[2, 1] = np.inf
  with pytest.raises(
    ValueError, match=r"the truth holds NaN or infinite values, first in row 2"
  ):
    spectra.shell_energies(x, "the truth")
  with pytest.raises(ValueError, match="one channel at a time"):
    spectra.shell_energies(np.ones((4, 8, 8, 2)))


def strip(lengths=(8.0, 24.0), points=(8, 16), periodic=(False, True)):
  axes = [
    domain.Axis(name, np.arange(n) * size / n, "km", periodic=wrap)
    for name, n, size, wrap in zip("yx", points, lengths, periodic, strict=True)
  ]
  return domain.Domain(tuple(axes))


def test_shells_of_a_periodic_square_need_no_account():
  assert spectra.shells_of(domain.box("yx", (8, 8), 3.0)) is None
  assert spectra.shells_of(domain.box("yx", (8, 16), 3.0)) is None
  assert spectra.shells_of(strip()) is not None


def test_both_accounts_agree_on_a_periodic_box():
  x = np.random.default_rng(0).normal(size=(5, 8, 16))
  shells = spectra.Shells(Trigonometric((8, 16)), (1.0, 1.0))
  assert shells.count == 4
  np.testing.assert_allclose(shells.energies(x), spectra.shell_energies(x), rtol=1e-12)


def test_waves_and_cosines_fall_in_shells_of_their_length():
  """A side a third as long has waves of three times the number; a cosine of index j has j/2."""
  shells = spectra.shells_of(strip())
  y, x = (np.arange(8) + 0.5) / 8, np.arange(16) / 16
  assert shells.count == 8  # of x's 16 points; y's reach 3 · 8 / 2
  cases = {
    2: np.broadcast_to(np.sin(2 * np.pi * 2 * x), (8, 16)),
    # j = 2: one wave, three times.
    3: np.broadcast_to(np.cos(2 * np.pi * y)[:, None], (8, 16)),
    5: np.cos(2 * np.pi * y)[:, None] * np.sin(2 * np.pi * 4 * x),  # |(3, 4)|
  }
  for shell, field in cases.items():
    energies = spectra.shell_energies(field[None], shells=shells)[0]
    assert np.argmax(energies) == shell - 1
    assert energies[shell - 1] == pytest.approx(np.var(field), rel=1e-12)
    assert energies.sum() == pytest.approx(np.var(field), rel=1e-12)
