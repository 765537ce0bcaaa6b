"""Muon for many matrices of few shapes: each shape's matrices take their step as one stack."""

import torch

# Of the quintic iteration, as published with Muon (Jordan et al., 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(stack, iterations=5):
    """Matrices `[N, R, C]` with all singular values brought near 1, in bf16."""
    x = stack.to(torch.bfloat16)
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal before each step.

    `torch.optim.Muon` does the same one matrix after another: for the many small matrices of a
    tiny model that takes as long as the rest of a training step. Steps are scaled to the length of
    AdamW's, so that both go by the same rates (Liu et al., arXiv 2502.16982).

    Args:
        matrices: Parameters of two dimensions.
        lr: Rate.
        momentum: Of Nesterov's kind.
        weight_decay: Decoupled, times the rate.
    """

    def __init__(self, matrices, lr=1e-3, momentum=0.95, weight_decay=0.01):
        by_shape = {}
        for matrix in matrices:
            by_shape.setdefault(matrix.shape, []).append(matrix)
        groups = [dict(params=same) for same in by_shape.values()]
        super().__init__(groups, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            matrices, momentum, rate = group["params"], group["momentum"], group["lr"]
            grads = torch.stack([matrix.grad for matrix in matrices])
            average = self.state[matrices[0]].setdefault("average", torch.zeros_like(grads))
            average.lerp_(grads, 1 - momentum)
            steps = orthogonalise(grads.lerp(average, momentum))
            scale = 0.2 * max(grads.shape[1:]) ** 0.5
            torch._foreach_mul_(matrices, 1 - rate * group["weight_decay"])
            torch._foreach_add_(matrices, (steps * scale).float().unbind(), alpha=-rate)
