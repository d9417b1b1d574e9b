"""The job `evaluate`: measures everything against held-out truth and writes the report."""

import pathlib

import numpy as np

from downscaling.assembly import debiasing, samples, time_series, worlds
from downscaling.baselines import interpolation
from downscaling.debias import maps
from downscaling.experiment import Experiment
from downscaling.jobs import rows
from downscaling.jobs.job import Item, Job
from downscaling.jobs.workdir import Workdir, readable
from downscaling.metrics import bootstrap, ensembles, increments, pairs
from downscaling.metrics.ensembles import Ensemble, frames_as_rows
from downscaling.report import results, terminal, writer
from downscaling.runtime import (
  files,
  metric_writer,
  processes,
  provenance,
  stage_folder,
)
from downscaling.runtime import mesh as meshes
from downscaling.sampling import ensemble

REPORT_BYTES = 5e6
COPIES = 8  # of the rows, in float64 or complex64, that a comparison makes
TILES = 16  # products, distances and kernels of a tile, of two programs


class Evaluate(Job):
  """metrics.json, the figures and report.html, which process 0 writes."""

  name, stage = "evaluate", "report"
  libraries = 190e6

  def run(self) -> str:
    work, e = self.work, self.experiment
    work.need("samples", "sample")
    for name, job in (("data", "generate"), ("debias", "debias"), ("train", "train")):
      work.need(name, job)
    stage = work.stage(self.stage)

    def measure():
      channels = worlds.domain(e).channels
      if len(channels) == 1:
        print(terminal.summary(writer.write(stage.path, evidence_of(work))))
        return
      for place, channel in enumerate(channels):
        (stage.path / channel.name).mkdir(exist_ok=True)
        found = writer.write(stage.path / channel.name, evidence_of(work, place))
        print(f"{channel.name}:\n{terminal.summary(found)}")
      writer.write_index(
        stage.path, e.experiment, [channel.name for channel in channels]
      )

    # The report's files are written at the end, whole or not at all: nothing is lost by a stop.
    main = meshes.is_main()
    quiet = work.stop.interruptible("evaluating") if main else work.stop.waiting()
    html = stage.path / "report.html"
    with work.owned(stage):
      with quiet:
        processes.main_only("evaluate", measure)
      work.finish(stage, html=str(html), extent=e.extent())
    return f"wrote {html} ({e.experiment}); open it in a browser"

  def lines(self) -> list[str]:
    e = self.experiment
    return [
      f"{len(e.debias.maps) + 1} coarse rows and sets {', '.join(samples.sources(e))} against "
      f"{e.evaluate.reference} held-out true fields; {e.evaluate.draws} bootstrap replicates"
    ]

  def held(self) -> list[Item]:
    e, space = self.experiment, worlds.space(self.experiment)
    fine, coarse = 4 * int(np.prod(space)), 4 * int(np.prod(worlds.operator(e).coarse))
    block = e.sampling
    sets = samples.sources(e)
    # One member of each condition is kept; the others are read a block at a time.
    judged = sum(block.conditions for source in sets.values() if source)
    if "unconditional" in sets:
      judged += block.unconditional.fields
    true = e.evaluate.reference + len(rows.floor(e)) + block.conditions
    members = block.conditions * block.members * block.series.frames
    tile = min(pairs.TILE, e.evaluate.reference)
    before_and_after = 2 * (len(e.debias.maps) + 1) * e.debias.held_out
    return [
      Item("a member of each condition", fine * judged * block.series.frames),
      Item(
        "members of a block of conditions", 2 * min(ensembles.BLOCK * 4, fine * members)
      ),
      Item("true fields", fine * true),
      Item("coarse rows", coarse * (before_and_after + e.evaluate.reference)),
      Item("moments and waves of rows", COPIES * 2 * fine * e.evaluate.reference),
      Item("tiles of pairs of rows", TILES * 4 * tile**2),
    ]

  def written(self) -> list[Item]:
    return [Item("of tables and figures", REPORT_BYTES)]


def interpolated_sets(experiment: Experiment) -> dict[str, str]:
  """{NAME+cubic: the map NAME}: sets that add no small scales, and are drawn by nobody.

  They are behind the default map, and behind quantile mapping where it is fitted. That is BCSD, but
  for its fine climatology: here the mean field is interpolated, too.
  """
  debias = experiment.debias
  behind = (debias.map, *(name for name in debias.maps if name in maps.QUANTILE))
  return {f"{name}+cubic": name for name in behind}


def evidence_of(work: Workdir, channel: int = 0) -> results.Evidence:
  """Everything the report of one channel is made from, read back from the work folder."""
  e, op = work.experiment, worlds.operator(work.experiment)
  length, default = e.sampling.series.frames, e.debias.map
  domain = worlds.domain(e)
  periodic = tuple(axis.periodic for axis in domain.axes)

  def coarsen(x):
    return np.asarray(op.apply(x[..., None]))[..., 0]

  def interpolated(y):
    return interpolation.cubic(y[..., None], op, periodic=periodic)[..., 0]

  reference = rows.judged(e, "hfhr", "reference", e.evaluate.reference)
  fine = rows.of(work, "hfhr", "reference", reference).read()[..., channel]
  floor = rows.of(work, "hfhr", "floor", rows.floor(e)).read()[..., channel]
  truth = rows.true_fields(work, e.sampling.conditions)[..., channel]
  held_out = _ordered(work, rows.mapped(work, "held_out"), channel)
  fitted = _ordered(work, rows.mapped(work, "in_sample"), channel)
  drawn, conditions, misfits, in_time = _drawn(work, channel)
  for cubic, source in interpolated_sets(e).items():
    behind = rows.condition_fields(work, source)[..., channel]
    conditions[cubic] = time_series.as_rows(behind, e, 1)
    drawn[cubic] = Ensemble.of(interpolated(conditions[cubic])[:, None])
  known = {"true+diffusion"} & {*drawn}  # sets of which the truth is known
  guesses = {n: interpolated(conditions[n]) for n in known}
  diagnostics = files.read_json(work.folder("debias") / "diagnostics.json")
  facts = diagnostics["maps"]
  targets = "effective_targets"
  solve = facts.get("entropic") or {}
  return results.Evidence(
    experiment=e.experiment,
    default=default,
    coarse=held_out | {f"{n} in-sample": x for n, x in fitted.items() if n != "lflr"},
    sources={f"{n} in-sample": fitted["lflr"] for n in fitted if n != "lflr"},
    origins=_origins(work, drawn, len(fine)),
    step=None if length == 1 else e.data.spacing,
    draws=e.evaluate.draws,
    seed=e.seed,
    quadratic=debiasing.quadratic(e),
    effective_targets={
      n: found[targets] for n, found in facts.items() if targets in found
    },
    health=diagnostics.get("health", []),
    coarse_reference=coarsen(fine),
    coarse_floor=coarsen(floor),
    domain=domain,
    coarse_domain=worlds.coarse_domain(e),
    group=worlds.group(e),
    coarse_moves=worlds.coarse_moves(e) if worlds.shifts_freely(e) else None,
    moves=worlds.moves(e) if worlds.shifts_freely(e) else None,
    samples=drawn,
    conditions=conditions,
    misfits=misfits,
    truth={n: time_series.as_rows(truth, e, 1) for n in known},
    series=None if length == 1 else _in_time(work, in_time, truth, coarsen, channel),
    guesses=guesses,
    fine_reference=fine,
    fine_floor=floor,
    operator=op,
    history=solve.get("history"),
    mean_cost=solve.get("mean_cost"),
    threshold=solve.get("threshold"),
    loss=metric_writer.read_scalars(work.folder("train"), "loss"),
    symbol=e.physics.SYMBOL
    if len(domain.channels) == 1
    else domain.channels[channel].name,
    length=worlds.fine_solver(e).length,
    provenance=report_provenance(work),
  )


def _ordered(
  work: Workdir, stored: dict[str, np.ndarray], channel: int
) -> dict[str, np.ndarray]:
  """Rows of the report, of one channel: lflr, the default map, the other maps."""
  first = ("lflr", work.experiment.debias.map)
  names = [*first, *(name for name in stored if name not in first)]
  return {name: stored[name][..., channel] for name in names}


def _drawn(work: Workdir, channel: int) -> tuple[dict, dict, dict, dict]:
  """Of each set: samples as rows, conditions as rows, misfits, samples with their axis of time.

  No samples are read yet.
  """
  e = work.experiment
  found, conditions, misfits, in_time = {}, {}, {}, {}
  for name, source in samples.sources(e).items():
    path = work.folder("samples") / f"{name}.zarr"
    in_time[name] = _members(path, channel, "condition" if source else "member")
    with readable(path, "sample"):
      stored = ensemble.read(path)
      if "misfit" in stored:
        misfits[name] = np.asarray(stored["misfit"])
    found[name] = in_time[name]
    if e.sampling.series.frames > 1:
      found[name] = frames_as_rows(in_time[name])
      if name in misfits:  # a series has one, its frames share it
        misfits[name] = misfits[name].repeat(e.sampling.series.frames, axis=0)
    if source:
      behind = rows.condition_fields(work, source)[..., channel]
      conditions[name] = time_series.as_rows(behind, e, 1)
  return found, conditions, misfits, in_time


def _members(path: pathlib.Path, channel: int, rows_along: str) -> Ensemble:
  """The samples of a store, one channel, read a block of rows at a time.

  rows_along: "condition"; or "member" of a set without conditions, each of which becomes a row.
  """
  with readable(path, "sample"):
    stored = ensemble.read(path)["sample"]
    if "channel" in stored.dims:
      stored = stored.isel(channel=channel)
    other = {"condition": "member", "member": "condition"}[rows_along]
    stored = stored.transpose(rows_along, other, ...)

  def read(numbers: np.ndarray) -> np.ndarray:
    with readable(path, "sample"):
      return stored.isel({rows_along: numbers}).to_numpy()

  return Ensemble(read, stored.shape)


def _origins(work: Workdir, drawn: dict, reference: int) -> dict[str, bootstrap.Rows]:
  """Trajectory and time of every row that is judged, and of the true rows that judge it."""
  e = work.experiment
  held = rows.judged(e, "lflr", "test", e.debias.held_out)
  fitted = rows.balanced(e, "lflr", "train", e.debias.points)[rows.in_sample(work)]
  numbers = dict.fromkeys(("lflr", *e.debias.maps), held)
  numbers |= {f"{name} in-sample": fitted for name in e.debias.maps}
  for name, source in samples.sources(e).items():
    if source:
      numbers[name] = rows.conditions(e, source)
  for name, source in interpolated_sets(e).items():
    numbers[name] = rows.conditions(e, source)
  numbers["reference"] = rows.judged(e, "hfhr", "reference", reference)
  numbers["floor"] = rows.floor(e)
  found = {
    name: rows.origin(e, of_name.reshape(-1)) for name, of_name in numbers.items()
  }
  if "unconditional" in drawn:
    found["unconditional"] = _without_origin(work, len(drawn["unconditional"]))
  return found


def _without_origin(work: Workdir, count: int) -> bootstrap.Rows:
  """Rows that were drawn without a condition: each a trajectory of its own.

  The prior knows fields of all times alike, so that they get the times in turn.
  """
  e, number = work.experiment, np.arange(count)
  length = e.sampling.series.frames
  if length > 1:
    return bootstrap.Rows(number // length, e.data.spacing * (number % length))
  return bootstrap.Rows(number, rows.origin(e, number % e.data.snapshots).time)


def _in_time(
  work: Workdir, drawn: dict, truth: np.ndarray, coarsen, channel: int
) -> increments.Series:
  """What the report knows of time. truth: [K, L, *space]."""
  e = work.experiment
  plan, most = time_series.plan(e), max(map(len, drawn.values()))
  count = -(-e.evaluate.reference // plan.series)
  reference = rows.stretches(work, "hfhr", "reference", count)[..., channel]
  sets = samples.sources(e).items()
  return increments.Series(
    samples=drawn,
    truth={name: truth for name in ("true+diffusion",) if name in drawn},
    conditions={n: rows.condition_fields(work, s)[..., channel] for n, s in sets if s},
    coarse_reference=coarsen(reference),
    reference=reference,
    floor=rows.stretches(work, "hfhr", "floor", most)[..., channel],
    seams=plan.seams,
    spacing=e.data.spacing,
  )


# ---------------------------------------------------------------- where numbers come from


def report_provenance(work: Workdir) -> dict:
  """Who made the report's numbers: command, config, versions, times, which rows a fit has seen."""
  e = work.experiment
  coarse = ["lflr", *e.debias.maps]
  stages = {name: work.look(name) for name in ("data", "debias", "train", "samples")}
  held_out = dict.fromkeys(
    (*coarse, *samples.sources(e), *interpolated_sets(e)), "held-out"
  )
  in_sample = {f"{name} in-sample": "in-sample" for name in coarse if name != "lflr"}
  return {
    "config_hash": stage_folder.config_hash(e.identity("report")),
    "config": stage_folder.plain(e.everything()),
    "versions": provenance.versions(),
    "commit": provenance.commit(),
    "command": work.command,
    "times": {name: stage.seconds for name, stage in stages.items()},
    "cost": cost(work),
    "seeds": {"config.seed": e.seed},
    "sizes": {"debias.points": e.debias.points},
    "rows": held_out | in_sample,
  }


def cost(work: Workdir) -> dict[str, dict]:
  """{stage: what it made, how many of them, seconds and devices of all its calls}.

  Markers and stores say so.
  """
  e = work.experiment
  sets = [work.folder("samples") / f"{name}.units" for name in samples.sources(e)]
  drawn = [
    files.read_json(path / stage_folder.MARKER)["summary"]["fields"] for path in sets
  ]
  snapshots = 0
  for which in ("hfhr", "lflr"):
    splits = worlds.dataset(e, work.path, which).info.splits.values()
    snapshots += sum(split.num_examples for split in splits)
  made = {
    "data": snapshots,
    "train": work.look("train").summary["steps"],
    "samples": sum(drawn),
  }
  found = {}
  for name, count in made.items():
    stage = work.look(name)
    found[name] = {"count": count, "seconds": stage.seconds, "devices": stage.devices}
  found["train"]["batch"] = e.train.batch
  steps = metric_writer.read_scalars(work.folder("train"), "seconds_per_step", "speed")[
    1
  ]
  if steps:
    found["train"]["median"] = float(np.median(steps))
  return found
