"""The observation noise behind each map, as config.sampling.observation_noise="auto" has it.

It depends on the map, the prior and the sampler, so it lies with the samples:
FOLDER/observation_noise.json.
"""

import contextlib
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from downscaling.assembly import samples, time_series, worlds
from downscaling.debias import maps
from downscaling.experiment import Experiment
from downscaling.fields import statistics
from downscaling.jobs.rows import stretches
from downscaling.jobs.workdir import Workdir
from downscaling.metrics import distances
from downscaling.runtime import files, locks, processes, progress
from downscaling.runtime import mesh as meshes
from downscaling.sampling import conditional_sampler, ensemble, observation_noise

FILE = observation_noise.FILE
LEAST = 64  # calibration conditions of a fit
# Of calibration conditions in keys: no condition of an ensemble has it.
FIRST_ID = 2**31
WITHOUT_GAIN = ("paper", "scaled", "none")  # guidance that knows no observation noise


def fits(
  work: Workdir,
  folder: pathlib.Path,
  prior: str,
  sampler: Callable,
  params: Any,
  stats: statistics.Statistics,
) -> dict[str, observation_noise.Fit]:
  """{set: the noise that is fitted to its map}, of the sets behind a map.

  It is empty unless the config says "auto". Process 0 fits what the folder does not hold yet, and
  the others read it. Every fit is said on one line.

  prior: the hash of the prior's stage, which is written beside a fit.
  """
  e = work.experiment
  behind = fitted_sets(e)
  if not behind:
    return {}
  if e.sampling.guidance.name in WITHOUT_GAIN:
    if meshes.is_main():
      why = f"guidance {e.sampling.guidance.name!r} knows none"
      progress.say(f"sample: observation noise 0, as {why}")
    return {}

  def fit_missing() -> dict:
    path = folder / FILE
    # Other jobs that draw for the same sets wait for the fit.
    with locks.hold(folder / "noise.lock.json", str(path), wait=True):
      known = files.read_json(path) if path.exists() else {}
      for name, source in behind.items():
        if name not in known:
          with work.stop.interruptible("fitting the observation noise"):
            found = _fit(work, source, sampler, params, len(stats.std))
          known[name] = _record(work, source, prior, found, stats)
          files.write_json(path, known)
        _say(name, known[name])
    return known

  with contextlib.nullcontext() if meshes.is_main() else work.stop.waiting():
    known = processes.main_only("observation noise", fit_missing)
  return {name: observation_noise.Fit.of(known[name]) for name in behind}


def fitted_sets(experiment: Experiment) -> dict[str, str]:
  """{set: its map} whose observation noise is to be fitted; none unless the config says "auto"."""
  if samples.observation_noise(experiment) is not None:
    return {}
  sets, fitted = samples.sources(experiment).items(), experiment.debias.maps
  return {
    name: source for name, source in sets if source is not None and source in fitted
  }


def plan(experiment: Experiment) -> list[str]:
  """What the dry run says of the fits."""
  sets = fitted_sets(experiment)
  if not sets or experiment.sampling.guidance.name in WITHOUT_GAIN:
    return []
  tries = observation_noise.MOST
  return [
    f"observation noise of {', '.join(sets)}: fitted on {_count(experiment)} calibration "
    f"conditions of {experiment.sampling.unit[1]} members each, drawn at most {tries} times"
  ]


def weights(params, fit: observation_noise.Fit | None, axes: int):
  """The sampler's operand for `axes` of space: the parameters alone, or with the noise that was
  fitted.
  """
  if fit is None or fit.std == 0:
    return params
  return conditional_sampler.Soft(params, _white(fit.std, axes))


def attributes(fit: observation_noise.Fit | None, stats: statistics.Statistics) -> dict:
  """For the store: what y′ was taken to be off by."""
  if fit is None:
    return {}
  return {
    "observation_noise": [float(fit.std * s) for s in stats.std],
    "observation_noise_chi_squared": fit.chi2,
    "observation_noise_correlation": fit.corr,
  }


def _white(std: float, axes: int) -> np.ndarray:
  """R by mode and channel, one number for all: a white noise of `std` standard deviations of the
  data.
  """
  return np.full((1,) * (axes + 1), std**2, np.float32)


def _record(
  work: Workdir, source: str, prior: str, fit: observation_noise.Fit, stats
) -> dict:
  """What the file says of a fit, and what it was fitted on."""
  e = work.experiment
  about = {
    "std_in_data_units": [float(fit.std * s) for s in stats.std],
    "map": source,
    "rows": f"lflr calibration, {_count(e)} conditions of {e.sampling.unit[1]} members",
    "prior": prior,
  }
  return fit.record() | about


def _say(name: str, record: dict) -> None:
  fit, words = observation_noise.Fit.of(record), ""
  if fit.bounded:
    words = (
      "; more would bring χ² nearer to 1, and C′x away from y′ (correlation below "
      f"{observation_noise.LEAST:g})"
    )
  progress.say(
    f"sample: {name}: observation noise {fit.std:g} of the data's standard deviation, χ²/d′ "
    f"{fit.chi2:.2f} and corr(y′, C′x) {fit.corr:.4f} on calibration rows, where an exact y′ has "
    f"{fit.exact[0]:.2f}{words}"
  )


def _count(e: Experiment) -> int:
  """Calibration conditions of a fit: whole units, LEAST of them in all if the split has as many."""
  conditions = e.sampling.unit[0]
  there = len(time_series.rows(e, "lflr", "calibration"))
  return max(1, min(-(-LEAST // conditions), there // conditions)) * conditions


def _conditions(work: Workdir, source: str) -> np.ndarray:
  """LFLR calibration rows behind the map, [K, *coarse, C], or series of them [K, L, *coarse, C]."""
  e = work.experiment
  rows = stretches(work, "lflr", "calibration", _count(e))
  made = maps.load(work.folder("debias") / source)
  y = np.asarray(
    made(rows.reshape(-1, *rows.shape[2:])),
    np.float32,
  ).reshape(rows.shape)
  return y[:, 0] if e.sampling.series.frames == 1 else y


def _fit(
  work: Workdir, source: str, sampler: Callable, params, channels: int
) -> observation_noise.Fit:
  """On one device of this process, by the program that draws the ensemble's units."""
  e, op = work.experiment, worlds.operator(work.experiment)
  devices = [*meshes.local(work.mesh).devices.flat]
  y, axes, frames = _conditions(work, source), len(op.coarse), e.sampling.series.frames
  of = conditional_sampler.Soft(params, _white(0.0, axes))
  sizes = {"members": e.sampling.members, "unit": e.sampling.unit, "frames": frames}
  layout = ensemble.layout_of(
    sampler,
    of,
    space=op.fine,
    coarse=y.shape[1:],
    channels=channels,
    conditions=len(y),
    **sizes,
  )
  program, device = (
    ensemble.compiled(sampler, e.seed, layout, of, devices)[0],
    devices[0],
  )
  # One unit's members of each condition.
  layout = layout._replace(members=layout.unit[1])
  ids = FIRST_ID + np.arange(len(y))
  blocks = [ensemble.block(layout, unit, ids, y) for unit in layout.units()]
  there = jax.device_put(params, device)

  def measure(std: float) -> tuple[float, float]:
    soft = conditional_sampler.Soft(there, jax.device_put(_white(std, axes), device))
    scores, given, seen = [], [], []
    for block in blocks:
      drawn = program(*jax.device_put(block, device), soft)
      fields = np.asarray(drawn["sample"])
      good = np.isfinite(fields).all(axis=tuple(range(1, fields.ndim)))
      scores.append(np.asarray(drawn["misfit"])[good])
      given.append(block[2][good])
      seen.append(np.asarray(op.apply(fields[good])))
    kept = np.concatenate(scores)
    if not len(kept):
      return math.nan, math.nan
    return float(kept.mean()), distances.corr_input(
      np.concatenate(given), np.concatenate(seen)
    )

  return observation_noise.fit(measure)
