"""Which steps of a recipe earn their place: those that bring rows outside the fit nearer to truth
outside the fit.

A step that matches statistics of its own rows always looks right on them. With few rows it matches
their noise, and new rows get worse. So the recipe is fitted on some folds of both clouds, and
judged on the others by the distance of

    mean, covariance      averaged over the group
    law                   quantiles of the values, pooled over orbits
    energy, triads, ...   the statistics of matching.py that the group leaves alone, by family

each statistic squared and in units of what it differs by between two sets of true rows of that
size, so that weak waves count as much as strong ones. A step is taken if the sum falls. One that
does not lower it stays pending: the next letter is tried behind it as well as without it, because
some steps (quantiles before a G) pay only together.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from downscaling.debias.equivariant import matching, moments
from downscaling.debias.equivariant.equivariant_map import Step, blocks
from downscaling.debias.equivariant.recipes import Fitting
from downscaling.fields import symmetry
from downscaling.fields.quadratic import Quadratic
from downscaling.runtime import supervision

FOLDS = 4
# letters that are judged by spare rows of their own (network_step.py), and move nothing where those
# say so
OWN = "N"
MOST = 16_384  # rows of either cloud that are used; more would cost more than they tell
GRAM = 2**11  # rows that give the direction of an M that is tried
# Of the target, whose differences say what sampling does: at most, and rows of each at least.
CHUNKS, ROWS = (
  32,
  25,
)
ROUNDING = 1e-8  # of the field's variance: a mean whose noise is less is rounding
# of the largest variance of a family's statistics: those below are sums that a symmetry cancels
EMPTY = 1e-22
# of the same: weaker ones are judged by this noise, as a field does not show what they are wrong by
WEAK = 1e-4
# Of the quantiles that are compared.
LEVELS = scipy.special.ndtr(np.linspace(-2, 2, 17))


@dataclasses.dataclass(frozen=True)
class Choice:
  """letters: of the steps to take, in order. trials: of each letter, what was found, as plain
  values.
  """

  letters: str
  trials: tuple[dict[str, Any], ...]

  @property
  def dropped(self) -> str:
    return "".join(trial["step"] for trial in self.trials if not trial["taken"])


def select(
  source: np.ndarray,
  target: np.ndarray,
  order: str,
  *,
  group: symmetry.Group,
  quadratic: Quadratic | None = None,
  stop: Callable[[], bool] = lambda: False,
  progress: Callable[[int], None] = lambda steps: None,
  **fitting,
) -> Choice:
  """The letters of a recipe that improve rows outside the fit.

  Args:
    source, target: [S, *space], [R, *space]: rows in the order of their trajectories, as folds are
      consecutive rows.
    order: letters, one a step (recipes.letters). group, quadratic: see recipes.fit. fitting:
      further keywords of recipes.Fitting.
    stop: asked between steps. progress: called with 1 after each letter.
  Raises: supervision.Interrupted: `stop` said so.
  """
  source, target = _some(source), _some(target)
  judge = _Judge(target, group, quadratic)
  base = [
    _Fold(source, target, k, judge, group=group, quadratic=quadratic, **fitting)
    for k in range(FOLDS)
  ]
  best = _distance(base)
  pending: Sequence[_Fold] | None = None
  waiting: list[int] = []
  trials: list[dict[str, Any]] = []
  for place, letter in enumerate(order):
    if stop():
      raise supervision.Interrupted(
        f"debias stopped while trying step {place + 1} of {len(order)}, to be begun anew."
      )
    if set(order[: place + 1]) & set(OWN):  # what is not tried, and what mends it
      trials.append({"step": letter, "taken": True})
      progress(1)
      continue
    ways = [base] if pending is None else [pending, base]
    tried = [[fold.after(letter) for fold in way] for way in ways]
    found = [_distance(way) for way in tried]
    which = int(np.argmin([sum(one.values()) for one in found]))
    gained = sum(best.values()) - sum(found[which].values())
    trials.append(
      {
        "step": letter,
        "taken": gained > 0,
        "gain": gained,
        "before": best,
        "after": found[which],
      }
    )
    if gained > 0:
      if which == 0:
        for earlier in waiting:
          trials[earlier]["taken"] = True
      base, best, pending, waiting = tried[which], found[which], None, []
    else:
      pending = tried[0]
      waiting.append(place)
    progress(1)
  kept = "".join(trial["step"] for trial in trials if trial["taken"])
  return Choice(kept, tuple(trials))


def _some(rows: np.ndarray) -> np.ndarray:
  """At most MOST rows, in order."""
  if len(rows) <= MOST:
    return rows
  return rows[np.linspace(0, len(rows) - 1, MOST).astype(int)]


def _distance(folds) -> dict[str, float]:
  """Squared distances by family, in units of sampling, mean over folds."""
  found = [fold.distance() for fold in folds]
  return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


class _Fold:
  """A recipe fitted so far on all rows but those of one fold, which it has carried along."""

  def __init__(self, source, target, number, judge, **fitting):
    self.judge = judge
    inside, held = _parts(source, number)
    true, goal = _parts(target, number)
    self.fitting = Fitting(inside, true, gram=GRAM, **fitting)
    self.held = np.array(held, np.float64)
    self.goal = judge.summary(goal)
    self.sizes = (len(held), len(goal))

  def after(self, letter: str) -> "_Fold":
    """A fold that has taken one more letter."""
    other = object.__new__(_Fold)
    other.__dict__.update(self.__dict__)
    other.fitting = self.fitting.copy()
    other.held = self.held.copy()
    for step in other.fitting.take(letter):
      _move(other.held, step)
    return other

  def distance(self) -> dict[str, float]:
    found = self.judge.summary(self.held)
    share = sum(1 / n for n in self.sizes)
    out = {}
    for name, noise in self.judge.noise.items():
      gap = (found[name] - self.goal[name]) ** 2 / np.where(noise > 0, noise, np.inf)
      out[name] = float(gap.sum() / share)
    return out


def _move(rows: np.ndarray, step: Step) -> None:
  for place, block in blocks(rows):
    rows[place] = step(block)


def _parts(rows: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
  """Rows outside and inside of one of FOLDS runs of consecutive rows."""
  low, high = (len(rows) * (number + end) // FOLDS for end in (0, 1))
  return np.concatenate([rows[:low], rows[high:]]), rows[low:high]


class _Judge:
  """Statistics of a set by family, and the noise of each: its variance times rows; 0 for what does
  not count.
  """

  def __init__(
    self, target: np.ndarray, group: symmetry.Group, quadratic: Quadratic | None
  ):
    self.space, self.group, self.quadratic = target.shape[1:], group, quadratic
    self.frame, self.pool = moments.Frame.of(group, self.space), moments.Pool.of(group)
    self.families = self._families()
    count = int(
      np.clip(
        len(target) // ROWS,
        min(4, len(target)),
        CHUNKS,
      )
    )
    edges = np.linspace(0, len(target), count + 1).astype(int)
    self.centre = self._moments(target)[0]
    chunks = [self.summary(target[low:high]) for low, high in itertools.pairwise(edges)]
    self.noise = {}
    for name in chunks[0]:
      variance = np.var(
        np.stack([chunk[name] for chunk in chunks]),
        axis=0,
        ddof=1,
      )
      held = variance > EMPTY * variance.max()
      noise = np.maximum(variance, WEAK * variance.max())
      self.noise[name] = np.where(held, noise, 0.0) * len(target) / count
    power = sum(
      float(((block - self.centre) ** 2).sum()) for _, block in blocks(target)
    ) / len(target)
    # A symmetry or the equation forbids it.
    if self.noise["mean"].sum() < ROUNDING * power:
      del self.noise["mean"]
    bad = [name for name, noise in self.noise.items() if not noise.any()]
    if bad:
      raise ValueError(
        f"the target rows do not differ in {', '.join(bad)}: nothing can be judged by them. Hand "
        "in more rows, or set --config.debias.select=False."
      )

  def _families(self) -> dict[str, np.ndarray]:
    """Numbers of the statistics of each family that the group leaves alone."""
    named = matching.statistics(self.space, self.quadratic)
    row = jax.ShapeDtypeStruct(self.space, jnp.float32)
    counts: dict[
      str, int
    ] = {}  # in the order of the statistics; a traced dict would come back sorted

    def count(y):
      counts.update({name: len(values) for name, values in named(y).items()})
      return y

    jax.eval_shape(count, row)
    kept = matching.invariant(self.group, self.space, self.quadratic)
    owner = np.searchsorted(
      np.cumsum(list(counts.values())),
      kept,
      side="right",
    )
    return {
      name: kept[owner == k] for k, name in enumerate(counts) if (owner == k).any()
    }

  def _moments(self, rows):
    parts = [moments.Moments.of(block, self.frame) for _, block in blocks(rows)]
    return moments.total(parts).averaged(self.group, self.frame)

  def summary(self, rows: np.ndarray) -> dict[str, np.ndarray]:
    """{family: statistics} of rows [S, *space]."""
    mean, covariance = self._moments(rows)
    out = {
      "mean": mean.ravel(),
      "covariance": np.concatenate(
        [np.real(covariance).ravel(), np.imag(covariance).ravel()]
      ),
    }
    out["law"] = self._law(rows)
    parts = [
      matching.Sums.of(block - self.centre, self.quadratic).values
      for _, block in blocks(rows)
    ]
    values = functools.reduce(np.add, parts)
    return out | {
      name: values[kept] / len(rows) for name, kept in self.families.items()
    }

  def _law(self, rows: np.ndarray) -> np.ndarray:
    values = self.pool.values(np.asarray(rows, np.float64))
    tables = []
    for orbit, odd in enumerate(self.pool.odd):
      own = values[:, self.pool.orbit == orbit]
      found = np.quantile(own, LEVELS)
      tables.append((found - found[::-1]) / 2 if odd else found)
    return np.concatenate(tables)
