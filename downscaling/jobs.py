"""The jobs: what each reads from the work folder, which room does the work, what it writes, and its dry run.

Rooms meet here and on disk only. Every job opens its stage (refusing a folder of another config), skips it if it is
complete, and says in one line what it wrote and what to run next.
"""

import dataclasses
import pathlib
from collections.abc import Callable

import jax
import ml_collections
import numpy as np

from downscaling import build
from downscaling.common import mesh as meshes
from downscaling.common import runs
from downscaling.datasets import builders, generate, pipeline, statistics
from downscaling.diffusion import training


@dataclasses.dataclass(frozen=True)
class Context:
  """config: locked ConfigDict. workdir: of the run. mesh: of all devices. stop: see runs.polite_stop. command: argv."""

  config: ml_collections.ConfigDict
  workdir: pathlib.Path
  mesh: jax.sharding.Mesh
  stop: Callable[[], bool]
  command: str

  def stage(self, name: str) -> runs.Stage:
    path = build.data_dir(self.config, self.workdir) if name == "data" else self.workdir / name
    return runs.open_stage(path, name, build.identity(self.config, name))

  def need(self, name: str, job: str) -> runs.Stage:
    """A finished stage; raises FileNotFoundError naming the job that makes it."""
    path = build.data_dir(self.config, self.workdir) if name == "data" else self.workdir / name
    if not (path / runs.MARKER).exists() or not (stage := self.stage(name)).complete:
      raise FileNotFoundError(
        f"{path} is missing or unfinished: run `downscaling {job}` first, with the same --config and --workdir "
        "(or `downscaling pipeline`, which does all that is missing)."
      )
    return stage


def generate_job(ctx: Context) -> str:
  """Simulates both worlds, then measures the training split."""
  stage = ctx.stage("data")
  with stage.timed():
    for which in ("hfhr", "lflr"):
      with jax.enable_x64(True):
        plan = build.generation(ctx.config, ctx.workdir, which, meshes.rows(ctx.mesh))
        generate.generate(plan, ctx.mesh, ctx.stop)
    if meshes.is_main():
      source = builders.source(build.dataset(ctx.config, ctx.workdir, "hfhr"), "train")
      statistics.measure(source, build.space(ctx.config)).save(stage.path / "statistics.npz")
  stage.finish(std=stage_statistics(ctx).std.tolist())
  return f"wrote {stage.path}; next: downscaling debias, downscaling train"


def stage_statistics(ctx: Context) -> statistics.Statistics:
  return statistics.load(build.data_dir(ctx.config, ctx.workdir) / "statistics.npz")


def load_rows(ctx: Context, which: str, split: str, count: int | None = None) -> np.ndarray:
  """Snapshots [S, *space, C], in data units."""
  return builders.load(build.dataset(ctx.config, ctx.workdir, which), split, count)["u"]


def train_job(ctx: Context) -> str:
  """Trains the prior on the fine world."""
  ctx.need("data", "generate")
  stage, c = ctx.stage("train"), ctx.config
  meshes.check_divides(c.train.batch, ctx.mesh, "a batch", "train.batch")
  stats = stage_statistics(ctx)
  source = builders.source(build.dataset(c, ctx.workdir, "hfhr"), "train", c.train.batch)
  validation = stats.normalise(load_rows(ctx, "hfhr", "validation", build.validation_rows(c)))
  with stage.timed():
    result = training.train(
      stage.path,
      runs.config_hash(stage.identity),
      denoiser=build.denoising_network(c, stats),
      tx=build.optimizer(c),
      draw_sigma=build.noise_levels(c),
      ema_decay=c.train.ema_decay,
      batches=pipeline.Batches(source, stats, c.train.batch, c.seed),
      validation=jax.device_put(validation, meshes.rows(ctx.mesh)),
      space=build.space(c),
      channels=validation.shape[-1],
      mesh=ctx.mesh,
      seed=c.seed,
      total_steps=c.train.total_steps,
      config_text=c.to_json_best_effort(indent=1),
      stop=ctx.stop,
      **c.plan,
    )
  stage.finish(**result)
  return f"wrote {stage.path}; next: downscaling sample"


JOBS = {
  "generate": ("data", generate_job),
  "train": ("train", train_job),
}
NAMES = tuple(JOBS)


def run(name: str, ctx: Context) -> str:
  """Does a job, or says that it is done."""
  stage, job = JOBS[name]
  if stage and ctx.stage(stage).complete:
    return f"{name} is done already"
  return job(ctx)


def dry_run(name: str, ctx: Context) -> str:
  return "not yet"
