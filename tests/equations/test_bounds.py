"""The largest rms that a solution can have: proven where it is said to be, far from what runs have,
and enforced.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from downscaling.equations import kolmogorov, ks, rollouts


def rms(u):
  return np.sqrt((np.asarray(u, np.float64) ** 2).mean(tuple(range(2, np.ndim(u)))))


def unstable(solver, dt):
  """The solver with a dt that its door refuses."""
  object.__setattr__(solver, "dt", dt)
  return solver


@pytest.mark.parametrize(("constants", "bound"), [
  ({}, 24 * 2**0.5),  # of the start: 8 · 3√2
  ({"forcing": 2.0}, 8 / 2**0.5 / 0.101),
  ({"drag": 0.0}, 4 / 2**0.5 / 1e-3),
  ({"drag": 0.0, "viscosity": 0.0}, math.inf),
  ({"drag": 0.0, "viscosity": 0.0, "forcing": 0.0}, 24 * 2**0.5),
], ids=str)  # fmt: skip
def test_the_flows_bound_is_its_formula(constants, bound):
  assert kolmogorov.Fine(**constants).bound == pytest.approx(bound, rel=1e-12)
  assert kolmogorov.Coarse(**constants).bound == kolmogorov.Fine(**constants).bound


def test_the_laminar_flow_attains_the_flows_bound(x64):
  """u = χ sin qy/(μ + νq²) has Ω = χq/√2(μ + νq²): with q = 1 the inequality is an equality, from
  below and in time.

  So a bound with μ² or without √2 would be broken by the equation itself, or be no bound.
  """
  flow = kolmogorov.Fine(32, 0.02, drag=0.2, forcing=20.0, wave=1, dtype="float64")
  bound = 20 / 2**0.5 / (0.2 + 1e-3)
  assert flow.bound == pytest.approx(bound)
  y = np.arange(32) * (2 * np.pi / 32)
  steady = np.tile(-bound * 2**0.5 * np.cos(y)[:, None], 32)
  end = jax.jit(lambda w: flow.advance(w, 20))(jnp.asarray(steady))
  assert float(jnp.sqrt((end**2).mean())) == pytest.approx(
    bound, rel=1e-8
  )  # Lawson's fixed point: (rate dt)⁴/120


def test_no_start_of_the_flow_exceeds_its_part_of_the_bound(x64):
  """Ω(0) ≤ 8 · 3√2: attained only by a field of the wave 8 alone whose components are ±3
  everywhere.
  """
  starts = jax.vmap(lambda key: kolmogorov.initial_vorticity(key, 32, "float64"))(
    jax.random.split(jax.random.key(0), 256)
  )
  largest = float(jnp.sqrt((starts**2).mean((1, 2))).max())
  # 256 draws: 6 to 9. A start scaled by anything but its speed, or with waves beyond 8, leaves
  # this.
  assert 6 < largest < 12


SOLVERS = [
  kolmogorov.Fine(32, 0.02),
  kolmogorov.Coarse(),
  kolmogorov.Coarse(integrator="heun"),
  ks.Fine(48),
]
SOLVERS += [ks.Coarse(scheme) for scheme in sorted(ks.FLUXES)]


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_runs_stay_far_below(solver):
  """From the start to well on the attractor; margins are 4 and more: a bound that a healthy run can
  touch stops it.
  """
  with jax.enable_x64(True):
    u = np.asarray(
      rollouts.rollout(solver, np.arange(8), burn_in=0.0, spacing=2.5, snapshots=8)
    )
    rollouts.check(solver, u, np.arange(8), 2.5 * np.arange(8))
    assert rms(u).max() < solver.bound / 4


def test_a_blow_up_is_caught_while_it_is_finite():
  """Kept at every step, a run passes through absurd values: named by id, time, value, bound and
  what to set.
  """
  solver = unstable(kolmogorov.Coarse(), 0.25)
  times = 0.25 * np.arange(24)
  u = np.asarray(
    rollouts.rollout(solver, np.array([7, 8]), burn_in=0.0, spacing=0.25, snapshots=24)
  )
  beyond = rms(u) > solver.bound
  first = int(beyond.any(0).argmax())
  assert np.isfinite(u[:, first]).all()  # so that it is the bound that speaks
  row = int(beyond[:, first].argmax())
  words = rf"trajectory {7 + row} has an rms of \S+ at t = {times[first]:g}, "
  words += r"where no solution has more than 33\.9 .*"
  with pytest.raises(
    FloatingPointError, match=words + r"smaller dt, e\.g\. --config\.coarse\.dt=0\.125$"
  ):
    rollouts.check(solver, u, np.array([7, 8]), times)
  rollouts.check(solver, u[:, :first], np.array([7, 8]), times[:first])


def test_the_earliest_fault_is_named():
  """A value that is absurd at t = 2 comes before a NaN of another trajectory at t = 3, and a NaN
  before it.
  """
  solver, times, ids = ks.Fine(48), np.arange(4.0), np.array([40, 41, 42])
  u = np.zeros((3, 4, 48), np.float32)
  u[1, 2] = 11.0
  u[2, 3, 5] = np.nan
  with pytest.raises(
    FloatingPointError,
    match=r"trajectory 41 has an rms of 11 at t = 2, .* 10\.6 \(so ended 2 of 3 ",
  ):
    rollouts.check(solver, u, ids, times)
  u[0, 1] = np.inf
  with pytest.raises(FloatingPointError, match="trajectory 40 is not finite at t = 1 "):
    rollouts.check(solver, u, ids, times)
  u = np.zeros((1, 1, 48), np.float32)
  u[0, 0, 3] = 1e30  # its square is no float32
  with pytest.raises(FloatingPointError, match=r"rms of 1\.44e\+29 at t = 0"):
    rollouts.check(solver, u, ids[:1], times[:1])
