"""Classifier two-sample test: a network is trained to tell fields from true fields. Can it?

Columns compare chosen statistics; two laws may agree in all of them and still differ. A classifier
looks for whatever differs (Lopez-Paz & Oquab 2017, arXiv:1610.06545). Its score is the AUC: how
often a true field is ranked above one that is judged. 0.5 means that this network cannot tell them
apart, 1 that it always can.

    score = auc(mapped, trajectories, true, true_trajectories, seed=0)
    null = floor(more_true, more_trajectories, (len(mapped), len(true)), seed=0)

Each trajectory (year, in other data) lies in one of two folds. A network trained on one fold scores
the other fold, so no field is scored by a network that saw its trajectory. The AUC is the mean over
both folds.

An AUC is a lower bound: more rows, more steps or a larger network find more. Numbers compare only
where the rows of both sets, the grid and the settings are equal, so a floor has the sizes of the
row beside it.
"""

import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from downscaling.fields import symmetry
from downscaling.metrics import distances
from downscaling.runtime import random_keys

# By the number of axes, so that a row of a table takes seconds on two cores.
BATCH = {1: 128, 2: 64}  # rows of a step, half of them true
# Of one network; fewer where EPOCHS of the smaller set are fewer.
STEPS = {1: 600, 2: 300}
# Points an axis that the layers see at most. The stem strides over longer axes.
LONGEST = {1: 64, 2: 16}
EPOCHS, FEWEST = 20, 100
PEAK, DECAY = 1e-2, 0.1  # of Adam's learning rate and of the weights
WIDTH, LAYERS = 16, 4
RESAMPLES = 200
LEVELS = (0.025, 0.975)
LEAST = 4  # blocks a set: two for each fold


class Score(NamedTuple):
  """One set of fields against true fields.

  auc: in [0, 1]. interval: its 2.5 and 97.5 % quantiles over block bootstraps of the scored rows,
  with the networks as they are.
  """

  auc: float
  interval: tuple[float, float]


class Floor(NamedTuple):
  """True fields against true fields.

  auc: median of `draws`, one AUC each. interval: where 95 % of the AUCs of equal laws lie.
  """

  auc: float
  interval: tuple[float, float]
  draws: tuple[float, ...]


class Network(nn.Module):
  """[B, *space] -> logit of "true" [B].

  Convolutions wrap around periodic axes, and their mean over space makes the network blind to
  shifts along these. Beyond the ends of other axes it sees zeros.

  periodic: is each axis; None for all of them.
  """

  periodic: tuple[bool, ...] | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    space = x.shape[1:]
    stride = max(1, -(-max(space) // LONGEST[len(space)]))
    strides = (stride,) * len(space)
    size = (3,) * len(space)
    wide = (max(3, 2 * stride - 1),) * len(space)
    h = self._convolved(x[..., None], wide, strides)
    for _ in range(LAYERS - 1):
      h = self._convolved(h, size, (1,) * len(space))
    h = h.mean(axis=tuple(range(1, h.ndim - 1)))
    h = nn.swish(nn.Dense(WIDTH)(h))
    return nn.Dense(1)(h)[:, 0]

  def _convolved(
    self, h: jax.Array, size: tuple[int, ...], strides: tuple[int, ...]
  ) -> jax.Array:
    if self.periodic is None or all(self.periodic):
      return nn.swish(nn.Conv(WIDTH, size, strides, padding="CIRCULAR")(h))
    for axis, (wide, wrap) in enumerate(
      zip(size, self.periodic, strict=True),
      start=1,
    ):
      halo = [(0, 0)] * h.ndim
      halo[axis] = (wide // 2, wide // 2)
      h = jnp.pad(h, halo, mode="wrap" if wrap else "constant")
    return nn.swish(nn.Conv(WIDTH, size, strides, padding="VALID")(h))


def auc(
  fields: np.ndarray,
  blocks: np.ndarray,
  true_fields: np.ndarray,
  true_blocks: np.ndarray,
  *,
  seed: int,
  moves: symmetry.Moves | None = None,
  periodic: tuple[bool, ...] | None = None,
) -> Score:
  """How well a small network tells fields from true fields, with an interval.

  Args:
    fields, true_fields: [S, *space] and [R, *space], one or two axes, any unit. Only batches of
      them are on a device, and all calls on one grid share one compiled program.
    blocks, true_blocks: [S] and [R], the trajectory (or year) of each row. The two sets share none.
    seed: config.seed. The same seed gives the same result on the same kind of device.
    moves: symmetries of the grid, on [..., *space]. Each row of a batch is moved by a random one.
      This adds power where both laws have the symmetry, and hides a law that breaks it. Shifts
      alone add nothing, as the network is blind to them.
    periodic: is each axis; None for all of them.
  Raises: ValueError for NaN (naming the set), for grids that differ or have another rank, and for
    blocks that are shared or too few.
  """
  sets = _checked(fields, blocks, true_fields, true_blocks)
  fits = _Fits(moves, periodic)
  value, replicates = _cross_fitted(*sets, random_keys.key(seed, "classifier"), fits)
  low, high = np.quantile(replicates, LEVELS)
  return Score(value, (float(low), float(high)))


def floor(
  true_fields: np.ndarray,
  true_blocks: np.ndarray,
  sizes: tuple[int, int],
  *,
  seed: int,
  draws: int = 3,
  moves: symmetry.Moves | None = None,
  periodic: tuple[bool, ...] | None = None,
) -> Floor:
  """The AUC between two independent true sets, as a distribution.

  Each draw deals the blocks to two sides at random, in proportion to `sizes`, and takes from each
  side one row of every block before another of each. Block bootstraps of each draw deviate from the
  AUC of that draw. The interval is the median of the draws plus the quantiles of these deviations.

  Args:
    true_fields, true_blocks: [R, *space], [R]; at least as many rows as both sizes together, of
      trajectories that neither judged set uses.
    sizes: rows of the judged set and of the true set that it stands beside.
    seed, moves, periodic: as in `auc`. draws: of the blocks, each with two networks of its own.
  Raises: ValueError as `auc`, and for too few rows.
  """
  rows, labels = distances.rows(true_fields, "the true fields"), np.asarray(true_blocks)
  _check_blocks(labels, len(rows), "the true fields")
  key = jax.random.fold_in(random_keys.key(seed, "classifier"), 1)
  values, deviations = [], []
  for draw in range(draws):
    dealing, fitting = jax.random.split(jax.random.fold_in(key, draw))
    sides = _dealt(labels, sizes, dealing)
    one, other = ((np.asarray(true_fields)[side], labels[side]) for side in sides)
    fits = _Fits(moves, periodic)
    value, replicates = _cross_fitted(*_checked(*one, *other), fitting, fits)
    values.append(value)
    deviations.append(replicates - value)
  middle = float(np.median(values))
  low, high = middle + np.quantile(np.concatenate(deviations), LEVELS)
  return Floor(middle, (float(low), float(high)), tuple(values))


def rank_auc(
  scores: np.ndarray,
  true_scores: np.ndarray,
  weights: np.ndarray | None = None,
  true_weights: np.ndarray | None = None,
) -> np.ndarray:
  """Share of pairs whose true score is the larger one; ties count half.

  Args:
    scores, true_scores: [n], [m].
    weights, true_weights: [K, n], [K, m], how often each row counts; default once.
  Returns: one AUC a row of weights, [K].
  """
  weights = np.ones((1, len(scores))) if weights is None else weights
  true_weights = (
    np.ones((1, len(true_scores))) if true_weights is None else true_weights
  )
  order = np.argsort(scores, kind="stable")
  counted = np.cumsum(weights[:, order], axis=1)
  below = np.concatenate(
    [np.zeros((len(weights), 1)), counted],
    axis=1,
  )
  ordered = np.asarray(scores)[order]
  first, last = (
    np.searchsorted(ordered, true_scores, side) for side in ("left", "right")
  )
  pairs = ((below[:, first] + below[:, last]) / 2 * true_weights).sum(axis=1)
  return pairs / (below[:, -1] * true_weights.sum(axis=1))


# ---------------------------------------------------------------- what came


def _checked(fields, blocks, true_fields, true_blocks):
  """(fields, blocks, true fields, true blocks) as arrays. Raises ValueError: see `auc`."""
  fields, true_fields = np.asarray(fields), np.asarray(true_fields)
  distances.rows(fields, "the fields")
  distances.rows(true_fields, "the true fields")
  if fields.shape[1:] != true_fields.shape[1:] or fields.ndim - 1 not in LONGEST:
    raise ValueError(
      f"fields are {fields.shape[1:]} and true fields {true_fields.shape[1:]}: need [rows, *space] "
      "on one grid of one or two axes, without a channel axis."
    )
  blocks, true_blocks = np.asarray(blocks), np.asarray(true_blocks)
  _check_blocks(blocks, len(fields), "the fields")
  _check_blocks(true_blocks, len(true_fields), "the true fields")
  shared = np.intersect1d(blocks, true_blocks)
  if shared.size:
    raise ValueError(
      f"{shared.size} blocks are in both sets, e.g. {shared[0]}: fields of one trajectory are "
      "alike, and a network would be scored on what it was trained on. Take the true fields from "
      "trajectories of their own (the reference split); if the two worlds merely number theirs "
      "alike, add an offset to one."
    )
  return fields, blocks, true_fields, true_blocks


def _check_blocks(blocks: np.ndarray, count: int, name: str) -> None:
  if blocks.shape != (count,):
    raise ValueError(
      f"blocks of {name} are {blocks.shape}, need [{count}]: the trajectory of each row, without "
      "other axes."
    )
  found = len(np.unique(blocks))
  if found < LEAST:
    raise ValueError(
      f"{name} are of {found} blocks: need {LEAST} or more, as half of them train a network and "
      "the others judge it. Hand in fields of more trajectories (or years, or months)."
    )


def _dealt(
  blocks: np.ndarray, sizes: tuple[int, int], key: jax.Array
) -> list[np.ndarray]:
  """Rows of two sides that share no block, ascending; as many as `sizes` says."""
  names, place = np.unique(blocks, return_inverse=True)
  order = np.asarray(jax.random.permutation(key, len(names)))
  cut = round(len(names) * sizes[0] / sum(sizes))
  # How many rows of its block come before each row.
  turn = np.empty(len(blocks), int)
  by_block = np.argsort(place, kind="stable")
  starts = np.searchsorted(place[by_block], place[by_block])
  turn[by_block] = np.arange(len(blocks)) - starts
  sides = []
  for chosen, size in zip(
    (order[:cut], order[cut:]),
    sizes,
    strict=True,
  ):
    held = np.flatnonzero(np.isin(place, chosen))
    if len(held) < size:
      raise ValueError(
        f"a floor for sets of {sizes[0]} and {sizes[1]} rows, but the true fields are "
        f"{len(blocks)} rows of {len(names)} blocks: need {sum(sizes)} rows and some more. Judge "
        "fewer rows, or hand in more true fields."
      )
    sides.append(np.sort(held[np.argsort(turn[held], kind="stable")[:size]]))
  return sides


# ---------------------------------------------------------------- networks


class _Fits(NamedTuple):
  """What all networks of one call share; see `auc`."""

  moves: symmetry.Moves | None
  periodic: tuple[bool, ...] | None

  @property
  def network(self) -> Network:
    return Network(self.periodic)


def _cross_fitted(
  fields, blocks, true_fields, true_blocks, key, fits
) -> tuple[float, np.ndarray]:
  """(AUC, the same of RESAMPLES block bootstraps)."""
  mean, std = true_fields.mean(dtype=np.float64), true_fields.std(dtype=np.float64)
  scale = np.array([mean, distances.positive(std)], np.float32)
  folding, fitting, resampling = jax.random.split(key, 3)
  judged = _second_half(blocks, jax.random.fold_in(folding, 0))
  true = _second_half(true_blocks, jax.random.fold_in(folding, 1))
  values, replicates = [], []
  for fold in (False, True):
    trained = fields[judged == fold], true_fields[true == fold]
    params = _train(*trained, scale, jax.random.fold_in(fitting, int(fold)), fits)
    scores = _scores(fits, params, fields[judged != fold], scale)
    true_scores = _scores(fits, params, true_fields[true != fold], scale)
    one, other = jax.random.split(jax.random.fold_in(resampling, int(fold)))
    weights = _resampled(blocks[judged != fold], one)
    true_weights = _resampled(true_blocks[true != fold], other)
    values.append(rank_auc(scores, true_scores)[0])
    replicates.append(rank_auc(scores, true_scores, weights, true_weights))
  return float(np.mean(values)), np.mean(replicates, axis=0)


def _second_half(blocks: np.ndarray, key: jax.Array) -> np.ndarray:
  """Which rows are of the second fold, [S] bool: a random half of the blocks."""
  names, place = np.unique(blocks, return_inverse=True)
  return np.asarray(jax.random.permutation(key, len(names)))[place] >= len(names) // 2


def _resampled(blocks: np.ndarray, key: jax.Array) -> np.ndarray:
  """How often each row counts when as many blocks are drawn with replacement, [RESAMPLES, S]."""
  names, place = np.unique(blocks, return_inverse=True)
  drawn = np.asarray(
    jax.random.randint(
      key,
      (RESAMPLES, len(names)),
      0,
      len(names),
    )
  )
  cells = drawn + len(names) * np.arange(RESAMPLES)[:, None]
  counts = np.bincount(cells.ravel(), minlength=RESAMPLES * len(names))
  return counts.reshape(RESAMPLES, -1)[:, place].astype(np.float64)


def _optimizer(steps: int) -> optax.GradientTransformation:
  rate = optax.cosine_decay_schedule(PEAK, steps)
  return optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=DECAY)
  )


@functools.cache
def _step(steps: int, fits: _Fits):
  """The jitted step: (parameters, optimiser's state, batch [B, *space], scale, key, i) -> both.

  i: the step's number, which is folded into the key of the run.
  """
  optimizer, moves = _optimizer(steps), fits.moves

  def loss(params, x):
    logits = fits.network.apply(params, x)
    labels = jnp.repeat(jnp.array([0.0, 1.0]), len(x) // 2)
    return optax.sigmoid_binary_cross_entropy(logits, labels).mean()

  @jax.jit
  def step(params, state, x, scale, key, i):
    if moves is not None:
      elements = jax.random.randint(
        jax.random.fold_in(key, i), (len(x),), 0, moves.count
      )
      x = jax.vmap(moves.move)(x, elements)
    gradient = jax.grad(loss)(params, (x - scale[0]) / scale[1])
    change, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, change), state

  return step


@functools.partial(jax.jit, static_argnums=0)
def _logits(network: Network, params, x, scale):
  return network.apply(params, (x - scale[0]) / scale[1])


def _train(
  fields: np.ndarray, true_fields: np.ndarray, scale: np.ndarray, key: jax.Array, fits
):
  """Parameters of a network that tells the rows apart.

  Batches are gathered on the host, so that one program serves sets of all sizes.
  """
  rank = fields.ndim - 1
  half = BATCH[rank] // 2
  least = min(len(fields), len(true_fields))
  enough = math.ceil(EPOCHS * least / half / FEWEST) * FEWEST  # few compiled programs
  steps = min(STEPS[rank], enough)
  starting, drawing, moving = jax.random.split(key, 3)
  one, other = jax.random.split(drawing)
  chosen = np.asarray(jax.random.randint(one, (steps, half), 0, len(fields)))
  chosen_true = np.asarray(
    jax.random.randint(other, (steps, half), 0, len(true_fields))
  )
  params = fits.network.init(
    starting,
    jnp.zeros((1, *fields.shape[1:]), jnp.float32),
  )
  state, step = _optimizer(steps).init(params), _step(steps, fits)
  for i in range(steps):
    batch = np.concatenate([fields[chosen[i]], true_fields[chosen_true[i]]])
    params, state = step(
      params, state, batch.astype(np.float32), scale, moving, np.uint32(i)
    )
  return params


def _scores(
  fits: _Fits,
  params,
  rows: np.ndarray,
  scale: np.ndarray,
) -> np.ndarray:
  """Logits [S], in blocks of one size; the last one is padded."""
  size = BATCH[rows.ndim - 1]
  out = np.empty(len(rows), np.float32)
  for first in range(0, len(rows), size):
    block = rows[first : first + size]
    padded = np.zeros((size, *rows.shape[1:]), np.float32)
    padded[: len(block)] = block
    out[first : first + size] = np.asarray(
      _logits(fits.network, params, padded, scale)
    )[: len(block)]
  return out
