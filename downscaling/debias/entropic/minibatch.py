"""Entropic transport from a stream of source rows to a fixed target cloud: semi-discrete, so n has
no limit.

The target's potential g maximises the semi-dual (Genevay et al. 2016, arXiv:1605.08527, eq. S_ε)

    H(g) = mean_j g_j − ε E_x log (1/m) Σ_j exp((g_j − |x − y_j|²)/ε),   ∂H/∂g_j = (1 − p_j)/m,

where p_j = m E_x w_j(x), 1 at the optimum, is estimated from a batch. Two rules, with a rate η that
falls:

    online  g_j ← g_j − ε log(1 + η (p_j − 1)), which is (1 − η) g + η g_batch of exp(−g/ε): online
            Sinkhorn (Mensch & Peyré 2020, arXiv:2003.01415, algorithm 1), written with the one
            potential that a map needs;
    sgd     g_j ← g_j + η ε (1 − p_j), its first order: stochastic ascent, a step of m η ε.

They differ where a batch is smaller than the cloud: a column that one row hits has p = m/B, and sgd
throws g down by η ε m/B where online takes ε log(1 + η m/B). But that logarithm's mean is not 0 at
the optimum, so online errs by O(η). `mixed` goes online while ε falls and by sgd at the last ε: of
the three the best or within noise of it, at batches of 64 to 4096 rows for 4096 targets. The result
is an average over the steps at the last ε, of weight growing as step³ (Shamir & Zhang 2013,
arXiv:1212.1824).

A batch of B rows costs one product and one exponential per pair, in tiles of rows; nothing of B × m
is stored.
"""

import functools
import hashlib
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from downscaling.debias.entropic import entropic_map, soft_min
from downscaling.runtime import checkpoints as checkpoints_lib
from downscaling.runtime import supervision

RULES = ("mixed", "online", "sgd")
# Exponents in a tile of rows, 8 MB; at least 8 rows, which is less than the target cloud itself.
TILE_NUMBERS = 2**21
POLL = 8  # steps from one question whether to stop to the next
# error of the marginals that float32 exponents may leave: a fifth of what the noise of batches
# leaves
ROUNDING = 1e-2
DECAY = 3  # of the average: weights grow as step³


class Fit(NamedTuple):
  """A fit's result.

  g [m]: the averaged potential, units of the squared cost, of mean 0; epsilon: the last one, same
  units; mean_cost: of
  |x − y_j|² over held-out rows and the target; history: by check {"step", "epsilon", "error",
  "rms", "dual"}, see `fit`; rows: how many source rows went into g, with repetitions.
  """

  g: jax.Array
  epsilon: float
  mean_cost: float
  history: dict[str, list]
  rows: int


def fit(
  batch: Callable[[int], np.ndarray],
  target: np.ndarray,
  *,
  held_out: np.ndarray,
  epsilon: float,
  steps: int,
  rule: str = "mixed",
  rates: tuple[float, float] = (0.9, 0.05),
  anneal: tuple[float, float] = (64.0, 0.6),
  check_every: int = 50,
  checkpoints: checkpoints_lib.Checkpoints | None = None,
  save_seconds: float = 30.0,
  stop: Callable[[], bool] = lambda: False,
  progress: Callable[[int, float, float], None] | None = None,
) -> Fit:
  """Fits g to a stream; transport.EntropicMap(target, g, epsilon, grid) is the map.

  history, over the held-out rows and g (its average, once there is one), at that check's ε: error,
  Σ_j |p_j − 1|/m, the L1 error of the target's marginal, which fewer rows than 10 m leave large
  whatever g is; rms, √(Σ_j (p_j − 1)²/m) free of that noise, from the product of the two halves of
  the rows (0 where noise makes it negative); dual, H(g) in units of the cost: of two fits at one ε
  the one with the larger is better.

  Args:
    batch: step -> source rows [B, d], a pure function of step = 0 ... steps − 1, B always the same.
      Rows never seen before are best, then every row once a pass in an order of its own
      (`shuffled`); drawn with replacement they fit worse.
    target: [m, d]. held_out: rows of the source's law, [h, d], h >= 2, not in the stream, by
      trajectory (rms takes the two halves for independent).
    epsilon: the last ε as a share of the mean cost.
    steps: batches in all; rates and anneal are spread over them. One to three passes over the rows
      gave the largest held-out dual (benchmarks/minibatch.py); more fit their noise, as a full
      solve does.
    rule: one of RULES. rates: η at the first step and at the last, geometric in between, in (0, 1).
    anneal: (first ε over last, share of the steps until the last is reached); (1, 0) goes at once.
    check_every: steps from check to check; a check looks at all held-out rows.
    checkpoints: saved every save_seconds (at checks), when stopped and at the end; resumed from,
      bit for bit.
    stop: asked every POLL steps. progress: called with (steps since the last call, ε, error).
  Raises:
    ValueError: rows or options that cannot be used, naming the step of a batch. FloatingPointError:
    g diverged. supervision.Interrupted: `stop` said so; the state is saved.
  """
  _check(epsilon, steps, rule, rates, anneal, check_every)
  target, held_out = _rows(target, "target", 2), _rows(held_out, "held-out", 2)
  if target.shape[1] != held_out.shape[1]:
    raise ValueError(
      f"target {target.shape} and held-out rows {held_out.shape} came, need [m, d] and [h, d] of "
      "one d."
    )
  run = _Run(batch, target, held_out, epsilon, steps, rule, rates, anneal, checkpoints)
  saved, told = time.monotonic(), run.step
  while run.step < steps:
    if run.step % POLL == 0 and stop():
      run.save(wait=True)
      raise supervision.Interrupted(
        f"minibatch stopped after {run.last()}; the same command goes on from there."
      )
    run.advance()
    if run.step % check_every and run.step < steps:
      continue
    error = run.check()
    if progress is not None:
      progress(run.step - told, run.history["epsilon"][-1], error)
    told = run.step
    if time.monotonic() - saved >= save_seconds:
      run.save()
      saved = time.monotonic()
  run.save(wait=True)
  return Fit(
    run.mean,
    run.epsilon,
    run.mean_cost,
    run.history,
    run.step * run.size,
  )


def shuffled(
  rows: np.ndarray,
  size: int,
  seed: int = 0,
) -> Callable[[int], np.ndarray]:
  """`batch` for `fit` from rows [n, d] at hand (an array or a memory map): passes, each in its own
  shuffled order.

  A pass is n // size batches; what is left over of it is not used. Raises: ValueError unless 1 <=
  size <= n.
  """
  if not 1 <= size <= len(rows):
    raise ValueError(
      f"batches of {size} from {len(rows)} rows: need 1 <= size <= {len(rows)}."
    )
  order = functools.lru_cache(maxsize=1)(
    lambda turn: np.random.default_rng((seed, turn)).permutation(len(rows))
  )

  def batch(step: int) -> np.ndarray:
    turn, place = divmod(step, len(rows) // size)
    return rows[order(turn)[place * size : (place + 1) * size]]

  return batch


class _Run:
  """A fit under way: g, its average, the steps done, the history; begins at zero or at the last
  checkpoint.
  """

  def __init__(
    self, batch, target, held_out, epsilon, steps, rule, rates, anneal, checkpoints
  ):
    self.batch, self.steps, self.rule, self.rates, self.checkpoints = (
      batch,
      steps,
      rule,
      rates,
      checkpoints,
    )
    self.centre = soft_min.centre(target)
    y, h = target - self.centre, held_out - self.centre
    squares = sum(np.einsum("ij,ij->", c, c, dtype=np.float64) / len(c) for c in (y, h))
    self.mean_cost = float(
      squares - 2 * y.mean(0, dtype=np.float64) @ h.mean(0, dtype=np.float64)
    )
    self.epsilon = epsilon * self.mean_cost
    rounding = float(np.finfo(np.float32).eps) / 4 * squares / self.epsilon
    if rounding > ROUNDING:
      raise ValueError(
        f"epsilon={epsilon:g} of the mean cost is too small for float32: rounding leaves a "
        f"marginal error of {rounding:.1g}, {ROUNDING:g} is accepted. Use epsilon >= "
        f"{1.1 * epsilon * rounding / ROUNDING:.1e}."
      )
    self.first, self.annealed = anneal[0], int(anneal[1] * steps)
    self.y, self.held_out = jnp.asarray(y), jnp.asarray(h)
    self.size, self.step = 0, 0
    start = self._batch(0)
    self.size = len(start)
    self.g = self.mean = jnp.zeros(len(y), jnp.float32)
    self.history: dict[str, list] = {
      key: [] for key in ("step", "epsilon", "error", "rms", "dual")
    }
    digest = hashlib.sha256(
      repr((epsilon, steps, rule, rates, anneal, start.shape, y.shape)).encode()
    )
    for rows in (target, held_out, start):
      digest.update(rows.tobytes())
    self.identity = digest.hexdigest()
    if checkpoints is not None:
      self._restore()

  def _restore(self) -> None:
    if last := self.checkpoints.restore_last(
      checkpoints_lib.abstract({"g": self.g, "mean": self.mean})
    ):
      record = self.checkpoints.record(last[0])
      if record.get("identity") != self.identity:
        raise ValueError(
          f"the checkpoints in {self.checkpoints.folder} belong to other rows, steps or rates than "
          "these: use another --workdir, or the data and config they were made with."
        )
      self.step, self.g, self.mean = last[0], last[1]["g"], last[1]["mean"]
      self.history = {key: list(record["history"][key]) for key in self.history}

  def _batch(self, step: int) -> np.ndarray:
    rows = _rows(self.batch(step), f"batch {step}", 1)
    need = (self.size or len(rows), self.y.shape[1])
    if rows.shape != need:
      raise ValueError(
        f"batch({step}) is {rows.shape}, need {need}: every batch has as many rows, on the "
        "target's grid."
      )
    return rows

  def schedule(self, step: int) -> tuple[float, float, float]:
    """(ε, η, weight of g in the average; 1 means that it begins anew) of a step."""
    rate = self.rates[0] * (self.rates[1] / self.rates[0]) ** (
      step / max(self.steps - 1, 1)
    )
    left = max(0.0, 1 - step / self.annealed) if self.annealed else 0.0
    done = step - self.annealed  # steps at the last ε before this one
    return (
      self.epsilon * self.first**left,
      rate,
      1.0 if done < 0 else (DECAY + 1) / (done + DECAY + 1),
    )

  def advance(self) -> None:
    """One batch."""
    rows = self._batch(self.step) - self.centre
    epsilon, rate, weight = map(np.float32, self.schedule(self.step))
    online = self.rule == "online" or (
      self.rule == "mixed" and self.step < self.annealed
    )
    self.g, self.mean = _update(
      jnp.asarray(rows), self.y, self.g, self.mean, epsilon, rate, weight, online
    )
    self.step += 1

  def check(self) -> float:
    """Looks at the held-out rows; the error."""
    epsilon = self.schedule(self.step - 1)[0]
    error, rms, dual = map(
      float, _held_out(self.held_out, self.y, self.mean, np.float32(epsilon))
    )
    if not math.isfinite(error + dual):
      raise FloatingPointError(
        f"the potential diverged by step {self.step}, at ε = {epsilon:.3g}: lower rates (now "
        f"{self.rates}), or use rule='online' (it is {self.rule!r})."
      )
    values = dict(
      step=self.step,
      epsilon=epsilon,
      error=error,
      rms=rms,
      dual=dual,
    )
    for key, value in values.items():
      self.history[key].append(value)
    return error

  def save(self, wait: bool = False) -> None:
    if self.checkpoints is None or not self.step:
      return
    state = {"g": self.g, "mean": self.mean}
    self.checkpoints.save(
      self.step, state, history=self.history, identity=self.identity
    )
    if wait:
      self.checkpoints.wait()

  def last(self) -> str:
    errors = self.history["error"]
    return f"{self.step} of {self.steps} steps" + (
      f", held-out marginal error {errors[-1]:.2g}" if errors else ""
    )


def _soft(x, y, g, eps) -> tuple[jax.Array, jax.Array]:
  """p [m], p_j = (m/n) Σ_i w_ij with w_i the soft-max of (g_j − |x_i − y_j|²)/ε; and H(g), by tiles
  of rows.
  """
  n, m = len(x), len(y)
  size = min(n, max(8, TILE_NUMBERS // m))
  here = soft_min.tiled(jnp.ones(n, x.dtype), size)
  left = (
    soft_min.tiled(x * (2 / eps), size),
    soft_min.tiled(-jnp.sum(x**2, 1) / eps, size),
  )
  right = y, (g - jnp.sum(y**2, 1)) / eps

  def one_tile(carry, tile):
    shares, soft = carry
    *rows, here = tile
    t = soft_min.exponents(rows, right)
    top = t.max(1)
    e = jnp.exp(t - top[:, None])
    total = e.sum(1)
    shares = shares + jnp.matmul(here / total, e, precision="highest")
    return (shares, soft + jnp.sum(here * (top + jnp.log(total)))), None

  start = jnp.zeros(m, x.dtype), jnp.zeros((), x.dtype)
  (shares, soft), _ = lax.scan(one_tile, start, (*left, here))
  return shares * (m / n), g.mean() - eps * (soft / n - math.log(m))


@functools.partial(jax.jit, static_argnames="online")
def _update(x, y, g, mean, eps, rate, weight, online):
  """One batch -> (g, its average)."""
  p, _ = _soft(x, y, g, eps)
  g = g - eps * (jnp.log1p(rate * (p - 1)) if online else rate * (p - 1))
  g = g - g.mean()  # which says nothing, and would drift
  return g, mean + weight * (g - mean)


@jax.jit
def _held_out(x, y, g, eps):
  """(error, rms, dual), see `fit`; of an odd number of rows the last is left out."""
  half = len(x) // 2
  (a, dual_a), (b, dual_b) = (
    _soft(rows, y, g, eps) for rows in (x[:half], x[half : 2 * half])
  )
  rms = jnp.sqrt(jnp.maximum(jnp.mean((a - 1) * (b - 1)), 0))
  return jnp.abs((a + b) / 2 - 1).mean(), rms, (dual_a + dual_b) / 2


def _rows(rows: np.ndarray, name: str, least: int) -> np.ndarray:
  """Finite float32 rows [n, d]; the door."""
  rows = np.asarray(rows)
  if rows.ndim != 2 or len(rows) < least or not rows.shape[1]:
    raise ValueError(
      f"{name} rows of shape {rows.shape} came, need [rows, d] with at least {least} rows."
    )
  entropic_map.check_finite(rows, f"{name} rows")
  if least > 1 and (rows == rows[0]).all():
    raise ValueError(
      f"all {len(rows)} {name} rows are the same: a constant cloud has no distribution to match."
    )
  return rows.astype(np.float32)


def _check(epsilon, steps, rule, rates, anneal, check_every) -> None:
  if not (math.isfinite(epsilon) and epsilon > 0):
    raise ValueError(
      f"epsilon={epsilon}: need a share of the mean cost > 0, such as 0.001."
    )
  if steps < 1 or check_every < 1:
    raise ValueError(
      f"steps={steps}, check_every={check_every}: both must be at least 1."
    )
  if rule not in RULES:
    raise ValueError(f"rule={rule!r} is unknown; known: {list(RULES)}.")
  if not all(0 < rate < 1 for rate in rates) or rates[0] < rates[1]:
    raise ValueError(
      f"rates={rates}: need 1 > first >= last > 0; (0.9, 0.05) is the measured choice."
    )
  if not (math.isfinite(anneal[0]) and anneal[0] >= 1 and 0 <= anneal[1] < 1):
    raise ValueError(
      f"anneal={anneal}: need (first ε over last >= 1, share of the steps, 0 <= share < 1)."
    )
