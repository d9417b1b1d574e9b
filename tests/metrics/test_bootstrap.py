"""Replicates: the weights drawn, and whether floors and intervals hold what they promise."""

import numpy as np
import pytest

from downscaling.equations import ks
from downscaling.fields import quadratic as quadratic_terms
from downscaling.fields import symmetry
from downscaling.metrics import bootstrap, judge, replicates, scoring
from downscaling.metrics.reference import Reference

POINTS = 16


def rows(blocks, each):
  """`blocks` trajectories of `each` times."""
  return bootstrap.Rows(
    np.repeat(np.arange(blocks), each), np.tile(np.arange(each, dtype=float), blocks)
  )


def fields(rng, origin, shared=0.0):
  """Gaussian fields of a steep spectrum; rows of a block have the share `shared` of their variance
  in common.
  """
  k = np.arange(POINTS // 2 + 1)
  draw = lambda count: (
    rng.normal(size=(count, k.size)) + 1j * rng.normal(size=(count, k.size))
  )
  common = draw(origin.blocks)[origin.block]
  modes = np.sqrt(shared) * common + np.sqrt(1 - shared) * draw(len(origin))
  return (
    np.fft.irfft(modes * np.exp(-k / 3) * (k > 0), n=POINTS, axis=1).astype(np.float32)
    * 4
  )


def test_blocks_are_drawn_whole():
  origin = rows(30, 4)
  weights = bootstrap.judged(origin, draws=50)
  assert weights.shape == (50, 120)
  assert (weights.sum(axis=1) == 120).all()
  assert (np.ptp(weights.reshape(50, 30, 4), axis=2) == 0).all()


def test_a_true_set_has_the_structure_it_is_asked_for():
  pool = bootstrap.joined(rows(20, 6), rows(10, 6))
  assert pool.blocks == 30  # numbers that agree are other trajectories
  like = bootstrap.Rows(np.repeat(np.arange(12), 2), np.tile([1.0, 4.0], 12))
  weights = bootstrap.true_sets(pool, like, draws=20)
  assert (weights.sum(axis=1) == 24).all()
  # Its times, and no others.
  assert set(pool.time[weights.sum(axis=0) > 0]) == {1.0, 4.0}
  pairs = weights.reshape(20, 30, 6)
  assert (pairs[..., 1] == pairs[..., 4]).all()  # both rows of a trajectory


def test_the_same_seed_gives_the_same_replicates():
  like, pool = rows(9, 1), rows(20, 2)
  one, same, other = (bootstrap.true_sets(pool, like, 5, seed) for seed in (0, 0, 1))
  assert (one == same).all()
  assert (one != other).any()


@pytest.mark.parametrize("coarse", [True, False])
def test_replicates_agree_with_the_printed_values(coarse):
  """Another code path: weights that are all one must give what `measure` gives."""
  rng = np.random.default_rng(0)
  x, ref = fields(rng, rows(150, 1)), fields(rng, rows(200, 1))
  of_grid = {"moves": symmetry.Moves(2 * POINTS, ks.move)}
  if coarse:
    of_grid |= {
      "group": ks.group(POINTS),
      "quadratic": quadratic_terms.burgers((POINTS,)),
    }
  reference = Reference(ref)
  printed = scoring.measure(x, reference, **of_grid)
  found = replicates.metrics(x, np.ones((1, len(x)), np.float32), reference, **of_grid)
  assert {*found} == {k for k in scoring.COMPARED if printed.get(k) is not None}
  for key, (value,) in found.items():
    # Bins of a twelfth of a bandwidth for kld and wass1: 1 %. Higher orders are about the
    # reference's mean instead of the set's own, which moves flatnesses by .01.
    assert value == pytest.approx(printed[key], rel=0.03, abs=0.01), key


def test_twice_a_row_is_the_row_twice():
  rng = np.random.default_rng(1)
  x, reference = fields(rng, rows(40, 1)), Reference(fields(rng, rows(60, 1)))
  weights = np.zeros((1, 40), np.float32)
  weights[0, :30] = 1
  weights[0, :10] = 2
  doubled = np.concatenate([x[:30], x[:10]])
  # 40 rows of each: the bandwidth's standard deviation alone is of other rows, which moves kld by a
  # few per cent.
  one = replicates.metrics(x, weights, reference)
  other = replicates.metrics(doubled, np.ones((1, 40), np.float32), reference)
  for key, (value,) in one.items():
    assert value == pytest.approx(
      other[key][0], rel=0.1 if key.startswith("kld") else 2e-3
    ), key


@pytest.mark.parametrize("shared", [0.0, 0.6])
def test_a_floor_holds_nineteen_of_twenty_true_sets(shared):
  """The star's meaning: independent true sets lie inside the floor as often as it says, blocks or
  not.
  """
  rng = np.random.default_rng(2)
  origin, like = rows(60, 4), rows(40, 2)
  reference, more = (fields(rng, origin, shared) for _ in range(2))
  judged = judge.Judge(Reference(reference), origin, more, origin)
  floor = judged.floor(like)
  inside = dict.fromkeys(("cov_rmse", "melr_weighted", "wass1", "mmd"), 0)
  sets = 60
  for _ in range(sets):
    found = replicates.metrics(
      fields(rng, like, shared), np.ones((1, len(like)), np.float32), judged.reference
    )
    for key in inside:
      inside[key] += judge.inside(float(found[key][0]), floor[key])
  # Binomial of 60 at .95 has the standard deviation 1.7; a reference that is far from the law, one
  # in twenty, shifts all sets alike. Floors that forget the blocks (shared = .6) or draw from the
  # pool alone hold 40 of 60 at best.
  for key, count in inside.items():
    assert count >= 50, key


def test_an_interval_is_as_wide_as_the_value_scatters():
  rng = np.random.default_rng(3)
  origin = rows(80, 1)
  reference = Reference(fields(rng, rows(300, 1)))
  judged = judge.Judge(reference, rows(300, 1), fields(rng, origin), origin, draws=60)
  values, widths = [], []
  for _ in range(20):
    x = 1.3 * fields(rng, origin)
    value = float(
      replicates.metrics(x, np.ones((1, 80), np.float32), judged.reference)[
        "melr_weighted"
      ][0]
    )
    low, high = judged.interval(x, origin, {"melr_weighted": value})["melr_weighted"]
    values.append(value)
    widths.append((high - low) / 3.92)  # standard deviations in a 95 % interval
  # 20 values know their own standard deviation to 16 %; three of those.
  assert np.mean(widths) == pytest.approx(np.std(values), rel=0.5)


def test_bad_origins_are_refused():
  with pytest.raises(ValueError, match=r"blocks \(3,\) and times \(2,\)"):
    bootstrap.Rows(np.arange(3), np.zeros(2))
