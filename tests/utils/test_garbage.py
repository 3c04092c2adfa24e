"""Old objects are left alone for a while, young garbage is not."""

from __future__ import annotations

import gc
import weakref

import pytest

from utils.garbage import only_young_garbage


class Node:
    pass


def test_young_cycles_are_collected_and_old_objects_not_visited():
    before, old = gc.get_threshold(), []
    gc.collect()
    collections = gc.get_stats()[2]["collections"]
    node = Node()
    node.itself, gone = node, weakref.ref(node)
    with only_young_garbage():
        del node
        for _ in range(300_000):
            old.append([old])
        assert gone() is None
        assert gc.get_stats()[2]["collections"] == collections
    assert gc.get_threshold() == before


def test_the_thresholds_come_back_after_a_failure():
    before = gc.get_threshold()
    with pytest.raises(KeyError), only_young_garbage():
        raise KeyError
    assert gc.get_threshold() == before
