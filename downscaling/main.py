"""The command line: parse, build, call.

    downscaling JOB --config=NAME[:VARIANT] --workdir=DIR [--config.key=value ...]
                    [--distributed=auto|on|off]
                    [--dry_run [--devices=N|v5e:16x16|h200:8]] [--traceback]

    downscaling status WORKDIR
    downscaling verify WORKDIR [--repair]

JOB is generate, debias, train, sample, evaluate, or pipeline for all of them in order. NAME is a
built-in config (ks, kolmogorov) or a file (configs/ks.py). `doctor` looks at processes, devices and
folders and says what to mend. `status` says how far each stage is, and where its time went.
`verify` reads every file, says what is damaged and what to type, and mends it if told to.

Exit code 0 is success; 1 comes with a one-line error; 143 means stopped by a signal with everything
saved (SIGTERM, SIGINT, SIGUSR1, SIGUSR2, SIGHUP, SIGXCPU); 75 means a hang. After 143 and 75 the
same command continues.
"""

import functools
import os
import pathlib
import re
import shlex
import sys
import threading
from typing import NoReturn

from absl import app, flags, logging

from downscaling import config_files
from downscaling.runtime import streams, supervision, trackers

FLAGS = flags.FLAGS
flags.DEFINE_string(
  "config",
  None,
  "A built-in config, e.g. ks:quick, or a file, e.g. configs/ks.py:quick, which is Python and is "
  "executed. Every key can be overridden: --config.train.batch=64.",
)
flags.DEFINE_string(
  "workdir", None, "Folder of the run; it is made, or continued if it is there."
)
flags.DEFINE_bool(
  "dry_run", False, "Print the plan (devices, shapes, memory, disk, steps) and stop."
)
flags.DEFINE_string(
  "devices", None,
  "With --dry_run: plan for devices that are not here: a number of virtual CPU devices, or, by "
  "their own compiler, a slice of Cloud TPU, as v5e:16x16, or GPUs, as h200:8 or h200:4x8 (hosts x "
  "GPUs).",
)  # fmt: skip
flags.DEFINE_enum(
  "distributed", "auto", ["auto", "on", "off"],
  "Join the processes that a launcher (Slurm, Open MPI, GKE, Cloud TPU) started: if there are "
  "any; always; never.",
)  # fmt: skip
flags.DEFINE_enum(
  "tracker", trackers.KINDS[0], trackers.KINDS,
  "Tell the numbers of training to Weights & Biases or MLflow as well; their variables say where.",
)  # fmt: skip
flags.DEFINE_bool(
  "repair", False, "verify: mend what can be mended; nothing is deleted."
)
flags.DEFINE_bool("traceback", False, "On an error, show where it was raised.")

# Errors that a user can mend. Any other is a defect of ours and keeps its traceback.
EXPECTED = (
  ValueError,
  FileNotFoundError,
  FileExistsError,
  FloatingPointError,
  OSError,
  supervision.PeerFailed,
)
# How to reduce memory use, appended to out-of-memory errors.
LESS_MEMORY = (
  "A device needs less with a larger --config.memory.microbatches, --config.memory.remat or "
  "--config.mesh.fsdp (train), a smaller --config.sampling.unit (sample, in another "
  "--config.label), --config.debias.path=fused or ring."
)
HARMLESS = ("No space left", "quota exceeded", "Event loop is closed")


def run() -> None:
  """Entry point of the `downscaling` command."""
  streams.unbreakable()
  if {"--help", "-h"} & {*sys.argv[1:]}:
    print(__doc__)
    sys.exit(0)
  if "--traceback" not in sys.argv:
    hush()
  overrides: dict = {}
  parser = functools.partial(parse, overrides=overrides)
  try:
    with supervision.Stop() as stop:
      app.run(
        functools.partial(main, stop=stop, overrides=overrides), flags_parser=parser
      )
  except SystemExit as end:
    if end.code and "--traceback" not in sys.argv:
      sys.stdout.flush()
      # Without joining the threads of orbax and TensorBoard, which may still be failing.
      os._exit(end.code if isinstance(end.code, int) else 1)
    raise


def hush() -> None:
  """Keeps tracebacks of background writers off the terminal: a full disk gives hundreds.

  The error itself is raised.
  """
  in_thread, in_callback = threading.excepthook, sys.unraisablehook

  def expected(error) -> bool:
    return any(sign in str(error) for sign in HARMLESS)

  def of_thread(args):
    if not expected(args.exc_value):
      in_thread(args)

  def of_callback(args):
    if not expected(args.exc_value):
      in_callback(args)

  threading.excepthook, sys.unraisablehook = of_thread, of_callback


def parse(argv: list[str], overrides: dict) -> list[str]:
  """Reads the flags and returns the other arguments.

  --config.key=value goes into `overrides`. An argument that cannot be read ends the program with
  one line.
  """
  configs, keys, rest = config_files.from_arguments(argv)
  if len(configs) > 1:
    fail(f"--config came {len(configs)} times ({', '.join(configs)}): give one.")
  overrides.update(keys)
  if configs:
    rest.insert(1, f"--config={configs[0]}")
  try:
    return FLAGS(rest)
  except flags.Error as error:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    fail(lines[0])


def main(argv: list[str], stop: supervision.Stop, overrides: dict) -> None:
  # orbax tells every step at INFO, and at ERROR what it then raises.
  logging.set_verbosity(logging.INFO if FLAGS.traceback else logging.FATAL)
  job = argv[-1]
  if argv[1:2] and argv[1] in INSPECTIONS:
    return inspect(argv)
  for name in ("config", "workdir") if len(argv) == 2 and job != "doctor" else ():
    if getattr(FLAGS, name) in (None, ""):  # an unset shell variable gives ""
      fail(
        f"{job} needs --{name}. E.g. downscaling {job} --config=ks --workdir=runs/ks"
      )
  if FLAGS.workdir:
    folder_of(FLAGS.workdir)  # before anything starts
  if FLAGS.devices is not None:
    plan_for(FLAGS.devices)
  with stop.interruptible("starting"):
    experiment = read_experiment(overrides) if FLAGS.config else None
    # Imported late: a typo in a flag is answered at once, and no device is touched before the
    # processes have joined.
    import jax

    from downscaling import jobs
    from downscaling.runtime import joining, processes, progress
    from downscaling.runtime import mesh as meshes

  names = (*jobs.NAMES, "doctor", *INSPECTIONS)
  if len(argv) != 2 or argv[1] not in names:
    came = " ".join(argv[1:]) or "nothing"
    example = "downscaling pipeline --config=ks --workdir=runs/ks"
    fail(f"{came} came, need one job: {', '.join(names)}. E.g. {example}")
  try:
    with stop.interruptible("starting"):
      found = joining.start(FLAGS.distributed)
      meshes.here()
      stop.connect(processes.client(), jax.process_index(), jax.process_count())
    text = doctor(found, experiment) if job == "doctor" else work(job, experiment, stop)
    progress.say(f"downscaling {job}: {text}")
  except supervision.Interrupted as interrupted:
    progress.say(f"downscaling {job}: {interrupted}; run the same command to go on.")
    if jax.process_count() > 1:
      # Together: process 0 holds the service that the others need.
      jax.distributed.shutdown()
    sys.exit(supervision.STOPPED)
  except Exception as error:
    stop.failed(str(error).splitlines()[0] if str(error) else type(error).__name__)
    short = isinstance(
      error, jax.errors.JaxRuntimeError
    ) and "RESOURCE_EXHAUSTED" in str(error)
    if short and not FLAGS.traceback:
      fail(f"{job}: {str(error).splitlines()[0]} {LESS_MEMORY}")
    if FLAGS.traceback or not isinstance(error, EXPECTED):
      raise
    fail(f"{job}: {error}")


INSPECTIONS = ("status", "verify")


def inspect(argv: list[str]) -> None:
  """Looks at a work folder, without devices; ends the program with code 1 if it is damaged."""
  what, *folders = argv[1:]
  folders += [FLAGS.workdir] if FLAGS.workdir else []
  if len(folders) != 1:
    fail(f"{what} needs one work folder. E.g. downscaling {what} runs/ks")
  folder = folder_of(folders[0])
  from downscaling.jobs import status, verify

  try:
    if what == "status":
      return print(streams.printable(status.status(folder)))
    text, well = verify.verify(folder, FLAGS.repair)
  except EXPECTED as error:
    if FLAGS.traceback:
      raise
    fail(f"{what}: {error}")
  print(streams.printable(text))
  if not well:
    fail(f"{what}: {folder} is damaged; see the lines with FIX above.")


def folder_of(folder: str, flag: str = "--workdir") -> pathlib.Path:
  """A folder that was typed, here or on an object store that answers. Ends the program for another
  scheme: it would become a local folder of that name. flag: where it was typed, for the message.
  """
  from downscaling.runtime import files
  from downscaling.runtime.remote_paths import RemotePath

  try:
    found = files.folder(folder)
    if isinstance(found, RemotePath):
      found.reach()
    return found
  except (ValueError, OSError) as error:
    fail(f"{flag}={folder}: {error}")


def read_experiment(overrides: dict):
  """The experiment of --config and of the keys that override it; ends the program otherwise."""
  from downscaling.experiment import Experiment

  try:
    path, variant = config_files.split(config_files.resolve(FLAGS.config))
    given = config_files.read(path, variant)
  except FileNotFoundError as error:
    fail(str(error))
  except SyntaxError as error:
    fail(f"--config: {error.filename}, line {error.lineno}: {error.msg}")
  except Exception as error:  # a config is the user's Python: it can raise anything
    if FLAGS.traceback:
      raise
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    fail(
      f"--config={FLAGS.config}: {type(error).__name__}: {lines[-1] if lines else ''}"
    )
  try:
    return Experiment.of(config_files.merged(given, overrides))
  except ValueError as error:
    if FLAGS.traceback:
      raise
    fail(str(error))


def plan_for(devices: str) -> None:
  """Sets up jax, not imported yet, for --devices; ends the program if that makes no sense."""
  if not FLAGS.dry_run:
    fail(
      f"--devices={devices} is for a plan: add --dry_run. A job takes the devices it finds."
    )
  if not re.fullmatch(r"[1-9]\d*|\w+:\d+(x\d+)*", devices):
    fail(
      f"--devices={devices}: need a number of virtual CPU devices, as 256, a slice of Cloud TPU, "
      "as v5e:16x16, or GPUs, as h200:8."
    )
  os.environ["JAX_PLATFORMS"] = "cpu"
  count = devices if devices.isdigit() else 1
  # There is no GPU here to time kernels on.
  asked = f"--xla_force_host_platform_device_count={count} --xla_gpu_autotune_level=0"
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {asked}"


def work(job: str, experiment, stop: supervision.Stop) -> str:
  """Does the job, or plans it; returns a line about it."""
  from downscaling import checks, jobs
  from downscaling.runtime import (
    files,
    idle_devices,
    processes,
    progress,
    target_devices,
  )
  from downscaling.runtime import mesh as meshes

  missing = trackers.missing(FLAGS.tracker)
  if missing:
    fail(missing)
  with stop.interruptible("starting"):
    processes.same_everywhere(facts(experiment))
    elsewhere = FLAGS.devices and ":" in FLAGS.devices
    devices = target_devices.devices(FLAGS.devices) if elsewhere else None
    if experiment.data.dir:
      folder_of(experiment.data.dir, "--config.data.dir")
    if experiment.train.dir:
      folder_of(experiment.train.dir, "--config.train.dir")
    workdir = jobs.Workdir(
      experiment=experiment,
      path=files.folder(FLAGS.workdir),
      mesh=meshes.make(**experiment.mesh.asdict(), devices=devices),
      stop=stop,
      command=shlex.join(["downscaling", *sys.argv[1:]]),
      tracker=FLAGS.tracker,
    )
    checks.check(experiment, workdir.mesh)
    if FLAGS.dry_run:
      return jobs.plan(job, workdir)
    for problem in idle_devices.problems():
      progress.say(f"downscaling {job}: {problem}")
  stop.silence = experiment.supervision.silence
  with files.full_disk_in_words(workdir.path, "what is finished is whole"):
    return jobs.run(job, workdir)


def facts(experiment) -> dict[str, str]:
  """What must be equal on every process of a job."""
  from downscaling.runtime import provenance, stage_folder

  config = "none"
  if experiment is not None:
    config = stage_folder.config_hash(experiment.differences())
  versions = {
    f"{name} version": version for name, version in provenance.versions().items()
  }
  about = {
    "config hash": config,
    "workdir": str(FLAGS.workdir),
    "code": provenance.commit(),
  }
  return about | versions | compiler_settings()


# What the environment tells jax and XLA, but for what names a process, its hosts and its own files.
_OF_A_PROCESS = (
  "JAX_PROCESS_ID", "JAX_COORDINATOR", "JAX_LOCAL_DEVICE_IDS", "JAX_COMPILATION_CACHE_DIR",
  "JAX_DUMP_", "JAX_LOG", "JAX_DEBUG_LOG",
)  # fmt: skip


def compiler_settings() -> dict[str, str]:
  """{variable: value} of all that may make the same code compute other numbers, or another way."""
  names = [name for name in os.environ if name.startswith("JAX_")]
  names = [name for name in names if not name.startswith(_OF_A_PROCESS)]
  found = {name: os.environ[name] for name in sorted(names)}
  for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
    words = os.environ.get(name, "").split()
    found[name] = " ".join(word for word in words if not word.startswith("--xla_dump"))
  return found


def doctor(found, experiment) -> str:
  """The report; ends the program with code 1 if something is to be mended."""
  from downscaling.runtime import doctor, files, progress
  from downscaling.runtime import mesh as meshes

  mesh = meshes.make(**({} if experiment is None else experiment.mesh.asdict()))
  workdir = files.folder(FLAGS.workdir) if FLAGS.workdir else None
  text, well = doctor.report(found, mesh, workdir, facts(experiment))
  if not well:
    progress.say(text)
    fail("doctor: see the lines with FIX above.")
  return text


def fail(text: str) -> NoReturn:
  """Ends the program with one line on stderr and exit code 1."""
  line = " ".join(line.strip() for line in text.splitlines())
  print("downscaling:", streams.printable(line), file=sys.stderr)
  sys.exit(1)
