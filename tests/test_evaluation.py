import matplotlib.image
import numpy as np
import pytest
from sklearn.metrics import precision_score, recall_score

import tfloop
from tfloop.cli import main
from tfloop.inspection import evaluation, plots


@pytest.mark.quick
def test_precision_and_recall_by_class(random):
    # Of class 4 there is no image.
    labels, probabilities = (
        random.integers(0, 4, 200),
        random.dirichlet(np.ones(5), 200),
    )
    found, guesses = evaluation.by_class(labels, probabilities), probabilities.argmax(axis=1)
    for label in range(5):
        assert found.precision[label] == precision_score(labels == label, guesses == label)
        assert found.recall[label] == recall_score(
            labels == label, guesses == label, zero_division=0
        )
    assert found.images.tolist() == [*np.bincount(labels), 0]


@pytest.mark.quick
def test_calibration_error_worked_by_hand():
    """Two bins: (0, 0.5] with confidences 0.5 and 0.45, one right; (0.5, 1] with 0.9, 0.8 and 1,
    two right."""
    confidence, right = [0.5, 0.45, 0.9, 0.8, 1.0], [1, 0, 1, 0, 1]
    probabilities = np.array([[c, *[(1 - c) / 3] * 3] for c in confidence])
    labels = np.array([0 if r else 1 for r in right])
    found = evaluation.calibration(labels, probabilities, bins=2)
    assert found.images.tolist() == [2, 3]
    assert found.error == pytest.approx((2 * abs(0.5 - 0.475) + 3 * abs(2 / 3 - 0.9)) / 5)


@pytest.mark.quick
def test_one_that_is_always_sure_and_right_is_calibrated():
    assert evaluation.calibration(np.arange(4), np.eye(4)).error == 0.0


@pytest.mark.quick
def test_confident_mistakes_are_wrong_and_the_most_confident_first():
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.99, 0.01], [0.3, 0.7]])
    labels = np.array([0, 1, 0, 1, 1])
    assert evaluation.confident_mistakes(labels, probabilities).tolist() == [3, 2, 1]
    assert evaluation.confident_mistakes(labels, probabilities, 2).tolist() == [3, 2]


@pytest.mark.quick
def test_the_command_prints_all_of_it_and_draws_it(tmp_path, capsys, digits):
    main(
        [
            "train",
            "--preset=digits",
            "--epochs=3",
            f"--logdir={tmp_path}",
            "--quiet",
            "--summaries=none",
        ]
    )
    assert main(["evaluate", str(tmp_path / "digits-001"), f"--plot={tmp_path / 'view.png'}"]) == 0
    said = capsys.readouterr().out
    probabilities = tfloop.predict(tfloop.open_run(tmp_path / "digits-001")[1], digits.test.inputs)
    found = evaluation.by_class(digits.test.targets, probabilities)
    assert (
        f"\n      3  {100 * found.precision[3]:7.2f} %  {100 * found.recall[3]:7.2f} %  "
        f"{found.images[3]:6d}\n" in said
    )
    assert (
        f"expected calibration error "
        f"{100 * evaluation.calibration(digits.test.targets, probabilities).error:.2f} %" in said
    )
    worst = evaluation.confident_mistakes(digits.test.targets, probabilities)[0]
    assert (
        f"image {worst:6d}: is {digits.test.targets[worst]}, taken for "
        f"{probabilities[worst].argmax()}" in said
    )
    assert (tmp_path / "view.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.quick
def test_a_model_without_mistakes_is_drawn_too(tmp_path):
    nothing = np.zeros(0, int)
    sure = evaluation.calibration(np.arange(4), np.eye(4))
    figure = plots.evaluation(sure, np.zeros((0, 8, 8, 1)), nothing, nothing, nothing)
    plots.save(figure, tmp_path / "a.png")
    height, width, _ = matplotlib.image.imread(tmp_path / "a.png").shape
    assert height > 200 and width > 200
    pictures = [axes for axes in figure.axes if axes.images]
    assert not pictures and "0.00 %" in "".join(axes.get_title() for axes in figure.axes)


@pytest.mark.quick
def test_predictions_averaged_over_shifts_are_the_mean_of_five(loop, digits):
    one = loop(average_shifts=1)
    one.fit(2)
    images = digits.test.inputs[:20].astype(np.float32)
    wide = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    views = [wide[:, y : y + 8, x : x + 8] for y, x in ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2))]

    def plain(view):
        return tfloop.models.probabilities(
            one.state.model, tfloop.models.outputs(one.state.model, one.state.standardize(view))
        ).numpy()

    expected = np.mean([plain(view) for view in views], axis=0)
    np.testing.assert_allclose(
        tfloop.predict(one.state, digits.test.inputs[:20]), expected, rtol=1e-5, atol=1e-7
    )
    loss = -np.log(
        np.mean([plain(view) for view in views], axis=0)[np.arange(20), digits.test.targets[:20]]
    ).mean()
    assert one.evaluate(
        tfloop.Split(digits.test.inputs[:20], digits.test.targets[:20])
    ).data == pytest.approx(loss, rel=1e-4)


@pytest.mark.quick
def test_with_sigmoid_outputs_that_are_all_sure_the_averaged_loss_is_finite(loop, digits):
    one = loop(average_shifts=1, output="sigmoid")
    one.state.weights["output/bias"].assign([40.0, *[-40.0] * 9])
    assert np.isfinite(one.evaluate(digits.test).data)


def test_runs_on_other_images_are_not_averaged(tmp_path, capsys):
    for split in ("standard", "shuffled"):
        main(
            [
                "train",
                "--preset=digits",
                "--epochs=1",
                f"--split={split}",
                f"--logdir={tmp_path}",
                "--quiet",
                "--summaries=none",
            ]
        )
    assert main(["evaluate", str(tmp_path / "digits-001"), str(tmp_path / "digits-002")]) == 2
    assert "digits-002: has other test images than" in capsys.readouterr().err


def test_a_plot_shows_where_every_curve_ends_whatever_the_reference():
    runs = {
        "good": {"test/accuracy": ([1, 2], [0.5, 0.92])},
        "weak": {"test/accuracy": ([1, 2], [0.3, 0.73])},
    }
    low, high = plots.curves(runs, reference=0.99).axes[0].get_ylim()
    assert 0.3 < low < 0.73 and 0.99 < high <= 1.02
