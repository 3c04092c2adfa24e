"""The process that scores beside a test, and its pool: datasets.scoring_ahead's other end.

As images come, the processes of the pool match and write down what was found, and this one puts
that, taken apart by classes, where all of them can read it. In the end they add up some classes at
a time, write the files, and make the scores of a kind. The test waits for what is done in the end
alone.
"""

from __future__ import annotations

import pickle
import sys
import traceback
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import UserError
from datasets.coco_matching import (
    Matches,
    accumulate,
    blank_sums,
    class_borders,
    record_type,
)
from datasets.coco_results import Part
from datasets.forked_pool import Spool, call_shared, end_with_parent, forked_pool, shared_array
from datasets.json_dataset import JsonDataset
from datasets.json_dataset_evaluator import (
    Evaluation,
    kind_of_results,
    score_sums,
    write_results,
)
from utils.device import available_cpus

MOST_PROCESSES = 12
GROUPS_OF_CLASSES = 6  # those of two kinds are as many as the processes that add them up
ADVICE = "if memory ran out, score the detections file with --eval_only"


def serve(
    connection: Connection,
    others: Connection,
    dataset: JsonDataset,
    kinds: Sequence[str],
    output_dir: Path,
) -> None:
    """What the process does that is forked from the test: reads images found, answers with scores.

    others: the test's end of the connection. Sent are None once images are waited for, then the
    Evaluation of each kind; or, instead of either, a UserError or the text of another failure.
    """
    end_with_parent()
    sys.setswitchinterval(5e-4)  # the pool's threads hand out work beside this one
    others.close()
    try:
        _score(connection, dataset, kinds, output_dir)
        return
    except UserError as error:
        answer = error
    except BrokenProcessPool:
        answer = f"one of those that it had begun has ended by itself; {ADVICE}"
    except Exception:
        answer = traceback.format_exc()  # with that of a process of the pool, if it is its
    connection.send(answer)


class _Work:
    """What the processes of the pool do: made before they are forked, and shared by them."""

    def __init__(self, dataset: JsonDataset, kinds: Sequence[str], output_dir: Path) -> None:
        self.results = {kind: kind_of_results(dataset, kind) for kind in kinds}
        self.output_dir = output_dir
        self.sums = {
            kind: blank_sums(of_kind.unscored.params, shared_array)
            for kind, of_kind in self.results.items()
            if of_kind.unscored is not None
        }
        # What the parts of a kind say, as it comes: their text with its groups, and the rows of
        # Matches of each group of classes.
        self.texts, self.groups = ({kind: Spool() for kind in kinds} for _ in range(2))
        self.rows = {kind: [Spool() for _ in range(GROUPS_OF_CLASSES)] for kind in self.sums}

    def __call__(self, task: tuple) -> Any:
        """task: the name of one of the methods below, and its arguments."""
        name, *arguments = task
        return getattr(self, name)(*arguments)

    def parts(self, images: bytes) -> list[Part]:
        """A part of each kind, of the images in a message."""
        found = pickle.loads(images)
        return [of_kind.part(found) for of_kind in self.results.values()]

    def add_up(self, kind: str, group: int, objects: np.ndarray) -> None:
        """The numbers of a group of classes, of which so many objects are to be found."""
        params = self.results[kind].unscored.params
        bits = (len(params.areaRng) * len(params.iouThrs) + 7) // 8
        rows = self.rows[kind][group].read().view(record_type(bits))
        accumulate([Matches.of_rows(rows, objects)], params, self.sums[kind])

    def scores(self, kind: str) -> Evaluation:
        """Of all classes, once they have been added up."""
        return score_sums(self.results[kind], self.sums[kind], self.output_dir)

    def write(self, kind: str, lengths: Sequence[tuple[int, int]]) -> list[str]:
        """The result file; what there is to say about it. lengths: of each part, groups and bytes
        of text."""
        text, begin = memoryview(self.texts[kind].read()), 0
        groups = self.groups[kind].read().view(np.int64).reshape(-1, 3)
        parts, row = [], 0
        for count, size in lengths:
            parts.append(Part(None, groups[row : row + count], text[begin : begin + size]))
            row, begin = row + count, begin + size
        return write_results(self.results[kind], parts, self.output_dir)


class _Found:
    """Takes what the parts of a kind say to where the pool reads it in the end."""

    def __init__(self, work: _Work, kind: str) -> None:
        self._text, self._groups = work.texts[kind], work.groups[kind]
        self._rows = work.rows.get(kind, [])
        self.lengths: list[tuple[int, int]] = []  # of each part: groups, and bytes of text
        self.objects: Any = 0  # (areas, classes) how many there are to find
        self.counts = [0] * len(self._rows)  # detections of each group of classes

    def add(self, part: Part) -> None:
        self.lengths.append((len(part.groups), len(part.text)))
        self._groups.append(part.groups.tobytes())
        self._text.append(part.text)
        if part.matches is None:
            return
        self.objects = self.objects + part.matches.objects
        rows = part.matches.rows()
        borders = class_borders(self.objects.shape[1], len(self._rows))
        places = np.searchsorted(rows["category"], borders).tolist()
        for i, (begin, end) in enumerate(pairwise(places)):
            self._rows[i].append(rows[begin:end].tobytes())
            self.counts[i] += end - begin

    def objects_of_groups(self) -> list[np.ndarray]:
        """`objects` of each group of classes alone."""
        borders = class_borders(self.objects.shape[1], len(self._rows)).tolist()
        found = [np.zeros_like(self.objects) for _ in self._rows]
        for objects, begin, end in zip(found, borders, borders[1:], strict=False):
            objects[:, begin:end] = self.objects[:, begin:end]
        return found


def _score(
    connection: Connection, dataset: JsonDataset, kinds: Sequence[str], output_dir: Path
) -> None:
    work = _Work(dataset, kinds, output_dir)
    found = {kind: _Found(work, kind) for kind in kinds}
    made: deque[Future] = deque()

    def take_first() -> None:
        for kind, part in zip(kinds, made.popleft().result(), strict=True):
            found[kind].add(part)

    pool = forked_pool(min(available_cpus(), MOST_PROCESSES), work)

    def queue(*task: Any) -> Future:
        return pool.submit(call_shared, task)

    try:
        pool.submit(int)  # the processes are forked now, not when images wait
        connection.send(None)
        while images := connection.recv_bytes():
            made.append(queue("parts", images))
            while made and made[0].done():
                take_first()
        while made:
            take_first()
        sums = [
            (count, kind, group, objects)
            for kind in work.sums
            for group, (count, objects) in enumerate(
                zip(found[kind].counts, found[kind].objects_of_groups(), strict=True)
            )
        ]
        sums.sort(key=lambda task: -task[0])  # the longest work begins first
        adding: dict[str, list[Future]] = {kind: [] for kind in work.sums}
        for _, kind, *task in sums:
            adding[kind].append(queue("add_up", kind, *task))
        written = {kind: queue("write", kind, found[kind].lengths) for kind in kinds}
        scores = {}
        for kind, futures in adding.items():
            for future in futures:
                future.result()
            scores[kind] = queue("scores", kind)
        evaluations = {}
        for kind in kinds:
            done = scores[kind].result() if kind in scores else Evaluation(None, [])
            messages = done.messages + written[kind].result()
            evaluations[kind] = Evaluation(done.stats, messages)
        connection.send(evaluations)  # here: freeing what there is takes a moment
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
