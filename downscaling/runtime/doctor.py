"""`downscaling doctor`: what a job would find here (processes, devices, folders), and what to mend
before starting.
"""

import os
import pathlib
import socket
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from downscaling.runtime import processes, provenance

PSUM_BYTES = 4_000_000  # a device
ROUNDS = 5
PATIENCE = 120.0  # seconds that one process waits for the others
LAG = 3.0  # seconds within which a shared file system shows what another host wrote


def report(
  found: processes.Found,
  mesh: jax.sharding.Mesh,
  workdir: pathlib.Path | None,
  facts: dict[str, str],
) -> tuple[str, bool]:
  """(what was found, several lines; is all well?), the same on every process; each must call it.

  Findings are lines that begin with FIX, never exceptions.

  Args:
    found: of processes.start. mesh: of all devices. workdir: to be looked at; None if no --workdir
      was given.
    facts: what must be equal on every process.
  """
  lines, problems = ["what a job would find here", f"start      {found.method}: {found.why}"], []
  try:
    for text, more in _checks(found, mesh, workdir, facts):
      lines.append(text)
      problems += more
    problems = [p for told in processes.gather("doctor/problems", problems, PATIENCE) for p in told]
  except (TimeoutError, ConnectionError) as error:
    problems.append(str(error))
  lines += [f"FIX: {p}" for p in dict.fromkeys(problems)] or ["all is well"]
  return "\n".join(line for line in lines if line), not problems


def _checks(found, mesh, workdir, facts):
  """Yields (lines, problems) of one check after the other, in the same order on every process."""
  yield _hosts()
  kinds = sorted({d.device_kind for d in mesh.devices.flat})
  yield f"devices    {mesh.size} × {', '.join(kinds)}, mesh {dict(mesh.shape)}", []
  yield (
    f"versions   {', '.join(f'{k} {v}' for k, v in provenance.versions().items())}; code "
    f"{provenance.commit()}",
    [],
  )
  try:
    yield _psum(mesh)
  except Exception as error:  # whatever a broken link or driver raises
    said = (str(error).splitlines() or [type(error).__name__])[0][:300]
    yield (
      "psum       failed",
      [
        f"process {jax.process_index()} cannot add over all devices ({said}): look at drivers and "
        "network between the hosts; try the devices of one host first."
      ],
    )
  if "put srun before" in found.why:
    yield "", ["this is a Slurm job, but not a step of it: put srun before the command."]
  yield _workdir(workdir) if workdir else ("workdir    not looked at: add --workdir", [])
  differ = processes.differences(processes.gather("doctor/facts", facts, PATIENCE))
  yield (
    "",
    [
      f"{words}: start every process with the same command, code and config."
      for words in differ.values()
    ],
  )


def _hosts() -> tuple[str, list[str]]:
  """Who is there: host, process id, devices, memory."""
  devices = jax.local_devices()
  mine = f"{devices[0].device_kind} ({devices[0].platform}), {_memory(devices[0])}"
  told = processes.gather(
    "doctor/hosts", [socket.gethostname(), os.getpid(), len(devices), mine], PATIENCE
  )
  lines = [f"processes  {len(told)} on {len({host for host, *_ in told})} host(s)"]
  lines += [
    f"  {i}: {host}, pid {pid}, {count} × {what}" for i, (host, pid, count, what) in enumerate(told)
  ]
  problems = []
  if len({count for _, _, count, _ in told}) > 1:
    problems.append(
      "processes hold different numbers of devices: give each the same (--gres, "
      "CUDA_VISIBLE_DEVICES)."
    )
  return "\n".join(lines), problems


def _memory(device: jax.Device) -> str:
  stats = device.memory_stats()
  if stats and "bytes_limit" in stats:
    return f"memory {stats['bytes_limit'] / 1e9:.0f} GB a device"
  return (
    f"memory {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f} GB of the host"
  )


def _psum(mesh: jax.sharding.Mesh) -> tuple[str, list[str]]:
  """Adds a vector over all devices, each with its own number in it; checks the sum on each and
  times it.
  """
  axes, width = mesh.axis_names, PSUM_BYTES // 4
  rows, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec(axes), PartitionSpec()))
  numbers = lambda: jnp.broadcast_to(
    jnp.arange(1.0, mesh.size + 1, dtype=jnp.float32)[:, None], (mesh.size, width)
  )
  x = jax.jit(numbers, out_shardings=rows)()
  add = jax.shard_map(
    lambda v: jax.lax.psum(v, axes),
    mesh=mesh,
    in_specs=rows.spec,
    out_specs=whole.spec,
    check_vma=False,
  )
  add = jax.jit(add, out_shardings=whole)
  total = mesh.size * (mesh.size + 1) / 2  # a whole number, exact in float32 up to 5792 devices
  wrong = [
    str(s.device) for s in add(x).addressable_shards if not (np.asarray(s.data) == total).all()
  ]
  times = []
  for _ in range(ROUNDS):
    began = time.perf_counter()
    add(x).block_until_ready()
    times.append(time.perf_counter() - began)
  median = float(np.median(times))
  text = f"psum       4 MB over all devices in {1e3 * median:.2f} ms, {PSUM_BYTES / median / 1e9:.2f} GB/s a device"
  where = f"process {jax.process_index()} ({socket.gethostname()}), {', '.join(wrong)}"
  broken = f"the sum over all devices is wrong on {where}: a device or a link is broken; leave its host out."
  return text, [broken] if wrong else []


def _workdir(workdir: pathlib.Path) -> tuple[str, list[str]]:
  """Process 0 writes a hidden file there, all read it; afterwards nothing is left."""
  me, made, failure = jax.process_index(), [], ""
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
  return _judge(workdir, failure, [reads for reads, _ in told], [refuses for _, refuses in told])


def _judge(
  workdir: pathlib.Path, failure: str, blind: list[str], refused: list[str]
) -> tuple[str, list[str]]:
  """From what process 0 could not write, and each could not read or write: its words, or ""."""
  which = lambda words: ", ".join(str(i) for i, said in enumerate(words) if said)
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
  """Makes the folder and those above it; returns the new ones, the deepest first."""
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
  """ "" if it is there and holds its name, otherwise why not."""
  deadline = time.monotonic() + LAG
  while True:
    try:
      return "" if token.read_text() == token.name else "it holds something else"
    except OSError as error:
      if time.monotonic() > deadline:
        return error.strerror or str(error)
    time.sleep(0.2)


def _refuses(folder: pathlib.Path) -> str:
  return "" if os.access(folder, os.W_OK | os.X_OK) else "read-only"
