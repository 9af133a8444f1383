"""Writing beside the computation: in order, one task behind, and no error lost."""

from __future__ import annotations

import threading

import pytest

from pruneforge.checkpoint.behind import Behind


def test_tasks_are_done_in_order_and_at_most_one_goes_on_beside_the_caller():
    done, go = [], [threading.Event() for _ in range(3)]
    behind = Behind("test")

    def task(number):
        assert go[number].wait(60)
        done.append(number)

    behind.start(lambda: task(0))  # returns though the task cannot end yet
    assert done == []
    begun = threading.Event()
    second = threading.Thread(target=lambda: (behind.start(lambda: task(1)), begun.set()))
    second.start()
    assert not begun.wait(0.2)  # the first goes on
    go[0].set()
    assert begun.wait(60)
    assert done[0] == 0
    go[1].set()
    behind.wait()
    assert done == [0, 1]
    go[2].set()
    behind.start(lambda: task(2))
    behind.close()
    assert done == [0, 1, 2]


def test_an_error_comes_out_at_the_next_call_and_the_next_task_is_not_begun():
    done = []
    behind = Behind("test")

    def fails():
        raise OSError("full")

    behind.start(fails)
    with pytest.raises(OSError, match="full"):
        behind.start(lambda: done.append(1))
    behind.wait()  # it is told once
    assert done == []
    behind.start(fails)
    with pytest.raises(OSError, match="full"):
        behind.wait()
    behind.close()
