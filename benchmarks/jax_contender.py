"""JAX on the job. This file imports no TensorFlow."""

from jobs import EPSILON, RATE, RHO, Job


def contender(job: Job, steps_per_call=1):
    """A jitted JAX step, with convolutions in NHWC and RMSprop written out; several to a call are a
    `lax.scan`."""
    import jax
    import jax.numpy as jnp

    network, weights, n = job.network, job.weights, job.batch_size
    jax.config.update(
        "jax_default_matmul_precision", "tensorfloat32" if job.precision == "tf32" else "float32"
    )
    is_plain = not network["batch_norm"] and network["padding"] == "valid"
    if not is_plain or "zoo" in job.settings:
        raise SystemExit("this contender knows the default network only")
    x, y = jnp.asarray(job.images), jnp.asarray(job.labels)

    def forward(w, x):
        for i in range(1, len(network["conv"]) + 1):
            x = jax.lax.conv_general_dilated(
                x, w[f"conv{i}/kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.relu(x + w[f"conv{i}/bias"])
            if i <= len(network["pool"]) and (p := network["pool"][i - 1]) > 1:
                x = jax.lax.reduce_window(
                    x, -jnp.inf, jax.lax.max, (1, p, p, 1), (1, p, p, 1), "VALID"
                )
        x = x.reshape(x.shape[0], -1)
        for i in range(1, len(network["dense"]) + 1):
            x = jax.nn.relu(x @ w[f"dense{i}/kernel"] + w[f"dense{i}/bias"])
        return x @ w["output/kernel"] + w["output/bias"]

    def loss_of(w, x, y):
        log_p = jax.nn.log_softmax(forward(w, x))
        penalty = sum(
            jnp.sum(jnp.square(v)) for k, v in w.items() if k.endswith("kernel") and v.ndim == 2
        )
        return -jnp.mean(jnp.take_along_axis(log_p, y[:, None], axis=1)) + network["l2"] * penalty

    def step(w, s, i):
        xb, yb = (jax.lax.dynamic_slice_in_dim(a, i * n, n) for a in (x, y))
        loss, g = jax.value_and_grad(loss_of)(w, xb, yb)
        s = {k: RHO * s[k] + (1 - RHO) * g[k] ** 2 for k in w}
        return {k: w[k] - RATE * g[k] * jax.lax.rsqrt(s[k] + EPSILON) for k in w}, s, loss

    state = [
        {k: jnp.asarray(v) for k, v in weights.items()},
        {k: jnp.zeros_like(v) for k, v in weights.items()},
    ]

    @jax.jit
    def call(w, s, i):
        if steps_per_call == 1:
            return step(w, s, i)

        def scanned(state, i):
            *state, loss = step(*state, i)
            return state, loss

        state, losses = jax.lax.scan(scanned, [w, s], i + jnp.arange(steps_per_call))
        return *state, losses[-1]

    def run(steps):
        for i in range(0, steps, steps_per_call):
            *state[:], loss = call(*state, i)
        loss.block_until_ready()

    return float(loss_of(state[0], x[:n], y[:n])), run, steps_per_call
