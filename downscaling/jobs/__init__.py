"""The jobs of the command line, a file each: what it reads, does and writes, and its dry run.

Rooms meet here, and on disk only. Every job opens its stage, which refuses a folder of another
config; skips the stage if it is complete; and says in one line what it wrote and what to run next.
"""

import dataclasses

import jax

from downscaling.jobs.debias import Debias
from downscaling.jobs.evaluate import Evaluate
from downscaling.jobs.generate import Generate
from downscaling.jobs.job import Job
from downscaling.jobs.sample import Sample
from downscaling.jobs.train import Train
from downscaling.jobs.workdir import Workdir
from downscaling.report import terminal
from downscaling.runtime import files, progress, supervision
from downscaling.runtime import mesh as meshes

__all__ = ["JOBS", "NAMES", "PIPELINE", "Job", "Workdir", "plan", "run"]

# In the order in which `pipeline` runs them.
JOBS: dict[str, type[Job]] = {
  job.name: job for job in (Generate, Debias, Train, Sample, Evaluate)
}
PIPELINE = "pipeline"
NAMES = (*JOBS, PIPELINE)


def run(name: str, work: Workdir) -> str:
  """Does a job, or says that it is done. Returns one line about it.

  Raises: supervision.Interrupted if a stop was asked for; whatever the job raises.
  """
  for each in JOBS if name == PIPELINE else (name,):
    JOBS[each](work).check()
  return _pipeline(work) if name == PIPELINE else _one(name, work)


def _one(name: str, work: Workdir) -> str:
  """Does one job, or says that it is done."""
  job = JOBS[name](work)
  if work.done(job.stage, optional=True):
    return f"{name} is done already, in {work.folder(job.stage)}"
  if work.stop():
    raise supervision.Interrupted(f"stopped before {name}")
  return job.run()


def _pipeline(work: Workdir) -> str:
  """All jobs in order; finished ones are skipped, interrupted ones continue."""
  report = work.folder("report")
  done = work.done("report")
  for name in JOBS:
    progress.say(f"{name}: {_one(name, work)}")
  if done and meshes.is_main():  # else evaluate has just printed it
    print(terminal.summary(files.read_json(report / "metrics.json")))
  return f"report: {report / 'report.html'}"


def plan(name: str, work: Workdir) -> str:
  """The dry run of a job, several lines; nothing is written.

  Memory of compiled programs is the compiler's own account of the very program that would run, on
  the devices here or on others for which there is a compiler here (runtime/target_devices.py).
  """
  mesh = work.mesh
  kinds = sorted({device.device_kind for device in mesh.devices.flat})
  elsewhere = meshes.platform(mesh) != jax.default_backend()
  if elsewhere and work.experiment.model.convolution == "auto":
    # As "auto" is on all but a CPU; it goes by the devices here.
    experiment = work.experiment.changed(**{"model.convolution": "lax"})
    work = dataclasses.replace(work, experiment=experiment)
  lines = [
    "dry run, nothing is written",
    f"devices    {mesh.size} × {', '.join(kinds)}, {meshes.hosts(mesh)} process(es), mesh "
    f"{dict(mesh.shape)}",
    f"workdir    {work.path}",
  ]
  for job in JOBS if name == PIPELINE else (name,):
    JOBS[job](work).check()
    lines += [job, *(f"  {line}" for line in JOBS[job](work).plan())]
  return "\n".join(lines)
