"""Work ahead comes in order, and ends with whoever wants it."""

from __future__ import annotations

import threading
import time

import pytest

from utils.threads import map_ahead


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 40])
def test_results_come_in_the_order_of_the_items(count, threads):
    def slow_at_first(item: int) -> int:
        time.sleep(0.01 if item % 5 == 0 else 0)
        return 10 * item

    assert list(map_ahead(slow_at_first, range(count), threads)) == [10 * i for i in range(count)]


def test_an_error_comes_in_its_place():
    results = map_ahead(lambda item: 6 // item, [3, 2, 0, 1], 2)
    assert [next(results), next(results)] == [2, 3]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_nothing_more_is_begun_once_nobody_wants_it():
    begun, may_end = [], threading.Event()

    def function(item: int) -> int:
        begun.append(item)
        if item:
            may_end.wait(10)
        return item

    results = map_ahead(function, range(100), 1)
    assert next(results) == 0
    threading.Timer(0.1, may_end.set).start()
    results.close()
    assert begun in ([0], [0, 1])  # the others had been handed over, too
    assert not [t for t in threading.enumerate() if t.name.startswith("ahead")]
