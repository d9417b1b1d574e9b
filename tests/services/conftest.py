"""Services that tests install and start by themselves: MPI, Slurm, an API of Kubernetes.

They listen on loopback only.
Where something cannot be installed, its tests are skipped and say why. Run by `.ci/run`:
launch/test.sh -m services
"""

import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="session")
def debian():
  """debian(package, program) -> the program's path; installs the package if it must."""

  def install(package, program):
    if not shutil.which(program):
      apt = ["apt-get", "install", "-y", "--no-install-recommends", package]
      try:
        done = subprocess.run(
          apt, capture_output=True, text=True, timeout=300, check=False
        )
      except OSError as error:
        pytest.skip(f"{package} is not here, and apt-get does not run: {error}")
      if done.returncode or not shutil.which(program):
        pytest.skip(
          f"{package} cannot be installed: {(done.stderr or done.stdout)[-200:]}"
        )
    return shutil.which(program)

  return install


@pytest.fixture(scope="session")
def on_cpus():
  """What is set for the command where a launcher starts it: no virtual devices, no waiting."""
  return {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "",
    "GPUFLAGS": "",
    "HWLOC_COMPONENTS": "-gl",
  }


@pytest.fixture(scope="session")
def tools(tmp_path_factory):
  """tools(*packages) -> the folder of their programs, in a virtual environment of their own."""

  def install(*packages):
    folder = tmp_path_factory.mktemp("tools")
    python = folder / "bin" / "python"
    # uv, as pip looks for minutes for versions that fit each other.
    steps = (
      [sys.executable, "-m", "venv", folder],
      [python, "-m", "pip", "install", "-q", "uv"],
      [
        folder / "bin" / "uv",
        "pip",
        "install",
        "-q",
        "--system-certs",
        "--python",
        python,
        *packages,
      ],
    )
    for argv in steps:
      argv = [str(each) for each in argv]
      done = subprocess.run(
        argv, capture_output=True, text=True, timeout=600, check=False
      )
      if done.returncode:
        pytest.skip(f"{', '.join(packages)} cannot be installed: {done.stderr[-300:]}")
    return folder / "bin"

  return install


@pytest.fixture(scope="session")
def parsers(tools):
  """Programs that read what launch files for Kubernetes and SkyPilot say."""
  return tools(
    "pyyaml", "jsonschema", "kubernetes-validate", "xpk==1.16.0", "skypilot==0.14.1"
  )
