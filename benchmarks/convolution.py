"""The three convolutions inside the U-Net of configs/ks.py: which one should a loop use, which one
should training?

  python benchmarks/convolution.py [--rounds=7] [--only=1|2]

Rows: one training step (forward, backward, Adam) as `fit` calls it; the denoiser inside a lax.scan,
as the default sampler calls it; and with its vjp, as guidance by a gradient does. 1-D: 192 points,
batch 128; 2-D: 64² points, batch 8; channels 32/64/128, one block a level, float32. The methods
take turns, so that other load on the machine falls on all. cpu: median CPU seconds of the process;
wall: least seconds on the clock; compile: seconds on the clock, without a cache; temp: the
compiler's account of temporary memory. Ratios are to im2col: below 1, the method wins. The last
method has flax's group norm in place of the U-Net's own.
"""

import argparse
import statistics
import time
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp

from downscaling.diffusion import denoiser, train_state, train_step, unet
from downscaling.runtime import mesh as meshes

CASES = {1: ((192,), 128), 2: ((64, 64), 8)}
METHODS = ("im2col", "lax", "edges", "edges, flax norm")
CALLS = 4  # of the denoiser and its vjp in one scan


def programs(space: tuple[int, ...], batch: int, method: str) -> dict:
  """Name -> (compiled call without arguments, compile seconds, temporary bytes)."""
  convolution, _, other_norm = method.partition(", ")
  norm = flax_norm if other_norm else unet.GroupNorm
  with mock.patch.object(unet, "GroupNorm", norm):
    return _programs(space, batch, convolution)


def flax_norm(groups: int, dtype) -> nn.GroupNorm:
  return nn.GroupNorm(num_groups=groups, dtype=dtype)


def _programs(space: tuple[int, ...], batch: int, convolution: str) -> dict:
  network = denoiser.Denoiser(
    unet.UNet(channels=(32, 64, 128), blocks=1, heads=0, convolution=convolution)
  )
  tx = train_state.optimizer(
    train_state.learning_rate(peak=1e-3, end=1e-6, warmup_steps=0, total_steps=1000),
    clip=1.0,
  )
  levels = lambda key, count: jnp.exp(jax.random.normal(key, (count,)))
  key, mesh = jax.random.key(0), meshes.make(1)
  start, _, specs = train_state.make(
    mesh, lambda a, b: train_state.initial(network, tx, space, 1, 1, a, b), key, key
  )
  step, state = (
    train_step.make_train_step(network, tx, levels, (0.99,), mesh, specs.params),
    start(key, key),
  )
  x = jax.random.normal(key, (batch, *space, 1))

  denoised = lambda params, x: network.apply({"params": params}, x, jnp.ones(batch))

  def forward(params, x):
    call = lambda x, _: (0.9 * denoised(params, x), None)
    return jax.lax.scan(call, x, length=CALLS)[0]

  def guided(params, x):
    def call(x, _):
      y, pull = jax.vjp(lambda x: denoised(params, x), x)
      return y - pull(y)[0], None

    return jax.lax.scan(call, x, length=CALLS)[0]

  return {
    "training step": _compiled(step, state, {"x": x}),
    f"{CALLS} calls in a scan": _compiled(forward, state.params, x),
    f"{CALLS} calls with a vjp": _compiled(guided, state.params, x),
  }


def _compiled(function, *arguments):
  began = time.perf_counter()
  compiled = jax.jit(function).lower(*arguments).compile()
  seconds = time.perf_counter() - began
  call = lambda: jax.block_until_ready(compiled(*arguments))
  call()
  return call, seconds, compiled.memory_analysis().temp_size_in_bytes


def timed(call) -> tuple[float, float]:
  """CPU and clock seconds of one call."""
  cpu, wall = time.process_time(), time.perf_counter()
  call()
  return time.process_time() - cpu, time.perf_counter() - wall


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--only", type=int, choices=CASES, help="number of dimensions")
  args = parser.parse_args()
  # Compile times are part of the answer.
  jax.config.update("jax_enable_compilation_cache", False)
  print(f"{jax.default_backend()}; {args.rounds} rounds, in turns")
  print(f"{'':<32}{'':<26}{'cpu s':>8}{'wall s':>8}{'compile s':>11}{'temp MB':>9}")
  for rank, (space, batch) in CASES.items():
    if args.only not in (None, rank):
      continue
    made = {method: programs(space, batch, method) for method in METHODS}
    for name in made["edges"]:
      times = {method: [] for method in METHODS}
      for _ in range(args.rounds):
        for method in METHODS:
          times[method].append(timed(made[method][name][0]))
      rows = {}
      for method in METHODS:
        cpu, wall = zip(*times[method], strict=True)
        rows[method] = (
          statistics.median(cpu),
          min(wall),
          made[method][name][1],
          made[method][name][2] / 1e6,
        )
        _show(f"{rank}-D {name}", method, rows[method])
      for method in METHODS[1:]:
        ratios = [a / b for a, b in zip(rows[method], rows["im2col"], strict=True)]
        _show("", f"{method} / im2col", ratios)


def _show(title: str, method: str, values) -> None:
  cpu, wall, compile_seconds, memory = values
  print(
    f"{title:<32}{method:<26}{cpu:>8.3f}{wall:>8.3f}{compile_seconds:>11.1f}{memory:>9.1f}",
    flush=True,
  )


if __name__ == "__main__":
  main()
