"""What the user sees of rows that cannot be meant and of maps that carry no information."""

import numpy as np
import pytest

from downscaling.debias import bias_symmetry, fit, health, maps
from downscaling.equations import ks
from downscaling.fields import symmetry
from downscaling.runtime import files

SPACE = (6,)


def rows(n, seed, scale=1.0):
  return (scale * np.random.default_rng(seed).normal(size=(n, *SPACE, 1))).astype(
    np.float32
  )


def debias(folder, source, target, *, names=("gaussian",), calibration=None, **given):
  setting = maps.Setting(
    ks.group(6),
    sinkhorn={"epsilon": given.pop("epsilon", 0.01), "check_every": 10},
    recipe="G",
    **given,
  )
  how = {
    "space": SPACE,
    "maps": names,
    "chosen": names[0],
    "setting": setting,
    "calibration": calibration,
  }
  return fit.debias(folder, source, target, rows(60, 9), **how)


def levels(report):
  return {each["check"]: each["level"] for each in report["health"]}


def test_healthy_rows_give_no_warning(tmp_path, capfd):
  report = debias(tmp_path, rows(200, 0), rows(200, 1, 1.3))
  assert set(levels(report).values()) == {"ok"}
  assert "warning" not in capfd.readouterr().err
  assert files.read_json(tmp_path / "diagnostics.json")["health"] == report["health"]
  assert report["group"] == {"name": "full", "elements": 12}


def test_one_row_of_ten_thousand_is_refused_before_anything_is_written(tmp_path):
  source = rows(200, 0)
  source[17] = 1e4
  with pytest.raises(
    ValueError,
    match=r"1 of 200 source rows hold values beyond .* \(rows 17; the largest is 1e\+04",
  ):
    debias(tmp_path, source, rows(200, 1), names=("entropic",))
  assert list(tmp_path.iterdir()) == []
  # the way out that the message names
  report = debias(tmp_path, source, rows(200, 1), outlier=1e6)
  assert levels(report)["outliers in source"] == "warning"


def test_a_stray_row_is_named(tmp_path, capfd):
  target = rows(200, 1)
  target[3, 2] = 50.0
  report = debias(tmp_path, rows(200, 0), target)
  assert levels(report)["outliers in target"] == "warning"
  assert (
    "debias: warning: 1 of 200 target rows hold values beyond 30 robust"
    in capfd.readouterr().err
  )


def test_a_constant_column_is_named(tmp_path, capfd):
  source = rows(200, 0)
  source[:, 4] = 1.0
  report = debias(tmp_path, source, rows(200, 1))
  assert levels(report)["constant points in source"] == "warning"
  assert (
    "1 of 6 points have one value in all source rows (points 4)"
    in capfd.readouterr().err
  )


@pytest.mark.parametrize("epsilon", [1.0, 100.0])
def test_an_epsilon_without_information_is_an_error_of_the_chosen_map(
  tmp_path, epsilon
):
  with pytest.raises(
    ValueError,
    match=r"map entropic has lost \d+% of the variance .*epsilon is too large",
  ):
    debias(tmp_path, rows(200, 0), rows(200, 1), names=("entropic",), epsilon=epsilon)
  found = files.read_json(tmp_path / "diagnostics.json")["health"]
  assert {"amplitude ratio", "shrinkage of the barycentric map"} <= {
    e["check"] for e in found if e["level"] == "error"
  }


def test_of_a_map_that_is_only_shown_it_is_a_warning(tmp_path, capfd):
  report = debias(
    tmp_path, rows(200, 0), rows(200, 1), names=("gaussian", "entropic"), epsilon=1.0
  )
  assert levels(report)["shrinkage of the barycentric map"] == "warning"
  assert "debias: warning: map entropic has lost" in capfd.readouterr().err


def test_rows_are_told_of_before_a_fit_fails(tmp_path, capfd, monkeypatch):
  """A column that never varies, and a fit that raises: the user has read the warning by then."""
  source = rows(200, 0)
  source[:, 3] = 0.5
  monkeypatch.setitem(maps.FITS, "gaussian", lambda *_: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    debias(tmp_path, source, rows(200, 1))
  said = capfd.readouterr().err
  assert "debias: warning: " in said
  assert "points 3" in said


def test_a_standard_error_without_meaning_is_not_quoted():
  """A point of one value and a bias: 1.6e14 standard errors were said."""
  verdict = bias_symmetry.Verdict("full", 12, 1.6e14, 4.1, "mean", 2, 0.5)
  (found,) = health.of_group([verdict], "trivial")
  assert "more than 1000 standard errors where sampling allows 4.1" in found["message"]


def test_outlying_rows_are_named_where_they_inflate_the_cost(tmp_path, capfd):
  """One row of 2·10⁴ makes the mean cost 10⁶ times the median: ε is not what is wrong."""
  source = rows(200, 0)
  source[17] = 2e4
  debias(tmp_path, source, rows(200, 1), names=("gaussian", "entropic"), outlier=1e9)
  said = capfd.readouterr().err
  assert "1 source rows (17) lie so far from the others" in said
  assert "epsilon is too large" not in said


def test_a_broken_symmetry_is_said_on_one_line(tmp_path, capfd):
  source = (
    rows(400, 0) + np.float32(0.5) * (np.arange(6) == 2).astype(np.float32)[:, None]
  )
  report = debias(tmp_path, source, rows(400, 1))
  assert report["group"] == {"name": "trivial", "elements": 1}
  lines = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
  assert len(lines) == 1
  assert (
    "the bias breaks the symmetry of the group 'full' (12 elements): the difference in mean at "
    "point 2" in lines[0]
  )
  assert "maps are fitted with the group 'trivial'" in lines[0]
  forced = debias(tmp_path / "forced", source, rows(400, 1), subgroup="full")
  assert forced["group"]["name"] == "full"
  assert "set --config.debias.group=auto" in capfd.readouterr().err


def test_too_few_rows_for_the_points():
  assert health.of_size(20, 24, 48)["level"] == "ok"
  assert health.of_size(100, 24, 1)["level"] == "warning"


def test_calibration_rows_are_mapped_too(tmp_path):
  import xarray

  calibration = rows(30, 5)
  debias(tmp_path, rows(200, 0), rows(200, 1, 1.3), calibration=calibration)
  with xarray.open_zarr(tmp_path / "calibration.zarr", consolidated=False) as data:
    np.testing.assert_array_equal(data["lflr"].values, calibration[..., 0])
    np.testing.assert_array_equal(
      data["gaussian"].values, maps.load(tmp_path / "gaussian")(calibration)[..., 0]
    )


def test_a_recipe_of_which_nothing_helps_is_the_identity(tmp_path, capfd):
  source = rows(300, 0)
  report = debias(tmp_path, source, source.copy(), names=("equivariant",))
  if report["maps"]["equivariant"]["letters"] == "":
    assert "map equivariant is the identity" in capfd.readouterr().err
  held = rows(60, 9)
  np.testing.assert_allclose(maps.load(tmp_path / "equivariant")(held), held, atol=1e-5)


def test_groups_without_symmetry_are_not_tested(tmp_path):
  setting = maps.Setting(symmetry.trivial(6))
  report = fit.debias(
    tmp_path,
    rows(100, 0),
    rows(100, 1),
    rows(50, 2),
    space=SPACE,
    maps=("gaussian",),
    chosen="gaussian",
    setting=setting,
  )
  assert report["group"] == {"name": "full", "elements": 1}
