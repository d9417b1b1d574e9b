import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from downscaling.diffusion import unet


@pytest.mark.parametrize("space", [(12,), (6, 10)])
@pytest.mark.parametrize("periodic", [True, False, "mixed"])
@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("method", ["im2col", "edges"])
def test_convolutions_agree(space, periodic, size, method):
  """Against the backend's own; sums of 25·3 products of size 1 in float32 round by 1e-5. A kernel
  gathered in another order, or a halo on the wrong side, is off by 1.
  """
  x = jax.random.normal(jax.random.key(0), (2, *space, 3))
  kernel = jax.random.normal(jax.random.key(1), (*(size,) * len(space), 3, 4))
  if periodic == "mixed":
    periodic = (True, False)[-len(space) :]
  one, two = (unet.convolve(x, kernel, periodic, m) for m in (method, "lax"))
  assert one.shape == (2, *space, 4)
  np.testing.assert_allclose(one, two, atol=2e-5)


@pytest.mark.parametrize("space", [(12,), (6, 10)])
@pytest.mark.parametrize("periodic", [True, False, "mixed"])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_gradients_of_edges_are_those_of_lax(space, periodic, size):
  """The gradient of edges is written by hand. 120 products of size 1 and 10 round by 1e-4; a kernel
  that is not mirrored is off by 10.
  """
  if periodic == "mixed":
    periodic = (False, True)[: len(space)]
  x = jax.random.normal(jax.random.key(0), (2, *space, 3))
  kernel = jax.random.normal(jax.random.key(1), (*(size,) * len(space), 3, 4))
  g = jax.random.normal(jax.random.key(2), (2, *space, 4))

  def pulled(method):
    of = lambda x, kernel: unet.convolve(x, kernel, periodic, method)
    return jax.vjp(of, x, kernel)[1](g)

  for one, two in zip(pulled("edges"), pulled("lax"), strict=True):
    np.testing.assert_allclose(one, two, atol=1e-4)
  alone = jax.vjp(lambda x: unet.convolve(x, kernel, periodic, "edges"), x)[1](g)[0]
  np.testing.assert_array_equal(alone, pulled("edges")[0])


def test_a_group_norm_is_flax_s():
  """Same parameters, same values: float32 of values of order one, which mean 3 and spread 2 have.
  Of bfloat16 both differ by its rounding, 2⁻⁸ of values up to 4.
  """
  x = 3 + 2 * jax.random.normal(jax.random.key(0), (4, 6, 5, 8))
  ours, theirs = unet.GroupNorm(2, jnp.float32), nn.GroupNorm(num_groups=2)
  params = theirs.init(jax.random.key(1), x)
  params = jax.tree.map(lambda p: p + jnp.arange(8.0) / 8, params)
  np.testing.assert_allclose(ours.apply(params, x), theirs.apply(params, x), atol=1e-5)
  half = unet.GroupNorm(2, jnp.bfloat16).apply(params, x.astype(jnp.bfloat16))
  assert half.dtype == jnp.bfloat16
  exact = theirs.apply(params, x.astype(jnp.bfloat16).astype(jnp.float32))
  np.testing.assert_allclose(half.astype(jnp.float32), exact, atol=0.05)


def test_convolution_against_its_definition():
  x, kernel = np.arange(5.0, dtype=np.float32), np.array([1.0, 10.0, 100.0], np.float32)
  y = unet.convolve(x[None, :, None], kernel[:, None, None], periodic=True)[0, :, 0]
  np.testing.assert_allclose(
    y, [x[i - 1] + 10 * x[i] + 100 * x[(i + 1) % 5] for i in range(5)]
  )
  edge = unet.convolve(x[None, :, None], kernel[:, None, None], periodic=False)[0, 0, 0]
  assert edge == 10 * x[0] + 100 * x[1]


@pytest.mark.parametrize("space", [(8,), (8, 4)])
def test_space_to_depth_inverts_and_keeps_neighbours_together(space):
  x = jnp.arange(2.0 * np.prod(space) * 3).reshape(2, *space, 3)
  packed = unet.space_to_depth(x, 2)
  assert packed.shape == (2, *(n // 2 for n in space), 3 * 2 ** len(space))
  np.testing.assert_array_equal(unet.depth_to_space(packed, 2), x)
  corner = x[0, :2, 0] if len(space) == 1 else x[0, :2, :2, 0]
  assert set(np.asarray(corner).ravel().tolist()) <= set(
    np.asarray(packed[0, *(0,) * len(space)]).tolist()
  )


def _net(**changes):
  return unet.UNet(
    **{"channels": (8, 8), "strides": (2, 2), "blocks": 1, "heads": 2, "embedding": 16}
    | changes
  )


def _init(net, key, x, level):
  return jax.jit(net.init)(key, x, level)


def _perturbed(params):
  """The last layer starts at zero; move every weight so that outputs are not trivially equal."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda p: p + 0.1 * rng.normal(size=p.shape).astype(p.dtype), params
  )


@pytest.mark.parametrize("space", [(16,), (8, 12)])
@pytest.mark.parametrize("stem", [1, 2])
def test_shift_by_a_patch_commutes_when_periodic(space, stem):
  net = _net(stem=stem, strides=(2, 1))
  x = jax.random.normal(jax.random.key(0), (2, *space, 2))
  level = jnp.array([0.1, -1.0])
  params = _perturbed(_init(net, jax.random.key(1), x, level))
  apply = jax.jit(net.apply)
  out = apply(params, x, level)
  assert out.shape == x.shape
  assert float(jnp.std(out)) > 1e-2
  patch = 2 * stem
  shifted = apply(params, jnp.roll(x, patch, axis=1), level)
  np.testing.assert_allclose(
    shifted, jnp.roll(out, patch, axis=1), atol=1e-4
  )  # float32, a dozen layers of size 1
  assert float(jnp.abs(shifted - out).max()) > 1e-2


def test_starts_silent_and_uses_the_level():
  net = _net()
  x = jax.random.normal(jax.random.key(0), (2, 16, 1))
  params = _init(net, jax.random.key(1), x, jnp.zeros(2))
  apply = jax.jit(net.apply)
  np.testing.assert_array_equal(apply(params, x, jnp.zeros(2)), 0.0)
  params = _perturbed(params)
  one, two = (apply(params, x, jnp.full(2, v)) for v in (0.0, 0.5))
  assert float(jnp.abs(one - two).max()) > 1e-3


def test_bfloat16_computes_and_float32_stores():
  net = _net(dtype=jnp.bfloat16)
  x = jax.random.normal(jax.random.key(0), (2, 16, 1))
  params = _perturbed(_init(net, jax.random.key(1), x, jnp.zeros(2)))
  assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  exact = jax.jit(_net().apply)(params, x, jnp.zeros(2))
  rounded = jax.jit(net.apply)(params, x, jnp.zeros(2))
  assert rounded.dtype == jnp.float32
  error = float(jnp.abs(rounded - exact).max() / jnp.abs(exact).max())
  assert (
    1e-4 < error < 0.1
  )  # 8 bits of mantissa, a dozen layers; exactly equal would mean dtype is ignored


def test_messages():
  with pytest.raises(
    ValueError, match="a grid of 18 points cannot be coarsened 4 times"
  ):
    _init(_net(), jax.random.key(0), jnp.zeros((1, 18, 1)), jnp.zeros(1))
  with pytest.raises(ValueError, match="2 channels and 3 strides"):
    _net(strides=(2, 2, 2)).check((16,))
  with pytest.raises(ValueError, match="use auto, edges, im2col or lax"):
    unet.convolve(jnp.zeros((1, 8, 1)), jnp.zeros((3, 1, 1)), method="fft")
  with pytest.raises(ValueError, match="odd sizes"):
    unet.convolve(jnp.zeros((1, 8, 1)), jnp.zeros((2, 1, 1)))
