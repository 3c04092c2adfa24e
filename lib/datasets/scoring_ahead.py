"""Scoring while a test goes on: processes beside it match and write down what is finished.

One process is forked, and forks the others: the test, whose memory is large, waits for one fork
only, and for nothing while these begin. At the end of the test the last images, the sums over all
and the files are left to do; nothing is forked any more.
"""

from __future__ import annotations

import logging
import multiprocessing
import pickle
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from core.errors import UserError
from datasets.coco_results import ImageFound, image_found
from datasets.json_dataset import JsonDataset
from datasets.json_dataset_evaluator import Evaluation
from datasets.scoring_process import ADVICE, serve

logger = logging.getLogger(__name__)

IMAGES_AT_ONCE = 16
# Of the last images fewer, which all processes are free for: the test's end waits for them.
LAST_IMAGES, LAST_AT_ONCE = 96, 4
LEAST_IMAGES = 100  # of fewer the scores take less time than the processes


class ScoringAhead:
    """Scores by COCO's rules of a test's images, as they come; a context, at whose end nothing of
    it goes on.

    Args:
        kinds: of 'bbox', 'segm', 'keypoints'.
    """

    def __init__(self, dataset: JsonDataset, kinds: Sequence[str], output_dir: Path) -> None:
        self._kinds = list(kinds)
        self._waiting: list[ImageFound] = []
        self._left = len(dataset.image_ids)
        self._failure: RuntimeError | None = None
        self._ready = False  # whether images are being waited for
        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=serve, args=(theirs, self._connection, dataset, self._kinds, output_dir)
        )
        self._process.start()
        theirs.close()  # or its end would not be noticed

    @staticmethod
    def possible(num_images: int) -> bool:
        """Whether processes can be forked, end with this one, and are worth it."""
        return sys.platform == "linux" and num_images >= LEAST_IMAGES

    def __enter__(self) -> ScoringAhead:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()  # nothing for one that has ended; its own processes end with it
        if kind is not None:  # else it has done all, and nobody waits until its memory is free
            self._process.join()
        self._connection.close()

    def add(
        self,
        position: int,
        cls_boxes: Sequence,
        cls_segms: Sequence | None,
        cls_keyps: Sequence | None,
    ) -> None:
        """Hand over what was found in an image of the data set, by label.

        Raises UserError as `result` does. Another failure waits for `result`: the test goes on, so
        that its detections come to be in a file.
        """
        if self._failure is not None:
            return
        self._waiting.append(
            image_found(
                position,
                cls_boxes,
                cls_segms if "segm" in self._kinds else None,
                cls_keyps if "keypoints" in self._kinds else None,
            )
        )
        self._left -= 1
        at_once = IMAGES_AT_ONCE if self._left > LAST_IMAGES else LAST_AT_ONCE
        if len(self._waiting) >= at_once and self._is_ready():
            self._send_waiting(at_once)

    def complete(self) -> None:
        """Say that all images have been handed over: the sums begin."""
        self._send_waiting(LAST_AT_ONCE)
        self._send([])

    def result(self) -> Mapping[str, Evaluation]:
        """After `complete`: the evaluation of each kind, its files written. Waits for it.

        Raises what went wrong: UserError, or RuntimeError with the process's traceback.
        """
        if self._failure is not None:
            raise self._failure
        if not self._ready:
            self._answer()
        return self._answer()

    def _answer(self) -> Mapping[str, Evaluation] | None:
        """What the process says next: None that it is ready, then what it was asked for."""
        try:
            answer = self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            raise RuntimeError(
                f"the process that scores has ended by itself (code {self._process.exitcode}); "
                f"{ADVICE}"
            ) from None
        if isinstance(answer, UserError):
            raise answer
        if isinstance(answer, str):
            raise RuntimeError(f"scoring failed in a process of its own:\n{answer}")
        return answer

    def _is_ready(self) -> bool:
        """Without waiting for it: sent sooner, images would wait in a full pipe, and the test."""
        if not self._ready and self._failure is None and self._connection.poll():
            with self._failing_later():
                self._answer()
                self._ready = True
        return self._ready

    def _send_waiting(self, at_once: int) -> None:
        for begin in range(0, len(self._waiting), at_once):
            self._send(self._waiting[begin : begin + at_once])
        self._waiting = []

    def _send(self, images: list[ImageFound]) -> None:
        if self._failure is not None:
            return
        try:
            # Nothing means the end.
            content = pickle.dumps(images, pickle.HIGHEST_PROTOCOL) if images else b""
            self._connection.send_bytes(content)
        except OSError:
            with self._failing_later():
                self.result()  # says why nobody reads

    @contextmanager
    def _failing_later(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            logger.warning("%s\nThe test goes on without it, to fail at its end.", error)
            self._failure = error
