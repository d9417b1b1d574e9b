"""What a training run carries from step to step, and nothing else: all of it is in every
checkpoint.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from clu import metrics

from downscaling.runtime import mesh as meshes

WATCHED = ("loss", "grad_norm")


@flax.struct.dataclass
class TrainState:
  """The state after `step` updates; the data position is the step itself.

  step: [] int32. key: of the run; a step draws from fold_in(key, step). params: tree. ema: one tree
    a decay.
  opt_state: of the optax chain. window: {name: running mean since the last log}. bad_step: []
  int32, the first step since then whose loss or gradient was not finite, 0 for none.
  """

  step: jax.Array
  key: jax.Array
  params: Any
  ema: tuple[Any, ...]
  opt_state: Any
  window: dict[str, metrics.Average]
  bad_step: jax.Array


def learning_rate(
  *, peak: float, end: float, warmup_steps: int, total_steps: int
) -> optax.Schedule:
  """Linear warm-up to `peak`, then cosine to `end` at total_steps."""
  if not 0 <= warmup_steps < total_steps:
    raise ValueError(
      f"config.optimizer.warmup_steps={warmup_steps} must lie in [0, total_steps={total_steps})."
    )
  return optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, total_steps, end)


def optimizer(rate: optax.Schedule, clip: float) -> optax.GradientTransformation:
  """Adam under clipping by the global norm."""
  return optax.chain(optax.clip_by_global_norm(clip), optax.adam(rate))


def initial(
  denoiser: nn.Module,
  tx: optax.GradientTransformation,
  space,
  channels: int,
  averages: int,
  key: jax.Array,
  run_key,
) -> TrainState:
  """The state at step 0, from the init key and the run's key; call under jit with out_shardings: no
  host copy.
  """
  params = denoiser.init(
    key,
    jnp.zeros((1, *space, channels)),
    jnp.ones(1),
  )["params"]
  ema = tuple(jax.tree.map(jnp.copy, params) for _ in range(averages))
  window = {name: empty() for name in WATCHED}
  zero = jnp.zeros((), jnp.int32)
  return TrainState(zero, run_key, params, ema, tx.init(params), window, zero)


def empty() -> metrics.Average:
  """A running mean of nothing, in arrays of fixed dtype."""
  zero = jnp.zeros((), jnp.float32)
  # clu's dataclass has these fields, which its types do not tell.
  return metrics.Average(total=zero, count=zero)  # pyright: ignore[reportCallIssue]


def make(
  mesh: jax.sharding.Mesh, initialise: Callable, *keys
) -> tuple[Callable, Any, Any]:
  """(jitted initialise whose state is born sharded, abstract state with shardings, its
  PartitionSpecs).
  """
  shapes = jax.eval_shape(initialise, *keys)
  specs = meshes.state_specs(mesh, shapes)
  under = meshes.shardings(mesh, specs)
  target = jax.tree.map(
    lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
    shapes,
    under,
  )
  return jax.jit(initialise, out_shardings=under), target, specs


def count(params: Any) -> int:
  """Number of parameters."""
  return sum(math.prod(p.shape) for p in jax.tree.leaves(params))
