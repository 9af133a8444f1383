"""lm-eval's model of Hugging Face, which says how many requests are done as everything here does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM

from pruneforge import Subject


class Harness(HFLM):
    """`HFLM` with a progress in place of its own bars."""

    def __init__(self, subject: Subject, batch_size: int | str) -> None:
        """Wrap the model that is evaluated.

        Args:
            subject: The model, and the progress that shows how many requests are done.
            batch_size: Requests in a batch, or "auto".
        """
        model = subject.model
        super().__init__(
            pretrained=model.module, tokenizer=model.processor, batch_size=batch_size, device=str(subject.device)
        )
        self._progress = subject.progress

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether it is the most likely one."""
        with self._counted(len(requests)):
            return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Return the log-likelihood of each text."""
        with self._counted(len(requests)):
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Return what is generated for each prompt."""
        with self._counted(len(requests)):
            return super().generate_until(requests, disable_tqdm=True)

    @contextmanager
    def _counted(self, total: int) -> Iterator[None]:
        """Show how many requests are done: lm-eval tells its cache of each."""
        steps = iter(self._progress.track(range(total + 1), "requests", total))
        next(steps)
        self.set_cache_hook(_Told(lambda: next(steps, None)))
        try:
            yield
        finally:
            self.set_cache_hook(CacheHook(None))


class _Told(CacheHook):
    """Calls a function for each answer, and keeps none."""

    def __init__(self, tell: Callable[[], object]) -> None:
        super().__init__(None)
        self._tell = tell

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """Tell of an answer."""
        self._tell()
