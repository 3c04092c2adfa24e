"""Everything that is wrong with annotations in COCO's format, not only the first thing."""

from __future__ import annotations

import collections
import math
from dataclasses import dataclass, field
from typing import Any

ERROR, WARNING = "error", "warning"
_EXAMPLES = 5
_TINY_SIDE = 2  # pixels: boxes below are hardly objects
_HUGE_SHARE = 0.98  # of the image
_LOOSE = 0.2  # of the box's side: by so much a box may differ from its polygons


@dataclass
class Finding:
    """One kind of thing that is wrong, how often, and the first few places."""

    level: str
    what: str
    count: int = 0
    examples: list[str] = field(default_factory=list)


class Findings:
    """What was found in a split, by kind."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, str], Finding] = {}

    def add(self, level: str, what: str, where: object) -> None:
        finding = self._kinds.setdefault((level, what), Finding(level, what))
        finding.count += 1
        if len(finding.examples) < _EXAMPLES:
            finding.examples.append(str(where))

    def sorted(self) -> list[Finding]:
        """Errors first, each level by count."""
        return sorted(self._kinds.values(), key=lambda f: (f.level != ERROR, -f.count))


def check_annotations(data: Any, found: Findings) -> dict[str, list[dict[str, Any]]]:
    """Look at the content of an annotation file.

    Returns what can be used of it: `images`, `categories` and `annotations` that have all their
    keys and refer to each other.
    """
    if not isinstance(data, dict):
        found.add(ERROR, "not in COCO's format", "no JSON object on top")
        data = {}
    usable = {}
    for key, keys in {
        "images": ("id", "file_name", "height", "width"),
        "categories": ("id", "name"),
        "annotations": ("image_id", "category_id", "bbox"),
    }.items():
        usable[key] = []
        entries = data.get(key)
        if not isinstance(entries, list):
            if key != "annotations" or entries is not None:
                found.add(ERROR, "not in COCO's format", f"there is no list {key!r}")
            continue
        for number, entry in enumerate(entries):
            absent = [k for k in keys if not isinstance(entry, dict) or k not in entry]
            if absent:
                found.add(ERROR, f"{key} without {absent[0]!r}", f"number {number}")
            else:
                usable[key].append(entry)
    usable["images"] = _check_images(usable["images"], found)
    _check_categories(usable["categories"], found)
    usable["annotations"] = _check_objects(usable, found)
    return usable


def _check_images(images: list[dict], found: Findings) -> list[dict]:
    for key in ("id", "file_name"):
        counts = collections.Counter(image[key] for image in images)
        for value, count in counts.items():
            if count > 1:
                found.add(ERROR, f"image {key} used more than once", f"{value} ({count} times)")
    usable = {}
    for image in images:
        sides = image["height"], image["width"]
        if all(isinstance(side, int) and side > 0 for side in sides):
            usable.setdefault(image["id"], image)
        else:
            found.add(ERROR, "images without a size in whole pixels", image["file_name"])
    return list(usable.values())


def _check_categories(categories: list[dict], found: Findings) -> None:
    for key in ("id", "name"):
        counts = collections.Counter(category[key] for category in categories)
        for value, count in counts.items():
            if count > 1:
                found.add(ERROR, f"category {key} used more than once", f"{value!r}")


def _check_objects(data: dict[str, list[dict]], found: Findings) -> list[dict]:
    images = {image["id"]: image for image in data["images"]}
    categories = {c["id"]: c for c in data["categories"]}
    ids = collections.Counter(obj.get("id") for obj in data["annotations"])
    usable, seen = [], set()
    with_masks = any(obj.get("segmentation") for obj in data["annotations"])
    for number, obj in enumerate(data["annotations"]):
        label = f"annotation {obj.get('id', f'number {number}')}"
        if obj.get("id") in (None, 0) or ids[obj["id"]] > 1:
            found.add(WARNING, "annotation ids missing, 0 or repeated (renumbered)", label)
        image = images.get(obj["image_id"])
        if image is None:
            found.add(ERROR, "objects of an image that is not listed", label)
            continue
        if obj["category_id"] not in categories:
            found.add(ERROR, "objects of an unknown category", f"{label}: {obj['category_id']}")
            continue
        where = f"{label} in {image['file_name']}"
        if not _check_box(obj, image, where, found):
            continue
        _check_mask(obj, image, where, found, with_masks)
        _check_keypoints(obj, image, categories[obj["category_id"]], where, found)
        same = (obj["image_id"], obj["category_id"], *obj["bbox"])
        if same in seen:
            found.add(WARNING, "objects given twice (image, class and box)", where)
        seen.add(same)
        usable.append(obj)
    return usable


def _check_box(obj: dict, image: dict, where: str, found: Findings) -> bool:
    """Whether the box can be drawn."""
    box = obj["bbox"]
    is_box = isinstance(box, list) and len(box) == 4
    if not is_box or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in box):
        found.add(ERROR, "boxes that are not four numbers [x, y, width, height]", where)
        return False
    (x, y, w, h), width, height = box, image["width"], image["height"]
    place = f"{where}: {box} in {width} x {height}"
    if w <= 0 or h <= 0:
        found.add(WARNING, "boxes without area (not trained on)", place)
        return False
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        found.add(ERROR, "boxes outside their image", place)
        return False
    if max(-x, -y, x + w - width, y + h - height) >= 1:
        found.add(WARNING, "boxes that reach over the image's edge (cut)", place)
    if min(w, h) < _TINY_SIDE:
        found.add(WARNING, f"boxes less than {_TINY_SIDE} pixels wide or high", place)
    elif w * h > _HUGE_SHARE * width * height and not obj.get("iscrowd"):
        found.add(WARNING, f"boxes over {100 * _HUGE_SHARE:.0f} % of their image", place)
    return True


def _check_mask(obj: dict, image: dict, where: str, found: Findings, with_masks: bool) -> None:
    segm = obj.get("segmentation")
    if not segm:
        if with_masks:
            found.add(WARNING, "objects without a mask among others with one", where)
        return
    size = [image["height"], image["width"]]
    if isinstance(segm, dict):
        if list(segm.get("size", ())) != size or "counts" not in segm:
            found.add(ERROR, "run-length masks that do not fit their image", where)
        return
    points = []
    for polygon in segm:
        if not isinstance(polygon, list) or len(polygon) % 2:
            found.add(ERROR, "polygons that are not lists x1, y1, x2, y2, ...", where)
            return
        if len(polygon) < 6:
            found.add(WARNING, "polygons of less than three points (left out)", where)
        else:
            points.append(polygon)
    if not points:
        return
    xs, ys = ([v for polygon in points for v in polygon[axis::2]] for axis in (0, 1))
    extent = min(xs), min(ys), max(xs), max(ys)
    if max(-extent[0], -extent[1], extent[2] - size[1], extent[3] - size[0]) > 1:
        found.add(WARNING, "polygons that reach over the image's edge", where)
    x, y, w, h = obj["bbox"]
    differences = (extent[0] - x, extent[2] - x - w), (extent[1] - y, extent[3] - y - h)
    for side, pair in zip((w, h), differences, strict=True):
        if max(map(abs, pair)) > max(3.0, _LOOSE * side):
            found.add(WARNING, "boxes that do not fit their polygons", where)
            break


def _check_keypoints(obj: dict, image: dict, category: dict, where: str, found: Findings) -> None:
    names = category.get("keypoints")
    points = obj.get("keypoints")
    if not names or points is None:
        return
    if len(points) != 3 * len(names):
        what = f"keypoints that are not 3 numbers for each of {len(names)}"
        found.add(ERROR, what, f"{where}: {len(points)}")
        return
    for x, y, visible in zip(points[0::3], points[1::3], points[2::3], strict=True):
        if visible > 0 and not (0 <= x <= image["width"] and 0 <= y <= image["height"]):
            found.add(WARNING, "keypoints outside their image", where)
            return


def object_statistics(data: dict[str, list[dict]]) -> dict[str, Any]:
    """Counts for a person to look at: images, sizes, objects in all and by class."""
    images, objects = data["images"], data["annotations"]
    per_image = collections.Counter(obj["image_id"] for obj in objects)
    names = {c["id"]: c["name"] for c in data["categories"]}
    classes: dict[str, dict[str, Any]] = {
        name: {"objects": 0, "images": set()} for name in names.values()
    }
    sizes = collections.Counter()
    for obj in objects:
        name = names[obj["category_id"]]
        classes[name]["objects"] += 1
        classes[name]["images"].add(obj["image_id"])
        area = obj.get("area", obj["bbox"][2] * obj["bbox"][3])
        sizes["small" if area < 32**2 else "medium" if area < 96**2 else "large"] += 1
    shorter = sorted(min(i["height"], i["width"]) for i in images)
    longer = sorted(max(i["height"], i["width"]) for i in images)
    ratios = sorted(i["width"] / i["height"] for i in images)
    return {
        "images": len(images),
        "images_without_objects": len(images) - len(per_image),
        "objects": len(objects),
        "crowds": sum(bool(obj.get("iscrowd")) for obj in objects),
        "difficult": sum(bool(obj.get("difficult")) for obj in objects),
        "with_mask": sum(bool(obj.get("segmentation")) for obj in objects),
        "with_keypoints": sum(bool(obj.get("num_keypoints")) for obj in objects),
        "most_in_one_image": max(per_image.values(), default=0),
        "shorter_side": _spread(shorter),
        "longer_side": _spread(longer),
        "width_over_height": _spread(ratios),
        "sizes": {key: sizes[key] for key in ("small", "medium", "large")},
        "classes": {
            name: {"objects": c["objects"], "images": len(c["images"])}
            for name, c in classes.items()
        },
    }


def _spread(values: list[float]) -> list[float]:
    """Smallest, middle and largest."""
    return [values[0], values[len(values) // 2], values[-1]] if values else []
