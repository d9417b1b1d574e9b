"""The job `debias`: fits maps from the coarse biased world to the coarsened true one."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from downscaling.assembly import debiasing, worlds
from downscaling.debias import fit, maps
from downscaling.debias.entropic import sinkhorn, sinkhorn_steps
from downscaling.debias.equivariant import recipes
from downscaling.jobs import rows
from downscaling.jobs.job import Item, Job, communication, rows_on, size
from downscaling.metrics import scoring
from downscaling.metrics.reference import Reference
from downscaling.runtime import mesh as meshes
from downscaling.runtime import processes, program_cost

ENTROPIC = ("entropic", "symmetric", "rescaled")


class Debias(Job):
  """Maps, and held-out rows before and after them."""

  name, stage = "debias", "debias"
  libraries = 250e6

  def run(self) -> str:
    work, block = self.work, self.experiment.debias
    work.need("data", "generate")
    stage = work.stage(self.stage)
    loads = self.loads()
    source, target = loads["source"].load(), loads["target"].load()
    agree = functools.partial(processes.gather, "debias")
    stop = {"stop": work.stop, "interruptible": work.stop.interruptible}
    setting = self.setting(stage.hash, mesh=work.mesh, agree=agree, **stop)
    with work.owned(stage):
      report = fit.debias(
        stage.path,
        source["u"],
        target["u"],
        loads["held-out"].read(),
        space=worlds.operator(self.experiment).coarse,
        maps=block.maps,
        chosen=block.map,
        setting=setting,
        evaluators=self._evaluators(loads["reference"].read()),
        trajectories=(source["trajectory"], target["trajectory"]),
        in_sample=debiasing.in_sample_rows(self.experiment),
        calibration=loads["calibration"].read(),
      )
      facts = report["maps"].items()
      converged = {
        name: found["converged"] for name, found in facts if "converged" in found
      }
      work.finish(stage, converged=converged)
    return f"wrote {stage.path}; next: downscaling sample"

  def loads(self) -> dict[str, rows.Rows]:
    """The rows that the job reads. Fine fields are coarsened block by block."""
    e, work = self.experiment, self.work
    points, held_out = e.debias.points, e.debias.held_out
    tuned = min(held_out, e.data.lflr.calibration * e.data.snapshots)
    fine = functools.partial(rows.of, work, "hfhr", coarsen=True)
    coarse = functools.partial(rows.of, work, "lflr")
    return {
      "source": coarse("train", rows.balanced(e, "lflr", "train", points)),
      "target": fine("train", rows.balanced(e, "hfhr", "train", points)),
      "held-out": coarse("test", rows.judged(e, "lflr", "test", held_out)),
      "calibration": coarse(
        "calibration", rows.judged(e, "lflr", "calibration", tuned)
      ),
      "reference": fine(
        "reference", rows.balanced(e, "hfhr", "reference", e.evaluate.reference)
      ),
    }

  def _evaluators(self, truth: np.ndarray) -> dict[str, Callable]:
    """{name: (rows before, rows after) -> metrics}, one a channel. truth: [R, *coarse, C]."""
    e = self.experiment
    group, quadratic = worlds.group(e), debiasing.quadratic(e)
    domain = worlds.coarse_domain(e)
    found = {}
    for place, channel in enumerate(domain.channels):
      reference = Reference(truth[..., place], domain)

      def against_truth(
        before, after, place=place, reference=reference
      ) -> dict[str, Any]:
        return scoring.measure(
          after[..., place],
          reference,
          group=group,
          source=before[..., place],
          quadratic=quadratic,
        )

      name = "metrics" if len(domain.channels) == 1 else f"metrics of {channel.name}"
      found[name] = against_truth
    return found

  def setting(self, config_hash: str = "", **of_job) -> maps.Setting:
    """What all fits share."""
    return debiasing.setting(self.experiment, config_hash, **of_job)

  def lines(self) -> list[str]:
    block, d = self.experiment.debias, self.dimensions
    lines = [
      f"maps {', '.join(block.maps)} between {block.points} × {block.points} points in {d} "
      f"dimensions; samples behind {block.map}"
    ]
    for name in block.maps:
      if name in ENTROPIC:
        lines += [name, *(f"  {line}" for line in self._sinkhorn(name))]
      elif name == "minibatch":
        lines.append(
          f"minibatch: batches of {block.minibatch.batch}, {block.minibatch.passes:g} passes, one "
          "device"
        )
      else:
        recipe = "G" if name == "gaussian" else self.setting().recipe
        order = recipes.letters(recipe, debiasing.quadratic(self.experiment))
        lines.append(f"{name}: recipe {order}, {self._own_rows} rows a process")
    return lines

  def on_device(self) -> float:
    """Of the largest entropic program."""
    kinds = [name for name in self.experiment.debias.maps if name in ENTROPIC]
    memories = [program_cost.memory(self._program(name)[1]) for name in kinds]
    return max((m["arguments"] + m["temporaries"] for m in memories), default=0.0)

  @property
  def dimensions(self) -> int:
    """Values of a coarse field."""
    return math.prod(worlds.operator(self.experiment).coarse)

  @property
  def _own_rows(self) -> int:
    """Rows of a fit that one process works on."""
    return -(-self.experiment.debias.points // meshes.hosts(self.work.mesh))

  @functools.cache  # noqa: B019  (a job lives as long as its process)
  def _program(self, name: str):
    """(path, the compiled chunk of iterations) of an entropic map."""
    block, mesh = self.experiment.debias, self.work.mesh
    n, d = block.points, self.dimensions
    meshes.check_divides(n, mesh.size, "a cloud", "debias.points")
    group = worlds.group(self.experiment) if name == "symmetric" else None
    elements = len(group) if group else 1
    path = sinkhorn.path_of(block.path, n, n, d, mesh.size, elements)
    cloud, potential = rows_on(mesh, n, d), rows_on(mesh, n)
    chunk = sinkhorn_steps.make_chunk(
      iterations=block.check_every, momentum=1.5, path=path, mesh=mesh
    )
    moves = None
    if group:
      moves = (
        jnp.asarray(group.index, jnp.int32),
        jnp.asarray(group.sign, jnp.float32),
      )
    kept = (
      rows_on(mesh, n, n) if sinkhorn_steps.keeps_costs(path, d, elements) else None
    )
    epsilon = jax.ShapeDtypeStruct((), jnp.float32)
    program = chunk.lower(
      cloud, cloud, *(potential,) * 4, epsilon, moves, kept
    ).compile()
    return path, program

  def _sinkhorn(self, name: str) -> list[str]:
    """The plan of an entropic map, by the very program that would run."""
    block, mesh = self.experiment.debias, self.work.mesh
    n, d = block.points, self.dimensions
    elements = len(worlds.group(self.experiment)) if name == "symmetric" else 1
    path, program = self._program(name)
    memory = program_cost.memory(program)
    passes = 2 if path in ("ring", "pallas") else 1
    pairs = f"{n * n * elements * passes / mesh.size:.3g} pairs a device an iteration"
    if path == "dense":
      pairs += f", their exponentials once in {block.check_every}"
    costs = " and the costs" if sinkhorn_steps.keeps_costs(path, d, elements) else ""
    return [
      f"ε {block.epsilon:g} of the mean cost, annealed; at most {block.max_iterations} iterations "
      f"to a marginal error of {block.threshold:g}",
      f"path {path}: {pairs}",
      f"memory a device: {size(memory['arguments'])} clouds and potentials{costs}, "
      f"{size(memory['temporaries'])} temporary (compiled; the whole plan would be "
      f"{size(4 * n * n)})",
      *communication(program),
    ]

  def held(self) -> list[Item]:
    """The rows, the block that is read, and the copies that a fit works on."""
    loads = self.loads()
    found = [Item(f"{name} rows", load.nbytes) for name, load in loads.items()]
    fine = loads["target"]
    found.append(
      Item("fine fields while they are coarsened", fine.block * _row_bytes(fine))
    )
    block = self.experiment.debias
    if any(name not in (*ENTROPIC, "minibatch") for name in block.maps):
      # A recipe holds both clouds of its process in float64, and carries a copy of each step.
      found.append(
        Item("float64 copies in a fit", 4 * 8 * self._own_rows * self.dimensions)
      )
    return found

  def written(self) -> list[Item]:
    block, d = self.experiment.debias, self.dimensions
    loads = self.loads()
    tuned = len(loads["calibration"].numbers)
    stored = 2 * block.held_out + tuned
    found = [Item("rows before and after maps", (len(block.maps) + 1) * 4 * d * stored)]
    entropic = [name for name in block.maps if name in ENTROPIC]
    if entropic:
      n = block.points
      found.append(Item("dual potentials and clouds", len(entropic) * 4 * n * (d + 1)))
      found.append(Item("checkpoints", len(entropic) * 3 * 8 * n))
    return found


def _row_bytes(load: rows.Rows) -> int:
  """Bytes of a field as it lies on disk, float32, and of its copy in the array of a block."""
  return 2 * 4 * int(np.prod(load.stored))
