"""Empirical quantile mapping, value by value: the debiasing of BCSD.

Wood et al. 2004, doi:10.1023/B:CLIM.0000013685.99609.9e. A point's values are mapped from the
source's quantiles to the target's, whatever other points do; between quantiles the shift is linear,
beyond the outermost it stays what it is there. With a group, points that it carries onto each other
pool their rows, and the map commutes with it.
"""

import dataclasses
import os
from typing import ClassVar

import numpy as np

from downscaling.debias import map_files
from downscaling.fields.symmetry import Group


@dataclasses.dataclass(frozen=True, eq=False)
class QuantileMap:
  """y -> y + shift(y), point by point.

  nodes: quantiles of the source, [Q, *space, C]. shift: those of the target less these, [Q, *space,
  C]. least, most: values of the source between which a row lies within the fit, [*space, C].
  """

  kind: ClassVar[str] = "quantile"
  nodes: np.ndarray
  shift: np.ndarray
  least: np.ndarray
  most: np.ndarray

  def __call__(self, y: np.ndarray) -> np.ndarray:
    """Rows [S, *space, C] -> the same shape, float32."""
    values, nodes, shift = (
      np.reshape(a, (len(a), -1)).T for a in (y, self.nodes, self.shift)
    )
    moved = [
      np.interp(*of_point) for of_point in zip(values, nodes, shift, strict=True)
    ]
    return (y + np.stack(moved, axis=-1).reshape(np.shape(y))).astype(np.float32)

  def outside(self, y: np.ndarray) -> np.ndarray:
    """Which rows have a value beyond all of the fit's at that point, [S]."""
    beyond = (y < self.least) | (y > self.most)
    return np.asarray(beyond.reshape(len(y), -1).any(axis=1))

  def save(self, folder: str | os.PathLike) -> None:
    """Writes arrays.npz and map.json."""
    map_files.save(folder, self.kind, {}, dataclasses.asdict(self))

  @classmethod
  def load(cls, folder: str | os.PathLike) -> "QuantileMap":
    """Reads what `save` wrote. Raises: as map_files.load."""
    _, arrays = map_files.load(folder, cls.kind)
    fields = {field.name for field in dataclasses.fields(cls)}
    if set(arrays) != fields:
      raise map_files.damaged(folder, ", ".join(sorted(set(arrays) ^ fields)))
    return cls(**arrays)


def fit(
  source: np.ndarray, target: np.ndarray, quantiles: int, group: Group | None = None
) -> QuantileMap:
  """From clouds [S, *space, C] and [R, *space, C].

  Args:
    quantiles: their number Q, at (i + 1/2) / Q.
    group: of the grid's points, by which rows are pooled; None: every point has its own.
  Raises: ValueError if there are fewer rows than quantiles.
  """
  rows, shape = min(len(source), len(target)), source.shape[1:]
  if rows < quantiles:
    raise ValueError(
      f"{quantiles} quantiles of {rows} rows a side: use as many rows (config.debias.points) or "
      "fewer --config.debias.quantiles."
    )
  levels = (np.arange(quantiles) + 0.5) / quantiles
  points = int(np.prod(shape))
  whole = group.over_channels(shape[-1], last=True) if group is not None else None
  found = np.empty((2, quantiles, points))
  least, most = np.empty(points), np.empty(points)
  clouds = [np.reshape(cloud, (len(cloud), -1)) for cloud in (source, target)]
  left = np.ones(points, bool)
  for point in range(points):
    if not left[point]:
      continue
    # Where the group takes this point from, and with which sign.
    images = {(point, 1.0)}
    if whole is not None:
      images = set(
        zip(whole.index[:, point].tolist(), whole.sign.tolist(), strict=True)
      )
    before, after = (
      np.concatenate([sign * cloud[:, place] for place, sign in sorted(images)])
      for cloud in clouds
    )
    nodes, shifted = np.quantile(before, levels), np.quantile(after, levels)
    for place, sign in images:
      # A sign turns the order around. Where both signs come, either order is the same.
      order = slice(None) if sign > 0 else slice(None, None, -1)
      found[0, :, place] = sign * nodes[order]
      found[1, :, place] = sign * (shifted - nodes)[order]
      ends = sorted((sign * before.min(), sign * before.max()))
      least[place], most[place] = ends
      left[place] = False
  arrays = [found[i].reshape(quantiles, *shape) for i in (0, 1)]
  edges = [each.reshape(shape) for each in (least, most)]
  return QuantileMap(*(np.asarray(a, np.float32) for a in (*arrays, *edges)))
