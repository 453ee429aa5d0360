"""The plan: the definition of a dataset. Created once; a run that would write anything else is refused."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.config.schema import OUTPUT_COLUMNS, Config
from pipeline.core.errors import PlanMismatch, short
from pipeline.dataset.places import moved_root
from pipeline.dataset.saved_config import recipe_of
from pipeline.storage.base import Storage

NAME = "_plan.json"
VERSION = 1
# Names of the contents behind a digest, for messages.
WORDS = {
    "manifest.digest": "what the manifest's files hold",
    "model.architecture": "the model's config",
    "model.tokenizer": "its tokenizer",
    "prompts.text": "the labels, their templates, or the text tower",
}
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that the bytes of the dataset follow from.

    ``fingerprints`` are compared on resume; ``about`` is for readers, and ``config`` are the settings of the job, for a
    repair (see :mod:`pipeline.dataset.saved_config`); both may differ. The shard list is not spelled out: it follows
    from the manifest's row groups and ``shard_rows``, so a plan stays small at any size. ``sources`` are the manifests
    (see :func:`source_of`) of other datasets of the same kind that this one may share whole parts with.

    Where each shard is a tar, the commits alone know the rows: then ``rows`` and ``shard_rows`` are 0, and null in the
    file.
    """

    rows: int
    shards: int
    shard_rows: int
    fingerprints: Mapping[str, Any]
    about: Mapping[str, Any]
    config: Mapping[str, Any] = field(default_factory=dict)
    sources: Sequence[str] = ()

    @property
    def counted(self) -> bool:
        """False if the rows of a shard are known from its commit alone."""
        return self.shard_rows > 0

    def to_json(self) -> bytes:
        """The content of ``_plan.json``."""
        content: dict[str, Any] = {
            "version": VERSION,
            "rows": self.rows if self.counted else None,
            "shards": self.shards,
            "shard_rows": self.shard_rows or None,
            "fingerprints": self.fingerprints,
            "about": self.about,
            "config": self.config,
        }
        if self.sources:
            content["sources"] = list(self.sources)
        return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def own_columns(fingerprints: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns of a dataset that are the pipeline's, behind the id and the kept ones."""
    return tuple(fingerprints.get("output", {}).get("columns", OUTPUT_COLUMNS))


def count_shards(rows: int, shard_rows: int) -> int:
    """Shards of ``shard_rows`` rows that cover ``rows``; the last may be shorter."""
    return -(-rows // shard_rows)


def new_plan(
    config: Config,
    fingerprints: Mapping[str, Any],
    *,
    rows: int,
    shards: int = 0,
    about: Mapping[str, Any] | None = None,
    sources: Sequence[str] = (),
) -> Plan:
    """The plan of a dataset of ``rows`` rows that is made with ``config``; of ``shards`` shards if it has no ``rows``.

    ``about`` is for readers; without it, model and manifest of the config. ``sources`` see :class:`Plan`.
    """
    shard_rows = config.manifest.shard_rows if rows else 0
    # The rows of a tar are estimated, and no setting.
    config = config if rows else config.changed({"manifest.shard_rows": 0})
    return Plan(
        rows=rows,
        shards=count_shards(rows, shard_rows) if rows else shards,
        shard_rows=shard_rows,
        fingerprints=fingerprints,
        about={"model": config.model.name, "manifest": config.manifest.path} if about is None else about,
        config=recipe_of(config),
        sources=sources,
    )


def source_of(fingerprints: Mapping[str, Any]) -> str:
    """Digest of a dataset's manifest for the ``sources`` of another dataset's plan."""
    text = json.dumps(fingerprints.get("manifest"), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def read(storage: Storage) -> Plan | None:
    """The plan of an output; None if there is none.

    Raises:
        PlanMismatch: it is torn, or of another version.
    """
    data = storage.read(NAME)
    if data is None:
        return None
    try:
        content = dict(json.loads(data))
        if content.pop("version") != VERSION:
            raise ValueError("of another version of this pipeline")  # noqa: TRY301
        counted = content["rows"] is not None or content["shard_rows"] is not None
        if not counted:
            content |= {"rows": 0, "shard_rows": 0}
        plan = Plan(**{"config": {}, **content})
    except (ValueError, TypeError, KeyError) as error:
        raise PlanMismatch(f"{storage.url}/{NAME}: not readable as a plan ({error})") from error
    numbers = (plan.rows, plan.shards, plan.shard_rows) if counted else (plan.shards,)
    if not all(type(number) is int and number > 0 for number in numbers):
        raise PlanMismatch(f"{storage.url}/{NAME}: not readable as a plan (rows and shards must be positive numbers)")
    return plan


def recorded(storage: Storage, name: str) -> Mapping[str, Any] | None:
    """The fingerprint of ``model``, ``manifest`` or another input in an output's plan.

    None where there is no plan, or none that can be read, which :func:`compare` refuses.
    """
    try:
        found = json.loads(storage.read(NAME) or b"{}")["fingerprints"][name]
    except (ValueError, TypeError, KeyError):
        return None
    return found if isinstance(found, dict) else None


def write_once(storage: Storage, plan: Plan) -> bool:
    """Create the plan, or find the same one; True when the dataset is new.

    Raises:
        PlanMismatch: see :func:`compare`.
    """
    kept = compare(storage, plan)
    if kept is None:
        if storage.create_once(NAME, plan.to_json()):
            return True
        kept = compare(storage, plan)
    if kept != json.loads(plan.to_json())["fingerprints"]:
        raise PlanMismatch(f"{storage.url}: was begun from another folder meanwhile; run the same command again")
    return False


def settle(storage: Storage, plan: Plan) -> Plan:
    """The plan with the fingerprints that the output holds, if it holds the same plan.

    What does not decide the rows, such as the folder of the images, stays as the dataset was begun: every part has the
    same fingerprints then, whatever moved meanwhile.

    Raises:
        PlanMismatch: see :func:`compare`.
    """
    kept = compare(storage, plan)
    if kept is None:
        return plan
    there, now = (each.get("manifest", {}).get("root") for each in (kept, plan.fingerprints))
    if there != now:
        log.warning("%s: its images were in %s when it was begun, and are in %s now", storage.url, there, now)
    return replace(plan, fingerprints=kept)


def compare(storage: Storage, plan: Plan) -> dict[str, Any] | None:
    """The fingerprints that the output holds, if it holds the same plan; None if it holds nothing yet.

    Raises:
        PlanMismatch: the output holds another dataset; the message lists every difference.
    """
    data = storage.read(NAME)
    if data is None:
        stray = sorted(name for name in storage.sizes() if name.endswith(".parquet"))
        if stray:
            raise PlanMismatch(
                f"{storage.url}: holds {stray[0]} but no {NAME}, so it is not a dataset of this pipeline; "
                "its rows would mix with the new ones. Choose another output.dir"
            )
        return None
    try:
        found = dict(json.loads(data))
    except (ValueError, TypeError) as error:
        raise PlanMismatch(
            f"{storage.url}/{NAME}: not readable as JSON ({error}); choose another output.dir"
        ) from error
    wanted = json.loads(plan.to_json())
    if (root := moved_root(found, wanted)) is not None:
        wanted["fingerprints"]["manifest"]["root"] = root
    if not _names_the_engine(found):
        # An earlier version of this pipeline began it.
        wanted["fingerprints"].get("images", {}).pop("engine", None)
    for content in (found, wanted):
        content.pop("config", None)
        content.pop("sources", None)
    named = list(_differences(found.pop("about", {}), wanted.pop("about"), ""))
    differences = list(_differences(found, wanted, ""))
    if differences:
        raise PlanMismatch(
            "\n".join(
                [
                    f"{storage.url}: holds a dataset of another job, and a dataset never mixes two:",
                    *(f"  - {line}" for line in (*named, *differences)),
                    "choose another output.dir, or run the command that began it",
                ]
            )
        )
    kept: dict[str, Any] = found["fingerprints"]
    return kept


def _names_the_engine(content: Any) -> bool:
    """True if a plan says what decoded its JPEG files on a GPU."""
    try:
        return "engine" in content["fingerprints"]["images"]
    except (KeyError, TypeError):
        return False


def _differences(found: Any, wanted: Any, key: str) -> Iterator[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for name in dict.fromkeys([*found, *wanted]):
            inner = f"{key}.{name}" if key else name
            yield from _differences(found.get(name), wanted.get(name), inner.removeprefix("fingerprints."))
    elif (
        found != wanted
        and isinstance(found, list)
        and isinstance(wanted, list)
        and sorted(map(str, found)) != sorted(map(str, wanted))
    ):
        # Of two long lists only the differing values are shown.
        missing = [value for value in found if value not in wanted]
        added = [value for value in wanted if value not in found]
        yield f"{key}: there also {_short(missing)}, now instead {_short(added)}"
    elif found != wanted:
        what = f"{key} ({WORDS[key]})" if key in WORDS else key
        yield f"{what}: there {_short(found)}, now {_short(wanted)}"


def _short(value: Any) -> str:
    if value is None or isinstance(value, dict):
        return "some" if value else "none"
    text = json.dumps(value, ensure_ascii=False)
    if re.fullmatch(r'"[0-9a-f]{64}"', text):
        # The rest of a digest tells nothing more.
        return f"{text[1:9]}..."
    return short(text)
