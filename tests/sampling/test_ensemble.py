"""The ensemble store: killed and resumed, on other devices, in other units: the same fields;
refusals; xarray.
"""

import hashlib
import json
import pathlib
import re

import jax
import numpy as np
import pytest
import tensorstore
import xarray

from downscaling.diffusion import schedules
from downscaling.fields.operators import Strided
from downscaling.runtime import (
  files,
  program_cost,
  random_keys,
  stage_folder,
  supervision,
)
from downscaling.sampling import (
  ensemble,
  ensemble_store,
  ensemble_units,
  gaussian_gain,
  guidance,
  solvers,
)

OP = Strided.on((24,), 4)
CONDITIONS = np.random.default_rng(0).normal(size=(5, 6, 1)).astype(np.float32)
never = lambda: False


@pytest.fixture(scope="module")
def sampler():
  """Draws of a Gaussian posterior by the real guidance and solver."""
  s = 1 / (1 + (np.abs(np.fft.fftfreq(24, 1 / 24)) / 3) ** 4)[:, None]
  g = gaussian_gain.Gain(OP, gaussian_gain.prior_variance(s))
  denoise = lambda x, sigma: x * (1 / (1 + sigma[:, None, None] ** 2))
  levels = schedules.levels("edm", 4, 3.0, 0.01)

  def draw(keys, y):
    guided = guidance.make("wiener", denoise, OP, y, gain=g)
    return solvers.dpm_solver_pp_2m_sde(
      guided.denoise, gaussian_gain.gaussian_start(keys, g, y, 3.0), levels, keys
    )

  return draw


def write(path, sampler, **kwargs):
  defaults = {
    "conditions": CONDITIONS, "members": 6, "space": (24,), "unit": (2, 4),
    "devices": jax.devices()[:1], "seed": 1,
    "identity": {"sampling": {"steps": 4}}, "attrs": {"title": "test", "config_hash": "abc"},
    "stop": never,
  }  # fmt: skip
  return ensemble.write_ensemble(path, sampler=sampler, **(defaults | kwargs))


def with_misfit(keys, y):
  """A sampler in which the members of a condition, four in a unit, act on each other, as they do
  when resampled.
  """
  x = solvers.noise(keys, 0, (24, 1)).reshape(-1, 4, 24, 1)
  x = x - x.mean(1, keepdims=True)
  return x.reshape(-1, 24, 1) + y.mean(1, keepdims=True), (x**2).mean((2, 3)).reshape(
    -1
  )


def stop_after(polls):
  left = iter(range(polls))
  return lambda: next(left, None) is None


@pytest.fixture(scope="module")
def whole(tmp_path_factory, sampler):
  """Drawn by four devices, where other tests use one: what they compare with it is compared across
  devices, too.
  """
  path = tmp_path_factory.mktemp("whole") / "a.zarr"
  summary = write(path, sampler, devices=jax.devices())
  assert summary["units"] == summary["drawn"] == 6
  return path


def samples(path):
  return ensemble.read(path).sample.values


def test_xarray_reads_names_and_attributes(whole):
  with xarray.open_zarr(whole) as data:  # warnings are errors here
    assert data.sample.dims == ("condition", "member", "x")
    assert data.sample.shape == (5, 6, 24)
    assert data.sample.dtype == np.float32
    assert data.condition_field.dims == ("condition", "x_coarse")
    np.testing.assert_array_equal(data.condition_field, CONDITIONS[..., 0])
    np.testing.assert_array_equal(data.condition, np.arange(5))
    assert data.attrs["done_fraction"] == 1
    assert data.attrs["Conventions"].startswith("CF-")
    assert {"title", "config_hash", "history"} <= set(data.attrs)
    np.testing.assert_allclose(
      data.sample[..., ::4],
      np.broadcast_to(CONDITIONS.transpose(0, 2, 1), (5, 6, 6)),
      atol=1e-5,
    )


def test_killed_and_resumed_equals_undisturbed(tmp_path, whole, sampler):
  path = tmp_path / "a.zarr"
  for done in (2, 4):
    with pytest.raises(supervision.Interrupted, match=f"{done} of 6 units"):
      write(path, sampler, stop=stop_after(2))
    assert len(list((tmp_path / "a.units").glob("c*-m*.json"))) == done
    unfinished = xarray.open_zarr(path)
    assert unfinished.attrs["done_fraction"] == pytest.approx(done / 6, abs=1e-5)
    assert np.isnan(unfinished.sample.values).any()
    with pytest.raises(ValueError, match=f"{done} of 6 units: run the same"):
      ensemble.read(path)
  assert write(path, sampler, stop=stop_after(9))["drawn"] == 2
  for file in sorted((whole / "sample").rglob("*")):
    if file.is_file():
      assert (
        file.read_bytes()
        == (path / "sample" / file.relative_to(whole / "sample")).read_bytes()
      ), file


def test_a_unit_without_its_marker_is_drawn_again(tmp_path, whole, sampler):
  """kill -9 between the bytes and the marker: the same bytes are written once more."""
  path = tmp_path / "a.zarr"
  with pytest.raises(supervision.Interrupted):
    write(path, sampler, stop=stop_after(4))
  store = tensorstore.open(
    {"driver": "zarr3", "kvstore": f"file://{path}/sample/"}, open=True
  ).result()
  store[0:2, 0:4].write(np.full((2, 4, 24), 7, np.float32)).result()
  (tmp_path / "a.units" / "c000000-000002-m000000-000004.json").unlink()
  assert write(path, sampler)["drawn"] == 3
  np.testing.assert_array_equal(samples(path), samples(whole))
  assert write(path, sampler)["drawn"] == 0


def listing(folder):
  return {
    p.relative_to(folder): p.read_bytes()
    for p in sorted(folder.rglob("*"))
    if p.is_file()
  }


def test_an_ensemble_grows_in_place(tmp_path, whole, sampler):
  """3 × 4 -> 5 × 4, broken off -> 5 × 6: what was finished stays, and the end is what is drawn at
  once.
  """
  path, shards = tmp_path / "a.zarr", tmp_path / "a.zarr" / "sample" / "c"
  assert write(path, sampler, conditions=CONDITIONS[:3], members=4)["drawn"] == 2
  first = listing(shards)
  with pytest.raises(supervision.Interrupted, match="2 of 3 units"):
    write(path, sampler, members=4, stop=stop_after(1))
  with xarray.open_zarr(path) as data:
    assert data.sample.shape == (5, 4, 24)
    assert data.attrs["done_fraction"] == pytest.approx(2 / 3, abs=1e-5)
    assert data.attrs["history"].count("downscaling sample") == 2
    assert np.isnan(data.sample[4]).all()
  with pytest.raises(ValueError, match="2 of 3 units"):
    ensemble.read(path)
  assert write(path, sampler)["drawn"] == 4
  inner = pathlib.Path("0/0/0")  # of conditions 0 and 1: no unit at an edge
  assert listing(shards)[inner] == first[inner]
  np.testing.assert_array_equal(samples(path), samples(whole))
  grown, undisturbed = (xarray.open_zarr(p) for p in (path, whole))
  for name in undisturbed.variables:
    np.testing.assert_array_equal(grown[name], undisturbed[name], err_msg=name)
  assert len(list((tmp_path / "a.units").glob("c*-m*.json"))) == 6


def test_a_unit_at_the_edge_grows_by_what_it_lacks(tmp_path, sampler):
  """A field that is there stays as it is, byte for byte, whatever machine draws the rest of its
  unit.
  """
  path = tmp_path / "a.zarr"
  write(path, sampler, conditions=CONDITIONS[:3], members=3)
  before = samples(path)
  one_more = lambda keys, y: sampler(keys, y) + 1
  assert write(path, one_more, conditions=CONDITIONS[:4], members=4)["drawn"] == 2
  after = samples(path)
  np.testing.assert_array_equal(after[:3, :3], before)
  write(tmp_path / "b.zarr", one_more, conditions=CONDITIONS[:4], members=4)
  for new in (np.s_[3:], np.s_[:, 3:]):
    np.testing.assert_array_equal(after[new], samples(tmp_path / "b.zarr")[new])


def test_members_that_act_on_each_other_are_drawn_again_alone(tmp_path):
  """The block of a unit is what is reproducible: alone, and when the ensemble grows.

  Misfits lie beside the fields.
  """
  path = tmp_path / "a.zarr"
  write(path, with_misfit, members=6)
  before = ensemble.read(path)
  assert before.misfit.dims == ("condition", "member")
  assert before.misfit.attrs["units"] == "1"
  assert before.sample.attrs["ancillary_variables"] == "misfit"
  layout = ensemble.Layout(5, 6, (24,), 1, (6, 1), (2, 4), True)
  unit = layout.units()[3]  # conditions 2 and 3, members 4 and 5
  assert unit == (2, 4, 4, 6)
  c, m, y = ensemble.block(layout, unit, np.arange(5), CONDITIONS)
  fields, misfit = jax.jit(with_misfit)(ensemble.keys(1, c, m), y)
  alone = (
    np.asarray(fields).reshape(2, 4, 24)[:, :2],
    np.asarray(misfit).reshape(2, 4)[:, :2],
  )
  for name, values in zip(("sample", "misfit"), alone, strict=True):
    np.testing.assert_allclose(
      before[name][2:4, 4:6], values, atol=2e-6
    )  # another program: rounding
  held = before.load()
  write(path, with_misfit, members=8)
  after = ensemble.read(path)
  for name in ("sample", "misfit"):
    np.testing.assert_array_equal(after[name][:, :6], held[name])
  np.testing.assert_allclose(
    after.sample.values.reshape(5, 2, 4, 24).mean(2).std(-1), 0, atol=1e-6
  )  # one block
  with pytest.raises(supervision.Interrupted):
    write(tmp_path / "b.zarr", with_misfit, stop=stop_after(1))
  with xarray.open_zarr(tmp_path / "b.zarr") as data:
    assert np.isfinite(data.misfit[:2, :4]).all()
    assert np.isnan(data.misfit[2:]).all()


def instructions(program):
  """Its text without source lines, which a program from jax's cache has from another run."""
  lines = [line for line in program.as_text().splitlines() if " = " in line]
  return re.sub(r", metadata=\{.*?\}", "", "\n".join(lines))


def test_every_device_has_the_program_of_one(sampler):
  """One partition, no collective, and the same text for each."""
  layout = ensemble.Layout(5, 6, (24,), 1, (6, 1), (2, 4))
  programs = ensemble.compiled(sampler, 1, layout, None, jax.devices())
  assert len(programs) == 4
  assert {p.input_shardings[0][0].device_set.copy().pop() for p in programs} == {
    *jax.devices()
  }
  assert all(
    program_cost.collectives(p) == [] and "num_partitions" not in p.as_text()
    for p in programs
  )
  assert len({instructions(p) for p in programs}) == 1
  # Compiled once for the sets of a job, however large each is.
  assert (
    ensemble.compiled(sampler, 1, layout._replace(conditions=9), None, jax.devices())
    is programs
  )


def test_shards_that_are_no_units_are_refused(tmp_path, sampler):
  """Two units in one shard would have two writers.

  The marker is forged: its own check would speak first.
  """
  path = tmp_path / "a.zarr"
  with pytest.raises(supervision.Interrupted):
    write(path, sampler, unit=(4, 4), stop=stop_after(1))
  marker = tmp_path / "a.units" / stage_folder.MARKER
  record = files.read_json(marker)
  record["config"]["layout"]["unit"] = [2, 4]
  files.write_json(marker, record)
  before = listing(path)
  with pytest.raises(
    ValueError, match=r"in shards of \(4, 4, 24\); need .* \(2, 4, 24\), a unit each"
  ):
    write(path, sampler)
  assert {k: v for k, v in listing(path).items() if str(k) != "zarr.json"} == {
    k: v for k, v in before.items() if str(k) != "zarr.json"
  }


@pytest.mark.parametrize("devices", [1, 2, 3])
def test_any_number_of_devices_draws_what_four_draw(tmp_path, whole, sampler, devices):
  """Byte for byte. Of 6 units the four devices drew 2, 2, 1 and 1."""
  write(tmp_path / "a.zarr", sampler, devices=jax.devices()[-devices:])
  assert listing(tmp_path / "a.zarr" / "sample") == listing(whole / "sample")


def test_more_devices_than_units(tmp_path, whole, sampler):
  path = tmp_path / "a.zarr"
  assert (
    write(path, sampler, conditions=CONDITIONS[:3], members=4, devices=jax.devices())[
      "drawn"
    ]
    == 2
  )
  np.testing.assert_array_equal(samples(path), samples(whole)[:3, :4])


def test_units_in_flight_are_finished_when_told_to_stop(tmp_path, whole, sampler):
  """Five polls are four units on four devices and one more behind the first."""
  path = tmp_path / "a.zarr"
  with pytest.raises(supervision.Interrupted, match="5 of 6 units"):
    write(path, sampler, devices=jax.devices(), stop=stop_after(5))
  assert write(path, sampler)["drawn"] == 1
  np.testing.assert_array_equal(samples(path), samples(whole))


@pytest.mark.parametrize("unit", [(1, 8), (3, 4), (4, 1)])
def test_other_units_draw_the_same(tmp_path, whole, sampler, unit):
  write(tmp_path / "a.zarr", sampler, unit=unit)
  # Same draws by another program: the order of float32 sums. Keys by device, or by row, would
  # differ by O(1).
  np.testing.assert_allclose(samples(tmp_path / "a.zarr"), samples(whole), atol=2e-5)


def test_a_condition_is_drawn_by_its_id(tmp_path, whole, sampler):
  path = tmp_path / "a.zarr"
  write(
    path, sampler, conditions=CONDITIONS[3:4], condition_ids=np.array([3]), members=2
  )
  # Another row of its unit: vector instructions take the rows of a batch in groups, and the last
  # ones singly.
  np.testing.assert_allclose(samples(path)[0], samples(whole)[3, :2], atol=2e-5)
  assert ensemble.read(path).condition.values.tolist() == [3]


def test_weights_are_an_operand(tmp_path):
  """Handed to the sampler, replicated, instead of being baked into the program."""
  draw = lambda keys, y, weights: solvers.noise(keys, 0, (24, 1)) * weights["scale"]
  write(tmp_path / "a.zarr", draw, weights={"scale": np.float32(0)})
  assert (samples(tmp_path / "a.zarr") == 0).all()


def test_two_axes_two_channels_and_no_condition(tmp_path):
  draw = lambda keys, y: solvers.noise(keys, 0, (4, 6, 2))
  coordinates = {"y": (np.linspace(0, 1, 4), {"units": "km"})}
  write(
    tmp_path / "u.zarr",
    draw,
    conditions=None,
    members=5,
    space=(4, 6),
    channels=2,
    unit=(1, 4),
    coordinates=coordinates,
  )
  data = ensemble.read(tmp_path / "u.zarr")
  assert data.sample.dims == ("condition", "member", "y", "x", "channel")
  assert data.sample.shape == (1, 5, 4, 6, 2)
  assert data.y.attrs == {"units": "km"}
  assert "condition_field" not in data
  key = jax.random.fold_in(
    jax.random.fold_in(random_keys.key(1, "ensemble"), 0), 4
  )  # member 4 of condition 0, drawn alone
  np.testing.assert_array_equal(
    data.sample[0, 4], solvers.noise(key[None], 0, (4, 6, 2))[0]
  )


def test_another_identity_is_refused_and_left_alone(tmp_path, sampler):
  path = tmp_path / "a.zarr"
  with pytest.raises(supervision.Interrupted):
    write(path, sampler, stop=stop_after(1))
  before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
  changes = {
    r"sampling.steps: 4 -> 5": {"identity": {"sampling": {"steps": 5}}},
    r"seed: 1 -> 2": {"seed": 2},
    r"layout.space: \[24\] -> \[48\]": {
      "space": (48,),
      "sampler": lambda keys, y: solvers.noise(keys, 0, (48, 1)),
    },
    r"layout.misfit: False -> True": {"sampler": with_misfit},
    "holds 6 members, 5 were asked for: an ensemble grows": {"members": 5},
    "holds 5 conditions, 4 were asked for": {"conditions": CONDITIONS[:4]},
    "other conditions: the first 5 must be": {"conditions": CONDITIONS + 1},
    "other conditions: the first 5 must": {"condition_ids": np.arange(5) + 1},
    r"layout.unit: \[2, 4\] -> \[1, 4\]": {"unit": (1, 4)},
  }
  for words, change in changes.items():
    with pytest.raises(ValueError, match=words):
      write(path, **({"sampler": sampler} | change))
  assert before == {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}


def test_a_store_that_is_not_ours_is_refused(tmp_path, sampler):
  (tmp_path / "a.zarr").mkdir()
  (tmp_path / "a.zarr" / "precious").write_text("x")
  with pytest.raises(FileExistsError, match="not made by this job"):
    write(tmp_path / "a.zarr", sampler)
  assert (tmp_path / "a.zarr" / "precious").read_text() == "x"
  with pytest.raises(ValueError, match="no ensemble written by"):
    ensemble.read(tmp_path / "a.zarr")


def runs_away(keys, y):
  """with_misfit, but for members of condition 2: an overflow, a single NaN, a misfit out of range,
  a field of NaN.
  """
  fields, misfit = with_misfit(keys, y)
  bad = y[:, 0, 0] == CONDITIONS[2, 0, 0]
  row = jax.numpy.arange(len(y)) % 4
  fields = fields.at[:, 3].set(
    jax.numpy.where((bad & (row == 0))[:, None], jax.numpy.inf, fields[:, 3])
  )
  fields = fields.at[:, 5].set(
    jax.numpy.where((bad & (row == 1))[:, None], jax.numpy.nan, fields[:, 5])
  )
  return fields, jax.numpy.where(bad & (row == 2), jax.numpy.inf, misfit)


def test_a_member_that_failed_is_marked_and_the_ensemble_goes_on(tmp_path, capsys):
  """Members 0, 1, 2, 4 and 5 of condition 2: NaN fields, infinite misfits, all others as they would
  be; all said.
  """
  path, good = tmp_path / "a.zarr", tmp_path / "b.zarr"
  write(good, with_misfit)
  with pytest.raises(supervision.Interrupted):
    write(path, runs_away, max_failed=0.2, stop=stop_after(4))
  assert ensemble_store.failures(path) == (5, 1)
  summary = write(path, runs_away, max_failed=0.2)
  assert summary["failed"] == 5
  assert (
    "5 of 30 members failed, of 1 of 5 conditions of a.zarr" in capsys.readouterr().err
  )
  found, want = ensemble.read(path).load(), ensemble.read(good).load()
  failed = np.zeros((5, 6), bool)
  failed[2, [0, 1, 2, 4, 5]] = True
  np.testing.assert_array_equal(ensemble_store.failed(found.sample.values), failed)
  np.testing.assert_array_equal(np.isposinf(found.misfit), failed)
  assert np.isfinite(found.sample.values[~failed]).all()
  # Another program: rounding.
  np.testing.assert_allclose(
    found.sample.values[~failed], want.sample.values[~failed], atol=2e-6
  )
  assert (found.attrs["failed_members"], found.attrs["failed_conditions"]) == (5, 1)
  assert "Infinity: the member failed" in found.misfit.attrs["comment"]
  assert (
    write(path, runs_away, max_failed=0.2)["failed"] == 5
  )  # once more: nothing is drawn, the count stays
  assert ensemble.read(good).attrs["failed_members"] == 0


def test_members_that_failed_stay_counted_once_where_a_unit_grows(tmp_path):
  """Members 0 to 2 of condition 2, an edge unit of three members: the fourth is added, the three
  stay marked.
  """
  path = tmp_path / "a.zarr"
  write(path, runs_away, members=3, max_failed=0.5)
  assert ensemble_store.failures(path) == (3, 1)
  write(path, runs_away, members=4, max_failed=0.5)
  assert ensemble_store.failures(path) == (3, 1)
  assert len([*(tmp_path / "a.units").glob("failed-*")]) == 1
  # A count whose unit was broken off before its marker does not count.
  (tmp_path / "a.units" / "c000002-000004-m000000-000004.json").unlink()
  assert ensemble_store.failures(path) == (0, 0)


def test_too_many_that_failed_are_refused_and_named(tmp_path):
  """Three fail in unit 2 of 6: as much as may.

  With the next unit there are five of 30, over a tenth.
  """
  with pytest.raises(
    FloatingPointError,
    match=r"5 of 30 members failed, the last of condition 2, member 4: not fin",
  ):
    write(tmp_path / "a.zarr", runs_away, max_failed=0.1)
  assert (
    len(list((tmp_path / "a.units").glob("c*-m*.json"))) == 3
  )  # conditions 0 and 1, and members 0 to 3 of 2
  with pytest.raises(
    FloatingPointError, match=r"max_failed=0.1 allows 3"
  ):  # also what earlier calls left counts
    write(tmp_path / "a.zarr", runs_away, max_failed=0.1)
  assert write(tmp_path / "a.zarr", runs_away, max_failed=0.2)["failed"] == 5
  with pytest.raises(FloatingPointError, match="max_failed=0 allows 0"):
    write(tmp_path / "b.zarr", runs_away)


def test_a_full_disk_is_said_in_words(tmp_path, sampler, monkeypatch):
  def full(*_):
    raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device")

  monkeypatch.setattr(ensemble_units.Writer, "begin", full)
  with pytest.raises(OSError, match="Free some disk"):
    write(tmp_path / "a.zarr", sampler)
  monkeypatch.undo()
  assert write(tmp_path / "a.zarr", sampler)["drawn"] == 6


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"members": 0}, "at least 1"),
    (
      {"conditions": np.where(np.arange(5)[:, None, None] == 3, np.nan, CONDITIONS)},
      "1 of 5 conditions hold NaN",
    ),
    ({"conditions": CONDITIONS[..., 0]}, r"\[conditions, \*coarse, channels\]"),
    ({"condition_ids": np.zeros(5, int)}, "5 different numbers"),
    ({"coordinates": {"x": (np.arange(23), {})}}, "coordinate x"),
    (
      {"conditions": CONDITIONS[:, :5]},
      "is the coarse grid the one the prior was trained for",
    ),
    (
      {"space": (48,)},
      r"draws \[\(8, 24, 1\)\] of a unit of 8, the store takes fields \(8, 48, 1\)",
    ),
    ({"channels": 2}, "channels must be those that the prior was trained on"),
  ],
)
def test_refusals_before_anything_is_written(tmp_path, sampler, change, words):
  with pytest.raises(ValueError, match=words):
    write(tmp_path / "a.zarr", sampler, **change)
  assert list(tmp_path.iterdir()) == []


def test_markers_are_json(whole):
  marker = json.loads(
    (whole.with_suffix(".units") / "c000004-000005-m000004-000006.json").read_text()
  )
  units = whole.with_suffix(".units")
  store = json.loads((units / stage_folder.MARKER).read_text())["config_hash"]
  place, shard = (
    {"c0": 4, "c1": 5, "m0": 4, "m1": 6},
    whole / "sample" / "c" / "2" / "1" / "0",
  )
  told = {"device": "cpu", "store": store}
  assert {
    k: v for k, v in marker.items() if k not in ("files", files.SEAL)
  } == place | told
  size, time, digest = marker["files"]["sample/c/2/1/0"]
  assert (size, time) == (shard.stat().st_size, shard.stat().st_mtime_ns)
  assert digest == hashlib.sha256(shard.read_bytes()).hexdigest()


def test_no_two_draws_of_an_ensemble_share_a_key():
  """Steps, start, posterior draw, observation error and selection of every member, and the keys
  that these come from.

  fold_in(key, i) is split(key)[i]: a stream that a step reaches, or a key that is drawn from and
  folded, shows here.
  """
  steps, ids = 64, np.arange(12)
  members = ensemble.keys(1, ids // 4, ids % 4)
  fold = lambda keys, number: jax.vmap(jax.random.fold_in, in_axes=(0, None))(
    keys, number
  )
  streams = {
    name: fold(members, random_keys.stream(name)) for name in random_keys.STREAMS
  }
  used = [members, *streams.values()]
  used += [fold(members, step) for step in range(steps)]
  used += [fold(streams["selection"], step) for step in range(steps)]
  base = random_keys.key(1, "ensemble")
  used += [base[None], jax.vmap(lambda c: jax.random.fold_in(base, c))(np.arange(3))]
  data = np.concatenate([np.asarray(jax.random.key_data(keys)) for keys in used])
  assert len(np.unique(data, axis=0)) == len(data)
  # Beyond any number of steps.
  assert min(map(random_keys.stream, random_keys.STREAMS)) > 2**30
  np.testing.assert_array_equal(
    jax.random.key_data(jax.random.split(base, 3)), jax.random.key_data(used[-1])
  )  # the trap
  # What the solvers and the start draw is by these keys.
  white = solvers.noise(members, 5, (24, 1))
  np.testing.assert_array_equal(
    white[3], jax.random.normal(jax.random.fold_in(members[3], 5), (24, 1))
  )
  assert random_keys.stream("start") == solvers.START
