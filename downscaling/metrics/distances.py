"""Distances between two sets of samples of a field, and what one ensemble or one map says about
itself.

Sets are [S, *space] and are compared as flattened rows [S, D]; the two need not have the same S.
All results are float64 numbers in the units stated. Definitions follow Wan et al. 2023
(arXiv:2305.15618) where it states one.

Every distance is positive between two independent draws of one law. That sampling floor is the same
function of two such draws (`tables.py`), so none of these is debiased: the floor carries the bias.
"""

import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from downscaling.fields.operators import Operator
from downscaling.fields.symmetry import Group
from downscaling.metrics.ensembles import Ensemble

# Above this many dimensions covariances are compared without being formed.
DENSE_DIMENSIONS = 4096
MMD_LENGTHS = (0.2, 0.5, 0.9, 1.3)
_CHUNK = 2**22  # values converted to float64 at a time
_TILE = 2048  # rows of a kernel tile
CELLS = 12  # bins to a bandwidth
NODES = 3  # quadrature nodes to a bandwidth
_MOST = 8192  # bins or nodes of one dimension, however far its outliers lie


def rows(x: np.ndarray, name: str, least: int = 2) -> np.ndarray:
  """[S, *space] as [S, D] floats.

  Raises ValueError, calling the set `name`, if it holds fewer than `least` rows or a value that is
  not finite.
  """
  x = np.asarray(x)
  if x.ndim < 2 or len(x) < least or x.size == 0:
    raise ValueError(
      f"{name} has shape {x.shape}: need [samples, *space] with at least {least} samples."
    )
  x = x.reshape(len(x), -1)
  x = x if x.dtype in (np.float32, np.float64) else x.astype(np.float64)
  for first, block in chunks(x):
    if not np.isfinite(block).all():
      bad = first + int(np.flatnonzero(~np.isfinite(block).all(axis=1))[0])
      raise ValueError(
        f"{name} holds NaN or infinite values, first in row {bad} of {len(x)}: no metric of it "
        "means anything. Look at the stage that wrote it (is it finished?) and run that again."
      )
  return x


def pair(pred: np.ndarray, ref: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Both sets as rows. Raises ValueError naming a set with NaN, too few rows or another grid."""
  pred, ref = rows(pred, "pred"), rows(ref, "ref")
  if pred.shape[1] != ref.shape[1]:
    raise ValueError(
      f"pred has {pred.shape[1]} values a row and ref {ref.shape[1]}: compare fields on one grid "
      "(coarse with coarse, fine with fine)."
    )
  return pred, ref


def chunks(x: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
  """(first row, rows in float64) over blocks of x [S, ...] that fit in little memory."""
  step = max(
    1,
    _CHUNK // max(1, math.prod(x.shape[1:])),
  )
  for first in range(0, len(x), step):
    yield first, np.asarray(x[first : first + step], np.float64)


# ---------------------------------------------------------------- covariance


def covariance(x: np.ndarray) -> np.ndarray:
  """Sample covariance [D, D] of rows [S, D], divided by S − 1."""
  mean = x.mean(axis=0, dtype=np.float64)
  total = np.zeros((x.shape[1],) * 2)
  for _, block in chunks(x):
    block = block - mean
    total += block.T @ block
  return total / (len(x) - 1)


def cov_rmse(pred: np.ndarray, ref: np.ndarray) -> float:
  """‖Cov_pred − Cov_ref‖_F / ‖Cov_ref‖_F, no unit. pred [S, *space], ref [R, *space].

  Beyond DENSE_DIMENSIONS the norms come from the S × R products of rows, tile by tile (relative
  error about 1e-8).
  """
  pred, ref = pair(pred, ref)
  if pred.shape[1] <= DENSE_DIMENSIONS:
    return _relative(covariance(pred), covariance(ref))
  size = _covariance_product(ref, ref)
  gap = _covariance_product(pred, pred) - 2 * _covariance_product(pred, ref) + size
  return math.sqrt(max(gap, 0.0) / positive(size))


def sym_cov_rmse(pred: np.ndarray, ref: np.ndarray, group: Group) -> float:
  """cov_rmse after both covariances are averaged over the equation's symmetry group: far less
  sampling noise.
  """
  pred, ref = pair(pred, ref)
  if group.index.shape[1] != pred.shape[1]:
    raise ValueError(
      f"the symmetry group moves {group.index.shape[1]} points, the fields have {pred.shape[1]}: "
      "build the group for the coarse grid that is compared."
    )
  return _relative(*(group.average_covariance(covariance(x)) for x in (pred, ref)))


def _relative(pred: np.ndarray, ref: np.ndarray) -> float:
  return float(np.linalg.norm(pred - ref) / math.sqrt(positive(float((ref**2).sum()))))


def positive(square: float) -> float:
  """A reference's squared norm; raises ValueError where it is 0."""
  if square <= 0:
    raise ValueError(
      "every row of ref is the same: it has no covariance to compare with. Hand in more snapshots."
    )
  return square


def _covariance_product(x: np.ndarray, y: np.ndarray, tile: int = 256) -> float:
  """⟨Cov_x, Cov_y⟩_F = Σ_ij (x_i·y_j)² / ((S − 1)(R − 1)) of centred rows; no [D, D] array."""
  mean_x, mean_y = (a.mean(axis=0, dtype=np.float64) for a in (x, y))
  total = 0.0
  for i in range(0, len(x), tile):
    left = x[i : i + tile] - mean_x
    for j in range(0, len(y), tile):
      total += float(((left @ (y[j : j + tile] - mean_y).T) ** 2).sum())
  return total / ((len(x) - 1) * (len(y) - 1))


# ---------------------------------------------------------------- one dimension at a time


def kernel_density(x: np.ndarray, at: np.ndarray) -> np.ndarray:
  """Gaussian kernel density of x [S] at points [P]: bandwidth std(x)·S^(−1/5), Scott's rule.

  Samples are first shared linearly between the two nearest of bins 1/12 bandwidth wide, which
  widens the kernel by step²/6; the kernel is narrowed by as much. Against scipy.stats.gaussian_kde
  this errs by less than 1e-4 of the peak, and the sum has positive terms only, so the far tails,
  which a logarithm sees, are right as well.
  """
  width = _bandwidth(x)
  low, span = x.min(), np.ptp(x)
  step = span / min(math.ceil(span / width * CELLS), _MOST)
  place = (x - low) / step
  cell = place.astype(np.int64)
  share = place - cell
  size = int(cell.max()) + 2
  weight = np.bincount(cell, 1 - share, minlength=size) + np.bincount(
    cell + 1, share, minlength=size
  )
  occupied = np.flatnonzero(weight)
  variance = max(width**2 - step**2 / 6, width**2 / 2)
  gap = at[:, None] - (low + step * occupied)
  return (
    np.exp(gap**2 * (-0.5 / variance))
    @ weight[occupied]
    / (len(x) * math.sqrt(2 * math.pi * variance))
  )


def _bandwidth(x: np.ndarray) -> float:
  return float(x.std(ddof=1)) * len(x) ** -0.2


def kld_by_dimension(pred: np.ndarray, ref: np.ndarray) -> np.ndarray:
  """KL(ref ‖ pred) = ∫ p_ref ln(p_ref / p_pred) of each dimension alone, [D], nats.

  Kernel densities by Scott's rule and the trapezoid rule over the range of ref and five bandwidths
  more, at three or more nodes to a bandwidth. Densities are held above 1e-300, so a dimension costs
  at most some 690 nats. Raises ValueError if a dimension of either set does not vary.
  """
  pred, ref = pair(pred, ref)
  for name, x in (("pred", pred), ("ref", ref)):
    flat = np.flatnonzero(np.ptp(x, axis=0) == 0)
    if flat.size:
      raise ValueError(
        f"{name} has the same value in all {len(x)} rows at point {flat[0]} ({flat.size} such "
        "points): a density needs samples that vary."
      )
  return np.array(
    [
      _kld(*(np.asarray(x[:, d], np.float64) for x in (pred, ref)))
      for d in range(pred.shape[1])
    ]
  )


def _kld(pred: np.ndarray, ref: np.ndarray) -> float:
  wide, narrow = _bandwidth(ref), min(_bandwidth(ref), _bandwidth(pred))
  low, high = ref.min() - 5 * wide, ref.max() + 5 * wide
  at = np.linspace(
    low,
    high,
    min(math.ceil((high - low) / narrow * NODES), _MOST) + 1,
  )
  p, q = (np.maximum(kernel_density(x, at), 1e-300) for x in (ref, pred))
  return float(np.trapezoid(p * np.log(p / q), at))


def kld(pred: np.ndarray, ref: np.ndarray) -> tuple[float, float]:
  """(sum, mean) over dimensions of `kld_by_dimension`; the paper does not say which, so both are
  printed.
  """
  each = kld_by_dimension(pred, ref)
  return float(each.sum()), float(each.mean())


def wass1(pred: np.ndarray, ref: np.ndarray) -> float:
  """Mean over dimensions of ∫ |CDF_pred − CDF_ref| = ∫₀¹ |Q_pred(u) − Q_ref(u)| du, units of the
  field; exact.

  The quantile functions step at the levels i/S and j/R, the same for every dimension.
  """
  pred, ref = pair(pred, ref)
  s, r = len(pred), len(ref)
  ticks = np.union1d(
    np.arange(s, dtype=np.int64) * r, np.arange(r, dtype=np.int64) * s
  )  # levels × S R
  share = np.diff(ticks, append=s * r) / (s * r)
  total, step = 0.0, max(1, _CHUNK // len(ticks))
  for d in range(0, pred.shape[1], step):
    a, b = (
      np.sort(
        np.asarray(x[:, d : d + step], np.float64),
        axis=0,
      )
      for x in (pred, ref)
    )
    total += float((share @ np.abs(a[ticks // r] - b[ticks // s])).sum())
  return total / pred.shape[1]


# ---------------------------------------------------------------- kernel distance


@jax.jit
def _tile_sum(x, y, in_x, in_y, scale):
  """Σ_ij k(x_i, y_j) over one tile, in float64; in_x, in_y are 1 for rows and 0 for padding."""
  inner = jnp.matmul(x, y.T, precision="highest")
  r2 = (
    jnp.maximum(
      (x**2).sum(1)[:, None] + (y**2).sum(1)[None, :] - 2 * inner,
      0,
    )
    / scale
  )
  k = sum(a**2 / (a**2 + r2) for a in MMD_LENGTHS)
  return jnp.sum(
    k * in_x[:, None] * in_y[None, :],
    dtype=jnp.float64,
  )


def _tiles(
  x: np.ndarray, centre: np.ndarray, tile: int
) -> list[tuple[jax.Array, jax.Array]]:
  out = []
  for first in range(0, len(x), tile):
    block = np.asarray(x[first : first + tile] - centre, np.float32)
    empty = tile - len(block)
    out.append(
      (
        jnp.pad(
          jnp.asarray(block),
          ((0, empty), (0, 0)),
        ),
        jnp.asarray(np.arange(tile) < len(block), "float32"),
      )
    )
  return out


def kernel_mean(
  x: np.ndarray, y: np.ndarray | None, scale: float, centre: np.ndarray | None = None
) -> float:
  """Mean over all pairs of Σ_a a²/(a² + |x_i − y_j|²/scale), a = .2, .5, .9, 1.3; y None means x
  with itself.

  x [S, D], y [R, D]; at most one 2048 × 2048 tile exists at a time. `centre` [D] is subtracted from
  both first: it changes nothing but the rounding of float32 distances.
  """
  middle = np.asarray(x.mean(axis=0, dtype=np.float64) if centre is None else centre)
  tile = min(_TILE, max(len(x), 0 if y is None else len(y)))
  with jax.enable_x64(True):  # for the sums alone: tiles are float32
    scale = jnp.float32(scale)
    left = _tiles(x, middle, tile)
    right = left if y is None else _tiles(y, middle, tile)
    total = 0.0
    for i, (a, in_a) in enumerate(left):
      for j, (b, in_b) in enumerate(right):
        if y is None and j < i:
          continue
        total += float(_tile_sum(a, b, in_a, in_b, scale)) * (
          2 if y is None and j > i else 1
        )
  return total / (len(x) * (len(x) if y is None else len(y)))


def mmd(
  pred: np.ndarray,
  ref: np.ndarray,
  ref_term: float | None = None,
) -> float:
  """Maximum mean discrepancy √(mean k(p, p′) − 2 mean k(p, r) + mean k(r, r′)), 0 … 2, no unit.

  k = Σ_a a²/(a² + r²), a = .2, .5, .9, 1.3 (the lengths are the authors' later ones; what r is, no
  public text says).
  Our choice: r is the distance between flattened fields over the root mean square distance between
  two independent rows of ref, √(2 tr Cov_ref). So r is about 1 between unrelated fields whatever
  the units and the grid, and the lengths straddle it; with raw distances (8.5 on 24 KS points, 200
  on 32² of vorticity) all k would be near 0. Biased (V-statistic: the pairs i = j count), hence
  never negative; the floor has the same bias.

  Args:
    pred, ref: [S, *space], [R, *space].
    ref_term: mean k(r, r′) from `kernel_ref_term(ref)`, when many sets are compared with one ref.
  """
  pred, ref = pair(pred, ref)
  scale, centre = kernel_scale(ref)
  own = kernel_mean(ref, None, scale, centre) if ref_term is None else ref_term
  gap = (
    kernel_mean(pred, None, scale, centre)
    - 2 * kernel_mean(pred, ref, scale, centre)
    + own
  )
  return math.sqrt(max(gap, 0.0))


def kernel_ref_term(ref: np.ndarray) -> float:
  """mean k(r, r′) of `mmd`, the part that only ref decides."""
  ref = rows(ref, "ref")
  return kernel_mean(ref, None, *kernel_scale(ref))


def kernel_scale(ref: np.ndarray) -> tuple[float, np.ndarray]:
  centre = ref.mean(axis=0, dtype=np.float64)
  trace = sum(float(((block - centre) ** 2).sum()) for _, block in chunks(ref)) / (
    len(ref) - 1
  )
  return 2 * positive(trace), centre


# ---------------------------------------------------------------- ensembles and maps


Members = np.ndarray | Ensemble


def members(ensemble: Members, name: str = "samples") -> Ensemble:
  """[K, M, *space] checked: at least one condition and one member.

  Raises ValueError naming it.
  """
  found = Ensemble.of(ensemble)
  if found.ndim < 3 or found.size == 0:
    raise ValueError(
      f"{name} has shape {found.shape}: need [conditions, members, *space]."
    )
  return found


def finite_blocks(ensemble: Ensemble, name: str) -> Iterator[tuple[slice, np.ndarray]]:
  """(which conditions, members in float64) block by block. Raises ValueError for NaN."""
  for place, block in ensemble.blocks():
    bad = ~np.isfinite(block).reshape(len(block), -1).all(axis=1)
    if bad.any():
      raise ValueError(
        f"{name} holds NaN or infinite values, first in row {place.start + int(bad.argmax())} of "
        f"{len(ensemble)}: no metric of it means anything. Look at the stage that wrote it (is it "
        "finished?) and run that again."
      )
    yield place, np.asarray(block, np.float64)


def variability(ensemble: Members) -> float | None:
  """√(mean over points of the variance over one condition's members), averaged over conditions;
  units of the field.

  ensemble [K, M, *space]; the variance is divided by M − 1. None for a single member.
  """
  found = members(ensemble)
  if found.shape[1] < 2:
    return None
  space, each = tuple(range(1, found.ndim - 1)), []
  for _, block in finite_blocks(found, "samples"):
    variance = block.var(axis=1, ddof=1)
    each.append(np.sqrt(variance.mean(axis=space)))
  return float(np.concatenate(each).mean())


@functools.partial(jax.jit, static_argnums=0)
def _misfit(operator: Operator, x, y):
  """(|C′x − y|², |C′x|²) over space and channel; x [B, M, *fine, C], y [B, 1, *coarse, C]."""
  seen = operator.apply(x)
  axes = tuple(range(2, seen.ndim))
  return ((seen - y) ** 2).sum(axes), (seen**2).sum(axes)


def constraint_rmse(
  ensemble: Members, conditions: np.ndarray, operator: Operator
) -> float:
  """Mean over conditions and members of ‖C′x − y′‖ / ‖C′x‖, no unit.

  Args:
    ensemble: [K, M, *fine] or [K, M, *fine, C].
    conditions: y′, [K, *coarse] or [K, *coarse, C].
    operator: C′.
  Raises: ValueError if conditions and ensemble do not belong together.
  """
  found, conditions = members(ensemble), np.asarray(conditions)
  rows(conditions, "conditions", least=1)
  if len(conditions) != len(found):
    raise ValueError(
      f"{len(conditions)} conditions for samples of {len(found)}: hand in the y′ each was drawn "
      "for."
    )
  channel = (None,) if found.ndim - 2 == len(operator.fine) else ()
  total = 0.0
  for place, block in finite_blocks(found, "samples"):
    x = jnp.asarray(block[(..., *channel)], jnp.float32)
    y = jnp.asarray(conditions[place, None][(..., *channel)], jnp.float32)
    gap, size = (np.asarray(v, np.float64) for v in _misfit(operator, x, y))
    total += float(np.sqrt(gap / np.maximum(size, np.finfo(np.float32).tiny)).sum())
  return total / math.prod(found.shape[:2])


def corr_input(source: np.ndarray, mapped: np.ndarray) -> float:
  """corr(y, T y) = tr Cov(y, T y) / √(tr Cov(y) · tr Cov(T y)): 1, the input's weather is kept; 0,
  forgotten.

  source y and mapped T y are [S, *space], row by row.
  """
  source, mapped = _rowwise(source, mapped)
  y, t = (x - x.mean(axis=0, dtype=np.float64) for x in (source, mapped))
  size = math.sqrt(positive(float((y**2).sum()))) * math.sqrt(float((t**2).sum()))
  return float((y * t).sum() / size) if size else 0.0


def displacement(source: np.ndarray, mapped: np.ndarray) -> float:
  """‖T y − y‖ / ‖y − ȳ‖ over all rows together (root mean squares), ȳ the mean of each point; no
  unit.

  A field's mean does not count, so the number is the same for °C and K. source y, mapped T y: [S,
  *space].
  """
  source, mapped = (np.asarray(x, np.float64) for x in _rowwise(source, mapped))
  anomaly = source - source.mean(axis=0)
  return float(
    np.linalg.norm(mapped - source) / math.sqrt(positive(float((anomaly**2).sum())))
  )


def amplitude(mapped: np.ndarray, ref: np.ndarray) -> float:
  """√(tr Cov(T y) / tr Cov(y′)): 1 where anomalies are as large as the truth's.

  A correlation cannot see it.
  """
  mapped, ref = pair(mapped, ref)
  sizes = [float(x.var(axis=0, dtype=np.float64).sum()) for x in (mapped, ref)]
  return math.sqrt(sizes[0] / positive(sizes[1]))


def persistence(
  x: np.ndarray,
  now: np.ndarray,
  later: np.ndarray,
) -> float | None:
  """Lag-1 correlation of anomalies: corr(x(t), x(t + Δ)) over the rows `now` and `later` of x [S,
  *space].

  None for fewer than two such pairs.
  """
  if len(now) < 2:
    return None
  return corr_input(x[now], x[later])


def _rowwise(
  source: np.ndarray,
  mapped: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
  source, mapped = rows(source, "source"), rows(mapped, "mapped")
  if source.shape != mapped.shape:
    raise ValueError(
      f"source is {source.shape} and mapped {mapped.shape}: need T y of the very rows y, in order."
    )
  return source, mapped
