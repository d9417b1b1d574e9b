"""How dense the code is: tokens per function and per line, walrus operators, room by room.

Run:     python -m benchmarks.density                     (the working tree)
Before:  python -m benchmarks.density --ref=GIT_REF       (the same tree as a commit holds it)
Another: python -m benchmarks.density some/folder         (any package, e.g. one that is installed)
Lines:   python -m benchmarks.density --lines=diffusion   (also lists the dense lines of one room)

What is counted: tokens of Python's tokenizer, without comments, line ends, indents and docstrings.
An f-string is one token, as it was before Python 3.12. A code line is a line on which at least one
token begins that is neither a string nor punctuation around one.
"""

import argparse
import ast
import collections
import dataclasses
import io
import pathlib
import statistics
import subprocess
import tarfile
import tempfile
import tokenize

DENSE = 25  # tokens; more on one line is hard to read in one go
SKIPPED = {
  tokenize.COMMENT,
  tokenize.NL,
  tokenize.NEWLINE,
  tokenize.INDENT,
  tokenize.DEDENT,
  tokenize.ENDMARKER,
  tokenize.ENCODING,
}
FSTRING_START = getattr(tokenize, "FSTRING_START", -1)
FSTRING_END = getattr(tokenize, "FSTRING_END", -1)


@dataclasses.dataclass
class Counts:
  """Token counts of one room; `dense` holds (path, line number, tokens, text)."""

  functions: list[int] = dataclasses.field(default_factory=list)
  lines: int = 0
  walrus: int = 0
  dense: list[tuple[str, int, int, str]] = dataclasses.field(default_factory=list)

  def add(self, other: "Counts") -> None:
    self.functions += other.functions
    self.lines += other.lines
    self.walrus += other.walrus
    self.dense += other.dense


def code_tokens(source: str) -> list[tokenize.TokenInfo]:
  """Tokens of a file without comments, layout and docstrings; an f-string is one token."""
  docstrings = _docstring_lines(source)
  found = []
  depth = 0  # of f-strings inside f-strings
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type == FSTRING_END:
      depth -= 1
      continue
    inside = depth > 0
    if token.type == FSTRING_START:
      depth += 1
    docstring = token.type == tokenize.STRING and token.start[0] in docstrings
    if not (inside or docstring or token.type in SKIPPED):
      found.append(token)
  return found


def count(path: str, source: str) -> Counts:
  """Counts of one file."""
  tokens = code_tokens(source)
  text = source.splitlines()
  rows = collections.defaultdict(list)
  for token in tokens:
    rows[token.start[0]].append(token)
  code = {row: len(found) for row, found in rows.items() if any(map(_is_code, found))}
  functions = []
  for first, last in _function_lines(source):
    functions.append(sum(first <= token.start[0] <= last for token in tokens))
  dense = [
    (path, row, n, text[row - 1].strip())
    for row, n in sorted(code.items())
    if n > DENSE
  ]
  walrus = sum(token.string == ":=" for token in tokens)
  return Counts(functions, len(code), walrus, dense)


def _is_code(token: tokenize.TokenInfo) -> bool:
  """Is the token more than a string, or punctuation beside one?"""
  return (
    token.type not in (tokenize.STRING, FSTRING_START)
    and token.string not in "()[]{},:."
  )


def _function_lines(source: str) -> list[tuple[int, int]]:
  """(first, last) line of every function and method."""
  kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
  found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
  return [(node.lineno, node.end_lineno or node.lineno) for node in found]


def _docstring_lines(source: str) -> set[int]:
  """Lines on which a docstring begins."""
  lines = set()
  for node in ast.walk(ast.parse(source)):
    is_constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    if is_constant and isinstance(node.value.value, str):
      lines.add(node.lineno)
  return lines


def rooms(folder: pathlib.Path) -> dict[str, Counts]:
  """Counts by room: the folders directly below `folder`, and "(top)" for its own files."""
  found: dict[str, Counts] = {}
  for path in sorted(folder.rglob("*.py")):
    inner = path.relative_to(folder)
    room = inner.parts[0] if len(inner.parts) > 1 else "(top)"
    found.setdefault(room, Counts()).add(count(str(inner), path.read_text()))
  return found


def row(name: str, counts: Counts) -> str:
  """One line of the table."""
  functions = sorted(counts.functions) or [0]
  p90 = functions[int(0.9 * (len(functions) - 1))]
  share = 100 * len(counts.dense) / max(counts.lines, 1)
  walrus = 1000 * counts.walrus / max(counts.lines, 1)
  median = statistics.median(functions)
  return (
    f"{name:14} {counts.lines:6} {median:8.0f} {p90:6} {share:8.1f} % {walrus:8.1f}"
  )


def table(found: dict[str, Counts]) -> str:
  """The table of all rooms, with a last line for all of them together."""
  total = Counts()
  for counts in found.values():
    total.add(counts)
  head = f"{'room':14} {'lines':>6} {'median':>8} {'p90':>6} {'> 25':>10} {'walrus':>8}"
  lines = [row(name, counts) for name, counts in found.items()]
  note = "median, p90: tokens per function; > 25: share of code lines; walrus: per 1000 code lines"
  return "\n".join([head, *lines, row("all", total), note])


def checked_out(ref: str, folder: str, into: str) -> pathlib.Path:
  """Writes `folder` as the commit `ref` holds it below `into`; returns where it is."""
  packed = subprocess.run(
    ["git", "archive", ref, folder], check=True, capture_output=True
  ).stdout
  with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
    archive.extractall(into, filter="data")
  return pathlib.Path(into, folder)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("folder", nargs="?", default="downscaling")
  parser.add_argument(
    "--ref", help="a commit or branch to measure instead of the working tree"
  )
  parser.add_argument(
    "--lines", help="a room whose dense lines are listed; 'all' for every room"
  )
  asked = parser.parse_args()
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(asked.folder)
    if asked.ref:
      folder = checked_out(asked.ref, asked.folder, scratch)
    found = rooms(folder)
  print(table(found))
  for name, counts in found.items():
    if asked.lines in (name, "all"):
      for path, number, tokens, text in counts.dense:
        print(f"{path}:{number}: {tokens}: {text}")


if __name__ == "__main__":
  main()
