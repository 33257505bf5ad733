"""Typed access to parsed tables. Whatever is not as it should be raises an error that says where."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from fp4compile.codegen.errors import Fp4CompileError, UnknownName

Table = Mapping[str, Any]


class WrongValue(Fp4CompileError, ValueError):
    template = "{where}: {key} = {found}; {needed}."

    def __init__(self, *, where: str, key: str, found: object, needed: str) -> None:
        super().__init__(where=where, key=key, found=reprlib.repr(found), needed=needed)


def refuse_unknown_keys(table: Table, valid: Iterable[str], where: str) -> None:
    valid = tuple(valid)
    for key in table:
        if key not in valid:
            raise UnknownName(what="key", found=str(key), valid=valid, where=where)


def table_at(table: Table, key: str, where: str) -> Table | None:
    if key not in table:
        return None
    if not isinstance(table[key], Mapping):
        raise WrongValue(where=where, key=key, found=table[key], needed='a table is needed, as in { format = "nvfp4" }')
    return table[key]


def tables_at(table: Table, key: str, where: str) -> list[Table]:
    """The tables of [[key]]."""
    found = table.get(key, [])
    if not isinstance(found, list | tuple) or not all(isinstance(one, Mapping) for one in found):
        raise WrongValue(where=where, key=key, found=found, needed=f"tables in double brackets are needed: [[{key}]]")
    return list(found)


def text_at(table: Table, key: str, where: str) -> str:
    """Empty where the key is not given; the text itself may not be."""
    if key not in table:
        return ""
    if not isinstance(table[key], str) or not table[key]:
        raise WrongValue(where=where, key=key, found=table[key], needed="a text is needed")
    return table[key]


def texts_at(table: Table, key: str, where: str) -> tuple[str, ...]:
    """A text or a list of them."""
    if key not in table:
        return ()
    found = [table[key]] if isinstance(table[key], str) else table[key]
    if not isinstance(found, list | tuple) or not found or not all(isinstance(one, str) and one for one in found):
        raise WrongValue(where=where, key=key, found=table[key], needed="a text or a list of texts is needed")
    return tuple(found)


def name_at(table: Table, key: str, valid: Iterable[str], where: str) -> str | None:
    """One of the names `valid`."""
    found = text_at(table, key, where) if key in table else None
    return found if found is None else _known(found, key, valid, where)


def names_at(table: Table, key: str, valid: Iterable[str], where: str) -> tuple[str, ...]:
    valid = tuple(valid)
    return tuple(_known(found, key, valid, where) for found in texts_at(table, key, where))


def _known(found: str, key: str, valid: Iterable[str], where: str) -> str:
    names = [str(name) for name in valid]
    if found not in names:
        raise UnknownName(what=key, found=found, valid=names, where=where)
    return found


def whole_number_at(table: Table, key: str, where: str) -> int | None:
    """A whole number from 0 on."""
    if key not in table:
        return None
    found = table[key]
    if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found < 2**63:
        raise WrongValue(where=where, key=key, found=found, needed="a whole number from 0 on is needed")
    return found


def flag_at(table: Table, key: str, where: str) -> bool:
    if key not in table:
        return False
    if not isinstance(table[key], bool):
        raise WrongValue(where=where, key=key, found=table[key], needed="true or false is needed")
    return table[key]
