"""Metrics of a run in TensorBoard events and CSV files."""

import csv
import os
import pathlib
from collections.abc import Mapping

import numpy as np

from downscaling.runtime import mesh as meshes


class MetricWriter:
  """Numbers, texts and images to TensorBoard events; numbers also to CSV files beside them (step,
  name, value).

  metrics.csv holds what a run decides, and is the same however often it was interrupted: rows after
  the step that a run goes on from are dropped. speed.csv holds rates and shares, which never
  repeat. Only the main process writes.

  Args:
    folder: of the stage.
    after: the step that the run goes on from; 0 for a new one.
    evaluated: False if the evaluation of that step is still to come.
  """

  def __init__(self, folder: str | os.PathLike, after: int = 0, evaluated: bool = True):
    self.folder = pathlib.Path(folder)
    self._board = None
    if not meshes.is_main():
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
  """Drops what a killed run wrote after the step that is gone on from, and a row it had half
  written.
  """
  if not path.exists():
    return

  def stays(row):
    known = len(row) == 3 and row[0].isdigit() and int(row[0]) <= after
    return known and (evaluated or int(row[0]) < after or "/" not in row[1])

  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  with open(path, newline="") as old, open(temporary, "w", newline="") as new:
    csv.writer(new).writerows(row for row in csv.reader(old) if stays(row))
  os.replace(temporary, path)


def read_scalars(
  folder: str | os.PathLike, name: str, kind: str = "metrics"
) -> tuple[list[int], list[float]]:
  """Steps and values of one scalar from KIND.csv; a step logged twice (after a restart) keeps its
  last value.
  """
  values: dict[int, float] = {}
  with open(pathlib.Path(folder) / f"{kind}.csv", newline="") as file:
    for row in csv.reader(file):
      if len(row) == 3 and row[1] == name:
        values[int(row[0])] = float(row[2])
  return sorted(values), [values[s] for s in sorted(values)]
