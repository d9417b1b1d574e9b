"""FFTs end on a CPU of two threads, by every jaxlib."""

import os
import subprocess
import sys
from importlib import metadata

import pytest

from downscaling.runtime import cpu_flags

# Four independent FFTs a program, large enough for XLA to split, on two threads.
PROGRAM = """
import jax
import jax.numpy as jnp
from downscaling.runtime import mesh as meshes

meshes.make()
there_and_back = lambda x: jnp.fft.irfft(2 * jnp.fft.rfft(x), n=24)
program = jax.jit(lambda *rows: [there_and_back(x) for x in rows])
rows = jax.random.normal(jax.random.key(0), (4, 4096, 24))
for _ in range(300):
  found = jax.block_until_ready(program(*rows))
print(all(bool(jnp.allclose(y, 2 * x, atol=1e-5)) for x, y in zip(rows, found)))
"""


def test_ffts_at_once_end():
  """Two seconds; by jaxlib 0.11.2 without the flag, never."""
  environment = os.environ | {"XLA_FLAGS": "", "NPROC": "2"}
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM],
    capture_output=True,
    text=True,
    env=environment,
    timeout=120,
  )
  assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize(
  ("version", "before", "after"),
  [
    ("0.11.2", "", "--xla_cpu_multi_thread_eigen=false"),
    ("0.11.2", "--xla_a=1", "--xla_a=1 --xla_cpu_multi_thread_eigen=false"),
    (
      "0.11.2",
      "--xla_cpu_multi_thread_eigen=true",
      "--xla_cpu_multi_thread_eigen=true",
    ),
    ("0.10.2", "--xla_a=1", "--xla_a=1"),
  ],
)
def test_only_a_jaxlib_that_needs_it_gets_the_flag(monkeypatch, version, before, after):
  monkeypatch.setattr(metadata, "version", lambda name: version)
  monkeypatch.setenv("XLA_FLAGS", before)
  cpu_flags.avoid_deadlock()
  cpu_flags.avoid_deadlock()  # once is enough
  assert os.environ["XLA_FLAGS"] == after
