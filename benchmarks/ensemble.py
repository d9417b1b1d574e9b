"""What the ensemble store costs: speed of writing, its share of wall time, and memory as an
ensemble grows.

  python benchmarks/ensemble.py [--folder=DIR]

Takes two minutes on a laptop. DIR lies on the disk that counts.

The device is a pretended one, which draws incompressible noise in a known time while the host is
free, as an accelerator would.

1. Writing: units that cost nothing to draw, against the same blocks written by TensorStore alone
   into an equal array, in MB/s. A unit is synced to disk in both.
2. Share: by how much the whole takes longer than the drawing alone, first unit to last marker;
   beside it, what writing would add if nothing overlapped.
3. Memory: peak of a process that draws 1, 4 and 16 times as much.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from downscaling.runtime import provenance
from downscaling.sampling import ensemble, ensemble_store, ensemble_units


def noise(points, rows=64):
  """[rows, points, points] of white noise: the worst that compression can meet."""
  return np.random.default_rng(0).normal(size=(rows, points, points)).astype(np.float32)


class Drawn:
  """A unit on a pretended device that is asleep until `ready`: what an array of jax is to the host
  meanwhile.
  """

  def __init__(self, block, ready):
    self.block, self.ready = block, ready

  def copy_to_host_async(self):
    pass  # it begins by itself

  def __array__(self, dtype=None, copy=None):
    time.sleep(max(0.0, self.ready - time.monotonic()))
    return self.block


class Device:
  """In the place of a compiled program: units one after the other, `seconds` each; the host is
  free.
  """

  def __init__(self, points, rows, seconds):
    self.table, self.rows, self.seconds, self.free = (
      noise(points),
      np.arange(rows),
      seconds,
      0.0,
    )

  def __call__(self, condition_ids, *_):
    self.free = max(self.free, time.monotonic()) + self.seconds
    first = int(condition_ids[0])
    return {
      "sample": Drawn(self.table[(self.rows + first) % len(self.table)], self.free)
    }


def draw(path, points, conditions, unit, seconds=0.0):
  """Draws an ensemble on the pretended device; returns the seconds from the first unit on."""
  began = []

  def stop():
    began.append(time.monotonic())
    return False

  ensemble.compiled = lambda *_: [Device(points, unit[0] * unit[1], seconds)]
  ensemble.write_ensemble(
    path, conditions=np.zeros((conditions, 4, 4, 1), np.float32), members=unit[1],
    space=(points, points), unit=unit,
    sampler=lambda keys, y: jnp.zeros((len(keys), points, points, 1)), devices=jax.devices()[:1],
    seed=0, identity={},
    attrs={}, stop=stop,
  )  # fmt: skip
  return time.monotonic() - began[0]


def raw(path, points, conditions, unit):
  """Seconds of TensorStore alone, unit after unit, each waited for."""
  options = dict(
    conditions=conditions,
    members=unit[1],
    space=(points, points),
    channels=1,
    coarse=None,
    unit=unit,
  )
  layout = ensemble.Layout(**options)
  ensemble_store.create(path, layout, {}, {}, {"sample": {}})
  array = ensemble_units.array_of(path, "sample")
  table = noise(points)
  block = table[np.arange(unit[0] * unit[1]) % len(table)].reshape(
    *unit, points, points
  )
  began = time.monotonic()
  for u in layout.units():
    array[u.c0 : u.c1, u.m0 : u.m1].write(block[: u.c1 - u.c0]).result()
  return time.monotonic() - began


def writing(folder, points, units, unit):
  conditions = units * unit[0]
  size = conditions * unit[1] * points**2 * 4 / 1e6
  ours, theirs = [], []
  for turn in range(3):
    theirs.append(
      size / raw(folder / f"raw-{points}-{turn}.zarr", points, conditions, unit)
    )
    ours.append(
      size / draw(folder / f"ours-{points}-{turn}.zarr", points, conditions, unit)
    )
  ours, theirs = np.median(ours), np.median(theirs)
  print(
    f"{points:4}²  {size:7.0f} MB  {theirs:7.0f} MB/s raw  {ours:7.0f} MB/s ours  ratio "
    f"{ours / theirs:.2f}"
  )
  return theirs


def share(folder, points, units, unit, milliseconds, speed):
  seconds = unit[0] * unit[1] * milliseconds / 1e3
  took = draw(folder / f"share-{points}.zarr", points, units * unit[0], unit, seconds)
  bytes_ = unit[0] * unit[1] * points**2 * 4
  alone = bytes_ / 1e6 / speed / seconds
  over = took / (units * seconds) - 1
  print(
    f"{points:4}²  {milliseconds:g} ms a field  {100 * over:5.1f} % on top  {100 * alone:5.1f} % "
    "if one after the other"
  )


def peak(folder, points, units, unit):
  """MB, of a process of its own."""
  store = folder / f"peak-{units}.zarr"
  code = (
    f"import sys; sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})\n"
    "import ensemble, pathlib\n"
    f"store = pathlib.Path({str(store)!r})\n"
    f"ensemble.draw(store, {points}, {units * unit[0]}, {unit})\n"
    "status = open('/proc/self/status').read().splitlines()\n"
    "print(next(line.split()[1] for line in status if line.startswith('VmHWM')))\n"
  )
  done = subprocess.run(
    [sys.executable, "-W", "ignore", "-c", code],
    capture_output=True,
    text=True,
    check=True,
  )
  return float(done.stdout.split()[-1]) / 1e3


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--points",
    default="64,256",
    help="points an axis of the fields, several with commas",
  )
  parser.add_argument("--units", type=int, default=24, help="units of an ensemble")
  parser.add_argument("--megabytes", type=float, default=16.0, help="of a unit")
  parser.add_argument(
    "--milliseconds",
    type=float,
    default=0.5,
    help="that a field of 64² takes to draw; by points",
  )
  parser.add_argument("--folder", help="where to write; a temporary folder by default")
  args = parser.parse_args()
  with tempfile.TemporaryDirectory(dir=args.folder) as name:
    folder, speeds = pathlib.Path(name), {}
    cases = {}
    for points in map(int, args.points.split(",")):
      members = 8
      cases[points] = (
        max(1, round(args.megabytes * 1e6 / (members * points**2 * 4))),
        members,
      )
    print(
      f"1. writing, {args.units} units of {args.megabytes:g} MB, median of 3; commit "
      f"{provenance.commit()}"
    )
    for points, unit in cases.items():
      speeds[points] = writing(folder, points, args.units, unit)
    print("2. share of wall time")
    for points, unit in cases.items():
      share(
        folder,
        points,
        args.units,
        unit,
        args.milliseconds * (points / 64) ** 2,
        speeds[points],
      )
    points, (conditions, members) = next(iter(cases.items()))
    unit = max(1, conditions // 4), members
    print(
      f"3. peak memory, fields of {points}², {args.units} units of {args.megabytes / 4:g} MB and "
      "more"
    )
    peaks = [peak(folder, points, n * args.units, unit) for n in (1, 4, 16)]
    print(
      "  ".join(
        f"{n:2}× {p:.0f} MB ({p / peaks[0]:.2f})"
        for n, p in zip((1, 4, 16), peaks, strict=True)
      )
    )


if __name__ == "__main__":
  main()
