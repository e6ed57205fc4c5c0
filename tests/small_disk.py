"""A small file system that can be filled up: a tmpfs in a mount namespace of its own, without root's help.

A process holds the namespace; whatever runs behind :attr:`SmallDisk.prefix` sees the disk at its mount
point, and this process sees it below :attr:`SmallDisk.path`.
"""

from __future__ import annotations

import errno
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

# With a user namespace nobody needs to be root; where these are switched off, root needs none.
_NAMESPACES = (["--user", "--mount"], ["--mount"])
_HOLD = 'mount -t tmpfs -o "size=$2,mode=700" none "$1" && echo mounted && exec cat'
_BALLAST = "ballast"


class SmallDisk:
    """An empty disk of ``size`` (``8m``, as for mount) at ``mountpoint``, for processes behind ``prefix``.

    Raises :class:`PermissionError` with the reason where no namespace can be had.
    """

    def __init__(self, mountpoint: Path, size: str) -> None:
        mountpoint.mkdir(parents=True, exist_ok=True)
        reasons = []
        for namespaces in _NAMESPACES:
            root = ["--map-root-user"] if "--user" in namespaces else []
            command = ["unshare", *namespaces, *root, "sh", "-c", _HOLD, "sh", str(mountpoint), size]
            # It ends with its standard input, so also when this process is killed.
            holder = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            assert holder.stdout is not None
            if holder.stdout.readline() == "mounted\n":
                break
            reasons.append(holder.communicate()[1].strip())
        else:
            raise PermissionError(f"no file system can be mounted here: {'; '.join(reasons)}")
        self._holder = holder
        keep = ["--preserve-credentials"] if "--user" in namespaces else []
        # With the holder's working directory, which is this process's; nsenter alone would take the root.
        self.prefix = ["nsenter", f"--target={holder.pid}", *namespaces, *keep, "--wd", "--"]
        self.path = Path(f"/proc/{holder.pid}/root{mountpoint}")

    def mount(self, directory: Path, options: str) -> None:
        """Another tmpfs on the disk's directory ``directory`` (named as processes behind ``prefix`` do)."""
        subprocess.run(
            [*self.prefix, "mount", "-t", "tmpfs", "-o", options, "none", str(directory)], check=True
        )

    @property
    def free(self) -> int:
        """Bytes."""
        return shutil.disk_usage(self.path).free

    def fill(self, leave: int = 0) -> None:
        """Write until no more than ``leave`` bytes are free, rounded down to whole blocks."""
        with open(self.path / _BALLAST, "ab", buffering=0) as stream:
            try:
                while (room := self.free - leave) > 0:
                    stream.write(bytes(min(room, 2**20)))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise

    def clear(self) -> None:
        """Take away what :meth:`fill` wrote."""
        (self.path / _BALLAST).unlink()

    def close(self) -> None:
        """Let the namespace go, and the disk with it once nothing runs there."""
        self._holder.communicate()
        assert self._holder.returncode == 0


@contextmanager
def small_disk(mountpoint: Path, size: str = "8m") -> Iterator[SmallDisk]:
    """A :class:`SmallDisk` for a fixture; the test is skipped where none can be had."""
    if shutil.which("unshare") is None or shutil.which("nsenter") is None:
        pytest.skip("needs unshare and nsenter (util-linux) to mount a small file system")
    try:
        disk = SmallDisk(mountpoint, size)
    except PermissionError as error:
        pytest.skip(str(error))
    with closing(disk):
        yield disk
