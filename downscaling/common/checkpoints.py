"""Orbax checkpoints: saved asynchronously, restored under today's shardings, the last good one if the last is damaged.

A checkpoint is data: arrays (OCDBT/Zarr3 by TensorStore) and one JSON record with schema version and config hash.
Restoring needs an abstract tree (shapes, dtypes, shardings) from the caller, so any topology can read any other's.
"""

import os
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from downscaling.common import runs

SCHEMA = 1


def abstract(tree: Any, sharding: jax.sharding.Sharding | None = None) -> Any:
  """ShapeDtypeStructs of a tree of arrays (or of shapes), all under one sharding, or each under its own."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or getattr(x, "sharding", None)), tree
  )


class Checkpoints:
  """Numbered checkpoints of one stage in a folder.

  Args:
    folder: the stage's own folder for checkpoints; created if absent.
    config_hash: written beside every checkpoint and compared on restore.
    keep: how many of the last to keep.
  """

  def __init__(self, folder: str | os.PathLike, config_hash: str, keep: int = 3):
    self.folder = pathlib.Path(folder).absolute()
    self.config_hash = config_hash
    self._manager = ocp.CheckpointManager(
      self.folder,
      options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True),
      item_handlers={"state": ocp.StandardCheckpointHandler(), "record": ocp.JsonCheckpointHandler()},
    )

  def steps(self) -> list[int]:
    """Steps with a finished checkpoint, oldest first."""
    return sorted(self._manager.all_steps())

  def save(self, step: int, state: Any, **record: Any) -> None:
    """Starts saving; returns once the arrays are copied off the device. Saving a step that exists does nothing.

    Raises: OSError, in words, when the disk has no room (also from `wait`, as saving goes on behind).
    """
    if step in self._manager.all_steps():
      return
    record = {"schema": SCHEMA, "config_hash": self.config_hash, "step": step} | record
    with self._explained():
      self._manager.save(
        step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record))
      )

  def wait(self) -> None:
    """Blocks until what was begun is on disk."""
    with self._explained():
      self._manager.wait_until_finished()

  def record(self, step: int) -> dict:
    """The JSON record of one checkpoint."""
    return self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]

  def restore_last(self, target: Any) -> tuple[int, Any] | None:
    """The newest checkpoint that can be read, as (step, state); None if there is none at all.

    Args:
      target: abstract tree, see `abstract`.
    Raises: ValueError if checkpoints exist and none is readable, or one is of another config or schema.
    """
    damaged = []
    for step in reversed(self.steps()):
      try:
        record = self.record(step)
        self._check(step, record)
        state = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))["state"]
      except _WrongRun:
        raise
      except Exception as error:  # orbax and TensorStore raise many kinds for a damaged file; each is named below
        damaged.append((step, f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"))
        runs.say(f"checkpoint {self.folder / str(step)} cannot be read ({damaged[-1][1]}); trying the one before it.")
        continue
      return step, state
    if damaged:
      raise ValueError(
        f"no checkpoint in {self.folder} can be read (steps {[s for s, _ in damaged]}; the newest: {damaged[0][1]}). "
        "They were left as they are: restore the folder from a copy, move it away and run the stage's job again, "
        "or use another --workdir."
      )
    return None

  def _check(self, step: int, record: dict) -> None:
    if record.get("schema") != SCHEMA:
      raise _WrongRun(f"{self.folder}/{step} has schema {record.get('schema')}, this version reads {SCHEMA}.")
    if record.get("config_hash") != self.config_hash:
      raise _WrongRun(
        f"{self.folder}/{step} was made by config {record.get('config_hash')}, this run is {self.config_hash}: "
        "use another --workdir, or the config it was made by."
      )

  def _explained(self):
    return runs.full_disk_in_words(self.folder, "the checkpoints already there are whole")

  def close(self) -> None:
    self.wait()
    self._manager.close()


class _WrongRun(ValueError):
  """Raised for a checkpoint that is whole, but not ours to continue."""
