"""Write a COCO-format annotation file with a few images of another, for quick experiments.

    python tools/subset_annotations.py data/coco/annotations/instances_train2017.json \
        data/coco/annotations/sixteen.json --images 16 --min-objects 3 --max-objects 12
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import _init_paths  # noqa: F401 - puts lib/ on the path
from core.errors import UserError, exit_on_user_error
from utils.run_dir import refuse_overwriting, write_text


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="annotation file to choose from")
    parser.add_argument("target", type=Path, help="annotation file to write")
    parser.add_argument("--images", type=int, default=16, help="how many, in the file's order")
    parser.add_argument("--min-objects", type=int, default=1, help="objects an image must have")
    parser.add_argument("--max-objects", type=int, default=1000, help="and may have at most")
    parser.add_argument(
        "--min-keypoints", type=int, default=0, help="labelled keypoints that make an object count"
    )
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.images < 1:
        raise UserError(f"--images must be at least 1, not {args.images}")
    refuse_overwriting([args.target], [args.source], "name another file to write")
    try:
        source = json.loads(args.source.read_text())
        images, annotations = source["images"], source["annotations"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{args.source} is not a COCO-format annotation file: {error}") from error
    crowded = {a["image_id"] for a in annotations if a.get("iscrowd")}
    counted = [a for a in annotations if a.get("num_keypoints", 0) >= args.min_keypoints]
    objects = Counter(a["image_id"] for a in counted)
    wanted = range(args.min_objects, args.max_objects + 1)
    chosen = [i for i in images if objects[i["id"]] in wanted and i["id"] not in crowded]
    if len(chosen) < args.images:
        raise UserError(
            f"{args.source} has {len(chosen)} images with {args.min_objects} to "
            f"{args.max_objects} objects (of {args.min_keypoints} keypoints or more) and no crowd, "
            f"not {args.images}: ask for fewer"
        )
    chosen = chosen[: args.images]
    ids = {image["id"] for image in chosen}
    kept = [a for a in annotations if a["image_id"] in ids]
    write_text(args.target, json.dumps({**source, "images": chosen, "annotations": kept}))
    print(f"{args.target}: {len(chosen)} images, {len(kept)} objects")


if __name__ == "__main__":
    sys.exit(main())
