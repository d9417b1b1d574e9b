"""The whole pipeline with its work folder on an object store: S3 by moto, Google's by an emulator.

Both listen on loopback. Every run is compared with one on a disk: members, maps and reports hold
the same bytes.
"""

import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.services.conftest import ROOT

pytestmark = pytest.mark.services
# Set before the first path on a store is opened: TensorStore keeps what it finds.
ENV = {
  "AWS_ACCESS_KEY_ID": "nobody",
  "AWS_SECRET_ACCESS_KEY": "secret",
  "AWS_REGION": "us-east-1",
  "AWS_EC2_METADATA_DISABLED": "true",
}


def port():
  with socket.create_server(("127.0.0.1", 0)) as server:
    return server.getsockname()[1]


def answering(number, process):
  deadline = time.monotonic() + 60
  while time.monotonic() < deadline and process.poll() is None:
    try:
      socket.create_connection(("127.0.0.1", number), 1).close()
      return
    except OSError:
      time.sleep(0.2)
  pytest.fail(f"the server on port {number} does not answer")


@pytest.fixture(scope="module")
def servers(tools, tmp_path_factory):
  """{scheme: a bucket}; the environment leads there."""
  programs = tools("moto[server,s3]", "gcp-storage-emulator", "boto3")
  log = open(tmp_path_factory.mktemp("servers") / "log", "wb")  # noqa: SIM115
  s3, gs = port(), port()
  emulator = ROOT / "tests" / "services" / "gcs_emulator.py"
  started = [
    subprocess.Popen(argv, stdout=log, stderr=log)
    for argv in (
      [programs / "moto_server", "-H", "127.0.0.1", "-p", str(s3)],
      [programs / "python", emulator, str(gs), "bucket"],
    )
  ]
  try:
    answering(s3, started[0])
    answering(gs, started[1])
    patch = pytest.MonkeyPatch()
    for name, value in ENV.items():
      patch.setenv(name, value)
    patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3}")
    patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{gs}")
    patch.setenv("DOWNSCALING_CACHE", str(tmp_path_factory.mktemp("cache")))
    make = "import boto3; boto3.client('s3').create_bucket(Bucket='bucket')"
    subprocess.run([programs / "python", "-c", make], check=True, timeout=60)
    yield {"gs": "gs://bucket", "s3": "s3://bucket"}
    patch.undo()
  finally:
    for process in started:
      process.terminate()
      process.wait(30)
    log.close()


@pytest.fixture(scope="module")
def local(command, execute, tmp_path_factory):
  """A run of the same config on this disk."""
  workdir = tmp_path_factory.mktemp("local") / "run"
  done = execute(command("pipeline", workdir))
  assert done.returncode == 0, done.stderr
  return workdir


def same(workdir, local, wanted):
  """Asserts that the wanted files below both folders have the same names and bytes; returns how
  many they are.
  """
  here, there = (
    {
      str(path.relative_to(top)): path
      for path in top.rglob("*")
      if wanted(path.relative_to(top)) and path.is_file()
    }
    for top in (local, workdir)
  )
  assert sorted(here) == sorted(there)
  for name, path in here.items():
    assert path.read_bytes() == there[name].read_bytes(), name
  return len(here)


def interrupted(argv, seen, how=signal.SIGKILL):
  """Starts a job and ends it once `seen()` is true; returns its code."""
  job = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  try:
    deadline = time.monotonic() + 300
    while job.poll() is None and not seen() and time.monotonic() < deadline:
      time.sleep(0.05)
    job.send_signal(how)
    return job.wait(120)
  finally:
    job.kill()


@pytest.fixture(scope="module", params=["gs", "s3"])
def finished(request, servers, local, command, execute, tmp_path_factory):
  """(work folder on a store, overrides) of a pipeline whose jobs were killed on the way."""
  from downscaling.runtime import files

  workdir = files.as_path(f"{servers[request.param]}/run")
  prior = tmp_path_factory.mktemp("prior") / "train"
  more = {"train.dir": prior} if request.param == "s3" else {}
  trained = prior if more else workdir / "train"
  shards = workdir / "data" / "ks" / "hfhr" / "1.0.0"
  killed = [
    interrupted(
      command("generate", workdir, **more), lambda: any(shards.glob("*.array_record*"))
    )
  ]
  for job in ("generate", "debias"):
    done = execute(command(job, workdir, **more))
    assert done.returncode == 0, done.stderr
  saved = lambda: any((trained / "checkpoints").glob("*/manifest.json"))
  killed.append(interrupted(command("train", workdir, **more), saved))
  drawn = lambda: any((workdir / "samples").glob("*.units/c*-m*.json"))
  done = execute(command("train", workdir, **more))
  assert done.returncode == 0, done.stderr
  killed.append(interrupted(command("sample", workdir, **more), drawn))
  # A killed job's locks are of this host: the next one takes them over at once.
  done = execute(command("pipeline", workdir, **more))
  assert done.returncode == 0, done.stderr
  assert (
    killed.count(-signal.SIGKILL) >= 2
  )  # on a fast machine a job may have ended before
  return workdir, more


def test_it_holds_the_bytes_of_a_run_on_a_disk(finished, local):
  workdir, _ = finished
  kept = lambda path: "checkpoints" not in path.parts
  numbers = lambda path: kept(path) and path.name in ("arrays.npz", "statistics.npz")
  assert same(workdir, local, numbers) == 4  # three maps, and of the data
  chunks = lambda path: kept(path) and "c" in path.parts
  assert same(workdir / "samples", local / "samples", chunks) > 20
  assert same(workdir / "debias", local / "debias", chunks) > 5
  if (workdir / "train").exists():
    assert same(workdir / "train", local / "train", lambda p: p.name == "metrics.csv")
  assert not (ROOT / "gs:").exists()
  assert not (ROOT / "s3:").exists()


def test_verify_status_and_doctor_read_it(finished, execute):
  workdir, _ = finished
  program = [sys.executable, "-m", "downscaling"]
  done = execute([*program, "verify", f"--workdir={workdir}"])
  assert done.returncode == 0, done.stdout + done.stderr
  assert f"{workdir}/samples: whole" in done.stdout
  done = execute([*program, "status", f"--workdir={workdir}"])
  assert done.returncode == 0, done.stderr
  assert "goodput" in done.stdout
  done = execute([*program, "doctor", f"--workdir={workdir}"])
  assert done.returncode == 0, done.stderr
  assert f"{workdir}: written by process 0 and seen by all" in done.stdout + done.stderr


def test_a_downscaler_and_xarray_open_it(finished, local):
  import xarray

  import downscaling
  from downscaling.sampling import ensemble_units

  workdir, more = finished
  name = "equivariant+diffusion.zarr"
  if not more:
    y = np.random.default_rng(0).normal(size=(2, 24, 1)).astype(np.float32)
    ours, theirs = (
      downscaling.Downscaler.load(each).sample(y, 2, 0) for each in (workdir, local)
    )
    np.testing.assert_array_equal(ours, theirs)
  found = ensemble_units.read(workdir / "samples" / name)["sample"].values
  with xarray.open_zarr(local / "samples" / name) as data:
    np.testing.assert_array_equal(found, data["sample"].values)
  # As a user opens it, by the extras gcs and s3.
  endpoint = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]}
  options = endpoint if workdir.scheme == "s3" else {}
  with xarray.open_zarr(
    str(workdir / "samples" / name), storage_options=options
  ) as data:
    np.testing.assert_array_equal(data["sample"].values, found)


def test_an_object_that_is_cut_or_gone_is_never_read_as_complete(
  finished, command, execute
):
  """A sample's shard is cut in half, then a map's numbers are taken away."""
  workdir, more = finished
  store = workdir / "samples" / "raw+diffusion.zarr"
  shard = next(store.rglob("c/*"), None) or next(
    iter((store / "sample" / "c").rglob("*"))
  )
  whole = shard.read_bytes()
  shard.write_bytes(whole[: len(whole) // 2])
  done = execute(
    [sys.executable, "-m", "downscaling", "verify", f"--workdir={workdir}"]
  )
  assert done.returncode == 1
  assert str(shard) in done.stdout
  again = {"label": "again"} | more
  done = execute(
    [sys.executable, "-m", "downscaling", "verify", f"--workdir={workdir}", "--repair"]
  )
  assert done.returncode == 0, done.stdout
  done = execute(command("sample", workdir, **more))
  assert done.returncode == 0, done.stderr
  assert shard.read_bytes() == whole
  arrays = workdir / "debias" / "equivariant" / "arrays.npz"
  kept = arrays.read_bytes()
  arrays.write_bytes(kept[:-100])
  done = execute(command("sample", workdir, **again))
  assert done.returncode == 1
  assert "arrays.npz" in done.stderr
  arrays.write_bytes(kept)


def test_two_jobs_do_not_own_one_stage(finished, command, execute):
  """The second is refused, by name of the first."""
  workdir, more = finished
  other = workdir.parent / "owned"
  first = subprocess.Popen(
    command("generate", other, **more),
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  try:
    lock = other / "data" / "lock.json"
    deadline = time.monotonic() + 120
    while not lock.exists() and first.poll() is None and time.monotonic() < deadline:
      time.sleep(0.05)
    first.send_signal(signal.SIGSTOP)  # at work, but it gets no further
    assert lock.exists()
    done = execute(command("generate", other, **more))
    assert done.returncode == 1
    assert "is being written by another job" in done.stderr
  finally:
    first.send_signal(signal.SIGCONT)
    first.kill()
    first.wait(30)


def test_s3_holds_no_checkpoints_and_says_so_first(servers, command, execute):
  from downscaling.runtime import files

  workdir = files.as_path(f"{servers['s3']}/refused")
  done = execute(command("pipeline", workdir))
  assert done.returncode == 1
  assert "s3://bucket/refused/train cannot hold checkpoints" in done.stderr
  assert "--config.train.dir=FOLDER" in done.stderr
  assert not workdir.exists()
