"""The jitted parts of training: loss, one update, validation. Sharded by hand where the partitioner
would gather.

  loss = E[(σ²+1)/σ² · |D(x₀ + σn, σ) − x₀|²], unit data variance (Karras et al. 2022,
  arXiv:2206.00364, eq. 2 and 8)

The noise of step t is one draw for the global batch from fold_in(key, t): the same on any number of
devices. Every device differentiates its own rows under jax.shard_map (XLA would gather the batch
before every FFT), so all communication stands below: one all-gather and one reduce-scatter of each
parameter that fsdp splits, one reduction of the gradients over the rest.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from downscaling.diffusion import train_state
from downscaling.fields import symmetry
from downscaling.runtime import mesh as meshes


def denoising_error(
  denoiser: nn.Module, params, x: jax.Array, sigma: jax.Array, noise: jax.Array
) -> jax.Array:
  """Weighted squared error of every sample, [B]; x and noise are [B, *space, C] of unit variance,
  sigma is [B].
  """
  s = sigma.reshape(-1, *(1,) * (x.ndim - 1))
  denoised = jnp.asarray(denoiser.apply({"params": params}, x + s * noise, sigma))
  error = jnp.mean(
    (denoised - x) ** 2,
    axis=tuple(range(1, x.ndim)),
  )
  return (sigma**2 + 1) / sigma**2 * error


def whole(params: Any, specs: Any) -> Any:
  """Inside shard_map: this device's shards -> whole parameters, by all-gather over fsdp.

  Its transpose scatters.
  """

  def gather(p, spec):
    return (
      jax.lax.all_gather(
        p,
        meshes.FSDP,
        axis=spec.index(meshes.FSDP),
        tiled=True,
      )
      if any(spec)
      else p
    )

  return jax.tree.map(gather, params, specs)


def make_gradient(
  denoiser: nn.Module, mesh: jax.sharding.Mesh, specs: Any, microbatches: int = 1
) -> Callable:
  """(params, x, sigma, noise) -> (mean loss, gradient sharded as params), reduced once over all
  devices.

  microbatches: each device's rows are done in so many parts, one after the other, whose gradients
    are added: memory of activations falls in proportion; the result is that of one part up to the
    order of sums.
  """

  def summed(params, *rows):
    """Sum over the rows of this device."""
    loss = lambda p, *r: denoising_error(denoiser, p, *r).sum()
    if microbatches == 1:
      return jax.value_and_grad(loss)(params, *rows)
    parts = [r.reshape(microbatches, -1, *r.shape[1:]) for r in rows]

    def add(total, part):
      return jax.tree.map(
        jnp.add,
        total,
        jax.value_and_grad(loss)(params, *part),
      ), None

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(add, zero, parts)[0]

  def local(params, *rows):
    full, scatter = jax.vjp(lambda p: whole(p, specs), params)
    loss, grads = summed(full, *rows)
    (grads,) = scatter(grads)
    flat, tree = jax.tree.flatten(grads)
    split = [
      any(s)
      for s in jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, PartitionSpec))
    ]
    over = lambda axes, leaves: jax.lax.psum(leaves, axes) if leaves else []
    mine = [g for g, s in zip(flat, split, strict=True) if s]
    if mesh.shape[meshes.DATA] > 1:
      mine = over((meshes.DATA,), mine)
    loss, *shared = over(
      meshes.AXES,
      [
        loss,
        *(g for g, s in zip(flat, split, strict=True) if not s),
      ],
    )
    mine, shared, batch = iter(mine), iter(shared), len(rows[0]) * mesh.size
    flat = [next(mine if s else shared) / batch for s in split]
    return loss / batch, jax.tree.unflatten(tree, flat)

  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(specs, *(meshes.ROWS,) * 3),
    out_specs=(PartitionSpec(), specs),
    # What is replicated after these reductions is known to us, not to the checker.
    check_vma=False,
  )


def _anywhere(moves: symmetry.Moves, mesh: jax.sharding.Mesh) -> Callable:
  """(key, x [B, *space, C]) -> every row moved by an element of its own; each device moves its own
  rows.
  """
  rows = (meshes.ROWS, meshes.ROWS)
  move = jax.shard_map(
    jax.vmap(moves.move),
    mesh=mesh,
    in_specs=rows,
    out_specs=meshes.ROWS,
    check_vma=False,
  )
  return lambda key, x: move(
    x,
    jax.random.randint(key, (len(x),), 0, moves.count),
  )


def make_train_step(
  denoiser: nn.Module,
  tx: optax.GradientTransformation,
  draw_sigma: Callable,
  ema_decays: tuple[float, ...],
  mesh: jax.sharding.Mesh,
  specs: Any,
  *,
  rate: optax.Schedule = lambda step: jnp.nan,
  log_every: int = 1,
  microbatches: int = 1,
  moves: symmetry.Moves | None = None,
) -> Callable[
  [train_state.TrainState, Mapping[str, jax.Array]],
  tuple[train_state.TrainState, dict[str, jax.Array]],
]:
  """Pure (state, {"x": [B, *space, C]}) -> (state, scalar logs); jit it with the state's shardings.

  Args:
    draw_sigma: (key, B) -> [B] noise levels.
    ema_decays: of each parameter average, reached after a warm-up: min(decay, (1 + step) / (10 +
      step)).
    specs: PartitionSpecs of the parameters.
    rate: learning rate by step, for the logs.
    log_every: the logs are means since the last step that it divides.
    microbatches: see make_gradient.
    moves: on [*space, C], of a group that leaves the law alone: a row is moved by an element drawn
      anew in each step.
  """
  moved = moves and _anywhere(moves, mesh)
  gradient = make_gradient(denoiser, mesh, specs, microbatches)
  rows = meshes.rows(mesh)

  def train_step(state, batch):
    x = jax.lax.with_sharding_constraint(batch["x"], rows)
    key = jax.random.fold_in(state.key, state.step)
    level_key, noise_key = jax.random.split(key)
    x = moved(jax.random.fold_in(key, 2), x) if moved else x
    noise = jax.lax.with_sharding_constraint(
      jax.random.normal(noise_key, x.shape, x.dtype), rows
    )
    loss, grads = gradient(
      state.params,
      x,
      draw_sigma(level_key, x.shape[0]),
      noise,
    )
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)

    def averaged(ema, decay):
      decay = jnp.minimum(decay, (1 + state.step) / (10 + state.step))
      return jax.tree.map(
        lambda e, p: e + (1 - decay) * (p - e),
        ema,
        params,
      )

    seen = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    fresh = state.step % log_every == 0
    window = jax.tree.map(
      lambda w: jnp.where(fresh, jnp.zeros_like(w), w), state.window
    )
    window = {
      k: w.replace(total=w.total + seen[k], count=w.count + 1)
      for k, w in window.items()
    }
    bad = jnp.where(fresh, 0, state.bad_step)
    good = jnp.isfinite(loss) & jnp.isfinite(seen["grad_norm"])
    bad = jnp.where((bad == 0) & ~good, state.step + 1, bad)
    logs = {k: w.compute() for k, w in window.items()} | {
      "learning_rate": rate(state.step),
      "bad_step": bad,
    }
    ema = tuple(averaged(e, d) for e, d in zip(state.ema, ema_decays, strict=True))
    return train_state.TrainState(
      state.step + 1, state.key, params, ema, opt_state, window, bad
    ), logs

  return train_step


def make_validation(
  denoiser: nn.Module,
  mesh: jax.sharding.Mesh,
  specs: Any,
  x: jax.Array,
  sigmas: tuple[float, ...],
  key: jax.Array,
) -> Callable:
  """Evaluator of the (first) averaged parameters: weighted denoising error at each of `sigmas` on
  held-out fields x.

  x: [V, *space, C], global, over mesh.rows.
  """

  def local(ema, x, *noises):
    ema = whole(ema, specs)
    at = lambda s, noise: denoising_error(
      denoiser, ema, x, jnp.full(len(x), s), noise
    ).sum()
    return jax.lax.psum(
      jnp.stack([at(s, n) for s, n in zip(sigmas, noises, strict=True)]), meshes.AXES
    )

  many = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(specs, *(meshes.ROWS,) * (1 + len(sigmas))),
    out_specs=PartitionSpec(),
    check_vma=False,
  )

  @jax.jit
  def errors(ema, x):
    draw = lambda i: jax.random.normal(
      jax.random.fold_in(key, i),
      x.shape,
      x.dtype,
    )
    noises = [
      jax.lax.with_sharding_constraint(draw(i), meshes.rows(mesh))
      for i in range(len(sigmas))
    ]
    return many(ema, x, *noises) / len(x)

  def evaluate(state: train_state.TrainState) -> dict[str, float]:
    values = [float(v) for v in jax.device_get(errors(state.ema[0], x))]
    return {f"error_at_sigma_{s:g}": v for s, v in zip(sigmas, values, strict=True)} | {
      "error": sum(values) / len(values)
    }

  return evaluate
