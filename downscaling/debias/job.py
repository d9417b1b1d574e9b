"""The `debias` job: fits every map that was asked for, saves each as data, and carries held-out rows over by all."""

import pathlib
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from downscaling.common import mesh as meshes
from downscaling.common import runs
from downscaling.debias import maps as maps_room
from downscaling.debias import transport

FEW = 0.01  # of the rows may lie outside the fit before it is said: the largest of n rows is passed by about one in n
Evaluators = Mapping[str, Callable[[np.ndarray, np.ndarray], Mapping[str, float]]]


def debias(
  folder: pathlib.Path,
  source: np.ndarray,
  target: np.ndarray,
  held_out: np.ndarray,
  *,
  space: tuple[int, ...],
  maps: Sequence[str],
  chosen: str,
  setting: maps_room.Setting,
  evaluators: Evaluators | None = None,
) -> dict:
  """Fits (or goes on fitting) maps from `source` to `target`, saves them, maps held-out rows, writes diagnostics.

  Args:
    folder: the stage's folder. Written there: NAME/ of every map, held_out.zarr and in_sample.zarr (of as many rows, as
      floors need no more then; variable lflr and one of every map, dims row and space), and last diagnostics.json.
    source, target, held_out: [S, *space, C] float32; held-out rows are biased rows that no fit sees.
    maps: names in maps.FITS. chosen: the one of them that samples are drawn behind.
    evaluators: name -> function of (rows, mapped rows) -> metrics.
  Returns: the diagnostics. Raises: as the fits, and ValueError for arrays that are not on `space`.
  """
  began, folder = time.monotonic(), pathlib.Path(folder)
  if chosen not in maps:
    raise ValueError(f"config.debias.map={chosen!r} is not among config.debias.maps={tuple(maps)}: add it there.")
  for name, rows in (("source", source), ("target", target), ("held_out", held_out)):
    if rows.ndim != len(space) + 2 or rows.shape[1:-1] != tuple(space) or rows.shape[1:] != source.shape[1:]:
      raise ValueError(f"{name} is {rows.shape}, need [rows, {', '.join(map(str, space))}, channels] as source has.")
  transport.check_finite(held_out, "held-out rows")
  fitted, facts = {}, {}
  for name in maps:
    fitted[name], facts[name] = _fitted(name, folder / name, source, target, setting)
  if meshes.is_main():
    some = np.linspace(0, len(source) - 1, min(len(source), len(held_out))).astype(int)
    sizes = {"source": len(source), "target": len(target), "held_out": len(held_out)}
    report = {
      "map": chosen,
      "maps": facts,
      "sizes": sizes | {"dimensions": int(np.prod(source.shape[1:]))},
      "in_sample": _mapped_rows(folder / "in_sample.zarr", fitted, source[some], some, evaluators or {}),
      "held_out": _mapped_rows(folder / "held_out.zarr", fitted, held_out, None, evaluators or {}),
      "seconds": time.monotonic() - began,
    }
    runs.write_json(folder / "diagnostics.json", report)
  setting.agree("written")
  return runs.read_json(folder / "diagnostics.json")


def _fitted(name: str, folder: pathlib.Path, source, target, setting: maps_room.Setting):
  """(map, facts); a map that is there whole is not fitted again."""
  done = folder / "facts.json"
  if setting.agree((folder / "map.json").exists() and done.exists())[0]:
    return maps_room.load(folder), runs.read_json(done)
  began = time.monotonic()
  made, facts = maps_room.fit(name, folder, source, target, setting)
  if meshes.is_main():
    made.save(folder)
    runs.write_json(done, facts | {"seconds": time.monotonic() - began})
  setting.agree("saved")
  return made, runs.read_json(done)


def _mapped_rows(path: pathlib.Path, fitted: Mapping, rows: np.ndarray, ids: np.ndarray | None, evaluators) -> dict:
  """Maps rows by every map, stores all beside each other, and returns the metrics of each."""
  import xarray

  single = rows.shape[-1] == 1
  dims = ("row", *("y", "x")[4 - rows.ndim :], *(() if single else ("channel",)))
  mapped = {name: each(rows) for name, each in fitted.items()}
  fields = {k: np.asarray(v[..., 0] if single else v, np.float32) for k, v in ({"lflr": rows} | mapped).items()}
  data = xarray.Dataset({k: (dims, v) for k, v in fields.items()}, {} if ids is None else {"row": ids})
  for name in fields:
    data[name].attrs["long_name"] = "biased coarse field" if name == "lflr" else f"debiased coarse field, map {name}"
  chunks = {k: {"chunks": (min(1024, len(rows)), *v.shape[1:])} for k, v in fields.items()}
  data.to_zarr(path, mode="w", zarr_format=3, consolidated=False, encoding=chunks)
  report: dict = {"rows": len(rows)}
  for name, values in mapped.items():
    report[name] = {key: dict(evaluate(rows, values)) for key, evaluate in evaluators.items()}
    report[name]["rows_outside_the_fit"] = count = int(fitted[name].outside(rows).sum())
    if count > FEW * len(rows):
      runs.say(
        f"debias: {count} of {len(rows)} rows of {path.name} lie outside what map {name} was fitted on, and are "
        "extrapolated: is it the same model, unit and season? More config.debias.points may help."
      )
  return report
