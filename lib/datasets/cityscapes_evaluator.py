"""Cityscapes' metric of instances, by its own scripts (package cityscapesscripts) if installed."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np

import utils.segms as segm_utils
from core.config import cfg
from core.errors import UserError
from datasets.json_dataset import JsonDataset

logger = logging.getLogger(__name__)


def is_cityscapes(dataset: JsonDataset) -> bool:
    """Whether masks of a data set are scored as Cityscapes': by its name."""
    return "cityscapes_" in dataset.name


def raw_dir() -> Path:
    """Where Cityscapes' own folders (gtFine/) are."""
    return Path(cfg.DATA_DIR).resolve() / "cityscapes" / "raw"


def evaluate_masks(
    dataset: JsonDataset, all_boxes: Sequence, all_segms: Sequence, output_dir: str | Path
) -> dict[str, float] | None:
    """Write masks (as in datasets.json_dataset_evaluator) in Cityscapes' form and score them.

    For each image `{stem}pred.txt` in output_dir, with lines `results/{stem}_{class}_{k}.png
    label_id score` and a PNG of 0 and 255 for each line.

    Returns:
        {'AP', 'AP50'} over the classes, in [0, 1]; None, and a sentence in the log, without
        cityscapesscripts.
    Raises:
        UserError: the images' ground truth is not in the raw folder.
    """
    try:
        from cityscapesscripts.evaluation import evalInstanceLevelSemanticLabeling as scripts
        from cityscapesscripts.helpers.labels import name2label
    except ImportError as error:
        logger.warning(
            "The masks of %s are not scored: that takes Cityscapes' own scripts (%s: pip install "
            "cityscapesscripts, then --eval_only with the detections file).",
            dataset.name,
            error,
        )
        return None
    output_dir = Path(output_dir).resolve()
    label_ids = {name: name2label[name].id for name in dataset.classes[1:]}
    predictions = write_predictions(dataset, all_boxes, all_segms, output_dir, label_ids)
    truth = [_ground_truth_file(scripts, path) for path in predictions]
    averages = _score(scripts, predictions, truth, output_dir)
    return {"AP": float(averages["allAp"]), "AP50": float(averages["allAp50%"])}


def write_predictions(
    dataset: JsonDataset,
    all_boxes: Sequence,
    all_segms: Sequence,
    output_dir: Path,
    label_ids: dict[str, int],
) -> list[Path]:
    """The text file of each image, written with its masks; see evaluate_masks."""
    (output_dir / "results").mkdir(parents=True, exist_ok=True)
    written = []
    for index, image in enumerate(dataset.COCO.loadImgs(dataset.image_ids)):
        stem = Path(image["file_name"]).stem
        lines = []
        for label, name in enumerate(dataset.classes[1:], start=1):
            found = zip(all_boxes[label][index], all_segms[label][index], strict=True)
            for k, (box, segm) in enumerate(found):
                file = f"results/{stem}_{name.replace(' ', '_')}_{k}.png"
                # Level 1: masks compress well, and there are many.
                done = cv2.imwrite(
                    str(output_dir / file),
                    255 * segm_utils.rle_to_mask(segm),
                    [cv2.IMWRITE_PNG_COMPRESSION, 1],
                )
                if not done:
                    raise OSError(f"cannot write {output_dir / file}")
                lines.append(f"{file} {label_ids[name]} {float(box[-1])}\n")
        written.append(output_dir / f"{stem}pred.txt")
        written[-1].write_text("".join(lines))
    return written


def _ground_truth_file(scripts: ModuleType, prediction: Path) -> str:
    """The picture of instance numbers of an image, by its city, sequence and frame."""
    info = scripts.getCsFileInfo(prediction.name)
    pattern = f"{info.city}_{info.sequenceNb}_{info.frameNb}_gtFine_instanceIds.png"
    found = sorted(raw_dir().glob(f"gtFine/*/{info.city}/{pattern}"))
    if not found:
        raise UserError(
            f"Cityscapes' ground truth {raw_dir() / 'gtFine/*' / info.city / pattern} does not "
            "exist; soft-link the folder with gtFine/ there"
        )
    return str(found[0])


def _score(
    scripts: ModuleType, predictions: Sequence[Path], truth: Sequence[str], output_dir: Path
) -> dict[str, Any]:
    args = scripts.args
    args.cityscapesPath = str(raw_dir())
    args.predictionPath, args.predictionWalk = str(output_dir), None
    # By default a cache in the package's own folder, whatever the images were.
    args.gtInstancesFile = str(output_dir / "gtInstances.json")
    Path(args.gtInstancesFile).unlink(missing_ok=True)
    args.colorized = False
    if not hasattr(np, "in1d"):  # numpy 2.4 took the name away that the scripts (2.3) use
        np.in1d = np.isin
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        # Its evaluateImgLists also writes JSON files, and with numpy 2 cannot.
        scripts.setInstanceLabels(args)
        instances = scripts.getGtInstances(list(truth), args)
        matches = scripts.matchGtWithPreds(
            [str(p) for p in predictions], list(truth), instances, args
        )
        averages = scripts.computeAverages(scripts.evaluateMatches(matches, args), args)
        said.truncate(0)  # of its progress
        said.seek(0)
        scripts.printResults(averages, args)
    logger.info("Cityscapes' scripts:\n%s", said.getvalue().rstrip())
    return averages
