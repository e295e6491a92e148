"""How much a step computes, and how fast this machine could."""

import contextlib
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow as tf
from tensorflow.python.framework import ops as registry

from tfloop import plain_files
from tfloop.machine import devices

# What multiplies matrices; all else is little beside it, and bound by memory.
PRODUCTS = ("MatMul", "Conv2D", "Conv2d", "Conv3D", "Einsum", "XlaDot")
MOST_TURNS = 1000  # of a loop in a step that are counted
SIDE = {"CPU": 1024, "GPU": 8192}  # of the matrices that a machine's speed is measured with


def operations(graph: tf.Graph) -> Iterator[tf.Operation]:
    """The operations of a function's graph that run, and those of functions that it calls once.

    TensorFlow leaves out what no output needs, such as the first layer's gradient by its input.
    """
    waiting = [tensor.op for tensor in graph.outputs] + list(graph.control_outputs)
    seen = set[str]()
    while waiting:
        operation = waiting.pop()
        if operation.name in seen:
            continue
        seen.add(operation.name)
        waiting += [tensor.op for tensor in operation.inputs] + list(operation.control_inputs)
        yield operation
        if "PartitionedCall" in operation.type:
            yield from _called(graph, operation, "f")
        elif operation.type in ("While", "StatelessWhile"):
            for _ in range(_turns(graph, operation)):
                yield from _called(graph, operation, "body")


def _called(graph: tf.Graph, operation: tf.Operation, attribute: str) -> Iterator[tf.Operation]:
    called = graph._get_function(operation.get_attr(attribute).name)
    if called is not None:
        yield from operations(called.graph)


def _turns(graph: tf.Graph, loop: tf.Operation) -> int:
    """How often a loop's body runs, where its condition compares with a constant; else 0."""
    condition = graph._get_function(loop.get_attr("cond").name)
    if condition is None:
        return 0
    known = [
        tf.get_static_value(operation.inputs[1])
        for operation in condition.graph.get_operations()
        if operation.type == "Less"
    ]
    found = [int(value) for value in known if value is not None]
    return min(found) if found and min(found) <= MOST_TURNS else 0


def flop_of(operation: tf.Operation) -> float:
    """Multiplications and additions of one operation that multiplies matrices; 0 of any other.

    Of a convolution, and of its gradients: 2 · outputs · places and channels that each looks at. Of
    the others, as TensorFlow's own registry has it. 0 also where shapes are not known.
    """
    kind = operation.type
    if not any(product in kind for product in PRODUCTS):
        return 0.0
    if "Conv" in kind:
        return _of_convolution(operation)
    logger, before = tf.get_logger(), tf.get_logger().level
    logger.setLevel("ERROR")  # the registry calls what TensorFlow says is deprecated
    try:
        found = registry.get_stats_for_node_def(operation.graph, operation.node_def, "flops").value
    except (ValueError, TypeError, AttributeError):
        found = None
    finally:
        logger.setLevel(before)
    return float(found or 0.0)


def _of_convolution(operation: tf.Operation) -> float:
    is_gradient = "Backprop" in operation.type
    if is_gradient and len(operation.inputs) < 3:
        return 0.0
    outputs = (operation.inputs[2] if is_gradient else operation.outputs[0]).shape
    # The kernel is the second input, or, where its gradient is computed, the output.
    of_kernel = "BackpropFilter" in operation.type
    kernel = (operation.outputs[0] if of_kernel else operation.inputs[1]).shape
    if not (outputs.is_fully_defined() and kernel.is_fully_defined()):
        return 0.0
    is_depthwise = operation.type.startswith("Depthwise")
    looked_at = kernel[:2] if is_depthwise else kernel[:-1]
    return 2.0 * outputs.num_elements() * looked_at.num_elements()


def flop_per_step(loop: Any) -> float | None:
    """Multiplications and additions of matrices in a loop's full step; None before it is traced.

    What layers compute in loops of unknown length, over time say, is not counted.
    """
    graph = getattr(loop, "graph", None)
    if graph is None:
        return None
    return sum(map(flop_of, operations(graph))) or None


def peak(again: bool = False) -> float:
    """Multiplications and additions a second of this machine's matmul in float32, on all cores.

    It is measured in half a second, and the best that was found is kept for this kind of machine in
    `$XDG_STATE_HOME or ~/.local/state`/tfloop/peak.json: other work beside it makes it less.

    Args:
      again: measure also where it is known.
    """
    file = devices.state_folder() / "peak.json"
    key = _machine()
    try:
        known = plain_files.read_json(file)
        best = known[key] if isinstance(known.get(key), float) else 0.0
    except (OSError, ValueError, AttributeError):
        known, best = {}, 0.0
    if best > 0 and not again:
        return best
    if (found := _measure()) > best:
        with contextlib.suppress(OSError):  # it is measured again next time
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({**known, key: found}, indent=1), encoding="utf-8")
    return max(found, best)


def _machine() -> str:
    gpus = tf.config.list_logical_devices("GPU")
    name = _processor()
    if gpus:
        physical = tf.config.list_physical_devices("GPU")[0]
        name = tf.config.experimental.get_device_details(physical).get("device_name", "GPU")
        tf32 = tf.config.experimental.tensor_float_32_execution_enabled()
        return f"{name}, TensorFlow {tf.__version__}{', TF32' if tf32 else ''}"
    onednn = os.environ.get("TF_ENABLE_ONEDNN_OPTS", "1")
    return f"{devices.cores()} cores of {name}, TensorFlow {tf.__version__}, oneDNN {onednn}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _measure() -> float:
    """The best of a few turns, with as many products side by side as TensorFlow has threads for."""
    is_gpu = bool(tf.config.list_logical_devices("GPU"))
    side, threads = SIDE["GPU" if is_gpu else "CPU"], tf.config.threading
    is_split = threads.get_intra_op_parallelism_threads() == 1
    count = (threads.get_inter_op_parallelism_threads() or devices.cores()) if is_split else 1
    count = 1 if is_gpu else max(1, min(count, devices.cores()))
    starts = [tf.random.stateless_normal([side, side], [0, k]) / side**0.5 for k in range(count)]

    @tf.function(autograph=False)
    def multiply(times: tf.Tensor) -> tf.Tensor:
        def body(i: tf.Tensor, *products: tf.Tensor) -> tuple:
            return (i + 1, *(tf.matmul(a, p) for a, p in zip(starts, products, strict=True)))

        found = tf.while_loop(lambda i, *_: i < times, body, (tf.constant(0), *starts))
        return tf.add_n([product[0, 0] for product in found[1:]])

    times, seconds = 2, []
    multiply(tf.constant(times)).numpy()
    for _ in range(4):
        started = time.perf_counter()
        multiply(tf.constant(times)).numpy()
        seconds.append((time.perf_counter() - started) / times)
        times = max(2, min(2000, round(0.08 / min(seconds))))
    return count * 2.0 * side**3 / min(seconds)
