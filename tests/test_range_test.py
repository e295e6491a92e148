import numpy as np
import pytest

import tfloop
from tfloop.cli import main
from tfloop.search.range_test import range_test, smooth


def test_the_state_is_afterwards_what_it_was_before_and_trains_on_as_if_nothing_had_been(loop):
    undisturbed, tested = loop(), loop()
    for one in (undisturbed, tested):
        one.fit(1)
    before = tested.state.digest()
    found = range_test(tested, 1e-4, 1.0, steps=60)  # over the end of an epoch of 15 steps
    assert tested.state.digest() == before and len(found.rates) > 15
    assert tested.fit(3).test == undisturbed.fit(3).test and tested.traces["train"] == 1


@pytest.mark.quick
def test_the_rates_grow_by_one_factor_and_the_losses_are_those_of_training_at_them(loop):
    found = range_test(loop(), 1e-4, 1e-2, steps=21)
    np.testing.assert_allclose(found.rates, np.geomspace(1e-4, 1e-2, 21), rtol=1e-12)
    one, losses = loop(steps_per_call=1), []
    one.state.hyper["learning_rate"].assign(found.rates[0])
    for record in one.run(2):
        if isinstance(record, tfloop.Call) and len(losses) < 21:
            losses.append(record.train.total)
            one.state.hyper["learning_rate"].assign(found.rates[min(len(losses), 20)])
    np.testing.assert_array_equal(found.losses, losses)


def test_it_stops_where_the_loss_becomes_too_large_and_suggests_a_rate_below(loop):
    found = range_test(loop(optimizer="sgd"), 1e-4, 1e6, steps=100)
    assert (
        found.diverged
        and len(found.rates) < 100
        and found.suggestion < found.least < found.rates[-1]
    )


def test_smoothing_begins_at_the_first_loss():
    assert smooth([2.0, 2.0])[1] == pytest.approx(2.0) and smooth([1.0, 3.0])[1] == pytest.approx(
        (0.95 * 0.05 * 1 + 0.05 * 3) / (1 - 0.95**2)
    )


def test_a_falling_rate_is_refused(loop):
    with pytest.raises(tfloop.UserError, match="needs schedule constant"):
        range_test(loop(schedule="cosine"))


@pytest.mark.quick
def test_the_command_prints_a_suggestion_and_writes_the_plot(tmp_path, capsys):
    assert (
        main(
            [
                "lr_find",
                "--preset=digits",
                "--steps=60",
                "--low=1e-4",
                f"--plot={tmp_path / 'rates.png'}",
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "suggestion: --learning_rate=" in said and "the state is as it was" in said
    assert (tmp_path / "rates.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--low=0"], "--low=0: expected a rate above 0"),
        (["--low=1", "--high=0.1"], "--low=1 must lie below --high=0.1"),
        (["--precision=mixed_float16"], "a step that overflows has no loss"),
        (["--steps=3"], "--steps=3: expected a whole number, 10 or more"),
        (["--learning_rate=1"], "learning_rate"),
        (["--low=1e-9", "--high=1e-8"], "the loss does not fall anywhere"),
    ],
)
def test_bad_input_is_one_line(flags, message, capsys):
    assert main(["lr_find", "--preset=digits", "--steps=20", *flags]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
