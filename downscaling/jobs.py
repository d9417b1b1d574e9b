"""The jobs: what each reads from the work folder, which room does the work, what it writes, and its
dry run.

Rooms meet here and on disk only. Every job opens its stage (refusing a folder of another config),
skips it if it is complete, and says in one line what it wrote and what to run next.
"""

import contextlib
import functools

import jax
import numpy as np

from downscaling import build, evaluators, series, soft_conditions, stages
from downscaling.baselines import interpolation
from downscaling.context import (
  Context,
  by_row,
  condition_numbers,
  conditions_of,
  floor_numbers,
  held_out,
  held_out_numbers,
  held_out_rows,
  in_sample_rows,
  load_numbered,
  load_rows,
  load_windows,
  origin,
  quadratic_of,
  readable,
  row_numbers,
  stage_statistics,
  stretches,
  true_rows,
)
from downscaling.datasets import generate, simulated, time_windows, training_batches
from downscaling.debias import fit as debias_room
from downscaling.diffusion import error_table, train_loop, train_step
from downscaling.fields import statistics
from downscaling.metrics import bootstrap, increments, scoring
from downscaling.report import results, terminal, writer
from downscaling.runtime import (
  files,
  metric_writer,
  processes,
  progress,
  provenance,
  stage_folder,
  supervision,
)
from downscaling.runtime import mesh as meshes
from downscaling.sampling import ensemble


def generate_job(ctx: Context) -> str:
  """Simulates both worlds, then measures the training split."""
  stage = ctx.stage("data")
  with stage.timed():
    for which in ("hfhr", "lflr"):
      mine = build.simulating(ctx.config, which, ctx.mesh)
      with jax.enable_x64(True):
        plan = build.generation(ctx.config, ctx.workdir, which, meshes.rows(mine))
        agree = functools.partial(processes.gather, f"generate/{which}")
        generate.generate(plan, mine, ctx.stop, jax.process_index(), agree)
    if meshes.is_main():
      source = simulated.source(build.dataset(ctx.config, ctx.workdir, "hfhr"), "train")
      statistics.measure(source, build.space(ctx.config)).save(stage.path / "statistics.npz")
    processes.barrier("statistics")
  stage.finish(std=stage_statistics(ctx).std.tolist())
  return f"wrote {stage.path}; next: downscaling debias, downscaling train"


def train_job(ctx: Context) -> str:
  """Trains the prior on the fine world, then tabulates its held-out error."""
  ctx.need("data", "generate")
  trained = ctx.done("train")
  stage, c = ctx.stage("train"), ctx.config
  stats = stage_statistics(ctx)
  held = stats.repeated(c.grid.frames).normalise(
    load_windows(ctx, "calibration", build.validation_rows(c))
  )
  network = build.denoising_network(c, stats)
  with stage.timed():
    summary = stage.summary if trained else _train(ctx, stage, stats, network, held)
    agree = functools.partial(processes.gather, "error table")
    prior = stage_folder.config_hash(stage.identity)
    params = train_loop.load_prior(
      stage.path, prior, network, held.shape[1:-1], held.shape[-1], ctx.mesh, agree
    )
    few = held[:: max(1, len(held) // max(error_table.rows(held.shape[1:]), ctx.mesh.size))]
    table = error_table.tabulate(
      network, params, few, build.error_levels(c), ctx.mesh, c.seed, ctx.stop
    )
    if meshes.is_main():
      error_table.save(stage.path, table, prior)
    processes.barrier("error table")
  stage.finish(**summary)
  return (
    f"wrote {stage.path / error_table.FILE if trained else stage.path}; next: downscaling sample"
  )


def _train(
  ctx: Context, stage: stage_folder.Stage, stats: statistics.Statistics, network, held: np.ndarray
) -> dict:
  """The training run; its summary."""
  c = ctx.config
  source = simulated.source(build.dataset(c, ctx.workdir, "hfhr"), "train", c.train.batch)
  source = time_windows.view(source, c.data.snapshots, c.grid.frames)
  many = stats.repeated(c.grid.frames)
  held = held[: len(held) // ctx.mesh.size * ctx.mesh.size]

  def validation(specs, key):
    mine = held[meshes.host_rows(ctx.mesh, len(held))]
    x = meshes.to_global(ctx.mesh, mine, len(held))
    return train_step.make_validation(network, ctx.mesh, specs, x, train_loop.SIGMAS, key)

  drawn = evaluators.unconditional(
    build.watching_sampler(c, stats, network), ctx.mesh, c.watch.fields, held, many, c.seed
  )
  return train_loop.train(
    stage.path,
    stage_folder.config_hash(stage.identity),
    initialise=build.initial_state(c, network, held.shape[-1]),
    make_update=lambda specs: build.update(c, stats, network, ctx.mesh, specs),
    make_validation=validation,
    batches=training_batches.Batches(source, many, c.train.batch, c.seed),
    shape=held.shape[1:],
    evaluators={"unconditional": drawn},
    mesh=ctx.mesh,
    seed=c.seed,
    plan=build.training_plan(c),
    keep=build.keep(c),
    config_text=c.to_json_best_effort(indent=1),
    stop=ctx.stop,
    dtype=c.model.dtype,
    agree=functools.partial(processes.gather, "train"),
  )


def debias_job(ctx: Context) -> str:
  """Fits the maps from the coarse biased world to the coarsened true one, and applies them to
  held-out rows.
  """
  ctx.need("data", "generate")
  stage, c = ctx.stage("debias"), ctx.config
  op, group = build.operator(c), build.group(c)
  reference = np.asarray(op.apply(load_rows(ctx, "hfhr", "reference", c.evaluate.reference)))[
    ..., 0
  ]

  def against_truth(rows, mapped):
    return scoring.measure(
      mapped[..., 0], reference, group=group, source=rows[..., 0], quadratic=quadratic_of(c)
    )

  biased, fine = (
    simulated.load(build.dataset(c, ctx.workdir, which), "train", c.debias.points)
    for which in ("lflr", "hfhr")
  )
  tuned = min(c.debias.held_out, c.data.lflr.calibration * c.data.snapshots)
  with stage.timed():
    report = debias_room.debias(
      stage.path,
      biased["u"],
      np.asarray(op.apply(fine["u"])),
      held_out_rows(ctx, "lflr", "test", c.debias.held_out),
      space=op.coarse,
      maps=tuple(c.debias.maps),
      chosen=c.debias.map,
      setting=build.debias_setting(
        c, mesh=ctx.mesh, stop=ctx.stop, agree=functools.partial(processes.gather, "debias")
      ),
      evaluators={"metrics": against_truth},
      trajectories=(biased["trajectory"], fine["trajectory"]),
      in_sample=build.in_sample_rows(c),
      calibration=held_out_rows(ctx, "lflr", "calibration", tuned),
    )
  stage.finish(
    converged={
      name: facts["converged"] for name, facts in report["maps"].items() if "converged" in facts
    }
  )
  return f"wrote {stage.path}; next: downscaling sample"


def sample_job(ctx: Context) -> str:
  """Draws the sets of config.sampling.sets from the prior."""
  ctx.need("data", "generate")
  prior, c = ctx.need("train", "train"), ctx.config
  ctx.need("debias", "debias")
  stage, stats = ctx.stage("samples"), stage_statistics(ctx)
  network = build.denoising_network(c, stats)
  space, channels = build.space(c), len(stats.mean)
  with ctx.stop.interruptible("restoring the prior"):
    wide = channels * c.grid.frames
    params = train_loop.load_prior(
      prior.path, stage_folder.config_hash(prior.identity), network, space, wide, ctx.mesh
    )
    table = (
      error_table.load(prior.path, stage_folder.config_hash(prior.identity))
      if build.needs_table(c)
      else None
    )
  params = jax.tree.map(
    lambda x: np.asarray(x.addressable_data(0)), params
  )  # as whole here as anywhere
  draw = build.sampler(c, stats, network, table)
  with stage.timed():
    noises = soft_conditions.fits(ctx, stage.path, draw, params, stats)
    for name, source in build.sources(c).items():
      conditions = None if source is None else conditions_of(ctx, source)
      noise = noises.get(name)
      ensemble.write_ensemble(
        stage.path / f"{name}.zarr",
        conditions=conditions,
        members=c.sampling.members if source else c.sampling.unconditional.fields,
        sampler=draw,
        weights=soft_conditions.weights(params, noise, len(space)),
        space=space,
        channels=channels,
        frames=c.sampling.series.frames,
        unit=tuple(c.sampling.unit) if source else (1, c.sampling.unit[0] * c.sampling.unit[1]),
        devices=[*meshes.local(ctx.mesh).devices.flat],
        seed=c.seed,
        identity={"config": stage.identity, "source": source or "none"}
        | ({} if noise is None else {"observation_noise": noise.std}),
        attrs=soft_conditions.attributes(noise, stats)
        | {
          "title": f"{c.experiment}: {name}",
          "comment": f"{series.comment(c)}. NaN: not yet drawn, see done_fraction.",
          "references": "Wan et al. 2023, https://arxiv.org/abs/2305.15618",
          "config_hash": stage_folder.config_hash(stage.identity),
        },
        coordinates=build.coordinates(c),
        sample_attrs={"units": "1"},
        stop=ctx.stop.told,
        interruptible=ctx.stop.interruptible,
        max_failed=c.sampling.max_failed,
      )
  stage.finish(extent=stages.extent(c))
  return f"wrote {stage.path}; next: downscaling evaluate"


def evaluate_job(ctx: Context) -> str:
  """Measures everything against held-out truth and writes metrics.json, the figures and
  report.html: process 0 does.
  """
  ctx.need("samples", "sample")
  stage, c = ctx.stage("report"), ctx.config

  def measure():
    print(terminal.summary(writer.write(stage.path, evidence_of(ctx))))

  with stage.timed(), contextlib.nullcontext() if meshes.is_main() else ctx.stop.waiting():
    processes.main_only("evaluate", measure)
  stage.finish(html=str(stage.path / "report.html"), extent=stages.extent(c))
  return f"wrote {stage.path / 'report.html'} ({c.experiment}); open it in a browser"


def evidence_of(ctx: Context) -> results.Evidence:
  """Everything the report is made from, read back from the work folder."""
  c, op = ctx.config, build.operator(ctx.config)
  fine = held_out_rows(ctx, "hfhr", "reference", c.evaluate.reference)[..., 0]
  rows, fitted = (by_row(c, held_out(ctx, name)) for name in ("held_out", "in_sample"))
  floor = load_numbered(ctx, "hfhr", "floor", floor_numbers(c))[..., 0]
  truth = true_rows(ctx, c.sampling.conditions)[..., 0]
  coarsen = lambda x: np.asarray(op.apply(x[..., None]))[..., 0]
  samples, conditions, misfits, in_time = _drawn(ctx)
  cubic = f"{c.debias.map}+cubic"
  conditions[cubic] = series.as_rows(conditions_of(ctx, c.debias.map)[..., 0], c, 1)
  samples[cubic] = interpolation.cubic(conditions[cubic][..., None], op)[:, None, ..., 0]
  known = {"true+diffusion"} & {*samples}  # sets of which the truth is known
  diagnostics = files.read_json(ctx.folder("debias") / "diagnostics.json")
  solve = diagnostics["maps"].get("entropic") or {}
  length = c.sampling.series.frames
  return results.Evidence(
    experiment=c.experiment,
    default=c.debias.map,
    coarse=rows | {f"{name} in-sample": x for name, x in fitted.items() if name != "lflr"},
    sources={f"{name} in-sample": fitted["lflr"] for name in fitted if name != "lflr"},
    origins=_origins(ctx, samples, len(fine)),
    step=None if length == 1 else c.data.spacing,
    draws=c.evaluate.draws,
    seed=c.seed,
    quadratic=quadratic_of(c),
    effective_targets={
      name: facts["effective_targets"]
      for name, facts in diagnostics["maps"].items()
      if "effective_targets" in facts
    },
    health=diagnostics.get("health", []),
    coarse_reference=coarsen(fine),
    coarse_floor=coarsen(floor),
    group=build.group(c),
    coarse_moves=build.coarse_moves(c),
    moves=build.moves(c),
    samples=samples,
    conditions=conditions,
    misfits=misfits,
    truth={name: series.as_rows(truth, c, 1) for name in known},
    series=None if length == 1 else _in_time(ctx, in_time, truth, coarsen),
    guesses={name: interpolation.cubic(conditions[name][..., None], op)[..., 0] for name in known},
    fine_reference=fine,
    fine_floor=floor,
    operator=op,
    **{key: solve.get(key) for key in ("history", "mean_cost", "threshold")},
    loss=metric_writer.read_scalars(ctx.folder("train"), "loss"),
    symbol=build.physics(c).SYMBOL,
    length=build.equation(c, "hfhr").length,
    provenance=report_provenance(ctx),
  )


def _drawn(ctx: Context) -> tuple[dict, dict, dict, dict]:
  """({set: samples as rows}, {set: conditions as rows}, {set: misfits}, {set: samples with their
  axis of time}).
  """
  samples, conditions, misfits, in_time = {}, {}, {}, {}
  for name, source in build.sources(ctx.config).items():
    path = ctx.folder("samples") / f"{name}.zarr"
    with readable(path, "sample"):
      stored = ensemble.read(path)
      data = np.asarray(stored["sample"])
      if "misfit" in stored:
        misfits[name] = np.asarray(stored["misfit"])
    in_time[name] = data if source else data.swapaxes(0, 1)
    samples[name] = series.as_rows(in_time[name], ctx.config, 2)
    if source:
      conditions[name] = series.as_rows(conditions_of(ctx, source)[..., 0], ctx.config, 1)
  return samples, conditions, misfits, in_time


def _origins(ctx: Context, samples: dict, reference: int) -> dict[str, bootstrap.Rows]:
  """Trajectory and time of every row that is judged, and of the true rows that it is judged by."""
  c = ctx.config
  held = held_out_numbers(c, "lflr", "test", c.debias.held_out)
  fitted = row_numbers(c, "lflr", "train", c.debias.points)[in_sample_rows(ctx)]
  numbers = dict.fromkeys(("lflr", *c.debias.maps), held)
  numbers |= {f"{name} in-sample": fitted for name in c.debias.maps}
  numbers |= {
    name: condition_numbers(c, source) for name, source in build.sources(c).items() if source
  }
  numbers[f"{c.debias.map}+cubic"] = condition_numbers(c, c.debias.map)
  numbers["reference"] = held_out_numbers(c, "hfhr", "reference", reference)
  numbers["floor"] = floor_numbers(c)
  found = {name: origin(c, rows.reshape(-1)) for name, rows in numbers.items()}
  if "unconditional" in samples:
    number, length = np.arange(len(samples["unconditional"])), c.sampling.series.frames
    if length > 1:
      found["unconditional"] = bootstrap.Rows(number // length, c.data.spacing * (number % length))
    else:  # of no time: the prior knows all of them alike
      found["unconditional"] = bootstrap.Rows(number, origin(c, number % c.data.snapshots).time)
  return found


def _in_time(
  ctx: Context, samples: dict[str, np.ndarray], truth: np.ndarray, coarsen
) -> increments.Series:
  """What the report knows of time; truth: [K, L, *space]."""
  plan, most = series.plan(ctx.config), max(map(len, samples.values()))
  reference = stretches(ctx, "hfhr", "reference", -(-ctx.config.evaluate.reference // plan.series))[
    ..., 0
  ]
  return increments.Series(
    samples=samples,
    truth={name: truth for name in ("true+diffusion",) if name in samples},
    conditions={
      name: conditions_of(ctx, source)[..., 0]
      for name, source in build.sources(ctx.config).items()
      if source
    },
    coarse_reference=coarsen(reference),
    reference=reference,
    floor=stretches(ctx, "hfhr", "floor", most)[..., 0],
    seams=plan.seams,
    spacing=ctx.config.data.spacing,
  )


def report_provenance(ctx: Context) -> dict:
  """Who made the report's numbers: command, config, versions, times, which rows were seen in a fit."""
  c = ctx.config
  coarse = ["lflr", *c.debias.maps]
  times = {}
  for name in ("data", "debias", "train", "samples"):
    times[name] = files.read_json(ctx.folder(name) / stage_folder.MARKER).get("seconds")
  return {
    "config_hash": stage_folder.config_hash(stages.identity(c, "report")),
    "config": stage_folder.plain(c),
    "versions": provenance.versions(),
    "commit": provenance.commit(),
    "command": ctx.command,
    "times": times,
    "cost": cost(ctx),
    "seeds": {"config.seed": c.seed},
    "sizes": {"debias.points": c.debias.points},
    "rows": dict.fromkeys((*coarse, *build.sources(c), f"{c.debias.map}+cubic"), "held-out")
    | {f"{name} in-sample": "in-sample" for name in coarse if name != "lflr"},
  }


def cost(ctx: Context) -> dict[str, dict]:
  """{stage: what it made, how many of them, seconds and devices of all its calls}, as markers and
  stores have it.
  """
  made = {
    "data": sum(split.num_examples for w in ("hfhr", "lflr") for split in _splits(ctx, w)),
    "train": files.read_json(ctx.folder("train") / stage_folder.MARKER)["summary"]["steps"],
    "samples": sum(
      files.read_json(ctx.folder("samples") / f"{name}.units" / stage_folder.MARKER)["summary"][
        "fields"
      ]
      for name in build.sources(ctx.config)
    ),
  }
  rows = {}
  for stage, count in made.items():
    marker = files.read_json(ctx.folder(stage) / stage_folder.MARKER)
    rows[stage] = {
      "count": count,
      "seconds": marker.get("seconds"),
      "devices": marker.get("devices", []),
    }
  rows["train"]["batch"] = ctx.config.train.batch
  if steps := metric_writer.read_scalars(ctx.folder("train"), "seconds_per_step", "speed")[1]:
    rows["train"]["median"] = float(np.median(steps))
  return rows


def _splits(ctx: Context, which: str):
  return build.dataset(ctx.config, ctx.workdir, which).info.splits.values()


def pipeline_job(ctx: Context) -> str:
  """All jobs in order; what is finished is skipped, what is broken off goes on."""
  done = ctx.done("report")
  for name in ("generate", "debias", "train", "sample", "evaluate"):
    progress.say(f"{name}: {run(name, ctx)}")
  if done and meshes.is_main():  # else evaluate has just printed it
    print(terminal.summary(files.read_json(ctx.folder("report") / "metrics.json")))
  return f"report: {ctx.folder('report') / 'report.html'}"


# Job -> (its stage, what does it).
JOBS = {
  "generate": ("data", generate_job),
  "debias": ("debias", debias_job),
  "train": ("train", train_job),
  "sample": ("samples", sample_job),
  "evaluate": ("report", evaluate_job),
  "pipeline": (None, pipeline_job),
}
NAMES = tuple(JOBS)


def run(name: str, ctx: Context) -> str:
  """Does a job, or says that it is done."""
  stage, job = JOBS[name]
  if stage and ctx.done(stage, besides=True):
    return f"{name} is done already, in {ctx.folder(stage)}"
  if ctx.stop():
    raise supervision.Interrupted(f"stopped before {name}")
  return job(ctx)
