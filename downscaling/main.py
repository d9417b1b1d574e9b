"""The command line: parse, build, call.

  downscaling JOB --config=configs/ks.py[:VARIANT] --workdir=DIR [--config.key=value ...] [--dry_run]

Ends with exit code 0; 1 and a one-line error; or 143 after SIGTERM, with everything saved.
"""

import pathlib
import shlex
import sys

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
  app.run(main)


def main(argv: list[str]) -> None:
  logging.set_verbosity(logging.WARNING)  # orbax and jax tell every step at INFO
  # Imported late: a typo in a flag is answered at once, and nothing touches a device before the processes have joined.
  from downscaling import jobs, plans
  from downscaling.common import mesh as meshes
  from downscaling.common import runs

  if len(argv) != 2 or argv[1] not in jobs.NAMES:
    came = " ".join(argv[1:]) or "nothing"
    example = "downscaling pipeline --config=configs/ks.py --workdir=runs/ks"
    fail(f"{came} came, need one job: {', '.join(jobs.NAMES)}. E.g. {example}")
  job = argv[1]
  for name in ("config", "workdir"):
    if getattr(FLAGS, name) is None:
      fail(f"{job} needs --{name}. E.g. downscaling {job} --config=configs/ks.py --workdir=runs/ks")
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
      runs.say(f"downscaling {job}: {plans.describe(job, context) if FLAGS.dry_run else jobs.run(job, context)}")
  except runs.Interrupted as interrupted:
    print(f"downscaling {job}: {interrupted}; run the same command to go on.", file=sys.stderr)
    sys.exit(143)
  except EXPECTED as error:
    if FLAGS.traceback:
      raise
    fail(f"{job}: {error}")


def fail(text: str) -> None:
  print(f"downscaling: {text}", file=sys.stderr)
  sys.exit(1)
