"""The tests themselves: each of them asserts something."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def empty_tests(code: str) -> Iterator[str]:
    """Yield the names of tests that neither assert nor expect an error, nor call `assert_...` or `check_...`."""
    functions = (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    for function in functions:
        if function.name.startswith("test_") and not any(map(_checks, ast.walk(function))):
            yield function.name


def _checks(node: ast.AST) -> bool:
    if isinstance(node, ast.Assert):
        return not isinstance(node.test, ast.Constant)
    if not isinstance(node, ast.Call):
        return False
    called = ast.unparse(node.func)
    return called == "pytest.raises" or called.rpartition(".")[2].startswith(("assert_", "check_"))


@pytest.mark.parametrize("file", sorted(TESTS.rglob("test_*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_every_test_asserts_something(file):
    assert list(empty_tests(file.read_text())) == []


def test_the_guard_sees_a_test_that_asserts_nothing():
    code = """
def test_nothing():
    run()

def test_a_constant():
    assert True

def test_a_comparison():
    assert run() == 3

def test_an_error():
    with pytest.raises(ValueError):
        run()

class TestMore:
    def test_a_helper(self):
        torch.testing.assert_close(1, 2)

def helper():
    run()
"""
    assert list(empty_tests(code)) == ["test_nothing", "test_a_constant"]
