"""Conditions on the columns of a dataset: a column, an operator and a value, compared by Arrow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.core.errors import Problem
from pipeline.dataset.dataset import Dataset

OPERATORS = {
    "is": "is", "not": "is not", "has": "contains", "lt": "<", "le": "≤", "gt": ">", "ge": "≥",
    "null": "is empty", "some": "is not empty",
}  # fmt: skip
WITHOUT_VALUE = ("null", "some")


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition on one column; ``operator`` is a key of :data:`OPERATORS`."""

    column: str
    operator: str
    value: str = ""


def conditional(dataset: Dataset) -> list[str]:
    """The columns that may have conditions."""
    return [field.name for field in dataset.schema if _is_plain(field.type)]


def blank(condition: Condition, dataset: Dataset) -> bool:
    """True for an empty line of a form. An empty value is one only of texts, which can be equal to it."""
    if not condition.column or condition.operator in WITHOUT_VALUE:
        return not condition.column
    known = condition.column in dataset.schema.names
    if known and not _is_text(_plain(dataset.schema.field(condition.column).type)):
        return not condition.value.strip()
    return not condition.value and condition.operator not in ("is", "not")


def problems_of(condition: Condition, dataset: Dataset) -> list[Problem]:
    """The problems of a condition on the columns of a dataset."""
    names = conditional(dataset)
    if condition.column not in names:
        return [Problem("column", condition.column, f"must be one of {', '.join(names[:20])}")]
    if condition.operator not in OPERATORS:
        return [Problem("op", condition.operator, f"must be one of {', '.join(OPERATORS)}")]
    kind = _plain(dataset.schema.field(condition.column).type)
    with suppress(pa.ArrowException, ValueError, UnicodeError):
        if condition.operator not in WITHOUT_VALUE:
            _value(condition, kind)
        # That the operator knows the type is tried on no rows.
        matches(pa.table({condition.column: pa.array([], kind)}), [condition])
        return []
    return [Problem(f"value of {condition.column}", condition.value, f"is compared with values of type {kind}")]


def matches(table: pa.Table, conditions: Sequence[Condition]) -> NDArray[np.bool_]:
    """The rows of a table that meet every condition, as booleans ``[N]``."""
    found = np.ones(table.num_rows, bool)
    for each in conditions:
        column = table[each.column]
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        met = _TESTS[each.operator](column, None if each.operator in WITHOUT_VALUE else _value(each, column.type))
        found &= met.fill_null(False).to_numpy()
    return found


_TESTS: Mapping[str, Callable[[Any, Any], Any]] = {
    "is": pc.equal,
    # A row without a value is another one.
    "not": lambda column, value: pc.invert(pc.equal(column, value).fill_null(False)),
    "has": lambda column, value: pc.match_substring(column.cast(pa.string()), value.as_py(), ignore_case=True),
    "lt": pc.less,
    "le": pc.less_equal,
    "gt": pc.greater,
    "ge": pc.greater_equal,
    "null": lambda column, value: pc.is_null(column, nan_is_null=True),
    "some": lambda column, value: pc.invert(pc.is_null(column, nan_is_null=True)),
}


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_plain(kind: pa.DataType) -> bool:
    kind, types = _plain(kind), pa.types
    return bool(
        types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or _is_text(kind)
        or types.is_temporal(kind) or types.is_decimal(kind)
    )  # fmt: skip


def _value(condition: Condition, kind: pa.DataType) -> pa.Scalar:
    """The value of a condition in the type of its column."""
    if condition.operator == "has" or _is_text(kind):
        return pa.scalar(condition.value, pa.string() if condition.operator == "has" else kind)
    value = pa.scalar(condition.value.strip())
    if pa.types.is_timestamp(kind) and kind.tz:
        # A time without a zone is one of the column's zone, in which it is shown.
        with suppress(pa.ArrowInvalid):
            return pc.assume_timezone(value.cast(pa.timestamp(kind.unit)), kind.tz)
    return value.cast(kind)
