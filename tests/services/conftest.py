"""Services that tests install and start by themselves: MPI, Slurm. They listen on loopback only.

Where something cannot be installed, its tests are skipped and say why. Run by `.ci/run`:
launch/test.sh -m services
"""

import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="session")
def debian():
  """debian(package, program) -> the program's path; installs the package if it must."""

  def install(package, program):
    if not shutil.which(program):
      apt = ["apt-get", "install", "-y", "--no-install-recommends", package]
      try:
        done = subprocess.run(apt, capture_output=True, text=True, timeout=300, check=False)
      except OSError as error:
        pytest.skip(f"{package} is not here, and apt-get does not run: {error}")
      if done.returncode or not shutil.which(program):
        pytest.skip(f"{package} cannot be installed: {(done.stderr or done.stdout)[-200:]}")
    return shutil.which(program)

  return install


@pytest.fixture(scope="session")
def on_cpus():
  """What is set for the command where a launcher starts it: no virtual devices, no waiting."""
  return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "GPUFLAGS": "", "HWLOC_COMPONENTS": "-gl"}
