"""Which launcher started this process, as which of how many, and where the coordinator is.

All of it comes from environment variables. jax itself knows Slurm, Open MPI 4, Kubernetes and Cloud
TPUs; the table below adds those that it does not know, and refuses what it would pass over.
"""

import dataclasses
from collections.abc import Mapping

PORT = 8476  # where the coordinator listens, if an address comes without a port
ADDRESS = "JAX_COORDINATOR_ADDRESS"
INDEX = "JOB_COMPLETION_INDEX"  # that Kubernetes gives each pod of an indexed Job
ASK = (  # of every error about a missing coordinator
  f"set {ADDRESS}=HOST:PORT of process 0 on all of them, or use --distributed=off if each is to be "
  "a job of its own"
)


class StartError(ValueError):
  """The processes did not come together."""


@dataclasses.dataclass(frozen=True)
class Launcher:
  """The variables by which a launcher numbers its processes.

  rank, count: names that may hold it, the first that is set counts. local_rank, local_count: the
  same among the processes of one host. needs: variables without which the others mean nothing.
  """

  name: str
  rank: tuple[str, ...]
  count: tuple[str, ...]
  local_rank: str = ""
  local_count: str = ""
  needs: tuple[str, ...] = ()

  @property
  def variables(self) -> tuple[str, ...]:
    """All names, in order."""
    names = (*self.rank, *self.count, self.local_rank, self.local_count, *self.needs)
    return tuple(name for name in names if name)


EXPLICIT = Launcher(
  "explicit", ("JAX_PROCESS_ID",), ("JAX_NUM_PROCESSES", "JAX_PROCESS_COUNT")
)
# MPI before Slurm: on the nodes of an allocation, mpirun's own daemons are Slurm tasks, and their
# numbers are inherited.
LAUNCHERS = (
  EXPLICIT,
  Launcher(
    "Open MPI",
    ("OMPI_COMM_WORLD_RANK",),
    ("OMPI_COMM_WORLD_SIZE",),
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
  ),
  Launcher(
    "MPI",
    ("PMI_RANK", "PMIX_RANK"),
    ("PMI_SIZE",),
    "MPI_LOCALRANKID",
    "MPI_LOCALNRANKS",
  ),
  Launcher(
    "Cray PALS",
    ("PALS_RANKID",),
    ("PALS_SIZE",),
    "PALS_LOCAL_RANKID",
    "PALS_LOCAL_SIZE",
  ),
  Launcher(
    "Slurm",
    ("SLURM_PROCID",),
    ("SLURM_NTASKS",),
    "SLURM_LOCALID",
    needs=("SLURM_STEP_NODELIST",),
  ),
  Launcher("torchrun", ("RANK",), ("WORLD_SIZE",), "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
  Launcher("NNODES", ("NODE_RANK",), ("NNODES",)),
  Launcher("SkyPilot", ("SKYPILOT_NODE_RANK",), ("SKYPILOT_NUM_NODES",)),
  Launcher("Kubernetes", (INDEX,), ("JAX_PROCESS_COUNT", "JAX_NUM_PROCESSES")),
)
COORDINATOR = (ADDRESS, "JAX_COORDINATOR_IP", "JAX_COORDINATOR_PORT")
OTHERS = (
  *(
    "MASTER_ADDR",
    "MASTER_PORT",
    "SKYPILOT_NODE_IPS",
    "SLURM_JOB_ID",
    "OMPI_MCA_orte_hnp_uri",
  ),
  *("TPU_WORKER_HOSTNAMES", "MEGASCALE_COORDINATOR_ADDRESS", "JOBSET_NAME"),
)
VARIABLES = tuple(
  dict.fromkeys(
    [*COORDINATOR, *(name for each in LAUNCHERS for name in each.variables), *OTHERS]
  )
)


@dataclasses.dataclass(frozen=True)
class Place:
  """This process: number `rank` of `count`, as `launcher` says.

  local: its number on its host, if others are there. address: host:port of the coordinator, which
  process 0 is; None if no variable says it.
  """

  launcher: str
  rank: int
  count: int
  local: int | None = None
  address: str | None = None


def place(environment: Mapping[str, str]) -> Place | None:
  """Where this process stands; None if no launcher numbers it.

  Raises: StartError for numbers that make no sense, or that say half.
  """
  found = next((each for each in LAUNCHERS if _complete(each, environment)), None)
  if found is None:
    _refuse_halves(environment)
    return None
  rank, count = _number(environment, found.rank), _number(environment, found.count)
  if not 0 <= rank < count:
    raise StartError(
      f"{_said(environment, (*found.rank, *found.count))}: number the processes 0 to "
      f"{max(count, 1) - 1}."
    )
  return Place(
    found.name, rank, count, _local(environment, found), address(environment, found)
  )


def address(
  environment: Mapping[str, str], launcher: Launcher | None = None
) -> str | None:
  """host:port of the coordinator as variables say, or None.

  launcher: the one that numbers the processes, whose own address counts if jax's is not set.
  Raises: StartError for a port that is none.
  """
  host = environment.get(ADDRESS) or environment.get("JAX_COORDINATOR_IP") or ""
  port = environment.get("JAX_COORDINATOR_PORT") or str(PORT)
  if not host and launcher and launcher.name == "torchrun":
    host = environment.get("MASTER_ADDR", "")
    port = environment.get("MASTER_PORT") or str(PORT)
    # There torchrun's own store listens at the port itself.
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and port.isdigit():
      port = str(int(port) + 1)
  if not host and launcher and launcher.name == "SkyPilot":
    host = environment.get("SKYPILOT_NODE_IPS", "").split("\n")[0].strip()
  if not host:
    return None
  name, colon, last = host.rpartition(":")
  if colon and not name.endswith(":") and (":" not in name or name.endswith("]")):
    host, port = name, last  # h:1 or [::1]:1, and not ::1
  elif ":" in host and not host.startswith("["):
    host = f"[{host}]"
  if not port.isdigit() or not 0 < int(port) < 65536:
    raise StartError(
      f"the coordinator's address {host}:{port}: need host:port of process 0, a port from 1 to "
      f"65535, e.g. {ADDRESS}=10.0.0.1:1234."
    )
  return f"{host}:{port}"


def announced(environment: Mapping[str, str]) -> str:
  """The variables that announce other processes, with their values; "" if none does."""
  several = []
  for each in LAUNCHERS:
    ranks = [name for name in each.rank if _whole(environment.get(name, "")) > 0]
    counts = [name for name in each.count if _whole(environment.get(name, "")) > 1]
    several += ranks + counts
  return ", ".join(f"{name}={environment[name]}" for name in dict.fromkeys(several))


def seen(environment: Mapping[str, str]) -> str:
  """The variables of launchers that are set, with their values, in words."""
  there = [name for name in VARIABLES if environment.get(name)]
  if not there:
    return "no variable of a launcher is set"
  return _said(environment, there)


def _said(environment: Mapping[str, str], names) -> str:
  there = [name for name in names if environment.get(name)]
  return ", ".join(f"{name}={environment[name][:60]!s}" for name in there).replace(
    "\n", " "
  )


def _complete(launcher: Launcher, environment: Mapping[str, str]) -> bool:
  """Does it say which of how many this process is?"""
  groups = (launcher.rank, launcher.count, *((name,) for name in launcher.needs))
  return all(any(environment.get(name) for name in names) for names in groups)


def _number(environment: Mapping[str, str], names: tuple[str, ...]) -> int:
  name = next(name for name in names if environment.get(name))
  try:
    return int(environment[name])
  except ValueError:
    raise StartError(f"{name}={environment[name]}: need a whole number.") from None


def _whole(text: str) -> int:
  """The number, or 0."""
  return int(text) if text.isdigit() else 0


def _local(environment: Mapping[str, str], launcher: Launcher) -> int | None:
  """The number among the processes of this host, if the launcher tells of several there."""
  if _whole(environment.get(launcher.local_count, "")) < 2:
    return None
  return _number(environment, (launcher.local_rank,))


def _refuse_halves(environment: Mapping[str, str]) -> None:
  """Raises StartError if jax's own variables say half of what they must."""
  number, counts = EXPLICIT.rank[0], EXPLICIT.count
  said = [name for name in (number, *counts) if environment.get(name)]
  if said:
    missing = number if number not in said else counts[0]
    raise StartError(
      f"{_said(environment, said)} set, but not {missing}: set {ADDRESS}, {counts[0]} and {number} "
      "on every process, or none of them."
    )
