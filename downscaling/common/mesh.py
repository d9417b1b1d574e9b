"""One device mesh for every job: start-up of the processes, shardings, host batch -> global array.

Axis "data" runs over all devices of all processes; leading (batch) axes are split over it, everything else is
replicated. A job never asks which device it is on: it hands its arrays and shardings to jax.jit.
"""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA = "data"


def start(distributed: str = "off") -> None:
  """Joins the processes of this job; call once, before anything touches a device.

  Args:
    distributed: "on" calls jax.distributed.initialize(), which finds its launcher (Slurm, Open MPI, GKE, Cloud TPU) and
      raises if it cannot; "off" stays alone.
  """
  if distributed not in ("on", "off"):
    raise ValueError(f"--distributed={distributed} is unknown; use on or off.")
  if distributed == "on":
    jax.distributed.initialize()
    if jax.process_count() > 1:
      raise ValueError(
        f"{jax.process_count()} processes have joined; in this version a job runs in one process, on all its local "
        "devices. Start one, or leave out --distributed=on."
      )


def make(data: int = -1) -> Mesh:
  """The mesh: `data` devices along its one axis, −1 for all there are.

  Raises: ValueError if there are fewer devices than asked for.
  """
  devices = jax.devices()
  if data == -1:
    data = len(devices)
  if not 1 <= data <= len(devices):
    raise ValueError(
      f"config.mesh.data={data}, but {len(devices)} devices are here; use -1 for all. "
      f"On a CPU, XLA_FLAGS=--xla_force_host_platform_device_count={max(data, 1)} makes that many."
    )
  return Mesh(np.array(devices[:data]), (DATA,), axis_types=(AxisType.Auto,))


def rows(mesh: Mesh) -> NamedSharding:
  """Sharding of [B, ...] arrays: the leading axis over all devices."""
  return NamedSharding(mesh, PartitionSpec(DATA))


def replicated(mesh: Mesh) -> NamedSharding:
  """The same array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def to_global(mesh: Mesh, batch):
  """Tree of this process's host rows -> tree of global arrays sharded by rows()."""
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows(mesh), np.asarray(x)), batch)


def check_divides(count: int, mesh: Mesh, what: str, key: str) -> None:
  """Raises ValueError unless `count` rows split evenly over the mesh; names the nearest counts that do."""
  devices = mesh.size
  if count % devices:
    low, high = count // devices * devices, -(-count // devices) * devices
    fits = f"{low} or {high}" if low else f"{high}"
    raise ValueError(f"{what} of {count} over {devices} devices: each holds as many rows. Set --config.{key}={fits}.")


def is_main() -> bool:
  """True on the one process that writes what all share."""
  return jax.process_index() == 0
