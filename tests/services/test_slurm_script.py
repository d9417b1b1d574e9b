"""What launch/slurm.sbatch gives to srun, and does with its code; srun and scontrol are stand-ins.

A container image is started by pyxis, a plugin of Slurm that no package of Debian holds, so its
words are tested only. test_slurm.py has the rest, on a real Slurm.
"""

import os
import subprocess

import pytest

from tests.services.conftest import ROOT

pytestmark = pytest.mark.services
SRUN = """#!/usr/bin/env bash
printf '%s\\0' "$@" >"$TOLD/words"
[ "$RUN" = no ] && exit "$CODE"
while [ "$1" != sh ]; do shift; done
"$@"
"""
DOWNSCALING = """#!/usr/bin/env bash
printf '%s\\0' "$@" >"$TOLD/job"
exit "$CODE"
"""
SCONTROL = """#!/usr/bin/env bash
echo "$@" >"$TOLD/scontrol"
"""


@pytest.fixture
def sbatch(tmp_path):
  """sbatch(*words, **environment) -> (exit code, words of srun, of downscaling, of scontrol)."""
  programs = tmp_path / "bin"
  programs.mkdir()
  for name, text in (
    ("srun", SRUN),
    ("downscaling", DOWNSCALING),
    ("scontrol", SCONTROL),
  ):
    (programs / name).write_text(text)
    (programs / name).chmod(0o755)

  def run(*words, code=0, run="yes", **environment):
    told = {"TOLD": str(tmp_path), "CODE": str(code), "RUN": run}
    env = os.environ | told | environment
    env |= {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path)}
    env["PATH"] = f"{programs}:{env['PATH']}"
    script = ["bash", str(ROOT / "launch" / "slurm.sbatch"), *words]
    done = subprocess.run(script, env=env, capture_output=True, text=True, timeout=60)
    files = [tmp_path / name for name in ("words", "job", "scontrol")]
    said = [file.read_text() if file.exists() else "" for file in files]
    return done.returncode, said[0].split("\0")[:-1], said[1].split("\0")[:-1], said[2]

  return run


def test_a_container_and_more_flags(sbatch):
  job = (
    "train",
    "--config=ks:smoke",
    "--workdir=/shared/my runs",
    "--config.label=a b",
  )
  flags = "--container-mounts=/shared:/shared --container-writable"
  code, words, got, _ = sbatch(*job, CONTAINER="registry#my/image:cpu", SRUNFLAGS=flags)
  assert code == 0
  assert words[:5] == [
    "--kill-on-bad-exit=1",
    "--label",
    "--container-image=registry#my/image:cpu",
    *flags.split(),
  ]
  assert words[5:7] == ["sh", "-c"]
  assert words[8:] == ["downscaling", *job]
  assert got == [*job]
  _, words, got, _ = sbatch(*job, CONTAINER="", SRUNFLAGS="")
  assert words[:4] == ["--kill-on-bad-exit=1", "--label", "sh", "-c"]
  assert got == [*job]


@pytest.mark.parametrize("code", [0, 1, 75, 137, 143])
def test_only_a_hang_is_queued_again(sbatch, code):
  """Without a warning by Slurm."""
  ended, _, _, scontrol = sbatch("train", code=code)
  assert ended == code
  assert scontrol == ("requeue 7\n" if code == 75 else "")


def test_a_hang_beside_which_srun_killed_others(sbatch):
  """srun's code is the highest of all tasks."""
  ended, _, _, scontrol = sbatch("train", code=200, run="no")
  assert (ended, scontrol) == (75, "requeue 7\n")
