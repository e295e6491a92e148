"""Optimizers: pure update rules on vectors, and the object that keeps their slots and numbers.

A rule takes the gradient, the weights and the slots, each one float32 vector [n] over all trainable
weights, and the count of updates made before this one. It returns the update to add to the weights,
and the new slots. The weights come as a function that puts the vector together when it is called,
since few rules look at them. A rule that goes element by element says so with `@by_element`: then
it is called for each block of the vector (`vectors.blocks_of`), and no large weight is copied.

The rules and their defaults are those of keras.optimizers (3.15), which they follow to float32
rounding.

To add a rule, write its function here with `@OPTIMIZERS.register` and `@keeps` for its slots, and a
field of `OptimizerSettings` for each hyperparameter that no other rule has.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeAlias

from tfloop.errors import UserError
from tfloop.lazy import tf
from tfloop.registry import Registry, parameters
from tfloop.settings import (
    LARGEST,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    SMALLEST,
    UNIT,
    fields_of,
    option,
)
from tfloop.vectors import LARGE, Blocks, Vector, blocks_of, count_elements, flatten, select
from tfloop.wording import names_text

OPTIMIZERS = Registry("optimizer")

Number: TypeAlias = "float | tf.Tensor"
Weights: TypeAlias = "Callable[[], tf.Tensor]"
Slots: TypeAlias = "dict[str, tf.Tensor]"
Update: TypeAlias = "tuple[tf.Tensor, Slots]"  # what is added to the weights, and the new slots


class Slot(NamedTuple):
    """What a rule keeps from one update to the next."""

    name: str
    initial: float = 0.0  # each element's value before the first update
    is_scalar: bool = False  # one number, not one for each weight
    switch: str = ""  # kept only where this hyperparameter is true

    def value(self, size: int) -> tf.Tensor:
        """float32 [size], or [] for a scalar."""
        return tf.fill([] if self.is_scalar else [size], self.initial)


def keeps(*slots: str | Slot) -> Callable[[Callable], Callable]:
    """A decorator that names the slots of a rule; a plain name is a vector that starts at 0."""

    def mark(rule: Callable) -> Callable:
        kept = [Slot(slot) if isinstance(slot, str) else slot for slot in slots]
        rule.slots = kept  # type: ignore[attr-defined]  # a function takes attributes
        return rule

    return mark


def by_element(rule: Callable) -> Callable:
    """A decorator: each element of the update depends on the same element of all else alone."""
    rule.by_element = True  # type: ignore[attr-defined]
    return rule


def f32(number: Number) -> tf.Tensor:
    """float32. Hyperparameters are float64, so that 1 - beta_2 is 0.001 and not 5e-5 off it."""
    return tf.cast(number, tf.float32)


def average(old: tf.Tensor, new: tf.Tensor, decay: Number) -> tf.Tensor:
    """The exponential moving average decay · old + (1 - decay) · new."""
    return old + (new - old) * f32(1.0 - decay)


@OPTIMIZERS.register
@by_element
@keeps("momentum")
def sgd(
    gradient: tf.Tensor,
    weights: Weights,
    slots: Slots,
    count: tf.Tensor,
    rate: tf.Tensor,
    *,
    momentum: Number = 0.0,
    nesterov: bool = False,
) -> Update:
    """m ← momentum · m - rate · g;  w ← w + m, or with Nesterov w ← w + momentum · m - rate · g."""
    m = f32(momentum) * slots["momentum"] - rate * gradient
    update = f32(momentum) * m - rate * gradient if nesterov else m
    return update, {"momentum": m}


@OPTIMIZERS.register
@by_element
@keeps("mean_square", "momentum", Slot("mean_gradient", switch="centered"))
def rmsprop(
    gradient: tf.Tensor,
    weights: Weights,
    slots: Slots,
    count: tf.Tensor,
    rate: tf.Tensor,
    *,
    rho: Number = 0.9,
    momentum: Number = 0.0,
    epsilon: Number = 1e-7,
    centered: bool = False,
) -> Update:
    """v ← rho · v + (1 - rho) · g²;  m ← momentum · m + rate · g / √(v + epsilon);  w ← w - m.

    Centered, the mean gradient a ← rho · a + (1 - rho) · g is kept too, and v - a² stands in the
    root for v. (Hinton, Tieleman: lecture 6.5, 2012; centered: Graves, arXiv:1308.0850.)
    """
    v = average(slots["mean_square"], tf.square(gradient), rho)
    new = {"mean_square": v}
    if centered:
        new["mean_gradient"] = average(slots["mean_gradient"], gradient, rho)
        v = v - tf.square(new["mean_gradient"])
    scaled = rate * gradient * tf.math.rsqrt(v + f32(epsilon))
    new["momentum"] = f32(momentum) * slots["momentum"] + scaled
    return -new["momentum"], new


@OPTIMIZERS.register
@by_element
@keeps("momentum", "mean_square")
def adam(
    gradient: tf.Tensor,
    weights: Weights,
    slots: Slots,
    count: tf.Tensor,
    rate: tf.Tensor,
    *,
    beta_1: Number = 0.9,
    beta_2: Number = 0.999,
    epsilon: Number = 1e-7,
) -> Update:
    """m ← beta_1 · m + (1 - beta_1) · g;  v ← beta_2 · v + (1 - beta_2) · g²;  with t = count + 1
    w ← w - rate · √(1 - beta_2 ** t) / (1 - beta_1 ** t) · m / (√v + epsilon).

    (Kingma and Ba, arXiv:1412.6980, the form at the end of section 2, where epsilon is "epsilon
    hat".)
    """
    t = f32(count + 1)
    m = average(slots["momentum"], gradient, beta_1)
    v = average(slots["mean_square"], tf.square(gradient), beta_2)
    alpha = rate * tf.sqrt(1.0 - tf.pow(f32(beta_2), t)) / (1.0 - tf.pow(f32(beta_1), t))
    return -alpha * m / (tf.sqrt(v) + f32(epsilon)), {"momentum": m, "mean_square": v}


@OPTIMIZERS.register
@by_element
@keeps("momentum", "mean_square")
def adamw(
    gradient: tf.Tensor,
    weights: Weights,
    slots: Slots,
    count: tf.Tensor,
    rate: tf.Tensor,
    *,
    weight_decay: Number = 0.004,
    beta_1: Number = 0.9,
    beta_2: Number = 0.999,
    epsilon: Number = 1e-7,
) -> Update:
    """adam's update, and - rate · weight_decay · w beside it.

    (Loshchilov and Hutter, arXiv:1711.05101.)
    """
    betas = {"beta_1": beta_1, "beta_2": beta_2, "epsilon": epsilon}
    update, new = adam(gradient, weights, slots, count, rate, **betas)
    return update - rate * f32(weight_decay) * weights(), new


@OPTIMIZERS.register
@by_element
@keeps("momentum", "mean_square", Slot("product", initial=1.0, is_scalar=True))
def nadam(
    gradient: tf.Tensor,
    weights: Weights,
    slots: Slots,
    count: tf.Tensor,
    rate: tf.Tensor,
    *,
    beta_1: Number = 0.9,
    beta_2: Number = 0.999,
    epsilon: Number = 1e-7,
) -> Update:
    """adam with Nesterov's momentum: u_t = beta_1 · (1 - ½ · 0.96 ** t), U_t = u_1 · … · u_t,
    w ← w - rate · (u_{t+1} · m / (1 - U_{t+1}) + (1 - u_t) · g / (1 - U_t))
                 / (√(v / (1 - beta_2 ** t)) + epsilon).

    U_t is the slot "product". (Dozat, "Incorporating Nesterov momentum into Adam", 2016.)
    """
    t = f32(count + 1)
    u = f32(beta_1) * (1.0 - 0.5 * tf.pow(0.96, t))
    u_next = f32(beta_1) * (1.0 - 0.5 * tf.pow(0.96, t + 1.0))
    product = slots["product"] * u
    m = average(slots["momentum"], gradient, beta_1)
    v = average(slots["mean_square"], tf.square(gradient), beta_2)
    m_hat = u_next * m / (1.0 - product * u_next) + (1.0 - u) * gradient / (1.0 - product)
    v_hat = v / (1.0 - tf.pow(f32(beta_2), t))
    update = -rate * m_hat / (tf.sqrt(v_hat) + f32(epsilon))
    return update, {"momentum": m, "mean_square": v, "product": product}


@OPTIMIZERS.register
@by_element
@keeps("momentum", "infinity_norm")
def adamax(
    gradient: tf.Tensor,
    weights: Weights,
    slots: Slots,
    count: tf.Tensor,
    rate: tf.Tensor,
    *,
    beta_1: Number = 0.9,
    beta_2: Number = 0.999,
    epsilon: Number = 1e-7,
) -> Update:
    """m as in adam;  u ← max(beta_2 · u, |g|);  w ← w - rate / (1 - beta_1 ** t) · m / (u + ε)."""
    t = f32(count + 1)
    m = average(slots["momentum"], gradient, beta_1)
    u = tf.maximum(f32(beta_2) * slots["infinity_norm"], tf.abs(gradient))
    update = -rate / (1.0 - tf.pow(f32(beta_1), t)) * m / (u + f32(epsilon))
    return update, {"momentum": m, "infinity_norm": u}


def clip(
    gradients: Vector,
    *,
    clip_value: Number | None = None,
    clip_norm: Number | None = None,
    clip_global_norm: Number | None = None,
) -> Vector:
    """The gradients, made smaller where they are too large; None leaves a limit out.

    clip_value: each entry to [-clip_value, clip_value].
    clip_norm: each weight's gradient g to g · min(1, clip_norm / |g|).
    clip_global_norm: the same for all of them as one vector (Pascanu et al., arXiv:1211.5063).
    """
    if clip_value is not None:
        gradients = gradients.map(lambda g: tf.clip_by_value(g, -clip_value, clip_value))
    if clip_norm is not None:
        parts = gradients.parts()
        gradients = Vector.of({name: tf.clip_by_norm(g, clip_norm) for name, g in parts.items()})
    if clip_global_norm is not None:
        share = clip_global_norm / tf.maximum(gradients.norm, clip_global_norm)
        gradients = gradients.map(lambda g: g * share)
    return gradients


CLIPS = tuple(parameters(clip))


@OPTIMIZERS.register
@by_element
@keeps("momentum")
def lion(
    gradient: tf.Tensor,
    weights: Weights,
    slots: Slots,
    count: tf.Tensor,
    rate: tf.Tensor,
    *,
    weight_decay: Number = 0.0,
    beta_1: Number = 0.9,
    beta_2: Number = 0.99,
) -> Update:
    """w ← w - rate · (sign(beta_1 · m + (1 - beta_1) · g) + weight_decay · w);
    m ← beta_2 · m + (1 - beta_2) · g.

    (Chen et al., arXiv:2302.06675.)
    """
    sign = tf.sign(average(slots["momentum"], gradient, beta_1))
    m = average(slots["momentum"], gradient, beta_2)
    return -rate * (sign + f32(weight_decay) * weights()), {"momentum": m}


class _Choices(Collection):
    """The rules, and the optimizers of Keras that are taken as they are: name → Keras's name.

    Muon is one: it orthogonalises each weight as a matrix, which is no rule on one vector.
    """

    keras: ClassVar = {"muon": "Muon"}

    def __contains__(self, name: object) -> bool:
        return name in OPTIMIZERS or name in self.keras

    def __iter__(self) -> Iterator[str]:
        return iter([*OPTIMIZERS, *self.keras])

    def __len__(self) -> int:
        return len(OPTIMIZERS) + len(self.keras)


CHOICES = _Choices()


def of_keras(name: str, **hyper: Any) -> Any:
    """A new keras.optimizers.Optimizer by its name in CHOICES.

    Raises:
      UserError: a hyperparameter that it is not handed.
    """
    import keras

    taken = ("momentum", "nesterov", "weight_decay", "epsilon")
    for key in hyper:
        if key not in taken:
            raise UserError(f"--{key}: optimizer '{name}' has no {key}; it has {', '.join(taken)}")
    return getattr(keras.optimizers, CHOICES.keras[name])(**hyper)


def parsed_rates(pairs: Sequence[str]) -> dict[str, float]:
    """{pattern: factor} of "pattern:factor" pairs.

    Raises:
      UserError: one that is no such pair.
    """
    found: dict[str, float] = {}
    for pair in pairs:
        pattern, colon, text = pair.rpartition(":")
        try:
            factor = float(text)
        except ValueError:
            factor = math.nan
        is_factor = factor == 0 or SMALLEST <= factor <= LARGEST
        if not colon or not pattern or not is_factor:
            raise UserError(f"--rate_of={pair}: expected PATTERN:FACTOR, such as conv.*:0.1")
        check_pattern(pattern)
        found[pattern] = factor
    return found


def check_pattern(pattern: str) -> None:
    """Raises UserError for what is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{pattern!r} is no regular expression: {error}") from None


def matching(pattern: str, names: Sequence[str]) -> list[bool]:
    """Which of the weights' names the pattern is found in.

    Raises:
      UserError: in none.
    """
    found = [bool(re.search(pattern, name)) for name in names]
    if not any(found):
        raise UserError(f"{pattern!r} matches no weight; there are {names_text(names)}")
    return found


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """The update rule that is chosen, and the hyperparameters of all; None is the rule's own."""

    HEADING: ClassVar[str] = "optimizer"

    optimizer: str = option("rmsprop", "update rule", choices=CHOICES, retrace="value")
    momentum: float | None = option(None, "share of the last update in this one", within=UNIT)
    nesterov: bool = option(False, "Nesterov's momentum", retrace="value")
    rho: float | None = option(None, "decay of the mean square", within=UNIT)
    centered: bool = option(
        False, "divide by the variance, not by the mean square", retrace="value"
    )
    beta_1: float | None = option(None, "decay of the mean gradient", within=SHARE)
    beta_2: float | None = option(None, "decay of the gradient's mean size", within=SHARE)
    epsilon: float | None = option(None, "added to the divisor", within=NOT_NEGATIVE)
    weight_decay: float | None = option(
        None, "decoupled decay, times the rate", within=NOT_NEGATIVE
    )
    clip_value: float | None = option(
        None, "limit of each entry of the gradient", within=POSITIVE, retrace="set"
    )
    clip_norm: float | None = option(
        None, "limit of the norm of each weight's gradient", within=POSITIVE, retrace="set"
    )
    clip_global_norm: float | None = option(
        None, "limit of the norm of the whole gradient", within=POSITIVE, retrace="set"
    )
    rate_of: tuple[str, ...] = option(
        (),
        "factors of the rate by weight: PATTERN:FACTOR,… with patterns (regular expressions) of "
        "names",
        retrace="value",
    )
    exclude_from_weight_decay: str | None = option(
        None,
        "a pattern of weights' names that do not decay, such as bias|gamma|beta",
        retrace="value",
    )
    ema: float | None = option(
        None,
        "decay of a moving average of the weights, which then is what is evaluated",
        within=SHARE,
        retrace="set",
    )


class Optimizer:
    """An update rule with its slots, its count and its numbers as variables.

    Attributes:
      name: of the rule.
      hyper: name → float64 variable, for every hyperparameter of the rule but the rate, which the
        schedule gives.
      slots: name → float32 variable, after `build`: one vector [n] over all weights, or a scalar.
        Beside large weights (`vectors.blocks_of`), "momentum" is that of the others, and that of a
        large one is "momentum/dense/kernel".
      count: int64 variable, updates made since the slots were last reset; drives the bias
        correction.
    """

    def __init__(
        self,
        name: str = "rmsprop",
        *,
        rate_of: Mapping[str, float] | None = None,
        exclude_from_weight_decay: str | None = None,
        **hyper: Any,
    ) -> None:
        """Make one.

        Args:
          name: one of OPTIMIZERS.
          rate_of: {pattern: factor}: what the update of weights is multiplied by in whose names the
            regular expression is found; the last that is found counts.
          exclude_from_weight_decay: a regular expression of the names of weights that do not decay.
          **hyper: the rule's hyperparameters, and `clip`'s; those left out take its defaults.

        Raises:
          UserError: an unknown rule, or a hyperparameter that it does not have.
        """
        self.name = name
        fields = fields_of(OptimizerSettings)
        clips = {key: hyper.pop(key) for key in CLIPS if hyper.get(key) is not None}
        self._rule, numbers, self._switches = OPTIMIZERS.bind(name, hyper, fields)
        clips = {key: fields[key].parse(value) for key, value in clips.items()}
        self._clips, numbers = tuple(clips), numbers | clips
        self.hyper = {
            key: tf.Variable(value, dtype=tf.float64, trainable=False, name=key)
            for key, value in numbers.items()
        }
        if exclude_from_weight_decay and "weight_decay" not in numbers:
            raise UserError(f"--exclude_from_weight_decay: {name} has no weight_decay")
        for pattern in (*(rate_of or {}), exclude_from_weight_decay or ""):
            check_pattern(pattern)
        self._rate_of, self._undecayed = dict(rate_of or {}), exclude_from_weight_decay
        self.slots: dict[str, tf.Variable] = {}
        self.count = tf.Variable(0, dtype=tf.int64, trainable=False, name="count")

    def build(self, weights: dict[str, tf.Variable], names: Sequence[str] | None = None) -> None:
        """Make the slots for these weights.

        Args:
          weights: by name.
          names: what patterns are looked for in, where it is not the weights' names.

        Raises:
          UserError: it has slots already, which belong to another state; a pattern that is found in
            no name.
        """
        if self.slots:
            raise UserError(
                f"this {self.name} optimizer belongs to another state already; make one for each"
            )
        names = list(names or weights)
        for pattern in (*self._rate_of, self._undecayed):
            if pattern:
                matching(pattern, names)
        self._lay_out(weights, names)

    def _lay_out(self, weights: dict[str, tf.Variable], names: Sequence[str]) -> None:
        """Make slots with their initial values, and what depends on the weights' order."""
        is_whole = not getattr(self._rule, "by_element", False)
        self._blocks: Blocks = (tuple(weights),) if is_whole else blocks_of(weights)
        self._stable = dict(zip(weights, names, strict=True))
        self._sizes = {name: count_elements([weight]) for name, weight in weights.items()}
        self.slots = {
            self._key(slot, block): tf.Variable(
                slot.value(self._size_of(block)), trainable=False, name=slot.name
            )
            for slot in self._kept()
            for block in (self._blocks[:1] if slot.is_scalar else self._blocks)
        }
        factors = dict.fromkeys(weights, 1.0)
        for pattern, factor in self._rate_of.items():
            found = {name: factor for name in weights if re.search(pattern, self._stable[name])}
            factors.update(found)
        self._factors = self._by_block(factors) if self._rate_of else None
        self._decays = None
        if left_out := self._undecayed:
            decays = {name: float(not re.search(left_out, self._stable[name])) for name in weights}
            self._decays = self._by_block(decays)

    def _key(self, slot: Slot, block: tuple[str, ...]) -> str:
        """The name of a slot's variable for a block."""
        is_one = slot.is_scalar or len(self._blocks) == 1
        is_large = not is_one and self._sizes[block[0]] >= LARGE
        return f"{slot.name}/{self._stable[block[0]]}" if is_large else slot.name

    def _size_of(self, block: tuple[str, ...]) -> int:
        return sum(self._sizes[name] for name in block)

    def _by_block(self, values: Mapping[str, float]) -> list[tf.Tensor]:
        """A vector for each block, that has for every element the value of its weight."""

        def vector(block: tuple[str, ...]) -> tf.Tensor:
            numbers = tf.constant([values[name] for name in block], tf.float32)
            return tf.repeat(numbers, [self._sizes[name] for name in block])

        return [vector(block) for block in self._blocks]

    def rebuild(
        self,
        before: dict[str, tf.Variable],
        weights: dict[str, tf.Variable],
        names: Sequence[str] | None = None,
    ) -> None:
        """Make the slots anew for other weights of the same model; those that stay keep theirs."""
        old = {slot.name: self._parts_of(slot) for slot in self._kept()}
        self._lay_out(weights, list(names or weights))
        for slot in self._kept():
            self._set_parts(slot, old[slot.name])

    def _parts_of(self, slot: Slot) -> dict[str, tf.Tensor]:
        """The slot's values by weight, as vectors; a scalar by ""."""
        if slot.is_scalar:
            return {"": tf.identity(self.slots[slot.name])}
        found: dict[str, tf.Tensor] = {}
        for block in self._blocks:
            sizes = [self._sizes[name] for name in block]
            parts = tf.split(self.slots[self._key(slot, block)], sizes)
            found.update(zip(block, parts, strict=True))
        return found

    def _set_parts(self, slot: Slot, parts: Mapping[str, tf.Tensor]) -> None:
        if slot.is_scalar:
            self.slots[slot.name].assign(parts[""])
            return
        for block in self._blocks:
            new = [
                parts[name] if name in parts else slot.value(self._sizes[name]) for name in block
            ]
            self.slots[self._key(slot, block)].assign(tf.concat(new, axis=0))

    def in_blocks(self, name: str) -> list[str]:
        """The names in `slots` of a slot that lies in several blocks; none where it does not."""
        keys = [key for key in self.slots if key == name or key.startswith(f"{name}/")]
        return keys if len(keys) > 1 else []

    def set_whole(self, name: str, vector: tf.Tensor) -> None:
        """Set a slot from one vector [n] over all weights, in their order."""
        slot = next(slot for slot in self._kept() if slot.name == name)
        parts = tf.split(vector, list(self._sizes.values()))
        self._set_parts(slot, dict(zip(self._sizes, parts, strict=True)))

    def _kept(self) -> list[Slot]:
        """The rule's slots, less those of switches that are off."""
        slots: list[Slot] = getattr(self._rule, "slots", [])  # a rule without `keeps` has none
        return [slot for slot in slots if not slot.switch or self._switches[slot.switch]]

    def updates(
        self, gradients: Vector, weights: dict[str, tf.Variable], rate: tf.Tensor
    ) -> tuple[Vector, Any]:
        """(the updates to add to the weights, the new slots). Changes nothing."""
        with tf.name_scope(f"update/{self.name}/"):
            numbers = {key: tf.convert_to_tensor(value) for key, value in self.hyper.items()}
            clips = {key: f32(numbers.pop(key)) for key in self._clips}
            if clips:
                gradients = clip(gradients, **clips)
            hyper = numbers | self._switches
            is_whole = len(self._blocks) < len(blocks_of(weights))
            blocks = [gradients.flat] if is_whole else gradients.blocks
            updates, new = [], {}
            for index, (block, gradient) in enumerate(zip(self._blocks, blocks, strict=True)):
                keys = {slot.name: self._key(slot, block) for slot in self._kept()}
                slots = {name: tf.convert_to_tensor(self.slots[key]) for name, key in keys.items()}
                vector = functools.partial(self._weights_in, weights, index)
                update, after = self._rule(gradient, vector, slots, self.count, rate, **hyper)
                if self._factors is not None:
                    update = update * self._factors[index]
                updates.append(update)
                new.update({keys[name]: value for name, value in after.items()})
            return Vector(updates[0] if is_whole else updates, weights), new

    def _weights_in(self, weights: dict[str, tf.Variable], index: int) -> tf.Tensor:
        """The weights of a block that decay, as a vector; 0 for the others."""
        flat = flatten(weights[name] for name in self._blocks[index])
        return flat if self._decays is None else flat * self._decays[index]

    def apply(
        self,
        updates: Vector,
        slots: Any,
        weights: dict[str, tf.Variable],
        valid: tf.Tensor,
    ) -> None:
        """Add the updates to the weights and keep the slots.

        Nothing changes where `valid`, a boolean scalar, is false.
        """
        with tf.name_scope(f"update/{self.name}/"):
            made = updates.map(lambda update: select(valid, update, tf.zeros_like(update)))
            for name, part in made.parts().items():
                weights[name].assign_add(tf.cast(part, weights[name].dtype))
            for name, slot in slots.items():
                self.slots[name].assign(select(valid, slot, self.slots[name]))
            self.count.assign_add(tf.cast(valid, tf.int64))

    def reset(self) -> None:
        """Slots and count as they were when built; hyperparameters stay."""
        self.count.assign(0)
        for slot in self._kept():
            for block in self._blocks[:1] if slot.is_scalar else self._blocks:
                variable = self.slots[self._key(slot, block)]
                variable.assign(slot.value(self._size_of(block)))
