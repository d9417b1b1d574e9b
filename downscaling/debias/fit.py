"""The `debias` job: fits every map that was asked for, saves each as data, and carries held-out
rows over by all.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from downscaling.debias import bias_symmetry, health
from downscaling.debias import maps as maps_room
from downscaling.debias.entropic import entropic_map
from downscaling.runtime import files, progress, stores
from downscaling.runtime import mesh as meshes

# of the rows may lie outside the fit before it is said: the largest of n rows is passed by about
# one in n
FEW = 0.01
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
  trajectories: tuple[np.ndarray | None, np.ndarray | None] = (None, None),
  in_sample: np.ndarray | None = None,
  calibration: np.ndarray | None = None,
) -> dict:
  """Fits (or goes on fitting) maps from `source` to `target`, saves them, maps held-out rows,
  writes diagnostics.

  Args:
    folder: the stage's folder. Written there: NAME/ of every map, held_out.zarr, in_sample.zarr
      and, if there are such rows, calibration.zarr (variable lflr and one of every map, dims row
      and space), and last diagnostics.json.
    source, target, held_out: [S, *space, C] float32; held-out rows are biased rows that no fit
      sees.
    maps: names in maps.FITS. chosen: the one of them that samples are drawn behind.
    setting: its group is the equation's; bias_symmetry.py finds which subgroup
      of it maps use.
    evaluators: name -> function of (rows, mapped rows) -> metrics.
    trajectories: of the rows of source and target, [S] and [R], which are the units of a test;
      None: not known.
    in_sample: which source rows are mapped for in_sample.zarr, ascending; None: as many as are held
      out, evenly spread.
    calibration: [S, *space, C], biased rows that no fit sees and nothing is judged by, or None.
  Returns: the diagnostics. Raises: as the fits, and ValueError for arrays that are not on `space`,
    for rows that cannot be meant (see health.py), and for a chosen map that carries no information.
  """
  began, folder = time.monotonic(), files.as_path(folder)
  if chosen not in maps:
    raise ValueError(
      f"config.debias.map={chosen!r} is not among config.debias.maps={tuple(maps)}: add it there."
    )
  clouds = {"source": source, "target": target, "held_out": held_out}
  if calibration is not None:
    clouds["calibration"] = calibration
  for name, rows in clouds.items():
    if (
      rows.ndim != len(space) + 2
      or rows.shape[1:-1] != tuple(space)
      or rows.shape[1:] != source.shape[1:]
    ):
      raise ValueError(
        f"{name} is {rows.shape}, need [rows, {', '.join(map(str, space))}, channels] as source "
        "has."
      )
  for name, rows in clouds.items():
    entropic_map.check_finite(
      rows, "held-out rows" if name == "held_out" else f"{name} rows"
    )
  findings = health.of_rows(clouds, ("source", "target"), setting.outlier)
  health.refuse(findings)
  setting, said = _with_group(setting, source, target, space, trajectories)
  findings += said
  if meshes.is_main():
    # Before the fits: one of them may fail for what it says.
    health.tell(findings, progress.say)
  of_rows = len(findings)
  fitted, facts = {}, {}
  for name in maps:
    fitted[name], facts[name] = _fitted(name, folder / name, source, target, setting)
  # All of it is made again by the next job.
  with setting.interruptible("mapping held-out rows"):
    if meshes.is_main():
      if in_sample is None:
        in_sample = np.linspace(
          0, len(source) - 1, min(len(source), len(held_out))
        ).astype(int)
      stores = {
        "in_sample": source[in_sample],
        "held_out": held_out,
        "calibration": calibration,
      }
      mapped = {}
      for name, rows in stores.items():
        if rows is not None:
          ids = in_sample if name == "in_sample" else None
          mapped[name] = _mapped_rows(folder / f"{name}.zarr", fitted, rows, ids)
      inflated = health.inflating({"source": source, "target": target})
      for name in maps:
        of_map = (
          mapped["held_out"][name],
          mapped["in_sample"][name],
          target,
          name == chosen,
        )
        findings += health.of_map(name, facts[name], *of_map, inflated)
      sizes = {"source": len(source), "target": len(target), "held_out": len(held_out)}
      report = {
        "map": chosen,
        "maps": facts,
        "sizes": sizes | {"dimensions": int(np.prod(source.shape[1:]))},
        "group": {"name": setting.subgroup, "elements": len(setting.group)},
        "health": findings,
        **{
          name: _measured(name, fitted, stores[name], mapped[name], evaluators or {})
          for name in ("in_sample", "held_out")
        },
        "seconds": time.monotonic() - began,
      }
      health.tell(findings[of_rows:], progress.say)
      files.write_json(folder / "diagnostics.json", report)
    setting.agree("written")
  report = files.read_json(folder / "diagnostics.json")
  health.refuse(report["health"])
  return report


def _with_group(setting: maps_room.Setting, source, target, space, trajectories):
  """(the setting with the group that maps use, findings)."""
  known = bias_symmetry.subgroups(setting.group, space)
  bias_symmetry.check_name(setting.subgroup, setting.group, space)
  verdicts = []
  if len(setting.group) > 1 and source.shape[-1] == 1:
    verdicts = bias_symmetry.largest(
      source[..., 0], target[..., 0], setting.group, trajectories
    )
  used = setting.subgroup
  if used == bias_symmetry.AUTO:
    used = setting.agree(verdicts[-1].name if verdicts else bias_symmetry.FULL)[0]
  points = int(np.prod(source.shape[1:]))
  findings = health.of_group(verdicts, used)
  findings.append(
    health.of_size(
      min(len(source), len(target)),
      points,
      len(known[used]),
    )
  )
  return dataclasses.replace(setting, group=known[used], subgroup=used), findings


def _fitted(
  name: str, folder: pathlib.Path, source, target, setting: maps_room.Setting
):
  """(map, facts); a map that is there whole is not fitted again."""
  done = folder / "facts.json"
  parts = (done, folder / "map.json", folder / "arrays.npz")
  if setting.agree(all(part.exists() for part in parts))[0]:
    return maps_room.load(folder), files.read_json(done)
  began = time.monotonic()
  made, facts = maps_room.fit(name, folder, source, target, setting)
  if meshes.is_main():
    made.save(folder)
    files.write_json(done, facts | {"seconds": time.monotonic() - began})
  setting.agree("saved")
  return made, files.read_json(done)


def _mapped_rows(
  path: pathlib.Path, fitted: Mapping, rows: np.ndarray, ids: np.ndarray | None
) -> dict:
  """Maps rows by every map, stores all beside each other, and returns {map: mapped rows}; ids: of
  source rows.
  """
  import xarray

  single = rows.shape[-1] == 1
  dims = ("row", *("y", "x")[4 - rows.ndim :], *(() if single else ("channel",)))
  mapped = {name: each(rows) for name, each in fitted.items()}
  fields = {
    k: np.asarray(v[..., 0] if single else v, np.float32)
    for k, v in ({"lflr": rows} | mapped).items()
  }
  about = {"long_name": "row of the fit"}
  data = xarray.Dataset(
    {k: (dims, v) for k, v in fields.items()},
    {} if ids is None else {"row": ("row", ids, about)},
  )
  for name in fields:
    data[name].attrs["long_name"] = (
      "biased coarse field" if name == "lflr" else f"debiased coarse field, map {name}"
    )
  chunks: dict[str, dict] = {
    k: {
      "chunks": (min(1024, len(rows)), *v.shape[1:]),
      "compressors": stores.CHECKED,
    }
    for k, v in fields.items()
  }
  if ids is not None:
    chunks["row"] = {"compressors": stores.CHECKED}
  data.to_zarr(
    stores.store(path), mode="w", zarr_format=3, consolidated=False, encoding=chunks
  )
  return mapped


def _measured(
  store: str, fitted: Mapping, rows: np.ndarray, mapped: Mapping, evaluators
) -> dict:
  """The metrics of the mapped rows of one store."""
  report: dict = {"rows": len(rows)}
  for name, values in mapped.items():
    report[name] = {
      key: dict(evaluate(rows, values)) for key, evaluate in evaluators.items()
    }
    report[name]["rows_outside_the_fit"] = count = int(fitted[name].outside(rows).sum())
    if count > FEW * len(rows):
      progress.say(
        f"debias: {count} of {len(rows)} rows of {store}.zarr lie outside what map {name} was "
        "fitted on, and are extrapolated: is it the same model, unit and season? More "
        "config.debias.points may help."
      )
  return report
