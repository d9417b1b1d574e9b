"""Sinkhorn between two clouds of snapshots by annealed, over-relaxed, resumable steps.

The plan P_ij = exp((f_i + g_j − |x_i − y_j|²)/ε) has the rows' weights, 1/n and 1/m unless given,
for marginals at the fixed point. Iterations run in chunks of `check_every` (see iterations.py),
each started from the last; ε falls one rung of the ladder a chunk. Between chunks the job is asked
whether to stop, and the state is two vectors and a count.
"""

import hashlib
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from downscaling.debias.entropic import entropic_map, sinkhorn_steps, soft_min
from downscaling.fields import symmetry
from downscaling.runtime import checkpoints as checkpoints_lib
from downscaling.runtime import mesh as meshes
from downscaling.runtime import supervision

PATIENCE = 50  # checks at the last ε without 1 % of gain: a stall


class Fit(NamedTuple):
  """A solve's result.

  f [n], g [m]: potentials on the host, units of the squared cost; epsilon: the last one, same
  units; mean_cost: of
  |x_i − y_j|²; history: {"iteration": [...], "epsilon": [...], "error": [...]} by check; threshold:
  as asked;
  converged: the last error is below it at the last rung, and nothing else; path: see iterations.py.
  """

  f: np.ndarray
  g: np.ndarray
  epsilon: float
  mean_cost: float
  history: dict[str, list]
  threshold: float
  converged: bool
  path: str


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
  weights: tuple[np.ndarray | None, np.ndarray | None] = (None, None),
  group: symmetry.Group | None = None,
  path: str = "auto",
  mesh: jax.sharding.Mesh | None = None,
  checkpoints: checkpoints_lib.Checkpoints | None = None,
  save_seconds: float = 30.0,
  stop: Callable[[], bool] = lambda: False,
  agree: Callable[[Any], list] = lambda value: [value],
  progress: Callable[[int, float, float], None] | None = None,
) -> Fit:
  """Entropic optimal transport between two clouds.

  Args:
    source, target: [n, d] and [m, d], float32 (float64 is kept under jax.enable_x64); whole on
      every process.
    epsilon: the last ε as a share of the mean cost.
    anneal: (first ε over last ε, factor from rung to rung); (1, any) goes at once.
    threshold: largest L1 error of either marginal, Σ|P1 − a|, that counts as converged.
    max_iterations: give up here, `converged` false. check_every: iterations a chunk.
    momentum: over-relaxation of the potentials, 1 (none) to < 2 (Thibault et al. 2021,
      arXiv:1711.01851).
    weights: a [n] and b [m] of the rows, > 0, each of sum 1; None: all rows weigh the same. A map
      made of g and the targets needs no more: the potentials hold them.
    group: symmetry of both laws, acting on the d values of a row: the plan is that between all
      rows' orbits.
    path: "dense", "fused", "ring" or "pallas", see iterations.py; "auto" is iterations.choose.
    mesh: n and m are split over all its devices; one device by default.
    checkpoints: saved every save_seconds, when stopped and at the end; resumed from if there are
      any, bit for bit on as many devices and the same path.
    stop: asked between chunks. agree: see Checkpoints. progress: called with (iterations of the
      chunk, ε, error).
  Raises:
    ValueError: clouds that cannot be matched or split, weights that are no distribution, ε too
      small for the dtype, or an error that no longer falls.
    FloatingPointError: the potentials diverged. supervision.Interrupted: `stop` said so; the state
    is saved.
  """
  mesh = mesh or meshes.make(1)
  x, y, weights, mean_cost = _clouds(source, target, weights, epsilon, threshold, group)
  path = path_of(
    path, len(x), len(y), x.shape[1], mesh.size, 1 if group is None else len(group)
  )
  ladder = [epsilon * mean_cost * factor for factor in _factors(*anneal)]
  _check_counts(max_iterations, check_every, momentum)
  run = _Run(
    x, y, weights, ladder, check_every, momentum, group, path, mesh, checkpoints
  )
  saved = time.monotonic()
  while not (verdict := _verdict(run.history, ladder[-1], threshold, max_iterations)):
    if stop():
      run.save(wait=True)
      raise supervision.Interrupted(
        f"debias stopped after {run.last()}; the same command goes on from there."
      )
    rung, error = run.advance()
    if progress is not None:
      progress(check_every, rung, error)
    if agree(time.monotonic() - saved >= save_seconds)[0]:
      run.save()
      saved = time.monotonic()
  run.save(wait=True)
  if verdict == "stalled":
    raise ValueError(
      f"the marginal error no longer falls ({run.last()}), threshold {threshold:g}: raise epsilon "
      f"(now {epsilon:g} of the mean cost) or threshold; rounding in {x.dtype} leaves about "
      f"{_rounding(x, y, ladder[-1]):.1g}."
    )
  f, g = meshes.to_host(mesh)((run.f, run.g))
  return Fit(
    f, g, ladder[-1], mean_cost, run.history, threshold, verdict == "converged", path
  )


class _Run:
  """A solve under way: two potentials and the history of its checks; begins at zero or at the last
  checkpoint.
  """

  def __init__(
    self, x, y, weights, ladder, check_every, momentum, group, path, mesh, checkpoints
  ):
    self.ladder, self.checkpoints = ladder, checkpoints
    self.check_every, self.momentum = check_every, momentum
    self.chunk = sinkhorn_steps.make_chunk(
      iterations=check_every, momentum=momentum, path=path, mesh=mesh
    )
    self.moves = (
      None
      if group is None
      else tuple(
        map(
          jnp.asarray,
          (group.index.astype(np.int32), group.sign.astype(x.dtype)),
        )
      )
    )
    spread = lambda rows: meshes.to_global(
      mesh, rows[meshes.host_rows(mesh, len(rows))], len(rows)
    )
    self.x, self.y, self.costs = spread(x), spread(y), None
    self.a, self.b = map(spread, weights)
    if sinkhorn_steps.keeps_costs(
      path,
      x.shape[1],
      1 if group is None else len(group),
    ):
      self.costs = sinkhorn_steps.make_costs(mesh)(self.x, self.y)
    self.f, self.g = (
      spread(np.zeros(len(x), x.dtype)),
      spread(np.zeros(len(y), y.dtype)),
    )
    self.history: dict[str, list] = {
      "iteration": [],
      "epsilon": [],
      "error": [],
    }
    self.identity = _identity(x, y, weights, ladder, check_every, momentum, group)
    if checkpoints is None:
      return
    if last := checkpoints.restore_last(
      checkpoints_lib.abstract({"f": self.f, "g": self.g}, meshes.rows(mesh))
    ):
      record = checkpoints.record(last[0])
      if record.get("identity") != self.identity:
        raise ValueError(
          f"the checkpoints in {checkpoints.folder} belong to other rows or another ladder of ε "
          "than these: use another --workdir, or the data and config they were made with."
        )
      self.f, self.g = last[1]["f"], last[1]["g"]
      self.history = {key: list(record["history"][key]) for key in self.history}

  def advance(self) -> tuple[float, float]:
    """One chunk at the rung its number says -> (ε, marginal error)."""
    done = len(self.history["error"])
    epsilon = self.ladder[min(done, len(self.ladder) - 1)]
    epsilon_there = jnp.asarray(epsilon, self.x.dtype)
    f, g = self.f, self.g
    if done and (fall := self.ladder[min(done, len(self.ladder)) - 1] - epsilon):
      # Where a plan is spread over all pairs its exponents are log ab at any ε, so f + g − c falls
      # as ε does. Left to the first iteration, that factor takes the scalings of `dense` out of
      # their range when rows are many.
      f, g = f - fall * jnp.log(self.a), g - fall * jnp.log(self.b)
    f, g, error = self.chunk(
      self.x, self.y, self.a, self.b, f, g, epsilon_there, self.moves, self.costs
    )
    if not math.isfinite(error := float(error)):
      raise FloatingPointError(
        f"the potentials diverged after {self.last()}, at ε = {epsilon:.3g}: set momentum=1 (it is "
        f"{self.momentum:g}), or anneal from higher (the first ε is "
        f"{self.ladder[0] / self.ladder[-1]:g} times the last)."
      )
    self.f, self.g = f, g
    for key, value in (
      ("iteration", (done + 1) * self.check_every),
      ("epsilon", epsilon),
      ("error", error),
    ):
      self.history[key].append(value)
    return epsilon, error

  def save(self, wait: bool = False) -> None:
    if self.checkpoints is None or not self.history["iteration"]:
      return
    state = {"f": self.f, "g": self.g}
    self.checkpoints.save(
      self.history["iteration"][-1], state, history=self.history, identity=self.identity
    )
    if wait:
      self.checkpoints.wait()

  def last(self) -> str:
    return last_check(self.history)


def path_of(
  path: str,
  n: int,
  m: int,
  d: int,
  devices: int,
  elements: int = 1,
) -> str:
  """The path to take, for clouds of n and m rows of d values in equal parts on the devices."""
  if path not in ("auto", *sinkhorn_steps.PATHS):
    raise ValueError(
      f"config.debias.path={path!r} is unknown; use one of {['auto', *sinkhorn_steps.PATHS]}."
    )
  for count, which in ((n, "a source"), (m, "a target")):
    meshes.check_divides(count, devices, f"{which} cloud", "debias.points")
  return sinkhorn_steps.choose(n, m, d, devices, elements) if path == "auto" else path


def _clouds(source, target, weights, epsilon, threshold, group):
  """Both clouds centred, on the host, their weights (a, b), and the mean cost; the door."""
  source, target = np.asarray(source), np.asarray(target)
  if source.ndim != 2 or target.ndim != 2 or source.shape[1] != target.shape[1]:
    raise ValueError(
      f"source {source.shape} and target {target.shape} came, need [n, d] and [m, d] of one d: "
      "both on the coarse grid."
    )
  if min(len(source), len(target)) < 2:
    raise ValueError(
      f"{len(source)} source and {len(target)} target rows came, a fit needs at least 2 of each."
    )
  if group is not None and group.index.shape[1] != source.shape[1]:
    raise ValueError(
      f"the group acts on {group.index.shape[1]} values, rows have {source.shape[1]}: use the "
      "group of this grid (one channel only), or --config.debias.symmetric=False."
    )
  for name, rows in (("source rows", source), ("target rows", target)):
    entropic_map.check_finite(rows, name)
    if (rows == rows[0]).all():
      raise ValueError(
        f"all {len(rows)} {name} are the same: a constant cloud has no distribution to match."
      )
  if not (math.isfinite(epsilon) and epsilon > 0) or not threshold > 0:
    raise ValueError(
      f"epsilon={epsilon}, threshold={threshold}: both must be > 0 (epsilon: share of the mean "
      "cost)."
    )
  dtype = jax.dtypes.canonicalize_dtype(np.result_type(source, target, np.float32))
  source, target = source.astype(dtype), target.astype(dtype)
  a, b = (
    _weights(w, len(c), name)
    for w, c, name in zip(
      weights,
      (source, target),
      ("source", "target"),
      strict=True,
    )
  )
  x, y = (cloud - soft_min.centre(target, group) for cloud in (source, target))
  squares = sum(
    np.einsum(
      "i,ij,ij->",
      w,
      c,
      c,
      dtype=np.float64,
    )
    for w, c in ((a, x), (b, y))
  )
  means = (soft_min.centre(c, group, w).astype(np.float64) for w, c in ((a, x), (b, y)))
  mean_cost = float(squares - 2 * np.dot(*means))
  rounding = _rounding(x, y, epsilon * mean_cost)
  if rounding > threshold:
    raise ValueError(
      f"epsilon={epsilon:g} of the mean cost is too small for {dtype}: rounding alone leaves a "
      f"marginal error of {rounding:.1g}, threshold {threshold:g}. Use epsilon >= "
      f"{1.1 * epsilon * rounding / threshold:.1e}, or a larger threshold."
    )
  return x, y, (a.astype(dtype), b.astype(dtype)), mean_cost


def _weights(weights, count: int, name: str) -> np.ndarray:
  """Weights of a cloud's rows, [count] float64 of sum 1."""
  if weights is None:
    return np.full(count, 1 / count)
  weights = np.asarray(weights, np.float64)
  if weights.shape != (count,):
    raise ValueError(
      f"{name} weights are {weights.shape}, need [{count}]: one for each row."
    )
  if len(bad := weights[~(np.isfinite(weights) & (weights > 0))]):
    raise ValueError(
      f"{name} weights hold {bad[0]:g}: need > 0 and finite. Leave rows of no weight out."
    )
  # float32 weights, normalised in float32, sum to 1 within this.
  if abs(weights.sum() - 1) > 1e-5:
    raise ValueError(
      f"{name} weights sum to {weights.sum():.6g}, a plan needs 1: divide them by their sum."
    )
  return weights / weights.sum()


def _rounding(x, y, epsilon: float) -> float:
  """Marginal error that rounding leaves: half an ulp of (|x|² + |y|²)/ε.

  Measured .46–.53, ε 1e-2 … 3e-5, d 24.
  """
  squares = sum(
    float(np.einsum("ij,ij->", c, c, dtype=np.float64)) / len(c)
    for c in map(np.asarray, (x, y))
  )
  return float(jnp.finfo(x.dtype).eps) / 4 * squares / epsilon


def _factors(start: float, decay: float) -> list[float]:
  """start, start·decay, ..., 1."""
  if not start >= 1 or not 0 < decay < 1:
    raise ValueError(
      f"anneal=({start}, {decay}): need a start >= 1 (times the last ε) and 0 < decay < 1."
    )
  factors = []
  while start > 1:
    factors.append(start)
    start *= decay
  return [*factors, 1.0]


def _check_counts(max_iterations, check_every, momentum) -> None:
  if max_iterations < 1 or check_every < 1:
    raise ValueError(
      f"max_iterations={max_iterations}, check_every={check_every}: both must be at least 1."
    )
  if not 1 <= momentum < 2:
    raise ValueError(
      f"momentum={momentum}: over-relaxation needs 1 <= momentum < 2; 1.5 is the measured choice."
    )


def _identity(x, y, weights, ladder, check_every, momentum, group) -> str:
  """SHA-256 of all that decides the iterates."""
  digest = hashlib.sha256(
    repr((x.shape, y.shape, ladder, check_every, momentum)).encode()
  )
  for part in (x, y, *weights, *(group or ())):
    digest.update(np.asarray(part).tobytes())
  return digest.hexdigest()


def _verdict(history, last_epsilon, threshold, max_iterations) -> str:
  """ "converged", "stalled", "spent", or "" to go on."""
  errors = [
    e
    for e, eps in zip(history["error"], history["epsilon"], strict=True)
    if eps == last_epsilon
  ]
  if errors and errors[-1] < threshold:
    return "converged"
  if len(errors) > PATIENCE and min(errors[-PATIENCE:]) > 0.99 * min(
    errors[:-PATIENCE]
  ):
    return "stalled"
  return (
    "spent"
    if history["iteration"] and history["iteration"][-1] >= max_iterations
    else ""
  )


def last_check(history) -> str:
  if not history["iteration"]:
    return "0 iterations"
  iteration, epsilon, error = (
    history[key][-1] for key in ("iteration", "epsilon", "error")
  )
  return f"{iteration} iterations, marginal error {error:.2g} at ε = {epsilon:.3g}"
