"""What the docs mention exists, and they keep their form."""

import importlib.util
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# Texts of results are records of their runs, and name the files of their day.
PAGES = [
  *(p for p in (ROOT / "docs").rglob("*.md") if "results" not in p.parts),
  *(p for p in ROOT.glob("*.md") if p.name != "CHANGELOG.md"),
  *(ROOT / "pretrained").rglob("*.md"),
]
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
FOLDERS = "downscaling|benchmarks|launch|configs|tests|docs"
FILE = re.compile(rf"(?:{FOLDERS})/[\w/.-]+\.(?:py|sh|md|yml)")
MODULE = re.compile(r"\bdownscaling(?:\.[a-z_]\w*)+")
PARTS = {"/".join(p.parts[-2:]) for p in (ROOT / "downscaling").rglob("*.py")}
SHORT = re.compile(r"(?<![\w/])([a-z_]+/[a-z_]+\.py)\b")


def name(path):
  return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
  text = FENCE.sub("", page.read_text())
  for target in LINK.findall(text):
    path, _, anchor = target.partition("#")
    if "://" in target or target.startswith("mailto:"):
      continue
    there = (page.parent / path).resolve() if path else page
    assert there.exists(), f"{name(page)} links to {target}"
    if anchor and there.suffix == ".md":
      assert anchor in anchors(there), f"{name(page)} links to {target}"


def anchors(page):
  """Of every heading, as GitHub and MkDocs make them."""
  found = set()
  for heading in re.findall(
    r"^#+\s+(.*)$", FENCE.sub("", page.read_text()), re.MULTILINE
  ):
    plain = re.sub(r"[^\w\s-]", "", heading.lower(), flags=re.UNICODE)
    found |= {re.sub(r"\s+", "-", plain.strip()), re.sub(r"\s", "-", plain.strip())}
  return found


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_and_modules_exist(page):
  """Also in code blocks, but for files that a recipe writes."""
  text = page.read_text()
  written = set(re.findall(r'title="([^"]+)"', text))
  for file in {*FILE.findall(text)} - written:
    assert (ROOT / file).exists(), f"{name(page)} mentions {file}"
  for file in SHORT.findall(FENCE.sub("", text)):
    assert file in PARTS or (ROOT / file).exists(), f"{name(page)} mentions {file}"
  for module in MODULE.findall(FENCE.sub("", text)):
    assert known(module), f"{name(page)} mentions {module}"


def known(dotted):
  """Is it a module or package, or an attribute of one?"""
  parts = dotted.split(".")
  for end in range(len(parts), 0, -1):
    module = ROOT.joinpath(*parts[:end])
    source = module.with_suffix(".py") if module.with_suffix(".py").exists() else module
    source = source / "__init__.py" if source.is_dir() else source
    if source.exists():
      return (
        end == len(parts)
        or re.search(rf"\b{parts[end]}\b", source.read_text()) is not None
      )
  return False


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_lines_are_short(page):
  """100 columns, but for tables, code, pictures and words that cannot be broken."""
  for line in FENCE.sub("", page.read_text()).splitlines():
    free = line.startswith(("|", "![", "<", "    ")) or len(line.split()) < 4
    assert len(line) <= 100 or free, f"{name(page)}: {line}"


def test_readme_is_for_a_newcomer():
  assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_page_of_keys_is_that_of_the_rules():
  """Written anew by `python docs/config_page.py`."""
  spec = importlib.util.spec_from_file_location(
    "config_page", ROOT / "docs" / "config_page.py"
  )
  module = importlib.util.module_from_spec(spec)
  sys.modules["config_page"] = module
  spec.loader.exec_module(module)
  assert module.PAGE.read_text() == module.page()
