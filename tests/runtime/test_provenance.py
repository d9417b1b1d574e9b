"""Which code made a result."""

import subprocess

import pytest

from downscaling.runtime import provenance


@pytest.fixture
def checkout(tmp_path):
  """A checkout with one commit: (its folder, that commit)."""
  git = [
    "git",
    "-C",
    tmp_path,
    "-c",
    "user.name=test",
    "-c",
    "user.email=test@example.org",
  ]
  for arguments in (["init"], ["commit", "--allow-empty", "--message=first"]):
    subprocess.run([*git, *arguments], check=True, capture_output=True)
  head = [*git, "rev-parse", "--short=12", "HEAD"]
  return tmp_path, subprocess.run(
    head, check=True, capture_output=True, text=True
  ).stdout.strip()


@pytest.mark.parametrize("installed", [False, True])
def test_only_a_package_at_the_root_of_a_checkout_has_its_commit(
  checkout, monkeypatch, installed
):
  """An installed one may lie in an environment inside the checkout of another project."""
  root, head = checkout
  parent = root / "venv" / "site-packages" if installed else root
  file = parent / "downscaling" / "runtime" / "provenance.py"
  file.parent.mkdir(parents=True)
  monkeypatch.setattr(provenance, "CHECKOUT", file.parents[2])
  assert provenance.commit() == ("unknown" if installed else head)
