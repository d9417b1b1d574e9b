"""Which code made a result: versions of the packages that decide it, and the git commit."""

import contextlib
import importlib.metadata
import pathlib
import platform
import subprocess


def versions() -> dict[str, str]:
  """Versions of what decides a result."""
  names = (
    "downscaling",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "ott-jax",
    "orbax-checkpoint",
    "tensorflow-datasets",
    "numpy",
  )
  found = {"python": platform.python_version()}
  for name in names:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[name] = importlib.metadata.version(name)
  return found


def commit() -> str:
  """Git commit of the code that runs, with '+' if the tree was changed; 'unknown' outside a
  checkout.
  """
  root = pathlib.Path(__file__).parents[2]
  # An installed package may lie in the checkout of something else, whose commit says nothing.
  if not (root / ".git").exists():
    return "unknown"
  try:
    head, dirty = (
      subprocess.run(
        ["git", "-C", root, *cmd], capture_output=True, text=True, check=True, timeout=10
      ).stdout.strip()
      for cmd in (
        ("rev-parse", "--short=12", "HEAD"),
        ("status", "--porcelain", "--untracked-files=no"),
      )
    )
  except (OSError, subprocess.SubprocessError):
    return "unknown"
  return head + ("+" if dirty else "")
