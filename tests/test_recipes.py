"""The recipes of docs/how-to, followed literally on a copy of the package."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
BLOCK = re.compile(r'```python title="([^"]+)"\n(.*?)```', re.DOTALL)


def blocks(page):
  """[(file, code)] of a page, in order."""
  return BLOCK.findall((ROOT / "docs" / "how-to" / page).read_text())


@pytest.fixture
def checkout(tmp_path):
  """A copy of the package and its configs."""
  root = tmp_path / "checkout"
  for folder in ("downscaling", "configs"):
    shutil.copytree(
      ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__")
    )
  return root


def change(file, before, after):
  """Replaces text that is there exactly once."""
  text = file.read_text()
  assert text.count(before) == 1, f"{file} has {before!r} {text.count(before)} times"
  file.write_text(text.replace(before, after))


def run(checkout, *argv):
  """A Python program that imports the copy; its stderr."""
  environment = os.environ | {"PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, *map(str, argv)]
  done = subprocess.run(
    command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=600
  )
  assert done.returncode == 0, done.stderr
  return done.stderr


def job(checkout, name, config, *flags):
  return run(
    checkout, "-m", "downscaling", name, f"--config={config}", "--workdir=run", *flags
  )


def test_an_equation(checkout):
  """New files are written as the page has them; two jobs run, the rest is planned."""
  for file, code in blocks("add-an-equation.md"):
    path = checkout / file
    if not path.exists():
      path.write_text(code)
      continue
    change(path, 'EQUATIONS = {"ks": ks, "kolmogorov": kolmogorov}\n', code)
    change(path, "import kolmogorov, ks\n", "import kolmogorov, ks, viscous_burgers\n")
  config = "configs/viscous_burgers.py"
  job(checkout, "generate", config)
  said = job(checkout, "debias", config)
  assert "wrote" in said
  job(checkout, "pipeline", config, "--dry_run")
  assert (checkout / "run/data/viscous_burgers/hfhr-64").is_dir()


def test_a_solver(checkout):
  (first, function), (second, branch), (third, choices) = blocks("add-a-solver.md")
  solvers = checkout / first
  solvers.write_text(solvers.read_text() + "\n\n" + function)
  anchor = '  if block.name == "dpm_solver_pp_2m":\n'
  change(checkout / second, anchor, branch + anchor)
  old = re.search(r"^SOLVERS = .*\n", (checkout / third).read_text(), re.MULTILINE)[0]
  change(checkout / third, old, choices)
  flags = (
    "--config.sampling.solver.name=euler",
    "--config.sampling.resample.strength=0",
  )
  said = job(checkout, "sample", "ks:smoke", "--dry_run", *flags)
  assert "4 steps of euler" in said


def test_a_map(checkout, finished):
  (first, module), (second, names), (third, known) = blocks("add-a-map.md")
  (checkout / first).write_text(module)
  maps = checkout / second
  maps.write_text(maps.read_text() + "\n\n" + names)
  change(
    maps,
    "import bias_symmetry, map_files, quantile_map\n",
    "import bias_symmetry, map_files, mean_map, quantile_map\n",
  )
  old = re.search(
    r"(?<=^MAPS = \(\n)  .*\n", (checkout / third).read_text(), re.MULTILINE
  )
  change(checkout / third, old[0], known)
  only = ("--config.debias.maps=mean", "--config.debias.map=mean")
  data = f"--config.data.dir={finished[0] / 'data'}"
  job(checkout, "debias", "ks:smoke", *only, data, "--config.data.shard=16")
  assert (checkout / "run/debias/mean/map.json").exists()


def test_a_source(checkout):
  for file, code in blocks("add-a-source.md"):
    (checkout / file).write_text(code)
  run(checkout, "example.py")
  flags = ("--config=ks:smoke", "--workdir=runs/mine")
  run(checkout, "-m", "downscaling", "generate", *flags)
  with np.load(checkout / "runs/mine/data/statistics.npz") as stored:
    # Standard normal fields and not KS, whose deviation is 1.1 to 1.3: 10⁵ values, so 0.003.
    np.testing.assert_allclose(stored["std"], 1, atol=0.02)
