"""The one place that decides the types of settings, and says in the user's words what is wrong with them.

Types are strict: a boolean is no number and no text, a text no number, a number no text or path. A whole number may
stand for a float, and null for a mapping or list with nothing in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Strict, ValidationError, model_validator

from llava_cl.errors import InputError
from llava_cl.parsing import near_miss, shown

_Item = TypeVar("_Item")
Many = Annotated[tuple[_Item, ...], Strict(False)]
"""A list; the types of its items are strict."""

_TYPES = {
    **dict.fromkeys(("string_type", "invalid_key"), "text"),
    **dict.fromkeys(("int_type", "int_from_float"), "a whole number"),
    **dict.fromkeys(("dict_type", "model_type"), "a mapping of keys to values"),
    "float_type": "a number",
    "bool_type": "true or false",
    "path_type": "a path",
    "tuple_type": "a list",
    "literal_error": "{expected}",
}
"""What a value should be instead, by the type of pydantic's error."""
_LIMITS = {
    "finite_number": "be finite",
    "multiple_of": "be a whole number",
    "too_short": "have at least {min_length} entries",
    "too_long": "have at most {max_length} entries",
    "string_too_long": "have at most {max_length} characters",
    "string_pattern_mismatch": "begin with a letter or digit and hold letters, digits and ._- alone",
    "greater_than": "be more than {gt:.12g}",
    "greater_than_equal": "be at least {ge:.12g}",
    "less_than": "be less than {lt:.12g}",
    "less_than_equal": "be at most {le:.12g}",
}
"""What a value of the right type must do."""


class Section(BaseModel):
    """Base of everything that is set: unknown keys are errors, types are strict."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, content: Any) -> Any:
        """Null for a mapping or list, and for one within a mapping, is as if its key were not there."""
        if not isinstance(content, Mapping):
            return content
        kept = dict(content)
        for key, field in cls.model_fields.items():
            value = kept.get(key)
            if value is None and isinstance(field.default, Mapping | tuple | BaseModel):
                kept.pop(key, None)
            elif isinstance(value, Mapping) and any(
                get_origin(inner) is dict or any(_models(inner)) for inner in get_args(field.annotation)
            ):
                kept[key] = {name: inner for name, inner in value.items() if inner is not None}
        return kept


_Section = TypeVar("_Section", bound=Section)


def checked(model: type[_Section], content: Any, place: Callable[[str], str]) -> _Section:
    """The settings that `content` holds.

    Args:
        model: what they are.
        content: as read from a file.
        place: dotted key -> where that is, for messages; "" is the whole.

    Raises:
        InputError: one problem for each wrong key.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        found: dict[tuple[Any, ...], list[Any]] = {}
        for item in error.errors(include_url=False):
            found.setdefault(_key(item, content), []).append(item)
        # Where a list is right and one of its items wrong, other types than a list are not what is meant.
        inner = [key for key in found if not any(key == other[: len(key)] != other for other in found)]
        raise InputError(
            *(f"{place('.'.join(map(_short, key)))}: {_reason(model, key, found[key])}" for key in inner)
        ) from error


def _key(item: Any, content: Any) -> tuple[Any, ...]:
    """Where in the content an error is; pydantic also names the kinds of values that it tried."""
    key, place = [], item["loc"]
    wrong_key = item["type"] == "invalid_key" or "[key]" in place
    for part in place[: -2 if "[key]" in place else -1] if wrong_key else place:
        if isinstance(content, Mapping) and (part in content or (item["type"] == "missing" and part == place[-1])):
            content = content.get(part)
        elif isinstance(content, list | tuple) and isinstance(part, int):
            content = content[part] if part < len(content) else None
        else:
            continue
        key.append(part)
    return (*key, f"{_written(item['input'])} (a key)") if wrong_key else tuple(key)


def _reason(model: type[BaseModel], key: tuple[Any, ...], items: list[Any]) -> str:
    """What is wrong with one value, of which several types may have been tried."""
    first = next((item for item in items if item["type"] in _LIMITS), items[0])
    kind, value = first["type"], first["input"]
    if kind == "missing":
        return "is missing."
    if kind == "extra_forbidden":
        return f"unknown key.{near_miss(key[-1], _known(model, first['loc']))}"
    if kind == "value_error":
        return str(first["ctx"]["error"])
    if kind in _LIMITS:
        return f"must {_LIMITS[kind].format(**first.get('ctx', {}))}, is {_written(value)}."
    names = dict.fromkeys(str(_TYPES.get(item["type"], item["msg"])).format(**item.get("ctx", {})) for item in items)
    advice = near_miss(value, re.findall("'([^']*)'", " ".join(names)))
    if names.keys() & {"text", "a path"} and not isinstance(value, list | dict):
        advice = " Put it in quotes if it is meant as text."
    elif isinstance(value, bool):
        advice = " In YAML yes, no, on and off are booleans, too."
    return f"must be {' or '.join(names)}, is {_written(value)}.{advice}"


def _known(model: type[BaseModel], place: tuple[Any, ...]) -> list[str]:
    """The keys that there could be beside the last one of pydantic's place of an error."""
    models = [model]
    for part in place[:-1]:
        tried = [each for each in models if each.__name__ == part]
        fields = [each.model_fields[part] for each in models if part in each.model_fields]
        models = tried or [inner for field in fields for inner in _models(field.annotation)] or models
    return [key for each in models for key in each.model_fields]


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    else:
        for inner in get_args(annotation):
            yield from _models(inner)


def _written(value: Any) -> str:
    """A value as it is written in a file of settings."""
    return json.dumps(value) if value is None or isinstance(value, bool) else shown(value)


def _short(part: Any) -> str:
    return str(part) if len(str(part)) <= 100 else shown(part)
