"""The entropic map: what a Sinkhorn fit says about snapshots it has not seen; saved as data, loaded anywhere.

    T(y) = Σ_j w_j(y) y′_j,   w_j ∝ exp((g_j − |y − y′_j|²)/ε)

(Pooladian & Niles-Weed 2021, arXiv:2109.12004, eq. 3). On the rows of the fit it is the plan's barycentric projection.
With a group the mean goes over the orbits of all targets, so T(m·y) = m·T(y).
"""

import dataclasses
import functools
import hashlib
import math
import os
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from downscaling.common import runs, symmetry
from downscaling.debias import geometry

SCHEMA = 1
ARRAYS = ("target", "g", "group_index", "group_sign")
BLOCK = 1024  # rows mapped at a time; the last block is padded, so one program serves any number of rows


@dataclasses.dataclass(frozen=True, eq=False)
class EntropicMap:
  """T for snapshots of shape `grid`.

  target: cloud y′, [m, d] float32, d = Πgrid; g: potential, [m], units of the squared cost; epsilon: > 0, same units;
  grid: (*space, C). group: that the potentials were fitted with, or None.
  """

  target: np.ndarray
  g: np.ndarray
  epsilon: float
  grid: tuple[int, ...]
  group: symmetry.Group | None = None

  def __call__(self, y: np.ndarray) -> np.ndarray:
    """T(y), streamed in blocks from host memory: [S, *space, C] -> the same shape, float32.

    Raises: ValueError for another grid, or naming the rows that hold NaN or infinities.
    """
    return self.transport(y)[0]

  def effective_targets(self, y: np.ndarray) -> np.ndarray:
    """exp(−Σ_j w_j log w_j): over how many targets each row is averaged, [S]; 1 is a look-up, m a mean of all."""
    rows = self._rows(y)
    return np.concatenate([np.exp(entropy) for _, entropy in self._blocks(rows)] or [np.zeros(0, np.float32)])

  def transport(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """T(y) and the effective targets in one pass: [S, *space, C], [S]."""
    rows = self._rows(y)
    mapped, effective = np.empty(rows.shape, np.float32), np.empty(len(rows), np.float32)
    for k, (block, entropy) in enumerate(self._blocks(rows)):
      mapped[k * BLOCK : k * BLOCK + len(block)] = block
      effective[k * BLOCK : k * BLOCK + len(block)] = np.exp(entropy)
    return mapped.reshape(np.shape(y)), effective

  def _rows(self, y: np.ndarray) -> np.ndarray:
    if np.shape(y)[1:] != self.grid:
      raise ValueError(
        f"rows of shape {np.shape(y)[1:]} came, the map was fitted on {self.grid} (space, channels): coarsen or "
        "interpolate to that grid first, or fit a map on yours (downscaling debias)."
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
    centre = geometry.centre(self.target, self.group)
    moves = None
    if self.group is not None:
      moves = jnp.asarray(self.group.index.astype(np.int32)), jnp.asarray(self.group.sign.astype(np.float32))
    return centre, (jnp.asarray(self.target - centre), jnp.asarray(self.g), jnp.float32(self.epsilon), moves)

  def save(self, folder: str | os.PathLike) -> None:
    """Writes FOLDER/arrays.npz and then FOLDER/map.json, which holds the arrays' shapes and SHA-256."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {"target": self.target, "g": self.g}
    if self.group is not None:
      arrays |= {"group_index": self.group.index, "group_sign": self.group.sign}
    temporary = folder / f".arrays.{os.getpid()}.tmp"
    try:
      with open(temporary, "wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
      os.replace(temporary, folder / "arrays.npz")
    finally:
      temporary.unlink(missing_ok=True)
    record = {name: {"shape": a.shape, "dtype": str(a.dtype), "sha256": _digest(a)} for name, a in arrays.items()}
    runs.write_json(
      folder / "map.json",
      {"schema": SCHEMA, "kind": "entropic", "epsilon": self.epsilon, "grid": self.grid, "arrays": record},
    )

  @classmethod
  def load(cls, folder: str | os.PathLike) -> "EntropicMap":
    """Reads what `save` wrote.

    Raises: FileNotFoundError if there is no map; ValueError if it is damaged or of another schema.
    """
    folder = pathlib.Path(folder)
    if not (folder / "map.json").exists():
      raise FileNotFoundError(f"no debiasing map in {folder} (map.json is missing): run `downscaling debias` first.")
    record = runs.read_json(folder / "map.json")
    if (found := (record.get("schema"), record.get("kind"))) != (SCHEMA, "entropic"):
      raise ValueError(f"{folder}/map.json has schema and kind {found}, this version reads {(SCHEMA, 'entropic')}.")
    try:
      with open(folder / "arrays.npz", "rb") as file, np.load(file, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in record["arrays"]}
      damaged = [name for name, a in arrays.items() if _digest(a) != record["arrays"][name]["sha256"]]
    except Exception as error:  # zipfile, zlib and numpy raise many kinds for a damaged file
      arrays, damaged = {}, [f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"]
    if damaged or not {"target", "g"} <= set(arrays) or set(arrays) - set(ARRAYS):
      raise ValueError(
        f"{folder}/arrays.npz is damaged or not map.json's ({', '.join(damaged) or sorted(arrays)}): move the folder "
        "away and run `downscaling debias` again, which goes on from its checkpoints."
      )
    group = symmetry.Group(arrays["group_index"], arrays["group_sign"]) if "group_index" in arrays else None
    return cls(arrays["target"], arrays["g"], float(record["epsilon"]), tuple(record["grid"]), group)


@jax.jit
def _average(rows, target, g, epsilon, moves):
  if moves is None:
    return geometry.soft_average(rows, target, g, epsilon)
  return geometry.orbit_average(rows, target, g, epsilon, moves)


def _digest(array: np.ndarray) -> str:
  return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def check_finite(rows: np.ndarray, what: str) -> None:
  """Raises ValueError naming the rows of [S, ...] that hold NaN or infinities."""
  bad = np.flatnonzero(~np.isfinite(rows).all(axis=tuple(range(1, np.ndim(rows)))))
  if len(bad):
    shown = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
    raise ValueError(
      f"{what} hold NaN or infinities in {len(bad)} of {len(rows)} rows ({shown}): drop or fill those rows first."
    )
