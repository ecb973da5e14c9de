"""Small pictures without a display: a palette of 128 colours makes a PNG a third as large."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Told apart by people who do not see all colours (Okabe and Ito).
COLORS = ("#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000")


def new_figure(inches: tuple[float, float]) -> "Figure":
    """Return a figure whose text can still be read when it is shown 900 pixels wide."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["font.size"] = 13
    return Figure(figsize=inches, layout="constrained")


def save_png(figure: "Figure", path: Path) -> None:
    """Write the figure at 100 pixels an inch."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    figure.set_dpi(100)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.quantize(128).save(path, format="PNG", optimize=True)
