"""Store of exported models: a local folder with one complete, unchanged folder for each fingerprint.

    <root>/<fingerprint>/card.json, model.onnx, ...    published by one rename of a finished, flushed folder
    <root>/<fingerprint>.pin                           excluded from pruning
    <root>/<fingerprint>.lock, <fingerprint>.tmp-*     only during an export
    <root>/proofs/                                     a store of its own, of figures that backends reached

Correctness rests on the rename, which fails if another process published first. The lock avoids duplicate work.
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

# A card keeps the parity figures of so many jobs.
GATES = 20
PROOFS = "proofs"
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Inputs of an export. Of ``model``, only ``fingerprint`` and ``revision`` count; the rest is information."""

    kind: str
    model: Mapping[str, Any]
    options: Mapping[str, Any]
    versions: Mapping[str, str]

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of the recipe in canonical JSON.

        Raises:
            ArtifactError: the model has no fingerprint, or something is not plain JSON.
        """
        return metadata.fingerprint_of(**self.origin)

    @property
    def origin(self) -> dict[str, Any]:
        """The four parts in plain JSON, as in the card; raises ArtifactError for other types."""
        parts = {"kind": self.kind, "model": self.model, "options": self.options, "versions": self.versions}
        return dict(metadata.plain(parts, f"the recipe of {self.kind}"))


@dataclass(frozen=True, slots=True)
class Artifact:
    """Folder of the store and its card; the card is empty if it cannot be read."""

    path: Path
    card: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the recipe, the name of the folder."""
        return self.path.name

    @property
    def size(self) -> int:
        """Bytes of all files except the card."""
        return int(self.card.get("size", 0))

    def file(self, name: str) -> Path:
        """Return the path of a file.

        Raises:
            ArtifactError: the card does not list the file, or it is outside the folder.
        """
        files = self.card.get("files", {})
        if name not in files:
            raise ArtifactError(f"{self.path}: no file {name!r} in this artefact; it has {', '.join(files) or 'none'}")
        path = self.path / name
        if not metadata.is_inside(name) or not path.resolve().is_relative_to(self.path.resolve()):
            raise ArtifactError(f"{path}: leaves the artefact's folder; it is not used")
        return path


class ArtifactStore:
    """Store at ``root``, by default the folder ``clip-pipeline/artifacts`` of the user's cache."""

    def __init__(self, root: str | Path | None) -> None:
        self.root = (default_root() if root is None else Path(os.path.expanduser(root))).absolute()

    def find(self, recipe: Recipe) -> Artifact | None:
        """Return the artefact of a recipe, verified byte for byte; a damaged one is removed with a warning.

        Raises:
            ArtifactError: the recipe is not plain JSON.
            StorageError: a damaged artefact cannot be removed.
        """
        fingerprint = recipe.fingerprint
        path = self.root / fingerprint
        if not os.path.lexists(path):
            return None
        # Before the verification, which takes a while: a simultaneous prune must not remove this artefact.
        with suppress(OSError):
            os.utime(path / metadata.CARD, follow_symlinks=False)
        card, problems = metadata.inspect(path)
        if not problems:
            return Artifact(path=path, card=card)
        with locked(self._lock(fingerprint)):
            return self._verified(fingerprint)

    def has(self, recipe: Recipe) -> bool:
        """Return True if the artefact of a recipe is there, verified or not."""
        return os.path.lexists(self.root / recipe.fingerprint)

    def make(self, recipe: Recipe, build: Callable[[Path], Mapping[str, Any]]) -> Artifact:
        """Find the artefact, or call ``build`` to write its files into a temporary folder, and publish them.

        The result of ``build`` ({"parity": ..., "facts": ...}) becomes part of the card. If ``build`` raises, its
        files are deleted and the error passes unchanged. A second process with the same recipe waits, then uses the
        artefact of the first.

        Raises:
            ArtifactError: the recipe or the facts are not plain JSON, or ``build`` did not write plain files.
            StorageError: the disk is full, or the store cannot be written.
        """
        if found := self.find(recipe):
            return found
        # A copy: the build can take minutes, and the recipe must not change during it.
        origin = recipe.origin
        fingerprint = metadata.fingerprint_of(**origin)
        with explained(str(self.root)):
            self.root.mkdir(parents=True, exist_ok=True)
        with locked(self._lock(fingerprint)) as held:
            if found := self._verified(fingerprint):
                return found
            sweep(self.root, fingerprint, held=held)
            with fresh(self.root, fingerprint) as temporary:
                facts = build(temporary)
                with explained(str(temporary)):
                    card = metadata.new_card(origin, temporary, facts)
                    metadata.write_card(temporary / metadata.CARD, card)
                    sync_tree(temporary)
                return self._publish(temporary, fingerprint, card)

    def remove(self, recipe: Recipe) -> None:
        """Remove the artefact of a recipe, if it is there.

        Raises:
            ArtifactError: the recipe is not plain JSON.
            StorageError: the store cannot be written.
        """
        fingerprint = recipe.fingerprint
        if os.path.lexists(self.root / fingerprint):
            with locked(self._lock(fingerprint)):
                self._remove(fingerprint)

    def artifacts(self) -> list[Artifact]:
        """Return all artefacts with a readable card, newest first; their files are not verified."""
        readable = [artifact for artifact in self._all() if artifact.card]
        return sorted(readable, key=lambda one: (one.card["created"], one.fingerprint), reverse=True)

    def unreadable(self) -> list[Artifact]:
        """Return the artefacts whose cards cannot be read; ``problems`` has the reasons."""
        return [artifact for artifact in self._all() if not artifact.card]

    def problems(self, artifact: Artifact) -> list[str]:
        """Return the problems of an artefact on disk, one line for each file; empty if it is unchanged."""
        return metadata.inspect(artifact.path)[1]

    def pin(self, artifact: Artifact) -> None:
        """Exclude an artefact from pruning; raises StorageError if the store cannot be written."""
        with explained(str(self._pin(artifact))):
            self._pin(artifact).touch()

    def unpin(self, artifact: Artifact) -> None:
        """Include an artefact in pruning again; raises StorageError if the store cannot be written."""
        with explained(str(self._pin(artifact))):
            self._pin(artifact).unlink(missing_ok=True)

    def pinned(self, artifact: Artifact) -> bool:
        """Return True if an artefact is pinned."""
        return self._pin(artifact).exists()

    def used(self, artifact: Artifact) -> datetime:
        """Return the time (UTC) when an artefact was last made, found or given a note."""
        for path in (artifact.path / metadata.CARD, artifact.path):
            with suppress(OSError):
                return datetime.fromtimestamp(path.lstat().st_mtime, UTC)
        return datetime.fromtimestamp(0, UTC)

    def prune(self, *, older_than: timedelta, dry: bool = False) -> list[Artifact]:
        """Remove artefacts that are damaged or were not used for ``older_than``; returns them.

        Pinned artefacts, artefacts that a process works on, and folders without a card stay. Temporary folders and
        lock files of dead writers are removed too. ``dry`` removes nothing.

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
        """Write ``value`` into the card's ``gates`` under ``key``; the latest 20 are kept.

        Raises:
            ArtifactError: the value is not plain JSON, or the card is missing or damaged.
            StorageError: the store cannot be written.
        """
        gate = metadata.plain(value, f"the note {key!r}")
        with locked(self._lock(artifact.fingerprint)):
            card, problems = metadata.read_card(artifact.path)
            if problems:
                raise ArtifactError(f"{artifact.path}: {'; '.join(problems)}; export the artefact again")
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
        """Return the artefact whose fingerprint starts with ``prefix``; ``damaged`` includes unreadable cards.

        Raises:
            ArtifactError: there is none, or there are several.
        """
        candidates = self.artifacts() + (self.unreadable() if damaged else [])
        matches = [artifact for artifact in candidates if prefix and artifact.fingerprint.startswith(prefix.lower())]
        if len(matches) == 1:
            return matches[0]
        names = ", ".join(_title(artifact) for artifact in matches or candidates) or "nothing"
        if matches:
            raise ArtifactError(f"{self.root}: {prefix!r} is the start of several artefacts: {names}; give more digits")
        raise ArtifactError(f"{self.root}: no artefact begins with {prefix!r}; the store holds {names}")

    def _publish(self, temporary: Path, fingerprint: str, card: Mapping[str, Any]) -> Artifact:
        """Rename a finished folder to its fingerprint, or return the artefact that another process published first."""
        path = self.root / fingerprint
        with explained(str(path)):
            while True:
                try:
                    temporary.rename(path)
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
                    if existing := self._verified(fingerprint):
                        return existing
                else:
                    sync(self.root)
                    return Artifact(path=path, card=card)

    def _verified(self, fingerprint: str) -> Artifact | None:
        """Return the verified artefact, under the lock; a damaged one is removed."""
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
        """Return the artefact in a list if it is to be removed, else an empty list."""
        path = self.root / fingerprint
        artifact = Artifact(path=path, card=metadata.read_card(path)[0])
        if self.pinned(artifact) or not os.path.lexists(path / metadata.CARD):
            return []
        old = datetime.now(UTC) - self.used(artifact) > older_than
        return [artifact] if old or metadata.inspect(path)[1] else []

    def _remove(self, fingerprint: str) -> None:
        """Rename an artefact atomically, then delete it."""
        temporary = temporary_path(self.root, fingerprint)
        with explained(str(self.root / fingerprint)), suppress(FileNotFoundError):
            (self.root / fingerprint).rename(temporary)
            discard(temporary)

    def _all(self) -> list[Artifact]:
        paths = [self.root / fingerprint for fingerprint in fingerprints(self.root)]
        return [Artifact(path=path, card=metadata.read_card(path)[0]) for path in paths if os.path.isdir(path)]

    def _lock(self, fingerprint: str) -> Path:
        return self.root / f"{fingerprint}.lock"

    def _pin(self, artifact: Artifact) -> Path:
        return self.root / f"{artifact.fingerprint}.pin"


def default_root() -> Path:
    """Return the default folder of the store."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "clip-pipeline" / "artifacts"


def _title(artifact: Artifact) -> str:
    return f"{artifact.card.get('kind', 'the artefact')} {artifact.fingerprint[:12]}"
