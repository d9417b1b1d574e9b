"""Writes docs/reference/config.md: every key of a config, by the rules that check it.

python docs/config_page.py
"""

import dataclasses
import pathlib

from downscaling import experiment
from downscaling.experiment import Experiment
from downscaling.runtime import settings

PAGE = pathlib.Path(__file__).parent / "reference" / "config.md"
INTRO = """# Every key of a config

A config file is Python with a function `get_config(variant)`. It returns an
`ml_collections.ConfigDict`, or a dict, of the keys that differ from the defaults below. The command
line overrides any key: `--config.train.batch=64`, `--config.model.channels="(8,16)"`. Unknown keys
and values out of range are refused by name.

A key marked • may change between restarts: no result depends on it. Any other key belongs to the
identity of the stages that depend on it, and a work folder of another value is refused. What an
identity holds is what differs from the defaults, so keys that come with a later version leave old
work folders valid.

σ is in units of the data's standard deviation. Times are in the equation's own unit.
"""
SOLVERS = """
## config.fine and config.coarse

Keywords of the equation's two solvers. Their own docstrings say what they mean.

| equation | block | key | default |
|---|---|---|---|
"""


def page() -> str:
  """The whole page as Markdown."""
  lines = [INTRO]
  lines += _block("config", Experiment)
  for name, kind in _inner("config", Experiment):
    lines += _block(name, kind)
  lines.append(SOLVERS.rstrip())
  for name, equation in experiment.EQUATIONS.items():
    for block, solver in (("fine", equation.Fine), ("coarse", equation.Coarse)):
      for key, value in experiment.keywords(solver, {}, block).items():
        lines.append(f"| {name} | {block} | `{key}` | `{settings.shown(value)}` |")
  return "\n".join(lines) + "\n"


def _inner(name: str, kind: type[settings.Settings]):
  """(full name, class) of the blocks within a block, each before its own inner ones."""
  for field in dataclasses.fields(kind):
    inner = settings.block_of(field)
    if inner is not None:
      yield f"{name}.{field.name}", inner
      yield from _inner(f"{name}.{field.name}", inner)


def _block(name: str, kind: type[settings.Settings]) -> list[str]:
  """The section of one block."""
  lines = [f"\n## {name}\n", (kind.__doc__ or "").strip().splitlines()[0], ""]
  rows = [
    (field, field.metadata["rule"])
    for field in dataclasses.fields(kind)
    if _rule(field)
  ]
  if not rows:
    return lines[:2]
  lines += ["| key | default | accepts | meaning |", "|---|---|---|---|"]
  for field, rule in rows:
    free = " •" if rule.free else ""
    shown = settings.shown(settings.default_of(field)).replace("|", "\\|")
    lines.append(f"| `{field.name}`{free} | `{shown}` | {rule.words} | {rule.help} |")
  return lines


def _rule(field: dataclasses.Field) -> bool:
  return field.metadata.get("rule") is not None


if __name__ == "__main__":
  PAGE.write_text(page())
