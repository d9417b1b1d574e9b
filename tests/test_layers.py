"""The staircase: a room imports only from rooms below it, and importing changes nothing."""

import ast
import pathlib
import subprocess
import sys

PACKAGE = pathlib.Path(__file__).parents[1] / "downscaling"
BELOW = {
  "fields": set(),
  "runtime": set(),
  "equations": {"fields", "runtime"},
  "datasets": {"fields", "runtime", "equations"},
  "debias": {"fields", "runtime"},
  "diffusion": {"fields", "runtime"},
  "sampling": {"fields", "runtime", "diffusion"},
  "baselines": {"fields", "runtime", "diffusion"},
  "metrics": {"fields", "runtime"},
  "report": {"fields", "runtime", "metrics"},
}


def _imports(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_room_imports_from_upstairs():
  wrong = []
  for room, below in BELOW.items():
    for path in (PACKAGE / room).rglob("*.py"):
      for name in _imports(path):
        parts = name.split(".")
        if parts[0] == "downscaling" and len(parts) > 1 and parts[1] not in below | {room}:
          wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
  assert not wrong
  assert {p.name for p in PACKAGE.iterdir() if p.is_dir() and (p / "__init__.py").exists()} == set(
    BELOW
  )


def test_only_build_reads_configs():
  readers = {
    p.name for p in PACKAGE.rglob("*.py") if any("ml_collections" in n for n in _imports(p))
  }
  assert readers <= {"build.py", "context.py", "main.py"}


def test_configs_import_nothing_of_ours():
  for path in (PACKAGE.parent / "configs").glob("*.py"):
    assert not [n for n in _imports(path) if n.startswith("downscaling")]


def test_import_changes_no_flag_and_brings_nothing_slow():
  code = (
    "import jax, sys; before = dict(jax.config.values);"
    "import downscaling.jobs; after = dict(jax.config.values);"
    "changed = [k for k in after if before.get(k) != after[k]]; assert not changed, changed;"
    # what few jobs need is imported where they do: every command, and every process of a job,
    # starts sooner
    "slow = {'tensorflow', 'torch', 'ott', 'exponax', 'xarray', 'pandas', 'matplotlib.pyplot'};"
    "slow &= set(sys.modules);"
    "assert not slow, slow"
  )
  subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)
