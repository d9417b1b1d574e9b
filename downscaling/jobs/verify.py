"""`downscaling verify WORKDIR [--repair]`: is every file what was written there?

It reads all files of all stages below a folder and compares their digests with the markers. Each
fault comes with what to type. With --repair it

- rebuilds a lost or damaged marker from its copy, if the copy's digests are those of the files;
- moves a damaged file aside, as NAME.damaged, and marks its stage unfinished, so that the stage's
  job makes that file again and nothing else;
- gives a stage that an older version finished the digests of its files as they are now.

Nothing is deleted.
"""

import dataclasses
import pathlib
from collections.abc import Iterator

from downscaling import jobs
from downscaling.runtime import checkpoints, files, locks, products, stage_folder
from downscaling.sampling import drawers, ensemble_store, ensemble_units

# Which job makes a stage. The stage of one set of samples is named after its job.
MAKES = {job.stage: job.name for job in jobs.JOBS.values()}


@dataclasses.dataclass(frozen=True)
class Fault:
  """what: the file and what is wrong with it. advice: what to type, or what was done."""

  what: str
  advice: str
  mended: bool = False

  def __str__(self) -> str:
    return f"{'MENDED' if self.mended else 'FIX'} {self.what}: {self.advice}"


def verify(folder: pathlib.Path, repair: bool = False) -> tuple[str, bool]:
  """(the report, True if nothing is left to mend) of all stages in a folder and below.

  Raises: FileNotFoundError if there is no stage; with `repair`, locks.Held if a job is at work.
  """
  stages = sorted(
    {p.parent for name in (products.MARKER, products.COPY) for p in folder.rglob(name)}
  )
  if not stages:
    raise FileNotFoundError(
      f"{folder} holds no stage of a run (no {products.MARKER} in it or below): give the --workdir "
      "of a job."
    )
  lines, well = [], True
  for stage in stages:
    faults = [*_Stage(stage, repair).faults()]
    lines.append(f"{stage}: {'whole' if not faults else f'{len(faults)} fault(s)'}")
    lines += [f"  {fault}" for fault in faults]
    well &= all(fault.mended for fault in faults)
  return "\n".join(lines), well


class _Stage:
  """One stage's folder, while it is looked at."""

  def __init__(self, folder: pathlib.Path, repair: bool):
    self.folder, self.repair = folder, repair
    self.again = "move its folder away and run its job again"

  def faults(self) -> Iterator[Fault]:
    """All of them, mended where that can be."""
    if self.repair:
      drawers.refuse(self.folder, self.folder)
      with locks.hold(self.folder / products.LOCK, str(self.folder)):
        yield from self._look()
    else:
      yield from self._look()

  def _look(self) -> Iterator[Fault]:
    record, faults = self._marker()
    yield from faults
    if record is None:
      return
    job = MAKES.get(str(record.get("stage")), "sample")
    self.again = f"run `downscaling {job}` with the run's --config and --workdir"
    if record.get("complete") and "products" not in record:
      yield self._adopt(record)
    wrong = self._wrong(record)
    for path, what in wrong.items():
      yield self._set_aside(path, what)
    for path in sorted(self.folder.glob("checkpoints/*")):
      fault = path.is_dir() and path.name.isdigit() and checkpoints.fault(path)
      if fault:
        advice = (
          "a run that goes on takes the checkpoint before it; nothing need be done"
        )
        yield Fault(f"checkpoint {path}: {fault}", advice, mended=True)
    if wrong and self.repair:
      self._unfinished(self.folder)
      if self._store:
        self._unfinished(self.folder.parent)

  @property
  def _store(self) -> pathlib.Path | None:
    """The ensemble whose units this folder marks; None for other stages."""
    path = self.folder.with_suffix(".zarr")
    return path if self.folder.suffix == ".units" and path.exists() else None

  # ---------------------------------------------------------------- the marker

  def _marker(self) -> tuple[dict | None, list[Fault]]:
    """(what the marker says, or its copy if that is proven; faults of both)."""
    marker, why = _read(self.folder / products.MARKER)
    copy, why_copy = _read(self.folder / products.COPY)
    if marker is not None:
      if copy == marker:
        return marker, []
      if not self.repair:
        what = (
          why_copy or f"{self.folder / products.COPY} is older than {products.MARKER}"
        )
        return marker, [Fault(what, "add --repair, which writes it anew")]
      files.write_json(self.folder / products.COPY, marker)
      return marker, [
        Fault(why_copy or f"{self.folder / products.COPY}", "written anew", True)
      ]
    if copy is None:
      advice = (
        "neither it nor its copy says what the stage was made by: move its folder away"
      )
      return None, [Fault(why, advice)]
    if not self.repair:
      return copy, [Fault(why, "add --repair, which rebuilds it from its copy")]
    unlike = products.changed(self.folder, copy.get("products", {}), whole=True)
    if unlike:
      advice = f"its copy fits another state ({next(iter(unlike))}): put the files back"
      return None, [Fault(why, advice)]
    lost = self.folder / products.MARKER
    if lost.exists():
      lost.rename(lost.with_name(lost.name + products.DAMAGED))
    files.write_json(lost, copy)
    proof = (
      f"{len(copy['products'])} files agree with it"
      if "products" in copy
      else "unfinished"
    )
    return copy, [Fault(why, f"rebuilt from its copy; {proof}", True)]

  def _adopt(self, record: dict) -> Fault:
    """Digests for a stage that has none."""
    what = f"{self.folder} holds no digests: an older version finished it"
    if not self.repair:
      return Fault(
        what, "nothing need be done; --repair adds the digests of the files as they are"
      )
    told = (
      ensemble_store.fixed(self._store) if self._store else products.of(self.folder)
    )
    stage_folder.write_marker(self.folder, record | {"products": told})
    return Fault(what, f"the digests of {len(told)} files were added", True)

  def _unfinished(self, folder: pathlib.Path) -> None:
    record, _ = _read(folder / products.MARKER)
    if record is not None and record.get("complete"):
      stage_folder.write_marker(folder, record | {"complete": False})

  # ---------------------------------------------------------------- files

  def _wrong(self, record: dict) -> dict[pathlib.Path, str]:
    """{file: what is wrong} of the stage's products, or of the ensemble."""
    if self._store is None:
      told = products.changed(self.folder, record.get("products", {}), whole=True)
      return {self.folder / name: what for name, what in told.items()}
    found = {}
    for unit, wrong in ensemble_units.damaged(self._store, record, whole=True).items():
      for name, what in wrong.items():
        found[(self.folder if name == unit else self._store) / name] = what
      if unit:  # the unit is drawn again
        found.setdefault(self.folder / unit, "marks a unit that is damaged")
    return found

  def _set_aside(self, path: pathlib.Path, what: str) -> Fault:
    words = f"{path} {what}"
    if not self.repair:
      return Fault(words, f"add --repair, which moves it aside; then {self.again}")
    if path.exists():
      path.rename(path.with_name(path.name + products.DAMAGED))
    if self._store and path.name == "zarr.json":  # all metadata are then written again
      (self._store / path.name).unlink(missing_ok=True)
    return Fault(
      words, f"moved aside; {self.again}, which makes only what is missing", True
    )


def _read(path: pathlib.Path) -> tuple[dict | None, str]:
  """(a JSON file, "") or (None, why it cannot be read)."""
  try:
    return files.read_json(path), ""
  except FileNotFoundError:
    return None, f"{path} is missing"
  except (ValueError, OSError) as error:
    return None, str(error)
