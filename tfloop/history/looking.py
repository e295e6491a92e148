"""Everything that one compiled step computes, by name."""

import contextlib
from typing import Any

import numpy as np
import tensorflow as tf

from tfloop import models
from tfloop.errors import DivergenceError
from tfloop.history.replay import Replay
from tfloop.nests import leaves, map_leaves, named_leaves


def look(replay: Replay) -> dict[tuple[str, str], np.ndarray]:
    """(kind, name) → array, in the order in which a step computes them; the state is as it was.

    The activations are those of the loop's own forward pass, with its rearrangements and shards;
    what it does in one with its neighbour is left out. Gradients go from the last layer to the
    first.
    """
    loop, state = replay.loop, replay.loop.state
    batch = loop.batch(int(state.batch_index))

    def compute() -> dict[str, Any]:
        mixed, key = state.mixed(batch), state.key()
        inputs = state.prepared(mixed.inputs, key)
        seen = models.activations(
            state.model,
            inputs,
            True,
            key,
            state.objective.as_logits,
            fast=loop.is_fast,
            shards=loop.shards,
        )
        activations = {name: leaves(value) for name, _, value in seen}
        result = loop.grad_fn(state, mixed)
        rate = state.schedule(state.schedule_step)
        updates, _ = state.optimizer.updates(result.gradients, state.weights, rate)
        return {
            "batch": {"inputs after augmentation": leaves(inputs)},
            "activation": activations,
            "loss": result.loss._asdict(),
            "gradient": dict(reversed(result.gradients.parts().items())),
            "update": updates.parts(),
        }

    found: dict[tuple[str, str], np.ndarray] = {}
    for name, weight in {**state.weights, **state.non_trainable}.items():
        found["weights", name] = weight.numpy()
    for name, leaf in named_leaves({"inputs": batch.inputs, "targets": batch.targets}):
        found["batch", name] = np.asarray(leaf)
    is_eager = replay.config.eager
    with loop.taken_back():
        computed = compute() if is_eager else tf.function(compute, autograph=False)()
        for kind, parts in computed.items():
            for name, value in parts.items():
                for number, leaf in enumerate(leaves(value)):
                    found[kind, f"{name}:{number}" if number else name] = _array(leaf)
    with loop.taken_back(), contextlib.suppress(DivergenceError):
        replay.make_one()
        for name, weight in {**state.weights, **state.non_trainable}.items():
            found["weights after", name] = weight.numpy()
    return found


def _array(value: Any) -> np.ndarray:
    array = map_leaves(np.asarray, value)
    return array.astype(np.float32) if str(array.dtype) == "bfloat16" else array
