"""tfloop: a TensorFlow 2 training loop that one can read, step through, reset and measure.

Example:
  >>> import tfloop
  >>> data = tfloop.load("mnist")
  >>> config = tfloop.Config.make(epochs=5)
  >>> loop = tfloop.make_loop(config)
  >>> for record in loop.run(epochs=5):
  ...     print(record)

Names are loaded on first use, so that importing tfloop does not import TensorFlow.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "Config": "config", "PRESETS": "config", "UserError": "errors", "DivergenceError": "errors",
    "Dataset": "data", "Split": "data", "Standardizer": "data", "load": "sources", "from_arrays": "data",
    "Optimizer": "optimizers", "Schedule": "schedules", "TrainState": "state",
    "Augmentation": "augmentation", "Checkpoints": "checkpoints", "Batch": "pipelines", "Loop": "loop", "Call": "loop", "Epoch": "loop", "Metrics": "loop", "Loss": "step",
    "train_step": "step", "forward_and_backward": "step", "losses": "step", "example_losses": "step",
    "LivePlot": "plots", "Summaries": "summaries", "make_loop": "runs", "make_state": "runs", "train": "training", "open_run": "runs",
    "predict": "predictions",
}
__all__ = sorted(_HOME)


_MODULES = ("debug", "checks")


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"tfloop.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'tfloop' has no attribute '{name}'")
    return getattr(importlib.import_module(f"tfloop.{_HOME[name]}"), name)


def __dir__():
    return [*__all__, *_MODULES]
