"""What MkDocs does beside building pages of docs/: see mkdocs.yml.

The repository's own pages (README.md and others outside docs/) join the site, so that no text
stands twice. Their links, and links to them, are rewritten. A link to a source file becomes plain
text, because the site holds no sources. Each package of downscaling/ gets a reference page.
"""

import ast
import pathlib
import posixpath
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parent.parent
# Page of the repository -> page of the site.
GUESTS = {
  "README.md": "index.md",
  "CONTRIBUTING.md": "project/contributing.md",
  "CHANGELOG.md": "project/changelog.md",
  "SECURITY.md": "project/security.md",
  "pretrained/ks/README.md": "project/pretrained-ks.md",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)


def on_config(config):
  """Adds the generated pages to the navigation."""
  for section in config.nav:
    if "Reference" in section:
      section["Reference"] += [
        {f"downscaling.{name}": page} for name, page in rooms().items()
      ]
    if "Project" in section:
      section["Project"] = [page for page in guests().values() if page != "index.md"]
  return config


def on_files(files, config):
  """Adds the repository's own pages and the reference pages."""
  for source, page in guests().items():
    text = (ROOT / source).read_text()
    files.append(File.generated(config, page, content=rewritten(text, source, page)))
  for name, page in rooms().items():
    files.append(File.generated(config, page, content=reference(name)))
  return files


def on_page_markdown(markdown, page, **_):
  """Rewrites the links of a page of docs/ that lead out of docs/."""
  path = page.file.src_uri
  if path in guests().values():
    return markdown  # on_files has done it
  return rewritten(markdown, f"docs/{path}", path)


def guests() -> dict[str, str]:
  """Those pages of GUESTS that are there."""
  return {source: page for source, page in GUESTS.items() if (ROOT / source).exists()}


def rooms() -> dict[str, str]:
  """{package of downscaling/: its reference page}, and one for the modules beside the packages."""
  packages = sorted(path.parent.name for path in ROOT.glob("downscaling/*/__init__.py"))
  return {"*": "reference/top.md"} | {name: f"reference/{name}.md" for name in packages}


def reference(name: str) -> str:
  """The page of a package: what each of its modules holds, by mkdocstrings."""
  if name == "*":
    title, paths = "downscaling", sorted(ROOT.glob("downscaling/*.py"))
  else:
    title, paths = (
      f"downscaling.{name}",
      sorted(ROOT.glob(f"downscaling/{name}/**/*.py")),
    )
  modules = [path for path in paths if documented(path)]
  names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules]
  blocks = [f"::: {module.removesuffix('.__init__')}" for module in names]
  return "\n\n".join([f"# {title}", *blocks]) + "\n"


def documented(path: pathlib.Path) -> bool:
  """Whether a module is for users: a private one, or one without a docstring, is not."""
  private = path.stem.startswith("_") and path.stem != "__init__"
  return not private and ast.get_docstring(ast.parse(path.read_text())) is not None


def rewritten(text: str, source: str, page: str) -> str:
  """`text` of the repository's file `source`, its links made fit for `page` of the site."""

  def replace(match: re.Match) -> str:
    image, words, target = match.groups()
    path, mark, anchor = target.partition("#")
    if "://" in target or target.startswith("mailto:") or not path:
      return match[0]
    file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    known = guests()
    if file in known:
      place = known[file]
    elif file.startswith("docs/") and not file.endswith(".ipynb"):
      place = file.removeprefix("docs/")
    elif (ROOT / file).exists():
      return words if words.startswith("`") else f"{words} (`{file}`)"
    else:
      return match[0]  # MkDocs reports it
    path = posixpath.relpath(place, posixpath.dirname(page) or ".")
    return f"{image}[{words}]({path}{mark}{anchor})"

  parts = FENCE.split(text)
  return "".join(
    part if i % 2 else LINK.sub(replace, part) for i, part in enumerate(parts)
  )
