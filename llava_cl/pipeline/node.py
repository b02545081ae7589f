"""A job's processes on one node. `ssh` runs this file on every node of a hostfile, where it holds that node's ranks:
they end when their connection does, however the command that started them ended.

It needs no other module of the package, so that it starts at once and from any folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

_END_SECONDS = 5
"""How long a launcher may take to end its ranks before it is killed, and they with it."""
RUN_PID = "LLAVA_CL_RUN_PID"
"""Environment variable with the id of the process that a rank must not outlive."""
_OWN_PREFIXES = ("SSH_", "XDG_")
_OWN = {"HOME", "HOSTNAME", "LOGNAME", "MAIL", "PWD", "SHELL", "TMPDIR", "USER"}
_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.2


def die_with_parent() -> None:
    """Asks the kernel to kill this process when its parent dies, so that no rank outlives a killed run (Linux).

    A run that has been killed before the request is found by its process id, which ranks have in their environment.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        run = os.environ.get(RUN_PID)
        if run is not None and not Path(f"/proc/{run}").exists():
            os._exit(1)


def end(*processes: subprocess.Popen[bytes]) -> None:
    """Ends launchers that are still running, or connections to them; their ranks go with them."""
    for process in processes:
        if process.stdin is None:
            process.terminate()
        else:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
    for process in processes:
        try:
            process.wait(_END_SECONDS if process.stdin is None else 2 * _END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def send(process: subprocess.Popen[bytes], job: Mapping[str, Any]) -> None:
    """Gives a process on another node its job, see `hold`; why it took none its end tells."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps(job).encode() + b"\n")
        process.stdin.flush()


def ranks_environment(sent: Mapping[str, str], here: Mapping[str, str]) -> dict[str, str]:
    """What the command decided, on every node the same, but for what belongs to the user's login on this one."""

    def own(name: str) -> bool:
        return name in _OWN or name.startswith(_OWN_PREFIXES)

    decided = {name: value for name, value in sent.items() if not own(name)}
    return decided | {name: value for name, value in here.items() if own(name)}


def place(run: str) -> tuple[str, int]:
    """This node's first address and a port that is free now, for the ranks to meet at.

    Args:
        run: the run directory, which this node must see.
    """
    if not Path(run).is_dir():
        sys.exit(f"{run} is not there: the nodes of a run share its directory")
    with socket.socket() as probe:
        probe.bind(("", 0))
        addresses = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout.split()
        if not addresses:
            sys.exit("the node has no address of its own (hostname -I)")
        return addresses[0], int(probe.getsockname()[1])


def interface(address: str) -> str:
    """The network interface of this node by which `address` is reached."""
    family, _, _, _, there = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(there)  # sends nothing
        own = probe.getsockname()[0]
    return next(
        name for name, addresses in psutil.net_if_addrs().items() if own in {each.address for each in addresses}
    )


def hold() -> int:
    """Runs the job that standard input describes in one line of JSON, until it or standard input ends.

    Returns:
        The exit code of the job's launcher, 128 + its number for a signal.
    """
    job = json.loads(sys.stdin.buffer.readline())
    environment = ranks_environment(job["environment"], os.environ) | {RUN_PID: str(os.getpid())}
    # Gloo would take the address of the node's own name, which on many systems is its loopback.
    environment.setdefault("GLOO_SOCKET_IFNAME", interface(job["address"]))
    process = subprocess.Popen(
        job["command"],
        cwd=job["folder"],
        env=environment,
        stdin=subprocess.DEVNULL,
        preexec_fn=die_with_parent,
        start_new_session=True,
    )
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda got, _: process.send_signal(got))
    while process.poll() is None:
        if select.select([sys.stdin], [], [], _POLL_SECONDS)[0]:
            # Nothing more is ever sent: the command or the connection has ended.
            end(process)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(place(sys.argv[1])))  # noqa: T201 - what the command reads
    else:
        sys.exit(hold())
