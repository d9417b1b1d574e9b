"""Covariances of few rows: structures in closed form, and a weight that is right at both ends."""

import numpy as np
import pytest

from downscaling.debias.equivariant import moments, shrinkage
from downscaling.fields import symmetry

N = 24


def circulant(n=N, slope=1.0):
  apart = np.minimum(np.arange(n), n - np.arange(n))
  first = np.exp(-apart / (n / 8)) ** slope
  return first[(np.arange(n)[:, None] - np.arange(n)) % n]


def folds(covariance, rows, seed=0):
  """Moments of five folds of Gaussian rows."""
  n = len(covariance)
  group = symmetry.trivial(n)
  frame = moments.Frame.of(group, (n,))
  y = (
    np.random.default_rng(seed).normal(size=(rows, n))
    @ np.linalg.cholesky(covariance).T
  )
  parts = [
    moments.Moments.of(part, frame) for part in np.array_split(y, shrinkage.FOLDS)
  ]
  return parts, group, frame


def test_a_stationary_law_with_varying_spread_is_its_own_structure():
  std = 1 + 0.3 * np.sin(2 * np.pi * np.arange(N) / N)
  covariance = circulant() * std[:, None] * std
  np.testing.assert_allclose(
    shrinkage.stationary(covariance, (N,)), covariance, atol=1e-14
  )


def test_stationary_is_the_mean_over_all_shifts():
  """In two dimensions, of a correlation matrix that is not stationary."""
  space, n = (4, 6), 24
  a = np.random.default_rng(0).normal(size=(n, 2 * n))
  covariance = a @ a.T
  std = np.sqrt(np.diagonal(covariance))
  index = np.arange(n).reshape(space)
  shifts = [np.roll(index, (i, j), (0, 1)).ravel() for i in range(4) for j in range(6)]
  correlation = covariance / std[:, None] / std
  mean = np.mean([correlation[np.ix_(s, s)] for s in shifts], axis=0)
  np.testing.assert_allclose(
    shrinkage.stationary(covariance, space), mean * std[:, None] * std, atol=1e-12
  )


def test_gaspari_and_cohn():
  r = np.array([0.0, 1.0, 2.0, 5.0])
  np.testing.assert_allclose(shrinkage.gaspari_cohn(r), [1, 5 / 24, 0, 0], atol=1e-14)
  tapered = shrinkage.tapered(np.ones((40, 40)), (40,), 10.0)
  assert (
    np.linalg.eigvalsh(tapered).min() > -1e-12
  )  # a taper is a correlation, so products with it stay PSD
  assert (tapered[0, 10:] == 0).all()


@pytest.mark.parametrize("rows", [60, 400])
def test_a_stationary_law_is_drawn_all_the_way(rows):
  """The structure is right, so only its own noise is left: an error of .2 where the sample has .7
  (60 rows).
  """
  covariance = circulant()
  found = shrinkage.shrink(*folds(covariance, rows), "stationary")
  error = lambda c: np.linalg.norm(c - covariance) / np.linalg.norm(covariance)
  sample = shrinkage.moments.total(folds(covariance, rows)[0]).averaged(
    *folds(covariance, rows)[1:]
  )[1][0]
  assert found.weight > 0.85
  assert error(found.covariance[0]) < 0.75 * error(sample)


def test_many_rows_of_another_law_are_left_alone():
  """Correlations of two unlike halves: the structure is wrong, and 40 000 rows know better."""
  covariance = np.zeros((N, N))
  half = slice(0, N // 2), slice(N // 2, N)
  covariance[half[0], half[0]] = circulant(N // 2)
  covariance[half[1], half[1]] = circulant(N // 2, slope=4)
  found = shrinkage.shrink(*folds(covariance, 40_000), "stationary")
  assert found.weight < 0.02


def test_without_a_periodic_grid_a_taper_is_chosen():
  apart = np.abs(np.arange(N)[:, None] - np.arange(N))
  found = shrinkage.shrink(*folds(np.exp(-apart / 2.0), 100), "tapered")
  assert found.structure.startswith("tapered to ")
  # 100 rows for 300 covariances: much of what is far apart is noise.
  assert found.weight > 0.2
  with pytest.raises(ValueError, match="towards='identity' is unknown"):
    shrinkage.shrink(*folds(circulant(), 20), "identity")


def test_fewer_rows_than_points_still_give_a_full_rank():
  found = shrinkage.shrink(*folds(circulant(), 15), "stationary")
  assert np.linalg.eigvalsh(found.covariance[0]).min() > 1e-4
