"""Files that were damaged or exchanged: no reader takes them for others, `verify` names them, and
what is damaged is made again.
"""

import json
import os
import pathlib
import random
import shutil

import jax
import numpy as np
import pytest

from downscaling import experiment as experiments
from downscaling.assembly import prior, samples, worlds
from downscaling.datasets import simulated
from downscaling.debias import maps
from downscaling.diffusion import error_table
from downscaling.fields import statistics
from downscaling.jobs import rows, verify
from downscaling.jobs import sample as sample_job
from downscaling.jobs.workdir import Workdir
from downscaling.runtime import files, products, stage_folder, supervision
from downscaling.runtime import mesh as meshes
from downscaling.sampling import ensemble

SAYS_SO_ITSELF = (".npz", ".array_record", ".zarr", "prior", ".units", "checkpoints")


@pytest.fixture
def copied(finished, tmp_path):
  """A copy of a finished run, files with their times."""
  return pathlib.Path(shutil.copytree(finished[0], tmp_path / "run"))


@pytest.fixture(scope="module")
def experiment(finished):
  marker = files.read_json(finished[0] / "samples" / stage_folder.MARKER)
  return experiments.Experiment.of(marker["experiment"])


def readers(experiment, path):
  """{stage: () -> every number that jobs read of it}."""
  mesh = meshes.make()
  work = Workdir(experiment, path, mesh, supervision.Stop())

  def data():
    found = [vars(statistics.load(path / "data" / "statistics.npz"))]
    for which in ("hfhr", "lflr"):
      builder = worlds.dataset(experiment, path, which)
      splits = simulated.SPLITS if which == "hfhr" else simulated.SPLITS[:3]
      found += [simulated.load(builder, split) for split in splits]
    return found

  def debias():
    stores = [
      rows.mapped(work, name) for name in ("held_out", "in_sample", "calibration")
    ]
    held = stores[0]["lflr"]
    fitted = {
      name: maps.load(path / "debias" / name)(held) for name in experiment.debias.maps
    }
    return [stores, fitted, files.read_json(path / "debias" / "diagnostics.json")]

  def train():
    stats = statistics.load(path / "data" / "statistics.npz")
    network = prior.network(experiment, stats)
    params, _ = sample_job.restored(work.stage("train"), experiment, network, 1, mesh)
    return [params, error_table.load(path / "train", work.stage("train").hash)]

  def drawn():
    sets = samples.sources(experiment)
    found = [ensemble.read(path / "samples" / f"{name}.zarr").load() for name in sets]
    return [{k: v.values for k, v in data.variables.items()} for data in found]

  return {"data": data, "debias": debias, "train": train, "samples": drawn}


def equal(one, two):
  leaves = [jax.tree.leaves(x) for x in (one, two)]
  return len(leaves[0]) == len(leaves[1]) and all(
    np.array_equal(a, b, equal_nan=np.asarray(a).dtype.kind == "f")
    for a, b in zip(*leaves, strict=True)
  )


def flip(path, dice):
  """One bit of a file, which keeps its time, as on a disk that rots."""
  times = path.stat()
  held = bytearray(path.read_bytes())
  bit = dice.randrange(8 * len(held))
  held[bit // 8] ^= 1 << bit % 8
  path.write_bytes(held)
  os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def says_the_same(path, original):
  """Is all that a JSON file of ours said before still there, and read?"""
  try:
    found = files.read_json(path)
  except ValueError:
    return False
  return (json.loads(original) | {files.SEAL: ""}).items() <= (
    found | {files.SEAL: ""}
  ).items()


def refuses(reader, whole, path):
  """Does the reader raise? If not, it must have read what was written."""
  try:
    found = reader()
  except Exception:  # each format has its own kinds
    return True
  assert equal(found, whole), f"{path} was read as another"
  return False


@pytest.mark.parametrize("count", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_a_flipped_bit_is_never_read_as_another_number(
  copied, experiment, count, monkeypatch
):
  """`verify` names the file. Whoever reads it raises, or gets what was written.

  Numbers in formats without checksums of their own are guarded by the stage's digests.
  """
  dice, read = random.Random(count), readers(experiment, copied)
  whole = {stage: reader() for stage, reader in read.items()}
  every = [p for p in sorted(copied.rglob("*")) if p.is_file() and p.stat().st_size]
  # No numbers of a result.
  every = [
    p for p in every if "attempts" not in p.parts and not p.name.startswith("events")
  ]
  raised = 0
  for path in dice.choices(every, k=count):
    original, times = path.read_bytes(), path.stat()
    flip(path, dice)
    stage = path.relative_to(copied).parts[0]
    said, well = verify.verify(copied / stage)
    if path.suffix == ".json" and says_the_same(path, original):
      path.write_bytes(original)  # the flip is in the name of the seal
      os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
      continue
    # orbax's; it goes back.
    own = path.name.startswith(("_", ".")) or "checkpoints" in path.parts
    assert not well or own, path
    assert own or path.name in said, path
    if stage in read and path.name not in (products.MARKER, products.COPY):
      parts = path.relative_to(copied).parts
      itself = any(part.endswith(SAYS_SO_ITSELF) for part in parts)
      with monkeypatch.context() as patched:
        if itself:  # no help from digests
          patched.setattr(products, "SMALL", -1)
        folder = copied / stage
        told = files.read_json(folder / stage_folder.MARKER)["products"]
        wrong = {} if itself else products.changed(folder, told)
        refused = bool(wrong) or refuses(read[stage], whole[stage], path)
      raised += refused
    path.write_bytes(original)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
  assert raised > count / 4  # the test can fail: most bits are numbers
  assert verify.verify(copied)[1]


def test_a_damaged_file_is_refused_and_made_again(copied, command, execute):
  """Data, a map, a set of samples: the job that reads it names the file; --repair moves it aside;
  the job that makes it makes only that; and the bytes are the same as before.
  """
  before = bytes_of(copied)
  shard = next((copied / "data").rglob("*hfhr*/**/*train*00001*"))
  table = copied / "debias" / "gaussian" / "arrays.npz"
  drawn = next(
    (copied / "samples" / "true+diffusion.zarr" / "sample" / "c").rglob("0/0/0")
  )
  dice = random.Random(1)
  for path, reads, makes in (
    (shard, "debias", "generate"),
    (table, "sample", "debias"),
  ):
    flip(path, dice)
    if reads == "debias":
      shutil.rmtree(copied / "debias")
    # Samples that are not there yet.
    refused = execute(command(reads, copied, label="other"))
    assert refused.returncode == 1
    assert f"{path.name} is not what was written there" in refused.stderr
    assert f"`downscaling {makes}` makes it again" in refused.stderr
    said, well = verify.verify(copied, repair=True)
    assert well
    assert f"MENDED {path} is not what was written" in said
    made = execute(command(makes, copied))
    assert made.returncode == 0, made.stderr
    path.with_name(path.name + products.DAMAGED).unlink()
    if reads == "debias":
      assert execute(command(reads, copied)).returncode == 0
    else:
      shutil.rmtree(copied / "samples-other", ignore_errors=True)
  flip(drawn, dice)
  shutil.rmtree(copied / "report")
  refused = execute(command("evaluate", copied))
  assert "is not what was written there" in refused.stderr
  assert verify.verify(copied, repair=True)[1]
  again = execute(command("sample", copied))
  assert again.returncode == 0, again.stderr
  assert " 1/" not in again.stderr
  for path in [*copied.rglob("*" + products.DAMAGED)]:
    path.unlink()
  assert bytes_of(copied) == before


def bytes_of(workdir):
  """{file: bytes} of all products. Markers hold times, and diagnostics seconds."""
  found = {}
  for path in sorted(workdir.rglob("*")):
    parts = path.relative_to(workdir).parts
    own = parts[0] == "report" or "attempts" in parts or "checkpoints" in parts
    timed = path.suffix == ".json" and not path.name.startswith("zarr")
    root = len(parts) == 3 and path.name == "zarr.json"  # its history says when
    if path.is_file() and not own and not timed and not root:
      found[path.relative_to(workdir)] = path.read_bytes()
  return found


def test_a_lost_marker_is_rebuilt_from_what_is_proven(copied, command, execute):
  marker = copied / "train" / stage_folder.MARKER
  said = marker.read_bytes()
  marker.unlink()
  refused = execute(command("sample", copied, label="other"))
  assert refused.returncode == 1
  assert f"downscaling verify {copied} --repair` rebuilds the marker" in refused.stderr
  assert f"FIX {marker} is missing" in verify.verify(copied)[0]
  text, well = verify.verify(copied, repair=True)
  assert well
  assert "rebuilt from its copy" in text
  assert marker.read_bytes() == said
  marker.write_bytes(said[: len(said) // 2])
  (copied / "train" / "denoising_error.npz").write_bytes(b"another")
  text, well = verify.verify(copied, repair=True)
  assert not well  # the copy cannot be shown to be of these files
  assert "its copy fits another state (denoising_error.npz)" in text


def test_a_folder_of_an_older_version_is_given_digests(copied):
  for marker in copied.rglob(stage_folder.MARKER):
    record = files.read_json(marker)
    record.pop("products")
    files.write_json(marker, record)
    marker.with_name(stage_folder.products.COPY).unlink()
  text, well = verify.verify(copied)
  assert not well
  assert "an older version finished it" in text
  assert verify.verify(copied, repair=True)[1]
  text, well = verify.verify(copied)
  assert well
  assert text.count("whole") == len(text.splitlines())


def test_verify_speaks_to_strangers(tmp_path, execute, finished):
  argv = ["downscaling", "verify"]
  run = lambda *words: execute(
    [str(pathlib.Path(os.sys.executable).parent / argv[0]), *words]
  )
  nothing = run("verify", str(tmp_path))
  assert nothing.returncode == 1
  assert "holds no stage of a run" in nothing.stderr
  assert "needs one work folder" in run("verify").stderr
  whole = run("verify", str(finished[0]))
  assert whole.returncode == 0, whole.stderr + whole.stdout
  status = run("status", str(finished[0]))
  assert status.returncode == 0, status.stderr
  assert "goodput" in status.stdout
  assert [line.split()[0] for line in status.stdout.splitlines()[1:6]] == [
    "data", "debias", "train", "samples", "report",
  ]  # fmt: skip


@pytest.mark.slow
def test_every_file_of_another_run_is_refused(
  copied, command, execute, experiment, tmp_path
):
  """The same config with another seed: same names, sizes and formats."""
  other = tmp_path / "other"
  assert execute(command("pipeline", other, seed=1)).returncode == 0
  read = readers(experiment, copied)
  swapped = 0
  for theirs in sorted(other.rglob("*")):
    name = theirs.relative_to(other)
    ours = copied / name
    if (
      not theirs.is_file()
      or not ours.is_file()
      or theirs.read_bytes() == ours.read_bytes()
    ):
      continue
    if {"attempts", "report"} & {*name.parts}:
      continue
    swapped += 1
    held, times = ours.read_bytes(), ours.stat()
    shutil.copy2(theirs, ours)
    assert (
      not verify.verify(copied / name.parts[0])[1] or "checkpoints" in name.parts
    ), name
    if "checkpoints" not in name.parts and name.name != products.COPY:
      stage = name.parts[0]
      work = Workdir(experiment, copied, meshes.make(), supervision.Stop())

      def reader(stage=stage, work=work):
        work.need(stage, "generate")
        return read[stage]()

      assert refuses(reader, None, ours)
    ours.write_bytes(held)
    os.utime(ours, ns=(times.st_atime_ns, times.st_mtime_ns))
  assert swapped > 50
