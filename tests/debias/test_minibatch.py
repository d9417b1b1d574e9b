"""Minibatch fits: the full solve's potential, closed forms, both rules against numpy, resuming,
refusals.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from downscaling.debias.entropic import entropic_map, minibatch, sinkhorn
from downscaling.runtime import checkpoints as checkpoints_lib
from downscaling.runtime import supervision


def normal(n, d, seed, scale=1.0):
  return (scale * np.random.default_rng(seed).normal(size=(n, d))).astype(np.float32)


passes = minibatch.shuffled


def test_passes_show_every_row_once_and_each_in_another_order():
  x = np.arange(10)[:, None]
  batch = minibatch.shuffled(x, 3, seed=1)
  first, second = (
    np.concatenate([batch(step) for step in range(k, k + 3)])[:, 0] for k in (0, 3)
  )
  assert len(set(first)) == len(set(second)) == 9
  assert list(first) != list(second)
  np.testing.assert_array_equal(
    batch(4), minibatch.shuffled(x, 3, seed=1)(4)
  )  # whatever was asked before
  assert not np.array_equal(
    first, np.concatenate([minibatch.shuffled(x, 3)(step) for step in range(3)])[:, 0]
  )
  with pytest.raises(
    ValueError, match="batches of 11 from 10 rows: need 1 <= size <= 10"
  ):
    minibatch.shuffled(x, 11)


def weights(x, y, g, epsilon):
  """w_ij of the plan's rows, [n, m], float64."""
  x, y, g = (np.asarray(a, np.float64) for a in (x, y, g))
  return scipy.special.softmax(
    (g - ((x[:, None] - y[None]) ** 2).sum(-1)) / epsilon, axis=1
  )


@pytest.mark.parametrize("rule", minibatch.RULES)
def test_converges_to_the_full_solve(rule):
  # Far from the origin: centred inside.
  x, y = normal(200, 3, 0), normal(150, 3, 1, 1.4) + 300
  x = x + 300
  full = sinkhorn.fit(x, y, epsilon=0.05, threshold=1e-5, max_iterations=5000)
  assert full.converged
  result = minibatch.fit(
    passes(x, 50), y, held_out=x, epsilon=0.05, steps=1000, rule=rule
  )
  assert result.rows == 50_000
  assert result.epsilon == pytest.approx(full.epsilon, rel=1e-5)
  gap = np.asarray(result.g, np.float64) - np.asarray(full.g, np.float64)
  gap = np.abs(gap - gap.mean()).max() / full.epsilon
  # measured on three seeds, in units of ε (g itself spans 20 to 35): mixed and sgd .03–.04; online
  # .32–.42, as the mean of its logarithm is not 0
  assert gap < (0.8 if rule == "online" else 0.08)


def test_gaussian_stream_closed_form():
  """Janati et al. 2020 (arXiv:2006.02572), theorem 1, as in test_sinkhorn_fit; the source is never
  repeated.
  """
  m, rng = 1000, np.random.default_rng(0)
  mix_a, mix_b = np.array([[1.0, 0.0], [0.6, 0.8]]), np.array([[0.5, 0.3], [0.0, 1.4]])
  y = (rng.normal(size=(m, 2)) @ mix_b.T - [0.0, 1.0]).astype(np.float32)
  batch = lambda step: (
    np.random.default_rng(step).normal(size=(128, 2)) @ mix_a.T + [3.0, 0.0]
  ).astype(np.float32)
  held_out = np.concatenate([batch(10_000 + k) for k in range(8)])
  result = minibatch.fit(batch, y, held_out=held_out, epsilon=0.1, steps=400)
  root = lambda c: (lambda v, q: (q * np.sqrt(v)) @ q.T)(*np.linalg.eigh(c))
  a, b, sigma2 = mix_a @ mix_a.T, np.cov(y.T, ddof=0), result.epsilon / 2
  half, eye = root(a), np.eye(2)
  cross = (
    half @ root(4 * half @ b @ half + sigma2**2 * eye) @ np.linalg.inv(half) / 2
    - sigma2 / 2 * eye
  )
  inside = (
    np.linalg.norm((held_out - [3.0, 0.0]) @ np.linalg.inv(half), axis=1) < 2
  )  # tails of 1000 targets are thin
  linear = (held_out - [3.0, 0.0]) @ np.linalg.inv(a) @ cross
  mapped = entropic_map.EntropicMap(y, np.asarray(result.g), result.epsilon, (2,))(
    held_out
  ) - y.mean(0)
  gap = np.linalg.norm((mapped - linear)[inside]) / np.linalg.norm(linear[inside])
  # what 1000 targets differ from a Gaussian: measured .027–.040 (m 800 and 1500, 200 and 600
  # steps). ε for σ² = ε/2 moves the map by 25 %, no ε by 27 % (test_sinkhorn_fit).
  assert gap < 0.06


@pytest.mark.parametrize("rule", minibatch.RULES)
def test_steps_equal_dense_numpy(rule, monkeypatch):
  """The formulas of the module's docstring in float64, tiles of rows with a rest, the schedule's
  ends, the average.
  """
  # 9 rows a tile, 3 tiles for 25 rows.
  monkeypatch.setattr(minibatch, "TILE_NUMBERS", 40 * 9)
  minibatch._update.clear_cache()
  steps, m, y = 10, 40, normal(40, 3, 1)
  batch, held_out = passes(normal(100, 3, 0), 25), normal(30, 3, 2)
  result = minibatch.fit(
    batch,
    y,
    held_out=held_out,
    epsilon=0.1,
    steps=steps,
    rule=rule,
    rates=(0.8, 0.2),
    anneal=(8.0, 0.5),
  )
  minibatch._update.clear_cache()
  epsilon = 0.1 * ((held_out[:, None].astype(np.float64) - y[None]) ** 2).sum(-1).mean()
  assert result.epsilon == pytest.approx(epsilon, rel=1e-5)
  g, average = np.zeros(m), np.zeros(m)
  for step in range(steps):
    eps, rate = epsilon * 8.0 ** max(0, 1 - step / 5), 0.8 * 0.25 ** (step / 9)
    p = m * weights(batch(step), y, g, eps).mean(0)
    online = rule == "online" or (rule == "mixed" and step < 5)
    g = g - eps * (np.log(1 + rate * (p - 1)) if online else rate * (p - 1))
    g -= g.mean()
    average = g if step <= 5 else average + (g - average) * 4 / (step - 5 + 4)
  # ten steps of float32 exponents of up to 50: 1e-5 · ε each; a step more or less at the last ε
  # moves g by .1 ε
  np.testing.assert_allclose(result.g, average, atol=1e-3 * epsilon)


def test_history_is_what_the_held_out_rows_say():
  x, y, held_out = normal(400, 3, 0), normal(60, 3, 1, 1.3), normal(301, 3, 2)
  result = minibatch.fit(
    passes(x, 40), y, held_out=held_out, epsilon=0.05, steps=130, check_every=50
  )
  history = result.history
  assert history["step"] == [50, 100, 130]
  assert (
    history["epsilon"][0]
    > history["epsilon"][1]
    == history["epsilon"][2]
    == result.epsilon
  )
  g = np.asarray(result.g)
  a, b = (
    60 * weights(rows, y, g, result.epsilon).mean(0)
    for rows in (held_out[:150], held_out[150:300])
  )
  cost = ((held_out[:300, None].astype(np.float64) - y[None]) ** 2).sum(-1)
  soft = result.epsilon * (
    scipy.special.logsumexp((g - cost) / result.epsilon, axis=1) - np.log(60)
  )
  # float32 exponents
  assert history["error"][-1] == pytest.approx(np.abs((a + b) / 2 - 1).mean(), rel=1e-3)
  assert history["rms"][-1] ** 2 == pytest.approx(
    max(0, ((a - 1) * (b - 1)).mean()), abs=1e-4
  )
  assert history["dual"][-1] == pytest.approx(g.mean() - soft.mean(), rel=1e-4)


def test_dual_and_rms_tell_a_good_potential_from_none():
  x, y, held_out = normal(4000, 3, 0), normal(100, 3, 1, 1.4), normal(4000, 3, 2)
  fit = lambda steps: (
    minibatch.fit(
      passes(x, 100), y, held_out=held_out, epsilon=0.05, steps=steps
    ).history
  )
  short, long = fit(2), fit(400)
  assert long["dual"][-1] > short["dual"][-1]
  # g has the noise of its own 4000 rows: measured .07–.09 on three seeds, and 1.7–1.8 after two
  # steps
  assert long["rms"][-1] < 0.2 < 1 < short["rms"][-1]


def saved(folder):
  return checkpoints_lib.Checkpoints(folder, "hash")


def stop_after(times):
  asked = iter([False] * times)
  return lambda: next(asked, True)


@pytest.mark.parametrize(
  "asked", [1, 3]
)  # while ε falls, with no check yet; at the last ε, with one behind
def test_stopped_and_resumed_is_undisturbed_bit_for_bit(tmp_path, asked):
  x, y, held_out = normal(300, 4, 0), normal(70, 4, 1), normal(50, 4, 2)
  options = dict(held_out=held_out, epsilon=0.02, steps=36, check_every=20)
  whole = minibatch.fit(passes(x, 30), y, **options)
  saver = saved(tmp_path / "c")
  with pytest.raises(
    supervision.Interrupted,
    match=rf"stopped after {8 * asked} of 36 steps.*; the same command goes on",
  ):
    minibatch.fit(
      passes(x, 30), y, **options, checkpoints=saver, stop=stop_after(asked)
    )
  assert saver.steps() == [8 * asked]
  saver.close()
  saver = saved(tmp_path / "c")
  seen, calls = [], []
  batch = lambda step: seen.append(step) or passes(x, 30)(step)
  resumed = minibatch.fit(
    batch, y, **options, checkpoints=saver, progress=lambda *call: calls.append(call)
  )
  assert seen == [0, *range(8 * asked, 36)]  # the first tells the stream
  assert sum(call[0] for call in calls) == 36 - 8 * asked
  assert resumed.history == whole.history
  np.testing.assert_array_equal(resumed.g, whole.g)
  again = minibatch.fit(
    passes(x, 30),
    y,
    **options,
    checkpoints=saver,
    stop=lambda: pytest.fail("nothing is left"),
  )
  np.testing.assert_array_equal(again.g, whole.g)
  assert again.history == whole.history
  for changed in (
    dict(steps=40),
    dict(held_out=held_out + 1e-3),
    dict(rates=(0.9, 0.1)),
  ):
    with pytest.raises(
      ValueError, match="belong to other rows, steps or rates than these"
    ):
      minibatch.fit(passes(x, 30), y, **options | changed, checkpoints=saver)
  with pytest.raises(ValueError, match="belong to other rows"):
    minibatch.fit(passes(x + 1e-3, 30), y, **options, checkpoints=saver)
  saver.close()


def test_memory_is_a_tile():
  """4096 rows against 8192 targets are 134 MB of exponents; a tile of 2²¹ is 8."""
  shapes = [
    jax.ShapeDtypeStruct(s, jnp.float32)
    for s in ((4096, 24), (8192, 24), (8192,), (8192,), (), (), ())
  ]
  compiled = minibatch._update.lower(*shapes, online=True).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 20e6  # measured 8.8 MB


def with_nan(rows, *bad):
  rows = rows.copy()
  rows[list(bad), 0] = np.nan
  return rows


GOOD = normal(20, 3, 0)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      dict(batch=lambda step: with_nan(GOOD, *[4] * (step == 3))),
      r"batch 3 rows hold NaN .* 1 of 20 rows \(4\): drop",
    ),
    (
      dict(batch=lambda step: GOOD[: 20 - step]),
      r"batch\(1\) is \(19, 3\), need \(20, 3\): every batch has as many rows",
    ),
    (
      dict(batch=lambda step: GOOD[:, :2]),
      r"batch\(0\) is \(20, 2\), need \(20, 3\): .* on the target's grid",
    ),
    (
      dict(batch=lambda step: GOOD[:0]),
      r"batch 0 rows of shape \(0, 3\) came, need \[rows, d\] with at least 1",
    ),
    (dict(target=with_nan(GOOD, 7)), r"target rows hold NaN .* \(7\)"),
    (dict(target=GOOD[:1]), r"target rows of shape \(1, 3\) came, need .* at least 2"),
    (
      dict(target=np.ones((20, 3))),
      "all 20 target rows are the same: a constant cloud",
    ),
    (dict(held_out=with_nan(GOOD, 7)), "held-out rows hold NaN"),
    (
      dict(held_out=GOOD[:, :2]),
      r"target \(20, 3\) and held-out rows \(20, 2\) came, need .* of one d",
    ),
    (dict(epsilon=0.0), "epsilon=0.0: need a share of the mean cost > 0"),
    (dict(epsilon=float("nan")), "epsilon=nan"),
    (
      dict(epsilon=1e-7),
      r"epsilon=1e-07 of the mean cost is too small for float32: .* Use epsilon >= \d\.\de-06",
    ),
    (dict(steps=0), "steps=0, check_every=50: both must be at least 1"),
    (dict(rule="adam"), r"rule='adam' is unknown; known: \['mixed', 'online', 'sgd'\]"),
    (dict(rates=(1.0, 0.1)), r"rates=\(1.0, 0.1\): need 1 > first >= last > 0"),
    (dict(rates=(0.1, 0.5)), "need 1 > first >= last > 0"),
    (
      dict(anneal=(0.5, 0.5)),
      "need .first ε over last >= 1, share of the steps, 0 <= share < 1",
    ),
    (dict(anneal=(8.0, 1.0)), "0 <= share < 1"),
  ],
)
def test_refusals_say_what_to_change(change, message):
  options = (
    dict(batch=lambda step: GOOD, target=GOOD + 1, held_out=GOOD, epsilon=0.1, steps=8)
    | change
  )
  with pytest.raises(ValueError, match=message) as caught:
    minibatch.fit(options.pop("batch"), options.pop("target"), **options)
  assert "\n" not in str(caught.value)


def test_divergence_is_said(monkeypatch):
  monkeypatch.setattr(
    minibatch, "_update", lambda x, y, g, mean, *_: (g * np.nan, mean * np.nan)
  )
  with pytest.raises(
    FloatingPointError,
    match=r"diverged by step 8, at ε = .*: lower rates \(now \(0.9, 0.05\)\)",
  ):
    minibatch.fit(lambda step: GOOD, GOOD + 1, held_out=GOOD, epsilon=0.1, steps=8)
