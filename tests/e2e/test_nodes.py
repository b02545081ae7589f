"""Two nodes for real: network namespaces joined by one cable, an sshd in each, and a disturbed run over both."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

import tiny
from llava_cl.cli import main
from llava_cl.config import RunConfig
from llava_cl.distributed import World
from llava_cl.pipeline.job import Job
from llava_cl.pipeline.orchestrator import Launch, execute
from llava_cl.pipeline.progress import ProgressWriter
from llava_cl.pipeline.stage import run_stage
from llava_cl.store import RunDirectory
from ranks import forkserver, run_ranks
from runs import Silent, result_hashes, tiny_config

pytestmark = [pytest.mark.e2e, pytest.mark.distributed]
ROOT = Path(__file__).parents[2]
ADDRESSES = ("10.213.77.1", "10.213.77.2")
SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
TIMEOUT_MINUTES = 0.3
HOLD = """
# In rank 0: after the first batch of a step it tells that it is there, and goes on when told to.
import os, time
from pathlib import Path
if os.environ.get("RANK") == "0" and "HOLD_AT" in os.environ:
    from llava_cl.pipeline.progress import ProgressWriter
    write, folder = ProgressWriter._write, Path(os.environ["HOLD_IN"])
    def held(self, event):
        write(self, event)
        if event.step == os.environ["HOLD_AT"] and event.done:
            (folder / "reached").touch()
            while not (folder / "go").exists():
                time.sleep(0.05)
    ProgressWriter._write = held
"""


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, (arguments, done.stderr)


def _wait_for(condition: Callable[[], object], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def _processes(namespace: str) -> dict[int, str]:
    """Command lines of the processes on a node but its ssh server's."""
    listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=True)
    found = {}
    for pid in listed.stdout.split():
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            if "sshd" not in words[0]:
                found[int(pid)] = " ".join(words)
    return found


def _remove(names: list[str]) -> None:
    for name in names:
        listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
        for pid in listed.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


@dataclass
class Nodes:
    """The two nodes, and what a command on the first one needs."""

    names: list[str]
    folder: Path

    def start(self, arguments: list[str], log: Path, **environment: str) -> BaseProcess:
        """Starts `llava-cl` on the first node."""
        path = f"{self.folder}:{os.environ['PATH']}"
        values = {"PATH": path, "PYTHONPATH": str(self.folder), **environment}
        process = forkserver().Process(target=_command, args=(self.names[0], arguments, log, values))
        process.start()
        return process

    def ranks(self, node: int) -> list[int]:
        """Ids of the ranks of a node."""
        named = _processes(self.names[node]).items()
        return [
            pid for pid, line in named if "llava_cl.pipeline.worker" in line and "torch.distributed.run" not in line
        ]


def _command(namespace: str, arguments: list[str], log: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    with Path(f"/run/netns/{namespace}").open() as there, log.open("ab") as output:
        assert ctypes.CDLL(None, use_errno=True).setns(there.fileno(), 0) == 0
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    sys.argv[1:] = arguments
    main()


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    missing = [tool for tool, there in (("sshd", SSHD), ("ip", shutil.which("ip"))) if not there]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed (Debian: openssh-server, openssh-client, iproute2)")
    for left in Path("/run/netns").glob("llava-cl-*"):
        if not Path(f"/proc/{left.name.split('-')[2]}").exists():
            _remove([left.name])
    names = [f"llava-cl-{os.getpid()}-{number}" for number in (1, 2)]
    made = subprocess.run(["ip", "netns", "add", names[0]], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"network namespaces cannot be made here: {made.stderr.strip()}")
    folder = tmp_path_factory.mktemp("nodes")
    try:
        _ip("netns", "add", names[1])
        _ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            for interface in ("lo", "eth0"):
                _ip("-n", name, "link", "set", interface, "up")
        _start_sshd(folder, names)
        (folder / "sitecustomize.py").write_text(HOLD)
        (folder / "hosts").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
        yield Nodes(names, folder)
    finally:
        _remove(names)


def _start_sshd(folder: Path, names: list[str]) -> None:
    """One on each node, that lets in who has the test's key, and a client that uses this key and knows theirs."""
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    (folder / "known").write_text("".join(f"{a} {(folder / 'host.pub').read_text()}" for a in ADDRESSES))
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\nPidFile none\nStrictModes no\nUsePAM no\n"
        "PasswordAuthentication no\nPermitRootLogin prohibit-password\n"
        # What a login's profile sets: one would change the results, the other the number of nodes.
        "SetEnv ACCELERATE_MIXED_PRECISION=bf16 PET_NNODES=3\n"
    )
    (folder / "client").write_text(
        f"IdentityFile {folder}/user\nIdentitiesOnly yes\nUserKnownHostsFile {folder}/known\nConnectionAttempts 30\n"
    )
    (folder / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/client "$@"\n')
    (folder / "ssh").chmod(0o755)
    Path("/run/sshd").mkdir(exist_ok=True)
    for name, address in zip(names, ADDRESSES, strict=True):
        server = ["ip", "netns", "exec", name, SSHD, "-f", folder / "sshd_config", "-o", f"ListenAddress={address}"]
        subprocess.run(server, check=True)


@dataclass
class Disturbed:
    """A run over both nodes that is disturbed again and again, and the results of the same ranks on one node."""

    nodes: Nodes
    folder: Path
    undisturbed: dict[str, str]

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def start(self, log: Path, **hold: str) -> BaseProcess:
        settings = ["run", str(self.folder / "run.yaml"), "--output", str(self.run), "--until", "1", "--nproc", "1"]
        return self.nodes.start([*settings, "--hostfile", str(self.nodes.folder / "hosts")], log, **hold)


def _stage_on_a_rank(world: World, config: RunConfig, run: RunDirectory, stage: int) -> None:
    run_stage(Job(config, run, world, ProgressWriter(None)), stage)


@pytest.fixture(scope="module")
def disturbed(nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Disturbed:
    folder = tmp_path_factory.mktemp("disturbed")
    distributed = {"timeout_minutes": TIMEOUT_MINUTES, "deepspeed": str(ROOT / "configs/deepspeed/zero2.json")}
    content = tiny.run_content(folder, distributed=distributed)
    content["evaluation"]["zero_shot"] = False
    content["training"]["checkpoint_every"] = 1
    config, one = tiny_config(folder, content), folder / "one"

    def stage(run: RunDirectory, number: int) -> None:
        run_ranks(_stage_on_a_rank, 2, config, run, number, use_deepspeed=True)

    execute(config, Launch(one, until=1), Silent(), after_stage=lambda run: None, run_stage=stage)
    undisturbed = result_hashes(one)
    assert len(undisturbed) > 5
    return Disturbed(nodes, folder, undisturbed)


@pytest.mark.parametrize(
    ("step", "fault"),
    [
        (step, fault)
        for step, link in (("measure", "second link"), ("train", "first link"), ("evaluate Colour", "second link"))
        for fault in ("command", "ranks", link)
    ],
)
def test_a_fault_ends_all_ranks_with_one_message(disturbed: Disturbed, tmp_path: Path, step: str, fault: str) -> None:
    nodes, log = disturbed.nodes, tmp_path / "log"
    command = disturbed.start(log, HOLD_AT=step, HOLD_IN=str(tmp_path))
    _wait_for(lambda: (tmp_path / "reached").exists() or not command.is_alive())
    assert command.is_alive(), log.read_text()
    interface = nodes.names[fault == "second link"]
    try:
        if fault == "command":
            command.kill()
        elif fault == "ranks":
            for pid in nodes.ranks(1):
                os.kill(pid, signal.SIGKILL)
        else:
            _ip("-n", interface, "link", "set", "eth0", "down")
        if fault != "command":
            (tmp_path / "go").touch()
        command.join(300)
        _wait_for(lambda: not any(map(_processes, nodes.names)))
    finally:
        _ip("-n", interface, "link", "set", "eth0", "up")
    said = [text for text in log.read_text().splitlines() if text.startswith("error:")]
    if fault == "command":
        assert (command.exitcode, said) == (-signal.SIGKILL, [])
        return
    expected = rf"error: stage 1, {step}( \d+/\d+)?"
    if fault == "ranks":
        expected += ", rank 1: was ended by SIGKILL"
    else:
        expected += rf": the ranks waited {TIMEOUT_MINUTES} minutes \(\S+\) in vain for one another: is the network"
    assert command.exitcode == 1
    assert len(said) == 1 and re.match(expected, said[0]), log.read_text()


def test_two_nodes_end_with_the_bytes_of_one_whatever_happened(disturbed: Disturbed) -> None:
    """Run alone, this is the run that nothing disturbed."""
    log = disturbed.folder / "two.log"
    process = disturbed.start(log)
    process.join(300)
    assert process.exitcode == 0, log.read_text()
    assert result_hashes(disturbed.run) == disturbed.undisturbed
    _wait_for(lambda: not any(map(_processes, disturbed.nodes.names)))
