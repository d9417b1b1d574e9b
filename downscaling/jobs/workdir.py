"""A run's work folder as the jobs see it: its stages, and which of them are done."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Iterator

import jax

from downscaling import experiment as experiments
from downscaling.assembly import samples
from downscaling.diffusion import error_table
from downscaling.experiment import Experiment
from downscaling.fields import statistics
from downscaling.runtime import processes, products, stage_folder, supervision

# Stage -> files that later jobs read. If one was moved away, the job makes it again from what the
# stage still holds. Maps and sets of samples are named by the config.
PRODUCTS = {
  "data": ("statistics.npz",),
  "debias": ("held_out.zarr", "in_sample.zarr", "calibration.zarr", "diagnostics.json"),
  "train": ("prior",),
  "samples": (),
  "report": ("report.html", "metrics.json"),
}
# Optional outputs of a job. If one is missing, the job runs again and makes only that one.
OPTIONAL = {"train": (error_table.FILE,)}
# Stages that grow from one call to the next.
GROWING = ("samples", "report")


@dataclasses.dataclass(frozen=True)
class Workdir:
  """A work folder, and what every job needs beside it.

  experiment: typed config. path: of the folder. mesh: of all devices. stop: see
  runtime/supervision.py. command: as typed, for the report. tracker: one of trackers.KINDS.
  """

  experiment: Experiment
  path: pathlib.Path
  mesh: jax.sharding.Mesh
  stop: supervision.Stop
  command: str = ""
  tracker: str = "none"

  def folder(self, name: str) -> pathlib.Path:
    """Where a stage lies."""
    return self.experiment.folder(self.path, name)

  def stage(self, name: str) -> stage_folder.Stage:
    """Opens a stage, and makes it if it is new. Raises as stage_folder.open_stage does."""

    def opened():
      return stage_folder.open_stage(
        self.folder(name),
        name,
        self.experiment.identity(name),
        about={"experiment": self.experiment.differences()},
        converted=functools.partial(experiments.first_schema, name),
        defaults=self.experiment.defaults(),
      )

    return processes.main_first(f"stage/{name}", opened)

  def look(self, name: str) -> stage_folder.Stage:
    """A stage as it lies there. Unlike `stage`, one process may call it alone."""
    return stage_folder.Stage(self.folder(name), name, {}, "")

  def done(self, name: str, optional: bool = False) -> bool:
    """Is the stage complete, and are all files there that later jobs read?

    optional: ask for the optional files as well. No folder is made for the question.
    Raises: as stage_folder.open_stage does, if there is a folder.
    """
    if stage_folder.lost(self.folder(name)):
      self.stage(name)  # which says what to type
    files = [*PRODUCTS[name], *self._named_by_config(name)]
    if optional:
      files += OPTIONAL.get(name, ())
    there = [
      (self.folder(name) / file).exists() for file in (stage_folder.MARKER, *files)
    ]
    # All processes must answer alike, so that they take what process 0 sees.
    marked, *products = processes.gather(f"done/{name}", there)[0]
    if not marked:
      return False
    stage = self.stage(name)
    grown = name in GROWING and stage.summary.get("extent") != self.experiment.extent()
    return stage.complete and all(products) and not grown

  def _named_by_config(self, name: str) -> list[str]:
    if name == "debias":
      return [f"{each}/map.json" for each in self.experiment.debias.maps]
    if name == "samples":
      sets = samples.sources(self.experiment)
      return [f"{each}.{kind}" for each in sets for kind in ("zarr", "units")]
    return []

  def need(self, name: str, job: str) -> stage_folder.Stage:
    """A finished stage. Raises FileNotFoundError naming the job that makes it."""
    if not self.done(name):
      raise FileNotFoundError(
        f"{self.folder(name)} is missing or unfinished: run `downscaling {job}` first, with the "
        "same --config and --workdir (or `downscaling pipeline`, which does all that is missing)."
      )
    stage = self.stage(name)
    wrong = processes.main_only(f"products of {name}", stage.changed)
    if wrong:
      raise products.Damaged(
        f"{stage.path}: {products.words(wrong)}. Put it back; or `downscaling verify {self.path} "
        f"--repair` moves it aside, and `downscaling {job}` makes it again."
      )
    return stage

  @contextlib.contextmanager
  def owned(self, stage: stage_folder.Stage) -> Iterator[None]:
    """The block in which this job alone works on a stage; see stage_folder.Stage.owned."""
    with stage.owned(lost=self.stop.end):
      yield

  def finish(self, stage: stage_folder.Stage, **summary) -> None:
    """Marks a stage complete. Every process calls it, and reads its share of the products."""
    with self.stop.waiting():
      stage.finish(**summary)

  def statistics(self) -> statistics.Statistics:
    """Mean, deviation and spectrum of the fine training fields."""
    return statistics.load(self.folder("data") / "statistics.npz")


@contextlib.contextmanager
def readable(path: pathlib.Path, job: str) -> Iterator[None]:
  """Turns whatever zarr and its codecs raise for a damaged store into words and advice."""
  try:
    yield
  except products.Damaged:
    raise
  except Exception as error:  # each codec has its own kinds
    words = (str(error).splitlines() or [""])[0][:120]
    raise ValueError(
      f"{path} cannot be read ({type(error).__name__}: {words}): move it away and run `downscaling "
      f"{job}` again."
    ) from error
