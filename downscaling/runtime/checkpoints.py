"""Orbax checkpoints: saved asynchronously, restored under today's shardings, the last good one if
the last is damaged.

A checkpoint is data: arrays (OCDBT/Zarr3 by TensorStore), one JSON record (schema version, config
hash, shape and dtype of every leaf), and a manifest with the SHA-256 of every file, renamed into
place together. Restoring needs an abstract tree (shapes, dtypes, shardings) from the caller, so any
topology can read any other's.
"""

import copy
import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from downscaling.runtime import files, progress, stage_folder

SCHEMA = 2
MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Keep:
  """Which checkpoints stay: the `last` ones, every step that `every` divides (0: none), and the
  `best` by `metric`.

  metric: name of the value given to save(metrics=...), of which the smallest is best; "" for none.
  """

  last: int = 3
  every: int = 0
  best: int = 0
  metric: str = ""

  def policy(self):
    policies = [preservation_policy.LatestN(self.last)]
    if self.every:
      policies.append(preservation_policy.EveryNSteps(self.every))
    if self.best:
      value = lambda metrics: metrics[self.metric]
      policies.append(
        preservation_policy.BestN(
          get_metric_fn=value, reverse=True, n=self.best, keep_checkpoints_without_metrics=False
        )
      )
    return preservation_policy.AnyPreservationPolicy(policies)


def abstract(tree: Any, sharding: jax.sharding.Sharding | None = None) -> Any:
  """ShapeDtypeStructs of a tree of arrays (or of shapes), all under one sharding, or each under its
  own.
  """
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=sharding or getattr(x, "sharding", None)
    ),
    tree,
  )


def leaves(tree: Any) -> dict[str, list]:
  """{path: [shape, dtype]} of a tree, as it stands in the record."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {jax.tree_util.keystr(path): [list(x.shape), str(x.dtype)] for path, x in flat}


@jax.jit
def _finite(tree):
  numbers = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
  return jnp.stack([jnp.isfinite(x).all() for x in numbers])


class Checkpoints:
  """Numbered checkpoints of one stage in a folder. With several processes, each calls every method.

  Args:
    folder: the stage's own folder for checkpoints; created if absent.
    config_hash: written beside every checkpoint and compared on restore.
    keep: see Keep.
    agree: value -> the values of all processes, in their order (processes.gather); the default is
      for one alone.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    config_hash: str,
    keep: Keep | int = 3,
    agree: Callable[[Any], list] = lambda value: [value],
  ):
    self.folder = pathlib.Path(folder).absolute()
    self.config_hash, self._agree = config_hash, agree
    self._damaged: dict[int, str] = {}
    self.keep = Keep(keep) if isinstance(keep, int) else keep
    self._manager = ocp.CheckpointManager(
      self.folder,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=self.keep.policy(),
        create=True,
        enable_async_checkpointing=True,
        async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
      ),
      item_handlers={
        "state": ocp.StandardCheckpointHandler(),
        "record": ocp.JsonCheckpointHandler(),
      },
    )

  def steps(self) -> list[int]:
    """Steps with a finished checkpoint, oldest first."""
    return sorted(self._manager.all_steps())

  def save(
    self, step: int, state: Any, metrics: dict[str, float] | None = None, **record: Any
  ) -> None:
    """Starts saving; returns once the arrays are copied off the device. Saving a step that exists
    does nothing.

    Raises:
      OSError: in words, when the disk has no room (also from `wait`, as saving goes on behind).
      FloatingPointError: a leaf is not finite; nothing is saved.
    """
    if step in self._damaged:
      self._set_aside(step)
    if step in self._manager.all_steps():
      return
    numbers = [
      k for k, (_, dtype) in leaves(state).items() if jnp.issubdtype(_dtype(dtype), jnp.floating)
    ]
    finite = jax.device_get(_finite(state)) if numbers else []
    if bad := [name for name, good in zip(numbers, finite, strict=True) if not good]:
      raise FloatingPointError(
        f"step {step} is not saved: {len(bad)} leaves of the state hold NaN or infinity, the first "
        f"is {bad[0]}. The last good checkpoint is "
        f"{f'step {self.steps()[-1]}' if self.steps() else 'none'} and stays."
      )
    record = {
      "schema": SCHEMA,
      "config_hash": self.config_hash,
      "step": step,
      "leaves": leaves(state),
    } | record
    record = copy.deepcopy(record)  # orbax writes it later, when the caller's lists have grown
    with self._explained():
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record)
        ),
        metrics=metrics,
      )

  def wait(self) -> None:
    """Blocks until what was begun is on disk."""
    with self._explained():
      self._manager.wait_until_finished()

  def record(self, step: int) -> dict:
    """The JSON record of one checkpoint."""
    return self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))[
      "record"
    ]

  def restore_last(self, target: Any) -> tuple[int, Any] | None:
    """The newest checkpoint that is whole, as (step, state); None if there is none at all.

    A damaged one is named and stepped over, never deleted; saved again, it is renamed to
    STEP.damaged.

    Args:
      target: abstract tree, see `abstract`.
    Raises: ValueError if checkpoints exist and none is readable, or one is of another config,
      schema or shape.
    """
    steps = self._agree(self.steps())[0]
    for step in reversed(steps):
      try:
        if fault := next(filter(None, self._agree(self._fault(step))), None):
          raise ValueError(fault)
        self._check(step, self.record(step), target)
        state = self._manager.restore(
          step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))
        )["state"]
      except _WrongRun:
        raise
      except (
        Exception
      ) as error:  # orbax and TensorStore raise many kinds for a damaged file; each is named below
        words = str(error).splitlines()[0][:200] if str(error) else ""
        self._damaged[step] = (
          words if isinstance(error, ValueError) else f"{type(error).__name__}: {words}"
        )
        before = "trying the one before it" if step != steps[0] else "there is none before it"
        progress.say(
          f"checkpoint {self.folder / str(step)} cannot be read ({self._damaged[step]}); {before}."
        )
        continue
      return step, state
    if self._damaged:
      newest = max(self._damaged)
      raise ValueError(
        f"no checkpoint in {self.folder} can be read (steps {sorted(self._damaged)}; the newest: "
        f"{self._damaged[newest]}). They were left as they are: restore the folder from a copy, "
        "move it away and run the stage's job again, or use another --workdir."
      )
    return None

  def close(self) -> None:
    self.wait()
    self._manager.close()

  def _seal(self) -> None:
    """Writes the manifest into the checkpoint that is about to be renamed into place."""
    if jax.process_index() == 0:
      for folder in self.folder.glob("*.orbax-checkpoint-tmp"):
        if not (folder / MANIFEST).exists():
          files.write_json(
            folder / MANIFEST, {str(f.relative_to(folder)): _sha256(f) for f in _files(folder)}
          )

  def _fault(self, step: int) -> str:
    """What is wrong with the files of a checkpoint, "" if nothing is; process 0 looks for all."""
    folder = self.folder / str(step)
    if jax.process_index() or not (folder / MANIFEST).exists():  # without one, reading will tell
      return ""
    try:
      manifest = files.read_json(folder / MANIFEST)
    except ValueError as error:
      return str(error)
    for name, digest in manifest.items():
      if not (folder / name).exists():
        return f"{name} is missing"
      if _sha256(folder / name) != digest:
        return f"{name} has changed since it was written"
    return ""

  def _set_aside(self, step: int) -> None:
    if jax.process_index() == 0:
      (self.folder / str(step)).rename(self.folder / f"{step}.damaged")
    self._agree(step)  # renamed, before anyone looks again
    del self._damaged[step]
    self._manager.reload()

  def _check(self, step: int, record: dict, target: Any) -> None:
    if record.get("schema") != SCHEMA:
      raise _WrongRun(
        f"{self.folder}/{step} has schema {record.get('schema')}, this version reads {SCHEMA}."
      )
    if record.get("config_hash") != self.config_hash:
      raise _WrongRun(
        f"{self.folder}/{step} was made by config {record.get('config_hash')}, this run is "
        f"{self.config_hash}: use another --workdir, or the config it was made by."
      )
    if changed := list(stage_folder.differences(record["leaves"], leaves(target))):
      raise _WrongRun(
        f"{self.folder}/{step} holds another state ({'; '.join(changed[:3])}): use another "
        "--workdir."
      )

  def _explained(self):
    return files.full_disk_in_words(self.folder, "the checkpoints already there are whole")


class _WrongRun(ValueError):
  """Raised for a checkpoint that is whole, but not ours to continue."""


def _dtype(name: str):
  return jnp.dtype("uint32") if name.startswith("key<") else jnp.dtype(name)


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
  """The files of a checkpoint, less orbax's own metadata, which it touches once more after us."""
  return sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(("_", ".")))


def _sha256(path: pathlib.Path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
