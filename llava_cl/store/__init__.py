"""What a run keeps on disk: atomic files, hashes, tensors, and the run directory with its manifests."""

from llava_cl.store.files import (
    append_jsonl,
    atomic_path,
    file_hash,
    read_json,
    read_jsonl,
    write_json,
    write_jsonl,
    write_text,
    writing,
)
from llava_cl.store.run_directory import RunDirectory
from llava_cl.store.stage_directory import StageDirectory
from llava_cl.store.tensors import TensorFile, load_tensors, load_tensors_metadata, open_tensors, save_tensors

__all__ = [
    "RunDirectory",
    "StageDirectory",
    "TensorFile",
    "append_jsonl",
    "atomic_path",
    "file_hash",
    "load_tensors",
    "load_tensors_metadata",
    "open_tensors",
    "read_json",
    "read_jsonl",
    "save_tensors",
    "write_json",
    "write_jsonl",
    "write_text",
    "writing",
]
