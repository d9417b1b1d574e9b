"""Trajectories of any solver, by id: initial condition, burn-in, snapshots; sharded over the
leading axis.

A trajectory is (seed, stream, id) and nothing else: its numbers do not depend on which others share
the batch, on their order, or on the devices.
"""

import fractions
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from downscaling.equations.protocol import Solver
from downscaling.runtime import random_keys


def rollout(
  solver: Solver,
  ids: jax.Array | np.ndarray,
  *,
  seed: int = 0,
  burn_in: float = 25.0,
  spacing: float = 12.5,
  snapshots: int = 1,
  sharding: jax.sharding.NamedSharding | None = None,
) -> jax.Array:
  """Snapshots of the trajectories `ids`, at times burn_in + j·spacing, j = 0 ... snapshots − 1.

  One compilation for each (solver, times, len(ids)). States between snapshots are never stored.
  Within `with jax.enable_x64(True)` the result is float64.

  Args:
    solver: a Solver.
    ids: [T] integers in [0, 2³²): key = fold_in(simulation_key(seed, solver.stream), id).
    seed: of the data set.
    burn_in, spacing: times, in units of the equation; whole multiples of solver.dt.
    snapshots: how many, ≥ 1.
    sharding: of ids and of the result, leading axis over one mesh axis (mesh.rows). Its devices
      then work alone, with no communication (XLA's own partitioner would gather the batch before
      every FFT). None: one device.
  Returns: [T, snapshots, *space_out].
  Raises: ValueError for times that are no multiple of dt, for ids of another kind, or a T that does
    not divide.
  """
  first, between = step_counts(solver.dt, burn_in, spacing)
  if ids.ndim != 1 or not jnp.issubdtype(ids.dtype, jnp.integer):
    raise ValueError(
      f"ids are {ids.dtype}{list(ids.shape)}, need integers [T], one a trajectory: jnp.arange(T)."
    )
  if snapshots < 1:
    raise ValueError(
      f"snapshots={snapshots}: nothing would be kept. Ask for 1 or more."
    )
  shards = 1 if sharding is None else sharding.num_devices
  if len(ids) % shards:
    fits = -(-len(ids) // shards) * shards
    raise ValueError(
      f"{len(ids)} trajectories over {shards} devices: each integrates as many. Pad ids to {fits}."
    )
  return _compiled(solver, first, between, snapshots, sharding)(np.uint32(seed), ids)


@functools.lru_cache(maxsize=32)
def _compiled(solver, first, between, snapshots, sharding):
  def one(seed, trajectory):
    key = jax.random.fold_in(
      random_keys.simulation_key(seed, solver.stream), trajectory
    )
    u = solver.advance(solver.start(key), first)

    def snapshot(u, _):
      return solver.advance(u, between), solver.output(u)

    u, kept = jax.lax.scan(
      snapshot, u, length=snapshots - 1
    )  # the last one is not advanced further
    return jnp.concatenate([kept, solver.output(u)[None]])

  many = jax.vmap(one, in_axes=(None, 0))
  if sharding is None:
    return jax.jit(many)
  alone = jax.sharding.PartitionSpec()
  many = jax.shard_map(
    many, mesh=sharding.mesh, in_specs=(alone, sharding.spec), out_specs=sharding.spec
  )
  return jax.jit(
    many,
    in_shardings=(jax.sharding.NamedSharding(sharding.mesh, alone), sharding),
    out_shardings=sharding,
  )


def step_counts(dt: float, burn_in: float, spacing: float) -> tuple[int, int]:
  """Steps of dt in burn_in and in spacing.

  Raises: ValueError unless both are whole; it names the nearest dt for which they are.
  """
  if not (dt > 0 and burn_in >= 0 and spacing > 0):
    raise ValueError(
      f"dt={dt}, burn_in={burn_in}, spacing={spacing}: need dt > 0, burn_in >= 0 and spacing > 0."
    )
  counts = [round(time / dt) for time in (burn_in, spacing)]
  # 1e-6 of a step: far above the rounding of decimal times, far below any slip of a person
  if counts[1] < 1 or any(
    abs(time / dt - n) > 1e-6
    for time, n in zip((burn_in, spacing), counts, strict=True)
  ):
    unit = _common_divisor(burn_in, spacing)
    ratio = max(int(unit / dt), 1)
    nearest = min(
      unit / ratio,
      unit / (ratio + 1),
      key=lambda fit: abs(fit - dt),
    )
    raise ValueError(
      f"dt={dt} does not divide burn_in={burn_in} and spacing={spacing} into whole steps, so "
      f"snapshots would drift off their times. The nearest dt that does is {nearest:.12g}."
    )
  return counts[0], counts[1]


def _common_divisor(burn_in: float, spacing: float) -> float:
  """The largest time that divides both into whole numbers."""
  a, b = (
    fractions.Fraction(time).limit_denominator(10**6) for time in (burn_in, spacing)
  )
  common = math.lcm(a.denominator, b.denominator)
  return math.gcd(int(a * common), int(b * common)) / common


def check_finite(
  u: jax.Array | np.ndarray,
  ids: np.ndarray,
  times: np.ndarray,
) -> None:
  """Raises FloatingPointError, naming trajectory and time, where u [T, S, *space] holds a NaN or an
  infinity.

  Args:
    u: snapshots on this host. ids: [T]. times: [S], of the snapshots.
  """
  u = np.asarray(u)
  whole = np.isfinite(u).reshape(*u.shape[:2], -1).all(axis=2)
  bad = np.asarray(~whole)  # [T, S]
  if not bad.any():
    return
  when = int(bad.any(0).argmax())
  row = int(bad[:, when].argmax())  # of the first that went
  raise FloatingPointError(
    f"trajectory {int(np.asarray(ids)[row])} is not finite at t = "
    f"{float(np.asarray(times)[when]):g} (so ended {int(bad.any(axis=1).sum())} of {len(u)} in "
    "this block): the solver blew up. Set a smaller dt (--config.coarse.dt or --config.fine.dt, "
    "whichever was running)."
  )


def check(
  solver: Solver, u: jax.Array | np.ndarray, ids: np.ndarray, times: np.ndarray
) -> None:
  """Raises FloatingPointError, naming trajectory and time, where u [T, S, *space] cannot be a
  solution.

  That is where it is not finite, or where √⟨u²⟩ over a snapshot exceeds solver.bound: a run that is
  blowing up passes through absurd values before it ends in NaN, and one of them may be the last
  that is kept.

  Args: as of `check_finite`, and the solver that made u.
  """
  u = np.asarray(u)
  flat = u.reshape(*u.shape[:2], -1)
  with np.errstate(
    over="ignore", invalid="ignore"
  ):  # a trajectory at a time: float64 of a whole block is large
    # [T, S]
    size = np.sqrt(
      [
        np.mean(
          np.square(x, dtype=np.float64),
          axis=1,
        )
        for x in flat
      ]
    )
  bad = ~(size <= solver.bound)  # NaN is neither below nor above
  if not bad.any():
    return
  when = int(bad.any(0).argmax())
  row = int(bad[:, when].argmax())
  if not np.isfinite(u[row, when]).all():
    check_finite(u, ids, times)
  raise FloatingPointError(
    f"trajectory {int(np.asarray(ids)[row])} has an rms of {size[row, when]:.3g} at t = "
    f"{float(np.asarray(times)[when]):g}, where no solution has more than {solver.bound:.3g} (so "
    f"ended {int(bad.any(axis=1).sum())} of {len(u)} in this block): the solver is blowing up. Set "
    f"a smaller dt, e.g. --config.{solver.block}.dt={solver.dt / 2:g}"
  )
