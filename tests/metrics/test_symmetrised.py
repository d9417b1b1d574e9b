"""Covariances of fine fields averaged over a group, in Fourier space, against the table of the
group in real space.
"""

import numpy as np
import pytest

from downscaling.equations import kolmogorov, ks
from downscaling.fields import symmetry
from downscaling.metrics import distances, spectra, symmetrised

GROUPS = {
  "ks": ((24,), ks.group(24), symmetry.Moves(48, ks.move)),
  "kolmogorov": ((16, 16), kolmogorov.group(16), symmetry.Moves(256, kolmogorov.move)),
}


def rows(space, count, seed):
  """Fields of a falling spectrum, neither isotropic nor of zero mean; no Nyquist wave, no corner,
  no mean of a row.
  """
  rng = np.random.default_rng(seed)
  waves = np.fft.rfftn(
    rng.normal(size=(count, *space)) + 0.3 * np.cos(np.arange(space[-1])),
    axes=range(1, 1 + len(space)),
  )
  shell = spectra.shell_numbers(space)[0]
  waves *= np.where(
    (shell >= 1) & (shell < min(space) // 2), 1.0 / np.maximum(shell, 1), 0.0
  )
  return np.fft.irfftn(waves, s=space, axes=range(1, 1 + len(space))).astype(np.float32)


@pytest.mark.parametrize("name", GROUPS)
def test_is_that_of_the_table(name):
  space, group, moves = GROUPS[name]
  pred, ref = rows(space, 60, 0), 1.1 * rows(space, 70, 1)
  want = distances.sym_cov_rmse(pred, ref, group)
  all_shells = np.ones(min(space) // 2, bool)
  found = symmetrised.sym_cov_rmse(
    *(symmetrised.covariance(x, moves) for x in (pred, ref)), space, all_shells
  )
  assert found == pytest.approx(want, rel=1e-5)  # fields are moved in float32


def test_on_a_line_it_is_the_error_of_the_spectrum_over_the_shells_that_count():
  pred, ref = rows((24,), 50, 2), rows((24,), 60, 3)
  spectrum = lambda x: (
    (np.abs(np.fft.rfft(x - x.mean(0))) ** 2).sum(0)[1:] / (24**2 * (len(x) - 1))
  )
  p, r = spectrum(pred)[:5], spectrum(ref)[:5]
  shells = np.arange(1, 13) <= 5
  blocks = [symmetrised.covariance(x, GROUPS["ks"][2]) for x in (pred, ref)]
  want = np.linalg.norm(p - r) / np.linalg.norm(r)
  assert symmetrised.sym_cov_rmse(*blocks, (24,), shells) == pytest.approx(
    want, rel=1e-5
  )


def test_constant_rows_are_refused():
  blocks = symmetrised.covariance(np.ones((3, 24), np.float32), GROUPS["ks"][2])
  with pytest.raises(ValueError, match="no covariance to compare with"):
    symmetrised.sym_cov_rmse(blocks, blocks, (24,), np.ones(12, bool))
