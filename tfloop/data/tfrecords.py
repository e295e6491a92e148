"""TFRecord files: their records, whole and damaged, and those that are compressed.

A record is its length, the CRC of that, its content, and the CRC of that.
(https://www.tensorflow.org/tutorials/load_data/tfrecord)
"""

import functools
import glob
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import tensorflow as tf

from tfloop.data.tf_data import UNTUNED
from tfloop.errors import UserError

UNPACKED = ".unpacked"  # the folder of unpacked copies
HEADER, FOOTER = 12, 4  # bytes around a record: its length and the CRC of that, and its own CRC
PACKED = re.compile(r"\.(gz|gzip|zlib|zip|bz2|xz)$")


def records(path: Path) -> Iterator[tuple[int, int, bytes, str]]:
    """(number, offset of the content, content, "" or what is wrong) of each record, in order.

    TensorFlow checks the CRCs. After a record whose content is damaged the next one is found by its
    length; after a damaged length by looking for the next whole record.
    """
    size, number, start = path.stat().st_size, 0, 0
    whole = tf.data.TFRecordDataset(str(path)).with_options(UNTUNED).as_numpy_iterator()
    while start < size:
        try:
            record = next(whole) if whole else _check_record(path, start)
        except StopIteration:
            return
        except (tf.errors.DataLossError, _Damaged):
            length = _length(path, start)
            if length is None or start + HEADER + length + FOOTER > size:
                place = _next_record(path, start + 1, size)
                mean = start / number if number else place - start
                lost = max(1, round((place - start) / mean))
                what = "is truncated" if place == size else "is damaged, and so is its length"
                several = f" ({place - start} bytes, about {lost} records)" if lost > 1 else ""
                for each in range(lost):
                    yield number + each, start, b"", f"{what}{several}"
                whole, start, number = None, place, number + lost
                continue
            yield number, start + HEADER, b"", "is damaged: its CRC is wrong"
            whole, start, number = None, start + HEADER + length + FOOTER, number + 1
            continue
        except tf.errors.OpError as error:
            reason = error.message.splitlines()[0]
            raise UserError(f"{path}: cannot be read: {reason}") from None
        yield number, start + HEADER, record, ""
        start, number = start + HEADER + len(record) + FOOTER, number + 1


class _Damaged(Exception):
    pass


def _next_record(path: Path, start: int, size: int) -> int:
    """Where the next whole record begins, from `start` on; the file's size where there is none."""
    at_once = 1 << 20
    for first in range(start, size, at_once):
        with open(path, "rb") as file:
            file.seek(first)
            window = np.frombuffer(file.read(at_once + HEADER - 1), np.uint8)
        if len(window) < HEADER:
            break
        found = np.lib.stride_tricks.sliding_window_view(window, HEADER)
        crcs = found[:, 8:].copy().view("<u4")[:, 0]
        for place in np.flatnonzero(_masked_crcs(found[:, :8]) == crcs):
            try:
                if found[place, :8].any():  # a length of 0 holds no image
                    _check_record(path, first + int(place))
                    return first + int(place)
            except _Damaged:
                continue
    return size


@functools.cache
def _crc_table() -> np.ndarray:
    """[256] uint32: CRC-32C of each byte (polynomial 0x1EDC6F41, reflected)."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0x82F63B78), table >> 1)
    return table


def _masked_crcs(rows: np.ndarray) -> np.ndarray:
    """[N] uint32: TFRecord's masked CRC-32C of rows of bytes [N, 8]."""
    crc = np.full(len(rows), 0xFFFFFFFF, np.uint32)
    for column in rows.T:
        crc = _crc_table()[(crc ^ column) & 0xFF] ^ (crc >> np.uint32(8))
    crc = ~crc
    rotated = (crc >> np.uint32(15)) | (crc << np.uint32(17))
    return rotated + np.uint32(0xA282EAD8)


def _length(path: Path, start: int) -> int | None:
    """The length of the record that starts here; None where that itself is damaged."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    with open(path, "rb") as file:
        file.seek(start)
        header = file.read(HEADER)
    crc = int.from_bytes(header[8:], "little")
    if len(header) < HEADER or masked_crc32c(header[:8]) != crc:
        return None
    return int.from_bytes(header[:8], "little")


def _check_record(path: Path, start: int) -> bytes:
    """The record that starts here, checked in Python: TensorFlow cannot begin inside a file."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    length = _length(path, start)
    if length is None:
        raise _Damaged
    with open(path, "rb") as file:
        file.seek(start + HEADER)
        record, crc = file.read(length), file.read(FOOTER)
    if len(crc) < FOOTER or masked_crc32c(record) != int.from_bytes(crc, "little"):
        raise _Damaged
    return record


# --- compressed files


def unpacked(path: Path) -> Path:
    """The shard, or where it is compressed, as with TensorFlow's GZIP and ZLIB, its unpacked copy.

    Of a compressed file no record can be read on its own. The copy lies in UNPACKED beside it.

    Raises:
      UserError: it is damaged, compressed in another way, or the copy cannot be written.
    """
    kind = _compression(path)
    if not kind:
        return path
    about = path.stat()
    copy = path.parent / UNPACKED / f"{path.name}.{about.st_size}.{about.st_mtime_ns}"
    if copy.is_file():
        return copy
    partial = copy.with_name(f"{copy.name}.{os.getpid()}.partial")
    try:
        copy.parent.mkdir(exist_ok=True)
        for old in copy.parent.glob(f"{glob.escape(path.name)}.*"):
            if old != copy and not _is_being_made(old):
                old.unlink(missing_ok=True)
        with open(path, "rb") as file, open(partial, "xb") as target:
            _unpack(file, target, kind)
        partial.replace(copy)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"{path}: is compressed, and cannot be unpacked into {copy.parent}: "
            f"{error.strerror or error}"
        ) from None
    except (zlib.error, EOFError) as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path}: is damaged: {str(error) or 'it ends too early'}") from None
    return copy


def _is_being_made(path: Path) -> bool:
    """Is it the partial copy of a process that lives?"""
    found = re.search(r"\.(\d+)\.partial$", path.name)
    return found is not None and Path(f"/proc/{found[1]}").exists()


def _compression(path: Path) -> str:
    """ "gzip", "zlib", or "" for none, from the first bytes.

    Raises:
      UserError: its ending says another.
    """
    with open(path, "rb") as file:
        start = file.read(HEADER)
    if start[:2] == b"\x1f\x8b" and _length(path, 0) is None:
        return "gzip"
    is_zlib = len(start) > 1 and start[0] == 0x78 and int.from_bytes(start[:2], "big") % 31 == 0
    if is_zlib and _length(path, 0) is None:
        return "zlib"
    if PACKED.search(path.name):
        raise UserError(f"{path}: is compressed neither by GZIP nor by ZLIB; unpack it")
    return ""


SURELY = 1 << 30  # bytes that a shard may unpack to, however small it is
DENSEST = 100  # times its size that a larger one may


def _unpack(file: BinaryIO, target: BinaryIO, kind: str) -> None:
    """Raises zlib.error or EOFError for a damaged file, and for one made to fill the disk."""
    most = max(SURELY, DENSEST * os.fstat(file.fileno()).st_size)
    while True:  # such files may be joined
        unpacker = zlib.decompressobj(31 if kind == "gzip" else 15)
        rest = b""
        while not unpacker.eof:
            part = file.read(1 << 20)
            if not part:
                raise EOFError
            target.write(unpacker.decompress(part, 1 << 24))
            if target.tell() > most:
                raise zlib.error(f"it unpacks to more than {DENSEST} times its size")
            while unpacker.unconsumed_tail:
                target.write(unpacker.decompress(unpacker.unconsumed_tail, 1 << 24))
            rest = unpacker.unused_data
        if not (rest or file.peek(1)):  # type: ignore[attr-defined]
            return
        file.seek(-len(rest), os.SEEK_CUR)
