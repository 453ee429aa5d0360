"""Print the requirements of a package and of some extras, one a line, for a layer of the Dockerfile.

``python jobs/deploy/requirements.py pyproject.toml onnx,serve``. The layer then changes only with ``pyproject.toml``,
and not with the code.
"""

import re
import sys
import tomllib
from pathlib import Path


def requirements(pyproject: str, extras: list[str]) -> list[str]:
    """Return the requirements in order; an extra that consists of others, ``name[a,b]``, is expanded."""
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
