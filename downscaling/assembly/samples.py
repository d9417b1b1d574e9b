"""The sampler of an experiment, and which sets of samples it draws."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np

from downscaling.assembly import prior, time_series, worlds
from downscaling.diffusion import denoiser, error_table, schedules
from downscaling.experiment import Experiment
from downscaling.fields import statistics
from downscaling.sampling import conditional_sampler, gaussian_gain, solvers, stitching
from downscaling.sampling.resampling import Resampling

# Conditions that no map has made: coarse fields as simulated, and those of held-out fine fields.
RAW, TRUE = "lflr", "true"


def default_set(experiment: Experiment) -> str:
  """The set of samples that is drawn behind the default map."""
  return f"{experiment.debias.map}+diffusion"


def sources(experiment: Experiment) -> dict[str, str | None]:
  """{set of samples: a map's name, RAW, TRUE, or None without conditions}, as sampling.sets asks.

  A set is named after the map that it is drawn behind. "default+diffusion" means debias.map.
  Raises: ValueError for a set that is not known.
  """
  default = default_set(experiment)
  known: dict[str, str | None] = {default: experiment.debias.map}
  known |= {f"{name}+diffusion": name for name in experiment.debias.maps}
  known |= {"raw+diffusion": RAW, "true+diffusion": TRUE, "unconditional": None}
  asked = [default if s == "default+diffusion" else s for s in experiment.sampling.sets]
  for name in asked:
    if name not in known:
      raise ValueError(
        f"config.sampling.sets={name!r} is unknown; use one of {sorted(known)}."
      )
  return {name: source for name, source in known.items() if name in asked}


def observation_noise(experiment: Experiment) -> float | None:
  """The standard deviation of y′ in data units; None for "auto", which fits it to each map."""
  given = experiment.sampling.observation_noise
  return None if isinstance(given, str) else given


def needs_table(experiment: Experiment) -> bool:
  """Do conditional draws use the prior's measured error (diffusion/error_table.py)?"""
  block = experiment.sampling.guidance
  return block.name == "measured" or (
    block.name != "wiener" and block.variance == "measured"
  )


def sampler(
  experiment: Experiment,
  stats: statistics.Statistics,
  network: denoiser.Denoiser,
  table: error_table.ErrorTable | None = None,
  alpha: jax.Array | None = None,
) -> Callable:
  """(keys [B], coarse fields [B, *coarse, C] or None, parameters) -> (fields, misfit [B]).

  Fields are [B, *space, C]; see sampling/conditional_sampler.py. With series of L > 1 frames, an
  axis of them follows B.

  Args:
    stats: of single frames.
    table: error_table.load of the prior, where `needs_table` says so.
    alpha: in place of sampling.guidance.alpha. It may be traced, so that one program serves a
      sweep.
  """
  draw = _folded(experiment, stats, network, table, alpha)
  length = time_series.plan(experiment).series
  return draw if length == 1 else stitching.over_time(draw, length)


def watching_sampler(
  experiment: Experiment, stats: statistics.Statistics, network: denoiser.Denoiser
) -> Callable:
  """The sampler of one window, frames folded into channels, with the steps of `watch`."""
  window = experiment.changed(
    **{
      "sampling.unconditional.steps": experiment.watch.steps,
      "sampling.series.frames": experiment.grid.frames,
      "sampling.series.overlap": 0,
    }
  )
  return _folded(window, stats, network)


def _folded(experiment: Experiment, stats, network, table=None, alpha=None) -> Callable:
  """The sampler, the frames of a series folded into channels."""
  block, op = experiment.sampling, worlds.operator(experiment)
  plan = time_series.plan(experiment)
  stats = stats.repeated(plan.series)
  given = observation_noise(experiment) or 0.0  # "auto" comes with the conditions: Soft
  noise = tuple(float(given / s) for s in stats.std)
  measured = needs_table(experiment)
  # Levels are numbers, also for a caller who builds a sampler under jit.
  with jax.ensure_compile_time_eval():
    basis = worlds.domain(experiment).basis()
    variance = gaussian_gain.prior_variance(stats.spectrum)
    prior_gain = gaussian_gain.Gain(op, variance, noise, basis=basis)
    guide = prior_gain if not measured else _measured_gain(prior_gain, table, plan)
    covered = table if measured else None
    check_noise_levels(experiment, covered)
    levels, high = _noise_levels(experiment, guide or prior_gain)

  def denoise(params, x, sigma):
    def window(x, sigma):
      return network.apply({"params": params}, x, sigma)

    return stitching.stitched(window, plan)(x, sigma)

  return conditional_sampler.sampler(
    conditional_sampler.Recipe(
      denoise=denoise,
      shape=(*op.fine, len(stats.mean)),
      levels=levels,
      high=high,
      solve=_solver(experiment),
      start=block.start,
      prior=prior_gain,
      guide=guide,
      guidance=_guidance(experiment, alpha),
      select=resampling(experiment),
      spread=block.spread,
      members=block.unit[1],
      normalise=stats.normalise,
      restore=stats.restore,
      missing=(
        f"config.sampling.guidance.name={block.guidance.name} uses the prior's measured error, and "
        "there is no table of it: run `downscaling train` with the same --config and --workdir, "
        "which makes it, or use --config.sampling.guidance.name=scaled."
      ),
    )
  )


def _measured_gain(
  prior_gain: gaussian_gain.Gain, table, plan
) -> gaussian_gain.Gain | None:
  """The same with the measured error in place of the prior's variance; None without a table."""
  if table is None:
    return None
  errors = stitching.extended(table.errors, plan)
  variance = gaussian_gain.measured_variance(table.sigmas, errors)
  return dataclasses.replace(prior_gain, variance=variance)


def _guidance(experiment: Experiment, alpha) -> dict:
  """Keywords of the guidance."""
  block = experiment.sampling.guidance
  return {
    "name": block.name,
    "alpha": block.alpha if alpha is None else alpha,
    "normalise": block.normalise,
    "final": block.final,
  }


def check_noise_levels(
  experiment: Experiment, table: error_table.ErrorTable | None
) -> None:
  """Raises ValueError for levels that the prior was not trained on, or its error table lacks.

  table: of the guidance of conditional draws, if it has one.
  """
  block, schedule = experiment.sampling, prior.schedule(experiment)
  churn = block.solver.churn if block.solver.name == "heun" else 0.0

  def met(sigma_max: float, steps: int) -> np.ndarray:
    highest = sigma_max * (1 + solvers.churned(churn, steps))
    return np.array([block.levels.sigma_min, highest])

  conditional = met(block.levels.sigma_max, block.levels.steps)
  schedule.check_levels(conditional, "config.sampling.levels")
  if table is not None:
    error_table.check_covers(table, conditional, "config.sampling.levels")
  free = met(block.unconditional.sigma_max, block.unconditional.steps)
  schedule.check_levels(free, "config.sampling.unconditional")


def _noise_levels(
  experiment: Experiment, gain: gaussian_gain.Gain
) -> tuple[np.ndarray, np.ndarray]:
  """Levels with a condition and without.

  "guided" levels follow what the gain leaves open; without a condition they are those of "edm".
  """
  block, alone = experiment.sampling.levels, experiment.sampling.unconditional
  name = "edm" if block.name == "guided" else block.name

  def levels(steps: int, sigma_max: float) -> np.ndarray:
    return schedules.levels(name, steps, sigma_max, block.sigma_min, block.rho)

  free = levels(alone.steps, alone.sigma_max)
  if block.name == "guided":
    low = gaussian_gain.levels(gain, block.steps, block.sigma_max, block.sigma_min)
    return low, free
  return levels(block.steps, block.sigma_max), free


def resampling(experiment: Experiment) -> Resampling | None:
  """Among the members of a unit that share a condition; None for strength 0."""
  block = experiment.sampling
  solver = block.solver
  if not block.resample.strength:
    return None
  no_noise = solver.name == "dpm_solver_pp_2m_sde" and not solver.eta > 0
  if solver.name not in conditional_sampler.SELECTING or no_noise:
    raise ValueError(
      f"config.sampling.resample.strength={block.resample.strength:g} with the solver "
      f"{solver.name} and eta={solver.eta:g}: copies of a member part by noise alone. Use "
      f"{' or '.join(conditional_sampler.SELECTING)} with eta > 0, or strength=0."
    )
  return Resampling(members=block.unit[1], **block.resample.asdict())


def _solver(experiment: Experiment) -> Callable:
  """The solver, with those of its block's keys that it takes."""
  block = experiment.sampling.solver
  if block.name == "euler_maruyama":
    return functools.partial(
      solvers.euler_maruyama, schedule=prior.schedule(experiment)
    )
  if block.name == "heun":
    return functools.partial(solvers.heun, churn=block.churn, noise_factor=block.noise)
  if block.name == "dpm_solver_pp_2m":
    return solvers.dpm_solver_pp_2m
  return functools.partial(
    solvers.dpm_solver_pp_2m_sde, eta=block.eta, noise_factor=block.noise
  )
