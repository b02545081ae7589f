"""`llava-cl export --push` against a hub of our own on this machine."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from llava_cl import cli
from runs import run_here, tiny_config
from tiny import run_content

TOKEN = "hf_of-the-test"
NO_REPOSITORY = {"error": "Repository not found"}


class Hub:
    """What the stub was sent, and what it holds."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.address = ""

    def answer(self, path: str, token: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """Status and JSON of one request, as a hub gives them."""
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials"}
        if path == "/api/whoami-v2":
            return 200, {"name": "someone", "type": "user", "auth": {"accessToken": {"role": "write"}}}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
            self.repositories[name] = {}
            self.private[name] = asked.get("visibility") == "private" or asked.get("private") is True
            return 200, {"url": f"{self.address}/{name}", "name": name, "id": "1"}
        if not path.startswith("/api/models/"):
            return 404, {"error": "unknown"}
        owner, name, *rest = path.removeprefix("/api/models/").split("/")
        held = self.repositories.get(f"{owner}/{name}")
        if held is None:
            return 404, NO_REPOSITORY
        if rest[:1] == ["preupload"]:
            files = json.loads(body)["files"]
            return 200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        if rest[:1] == ["commit"]:
            for entry in map(json.loads, body.splitlines()):
                if entry["key"] == "file":
                    held[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            address = f"{self.address}/{owner}/{name}/commit/{'0' * 40}"
            return 200, {"success": True, "commitUrl": address, "commitOid": "0" * 40}
        siblings = [{"rfilename": file} for file in held]
        return 200, {"id": f"{owner}/{name}", "sha": "0" * 40, "siblings": siblings, "private": True, "tags": []}


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub that listens on the loopback."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            status, content = hub.answer(path, self.headers.get("Authorization", ""), body)
            self.send_response(status)
            if content is NO_REPOSITORY:
                self.send_header("X-Error-Code", "RepoNotFound")
            text = json.dumps(content).encode()
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(text)

        do_GET = do_POST = do_HEAD = do_PUT = _serve

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one task."""
    folder = tmp_path_factory.mktemp("push")
    run_here(tiny_config(folder, run_content(tiny_run)), folder / "run", until=1)
    return folder / "run"


def push(run: Path, to: Path, hub: Hub, name: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    """Runs the command in a process of its own, as huggingface_hub reads its environment once."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(to.parent / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    options = [str(run), "--stage", "1", "--to", str(to), "--format", "peft", "--push", name]
    return subprocess.run(
        [sys.executable, "-m", "llava_cl.cli", "export", *options],
        env={**environment, "HF_TOKEN": token},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.e2e
def test_an_export_is_uploaded_to_a_new_private_repository(run: Path, hub: Hub, tmp_path: Path) -> None:
    done = push(run, tmp_path / "out", hub, "someone/model")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "out"), f"{hub.address}/someone/model"]
    assert hub.private == {"someone/model": True}
    files = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert {"README.md", "adapter_model.safetensors", "adapter_config.json"} <= files.keys()
    assert hub.repositories["someone/model"] == files
    again = push(run, tmp_path / "again", hub, "someone/model")
    assert again.returncode == 2
    assert "--push someone/model: exists on" in again.stderr
    refused = push(run, tmp_path / "again", hub, "someone/other", "hf_another")
    assert refused.returncode == 2, refused.stderr
    assert "--push someone/other: the hub at" in refused.stderr and "Traceback" not in refused.stderr
    assert not (tmp_path / "again").exists() and list(hub.repositories) == ["someone/model"]


@pytest.mark.parametrize(
    ("name", "offline", "said"),
    [
        ("a/b/c", False, "--push a/b/c: is no name of a repository"),
        ("a/b", True, "HF_HUB_OFFLINE is set"),
        ("a/b", False, "there is no token for the hub; run `hf auth login`"),
    ],
)
def test_nothing_is_written_where_it_cannot_be_uploaded(
    name: str,
    offline: bool,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    options = [str(tmp_path), "--stage", "1", "--to", str(tmp_path / "out"), "--push", name]
    monkeypatch.setattr("sys.argv", ["llava-cl", "export", *options])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
