"""Random keys by purpose: every key that is made from a seed is made here.

Two uses of one seed must not share a key. In jax this is easy to get wrong: `fold_in(key, i)`
equals `split(key)[i]`, so an ensemble member and a training step could draw the same numbers. So
each use has its own tag, which is folded into the seed's key first. The generator is fixed, so
jax's flags cannot change what is drawn.
"""

import zlib

import jax

GENERATOR = "threefry2x32"
PURPOSES = (
  *(
    "training",
    "error table",
    "watching",
    "ensemble",
    "filters",
    "network",
    "plans",
    "benchmark",
  ),
  "classifier",
)
# What stands in a stage's identity: results drawn by other keys are other results.
IDENTITY = f"{GENERATOR}, tagged by purpose"


def key(seed: int | jax.Array, purpose: str) -> jax.Array:
  """The typed key [] of one use of a seed.

  Args:
    seed: config.seed.
    purpose: one of PURPOSES.
  Raises: ValueError for another purpose; a new use is added to the list, under a name of its own.
  """
  if purpose not in PURPOSES:
    raise ValueError(
      f"purpose {purpose!r} is unknown: use one of {PURPOSES}, or add a new one there."
    )
  tag = zlib.crc32(purpose.encode())
  return jax.random.fold_in(jax.random.key(seed, impl=GENERATOR), tag)


# What a member of an ensemble draws beside the noise of its steps 0, 1, ...
STREAMS = ("start", "posterior", "selection", "observation error")


def stream(name: str) -> int:
  """What to fold into a member's key for a draw of STREAMS: numbers that no step reaches.

  A draw that needs more than one number folds again, and never draws from the key that it folds.
  Raises: ValueError for another name.
  """
  return 2**31 - 1 - STREAMS.index(name)


def simulation_key(seed: int | jax.Array, stream: int) -> jax.Array:
  """The typed key [] of one simulated world; its trajectories fold their ids in.

  Apart from `key`, whose tags are words of 32 bits, because streams are small numbers. Data of
  earlier versions have the same bits.
  """
  return jax.random.fold_in(jax.random.key(seed, impl=GENERATOR), stream)
