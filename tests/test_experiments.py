import json

import pytest

from tfloop.cli import main
from tfloop.search import experiments
from tfloop.search.experiments import Row

ROWS = [
    Row("article2", "clean", 2, [0, 1], [[0.98, 0.990], [0.992, 0.988]], [10.0, 12.0]),
    Row("article2", "article", 2, [0, 1], [[0.98, 0.985], [0.994, 0.989]], [10.0, 12.0]),
]


def test_the_clean_protocol_takes_the_last_epoch_and_the_articles_the_best():
    assert (
        ROWS[0].claimed == [0.990, 0.988]
        and ROWS[1].claimed == [0.985, 0.994]
        and ROWS[1].last == [0.985, 0.989]
    )


def test_the_report_says_means_spreads_and_what_the_protocol_is_worth():
    text = experiments.markdown(ROWS, "report.png", "CPU")
    assert "| 2 | 2 | clean | 98.90 | 0.14 | 99.00 | 11.0 | 99.0 % after 5 epochs |" in text
    assert (
        "adds +0.25 points to the last epoch's 98.70 %; the shuffled cut's last epoch is "
        "-0.20 points from the standard one's 98.90 %" in text
    )
    assert "| `article2` | article | 1 | 98.90 | 99.40 |" in text


@pytest.mark.quick
def test_the_command_trains_reports_and_does_not_train_again(tmp_path, capsys, monkeypatch):
    from tfloop.data import sources

    load = sources.load
    monkeypatch.setattr(sources, "load", lambda *arguments: load(*arguments).head(640))
    flags = [
        "report",
        "--experiments=article2",
        "--epochs=2",
        "--seeds=0,4",
        f"--out={tmp_path / 'report'}",
    ]
    assert main(flags) == 0
    said, found = (
        capsys.readouterr().out,
        json.loads((tmp_path / "report" / "report.json").read_text()),
    )
    assert [(row["protocol"], row["seeds"]) for row in found["rows"]] == [
        ("clean", [0, 4]),
        ("article", [0, 4]),
    ]
    trained = json.loads(
        (tmp_path / "report" / "article2-article-2-epochs-seed-4" / "result.json").read_text()
    )
    assert (
        trained["config"]["split"] == "shuffled"
        and trained["config"]["split_seed"] == trained["config"]["seed"] == 4
    )
    assert found["rows"][1]["by_epoch"][1] == [
        epoch["test"]["accuracy"] for epoch in trained["epochs"]
    ]
    assert (tmp_path / "report" / "report.png").read_bytes()[
        :4
    ] == b"\x89PNG" and "# The article's experiments" in said
    assert main(flags) == 0 and "epochs-seed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--experiments=article9"], "'article9' is no experiment"),
        (["--seeds=0,0"], "comes twice"),
        ([f"--out={__file__}/x"], "test_experiments.py is not a folder"),
    ],
)
def test_bad_input_is_one_line(flags, message, capsys):
    assert main(["report", *flags]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
