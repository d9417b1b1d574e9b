"""Sinkhorn between two clouds of snapshots by annealed, over-relaxed, resumable steps; and the `debias` job around it.

The plan P_ij = exp((f_i + g_j − |x_i − y_j|²)/ε) has uniform marginals at the fixed point. ott's solver runs in chunks
of `check_every` iterations, each started from the last; ε falls one rung of the ladder a chunk. Between chunks the job
is asked whether to stop, and the state is two vectors and a count.
"""

import functools
import hashlib
import math
import pathlib
import time
import warnings
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

with warnings.catch_warnings():
  warnings.simplefilter("ignore", DeprecationWarning)  # ott imports jaxopt, which says that it is no longer maintained
  from ott.problems.linear import linear_problem
  from ott.solvers.linear import acceleration, sinkhorn

from downscaling.common import checkpoints as checkpoints_lib
from downscaling.common import runs
from downscaling.debias import geometry, transport

IN_SAMPLE_ROWS = 4096
PATIENCE = 50  # checks at the last ε without 1 % of gain: a stall
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


class Fit(NamedTuple):
  """A solve's result.

  f [n], g [m]: potentials, units of the squared cost; epsilon: the last one, same units; mean_cost: of |x_i − y_j|²;
  history: {"iteration": [...], "epsilon": [...], "error": [...]} by check; converged: the last error is below the
  threshold at the last rung, and nothing else.
  """

  f: jax.Array
  g: jax.Array
  epsilon: float
  mean_cost: float
  history: dict[str, list]
  converged: bool


def fit(
  source: np.ndarray,
  target: np.ndarray,
  *,
  epsilon: float,
  anneal: tuple[float, float] = (64.0, 0.5),
  threshold: float = 1e-3,
  max_iterations: int = 2000,
  check_every: int = 10,
  momentum: float = 1.5,
  checkpoints: checkpoints_lib.Checkpoints | None = None,
  save_seconds: float = 30.0,
  stop: Callable[[], bool] = lambda: False,
  progress: Callable[[int, float, float], None] | None = None,
  tile: tuple[int, int] = geometry.TILE,
) -> Fit:
  """Entropic optimal transport between two uniform clouds.

  Args:
    source, target: [n, d] and [m, d], float32 (float64 is kept under jax.enable_x64).
    epsilon: the last ε as a share of the mean cost.
    anneal: (first ε over last ε, factor from rung to rung); (1, any) goes at once.
    threshold: largest L1 error of either marginal, Σ|P1 − 1/n|, that counts as converged.
    max_iterations: give up here, `converged` false. check_every: iterations a chunk.
    momentum: over-relaxation of the potentials, 1 (none) to < 2 (Thibault et al. 2021, arXiv:1711.01851).
    checkpoints: saved every save_seconds, when stopped and at the end; resumed from if there are any, bit for bit.
    stop: asked between chunks. progress: called with (iterations of the chunk, ε, error).
    tile: see geometry.Blockwise.
  Raises:
    ValueError: clouds that cannot be matched, ε too small for the dtype, or an error that no longer falls.
    FloatingPointError: the potentials diverged. runs.Interrupted: `stop` said so; the state is saved.
  """
  x, y, mean_cost = _clouds(source, target, epsilon, threshold)
  ladder = [epsilon * mean_cost * factor for factor in _factors(*anneal)]
  _check_counts(max_iterations, check_every, momentum)
  run = _Run(x, y, ladder, check_every, momentum, tile, checkpoints)
  saved = time.monotonic()
  while not (verdict := _verdict(run.history, ladder[-1], threshold, max_iterations)):
    if stop():
      run.save(wait=True)
      raise runs.Interrupted(f"debias stopped after {run.last()}; the same command goes on from there.")
    rung, error = run.advance()
    if progress is not None:
      progress(check_every, rung, error)
    if time.monotonic() - saved >= save_seconds:
      run.save()
      saved = time.monotonic()
  run.save(wait=True)
  if verdict == "stalled":
    raise ValueError(
      f"the marginal error no longer falls ({run.last()}), threshold {threshold:g}: raise epsilon (now {epsilon:g} of "
      f"the mean cost) or threshold; rounding in {x.dtype} leaves about {_rounding(x, y, ladder[-1]):.1g}."
    )
  return Fit(run.f, run.g, ladder[-1], mean_cost, run.history, verdict == "converged")


class _Run:
  """A solve under way: two potentials and the history of its checks; begins at zero or at the last checkpoint."""

  def __init__(self, x, y, ladder, check_every, momentum, tile, checkpoints):
    self.x, self.y, self.ladder, self.check_every, self.momentum, self.tile = x, y, ladder, check_every, momentum, tile
    self.checkpoints = checkpoints
    self.f, self.g = jnp.zeros(len(x), x.dtype), jnp.zeros(len(y), y.dtype)
    self.history: dict[str, list] = {"iteration": [], "epsilon": [], "error": []}
    self.identity = _identity(x, y, ladder, check_every, momentum)
    if checkpoints is None:
      return
    if last := checkpoints.restore_last(checkpoints_lib.abstract({"f": self.f, "g": self.g})):
      record = checkpoints.record(last[0])
      if record.get("identity") != self.identity:
        raise ValueError(
          f"the checkpoints in {checkpoints.folder} belong to other rows or another ladder of ε than these: use "
          "another --workdir, or the data and config they were made with."
        )
      self.f, self.g = last[1]["f"], last[1]["g"]
      self.history = {key: list(record["history"][key]) for key in self.history}

  def advance(self) -> tuple[float, float]:
    """One chunk at the rung its number says -> (ε, marginal error)."""
    done = len(self.history["error"])
    epsilon = self.ladder[min(done, len(self.ladder) - 1)]
    cloud = geometry.Blockwise(self.x, self.y, jnp.asarray(epsilon, self.x.dtype), self.tile)
    f, g, error = _chunk(cloud, self.f, self.g, self.check_every, self.momentum)
    if not math.isfinite(error := float(error)):
      raise FloatingPointError(
        f"the potentials diverged after {self.last()}, at ε = {epsilon:.3g}: set momentum=1 (it is {self.momentum:g}), "
        f"or anneal from higher (the first ε is {self.ladder[0] / self.ladder[-1]:g} times the last)."
      )
    self.f, self.g = f, g
    for key, value in (("iteration", (done + 1) * self.check_every), ("epsilon", epsilon), ("error", error)):
      self.history[key].append(value)
    return epsilon, error

  def save(self, wait: bool = False) -> None:
    if self.checkpoints is None or not self.history["iteration"]:
      return
    state = {"f": self.f, "g": self.g}
    self.checkpoints.save(self.history["iteration"][-1], state, history=self.history, identity=self.identity)
    if wait:
      self.checkpoints.wait()

  def last(self) -> str:
    return _last(self.history)


@functools.partial(jax.jit, static_argnames=("iterations", "momentum"))
def _chunk(cloud: geometry.Blockwise, f, g, iterations: int, momentum: float):
  """`iterations` steps of ott's solver at one ε -> (f, g, the larger L1 error of the two marginals)."""
  problem = linear_problem.LinearProblem(cloud)
  solver = sinkhorn.Sinkhorn(
    threshold=0.0,
    inner_iterations=iterations,
    min_iterations=iterations,
    max_iterations=iterations,
    momentum=acceleration.Momentum(value=momentum),
    recenter_potentials=True,  # else f and −g drift together and lose digits
  )
  with jax.numpy_rank_promotion("allow"):  # ott's own, whatever the caller forbids
    out = solver(problem, (f, g))
  f, g = out.potentials
  rows = cloud.marginal_from_potentials(f, g, axis=1)  # ott measures the columns; over-relaxed, the rows err too
  return f, g, jnp.maximum(out.errors[-1], jnp.abs(rows - problem.a).sum())


def _clouds(source, target, epsilon, threshold) -> tuple[jax.Array, jax.Array, float]:
  """Both clouds centred, on the device, and the mean cost; the door."""
  source, target = np.asarray(source), np.asarray(target)
  if source.ndim != 2 or target.ndim != 2 or source.shape[1] != target.shape[1]:
    raise ValueError(
      f"source {source.shape} and target {target.shape} came, need [n, d] and [m, d] of one d: both on the coarse grid."
    )
  if min(len(source), len(target)) < 2:
    raise ValueError(f"{len(source)} source and {len(target)} target rows came, a fit needs at least 2 of each.")
  for name, rows in (("source rows", source), ("target rows", target)):
    transport.check_finite(rows, name)
    if (rows == rows[0]).all():
      raise ValueError(f"all {len(rows)} {name} are the same: a constant cloud has no distribution to match.")
  if not (math.isfinite(epsilon) and epsilon > 0) or not threshold > 0:
    raise ValueError(f"epsilon={epsilon}, threshold={threshold}: both must be > 0 (epsilon: share of the mean cost).")
  dtype = jax.dtypes.canonicalize_dtype(np.result_type(source, target, np.float32))
  source, target = source.astype(dtype), target.astype(dtype)
  x, y = (cloud - geometry.centre(target) for cloud in (source, target))
  squares = sum(np.einsum("ij,ij->", c, c, dtype=np.float64) / len(c) for c in (x, y))
  mean_cost = float(squares - 2 * x.mean(0, dtype=np.float64) @ y.mean(0, dtype=np.float64))
  if (rounding := _rounding(x, y, epsilon * mean_cost)) > threshold:
    raise ValueError(
      f"epsilon={epsilon:g} of the mean cost is too small for {dtype}: rounding alone leaves a marginal error of "
      f"{rounding:.1g}, threshold {threshold:g}. Use epsilon >= {1.1 * epsilon * rounding / threshold:.1e}, "
      "or a larger threshold."
    )
  return jnp.asarray(x), jnp.asarray(y), mean_cost


def _rounding(x, y, epsilon: float) -> float:
  """Marginal error that rounding leaves: half an ulp of (|x|² + |y|²)/ε. Measured .46–.53, ε 1e-2 … 3e-5, d 24."""
  squares = sum(float(np.einsum("ij,ij->", c, c, dtype=np.float64)) / len(c) for c in map(np.asarray, (x, y)))
  return float(jnp.finfo(x.dtype).eps) / 4 * squares / epsilon


def _factors(start: float, decay: float) -> list[float]:
  """start, start·decay, ..., 1."""
  if not start >= 1 or not 0 < decay < 1:
    raise ValueError(f"anneal=({start}, {decay}): need a start >= 1 (times the last ε) and 0 < decay < 1.")
  factors = []
  while start > 1:
    factors.append(start)
    start *= decay
  return [*factors, 1.0]


def _check_counts(max_iterations, check_every, momentum) -> None:
  if max_iterations < 1 or check_every < 1:
    raise ValueError(f"max_iterations={max_iterations}, check_every={check_every}: both must be at least 1.")
  if not 1 <= momentum < 2:
    raise ValueError(f"momentum={momentum}: over-relaxation needs 1 <= momentum < 2; 1.5 is the measured choice.")


def _identity(x, y, ladder, check_every, momentum) -> str:
  """SHA-256 of all that decides the iterates."""
  digest = hashlib.sha256(repr((x.shape, y.shape, ladder, check_every, momentum)).encode())
  for cloud in (x, y):
    digest.update(np.asarray(cloud).tobytes())
  return digest.hexdigest()


def _verdict(history, last_epsilon, threshold, max_iterations) -> str:
  """ "converged", "stalled", "spent", or "" to go on."""
  errors = [e for e, eps in zip(history["error"], history["epsilon"], strict=True) if eps == last_epsilon]
  if errors and errors[-1] < threshold:
    return "converged"
  if len(errors) > PATIENCE and min(errors[-PATIENCE:]) > 0.99 * min(errors[:-PATIENCE]):
    return "stalled"
  return "spent" if history["iteration"] and history["iteration"][-1] >= max_iterations else ""


def _last(history) -> str:
  if not history["iteration"]:
    return "0 iterations"
  iteration, epsilon, error = (history[key][-1] for key in ("iteration", "epsilon", "error"))
  return f"{iteration} iterations, marginal error {error:.2g} at ε = {epsilon:.3g}"


# ---------------------------------------------------------------- the job


def debias(
  folder: pathlib.Path,
  config_hash: str,
  source: np.ndarray,
  target: np.ndarray,
  held_out: np.ndarray,
  *,
  space: tuple[int, ...],
  epsilon: float,
  anneal: tuple[float, float] = (64.0, 0.5),
  threshold: float = 1e-3,
  max_iterations: int = 2000,
  check_every: int = 10,
  momentum: float = 1.5,
  evaluators: Mapping[str, Callable[[np.ndarray, np.ndarray], Mapping[str, float]]] | None = None,
  stop: Callable[[], bool] = lambda: False,
) -> dict:
  """Fits (or goes on fitting) the map from `source` to `target`, saves it, maps held-out rows, writes diagnostics.

  Args:
    folder: the stage's folder. Written there: checkpoints/, map/, held_out.zarr and in_sample.zarr (variables lflr and
      ot, dims row and space), and last diagnostics.json.
    config_hash: of the blocks this stage depends on.
    source, target, held_out: [S, *space, C] float32; held-out rows are biased rows that the fit does not see.
    epsilon ... momentum: see `fit`. evaluators: name -> function of (rows, mapped rows) -> metrics. stop: see `fit`.
  Returns: the diagnostics. Raises: as `fit`, and ValueError for arrays that are not on `space`.
  """
  began, folder = time.monotonic(), pathlib.Path(folder)
  for name, rows in (("source", source), ("target", target), ("held_out", held_out)):
    if rows.ndim != len(space) + 2 or rows.shape[1:-1] != tuple(space) or rows.shape[1:] != source.shape[1:]:
      raise ValueError(f"{name} is {rows.shape}, need [rows, {', '.join(map(str, space))}, channels] as source has.")
  transport.check_finite(held_out, "held-out rows")
  x, y = (np.asarray(a, np.float32).reshape(len(a), -1) for a in (source, target))
  saver = checkpoints_lib.Checkpoints(folder / "checkpoints", config_hash)
  try:
    with runs.Progress("debias", total=max_iterations, unit="iterations at most") as bar:
      advance = lambda count, eps, error: bar.advance(count, error=error, epsilon=eps)
      result = fit(
        x, y, epsilon=epsilon, anneal=anneal, threshold=threshold, max_iterations=max_iterations,
        check_every=check_every, momentum=momentum, checkpoints=saver, stop=stop, progress=advance,
      )  # fmt: skip
  finally:
    saver.close()
  fitted = time.monotonic()
  if not result.converged:
    runs.say(
      f"debias: not converged after {_last(result.history)}; wanted {threshold:g} at ε = {result.epsilon:.3g}: raise "
      f"max_iterations (now {max_iterations}) or epsilon."
    )
  fitted_map = transport.EntropicMap(y, np.asarray(result.g), result.epsilon, source.shape[1:])
  fitted_map.save(folder / "map")
  some = np.linspace(0, len(source) - 1, min(len(source), IN_SAMPLE_ROWS)).astype(int)
  report = _plan(result, fitted_map, source, threshold) | {
    "sizes": {"source": len(source), "target": len(target), "held_out": len(held_out), "dimensions": x.shape[1]},
    "in_sample": _mapped_rows(folder / "in_sample.zarr", fitted_map, source[some], some, evaluators or {}),
    "held_out": _mapped_rows(folder / "held_out.zarr", fitted_map, held_out, None, evaluators or {}),
    "seconds": {"fit": fitted - began, "all": time.monotonic() - began},
  }
  runs.write_json(folder / "diagnostics.json", report)
  return report


def _plan(result: Fit, fitted_map: transport.EntropicMap, source: np.ndarray, threshold: float) -> dict:
  """What the plan looks like; Σ P log P = −entropy and ⟨P, C⟩ = ⟨f⟩ + ⟨g⟩ + ε·entropy, with marginals as converged."""
  effective = np.asarray(fitted_map.effective_targets(source), np.float64)
  entropy = math.log(len(source)) + float(np.log(effective).mean())
  duals = sum(float(np.asarray(p).mean(dtype=np.float64)) for p in (result.f, result.g))
  return {
    "converged": result.converged,
    "threshold": threshold,
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
