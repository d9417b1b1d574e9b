"""U-Net for fields in one or two dimensions, each axis periodic or not: one implementation, the
rank comes with the input.

Stem (optionally space-to-depth), then per level a strided patch embedding and residual blocks with
FiLM from the noise level; self-attention at the coarsest level; the way back up adds blocks on
(upsampled, skip). Layout after Wan et al. 2023 (arXiv:2305.15618), appendix, as public
re-implementations give it. Equivariant to shifts by a whole patch when
periodic: no positional encoding, since the equations here know no preferred point.
"""

import functools
import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp


def convolve(
  x: jax.Array,
  kernel: jax.Array,
  periodic: bool | tuple[bool, ...] = True,
  method: str = "auto",
) -> jax.Array:
  """Convolution with unit stride and the output the size of the input.

  Args:
    x: [B, *space, C]. kernel: [*odd sizes, C, C'].
    periodic: wrap around; else zeros beyond the edge. One word for all axes, or one an axis.
    method: "lax" pads the field and calls the backend's convolution. "im2col" gathers neighbours
      and does one product. "edges" pads nothing: the backend's convolution with zeros beyond the
      edge, then the terms that wrap around. "auto" is lax here, and edges where a job is on a CPU.
  Returns: [B, *space, C'].

  Measured with `python benchmarks/convolution.py --rounds=9`, two cores of an Intel Xeon, jax
  0.10.2. Wall time of edges over the best of the others, in 1-D and 2-D: a training step 1.13, .77;
  calls within lax.scan .79, .55; these with a vjp .85, .72. docs/research/prior.md has the table.
  """
  rank = x.ndim - 2
  if kernel.ndim != rank + 2 or any(k % 2 == 0 for k in kernel.shape[:rank]):
    raise ValueError(
      f"kernel {kernel.shape} for a field {x.shape}: need {rank} odd sizes, then [in, out] "
      "channels."
    )
  wrapped = (periodic,) * rank if isinstance(periodic, bool) else periodic
  if len(wrapped) != rank:
    raise ValueError(
      f"periodic={periodic} for {rank} axes of space: need one word an axis."
    )
  if method == "edges":
    return _edges(x, kernel, wrapped)
  padded = _padded(x, kernel.shape[:rank], wrapped)
  if method in ("lax", "auto"):
    return _convolved(padded, kernel, "VALID")
  if method != "im2col":
    raise ValueError(
      f"config.model.convolution={method!r} is unknown; use auto, edges, im2col or lax."
    )
  columns = padded
  for axis, size in enumerate(kernel.shape[:rank], start=1):
    n = x.shape[axis]
    columns = jnp.concatenate(
      [jax.lax.slice_in_dim(columns, i, i + n, axis=axis) for i in range(size)], axis=-1
    )
  # The last axis was gathered slowest-first: (k_last, ..., k_first, C).
  order = (*reversed(range(rank)), rank, rank + 1)
  return columns @ kernel.transpose(order).reshape(-1, kernel.shape[-1])


def _convolved(x: jax.Array, kernel: jax.Array, padding: str) -> jax.Array:
  """By the backend, with unit stride; of rank 0 a product over the channels."""
  rank = x.ndim - 2
  if rank == 0:
    return x @ kernel
  space = "HWD"[:rank] if rank > 1 else "W"
  layout = (f"N{space}C", f"{space}IO", f"N{space}C")
  return jax.lax.conv_general_dilated(
    x, kernel, (1,) * rank, padding, dimension_numbers=layout
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _edges(x: jax.Array, kernel: jax.Array, wrapped: tuple[bool, ...]) -> jax.Array:
  """`_with_edges`, whose gradient to x is the same convolution by the mirrored kernel.

  Within a loop on a CPU, the backend's own gradients are slow. That to the kernel is the backend's:
  a loop that needs it should use im2col.
  """
  return _with_edges(x, kernel, wrapped)


def _edges_forward(x, kernel, wrapped):
  # The field is kept only for the kernel's gradient, which guidance does not ask for.
  saved = x.value if kernel.perturbed else None, kernel.value
  return _with_edges(x.value, kernel.value, wrapped), saved


def _edges_backward(wrapped, saved, g):
  x, kernel = saved
  mirrored = jnp.flip(kernel, range(len(wrapped))).swapaxes(-1, -2)
  to_field, to_kernel = _with_edges(g, mirrored, wrapped), None
  if x is not None:
    padded = _padded(x, kernel.shape[: len(wrapped)], wrapped)
    _, pull = jax.vjp(lambda kernel: _convolved(padded, kernel, "VALID"), kernel)
    (to_kernel,) = pull(g)
  return to_field, to_kernel


_edges.defvjp(_edges_forward, _edges_backward, symbolic_zeros=True)


def _with_edges(
  x: jax.Array, kernel: jax.Array, wrapped: tuple[bool, ...]
) -> jax.Array:
  """Zeros beyond the edge, then what wraps around is added to the points near it.

  No padded copy of the field is made. On a periodic axis, tap i at point p near the edge reads the
  point p + i - size // 2, a whole turn away. That is a convolution of one rank less, over the other
  axes. Earlier axes have had their turn, so there zeros are beyond the edge.
  """
  y = _convolved(x, kernel, "SAME")
  for axis, wrap in enumerate(wrapped):
    if not wrap:
      continue
    n, size = x.shape[axis + 1], kernel.shape[axis]
    rest = (*(False,) * axis, *wrapped[axis + 1 :])
    for tap in range(size):
      shift = tap - size // 2
      near = range(-shift) if shift < 0 else range(n - shift, n)
      for p in near:
        slab = jnp.take(x, (p + shift) % n, axis=axis + 1)
        term = _with_edges(slab, jnp.take(kernel, tap, axis=axis), rest)
        y = y.at[(*(slice(None),) * (axis + 1), p)].add(term)
  return y


def _padded(
  x: jax.Array, sizes: tuple[int, ...], wrapped: tuple[bool, ...]
) -> jax.Array:
  """x with half a kernel beyond either edge of every axis."""
  halo = [(size // 2, size // 2) for size in sizes]
  for mode, chosen in (("wrap", True), ("constant", False)):
    padding = [h if w is chosen else (0, 0) for h, w in zip(halo, wrapped, strict=True)]
    if any(before for before, _ in padding):
      x = jnp.pad(x, [(0, 0), *padding, (0, 0)], mode=mode)
  return x


def space_to_depth(x: jax.Array, patch: int) -> jax.Array:
  """[B, *space, C] -> [B, *(space / patch), patch^rank · C]."""
  rank = x.ndim - 2
  split = [s for n in x.shape[1:-1] for s in (n // patch, patch)]
  x = x.reshape(x.shape[0], *split, x.shape[-1])
  x = x.transpose(
    0,
    *range(1, 2 * rank, 2),
    *range(2, 2 * rank + 1, 2),
    2 * rank + 1,
  )
  return x.reshape(*x.shape[: rank + 1], -1)


def depth_to_space(x: jax.Array, patch: int) -> jax.Array:
  """The inverse of space_to_depth."""
  rank = x.ndim - 2
  space = x.shape[1:-1]
  x = x.reshape(
    x.shape[0],
    *space,
    *(patch,) * rank,
    -1,
  )
  x = x.transpose(
    0, *[i for r in range(rank) for i in (1 + r, 1 + rank + r)], 2 * rank + 1
  )
  return x.reshape(
    x.shape[0],
    *[n * patch for n in space],
    -1,
  )


class Conv(nn.Module):
  """convolve() with parameters; size points an axis."""

  features: int
  size: int = 3
  periodic: bool | tuple[bool, ...] = True
  method: str = "auto"
  scale: float = 1.0  # of the initial weights; 0 starts a residual branch silent
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    shape = (*(self.size,) * (x.ndim - 2), x.shape[-1], self.features)
    init = (
      nn.initializers.variance_scaling(self.scale, "fan_in", "normal")
      if self.scale
      else nn.initializers.zeros
    )
    kernel = self.param("kernel", init, shape).astype(self.dtype)
    bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(
      self.dtype
    )
    y = convolve(x.astype(self.dtype), kernel, self.periodic, self.method)
    return y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


class GroupNorm(nn.Module):
  """Group normalisation as one product and one sum a value; parameters as nn.GroupNorm has them.

  Mean and variance of a group come from sums over each channel, so the field is read once for them.
  They are float32, whatever the field is.
  """

  groups: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x):
    channels = x.shape[-1]
    scale = self.param("scale", nn.initializers.ones, (channels,))
    bias = self.param("bias", nn.initializers.zeros, (channels,))
    axes = tuple(range(1, x.ndim - 1))
    exact = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = self._of_groups(exact.mean(axes))
    variance = self._of_groups(jnp.square(exact).mean(axes)) - mean**2
    factor = scale[None] * jax.lax.rsqrt(jnp.maximum(variance, 0) + 1e-6)
    offset = bias[None] - mean * factor
    factor, offset = (jnp.expand_dims(each, axes) for each in (factor, offset))
    return x.astype(self.dtype) * factor.astype(self.dtype) + offset.astype(self.dtype)

  def _of_groups(self, values):
    """Means over the channels of each group, [B, C] -> [B, C]."""
    each = values.reshape(len(values), self.groups, -1)
    return jnp.repeat(each.mean(-1), each.shape[-1], axis=1)


def _norm(x, dtype):
  groups = math.gcd(x.shape[-1], max(1, min(32, x.shape[-1] // 4)))
  return GroupNorm(groups, dtype)(x)


class ResidualBlock(nn.Module):
  """Norm, swish, convolution, twice; FiLM from the noise embedding between; the skip is projected
  if widths differ.
  """

  features: int
  periodic: bool | tuple[bool, ...]
  method: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x, embedding):
    conv = lambda scale: Conv(
      self.features, 3, self.periodic, self.method, scale, self.dtype
    )
    h = conv(1.0)(nn.swish(_norm(x, self.dtype)))
    film = nn.Dense(2 * self.features, dtype=self.dtype)(embedding)
    shift, scale = jnp.split(
      film.reshape(
        film.shape[0],
        *(1,) * (x.ndim - 2),
        -1,
      ),
      2,
      axis=-1,
    )
    h = conv(0.0)(nn.swish(_norm(h, self.dtype) * (1 + scale) + shift))
    if x.shape[-1] != self.features:
      x = nn.Dense(self.features, dtype=self.dtype)(x)
    return x + h


class Attention(nn.Module):
  """Self-attention over all points of the field, on top of the input."""

  heads: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x):
    tokens = _norm(x, self.dtype).reshape(x.shape[0], -1, x.shape[-1])
    heads = math.gcd(self.heads, x.shape[-1])
    y = nn.MultiHeadDotProductAttention(
      heads, dtype=self.dtype, out_kernel_init=nn.initializers.zeros
    )(tokens)
    return x + y.reshape(x.shape)


class UNet(nn.Module):
  """F(x, c[, static]): [B, *space, C], one number a sample and fields [*space, K] that are always
  known -> as x.

  Attributes:
    channels: width of each level; level l has the grid divided by stem · Π strides[: l + 1].
    strides: coarsening on entering each level.
    blocks: residual blocks a level, on the way down and again on the way up.
    stem: patch of the space-to-depth stem; 1 keeps the full grid.
    heads: attention heads at the coarsest level; 0 for none.
    embedding: width of the noise embedding.
    periodic: wrap around every axis, or zeros beyond the edge; or one word an axis.
    convolution: see convolve().
    dtype: of the computation; parameters stay float32.
    remat: on so many of the finest levels, where activations are largest, residual blocks keep only
      their input for the backward pass and compute the rest again: less memory, about a third more
      work there. Same parameters.
  """

  channels: tuple[int, ...] = (32, 64, 128)
  strides: tuple[int, ...] = (2, 2, 2)
  blocks: int = 2
  stem: int = 1
  heads: int = 8
  embedding: int = 128
  periodic: bool | tuple[bool, ...] = True
  convolution: str = "auto"
  dtype: jnp.dtype = jnp.float32
  remat: int = 0

  def check(self, space: tuple[int, ...]) -> None:
    """Raises ValueError if the grid cannot be coarsened so often."""
    if len(self.channels) != len(self.strides):
      raise ValueError(
        f"config.model: {len(self.channels)} channels and {len(self.strides)} strides: one of each "
        "a level."
      )
    total = self.stem * math.prod(self.strides)
    bad = [n for n in space if n % total]
    if bad:
      raise ValueError(
        f"a grid of {bad[0]} points cannot be coarsened {total} times (stem {self.stem} × strides "
        f"{self.strides}): choose config.model.strides whose product divides it."
      )

  @nn.compact
  def __call__(
    self, x: jax.Array, level: jax.Array, static: jax.Array | None = None
  ) -> jax.Array:
    """Raises ValueError for a grid that the strides do not divide; level is [B]."""
    self.check(x.shape[1:-1])
    kinds = {"periodic": self.periodic, "method": self.convolution, "dtype": self.dtype}
    embedding = self._embed(level)
    out_channels = x.shape[-1] * self.stem ** (x.ndim - 2)
    if static is not None:
      x = jnp.concatenate(
        [
          x,
          jnp.broadcast_to(jnp.asarray(static, x.dtype), (len(x), *static.shape)),
        ],
        axis=-1,
      )

    made = itertools.count()

    def block(level, h):
      cls = nn.remat(ResidualBlock) if level < self.remat else ResidualBlock
      return cls(self.channels[level], **kinds, name=f"ResidualBlock_{next(made)}")(
        h, embedding
      )

    h = Conv(self.channels[0], **kinds)(
      space_to_depth(x, self.stem) if self.stem > 1 else x
    )
    skips = [h]
    for i, (width, stride) in enumerate(
      zip(
        self.channels,
        self.strides,
        strict=True,
      )
    ):
      h = nn.Dense(width, dtype=self.dtype)(space_to_depth(h, stride))
      for _ in range(self.blocks):
        h = block(i, h)
      skips.append(h)
    if self.heads:
      h = Attention(self.heads, self.dtype)(h)

    widths = (self.channels[0], *self.channels)
    for i in reversed(range(len(self.channels))):
      h = jnp.concatenate([h, skips[i + 1]], axis=-1)
      for _ in range(self.blocks):
        h = block(i, h)
      patch = self.strides[i] ** (x.ndim - 2)
      h = depth_to_space(
        nn.Dense(widths[i] * patch, dtype=self.dtype)(h), self.strides[i]
      )
    h = nn.swish(_norm(h + skips[0], self.dtype))
    h = Conv(out_channels, scale=0.0, **kinds)(h)
    return (depth_to_space(h, self.stem) if self.stem > 1 else h).astype(x.dtype)

  def _embed(self, level):
    """Fourier features of the level, then two dense layers, [B, embedding]."""
    frequencies = jnp.geomspace(0.25, 64.0, self.embedding // 2, dtype=level.dtype)
    angles = level[:, None] * frequencies[None, :]
    features = jnp.concatenate(
      [jnp.sin(angles), jnp.cos(angles)],
      axis=-1,
    )
    h = nn.swish(nn.Dense(self.embedding, dtype=self.dtype)(features))
    return nn.swish(nn.Dense(self.embedding, dtype=self.dtype)(h))
