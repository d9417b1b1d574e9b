"""One process of an ensemble drawn by several, cheap enough to be killed often: see
test_several_processes.

  python tests/sampling/worker.py STORE CONDITIONS MEMBERS SECONDS
SECONDS: of rest before a unit.
Ends as the program does: 0, 143 when told to stop, 1 with one line after an error.
"""

import pathlib
import sys
import time

import jax
import numpy as np

from downscaling.diffusion import schedules
from downscaling.fields.operators import Strided
from downscaling.runtime import joining, processes, progress, supervision
from downscaling.sampling import ensemble, gaussian_gain, guidance, solvers

OP = Strided.on((24,), 4)


def sampler(keys, y):
  """Draws of a Gaussian posterior by the real guidance and solver; the sum of squares of each."""
  s = 1 / (1 + (np.abs(np.fft.fftfreq(24, 1 / 24)) / 3) ** 4)[:, None]
  g = gaussian_gain.Gain(OP, gaussian_gain.prior_variance(s))
  denoise = lambda x, sigma: x * (1 / (1 + sigma[:, None, None] ** 2))
  levels = schedules.levels("edm", 4, 3.0, 0.01)
  guided = guidance.make("wiener", denoise, OP, y, gain=g)
  x = solvers.dpm_solver_pp_2m_sde(
    guided.denoise, gaussian_gain.gaussian_start(keys, g, y, 3.0), levels, keys
  )
  return x, (x**2).sum((1, 2))


def draw(path, conditions, members, stop, devices=None, any_device=False):
  fields = np.random.default_rng(0).normal(size=(conditions, 6, 1)).astype(np.float32)
  return ensemble.write_ensemble(
    pathlib.Path(path), conditions=fields, members=members, sampler=sampler, space=(24,),
    unit=(4, 2),
    devices=devices or jax.local_devices(), seed=1, identity={}, attrs={"title": "test"}, stop=stop,
    any_device=any_device,
  )  # fmt: skip


def main(path, conditions, members, seconds):
  with supervision.Stop() as stop:
    joining.start("auto")
    stop.connect(processes.client(), jax.process_index(), jax.process_count())

    def told():
      time.sleep(float(seconds))
      return stop.told()

    try:
      summary = draw(path, int(conditions), int(members), told)
      progress.say(f"drawn {summary['drawn']} of {summary['units']}")
    except supervision.Interrupted as interrupted:
      progress.say(f"{interrupted}; run the same command to go on.")
      if jax.process_count() > 1:
        jax.distributed.shutdown()
      sys.exit(supervision.STOPPED)
    except (ValueError, OSError) as error:
      stop.failed(str(error))
      print(f"worker: {error}", file=sys.stderr)
      sys.exit(1)


if __name__ == "__main__":
  main(*sys.argv[1:])
