"""The observation noise behind a map, as config.sampling.observation_noise="auto" has it: fitted,
stored, said.

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

from downscaling import build, series, stages
from downscaling.context import Context, stretches
from downscaling.debias import maps
from downscaling.fields import statistics
from downscaling.metrics import distances
from downscaling.runtime import files, processes, progress, stage_folder
from downscaling.runtime import mesh as meshes
from downscaling.sampling import conditional_sampler, ensemble, observation_noise

FILE = "observation_noise.json"
LEAST = 64  # calibration conditions of a fit
FIRST_ID = 2**31  # of calibration conditions in keys: no condition of an ensemble has it


def fits(
  ctx: Context, folder: pathlib.Path, sampler: Callable, params: Any, stats: statistics.Statistics
) -> dict[str, observation_noise.Fit]:
  """{set: the noise that is fitted to its map}, of the sets behind a map; none unless the config
  says "auto".

  Process 0 fits what the folder does not hold yet, and the others read it. Every fit is said on one
  line.
  """
  c = ctx.config
  behind = {name: source for name, source in build.sources(c).items() if source in c.debias.maps}
  if stages.observation_noise(c) is not None or not behind:
    return {}
  if why := _without(c):
    if meshes.is_main():
      progress.say(f"sample: observation noise 0, as {why}")
    return {}

  def work() -> dict:
    path = folder / FILE
    known = files.read_json(path) if path.exists() else {}
    for name, source in behind.items():
      if name not in known:
        with ctx.stop.interruptible("fitting the observation noise"):
          found = _fit(ctx, source, sampler, params, len(stats.std))
        known[name] = _record(ctx, source, found, stats)
        files.write_json(path, known)
      _say(name, known[name])
    return known

  with contextlib.nullcontext() if meshes.is_main() else ctx.stop.waiting():
    known = processes.main_only("observation noise", work)
  return {name: observation_noise.Fit.of(known[name]) for name in behind}


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


def _without(c) -> str:
  """Why no noise can be fitted; "" if it can."""
  if c.sampling.guidance.name in ("paper", "scaled", "none"):
    return f"guidance {c.sampling.guidance.name!r} knows none"
  return ""


def _white(std: float, axes: int) -> np.ndarray:
  """R by mode and channel, one number for all: a white noise of `std` standard deviations of the
  data.
  """
  return np.full((1,) * (axes + 1), std**2, np.float32)


def _record(ctx: Context, source: str, fit: observation_noise.Fit, stats) -> dict:
  """What the file says of a fit, and what it was fitted on."""
  c = ctx.config
  about = {
    "std_in_data_units": [float(fit.std * s) for s in stats.std],
    "map": source,
    "rows": f"lflr calibration, {_count(c)} conditions of {c.sampling.unit[1]} members",
    "prior": stage_folder.config_hash(stages.identity(c, "train")),
  }
  return fit.record() | about


def _say(name: str, record: dict) -> None:
  fit, words = observation_noise.Fit.of(record), ""
  if fit.bounded:
    words = f"; more would bring χ² nearer to 1, and C′x away from y′ (correlation below {observation_noise.LEAST:g})"
  progress.say(
    f"sample: {name}: observation noise {fit.std:g} of the data's standard deviation, χ²/d′ "
    f"{fit.chi2:.2f} and corr(y′, C′x) {fit.corr:.4f} on calibration rows, where an exact y′ has "
    f"{fit.exact[0]:.2f}{words}"
  )


def _count(c) -> int:
  """Calibration conditions of a fit: whole units, LEAST of them in all if the split has as many."""
  conditions = c.sampling.unit[0]
  there = len(series.rows(c, "lflr", "calibration"))
  return max(1, min(-(-LEAST // conditions), there // conditions)) * conditions


def _conditions(ctx: Context, source: str) -> np.ndarray:
  """LFLR calibration rows behind the map, [K, *coarse, C], or series of them [K, L, *coarse, C]."""
  c = ctx.config
  rows = stretches(ctx, "lflr", "calibration", _count(c))
  made = maps.load(ctx.folder("debias") / source)
  y = np.asarray(made(rows.reshape(-1, *rows.shape[2:])), np.float32).reshape(rows.shape)
  return y[:, 0] if c.sampling.series.frames == 1 else y


def _fit(
  ctx: Context, source: str, sampler: Callable, params, channels: int
) -> observation_noise.Fit:
  """On one device of this process, by the program that draws the ensemble's units."""
  c, op = ctx.config, build.operator(ctx.config)
  devices = [*meshes.local(ctx.mesh).devices.flat]
  y, axes, frames = _conditions(ctx, source), len(op.coarse), c.sampling.series.frames
  of = conditional_sampler.Soft(params, _white(0.0, axes))
  sizes = {"members": c.sampling.members, "unit": tuple(c.sampling.unit), "frames": frames}
  layout = ensemble.layout_of(
    sampler, of, space=op.fine, coarse=y.shape[1:], channels=channels, conditions=len(y), **sizes
  )
  program, device = ensemble.compiled(sampler, c.seed, layout, of, devices)[0], devices[0]
  layout = layout._replace(members=layout.unit[1])  # one unit's members of each condition
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
    return float(kept.mean()), distances.corr_input(np.concatenate(given), np.concatenate(seen))

  return observation_noise.fit(measure)
