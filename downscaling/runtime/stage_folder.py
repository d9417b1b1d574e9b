"""A stage of a run (data, debias, train, a set of samples, the report): a folder with a marker,
stage.json.

The marker holds the settings that the stage's result depends on. Opening the folder with other
settings is refused, so a work folder never mixes two runs. Once the stage is complete it also holds
the size, time and SHA-256 of every file (see products.py). A second copy of the marker,
stage.copy.json, is what `downscaling verify --repair` rebuilds a lost one from.

One job at a time owns a stage, by its lock file. Several may draw one set of samples.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from downscaling.runtime import (
  files,
  ledger,
  locks,
  processes,
  products,
  progress,
  provenance,
)
from downscaling.runtime import mesh as meshes

# In the first schema, markers held whole blocks of the config; now they hold what differs from the
# defaults, so that a new key leaves old folders valid.
FIRST, SCHEMA = 1, 2
MARKER, COPY, LOCK = products.MARKER, products.COPY, products.LOCK


def plain(value: Any) -> Any:
  """ConfigDict, tuples, numpy scalars -> what JSON gives back (dict, list, str, number, bool,
  None).
  """
  if isinstance(value, Mapping) or hasattr(value, "items"):
    return {str(k): plain(v) for k, v in sorted(value.items())}
  if isinstance(value, list | tuple):
    return [plain(v) for v in value]
  if isinstance(value, np.generic):
    return value.item()
  if value is None or isinstance(value, str | int | float | bool):
    return value
  raise TypeError(
    f"{value!r} of type {type(value).__name__} has no place in a config: use numbers, strings, "
    "dicts."
  )


def config_hash(config: Any) -> str:
  """First 12 hex digits of the SHA-256 of the config's JSON."""
  text = json.dumps(plain(config), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:12]


def differences(
  old: Any, new: Any, defaults: Any = None, path: str = ""
) -> Iterator[str]:
  """Keys whose values differ, as 'block.key: old -> new'.

  defaults: values of keys that one of them lacks, nested; "absent" where there is none.
  """
  if isinstance(old, dict) and isinstance(new, dict):
    known = defaults if isinstance(defaults, dict) else {}
    for key in sorted({*old, *new}):
      default = known.get(key)
      either = old.get(key, new.get(key))
      fallback = (
        {} if isinstance(either, dict) else ("absent" if default is None else default)
      )
      inner = f"{path}.{key}" if path else key
      yield from differences(
        old.get(key, fallback), new.get(key, fallback), default, inner
      )
  elif old != new:
    yield f"{path}: {old} -> {new}"


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage's folder. `path` exists and is ours; `finish` marks it complete.

  identity: the settings that its result depends on. hash: of them, as the marker has it; it also
  stands in checkpoints, maps and tables of this stage.
  """

  path: pathlib.Path
  name: str
  identity: dict
  hash: str

  @property
  def complete(self) -> bool:
    """True once `finish` was called."""
    return bool(files.read_json(self.path / MARKER).get("complete"))

  @property
  def summary(self) -> dict:
    """The figures given to `finish`; {} before."""
    return files.read_json(self.path / MARKER).get("summary", {})

  def changed(self) -> dict[str, str]:
    """{file: what is wrong} of products that are not what was written; see products.changed."""
    told = files.read_json(self.path / MARKER).get("products", {})
    return products.changed(self.path, told)

  @property
  def seconds(self) -> float:
    """Wall time of all attempts at it. Interrupted time counts, and work that is done again."""
    return files.read_json(self.path / MARKER).get("seconds", 0.0) + ledger.seconds(
      self.path
    )

  @property
  def devices(self) -> list[str]:
    """The devices that worked on it, in words."""
    told = files.read_json(self.path / MARKER).get("devices", [])
    return sorted({*told, *ledger.devices(self.path)})

  @contextlib.contextmanager
  def owned(
    self,
    lost: Callable[[str], object] = lambda why: None,
  ) -> Iterator[None]:
    """The block in which this job alone works on the stage. Every process calls it.

    It sweeps what dead owners left, and accounts for the time (ledger.py).

    lost: called from a thread, with a reason, if another job took the stage over.
    Raises: locks.Held, or supervision.PeerFailed on other processes, if another live job owns it.
    """
    with contextlib.ExitStack() as held:

      def take() -> None:
        what = f"the stage {self.name} of {self.path.parent}"
        held.enter_context(locks.hold(self.path / LOCK, what, lost=lost))
        swept = files.sweep(self.path)
        if swept:
          progress.say(
            f"{self.path}: removed {swept} unfinished files of an attempt that died."
          )

      processes.main_only(f"own/{self.name}", take)
      with self.accounted():
        yield

  @contextlib.contextmanager
  def accounted(self) -> Iterator[None]:
    """Accounts for the time of the block, without taking the stage."""
    with ledger.attempt(self.path, processes.place()[0], _devices()):
      yield

  def finish(self, **summary: Any) -> None:
    """Marks the stage complete: its products and a few figures. Every process calls it.

    Each reads its share of the products, for their digests; the main process writes.
    """
    told = products.measure(self.path)
    if meshes.is_main():
      record = files.read_json(self.path / MARKER)
      done = {"complete": True, "summary": plain(summary), "products": told}
      write_marker(self.path, record | done)


def write_marker(folder: pathlib.Path, record: dict) -> None:
  """Writes a stage's marker, then its copy."""
  for name in (MARKER, COPY):
    files.write_json(folder / name, record)


def open_stage(
  path: str | os.PathLike,
  name: str,
  identity: Any,
  *,
  about: Mapping[str, Any] | None = None,
  converted: Callable[[dict], dict] | None = None,
  defaults: Mapping[str, Any] | None = None,
) -> Stage:
  """Opens the stage's folder, creating and marking it if it is new.

  Args:
    path: the folder.
    name: what the stage is called in messages.
    identity: the settings its result depends on.
    about: what else a new marker says; it is never compared.
    converted: the identity of a marker of the first schema -> what it would be today; None if it
      would be the same. The marker stays as it is.
    defaults: values of the settings that an identity leaves out, for messages.
  Raises:
    FileExistsError: the folder holds files but no marker of ours.
    ValueError: other settings or another schema made it; the message names the first keys that
      differ.
  """
  path, identity = files.as_path(path), plain(identity)
  marker = path / MARKER
  if not marker.exists():
    _make(path)
    record = {
      "schema": SCHEMA,
      "stage": name,
      "complete": False,
      "config": identity,
      "config_hash": config_hash(identity),
      "versions": provenance.versions(),
      "commit": provenance.commit(),
      **plain(about or {}),
    }
    if files.create_json(marker, record):
      files.write_json(path / COPY, record)
  record = files.read_json(marker)
  _check_same(path, record, identity, converted, plain(defaults or {}))
  return Stage(path, name, identity, record["config_hash"])


def _check_same(
  path: pathlib.Path, record: dict, identity: dict, converted, defaults
) -> None:
  """Raises ValueError if the marker's settings are not `identity`."""
  schema = record.get("schema")
  if schema not in (FIRST, SCHEMA):
    raise ValueError(
      f"{path / MARKER} has schema {schema}, this version reads {FIRST} and {SCHEMA}: use another "
      "--workdir."
    )
  found = record["config"]
  if schema == FIRST and converted is not None:
    found = converted(found)
  changed = list(differences(found, identity, defaults))
  if changed:
    shown = "; ".join(changed[:4])
    if len(changed) > 4:
      shown += f"; and {len(changed) - 4} more"
    raise ValueError(
      f"{path} was made by another config ({shown}). Nothing was touched: use another --workdir "
      "(for samples alone, another --config.label), or the config it was made by."
    )


def lost(path: pathlib.Path) -> bool:
  """Has the folder lost its marker, but not the copy?"""
  return (path / COPY).exists() and not (path / MARKER).exists()


def _make(path: pathlib.Path) -> None:
  """Makes the folder. Raises FileExistsError if it holds files but no marker."""
  if lost(path):
    raise FileExistsError(
      f"{path} has lost its {MARKER}. Its copy is there: `downscaling verify {path.parent} "
      "--repair` rebuilds the marker from it. Nothing was touched."
    )
  if path.exists() and (
    not path.is_dir() or not all(files.temporary(each) for each in path.iterdir())
  ):
    raise FileExistsError(
      f"{path} holds files but no {MARKER}: downscaling did not make it and will not write there. "
      "Use another --workdir."
    )
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise OSError(
      error.errno, f"{path} cannot be made ({error.strerror}): use another --workdir."
    ) from None


def _devices() -> str:
  """All devices in words, "8 × NVIDIA H200"; for a CPU also its cores, which devices share."""
  kinds = ", ".join(sorted({d.device_kind for d in jax.devices()}))
  cores = f" on {os.cpu_count()} cores a host" if jax.default_backend() == "cpu" else ""
  return f"{jax.device_count()} × {kinds}{cores}"
