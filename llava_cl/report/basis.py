"""How much of each layer's input space and energy the bases take, as one small map per kind of layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import NamedTuple

from llava_cl.report.document import panel
from llava_cl.report.schema import LayerBasis, StageCost
from llava_cl.report.svg import fill_map


class LayerName(NamedTuple):
    """A dotted module name, split at its last numeric part: `stack.block.kind`."""

    stack: tuple[str, ...]
    block: int
    kind: str


def split_name(name: str) -> LayerName:
    """`model.layers.3.self_attn.q_proj` -> stack `(model, layers)`, block 3, kind `self_attn.q_proj`."""
    parts = name.split(".")
    position = next((index for index in reversed(range(len(parts))) if parts[index].isdecimal()), None)
    if position is None:
        return LayerName((), 0, name)
    return LayerName(tuple(parts[:position]), int(parts[position]), ".".join(parts[position + 1 :]))


def basis_panels(stages: Sequence[StageCost], share: Callable[[LayerBasis], float | None], what: str) -> list[str]:
    """One map per kind of layer: blocks across, stages down, deeper where more is taken.

    Args:
        stages: what each stage left; those without bases are left out.
        share: the value of a layer, 0 to 1, or None where it is not known.
        what: what the value is, for screen readers.
    """
    groups: dict[tuple[tuple[str, ...], str], dict[int, dict[int, float]]] = {}
    for stage in stages:
        for name, layer in stage.basis.items():
            value = share(layer)
            if value is not None:
                stack, block, kind = split_name(name)
                groups.setdefault((stack, kind), {}).setdefault(stage.stage, {})[block] = value
    prefixes = _short_prefixes(sorted({stack for stack, _ in groups}))
    drawn = []
    for (stack, kind), fills in groups.items():
        blocks = sorted({block for row in fills.values() for block in row})
        rows = [(str(number), [row.get(block) for block in blocks]) for number, row in fills.items()]
        title = " ".join(part for part in (prefixes[stack], kind) if part)
        last = [share for share in rows[-1][1] if share is not None]
        chart = fill_map(rows, (f"block {blocks[0]}", str(blocks[-1])), f"{title}: {what} of each block by stage")
        drawn.append(panel(title, f"{100 * sum(last) / len(last):.1f}%", chart))
    return drawn


def _short_prefixes(stacks: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """What tells the stacks apart: their names less the parts that all of them begin and end with."""
    if len(stacks) < 2:
        return dict.fromkeys(stacks, "")
    front = _shared(stacks)
    back = _shared([tuple(reversed(stack[front:])) for stack in stacks])
    return {stack: ".".join(stack[front : len(stack) - back]) for stack in stacks}


def _shared(stacks: Sequence[tuple[str, ...]]) -> int:
    return len(list(takewhile(lambda parts: len(set(parts)) == 1, zip(*stacks, strict=False))))
