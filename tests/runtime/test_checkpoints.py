import errno

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from downscaling.runtime import checkpoints as ckpt
from downscaling.runtime import mesh as meshes


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


def test_a_record_is_what_it_was_when_it_was_saved(tmp_path):
  """It is written behind, while the caller's own list goes on growing."""
  saver, history = ckpt.Checkpoints(tmp_path, "abc", keep=10), []
  for step in range(10):
    history.append(step)
    saver.save(step, _state(float(step)), history=history)
  history.append(10)
  saver.close()
  assert [len(saver.record(step)["history"]) for step in range(10)] == [*range(1, 11)]


def test_nothing_there_is_none(tmp_path):
  assert (
    ckpt.Checkpoints(tmp_path / "new", "abc").restore_last(_target(meshes.make(1)))
    is None
  )


def _damage(folder):
  """Cuts every file that holds array data to half its length."""
  files = [
    p
    for p in folder.rglob("*")
    if p.is_file() and p.stat().st_size > 64 and p.name != "metadata"
  ]
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
  with pytest.raises(
    ValueError, match=r"no checkpoint in .* can be read .*use another --workdir"
  ):
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
  with pytest.raises(
    OSError,
    match=r"no space left while writing .*; the checkpoints already there are whole",
  ):
    saver.save(2, _state(2.0))
  assert saver.steps() == [1]


def _values(folder):
  """The files that hold array data."""
  return [
    p
    for p in folder.rglob("*")
    if p.is_file() and p.parent.name == "d" and p.stat().st_size > 64
  ]


def test_a_flipped_byte_is_seen_and_the_step_can_be_saved_again(tmp_path, capsys):
  """One bit of one file: TensorStore alone may read it as another number.

  What it was is kept under another name.
  """
  _save(tmp_path, 1, 2)
  victim = _values(tmp_path / "2")[0]
  bytes_ = bytearray(victim.read_bytes())
  bytes_[len(bytes_) // 2] ^= 1
  victim.write_bytes(bytes_)
  saver = ckpt.Checkpoints(tmp_path, "abc")
  assert saver.restore_last(_target(meshes.make(1)))[0] == 1
  assert (
    f"{victim.relative_to(tmp_path / '2')} has changed since it was written"
    in capsys.readouterr().err
  )
  saver.save(2, _state(2.0))
  saver.close()
  assert ckpt.Checkpoints(tmp_path, "abc").restore_last(_target(meshes.make(1)))[0] == 2
  assert (
    tmp_path / "2.damaged" / victim.relative_to(tmp_path / "2")
  ).read_bytes() == bytes_


def test_what_is_not_finite_is_not_saved(tmp_path):
  saver = ckpt.Checkpoints(tmp_path, "abc")
  saver.save(1, _state(1.0))
  bad = _state(2.0) | {"w": jnp.full((8, 3), 2.0).at[5, 1].set(jnp.nan)}
  with pytest.raises(
    FloatingPointError,
    match=r"step 2 is not saved: 1 leaves .* first is \['w'\]. .* is step 1 and",
  ):
    saver.save(2, bad)
  saver.close()
  assert ckpt.Checkpoints(tmp_path, "abc").steps() == [1]


def test_an_unfinished_save_is_ignored_and_left(tmp_path):
  _save(tmp_path, 1)
  (tmp_path / "2.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
  saver = ckpt.Checkpoints(tmp_path, "abc")
  assert saver.restore_last(_target(meshes.make(1)))[0] == 1
  saver.save(2, _state(2.0))
  saver.close()
  assert ckpt.Checkpoints(tmp_path, "abc").restore_last(_target(meshes.make(1)))[0] == 2


@pytest.mark.parametrize(
  ("keep", "left"),
  [
    (ckpt.Keep(last=2), [7, 8]),
    (ckpt.Keep(last=1, every=3), [3, 6, 8]),
    (ckpt.Keep(last=1, best=2, metric="error"), [4, 5, 8]),
  ],
)
def test_policies(tmp_path, keep, left):
  saver = ckpt.Checkpoints(tmp_path, "abc", keep)
  for step in range(1, 9):
    saver.save(
      step, _state(float(step)), {"error": abs(step - 4.4)} if step < 8 else None
    )
  saver.close()
  assert ckpt.Checkpoints(tmp_path, "abc").steps() == left


def test_another_state_is_refused_before_it_is_read(tmp_path):
  _save(tmp_path, 1)
  target = _target(meshes.make(1)) | {"w": jax.ShapeDtypeStruct((8, 4), jnp.float32)}
  with pytest.raises(ValueError, match=r"holds another state \(\['w'\]: "):
    ckpt.Checkpoints(tmp_path, "abc").restore_last(target)
