"""Experiment trackers, beside TensorBoard and CSV: Weights & Biases, and MLflow.

Neither is installed with the package. A run that goes on after a stop goes on in the tracker too.
"""

import hashlib
import importlib.util
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

KINDS = ("none", "wandb", "mlflow")
PROJECT = "downscaling"


class Tracker(Protocol):
  """What a metric writer tells."""

  def log(self, step: int, scalars: Mapping[str, float]) -> None: ...
  def close(self) -> None: ...


class _Wandb:
  def __init__(self, name: str, key: str, config: Mapping[str, Any]):
    import wandb  # pyright: ignore[reportMissingImports]

    self._run = wandb.init(
      project=PROJECT, name=name, id=key, resume="allow", config=dict(config)
    )

  def log(self, step: int, scalars: Mapping[str, float]) -> None:
    self._run.log(dict(scalars), step=step)

  def close(self) -> None:
    self._run.finish()


class _Mlflow:
  def __init__(self, name: str, key: str, config: Mapping[str, Any]):
    import mlflow  # pyright: ignore[reportMissingImports]

    self._mlflow = mlflow
    mlflow.set_experiment(PROJECT)
    asked = f"tags.`downscaling.key` = '{key}'"
    found = mlflow.search_runs(filter_string=asked, output_format="list")
    known = found[0].info.run_id if found else None
    mlflow.start_run(run_id=known, run_name=name, tags={"downscaling.key": key})
    if not found:
      mlflow.log_dict(dict(config), "config.json")

  def log(self, step: int, scalars: Mapping[str, float]) -> None:
    self._mlflow.log_metrics(dict(scalars), step=step)

  def close(self) -> None:
    self._mlflow.end_run()


def missing(kind: str) -> str:
  """What to install for a tracker, in words; "" if nothing."""
  if kind == "none" or importlib.util.find_spec(kind):
    return ""
  return (
    f"--tracker={kind} needs its package: pip install {kind}, or leave the flag out."
  )


def make(
  kind: str,
  folder: pathlib.Path,
  config: Mapping[str, Any],
) -> Tracker | None:
  """The tracker of a stage's folder; None for "none". Only the main process may make one.

  Raises: ValueError, with what the tracker says, if it cannot be reached.
  """
  if kind == "none":
    return None
  name = f"{folder.parent.name}/{folder.name}"
  key = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
  try:
    return (_Wandb if kind == "wandb" else _Mlflow)(name, key, config)
  except Exception as error:  # each has its own kinds
    said = (str(error).splitlines() or [""])[0][:300]
    raise ValueError(
      f"--tracker={kind} does not answer ({type(error).__name__}: {said}): look at its variables, "
      "or leave the flag out."
    ) from error
