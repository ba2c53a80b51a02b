"""Where the channels are, through layers, permutations and pools."""

import functools

import pytest
import torch
import torchvision
from graphs import node_of
from torch import nn
from torch.nn import functional as F

from sedona_fx.data.args import Args
from sedona_fx.ir.graph import info
from sedona_fx.passes import annotate, trace


def annotated(model, **inputs):
    return annotate(trace(model, Args(**inputs)).train, inputs, training=True)


@functools.cache
def annotated_vision(name):
    model = getattr(torchvision.models, name) if name != "vit" else torchvision.models.VisionTransformer
    options = {"num_classes": 3} if name != "vit" else {**VIT, "num_classes": 3}
    return annotated(model(**options), x=torch.randn(2, 3, 32, 32))


VIT = {"image_size": 32, "patch_size": 16, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}


@pytest.mark.parametrize(
    ("name", "site", "dim"),
    [
        ("resnet18", "layer2.0.conv1", 1),
        ("resnet18", "avgpool", 1),
        ("resnet18", ":flatten", 1),
        ("swin_t", "features.0.0", 1),
        ("swin_t", "features.0.1:permute", 3),
        ("swin_t", "features.3.0.mlp.0", 3),
        ("swin_t", "permute:permute", 1),
        ("vit", "encoder.layers.encoder_layer_1.mlp.0", 2),
        ("vit", "encoder.layers.encoder_layer_0:add#2", 2),
        ("vit", ":permute", 2),
    ],
)
def test_where_the_channels_are(name, site, dim):
    assert info(node_of(annotated_vision(name), site)).channel_dim == dim


def test_channels_through_transpose_and_functional_layers():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.out = nn.Parameter(torch.randn(6, 4)), nn.Linear(6, 3)

        def forward(self, x):
            x = F.linear(x, self.weight)
            return self.out(x.transpose(1, 2).flip(0).transpose(-1, 1).mean(1))

    gm = annotated(Mixed(), x=torch.randn(2, 5, 4))
    sites = (":linear", ":transpose", ":flip", ":transpose#2")
    assert [info(node_of(gm, site)).channel_dim for site in sites] == [2, 1, 1, 2]
