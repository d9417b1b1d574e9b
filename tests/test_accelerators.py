"""What jobs would run on a TPU or a GPU, compiled by its own compiler on a machine with none."""

import importlib.util
import os
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from downscaling import experiment
from downscaling.assembly import worlds
from downscaling.equations import rollouts
from downscaling.runtime import mesh as meshes
from downscaling.runtime import target_devices

INSTALLED = {
  "v5e:2x2": "TPU_LIBRARY_PATH" in os.environ
  or importlib.util.find_spec("libtpu") is not None,
  "h200:2x2": importlib.util.find_spec("jax_cuda12_plugin") is not None,
}


def needs(name):
  return pytest.mark.skipif(
    not INSTALLED[name], reason="needs the compiler: libtpu, or jax[cuda12]"
  )


EACH = pytest.mark.parametrize(
  "name",
  [pytest.param(name, marks=[pytest.mark.slow, needs(name)]) for name in INSTALLED],
)


def smoke(equation):
  return experiment.load(f"{equation}:smoke")


@pytest.mark.parametrize("devices", ["abc", "0", "v5e:x2", "h200:"])
def test_devices_that_are_none(command, execute, tmp_path, devices):
  done = execute(
    command("train", tmp_path / "none", "--dry_run", f"--devices={devices}")
  )
  assert (done.returncode, done.stderr.count("\n")) == (1, 1)
  assert (
    f"--devices={devices}: need a number of virtual CPU devices, as 256, a slice of Cloud TPU"
    in done.stderr
  )


@pytest.mark.parametrize(
  ("name", "package"),
  [("v5e:2x2", r"libtpu==[\d.]+\*"), ("h200:2x2", r"jax\[cuda12\]==[\d.]+")],
)
def test_without_the_compiler(name, package):
  if INSTALLED[name]:
    pytest.skip("its compiler is installed")
  with pytest.raises(
    ValueError,
    match=rf"--devices={name} is planned by .* not installed here.*pip install '{package}'",
  ):
    target_devices.devices(name)


def test_float64_beside_a_tpu_is_the_hosts_cpu():
  """Its FFT knows float32 alone; what asks for no more stays on it."""
  chip = types.SimpleNamespace(platform="tpu", process_index=0)
  pod = types.SimpleNamespace(devices=np.array([[chip]], object))
  assert meshes.platform(meshes.exact(pod)) == "cpu"
  assert worlds.simulating(smoke("ks"), "hfhr", pod).devices.flat[0].platform == "cpu"
  here = meshes.make(4)
  assert (
    meshes.exact(here)
    == worlds.simulating(smoke("ks"), "lflr", here)
    == meshes.local(here)
  )
  with meshes.float64():
    assert jnp.ones(1).dtype == np.float64


@EACH
@pytest.mark.parametrize("equation", ["ks", "kolmogorov"])
def test_every_program_of_a_pipeline_compiles(
  command, execute, tmp_path, name, equation
):
  """Sinkhorn by every path, training step, sampler: the dry run compiles what it describes."""
  for path in ("dense", "fused", "ring", "pallas"):
    job = "pipeline" if path == "dense" else "debias"
    flags = ("--dry_run", f"--devices={name}")
    done = execute(
      command(
        job,
        tmp_path / "none",
        *flags,
        config=f"{equation}.py:smoke",
        small=False,
        **{"debias.path": path},
      )
    )
    assert done.returncode == 0, done.stderr
    assert re.search(
      r"devices +4 × (TPU v5 lite|NVIDIA H200), [12] process", done.stdout + done.stderr
    )
    assert f"path {path}:" in done.stdout + done.stderr


@EACH
@pytest.mark.parametrize("equation", ["ks", "kolmogorov"])
@pytest.mark.parametrize("which", ["hfhr", "lflr"])
def test_solvers_compile(name, equation, which):
  """Where they compute: KS in float64, so on the host beside a TPU."""
  c = smoke(equation)
  mesh = worlds.simulating(c, which, meshes.make(devices=target_devices.devices(name)))
  with jax.enable_x64(True):
    program = rollouts._compiled(worlds.equation(c, which), 2, 2, 2, meshes.rows(mesh))
    program.lower(
      np.uint32(0), jax.ShapeDtypeStruct((8,), jnp.uint32, sharding=meshes.rows(mesh))
    ).compile()


@pytest.mark.slow
@needs("v5e:2x2")
def test_a_plan_too_large_for_the_chip(command, execute, tmp_path):
  """A quarter of 2¹⁷ × 2¹⁷ values, 17 GB of a v5e's 16, by the command."""
  sizes = {
    "debias.points": 2**17,
    "debias.path": "dense",
    "data.hfhr.train": 2**15,
    "data.lflr.train": 2**15,
  }
  done = execute(
    command("debias", tmp_path / "none", "--dry_run", "--devices=v5e:2x2", **sizes)
  )
  assert (done.returncode, done.stderr.count("\n")) == (1, 1)
  assert "exceeds available HBM" in done.stderr
  assert "A device needs less with a larger --config.memory.microbatches" in done.stderr


@pytest.mark.slow
@needs("v5e:2x2")
@pytest.mark.parametrize("name", ["v5e:3x5", "v99:2x2", "v4:2x2x2"])
def test_slices_that_there_are_not(name):
  with pytest.raises(
    ValueError, match=rf"--devices={name}: .*Name a slice of Cloud TPU by its chips"
  ):
    target_devices.devices(name)
