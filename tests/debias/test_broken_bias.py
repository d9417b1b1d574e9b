"""A bias that breaks the symmetry, and one that keeps it, from end to end: the group, and how good
the map then is.
"""

import numpy as np
import pytest

from downscaling.debias import fit, maps
from downscaling.debias.equivariant import moments
from downscaling.equations import ks
from downscaling.fields import quadratic as quadratic_terms
from downscaling.metrics import distances

N, ROWS, HELD, REFERENCE = 12, 4000, 1500, 6000
TURN = 2 * np.pi * np.arange(N) / N
BIASES = {
  "none besides": (lambda u: u, "full"),
  "breaking": (lambda u: u * (1 + 0.3 * np.sin(TURN)) + 0.4 * np.cos(TURN), "trivial"),
  "cubic": (lambda u: u + 0.05 * u**3, "full"),
  "square": (lambda u: u + 0.1 * u**2, "shifts"),
}


def fields(seed, size, slope=1.0):
  """Stationary red fields with third moments, alike under shifts and (x, u) -> (−x, −u); [size, N,
  1].
  """
  y = np.random.default_rng(seed).normal(size=(size, N))
  y = moments.fields(moments.waves(y) * (1.0 + moments.shells((N,))) ** -slope, (N,))
  y = y / y.std()
  term = quadratic_terms.burgers(y.shape[1:])(y)
  return (y + 0.2 * term / term.std())[..., None].astype(np.float32)


def debiased(folder, bias, **given):
  """(report, T y of held-out rows)."""
  biased = [
    bias(fields(seed, size, 1.3)[..., 0])[..., None].astype(np.float32)
    for seed, size in ((0, ROWS), (2, HELD))
  ]
  given = {"towards": "stationary"} | given
  term = quadratic_terms.burgers((N,))
  setting = maps.Setting(ks.group(N), quadratic=term, recipe="GMQM", **given)
  how = {
    "space": (N,),
    "maps": ("equivariant",),
    "chosen": "equivariant",
    "setting": setting,
  }
  report = fit.debias(folder, biased[0], fields(1, ROWS), biased[1], **how)
  return report, maps.load(folder / "equivariant")(biased[1])[..., 0]


def error(rows):
  return distances.cov_rmse(rows, fields(3, REFERENCE)[..., 0])


@pytest.fixture(scope="module")
def floor():
  """Median covRMSE between sets of true rows of these sizes."""
  return float(np.median([error(fields(seed, HELD)[..., 0]) for seed in range(10, 21)]))


@pytest.mark.parametrize("name", BIASES)
def test_auto_finds_the_group_and_the_map_reaches_the_floor(name, floor, tmp_path):
  bias, group = BIASES[name]
  report, mapped = debiased(tmp_path, bias)
  assert report["group"]["name"] == group
  # The bound. Measured .81 to 1.01, as the floor's draws spread by a fifth. The breaking
  # one with the full group is at 6.6, with the trivial one and covariances that are not shrunk at
  # 1.42.
  assert error(mapped) <= 1.15 * floor


def test_the_full_group_cannot_mend_what_breaks_it(floor, tmp_path, capfd):
  report, mapped = debiased(tmp_path, BIASES["breaking"][0], subgroup="full")
  assert error(mapped) > 2 * floor
  assert "the bias breaks the symmetry of the group 'full'" in capfd.readouterr().err
  assert {"warning"} == {
    e["level"] for e in report["health"] if e["check"] == "symmetry of the bias: full"
  }
