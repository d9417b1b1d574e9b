"""A training step against a plain loop, and what stands around it: the loop, the input,
compilation, memory.

  python benchmarks/training.py [--rounds=5] [--case=NAME]

Times are medians over rounds that alternate between the two sides of a ratio, so that a noisy
machine hits both. The rate of a matrix product in the same run says what the machine could do at
most.
"""

import contextlib
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from downscaling.datasets import simulated, training_batches
from downscaling.diffusion import denoiser, train_loop, train_state, train_step, unet
from downscaling.fields import statistics
from downscaling.runtime import checkpoints as ckpt
from downscaling.runtime import mesh as meshes
from downscaling.runtime import metric_writer, program_cost, supervision

ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds a measurement.", 1)

# name: (grid, batch, net): the KS prior of configs/ks.py, the sizes that the paper has for KS
# (appendix), and two 2-D nets on 64² with a space-to-depth stem.
NET = {"channels": (32, 64, 128), "strides": (2, 2, 2), "blocks": 1, "heads": 0}
CASES = {
  "ks": ((192,), 128, NET),
  "ks-paper": ((192,), 128, NET | {"blocks": 6, "heads": 8}),
  "64x64": ((64, 64), 8, NET | {"stem": 2}),
  "64x64-wide": ((64, 64), 8, NET | {"stem": 2, "channels": (64, 128, 192)}),
}
CASE = flags.DEFINE_enum("case", None, list(CASES), "One of the nets; all by default.")
ROOT = pathlib.Path(__file__).parents[1]


def pieces(space, net):
  """Denoiser, optimiser, noise levels."""
  spectrum = np.ones((*space, 1), np.float32)
  rate = train_state.learning_rate(
    peak=1e-3, end=1e-6, warmup_steps=2, total_steps=1000
  )
  draw = lambda key, batch: jnp.exp(-1.2 + 1.6 * jax.random.normal(key, (batch,)))
  return (
    denoiser.Denoiser(unet.UNet(**net), spectrum),
    train_state.optimizer(rate, 1.0),
    draw,
    rate,
  )


def ours(space, batch, net):
  """(compiled step, state, batch, seconds to compile)."""
  d, tx, draw, rate = pieces(space, net)
  mesh, keys = meshes.make(1), [jax.random.key(0), jax.random.key(1)]
  start, target, specs = train_state.make(
    mesh, lambda a, b: train_state.initial(d, tx, space, 1, 1, a, b), *keys
  )
  step = train_step.make_train_step(
    d, tx, draw, (0.999,), mesh, specs.params, rate=rate, log_every=50
  )
  example = jax.ShapeDtypeStruct(
    (batch, *space, 1), jnp.float32, sharding=meshes.rows(mesh)
  )
  began = time.perf_counter()
  program, flops = train_loop.compiled(step, target, {"x": example})
  seconds = time.perf_counter() - began
  x = jax.device_put(
    np.random.default_rng(0).normal(size=example.shape).astype(np.float32),
    meshes.rows(mesh),
  )
  return program, start(*keys), {"x": x}, seconds, flops


def plain(space, batch, net):
  """What one would write first: flax, optax and lax.conv, nothing sharded, nothing donated."""
  d, tx, draw, _ = pieces(space, net | {"convolution": "lax"})
  x = jnp.asarray(np.random.default_rng(0).normal(size=(batch, *space, 1)), jnp.float32)
  params = jax.jit(d.init)(jax.random.key(0), x[:1], jnp.ones(1))["params"]
  state = (params, params, tx.init(params), jax.random.key(1))

  @jax.jit
  def step(state, x):
    params, ema, opt_state, key = state
    key, a, b = jax.random.split(key, 3)
    sigma, noise = draw(a, len(x)), jax.random.normal(b, x.shape)
    loss, grads = jax.value_and_grad(
      lambda p: train_step.denoising_error(d, p, x, sigma, noise).mean()
    )(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    ema = jax.tree.map(lambda e, p: 0.999 * e + 0.001 * p, ema, params)
    return (params, ema, opt_state, key), loss

  return step, state, x


def timed(step, state, batch, count):
  """(seconds a step, state)."""
  state, out = step(state, batch)
  jax.block_until_ready(out)
  began = time.perf_counter()
  for _ in range(count):
    state, out = step(state, batch)
  jax.block_until_ready((state, out))
  return (time.perf_counter() - began) / count, state


def matmul_rate(n=1024):
  """FLOP/s of a float32 matrix product, the best of ten."""
  a, product = jnp.ones((n, n)), jax.jit(jnp.matmul)
  jax.block_until_ready(product(a, a))
  best = np.inf
  for _ in range(10):
    began = time.perf_counter()
    jax.block_until_ready(product(a, a))
    best = min(best, time.perf_counter() - began)
  return 2 * n**3 / best


def activations(space, batch, net):
  """Bytes that the backward pass keeps of the forward one, from the residuals of jax.vjp."""
  d, *_ = pieces(space, net)
  x, s = (
    jax.ShapeDtypeStruct((batch, *space, 1), jnp.float32),
    jax.ShapeDtypeStruct((batch,), jnp.float32),
  )
  params = jax.eval_shape(d.init, jax.random.key(0), x, s)["params"]
  loss = lambda p, x, s, n: jax.vjp(
    lambda p: train_step.denoising_error(d, p, x, s, n).mean(), p
  )[1]
  kept = jax.tree.leaves(jax.eval_shape(loss, params, x, s, x))
  own = {p.shape for p in jax.tree.leaves(params)}
  return sum(
    k.size * k.dtype.itemsize for k in kept if k.shape not in own
  ), train_state.count(params)


class Silent:
  """A progress bar that says nothing."""

  done = 0

  def advance(self, count, **_):
    self.done += count


def fit_seconds(folder, program, state, batches, mesh, first, count):
  """Seconds a step of `fit`, without evaluation and saving: those are asked for, not overhead."""
  total = first + count
  plan = train_loop.Plan(
    total_steps=total + 10**9, log_every=50, eval_every=0, save_every=0
  )
  writer = metric_writer.MetricWriter(folder)
  watch = train_loop.Watch(writer, Silent(), folder, batches.batch, 1.0, None)
  polls = iter([*[False] * (count - 1), True])
  saver = ckpt.Checkpoints(folder / f"checkpoints-{total}", "benchmark")
  saver.save = lambda *a, **k: jax.block_until_ready(a[1])
  stream = batches.stream(mesh, first, total)
  stream_first = next(stream)  # threads have started
  began = time.perf_counter()
  with contextlib.suppress(supervision.Interrupted):
    train_loop.fit(
      state=state, batches=chain(stream_first, stream), step_fn=program, plan=plan, evaluators={},
      saver=saver,
      watch=watch, stop=lambda: next(polls),
    )  # fmt: skip
  seconds = (time.perf_counter() - began) / count
  saver.close()
  writer.close()
  return seconds


def chain(first, rest):
  yield first
  yield from rest


def input_source(workdir):
  """The KS training split of the smoke config, in real array_record files."""
  command = [
    sys.executable,
    "-m",
    "downscaling",
    "generate",
    f"--config={ROOT}/configs/ks.py:smoke",
  ]
  subprocess.run([*command, f"--workdir={workdir}"], check=True, capture_output=True)
  return simulated.source(
    simulated.make("ks", "hfhr", f"{workdir}/data", (192,)), "train"
  )


def main(argv):
  del argv
  for name in [CASE.value] if CASE.value else CASES:
    space, batch, net = CASES[name]
    program, state, x, compile_seconds, flops = ours(space, batch, net)
    basic, basic_state, basic_x = plain(space, batch, net)
    pairs = []
    for _ in range(ROUNDS.value):
      a, state = timed(program, state, x, 5)
      b, basic_state = timed(basic, basic_state, basic_x, 5)
      pairs.append((a, b))
    us, them = np.median([a for a, _ in pairs]), np.median([b for _, b in pairs])
    kept, parameters = activations(space, batch, net)
    print(
      f"{name}: {parameters:,} parameters, batch {batch}, {flops / 1e9:.3g} GFLOP a step, "
      f"{jax.devices()[0]}"
    )
    print(
      f"  (a) ours {1e3 * us:.0f} ms, plain flax + optax with lax.conv {1e3 * them:.0f} ms: "
      f"{them / us:.2f} ×"
    )
    print(
      f"      {flops / us / 1e9:.0f} GFLOP/s; a matrix product here: {matmul_rate() / 1e9:.0f}"
    )
    print(f"  (d) compiled in {compile_seconds:.1f} s")
    memory = program_cost.memory(program)
    peak, hand = memory["arguments"] + memory["temporaries"], 4 * 4 * parameters + kept
    print(
      f"  (e) {peak / 1e6:.0f} MB by the compiler; parameters, average, two moments "
      f"{16 * parameters / 1e6:.0f} MB + activations {kept / 1e6:.0f} MB = {hand / 1e6:.0f} MB by "
      f"hand: {peak / hand:.2f} ×"
    )
    if name == "ks":
      around(program, state, x, batch)


def around(program, state, x, batch):
  """(b) the loop and (c) the input of the KS net."""
  stats = statistics.Statistics(
    np.zeros(1, np.float32), np.ones(1, np.float32), np.ones((192, 1), np.float32)
  )
  mesh = meshes.make(1)
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    batches = training_batches.Batches(input_source(folder), stats, batch, 0)
    pairs, count = [], 50
    for _ in range(ROUNDS.value):
      copy = lambda: jax.tree.map(lambda v: v.copy(), state)
      loop = fit_seconds(
        folder / "fit", program, copy(), batches, mesh, int(state.step), count
      )
      bare, _ = timed(program, copy(), x, count)
      pairs.append((loop, bare))
    ratios = [loop / bare for loop, bare in pairs]
    bare = np.median([b for _, b in pairs])
    print(
      f"  (b) fit over its bare step: {np.median(ratios):.3f} × (rounds "
      f"{', '.join(f'{r:.3f}' for r in ratios)})"
    )
    began = time.perf_counter()
    for _ in batches.stream(mesh, 0, 200):
      pass
    rate = 200 * batch / (time.perf_counter() - began)
    print(
      f"  (c) input {rate:,.0f} examples/s, the step eats {batch / bare:,.0f}: "
      f"{rate * bare / batch:.1f} ×"
    )


if __name__ == "__main__":
  with supervision.Stop():
    app.run(main)
