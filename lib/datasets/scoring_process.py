"""The process that scores beside a test, and its pool: datasets.scoring_ahead's other end.

As images come, the processes of the pool match and write down what was found, and this one takes
the matches apart by classes. In the end they add up some classes at a time, and make the scores of
a kind, while this one writes the files. The test waits for what is done in the end alone.
"""

from __future__ import annotations

import pickle
import sys
import traceback
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from core.errors import UserError
from datasets.coco_matching import accumulate, blank_sums
from datasets.coco_results import Part
from datasets.forked_pool import call_shared, end_with_parent, forked_pool, shared_array
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
    sys.setswitchinterval(5e-4)  # the pool's threads hand out work while this one writes
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

    def __call__(self, task: tuple) -> Any:
        """task: the name of one of the methods below, and its arguments."""
        name, *arguments = task
        return getattr(self, name)(*arguments)

    def parts(self, images: bytes) -> list[Part]:
        """A part of each kind, of the images in a message."""
        found = pickle.loads(images)
        return [of_kind.part(found) for of_kind in self.results.values()]

    def add_up(self, kind: str, matches: Sequence[bytes]) -> None:
        """The numbers of the classes that are in there, of each part pickled."""
        loaded = [pickle.loads(of_part) for of_part in matches]
        accumulate(loaded, self.results[kind].unscored.params, self.sums[kind])

    def scores(self, kind: str) -> Evaluation:
        """Of all classes, once they have been added up."""
        return score_sums(self.results[kind], self.sums[kind], self.output_dir)


class _Found:
    """What the parts of a kind say, ready for the end of the test."""

    def __init__(self) -> None:
        self.parts: list[Part] = []  # without their matches
        # Of each group of classes its pickled matches in each part.
        self.matches: list[list[bytes]] = [[] for _ in range(GROUPS_OF_CLASSES)]

    def add(self, part: Part) -> None:
        self.parts.append(part._replace(matches=None))
        if part.matches is not None:
            groups = part.matches.by_classes(GROUPS_OF_CLASSES)
            for of_group, matches in zip(self.matches, groups, strict=True):
                of_group.append(pickle.dumps(matches, pickle.HIGHEST_PROTOCOL))


def _score(
    connection: Connection, dataset: JsonDataset, kinds: Sequence[str], output_dir: Path
) -> None:
    work = _Work(dataset, kinds, output_dir)
    found = {kind: _Found() for kind in kinds}
    made: deque[Future] = deque()

    def take_first() -> None:
        for kind, part in zip(kinds, made.popleft().result(), strict=True):
            found[kind].add(part)

    pool = forked_pool(min(available_cpus(), MOST_PROCESSES), work)
    try:
        pool.submit(int)  # the processes are forked now, not when images wait
        connection.send(None)
        while images := connection.recv_bytes():
            made.append(pool.submit(call_shared, ("parts", images)))
            while made and made[0].done():
                take_first()
        while made:
            take_first()
        groups = [(kind, matches) for kind in work.sums for matches in found[kind].matches]
        groups.sort(key=lambda group: -sum(map(len, group[1])))  # the longest work begins first
        adding: dict[str, list[Future]] = {kind: [] for kind in work.sums}
        for kind, matches in groups:
            adding[kind].append(pool.submit(call_shared, ("add_up", kind, matches)))
        scores = {}
        for kind, futures in adding.items():
            for future in futures:
                future.result()
            scores[kind] = pool.submit(call_shared, ("scores", kind))
        # Not sooner, or this process would hand out the sums late. Files of different kinds wait
        # for the disk at the same time.
        with ThreadPoolExecutor(len(kinds)) as threads:
            written = threads.map(
                lambda kind: write_results(work.results[kind], found[kind].parts, output_dir), kinds
            )
            messages = dict(zip(kinds, written, strict=True))
        done = {kind: score.result() for kind, score in scores.items()}
        evaluations = {}
        for kind in kinds:
            of_kind = done.get(kind, Evaluation(None, []))
            evaluations[kind] = Evaluation(of_kind.stats, of_kind.messages + messages[kind])
        connection.send(evaluations)  # here: freeing what there is takes a moment
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
