"""Denoising score matching: loss, state, one step, `fit`, and the `train` job.

  loss = E[(σ²+1)/σ² · |D(x₀ + σn, σ) − x₀|²], unit data variance (Karras et al. 2022, arXiv:2206.00364, eq. 2 and 8)

The noise of row r at step t is drawn from fold_in(key, t): a resumed run replays it, on any number of devices.
"""

import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from downscaling.common import checkpoints as ckpt
from downscaling.common import mesh as meshes
from downscaling.common import runs


@flax.struct.dataclass
class TrainState:
  """step: [] int32, finished updates. params, ema: trees. opt_state: of the optax chain."""

  step: jax.Array
  params: Any
  ema: Any
  opt_state: Any


def optimizer(
  *, peak: float, end: float, warmup_steps: int, total_steps: int, clip: float
) -> optax.GradientTransformation:
  """Adam under clipping by the global norm, linear warm-up to `peak`, cosine to `end` at total_steps."""
  if not 0 <= warmup_steps < total_steps:
    raise ValueError(f"config.optimizer.warmup_steps={warmup_steps} must lie in [0, total_steps={total_steps}).")
  rate = optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, total_steps, end)
  return optax.chain(optax.clip_by_global_norm(clip), optax.adam(rate))


def init_state(
  denoiser: nn.Module, tx: optax.GradientTransformation, space, channels: int, key: jax.Array
) -> TrainState:
  """State at step 0; call under jit with out_shardings, so that no host copy is made."""
  x = jnp.zeros((1, *space, channels))
  params = denoiser.init(key, x, jnp.ones(1))["params"]
  return TrainState(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), tx.init(params))


def denoising_error(denoiser: nn.Module, params, x: jax.Array, sigma: jax.Array, key: jax.Array) -> jax.Array:
  """Weighted squared error of every sample, [B]; x is [B, *space, C] with unit variance, sigma is [B]."""
  s = sigma.reshape(-1, *(1,) * (x.ndim - 1))
  noise = jax.random.normal(key, x.shape, x.dtype)
  denoised = denoiser.apply({"params": params}, x + s * noise, sigma)
  error = jnp.mean((denoised - x) ** 2, axis=tuple(range(1, x.ndim)))
  return (sigma**2 + 1) / sigma**2 * error


def make_train_step(
  denoiser: nn.Module, tx: optax.GradientTransformation, draw_sigma: Callable, ema_decay: float
) -> Callable[[TrainState, Mapping[str, jax.Array], jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
  """Pure (state, {"x": [B, *space, C]}, key) -> (state, scalar logs).

  Args:
    draw_sigma: (key, B) -> [B] noise levels.
    ema_decay: of the parameter average, reached after a warm-up: min(decay, (1 + step) / (10 + step)).
  """

  def train_step(state, batch, key):
    level_key, noise_key = jax.random.split(jax.random.fold_in(key, state.step))
    x = batch["x"]
    sigma = draw_sigma(level_key, x.shape[0])
    loss, grads = jax.value_and_grad(lambda p: denoising_error(denoiser, p, x, sigma, noise_key).mean())(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
    ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema, params)
    logs = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    return TrainState(state.step + 1, params, ema, opt_state), logs

  return train_step


def fit(
  *,
  state: TrainState,
  batches: Iterator[Mapping[str, jax.Array]],
  train_step: Callable,
  total_steps: int,
  log_every: int,
  eval_every: int,
  save_every: int,
  key: jax.Array,
  evaluators: Mapping[str, Callable[[TrainState], Mapping[str, float]]],
  saver: ckpt.Checkpoints,
  writer: runs.MetricWriter,
  progress: runs.Progress,
  stop: Callable[[], bool],
) -> TrainState:
  """Trains to total_steps, resuming after state.step; returns the last state.

  Args:
    state: on devices, donated.
    batches: global batches, the first belonging to step state.step.
    train_step: see make_train_step.
    log_every, eval_every, save_every: in steps; the last step does all three.
    evaluators: {name: state -> {metric: value}}.
    saver, writer, progress: see common/.
    stop: polled after every step; once true the state is saved and runs.Interrupted raised.
  Raises: FloatingPointError if the loss or the gradient norm of any step is not finite; nothing is saved then.
  """
  step_fn = jax.jit(train_step, donate_argnums=0)
  window, said = [], time.monotonic()
  for step in range(int(state.step) + 1, total_steps + 1):
    with jax.profiler.StepTraceAnnotation("train", step_num=step):
      state, logs = step_fn(state, next(batches), key)
    window.append(logs)
    asked = stop()
    save = runs.is_time(save_every, step, total_steps)
    if runs.is_time(log_every, step, total_steps) or save or asked:
      means = _flush(window, step, saver)
      rate = len(window) / (time.monotonic() - said)
      window, said = [], time.monotonic()
      writer.write_scalars(step, means | {"steps_per_second": rate})
      progress.advance(step - progress.done, loss=means["loss"])
    if runs.is_time(eval_every, step, total_steps):
      for name, evaluate in evaluators.items():
        writer.write_scalars(step, {f"{name}/{k}": v for k, v in evaluate(state).items()})
    if save or asked:
      saver.save(step, state)
    if asked and step < total_steps:
      saver.wait()
      raise runs.Interrupted(f"train stopped at step {step} of {total_steps}, which is saved")
  saver.wait()
  return state


def _flush(window: list, step: int, saver: ckpt.Checkpoints) -> dict[str, float]:
  """Means over the steps since the last call; the only place where the loop waits for the device."""
  host = jax.device_get(window)
  for offset, logs in enumerate(host):
    if bad := sorted(k for k, v in logs.items() if not math.isfinite(v)):
      last = saver.steps()[-1] if saver.steps() else None
      raise FloatingPointError(
        f"{' and '.join(bad)} not finite at step {step - len(host) + 1 + offset}, in the window "
        f"({step - len(host)}, {step}]. The last good checkpoint is {f'step {last}' if last else 'none'} and stays. "
        "Lower --config.optimizer.peak in another --workdir; --config.data.dir=... spares the simulation."
      )
  return {k: float(sum(float(logs[k]) for logs in host) / len(host)) for k in host[0]}


def make_validation(denoiser: nn.Module, x: jax.Array, sigmas: tuple[float, ...], key: jax.Array) -> Callable:
  """Evaluator of the averaged parameters: weighted denoising error at each of `sigmas` on held-out fields x."""

  @jax.jit
  def errors(ema, x):
    at = lambda i, s: denoising_error(denoiser, ema, x, jnp.full(len(x), s), jax.random.fold_in(key, i)).mean()
    return [at(i, s) for i, s in enumerate(sigmas)]

  def evaluate(state: TrainState) -> dict[str, float]:
    values = jax.device_get(errors(state.ema, x))
    return {f"error_at_sigma_{s:g}": float(v) for s, v in zip(sigmas, values, strict=True)} | {
      "error": float(sum(values) / len(values))
    }

  return evaluate


def train(
  folder: pathlib.Path,
  config_hash: str,
  *,
  denoiser: nn.Module,
  tx: optax.GradientTransformation,
  draw_sigma: Callable,
  ema_decay: float,
  batches,
  validation: jax.Array,
  space: tuple[int, ...],
  channels: int,
  mesh: jax.sharding.Mesh,
  seed: int,
  total_steps: int,
  log_every: int,
  eval_every: int,
  save_every: int,
  config_text: str,
  stop: Callable[[], bool],
) -> dict:
  """The `train` job: restores the last good state, fits, writes the averaged parameters to folder/prior.

  Args:
    folder: of the stage. config_hash: goes with every checkpoint.
    batches: pipeline.Batches. validation: [V, *space, C], normalised.
    the rest: see fit.
  Returns: {"steps", "parameters", "error"}, the last being the validation error.
  """
  init_key, step_key, validation_key = jax.random.split(jax.random.key(seed), 3)
  initialise = lambda key: init_state(denoiser, tx, space, channels, key)
  saver = ckpt.Checkpoints(folder / "checkpoints", config_hash)
  target = ckpt.abstract(jax.eval_shape(initialise, init_key), meshes.replicated(mesh))
  if (found := saver.restore_last(target)) is not None:
    state = found[1]
    runs.say(f"train: going on from step {found[0]}")
  else:
    state = jax.jit(initialise, out_shardings=meshes.replicated(mesh))(init_key)
  first = int(state.step)
  validate = make_validation(denoiser, validation, (0.003, 0.03, 0.1, 0.3, 1.0, 3.0), validation_key)
  writer = runs.MetricWriter(folder)
  writer.write_text("config", f"```json\n{config_text}\n```")
  try:
    with runs.Progress("train", total_steps, "steps", done=first) as progress:
      state = fit(
        state=state,
        batches=batches.stream(mesh, first, total_steps),
        train_step=make_train_step(denoiser, tx, draw_sigma, ema_decay),
        total_steps=total_steps,
        log_every=log_every,
        eval_every=eval_every,
        save_every=save_every,
        key=step_key,
        evaluators={"validation": validate},
        saver=saver,
        writer=writer,
        progress=progress,
        stop=stop,
      )
    result = validate(state)
  finally:
    writer.close()
    saver.close()
  save_prior(folder, config_hash, state.ema)
  return {"steps": total_steps, "parameters": count(state.params), "error": result["error"]}


def count(params) -> int:
  """Number of parameters."""
  return sum(math.prod(p.shape) for p in jax.tree.leaves(params))


def save_prior(folder: pathlib.Path, config_hash: str, ema) -> None:
  """The averaged parameters alone, all that sampling needs."""
  prior = ckpt.Checkpoints(folder / "prior", config_hash, keep=1)
  prior.save(0, ema)
  prior.close()


def load_prior(folder: pathlib.Path, config_hash: str, denoiser: nn.Module, space, channels: int, mesh) -> Any:
  """Parameters for denoiser.apply. Raises FileNotFoundError if training has not finished, ValueError if damaged."""
  if not (folder / "prior").exists():
    raise FileNotFoundError(f"{folder} has no prior: run `downscaling train` with the same --config and --workdir.")
  shapes = jax.eval_shape(
    lambda key: denoiser.init(key, jnp.zeros((1, *space, channels)), jnp.ones(1))["params"], jax.random.key(0)
  )
  prior = ckpt.Checkpoints(folder / "prior", config_hash, keep=1)
  found = prior.restore_last(ckpt.abstract(shapes, meshes.replicated(mesh)))
  prior.close()
  if found is None:
    raise FileNotFoundError(f"{folder}/prior is empty: run `downscaling train` again; it goes on from its checkpoints.")
  return found[1]
