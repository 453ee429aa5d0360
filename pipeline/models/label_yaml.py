"""Labels of a YAML file with their lines: what YAML would read silently as something else is refused."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import PromptsError

if TYPE_CHECKING:
    import yaml

_TAG = "tag:yaml.org,2002:"
_PLAIN = {f"{_TAG}{name}" for name in ("str", "int", "float", "bool", "null", "timestamp", "seq", "map")}
# Keys of the config's group, which people copy into the file.
_OF_CONFIG = {"labels", "prompts", "templates", "path", "cache"}
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """A label and one of its prompts, or None for the templates, as a file holds them, and the place of both there."""

    name: Any
    prompt: Any
    place: str


def read_entries(text: str, place: str) -> list[Entry]:
    """The labels of a YAML text: a list, or a mapping from labels to prompts; either alone, or under ``labels``.

    Raises:
        PromptsError: it is neither, or a label stands there twice.
    """
    import yaml

    try:
        loader = yaml.SafeLoader(text)
        try:
            root = loader.get_single_node()
            return [] if root is None else list(_entries(loader, _unwrapped(root, place), place))
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise PromptsError(f"{place}: not YAML: {error}") from error
    except RecursionError as error:
        raise PromptsError(f"{place}: not YAML: nested too deeply, or an alias within itself") from error


def _unwrapped(root: yaml.Node, place: str) -> yaml.Node:
    """The list or mapping under the key ``labels``, if that is all that the file holds."""
    import yaml

    if not isinstance(root, yaml.MappingNode):
        return root
    keys = [key.value for key, _ in root.value if isinstance(key, yaml.ScalarNode)]
    if keys == ["labels"]:
        inner: yaml.Node = root.value[0][1]
        if isinstance(inner, yaml.ScalarNode):
            raise PromptsError(f"{place}, {_line(inner)}: labels is {inner.value!r}; wanted a list, or a mapping")
        return inner
    if keys == ["prompts"] or (len(keys) > 1 and "labels" in keys and set(keys) <= _OF_CONFIG):
        raise PromptsError(
            f"{place}: holds keys of the config ({', '.join(keys)}); a label file holds the labels alone, and "
            "templates are set by prompts.templates"
        )
    return root


def _entries(loader: yaml.SafeLoader, root: yaml.Node, place: str) -> Iterator[Entry]:
    import yaml

    _refuse_tag(root)
    if isinstance(root, yaml.SequenceNode):
        for node in root.value:
            yield Entry(_value(loader, node), None, _line(node))
        return
    if not isinstance(root, yaml.MappingNode):
        raise PromptsError(f"{place}: wanted a list of labels, or a mapping from labels to prompts")
    seen: dict[Any, str] = {}
    for key, value in root.value:
        name, line = _value(loader, key), _line(key)
        if isinstance(name, str) and name in seen:
            both = f"{seen[name]} and {line}"
            raise PromptsError(f"{place}: the label {name!r} stands there twice ({both}); take one out")
        if isinstance(name, str):
            seen[name] = line
        several = value.value if isinstance(value, yaml.SequenceNode) else []
        for node in several or [value]:
            prompt = _value(loader, node)
            if several and prompt is None:
                raise PromptsError(f"{place}, {_line(node)}: an empty prompt in the list of {name!r}; take it out")
            yield Entry(name, prompt, _line(node))
        if len(root.value) == 1 and several:
            log.warning("%s: one label, %r, with %d prompts, so every image gets it", place, name, len(several))


def _value(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    """The value of a scalar; in the place of what is no text, something that a message can show."""
    import yaml

    _refuse_tag(node)
    if not isinstance(node, yaml.ScalarNode):
        return _Other("a sequence" if isinstance(node, yaml.SequenceNode) else "a mapping")
    try:
        return loader.construct_object(node)
    except ValueError:
        # Looks like a date, and is none.
        return _Other(node.value)


def _refuse_tag(node: yaml.Node) -> None:
    from yaml.constructor import ConstructorError

    if node.tag not in _PLAIN:
        raise ConstructorError(None, None, f"the tag {node.tag} is not read", node.start_mark)


@dataclass(frozen=True, slots=True, repr=False)
class _Other:
    """A list, a mapping or a value of another type in the place of a text."""

    shown: str

    def __repr__(self) -> str:
        return self.shown


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"
