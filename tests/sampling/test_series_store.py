"""The ensemble store of series: an axis of time, stopped and resumed, grown; single fields as they
were.
"""

import jax
import numpy as np
import pytest

from downscaling.runtime import files, stage_folder, supervision
from downscaling.sampling import ensemble, solvers

FRAMES = 3
CONDITIONS = np.random.default_rng(0).normal(size=(6, FRAMES, 6, 1)).astype(np.float32)
UNIT = (4, 2)


def sampler(keys, y):
  """Series [B, L, 24, 1] in which each frame is one above the last, plus the mean of its
  condition's frame.
  """
  x = (
    solvers.noise(keys, 0, (1, 24, 1))
    + np.arange(FRAMES, dtype=np.float32)[None, :, None, None]
  )
  return x if y is None else (x + y.mean((2, 3), keepdims=True), y.mean((1, 2, 3)))


def write(path, conditions=CONDITIONS, members=3, stop=lambda: False, **changes):
  settings = {
    "space": (24,), "unit": UNIT, "devices": jax.devices(), "seed": 1,
    "identity": {"sampling": {"steps": 4}},
    "attrs": {"title": "test"}, "frames": FRAMES, "sampler": sampler,
    "coordinates": {"time": (0.5 * np.arange(FRAMES), {"long_name": "time", "units": "1"})},
  }  # fmt: skip
  return ensemble.write_ensemble(
    path, conditions=conditions, members=members, stop=stop, **(settings | changes)
  )


def test_frames_are_an_axis_of_time(tmp_path):
  write(tmp_path / "a.zarr")
  data = ensemble.read(tmp_path / "a.zarr")
  assert data.sample.dims == ("condition", "member", "time", "x")
  assert data.sample.shape == (6, 3, FRAMES, 24)
  assert data.misfit.dims == ("condition", "member")
  assert data.condition_field.dims == ("condition", "time", "x_coarse")
  np.testing.assert_array_equal(data.time, [0, 0.5, 1])
  np.testing.assert_array_equal(data.condition_field, CONDITIONS[..., 0])
  x = data.sample.values - CONDITIONS.mean((2, 3))[:, None, :, None]
  # float32 numbers below 10.
  np.testing.assert_allclose(np.diff(x, axis=2), 1, atol=1e-5)
  # Member 2 of condition 5, drawn alone.
  key = ensemble.keys(1, np.uint32([5]), np.uint32([2]))
  alone, _ = sampler(key, CONDITIONS[5:6])
  np.testing.assert_allclose(data.sample[5, 2], alone[0, ..., 0], rtol=1e-6)


def test_without_conditions_and_with_two_axes_of_space(tmp_path):
  draw = lambda keys, y: solvers.noise(keys, 0, (FRAMES, 4, 6, 2))
  write(
    tmp_path / "u.zarr", None, 5, sampler=draw, space=(4, 6), channels=2, unit=(1, 4)
  )
  data = ensemble.read(tmp_path / "u.zarr")
  assert data.sample.dims == ("condition", "member", "time", "y", "x", "channel")
  assert data.sample.shape == (1, 5, FRAMES, 4, 6, 2)


def test_stopped_resumed_and_grown_it_is_the_same(tmp_path):
  write(tmp_path / "whole.zarr")
  polls = iter([False, True, True])
  with pytest.raises(supervision.Interrupted):
    write(tmp_path / "a.zarr", CONDITIONS[:5], 2, stop=lambda: next(polls, True))
  with pytest.raises(ValueError, match="run the same `sample` command again"):
    ensemble.read(tmp_path / "a.zarr")
  write(tmp_path / "a.zarr", CONDITIONS[:5], 2)
  write(tmp_path / "a.zarr")
  one, two = (ensemble.read(tmp_path / f"{name}.zarr") for name in ("whole", "a"))
  for name in ("sample", "misfit", "condition_field"):
    np.testing.assert_array_equal(one[name], two[name])


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"conditions": CONDITIONS[:, :2]}, r"need \[conditions, 3, \*coarse, channels\]"),
    ({"conditions": CONDITIONS[:, 0]}, r"need \[conditions, 3, \*coarse, channels\]"),
    (
      {"sampler": lambda keys, y: solvers.noise(keys, 0, (24, 1))},
      r"the store takes fields \(8, 3, 24, 1\)",
    ),
    ({"coordinates": {"time": (np.arange(4), {})}}, "coordinate time"),
  ],
)
def test_what_does_not_fit(tmp_path, change, words):
  with pytest.raises(ValueError, match=words):
    write(tmp_path / "a.zarr", **change)
  assert not list(tmp_path.iterdir())


def test_stores_of_single_fields_know_nothing_of_frames(tmp_path):
  """Their identity on disk is what it was before there were series, and frames are part of that of
  series.
  """
  single = lambda keys, y: (
    solvers.noise(keys, 0, (24, 1)) + y.mean((1, 2), keepdims=True)
  )
  write(tmp_path / "a.zarr", CONDITIONS[:, 0], frames=1, sampler=single, coordinates={})
  marker = files.read_json(tmp_path / "a.units" / stage_folder.MARKER)
  assert {*marker["config"]["layout"]} == {
    "space",
    "channels",
    "coarse",
    "unit",
    "misfit",
  }
  assert ensemble.read(tmp_path / "a.zarr").sample.dims == ("condition", "member", "x")
  write(tmp_path / "b.zarr")
  other = lambda keys, y: solvers.noise(keys, 0, (2, 24, 1))
  with pytest.raises(ValueError, match=r"layout\.(coarse|frames|misfit)"):
    write(
      tmp_path / "b.zarr", CONDITIONS[:, :2], frames=2, sampler=other, coordinates={}
    )
