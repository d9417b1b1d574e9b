"""The staircase: a room imports only from rooms below it, and importing changes nothing."""

import ast
import pathlib
import subprocess
import sys

PACKAGE = pathlib.Path(__file__).parents[1] / "downscaling"
BELOW_ALL = (
  "fields",
  "runtime",
  "equations",
  "datasets",
  "debias",
  "diffusion",
  "sampling",
)
BELOW = {
  "runtime": set(),
  "fields": {"runtime"},
  "equations": {"fields", "runtime"},
  "datasets": {"fields", "runtime", "equations"},
  "debias": {"fields", "runtime"},
  "diffusion": {"fields", "runtime"},
  "sampling": {"fields", "runtime", "diffusion"},
  "baselines": {"fields", "runtime", "diffusion"},
  "metrics": {"fields", "runtime"},
  "report": {"fields", "runtime", "metrics"},
  # The top floor: what an experiment is, the objects that it makes, and the jobs that use them.
  "assembly": {*BELOW_ALL, "experiment"},
  "jobs": {*BELOW_ALL, "experiment", "assembly", "baselines", "metrics", "report"},
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
        if (
          parts[0] == "downscaling"
          and len(parts) > 1
          and parts[1] not in below | {room}
        ):
          wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
  assert not wrong
  assert {
    p.name for p in PACKAGE.iterdir() if p.is_dir() and (p / "__init__.py").exists()
  } == set(BELOW)


def test_the_rooms_know_no_config():
  """Rooms take arguments. Only the top floor sees an Experiment, and its keys are typed attributes:
  no key of a config is read by its name, as in config["train"]["batch"].
  """
  top = {"assembly", "jobs"}
  for path in PACKAGE.rglob("*.py"):
    room = path.relative_to(PACKAGE).parts[0]
    names = [*_imports(path)]
    assert not any("ml_collections" in name for name in names), path
    known = any(name.startswith("downscaling.experiment") for name in names)
    known |= "downscaling.experiment" in names
    if known:
      assert room in top or room in FACES, path
      read = [
        ast.unparse(node)
        for node in ast.walk(ast.parse(path.read_text()))
        if _by_name(node)
      ]
      assert not read, f"{path} reads keys by name: {read}"


FACES = ("__init__.py", "experiment.py", "checks.py", "main.py", "downscaler.py")
HOLDERS = ("experiment", "e", "block", "self.experiment", "work.experiment")


def _by_name(node) -> bool:
  """Is it experiment["..."], getattr(experiment, ...) or experiment.get("...")?"""
  if isinstance(node, ast.Subscript):
    by_number = isinstance(node.slice, ast.Constant) and isinstance(
      node.slice.value, int
    )
    return ast.unparse(node.value) in HOLDERS and not by_number
  if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
    return ast.unparse(node.args[0]).split(".")[0] in ("experiment", "e")
  if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
    return node.func.attr == "get" and ast.unparse(node.func.value) in HOLDERS
  return False


def test_configs_import_nothing_of_ours():
  for path in (PACKAGE.parent / "configs").glob("*.py"):
    assert not [n for n in _imports(path) if n.startswith("downscaling")]


def test_import_changes_no_flag_and_brings_nothing_slow():
  code = (
    "import jax, sys; before = dict(jax.config.values);"
    "import downscaling, downscaling.jobs; after = dict(jax.config.values);"
    "changed = [k for k in after if before.get(k) != after[k]]; assert not changed, changed;"
    # what few jobs need is imported where they do: every command, and every process of a job,
    # starts sooner
    "slow = {'tensorflow', 'torch', 'ott', 'exponax', 'xarray', 'pandas', 'matplotlib.pyplot'};"
    "slow &= set(sys.modules);"
    "assert not slow, slow"
  )
  subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)
