"""GPUs that a job was given and does not use, and GPUs that two of its processes share.

Both go on without a word: one process a node takes one of eight GPUs under Slurm, and two processes
that see the same one divide its memory.
"""

import os
import pathlib
import socket
from collections.abc import Iterable, Mapping

import jax

from downscaling.runtime import processes

DRIVER = pathlib.Path("/proc/driver/nvidia/gpus")
PATIENCE = 120.0  # seconds that one process waits for the others


def problems() -> list[str]:
  """What is wrong, in words, the same on every process. Every process must call it."""
  return judged(processes.gather("devices of hosts", _here(), PATIENCE))


def judged(told: Iterable[Mapping]) -> list[str]:
  """What is wrong with what every process tells of itself (`_here`)."""
  hosts: dict[str, list[Mapping]] = {}
  for process in told:
    hosts.setdefault(process["host"], []).append(process)
  found = []
  for host, there in hosts.items():
    used = [gpu for process in there for gpu in process["gpus"]]
    twice = sorted({gpu for gpu in used if used.count(gpu) > 1})
    given = max(process["given"] for process in there)
    if twice:
      found.append(
        f"processes of {host} share GPU {', '.join(twice)}: give each its own (one task a GPU with "
        "--gres=gpu:N, or CUDA_VISIBLE_DEVICES)."
      )
    elif given > len(used) and not all(process["asked"] == "cpu" for process in there):
      found.append(
        f"{host} has {given} GPUs, and its {len(there)} process(es) use {len(used)}: start one "
        f"process a GPU (Slurm: --ntasks-per-node={given} --gres=gpu:{given}); without Slurm or "
        "MPI one process takes all; where none is used, install the extra cuda12 or cuda13."
      )
  return found


def _here() -> dict:
  """What this process tells: its host, its GPUs, how many its host was given, and the platform that
  was asked for.
  """
  mine = [d for d in jax.local_devices() if d.platform == "gpu"]
  visible = visible_gpus(os.environ)
  ids = [d.local_hardware_id for d in mine]
  return {
    "host": socket.gethostname(),
    "gpus": [visible[i] if i < len(visible) else str(i) for i in ids],
    "given": given(os.environ),
    "asked": os.environ.get("JAX_PLATFORMS", ""),
  }


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
  """The GPUs that a process may see, as CUDA_VISIBLE_DEVICES names them; [] if it does not."""
  return [
    name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name
  ]


def given(environment: Mapping[str, str], driver: pathlib.Path = DRIVER) -> int:
  """GPUs of this host that the job may use, as Slurm, CUDA_VISIBLE_DEVICES or the driver say."""
  said = environment.get("SLURM_GPUS_ON_NODE", "")
  if said.isdigit():
    return int(said)
  if "CUDA_VISIBLE_DEVICES" in environment:
    return len(visible_gpus(environment))
  return len([*driver.iterdir()]) if driver.is_dir() else 0
