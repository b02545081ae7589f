"""Files of other kinds that are often given in place of JSON or YAML are told by what they are."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from pathlib import Path

import pytest

from llava_cl.config import load_config
from llava_cl.data import load_caption_references, load_question_records, load_train_records
from llava_cl.errors import InputError
from llava_cl.parsing import foreign, read_text


def _zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("train.json", "[]")
    return stream.getvalue()


def _tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("train.json"))
    return stream.getvalue()


POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258d\nsize 1\n"
)
FOREIGN = {
    "pointer": (POINTER, "git lfs pull"),
    "page": (b"\r\n <!DOCTYPE html>\n<html>", "a web page"),
    "page_in_capitals": (b"<HTML><HEAD>", "a web page"),
    "gzip": (gzip.compress(b"[]"), "unpack"),
    "bzip2": (bz2.compress(b"[]"), "unpack"),
    "xz": (lzma.compress(b"[]"), "unpack"),
    "zstd": (b"\x28\xb5\x2f\xfd\x04", "unpack"),
    "zip": (_zip(), "unpack"),
    "tar": (_tar(), "unpack"),
    "parquet": (b"PAR1\x15\x04", "Parquet"),
    "arrow": (b"ARROW1\0\0", "Arrow"),
    "utf_16": ("[1]".encode("utf-16"), "save it as UTF-8"),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("load", [load_train_records, load_question_records, load_caption_references, load_config])
def test_what_is_in_place_of_a_file_is_told_in_one_message(kind, load, tmp_path: Path) -> None:
    content, said = FOREIGN[kind]
    file = tmp_path / "file.json"
    file.write_bytes(content)
    with pytest.raises(InputError) as error:
        load(file)
    assert len(error.value.problems) == 1
    assert error.value.problems[0].startswith(f"{file}: is ")
    assert said in error.value.problems[0]


@pytest.mark.parametrize(
    "content", [b"[1]", b'{"version": "https://git-lfs"}', b"version: 3\n", b"\xef\xbb\xbfBZ", b"", b"PA"]
)
def test_text_is_no_other_kind_of_file(content: bytes, tmp_path: Path) -> None:
    assert foreign(content) is None
    (tmp_path / "file").write_bytes(content)
    assert read_text(tmp_path / "file") == content.decode("utf-8-sig")
