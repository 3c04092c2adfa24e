"""The next batch is begun before anyone waits for the last one."""

from __future__ import annotations

import pytest

from core.test_pipeline import one_ahead


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_one_is_queued_while_another_is_waited_for(count):
    events: list[tuple[str, int]] = []

    def queue(item: int):
        events.append(("queue", item))

        def wait() -> int:
            events.append(("wait", item))
            return 10 * item

        return wait

    assert list(one_ahead(range(count), queue)) == [(i, 10 * i) for i in range(count)]
    for item in range(count):
        begun = item + 1 if item + 1 < count else item
        assert events.index(("queue", begun)) < events.index(("wait", item))
        if item + 2 < count:
            assert events.index(("wait", item)) < events.index(("queue", item + 2))
