"""What one machine's accelerators do with the three heavy jobs, in one call of at most nine
minutes.

  python benchmarks/accelerator.py [--size=full|small] [--seconds=15] [--limit=520] [--out=DIR]
                                   [--trace=DIR]

training: the compiled step of a config with a batch that lies on the devices; samples/s, model
  FLOP/s (products and convolutions, forward and backward) and their share of the chip's dense peak
  for the dtype, where that is known.
sampling: a whole unit of conditional fields on each device, as the `sample` job draws it.
Sinkhorn: iterations on Gaussian clouds, by the path that `debias` takes by itself and by the Pallas
  kernel; a pair is one of the n × n. And the soft-min of one potential by geometry.log_sum_exp and
  by that kernel: the two ratios say whether it pays.

All over every local device. compile: seconds, without a cache. temp: the compiler's temporary
memory of one device. A row that fails says why and the next one runs; when --limit seconds have
passed, the rest is skipped. --out writes accelerator.json; --trace a profile of the last training
row, for TensorBoard. Size small is a check of this program on a CPU: its figures mean nothing.
"""

import argparse
import json
import math
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from downscaling import experiment
from downscaling.assembly import prior, samples, worlds
from downscaling.debias.entropic import pallas_kernel, sinkhorn, soft_min
from downscaling.diffusion import train_loop, train_state
from downscaling.fields import statistics
from downscaling.runtime import mesh as meshes
from downscaling.runtime import program_cost, provenance
from downscaling.sampling import ensemble

FULL = {
  "training": [
    ("ks", "full", "float32", 1024),
    ("ks", "full", "bfloat16", 1024),
    ("kolmogorov", "8x", "float32", 32),
    ("kolmogorov", "8x", "bfloat16", 32),
    ("kolmogorov", "8x", "bfloat16", 128),
  ],
  "sampling": [("ks", "full", "float32"), ("kolmogorov", "8x", "bfloat16")],
  "Sinkhorn": [
    *(
      (n, d, path)
      for n, d in [(16_384, 24), (131_072, 24), (16_384, 1024)]
      for path in ("auto", "pallas")
    ),
    *[(1_048_576, 24, "auto"), (1_048_576, 24, "pallas"), (196_608, 1024, "auto")],
  ],
  "soft-min": [(131_072, 24), (131_072, 1024)],
}
SMALL = {
  "training": [("ks", "smoke", "float32", 16), ("kolmogorov", "smoke", "bfloat16", 16)],
  "sampling": [("ks", "smoke", "float32")],
  "Sinkhorn": [(2048, 24, "auto"), (512, 1024, "auto"), (128, 24, "pallas")],
  "soft-min": [(256, 24)],
}


def config_of(name, variant, **changes):
  return experiment.load(f"{name}:{variant}", **changes)


def network_of(config):
  shape = (*worlds.space(config), 1)
  stats = statistics.Statistics(
    np.zeros(1, np.float32), np.ones(1, np.float32), np.ones(shape, np.float32)
  )
  return stats, prior.network(config, stats)


def repeated(call, seconds):
  """Seconds a call, over at least three calls and `seconds`; `call` returns what to wait for."""
  jax.block_until_ready(call())  # the first call may still set things up
  count, began, until = 0, time.perf_counter(), 0.0
  while count < 3 or until < seconds:
    # Doubling: the clock is read, and the device waited for, seldom.
    for _ in range(max(1, count)):
      out = call()
    jax.block_until_ready(out)
    count, until = count + max(1, count), time.perf_counter() - began
  return until / count


def training_row(mesh, seconds, trace, name, variant, dtype, batch):
  c = config_of(name, variant, **{"model.dtype": dtype, "train.batch": batch})
  stats, network = network_of(c)
  start, target, specs = train_state.make(
    mesh, prior.initial_state(c, network, 1), jax.random.key(0), jax.random.key(1)
  )
  example = jax.ShapeDtypeStruct(
    (batch, *worlds.space(c), 1), jnp.float32, sharding=meshes.rows(mesh)
  )
  began = time.perf_counter()
  program, flops = train_loop.compiled(
    prior.update(c, stats, network, mesh, specs.params), target, {"x": example}
  )
  row = {
    "compile_seconds": time.perf_counter() - began,
    "temporary_bytes": program_cost.memory(program)["temporaries"],
  }
  state = start(jax.random.key(0), jax.random.key(1))
  draw = jax.jit(
    lambda key: jax.random.normal(key, example.shape), out_shardings=example.sharding
  )
  x = {"x": draw(jax.random.key(2))}

  def step():
    nonlocal state
    state, logs = program(state, x)
    return logs

  each = repeated(step, seconds)
  if not math.isfinite(float(step()["loss"])):
    raise FloatingPointError("the loss is not finite")
  if trace:
    with jax.profiler.trace(trace):
      jax.block_until_ready([step() for _ in range(3)])
  peak = program_cost.peak_flops(mesh.devices.flat[0].device_kind, dtype)
  rate = flops / each
  return row | {
    "parameters": train_state.count(state.params),
    "seconds_per_step": each,
    "samples_per_second": batch / each,
    "model_flops_per_second": rate,
    "utilisation": rate / (peak * mesh.size) if peak else None,
  }


def sampling_row(mesh, seconds, trace, name, variant, dtype):
  c = config_of(name, variant, **{"model.dtype": dtype})
  stats, network = network_of(c)
  space, unit = worlds.space(c), c.sampling.unit
  init = lambda key: network.init(key, jnp.zeros((1, *space, 1)), jnp.ones(1))["params"]
  params = jax.jit(init, out_shardings=meshes.replicated(mesh))(jax.random.key(0))
  draw, devices = (
    samples.sampler(c, stats, network, prior.stand_in_table(c)),
    [*mesh.devices.flat],
  )
  y = (
    np.random.default_rng(1)
    .normal(size=(unit[0], *worlds.operator(c).coarse, 1))
    .astype(np.float32)
  )
  layout = ensemble.layout_of(
    draw,
    params,
    conditions=unit[0],
    members=unit[1],
    space=space,
    coarse=y.shape[1:],
    unit=unit,
  )
  began = time.perf_counter()
  programs = ensemble.compiled(draw, 0, layout, params, devices)
  took, temporary = (
    time.perf_counter() - began,
    program_cost.memory(programs[0])["temporaries"],
  )
  block = ensemble.block(layout, layout.units()[0], np.arange(unit[0]), y)
  inputs = [jax.device_put((*block, params), device) for device in devices]
  each = repeated(
    lambda: [p(*x) for p, x in zip(programs, inputs, strict=True)], seconds
  )
  row = {
    "compile_seconds": took,
    "temporary_bytes": temporary,
    "unit": math.prod(unit),
    "seconds_per_unit": each,
  }
  return row | {"fields_per_second": math.prod(unit) * len(devices) / each}


def sinkhorn_row(mesh, seconds, trace, n, d, path):
  draw = np.random.default_rng(0).normal
  x, y = (
    draw(size=(n, d)).astype(np.float32),
    0.5 + draw(size=(n, d)).astype(np.float32),
  )

  checks = [
    time.perf_counter()
  ]  # the error of each comes to the host, so a check ends when its ten iterations have
  told = lambda *_: checks.append(time.perf_counter())
  result = sinkhorn.fit(
    x,
    y,
    epsilon=0.003,
    threshold=2e-4,
    max_iterations=30,
    check_every=10,
    anneal=(1.0, 0.5),
    path=path,
    progress=told,
  )
  if (done := result.history["iteration"][-1]) != 30:
    raise RuntimeError(f"{done} iterations instead of 30")
  first, *more = np.diff(checks)  # the first compiles
  each = float(np.mean(more)) / 10
  return {
    "first_ten_seconds": float(first),
    "seconds_per_iteration": each,
    "pairs_per_second": n * n / each,
  }


def soft_min_row(mesh, seconds, trace, n, d):
  """On one device. A CPU runs the kernel's steps one by one, which says nothing about its speed,
  only that it runs.
  """
  draw = np.random.default_rng(0).normal
  x, y = (
    jax.device_put(draw(size=(n, d)).astype(np.float32), mesh.devices.flat[0])
    for _ in range(2)
  )
  zero, backend = jnp.zeros(n), jax.default_backend()
  scan = jax.jit(lambda e: soft_min.log_sum_exp(x, y, zero, zero, e)[0])
  kernel = jax.jit(
    lambda e: pallas_kernel.log_sum_exp(
      x, y, zero, zero, e, interpret=not pallas_kernel.supported(backend)
    )
  )
  epsilon = jnp.float32(0.3 * d)
  apart = float(jnp.abs(scan(epsilon) - kernel(epsilon)).max())
  if not apart < 1e-3:  # float32 sums of a few exponents of size 10
    raise FloatingPointError(f"scan and kernel differ by {apart:.2g}")
  by_scan, by_kernel = (
    repeated(lambda f=f: f(epsilon), seconds / 2) for f in (scan, kernel)
  )
  return {
    "seconds_by_scan": by_scan,
    "seconds_by_kernel": by_kernel,
    "pairs_per_second": n * n / by_scan,
  }


ROWS = {
  "training": training_row,
  "sampling": sampling_row,
  "Sinkhorn": sinkhorn_row,
  "soft-min": soft_min_row,
}
UNITS = {
  "seconds_per_step": (1e3, "ms a step"),
  "samples_per_second": (1, "samples/s"),
  "model_flops_per_second": (1e-12, "TFLOP/s"),
  "utilisation": (100, "% of peak"),
  "fields_per_second": (1, "fields/s"),
  "seconds_per_iteration": (1e3, "ms an iteration"),
  "seconds_by_scan": (1e3, "ms by scan"),
  "seconds_by_kernel": (1e3, "ms by Pallas"),
  "pairs_per_second": (1e-9, "G pairs/s"),
  "compile_seconds": (1, "s to compile"),
  "temporary_bytes": (1e-9, "GB temp"),
}


def line(kind, what, row):
  """One row of the table."""
  said = row.get("failed") or row.get("skipped")
  shown = [
    f"{scale * row[k]:.3g} {unit}"
    for k, (scale, unit) in UNITS.items()
    if row.get(k) is not None
  ]
  return f"{kind:<9} {' '.join(map(str, what)):<34} {said or ', '.join(shown)}"


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--size", choices=["full", "small"], default="full")
  parser.add_argument("--seconds", type=float, default=15.0, help="of measuring a row")
  parser.add_argument(
    "--limit", type=float, default=520.0, help="seconds after which no row is begun"
  )
  parser.add_argument("--out", type=pathlib.Path, help="folder for accelerator.json")
  parser.add_argument(
    "--trace", default="", help="folder for a profile of the last training row"
  )
  args = parser.parse_args()
  # Compile times are part of the answer.
  jax.config.update("jax_enable_compilation_cache", False)
  mesh, began = meshes.make(), time.perf_counter()
  about = {
    "device": mesh.devices.flat[0].device_kind,
    "devices": mesh.size,
    "versions": provenance.versions(),
  }
  about |= {"commit": provenance.commit(), "size": args.size}
  print(f"{about['devices']} × {about['device']}, size {args.size}", flush=True)
  found = []
  for kind, rows in (FULL if args.size == "full" else SMALL).items():
    for i, what in enumerate(rows):
      trace = args.trace if kind == "training" and i == len(rows) - 1 else ""
      if time.perf_counter() - began > args.limit:
        row = {"skipped": f"skipped: {args.limit:g} s have passed"}
      else:
        try:
          row = ROWS[kind](mesh, args.seconds, trace, *what)
        except Exception as error:
          # Out of memory, a kernel that does not compile: the next row may do.
          row = {
            "failed": f"failed: {type(error).__name__}: {str(error).splitlines()[0][:160]}"
          }
      print(line(kind, what, row), flush=True)
      found.append({"kind": kind, "what": list(what)} | row)
      if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "accelerator.json").write_text(
          json.dumps(about | {"rows": found}, indent=1)
        )


if __name__ == "__main__":
  main()
