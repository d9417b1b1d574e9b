"""What a linear map hides: third and fourth moments of coarse fields, and how far a map moves
beyond need.

Covariance and spectra, the paper's columns, are right after any Gaussian map. Energy transfer,
bispectrum, flatness and the covariance of squares are not, and differ between fields that look
alike in every other column.

    stats = higher_order(rows, quadratic, group)   of the reference once, of each map, of the floor
    errors(stats, reference)                          relative errors, each ≥ 0

Rows are [S, N] or [S, N₀, N₁] without a channel axis. Sums run over blocks of rows.
"""

from collections.abc import Callable

import numpy as np

from downscaling.fields.symmetry import Group
from downscaling.metrics import distances

CUT = 1e-12  # of the largest eigenvalue: rounding of a covariance


def higher_order(
  rows: np.ndarray,
  quadratic: Callable[[np.ndarray], np.ndarray] | None,
  group: Group,
  periodic: tuple[bool, ...] | None = None,
) -> dict[str, np.ndarray]:
  """Third and fourth moments of a set, averaged over the group.

  Args:
    rows: [S, *space], one or two axes. quadratic: N, [S, *space] -> the same, float64, one that
      commutes with the group; None leaves transfer out. group: of the grid; symmetry.trivial(n) if
      there is none.
    periodic: is each axis; None for all of them.
  Returns:
    transfer: Re E[ŷ* N̂] summed over shell k = 1, 2, ..., [K] (of energy if y is a velocity,
    enstrophy if vorticity). energy_transfer, 2-D only: the same over k², of energy if y is
    vorticity.
    bispectrum, 1-D and periodic only: E[ŷ_j ŷ_k ŷ*_{j+k}], 1 ≤ k ≤ j, j + k < N/2, complex; its
      real part is 0 where (x, y) -> (−x, −y) is a symmetry.
    flatness: E y⁴ / (E y²)² over all points, about the mean of each point, []; 3 if Gaussian.
      gradient_flatness: of the differences between neighbours along every axis, across the ends of
      periodic ones.
    square_covariance: of y² about the same mean, [n, n].
  Raises: ValueError for NaN, fewer than two rows, another grid, or a group that is no symmetry of a
    periodic line.
  """
  rows = np.asarray(rows)
  flat, space = distances.rows(rows, "the rows"), rows.shape[1:]
  if len(space) not in (1, 2) or group.index.shape[1] != flat.shape[1]:
    raise ValueError(
      f"rows of {list(space)} and a group that moves {group.index.shape[1]} points: need [S, N] or "
      "[S, N, N] without a channel axis, and the group of that grid."
    )
  mean = flat.mean(axis=0, dtype=np.float64)
  mean = (group.sign[:, None] * mean[group.index]).mean(axis=0)
  sums: dict[str, np.ndarray] = {}
  for _, block in distances.chunks(flat):
    for name, part in _moments(block, mean, space, quadratic, periodic).items():
      sums[name] = sums.get(name, 0.0) + part / len(flat)
  second, fourth, squares = (sums.pop(name) for name in ("second", "fourth", "squares"))
  spread = group.average_covariance(sums.pop("square_products"))
  squares = squares[group.index].mean(axis=0)
  sums["flatness"] = fourth / max(second**2, np.finfo(float).tiny)
  sums["gradient_flatness"] = sums.pop("slope_fourth") / max(
    sums.pop("slope_second") ** 2, np.finfo(float).tiny
  )
  sums["square_covariance"] = spread - np.outer(squares, squares)
  if "bispectrum" in sums:
    sums["bispectrum"] = average_bispectrum(sums["bispectrum"], group)
  return sums


def _moments(block, mean, space, quadratic, periodic) -> dict[str, np.ndarray]:
  """Sums over the rows of one block [S, D]."""
  square = (block - mean) ** 2
  of_rows = row_moments(block, mean, space, quadratic, periodic)
  sums = {name: part.sum(axis=0) for name, part in of_rows.items()}
  return sums | {"squares": square.sum(axis=0), "square_products": square.T @ square}


def row_moments(block, mean, space, quadratic, periodic=None) -> dict[str, np.ndarray]:
  """What each row [S, D] adds to the moments that are linear in the rows, [S] or [S, K] each.

  second, fourth, slope_second, slope_fourth: of the flatnesses. The rest as `higher_order` returns
  them, before the average over the group. mean: [D], of each point.
  """
  axes = tuple(range(1, len(space) + 1))
  centred = (block - mean).reshape(-1, *space)
  closed = (True,) * len(space) if periodic is None else periodic
  slopes = [
    _slope(centred, axis, wrap) for axis, wrap in zip(axes, closed, strict=True)
  ]
  out = {}
  for power, name in ((2, "second"), (4, "fourth")):
    out[name] = (centred**power).mean(axis=axes)
    out[f"slope_{name}"] = np.mean(
      [(slope**power).mean(axis=axes) for slope in slopes], axis=0
    )
  y = block.reshape(-1, *space)
  waves = np.fft.fftn(y, axes=axes, norm="forward")
  if quadratic is not None:
    flux = (
      waves.conj()
      * np.fft.fftn(
        quadratic(y),
        axes=axes,
        norm="forward",
      )
    ).real
    out |= _shell_fluxes(flux.reshape(len(y), -1), space)
  if len(space) == 1 and all(closed):
    first, second = _triads(space[0])
    if first.size:  # four points or fewer have none
      out["bispectrum"] = (
        waves[:, first] * waves[:, second] * waves[:, first + second].conj()
      )
  return out


def _slope(fields: np.ndarray, axis: int, periodic: bool) -> np.ndarray:
  """Differences between neighbours; an axis that is not periodic has one fewer than points."""
  if periodic:
    return np.roll(fields, -1, axis) - fields
  return np.diff(fields, axis=axis)


def _shell_fluxes(
  flux: np.ndarray,
  space: tuple[int, ...],
) -> dict[str, np.ndarray]:
  """Fluxes [S, D] into the modes, summed over shells k = 1, 2, ...; in 2-D also those over k²."""
  waves = np.meshgrid(
    *(np.fft.fftfreq(n, 1 / n) for n in space),
    indexing="ij",
  )
  size = np.sqrt(sum(k**2 for k in waves)).ravel()
  shell = np.floor(size + 0.5).astype(int)
  member = (shell[:, None] == np.arange(1, shell.max() + 1)).astype(float)
  out = {"transfer": flux @ member}
  if len(space) == 2:
    out["energy_transfer"] = (flux / np.where(size > 0, size, np.inf) ** 2) @ member
  return out


def _triads(points: int) -> tuple[np.ndarray, np.ndarray]:
  """(j, k) of every triad 1 ≤ k ≤ j, j + k < N/2."""
  top = (points - 1) // 2
  found = [(j, k) for j in range(1, top) for k in range(1, j + 1) if j + k <= top]
  first, second = np.array(found, int).reshape(-1, 2).T
  return first, second


def average_bispectrum(found: np.ndarray, group: Group) -> np.ndarray:
  """A shift leaves a bispectrum alone, a sign turns it round, running backwards conjugates it."""
  n = group.index.shape[1]
  way = (group.index[:, 1] - group.index[:, 0]) % n
  straight = (
    group.index == (group.index[:, :1] + way[:, None] * np.arange(n)) % n
  ).all(axis=1)
  if not (straight & np.isin(way, (1, n - 1))).all():
    raise ValueError(
      "an element of the group is neither a shift nor a reflection of the line: a bispectrum has "
      "no average over it. Hand in the equation's own group, e.g. ks.group(N)."
    )
  forward, backward = (group.sign[way == w].sum() / len(group) for w in (1, n - 1))
  return forward * found + backward * found.conj()


def errors(
  found: dict[str, np.ndarray], ref: dict[str, np.ndarray]
) -> dict[str, float]:
  """‖found − ref‖ / ‖ref‖ of each statistic of `higher_order`, no unit.

  Raises: ValueError if the two are of other grids or kinds, or if the reference's is zero.
  """
  if {k: np.shape(v) for k, v in found.items()} != {
    k: np.shape(v) for k, v in ref.items()
  }:
    raise ValueError(
      f"statistics {sorted(found)} against {sorted(ref)}, or of another grid: compute both by "
      "higher_order, with the same quadratic term, of fields on one grid."
    )
  out = {}
  for name, value in ref.items():
    size = float(np.linalg.norm(value))
    if not size:
      raise ValueError(
        f"the reference's {name} is zero: it has no relative error. Is its field constant?"
      )
    out[name] = float(np.linalg.norm(found[name] - value)) / size
  return out


# ---------------------------------------------------------------- displacement and its lower bound


def bures_squared(
  mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray
) -> float:
  """Least E|Ty − y|² of any map of N(a, A) onto N(b, B), hence of any map between laws with these
  moments.

      |a − b|² + tr A + tr B − 2 tr (A^½ B A^½)^½        (Gelbrich 1990)

  means [D], covariances [D, D], symmetric PSD; units of the field squared, summed over points.
  Raises: ValueError for NaN, shapes that do not fit, or a matrix that is not symmetric.
  """
  mean_a, cov_a, mean_b, cov_b = (
    np.asarray(v, np.float64) for v in (mean_a, cov_a, mean_b, cov_b)
  )
  d = mean_a.size
  if (
    mean_a.shape != (d,)
    or mean_b.shape != (d,)
    or cov_a.shape != (d, d)
    or cov_b.shape != (d, d)
  ):
    raise ValueError(
      f"means {mean_a.shape}, {mean_b.shape} and covariances {cov_a.shape}, {cov_b.shape}: need "
      "[D] and [D, D], one D."
    )
  for name, cov in (("cov_a", cov_a), ("cov_b", cov_b)):
    if (
      not np.isfinite(cov).all() or np.abs(cov - cov.T).max() > 1e-8 * np.abs(cov).max()
    ):
      raise ValueError(
        f"{name} is not finite and symmetric: hand in a covariance, e.g. "
        "distances.covariance(rows)."
      )
  values, vectors = np.linalg.eigh(cov_a)
  half = vectors * np.sqrt(
    np.where(
      values > CUT * values[-1],
      values,
      0.0,
    )
  )
  cross = np.sqrt(
    np.maximum(
      np.linalg.eigvalsh(half.T @ cov_b @ half),
      0.0,
    )
  ).sum()
  gap = float(
    ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
  )
  return max(gap, 0.0)


def displacement(
  source: np.ndarray, mapped: np.ndarray, ref: np.ndarray, group: Group
) -> dict[str, float]:
  """What a map moves, and what it moves without need, in shares of tr Cov(y′), the reference's
  total variance.

  {"moved": E|Ty − y|², "bound": `bures_squared` between source and ref by group-averaged moments,
  "excess": moved − bound}. The bound is of the two samples: excess may fall below 0 by their noise.

  Args:
    source y, mapped Ty: [S, *space], row by row. ref: [R, *space]. group: of the grid.
  """
  source, mapped = distances.pair(source, mapped)
  source, ref = distances.pair(source, ref)
  if len(source) != len(mapped):
    raise ValueError(
      f"{len(source)} source rows and {len(mapped)} mapped ones: need T y of the very rows y, in "
      "order."
    )
  moments = []
  for x in (source, ref):
    mean = x.mean(axis=0, dtype=np.float64)
    kept = (group.sign[:, None] * mean[group.index]).mean(axis=0)
    second = distances.covariance(x) * ((len(x) - 1) / len(x)) + np.outer(mean, mean)
    moments += [kept, group.average_covariance(second) - np.outer(kept, kept)]
  scale = distances.positive(float(ref.var(axis=0, dtype=np.float64).sum()))
  moved = sum(
    float(((block - source[first : first + len(block)]) ** 2).sum())
    for first, block in distances.chunks(mapped)
  )
  moved, bound = moved / len(source) / scale, bures_squared(*moments) / scale
  return {"moved": moved, "bound": bound, "excess": moved - bound}
