"""tf.data without its autotuner, and what its errors say."""

import re

import tensorflow as tf

# For every iterator: freeing one waits for its autotuner, which may miss the call and sleep on for
# a minute.
UNTUNED = tf.data.Options()
UNTUNED.autotune.enabled = False


def failure_of(message: str) -> str:
    """Why a dataset of the user's own gave no further batch, from TensorFlow's message; or ""."""
    if "IteratorGetNext" not in message:
        return ""
    if found := re.search(
        r"\[([\d,]+)\] is not compatible with expected shape \[([\d,]+)\]", message
    ):
        given, expected = (shape.replace(",", "×") for shape in found.groups())
        return f"gives a batch of {given} where it gave {expected} when its examples were counted"
    if "Cannot batch tensors with different shapes" in message:
        return "its examples have different shapes: batch them, as with .padded_batch(32)"
    lines = [line.strip() for line in message.splitlines()]
    said = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return said[-1] if said else ""
