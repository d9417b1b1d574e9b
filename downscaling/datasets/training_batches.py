"""Grain over a TFDS source: the example at (seed, step, row) is a pure function of those three.

There is no iterator state to save: the position is the global step, so a run resumes exactly on any
number of processes, each of which reads only the rows of its own devices.
"""

import functools
from collections.abc import Iterator

import grain
import jax
import numpy as np

from downscaling.runtime import mesh as meshes


class Batches:
  """Batches of normalised snapshots.

  Args:
    source: random access to {"u": [*space, C]}, with __getitems__.
    statistics: its normalise() is applied.
    batch: rows a step over all processes.
    seed: of the order; every epoch is shuffled anew.
  """

  def __init__(self, source, statistics, batch: int, seed: int):
    if len(source) < batch:
      raise ValueError(
        f"{len(source)} training snapshots, a batch of {batch}: generate more or lower "
        "--config.train.batch."
      )
    self.source, self.statistics, self.batch = source, statistics, batch
    self.seed = seed

  def indices(self, step: int, which: np.ndarray | None = None) -> np.ndarray:
    """Source indices of rows `which` of the batch of a step, [len(which)]; of all by default."""
    size = len(self.source)
    position = step * self.batch + (
      np.arange(self.batch) if which is None else np.asarray(which)
    )
    epochs, place = np.divmod(position, size)
    out = np.empty_like(position)
    for epoch in np.unique(epochs):
      inside = epochs == epoch
      out[inside] = _order(size, self.seed, int(epoch))[place[inside]]
    return out

  def rows(self, step: int, which: np.ndarray) -> dict[str, np.ndarray]:
    """Rows `which` of the batch of a step: {"x": [len(which), *space, C]}, normalised float32."""
    examples = self.source.__getitems__(self.indices(step, which).tolist())
    u = np.stack([example["u"] for example in examples])
    finite = np.isfinite(u).reshape(len(u), -1).all(1)
    if not finite.all():
      bad = examples[int(np.argmin(finite))]
      raise ValueError(
        f"trajectory {bad['trajectory']} at time {bad['time']:g} of the training split holds NaN "
        "or infinity: generate the data anew in another --workdir."
      )
    return {"x": self.statistics.normalise(u)}

  def stream(
    self, mesh: jax.sharding.Mesh, first_step: int, last_step: int
  ) -> Iterator[dict[str, jax.Array]]:
    """Global batches of steps first_step … last_step − 1; this process reads only the rows of its
    own devices.

    Threads read ahead, and the next batch is on its way to the devices while a step runs on this
    one.
    """
    mine = meshes.host_rows(mesh, self.batch)
    hosts = (
      grain.MapDataset.range(first_step, last_step)
      .map(lambda step: self.rows(int(step), mine))
      .to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8))
    )
    ahead = None
    for host in hosts:
      now, ahead = ahead, meshes.to_global(mesh, host, self.batch)
      if now is not None:
        yield now
    if ahead is not None:
      yield ahead


@functools.lru_cache(maxsize=4)
def _order(size: int, seed: int, epoch: int) -> np.ndarray:
  """The order of an epoch, [size]: one sort for all of it, where Grain's shuffle takes 70 µs an
  index.

  A bit generator's raw words are the same in every version of numpy, which Generator.permutation
  does not promise.
  """
  return np.argsort(
    np.random.Philox(key=[seed, epoch]).random_raw(size),
    kind="stable",
  )
