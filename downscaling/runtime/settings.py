"""Typed settings: frozen dataclasses whose fields carry a default, a range and a line of help.

  class Optimizer(Settings, key="optimizer"):
    peak: float = number(3e-3, "peak learning rate", above=0)

Making an `Optimizer` checks every field. An error names the key, the value that came, what is
needed and what to type. The same rules write the reference page of all keys.
"""

import ast
import dataclasses
import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Self

WHOLE = (0, 2**31 - 1)  # range of a count that has no other limit


@dataclasses.dataclass(frozen=True)
class Rule:
  """What a key accepts.

  Attributes:
    words: the accepted values, in words that follow "need".
    help: what the key means.
    read: value -> the value as the program uses it; raises ValueError or TypeError otherwise.
    free: the key may change between restarts, as no result depends on it.
    example: what an error suggests to type; None for the default.
  """

  words: str
  help: str
  read: Callable[[Any], Any]
  free: bool = False
  example: Any = None

  def check(self, key: str, value: Any, default: Any) -> Any:
    """The value as the program uses it. Raises ValueError naming `key` for any other value."""
    try:
      return self.read(value)
    except (ValueError, TypeError, OverflowError):
      typed = shown(default if self.example is None else self.example).replace(" ", "")
      raise ValueError(
        f"config.{key}={shown(value)}: need {self.words} ({self.help}). E.g. --config.{key}={typed}"
      ) from None


def shown(value: Any) -> str:
  """A value as a person would type it."""
  if isinstance(value, float):
    return f"{value:g}"
  return (
    repr(value) if isinstance(value, str) and not value.isidentifier() else str(value)
  )


def _made(default: Any, rule: Rule) -> Any:
  return dataclasses.field(default=default, metadata={"rule": rule})


def _refuse(wrong: bool) -> None:
  if wrong:
    raise ValueError


def real(value: Any) -> float:
  _refuse(isinstance(value, bool))
  found = float(value)
  _refuse(not math.isfinite(found))
  return found


def _whole(value: Any) -> int:
  _refuse(isinstance(value, bool))
  if isinstance(value, str):
    return int(value)
  found = int(value)
  _refuse(found != value)
  return found


def _listed(value: Any) -> tuple:
  """A tuple, a list, one value, or the text of any of them."""
  if isinstance(value, str):
    try:
      value = ast.literal_eval(value)
    except (ValueError, SyntaxError):
      value = tuple(
        part.strip() for part in value.strip("()").split(",") if part.strip()
      )
  return tuple(value) if isinstance(value, list | tuple) else (value,)


def _range(kind: str, above, least, below, most) -> str:
  words = [
    (above, f"above {above:g}" if above is not None else ""),
    (least, f"at least {least:g}" if least is not None else ""),
    (below, f"below {below:g}" if below is not None else ""),
    (most, f"at most {most:g}" if most is not None else ""),
  ]
  limits = " and ".join(text for limit, text in words if limit is not None)
  return f"{kind}, {limits}" if limits else kind


def _within(value, above, least, below, most) -> bool:
  return (
    (above is None or value > above)
    and (least is None or value >= least)
    and (below is None or value < below)
    and (most is None or value <= most)
  )


def number(
  default: float,
  help: str,
  *,
  above=None,
  least=None,
  below=None,
  most=None,
  free=False,
):
  """A finite real number."""

  def read(value):
    found = real(value)
    _refuse(not _within(found, above, least, below, most))
    return found

  return _made(
    default,
    Rule(_range("a finite number", above, least, below, most), help, read, free),
  )


def count(
  default: int,
  help: str,
  *,
  least=1,
  most=WHOLE[1],
  free=False,
):
  """A whole number."""

  def read(value):
    found = _whole(value)
    _refuse(not _within(found, None, least, None, most))
    return found

  limit = None if most == WHOLE[1] else most
  return _made(
    default, Rule(_range("a whole number", None, least, None, limit), help, read, free)
  )


def numbers(
  default: tuple,
  help: str,
  *,
  least=None,
  below=None,
  free=False,
):
  """One finite number or several."""

  def read(value):
    found = tuple(real(v) for v in _listed(value))
    _refuse(not found or not all(_within(v, None, least, below, None) for v in found))
    return found

  words = (
    _range("a finite number", None, least, below, None) + ", or several in brackets"
  )
  return _made(default, Rule(words, help, read, free))


def counts(
  default: tuple, help: str, *, least=1, length: int | None = None, free=False
):
  """Several whole numbers."""

  def read(value):
    found = tuple(_whole(v) for v in _listed(value))
    _refuse(
      not found or min(found) < least or (length is not None and len(found) != length)
    )
    return found

  many = "whole numbers" if length is None else f"{length} whole numbers"
  return _made(default, Rule(f"{many} of at least {least}", help, read, free))


def choice(
  default: str,
  known: tuple[str, ...],
  help: str,
  *,
  free=False,
):
  """One of several words."""

  def read(value):
    _refuse(value not in known)
    return value

  return _made(default, Rule(f"one of {', '.join(known)}", help, read, free))


def names(
  default: tuple,
  help: str,
  *,
  known: tuple[str, ...] | None = None,
  least=0,
  free=False,
):
  """Several different words."""

  def read(value):
    found = _listed(value)
    _refuse(not all(isinstance(v, str) and v for v in found) or len(found) < least)
    _refuse(
      len({*found}) < len(found) or (known is not None and not {*found} <= {*known})
    )
    return found

  words = (
    "different names" if known is None else f"different names out of {', '.join(known)}"
  )
  return _made(default, Rule(words, help, read, free))


def flag(default: bool, help: str, *, free=False):
  """Yes or no."""

  def read(value):
    if isinstance(value, str):
      value = (
        {"true": True, "false": False}[value.lower()]
        if value.lower() in _BOOLEANS
        else value
      )
    _refuse(not isinstance(value, bool))
    return value

  return _made(default, Rule("True or False", help, read, free))


_BOOLEANS = ("true", "false")


def text(
  default: str,
  help: str,
  *,
  words: str = "text",
  read: Callable[[Any], Any] = str,
  free: bool = False,
  example: str | None = None,
):
  """A string, or whatever `read` makes of one."""
  return _made(default, Rule(words, help, read, free, example))


@dataclasses.dataclass(frozen=True)
class Settings:
  """A block of keys. Subclasses are frozen dataclasses with `key="sampling.solver"`, say."""

  KEY: ClassVar[str] = ""

  def __init_subclass__(cls, key: str = "", **kwargs):
    super().__init_subclass__(**kwargs)
    cls.KEY = key

  def __post_init__(self):
    for field in dataclasses.fields(self):
      rule = field.metadata.get("rule")
      if rule is not None:
        found = rule.check(
          joined(self.KEY, field.name), getattr(self, field.name), field.default
        )
        object.__setattr__(self, field.name, found)

  @classmethod
  def of(cls, given: Mapping[str, Any]) -> Self:
    """A block from the keys that differ from its defaults. Raises ValueError for an unknown key."""
    known = {field.name: field for field in dataclasses.fields(cls)}
    made = {}
    for name, value in given.items():
      if name not in known:
        raise ValueError(unknown(cls.KEY, name, known))
      kind = block_of(known[name])
      made[name] = value if kind is None else _block(kind, joined(cls.KEY, name), value)
    return cls(**made)

  def differences(self, results_only: bool = False) -> dict[str, Any]:
    """The keys whose values are not the defaults, nested, as JSON has them.

    results_only: leave out keys on which no result depends.
    """
    found = {}
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      rule = field.metadata.get("rule")
      if results_only and rule is not None and rule.free:
        continue
      if isinstance(value, Settings):
        inner = value.differences(results_only)
        if inner:
          found[field.name] = inner
      elif value != default_of(field):
        found[field.name] = plain(value)
    return found

  def everything(self) -> dict[str, Any]:
    """All keys with their values, nested, as JSON has them."""
    values = {
      field.name: getattr(self, field.name) for field in dataclasses.fields(self)
    }
    return {
      name: value.everything() if isinstance(value, Settings) else plain(value)
      for name, value in values.items()
    }

  def asdict(self) -> dict[str, Any]:
    """{key: value} of this block; blocks within stay blocks."""
    return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def _block(kind: type[Settings], key: str, value: Any) -> Settings:
  if isinstance(value, kind):
    return value
  if not hasattr(value, "items"):
    raise ValueError(
      f"config.{key}={shown(value)}: need a block of keys, e.g. dict(...)."
    )
  return kind.of(value)


def block_of(field: dataclasses.Field) -> type[Settings] | None:
  """The class of a field that is a block; None for a key."""
  kind = field.type
  return kind if isinstance(kind, type) and issubclass(kind, Settings) else None


def default_of(field: dataclasses.Field) -> Any:
  """The default of a key or block."""
  if field.default_factory is not dataclasses.MISSING:
    return field.default_factory()
  return field.default


def keys(cls: type[Settings]) -> Iterator[tuple[str, dataclasses.Field]]:
  """(full key, field) of every key of a block and of the blocks within."""
  for field in dataclasses.fields(cls):
    kind = block_of(field)
    if kind is None:
      yield joined(cls.KEY, field.name), field
    else:
      yield from keys(kind)


def unknown(block: str, name: str, known: Mapping[str, Any]) -> str:
  """What to say of a key that does not exist."""
  near = difflib.get_close_matches(name, known, 1)
  where = f"config.{block}" if block else "the config"
  hint = f'Did you mean "{near[0]}"?' if near else f"Its keys: {', '.join(known)}."
  return f"{where} has no key {name!r}. {hint}"


def joined(block: str, name: str) -> str:
  return f"{block}.{name}" if block else name


def plain(value: Any) -> Any:
  """Tuples as the lists that JSON gives back."""
  return [plain(v) for v in value] if isinstance(value, list | tuple) else value
