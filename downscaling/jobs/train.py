"""The job `train`: trains the prior on the fine world, then tabulates its held-out error."""

import functools
import json
import math
import time

import jax
import numpy as np

from downscaling.assembly import prior, samples, worlds
from downscaling.datasets import simulated, time_windows, training_batches
from downscaling.diffusion import error_table, train_loop, train_state, train_step
from downscaling.fields import statistics
from downscaling.jobs import rows, unconditional_fields
from downscaling.jobs.job import (
  Item,
  Job,
  communication,
  hours,
  rows_on,
  size,
  statistics_of,
  tree_bytes,
  width,
)
from downscaling.runtime import (
  checkpoints,
  processes,
  program_cost,
  random_keys,
  stage_folder,
  trackers,
)
from downscaling.runtime import mesh as meshes


class Train(Job):
  """The prior and its error table."""

  name, stage = "train", "train"
  libraries = 550e6  # most of it is the compiler's

  def check(self) -> None:
    if not self.work.done(self.stage):
      checkpoints.refuse(self.work.folder(self.stage))

  def run(self) -> str:
    work, e = self.work, self.experiment
    work.need("data", "generate")
    trained = work.done("train")
    stage, stats = work.stage("train"), work.statistics()
    held = rows.windows(work, "calibration", prior.validation_rows(e))
    held = stats.repeated(e.grid.frames).normalise(held)
    network = prior.network(e, stats)
    with work.owned(stage):
      summary = stage.summary if trained else self._train(stage, stats, network, held)
      self._tabulate(stage, network, held)
      work.finish(stage, **summary)
    made = stage.path / error_table.FILE if trained else stage.path
    return f"wrote {made}; next: downscaling sample"

  def _train(
    self,
    stage: stage_folder.Stage,
    stats: statistics.Statistics,
    network,
    held: np.ndarray,
  ) -> dict:
    """The training run; its summary. held: normalised calibration windows [V, *space, F·C]."""
    e, mesh = self.experiment, self.work.mesh
    many = stats.repeated(e.grid.frames)
    held = held[: len(held) // mesh.size * mesh.size]

    def validation(specs, key):
      mine = held[meshes.host_rows(mesh, len(held))]
      x = meshes.to_global(mesh, mine, len(held))
      return train_step.make_validation(network, mesh, specs, x, train_loop.SIGMAS, key)

    def update(specs):
      return prior.update(e, stats, network, mesh, specs)

    watched = unconditional_fields.evaluator(
      samples.watching_sampler(e, stats, network),
      mesh,
      e.watch.fields,
      held,
      many,
      e.seed,
    )
    return train_loop.train(
      stage.path,
      stage.hash,
      initialise=prior.initial_state(e, network, held.shape[-1]),
      make_update=update,
      make_validation=validation,
      batches=training_batches.Batches(self._source(), many, e.train.batch, e.seed),
      shape=held.shape[1:],
      evaluators={"unconditional": watched},
      mesh=mesh,
      seed=e.seed,
      plan=prior.plan(e),
      keep=prior.keep(e),
      config_text=json.dumps(e.everything(), indent=1),
      stop=self.work.stop,
      dtype=e.model.dtype,
      agree=functools.partial(processes.gather, "train"),
      tracker=functools.partial(
        trackers.make, self.work.tracker, stage.path, e.everything()
      ),
    )

  def _source(self):
    """Windows of the fine training split, at random access."""
    e = self.experiment
    dataset = worlds.dataset(e, self.work.path, "hfhr")
    source = simulated.source(dataset, "train", e.train.batch)
    return time_windows.view(source, e.data.snapshots, e.grid.frames)

  def _tabulate(self, stage: stage_folder.Stage, network, held: np.ndarray) -> None:
    """Measures the prior's error on calibration windows, and saves the table."""
    e, mesh = self.experiment, self.work.mesh
    agree = functools.partial(processes.gather, "error table")
    shape, channels = held.shape[1:-1], held.shape[-1]
    params = train_loop.load_prior(
      stage.path, stage.hash, network, shape, channels, mesh, agree
    )
    count = max(error_table.rows(held.shape[1:]), mesh.size)
    few = held[:: max(1, len(held) // count)]
    levels = prior.error_levels(e)
    table = error_table.tabulate(
      network,
      params,
      few,
      levels,
      mesh,
      e.seed,
      self.work.stop,
      worlds.domain(e).basis(),
    )
    if meshes.is_main():
      error_table.save(stage.path, table, stage.hash)
    processes.barrier("error table")

  # ---------------------------------------------------------------- plan

  def lines(self) -> list[str]:
    state = self._state[0]
    program, flops, seconds = self._program
    memory = program_cost.memory(program)
    e, devices = self.experiment, self.work.mesh.size
    steps, batch = e.train.total_steps, e.train.batch
    return [
      f"{train_state.count(state.params):,} parameters; {steps} steps of batch {batch} "
      f"({batch // devices} a device, in {e.memory.microbatches} part(s)) = {steps * batch:,} "
      "samples",
      f"compiled in {seconds:.0f} s; {_digits(flops / 1e9)} GFLOP a step, "
      f"{_digits(flops / 1e9 / devices)} a device",
      hours(flops * steps, self.work),
      f"memory a device: {size(self._state_bytes())} state, {size(memory['temporaries'])} "
      "temporary (compiled)",
      *communication(program),
      f"checkpoints of {size(tree_bytes(state))}, saved every {e.plan.save_every} steps, the last "
      f"{e.keep.last} stay",
    ]

  def on_device(self) -> float:
    """Of the step, of validation and of watched samples, each about as large; and of the state.

    A checkpoint is written from a second copy of the state.
    """
    return (
      3 * program_cost.memory(self._program[0])["temporaries"] + 2 * self._state_bytes()
    )

  def _state_bytes(self) -> int:
    """Of the training state on one device."""
    leaves = jax.tree.leaves(self._state[0])
    shards = [math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves]
    return sum(count * width(leaf) for count, leaf in zip(shards, leaves, strict=True))

  def held(self) -> list[Item]:
    e = self.experiment
    window = math.prod(worlds.space(e)) * e.grid.frames * worlds.channels(e)
    windows = prior.validation_rows(e) * window
    return [Item("calibration windows", 4 * windows)]

  def written(self) -> list[Item]:
    state = self._state[0]
    return [Item("checkpoints", (self.experiment.keep.last + 1) * tree_bytes(state))]

  @functools.cached_property
  def _state(self):
    """(the state as shapes, its specs, the network, statistics)."""
    e, stats = self.experiment, statistics_of(self.work)
    network = prior.network(e, stats)
    return *abstract_state(self.work, network), network, stats

  @functools.cached_property
  def _program(self):
    """(the compiled step, its operations, seconds of compilation)."""
    state, specs, network, stats = self._state
    e, mesh = self.experiment, self.work.mesh
    update = prior.update(e, stats, network, mesh, specs.params)
    values = e.grid.frames * worlds.channels(e)
    batch = {
      "x": rows_on(
        mesh,
        e.train.batch,
        *worlds.space(e),
        values,
      )
    }
    began = time.monotonic()
    program, flops = train_loop.compiled(update, state, batch)
    return program, flops, time.monotonic() - began


def abstract_state(work, network):
  """(the training state as shapes on the mesh, its specs)."""
  e, key = work.experiment, random_keys.key(0, "plans")
  make = prior.initial_state(e, network, e.grid.frames * worlds.channels(e))
  _, target, specs = train_state.make(work.mesh, make, key, key)
  return target, specs


def _digits(value: float) -> str:
  """Four digits, without an exponent."""
  return np.format_float_positional(value, 4, fractional=False, trim="-")
