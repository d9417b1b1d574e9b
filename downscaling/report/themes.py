"""How every figure looks: one restrained, colour-blind safe palette, drawn by Agg.

A figure is a function draw(theme) -> Figure. It is drawn once, on light paper; the report's style
sheet adapts it to dark pages (html_page.py). All figures are WIDTH inches wide: across a 400 px
screen their 9.5 pt text stays about 10 px high.
"""

import dataclasses
import io
from collections.abc import Callable

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image

WIDTH = 5.2
DPI = 180

LABELS = {"lflr": "LFLR, as it came"}


@dataclasses.dataclass(frozen=True)
class Theme:
  """Colours of a page: paper and ink, and one colour for every kind of row."""

  name: str
  paper: str
  ink: str
  muted: str
  grid: str
  debiased: str
  raw: str
  cubic: str
  free: str
  true: str
  low: str
  high: str

  def line(self, row: str) -> dict:
    """Colour, dashes and width of a row's line; the dashes tell rows apart where the colours do
    not.
    """
    kinds = {
      "lflr": (self.raw, (0, (5, 1.5))), "raw": (self.raw, (0, (5, 1.5))),
      "equivariant": (self.debiased, "-"),
      "unconditional": (self.free, (0, (1, 1.2))), "true": (self.true, (0, (7, 1.5, 1, 1.5))),
      "entropic": (self.free, (0, (4, 1.2))), "gaussian": (self.true, (0, (1, 1.2))),
      "reference": (self.ink, "-"), "floor": (self.muted, (0, (1, 2))),
    }  # fmt: skip
    if row.endswith("cubic"):
      behind = {"quantile": (0, (1, 1)), "pooled_quantile": (0, (1, 2.5))}
      colour = self.cubic
      dashes = behind.get(row.split("+")[0], (0, (3, 1.2, 1, 1.2)))
    else:
      colour, dashes = kinds.get(
        row.split("+")[0].split()[0], (self.cubic, (0, (2, 1)))
      )
    if row.endswith("in-sample"):
      return {"color": colour, "linestyle": (0, (2, 1.5)), "linewidth": 1.1}
    return {"color": colour, "linestyle": dashes, "linewidth": 1.5}

  @property
  def diverging(self) -> LinearSegmentedColormap:
    """Negative, zero (the paper itself), positive."""
    return LinearSegmentedColormap.from_list(
      f"ours-{self.name}", [self.low, self.debiased, self.paper, self.raw, self.high]
    )


LIGHT = Theme(
  "light", paper="#ffffff", ink="#20262b", muted="#737b82", grid="#e6e4df", debiased="#2a78b0",
  raw="#cc5a3b",
  cubic="#7d8a1f", free="#8562b0", true="#b8860b", low="#0c2f4f", high="#5e1a0c",
)  # fmt: skip


def label(row: str) -> str:
  """What a row is called in print: equivariant+diffusion is "equivariant + diffusion"."""
  return LABELS.get(row, row).replace("+", " + ").replace(" in-sample", ", in-sample")


def _style(theme: Theme) -> dict:
  return {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9.5, "xtick.labelsize": 9, "ytick.labelsize": 9, "legend.fontsize": 9,
    "figure.facecolor": theme.paper, "axes.facecolor": theme.paper,
    "savefig.facecolor": theme.paper,
    "text.color": theme.ink, "axes.labelcolor": theme.ink, "axes.titlecolor": theme.ink,
    "axes.edgecolor": theme.muted,
    "xtick.color": theme.muted, "ytick.color": theme.muted, "xtick.labelcolor": theme.ink,
    "ytick.labelcolor": theme.ink, "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": False, "grid.color": theme.grid, "grid.linewidth": 0.6, "legend.frameon": False,
    "legend.handlelength": 2.2, "axes.titlelocation": "left", "image.interpolation": "nearest",
    "lines.solid_capstyle": "round", "mathtext.default": "regular",
  }  # fmt: skip


def page(height: float) -> Figure:
  """An empty figure of WIDTH x height inches with automatic layout."""
  return Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")


def render(draw: Callable[[Theme], Figure], theme: Theme = LIGHT) -> bytes:
  """PNG of draw(theme)."""
  with matplotlib.rc_context(_style(theme)):
    drawn = FigureCanvasAgg(draw(theme))
    drawn.draw()
  pixels = np.asarray(drawn.buffer_rgba())[..., :3]
  # 256 colours are more than lines and a colour scale need, at a third of the size.
  out = io.BytesIO()
  Image.fromarray(pixels).quantize(256).save(out, format="png")
  return out.getvalue()


def pixels(draw: Callable[[Theme], Figure], theme: Theme = LIGHT) -> np.ndarray:
  """[height, width, 3] uint8 of draw(theme)."""
  with Image.open(io.BytesIO(render(draw, theme))) as image:
    return np.asarray(image.convert("RGB"))
