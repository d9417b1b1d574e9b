"""The command line: parse, build, call.

  downscaling JOB --config=configs/ks.py[:VARIANT] --workdir=DIR [--config.key=value ...] [--dry_run] [--traceback]

JOB is generate, debias, train, sample, evaluate, or pipeline for all of them in order. Ends with exit code 0; 1 and a
one-line error; or 143 after SIGTERM, with everything saved.
"""

import itertools
import os
import pathlib
import shlex
import sys
import threading
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "Config file, e.g. configs/ks.py:quick. It is Python and is executed.")
flags.DEFINE_string("workdir", None, "Folder of the run; made if absent, gone on with if it is there.")
flags.DEFINE_bool("dry_run", False, "Print the plan (devices, shapes, memory, disk, steps) and stop.")
flags.DEFINE_enum("distributed", "off", ["on", "off"], "Join the processes that a launcher started.")
flags.DEFINE_bool("traceback", False, "On an error, show where it was raised.")

# What a user can mend; anything else is a defect of ours and keeps its traceback.
EXPECTED = (ValueError, FileNotFoundError, FileExistsError, FloatingPointError, OSError)


def run() -> None:
  """Entry point of the `downscaling` command."""
  if {"--help", "-h"} & {*sys.argv[1:]}:
    print(__doc__)
    sys.exit(0)
  if "--traceback" not in sys.argv:
    hush()
  try:
    app.run(main, flags_parser=parse)
  except SystemExit as end:
    if end.code and "--traceback" not in sys.argv:
      sys.stdout.flush()
      os._exit(end.code)  # not by way of the threads that orbax and TensorBoard join, which may still be failing
    raise


def hush() -> None:
  """Keeps tracebacks of background writers off the terminal, hundreds on a full disk; the error itself is raised."""

  def expected(error) -> bool:
    return any(sign in str(error) for sign in ("No space left", "quota exceeded", "Event loop is closed"))

  in_thread, in_callback = threading.excepthook, sys.unraisablehook
  threading.excepthook = lambda args: None if expected(args.exc_value) else in_thread(args)
  sys.unraisablehook = lambda args: None if expected(args.exc_value) else in_callback(args)


def parse(argv: list[str]) -> list[str]:
  """Reads the flags and returns the other arguments; what cannot be read ends the program with one line."""
  given = [b for a, b in itertools.pairwise(argv) if a == "--config"]
  given += [a.partition("=")[2] for a in argv if a.startswith("--config=")]
  if missing := [g for g in given if not pathlib.Path(g.partition(":")[0]).is_file()]:
    fail(f"--config={missing[0]}: there is no such file in {pathlib.Path.cwd()}. E.g. --config=configs/ks.py:quick")
  try:
    return FLAGS(argv)
  except Exception as error:  # a config is the user's Python: it can raise anything
    if "--traceback" in argv:
      raise
    fail(explain(error, argv))


def explain(error: Exception, argv: list[str]) -> str:
  """One line for an error that parsing raised."""
  while error.args and isinstance(error.args[0], Exception):  # ml_collections wraps what it passes on
    error = error.args[0]
  text = str(error.args[0] if error.args else error)
  lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
  if isinstance(error, KeyError | AttributeError) and "get_config" not in text:
    key = lines[0].strip("'\"")
    where = next((a for a in argv if a.startswith("--config.") and key in a.partition("=")[0].split(".")), "--config")
    return f"{where}: the config has no key {key!r}. {' '.join(lines[1:]) or 'Its keys stand in the config file.'}"
  if isinstance(error, SyntaxError):
    return f"--config: {error.filename}, line {error.lineno}: {error.msg}"
  if isinstance(error, flags.Error):
    return lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"  # between them stands a traceback
  return f"--config: {type(error).__name__}: {lines[-1]}"


def main(argv: list[str]) -> None:
  # orbax tells every step at INFO, and at ERROR what it then raises.
  logging.set_verbosity(logging.INFO if FLAGS.traceback else logging.FATAL)
  job = argv[-1]
  for name in ("config", "workdir") if len(argv) == 2 else ():
    if getattr(FLAGS, name) in (None, ""):  # an unset shell variable gives ""
      fail(f"{job} needs --{name}. E.g. downscaling {job} --config=configs/ks.py --workdir=runs/ks")
  # Imported late: a typo in a flag is answered at once, and nothing touches a device before the processes have joined.
  from downscaling import build, jobs, plans
  from downscaling.common import mesh as meshes
  from downscaling.common import runs

  if len(argv) != 2 or argv[1] not in jobs.NAMES:
    came = " ".join(argv[1:]) or "nothing"
    example = "downscaling pipeline --config=configs/ks.py --workdir=runs/ks"
    fail(f"{came} came, need one job: {', '.join(jobs.NAMES)}. E.g. {example}")
  try:
    meshes.start(FLAGS.distributed)
    with runs.polite_stop() as stop:
      context = jobs.Context(
        config=FLAGS.config,
        workdir=pathlib.Path(FLAGS.workdir).expanduser().absolute(),
        mesh=meshes.make(**FLAGS.config.mesh),
        stop=stop,
        command=shlex.join(["downscaling", *sys.argv[1:]]),
      )
      build.check(context.config, context.mesh)
      with runs.full_disk_in_words(context.workdir, "what is finished is whole"):
        runs.say(f"downscaling {job}: {plans.describe(job, context) if FLAGS.dry_run else jobs.run(job, context)}")
  except runs.Interrupted as interrupted:
    print(f"downscaling {job}: {interrupted}; run the same command to go on.", file=sys.stderr)
    sys.exit(143)
  except EXPECTED as error:
    if FLAGS.traceback:
      raise
    fail(f"{job}: {error}")


def fail(text: str) -> NoReturn:
  print("downscaling:", " ".join(line.strip() for line in text.splitlines()), file=sys.stderr)
  sys.exit(1)
