"""Shards on disk: the same batches as from memory, in flat memory, and every damaged record
named."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import tfloop
from tfloop.cli import main
from tfloop.data import pack, pipelines, shard_files, shards, tfrecords
from tfloop.errors import UserError
from tfloop.training import session

SMALL = [
    "--preset=digits",
    "--conv=4",
    "--dense=8",
    "--batch_size=100",
    "--epochs=3",
    "--steps_per_call=4",
    "--quiet",
]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The digits in shards of a few kilobytes, so that there are many."""
    folder = tmp_path_factory.mktemp("packed") / "digits"
    with pytest.MonkeyPatch.context() as patch:
        write = pack._write
        patch.setattr(
            pack,
            "_write",
            lambda folder, part, examples, shard_bytes: write(folder, part, examples, 40_000),
        )
        pack.pack("digits", folder)
    assert len(shard_files.find(folder)[0]["train"]) > 3
    return folder


@pytest.fixture
def copy(packed, tmp_path):
    """A copy that may be damaged."""
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def write_raw(folder, images, compression=""):
    """Training and test shards of these images, as raw bytes; their labels are 0, 1, 2, 0 …"""
    folder.mkdir()
    for part in ("train", "test"):
        path, options = folder / f"{part}-0.tfrecord", tf.io.TFRecordOptions(compression)
        with tf.io.TFRecordWriter(str(path), options) as writer:
            for index, image in enumerate(images):
                writer.write(pack.example(image, index % 3, "raw"))


def result(folder):
    return json.loads((folder / "digits-001" / "result.json").read_text())


@pytest.mark.quick
def test_what_is_packed_is_read_again_at_any_place(packed, digits, random):
    data = tfloop.load(str(packed))
    assert data.image_shape == (8, 8, 1) and data.classes == 10
    for part in ("train", "test"):
        found, expected = getattr(data, part), getattr(digits, part)
        np.testing.assert_array_equal(found.inputs[:], expected.inputs)
        np.testing.assert_array_equal(found.targets, expected.targets)
    rows = random.permutation(len(digits.train))[:50]
    np.testing.assert_array_equal(data.train.inputs[rows], digits.train.inputs[rows])
    np.testing.assert_array_equal(data.train.take(rows).inputs[3:7], digits.train.inputs[rows[3:7]])
    np.testing.assert_allclose(data.standardizer.mean, digits.standardizer.mean, rtol=1e-6)
    np.testing.assert_allclose(data.standardizer.scale, digits.standardizer.scale, rtol=1e-6)


@pytest.mark.parametrize("pipeline", ["auto", "host", "resident"])
def test_training_from_shards_is_training_from_memory_bit_for_bit(packed, tmp_path, pipeline):
    for name, dataset in (("memory", "digits"), ("shards", str(packed))):
        assert (
            main(
                [
                    "train",
                    *SMALL,
                    f"--dataset={dataset}",
                    f"--pipeline={pipeline}",
                    f"--logdir={tmp_path / name}",
                    "--summaries=full",
                ]
            )
            == 0
        )
    one, other = result(tmp_path / "memory"), result(tmp_path / "shards")
    assert other["weights_sha256"] == one["weights_sha256"]
    assert other["final"] | {"seconds": 0} == one["final"] | {"seconds": 0}
    assert other["pipeline"] == {"auto": "prefetch"}.get(pipeline, pipeline)


def test_it_resumes_in_the_middle_of_an_epoch(packed, tmp_path):
    def make():
        return tfloop.Config.make(
            "digits",
            conv=(4,),
            dense=(8,),
            batch_size=100,
            epochs=3,
            steps_per_call=4,
            dataset=str(packed),
            logdir=str(tmp_path),
            quiet=True,
            summaries="none",
        )

    whole = session.train(make())[0]
    asked = []
    cut = session.train(make(), stop=lambda: asked.append(None) or len(asked) == 6)[0]
    assert not cut["finished"] and cut["steps"] % 15
    resumed = session.train(make(), resume=[Path(cut["folder"])])[0]
    assert (
        resumed["state_sha256"] == whole["state_sha256"]
        and resumed["final"]["train"] == whole["final"]["train"]
    )


@pytest.mark.quick
def test_each_worker_reads_its_part_of_every_batch(packed):
    data = tfloop.load(str(packed))
    whole, *parts = [
        pipelines.Streamed(data.train, 96, False, part, of)
        for part, of in ((0, 1), (0, 3), (1, 3), (2, 3))
    ]
    # The last, of 93.
    whole_batch, *part_batches = [next(pipeline.begin(1, 2, 14)) for pipeline in (whole, *parts)]
    for found, expected in zip(zip(*part_batches), whole_batch):
        np.testing.assert_array_equal(tf.concat(found, axis=0), expected)


def test_decoded_images_are_kept_where_a_cache_is_asked_for(packed, tmp_path):
    flags = [
        *SMALL,
        f"--dataset={packed}",
        "--epochs=1",
        "--summaries=none",
        f"--cache={tmp_path}/cache",
    ]
    for name in ("a", "b"):
        assert main(["train", *flags, f"--logdir={tmp_path}/{name}"]) == 0
    assert result(tmp_path / "a")["weights_sha256"] == result(tmp_path / "b")["weights_sha256"]
    made = list((tmp_path / "cache").iterdir())
    assert len(made) == 1 and len(shard_files.find(made[0])[0]["train"]) == 1
    raw = shards.load(made[0]).train.inputs
    assert b"PNG" not in raw.read(np.arange(1))[0][0]
    assert main(["train", *SMALL, "--cache=x", f"--logdir={tmp_path}"]) == 2  # no shards


# --- packing


def test_validation_and_class_names_are_kept_in_packs_of_packs_and_in_caches(tmp_path, random):
    images = random.integers(0, 256, (8, 8, 8), dtype=np.uint8)
    one_hot = np.eye(2, dtype=np.float32)[np.arange(8) % 2]
    parts = {f"x_{part}": images for part in ("train", "val", "test")}
    np.savez(tmp_path / "a.npz", **parts, **{f"y{name[1:]}": one_hot for name in parts})
    pack.pack(str(tmp_path / "a.npz"), tmp_path / "once")
    (tmp_path / "once" / "classes.txt").write_text("cat\ndog\n")
    pack.pack(str(tmp_path / "once"), tmp_path / "twice")
    cached = pack.cached(tfloop.load(str(tmp_path / "once")), tmp_path / "cache")
    for folder in (tmp_path / "twice", cached):
        data = tfloop.load(str(folder))
        assert (len(data.train), len(data.validation), data.target.names) == (8, 8, ("cat", "dog"))
        assert data.validation.targets.tolist() == [0, 1] * 4
        np.testing.assert_array_equal(data.validation.inputs[:][..., 0], images)


@pytest.mark.parametrize(
    "targets, message",
    [
        (np.full((8, 2), 0.5, np.float32), "the targets are shares of several classes"),
        (np.linspace(0, 1.5, 8), "the targets are values; only one class of each image"),
    ],
)
def test_targets_that_shards_do_not_hold_are_not_packed(tmp_path, targets, message):
    images = np.zeros((8, 8, 8), np.uint8)
    np.savez(tmp_path / "a.npz", x_train=images, y_train=targets, x_test=images, y_test=targets)
    with pytest.raises(UserError, match=message):
        pack.pack(str(tmp_path / "a.npz"), tmp_path / "s")


@pytest.mark.parametrize("channels", [2, 5])
def test_images_of_any_number_of_channels_are_packed_and_read(tmp_path, random, channels):
    images = random.integers(0, 256, (6, 8, 8, channels), dtype=np.uint8)
    labels = np.arange(6) % 2
    np.savez(tmp_path / "a.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    if channels == 5:
        with pytest.raises(UserError, match="a PNG has 1 to 4 channels; use format=raw"):
            pack.pack(str(tmp_path / "a.npz"), tmp_path / "s")
    pack.pack(str(tmp_path / "a.npz"), tmp_path / "s", "raw" if channels == 5 else "png")
    np.testing.assert_array_equal(tfloop.load(str(tmp_path / "s")).train.inputs[:], images)


def picture(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    encode = tf.io.encode_jpeg if path.suffix == ".jpg" else tf.io.encode_png
    path.write_bytes(encode(pixels).numpy())


@pytest.mark.quick
@pytest.mark.parametrize("format", ["png", "raw"])
@pytest.mark.parametrize("divided", [True, False])
def test_a_folder_to_each_class_is_packed(tmp_path, random, format, divided):
    images = random.integers(0, 256, (40, 6, 5, 3), dtype=np.uint8)
    for i, image in enumerate(images):
        part = ("test" if i >= 32 else "train") if divided else ""
        picture(tmp_path / "in" / part / ("cat", "dog")[i % 2] / f"{i:02d}.png", image)
    assert main(["pack", f"{tmp_path}/in", f"{tmp_path}/out", f"--format={format}"]) == 0
    data = tfloop.load(str(tmp_path / "out"))
    assert (
        data.image_shape == (6, 5, 3)
        and (tmp_path / "out" / "classes.txt").read_text() == "cat\ndog\n"
    )
    train = [i for i in range(32 if divided else 36) if i % 2 == 0] + [
        i for i in range(32 if divided else 36) if i % 2
    ]
    np.testing.assert_array_equal(data.train.inputs[:], images[train])
    np.testing.assert_array_equal(data.train.targets, [i % 2 for i in train])
    assert len(data.test) == (8 if divided else 4)


def test_shards_of_others_with_their_names_for_things_and_jpeg_are_read(tmp_path, random):
    images = random.integers(0, 256, (6, 8, 8, 1), dtype=np.uint8)
    for part in ("train", "test"):
        with tf.io.TFRecordWriter(str(tmp_path / f"set-{part}.tfrecord-00000-of-00001")) as writer:
            for label, image in enumerate(images):
                feature = {
                    "image/encoded": tf.train.Feature(
                        bytes_list=tf.train.BytesList(value=[tf.io.encode_jpeg(image).numpy()])
                    ),
                    "image/class/label": tf.train.Feature(
                        int64_list=tf.train.Int64List(value=[label % 2])
                    ),
                }
                writer.write(
                    tf.train.Example(
                        features=tf.train.Features(feature=feature)
                    ).SerializeToString()
                )
    data = tfloop.load(str(tmp_path))
    np.testing.assert_array_equal(
        data.train.inputs[:], [tf.io.decode_jpeg(tf.io.encode_jpeg(image)) for image in images]
    )
    assert data.train.targets.tolist() == [0, 1] * 3


def test_packing_says_what_is_wrong_and_leaves_nothing(tmp_path, capsys):
    picture(tmp_path / "in" / "a" / "1.png", np.zeros((4, 4, 1), np.uint8))
    picture(tmp_path / "in" / "b" / "1.png", np.zeros((4, 4, 1), np.uint8))
    picture(tmp_path / "in" / "b" / "2.png", np.zeros((4, 5, 1), np.uint8))
    (tmp_path / "there").mkdir()
    (tmp_path / "broken" / "a").mkdir(parents=True)
    (tmp_path / "broken" / "a" / "1.png").write_bytes(b"nothing")
    (tmp_path / "broken" / "b").mkdir()
    for path in (
        "in/a/2.png",
        "few/a/1.png",
        "few/b/1.png",
        "one/a/1.png",
        "flat/1.png",
        "broken/a/2.png",
    ):
        picture(tmp_path / path, np.zeros((4, 4, 1), np.uint8))
    for source, folder, message in (
        ("in", "out", "in/b/2.png: is 4×5×1, those before it are 4×4×1; bring all to one size"),
        ("in", "there", "exists already"),
        ("broken", "out", "b: holds no pictures"),
        ("few", "out", "few/a: holds one picture; a class needs two or more"),
        ("nowhere", "out", "nowhere: does not exist"),
        ("one", "out", "one: holds 1 class folder; there must be two or more"),
        (
            "flat",
            "out",
            "flat: holds pictures; put those of each class into a folder of its own in it",
        ),
    ):
        assert main(["pack", f"{tmp_path}/{source}", f"{tmp_path}/{folder}"]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "broken",
        "few",
        "flat",
        "in",
        "one",
        "there",
    ]


# --- damage


def damage(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def place(folder: Path, row: int) -> tuple[Path, int, int, int]:
    """(shard, number in it, offset of its content, length) of a training record."""
    images = tfloop.load(str(folder)).train.inputs
    shard, number, offset, length = (
        int(images.index[name][row]) for name in ("shard", "number", "offset", "length")
    )
    return images.files[shard], number, offset, length


@pytest.mark.quick
def test_a_damaged_record_is_named_with_its_number_or_left_out_and_counted(copy, tmp_path, capsys):
    path, number, offset, _ = place(copy, 321)
    damage(path, offset + 20)
    flags = [*SMALL, f"--dataset={copy}", "--epochs=1", "--summaries=none"]
    for _ in range(2):  # indexed anew, and from the index
        assert main(["train", *flags, f"--logdir={tmp_path}/stop"]) == 2
        error = capsys.readouterr().err
        assert (
            error.startswith(f"tfloop: {path}: record {number} is damaged")
            and error.count("\n") == 1
        ), error
    assert main(["train", *flags, f"--logdir={tmp_path}/skip", "--on_bad_record=skip"]) == 0
    assert (
        f"1 damaged record is left out; the first: {path}: record {number}"
        in capsys.readouterr().err
    )
    found = result(tmp_path / "skip")
    assert found["left_out"] == [f"{path}: record {number} is damaged: its CRC is wrong"]
    assert len(tfloop.load(str(copy), on_bad_record="skip").train) == 1436


def test_a_damaged_length_costs_that_record_alone(copy):
    path, number, offset, _ = place(copy, 700)
    damage(path, offset - tfrecords.HEADER)
    with pytest.raises(
        UserError, match=re.escape(f"{path}: record {number} is damaged, and so is its length")
    ):
        tfloop.load(str(copy))
    assert len(tfloop.load(str(copy), on_bad_record="skip").train) == 1436


def test_of_a_tail_of_zeros_every_lost_record_is_counted(tmp_path, random):
    """As a machine leaves it that went down: raw records have one length, so the count is exact."""
    write_raw(tmp_path / "raw", random.integers(0, 256, (30, 5, 4, 1), dtype=np.uint8))
    path = tmp_path / "raw" / "train-0.tfrecord"
    content = path.read_bytes()
    length = len(content) // 30
    path.write_bytes(content[: 21 * length] + bytes(9 * length))
    data = tfloop.load(str(tmp_path / "raw"), on_bad_record="skip")
    assert len(data.train) == 21 and len(data.left_out) == 9


@pytest.mark.parametrize("length", [0x8B1F, 0x9C78], ids=["gzip", "zlib"])
def test_a_plain_shard_whose_first_length_looks_like_a_compressed_file_is_plain(tmp_path, length):
    with tf.io.TFRecordWriter(str(tmp_path / "train-0.tfrecord")) as writer:
        writer.write(b"x" * length)
    assert shard_files.find(tmp_path)[0]["train"] == [tmp_path / "train-0.tfrecord"]


@pytest.mark.parametrize("kind", ["GZIP", "ZLIB"])
def test_compressed_shards_are_read_as_plain_ones(tmp_path, random, kind):
    images = random.integers(0, 256, (12, 5, 4, 1), dtype=np.uint8)
    write_raw(tmp_path / "plain", images)
    write_raw(tmp_path / "packed", images, kind)
    plain, packed = (tfloop.load(str(tmp_path / folder)) for folder in ("plain", "packed"))
    np.testing.assert_array_equal(plain.train.inputs[:], packed.train.inputs[:])
    assert plain.fingerprint == packed.fingerprint
    path = tmp_path / "packed" / "train-0.tfrecord"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match="train-0.tfrecord: is damaged: .*early"):
        tfloop.load(str(tmp_path / "packed"))


def test_a_shard_that_is_made_to_fill_the_disk_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tfrecords, "SURELY", 1 << 20)
    options = tf.io.TFRecordOptions("GZIP")
    for part in ("train", "test"):
        with tf.io.TFRecordWriter(str(tmp_path / f"{part}-0.tfrecord"), options) as writer:
            writer.write(bytes(1 << 25))
    with pytest.raises(UserError, match="unpacks to more than 100 times its size"):
        tfloop.load(str(tmp_path))
    assert not list((tmp_path / ".unpacked").iterdir())


def test_joined_zlib_streams_are_read_to_their_end(tmp_path, random):
    images = random.integers(0, 256, (12, 5, 4, 1), dtype=np.uint8)
    for part, rows in (("a", slice(6)), ("b", slice(6, 12)), ("whole", slice(12))):
        write_raw(tmp_path / part, images[rows], "ZLIB")
    joined = b"".join((tmp_path / part / "train-0.tfrecord").read_bytes() for part in "ab")
    (tmp_path / "whole" / "train-0.tfrecord").write_bytes(joined)
    np.testing.assert_array_equal(tfloop.load(str(tmp_path / "whole")).train.inputs[:], images)


def test_bytes_of_an_unknown_number_of_channels_are_no_images(tmp_path):
    """height and width alone: 4 bytes a pixel may be one float32."""
    feature = {
        "image_raw": np.zeros((5, 4), np.float32).tobytes(),
        "height": 5,
        "width": 4,
        "label": 0,
    }
    kinds = {bytes: "bytes_list", int: "int64_list"}
    example = tf.train.Example()
    for name, value in feature.items():
        getattr(example.features.feature[name], kinds[type(value)]).value.append(value)
    for part in ("train", "test"):
        with tf.io.TFRecordWriter(str(tmp_path / f"{part}-0.tfrecord")) as writer:
            writer.write(example.SerializeToString())
    with pytest.raises(UserError, match="holds 4 bytes a pixel and does not say how many channels"):
        tfloop.load(str(tmp_path))


def test_two_sets_of_one_part_are_refused(tmp_path, random):
    images = random.integers(0, 256, (6, 5, 4, 1), dtype=np.uint8)
    write_raw(tmp_path / "s", images)
    path = tmp_path / "s" / "train-0.tfrecord"
    for name in ("train", "training"):
        shutil.copy(path, tmp_path / "s" / f"{name}-00000-of-00001.tfrecord")
    path.unlink()
    with pytest.raises(UserError, match="holds shards of two sets, train-… and training-…"):
        tfloop.load(str(tmp_path / "s"))


def test_two_damaged_records_and_a_truncated_end_are_all_found(copy):
    path, _number, offset, _ = place(copy, 100)
    damage(path, offset + 3)
    damage(path, place_after(path, 2) + 3)
    last = shard_files.find(copy)[0]["train"][-1]
    with open(last, "r+b") as file:
        file.truncate(last.stat().st_size - 5)
    data = tfloop.load(str(copy), on_bad_record="skip")
    assert len(data.left_out) == 3 and len(data.train) == 1434
    assert sum("truncated" in each for each in data.left_out) == 1


def place_after(path: Path, number: int) -> int:
    """The offset of the content of a record of a shard, by its number."""
    return next(offset for found, offset, _, _ in tfrecords.records(path) if found == number)


@pytest.mark.parametrize("on_bad_record", ["stop", "skip"])
def test_a_record_that_is_damaged_after_it_was_indexed_is_noticed_while_training(
    copy, tmp_path, capsys, on_bad_record
):
    path, number, offset, length = place(copy, 5)
    about = path.stat()
    damage(path, offset + length // 2)
    # Nothing about the file has changed but its content.
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    code = main(
        [
            "train",
            *SMALL,
            "--epochs=1",
            f"--dataset={copy}",
            f"--logdir={tmp_path}/runs",
            f"--on_bad_record={on_bad_record}",
        ]
    )
    error = capsys.readouterr().err
    if on_bad_record == "stop":
        assert (
            code == 2
            and f"{path}: record {number} is damaged: it is not the one that was indexed" in error
        )
    else:
        assert code == 0 and f"{path}: record {number} is damaged: left out" in error
        found = result(tmp_path / "runs")
        assert (
            found["left_out"] == [f"{path}: record {number}"]
            and found["final"]["train"]["accuracy"] > 0
        )


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda folder: None, "has no train shards"),
        (lambda folder: (folder / "train-0.tfrecord").write_bytes(b""), "has no test shards"),
        (
            lambda folder: [
                (folder / f"{part}-0.tfrecord").write_bytes(b"") for part in ("train", "test")
            ],
            "there are no records in",
        ),
        (
            lambda folder: [
                (folder / f"{part}-0.tfrecord").write_bytes(b"nonsense" * 9)
                for part in ("train", "test")
            ],
            "record 0 is truncated",
        ),
        (
            lambda folder: [
                write(folder / f"{part}-0.tfrecord", b"\xff\xff") for part in ("train", "test")
            ],
            "record 0 is no tf.train.Example",
        ),
        (
            lambda folder: [
                write(folder / f"{part}-0.tfrecord", tf.train.Example().SerializeToString())
                for part in ("train", "test")
            ],
            "record 0 has no image",
        ),
    ],
)
def test_a_folder_of_shards_that_makes_no_sense_is_named(tmp_path, make, message):
    (tmp_path / "x.tfrecord").write_bytes(b"")
    make(tmp_path)
    with pytest.raises(UserError, match=message):
        tfloop.load(str(tmp_path))


def write(path: Path, record: bytes) -> None:
    with tf.io.TFRecordWriter(str(path)) as writer:
        writer.write(record)


def test_a_damaged_or_stale_index_is_made_anew(copy):
    (copy / "index.npz").write_bytes(b"nothing")
    assert len(tfloop.load(str(copy)).train) == 1437
    path = shard_files.find(copy)[0]["train"][0]
    os.utime(path, (1, 1))
    before = (copy / "index.npz").stat().st_mtime_ns
    assert (
        len(tfloop.load(str(copy)).train) == 1437
        and (copy / "index.npz").stat().st_mtime_ns > before
    )


# --- memory

STREAM = """
import resource, sys
import numpy as np
from tfloop import config
from tfloop.machine import devices
small = dict(conv=(2,), pool=(8,), dense=(4,), batch_size=64, steps_per_call=10)
settings, *_ = devices.start(config.Config.make(dataset=sys.argv[1], **small))
from tfloop import assembly
from tfloop.training import saved_run
from tfloop.records import Call
loop = assembly.make_loop(settings)
records = loop.run(1)
loop.evaluate(loop.data.test)
for _ in range(3):
    next(records)  # all is made that will be
status = open("/proc/self/status").read()
used = int(status.partition("VmData:")[2].split()[0]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (used + (96 << 20),) * 2)  # 96 MiB more, and no more
steps = sum(record.steps for record in records if isinstance(record, Call))
print("streamed", steps, loop.data.train.inputs.nbytes >> 20)
try:
    np.ones(loop.data.train.inputs.shape, np.uint8)
except MemoryError:
    print("in memory they have no room")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits its memory by RLIMIT_DATA")
def test_data_of_several_times_the_memory_that_is_left_are_streamed(tmp_path, random):
    """300 MiB of images, with room for 96."""
    images = random.integers(0, 256, (64, 96, 96, 3), dtype=np.uint8)
    for part, count in (("train", 11_400), ("test", 100)):
        with tf.io.TFRecordWriter(str(tmp_path / f"{part}-00000-of-00001.tfrecord")) as writer:
            examples = [pack.example(image, i % 10, "raw") for i, image in enumerate(images)]
            for i in range(count):
                writer.write(examples[i % 64])
    done = subprocess.run(
        [sys.executable, "-c", STREAM, tmp_path], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"streamed 149 300\nin memory they have no room", done.stdout), done.stdout


def test_a_png_that_is_just_as_long_as_its_raw_bytes_is_still_a_png(tmp_path, random):
    """And encoded and raw images may stand in one shard."""
    images = []
    while len(images) < 4:  # a noisy strip makes the PNG about as long as 784 bytes
        image = np.zeros((28, 28, 1), np.uint8)
        image.reshape(-1)[: random.integers(640, 720)] = random.integers(
            0, 256, 28 * 28, dtype=np.uint8
        )[:1]
        flat, count = image.reshape(-1), int(random.integers(600, 740))
        flat[:count] = random.integers(0, 256, count)
        if len(tf.io.encode_png(image).numpy()) == 784:
            images.append(image)
    for part in ("train", "test"):
        with tf.io.TFRecordWriter(str(tmp_path / f"{part}-0.tfrecord")) as writer:
            for label, image in enumerate(images):
                writer.write(pack.example(image, label, "raw" if label == 2 else "png"))
    data = tfloop.load(str(tmp_path))
    assert data.train.inputs.index["raw"].tolist() == [False, False, True, False]
    np.testing.assert_array_equal(data.train.inputs[:], images)
    np.testing.assert_array_equal(
        next(pipelines.Streamed(data.train, 4, False).begin(0, 0, 0)).inputs,
        np.array(images)[pipelines.order(0, 0, 4).numpy()],
    )


def test_a_cache_in_the_data_folder_leaves_out_what_is_damaged_and_outlives_new_dates(
    copy, tmp_path
):
    path, _number, offset, _ = place(copy, 321)
    damage(path, offset + 20)
    flags = [*SMALL, "--epochs=1", "--summaries=none", f"--dataset={copy}", "--on_bad_record=skip"]
    for name, more in (("a", []), ("b", [f"--cache={copy}/cache"])):
        assert main(["train", *flags, *more, f"--logdir={tmp_path}/{name}"]) == 0
    one, other = result(tmp_path / "a"), result(tmp_path / "b")
    assert (
        other["left_out"] == one["left_out"]
        and len(one["left_out"]) == 1
        and other["weights_sha256"] == one["weights_sha256"]
    )
    os.utime(path, (1, 1))
    assert main(["train", *flags, f"--cache={copy}/cache", f"--logdir={tmp_path}/c"]) == 0
    assert main(["evaluate", str(tmp_path / "c" / "digits-001"), "--dataset=digits"]) == 0
