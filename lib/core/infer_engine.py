"""Photographs and videos to pictures, COCO results and galleries of what is in them.

Files are decoded, the network runs, and pictures are drawn and written, all at the same time.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import utils.boxes as box_utils
from core.config import cfg
from core.errors import UserError
from core.predictor import Predictor, Result
from utils.gallery import gallery_page, item
from utils.html_page import write_page
from utils.image_sources import read_ahead, read_photos
from utils.progress import Progress
from utils.run_dir import make_folder
from utils.segms import compress_rle
from utils.video import VideoReader, VideoWriter
from utils.vis import picture_names, write_picture
from utils.vis_pdf import merge_pdfs
from utils.weights import atomic_write

logger = logging.getLogger(__name__)

MERGED, RESULTS, GALLERY = "results.pdf", "detections.json", "gallery.html"


@dataclass(frozen=True)
class InferOptions:
    """What to write besides the pictures, and what to draw.

    thresh, kp_thresh: lowest score of a detection and logit of a keypoint to draw; picture_format:
    pdf, png or jpg; merge: all PDF pages in one file too; json: COCO results; html: a gallery.
    JSON and gallery hold everything that scores TEST.SCORE_THRESH.
    """

    thresh: float = 0.7
    kp_thresh: float = 2.0
    picture_format: str = "pdf"
    merge: bool = True
    json: bool = False
    html: bool = False


def image_outputs(images: Sequence[Path], folder: Path, options: InferOptions) -> list[Path]:
    """What `infer_images` writes: a picture for each image, in their order, then the rest."""
    names = picture_names(images, options.picture_format, taken={MERGED})
    if options.picture_format == "pdf" and options.merge:
        names.append(MERGED)
    names += [RESULTS] * options.json + [GALLERY] * options.html
    return [folder / name for name in names]


def video_outputs(output: Path, options: InferOptions) -> list[Path]:
    """What `infer_video` writes: the video, then the rest."""
    return [output, output.parent / f"{output.stem}.json"] if options.json else [output]


def infer_images(
    predictor: Predictor, images: Sequence[Path], folder: Path, options: InferOptions
) -> list[str]:
    """Draw what is in image files, into a folder.

    Returns:
        a sentence for each file that cannot be read; the others are done.

    Raises:
        UserError: none of the files can be read, or the folder cannot be written to.
    """
    make_folder(folder)
    pictures = image_outputs(images, folder, options)
    problems: list[str] = []
    done: dict[int, tuple[list[dict], dict | None]] = {}
    ids = image_ids(images)

    def readable():
        for index, image in read_photos(images, cfg.DATA_LOADER.NUM_THREADS):
            if isinstance(image, UserError):
                problems.append(str(image))
                progress.advance()
            else:
                yield index, image

    def finish(index: int, image: np.ndarray, result: Result) -> tuple[int, list[dict], Any]:
        layout = result.layout(options.thresh, options.kp_thresh)
        try:
            write_picture(image, layout, pictures[index])
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"cannot write {pictures[index]} ({reason})") from error
        file = str(images[index])
        entries = coco_results(result, ids[index], file) if options.json else []
        return index, entries, _gallery_item(file, image, result) if options.html else None

    with Progress(len(images)) as progress:
        for index, entries, shown in predictor.stream(readable(), finish):
            done[index] = entries, shown
            progress.advance()
    if not done:
        raise UserError(f"none of the images can be read; the first: {problems[0]}")
    order = sorted(done)
    if options.picture_format == "pdf" and options.merge:
        merge_pdfs([pictures[index] for index in order], folder / MERGED)
    if options.json:
        write_json(folder / RESULTS, [entry for index in order for entry in done[index][0]])
    if options.html:
        shown = [done[index][1] for index in order]
        page = gallery_page(
            f"{len(shown)} pictures",
            shown,
            predictor.vocabulary.names,
            predictor.vocabulary.skeleton,
            thresh=options.thresh,
            kp_thresh=options.kp_thresh,
        )
        write_page(folder / GALLERY, page)
        logger.info("open %s in a browser", (folder / GALLERY).resolve())
    logger.info("%d pictures in %s", len(done), folder.resolve())
    return problems


def infer_video(
    predictor: Predictor, source: str | Path | int, output: Path, options: InferOptions
) -> list[str]:
    """Draw what is in each frame of a video file, or of a camera by its number, into a video.

    A camera is filmed until the keyboard interrupts. With options.json the detections are
    written beside the video, `image_id` being the frame's number.

    Returns:
        a sentence if the file ends before its time.

    Raises:
        UserError: the video cannot be opened or written, or holds no frame.
    """
    entries: list[dict] = []

    def finish(number: int, frame: np.ndarray, result: Result) -> tuple[np.ndarray, list[dict]]:
        found = coco_results(result, number, str(source)) if options.json else []
        return result.draw(frame, options.thresh, options.kp_thresh), found

    with (
        VideoReader(source) as video,
        VideoWriter(output, video.fps) as writer,
        Progress(video.frame_count, "frames") as progress,
    ):
        # The stream runs in a thread, so that encoding does not keep the network waiting.
        pictures = read_ahead(predictor.stream(video, finish), predictor.batch_size)
        try:
            for picture, found in pictures:
                writer.write(picture)
                entries += found
                progress.advance()
        except KeyboardInterrupt:
            logger.info("interrupted: the video ends here")
        finally:
            pictures.close()
        if not progress.done:
            raise UserError(f"{video.name} holds no frame that can be read.")
    if options.json:
        write_json(video_outputs(output, options)[1], entries)
    logger.info("%d frames in %s", progress.done, output.resolve())
    problem = video.missing()
    return [problem] if problem else []


def coco_results(result: Result, image_id: int, file_name: str) -> list[dict[str, Any]]:
    """An image's detections in COCO's result format, each with the name of its file.

    One entry holds an object's box, mask and keypoints (x, y, 1), with the box's score.
    """
    boxes = box_utils.xyxy_to_xywh(result.boxes.astype(np.float64)).tolist()
    entries = []
    for i, (box, score) in enumerate(zip(boxes, result.scores.tolist(), strict=True)):
        entry: dict[str, Any] = {
            "image_id": image_id,
            "file_name": file_name,
            "category_id": result.vocabulary.category_ids[result.classes[i]],
            "bbox": box,
            "score": score,
        }
        if result.rles is not None:
            rle = compress_rle(result.rles[i])
            counts = rle["counts"].decode("ascii")
            entry["segmentation"] = {"size": list(rle["size"]), "counts": counts}
        if result.keypoints is not None:
            x, y = result.keypoints[i, :2].astype(np.float64)
            entry["keypoints"] = np.stack([x, y, np.ones_like(x)], axis=1).reshape(-1).tolist()
        entries.append(entry)
    return entries


def image_ids(images: Sequence[str | Path]) -> list[int]:
    """COCO's ids where file names say them (000000000139.jpg, COCO_val2014_000000000139.jpg), or
    else the position in the list, from 1."""
    matches = [re.fullmatch(r"(?:COCO_[a-z]+\d+_)?(\d+)", Path(image).stem) for image in images]
    ids = [int(match[1]) for match in matches if match]
    if len(set(ids)) == len(images):
        return ids
    return list(range(1, len(images) + 1))


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with atomic_write(path) as file:
        file.write(json.dumps(content).encode())
    logger.info("%d detections in %s", len(content), path.resolve())


def _gallery_item(name: str, image: np.ndarray, result: Result) -> dict[str, Any]:
    boxes = np.hstack([result.boxes, result.scores[:, None]])
    return item(name, image, boxes, result.classes, result.rles, result.keypoints)
