"""Optimizers: pure update rules on vectors, and the object that keeps their slots and numbers.

A rule takes the gradient, the weights and the slots, each one float32 vector [n] over all trainable weights, and the
count of updates made before this one. It returns the update to add to the weights, and the new slots. One vector in
place of a tensor per weight makes every rule a handful of operations, however many layers there are.

The rules and their defaults are those of keras.optimizers (3.15), which they follow to float32 rounding.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping

import keras
import numpy as np
import tensorflow as tf

from tfloop.errors import UserError
from tfloop.schedules import bind, parameters


def f32(number) -> tf.Tensor:
    """Hyperparameters are float64, so that 1 - beta_2 is 0.001 and not 5e-5 off it; the arithmetic is float32."""
    return tf.cast(number, tf.float32)


def average(old, new, decay):
    """The exponential moving average decay · old + (1 - decay) · new."""
    return old + (new - old) * f32(1.0 - decay)


def sgd(gradient, weights, slots, count, rate, *, momentum=0.0, nesterov=False):
    """m ← momentum · m - rate · g;  w ← w + m, or with Nesterov w ← w + momentum · m - rate · g."""
    m = f32(momentum) * slots["momentum"] - rate * gradient
    return f32(momentum) * m - rate * gradient if nesterov else m, {"momentum": m}


def rmsprop(gradient, weights, slots, count, rate, *, rho=0.9, momentum=0.0, epsilon=1e-7, centered=False):
    """v ← rho · v + (1 - rho) · g²;  m ← momentum · m + rate · g / √(v + epsilon);  w ← w - m.

    Centered, the mean gradient a ← rho · a + (1 - rho) · g is kept too, and v - a² stands in the root for v.
    (Hinton, Tieleman: lecture 6.5, 2012; centered: Graves, arXiv:1308.0850.)
    """
    v = average(slots["mean_square"], tf.square(gradient), rho)
    new = {"mean_square": v}
    if centered:
        new["mean_gradient"] = average(slots["mean_gradient"], gradient, rho)
        v = v - tf.square(new["mean_gradient"])
    new["momentum"] = f32(momentum) * slots["momentum"] + rate * gradient * tf.math.rsqrt(v + f32(epsilon))
    return -new["momentum"], new


def adam(gradient, weights, slots, count, rate, *, beta_1=0.9, beta_2=0.999, epsilon=1e-7):
    """m ← beta_1 · m + (1 - beta_1) · g;  v ← beta_2 · v + (1 - beta_2) · g²;  with t = count + 1
    w ← w - rate · √(1 - beta_2 ** t) / (1 - beta_1 ** t) · m / (√v + epsilon).

    (Kingma and Ba, arXiv:1412.6980, the form at the end of section 2, where epsilon is "epsilon hat".)
    """
    t = f32(count + 1)
    m, v = average(slots["momentum"], gradient, beta_1), average(slots["mean_square"], tf.square(gradient), beta_2)
    alpha = rate * tf.sqrt(1.0 - tf.pow(f32(beta_2), t)) / (1.0 - tf.pow(f32(beta_1), t))
    return -alpha * m / (tf.sqrt(v) + f32(epsilon)), {"momentum": m, "mean_square": v}


def adamw(gradient, weights, slots, count, rate, *, weight_decay=0.004, beta_1=0.9, beta_2=0.999, epsilon=1e-7):
    """adam's update, and - rate · weight_decay · w beside it (Loshchilov and Hutter, arXiv:1711.05101)."""
    update, new = adam(gradient, weights, slots, count, rate, beta_1=beta_1, beta_2=beta_2, epsilon=epsilon)
    return update - rate * f32(weight_decay) * weights, new


def nadam(gradient, weights, slots, count, rate, *, beta_1=0.9, beta_2=0.999, epsilon=1e-7):
    """adam with Nesterov's momentum: u_t = beta_1 · (1 - ½ · 0.96 ** t), U_t = u_1 · … · u_t,
    w ← w - rate · (u_{t+1} · m / (1 - U_{t+1}) + (1 - u_t) · g / (1 - U_t)) / (√(v / (1 - beta_2 ** t)) + epsilon).

    (Dozat, "Incorporating Nesterov momentum into Adam", 2016.) U_t is the slot "product", a scalar that starts at 1.
    """
    t = f32(count + 1)
    u, u_next = (f32(beta_1) * (1.0 - 0.5 * tf.pow(0.96, k)) for k in (t, t + 1.0))
    product = slots["product"] * u
    m, v = average(slots["momentum"], gradient, beta_1), average(slots["mean_square"], tf.square(gradient), beta_2)
    m_hat = u_next * m / (1.0 - product * u_next) + (1.0 - u) * gradient / (1.0 - product)
    v_hat = v / (1.0 - tf.pow(f32(beta_2), t))
    return -rate * m_hat / (tf.sqrt(v_hat) + f32(epsilon)), {"momentum": m, "mean_square": v, "product": product}


def adamax(gradient, weights, slots, count, rate, *, beta_1=0.9, beta_2=0.999, epsilon=1e-7):
    """m as in adam;  u ← max(beta_2 · u, |g|);  w ← w - rate / (1 - beta_1 ** t) · m / (u + epsilon)."""
    t = f32(count + 1)
    m = average(slots["momentum"], gradient, beta_1)
    u = tf.maximum(f32(beta_2) * slots["infinity_norm"], tf.abs(gradient))
    return -rate / (1.0 - tf.pow(f32(beta_1), t)) * m / (u + f32(epsilon)), {"momentum": m, "infinity_norm": u}


OPTIMIZERS = {rule.__name__: rule for rule in (sgd, rmsprop, adam, adamw, nadam, adamax)}
SLOTS = {"sgd": ("momentum",), "rmsprop": ("mean_square", "momentum"), "adam": ("momentum", "mean_square"),
         "adamw": ("momentum", "mean_square"), "nadam": ("momentum", "mean_square", "product"),
         "adamax": ("momentum", "infinity_norm")}


class Vector(Mapping):
    """A vector [n] over all trainable weights, which also reads by name: gradients["conv1/kernel"], gradients.norm."""

    def __init__(self, flat: tf.Tensor, like: dict[str, tf.Variable]):
        """Args: the vector, and the weights whose names and shapes its parts have, in order."""
        self.flat, self._like = flat, like

    @classmethod
    def of(cls, tensors: Mapping[str, tf.Tensor]) -> "Vector":
        """All tensors' elements, in order."""
        return cls(flatten(tensors.values()), tensors)

    @functools.cached_property
    def norm(self) -> tf.Tensor:
        """√Σx²"""
        return tf.sqrt(2.0 * tf.nn.l2_loss(self.flat))

    def parts(self) -> dict[str, tf.Tensor]:
        """The parts by name, each with its shape."""
        parts = tf.split(self.flat, [like.shape.num_elements() for like in self._like.values()])
        return {name: tf.reshape(part, like.shape) for part, (name, like) in zip(parts, self._like.items())}

    def norms(self) -> dict[str, float]:
        """The norm of each part, in NumPy."""
        sizes = [like.shape.num_elements() for like in self._like.values()]
        squares = np.add.reduceat(np.square(self.flat.numpy()), np.cumsum([0, *sizes[:-1]]))
        return dict(zip(self._like, np.sqrt(squares).tolist()))

    def __getitem__(self, name: str) -> tf.Tensor:
        if name not in self._like:
            raise KeyError(f"{name}; there are {', '.join(self._like)}")
        return self.parts()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._like)

    def __len__(self) -> int:
        return len(self._like)

    def __repr__(self) -> str:
        return f"Vector of {len(self)} weights, norm {float(self.norm):.6g}: {', '.join(self)}"


def clip(gradients: Vector, *, clip_value=None, clip_norm=None, clip_global_norm=None) -> Vector:
    """The gradients, made smaller where they are too large; None leaves a limit out.

    clip_value: each entry to [-clip_value, clip_value]. clip_norm: each weight's gradient g to g · min(1, clip_norm / |g|).
    clip_global_norm: the same for all of them as one vector (Pascanu et al., arXiv:1211.5063).
    """
    flat = gradients.flat
    if clip_value is not None:
        flat = tf.clip_by_value(flat, -clip_value, clip_value)
    if clip_norm is not None:
        flat = flatten(tf.clip_by_norm(part, clip_norm) for part in Vector(flat, gradients).parts().values())
    if clip_global_norm is not None:
        flat = flat * (clip_global_norm / tf.maximum(Vector(flat, gradients).norm, clip_global_norm))
    return Vector(flat, gradients)


CLIPS = parameters(clip)


class Optimizer(tf.Module):
    """An update rule with its slots, its count and its numbers as variables.

    Attributes:
      hyper: name → float64 variable, for every hyperparameter of the rule but the rate, which the schedule gives.
      slots: name → float32 variable, one vector [n] over all weights (or a scalar); made by `build`.
      count: int64 variable, updates made since the slots were last reset; drives the bias correction.
    """

    def __init__(self, name: str = "rmsprop", **hyper):
        """Args:
          name: one of OPTIMIZERS.
          **hyper: the rule's hyperparameters, and `clip`'s; those left out take its defaults.

        Raises:
          UserError: an unknown rule, or a hyperparameter that it does not have.
        """
        super().__init__(name=name)
        clips = {key: hyper.pop(key) for key in CLIPS if hyper.get(key) is not None}
        self._rule, numbers, self._switches = bind(OPTIMIZERS, "optimizer", name, hyper)
        self._clips, numbers = tuple(clips), numbers | clips
        self.hyper = {key: tf.Variable(value, dtype=tf.float64, trainable=False, name=key)
                      for key, value in numbers.items()}
        self.slots = {}
        self.count = tf.Variable(0, dtype=tf.int64, trainable=False, name="count")

    def build(self, weights: dict[str, tf.Variable]) -> None:
        """Make the slots for these weights.

        Raises:
          UserError: it has slots already, which belong to another state.
        """
        if self.slots:
            raise UserError(f"this {self.name} optimizer belongs to another state already; make one for each")
        size = sum(weight.shape.num_elements() for weight in weights.values())
        names = SLOTS[self.name] + (("mean_gradient",) if self._switches.get("centered") else ())
        self.slots = {name: tf.Variable(_initial(name, size), trainable=False, name=name) for name in names}

    @tf.Module.with_name_scope
    def updates(self, gradients: Vector, weights: dict[str, tf.Variable], rate) -> tuple[Vector, dict[str, tf.Tensor]]:
        """(the updates to add to the weights, the new slots). Changes nothing."""
        numbers = {key: tf.convert_to_tensor(variable) for key, variable in self.hyper.items()}
        if self._clips:
            gradients = clip(gradients, **{key: f32(numbers.pop(key)) for key in self._clips})
        slots = {name: tf.convert_to_tensor(slot) for name, slot in self.slots.items()}
        vector = flatten(weights.values()) if self.name == "adamw" else None  # no other rule looks at them
        update, slots = self._rule(gradients.flat, vector, slots, self.count, rate, **numbers, **self._switches)
        return Vector(update, weights), slots

    @tf.Module.with_name_scope
    def apply(self, updates: Vector, slots: dict[str, tf.Tensor], weights: dict[str, tf.Variable], valid: tf.Tensor) -> None:
        """Add the updates to the weights and keep the slots; nothing changes where `valid`, a boolean, is false."""
        update = select(valid, updates.flat, tf.zeros_like(updates.flat))
        for name, part in Vector(update, weights).parts().items():
            weights[name].assign_add(part)
        for name, slot in slots.items():
            self.slots[name].assign(select(valid, slot, self.slots[name]))
        self.count.assign_add(tf.cast(valid, tf.int64))

    def reset(self) -> None:
        """Slots and count as they were when built; hyperparameters stay."""
        self.count.assign(0)
        for name, slot in self.slots.items():
            slot.assign(_initial(name, slot.shape.num_elements()))


class KerasOptimizer(tf.Module):
    """Any keras.optimizers.Optimizer in Optimizer's place: the loop drives its rate and resets its variables.

    Keras computes and applies in one go. To see its update before it is made, `updates` lets Keras make it, notes
    where that led, and takes it back.
    """

    def __init__(self, inner, variables):
        """Args: a Keras optimizer that no model was compiled with, and the Keras variables that it is to train."""
        super().__init__(name=type(inner).__name__.lower())
        kind = type(inner).__name__
        if not isinstance(inner.learning_rate, keras.Variable):
            raise UserError(f"{kind}: hand it in with a plain learning rate, and its schedule to the state: schedule=…")
        if inner.built:
            raise UserError(f"this {kind} optimizer belongs to another model or state already; make one for each")
        if isinstance(inner, keras.optimizers.LossScaleOptimizer) or inner.loss_scale_factor:
            raise UserError(f"{kind} expects a loss that it has scaled; hand in one that does not, and scale_loss=True to the state")
        if inner.gradient_accumulation_steps:
            raise UserError(f"{kind}: hand it in without gradient_accumulation_steps, and accumulate=… to the loop")
        self.inner, self.hyper, self._variables = inner, {}, list(variables)

    def build(self, weights: dict[str, tf.Variable]) -> None:
        """Make the slots for these weights, which are those of the variables given."""
        self.inner.build(self._variables)
        self.count = self.inner.iterations.value
        self.slots = {str(index): variable.value for index, variable in enumerate(self.inner.variables)
                      if variable.value is not self.count}  # Keras counts models in its names: not names to keep
        self._initial = [(variable, variable.numpy()) for variable in self.inner.variables]

    def _all(self, weights: dict[str, tf.Variable]) -> list[tf.Variable]:
        return [*weights.values(), *self.slots.values(), self.count]

    @tf.Module.with_name_scope
    def updates(self, gradients: Vector, weights: dict[str, tf.Variable], rate) -> tuple[Vector, list[tf.Tensor]]:
        """(the updates to add to the weights, every variable's value after it). Changes nothing."""
        before = [tf.identity(variable) for variable in self._all(weights)]
        self.inner.learning_rate.assign(rate)
        self.inner.apply(list(gradients.parts().values()), self._variables)
        after = [tf.identity(variable) for variable in self._all(weights)]
        for variable, value in zip(self._all(weights), before):
            variable.assign(value)
        return Vector(flatten(after[:len(weights)]) - flatten(before[:len(weights)]), weights), after

    @tf.Module.with_name_scope
    def apply(self, updates: Vector, after: list[tf.Tensor], weights: dict[str, tf.Variable], valid: tf.Tensor) -> None:
        """Go where `updates` led; nothing changes where `valid`, a boolean, is false."""
        for variable, value in zip(self._all(weights), after):
            variable.assign(select(valid, value, variable))

    def reset(self) -> None:
        """Slots, count and rate as they were when built."""
        for variable, value in self._initial:
            variable.assign(value)


def select(condition: tf.Tensor, yes, no) -> tf.Tensor:
    """`yes` or `no`, whole, by one boolean: a copy, where tf.where would broadcast the condition (5 times slower)."""
    return tf.raw_ops.Select(condition=condition, x=tf.convert_to_tensor(yes), y=tf.convert_to_tensor(no))


def flatten(tensors: Iterable) -> tf.Tensor:
    """One vector [n] of all tensors' elements, in order."""
    return tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], axis=0)


def _initial(slot: str, size: int) -> tf.Tensor:
    return tf.ones([]) if slot == "product" else tf.zeros([size])
