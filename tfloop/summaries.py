"""TensorBoard event files of a run: `train` and `test` (and `validation`) as runs over one axis, the global step."""

from pathlib import Path

import tensorflow as tf

from tfloop.loop import Call, Epoch, Metrics

TAGS = {"total": "loss/total", "data": "loss/data", "l1": "loss/l1", "l2": "loss/l2", "custom": "loss/custom",
        "model": "loss/model", "accuracy": "accuracy", "gradient_norm": "gradient_norm"}


class Summaries:
    """Writes the records of a run into `folder`; use it in a `with` block."""

    def __init__(self, folder: str | Path):
        self._folder, self._writers = Path(folder), {}

    def write(self, record: Call | Epoch) -> None:
        """A Call is a point of the training curves, an Epoch one of the test and validation curves."""
        if isinstance(record, Call):
            extra = {"learning_rate": record.rate, "speed/ms_per_step": 1000 * record.seconds / record.steps}
            self._scalars("train", record.step, record.train, extra)
        else:
            self._scalars("test", record.step, record.test, {})
            if record.validation:
                self._scalars("validation", record.step, record.validation, {})

    def _scalars(self, run: str, step: int, metrics: Metrics, extra: dict[str, float]) -> None:
        if run not in self._writers:
            self._writers[run] = tf.summary.create_file_writer(str(self._folder / run))
        with self._writers[run].as_default(step=step):
            for name, value in metrics._asdict().items():
                if value is not None:
                    tf.summary.scalar(TAGS[name], value)
            for tag, value in extra.items():
                tf.summary.scalar(tag, value)

    def __enter__(self) -> "Summaries":
        return self

    def __exit__(self, *_) -> None:
        for writer in self._writers.values():
            writer.close()
