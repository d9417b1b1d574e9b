"""Calibration scores of ensembles whose answer is known."""

import tracemalloc

import numpy as np
import pytest

from downscaling.metrics import calibration


def draw(k=400, m=8, points=20, spread=1.0, seed=0):
  """Truth and members are draws of N(centre, 1) and N(centre, spread²)."""
  rng = np.random.default_rng(seed)
  centre = 3 * rng.normal(size=(k, points))
  truth = centre + rng.normal(size=(k, points))
  return centre[:, None] + spread * rng.normal(size=(k, m, points)), truth


@pytest.mark.parametrize("m", [2, 5, 40])
def test_a_perfect_ensemble_of_any_size(m):
  found = calibration.calibrate(*draw(m=m))
  # 8000 values: ratios within 2 %. Without √((M + 1)/M) the ratio is .82 at M = 2, .91 at 5; with
  # ddof=0 lower still.
  assert found.spread_error == pytest.approx(1.0, abs=0.03)
  assert np.allclose(found.ranks * (m + 1), 1, atol=0.3)
  for level, share in found.coverage.items():
    # Members are interpolated, which is exact for a flat density: .53 for .50 at M = 5. numpy's
    # default gives .42.
    assert share == pytest.approx(found.ideal[level], abs=0.045)
  assert found.ideal["0.9"] == pytest.approx(min(0.9, (m - 1) / (m + 1)))
  assert found.pinned == 0


def test_scores_in_closed_form():
  """Members and truth about one centre: member RMSE √2, mean RMSE √(1 + 1/M), fair CRPS 1/√π, all
  over √10.
  """
  found = calibration.calibrate(*draw(k=1500))
  assert found.rms == pytest.approx(np.sqrt(10), rel=0.02)
  assert found.member_rmse * found.rms == pytest.approx(np.sqrt(2), rel=0.02)
  assert found.mean_rmse * found.rms == pytest.approx(np.sqrt(1 + 1 / 8), rel=0.02)
  assert found.crps * found.rms == pytest.approx(
    1 / np.sqrt(np.pi), rel=0.02
  )  # the unfair one: + 1/(M √π), 12 %


def test_wrong_spread_is_seen():
  wide, narrow = (calibration.calibrate(*draw(m=20, spread=s)) for s in (2.0, 0.3))
  assert wide.spread_error == pytest.approx(
    2 / np.sqrt(1 + 4 / 20) * np.sqrt(21 / 20), rel=0.03
  )
  assert wide.ranks[0] < 0.5 / 21 < 2 / 21 < narrow.ranks[0]
  assert narrow.coverage["0.9"] < 0.5 < 0.97 < wide.coverage["0.9"]


def test_crps_is_the_double_sum():
  ensemble, truth = draw(k=3, m=4, points=2)
  pairs = np.abs(ensemble[:, :, None] - ensemble[:, None]).sum(axis=(1, 2)) / (
    2 * 4 * 3
  )
  exact = (np.abs(ensemble - truth[:, None]).mean(axis=1) - pairs).mean()
  found = calibration.calibrate(ensemble, truth)
  assert found.crps * found.rms == pytest.approx(exact, rel=1e-12)


def test_pinned_points_leave_the_histogram_alone():
  """Points the constraint fixes (every 4th, to rounding) would add a spike; they are set aside and
  counted.
  """
  ensemble, truth = draw()
  ensemble[..., ::4] = (
    truth[:, None, ::4] + 1e-6 * np.sign(np.arange(8) - 3.5)[None, :, None]
  )
  found = calibration.calibrate(ensemble, truth)
  assert found.pinned == 0.25
  assert np.allclose(found.ranks * 9, 1, atol=0.2)  # with them, rank 4 would be .33


def test_ties_are_shared():
  """Truth equal to two of three members, and above the third: ranks 1, 2, 3 are as likely."""
  ensemble = np.array([0.0, 1.0, 1.0])[None, :, None] * np.ones((4, 1, 2))
  truth = np.ones((4, 2))
  truth[0] = 5  # so that rms is not 0
  found = calibration.calibrate(ensemble, truth)
  assert np.allclose(found.ranks, [0, 0.25, 0.25, 0.25 + 0.25])


def test_fields_of_the_plane_and_blocks(monkeypatch):
  ensemble, truth = draw(k=12, m=3, points=16)
  flat = calibration.calibrate(ensemble, truth)
  monkeypatch.setattr(calibration.distances, "_CHUNK", 100)
  plane = calibration.calibrate(ensemble.reshape(12, 3, 4, 4), truth.reshape(12, 4, 4))
  assert plane.mean_rmse == pytest.approx(flat.mean_rmse, rel=1e-12)
  assert np.array_equal(plane.ranks, flat.ranks)


def test_spread_and_error_of_each_condition():
  ensemble, truth = draw(k=300, m=6, points=200)
  ensemble[150:] = truth[150:, None] + 3 * (
    ensemble[150:] - truth[150:, None]
  )  # errors and spread three times as large
  spread, error = calibration.by_condition(ensemble, truth)
  assert np.allclose(spread / error, 1, atol=0.35)
  assert np.median(spread[150:] / np.median(spread[:150])) == pytest.approx(3, rel=0.05)


def test_bad_ensembles_are_named():
  ensemble, truth = draw(k=4)
  with pytest.raises(
    ValueError, match=r"the truth is \(3, 20\) and the ensemble \(4, 8, 20\)"
  ):
    calibration.calibrate(ensemble, truth[:3])
  with pytest.raises(ValueError, match="1 member: spread needs two"):
    calibration.calibrate(ensemble[:, :1], truth)
  truth[1, 1] = np.nan
  with pytest.raises(ValueError, match="the truth holds NaN"):
    calibration.calibrate(ensemble, truth)


def test_energy_score_is_the_double_sum():
  ensemble, truth = draw(k=3, m=4, points=5)
  norm = lambda x: np.sqrt((x**2).mean(-1))
  pairs = norm(ensemble[:, :, None] - ensemble[:, None]).sum(axis=(1, 2)) / (2 * 4 * 3)
  exact = (norm(ensemble - truth[:, None]).mean(axis=1) - pairs).mean()
  found = calibration.calibrate(ensemble, truth)
  assert found.energy * found.rms == pytest.approx(exact, rel=1e-12)


def test_distances_between_members_are_made_tile_by_tile(monkeypatch):
  """Tiles of 3 among 8 members: whole ones, a rest, and those on the diagonal."""
  ensemble, truth = draw(k=3, m=8, points=5)
  whole = calibration.calibrate(ensemble, truth).energy
  monkeypatch.setattr(calibration, "TILE", 3)
  tiled = calibration.calibrate(ensemble, truth).energy
  assert tiled == pytest.approx(whole, rel=1e-12)  # another order of float64 sums


def test_no_array_holds_all_pairs_of_members():
  """2000 members of 4 points: a distance for every pair would be 32 MB, a tile is 8 MB."""
  ensemble, truth = draw(k=1, m=2000, points=4)
  tracemalloc.start()
  calibration.calibrate(ensemble, truth)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 8 * 2000**2


def test_energy_score_sees_how_points_go_together():
  """Members shuffled at every point alone keep each point's law, and so the CRPS; the fields are no
  longer fields.
  """
  rng = np.random.default_rng(3)
  fields = rng.normal(size=(500, 9, 1)) * np.ones(16)  # all points of a field are equal
  shuffled = rng.permuted(fields[:, :8], axis=1)
  whole, apart = (
    calibration.calibrate(x, fields[:, 8]) for x in (fields[:, :8], shuffled)
  )
  assert apart.crps == pytest.approx(whole.crps, rel=1e-9)
  # In closed form, unit normals: E|x − t| − E|x − x'|/2 = 1/√π = .564 for whole fields; 1.1 − √2/2
  # or so for shuffled.
  assert whole.energy == pytest.approx(1 / np.sqrt(np.pi), rel=0.06)
  assert apart.energy > 1.1 * whole.energy


def test_what_a_forecast_must_beat():
  """Climatology of R fields has the fair scores of an ensemble of R; a single field's CRPS is its
  absolute error.
  """
  rng = np.random.default_rng(4)
  truth, fields = rng.normal(size=(300, 12)), rng.normal(size=(64, 12))
  found = calibration.climatology(fields, truth)
  same = calibration.calibrate(np.broadcast_to(fields, (300, 64, 12)), truth)
  assert found.crps == pytest.approx(same.crps, rel=1e-9)
  assert found.energy == pytest.approx(same.energy, rel=1e-9)
  assert found.error == pytest.approx(same.member_rmse, rel=1e-9)
  guess = calibration.single(truth + 0.5, truth)
  assert guess == pytest.approx((0.5 / truth.std(),) * 3)
  with pytest.raises(ValueError, match="need one field a condition"):
    calibration.single(fields, truth)
  with pytest.raises(ValueError, match="1 held-out field"):
    calibration.climatology(fields[:1], truth)
