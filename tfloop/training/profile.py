"""Records TensorFlow's profile of some steps of a run, for TensorBoard."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow as tf

from tfloop.config import Config


class Profile:
    """The profile of the steps that `config.profile` names, in the run's folder.

    Use it in a `with` block.
    """

    def __init__(self, config: Config, folder: Path, say: Callable[[str], None]) -> None:
        """Make one.

        Args:
          config: the settings.
          folder: the run's.
          say: is told what was recorded.
        """
        self._steps, self._folder, self._say = config.profile_steps, folder / "train", say
        self._is_running, self._is_done, self._last = False, False, 0

    def write(self, record: Any) -> None:
        """Start or stop after this record, where it is time to."""
        self._last = record.step
        self.move_to(record.step)

    def move_to(self, step: int) -> None:
        """Start or stop, where it is time to at this global step."""
        if step in self._steps and not self._is_running:
            tf.profiler.experimental.start(str(self._folder))
            self._is_running = True
        elif self._is_running and step not in self._steps:
            tf.profiler.experimental.stop()
            self._is_running, self._is_done = False, True
            last = min(self._last, self._steps.stop) - 1
            plugins = ("xprof", "tensorboard_plugin_profile")
            is_installed = any(importlib.util.find_spec(name) for name in plugins)
            hint = (
                "" if is_installed else "; TensorBoard shows it with its plugin: pip install xprof"
            )
            self._say(f"profile of steps {self._steps.start} to {last} written{hint}")

    def __enter__(self) -> "Profile":
        self.move_to(0)
        return self

    def __exit__(self, *_: Any) -> None:
        self.move_to(-1)
        if self._steps and not self._is_done:
            asked = f"{self._steps.start}:{self._steps.stop}"
            self._say(f"--profile={asked}: no such step was made; nothing is profiled")
