"""The debias job on tiny clouds: what it writes, that it resumes, and that held-out
means held out.
"""

import dataclasses

import numpy as np
import pytest
import xarray

from downscaling.debias import fit, maps
from downscaling.equations import ks
from downscaling.fields import symmetry
from downscaling.runtime import files, supervision


def rows(n, seed, scale, space=(6,)):
  return (scale * np.random.default_rng(seed).normal(size=(n, *space, 1))).astype(
    np.float32
  )


SOURCE, TARGET, HELD = rows(120, 0, 1.0), rows(130, 1, 1.6), rows(50, 2, 1.0)
PICKED = np.arange(1, 101, 2)  # source rows that are mapped in-sample
EVERY = tuple(maps.FITS)


def spread(source, mapped):
  kept = float(np.corrcoef(source.ravel(), mapped.ravel())[0, 1])
  return {"source": float(source.std()), "mapped": float(mapped.std()), "kept": kept}


def setting(group=None, stop=lambda: False, **sinkhorn):
  options = {"epsilon": 0.05, "check_every": 5} | sinkhorn
  batches = {"batch": 30, "passes": 20.0}
  return maps.Setting(
    group or ks.group(6),
    sinkhorn=options,
    minibatch=batches,
    recipe="GQ",
    quantiles=60,  # of 120 rows
    config_hash="hash",
    stop=stop,
  )


def debias(
  folder, held=HELD, *, names=("entropic",), chosen=None, given=None, **kwargs
):
  return fit.debias(
    folder,
    SOURCE,
    TARGET,
    held,
    space=(6,),
    maps=names,
    chosen=chosen or names[0],
    setting=given or setting(),
    **kwargs,
  )


def test_writes_the_maps_the_rows_and_the_diagnostics(tmp_path):
  report = debias(
    tmp_path,
    names=EVERY,
    chosen="equivariant",
    evaluators={"spread": spread},
    in_sample=PICKED,
  )
  assert files.read_json(tmp_path / "diagnostics.json") == report
  assert report["map"] == "equivariant"
  assert report["maps"]["entropic"]["converged"] is True
  facts = report["maps"]["equivariant"]
  # Gaussian rows: Q has nothing to give.
  assert facts["letters"] + facts["dropped"] == "GQ"
  assert facts["steps"][0] == "gaussian"
  assert report["sizes"] == {
    "source": 120,
    "target": 130,
    "held_out": 50,
    "dimensions": 6,
  }
  fitted = SOURCE[PICKED]
  for name, source in (("held_out", HELD), ("in_sample", fitted)):
    assert report[name]["rows"] == len(source)
    with xarray.open_zarr(tmp_path / f"{name}.zarr", consolidated=False) as data:
      np.testing.assert_array_equal(data["lflr"].values, source[..., 0])
      assert name == "held_out" or data["row"].values.tolist() == PICKED.tolist()
      for kind in EVERY:
        assert data[kind].dims == ("row", "x")
        assert data[kind].dtype == np.float32
        np.testing.assert_array_equal(
          data[kind].values, maps.load(tmp_path / kind)(source)[..., 0]
        )
  for kind in EVERY:
    found = report["held_out"][kind]["spread"]
    # every map must widen 1 to 1.6; the barycentric mean at this ε takes some of it back, the gains
    # of rescaled add what noise of 15 spare rows leaves
    assert 1.1 < found["mapped"] / found["source"] < 1.8, kind
    assert 0.75 < found["kept"] <= 1, kind
  # a Gaussian map of independent points only scales; a quantile table of 780 values adds its noise
  assert report["held_out"]["gaussian"]["spread"]["kept"] > 0.99
  assert report["held_out"]["equivariant"]["rows_outside_the_fit"] <= 5


def test_plan_figures_equal_the_dense_plan(tmp_path):
  report = debias(tmp_path, given=setting(threshold=1e-5))["maps"]["entropic"]
  fitted = maps.load(tmp_path / "entropic")
  x, y = (a.reshape(len(a), -1).astype(np.float64) for a in (SOURCE, TARGET))
  cost = ((x[:, None] - y[None]) ** 2).sum(-1)
  kernel = np.exp((fitted.g.astype(np.float64) - cost) / fitted.epsilon)
  p = kernel / kernel.sum(1, keepdims=True) / len(x)
  # an L1 error of 1e-5 and float32 weights
  assert report["plan_entropy"] == pytest.approx(-(p * np.log(p)).sum(), rel=1e-4)
  assert report["transport_cost"] == pytest.approx((p * cost).sum(), rel=1e-4)
  assert report["mean_cost"] == pytest.approx(cost.mean(), rel=1e-5)
  effective = report["effective_targets"]
  assert 1 <= effective["0"] <= effective["0.5"] <= effective["1"] <= 130


def test_a_stopped_job_goes_on_to_the_same_map(tmp_path):
  names = ("gaussian", "entropic")
  debias(tmp_path / "whole", names=names)
  asked = iter([False] * 4)
  with pytest.raises(supervision.Interrupted, match="stopped after 15 iterations"):
    debias(tmp_path / "cut", names=names, given=setting(stop=lambda: next(asked, True)))
  assert not (tmp_path / "cut" / "diagnostics.json").exists()
  first = (tmp_path / "cut" / "gaussian" / "arrays.npz").stat()
  # The second run finds the fits done and writes over its own stores.
  for _ in range(2):
    debias(tmp_path / "cut", names=names)
  assert (
    tmp_path / "cut" / "gaussian" / "arrays.npz"
  ).stat().st_mtime_ns == first.st_mtime_ns  # not fitted again
  whole, cut = (maps.load(tmp_path / name / "entropic") for name in ("whole", "cut"))
  np.testing.assert_array_equal(cut.g, whole.g)


def test_a_map_without_its_record_is_fitted_again(tmp_path):
  """Killed between the two files: map.json alone does not say that all is there."""
  debias(tmp_path, names=("gaussian",))
  (tmp_path / "gaussian" / "facts.json").unlink()
  assert debias(tmp_path, names=("gaussian",))["maps"]["gaussian"]["recipe"] == "G"


def test_two_dimensions_and_channels(tmp_path):
  source, target, held = (
    np.concatenate([rows(n, s, 1.0, (4, 3))] * 2, -1)
    for n, s in ((40, 0), (50, 1), (11, 2))
  )
  given = setting(symmetry.trivial(24), epsilon=0.01)
  fit.debias(
    tmp_path,
    source,
    target,
    held,
    space=(4, 3),
    maps=("entropic",),
    chosen="entropic",
    setting=given,
  )
  with xarray.open_zarr(tmp_path / "held_out.zarr", consolidated=False) as data:
    assert dict(data["entropic"].sizes) == {"row": 11, "y": 4, "x": 3, "channel": 2}


def test_not_converged_is_said(tmp_path, capfd):
  report = debias(tmp_path, given=setting(max_iterations=5))
  assert report["maps"]["entropic"]["converged"] is False
  assert (
    "debias: entropic not converged after 5 iterations, marginal error"
    in capfd.readouterr().err
  )


def test_rescaled_gains_come_from_rows_outside_the_fit(tmp_path):
  """A barycentric map shrinks; the gains, fitted on the 15 spare rows, must give the held-out ones
  the target's 1.6.
  """
  given = setting(epsilon=0.3)  # a large ε, so that there is much to cure
  # behind a map that has lost so much nothing is drawn: the job would refuse
  debias(tmp_path, names=("gaussian", "entropic", "rescaled"), given=given)
  assert files.read_json(tmp_path / "rescaled" / "facts.json")["spare_rows"] == 15
  spreads = {
    name: maps.load(tmp_path / name)(HELD).std() / TARGET.std()
    for name in ("entropic", "rescaled")
  }
  assert spreads["entropic"] < 0.8
  # 15 rows for each of 4 gains.
  assert spreads["rescaled"] == pytest.approx(1, abs=0.25)


def test_rows_outside_the_fit_are_counted_and_said(tmp_path, capfd):
  far = HELD.copy()
  far[:5] *= 20
  every_step = dataclasses.replace(
    setting(), select=False
  )  # Q, which these rows do not need, has a range
  report = debias(tmp_path, far, names=("entropic", "equivariant"), given=every_step)
  said = capfd.readouterr().err
  for name in ("entropic", "equivariant"):
    assert 5 <= report["held_out"][name]["rows_outside_the_fit"] <= 10
    assert report["in_sample"][name]["rows_outside_the_fit"] == 0
    assert f"rows of held_out.zarr lie outside what map {name} was fitted on" in said


def test_wrong_arrays_are_refused_before_the_fit(tmp_path):
  with pytest.raises(
    ValueError, match=r"held_out is \(50, 5, 1\), need \[rows, 6, channels\]"
  ):
    debias(tmp_path, HELD[:, :5])
  held = HELD.copy()
  held[7] = np.nan
  with pytest.raises(
    ValueError, match=r"held-out rows hold NaN or infinities in 1 of 50 rows \(7\)"
  ):
    debias(tmp_path, held)
  with pytest.raises(
    ValueError,
    match=r"config.debias.map='rescaled' is not among config.debias.maps=\('entropic',\)",
  ):
    debias(tmp_path, chosen="rescaled")
  with pytest.raises(
    ValueError, match=r"config.debias.maps has 'sinkhorn', which is unknown"
  ):
    debias(tmp_path, names=("sinkhorn",))
  assert list(tmp_path.iterdir()) == []


def test_a_map_of_an_unknown_kind(tmp_path):
  debias(tmp_path, names=("gaussian",))
  record = files.read_json(tmp_path / "gaussian" / "map.json")
  files.write_json(tmp_path / "gaussian" / "map.json", record | {"kind": "linear"})
  with pytest.raises(
    ValueError, match="holds a map of kind 'linear', this version reads"
  ):
    maps.load(tmp_path / "gaussian")
  with pytest.raises(FileNotFoundError, match="run `downscaling debias` first"):
    maps.load(tmp_path / "nothing")
