"""Training told to the real MLflow and to the real Weights & Biases, offline."""

import json
import os
import subprocess
import sys

import pytest

from downscaling.runtime import metric_writer

pytestmark = [pytest.mark.services, pytest.mark.slow]


@pytest.fixture(scope="module")
def data(command, execute, tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  assert execute(command("generate", folder)).returncode == 0
  return {"data.dir": folder / "data"}


def train(command, workdir, data, tools, package, **env):
  """Eight steps, then the rest: a run that was stopped goes on in the tracker."""
  (site,) = (tools.parent / "lib").glob("*/site-packages")
  env = os.environ | {"PYTHONPATH": str(site), "HOME": str(workdir.parent)} | env
  for steps in (8, 20):
    argv = command(
      "train", workdir, f"--tracker={package}", **data, **{"train.total_steps": 20}
    )
    code = "import sys; from downscaling import main; main.run()"
    if steps == 8:  # ends as by a signal after step 8
      code = (
        "import os, signal, sys\n"
        "from downscaling.diffusion import train_loop\n"
        "log = train_loop.Watch.log\n"
        "def ask(self, step, *rest):\n"
        "  log(self, step, *rest)\n"
        "  if step == 8: os.kill(os.getpid(), signal.SIGTERM)\n"
        "train_loop.Watch.log = ask\n" + code
      )
    argv = [sys.executable, "-c", code, *argv[3:]]
    done = subprocess.run(
      argv, capture_output=True, text=True, timeout=600, env=env, check=False
    )
    assert done.returncode == (143 if steps == 8 else 0), done.stderr
  return dict(zip(*metric_writer.read_scalars(workdir / "train", "loss"), strict=True))


def test_mlflow(command, data, tools, tmp_path):
  bin_ = tools("mlflow-skinny==3.*")
  where = f"file://{tmp_path}/mlruns"
  env = {"MLFLOW_TRACKING_URI": where, "MLFLOW_ALLOW_FILE_STORE": "true"}
  losses = train(command, tmp_path / "run", data, bin_, "mlflow", **env)
  (run,) = [p.parent for p in (tmp_path / "mlruns").glob("*/*/metrics")]
  said = [line.split() for line in (run / "metrics" / "loss").read_text().splitlines()]
  assert {int(step): float(value) for _, value, step in said} == pytest.approx(losses)
  assert (
    json.loads((run / "artifacts" / "config.json").read_text())["train"]["total_steps"]
    == 20
  )
  assert (run / "metrics" / "speed" / "steps_per_second").exists()


def test_wandb(command, data, tools, tmp_path):
  bin_ = tools("wandb")
  env = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
  losses = train(command, tmp_path / "run", data, bin_, "wandb", **env)
  runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
  assert len(runs) == 2  # two parts of one run
  assert len({path.name.rpartition("-")[2] for path in runs}) == 1
  whole = b"".join(path.read_bytes() for run in runs for path in run.glob("*.wandb"))
  assert b"steps_per_second" in whole
  assert len(losses) > 2
