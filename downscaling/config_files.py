"""Where config files lie: `ks:quick` names a built-in one, anything else is a path.

A checkout has them in configs/, at its root, where users read and edit them. A wheel has a copy
inside the package, so that the names also work away from the checkout.
"""

import pathlib
import re

PACKAGE = pathlib.Path(__file__).parent


def folder() -> pathlib.Path:
  """The folder of the built-in configs: the wheel's copy, else the checkout's configs/."""
  inside = PACKAGE / "configs"
  return inside if inside.is_dir() else PACKAGE.parent / "configs"


def names() -> list[str]:
  """The names of the built-in configs, in alphabetical order."""
  return sorted(path.stem for path in folder().glob("*.py") if not path.stem.startswith("_"))


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
  advice = f"Use a built-in config ({known}), e.g. --config=ks:quick, or the path of a file"
  if re.fullmatch(r"\w*", config):
    raise FileNotFoundError(f"--config={text}: there is no built-in config {config!r}. {advice}.")
  raise FileNotFoundError(
    f"--config={text}: there is no such file in {pathlib.Path.cwd()}. {advice}, e.g. "
    "--config=configs/ks.py:quick."
  )


def resolve_flags(argv: list[str]) -> list[str]:
  """Returns the command line with the value of each --config replaced by what `resolve` says.

  Both --config=VALUE and --config VALUE are understood, with one dash or two. Overrides, as
  --config.seed=1, stay as they are.
  """
  resolved = []
  for position, argument in enumerate(argv):
    flag, equals, value = argument.partition("=")
    before = argv[position - 1] if position else ""
    if flag in ("--config", "-config") and equals:
      argument = f"{flag}={resolve(value)}"
    elif before in ("--config", "-config"):
      argument = resolve(argument)
    resolved.append(argument)
  return resolved
