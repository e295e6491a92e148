"""Where the time of a step goes: by layer, and in what is around the step.

TensorFlow's own profiler records every operation. Its trace is a protocol buffer whose classes come
with TensorFlow, so Google's protobuf reads it; the larger `xprof`, which draws it in TensorBoard,
is not needed for that. Operations are told apart by the scopes that the step gives them: the name
of a layer, and "gradient_tape" on the way back.
"""

import dataclasses
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow as tf
from tensorflow.tsl.profiler.protobuf import xplane_pb2

from tfloop import scratch
from tfloop.data.pipelines import FromDataset
from tfloop.errors import UserError
from tfloop.loop import Loop
from tfloop.machine import arithmetic, devices
from tfloop.models import is_leaf, keras_layers
from tfloop.models.program import program_of
from tfloop.records import Call
from tfloop.step import FORWARD_SCOPE
from tfloop.wording import counted

FORWARD, BACKWARD, UPDATE, INPUT, LOSS, REST = (
    "forward",
    "backward",
    "update",
    "input",
    "loss",
    "other",
)
OWN = "tf.data"  # what the user's own pipeline is called
STEPS = {"while", "cond"}  # the scopes of the steps of a call
SECONDS = 1.5  # of training without the profiler, and half of it with
INPUT_BOUND, OVERHEAD_BOUND = 0.2, 0.35  # shares of a step from which on that is the verdict
FAR = 0.25  # of the floor: short operations that reach less are mostly their starts
WITH_PREPARING = 0.2  # the same with the cores' time in which batches are prepared
SMALL = 0.05  # ms: an operation that costs less is not much more than its start
MOSTLY = 0.9  # of the products recorded: with fewer, times are not those of the whole step
PRODUCTS_BOUND = 0.5  # of the time of operations


class Event(NamedTuple):
    """One run of an operation."""

    name: str  # with its scopes
    kind: str  # such as MatMul
    milliseconds: float


class Row(NamedTuple):
    """A line of the table; times in ms a step, of all threads together."""

    layer: str
    forward: float
    backward: float
    update: float
    flop: float  # of the forward and backward pass, a step

    @property
    def milliseconds(self) -> float:
        return self.forward + self.backward + self.update

    @property
    def gflops(self) -> float:
        """Billions of operations a second of one thread."""
        seconds = (self.forward + self.backward) / 1e3
        return self.flop / seconds / 1e9 if seconds else 0.0


@dataclasses.dataclass(frozen=True)
class Profile:
    """What was found; times in ms a step.

    Attributes:
      rows: by layer, then what belongs to none.
      step: from one step to the next, in the median of calls, without the profiler.
      waiting: of it, for batches.
      between: of it, outside compiled calls: Python, and what takes records.
      busy: of operations, of all threads together.
      lanes: how many operations can run side by side.
      preparing: of `busy`, in the pipeline's own operations, beside the step.
      products: of `busy`, in operations that multiply matrices.
      operations: how many run a step.
      recorded: the share of the step's products that the profiler saw; TensorFlow leaves out
        operations that it takes for cheap, and which those are differs from run to run.
      flop: multiplications and additions of matrices, a step.
      peak: those a second of this machine's matmul, on all cores.
      pipeline: of the loop.
      steps_per_call: of the loop.
      batch_size: of the loop.
      steps: of an epoch.
      device: "CPU" or "GPU".
    """

    rows: tuple[Row, ...]
    step: float
    waiting: float
    between: float
    busy: float
    lanes: int
    preparing: float
    products: float
    operations: float
    recorded: float
    flop: float
    peak: float
    pipeline: str
    steps_per_call: int
    batch_size: int
    steps: int
    device: str

    @property
    def floor(self) -> float:
        """ms that the step's products would take at the speed of the machine's matmul."""
        return 1e3 * self.flop / self.peak

    @property
    def of_floor(self) -> float:
        return self.floor / self.step

    @property
    def idle(self) -> float:
        """ms of `lanes` threads in which none of the step's operations runs."""
        return max(0.0, self.lanes * self.step - self.busy)

    @property
    def verdict(self) -> str:
        """What the step waits for most, and the flag to try."""
        waiting, between = self.waiting / self.step, self.between / self.step
        if waiting >= INPUT_BOUND:
            return f"input-bound: {100 * waiting:.0f} % waiting; {self._for_input()}"
        preparing = self.preparing / (self.lanes * self.step)
        if waiting + preparing >= WITH_PREPARING:
            return (
                f"input-bound: {100 * waiting:.0f} % waiting, and batches are prepared in "
                f"{100 * preparing:.0f} % of the cores' time; {self._for_input()}"
            )
        idle = self.idle / (self.lanes * self.step)
        is_slow = idle >= OVERHEAD_BOUND or self.of_floor < FAR
        if between >= OVERHEAD_BOUND or (is_slow and self._is_small()):
            return f"overhead-bound: steps of {self.step:.2g} ms; {self._for_overhead(between)}"
        if self.products < PRODUCTS_BOUND * self.busy:
            share = 100 * (1 - self.products / self.busy)
            return (
                f"memory-bound: {share:.0f} % of the time is in operations that move numbers and "
                f"multiply no matrices; {self._for_memory()}"
            )
        return f"compute-bound at {100 * self.of_floor:.0f} % of the floor; {self._for_compute()}"

    def _is_small(self) -> bool:
        """Do operations take so short that starting them counts?"""
        return bool(self.operations) and self.busy / self.operations < SMALL

    def _for_input(self) -> str:
        if self.pipeline == "resident":
            return "rows are gathered from memory: a larger --batch_size gathers more at once"
        if self.pipeline == OWN:
            return "it is your tf.data pipeline: .cache() or .prefetch() in it"
        return "--cache=FOLDER (of shards) or --pipeline=resident"

    def _for_overhead(self, between: float) -> str:
        if between >= OVERHEAD_BOUND and self.steps_per_call < self.steps:
            return f"--steps_per_call={min(self.steps, 10 * self.steps_per_call)}"
        return f"a larger --batch_size than {self.batch_size}, or several models: --ensemble=4"

    def _for_memory(self) -> str:
        return (
            "--jit_compile" if self.device == "GPU" else "a smaller --batch_size, or --device=gpu"
        )

    def _for_compute(self) -> str:
        if self.device == "GPU":
            return "--precision=tf32 or mixed_bfloat16"
        return "--device=gpu, or fewer operations: a smaller model or input"


def profile(loop: Loop, seconds: float = SECONDS) -> Profile:
    """Train for a while and find out what the time went into. The state moves on.

    Args:
      loop: what to profile.
      seconds: of training without the profiler; with it, half as long.

    Raises:
      UserError: the loop is not compiled; TensorFlow's profiler recorded none of its operations.
    """
    if loop.graph is None:
        loop.warm_up()
    if loop.graph is None:
        raise UserError("--eager: only a compiled step is profiled; leave it out")
    calls = _Calls(loop)
    calls.run(0.0, least=2)  # what happens once does not count
    step, waiting, between = calls.run(seconds, least=3)
    with scratch.temporary("profile") as folder:
        tf.profiler.experimental.start(str(folder))
        try:
            before = int(loop.state.global_step)
            calls.run(seconds / 2, least=1)
            steps = int(loop.state.global_step) - before
        finally:
            tf.profiler.experimental.stop()
        events, device = read_trace(str(folder))
    if not events:
        raise UserError("TensorFlow's profiler recorded no operation of the step")
    return summed_up(loop, events, steps, (step, waiting, between), device)


class _Calls:
    """Trains on and on, and says what a step took."""

    def __init__(self, loop: Loop) -> None:
        self._loop, self._records = loop, loop.train_epoch()

    def run(self, seconds: float, least: int) -> tuple[float, float, float]:
        """(ms a step, of them waiting, of them between calls), medians over calls."""
        found: list[tuple[float, float, float]] = []
        started = last = time.perf_counter()
        while len(found) < least or time.perf_counter() - started < seconds:
            call = self._next()
            now = time.perf_counter()
            whole, last = now - last, now
            per_step = 1e3 / call.steps
            between = max(0.0, whole - call.seconds)
            found.append((whole * per_step, call.input_seconds * per_step, between * per_step))
        middle = sorted(found)[len(found) // 2]
        return middle

    def _next(self) -> Call:
        while True:
            record = next(self._records, None)
            if record is not None:
                return record
            state = self._loop.state
            if int(state.batch_index) >= self._loop.steps:
                state.epoch.assign_add(1)
                state.batch_index.assign(0)
            self._records = self._loop.train_epoch()


def lines(found: Profile, device: str) -> Iterator[str]:
    """The profile as a table, what is around the step, and the verdict."""
    yield (
        f"{found.step:.3g} ms a step of {found.batch_size} on {device}: {found.flop / 1e9:.3g} "
        f"GFLOP, {found.flop / found.step / 1e6:,.0f} GFLOP/s; this machine's matmul reaches "
        f"{found.peak / 1e9:,.0f}, on {counted(found.lanes, 'thread')} side by side"
    )
    width = max(len(row.layer) for row in found.rows)
    names = ("forward", "backward", "update", "ms", "share", "MFLOP", "GFLOP/s", "of peak")
    yield f"{'':{width}}" + "".join(f"{name:>10}" for name in names)
    is_whole = found.recorded >= MOSTLY
    for row in found.rows:
        cells = [f"{ms:10.3f}" if ms else f"{'':10}" for ms in row[1:4]]
        cells += [f"{row.milliseconds:10.3f}", f"{row.milliseconds / found.busy:10.1%}"]
        if row.flop:
            share = row.gflops * 1e9 * found.lanes / found.peak
            cells += [f"{row.flop / 1e6:10,.1f}"]
            cells += [f"{row.gflops:10,.0f}", f"{share:10.0%}"] if is_whole else []
        yield f"{row.layer:{width}}{''.join(cells)}".rstrip()
    yield f"{'all':{width}}{'':30}{found.busy:10.3f}{1:10.1%}{found.flop / 1e6:10,.1f}"
    if is_whole:
        yield (
            f"times are of all threads together, {found.lanes * found.step:.3g} ms a step in all; "
            f"in {found.idle:.2g} of them none of these operations runs"
        )
    else:
        yield (
            f"TensorFlow's profiler recorded {100 * found.recorded:.0f} % of the step's products: "
            "it leaves out what it takes for cheap; the times above are too short, and speeds are "
            "left out"
        )
    yield (
        f"around the step: {found.waiting:.2g} ms waiting for batches ({found.pipeline} pipeline), "
        f"{found.between:.2g} ms between calls of {counted(found.steps_per_call, 'step')}; "
        f"{found.operations:.0f} operations a step"
    )
    yield found.verdict


def read_trace(folder: str) -> tuple[list[Event], str]:
    """(the operations in a profiler's folder, the kind of device they ran on).

    On a GPU they are its kernels, under the name of the operation that started them.
    """
    events: dict[str, list[Event]] = {"CPU": [], "GPU": []}
    for file in Path(folder).rglob("*.xplane.pb"):
        space = xplane_pb2.XSpace()
        space.ParseFromString(file.read_bytes())
        for plane in space.planes:
            kind = "GPU" if plane.name.startswith("/device:GPU") else "CPU"
            events[kind] += _events_of(plane, kind)
    device = "GPU" if events["GPU"] else "CPU"
    return events[device], device


def _events_of(plane: Any, kind: str) -> Iterable[Event]:
    stats = {key: value.name for key, value in plane.stat_metadata.items()}
    for line in plane.lines:
        for event in line.events:
            name = plane.event_metadata[event.metadata_id].name
            if kind == "GPU":
                name = _operation_behind(event, stats, plane) or ""
            path, colon, operation = name.rpartition(":")
            if colon and "::" not in name and re.fullmatch(r"_?[A-Z]\w+", operation):
                yield Event(path, operation, event.duration_ps / 1e9)


def _operation_behind(event: Any, stats: Mapping[int, str], plane: Any) -> str | None:
    """The name:Type of the operation that started a kernel."""
    for stat in event.stats:
        if stats.get(stat.metadata_id) in ("tf_op", "name"):
            if stat.str_value:
                return stat.str_value
            return plane.stat_metadata[stat.ref_value].name
    return None


def place_of(path: str, layers: Mapping[str, str]) -> tuple[str, str]:
    """(layer, what it does there) of an operation, by the scopes in its name.

    Args:
      path: such as "while/body/_1/gradient_tape/forward/conv1/conv1_1/Conv2DBackpropFilter".
      layers: scope → the layer's name.
    """
    scopes = path.split("/")
    way = BACKWARD if {"gradient_tape", "backward"} & {*scopes} else FORWARD
    if FORWARD_SCOPE in scopes:  # below it names are the model's, whatever they are
        below = scopes[scopes.index(FORWARD_SCOPE) + 1 :]
        for scope in (*below, "/".join(below[:2])):  # a nested model's input has two names
            name = scope if scope in layers else re.sub(r"_\d+$", "", scope)  # a second time
            if name in layers:
                return layers[name], way
        return REST, way
    if UPDATE in scopes or "penalties" in scopes:
        return UPDATE, UPDATE
    if INPUT in scopes:
        return INPUT, FORWARD
    if any(scope == LOSS or re.fullmatch(rf"{LOSS}_\d+", scope) for scope in scopes):
        return LOSS, way
    return REST, way


def layers_of(model: Any) -> dict[str, str]:
    """Scope → layer, in the model's order."""
    program = program_of(model)
    if program is not None:
        return {call.name: call.name for call in program.calls}
    leaves = [layer for layer in keras_layers(model) if is_leaf(layer) and layer is not model]
    return {layer.name: layer.name for layer in leaves}


def summed_up(
    loop: Loop,
    events: Iterable[Event],
    steps: int,
    times: tuple[float, float, float],
    device: str,
) -> Profile:
    """The profile of a loop from the operations of so many steps.

    Args:
      loop: what was profiled.
      events: of the profiler.
      steps: in which they ran.
      times: as `Profile` has them: step, waiting, between.
      device: "CPU" or "GPU".
    """
    layers = layers_of(loop.state.model)
    spent: dict[tuple[str, str], float] = defaultdict(float)
    products, preparing, busy, count, multiplied = 0.0, 0.0, 0.0, 0, 0
    for event in events:
        if event.kind in ("While", "If", "StatelessIf", "StatelessWhile", "PartitionedCall"):
            continue  # what is in them is told by itself
        layer, way = place_of(event.name, layers)
        if device == "CPU" and not STEPS.intersection(event.name.split("/")):
            layer, way = INPUT, FORWARD  # of tf.data, which has threads of its own
            preparing += event.milliseconds / steps
        spent[layer, UPDATE if layer == UPDATE else way] += event.milliseconds / steps
        busy += event.milliseconds / steps
        count += 1
        if any(product in event.kind for product in arithmetic.PRODUCTS):
            products += event.milliseconds / steps
            multiplied += 1
    flop: dict[str, float] = defaultdict(float)
    expected = 0
    for operation in arithmetic.operations(loop.graph) if loop.graph else ():
        own = arithmetic.flop_of(operation)
        flop[place_of(operation.name, layers)[0]] += own
        expected += own > 0
    names = [*dict.fromkeys(layers.values()), INPUT, LOSS, UPDATE, REST]
    rows = [
        Row(name, spent[name, FORWARD], spent[name, BACKWARD], spent[name, UPDATE], flop[name])
        for name in dict.fromkeys(names)
    ]
    step, waiting, between = times
    intra = tf.config.threading.get_intra_op_parallelism_threads()
    inter = tf.config.threading.get_inter_op_parallelism_threads()
    is_split = device == "CPU" and intra == 1
    return Profile(
        tuple(row for row in rows if row.milliseconds or row.flop),
        step,
        waiting,
        between,
        busy,
        max(1, min(inter or devices.cores(), devices.cores())) if is_split else 1,
        preparing,
        products,
        count / steps,
        min(1.0, multiplied / steps / expected) if expected and device == "CPU" else 1.0,
        sum(flop.values()),
        arithmetic.peak(again=True),
        OWN if isinstance(loop.pipeline, FromDataset) else loop.pipeline.name,
        loop.steps_per_call,
        loop.pipeline.batch_size,
        loop.steps,
        device,
    )
