"""Where the time and the memory of a run go."""

from __future__ import annotations

import json
import threading
import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pruneforge.memory import resident_bytes

PROFILE_FILE = "profile.json"
PERIOD = 0.01
"""Seconds between two looks at the memory, at first."""

MOST_SAMPLES = 50_000


@dataclass(frozen=True)
class Span:
    """One stretch of work.

    Attributes:
        stage: What was done.
        block: For which block, or `None` where it was for the model.
        start: When it began, in seconds of `time.perf_counter`.
        seconds: How long it took.
        thread: The thread that did it.
    """

    stage: str
    block: int | None
    start: float
    seconds: float
    thread: int


@dataclass(frozen=True)
class Sample:
    """Memory at one time.

    Attributes:
        time: When, in seconds of `time.perf_counter`.
        host_bytes: What the process holds in host memory.
        device_bytes: What its tensors hold on the CUDA device.
    """

    time: float
    host_bytes: int
    device_bytes: int


def _time(sample: Sample) -> float:
    return sample.time


class Profile:
    """Times the stages of a run; with `memory`, looks at its memory all the while.

    Nested stages count twice. A CUDA device works behind the host: with `memory`, a stage ends when its work is done
    there; without, when it is handed over, so that nothing waits for the measurement, but for what `settle` says.

    Attributes:
        spans: What was done, in the order it ended.
        samples: What memory was held, in order; empty without `memory`.
    """

    def __init__(self, device: torch.device | None = None, memory: bool = False) -> None:
        self.spans: list[Span] = []
        self.samples: list[Sample] = []
        self.memory = memory
        self._device = device if device is not None and device.type == "cuda" else None

    @contextmanager
    def stage(self, name: str, block: int | None = None, wait: bool = True) -> Iterator[None]:
        """Note how long the context takes.

        Args:
            name: What is done.
            block: For which block.
            wait: Whether its work may go on in the current stream of a CUDA device when the context ends.
        """
        start = time.perf_counter()
        try:
            yield
        finally:
            if wait and self.memory and self._device is not None:
                torch.cuda.current_stream(self._device).synchronize()
            self.spans.append(Span(name, block, start, time.perf_counter() - start, threading.get_ident()))

    def settle(self, name: str, block: int | None = None) -> None:
        """Wait for what was handed over to a CUDA device, in the name of the stage that did most of it.

        Called once a block and stage, it keeps the work of one stage from being counted in the next that waits.
        """
        if self._device is not None:
            with self.stage(name, block, wait=False):
                torch.cuda.current_stream(self._device).synchronize()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at the memory within the context, if that is wanted."""
        if not self.memory:
            yield
            return
        done = threading.Event()

        def watch() -> None:
            period = PERIOD
            while not done.wait(period):
                self._look()
                if len(self.samples) > MOST_SAMPLES:  # a long run is looked at less often
                    del self.samples[::2]
                    period *= 2

        watcher = threading.Thread(target=watch, name="pruneforge-profile", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()
            self._look()

    def _look(self) -> None:
        on_device = torch.cuda.memory_allocated(self._device) if self._device is not None else 0
        self.samples.append(Sample(time.perf_counter(), resident_bytes(), on_device))

    def seconds(self) -> dict[str, float]:
        """Return seconds by stage, in the order the stages first ended."""
        found: dict[str, float] = {}
        for span in self.spans:
            found[span.stage] = found.get(span.stage, 0.0) + span.seconds
        return found

    def table(self) -> list[dict[str, Any]]:
        """Return, for each stage and block, seconds and the most bytes seen meanwhile; of types that JSON holds."""
        samples = list(self.samples)  # more may come meanwhile
        rows: dict[tuple[str, int | None], dict[str, Any]] = {}
        for span in self.spans:
            row = rows.setdefault(
                (span.stage, span.block),
                {"stage": span.stage, "block": span.block, "seconds": 0.0, "host_bytes": 0, "device_bytes": 0},
            )
            row["seconds"] += span.seconds
            for sample in _during(span, samples):
                row["host_bytes"] = max(row["host_bytes"], sample.host_bytes)
                row["device_bytes"] = max(row["device_bytes"], sample.device_bytes)
        return list(rows.values())

    def save(self, path: Path) -> None:
        """Write the spans and the memory as a trace in Chrome's format, which https://ui.perfetto.dev opens."""
        events: list[dict[str, Any]] = [
            {
                "name": span.stage if span.block is None else f"{span.stage} {span.block}",
                "cat": span.stage,
                "ph": "X",
                "ts": span.start * 1e6,
                "dur": span.seconds * 1e6,
                "pid": 0,
                "tid": span.thread,
                "args": {"block": span.block},
            }
            for span in sorted(self.spans, key=lambda span: span.start)
        ]
        for sample in list(self.samples):
            for name, count in (("host", sample.host_bytes), ("device", sample.device_bytes)):
                if name == "host" or self._device is not None:
                    value = {"MiB": count / 2**20}
                    events.append(
                        {"name": f"{name} memory", "ph": "C", "ts": sample.time * 1e6, "pid": 0, "args": value}
                    )
        path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")


def _during(span: Span, samples: list[Sample]) -> list[Sample]:
    """Return what was seen within a span and at the first look after it, which short ones need."""
    first = bisect_left(samples, span.start, key=_time)
    return samples[first : bisect_left(samples, span.start + span.seconds, key=_time) + 1]
