"""The run folder: who made it, with which config and versions; metrics and progress.

A stage (data, debias, train, a set of samples, the report) is a folder with a marker, stage.json. The marker holds the
config blocks the stage's result depends on; opening the folder with others is refused, so a work folder never mixes two
runs. Everything is JSON: nothing is executed when a folder is read back.
"""

import contextlib
import csv
import dataclasses
import errno
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

SCHEMA = 1
MARKER = "stage.json"


class Interrupted(Exception):
  """The job was asked to stop, saved what it had and can go on from there."""


# ---------------------------------------------------------------- stages


def plain(value: Any) -> Any:
  """ConfigDict, tuples, numpy scalars -> what JSON gives back (dict, list, str, number, bool, None)."""
  if isinstance(value, Mapping) or hasattr(value, "items"):
    return {str(k): plain(v) for k, v in sorted(value.items())}
  if isinstance(value, list | tuple):
    return [plain(v) for v in value]
  if isinstance(value, np.generic):
    return value.item()
  if value is None or isinstance(value, str | int | float | bool):
    return value
  raise TypeError(f"{value!r} of type {type(value).__name__} has no place in a config: use numbers, strings, dicts.")


def config_hash(config: Any) -> str:
  """First 12 hex digits of the SHA-256 of the config's JSON."""
  return hashlib.sha256(json.dumps(plain(config), sort_keys=True).encode()).hexdigest()[:12]


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
  """Keys whose values differ, as 'block.key: old -> new'."""
  if isinstance(old, dict) and isinstance(new, dict):
    for key in sorted({*old, *new}):
      yield from differences(old.get(key, "absent"), new.get(key, "absent"), f"{path}.{key}" if path else key)
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
    return bool(read_json(self.path / MARKER).get("complete"))

  @property
  def summary(self) -> dict:
    """What `finish` was told; {} before."""
    return read_json(self.path / MARKER).get("summary", {})

  @contextlib.contextmanager
  def timed(self) -> Iterator[None]:
    """Adds the wall time of the block to the marker, also when it is interrupted: restarts add up; and on what devices.

    What an interruption loses and the next call makes again counts twice.
    """
    began = time.monotonic()
    try:
      yield
    finally:
      if _is_main():
        record = read_json(self.path / MARKER)
        seconds = record.get("seconds", 0.0) + time.monotonic() - began
        devices = sorted({*record.get("devices", []), _devices()})
        write_json(self.path / MARKER, record | {"seconds": round(seconds, 2), "devices": devices})

  def finish(self, **summary: Any) -> None:
    """Marks the stage complete, with figures worth keeping; the main process does."""
    if _is_main():
      write_json(self.path / MARKER, read_json(self.path / MARKER) | {"complete": True, "summary": plain(summary)})


def open_stage(path: str | os.PathLike, name: str, identity: Any) -> Stage:
  """Opens the stage's folder, creating and marking it if it is new.

  Args:
    path: the folder.
    name: what the stage is called in messages.
    identity: the config blocks its result depends on.
  Raises:
    FileExistsError: the folder holds files and no marker of ours.
    ValueError: it was made by another config, or by another schema; the first keys that differ are named.
  """
  path, identity = pathlib.Path(path), plain(identity)
  marker = path / MARKER
  if marker.exists():
    found = read_json(marker)
    if found.get("schema") != SCHEMA:
      raise ValueError(
        f"{marker} has schema {found.get('schema')}, this version reads {SCHEMA}: use another --workdir."
      )
    if changed := list(differences(found["config"], identity)):
      shown = "; ".join(changed[:4]) + (f"; and {len(changed) - 4} more" if len(changed) > 4 else "")
      raise ValueError(
        f"{path} was made by another config ({shown}). Nothing was touched: use another --workdir "
        "(for samples alone, another --config.label), "
        "or the config it was made by."
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
      raise OSError(error.errno, f"{path} cannot be made ({error.strerror}): use another --workdir.") from None
    write_json(
      marker,
      {"schema": SCHEMA, "stage": name, "complete": False, "config": identity, "config_hash": config_hash(identity)}
      | {"versions": versions(), "commit": commit()},
    )
  return Stage(path, name, identity)


def read_json(path: str | os.PathLike) -> dict:
  """Raises ValueError, naming the file, if it is not JSON."""
  try:
    return json.loads(pathlib.Path(path).read_text())
  except json.JSONDecodeError as error:
    raise ValueError(f"{path} is not valid JSON ({error}): it was damaged; move it away and run again.") from None


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes all or nothing: a temporary file beside it, fsync, rename. Non-finite numbers become null."""
  path = pathlib.Path(path)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    with open(temporary, "w") as file:
      json.dump(_finite(value), file, indent=1, allow_nan=False)
      file.write("\n")
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
  if isinstance(value, dict):
    return {k: _finite(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_finite(v) for v in value]
  if isinstance(value, np.generic | np.ndarray):
    return _finite(value.tolist())
  if isinstance(value, float) and not np.isfinite(value):
    return None
  return value


@contextlib.contextmanager
def full_disk_in_words(path: str | os.PathLike, kept: str) -> Iterator[None]:
  """Turns the many faces of 'no space left' (Python, orbax, TensorStore, Zarr) into one OSError with path and fix.

  kept: what stays usable, for the message.
  """
  try:
    yield
  except Exception as error:
    text = str(error).lower()
    signs = ("no space left", "enospc", "quota exceeded")  # TensorStore's RESOURCE_EXHAUSTED may also be device memory
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(sign in text for sign in signs)
    if full and "free some disk" not in text:  # said already, by one who knew more
      raise OSError(
        errno.ENOSPC,
        f"no space left while writing {path}; {kept}. Free some disk and run the same command: it goes on from there.",
      ) from error
    raise


def versions() -> dict[str, str]:
  """Versions of what decides a result."""
  names = (
    "downscaling",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "ott-jax",
    "orbax-checkpoint",
    "tensorflow-datasets",
    "numpy",
  )
  found = {"python": platform.python_version()}
  for name in names:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[name] = importlib.metadata.version(name)
  return found


def commit() -> str:
  """Git commit of the code that runs, with '+' if the tree was changed; 'unknown' outside a checkout."""
  root = pathlib.Path(__file__).parents[2]
  try:
    head, dirty = (
      subprocess.run(["git", "-C", root, *cmd], capture_output=True, text=True, check=True, timeout=10).stdout.strip()
      for cmd in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
    )
  except (OSError, subprocess.SubprocessError):
    return "unknown"
  return head + ("+" if dirty else "")


# ---------------------------------------------------------------- time


def is_time(every: int, step: int, last: int) -> bool:
  """True at multiples of `every` and at the last step; every <= 0 means only there."""
  return step == last or (every > 0 and step % every == 0)


class Progress:
  """One line of progress with rate and ETA: a live bar on a terminal, a plain line every `seconds` in a log.

  with Progress("generate", total=64, unit="blocks") as bar:
    bar.advance(1, loss=0.3)
  """

  def __init__(self, name: str, total: int, unit: str, done: int = 0, seconds: float = 15.0):
    self.name, self.total, self.unit, self.seconds = name, total, unit, seconds
    self.done = self.start = done
    self._began = self._said = time.monotonic()
    self._notes: dict[str, float] = {}
    self._bar = None

  def __enter__(self):
    if sys.stderr.isatty() and self.total > self.done and _is_main():
      from rich import progress as rich_progress
      from rich.console import Console

      self._bar = rich_progress.Progress(
        "{task.description}", rich_progress.BarColumn(), "{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}",
        rich_progress.TimeElapsedColumn(), "ETA", rich_progress.TimeRemainingColumn(), "{task.fields[notes]}",
        console=Console(stderr=True), refresh_per_second=4,
      )  # fmt: skip
      self._task = self._bar.add_task(self.name, total=self.total, completed=self.done, unit=self.unit, notes="")
      self._bar.start()
    return self

  def advance(self, count: int = 1, **notes: float) -> None:
    self.done += count
    self._notes |= notes
    text = " ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in self._notes.items())
    if self._bar:
      self._bar.update(self._task, completed=self.done, notes=text)
      return
    now = time.monotonic()
    if now - self._said >= self.seconds or self.done >= self.total:
      self._said = now
      rate = (self.done - self.start) / max(now - self._began, 1e-9)
      eta = (self.total - self.done) / rate if rate else float("inf")
      say(f"{self.name}: {self.done}/{self.total} {self.unit}, {rate:.3g}/s, ETA {eta:.0f} s {text}".rstrip())

  def __exit__(self, *_):
    if self._bar:
      self._bar.stop()


def _devices() -> str:
  """All devices in words, "8 × NVIDIA H200"; of a CPU also its cores, since virtual devices share them."""
  import jax

  kinds = ", ".join(sorted({d.device_kind for d in jax.devices()}))
  cores = f" on {os.cpu_count()} cores a host" if jax.default_backend() == "cpu" else ""
  return f"{jax.device_count()} × {kinds}{cores}"


def _is_main() -> bool:
  import jax

  return jax.process_index() == 0


def say(text: str) -> None:
  """One line for the person who watches, on stderr, from the main process only."""
  if _is_main():
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- metrics


class MetricWriter:
  """Numbers, texts and images to TensorBoard events; numbers also to CSV files beside them (step, name, value).

  metrics.csv holds what a run decides, and is the same however often it was interrupted: rows after the step that a run
  goes on from are dropped. speed.csv holds rates and shares, which never repeat. Only the main process writes.

  Args:
    folder: of the stage.
    after: the step that the run goes on from; 0 for a new one.
    evaluated: False if the evaluation of that step is still to come.
  """

  def __init__(self, folder: str | os.PathLike, after: int = 0, evaluated: bool = True):
    self.folder = pathlib.Path(folder)
    self._board = None
    if not _is_main():
      return
    from tensorboardX import SummaryWriter

    self.folder.mkdir(parents=True, exist_ok=True)
    self._board = SummaryWriter(str(self.folder), purge_step=after + 1)
    self._files = {}
    for name in ("metrics", "speed"):
      _keep_rows(self.folder / f"{name}.csv", after, evaluated)
      self._files[name] = open(self.folder / f"{name}.csv", "a", newline="")  # noqa: SIM115 - closed by close()

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    self._write("metrics", step, scalars)

  def write_speed(self, step: int, scalars: Mapping[str, float]) -> None:
    self._write("speed", step, scalars)

  def _write(self, kind: str, step: int, scalars: Mapping[str, float]) -> None:
    if self._board is None:
      return
    rows = csv.writer(self._files[kind])
    for name, value in scalars.items():
      self._board.add_scalar(f"speed/{name}" if kind == "speed" else name, float(value), step)
      rows.writerow([step, name, repr(float(value))])
    self._files[kind].flush()

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """images: {name: [height, width, 3] uint8}."""
    for name, image in images.items() if self._board else ():
      self._board.add_image(name, image, step, dataformats="HWC")

  def write_text(self, name: str, text: str) -> None:
    if self._board:
      self._board.add_text(name, text, 0)

  def close(self) -> None:
    if self._board:
      self._board.close()
      for file in self._files.values():
        file.close()


def _keep_rows(path: pathlib.Path, after: int, evaluated: bool) -> None:
  """Drops what a killed run wrote after the step that is gone on from, and a row it had half written."""
  if not path.exists():
    return

  def stays(row):
    known = len(row) == 3 and row[0].isdigit() and int(row[0]) <= after
    return known and (evaluated or int(row[0]) < after or "/" not in row[1])

  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  with open(path, newline="") as old, open(temporary, "w", newline="") as new:
    csv.writer(new).writerows(row for row in csv.reader(old) if stays(row))
  os.replace(temporary, path)


def read_scalars(folder: str | os.PathLike, name: str, kind: str = "metrics") -> tuple[list[int], list[float]]:
  """Steps and values of one scalar from KIND.csv; a step logged twice (after a restart) keeps its last value."""
  values: dict[int, float] = {}
  with open(pathlib.Path(folder) / f"{kind}.csv", newline="") as file:
    for row in csv.reader(file):
      if len(row) == 3 and row[1] == name:
        values[int(row[0])] = float(row[2])
  return sorted(values), [values[s] for s in sorted(values)]
