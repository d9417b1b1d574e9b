"""Equivariant maps in closed form: they move a field as little as its statistics ask, and keep its own weather.

An EquivariantMap is a sequence of steps, each of which commutes with the group it was fitted for:

    G  Gaussian      T(y) = b + A^−½ (A^½ B A^½)^½ A^−½ (y − a), optimal between group-averaged Gaussians
    Q  Quantiles     a monotone function of each value, pooled over rows and over the points of an orbit
    A  Transfer      y + Σ_k τ_k P_k N(y): the equation's quadratic term with one coefficient a shell k, until the
                     energy that N moves into each shell, Re E[ŷ* N̂], is the target's; a G follows each
    S  Quantiles     y + hᵀ∗(q(h∗y) − h∗y): Q on a random filter h that the group leaves alone up to a sign, |ĥ| ≤ 1

`fit` builds one by a recipe from sums over blocks of rows (moments.py). Unlike the entropic map, none of them looks
rows up, so they extrapolate: the Gaussian one linearly, the others linearly beyond the range of the fit.
"""

import dataclasses
import hashlib
import math
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import ClassVar

import jax
import numpy as np
import scipy.special

from downscaling.common import runs, symmetry
from downscaling.debias import moments
from downscaling.debias.transport import check_finite

SCHEMA = 1
BLOCK = 2**20  # values of a block of rows, when mapping and when fitting
LEVELS, TAIL = 257, 8  # entries of a quantile table; pooled values beyond its last
SLOPE = 16  # entries at either end that give the slope beyond
SAMPLE = 2**18  # values of the rows that give the direction of an A


@dataclasses.dataclass(frozen=True, eq=False)
class Gaussian:
  """b + M (y − a). a, b: means, [*space]; matrix: M in moments.Frame's blocks, [K, m, m]; with 1-D shifts K gains."""

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

  x, y: the tables of q, [O, T], one an orbit; orbit, sign: of each point, [n] (moments.Pool); reach: lowest and highest
  value of the fit, [2, O]; filter: ĥ [*half space] complex, or empty.
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
    return y + moments.fields(moments.waves(change) * self.filter.conj(), y.shape[1:])

  def filtered(self, y: np.ndarray) -> np.ndarray:
    """h∗y with the signs of the orbits' representatives, [S, n]."""
    v = moments.fields(moments.waves(y) * self.filter, y.shape[1:]) if self.filter.size else y
    return v.reshape(len(y), -1) * self.sign

  def map(self, v: np.ndarray) -> np.ndarray:
    """q of signed values [S, n]: linear between quantiles, and beyond them with the mean slope of the tail."""
    out = np.empty_like(v)
    for o, (x, y) in enumerate(zip(self.x, self.y, strict=True)):
      points = slice(None) if len(self.x) == 1 else np.flatnonzero(self.orbit == o)
      w = v[:, points]
      q = np.interp(w, x, y)
      for end, inner, beyond in ((0, SLOPE, np.minimum(w - x[0], 0)), (-1, -1 - SLOPE, np.maximum(w - x[-1], 0))):
        run = x[end] - x[inner]
        q += beyond * ((y[end] - y[inner]) / run if run else 1.0)
      out[:, points] = q
    return out

  def outside(self, y: np.ndarray) -> np.ndarray:
    v = self.filtered(y)
    return ((v < self.reach[0][self.orbit]) | (v > self.reach[1][self.orbit])).any(axis=1)


@dataclasses.dataclass(frozen=True, eq=False)
class Transfer:
  """y + Σ_k τ_k P_k N(y). coefficients: τ, one a shell, [K]; quadratic: N's key in moments.QUADRATIC."""

  kind: ClassVar[str] = "transfer"
  coefficients: np.ndarray
  quadratic: str

  def __call__(self, y: np.ndarray) -> np.ndarray:
    term = moments.waves(moments.QUADRATIC[self.quadratic](y))
    return y + moments.fields(term * self.coefficients[moments.shells(y.shape[1:])], y.shape[1:])

  def outside(self, y: np.ndarray) -> np.ndarray:
    return np.zeros(len(y), bool)


Step = Gaussian | Quantiles | Transfer
KINDS = {step.kind: step for step in (Gaussian, Quantiles, Transfer)}


@dataclasses.dataclass(frozen=True, eq=False)
class EquivariantMap:
  """The steps one after the other. grid: (*space, 1)."""

  steps: tuple[Step, ...]
  grid: tuple[int, ...]

  def __call__(self, y: np.ndarray) -> np.ndarray:
    """T(y), in float64 block by block: [S, *space, 1] -> the same shape, float32.

    Raises: ValueError for another grid, or naming the rows that hold NaN or infinities.
    """
    out = np.empty(np.shape(y), np.float32)
    for rows, block in _blocks(self._rows(y)):
      for step in self.steps:
        block = step(block)
      out[rows] = block[..., None]
    return out

  def outside(self, y: np.ndarray) -> np.ndarray:
    """Which rows a quantile step had to extrapolate: a value, there, beyond all of the fit's; [S] bool."""
    out = np.zeros(len(y), bool)
    for rows, block in _blocks(self._rows(y)):
      for step in self.steps:
        out[rows] |= step.outside(block)
        block = step(block)
    return out

  def _rows(self, y: np.ndarray) -> np.ndarray:
    if np.shape(y)[1:] != self.grid:
      raise ValueError(
        f"rows of shape {np.shape(y)[1:]} came, the map was fitted on {self.grid} (space, channels): coarsen or "
        "interpolate to that grid first, or fit a map on yours (downscaling debias)."
      )
    check_finite(y, "the rows to map")
    return np.asarray(y)[..., 0]

  def save(self, folder: str | os.PathLike) -> None:
    """Writes FOLDER/arrays.npz and then FOLDER/map.json, which holds the steps and the arrays' shapes and SHA-256."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays, steps = {}, []
    for i, step in enumerate(self.steps):
      values = {field.name: getattr(step, field.name) for field in dataclasses.fields(step)}
      arrays |= {f"{i}.{name}": a for name, a in values.items() if isinstance(a, np.ndarray)}
      steps.append({"kind": step.kind} | {name: v for name, v in values.items() if not isinstance(v, np.ndarray)})
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
      {"schema": SCHEMA, "kind": "equivariant", "grid": self.grid, "steps": steps, "arrays": record},
    )

  @classmethod
  def load(cls, folder: str | os.PathLike) -> "EquivariantMap":
    """Reads what `save` wrote.

    Raises: FileNotFoundError if there is no map; ValueError if it is damaged or of another schema.
    """
    folder = pathlib.Path(folder)
    if not (folder / "map.json").exists():
      raise FileNotFoundError(f"no debiasing map in {folder} (map.json is missing): run `downscaling debias` first.")
    record = runs.read_json(folder / "map.json")
    if (found := (record.get("schema"), record.get("kind"))) != (SCHEMA, "equivariant"):
      raise ValueError(f"{folder}/map.json has schema and kind {found}, this version reads {(SCHEMA, 'equivariant')}.")
    try:
      with open(folder / "arrays.npz", "rb") as file, np.load(file, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in record["arrays"]}
        wrong = sorted(set(stored.files) ^ set(arrays))
      wrong += [name for name, a in arrays.items() if _digest(a) != record["arrays"][name]["sha256"]]
      steps = tuple(_step(i, said, arrays) for i, said in enumerate(record["steps"])) if not wrong else ()
    except Exception as error:  # zipfile, zlib and numpy raise many kinds for a damaged file
      wrong = [f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"]
    if wrong:
      raise ValueError(
        f"{folder}/arrays.npz is damaged or not map.json's ({', '.join(wrong)}): move the folder away and run "
        "`downscaling debias` again."
      )
    return cls(steps, tuple(record["grid"]))


def _step(i: int, said: dict, arrays: dict[str, np.ndarray]) -> Step:
  own = {name.split(".", 1)[1]: a for name, a in arrays.items() if name.startswith(f"{i}.")}
  return KINDS[said["kind"]](**own, **{name: value for name, value in said.items() if name != "kind"})


def _digest(array: np.ndarray) -> str:
  return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _blocks(rows: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
  """(place, block in float64) of rows [S, *space]."""
  step = max(1, BLOCK // math.prod(rows.shape[1:]))
  for first in range(0, len(rows), step):
    yield slice(first, first + step), np.asarray(rows[first : first + step], np.float64)


# ---------------------------------------------------------------- the fit


def fit(
  source: np.ndarray,
  target: np.ndarray,
  *,
  group: symmetry.Group,
  recipe: str | tuple[str | tuple[str, int], ...] = "G",
  quadratic: str | None = None,
  seed: int = 0,
  damping: float = 1.0,
  scratch: str | os.PathLike | None = None,
) -> EquivariantMap:
  """The equivariant map of unpaired clouds by a recipe.

  Each step is fitted on source rows as the steps before it left them. In memory are one block of either cloud, the
  sums, and a float64 copy of the source, which `scratch` puts on disk instead.

  Args:
    source, target: [S, *space, 1], [R, *space, 1], finite; memory maps serve.
    group: symmetry of the grid; symmetry.trivial(n) if there is none.
    recipe: letters of the steps in order, "GQG", or with counts, ("G", ("A", 12), ("S", 60)). An A is followed by a G.
    quadratic: the equation's name in moments.QUADRATIC, for A.
    seed: of the filters: that of the j-th S is drawn from fold_in(PRNGKey(seed), j).
    damping: share of a Newton step that an A takes, in (0, 1].
    scratch: a folder, or None.
  Raises: ValueError, saying what to type, for clouds that cannot be fitted and recipes that cannot be read.
  """
  letters = _letters(recipe, quadratic, damping)
  source, target = _cloud(source, "source"), _cloud(target, "target")
  if source.shape[1:] != target.shape[1:]:
    raise ValueError(f"source rows are {source.shape[1:]}, target rows {target.shape[1:]}: bring both to one grid.")
  fitting = _Fit(source, target, group, quadratic, seed, damping, scratch)
  steps = []
  for letter in letters:
    for make in (fitting.transfer, fitting.gaussian) if letter == "A" else (fitting.makers[letter],):
      steps.append(make())
      fitting.advance(steps[-1])
  return EquivariantMap(tuple(steps), (*source.shape[1:], 1))


def _letters(recipe, quadratic, damping) -> str:
  try:
    parts = [(part, 1) if isinstance(part, str) else (part[0], int(part[1])) for part in recipe]
    letters = "".join(name * count for name, count in parts)
    good = bool(letters) and set("".join(name for name, _ in parts)) <= set("GQAS") and min(c for _, c in parts) >= 0
  except (TypeError, ValueError, IndexError):
    good = False
  if not good:
    raise ValueError(
      f"recipe={recipe!r} cannot be read: need letters of G, Q, A and S, as 'GQG', or with counts, as "
      "('G', ('A', 12), ('S', 60))."
    )
  if "A" in letters and quadratic not in moments.QUADRATIC:
    raise ValueError(
      f"recipe={recipe!r} has an A and quadratic={quadratic!r}: A needs the equation's quadratic term; known: "
      f"{sorted(moments.QUADRATIC)}. For other data leave A out, e.g. recipe='GQG'."
    )
  if not 0 < damping <= 1:
    raise ValueError(f"damping={damping}: a share of a Newton step, in (0, 1]; 1 unless A does not settle.")
  return letters


def _cloud(rows: np.ndarray, name: str) -> np.ndarray:
  if np.ndim(rows) < 3 or np.shape(rows)[-1] != 1 or len(rows) < 2:
    raise ValueError(
      f"the {name} rows are {np.shape(rows)}: need [S, *space, 1], 2 rows or more, one channel. Fit a map for each "
      "channel, rows[..., c : c + 1]; give fields without a channel axis one, rows[..., None]."
    )
  check_finite(rows, f"the {name} rows")
  rows = np.asarray(rows)[..., 0]
  if all((block == rows[0]).all() for _, block in _blocks(rows)):
    raise ValueError(f"all {len(rows)} {name} rows are the same: there is nothing to fit. Hand in more snapshots.")
  return rows


class _Fit:
  """What the makers of steps share: `current` are the source rows as the steps so far left them."""

  def __init__(self, source, target, group, quadratic, seed, damping, scratch):
    self.target, self.group, self.space = target, group, source.shape[1:]
    self.quadratic, self.damping, self.key, self.slices = quadratic, damping, jax.random.PRNGKey(seed), 0
    self.frame, self.pool = moments.Frame.of(group, self.space), moments.Pool.of(group)
    self.makers = {"G": self.gaussian, "Q": self.quantiles, "A": self.transfer, "S": self.sliced}
    if scratch is None:
      self.current = np.array(source, np.float64)
    else:
      with tempfile.TemporaryFile(dir=scratch) as file:
        self.current = np.memmap(file, np.float64, "w+", shape=source.shape)
      for place, block in _blocks(source):
        self.current[place] = block
    self.known, self.kinds = {}, None

  def advance(self, step: Step) -> None:
    for place, block in _blocks(self.current):
      self.current[place] = step(block)

  def sums(self, which: str, of: Callable, join: Callable = lambda a, b: a + b):
    """Σ over blocks of `of(block)` for "current" or "target"."""
    total = None
    for _, block in _blocks(getattr(self, which)):
      part = of(block)
      total = part if total is None else join(total, part)
    return total

  def once(self, of: Callable):
    """The same for the target, kept: it does not change."""
    if of not in self.known:
      self.known[of] = self.sums("target", of)
    return self.known[of]

  def _moments(self, block):
    return moments.Moments.of(block, self.frame)

  def _transfer(self, block):
    return moments.Transfer.of(block, moments.QUADRATIC[self.quadratic])

  def gaussian(self) -> Gaussian:
    (a, cov), (b, goal) = (
      m.averaged(self.group, self.frame) for m in (self.sums("current", self._moments), self.once(self._moments))
    )
    return Gaussian(a, b, self.frame.average(moments.optimal(cov, goal)))

  def transfer(self) -> Transfer:
    now, goal = self.sums("current", self._transfer), self.once(self._transfer)
    few = self.current[:: max(1, self.current.size // SAMPLE)]  # a direction asks for less than the gap
    gap = goal.transfer / goal.count - now.transfer / now.count
    matrix = moments.response(np.asarray(few), moments.QUADRATIC[self.quadratic])
    return Transfer(self.damping * moments.newton(gap, matrix, now.power / now.count), self.quadratic)

  def quantiles(self) -> Quantiles:
    return self._quantiles(self.pool, np.zeros(0, complex))

  def sliced(self) -> Quantiles:
    self.kinds = self.kinds or moments.filters(self.group, self.space)
    shells = moments.shells(self.space)
    kind, weight = moments.draw(jax.random.fold_in(self.key, self.slices), len(self.kinds), shells.max() + 1)
    self.slices += 1
    factor, character = self.kinds[kind]
    return self._quantiles(moments.Pool.of(self.group, character), factor * weight[shells])

  def _quantiles(self, pool: moments.Pool, h: np.ndarray) -> Quantiles:
    blank = np.zeros((len(pool.odd), 2))
    step = Quantiles(blank, blank, blank, pool.orbit.astype(np.int32), pool.sign.astype(np.int8), h)
    tables = []
    for which in ("current", "target"):
      reach = self.sums(
        which,
        lambda block: pool.range(step.filtered(block)),
        lambda a, b: np.stack([np.minimum(a[0], b[0]), np.maximum(a[1], b[1])]),
      )
      counts = self.sums(which, lambda block, reach=reach: pool.counts(step.filtered(block), reach))
      tables.append((reach, counts))
    fewest = min(counts.sum(axis=1).min() for _, counts in tables)
    end = scipy.special.ndtri(min(TAIL / fewest, 0.25))  # even in the normal deviate: most levels in the tails
    levels = scipy.special.ndtr(np.linspace(end, -end, LEVELS))
    x, y = (moments.quantiles(counts, reach, levels) for reach, counts in tables)
    x, y = (np.where(pool.odd[:, None], (t - t[:, ::-1]) / 2, t) for t in (x, y))
    return dataclasses.replace(step, x=x, y=y, reach=tables[0][0])
