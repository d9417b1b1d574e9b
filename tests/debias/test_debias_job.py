"""The debias job on tiny clouds: what it writes, that it resumes, and that held-out means held out."""

import numpy as np
import pytest
import xarray

from downscaling.common import runs
from downscaling.debias import job, transport


def rows(n, seed, scale, space=(6,)):
  return (scale * np.random.default_rng(seed).normal(size=(n, *space, 1))).astype(np.float32)


SOURCE, TARGET, HELD = rows(120, 0, 1.0), rows(130, 1, 1.6), rows(50, 2, 1.0)
OPTIONS = dict(space=(6,), epsilon=0.05, check_every=5)


def spread(source, mapped):
  kept = float(np.corrcoef(source.ravel(), mapped.ravel())[0, 1])
  return {"source": float(source.std()), "mapped": float(mapped.std()), "kept": kept}


def test_writes_the_map_the_rows_and_the_diagnostics(tmp_path):
  report = job.debias(tmp_path, "hash", SOURCE, TARGET, HELD, **OPTIONS, evaluators={"spread": spread})
  assert report["converged"] is True
  assert runs.read_json(tmp_path / "diagnostics.json") == report
  loaded = transport.EntropicMap.load(tmp_path / "map")
  for name, source in (("held_out", HELD), ("in_sample", SOURCE)):
    with xarray.open_zarr(tmp_path / f"{name}.zarr", consolidated=False) as data:
      assert data["ot"].dims == ("row", "x")
      assert data["ot"].dtype == np.float32
      np.testing.assert_array_equal(data["lflr"].values, source[..., 0])
      np.testing.assert_array_equal(data["ot"].values, loaded(source)[..., 0])
    assert report[name]["rows"] == len(source)
    # the map must widen 1 to 1.6; the barycentric mean at this ε takes some of it back
    assert 1.15 < report[name]["spread"]["mapped"] / report[name]["spread"]["source"] < 1.6
    assert 0.8 < report[name]["spread"]["kept"] <= 1
  assert report["sizes"] == {"source": 120, "target": 130, "held_out": 50, "dimensions": 6}


def test_plan_figures_equal_the_dense_plan(tmp_path):
  report = job.debias(tmp_path, "hash", SOURCE, TARGET, HELD, **OPTIONS, threshold=1e-5)
  fitted = transport.EntropicMap.load(tmp_path / "map")
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
  job.debias(tmp_path / "whole", "hash", SOURCE, TARGET, HELD, **OPTIONS)
  asked = iter([False] * 3)
  with pytest.raises(runs.Interrupted, match="stopped after 15 iterations"):
    job.debias(tmp_path / "cut", "hash", SOURCE, TARGET, HELD, **OPTIONS, stop=lambda: next(asked, True))
  assert not (tmp_path / "cut" / "diagnostics.json").exists()
  for _ in range(2):  # the second run finds the fit done and writes over its own stores
    job.debias(tmp_path / "cut", "hash", SOURCE, TARGET, HELD, **OPTIONS)
  whole, cut = (transport.EntropicMap.load(tmp_path / name / "map") for name in ("whole", "cut"))
  np.testing.assert_array_equal(cut.g, whole.g)


def test_two_dimensions_and_channels(tmp_path):
  source, target, held = (np.concatenate([rows(n, s, 1.0, (4, 3))] * 2, -1) for n, s in ((40, 0), (50, 1), (11, 2)))
  job.debias(tmp_path, "hash", source, target, held, space=(4, 3), epsilon=0.1)
  with xarray.open_zarr(tmp_path / "held_out.zarr", consolidated=False) as data:
    assert dict(data["ot"].sizes) == {"row": 11, "y": 4, "x": 3, "channel": 2}


def test_not_converged_is_said(tmp_path, capfd):
  report = job.debias(tmp_path, "hash", SOURCE, TARGET, HELD, **OPTIONS, max_iterations=5)
  assert report["converged"] is False
  assert "debias: not converged after 5 iterations, marginal error" in capfd.readouterr().err


def test_wrong_arrays_are_refused_before_the_fit(tmp_path):
  with pytest.raises(ValueError, match=r"held_out is \(50, 5, 1\), need \[rows, 6, channels\]"):
    job.debias(tmp_path, "hash", SOURCE, TARGET, HELD[:, :5], **OPTIONS)
  held = HELD.copy()
  held[7] = np.nan
  with pytest.raises(ValueError, match=r"held-out rows hold NaN or infinities in 1 of 50 rows \(7\)"):
    job.debias(tmp_path, "hash", SOURCE, TARGET, held, **OPTIONS)
  assert list(tmp_path.iterdir()) == []
