"""The names of tests are claims: a failing line says what no longer holds."""

import ast
from collections import Counter

from tests.support.services import ROOT

NAMES = [
    node.name
    for path in (ROOT / "tests").rglob("test_*.py")
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
]


def test_every_test_has_a_name_of_its_own() -> None:
    """No name stands for two tests."""
    assert [name for name, count in Counter(NAMES).items() if count > 1] == []


def test_every_test_name_is_a_claim() -> None:
    """A name of fewer than four words claims nothing, and one of more than eleven is not read."""
    assert [name for name in NAMES if not 4 <= name.count("_") <= 11] == []
