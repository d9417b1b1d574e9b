"""Equivariant maps fitted by a recipe, from sums over blocks of rows that all processes add up.

Letters are the steps of equivariant.py. A recipe is tried by eye of the columns that it is to mend:
G the covariance, Q the one-point law, A the energy transfer, S what random filters see, M spectra,
triads, transfer and fourth moments at once, N whatever else a classifier finds, several of them one
after the other. docs/method.md has what each gives.
"""

import copy
import dataclasses
import functools
import itertools
import math
import os
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import scipy.special

from downscaling.debias.entropic.entropic_map import check_finite
from downscaling.debias.equivariant import matching, moments, network_step, shrinkage
from downscaling.debias.equivariant.equivariant_map import (
  EquivariantMap,
  Gaussian,
  Quantiles,
  Step,
  Transfer,
  blocks,
  channels_first,
)
from downscaling.fields import symmetry
from downscaling.fields.quadratic import Quadratic
from downscaling.runtime import random_keys, supervision

LEVELS, TAIL = 257, 8  # entries of a quantile table; pooled values beyond its last
SAMPLE = 2**18  # values of the rows that give the direction of an A
MAKERS = {
  "G": ("gaussian",),
  "Q": ("quantiles",),
  "A": ("transfer", "gaussian"),
  "S": ("sliced",),
  "M": ("matching",),
  "N": ("network",),
}
GRAM = 2**14  # rows that give the direction of an M
LEARN = 2**14  # rows a side, of all processes together, that a classifier learns from


def fit(
  source: np.ndarray,
  target: np.ndarray,
  *,
  group: symmetry.Group,
  recipe: str | tuple[str | tuple[str, int], ...] = "G",
  quadratic: Quadratic | None = None,
  towards: str | None = None,
  seed: int = 0,
  damping: float = 1.0,
  scratch: str | os.PathLike | None = None,
  notes: list[dict] | None = None,
  stop: Callable[[], bool] = lambda: False,
  together: Callable[[Any], list] = lambda tree: [tree],
  progress: Callable[[int], None] = lambda steps: None,
) -> EquivariantMap:
  """The equivariant map of unpaired clouds by a recipe.

  Each step is fitted on source rows as the steps before it left them. In memory are one block of
  either cloud, the sums, and a float64 copy of the source, which `scratch` puts on disk instead.

  Args:
    source, target: [S, *space, C], [R, *space, C], finite; memory maps serve. More than one channel
      is for G alone, whose Gaussians know the covariance between channels.
    group: symmetry of the grid; symmetry.trivial(n) if there is none.
    recipe: letters of the steps in order, "GQG", or with counts, ("G", ("A", 12), ("S", 60)). An A
      is followed by a G.
    quadratic: the equation's quadratic term on this grid, for A; without it an M leaves the
      transfer alone.
    towards: "stationary", for periodic grids, or "tapered": what covariances are drawn towards as
      far as rows outside the estimate say (shrinkage.py), if the group has fewer elements than the
      grid points. None: they are not.
    seed: of the filters: that of the j-th S is drawn from fold_in(key(seed, "filters"), j). Of the
      networks.
    damping: share of a Newton step that an A takes, in (0, 1].
    scratch: a folder, or None.
    notes: a list; what each G did to its covariances is appended to it.
    stop: asked between steps. progress: called with 1 after each.
    together: tree of arrays -> those of all processes, in their order (mesh.each_process), if each
      has rows of its own; all end with the same map.
  Raises:
    ValueError, saying what to type, for clouds that cannot be fitted and recipes that cannot be
    read. supervision.Interrupted: `stop` said so; a fit is begun anew.
  """
  order = letters(recipe, quadratic, damping)
  grid, wanted = np.shape(source)[1:], np.shape(target)[1:]
  source, target = cloud(source, "source"), cloud(target, "target")
  if grid != wanted:
    raise ValueError(
      f"source rows are {grid}, target rows {wanted}: bring both to one grid."
    )
  channels = check_channels(grid, order)
  group = group.over_channels(channels)
  fitting = Fitting(
    source, target, group, quadratic, towards, seed, damping, scratch, together
  )
  fitting.channels = channels
  steps = []
  for done, letter in enumerate(order):
    if stop():
      raise supervision.Interrupted(
        f"debias stopped after {done} of {len(order)} steps of the recipe, to be begun anew."
      )
    steps += fitting.take(letter)
    progress(1)
  if notes is not None:
    notes += fitting.shrunk
  return EquivariantMap(tuple(steps), grid)


def check_channels(grid: tuple[int, ...], order: str) -> int:
  """The number of channels. Raises ValueError for steps that know one channel alone."""
  channels = grid[-1] if len(grid) > 1 else 1
  other = sorted({*order} - {"G"})
  if channels > 1 and other:
    raise ValueError(
      f"rows of {channels} channels came, and the recipe {order!r} has steps that know one, "
      f"{', '.join(other)}: use the map 'gaussian' (recipe 'G'), or fit a map for each channel, "
      "rows[..., c : c + 1]."
    )
  return channels


def letters(recipe, quadratic: Quadratic | None, damping: float = 1.0) -> str:
  """The letters of a recipe, one a step, in order.

  Raises ValueError for one that cannot be read or fitted.
  """
  try:
    read = [
      (part, 1) if isinstance(part, str) else (part[0], int(part[1])) for part in recipe
    ]
    found = "".join(name * count for name, count in read)
    good = (
      bool(found)
      and set("".join(name for name, _ in read)) <= set("GQASMN")
      and min(c for _, c in read) >= 0
    )
  except (TypeError, ValueError, IndexError):
    good = False
  if not good:
    raise ValueError(
      f"recipe={recipe!r} cannot be read: need letters of G, Q, A, S, M and N, as 'GQG', or with "
      "counts, as ('G', ('A', 12), ('S', 60))."
    )
  if "A" in found and quadratic is None:
    raise ValueError(
      f"recipe={recipe!r} has an A and quadratic=None: A needs the equation's quadratic term. For "
      "data without one leave A out, e.g. recipe='GQG'."
    )
  if not 0 < damping <= 1:
    raise ValueError(
      f"damping={damping}: a share of a Newton step, in (0, 1]; 1 unless A does not settle."
    )
  return found


def cloud(rows: np.ndarray, name: str) -> np.ndarray:
  """Rows with their channels first, if there are several. Raises ValueError for what cannot be
  fitted.
  """
  if np.ndim(rows) < 3 or len(rows) < 2:
    raise ValueError(
      f"the {name} rows are {np.shape(rows)}: need [S, *space, C], 2 rows or more. Give fields "
      "without a channel axis one, rows[..., None]."
    )
  check_finite(rows, f"the {name} rows")
  rows = channels_first(rows)
  if all((block == rows[0]).all() for _, block in blocks(rows)):
    raise ValueError(
      f"all {len(rows)} {name} rows are the same: there is nothing to fit. Hand in more snapshots."
    )
  return rows


class Fitting:
  """What the makers of steps share: `current` are the source rows as the steps so far left them."""

  def __init__(
    self,
    source: np.ndarray,
    target: np.ndarray,
    group: symmetry.Group,
    quadratic: Quadratic | None = None,
    towards: str | None = None,
    seed: int = 0,
    damping: float = 1.0,
    scratch: str | os.PathLike | None = None,
    together: Callable[[Any], list] = lambda tree: [tree],
    gram: int = GRAM,
  ):
    """source, target: [S, *space], [R, *space]; gram: rows that give the direction of an M; the
    rest as in `fit`.
    """
    self.together, self.towards, self.gram = together, towards, gram
    self.target, self.group, self.space = target, group, source.shape[1:]
    self.quadratic, self.damping, self.key, self.slices = (
      quadratic,
      damping,
      random_keys.key(seed, "filters"),
      0,
    )
    self.frame, self.pool = moments.Frame.of(group, self.space), moments.Pool.of(group)
    self.learner, self.network_key = None, random_keys.key(seed, "network")
    if scratch is None:
      self.current = np.array(source, np.float64)
    else:
      with tempfile.TemporaryFile(dir=scratch) as file:
        self.current = np.memmap(file, np.float64, "w+", shape=source.shape)
      for place, block in blocks(source):
        self.current[place] = block
    self.known: dict[str, Any] = {}
    self.kinds: Any = None
    self.kept: Any = None  # statistics that an M may move
    self.goal: Any = None  # (mean, covariance) of the target
    self.centre: Any = None  # the target's mean
    self.shrunk: list[dict] = []  # what `gaussian` did to its covariances
    self.channels = 1  # more than one: the first axis of `space`

  def copy(self) -> "Fitting":
    """Another that goes on from here on rows of its own."""
    other = copy.copy(self)
    other.current = np.array(self.current)
    other.known, other.shrunk = dict(self.known), list(self.shrunk)
    return other

  def take(self, letter: str) -> list[Step]:
    """Fits the steps of one letter and moves the rows by them."""
    steps = []
    for make in MAKERS[letter]:
      steps.append(getattr(self, make)())
      self.advance(steps[-1])
    return steps

  def advance(self, step: Step) -> None:
    for place, block in blocks(self.current):
      self.current[place] = step(block)

  def sums(
    self,
    which: str,
    of: Callable,
    join: Callable = lambda a, b: a + b,
    rows: slice = slice(None),
  ):
    """Σ over blocks, and processes, of `of(block)` for "current" or "target"."""
    total = None
    for _, block in blocks(getattr(self, which)[rows]):
      part = of(block)
      total = part if total is None else join(total, part)
    return functools.reduce(join, self.together(total))

  def once(self, of: Callable):
    """The same for the target, kept: it does not change."""
    if of.__name__ not in self.known:
      self.known[of.__name__] = self.sums("target", of)
    return self.known[of.__name__]

  def _moments(self, block):
    return moments.Moments.of(block, self.frame)

  def _transfer(self, block):
    return moments.Transfer.of(block, self.term)

  @property
  def term(self) -> Quadratic:
    """The quadratic term, which `letters` has asked for."""
    assert self.quadratic is not None
    return self.quadratic

  def _matching(self, block):
    return matching.Sums.of(block - self.centre, self.quadratic)

  def gaussian(self) -> Gaussian:
    (a, cov), (b, goal) = (self._gaussian_law(which) for which in ("current", "target"))
    return Gaussian(a, b, self.frame.average(moments.optimal(cov, goal)))

  def _gaussian_law(self, which: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of a cloud, shrunk if the group does not do enough against its noise."""
    many = self.frame.blocks > 1 or len(self.group) >= math.prod(self.space)
    if self.towards is None or many:
      sums = (
        self.once(self._moments)
        if which == "target"
        else self.sums(which, self._moments)
      )
      return sums.averaged(self.group, self.frame)
    if which == "target" and self.goal is not None:
      return self.goal
    fewest = min(int(n) for n in self.together(np.int64(len(getattr(self, which)))))
    folds = min(shrinkage.FOLDS, fewest)
    edges = np.linspace(
      0,
      len(getattr(self, which)),
      folds + 1,
    ).astype(int)
    parts = [
      self.sums(which, self._moments, rows=slice(*pair))
      for pair in itertools.pairwise(edges)
    ]
    found = shrinkage.shrink(parts, self.group, self.frame, self.towards, self.channels)
    self.shrunk.append(
      {"cloud": which, "weight": found.weight, "towards": found.structure}
    )
    if which == "target":
      self.goal = (found.mean, found.covariance)
    return found.mean, found.covariance

  def transfer(self) -> Transfer:
    now, goal = self.sums("current", self._transfer), self.once(self._transfer)
    gap = goal.transfer / goal.count - now.transfer / now.count
    quadratic = self.term
    # a direction asks for less than the gap
    matrix = self.mean(
      SAMPLE // math.prod(self.space),
      lambda rows: len(rows) * moments.response(rows, quadratic),
    )
    return Transfer(
      self.damping
      * moments.newton(
        gap,
        np.asarray(matrix),
        now.power / now.count,
      ),
      quadratic,
    )

  def matching(self) -> matching.Matching:
    mean, _ = self.once(self._moments).averaged(self.group, self.frame)
    if self.kept is None:
      self.kept = matching.invariant(self.group, self.space, self.quadratic)
    self.centre = mean
    now, goal = self.sums("current", self._matching), self.once(self._matching)
    products = self.mean(
      self.gram, lambda rows: matching.gram(rows - mean, self.quadratic, self.kept)
    )
    step = matching.Matching(
      matching.solve(now, goal, np.asarray(products), self.kept),
      mean,
      math.inf,
      self.quadratic,
    )
    most = self.sums("current", lambda block: step.shares(block).max(), max)
    return dataclasses.replace(step, most=float(most))

  def network(self) -> network_step.Network:
    if self.learner is None:
      self.learner = network_step.Learner(self.space, self.group, self.network_key)
    mean, _ = self.once(self._moments).averaged(self.group, self.frame)
    step = self.learner.step(self.some("current"), self.some("target"), mean)
    # Networks of unlike processors differ by rounding: all take that of the first.
    parameters, rate = self.together((step.parameters, np.float64(step.rate)))[0]
    return dataclasses.replace(step, parameters=parameters, rate=float(rate))

  def some(self, which: str) -> np.ndarray:
    """LEARN rows at random, in order, of all processes together."""
    rows = getattr(self, which)
    have = self.together(np.int64(len(rows)))
    count = min(LEARN // len(have), *map(int, have))
    chosen = np.random.default_rng(0).permutation(len(rows))[:count]
    return np.concatenate(self.together(np.asarray(rows[np.sort(chosen)], np.float64)))

  def mean(self, count: int, of: Callable):
    """Mean over so many rows of the source as they are now, at random: every n-th may be those of
    one time.
    """
    chosen = np.random.default_rng(0).permutation(len(self.current))[: max(2, count)]
    rows = np.asarray(self.current[np.sort(chosen)])
    parts = self.together((np.float64(len(rows)), of(rows)))
    return sum(part for _, part in parts) / sum(number for number, _ in parts)

  def quantiles(self) -> Quantiles:
    return self._quantiles(self.pool, np.zeros(0, complex))

  def sliced(self) -> Quantiles:
    self.kinds = self.kinds or moments.filters(self.group, self.space)
    shells = moments.shells(self.space)
    kind, weight = moments.draw(
      jax.random.fold_in(self.key, self.slices), len(self.kinds), shells.max() + 1
    )
    self.slices += 1
    factor, character = self.kinds[kind]
    return self._quantiles(
      moments.Pool.of(self.group, character), factor * weight[shells]
    )

  def _quantiles(self, pool: moments.Pool, h: np.ndarray) -> Quantiles:
    blank = np.zeros((len(pool.odd), 2))
    step = Quantiles(
      blank, blank, blank, pool.orbit.astype(np.int32), pool.sign.astype(np.int8), h
    )
    tables = []
    for which in ("current", "target"):
      reach = self.sums(
        which,
        lambda block: pool.range(step.filtered(block)),
        lambda a, b: np.stack(
          [
            np.minimum(a[0], b[0]),
            np.maximum(a[1], b[1]),
          ]
        ),
      )
      counts = self.sums(
        which, lambda block, reach=reach: pool.counts(step.filtered(block), reach)
      )
      tables.append((reach, counts))
    fewest = min(counts.sum(axis=1).min() for _, counts in tables)
    end = scipy.special.ndtri(
      min(TAIL / fewest, 0.25)
    )  # even in the normal deviate: most levels in the tails
    levels = scipy.special.ndtr(np.linspace(end, -end, LEVELS))
    x, y = (moments.quantiles(counts, reach, levels) for reach, counts in tables)
    x, y = (
      np.where(
        pool.odd[:, None],
        (t - t[:, ::-1]) / 2,
        t,
      )
      for t in (x, y)
    )
    return dataclasses.replace(step, x=x, y=y, reach=tables[0][0])
