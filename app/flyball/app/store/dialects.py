"""Where SQLite and PostgreSQL differ in what is written: here, and nowhere else."""

from __future__ import annotations

from typing import Any, TypeAlias

from sqlalchemy import BigInteger, Connection, Dialect, Integer, String, Table, Text
from sqlalchemy.dialects import sqlite
from sqlalchemy.types import TypeDecorator, TypeEngine

Upsert: TypeAlias = sqlite.Insert
"""An insert with `on_conflict_do_nothing` and `on_conflict_do_update`: the two dialects' classes have the same methods."""


def upsert(c: Connection, table: Table) -> Upsert:
    """An insert that may say what to do when the row is there."""
    if c.dialect.name == "sqlite":
        return sqlite.insert(table)
    from sqlalchemy.dialects import postgresql  # 30 ms that nobody without it should pay

    same: Any = postgresql.insert(table)
    return same  # type: ignore[no-any-return]


class _PlainText(TypeDecorator[str]):
    """Text of PostgreSQL that takes what SQLite's takes, and sorts as SQLite's does: byte by byte.

    It cannot hold the character 0, which a sender may put into a name: the sign for it takes its place.
    """

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return dialect.type_descriptor(Text(collation="C"))

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return value.replace("\0", "\u2400") if value is not None and "\0" in value else value


def words() -> TypeEngine[str]:
    return String().with_variant(_PlainText(), "postgresql")


def text() -> TypeEngine[str]:
    return Text().with_variant(_PlainText(), "postgresql")


def whole() -> TypeEngine[int]:
    """A number that may pass two billion. In SQLite an `INTEGER` is that, and only such a one numbers rows by itself."""
    return BigInteger().with_variant(Integer(), "sqlite")
