"""Selection among members: who stays, that a right ensemble is left alone, that no device and no
neighbour matters.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from downscaling.diffusion import schedules
from downscaling.fields.operators import Strided
from downscaling.runtime import mesh as meshes
from downscaling.runtime import program_cost
from downscaling.sampling import gaussian_gain, guidance, resampling, solvers

OP, MEMBERS = Strided.on((48,), 4), 8


def ensemble(field, conditions, members=MEMBERS, mesh=None, select=None, first=0):
  """(fields [K, M, N], misfits [K, M], the compiled program) for rows of conditions [K, n]; 8 steps
  of the SDE.
  """
  g = gaussian_gain.Gain(OP, gaussian_gain.prior_variance(field.spectrum))
  levels = schedules.levels("edm", 8, 3.0, 0.02)

  def draw(keys, y):
    guided = guidance.make("wiener", field.denoise, OP, y, gain=g)
    x = gaussian_gain.gaussian_start(keys, g, y, 3.0)
    step, among = (
      (guided.scored, {"select": select, "values": y[0].size})
      if select
      else (guided.denoise, {})
    )
    return solvers.dpm_solver_pp_2m_sde(
      step, x, levels, keys, last=guided.last_scored, **among
    )

  y = jnp.asarray(conditions, jnp.float32).repeat(members, 0)[..., None]
  ids = jnp.arange(first * members, first * members + len(y))
  keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(0)))(ids)
  rows = meshes.rows(mesh or meshes.make(1))
  program = (
    jax.jit(draw, in_shardings=(rows, rows), out_shardings=rows)
    .lower(keys, y)
    .compile()
  )
  fields, misfit = program(jax.device_put(keys, rows), jax.device_put(y, rows))
  return (
    np.asarray(fields).reshape(-1, members, 48),
    np.asarray(misfit).reshape(-1, members),
    program,
  )


def truths(field, count):
  return np.stack([field.draw(seed) for seed in range(count)])


def test_systematic_selection_counts():
  """Each member is drawn ⌊M w⌋ or ⌈M w⌉ times, M w times on average over the comb's place."""
  share = jnp.asarray([0.0, 0.35, 0.05, 0.6])
  drawn = jax.vmap(lambda place: resampling._systematic(share, place))(
    jnp.arange(200) / 200
  )
  counts = np.stack([np.bincount(row, minlength=4) for row in np.asarray(drawn)])
  assert (counts.sum(1) == 4).all()
  assert (np.abs(counts - 4 * np.asarray(share)) < 1).all()
  np.testing.assert_allclose(
    counts.mean(0), 4 * np.asarray(share), atol=0.011
  )  # places 1/200 apart, two edges each


def test_implausible_members_go_and_the_others_stay():
  """One condition of two has two members far off: they become copies of the rest; the other is not
  touched.
  """
  among = resampling.Resampling(members=4, strength=0.5, dead_zone=1.6)
  keys = jax.random.split(jax.random.key(0), 8)
  score = jnp.asarray([1.0, 40.0, 1.2, 90.0, 1.0, 1.5, 1.6, 0.2])
  weights = among.weigh(among.start(8), score, values=6, sigma=1.0)
  assert np.asarray(weights[1]).tolist() == [0, 0, 0, 0]  # all within the dead zone
  late = resampling.Resampling(members=4, strength=0.5, dead_zone=1.6, below=1.0)
  assert (np.asarray(late.weigh(late.start(8), score, values=6, sigma=1.0)) == 0).all()
  rows = {"x": jnp.arange(8.0), "y": jnp.arange(16.0).reshape(8, 2)}
  # Two equal members of four are an effective size of two: due, whatever the third step adds.
  weights = among.weigh(
    weights, jnp.asarray([1.0, 1, 1.7, 1, 1, 1, 1, 1]), values=6, sigma=1.0
  )
  after, picked = jax.jit(lambda w, r: among.select(keys, 3, w, r))(weights, rows)
  assert set(np.asarray(picked["x"][:4]).tolist()) <= {0.0, 2.0}
  assert np.asarray(picked["x"][4:]).tolist() == [4, 5, 6, 7]
  np.testing.assert_array_equal(picked["y"][:, 0], 2 * picked["x"])
  assert (np.asarray(after) == 0).all()


def test_a_gaussian_field_is_left_alone(gaussian):
  """Spread over the exact one, without selection, with it, and with one that has no dead zone to
  speak of.
  """
  field = gaussian((48,), corner=6.0)
  y = truths(field, 96)[:, ::4]
  _, cov = field.posterior(OP, y[0])
  ratios = []
  for how in (None, (0.125, 1.6), (1.0, 1.0)):
    chosen = how and resampling.Resampling(MEMBERS, *how)
    drawn, misfit, _ = ensemble(field, y, select=chosen)
    ratios.append(np.sqrt(drawn.var(axis=1, ddof=1).mean(0).sum() / np.trace(cov)))
    # χ²/d′ of 12 coarse values: mean 1, standard error at most √(2/12/96) = .04. Without A⁻¹ it
    # would be 1e-3.
    assert misfit.mean() == pytest.approx(1, abs=0.15)
  # 8 steps alone disperse by .075 (measured; .01 at 16); Monte Carlo √(1/(2·96·7·20)) < .01.
  assert ratios[0] == pytest.approx(1, abs=0.1)
  assert ratios[1] == pytest.approx(ratios[0], abs=0.02)
  assert ratios[2] < ratios[1] - 0.05


def test_one_device_selects_as_four_do(gaussian):
  """Members of a condition share a device, so nothing is sent; a selection by device would differ
  by O(1).
  """
  field = gaussian((48,), corner=6.0)
  select = resampling.Resampling(
    members=MEMBERS, strength=1.0, dead_zone=1.0
  )  # eager: something is selected
  y = truths(field, 8)[:, ::4]
  one, misfit, _ = ensemble(field, y, select=select)
  four, misfit_four, program = ensemble(field, y, select=select, mesh=meshes.make(4))
  plain, _, _ = ensemble(field, y)
  np.testing.assert_allclose(one, four, atol=2e-5)  # float32; the order of sums
  np.testing.assert_allclose(misfit, misfit_four, rtol=1e-3)
  assert np.abs(one - plain).max() > 0.1
  assert [c for c in program_cost.collectives(program) if c.bytes > 1e5] == []


def test_a_block_can_be_drawn_alone(gaussian):
  field = gaussian((48,), corner=6.0)
  select = resampling.Resampling(members=MEMBERS, strength=1.0, dead_zone=1.0)
  y = truths(field, 4)[:, ::4]
  whole, _, _ = ensemble(field, y, select=select)
  alone, _, _ = ensemble(field, y[2:3], select=select, first=2)
  np.testing.assert_allclose(alone[0], whole[2], atol=2e-5)


def test_wrong_modes_are_left(gaussian):
  """A prior of two modes, ±f, D = f tanh(f·x/σ²), and members that start in both: y says which is
  right.

  Without guidance and without selection every member stays where it started.
  """
  f = jnp.asarray(
    np.sqrt(2) * np.cos(2 * np.pi * np.arange(48) / 48 + 0.4), jnp.float32
  )
  g = gaussian_gain.Gain(
    OP, gaussian_gain.prior_variance(0.1 * gaussian((48,), corner=6.0).spectrum)
  )
  side = jnp.where(jnp.arange(4 * MEMBERS) % 3 == 0, 1.0, -1.0)
  y = jnp.broadcast_to(f[None, ::4, None], (len(side), 12, 1))
  keys = jax.random.split(jax.random.key(0), len(side))
  denoise = lambda x, sigma: (
    jnp.tanh(x[..., 0] @ f / sigma**2)[:, None, None] * f[None, :, None]
  )
  guided = guidance.make("none", denoise, OP, y, gain=g)
  start = side[:, None, None] * f[None, :, None] + solvers.noise(
    keys, solvers.START, (48, 1)
  )
  levels, select = (
    schedules.levels("edm", 8, 1.0, 0.02),
    resampling.Resampling(MEMBERS, 0.125),
  )
  plain = jax.jit(
    lambda: solvers.dpm_solver_pp_2m_sde(guided.denoise, start, levels, keys)
  )()
  best, _ = jax.jit(
    lambda: solvers.dpm_solver_pp_2m_sde(
      guided.scored,
      start,
      levels,
      keys,
      select=select,
      values=12,
      last=guided.last_scored,
    )
  )()
  np.testing.assert_array_equal(jnp.sign(plain[..., 0] @ f), side)
  assert (best[..., 0] @ f > 0).all()


def test_refusals():
  with pytest.raises(ValueError, match="among 1 member"):
    resampling.Resampling(members=1, strength=0.1)
  with pytest.raises(ValueError, match="less drains the spread"):
    resampling.Resampling(members=4, strength=0.1, dead_zone=0.5)
  with pytest.raises(ValueError, match="no whole conditions of 4"):
    resampling.Resampling(members=4, strength=0.1).start(6)
  with pytest.raises(ValueError, match="copies of a member would stay copies"):
    solvers.dpm_solver_pp_2m_sde(
      None,
      None,
      None,
      jax.random.split(jax.random.key(0), 4),
      eta=0.0,
      select=resampling.Resampling(4, 0.1),
    )


def test_a_condition_that_no_member_meets_is_judged_by_its_best():
  """Ten times the misfit for all: y′ lies outside what the prior knows, and none of them is to
  blame for it.
  """
  among = resampling.Resampling(members=4, strength=0.125, dead_zone=3.0)
  score = jnp.asarray([1.0, 2.0, 3.5, 9.0, 0.2, 0.4, 0.9, 3.1])
  weigh = lambda score: np.asarray(among.weigh(among.start(8), score, 24, 0.1))
  near, far = weigh(score), weigh(score.at[:4].multiply(10))
  np.testing.assert_allclose(
    near[0], [0, 0, -0.125 * 0.5 * 24, -0.125 * 6 * 24], rtol=1e-6
  )
  np.testing.assert_allclose(far, near, rtol=1e-5)  # the factor cancels to rounding
  np.testing.assert_allclose(
    near[1], [0, 0, 0, -0.125 * 0.1 * 24], rtol=1e-4
  )  # below 1 no misfit is scaled up


def test_a_member_without_a_score_drops_alone():
  """One NaN in the first condition: it weighs nothing, the rest as without it.

  All NaN in the second: no selection.
  """
  among = resampling.Resampling(members=4, strength=0.125, dead_zone=3.0)
  score = jnp.asarray([10.0, jnp.nan, 35.0, 90.0, *[jnp.nan] * 4, 1.0, 2.0, 3.5, 9.0])
  weights = np.asarray(among.weigh(among.start(12), score, 24, 0.1))
  assert weights[0, 1] == -np.inf
  np.testing.assert_allclose(
    weights[0, [0, 2, 3]], [0, -0.125 * 0.5 * 24, -0.125 * 6 * 24], rtol=1e-5
  )
  assert weights[1].tolist() == [0, 0, 0, 0]
  # Neighbours are untouched.
  np.testing.assert_allclose(weights[2], [0, 0, -1.5, -18.0], rtol=1e-5)
  keys, rows = jax.random.split(jax.random.key(0), 12), jnp.arange(12)
  after, picked = among.select(keys, 3, jnp.asarray(weights), rows)
  assert np.isfinite(after).all()
  assert 1 not in np.asarray(picked[:4])
  assert np.asarray(picked[4:8]).tolist() == [4, 5, 6, 7]
  # A member that is dropped stays so from step to step.
  few = among.weigh(among.start(4), jnp.asarray([1.0, jnp.nan, 1.0, 1.0]), 24, 0.1)
  again = among.weigh(few, jnp.asarray([1.0, jnp.nan, 1.0, 1.0]), 24, 0.1)
  np.testing.assert_array_equal(few, again)
  np.testing.assert_array_equal(again, [[0, -np.inf, 0, 0]])
