"""geometry.log_sum_exp as one Pallas kernel: a tile of exponents lives in registers or VMEM and
never goes to memory.

    top′ = max(top, max_j t_j),   total′ = total · exp(top − top′) + Σ_j exp(t_j − top′)

over column tiles (Milakov & Gimelshein 2018, arXiv:1805.02867), t_j = (2/ε) x_i·y_j + (g_j −
|y_j|²)/ε; the row's own bias (f_i − |x_i|²)/ε comes last. The running maximum makes one path do for
every potential, however stale.

Two forms of one arithmetic: `cuda` (Triton) gives a program per row tile and loops over columns and
over d; `tpu` (Mosaic) makes both a grid, whose last axis runs in order, and takes d whole. NEVER
TIMED and never run on either: it has run in interpret mode and been lowered for both without the
hardware, so the tiles are guesses and the hardware's own compilers have not seen the kernels. So
`debias` takes it only when told to (--config.debias.path=pallas), and benchmarks/accelerator.py
times it against geometry.log_sum_exp and against the other paths. No gradient.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as pltriton

from downscaling.debias.entropic.soft_min import PAD

TILE = {"cuda": (64, 64), "tpu": (256, 512)}  # rows, columns: guesses, see above
LEAST = {
  "cuda": (16, 16),
  "tpu": (8, 128),
}  # smallest edges: of a Triton product; of a TPU register
# Of d in one Triton product: two 64 × 64 operands in three stages are 96 KB of shared memory.
DEPTH = 64
VMEM_BYTES = 8 * 2**20  # for two buffers of both operands' tiles, of some 16 MB
ZERO = np.int32(0)  # indices stay int32 under enable_x64 too
_FORMS = {"gpu": "cuda", "cuda": "cuda", "tpu": "tpu"}


def supported(backend: str) -> bool:
  """Whether the kernel lowers for a backend, by jax's names: "gpu", "cuda" and "tpu"; not "cpu",
  not "rocm".
  """
  return backend in _FORMS


def log_sum_exp(
  x: jax.Array, y: jax.Array, f: jax.Array, g: jax.Array, eps: float | jax.Array,
  tile: tuple[int, int] | None = None, *, backend: str | None = None, interpret: bool = False,
) -> jax.Array:  # fmt: skip
  """log Σ_j exp((f_i + g_j − |x_i − y_j|²)/ε) over rows; geometry.log_sum_exp(...)[0] without
  `vec`.

  Args:
    x [n, d], y [m, d], f [n], g [m]: float32; centred, as for blockwise.Blockwise. eps: scalar > 0,
    units of the cost.
    tile: rows and columns of a tile, powers of two (columns of a TPU tile: multiples of 128); None
      for TILE.
    backend: whose form of the kernel, see `supported`; None for jax's default backend.
    interpret: runs the kernel's steps as jax operations, on any machine, slowly.
  Returns: [n] float32. n, m and d are padded inside: to whole tiles, and d to 16, 32, 64 or more
    64s (TPU: 128s).
  Raises: ValueError for a backend, shapes or a tile that it cannot take; TypeError for another
    dtype than float32.
  """
  backend = backend or (jax.default_backend() if not interpret else "cuda")
  if not supported(backend):
    raise ValueError(
      f"backend {backend!r} came, the kernel lowers for {sorted(_FORMS)}: use geometry.log_sum_exp "
      "there, or interpret=True to try the kernel's arithmetic."
    )
  form = _FORMS[backend]
  tile = tile or TILE[form]
  _check(x, y, f, g, tile, form)
  eps = jnp.asarray(eps, jnp.float32)  # a float64 scalar would promote all
  left, right = x * (2 / eps), (g - jnp.sum(y**2, 1)) / eps
  call = {"cuda": _cuda, "tpu": _tpu}[form]
  out = call(left, y, jnp.maximum(right, PAD), tile, interpret)
  return out + (f - jnp.sum(x**2, 1)) / eps


def _check(x, y, f, g, tile, form) -> None:
  shapes = tuple(jnp.shape(a) for a in (x, y, f, g))
  if [len(s) for s in shapes] != [2, 2, 1, 1] or (shapes[2], shapes[3]) != (
    shapes[0][:1],
    shapes[1][:1],
  ):
    raise ValueError(
      f"x, y, f, g of shapes {shapes} came, need [n, d], [m, d], [n], [m]."
    )
  if shapes[0][1] != shapes[1][1] or 0 in shapes[0] + shapes[1]:
    raise ValueError(
      f"x {shapes[0]} and y {shapes[1]} came, need at least one row each, of one d >= 1."
    )
  if wrong := [f"{name} {jnp.result_type(a)}" for name, a in zip("xyfg", (x, y, f, g), strict=True)
               if jnp.result_type(a) != jnp.float32]:  # fmt: skip
    raise TypeError(
      f"{', '.join(wrong)} came, the kernel is float32: use geometry.log_sum_exp, or "
      ".astype('float32')."
    )
  least = LEAST[form]
  whole = all(
    a >= b and (a & (a - 1) == 0 if form == "cuda" else a % b == 0)
    for a, b in zip(tile, least, strict=True)
  )
  if not whole:
    need = (
      f"powers of two, at least {least}" if form == "cuda" else f"multiples of {least}"
    )
    raise ValueError(
      f"tile={tile}: rows and columns of a {form} tile are {need}. The default is {TILE[form]}."
    )
  depth = _depth(shapes[0][1], form)
  if form == "tpu" and 2 * 4 * depth * sum(tile) > VMEM_BYTES:
    raise ValueError(
      f"tile={tile} with d = {shapes[0][1]} needs {2 * 4 * depth * sum(tile) / 2**20:.0f} MB of "
      f"VMEM, {VMEM_BYTES / 2**20:.0f} are ours: pass a smaller tile, (8, 128) is the least; "
      "beyond that use geometry.log_sum_exp."
    )
  most = max(s[0] + t for s, t in zip(shapes[:2], tile, strict=True)) * depth
  if most >= 2**31:
    raise ValueError(
      f"a cloud of {most} numbers came, the kernel counts in int32: split the rows below 2**31 "
      "numbers."
    )


def _depth(d: int, form: str) -> int:
  """d padded to what a product takes."""
  if form == "tpu":
    return -(-d // 128) * 128
  return max(16, 1 << (d - 1).bit_length()) if d <= DEPTH else -(-d // DEPTH) * DEPTH


def _padded(left, y, right, tile, form):
  """Operands in whole tiles, biases as a row [1, m]; a column that is not there weighs exp(PAD) =
  0.
  """
  rows, columns = -len(left) % tile[0], -len(y) % tile[1]
  more = _depth(left.shape[1], form) - left.shape[1]
  left, y = jnp.pad(left, ((0, rows), (0, more))), jnp.pad(y, ((0, columns), (0, more)))
  return left, y, jnp.pad(right, (0, columns), constant_values=PAD)[None]


def _product(left, y) -> jax.Array:
  # "highest": the accelerator's default would round the product to 10 or 8 bits, and ε divides it
  return lax.dot_general(
    left,
    y,
    (((1,), (1,)), ((), ())),
    precision="highest",
    preferred_element_type=jnp.float32,
  )


def _merge(top, total, t) -> tuple[jax.Array, jax.Array]:
  """(top, total) [rows, 1] with one more tile of exponents [rows, columns].

  A NaN gets into total, if not into top.
  """
  new = jnp.maximum(top, jnp.max(t, axis=1, keepdims=True))
  return new, total * jnp.exp(top - new) + jnp.sum(
    jnp.exp(t - new), axis=1, keepdims=True
  )


@functools.partial(jax.jit, static_argnames=("tile", "interpret"))
def _cuda(left, y, right, tile, interpret) -> jax.Array:
  n, (rows, columns) = len(left), tile
  left, y, right = _padded(left, y, right, tile, "cuda")
  padded, d = left.shape
  depth = min(d, DEPTH)

  def kernel(
    left_ref, y_ref, right_ref, out_ref
  ):  # y and right are whole, in the GPU's memory: a load takes a tile
    def one_tile(j, carry):
      here = pl.ds(j * columns, columns)

      def add(k, t):
        part = pl.ds(k * depth, depth)
        return t + _product(left_ref[:, part], y_ref[here, part])

      t = lax.fori_loop(
        ZERO, np.int32(d // depth), add, jnp.zeros((rows, columns), jnp.float32)
      )
      top, total = carry
      return _merge(top, total, t + right_ref[:, here])

    start = jnp.full((rows, 1), PAD, jnp.float32), jnp.zeros((rows, 1), jnp.float32)
    top, total = lax.fori_loop(
      ZERO,
      np.int32(len(y) // columns),
      one_tile,
      start,
    )
    out_ref[...] = top + jnp.log(total)

  whole = lambda shape: pl.BlockSpec(shape, lambda i: (0, 0))
  by_rows = lambda width: pl.BlockSpec((rows, width), lambda i: (i, 0))
  out = pl.pallas_call(
    kernel,
    jax.ShapeDtypeStruct((padded, 1), jnp.float32),
    grid=(padded // rows,),
    in_specs=[by_rows(d), whole(y.shape), whole(right.shape)],
    out_specs=by_rows(1),
    compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=3),
    interpret=interpret,
    name="log_sum_exp",
  )(left, y, right)
  return out[:n, 0]


@functools.partial(jax.jit, static_argnames=("tile", "interpret"))
def _tpu(left, y, right, tile, interpret) -> jax.Array:
  n, (rows, columns) = len(left), tile
  left, y, right = _padded(left, y, right, tile, "tpu")
  padded, d = left.shape

  def kernel(left_ref, y_ref, right_ref, out_ref, top_ref, total_ref):
    @pl.when(pl.program_id(1) == 0)
    def _():
      top_ref[...] = jnp.full((rows, 1), PAD, jnp.float32)
      total_ref[...] = jnp.zeros((rows, 1), jnp.float32)

    t = _product(left_ref[...], y_ref[...]) + right_ref[...]
    top_ref[...], total_ref[...] = _merge(top_ref[...], total_ref[...], t)

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _():
      out_ref[...] = top_ref[...] + jnp.log(total_ref[...])

  by_rows = lambda width: pl.BlockSpec((rows, width), lambda i, j: (i, 0))
  out = pl.pallas_call(
    kernel,
    jax.ShapeDtypeStruct((padded, 1), jnp.float32),
    grid=(padded // rows, len(y) // columns),
    in_specs=[
      by_rows(d),
      pl.BlockSpec((columns, d), lambda i, j: (j, 0)),
      pl.BlockSpec((1, columns), lambda i, j: (0, j)),
    ],
    out_specs=by_rows(1),
    scratch_shapes=[pltpu.VMEM((rows, 1), jnp.float32)] * 2,
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
    interpret=interpret,
    name="log_sum_exp",
  )(left, y, right)
  return out[:n, 0]
