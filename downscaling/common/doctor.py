"""`downscaling doctor`: what a job would find here (processes, devices, folders), and what to mend before starting."""

import os
import pathlib
import socket
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from downscaling.common import mesh as meshes
from downscaling.common import processes, runs

PSUM_BYTES = 4_000_000  # a device
ROUNDS = 5


def report(
  found: processes.Found, mesh: jax.sharding.Mesh, workdir: pathlib.Path | None, facts: dict[str, str]
) -> tuple[str, bool]:
  """(what was found, several lines; is all well?). Findings are lines that begin with FIX, never exceptions.

  Args:
    found: of processes.start. mesh: of all devices. workdir: to be looked at; None if no --workdir was given.
    facts: what must be equal on every process.
  """
  hosts = processes.gather("doctor/hosts", [socket.gethostname(), os.getpid(), len(jax.local_devices())])
  kinds = sorted({d.device_kind for d in mesh.devices.flat})
  lines = [
    "what a job would find here",
    f"start      {found.method}: {found.why}",
    f"processes  {jax.process_count()} on {len({h for h, _, _ in hosts})} host(s)",
    *(f"  {i}: {host}, pid {pid}, {count} device(s)" for i, (host, pid, count) in enumerate(hosts)),
    f"devices    {mesh.size} × {', '.join(kinds)}, mesh {dict(mesh.shape)}, memory {_memory()}",
    f"versions   {', '.join(f'{k} {v}' for k, v in runs.versions().items())}; code {runs.commit()}",
  ]
  text, problems = _psum(mesh)
  lines.append(text)
  if len({count for _, _, count in hosts}) > 1:
    problems.append("processes hold different numbers of devices: give each the same (--gres, CUDA_VISIBLE_DEVICES).")
  if found.method == "alone" and "put srun before" in found.why:
    problems.append("this is a Slurm job, but not a step of it: put srun before the command.")
  if workdir is None:
    lines.append("workdir    not looked at: add --workdir")
  else:
    text, more = _workdir(workdir)
    lines.append(text)
    problems += more
  problems += _differences(facts)
  lines += [f"FIX: {p}" for p in problems] or ["all is well"]
  return "\n".join(lines), not problems


def _memory() -> str:
  stats = jax.local_devices()[0].memory_stats()
  if stats and "bytes_limit" in stats:
    return f"{stats['bytes_limit'] / 1e9:.0f} GB a device"
  return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f} GB of the host"


def _psum(mesh: jax.sharding.Mesh) -> tuple[str, list[str]]:
  """Adds a vector over all devices, checks the sum and times it."""
  width = PSUM_BYTES // 4
  x = jax.jit(lambda: jnp.ones((mesh.size, width)), out_shardings=meshes.rows(mesh))()
  add = jax.shard_map(
    lambda v: jax.lax.psum(v, meshes.AXES), mesh=mesh, in_specs=meshes.ROWS, out_specs=PartitionSpec(), check_vma=False
  )
  add = jax.jit(add, out_shardings=meshes.replicated(mesh))
  right = bool((np.asarray(add(x)) == mesh.size).all())
  times = []
  for _ in range(ROUNDS):
    began = time.perf_counter()
    add(x).block_until_ready()
    times.append(time.perf_counter() - began)
  median = float(np.median(times))
  text = f"psum       4 MB over all devices in {1e3 * median:.2f} ms, {PSUM_BYTES / median / 1e9:.2f} GB/s a device"
  return text, [] if right else ["the sum over all devices is wrong: a device or a link is broken; leave its host out."]


def _workdir(workdir: pathlib.Path) -> tuple[str, list[str]]:
  """Process 0 writes a token there, all look for it."""
  token, failure = workdir / f".downscaling-doctor-{os.getpid()}", ""
  made = not workdir.exists()
  if jax.process_index() == 0:
    try:
      workdir.mkdir(parents=True, exist_ok=True)
      token.write_text("seen")
    except OSError as error:
      failure = error.strerror or str(error)
  name, failure = processes.gather("doctor/token", [str(token), failure])[0]
  sees = processes.gather("doctor/sees", not failure and (workdir / pathlib.Path(name).name).exists())
  if jax.process_index() == 0 and not failure:
    token.unlink()
    if made:
      workdir.rmdir()
  if failure:
    text = f"{workdir} cannot be written"
    return f"workdir    {text}", [f"{text} ({failure}): use another --workdir."]
  if blind := [i for i, seen in enumerate(sees) if not seen]:
    return f"workdir    {workdir}: not shared", [
      f"process(es) {', '.join(map(str, blind))} do not see what process 0 writes to its --workdir: use one folder on "
      "a file system that all share."
    ]
  return f"workdir    {workdir}: written by process 0 and seen by all", []


def _differences(facts: dict[str, str]) -> list[str]:
  values = processes.gather("doctor/facts", facts)
  return [
    f"{key} is {values[0][key]} on process 0 and {other.get(key)} on process {i}: start every process with the same "
    "command, code and config."
    for i, other in enumerate(values)
    for key in values[0]
    if other.get(key) != values[0][key]
  ]
