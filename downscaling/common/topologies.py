"""Devices that are not here, by name: their own compiler makes the programs of a plan, which never run.

"v5e:16x16": a slice of Cloud TPU, chips along each axis. "h200:8", "h200:4x8": GPUs of a host, and of several hosts.
None of them is needed, but the package that holds their compiler. Shardings on such devices can be lowered and
compiled; nothing can be put on them. Without a GPU none of its kernels are timed: set XLA_FLAGS=
--xla_gpu_autotune_level=0 before jax starts, and take it that those chosen in the end may want some memory.
"""

import dataclasses
import os
import re
from importlib import metadata

import jax
from jax.experimental import topologies

# What libtpu would ask the metadata server of a TPU VM, answered: of which slice this host is a part does not matter.
# And other processes may have it loaded, as no chip is taken.
_TPU_HOST = {
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-16",
  "TPU_WORKER_ID": "0",
  "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclasses.dataclass(frozen=True)
class Gpu:
  """What XLA asks of a GPU. capability: CUDA's. memory and l2 in bytes, bandwidth in bytes/s, clock in GHz."""

  kind: str
  capability: tuple[int, int]
  multiprocessors: int
  clock: float
  l2: int
  bandwidth: float
  memory: float

  def text(self) -> str:
    """As xla.gpu.GpuTargetConfigProto. Sizes by capability: CUDA C++ Programming Guide, technical specifications."""
    (major, minor), shared = self.capability, {8: 164, 9: 228}[self.capability[0]] * 1024
    return f"""gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
      shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {shared - 1024}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      core_count: {self.multiprocessors} fpus_per_core: {64 if major == 8 else 128} clock_rate_ghz: {self.clock}
      l2_cache_size: {self.l2} memory_bandwidth: {self.bandwidth:.0f} device_memory_size: {self.memory:.0f}
      cuda_compute_capability {{ major: {major} minor: {minor} }}
    }}
    platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} device_description_str: "{self.kind}"
    """


# NVIDIA's data sheets and architecture papers of each, SXM.
GPUS = {
  "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 1.41, 40 * 2**20, 2.039e12, 80e9),
  "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 1.98, 50 * 2**20, 3.35e12, 80e9),
  "h200": Gpu("NVIDIA H200", (9, 0), 132, 1.98, 50 * 2**20, 4.8e12, 141e9),
}


def devices(name: str) -> list[jax.Device]:
  """The devices of a name as above.

  Raises: ValueError if the compiler is not installed, or knows no such devices.
  """
  kind, shape = name.split(":")
  try:
    if kind in GPUS:
      hosts, each = ([1, *map(int, shape.split("x"))])[-2:]
      asked = {"target_config": GPUS[kind].text(), "topology": f"1x{hosts}x{each}"}
      return list(topologies.get_topology_desc(name, "cuda", **asked).devices)
    for key, value in _TPU_HOST.items():
      os.environ.setdefault(key, value)
    return list(topologies.get_topology_desc(name, "tpu").devices)
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(
      f"--devices={name}: {str(error).splitlines()[0]}. Name a slice of Cloud TPU by its chips along each axis, e.g. "
      f"v5e:16x16, v6e:8x8, v5p:4x4x8, tpu7x:4x4x4, or GPUs ({', '.join(GPUS)}) as h200:8, or 4x8 for four hosts."
    ) from None
  except RuntimeError:
    libtpu = re.split("[ ;]", next(r for r in metadata.requires("jax") if r.startswith("libtpu")))[0]
    package = f"jax[cuda12]=={jax.__version__}" if kind in GPUS else libtpu
    raise ValueError(
      f"--devices={name} is planned by the compiler of those devices, which is not installed here. None of them is "
      f"needed: pip install '{package}'."
    ) from None
