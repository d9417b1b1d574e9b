"""Which rows a replicate holds: block bootstraps of a judged set, and draws of further true sets.

A block is a trajectory: its rows are alike, so they are drawn together. A replicate is a vector of
weights, one whole number a row; every metric of a replicate is then a metric of weighted rows
(replicates.py).

    judged    the blocks of the judged set, drawn with replacement (Efron 1979): the error of its
              value
    true_sets what another true set of the same structure would have given: the sampling floor

A plain bootstrap of true rows would give floors that are too high, because it adds the pool's own
deviation from the law to that of a set drawn from the pool. `true_sets` predicts instead. The pool
holds all true rows at hand, those of the reference among them. A law is drawn first, by Dirichlet
weights on the pool's blocks (Rubin 1981), then a set from that law. If n, r and p count the
independent rows of the set, the reference and the rest of the pool, and a statistic has the
variance s² in one row, then the pool's mean misses the reference's by s² p/(r (r + p)) and the two
draws add s²/(r + p) and s²/n: together s² (1/r + 1/n), which is what an independent set and this
reference differ by.
"""

import collections
import dataclasses
import zlib

import numpy as np

DRAWS = 200
FEW = 200  # independent rows below which a floor is called wide


@dataclasses.dataclass(frozen=True)
class Rows:
  """Where the rows of a set come from.

  Attributes:
    block: [S] whole numbers, the trajectory of each row. Rows of different blocks are independent.
    time: [S] the time of each row, any unit; zeros where time means nothing.
  """

  block: np.ndarray
  time: np.ndarray

  def __post_init__(self):
    if (
      self.block.ndim != 1 or self.block.shape != self.time.shape or len(self.block) < 1
    ):
      raise ValueError(
        f"blocks {self.block.shape} and times {self.time.shape}: need one of each a row, at least "
        "one row."
      )

  def __len__(self) -> int:
    return len(self.block)

  @property
  def blocks(self) -> int:
    return len(np.unique(self.block))

  @property
  def structure(self) -> tuple[int, int]:
    """(rows, blocks): sets that share it share a floor."""
    return len(self), self.blocks

  def groups(self) -> list[np.ndarray]:
    """The row numbers of every block, blocks in the order of their numbers."""
    order = np.argsort(self.block, kind="stable")
    edges = np.flatnonzero(np.diff(self.block[order])) + 1
    return np.split(order, edges)


def single(count: int) -> Rows:
  """The structure of `count` independent rows."""
  return Rows(np.arange(count), np.zeros(count))


def joined(*sets: Rows) -> Rows:
  """Sets one behind the other, whose blocks are different trajectories although their numbers may
  agree.
  """
  block, first = [], 0
  for each in sets:
    numbers = np.unique(each.block, return_inverse=True)[1]
    block.append(numbers + first)
    first += each.blocks
  return Rows(np.concatenate(block), np.concatenate([each.time for each in sets]))


def generator(seed: int, purpose: str) -> np.random.Generator:
  """A generator of its own for every purpose; its bits do not depend on numpy's default."""
  return np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(purpose.encode())]))


def judged(rows: Rows, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
  """[draws, S] float32 weights of a bootstrap over the set's own blocks."""
  rng, blocks = generator(seed, "judged"), rows.blocks
  number = np.unique(rows.block, return_inverse=True)[1]
  counts = rng.multinomial(blocks, np.full(blocks, 1 / blocks), size=draws)
  return counts[:, number].astype(np.float32)


def true_sets(
  pool: Rows,
  like: Rows,
  draws: int = DRAWS,
  seed: int = 0,
) -> np.ndarray:
  """[draws, P] float32 weights of true sets with the structure of `like`, drawn as this file's head
  says.

  Each block of `like` takes one of the pool's blocks, and of that the rows nearest to its own
  times.
  """
  rng = generator(seed, "true sets")
  candidates = pool.groups()
  edges = np.cumsum(
    rng.exponential(size=(draws, len(candidates))),
    axis=1,
  )
  weights = np.zeros((draws, len(pool)), np.float32)
  for times, count in _patterns(like).items():
    table = np.stack([_nearest(group, pool.time, times) for group in candidates])
    for draw in range(draws):
      place = rng.random(count) * edges[draw, -1]
      chosen = np.minimum(np.searchsorted(edges[draw], place), len(candidates) - 1)
      weights[draw] += np.bincount(table[chosen].ravel(), minlength=len(pool))
  return weights


def _patterns(like: Rows) -> dict[tuple[float, ...], int]:
  """{times of the rows of a block: how many blocks have them}."""
  found = collections.Counter(
    tuple(like.time[group].tolist()) for group in like.groups()
  )
  return dict(found)


def _nearest(
  rows: np.ndarray, time: np.ndarray, wanted: tuple[float, ...]
) -> np.ndarray:
  """Of `rows`, those nearest in time to each of `wanted`; each once, while there are enough."""
  free, found = list(rows), []
  for moment in wanted:
    free = free or list(rows)
    best = int(np.argmin(np.abs(time[free] - moment)))
    found.append(free.pop(best))
  return np.array(found)
