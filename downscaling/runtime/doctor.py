"""`downscaling doctor`: checks processes, devices and folders before a job starts."""

import os
import pathlib
import secrets
import socket
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from downscaling.runtime import idle_devices, joining, processes, provenance
from downscaling.runtime import mesh as meshes
from downscaling.runtime.remote_paths import RemotePath

PSUM_BYTES = 4_000_000  # bytes on each device
ROUNDS = 5
PATIENCE = 120.0  # seconds that one process waits for the others
LAG = 3.0  # seconds within which a shared file system shows what another host wrote


def report(
  found: joining.Found,
  mesh: jax.sharding.Mesh,
  workdir: pathlib.Path | None,
  facts: dict[str, str],
) -> tuple[str, bool]:
  """Runs every check. Each process must call it; each gets the same report.

  A problem is a line that begins with FIX, never an exception.

  Args:
    found: the result of joining.start.
    mesh: all devices.
    workdir: folder to check; None if no --workdir was given.
    facts: what must be equal on every process.
  Returns: (the report, several lines; True if there is no problem).
  """
  lines = ["what a job would find here", f"start      {found.method}: {found.why}"]
  problems = []
  try:
    for text, more in _checks(found, mesh, workdir, facts):
      lines.append(text)
      problems += more
    told = processes.gather("doctor/problems", problems, PATIENCE)
    problems = [problem for mine in told for problem in mine]
  except (TimeoutError, ConnectionError) as error:
    problems.append(str(error))
  lines += [f"FIX: {p}" for p in dict.fromkeys(problems)] or ["all is well"]
  return "\n".join(line for line in lines if line), not problems


def _checks(found, mesh, workdir, facts):
  """Yields (lines, problems) of each check, in the same order on every process."""
  yield _hosts()
  kinds = sorted({d.device_kind for d in mesh.devices.flat})
  yield f"devices    {mesh.size} × {', '.join(kinds)}, mesh {dict(mesh.shape)}", []
  versions = ", ".join(
    f"{name} {version}" for name, version in provenance.versions().items()
  )
  yield f"versions   {versions}; code {provenance.commit()}", []
  try:
    yield _psum(mesh)
  except Exception as error:  # whatever a broken link or driver raises
    lines = str(error).splitlines() or [type(error).__name__]
    problem = (
      f"process {jax.process_index()} cannot add over all devices ({lines[0][:300]}): look at "
      "drivers and network between the hosts; try the devices of one host first."
    )
    yield "psum       failed", [problem]
  yield (
    _workdir(workdir) if workdir else ("workdir    not looked at: add --workdir", [])
  )
  differ = processes.differences(processes.gather("doctor/facts", facts, PATIENCE))
  same = "start every process with the same command, code and config."
  yield "", [f"{words}: {same}" for words in differ.values()]


def _hosts() -> tuple[str, list[str]]:
  """Host, process id, devices and memory of every process."""
  devices = jax.local_devices()
  mine = f"{devices[0].device_kind} ({devices[0].platform}), {_memory(devices[0])}"
  facts = [socket.gethostname(), os.getpid(), len(devices), mine]
  told = processes.gather("doctor/hosts", facts, PATIENCE)
  hosts = {host for host, *_ in told}
  lines = [f"processes  {len(told)} on {len(hosts)} host(s)"]
  for i, (host, pid, count, what) in enumerate(told):
    lines.append(f"  {i}: {host}, pid {pid}, {count} × {what}")
  problems = idle_devices.problems()
  counts = {count for _, _, count, _ in told}
  if len(counts) > 1:
    problems.append(
      "processes hold different numbers of devices: give each the same (--gres, "
      "CUDA_VISIBLE_DEVICES)."
    )
  return "\n".join(lines), problems


def _memory(device: meshes.Device) -> str:
  stats = device.memory_stats()
  if stats and "bytes_limit" in stats:
    return f"memory {stats['bytes_limit'] / 1e9:.0f} GB a device"
  size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return f"memory {size / 1e9:.0f} GB of the host"


def _psum(mesh: jax.sharding.Mesh) -> tuple[str, list[str]]:
  """Adds a vector over all devices and times it; checks the sum on each device.

  Device i holds the number i + 1, so a sum in which a device is missing is wrong.
  """
  axes, width = mesh.axis_names, PSUM_BYTES // 4
  rows = NamedSharding(mesh, PartitionSpec(axes))
  whole = NamedSharding(mesh, PartitionSpec())

  def numbers():
    column = jnp.arange(1.0, mesh.size + 1, dtype=jnp.float32)[:, None]
    return jnp.broadcast_to(column, (mesh.size, width))

  def total_of(v):
    return jax.lax.psum(v, axes)

  x = jax.jit(numbers, out_shardings=rows)()
  add = jax.shard_map(
    total_of, mesh=mesh, in_specs=rows.spec, out_specs=whole.spec, check_vma=False
  )
  add = jax.jit(add, out_shardings=whole)
  # A whole number, exact in float32 up to 5792 devices.
  total = mesh.size * (mesh.size + 1) / 2
  wrong = []
  for shard in add(x).addressable_shards:
    if not (np.asarray(shard.data) == total).all():
      wrong.append(str(shard.device))
  times = []
  for _ in range(ROUNDS):
    began = time.perf_counter()
    add(x).block_until_ready()
    times.append(time.perf_counter() - began)
  median = float(np.median(times))
  text = (
    f"psum       4 MB over all devices in {1e3 * median:.2f} ms, "
    f"{PSUM_BYTES / median / 1e9:.2f} GB/s a device"
  )
  where = f"process {jax.process_index()} ({socket.gethostname()}), {', '.join(wrong)}"
  broken = (
    f"the sum over all devices is wrong on {where}: a device or a link is broken; leave its host "
    "out."
  )
  return text, [broken] if wrong else []


def _workdir(workdir: pathlib.Path) -> tuple[str, list[str]]:
  """Process 0 writes a hidden file into the folder, all read it, and it is removed again."""
  me = jax.process_index()
  made, failure = [], ""
  token = workdir / f".downscaling-doctor-{socket.gethostname()}-{os.getpid()}"
  try:
    if me == 0:
      try:
        made = _make(workdir)
        token.write_text(token.name)
      except OSError as error:
        failure = error.strerror or str(error)
    name, failure = processes.gather("doctor/token", [token.name, failure], PATIENCE)[0]
    told = ["", ""] if failure else [_reads(workdir / name), _refuses(workdir)]
    told = processes.gather("doctor/reads", told, PATIENCE)
  finally:
    if me == 0:
      _remove(token, made)
  blind = [reads for reads, _ in told]
  refused = [refuses for _, refuses in told]
  return _judge(workdir, failure, blind, refused)


def _judge(
  workdir: pathlib.Path, failure: str, blind: list[str], refused: list[str]
) -> tuple[str, list[str]]:
  """Turns what the processes reported into (line, problems).

  Args:
    failure: why process 0 could not write; "" if it could.
    blind, refused: why each process could not read, or not write; "" if it could.
  """

  def which(words: list[str]) -> str:
    return ", ".join(str(i) for i, said in enumerate(words) if said)

  if failure:
    text = f"{workdir} cannot be written"
    return f"workdir    {text}", [f"{text} ({failure}): use another --workdir."]
  if any(blind):
    why = next(filter(None, blind))
    return f"workdir    {workdir}: not shared", [
      f"process(es) {which(blind)} do not see what process 0 writes to its --workdir ({why}): use "
      "one folder on a file system that all share."
    ]
  if any(refused):
    return f"workdir    {workdir}: shared, but not written by all", [
      f"{workdir} cannot be written by process(es) {which(refused)}: mount it for writing there, "
      "or use another --workdir."
    ]
  return f"workdir    {workdir}: written by process 0 and seen by all", []


def _make(folder: pathlib.Path) -> list[pathlib.Path]:
  """Makes the folder and its parents; returns those that are new, deepest first."""
  if isinstance(folder, RemotePath):
    return []
  new = [f for f in (folder, *folder.parents) if not f.exists()]
  folder.mkdir(parents=True, exist_ok=True)
  return new


def _remove(token: pathlib.Path, made: list[pathlib.Path]) -> None:
  try:
    token.unlink(missing_ok=True)
    for folder in made:
      folder.rmdir()
  except OSError:
    pass  # someone else has begun to use the folder


def _reads(token: pathlib.Path) -> str:
  """Why the file cannot be read or holds something else; "" if it holds its name."""
  deadline = time.monotonic() + LAG
  while True:
    try:
      return "" if token.read_text() == token.name else "it holds something else"
    except OSError as error:
      if time.monotonic() > deadline:
        return error.strerror or str(error)
    time.sleep(0.2)


def _refuses(folder: pathlib.Path) -> str:
  """Why the folder cannot be written; "" if it can."""
  if isinstance(folder, RemotePath):
    probe = folder / f".downscaling-doctor-{secrets.token_hex(8)}"
    try:
      probe.write_text(probe.name)
      probe.unlink()
    except OSError as error:
      return str(error)
    return ""
  return "" if os.access(folder, os.W_OK | os.X_OK) else "read-only"
