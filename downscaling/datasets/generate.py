"""The `generate` job: trajectory ids -> snapshots -> array_record shards, resumable shard by shard.

A shard is the unit of work: a run of consecutive trajectories, computed in one call over the
devices of one process, written by that process to a temporary file and renamed. A shard whose file
is there is never computed again; its bytes are the same whichever process wrote it.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
from tensorflow_datasets.core import example_serializer
from tensorflow_datasets.core import splits as tfds_splits

from downscaling.datasets import simulated
from downscaling.runtime import files, ledger, progress, supervision
from downscaling.runtime import mesh as meshes
from downscaling.runtime.remote_paths import RemotePath


@dataclasses.dataclass(frozen=True)
class Plan:
  """What to simulate of one data set.

  builder: a FieldsBuilder. trajectories: {split: how many}. shard: trajectories a shard.
  times: [S] times of the snapshots, in units of the equation.
  rollout: ids [T], sharded over the mesh -> fields [T, S, *space, C], sharded likewise; compiled by
    the equation.
  check: (fields, ids, times) raises FloatingPointError, naming trajectory and time, where a field
    is no solution.
  """

  builder: simulated.FieldsBuilder
  trajectories: dict[str, int]
  shard: int
  times: np.ndarray
  rollout: Callable
  check: Callable

  def shards(self) -> list[tuple[str, int, np.ndarray, pathlib.Path]]:
    """(split, index, trajectory ids, file) of every shard."""
    out = []
    for split, count in self.trajectories.items():
      number = -(-count // self.shard)
      first = simulated.FIRST_TRAJECTORY[split]
      template = self.template(split)
      for i in range(number):
        ids = (
          np.arange(
            i * self.shard,
            min((i + 1) * self.shard, count),
          )
          + first
        )
        path = pathlib.Path(template.sharded_filepath(shard_index=i, num_shards=number))
        out.append((split, i, ids, path))
    return out

  def template(self, split: str) -> tfds.core.ShardedFileTemplate:
    return tfds.core.ShardedFileTemplate(
      data_dir=self.builder.data_path,
      dataset_name=self.builder.name,
      split=split,
      filetype_suffix="array_record",
    )


def generate(
  plan: Plan,
  mesh: jax.sharding.Mesh,
  stop: Callable[[], bool],
  process: int = 0,
  agree: Callable[[Any], list] = lambda value: [value],
) -> int:
  """Makes what is missing of one data set; returns the number of trajectories computed now, by all
  processes.

  The missing shards are dealt out to the processes, each of which computes and writes its own on
  its own devices; computation of a shard overlaps the writing of the one before. The float64
  simulation needs jax.enable_x64 around the call; examples are stored in float32.

  Args:
    mesh: of this process's devices alone (mesh.local). stop: polled as often on every process.
    process: number of this one. agree: value -> the values of all processes (processes.gather).
  Raises: FloatingPointError for a blow-up; supervision.Interrupted once `stop()` is true, every
    begun shard being whole.
  """
  shards = plan.shards()
  home = plan.builder.home
  home.mkdir(parents=True, exist_ok=True)
  names = {path.name for path in home.iterdir()}
  # As process 0 sees them, so that all deal out the same.
  there = agree([path.name in names for *_, path in shards])
  missing = [s for s, exists in zip(shards, there[0], strict=True) if not exists]
  mine, rounds = missing[process :: len(there)], -(-len(missing) // len(there))
  name = f"generate {plan.builder.name}/{plan.builder.grid.name}"
  total, todo = (sum(len(s[2]) for s in group) for group in (shards, missing))
  width = (
    -(-plan.shard // mesh.size) * mesh.size
  )  # one compilation: every shard is padded to the same width
  with progress.Progress(name, total, "trajectories", done=total - todo) as bar:
    pending = None
    for turn in range(rounds + 1):
      shard = mine[turn] if turn < len(mine) else None
      if shard is not None:
        ids = shard[2]
        padded = np.concatenate(
          [
            ids,
            np.full(width - len(ids), ids[0]),
          ]
        )
        computed = plan.rollout(jax.device_put(padded, meshes.rows(mesh)))
      if pending is not None:
        with files.full_disk_in_words(home, "its finished shards are whole"):
          fields = np.asarray(pending[1])
          with ledger.spend("saving"):
            _write(plan, pending[0], fields)
          ledger.saved()
        bar.advance(
          sum(len(s[2]) for s in missing[(turn - 1) * len(there) : turn * len(there)])
        )
      if turn and stop() and turn < rounds:
        raise supervision.Interrupted(
          f"{name} stopped with {bar.done} of {total} trajectories on disk"
        )
      pending = None if shard is None else (shard, computed)
  agree("written")
  described = plan.builder.info.initialized and (home / "features.json").exists()
  if process == 0 and (missing or not described):
    _finalise(plan, shards)
  agree("finalised")
  plan.builder.pull("*.json")
  if not plan.builder.info.initialized:
    plan.builder.info.read_from_directory(plan.builder.data_dir)
  return todo


def _write(plan: Plan, shard, fields: np.ndarray) -> None:
  _, _, ids, path = shard
  fields = fields[: len(ids)]
  plan.check(fields, ids, plan.times)
  with files.replacing(plan.builder.home / path.name) as temporary:
    writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
    for _, example in plan.builder._generate_examples(
      ids, plan.times, fields.astype(np.float32)
    ):
      writer.write(_serialize(plan.builder.info.features, example))
    writer.close()


def _serialize(features: Any, example: dict) -> bytes:
  """One record. Fields in order of their names: protocol buffers else put them in an order of the
  process's own.
  """
  serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
  return serializer.get_tf_example(features.encode_example(example)).SerializeToString(
    deterministic=True
  )


def _records(path: pathlib.Path) -> int:
  """Records in a shard; 0 if it cannot be read."""
  try:
    reader = array_record_module.ArrayRecordReader(str(path))
    records = reader.num_records()
    # This is where array_record says, without a word, that the file has no footer.
    reader.close()
  except RuntimeError:
    return 0
  return records


def _finalise(plan: Plan, shards) -> None:
  """Counts the records of every shard and writes dataset_info.json: only then the data set counts
  as made.
  """
  splits, here = [], pathlib.Path(plan.builder.data_dir)
  plan.builder.pull("*.array_record-*")
  for split in plan.trajectories:
    lengths, size = [], 0
    for _, _, ids, path in (s for s in shards if s[0] == split):
      lengths.append(_records(path))
      size += path.stat().st_size
      if lengths[-1] != len(ids) * len(plan.times):
        raise ValueError(
          f"{plan.builder.home / path.name} has {lengths[-1]} records, "
          f"{len(ids) * len(plan.times)} are needed: it is damaged. Move it away and run the same "
          "command; only that shard is made again."
        )
    if lengths:
      splits.append(
        tfds.core.SplitInfo(
          name=split,
          shard_lengths=lengths,
          num_bytes=size,
          filename_template=plan.template(split),
        )
      )
  plan.builder.info.set_splits(tfds_splits.SplitDict(splits))
  plan.builder.info.write_to_directory(plan.builder.data_dir)
  if isinstance(plan.builder.home, RemotePath):
    files.copy(here, plan.builder.home, here.glob("*.json"))
  plan.builder.info.read_from_directory(plan.builder.data_dir)
