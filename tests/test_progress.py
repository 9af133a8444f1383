"""Progress: bars on a terminal, plain lines elsewhere, nothing where nothing is wanted."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import threading

import pytest

from pruneforge.progress import BarProgress, LineProgress, Progress, as_progress


class Terminal:
    def __init__(self, is_one):
        self.isatty = lambda: is_one

    def write(self, text):
        pass

    def flush(self):
        pass


def test_what_is_shown_depends_on_where_it_goes(monkeypatch):
    assert type(as_progress(False)) is Progress
    monkeypatch.setattr(sys, "stderr", Terminal(False))
    assert isinstance(as_progress(True), LineProgress)
    monkeypatch.setattr(sys, "stderr", Terminal(True))
    assert isinstance(as_progress(True), BarProgress)
    mine = Progress()
    assert as_progress(mine) is mine


def test_a_line_begins_each_outermost_step_and_says_where_all_of_them_are(capsys):
    lines = LineProgress()
    for block in lines.track(["a", "b"], "pruning blocks"):
        for _ in lines.track(range(4), "trials"):
            pass
        if block == "b":
            lines.report()
    assert list(lines.track(iter("xyz"), "reading", None)) == ["x", "y", "z"]
    begun, later, other = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"\[0:00:\d\d\] pruning blocks, 0 of 2", begun)
    assert re.fullmatch(r"\[0:00:\d\d\] pruning blocks, 1 of 2, about 0:00:\d\d left", later)
    assert re.fullmatch(r"\[0:00:\d\d\] reading, 0", other)


def test_lines_go_on_during_one_long_item_and_no_thread_stays(capsys):
    printed = threading.Event()

    class Watched(LineProgress):
        def report(self):
            super().report()
            if self._steps[0].done == 1:
                printed.set()

    lines = Watched(every=0.001)
    for item in lines.track(range(2), "cells"):
        assert item == 0 or printed.wait(60)  # by the thread, while this item is being worked on
    assert not [thread for thread in threading.enumerate() if thread.name == "pruneforge-progress"]
    assert "cells, 1 of 2" in capsys.readouterr().err


def test_an_error_within_a_step_ends_its_lines():
    lines = LineProgress()

    def fails():
        for _ in lines.track(range(3), "cells"):
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert lines._steps == []


def test_a_stage_is_a_line_without_a_count_and_ends_with_an_error(capsys):
    lines = LineProgress()
    with lines.stage("loading the model"):
        lines.report()
    with pytest.raises(KeyError), lines.stage("loading another"):
        raise KeyError
    assert lines._steps == []
    said = [line.split("] ")[1] for line in capsys.readouterr().err.splitlines()]
    assert said == ["loading the model", "loading the model", "loading another"]


def test_lines_are_not_lost_in_what_redirects_other_libraries(capsys):
    lines = LineProgress()
    with contextlib.redirect_stderr(io.StringIO()) as aside, lines.stage("evaluating"):
        print("chatter", file=sys.stderr)
    assert aside.getvalue() == "chatter\n"
    assert capsys.readouterr().err.endswith("] evaluating\n")
