"""Pictures with their detections as one HTML file: a score slider, a class filter, no network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.html_page import image_uri, json_block, page
from utils.segms import Segmentation
from utils.skeleton import Skeleton
from utils.vis_layout import MIN_LONG_SIDE, Colour, class_colour, contours, text_colour

# Pictures are for looking at: a gallery of photographs at full size would not load.
LONGEST_SIDE = 1280

SCRIPT = Path(__file__).with_suffix(".js").read_text(encoding="utf-8")

STYLE = """
.bar { position: sticky; top: 0; z-index: 2; background: Canvas; padding: .5rem 0;
  border-bottom: 1px solid var(--line); display: flex; flex-wrap: wrap; gap: .4rem 1.4rem;
  align-items: center; }
.bar input[type=range] { vertical-align: middle; width: 14rem; }
#score-value { display: inline-block; width: 2.4em; font-variant-numeric: tabular-nums; }
#classes { display: flex; flex-wrap: wrap; gap: .1rem .9rem; max-height: 6rem; overflow-y: auto; }
#classes i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; }
#grid { display: grid; gap: 1rem; margin-top: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
#grid figure.large { grid-column: 1 / -1; }
.frame { position: relative; overflow: hidden; cursor: zoom-in; line-height: 0; }
.large .frame { cursor: zoom-out; }
.frame img { width: 100%; }
.frame svg { position: absolute; inset: 0; width: 100%; height: 100%; }
.frame svg * { vector-effect: non-scaling-stroke; }
.tag { position: absolute; font: 11px/1.25 system-ui, sans-serif; padding: 0 .25em;
  white-space: nowrap; opacity: .9; }
.tag:hover { z-index: 1; opacity: 1; }
"""


def item(
    name: str,
    image: np.ndarray,
    boxes: np.ndarray,
    classes: Sequence[int],
    segms: Sequence[Segmentation] | None = None,
    keypoints: Sequence[np.ndarray] | None = None,
    *,
    with_picture: bool = True,
) -> dict[str, Any]:
    """One picture for the page's script.

    Args:
        image: (H, W, 3) uint8 BGR.
        boxes: (n, 5) `[x1, y1, x2, y2, score]`; classes: n labels.
        segms: n RLEs or lists of polygons; keypoints: n arrays (4, K).
        with_picture: False leaves the pixels out, for a page that has them already.
    """
    height, width = image.shape[:2]
    scale = max(1.0, MIN_LONG_SIDE / max(height, width))  # as in a picture of its own
    found = []
    for i, (*box, score) in enumerate(np.asarray(boxes, float).tolist()):
        entry = {"c": int(classes[i]), "s": round(score, 4), "b": [round(v, 1) for v in box]}
        entry["m"] = []
        if segms is not None:
            outlines = contours(segms[i], (height, width), scale)
            # Outlines run through the middles of pixels.
            entry["m"] = [np.round((o.reshape(-1) + 0.5) / scale, 1).tolist() for o in outlines]
        if keypoints is not None:
            entry["k"] = np.round(keypoints[i][:3].T, 2).tolist()
        found.append(entry)
    made: dict[str, Any] = {"name": name, "width": width, "height": height, "found": found}
    if with_picture:
        made["src"] = image_uri(image, longest=LONGEST_SIDE)
    return made


def meta(names: Sequence[str], skeleton: Skeleton) -> dict[str, Any]:
    """What the page's script must know of the classes (by label) and of the keypoints."""
    colours = [class_colour(label) for label in range(len(names))]
    lines = zip(skeleton.lines, skeleton.colours, strict=True)
    return {
        "classes": list(names),
        "colours": [_css(colour) for colour in colours],
        "text": [_css(text_colour(colour)) for colour in colours],
        "lines": [[list(a), list(b), _css(colour)] for (a, b), colour in lines],
    }


def controls(thresh: float, kp_thresh: float | None) -> str:
    """The bar of sliders and ticks, and the grid that pictures go to. kp_thresh: None without
    keypoints."""
    points = ""
    if kp_thresh is not None:
        points = (
            '<label>keypoint logit <input type="range" id="point" min="-5" max="15" step="0.5" '
            f'value="{kp_thresh}"></label>'
        )
    return f"""<div class="bar">
<label>score at least <span id="score-value"></span>
<input type="range" id="score" min="0" max="1" step="0.01" value="{thresh}"></label>{points}
<label><input type="checkbox" id="masks" checked> masks</label>
<label><input type="checkbox" id="empty" checked> pictures without detections</label>
<span id="total"></span>
<span><button id="all">all classes</button> <button id="none">none</button></span>
<div id="classes"></div></div>
<div id="grid"></div>"""


def gallery_page(
    title: str,
    items: Sequence[dict[str, Any]],
    names: Sequence[str],
    skeleton: Skeleton,
    *,
    thresh: float = 0.7,
    kp_thresh: float = 2.0,
) -> str:
    """The page of pictures (as `item` makes them): HTML that refers to nothing outside itself.

    Args:
        names: by class label; thresh, kp_thresh: where the sliders stand at first.
    """
    points = any("k" in d for made in items for d in made["found"])
    body = (
        controls(thresh, kp_thresh if points else None)
        + json_block("meta", meta(names, skeleton))
        # One block a picture: a browser need not parse hundreds of MB at once.
        + "\n".join(json_block(f"item-{i}", made) for i, made in enumerate(items))
    )
    script = (
        SCRIPT
        + """
gallery.start(JSON.parse(document.getElementById("meta").textContent));
for (const block of document.querySelectorAll("script[id^=item-]")) {
  gallery.add(JSON.parse(block.textContent));
}
gallery.refresh();
"""
    )
    return page(title, body, style=STYLE, script=script)


def _css(colour: Colour) -> str:
    return "#" + "".join(f"{channel:02x}" for channel in colour)
