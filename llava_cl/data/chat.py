"""Chat formats: how the turns of a record become token ids and labels for one kind of model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from llava_cl.data.conversation import (
    IGNORE_INDEX,
    IMAGE_MARKER,
    EncodedConversation,
    encode_conversation,
    encode_prompt,
    expand,
    ordered_turns,
)
from llava_cl.data.tokenization import TextEncoder
from llava_cl.errors import InputError

Turns = Sequence[Mapping[str, str]]


class ChatFormat(Protocol):
    """Encodes conversations and questions for one model.

    Attributes:
        image_token_id: id that stands for one image feature.
        num_image_tokens: features of one image.
    """

    image_token_id: int
    num_image_tokens: int

    def conversation(self, turns: Turns, *, max_length: int, images_per_turn: int) -> EncodedConversation:
        """A training conversation, at most `max_length` ids with each turn's images counted as one.

        `images_per_turn` is the number of images that each turn with `<image>` shows, 0 = the marker is plain text.
        """

    def prompt(self, text: str, *, images: int) -> list[int]:
        """A question after `images` images, ready for the answer to be generated."""


class VicunaChat:
    """LLaVA-1.5's format, see `encode_conversation`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_token_id: int, num_image_tokens: int) -> None:
        self._tokenizer = tokenizer
        self.image_token_id = image_token_id
        self.num_image_tokens = num_image_tokens

    def conversation(self, turns: Turns, *, max_length: int, images_per_turn: int) -> EncodedConversation:
        """As `ChatFormat.conversation`."""
        return encode_conversation(
            turns,
            self._tokenizer,
            image_token_id=self.image_token_id,
            num_image_tokens=self.num_image_tokens * images_per_turn,
            max_length=max_length,
            has_image=images_per_turn > 0,
        )

    def prompt(self, text: str, *, images: int) -> list[int]:
        """As `ChatFormat.prompt`."""
        return encode_prompt(
            text,
            self._tokenizer,
            image_token_id=self.image_token_id,
            num_image_tokens=self.num_image_tokens * images,
            has_image=images > 0,
        )


@dataclass(frozen=True)
class TurnTemplate:
    """A format whose turns are closed by the eos token.

    Attributes:
        human, assistant: what announces a turn; a space follows unless an image does.
        gap: between the end of a turn and the next.
        image_start, image_end: around the tokens of each image.
    """

    human: str
    assistant: str
    gap: str
    image_start: str
    image_end: str


SMOLVLM = TurnTemplate(
    "User:", "Assistant:", "\n", "<fake_token_around_image><global-img>", "<fake_token_around_image>"
)
"""SmolVLM's chat template for images that are not split into tiles."""


class TurnChat:
    """A format of `TurnTemplate`: every answer and the eos token that closes it are supervised."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, image_token_id: int, num_image_tokens: int, template: TurnTemplate
    ) -> None:
        self._encode = TextEncoder(tokenizer, IMAGE_MARKER, image_token_id)
        self._template = template
        self.image_token_id = image_token_id
        self.num_image_tokens = num_image_tokens

    def conversation(self, turns: Turns, *, max_length: int, images_per_turn: int) -> EncodedConversation:
        """As `ChatFormat.conversation`; a conversation without an answer is unmatched."""
        ids, labels = [self._encode.bos_id], [IGNORE_INDEX]
        images: list[int] = []
        template = self._template
        between = ""
        for position, text in enumerate(ordered_turns(turns)):
            if position % 2:
                question = self._encode(f"{between}{template.assistant}")
                answer = self._encode(f" {text}{self._encode.eos}")
                ids += question + answer
                labels += [IGNORE_INDEX] * len(question) + answer
                between = template.gap
                continue
            between += template.human
            if images_per_turn and IMAGE_MARKER in text:
                text = text.replace(IMAGE_MARKER, "").strip()
                ids += self._encode(between + template.image_start)
                images.append(len(ids))
                ids.append(self.image_token_id)
                labels += [IGNORE_INDEX] * (len(ids) - len(labels))
                between = template.image_end + text
            else:
                between += f" {text}"
            between += self._encode.eos + template.gap
        unmatched = all(label == IGNORE_INDEX for label in labels)
        ids, labels = ids[:max_length], labels[:max_length]
        images = [position for position in images if position < max_length]
        block = self._images(images_per_turn)
        return EncodedConversation(
            input_ids=expand(ids, images, block),
            labels=expand(labels, images, [IGNORE_INDEX] * len(block)),
            unmatched=unmatched,
        )

    def prompt(self, text: str, *, images: int) -> list[int]:
        """As `ChatFormat.prompt`."""
        template = self._template
        ids = [self._encode.bos_id]
        if images:
            ids += self._encode(template.human + template.image_start)
            ids += self._images(images)
            asked = template.image_end + text.replace(IMAGE_MARKER, "").strip()
        else:
            asked = f"{template.human} {text}"
        return ids + self._encode(f"{asked}{self._encode.eos}{template.gap}{template.assistant}")

    def _images(self, count: int) -> list[int]:
        """The ids of `count` images, without what stands before the first and after the last."""
        between = self._encode(self._template.image_end + self._template.image_start)
        one = [self.image_token_id] * self.num_image_tokens
        return [id_ for number in range(count) for id_ in ([*between, *one] if number else one)]


def chat_format(
    name: str, tokenizer: PreTrainedTokenizerBase, image_token_id: int, num_image_tokens: int
) -> ChatFormat:
    """The format of a name: "vicuna_v1" or "smolvlm".

    Raises:
        InputError: an unknown name, or a tokenizer that does not fit.
    """
    if name == "vicuna_v1":
        return VicunaChat(tokenizer, image_token_id, num_image_tokens)
    if name == "smolvlm":
        return TurnChat(tokenizer, image_token_id, num_image_tokens, SMOLVLM)
    raise InputError(f"chat format '{name}' is none of vicuna_v1, smolvlm.")
