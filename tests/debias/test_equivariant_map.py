"""Equivariant maps: closed forms, symmetry, streams of blocks, files, bad input."""

import io

import jax
import numpy as np
import pytest

from downscaling.debias.equivariant import equivariant_map, moments, recipes
from downscaling.equations import kolmogorov, ks
from downscaling.fields import quadratic as quadratic_terms
from downscaling.fields import symmetry
from downscaling.runtime import files

EVERY = ("G", "Q", ("A", 2), ("S", 3), "G")
GRIDS = {"ks": (ks.group(24), (24,)), "kolmogorov": (kolmogorov.group(8), (8, 8))}
TERM = {
  "ks": quadratic_terms.burgers((24,)),
  "kolmogorov": quadratic_terms.advection((8, 8)),
}


def rows(space, seed, *, size=400, slope=1.5, skew=0.0):
  """Random red fields with a skewed one-point law, [size, *space, 1] float32."""
  y = np.random.default_rng(seed).normal(size=(size, *space))
  z = moments.waves(y) * (1.0 + moments.shells(space)) ** -slope
  y = moments.fields(z, space)
  y = y / y.std()
  return (y + skew * y**3)[..., None].astype(np.float32)


@pytest.fixture(scope="module", params=["ks", "kolmogorov"])
def fitted(request):
  """(group, map of every kind of step, source) in one and in two dimensions."""
  group, space = GRIDS[request.param]
  source, target = rows(space, 0, skew=0.05), rows(space, 1, slope=1.2)
  return (
    group,
    recipes.fit(
      source, target, group=group, recipe=EVERY, quadratic=TERM[request.param]
    ),
    source,
  )


def covariance(y):
  y = y.reshape(len(y), -1).astype(np.float64)
  return y.T @ y / len(y)


# ---------------------------------------------------------------- G


@pytest.mark.parametrize("kind", [float, complex])
def test_optimal_map_of_gaussians(kind):
  """T is PSD and carries A onto B: no other matrix is and does."""
  rng = np.random.default_rng(0)
  a, b = (
    rng.normal(size=(3, 6, 6))
    + (1j * rng.normal(size=(3, 6, 6)) if kind is complex else 0)
    for _ in range(2)
  )
  a, b = (x @ x.conj().transpose(0, 2, 1) for x in (a, b))
  t = moments.optimal(a, b)
  # Roots of matrices of condition 1e4 in float64. A Cholesky map carries A onto B as well, but is
  # not symmetric.
  np.testing.assert_allclose(t @ a @ t, b, atol=1e-9 * np.abs(b).max())
  np.testing.assert_allclose(t, t.conj().transpose(0, 2, 1), atol=1e-14)
  assert np.linalg.eigvalsh(t).min() > 0


def test_modes_without_variance_are_left_out():
  """A mode of A at 1e-12 of the largest is rounding: its gain would be 1e6."""
  a, b = np.diag([4.0, 1.0, 4e-12])[None], np.diag([1.0, 9.0, 1.0])[None]
  np.testing.assert_allclose(
    moments.optimal(a, b)[0], np.diag([0.5, 3.0, 0.0]), atol=1e-12
  )


def test_with_shifts_the_gaussian_map_is_a_gain_for_each_wave():
  source, target = rows((24,), 0), rows((24,), 1, slope=1.0)
  found = recipes.fit(source, target, group=ks.group(24))
  assert found.steps[0].matrix.shape == (13, 1, 1)
  z, goal = (np.fft.rfft(x[..., 0].astype(np.float64)) for x in (source, target))
  # x -> −x, u -> −u makes the mean 0, so that energies are about 0
  gain = np.sqrt((np.abs(goal) ** 2).mean(0) / (np.abs(z) ** 2).mean(0))
  np.testing.assert_allclose(
    found(source)[..., 0], np.fft.irfft(gain * z, n=24), atol=2e-6
  )  # float32 of values to 5


@pytest.mark.parametrize("name", [*GRIDS, "none"])
def test_blocks_are_the_dense_map(name, monkeypatch):
  """The waves of the last axis decouple: block by block or as one matrix of n², the same map."""
  group, space = GRIDS.get(name, (symmetry.trivial(24), (24,)))
  source, target = rows(space, 0), rows(space, 1, slope=1.2) + 0.3
  blocks = recipes.fit(source, target, group=group)
  dense = moments.Frame(space, 1, tuple((index, 1) for index in group.index))
  monkeypatch.setattr(moments.Frame, "of", lambda *_: dense)
  other = recipes.fit(source, target, group=group)
  assert len(other.steps[0].matrix) == 1
  assert (len(blocks.steps[0].matrix) > 1) == (name != "none")
  # float32 of values to 10.
  np.testing.assert_allclose(blocks(source), other(source), atol=3e-6)
  # and it does what it is for: group-averaged moments of the fit's own rows become the target's
  mapped, goal = (
    x.reshape(len(x), -1).astype(np.float64) for x in (blocks(source), target)
  )
  mean = lambda x: (group.sign[:, None] * x.mean(0)[group.index]).mean(0)
  np.testing.assert_allclose(mean(mapped), mean(goal), atol=1e-6)
  a, b = (group.average_covariance(covariance(x)) for x in (mapped, goal))
  np.testing.assert_allclose(
    a, b, atol=1e-5
  )  # float32 outputs; without the average over the group .1


def test_moments_add():
  group, space = GRIDS["kolmogorov"]
  frame, y = moments.Frame.of(group, space), rows(space, 0)[..., 0].astype(np.float64)
  whole, parts = (
    moments.Moments.of(y, frame),
    moments.Moments.of(y[:100], frame) + moments.Moments.of(y[100:], frame),
  )
  assert whole.square.shape == (5, 8, 8)
  for a, b in zip(whole, parts, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-10)
  assert len(jax.tree.leaves(whole)) == 3  # as a psum would see it


# ---------------------------------------------------------------- Q and S


def test_quantiles_are_the_sorted_ones():
  """Pooled over the line, the mapped values have the target's quantiles; an increasing function is
  found again.
  """
  source = rows((24,), 0, size=4000)
  target = source + 0.1 * source**3
  found = recipes.fit(source, target, group=ks.group(24), recipe="Q")
  mapped = found(source)
  # 256 chords in the normal deviate, .036 wide: they leave a cubic's curvature q″ ≈ 2 by q″ .036²/8
  # = 3e-4, and bins 2e-4 wide add as much. Equally spaced levels leave .02 in the tails.
  inner = np.abs(source) < 3
  np.testing.assert_allclose(mapped[inner], target[inner], atol=2e-3)
  pooled = lambda x: np.sort(np.concatenate([x.ravel(), -x.ravel()]))
  np.testing.assert_allclose(
    pooled(mapped)[1000:-1000], pooled(target)[1000:-1000], atol=2e-3
  )
  np.testing.assert_array_equal(
    found(-source), -mapped
  )  # the group has a sign: the law is symmetric, so is q


def test_quantiles_of_points_that_no_symmetry_joins():
  """Without a group every point has a table of its own; a law that is not symmetric stays so."""
  source = rows((4,), 0, size=5000)
  target = np.exp(source * np.array([0.2, 0.4, 0.6, 0.8])[:, None])
  found = recipes.fit(source, target, group=symmetry.trivial(4), recipe="Q")
  assert found.steps[0].x.shape == (4, recipes.LEVELS)
  inner = np.abs(source) < 2.5
  # bins of 1/65536 of ranges up to e³; 5000 values end the table at 3.0, so only its chords are
  # left: .04² e²/8
  np.testing.assert_allclose(found(source)[inner], target[inner], atol=5e-3)


def test_orbits():
  pool = moments.Pool.of(ks.group(24))
  assert pool.odd.tolist() == [True]
  pool = moments.Pool.of(kolmogorov.group(32))
  # A glide takes y to y + 4 points and turns the sign, a half turn keeps it: y = 0, ±1, 2 (mod 4)
  # are three laws. On y = 2 a half turn and a glide leave the point where it was, with the sign
  # turned.
  assert pool.odd.tolist() == [False, False, True]
  y = np.cos(4 * np.arange(32) * 2 * np.pi / 32)[:, None] * np.ones(
    (1, 32, 32)
  )  # the mean flow obeys the group
  assert np.allclose(pool.values(y)[:, pool.orbit == 0], 1)


def test_beyond_the_fit_it_goes_on_straight_and_says_so():
  source = rows((24,), 0, size=4000)
  found = recipes.fit(source, 2 * source, group=ks.group(24), recipe="Q")
  far = np.linspace(-30, 30, 24, dtype=np.float32).reshape(1, 24, 1)
  # Twice as much, also far out: the slope of the tail is 2 up to bins of 2e-4 over its width of .6
  np.testing.assert_allclose(found(far), 2 * far, rtol=2e-3)
  assert found.outside(np.concatenate([far, 0 * far])).tolist() == [True, False]
  assert not found.outside(source).any()


def test_filters_commute_up_to_a_sign():
  assert len(moments.filters(ks.group(24), (24,))) == 2
  kinds = moments.filters(kolmogorov.group(8), (8, 8))
  assert len(kinds) == 4
  for factor, character in kinds:
    assert set(np.abs(factor).ravel().round(12)) <= {0.0, 1.0}
    assert character[0] == 1


def test_one_slice_sets_the_law_of_its_filtered_field():
  source, target = rows((24,), 0, size=3000, skew=0.1), rows((24,), 1, size=3000)
  # An even filter.
  found = recipes.fit(source, target, group=ks.group(24), recipe="S", seed=2)
  step = found.steps[0]
  assert np.allclose(np.abs(step.filter[1:-1]), 1)
  levels = np.linspace(0.01, 0.99, 50)
  law = lambda x: np.quantile(step.filtered(x[..., 0].astype(np.float64)), levels)
  # |ĥ| = 1, so hᵀ∗h = 1 and the correction is exact but for Nyquist's wave under an odd filter (1 %
  # of the variance); before, the quantiles are .1 apart.
  assert np.abs(law(source) - law(target)).max() > 0.05
  np.testing.assert_allclose(law(found(source)), law(target), atol=0.01)


def test_filters_follow_the_seed_and_their_number():
  source, target = rows((24,), 0), rows((24,), 1)
  make = lambda count, seed: recipes.fit(
    source, target, group=ks.group(24), recipe=(("S", count),), seed=seed
  )
  three, five, other = make(3, 7), make(5, 7), make(3, 8)
  for a, b in zip(three.steps, five.steps[:3], strict=True):
    np.testing.assert_array_equal(a.filter, b.filter)
    np.testing.assert_array_equal(a.y, b.y)
  assert any(
    (a.filter != b.filter).any() for a, b in zip(three.steps, other.steps, strict=True)
  )


# ---------------------------------------------------------------- A


@pytest.mark.parametrize("name", GRIDS)
def test_transfer_becomes_the_targets(name):
  group, space = GRIDS[name]
  quadratic = TERM[name]
  source = rows(space, 0, size=1500)
  target = rows(space, 1, size=1500)
  y = target[..., 0].astype(np.float64)
  term = quadratic(y)
  target = (y + 0.2 * term * (y.std() / term.std()))[..., None].astype(np.float32)

  def gap(x):
    a, b = (
      moments.Transfer.of(v[..., 0].astype(np.float64), quadratic) for v in (x, target)
    )
    return np.linalg.norm(a.transfer - b.transfer) / np.linalg.norm(b.transfer)

  plain, with_a = (
    recipes.fit(source, target, group=group, recipe=recipe, quadratic=TERM[name])
    for recipe in ("G", ("G", ("A", 8)))
  )
  assert gap(plain(source)) > 0.5
  # Damped Newton steps with a G between them; measured .062 and .003. The line's rest lies in its
  # last waves, where the term has nearly no power to give. Steps by the diagonal alone leave .45
  # and .14.
  assert gap(with_a(source)) < 0.1


@pytest.mark.parametrize("name", GRIDS)
def test_response_is_the_derivative(name):
  space, quadratic = GRIDS[name][1], TERM[name]
  y = rows(space, 0, size=50)[..., 0].astype(np.float64)
  matrix, h = moments.response(y, quadratic), 1e-6
  at = lambda tau: (
    moments.Transfer.of(equivariant_map.Transfer(tau, quadratic)(y), quadratic).transfer
    / len(y)
  )
  steps = h * np.eye(len(matrix))
  found = np.stack([(at(s) - at(-s)) / (2 * h) for s in steps], axis=1)
  np.testing.assert_allclose(
    matrix, found, atol=1e-7 * np.abs(found).max()
  )  # h² of a cubic, 1e-16/h of rounding


def test_quadratic_terms():
  """−½ ∂ₓ sin² x = −½ sin 2x; ω = cos x + cos 2y: −u·∇ω = 3/2 sin x sin 2y."""
  x = np.arange(24) * 2 * np.pi / 24
  np.testing.assert_allclose(
    TERM["ks"](np.sin(x)[None])[0], -np.sin(2 * x) / 2, atol=1e-14
  )
  x, y = x[None, :], x[:, None]
  found = quadratic_terms.advection((24, 24))((np.cos(x) + np.cos(2 * y))[None])[0]
  # ψ = cos x + ¼ cos 2y, u = ψ_y = −½ sin 2y, v = −ψ_x = sin x; −u ω_x − v ω_y = −½ sin 2y sin x +
  # 2 sin x sin 2y
  np.testing.assert_allclose(found, 1.5 * np.sin(x) * np.sin(2 * y), atol=1e-13)


# ---------------------------------------------------------------- the whole map


def test_every_element_of_the_group_commutes(fitted):
  group, found, source = fitted
  y = source[:4]
  moved = lambda x, g: (
    (group.sign[g] * x.reshape(len(x), -1)[:, group.index[g]])
    .reshape(x.shape)
    .astype(np.float32)
  )
  mapped = found(y)
  for g in range(len(group)):
    # float64 sums in another order, then one rounding to float32 of values to 8. A q that was not
    # made odd: .01
    np.testing.assert_allclose(found(moved(y, g)), moved(mapped, g), atol=2e-6)


@pytest.mark.parametrize("name", GRIDS)
def test_nothing_to_correct_nothing_done(name):
  group, space = GRIDS[name]
  source = rows(space, 0, skew=0.05)
  found = recipes.fit(source, source, group=group, recipe=EVERY, quadratic=TERM[name])
  # G: roots of covariances, 1e-8 in the weakest modes. Q, S: the same table twice. A: 0 less 0.
  np.testing.assert_allclose(found(source), source, atol=1e-5)


def test_blocks_and_scratch_change_nothing(fitted, monkeypatch, tmp_path):
  group, found, source = fitted
  whole = found(source)
  monkeypatch.setattr(equivariant_map, "BLOCK", 64 * 37)
  np.testing.assert_allclose(found(source), whole, atol=1e-6)
  name = "ks" if source.ndim == 3 else "kolmogorov"
  target = rows(source.shape[1:-1], 1, slope=1.2)
  again = recipes.fit(
    source, target, group=group, recipe=EVERY, quadratic=TERM[name], scratch=tmp_path
  )
  # sums in another order, 1e-12, but a value on the edge of two bins may change its bin
  np.testing.assert_allclose(again(source), whole, atol=1e-4)
  assert not [*tmp_path.iterdir()]
  assert found(source[:0]).shape == (0, *source.shape[1:])


def test_saved_and_loaded_is_the_same_map(fitted, tmp_path):
  _, found, source = fitted
  found.save(tmp_path / "map")
  found.save(tmp_path / "map")  # again over itself
  loaded = equivariant_map.EquivariantMap.load(tmp_path / "map")
  np.testing.assert_array_equal(loaded(source), found(source))
  assert (loaded.grid, len(loaded.steps)) == (found.grid, 10)
  assert sorted(p.name for p in (tmp_path / "map").iterdir()) == [
    "arrays.npz",
    "map.json",
  ]


def test_damaged_maps_are_named(fitted, tmp_path):
  folder, load = tmp_path / "map", equivariant_map.EquivariantMap.load
  with pytest.raises(
    FileNotFoundError, match=r"no debiasing map in .*: run `downscaling debias` first"
  ):
    load(folder)
  fitted[1].save(folder)
  whole = (folder / "arrays.npz").read_bytes()
  record = files.read_json(folder / "map.json")
  with np.load(io.BytesIO(whole)) as stored:
    arrays = dict(stored)
  flipped = bytearray(whole)
  flipped[whole.index(arrays["0.after"].tobytes()) + 5] ^= 1
  for damage in (bytes(flipped), whole[:-300], b""):
    (folder / "arrays.npz").write_bytes(damage)
    with pytest.raises(
      ValueError, match=r"arrays.npz is damaged .*run `downscaling debias` again"
    ) as caught:
      load(folder)
    assert "\n" not in str(caught.value)
  np.savez(
    folder / "arrays.npz", **arrays | {"0.after": arrays["0.after"] + 1}
  )  # whole, but another map's
  with pytest.raises(ValueError, match=r"damaged or not map.json's \(0.after\)"):
    load(folder)
  np.savez(folder / "arrays.npz", **arrays | {"0.more": arrays["0.after"]})
  with pytest.raises(ValueError, match=r"damaged or not map.json's \(0.more\)"):
    load(folder)
  files.write_json(folder / "map.json", record | {"kind": "entropic"})
  with pytest.raises(
    ValueError,
    match=r"schema and kind \(1, 'entropic'\), this version reads \(1, 'equivariant'\)",
  ):
    load(folder)


# ---------------------------------------------------------------- bad input


def test_rows_that_cannot_be_mapped(fitted):
  _, found, source = fitted
  y = source[:20].copy()
  y[[2, 19], 1] = np.nan
  with pytest.raises(
    ValueError,
    match=r"the rows to map hold NaN or infinities in 2 of 20 rows \(2, 19\)",
  ):
    found(y)
  with pytest.raises(
    ValueError, match=r"rows of shape \(7, 1\) came, the map was fitted on"
  ):
    found(np.zeros((5, 7, 1), np.float32))


def test_clouds_that_cannot_be_fitted():
  good, group = rows((24,), 0, size=20), ks.group(24)
  bad = good.copy()
  bad[3, 2] = np.inf
  for source, target, message in (
    (bad, good, r"the source rows hold NaN or infinities in 1 of 20 rows \(3\)"),
    (
      good,
      good[:1],
      r"the target rows are \(1, 24, 1\): need \[S, \*space, C\], 2 rows or more",
    ),
    (good[..., 0], good, r"fields without a channel axis one, rows\[..., None\]"),
    (
      np.repeat(good, 2, -1),
      good,
      r"\(24, 2\), target rows \(24, 1\): bring both to one grid",
    ),
    (
      np.repeat(good[:1], 9, 0),
      good,
      "all 9 source rows are the same: there is nothing to fit",
    ),
    (
      good,
      good[:, ::2],
      r"source rows are \(24, 1\), target rows \(12, 1\): bring both to one grid",
    ),
    (
      good[:, ::2],
      good[:, ::2],
      r"the group moves 24 points, the rows have 12 \[12\]: build it for this grid",
    ),
  ):
    with pytest.raises(ValueError, match=message):
      recipes.fit(source, target, group=group)


def test_steps_that_know_one_channel_are_refused_for_two():
  two = np.repeat(rows((24,), 0, size=20), 2, -1)
  needed = r"of 2 channels came, .* 'GQ' has steps that know one, Q: .* rows\[..., c : c \+ 1\]"
  with pytest.raises(ValueError, match=needed):
    recipes.fit(two, two, group=ks.group(24), recipe="GQ")


@pytest.mark.parametrize(
  "recipe", ["", "GX", ("G", ("S", -1)), (("GQ",),), 3, ("G", ("A", "many"))]
)
def test_recipes_that_cannot_be_read(recipe):
  y = rows((24,), 0, size=20)
  with pytest.raises(
    ValueError,
    match=r"recipe=.* cannot be read: need letters of G, Q, A, S, M and N, as 'GQG'",
  ):
    recipes.fit(y, y, group=ks.group(24), recipe=recipe, quadratic=TERM["ks"])


def test_transfer_needs_the_equation():
  y = rows((24,), 0, size=20)
  with pytest.raises(
    ValueError, match=r"quadratic=None: A needs the equation's quadratic term"
  ):
    recipes.fit(y, y, group=ks.group(24), recipe="GA")
  with pytest.raises(
    ValueError, match=r"damping=2: a share of a Newton step, in \(0, 1\]"
  ):
    recipes.fit(y, y, group=ks.group(24), recipe="GA", quadratic=TERM["ks"], damping=2)


def test_a_saved_map_holds_its_quadratic_term_and_an_older_one_a_name(fitted, tmp_path):
  """It is read without any equation; maps that say "ks" in place of a term map as they did."""
  _, found, source = fitted
  found.save(tmp_path / "map")
  said = files.read_json(tmp_path / "map" / "map.json")
  assert {step.get("quadratic", "saved") for step in said["steps"]} == {"saved"}
  load = equivariant_map.EquivariantMap.load
  np.testing.assert_array_equal(load(tmp_path / "map")(source), found(source))
  name = "ks" if source.ndim == 3 else "kolmogorov"
  for step in said["steps"]:
    if "quadratic" in step:
      step["quadratic"] = name
  files.write_json(tmp_path / "map" / "map.json", said)
  np.testing.assert_array_equal(load(tmp_path / "map")(source), found(source))
