"""Tokenizers for the data tests: LLaMA's scheme on a real vocabulary, in every usual build, and a word-level one."""

import importlib.util
import shutil
from pathlib import Path

import pytest
from data_vocabulary import WORD_ID
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from llava_cl.data.conversation import VICUNA_V1

LLAMA_BUILDS = (
    "folder",
    "legacy",
    "not_legacy",
    "slow_asked_for",
    "vocabulary_file",
    "auto",
    "auto_slow",
    "saved",
    "auto_saved",
    "bos_and_pad_added",
    "image_token_added",
)


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a LLaMA-style `tokenizer.model`."""
    package = importlib.util.find_spec("mistral_common")
    if package is None or package.origin is None:
        pytest.fail("the package mistral-common is missing: pip install -e '.[dev]' brings the test vocabulary")
    source = Path(package.origin).parent / "data" / "tokenizer.model.v1"
    if not source.is_file():
        pytest.fail(f"{source} is missing: install mistral-common 1.13.1, whose wheel holds the test vocabulary")
    folder = tmp_path_factory.mktemp("vocabulary")
    shutil.copy(source, folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="session")
def llama(vocabulary: Path) -> LlamaTokenizer:
    return LlamaTokenizer.from_pretrained(vocabulary)


@pytest.fixture(scope="session", params=LLAMA_BUILDS)
def any_llama(request: pytest.FixtureRequest, vocabulary: Path, tmp_path_factory: pytest.TempPathFactory):
    """The same vocabulary as each way of building a tokenizer presents it."""

    def saved(loader: type) -> Path:
        folder = tmp_path_factory.mktemp("saved")
        loader.from_pretrained(vocabulary).save_pretrained(folder)
        assert not (folder / "tokenizer.model").exists()  # else this would test nothing new
        return folder

    def image_token_added():
        tokenizer = LlamaTokenizer.from_pretrained(saved(LlamaTokenizer))
        tokenizer.add_tokens(["<image>", "<pad>"], special_tokens=True)
        tokenizer.pad_token = "<pad>"
        return tokenizer

    builds = {
        "folder": lambda: LlamaTokenizer.from_pretrained(vocabulary),
        "legacy": lambda: LlamaTokenizer.from_pretrained(vocabulary, legacy=True),
        "not_legacy": lambda: LlamaTokenizer.from_pretrained(vocabulary, legacy=False),
        "slow_asked_for": lambda: LlamaTokenizer.from_pretrained(vocabulary, use_fast=False),
        "vocabulary_file": lambda: LlamaTokenizer(vocab_file=str(vocabulary / "tokenizer.model")),
        "auto": lambda: AutoTokenizer.from_pretrained(vocabulary),
        "auto_slow": lambda: AutoTokenizer.from_pretrained(vocabulary, use_fast=False),
        "saved": lambda: LlamaTokenizer.from_pretrained(saved(LlamaTokenizer)),
        "auto_saved": lambda: AutoTokenizer.from_pretrained(saved(AutoTokenizer)),
        "bos_and_pad_added": lambda: LlamaTokenizer.from_pretrained(
            vocabulary, add_bos_token=True, pad_token="<unk>", padding_side="right"
        ),
        "image_token_added": image_token_added,
    }
    return builds[request.param]()


@pytest.fixture(scope="session")
def word_level() -> PreTrainedTokenizerFast:
    """A word-level vocabulary in which the system prompt is one added token and spaces give no token."""
    backend = Tokenizer(WordLevel(WORD_ID, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens([VICUNA_V1.system])
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    return tokenizer
