"""Metrics of a run in TensorBoard events and CSV files."""

import csv
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping

import numpy as np

from downscaling.runtime import files, trackers
from downscaling.runtime import mesh as meshes
from downscaling.runtime.remote_paths import RemotePath

EVENTS = "events.out.*"
SEND = 60.0  # seconds between two times that events are sent to an object store


class MetricWriter:
  """Writes numbers, texts and images to TensorBoard, and numbers to CSV files (step, name, value).

  metrics.csv holds what the run computes. It is the same however often the run was interrupted:
  rows after the step from which a run resumes are dropped. speed.csv holds rates and shares of
  time, which differ from run to run. Only the main process writes. On an object store the CSV files
  are sent whole after every write, so that a checkpoint never has more steps than they; events are
  sent every SEND seconds.

  Args:
    folder: the stage's folder.
    after: the step from which the run resumes; 0 for a new run.
    evaluated: False if that step was not evaluated yet.
    tracker: () -> a tracker that is told the same numbers (trackers.py), or None.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    after: int = 0,
    evaluated: bool = True,
    tracker: Callable[[], trackers.Tracker | None] = lambda: None,
  ):
    self.folder = files.as_path(folder)
    self._board = None
    self._sent = time.monotonic()
    if not meshes.is_main():
      return
    self._tracker = tracker()
    from tensorboardX import SummaryWriter

    self.folder.mkdir(parents=True, exist_ok=True)
    self._here = self.folder
    if isinstance(self.folder, RemotePath):
      self._temporary = tempfile.TemporaryDirectory()
      self._here = pathlib.Path(self._temporary.name)
    self._board = SummaryWriter(str(self._here), purge_step=after + 1)
    self._files = {}
    for name in ("metrics", "speed"):
      path = self._here / f"{name}.csv"
      _keep_rows(self.folder / path.name, path, after, evaluated)
      self._files[name] = open(path, "a", newline="")  # noqa: SIM115 - closed by close()

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    """Appends {name: value} to metrics.csv and TensorBoard."""
    self._write("metrics", step, scalars)

  def write_speed(self, step: int, scalars: Mapping[str, float]) -> None:
    """Appends {name: value} to speed.csv and, as speed/name, to TensorBoard."""
    self._write("speed", step, scalars)

  def _write(self, kind: str, step: int, scalars: Mapping[str, float]) -> None:
    if self._board is None:
      return
    rows = csv.writer(self._files[kind])
    for name, value in scalars.items():
      self._board.add_scalar(
        f"speed/{name}" if kind == "speed" else name, float(value), step
      )
      rows.writerow([step, name, repr(float(value))])
    self._files[kind].flush()
    self._send(f"{kind}.csv")
    if time.monotonic() - self._sent > SEND:
      self._send(EVENTS)
    if self._tracker:
      before = "speed/" if kind == "speed" else ""
      self._tracker.log(
        step, {f"{before}{name}": float(v) for name, v in scalars.items()}
      )

  def _send(self, pattern: str) -> None:
    """Files whose names match, to an object store."""
    if isinstance(self.folder, RemotePath):
      if pattern == EVENTS and self._board:
        self._board.flush()
        self._sent = time.monotonic()
      files.copy(self._here, self.folder, self._here.glob(pattern))

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """Adds images {name: [height, width, 3] uint8} to TensorBoard."""
    if self._board is None:
      return
    for name, image in images.items():
      self._board.add_image(name, image, step, dataformats="HWC")

  def write_text(self, name: str, text: str) -> None:
    """Adds a text to TensorBoard."""
    if self._board:
      self._board.add_text(name, text, 0)

  def close(self) -> None:
    """Closes all files."""
    if self._board:
      self._send(EVENTS)
      self._board.close()
      for file in self._files.values():
        file.close()
      if self._tracker:
        self._tracker.close()


def _keep_rows(
  old: pathlib.Path, path: pathlib.Path, after: int, evaluated: bool
) -> None:
  """Takes over the rows of a file, but those that a killed run wrote after the resumed step, and a
  row cut in half. old: the file; path: the new one, which may be the same.
  """
  if not old.exists():
    return

  def stays(row):
    if len(row) != 3 or not row[0].isdigit():
      return False
    step = int(row[0])
    if evaluated or "/" not in row[1]:
      return step <= after
    return step < after  # an evaluation at the resumed step is made again

  with (
    old.open(newline="") as rows,
    files.all_or_nothing(path, "w", newline="") as new,
  ):
    csv.writer(new).writerows(row for row in csv.reader(rows) if stays(row))


def read_scalars(
  folder: str | os.PathLike, name: str, kind: str = "metrics"
) -> tuple[list[int], list[float]]:
  """Steps and values of one scalar from KIND.csv.

  A step that was logged twice (after a restart) keeps its last value.
  """
  values: dict[int, float] = {}
  with (files.as_path(folder) / f"{kind}.csv").open(newline="") as file:
    for row in csv.reader(file):
      if len(row) == 3 and row[1] == name:
        values[int(row[0])] = float(row[2])
  return sorted(values), [values[s] for s in sorted(values)]
