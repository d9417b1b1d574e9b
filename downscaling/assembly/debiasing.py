"""What the debiasing maps of an experiment are fitted with."""

import numpy as np

from downscaling.assembly import worlds
from downscaling.datasets import simulated
from downscaling.debias import bias_symmetry, maps
from downscaling.experiment import Experiment
from downscaling.fields.quadratic import Quadratic

SINKHORN = (
  "epsilon",
  "threshold",
  "max_iterations",
  "check_every",
  "path",
  "save_seconds",
)


def quadratic(experiment: Experiment) -> Quadratic | None:
  """The equation's quadratic term on the coarse grid; None if it has none."""
  make = experiment.physics.quadratic
  return None if make is None else make(worlds.operator(experiment).coarse)


def setting(experiment: Experiment, config_hash: str, **of_job) -> maps.Setting:
  """What all fits share. config_hash: of the stage's identity. of_job: mesh, agree,
  stop, interruptible.
  """
  debias = experiment.debias
  whole = worlds.group(experiment)
  subgroups = bias_symmetry.subgroups(whole, worlds.operator(experiment).coarse)
  periodic = len(subgroups.get("shifts", whole)) > 1
  return maps.Setting(
    group=whole,
    subgroup=debias.group,
    towards="stationary" if periodic else "tapered",
    select=debias.select,
    outlier=debias.outlier,
    quadratic=quadratic(experiment),
    sinkhorn={key: getattr(debias, key) for key in SINKHORN},
    minibatch=debias.minibatch.asdict(),
    recipe=debias.recipe,
    quantiles=debias.quantiles,
    seed=experiment.seed,
    config_hash=config_hash,
    weights=tuple(worlds.domain(experiment).weights),
    **of_job,
  )


def in_sample_rows(experiment: Experiment) -> np.ndarray:
  """Which rows of the fit are mapped for in_sample.zarr, [S].

  They are as many as are held out, balanced over trajectories and times. A fit of some rows alone
  may lack a few of the balanced ones.
  """
  debias = experiment.debias
  trajectories, snapshots = experiment.data.lflr.train, experiment.data.snapshots
  count = min(debias.held_out, debias.points)
  fitted = simulated.balanced(trajectories, snapshots, debias.points)
  some = simulated.balanced(trajectories, snapshots, count)
  return np.flatnonzero(np.isin(fitted, some))
