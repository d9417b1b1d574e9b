"""Devices that are not attached, by name: their compiler makes the programs of a dry run.

"v5e:16x16" is a slice of Cloud TPU, chips along each axis. "h200:8" are the GPUs of one host, and
"h200:4x8" those of four. Only the package with their compiler must be installed. Programs sharded
over such devices can be lowered and compiled; no array can be placed on them. Without a GPU, XLA
cannot time kernels: set XLA_FLAGS= --xla_gpu_autotune_level=0 before jax starts. The kernels that a
real GPU chooses may need more memory.
"""

import dataclasses
import os
import re
from importlib import metadata

import jax
from jax.experimental import topologies

from downscaling.runtime import mesh as meshes

# Answers to what libtpu would ask the metadata server of a TPU VM. Which part of the slice this
# host is does not matter. No chip is taken, so other processes may have loaded the library.
_TPU_HOST = {
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-16",
  "TPU_WORKER_ID": "0",
  "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclasses.dataclass(frozen=True)
class Hopper:
  """Facts of a GPU of compute capability 9.0. memory: bytes; bandwidth: bytes/s of that memory."""

  kind: str
  memory: float
  bandwidth: float

  def text(self) -> str:
    """As xla.gpu.GpuTargetConfigProto.

    Sizes: CUDA C++ Programming Guide, and NVIDIA's H100 white paper.
    """
    return "\n".join(
      [
        "gpu_device_info {",
        "threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048",
        "shared_memory_per_block: 49152 shared_memory_per_core: 233472",
        "shared_memory_per_block_optin: 232448",
        "registers_per_core_limit: 65536 registers_per_block_limit: 65536",
        "block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535",
        f"core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: {50 * 2**20}",
        f"memory_bandwidth: {self.bandwidth:.0f} device_memory_size: {self.memory:.0f}",
        "cuda_compute_capability { major: 9 minor: 0 }",
        "}",
        'platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 }',
        f'device_description_str: "{self.kind}"',
      ]
    )


# NVIDIA's data sheets, SXM. An A100 is not here: for some of our matrix products XLA finds no tiles
# without timing them.
GPUS = {
  "h100": Hopper("NVIDIA H100 80GB HBM3", 80e9, 3.35e12),
  "h200": Hopper("NVIDIA H200", 141e9, 4.8e12),
}

# Bytes of memory of one jax device, by its kind; from the Google Cloud TPU documentation, per chip.
# A chip of TPU7x shows itself as two devices.
TPUS = {
  "TPU v5 lite": 16 * 2**30,
  "TPU v5": 95 * 2**30,
  "TPU v6 lite": 32 * 2**30,
  "TPU7x": 96 * 2**30,
}


def memory(device: meshes.Device) -> float:
  """Bytes that a program may use on one of `devices`.

  On a GPU, jax takes three quarters of the memory unless told otherwise.
  """
  known = {gpu.kind: 0.75 * gpu.memory for gpu in GPUS.values()} | TPUS
  return known[device.device_kind]


def devices(name: str) -> list[meshes.Device]:
  """The devices of a name like those above.

  Raises: ValueError if the compiler is not installed, if no such devices exist, or if their memory
    is not known here.
  """
  kind, shape = name.split(":")
  known = (
    "Name a slice of Cloud TPU by its chips along each axis, e.g. v5e:16x16, v6e:8x8, v5p:4x4x8, "
    f"tpu7x:4x4x4, or GPUs ({', '.join(GPUS)}) as h200:8, or 4x8 for four hosts."
  )
  try:
    if kind in GPUS:
      *hosts, each = shape.split("x")
      asked = {
        "target_config": GPUS[kind].text(),
        "topology": "x".join(["1", *(hosts or ["1"]), each]),
      }
      return list(topologies.get_topology_desc(name, "cuda", **asked).devices)
    for key, value in _TPU_HOST.items():
      os.environ.setdefault(key, value)
    found = list(topologies.get_topology_desc(name, "tpu").devices)
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(
      f"--devices={name}: {str(error).splitlines()[0]}. {known}"
    ) from None
  except RuntimeError:
    needed = metadata.requires("jax") or []
    libtpu = next(line for line in needed if line.startswith("libtpu"))
    libtpu = re.split("[ ;]", libtpu)[0]
    package = f"jax[cuda12]=={jax.__version__}" if kind in GPUS else libtpu
    raise ValueError(
      f"--devices={name} is planned by the compiler of those devices, which is not installed here. "
      f"None of them is needed: pip install '{package}'."
    ) from None
  if found[0].device_kind not in TPUS:
    raise ValueError(
      f"--devices={name}: nothing is known here of {found[0].device_kind!r}, as its memory. {known}"
    )
  return found
