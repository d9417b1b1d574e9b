"""KS: growth rates, orders, conservation, symmetry, limiter, trajectories by id."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from downscaling.equations import ks, rollouts
from downscaling.runtime import mesh

L = 64.0
SOLVERS = [
  ks.Fine(),
  ks.Coarse(),
  ks.Coarse("rusanov", 120, 0.05, integrator="ars222"),
  ks.Coarse("half", 48, 0.05),
]


def states(solver, count, time=50.0):
  """States on the solver's attractor, [count, N]."""
  key = jax.random.PRNGKey(7)
  one = lambda i: solver.advance(
    solver.start(jax.random.fold_in(key, i)), round(time / solver.dt)
  )
  return jax.jit(jax.vmap(one))(jnp.arange(count))


def advanced(solver, u, time):
  return np.asarray(
    jax.jit(jax.vmap(lambda v: solver.advance(v, round(time / solver.dt))))(u)
  )


def relative(a, b):
  return np.linalg.norm(a - b) / np.linalg.norm(b)


def order(solvers, steps, u, time, reference):
  errors = [relative(advanced(s, u, time), reference) for s in solvers]
  return np.polyfit(np.log(steps), np.log(errors), 1)[0]


# ---------------------------------------------------------------- initial condition


def test_initial_condition_is_one_function_on_every_grid(x64):
  """Fine and coarse read the same function: a draw that depended on the grid would differ at shared
  points.
  """
  key, fine, coarse = jax.random.PRNGKey(3), ks.Fine(), ks.Coarse()
  on_fine = ks.initial_condition(key, jnp.asarray(fine.grid), L)
  on_coarse = ks.initial_condition(key, jnp.asarray(coarse.grid), L)
  # The argument of the sine differs in the last bit between the grids; 30 terms of at most ½.
  np.testing.assert_allclose(on_fine[::2], on_coarse, atol=1e-13)


def test_initial_condition_has_the_law_of_the_paper(x64):
  """Waves 1, 2, 3 alone; variance 30 · E[a²] · E[sin²] = 30/12/2 = 1.25, a third in each wave."""
  x = jnp.asarray(ks.Fine(24).grid)
  u = np.asarray(
    jax.vmap(lambda k: ks.initial_condition(k, x, L))(
      jax.random.split(jax.random.PRNGKey(0), 4096)
    )
  )
  energy = 2 * (np.abs(np.fft.rfft(u) / 24) ** 2).mean(0)
  assert energy[[0, *range(4, 13)]].max() < 1e-25  # rounding squared
  # |û|² is nearly exponential: its mean over 4096 is good to 1/64, five of which are .08. U[0, 1]
  # amplitudes give 4x.
  np.testing.assert_allclose(energy[1:4], 1.25 / 3, rtol=0.08)


# ---------------------------------------------------------------- linear part


@pytest.mark.parametrize("wave", [3, 7, 12])
def test_fine_growth_rate(x64, wave):
  """A small wave grows by exp((k² − k⁴) t); waves 3 and 7 grow, 12 decays."""
  s, k = ks.Fine(), 2 * np.pi * wave / L
  u = 1e-9 * jnp.cos(k * s.grid)
  end = jax.jit(lambda u: s.advance(u, 40))(u)
  # The flux adds 1e-9 relative; a lost sign or a missing u_xxxx shows in the first digit.
  np.testing.assert_allclose(
    end, u * np.exp((k**2 - k**4) * 40 * s.dt), atol=1e-7 * float(jnp.abs(end).max())
  )


@pytest.mark.parametrize(("integrator", "growth"), [
  ("euler", lambda z: 1 / (1 - z)),
  ("ars222", lambda z: (1 + z * (2**0.5 - 1)) / (1 - z * (1 - 0.5**0.5)) ** 2),
])  # fmt: skip
def test_coarse_growth_factor(x64, integrator, growth):
  """A small wave is multiplied by the integrator's stability function at dt·λ, λ of the three-point
  difference.
  """
  s = ks.Coarse("central", integrator=integrator)
  for wave in (3, 7, 40):
    h, k = L / s.cells, 2 * np.pi * wave / L
    second = 2 * (1 - np.cos(k * h)) / h**2
    u = 1e-9 * jnp.cos(k * s.grid)
    expected = growth(s.dt * (second - second**2)) * u
    # As above; ars222's function is that of the L-stable SDIRK of order 2 (Alexander 1977).
    np.testing.assert_allclose(
      s.step(u), expected, atol=1e-7 * float(jnp.abs(expected).max())
    )


# ---------------------------------------------------------------- orders


def test_fine_is_fourth_order_in_time(x64):
  """On 48 points, where λ dt is small; the full grid's stiff tail makes it 3.0–3.8 over the steps
  of Fine's table.
  """
  u = states(ks.Fine(48), 4)
  steps = [1 / 16, 1 / 32, 1 / 64]
  reference = advanced(ks.Fine(48, dt=1 / 512), u, 1.0)
  # ETDRK2 gives 2, a wrong weight in one stage 1.
  assert order(
    [ks.Fine(48, dt=dt) for dt in steps], steps, u, 1.0, reference
  ) == pytest.approx(4.0, abs=0.3)


@pytest.mark.parametrize(("integrator", "expected"), [("euler", 1.0), ("ars222", 2.0)])
def test_coarse_order_in_time(x64, integrator, expected):
  u = states(ks.Coarse(), 4)
  make = lambda dt: ks.Coarse(dt=dt, integrator=integrator)
  steps = [1 / 16, 1 / 32, 1 / 64]
  reference = advanced(ks.Coarse(dt=1 / 512, integrator="ars222"), u, 1.0)
  # ars222 with its explicit weights (d, 1 − d) exchanged, or a stage without its linear part, falls
  # to 1.
  assert order([make(dt) for dt in steps], steps, u, 1.0, reference) == pytest.approx(
    expected, abs=0.25
  )


@pytest.mark.parametrize("drift", [2.0, -2.0])
@pytest.mark.parametrize("scheme", sorted(ks.FLUXES))
def test_flux_is_second_order_on_smooth_fields(x64, scheme, drift):
  """−(½u²)_x of u = ±2 + sin(2πx/L): no sonic point; either sign, so that either side of a face is
  used.
  """
  q, cells, errors = 2 * np.pi / L, [48, 96, 192, 384], []
  for n in cells:
    s = ks.Coarse(scheme, n, 0.05)
    u = drift + jnp.sin(q * jnp.asarray(s.grid))
    exact = -u * q * jnp.cos(q * s.grid)
    errors.append(float(jnp.abs(jax.jit(s.tendency)(u) - exact).mean()))
  # The limiter flattens the two extrema: order 2 in the mean (measured 1.9-2.0). First-order upwind
  # shows 1.0.
  assert -np.polyfit(np.log(cells), np.log(errors), 1)[0] == pytest.approx(
    2.0, abs=0.25
  )


def test_coarse_tends_to_fine(x64):
  """Many cells and small steps lead to the other solver's solution: both integrate one equation."""
  fine = ks.Fine(dt=1 / 32)
  u = states(fine, 4)
  end, errors = advanced(fine, u, 1.0), []
  for every in (2, 1):
    s = ks.Coarse(cells=192 // every, dt=1 / 64, integrator="ars222")
    errors.append(relative(advanced(s, u[:, ::every], 1.0), end[:, ::every]))
  # Second order halves twice as the cells halve; a wrong constant in the flux or in λ leaves an
  # error of order 1.
  assert errors[1] < 0.35 * errors[0]
  assert errors[1] < 0.02


# ---------------------------------------------------------------- conservation and symmetry


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_mean_is_conserved(x64, solver):
  """A non-zero mean stays to rounding over 1000 steps: u·u_x in place of ½(u²)_x drifts by 1e-3 in
  one.
  """
  u = states(solver, 2) + 0.25
  end = advanced(solver, u, 1000 * solver.dt)
  np.testing.assert_allclose(end.mean(1), np.asarray(u).mean(1), atol=1e-12)


def test_fine_energy_balance(x64):
  """d/dt ½⟨u²⟩ = ⟨u_x²⟩ − ⟨u_xx²⟩: the flux only moves energy between waves."""
  s = ks.Fine(dt=1e-3)
  u = np.asarray(states(ks.Fine(), 4))
  k = 2 * np.pi * np.arange(97) / L
  energy = lambda v: np.mean(v**2, axis=1) / 2
  ux, uxx = (np.fft.irfft(f * np.fft.rfft(u), n=192) for f in (1j * k, -(k**2)))
  one, two = advanced(s, u, s.dt), advanced(s, u, 2 * s.dt)
  rate = (-3 * energy(u) + 4 * energy(one) - energy(two)) / (2 * s.dt)
  # One-sided second-order difference: dt² relative. A flux of another size or an aliased one misses
  # by 1e-2.
  np.testing.assert_allclose(
    rate, np.mean(ux**2, axis=1) - np.mean(uxx**2, axis=1), atol=1e-4
  )


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_solvers_commute_with_the_group(x64, solver):
  """Shift or reflect, then step = step, then shift or reflect; on the solver's own grid."""
  u = states(solver, 1)[0]
  n = u.shape[0]
  g, step = ks.group(n), jax.jit(solver.step)
  assert len(g) == 2 * n
  for element in (0, 1, n // 3, n, n + 1, 2 * n - 5):
    moved = step(g.act(element, u))
    # Rounding of the FFT. A flux upwinded to one side, or ½-cell offsets in the reflection, err by
    # 1e-2.
    np.testing.assert_allclose(moved, g.act(element, step(u)), atol=1e-13)


def test_group():
  g = ks.group(24)
  y = np.random.default_rng(0).normal(size=24).astype(np.float32)
  every = np.stack([g.act(i, jnp.asarray(y)) for i in range(len(g))])
  np.testing.assert_array_equal(every[0], y)
  np.testing.assert_array_equal(every[5], np.roll(y, -5))
  # x -> −x keeps the point x = 0.
  np.testing.assert_array_equal(every[24], -np.roll(y[::-1], 1))
  assert len(np.unique(every, axis=0)) == 48
  # Closed: acting twice gives nothing new.
  twice = np.stack(
    [g.act(j, jnp.asarray(every[i])) for i in (1, 24, 31) for j in range(48)]
  )
  assert len(np.unique(np.concatenate([every, twice]), axis=0)) == 48


# ---------------------------------------------------------------- limiter


def burgers(scheme, u, steps, courant):
  """Forward Euler steps of the explicit part alone; returns total variation, maximum and minimum
  after each.
  """
  s = ks.Coarse(scheme, len(u))
  dt = courant * (L / len(u)) / float(jnp.abs(u).max())
  rows = []
  for _ in range(steps):
    u = u + dt * s.tendency(u)
    rows.append(
      (float(jnp.abs(u - jnp.roll(u, 1)).sum()), float(u.max()), float(u.min()))
    )
  return np.array(rows).T


@pytest.mark.parametrize("scheme", ["godunov", "rusanov"])
@pytest.mark.parametrize("shape", ["steps", "noise"])
def test_limited_fluxes_make_no_new_extrema(x64, scheme, shape):
  """Total variation never grows, nor the range, at |u| dt/h ≤ 0.4 (the bound for this limiter is
  ½).

  Unlimited slopes, or a limiter fed with the wrong neighbour, overshoot at the first step.
  """
  u = (
    np.random.default_rng(1).normal(size=48)
    if shape == "noise"
    else np.repeat([1.0, -0.5, 2.0, -1.0], 12)
  )
  u = jnp.asarray(u)
  variation, top, bottom = burgers(scheme, u, 60, 0.4)
  rounding = 1e-12
  assert variation[0] <= float(jnp.abs(u - jnp.roll(u, 1)).sum()) + rounding
  assert np.diff(variation).max() <= rounding
  assert top.max() <= float(u.max()) + rounding
  assert bottom.min() >= float(u.min()) - rounding


def test_central_flux_does_make_new_extrema(x64):
  """So the test above can tell."""
  _, top, _ = burgers(
    "central", jnp.asarray(np.repeat([1.0, -0.5, 2.0, -1.0], 12)), 5, 0.4
  )
  assert top.max() > 2.05


def test_shock_moves_at_its_speed(x64):
  """Burgers shock 2 -> 0 moves at 1 (Rankine–Hugoniot): conservation form, right constant ½."""
  n = 192
  s = ks.Coarse("godunov", n)
  u = jnp.where((jnp.asarray(s.grid) > 8) & (jnp.asarray(s.grid) < 16), 2.0, 0.0)
  dt, steps = 0.05, 80
  for _ in range(steps):
    u = u + dt * s.tendency(u)
  front = float(s.grid[np.nonzero(np.asarray(u) > 1.0)[0].max()])
  assert front == pytest.approx(16 + dt * steps, abs=2 * L / n)


# ---------------------------------------------------------------- trajectories


@pytest.mark.parametrize("solver", [ks.Fine(24), ks.Coarse()], ids=["fine", "coarse"])
def test_trajectories_by_id_on_any_batch_and_any_devices(x64, solver):
  """Bit for bit: sums are written in one order and complex divisions avoided, so no program rounds
  differently.

  A key folded with the row, a batch-shaped draw or a per-device key would differ in the first
  digit.
  """
  ids = np.array([5, 1, 900_000_007, 3, 4, 2, 0, 6])
  kwargs = dict(seed=11, burn_in=2.0, spacing=1.0, snapshots=3)
  eight = np.asarray(rollouts.rollout(solver, ids, **kwargs))
  assert eight.shape == (8, 3, 24)
  assert eight.dtype == np.float64
  np.testing.assert_array_equal(
    np.asarray(rollouts.rollout(solver, ids[2:3], **kwargs)), eight[2:3]
  )
  np.testing.assert_array_equal(
    np.asarray(rollouts.rollout(solver, ids[::-1], **kwargs)), eight[::-1]
  )
  rows = mesh.rows(mesh.make(4))
  four = rollouts.rollout(solver, jax.device_put(ids, rows), sharding=rows, **kwargs)
  assert four.sharding.is_equivalent_to(rows, four.ndim)
  np.testing.assert_array_equal(np.asarray(four), eight)


def test_devices_do_not_talk(x64):
  """The compiled program holds no collective; left to XLA's partitioner each FFT gathers the whole
  batch.
  """
  rows = mesh.rows(mesh.make(4))
  text = (
    rollouts._compiled(ks.Coarse(), 4, 2, 2, rows)
    .lower(np.uint32(0), jnp.arange(8))
    .compile()
    .as_text()
  )
  for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
    assert collective not in text


def test_snapshots_are_the_states_at_their_times(x64):
  solver = ks.Coarse()
  kept = rollouts.rollout(
    solver, np.array([4]), seed=2, burn_in=3.0, spacing=2.0, snapshots=3
  )[0]
  key = jax.random.fold_in(jax.random.fold_in(jax.random.PRNGKey(2), solver.stream), 4)
  for j in range(3):
    u = jax.jit(lambda u, n=30 + 20 * j: solver.advance(u, n))(solver.start(key))
    # Another program than the rollout's: rounding, grown a little. One step too many shows in the
    # second digit.
    np.testing.assert_allclose(kept[j], u[::4], atol=1e-11)


def test_fine_and_coarse_worlds_are_unpaired(x64):
  """Equal seeds and ids, unrelated fields: |correlation| of 64 initial fields, about 4 degrees of
  freedom each.
  """
  kwargs = dict(seed=0, burn_in=0.0, spacing=1.0, snapshots=1)
  fine = np.asarray(rollouts.rollout(ks.Fine(), np.arange(64), **kwargs))[:, 0, ::8]
  coarse = np.asarray(rollouts.rollout(ks.Coarse(), np.arange(64), **kwargs))[:, 0]
  # std of the correlation about 1/√(64·4) = .06; paired worlds give 1.
  assert abs(np.corrcoef(fine.ravel(), coarse.ravel())[0, 1]) < 0.3


# ---------------------------------------------------------------- messages


def test_times_that_are_no_multiple_of_dt():
  assert rollouts.step_counts(0.1, 25.0, 12.5) == (250, 125)
  assert rollouts.step_counts(0.125, 0.0, 12.5) == (0, 100)
  with pytest.raises(
    ValueError,
    match=r"dt=0.03 does not divide .*nearest dt that does is 0.0299760191847\.",
  ):
    rollouts.step_counts(0.03, 25.0, 12.5)
  assert rollouts.step_counts(0.0299760191847, 25.0, 12.5) == (
    834,
    417,
  )  # what the message says can be typed
  with pytest.raises(ValueError, match=r"nearest dt that does is 0.5\."):
    # Longer than either, whose common divisor is ½.
    rollouts.step_counts(20.0, 2.5, 2.0)
  with pytest.raises(ValueError, match="need dt > 0"):
    rollouts.step_counts(-1.0, 25.0, 12.5)


def test_blow_up_is_named_with_id_and_time():
  u = np.zeros((3, 4, 24))
  rollouts.check_finite(u, np.arange(3), np.arange(4.0))
  u[1, 2:, 5] = np.nan
  u[2, 3] = np.inf
  message = r"trajectory 41 is not finite at t = 50 \(so ended 2 of 3 "
  message += r".*smaller dt \(--config.coarse.dt"
  with pytest.raises(FloatingPointError, match=message):
    rollouts.check_finite(u, np.array([40, 41, 42]), 25.0 + 12.5 * np.arange(4))


def test_blow_up_reaches_the_caller(x64):
  """A step far beyond stability ends in NaN, not in a plausible field."""
  u = rollouts.rollout(
    ks.Coarse("central", 48, 2.5),
    np.arange(2),
    burn_in=25.0,
    spacing=12.5,
    snapshots=20,
  )
  with pytest.raises(FloatingPointError, match=r"trajectory [01] is not finite"):
    rollouts.check_finite(u, np.arange(2), 25.0 + 12.5 * np.arange(20))


def test_messages():
  with pytest.raises(
    ValueError,
    match=r"scheme='upwind' is unknown; known: \['central', 'godunov', 'half', 'rusanov'\]",
  ):
    ks.Coarse("upwind")
  with pytest.raises(ValueError, match="integrator='rk4' is unknown"):
    ks.Coarse(integrator="rk4")
  with pytest.raises(
    ValueError, match=r"100 cells cannot be strided to 24 points.*coarse.cells=96"
  ):
    ks.Coarse(cells=100)
  with pytest.raises(ValueError, match="need an even number"):
    ks.Fine(points=191)
  with pytest.raises(ValueError, match=r"float64.*enable_x64"):
    rollouts.rollout(ks.Fine(), np.arange(4))
  with pytest.raises(ValueError, match=r"ids are float64\[4\], need integers"):
    rollouts.rollout(ks.Fine(), np.ones(4))
  with pytest.raises(ValueError, match="snapshots=0"):
    rollouts.rollout(ks.Fine(), np.arange(4), snapshots=0)
  with pytest.raises(
    ValueError, match=r"6 trajectories over 4 devices: .*Pad ids to 8"
  ):
    rollouts.rollout(ks.Fine(), np.arange(6), sharding=mesh.rows(mesh.make(4)))
