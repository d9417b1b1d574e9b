"""What a user can get wrong, and what a machine can: one line that says what to do, exit code 1,
nothing overwritten.

Command lines that cannot be parsed and foreign folders go through real processes. What fails inside
a job is also asked for in this process, as `attempt` does it, with the checks of main.main.
"""

import hashlib
import pathlib
import shutil
import sys

import numpy as np
import pytest
from array_record.python import array_record_module

from downscaling import checks, experiment, jobs
from downscaling import main as program
from downscaling.datasets import simulated
from downscaling.runtime import files, metric_writer, stage_folder, supervision
from downscaling.runtime import mesh as meshes
from downscaling.sampling import ensemble

ROOT = pathlib.Path(__file__).parents[1]


def tree(*folders):
  """{file: SHA-256}; an absent folder has none."""
  files = (
    p
    for folder in folders
    for p in sorted(pathlib.Path(folder).rglob("*"))
    if p.is_file()
  )
  return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def one_line(process):
  """The program's only line, after exit code 1.

  Lines of progress before it are allowed, a traceback is not.
  """
  assert process.returncode == 1, (process.stdout, process.stderr)
  assert "Traceback" not in process.stderr
  lines = [
    line
    for line in process.stderr.splitlines()
    if not line.startswith(("train: ", "sample: ", "generate ks/"))
  ]
  assert len(lines) == 1, process.stderr
  assert lines[0].startswith("downscaling: ")
  assert len(lines[0]) < 600, lines[0]
  return lines[0]


@pytest.fixture(scope="module")
def config():
  """A smoke config with the small units of `finished`; config(key=value, ...)."""

  def make(**overrides):
    small = {"data.shard": 16, "sampling.unit": (2, 2), "plan.save_every": 4}
    return experiment.load("ks:smoke", **small | overrides)

  return make


def do(job, context):
  checks.check(context.experiment, context.mesh)
  return jobs.run(job, context)


@pytest.fixture
def attempt(config):
  """attempt(job, workdir, **overrides) -> the line that main would print; fails if nothing is
  wrong.
  """

  def attempt(job, workdir, **overrides):
    folder = pathlib.Path(workdir)

    def whole():
      do(
        job,
        jobs.Workdir(config(**overrides), folder, meshes.make(), supervision.Stop()),
      )

    with pytest.raises(program.EXPECTED) as caught:
      whole()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    return str(caught.value)

  return attempt


# ---------------------------------------------------------------- the command line


def says(execute, *argv, cwd=ROOT):
  return one_line(execute([*program_argv(), *map(str, argv)], cwd=cwd))


def program_argv():
  return [sys.executable, "-m", "downscaling"]


SMOKE = "--config=configs/ks.py:smoke"


@pytest.mark.parametrize(
  ("flags", "needed"),
  [
    (
      (SMOKE, "--config.trian.batch=3"),
      ("the config has no key 'trian'", 'Did you mean "train"'),
    ),
    (
      (SMOKE, "--config.train.bacth=3"),
      ("config.train has no key 'bacth'", 'Did you mean "batch"'),
    ),
    ((SMOKE, "--config.zzz=3"), ("no key 'zzz'", "Its keys: experiment, label, seed")),
    (
      (SMOKE, "--config.train.batch=many"),
      (
        "config.train.batch=many: need a whole number, at least 1",
        "--config.train.batch=128",
      ),
    ),
    (
      ("--config=configs/ks.py:fulll",),
      ("configs/ks.py:fulll is unknown", ":quick, :full, :smoke"),
    ),
    (
      ("--config=configs/sk.py",),
      ("--config=configs/sk.py", "no such file in", "--config=configs/ks.py"),
    ),
    (("--config=pyproject.toml",), ("--config", "pyproject.toml")),
    ((SMOKE, SMOKE), ("--config came 2 times", "give one")),
    ((SMOKE, "--wrokdir=here"), ("wrokdir", "Did you mean: workdir")),
    ((SMOKE, "--workdir"), ("Missing value", "--workdir")),
  ],
)
def test_what_cannot_be_parsed(execute, tmp_path, flags, needed):
  said = says(execute, "train", f"--workdir={tmp_path / 'run'}", *flags)
  assert all(part in said for part in needed), said
  assert not (tmp_path / "run").exists()


def test_a_config_that_raises_or_is_none(execute, tmp_path):
  for text, needed in (
    ("def get_config(:", "line 1"),
    ("1 / 0", "division by zero"),
    ("x = 100", "get_config"),
  ):
    (tmp_path / "mine.py").write_text(text)
    assert needed in says(
      execute, "train", "--config=mine.py", "--workdir=run", cwd=tmp_path
    )
  assert [p.name for p in tmp_path.iterdir() if p.name != "__pycache__"] == ["mine.py"]


def test_which_job_and_where(execute, tmp_path):
  """An empty --workdir, as an unset shell variable gives, once meant the current directory."""
  names = "generate, debias, train, sample, evaluate, pipeline"
  said = says(
    execute, "trian", f"--config={ROOT}/configs/ks.py", "--workdir=run", cwd=tmp_path
  )
  assert "trian came, need one job" in said
  assert names in said
  for flag in ((), ("--workdir=",)):
    said = says(execute, "train", f"--config={ROOT}/configs/ks.py", *flag, cwd=tmp_path)
    assert "train needs --workdir" in said
    assert "--workdir=runs/ks" in said
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  "words", [["doctor"], ["pipeline", "--config=ks:smoke"], ["verify"]]
)
@pytest.mark.parametrize(
  "folder", ["hdfs://host/run", "gs:/bucket/run", "s3://", "file:///tmp/run"]
)
def test_an_unknown_scheme_is_no_work_folder(execute, tmp_path, words, folder):
  """It would become a local folder of that name, and every host's own."""
  argv = [sys.executable, "-m", "downscaling", *words, f"--workdir={folder}"]
  done = execute(argv, cwd=tmp_path)
  assert done.returncode == 1
  assert f"--workdir={folder}: '{folder}'" in done.stderr
  assert "need" in done.stderr or "gs://BUCKET/FOLDER" in done.stderr
  assert not [*tmp_path.iterdir()]


def test_control_characters_of_files_are_shown_not_obeyed(execute, tmp_path):
  """Names may hold escape sequences of a terminal, and characters that turn the text around."""
  run = tmp_path / "run\x1b[31m\u202e"
  run.mkdir()
  done = execute([sys.executable, "-m", "downscaling", "verify", str(run)])
  assert done.returncode == 1
  assert "run\\x1b[31m\\u202e holds no stage" in done.stderr
  assert "\x1b" not in done.stderr


def test_a_tracker_that_is_not_installed(command, execute, tmp_path):
  done = execute(command("train", tmp_path, "--tracker=mlflow"))
  assert done.returncode == 1
  assert "--tracker=mlflow needs its package: pip install mlflow" in done.stderr
  assert not [*tmp_path.iterdir()]


def test_help_is_no_error(execute):
  done = execute([*program_argv(), "--help"])
  assert done.returncode == 0
  assert "downscaling JOB --config=" in done.stdout


# ------------------------------------------------------- values, refused before anything is written


@pytest.mark.parametrize(
  ("overrides", "needed"),
  [
    (
      {"grid.factor": 7},
      (
        "factor 7 does not divide the grid of 192 points",
        "[2, 3, 4, 6, 8,",
        "config.grid.factor",
      ),
    ),
    (
      {"grid.operator": "mean"},
      ("config.grid.operator=mean: need one of strided, block_mean",),
    ),
    (
      {"coarse.cells": 100},
      ("100 cells cannot be strided to 24 points", "--config.coarse.cells=96"),
    ),
    ({"coarse.scheme": "upwind"}, ("config.coarse.scheme='upwind'", "godunov")),
    (
      {"train.batch": 18},
      ("a batch of 18 over 4 devices", "--config.train.batch=16 or 20"),
    ),
    (
      {"train.ema_decay": 2.0},
      ("config.train.ema_decay=2", "at least 0 and below 1", "ema_decay=(0.999,)"),
    ),
    ({"data.burn_in": 25.03}, ("25.03", "dt")),
    (
      {"sampling.unit": (4,)},
      (
        "config.sampling.unit=(4,)",
        "conditions × members",
        "need 2 whole numbers",
        "(64,8)",
      ),
    ),
    (
      {"debias.points": 513},
      (
        "config.debias.points asks for 513",
        "512 can be had",
        "config.data.hfhr.train=129",
      ),
    ),
    (
      {"debias.held_out": 257},
      ("config.debias.held_out asks for 257 lflr test", "256 can be had"),
    ),
    (
      {"evaluate.reference": 300},
      ("config.evaluate.reference asks for 300", "128 can be had"),
    ),
    (
      {"sampling.conditions": 65},
      ("config.sampling.conditions=65", "config.debias.held_out=64"),
    ),
    ({"train.batch": 1024}, ("config.train.batch asks for 1024", "512 can be had")),
    (
      {"debias.epsilon": 0.0},
      (
        "config.debias.epsilon=0: need",
        "at least 1e-06 and below 0.3",
        "epsilon=0.0005",
      ),
    ),
    (
      {"debias.recipe": "GX"},
      ("recipe='GX' cannot be read", "need letters of G, Q, A, S, M and N"),
    ),
    (
      {"debias.map": "rescaled"},
      ("config.debias.map='rescaled' is not among config.debias.maps", "add it there"),
    ),
    (
      {"debias.path": "pallas"},
      ("config.debias.path='pallas' on 'cpu'", "Use --config.debias.path=auto here"),
    ),
    (
      {"debias.maps": ("optimal",)},
      (
        "config.debias.maps=('optimal',): need different names out of entropic, equivariant",
      ),
    ),
    (
      {"debias.minibatch.batch": 0},
      ("config.debias.minibatch.batch=0: need", "at least 1"),
    ),
    (
      {
        "debias.maps": ("minibatch",),
        "debias.map": "minibatch",
        "debias.minibatch.batch": 129,
      },
      ("config.debias.minibatch.batch=129", "batch must lie in 1 … 128"),
    ),
    ({"debias.epsilon": -1.0}, ("config.debias.epsilon=-1: need",)),
    (
      {"debias.epsilon": float("nan")},
      ("config.debias.epsilon=nan: need a finite number",),
    ),
    (
      {"sampling.guidance.name": "papper"},
      ("guidance.name=papper", "paper, scaled, wiener"),
    ),
    (
      {"sampling.solver.name": "euler"},
      ("config.sampling.solver.name=euler", "euler_maruyama"),
    ),
    (
      {"sampling.levels.name": "edn"},
      ("config.sampling.levels.name=edn", "exponential"),
    ),
    ({"schedule.name": "vp"}, ("config.schedule.name=vp", "vp_linear")),
    ({"noise.kind": "normal"}, ("config.noise.kind=normal", "log_normal")),
    (
      {"model.strides": (2, 7)},
      ("192 points cannot be coarsened 14 times", "config.model.strides"),
    ),
    ({"model.convolution": "fft"}, ("config.model.convolution=fft", "im2col")),
    (
      {"optimizer.warmup_steps": 20},
      ("config.optimizer.warmup_steps=20", "total_steps=20"),
    ),
    ({"data.name": "era5"}, ("config.data.name=era5: need one of kolmogorov, ks",)),
    (
      {"data.snapshots": 0},
      ("config.data.snapshots=0: need a whole number, at least 1",),
    ),
    (
      {"mesh.data": 5},
      ("config.mesh.data=5 × fsdp=1, but 4 devices", "host_platform_device_count=5"),
    ),
  ],
)
def test_a_value_that_cannot_work_is_refused_at_the_door(
  attempt, config, tmp_path, overrides, needed
):
  """Also by a job that would not have met it: an hour of training must not end in a misspelt
  sampler.
  """
  if "mesh.data" in overrides:
    with pytest.raises(ValueError, match="5") as caught:
      meshes.make(**config(**overrides).mesh.asdict())
    said = str(caught.value)
  else:
    said = attempt("generate", tmp_path / "run", **overrides)
  assert all(part in said for part in needed), said
  assert not (tmp_path / "run").exists()


def test_the_variants_themselves_pass_the_door():
  for variant in ("quick", "full", "smoke", "series", "stationary"):
    checks.check(experiment.load(f"ks:{variant}"), meshes.make())


def test_a_config_file_with_a_misspelt_key_and_one_without_blocks(execute, tmp_path):
  """As processes: a file may leave out any key, and no other one passes."""
  text = "def get_config():\n  return {keys}\n"
  file = tmp_path / "mine.py"
  file.write_text(text.format(keys="{'model': {'chanels': (8, 16)}}"))
  said = says(execute, "train", f"--config={file}", f"--workdir={tmp_path / 'run'}")
  assert "config.model has no key 'chanels'. Did you mean \"channels\"?" in said
  file.write_text(text.format(keys="{'mesh': 3}"))
  said = says(execute, "train", f"--config={file}", f"--workdir={tmp_path / 'run'}")
  assert "config.mesh=3: need a block of keys" in said
  file.write_text(text.format(keys="{'seed': 1}"))
  flags = (f"--config={file}", f"--workdir={tmp_path / 'run'}", "--dry_run")
  done = execute([*program_argv(), "generate", *flags])
  assert done.returncode == 0, done.stderr
  assert not (tmp_path / "run").exists()


def test_a_refused_value_leaves_no_trace_in_the_way_of_the_right_one(
  execute, command, tmp_path
):
  """As a process: the message, exit code 1, and no folder that later calls the mended config
  'another'.
  """
  said = one_line(execute(command("pipeline", tmp_path / "run", **{"train.batch": 18})))
  assert "pipeline: a batch of 18 over 4 devices" in said
  assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- folders


def test_a_folder_of_another_config_is_kept(finished, attempt):
  workdir, before = finished[0], tree(finished[0])
  for job, overrides, needed in (
    ("generate", {"data.snapshots": 5}, "data.snapshots: 4 -> 5"),
    ("debias", {"debias.epsilon": 0.02}, "debias.epsilon: 0.01 -> 0.02"),
    ("train", {"train.total_steps": 30}, "train.total_steps: 20 -> 30"),
    ("sample", {"sampling.guidance.alpha": 1.0}, "sampling.guidance.alpha: 3.0 -> 1.0"),
    ("evaluate", {"evaluate.reference": 100}, "evaluate.reference: 128 -> 100"),
    ("pipeline", {"seed": 1}, "seed: 0 -> 1"),
  ):
    said = attempt(job, workdir, **overrides)
    assert "was made by another config" in said
    assert needed in said
    assert "use another --workdir" in said
  assert tree(workdir) == before


def test_someone_elses_folder_is_kept(execute, command, attempt, finished, tmp_path):
  (tmp_path / "data").mkdir()
  (tmp_path / "data" / "thesis.tex").write_text("years of work")
  said = one_line(execute(command("generate", tmp_path)))
  assert f"{tmp_path / 'data'} holds files but no stage.json" in said
  assert "Use another --workdir" in said
  for stage, job in (
    ("train", "train"),
    ("debias", "debias"),
    ("samples", "sample"),
    ("report", "evaluate"),
  ):
    (tmp_path / stage).mkdir()
    (tmp_path / stage / "thesis.tex").write_text("years of work")
    if job in ("train", "debias"):  # the others need them finished first, and say so
      assert "will not write there" in attempt(
        job, tmp_path, **{"data.dir": str(finished[0] / "data")}
      )
  assert {p.read_text() for p in tmp_path.rglob("*") if p.is_file()} == {
    "years of work"
  }
  assert len(tree(tmp_path)) == 5


def test_a_folder_that_cannot_be_made(attempt, tmp_path):
  (tmp_path / "file").write_text("mine")
  said = attempt("generate", tmp_path / "file")
  assert "cannot be made" in said
  assert "use another --workdir" in said
  assert (tmp_path / "file").read_text() == "mine"


def test_jobs_in_the_wrong_order_name_the_right_one(attempt, finished, tmp_path):
  data = {"data.dir": str(finished[0] / "data")}
  for job, needs, overrides in (
    ("train", "generate", {}), ("debias", "generate", {}), ("sample", "generate", {}),
    ("evaluate", "sample", data),
    ("sample", "train", data),
  ):  # fmt: skip
    said = attempt(job, tmp_path / "run", **overrides)
    assert f"run `downscaling {needs}` first" in said
    assert "downscaling pipeline" in said
  assert not (tmp_path / "run").exists()
  shutil.copytree(finished[0] / "train", tmp_path / "run" / "train")
  assert "run `downscaling debias` first" in attempt("sample", tmp_path / "run", **data)


# ---------------------------------------------------------------- damage


@pytest.fixture
def fitted(finished, tmp_path):
  """(a work folder with debias and train of its own, {"data.dir": the finished data})."""
  for stage in ("debias", "train"):
    shutil.copytree(finished[0] / stage, tmp_path / "run" / stage)
  return tmp_path / "run", {"data.dir": str(finished[0] / "data")}


def without_digests(stage):
  """Makes it one that an older version left, so that the files' own checks are all there is."""
  record = files.read_json(stage / stage_folder.MARKER)
  record.pop("products")
  files.write_json(stage / stage_folder.MARKER, record)
  return stage


def truncate(folder, size=64):
  files = [
    p
    for p in pathlib.Path(folder).rglob("*")
    if p.is_file() and p.stat().st_size > size
  ]
  assert files, folder
  for path in files:
    with open(path, "rb+") as file:
      file.truncate(size)


def test_a_damaged_prior_is_named_and_made_anew_once_moved_away(
  fitted, finished, attempt, config
):
  workdir, data = fitted
  truncate(workdir / "train" / "prior" / "0" / "state" / "ocdbt.process_0" / "d")
  assert "bytes, " in attempt("sample", workdir, **data)  # than were written
  without_digests(workdir / "train")
  before = tree(workdir / "train", workdir / "debias")
  said = attempt("sample", workdir, **data)
  assert f"no checkpoint in {workdir / 'train' / 'prior'} can be read" in said
  assert "move it away and run the stage's job again" in said
  assert tree(workdir / "train", workdir / "debias") == before
  (workdir / "train" / "prior").rename(workdir / "damaged")
  assert "run `downscaling train` first" in attempt("sample", workdir, **data)
  context = jobs.Workdir(config(**data), workdir, meshes.make(), supervision.Stop())
  assert jobs.run("train", context).startswith(
    "wrote"
  )  # from its checkpoint of the last step: no step is taken again
  for name in ("_METADATA", "manifest.ocdbt"):
    assert (workdir / "train" / "prior" / "0" / "state" / name).exists()
  assert metric_writer.read_scalars(
    workdir / "train", "loss"
  ) == metric_writer.read_scalars(finished[0] / "train", "loss")


def test_checkpoints_all_damaged(finished, attempt, tmp_path):
  """Of a training that is under way: begun, not finished."""
  data, workdir = {"data.dir": str(finished[0] / "data")}, tmp_path / "run"
  shutil.copytree(finished[0] / "train", workdir / "train")
  (workdir / "train" / "prior").rename(tmp_path / "prior")
  truncate(workdir / "train" / "checkpoints")
  before = tree(workdir / "train" / "checkpoints")
  said = attempt("train", workdir, **data)
  assert f"no checkpoint in {workdir / 'train' / 'checkpoints'} can be read" in said
  assert "restore the folder from a copy" in said
  assert tree(workdir / "train" / "checkpoints") == before


@pytest.mark.parametrize("damage", ["truncated", "chunks missing", "missing"])
def test_damaged_debiased_fields(fitted, attempt, damage):
  workdir, data = fitted
  store = without_digests(workdir / "debias") / "held_out.zarr"
  if damage == "truncated":
    truncate(store / "equivariant" / "c")
  else:
    (store / "equivariant" / "c" if damage == "chunks missing" else store).rename(
      workdir / "aside"
    )
  said = attempt("sample", workdir, **data)
  if damage == "missing":
    assert "run `downscaling debias` first" in said
  else:
    assert f"{store} cannot be read" in said
    assert "move it away and run `downscaling debias` again" in said


def test_damaged_markers_and_statistics(fitted, finished, attempt, tmp_path):
  workdir, data = fitted
  (workdir / "debias" / "stage.json").write_text("{")
  said = attempt("debias", workdir, **data)
  assert f"{workdir / 'debias' / 'stage.json'} is not valid JSON" in said
  assert "move it away" in said
  copied = tmp_path / "copied"
  shutil.copytree(finished[0] / "data", copied)
  (copied / "statistics.npz").write_bytes(b"PK\x03\x04")
  said = attempt("train", tmp_path / "other", **{"data.dir": str(copied)})
  assert f"{copied}: statistics.npz has 4 bytes, " in said
  without_digests(copied)
  said = attempt("train", tmp_path / "other", **{"data.dir": str(copied)})
  assert f"{copied / 'statistics.npz'} is damaged" in said
  assert "move it away and run `downscaling generate` again" in said


def test_damaged_samples_do_not_reach_the_report(finished, attempt, tmp_path):
  workdir = tmp_path / "run"
  for stage in ("debias", "train", "samples"):
    shutil.copytree(finished[0] / stage, workdir / stage)
  data, store = (
    {"data.dir": str(finished[0] / "data")},
    workdir / "samples" / "raw+diffusion.zarr",
  )
  truncate(store / "sample" / "c")
  said = attempt("evaluate", workdir, **data)
  assert f"{store}: sample/c/0/0/0 has 64 bytes, " in said
  assert "`downscaling sample` then draws that again" in said
  assert not (workdir / "report" / "metrics.json").exists()


@pytest.mark.slow
def test_an_ensemble_grows_with_its_report_and_does_not_shrink(fitted, attempt, config):
  """More conditions and members in the same folder: what there was stays, and the report is made of
  all of it.
  """
  workdir, data = fitted
  few = data | {"sampling.conditions": 4, "sampling.unconditional.fields": 4}

  def run(job, **overrides):
    return do(
      job, jobs.Workdir(config(**overrides), workdir, meshes.make(), supervision.Stop())
    )

  assert run("sample", **few).startswith("wrote")
  assert run("evaluate", **few).startswith("wrote")
  assert run("evaluate", **few).startswith("evaluate is done already")
  store = workdir / "samples" / "equivariant+diffusion.zarr"
  before = tree(store / "sample" / "c")
  more = few | {"sampling.conditions": 6, "sampling.members": 4}
  assert "run `downscaling sample` first" in attempt("evaluate", workdir, **more)
  assert run("sample", **more).startswith("wrote")
  assert before.items() <= tree(store / "sample" / "c").items()
  assert ensemble.read(store).sample.shape == (6, 4, 192)
  assert run("evaluate", **more).startswith("wrote")
  metrics = files.read_json(workdir / "report" / "metrics.json")
  assert metrics["samples"]["equivariant+diffusion"]["n"] == 6  # conditions
  said = attempt("sample", workdir, **few)
  assert (
    "holds 6 conditions, 4 were asked for: an ensemble grows, but nothing is taken from it"
    in said
  )
  assert run("sample", **more).startswith("sample is done already")


# ---------------------------------------------------------------- NaN in the data


@pytest.fixture(scope="module")
def poisoned(finished, tmp_path_factory):
  """poisoned(which, split) -> a copy of the data with a NaN in the last snapshot of every
  trajectory of a split.
  """
  made = {}

  def poison(which, split):
    if (which, split) not in made:
      folder = made[which, split] = tmp_path_factory.mktemp("poisoned") / "data"
      shutil.copytree(finished[0] / "data", folder)
      without_digests(folder)
      builder = simulated.make(
        "ks", which, folder, (192,) if which == "hfhr" else (24,)
      )
      features = builder.info.features
      for path in builder.data_path.glob(f"ks-{split}.array_record-*"):
        reader = array_record_module.ArrayRecordReader(str(path))
        examples = [
          features.deserialize_example_np(record) for record in reader.read_all()
        ]
        reader.close()
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for example in examples:
          if example["time"] == 62.5:  # 25 + 3 × 12.5
            example["u"] = np.where(
              np.arange(len(example["u"])) == 3, np.nan, example["u"][:, 0]
            )[:, None]
            example["u"] = example["u"].astype(np.float32)
          writer.write(features.serialize_example(example))
        writer.close()
    return made[which, split]

  return poison


@pytest.mark.parametrize(
  ("job", "which", "split"),
  [
    ("train", "hfhr", "train"),
    ("train", "hfhr", "calibration"),
    ("debias", "lflr", "train"),
    ("debias", "lflr", "test"),
    ("debias", "hfhr", "train"),
  ],
)
def test_nan_is_named_and_nothing_is_made_of_it(
  poisoned, attempt, tmp_path, job, which, split
):
  folder = poisoned(which, split)
  before = tree(folder)
  said = attempt(job, tmp_path / "run", **{"data.dir": str(folder)})
  assert "holds NaN or infinity" in said
  assert split in said
  assert "trajectory " in said
  assert "at time 62.5" in said
  assert "anew in another --workdir" in said
  assert tree(folder) == before
  assert not files.read_json(tmp_path / "run" / job / stage_folder.MARKER)["complete"]


def test_a_learning_rate_that_explodes(execute, command, finished, tmp_path):
  """Step 1 has rate 0, step 2 throws the parameters away, step 3 overflows; what was saved before
  it stays.
  """
  overrides = {
    "data.dir": finished[0] / "data",
    "optimizer.peak": 1e25,
    "plan.save_every": 2,
    "plan.log_every": 2,
  }
  argv = command("train", tmp_path / "run", **overrides)
  said = one_line(execute(argv))
  assert "loss or gradient norm not finite at step 3, in the window (2, 4]" in said
  assert (
    "checkpoint is step 2 and stays. Lower --config.optimizer.peak in another --workdir"
    in said
  )
  checkpoints = tmp_path / "run" / "train" / "checkpoints"
  assert [p.name for p in checkpoints.iterdir() if p.name.isdigit()] == ["2"]
  before = tree(checkpoints / "2")
  again = execute(argv)
  assert "train: going on from step 2" in again.stderr
  assert "not finite at step 3" in again.stderr
  assert tree(checkpoints / "2") == before
  assert not (tmp_path / "run" / "train" / "prior").exists()
