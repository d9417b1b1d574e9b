"""A network step: fields move up the gradient of a learned log ratio of the true law to their own.

After the other steps the moments are right and the law is not: a classifier still tells mapped
fields from true ones. Its logit f estimates log p_true / p_mapped, and

    y + η ∇f(y),   η such that E f of the moved rows is E f of the true rows, to first order,

is a step of the gradient flow that lowers the divergence KL(mapped | true) (discriminator gradient
flow: Ansari, Ang & Soh 2021, arXiv:2012.00780). It is Matching with one statistic that is learned
instead of chosen, and it too moves fields by as little as that statistic asks. Several steps
follow each other: the classifier goes on from where the last step left it, on the moved rows.

f is a mean over the group and over shifts, so its gradient commutes with both. The classifier is
trained on most rows of the fit; η comes from the others, and is 0 where they show no difference.
"""

import dataclasses
import functools
import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax

from downscaling.fields import symmetry

WIDTH, LAYERS = 32, 4
BATCH = 128  # rows of a training step, half of them true
# Training steps before the first network step, and before each later one.
FIRST, LATER = 600, 200
# Of Adam, of the weights, of the parameters that are used.
RATE, DECAY, AVERAGE = 5e-3, 1e-2, 0.98
SPARE = 8  # one row of so many sets η and trains no network
DAMPING = 0.7  # share of the gap that a step closes
SURE = 2.0  # standard errors by which spare rows must differ
LARGEST = 0.15  # |displacement| of a row over its size
ROWS = 1024  # mapped at a time; the last block is padded


class Logit(nn.Module):
  """[B, *space] -> [B]; residual convolutions that wrap around, then a mean over space."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    size = (3,) * (x.ndim - 1)
    h = nn.swish(nn.Conv(WIDTH, size, padding="CIRCULAR")(x[..., None]))
    for _ in range(LAYERS - 1):
      h = h + nn.swish(nn.Conv(WIDTH, size, padding="CIRCULAR")(h))
    h = h.mean(axis=tuple(range(1, h.ndim - 1)))
    h = nn.swish(nn.Dense(WIDTH)(h))
    return nn.Dense(1)(h)[:, 0]


def turns(group: symmetry.Group, space: tuple[int, ...]) -> symmetry.Group:
  """The group up to shifts, to which the network is blind: one element of each kind."""
  place = np.stack(np.unravel_index(group.index, space), axis=-1)
  turned = (place - place[:, :1]) % np.array(space)
  kinds = {}
  for element, row in enumerate(turned):
    kinds.setdefault((row.tobytes(), group.sign[element]), element)
  chosen = list(kinds.values())
  return symmetry.Group(group.index[chosen], group.sign[chosen])


@functools.cache
def _unravel(space: tuple[int, ...]):
  """Function of a vector of all parameters -> the network's tree."""
  shapes = jax.eval_shape(
    Logit().init,
    jax.random.key(0),
    jnp.zeros((1, *space)),
  )
  blank = jax.tree.map(
    lambda a: np.zeros(a.shape, a.dtype),
    shapes,
  )
  return jax.flatten_util.ravel_pytree(blank)[1]


@functools.cache
def _rise(space: tuple[int, ...]):
  """(parameters, y [B, *space], index [E, n], sign [E]) -> (f [B], ∇f like y)."""
  unravel = _unravel(space)

  def value(y, params, index, sign):
    flat = y.reshape(len(y), -1)
    moved = sign[:, None, None] * jnp.moveaxis(flat[:, index], 1, 0)
    logits = jnp.asarray(
      Logit().apply(
        unravel(params),
        moved.reshape(-1, *space),
      )
    )
    each = logits.reshape(len(sign), len(y)).mean(axis=0)
    return each.sum(), each

  def rise(params, y, index, sign):
    gradient, each = jax.grad(value, has_aux=True)(y, params, index, sign)
    return each, gradient

  return jax.jit(rise)


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
  """y + η ∇f(y). A row moves by at most `most` of its size, or of the usual size if larger.

  parameters: of Logit, one vector float32. mean: [*space]; scale: f sees (y − mean) / scale.
  index, sign: the group up to shifts, [E, n], [E]. rate: η, in units of scale².
  """

  kind: ClassVar[str] = "network"
  parameters: np.ndarray
  mean: np.ndarray
  index: np.ndarray
  sign: np.ndarray
  scale: float
  rate: float
  most: float

  def __call__(self, y: np.ndarray) -> np.ndarray:
    _, moved = self.rise(y)
    limit = np.minimum(
      1.0,
      self.most
      / np.maximum(
        self._shares(y, moved),
        np.finfo(float).tiny,
      ),
    )
    return y + moved * limit.reshape(-1, *(1,) * (y.ndim - 1))

  def outside(self, y: np.ndarray) -> np.ndarray:
    _, moved = self.rise(y)
    return self._shares(y, moved) > self.most

  def rise(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f [S] and η ∇f(y) [S, *space] before it is limited."""
    value, moved = np.empty(len(y)), np.empty(y.shape)
    program = _rise(y.shape[1:])
    for first in range(0, len(y), ROWS):
      rows = (y[first : first + ROWS] - self.mean) / self.scale
      padded = np.zeros((ROWS, *y.shape[1:]), np.float32)
      padded[: len(rows)] = rows
      sign = self.sign.astype(np.float32)
      logits, gradient = program(self.parameters, padded, self.index, sign)
      value[first : first + ROWS] = np.asarray(logits)[: len(rows)]
      moved[first : first + ROWS] = np.asarray(gradient)[: len(rows)]
    return value, moved * (self.rate * self.scale)

  def _shares(self, y: np.ndarray, moved: np.ndarray) -> np.ndarray:
    usual = self.scale * math.sqrt(math.prod(y.shape[1:]))
    return _norms(moved) / np.maximum(_norms(y - self.mean), usual)


def _norms(y: np.ndarray) -> np.ndarray:
  return np.linalg.norm(y.reshape(len(y), -1), axis=1)


class Learner:
  """The classifier of one fit, which goes on from step to step."""

  def __init__(
    self,
    space: tuple[int, ...],
    group: symmetry.Group,
    key: jax.Array,
  ):
    """key: typed, of this use alone (randomness.key(seed, "network"))."""
    self.space, self.turns, self.key, self.done = space, turns(group, space), key, 0
    starting = Logit().init(
      jax.random.fold_in(key, 0),
      jnp.zeros((1, *space)),
    )
    params = jax.flatten_util.ravel_pytree(starting)[0]
    adam = optax.adamw(RATE, weight_decay=DECAY)
    self.optimizer = optax.chain(optax.clip_by_global_norm(1.0), adam)
    self.state = (params, params, self.optimizer.init(params))
    self.train = self._program()

  def step(
    self,
    rows: np.ndarray,
    true: np.ndarray,
    mean: np.ndarray,
  ) -> Network:
    """Trains on most rows and returns the step that the others ask for.

    Args:
      rows, true: [S, *space], [R, *space] float64, neighbours of one trajectory beside each other,
        as the spare rows are the last of each. mean: of the true rows, over the group.
    """
    cut, true_cut = (len(a) - max(2, len(a) // SPARE) for a in (rows, true))
    scale = math.sqrt(np.mean((true - mean) ** 2))
    normal = lambda a: ((a - mean) / scale).astype(np.float32)
    self._advance(normal(rows[:cut]), normal(true[:true_cut]))
    about = (
      np.asarray(mean),
      self.turns.index.astype(np.int32),
      self.turns.sign.astype(np.int8),
    )
    step = Network(np.asarray(self.state[1]), *about, scale, 1.0, LARGEST)
    return dataclasses.replace(
      step,
      rate=_rate(step, rows[cut:], true[true_cut:]),
    )

  def _advance(self, rows: np.ndarray, true: np.ndarray) -> None:
    steps, half = (LATER if self.done else FIRST), BATCH // 2
    self.done += 1
    keys = jax.random.split(jax.random.fold_in(self.key, self.done), 3)
    draw = lambda key, most: np.asarray(jax.random.randint(key, (steps, half), 0, most))
    chosen, true_chosen = draw(keys[0], len(rows)), draw(keys[1], len(true))
    elements = jax.random.randint(
      keys[2],
      (steps, BATCH),
      0,
      len(self.turns),
    )
    elements = np.asarray(elements)
    n = math.prod(self.space)
    for i in range(steps):
      batch = np.concatenate([rows[chosen[i]], true[true_chosen[i]]]).reshape(BATCH, n)
      moved = np.take_along_axis(batch, self.turns.index[elements[i]], axis=1)
      moved *= self.turns.sign[elements[i], None].astype(np.float32)
      self.state = self.train(self.state, moved.reshape(BATCH, *self.space))

  def _program(self):
    unravel = _unravel(self.space)
    labels = jnp.repeat(jnp.array([0.0, 1.0]), BATCH // 2)

    def loss(params, x):
      logits = Logit().apply(unravel(params), x)
      return optax.sigmoid_binary_cross_entropy(logits, labels).mean()

    @jax.jit
    def train(state, x):
      params, average, inner = state
      change, inner = self.optimizer.update(
        jax.grad(loss)(params, x),
        inner,
        params,
      )
      params = jnp.asarray(optax.apply_updates(params, change))
      return params, AVERAGE * average + (1 - AVERAGE) * params, inner

    return train


def _rate(step: Network, rows: np.ndarray, true: np.ndarray) -> float:
  """η of a step whose own is 1; 0 where f of spare rows is no larger on the true ones, for sure."""
  value, gradient = step.rise(rows)
  goal, _ = step.rise(true)
  gap = goal.mean() - value.mean()
  error = math.sqrt(goal.var() / len(goal) + value.var() / len(value))
  steepness = np.mean(_norms(gradient) ** 2) / step.scale**2
  if gap <= SURE * error or not steepness > 0:
    return 0.0
  return float(DAMPING * gap / steepness)
