"""Readers of IDX and .npz files that trust nothing in them."""

import contextlib
import gzip
import hashlib
import io
import math
import os
import resource
import struct
import zipfile
import zlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tfloop.errors import UserError

IDX_DTYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
DEFLATE_LIMIT = 1032  # bytes out per byte in, at most: https://zlib.net/zlib_tech.html


def read_idx(path: str | Path, sha256: str | None = None) -> np.ndarray:
    """The array in an IDX file (http://yann.lecun.com/exdb/mnist), plain or gzipped.

    Args:
      path: of the file.
      sha256: the sum that the file must have, in hexadecimal; None checks none.

    Raises:
      UserError: the file is truncated, damaged, longer than its header says, or has another sum.
    """
    path = Path(path)
    _check_plain(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if sha256 and hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(
            f"{path}: damaged: its SHA-256 sum is not the one in SHA256SUMS; fetch the file again"
        )
    is_zipped = content[:2] == b"\x1f\x8b"
    limit = len(content) * (DEFLATE_LIMIT if is_zipped else 1)
    stream: BinaryIO = io.BytesIO(content)
    if is_zipped:
        stream = gzip.GzipFile(fileobj=stream)  # type: ignore[assignment]  # a stream, too
    try:
        shape, dtype = _read_idx_header(stream, path)
        expected = math.prod(shape) * dtype.itemsize
        if expected > limit:
            raise UserError(
                f"{path}: truncated: its header promises {expected} bytes, more than the file can "
                "hold"
            )
        check_fits(path, expected)
        body = stream.read(expected + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged: {error}") from None
    if len(body) != expected:
        follow = f"{len(body)} bytes follow" if len(body) < expected else "more follow"
        raise UserError(f"{path}: its header promises {expected} bytes of data, {follow}")
    return np.frombuffer(body, dtype).reshape(shape)


def _read_idx_header(stream: BinaryIO, path: Path) -> tuple[tuple[int, ...], np.dtype]:
    """(shape, type) of the array that follows."""
    header = stream.read(4)
    if len(header) < 4 or header[:2] != b"\0\0" or header[2] not in IDX_DTYPES:
        start = header[:4].hex() or "nothing"
        raise UserError(f"{path}: not an IDX file: it starts with {start}")
    rank = header[3]
    sizes = stream.read(4 * rank)
    if len(sizes) < 4 * rank:
        raise UserError(f"{path}: truncated in its header")
    return struct.unpack(f">{rank}I", sizes), np.dtype(IDX_DTYPES[header[2]])


def read_npz(
    path: str | Path,
    choose: Callable[[dict[str, tuple[int, ...]]], Collection[str]] = lambda shapes: shapes,
) -> dict[str, np.ndarray]:
    """The arrays in an .npz file, read without pickle.

    Args:
      path: of the file.
      choose: is given the shapes by name before anything is read, and gives the names of the
        arrays to read, or refuses them.

    Raises:
      UserError: the file is damaged, promises more than it can hold or than fits into memory, or
        holds Python objects.
    """
    _check_plain(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > os.path.getsize(path) * DEFLATE_LIMIT:
                raise UserError(f"{path}: damaged: it promises more data than the file can hold")
            known = {
                entry.filename.removesuffix(".npy"): _shape_of(archive, entry, path)
                for entry in entries
            }
        wanted = choose({name: shape for name, (shape, _) in known.items()})
        check_fits(path, sum(known[name][1] for name in wanted))
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in wanted}
    except UserError:
        raise
    except (
        OSError,
        EOFError,
        ValueError,
        KeyError,
        zlib.error,
        zipfile.BadZipFile,
        struct.error,
        MemoryError,
        NotImplementedError,
        RuntimeError,
        SyntaxError,
        TypeError,
    ) as error:
        raise UserError(f"{path}: damaged or not an .npz of plain arrays: {error}") from None


def read_npy(path: str | Path) -> np.ndarray:
    """The array in an .npy file, read without pickle.

    Raises:
      UserError: the file is damaged, promises more than it holds, or holds Python objects.
    """
    _check_plain(path)
    try:
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            form = np.lib.format
            is_first = version == (1, 0)
            read = form.read_array_header_1_0 if is_first else form.read_array_header_2_0
            shape, _, dtype = read(file)
            if math.prod(shape) * dtype.itemsize > os.path.getsize(path):
                raise UserError(f"{path}: damaged: it promises more data than the file holds")
        return np.load(path, allow_pickle=False)
    except (OSError, EOFError, ValueError, SyntaxError, TypeError, MemoryError) as error:
        raise UserError(f"{path}: damaged or not an .npy of a plain array: {error}") from None


def _check_plain(path: str | Path) -> None:
    """Raises UserError for a named pipe or a device, which may have no end."""
    if Path(path).exists() and not Path(path).is_file():
        raise UserError(f"{path}: is no plain file; write what it gives into one")


def check_fits(path: str | Path, size: int) -> None:
    """Raises UserError where so many bytes, unpacked, do not fit into free memory."""
    free = _free_memory()
    if free and size > free:
        raise UserError(
            f"{path}: holds {size / 2**30:.1f} GiB, {free / 2**30:.1f} GiB of memory are free; "
            "pack larger data as shards, or leave some out"
        )


def _free_memory() -> int:
    """Bytes that this process may still take; 0 where that is not known."""
    free = 0
    with contextlib.suppress(OSError, ValueError, StopIteration):
        with open("/proc/meminfo", encoding="ascii") as file:
            free = 1024 * int(next(line for line in file if "MemAvailable" in line).split()[1])
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            with open("/proc/self/statm", encoding="ascii") as file:
                taken = int(file.read().split()[0]) * resource.getpagesize()
            free = max(1, min(free, limit - taken))
    return free


def _shape_of(
    archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: str | Path
) -> tuple[tuple[int, ...], int]:
    """(an array's shape, its bytes), from its header.

    Raises:
      UserError: it promises more than its entry holds; NumPy would make room for it first.
    """
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        is_first = version == (1, 0)
        form = np.lib.format
        read = form.read_array_header_1_0 if is_first else form.read_array_header_2_0
        shape, _, dtype = read(file)
    size = math.prod(shape) * dtype.itemsize
    if size > entry.file_size:
        raise UserError(
            f"{path}: damaged: {entry.filename} promises more data than the file can hold"
        )
    return shape, size
