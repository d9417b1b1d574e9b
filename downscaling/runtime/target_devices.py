"""Devices that are not here, by name: their own compiler makes the programs of a plan, which never
run.

"v5e:16x16": a slice of Cloud TPU, chips along each axis. "h200:8", "h200:4x8": GPUs of a host, and
of several hosts. None of them is needed, but the package that holds their compiler. Shardings on
such devices can be lowered and compiled; nothing can be put on them. Without a GPU none of its
kernels are timed: set XLA_FLAGS= --xla_gpu_autotune_level=0 before jax starts, and take it that
those chosen in the end may want some memory.
"""

import dataclasses
import os
import re
from importlib import metadata

import jax
from jax.experimental import topologies

# What libtpu would ask the metadata server of a TPU VM, answered: of which slice this host is a
# part does not matter. And other processes may have it loaded, as no chip is taken.
_TPU_HOST = {
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-16",
  "TPU_WORKER_ID": "0",
  "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclasses.dataclass(frozen=True)
class Hopper:
  """What XLA asks of a GPU of compute capability 9.0. memory: bytes; bandwidth: of it, bytes/s."""

  kind: str
  memory: float
  bandwidth: float

  def text(self) -> str:
    """As xla.gpu.GpuTargetConfigProto.

    Sizes: CUDA C++ Programming Guide, and NVIDIA's H100 white paper.
    """
    return f"""gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
      shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: {50 * 2**20}
      memory_bandwidth: {self.bandwidth:.0f} device_memory_size: {self.memory:.0f}
      cuda_compute_capability {{ major: 9 minor: 0 }}
    }}
    platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} device_description_str: "{self.kind}"
    """


# NVIDIA's data sheets, SXM. An A100 is not here: XLA finds no tiles for some products of ours
# unless it may time them.
GPUS = {
  "h100": Hopper("NVIDIA H100 80GB HBM3", 80e9, 3.35e12),
  "h200": Hopper("NVIDIA H200", 141e9, 4.8e12),
}

# Bytes of memory of one device of jax, by its kind. Google Cloud TPU documentation of each: per
# chip, of which one of TPU7x shows itself as two devices.
TPUS = {
  "TPU v5 lite": 16 * 2**30,
  "TPU v5": 95 * 2**30,
  "TPU v6 lite": 32 * 2**30,
  "TPU7x": 96 * 2**30,
}


def memory(device: jax.Device) -> float:
  """Bytes that a program may take of one of `devices`; jax takes three quarters of a GPU unless
  told otherwise.
  """
  return (TPUS | {gpu.kind: 0.75 * gpu.memory for gpu in GPUS.values()})[device.device_kind]


def devices(name: str) -> list[jax.Device]:
  """The devices of a name as above.

  Raises: ValueError if the compiler is not installed, or there are no such devices, or we know
    nothing of them.
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
    raise ValueError(f"--devices={name}: {str(error).splitlines()[0]}. {known}") from None
  except RuntimeError:
    libtpu = re.split("[ ;]", next(r for r in metadata.requires("jax") if r.startswith("libtpu")))[
      0
    ]
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
