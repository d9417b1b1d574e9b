"""The Pallas kernel in interpret mode against dense float64 and geometry's own; that it lowers for
both.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from downscaling.debias.entropic import pallas_kernel, soft_min

# The smallest, so that small clouds are several.
TILES = {"cuda": (16, 16), "tpu": (8, 128)}
FORMS = pytest.mark.parametrize("form", ["cuda", "tpu"])
# From jax 0.11 on, Triton asks which GPU a program is for while it is lowered.
DEVICES = {
  "cuda": AbstractDevice("NVIDIA H100", None, "gpu"),
  "tpu": AbstractDevice("TPU v5 lite", None, "tpu"),
}


def clouds(n, m, d, seed=0):
  rng = np.random.default_rng(seed)
  x, y = (
    scale * rng.normal(size=(k, d)) / np.sqrt(d) for k, scale in ((n, 3.0), (m, 3.5))
  )
  f, g = rng.normal(size=n), rng.normal(size=m)
  return tuple(jnp.asarray(a, jnp.float32) for a in (x, y, f, g))


def dense(x, y, f, g, eps):
  x, y, f, g = (np.asarray(a, np.float64) for a in (x, y, f, g))
  cost = ((x[:, None, :] - y[None, :, :]) ** 2).sum(-1)
  return scipy.special.logsumexp((f[:, None] + g[None, :] - cost) / eps, axis=1)


def lowered(call, form, shapes):
  """The text of call's program for a device that is not here."""
  absent = AbstractMesh((), (), abstract_device=DEVICES[form])
  with use_abstract_mesh(absent):
    traced = jax.jit(call).trace(*shapes)
  return traced.lower(lowering_platforms=(form,)).as_text()


def interpreted(form, x, y, f, g, eps, tile=None):
  return pallas_kernel.log_sum_exp(
    x, y, f, g, eps, tile or TILES[form], backend=form, interpret=True
  )


@FORMS
# several tiles and a rest either way; less than one tile; one row; d of several products and a rest
# (cuda), of one
@pytest.mark.parametrize(
  ("n", "m", "d"), [(37, 153, 24), (5, 7, 3), (1, 300, 24), (37, 153, 100)]
)
def test_equals_dense_float64_and_geometry(form, n, m, d):
  x, y, f, g = clouds(n, m, d)
  eps = 0.3
  got = interpreted(form, x, y, f, g, eps)
  assert got.shape == (n,)
  assert got.dtype == jnp.float32
  # squares of up to 40 over ε are exponents of 130, whose float32 ulp is 1.5e-5: measured 2e-5. A
  # padded column that counts is visible wherever it is nearer than the others (log 2); a product of
  # 10 bits errs by .1.
  np.testing.assert_allclose(got, dense(x, y, f, g, eps), atol=1e-4)
  np.testing.assert_allclose(
    got, soft_min.log_sum_exp(x, y, f, g, eps, tile=(16, 32))[0], atol=1e-4
  )


@FORMS
def test_tiles_change_nothing(form):
  x, y, f, g = clouds(70, 290, 24)
  other = {"cuda": (32, 128), "tpu": (24, 384)}[form]
  # another order of 290 sums, ulps of exponents up to 130
  np.testing.assert_allclose(
    interpreted(form, x, y, f, g, 0.3, other),
    interpreted(form, x, y, f, g, 0.3),
    atol=6e-5,
  )


@FORMS
@pytest.mark.parametrize("shift", [4e4, -4e4])
def test_stale_potentials_neither_overflow_nor_vanish(form, shift):
  """exp(±shift/ε) is inf or 0 in float32, wherever the shift stands."""
  x, y, f, g = clouds(20, 150, 4)
  eps = 0.1
  want = dense(x, y, f, g, eps)
  for stale in ((f + shift, g), (f, g + shift)):
    got = eps * np.asarray(interpreted(form, x, y, *stale, eps), np.float64) - shift
    # the shift itself rounds to 4e4 · 2⁻²⁴ = 2e-3, in f or g, in the exponent and in the sum
    np.testing.assert_allclose(got, eps * want, atol=2e-2)
  mixed = g.at[::2].add(
    shift
  )  # half the columns vanish beside the others, whichever tile comes first
  got = eps * np.asarray(interpreted(form, x, y, f, mixed, eps), np.float64)
  np.testing.assert_allclose(got, eps * dense(x, y, f, mixed, eps), atol=2e-2)


@FORMS
def test_nan_is_not_hidden(form):
  x, y, f, g = clouds(20, 150, 4)
  assert np.isnan(interpreted(form, x, y, f, g.at[3].set(jnp.nan), 0.1)).all()
  assert np.isnan(interpreted(form, x, y.at[149, 1].set(jnp.nan), f, g, 0.1)).all()
  one = np.isnan(interpreted(form, x.at[7, 0].set(jnp.nan), y, f, g, 0.1))
  np.testing.assert_array_equal(np.flatnonzero(one), [7])


def test_a_column_of_no_weight_does_not_count():
  x, y, f, g = clouds(20, 150, 4)
  got = interpreted("cuda", x, y, f, g.at[100:].set(-jnp.inf), 0.1)
  # exponents of up to 300: an ulp is 3e-5
  np.testing.assert_allclose(got, dense(x, y[:100], f, g[:100], 0.1), atol=2e-4)


@pytest.mark.parametrize(
  ("platform", "mark"), [("cuda", "triton"), ("tpu", "tpu_custom_call")]
)
@pytest.mark.parametrize("d", [24, 100, 1024])
def test_lowers_without_the_hardware(platform, mark, d):
  shapes = [
    jax.ShapeDtypeStruct(s, jnp.float32)
    for s in ((1000, d), (3000, d), (1000,), (3000,), ())
  ]
  call = lambda *a: pallas_kernel.log_sum_exp(*a, backend=platform)
  text = lowered(call, platform, shapes)
  assert mark in text
  # outside the kernel nothing is larger than the padded clouds: the exponents never leave it
  sizes = [
    np.prod([int(k) for k in s.split("x")], dtype=np.int64)
    for s in re.findall(r"tensor<([0-9x]+)xf32>", text)
  ]
  assert max(sizes) <= 3072 * max(128, d)


def test_supported():
  assert all(map(pallas_kernel.supported, ("gpu", "cuda", "tpu")))
  assert not any(map(pallas_kernel.supported, ("cpu", "rocm", "", "METAL")))


@pytest.mark.parametrize(
  ("change", "options", "error", "message"),
  [
    (
      {}, {}, ValueError,
      r"backend 'cpu' came, the kernel lowers for \['cuda', 'gpu', 'tpu'\]: use geometry",
    ),
    ({}, {"backend": "rocm"}, ValueError, "backend 'rocm' came"),
    ({"x": (20,)}, {"interpret": True}, ValueError, r"shapes \(\(20,\), .* came, need \[n, d\], "),
    (
      {"y": (30, 5)}, {"interpret": True}, ValueError,
      r"x \(20, 4\) and y \(30, 5\) came, need .* of one d",
    ),
    ({"x": (0, 4), "f": (0,)}, {"interpret": True}, ValueError, "at least one row each"),
    ({"f": (30,)}, {"interpret": True}, ValueError, "need"),
    (
      {}, {"interpret": True, "tile": (16, 48)}, ValueError,
      r"tile=\(16, 48\): .* powers of two, at least \(16, 16\)",
    ),
    ({}, {"interpret": True, "tile": (8, 64)}, ValueError, "powers of two, at least"),
    (
      {}, {"interpret": True, "backend": "tpu", "tile": (8, 64)}, ValueError,
      r"multiples of \(8, 128\)",
    ),
    (
      {"x": (20, 4096), "y": (30, 4096)}, {"interpret": True, "backend": "tpu"}, ValueError,
      r"d = 4096 needs 24 MB of VMEM, 8 are ours: pass a smaller tile",
    ),
  ],
)  # fmt: skip
def test_refusals_say_what_to_change(change, options, error, message):
  shapes = {"x": (20, 4), "y": (30, 4), "f": (20,), "g": (30,)} | change
  with pytest.raises(error, match=message) as caught:
    pallas_kernel.log_sum_exp(
      *(np.zeros(s, np.float32) for s in shapes.values()), 0.1, **options
    )
  assert "\n" not in str(caught.value)


def test_another_dtype_is_refused(x64):
  x, y, f, g = clouds(20, 30, 4)
  with pytest.raises(
    TypeError, match=r"y float64 came, the kernel is float32: use geometry.log_sum_exp"
  ):
    interpreted("cuda", x, y.astype(jnp.float64), f, g, 0.1)


@FORMS
def test_works_where_float64_is_on(form, x64):
  x, y, f, g = clouds(20, 150, 4)
  got = interpreted(form, x, y, f, g, np.float64(0.3))
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, dense(x, y, f, g, 0.3), atol=1e-4)
  shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, y, f, g)]
  call = lambda *a: pallas_kernel.log_sum_exp(*a, 0.3, backend=form)
  assert "xf64" not in lowered(call, form, shapes)  # no array is
