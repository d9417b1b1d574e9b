"""The report: every section, nothing from outside, and what it says when a stage has not run."""

import json
import re

import numpy as np
import pytest

from downscaling.fields import operators
from downscaling.metrics.ensembles import Ensemble
from downscaling.report import figures, galleries, results, sections, themes, writer


def waves(rng, s, space=(32,)):
  """Random periodic fields [s, *space], smooth by a repeated mean of neighbours."""
  x = rng.normal(size=(s, *space))
  for axis in range(1, x.ndim):
    for _ in range(3):
      x = (np.roll(x, 1, axis) + x + np.roll(x, -1, axis)) / 2
  return x.astype(np.float32)


def small(space=(32,), **changes):
  """Evidence of a whole pipeline on a tiny grid."""
  rng = np.random.default_rng(0)
  operator = operators.Strided.on(space, 8)
  coarsen = lambda x: np.asarray(operator.apply(x[..., None]))[..., 0]
  k, m = 8, 3
  truth, ot = waves(rng, k, space), waves(rng, k, space)
  around = lambda x: (
    x[:, None] + 0.1 * np.stack([waves(rng, k, space) for _ in range(m)], 1)
  )
  reference, floor = waves(rng, 30, space), waves(rng, 16, space)
  y = coarsen(waves(rng, 16, space))
  fields = {
    "experiment": "ks-8x",
    "default": "equivariant",
    "draws": 40,
    "coarse": {"lflr": 0.7 * y, "equivariant": y},
    "coarse_reference": coarsen(reference),
    "coarse_floor": coarsen(floor),
    "samples": {
      "equivariant+diffusion": around(ot),
      "raw+diffusion": around(0.7 * ot),
      "equivariant+cubic": ot[:, None],
      "unconditional": waves(rng, 12, space)[:, None],
      "true+diffusion": around(truth),
    },
    "conditions": {
      "equivariant+diffusion": coarsen(ot),
      "raw+diffusion": coarsen(0.7 * ot),
      "true+diffusion": coarsen(truth),
    },
    "truth": {"true+diffusion": truth},
    "fine_reference": reference,
    "fine_floor": floor,
    "operator": operator,
    "history": {
      "iteration": [10, 20, 30],
      "epsilon": [7.2, 0.72, 0.072],
      "error": [0.3, float("nan"), 1e-3],
    },
    "mean_cost": 72.0,
    "threshold": 1e-3,
    "loss": ([10, 20, 30], [1.0, 0.8, 0.7]),
    "length": 64.0,
    "provenance": {
      "command": "python -m downscaling pipeline --config=configs/ks.py:smoke <x>",
      "versions": {"jax": "0.10.2"},
      "config_hash": "0123456789ab",
      "times": {"debias": 12.0, "train": 200.0},
      "rows": {"equivariant": "held-out"},
      "seeds": {"data": 3},
      "config": {"grid": {"points": 32}},
    },
  }
  return writer.Evidence(**(fields | changes))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  folder = tmp_path_factory.mktemp("report")
  return folder, writer.write(folder, small())


def only_local(text):
  """No address, no attribute that fetches, no script."""
  assert not re.search(
    r"https?:|//[a-z]|@import|url\(|<script|<link|<iframe",
    re.sub(r"base64,[A-Za-z0-9+/=]+", "", text),
  )
  for found in re.findall(r'(?:src|srcset|href)="([^"]{0,24})', text):
    assert found.startswith(("data:image/png;base64,", "#")), found


def test_the_page_stands_alone_and_has_every_section(written):
  folder, _ = written
  text = (folder / "report.html").read_text()
  only_local(text)
  for part in sections.every(small()):
    assert f'<section id="{part.anchor}"><h2>' in text
    assert f'href="#{part.anchor}"' in text
  for words in (
    "Kuramoto–Sivashinsky, 8×", "the paper’s", "0.343", "True data",
    "equivariant + diffusion", "raw + diffusion", "equivariant + cubic",
    "unconditional", "true + diffusion", "held-out",
    "pipeline --config=configs/ks.py:smoke &lt;x&gt;", "jax", "0.10.2",
    "3.33 min", "processor", "spread / error", "config hash", "0123456789ab", "Seeds",
  ):  # fmt: skip
    assert words in text, words
  assert "class=missing" not in text
  assert 'class="missing"' not in text


def test_figures_are_files_and_stand_in_the_page_once(written):
  folder, _ = written
  names = {path.stem for path in folder.glob("*.png")}
  assert names >= {
    "spectrum_coarse", "spectrum_fine", "density_coarse", "density_fine",
    "gallery_equivariant_diffusion", "gallery_true_diffusion", "rows_reference",
    "rows_true_diffusion",
    "covariance_coarse_equivariant",
    "covariance_fine_equivariant_diffusion", "sinkhorn", "loss",
    "ranks", "spread_error",
  }  # fmt: skip
  text = (folder / "report.html").read_text()
  assert text.count("<img ") == text.count("data:image/png;base64,") == len(names)
  # Drawn on white paper, they are adapted to a dark page by its style sheet.
  assert re.search(r"prefers-color-scheme:dark\)\{.*figure img\{filter:invert", text)
  assert all(
    path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for path in folder.glob("*.png")
  )
  assert not [*folder.glob(".*tmp")]


def test_metrics_file(written):
  folder, returned = written
  metrics = json.loads((folder / "metrics.json").read_text())
  assert metrics["debias"] == returned["debias"]
  assert metrics["default"] == "equivariant"
  for row in metrics["samples"].values():
    low, middle, high = row["floor"]["cov_rmse"]
    assert 0 < low < middle < high
  assert metrics["rows"] == {"equivariant": "held-out"}
  assert metrics["sizes"]["samples.equivariant+diffusion"] == [8, 3, 32]
  assert metrics["calibration"]["true+diffusion"]["members"] == 3
  assert metrics["config_hash"] == "0123456789ab"
  # Members were made 0.1 of a field apart around the truth, also at the observed points.
  assert 0.05 < metrics["calibration"]["true+diffusion"]["member_rmse"] < 0.2


@pytest.fixture
def sketched(monkeypatch):
  """Figures drawn small: enough for what the page says."""
  monkeypatch.setattr(themes, "DPI", 40)


@pytest.fixture
def blank(monkeypatch):
  """No figure drawn."""
  png = themes.render(lambda theme: themes.page(0.1))
  monkeypatch.setattr(themes, "render", lambda f: png)


NONE = {
  "coarse": {},
  "samples": {},
  "conditions": {},
  "truth": {},
  "history": None,
  "loss": None,
  "provenance": {},
}


@pytest.mark.parametrize(
  ("absent", "jobs"),
  [
    (NONE, {"debias", "sample", "train"}),
    (
      {k: NONE[k] for k in ("samples", "conditions", "truth", "loss")},
      {"sample", "train"},
    ),
    ({"history": None, "coarse": {}}, {"debias"}),
    ({"truth": {}}, {"sample"}),
  ],
)
@pytest.mark.usefixtures("blank")
def test_missing_parts_name_their_job(tmp_path, absent, jobs):
  writer.write(tmp_path, small(**absent))
  text = (tmp_path / "report.html").read_text()
  only_local(text)
  assert {
    *re.findall(r'class="missing">[^<]*<code>python -m downscaling (\w+)', text)
  } == jobs


@pytest.mark.usefixtures("sketched")
def test_fields_of_the_plane(tmp_path):
  metrics = writer.write(tmp_path, small(space=(16, 16), experiment="mine", unit="m/s"))
  text = (tmp_path / "report.html").read_text()
  assert "paper’s" not in text
  assert "<h1>mine</h1>" in text
  assert (tmp_path / "gallery_true_diffusion.png").exists()
  assert metrics["samples"]["equivariant+diffusion"]["n"] == 8


def test_coarse_dots_sit_where_the_operator_looks():
  at = np.arange(32) * 2.0
  strided, mean = small(), small(operator=operators.BlockMean.on((32,), 8))
  assert galleries._places(strided, at, 4).tolist() == [0, 16, 32, 48]
  assert galleries._places(mean, at, 4).tolist() == [7, 23, 39, 55]


def test_a_gallery_reads_one_condition_at_a_time():
  members, seen = np.random.default_rng(0).normal(size=(9, 20, 5)), []

  def read(numbers):
    seen.append(numbers.tolist())
    return members[numbers]

  found = galleries._first(Ensemble(read, members.shape), np.array([0, 4, 8]))
  np.testing.assert_array_equal(found, members[[0, 4, 8], :8])
  assert seen == [[0], [4], [8]]


@pytest.mark.parametrize("members", [3, 199, 4096])
def test_bars_of_a_rank_histogram(members):
  """A flat histogram is flat, and its bars cover all ranks, however many ranks a bar stands for."""
  share = np.full(members + 1, 1 / (members + 1))
  figure = figures.ranks({"true+diffusion": share})(themes.LIGHT)
  bars = figure.axes[0].patches
  assert len(bars) == min(members + 1, figures.BARS)
  assert [bar.get_height() for bar in bars] == pytest.approx([1] * len(bars))
  assert sum(bar.get_width() for bar in bars) == pytest.approx(0.86 * (members + 1))
  middles = [bar.get_x() + bar.get_width() / 2 for bar in bars]
  assert np.mean([middles[0], middles[-1]]) == pytest.approx(members / 2, abs=1)


def test_sinkhorn_record():
  steps, epsilon, errors = small().convergence()
  assert steps.tolist() == [10, 30]  # the check that was not finite is left out
  assert np.allclose(epsilon, [0.1, 0.001])
  assert errors.tolist() == [0.3, 1e-3]
  with pytest.raises(ValueError, match=r"a Sinkhorn record .* came; need"):
    small(history={"errors": [1.0]}).convergence()


def test_bad_evidence_writes_nothing(tmp_path):
  bad = small().samples | {"equivariant+diffusion": np.full((8, 3, 32), np.nan)}
  with pytest.raises(ValueError, match=r"every member holds NaN"):
    writer.write(tmp_path, small(samples=bad))
  assert not [*tmp_path.iterdir()]
  with pytest.raises(ValueError, match="came without coarse_reference"):
    small(coarse_floor=None)
  with pytest.raises(ValueError, match=r"truth or conditions for \['mine'\]"):
    small(truth={"mine": np.zeros((8, 32))})


def test_importing_and_drawing_leave_matplotlib_alone(written):
  import matplotlib

  assert matplotlib.rcParams["axes.spines.top"]
  assert matplotlib.rcParams["figure.facecolor"] == "white"


def test_machine_is_named():
  found = results.machine()
  assert found["cores"] >= 1
  assert found["processor"]
