"""launch/Dockerfile, built by buildah from a Debian of our own, as root; then the doctor in it."""

import os
import pathlib
import shutil
import subprocess

import pytest

from tests.services.conftest import ROOT

pytestmark = [pytest.mark.services, pytest.mark.slow]
CERTIFICATES = pathlib.Path("/etc/ssl/certs/ca-certificates.crt")


def sh(*argv, seconds=1200):
  done = subprocess.run(
    [str(each) for each in argv], capture_output=True, text=True, timeout=seconds, check=False,
    env=os.environ | {"STORAGE_DRIVER": "vfs"}, cwd=ROOT,
  )  # fmt: skip
  assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
  return done.stdout + done.stderr


@pytest.fixture(scope="module")
def base(debian, tmp_path_factory):
  """The name of an image with Python 3.11, and with this machine's certificates."""
  if os.getuid():
    pytest.skip("debootstrap needs root")
  debian("buildah", "buildah")
  debian("debootstrap", "debootstrap")
  folder = tmp_path_factory.mktemp("base") / "root"
  packages = "--include=python3,python3-venv,ca-certificates"
  try:
    sh("debootstrap", "--variant=minbase", packages, "bookworm", folder)
  except AssertionError as error:
    pytest.skip(f"no Debian can be had here: {str(error)[-200:]}")
  if CERTIFICATES.exists():
    shutil.copy(CERTIFICATES, folder / "etc" / "ssl" / "certs")
    (folder / "etc" / "pip.conf").write_text(f"[global]\ncert = {CERTIFICATES}\n")
  container = sh("buildah", "from", "scratch").strip()
  sh("buildah", "copy", "-q", container, folder, "/")
  sh("buildah", "commit", "-q", container, "localhost/downscaling-base")
  sh("buildah", "rm", container)
  yield "localhost/downscaling-base"
  sh("buildah", "rmi", "localhost/downscaling-base")


def test_the_image_is_built_and_well(base):
  name = "localhost/downscaling:test"
  flags = ("--pull=never", "--isolation", "chroot", "--build-arg", f"BASE={base}")
  sh("buildah", "bud", *flags, "-f", "launch/Dockerfile", "-t", name, ".")
  container = sh("buildah", "from", "--pull-never", name).strip()
  run = ("buildah", "run", "--isolation", "chroot", container, "--")
  try:
    said = sh(*run, "downscaling", "doctor")
    assert "all is well" in said
    assert "code unknown" in said
    assert sh(*run, "id", "-u").strip() == "1000"
    assert "generate" in sh(*run, "downscaling", "generate", "--config=ks:smoke", "--dry_run",
                            "--workdir=/tmp/run")  # fmt: skip
    inside = sh(*run, "sh", "-c", "ls /opt/venv/bin")
    # Slim: nothing that only work on the code needs.
    for tool in ("pyright", "pytest", "ruff"):
      assert tool not in inside
  finally:
    sh("buildah", "rm", container)
    sh("buildah", "rmi", name)
