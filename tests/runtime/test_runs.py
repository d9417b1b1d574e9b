import json
import os
import time

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from downscaling.runtime import files, locks, metric_writer, progress, stage_folder
from downscaling.runtime import mesh as meshes


def test_stage_remembers_and_refuses_another_config(tmp_path):
  config = ml_collections.ConfigDict({"a": {"rate": 0.1, "sizes": (1, 2)}, "seed": 0})
  stage = stage_folder.open_stage(tmp_path / "train", "train", config)
  (stage.path / "precious").write_text("mine")
  assert not stage.complete
  stage.finish(error=0.5)
  again = stage_folder.open_stage(tmp_path / "train", "train", config)
  assert again.complete
  assert again.summary == {"error": 0.5}
  config.a.rate = 0.2
  with pytest.raises(
    ValueError,
    match=r"made by another config \(a.rate: 0.1 -> 0.2\). Nothing was touched",
  ):
    stage_folder.open_stage(tmp_path / "train", "train", config)
  assert (stage.path / "precious").read_text() == "mine"


def test_folder_of_someone_else_is_not_touched(tmp_path):
  (tmp_path / "notes.txt").write_text("mine")
  with pytest.raises(FileExistsError, match="downscaling did not make it"):
    stage_folder.open_stage(tmp_path, "train", {})
  assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_damaged_marker_is_named(tmp_path):
  stage = stage_folder.open_stage(tmp_path / "x", "x", {})
  (stage.path / stage_folder.MARKER).write_text('{"schema": 1, ')
  with pytest.raises(ValueError, match=r"stage.json is not valid JSON"):
    stage_folder.open_stage(tmp_path / "x", "x", {})


def test_a_lost_marker_points_at_its_copy(tmp_path):
  stage = stage_folder.open_stage(tmp_path / "x", "x", {})
  (stage.path / stage_folder.MARKER).unlink()
  with pytest.raises(FileExistsError, match=f"verify {tmp_path} --repair` rebuilds"):
    stage_folder.open_stage(tmp_path / "x", "x", {})


def test_time_adds_up_over_interruptions(tmp_path):
  stage = stage_folder.open_stage(tmp_path / "x", "x", {})

  def fails():
    with stage.owned():
      time.sleep(0.1)
      raise KeyError

  with pytest.raises(KeyError):
    fails()
  first = stage.seconds
  assert first >= 0.1
  with stage.owned():
    pass
  assert first <= stage.seconds < first + 1
  assert stage.devices == [f"4 × cpu on {os.cpu_count()} cores a host"]


def test_a_stage_has_one_owner_who_sweeps_what_the_last_one_left(tmp_path, capsys):
  stage = stage_folder.open_stage(tmp_path / "x", "x", {})
  litter = stage.path / "deep" / files.temporary_name("a.npz")
  litter.parent.mkdir()
  litter.write_text("half")
  other = stage.path / ".notes.tmp"  # not a name that we give
  other.write_text("mine")
  with stage.owned():
    assert not litter.exists()
    with pytest.raises(
      locks.Held, match=r"the stage x of .* is being written by another job"
    ):
      stage.owned().__enter__()
  assert other.read_text() == "mine"
  assert not (stage.path / stage_folder.LOCK).exists()
  assert "removed 1 unfinished files" in capsys.readouterr().err


def test_of_two_markers_at_the_same_time_one_is_written(tmp_path):
  assert files.create_json(tmp_path / "a.json", {"who": 1})
  assert not files.create_json(tmp_path / "a.json", {"who": 2})
  assert files.read_json(tmp_path / "a.json") == {"who": 1}
  assert os.listdir(tmp_path) == ["a.json"]


def test_json_says_when_it_was_changed(tmp_path):
  path = tmp_path / "a.json"
  files.write_json(path, {"x": 1.5})
  assert files.read_json(path) == {"x": 1.5}
  path.write_text(path.read_text().replace("1.5", "2.5"))
  with pytest.raises(ValueError, match=r"a.json does not say what was written there"):
    files.read_json(path)
  path.write_text('{"x": 2.5}')  # of an older version, or a person's
  assert files.read_json(path) == {"x": 2.5}


def test_json_is_all_or_nothing(tmp_path):
  path = tmp_path / "a.json"
  files.write_json(path, {"x": np.float32(1.5), "y": [float("nan")], "z": np.arange(2)})
  assert files.read_json(path) == {"x": 1.5, "y": [None], "z": [0, 1]}
  with pytest.raises(TypeError):
    files.write_json(path, {"x": object()})
  assert json.loads(path.read_text())["x"] == 1.5
  assert os.listdir(tmp_path) == ["a.json"]


def test_hash_ignores_order_and_container():
  assert stage_folder.config_hash({"a": (1, 2), "b": 1}) == stage_folder.config_hash(
    {"b": 1, "a": [1, 2]}
  )
  assert stage_folder.config_hash({"a": 1}) != stage_folder.config_hash({"a": 2})
  with pytest.raises(TypeError, match="has no place in a config"):
    stage_folder.plain({"f": print})


@pytest.mark.parametrize(
  ("every", "step", "last", "expected"),
  [(10, 20, 99, True), (10, 21, 99, False), (10, 99, 99, True), (0, 5, 9, False)],
)
def test_is_time(every, step, last, expected):
  assert progress.is_time(every, step, last) is expected


def test_a_run_that_goes_on_drops_what_was_written_after_its_checkpoint(tmp_path):
  """Steps 1-3, then on from 2: with its evaluation, or with that still to come; a torn row is
  dropped too.
  """
  for after, evaluated, left in (
    (2, True, ["1,loss", "2,loss", "2,validation/error"]),
    (2, False, ["1,loss", "2,loss"]),
  ):
    folder = tmp_path / str(evaluated)
    writer = metric_writer.MetricWriter(folder)
    for step in (1, 2, 3):
      writer.write_scalars(step, {"loss": 0.1 * step})
      writer.write_speed(step, {"steps_per_second": 1.0})
      if step == 2:
        writer.write_scalars(step, {"validation/error": 0.5})
    writer.write_images(3, {"spectrum": np.zeros((4, 4, 3), np.uint8)})
    writer.close()
    with open(folder / "metrics.csv", "a") as file:
      file.write("3,lo")
    metric_writer.MetricWriter(folder, after, evaluated).close()
    rows = (folder / "metrics.csv").read_text().split()
    assert [row.rpartition(",")[0] for row in rows] == left
    assert metric_writer.read_scalars(folder, "loss") == ([1, 2], [0.1, 0.2])
    assert len((folder / "speed.csv").read_text().split()) == 2


def test_progress_prints_plain_lines_in_a_log(capsys):
  with progress.Progress("job", total=4, unit="units", done=2) as bar:
    bar.advance(2, loss=0.25)
  assert "job: 4/4 units" in capsys.readouterr().err


def test_mesh_messages():
  mesh = meshes.make()
  assert mesh.size == 4
  with pytest.raises(ValueError, match=r"Set --config.train.batch=4 or 8"):
    meshes.check_divides(6, mesh.size, "a batch", "train.batch")
  with pytest.raises(
    ValueError, match=r"config.mesh.data=9 × fsdp=1, but 4 devices are here"
  ):
    meshes.make(9)
  with pytest.raises(
    ValueError,
    match=r"config.mesh.fsdp=3 does not divide 4 devices: use one of \[1, 2, 4\]",
  ):
    meshes.make(fsdp=3)
  with pytest.raises(
    ValueError,
    match=r"config.mesh.fsdp=4 divides no axis of any parameter \(the largest is \(33, 35\)",
  ):
    meshes.state_specs(
      meshes.make(fsdp=4), {"a": jnp.zeros((33, 35)), "b": jnp.zeros(4)}
    )


def test_every_leaf_is_split_along_its_largest_axis_that_divides():
  leaves = {
    "tall": (64, 32),
    "wide": (32, 64),
    "odd": (33, 64),
    "stuck": (33, 35),
    "small": (4, 4),
    "scalar": (),
  }
  specs = meshes.state_specs(
    meshes.make(data=1, fsdp=4), {k: jnp.zeros(v) for k, v in leaves.items()}
  )
  P = jax.sharding.PartitionSpec
  assert specs == {
    "tall": P("fsdp"),
    "wide": P(None, "fsdp"),
    "odd": P(None, "fsdp"),
  } | dict.fromkeys(("stuck", "small", "scalar"), P())


@pytest.mark.parametrize("sizes", [(1, 1), (2, 2), (4, 1), (1, 4)])
def test_host_rows_come_back_in_order_on_any_mesh(sizes):
  mesh = meshes.make(*sizes)
  x = np.arange(8.0)[:, None]
  assert meshes.host_rows(mesh, 8).tolist() == list(range(8))
  made = meshes.to_global(mesh, {"x": x}, 8)["x"]
  np.testing.assert_array_equal(made, x)
  assert made.sharding.shard_shape(made.shape) == (8 // mesh.size, 1)
