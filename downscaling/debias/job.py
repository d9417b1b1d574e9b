"""The `debias` job: the fit, the map as data, held-out rows carried over, and what the plan looks like."""

import math
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from downscaling.common import checkpoints as checkpoints_lib
from downscaling.common import mesh as meshes
from downscaling.common import runs
from downscaling.debias import sinkhorn, transport

IN_SAMPLE_ROWS = 4096
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def debias(
  folder: pathlib.Path,
  config_hash: str,
  source: np.ndarray,
  target: np.ndarray,
  held_out: np.ndarray,
  *,
  space: tuple[int, ...],
  evaluators: Mapping[str, Callable[[np.ndarray, np.ndarray], Mapping[str, float]]] | None = None,
  agree: Callable[[Any], list] = lambda value: [value],
  **options,
) -> dict:
  """Fits (or goes on fitting) the map from `source` to `target`, saves it, maps held-out rows, writes diagnostics.

  Args:
    folder: the stage's folder. Written there: checkpoints/, map/, held_out.zarr and in_sample.zarr (variables lflr and
      ot, dims row and space), and last diagnostics.json.
    config_hash: of the blocks this stage depends on.
    source, target, held_out: [S, *space, C] float32; held-out rows are biased rows that the fit does not see.
    evaluators: name -> function of (rows, mapped rows) -> metrics. agree, options: see `fit`.
  Returns: the diagnostics. Raises: as `fit`, and ValueError for arrays that are not on `space`.
  """
  began, folder = time.monotonic(), pathlib.Path(folder)
  for name, rows in (("source", source), ("target", target), ("held_out", held_out)):
    if rows.ndim != len(space) + 2 or rows.shape[1:-1] != tuple(space) or rows.shape[1:] != source.shape[1:]:
      raise ValueError(f"{name} is {rows.shape}, need [rows, {', '.join(map(str, space))}, channels] as source has.")
  transport.check_finite(held_out, "held-out rows")
  x, y = (np.asarray(a, np.float32).reshape(len(a), -1) for a in (source, target))
  saver = checkpoints_lib.Checkpoints(folder / "checkpoints", config_hash, agree=agree)
  try:
    with runs.Progress("debias", total=options.get("max_iterations", 2000), unit="iterations at most") as bar:
      advance = lambda count, eps, error: bar.advance(count, error=error, epsilon=eps)
      result = sinkhorn.fit(x, y, checkpoints=saver, agree=agree, progress=advance, **options)
  finally:
    saver.close()
  fitted = time.monotonic()
  if not result.converged:
    runs.say(
      f"debias: not converged after {sinkhorn.last_check(result.history)}; wanted {result.threshold:g} at ε = "
      f"{result.epsilon:.3g}: raise --config.debias.max_iterations or epsilon."
    )
  if meshes.is_main():
    fitted_map = transport.EntropicMap(y, result.g, result.epsilon, source.shape[1:], options.get("group"))
    fitted_map.save(folder / "map")
    some = np.linspace(0, len(source) - 1, min(len(source), IN_SAMPLE_ROWS)).astype(int)
    report = _plan(result, fitted_map, source) | {
      "sizes": {"source": len(source), "target": len(target), "held_out": len(held_out), "dimensions": x.shape[1]},
      "in_sample": _mapped_rows(folder / "in_sample.zarr", fitted_map, source[some], some, evaluators or {}),
      "held_out": _mapped_rows(folder / "held_out.zarr", fitted_map, held_out, None, evaluators or {}),
      "seconds": {"fit": fitted - began, "all": time.monotonic() - began},
    }
    runs.write_json(folder / "diagnostics.json", report)
  agree("written")
  return runs.read_json(folder / "diagnostics.json")


def _plan(result: sinkhorn.Fit, fitted_map: transport.EntropicMap, source: np.ndarray) -> dict:
  """What the plan looks like; Σ P log P = −entropy and ⟨P, C⟩ = ⟨f⟩ + ⟨g⟩ + ε·entropy, with marginals as converged."""
  effective = np.asarray(fitted_map.effective_targets(source), np.float64)
  entropy = math.log(len(source)) + float(np.log(effective).mean())
  duals = sum(float(np.asarray(p).mean(dtype=np.float64)) for p in (result.f, result.g))
  return {
    "converged": result.converged,
    "threshold": result.threshold,
    "path": result.path,
    "history": result.history,
    "epsilon": result.epsilon,
    "epsilon_relative": result.epsilon / result.mean_cost,
    "mean_cost": result.mean_cost,
    "transport_cost": duals + result.epsilon * entropy,
    "plan_entropy": entropy,
    "effective_targets": {f"{q:g}": float(np.quantile(effective, q)) for q in QUANTILES},
  }


def _mapped_rows(path: pathlib.Path, fitted_map, rows: np.ndarray, ids: np.ndarray | None, evaluators) -> dict:
  """Maps rows, stores both beside each other, and returns the metrics of this set."""
  import xarray

  mapped = fitted_map(rows)
  single = rows.shape[-1] == 1
  dims = ("row", *("y", "x")[4 - rows.ndim :], *(() if single else ("channel",)))
  fields = {"lflr": rows[..., 0] if single else rows, "ot": mapped[..., 0] if single else mapped}
  coords = {} if ids is None else {"row": ids}
  data = xarray.Dataset({k: (dims, np.asarray(v, np.float32)) for k, v in fields.items()}, coords)
  data["lflr"].attrs["long_name"], data["ot"].attrs["long_name"] = "biased coarse field", "debiased coarse field"
  chunks = {k: {"chunks": (min(1024, len(rows)), *v.shape[1:])} for k, v in fields.items()}
  data.to_zarr(path, mode="w", zarr_format=3, consolidated=False, encoding=chunks)
  metrics = {name: dict(evaluate(rows, mapped)) for name, evaluate in evaluators.items()}
  return {"rows": len(rows)} | metrics
