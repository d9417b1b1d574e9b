"""Paths on object stores, over TensorStore's store in memory: names, versions, lists, locks."""

import contextlib
import io
import pathlib
import threading

import numpy as np
import pytest
import tensorstore
import xarray

from downscaling.runtime import files, locks, mirror, products, remote_paths, stores
from downscaling.runtime.remote_paths import RemotePath, Version


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  """gs://bucket, kept by TensorStore in a folder: it compares and swaps as Google's store does."""
  kept = {"driver": "file", "path": f"{tmp_path}/bucket/"}
  opened = tensorstore.KvStore.open(kept).result()
  monkeypatch.setattr(remote_paths, "_opened", lambda scheme, bucket: opened)
  kvstore = lambda self: kept | {"path": f"{tmp_path}/bucket/{self.key}/"}
  monkeypatch.setattr(RemotePath, "kvstore", kvstore)
  return files.as_path("gs://bucket")


def test_a_name_is_a_path():
  path = files.as_path("gs://bucket/run") / "samples" / "a.zarr"
  assert str(path) == "gs://bucket/run/samples/a.zarr"
  assert (path.bucket, path.key) == ("bucket", "run/samples/a.zarr")
  assert path.with_suffix(".units").name == "a.units"
  assert str(path.relative_to(path.parents[1])) == "samples/a.zarr"
  assert path == files.folder("gs://bucket/run/samples/a.zarr")
  assert {path: 1}[files.as_path(str(path))] == 1
  assert sorted([path, path.parent])[0] == path.parent


@pytest.mark.parametrize(
  "text",
  [
    "hdfs://host/run",
    "file:///tmp/run",
    "gs:/bucket/run",
    "gs://",
    "s3://b/../c",
    "s3://b//c",
  ],
)
def test_other_schemes_and_half_names_are_refused(text):
  """As a local path, each would become a folder of that name."""
  with pytest.raises(ValueError, match=r"gs://BUCKET/FOLDER|needs a bucket"):
    files.as_path(text)


def test_a_local_name_stays_local(tmp_path):
  for text in ("runs/ks", "a:b", str(tmp_path)):
    assert type(files.as_path(text)) is type(pathlib.Path(text))


def test_no_local_function_takes_it(tmp_path):
  path = files.as_path("s3://bucket/run/marker.json")
  for use in (open, np.load, io.FileIO):
    with pytest.raises(
      TypeError, match=r"s3://bucket/run/marker\.json is on an object"
    ):
      use(path)


def test_objects_are_written_read_listed_and_moved(bucket):
  run = bucket / "run"
  assert not run.exists()
  with pytest.raises(FileNotFoundError, match="gs://bucket/run/a is not there"):
    (run / "a").read_bytes()
  (run / "a").write_text("é")
  for name in ("f/c1-m2.json", "f/c2-m2.json", "f/g/c3-m2.json", "f2/x"):
    (run / name).write_bytes(name.encode())
  assert (run / "a").read_text() == "é"
  assert run.is_dir()
  assert (run.is_file(), (run / "a").is_file()) == (False, True)
  names = lambda found: [str(each.relative_to(run)) for each in found]
  assert names(run.iterdir()) == ["a", "f", "f2"]
  assert names((run / "f").glob("c*-m*.json")) == ["f/c1-m2.json", "f/c2-m2.json"]
  assert names(run.glob("*/g")) == ["f/g"]
  assert names(run.rglob("c*.json")) == [
    "f/c1-m2.json", "f/c2-m2.json", "f/g/c3-m2.json"
  ]  # fmt: skip
  (run / "f").rename(run / "f.damaged")
  assert names(run.rglob("c3*")) == ["f.damaged/g/c3-m2.json"]
  (run / "a").unlink()
  with pytest.raises(FileNotFoundError):
    (run / "a").unlink()
  (run / "a").unlink(missing_ok=True)


def test_of_many_writers_on_a_condition_one_succeeds(bucket):
  path, won = bucket / "marker", []
  for expected in (Version(""), None):
    version = path.version() if expected is None else expected
    barrier = threading.Barrier(8)

    def race(number, version=version, barrier=barrier):
      barrier.wait()
      if path.swap(str(number).encode(), version):
        won.append(number)

    threads = [threading.Thread(target=race, args=(i,)) for i in range(8)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    assert len(won) == 1
    assert path.read_text() == str(won.pop())
  assert not path.swap(b"late", Version(""))


def test_json_is_sealed_and_created_once(bucket):
  path = bucket / "stage.json"
  assert files.create_json(path, {"a": 1})
  assert not files.create_json(path, {"a": 2})
  assert files.read_json(path) == {"a": 1}
  path.write_text(path.read_text().replace("1", "2", 1))
  with pytest.raises(ValueError, match="does not say what was written there"):
    files.read_json(path)


def test_what_fails_half_way_leaves_the_old_object(bucket):
  path = bucket / "arrays.npz"
  files.write_npz(path, {"x": np.arange(3)})
  with contextlib.suppress(RuntimeError), files.all_or_nothing(path) as file:
    file.write(b"half")
    raise RuntimeError
  with path.open("rb") as file, np.load(file) as stored:
    assert stored["x"].tolist() == [0, 1, 2]


def test_a_lock_is_held_by_one_and_taken_over_from_the_dead(bucket, monkeypatch):
  monkeypatch.setattr(locks, "BEAT", 0.05)
  path = bucket / "run" / "lock.json"
  with locks.hold(path, "the stage"):
    first = locks._changed(path)
    with pytest.raises(locks.Held, match="the stage is being written by another job"):
      locks.hold(path, "the stage").__enter__()
    deadline = threading.Event()
    for _ in range(100):
      if locks._changed(path) > first:
        break
      deadline.wait(0.05)
    assert locks._changed(path) > first  # a sign of life
    assert locks.silent(path) < 60
  assert not path.exists()
  # Of another host, silent for as long as its lock is watched.
  monkeypatch.setattr(locks, "PATIENCE", 0.3)
  dead = {"host": "elsewhere", "place": "there", "pid": 1, "started": "1", "token": "t"}
  path.write_bytes(locks._signed(dead | {"since": "then"}))
  lost = []
  with locks.hold(path, "the stage", lost=lost.append) as lock:
    lock.check()
    path.write_bytes(locks._signed(dead | {"since": "then", "token": "other"}))
    with pytest.raises(locks.Held, match="no longer ours"):
      lock.beat()
  assert path.exists()  # the other's


def test_products_are_known_by_version_and_digest(bucket):
  run = bucket / "run"
  large = bytes(products.SMALL + 1)
  (run / "small").write_bytes(b"1")
  (run / "large").write_bytes(large)
  (run / products.MARKER).write_bytes(b"{}")
  told = products.of(run)
  assert sorted(told) == ["large", "small"]
  assert told["large"][0] == len(large)
  assert products.changed(run, told) == {}
  (run / "large").write_bytes(large)  # as after a copy: another version, the same bytes
  assert products.changed(run, told) == {}
  (run / "large").write_bytes(large[:-1] + b"1")
  (run / "small").unlink()
  assert list(products.changed(run, told)) == ["large"]
  assert sorted(products.changed(run, told, whole=True)) == ["large", "small"]


def test_a_copy_here_follows_the_object(bucket, tmp_path, monkeypatch):
  monkeypatch.setenv("DOWNSCALING_CACHE", str(tmp_path / "cache"))
  data = bucket / "data"
  for name in ("a-train", "b-train", "c-test"):
    (data / name).write_text(name)
  (data / "deep" / "d").write_text("d")
  here = mirror.place(data)
  assert here != mirror.place(bucket / "other" / "data")
  mirror.pull(data, here, "*-train")
  assert sorted(p.name for p in here.glob("[!.]*")) == ["a-train", "b-train"]
  time = (here / "a-train").stat().st_mtime_ns
  (data / "b-train").write_text("new")
  mirror.pull(data, here, "*-train")
  assert (here / "a-train").stat().st_mtime_ns == time  # not fetched again
  assert (here / "b-train").read_text() == "new"
  (data / "a-train").unlink()
  mirror.pull(data, here, "*-train")
  assert not (here / "a-train").exists()
  assert mirror.tree(data) == here
  assert (here / "deep" / "d").read_text() == "d"


def test_zarr_and_tensorstore_open_one_store(bucket):
  path = bucket / "a.zarr"
  values = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
  encoding = {"u": {"chunks": (1, 4), "shards": (2, 4), "compressors": stores.CHECKED}}
  xarray.Dataset({"u": (("row", "x"), values)}).to_zarr(
    stores.store(path), mode="w", zarr_format=3, consolidated=False, encoding=encoding
  )
  with xarray.open_zarr(stores.store(path), consolidated=False) as data:
    np.testing.assert_array_equal(data["u"], values)
    np.testing.assert_array_equal(
      data["u"][3], values[3]
    )  # the last bytes, then a part
  spec = {"driver": "zarr3", "kvstore": stores.kvstore(path / "u")}
  array = tensorstore.open(spec, open=True).result()
  array[2:4].write(values[:2]).result()
  with xarray.open_zarr(stores.store(path), consolidated=False) as data:
    np.testing.assert_array_equal(data["u"][2:4], values[:2])
