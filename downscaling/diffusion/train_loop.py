"""The `train` job: `fit`, the loop over steps, and what stands around it: restoring, watching, the
finished prior.
"""

import collections
import contextlib
import dataclasses
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from downscaling.diffusion import train_state
from downscaling.runtime import checkpoints as ckpt
from downscaling.runtime import (
  files,
  ledger,
  metric_writer,
  mirror,
  program_cost,
  progress,
  random_keys,
  supervision,
)
from downscaling.runtime import mesh as meshes
from downscaling.runtime.remote_paths import RemotePath

# steps that may be under way: enough to hide the host, few enough that batches do not pile up on
# the device
AHEAD = 4
SIGMAS = (0.003, 0.03, 0.1, 0.3, 1.0, 3.0)  # bins of the validation error


@dataclasses.dataclass(frozen=True)
class Plan:
  """When things happen, in steps; the last step logs, evaluates and saves.

  save_minutes: also save when so many have passed, at the next log; 0 for never.
  profile: {"start_step", "steps"} of a profiler trace; 0 steps for none.
  """

  total_steps: int
  log_every: int
  eval_every: int
  save_every: int
  save_minutes: float = 0.0
  profile: Mapping[str, int] = dataclasses.field(
    default_factory=lambda: {"start_step": 0, "steps": 0}
  )

  def is_time(self, what: str, step: int) -> bool:
    """what: "log", "eval" or "save"."""
    return progress.is_time(getattr(self, f"{what}_every"), step, self.total_steps)


def fit(
  *,
  state: train_state.TrainState,
  batches: Iterator[Mapping[str, jax.Array]],
  step_fn: Callable,
  plan: Plan,
  evaluators: Mapping[str, Callable[[train_state.TrainState], Mapping[str, Any]]],
  saver: ckpt.Checkpoints,
  watch: "Watch",
  stop: Callable[[], bool],
  agree: Callable[[Any], list] = lambda value: [value],
  evaluated: bool = True,
) -> train_state.TrainState:
  """Trains to plan.total_steps, resuming after state.step; returns the last state.

  Args:
    state: on devices, donated.
    batches: global batches, the first belonging to step state.step.
    step_fn: compiled (state, batch) -> (state, logs), which donates the state.
    evaluators: {name: state -> {metric: number or image}}.
    saver, watch: see runtime/checkpoints.py and Watch.
    stop: polled after every step and evaluator; once true the state is saved and
      supervision.Interrupted raised.
    agree: see Checkpoints.
    evaluated: False if a stop kept the evaluation of state.step from being done; it is done first.
  Raises: FloatingPointError if the loss or the gradient norm of any step is not finite; nothing is
    saved then.
  """
  under_way, pending, saved_at = collections.deque(), None, time.monotonic()

  def flush():
    nonlocal pending
    if pending is not None:
      watch.log(*pending, saver)
    pending = None

  for step in range(
    int(state.step) + (1 if evaluated else 0),
    plan.total_steps + 1,
  ):
    if step > int(plan.profile["start_step"]) > 0:
      watch.profile(step, plan.profile)
    if evaluated:
      batch = watch.waiting(batches)
      with jax.profiler.StepTraceAnnotation("train", step_num=step):
        state, logs = step_fn(state, batch)
      flush()  # of the step before: the device has work meanwhile
      under_way.append(logs)
      if len(under_way) > AHEAD:
        jax.block_until_ready(under_way.popleft())
      if plan.is_time("log", step):
        pending = (step, logs)
    asked, due, metrics = stop(), False, None
    if plan.save_minutes and plan.is_time("log", step):
      due = agree(time.monotonic() - saved_at > 60 * plan.save_minutes)[0]
    evaluate = not evaluated or plan.is_time("eval", step)
    if evaluate and not asked:
      flush()
      with watch.paused():
        found = {}
        for name, evaluator in evaluators.items():
          found |= {f"{name}/{k}": v for k, v in evaluator(state).items()}
          asked = stop()
          if asked:
            break
        else:
          metrics = watch.evaluated(step, found)
    if asked or due or plan.is_time("save", step) or (metrics and saver.keep.best):
      flush()
      if evaluated:
        watch.check(step, logs, saver)
      with watch.paused():
        saver.save(step, state, metrics, evaluated=not evaluate or metrics is not None)
      saved_at = time.monotonic()
    evaluated = True
    if asked and (step < plan.total_steps or (evaluate and metrics is None)):
      saver.wait()
      raise supervision.Interrupted(
        f"train stopped at step {step} of {plan.total_steps}, which is saved"
      )
  flush()
  saver.wait()
  return state


class Watch:
  """What a person watches: scalars, rates, one line of progress, a profile. Writes on the main
  process only.

  Args:
    writer: metric_writer.MetricWriter. progress: progress.Progress. folder: for the profile.
    batch: examples a step. flops: of a step over all devices. peak: FLOP/s of all devices, None if
      not known.
  """

  def __init__(
    self,
    writer,
    progress,
    folder: pathlib.Path,
    batch: int,
    flops: float,
    peak: float | None,
  ):
    self.writer, self.progress, self.folder = writer, progress, folder
    self.batch, self.flops, self.peak = batch, flops, peak
    self._said, self._from, self._waited, self._profiling = (
      time.monotonic(),
      progress.done,
      0.0,
      False,
    )

  def waiting(self, batches: Iterator) -> Any:
    """next(batches), on the clock."""
    began = time.monotonic()
    with ledger.spend("waiting for input"):
      batch = next(batches)
    self._waited += time.monotonic() - began
    return batch

  def check(
    self, step: int, logs: Mapping, saver: ckpt.Checkpoints
  ) -> dict[str, float]:
    """The logs on the host.

    Raises FloatingPointError if a step since the last log was not finite.
    """
    host = {k: float(v) for k, v in jax.device_get(logs).items()}
    bad = int(host.pop("bad_step"))
    if bad:
      last = saver.steps()[-1] if saver.steps() else None
      raise FloatingPointError(
        f"loss or gradient norm not finite at step {bad}, in the window ({self._from}, {step}]. "
        f"The last good checkpoint is {f'step {last}' if last else 'none'} and stays. Lower "
        "--config.optimizer.peak in another --workdir; --config.data.dir=... spares the "
        "simulation."
      )
    return host

  def log(self, step: int, logs: Mapping, saver: ckpt.Checkpoints) -> None:
    """Writes the means since the last log, and how fast it went."""
    scalars = self.check(step, logs, saver)
    now = time.monotonic()
    seconds, count = now - self._said, step - self._from
    speed = {
      "steps_per_second": count / seconds,
      "examples_per_second": count * self.batch / seconds,
      "seconds_per_step": seconds / count,
      "input_wait_share": self._waited / seconds,
      "flops_per_second": self.flops * count / seconds,
    }
    if self.peak:
      speed["flops_utilisation"] = speed["flops_per_second"] / self.peak
    stats = jax.local_devices()[0].memory_stats()
    if stats:
      speed["device_peak_bytes"] = stats.get("peak_bytes_in_use", 0)
    self.writer.write_scalars(step, scalars)
    self.writer.write_speed(step, speed)
    self._said, self._from, self._waited = now, step, 0.0
    self.progress.advance(step - self.progress.done, loss=scalars["loss"])

  def evaluated(
    self,
    step: int,
    found: Mapping[str, Any],
  ) -> dict[str, float]:
    """Writes what the evaluators found; returns its scalars."""
    scalars = {k: v for k, v in found.items() if jnp.ndim(v) == 0}
    self.writer.write_scalars(step, scalars)
    self.writer.write_images(
      step,
      {k: v for k, v in found.items() if jnp.ndim(v)},
    )
    return scalars

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """What is done within does not count as time of the steps."""
    began = time.monotonic()
    yield
    self._said += time.monotonic() - began

  def profile(self, step: int, block: Mapping[str, int]) -> None:
    """Starts a trace before step start_step + 1 and ends it `steps` later."""
    inside = block["start_step"] < step <= block["start_step"] + block["steps"]
    if inside and not self._profiling:
      self._trace = tempfile.TemporaryDirectory()
      jax.profiler.start_trace(self._trace.name)
    elif self._profiling and not inside:
      jax.profiler.stop_trace()
      traced = pathlib.Path(self._trace.name)
      files.copy(traced, self.folder, traced.rglob("*"))
      self._trace.cleanup()
      progress.say(
        f"train: profile of {block['steps']} steps is in {self.folder}/plugins/profile"
      )
    self._profiling = inside


def compiled(step_fn: Callable, state, batch) -> tuple[Any, float]:
  """(the compiled step, its model FLOPs over all devices); state and batch may be abstract, with
  shardings.
  """
  program = jax.jit(
    step_fn,
    donate_argnums=0,
    out_shardings=(jax.tree.map(lambda x: x.sharding, state), None),
  )
  return program.lower(state, batch).compile(), program_cost.flops(
    step_fn, state, batch
  )


def train(
  folder: pathlib.Path,
  config_hash: str,
  *,
  initialise: Callable,
  make_update: Callable,
  make_validation: Callable,
  batches,
  shape: tuple[int, ...],
  evaluators: Mapping[str, Callable],
  mesh: jax.sharding.Mesh,
  seed: int,
  plan: Plan,
  keep: ckpt.Keep,
  config_text: str,
  stop: supervision.Stop,
  dtype: str = "float32",
  agree: Callable[[Any], list] = lambda value: [value],
  tracker: Callable = lambda: None,
) -> dict:
  """The `train` job: restores the last good state, fits, writes the averaged parameters to
  folder/prior.

  Args:
    folder: of the stage. config_hash: goes with every checkpoint.
    initialise: (key of the parameters, key of the run) -> TrainState.
    make_update: PartitionSpecs of the parameters -> (state, batch) -> (state, logs).
    make_validation: (those specs, key) -> the evaluator "validation", which gives "error".
    batches: pipeline.Batches. shape: of an example, (*space, C).
    evaluators: more of them.
    dtype: of the computation, for the utilisation.
    tracker: see metric_writer.MetricWriter.
    the rest: see fit and Checkpoints.
  Returns: {"steps", "parameters", "error"}, the last being the validation error.
  """
  init_key, run_key, validation_key = jax.random.split(
    random_keys.key(seed, "training"), 3
  )
  with stop.interruptible("compiling the training step"):
    start, target, specs = train_state.make(mesh, initialise, init_key, run_key)
    saver = ckpt.Checkpoints(folder / "checkpoints", config_hash, keep, agree)
    example = jax.ShapeDtypeStruct(
      (batches.batch, *shape), jnp.float32, sharding=meshes.rows(mesh)
    )
    step_fn, flops = compiled(make_update(specs.params), target, {"x": example})
    with ledger.spend("restoring"):
      found = saver.restore_last(target)
    if found is not None:
      state = found[1]
      progress.say(f"train: going on from step {found[0]}")
    else:
      state = start(init_key, run_key)
    first = int(state.step)
  validate = make_validation(specs.params, validation_key)
  evaluated = not found or saver.record(first).get("evaluated", True)
  peak = program_cost.peak_flops(mesh.devices.flat[0].device_kind, dtype)
  writer = metric_writer.MetricWriter(folder, first, evaluated, tracker)
  writer.write_text("config", f"```json\n{config_text}\n```")
  try:
    with progress.Progress("train", plan.total_steps, "steps", done=first) as bar:
      state = fit(
        state=state,
        batches=batches.stream(mesh, first, plan.total_steps),
        step_fn=step_fn,
        plan=plan,
        evaluators={"validation": validate} | dict(evaluators),
        saver=saver,
        watch=Watch(
          writer, bar, folder, batches.batch, flops, peak and peak * mesh.size
        ),
        stop=stop,
        agree=agree,
        evaluated=evaluated,
      )
    error = validate(state)["error"]
  finally:
    writer.close()
    saver.close()
  save_prior(folder, config_hash, state.ema[0], agree)
  return {
    "steps": plan.total_steps,
    "parameters": train_state.count(state.params),
    "error": error,
  }


def save_prior(
  folder: pathlib.Path, config_hash: str, ema, agree=lambda value: [value]
) -> None:
  """The averaged parameters alone, all that sampling needs."""
  prior = ckpt.Checkpoints(folder / "prior", config_hash, 1, agree)
  prior.save(0, ema)
  prior.close()


def load_prior(
  folder: pathlib.Path,
  config_hash: str,
  denoiser: nn.Module,
  space,
  channels: int,
  mesh,
  agree=lambda value: [value],
) -> Any:
  """Parameters for denoiser.apply.

  Raises FileNotFoundError if training has not finished, ValueError if damaged.
  """
  if not (folder / "prior").exists():
    raise FileNotFoundError(
      f"{folder} has no prior: run `downscaling train` with the same --config and --workdir."
    )
  shapes = jax.eval_shape(
    lambda key: denoiser.init(
      key,
      jnp.zeros((1, *space, channels)),
      jnp.ones(1),
    )["params"],
    random_keys.key(0, "plans"),
  )
  there = folder / "prior"
  here = mirror.tree(there) if isinstance(there, RemotePath) else there
  prior = ckpt.Checkpoints(here, config_hash, 1, agree)
  found = prior.restore_last(ckpt.abstract(shapes, meshes.replicated(mesh)))
  prior.close()
  if found is None:
    raise FileNotFoundError(
      f"{folder}/prior is empty: run `downscaling train` again; it goes on from its checkpoints."
    )
  return found[1]
