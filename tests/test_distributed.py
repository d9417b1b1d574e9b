"""Several real processes, joined by gloo on this machine: the same data, batches and losses;
killed, told to stop, moved to other topologies. What takes minutes is marked slow."""

import contextlib
import hashlib
import os
import pathlib
import random
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import xarray

from downscaling.datasets import training_batches
from downscaling.debias.entropic import entropic_map
from downscaling.fields import statistics
from downscaling.runtime import files, metric_writer, products, stage_folder
from downscaling.runtime import mesh as meshes
from downscaling.sampling import ensemble

ROOT = pathlib.Path(__file__).parents[1]


def start(count, devices, argv, pids=None, **env):
  """launch/rehearse.sh in the background, in a process group of its own."""
  env = os.environ | {"DEVICES": str(devices), "RESTARTS": "0", "GRACE": "45"} | env
  env |= {"PIDFILE": str(pids)} if pids else {}
  # A shell cannot trap a signal that it inherits ignored, as SIGINT is in the background of
  # another.
  return subprocess.Popen(
    ["env", "--default-signal=INT", "launch/rehearse.sh", str(count), *map(str, argv)], cwd=ROOT,
    env=env, text=True,
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
  )  # fmt: skip


def rehearse(count, devices, argv, code=0, **env):
  process = start(count, devices, argv, **env)
  said, _ = process.communicate(timeout=600)
  assert process.returncode == code, said
  return said


def numbers(pids):
  """{process: pid} of a rehearsal."""
  return {
    int(i): int(pid)
    for i, pid in (line.split() for line in pids.read_text().splitlines())
  }


def wait_for(true, process, seconds=200):
  deadline = time.monotonic() + seconds
  while not true():
    assert process.poll() is None, process.stdout.read()
    assert time.monotonic() < deadline
    time.sleep(0.02)


def losses(workdir):
  return dict(zip(*metric_writer.read_scalars(workdir / "train", "loss"), strict=True))


def logged(workdir):
  """Steps with a loss so far; 0 before there is a log."""
  path = workdir / "train" / "metrics.csv"
  return len(losses(workdir)) if path.exists() else 0


@pytest.fixture
def data(finished):
  """Flags that spare the simulation."""
  return {"data.dir": finished[0] / "data"}


# ---------------------------------------------------------------- the same everywhere


def test_two_processes_generate_the_bytes_of_one(finished, command, tmp_path):
  rehearse(2, 2, command("generate", tmp_path / "run"))
  one, two = finished[0] / "data", tmp_path / "run" / "data"
  made = products.listed(one)
  assert len([path for path in made if "array_record" in path.name]) == 34
  assert products.listed(two) == [two / path.relative_to(one) for path in made]
  for path in made:
    assert path.read_bytes() == (two / path.relative_to(one)).read_bytes(), path


class Memory(list):
  def __getitems__(self, index):
    return [self[i] for i in index]


def _digest(rows):
  return [
    hashlib.sha256(np.ascontiguousarray(row).tobytes()).hexdigest()[:16] for row in rows
  ]


def test_fifty_batches_are_the_same_on_any_topology():
  """Row by row, on 1, 2 and 4 devices here, and on 2 processes × 2 devices that read only their own
  rows.
  """
  code = (
    "import jax, sys; sys.path[:0] = ['tests', '.']\n"
    "from downscaling.runtime import mesh as meshes, joining\n"
    "from tests.test_distributed import batches, digests\n"
    "joining.start('on'); mesh = meshes.make(fsdp=2)\n"
    "mine = meshes.host_rows(mesh, 8); assert len(mine) == 4\n"
    "[print('rows', step, *mine, *row) for step, row in enumerate(digests(batches(), mine))]\n"
  )
  said = rehearse(2, 2, ["python", "-W", "ignore", "-c", code])
  seen = {}
  for words in (line.split()[2:] for line in said.splitlines() if " rows " in line):
    for row, digest in zip(words[1:5], words[5:], strict=True):
      seen[int(words[0]), int(row)] = digest
  everything = {}
  for devices in (1, 2, 4):
    mesh = meshes.make(devices)
    for step, batch in enumerate(batches().stream(mesh, 0, 50)):
      for row, digest in enumerate(_digest(np.asarray(batch["x"]))):
        assert everything.setdefault((step, row), digest) == digest
  assert seen == everything
  assert len({*everything.values()}) == 20  # all examples, each with its own bytes


def batches():
  stats = statistics.Statistics(
    np.zeros(1, np.float32), np.ones(1, np.float32), np.ones((4, 1), np.float32)
  )
  return training_batches.Batches(
    Memory({"u": np.full((4, 1), i, np.float32)} for i in range(20)), stats, 8, seed=3
  )


def digests(made, mine):
  return [_digest(made.rows(step, mine)["x"]) for step in range(50)]


def test_two_processes_lose_as_one_does(finished, command, data, tmp_path):
  """20 steps, 1 process × 4 devices against 2 × 2 with fsdp 2: 1e-5, the order of float32 sums
  through 20 updates.
  """
  rehearse(2, 2, command("train", tmp_path, **data, **{"mesh.fsdp": 2}))
  one, two = losses(finished[0]), losses(tmp_path)
  assert one.keys() == two.keys() == {*range(1, 21)}
  np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-5)


def test_processes_that_differ_are_told_so(command, tmp_path):
  argv = [
    "bash",
    "-c",
    'exec "$@" --config.seed=$JAX_PROCESS_ID',
    "-",
    *command("train", tmp_path / "run"),
  ]
  said = rehearse(2, 1, argv, code=1)
  assert "processes differ in config hash: config hash is" in said
  assert "Start every process with the same command" in said
  assert not (tmp_path / "run").exists()


def test_two_processes_sample_and_evaluate_as_one_does(
  finished, command, data, tmp_path
):
  """The end of a pipeline on 2 × 2 devices against 1 × 4: samples bit for bit; one report, written
  by process 0 while the other waits."""
  for stage in ("debias", "train"):
    shutil.copytree(finished[0] / stage, tmp_path / stage)
  said = rehearse(2, 2, command("pipeline", tmp_path, **data))
  assert "[0] train: train is done already" in said
  assert (
    f"[0] downscaling pipeline: report: {tmp_path / 'report' / 'report.html'}" in said
  )
  assert said.count("Fine samples") == 1
  assert "[1] downscaling" not in said
  for name in (
    "equivariant+diffusion",
    "raw+diffusion",
    "true+diffusion",
    "unconditional",
  ):
    one, two = (
      ensemble.read(workdir / "samples" / f"{name}.zarr")
      for workdir in (finished[0], tmp_path)
    )
    np.testing.assert_array_equal(two["sample"], one["sample"])
  reports = [
    files.read_json(workdir / "report" / "metrics.json")
    for workdir in (finished[0], tmp_path)
  ]
  assert reports[0]["config_hash"] == reports[1]["config_hash"]
  assert reports[0]["debias"] == reports[1]["debias"]


@pytest.mark.slow
def test_a_pipeline_in_two_processes(command, tmp_path):
  said = rehearse(2, 2, command("pipeline", tmp_path))
  for job in ("generate", "debias", "train", "sample", "evaluate"):
    assert f"[0] {job}: wrote " in said
  again = rehearse(1, 4, command("pipeline", tmp_path))
  assert "evaluate: evaluate is done already" in again


@pytest.mark.parametrize(
  "path", ["fused", pytest.param("ring", marks=pytest.mark.slow)]
)
def test_two_processes_debias_as_one_does(command, data, tmp_path, path):
  """1 process × 4 devices against 2 × 2: the same program on the same shards, so maps and rows
  agree to rounding.
  """
  keys = data | {"debias.path": path, "debias.points": 256}
  for name, count in (("one", 1), ("two", 2)):
    rehearse(count, 4 // count, command("debias", tmp_path / name, **keys))
  one, two = (tmp_path / name / "debias" for name in ("one", "two"))
  maps = [entropic_map.EntropicMap.load(folder / "entropic") for folder in (one, two)]
  mean_cost = files.read_json(one / "diagnostics.json")["maps"]["entropic"]["mean_cost"]
  assert (
    np.abs(maps[0].g - maps[1].g).max() < 1e-5 * mean_cost
  )  # reductions over gloo add in another order
  np.testing.assert_array_equal(maps[0].target, maps[1].target)
  rows = [
    files.read_json(folder / "diagnostics.json")["held_out"]["rows"]
    for folder in (one, two)
  ]
  assert rows[0] == rows[1] > 0
  # each process adds up half of the rows: the same float64 sums in another order
  held = [
    xarray.open_zarr(folder / "held_out.zarr", consolidated=False)["equivariant"].values
    for folder in (one, two)
  ]
  np.testing.assert_allclose(*held, atol=1e-4)


@pytest.mark.slow
def test_debias_killed_and_told_to_stop_ends_at_the_same_potentials(
  command, data, tmp_path
):
  """Two processes; kill -9 to one at six random moments and SIGTERM to the other at two: bit for
  bit, same topology.
  """
  keys = data | {
    "debias.epsilon": 0.003,
    "debias.threshold": 1e-5,
    "debias.max_iterations": 4000,
    "debias.check_every": 5,
  }
  keys |= {"debias.save_seconds": 0.0}
  rehearse(2, 2, command("debias", tmp_path / "straight", **keys))
  pids, dice = tmp_path / "pids", random.Random(1)
  for kill in range(8):
    process = start(2, 2, command("debias", tmp_path / "cut", **keys), pids, GRACE="0")
    checkpoints = tmp_path / "cut" / "debias" / "entropic" / "checkpoints"
    before = max(
      [int(p.name) for p in checkpoints.glob("[0-9]*") if p.name.isdigit()], default=0
    )
    going = lambda b=before, c=checkpoints: any(
      int(p.name) > b for p in c.glob("[0-9]*") if p.name.isdigit()
    )
    while not going() and process.poll() is None:
      time.sleep(0.02)
    time.sleep(dice.uniform(0, 0.1))
    if process.poll() is None:
      with contextlib.suppress(ProcessLookupError):
        os.kill(
          numbers(pids)[kill % 2], signal.SIGTERM if kill in (2, 5) else signal.SIGKILL
        )
    process.communicate(timeout=120)
  rehearse(2, 2, command("debias", tmp_path / "cut", **keys))
  maps = [
    entropic_map.EntropicMap.load(tmp_path / name / "debias" / "entropic")
    for name in ("straight", "cut")
  ]
  np.testing.assert_array_equal(maps[0].g, maps[1].g)
  facts = [
    files.read_json(tmp_path / name / "debias" / "entropic" / "facts.json")
    for name in ("straight", "cut")
  ]
  assert facts[0]["history"] == facts[1]["history"]


# ---------------------------------------------------------------- SIGTERM to one of two

LONG = {
  "train.total_steps": 4000,
  "plan.log_every": 1,
  "plan.eval_every": 0,
  "plan.save_every": 0,
}


def stop_one(process, pids, which):
  os.kill(numbers(pids)[which], signal.SIGTERM)
  said, _ = process.communicate(timeout=60)
  assert process.returncode == 143, said
  return said


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["steps", "evaluation", "saving", "compilation"])
def test_sigterm_to_one_of_two_while_training(command, data, tmp_path, phase):
  pids, workdir = tmp_path / "pids", tmp_path / "run"
  keys, env = dict(LONG), {}
  if phase == "evaluation":  # seconds long, at step 2
    keys |= {"plan.eval_every": 2, "watch.fields": 4096, "watch.steps": 64}
  elif phase == "saving":
    keys |= {"plan.save_every": 1}
  elif phase == "compilation":
    env = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
  process = start(2, 2, command("train", workdir, **data | keys), pids, **env)
  if phase == "compilation":
    wait_for(lambda: (workdir / "train" / stage_folder.MARKER).exists(), process)
  else:
    wait_for(lambda: logged(workdir) >= (2 if phase == "evaluation" else 3), process)
  said = stop_one(process, pids, 1)
  saved = sorted(
    int(p.name)
    for p in (workdir / "train" / "checkpoints").glob("[0-9]*")
    if p.name.isdigit()
  )
  if phase == "compilation":
    # It fell within compilation on both, or on one just before: then it was kept for the first
    # poll.
    assert "nothing could be lost" in said or saved == [1]
    return
  assert f"train stopped at step {saved[-1]} of 4000, which is saved" in said
  assert logged(workdir) == saved[-1]
  process = start(2, 2, command("train", workdir, **data | keys), pids)
  wait_for(lambda: logged(workdir) > saved[-1], process)
  assert f"going on from step {saved[-1]}" in stop_one(process, pids, 0)


@pytest.mark.slow
def test_sigterm_to_one_of_two_while_generating(command, finished, tmp_path):
  pids, workdir = tmp_path / "pids", tmp_path / "run"
  process = start(2, 2, command("generate", workdir, **{"data.shard": 4}), pids)
  wait_for(lambda: list(workdir.rglob("*.array_record-*-of-*")), process)
  said = stop_one(process, pids, 0)
  assert "trajectories on disk" in said
  made = {p: p.stat().st_mtime_ns for p in workdir.rglob("*.array_record-*-of-*")}
  assert 0 < len(made) < 112
  rehearse(1, 4, command("generate", workdir, **{"data.shard": 4}))
  assert all(p.stat().st_mtime_ns == time for p, time in made.items())
  assert len(list(workdir.rglob("*.array_record-*-of-*"))) == 112


# ---------------------------------------------------------------- killed, moved


@pytest.mark.slow
def test_elastic(command, data, tmp_path):
  """2 × 2 -> 1 × 1 -> 1 × 4 with fsdp 4: every step once, and the losses of an undisturbed run to
  1e-3, as the rounding of 300 steps has grown by then."""
  keys = (
    data
    | LONG
    | {"train.total_steps": 300, "model.channels": (8, 32), "train.batch": 64}
  )
  pids, workdir = tmp_path / "pids", tmp_path / "run"
  for count, devices in ((2, 2), (1, 1)):
    before = logged(workdir)
    process = start(count, devices, command("train", workdir, **keys), pids)
    wait_for(lambda before=before: logged(workdir) > before + 10, process)
    stop_one(process, pids, 0)
  assert logged(workdir) < 300
  rehearse(1, 4, command("train", workdir, **keys | {"mesh.fsdp": 4}))
  rehearse(1, 1, command("train", tmp_path / "straight", **keys))
  moved, straight = losses(workdir), losses(tmp_path / "straight")
  assert list(moved) == list(straight) == [*range(1, 301)]
  np.testing.assert_allclose(list(moved.values()), list(straight.values()), rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "devices"), [(1, 2), (2, 2)])
def test_forty_steps_are_forty_steps_however_often_it_is_killed(
  command, data, tmp_path, count, devices
):
  """kill -9 to a random process at a random moment, twenty times and more, most of them within an
  asynchronous save (one is begun at every step): the log, parameters, averages and optimiser end
  byte for byte as undisturbed."""
  keys = {
    "train.total_steps": 40,
    "plan.log_every": 1,
    "plan.save_every": 1,
    "plan.eval_every": 10,
    "train.batch": 128,
  }
  keys |= data | {"model.channels": (64, 64), "keep.last": 2}
  rehearse(count, devices, command("train", tmp_path / "straight", **keys))
  pids, workdir, dice = tmp_path / "pids", tmp_path / "cut", random.Random(0)
  process = start(
    count, devices, command("train", workdir, **keys), pids, RESTARTS="100", GRACE="0"
  )
  kills, last = 0, None
  while process.poll() is None and kills < 24:
    try:
      now = numbers(pids)
    except FileNotFoundError:
      continue
    if now == last:
      time.sleep(0.02)
      continue
    before, deadline = logged(workdir), time.monotonic() + 120
    # One life in four ends before its first step: in its imports, compiling, restoring.
    while (
      dice.random() > 0.01 / 4 and logged(workdir) <= before and process.poll() is None
    ):
      assert time.monotonic() < deadline
      time.sleep(0.02)
    time.sleep(dice.uniform(0, 0.15))
    last = now
    try:
      os.kill(dice.choice(list(now.values())), signal.SIGKILL)
      kills += 1
    except ProcessLookupError:
      break
  said, _ = process.communicate(timeout=600)
  assert process.returncode == 0, said
  assert kills >= 20, f"only {kills} kills: it was done too soon"
  ends = [tmp_path / name / "train" for name in ("straight", "cut")]
  assert (ends[0] / "metrics.csv").read_bytes() == (
    ends[1] / "metrics.csv"
  ).read_bytes()
  states = [_manifest(end / "checkpoints" / "40") for end in ends]
  assert states[0] == states[1]


def _manifest(folder):
  """{array: SHA-256 of its values} of a checkpoint, read as it lies there."""
  import jax
  import orbax.checkpoint as ocp

  here = jax.sharding.SingleDeviceSharding(
    jax.devices()[0]
  )  # not the devices that saved it, which are not here
  kept = ocp.StandardCheckpointer().metadata(folder / "state").item_metadata
  target = jax.tree.map(
    lambda k: jax.ShapeDtypeStruct(k.shape, k.dtype, sharding=here), kept.tree
  )
  tree = ocp.StandardCheckpointer().restore(folder / "state", target)
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  words = lambda x: (
    jax.random.key_data(x) if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key) else x
  )
  return {
    jax.tree_util.keystr(p): hashlib.sha256(np.asarray(words(x)).tobytes()).hexdigest()
    for p, x in flat
  }
