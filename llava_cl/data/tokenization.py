"""Text to token ids piece by piece, the way the original LLaMA tokenizer does it, with any tokenizer.

LLaMA's own tokenizer encodes every stretch of text between special tokens by itself and puts a "dummy" space in front
of each. Tokenizers that transformers builds from the same vocabulary differ in small ways: some add no dummy space,
some add it only to the first stretch or where the text has no space yet, and some merge runs of spaces too early.
Those ids are not what LLaVA was trained on, so pieces are encoded from the vocabulary itself wherever it is LLaMA's.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase

from llava_cl.errors import InputError

SPACE = "\u2581"  # how SentencePiece vocabularies write a space


class TextEncoder:
    """Encodes text that stands between images; special tokens written out in it are recognised, images are not.

    Args:
        tokenizer: a transformers tokenizer with bos, eos and unk tokens.
        image_marker: stays ordinary text even where the tokenizer has a token of that name.
        image_token_id: id that no text may produce.

    Raises:
        InputError: the tokenizer lacks one of the three tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_marker: str, image_token_id: int) -> None:
        missing = [name for name in ("bos", "eos", "unk") if getattr(tokenizer, f"{name}_token_id") is None]
        if missing:
            raise InputError(
                f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no "
                f"{' and no '.join(missing)} token, which LLaVA's template needs: set it in the tokenizer's files"
            )
        added = {token.content: id_ for id_, token in tokenizer.added_tokens_decoder.items()}
        for name in ("bos", "eos", "unk"):
            added[getattr(tokenizer, f"{name}_token")] = getattr(tokenizer, f"{name}_token_id")
        image_ids = {image_token_id, added.get(image_marker, image_token_id)}
        self._image_ids = image_ids
        self._image_tokens = sorted({image_marker, *(text for text, id_ in added.items() if id_ in image_ids)})
        self._special = {text: id_ for text, id_ in added.items() if text not in self._image_tokens}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")").split
        self._encode_piece = _piece_encoder(tokenizer)
        self.bos_id: int = tokenizer.bos_token_id
        self.eos: str = tokenizer.eos_token
        self.unk: str = tokenizer.unk_token

    def __call__(self, text: str) -> list[int]:
        """Token ids of `text`, without a leading bos."""
        ids: list[int] = []
        for part in self._split(text):
            if part in self._special:
                ids.append(self._special[part])
            elif part:
                ids.extend(self._ordinary(part))
        return ids

    def _ordinary(self, text: str) -> list[int]:
        """Ids of text without special tokens; a tokenizer that would see images in it gets each in two parts."""
        ids = self._encode_piece(text)
        if self._image_ids.isdisjoint(ids):
            return ids
        for token in self._image_tokens:
            if token in text:
                first, *rest = text.split(token)
                pieces = [first, *(token[1:] + part for part in rest)]
                ends = [token[:1]] * len(rest) + [""]
                return [id_ for piece, end in zip(pieces, ends, strict=True) for id_ in self._ordinary(piece + end)]
        raise InputError(f"the text {text!r} has a token that stands for images: take the character out of it")


@functools.lru_cache(maxsize=4)
def _piece_encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], list[int]]:
    """The best available encoder of one stretch of text: SentencePiece model, its vocabulary, or the tokenizer."""
    model = _sentencepiece_model(tokenizer)
    if model is not None:
        return model.encode
    bpe = _llama_bpe(tokenizer)
    # No functions made here: encoders are handed to the processes that read data, which can be started afresh.
    if bpe is not None:
        return functools.partial(_by_merges, bpe)
    return functools.partial(_by_tokenizer, tokenizer)


def _by_merges(bpe: BPE, text: str) -> list[int]:
    return [token.id for token in bpe.tokenize(SPACE + text.replace(" ", SPACE))]


def _by_tokenizer(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _sentencepiece_model(tokenizer: PreTrainedTokenizerBase) -> sentencepiece.SentencePieceProcessor | None:
    """The SentencePiece model the tokenizer was built from, if it is at hand and its ids are the tokenizer's."""
    model = getattr(tokenizer, "sp_model", None)
    path = getattr(tokenizer, "vocab_file", None)
    if model is None and path is not None and ".model" in Path(path).suffixes and Path(path).is_file():
        try:
            model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except RuntimeError:  # a vocabulary of another library that shares the file name
            return None
    if model is None:
        return None
    own = (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    return model if own == (model.unk_id(), model.bos_id(), model.eos_id()) else None


def _llama_bpe(tokenizer: PreTrainedTokenizerBase) -> BPE | None:
    """The merges of a LLaMA-like tokenizer, those of runs of spaces put last, as in the SentencePiece model."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer) or not isinstance(backend.model, BPE):
        return None
    model = json.loads(backend.to_str())["model"]
    if not model["byte_fallback"] or SPACE not in model["vocab"]:
        return None
    merges: list[tuple[str, str]] = [tuple(merge) for merge in model["merges"]]
    spaces = [merge for merge in merges if not "".join(merge).strip(SPACE)]
    words = [merge for merge in merges if "".join(merge).strip(SPACE)]
    spaces.sort(key=lambda merge: (len(merge[0]), len(merge[1])), reverse=True)
    return BPE(
        vocab=model["vocab"], merges=words + spaces, unk_token=model["unk_token"], fuse_unk=True, byte_fallback=True
    )
