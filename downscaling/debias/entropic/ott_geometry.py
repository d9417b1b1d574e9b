"""The tiles of geometry.py as a geometry of ott: its solvers and dual potentials on clouds whose
cost is never stored.

`debias` does not need it: it is for whoever has a problem of ott's, and for comparing our iteration
with its. A module of its own, since importing ott takes longer than all the rest.
"""

import warnings

import jax
import jax.numpy as jnp

from downscaling.debias.entropic import soft_min

with warnings.catch_warnings():
  warnings.simplefilter(
    "ignore", DeprecationWarning
  )  # ott imports jaxopt, which says that it is no longer maintained
  from ott.geometry import costs, geometry


@jax.tree_util.register_pytree_node_class
class Blockwise(geometry.Geometry):
  """Cost |x_i − y_j|² between two clouds, with the kernel applied in tiles; a pytree whose ε is a
  traced leaf.

  One compiled solve therefore serves a whole ladder of ε. Memory: the clouds, the potentials and
  one tile.

  Args:
    x: source cloud, [n, d]; y: target cloud, [m, d], of one dtype. Subtract `centre` first: what
      both share cancels in the cost but not in the rounding of 2x·y.
    epsilon: regularisation, in units of the cost, > 0.
    tile: rows and columns of a tile; static.
  """

  def __init__(
    self,
    x: jax.Array,
    y: jax.Array,
    epsilon: float | jax.Array,
    tile: tuple[int, int] = soft_min.TILE,
  ):
    # ott annotates a float; a traced scalar serves it as well.
    super().__init__(epsilon=epsilon)  # pyright: ignore[reportArgumentType]
    self.x, self.y, self.tile = x, y, tuple(tile)

  @property
  def cost_fn(self) -> costs.CostFn:
    """ott's name for the cost; its dual potentials ask for it."""
    return costs.SqEuclidean()

  @property
  def shape(self) -> tuple[int, int]:
    return self.x.shape[0], self.y.shape[0]

  @property
  def dtype(self):
    return self.x.dtype

  @property
  def is_squared_euclidean(self) -> bool:
    return True

  @property
  def is_online(self) -> bool:
    return True

  @property
  def is_symmetric(self) -> bool:
    return False

  @property
  def cost_matrix(self) -> jax.Array:
    raise TypeError(
      f"a {self.shape[0]} × {self.shape[1]} cost matrix was asked for, which Blockwise never "
      "makes: use lse_mode=True and apply_* instead, or ott.geometry.pointcloud.PointCloud if it "
      "fits in memory."
    )

  @property
  def kernel_matrix(self) -> jax.Array:
    return self.cost_matrix

  @property
  def mean_cost_matrix(self) -> jax.Array:
    """Mean of |x_i − y_j|² over all pairs: mean|x|² + mean|y|² − 2 mean(x)·mean(y)."""
    squares = jnp.sum(self.x**2, 1).mean() + jnp.sum(self.y**2, 1).mean()
    return squares - 2 * jnp.dot(
      self.x.mean(0),
      self.y.mean(0),
      precision="highest",
    )

  def apply_lse_kernel(self, f, g, eps, vec=None, axis=0):
    """ε log |Σ_j v_j exp(t_ij)| − f_i for axis 1, the same over i for axis 0, and the sum's sign;
    see ott.

    Args: f [n], g [m]; eps: scalar; vec: weights [m] (axis 1) or [n] (axis 0), None for ones.
    Returns: ([n] or [m], sign of that shape; ones of shape [1] without vec, as ott has it).
    """
    x, y, rows, columns = (
      (self.x, self.y, f, g) if axis == 1 else (self.y, self.x, g, f)
    )
    shift = jnp.where(jnp.isfinite(rows), rows, 0.0)
    log_sum, sign = soft_min.log_sum_exp(x, y, shift, columns, eps, vec, self.tile)
    return eps * log_sum - shift, (jnp.ones(1, x.dtype) if vec is None else sign)

  def apply_cost(self, arr, axis=0, fn=None, is_linear=False):
    """C v (axis 1) or Cᵀ v (axis 0) in closed form, [n] or [n, p]; fn must be None."""
    if fn is not None:
      raise TypeError(
        "Blockwise applies the cost itself, not a function of it: pass fn=None."
      )
    x, y = (self.x, self.y) if axis == 1 else (self.y, self.x)
    v = arr[:, None] if arr.ndim == 1 else arr
    dot = lambda a, b: jnp.matmul(a, b, precision="highest")
    out = jnp.sum(x**2, 1, keepdims=True) * v.sum(0, keepdims=True) + dot(
      jnp.sum(y**2, 1)[None], v
    )
    out = out - 2 * dot(x, dot(y.T, v))
    return out[:, 0] if arr.ndim == 1 else out

  def tree_flatten(self):
    return (self.x, self.y, self._epsilon_init), {"tile": self.tile}

  @classmethod
  def tree_unflatten(cls, aux_data, children):
    return cls(*children, **aux_data)
