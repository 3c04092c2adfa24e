"""Pictures of detections as PDF pages: the photograph below, lines and text as vectors above it."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, PathPatch, Rectangle
from matplotlib.path import Path as Outline
from pypdf import PdfWriter

from utils.vis_layout import (
    FONT_FILE,
    LABEL_ALPHA,
    MASK_ALPHA,
    Colour,
    Layout,
    Pose,
    resized,
    text_colour,
)
from utils.weights import atomic_write

# With 72 pixels to the inch a point is a pixel, so that widths and font sizes carry over.
DPI = 72

# matplotlib does not promise that two threads may draw at once.
_ONE_AT_A_TIME = threading.Lock()


def write_page(im: np.ndarray, layout: Layout, file: BinaryIO) -> None:
    """Write a PDF of one picture, from its image (H, W, 3) uint8 BGR; threads take turns."""
    with _ONE_AT_A_TIME:
        _page(im, layout).savefig(file, format="pdf")


def merge_pdfs(pages: Iterable[Path], merged: Path) -> None:
    """Put the pages of several PDFs into one, in this order."""
    with atomic_write(merged) as file, PdfWriter() as writer:
        for path in pages:
            writer.append(path)
        writer.write(file)


def _page(im: np.ndarray, layout: Layout) -> Figure:
    figure = Figure(figsize=(layout.width / DPI, layout.height / DPI), dpi=DPI)
    FigureCanvasPdf(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    # "none" embeds the pixels as they are.
    axes.imshow(
        resized(im, layout)[..., ::-1],
        extent=(0, layout.width, layout.height, 0),
        interpolation="none",
    )
    axes.set_xlim(0, layout.width)
    axes.set_ylim(layout.height, 0)
    width = layout.line_width
    for instance in layout.instances:
        colour = _unit(instance.colour)
        if instance.contours:
            outline = Outline.make_compound_path(
                *(Outline(np.vstack([c, c[:1]]) + 0.5, closed=True) for c in instance.contours)
            )
            axes.add_artist(PathPatch(outline, facecolor=(*colour, MASK_ALPHA), linewidth=0))
            axes.add_artist(
                PathPatch(outline, fill=False, edgecolor=colour, linewidth=max(1, width // 2))
            )
        left, top, right, bottom = instance.box
        axes.add_artist(
            Rectangle(
                (left + width / 2, top + width / 2),
                right - left - width,
                bottom - top - width,
                fill=False,
                edgecolor=colour,
                linewidth=width,
            )
        )
    for instance in layout.instances:
        if instance.pose is not None:
            _add_pose(axes, instance.pose)
    font = FontProperties(fname=str(FONT_FILE), size=layout.font_size)
    for instance in layout.instances:
        if (label := instance.label) is None:
            continue
        axes.add_artist(
            Rectangle(
                (label.x, label.y),
                label.width,
                label.height,
                facecolor=(*_unit(instance.colour), LABEL_ALPHA),
                linewidth=0,
            )
        )
        axes.text(
            label.x + 0.25 * layout.font_size,
            label.y + label.height / 2,
            label.text,
            color=_unit(text_colour(instance.colour)),
            fontproperties=font,
            verticalalignment="center_baseline",
            parse_math=False,  # a "$" in a class's name is a dollar
        )
    return figure


def _add_pose(axes: Axes, pose: Pose) -> None:
    for start, end, colour in pose.lines:
        xs, ys = zip(start, end, strict=True)
        axes.add_artist(Line2D(xs, ys, color=_unit(colour), linewidth=pose.line_width))
    for centre, colour in pose.points:
        axes.add_artist(Circle(tuple(centre), pose.radius, color=_unit(colour), linewidth=0))


def _unit(colour: Colour) -> tuple[float, float, float]:
    return tuple(channel / 255 for channel in colour)
