"""The job `generate`: simulates both worlds, then measures the fine training split."""

import functools
import math

import jax

from downscaling.assembly import worlds
from downscaling.datasets import generate, simulated
from downscaling.fields import statistics
from downscaling.jobs.job import Item, Job
from downscaling.runtime import mesh as meshes
from downscaling.runtime import processes

WORLDS = ("hfhr", "lflr")
RECORD = 24  # bytes of a record beside its field


class Generate(Job):
  """Trajectories of both worlds, shard by shard."""

  name, stage = "generate", "data"
  libraries = 140e6

  def run(self) -> str:
    work = self.work
    stage = work.stage(self.stage)
    with work.owned(stage):
      for which in WORLDS:
        mesh = self.mesh(which)
        agree = functools.partial(processes.gather, f"generate/{which}")
        with jax.enable_x64(True):
          generate.generate(
            self.simulation(which), mesh, work.stop, jax.process_index(), agree
          )
      if meshes.is_main():
        dataset = worlds.dataset(self.experiment, work.path, "hfhr")
        source = simulated.source(dataset, "train")
        measured = statistics.measure(source, worlds.domain(self.experiment).basis())
        measured.save(stage.path / "statistics.npz")
      processes.barrier("statistics")
      work.finish(stage, std=work.statistics().std.tolist())
    return f"wrote {stage.path}; next: downscaling debias, downscaling train"

  def mesh(self, which: str) -> jax.sharding.Mesh:
    """The devices of this process that simulate one world."""
    return worlds.simulating(self.experiment, which, self.work.mesh)

  def simulation(self, which: str) -> generate.Plan:
    """What to simulate of one world."""
    sharding = meshes.rows(self.mesh(which))
    return worlds.generation(self.experiment, self.work.path, which, sharding)

  def lines(self) -> list[str]:
    found = []
    for which in WORLDS:
      plan, mesh = self.simulation(which), self.mesh(which)
      shape = plan.builder.shape
      solver = worlds.equation(self.experiment, which)
      trajectories = sum(plan.trajectories.values())
      precision = worlds.precision(self.experiment, which)
      found.append(
        f"{which}: {plan.trajectories} trajectories of {round(plan.times[-1] / solver.dt)} steps, "
        f"{len(plan.times)} snapshots each, {trajectories * len(plan.times)} fields {shape} "
        f"float32 in {len(plan.shards())} shards; computed in {precision} on "
        f"{meshes.platform(mesh)}, {-(-plan.shard // mesh.size)} a device at a time"
      )
    return found

  def held(self) -> list[Item]:
    """Two shards: one is written while the next is computed, in float64."""
    found = []
    for which in WORLDS:
      plan = self.simulation(which)
      shape = plan.builder.shape
      shard = plan.shard * len(plan.times) * math.prod(shape)
      width = 8 if worlds.precision(self.experiment, which) == "float64" else 4
      found.append(Item(f"two shards of {which}", 2 * width * shard))
    return [max(found, key=lambda item: item.nbytes)]

  def written(self) -> list[Item]:
    found = []
    for which in WORLDS:
      plan = self.simulation(which)
      fields = sum(plan.trajectories.values()) * len(plan.times)
      shape = plan.builder.shape
      found.append(Item(which, fields * (4 * math.prod(shape) + RECORD)))
    return found
