"""The command line: parse, build, call.

  downscaling JOB --config=configs/ks.py[:VARIANT] --workdir=DIR [--config.key=value ...] [--distributed=auto|on|off]
                  [--dry_run [--devices=N|v5e:16x16|h200:8]] [--traceback]

JOB is generate, debias, train, sample, evaluate, or pipeline for all of them in order; `downscaling
doctor` looks at processes, devices and folders and says what to mend. Ends with exit code 0; 1 and
a one-line error; 143 after SIGTERM, with everything saved; or 75 after a hang. After 143 and 75 the
same command goes on.
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
from ml_collections import config_flags

from downscaling import config_files
from downscaling.runtime import supervision

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file(
  "config",
  None,
  "A built-in config, e.g. ks:quick, or a file, e.g. configs/ks.py:quick, which is Python and is "
  "executed.",
)
flags.DEFINE_string(
  "workdir", None, "Folder of the run; made if absent, gone on with if it is there."
)
flags.DEFINE_bool(
  "dry_run", False, "Print the plan (devices, shapes, memory, disk, steps) and stop."
)
flags.DEFINE_string(
  "devices", None,
  "With --dry_run: plan for devices that are not here: so many virtual CPU devices, or, by their "
  "own compiler, a slice of Cloud TPU, as v5e:16x16, or GPUs, as h200:8 or h200:4x8 (hosts x "
  "GPUs).",
)  # fmt: skip
flags.DEFINE_enum(
  "distributed", "auto", ["auto", "on", "off"],
  "Join the processes that a launcher (Slurm, Open MPI, GKE, Cloud TPU) started: if there are "
  "any; always; never.",
)  # fmt: skip
flags.DEFINE_bool("traceback", False, "On an error, show where it was raised.")

# What a user can mend; anything else is a defect of ours and keeps its traceback.
EXPECTED = (
  ValueError,
  FileNotFoundError,
  FileExistsError,
  FloatingPointError,
  OSError,
  supervision.PeerFailed,
)


LIGHTER = (  # what to type where a device's memory does not do
  "A device needs less with a larger --config.memory.microbatches, --config.memory.remat or "
  "--config.mesh.fsdp (train), a smaller --config.sampling.unit (sample, in another "
  "--config.label), --config.debias.path=fused or ring."
)


def run() -> None:
  """Entry point of the `downscaling` command."""
  if {"--help", "-h"} & {*sys.argv[1:]}:
    print(__doc__)
    sys.exit(0)
  if "--traceback" not in sys.argv:
    hush()
  try:
    with supervision.Stop() as stop:
      app.run(functools.partial(main, stop=stop), flags_parser=parse)
  except SystemExit as end:
    if end.code and "--traceback" not in sys.argv:
      sys.stdout.flush()
      os._exit(
        end.code
      )  # not by way of the threads that orbax and TensorBoard join, which may still be failing
    raise


def hush() -> None:
  """Keeps tracebacks of background writers off the terminal, hundreds on a full disk; the error
  itself is raised.
  """

  def expected(error) -> bool:
    return any(
      sign in str(error) for sign in ("No space left", "quota exceeded", "Event loop is closed")
    )

  in_thread, in_callback = threading.excepthook, sys.unraisablehook
  threading.excepthook = lambda args: None if expected(args.exc_value) else in_thread(args)
  sys.unraisablehook = lambda args: None if expected(args.exc_value) else in_callback(args)


def parse(argv: list[str]) -> list[str]:
  """Reads the flags and returns the other arguments; what cannot be read ends the program with one
  line.
  """
  try:
    argv = config_files.resolve_flags(argv)
  except FileNotFoundError as error:
    fail(str(error))
  try:
    return FLAGS(argv)
  except Exception as error:  # a config is the user's Python: it can raise anything
    if "--traceback" in argv:
      raise
    fail(explain(error, argv))


def explain(error: Exception, argv: list[str]) -> str:
  """One line for an error that parsing raised."""
  while error.args and isinstance(
    error.args[0], Exception
  ):  # ml_collections wraps what it passes on
    error = error.args[0]
  text = str(error.args[0] if error.args else error)
  lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
  if isinstance(error, KeyError | AttributeError) and "get_config" not in text:
    key = lines[0].strip("'\"")
    where = next(
      (a for a in argv if a.startswith("--config.") and key in a.partition("=")[0].split(".")),
      "--config",
    )
    return f"{where}: the config has no key {key!r}. {' '.join(lines[1:]) or 'Its keys stand in the config file.'}"
  if isinstance(error, SyntaxError):
    return f"--config: {error.filename}, line {error.lineno}: {error.msg}"
  if isinstance(error, flags.Error):
    return (
      lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"
    )  # between them stands a traceback
  return f"--config: {type(error).__name__}: {lines[-1]}"


def main(argv: list[str], stop: supervision.Stop) -> None:
  # orbax tells every step at INFO, and at ERROR what it then raises.
  logging.set_verbosity(logging.INFO if FLAGS.traceback else logging.FATAL)
  job = argv[-1]
  for name in ("config", "workdir") if len(argv) == 2 and job != "doctor" else ():
    if getattr(FLAGS, name) in (None, ""):  # an unset shell variable gives ""
      fail(f"{job} needs --{name}. E.g. downscaling {job} --config=configs/ks.py --workdir=runs/ks")
  if FLAGS.devices is not None:
    plan_for(FLAGS.devices)
  with stop.interruptible("starting"):
    # Imported late: a typo in a flag is answered at once, and no device is touched before the
    # processes have joined.
    import jax

    from downscaling import jobs
    from downscaling.runtime import (
      processes,
      progress,
      supervision,
    )

  names = (*jobs.NAMES, "doctor")
  if len(argv) != 2 or argv[1] not in names:
    came = " ".join(argv[1:]) or "nothing"
    example = "downscaling pipeline --config=configs/ks.py --workdir=runs/ks"
    fail(f"{came} came, need one job: {', '.join(names)}. E.g. {example}")
  try:
    with stop.interruptible("starting"):
      found = processes.start(FLAGS.distributed)
      stop.connect(processes.client(), jax.process_index(), jax.process_count())
    text = doctor(found) if job == "doctor" else work(job, stop)
    progress.say(f"downscaling {job}: {text}")
  except supervision.Interrupted as interrupted:
    progress.say(f"downscaling {job}: {interrupted}; run the same command to go on.")
    if jax.process_count() > 1:
      jax.distributed.shutdown()  # together: process 0 holds what the others lean on
    sys.exit(supervision.STOPPED)
  except Exception as error:
    stop.failed(str(error).splitlines()[0] if str(error) else type(error).__name__)
    short = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    if short and not FLAGS.traceback:
      fail(f"{job}: {str(error).splitlines()[0]} {LIGHTER}")
    if FLAGS.traceback or not isinstance(error, EXPECTED):
      raise
    fail(f"{job}: {error}")


def plan_for(devices: str) -> None:
  """Sets up jax, which is not imported yet, for --devices; what it cannot mean ends the program."""
  if not FLAGS.dry_run:
    fail(f"--devices={devices} is for a plan: add --dry_run. A job takes the devices it finds.")
  if not re.fullmatch(r"[1-9]\d*|\w+:\d+(x\d+)*", devices):
    fail(
      f"--devices={devices}: need a number of virtual CPU devices, as 256, a slice of Cloud TPU, "
      "as v5e:16x16, or GPUs, as h200:8."
    )
  os.environ["JAX_PLATFORMS"] = "cpu"
  count = devices if devices.isdigit() else 1
  # no GPU here to time kernels on
  asked = f"--xla_force_host_platform_device_count={count} --xla_gpu_autotune_level=0"
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {asked}"


def work(job: str, stop: supervision.Stop) -> str:
  """Does the job, or plans it; returns what to say of it."""
  from downscaling import build, jobs, plans
  from downscaling.runtime import (
    files,
    processes,
    target_devices,
  )
  from downscaling.runtime import mesh as meshes

  with stop.interruptible("starting"):
    processes.same_everywhere(facts())
    devices = (
      target_devices.devices(FLAGS.devices) if FLAGS.devices and ":" in FLAGS.devices else None
    )
    context = jobs.Context(
      config=FLAGS.config,
      workdir=pathlib.Path(FLAGS.workdir).expanduser().absolute(),
      mesh=meshes.make(**FLAGS.config.mesh, devices=devices),
      stop=stop,
      command=shlex.join(["downscaling", *sys.argv[1:]]),
    )
    build.check(context.config, context.mesh)
    if FLAGS.dry_run:
      return plans.describe(job, context)
  stop.silence = context.config.supervision.silence
  with files.full_disk_in_words(context.workdir, "what is finished is whole"):
    return jobs.run(job, context)


def facts() -> dict[str, str]:
  """What must be equal on every process of a job."""
  from downscaling.runtime import provenance, stage_folder

  config = stage_folder.config_hash(FLAGS.config) if FLAGS.config is not None else "none"
  return {"config hash": config, "workdir": str(FLAGS.workdir), "code": provenance.commit()} | {
    f"{name} version": version for name, version in provenance.versions().items()
  }


def doctor(found) -> str:
  """The report; ends the program with code 1 if something is to be mended."""
  from downscaling.runtime import doctor, progress
  from downscaling.runtime import mesh as meshes

  mesh = meshes.make(**(FLAGS.config.mesh if FLAGS.config is not None else {}))
  workdir = pathlib.Path(FLAGS.workdir).expanduser().absolute() if FLAGS.workdir else None
  text, well = doctor.report(found, mesh, workdir, facts())
  if not well:
    progress.say(text)
    fail("doctor: see the lines with FIX above.")
  return text


def fail(text: str) -> NoReturn:
  print("downscaling:", " ".join(line.strip() for line in text.splitlines()), file=sys.stderr)
  sys.exit(1)
