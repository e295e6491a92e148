"""The benchmarks measure what they say: same job for all, sound statistics. Their long runs are not
repeated here."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import tfloop
from tfloop import models

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import devices  # noqa: E402
import regress  # noqa: E402

import contenders  # noqa: E402
import race  # noqa: E402


@pytest.mark.quick
def test_the_articles_first_network_costs_16_4_million_operations_an_image():
    model = models.build(tfloop.Config.make(), (28, 28, 1), 10)
    conv1, conv2, conv3, dense = (
        26 * 26 * 9 * 32,
        11 * 11 * 9 * 32 * 64,
        3 * 3 * 9 * 64 * 64,
        576 * 70 + 70 * 10,
    )
    assert contenders.flop_per_image(model) == 2 * (2 * conv1 + 3 * (conv2 + conv3 + dense))
    assert contenders.flop_per_image(model) == pytest.approx(16.4e6, rel=0.01)


@pytest.mark.in_full
def test_contenders_compute_the_same_loss_and_train():
    settings = {
        "preset": "digits",
        "conv": [4, 4],
        "kernel": [3],
        "pool": [2],
        "dense": [8],
        "optimizer": "rmsprop",
    }
    names = ["tfloop", "keras fit", "TensorFlow guide", "PyTorch", "JAX", "JAX, lax.scan"]
    running = [race.Contender(name, settings) for name in names] + [
        race.Contender("side by side", settings | {"ensemble": 2})
    ]
    present = [c for c in running if not c.missing]
    assert {c.label for c in present} >= set(names[:3])
    for contender in present:
        assert contender.loss == pytest.approx(running[0].loss, rel=1e-4), contender.label
        assert contender.run(contender.least) > 0 and contender.memory > 50
        if contender.label.startswith(("PyTorch", "JAX")):
            assert "tensorflow" not in contender.imported, contender.label
        contender.close()


def test_rivals_import_no_tensorflow_even_where_they_are_not_installed():
    """The job comes to them as files."""
    for module in ("jobs", "torch_contender", "jax_contender"):
        code = f"import sys, {module}; sys.exit('tensorflow' in sys.modules)"
        command = [sys.executable, "-c", code]
        assert subprocess.run(command, cwd=BENCHMARKS).returncode == 0, module


def test_a_contender_that_dies_says_of_which_signal_and_its_last_own_line():
    contender = race.Contender("tfloop", {"preset": "digits", "conv": [4], "pool": [2]})
    contender._process.send_signal(signal.SIGSEGV)
    with pytest.raises(SystemExit, match="tfloop: ended by SIGSEGV; its last line: "):
        contender.run(1)
    with pytest.raises(
        SystemExit, match="PyTorch: exit code 1; its last line: KeyError: 'nothing'"
    ):
        contender.label = "PyTorch"
        contender._process = subprocess.Popen(
            [sys.executable, "-c", "{}['nothing']"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=contender._errors, text=True,
        )  # fmt: skip
        contender.run(1)


def test_models_of_the_zoo_compute_the_same_loss_and_train():
    names = ["tfloop", "keras fit, 50 steps"]
    running = [race.Contender(name, {"zoo": "mlp", "batch_size": 32}) for name in names]
    for contender in running:
        assert contender.loss == pytest.approx(running[0].loss, rel=1e-4), contender.label
        assert contender.run(contender.least) > 0
        contender.close()


@pytest.mark.quick
def test_an_interval_holds_the_median_and_narrows():
    median, low, high = race.with_interval([1.0, 2.0, 3.0, 4.0, 100.0])
    assert low <= median == 3.0 <= high
    assert race.with_interval([5.0] * 5) == (5.0, 5.0, 5.0)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_is_found(power):
    assert race.exponent([1, 2, 4, 8], [3 * n**power for n in (1, 2, 4, 8)]) == pytest.approx(power)


def test_devices_reads_event_files(tmp_path):
    command = [
        sys.executable,
        "-m",
        "tfloop",
        "train",
        "--preset=digits",
        "--epochs=2",
        f"--logdir={tmp_path}",
        "--quiet",
    ]
    subprocess.run(command, check=True)
    found = devices.read(tmp_path / "digits-001")
    assert found["ms_per_step"] > 0 and found["accuracy"] > 0.2
    assert found["epoch_s"] == pytest.approx(found["ms_per_step"] * 45 / 1000)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="empty: not a finished run: it has no result.json"):
        devices.read(tmp_path / "empty")


def test_without_a_gpu_the_check_says_so_and_exits_with_0(tmp_path):
    import tensorflow as tf

    if tf.config.list_physical_devices("GPU"):
        pytest.skip("there is a GPU here")
    found = subprocess.run(
        ["bash", str(BENCHMARKS / "gpu_check.sh"), str(tmp_path), sys.executable],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0 and found.stdout.endswith(
        "gpu_check: no GPU here, nothing to check\n"
    )


def test_ratios_are_compared_with_those_of_the_same_kind_of_machine(tmp_path, monkeypatch, capsys):
    def run(cpu, *ratio):
        monkeypatch.setattr(regress, "measure", lambda *_: {"keras fit": ratio})
        monkeypatch.setattr(
            regress,
            "environment",
            lambda: {"date": "2026-01-01", "cpu": cpu, "cores": 2, "gpus": [], "packages": {}},
        )
        monkeypatch.setattr(sys, "argv", ["regress.py", f"--out={tmp_path}"])
        regress.main()

    run("one kind", 3.0, 2.8, 3.2)
    run("another", 2.0, 1.9, 2.1)  # nothing to compare with: kept
    assert "No ratios are stored for 2 cores of another" in capsys.readouterr().out
    with pytest.raises(SystemExit) as same:
        run("another", 1.8, 1.7, 1.95)  # within the noise
    with pytest.raises(SystemExit) as slower:
        run("one kind", 2.0, 1.9, 2.1)
    assert (same.value.code, slower.value.code) == (0, 1)
