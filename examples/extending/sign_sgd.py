"""A schedule of your own: sign-SGD on the greedy gradients. Run: python examples/extending/sign_sgd.py

A schedule says how gradients are computed (`step`) and may change them before the optimizers step (`on_gradients`).
Here the greedy gradients stay, and each number of them is replaced by its sign (Bernstein et al., ICML 2018).
"""

import torch
from torch import nn

import sedona_fx
from sedona_fx.train import Block, Greedy


class SignSGD(Greedy):
    """Local losses as in `Greedy`; every weight moves by exactly the learning rate."""

    def on_gradients(self, block: Block) -> None:
        """Replace the gradients of a block by their signs; its optimizer has not stepped yet."""
        for parameter in self.parameters[block.index]:
            if parameter.grad is not None:
                parameter.grad.sign_()


def main() -> None:
    """Train a small net of three blocks for twenty steps."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)), nn.Linear(8, 2))
    x = torch.randn(64, 8)
    y = (x.sum(1) > 0).long()
    net = sedona_fx.decouple(model, (x, y), cuts=["0", "1"], heads="linear")
    schedule = SignSGD(net, lambda params: torch.optim.SGD(params, lr=0.003))
    for step in range(20):
        losses = schedule.step(x, y).losses
        if step % 5 == 0:
            print(f"step {step:2d}: local losses " + ", ".join(f"{loss.item():.3f}" for loss in losses))


if __name__ == "__main__":
    main()
