"""Damaged files made from good ones: values of wrong types and sizes, keys lost, doubled or unknown, bytes changed.

`fuzz` draws their seeds with hypothesis, the same ones in every run.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from llava_cl.errors import InputError

_BRACKETS = "[" * 100_000 + "]" * 100_000
_RAW = {'"@digits@"': "9" * 5000, '"@deep@"': _BRACKETS, '"@deeper@"': '{"a":' * 50_000 + "1" + "}" * 50_000}
"""What `json.dumps` cannot write; the key is written in its place."""

_NESTED: Any = 0
for _ in range(50):
    _NESTED = [_NESTED]

# fmt: off
JUNK: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 10**400, -(10**30), 1.5, 1e-300, float("nan"), float("inf"), float("-inf"),
    "", " ", "x", "0", "\0", "\ud800", "\udc00\ud800", "\x1b[31m\x07", "\u202e", "\u2028", "é日本",
    "<image>", "<image><image>", "../../etc/passwd", "/etc/passwd", "a/../../b", "~no-such-user/x", "2001-99-99",
    [], {}, [[]], [None], [""], ["a.png"], ["a.png", "b.png"], {"": None}, {"from": "human"}, {"a": {"b": [1]}},
    "a" * 5000, "/" * 3000, ["x"] * 500, {str(n): n for n in range(300)}, _NESTED, "@digits@", "@deep@", "@deeper@",
)
_BYTES = (
    b"\x00", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xef\xbb\xbf", b'"', b"{", b"[", b",", b"\\u", b"\n", b"-", b"1e999",
)
# fmt: on


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every value below a JSON value, as its container and its key in it."""
    keys: list[Any] = []
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        keys = list(range(len(value)))
    return [place for key in keys for place in ((value, key), *_places(value[key]))]


def mutate(value: Any, choice: random.Random, times: int, junk: tuple[Any, ...] = JUNK) -> Any:
    """A copy of a JSON value with some of its parts replaced, removed, doubled, renamed, swapped or wrapped."""
    value = copy.deepcopy(value)
    for _ in range(times):
        places = _places(value)
        if not places:
            return choice.choice(junk)
        holder, key = choice.choice(places)
        other, other_key = choice.choice(places)
        match choice.randrange(8):
            case 0 | 1 | 2:
                holder[key] = copy.deepcopy(choice.choice(junk))
            case 3:
                del holder[key]
            case 4:
                part = copy.deepcopy(holder[key])
                if isinstance(holder, list):
                    holder.insert(choice.randrange(len(holder) + 1), part)
                else:
                    holder[choice.choice(["unknown", "", "id", "image", str(key).upper()])] = part
            case 5:
                holder[key] = copy.deepcopy(other[other_key])
            case 6:
                holder[key] = choice.choice([[holder[key]], {"value": holder[key]}])
            case 7 if isinstance(holder, dict):
                holder[choice.choice(["unknown", "\0", "a" * 3000, f"{key} "])] = holder.pop(key)
    return value


def json_text(value: Any, choice: random.Random) -> str:
    """JSON of a value, at times with non-ASCII letters as they are, and now and then a key given twice."""
    text = json.dumps(value, ensure_ascii=choice.random() < 0.7, indent=choice.choice([None, 1]))
    for name, raw in _RAW.items():
        text = text.replace(name, raw, 1).replace(name, "0")
    if choice.random() < 0.1 and (found := text.find('": ', choice.randrange(len(text)))) > 0:
        begin = text.rfind('"', 0, found)
        text = f"{text[:begin]}{text[begin : found + 3]}null, {text[begin:]}"
    return text


def damage(content: bytes, choice: random.Random) -> bytes:
    """Bytes cut short, changed, removed, put in, doubled, or of another encoding."""
    at = choice.randrange(len(content) + 1)
    end = min(len(content), at + choice.randrange(1, 20))
    match choice.randrange(7):
        case 0:
            return content[:at]
        case 1 if at < len(content):
            return content[:at] + bytes([content[at] ^ (1 << choice.randrange(8))]) + content[at + 1 :]
        case 2:
            return content[:at] + content[end:]
        case 3:
            return content[:at] + content[at:end] * 2 + content[end:]
        case 4 if len(content) < 10_000:
            return content.decode("utf-8", "replace").encode(choice.choice(["utf-16", "utf-8-sig"]))
        case _:
            return content[:at] + choice.choice(_BYTES) + content[at:]


def fuzz(examples: int, make: Callable[[random.Random], bytes], check: Callable[[bytes], None]) -> None:
    """Lets `check` see `examples` files of `make`, most of which differ."""
    seen: list[int] = []

    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=True, note_method_calls=False))
    def run(choice: random.Random) -> None:
        content = make(choice)
        seen.append(hash(content))
        check(content)

    run()
    assert len(seen) >= examples
    assert len(set(seen)) > 0.8 * examples


def accepted(load: Callable[[], Any], *named: Path) -> Any:
    """What is loaded, or None if it is refused in short sentences that each name a file."""
    try:
        return load()
    except InputError as error:
        assert error.problems
        for problem in error.problems:
            assert any(str(file) in problem for file in named), problem[:300]
            assert len(problem) < 2000, problem[:300]
    return None
