"""Folders in which something is made until it is whole, so that a killed process leaves no litter.

Each is locked by its process for as long as that lives. Whoever makes the next one in the same
place removes those that nobody holds.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def open_up(folder: Path) -> None:
    """Give a folder the rights of one that is made now: those of temporary ones are the user's."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)


def temporary(name: str) -> contextlib.AbstractContextManager[Path]:
    """A new folder where the system has its temporary ones, for files of this name."""
    return folder(Path(tempfile.gettempdir()), f"tfloop-{name}-")


@contextlib.contextmanager
def folder(parent: Path, prefix: str, suffix: str = "") -> Iterator[Path]:
    """A new folder in `parent`, which is made where it is missing; removed at the end of the block.

    It may be renamed in the block; then it stays.

    Args:
      parent: where.
      prefix, suffix: of its name. What begins and ends so, and is held by no process, is removed.

    Raises:
      OSError: it cannot be made.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for path in parent.iterdir():
        if path.name.startswith(prefix) and path.name.endswith(suffix) and not path.is_symlink():
            _remove_unless_held(path)
    path, lock = _locked(parent, prefix, suffix)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _locked(parent: Path, prefix: str, suffix: str) -> tuple[Path, int]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=parent))
        with contextlib.suppress(FileNotFoundError):  # another took it for litter at this instant
            lock = os.open(path, os.O_RDONLY)
            with contextlib.suppress(OSError):  # NFS locks no folders; then no litter is removed
                fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                return path, lock
            os.close(lock)


def _remove_unless_held(path: Path) -> None:
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)
    except OSError:
        pass  # it is being made
    finally:
        os.close(lock)
