"""Kolmogorov flow, turbulence forced on the plane: a fine spectral solver and a biased coarse
finite-volume one.

    u_t + (u·∇)u = −∇p + ν Δu − μ u + χ (sin qy, 0),   ∇·u = 0,   (x, y) in [0, 2π)² periodic
    ω_t + u·∇ω = ν Δω − μ ω − χ q cos qy,              ω = v_x − u_y

with ν = 1e-3, μ = 0.1, q = 4, χ = 1 after Kochkov et al. 2021 (arXiv:2102.01010), as Wan et al.
2023 (arXiv:2305.15618) are said to have it. Fields are vorticity ω [n, n] with rows y and columns
x: ω[j, i] at (x, y) = (i, j)·2π/n, without the right end; the fine grid's points and the coarse
solver's cell corners are the same places. `rollout` batches them.

Both solvers work in float32 by default, whatever `jax.enable_x64` says: a shell's enstrophy is 6 at
the forcing and .014 at k = 40, so rounding (1e-13) stays ten decades below it, and chaos forgets
both. dtype="float64" checks that (it needs enable_x64).
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from downscaling.equations.kolmogorov_symmetry import check_glide, group, move
from downscaling.equations.ks import van_leer
from downscaling.fields import domain as domains
from downscaling.fields import grid_symmetry, symmetry
from downscaling.fields.quadratic import Quadratic, advection

NAME, RANK, SYMBOL, LENGTH = "kolmogorov", 2, "ω", 2 * math.pi
SPEED, PEAK, WAVES, GRID = (
  3.0,
  4,
  8,
  32,
)  # of the initial field; its speed is measured on GRID² points
FASTEST = 5.7  # |u| of the flow with the default constants; 128², 320 snapshots


def initial_vorticity(key: jax.Array, points: int, dtype: str = "float32") -> jax.Array:
  """A Gaussian field of waves |k| ≤ 8, ω̂ ~ (k/4)² exp(−k²/32), scaled to a largest velocity of 3
  on 32² points.

  The largest of |u| and |v|, that is. A function of the key alone, read off on any grid of at least
  32² points. Mean vorticity and velocity are zero.

  Returns: ω [points, points].
  """
  ky, kx = _waves(GRID)
  k2 = kx**2 + ky**2
  shape = np.where(
    (k2 > 0) & (k2 <= WAVES**2), k2 / PEAK**2 * np.exp(-k2 / (2 * PEAK**2)), 0.0
  )
  shape = shape.astype(dtype)
  to_u, to_v = _velocity(GRID, dtype)
  hat = jnp.fft.rfft2(jax.random.normal(key, (GRID, GRID), dtype))
  u, v, w = (
    jnp.fft.irfft2(m * hat, s=(GRID, GRID)) for m in (to_u * shape, to_v * shape, shape)
  )
  # Components, not the length: the bits of a root depend on what XLA fuses it with, and so on the
  # size of the batch.
  return _resample(
    w
    * (
      SPEED
      / jnp.maximum(
        jnp.max(jnp.abs(u)),
        jnp.max(jnp.abs(v)),
      )
    ),
    points,
  )


def _waves(n: int) -> tuple[np.ndarray, np.ndarray]:
  """Integer wavenumbers of rfft2 on n² points: ky [n, 1], kx [1, n/2 + 1]."""
  return np.fft.fftfreq(n, 1 / n)[:, None], np.arange(n // 2 + 1.0)[None]


def _velocity(n: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
  """Multipliers of ω̂ that give û and v̂: with ψ̂ = ω̂/k², u = ψ_y and v = −ψ_x; the mean flow is
  zero.
  """
  ky, kx = _waves(n)
  k2 = kx**2 + ky**2
  k2[0, 0] = np.inf
  kind = np.result_type(dtype, np.complex64)
  return (1j * ky / k2).astype(kind), (-1j * kx / k2).astype(kind)


def _resample(field: jax.Array, points: int) -> jax.Array:
  """[n, n] -> [points, points] through Fourier space: waves both grids have are kept, Nyquist's are
  not.
  """
  n = field.shape[-1]
  if n == points:
    return field
  kept = (min(n, points) + 1) // 2  # waves 0 ... kept − 1
  hat = jnp.fft.rfft2(field)
  rows = [hat[:kept, :kept], hat[n - kept + 1 :, :kept]]
  gap = jnp.zeros((points - 2 * kept + 1, kept), hat.dtype)
  hat = jnp.pad(
    jnp.concatenate([rows[0], gap, rows[1]]), ((0, 0), (0, points // 2 + 1 - kept))
  )
  return jnp.fft.irfft2(hat, s=(points, points)) * np.asarray(
    (points / n) ** 2, field.dtype
  )


def domain(points: int, wave: int = 4) -> domains.Domain:
  """The periodic square on points² points, rows y first, with the symmetries of `group`.

  A grid whose points 2·wave does not divide keeps fewer of the shift-reflects; so has its domain.
  """
  symmetries = [
    grid_symmetry.shift(1, 2),
    grid_symmetry.Generator((True, True), (0, 0)),
  ]
  # Of the shift-reflect, the fewest that hit the points.
  for times in range(1, 2 * wave + 1):
    rows, rest = divmod(times * points, 2 * wave)
    if rest == 0:
      glide = grid_symmetry.Generator(
        (False, times % 2 == 1),
        (rows, 0),
        (-1) ** times,
      )
      symmetries.append(glide)
      break
  channels = (domains.Channel("ω", long_name="vorticity"),)
  return domains.box(
    ("y", "x"), (points, points), LENGTH, channels=channels, symmetries=symmetries
  )


def quadratic(space: tuple[int, ...]) -> Quadratic:
  """−u·∇ω on N² points; it commutes with `group`."""
  return advection(space)


# ---------------------------------------------------------------- checks at the door


def _check(
  name: str,
  points: int,
  wave: int,
  dt: float,
  stable: float,
  dtype: str,
  constants: tuple,
) -> None:
  if points < GRID or points % 2 or min(constants) < 0 or wave < 1:
    raise ValueError(
      f"config.{name}: {points} points, forcing wavenumber {wave}, (viscosity, drag, forcing) "
      f"{constants}: need an even number >= {GRID} of points, a wavenumber >= 1, and constants >= "
      "0."
    )
  if dtype not in ("float32", "float64"):
    raise ValueError(
      f"config.{name}.dtype={dtype!r} is unknown; known: 'float32', 'float64'."
    )
  if not 0 < dt <= stable:
    decade = 10.0 ** math.floor(math.log10(stable / 1.1))
    fits = max(
      m * decade
      for m in (1.0, 1.25, 2.0, 2.5, 4.0, 5.0, 8.0)
      if m * decade <= stable / 1.1
    )
    raise ValueError(
      f"config.{name}.dt={dt} is not stable on {points}² points: the flow's speed comes to "
      f"{FASTEST}, so dt must be > 0 and at most {stable:.3g}. Set --config.{name}.dt={fits:g}, or "
      "less."
    )


def _largest_rms(flow) -> float:
  """Ω = √⟨ω²⟩ that no solution exceeds: dΩ/dt ≤ −(ν + μ)Ω + χq/√2, so Ω ≤ max(Ω(0), χq/√2(ν + μ)).

  Advection leaves enstrophy alone, the lowest wave is 1, and `initial_vorticity` has waves |k| ≤ 8
  with |u|, |v| ≤ 3 on points that tell them apart: Ω(0) ≤ 8 · 3√2. A theorem for the equation and,
  but for its steps, for `Fine`; not for `Coarse`. 24 trajectories to t = 30 of each (64²; 32², 64²,
  heun): 7.9 at the start, at most 6.8 after.
  """
  rate, push = flow.viscosity + flow.drag, flow.forcing * flow.wave / math.sqrt(2)
  return max(
    WAVES * SPEED * math.sqrt(2),
    push / rate if rate else math.inf * push if push else 0.0,
  )


def _need(dtype: str) -> None:
  if dtype == "float64" and not jax.config.read("jax_enable_x64"):
    raise ValueError(
      'dtype="float64", but jax is in float32 here: call within `with jax.enable_x64(True):`.'
    )


# ---------------------------------------------------------------- fine


@dataclasses.dataclass(frozen=True)
class Fine:
  """Pseudo-spectral vorticity, 2/3 dealiasing; Runge–Kutta of order 4 in time, drag and viscosity
  exact (Lawson 1967).

  Advection is (∂yy − ∂xx)(uv) + ∂xy(u² − v²), four transforms (Basdevant 1983) where u·∇ω takes
  five. exponax's KolmogorovFlowVorticity integrates the same equation for −ω (its velocity has the
  other sign) with x and y exchanged; the tests compare the two.

  points: N, even; waves above (N − 1)/3 stay empty. dt: in time units, at most 1.6/N: of 16
  trajectories on 64² all lived at 1.6/N and 1.9/N, 6 at 2.6/N; of 4 on 128² all at 1.6/N, 2 at 2/N.
  viscosity ν, drag μ, forcing χ, wave q: see above. dtype: of state and arithmetic.
  State: ω [N, N].
  """

  points: int = 128
  dt: float = 0.01
  viscosity: float = 1e-3
  drag: float = 0.1
  forcing: float = 1.0
  wave: int = 4
  dtype: str = "float32"
  stream: ClassVar[int] = 0
  block: ClassVar[str] = "fine"
  bound = property(_largest_rms)
  length: ClassVar[float] = LENGTH

  def __post_init__(self):
    constants = (self.viscosity, self.drag, self.forcing)
    _check(
      "fine", self.points, self.wave, self.dt, 1.6 / self.points, self.dtype, constants
    )

  @property
  def domain(self) -> domains.Domain:
    """Of the fields that `output` keeps."""
    return domain(self.points, self.wave)

  @property
  def shared(self) -> dict[str, float]:
    """Constants that the coarse solver must have as well, as the symmetries hang on them."""
    return {"wave": self.wave}

  @property
  def grid(self) -> np.ndarray:
    """x, and y, [N]."""
    return np.arange(self.points) * (LENGTH / self.points)

  def start(self, key: jax.Array) -> jax.Array:
    _need(self.dtype)
    return initial_vorticity(key, self.points, self.dtype)

  def step(self, vorticity: jax.Array) -> jax.Array:
    """ω [N, N] one dt later."""
    return self.advance(vorticity, 1)

  def advance(self, vorticity: jax.Array, steps: int) -> jax.Array:
    """ω [N, N] after `steps` steps; in between it stays in Fourier space."""
    _need(self.dtype)
    n = self.points
    ky, kx = _waves(n)
    keep = (np.abs(ky) <= (n - 1) // 3) & (kx <= (n - 1) // 3)
    half = np.exp(-(self.viscosity * (kx**2 + ky**2) + self.drag) * self.dt / 2)
    plain, damped = self._tendency(keep, np.ones_like(half)), self._tendency(keep, half)
    half = half.astype(self.dtype)

    def step(w, _):
      a = plain(w)
      b = damped(w + 3 * a)
      c = plain(half * w + 3 * b)
      d = damped(half * w + 6 * c)
      return half * (half * (w + a) + 2 * (b + c)) + d, None

    waves, _ = jax.lax.scan(
      step, jnp.fft.rfft2(vorticity) * keep.astype(self.dtype), length=steps
    )
    return jnp.fft.irfft2(waves, s=(n, n))

  def output(self, vorticity: jax.Array) -> jax.Array:
    """All of ω [N, N]."""
    return vorticity

  @property
  def symmetries(self) -> int:
    """Elements of `group` on this grid."""
    return 4 * self.wave * self.points

  def move(self, vorticity: jax.Array, element: int | jax.Array) -> jax.Array:
    """One of them, by index, on ω [..., N, N]."""
    return move(vorticity, element, self.wave)

  def static(self) -> dict[str, np.ndarray]:
    """What is known of the box, on the output's grid, of unit rms: forcing, its vorticity −cos qy,
    [points, points].

    Every symmetry of the equation leaves it as it is, so augmentation does too.
    """
    n = self.points
    line = -math.sqrt(2) * np.cos(self.wave * 2 * math.pi / n * np.arange(n))
    return {"forcing": np.broadcast_to(line[:, None], (n, n)).astype(np.float32)}

  def _tendency(self, keep, decay):
    """w -> dt/6 · (ω̂_t of advection and forcing at ω̂ = decay·w), [N, N/2 + 1].

    Constants are multiplied here: XLA merges two that follow each other, but not in a batch, so
    that bits would vary.
    """
    n, unit = self.points, self.dt / 6
    ky, kx = _waves(n)
    to_u, to_v = (m * decay.astype(self.dtype) for m in _velocity(n, self.dtype))
    of_uv, of_squares = (
      (unit * keep * m).astype(self.dtype) for m in (kx**2 - ky**2, -kx * ky)
    )
    force = np.where(
      (kx == 0) & (np.abs(ky) == self.wave),
      -unit * self.forcing * self.wave * n**2 / 2,
      0.0,
    )
    force = force.astype(self.dtype)

    def tendency(w):
      u, v = jnp.fft.irfft2(to_u * w, s=(n, n)), jnp.fft.irfft2(to_v * w, s=(n, n))
      return (
        of_uv * jnp.fft.rfft2(u * v)
        + of_squares * jnp.fft.rfft2((u - v) * (u + v))
        + force
      )

    return tendency


# ---------------------------------------------------------------- coarse


@dataclasses.dataclass(frozen=True)
class Coarse:
  """Finite volume on few staggered cells, van Leer's limiter, pressure projection; biased, which is
  its purpose.

  Velocity sits on faces, u[j, i] at (i, j + ½)h and v[j, i] at (i + ½, j)h, h = 2π/cells; pressure
  in cell centres; vorticity on corners (i, j)h. Each component is carried by fluxes speed · (upwind
  value, limited slope), the speed the mean of two faces; viscosity, drag and forcing are explicit.
  The pressure solves the five-point Poisson equation by FFT, so the discrete divergence is zero to
  rounding. Momentum changes by drag alone. The scheme commutes with `group`.

  integrator: "euler", order 1, slopes cut by (1 − |u|dt/h) as Lax and Wendroff's (the convention of
  jax-cfd's `advect_van_leer`), or "heun", order 2 (SSP), slopes whole.

  The bias on 32² points against `Fine` at 128², every 4th point; covariances averaged over `group`
  (symcov), spectra over shells 1 ... 16; 96 trajectories × 6 snapshots 6 apart from t = 40, the
  reference 32 × 10, 3 apart:

      cells, integrator, dt            symcov   MELRu   MELRw
      the paper's LFLR (covRMSE)       .458     1.254   .196
      floor: Fine, half against half   .117     .019
      32² euler .02                    .479     1.184   .672   the default
      32² heun .02                     .393     1.158   .602
      48² euler .0125                  .300     1.023   .458   48 trajectories, as below
      64² euler .01                    .225     .722    .319
      64² heun .01                     .135     .609    .226

  cells: n, a multiple of 2·wave. points: of the output: every (cells/points)-th corner, no
  averaging, as C′ has none; or, where that is no whole number (48 to 32), the waves below points/2.
  dt: at most what carries the fastest flow over one cell (32²: .034); all of 32 trajectories on 32²
  lived to t = 40 at twice that. The others as in `Fine`.
  State: (u, v) [2, n, n].
  Raises: ValueError for a dt beyond stability, an unknown integrator, or more points than cells.
  """

  cells: int = 32
  dt: float = 0.02
  points: int = 32
  integrator: str = "euler"
  viscosity: float = 1e-3
  drag: float = 0.1
  forcing: float = 1.0
  wave: int = 4
  dtype: str = "float32"
  stream: ClassVar[int] = 1
  block: ClassVar[str] = "coarse"
  bound = property(_largest_rms)
  length: ClassVar[float] = LENGTH

  def __post_init__(self):
    stable = 1 / (FASTEST / self.h + 4 * self.viscosity / self.h**2 + self.drag / 2)
    constants = (self.viscosity, self.drag, self.forcing)
    _check("coarse", self.cells, self.wave, self.dt, stable, self.dtype, constants)
    if self.integrator not in ("euler", "heun"):
      raise ValueError(
        f"config.coarse.integrator={self.integrator!r} is unknown; known: 'euler', 'heun'."
      )
    check_glide(self.cells, self.wave, "config.coarse.cells")
    if not 2 <= self.points <= self.cells or self.points % 2:
      raise ValueError(
        f"{self.cells}² cells cannot give {self.points}² points: need an even number of points, no "
        f"more than cells. Set --config.coarse.cells={max(self.points, GRID)}."
      )

  @property
  def domain(self) -> domains.Domain:
    """Of the fields that `output` keeps."""
    return domain(self.points, self.wave)

  @property
  def shared(self) -> dict[str, float]:
    """Constants that the fine solver must have as well, as the symmetries hang on them."""
    return {"wave": self.wave}

  @property
  def h(self) -> float:
    """Width of a cell."""
    return LENGTH / self.cells

  @property
  def grid(self) -> np.ndarray:
    """x, and y, of the corners, [n]."""
    return np.arange(self.cells) * self.h

  def start(self, key: jax.Array) -> jax.Array:
    _need(self.dtype)
    return self.from_vorticity(initial_vorticity(key, self.cells, self.dtype))

  def from_vorticity(self, vorticity: jax.Array) -> jax.Array:
    """(u, v) [2, n, n] without divergence or mean, whose `vorticity` is ω [n, n] less its mean."""
    psi = self._poisson(-vorticity)
    return (
      jnp.stack(
        [
          jnp.roll(psi, -1, 0) - psi,
          psi - jnp.roll(psi, -1, 1),
        ]
      )
      / self.h
    )

  def vorticity(self, state: jax.Array) -> jax.Array:
    """ω [n, n] at the corners: v_x − u_y by differences."""
    u, v = state
    return (v - jnp.roll(v, 1, 1) - u + jnp.roll(u, 1, 0)) / self.h

  def divergence(self, state: jax.Array) -> jax.Array:
    """u_x + v_y in the cell centres, [n, n]."""
    u, v = state
    return (jnp.roll(u, -1, 1) - u + jnp.roll(v, -1, 0) - v) / self.h

  def project(self, state: jax.Array) -> jax.Array:
    """(u, v) less the gradient that holds its divergence."""
    p = self._poisson(self.divergence(state))
    return (
      state
      - jnp.stack(
        [
          p - jnp.roll(p, 1, 1),
          p - jnp.roll(p, 1, 0),
        ]
      )
      / self.h
    )

  def tendency(self, state: jax.Array) -> jax.Array:
    """All but the pressure's part of (u, v)_t, [2, n, n]."""
    u, v = state
    advection = jnp.stack(
      [
        self._advect(u, v, 1, 0),
        self._advect(v, u, 0, 1),
      ]
    )
    around = sum(jnp.roll(state, s, axis) for axis in (1, 2) for s in (1, -1))
    push = self.forcing * np.sin(self.wave * (self.grid + self.h / 2))
    push = np.stack(
      [
        np.tile(push[:, None], self.cells),
        np.zeros((self.cells, self.cells)),
      ]
    )
    viscous = (self.viscosity / self.h**2) * (around - 4 * state)
    return advection + push.astype(self.dtype) + viscous - self.drag * state

  def step(self, state: jax.Array) -> jax.Array:
    """(u, v) [2, n, n] one dt later."""
    _need(self.dtype)
    one = self.project(state + self.dt * self.tendency(state))
    if self.integrator == "euler":
      return one
    return self.project((state + one + self.dt * self.tendency(one)) / 2)

  def advance(self, state: jax.Array, steps: int) -> jax.Array:
    """(u, v) [2, n, n] after `steps` steps."""
    return jax.lax.scan(
      lambda s, _: (self.step(s), None),
      state,
      length=steps,
    )[0]

  def output(self, state: jax.Array) -> jax.Array:
    """ω [points, points]."""
    vorticity = self.vorticity(state)
    if self.cells % self.points:
      return _resample(vorticity, self.points)
    every = self.cells // self.points
    return vorticity[::every, ::every]

  def group(self) -> symmetry.Group:
    """The symmetries that the output's grid keeps."""
    return group(self.points, self.wave)

  def _poisson(self, source: jax.Array) -> jax.Array:
    """The solution of mean zero of Δ_h p = source − mean, Δ_h the five-point Laplacian; [n, n]."""
    ky, kx = _waves(self.cells)
    symbol = (2 / self.h) ** 2 * (
      np.sin(np.pi * kx / self.cells) ** 2 + np.sin(np.pi * ky / self.cells) ** 2
    )
    symbol[0, 0] = np.inf
    hat = jnp.fft.rfft2(source) * (-1 / symbol).astype(self.dtype)
    return jnp.fft.irfft2(hat, s=source.shape)

  def _advect(self, q, other, along, across):
    """−∇·(q u) on the faces of component q, whose own axis is `along`; `other` is the other
    component.
    """
    speed = (q + jnp.roll(q, -1, along)) / 2
    crossing = (
      jnp.roll(
        other + jnp.roll(other, 1, along),
        -1,
        across,
      )
      / 2
    )
    out = self._flux(q, speed, along), self._flux(q, crossing, across)
    return (
      sum(
        jnp.roll(f, 1, axis) - f for f, axis in zip(out, (along, across), strict=True)
      )
      / self.h
    )

  def _flux(self, q, speed, axis):
    """Flux of q over the faces after q's places along `axis`, where the speed is given."""
    ahead = jnp.roll(q, -1, axis) - q
    slope = van_leer(jnp.roll(ahead, 1, axis), ahead)
    reach = 0.5
    if self.integrator == "euler":
      reach = 0.5 - (0.5 * self.dt / self.h) * jnp.abs(speed)
    left, right = (
      q + reach * slope,
      jnp.roll(q, -1, axis) - reach * jnp.roll(slope, -1, axis),
    )
    return speed * jnp.where(speed > 0, left, right)
