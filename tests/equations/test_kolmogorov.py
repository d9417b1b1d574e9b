"""Kolmogorov flow: closed forms, another code, orders, conservation, symmetry, precision,
trajectories by id.
"""

import functools

import exponax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from downscaling.equations import kolmogorov, rollouts
from downscaling.runtime import mesh

FREE = dict(drag=0.0, forcing=0.0)
SOLVERS = [
  kolmogorov.Fine(32, 0.02),
  kolmogorov.Coarse(),
  kolmogorov.Coarse(integrator="heun"),
]
DOUBLE = [
  kolmogorov.Fine(32, 0.02, dtype="float64"),
  kolmogorov.Coarse(dtype="float64"),
]
DOUBLE += [kolmogorov.Coarse(integrator="heun", dtype="float64")]


@functools.partial(jax.jit, static_argnums=(0, 2))
def advanced(solver, u, steps):
  return solver.advance(u, steps)


@functools.cache
def field(points, time=3.0, seed=7):
  """A turbulent vorticity field on points², float64, of waves below 21; call within x64."""
  fine = kolmogorov.Fine(64, 0.02, dtype="float64")
  return np.asarray(kolmogorov._resample(grown(fine, time, seed), points))


@functools.cache
def grown(solver, time, seed=7):
  return advanced(
    solver, solver.start(jax.random.PRNGKey(seed)), round(time / solver.dt)
  )


def state_of(solver, vorticity):
  """The solver's state that has this vorticity, on its own grid."""
  vorticity = jnp.asarray(vorticity, solver.dtype)
  return (
    solver.from_vorticity(vorticity)
    if isinstance(solver, kolmogorov.Coarse)
    else vorticity
  )


def corners(solver, state):
  return solver.vorticity(state) if isinstance(solver, kolmogorov.Coarse) else state


def relative(a, b):
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  return np.linalg.norm(a - b) / np.linalg.norm(b)


def slope(sizes, errors):
  return np.polyfit(np.log(sizes), np.log(errors), 1)[0]


def plane(n):
  """(y, x) of an n² grid of corners, each [n, n]."""
  at = np.arange(n) * (2 * np.pi / n)
  return np.meshgrid(at, at, indexing="ij")


# ---------------------------------------------------------------- initial field


def test_initial_vorticity_is_one_function_on_every_grid(x64):
  """A draw that depended on the grid would differ at shared points in the first digit; here
  rounding of an FFT.
  """
  key = jax.random.PRNGKey(3)
  on = {
    n: np.asarray(kolmogorov.initial_vorticity(key, n, "float64"))
    for n in (32, 48, 64, 128)
  }
  np.testing.assert_allclose(on[64][::2, ::2], on[32], atol=1e-12)
  np.testing.assert_allclose(on[128][::4, ::4], on[32], atol=1e-12)
  np.testing.assert_allclose(on[48][::3, ::3], on[32][::2, ::2], atol=1e-12)
  assert abs(on[128].mean()) < 1e-13
  energy = np.abs(np.fft.fft2(on[64])) ** 2
  k = np.hypot(*np.meshgrid(*[np.fft.fftfreq(64, 1 / 64)] * 2))
  assert energy[k > 8.001].max() < 1e-25 * energy.max()  # rounding squared


def test_initial_speed_is_three(x64):
  """Face velocities of the finite-volume solver, an estimate of another kind than the one that
  scales.
  """
  s = kolmogorov.Coarse(256, 1e-3, dtype="float64")
  speeds = [
    float(jnp.abs(s.start(jax.random.PRNGKey(seed))).max()) for seed in range(4)
  ]
  # Exactly 3 on 32² points; between those the maximum may lie higher, by (5 · π/32)²/2 = 12 % for a
  # wave of 5.
  assert min(speeds) > 2.98
  assert max(speeds) < 3.36


def test_coarse_starts_from_the_same_vorticity(x64):
  """Corners of the coarse solver are points of the fine grid: the same function, no shift by a
  cell.
  """
  key, s = jax.random.PRNGKey(5), kolmogorov.Coarse(dtype="float64")
  fine = kolmogorov.Fine(128, dtype="float64").start(key)
  np.testing.assert_allclose(s.output(s.start(key)), fine[::4, ::4], atol=1e-12)


# ---------------------------------------------------------------- closed forms


@pytest.mark.parametrize("solver", [
  kolmogorov.Fine(32, 0.02, 0.05, **FREE, dtype="float64"),
  kolmogorov.Coarse(64, 0.01, 64, "heun", 0.05, **FREE, dtype="float64"),
], ids=["fine", "coarse"])  # fmt: skip
def test_taylor_green_decays(x64, solver):
  """ω = 2q cos qx cos qy decays by exp(−2 q² ν t): advection balances pressure, so its part must
  vanish.
  """
  n, q, time = len(solver.grid), 2, 1.0
  y, x = plane(n)
  start = 2 * q * np.cos(q * x) * np.cos(q * y)
  end = corners(
    solver, advanced(solver, state_of(solver, start), round(time / solver.dt))
  )
  error = relative(end, start * np.exp(-2 * q**2 * 0.05 * time))
  # Fine: rounding, as viscosity is exact. Coarse: (q h)²/12 of the second difference, and the
  # limiter at extrema; measured 4e-3. Without the pressure, or with ν twice, .3 and more.
  assert error < (1e-12 if isinstance(solver, kolmogorov.Fine) else 0.012)


@pytest.mark.parametrize("solver", DOUBLE, ids=repr)
def test_laminar_flow_is_steady(x64, solver):
  """u = χ/(μ + ν q²) sin qy, v = 0, so ω = −χ q/(μ + ν q²) cos qy: sign, axis and size of forcing
  and drag.
  """
  n, q = len(solver.grid), solver.wave
  h = 2 * np.pi / n
  y, _ = plane(n)
  # Its differences of sin qy have other eigenvalues.
  if isinstance(solver, kolmogorov.Coarse):
    k, sine = (2 / h * np.sin(q * h / 2)) ** 2, 2 / h * np.sin(q * h / 2)
  else:
    k, sine = q**2, q
  exact = -sine / (solver.drag + solver.viscosity * k) * np.cos(q * y)
  end = corners(solver, advanced(solver, state_of(solver, exact), 20))
  # Fine: Lawson's fixed point is off by (rate dt)⁴/120 or so; coarse: exact. Grown a little, being
  # unstable.
  np.testing.assert_allclose(end, exact, atol=1e-9 * np.abs(exact).max())


def test_viscosity_and_drag_damp_a_shear(x64):
  """cos 3x alone: no advection. Fine by exp(−(μ + 9ν) t); coarse by 1 − dt(μ + ν m) a step."""
  n, steps = 32, 10
  start = np.cos(3 * plane(n)[1])
  fine = kolmogorov.Fine(n, 0.02, 0.02, forcing=0.0, dtype="float64")
  np.testing.assert_allclose(
    advanced(fine, start, steps), start * np.exp(-(0.1 + 0.18) * 0.2), atol=1e-13
  )
  coarse = kolmogorov.Coarse(n, 0.02, n, "euler", 0.02, forcing=0.0, dtype="float64")
  m = (2 / coarse.h * np.sin(1.5 * coarse.h)) ** 2
  end = coarse.vorticity(advanced(coarse, state_of(coarse, start), steps))
  np.testing.assert_allclose(
    end, start * (1 - 0.02 * (0.1 + 0.02 * m)) ** steps, atol=1e-13
  )


def test_fine_agrees_with_exponax(x64):
  """Another code's ETDRK4, for −ω with x and y exchanged; its forcing has the other sign of ours,
  hence −1.
  """
  s = kolmogorov.Fine(
    64, 0.005, 0.2, dtype="float64"
  )  # viscous: one code drops waves > 21, the other > 20
  other = exponax.stepper.KolmogorovFlowVorticity(
    2, 2 * np.pi, 64, 0.005, diffusivity=0.2, injection_scale=-1.0, order=4
  )
  start = s.start(jax.random.PRNGKey(0))
  theirs = jax.jit(
    lambda w: jax.lax.scan(lambda w, _: (other(w), None), w, length=40)[0]
  )(-start.T[None])
  # Measured 3e-6, the waves between 20 and 21. Another sign of the forcing or of the velocity gives
  # .1 and more.
  assert relative(advanced(s, start, 40), -theirs[0].T) < 1e-5


def test_fine_conserves_energy_and_enstrophy(x64):
  """Without viscosity, drag and forcing: what aliasing or a wrong factor in a flux would break."""
  s = kolmogorov.Fine(32, 0.005, 0.0, **FREE, dtype="float64")
  start = field(32)
  start = np.asarray(advanced(s, start, 0))  # dealiased
  end = np.asarray(advanced(s, start, 100))
  ky, kx = kolmogorov._waves(32)
  k2 = kx**2 + ky**2
  weight = np.where((kx == 0) | (kx == 16), 1, 2) / np.where(k2 > 0, k2, np.inf)
  energy = lambda w: (np.abs(np.fft.rfft2(w)) ** 2 * weight).sum()
  # RK4 loses (σ dt)⁵ a step: measured 1e-8. Without dealiasing 1e-3.
  assert energy(end) == pytest.approx(energy(start), rel=1e-6)
  assert (end**2).sum() == pytest.approx((start**2).sum(), rel=1e-6)
  assert relative(end, start) > 0.1  # it did move


# ---------------------------------------------------------------- conservation


@pytest.mark.parametrize("solver", DOUBLE, ids=repr)
def test_mean_vorticity_stays_zero(x64, solver):
  end = corners(solver, advanced(solver, state_of(solver, field(32)), 200))
  # Rounding of a mean over 1024 values of order 5.
  assert abs(float(end.mean())) < 1e-13


def test_fine_keeps_a_mean_of_vorticity(x64):
  """Fluxes are divergences: whatever the mean is, advection and forcing leave it alone."""
  s = kolmogorov.Fine(32, 0.02, drag=0.0, dtype="float64")
  assert float(advanced(s, field(32) + 0.25, 200).mean()) == pytest.approx(
    0.25, abs=1e-13
  )


@pytest.mark.parametrize("integrator", ["euler", "heun"])
def test_momentum_changes_by_drag_alone(x64, integrator):
  """A mean flow is multiplied by the integrator's factor each step; u·∇u instead of fluxes drifts
  by 1e-3 in one.
  """
  s = kolmogorov.Coarse(integrator=integrator, dtype="float64")
  start = (
    s.from_vorticity(jnp.asarray(field(32))) + jnp.asarray([0.3, -0.2])[:, None, None]
  )
  z = -s.drag * s.dt
  factor = 1 + z + (z**2 / 2 if integrator == "heun" else 0)
  end = advanced(s, start, 200)
  np.testing.assert_allclose(
    end.mean((1, 2)), np.array([0.3, -0.2]) * factor**200, atol=1e-13
  )


@pytest.mark.parametrize(("dtype", "rounding"), [("float32", 2e-5), ("float64", 2e-14)])
def test_divergence_is_rounding(x64, dtype, rounding):
  """Relative to the velocity's gradient, after 100 steps: the Poisson solve inverts the very
  divergence it removes.
  """
  s = kolmogorov.Coarse(dtype=dtype)
  end = advanced(s, state_of(s, field(32)), 100)
  assert end.dtype == dtype
  assert np.abs(s.divergence(end)).max() < rounding * np.abs(s.vorticity(end)).max()
  # A spectral Laplacian in place of the five-point one leaves 1e-1. And the projection changes
  # nothing twice:
  np.testing.assert_allclose(
    s.project(end), end, atol=rounding * float(jnp.abs(end).max())
  )


def test_projection_removes_a_gradient_and_nothing_else(x64):
  s = kolmogorov.Coarse(dtype="float64")
  rng = np.random.default_rng(0)
  flow = s.from_vorticity(jnp.asarray(rng.normal(size=(32, 32))))
  p = jnp.asarray(rng.normal(size=(32, 32)))
  gradient = jnp.stack([p - jnp.roll(p, 1, 1), p - jnp.roll(p, 1, 0)])
  np.testing.assert_allclose(s.project(flow + gradient), flow, atol=1e-12)


def test_from_vorticity_inverts_vorticity(x64):
  s = kolmogorov.Coarse(dtype="float64")
  w = np.random.default_rng(1).normal(size=(32, 32))
  np.testing.assert_allclose(
    s.vorticity(s.from_vorticity(jnp.asarray(w))), w - w.mean(), atol=1e-12
  )


# ---------------------------------------------------------------- orders


@pytest.mark.parametrize(
  ("drift", "integrator"), [(4.0, "heun"), (-4.0, "heun"), (4.0, "euler")]
)
def test_advection_is_second_order_on_smooth_fields(x64, drift, integrator):
  """Against −(u·∇)u of a smooth flow with a mean, either sign, so that either side of a face is
  upwind.
  """
  errors, cells = [], [32, 64, 128]
  for n in cells:
    s = kolmogorov.Coarse(
      n, 1e-6, n, integrator, dtype="float64"
    )  # dt → 0: the Courant factor is not part of this
    at, h = np.arange(n) * s.h, s.h
    u = lambda y, x: drift + np.sin(y) * np.cos(x)
    v = lambda y, x: drift / 2 - np.cos(y) * np.sin(x)
    y, x = np.meshgrid(at + h / 2, at, indexing="ij")
    got = s._advect(
      jnp.asarray(u(y, x)),
      jnp.asarray(v(*np.meshgrid(at, at + h / 2, indexing="ij"))),
      1,
      0,
    )
    exact = u(y, x) * np.sin(y) * np.sin(x) - v(y, x) * np.cos(y) * np.cos(x)
    errors.append(np.abs(got - exact).mean())
  # The limiter flattens extrema: order 2 in the mean. First-order upwind, or a speed half a cell
  # off, gives 1.
  assert slope(cells, errors) == pytest.approx(-2.0, abs=0.3)


def test_fine_is_fourth_order_in_time(x64):
  make = lambda dt: kolmogorov.Fine(32, dt, dtype="float64")
  end = lambda dt: advanced(make(dt), jnp.asarray(field(32)), round(0.64 / dt))
  steps, reference = [0.04, 0.02, 0.01], end(0.00125)
  # A wrong weight or a stage at the wrong time gives 1 or 2.
  assert slope(steps, [relative(end(dt), reference) for dt in steps]) == pytest.approx(
    4.0, abs=0.3
  )


@pytest.mark.parametrize(("integrator", "expected"), [("euler", 1.0), ("heun", 2.0)])
def test_coarse_order_in_time(x64, integrator, expected):
  """From a smooth state, for a short time: the limiter's kinks would blur the order otherwise."""
  make = lambda dt, kind: kolmogorov.Coarse(32, dt, 32, kind, dtype="float64")
  start = make(0.02, "heun").start(jax.random.PRNGKey(0))
  end = lambda dt, kind: advanced(make(dt, kind), start, round(0.16 / dt))
  reference, steps = end(0.000625, "heun"), [0.02, 0.01, 0.005]
  errors = [relative(end(dt, integrator), reference) for dt in steps]
  assert slope(steps, errors) == pytest.approx(
    expected, abs=0.3
  )  # a second stage not projected gives 1


def test_coarse_tends_to_fine(x64):
  """More cells lead to the other solver's vorticity at the same points: one equation, one forcing,
  no shift.
  """
  key, nu = jax.random.PRNGKey(2), 0.02
  fine = kolmogorov.Fine(64, 0.02, nu, dtype="float64")
  reference = advanced(fine, fine.start(key), 10)[::2, ::2]
  errors = []
  for cells in (32, 64, 128):
    s = kolmogorov.Coarse(cells, 0.005, 32, "heun", nu, dtype="float64")
    errors.append(relative(s.output(advanced(s, s.start(key), 40)), reference))
  # Measured .177, .072, .022: second order in the velocity, less the limiter's kinks, whose
  # differences vorticity is. An output off by one corner leaves .5 at any size.
  assert errors[1] < errors[0] / 2
  assert errors[2] < errors[1] / 2.5
  assert errors[2] < 0.03


def test_limiter_makes_no_new_extrema():
  """A block carried by a uniform wind stays in its range; unlimited slopes overshoot by 10 %."""
  s = kolmogorov.Coarse(32, 0.02, 32, "euler", 0.0, **FREE)
  block = np.zeros((32, 32), np.float32)
  block[8:20, 8:20] = 1.0
  q, wind = jnp.asarray(block), jnp.full((32, 32), 2.0, jnp.float32)
  for _ in range(40):
    flux = s._flux(q, wind, 1)
    q = q + s.dt / s.h * (jnp.roll(flux, 1, 1) - flux)
  assert float(q.max()) <= 1 + 1e-5
  assert float(q.min()) >= -1e-5
  # 40 · .02 · 2 = 1.6 = 8.1 cells to the right
  assert float((q * np.arange(32)[None]).sum() / q.sum()) == pytest.approx(
    13.5 + 1.6 / s.h, abs=0.01
  )


# ---------------------------------------------------------------- symmetry


def test_group():
  g = kolmogorov.group(32)
  assert len(g) == 512
  w = np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32)
  every = np.stack(
    [g.act(e, jnp.asarray(w.ravel())).reshape(32, 32) for e in range(512)]
  )
  np.testing.assert_array_equal(every[0], w)
  np.testing.assert_array_equal(every[5], np.roll(w, -5, axis=1))
  np.testing.assert_array_equal(
    every[2 * 32], np.roll(w, -8, axis=0)
  )  # two glides: y by a quarter of the box
  np.testing.assert_array_equal(
    every[256], np.roll(w[::-1, ::-1], (1, 1), (0, 1))
  )  # the half turn keeps (0, 0)
  np.testing.assert_array_equal(
    every[32], -np.roll(np.roll(w[:, ::-1], 1, 1), -4, axis=0)
  )
  assert len(np.unique(every.reshape(512, -1), axis=0)) == 512
  # Closed: acting twice gives nothing new.
  twice = [
    g.act(b, jnp.asarray(every[a].ravel())).reshape(32, 32)
    for a in (1, 33, 300)
    for b in range(0, 512, 3)
  ]
  assert (
    len(np.unique(np.concatenate([every, np.stack(twice)]).reshape(-1, 1024), axis=0))
    == 512
  )


def test_move_is_the_group_without_a_table():
  w = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16)).astype(np.float32))
  g, move = kolmogorov.group(16), jax.jit(kolmogorov.move)
  for element in (0, 3, 16, 100, 128, 255):
    np.testing.assert_array_equal(
      move(w, element).reshape(2, -1), g.act(element, w.reshape(2, -1))
    )


@pytest.mark.parametrize("solver", DOUBLE, ids=repr)
def test_solvers_commute_with_the_group(x64, solver):
  """Move, then ten steps = ten steps, then move: shifts, glides, half turn and their products."""
  w = jnp.asarray(field(32))
  run = jax.jit(lambda w: corners(solver, solver.advance(state_of(solver, w), 10)))
  end, moved = run(w), jax.jit(kolmogorov.move)
  for element in (1, 32, 64 + 5, 256, 256 + 96 + 7):
    # Rounding grown over ten steps; fluxes upwinded to one side, or a glide by another fraction of
    # y, err by 1e-2.
    np.testing.assert_allclose(run(moved(w, element)), moved(end, element), atol=1e-11)
  # And it can fail: a glide of half the length is no symmetry of sin 4y.
  assert (
    relative(
      run(-jnp.roll(jnp.roll(w[:, ::-1], 1, 1), -2, 0)),
      -jnp.roll(jnp.roll(end[:, ::-1], 1, 1), -2, 0),
    )
    > 0.01
  )


def test_output_from_48_cells_keeps_the_symmetry_and_the_large_scales(x64):
  """48 -> 32 through Fourier space: a wave both grids have keeps its values, one only 48² has is
  gone.
  """
  s = kolmogorov.Coarse(48, 0.01, dtype="float64")
  wave = lambda n, k: np.cos(k * plane(n)[1] + 3 * plane(n)[0] + 1)
  np.testing.assert_allclose(
    s.output(s.from_vorticity(jnp.asarray(wave(48, 5)))), wave(32, 5), atol=1e-12
  )
  np.testing.assert_allclose(
    s.output(s.from_vorticity(jnp.asarray(wave(48, 17)))), 0.0, atol=1e-12
  )
  w = jnp.asarray(field(48))
  out = lambda w: s.output(s.from_vorticity(w))
  glide = lambda n: n  # element of one glide, no shift, on n points
  np.testing.assert_allclose(
    out(kolmogorov.move(w, glide(48))), kolmogorov.move(out(w), glide(32)), atol=1e-11
  )  # fmt: skip
  thirds = kolmogorov.Coarse(48, 0.01, 16, dtype="float64")
  np.testing.assert_allclose(
    thirds.output(thirds.from_vorticity(w)), (w - w.mean())[::3, ::3], atol=1e-11
  )


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("cls", [kolmogorov.Fine, kolmogorov.Coarse])
def test_float32_follows_float64(x64, cls):
  """Half a time unit from a turbulent state: rounding, hardly grown, at all scales that carry
  enstrophy.
  """
  size = {"points": 64} if cls is kolmogorov.Fine else {"cells": 32}
  one, two = (cls(**size, dt=0.01, dtype=d) for d in ("float32", "float64"))
  w = field(64 if cls is kolmogorov.Fine else 32).astype(np.float32)
  a, b = (np.asarray(corners(s, advanced(s, state_of(s, w), 50))) for s in (one, two))
  assert a.dtype == np.float32
  assert b.dtype == np.float64
  assert (
    relative(a, b) < 1e-5
  )  # ε32 = 6e-8 a step, √50 steps, a growth of e or so. bfloat16 anywhere: 1e-2
  inner = [np.abs(np.fft.rfft2(w)[1:15, 1:15]) for w in (a, b)]
  assert abs(np.log(inner[0] / inner[1])).max() < 1e-2


def test_float32_is_the_same_with_and_without_x64():
  s = kolmogorov.Fine(32, 0.02)
  plain = np.asarray(advanced(s, s.start(jax.random.PRNGKey(1)), 5))
  with jax.enable_x64(True):
    wide = advanced(s, s.start(jax.random.PRNGKey(1)), 5)
  assert wide.dtype == np.float32
  np.testing.assert_allclose(wide, plain, atol=1e-4)


# ---------------------------------------------------------------- trajectories


@pytest.mark.parametrize("solver", SOLVERS[:2], ids=["fine", "coarse"])
def test_trajectories_by_id_on_any_batch_and_any_devices(solver):
  """Bit for bit, as for KS: a draw or a sum that depended on the batch would differ."""
  ids = np.array([5, 1, 900_000_007, 3, 4, 2, 0, 6])
  kwargs = dict(seed=11, burn_in=1.0, spacing=0.5, snapshots=2)
  eight = np.asarray(rollouts.rollout(solver, ids, **kwargs))
  assert eight.shape == (8, 2, 32, 32)
  assert eight.dtype == np.float32
  assert relative(eight[0], eight[1]) > 0.5
  np.testing.assert_array_equal(
    np.asarray(rollouts.rollout(solver, ids[2:3], **kwargs)), eight[2:3]
  )
  np.testing.assert_array_equal(
    np.asarray(rollouts.rollout(solver, ids[:3], **kwargs)), eight[:3]
  )
  np.testing.assert_array_equal(
    np.asarray(rollouts.rollout(solver, ids[::-1], **kwargs)), eight[::-1]
  )
  rows = mesh.rows(mesh.make(4))
  four = rollouts.rollout(solver, jax.device_put(ids, rows), sharding=rows, **kwargs)
  np.testing.assert_array_equal(np.asarray(four), eight)


def test_devices_do_not_talk():
  rows = mesh.rows(mesh.make(4))
  text = (
    rollouts._compiled(kolmogorov.Coarse(), 4, 2, 2, rows)
    .lower(np.uint32(0), jnp.arange(8))
    .compile()
    .as_text()
  )
  for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
    assert collective not in text


def test_coarse_loses_enstrophy():
  """The worlds differ, as they must: 8 trajectories each, long after the start."""
  kwargs = dict(burn_in=20.0, spacing=5.0, snapshots=2)
  fine = np.asarray(rollouts.rollout(kolmogorov.Fine(64, 0.02), np.arange(4), **kwargs))
  coarse = np.asarray(rollouts.rollout(kolmogorov.Coarse(), np.arange(4), **kwargs))
  assert np.isfinite(fine).all()
  assert np.isfinite(coarse).all()
  # rms 4.6 on fine grids (lab.md measures 4.56), 3.5 or less on 32 cells; each good to .2 or so.
  assert 3.9 < fine.std() < 5.6
  assert 0.4 * fine.std() < coarse.std() < 0.92 * fine.std()


# ---------------------------------------------------------------- messages


def test_blow_up_reaches_the_caller():
  """A run beyond stability (built past the check) ends in NaN, and is named by id and time."""
  solver = kolmogorov.Coarse()
  object.__setattr__(solver, "dt", 0.25)
  u = rollouts.rollout(solver, np.arange(2), burn_in=5.0, spacing=5.0, snapshots=8)
  with pytest.raises(FloatingPointError, match=r"trajectory [01] is not finite at t ="):
    rollouts.check_finite(u, np.arange(2), 5.0 + 5.0 * np.arange(8))


def test_messages():
  with pytest.raises(
    ValueError,
    match=r"fine.dt=0.02 is not stable on 128² .*at most 0.0125. .*config.fine.dt=0.01,",
  ):
    kolmogorov.Fine(dt=0.02)
  with pytest.raises(
    ValueError,
    match=r"coarse.dt=0.05 is not stable on 32² .*0.0343. Set --config.coarse.dt=0.025",
  ):
    kolmogorov.Coarse(dt=0.05)
  with pytest.raises(
    ValueError, match="integrator='rk4' is unknown; known: 'euler', 'heun'"
  ):
    kolmogorov.Coarse(integrator="rk4")
  with pytest.raises(
    ValueError, match=r"32² cells cannot give 64² points: .*coarse.cells=64"
  ):
    kolmogorov.Coarse(points=64)
  with pytest.raises(ValueError, match="need an even number >= 32 of points"):
    kolmogorov.Fine(points=16)
  with pytest.raises(ValueError, match="dtype='float16' is unknown"):
    kolmogorov.Fine(dtype="float16")
  with pytest.raises(
    ValueError, match=r"A grid of 12 points .*multiple of 8 points, e.g. 16"
  ):
    kolmogorov.group(12)
  with pytest.raises(ValueError, match=r"float64.*enable_x64"):
    kolmogorov.Fine(dtype="float64").start(jax.random.PRNGKey(0))
