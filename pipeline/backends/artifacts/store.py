"""A local folder of exported models, one folder for each fingerprint, that are whole and unchanged or not there.

    <root>/<fingerprint>/card.json, model.onnx, ...    published by one rename of a finished, flushed folder
    <root>/<fingerprint>.pin                           never pruned
    <root>/<fingerprint>.lock, <fingerprint>.tmp-*     only while somebody is at work

The rename is what correctness rests on: it fails where there is a winner already. The lock saves double work.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pipeline.backends.artifacts import metadata
from pipeline.backends.artifacts.directories import discard, fingerprints, fresh, locked, sweep, temporary_path
from pipeline.core.errors import ArtifactError
from pipeline.storage.local import sync, sync_tree
from pipeline.storage.urls import explained

# Of the parity figures of jobs, how many a card keeps.
GATES = 20
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that an artefact follows from. ``model`` has a ``fingerprint`` and a ``revision``; the rest is for people."""

    kind: str
    model: Mapping[str, Any]
    options: Mapping[str, Any]
    versions: Mapping[str, str]

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of the canonical JSON of everything that counts.

        Raises:
            ArtifactError: the model has no fingerprint, or something is not plain JSON.
        """
        return metadata.fingerprint_of(**self.origin)

    @property
    def origin(self) -> dict[str, Any]:
        """The four parts as they go into the card, in plain JSON; raises ArtifactError where they are not."""
        parts = {"kind": self.kind, "model": self.model, "options": self.options, "versions": self.versions}
        return dict(metadata.plain(parts, f"the recipe of {self.kind}"))


@dataclass(frozen=True, slots=True)
class Artifact:
    """A folder of the store and its card, which is empty where it cannot be read."""

    path: Path
    card: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """The recipe's fingerprint, which is the folder's name."""
        return self.path.name

    @property
    def size(self) -> int:
        """Bytes of all files, without the card."""
        return int(self.card.get("size", 0))

    def file(self, name: str) -> Path:
        """The path of one file.

        Raises:
            ArtifactError: the card does not name it, or it lies outside the folder.
        """
        files = self.card.get("files", {})
        if name not in files:
            raise ArtifactError(f"{self.path}: no file {name!r} in this artefact; it has {', '.join(files) or 'none'}")
        path = self.path / name
        if not metadata.is_inside(name) or not path.resolve().is_relative_to(self.path.resolve()):
            raise ArtifactError(f"{path}: leaves the artefact's folder; it is not used")
        return path


class ArtifactStore:
    """The store at ``root``; without one, the folder ``clip-pipeline/artifacts`` of the user's cache."""

    def __init__(self, root: str | Path | None) -> None:
        self.root = (default_root() if root is None else Path(root).expanduser()).absolute()

    def find(self, recipe: Recipe) -> Artifact | None:
        """The artefact of a recipe, verified byte for byte; a damaged one is removed with a warning.

        Raises:
            ArtifactError: the recipe is not plain JSON.
            StorageError: a damaged one cannot be removed.
        """
        fingerprint = recipe.fingerprint
        path = self.root / fingerprint
        if not os.path.lexists(path):
            return None
        # Before the verification, which takes a while: a prune beside it must see that somebody wants this one.
        with suppress(OSError):
            os.utime(path / metadata.CARD, follow_symlinks=False)
        card, problems = metadata.inspect(path)
        if not problems:
            return Artifact(path=path, card=card)
        with locked(self._lock(fingerprint)):
            return self._sound(fingerprint)

    def make(self, recipe: Recipe, build: Callable[[Path], Mapping[str, Any]]) -> Artifact:
        """Find the artefact, or have ``build`` write its files into a private folder and publish them.

        What ``build`` returns ({"parity": ..., "facts": ...}) goes into the card. When it raises, nothing stays
        behind and its error goes on. A second process that makes the same one waits and takes the first one's.

        Raises:
            ArtifactError: the recipe or the facts are not plain JSON, or ``build`` wrote no plain files.
            StorageError: the disk is full, or the store cannot be written.
        """
        if found := self.find(recipe):
            return found
        # Once, and a copy: the build may take minutes, and what was asked for must not change meanwhile.
        origin = recipe.origin
        fingerprint = metadata.fingerprint_of(**origin)
        with explained(str(self.root)):
            self.root.mkdir(parents=True, exist_ok=True)
        with locked(self._lock(fingerprint)) as held:
            if found := self._sound(fingerprint):
                return found
            sweep(self.root, fingerprint, held=held)
            with fresh(self.root, fingerprint) as temporary:
                facts = build(temporary)
                with explained(str(temporary)):
                    card = metadata.new_card(origin, temporary, facts)
                    metadata.write_card(temporary / metadata.CARD, card)
                    sync_tree(temporary)
                return self._publish(temporary, fingerprint, card)

    def artifacts(self) -> list[Artifact]:
        """All artefacts with a card that can be read, newest first; their files are not verified."""
        readable = [artifact for artifact in self._every() if artifact.card]
        return sorted(readable, key=lambda one: (one.card["created"], one.fingerprint), reverse=True)

    def unreadable(self) -> list[Artifact]:
        """The folders named like an artefact whose cards cannot be read; ``problems`` says why."""
        return [artifact for artifact in self._every() if not artifact.card]

    def problems(self, artifact: Artifact) -> list[str]:
        """What is wrong with it on disk: one line for each file; nothing when it is whole and unchanged."""
        return metadata.inspect(artifact.path)[1]

    def pin(self, artifact: Artifact) -> None:
        """Keep it from being pruned; raises StorageError where the store cannot be written."""
        with explained(str(self._pin(artifact))):
            self._pin(artifact).touch()

    def unpin(self, artifact: Artifact) -> None:
        """Let it be pruned again; raises StorageError where the store cannot be written."""
        with explained(str(self._pin(artifact))):
            self._pin(artifact).unlink(missing_ok=True)

    def pinned(self, artifact: Artifact) -> bool:
        """Whether it is pinned."""
        return self._pin(artifact).exists()

    def used(self, artifact: Artifact) -> datetime:
        """When it was last made, found or noted upon (UTC)."""
        for path in (artifact.path / metadata.CARD, artifact.path):
            with suppress(OSError):
                return datetime.fromtimestamp(path.lstat().st_mtime, UTC)
        return datetime.fromtimestamp(0, UTC)

    def prune(self, *, older_than: timedelta, dry: bool = False) -> list[Artifact]:
        """Remove what was not used for so long, and what is damaged, unless it is pinned; returns what went.

        Temporary folders and lock files of writers that are no more go too. What somebody is at work on stays,
        and so does a folder without a card, which is not the store's. ``dry`` removes nothing.

        Raises:
            StorageError: the store cannot be listed or written.
        """
        gone = []
        for fingerprint in fingerprints(self.root):
            if dry:
                gone += self._prunable(fingerprint, older_than)
                continue
            with suppress(BlockingIOError), locked(self._lock(fingerprint), wait=False) as held:
                sweep(self.root, fingerprint, held=held)
                for artifact in self._prunable(fingerprint, older_than):
                    self._remove(fingerprint)
                    gone.append(artifact)
        return gone

    def note(self, artifact: Artifact, key: str, value: Mapping[str, Any]) -> None:
        """Put ``value`` into the card's ``gates`` under ``key``; of more than 20, the oldest go.

        Raises:
            ArtifactError: the value is not plain JSON, or the card was removed or damaged meanwhile.
            StorageError: the store cannot be written.
        """
        gate = metadata.plain(value, f"the note {key!r}")
        with locked(self._lock(artifact.fingerprint)):
            card, problems = metadata.read_card(artifact.path)
            if problems:
                raise ArtifactError(f"{artifact.path}: {'; '.join(problems)}; make the artefact again")
            gates = {name: old for name, old in card["gates"].items() if name != key} | {key: gate}
            card["gates"] = dict(list(gates.items())[-GATES:])
            temporary = temporary_path(self.root, artifact.fingerprint)
            try:
                with explained(str(artifact.path / metadata.CARD)):
                    metadata.write_card(temporary, metadata.sealed(card))
                    temporary.replace(artifact.path / metadata.CARD)
                    sync(artifact.path)
            finally:
                discard(temporary)

    def choose(self, prefix: str, *, damaged: bool = False) -> Artifact:
        """The one artefact whose fingerprint starts with ``prefix``; with ``damaged``, its card may be unreadable.

        Raises:
            ArtifactError: there is none, or there are several.
        """
        every = self.artifacts() + (self.unreadable() if damaged else [])
        matches = [artifact for artifact in every if prefix and artifact.fingerprint.startswith(prefix.lower())]
        if len(matches) == 1:
            return matches[0]
        names = ", ".join(_title(artifact) for artifact in matches or every) or "nothing"
        if matches:
            raise ArtifactError(f"{self.root}: {prefix!r} begins several artefacts: {names}; give more of the one")
        raise ArtifactError(f"{self.root}: no artefact begins with {prefix!r}; the store holds {names}")

    def _publish(self, temporary: Path, fingerprint: str, card: Mapping[str, Any]) -> Artifact:
        """Give a finished folder its name; where somebody was first, take theirs."""
        path = self.root / fingerprint
        with explained(str(path)):
            while True:
                try:
                    temporary.rename(path)
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
                    if winner := self._sound(fingerprint):
                        return winner
                else:
                    sync(self.root)
                    return Artifact(path=path, card=card)

    def _sound(self, fingerprint: str) -> Artifact | None:
        """The verified artefact, under the lock; a damaged one is removed."""
        path = self.root / fingerprint
        if not os.path.lexists(path):
            return None
        card, problems = metadata.inspect(path)
        artifact = Artifact(path=path, card=card)
        if not problems:
            return artifact
        log.warning("%s in %s is damaged and is removed: %s", _title(artifact), self.root, "; ".join(problems))
        self._remove(fingerprint)
        return None

    def _prunable(self, fingerprint: str, older_than: timedelta) -> list[Artifact]:
        """The artefact, if it is to go."""
        path = self.root / fingerprint
        artifact = Artifact(path=path, card=metadata.read_card(path)[0])
        if self.pinned(artifact) or not os.path.lexists(path / metadata.CARD):
            return []
        old = datetime.now(UTC) - self.used(artifact) > older_than
        return [artifact] if old or metadata.inspect(path)[1] else []

    def _remove(self, fingerprint: str) -> None:
        """Take an artefact out of sight at once, then delete it."""
        temporary = temporary_path(self.root, fingerprint)
        with explained(str(self.root / fingerprint)), suppress(FileNotFoundError):
            (self.root / fingerprint).rename(temporary)
            discard(temporary)

    def _every(self) -> list[Artifact]:
        paths = [self.root / fingerprint for fingerprint in fingerprints(self.root)]
        return [Artifact(path=path, card=metadata.read_card(path)[0]) for path in paths if os.path.isdir(path)]

    def _lock(self, fingerprint: str) -> Path:
        return self.root / f"{fingerprint}.lock"

    def _pin(self, artifact: Artifact) -> Path:
        return self.root / f"{artifact.fingerprint}.pin"


def default_root() -> Path:
    """Where artefacts are kept when nobody says."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "clip-pipeline" / "artifacts"


def _title(artifact: Artifact) -> str:
    return f"{artifact.card.get('kind', 'the artefact')} {artifact.fingerprint[:12]}"
