"""Which code made a result: versions of the packages that decide it, and the git commit."""

import contextlib
import importlib.metadata
import pathlib
import platform
import subprocess

CHECKOUT = pathlib.Path(__file__).parents[2]


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
  """Git commit of the running code, '+' if the tree was changed; 'unknown' outside a checkout."""
  # An installed package may lie in the checkout of something else, whose commit says nothing.
  if not (CHECKOUT / ".git").exists():
    return "unknown"
  try:
    head = _git("rev-parse", "--short=12", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no")
  except (OSError, subprocess.SubprocessError):
    return "unknown"
  return head + ("+" if changes else "")


def _git(*words: str) -> str:
  command = ["git", "-C", str(CHECKOUT), *words]
  done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
  return done.stdout.strip()
