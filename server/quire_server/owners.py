"""Who holds an address that cannot be had: a person told the process can decide what to do. Linux only; else None."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

LISTENS = "0A"
"""State of a listening socket in /proc/net/tcp; linux/include/net/tcp_states.h."""
TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))


def port_owner(port: int) -> str | None:
    """The process that listens on a TCP port; None if that cannot be seen, as of another user's."""
    wanted = {f"socket:[{inode}]" for inode in _inodes(port)}
    for descriptor in Path("/proc").glob("[0-9]*/fd/*") if wanted else ():
        try:
            if os.readlink(descriptor) in wanted:
                return _shown(int(descriptor.parts[2]))
        except OSError:  # closed meanwhile, or not ours to read
            continue
    return None


def _inodes(port: int) -> list[str]:
    """Of the sockets that listen; columns as proc(5) has them: 1 local address, 3 state, 9 inode."""
    lines = [line.split() for table in TABLES if table.exists() for line in table.read_text().splitlines()[1:]]
    return [line[9] for line in lines if line[3] == LISTENS and int(line[1].rpartition(":")[2], 16) == port]


def socket_owner(path: Path) -> str | None:
    """The process that listens on a Unix socket; None if nobody does.

    Raises:
        OSError: it cannot be asked.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.settimeout(1.0)
        try:
            asking.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return None
        if not hasattr(socket, "SO_PEERCRED"):
            return "another process"
        size = struct.calcsize("3i")
        pid, _, _ = struct.unpack("3i", asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
        return _shown(pid)


def _shown(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return f"process {pid}"
    return f"process {pid} ({' '.join(words).strip()[:80]})"
