"""Pictures as people have them: read by one rule, taken or left out by name, and never changed
without a word."""

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import tfloop
from tfloop.cli import main
from tfloop.data import pack, pictures, shard_files, spec
from tfloop.errors import UserError
from tfloop.training import predictions

pytestmark = pytest.mark.quick
RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8)
COLOUR = np.stack([RAMP, RAMP[::-1], 255 - RAMP], axis=-1)


def read(path, mode=None):
    picture = pictures.look(path)
    return picture, pictures.read(picture, mode or picture.mode)


@pytest.mark.parametrize(
    ("name", "image", "mode", "expected"),
    [
        ("grey.png", Image.fromarray(RAMP), "L", RAMP[..., None]),
        ("colour.png", Image.fromarray(COLOUR), "RGB", COLOUR),
        ("colour.bmp", Image.fromarray(COLOUR), "RGB", COLOUR),
        ("colour.TIF", Image.fromarray(COLOUR), "RGB", COLOUR),
        ("one bit.png", Image.fromarray(RAMP > 30), "L", 255 * (RAMP > 30)[..., None]),
        ("palette.bmp", Image.fromarray(COLOUR).quantize(200), "RGB", None),
        ("grey palette.png", Image.fromarray(RAMP).convert("P"), "L", RAMP[..., None]),
        ("opaque.png", Image.fromarray(COLOUR).convert("RGBA"), "RGB", COLOUR),
        (
            "cmyk.tiff",
            Image.fromarray(COLOUR).convert("CMYK"),
            "RGB",
            np.asarray(Image.fromarray(COLOUR).convert("CMYK").convert("RGB")),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else "",
)
def test_a_picture_is_what_its_viewer_shows(tmp_path, name, image, mode, expected):
    image.save(tmp_path / name)
    picture, pixels = read(tmp_path / name)
    assert picture.mode == mode and pixels.shape == (8, 8, pictures.CHANNELS[mode])
    if expected is not None:
        np.testing.assert_array_equal(pixels, expected)
    else:  # a palette has its colours, not its indices
        assert np.abs(pixels.astype(int) - COLOUR).max() < 16


def test_transparency_is_a_fourth_channel(tmp_path):
    image = Image.fromarray(COLOUR).convert("RGBA")
    image.putpixel((2, 3), (1, 2, 3, 40))
    image.save(tmp_path / "clear.png")
    picture, pixels = read(tmp_path / "clear.png")
    assert picture.mode == "RGBA" and pixels[3, 2].tolist() == [1, 2, 3, 40]


def test_orientation_is_followed(tmp_path):
    image = Image.fromarray(COLOUR[:4])
    exif = image.getexif()
    exif[0x112] = 6  # to be turned by 90° to the right
    image.save(tmp_path / "turned.png", exif=exif)
    picture, pixels = read(tmp_path / "turned.png")
    assert not picture.is_plain
    np.testing.assert_array_equal(pixels, np.rot90(COLOUR[:4], -1))


def test_of_an_animation_the_first_frame_is_read(tmp_path):
    frames = [Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (10, 200)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert (read(tmp_path / "moving.gif")[1] == 10).all()


def test_what_is_plain_is_read_as_in_training(tmp_path):
    """JPEG: TensorFlow's decoder and Pillow's differ by a few levels; training has TensorFlow's."""
    Image.fromarray(COLOUR).resize((32, 32)).save(tmp_path / "photo.jpg", quality=60)
    picture, pixels = read(tmp_path / "photo.jpg")
    content = (tmp_path / "photo.jpg").read_bytes()
    assert picture.is_plain
    np.testing.assert_array_equal(pixels, tf.io.decode_image(content))


@pytest.mark.parametrize("deep", [np.uint16, np.int32, np.float32])
def test_more_than_8_bits_are_refused(tmp_path, deep):
    Image.fromarray(RAMP.astype(deep)).save(tmp_path / "deep.tiff")
    with pytest.raises(UserError, match="has more than 8 bits a channel"):
        pictures.look(tmp_path / "deep.tiff")


@pytest.mark.parametrize("ending", ["png", "ppm"])
def test_so_are_16_bits_of_colour(tmp_path, ending):
    deep = np.full((8, 8, 3), 300, np.uint16)
    ppm = b"P6 8 8 65535\n" + deep.astype(">u2").tobytes()
    content = ppm if ending == "ppm" else tf.io.encode_png(deep).numpy()
    path = tmp_path / f"deep.{ending}"
    path.write_bytes(content)
    with pytest.raises(UserError, match="has more than 8 bits a channel"):
        pictures.look(path)


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_what_is_no_picture_is_named(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.png: cannot be read as a picture"):
        pictures.look(tmp_path / "x.png")


def tree(root, *paths, image=None):
    for number, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (image or Image.fromarray(RAMP + number)).save(root / path)


def test_a_tree_is_packed_whole_or_counted(tmp_path):
    own = [f"{kind}/{n}.{end}" for kind in "ab" for n, end in enumerate(("png", "bmp", "TIF"))]
    tree(tmp_path / "p", *own, "a/more/x.png", ".ipynb_checkpoints/0.png", "a/.hidden.png")
    (tmp_path / "p/a/notes.txt").write_text("x")
    (tmp_path / "p/readme.md").write_text("x")
    told = []
    data = pack.pack(str(tmp_path / "p"), tmp_path / "s", say=told.append)
    assert len(data.train) + len(data.test) == 7
    assert (tmp_path / "s/classes.txt").read_text() == "a\nb\n"
    assert told == [
        "7 pictures taken",
        "4 files left out: 1 .txt, 1 beside the classes, 1 hidden, 1 in .ipynb_checkpoints",
    ]


@pytest.mark.parametrize("name", ["val", "validation", "valid"])
def test_validation_pictures_are_validation_examples(tmp_path, name):
    parts = ("train", "test", name)
    tree(
        tmp_path / "p", *[f"{part}/{kind}/{n}.png" for part in parts for kind in "ab" for n in "12"]
    )
    data = pack.pack(str(tmp_path / "p"), tmp_path / "s")
    assert [len(part) for part in (data.train, data.validation, data.test)] == [4, 4, 4]
    again = tfloop.load(str(tmp_path / "s"))  # by its index
    np.testing.assert_array_equal(again.validation.inputs[:], data.validation.inputs[:])
    with pytest.raises(UserError, match="has validation shards of its own"):
        tfloop.load(str(tmp_path / "s"), validation_size=2)


@pytest.mark.parametrize(
    "folders, found",
    [
        (("Train", "Test", "eval"), (4, 2, 2)),
        (("training", "validation"), (4, 0, 2)),  # (training, validation, test)
        (("car", "train"), (2, 0, 2)),  # a class may be called so
    ],
)
def test_parts_are_known_by_any_of_their_names(tmp_path, folders, found):
    """Where there is only a validation, it is the test, and that is said."""
    names = ["car", "train"]
    if folders == ("car", "train"):
        paths = [f"{name}/{n}.png" for name in names for n in range(2)]
    else:
        per_class = {folder: 2 if folder.lower().startswith("train") else 1 for folder in folders}
        paths = [
            f"{folder}/{name}/{n}.png"
            for folder in folders
            for name in names
            for n in range(per_class[folder])
        ]
    tree(tmp_path / "p", *paths)
    said = []
    data = pack.pack(str(tmp_path / "p"), tmp_path / "s", say=said.append)
    assert tuple(map(len, (data.train, data.validation, data.test))) == found
    assert data.target.names == ("car", "train")
    is_told = any("has no test examples" in line for line in said)
    assert is_told == (folders == ("training", "validation"))


def test_the_name_of_a_class_is_one_line(tmp_path):
    for name in ("cat", "a\ndog"):
        (tmp_path / "in" / name).mkdir(parents=True)
        for picture in ("1.png", "2.png"):
            Image.fromarray(COLOUR).save(tmp_path / "in" / name / picture)
    with pytest.raises(UserError, match="the name of a class is one line; rename it"):
        pack.pack(str(tmp_path / "in"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "names",
    [("training_set", "test_set"), ("seg_train", "seg_test"), ("Train images", "Val images")],
)
def test_parts_are_told_by_the_words_of_their_names(tmp_path, names):
    for name in names:
        for kind in ("cat", "dog"):
            (tmp_path / "in" / name / kind).mkdir(parents=True)
            Image.fromarray(COLOUR).save(tmp_path / "in" / name / kind / "1.png")
    data = pack.pack(str(tmp_path / "in"), tmp_path / "out")
    assert data.target.names == ("cat", "dog") and len(data.train) == len(data.test) == 2


@pytest.mark.parametrize(
    "names",
    [("test tube", "train station"), ("test a", "test b"), ("test a", "train a", "train b")],
)
def test_classes_may_have_the_name_of_a_part_in_theirs(tmp_path, names):
    for name in names:
        for place in ("", "more"):
            (tmp_path / "in" / name / place).mkdir(parents=True, exist_ok=True)
            Image.fromarray(COLOUR).save(tmp_path / "in" / name / place / "1.png")
    assert pack.pack(str(tmp_path / "in"), tmp_path / "out").target.names == names


def test_a_part_without_those_beside_it_is_no_class(tmp_path):
    tree(tmp_path / "p", "train/a/1.png", "train/b/1.png", "more/a/1.png")
    (tmp_path / "p/train/.DS_Store").write_text("")
    with pytest.raises(UserError, match="train: is named like a part of a data set"):
        pack.pack(str(tmp_path / "p"), tmp_path / "s")


def test_a_linked_folder_is_followed_and_the_systems_folders_are_not(tmp_path):
    tree(tmp_path / "p", "a/1.png", "a/2.png", "b/1.png", "b/2.png", "__MACOSX/a/1.png")
    tree(tmp_path / "more", "3.png")
    (tmp_path / "p/a/more").symlink_to(tmp_path / "more")
    (tmp_path / "more/loop").symlink_to(tmp_path / "more")
    said = []
    pack.pack(str(tmp_path / "p"), tmp_path / "s", say=said.append)
    assert said == ["5 pictures taken", "1 file left out: 1 in __MACOSX"]


def test_grey_pictures_beside_coloured_ones_become_rgb(tmp_path):
    tree(tmp_path / "p", "a/0.png", "a/1.png", "b/0.png")
    tree(tmp_path / "p", "b/1.png", image=Image.fromarray(COLOUR))
    told = []
    data = pack.pack(str(tmp_path / "p"), tmp_path / "s", say=told.append)
    assert data.image_shape == (8, 8, 3) and told[:2] == [
        "4 pictures taken",
        "3 L pictures became RGB",
    ]


def test_predict_reads_what_pack_reads(tmp_path, capsys):
    own = [f"{kind}/{n}.bmp" for kind in "ab" for n in range(8)]
    tree(tmp_path / "p", *own)
    assert main(["pack", str(tmp_path / "p"), str(tmp_path / "s")]) == 0
    small = ["--conv=2", "--pool=", "--dense=4", "--batch_size=4", "--epochs=1", "--quiet"]
    assert main(["train", f"--dataset={tmp_path}/s", *small, f"--logdir={tmp_path}/r"]) == 0
    run = str(tmp_path / "r/article2-001")
    np.save(tmp_path / "x.npy", RAMP[None])
    capsys.readouterr()
    for source, rows in (("p", 16), ("p/a", 8), ("p/a/0.bmp", 1), ("x.npy", 1)):
        assert main(["predict", run, str(tmp_path / source)]) == 0
        assert len(capsys.readouterr().out.splitlines()) == rows + 1, source


SPEC = spec.of_images((8, 8, 1), 2, "float32")


@pytest.mark.parametrize(
    "low, high, expected",
    [(0, 255, 51.0), (0, 1, 0.2), (0.01, 0.98, 0.2), (-1, 1, -0.6), (-0.5, 0.5, -0.3)],
)
def test_pictures_are_scaled_as_the_training_was(tmp_path, low, high, expected):
    Image.fromarray(np.full((8, 8), 51, np.uint8)).save(tmp_path / "a.png")
    _, inputs = predictions.read_inputs(tmp_path / "a.png", SPEC, {"": [low, high]})
    np.testing.assert_allclose(inputs, np.full((1, 8, 8, 1), expected), atol=1e-6)


@pytest.mark.parametrize("low, high", [(-128, 127), (0, 16), (0, 100), (-0.02, 1.04)])
def test_pictures_for_a_scale_that_nobody_knows_are_refused(tmp_path, low, high):
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=f"float32 from {low:g} to {high:g}; give the numbers"):
        predictions.read_inputs(tmp_path / "a.png", SPEC, {"": [low, high]})


def test_what_pictures_lose_when_they_are_predicted_is_said(tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / "a.png")
    (tmp_path / "notes").write_text("x")
    grey, said = spec.of_images((8, 8, 1), 2), []
    predictions.read_inputs(tmp_path, grey, {"": [0, 10]}, said.append)
    assert [line.partition(": ")[2] for line in said] == [
        "1 file left out: 1 without an ending",
        "1 RGB picture became L, as in training",
        "pixels go up to 67, in training to 10; are they scaled otherwise?",
    ]


def records(folder, **parts):
    """Shards of the features that are given, a list for each part."""
    folder.mkdir()
    for part, rows in parts.items():
        with tf.io.TFRecordWriter(str(folder / f"{part}.tfrecord")) as file:
            for features in rows:
                example = tf.train.Example(features=tf.train.Features(feature=features))
                file.write(example.SerializeToString())
    return str(folder)


def row(label, image="image", name="label"):
    png = tf.io.encode_png(RAMP[..., None]).numpy()
    return {image: tf.train.Feature(bytes_list=tf.train.BytesList(value=[png])), name: label}


def whole(*values):
    return tf.train.Feature(int64_list=tf.train.Int64List(value=values))


@pytest.mark.parametrize("names", [("image_raw", "label"), ("image/encoded", "image/class/label")])
def test_shards_of_tutorials_are_read(tmp_path, names):
    rows = [row(whole(n % 3), *names) for n in range(6)]
    data = tfloop.load(records(tmp_path / "s", train=rows, test=rows))
    assert data.train.targets.tolist() == [0, 1, 2, 0, 1, 2]
    np.testing.assert_array_equal(data.train.inputs[:1][0, ..., 0], RAMP)


def png(*shape, dtype=np.uint8):
    pixels = np.arange(np.prod(shape), dtype=dtype).reshape(shape)
    return tf.train.Feature(bytes_list={"value": [tf.io.encode_png(pixels).numpy()]})


def test_pictures_of_shards_all_have_as_many_channels_as_the_widest(tmp_path):
    grey, colour = {"image": png(8, 8, 1)}, {"image": png(8, 8, 3)}
    rows = [{**(grey if n < 2 else colour), "label": whole(n % 2)} for n in range(6)]
    data = tfloop.load(records(tmp_path / "s", train=rows, test=rows))
    assert data.train.inputs.shape == (6, 8, 8, 3)
    assert data.notes == ("4 pictures of 1 channel read with 3",)  # 2 of each part
    grey_pixels = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
    np.testing.assert_array_equal(data.train.inputs[:1][0], np.repeat(grey_pixels, 3, axis=-1))


@pytest.mark.parametrize(
    "image, message",
    [
        (png(8, 8, 3, dtype=np.uint16), "a PNG of 16 bits a channel"),
        (whole(1, 2), "has 2 numbers under image, not the bytes of one image"),
        (tf.train.Feature(bytes_list={"value": [b"x" * 128]}), "neither PNG, JPEG, GIF, BMP nor"),
    ],
)
def test_an_image_that_would_be_cut_or_misread_is_named(tmp_path, image, message):
    rows = [{"image": image, "label": whole(n % 2)} for n in range(4)]
    with pytest.raises(UserError, match=f"record 0 .*{message}"):
        tfloop.load(records(tmp_path / "s", train=rows, test=rows))


def test_raw_bytes_have_the_tutorials_names_of_sizes(tmp_path):
    image = tf.train.Feature(bytes_list={"value": [bytes(range(128))]})
    sizes = {"image/height": whole(8), "image/width": whole(8), "depth": whole(2)}
    rows = [{"image_raw": image, "label": whole(n % 2), **sizes} for n in range(4)]
    data = tfloop.load(records(tmp_path / "s", train=rows, test=rows))
    assert data.train.inputs[:1][0].tobytes() == bytes(range(128))


def test_a_one_hot_label_is_a_class_number(tmp_path):
    rows = [row(whole(*np.eye(3, dtype=int)[n % 3].tolist())) for n in range(6)]
    data = tfloop.load(records(tmp_path / "s", train=rows, test=rows))
    assert data.train.targets.tolist() == [0, 1, 2, 0, 1, 2] and data.classes == 3
    wide = [row(whole(*np.eye(5, dtype=int)[n % 3].tolist())) for n in range(6)]
    data = tfloop.load(records(tmp_path / "wide", train=wide, test=wide))
    assert data.classes == 5 and "no training example has class 3 and 1 more" in data.notes[0]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (whole(1, 1, 0), "has 3 numbers as a label in label, which are no one-hot row"),
        (whole(-1), "has the label -1 in label"),
        (
            tf.train.Feature(bytes_list=tf.train.BytesList(value=[b"cat"])),
            "has a label in label that is text",
        ),
        (tf.train.Feature(float_list=tf.train.FloatList(value=[0.5])), "has the label 0.5"),
        (tf.train.Feature(float_list={"value": [float("nan")]}), "has the label nan"),
        (tf.train.Feature(), "has the label nothing"),
    ],
)
def test_a_label_of_another_kind_is_named(tmp_path, label, message):
    good = [row(whole(n)) for n in range(2)]
    with pytest.raises(UserError, match=message):
        tfloop.load(records(tmp_path / "s", train=[*good, row(label)], test=good))


def test_labels_out_of_all_reason_are_refused(tmp_path):
    rows = [row(whole(n)) for n in (0, 1, 100_000)]
    with pytest.raises(UserError, match="labels go up to 100000, and only 3 different ones"):
        tfloop.load(records(tmp_path / "s", train=rows, test=rows[:1]))


def named(folder, *names):
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train-00000-of-00003.tfrecord"], "2 of 3 shards are missing, the first is train-00001"),
        (
            ["train-00000-of-00001.tfrecord", "train-00000-of-00002.tfrecord"],
            "holds shards of two sets",
        ),
        (["train-00000-of-00001.tfrecord.gz"], "is compressed"),
        (["train.tfrecords.zlib"], "is compressed"),
    ],
)
def test_shards_that_make_no_whole_are_named(tmp_path, names, message):
    with pytest.raises(UserError, match=message):
        shard_files.find(named(tmp_path / "s", *names))


@pytest.mark.parametrize(
    "other",
    ["train.tfrecord", "train-0-of-1.tfrecord", "train-00000-of-00001 (1).tfrecord"],
)
def test_a_shard_that_is_there_twice_by_its_name_is_refused(tmp_path, other):
    with pytest.raises(UserError, match="one shard by their names|shards of two sets"):
        shard_files.find(named(tmp_path / "s", "train-00000-of-00001.tfrecord", other))


def test_shards_that_hold_the_same_records_and_those_of_no_part_are_said(tmp_path):
    rows = [row(whole(n % 2)) for n in range(4)]
    rows[1]["image"] = png(8, 8, 1)
    folder = records(tmp_path / "s", train=rows, train_b=rows, test=rows, rest=rows)
    assert tfloop.load(folder).notes == (
        "1 shard of no part left out, the first is rest.tfrecord",
        "train.tfrecord and train_b.tfrecord hold the same records",
    )


def test_copies_and_hidden_files_are_no_shards(tmp_path):
    folder = named(
        tmp_path / "s",
        "train-00000-of-00001.tfrecord",
        "train-00000-of-00001.tfrecord.bak",
        "._train-00000-of-00001.tfrecord",
        ".train.tfrecord",
        "train.tfrecord~",
        "validation-00000-of-00001",
        "trained-00000-of-00001",
    )
    assert [path.name for path in shard_files.find(folder)[0]["train"]] == [
        "train-00000-of-00001.tfrecord"
    ]
    assert [path.name for path in shard_files.find(folder)[0]["validation"]] == [
        "validation-00000-of-00001"
    ]
