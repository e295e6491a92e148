"""PyTorch on the job. This file imports no TensorFlow: the two do not share a process safely."""

from jobs import EPSILON, RATE, RHO, Job


def contender(job: Job, channels_last=False, compiled=False, captured=False):
    """The usual PyTorch loop on tensors in memory; `captured`: its step is one CUDA graph."""
    import torch
    from torch import nn

    if captured and not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no GPU")
    images, labels, network = job.images, job.labels, job.network
    shape = images.shape[1:]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = (
        job.precision == "tf32"
    )
    kernel = network["kernel"]
    is_plain = not network["batch_norm"] and network["padding"] == "valid"
    if not is_plain or len(set(kernel)) > 1 or "zoo" in job.settings:
        raise SystemExit("this contender knows the default network only")
    layers, channels, size = [], shape[2], shape[0]
    for i, filters in enumerate(network["conv"]):
        layers += [nn.Conv2d(channels, filters, kernel[0]), nn.ReLU()]
        channels, size = filters, size - kernel[0] + 1
        pool = network["pool"][i] if i < len(network["pool"]) else 1
        if pool > 1:
            layers.append(nn.MaxPool2d(pool))
            size //= pool
    layers.append(nn.Flatten())
    inputs, spatial = channels * size * size, (size, size, channels)
    for units in network["dense"]:
        layers += [nn.Linear(inputs, units), nn.ReLU()]
        inputs = units
    model = nn.Sequential(*layers, nn.Linear(inputs, network["classes"]))
    convolutions = iter([m for m in model if isinstance(m, nn.Conv2d)])
    linears = [m for m in model if isinstance(m, nn.Linear)]
    with torch.no_grad():
        dense = iter(linears)
        for name, value in job.weights.items():
            if not name.endswith("kernel"):
                continue
            if value.ndim == 4:
                module, value = next(convolutions), value.transpose(3, 2, 0, 1)
            else:
                module = next(dense)
                if module is linears[0]:  # rows in the order of PyTorch's flatten
                    value = (
                        value.reshape(*spatial, -1)
                        .transpose(2, 0, 1, 3)
                        .reshape(-1, value.shape[1])
                    )
                value = value.T
            module.weight.copy_(torch.from_numpy(value.copy()))
            module.bias.zero_()
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(device)
    y, model = torch.from_numpy(labels).to(device), model.to(device)
    if channels_last:
        model, x = (
            model.to(memory_format=torch.channels_last),
            x.contiguous(memory_format=torch.channels_last),
        )
    optimizer = torch.optim.RMSprop(
        model.parameters(), lr=RATE, alpha=RHO, eps=EPSILON, capturable=captured
    )
    criterion = nn.CrossEntropyLoss()

    def loss_of(x, y):
        return criterion(model(x), y) + network["l2"] * sum(
            m.weight.square().sum() for m in linears
        )

    forward = torch.compile(loss_of) if compiled else loss_of
    n = job.batch_size

    def train_step(x, y):
        optimizer.zero_grad(set_to_none=True)
        loss = forward(x, y)
        loss.backward()
        optimizer.step()
        return loss

    with torch.no_grad():
        first_loss = loss_of(x[:n], y[:n]).item()
    step = capture(train_step, x[:n].clone(), y[:n].clone()) if captured else train_step

    def run(steps):
        for i in range(steps):
            loss = step(x[i * n : (i + 1) * n], y[i * n : (i + 1) * n])
        loss.item()

    return first_loss, run, 1


def capture(step, x, y):
    """`step` as a CUDA graph, after three warm-up steps; it reads every batch from where `x` and
    `y` are."""
    import torch

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step(x, y)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(x, y)

    def replay(images, labels):
        x.copy_(images)
        y.copy_(labels)
        graph.replay()
        return loss

    return replay
