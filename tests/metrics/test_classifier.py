"""The classifier two-sample test: AUCs in closed form, planted differences, equal laws."""

import jax
import numpy as np
import pytest
import scipy.special

from downscaling.fields import symmetry
from downscaling.metrics import classifier


def waves(rows, points=16, seed=0, space=1):
  """Smooth periodic Gaussian fields of unit variance, [rows, *space]."""
  rng = np.random.default_rng(seed)
  shape = (points,) * space
  k = sum(
    np.meshgrid(
      *(np.fft.fftfreq(points, 1 / points) ** 2 for _ in shape), indexing="ij"
    )
  )
  axes = tuple(range(1, space + 1))
  noise = np.fft.fftn(rng.normal(size=(rows, *shape)), axes=axes)
  smooth = np.fft.ifftn(noise * np.exp(-k / 8), axes=axes).real
  return (smooth / smooth.std()).astype(np.float32)


def blocks(rows, first=0, each=2):
  return first + np.arange(rows) // each


@pytest.fixture
def quick(monkeypatch):
  """Small networks: 100 steps, the fewest that any set gets."""
  monkeypatch.setattr(classifier, "STEPS", {1: 100, 2: 100})


def score(fields, true, seed=0, **kwargs):
  ids, true_ids = blocks(len(fields)), blocks(len(true), 10**6)
  return classifier.auc(fields, ids, true, true_ids, seed=seed, **kwargs)


# ---------------------------------------------------------------- the AUC itself


def test_auc_of_two_gaussians_with_a_linear_score():
  """Scores N(0, 1) and N(d, 1): P(t > s) = Φ(d / √2)."""
  rng = np.random.default_rng(0)
  found = classifier.rank_auc(rng.normal(size=20_000), 0.8 + rng.normal(size=20_000))
  # The standard error of an AUC of 20 000 rows a side is at most √(1/12 · 2/20 000) = .003.
  assert found == pytest.approx([scipy.special.ndtr(0.8 / np.sqrt(2))], abs=0.009)


def test_auc_counts_pairs_ties_and_weights():
  scores, true = np.array([3, 1, 2]), np.array([2, 4])
  # 2 is above 1, ties with 2, is below 3; 4 is above all.
  assert classifier.rank_auc(scores, true) == (1.5 + 3) / 6
  weights, true_weights = np.array([[1, 0, 2]]), np.array([[1, 3]])
  # The same as [3, 2, 2] against [2, 4, 4, 4]: two ties, and nine pairs of 4.
  assert classifier.rank_auc(scores, true, weights, true_weights) == (2 / 2 + 9) / 12


# ---------------------------------------------------------------- power


def test_equal_laws_lie_inside_the_floor():
  found = score(waves(512, seed=1), waves(512, seed=2))
  null = classifier.floor(waves(1200, seed=3), blocks(1200), (512, 512), seed=0)
  assert null.interval[0] <= found.auc <= null.interval[1]
  assert null.interval[0] < 0.5 < null.interval[1]
  assert found.interval[0] < 0.5 < found.interval[1]
  # Independent rows, 256 a side and fold: standard error √(1/12 · 2/256 / 2) = .018. The quantiles
  # of 600 bootstraps are within 15 %, those of a law that the networks rank unevenly a little more.
  assert np.ptp(null.interval) == pytest.approx(2 * 1.96 * 0.018, rel=0.4)
  assert len(null.draws) == 3


@pytest.mark.parametrize(
  ("change", "least"),
  [
    (lambda u: u + 0.3, 0.6),  # the mean of a row has a standard deviation of .4
    (lambda u: 1.3 * u, 0.6),
    # Skewness alone: mean and variance are kept. One value's skewness is 1.2.
    (lambda u: (u + 0.25 * (u**2 - 1)) / np.sqrt(1 + 2 * 0.25**2), 0.6),
  ],
  ids=["shift", "scale", "skewness"],
)
def test_planted_differences_are_found(quick, change, least):
  true = waves(1024, seed=2)
  found = score(change(waves(1024, seed=1)), true)
  assert found.auc > least
  assert found.interval[0] > 0.53
  assert found.interval[0] < found.auc < found.interval[1]


def test_in_two_dimensions_with_a_stem(quick):
  """20 points an axis: the stem strides by two. A mean over four neighbours, of equal variance."""
  true, blurred = waves(128, 20, seed=2, space=2), waves(128, 20, seed=1, space=2)
  blurred = sum(np.roll(blurred, shift, axis=1) for shift in range(4))
  assert score(blurred / blurred.std(), true).auc > 0.7


def test_units_do_not_matter(quick):
  fields, true = waves(256, seed=1) * 1.2, waves(256, seed=2)
  in_kelvin = score(280 + 8 * fields, 280 + 8 * true)
  # Another rounding of float32 is amplified by a hundred steps; the standard error is .026.
  assert in_kelvin.auc == pytest.approx(score(fields, true).auc, abs=0.02)


def test_the_same_seed_gives_the_same_score(quick):
  fields, true = waves(256, seed=1), waves(256, seed=2)
  first = score(fields, true)
  assert score(fields, true) == first
  assert score(fields, true, seed=1).auc != first.auc


def test_moves_hide_what_breaks_them(quick):
  """A shift of the mean is gone where each row is also seen with its sign turned."""
  signs = symmetry.Moves(2, lambda x, element: x * (1 - 2 * element))
  fields, true = waves(1024, seed=1) + 0.5, waves(1024, seed=2)
  # |u + .5| still tells a little; without moves the AUC is about .75.
  assert score(fields, true, moves=signs).auc < score(fields, true).auc - 0.1


# ---------------------------------------------------------------- blocks


def test_no_network_scores_a_trajectory_that_it_saw(quick, monkeypatch):
  """What each network is trained on and what it scores never share a block."""
  seen = []
  train, scores = classifier._train, classifier._scores
  # The first value of a row is its block here.
  fields, true = (
    np.tile(blocks(256, first)[:, None], 16).astype(float) for first in (0, 1000)
  )

  def trained(one, other, *rest):
    seen.append({*one[:, 0], *other[:, 0]})
    return train(one, other, *rest)

  def watched(fits, params, rows, scale):
    assert not seen[-1] & set(rows[:, 0])
    scored.extend(rows[:, 0])
    return scores(fits, params, rows, scale)

  scored = []
  monkeypatch.setattr(classifier, "_train", trained)
  monkeypatch.setattr(classifier, "_scores", watched)
  classifier.auc(fields, blocks(256), true, blocks(256, 1000), seed=0)
  # And each row is scored once.
  assert sorted(scored) == sorted([*fields[:, 0], *true[:, 0]])


def test_floor_deals_blocks_apart_and_keeps_their_structure():
  labels = np.repeat(np.arange(40), 5)
  one, other = classifier._dealt(
    labels, (20, 60), classifier.random_keys.key(0, "classifier")
  )
  assert (len(one), len(other)) == (20, 60)
  assert not set(labels[one]) & set(labels[other])
  # 10 blocks for 20 rows, 30 for 60: 2 rows of each.
  assert set(np.unique(labels[one], return_counts=True)[1]) == {2}
  assert set(np.unique(labels[other], return_counts=True)[1]) == {2}


def test_bootstrap_draws_whole_blocks():
  labels = np.repeat([5, 7, 9], [1, 2, 3])
  drawn = classifier._resampled(labels, classifier.random_keys.key(0, "classifier"))
  assert drawn.shape == (classifier.RESAMPLES, 6)
  assert (drawn[:, 1] == drawn[:, 2]).all()
  assert (drawn[:, [0, 1, 3]].sum(axis=1) == 3).all()


# ---------------------------------------------------------------- refusals


def test_blocks_in_both_sets_are_refused():
  fields, true = waves(16, seed=1), waves(16, seed=2)
  with pytest.raises(
    ValueError, match=r"2 blocks are in both sets, e.g. 6: .*the reference split"
  ):
    classifier.auc(fields, blocks(16), true, blocks(16, 6), seed=0)


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"blocks": np.zeros(16)}, "the fields are of 1 blocks: need 4"),
    ({"blocks": np.zeros(3)}, r"blocks of the fields are \(3,\), need \[16\]"),
    ({"true_fields": waves(16, 8)}, r"fields are \(16,\) and true fields \(8,\)"),
    ({"fields": np.full((16, 16), np.nan)}, "the fields holds NaN"),
    ({"true_fields": np.ones((16, 16))}, "every row of ref is the same"),
  ],
)
def test_bad_input_is_refused(kwargs, message):
  sound = {"fields": waves(16), "true_fields": waves(16, seed=1)}
  sound |= {"blocks": blocks(16), "true_blocks": blocks(16, 100)}
  with pytest.raises(ValueError, match=message):
    classifier.auc(**sound | kwargs, seed=0)


def test_a_floor_of_too_few_true_rows_is_refused():
  with pytest.raises(
    ValueError, match="sets of 20 and 20 rows, but the true fields are 32 rows"
  ):
    classifier.floor(waves(32), blocks(32), (20, 20), seed=0)


# ---------------------------------------------------------------- domains with ends


def test_an_end_is_an_end():
  """Shifts along a periodic axis change nothing; along one with two ends they do."""
  network = classifier.Network((False, True))
  x = np.random.default_rng(0).normal(size=(2, 8, 16)).astype(np.float32)
  params = network.init(jax.random.key(0, impl="threefry2x32"), x)
  logits = np.asarray(network.apply(params, x))
  along_x = np.asarray(network.apply(params, np.roll(x, 5, axis=2)))
  along_y = np.asarray(network.apply(params, np.roll(x, 3, axis=1)))
  # Logits of a fresh network are about 1e-3; float32 sums in another order differ by 1e-7 of that.
  np.testing.assert_allclose(along_x, logits, atol=1e-6)
  assert np.abs(along_y - logits).max() > 1e-4


def test_a_strip_is_judged(quick):
  x, true = (waves(256, 8, seed, 2) for seed in (0, 1))
  assert score(2 * x, true, periodic=(False, True)).auc > 0.9
  assert 0.3 < score(x, true, periodic=(False, True)).auc < 0.7
