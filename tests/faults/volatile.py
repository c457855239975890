"""A file system that forgets: what was not synced may be gone, torn or out of order once the power fails.

Model. A write is durable once its file was synced (fsync, fdatasync, or O_DSYNC on the write itself); a name once its
folder was. Nothing else is promised, so a new file without a sync of its folder may be gone altogether. When the power
fails, each 4 KiB page written since the file's last sync is there or not, independently of the others and of order;
of the folders' changes since their last sync a first part is there.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import child
import fuse_wire as wire
from fuse_wire import Mount

PAGE = 4096


@dataclass
class File:
    """Bytes now, bytes as last synced, and the pages written in between."""

    data: bytearray = field(default_factory=bytearray)
    stable: bytes = b""
    dirty: set[int] = field(default_factory=set)

    def write(self, at: int, data: bytes) -> None:
        if at > len(self.data):
            self.data.extend(bytes(at - len(self.data)))
        self.data[at : at + len(data)] = data
        self.dirty.update(range(at // PAGE, (at + len(data) - 1) // PAGE + 1))

    def truncate(self, size: int) -> None:
        if size < len(self.data):
            del self.data[size:]
        else:
            self.data.extend(bytes(size - len(self.data)))

    def sync(self) -> None:
        self.stable = bytes(self.data)
        self.dirty.clear()

    def after_power_loss(self, keep: Callable[[], bool]) -> bytes:
        image = bytearray(self.stable)
        for page in sorted(self.dirty):
            part = self.data[page * PAGE : (page + 1) * PAGE]
            if not keep():
                continue
            if page * PAGE > len(image):
                image.extend(bytes(page * PAGE - len(image)))
            image[page * PAGE : page * PAGE + len(part)] = part
        return bytes(image)


@dataclass
class Folder:
    names: dict[bytes, int] = field(default_factory=dict)
    stable: dict[bytes, int] = field(default_factory=dict)
    history: list[dict[bytes, int]] = field(default_factory=list)  # `names` after each change since the last sync

    def changed(self) -> None:
        self.history.append(dict(self.names))

    def sync(self) -> None:
        self.stable = dict(self.names)
        self.history.clear()


class Volatile:
    """Serves a mount until it ends; `fail` then says what the disk holds."""

    def __init__(self) -> None:
        self.nodes: dict[int, File | Folder] = {wire.ROOT: Folder()}

    def load(self, source: Path, node: int = wire.ROOT) -> None:
        """Take a real folder's content as what the disk holds."""
        folder = self._folder(node)
        for path in sorted(source.iterdir()):
            number = len(self.nodes) + 1
            folder.names[path.name.encode()] = number
            if path.is_dir():
                self.nodes[number] = Folder()
                self.load(path, number)
            else:
                self.nodes[number] = file = File(bytearray(path.read_bytes()))
                file.sync()
        folder.sync()

    def fail(self, target: Path, rng: random.Random, node: int = wire.ROOT) -> None:
        """Write what is left after a power loss to a real folder."""
        folder = self._folder(node)
        share = rng.choice((0.0, rng.random(), 1.0))  # everything dropped, some, or all of it there
        versions = [folder.stable, *folder.history]
        for name, number in versions[round(share * (len(versions) - 1))].items():
            path, found = target / name.decode(), self.nodes[number]
            if isinstance(found, Folder):
                path.mkdir()
                self.fail(path, rng, number)
            else:
                kept = rng.choice((0.0, rng.random(), 1.0))
                path.write_bytes(found.after_power_loss(lambda kept=kept: rng.random() < kept))  # type: ignore[misc]

    def serve(self, mount: Mount) -> None:
        while True:
            try:
                opcode, unique, node, body = mount.receive()
            except OSError as exc:
                if exc.errno in (errno.ENODEV, errno.ECONNABORTED):  # unmounted; with requests under way, aborted
                    return
                if exc.errno in (errno.EINTR, errno.ENOENT, errno.EAGAIN):
                    continue
                raise
            if opcode in (wire.FORGET, wire.BATCH_FORGET, wire.INTERRUPT):
                continue  # no reply; nodes are never reused
            if opcode == wire.DESTROY:
                mount.reply(unique, b"")
                return
            handler = _HANDLERS.get(opcode)
            try:
                answer = errno.ENOSYS if handler is None else handler(self, node, body)
            except OSError as exc:
                answer = exc.errno or errno.EIO
            mount.reply(unique, answer)

    def _folder(self, node: int) -> Folder:
        found = self.nodes[node]
        if not isinstance(found, Folder):
            raise NotADirectoryError(errno.ENOTDIR, "not a folder")
        return found

    def _file(self, node: int) -> File:
        found = self.nodes[node]
        if not isinstance(found, File):
            raise IsADirectoryError(errno.EISDIR, "a folder")
        return found

    def _attr(self, node: int) -> bytes:
        found = self.nodes[node]
        size = len(found.data) if isinstance(found, File) else PAGE
        mode = (stat.S_IFREG | 0o600) if isinstance(found, File) else (stat.S_IFDIR | 0o700)
        blocks = -(-size // 512)
        return wire.ATTR.pack(node, size, blocks, 0, 0, 0, 0, 0, 0, mode, 1, os.getuid(), os.getgid(), 0, PAGE, 0)

    def _entry(self, node: int) -> bytes:
        return wire.ENTRY.pack(node, 0, 0, 0, 0, 0) + self._attr(node)

    def _init(self, _node: int, body: bytes) -> bytes:
        _, minor, readahead, _ = wire.INIT_IN.unpack_from(body)
        # Big writes; no writeback cache, so every write arrives at once; no locks, which the kernel keeps by itself.
        return wire.INIT_OUT.pack(7, min(minor, 31), readahead, 1 << 5, 16, 12, wire.MAX_WRITE, 1, 0, 0, 0)

    def _lookup(self, node: int, body: bytes) -> bytes | int:
        found = self._folder(node).names.get(body.rstrip(b"\0"))
        return errno.ENOENT if found is None else self._entry(found)

    def _getattr(self, node: int, _body: bytes) -> bytes:
        return wire.ATTR_OUT.pack(0, 0, 0) + self._attr(node)

    def _setattr(self, node: int, body: bytes) -> bytes:
        valid, _, _, size, *_ = wire.SETATTR_IN.unpack_from(body)
        if valid & wire.FATTR_SIZE:
            self._file(node).truncate(size)
        return self._getattr(node, b"")

    def _add(self, node: int, name: bytes, made: File | Folder) -> int:
        folder, number = self._folder(node), len(self.nodes) + 1
        self.nodes[number] = made
        folder.names[name] = number
        folder.changed()
        return number

    def _mkdir(self, node: int, body: bytes) -> bytes:
        return self._entry(self._add(node, body[8:].rstrip(b"\0"), Folder()))

    def _create(self, node: int, body: bytes) -> bytes:
        return self._entry(self._add(node, body[16:].rstrip(b"\0"), File())) + wire.OPEN_OUT.pack(0, 0, 0)

    def _unlink(self, node: int, body: bytes) -> bytes | int:
        folder = self._folder(node)
        if folder.names.pop(body.rstrip(b"\0"), None) is None:
            return errno.ENOENT
        folder.changed()
        return b""

    def _rename(self, node: int, body: bytes) -> bytes | int:
        target = self._folder(int.from_bytes(body[:8], "little"))
        old, new = body[8:].split(b"\0")[:2]
        source = self._folder(node)
        if old not in source.names:
            return errno.ENOENT
        target.names[new] = source.names.pop(old)
        source.changed()
        if target is not source:
            target.changed()
        return b""

    def _open(self, _node: int, _body: bytes) -> bytes:
        return wire.OPEN_OUT.pack(0, 0, 0)

    def _read(self, node: int, body: bytes) -> bytes:
        _, at, size, *_ = wire.READ_IN.unpack_from(body)
        return bytes(self._file(node).data[at : at + size])

    def _write(self, node: int, body: bytes) -> bytes:
        _, at, size, _, _, flags, _ = wire.WRITE_IN.unpack_from(body)
        file = self._file(node)
        file.write(at, body[wire.WRITE_IN.size : wire.WRITE_IN.size + size])
        if flags & (os.O_DSYNC | os.O_SYNC):
            file.sync()
        return size.to_bytes(4, "little") + bytes(4)

    def _fsync(self, node: int, _body: bytes) -> bytes:
        self.nodes[node].sync()
        return b""

    def _readdir(self, node: int, body: bytes) -> bytes:
        _, at, size, *_ = wire.READ_IN.unpack_from(body)
        out = b""
        for i, (name, number) in enumerate(self._folder(node).names.items()):
            kind = stat.S_IFREG >> 12 if isinstance(self.nodes[number], File) else stat.S_IFDIR >> 12
            entry = wire.dirent(number, i + 1, name, kind)
            if i >= at and len(out) + len(entry) <= size:
                out += entry
        return out

    def _statfs(self, _node: int, _body: bytes) -> bytes:
        return wire.STATFS_OUT.pack(1 << 30, 1 << 30, 1 << 30, 1 << 20, 1 << 20, PAGE, 255, PAGE, 0)

    def _nothing(self, _node: int, _body: bytes) -> bytes:
        return b""


_HANDLERS: dict[int, Callable[[Volatile, int, bytes], bytes | int]] = {
    wire.INIT: Volatile._init,
    wire.LOOKUP: Volatile._lookup,
    wire.GETATTR: Volatile._getattr,
    wire.SETATTR: Volatile._setattr,
    wire.MKDIR: Volatile._mkdir,
    wire.CREATE: Volatile._create,
    wire.UNLINK: Volatile._unlink,
    wire.RMDIR: Volatile._unlink,
    wire.RENAME: Volatile._rename,
    wire.OPEN: Volatile._open,
    wire.OPENDIR: Volatile._open,
    wire.READ: Volatile._read,
    wire.WRITE: Volatile._write,
    wire.FSYNC: Volatile._fsync,
    wire.FSYNCDIR: Volatile._fsync,
    wire.READDIR: Volatile._readdir,
    wire.STATFS: Volatile._statfs,
    wire.RELEASE: Volatile._nothing,
    wire.RELEASEDIR: Volatile._nothing,
    wire.FLUSH: Volatile._nothing,
}


def power_loss(folder: Path, work: Callable[[Path], None], wait: Callable[[], None], rng: random.Random) -> None:
    """Run `work` in a child on a volatile copy of `folder`; cut its power when `wait`, in another child, returns.

    `folder` then holds what the disk does. The caller must have no threads. Raises Unavailable.
    """
    point = folder.with_name(folder.name + "-mount")
    point.mkdir(exist_ok=True)
    mount = Mount(point)
    disk = Volatile()
    disk.load(folder)
    writer = child.fork(lambda: (os.close(mount.fd), work(point)))
    killer = child.fork(lambda: _cut(writer, mount, wait))
    try:
        disk.serve(mount)
    finally:
        child.wait(killer)
        code = child.wait(writer)
        os.close(mount.fd)
    if code != -signal.SIGKILL:
        raise AssertionError(f"the writer ended by itself with {code}")
    shutil.rmtree(folder)
    folder.mkdir()
    disk.fail(folder, rng)


def _cut(writer: int, mount: Mount, wait: Callable[[], None]) -> None:
    """Kill the writer, then take the mount away, which ends the serving."""
    os.close(mount.fd)
    try:
        wait()
    finally:
        os.kill(writer, signal.SIGKILL)
        time.sleep(0.005)  # until its last request is through
        mount.detach()
