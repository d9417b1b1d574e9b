"""One device mesh for every job: shardings, and global arrays from the rows of each host.

The mesh has two axes, ("data", "fsdp"), over all devices of all processes. Leading (batch) axes are
split over both. The state of a training run is split over "fsdp" and replicated over "data".
Everything else is replicated. A job hands its arrays and shardings to jax.jit and never asks which
device it is on.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from downscaling.runtime import cpu_flags

DATA, FSDP = "data", "fsdp"
AXES = (DATA, FSDP)
ROWS = PartitionSpec(AXES)
SMALL = 1024  # elements; a smaller leaf is cheaper to replicate than to gather
# jax.Device: jax assigns it from a compiled module, so a type checker takes it for a variable.
Device = Any


def make(
  data: int = -1, fsdp: int = 1, devices: Sequence[Device] | None = None
) -> Mesh:
  """The mesh data × fsdp.

  "fsdp", whose gathers come in every step, stays within a slice of TPUs or a host of GPUs where
  that is possible; "data" crosses the slower network between them.

  Args:
    data, fsdp: sizes of the axes; data = −1 takes all devices that are left.
    devices: instead of jax.devices(), for programs that are compiled and never run.
  Raises: ValueError if the mesh does not fit the devices.
  """
  devices = here() if devices is None else devices
  total = len(devices)
  if fsdp < 1 or (data == -1 and total % fsdp):
    fits = [n for n in range(1, total + 1) if total % n == 0]
    raise ValueError(
      f"config.mesh.fsdp={fsdp} does not divide {total} devices: use one of {fits}."
    )
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
  used = devices[: data * fsdp]
  slices = _slices(used)
  if len(slices) > 1 and fsdp <= len(slices[0]) and len(slices[0]) % fsdp == 0:
    return Mesh(_across(slices, fsdp), AXES, axis_types=_AUTO)
  return jax.make_mesh((data, fsdp), AXES, axis_types=_AUTO, devices=used)


def _slices(devices: Sequence[Device]) -> list[list[Device]]:
  """The devices by slice, if they are TPUs of several slices of one size; else in one group.

  Devices of other platforms lie by host in jax.devices() already.
  """
  found: dict[int, list[Device]] = {}
  for device in devices:
    found.setdefault(getattr(device, "slice_index", 0) or 0, []).append(device)
  groups = [found[index] for index in sorted(found)]
  return groups if len({len(group) for group in groups}) == 1 else [[*devices]]


def _across(slices: list[list[Device]], fsdp: int) -> np.ndarray:
  """Devices [data, fsdp]: rows of a slice, then of the next, each laid out by its own topology."""
  shape = (len(slices[0]) // fsdp, fsdp)
  parts = [mesh_utils.create_device_mesh(shape, devices=group) for group in slices]
  return np.concatenate(parts)


def here() -> list[Device]:
  """jax.devices(). Raises ValueError if the platform that was asked for is not installed."""
  cpu_flags.avoid_deadlock()
  try:
    return jax.devices()
  except (RuntimeError, AssertionError) as error:
    asked = _platforms()
    if not asked:
      raise
    lines = str(error).splitlines() or ["no such backend"]
    raise ValueError(
      f"JAX_PLATFORMS={asked}, which cannot be used here ({lines[0][:200]}): install its extra "
      "(pip install 'downscaling[cuda12]', [cuda13] or [tpu]), or unset JAX_PLATFORMS."
    ) from error


def _platforms() -> str:
  """What JAX_PLATFORMS says, or a caller has set; "" for any."""
  return jax.config.values["jax_platforms"] or ""


_AUTO = (AxisType.Auto,) * 2


def _in_a_row(devices: list[Device]) -> Mesh:
  """The given devices, all along "data"."""
  column = np.array(devices).reshape(-1, 1)
  return Mesh(column, AXES, axis_types=_AUTO)


def local(mesh: Mesh) -> Mesh:
  """This process's devices, all along "data": for work that needs no other process."""
  mine = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
  return _in_a_row(mine)


def hosts(mesh: Mesh) -> int:
  """How many processes own the devices of the mesh."""
  return len({d.process_index for d in mesh.devices.flat})


def platform(mesh: Mesh) -> str:
  """The platform of the devices, as jax names it: "cpu", "gpu", "tpu"."""
  return mesh.devices.flat[0].platform


def exact(mesh: Mesh) -> Mesh:
  """The devices on which this process computes in float64.

  They are its devices of the mesh; or the host's CPU if those are TPUs, which have no float64 FFT.
  Raises: ValueError if jax was told to leave the CPU alone.
  """
  if platform(mesh) != "tpu":
    return local(mesh)
  return _in_a_row(_host())


@contextlib.contextmanager
def float64() -> Iterator[None]:
  """Inside the block jax computes in float64; on a TPU host, on the CPU. See `exact`."""
  device = _host()[0] if jax.default_backend() == "tpu" else None
  with jax.enable_x64(True), jax.default_device(device):
    yield


def _host() -> list[Device]:
  try:
    return jax.local_devices(backend="cpu")
  except RuntimeError:
    platforms = _platforms()
    raise ValueError(
      "a TPU has no FFT in float64, and this job's is done on the host's CPU, which jax may not "
      f"use as JAX_PLATFORMS={platforms!r}: set JAX_PLATFORMS=tpu,cpu or unset it."
    ) from None


def rows(mesh: Mesh) -> NamedSharding:
  """Sharding of [B, ...] arrays: the leading axis over all devices."""
  return NamedSharding(mesh, ROWS)


def replicated(mesh: Mesh) -> NamedSharding:
  """Sharding that puts the whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def state_specs(mesh: Mesh, shapes: Any) -> Any:
  """PartitionSpec of every leaf of a training state.

  A leaf is split along its largest axis that fsdp divides; small leaves are replicated.
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
  leaves = jax.tree.leaves(specs, is_leaf=_is_spec)
  if size > 1 and not any(leaves):
    sizes = [leaf.shape for leaf in jax.tree.leaves(shapes)]
    widest = max(sizes, key=math.prod)
    raise ValueError(
      f"config.mesh.fsdp={size} divides no axis of any parameter (the largest is {tuple(widest)}): "
      f"nothing would be split. Use fsdp=1, or config.model.channels that are multiples of {size}."
    )
  return specs


def _is_spec(value: Any) -> bool:
  return isinstance(value, PartitionSpec)


def shardings(mesh: Mesh, specs: Any) -> Any:
  """Tree of PartitionSpec -> tree of NamedSharding."""
  return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=_is_spec)


def host_rows(mesh: Mesh, count: int) -> np.ndarray:
  """Which rows 0 … count − 1 of a global batch this process's devices hold, ascending."""
  places = rows(mesh).addressable_devices_indices_map((count,)).values()
  held = [np.arange(count)[index] for index in places]
  return np.unique(np.concatenate(held))


def to_global(mesh: Mesh, batch: Any, count: int) -> Any:
  """Makes global arrays of the rows that each process holds.

  Args:
    batch: tree of this process's rows, [len(host_rows(mesh, count)), ...].
    count: rows of all processes together.
  Returns: tree of arrays [count, ...], sharded as `rows`.
  """
  mine = host_rows(mesh, count)

  def put(host):
    host = np.asarray(host)

    def pick(index):
      wanted = np.arange(count)[index[0]]
      return host[np.searchsorted(mine, wanted)]

    return jax.make_array_from_callback((count, *host.shape[1:]), rows(mesh), pick)

  return jax.tree.map(put, batch)


def to_host(mesh: Mesh) -> Callable[[Any], Any]:
  """Returns a function: tree of global arrays -> tree of whole numpy arrays on every process.

  For small results.
  """
  gather = jax.jit(lambda tree: tree, out_shardings=replicated(mesh))
  return lambda tree: jax.device_get(gather(tree))


def each_process(tree: Any) -> list:
  """Gathers a tree of arrays from every process.

  The trees have the same shapes and dtypes on every process.
  Returns: the trees in the order of the processes, on every process.
  """
  if jax.process_count() == 1:
    return [tree]
  leaves, form = jax.tree.flatten(jax.tree.map(np.asarray, tree))
  whole = b"".join(leaf.tobytes() for leaf in leaves)
  packed = np.frombuffer(whole, np.uint8)  # as bytes: jax would round float64
  ends = np.cumsum([leaf.nbytes for leaf in leaves])[:-1]

  def unpack(row):
    parts = zip(np.split(row, ends), leaves, strict=True)
    shaped = [part.view(leaf.dtype).reshape(leaf.shape) for part, leaf in parts]
    return jax.tree.unflatten(form, shaped)

  return [unpack(row) for row in multihost_utils.process_allgather(packed)]


def check_divides(count: int, devices: int, what: str, key: str) -> None:
  """Raises ValueError unless `count` rows split evenly over `devices`; names counts that do."""
  if count % devices:
    low = count // devices * devices
    high = low + devices
    fits = f"{low} or {high}" if low else f"{high}"
    raise ValueError(
      f"{what} of {count} over {devices} devices: each holds as many rows. Set "
      f"--config.{key}={fits}."
    )


def is_main() -> bool:
  """True on the one process that writes shared files."""
  return jax.process_index() == 0
