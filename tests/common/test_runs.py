import json
import os
import signal

import ml_collections
import numpy as np
import pytest

from downscaling.common import mesh as meshes
from downscaling.common import runs


def test_stage_remembers_and_refuses_another_config(tmp_path):
  config = ml_collections.ConfigDict({"a": {"rate": 0.1, "sizes": (1, 2)}, "seed": 0})
  stage = runs.open_stage(tmp_path / "train", "train", config)
  (stage.path / "precious").write_text("mine")
  assert not stage.complete
  stage.finish(error=0.5)
  again = runs.open_stage(tmp_path / "train", "train", config)
  assert again.complete
  assert again.summary == {"error": 0.5}
  config.a.rate = 0.2
  with pytest.raises(ValueError, match=r"made by another config \(a.rate: 0.1 -> 0.2\). Nothing was touched"):
    runs.open_stage(tmp_path / "train", "train", config)
  assert (stage.path / "precious").read_text() == "mine"


def test_folder_of_someone_else_is_not_touched(tmp_path):
  (tmp_path / "notes.txt").write_text("mine")
  with pytest.raises(FileExistsError, match="downscaling did not make it"):
    runs.open_stage(tmp_path, "train", {})
  assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_damaged_marker_is_named(tmp_path):
  stage = runs.open_stage(tmp_path / "x", "x", {})
  (stage.path / runs.MARKER).write_text('{"schema": 1, ')
  with pytest.raises(ValueError, match=r"stage.json is not valid JSON"):
    runs.open_stage(tmp_path / "x", "x", {})


def test_time_adds_up_over_interruptions(tmp_path):
  stage = runs.open_stage(tmp_path / "x", "x", {})
  with pytest.raises(KeyError), stage.timed():
    raise KeyError
  first = runs.read_json(stage.path / runs.MARKER)["seconds"]
  with stage.timed():
    pass
  assert runs.read_json(stage.path / runs.MARKER)["seconds"] >= first


def test_json_is_all_or_nothing(tmp_path):
  path = tmp_path / "a.json"
  runs.write_json(path, {"x": np.float32(1.5), "y": [float("nan")], "z": np.arange(2)})
  assert json.loads(path.read_text()) == {"x": 1.5, "y": [None], "z": [0, 1]}
  with pytest.raises(TypeError):
    runs.write_json(path, {"x": object()})
  assert json.loads(path.read_text())["x"] == 1.5
  assert os.listdir(tmp_path) == ["a.json"]


def test_hash_ignores_order_and_container():
  assert runs.config_hash({"a": (1, 2), "b": 1}) == runs.config_hash({"b": 1, "a": [1, 2]})
  assert runs.config_hash({"a": 1}) != runs.config_hash({"a": 2})
  with pytest.raises(TypeError, match="has no place in a config"):
    runs.plain({"f": print})


@pytest.mark.parametrize(
  ("every", "step", "last", "expected"), [(10, 20, 99, True), (10, 21, 99, False), (10, 99, 99, True), (0, 5, 9, False)]
)
def test_is_time(every, step, last, expected):
  assert runs.is_time(every, step, last) is expected


def test_sigterm_is_noticed_and_the_old_handler_comes_back():
  before = signal.getsignal(signal.SIGTERM)
  with runs.polite_stop() as stop:
    assert not stop()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop()
  assert signal.getsignal(signal.SIGTERM) is before


def test_scalars_round_trip_and_the_last_of_a_step_wins(tmp_path):
  for value in (1.0, 2.0):  # a restart logs step 1 again
    writer = runs.MetricWriter(tmp_path)
    writer.write_scalars(1, {"loss": value, "other": 9.0})
    writer.close()
  assert runs.read_scalars(tmp_path, "loss") == ([1], [2.0])


def test_progress_prints_plain_lines_in_a_log(capsys):
  with runs.Progress("job", total=4, unit="units", done=2) as bar:
    bar.advance(2, loss=0.25)
  assert "job: 4/4 units" in capsys.readouterr().err


def test_mesh_messages():
  mesh = meshes.make()
  assert mesh.size == 4
  with pytest.raises(ValueError, match=r"Set --config.train.batch=4 or 8"):
    meshes.check_divides(6, mesh, "a batch", "train.batch")
  with pytest.raises(ValueError, match=r"config.mesh.data=9, but 4 devices are here"):
    meshes.make(9)
