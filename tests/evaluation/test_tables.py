"""Rows of metrics.json: the schema, floors, and the printed table."""

import json

import numpy as np
import pytest

from downscaling.common import operators, symmetry
from downscaling.evaluation import distances, tables


def waves(rng, s, n=32, scale=1.0):
  """Smooth random periodic fields [s, n]."""
  k = np.arange(n // 2 + 1)
  modes = (rng.normal(size=(s, k.size)) + 1j * rng.normal(size=(s, k.size))) * np.exp(-k / 4.0) * (k > 0)
  return (scale * np.fft.irfft(modes * n / 2, n=n, axis=1)).astype(np.float32)


@pytest.fixture(scope="module")
def made():
  """metrics of a small KS-like experiment, with one row that has other sizes."""
  rng = np.random.default_rng(0)
  operator = operators.Strided.on((32,), 8)
  reference, floor = waves(rng, 300), waves(rng, 200)
  y = waves(rng, 120, scale=0.6)[:, ::8]
  coarse = {"lflr": y, "ot": y / 0.6, "ot in-sample": waves(rng, 60)[:, ::8]}
  fine = waves(rng, 50)
  samples = {"ot+diffusion": np.stack([fine, fine + 0.1 * waves(rng, 50)], 1), "unconditional": waves(rng, 80)[:, None]}
  debias = tables.debias_rows(coarse, {}, reference[:, ::8], floor[:, ::8], symmetry.trivial(4))
  rows = tables.sample_rows(samples, {"ot+diffusion": fine[:, ::8]}, reference, floor, operator)
  return {"experiment": "ks-8x", "debias": debias, "samples": rows, "versions": {"jax": "0"}, "config_hash": "abc"}


def test_a_finished_file_follows_the_schema(made):
  tables.check_schema(json.loads(json.dumps(made)))
  assert {*made["debias"]["ot"]} == {*tables.KEYS, *tables.DEBIAS_KEYS}
  assert {*made["samples"]["floor"]} == {*tables.KEYS, *tables.SAMPLE_KEYS}


@pytest.mark.parametrize(
  ("break_it", "says"),
  [
    (lambda m: m.pop("experiment"), "experiment is NoneType"),
    (lambda m: m.pop("config_hash"), "config_hash is missing"),
    (lambda m: m["debias"]["ot"].pop("corr_input"), "debias.ot.corr_input is missing"),
    (lambda m: m["samples"].pop("floor"), "samples has no floor"),
    (lambda m: m["samples"]["unconditional"].update(mmd=float("nan")), "samples.unconditional.mmd is nan"),
    (lambda m: m["samples"]["unconditional"].update(wass1=None), "samples.unconditional.wass1 is None"),
    (lambda m: m["samples"]["unconditional"].update(extra=1), "extra is not in the schema"),
  ],
)
def test_a_broken_file_does_not(made, break_it, says):
  copy = json.loads(json.dumps(made))
  break_it(copy)
  with pytest.raises(ValueError, match=says):
    tables.check_schema(copy)


def test_every_row_has_the_floor_of_its_size(made):
  debias, samples = made["debias"], made["samples"]
  assert [*debias] == ["lflr", "ot", "ot in-sample", "floor", "floor n=60"]
  assert [*samples] == ["ot+diffusion", "unconditional", "floor", "floor n=80"]
  assert tables.floor_of(debias, "ot") is debias["floor"]
  assert tables.floor_of(debias, "ot in-sample") is debias["floor n=60"]
  assert tables.floor_of(samples, "floor") is None
  assert debias["floor n=60"]["cov_rmse"] > debias["floor"]["cov_rmse"]  # fewer rows, a higher floor


def test_rows_say_what_they_can(made):
  ot, lflr = made["debias"]["ot"], made["debias"]["lflr"]
  assert ot["corr_input"] == pytest.approx(1, abs=1e-5)
  assert ot["displacement"] == pytest.approx(2 / 3, abs=1e-5)  # |y/.6 − y| / |y|
  assert lflr["displacement"] == 0
  assert made["debias"]["ot in-sample"]["corr_input"] is None  # its own input was not handed in
  assert made["debias"]["floor"]["corr_input"] is None
  drawn, free = made["samples"]["ot+diffusion"], made["samples"]["unconditional"]
  assert drawn["constraint_rmse"] > 0
  assert drawn["variability"] > 0
  assert free["constraint_rmse"] is None
  assert free["variability"] is None
  assert (drawn["n"], free["n"]) == (50, 80)


def test_a_right_map_reaches_the_floor_and_its_input_does_not(made):
  debias = made["debias"]
  assert debias["floor"]["bispectrum"] is debias["floor"]["transfer"] is None  # four points, no quadratic term given
  without = {"bispectrum", "transfer", "flatness", "gradient_flatness"}  # the last two do not see the input's scale
  for key in (k for k in tables.COMPARED if k not in without):
    assert debias["ot"][key] < 2 * debias["floor"][key], key  # 120 rows: floors scatter by half their size
    assert debias["lflr"][key] > debias["ot"][key], key


def test_distribution_metrics_see_the_first_member():
  rng = np.random.default_rng(1)
  ensemble, reference = np.stack([waves(rng, 40), waves(rng, 40, scale=9)], 1), waves(rng, 90)
  row = tables.sample_rows({"a": ensemble}, {}, reference, waves(rng, 40))["a"]
  assert row["cov_rmse"] == pytest.approx(distances.cov_rmse(ensemble[:, 0], reference))
  assert row["variability"] == pytest.approx(distances.variability(ensemble))


def test_bad_rows_are_named():
  rng = np.random.default_rng(1)
  reference = waves(rng, 30)
  bad = waves(rng, 20)
  bad[3, 3] = np.nan
  with pytest.raises(ValueError, match=r"row 'ot': .*holds NaN"):
    tables.debias_rows({"ot": bad}, {}, reference, waves(rng, 20))
  with pytest.raises(ValueError, match=r"samples 'raw\+diffusion' holds NaN"):
    tables.sample_rows({"raw+diffusion": bad[:, None]}, {}, reference, waves(rng, 20))
  with pytest.raises(ValueError, match="the reference holds NaN"):
    tables.measure(reference, bad)
  with pytest.raises(ValueError, match="floor set has 10 rows and a set of 20 is judged"):
    tables.debias_rows({"ot": waves(rng, 20)}, {}, reference, waves(rng, 10))


def test_the_printed_table_fits_a_terminal(made):
  text = tables.summary_table(made)
  lines = text.splitlines()
  assert max(map(len, lines)) <= 100
  row = lambda name: next(line for line in lines if line.startswith(name))
  assert "paper, LFLR" in text
  assert "0.343" in row("  paper, LFLR")
  assert "*" not in row("lflr")
  head, ot = lines[0], row("ot ")
  column = head.index("covRMSE") + len("covRMSE")
  assert ot[:column].rstrip("*").split()[-1] == tables.shown(made["debias"]["ot"]["cov_rmse"])
  other = tables.summary_table(made | {"experiment": "mine"})
  assert "paper" not in other


def test_numbers_are_printed_short():
  values = {
    None: "–",
    0: "0",
    0.0123: "0.012",
    1.5: "1.500",
    29.3: "29.3",
    0.0021: "0.0021",
    3e-7: "3e-07",
    1234.5: "1.23e+03",
  }
  for value, text in values.items():
    assert tables.shown(value) == text
    assert len(text) <= 8
