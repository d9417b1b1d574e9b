"""The entropic map: what a Sinkhorn fit says about snapshots it has not seen; saved as data, loaded
anywhere.

    T(y) = Σ_j w_j(y) y′_j,   w_j ∝ exp((g_j − |y − y′_j|²)/ε)

(Pooladian & Niles-Weed 2021, arXiv:2109.12004, eq. 3). On the rows of the fit it is the plan's
barycentric projection. With a group the mean goes over the orbits of all targets, so T(m·y) =
m·T(y).
"""

import dataclasses
import functools
import math
import os
from collections.abc import Iterator
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from downscaling.debias import map_files
from downscaling.debias.entropic import soft_min
from downscaling.fields import symmetry

ARRAYS = ("target", "g", "group_index", "group_sign")
# Rows mapped at a time; the last block is padded, so one program serves any number of rows.
BLOCK = 1024


@dataclasses.dataclass(frozen=True, eq=False)
class EntropicMap:
  """T for snapshots of shape `grid`.

  target: cloud y′, [m, d] float32, d = Πgrid; g: potential, [m], units of the squared cost;
    epsilon: > 0, same units;
  grid: (*space, C). group: that the potentials were fitted with, or None. reach: of the rows of the
    fit, see reach_of.
  """

  kind: ClassVar[str] = "entropic"
  target: np.ndarray
  g: np.ndarray
  epsilon: float
  grid: tuple[int, ...]
  group: symmetry.Group | None = None
  reach: float | None = None

  def __call__(self, y: np.ndarray) -> np.ndarray:
    """T(y), streamed in blocks from host memory: [S, *space, C] -> the same shape, float32.

    Raises: ValueError for another grid, or naming the rows that hold NaN or infinities.
    """
    return self.transport(y)[0]

  def effective_targets(self, y: np.ndarray) -> np.ndarray:
    """exp(−Σ_j w_j log w_j): over how many targets each row is averaged, [S]; 1 is a look-up, m a
    mean of all.
    """
    rows = self._rows(y)
    return np.concatenate(
      [np.exp(entropy) for _, entropy in self._blocks(rows)]
      or [np.zeros(0, np.float32)]
    )

  def transport(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """T(y) and the effective targets in one pass: [S, *space, C], [S]."""
    rows = self._rows(y)
    mapped, effective = (
      np.empty(rows.shape, np.float32),
      np.empty(len(rows), np.float32),
    )
    for k, (block, entropy) in enumerate(self._blocks(rows)):
      mapped[k * BLOCK : k * BLOCK + len(block)] = block
      effective[k * BLOCK : k * BLOCK + len(block)] = np.exp(entropy)
    return mapped.reshape(np.shape(y)), effective

  def outside(self, y: np.ndarray) -> np.ndarray:
    """Rows farther from the targets' centre than all of the fit's: their image is a guess at the
    cloud's edge; [S].
    """
    distance = np.linalg.norm(
      self._rows(y) - soft_min.centre(self.target, self.group), axis=1
    )
    return distance > (np.inf if self.reach is None else self.reach)

  def _rows(self, y: np.ndarray) -> np.ndarray:
    if np.shape(y)[1:] != self.grid:
      raise ValueError(
        f"rows of shape {np.shape(y)[1:]} came, the map was fitted on {self.grid} (space, "
        "channels): coarsen or interpolate to that grid first, or fit a map on yours (downscaling "
        "debias)."
      )
    check_finite(y, "the rows to map")
    return np.asarray(y).reshape(len(y), math.prod(self.grid))

  def _blocks(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(T [S', d], entropy [S']) block by block."""
    centre, arguments = self._on_device
    for begin in range(0, len(rows), BLOCK):
      block = rows[begin : begin + BLOCK].astype(np.float32)
      padded = np.zeros((BLOCK, block.shape[1]), np.float32)
      padded[: len(block)] = block - centre
      mapped, entropy = jax.device_get(_average(jnp.asarray(padded), *arguments))
      yield mapped[: len(block)] + centre, entropy[: len(block)]

  @functools.cached_property
  def _on_device(self):
    centre = soft_min.centre(self.target, self.group)
    moves = None
    if self.group is not None:
      moves = (
        jnp.asarray(self.group.index.astype(np.int32)),
        jnp.asarray(self.group.sign.astype(np.float32)),
      )
    return centre, (
      jnp.asarray(self.target - centre),
      jnp.asarray(self.g),
      jnp.float32(self.epsilon),
      moves,
    )

  def save(self, folder: str | os.PathLike) -> None:
    """See storage.save."""
    arrays = {"target": self.target, "g": self.g}
    if self.group is not None:
      arrays |= {"group_index": self.group.index, "group_sign": self.group.sign}
    map_files.save(
      folder,
      self.kind,
      {"epsilon": self.epsilon, "grid": self.grid, "reach": self.reach},
      arrays,
    )

  @classmethod
  def load(cls, folder: str | os.PathLike) -> "EntropicMap":
    """Reads what `save` wrote. Raises: see storage.load."""
    record, arrays = map_files.load(folder, cls.kind)
    if not {"target", "g"} <= set(arrays) or set(arrays) - set(ARRAYS):
      raise map_files.damaged(folder, ", ".join(sorted(arrays)))
    group = (
      symmetry.Group(arrays["group_index"], arrays["group_sign"])
      if "group_index" in arrays
      else None
    )
    return cls(
      arrays["target"],
      arrays["g"],
      float(record["epsilon"]),
      tuple(record["grid"]),
      group,
      record.get("reach"),
    )


def reach_of(
  source: np.ndarray, target: np.ndarray, group: symmetry.Group | None = None
) -> float:
  """Largest distance of rows [n, d] from the centre of the targets [m, d]."""
  return float(
    np.linalg.norm(
      source - soft_min.centre(target, group),
      axis=1,
    ).max()
  )


@jax.jit
def _average(rows, target, g, epsilon, moves):
  if moves is None:
    return soft_min.soft_average(rows, target, g, epsilon)
  return soft_min.orbit_average(rows, target, g, epsilon, moves)


def check_finite(rows: np.ndarray, what: str) -> None:
  """Raises ValueError naming the rows of [S, ...] that hold NaN or infinities."""
  bad = np.flatnonzero(~np.isfinite(rows).all(axis=tuple(range(1, np.ndim(rows)))))
  if len(bad):
    shown = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
    raise ValueError(
      f"{what} hold NaN or infinities in {len(bad)} of {len(rows)} rows ({shown}): drop or fill "
      "those rows first."
    )
