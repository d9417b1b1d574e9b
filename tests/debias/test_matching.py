"""Statistics matched by the least displacement: closed form, Newton's convergence, symmetry, what
is refused.
"""

import dataclasses

import numpy as np
import pytest

from downscaling.debias.equivariant import matching, moments, recipes
from downscaling.equations import kolmogorov, ks
from downscaling.fields import quadratic as quadratic_terms
from downscaling.fields import symmetry
from downscaling.metrics import higher_order

GRIDS = {"ks": (ks.group(12), (12,)), "kolmogorov": (kolmogorov.group(8), (8, 8))}
TERM = {
  "ks": quadratic_terms.burgers((12,)),
  "kolmogorov": quadratic_terms.advection((8, 8)),
}


def fields(space, seed, *, size=600, bend=0.0):
  """Red random fields [size, *space, 1]; with bend, moved along the quadratic term, which gives
  them third moments.
  """
  y = np.random.default_rng(seed).normal(size=(size, *space))
  y = moments.fields(moments.waves(y) * (1.0 + moments.shells(space)) ** -1.5, space)
  y = y / y.std()
  term = TERM["ks" if len(space) == 1 else "kolmogorov"](y)
  return (y + bend * term / term.std())[..., None]


def values(y, term):
  return matching.Sums.of(y[..., 0].astype(np.float64), term).values / len(y)


@pytest.mark.parametrize("name", GRIDS)
def test_matching_converges_like_newton(name):
  """Each M leaves the square of what the one before it left, until RIDGE lets no more through."""
  group, space = GRIDS[name]
  source, target = fields(space, 0), fields(space, 1, bend=0.15)
  kept = matching.invariant(group, space, TERM[name])
  scale = np.abs(values(target, TERM[name])[kept]).mean()
  found = recipes.fit(source, target, group=group, recipe="GMMM", quadratic=TERM[name])
  left = []
  for count in range(4):
    mapped = dataclasses.replace(found, steps=found.steps[: 1 + count])(source)
    left.append(
      np.abs(values(mapped, TERM[name]) - values(target, TERM[name]))[kept].max()
      / scale
    )
  # measured .26, .028, 3e-5 (1-D: RIDGE) and .16, 1.2e-3, 1.3e-5 (2-D); a gradient step of fixed
  # length leaves half
  assert left[1] < 0.7 * left[0]
  assert left[2] < 0.2 * left[1]
  assert left[3] < 0.05 * left[2]


def test_one_statistic_moves_by_the_least_displacement():
  """φ = energy of one wave alone: the step is 2λ times that wave, λ = gap / 4E, and no other wave
  moves.
  """
  space, name = (12,), None
  y = fields(space, 0)[..., 0]
  now, goal = matching.Sums.of(y, name), matching.Sums.of(1.05 * y, name)
  kept = np.array([1])  # |ŷ₂|²
  step = matching.solve(now, goal, matching.gram(y, name, kept) / len(y), kept)
  moved = matching.Matching(step, np.zeros(space), np.inf, name)(y)
  before, after = np.fft.rfft(y), np.fft.rfft(moved)
  np.testing.assert_allclose(
    np.delete(after, 2, 1), np.delete(before, 2, 1), atol=1e-12
  )
  # gap of .1025 of the energy by a factor 1 + s of the wave, to first order in s: s = .05125, but
  # for RIDGE, 1e-6
  np.testing.assert_allclose(after[:, 2], before[:, 2] * (1 + 0.1025 / 2), rtol=2e-6)


@pytest.mark.parametrize("name", GRIDS)
def test_the_group_commutes(name):
  group, space = GRIDS[name]
  found = recipes.fit(
    fields(space, 0),
    fields(space, 1, bend=0.1),
    group=group,
    recipe="GMQM",
    quadratic=TERM[name],
  )
  y = fields(space, 2, size=5)
  flat = found(y).reshape(5, -1)
  for element in range(0, len(group), 5):
    moved = group.sign[element] * y.reshape(5, -1)[:, group.index[element]]
    expected = group.sign[element] * flat[:, group.index[element]]
    np.testing.assert_allclose(
      found(moved.reshape(y.shape)).reshape(5, -1), expected, atol=2e-6
    )  # float32 of values to 5


def test_statistics_that_the_group_flips_are_left_out():
  """x → −x, u → −u turns the sign of Re ŷŷŷ*: its mean is 0 and there is nothing to match; without
  it, there is.
  """
  space = (12,)
  shifts = symmetry.Group(*(part[:12] for part in ks.group(12)))
  some, both = (
    matching.invariant(group, space, TERM["ks"]) for group in (shifts, ks.group(12))
  )
  triads = sum(1 for j in range(1, 5) for k in range(1, j + 1) if j + k <= 5)
  assert (
    len(values(fields(space, 0), TERM["ks"])) - len(some) == 1
  )  # the transfer into Nyquist's wave, which is 0
  assert len(some) - len(both) == triads


def test_what_is_matched_holds_out_of_sample():
  """Third moments of new rows: nearer by far than covariance alone brings them, with the rows still
  themselves.
  """
  group, space = GRIDS["ks"]
  source, target = fields(space, 0, size=4000), fields(space, 1, size=4000, bend=0.15)
  new, reference = fields(space, 2, size=4000), fields(space, 3, size=8000, bend=0.15)
  truth = higher_order.higher_order(reference[..., 0], TERM["ks"], group)
  error = {}
  for recipe in ("G", "GM"):
    mapped = recipes.fit(
      source, target, group=group, recipe=recipe, quadratic=TERM["ks"]
    )(new)
    found = higher_order.higher_order(mapped[..., 0], TERM["ks"], group)
    error[recipe] = higher_order.errors(found, truth)["bispectrum"]
  floor = higher_order.higher_order(
    fields(space, 4, size=4000, bend=0.15)[..., 0], TERM["ks"], group
  )
  assert error["G"] > 0.5  # the Gaussian map leaves third moments where they were, at 0
  assert (
    error["GM"] < 2 * higher_order.errors(floor, truth)["bispectrum"]
  )  # noise of the fit's rows beside the new ones'
  assert np.corrcoef(mapped.ravel(), new.ravel())[0, 1] > 0.98


def test_rows_far_outside_are_held():
  """Cubic gradients of a field 30 times too large would move it by 900 times its size."""
  group, space = GRIDS["ks"]
  source = fields(space, 0)
  found = recipes.fit(
    source, fields(space, 1, bend=0.1), group=group, recipe="M", quadratic=TERM["ks"]
  )
  far = 30 * source[:4]
  moved = np.linalg.norm((found(far) - far)[..., 0], axis=1) / np.linalg.norm(
    far[..., 0], axis=1
  )
  assert (moved <= found.steps[0].most * (1 + 1e-5)).all()
  assert found.outside(far).all()
  assert not found.outside(source).any()


def test_sums_of_two_processes_are_joined():
  """Each with the same rows: every sum is doubled, every mean the same.

  Real processes are in tests/test_distributed.py.
  """
  group, space = GRIDS["ks"]
  source, target = fields(space, 0), fields(space, 1, bend=0.1)
  how = {
    "group": group,
    "recipe": "GAM",
    "quadratic": TERM["ks"],
  }  # a Q's table reaches further, the more values there are
  whole = recipes.fit(source, target, **how)
  again = recipes.fit(source, target, together=lambda tree: [tree, tree], **how)
  y = fields(space, 2, size=20)
  np.testing.assert_allclose(again(y), whole(y), atol=1e-6)
