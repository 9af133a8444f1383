"""The rooms of the package: who may import whom, and what each may say."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import pruneforge

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pruneforge"
SMALL = {"errors", "progress", "profile", "memory", "numerics", "wide_products", "documents", "trust"}
"""What every room may use; these use one another alone."""

MAY_IMPORT = {
    **dict.fromkeys(SMALL, SMALL),
    "plugins": SMALL | {"interfaces"},
    "interfaces": SMALL | {"interfaces"},
    "data": SMALL | {"interfaces", "data"},
    "checkpoint": SMALL | {"interfaces", "checkpoint"},
    "engine": SMALL | {"interfaces", "checkpoint", "engine"},
    "runs": SMALL | {"plugins", "interfaces", "data", "checkpoint", "engine", "runs"},
    "studies": SMALL | {"plugins", "interfaces", "checkpoint", "runs", "studies"},
    "testing": SMALL | {"plugins", "interfaces", "data", "checkpoint", "engine", "runs", "testing"},
    "cli": SMALL | {"plugins", "interfaces", "data", "checkpoint", "engine", "runs", "testing", "studies", "cli"},
}
PUBLIC_MODULES = {
    "pruneforge",
    "pruneforge.data.evaluation",
    "pruneforge.data.images",
    "pruneforge.data.overlap",
    "pruneforge.data.text",
    "pruneforge.documents",
    "pruneforge.testing",
}
"""What the documentation promises to plugin authors."""


def imports(path: Path) -> list[tuple[str, str]]:
    """Return the (module, name) that a file imports when it runs, type checkers' own imports left out."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.module or "", alias.name) for alias in node.names]
    return found


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def room_imported(module: str, name: str) -> str | None:
    parts = module.split(".")
    if parts[0] != "pruneforge":
        return None
    return parts[1] if len(parts) > 1 else name


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_what_it_may(path):
    room = room_of(path)
    if room in ("__init__", "__main__"):
        return
    for module, name in imports(path):
        other = room_imported(module, name)
        assert other is None or other in MAY_IMPORT[room], f"{path.name} imports {module}.{name}"


def test_the_guard_sees_an_import_of_a_room_above(tmp_path):
    planted = tmp_path / "planted.py"
    planted.write_text("from pruneforge.runs.job import make_job\nfrom pruneforge import runs\n")
    found = [room_imported(*pair) for pair in imports(planted)]
    assert found == ["runs", "runs"]
    assert all(other not in MAY_IMPORT["engine"] for other in found)


@pytest.mark.parametrize("path", sorted((ROOT / "plugins").rglob("*.py")), ids=lambda path: str(path.name))
def test_first_party_plugins_hold_nothing_that_is_not_promised(path):
    for module, name in imports(path):
        if module == "pruneforge":
            assert name in pruneforge.__all__, f"{path} imports {name}"
        elif module.startswith("pruneforge."):
            assert module in PUBLIC_MODULES, f"{path} imports {module}"
            assert not name.startswith("_")


def test_public_modules_are_documented():
    page = (ROOT / "docs" / "reference" / "api.md").read_text()
    for module in PUBLIC_MODULES - {"pruneforge"}:
        assert f"`{module}`" in page, f"docs/reference/api.md does not name {module}"


def test_no_module_of_the_root_bears_a_public_name():
    modules = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert modules.isdisjoint(pruneforge.__all__)
    assert callable(pruneforge.estimate)
    importlib.import_module("pruneforge.runs.estimate")
    assert callable(pruneforge.estimate)


def test_the_root_holds_only_what_every_room_may_use():
    files = {path.stem for path in PACKAGE.glob("*.py")}
    assert files == SMALL | {"plugins", "__init__", "__main__"}


def test_every_room_says_in_one_line_what_it_is_for():
    for folder in (path.parent for path in PACKAGE.glob("*/__init__.py")):
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        assert text, folder
        assert len(text.splitlines()[0]) > 20, folder


def texts(path: Path) -> list[str]:
    """Return the strings of a file that are no documentation."""
    tree = ast.parse(path.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    prose = set()
    for node in ast.walk(tree):
        if isinstance(node, documented):
            for statement in node.body:
                if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                    prose.add(id(statement.value))
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in prose)
    return [node.value for node in constants if isinstance(node.value, str)]


PROGRAMS = {"train_text.py", "train_images.py", "train_sums.py"}
"""Files of plugins that have a command line of their own."""


@pytest.mark.parametrize(
    "path",
    sorted(p for folder in (PACKAGE, ROOT / "plugins") for p in folder.rglob("*.py") if "cli" not in p.parts),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_no_text_below_the_command_line_holds_a_flag(path):
    for text in texts(path) if path.name not in PROGRAMS else ():
        assert not any(word.lstrip("'\"(").startswith("--") for word in text.split()), f"{path}: {text!r}"


def test_every_public_name_is_documented():
    page = (ROOT / "docs" / "reference" / "api.md").read_text()
    for name in pruneforge.__all__:
        assert f"\n{name}\n" in page, f"docs/reference/api.md does not list {name}"
        item = getattr(pruneforge, name)
        if inspect.isclass(item) or inspect.isfunction(item):
            assert inspect.getdoc(item), name
