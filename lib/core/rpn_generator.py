"""Models that are an RPN alone (MODEL.RPN_ONLY): a data set's proposals, their file, their recall.

`rpn_proposals.pkl` is Detectron's file: `boxes` (R, 4) and `scores` (R,) of each image, best first,
`ids` of the images, and `cfg` as text. TRAIN.PROPOSAL_FILES and TEST.PROPOSAL_FILES take it.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from core.config import cfg
from core.errors import UserError
from core.test_forward import ImageBatch, plain_view
from core.test_pipeline import decoded_batches, precision
from core.test_results import PartFile, check_range, config_text, test_fingerprint
from datasets import task_evaluation
from datasets.json_dataset import JsonDataset
from datasets.proposals import read_proposal_file
from utils.blob import Placed
from utils.progress import Progress
from utils.run_dir import make_folder
from utils.weights import atomic_write

logger = logging.getLogger(__name__)

PROPOSALS_FILE = "rpn_proposals.pkl"
RECALL_FILE = "rpn_proposal_recall.pkl"
_PROTOCOL = 2  # of pickle: Detectron's python 2 can read it

BoxesAndScores = tuple[np.ndarray, np.ndarray]


@dataclass
class ProposalResults:
    """Proposals by image; core.test_results.PartFile keeps them while they come in."""

    part_stem: ClassVar[str] = "rpn_proposals"

    boxes: list[np.ndarray]  # (R, 4) float32, image pixels
    scores: list[np.ndarray]  # (R,) float32, descending
    ids: list[int | str]

    @classmethod
    def blank(cls, num_images: int) -> ProposalResults:
        """No proposals yet; the ids are still to come."""
        return cls(
            [np.zeros((0, 4), np.float32) for _ in range(num_images)],
            [np.zeros(0, np.float32) for _ in range(num_images)],
            [-1] * num_images,
        )

    @classmethod
    def load(cls, path: str | Path) -> tuple[ProposalResults, dict[str, Any]]:
        """A proposal file and its other entries. Raises UserError for any other file."""
        content = read_proposal_file(path)
        values = [list(content.pop(key)) for key in ("boxes", "scores", "ids")]
        return cls(*values), content

    @property
    def num_images(self) -> int:
        return len(self.ids)

    def extend(
        self, image: int, image_id: int | str, boxes: np.ndarray, scores: np.ndarray
    ) -> None:
        """Put in the proposals of one image."""
        self.ids[image], self.boxes[image], self.scores[image] = image_id, boxes, scores

    def copy_images(self, other: ProposalResults, pairs: Sequence[tuple[int, int]]) -> None:
        """Take over images of `other`: pairs of (index here, index there)."""
        for here, there in pairs:
            self.extend(here, other.ids[there], other.boxes[there], other.scores[there])

    def save(self, path: Path, **extra: Any) -> None:
        """Write Detectron's proposal file: whole, or not at all."""
        content = {
            "boxes": self.boxes,
            "scores": self.scores,
            "ids": self.ids,
            "cfg": config_text(),
        }
        with atomic_write(path) as file:
            pickle.dump(content | extra, file, _PROTOCOL)


def im_proposals(model: nn.Module, im: np.ndarray) -> BoxesAndScores:
    """Proposals of one image (H, W, 3) uint8 BGR: boxes (R, 4) float32 in its pixels and scores
    (R,) float32, best first, at most TEST.RPN_POST_NMS_TOP_N."""
    return batch_proposals(model, [im])[0]


@torch.inference_mode()
def batch_proposals(
    model: nn.Module,
    images: Sequence[np.ndarray],
    packed: tuple[Tensor, list[Placed]] | None = None,
) -> list[BoxesAndScores]:
    """im_proposals() of several images, of equal core.test.network_size, in one forward pass.

    Boxes are clipped to the padded input, as Detectron does, not to the image: who reads a
    proposal file does that.

    Args:
        model: `Generalized_RCNN` with an RPN in eval mode, bare or inside a DataParallel.
        packed: the same images as `utils.blob.pack_images` gives them, if that is at hand.
    """
    net = getattr(model, "module", model)
    batch = ImageBatch(images, next(net.parameters()).device, packed)
    (shown,) = batch.show([plain_view()])
    found = net.propose(shown.data, shown.im_info)
    boxes = (found.boxes.double() / shown.scales[:, None, None]).float()
    host = [x.cpu().numpy() for x in (boxes, found.scores.float(), found.valid)]
    return [(b[used], s[used]) for b, s, used in zip(*host, strict=True)]


def generate_proposals(
    model: nn.Module,
    dataset: JsonDataset | str,
    output_dir: str | Path,
    ind_range: tuple[int, int] | None = None,
    *,
    batch_size: int = 1,
    vis: bool = False,
    amp: str = "off",
) -> ProposalResults:
    """Write the proposals of a data set's images to `output_dir/rpn_proposals.pkl`.

    An interrupted run leaves a part file, and the next one goes on from there.

    Args:
        ind_range: first image and one past the last, in the order of image ids; the file is then
            `rpn_proposals_range_{START}_{END}.pkl`.
        batch_size: images a forward pass; vis: has no effect but a warning; amp: precision.

    Raises:
        UserError: an image cannot be read, or the range is not one of this data set.
    """
    dataset = JsonDataset(dataset) if isinstance(dataset, str) else dataset
    if vis:
        logger.warning("proposals are not drawn: there is nothing for --vis to do")
    roidb = dataset.get_roidb()
    start, end = ind_range or (0, len(roidb))
    check_range(dataset, start, end)
    folder = make_folder(output_dir)
    fingerprint = partial(test_fingerprint, model, roidb, amp=amp)
    part = PartFile(folder, start, end, fingerprint, ProposalResults)
    todo = [(i, roidb[start + i]) for i in part.remaining]
    if len(todo) < end - start:
        logger.info("%d of %d images have been done before", end - start - len(todo), end - start)
    files = [entry["image"] for _, entry in todo]
    sizes = [(entry["height"], entry["width"]) for _, entry in todo]
    with part.kept():
        with Progress(len(todo)) as progress:
            for number, found in _propose_files(model, files, sizes, batch_size, amp):
                image, entry = todo[number]
                part.add(image, entry["id"], *found)
                progress.advance()
        part.finish(folder / PROPOSALS_FILE if ind_range is None else None)
    return part.results


def _propose_files(
    model: nn.Module,
    paths: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    batch_size: int,
    amp: str,
) -> Iterator[tuple[int, BoxesAndScores]]:
    """Index and proposals of each file, batch by batch."""
    device = next(model.parameters()).device
    for batch in decoded_batches(paths, sizes, batch_size, cfg.DATA_LOADER.NUM_THREADS, device):
        for _, message in batch.errors:
            raise UserError(message)
        with precision(device, amp):
            found = batch_proposals(model, batch.images(), (batch.pixels, batch.places))
        yield from zip(batch.indices, found, strict=True)


def evaluate_proposal_file(
    dataset: JsonDataset, proposal_file: str | Path, output_dir: str | Path
) -> task_evaluation.Results:
    """Average recall of a proposal file; also written to `output_dir/rpn_proposal_recall.pkl`.

    Returns {dataset.name: {'box_proposal': {'AR@100': ..., ...}}}; see
    datasets.box_proposal_evaluator.
    """
    roidb = dataset.get_roidb(gt=True, proposal_file=str(proposal_file))
    results = task_evaluation.evaluate_box_proposals(dataset, roidb)
    with atomic_write(Path(output_dir) / RECALL_FILE) as file:
        pickle.dump({k: {t: dict(m) for t, m in v.items()} for k, v in results.items()}, file)
    return results
