"""The `sample` job's core: a work list of (condition block × member block), drawn by all processes
into one store.

One device draws one unit, always. Units are dealt out one by one to whichever process asks next,
and each hands them to its own devices in turn and writes them. Processes agree at the start on what
is missing, at the end that it is there, and when told to stop; hosts may be of different speed; a
restart on any topology does exactly what is missing.

Jobs that know nothing of each other may fill one store, as the tasks of a Slurm array. A lock is
held only while the store is made or grows. Each job then walks through what is missing from a place
of its own, and passes over units whose marker has appeared. A unit that two jobs draw at the same
time is drawn twice, with the same bytes.

Every device runs the same program, compiled for one device: the bits of a unit do not depend on how
many there are, if they are of one kind. A unit split over devices would have float32 sums in
another order on each number of them. One program over all devices of a process, a unit on each and
no communication, would not do either: where there are several partitions, XLA simplifies a program
before it partitions it, and then otherwise; fields of KS differ by 1e-6 from those of one device.
The price is one compilation a device, and that a unit must fit a device. Nothing would be won by
larger units: fields are independent of each other.

Member m of condition c has the key fold_in(fold_in(key(seed, "ensemble"), c), m), of no device,
unit or order. A sampler in which the members of a condition act on each other sees one block of
unit[1] members of it at a time, the last one filled up with members beyond the ensemble: that block
is what can be drawn again alone (`block`, `keys`). Each device holds two units and the host two of
each device, however large the ensemble.
"""

import collections
import concurrent.futures
import contextlib
import functools
import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from downscaling.runtime import (
  files,
  ledger,
  locks,
  processes,
  progress,
  random_keys,
  supervision,
)
from downscaling.sampling import (
  conditional_sampler,
  drawers,
  ensemble_store,
  ensemble_units,
)
from downscaling.sampling.ensemble_store import Coordinates, Layout, Unit
from downscaling.sampling.ensemble_units import read

__all__ = [
  "Layout",
  "Unit",
  "block",
  "compiled",
  "keys",
  "layout_of",
  "program",
  "read",
  "write_ensemble",
]

Sampler = Callable[
  ..., Any
]  # (keys [B], conditions or None[, weights]) -> fields, or (fields, misfit [B])

_SAY_DONE_SECONDS = 20.0  # between rewrites of the attribute done_fraction
MISFIT = {
  "long_name": "chi-squared of the misfit to the condition; 1 is what the prior expects",
  "units": "1",
  "comment": (
    "NaN: no misfit is known. Infinity: the member failed, and its field is NaN throughout."
  ),
}


def write_ensemble(
  path: pathlib.Path,
  *,
  conditions: np.ndarray | None,
  members: int,
  sampler: Sampler,
  space: tuple[int, ...],
  channels: int = 1,
  unit: tuple[int, int],
  devices: Sequence[Any],
  seed: int,
  identity: Mapping,
  attrs: Mapping[str, str],
  stop: Callable[[], bool],
  condition_ids: np.ndarray | None = None,
  coordinates: Coordinates | None = None,
  sample_attrs: Mapping[str, str] | None = None,
  weights: Any = None,
  interruptible: Callable[
    [str], contextlib.AbstractContextManager
  ] = contextlib.nullcontext,
  frames: int = 1,
  max_failed: float = 0.0,
  stored: Mapping[str, Any] | None = None,
  any_device: bool = False,
) -> dict:
  """Draws what is missing of the ensemble and returns its summary.

  The summary holds units, fields, failed (members), seconds, and drawn (units, by all processes).
  Every process of a job calls it alike.

  A member whose field is not finite has failed: the sampler ran away. Its field is stored as NaN
  throughout and its misfit as infinity, and the ensemble goes on, unless more than a share
  `max_failed` of all its members have failed.

  Args:
    path: NAME.zarr; made if absent, continued if it is ours, and made larger if there are more
      conditions (behind those that it has) or members.
    conditions: coarse fields [K, *coarse, C], in the units `sampler` takes; None for an
      unconditional ensemble (K = 1).
    members: M, samples of each condition.
    sampler: pure and jittable, (keys [B], conditions [B, *coarse, C] or None[, weights]) -> fields
      [B, *space, C] or (fields, misfit [B]). B = conditions × members of a unit, the members of a
      condition adjacent.
    space, channels: of a drawn field.
    unit: conditions × members drawn by one device in one call and written as one shard.
    devices: this process's; each draws units of its own.
    seed: of the whole ensemble.
    identity: what else the samples depend on (config blocks, checkpoint step): plain values.
    attrs: global attributes (title, config_hash, ...); Conventions, history and done_fraction are
      added.
    stop: polled before every unit; once true the units in flight are finished and
      supervision.Interrupted raised.
    condition_ids: [K] ids >= 0 that enter the keys and the coordinate; 0, 1, ... by default.
    coordinates: name (x, y, x_coarse, y_coarse) -> (values, attributes); point numbers by default.
    sample_attrs: units, long_name, ... of the variable `sample`.
    weights: tree of arrays for the sampler's third argument, kept out of the compiled program;
      None: it has but two.
    frames: L. With more than one, conditions are series [K, L, *coarse, C], and the sampler takes
      and returns an axis of time before those of space.
    interruptible: what is done -> a block in which this process may be ended, as nothing could be
      lost (supervision).
    max_failed: the share of all members that may fail, in [0, 1).
    stored: converted and defaults, for what is compared with `identity`; see
      stage_folder.open_stage.
    any_device: may another kind of device draw than drew before? Units say which drew them.
  Raises:
    ValueError: impossible sizes, NaN in a condition, a store of another identity (keys are named),
      fewer conditions or members than it holds, another kind of device.
    FileExistsError: the store is not ours. locks.Held: the store is to grow while another live job
      draws for it.
    FloatingPointError: more members failed than may.
    OSError: the disk is full; what is marked done is whole.
  """
  began, path = time.monotonic(), files.as_path(path)
  layout = _layout(conditions, members, space, channels, unit, frames)
  ids = _ids(condition_ids, layout.conditions)
  layout = layout._replace(misfit=_has_misfit(sampler, layout, weights))
  about = {
    "sample": {"long_name": "sampled field"} | dict(sample_attrs or {}),
    "misfit": MISFIT,
  }
  about["sample"] |= {"ancillary_variables": "misfit"} if layout.misfit else {}
  variables = ensemble_store.variables(
    layout, ids, conditions, coordinates or {}, about["sample"].get("units", "1")
  )
  processes.same_everywhere(
    {f"conditions of {path.name}": ensemble_store.digest(ids, conditions)}
  )
  drawn = 0
  kind = devices[0].device_kind
  with contextlib.ExitStack() as held:

    def prepare() -> tuple[ensemble_store.Found, locks.Lock, float]:
      stage = ensemble_store.open_stage(path, layout, seed, identity, **(stored or {}))
      with ensemble_store.locked(path):
        others = drawers.others(stage.path)
        if not others:
          ensemble_store.sweep(path)
        ensemble_store.one_kind(path, kind, any_device)
        alone = functools.partial(drawers.refuse, stage.path, path)
        ensemble_store.grow(path, stage, layout, ids, conditions, alone)
        ensemble_store.create(path, layout, variables, attrs, about)
        lock = held.enter_context(drawers.draw(stage.path))
        return ensemble_store.find(path, layout), lock, drawers.start(others)

    found, lock, start = _agree(path, layout, prepare)
    if found.missing:
      with interruptible("compiling the sampler"):
        programs = compiled(sampler, seed, layout, weights, devices)
      extra = [
        () if weights is None else (jax.device_put(weights, device),)
        for device in devices
      ]

      def draw(count, unit):
        """Unit number `count` of this process, on the device whose turn it is."""
        i = count % len(devices)
        return programs[i](
          *jax.device_put(
            block(layout, unit, ids, conditions),
            devices[i],
          ),
          *extra[i],
        )

      toll = Toll(path, layout, max_failed)
      drawn = _draw(
        ensemble_units.Writer(path, layout, kind),
        found,
        draw,
        len(devices),
        stop,
        lock,
        toll,
        start,
      )
    drawn = sum(processes.gather("ensemble/drawn", drawn, processes.LONG))
    return _conclude(path, layout, drawn, began, max_failed)


def _agree(
  path, layout: Layout, prepare: Callable
) -> tuple[ensemble_store.Found, locks.Lock | None, float]:
  """What is missing, as process 0 finds it once it has prepared everything of the store but its
  units; the lock there; and where to begin, as a share of what is missing.

  Told as one bit a unit, in hexadecimal: a million of them are 250 kB.
  """
  units, locked = layout.units(), []

  def work():
    found, lock, start = prepare()
    locked.append(lock)
    absent = {*found.missing}
    bits = np.packbits([u in absent for u in units]).tobytes().hex()
    return [
      bits,
      {str(place): list(part) for place, part in found.parts.items()},
      start,
    ]

  with files.full_disk_in_words(path, "its finished units are whole"):
    bits, parts, start = processes.main_only("ensemble", work)
  absent = np.unpackbits(
    np.frombuffer(bytes.fromhex(bits), np.uint8),
    count=len(units),
  )
  missing = [u for u, is_absent in zip(units, absent, strict=True) if is_absent]
  found = ensemble_store.Found(
    missing, {int(place): Unit(*part) for place, part in parts.items()}
  )
  return found, locked[0] if locked else None, start


def _conclude(path, layout, drawn: int, began: float, max_failed: float) -> dict:
  """Marks the ensemble complete, or says how far it is; the same on every process."""
  total = len(layout.units())
  seconds = time.monotonic() - began
  missing = processes.main_only(
    "ensemble/missing", lambda: ensemble_store.say_done(path, layout)
  )
  if missing:
    raise supervision.Interrupted(
      f"sample stopped after {total - missing} of {total} units, which are on disk"
    )
  summary = {"units": total, "fields": layout.conditions * layout.members}

  def finish():
    failed, conditions = ensemble_store.failures(path)
    _check_failed(failed, layout, max_failed)
    if failed and drawn:
      progress.say(
        f"sample: {failed} of {summary['fields']} members failed, of {conditions} of "
        f"{layout.conditions} conditions of {path.name}: their fields are NaN. The sampler ran "
        "away."
      )
    told = summary | {"failed": failed, "seconds": seconds}
    ensemble_store.complete(
      path, layout, told, {"failed_members": failed, "failed_conditions": conditions}
    )
    return failed

  with files.full_disk_in_words(path, "its finished units are whole"):
    failed = processes.main_only("ensemble/finished", finish)
  return summary | {"failed": failed, "seconds": seconds, "drawn": drawn}


def _check_failed(
  failed: int, layout: Layout, max_failed: float, where: str = ""
) -> None:
  """Raises FloatingPointError if more members of an ensemble have failed than may."""
  fields = layout.conditions * layout.members
  if failed <= max_failed * fields:
    return
  raise FloatingPointError(
    f"{failed} of {fields} members failed{where}: not finite, or beyond "
    f"{conditional_sampler.DIVERGED:g} standard deviations of the data, where "
    f"config.sampling.max_failed={max_failed:g} allows {int(max_failed * fields)}. The sampler ran "
    "away. Lower sampling.guidance.alpha, solver.eta or solver.noise, or take more levels.steps; "
    "if a condition itself is that far off, mend its units; else the prior is damaged. Finished "
    "units stay; a changed config needs another --config.label. To keep what there is, raise "
    "--config.sampling.max_failed."
  )


# ---------------------------------------------------------------- drawing


def keys(seed: int, condition_ids, member_ids) -> jax.Array:
  """[B] keys of members, by id: those of a unit are keys(seed, *block(...)[:2])."""
  base = random_keys.key(seed, "ensemble")
  fold = lambda c, m: jax.random.fold_in(jax.random.fold_in(base, c), m)
  return jax.vmap(fold)(condition_ids, member_ids)


def block(
  layout: Layout, unit: Unit, ids: np.ndarray, conditions: np.ndarray | None
) -> tuple:
  """(condition ids [B], member ids [B], conditions [B, ...] or None) of a unit at its full size.

  At the edge of the ensemble the last condition is repeated, and members go on beyond it: what is
  drawn of the others is then the same once there are more.
  """
  kc, km = layout.unit
  c = np.minimum(
    np.arange(unit.c0, unit.c0 + kc),
    unit.c1 - 1,
  ).repeat(km)
  m = np.tile(np.arange(unit.m0, unit.m0 + km), kc)
  y = (
    None
    if conditions is None
    else np.asarray(
      conditions[unit.c0 : unit.c1],
      np.float32,
    )[c - unit.c0]
  )
  return ids[c].astype(np.uint32), m.astype(np.uint32), y


def layout_of(
  sampler: Sampler,
  weights,
  *,
  conditions,
  members,
  space,
  coarse,
  unit,
  channels=1,
  frames=1,
) -> Layout:
  """The layout of a store from sizes alone, as write_ensemble has it. coarse: shape of a condition,
  or None.
  """
  layout = Layout(conditions, members, space, channels, coarse, unit, frames=frames)
  return layout._replace(misfit=_has_misfit(sampler, layout, weights))


def _has_misfit(sampler: Sampler, layout: Layout, weights) -> bool:
  """Does the sampler return (fields, misfit), of conditions? Raises ValueError for shapes that are
  not the store's.
  """
  count = math.prod(layout.unit)
  y = (
    None
    if layout.coarse is None
    else jax.ShapeDtypeStruct((count, *layout.coarse), jnp.float32)
  )
  key = jax.eval_shape(lambda: jax.random.split(random_keys.key(0, "plans"), count))
  made = jax.eval_shape(
    sampler,
    key,
    y,
    *(() if weights is None else (weights,)),
  )
  fields, *misfit = made if isinstance(made, tuple) else (made,)
  need = (count, *layout.made)
  if fields.shape != need or [m.shape for m in misfit] not in ([], [(count,)]):
    came = [fields.shape, *(m.shape for m in misfit)]
    raise ValueError(
      f"the sampler draws {came} of a unit of {count}, the store takes fields {need}, and one "
      "number a field if any: grid and channels must be those that the prior was trained on."
    )
  return bool(misfit) and layout.coarse is not None


def program(
  sampler: Sampler, seed: int, layout: Layout
) -> Callable[..., dict[str, jax.Array]]:
  """Jitted (condition ids [B], member ids [B], conditions[, weights]) -> {array of the store:
  values [B, ...]}.
  """

  @jax.jit
  def draw(condition_ids, member_ids, y, *weights):
    made = sampler(keys(seed, condition_ids, member_ids), y, *weights)
    made = made if isinstance(made, tuple) else (made,)
    return {
      name: x.astype(np.float32) for name, x in zip(layout.drawn, made, strict=False)
    }  # no misfit to nothing

  return draw


def compiled(
  sampler: Sampler, seed: int, layout: Layout, weights, devices
) -> tuple[jax.stages.Compiled, ...]:
  """The program, compiled for each device alone. weights: arrays or their shapes, or None.

  Kept for the next store of the same process: the sets of a job have one sampler, seed and unit.
  """
  leaves, form = jax.tree.flatten(weights)
  kinds = tuple((x.shape, jnp.dtype(x.dtype)) for x in leaves)
  return _compiled(
    sampler, seed, layout._replace(conditions=1, members=1), form, kinds, tuple(devices)
  )


@functools.lru_cache(maxsize=3)  # with exact conditions, with others, and without
def _compiled(sampler, seed, layout, form, kinds, devices):
  draw, rows = program(sampler, seed, layout), math.prod(layout.unit)

  def lower(device):
    here = jax.sharding.SingleDeviceSharding(device)
    array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=here)
    y = None if layout.coarse is None else array((rows, *layout.coarse), jnp.float32)
    weights = jax.tree.unflatten(form, [array(*kind) for kind in kinds])
    extra = () if weights is None else (weights,)
    return draw.lower(
      array((rows,), jnp.uint32),
      array((rows,), jnp.uint32),
      y,
      *extra,
    )

  first, *others = map(lower, devices)
  # Before the others, which find it in jax's cache on disk if there is one and they are GPUs.
  first = first.compile()
  with concurrent.futures.ThreadPoolExecutor(max(1, len(others))) as pool:
    return first, *pool.map(lambda lowered: lowered.compile(), others)


class Toll:
  """Counts the members that failed, as far as this process knows them, and says when they are too
  many.
  """

  def __init__(self, path: pathlib.Path, layout: Layout, max_failed: float):
    self.layout, self.max_failed = layout, max_failed
    self.failed, _ = ensemble_store.failures(path)

  def add(self, unit: Unit, failed: np.ndarray) -> None:
    """failed: [c1 − c0, m1 − m0] of a unit.

    Raises FloatingPointError, naming a member, once they are too many.
    """
    if not failed.any():
      return
    self.failed += int(failed.sum())
    c, m = np.argwhere(failed)[0]
    where = f", the last of condition {unit.c0 + c}, member {unit.m0 + m}"
    _check_failed(self.failed, self.layout, self.max_failed, where)


def _draw(
  writer,
  found: ensemble_store.Found,
  draw,
  devices: int,
  stop,
  lock: locks.Lock | None,
  toll: Toll,
  start: float = 0.0,
) -> int:
  """Draws units as long as there are any, and returns how many this process did.

  It begins at the share `start` of them, and passes over those that another job has finished.

  Three things go on at a time: each device draws a unit, its one before is on its way to the host,
  and the files of the one before that are written. What is slowest sets the pace. A device has its
  next unit before it has finished one.
  """
  path, total = writer.path, len(writer.layout.units())
  # Units under way on the devices while the host waits for the oldest.
  ahead = 2 * devices - 1
  take, before, begun, count = (
    processes.counter("ensemble"),
    total - len(found.missing),
    0,
    0,
  )
  drawing, writing = collections.deque(), collections.deque()
  first = int(start * len(found.missing))
  said = time.monotonic()

  def settle(still_drawing: int, still_writing: int) -> None:
    """Writes and marks the oldest units, until only so many are under way."""
    nonlocal count
    with files.full_disk_in_words(path, "its finished units are whole"):
      while len(drawing) > still_drawing:
        unit, part, arrays = drawing.popleft()
        blocks = _to_host(writer.layout, unit, arrays)
        toll.add(unit, ensemble_store.failed(blocks["sample"]))
        if lock:
          lock.check()
        writing.append((unit, writer.begin(unit, blocks, part), part))
      while len(writing) > still_writing:
        with ledger.spend("saving"):
          writer.finish(*writing.popleft())
        ledger.saved()
        count += 1

  with progress.Progress("sample", total, "units", done=before) as bar:
    try:
      while not (asked := stop()) and (turn := take()) < len(found.missing):
        place = (turn + first) % len(found.missing)
        unit = found.missing[place]
        if writer.marker(unit).exists():
          continue
        arrays = draw(begun, unit)
        begun += 1
        for array in arrays.values():
          array.copy_to_host_async()
        drawing.append((unit, found.parts.get(place), arrays))
        settle(ahead, devices)
        if (
          reached := before + turn - ahead
        ) > bar.done:  # by all processes, but for what is under way
          bar.advance(reached - bar.done)
        if lock and time.monotonic() - said > _SAY_DONE_SECONDS:
          ensemble_store.say_done(path, writer.layout)
          said = time.monotonic()
      settle(0, 0)
    except FloatingPointError:
      drawing.clear()
      settle(0, 0)  # the units before it are whole
      raise
    if not asked:
      bar.advance(total - bar.done)
  return count


def _to_host(
  layout: Layout, unit: Unit, arrays: Mapping[str, jax.Array]
) -> dict[str, np.ndarray]:
  """Blocks [c1 − c0, m1 − m0, ...] with the members that failed marked: NaN fields, infinite
  misfits.

  A misfit of NaN is none: a guidance without a gain knows none.
  """
  blocks = {}
  for name, fields in layout.drawn.items():
    whole = np.asarray(arrays[name]).reshape(*layout.unit, *fields)
    blocks[name] = whole[: unit.c1 - unit.c0, : unit.m1 - unit.m0]
  field = blocks["sample"]
  failed = ~np.isfinite(field).all(axis=tuple(range(2, field.ndim)))
  if layout.misfit:
    failed |= np.isinf(blocks["misfit"])
  if failed.any():
    blocks = {name: block.copy() for name, block in blocks.items()}
    blocks["sample"][failed] = np.nan
    if layout.misfit:
      blocks["misfit"][failed] = np.inf
  return blocks


# ---------------------------------------------------------------- the door


def _layout(
  conditions, members: int, space, channels: int, unit, frames: int
) -> Layout:
  space, unit = tuple(space), tuple(unit)
  if members < 1 or channels < 1 or len(unit) != 2 or min(unit) < 1:
    raise ValueError(
      f"{members} members, {channels} channels in units of {unit}: each must be at least 1."
    )
  if len(space) not in (1, 2):
    raise ValueError(f"fields on a grid {space} came, need [x] or [y, x].")
  if conditions is None:
    return Layout(1, members, space, channels, None, unit, frames=frames)
  time = () if frames == 1 else (frames,)
  if (
    conditions.ndim < 3 + len(time)
    or len(conditions) < 1
    or conditions.shape[1 : 1 + len(time)] != time
  ):
    need = ", ".join(["conditions", *map(str, time), "*coarse", "channels"])
    raise ValueError(f"conditions of shape {conditions.shape} came, need [{need}].")
  bad = [i for i, y in enumerate(conditions) if not np.isfinite(y).all()]
  if bad:
    raise ValueError(
      f"{len(bad)} of {len(conditions)} conditions hold NaN or infinity, first number {bad[0]}: "
      "repair or drop them."
    )
  return Layout(
    len(conditions), members, space, channels, conditions.shape[1:], unit, frames=frames
  )


def _ids(condition_ids, count: int) -> np.ndarray:
  ids = np.arange(count) if condition_ids is None else np.asarray(condition_ids)
  if ids.shape != (count,) or len(np.unique(ids)) != count or (ids < 0).any():
    raise ValueError(
      f"condition_ids of shape {ids.shape}: need {count} different numbers >= 0."
    )
  return ids
