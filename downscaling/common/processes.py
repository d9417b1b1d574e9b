"""How the processes of a job find and hear each other.

`start` joins them; what they then agree on goes through the key-value store of jax's coordination service: strings on
the host, no device involved. Alone, everything here is trivial.
"""

import collections
import dataclasses
import json
import os
from collections.abc import Callable
from typing import Any

import jax

EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# Method -> the variables by which jax knows it; for the messages alone, jax itself decides.
VARIABLES = {
  "explicit": EXPLICIT,
  "Open MPI": ("OMPI_MCA_orte_hnp_uri",),
  "Slurm": ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"),
  "GKE": ("TPU_WORKER_HOSTNAMES", "MEGASCALE_COORDINATOR_ADDRESS", "JOBSET_NAME"),
}
NAMES = {"SlurmCluster": "Slurm", "OmpiCluster": "Open MPI", "GkeTpuCluster": "GKE", "GceTpuCluster": "Cloud TPU"}


@dataclasses.dataclass(frozen=True)
class Found:
  """method: by which the processes were found; why: in words; processes: how many."""

  method: str
  why: str
  processes: int


class StartError(ValueError):
  """The processes did not come together."""


def start(mode: str = "auto", *, timeout: int = 300, heartbeat: int = 100) -> Found:
  """Joins the processes of this job; call once, before anything touches a device.

  Args:
    mode: "on" joins or raises; "off" stays alone; "auto" joins if a launcher is found, and then raises if it cannot.
    timeout: seconds to wait for the others. heartbeat: seconds after which one that is silent counts as dead.
  Raises: StartError, saying what was found and what is missing.
  """
  if mode not in ("auto", "on", "off"):
    raise StartError(f"--distributed={mode} is unknown; use auto, on or off.")
  if jax.distributed.is_initialized():
    return Found("joined before", "jax.distributed was initialised by the caller", jax.process_count())
  if mode == "off":
    return Found("alone", "--distributed=off", 1)
  explicit, cluster = _explicit(), _cluster()
  if not explicit and cluster is None:
    if mode == "on":
      raise StartError(
        f"--distributed=on, but no launcher was found: {_seen()}. Start the processes with srun, mpirun, a JobSet on "
        f"GKE or on a Cloud TPU VM; or set {', '.join(EXPLICIT)}; or use --distributed=off to stay alone."
      )
    return Found("alone", f"no launcher was found: {_seen()}{_partial()}", 1)
  method = "explicit" if explicit else NAMES.get(cluster.__name__, cluster.__name__)
  try:
    jax.distributed.initialize(**explicit, initialization_timeout=timeout, heartbeat_timeout_seconds=heartbeat)
  except Exception as error:
    raise StartError(
      f"{method} was found ({_seen()}), but its processes did not come together: {str(error).splitlines()[0][:300]}. "
      "Check that all were started, that the coordinator's port is free and can be reached; `downscaling doctor` in "
      "one process shows what is found; --distributed=off stays alone."
    ) from error
  why = f"{', '.join(EXPLICIT)} are set" if explicit else f"jax detects {method} ({_seen()})"
  return Found(method, why, jax.process_count())


def _explicit() -> dict[str, Any]:
  """Arguments of initialize from the environment; {} without them."""
  there = [name for name in EXPLICIT if os.environ.get(name)]
  if not there:
    return {}
  if missing := [name for name in EXPLICIT if name not in there]:
    raise StartError(f"{' and '.join(there)} set, but not {' and '.join(missing)}: set all three, or none.")
  address, count, number = (os.environ[name] for name in EXPLICIT)
  try:
    return {"coordinator_address": address, "num_processes": int(count), "process_id": int(number)}
  except ValueError:
    raise StartError(f"JAX_NUM_PROCESSES={count}, JAX_PROCESS_ID={number}: need two whole numbers.") from None


def _cluster():
  """The launcher that jax would take, or None. Which one it takes is not in its public interface."""
  try:
    from jax._src.clusters import ClusterEnv

    return next((c for c in ClusterEnv._cluster_types if not c.opt_in_only_method and c.is_env_present()), None)
  except (ImportError, AttributeError):  # moved in another jax: then only explicit starts are known
    return None


def _seen() -> str:
  """What stands in the environment, method by method."""
  words = []
  for method, names in VARIABLES.items():
    there = [name for name in names if os.environ.get(name)]
    missing = [name for name in names if name not in there]
    has = f"has {' '.join(there)}, lacks {' '.join(missing) or 'nothing'}"
    words.append(f"{method}: {has if there else 'nothing'}")
  return "; ".join(words)


def _partial() -> str:
  if int(os.environ.get("SLURM_NTASKS", 1)) > 1:
    return (
      f". SLURM_NTASKS is {os.environ['SLURM_NTASKS']}, but this process was not started by srun: put srun before the "
      "command, or it runs alone"
    )
  return ""


# ---------------------------------------------------------------- agreement

_calls: collections.Counter[str] = collections.Counter()


def client():
  """The coordination service's store; None when alone. jax gives no public way to it; orbax takes the same one."""
  from jax._src import distributed

  return distributed.global_state.client if jax.process_count() > 1 else None


def gather(name: str, value: Any, timeout: float = 600.0) -> list:
  """The values (JSON) of all processes, in their order. Each process must call it as often.

  Raises: TimeoutError after `timeout` seconds, naming a process that did not answer.
  """
  if (store := client()) is None:
    return [value]
  _calls[name] += 1
  key = f"downscaling/{name}/{_calls[name]}"
  store.key_value_set(f"{key}/{jax.process_index()}", json.dumps(value))
  values = []
  for process in range(jax.process_count()):
    try:
      values.append(json.loads(store.blocking_key_value_get(f"{key}/{process}", int(1000 * timeout))))
    except Exception as error:
      raise TimeoutError(
        f"process {process} did not answer within {timeout:g} s ({name}): it hangs, or is at another place. Its log "
        "says more; start all processes with the same command."
      ) from error
  return values


def barrier(name: str, timeout: float = 3600.0) -> None:
  """Returns once every process has come here."""
  gather(f"barrier/{name}", 0, timeout)


def main_first(name: str, work: Callable[[], Any]) -> Any:
  """work() on process 0 and, only if that went well, on the others; returns what it returned here.

  Raises: what it raised on process 0; RuntimeError, with its words, on the others.
  """
  if jax.process_index():
    if (failure := gather(f"first/{name}", "")[0]) != "":
      raise RuntimeError(f"process 0 failed: {failure}")
    return work()
  try:
    result = work()
  except Exception as error:
    gather(f"first/{name}", str(error) or type(error).__name__)
    raise
  gather(f"first/{name}", "")
  return result


def same_everywhere(facts: dict[str, str]) -> None:
  """Raises ValueError, on every process, if a fact differs between them."""
  values = gather("facts", facts)
  for process, other in enumerate(values):
    if changed := [key for key in values[0] if other.get(key) != values[0][key]]:
      key = changed[0]
      raise ValueError(
        f"processes differ in {', '.join(changed)}: {key} is {values[0][key]} on process 0 and {other.get(key)} on "
        f"process {process}. Start every process with the same command, code and config."
      )
