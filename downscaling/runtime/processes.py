"""How the processes of a job find each other and talk.

`start` joins them. Afterwards they exchange strings through the key-value store of jax's
coordination service, on the hosts, without any device. For a single process everything is trivial.
"""

import collections
import dataclasses
import functools
import itertools
import json
import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from downscaling.runtime import supervision

EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# Method -> the variables that announce it; used in messages only, as jax itself decides.
VARIABLES = {
  "explicit": EXPLICIT,
  "Open MPI": ("OMPI_MCA_orte_hnp_uri",),
  "Slurm": ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"),
  "GKE": ("TPU_WORKER_HOSTNAMES", "MEGASCALE_COORDINATOR_ADDRESS", "JOBSET_NAME"),
}
NAMES = {
  "SlurmCluster": "Slurm",
  "OmpiCluster": "Open MPI",
  "GkeTpuCluster": "GKE",
  "GceTpuCluster": "Cloud TPU",
  "K8sCluster": "Kubernetes",
}
LONG = 7 * 86_400.0  # seconds: no limit in practice; a dead or hung peer is noticed otherwise
MARGIN = 60  # seconds by which we give up before jax does


@dataclasses.dataclass(frozen=True)
class Found:
  """How the processes were found (method), the reason in words (why), and how many there are."""

  method: str
  why: str
  processes: int


class StartError(ValueError):
  """The processes did not come together."""


def start(mode: str = "auto", *, timeout: int = 300, heartbeat: int = 100) -> Found:
  """Joins the processes of this job. Call it once, before anything touches a device.

  The method is the first of: EXPLICIT, if all three are set; a launcher that jax detects (Open MPI,
  Slurm, GKE, Cloud TPU, Kubernetes).

  Args:
    mode: "on" joins or raises. "off" stays alone. "auto" joins if it finds a launcher, and raises
      if that fails; it stays alone if the launcher started only this process, because a joined
      process would get only one GPU from Slurm.
    timeout: seconds to wait for the others.
    heartbeat: seconds after which a silent process counts as dead.
  Raises: StartError, which says what was found and what is missing.
  """
  if mode not in ("auto", "on", "off"):
    raise StartError(f"--distributed={mode} is unknown; use auto, on or off.")
  if jax.distributed.is_initialized():
    return Found("joined before", "jax.distributed was initialised by the caller", _place()[1])
  if mode == "off":
    return Found("alone", "--distributed=off", 1)
  explicit = _explicit()
  if explicit:
    return _join("explicit", f"{', '.join(EXPLICIT)} are set", timeout, heartbeat, explicit)
  clusters = _clusters()
  if clusters is None and mode == "on":  # jax may still know better
    why = "this version of jax does not tell which launcher it found"
    return _join("jax's detection", why, timeout, heartbeat, {})
  cluster = next(iter(clusters or ()), None)
  if cluster is None and mode == "on":
    raise StartError(
      f"--distributed=on, but no launcher was found: {_seen()}. Start the processes with srun, "
      f"mpirun, a JobSet on GKE or on a Cloud TPU VM; or set {', '.join(EXPLICIT)}; or use "
      "--distributed=off to stay alone."
    )
  if cluster is None:
    return Found("alone", f"no launcher was found: {_seen()}{_partial()}", 1)
  method = NAMES.get(cluster.__name__) or cluster.__name__
  if mode == "auto" and "Tpu" not in cluster.__name__ and _count(cluster) == 1:
    return Found("alone", f"{method} started one process only", 1)
  return _join(method, f"jax detects {method} ({_seen()})", timeout, heartbeat, {})


def _join(method: str, why: str, timeout: int, heartbeat: int, arguments: dict[str, Any]) -> Found:
  """Calls jax.distributed.initialize on a thread.

  If peers are missing, jax does not raise but aborts the program; so we stop waiting before it.
  """
  failures: queue.Queue[Exception | None] = queue.Queue()
  initialize = functools.partial(
    jax.distributed.initialize,
    **arguments,
    initialization_timeout=timeout + MARGIN,
    heartbeat_timeout_seconds=heartbeat,
  )

  def work():
    try:
      failures.put(initialize())
    except Exception as error:
      failures.put(error)

  def failed(text: str) -> StartError:
    return StartError(
      f"{method} was found ({_seen()}), but its processes did not come together: "
      f"{text.rstrip('.')}. Check that all were started, and that the coordinator's port is free "
      "and can be reached from every host; `downscaling doctor` in one process shows what is "
      "found; --distributed=off stays alone."
    )

  if (
    arguments
    and arguments["process_id"]
    and not _listens(arguments["coordinator_address"], timeout)
  ):
    raise failed(
      f"nothing listens at {arguments['coordinator_address']}, where process 0 should, after "
      f"{timeout} s"
    )
  threading.Thread(target=work, name="joining", daemon=True).start()
  try:
    error = failures.get(timeout=timeout)
  except queue.Empty:
    me, count = _state().process_id, _state().num_processes
    raise failed(
      f"this is process {me} of {count}, and others are missing after {timeout} s"
    ) from None
  if error is not None:
    lines = str(error).splitlines() or [type(error).__name__]
    raise failed(lines[0][:300]) from error
  return Found(method, why, _place()[1])


def _listens(address: str, timeout: float) -> bool:
  """Waits until something accepts connections at host:port."""
  host, _, port = address.rpartition(":")
  deadline = time.monotonic() + timeout
  place = (host.strip("[]"), int(port))
  while time.monotonic() < deadline:
    try:
      socket.create_connection(place, timeout=1.0).close()
      return True
    except OSError:
      time.sleep(0.1)
  return False


def _explicit() -> dict[str, Any]:
  """Arguments of initialize from the environment; {} without them."""
  there = [name for name in EXPLICIT if os.environ.get(name)]
  if not there:
    return {}
  missing = [name for name in EXPLICIT if name not in there]
  if missing:
    raise StartError(
      f"{' and '.join(there)} set, but not {' and '.join(missing)}: set all three, or none."
    )
  address, count, number = (os.environ[name] for name in EXPLICIT)
  if not address.rpartition(":")[2].isdigit() or ":" not in address:
    raise StartError(
      f"JAX_COORDINATOR_ADDRESS={address}: need host:port of process 0, e.g. 10.0.0.1:1234."
    )
  try:
    values = int(count), int(number)
  except ValueError:
    raise StartError(
      f"JAX_NUM_PROCESSES={count}, JAX_PROCESS_ID={number}: need two whole numbers."
    ) from None
  if not 0 <= values[1] < values[0]:
    raise StartError(
      f"JAX_PROCESS_ID={number} of JAX_NUM_PROCESSES={count}: number the processes 0 to "
      f"{max(values[0], 1) - 1}."
    )
  return {"coordinator_address": address, "num_processes": values[0], "process_id": values[1]}


def _clusters() -> list | None:
  """The launcher that jax would use, in a list, or []; None if this version of jax hides it.

  jax's public interface does not tell.
  """
  try:
    from jax._src.clusters.cluster import ClusterEnv

    kinds = [c for c in ClusterEnv._cluster_types if not c.opt_in_only_method]
  except (ImportError, AttributeError):
    return None
  return list(itertools.islice((c for c in kinds if c.is_env_present()), 1))


def _count(cluster) -> int | None:
  """Processes that the launcher started; None if it does not say: joining will then tell why."""
  try:
    return cluster.get_process_count()
  except Exception:
    return None


def _seen() -> str:
  """What each method finds in the environment, in words."""
  words = []
  for method, names in VARIABLES.items():
    there = [name for name in names if os.environ.get(name)]
    missing = [name for name in names if name not in there]
    has = f"has {' '.join(there)}, lacks {' '.join(missing) or 'nothing'}"
    words.append(f"{method}: {has if there else 'nothing'}")
  return "; ".join(words)


def _partial() -> str:
  """A warning if Slurm allocated several tasks but srun was forgotten; "" otherwise."""
  tasks = os.environ.get("SLURM_NTASKS", "")
  if not tasks.isdigit() or int(tasks) < 2 or os.environ.get("SLURM_STEP_NODELIST"):
    return ""
  return (
    f". SLURM_NTASKS is {tasks}, but srun did not start this process: put srun before the command, "
    "or it runs alone"
  )


# ---------------------------------------------------------------- agreement

_calls: collections.Counter[str] = collections.Counter()


def client():
  """The store of the coordination service; None for a single process.

  jax gives no public way to it; orbax takes the same one.
  """
  return _state().client if _place()[1] > 1 else None


def _state():
  from jax._src import distributed

  return distributed.global_state


def _place() -> tuple[int, int]:
  """(number of this process, count of processes).

  jax.process_index() and process_count() would initialise the devices.
  """
  state = _state()
  if not jax.distributed.is_initialized():
    return 0, 1
  return state.process_id, state.num_processes


def gather(name: str, value: Any, timeout: float = 600.0) -> list:
  """The values (JSON) of all processes, in order. Every process must make the same calls.

  Raises:
    TimeoutError: after `timeout` seconds, naming the processes that did not answer.
    ConnectionError: the store is gone, and process 0 with it.
  """
  text = json.dumps(value)
  store = client()
  if store is None:
    return [json.loads(text)]
  me, count = _place()
  _calls[name] += 1
  key = f"downscaling/{name}/{_calls[name]}"
  deadline = time.monotonic() + timeout
  try:
    store.key_value_set(f"{key}/{me}", text)
    values = []
    for process in range(count):
      left = max(1, int(1000 * (deadline - time.monotonic())))
      values.append(json.loads(store.blocking_key_value_get(f"{key}/{process}", left)))
    if _calls[name] > 1:  # all are here, so none still reads what was said before
      store.key_value_delete(f"downscaling/{name}/{_calls[name] - 1}/{me}")
    return values
  except jax.errors.JaxRuntimeError as error:
    if "DEADLINE_EXCEEDED" not in str(error):
      said = str(error).splitlines()[0][:200]
      raise ConnectionError(
        f"process 0, which holds what the processes tell each other, is gone ({name}: {said}). Its "
        "log says more; start all processes again."
      ) from error
    missing = [str(p) for p in range(count) if not _answered(store, f"{key}/{p}")]
    raise TimeoutError(
      f"process {', '.join(missing) or 'none'} of {count} did not answer within {timeout:g} s "
      f"({name}): it hangs, has ended, or is at another place. Its log says more; start all "
      "processes with the same command."
    ) from error


def _answered(store, key: str) -> bool:
  try:
    return bool(store.key_value_try_get(key))
  except jax.errors.JaxRuntimeError:  # not found
    return False


def barrier(name: str, timeout: float = 3600.0) -> None:
  """Returns once every process has called it. Raises: see gather."""
  gather(f"barrier/{name}", 0, timeout)


def main_first(name: str, work: Callable[[], Any], timeout: float = 3600.0) -> Any:
  """Calls work() on process 0, then on the others if that went well; returns this one's result.

  Args:
    timeout: seconds that the others wait for process 0.
  Raises: on process 0, what work() raised; on the others, PeerFailed with its text. See gather.
  """
  name = f"first/{name}"
  if _place()[0]:
    failure = gather(name, "", timeout)[0]
    if failure:
      raise supervision.PeerFailed(f"process 0 failed: {failure}")
    return work()
  try:
    result = work()
  except BaseException as error:  # also when it is told to stop: the others would wait for it
    gather(name, str(error) or type(error).__name__, timeout)
    raise
  gather(name, "", timeout)
  return result


def main_only(name: str, work: Callable[[], Any], timeout: float = LONG) -> Any:
  """Calls work() on process 0 while the others wait; returns its result (JSON) on every process.

  Raises: see main_first.
  """
  name = f"only/{name}"
  if _place()[0]:
    failure, result = gather(name, ["", None], timeout)[0]
    if failure:
      raise supervision.PeerFailed(f"process 0 failed: {failure}")
    return result
  try:
    result = work()
  except BaseException as error:  # also when it is told to stop: the others would wait for it
    gather(name, [str(error) or type(error).__name__, None], timeout)
    raise
  return gather(name, ["", result], timeout)[0][1]


def counter(name: str) -> Callable[[], int]:
  """Returns take() -> 0, 1, 2, ...; each number goes to one process, whichever asks first.

  Every process must call `counter` equally often.
  Raises: ConnectionError, by take, if process 0 is gone.
  """
  store = client()
  if store is None:
    return itertools.count().__next__
  _calls[f"counter/{name}"] += 1
  key = f"downscaling/counter/{name}/{_calls[f'counter/{name}']}"

  def take() -> int:
    try:
      return store.key_value_increment(key, 1) - 1
    except jax.errors.JaxRuntimeError as error:
      said = str(error).splitlines()[0][:200]
      raise ConnectionError(
        f"process 0, which deals out the work, is gone ({name}: {said}): start all again."
      ) from error

  return take


def same_everywhere(facts: dict[str, Any]) -> None:
  """Raises ValueError, on every process, if a fact differs between them."""
  found = differences(gather("facts", facts))
  if found:
    more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
    raise ValueError(
      f"processes differ in {', '.join(found)}: {'; '.join(list(found.values())[:3])}{more}. "
      "Start every process with the same command, code and config."
    )


def differences(values: list[dict[str, Any]]) -> dict[str, str]:
  """Facts that differ between processes: {key: what process 0 and the first other one say}.

  The keys come in the order of the facts.
  """
  found = {}
  for process, other in enumerate(values):
    for key in dict.fromkeys([*values[0], *other]):
      ours, theirs = (facts.get(key, "absent") for facts in (values[0], other))
      if ours != theirs:
        found.setdefault(key, f"{key} is {ours} on process 0 and {theirs} on process {process}")
  return found
