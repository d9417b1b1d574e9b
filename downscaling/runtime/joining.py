"""How the processes of a job find each other."""

import dataclasses
import functools
import os
import queue
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax

from downscaling.runtime import launchers, processes
from downscaling.runtime.launchers import StartError

# jax's launchers, as we call them; LAUNCHED are those whose variables launchers.py reads as well.
NAMES = {
  "SlurmCluster": "Slurm",
  "OmpiCluster": "Open MPI",
  "GkeTpuCluster": "GKE",
  "GceTpuCluster": "Cloud TPU",
  "K8sCluster": "Kubernetes",
}
LAUNCHED = ("Slurm", "Open MPI", "Kubernetes")
MARGIN = 60  # seconds by which we give up before jax does
NOTICE = 30.0  # seconds between two lines of a process that waits for others
# Seconds until a name must resolve: in Kubernetes it appears after its pod.
RESOLVE = 45.0
# Seconds in which the API of Kubernetes must answer; its client would wait for many minutes.
ANSWER = 60.0


@dataclasses.dataclass(frozen=True)
class Found:
  """How the processes were found (method), the reason in words (why), and how many there are."""

  method: str
  why: str
  processes: int


def start(
  mode: str = "auto",
  *,
  timeout: int = 300,
  heartbeat: int = 100,
) -> Found:
  """Joins the processes of this job. Call it once, before anything touches a device.

  Rank, count and coordinator come from the variables of a launcher (launchers.py); where they do
  not say the coordinator, from jax, which knows it for Slurm, Open MPI 4, Kubernetes and TPUs. In
  Kubernetes, jax asks the cluster's API, and only in a pod of an indexed Job.

  Args:
    mode: "on" joins or raises. "off" stays alone. "auto" joins if other processes are announced,
      and raises if that fails; it stays alone if the launcher started only this process, because a
      joined process would get only one GPU from Slurm.
    timeout: seconds to wait for the others.
    heartbeat: seconds after which a silent process counts as dead.
  Raises: StartError, which says what was found and what is missing.
  """
  if mode not in ("auto", "on", "off"):
    raise StartError(f"--distributed={mode} is unknown; use auto, on or off.")
  if jax.distributed.is_initialized():
    return Found(
      "joined before",
      "jax.distributed was initialised by the caller",
      processes.place()[1],
    )
  if mode == "off":
    return Found("alone", "--distributed=off", 1)
  here, cluster = launchers.place(os.environ), _cluster()
  method = NAMES.get(cluster.__name__, cluster.__name__) if cluster else ""
  if here is None and method == "Kubernetes" and os.environ.get(launchers.INDEX):
    here = _pod(cluster)
  same = here is not None and method == here.launcher and method in LAUNCHED
  sure = same or not cluster or (here is not None and here.address)
  if here and here.count == 1 and mode == "auto" and sure:
    return Found("alone", f"{here.launcher} started one process only", 1)
  if here and same and here.address is None:
    here = dataclasses.replace(here, address=_address(cluster, method))
  if here and here.address:
    return _join_at(here, timeout, heartbeat)
  if cluster and method not in LAUNCHED:
    if mode == "auto" and "Tpu" not in cluster.__name__ and _count(cluster) == 1:
      return Found("alone", f"{method} started one process only", 1)
    return _join(method, f"jax detects {method} ({_seen()})", timeout, heartbeat, {})
  several = launchers.announced(os.environ)
  if several or launchers.address(os.environ):
    raise StartError(_not_joined(several))
  if mode == "on":
    raise StartError(
      f"--distributed=on, but no launcher was found: {_seen()}. Start the processes with srun, "
      f"mpirun, a JobSet on GKE or on a Cloud TPU VM; or set {launchers.ADDRESS}, "
      "JAX_NUM_PROCESSES and JAX_PROCESS_ID; or use --distributed=off to stay alone."
    )
  hint = ". This is a Slurm job: srun starts several processes" if _in_slurm() else ""
  return Found("alone", f"no launcher was found: {_seen()}{hint}", 1)


def _not_joined(several: str) -> str:
  """Why a process that is not alone may not go on as if it were."""
  if _in_slurm() and not os.environ.get("SLURM_STEP_NODELIST"):
    return (
      f"{several or _seen()}, but srun did not start this process: put srun before the command, or "
      "use --distributed=off for a job of one process."
    )
  if several:
    return (
      f"{several}: other processes are announced, but nothing says where process 0 is "
      f"({_seen()}). {launchers.ASK[0].upper()}{launchers.ASK[1:]}."
    )
  return (
    f"{launchers.ADDRESS} is set, but nothing says which of how many processes this is "
    f"({_seen()}): set JAX_NUM_PROCESSES and JAX_PROCESS_ID on every process, or unset it."
  )


def _join_at(here: launchers.Place, timeout: int, heartbeat: int) -> Found:
  """Joins processes whose coordinator is known."""
  assert here.address is not None
  arguments: dict[str, Any] = {
    "coordinator_address": here.address,
    "num_processes": here.count,
    "process_id": here.rank,
  }
  if (
    _cluster() is None
  ):  # jax would look for launchers once more, and raise where we do not
    arguments["cluster_detection_method"] = "deactivate"
  # Of several processes on a host each takes one device, unless the launcher hides the others.
  hidden = len(os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")) == 1
  if here.local is not None and not (hidden and os.environ.get("CUDA_VISIBLE_DEVICES")):
    arguments["local_device_ids"] = [here.local]
  why = f"process {here.rank} of {here.count}, coordinator {here.address} ({_seen()})"
  return _join(here.launcher, why, timeout, heartbeat, arguments)


def _join(
  method: str, why: str, timeout: int, heartbeat: int, arguments: dict[str, Any]
) -> Found:
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

  if arguments:
    trouble = _trouble(
      arguments["coordinator_address"], arguments["process_id"], timeout
    )
    if trouble:
      raise failed(trouble)
  threading.Thread(target=work, name="joining", daemon=True).start()
  waiting = _Waiting(timeout, "others")
  while True:
    try:
      error = failures.get(timeout=0.2)
      break
    except queue.Empty:
      if waiting.over():
        me, count = (
          processes.coordination().process_id,
          processes.coordination().num_processes,
        )
        raise failed(
          f"this is process {me} of {count}, and others are missing after {timeout} s"
        ) from None
  if error is not None:
    lines = str(error).splitlines() or [type(error).__name__]
    raise failed(lines[0][:300]) from error
  return Found(method, why, processes.place()[1])


class _Waiting:
  """A wait that says a line every NOTICE seconds, as a silent one looks like a hang."""

  def __init__(self, seconds: float, what: str):
    self.began, self.seconds, self.what = time.monotonic(), seconds, what
    self.said = 0

  def over(self) -> bool:
    """True once the time is up."""
    passed = time.monotonic() - self.began
    if passed > NOTICE * (self.said + 1) and passed < self.seconds:
      self.said += 1
      words = (
        f"downscaling: waiting for {self.what}, {passed:.0f} of {self.seconds:.0f} s"
      )
      print(words, file=sys.stderr, flush=True)
    return passed > self.seconds


def _trouble(address: str, process: int, timeout: float) -> str:
  """What is wrong with a coordinator's address, in words; "" if nothing is.

  jax would wait for a name that does not resolve, and end by a signal on a port in use.
  """
  host, _, port = address.rpartition(":")
  host = host.strip("[]")
  waiting = _Waiting(min(RESOLVE, timeout), f"the name {host} to resolve")
  while not _resolves(host):
    if waiting.over():
      return (
        f"the coordinator's name {host} does not resolve on {socket.gethostname()}: add it to DNS "
        f"or /etc/hosts, or set {launchers.ADDRESS} to an address that does"
      )
    time.sleep(0.2)
  if process == 0:
    return _taken(int(port))
  waiting = _Waiting(timeout, f"process 0 at {address}")
  while not _listens(host, int(port)):
    if waiting.over():
      return (
        f"nothing listens at {address}, where process 0 should, after {timeout:g} s"
      )
    time.sleep(0.1)
  return ""


def _resolves(host: str) -> bool:
  try:
    return bool(socket.getaddrinfo(host, None))
  except OSError:
    return False


def _taken(port: int) -> str:
  """What is wrong with a port that process 0 is to listen at; "" if it is free."""
  family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
  try:
    # Ports of connections that have ended are free; those at which somebody listens are not.
    with socket.socket(family) as server:
      server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      server.bind(("", port))
      server.listen(1)
    return ""
  except OSError as error:
    return (
      f"process 0 cannot listen at port {port} of {socket.gethostname()} ({error.strerror}): end "
      f"what uses it, or set {launchers.ADDRESS} with another port on all processes"
    )


def _listens(host: str, port: int) -> bool:
  """Does something accept connections there?"""
  try:
    socket.create_connection((host, port), timeout=1.0).close()
    return True
  except OSError:
    return False


def _cluster():
  """The launcher that jax would use, or None; jax's public interface does not tell."""
  try:
    from jax._src.clusters.cluster import ClusterEnv

    kinds = [c for c in ClusterEnv._cluster_types if not c.opt_in_only_method]
  except (ImportError, AttributeError):
    return None
  return next((c for c in kinds if _present(c)), None)


def _present(cluster) -> bool:
  """jax's detection of Kubernetes raises where a pod has no service account, and warns where its
  package is missing.
  """
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    try:
      return cluster.is_env_present()
    except Exception:
      return False


def _address(cluster, method: str) -> str | None:
  """host:port of the coordinator as jax knows it; None if it does not."""
  port = os.environ.get("JAX_COORDINATOR_PORT")
  try:
    # Without a time jax does not wait for the name to resolve: _trouble does, in words.
    return _within(ANSWER, lambda: cluster.get_coordinator_address(None, port))
  except Exception as error:
    if "mpi4py" in str(error):  # which jax 0.11 asks for Open MPI 5
      return None
    raise StartError(
      f"{method} was found ({_seen()}), but not its first process: {_reason(error)}. Set "
      f"{launchers.ADDRESS}=HOST:PORT of process 0 on all of them."
    ) from error


def _pod(cluster) -> launchers.Place:
  """This pod of an indexed Job, which only the API of the cluster knows the size of."""
  try:
    count = _within(ANSWER, cluster.get_process_count)
  except Exception as error:
    raise StartError(
      f"Kubernetes was found ({_seen()}), but its API does not say how many processes there are: "
      f"{_reason(error)}. Let the pod's service account list pods and services and get jobs; or "
      f"set {launchers.ADDRESS}=HOST:PORT of process 0 and JAX_PROCESS_COUNT on all of them; or "
      "use --distributed=off for a job of one process."
    ) from error
  place = launchers.place({**os.environ, "JAX_PROCESS_COUNT": str(count)})
  assert place is not None
  return place


def _within(seconds: float, question: Callable[[], Any]) -> Any:
  """The answer, or what it raises; TimeoutError where it takes longer."""
  answers: queue.Queue[tuple[Any, Exception | None]] = queue.Queue()

  def ask():
    try:
      answers.put((question(), None))
    except Exception as error:
      answers.put((None, error))

  threading.Thread(target=ask, name="asking", daemon=True).start()
  try:
    answer, error = answers.get(timeout=seconds)
  except queue.Empty:
    raise TimeoutError(f"no answer in {seconds:g} s") from None
  if error is not None:
    raise error
  return answer


def _reason(error: Exception) -> str:
  """The first paragraph of an error, which jax breaks into lines, without its last point."""
  words = " ".join(str(error).split("\n\n")[0].split()) or type(error).__name__
  return words[:400].rstrip(".")


def _count(cluster) -> int | None:
  """Processes that the launcher started; None if it does not say: joining will then tell why."""
  try:
    return cluster.get_process_count()
  except Exception:
    return None


def _seen() -> str:
  return launchers.seen(os.environ)


def _in_slurm() -> bool:
  return bool(os.environ.get("SLURM_JOB_ID"))
