"""What the package never does: unpickle, run text as code or by a shell, trust a checkpoint's code, go online."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import llava_cl

ROOT = Path(llava_cl.__file__).parents[1]
PACKAGE = ROOT / "llava_cl"
_FORBIDDEN = {
    "eval": "runs text as code",
    "exec": "runs text as code",
    "os.system": "goes through a shell",
    "os.popen": "goes through a shell",
    "subprocess.getoutput": "goes through a shell",
    "pickle.load": "unpickles",
    "pickle.loads": "unpickles",
    "yaml.load": "makes objects of any class",
    "yaml.unsafe_load": "makes objects of any class",
    "yaml.full_load": "makes objects of any class",
    "yaml.Loader": "makes objects of any class",
    "yaml.UnsafeLoader": "makes objects of any class",
    "yaml.FullLoader": "makes objects of any class",
}
_PICKLERS = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def _name(node: ast.expr) -> str:
    """A dotted name, such as `torch.load`; of other expressions the last attribute, such as `.load`."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{_name(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def _is_true(call: ast.Call, argument: str) -> bool:
    values = [keyword.value for keyword in call.keywords if keyword.arg == argument]
    return len(values) == 1 and isinstance(values[0], ast.Constant) and values[0].value is True


def _faults(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names}
            module = node.module if isinstance(node, ast.ImportFrom) else None
            if _PICKLERS & {module, *names} and (module, names) != ("pickle", {"UnpicklingError"}):
                yield f"{node.lineno}: imports a pickler"
        elif isinstance(node, ast.Attribute | ast.Name) and _name(node) in _FORBIDDEN:
            yield f"{node.lineno}: {_name(node)} {_FORBIDDEN[_name(node)]}"
        elif isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "shell"):
            yield f"{node.value.lineno}: {node.arg}"
        elif isinstance(node, ast.Call):
            name = _name(node.func)
            if name.endswith(".from_pretrained") and not _is_true(node, "local_files_only"):
                yield f"{node.lineno}: {name} without local_files_only=True"
            if name == "torch.load" and not _is_true(node, "weights_only"):
                yield f"{node.lineno}: {name} without weights_only=True"


def test_the_package_does_nothing_of_that() -> None:
    found = {str(file): list(_faults(file.read_text())) for file in sorted(PACKAGE.rglob("*.py"))}
    assert len(found) > 60
    assert {file: faults for file, faults in found.items() if faults} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "torch.load('x', weights_only=False)",
        "torch.load('x', weights_only=flag)",
        "AutoModel.from_pretrained('x')",
        "AutoModel.from_pretrained('x', local_files_only=True, trust_remote_code=True)",
        "subprocess.run('ls', shell=True)",
        "os.system('ls')",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "f = eval",
    ],
)
def test_each_of_that_is_found(source: str) -> None:
    assert list(_faults(source))


_OFFLINE_RUN = """
import ipaddress, sys
sys.path.insert(0, {tests!r})

def watch(event, arguments):
    if event == "socket.getaddrinfo" and arguments[0] not in (None, "localhost", ""):
        host = arguments[0].decode() if isinstance(arguments[0], bytes) else arguments[0]
        try:
            allowed = ipaddress.ip_address(host).is_loopback
        except ValueError:
            allowed = False
        if not allowed:
            print("went online:", arguments, file=sys.stderr, flush=True)
            raise SystemExit(77)
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        if not ipaddress.ip_address(arguments[1][0]).is_loopback:
            print("went online:", arguments, file=sys.stderr, flush=True)
            raise SystemExit(77)

sys.addaudithook(watch)
from pathlib import Path
from runs import run_here, tiny_config
from tiny import run_content
from llava_cl.pipeline.export import export
folder = Path({folder!r})
config = tiny_config(folder, run_content(folder))
run_here(config, folder / "run", until=1)
export(folder / "run", 1, folder / "out", "hf")
if {online!r}:
    import socket
    socket.getaddrinfo("example.org", 443)
"""


@pytest.mark.e2e
@pytest.mark.parametrize("online", [False, True])
def test_a_run_and_an_export_stay_offline(online: bool, tmp_path: Path) -> None:
    program = _OFFLINE_RUN.format(tests=str(ROOT / "tests"), folder=str(tmp_path), online=online)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == (77 if online else 0), done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()
