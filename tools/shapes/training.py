"""What the stages of train.py share: optimizers, time budgets, checkpoints, the log."""

import json
import math
import os
import time

import torch


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal by Newton-Schulz (Jordan et al., 2024).

    For matrices and convolution kernels (flattened to [out, in * h * w]). On models this small it
    needs far fewer steps than AdamW; biases, norms, embeddings and output layers stay with AdamW.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"]).flatten(1)
                by_shape.setdefault(update.shape, []).append((p, update))
            for (rows, columns), items in by_shape.items():  # one batched product per shape
                updates = _orthogonal(torch.stack([u for _, u in items]))
                scale = max(1.0, rows / columns) ** 0.5
                for (p, _), update in zip(items, updates):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update.view_as(p), alpha=-group["lr"] * scale)


def _orthogonal(g, steps=5):
    """[n, rows, columns] -> the same with all singular values near 1. bfloat16 is enough."""
    x = (g / (g.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    transposed = x.shape[-2] > x.shape[-1]
    if transposed:
        x = x.mT
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return (x.mT if transposed else x).to(g.dtype)


def anneal(fraction, warmup=0.02):
    """Factor of the learning rate at a fraction of the budget: short warm-up, then a cosine to 0."""
    fraction = min(max(fraction, 0.0), 1.0)
    return min(1.0, (fraction + 1e-4) / warmup) * 0.5 * (1.0 + math.cos(math.pi * fraction))


def set_learning_rates(optimizers, factor):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("peak_lr", group["lr"]) * factor


class Average:
    """An exponential moving average of parameters, with a short memory at first."""

    def __init__(self, modules, decay):
        self.params = [p for m in modules for p in m.parameters()]
        self.shadow = [p.detach().clone() for p in self.params]
        self.decay = decay

    @torch.no_grad()
    def update(self, step):
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.shadow, [p.detach() for p in self.params], 1 - decay)

    @torch.no_grad()
    def swap(self):
        """Exchanges parameters and averages; call again to change back."""
        for p, s in zip(self.params, self.shadow):
            kept = p.detach().clone()
            p.copy_(s)
            s.copy_(kept)


class Budget:
    """Wall-clock budget of a stage. `fraction` drives the schedule, so that a stage always ends
    in time and fully annealed, whatever else the machine does. Survives a restart."""

    def __init__(self, minutes, spent_seconds=0.0):
        self.seconds = minutes * 60.0
        self.start = time.monotonic() - spent_seconds

    @property
    def spent(self):
        return time.monotonic() - self.start

    @property
    def fraction(self):
        return self.spent / self.seconds


class Log:
    """One JSON object a line, in the work folder and on standard output."""

    def __init__(self, work, stage):
        self.path, self.stage = os.path.join(work, "log.jsonl"), stage

    def __call__(self, **values):
        rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in values.items()}
        line = json.dumps({"stage": self.stage, **rounded})
        print(line, flush=True)
        with open(self.path, "a") as f:
            f.write(line + "\n")


def save_atomically(value, path):
    torch.save(value, path + ".part")
    os.replace(path + ".part", path)
