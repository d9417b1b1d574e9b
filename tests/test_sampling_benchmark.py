"""The benchmark of samplers: held-out fields with and without a data set, the sweep of Eq. 7,
ratios, costs.
"""

import json
import math
import os
import pathlib
import sys

import jax
import numpy as np
import pytest

from downscaling import experiment, jobs
from downscaling.assembly import prior, worlds
from downscaling.datasets import simulated
from downscaling.runtime import mesh as meshes
from downscaling.runtime import supervision

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bench():
  """The modules of the benchmark, which lie beside the script and import each other."""
  sys.path.insert(0, str(ROOT / "benchmarks"))
  import sampling_bench
  import sampling_cases
  import sampling_rival

  yield {"bench": sampling_bench, "cases": sampling_cases, "rival": sampling_rival}
  sys.path.remove(str(ROOT / "benchmarks"))


def few(folder, **changes):
  """A context of KS with few trajectories in small shards."""
  fine = dict(train=8, calibration=8, test=12, reference=8, floor=8)
  coarse = dict(train=8, calibration=8, test=8)
  keys = {"data.shard": 8, "data.hfhr": fine, "data.lflr": coarse} | changes
  config = experiment.load("ks:smoke", **keys)
  return jobs.Workdir(config, folder, meshes.make(), supervision.Stop())


def test_fields_are_the_same_with_and_without_a_data_set(bench, tmp_path):
  made, bare = few(tmp_path / "made"), few(tmp_path / "bare")
  jobs.run("generate", made)
  # 30 rows of 12 trajectories of 4: some give two rows, some three; 12 do not fill two shards of 8.
  for split, count in (("test", 30), ("test", 5), ("calibration", 8)):
    read = bench["bench"].fine_fields(made, split, count)
    anew = bench["bench"].fine_fields(bare, split, count)
    assert read.shape == (count, 192, 1)
    np.testing.assert_array_equal(read, anew)
  assert not (tmp_path / "bare").exists()  # nothing is written for it
  rows = simulated.balanced(12, 4, 5)
  dataset = worlds.dataset(made.experiment, made.path, "hfhr")
  assert list(simulated.load(dataset, "test", index=rows)["trajectory"]) == list(
    1_500_000_000 + rows // 4
  )


def test_a_data_set_of_another_config_is_refused(bench, tmp_path):
  made = few(tmp_path)
  jobs.run("generate", made)
  other = few(tmp_path, **{"data.burn_in": 12.5})
  with pytest.raises(ValueError, match=r"data\.burn_in: 25\.0 -> 12\.5"):
    bench["bench"].fine_fields(other, "test", 5)


def parabola(best, runaway=math.inf):
  """Member RMSE with its least at one α, CRPS with its least at half of it; members run away from
  `runaway` on.
  """

  def measure(overrides):
    alpha = overrides["guidance.alpha"]
    if alpha >= runaway:
      return {"runaways": 3}
    return {
      "member": 1 + math.log(alpha / best) ** 2,
      "crps": 1 + math.log(2 * alpha / best) ** 2,
    }

  return measure


ALPHAS = (2.0, 3.0, 4.0, 5.0, 6.0, 8.0)


@pytest.mark.parametrize("best", [2.3, 4.4, 5.9])
def test_the_sweep_finds_the_best_strength(bench, best):
  rival = bench["rival"]
  one = rival.fit(rival.Variant("em", {"plain": {}}, ALPHAS), parabola(best))
  # ALPHAS lie within factors of 1.5; two halvings leave 1.5 ** .25, and the nearest is at half of
  # it at most.
  assert abs(math.log(one.by_error[1] / best)) <= math.log(1.5) / 8
  assert one.by_crps[1] == min(
    one.tried["plain"], key=lambda alpha: abs(math.log(2 * alpha / best))
  )


def test_the_sweep_goes_on_while_the_largest_is_best(bench):
  rival = bench["rival"]
  one = rival.fit(rival.Variant("em", {"plain": {}}, ALPHAS), parabola(20))
  assert [alpha for alpha in one.tried["plain"] if alpha in (8, 16, 32, 64)] == [
    8,
    16,
    32,
  ]
  assert abs(math.log(one.by_error[1] / 20)) <= math.log(2) / 8


def test_the_sweep_chooses_among_settings_and_refines_the_best_alone(bench):
  rival = bench["rival"]

  def measure(overrides):
    found = parabola(4.0)(overrides)
    return (
      found
      if overrides["solver.eta"] == 1
      else {key: 2 * value for key, value in found.items()}
    )

  variant = rival.Variant(
    "sde", {"η1": {"solver.eta": 1}, "η10": {"solver.eta": 10}}, ALPHAS
  )
  one = rival.fit(variant, measure)
  assert one.by_error == ("η1", 4.0)
  assert len(one.tried["η1"]) == len(ALPHAS) + 4
  assert len(one.tried["η10"]) == len(ALPHAS)


def test_no_strength_is_tried_beyond_the_first_that_runs_away(bench):
  rival = bench["rival"]
  one = rival.fit(rival.Variant("sde", {"plain": {}}, ALPHAS), parabola(5.2, runaway=5))
  assert [alpha for alpha in one.tried["plain"] if alpha >= 5] == [5]
  assert one.by_error[1] == 4.73  # √(4.47 · 5), and 4.47 is √(4 · 5)
  text = "\n".join(rival.swept("sde", one))
  assert "away" in text
  assert "best member RMSE at α = 4.73" in text
  assert "CRPS would choose α = 3" in text  # of 2.6, where CRPS is least
  with pytest.raises(ValueError, match="ran away at every α"):
    rival.fit(rival.Variant("sde", {"plain": {}}, ALPHAS), parabola(5.2, runaway=1))


ROW = {
  "calls": 100.0,
  "ms": 10.0,
  "wall": 10.0,
  "member": 0.2,
  "mean": 0.1,
  "crps": 0.04,
  "energy": 0.05,
}
ROW |= {
  "melre": 0.1,
  "cov": 1.0,
  "s/e": 1.1,
  "in50": 0.5,
  "in90": 0.7,
  "ideal50": 0.5,
  "ideal90": 0.78,
  "χ²": 2.0,
}


def test_ratios_are_to_the_best_of_each_column_and_say_where_we_are_worse(bench):
  rival = bench["rival"]
  rows = {
    "default": ROW
    | {"member": 0.05, "crps": 0.01, "ms": 2.0, "wall": 1.0, "s/e": 0.8, "cov": 1.01},
    "eq7 best em 256": ROW | {"calls": 500.0, "ms": 80.0, "wall": 40.0},
    "eq7 best sde 32": ROW
    | {"member": 0.1, "crps": 0.08, "wall": 2.0, "χ²": 0.4, "in50": 0.6},
    "eq7 best sde 16": {"calls": 1.0, "ms": 1.0, "wall": 1.0, "runaways": 4},
  }
  found = rival.ratios(rows)
  assert found["eq7 best em 256"]["wall"] == pytest.approx(1 / 40)
  assert found["eq7 best em 256"]["worse"] == "cov, s/e"  # |ln .8| > |ln 1.1|
  assert found["eq7 best sde 32"]["worse"] == "cov, s/e"
  assert found["eq7 best sde 16"]["worse"] == "calls, ms"
  best = found["the best of each"]
  assert (best["member"], best["crps"], best["calls"]) == pytest.approx(
    (0.5, 0.25, 100)
  )
  assert best["worse"] == "calls, ms, cov, s/e"
  lines = "\n".join(rival.aims(rows, found))
  assert "member RMSE, of the best: 0.500 (aim 0.250: missed)" in lines
  assert "CRPS, of the best: 0.250 (aim 0.250: met)" in lines
  assert "of its best 32 steps: 0.500 (aim 0.333: missed)" in lines
  assert "eq7 best sde 16: 4 members ran away" in lines


def test_a_choice_by_crps_is_drawn_where_it_matters(bench):
  rival = bench["rival"]
  fits = {}
  for variant in rival.VARIANTS:
    (setting, *_) = variant.settings
    tried = {
      setting: {3.0: {"member": 1.1, "crps": 0.9}, 4.0: {"member": 1.0, "crps": 1.0}}
    }
    fits[variant.name] = rival.Fit(tried, (setting, 4.0), (setting, 3.0))
  # By one hundredth: nobody would choose otherwise for that.
  fits["sde 16"].tried[next(iter(fits["sde 16"].tried))][3.0]["crps"] = 0.99
  found = rival.contest(fits)
  assert found["eq7 best em 256"] == bench["cases"].EQ7 | {"guidance.alpha": 4.0}
  assert found["eq7 crps-best sde 32"]["guidance.alpha"] == 3.0
  assert "eq7 crps-best sde 16" not in found
  assert {"default", "eq7 library em 256", "eq7 α1 em 256"} < set(found)


@pytest.fixture(scope="module")
def untrained(bench):
  """A Bench on random parameters, without a work folder.

  An untrained network's last layer is 0, and D linear.
  """
  config = experiment.load("ks:smoke")
  made = object.__new__(bench["bench"].Bench)
  made.mesh, made.seed, made.config, made._programs = meshes.make(), 0, config, {}
  made.stats = prior.unit_statistics(config)
  made.network = prior.network(config, made.stats)
  x = np.zeros((1, 192, 1), np.float32)
  drawn = jax.jit(made.network.init)(jax.random.key(0), x, np.ones(1, np.float32))[
    "params"
  ]
  rng = np.random.default_rng(1)
  made.params = jax.tree.map(
    lambda p: p + 0.1 * rng.standard_normal(p.shape, np.float32), drawn
  )
  made.table = prior.stand_in_table(config)
  return made


def test_a_gradient_counts_as_what_it_costs(bench, untrained):
  """By two counts of one kind of FLOPs: a gradient with respect to x of a convolution is another
  convolution.
  """
  cases = bench["cases"].CASES
  steps = untrained.config.sampling.levels.steps
  # The gain's products of 24 values are there as well: below a hundredth of a network's.
  assert untrained.calls({}) == pytest.approx(steps + 1, rel=0.01)
  assert untrained.calls(cases["measured heun 16"]) == pytest.approx(33, rel=0.01)
  one = untrained.calls(cases["eq7 α1 em 256"]) / 257
  assert one == pytest.approx(
    2, rel=0.05
  )  # measured 1.98: the first layer's input and embeddings need less
  assert untrained.calls(cases["eq7 α4 sde 32"]) == pytest.approx(33 * one, rel=1e-6)


def test_cases_take_turns_on_the_same_noise_and_share_a_program(bench, untrained):
  """One compilation serves every α; blocks do not change a draw; α reaches the sampler."""
  truth = np.random.default_rng(0).standard_normal((6, 192, 1)).astype(np.float32)
  at = bench["bench"].Conditions("test", truth, truth[:, ::8])
  eq7 = bench["cases"].EQ7 | {"levels.steps": 3}
  cases = {f"α{alpha:g}": eq7 | {"guidance.alpha": alpha} for alpha in (1.0, 4.0)}
  cases["library"] = eq7 | bench["cases"].LIBRARY
  found = untrained.draw(cases, at, members=2)
  assert len(untrained._programs) == 2  # normalise is another program
  assert found["α1"].fields.shape == (6, 2, 192)
  assert np.abs(found["α1"].fields - found["α4"].fields).max() > 1e-3
  # .5 over the share of one eighth is 4; in float32, through 3 steps.
  np.testing.assert_allclose(
    found["library"].fields, found["α4"].fields, rtol=1e-4, atol=1e-4
  )
  np.testing.assert_allclose(
    found["α1"].fields[:, :, ::8], at.y[:, None, :, 0].repeat(2, 1), atol=1e-5
  )
  first = bench["bench"].Conditions("test", truth[:4], truth[:4, ::8])
  # Four conditions make a smaller block, compiled otherwise: to rounding.
  again = untrained.draw({"α1": cases["α1"]}, first, members=2)["α1"]
  np.testing.assert_allclose(again.fields, found["α1"].fields[:4], rtol=1e-4, atol=1e-4)
  other = first._replace(split="calibration")
  assert (
    np.abs(untrained.draw({"": cases["α1"]}, other, 2)[""].fields - again.fields).max()
    > 1e-3
  )


def test_runaways_are_counted_and_have_no_scores(bench, untrained):
  at = bench["bench"].Conditions(
    "test", np.ones((3, 192, 1), np.float32), np.ones((3, 24, 1), np.float32)
  )
  fields = np.ones((3, 2, 192), np.float32)
  fields[1, 0, 5] = fields[2, 1, :] = np.nan
  assert untrained.score(fields, at) == {"runaways": 2}


def script(*flags):
  return [sys.executable, str(ROOT / "benchmarks" / "sampling.py"), *flags]


@pytest.mark.slow
def test_cases_and_a_varied_key_on_the_smoke_prior(finished, execute, tmp_path):
  """The table, its ratios, a fitted spread, the picture."""
  workdir, _ = finished
  config = ROOT / "configs" / "ks.py"
  argv = script(
    f"--workdir={workdir}", f"--config={config}:smoke", "--set", "data.shard=16"
  )
  cases = "eq7 α1 em 256,measured+r η5 8,default"
  more = ["--vary=solver.noise=1.0,1.1", "--spread", f"--out={tmp_path}"]
  done = execute([*argv, "--conditions=4", "--members=2", f"--cases={cases}", *more])
  assert done.returncode == 0, done.stderr
  found = json.loads((tmp_path / "sampling.json").read_text())
  rows = found["rows"]
  assert list(rows) == [*cases.split(","), "solver.noise=1.0", "solver.noise=1.1"]
  assert rows["solver.noise=1.0"]["member"] == rows["default"]["member"]
  assert rows["solver.noise=1.1"]["member"] != rows["default"]["member"]
  assert all(v > 0 for row in rows.values() for v in row["spectrum"].values())
  assert all(
    math.isfinite(row[k])
    for row in rows.values()
    for k in ("ms", "wall", "member", "crps", "melre", "cov")
  )
  assert {*found["baselines"]} == {"climatology", "interpolation"}
  assert rows["default"]["κ"] > 0
  assert done.stdout.count("default over") == 1
  assert (tmp_path / "sampling.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_rival_without_a_data_set_and_on_read_only_folders(
  finished, execute, tmp_path
):
  """What a published prior is judged by: train and data/statistics.npz alone give the table."""
  workdir, _ = finished
  bare = tmp_path / "bare"
  (bare / "data").mkdir(parents=True)
  (bare / "data" / "statistics.npz").write_bytes(
    (workdir / "data" / "statistics.npz").read_bytes()
  )
  os.symlink(workdir / "train", bare / "train")
  config = ROOT / "configs" / "ks.py"
  argv = script(
    f"--workdir={bare}",
    f"--config={config}:smoke",
    "--set",
    "data.shard=16",
    f"--out={tmp_path}",
  )
  done = execute([*argv, "--conditions=4", "--members=2", "--sweep=4,2"])
  assert done.returncode == 0, done.stderr
  found = json.loads((tmp_path / "sampling.json").read_text())
  assert {"em 256", "sde 32", "sde 16"} == set(found["sweep"])
  assert {"default", "eq7 best em 256", "eq7 best sde 32", "eq7 library em 256"} < set(
    found["rows"]
  )
  assert "the best of each" in found["ratios"]
  assert done.stdout.count("(aim") == 4
  assert [p.name for p in (bare / "data").iterdir()] == ["statistics.npz"]
