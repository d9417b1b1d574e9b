"""Config files and the command line's overrides: where they lie, and what they say.

`ks:quick` names a built-in config, anything else is a path. A config file is Python with
`get_config(variant)`, and is executed.

A checkout has them in configs/, at its root, where users read and edit them. A wheel has a copy
inside the package, so that the names also work away from the checkout.
"""

import ast
import importlib.util
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

PACKAGE = pathlib.Path(__file__).parent


def folder() -> pathlib.Path:
  """The folder of the built-in configs: the wheel's copy, else the checkout's configs/."""
  inside = PACKAGE / "configs"
  return inside if inside.is_dir() else PACKAGE.parent / "configs"


def names() -> list[str]:
  """The names of the built-in configs, in alphabetical order."""
  return sorted(
    path.stem for path in folder().glob("*.py") if not path.stem.startswith("_")
  )


def resolve(text: str) -> str:
  """Returns the path, and the variant if one is given, of the config that a user means.

  Args:
    text: NAME or NAME:VARIANT of a built-in config, or PATH or PATH:VARIANT.
  Returns: PATH or PATH:VARIANT. A path comes back as it is. The variant is not checked here:
    the config file does that.
  Raises: FileNotFoundError if there is no such file, with the names that are known.
  """
  config, colon, variant = text.partition(":")
  if pathlib.Path(config).is_file():
    return text
  if config in names():
    return f"{folder() / config}.py{colon}{variant}"
  known = ", ".join(names())
  advice = (
    f"Use a built-in config ({known}), e.g. --config=ks:quick, or the path of a file"
  )
  if re.fullmatch(r"\w*", config):
    raise FileNotFoundError(
      f"--config={text}: there is no built-in config {config!r}. {advice}."
    )
  raise FileNotFoundError(
    f"--config={text}: there is no such file in {pathlib.Path.cwd()}. {advice}, e.g. "
    "--config=configs/ks.py:quick."
  )


def split(text: str) -> tuple[str, str | None]:
  """PATH or PATH:VARIANT as (path, variant)."""
  if pathlib.Path(text).is_file():
    return text, None
  path, _, variant = text.rpartition(":")
  return path, variant


def read(path: str, variant: str | None) -> Mapping[str, Any]:
  """What get_config of a file returns, as a dict."""
  spec = importlib.util.spec_from_file_location("config_file", path)
  if spec is None or spec.loader is None:
    raise ValueError(f"--config={path}: a config is a Python file, e.g. configs/ks.py.")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, "get_config"):
    raise ValueError(f"--config={path}: the file has no function get_config().")
  found = module.get_config() if variant is None else module.get_config(variant)
  return found.to_dict() if hasattr(found, "to_dict") else found


def merged(
  given: Mapping[str, Any],
  overrides: Mapping[str, Any],
) -> dict[str, Any]:
  """A nested dict with some values set by their full keys."""
  found = {
    key: merged(v, {}) if isinstance(v, Mapping) else v for key, v in given.items()
  }
  for key, value in overrides.items():
    *path, last = key.split(".")
    inner = found
    for name in path:
      inner = inner.setdefault(name, {})
      if not isinstance(inner, dict):
        raise ValueError(f"config.{key}: {name!r} is a key and not a block of keys.")
    inner[last] = value
  return found


def from_arguments(
  arguments: Sequence[str],
) -> tuple[list[str], dict[str, Any], list[str]]:
  """Splits --config and --config.key off a command line.

  Returns: (values of --config, {key: value}, the other arguments).
  """
  configs, overrides, rest = [], {}, []
  waiting = iter(arguments)
  for argument in waiting:
    name, equals, value = argument.partition("=")
    name = name.removeprefix("-") if name.startswith("--") else name
    if name == "-config" or name.startswith("-config."):
      if not equals:
        value = next(waiting, "")
      if name == "-config":
        configs.append(value)
      else:
        overrides[name.removeprefix("-config.")] = literal(value)
    else:
      rest.append(argument)
  return configs, overrides, rest


def literal(value: str) -> Any:
  """A Python literal as its value, other text as it stands."""
  try:
    found = ast.literal_eval(value)
  except (ValueError, SyntaxError):
    return value
  return value if isinstance(found, float) and not math.isfinite(found) else found
