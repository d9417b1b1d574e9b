"""Installed from a wheel, away from the checkout: the package brings all that it needs.

The wheel is built from a copy of the tree, without the network, and installed into a fresh
environment, which sees the other packages of this one but not the checkout.
"""

import email
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

import downscaling

ROOT = pathlib.Path(__file__).parents[1]
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
OFFLINE = ["--no-deps", "--no-index"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """The path of a wheel of this tree."""
  tree, folder = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
  for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, tree)
  for name in ("downscaling", "configs"):
    shutil.copytree(
      ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__")
    )
  build = [
    *PIP,
    "wheel",
    *OFFLINE,
    "--no-build-isolation",
    f"--wheel-dir={folder}",
    str(tree),
  ]
  subprocess.run(build, check=True, timeout=300)
  (path,) = folder.glob("*.whl")
  return path


@pytest.fixture(scope="module")
def away(wheel, tmp_path_factory):
  """away(*arguments of `downscaling`) -> CompletedProcess, in a folder without the checkout."""
  folder = tmp_path_factory.mktemp("away")
  venv = folder / "venv"
  subprocess.run(
    [sys.executable, "-m", "venv", "--without-pip", venv], check=True, timeout=120
  )
  python = venv / "bin" / "python"
  # A path that a .pth file adds has its own .pth files ignored: the editable install is not seen.
  purelib = venv / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
  (purelib / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
  install = [
    *PIP,
    f"--python={python}",
    "install",
    *OFFLINE,
    "--ignore-installed",
    str(wheel),
  ]
  subprocess.run(install, check=True, timeout=120)
  environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

  def away(*arguments):
    return subprocess.run(
      [venv / "bin" / "downscaling", *map(str, arguments)],
      cwd=folder,
      env=environment,
      capture_output=True,
      text=True,
      timeout=600,
    )

  return away


def test_a_wheel_holds_what_users_need(wheel):
  with zipfile.ZipFile(wheel) as archive:
    names = set(archive.namelist())
    (metadata,) = (n for n in names if n.endswith(".dist-info/METADATA"))
    said = email.message_from_bytes(archive.read(metadata))
  modules = (
    p.relative_to(ROOT).as_posix() for p in (ROOT / "downscaling").rglob("*.py")
  )
  configs = (f"downscaling/configs/{p.name}" for p in (ROOT / "configs").glob("*.py"))
  assert {*modules, *configs, "downscaling/py.typed"} <= names
  assert any(n.endswith("/licenses/LICENSE") for n in names)
  # Nothing at the top level but the package: a folder `configs` of ours might be another's.
  assert {n.split("/")[0] for n in names} == {"downscaling", metadata.split("/")[0]}
  assert said["Version"] == downscaling.__version__
  assert said["License-Expression"] == "Apache-2.0"
  assert said["Description-Content-Type"] == "text/markdown"
  assert said.get_payload().strip().startswith("# downscaling")
  assert {"cuda12", "cuda13", "tpu", "dev", "test"} <= {*said.get_all("Provides-Extra")}


def test_away_from_the_checkout_a_config_is_found_by_name(away):
  """The plan of the smoke run, from the copy of the config that the wheel brought."""
  done = away("pipeline", "--config=ks:smoke", "--workdir=run", "--dry_run")
  assert done.returncode == 0, done.stderr
  assert "16 conditions" in done.stdout + done.stderr
  done = away("pipeline", "--config=ks:no-such-variant", "--workdir=run")
  assert done.returncode == 1
  assert "smoke" in done.stderr


@pytest.mark.slow  # 2 minutes
def test_away_from_the_checkout_everything_runs(away):
  done = away("pipeline", "--config=ks:smoke", "--workdir=run")
  assert done.returncode == 0, done.stderr
  assert "run/report" in done.stdout + done.stderr
  done = away("doctor", "--workdir=run")
  assert done.returncode == 0, done.stderr
