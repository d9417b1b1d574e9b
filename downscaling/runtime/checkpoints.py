"""Orbax checkpoints: saved asynchronously, checked on reading, restored onto any device mesh.

A checkpoint holds three things: arrays (OCDBT/Zarr3, written by TensorStore), one JSON record
(schema version, config hash, shape and dtype of every leaf), and a manifest with the SHA-256 of
every file. They are renamed into place together. The caller restores with an abstract tree (shapes,
dtypes, shardings), so a checkpoint of one device mesh can be read on another. If the newest
checkpoint is damaged, the newest whole one is restored.
"""

import contextlib
import copy
import dataclasses
import importlib.util
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import fsspec.config
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from downscaling.runtime import files, ledger, progress, stage_folder
from downscaling.runtime.remote_paths import RemotePath

SCHEMA = 2
CHECKPOINTED = ("gs",)  # object stores to which orbax writes
MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Keep:
  """Which checkpoints are kept; the rest are deleted.

  last: the number of newest checkpoints. every: all steps that it divides; 0 for none.
  best: the number of checkpoints with the smallest `metric`.
  metric: name of a value given to save(metrics=...); "" for none.
  """

  last: int = 3
  every: int = 0
  best: int = 0
  metric: str = ""

  def policy(self) -> preservation_policy.PreservationPolicy:
    """The same rule as an orbax policy."""

    def value(metrics):
      return metrics[self.metric]

    policies: list[preservation_policy.PreservationPolicy] = []
    policies.append(preservation_policy.LatestN(self.last))
    if self.every:
      policies.append(preservation_policy.EveryNSteps(self.every))
    if self.best:
      best = preservation_policy.BestN(
        get_metric_fn=value,
        reverse=True,
        n=self.best,
        keep_checkpoints_without_metrics=False,
      )
      policies.append(best)
    return preservation_policy.AnyPreservationPolicy(policies)


def abstract(tree: Any, sharding: jax.sharding.Sharding | None = None) -> Any:
  """The tree as ShapeDtypeStructs: what `restore_last` needs to know of it.

  Args:
    tree: arrays, or shapes.
    sharding: of all leaves; None: each leaf keeps its own.
  """

  def shape(x):
    own = getattr(x, "sharding", None)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or own)

  return jax.tree.map(shape, tree)


def leaves(tree: Any) -> dict[str, list]:
  """{path: [shape, dtype]} of a tree, as written in the record."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  name = jax.tree_util.keystr
  return {name(path): [list(x.shape), str(x.dtype)] for path, x in flat}


@jax.jit
def _finite(tree):
  leaves = jax.tree.leaves(tree)
  numbers = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
  return jnp.stack([jnp.isfinite(x).all() for x in numbers])


class Checkpoints:
  """Numbered checkpoints of one stage in a folder. With several processes, each calls every method.

  Args:
    folder: the stage's own folder for checkpoints; created if absent.
    config_hash: written beside every checkpoint and compared on restore.
    keep: which checkpoints are kept; a number keeps so many of the newest.
    agree: value -> the values of all processes, in their order (processes.gather). The default
      serves a single process.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    config_hash: str,
    keep: Keep | int = 3,
    agree: Callable[[Any], list] = lambda value: [value],
  ):
    self.folder = files.folder(folder)
    refuse(self.folder)
    if isinstance(self.folder, RemotePath):
      # Orbax lists through gcsfs, which else remembers what other hosts and we have changed since.
      fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    self.config_hash, self._agree = config_hash, agree
    self._damaged: dict[int, str] = {}
    self.keep = Keep(keep) if isinstance(keep, int) else keep
    self._manager = ocp.CheckpointManager(
      epath.Path(str(self.folder)),
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
    self,
    step: int,
    state: Any,
    metrics: dict[str, float] | None = None,
    **record: Any,
  ) -> None:
    """Starts saving and returns once the arrays are copied off the device.

    A step that is already saved is left as it is, if its files are whole.

    Raises:
      OSError: the disk is full. Saving continues in the background, so `wait` may raise it too.
      FloatingPointError: a leaf is not finite; nothing is saved.
    """
    there = step in self._manager.all_steps()
    faults = (
      [fault for fault in self._agree(self._fault(step)) if fault] if there else []
    )
    if faults:
      self._damaged[step] = faults[0]
    if step in self._damaged:
      self._set_aside(step)
    if step in self._manager.all_steps():
      return
    self._check_finite(step, state)
    record = {
      "schema": SCHEMA,
      "config_hash": self.config_hash,
      "step": step,
      "leaves": leaves(state),
    } | record
    # Orbax writes it later, when the caller's lists may have grown.
    record = copy.deepcopy(record)
    with self._explained(), ledger.spend("saving"):
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record)
        ),
        metrics=metrics,
      )

  def _check_finite(self, step: int, state: Any) -> None:
    """Raises FloatingPointError if a leaf of the state holds NaN or infinity."""
    dtypes = {name: _dtype(dtype) for name, (_, dtype) in leaves(state).items()}
    numbers = [
      name for name, dtype in dtypes.items() if jnp.issubdtype(dtype, jnp.floating)
    ]
    finite = jax.device_get(_finite(state)) if numbers else []
    bad = [name for name, good in zip(numbers, finite, strict=True) if not good]
    if bad:
      last = f"step {self.steps()[-1]}" if self.steps() else "none"
      raise FloatingPointError(
        f"step {step} is not saved: {len(bad)} leaves of the state hold NaN or infinity, the first "
        f"is {bad[0]}. The last good checkpoint is {last} and stays."
      )

  def wait(self) -> None:
    """Returns once every started checkpoint is on disk. Raises OSError if the disk is full."""
    with self._explained(), ledger.spend("saving"):
      self._manager.wait_until_finished()

  def record(self, step: int) -> dict:
    """The JSON record of one checkpoint."""
    wanted = ocp.args.Composite(record=ocp.args.JsonRestore())
    return self._manager.restore(step, args=wanted)["record"]

  def _state(self, step: int, target: Any) -> Any:
    wanted = ocp.args.Composite(state=ocp.args.StandardRestore(target))
    return self._manager.restore(step, args=wanted)["state"]

  def restore_last(self, target: Any) -> tuple[int, Any] | None:
    """Restores the newest whole checkpoint as (step, state); None if the folder holds none.

    A damaged checkpoint is reported and skipped, never deleted. If its step is saved again, the
    damaged one is renamed to STEP.damaged.

    Args:
      target: abstract tree, see `abstract`.
    Raises: ValueError if checkpoints exist but none can be read, or if one has another config,
      schema or shape.
    """
    steps = self._agree(self.steps())[0]
    for step in reversed(steps):
      try:
        faults = [fault for fault in self._agree(self._fault(step)) if fault]
        if faults:
          raise ValueError(faults[0])
        self._check(step, self.record(step), target)
        return step, self._state(step, target)
      except _WrongRun:
        raise
      except Exception as error:
        # Orbax and TensorStore raise many kinds for a damaged file.
        self._damaged[step] = _first_line(error)
        before = (
          "trying the one before it" if step != steps[0] else "there is none before it"
        )
        progress.say(
          f"checkpoint {self.folder / str(step)} cannot be read ({self._damaged[step]}); {before}."
        )
    if self._damaged:
      newest = max(self._damaged)
      raise ValueError(
        f"no checkpoint in {self.folder} can be read (steps {sorted(self._damaged)}; the newest: "
        f"{self._damaged[newest]}). They were left as they are: restore the folder from a copy, "
        "move it away and run the stage's job again, or use another --workdir."
      )
    return None

  def close(self) -> None:
    """Waits for what is being saved, then lets go of the folder."""
    self.wait()
    self._manager.close()

  def _seal(self) -> None:
    """Writes the manifest into the checkpoint that is about to be renamed into place, or, on an
    object store, committed where it is.
    """
    if jax.process_index() == 0:
      remote = isinstance(self.folder, RemotePath)
      begun = "[0-9]*" if remote else "*.orbax-checkpoint-tmp"
      for folder in self.folder.glob(begun):
        if not (folder / MANIFEST).exists():
          digests = {
            str(f.relative_to(folder)): files.sha256(f) for f in _files(folder)
          }
          files.write_json(folder / MANIFEST, digests)
    ledger.saved()

  def _fault(self, step: int) -> str:
    """What is wrong with the files of a checkpoint; "" for nothing. Only process 0 looks."""
    return "" if jax.process_index() else fault(self.folder / str(step))

  def _set_aside(self, step: int) -> None:
    """Renames a damaged checkpoint, so that its step can be saved again."""
    if jax.process_index() == 0:
      (self.folder / str(step)).rename(self.folder / f"{step}.damaged")
    self._agree(step)  # no process looks again before the rename
    del self._damaged[step]
    self._manager.reload()

  def _check(self, step: int, record: dict, target: Any) -> None:
    """Raises _WrongRun unless the record fits this version, config and state."""
    if record.get("schema") != SCHEMA:
      raise _WrongRun(
        f"{self.folder}/{step} has schema {record.get('schema')}, this version reads {SCHEMA}: use "
        "another --workdir, or the version that wrote it."
      )
    if record.get("config_hash") != self.config_hash:
      raise _WrongRun(
        f"{self.folder}/{step} was made by config {record.get('config_hash')}, this run is "
        f"{self.config_hash}: use another --workdir, or the config it was made by."
      )
    changed = list(stage_folder.differences(record["leaves"], leaves(target)))
    if changed:
      raise _WrongRun(
        f"{self.folder}/{step} holds another state ({'; '.join(changed[:3])}): use another "
        "--workdir."
      )

  def _explained(self):
    return files.full_disk_in_words(
      self.folder, "the checkpoints already there are whole"
    )


def refuse(folder: pathlib.Path) -> None:
  """Raises ValueError for a folder in which orbax writes no checkpoints."""
  if isinstance(folder, RemotePath) and folder.scheme not in CHECKPOINTED:
    raise ValueError(
      f"{folder} cannot hold checkpoints: orbax, which writes them, does so on disks and gs://. "
      "Train in a folder on a disk that all hosts see: --config.train.dir=FOLDER; the other stages "
      "may stay here."
    )
  if isinstance(folder, RemotePath) and importlib.util.find_spec("gcsfs") is None:
    raise ValueError(
      f"{folder} cannot hold checkpoints, as gcsfs is not installed: pip install "
      "'downscaling[gcs]'."
    )


@contextlib.contextmanager
def opened(
  folder: pathlib.Path,
  config_hash: str,
  agree: Callable[[Any], list] = lambda value: [value],
) -> Iterator[Checkpoints | None]:
  """Checkpoints of a fit that can also begin anew: None where there can be none."""
  if isinstance(folder, RemotePath) and folder.scheme not in CHECKPOINTED:
    progress.say(
      f"{folder}: no checkpoints on {folder.scheme}://; a stop begins this fit anew."
    )
    yield None
    return
  saver = Checkpoints(folder, config_hash, agree=agree)
  try:
    yield saver
  finally:
    saver.close()


def fault(folder: pathlib.Path) -> str:
  """What is wrong with the files of one checkpoint, by its manifest; "" for nothing."""
  if not (folder / MANIFEST).exists():  # reading will tell
    return ""
  try:
    manifest = files.read_json(folder / MANIFEST)
  except ValueError as error:
    return str(error)
  for name, digest in manifest.items():
    if not (folder / name).exists():
      return f"{name} is missing"
    if files.sha256(folder / name) != digest:
      return f"{name} has changed since it was written"
  return ""


class _WrongRun(ValueError):
  """The checkpoint is whole but belongs to another run."""


def _first_line(error: Exception) -> str:
  """An error in one short line; the kind is named unless it is a plain ValueError."""
  words = str(error).splitlines()[0][:200] if str(error) else ""
  return words if isinstance(error, ValueError) else f"{type(error).__name__}: {words}"


def _dtype(name: str):
  return jnp.dtype("uint32") if name.startswith("key<") else jnp.dtype(name)


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
  """The files of a checkpoint without orbax's own metadata, which orbax writes again after us."""
  found = [path for path in folder.rglob("*") if path.is_file()]
  own = ("_", ".", "commit_success")
  return sorted(path for path in found if not path.name.startswith(own))
