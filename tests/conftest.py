"""Four CPU devices, a persistent compilation cache, rank promotion forbidden; set before jax
touches a device.

`execute` runs what `command` says as a user does, in its own process, which inherits all that.
`finished` is one whole run of the smoke config, cut into many small units; tests read it and must
not write there.

A process of pytest runs whole files, as their tests share fixtures; one runs all files that read
`finished`, and so makes it once.
"""

import os
import pathlib
import re
import subprocess
import sys
import tempfile

# Compiling takes most of the suite's time; without LLVM's optimisation it takes two thirds of that,
# and the small programs of tests run as fast.
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "")
  + " --xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR",
  str(pathlib.Path(tempfile.gettempdir()) / "downscaling-jax-cache"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import jax
import pytest

from downscaling.runtime import cpu_flags

cpu_flags.avoid_deadlock()
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64():
  """float64 inside one test."""
  with jax.enable_x64(True):
    yield


ROOT = pathlib.Path(__file__).parents[1]
# Small units, so that there is something left to do when a job is stopped after its first; and
# every loss logged.
SMALL = {
  "data.shard": 16,
  "sampling.unit": (2, 2),
  "plan.save_every": 4,
  "plan.log_every": 1,
}


def pytest_xdist_make_scheduler(config, log):
  """By file, but with all files that read `finished` as one.

  pytest-xdist 3.8 loses groups by mark on pytest 9.
  """
  from xdist.scheduler import LoadFileScheduling

  class Scheduling(LoadFileScheduling):
    def _split_scope(self, nodeid):
      file = super()._split_scope(nodeid)
      return (
        "finished" if re.search(r"\bfinished[,)]", (ROOT / file).read_text()) else file
      )

  return Scheduling(config, log)


@pytest.fixture(scope="session")
def command():
  """command(job, workdir, *flags, config, small, **overrides of the config) -> the argv of
  `downscaling`.
  """

  def command(job, workdir, *flags, config="ks.py:smoke", small=True, **overrides):
    keys = [
      f"--config.{k}={str(v).replace(' ', '')}"
      for k, v in ((SMALL if small else {}) | overrides).items()
    ]
    config = f"--config={ROOT / 'configs' / config}"
    return [
      sys.executable,
      "-m",
      "downscaling",
      job,
      config,
      f"--workdir={workdir}",
      *keys,
      *flags,
    ]

  return command


@pytest.fixture(scope="session")
def execute():
  """execute(argv) -> CompletedProcess with text; ten minutes at most, for a busy machine."""
  return lambda argv, **kwargs: subprocess.run(
    argv, capture_output=True, text=True, timeout=600, **kwargs
  )


@pytest.fixture(scope="session")
def finished(command, execute, tmp_path_factory):
  """(work folder, what the process said) of a whole pipeline."""
  workdir = tmp_path_factory.mktemp("finished") / "run"
  done = execute(command("pipeline", workdir))
  assert done.returncode == 0, done.stderr
  return workdir, done
