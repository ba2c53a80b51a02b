"""Towers of open_clip and networks of kornia."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from catalogue import batches
from catalogue.entry import Entry, imported

_VISION = {"image_size": 32, "layers": 4, "width": 32, "head_width": 8, "patch_size": 8}
_CONVOLUTIONS = {"image_size": 64, "layers": (1, 1, 1, 1), "width": 8, "head_width": 8}
_TEXT = {"context_length": 12, "vocab_size": batches.VOCABULARY, "width": 32, "heads": 4, "layers": 4}


def entries() -> Iterator[Entry]:
    """Yield those of open_clip, then those of kornia."""
    clip = {"family": "open_clip", "needs": ("open_clip",)}
    vision = partial(_clip, "visual", _VISION)
    yield Entry("vision tower", build=vision, pair=embedded, loss=F.mse_loss, **clip)
    yield Entry(
        "vision tower, ResNet",
        build=partial(_clip, "visual", _CONVOLUTIONS),
        pair=partial(embedded, 64),
        loss=F.mse_loss,
        **clip,
    )
    yield Entry("text tower", build=partial(_clip, "text", _VISION), pair=described, loss=F.mse_loss, **clip)
    yield Entry(
        "CLIP",
        build=partial(_clip, "", _VISION),
        pair=captioned,
        loss=similarity_loss,
        options={"heads": False},
        note="its loss compares all images and texts of a batch, which no head gives",
        **clip,
    )
    yield Entry("CoCa", build=_coca, pair=captioned, loss=caption_loss, options={"output": "logits"}, **clip)
    kornia = {"family": "kornia", "needs": ("kornia",)}
    sizes = {"image_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4}
    yield Entry("VisionTransformer", build=partial(_kornia_vit, sizes), pair=batches.images, **kornia)
    for name, package, options, pair, loss in (
        ("TinyViT", "kornia.models.tiny_vit", _TINY, partial(batches.images, 64), None),
        ("MobileViT", "kornia.models.vit_mobile", {}, partial(mapped, 64, 320, 2), F.mse_loss),
        ("HardNet", "kornia.feature.hardnet", {"pretrained": False}, partial(patches, 128), F.mse_loss),
        ("TFeat", "kornia.feature.tfeat", {"pretrained": False}, partial(patches, 128), F.mse_loss),
        ("SOSNet", "kornia.feature.sosnet", {"pretrained": False}, partial(patches, 128), F.mse_loss),
        ("XFeatModel", "kornia.feature.xfeat", {}, partial(mapped, 64, 64, 8), first_loss),
        ("RRDBNet", "kornia.models.rrdbnet", _SUPER, partial(mapped, 16, 3, 32), F.mse_loss),
        ("DexiNed", "kornia.models.dexined", {"pretrained": False}, partial(mapped, 64, 1, 64), last_loss),
    ):
        build = partial(imported, package, name, **options)
        yield Entry(name, build=build, pair=pair, loss=loss, **kornia)


_TINY: dict[str, Any] = {
    "img_size": 64,
    "num_classes": batches.CLASSES,
    "embed_dims": (8, 16, 32, 32),
    "depths": (1, 1, 2, 1),
    "num_heads": (1, 2, 4, 4),
    "window_sizes": (4, 4, 4, 2),
}
_SUPER: dict[str, Any] = {"num_in_ch": 3, "num_out_ch": 3, "scale": 2, "num_feat": 8, "num_block": 4, "num_grow_ch": 4}


def _clip(tower: str, vision: dict[str, Any]) -> nn.Module:
    kind = "CustomTextCLIP" if tower else "CLIP"
    model = imported("open_clip.model", kind, 16, vision, _TEXT)
    return model.get_submodule(tower)


def _coca() -> nn.Module:
    decoder = {**_TEXT, "mlp_ratio": 2}
    text = {**_TEXT, "embed_cls": True, "output_tokens": True}
    vision = {
        **_VISION,
        "attentional_pool": True,
        "attn_pooler_queries": 6,
        "attn_pooler_heads": 4,
        "output_tokens": True,
    }
    model = imported("open_clip.coca_model", "CoCa", 32, decoder, text, vision)
    nn.init.normal_(model.get_parameter("text_decoder.text_projection"), std=0.1)  # never written by the package
    return model


def _kornia_vit(sizes: dict[str, Any]) -> nn.Module:
    backbone = imported("kornia.models.vit", "VisionTransformer", **sizes)
    return nn.Sequential(backbone, MeanOfTokens(), nn.Linear(sizes["embed_dim"], batches.CLASSES))


class MeanOfTokens(nn.Module):
    """Averages (batch, tokens, features) over the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, features)."""
        return x.mean(1)


def embedded(size: int = 32) -> tuple[Tensor, Tensor]:
    """Return images and their embeddings."""
    return batches.images(size)[0], batches.targets_of((4, 16))


def described() -> tuple[Tensor, Tensor]:
    """Return texts and their embeddings."""
    return batches.sentences()[0]["input_ids"], batches.targets_of((4, 16))


def captioned() -> tuple[dict[str, Tensor], Tensor]:
    """Return images with a text each, which is also the target."""
    named = batches.captions()[0]
    return {"image": named["pixel_values"], "text": named["input_ids"]}, named["input_ids"]


def mapped(size: int, channels: int, out: int) -> tuple[Tensor, Tensor]:
    """Return images, and what maps of some channels and size are to become."""
    return batches.images(size, 2)[0], batches.targets_of((2, channels, out, out))


def patches(features: int) -> tuple[Tensor, Tensor]:
    """Return grey patches and their descriptors."""
    return batches.volumes(32, 32, batch=4)[0], batches.targets_of((4, features))


def similarity_loss(output: Any, target: Tensor) -> Tensor:
    """Return the cross entropy of finding to each image its text."""
    images, texts, scale = output[:3]
    return F.cross_entropy(scale * images @ texts.T, torch.arange(len(target)))


def caption_loss(output: Any, target: Tensor) -> Tensor:
    """Return the cross entropy of a caption's tokens, each given those before it."""
    logits = output["logits"]
    return F.cross_entropy(logits.flatten(0, 1), target[:, -logits.shape[1] :].flatten())


def first_loss(output: Any, target: Tensor) -> Tensor:
    """Return the squared distance of the first output from the target."""
    return F.mse_loss(output[0], target)


def last_loss(output: Any, target: Tensor) -> Tensor:
    """Return the squared distance of the last output from the target."""
    return F.mse_loss(output[-1], target)
