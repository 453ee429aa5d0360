"""A table of PostgreSQL with pgvector, as a target of :mod:`pipeline.dataset.databases`.

A part is one transaction, with the mark of the table in its comment.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from pipeline.core.errors import ConfigError, OutputBusy, Problem, StorageError
from pipeline.dataset.databases import Mark, client_of, schema_of
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.parts import VECTORS
from pipeline.dataset.pg_types import FORMS, LONGEST, microseconds, problems_of, rows_of, sql_type


class PgTable:
    """A table at a connection URL; close it. ``name`` may have a schema in front.

    Raises:
        ConfigError: psycopg is missing, or a name, the URL or the index is not valid.
        StorageError: there is no connection, or the server has no pgvector.
    """

    def __init__(self, dataset: Dataset, url: str, name: str, *, index: bool = False) -> None:
        psycopg = client_of("psycopg", "pgvector")
        self._error, self._sql, self._form, self._column = psycopg.Error, psycopg.sql, dataset.form, dataset.column
        self._columns, self._type = microseconds(schema_of(dataset)), FORMS[dataset.form.dtype]
        if problems := problems_of(name, self._columns, dataset.form, index=index):
            raise ConfigError(problems)
        self._name, self._short = psycopg.sql.Identifier(*name.split(".")), name.rpartition(".")[2]
        try:
            parts = psycopg.conninfo.conninfo_to_dict(url)
        except psycopg.Error:
            parts = {"port": "unknown"}
        # A part of a password that is not escaped would be shown as a host or a port; so would the message above.
        if "@" in str(parts.get("host", "")) or not re.fullmatch(r"[\d,]*", str(parts.get("port", ""))):
            allowed = "must be like postgresql://user@host:5432/database"
            raise ConfigError([Problem("--out", "the URL", allowed, "escape other characters with %")])
        self._password, self.shown = parts.pop("password", None), psycopg.conninfo.make_conninfo("", **parts)
        with self._explained():
            self._connection = psycopg.connect(url, autocommit=True, prepare_threshold=None)
            self._connection.execute("create extension if not exists vector")

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def mark(self) -> Mark | None:
        """See :class:`~pipeline.dataset.databases.Table`."""
        query = "select obj_description(found, 'pg_class') from to_regclass(%s) as found where found is not null"
        with self._explained():
            row = self._connection.execute(query, [self._name.as_string(self._connection)]).fetchone()
        try:
            return None if row is None else dict(json.loads(row[0])["clip-pipeline"])
        except (ValueError, TypeError, KeyError):
            return {}

    def create(self, mark: Mark) -> None:
        """See :class:`~pipeline.dataset.databases.Table`."""
        columns = [
            self._sql.SQL("{} {}").format(self._sql.Identifier(field.name), self._sql.SQL(self._type_of(field)))
            for field in self._columns
        ]
        columns[0] += self._sql.SQL(" primary key")
        with self._explained(), self._connection.transaction():
            self._run("drop table if exists {}", self._name)
            self._run("create table {} ({})", self._name, self._sql.SQL(", ").join(columns))
            self._write_mark(mark)

    def write(self, rows: Iterator[pa.Table], mark: Mark) -> None:
        """See :class:`~pipeline.dataset.databases.Table`.

        Raises:
            OutputBusy: another command writes into the table.
        """
        copied = ["bytea" if field.name in VECTORS else sql_type(field.type) for field in self._columns]
        with self._explained(), self._connection.transaction():
            self._run("lock table {} in share row exclusive mode", self._name)
            found = self.mark() or {}
            if (found.get("success"), found.get("parts")) != (mark["success"], mark["parts"] - 1):
                raise OutputBusy(f"{self.shown}: another command writes into {self._short}; wait until it has ended")
            command = self._sql.SQL("copy {} from stdin (format binary)").format(self._name)
            with self._connection.cursor() as cursor, cursor.copy(command) as copy:
                copy.set_types(copied)
                for batch in rows:
                    for row in rows_of(batch, self._form, self._columns):
                        copy.write_row(row)
            self._write_mark(mark)

    def build_index(self) -> None:
        """Build an HNSW index of the embeddings, unless it is there."""
        name = self._sql.Identifier(f"{self._short[: LONGEST - len(self._column) - 6]}_{self._column}_hnsw")
        what = (self._sql.Identifier(self._column), self._sql.SQL(self._type[1]))
        with self._explained():
            self._run("create index if not exists {} on {} using hnsw ({} {})", name, self._name, *what)

    def _type_of(self, field: pa.Field) -> str:
        return f"{self._type[0]}({self._form.dim})" if field.name in VECTORS else sql_type(field.type)

    def _run(self, command: str, *values: Any) -> None:
        self._connection.execute(self._sql.SQL(command).format(*values))

    def _write_mark(self, mark: Mark) -> None:
        self._run("comment on table {} is {}", self._name, self._sql.Literal(json.dumps({"clip-pipeline": dict(mark)})))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except self._error as error:
            text = " ".join(str(error).replace(str(self._password or "\0"), "***").split())
            raise StorageError(f"{self.shown}: {text}; the same command goes on behind the last whole part") from None
