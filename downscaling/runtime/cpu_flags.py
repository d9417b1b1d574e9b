"""A flag of XLA without which FFTs on a CPU never end, by one version of jaxlib."""

import os
from importlib import metadata

BROKEN = ("0.11.2",)
FLAG = "--xla_cpu_multi_thread_eigen"


def avoid_deadlock() -> None:
  """Adds the flag to XLA_FLAGS, where the installed jaxlib needs it and XLA_FLAGS does not say it.

  XLA reads the variable when jax first touches a device; later this changes nothing.
  """
  # By jaxlib 0.11.2, and neither 0.11.1 nor 0.12.0, an FFT that runs on a thread of XLA's pool
  # waits for other threads of that pool. As many FFTs at once as it has threads wait for ever.
  # With the flag, an FFT, a convolution or a matrix product takes one thread a device.
  flags = os.environ.get("XLA_FLAGS", "")
  if metadata.version("jaxlib") in BROKEN and FLAG not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} {FLAG}=false".strip()
