"""Text that others wrote to values: JSON and YAML, whatever it holds, as a value or as one InputError.

YAML is read by PyYAML's safe loader in Python: libyaml's recurses on the C stack, which deep nesting overflows.
"""

from __future__ import annotations

import difflib
import json
import re
import reprlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from llava_cl.errors import InputError

MAX_YAML_BYTES = 1_000_000
MAX_YAML_VALUES = 100_000
"""Most values of a YAML file, every use of an alias counted as if it were written out."""

SURROGATE = re.compile("[\ud800-\udfff]")
"""Halves of pairs, which JSON and YAML can name but no UTF-8 file can hold."""

_FOREIGN = tuple(
    (re.compile(pattern, re.DOTALL | re.IGNORECASE), what)
    for pattern, what in (
        (rb"version https://git-lfs", "is a pointer of Git LFS in place of the file: fetch it with 'git lfs pull'"),
        (rb"\s*(<!doctype html|<html)", "is a web page in place of the file: download it again"),
        (rb"\x1f\x8b|BZh\d|\xfd7zXZ\0|\(\xb5/\xfd|PK\x03\x04|7z\xbc\xaf|Rar!|.{257}ustar", "is packed: unpack it"),
        (rb"PAR1|ARROW1", "is a Parquet or Arrow table: end its name in .parquet or .arrow if it holds records"),
        (rb"(\xff\xfe|\xfe\xff)..", "is UTF-16: save it as UTF-8"),
    )
)
"""How files begin that are often given in place of others, and what is then said."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120
_SHORT.maxlong = 40


def shown(value: Any) -> str:
    """`repr` of a value for a message, cut short."""
    return _SHORT.repr(value)


def foreign(start: bytes) -> str | None:
    """What a file is, and what to do, where it begins like one that is often in another's place; 512 bytes do."""
    return next((what for pattern, what in _FOREIGN if pattern.match(start)), None)


def near_miss(given: object, known: Iterable[str]) -> str:
    """A sentence for the message about an unknown name, with a space before it, if a known one is like it."""
    names = {name.lower(): name for name in known}
    found = difflib.get_close_matches(str(given).lower(), names, n=1)
    return f" Did you mean {shown(names[found[0]])}?" if found else ""


def read_text(path: Path, advice: str = "", limit: int | None = None) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Args:
        path: the file.
        advice: what to do about a file that cannot be read, for the message.
        limit: most bytes.

    Raises:
        InputError: missing, unreadable, longer than the limit, not UTF-8 or another kind of file (see `foreign`).
    """
    try:
        with path.open("rb") as stream:
            content = stream.read() if limit is None else stream.read(limit + 1)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        reason = error.strerror if isinstance(error, OSError) else error
        name = str(path) if len(str(path)) <= 1024 else shown(str(path))
        raise InputError(f"{name}: cannot be read ({reason}){': ' if advice else ''}{advice}.") from error
    if limit is not None and len(content) > limit:
        raise InputError(f"{path}: is larger than {limit:,} bytes; this is no file of settings.")
    if what := foreign(content[:512]):
        raise InputError(f"{path}: {what}.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 (byte {error.start}): save it as UTF-8.") from error


def parse_json(text: str, where: str, *, line: int | None = None, hint: str = "", unique: bool = False) -> Any:
    """A JSON text's value.

    Args:
        text: the text.
        where: the file, for the message.
        line: number of the file's line that is the text, if it is one.
        hint: what may be the matter with text that is not JSON.
        unique: whether a key that an object has twice is refused; else its last value counts.

    Raises:
        InputError: not JSON, nested too deeply, or with a number of thousands of digits.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise InputError(f"{where}: {shown(key)} is given twice in one object; keep one.")
            found[key] = value
        return found

    try:
        return json.loads(text, object_pairs_hook=once if unique else None)
    except json.JSONDecodeError as error:
        place = f"line {line or error.lineno}, column {error.colno}"
        raise InputError(f"{where}: {place}: not valid JSON ({error.msg}){hint}.") from error
    except (RecursionError, ValueError) as error:  # ValueError: Python's limit on the digits of an integer
        fault = "nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"
        raise InputError(f"{where}:{f' line {line}:' if line else ''} not valid JSON ({fault}).") from error


class _Loader(yaml.SafeLoader):
    """The safe loader, for which 1e-4 is a number; numbers that not everybody reads the same are refused."""

    def _number(self, node: yaml.ScalarNode) -> int | float:
        if re.search("[_:xb]|^[-+]?0[0-9]", node.value):
            raise _fault(node, "is a number that can be read in two ways: write plain digits, or text in quotes")
        number: int | float = self.construct_yaml_int(node) if node.tag == _INT else self.construct_yaml_float(node)
        return number


_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_Loader.add_constructor(_INT, _Loader._number)
_Loader.add_constructor(_FLOAT, _Loader._number)
_Loader.add_implicit_resolver(_INT, re.compile(r"[-+]?0[0-9]+$"), "-+0")
_Loader.add_implicit_resolver(_FLOAT, re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"), "-+.0123456789")


def _fault(node: yaml.ScalarNode, what: str) -> yaml.YAMLError:
    return yaml.YAMLError(f"line {node.start_mark.line + 1}: {shown(node.value)} {what}")


def parse_yaml(text: str, where: str) -> Any:
    """A YAML text's value, of the types of the safe loader.

    Raises:
        InputError: not YAML, nested too deeply, a key that a mapping has twice, a number of which not everybody reads
            the same, or aliases that multiply to more than `MAX_YAML_VALUES` values.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        # Before values are made: merge keys are copied out where they are used.
        if _written_out(node, {}) > MAX_YAML_VALUES:
            raise InputError(f"{where}: aliases multiply to more than {MAX_YAML_VALUES:,} values; write less.")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise InputError(f"{where}: not valid YAML: {error}") from error
    except RecursionError as error:
        raise InputError(f"{where}: not valid YAML: nested too deeply, or an alias within what it names.") from error
    except (ValueError, KeyError, AttributeError, IndexError, TypeError, OverflowError) as error:
        # The loader's own conversions, of "2001-99-99" or of "!!bool maybe".
        raise InputError(f"{where}: not valid YAML: a value is not of its type ({error}).") from error


def _written_out(node: yaml.Node, known: dict[int, int]) -> int:
    """Number of values in a node, with every alias written out.

    Raises:
        RecursionError: nested too deeply, or a node within itself.
        yaml.YAMLError: a key that a mapping has twice.
        ValueError: a text that no file can hold.
    """
    if isinstance(node, yaml.ScalarNode) and SURROGATE.search(node.value):
        raise ValueError("half of a surrogate pair is no character")
    if id(node) not in known:
        known[id(node)] = 1 + sum(_written_out(child, known) for child in _children(node))
    return known[id(node)]


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    elif isinstance(node, yaml.MappingNode):
        keys = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in keys:
                    raise _fault(key, "is given twice in one mapping; keep one")
                keys.add((key.tag, key.value))
            yield key
            yield value
