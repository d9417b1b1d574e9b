"""The whole pipeline, ended sixty times at random moments: each run ends with the bytes of one that
was left alone.
"""

import random
import signal
import subprocess
import time

import pytest

from downscaling.jobs import verify
from downscaling.runtime import supervision
from tests.test_integrity import bytes_of

KILLS = 30
SIGNALS = [s for s in supervision.SIGNALS if s not in (signal.SIGINT,)]


def results(workdir):
  """Bytes of all products. Orbax writes paths and random names; the samples tell of the prior."""
  own = lambda path: "prior" in path.parts or path.name.startswith("events")
  found = bytes_of(workdir)
  return {k: v for k, v in found.items() if not own(k) and k.name != "speed.csv"}


@pytest.mark.slow
def test_sixty_ends_of_a_pipeline(command, execute, tmp_path):
  """30 × SIGKILL, 30 × one of the five signals of schedulers, each at a random moment.

  A run that gets through is compared, and the next one begins.
  """
  straight = tmp_path / "straight"
  began = time.monotonic()
  assert execute(command("pipeline", straight)).returncode == 0
  whole, seconds = results(straight), time.monotonic() - began
  dice = random.Random(0)
  ends = [signal.SIGKILL] * KILLS + [SIGNALS[i % len(SIGNALS)] for i in range(30)]
  dice.shuffle(ends)
  run, codes, finished = tmp_path / "0", [], 0
  while ends:
    argv = command("pipeline", run)
    life = subprocess.Popen(
      argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
      said = life.communicate(timeout=dice.uniform(1, seconds / 2))[1]
    except subprocess.TimeoutExpired:
      how = ends.pop()
      life.send_signal(how)
      said = life.communicate(timeout=120)[1]
      # 0: it was about to end; −how: before its handlers were there, when nothing is written yet.
      allowed = (
        {-signal.SIGKILL} if how == signal.SIGKILL else {supervision.STOPPED, -how}
      )
      assert life.returncode in allowed | {0}, said
      codes.append(life.returncode)
    else:
      assert life.returncode == 0, said
    if life.returncode == 0:
      assert results(run) == whole
      finished += 1
      run = tmp_path / str(finished)
  done = execute(command("pipeline", run))
  assert done.returncode == 0, done.stderr
  assert results(run) == whole
  assert verify.verify(run)[1]
  # Most signals found a job that could save and say so.
  assert codes.count(supervision.STOPPED) > 15
  assert codes.count(-signal.SIGKILL) > 25
