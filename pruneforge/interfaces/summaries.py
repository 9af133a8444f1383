"""The statistics that come with PruneForge."""

from __future__ import annotations

import torch
from torch import Tensor

from pruneforge.interfaces.statistics import GradientStatistic, InputStatistic, OutputStatistic, Statistic
from pruneforge.numerics import products_of


class ColumnSquares(InputStatistic):
    """Sum over tokens of the squares of each input column, `total` [in]."""

    in_cache = True

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.total = torch.zeros(shape[1], dtype=dtype, device=device)

    def add(self, inputs: Tensor) -> None:
        """Add the squares of `inputs` [tokens, in]."""
        self.total += inputs.square().sum(0)

    def per_sample(self) -> Tensor:
        """Return the sum divided by the number of samples [in]."""
        return self.total / self.samples


class ColumnSums(InputStatistic):
    """Sum over tokens of each input column, signed, `total` [in]."""

    in_cache = True

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.total = torch.zeros(shape[1], dtype=dtype, device=device)

    def add(self, inputs: Tensor) -> None:
        """Add `inputs` [tokens, in]."""
        self.total += inputs.sum(0)

    def per_token(self) -> Tensor:
        """Return the mean over tokens [in]."""
        return self.total / self.tokens


class ColumnMoments(InputStatistic):
    """Mean over tokens of each input column, and the sum of squared distances from it, `total` [2, in].

    Parts are merged around their own means (Chan, Golub and LeVeque, 1983). The difference between the mean square and
    the squared mean would lose the variance of columns whose mean is large.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.total = torch.zeros(2, shape[1], dtype=dtype, device=device)

    def add(self, inputs: Tensor) -> None:
        """Add `inputs` [tokens, in]."""
        mean = inputs.mean(0)
        self._join(torch.stack([mean, (inputs - mean).square().sum(0)]), len(inputs))

    def merge(self, other: Statistic) -> None:
        """Add another's moments."""
        self._join(other.total.to(self.total.device), other.tokens)
        self.samples += other.samples
        self.tokens += other.tokens

    def _join(self, other: Tensor, tokens: int) -> None:
        """Join the moments of `tokens` further tokens to those of the ones before."""
        if tokens:
            share = tokens / (self.tokens + tokens)
            distance = other[0] - self.total[0]
            between = distance.square() * self.tokens * share
            self.total = torch.stack([self.total[0] + distance * share, self.total[1] + other[1] + between])

    def mean(self) -> Tensor:
        """Return the mean over tokens [in]."""
        return self.total[0]

    def variance(self) -> Tensor:
        """Return the variance over tokens [in], divided by their number."""
        return self.total[1] / self.tokens


class Gram(InputStatistic):
    """Gram matrix of the inputs, X^T X over all tokens, `total` [in, in].

    The matrix is symmetric, so only its lower half and a little more are summed. Reading `total` mirrors that half;
    this happens once, after all batches.
    """

    _sum: Tensor
    _half: bool  # whether the upper half of `_sum` is out of date
    _source: torch.dtype | None = None  # dtype of the inputs before `update` converted them; narrow products are exact

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.total = torch.zeros(shape[1], shape[1], dtype=dtype, device=device)

    @property
    def total(self) -> Tensor:
        """The whole matrix [in, in]."""
        if self._half:
            for part in self._columns():
                self._sum[part, part.stop :] = self._sum[part.stop :, part].T
            self._half = False
        return self._sum

    @total.setter
    def total(self, value: Tensor) -> None:
        self._sum = value
        self._half = False

    def update(self, inputs: Tensor, samples: int) -> None:
        """Add one batch; see `InputStatistic.update`."""
        self._source = inputs.dtype
        super().update(inputs, samples)

    def add(self, inputs: Tensor) -> None:
        """Add `inputs` [tokens, in] transposed times itself."""
        with products_of(self._source or inputs.dtype, inputs.device):
            for part in self._columns():
                self._sum[part.start :, part].addmm_(inputs[:, part.start :].T, inputs[:, part])
        self._half = True

    def _columns(self) -> list[slice]:
        """Split the columns into at most four parts, each wide enough for fast products."""
        size = len(self._sum)
        step = max(256, -(-size // 4))
        return [slice(start, min(start + step, size)) for start in range(0, size, step)]

    def per_sample(self) -> Tensor:
        """Return the sum divided by the number of samples [in, in]."""
        return self.total / self.samples


class OutputSquares(OutputStatistic):
    """Sum over tokens of the squares of each output of a layer, bias included, `total` [out]."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.total = torch.zeros(shape[0], dtype=dtype, device=device)

    def add(self, outputs: Tensor) -> None:
        """Add the squares of `outputs` [tokens, out]."""
        self.total += outputs.square().sum(0)

    def per_sample(self) -> Tensor:
        """Return the sum divided by the number of samples [out]."""
        return self.total / self.samples


class Covariance(InputStatistic):
    """Mean over tokens of each input column, and the Gram matrix of the distances from it, `total` [1 + in, in].

    Parts are merged around their own means, as in `ColumnMoments`: the difference between `X^T X / T` and the product
    of means would not be positive definite where a mean is large.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.total = torch.zeros(1 + shape[1], shape[1], dtype=dtype, device=device)

    def add(self, inputs: Tensor) -> None:
        """Add `inputs` [tokens, in]."""
        mean = inputs.mean(0)
        self._join(mean, (inputs - mean).T @ (inputs - mean), len(inputs))

    def merge(self, other: Statistic) -> None:
        """Add another's moments."""
        theirs = other.total.to(self.total.device)
        self._join(theirs[0], theirs[1:], other.tokens)
        self.samples += other.samples
        self.tokens += other.tokens

    def _join(self, mean: Tensor, around: Tensor, tokens: int) -> None:
        """Join the moments of `tokens` further tokens to those of the ones before."""
        if tokens:
            share = tokens / (self.tokens + tokens)
            distance = mean - self.total[0]
            self.total[1:] += around
            self.total[1:].addr_(distance, distance, alpha=self.tokens * share)
            self.total[0] += distance * share

    def mean(self) -> Tensor:
        """Return the mean over tokens [in]."""
        return self.total[0]

    def matrix(self) -> Tensor:
        """Return the covariance [in, in], divided by the number of tokens."""
        return self.total[1:] / self.tokens


class GradientMagnitude(GradientStatistic):
    """Sum over samples of the absolute value of the gradient, `total` [out, in]."""

    by_rows = True

    def add(self, gradient: Tensor) -> None:
        """Add the absolute values."""
        self.total += gradient.abs()


class GradientSquares(GradientStatistic):
    """Sum over samples of the square of the gradient, `total` [out, in]."""

    by_rows = True

    def add(self, gradient: Tensor) -> None:
        """Add the squares."""
        self.total.addcmul_(gradient, gradient)


class GradientSum(GradientStatistic):
    """Sum over samples of the signed gradient, `total` [out, in]."""

    by_rows = True

    def add(self, gradient: Tensor) -> None:
        """Add the gradient as it is."""
        self.total += gradient
