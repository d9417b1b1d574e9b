"""Grain over a TFDS source: the example at (seed, step, row) is a pure function of those three.

There is no iterator state to save: the position is the global step, so a run resumes exactly on any number of
processes, each of which reads only the rows of its own devices.
"""

from collections.abc import Iterator

import grain
import jax
import numpy as np

from downscaling.common import mesh as meshes


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
        f"{len(source)} training snapshots, a batch of {batch}: generate more or lower --config.train.batch."
      )
    self.source, self.statistics, self.batch = source, statistics, batch
    self._order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()

  def indices(self, step: int) -> np.ndarray:
    """Source indices of the batch of a step, [B]."""
    return np.array([self._order[step * self.batch + row] for row in range(self.batch)])

  def rows(self, step: int, which: np.ndarray) -> dict[str, np.ndarray]:
    """Rows `which` of the batch of a step: {"x": [len(which), *space, C]}, normalised float32."""
    index = [self._order[step * self.batch + int(row)] for row in which]
    examples = self.source.__getitems__(index)
    u = np.stack([example["u"] for example in examples])
    if not (finite := np.isfinite(u).reshape(len(u), -1).all(1)).all():
      bad = examples[int(np.argmin(finite))]
      raise ValueError(
        f"trajectory {bad['trajectory']} at time {bad['time']:g} of the training split holds NaN or infinity: generate "
        "the data anew in another --workdir."
      )
    return {"x": self.statistics.normalise(u)}

  def stream(self, mesh: jax.sharding.Mesh, first_step: int, last_step: int) -> Iterator[dict[str, jax.Array]]:
    """Global batches of steps first_step … last_step − 1; this process reads only the rows of its own devices.

    Threads read ahead, and the next batch is on its way to the devices while a step runs on this one.
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
