"""TFDS builders over array_record files: one example is one snapshot, and says which trajectory and
time it is from.

Read them like any TFDS data set, without TensorFlow:

  builder = Ks(config="hfhr", data_dir="runs/ks/data")
  builder.as_data_source("train")[0]  # {"u": [192, 1] float32, "trajectory": int, "time": float}

The files are written by `downscaling generate` (see generate.py), which resumes;
`download_and_prepare` says so.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from downscaling.runtime import files, mirror
from downscaling.runtime.remote_paths import RemotePath

# Splits have one use each. The coarse world has the first three.
#   train        fits the maps and the prior.
#   calibration  serves every tuned number, the error table, and the error that training follows.
#   test         is judged.
#   reference    is what judged fields are compared with.
#   floor        are more true fields: how far do true fields themselves lie from the reference?
SPLITS = ("train", "calibration", "test", "reference", "floor")
# Ids of a split's trajectories begin here: splits never share a trajectory, and enlarging one
# leaves the others alone.
FIRST_TRAJECTORY = {
  "train": 0,
  "calibration": 1_000_000_000,
  "test": 1_500_000_000,
  "reference": 1_700_000_000,
  "floor": 1_900_000_000,
}


@dataclasses.dataclass(eq=False, kw_only=True)
class FieldsConfig(tfds.core.BuilderConfig):
  """space: points an axis; channels: fields a point."""

  space: tuple[int, ...] = ()
  channels: int = 1


class FieldsBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Snapshots of gridded fields, split by trajectory."""

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES: ClassVar = {"1.0.0": "First version: u, trajectory, time."}
  about = ""

  def __init__(self, home: RemotePath | None = None, **kwargs):
    """home: the folder of data_dir on an object store, of which data_dir holds copies."""
    super().__init__(file_format="array_record", **kwargs)
    self._home = home

  @property
  def home(self) -> pathlib.Path:
    """Where the files of the data set belong."""
    here = pathlib.Path(self.data_dir)
    if self._home is None:
      return here
    return self._home / here.relative_to(pathlib.Path(self._data_dir_root).absolute())

  def pull(self, pattern: str) -> None:
    """Fetches files whose names match, if they are not on this machine as they are now."""
    if isinstance(self.home, RemotePath):
      mirror.pull(self.home, pathlib.Path(self.data_dir), pattern)

  @property
  def grid(self) -> FieldsConfig:
    """The config: which world, and on which grid."""
    assert isinstance(self.builder_config, FieldsConfig)
    return self.builder_config

  @property
  def shape(self) -> tuple[int, ...]:
    """Of a field, [*space, C]."""
    return (*self.grid.space, self.grid.channels)

  def _info(self) -> tfds.core.DatasetInfo:
    config = self.grid
    return tfds.core.DatasetInfo(
      builder=self,
      description=f"{self.about} {config.description}".strip(),
      features=tfds.features.FeaturesDict(
        {
          "u": tfds.features.Tensor(
            shape=(*config.space, config.channels), dtype=np.float32
          ),
          "trajectory": tfds.features.Scalar(dtype=np.int64),
          "time": tfds.features.Scalar(dtype=np.float32),
        }
      ),
    )

  def _split_generators(self, dl_manager):
    return {}  # asked for by TFDS and never called: see download_and_prepare

  def download_and_prepare(self, **_):
    """Raises RuntimeError: these data sets are made by a job."""
    raise RuntimeError(
      f"{self.home} holds no finished data set. These fields are simulated by a job that "
      "resumes: run `downscaling generate --config=... --workdir=...`."
    )

  def _generate_examples(self, ids: np.ndarray, times: np.ndarray, fields: np.ndarray):
    """(key, example) of every snapshot of fields [T, S, *space, C], trajectory by trajectory."""
    for trajectory, series in zip(ids, fields, strict=True):
      for snapshot, (time, u) in enumerate(zip(times, series, strict=True)):
        yield (
          f"{trajectory}-{snapshot}",
          {"u": u, "trajectory": int(trajectory), "time": float(time)},
        )


class Ks(FieldsBuilder):
  """Kuramoto–Sivashinsky snapshots; see equations/ks.py."""

  about = "u_t + u u_x + u_xx + u_xxxx = 0 on a periodic line of length 64."
  BUILDER_CONFIGS: ClassVar = [
    FieldsConfig(
      name="hfhr", description="High fidelity: pseudo-spectral.", space=(192,)
    ),
    FieldsConfig(
      name="lflr", description="Low fidelity, biased: finite-volume.", space=(24,)
    ),
  ]


class Kolmogorov(FieldsBuilder):
  """Vorticity of the Kolmogorov flow; see equations/kolmogorov.py."""

  about = (
    "Turbulence forced by sin 4y on the periodic plane [0, 2π)²: vorticity (y, x)."
  )
  BUILDER_CONFIGS: ClassVar = [
    FieldsConfig(
      name="hfhr", description="High fidelity: pseudo-spectral.", space=(256, 256)
    ),
    FieldsConfig(
      name="lflr", description="Low fidelity, biased: finite-volume.", space=(32, 32)
    ),
  ]


BUILDERS = {"ks": Ks, "kolmogorov": Kolmogorov}


def make(
  name: str,
  which: str,
  data_dir: str | os.PathLike,
  space: tuple[int, ...],
  channels: int = 1,
):
  """The builder of one data set, on the grid of this run.

  Args:
    name: of the equation.
    which: "hfhr" or "lflr".
    data_dir: where NAME/WHICH/VERSION lies.
    space, channels: the grid.
  Returns: a builder; of an equation without a class here, one of a class made for it.
  """
  cls = BUILDERS.get(name) or _class_of(name)
  config = {c.name: c for c in cls.BUILDER_CONFIGS}[which]
  if (config.space, config.channels) != (
    tuple(space),
    channels,
  ):  # another data set, under its own name
    name = f"{which}-{'x'.join(map(str, space))}"
    config = dataclasses.replace(
      config, name=name, space=tuple(space), channels=channels
    )
  folder = files.folder(data_dir)
  if not isinstance(folder, RemotePath):
    return cls(config=config, data_dir=str(folder))
  made = functools.partial(
    cls, home=folder, config=config, data_dir=str(mirror.place(folder))
  )
  made().pull("*.json")
  return made()  # TFDS reads them when it makes a builder


def _class_of(name: str) -> type[FieldsBuilder]:
  """A builder class for an equation that has none. TFDS names the data set after its class."""
  configs = [FieldsConfig(name=which, description=which) for which in ("hfhr", "lflr")]
  made = type(
    name.capitalize(), (FieldsBuilder,), {"BUILDER_CONFIGS": configs, "about": name}
  )
  BUILDERS[name] = made
  return made


def source(builder: FieldsBuilder, split: str, at_least: int = 1):
  """Random-access source of one split.

  Raises:
    FileNotFoundError: the data set is not finished.
    ValueError: the split has fewer snapshots than `at_least`, or a file of it is damaged.
  """
  if not builder.info.initialized:
    raise FileNotFoundError(
      f"{builder.home} has no dataset_info.json: the data set is missing or half made. Run "
      "`downscaling generate` with the same --config and --workdir; it goes on where it stopped."
    )
  have = builder.info.splits[split].num_examples if split in builder.info.splits else 0
  if have < at_least:
    raise ValueError(
      f"{builder.home} has {have} {split} snapshots, {at_least} are needed: raise config.data "
      "(trajectories or snapshots) and generate into another --workdir, or ask for fewer."
    )
  builder.pull(f"*-{split}.array_record-*")
  try:
    # TFDS decorates the method so that its types lose its arguments.
    return builder.as_data_source(split)  # pyright: ignore[reportCallIssue]
  except Exception as error:  # array_record raises its own kinds for a truncated file
    raise ValueError(
      f"{builder.home} split {split} cannot be read ({error}): generate it anew elsewhere."
    ) from error


def spread(trajectories: int, snapshots: int) -> np.ndarray:
  """All rows of a split in an order whose beginnings are spread out: one of every trajectory, then
  another of each.

  Rows lie in the order of their trajectories, and of time within; a beginning runs through the
  times as well.
  """
  turn, trajectory = np.divmod(np.arange(trajectories * snapshots), trajectories)
  return trajectory * snapshots + (turn + trajectory) % snapshots


def balanced(trajectories: int, snapshots: int, count: int) -> np.ndarray:
  """Row numbers [count] of a split, ascending: equally many of every trajectory and of every time,
  to within one.

  Rows lie by trajectory, and by time within. A field's law may change with time (KS is a transient
  for a while), and neighbours of a trajectory are alike, so a set that is judged or compared holds
  as much of each.

  Raises: ValueError if the split has fewer rows, or count is below 1.
  """
  have = trajectories * snapshots
  if not 1 <= count <= have:
    raise ValueError(
      f"{count} rows of {trajectories} trajectories of {snapshots} snapshots: 1 to {have} can be "
      "had."
    )
  whole, rest = divmod(count, trajectories)
  taken = np.zeros((trajectories, snapshots), bool)
  for turn in range(whole):
    taken[np.arange(trajectories), (np.arange(trajectories) + turn) % snapshots] = True
  times, unused = taken.sum(axis=0), np.ones(trajectories, bool)
  for wanted in np.arange(rest) * trajectories / max(rest, 1):
    rarest = int(np.argmin(times))
    free = np.flatnonzero(unused & ~taken[:, rarest])
    nearest = free[np.argmin(np.abs(free - wanted))]
    taken[nearest, rarest], unused[nearest] = True, False
    times[rarest] += 1
  return np.flatnonzero(taken)


def load(
  builder: FieldsBuilder,
  split: str,
  count: int | None = None,
  index: np.ndarray | None = None,
  view: Callable = lambda source: source,
) -> dict[str, np.ndarray]:
  """Snapshots of a split as arrays: {"u": [S, *space, C] float32, "trajectory": [S], "time": [S]}.

  Args:
    builder, split: which.
    count: how many, `balanced` over the builder's trajectories and times; None for all.
    index: instead, which rows.
    view: source -> another one to take them from, as windows.view.
  Raises: ValueError if there are fewer, or a value is not finite (file and trajectory are named).
  """
  data = view(source(builder, split, len(index) if index is not None else count or 1))
  if index is None:
    snapshots = _rows_a_trajectory(data)
    index = balanced(len(data) // snapshots, snapshots, count or len(data))
  rows = data.__getitems__(index.tolist())
  out = {
    k: np.stack([np.asarray(r[k]) for r in rows]) for k in ("u", "trajectory", "time")
  }
  finite = np.isfinite(out["u"]).reshape(len(rows), -1).all(1)
  if not finite.all():
    bad = int(np.argmin(finite))
    raise ValueError(
      f"{builder.home} split {split}: trajectory {out['trajectory'][bad]} at time "
      f"{out['time'][bad]:g} holds NaN or infinity ({int((~finite).sum())} of {len(rows)} "
      "snapshots). Generate anew in another --workdir."
    )
  return out


def _rows_a_trajectory(data) -> int:
  """How many rows each trajectory of a source has: those before the first of another one."""
  first = int(data[0]["trajectory"])
  # Rows below `low` are of the first trajectory, row `high` is not.
  low, high = 1, len(data)
  while low < high:
    middle = (low + high) // 2
    if int(data[middle]["trajectory"]) == first:
      low = middle + 1
    else:
      high = middle
  return low
