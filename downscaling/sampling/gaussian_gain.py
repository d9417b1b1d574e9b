"""The gain of a field with independent modes: how far an observed misfit C′x ≠ y′ should move
every fine point.

    Σ_σ = Q diag(e(σ)) Qᵀ,   A = C′ Σ C′ᵀ,   G = Σ C′ᵀ A⁻¹,   so that C′ G = I

Q is a basis (fields/basis.py), e_k(σ) the variance of mode k that is left after denoising at σ: S_k
σ²/(S_k + σ²) for a Gaussian field of spectrum S (then D + G(y′ − C′D) is the exact conditional
mean), or a network's measured error. With observation noise, y′ = C′x + ε, ε ~ N(0, R), A + R
stands for A in G, and C′G = I no longer holds: the constraint is soft. For waves and a strided or a
block mean C′, A is circulant on the coarse grid, its eigenvalues being the aliases of Σ|H|² folded
upon each other (H: transfer function of the block mean). Any other basis or operator goes through
the dense matrix C′Q.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from downscaling.diffusion import schedules
from downscaling.fields.basis import Basis, Trigonometric
from downscaling.fields.operators import BlockMean, Operator, Strided
from downscaling.runtime import random_keys
from downscaling.sampling import solvers

# σ [B] -> e(σ) [B, *space, C or 1], a table of the basis
Variance = Callable[[jax.Array], jax.Array]

# Of a matrix's trace, in units in the last place: what its eigenvalues are good to.
ROUNDING = 1
_LARGEST_DENSE = 4096  # coarse points: A is [B, C, n, n]
# of ln E a unit of ln σ, in `levels`: where nothing falls the path of σ itself is worth a step
_LEAST_FALL = 0.2


def prior_variance(spectrum: np.ndarray) -> Variance:
  """Sσ²/(S + σ²), what is left to know of a Gaussian field; σ = ∞ gives S itself.

  spectrum: S_k, the variance of each mode, [*space, C] (statistics.Statistics), >= 0. Empty modes
  are lifted to 1e-14 of the largest, so that A can be inverted whatever the misfit.
  """
  spectrum = np.asarray(spectrum, np.float64)
  if not (
    np.isfinite(spectrum).all() and (spectrum >= 0).all() and (spectrum > 0).any()
  ):
    raise ValueError(
      "the spectrum holds negative or non-finite values, or only zeros: need the variance of every "
      "mode of the data."
    )
  s = jnp.asarray(
    np.maximum(spectrum, 1e-14 * spectrum.max()),
    jnp.float32,
  )[None]
  return lambda sigma: s / (1 + s / _column(sigma, s.ndim) ** 2)


def measured_variance(sigmas: np.ndarray, table: np.ndarray) -> Variance:
  """e_k(σ) from a table, its logarithm linear in ln σ between the rows; NaN beyond them, as nothing
  is known there.

  sigmas: [K], ascending, > 0; a level may lie beyond the ends by float32's rounding.
  table: [K, *space, C], > 0, the variance of each mode of D − x on held-out fields.
  """
  sigmas, table = np.asarray(sigmas, np.float64), np.asarray(table, np.float64)
  if (
    sigmas.ndim != 1
    or len(sigmas) < 2
    or len(table) != len(sigmas)
    or not (np.diff(sigmas) > 0).all()
  ):
    raise ValueError(
      f"a table of shape {table.shape} for noise levels of shape {sigmas.shape} came: need K >= 2 "
      "ascending levels and [K, *space, C]."
    )
  if not (sigmas[0] > 0 and np.isfinite(table).all() and (table > 0).all()):
    raise ValueError(
      "the error table or its noise levels hold values <= 0 or not finite; tabulate the error "
      "again."
    )
  grid, logs = (
    jnp.asarray(np.log(sigmas), jnp.float32),
    jnp.asarray(np.log(table), jnp.float32),
  )
  low = float(sigmas[0]) * (1 - schedules.ROUNDING)
  high = float(sigmas[-1]) * (1 + schedules.ROUNDING)

  def variance(sigma):
    known = (sigma >= low) & (sigma <= high)
    place = jnp.clip(
      jnp.interp(
        jnp.log(sigma),
        grid,
        jnp.arange(len(grid), dtype=grid.dtype),
      ),
      0,
      len(grid) - 1,
    )
    below = jnp.clip(place.astype(jnp.int32), 0, len(grid) - 2)
    share = _column(place - below, logs.ndim)
    found = jnp.exp((1 - share) * logs[below] + share * logs[below + 1])
    return jnp.where(_column(known, logs.ndim), found, jnp.nan)

  return variance


@dataclasses.dataclass(frozen=True, eq=False)
class Gain:
  """G and A⁻¹ of one operator and one variance; see the module's formulas.

  basis: of the fine grid; None for waves along every axis. Strided and unweighted block mean
    operators on waves take transforms alone. Anything else takes a matrix of all coarse points.
  Raises: ValueError for a basis of another grid, and where that matrix would be too large.
  """

  operator: Operator
  variance: Variance
  # Standard deviation of ε, for all channels or each, in units of the fields.
  noise: tuple[float, ...] | float = 0.0
  dense: bool = False  # forces the dense path, for tests
  # In place of `noise`: R_k, the variance of ε by mode on the full coarse FFT grid, broadcasting
  # against [*coarse, C]; white noise of std s has s² everywhere. It may be traced.
  error: jax.Array | None = None
  basis: Basis | None = None

  def __post_init__(self):
    if self.basis is None:
      object.__setattr__(self, "basis", Trigonometric(self.operator.fine))
    if self.modes.space != self.operator.fine:
      raise ValueError(
        f"a basis of a grid {self.modes.space} for an operator on {self.operator.fine}: make both "
        "from one domain."
      )
    if not np.all(np.asarray(self.noise) >= 0) or not np.all(np.isfinite(self.noise)):
      raise ValueError(
        f"observation noise of standard deviation {self.noise}: need a number >= 0, in data units."
      )
    n = math.prod(self.operator.coarse)
    if not self._circulant and n > _LARGEST_DENSE:
      raise ValueError(
        f"a gain for {n} coarse points of a general operator, or of a domain that is not periodic, "
        f"needs {n}² numbers a sample: use a strided or an unweighted block mean operator on a "
        f"periodic domain, at most {_LARGEST_DENSE} points, or guidance 'scaled'."
      )
    if not self._circulant:
      self._matrix  # noqa: B018 - computed here, as it cannot be under jit
    if self.error is not None:
      self._check_error()

  def _check_error(self) -> None:
    """Raises ValueError unless R broadcasts against coarse fields; the dense path needs white."""
    assert self.error is not None
    coarse, came = self.operator.coarse, jnp.shape(self.error)
    fits = len(came) == len(coarse) + 1
    fits = fits and all(
      n in (1, full) for n, full in zip(came[:-1], coarse, strict=True)
    )
    if not fits:
      raise ValueError(
        f"an observation error of shape {came} came, need variances that broadcast against "
        f"[{', '.join(map(str, coarse))}, channels]: one a mode of the coarse grid, or one for all."
      )
    if not self._circulant and math.prod(came[:-1]) > 1:
      raise ValueError(
        f"an observation error by mode, {came}, for {type(self.operator).__name__}: a dense gain "
        "knows white errors only. Give one variance a channel."
      )

  @property
  def noisy(self) -> bool:
    """Is R anything but 0? Traced values count as if they were."""
    return self.error is not None or bool(np.any(np.asarray(self.noise) > 0))

  def correction(self, misfit: jax.Array, sigma: jax.Array) -> jax.Array:
    """G r: misfit r [B, *coarse, C], σ [B], or [1] where all rows are at one level -> [B, *space,
    C].
    """
    spread = self._variance(sigma)
    weights = self.adjoint(self._solve(misfit, spread))
    modes = self.modes.modes(weights) * self.modes.held(spread)
    return self.modes.fields(modes).astype(misfit.dtype)

  def solve(self, misfit: jax.Array, sigma: jax.Array) -> jax.Array:
    """(A + R)⁻¹ r, [B, *coarse, C]; σ as in `correction`."""
    return self._solve(misfit, self._variance(sigma))

  def misfit_score(self, misfit: jax.Array, sigma: jax.Array) -> jax.Array:
    """χ² = rᵀ (A + R)⁻¹ r / d′, [B], d′ all coarse values of a sample: 1 where r has the variance
    the prior expects.
    """
    inner = misfit * self._solve(misfit, self._variance(sigma))
    return inner.mean(axis=tuple(range(1, misfit.ndim)))

  def left(self, sigma: jax.Array) -> jax.Array:
    """tr(Σ − GC′Σ)/NC, [B]: the variance that a value keeps once y′ is known; of a Gaussian field,
    the posterior's.
    """
    spread = self._variance(sigma)
    if self._circulant:
      known = self._fold(spread**2) / (
        self._fold(spread) + self.variance_of_noise(spread)
      )
    else:
      known = jax.scipy.linalg.cho_solve(
        self._factor(spread),
        self._outer(spread**2),
      )
      known = jnp.trace(known, axis1=2, axis2=3)

    def summed(table):  # one spectrum may serve channels of different noise
      return table.reshape(len(table), -1).sum(1) / table.shape[-1]

    return (summed(spread) - summed(known)) / math.prod(self.operator.fine)

  @property
  def modes(self) -> Basis:
    """The basis, which is set by now."""
    assert self.basis is not None
    return self.basis

  @functools.cached_property
  def _circulant(self) -> bool:
    op = self.operator
    repeats = isinstance(op, Strided) or (
      isinstance(op, BlockMean) and op.weights is None
    )
    waves = isinstance(self.basis, Trigonometric) and self.basis.waves
    return repeats and waves and not self.dense

  @functools.cached_property
  def _coarse_modes(self) -> Trigonometric:
    """Waves of the coarse grid; of circulant gains."""
    return Trigonometric(self.operator.coarse)

  def _variance(self, sigma):
    spread = self.variance(sigma)
    if spread.shape[1:-1] != self.modes.table:
      raise ValueError(
        f"the gain's variance has the modes {spread.shape[1:-1]}, the basis of the fine grid has "
        f"{self.modes.table}: tabulate the spectrum or the error on that grid."
      )
    return spread

  def _solve(self, r, spread):
    if not self._circulant:
      return self._solve_dense(r, spread)
    coarse = self._coarse_modes
    eigenvalues = self._fold(spread) + self.variance_of_noise(spread)
    return coarse.fields(coarse.modes(r) / coarse.held(eigenvalues)).astype(r.dtype)

  def variance_of_noise(self, like: jax.Array) -> jax.Array:
    """The eigenvalues of R, broadcasting against `like` [B, *coarse, C]."""
    if self.error is not None:
      return jnp.asarray(self.error, like.dtype)[None]
    variance = jnp.asarray(
      np.square(np.asarray(self.noise, np.float64)).reshape(-1), like.dtype
    )
    return variance.reshape((1,) * (like.ndim - 1) + (-1,))

  def apply_noise(self, z: jax.Array) -> jax.Array:
    """R z, [B, *coarse, C]."""
    return self._by_mode(z, self.variance_of_noise(z))

  def draw_noise(self, white: jax.Array) -> jax.Array:
    """ε ~ N(0, R) from standard normal values, [B, *coarse, C]."""
    return self._by_mode(white, jnp.sqrt(self.variance_of_noise(white)))

  def _by_mode(self, z, factor):
    """Each coarse mode times its factor; one factor for all modes needs no transform."""
    if math.prod(factor.shape[1:-1]) == 1:
      return factor * z
    coarse = self._coarse_modes
    table = jnp.broadcast_to(factor, (1, *coarse.table, factor.shape[-1]))
    return coarse.fields(coarse.modes(z) * coarse.held(table)).astype(z.dtype)

  def _fold(self, spread):
    """Eigenvalues of A on the coarse FFT grid: mean over the aliases k ≡ j of |H_k|² e_k, [B,
    *coarse, C].
    """
    op = self.operator
    for axis, (fine, coarse) in enumerate(
      zip(op.fine, op.coarse, strict=True), start=1
    ):
      if isinstance(op, BlockMean):
        shape = [fine if a == axis else 1 for a in range(spread.ndim)]
        spread = spread * jnp.asarray(
          _block_mean_gain(fine, fine // coarse), spread.dtype
        ).reshape(shape)
      split = (*spread.shape[:axis], fine // coarse, coarse, *spread.shape[axis + 1 :])
      spread = spread.reshape(split).mean(axis)
    return spread

  def adjoint(self, z: jax.Array) -> jax.Array:
    """C′ᵀ z, [B, *space, C]."""
    # C′C′ᵀ = κ I, so C′ᵀ = κ C′⁺ with κ = 1, or 1 over the points of a block.
    if self._circulant:
      op = self.operator
      return op.pinv(z) * (
        1 / math.prod(op.factors) if isinstance(op, BlockMean) else 1
      )
    matrix = jnp.asarray(self._matrix, z.dtype)
    flat = jnp.einsum(
      "nN,bnc->bNc", matrix, z.reshape(len(z), -1, z.shape[-1]), precision="highest"
    )
    return flat.reshape(len(z), *self.operator.fine, z.shape[-1])

  @functools.cached_property
  def _matrix(self) -> np.ndarray:
    return self.operator.matrix()

  def _solve_dense(self, r, spread):
    """One factorisation a level, [1] or [B]; samples of one level are its right-hand sides."""
    levels, channels = len(spread), r.shape[-1]
    spread = jnp.broadcast_to(spread, (*spread.shape[:-1], channels))
    flat = r.reshape(levels, len(r) // levels, -1, channels)
    z = jax.scipy.linalg.cho_solve(
      self._factor(spread), jnp.moveaxis(flat, (1, 3), (3, 1))
    )
    return jnp.moveaxis(z, (1, 3), (3, 1)).reshape(r.shape)

  def _factor(self, spread):
    """Cholesky's of A + R for each sample and channel, [B, C, n, n].

    Coarse values that the fields never take have no variance. Rounding would make it negative, so
    all get as much as rounding can take away.
    """
    a = self._outer(spread)
    noise = jnp.broadcast_to(
      self.variance_of_noise(spread).reshape(-1), (spread.shape[-1],)
    )
    rounding = ROUNDING * jnp.finfo(a.dtype).eps * jnp.trace(a, axis1=2, axis2=3)
    diagonal = (noise[None] + rounding)[..., None, None]
    a = a + diagonal * jnp.eye(a.shape[-1], dtype=a.dtype)[None, None]
    return jax.scipy.linalg.cho_factor(a, lower=True)

  @functools.cached_property
  def _rows(self) -> np.ndarray:
    return self.modes.rows(self._matrix)

  def _outer(self, spread):
    """C′Q diag(e) (C′Q)ᵀ, [B, C, n, n]."""
    rows = jnp.asarray(self._rows, spread.dtype)
    variances = self.modes.expanded(spread)
    return jnp.einsum("nk,bkc,mk->bcnm", rows, variances, rows, precision="highest")


def levels(gain: Gain, steps: int, sigma_max: float, sigma_min: float) -> np.ndarray:
  """Noise levels for guided sampling: equal steps of ln E(σ), E what `gain.left` says is still open
  at σ.

  Where y′ settles a field over few levels, steps are many there; where E falls by less than
  σ^_LEAST_FALL, as if it fell so. Returns: [steps + 1] float32, descending from sigma_max to
  sigma_min. Raises: as schedules.levels, and ValueError where the gain knows no variance of a
  level.
  """
  fine = schedules.levels(
    "exponential", max(256, 4 * steps), sigma_max, sigma_min
  ).astype(np.float64)
  left = jax.jit(
    lambda sigmas: jax.lax.map(
      lambda sigma: gain.left(sigma[None])[0],
      sigmas,
    )
  )(jnp.float32(fine))
  if not np.isfinite(left).all():
    raise ValueError(
      f"noise levels from {sigma_max:g} to {sigma_min:g} lie beyond the table of the prior's "
      "error: sample within it (config.sampling.levels)."
    )
  falls = -np.diff(
    np.log(np.maximum(np.asarray(left, np.float64), 1e-30))
  )  # rounding may leave nothing, or less
  path = np.concatenate(
    [
      [0.0],
      np.cumsum(
        np.maximum(
          falls,
          _LEAST_FALL * np.log(fine[:-1] / fine[1:]),
        )
      ),
    ]
  )
  return np.exp(
    np.interp(
      np.linspace(0, path[-1], steps + 1),
      path,
      np.log(fine),
    )
  ).astype(np.float32)


def gaussian_start(
  keys: jax.Array, gain: Gain, y: jax.Array, sigma: float
) -> jax.Array:
  """Where to start low: a draw of the Gaussian posterior given C′x = y, plus noise of level σ; [B,
  *space, C].

    x = p + K₀(y − C′p − ε) + σz,  p ~ N(0, S),  ε ~ N(0, R),  K₀ = S C′ᵀ(C′ S C′ᵀ + R)⁻¹

  Args:
    gain: built on prior_variance(S).
    y: [B, *coarse, C]; keys: [B].
    sigma: e.g. 3 data standard deviations: 16 steps from there equal 32 from σ = 40, and pure noise
      at σ = 3 is biased (measured on KS).
  """
  op, basis, shape = gain.operator, gain.modes, (*gain.operator.fine, y.shape[-1])
  never = jnp.full(1, jnp.inf, y.dtype)  # all rows are at one level
  white = solvers.noise(keys, random_keys.stream("posterior"), shape, y.dtype)
  colour = jnp.sqrt(basis.held(gain.variance(never)))
  draw = basis.fields(basis.modes(white) * colour).astype(y.dtype)
  misfit = y - op.apply(draw)
  if gain.noisy:
    white_error = solvers.noise(
      keys, random_keys.stream("observation error"), y.shape[1:], y.dtype
    )
    misfit = misfit - gain.draw_noise(white_error)
  draw = draw + gain.correction(misfit, never)
  return draw + sigma * solvers.noise(keys, solvers.START, shape, y.dtype)


def _column(values, ndim: int):
  return values.reshape(-1, *(1,) * (ndim - 1))


def _block_mean_gain(points: int, factor: int) -> np.ndarray:
  """|H_k|² of the mean over `factor` neighbours, [points]."""
  phase = np.exp(2j * np.pi * np.outer(np.arange(points), np.arange(factor)) / points)
  return np.abs(phase.mean(1)) ** 2
