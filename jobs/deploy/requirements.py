"""Print what a package and some of its extras need, one requirement a line: the Dockerfile's layer of dependencies.

``python jobs/deploy/requirements.py pyproject.toml onnx,serve``. That layer then changes with ``pyproject.toml`` alone,
and not with every line of code.
"""

import re
import sys
import tomllib
from pathlib import Path


def requirements(pyproject: str, extras: list[str]) -> list[str]:
    """The requirements, in order; an extra that is made of others, ``name[a,b]``, is followed."""
    project = tomllib.loads(Path(pyproject).read_text(encoding="utf-8"))["project"]
    offered = project["optional-dependencies"]
    found, waiting, seen = list(project["dependencies"]), list(extras), set[str]()
    while waiting:
        extra = waiting.pop(0)
        if extra not in offered:
            raise SystemExit(f"error: {pyproject} has no extra {extra!r}; it has {', '.join(sorted(offered))}")
        if extra in seen:
            continue
        seen.add(extra)
        for line in offered[extra]:
            own = re.fullmatch(re.escape(project["name"]) + r"\[(.*)\]", line)
            if own:
                waiting += own[1].split(",")
            else:
                found.append(line)
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(f"usage: {sys.argv[0]} pyproject.toml EXTRA,EXTRA")
    print("\n".join(requirements(sys.argv[1], [name for name in sys.argv[2].split(",") if name])))
