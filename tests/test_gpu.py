"""What needs a GPU. Skipped by name where TensorFlow sees none; benchmarks/gpu_check.sh runs it
where there is one."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

import tfloop

pytestmark = pytest.mark.gpu


def train(tmp_path, *flags):
    """result.json of a run on the digits in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "tfloop",
        "train",
        "--preset=digits",
        "--epochs=3",
        f"--logdir={tmp_path}",
        "--quiet",
        *flags,
    ]
    subprocess.run(command, check=True)
    newest = max(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    return json.loads((newest / "result.json").read_text())


@pytest.mark.parametrize("pipeline", ["resident", "prefetch", "host"])
def test_every_pipeline_follows_the_cpu(tmp_path, pipeline):
    """To 2 % of the loss after three epochs: sums run in another order."""
    on_gpu = train(tmp_path, "--device=gpu", f"--pipeline={pipeline}")
    on_cpu = train(tmp_path, "--device=cpu")
    assert on_gpu["final"]["train"]["total"] == pytest.approx(
        on_cpu["final"]["train"]["total"], rel=0.02
    )
    assert on_gpu["pipeline"] == pipeline and on_gpu["device"] != "CPU"


def test_deterministic_operations_repeat_bit_for_bit(tmp_path):
    one, two = (train(tmp_path, "--device=gpu", "--deterministic") for _ in range(2))
    assert one["weights_sha256"] == two["weights_sha256"]


def test_every_mode_agrees_with_the_cpu():
    from tfloop.inspection import checks

    found = list(checks.parity(tfloop.Config.make("digits"), 3))
    assert {mode.mode for mode in found} >= {"XLA, GPU", "fast, GPU", "host pipeline, GPU"}
    assert all(mode.step is None or mode.largest < 1e-2 for mode in found)


def test_the_order_of_examples_is_the_cpus():
    from tfloop.data.pipelines import order

    with tf.device("GPU"):
        there = order(1, 2, 5000).numpy()
    with tf.device("CPU"):
        np.testing.assert_array_equal(there, order(1, 2, 5000))


@pytest.mark.parametrize("flag", ["--memory_limit=2048", "--memory_growth", "--nomemory_growth"])
def test_memory_settings_are_taken(tmp_path, flag):
    assert train(tmp_path, "--device=gpu", flag)["final"]["test"]["accuracy"] > 0.8


def test_nothing_is_traced_again_on_a_gpu(digits):
    loop = tfloop.make_loop(tfloop.Config.make("digits"))
    loop.fit(1)
    loop.state.reset()
    loop.fit(2)
    assert loop.traces == {"train": 1, "evaluate": 1}


@pytest.mark.parametrize(
    "flags",
    [
        ("--precision=mixed_float16",),
        ("--precision=mixed_bfloat16",),
        ("--strategy=mirrored",),
        ("--jit_compile",),
        (
            "--jit_compile",
            "--pool_first",
            "--batch_norm",
            "--augment_shift=1",
            "--augment_elastic=1",
        ),
        ("--ensemble=2", "--pool_first", "--batch_norm", "--average_shifts=1"),
        (
            "--augment_shift=1",
            "--augment_rotate=5",
            "--augment_cutout=2",
            "--ema=0.9",
            "--accumulate=2",
            "--batch_norm",
        ),
    ],
    ids=" ".join,
)
def test_larger_training_learns_on_a_gpu(tmp_path, flags):
    assert train(tmp_path, "--device=gpu", "--epochs=6", *flags)["final"]["test"]["accuracy"] > 0.85


def test_augmentation_draws_what_it_draws_on_the_cpu(digits):
    from tfloop.data import augmentation
    from tfloop.randomness import Key, seed_of

    images, found = tf.cast(digits.train.inputs[:64], tf.float32), []
    for device in ("GPU", "CPU"):
        with tf.device(device):
            found.append(augmentation.shift(images, Key(seed_of(1, 2)), 2.0).numpy())
    np.testing.assert_array_equal(*found)
