"""Conversations to token ids and labels: LLaVA-1.5's `vicuna_v1` template and its answer masking.

Liu et al., "Improved Baselines with Visual Instruction Tuning", CVPR 2024. Masking follows the rules of that paper's
training code, so that continual-learning results on LLaVA-1.5 stay comparable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from transformers import PreTrainedTokenizerBase

from llava_cl.data.tokenization import TextEncoder
from llava_cl.errors import InputError

IGNORE_INDEX = -100
IMAGE_MARKER = "<image>"


@dataclass(frozen=True)
class Template:
    """How a conversation is written out as one string.

    Attributes:
        system: text in front of the first turn, followed by one space.
        human, assistant: names of the roles.
        turn_separator: written after a human turn.
        stop: written after an assistant turn; must be the tokenizer's eos token.
    """

    system: str
    human: str
    assistant: str
    turn_separator: str
    stop: str

    @property
    def answer_prefix(self) -> str:
        """What stands between a question and its answer, up to but without the final space."""
        return f"{self.turn_separator}{self.assistant}:"


VICUNA_V1 = Template(
    system=(
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    ),
    human="USER",
    assistant="ASSISTANT",
    turn_separator=" ",
    stop="</s>",
)


class EncodedConversation(TypedDict):
    """`input_ids` and `labels` have one length; `unmatched` says that no mask could be computed."""

    input_ids: list[int]
    labels: list[int]
    unmatched: bool


def encode_conversation(
    conversations: Sequence[Mapping[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    image_token_id: int,
    num_image_tokens: int,
    max_length: int,
    has_image: bool = True,
) -> EncodedConversation:
    """Encode one training conversation; only the answers and the `</s>` that closes each are supervised.

    Every turn with `<image>` gets exactly one image, in front of its text, wherever the markers stood.
    A conversation is unmatched, and then wholly ignored, where answers cannot be told from questions: the last answer
    is empty or missing, a turn contains `</s>`, or the literal unknown token (it counts as padding, as in LLaVA, which
    pads with it), or the role string that announces an answer. As in LLaVA, what comes after `max_length` is not
    checked. An empty answer before a later turn is not supervised and merges with that turn.

    Args:
        conversations: turns `{"from": "human" | "gpt", "value": text}` that alternate; a leading gpt turn is dropped.
        tokenizer: a transformers tokenizer whose eos token is `</s>`.
        image_token_id: id that stands for one image feature; need not be in the vocabulary.
        num_image_tokens: copies of `image_token_id` at each marked turn, for example 576 for a ViT-L/14 at 336 px,
            or `n` times that where the turn shows `n` images.
        max_length: most ids kept, counting each marked turn's image as one; the copies are made after the cut.
        has_image: False leaves `<image>` as plain text.

    Returns:
        `input_ids` and `labels` (-100 = ignored, which includes all image positions) and `unmatched`.

    Raises:
        InputError: roles do not alternate, nothing is left of the conversation, or the tokenizer does not fit.
    """
    encoder = _encoder(tokenizer, VICUNA_V1, image_token_id)
    turns = ordered_turns(conversations)
    text = _serialise([_image_first(turn) for turn in turns] if has_image else turns, VICUNA_V1)
    ids = [encoder.bos_id, *_encode(text, encoder, image_token_id, has_image)]
    supervised, unmatched = _supervised_spans(text, ids, encoder, max_length, has_image)
    labels = [IGNORE_INDEX] * len(ids)
    for start, stop in supervised:
        labels[start:stop] = ids[start:stop]
    ids, labels = ids[:max_length], labels[:max_length]
    images = _image_positions(ids, image_token_id, has_image)
    return EncodedConversation(
        input_ids=expand(ids, images, [image_token_id] * num_image_tokens),
        labels=expand(labels, images, [IGNORE_INDEX] * num_image_tokens),
        unmatched=unmatched,
    )


def encode_prompt(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    image_token_id: int,
    num_image_tokens: int,
    has_image: bool = True,
) -> list[int]:
    """Encode one question for generation: a human turn, its image first, and an assistant turn left open.

    Args:
        text: the question; a marker in it is moved to the front, and added there where it is missing.
        tokenizer, image_token_id, num_image_tokens: as for `encode_conversation`.
        has_image: False puts no image in, and leaves `<image>` as plain text.

    Raises:
        InputError: the tokenizer does not fit.
    """
    encoder = _encoder(tokenizer, VICUNA_V1, image_token_id)
    question = text
    if has_image:
        question = _image_first(text) if IMAGE_MARKER in text else f"{IMAGE_MARKER}\n{text}"
    prompt = _serialise([question, ""], VICUNA_V1)
    ids = [encoder.bos_id, *_encode(prompt, encoder, image_token_id, has_image)]
    images = _image_positions(ids, image_token_id, has_image)
    return expand(ids, images, [image_token_id] * num_image_tokens)


def image_markers(conversations: Sequence[Mapping[str, str]]) -> list[int]:
    """Number of markers in each turn that is kept; however many, they make one image position."""
    return [value.count(IMAGE_MARKER) for value in ordered_turns(conversations)]


def _encoder(tokenizer: PreTrainedTokenizerBase, template: Template, image_token_id: int) -> TextEncoder:
    encoder = TextEncoder(tokenizer, IMAGE_MARKER, image_token_id)
    if encoder.eos != template.stop:
        raise InputError(
            f"the tokenizer's eos token is {encoder.eos!r}, but the conversation template ends every answer with "
            f"{template.stop!r}: use a LLaMA tokenizer, or set its eos_token"
        )
    return encoder


def ordered_turns(conversations: Sequence[Mapping[str, str]]) -> list[str]:
    """Texts of the turns, human first; a leading gpt turn is dropped.

    Raises:
        InputError: roles do not alternate, or nothing is left.
    """
    turns = list(conversations)
    if turns and turns[0]["from"] == "gpt":
        turns = turns[1:]
    if not turns:
        raise InputError("a conversation has no human turn: give it at least one question and its answer")
    for position, turn in enumerate(turns):
        expected = ("human", "gpt")[position % 2]
        if turn["from"] != expected:
            raise InputError(
                f"turn {position + 1} of a conversation is from {turn['from']!r} where {expected!r} is expected: "
                "turns must alternate between 'human' and 'gpt', starting with 'human'"
            )
    return [turn["value"] for turn in turns]


def _image_first(text: str) -> str:
    """`text` with exactly one marker, in front, if it has any."""
    if IMAGE_MARKER not in text:
        return text
    return f"{IMAGE_MARKER}\n{text.replace(IMAGE_MARKER, '').strip()}".strip()


def _serialise(turns: Sequence[str], template: Template) -> str:
    """The conversation as one string; an empty turn is written as its role only, without a closing separator."""
    roles = (template.human, template.assistant)
    closings = (template.turn_separator, template.stop)
    written = [
        f"{roles[i % 2]}: {text}{closings[i % 2]}" if text else f"{roles[i % 2]}:" for i, text in enumerate(turns)
    ]
    return f"{template.system} " + "".join(written)


def _encode(text: str, encoder: TextEncoder, image_token_id: int, has_image: bool) -> list[int]:
    """Ids of `text` without bos, with one `image_token_id` at each marker."""
    if not has_image:
        return encoder(text)
    first, *rest = text.split(IMAGE_MARKER)
    ids = encoder(first)
    for chunk in rest:
        ids.append(image_token_id)
        ids.extend(encoder(chunk))
    return ids


def _supervised_spans(
    text: str, ids: Sequence[int], encoder: TextEncoder, max_length: int, has_image: bool
) -> tuple[list[tuple[int, int]], bool]:
    """Index ranges of the answers in `ids`, and whether they do not add up to the whole conversation.

    A round is a question and its answer up to `</s>`. Rounds are encoded by themselves and their lengths summed; a
    round that does not consist of exactly one question and one answer ends the search.
    """
    prefix = VICUNA_V1.answer_prefix
    spans = []
    cursor = 1  # after bos
    for exchange in text.split(VICUNA_V1.stop):
        parts = exchange.split(prefix + " ")
        if len(parts) != 2:
            break
        # -1 is no image id of any tokenizer; only lengths matter here.
        question = len(_encode(parts[0] + prefix, encoder, -1, has_image))
        whole = len(_encode(exchange, encoder, -1, has_image)) + 1  # and the `</s>`
        spans.append((cursor + question, cursor + whole))
        cursor += whole
    counted = len(ids) - text.count(encoder.unk)
    if cursor < max_length and cursor != counted:
        return [], True
    return spans, False


def _image_positions(ids: Sequence[int], image_token_id: int, has_image: bool) -> list[int]:
    return [position for position, id_ in enumerate(ids) if has_image and id_ == image_token_id]


def expand(values: Sequence[int], positions: Sequence[int], block: Sequence[int]) -> list[int]:
    """`values` with the one at each of `positions` replaced by `block`."""
    expanded: list[int] = []
    start = 0
    for position in positions:
        expanded.extend(values[start:position])
        expanded.extend(block)
        start = position + 1
    return expanded + list(values[start:])
