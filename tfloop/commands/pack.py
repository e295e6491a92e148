"""Pictures and arrays as TFRecord shards."""

from typing import Any

from tfloop.commands.command import WHERE, Command, one_of, start
from tfloop.config import Config
from tfloop.errors import UserError
from tfloop.settings import whole
from tfloop.wording import counted, shape_text


def pack(config: Config, options: dict[str, Any], arguments: list[str]) -> int:
    if len(arguments) != 2:
        found = counted(len(arguments), "argument")
        raise UserError(f"pack: expected SOURCE and FOLDER, found {found}")
    format, size = one_of(options, "format", ("png", "raw")), options["shard_mib"]
    if not whole(size, most=2**20):
        raise UserError(f"--shard_mib={size}: expected the size of a shard, from 1 to {2**20} MiB")
    start(config)
    from tfloop.data import pack

    source, folder = arguments
    data = pack.pack(source, folder, format, int(size), print)
    parts = [part for part in (data.train, data.validation, data.test) if len(part)]
    shards = sum(len(part.inputs.files) for part in parts)
    held_out = f", {len(data.validation)} validation" if len(data.validation) else ""
    print(
        f"{len(data.train)} training{held_out} and {len(data.test)} test images of "
        f"{shape_text(data.image_shape)}, {data.classes} classes, in {shards} shards: {folder}"
    )
    return 0


COMMAND = Command(
    pack,
    "TFRecord shards from pictures, a folder to each class, or from IDX or npz files",
    topic="use",
    arguments="SOURCE FOLDER",
    settings=WHERE,
    options={
        "format": ("png", "png, or raw: larger, read faster"),
        "shard_mib": ("64", "size of a shard, about, in MiB"),
    },
)
