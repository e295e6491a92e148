import json

import pytest

from tfloop.config import PRESETS, Config
from tfloop.errors import UserError

pytestmark = pytest.mark.quick


def test_default_is_the_articles_first_network():
    config = Config.make()
    assert (config.conv, config.dense, config.optimizer, config.learning_rate) == (
        (32, 64, 64),
        (70,),
        "rmsprop",
        0.001,
    )
    assert (config.batch_size, config.epochs, config.schedule) == (64, 5, "constant")


def test_article3_has_the_power_schedule_momentum_and_l2():
    config = Config.make("article3_32")
    assert (config.conv, config.dense, config.l2, config.momentum) == (
        (32, 64, 128),
        (120,),
        0.001,
        0.9,
    )
    assert (config.schedule, config.decay_steps, config.decay_rate, config.epochs) == (
        "inverse_time",
        1,
        0.001,
        80,
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_survives_a_round_trip_through_json(preset):
    config = Config.make(preset, seed=7)
    assert Config.make(**json.loads(config.to_json())) == config


def test_a_value_beside_the_preset_wins():
    assert Config.make("article3", momentum=0.5).momentum == 0.5


def test_text_is_taken_as_flags_give_it():
    config = Config.make(
        conv="8,16", pool="2", l2="1e-3", epochs="2", momentum="", batch_norm="true"
    )
    assert (config.conv, config.pool, config.l2, config.epochs) == ((8, 16), (2,), 0.001, 2)
    assert config.momentum is None and config.batch_norm is True


def test_another_optimizer_or_schedule_drops_the_presets_numbers_of_the_old_one():
    config = Config.make("article3", optimizer="adam", schedule="polynomial")
    assert config.momentum is None and config.decay_steps is None and config.decay_rate is None
    assert config.l2 == 0.0008 and Config.make("article3", optimizer="rmsprop").momentum == 0.8


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(preset=["x"]), r"preset=\['x'\] is unknown"),
        (dict(dropout=0.5, dense=()), "dropout=0.5 follows hidden dense layers"),
        (dict(schedule="cosine", t_mul=2), "t_mul and m_mul count with restarts only"),
        (dict(dense=10**12), "dense=1000000000000 is out of range"),
        (dict(preset="article9"), "preset=article9 is unknown; choose from article2"),
        (dict(nonsense=1), "there is no setting 'nonsense'"),
        (dict(epochs="five"), "epochs: expected a whole number, found 'five'"),
        (dict(epochs=2.5), "epochs: expected a whole number, found 2.5"),
        (dict(epochs=True), "epochs: expected a whole number, found True"),
        (dict(epochs=0), "epochs=0 is out of range: it must be at least 1"),
        (dict(momentum=1.5), "momentum=1.5 is out of range: it must lie between 0 and 1"),
        (dict(learning_rate="nan"), "learning_rate=nan is not a finite number"),
        (dict(l2=-1), "l2=-1.0 is out of range"),
        # All arithmetic is in float32, which takes these for infinity, or for 0.
        (dict(learning_rate=1e39), "learning_rate=1e\\+39 is out of range: float32 has numbers"),
        (dict(l2=1e-300), "l2=1e-300 is out of range: float32 has numbers"),
        (dict(boundaries="40,1e39"), "boundaries=1e\\+39 is out of range"),
        (dict(rate_of="conv:1e39"), "rate_of=conv:1e39: expected PATTERN:FACTOR"),
        (dict(name="a\0b"), "name='a.x00b' holds a character that no name can hold"),
        (dict(logdir="a\ud800b"), "logdir='a.ud800b' holds a character that no name can hold"),
        ({"cls": 1}, "there is no setting 'cls'"),
        # Python itself reads no number of so many digits.
        (dict(epochs="1" * 5000), "epochs: expected a whole number, found '1{90,} …"),
        (dict(epochs=10**5000), "epochs: expected a whole number, found a number of very many"),
        (dict(checkpoint_every="1" * 5000), "checkpoint_every=1{80,} …"),
        (dict(profile="1:" + "2" * 5000), "profile=1:2{80,} …"),
        (dict(optimizer="lamb"), "optimizer=lamb is unknown; choose from sgd, rmsprop"),
        (dict(conv="8,x"), "conv: expected a whole number, found 'x'"),
        (dict(name=3), "name: expected text, found 3"),
        (dict(kernel=(3, 3)), "kernel has 2 sizes for 3 convolutions"),
        (dict(conv=(8,), pool=(2, 2)), "pool has 2 sizes for 1 convolution:"),
        (dict(conv=(), pool=(3,)), "pool: there is no convolution"),
        (dict(l2=0.1, penalize="none"), "l2=0.1 has no kernels to penalise"),
        (dict(l1=0.1, penalize="conv", conv=()), "l1=0.1 has no kernels to penalise"),
        (dict(schedule="piecewise"), "schedule=piecewise needs boundaries"),
        (dict(schedule="piecewise", boundaries="5,3", rates="1,2"), "boundaries=5,3 must rise"),
        (dict(eager=True, jit_compile=True), "eager and jit_compile exclude each other"),
        (dict(seeds="1,2", runs=2), "seeds and runs exclude each other"),
        (
            dict(clip_norm=1, clip_value=1),
            "clip_value, clip_norm and clip_global_norm exclude each other",
        ),
        (
            dict(early_stopping=3),
            "early_stopping=3 looks at validation images, and there are none",
        ),
        (dict(accumulate=3), "accumulate=3 does not divide batch_size=64"),
        (
            dict(check_numerics=True, precision="mixed_float16"),
            "check_numerics and precision=mixed_float16 exclude each other",
        ),
        (dict(ensemble=2, runs=2), "ensemble=2 and runs exclude each other"),
        (dict(seeds="1,2", seed=2), "seed and seeds exclude each other"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_found(values, message):
    with pytest.raises(UserError, match="^" + message.replace("(", r"\(")):
        Config.make(**values)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not JSON"),
        ("[1]", "expected one JSON object of settings, found list"),
        (None, "cannot be read"),
    ],
)
def test_a_config_file_that_cannot_be_used_is_named(tmp_path, content, message):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=f"config={path}: {message}"):
        Config.read(path)
