"""One device mesh for every job: shardings, host rows -> global arrays.

Two axes, ("data", "fsdp"), over all devices of all processes. Leading (batch) axes are split over
both; the state of a training run is split over "fsdp" and replicated over "data"; everything else
is replicated. A job never asks which device it is on: it hands its arrays and shardings to jax.jit.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA, FSDP = "data", "fsdp"
AXES = (DATA, FSDP)
ROWS = PartitionSpec(AXES)
SMALL = 1024  # elements; a smaller leaf is cheaper to replicate than to gather


def make(data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """The mesh data × fsdp; data = −1 takes all devices that are left.

  Neighbours along "fsdp" are neighbours in jax.devices(), so that its gathers stay within a host
  where they can.
  devices: others than those, for programs that are compiled and never run.
  Raises: ValueError for a mesh that the devices do not fill.
  """
  devices = jax.devices() if devices is None else devices
  total = len(devices)
  if fsdp < 1 or (data == -1 and total % fsdp):
    fits = [n for n in range(1, total + 1) if total % n == 0]
    raise ValueError(f"config.mesh.fsdp={fsdp} does not divide {total} devices: use one of {fits}.")
  if data == -1:
    data = total // fsdp
  if not 1 <= data * fsdp <= total:
    raise ValueError(
      f"config.mesh.data={data} × fsdp={fsdp}, but {total} devices are here; use data=-1 for all. "
      f"On a CPU, XLA_FLAGS=--xla_force_host_platform_device_count={max(data, 1) * fsdp} makes "
      "that many."
    )
  if data * fsdp < total and jax.process_count() > 1:
    raise ValueError(
      f"config.mesh.data={data} × fsdp={fsdp} leaves {total - data * fsdp} of {total} devices "
      "idle: with several processes every device takes part. Use --config.mesh.data=-1."
    )
  return jax.make_mesh(
    (data, fsdp), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices[: data * fsdp]
  )


def local(mesh: Mesh) -> Mesh:
  """The part of the mesh that this process owns, all of it along "data": for work that needs no
  other process.
  """
  mine = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
  return Mesh(np.array(mine).reshape(-1, 1), AXES, axis_types=(AxisType.Auto,) * 2)


def hosts(mesh: Mesh) -> int:
  """How many processes own its devices."""
  return len({d.process_index for d in mesh.devices.flat})


def platform(mesh: Mesh) -> str:
  """Of its devices, as jax names it: "cpu", "gpu", "tpu"."""
  return mesh.devices.flat[0].platform


def exact(mesh: Mesh) -> Mesh:
  """Where this process computes in float64: its devices of the mesh, or this host's CPU if they are
  TPUs.

  A TPU has no FFT in float64.
  Raises: ValueError if jax was told to leave the CPU alone.
  """
  if platform(mesh) != "tpu":
    return local(mesh)
  return Mesh(np.array(_host()).reshape(-1, 1), AXES, axis_types=(AxisType.Auto,) * 2)


@contextlib.contextmanager
def float64() -> Iterator[None]:
  """Inside, jax computes in float64, and where its default device is a TPU on this host's CPU; see
  `exact`.
  """
  with (
    jax.enable_x64(True),
    jax.default_device(_host()[0] if jax.default_backend() == "tpu" else None),
  ):
    yield


def _host() -> list[jax.Device]:
  try:
    return jax.local_devices(backend="cpu")
  except RuntimeError:
    raise ValueError(
      "a TPU has no FFT in float64, and this job's is done on the host's CPU, which jax may not "
      f"use as JAX_PLATFORMS={jax.config.jax_platforms!r}: set JAX_PLATFORMS=tpu,cpu or unset it."
    ) from None


def rows(mesh: Mesh) -> NamedSharding:
  """Sharding of [B, ...] arrays: the leading axis over all devices."""
  return NamedSharding(mesh, ROWS)


def replicated(mesh: Mesh) -> NamedSharding:
  """The same array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def state_specs(mesh: Mesh, shapes: Any) -> Any:
  """PartitionSpec of every leaf of a training state: its largest axis that fsdp divides; small
  leaves replicated.

  Args:
    shapes: tree of arrays or ShapeDtypeStructs.
  Raises: ValueError if fsdp > 1 and no leaf has such an axis.
  """
  size = mesh.shape[FSDP]

  def spec(leaf):
    axes = [a for a, n in enumerate(leaf.shape) if n % size == 0]
    if size == 1 or math.prod(leaf.shape) < SMALL or not axes:
      return PartitionSpec()
    axis = max(axes, key=lambda a: leaf.shape[a])
    return PartitionSpec(*(None,) * axis, FSDP)

  specs = jax.tree.map(spec, shapes)
  leaves = jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, PartitionSpec))
  if size > 1 and not any(leaves):
    widest = max((leaf.shape for leaf in jax.tree.leaves(shapes)), key=math.prod)
    raise ValueError(
      f"config.mesh.fsdp={size} divides no axis of any parameter (the largest is {tuple(widest)}): "
      f"nothing would be split. Use fsdp=1, or config.model.channels that are multiples of {size}."
    )
  return specs


def shardings(mesh: Mesh, specs: Any) -> Any:
  """Tree of PartitionSpec -> tree of NamedSharding."""
  return jax.tree.map(
    lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, PartitionSpec)
  )


def host_rows(mesh: Mesh, count: int) -> np.ndarray:
  """Which of the rows 0 … count − 1 of a global batch lie on this process's devices, ascending."""
  places = rows(mesh).addressable_devices_indices_map((count,)).values()
  return np.unique(np.concatenate([np.arange(count)[index] for index in places]))


def to_global(mesh: Mesh, batch: Any, count: int) -> Any:
  """Tree of this process's host rows, [len(host_rows(mesh, count)), ...] -> global arrays [count,
  ...] over rows().
  """
  mine = host_rows(mesh, count)

  def put(host):
    host = np.asarray(host)
    pick = lambda index: host[np.searchsorted(mine, np.arange(count)[index[0]])]
    return jax.make_array_from_callback((count, *host.shape[1:]), rows(mesh), pick)

  return jax.tree.map(put, batch)


def to_host(mesh: Mesh) -> Callable[[Any], Any]:
  """Returns tree of global arrays -> tree of numpy arrays, whole on every process.

  For small results.
  """
  gather = jax.jit(lambda tree: tree, out_shardings=replicated(mesh))
  return lambda tree: jax.device_get(gather(tree))


def each_process(tree: Any) -> list:
  """Tree of arrays -> the trees of all processes, in their order, on every process; of the same
  shapes, any dtype.
  """
  if jax.process_count() == 1:
    return [tree]
  leaves, form = jax.tree.flatten(jax.tree.map(np.asarray, tree))
  packed = np.frombuffer(
    b"".join(leaf.tobytes() for leaf in leaves), np.uint8
  )  # as bytes: jax would round float64
  ends = np.cumsum([leaf.nbytes for leaf in leaves])[:-1]

  def unpack(row):
    parts = zip(np.split(row, ends), leaves, strict=True)
    return jax.tree.unflatten(
      form, [part.view(leaf.dtype).reshape(leaf.shape) for part, leaf in parts]
    )

  return [unpack(row) for row in multihost_utils.process_allgather(packed)]


def check_divides(count: int, devices: int, what: str, key: str) -> None:
  """Raises ValueError unless `count` rows split evenly over `devices`; names the nearest counts
  that do.
  """
  if count % devices:
    low, high = count // devices * devices, -(-count // devices) * devices
    fits = f"{low} or {high}" if low else f"{high}"
    raise ValueError(
      f"{what} of {count} over {devices} devices: each holds as many rows. Set "
      f"--config.{key}={fits}."
    )


def is_main() -> bool:
  """True on the one process that writes what all share."""
  return jax.process_index() == 0
