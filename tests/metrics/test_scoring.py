"""Rows of metrics.json: the schema, intervals, floors, and the printed tables."""

import json

import numpy as np
import pytest

from downscaling.fields import operators, symmetry
from downscaling.metrics import bootstrap, distances, judge, scoring
from downscaling.metrics.reference import Reference
from downscaling.report import terminal

DRAWS = 40


def waves(rng, s, n=32, scale=1.0):
  """Smooth random periodic fields [s, n]."""
  k = np.arange(n // 2 + 1)
  modes = (
    (rng.normal(size=(s, k.size)) + 1j * rng.normal(size=(s, k.size)))
    * np.exp(-k / 4.0)
    * (k > 0)
  )
  return (scale * np.fft.irfft(modes * n / 2, n=n, axis=1)).astype(np.float32)


def judging(reference, more, **of_grid):
  """A judge of independent rows."""
  origins = [bootstrap.single(len(x)) for x in (reference, more)]
  return judge.Judge(
    Reference(reference), origins[0], more, origins[1], draws=DRAWS, **of_grid
  )


@pytest.fixture(scope="module")
def made():
  """metrics of a small KS-like experiment, with one row that has other sizes."""
  rng = np.random.default_rng(0)
  operator = operators.Strided.on((32,), 8)
  reference, more = waves(rng, 300), waves(rng, 200)
  y = waves(rng, 120, scale=0.6)[:, ::8]
  coarse = {
    "lflr": y,
    "gaussian": y / 0.6,
    "gaussian in-sample": waves(rng, 60)[:, ::8],
  }
  fine = waves(rng, 50)
  drawn = np.stack([fine, fine + 0.1 * waves(rng, 50)], 1)
  samples = {"gaussian+diffusion": drawn, "unconditional": waves(rng, 80)[:, None]}
  of_coarse = judging(reference[:, ::8], more[:, ::8], group=symmetry.trivial(4))
  debias = scoring.debias_rows(coarse, {}, of_coarse)
  conditions = {"gaussian+diffusion": fine[:, ::8]}
  rows = scoring.sample_rows(samples, conditions, judging(reference, more), operator)
  about = {
    "experiment": "ks-8x",
    "versions": {"jax": "0"},
    "config_hash": "abc",
    "default": "gaussian",
  }
  return about | {"debias": debias, "samples": rows}


def test_a_finished_file_follows_the_schema(made):
  scoring.check_schema(json.loads(json.dumps(made)))
  ranges = {*scoring.RANGES}
  assert {*made["debias"]["gaussian"]} == {*scoring.KEYS, *scoring.DEBIAS_KEYS} | ranges
  assert {*made["samples"]["unconditional"]} == {
    *scoring.KEYS,
    *scoring.SAMPLE_KEYS,
  } | ranges


@pytest.mark.parametrize(
  ("break_it", "says"),
  [
    (lambda m: m.pop("experiment"), "experiment is NoneType"),
    (lambda m: m.pop("config_hash"), "config_hash is missing"),
    (
      lambda m: m["debias"]["gaussian"].pop("corr_input"),
      "debias.gaussian.corr_input is missing",
    ),
    (
      lambda m: m["samples"]["unconditional"].pop("floor"),
      "samples.unconditional.floor is missing",
    ),
    (
      lambda m: m["samples"]["unconditional"]["floor"].update(mmd=[3, 2, 1]),
      r"floor.mmd is \[3, 2, 1\]",
    ),
    (
      lambda m: m["samples"]["unconditional"].update(mmd=float("nan")),
      "samples.unconditional.mmd is nan",
    ),
    (
      lambda m: m["samples"]["unconditional"].update(wass1=None),
      "samples.unconditional.wass1 is None",
    ),
    (
      lambda m: m["samples"]["unconditional"].update(extra=1),
      "extra is not in the schema",
    ),
  ],
)
def test_a_broken_file_does_not(made, break_it, says):
  copy = json.loads(json.dumps(made))
  break_it(copy)
  with pytest.raises(ValueError, match=says):
    scoring.check_schema(copy)


def test_every_row_has_the_floor_of_its_size(made):
  debias = made["debias"]
  assert debias["lflr"]["floor"] == debias["gaussian"]["floor"]
  few, many = (
    debias[name]["floor"]["cov_rmse"][1] for name in ("gaussian in-sample", "gaussian")
  )
  assert few > many  # fewer rows, a higher floor
  assert [*scoring.floors(made["samples"])] == [(50, 50), (80, 80)]


def test_intervals_hold_their_values(made):
  for table in (made["debias"], made["samples"]):
    for row in table.values():
      assert {"cov_rmse", "melr_weighted", "wass1", "mmd"} <= {*row["interval"]}
      for key, (low, high) in row["interval"].items():
        assert low <= row[key] <= high, key


def test_rows_say_what_they_can(made):
  mapped, lflr = made["debias"]["gaussian"], made["debias"]["lflr"]
  assert mapped["corr_input"] == pytest.approx(1, abs=1e-5)
  assert mapped["displacement"] == pytest.approx(
    2 / 3, rel=0.02
  )  # |y/.6 − y| / |y − ȳ|, and ȳ is nearly 0
  assert lflr["displacement"] == 0
  # The input was made .6 times as large; 120 rows of 4 points know a standard deviation to about
  # .05.
  assert lflr["amplitude"] == pytest.approx(0.6, abs=0.1)
  assert mapped["amplitude"] == pytest.approx(1, abs=0.15)
  assert (
    made["debias"]["gaussian in-sample"]["corr_input"] is None
  )  # its own input was not handed in
  drawn, free = made["samples"]["gaussian+diffusion"], made["samples"]["unconditional"]
  assert drawn["constraint_rmse"] > 0
  assert drawn["corr_condition"] == pytest.approx(
    1, abs=1e-6
  )  # member 0 has the very coarse values
  assert drawn["variability"] > 0
  assert (
    free["constraint_rmse"] is free["corr_condition"] is free["variability"] is None
  )
  assert (drawn["n"], free["n"]) == (50, 80)
  assert drawn["failed"] == 0


def test_a_right_map_is_inside_what_true_data_do_and_its_input_is_not(made):
  debias = made["debias"]
  assert (
    debias["lflr"]["bispectrum"] is debias["lflr"]["transfer"] is None
  )  # four points, no quadratic term
  marked = [
    judge.inside(debias["gaussian"][k], debias["gaussian"]["floor"].get(k))
    for k in scoring.COMPARED
  ]
  known = [k for k in scoring.COMPARED if k in debias["gaussian"]["floor"]]
  # Each of about ten correlated columns misses a 95 % range one time in twenty; more than three are
  # another law.
  assert sum(marked) >= len(known) - 3
  for key in ("cov_rmse", "melr_weighted", "kld_sum", "wass1", "mmd"):
    assert not judge.inside(debias["lflr"][key], debias["lflr"]["floor"][key]), key


def test_distribution_metrics_see_the_first_whole_member():
  rng = np.random.default_rng(1)
  ensemble, reference = (
    np.stack([waves(rng, 40), waves(rng, 40, scale=9)], 1),
    waves(rng, 90),
  )
  judged = judging(reference, waves(rng, 40))
  row = scoring.sample_rows({"a": ensemble}, {}, judged)["a"]
  assert row["cov_rmse"] == pytest.approx(distances.cov_rmse(ensemble[:, 0], reference))
  assert row["variability"] == pytest.approx(distances.variability(ensemble))
  ensemble[3, 0] = np.nan  # it failed
  ensemble[5] = np.nan
  misfit = np.where(np.isnan(ensemble[..., 0]), np.inf, 1.0)
  row = scoring.sample_rows({"a": ensemble}, {}, judged, misfits={"a": misfit})["a"]
  kept = np.concatenate(
    [ensemble[:3, 0], ensemble[3:4, 1], ensemble[4:5, 0], ensemble[6:, 0]]
  )
  assert row["cov_rmse"] == pytest.approx(distances.cov_rmse(kept, reference))
  assert (row["failed"], row["n"], row["misfit"]) == (3, 39, 1.0)


def test_bad_rows_are_named():
  rng = np.random.default_rng(1)
  reference = waves(rng, 30)
  bad = waves(rng, 20)
  bad[3, 3] = np.nan
  judged = judging(reference, waves(rng, 20), group=symmetry.trivial(32))
  with pytest.raises(ValueError, match=r"row 'gaussian': .*holds NaN"):
    scoring.debias_rows({"gaussian": bad}, {}, judged)
  with pytest.raises(
    ValueError,
    match=r"raw\+diffusion: member 0 of condition 3 holds NaN .* at some points",
  ):
    scoring.sample_rows({"raw+diffusion": bad[:, None]}, {}, judged)
  with pytest.raises(ValueError, match="the reference holds NaN"):
    scoring.measure(reference, bad)
  with pytest.raises(
    ValueError, match="20 true fields, but 10 say where they come from"
  ):
    judge.Judge(
      Reference(reference), bootstrap.single(30), waves(rng, 20), bootstrap.single(10)
    )


def test_the_printed_tables_fit_a_terminal(made):
  text = terminal.summary(made)
  lines = text.splitlines()
  assert max(map(len, lines)) <= 100
  row = lambda name: next(line for line in lines if line.startswith(name))
  assert "0.343" in row("  the paper's LFLR")
  assert "the paper's OT" not in text  # it is an entropic map, and there is none here
  assert "*" not in row("lflr")
  assert row("gaussian (default)†").count("*") >= 3
  assert "fewer than 200 fields" in text
  assert "paper" not in terminal.summary(made | {"experiment": "mine"})


def test_numbers_are_printed_short():
  values = {
    None: "–",
    0.0: "0",
    3: "3",
    0.0123: "0.012",
    1.5: "1.500",
    29.3: "29.3",
    0.0021: "0.0021",
    3e-7: "3e-07",
    1234.5: "1.23e+03",
  }
  for value, text in values.items():
    assert terminal.shown(value) == text
    assert len(text) <= 8
  assert terminal.with_interval(0.0731, [0.069, 0.0774]) == ".073±.004"
  assert terminal.with_interval(1.247, [1.13, 1.37]) == "1.25±.12"
  assert terminal.with_interval(17.2, [10, 24]) == "17±7"
  assert terminal.with_interval(0.5, None) == "0.500"
  assert terminal.between([0.042, 0.05, 0.0612]) == ".042–.061"
