"""What a GPU would have to fetch from the host while it trains, read from the compiled step and
TensorFlow's own list of kernels: for each operation that list says which of its inputs and outputs
lie in the host's memory. No GPU is needed."""

import pytest
import tensorflow as tf
from tensorflow.python.framework import kernels, op_def_registry

from tfloop.optimizers import OPTIMIZERS
from tfloop.schedules import SCHEDULES

pytestmark = pytest.mark.skipif(
    not any(
        kernel.device_type == "GPU"
        for kernel in kernels.get_registered_kernels_for_op("Conv2D").kernel
    ),
    reason="TensorFlow's CPU-only build has no kernels for a GPU",
)


def crossings(graph: tf.Graph) -> list[str]:
    """ "producer → consumer" for each value of this graph that is computed on one side and needed
    on the other."""
    found, on_host = [], {}
    for op in graph.get_operations():
        kernel, definition = gpu_kernel(op), op_def_registry.get(op.type)

        def needs_host(name, kernel=kernel):
            return kernel is None or name in kernel.host_memory_arg

        if op.type == "Identity":  # gone before anything runs
            on_host[op.outputs[0].ref()] = on_host[op.inputs[0].ref()]
            continue
        for tensor, name in zip(op.inputs, arguments(definition.input_arg, op)):
            if (
                tensor.dtype != tf.resource
                and not is_known(tensor)
                and on_host[tensor.ref()] != needs_host(name)
            ):
                found.append(f"{tensor.op.name} → {op.type} {op.name}")
        for tensor, name in zip(op.outputs, arguments(definition.output_arg, op)):
            # What comes into a loop's or a branch's graph lies where TensorFlow keeps its type:
            # int32 in the host's memory.
            on_host[tensor.ref()] = (
                tensor.dtype == tf.int32 if op.type == "Placeholder" else needs_host(name)
            )
        for name in ("body", "cond", "then_branch", "else_branch"):
            if (
                op.type in ("While", "StatelessWhile", "If", "StatelessIf")
                and name in op.node_def.attr
            ):
                found += crossings(graph._get_function(op.get_attr(name).name).graph)
    return found


def gpu_kernel(op: tf.Operation):
    """The kernel that a GPU has for an operation with these types; None where only the CPU has
    one."""
    types = {
        name: list(value.list.type) or [value.type] for name, value in op.node_def.attr.items()
    }

    def fits(kernel):
        return all(
            set(types.get(wanted.name, [])) <= set(wanted.allowed_values.list.type)
            for wanted in kernel.constraint
        )

    return max(
        (
            kernel
            for kernel in kernels.get_registered_kernels_for_op(op.type).kernel
            if kernel.device_type in ("GPU", "DEFAULT") and fits(kernel)
        ),
        key=lambda kernel: (kernel.priority, kernel.device_type),
        default=None,
    )


def arguments(definitions, op: tf.Operation) -> list[str]:
    """The name of the argument that each input or output belongs to."""
    attr = op.node_def.attr

    def count(arg):
        return (
            attr[arg.number_attr].i
            if arg.number_attr
            else len(attr[arg.type_list_attr].list.type)
            if arg.type_list_attr
            else 1
        )

    return [arg.name for arg in definitions for _ in range(count(arg))]


def is_known(tensor: tf.Tensor) -> bool:
    """Is the value known before anything runs? Then it lies wherever it is needed."""
    return tf.get_static_value(tensor) is not None or tensor.op.type in ("Shape", "ShapeN")


def compiled(function, *specs) -> tf.Graph:
    return tf.function(function, autograph=False).get_concrete_function(*specs).graph


@pytest.mark.quick
def test_it_sees_what_crosses():
    pixels, count = tf.TensorSpec([8], tf.float32), tf.TensorSpec([], tf.int32)
    assert not crossings(compiled(lambda x: tf.nn.relu(x) * 2.0, pixels))
    # Down: int32 sums are the host's.
    assert len(crossings(compiled(lambda x: tf.cast(x, tf.int32) + 1, pixels))) == 1
    # Up.
    assert len(crossings(compiled(lambda x, n: x * tf.cast(n, tf.float32), pixels, count))) == 1
    assert len(crossings(compiled(lambda x: x + tf.cast(tf.timestamp(), tf.float32), pixels))) == 1
    assert (
        len(
            crossings(
                compiled(
                    lambda x: tf.while_loop(
                        lambda i, x: i < 3, lambda i, x: (i + 1, x + tf.cast(i, tf.float32)), (0, x)
                    )[1],
                    pixels,
                )
            )
        )
        == 1
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(fast=False),
        dict(precision="mixed_float16"),
        dict(precision="mixed_bfloat16"),
        dict(accumulate=2, dropout=0.3),
        dict(
            augment_shift=1,
            augment_rotate=5.0,
            augment_scale=0.1,
            augment_elastic=1.0,
            augment_cutout=2,
            dropout=0.3,
        ),
        dict(l1=1e-4, l2=1e-3, clip_norm=1.0, label_smoothing=0.1, ema=0.99),
        dict(output="sigmoid"),
        dict(momentum=0.9, centered=True, clip_global_norm=1.0),
        *(dict(optimizer=name) for name in OPTIMIZERS),
    ],
    ids=lambda settings: " ".join(map(str, settings.values())) or "default",
)
def test_nothing_crosses_inside_a_step(loop, settings, monkeypatch):
    # On a CPU the step asks for the coefficients of the penalties.
    monkeypatch.setattr("tfloop.step.has_gpu", lambda: True)
    # Which leaves out the clock that a CPU has around the input.
    job = loop(**settings, deterministic=True)
    job.warm_up()
    assert crossings(job.graph) == []


@pytest.mark.quick
@pytest.mark.parametrize("name", SCHEDULES)
def test_nothing_crosses_in_a_schedule(loop, name):
    needed = dict(boundaries=(10,), rates=(0.1,)) if name == "piecewise" else {}
    schedule = loop(schedule=name, **needed).state.schedule
    assert crossings(compiled(schedule, tf.TensorSpec([], tf.int64))) == []
