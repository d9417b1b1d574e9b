"""Third and fourth moments against closed forms; the Bures bound."""

import numpy as np
import pytest

from downscaling.debias.equivariant import moments
from downscaling.equations import kolmogorov, ks
from downscaling.fields import quadratic as quadratic_terms
from downscaling.fields import symmetry
from downscaling.metrics import distances, higher_order

ALL_1D = {
  "transfer",
  "bispectrum",
  "flatness",
  "gradient_flatness",
  "square_covariance",
}

TERM = quadratic_terms.burgers((24,))


def noise(space, seed=0, size=300):
  return np.random.default_rng(seed).normal(size=(size, *space))


def shifted(wave, n=24):
  """Every shift of one wave form [n]: a law that is the same at all points."""
  return np.stack([np.roll(wave, s) for s in range(n)])


def test_bispectrum_and_transfer_of_two_waves():
  """u = 2 cos x − 2b sin 2x: û₁ = 1, û₂ = ib, B(1, 1) = −ib; −½ ∂ₓu² moves 4b... from wave 1 to
  wave 2.
  """
  x, b = np.arange(24) * 2 * np.pi / 24, 0.3
  found = higher_order.higher_order(
    shifted(2 * np.cos(x) - 2 * b * np.sin(2 * x)), TERM, symmetry.trivial(24)
  )
  assert set(found) == ALL_1D
  expected = np.zeros_like(found["bispectrum"])
  expected[0] = -1j * b
  np.testing.assert_allclose(found["bispectrum"], expected, atol=1e-14)
  # ½u² has waves û₁² / 2 = ½ at 2 and û₂ û₁* = ib at 1. Wave 2: 2 Re[(ib)* (−2i)(½)] = −2b; wave 1
  # gains as much.
  np.testing.assert_allclose(found["transfer"][:3], [2 * b, -2 * b, 0], atol=1e-14)


def test_shells_only_pass_on_what_others_lose():
  """Waves below N/3 do not alias: quadratic terms conserve energy, on the plane enstrophy too."""
  group = kolmogorov.group(16)
  y = noise((16, 16))
  y = moments.fields(
    np.where(moments.shells((16, 16)) <= 4, moments.waves(y), 0), (16, 16)
  )
  found = higher_order.higher_order(
    y - y.mean(axis=(1, 2), keepdims=True),
    quadratic_terms.advection(y.shape[1:]),
    group,
  )
  assert set(found) == ALL_1D - {"bispectrum"} | {"energy_transfer"}
  for name in ("transfer", "energy_transfer"):
    assert (
      np.abs(found[name][:4]).max() > 1e-6
    )  # noise of 80 of 256 waves: chance leaves 1e-5, rounding 1e-19
    assert abs(found[name].sum()) < 1e-12 * np.abs(found[name]).sum() + 1e-15


def test_gaussian_noise_has_flatness_three_and_no_third_moments():
  found = higher_order.higher_order(noise((24,), size=4000), TERM, ks.group(24))
  # 96 000 values: √(24/96000) = .016 each; differences have correlation −½, about 1.5 × that
  assert found["flatness"] == pytest.approx(3, abs=0.06)
  assert found["gradient_flatness"] == pytest.approx(3, abs=0.1)
  np.testing.assert_allclose(
    found["square_covariance"], 2 * np.eye(24), atol=0.15
  )  # 4000 × 24: averaged over shifts
  assert np.abs(found["bispectrum"].real).max() == 0  # (x, u) -> (−x, −u)
  signs = higher_order.higher_order(np.sign(noise((24,))), None, symmetry.trivial(24))
  assert "transfer" not in signs
  # ±1; the mean of 300 leaves 2/300 × a few.
  assert signs["flatness"] == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
  ("group", "space", "quadratic"),
  [
    (ks.group(24), (24,), TERM),
    (kolmogorov.group(8), (8, 8), quadratic_terms.advection((8, 8))),
  ],
)
def test_group_elements_and_blocks_change_nothing(group, space, quadratic, monkeypatch):
  y = noise(space) ** 3 + 0.2
  whole = higher_order.higher_order(y, quadratic, group)
  moved = lambda g: (group.sign[g] * y.reshape(len(y), -1)[:, group.index[g]]).reshape(
    y.shape
  )
  for g in (1, len(group) // 2, len(group) - 1):
    for name, value in higher_order.higher_order(moved(g), quadratic, group).items():
      np.testing.assert_allclose(
        value, whole[name], atol=1e-9 * np.abs(whole[name]).max()
      )
  monkeypatch.setattr(distances, "_CHUNK", 1000)
  assert (
    max(
      higher_order.errors(
        higher_order.higher_order(y, quadratic, group), whole
      ).values()
    )
    < 1e-12
  )


def test_errors_are_relative():
  y = noise((24,))
  one = higher_order.higher_order(y, TERM, ks.group(24))
  twice = higher_order.higher_order(2 * y, TERM, ks.group(24))
  found = higher_order.errors(twice, one)
  exact = {
    "transfer": 7,
    "bispectrum": 7,
    "flatness": 0,
    "gradient_flatness": 0,
    "square_covariance": 15,
  }  # 2³, 2⁴
  assert found == pytest.approx(exact, abs=1e-9)


def test_bures_closed_forms():
  rng = np.random.default_rng(0)
  q = np.linalg.qr(rng.normal(size=(5, 5)))[0]
  a, b = np.array([4.0, 1.0, 0.5, 0.0, 9.0]), np.array([1.0, 1.0, 2.0, 3.0, 0.0])
  # One basis, also where a mode is empty.
  exact = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum() + 5 * 0.25
  found = higher_order.bures_squared(
    np.zeros(5), q * a @ q.T, np.full(5, 0.5), q * b @ q.T
  )
  assert found == pytest.approx(
    exact, abs=1e-7
  )  # the rounding of an empty mode, 1e-16, has a root of 1e-8
  c, d = (x @ x.T for x in rng.normal(size=(2, 5, 5)))
  # a sum of traces of 1e1 rounds to 1e-14, its roots to 1e-12
  assert higher_order.bures_squared(np.zeros(5), c, np.zeros(5), c) < 1e-10
  there, back = (
    higher_order.bures_squared(np.zeros(5), *two)
    for two in ((c, np.zeros(5), d), (d, np.zeros(5), c))
  )
  assert there == pytest.approx(back, rel=1e-10)
  # the cost of the optimal map itself: E|Tx − x|² = tr (T − I) C (T − I)
  t = moments.optimal(c[None], d[None])[0] - np.eye(5)
  assert there == pytest.approx(np.trace(t @ c @ t), rel=1e-8)


def test_a_shift_along_the_line_costs_more_than_it_need():
  """T y = y one point on has the law of y: the bound is 0 and all of its displacement is excess."""
  y = shifted(noise((24,), size=1)[0])
  found = higher_order.displacement(y, np.roll(y, 1, axis=1), y, ks.group(24))
  assert found["bound"] < 1e-12
  assert found["excess"] == pytest.approx(
    ((np.roll(y, 1, axis=1) - y) ** 2).sum() / ((y - y.mean(axis=0)) ** 2).sum()
  )
  doubled = higher_order.displacement(y, 2 * y, 2 * y, ks.group(24))
  # y has a mean, so a quarter of E|y′|² is a little more of tr Cov(y′).
  assert doubled["moved"] == pytest.approx((y**2).mean() / (4 * y.var(axis=0).mean()))
  assert doubled["excess"] == pytest.approx(0, abs=1e-10)


def test_what_cannot_be_compared():
  y, group = noise((24,), size=20), ks.group(24)
  bad = y.copy()
  bad[4, 0] = np.nan
  with pytest.raises(
    ValueError, match="the rows holds NaN or infinite values, first in row 4 of 20"
  ):
    higher_order.higher_order(bad, None, group)
  with pytest.raises(
    ValueError, match=r"rows of \[24, 1\] and a group that moves 12 points"
  ):
    higher_order.higher_order(y[..., None], None, ks.group(12))
  swap = symmetry.Group(np.array([[0, 1, 2, 3, 4, 5], [1, 0, 2, 3, 4, 5]]), np.ones(2))
  with pytest.raises(ValueError, match="neither a shift nor a reflection of the line"):
    higher_order.higher_order(noise((6,)), None, swap)
  one = higher_order.higher_order(y, None, group)
  with pytest.raises(
    ValueError, match="compute both by higher_order, with the same quadratic term"
  ):
    higher_order.errors(higher_order.higher_order(y, TERM, group), one)
  with pytest.raises(ValueError, match="the reference's flatness is zero"):
    higher_order.errors(one, one | {"flatness": np.float64(0)})
  with pytest.raises(ValueError, match=r"need \[D\] and \[D, D\], one D"):
    higher_order.bures_squared(np.zeros(3), np.eye(3), np.zeros(4), np.eye(4))
  with pytest.raises(ValueError, match="cov_b is not finite and symmetric"):
    higher_order.bures_squared(
      np.zeros(2), np.eye(2), np.zeros(2), np.array([[1, 0.5], [0, 1]])
    )
  with pytest.raises(ValueError, match="20 source rows and 19 mapped ones"):
    higher_order.displacement(y, y[:-1], y, group)
