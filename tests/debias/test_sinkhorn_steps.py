"""The paths of an iteration: equal to dense float64, to each other, on one device and on four; what
they hold.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.sharding import AbstractDevice, AbstractMesh

from downscaling.debias.entropic import entropic_map, sinkhorn, sinkhorn_steps, soft_min
from downscaling.equations import ks
from downscaling.runtime import mesh as meshes


def clouds(n, m, d, seed=0, spread=1.3):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(n, d)).astype(np.float32), (
    spread * rng.normal(size=(m, d))
  ).astype(np.float32)


def uniform(*clouds):
  return tuple(np.full(len(c), 1 / len(c), np.float32) for c in clouds)


def chunk(
  path, devices, x, y, f, g, epsilon, count, momentum, group=None, weights=None
):
  """One chunk, on host arrays; path "costs": dense, with the costs kept."""
  mesh, kept = meshes.make(devices), path == "costs"
  path = "dense" if kept else path
  placed = [
    jax.device_put(a, meshes.rows(mesh))
    for a in (x, y, *(weights or uniform(x, y)), f, g)
  ]
  step = sinkhorn_steps.make_chunk(
    iterations=count, momentum=momentum, path=path, mesh=mesh
  )
  moves = group and (
    jnp.asarray(group.index, jnp.int32),
    jnp.asarray(group.sign, jnp.float32),
  )
  costs = sinkhorn_steps.make_costs(mesh)(*placed[:2]) if kept else None
  return [np.asarray(a) for a in step(*placed, jnp.float32(epsilon), moves, costs)]


def reference(x, y, f, g, epsilon, count, momentum, weights=None):
  """The same in float64 with all pairs at once: (f, g, error)."""
  a, b = weights or uniform(x, y)
  x, y, f, g = (np.asarray(a, np.float64) for a in (x, y, f, g))
  exponents = lambda: (
    (f[:, None] + g[None] - ((x[:, None] - y[None]) ** 2).sum(-1)) / epsilon
  )
  for _ in range(count):
    f = f - momentum * epsilon * (
      scipy.special.logsumexp(exponents(), axis=1) - np.log(a)
    )
    g = g - momentum * epsilon * (
      scipy.special.logsumexp(exponents(), axis=0) - np.log(b)
    )
  plan = np.exp(exponents())
  error = max(np.abs(plan.sum(1) - a).sum(), np.abs(plan.sum(0) - b).sum())
  return f - f.mean(), g + f.mean(), error


@pytest.fixture
def small_tiles(monkeypatch):
  """So that a device has several tiles of rows and a rest."""
  monkeypatch.setattr(sinkhorn_steps, "TILE_NUMBERS", 64)
  sinkhorn_steps.make_chunk.cache_clear()
  yield
  sinkhorn_steps.make_chunk.cache_clear()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("path", [*sinkhorn_steps.PATHS, "costs"])
@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_three_iterations_equal_float64(path, devices, weighted):
  x, y = clouds(76, 52, 6)  # 19 rows a device: two tiles of 8 and a rest
  rng = np.random.default_rng(1)
  weights = (
    tuple(rng.dirichlet(np.full(len(c), 2.0)).astype(np.float32) for c in (x, y))
    if weighted
    else None
  )
  f, g = rng.normal(size=76).astype(np.float32), rng.normal(size=52).astype(np.float32)
  want = reference(x, y, f, g, 2.0, 3, 1.5, weights)
  got = chunk(path, devices, x, y, f, g, 2.0, 3, 1.5, weights=weights)
  # costs reach 60: 2⁻²⁴ · 60 · a few an iteration; a row counted twice or left out shifts a
  # potential by ε/76 = .03
  for ours, exact in zip(got[:2], want[:2], strict=True):
    np.testing.assert_allclose(ours, exact, atol=5e-5)
  assert got[2] == pytest.approx(want[2], rel=1e-4)


@pytest.mark.parametrize("path", sinkhorn_steps.PATHS)
def test_a_cold_start_at_a_small_epsilon_neither_overflows_nor_vanishes(path):
  """Exponents begin at −c/ε, −3000 here, and all sums underflow: the soft-mins with a running
  maximum must be taken.
  """
  x, y = clouds(40, 32, 8)
  zeros = np.zeros(40, np.float32), np.zeros(32, np.float32)
  want = reference(x, y, *zeros, 0.01, 2, 1.0)
  for devices in (1, 4):
    f, g, error = chunk(path, devices, x, y, *zeros, 0.01, 2, 1.0)
    np.testing.assert_allclose(f, want[0], atol=1e-4)  # of costs up to 60
    np.testing.assert_allclose(g, want[1], atol=1e-4)
    assert error == pytest.approx(
      want[2], rel=0.02
    )  # exponents err by 60 · 2⁻²⁴/ε = 4e-4 each, the error is a sum


def test_dense_gives_way_where_its_scalings_run_away():
  """Potentials off by ±60 ε: the stored kernel has lost what then counts, so the chunk is done by
  soft-mins.
  """
  x, y = clouds(40, 32, 4)
  f = np.where(np.arange(40) % 2, 60.0, -60.0).astype(np.float32)
  want = reference(x, y, f, np.zeros(32), 1.0, 2, 1.0)
  f, g, error = chunk("dense", 1, x, y, f, np.zeros(32, np.float32), 1.0, 2, 1.0)
  np.testing.assert_allclose(f, want[0], atol=1e-4)
  np.testing.assert_allclose(g, want[1], atol=1e-4)
  assert error == pytest.approx(want[2], rel=1e-3)


@pytest.mark.parametrize("path", sinkhorn_steps.PATHS)
def test_nan_is_not_hidden(path):
  x, y = clouds(20, 32, 4)
  g = np.zeros(32, np.float32)
  g[3] = np.nan
  assert np.isnan(chunk(path, 4, x, y, np.zeros(20, np.float32), g, 1.0, 1, 1.0)[2])


def test_every_path_on_any_devices_ends_at_the_same_potentials():
  x, y = clouds(256, 192, 5)
  found = {}
  for path in sinkhorn_steps.PATHS:
    for devices in (1, 4):
      fit = sinkhorn.fit(
        x, y, epsilon=0.02, threshold=1e-5, path=path, mesh=meshes.make(devices)
      )
      assert fit.converged
      assert fit.path == path
      found[path, devices] = fit
  one = found["fused", 1]
  for fit in found.values():
    # an L1 error of 1e-5 over 256 rows, ε = .27: potentials settle to 1e-5 of the cost's scale, 13
    assert np.abs(fit.f - one.f).max() < 1e-5 * one.mean_cost
    assert np.abs(fit.g - one.g).max() < 1e-5 * one.mean_cost


def compiled(path, devices, n=4096, m=8192, d=24):
  mesh = meshes.make(devices)
  rows = [
    jax.ShapeDtypeStruct(s, jnp.float32, sharding=meshes.rows(mesh))
    for s in ((n, d), (m, d), *((n,), (m,)) * 2)
  ]
  epsilon = jax.ShapeDtypeStruct((), jnp.float32)
  return (
    sinkhorn_steps.make_chunk(iterations=10, momentum=1.5, path=path, mesh=mesh)
    .lower(*rows, epsilon)
    .compile()
  )


def sizes(program):
  """Elements of every float32 array of a compiled program."""
  return [
    int(np.prod([int(k) for k in s.split(",")]))
    for s in re.findall(r"f32\[([0-9,]+)\]", program.as_text())
  ]


def test_what_the_paths_hold():
  n, m, d = 4096, 8192, 24
  one, four = compiled("fused", 1), compiled("fused", 4)
  tile = sinkhorn_steps.TILE_NUMBERS
  assert max(sizes(one)) <= tile  # n · m is 16 tiles
  assert max(sizes(four)) <= tile
  # temporaries are a few tiles, in the plain pass and in the careful one: measured 37 MB. n × m
  # would be 134 MB.
  assert one.memory_analysis().temp_size_in_bytes < 50e6
  ring = compiled("ring", 4)
  assert m * d not in sizes(ring)  # never all of y, nor of x
  assert n * d not in sizes(ring)
  assert m * d in sizes(four)  # which fused gathers
  for path, program in (("ring", ring), ("fused", four)):
    assert (
      program.memory_analysis().argument_size_in_bytes
      < 0.26 * compiled(path, 1).memory_analysis().argument_size_in_bytes
    )
  dense = [
    compiled("dense", devices).memory_analysis().temp_size_in_bytes
    for devices in (1, 4)
  ]
  assert dense[0] > 4 * n * m
  # A quarter of the plan, and the tiles that it is made of.
  assert dense[1] < 0.35 * dense[0]


@pytest.mark.parametrize(
  ("platform", "mark", "devices"),
  [
    ("cuda", "triton", ("NVIDIA H100", None, "gpu")),
    ("tpu", "tpu_custom_call", ("TPU v5 lite", None, "tpu")),
  ],
)
def test_a_chunk_by_the_kernel_lowers_for_four_accelerators(
  monkeypatch, platform, mark, devices
):
  """Inside shard_map, without the hardware; between devices only parts of the other cloud go."""
  monkeypatch.setattr(meshes, "platform", lambda mesh: platform)
  here = meshes.make(4)
  # From jax 0.11 on, Triton asks which GPU a program is for while it is lowered.
  device = AbstractDevice(*devices)
  mesh = AbstractMesh(
    here.axis_sizes, here.axis_names, here.axis_types, abstract_device=device
  )
  rows = [
    jax.ShapeDtypeStruct(s, jnp.float32, sharding=meshes.rows(mesh))
    for s in ((1024, 24),) * 2 + ((1024,),) * 4
  ]
  sinkhorn_steps.make_chunk.cache_clear()
  program = sinkhorn_steps.make_chunk(
    iterations=10, momentum=1.5, path="pallas", mesh=mesh
  )
  text = (
    program.trace(*rows, jax.ShapeDtypeStruct((), jnp.float32))
    .lower(lowering_platforms=(platform,))
    .as_text()
  )
  sinkhorn_steps.make_chunk.cache_clear()
  assert mark in text
  assert "collective_permute" in text
  assert "all_gather" not in text


def test_the_path_is_chosen_by_what_fits():
  assert sinkhorn_steps.choose(4096, 4096, 24, 1) == "dense"
  assert sinkhorn_steps.choose(65536, 65536, 24, 1) == "fused"
  assert sinkhorn_steps.choose(32768, 32768, 24, 64) == "dense"
  assert sinkhorn_steps.choose(32768, 32768, 24, 1) == "fused"
  assert (
    sinkhorn_steps.choose(16384, 16384, 1024, 1) == "dense"
  )  # a product of 1024 is dearer than what it is kept for
  assert sinkhorn_steps.keeps_costs("dense", 1024)
  assert not sinkhorn_steps.keeps_costs(
    "dense", 1024, elements=512
  )  # one cost an element would have to be kept


def test_a_wide_solve_keeps_its_costs(monkeypatch):
  x, y = clouds(48, 52, sinkhorn_steps.WIDE)
  wide = sinkhorn.fit(x, y, epsilon=0.05)
  monkeypatch.setattr(sinkhorn_steps, "WIDE", 1000)
  plain = sinkhorn.fit(x, y, epsilon=0.05)
  assert wide.history["iteration"] == plain.history["iteration"]
  # 2⁻²⁴ of |x|² + |y|², which is the mean cost, rounded a few times
  assert np.abs(wide.f - plain.f).max() < 1e-6 * wide.mean_cost


def test_an_unknown_path_and_rows_that_do_not_divide():
  with pytest.raises(
    ValueError,
    match=r"config.debias.path='rings' is unknown; use one of \['auto', 'dense'",
  ):
    sinkhorn.fit(*clouds(8, 8, 2), epsilon=0.1, path="rings")
  with pytest.raises(
    ValueError,
    match=r"a source cloud of 10 over 4 devices.* --config.debias.points=8 or 12",
  ):
    sinkhorn.fit(*clouds(10, 8, 2), epsilon=0.1, mesh=meshes.make(4))


def test_tiles_are_those_of_the_geometry():
  """The exponents of a tile are one function; a change there must not go unnoticed here."""
  assert soft_min.PAD < -1e29
  assert sinkhorn_steps.SAFE == soft_min.SAFE


# ---------------------------------------------------------------- with a group


def orbit_reference(x, y, f, g, epsilon, count, group):
  """Float64, on all pairs of x with the whole orbits of y."""
  orbit = np.concatenate(
    [np.asarray(group.act(k, y)) for k in range(len(group))]
  ).astype(np.float64)
  x, f, g = (np.asarray(a, np.float64) for a in (x, f, g))
  cost = ((x[:, None] - orbit[None]) ** 2).sum(-1).reshape(len(x), len(group), len(y))
  kernel = lambda: (
    scipy.special.logsumexp((f[:, None, None] - cost) / epsilon, axis=1)
    - np.log(len(group))
    + g / epsilon
  )
  for _ in range(count):
    f = f - epsilon * (scipy.special.logsumexp(kernel(), axis=1) + np.log(len(x)))
    g = g - epsilon * (scipy.special.logsumexp(kernel(), axis=0) + np.log(len(y)))
  plan = np.exp(kernel())
  error = max(
    np.abs(plan.sum(1) - 1 / len(x)).sum(), np.abs(plan.sum(0) - 1 / len(y)).sum()
  )
  return f - f.mean(), g + f.mean(), error


@pytest.mark.parametrize("path", sinkhorn_steps.PATHS)
@pytest.mark.parametrize("epsilon", [2.0, 0.01])  # plain sums; sums that underflow
def test_orbits_equal_float64_on_all_images(path, epsilon):
  group = ks.group(8)
  x, y = clouds(24, 16, 8)
  zeros = np.zeros(24, np.float32), np.zeros(16, np.float32)
  want = orbit_reference(x, y, *zeros, epsilon, 3, group)
  for devices in (1, 4):
    got = chunk(path, devices, x, y, *zeros, epsilon, 3, 1.0, group)
    for ours, exact in zip(got[:2], want[:2], strict=True):
      np.testing.assert_allclose(
        ours, exact, atol=1e-4
      )  # costs up to 60 in float32, three iterations
    assert got[2] == pytest.approx(want[2], rel=1e-3 / epsilon)


def test_the_map_between_orbits_is_that_onto_all_images_and_equivariant():
  group = ks.group(8)
  x, y = clouds(128, 96, 8)
  done = sinkhorn.fit(x, y, epsilon=0.01, group=group)
  assert done.converged
  mapped = entropic_map.EntropicMap(y, done.g, done.epsilon, (8, 1), group)
  rows = x[:20, :, None]
  got, effective = mapped.transport(rows)
  images = np.concatenate([np.asarray(group.act(k, y)) for k in range(len(group))])
  whole = entropic_map.EntropicMap(
    images, np.tile(done.g, len(group)), done.epsilon, (8, 1)
  )
  want, many = whole.transport(rows)
  # exponents of up to 60/ε = 400 err by 2⁻²⁴ of that; the images are the same numbers
  np.testing.assert_allclose(got, want, atol=5e-4)
  np.testing.assert_allclose(effective, many, rtol=5e-4)
  for k in range(len(group)):
    moved = np.asarray(group.act(k, rows[..., 0]))[..., None]
    np.testing.assert_allclose(
      mapped(moved)[..., 0], np.asarray(group.act(k, got[..., 0])), atol=5e-4
    )


def test_a_map_with_its_group_comes_back(tmp_path):
  group = ks.group(8)
  _, y = clouds(4, 32, 8)
  one = entropic_map.EntropicMap(y, np.zeros(32, np.float32), 0.5, (8, 1), group)
  one.save(tmp_path)
  two = entropic_map.EntropicMap.load(tmp_path)
  np.testing.assert_array_equal(two.group.index, group.index)
  np.testing.assert_array_equal(two(y[:5, :, None]), one(y[:5, :, None]))


def test_a_group_of_another_grid_is_refused():
  with pytest.raises(
    ValueError,
    match=r"the group acts on 8 values, rows have 6: .*--config.debias.symmetric=False",
  ):
    sinkhorn.fit(*clouds(8, 8, 6), epsilon=0.1, group=ks.group(8))
