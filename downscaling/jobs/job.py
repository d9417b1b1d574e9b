"""What every job is: it lists what it holds and writes, does it, or prints it as a plan."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp

from downscaling.assembly import prior
from downscaling.fields import statistics
from downscaling.jobs.workdir import Workdir
from downscaling.runtime import mesh as meshes
from downscaling.runtime import program_cost

# Shares of a chip's peak that a network may reach: large convolutions alone; much memory traffic.
SHARES = (0.4, 0.1)
# The chip whose hours are given where the devices here have no known peak.
STAND_IN = "NVIDIA H200"


@dataclasses.dataclass(frozen=True)
class Item:
  """Something that a job holds in the host's memory or writes: what it is, and its bytes."""

  what: str
  nbytes: float

  def __str__(self) -> str:
    return f"{size(self.nbytes)} {self.what}"


class Job(abc.ABC):
  """One job of one work folder.

  `run` and `plan` use the same parts: the rows that `run` reads are those whose sizes `plan` adds
  up, and the programs that `run` compiles are those whose memory `plan` prints.
  """

  name: ClassVar[str]  # on the command line
  stage: ClassVar[str]  # the stage it makes
  # Bytes that the libraries and the compiler take beside arrays: measured on ks:smoke, whose arrays
  # are below 1 MB.
  libraries: ClassVar[float]

  def __init__(self, work: Workdir):
    self.work, self.experiment = work, work.experiment

  def check(self) -> None:  # noqa: B027 - most jobs have nothing to refuse
    """Raises what would stop the job later, before any job of a pipeline begins."""

  @abc.abstractmethod
  def run(self) -> str:
    """Does the job. Returns what it wrote and what to run next, in one line."""

  @abc.abstractmethod
  def lines(self) -> list[str]:
    """What it computes, in words and numbers."""

  @abc.abstractmethod
  def held(self) -> list[Item]:
    """Arrays that one process holds in the host's memory at the same time, at the most."""

  @abc.abstractmethod
  def written(self) -> list[Item]:
    """What it writes."""

  def on_device(self) -> float:
    """Bytes that the programs take on one device at the most, beside `held`."""
    return 0.0

  def peak(self) -> float:
    """Bytes that one process takes at the most, beside what importing the package takes.

    On a CPU, the devices' memory is the host's.
    """
    devices = (
      meshes.local(self.work.mesh).size
      if meshes.platform(self.work.mesh) == "cpu"
      else 0
    )
    programs = devices and devices * self.on_device()
    return self.libraries + sum(item.nbytes for item in self.held()) + programs

  def plan(self) -> list[str]:
    """The dry run: what `run` would compute, hold and write."""
    return [
      *self.lines(),
      f"memory of a process: about {size(self.peak())}",
      f"arrays of a process: {total(self.held())}",
      f"disk: {total(self.written())} in {self.work.folder(self.stage)}",
    ]


def total(items: Sequence[Item]) -> str:
  """The sum of several items, and its parts."""
  parts = [str(item) for item in items if item.nbytes]
  whole = size(sum(item.nbytes for item in items))
  return (
    f"{whole}: {', '.join(parts)}"
    if len(parts) > 1
    else (parts[0] if parts else "none")
  )


def size(count: float) -> str:
  """Bytes in words."""
  for unit in ("B", "kB", "MB", "GB"):
    if count < 1000:
      return f"{count:.3g} {unit}"
    count /= 1000
  return f"{count:.3g} TB"


def tree_bytes(tree) -> int:
  """Bytes of a tree of arrays or of their shapes."""
  return sum(leaf.size * width(leaf) for leaf in jax.tree.leaves(tree))


def width(leaf) -> int:
  """Bytes of one element; of a random key, its two words."""
  return 8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize


def rows_on(mesh: jax.sharding.Mesh, *shape: int) -> jax.ShapeDtypeStruct:
  """A float32 array whose first axis is split over the devices, as a shape."""
  return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=meshes.rows(mesh))


def statistics_of(work: Workdir) -> statistics.Statistics:
  """Of the data if they are there, else of a unit field: shapes, and so memory, are the same."""
  there = (work.folder("data") / "statistics.npz").exists()
  return work.statistics() if there else prior.unit_statistics(work.experiment)


def hours(flops: float, work: Workdir) -> str:
  """The time that so many operations take in the network's precision."""
  mesh, dtype = work.mesh, work.experiment.model.dtype
  kind = mesh.devices.flat[0].device_kind
  known = program_cost.peak_flops(kind, dtype)
  peak = known * mesh.size if known else program_cost.peak_flops(STAND_IN, dtype)
  assert peak is not None
  few, many = (flops / (share * peak) / 3600 for share in SHARES)
  words = [f"{h:.2g} h" if many >= 1 else f"{60 * h:.2g} min" for h in (few, many)]
  on = f"{mesh.size} × {kind}" if known else f"one {STAND_IN}"
  return (
    f"{words[0]} to {words[1]} on {on}: {SHARES[0]:.0%} to {SHARES[1]:.0%} of its peak, which is "
    "an assumption"
  )


def communication(program) -> list[str]:
  """What a step sends, by kind of collective, as the compiler has it."""
  found = program_cost.collectives(program)
  if not found:
    return ["communication: none"]
  lines = []
  for kind, devices in sorted({(c.kind, c.group_size) for c in found}):
    these = [c for c in found if (c.kind, c.group_size) == (kind, devices)]
    sent = sum(program_cost.traffic(c) for c in these)
    lines.append(
      f"communication a step: {len(these)} {kind} among {devices} devices, "
      f"{size(sum(c.bytes for c in these))}; in a ring each sends {size(sent)}"
    )
  return lines
