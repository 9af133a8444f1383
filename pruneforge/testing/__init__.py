"""Checks that a plugin keeps its promises, for its author's own tests and for `pruneforge check`."""

from pruneforge.testing.checks import (
    Check,
    check_adapter,
    check_allocator,
    check_evaluator,
    check_metric,
    check_recovery,
    check_refiner,
    check_source,
    check_statistic,
    checked_kinds,
    checks_for,
    parametrize_with_checks,
    run_checks,
)

__all__ = [
    "Check",
    "check_adapter",
    "check_allocator",
    "check_evaluator",
    "check_metric",
    "check_recovery",
    "check_refiner",
    "check_source",
    "check_statistic",
    "checked_kinds",
    "checks_for",
    "parametrize_with_checks",
    "run_checks",
]
