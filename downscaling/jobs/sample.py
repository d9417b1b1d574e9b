"""The job `sample`: draws the sets of config.sampling.sets from the prior."""

import functools
import math
import os

import jax
import jax.numpy as jnp
import numpy as np

from downscaling import experiment as experiments
from downscaling.assembly import prior, samples, time_series, worlds
from downscaling.diffusion import error_table, train_loop
from downscaling.jobs import fitted_noise, rows
from downscaling.jobs.job import Item, Job, hours, size, statistics_of, tree_bytes
from downscaling.jobs.train import abstract_state
from downscaling.runtime import (
  ledger,
  program_cost,
  random_keys,
  stage_folder,
  target_devices,
)
from downscaling.runtime import mesh as meshes
from downscaling.sampling import ensemble

HEADROOM = 0.9  # of a device's memory that a plan fills; XLA needs some for itself


class Sample(Job):
  """Ensembles, a store for each set."""

  name, stage = "sample", "samples"
  libraries = 230e6

  def run(self) -> str:
    work, e = self.work, self.experiment
    work.need("data", "generate")
    trained = work.need("train", "train")
    work.need("debias", "debias")
    stage, stats = work.stage(self.stage), work.statistics()
    network = prior.network(e, stats)
    with stage.accounted():
      with work.stop.interruptible("restoring the prior"), ledger.spend("restoring"):
        params, table = restored(trained, e, network, len(stats.mean), work.mesh)
      draw = samples.sampler(e, stats, network, table)
      noises = fitted_noise.fits(work, stage.path, trained.hash, draw, params, stats)
      for name, source in samples.sources(e).items():
        self._write(stage, name, source, draw, params, stats, noises.get(name))
      work.finish(stage, extent=e.extent())
    return f"wrote {stage.path}; next: downscaling evaluate"

  def _write(self, stage, name, source, draw, params, stats, noise) -> None:
    """Draws what is missing of one set."""
    work, e, block = self.work, self.experiment, self.experiment.sampling
    space = worlds.space(e)
    identity = {"config": stage.identity, "source": source or "none"}
    if noise is not None:
      identity["observation_noise"] = noise.std
    about = {
      "title": f"{e.experiment}: {name}",
      "comment": f"{time_series.comment(e)}. NaN: not yet drawn, see done_fraction.",
      "references": "Wan et al. 2023, https://arxiv.org/abs/2305.15618",
      "config_hash": stage.hash,
    }
    ensemble.write_ensemble(
      stage.path / f"{name}.zarr",
      conditions=None if source is None else rows.condition_fields(work, source),
      members=block.members if source else block.unconditional.fields,
      sampler=draw,
      weights=fitted_noise.weights(params, noise, len(space)),
      space=space,
      channels=len(stats.mean),
      frames=block.series.frames,
      unit=self._unit(source),
      devices=[*meshes.local(work.mesh).devices.flat],
      seed=e.seed,
      identity=identity,
      stored={"converted": converted, "defaults": {"config": e.defaults()}},
      attrs=fitted_noise.attributes(noise, stats) | about,
      coordinates=worlds.coordinates(e),
      sample_attrs={"units": "1"},
      stop=work.stop.told,
      interruptible=work.stop.interruptible,
      max_failed=block.max_failed,
      any_device=block.any_device,
    )

  def _unit(self, source: str | None) -> tuple[int, int]:
    """Conditions × members that are drawn together."""
    conditions, members = self.experiment.sampling.unit
    return (conditions, members) if source else (1, conditions * members)

  # ---------------------------------------------------------------- plan

  @functools.cached_property
  def counts(self) -> dict[str, int]:
    """How many sets have conditions, units they have, and what is drawn without a condition."""
    block = self.experiment.sampling
    conditions, members = block.unit
    sets = samples.sources(self.experiment)
    conditional = sum(source is not None for source in sets.values())
    alone = block.unconditional.fields if "unconditional" in sets else 0
    of_a_set = -(-block.conditions // conditions) * -(-block.members // members)
    return {
      "conditional": conditional,
      "alone": alone,
      "of_a_set": of_a_set,
      "free": -(-alone // (conditions * members)),
      "fields": conditional * block.conditions * block.members + alone,
      "units": conditional * of_a_set + -(-alone // (conditions * members)),
    }

  def lines(self) -> list[str]:
    work, e, block = self.work, self.experiment, self.experiment.sampling
    mine, count = meshes.local(work.mesh), self.counts
    conditions, members = block.unit
    program, params, flops = self._program
    memory = program_cost.memory(program)
    operations = (
      count["conditional"] * count["of_a_set"] * flops[0] + count["free"] * flops[1]
    )
    # Of a unit, on a device: fields of two units are there at a time.
    once = memory["temporaries"] + memory["arguments"] - params + 2 * memory["outputs"]
    limit, whose = _device_memory(mine)
    room = max(HEADROOM * limit - params, 0)
    most = int(room / (once / (conditions * members)) / members)
    frames = block.series.frames
    kind = "fields" if frames == 1 else f"series of {frames} fields"
    guidance = block.guidance.name
    return [
      f"{count['conditional']} sets of {block.conditions} conditions × {block.members} members, "
      f"{count['alone']} unconditional: {count['fields']} {kind} {worlds.space(e)}, "
      f"{block.levels.steps} steps of {block.solver.name}, guidance {guidance}",
      f"{count['units']} units of {conditions} conditions × {members} members, "
      f"{-(-count['units'] // meshes.hosts(work.mesh))} a process, one a device at a time"
      f"{self._advice()}",
      *fitted_noise.plan(e),
      hours(operations, work),
      f"memory a device: {size(memory['temporaries'])} temporary (compiled), {size(params)} "
      f"parameters, {size(2 * memory['outputs'])} fields of two units",
      f"there is room for about {most} conditions × {members} members in a unit: {size(limit)} "
      f"{whose}",
    ]

  def _advice(self) -> str:
    """What to say of devices without work."""
    of_a_set, devices = self.counts["of_a_set"], self.work.mesh.size
    if of_a_set >= devices:
      return ""
    idle = f"{devices - of_a_set} of {devices} devices idle"
    return f"; {of_a_set} a set leave {idle}: make units smaller"

  def on_device(self) -> float:
    """Of the program with conditions, and of the one without, which is about as large."""
    program, params, _ = self._program
    kinds = bool(self.counts["conditional"]) + bool(self.counts["alone"])
    return params + kinds * program_cost.memory(program)["temporaries"]

  def held(self) -> list[Item]:
    """Conditions, and the fields of two units a device on their way to disk."""
    e, block = self.experiment, self.experiment.sampling
    op, frames = worlds.operator(e), block.series.frames
    value = 4 * worlds.channels(e)
    conditions = value * e.debias.held_out * math.prod(op.coarse)
    unit = value * math.prod(block.unit) * math.prod(worlds.space(e)) * frames
    devices = meshes.local(self.work.mesh).size
    return [
      Item("held-out rows of a map", conditions),
      Item("fields of two units a device", 2 * unit * devices),
    ]

  def written(self) -> list[Item]:
    e = self.experiment
    field = (
      4 * worlds.channels(e) * math.prod(worlds.space(e)) * e.sampling.series.frames
    )
    return [Item("fields before compression", self.counts["fields"] * field)]

  @functools.cached_property
  def _program(self):
    """The program that draws a unit of conditions on one device.

    Returns: (program, bytes of its parameters, operations of a unit with conditions and without).
    """
    work, e, block = self.work, self.experiment, self.experiment.sampling
    device = meshes.local(work.mesh).devices.flat[0]
    stats, frames = statistics_of(work), self.experiment.sampling.series.frames
    network = prior.network(e, stats)
    state, _ = abstract_state(work, network)
    draw = samples.sampler(e, stats, network, prior.stand_in_table(e))
    time = () if frames == 1 else (frames,)
    coarse = (*time, *worlds.operator(e).coarse, worlds.channels(e))
    layout = ensemble.layout_of(
      draw,
      state.params,
      space=worlds.space(e),
      coarse=coarse,
      channels=worlds.channels(e),
      conditions=block.conditions,
      members=block.members,
      unit=block.unit,
      frames=frames,
    )
    program = ensemble.compiled(draw, e.seed, layout, state.params, [device])[0]
    count = math.prod(block.unit)
    keys = jax.eval_shape(lambda: jax.random.split(random_keys.key(0, "plans"), count))
    y = jax.ShapeDtypeStruct((count, *coarse), jnp.float32)
    with_conditions = program_cost.flops(draw, keys, y, state.params)
    without = program_cost.flops(draw, keys, None, state.params)
    return program, tree_bytes(state.params), (with_conditions, without)


def restored(trained: stage_folder.Stage, experiment, network, channels: int, mesh):
  """(parameters as NumPy arrays, whole on every process; the error table or None) of a prior.

  channels: of single frames.
  """
  space, wide = worlds.space(experiment), channels * experiment.grid.frames
  sharded = train_loop.load_prior(
    trained.path, trained.hash, network, space, wide, mesh
  )
  params = jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), sharded)
  if not samples.needs_table(experiment):
    return params, None
  return params, error_table.load(trained.path, trained.hash)


def converted(identity: dict) -> dict:
  """Identity of a set of samples that was drawn when markers held whole blocks -> today's."""
  return identity | {"config": experiments.first_schema("samples", identity["config"])}


def _device_memory(mesh) -> tuple[float, str]:
  """Bytes that one device of this process may use, and in words whose they are."""
  device = mesh.devices.flat[0]
  if device not in jax.local_devices():
    return target_devices.memory(device), "a device"
  stats = device.memory_stats() or {}
  if "bytes_limit" in stats:
    return stats["bytes_limit"], "a device"
  host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return host // mesh.size, f"a device, its share of the host's {size(host)}"
