"""The kernel's FUSE protocol (linux/fuse.h, version 7.31) spoken over /dev/fuse: the few messages this needs.

Written out here because mounting and speaking need no library: only root, or a user namespace.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
from pathlib import Path

from outcome import Unavailable

LOOKUP, FORGET, GETATTR, SETATTR = 1, 2, 3, 4
MKDIR, UNLINK, RMDIR, RENAME = 9, 10, 11, 12
OPEN, READ, WRITE, STATFS, RELEASE, FSYNC, FLUSH, INIT, OPENDIR, READDIR, RELEASEDIR, FSYNCDIR = (
    14, 15, 16, 17, 18, 20, 25, 26, 27, 28, 29, 30,
)  # fmt: skip
CREATE, INTERRUPT, DESTROY, BATCH_FORGET = 35, 36, 38, 42
ROOT = 1

IN_HEADER = struct.Struct("<IIQQIIIHH")  # length, opcode, unique, node, uid, gid, pid, extensions, padding
OUT_HEADER = struct.Struct("<IiQ")
ATTR = struct.Struct("<QQQQQQIIIIIIIIII")
ENTRY = struct.Struct("<QQQQII")
ATTR_OUT = struct.Struct("<QII")
OPEN_OUT = struct.Struct("<QII")
SETATTR_IN = struct.Struct("<IIQQQQQQIIIIIIII")
WRITE_IN = struct.Struct("<QQIIQII")  # handle, offset, size, write flags, lock owner, open flags, padding
READ_IN = struct.Struct("<QQIIQII")
FSYNC_IN = struct.Struct("<QII")
INIT_IN = struct.Struct("<IIII")
INIT_OUT = struct.Struct("<IIIIHHIIHHI28x")
STATFS_OUT = struct.Struct("<QQQQQIIII24x")
DIRENT = struct.Struct("<QQII")

FATTR_SIZE = 1 << 3
MAX_WRITE = 128 << 10
BUFFER = MAX_WRITE + 4096
_MNT_DETACH = 2


class Mount:
    """/dev/fuse, mounted on `folder`. Raises Unavailable where that is not possible."""

    def __init__(self, folder: Path) -> None:
        if sys.platform != "linux":
            raise Unavailable("a volatile file system needs Linux")
        try:
            self.fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        except OSError as exc:
            raise Unavailable(f"a volatile file system needs /dev/fuse: {exc.strerror}") from exc
        self.folder = folder
        self._libc = ctypes.CDLL(None, use_errno=True)
        options = f"fd={self.fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}".encode()
        if self._libc.mount(b"volatile", os.fsencode(folder), b"fuse", 0, options) != 0:
            os.close(self.fd)
            raise Unavailable(f"mounting FUSE: {os.strerror(ctypes.get_errno())} (run as root)")

    def detach(self) -> None:
        """Take the mount away; requests of processes that are gone no longer come."""
        self._libc.umount2(os.fsencode(self.folder), _MNT_DETACH)

    def receive(self) -> tuple[int, int, int, bytes]:
        """(opcode, unique, node, body) of the next request. Raises OSError (ENODEV, ECONNABORTED) once unmounted."""
        raw = os.read(self.fd, BUFFER)
        _, opcode, unique, node, *_ = IN_HEADER.unpack_from(raw)
        return opcode, unique, node, raw[IN_HEADER.size :]

    def reply(self, unique: int, body: bytes | int) -> None:
        """Answer with a body, or with a positive errno. Nobody may be left to hear it: that process was killed."""
        error, data = (-body, b"") if isinstance(body, int) else (0, body)
        try:
            os.write(self.fd, OUT_HEADER.pack(OUT_HEADER.size + len(data), error, unique) + data)
        except OSError as exc:
            if exc.errno not in (errno.ENOENT, errno.ENODEV, errno.ECONNABORTED):
                raise


def dirent(node: int, offset: int, name: bytes, kind: int) -> bytes:
    raw = DIRENT.pack(node, offset, len(name), kind) + name
    return raw + bytes(-len(raw) % 8)
