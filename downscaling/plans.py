"""--dry_run: what a job would do, in devices, shapes, memory, disk and steps, without doing it.

Memory of the jitted jobs is the compiler's own account of the very program that would run, on the
devices here or on others for which there is a compiler here (runtime/target_devices.py).
"""

import math
import os
import time

import jax
import jax.numpy as jnp
import numpy as np

from downscaling import build, series, stages
from downscaling.debias.entropic import sinkhorn, sinkhorn_steps
from downscaling.debias.equivariant import recipes
from downscaling.diffusion import train_loop, train_state
from downscaling.fields import statistics
from downscaling.runtime import mesh as meshes
from downscaling.runtime import program_cost, random_keys, target_devices
from downscaling.sampling import ensemble

SHARES = (
  0.4,
  0.1,
)  # of a chip's peak that a net may reach: large convolutions alone; much that is bound by memory
STAND_IN = "NVIDIA H200"  # whose hours are given where the devices here have no known peak


def describe(name: str, ctx) -> str:
  """The plan of a job, several lines."""
  parts = {
    "generate": _generate,
    "debias": _debias,
    "train": _train,
    "sample": _sample,
    "evaluate": _evaluate,
  }
  chosen = parts if name == "pipeline" else {name: parts[name]}
  kinds = {d.device_kind for d in ctx.mesh.devices.flat}
  config = ctx.config.copy_and_resolve_references()
  if meshes.platform(ctx.mesh) != jax.default_backend() and config.model.convolution == "auto":
    config.model.convolution = "lax"  # as auto is on all but a CPU, and it goes by the devices here
  lines = [
    f"devices    {ctx.mesh.size} × {', '.join(sorted(kinds))}, {meshes.hosts(ctx.mesh)} "
    f"process(es), mesh {dict(ctx.mesh.shape)}",
    f"workdir    {ctx.workdir}",
  ]
  for job, plan in chosen.items():
    lines += [job, *(f"  {line}" for line in plan(config, ctx))]
  return "\n".join(["dry run, nothing is written", *lines])


def _generate(c, ctx) -> list[str]:
  lines, disk = [], 0
  for which in ("hfhr", "lflr"):
    mine = build.simulating(c, which, ctx.mesh)
    plan = build.generation(c, ctx.workdir, which, meshes.rows(mine))
    shape = plan.builder.info.features["u"].shape
    count = sum(plan.trajectories.values())
    dt = c.fine.dt if which == "hfhr" else c.coarse.dt
    steps = round(plan.times[-1] / dt)
    rows = count * len(plan.times)
    disk += rows * (math.prod(shape) * 4 + 24)
    shards = len(plan.shards())
    lines.append(
      f"{which}: {dict(plan.trajectories)} trajectories of {steps} steps, {len(plan.times)} "
      f"snapshots each, {rows} fields {shape} float32 in {shards} shards; computed in "
      f"{build.precision(c, which)} on {meshes.platform(mine)}, {-(-plan.shard // mine.size)} a "
      "device at a time"
    )
  return [*lines, f"disk: {_size(disk)} in {stages.data_dir(c, ctx.workdir)}"]


def _debias(c, ctx) -> list[str]:
  n, d = c.debias.points, math.prod(build.operator(c).coarse)
  lines = [
    f"maps {', '.join(c.debias.maps)} between {n} × {n} points in {d} dimensions; samples behind "
    f"{c.debias.map}"
  ]
  for name in c.debias.maps:
    if name in ("entropic", "symmetric", "rescaled"):
      lines += [name, *(f"  {line}" for line in _sinkhorn(c, ctx, name))]
    elif name == "minibatch":
      lines.append(
        f"minibatch: batches of {c.debias.minibatch.batch}, {c.debias.minibatch.passes:g} passes, "
        "one device"
      )
    else:
      order = recipes.letters(
        "G" if name == "gaussian" else build.debias_setting(c).recipe, build.quadratic(c)
      )
      rows = -(-n // meshes.hosts(ctx.mesh))
      lines.append(
        f"{name}: recipe {order}, {rows} rows a process, {_size(8 * rows * d)} of them in memory"
      )
  stored = (
    (len(c.debias.maps) + 1) * 4 * d * (c.debias.held_out + min(c.debias.held_out, c.debias.points))
  )
  return [*lines, f"disk: {_size(stored)} of rows before and after the maps"]


def _sinkhorn(c, ctx, name: str) -> list[str]:
  n, d = c.debias.points, math.prod(build.operator(c).coarse)
  meshes.check_divides(n, ctx.mesh.size, "a cloud", "debias.points")
  group = build.group(c) if name == "symmetric" else None
  elements = len(group) if group else 1
  path = sinkhorn.path_of(c.debias.path, n, n, d, ctx.mesh.size, elements)
  cloud, potential = _rows(ctx, n, d), _rows(ctx, n)
  chunk = sinkhorn_steps.make_chunk(
    iterations=c.debias.check_every, momentum=1.5, path=path, mesh=ctx.mesh
  )
  moves = group and (jnp.asarray(group.index, jnp.int32), jnp.asarray(group.sign, jnp.float32))
  kept = _rows(ctx, n, n) if sinkhorn_steps.keeps_costs(path, d, elements) else None
  epsilon = jax.ShapeDtypeStruct((), jnp.float32)
  program = chunk.lower(cloud, cloud, *(potential,) * 4, epsilon, moves, kept).compile()
  memory, passes = program_cost.memory(program), 2 if path in ("ring", "pallas") else 1
  return [
    f"ε {c.debias.epsilon:g} of the mean cost, annealed; at most {c.debias.max_iterations} "
    f"iterations to a marginal error of {c.debias.threshold:g}",
    f"path {path}: {n * n * elements * passes / ctx.mesh.size:.3g} pairs a device an iteration"
    + (", their exponentials once in " + f"{c.debias.check_every}" if path == "dense" else ""),
    f"memory a device: {_size(memory['arguments'])} clouds and potentials"
    + (" and the costs" if kept else "")
    + f", {_size(memory['temporaries'])} temporary "
    f"(compiled; the whole plan would be {_size(4 * n * n)})",
    *_communication(program),
    f"disk: {_size(4 * n * (d + 1))} and three checkpoints of {_size(8 * n)}",
  ]


def _statistics(c, ctx) -> statistics.Statistics:
  """Of the data if they are there, else of a unit field: shapes, and so memory, are the same."""
  if (path := stages.data_dir(c, ctx.workdir) / "statistics.npz").exists():
    return statistics.load(path)
  return statistics.Statistics(
    np.zeros(1, np.float32), np.ones(1, np.float32), np.ones((*build.space(c), 1), np.float32)
  )


def _abstract_state(c, ctx, network):
  key = random_keys.key(0, "plans")
  _, target, specs = train_state.make(
    ctx.mesh, build.initial_state(c, network, c.grid.frames), key, key
  )
  return target, specs


def _rows(ctx, *shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=meshes.rows(ctx.mesh))


def _train(c, ctx) -> list[str]:
  stats = _statistics(c, ctx)
  network = build.denoising_network(c, stats)
  state, specs = _abstract_state(c, ctx, network)
  update = build.update(c, stats, network, ctx.mesh, specs.params)
  batch = {"x": _rows(ctx, c.train.batch, *build.space(c), c.grid.frames)}
  began = time.monotonic()
  program, flops = train_loop.compiled(update, state, batch)
  seconds = time.monotonic() - began
  memory, size = program_cost.memory(program), _bytes(state)
  held = sum(math.prod(s.sharding.shard_shape(s.shape)) * _width(s) for s in jax.tree.leaves(state))
  per = c.train.batch // ctx.mesh.size
  four = lambda value: np.format_float_positional(
    value, 4, fractional=False, trim="-"
  )  # digits, and no exponent
  return [
    f"{train_state.count(state.params):,} parameters; {c.train.total_steps} steps of batch "
    f"{c.train.batch} ({per} a device, in {c.memory.microbatches} part(s)) = "
    f"{c.train.total_steps * c.train.batch:,} samples",
    f"compiled in {seconds:.0f} s; {four(flops / 1e9)} GFLOP a step, "
    f"{four(flops / 1e9 / ctx.mesh.size)} a device",
    _hours(flops * c.train.total_steps, c, ctx),
    f"memory a device: {_size(held)} state, {_size(memory['temporaries'])} temporary (compiled)",
    *_communication(program),
    f"disk: checkpoints of {_size(size)}, saved every {c.plan.save_every} steps, the last "
    f"{c.keep.last} stay",
  ]


def _hours(flops: float, c, ctx) -> str:
  """What so many FLOPs in the dtype of the network take."""
  kind = ctx.mesh.devices.flat[0].device_kind
  known = program_cost.peak_flops(kind, c.model.dtype)
  peak = known * ctx.mesh.size if known else program_cost.peak_flops(STAND_IN, c.model.dtype)
  hours = [flops / (share * peak) / 3600 for share in SHARES]
  few, many = (f"{h:.2g} h" if hours[1] >= 1 else f"{60 * h:.2g} min" for h in hours)
  on = f"{ctx.mesh.size} × {kind}" if known else f"one {STAND_IN}"
  return f"{few} to {many} on {on}: {SHARES[0]:.0%} to {SHARES[1]:.0%} of its peak, which is an assumption"


def _communication(program) -> list[str]:
  """What a step sends, by kind of collective, as the compiler has it."""
  found = program_cost.collectives(program)
  lines = [] if found else ["communication: none"]
  for kind, size in sorted({(c.kind, c.group_size) for c in found}):
    these = [c for c in found if (c.kind, c.group_size) == (kind, size)]
    sent = sum(program_cost.traffic(c) for c in these)
    total = sum(c.bytes for c in these)
    lines.append(
      f"communication a step: {len(these)} {kind} among {size} devices, {_size(total)}; in a ring "
      f"each sends {_size(sent)}"
    )
  return lines


def _width(leaf) -> int:
  return 8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize


def _bytes(tree) -> int:
  return sum(math.prod(s.shape) * _width(s) for s in jax.tree.leaves(tree))


def _sample(c, ctx) -> list[str]:
  s, mine = c.sampling, meshes.local(ctx.mesh)
  rows, (k, m) = math.prod(s.unit), s.unit
  program, params, flops = _sampling_program(c, ctx, mine.devices.flat[0])
  field, plan = math.prod(build.space(c)) * 4 * s.series.frames, series.plan(c)
  sets = build.sources(c)
  conditional, alone = (
    sum(map(bool, sets.values())),
    s.unconditional.fields * ("unconditional" in sets),
  )
  fields = conditional * s.conditions * s.members + alone
  of_a_set, free = -(-s.conditions // k) * -(-s.members // m), -(-alone // rows)
  units = conditional * of_a_set + free
  memory, work = program_cost.memory(program), conditional * of_a_set * flops[0] + free * flops[1]
  once = (
    memory["temporaries"] + memory["arguments"] - params + 2 * memory["outputs"]
  )  # of a unit, on a device
  limit, whose = _device_memory(mine)
  most = int(max(0.9 * limit - params, 0) / (once / rows) / m)  # a tenth for what XLA itself needs
  idle = ctx.mesh.size - of_a_set
  advice = (
    ""
    if idle <= 0
    else f"; {of_a_set} a set leave {idle} of {ctx.mesh.size} devices idle: make units smaller"
  )
  return [
    f"{conditional} sets of {s.conditions} conditions × {s.members} members, {alone} "
    f"unconditional: {fields} "
    f"{'fields' if plan.series == 1 else f'series of {plan.series} fields'} {build.space(c)}, "
    f"{s.levels.steps} steps of {s.solver.name}, guidance {s.guidance.name}",
    f"{units} units of {k} conditions × {m} members, {-(-units // meshes.hosts(ctx.mesh))} a "
    f"process, one a device at a time{advice}",
    _hours(work, c, ctx),
    f"memory a device: {_size(memory['temporaries'])} temporary (compiled), {_size(params)} "
    f"parameters, {_size(2 * memory['outputs'])} fields of two units",
    f"there is room for about {most} conditions × {m} members in a unit: {_size(limit)} {whose}",
    f"disk: {_size(fields * field)} before compression in {ctx.folder('samples')}",
  ]


def _sampling_program(c, ctx, device):
  """The compiled program that draws a unit of conditions on one device, bytes of its parameters,
  and FLOPs of a unit with conditions and without."""
  s, stats = c.sampling, _statistics(c, ctx)
  network = build.denoising_network(c, stats)
  state, _ = _abstract_state(c, ctx, network)
  time = () if (frames := s.series.frames) == 1 else (frames,)
  sampler, coarse = (
    build.sampler(c, stats, network, build.stand_in_table(c)),
    (*time, *build.operator(c).coarse, 1),
  )
  sizes = {
    "conditions": s.conditions,
    "members": s.members,
    "unit": tuple(s.unit),
    "frames": frames,
  }
  layout = ensemble.layout_of(sampler, state.params, space=build.space(c), coarse=coarse, **sizes)
  program = ensemble.compiled(sampler, c.seed, layout, state.params, [device])[0]
  keys = jax.eval_shape(lambda: jax.random.split(random_keys.key(0, "plans"), math.prod(s.unit)))
  given = jax.ShapeDtypeStruct((len(keys), *coarse), jnp.float32)
  return (
    program,
    _bytes(state.params),
    [program_cost.flops(sampler, keys, y, state.params) for y in (given, None)],
  )


def _device_memory(mesh) -> tuple[float, str]:
  """Bytes that one device of this process may use, and in words whose they are."""
  device = mesh.devices.flat[0]
  if device not in jax.local_devices():
    return target_devices.memory(device), "a device"
  stats = device.memory_stats() or {}
  if "bytes_limit" in stats:
    return stats["bytes_limit"], "a device"
  host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return host // mesh.size, f"a device, its share of the host's {_size(host)}"


def _evaluate(c, ctx) -> list[str]:
  return [
    f"against {c.evaluate.reference} held-out true fields; writes {ctx.folder('report')}, about 5 "
    "MB"
  ]


def _size(count: float) -> str:
  for unit in ("B", "kB", "MB", "GB"):
    if count < 1000:
      return f"{count:.3g} {unit}"
    count /= 1000
  return f"{count:.3g} TB"
