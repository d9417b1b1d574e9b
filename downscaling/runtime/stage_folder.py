"""A stage of a run (data, debias, train, a set of samples, the report): a folder with a marker,
stage.json.

The marker holds the config blocks that the stage's result depends on. Opening the folder with other
blocks is refused, so a work folder never mixes two runs.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from downscaling.runtime import files, provenance
from downscaling.runtime import mesh as meshes

SCHEMA = 1
MARKER = "stage.json"


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


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
  """Keys whose values differ, as 'block.key: old -> new'."""
  if isinstance(old, dict) and isinstance(new, dict):
    for key in sorted({*old, *new}):
      inner = f"{path}.{key}" if path else key
      yield from differences(old.get(key, "absent"), new.get(key, "absent"), inner)
  elif old != new:
    yield f"{path}: {old} -> {new}"


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage's folder. `path` exists and is ours; `finish` marks it complete."""

  path: pathlib.Path
  name: str
  identity: dict

  @property
  def complete(self) -> bool:
    """True once `finish` was called."""
    return bool(files.read_json(self.path / MARKER).get("complete"))

  @property
  def summary(self) -> dict:
    """The figures given to `finish`; {} before."""
    return files.read_json(self.path / MARKER).get("summary", {})

  @contextlib.contextmanager
  def timed(self) -> Iterator[None]:
    """Adds the block's wall time to the marker, and the devices it ran on.

    Interrupted time is added too. Work that an interruption loses is done again and counts twice.
    """
    began = time.monotonic()
    try:
      yield
    finally:
      if meshes.is_main():
        record = files.read_json(self.path / MARKER)
        seconds = record.get("seconds", 0.0) + time.monotonic() - began
        devices = sorted({*record.get("devices", []), _devices()})
        timing = {"seconds": round(seconds, 2), "devices": devices}
        files.write_json(self.path / MARKER, record | timing)

  def finish(self, **summary: Any) -> None:
    """Marks the stage complete and stores a few figures; only the main process writes."""
    if meshes.is_main():
      record = files.read_json(self.path / MARKER)
      done = {"complete": True, "summary": plain(summary)}
      files.write_json(self.path / MARKER, record | done)


def open_stage(path: str | os.PathLike, name: str, identity: Any) -> Stage:
  """Opens the stage's folder, creating and marking it if it is new.

  Args:
    path: the folder.
    name: what the stage is called in messages.
    identity: the config blocks its result depends on.
  Raises:
    FileExistsError: the folder holds files but no marker of ours.
    ValueError: another config or schema made it; the message names the first keys that differ.
  """
  path, identity = pathlib.Path(path), plain(identity)
  marker = path / MARKER
  if marker.exists():
    found = files.read_json(marker)
    if found.get("schema") != SCHEMA:
      raise ValueError(
        f"{marker} has schema {found.get('schema')}, this version reads {SCHEMA}: use another "
        "--workdir."
      )
    changed = list(differences(found["config"], identity))
    if changed:
      shown = "; ".join(changed[:4])
      if len(changed) > 4:
        shown += f"; and {len(changed) - 4} more"
      raise ValueError(
        f"{path} was made by another config ({shown}). Nothing was touched: use another --workdir "
        "(for samples alone, another --config.label), or the config it was made by."
      )
  elif path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise FileExistsError(
      f"{path} holds files but no {MARKER}: downscaling did not make it and will not write there. "
      "Use another --workdir."
    )
  else:
    try:
      path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise OSError(
        error.errno, f"{path} cannot be made ({error.strerror}): use another --workdir."
      ) from None
    record = {
      "schema": SCHEMA,
      "stage": name,
      "complete": False,
      "config": identity,
      "config_hash": config_hash(identity),
      "versions": provenance.versions(),
      "commit": provenance.commit(),
    }
    files.write_json(marker, record)
  return Stage(path, name, identity)


def _devices() -> str:
  """All devices in words, "8 × NVIDIA H200"; for a CPU also its cores, which devices share."""
  kinds = ", ".join(sorted({d.device_kind for d in jax.devices()}))
  cores = f" on {os.cpu_count()} cores a host" if jax.default_backend() == "cpu" else ""
  return f"{jax.device_count()} × {kinds}{cores}"
