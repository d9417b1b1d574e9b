"""The program as a user meets it: real processes, real files, killed at the wrong moment, and none
the worse for it.
"""

import hashlib
import json
import pathlib
import re
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
import xarray

from downscaling import experiment
from downscaling.assembly import prior
from downscaling.datasets import simulated
from downscaling.diffusion import error_table, train_loop
from downscaling.fields import statistics
from downscaling.metrics import scoring
from downscaling.runtime import files, ledger, metric_writer, stage_folder
from downscaling.runtime import mesh as meshes

SETS = ("equivariant+diffusion", "raw+diffusion", "true+diffusion", "unconditional")


def state(folder):
  """{file: (time of its last change, SHA-256)} of a tree."""
  files = sorted(p for p in pathlib.Path(folder).rglob("*") if p.is_file())
  return {
    str(p.relative_to(folder)): (
      p.stat().st_mtime_ns,
      hashlib.sha256(p.read_bytes()).hexdigest(),
    )
    for p in files
  }


# ---------------------------------------------------------------- what a run leaves


def test_every_stage_left_its_files(finished):
  workdir, _ = finished
  for stage in ("data", "debias", "train", "samples", "report"):
    marker = files.read_json(workdir / stage / stage_folder.MARKER)
    assert marker["complete"]
    assert marker["stage"] == stage
    assert marker["products"]
    assert ledger.account(workdir / stage).productive > 0
    assert {"python", "jax", "orbax-checkpoint"} <= {*marker["versions"]}
  # 128 + 64 + 64 + 32 + 32 and 128 + 32 + 64 trajectories in shards of 16
  assert (
    len(list((workdir / "data" / "ks" / "hfhr").rglob("*.array_record-*-of-*"))) == 20
  )
  assert (
    len(list((workdir / "data" / "ks" / "lflr").rglob("*.array_record-*-of-*"))) == 14
  )
  for path in (
    *(
      "data/statistics.npz",
      "data/ks/hfhr/1.0.0/dataset_info.json",
      "data/ks/lflr/1.0.0/features.json",
    ),
    *(
      f"debias/{name}/{file}"
      for name in ("entropic", "gaussian", "equivariant")
      for file in ("map.json", "arrays.npz")
    ),
    "debias/diagnostics.json",
    *("debias/held_out.zarr/zarr.json", "debias/in_sample.zarr/zarr.json"),
    *(
      "train/prior/0",
      "train/denoising_error.npz",
      "train/checkpoints/20",
      "train/metrics.csv",
    ),
    *(f"samples/{name}.zarr/zarr.json" for name in SETS),
    *("report/metrics.json", "report/report.html"),
  ):
    assert (workdir / path).exists(), path
  cost = files.read_json(workdir / "report" / "metrics.json")["cost"]
  # 4 snapshots of each trajectory of both worlds; 3 sets of 16 conditions × 2 members and 16
  # without a condition
  counts = {stage: row["count"] for stage, row in cost.items()}
  assert counts == {
    "data": (128 + 64 + 64 + 32 + 32 + 128 + 32 + 64) * 4,
    "train": 20,
    "samples": 3 * 16 * 2 + 16,
  }
  assert all(
    row["seconds"] > 0 and row["devices"][0].startswith("4 × cpu on ")
    for row in cost.values()
  )
  assert 0 < cost["train"]["median"] < cost["train"]["seconds"]
  assert list((workdir / "train").glob("events.out.tfevents.*"))
  assert not list(workdir.rglob("*.tmp")), "temporary files were left"


def test_it_says_what_it_did_and_prints_the_table(finished):
  workdir, done = finished
  for job, stage in (
    ("generate", "data"),
    ("debias", "debias"),
    ("train", "train"),
    ("sample", "samples"),
  ):
    assert re.search(
      rf"^{job}: wrote {re.escape(str(workdir / stage))}; next: downscaling \w+",
      done.stderr,
      re.M,
    )
  assert (
    f"downscaling pipeline: report: {workdir / 'report' / 'report.html'}" in done.stderr
  )
  assert "Traceback" not in done.stderr
  rows = [line.split() for line in done.stdout.splitlines() if line.strip()]
  names = {row[0].rstrip("†") for row in rows}
  assert {
    "lflr",
    "equivariant",
    "entropic",
    "gaussian",
    *SETS,
    "equivariant+cubic",
  } <= names
  assert "the paper's OT" in done.stdout
  assert (
    done.stdout.count("true data, n=64") == 2
  )  # of both tables of coarse columns that have a floor
  # One table of coarse fields, one of samples, each once.
  assert done.stdout.count("covRMSE") == 2


def test_metrics_follow_the_schema_and_the_samples_keep_their_constraint(finished):
  metrics = json.loads((finished[0] / "report" / "metrics.json").read_text())
  scoring.check_schema(metrics)
  assert metrics["experiment"] == "ks-8x"
  maps = ("equivariant", "entropic", "gaussian")
  assert {"lflr", *maps, *(f"{name} in-sample" for name in maps)} == {
    *metrics["debias"]
  }
  assert metrics["default"] == "equivariant"
  assert {*SETS, "equivariant+cubic"} == {*metrics["samples"]}
  # 64 rows of as many trajectories of the test split, one snapshot each
  assert (metrics["debias"]["lflr"]["n"], metrics["debias"]["lflr"]["blocks"]) == (
    64,
    64,
  )
  for name in SETS[:3]:
    # float32 fields of order one, 24 values a condition; a missing projection gives about 1.
    assert metrics["samples"][name]["constraint_rmse"] < 1e-5
  # Twenty steps teach the prior nothing, but debiasing has all it needs: 256 rows a side bring the
  # spectrum nearer.
  assert (
    metrics["debias"]["equivariant"]["melr_weighted"]
    < metrics["debias"]["lflr"]["melr_weighted"]
  )


def test_samples_open_in_xarray_as_cf(finished):
  """Warnings are errors here, so opening them is a test."""
  for name in SETS:
    with xarray.open_zarr(finished[0] / "samples" / f"{name}.zarr") as data:
      assert data["sample"].dims == ("condition", "member", "x")
      assert data["sample"].shape == (
        (1, 16, 192) if name == "unconditional" else (16, 2, 192)
      )
      assert data["sample"].dtype == np.float32
      assert np.isfinite(data["sample"].values).all()
      np.testing.assert_allclose(
        data["x"].values, np.arange(192) / 3
      )  # length 64: the right end is not a point
      assert {"condition", "member", "x"} <= {*data.coords}
      assert data.attrs["Conventions"].startswith("CF-")
      assert "downscaling sample" in data.attrs["history"]
      assert name in data.attrs["title"]
      assert data.attrs["done_fraction"] == 1.0
      assert data["sample"].attrs["long_name"]
      assert data["member"].attrs["standard_name"] == "realization"
      assert data.attrs["comment"].startswith(
        "Members are independent in time: the prior knows single fields"
      )
      if name != "unconditional":
        coarse = data["condition_field"]
        assert coarse.dims == ("condition", "x_coarse")
        np.testing.assert_allclose(data["x_coarse"].values, np.arange(24) * 64 / 24)
        seen = data["sample"].sel(x=coarse["x_coarse"].values, method="nearest").values
        np.testing.assert_allclose(
          seen, np.broadcast_to(coarse.values[:, None], seen.shape), atol=1e-4
        )


def test_report_stands_alone(finished):
  """One file that needs no network: nothing in it is fetched from anywhere."""
  text = (finished[0] / "report" / "report.html").read_text()
  assert not re.findall(r"""(?:src|href)\s*=\s*["']?\s*(?:https?:)?//[^"'> ]+""", text)
  assert not re.findall(r"@import|url\(\s*['\"]?(?!data:|#)[^)]*\)", text)
  assert text.count("data:image/png;base64,") >= 5
  for name in SETS:
    assert name in text


def test_a_second_run_finds_everything_done_and_changes_nothing(
  finished, command, execute
):
  workdir, first = finished
  before = state(workdir)
  again = execute(command("pipeline", workdir))
  assert again.returncode == 0, again.stderr
  for job, stage in (
    ("generate", "data"),
    ("debias", "debias"),
    ("train", "train"),
    ("sample", "samples"),
  ):
    assert f"{job}: {job} is done already, in {workdir / stage}\n" in again.stderr
  assert again.stdout == first.stdout
  assert state(workdir) == before


def test_one_set_alone_and_others_later(finished, command, execute, tmp_path):
  """A large ensemble pays for itself alone; what is asked for later is added, and what is there
  stays as it is.
  """
  work = tmp_path / "run"
  for stage in ("data", "debias", "train"):
    shutil.copytree(finished[0] / stage, work / stage)
  done = execute(
    command("pipeline", work, **{"sampling.sets": "('default+diffusion',)"})
  )
  assert done.returncode == 0, done.stderr
  assert {p.name for p in (work / "samples").glob("*.zarr")} == {
    "equivariant+diffusion.zarr"
  }
  metrics = files.read_json(work / "report" / "metrics.json")
  assert {*metrics["samples"]} == {"equivariant+diffusion", "equivariant+cubic"}
  alone = state(work / "samples" / "equivariant+diffusion.zarr")
  done = execute(command("pipeline", work))
  assert done.returncode == 0, done.stderr
  assert state(work / "samples" / "equivariant+diffusion.zarr") == alone
  stores = (state(w / "samples" / "raw+diffusion.zarr") for w in (work, finished[0]))
  ours, theirs = (
    {k: sha for k, (_, sha) in store.items() if "/c/" in k} for store in stores
  )  # chunks, no attributes
  assert ours == theirs != {}
  assert {*SETS} < {*files.read_json(work / "report" / "metrics.json")["samples"]}
  done = execute(command("sample", work, **{"sampling.sets": "('ot',)"}))
  assert done.returncode == 1
  assert (
    "config.sampling.sets='ot' is unknown; use one of ['entropic+diffusion'"
    in done.stderr
  )


def test_a_prior_without_its_error_table_gets_it_and_is_not_trained_again(
  finished, command, execute, tmp_path
):
  """As one that was trained before there was such a table: the job makes just that, and the same
  one.
  """
  workdir = tmp_path / "run"
  for stage in ("data", "train"):
    shutil.copytree(finished[0] / stage, workdir / stage)
  table = workdir / "train" / error_table.FILE
  with np.load(table) as stored:
    before = {k: stored[k] for k in stored.files}
  table.unlink()
  trained = state(workdir / "train" / "prior") | state(
    workdir / "train" / "checkpoints"
  )
  done = execute(command("train", workdir))
  assert done.returncode == 0, done.stderr
  assert f"wrote {table}" in done.stderr
  assert "train: " not in done.stderr.replace("downscaling train: ", "")
  assert (
    state(workdir / "train" / "prior") | state(workdir / "train" / "checkpoints")
    == trained
  )
  with np.load(table) as stored:
    for name, value in before.items():
      np.testing.assert_array_equal(stored[name], value)
  assert "train is done already" in execute(command("train", workdir)).stderr


# ---------------------------------------------------------------- stopped, and run again


def interrupt(argv, units, sent=signal.SIGTERM, limit=240):
  """Starts argv, sends the signal as soon as `units()` is not empty, and returns (exit code,
  stderr).
  """
  with subprocess.Popen(
    argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
  ) as process:
    try:
      end = time.monotonic() + limit
      while not units() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
      assert process.poll() is None, (
        f"it ended before it could be stopped: {process.stderr.read()}"
      )
      process.send_signal(sent)
      _, said = process.communicate(timeout=60)  # one unit of work, on a busy machine
    finally:
      if process.poll() is None:
        process.kill()
  return process.returncode, said


def stopped_politely(argv, job, units):
  code, said = interrupt(argv, units)
  assert code == 143, said
  assert said.splitlines()[-1].startswith(f"downscaling {job}: "), said
  assert "stopped" in said.splitlines()[-1]
  assert said.splitlines()[-1].endswith("; run the same command to go on.")
  assert "Traceback" not in said


def goes_on(argv, execute):
  done = execute(argv)
  assert done.returncode == 0, done.stderr
  return done


def trained(workdir, data):
  """The parameters that sampling reads, as a user's own program would."""
  stats = statistics.load(data / "statistics.npz")
  network = prior.network(experiment.load("ks:smoke"), stats)
  marker = files.read_json(workdir / "train" / stage_folder.MARKER)
  return jax.device_get(
    train_loop.load_prior(
      workdir / "train", marker["config_hash"], network, (192,), 1, meshes.make()
    )
  )


def same_tree(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def same_samples(a, b):
  for name in SETS:
    with (
      xarray.open_zarr(a / f"{name}.zarr") as one,
      xarray.open_zarr(b / f"{name}.zarr") as two,
    ):
      for variable in one.variables:
        np.testing.assert_array_equal(
          one[variable].values, two[variable].values, err_msg=f"{name}: {variable}"
        )


def copy(workdir, folder, *stages):
  for stage in stages:
    shutil.copytree(workdir / stage, folder / stage)
  return folder


def test_sigterm_in_the_middle_of_a_pipeline(finished, command, execute, tmp_path):
  """Stopped while sampling: the rest is drawn by the next call, and the report has the same
  numbers.
  """
  workdir, _ = finished
  copy(workdir, tmp_path, "debias", "train")
  argv = command(
    "pipeline", tmp_path, **{"data.dir": workdir / "data"}
  )  # where data lie is no part of what they are
  stopped_politely(
    argv, "pipeline", lambda: list(tmp_path.glob("samples/*.units/c*-m*.json"))
  )
  drawn = {p: p.stat().st_mtime_ns for p in tmp_path.glob("samples/*.units/c*-m*.json")}
  assert 1 <= len(drawn) < 26
  assert not (tmp_path / "report").exists()
  done = goes_on(argv, execute)
  assert all(p.stat().st_mtime_ns == then for p, then in drawn.items()), (
    "finished units were drawn again"
  )
  same_samples(workdir / "samples", tmp_path / "samples")
  one, two = (
    json.loads((w / "report" / "metrics.json").read_text()) for w in (workdir, tmp_path)
  )
  for part in ("debias", "samples", "config_hash"):
    assert one[part] == two[part]
  assert "train: train is done already" in done.stderr


def test_sigterm_while_evaluating(finished, command, execute, tmp_path):
  """It ends at once, and the next call makes the report that an undisturbed one makes."""
  workdir, _ = finished
  copy(workdir, tmp_path, "debias", "train", "samples")
  argv = command("evaluate", tmp_path, **{"data.dir": workdir / "data"})
  code, said = interrupt(argv, lambda: list(tmp_path.glob("report/stage.json")))
  assert code == 143, said
  assert "stopped while evaluating; run the same command to go on." in said
  assert not (tmp_path / "report" / "metrics.json").exists()
  goes_on(argv, execute)
  one, two = (
    json.loads((w / "report" / "metrics.json").read_text()) for w in (workdir, tmp_path)
  )
  for part in ("debias", "samples", "config_hash"):
    assert one[part] == two[part]


def test_kill_9_while_training(finished, command, execute, tmp_path):
  """No chance to save anything: the last whole checkpoint counts, and the steps since are replayed
  with their noise.
  """
  workdir, _ = finished
  argv = command("train", tmp_path, **{"data.dir": workdir / "data"})
  code, _ = interrupt(
    argv, lambda: list(tmp_path.glob("train/checkpoints/[0-9]")), signal.SIGKILL
  )
  assert code == -signal.SIGKILL
  assert not (tmp_path / "train" / "prior").exists()
  done = goes_on(argv, execute)
  assert "train: going on from step " in done.stderr
  same_tree(trained(workdir, workdir / "data"), trained(tmp_path, workdir / "data"))
  one, two = (
    metric_writer.read_scalars(w / "train", "validation/error")
    for w in (workdir, tmp_path)
  )
  assert one == two


@pytest.mark.slow
def test_sigterm_while_training(finished, command, execute, tmp_path):
  workdir, _ = finished
  argv = command("train", tmp_path, **{"data.dir": workdir / "data"})
  stopped_politely(
    argv, "train", lambda: list(tmp_path.glob("train/checkpoints/[0-9]"))
  )
  goes_on(argv, execute)
  same_tree(trained(workdir, workdir / "data"), trained(tmp_path, workdir / "data"))


@pytest.mark.slow
def test_sigterm_while_generating(finished, command, execute, tmp_path):
  workdir, _ = finished
  argv, shards = (
    command("generate", tmp_path),
    lambda: list(tmp_path.rglob("*.array_record-*-of-*")),
  )
  stopped_politely(argv, "generate", shards)
  first = {p: p.stat().st_mtime_ns for p in shards()}
  assert 1 <= len(first) < 28
  refused = execute(command("train", tmp_path))
  assert refused.returncode == 1
  assert "run `downscaling generate` first" in refused.stderr
  goes_on(argv, execute)
  assert all(p.stat().st_mtime_ns == then for p, then in first.items()), (
    "finished shards were made again"
  )
  for which, points in (("hfhr", 192), ("lflr", 24)):
    for split in simulated.SPLITS if which == "hfhr" else simulated.SPLITS[:3]:
      one, two = (
        simulated.load(simulated.make("ks", which, w / "data", (points,)), split)
        for w in (workdir, tmp_path)
      )
      same_tree(one, two)
  one, two = (
    statistics.load(w / "data" / "statistics.npz") for w in (workdir, tmp_path)
  )
  same_tree([one.mean, one.std, one.spectrum], [two.mean, two.std, two.spectrum])


@pytest.mark.slow
def test_sigterm_while_debiasing(finished, command, execute, tmp_path):
  workdir, _ = finished
  argv = command("debias", tmp_path, **{"data.dir": workdir / "data"})
  stopped_politely(
    argv, "debias", lambda: (tmp_path / "debias" / "entropic" / "checkpoints").exists()
  )
  assert not (tmp_path / "debias" / "diagnostics.json").exists()
  goes_on(argv, execute)
  for name in ("entropic", "equivariant"):
    one, two = (
      folder / "debias" / name / "arrays.npz" for folder in (workdir, tmp_path)
    )
    with np.load(one) as one, np.load(two) as two:
      same_tree(dict(one), dict(two))
  for name in ("held_out", "in_sample"):
    one, two = (
      xarray.open_zarr(w / "debias" / f"{name}.zarr", consolidated=False)
      for w in (workdir, tmp_path)
    )
    np.testing.assert_array_equal(one["entropic"].values, two["entropic"].values)


@pytest.mark.slow
def test_kill_9_while_sampling(finished, command, execute, tmp_path):
  """A unit without its marker is drawn again, over whatever its file holds."""
  workdir, _ = finished
  copy(workdir, tmp_path, "debias", "train")
  argv = command("sample", tmp_path, **{"data.dir": workdir / "data"})
  code, _ = interrupt(
    argv, lambda: list(tmp_path.glob("samples/*.units/c*-m*.json")), signal.SIGKILL
  )
  assert code == -signal.SIGKILL
  goes_on(argv, execute)
  same_samples(workdir / "samples", tmp_path / "samples")
