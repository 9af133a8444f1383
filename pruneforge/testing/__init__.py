"""Checks that a plugin keeps its promises, for its author's own tests and for `pruneforge check`."""

from pruneforge.testing.checks import Check, checked_kinds, checks_for, parametrize_with_checks, run_checks

__all__ = ["Check", "checked_kinds", "checks_for", "parametrize_with_checks", "run_checks"]
