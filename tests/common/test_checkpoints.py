import errno

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from downscaling.common import checkpoints as ckpt
from downscaling.common import mesh as meshes


def _state(value):
  return {"w": jnp.full((8, 3), value), "step": jnp.asarray(int(value), jnp.int32)}


def _target(mesh, sharding=meshes.replicated):
  return ckpt.abstract(jax.eval_shape(lambda: _state(0.0)), sharding(mesh))


def _save(folder, *steps):
  saver = ckpt.Checkpoints(folder, "abc")
  for step in steps:
    saver.save(step, _state(float(step)), note="x")
  saver.close()


def test_round_trip_onto_another_mesh(tmp_path):
  _save(tmp_path, 1, 2)
  for devices in (1, 2, 4):
    mesh = meshes.make(devices)
    step, state = ckpt.Checkpoints(tmp_path, "abc").restore_last(_target(mesh))
    assert step == 2
    np.testing.assert_array_equal(state["w"], 2.0)
    assert state["w"].sharding.device_set == set(mesh.devices.flat)
  assert ckpt.Checkpoints(tmp_path, "abc").record(2)["note"] == "x"


def test_nothing_there_is_none(tmp_path):
  assert ckpt.Checkpoints(tmp_path / "new", "abc").restore_last(_target(meshes.make(1))) is None


def _damage(folder):
  """Cuts every file that holds array data to half its length."""
  files = [p for p in folder.rglob("*") if p.is_file() and p.stat().st_size > 64 and p.name != "metadata"]
  assert files
  for path in files:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_damaged_checkpoint_is_named_and_stepped_over(tmp_path, capsys):
  _save(tmp_path, 1, 2)
  _damage(tmp_path / "2")
  step, state = ckpt.Checkpoints(tmp_path, "abc").restore_last(_target(meshes.make(1)))
  assert step == 1
  np.testing.assert_array_equal(state["w"], 1.0)
  assert "2 cannot be read" in capsys.readouterr().err
  assert (tmp_path / "2").exists()


def test_all_damaged_is_an_error_with_the_fix(tmp_path):
  _save(tmp_path, 1)
  _damage(tmp_path / "1")
  with pytest.raises(ValueError, match=r"no checkpoint in .* can be read .*use another --workdir"):
    ckpt.Checkpoints(tmp_path, "abc").restore_last(_target(meshes.make(1)))


def test_other_config_is_refused(tmp_path):
  _save(tmp_path, 1)
  with pytest.raises(ValueError, match="was made by config abc, this run is xyz"):
    ckpt.Checkpoints(tmp_path, "xyz").restore_last(_target(meshes.make(1)))


def test_full_disk_is_said_in_words(tmp_path, monkeypatch):
  _save(tmp_path, 1)
  saver = ckpt.Checkpoints(tmp_path, "abc")

  def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(saver._manager, "save", full)
  with pytest.raises(OSError, match=r"no space left while writing .*; the checkpoints already there are whole"):
    saver.save(2, _state(2.0))
  assert saver.steps() == [1]
