"""Equivariant maps in closed form: they move a field as little as its statistics ask, and keep its
own weather.

An EquivariantMap is a sequence of steps, each of which commutes with the group it was fitted for:

    G  Gaussian      T(y) = b + A^−½ (A^½ B A^½)^½ A^−½ (y − a), optimal between group-averaged
                     Gaussians
    Q  Quantiles     a monotone function of each value, pooled over rows and the points of an orbit
    A  Transfer      y + Σ_k τ_k P_k N(y): the equation's quadratic term with one coefficient a
                     shell k, until the energy that N moves into each shell, Re E[ŷ* N̂], is the
                     target's; a G follows each
    S  Quantiles     y + hᵀ∗(q(h∗y) − h∗y): Q on a random filter h that the group leaves alone up to
                     a sign, |ĥ| ≤ 1
    M  Matching      y + Σ_t λ_t ∇φ_t(y): statistics of second to fourth order, matched by the least
                     displacement
    N  Network       y + η ∇f(y): f the logit of a classifier that tells mapped rows from true ones

recipes.py fits one from sums over blocks of rows (moments.py, matching.py). Unlike the entropic
map, none of them looks rows up, so they extrapolate: the Gaussian one linearly, quantiles linearly
beyond the range of the fit, matching by at most the largest share of its size that a row of the fit
was moved by.
"""

import dataclasses
import math
import os
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from downscaling.debias import map_files
from downscaling.debias.entropic.entropic_map import check_finite
from downscaling.debias.equivariant import matching, moments, network_step
from downscaling.fields import quadratic as quadratic_terms
from downscaling.fields.quadratic import ARRAYS, Quadratic

BLOCK = 2**20  # values of a block of rows, when mapping and when fitting
SLOPE = 16  # entries at either end that give the slope beyond


@dataclasses.dataclass(frozen=True, eq=False)
class Gaussian:
  """b + M (y − a). a, b: means, [*space]; matrix: M in moments.Frame's blocks, [K, m, m]; with 1-D
  shifts K gains.
  """

  kind: ClassVar[str] = "gaussian"
  before: np.ndarray
  after: np.ndarray
  matrix: np.ndarray

  def __call__(self, y: np.ndarray) -> np.ndarray:
    z = moments.split(y - self.before, len(self.matrix))
    return moments.merge(self.matrix @ z, y.shape[1:]) + self.after

  def outside(self, y: np.ndarray) -> np.ndarray:
    return np.zeros(len(y), bool)


@dataclasses.dataclass(frozen=True, eq=False)
class Quantiles:
  """y + hᵀ∗(q(h∗y) − h∗y); q(y) where there is no filter.

  x, y: the tables of q, [O, T], one an orbit; orbit, sign: of each point, [n] (moments.Pool);
  reach: lowest and highest value of the fit, [2, O]; filter: ĥ [*half space] complex, or empty.
  """

  kind: ClassVar[str] = "quantiles"
  x: np.ndarray
  y: np.ndarray
  reach: np.ndarray
  orbit: np.ndarray
  sign: np.ndarray
  filter: np.ndarray

  def __call__(self, y: np.ndarray) -> np.ndarray:
    v = self.filtered(y)
    moved = (self.map(v) * self.sign).reshape(y.shape)
    if not self.filter.size:
      return moved
    change = moved - (v * self.sign).reshape(y.shape)
    return y + moments.fields(
      moments.waves(change) * self.filter.conj(),
      y.shape[1:],
    )

  def filtered(self, y: np.ndarray) -> np.ndarray:
    """h∗y with the signs of the orbits' representatives, [S, n]."""
    v = (
      moments.fields(moments.waves(y) * self.filter, y.shape[1:])
      if self.filter.size
      else y
    )
    return v.reshape(len(y), -1) * self.sign

  def map(self, v: np.ndarray) -> np.ndarray:
    """q of signed values [S, n]: linear between quantiles, and beyond them with the mean slope of
    the tail.
    """
    out = np.empty_like(v)
    for o, (x, y) in enumerate(zip(self.x, self.y, strict=True)):
      points = slice(None) if len(self.x) == 1 else np.flatnonzero(self.orbit == o)
      w = v[:, points]
      q = np.interp(w, x, y)
      for end, inner, beyond in (
        (0, SLOPE, np.minimum(w - x[0], 0)),
        (-1, -1 - SLOPE, np.maximum(w - x[-1], 0)),
      ):
        run = x[end] - x[inner]
        q += beyond * ((y[end] - y[inner]) / run if run else 1.0)
      out[:, points] = q
    return out

  def outside(self, y: np.ndarray) -> np.ndarray:
    v = self.filtered(y)
    return ((v < self.reach[0][self.orbit]) | (v > self.reach[1][self.orbit])).any(
      axis=1
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Transfer:
  """y + Σ_k τ_k P_k N(y). coefficients: τ, one a shell, [K]; quadratic: N."""

  kind: ClassVar[str] = "transfer"
  coefficients: np.ndarray
  quadratic: Quadratic

  def __call__(self, y: np.ndarray) -> np.ndarray:
    term = moments.waves(self.quadratic(y))
    return y + moments.fields(
      term * self.coefficients[moments.shells(y.shape[1:])], y.shape[1:]
    )

  def outside(self, y: np.ndarray) -> np.ndarray:
    return np.zeros(len(y), bool)


# In map.json and arrays.npz: the step's quadratic term is the one that is saved.
SAVED, TERM = "saved", "quadratic"
# Older maps hold the name of an equation in place of its term.
BY_EQUATION = {"ks": quadratic_terms.burgers, "kolmogorov": quadratic_terms.advection}

Step = Gaussian | Quantiles | Transfer | matching.Matching | network_step.Network
STEPS = (Gaussian, Quantiles, Transfer, matching.Matching, network_step.Network)
KINDS = {step.kind: step for step in STEPS}


@dataclasses.dataclass(frozen=True, eq=False)
class EquivariantMap:
  """The steps one after the other. grid: (*space, C).

  Several channels are one axis more of the grid, the first, as far as steps know.
  """

  kind: ClassVar[str] = "equivariant"
  steps: tuple[Step, ...]
  grid: tuple[int, ...]

  def __call__(self, y: np.ndarray) -> np.ndarray:
    """T(y), in float64 block by block: [S, *space, C] -> the same shape, float32.

    Raises: ValueError for another grid, or naming the rows that hold NaN or infinities.
    """
    out = np.empty(np.shape(y), np.float32)
    for rows, block in blocks(self._rows(y)):
      for step in self.steps:
        block = step(block)
      out[rows] = channels_last(block, self.grid)
    return out

  def outside(self, y: np.ndarray) -> np.ndarray:
    """Which rows a quantile step had to extrapolate: a value, there, beyond all of the fit's; [S]
    bool.
    """
    out = np.zeros(len(y), bool)
    for rows, block in blocks(self._rows(y)):
      for step in self.steps:
        out[rows] |= step.outside(block)
        block = step(block)
    return out

  def _rows(self, y: np.ndarray) -> np.ndarray:
    if np.shape(y)[1:] != self.grid:
      raise ValueError(
        f"rows of shape {np.shape(y)[1:]} came, the map was fitted on {self.grid} (space, "
        "channels): coarsen or interpolate to that grid first, or fit a map on yours (downscaling "
        "debias)."
      )
    check_finite(y, "the rows to map")
    return channels_first(y)

  def save(self, folder: str | os.PathLike) -> None:
    """See map_files.save; map.json holds the steps.

    The quadratic term, which all steps share, is saved once, as arrays.
    """
    arrays: dict[str, np.ndarray] = {}
    steps = []
    for i, step in enumerate(self.steps):
      said: dict[str, Any] = {"kind": step.kind}
      for field in dataclasses.fields(step):
        value = getattr(step, field.name)
        if isinstance(value, np.ndarray):
          arrays[f"{i}.{field.name}"] = value
        elif isinstance(value, Quadratic):
          said[field.name] = SAVED
          arrays |= {f"{TERM}.{name}": getattr(value, name) for name in ARRAYS}
        else:
          said[field.name] = value
      steps.append(said)
    map_files.save(folder, self.kind, {"grid": self.grid, "steps": steps}, arrays)

  @classmethod
  def load(cls, folder: str | os.PathLike) -> "EquivariantMap":
    """Reads what `save` wrote. Raises: see map_files.load."""
    record, arrays = map_files.load(folder, cls.kind)
    try:
      space = tuple(record["grid"][:-1])
      steps = tuple(
        _step(i, said, arrays, space) for i, said in enumerate(record["steps"])
      )
    except (KeyError, TypeError, AttributeError) as error:
      raise map_files.damaged(folder, f"{type(error).__name__}: {error}") from error
    return cls(steps, tuple(record["grid"]))


def _step(
  i: int, said: dict, arrays: dict[str, np.ndarray], space: tuple[int, ...]
) -> Step:
  own: dict[str, Any] = {
    name.split(".", 1)[1]: a for name, a in arrays.items() if name.startswith(f"{i}.")
  }
  own |= {name: value for name, value in said.items() if name != "kind"}
  term = own.get("quadratic")
  if term == SAVED:
    own["quadratic"] = Quadratic(space, *(arrays[f"{TERM}.{name}"] for name in ARRAYS))
  elif term is not None:
    own["quadratic"] = BY_EQUATION[term](space)
  return KINDS[said["kind"]](**own)


def channels_first(rows: np.ndarray) -> np.ndarray:
  """[S, *space, C] -> [S, C, *space], or [S, *space] of a single channel."""
  rows = np.asarray(rows)
  return rows[..., 0] if rows.shape[-1] == 1 else np.moveaxis(rows, -1, 1)


def channels_last(rows: np.ndarray, grid: tuple[int, ...]) -> np.ndarray:
  """The inverse of `channels_first`; grid: (*space, C)."""
  return rows[..., None] if grid[-1] == 1 else np.moveaxis(rows, 1, -1)


def blocks(rows: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
  """(place, block in float64) of rows [S, *space]."""
  step = max(1, BLOCK // math.prod(rows.shape[1:]))
  for first in range(0, len(rows), step):
    yield (
      slice(first, first + step),
      np.asarray(
        rows[first : first + step],
        np.float64,
      ),
    )
