"""The symmetries of Kolmogorov flow that a grid keeps: shifts, shift-reflects and the half turn."""

import jax
import jax.numpy as jnp
import numpy as np

from downscaling.fields import symmetry


def check_glide(points: int, wave: int, what: str) -> None:
  """Raises ValueError unless the glide moves a grid of `points` onto itself; what: to set."""
  if points % (2 * wave):
    fits = -(-max(points, 1) // (2 * wave)) * 2 * wave
    raise ValueError(
      f"A grid of {points} points does not keep the symmetry of a forcing sin {wave}y: its glide "
      f"moves y by a {2 * wave}th of the box. Use a multiple of {2 * wave} points, e.g. {fits} "
      f"({what})."
    )


def _sources(points: int, element, wave: int, xp):
  """Row [n] and column [n] each value comes from, and its sign, for one element of `group`."""
  check_glide(
    points, wave, "of the coarse fields config.grid.points over config.grid.factor"
  )
  shift, glide, turn = (
    element % points,
    element // points % (2 * wave),
    element // (2 * wave * points),
  )
  i, sign, way = xp.arange(points), 1 - 2 * (glide % 2), 1 - 2 * turn
  return (
    (way * i + glide * (points // (2 * wave))) % points,
    (sign * way * (i + shift)) % points,
    sign,
  )


def move(
  vorticity: jax.Array,
  element: int | jax.Array,
  wave: int = 4,
) -> jax.Array:
  """g·ω for one element of `group`, by index, on a grid of any multiple of 2·wave points; ω is
  [..., n, n].

  It needs no table, so it serves augmentation at 256². The element may be traced.
  """
  rows, columns, sign = _sources(vorticity.shape[-1], element, wave, jnp)
  moved = jnp.take(
    jnp.take(vorticity, rows, axis=-2),
    columns,
    axis=-1,
  )
  return jnp.asarray(sign, vorticity.dtype) * moved


def group(points: int = 32, wave: int = 4) -> symmetry.Group:
  """The flow's symmetries that a grid of points² keeps, on fields flattened row by row;
  4·wave·points elements:

      shifts           (x, y) -> (x + s h, y)          h = 2π/points, s = 0 ... points − 1
      shift-reflects   (x, y) -> (−x, y + π/wave)      ω -> −ω; 2·wave times is the identity
      half turn        (x, y) -> (−x, −y)

  Element (turn·2·wave + glide)·points + shift is (g·ω)[j, i] = ± ω[±j + glide·points/(2·wave), ±(i
  + shift)]. The identity comes first. All conserve the forcing sin(wave·y). At 32² the table has
  512 elements, 4 MB; for larger grids see `move`.
  Raises: ValueError unless 2·wave divides points.
  """
  size = 4 * wave * points
  index, signs = np.empty((size, points**2), np.int64), np.empty(size)
  for element in range(size):
    rows, columns, signs[element] = _sources(points, element, wave, np)
    index[element] = (rows[:, None] * points + columns[None]).ravel()
  return symmetry.Group(index, signs)
