"""A made-up equation of two variables on a strip: x is periodic, y has two ends, of unlike lengths.

Waves of a Gaussian law travel along x; along y they are cosines. Salinity goes with temperature.
The coarse world is warmer, and its small scales are too weak. Run as the command, with this
equation known to it:   python tests/strip.py JOB --config=... --workdir=...
"""

import dataclasses
import math
import types
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from downscaling.fields import domain as domains
from downscaling.fields import grid_symmetry

LENGTH, WIDTH = 24.0, 16.0  # of x and y
WAVES = 5  # along x, and cosines along y beside the mean
CHANNELS = (
  domains.Channel("temperature", "degC", weight=2.0),
  domains.Channel("salinity", "g kg-1"),
)


def strip(y, points):
  """The domain of coordinates y [n] and so many points of x."""
  x = domains.Axis("x", np.arange(points) * LENGTH / points, "km", periodic=True)
  along_x = grid_symmetry.shift(axis=1, rank=2)
  return domains.Domain(
    (domains.Axis("y", y, "km"), x), CHANNELS, symmetries=(along_x,)
  )


def law():
  """Standard deviation of every wave, [WAVES + 1, WAVES]; none is constant along x."""
  ky, kx = (
    np.arange(WAVES + 1)[:, None] / 2 / WIDTH,
    np.arange(1, WAVES + 1)[None] / LENGTH,
  )
  return 0.5 * np.exp(-6 * np.hypot(ky, kx))


@dataclasses.dataclass(frozen=True)
class World:
  """What both worlds share: travelling waves, synthesised at the points of the domain."""

  points: int = 24
  dt: float = 0.5
  warmer: float = 0.0
  weaker: float = 0.0
  bound: ClassVar[float] = math.inf
  dtype: ClassVar[str] = "float32"
  length: ClassVar[float] = LENGTH
  shared: ClassVar[dict] = {}

  @property
  def domain(self):
    return strip(self.y, self.points)

  def start(self, key):
    """Complex amplitudes as pairs of numbers, [2, WAVES + 1, WAVES, 2]."""
    scale = jnp.asarray(law()[None, ..., None], jnp.float32)
    return scale * jax.random.normal(key, (2, WAVES + 1, WAVES, 2))

  def advance(self, u, steps):
    turned = 0.3 * self.dt * steps * jnp.arange(1, WAVES + 1, dtype=u.dtype)[None, None]
    real, imaginary = u[..., 0], u[..., 1]
    cos, sin = jnp.cos(turned), jnp.sin(turned)
    return jnp.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1)

  def output(self, u):
    fine = np.arange(1, WAVES + 1)
    damping = np.exp(-self.weaker * fine)[None, None]
    phase = 2 * np.pi * np.outer(fine, np.arange(self.points)) / self.points
    along_y = np.cos(np.pi * np.outer(np.arange(WAVES + 1), self.y) / WIDTH)
    waves = u * jnp.asarray(damping[..., None], u.dtype)
    parts = [
      jnp.einsum("cba,by,ax->cyx", waves[..., i], along_y, wave)
      for i, wave in enumerate((np.cos(phase), np.sin(phase)))
    ]
    first, second = parts[0] + parts[1]
    temperature = 10 + self.warmer + 2 * first
    salinity = 35 + 0.3 * (0.8 * first + 0.6 * second)
    return jnp.stack([temperature, salinity], -1).astype(jnp.float32)

  @property
  def symmetries(self):
    return self.points

  def move(self, u, element):
    return jnp.roll(u, element, axis=-1)

  def static(self):
    return {}

  def group(self):
    return self.domain.group()


@dataclasses.dataclass(frozen=True)
class Fine(World):
  stream: ClassVar[int] = 90
  block: ClassVar[str] = "fine"

  @property
  def y(self):
    points = self.points * 2 // 3
    return (np.arange(points) + 0.5) * WIDTH / points


@dataclasses.dataclass(frozen=True)
class Coarse(World):
  points: int = 6
  warmer: float = 1.0
  weaker: float = 0.2
  stream: ClassVar[int] = 91
  block: ClassVar[str] = "coarse"

  @property
  def y(self):
    """Every fourth point of the fine world."""
    return Fine(points=4 * self.points).y[::4]


EQUATION = types.SimpleNamespace(
  NAME="strip", RANK=2, SYMBOL="u", Fine=Fine, Coarse=Coarse, quadratic=None
)


def use():
  """Makes the equation known."""
  from downscaling import experiment

  experiment.EQUATIONS["strip"] = EQUATION


if __name__ == "__main__":
  from downscaling import main

  use()
  main.run()
