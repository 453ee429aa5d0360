"""Columns in types that Hugging Face ``datasets`` or Lance can load."""

from __future__ import annotations

import pyarrow as pa

from pipeline.core.plain import plain_table


def with_wide_decimals(schema: pa.Schema) -> pa.Schema:
    """The schema with decimals of at least 128 bits, which Lance wants."""
    return pa.schema([field.with_type(_wide(field.type)) for field in schema], metadata=schema.metadata)


def for_datasets(schema: pa.Schema) -> pa.Schema:
    """The schema in types that have a feature of ``datasets``.

    Maps become lists of key and value, uuids texts, other extension types (not JSON) what they store, dictionaries
    their values, and decimals have at least 128 bits.
    """
    return pa.schema([_feature(field) for field in schema], metadata=schema.metadata)


def converted(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The columns of ``schema``, of the types that it has for them."""
    return plain_table(table.select(schema.names), schema)


def _feature(field: pa.Field) -> pa.Field:
    return field.with_type(_feature_type(field.type))


def _feature_type(kind: pa.DataType) -> pa.DataType:
    types = pa.types
    if isinstance(kind, pa.UuidType):
        return pa.string()
    if isinstance(kind, pa.Bool8Type):
        return pa.bool_()
    if isinstance(kind, pa.BaseExtensionType) and not isinstance(kind, pa.JsonType):
        return _feature_type(kind.storage_type)
    if types.is_dictionary(kind):
        return kind.value_type
    if types.is_map(kind):
        key, item = pa.field("key", kind.key_type), pa.field("value", kind.item_type)
        return pa.list_(pa.field("element", pa.struct([_feature(key), _feature(item)])))
    if types.is_struct(kind):
        return pa.struct([_feature(field) for field in kind])
    if types.is_fixed_size_list(kind):
        return pa.list_(_feature(kind.value_field), kind.list_size)
    if types.is_large_list(kind):
        return pa.large_list(_feature(kind.value_field))
    if types.is_list(kind):
        return pa.list_(_feature(kind.value_field))
    return _wide(kind)


def _wide(kind: pa.DataType) -> pa.DataType:
    narrow = pa.types.is_decimal32(kind) or pa.types.is_decimal64(kind)
    return pa.decimal128(kind.precision, kind.scale) if narrow else kind
