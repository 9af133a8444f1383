"""Record the time and memory of a run, by stage."""

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
"""Seconds between two memory samples, at first."""

MOST_SAMPLES = 50_000
"""Number of memory samples at which every second one is dropped and the period is doubled."""


@dataclass(frozen=True)
class Span:
    """One timed piece of work.

    Attributes:
        stage: Name of the stage.
        block: Index of the block, or `None` for the whole model.
        start: Start, in seconds of `time.perf_counter`.
        seconds: Duration.
        thread: Identifier of the thread.
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
        time: In seconds of `time.perf_counter`.
        host_bytes: Host memory of the process.
        device_bytes: Memory of its tensors on the CUDA device.
    """

    time: float
    host_bytes: int
    device_bytes: int


def _time(sample: Sample) -> float:
    return sample.time


class Profile:
    """Times the stages of a run and, with `memory=True`, samples its memory.

    Nested stages count twice. With `memory=True`, CUDA is synchronised before a stage ends. Otherwise a stage ends when
    its work is submitted, so that measuring slows nothing down, and only `settle` waits.

    Attributes:
        spans: The timed work, in the order in which it ended.
        samples: The memory samples, in order; empty without `memory=True`.
        memory: Whether memory is sampled.
    """

    def __init__(self, device: torch.device | None = None, memory: bool = False) -> None:
        self.spans: list[Span] = []
        self.samples: list[Sample] = []
        self.memory = memory
        self._device = device if device is not None and device.type == "cuda" else None

    @contextmanager
    def stage(self, name: str, block: int | None = None, wait: bool = True) -> Iterator[None]:
        """Time the context.

        Args:
            name: Name of the stage.
            block: Index of the block.
            wait: With `memory=True`, synchronise the current CUDA stream; `False` for work in other streams.
        """
        start = time.perf_counter()
        try:
            yield
        finally:
            if wait and self.memory and self._device is not None:
                torch.cuda.current_stream(self._device).synchronize()
            self.spans.append(Span(name, block, start, time.perf_counter() - start, threading.get_ident()))

    def settle(self, name: str, block: int | None = None) -> None:
        """Wait for the work submitted to a CUDA device, and count the time to a stage.

        Called once for each block and stage, so that a stage's work is not counted to the next one that waits.
        """
        if self._device is not None:
            with self.stage(name, block, wait=False):
                torch.cuda.current_stream(self._device).synchronize()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Sample memory in the background within the context, with `memory=True`."""
        if not self.memory:
            yield
            return
        done = threading.Event()

        def watch() -> None:
            period = PERIOD
            while not done.wait(period):
                self._look()
                if len(self.samples) > MOST_SAMPLES:  # long runs are sampled less often
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
        """Return the seconds of each stage, in the order in which the stages first ended."""
        by_stage: dict[str, float] = {}
        for span in self.spans:
            by_stage[span.stage] = by_stage.get(span.stage, 0.0) + span.seconds
        return by_stage

    def table(self) -> list[dict[str, Any]]:
        """Return seconds and peak bytes for each stage and block, JSON-serialisable."""
        samples = list(self.samples)  # a copy, since the background thread may add more
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
        """Write spans and memory samples as a trace in Chrome's format, for https://ui.perfetto.dev."""
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
    """Return the samples within a span, and the first one after it, since short spans may have none."""
    first = bisect_left(samples, span.start, key=_time)
    return samples[first : bisect_left(samples, span.start + span.seconds, key=_time) + 1]
