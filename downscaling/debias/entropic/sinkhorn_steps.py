"""Sinkhorn iterations on clouds whose rows lie on many devices. Four paths, one result up to
rounding:

  fused  looks at every pair once an iteration. Of a tile of rows E_ij = exp((f_i + g_j − |x_i −
         y_j|²)/ε) its row sums r give the new f; and the columns of the plan *after* that step are
         Σ_i (a/r_i)^ω E_ij, of the same E. Solvers that alternate a soft-min for f and one for g
         take every exponential twice. Only tiles are stored; every device holds all of y.
  dense  keeps E for a whole chunk and scales its rows and columns (the exponential once a chunk;
         Peyré & Cuturi 2019, arXiv:1803.00567, section 4.2), absorbing the scalings into the
         potentials at its end (Schmitzer 2019, arXiv:1610.06519). n × m/devices numbers; for rows
         of WIDE values or more twice as many, as the costs are then dearer than all else and kept
         for the whole solve.
  ring   two soft-mins, the other cloud going around the devices, so that none ever holds all of it.
  pallas the same, each soft-min by the kernel of pallas.py: on an accelerator its exponents never
         go to memory. Taken only when named, as it was never timed on one: `python
         benchmarks/accelerator.py` says whether it wins there.

ω is the over-relaxation. Sums of E are sums of the current plan, so they stay near the weights;
where they leave SAFE (a rung of ε too steep, the first step), fused and dense do the iteration
again by soft-mins with a running maximum.

With a group of the law of both clouds, the kernel is its mean over the group, E_ij = mean_m
exp((f_i + g_j −
|m·x_i − y_j|²)/ε): the plan between the orbits, whose potentials are constant on them. `dense` pays
for it once a chunk, the others in every iteration.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from downscaling.debias.entropic import soft_min
from downscaling.runtime import mesh as meshes

PATHS = ("dense", "fused", "ring", "pallas")
SAFE = soft_min.SAFE
# scalings of the dense path up to this: what underflowed in E, below 1e-38, then still weighs
# nothing
SCALE = 1e15
# Of a device's part of E, up to which `dense` was the faster path on 2 CPU cores: see choose.
DENSE_BYTES = 2**30
# The same with a group, and for wide rows: there other paths pay more in every iteration.
MORE_BYTES = 2**31
WIDE = 128  # values of a row from which a product costs more than an iteration
TILE_NUMBERS = 2**21  # in a tile of `fused`: 8 MB in float32


def choose(
  n: int,
  m: int,
  d: int,
  devices: int,
  elements: int = 1,
) -> str:
  """The path for n × m rows of d values: dense while what a device keeps takes at most DENSE_BYTES,
  else fused.

  elements: of the group; with more than one, and for wide rows, up to MORE_BYTES.

  Measured by `python benchmarks/sinkhorn.py`, docs/results/sinkhorn.txt. `ring` is for clouds of
  which a device cannot hold one whole; it does twice the work of fused.
  """
  kept = 4 * n * m / devices * (2 if keeps_costs("dense", d, elements) else 1)
  return (
    "dense"
    if kept <= (DENSE_BYTES if elements == 1 and d < WIDE else MORE_BYTES)
    else "fused"
  )


def keeps_costs(path: str, d: int, elements: int = 1) -> bool:
  """Whether a solve hands `costs` to its chunks."""
  return path == "dense" and d >= WIDE and elements == 1


@functools.cache
def make_costs(mesh: Mesh) -> Callable:
  """(x [n, d], y [m, d]) -> |x_i − y_j|² [n, m], rows over all devices of the mesh like those of x.
  Two programs: in one, XLA on a CPU fuses the sums of squares into the product, at ten times its
  time.
  """
  split = functools.partial(
    jax.shard_map, mesh=mesh, out_specs=meshes.ROWS, check_vma=False
  )
  squares = jax.jit(
    split(
      lambda x: jnp.sum(x**2, 1),
      in_specs=meshes.ROWS,
    )
  )
  cost = lambda x, y, xx, yy: (
    xx[:, None] + _whole(yy)[None] - 2 * jnp.matmul(x, _whole(y).T, precision="highest")
  )
  run = jax.jit(split(cost, in_specs=(meshes.ROWS,) * 4))
  return lambda x, y: run(x, y, squares(x), squares(y))


@functools.cache
def make_chunk(*, iterations: int, momentum: float, path: str, mesh: Mesh) -> Callable:
  """The jitted (x, y, a, b, f, g, ε, moves, costs) -> (f, g, error): `iterations` steps at one ε.

  x [n, d], y [m, d]: clouds, centred, rows over all devices of the mesh; a [n], b [m]: their
  weights, > 0, of sum 1, likewise. f [n], g [m]: potentials, likewise; donated. ε: scalar > 0, in
  units of the cost. moves: (index [G, d], sign [G]) of a group, or None. costs: of make_costs, for
  `dense` where keeps_costs, else None. error: the larger L1 error of the two marginals of the plan
  of f and g.

  Args: momentum: ω, 1 to < 2. path: one of PATHS.
  """
  kernel = functools.partial(_kernel, platform=meshes.platform(mesh))
  body = {
    "dense": _dense,
    "fused": _fused,
    "ring": _ring,
    "pallas": functools.partial(_ring, lse=kernel),
  }[path]

  def chunk(
    x,
    y,
    a,
    b,
    f,
    g,
    epsilon,
    moves=None,
    costs=None,
  ):
    run = jax.shard_map(
      functools.partial(
        body, iterations=iterations, momentum=momentum, devices=mesh.size
      ),
      mesh=mesh,
      in_specs=(*(meshes.ROWS,) * 6, PartitionSpec(), PartitionSpec(), meshes.ROWS),
      out_specs=(meshes.ROWS, meshes.ROWS, PartitionSpec()),
      # what is equal on all devices after a psum is known to us, not to the checker
      check_vma=False,
    )
    f, g, error = run(
      x,
      y,
      a,
      b,
      f,
      g,
      epsilon,
      moves,
      costs,
    )
    drift = f.mean()  # f and −g wander off together, and lose digits
    return f - drift, g + drift, error

  rows = meshes.rows(mesh)
  return jax.jit(
    chunk, out_shardings=(rows, rows, meshes.replicated(mesh)), donate_argnums=(4, 5)
  )


def _sum(value):
  return lax.psum(value, meshes.AXES)


def _whole(rows):
  """All rows of what lies split over the devices; of one device, without a copy."""
  if lax.axis_size(meshes.AXES) == 1:
    return rows
  return lax.all_gather(rows, meshes.AXES, axis=0, tiled=True)


def _own(whole, count):
  """This device's rows of an array that all devices have."""
  return lax.dynamic_slice_in_dim(whole, lax.axis_index(meshes.AXES) * count, count)


def _outside(sums):
  """Is any of them outside SAFE? NaN is."""
  return ~jnp.all((sums > SAFE[0]) & (sums < SAFE[1]))


def _rows(x, f, eps, columns, moves, *more):
  """What tiles are cut from, x, (f − |x|²)/ε and more, and how many rows make about TILE_NUMBERS
  exponents, or eight times that where rows are wide: a product of few rows reads all of y for
  little work."""
  size = max(
    8, TILE_NUMBERS // columns, min(256, x.shape[1] // 4, 8 * TILE_NUMBERS // columns)
  )
  return (
    x,
    (f - jnp.sum(x**2, 1)) / eps - (0.0 if moves is None else math.log(len(moves[1]))),
    *more,
  ), size


def _exponentials(rows, right, eps, moves):
  """E of a tile, [rows, columns]."""
  x, bias = rows[0] * (2 / eps), rows[1]
  if moves is None:
    return jnp.exp(soft_min.exponents((x, bias), right))
  add = lambda e, move: (
    e
    + jnp.exp(
      soft_min.exponents(
        (soft_min.moved(move, x), bias),
        right,
      )
    ),
    None,
  )
  return lax.scan(
    add,
    jnp.zeros((len(x), len(right[1])), x.dtype),
    moves,
  )[0]


def _fused(
  x,
  y,
  a,
  b,
  f,
  g,
  eps,
  moves,
  costs,
  *,
  iterations,
  momentum,
  devices,
):
  del costs, devices
  whole_y, whole_g = _whole(y), _whole(g)
  step = functools.partial(_fused_step, x, whole_y, a, _whole(b), eps, moves)

  def advance(potentials, _):
    f, g = potentials
    return step(f, g, momentum)[0], None

  (f, g), _ = lax.scan(advance, (f, whole_g), length=iterations)
  error = step(f, g, 0.0)[1]
  return f, _own(g, len(y)), error


def _fused_step(x, y, a, b, eps, moves, f, g, momentum):
  """((f, g) one iteration later, marginal error of the plan of the f and g that came); y, b and g
  are whole.
  """
  right = y, (g - jnp.sum(y**2, 1)) / eps

  def add(columns, rows, there):
    e = _exponentials(rows, right, eps, moves)
    r = e.sum(1)
    ratio = jnp.log(rows[2] / r)
    scale = jnp.where(there, jnp.exp(momentum * ratio), 0.0)
    return columns + jnp.matmul(scale, e, precision="highest"), (r, ratio)

  columns, (r, ratio) = soft_min.scan_tiles(
    add, jnp.zeros_like(g), *_rows(x, f, eps, len(y), moves, a)
  )
  columns = _sum(columns)
  bad = (_sum(_outside(r / a).astype(jnp.int32)) > 0) | _outside(columns / b)

  def plain():
    error = jnp.maximum(
      _sum(jnp.abs(r - a).sum()),
      jnp.abs(columns - b).sum(),
    )
    return (
      f + momentum * eps * ratio,
      g - momentum * eps * jnp.log(columns / b),
    ), error

  def careful():
    new = f - momentum * eps * (_soft(x, y, f, g, eps, moves) - jnp.log(a))
    lse = _soft_columns(x, y, new, g, eps, moves)
    rows = jnp.exp(_soft(x, y, f, g, eps, moves))
    error = jnp.maximum(
      _sum(jnp.abs(rows - a).sum()),
      jnp.abs(jnp.exp(lse) - b).sum(),
    )
    return (new, g - momentum * eps * (lse - jnp.log(b))), error

  return lax.cond(bad, careful, plain)


def _scan(x, y, f, g, eps):
  return soft_min.log_sum_exp(x, y, f, g, eps)[0]


def _kernel(x, y, f, g, eps, platform):
  """On a CPU the kernel's steps run as jax operations, for tests."""
  from downscaling.debias.entropic import pallas_kernel  # a third of a second, for few

  supported = pallas_kernel.supported(platform)
  return pallas_kernel.log_sum_exp(
    x, y, f, g, eps, interpret=not supported, backend=platform if supported else None
  )


def _soft(x, y, f, g, eps, moves, lse=_scan):
  """log Σ_j of the plan, for this device's rows of x; y and g are as many as they are. lse: by
  _scan or _kernel.
  """
  return (
    lse(x, y, f, g, eps)
    if moves is None
    else soft_min.orbit_log_sum_exp(x, y, f, g, eps, moves, lse)
  )


def _soft_columns(x, y, f, g, eps, moves):
  """log Σ_i of the plan over all devices' rows, [m]; y and g are whole."""
  mine = _soft(
    y, x, g, f, eps, moves
  )  # to move y instead of x sums over the inverses: the same group
  top = lax.pmax(mine, meshes.AXES)
  top = jnp.where(jnp.isfinite(top), top, 0.0)
  return top + jnp.log(_sum(jnp.exp(mine - top)))


def _dense(
  x,
  y,
  a,
  b,
  f,
  g,
  eps,
  moves,
  costs,
  *,
  iterations,
  momentum,
  devices,
):
  whole_y, whole_b, whole_g = _whole(y), _whole(b), _whole(g)
  if costs is None:
    right = whole_y, (whole_g - jnp.sum(whole_y**2, 1)) / eps
    one_tile = lambda _, rows, there: (None, _exponentials(rows, right, eps, moves))
    kernel = soft_min.scan_tiles(
      one_tile, None, *_rows(x, f, eps, len(whole_y), moves)
    )[1]
  else:
    kernel = jnp.exp((f[:, None] + whole_g[None] - costs) / eps)
  dot = functools.partial(jnp.matmul, precision="highest")

  def step(uv, _):
    u, v = uv
    u = u * (u * dot(kernel, v) / a) ** -momentum
    v = v * (v * _sum(dot(u, kernel)) / whole_b) ** -momentum
    return (u, v), None

  (u, v), _ = lax.scan(
    step, (jnp.ones_like(f), jnp.ones_like(whole_g)), length=iterations
  )
  rows_err = _sum(jnp.abs(u * dot(kernel, v) - a).sum())
  error = jnp.maximum(
    rows_err,
    jnp.abs(v * _sum(dot(u, kernel)) - whole_b).sum(),
  )
  wild = lambda s: ~jnp.all((s > 1 / SCALE) & (s < SCALE))
  bad = (_sum(wild(u).astype(jnp.int32)) > 0) | wild(v)
  good = lambda: (f + eps * jnp.log(u), _own(whole_g + eps * jnp.log(v), len(y)), error)
  sizes = {"iterations": iterations, "momentum": momentum, "devices": devices}
  again = lambda: _fused(
    x,
    y,
    a,
    b,
    f,
    g,
    eps,
    moves,
    None,
    **sizes,
  )
  return lax.cond(bad, again, good)


def _ring(
  x, y, a, b, f, g, eps, moves, costs, *, iterations, momentum, devices, lse=_scan
):
  del costs
  soft = functools.partial(
    _ring_soft,
    soft=functools.partial(_soft, eps=eps, moves=moves, lse=lse),
    devices=devices,
  )

  def step(fg, _):
    f, g = fg
    f = f - momentum * eps * (soft(x, f, y, g) - jnp.log(a))
    g = g - momentum * eps * (soft(y, g, x, f) - jnp.log(b))
    return (f, g), None

  (f, g), _ = lax.scan(step, (f, g), length=iterations)
  error = lambda lse, weights: _sum(jnp.abs(jnp.exp(lse) - weights).sum())
  return (
    f,
    g,
    jnp.maximum(
      error(soft(x, f, y, g), a),
      error(soft(y, g, x, f), b),
    ),
  )


def _ring_soft(x, f, y, g, *, soft, devices):
  """log Σ_j of the plan for this device's rows of x, while the parts of y go around: each is here
  once.
  """
  onward = [(i, (i + 1) % devices) for i in range(devices)]

  def visit(carry, _):
    total, y, g = carry
    total = jnp.logaddexp(total, soft(x, y, f, g))
    return (total, *lax.ppermute((y, g), meshes.AXES, onward)), None

  start = jnp.full_like(f, soft_min.PAD), y, g
  return lax.scan(visit, start, length=devices)[0][0]
