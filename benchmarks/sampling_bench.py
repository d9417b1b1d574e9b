"""A trained prior, held-out fields, and every sampler's draws on them: what
`benchmarks/sampling.py` measures with.
"""

import json
import os
import pathlib
import statistics
import time
from typing import NamedTuple

import jax
import numpy as np

from downscaling import jobs
from downscaling.assembly import prior, samples, worlds
from downscaling.baselines import interpolation
from downscaling.datasets import simulated
from downscaling.diffusion import error_table, train_loop
from downscaling.metrics import calibration, distances, spectra
from downscaling.runtime import mesh as meshes
from downscaling.runtime import program_cost, progress, random_keys, supervision
from downscaling.sampling import conditional_sampler

BLOCK = 32  # conditions that are drawn together; the cases take turns block by block
REFERENCE = 4096  # fields that covariances and climatology are compared with


class Conditions(NamedTuple):
  """split: of the data set. truth: [K, *space, 1]. y: C′ of them, [K, *coarse, 1]."""

  split: str
  truth: np.ndarray
  y: np.ndarray


class Drawn(NamedTuple):
  """fields: [K, M, *space]. misfit: [K, M]. cpu, wall: seconds a member, the medians over blocks.

  cpu is the processor time of all threads over the number of cores, which other work on the machine
  hardly changes.
  """

  fields: np.ndarray
  misfit: np.ndarray
  cpu: float
  wall: float


def fine_fields(ctx: jobs.Workdir, split: str, count: int) -> np.ndarray:
  """Held-out fine fields [count, *space, 1], balanced over trajectories and times.

  They are read from the data set, or simulated anew where the work folder has none. Both ways give
  the same fields, as a trajectory is a function of the config's seed and of its number.
  """
  data = ctx.experiment.data
  rows = simulated.balanced(data.trajectories("hfhr")[split], data.snapshots, count)
  dataset = worlds.dataset(ctx.experiment, ctx.path, "hfhr")
  if not dataset.info.initialized:
    return simulate_fields(ctx, split, rows)
  ctx.need("data", "generate")  # refuses a data set of another config
  return simulated.load(dataset, split, index=rows)["u"]


def simulate_fields(ctx: jobs.Workdir, split: str, rows: np.ndarray) -> np.ndarray:
  """Rows of a split, [len(rows), *space, 1], from their trajectories alone."""
  trajectory, snapshot = np.divmod(rows, ctx.experiment.data.snapshots)
  needed, place = np.unique(trajectory, return_inverse=True)
  ids = simulated.FIRST_TRAJECTORY[split] + needed
  mesh = worlds.simulating(ctx.experiment, "hfhr", ctx.mesh)
  width = min(ctx.experiment.data.shard, len(ids))
  width = -(-width // mesh.size) * mesh.size
  blocks = []
  with (
    jax.enable_x64(True),
    progress.Progress(f"simulate {split}", len(ids), "trajectories") as bar,
  ):
    plan = worlds.generation(ctx.experiment, ctx.path, "hfhr", meshes.rows(mesh))
    for first in range(0, len(ids), width):
      some = ids[first : first + width]
      padded = np.concatenate([some, np.full(width - len(some), some[0])])
      fields = np.asarray(plan.rollout(jax.device_put(padded, meshes.rows(mesh))))[
        : len(some)
      ]
      plan.check(fields, some, plan.times)
      blocks.append(fields.astype(np.float32))
      bar.advance(len(some))
  return np.concatenate(blocks)[place, snapshot]


class Bench:
  """The prior of a work folder.

  workdir: holds train (its prior and error table) and data/statistics.npz of that config; fields
  are simulated if its data set is not there. observed: other values of config.grid: the prior
  serves any C′.
  """

  def __init__(self, config, workdir, seed=0, **observed):
    self.mesh, self.seed = meshes.make(), seed
    folder = pathlib.Path(workdir).absolute()
    self.ctx = jobs.Workdir(config, folder, self.mesh, supervision.Stop())
    stage = self.ctx.need("train", "train")
    self.stats = self.ctx.statistics()
    self.network = prior.network(config, self.stats)
    space, channels = worlds.space(config), len(self.stats.mean)
    self.params = train_loop.load_prior(
      stage.path, stage.hash, self.network, space, channels, self.mesh
    )
    self.table = error_table.load(stage.path, stage.hash)
    self.config = config.changed(
      **{f"grid.{key}": value for key, value in observed.items()}
    )
    have = config.data.hfhr.reference * config.data.snapshots
    self.reference = fine_fields(self.ctx, "reference", min(REFERENCE, have))[..., 0]
    self._programs = {}

  def conditions(self, split: str, count: int) -> Conditions:
    truth = fine_fields(self.ctx, split, count)
    return Conditions(
      split, truth, np.asarray(worlds.operator(self.config).apply(truth))
    )

  def draw(
    self, cases: dict[str, dict], at: Conditions, members: int
  ) -> dict[str, Drawn]:
    """Every case on the same conditions with the same keys.

    The cases take turns, block by block of conditions.
    """
    block = -(-min(BLOCK, len(at.y)) // self.mesh.size) * self.mesh.size
    starts = range(0, len(at.y), block)
    rows = meshes.rows(self.mesh)
    programs = {
      name: self._program(overrides, block, members)
      for name, overrides in cases.items()
    }
    found = {name: [] for name in cases}
    with progress.Progress(
      f"draw on {at.split}", len(starts) * len(cases), "blocks"
    ) as bar:
      for first in starts:
        # The last block is filled up.
        which = np.arange(first, first + block) % len(at.y)
        y = jax.device_put(at.y[which].repeat(members, 0), rows)
        keys = self._keys(at.split, which, members)
        for name, (program, alpha) in programs.items():
          found[name].append(_timed(program, np.float32(alpha), keys, y, self.params))
          bar.advance(1)
    return {name: _joined(parts, len(at.y), members) for name, parts in found.items()}

  def calls(self, overrides: dict) -> float:
    """Network calls a member: model FLOPs of the whole sampler over those of one unguided call.

    So a gradient counts as what it costs here, not as a number of calls that somebody assumed.
    """
    unguided = {"guidance.name": "none", "resample.strength": 0.0}
    config = self._settled(unguided | {"solver.name": "dpm_solver_pp_2m"}, (1, 2))
    one = self._flops(config) / (config.sampling.levels.steps + 1)
    return self._flops(self._settled(overrides, (1, 2))) / one

  def score(self, fields: np.ndarray, at: Conditions) -> dict[str, float]:
    """Quality of fields [K, M, *space]; {"runaways": n} alone if n members are no fields."""
    finite = np.isfinite(fields).reshape(*fields.shape[:2], -1).all(axis=2)
    if not finite.all():
      return {"runaways": int((~finite).sum())}
    truth = at.truth[..., 0]
    found = calibration.calibrate(fields, truth)
    melr = spectra.melr(
      spectra.energies(fields.reshape(-1, *fields.shape[2:])), spectra.energies(truth)
    )
    floor = distances.cov_rmse(truth, self.reference)
    return {
      "member": found.member_rmse,
      "mean": found.mean_rmse,
      "crps": found.crps,
      "energy": found.energy,
      "melre": melr["energy"],
      "cov": distances.cov_rmse(fields[:, 0], self.reference) / floor,
      "s/e": found.spread_error,
      "in50": found.coverage["0.5"],
      "in90": found.coverage["0.9"],
      "ideal50": found.ideal["0.5"],
      "ideal90": found.ideal["0.9"],
    }

  def spectrum(self, fields: np.ndarray, at: Conditions) -> dict[str, float]:
    """{k: energy of fields [K, M, *space] over the truths'}, up to nine shells that hold energy."""
    energy = spectra.energies(fields.reshape(-1, *fields.shape[2:]))
    truth = spectra.energies(at.truth[..., 0])
    shells = [len(truth) * part // 16 for part in (1, 2, 3, 4, 5, 6, 8, 10, 12)]
    held = spectra.energy_holding_shells(truth)
    return {
      str(k): float(energy[k - 1] / truth[k - 1]) for k in shells if k and held[k - 1]
    }

  def halves(self, fields: np.ndarray, at: Conditions) -> tuple[float, dict, dict]:
    """(κ fitted on the first half of the conditions, scores of the second as drawn, and with κ)."""
    half = len(fields) // 2
    first, second = (
      Conditions(at.split, at.truth[part], at.y[part])
      for part in (slice(half), slice(half, None))
    )
    factor = 1 / self.score(fields[:half], first)["s/e"]
    rest = fields[half:]
    flat = rest.reshape(-1, *rest.shape[2:])
    scaled = conditional_sampler.rescale(flat, rest.shape[1], factor).reshape(
      rest.shape
    )
    return factor, self.score(rest, second), self.score(scaled, second)

  def baselines(self, at: Conditions) -> dict[str, calibration.Reference]:
    """Scores of climatology and of an interpolation."""
    truth = at.truth[..., 0]
    guess = interpolation.cubic(at.y, worlds.operator(self.config))[..., 0]
    return {
      "climatology": calibration.climatology(self.reference[:256], truth),
      "interpolation": calibration.single(guess, truth),
    }

  def _settled(self, overrides: dict, unit: tuple[int, int]):
    # y′ is C′x itself here.
    fixed = {"sampling.observation_noise": 0.0, "sampling.unit": unit}
    given = {f"sampling.{key}": value for key, value in overrides.items()}
    return self.config.changed(**given | fixed)

  def _sampler(self, config, alpha=None):
    return samples.sampler(config, self.stats, self.network, self.table, alpha)

  def _program(self, overrides: dict, block: int, members: int):
    """(compiled (α, keys, y, params) -> (fields, misfit), α). One compilation serves every α."""
    alpha = overrides.get("guidance.alpha", self.config.sampling.guidance.alpha)
    fixed = {key: value for key, value in overrides.items() if key != "guidance.alpha"}
    known = json.dumps([fixed, block, members], sort_keys=True)
    if known not in self._programs:
      config = self._settled(fixed, (block, members))

      def draw(alpha, keys, y, params):
        return self._sampler(config, alpha)(keys, y, params)

      self._programs[known] = self._compiled(draw, block, members)
    return self._programs[known], alpha

  def _compiled(self, draw, block: int, members: int):
    rows, coarse = meshes.rows(self.mesh), worlds.operator(self.config).coarse
    keys = self._keys("test", np.zeros(block, int), members)
    y = jax.ShapeDtypeStruct((block * members, *coarse, 1), np.float32, sharding=rows)
    return jax.jit(draw).lower(np.float32(0), keys, y, self.params).compile()

  def _keys(self, split: str, conditions: np.ndarray, members: int) -> jax.Array:
    """Of each member of each condition, [conditions × members]."""
    base = jax.random.fold_in(
      random_keys.key(self.seed, "benchmark"), simulated.SPLITS.index(split)
    )
    fold = jax.vmap(lambda c, m: jax.random.fold_in(jax.random.fold_in(base, c), m))
    member = np.tile(np.arange(members), len(conditions))
    return jax.jit(fold, out_shardings=meshes.rows(self.mesh))(
      conditions.repeat(members), member
    )

  def _flops(self, config) -> float:
    members, op = config.sampling.unit[1], worlds.operator(config)
    keys = jax.eval_shape(
      lambda: jax.random.split(random_keys.key(0, "plans"), members)
    )
    y = jax.ShapeDtypeStruct((members, *op.coarse, 1), np.float32)
    return program_cost.flops(self._sampler(config), keys, y, self.params)


def _timed(program, *args):
  wall, cpu = time.perf_counter(), time.process_time()
  fields, misfit = jax.block_until_ready(program(*args))
  cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
  return (
    np.asarray(fields)[..., 0],
    np.asarray(misfit),
    cpu / (os.cpu_count() or 1),
    wall,
  )


def _joined(parts: list, conditions: int, members: int) -> Drawn:
  fields, misfit, cpu, wall = zip(*parts, strict=True)
  rows = len(fields[0])
  fields, misfit = np.concatenate(fields), np.concatenate(misfit)
  shape = (conditions, members)
  kept = conditions * members
  return Drawn(
    fields[:kept].reshape(*shape, *fields.shape[1:]),
    misfit[:kept].reshape(shape),
    statistics.median(cpu) / rows,
    statistics.median(wall) / rows,
  )
