"""``python -m tests.size [CHECKOUT]`` prints figures of the size and the structure of a checkout of this project.

Lines and modules of ``pipeline/`` and ``tests/``; modules at the root of ``pipeline/``; imports between packages (each
pair of packages once, with modules at the root as packages of their own) and between modules; cycles; calls of
``replace`` on a config; functions over 60 lines; the longest list of parameters.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from tests.conftest import ROOT

# replace(config, ...), replace(config.loader, ...), replace(self._config, ...)
_REPLACE = re.compile(r"replace\((?:\w+\.)*_?config\b")


def figures(root: Path) -> dict[str, object]:
    """The figures of the checkout at ``root`` by name."""
    sources = {path: path.read_text() for path in sorted((root / "pipeline").rglob("*.py"))}
    names = {_dotted(path.relative_to(root)): path for path in sources}
    trees = {name: ast.parse(sources[path]) for name, path in names.items()}
    arrows = {(name, other) for name, tree in trees.items() for other in _imports(tree, names) if other != name}
    graph = {name: {other for source, other in arrows if source == name} for name in names if name != "pipeline"}
    functions = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    tests = [path.read_text() for path in (root / "tests").rglob("*.py")]
    return {
        "lines in pipeline/": sum(text.count("\n") for text in sources.values()),
        "lines in tests/": sum(text.count("\n") for text in tests),
        "modules in pipeline/": len(sources),
        "modules at the root": len(list((root / "pipeline").glob("*.py"))),
        "imports between packages": len({pair for pair in map(_packages, arrows) if len(set(pair)) == 2}),
        "imports between modules": len(arrows),
        "a cycle": _cycle(graph) or "none",
        "replace(config ...)": sum(len(_REPLACE.findall(text)) for text in sources.values()),
        "functions over 60 lines": sum((node.end_lineno or 0) - node.lineno >= 60 for node in functions),
        "longest list of parameters": max(map(_parameters, functions)),
        "README, lines": (root / "README.md").read_text().count("\n"),
    }


def _dotted(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(tree: ast.AST, names: dict[str, Path]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in names)
        elif isinstance(node, ast.ImportFrom) and node.module in names:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in names else node.module


def _packages(pair: tuple[str, str]) -> tuple[str, ...]:
    return tuple(name.split(".")[1] if "." in name else "" for name in pair)


def _cycle(graph: dict[str, set[str]]) -> str:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " -> ".join(error.args[1])
    return ""


def _parameters(node: ast.FunctionDef) -> int:
    given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return len([each for each in given if each.arg not in ("self", "cls")])


if __name__ == "__main__":
    for name, value in figures(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT).items():
        print(f"{name}: {value}")
