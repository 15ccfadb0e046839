"""Watching processes without help: who belongs to whom, and whether they are gone. Linux's /proc."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

PROC = Path("/proc")


def stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; empty where the process is gone."""
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def alive(pid: int) -> bool:
    return (fields := stat(pid)) != [] and fields[0] not in "ZX"


def children(pid: int) -> list[int]:
    found = [int(entry.name) for entry in PROC.iterdir() if entry.name.isdecimal()]
    return sorted(child for child in found if (fields := stat(child)) and int(fields[1]) == pid and fields[0] != "Z")


def descendants(pid: int) -> list[int]:
    return [found for child in children(pid) for found in (child, *descendants(child))]


def workers(pid: int | None = None) -> list[int]:
    """Ranks that `pid` (this process) has started, in rank order."""
    return [child for child in children(os.getpid() if pid is None else pid) if "launch.worker" in _command(child)]


def _command(pid: int) -> str:
    try:
        return (PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def wait_gone(pids: Sequence[int], *, within_s: float) -> float:
    """Seconds until all have ended; fails where one stays."""
    began = time.monotonic()
    while any(alive(pid) for pid in pids):
        left = [(pid, _command(pid)) for pid in pids if alive(pid)]
        assert time.monotonic() < began + within_s, f"still there after {within_s} s: {left}"
        time.sleep(0.02)
    return time.monotonic() - began


def listening_addresses(pid: int) -> set[str]:
    """IPv4 and IPv6 addresses on which the process listens, as text."""
    inodes = set()
    for link in (PROC / str(pid) / "fd").iterdir():
        try:
            target = str(link.readlink())
        except OSError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in (PROC / str(pid) / "net" / table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(_address(fields[1].partition(":")[0], family))
    return found


def _address(digits: str, family: socket.AddressFamily) -> str:
    # Each 32-bit word is printed as this machine's integer.
    words = [bytes.fromhex(digits[at : at + 8])[::-1] for at in range(0, len(digits), 8)]
    return socket.inet_ntop(family, b"".join(words))


def finish(process: subprocess.Popen[str], *, within_s: float) -> tuple[str, str]:
    """Output and errors of a process that must end by itself."""
    try:
        return process.communicate(timeout=within_s)
    except subprocess.TimeoutExpired:
        for pid in (*descendants(process.pid), process.pid):
            os.kill(pid, 9)
        out, err = process.communicate()
        raise AssertionError(f"did not end within {within_s} s\n{out}\n{err}") from None
