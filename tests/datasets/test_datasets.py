"""Shards, resume, splits, statistics, the pipeline, on a toy equation: u = sin(x + id) + time."""

import jax
import numpy as np
import pytest

from downscaling.datasets import generate, simulated, training_batches
from downscaling.fields import statistics
from downscaling.fields.basis import Trigonometric
from downscaling.runtime import mesh as meshes
from downscaling.runtime import supervision

SPACE, TIMES = (16,), np.array([1.0, 2.0, 3.0])


def _plan(folder, calls=None, **changes):
  x = np.arange(SPACE[0]) * 2 * np.pi / SPACE[0]

  def rollout(ids):
    if calls is not None:
      calls.append(np.asarray(ids))
    return np.sin(x + np.asarray(ids)[:, None, None])[..., None] * TIMES[:, None, None]

  settings = {
    "trajectories": {"train": 10, "test": 4},
    "shard": 4,
    "times": TIMES,
    "check": lambda *_: None,
  }
  builder = simulated.make("ks", "lflr", folder, SPACE)
  return generate.Plan(builder=builder, rollout=rollout, **settings | changes)


def _never():
  return False


def _made(folder, **changes):
  plan = _plan(folder, **changes)
  generate.generate(plan, meshes.make(), _never)
  return plan.builder


def test_written_examples_come_back(tmp_path):
  _made(tmp_path)
  builder = simulated.make("ks", "lflr", tmp_path, SPACE)  # as another process would
  rows = simulated.load(builder, "train")
  assert rows["u"].shape == (30, 16, 1)
  assert rows["u"].dtype == np.float32
  expected = np.sin(np.arange(16) * 2 * np.pi / 16 + 2)
  np.testing.assert_allclose(
    rows["u"][7, :, 0], expected * 2, atol=1e-6
  )  # float32 of values below 3
  assert (rows["trajectory"][7], rows["time"][7]) == (2, 2.0)


def test_splits_share_no_trajectory(tmp_path):
  builder = _made(tmp_path)
  train, test = (
    set(simulated.load(builder, split)["trajectory"].tolist())
    for split in ("train", "test")
  )
  assert len(train) == 10
  assert len(test) == 4
  assert not train & test


def test_a_subset_takes_one_snapshot_of_each_trajectory(tmp_path):
  rows = simulated.load(_made(tmp_path), "train", 10)
  assert len(set(rows["trajectory"].tolist())) == 10
  assert len(set(rows["time"].tolist())) == 3  # and not always the same time


def test_stop_and_resume_redo_nothing_and_give_the_same_files(tmp_path):
  _made(tmp_path / "straight")
  calls = []
  asked = iter([True])
  with pytest.raises(supervision.Interrupted, match="4 of 14 trajectories on disk"):
    generate.generate(
      _plan(tmp_path / "cut", calls), meshes.make(), lambda: next(asked, True)
    )
  with pytest.raises(FileNotFoundError, match="missing or half made"):
    simulated.source(simulated.make("ks", "lflr", tmp_path / "cut", SPACE), "train")
  done = len(calls)
  generate.generate(_plan(tmp_path / "cut", calls), meshes.make(), _never)
  again = [ids.tolist() for ids in calls[done:]]
  assert [0, 1, 2, 3] not in again  # the finished shard
  for path in sorted((tmp_path / "straight").rglob("*.array_record*")):
    assert (
      path.read_bytes()
      == (tmp_path / "cut" / path.relative_to(tmp_path / "straight")).read_bytes()
    )
  before = len(calls)
  assert generate.generate(_plan(tmp_path / "cut", calls), meshes.make(), _never) == 0
  assert len(calls) == before


def test_one_device_equals_four(tmp_path):
  """Shards are padded to the mesh; the padding must not be written."""
  generate.generate(_plan(tmp_path / "1", shard=5), meshes.make(1), _never)
  generate.generate(_plan(tmp_path / "4", shard=5), meshes.make(4), _never)
  one, four = (
    simulated.load(simulated.make("ks", "lflr", tmp_path / n, SPACE), "train")
    for n in "14"
  )
  np.testing.assert_array_equal(one["u"], four["u"])


def test_truncated_shard_is_named_and_others_are_kept(tmp_path):
  builder = _made(tmp_path)
  path = sorted(builder.data_path.glob("*train.array_record-00001*"))[0]
  path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2])
  (builder.data_path / "dataset_info.json").unlink()
  with pytest.raises(
    ValueError,
    match=r"train.array_record-00001.* is damaged.* Move it away and run the same command",
  ):
    generate.generate(_plan(tmp_path), meshes.make(), _never)


def test_nan_in_the_data_is_named(tmp_path):
  def check(fields, ids, times):
    if np.isnan(fields).any():
      raise FloatingPointError(f"trajectory {ids[0]}")

  plan = _plan(tmp_path, check=check)
  bad = generate.Plan(
    **{**plan.__dict__, "rollout": lambda ids: plan.rollout(ids) * np.nan}
  )
  with pytest.raises(FloatingPointError, match="trajectory 0"):
    generate.generate(bad, meshes.make(), _never)
  # Bad input never yields output.
  assert not list(plan.builder.data_path.glob("*.array_record*"))
  # And once more at the door, for data that were made elsewhere:
  unchecked = generate.Plan(
    **{**plan.__dict__, "rollout": bad.rollout, "check": lambda *_: None}
  )
  generate.generate(unchecked, meshes.make(), _never)
  with pytest.raises(
    ValueError,
    match=r"split train: trajectory 0 at time 1 holds NaN or infinity \(30 of 30",
  ):
    simulated.load(plan.builder, "train")
  with pytest.raises(ValueError, match="trajectory 0 of the training split holds NaN"):
    statistics.measure(simulated.source(plan.builder, "train"), Trigonometric(SPACE))


def test_too_few_samples_are_refused(tmp_path):
  builder = _made(tmp_path)
  with pytest.raises(ValueError, match="has 30 train snapshots, 31 are needed"):
    simulated.load(builder, "train", 31)
  with pytest.raises(ValueError, match="has 0 calibration snapshots"):
    simulated.source(builder, "calibration")
  source = simulated.source(builder, "test")
  with pytest.raises(ValueError, match="12 training snapshots, a batch of 16"):
    training_batches.Batches(source, None, 16, seed=0)


def test_plain_tfds_download_says_which_job(tmp_path):
  with pytest.raises(RuntimeError, match="downscaling generate"):
    simulated.make("ks", "hfhr", tmp_path, (192,)).download_and_prepare()


def test_another_grid_is_another_data_set(tmp_path):
  assert (
    simulated.make("ks", "hfhr", tmp_path, (192,)).data_dir
    != simulated.make("ks", "hfhr", tmp_path, (96,)).data_dir
  )
  # An equation without a class here.
  other = simulated.make("burgers", "hfhr", tmp_path, (192,))
  assert (other.name, other.shape) == ("burgers", (192, 1))


class Memory(list):
  """A source in memory."""

  def __getitems__(self, index):
    return [self[i] for i in index]


def test_statistics_against_numpy(tmp_path):
  """Two channels of other scales; float32 storage of the result allows 1e-5."""
  rng = np.random.default_rng(0)
  u = (rng.normal(size=(50, 8, 6, 2)) * [3.0, 0.1] + [5.0, -1.0]).astype(np.float32)
  stats = statistics.measure(
    Memory({"u": v, "trajectory": 0} for v in u), Trigonometric((8, 6)), chunk=7
  )
  np.testing.assert_allclose(stats.mean, u.mean((0, 1, 2)), rtol=1e-5)
  np.testing.assert_allclose(stats.std, u.std((0, 1, 2)), rtol=1e-5)
  z = stats.normalise(u)
  expected = (np.abs(np.fft.fftn(z, axes=(1, 2))) ** 2).mean(0) / 48
  np.testing.assert_allclose(
    stats.spectrum, expected, rtol=1e-3, atol=1e-4
  )  # k = 0 is a difference of large numbers
  np.testing.assert_allclose(
    stats.spectrum.sum((0, 1)), 48, rtol=1e-5
  )  # Parseval: N times the variance
  np.testing.assert_allclose(stats.restore(z), u, atol=1e-5)
  stats.save(tmp_path / "s.npz")
  np.testing.assert_array_equal(
    statistics.load(tmp_path / "s.npz").spectrum, stats.spectrum
  )
  (tmp_path / "s.npz").write_bytes(b"PK")
  with pytest.raises(ValueError, match="is damaged"):
    statistics.load(tmp_path / "s.npz")
  with pytest.raises(FileNotFoundError, match="downscaling generate"):
    statistics.load(tmp_path / "none.npz")
  constant = Memory({"u": np.ones((8, 1), np.float32)} for _ in range(3))
  with pytest.raises(ValueError, match="channel 0 of the training split is constant"):
    statistics.measure(constant, Trigonometric((8,)))


def _batches(seed=0):
  stats = statistics.Statistics(np.zeros(1), np.ones(1), np.ones((1, 1)))
  return training_batches.Batches(
    Memory({"u": np.full((1, 1), i, np.float32)} for i in range(20)), stats, 8, seed
  )


def test_every_epoch_holds_each_example_once_and_is_shuffled_anew():
  order = np.concatenate(
    [_batches().indices(step) for step in range(5)]
  )  # 40 rows: two epochs of 20
  assert sorted(order[:20]) == sorted(order[20:]) == list(range(20))
  assert (order[:20] != order[20:]).any()
  assert (
    order != np.concatenate([_batches(seed=1).indices(s) for s in range(5)])
  ).any()


def test_rows_do_not_depend_on_processes_or_on_where_the_stream_began():
  batches = _batches()
  whole = batches.rows(3, np.arange(8))["x"]
  for part in ([0, 1, 4, 5], [7], [2, 3]):
    np.testing.assert_array_equal(batches.rows(3, np.array(part))["x"], whole[part])
  mesh = meshes.make()
  late = list(batches.stream(mesh, 3, 6))
  full = list(batches.stream(mesh, 0, 6))
  assert len(late) == 3
  assert len(full) == 6
  np.testing.assert_array_equal(late[0]["x"], whole)
  for a, b in zip(late, full[3:], strict=True):
    np.testing.assert_array_equal(a["x"], b["x"])
  assert late[0]["x"].sharding == meshes.rows(mesh)
  assert isinstance(late[0]["x"], jax.Array)


def test_any_beginning_of_the_rows_is_spread_out():
  """An ensemble that grows keeps its first conditions; few of them come from as many trajectories,
  at all times.
  """
  order = simulated.spread(6, 4)
  assert sorted(order) == [*range(24)]
  assert sorted(order[:6] // 4) == [*range(6)]
  assert {*(order[:6] % 4)} == {0, 1, 2, 3}


@pytest.mark.parametrize(
  ("trajectories", "snapshots"), [(12, 4), (7, 3), (10, 1), (30, 2)]
)
def test_rows_are_balanced_over_trajectories_and_times(trajectories, snapshots):
  """A field's law may change with time, and neighbours of a trajectory are alike: no count may
  alias with either.
  """
  for count in range(1, trajectories * snapshots + 1):
    rows = simulated.balanced(trajectories, snapshots, count)
    assert len(np.unique(rows)) == len(rows) == count
    for place, kinds in (
      (rows // snapshots, trajectories),
      (rows % snapshots, snapshots),
    ):
      often = np.bincount(place, minlength=kinds)
      assert often.max() - often.min() <= 1, count
  with pytest.raises(ValueError, match=f"1 to {trajectories * snapshots} can be had"):
    simulated.balanced(trajectories, snapshots, trajectories * snapshots + 1)


def test_a_source_says_how_many_rows_a_trajectory_has(tmp_path):
  builder = _made(tmp_path)
  assert simulated._rows_a_trajectory(simulated.source(builder, "train")) == 3
