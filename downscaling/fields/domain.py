"""The domain of a field: its axes, cell areas, channels, and the symmetries of its law.

A `Domain` says what other code must not assume: whether axes are periodic, how many channels there
are and in which units, whether cells are equally large. It needs NumPy alone, checks itself, and
goes to JSON and to the coordinates of an xarray or Zarr store and back.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from downscaling.fields import grid_symmetry

SCHEMA = 1
EVEN = 1e-5  # of the spacing: coordinates are often stored in float32
NAMES_OF_AXES = {  # CF's `axis` by the names that axes usually have
  "x": "X", "lon": "X", "longitude": "X", "rlon": "X",
  "y": "Y", "lat": "Y", "latitude": "Y", "rlat": "Y",
  "z": "Z", "lev": "Z", "level": "Z", "height": "Z",
}  # fmt: skip


def vars_of(one) -> dict[str, Any]:
  """The fields of a dataclass by name."""
  return {field.name: getattr(one, field.name) for field in dataclasses.fields(one)}


def _without(one, name: str) -> dict[str, Any]:
  return {key: value for key, value in vars_of(one).items() if key != name}


def _check_name(name: str, what: str) -> None:
  if not isinstance(name, str) or not name or "/" in name or name.strip() != name:
    raise ValueError(
      f"{what} is named {name!r}: need a name without '/' or blanks at its ends."
    )


def _checked_areas(areas, shape: tuple[int, ...]) -> np.ndarray:
  areas = np.array(areas, np.float64)
  if areas.shape != shape or not (np.isfinite(areas).all() and (areas > 0).all()):
    raise ValueError(
      f"cell areas of shape {areas.shape}, need {shape} finite values > 0: one area a cell."
    )
  areas.flags.writeable = False
  return areas


@dataclasses.dataclass(frozen=True, eq=False)
class Axis:
  """One axis of space.

  name: as in a file, e.g. "x" or "rlat". values: coordinates [n], strictly monotonic, in `unit`.
  unit: as UDUNITS spells it; "1" for none. periodic: the axis closes on itself one spacing after
  its last point; it must be even then. long_name, standard_name: as in CF, or "".
  """

  name: str
  values: np.ndarray
  unit: str = "1"
  periodic: bool = False
  long_name: str = "position"
  standard_name: str = ""

  def __post_init__(self):
    _check_name(self.name, "an axis")
    values = np.array(self.values, np.float64)
    if values.ndim != 1 or len(values) < 1 or not np.isfinite(values).all():
      raise ValueError(
        f"axis {self.name!r} has coordinates of shape {values.shape}: need [points] finite values."
      )
    steps = np.diff(values)
    if not ((steps > 0).all() or (steps < 0).all()):
      raise ValueError(
        f"the coordinates of axis {self.name!r} neither rise nor fall throughout: sort the fields "
        "along it, and drop points that come twice."
      )
    values.flags.writeable = False
    object.__setattr__(self, "values", values)
    if self.periodic and not self.even:
      raise ValueError(
        f"axis {self.name!r} is periodic, but its spacing goes from {np.abs(steps).min():g} to "
        f"{np.abs(steps).max():g} {self.unit}: a periodic axis must be evenly spaced. Regrid it, "
        "or set periodic=False."
      )

  def __len__(self) -> int:
    return len(self.values)

  @property
  def spacing(self) -> float:
    """Mean distance between neighbours, in `unit`; nan on a single point."""
    return float(np.ptp(self.values) / (len(self) - 1)) if len(self) > 1 else math.nan

  @property
  def even(self) -> bool:
    """Are all distances between neighbours the same, to EVEN of them?"""
    steps = np.abs(np.diff(self.values))
    return len(steps) == 0 or bool(np.ptp(steps) <= EVEN * steps.mean())

  @property
  def length(self) -> float:
    """Of a periodic axis its period, else from the first point to the last; in `unit`."""
    return self.spacing * len(self) if self.periodic else float(np.ptp(self.values))

  def same(self, other: "Axis") -> bool:
    """Equal but for rounding of the coordinates."""
    mine, theirs = _without(self, "values"), _without(other, "values")
    if mine != theirs or len(self) != len(other):
      return False
    scale = np.abs(self.values).max() if len(self) == 1 else self.spacing
    return bool(np.abs(self.values - other.values).max() <= EVEN * scale)


@dataclasses.dataclass(frozen=True)
class Channel:
  """One variable of a field.

  name: as in a file. unit: as UDUNITS spells it. weight: > 0, how much a squared error of the
  channel counts, once it is in units of its own standard deviation. long_name, standard_name: as in
  CF, or "".
  """

  name: str
  unit: str = "1"
  weight: float = 1.0
  long_name: str = ""
  standard_name: str = ""

  def __post_init__(self):
    _check_name(self.name, "a channel")
    if not (math.isfinite(self.weight) and self.weight > 0):
      raise ValueError(
        f"channel {self.name!r} has the weight {self.weight}: need a number > 0."
      )


@dataclasses.dataclass(frozen=True, eq=False)
class Domain:
  """Where a field [*space, C] lives and what its channels are.

  axes: of space, in the order of the field's axes. channels: in the order of the last axis.
  areas: [*space], > 0, in any unit; None for equal cells. mask: None; domains with holes are not
  supported yet. symmetries: generators of a group that leaves the law of the fields alone; () for
  none that is known. They act on all channels alike.
  Raises: ValueError for what does not fit together.
  """

  axes: tuple[Axis, ...]
  channels: tuple[Channel, ...] = (Channel("u"),)
  areas: np.ndarray | None = None
  mask: np.ndarray | None = None
  symmetries: tuple[grid_symmetry.Generator, ...] = ()

  def __post_init__(self):
    for name in ("axes", "channels", "symmetries"):
      object.__setattr__(self, name, tuple(getattr(self, name)))
    if not self.axes or not self.channels:
      raise ValueError(
        f"a domain of {len(self.axes)} axes and {len(self.channels)} channels: need one of each "
        "at least."
      )
    for kind, named in (("axes", self.axes), ("channels", self.channels)):
      names = [one.name for one in named]
      twice = sorted({name for name in names if names.count(name) > 1})
      if twice:
        raise ValueError(
          f"the {kind} {names} name {twice[0]!r} twice: give each its own name."
        )
    if self.mask is not None:
      raise ValueError(
        "a domain with a mask is not supported yet: pass mask=None and fields without gaps."
      )
    if self.areas is not None:
      object.__setattr__(self, "areas", _checked_areas(self.areas, self.shape))
    for symmetry in self.symmetries:
      self._check_symmetry(symmetry)

  def _check_symmetry(self, symmetry: grid_symmetry.Generator) -> None:
    """Raises ValueError unless the element maps the grid onto itself."""
    if len(symmetry.flips) != len(self.axes):
      raise ValueError(
        f"the symmetry {symmetry} is of {len(symmetry.flips)} axes, the domain has "
        f"{len(self.axes)}."
      )
    for axis, flip, shift in zip(
      self.axes, symmetry.flips, symmetry.shifts, strict=True
    ):
      if not axis.periodic and shift % len(axis) != (len(axis) - 1 if flip else 0):
        raise ValueError(
          f"the symmetry {symmetry} moves axis {axis.name!r} beyond its ends, which is not "
          f"periodic: it allows a shift of 0, or a reflection with the shift {len(axis) - 1}."
        )
      if flip and not axis.even:
        raise ValueError(
          f"the symmetry {symmetry} reverses axis {axis.name!r}, which is not evenly spaced."
        )

  # -------------------------------------------------------------- what it is

  @property
  def shape(self) -> tuple[int, ...]:
    """Points of each axis of space."""
    return tuple(map(len, self.axes))

  @property
  def rank(self) -> int:
    """The number of space axes."""
    return len(self.axes)

  @property
  def periodic(self) -> bool:
    """Are all axes periodic?"""
    return all(axis.periodic for axis in self.axes)

  @property
  def weights(self) -> np.ndarray:
    """Weights of the channels, [C], with mean 1."""
    weights = np.array([channel.weight for channel in self.channels], np.float64)
    return weights / weights.mean()

  def group(self):
    """The symmetries as a symmetry.Group of this grid, that of the identity alone if none is known.

    Raises ValueError for a grid so fine that its table would be too large.
    """
    from downscaling.fields import symmetry  # here: it brings jax

    return symmetry.Group(*grid_symmetry.table(self.symmetries, self.shape))

  def basis(self):
    """The basis.Trigonometric of this grid: waves along periodic axes, cosines along the others."""
    from downscaling.fields import basis  # here: it brings jax

    return basis.Trigonometric(self.shape, tuple(axis.periodic for axis in self.axes))

  def check(self, fields, name: str = "fields") -> None:
    """Raises ValueError, calling the array `name`, unless it is [..., *space, C] of this domain."""
    need = (*self.shape, len(self.channels))
    came = np.shape(fields)
    if len(came) < len(need) or came[-len(need) :] != need:
      axes = ", ".join(f"{axis.name}={len(axis)}" for axis in self.axes)
      raise ValueError(
        f"{name} have the shape {came}, need [..., {axes}, channels={len(self.channels)}] "
        f"({', '.join(channel.name for channel in self.channels)}). Is the channel axis missing "
        "(x[..., None])?"
      )

  def same(self, other: "Domain") -> bool:
    """Are both equal but for rounding of coordinates and areas, and for which generators name the
    group?
    """
    if self.shape != other.shape or self.channels != other.channels:
      return False
    if not all(a.same(b) for a, b in zip(self.axes, other.axes, strict=True)):
      return False
    one, two = (
      np.ones(self.shape) if d.areas is None else d.areas for d in (self, other)
    )
    if not np.allclose(
      one / one.mean(),
      two / two.mean(),
      rtol=EVEN,
    ):
      return False
    groups = [set(grid_symmetry.elements(d.symmetries, d.shape)) for d in (self, other)]
    return groups[0] == groups[1]

  # -------------------------------------------------------------- the coarse domain

  def coarsen(self, to) -> "Domain":
    """The domain of C′x.

    Args:
      to: an operator (fields/operators.py) on this grid; or factors, one for all axes or one an
        axis, which mean every factor-th point, as of operators.Strided.
    Raises: ValueError for an operator whose coarse side is no grid, or factors that do not divide.
    """
    averages = False
    factors = to
    if hasattr(to, "fine"):
      if to.fine != self.shape:
        raise ValueError(
          f"the operator is of a grid {to.fine}, the domain of {self.shape}."
        )
      if to.averages is None:
        raise ValueError(
          f"{type(to).__name__} has no coarse grid, so it says no coarse coordinates: make the "
          "coarse domain yourself, Domain(axes, channels)."
        )
      averages, factors = to.averages, to.factors
    factors = self._factors(factors)
    axes = []
    for axis, factor in zip(self.axes, factors, strict=True):
      values = axis.values[::factor]
      if averages:
        values = axis.values.reshape(-1, factor).mean(axis=1)
      axes.append(dataclasses.replace(axis, values=values))
    symmetries = self.symmetries
    if any(factor > 1 for factor in factors):
      symmetries = grid_symmetry.coarsened(symmetries, self.shape, factors, averages)
    areas = None if self.areas is None else self._coarse_areas(factors)
    return dataclasses.replace(
      self, axes=tuple(axes), areas=areas, symmetries=symmetries
    )

  def _factors(self, factors) -> tuple[int, ...]:
    whole = isinstance(factors, int | np.integer)
    factors = (int(factors),) * self.rank if whole else tuple(int(f) for f in factors)
    if len(factors) != self.rank:
      raise ValueError(
        f"{len(factors)} factors {factors} for {self.rank} axes: need one an axis."
      )
    for axis, factor in zip(self.axes, factors, strict=True):
      if factor < 1 or len(axis) % factor:
        fits = [f for f in range(1, len(axis) + 1) if len(axis) % f == 0]
        raise ValueError(
          f"factor {factor} does not divide axis {axis.name!r} of {len(axis)} points: use one of "
          f"{fits}."
        )
    return factors

  def _coarse_areas(self, factors: tuple[int, ...]) -> np.ndarray:
    """Sums over the cells of each coarse point."""
    assert self.areas is not None
    split = [s for n, f in zip(self.shape, factors, strict=True) for s in (n // f, f)]
    return self.areas.reshape(split).sum(axis=tuple(range(1, 2 * self.rank, 2)))

  # -------------------------------------------------------------- JSON and CF

  def to_json(self) -> str:
    """One line of JSON that `from_json` reads back, coordinates without loss."""
    axes = [vars_of(axis) | {"values": axis.values.tolist()} for axis in self.axes]
    record = {
      "schema": SCHEMA,
      "axes": axes,
      "channels": [vars_of(channel) for channel in self.channels],
      "areas": None if self.areas is None else self.areas.tolist(),
      "mask": None,
      "symmetries": [vars_of(symmetry) for symmetry in self.symmetries],
    }
    return json.dumps(record)

  @classmethod
  def from_json(cls, text: str | Mapping[str, Any]) -> "Domain":
    """Reads what `to_json` wrote, as text or as parsed.

    Raises: ValueError if it is damaged or of another schema.
    """
    try:
      record = json.loads(text) if isinstance(text, str | bytes) else text
      if record["schema"] != SCHEMA:
        raise ValueError(
          f"its schema is {record['schema']}, this version reads {SCHEMA}"
        )
      axes = tuple(Axis(**axis) for axis in record["axes"])
      channels = tuple(Channel(**channel) for channel in record["channels"])
      symmetries = tuple(
        grid_symmetry.Generator(tuple(one["flips"]), tuple(one["shifts"]), one["sign"])
        for one in record["symmetries"]
      )
      return cls(axes, channels, record["areas"], record["mask"], symmetries)
    except (KeyError, TypeError, ValueError) as error:
      raise ValueError(f"this is no domain that can be read: {error}") from error

  def coords(
    self, suffix: str = "", of: str = ""
  ) -> dict[str, tuple[np.ndarray, dict[str, str]]]:
    """Coordinates of a store with CF attributes: {axis name + suffix: (values, attributes)}.

    Args:
      suffix: e.g. "_coarse", for a second grid in one store.
      of: ends the long names, e.g. " of the coarse points".
    """
    found = {}
    for axis in self.axes:
      about = {"long_name": axis.long_name + of, "units": axis.unit}
      if axis.standard_name:
        about["standard_name"] = axis.standard_name
      if not suffix and axis.name.lower() in NAMES_OF_AXES:
        about["axis"] = NAMES_OF_AXES[axis.name.lower()]
      found[axis.name + suffix] = (np.array(axis.values), about)
    return found

  def attributes(self, channel: int = 0) -> dict[str, str]:
    """CF attributes of one channel's variable: units, long_name, standard_name."""
    one = self.channels[channel]
    about = {"units": one.unit, "long_name": one.long_name or one.name}
    return about | ({"standard_name": one.standard_name} if one.standard_name else {})


def box(
  names: Sequence[str],
  points: Sequence[int],
  length: float | Sequence[float],
  *,
  channels: Sequence[Channel] = (Channel("u"),),
  symmetries: Sequence[grid_symmetry.Generator] = (),
) -> Domain:
  """A periodic box with evenly spaced points i·length/points, without the right end.

  length: of all axes, or one an axis.
  """
  lengths = (
    (length,) * len(points) if isinstance(length, int | float) else tuple(length)
  )
  axes = [
    Axis(name, np.arange(n) * (size / n), periodic=True)
    for name, n, size in zip(names, points, lengths, strict=True)
  ]
  return Domain(tuple(axes), tuple(channels), symmetries=tuple(symmetries))
