"""``python -m pipeline.artifacts``: list, show, verify, pin and prune exports, batch sizes and rates of backends."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from pipeline.core.cli import ErrorOutput, command_parser, print_showable, run_command, run_process
from pipeline.core.errors import ArtifactError, PipelineError

if TYPE_CHECKING:
    from pipeline.backends.artifacts.store import Artifact, ArtifactStore

EXAMPLES = """\
examples:
  python -m pipeline.artifacts list
  python -m pipeline.artifacts show 3fa1          (the first digits of an id are enough)
  python -m pipeline.artifacts verify
  python -m pipeline.artifacts prune --older-than 90 --dry-run
exit codes: 0 done, 1 verify found damage, 2 an error, 75 interrupted
"""
HEADER = ("id", "kind", "model", "revision", "options", "size", "created", "last used", "pin")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, act on the store, print; return the exit code."""
    options = _parser().parse_args(arguments)
    return run_command(lambda: _run(options), ErrorOutput("interrupted; the same command goes on"))


def _run(options: argparse.Namespace) -> int:
    from pipeline.backends.artifacts.store import ArtifactStore

    try:
        return _act(ArtifactStore(options.store), options)
    except PipelineError as error:
        # Exit code 1 says that verify found damage.
        raise ArtifactError(str(error)) from error


def _act(store: ArtifactStore, options: argparse.Namespace) -> int:
    if options.action == "list":
        _list(store, as_json=options.json)
    elif options.action == "show":
        print_showable(json.dumps(_described(store, store.choose(options.id)), indent=2))
    elif options.action == "verify":
        return _verify(store, options.ids)
    elif options.action == "pin":
        store.pin(store.choose(options.id))
    elif options.action == "unpin":
        store.unpin(store.choose(options.id, damaged=True))
    else:
        gone = _prune(store, older_than=options.older_than, dry=options.dry_run)
        for artifact in gone:
            print_showable("  ".join(_row(store, artifact)))
        verb = "would be removed" if options.dry_run else "removed"
        print(f"{len(gone)} {verb}, {_size(sum(artifact.size for artifact in gone))}")
    return 0


def _prune(store: ArtifactStore, *, older_than: timedelta, dry: bool) -> list[Artifact]:
    """Prune the store, and the one of parity figures in it."""
    from pipeline.backends.artifacts.store import PROOFS, ArtifactStore

    stores = (store, ArtifactStore(store.root / PROOFS))
    return [gone for each in stores for gone in each.prune(older_than=older_than, dry=dry)]


def _list(store: ArtifactStore, *, as_json: bool) -> None:
    artifacts = store.artifacts()
    if as_json:
        print_showable(json.dumps([_described(store, artifact) for artifact in artifacts], indent=2))
    elif artifacts:
        rows = [HEADER, *(_row(store, artifact) for artifact in artifacts)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print_showable("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    else:
        print(f"no artefacts in {store.root}")
    for artifact in store.unreadable():
        print(f"damaged: {artifact.path}: {'; '.join(store.problems(artifact))}", file=sys.stderr)


def _verify(store: ArtifactStore, ids: Sequence[str]) -> int:
    chosen = [store.choose(each, damaged=True) for each in ids] or [*store.artifacts(), *store.unreadable()]
    damaged = 0
    for artifact in chosen:
        problems = store.problems(artifact)
        damaged += bool(problems)
        print_showable(
            f"{'DAMAGED' if problems else 'ok'}  {artifact.fingerprint[:12]}  {artifact.card.get('kind', '?')}"
        )
        for problem in problems:
            print_showable(f"    {problem}")
    print(f"{len(chosen)} verified in {store.root}, {damaged} damaged")
    return 1 if damaged else 0


def _described(store: ArtifactStore, artifact: Artifact) -> dict[str, Any]:
    place = {"path": str(artifact.path), "pinned": store.pinned(artifact), "used": store.used(artifact).isoformat()}
    return {**place, **artifact.card}


def _row(store: ArtifactStore, artifact: Artifact) -> tuple[str, ...]:
    card: Mapping[str, Any] = artifact.card
    model = card.get("model", {})
    return (
        artifact.fingerprint[:12],
        str(card.get("kind", "?")),
        str(model.get("name", "?")),
        str(model.get("revision") or "-")[:12],
        _short(card.get("options", {})),
        _size(artifact.size),
        str(card.get("created", "?"))[:16].replace("T", " "),
        f"{store.used(artifact):%Y-%m-%d %H:%M}",
        "pinned" if store.pinned(artifact) else "",
    )


def _short(options: Mapping[str, Any]) -> str:
    pairs = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in options.items()]
    text = " ".join(" ".join(pairs).split()) or "-"
    return text if len(text) <= 48 else text[:45] + "..."


def _size(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _days(text: str) -> timedelta:
    try:
        days = timedelta(days=float(text))
    except (ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of days") from error
    if days < timedelta(0):
        raise argparse.ArgumentTypeError("days cannot be negative")
    return days


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "python -m pipeline.artifacts",
        "List, verify, pin and remove exported models, measured batch sizes and rates of backends.",
        EXAMPLES,
    )
    parser.add_argument("--store", help="the store's folder (default: clip-pipeline/artifacts in the user's cache)")
    actions = parser.add_subparsers(dest="action", required=True)
    listing = actions.add_parser("list", help="all artefacts, newest first; times in UTC")
    listing.add_argument("--json", action="store_true", help="all metadata as JSON, for programs")
    verify = actions.add_parser("verify", help="compute all digests again; exit code 1 if something is damaged")
    verify.add_argument("ids", nargs="*", metavar="ID", help="the first digits of an id (default: all)")
    for action, text in (("show", "the metadata of one"), ("pin", "never prune it"), ("unpin", "allow pruning again")):
        actions.add_parser(action, help=text).add_argument("id", metavar="ID", help="the first digits of an id")
    prune = actions.add_parser("prune", help="remove what is damaged, unused, or left by a process that died")
    prune.add_argument(
        "--older-than", type=_days, default="30", metavar="DAYS", help="unused for this long (default: 30)"
    )
    prune.add_argument("--dry-run", action="store_true", help="only list what would be removed")
    return parser


if __name__ == "__main__":
    run_process(main)
