"""The models that the promises are tested on: small inputs, ten classes, everything else at its defaults."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torchvision
from catalogue.entry import perturb
from catalogue.vision import narrow, small_inception
from torch import Tensor, nn
from torch.nn import functional as F

import sedona_fx


@dataclass(frozen=True)
class Entry:
    """A model, its image size and batch, and the modules of it that run in training only."""

    build: Callable[[], nn.Module]
    size: int = 32
    batch: int = 4
    auxiliary: tuple[str, ...] = ()

    def make(self) -> nn.Module:
        """Build the model, the same every time, and see to it that its output depends on all of it."""
        torch.manual_seed(0)
        model = self.build()
        perturb(model)
        settle(model, torch.randn(16, 3, self.size, self.size))
        return model

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return one batch of noise and its classes."""
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(self.batch, 3, self.size, self.size, generator=generator)
        return x, torch.randint(10, (self.batch,), generator=generator)


def _vision(name: str, size: int = 32, batch: int = 4, auxiliary: tuple[str, ...] = (), **options: object) -> Entry:
    return Entry(partial(getattr(torchvision.models, name), num_classes=10, **options), size, batch, auxiliary)


def _paper(name: str, width: float = 1.0) -> Entry:
    return Entry(partial(getattr(sedona_fx.models, name), num_classes=10, width=width))


def _small_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=6, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10
    )


ZOO: dict[str, Entry] = {
    "alexnet": Entry(partial(narrow, "alexnet"), size=64),
    "vgg11_bn": Entry(partial(narrow, "vgg11_bn")),
    "resnet18": _vision("resnet18"),
    "resnet50": _vision("resnet50"),
    "densenet121": _vision("densenet121"),
    "googlenet": _vision("googlenet", auxiliary=("aux1", "aux2"), init_weights=False),
    "inception_v3": Entry(small_inception, size=107, auxiliary=("AuxLogits",)),
    "mobilenet_v3_small": _vision("mobilenet_v3_small"),
    "efficientnet_b0": _vision("efficientnet_b0"),
    "regnet_y_400mf": _vision("regnet_y_400mf"),
    "shufflenet_v2_x0_5": _vision("shufflenet_v2_x0_5"),
    "squeezenet1_1": _vision("squeezenet1_1"),
    "convnext_tiny": _vision("convnext_tiny"),
    "swin_t": _vision("swin_t"),
    "vit": Entry(_small_vit),
    "mnasnet0_5": _vision("mnasnet0_5"),
    "paper_vgg11": _paper("vgg11", 0.25),
    "paper_vgg19": _paper("vgg19", 0.25),
    "paper_resnet18": _paper("resnet18", 0.25),
    "paper_resnet50": _paper("resnet50", 0.25),
    "paper_resnet32": _paper("resnet32"),
    "paper_resnet110": _paper("resnet110"),
}

# The same with fewer layers, for tests whose time grows with every one of them.
SHORT = {
    "densenet121": Entry(partial(torchvision.models.DenseNet, block_config=(2, 2, 2, 2), num_classes=10)),
    "swin_t": Entry(
        partial(
            torchvision.models.SwinTransformer,
            patch_size=[4, 4],
            embed_dim=48,
            depths=[2, 1, 1, 1],
            num_heads=[3, 6, 12, 24],
            window_size=[7, 7],
            num_classes=10,
        )
    ),
}


def settle(model: nn.Module, x: Tensor) -> None:
    """Take the running statistics from one batch, so that in eval mode, too, the output depends on the input.

    At their first values, 0 and 1, many an untrained net forgets its input: of mnasnet's output less than one part in a
    million depends on the image, and any comparison of outputs would pass. With the very variance of the batch an
    untrained net is chaotic instead, float32 rounding grows to 1e-4 of the output in some. Half as much again keeps
    both away: at least 0.2 % of each output depends on the image, and rounding stays below 3e-6 of it.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.running_var *= 1.5


def total_loss(output, target: Tensor) -> Tensor:
    """Return what plain PyTorch trains a model of the zoo by: the auxiliary classifiers count 0.3 each."""
    if isinstance(output, Tensor):
        return F.cross_entropy(output, target)
    main, *auxiliary = output
    loss = F.cross_entropy(main, target)
    for one in auxiliary:
        loss = loss + 0.3 * F.cross_entropy(one, target)
    return loss


def spread(output: Tensor) -> float:
    """Return how far the outputs for different images lie apart, as a fraction of the largest output."""
    return ((output - output.mean(0)).abs().max() / output.abs().max()).item()


def tensors(output) -> list[Tensor]:
    """Return the tensors of a model's output, a bare one or a named tuple."""
    return [output] if isinstance(output, Tensor) else list(output)


def same_bits(first, second) -> bool:
    """Whether two outputs, or two lists of tensors, hold exactly the same numbers."""
    return all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(second), strict=True))


def same_state(first: nn.Module, second: nn.Module) -> bool:
    """Whether two modules hold exactly the same parameters and buffers under the same names."""
    a, b = first.state_dict(), second.state_dict()
    return list(a) == list(b) and same_bits(list(a.values()), list(b.values()))
