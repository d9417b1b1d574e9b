"""The quantile map against xsdba's EmpiricalQuantileMapping, on the same rows."""

import subprocess

import numpy as np
import pytest

from downscaling.debias import quantile_map

pytestmark = pytest.mark.services
ORACLE = """
import sys
import numpy as np, pandas as pd, xarray as xr, xsdba
rows = np.load(sys.argv[1])
def array(name):
  days = pd.date_range("1990-01-01", periods=len(rows[name]))
  return xr.DataArray(rows[name], dims=("time", "x"), coords={"time": days}, attrs={"units": "K"})
fitted = xsdba.EmpiricalQuantileMapping.train(
  array("ref"), array("hist"), nquantiles=int(rows["quantiles"]), kind="+", group="time")
made = fitted.adjust(array("sim"), interp="linear", extrapolation="constant")
np.save(sys.argv[2], made.transpose("time", "x").values)
"""


def test_it_is_xsdbas_empirical_quantile_mapping(tools, tmp_path):
  """To our rounding, in float32; between the quantiles, and beyond the outermost."""
  programs = tools("xsdba==0.7.0")
  draw = np.random.default_rng(0)
  ref, hist, sim = (
    (draw.normal(size=(n, 6)) * scale + shift).astype(np.float32)
    for n, scale, shift in ((3000, 1, 0), (3000, 1.6, 0.5), (2000, 1.8, 0.7))
  )
  exact = {
    k: v.astype(float) for k, v in {"ref": ref, "hist": hist, "sim": sim}.items()
  }
  np.savez(tmp_path / "rows.npz", quantiles=500, **exact)
  argv = [
    programs / "python",
    "-c",
    ORACLE,
    tmp_path / "rows.npz",
    tmp_path / "out.npy",
  ]
  done = subprocess.run(
    [str(each) for each in argv],
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  ours = quantile_map.fit(hist[..., None], ref[..., None], 500)(sim[..., None])[..., 0]
  theirs = np.load(tmp_path / "out.npy")
  assert np.isfinite(theirs).all()
  assert (np.abs(sim) > np.abs(hist).max()).any()  # some rows lie beyond
  np.testing.assert_allclose(ours, theirs, atol=5e-6)
