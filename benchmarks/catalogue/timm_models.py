"""Models of timm, one a family: convolutions, attention, mixers and what lies between; ten classes, small images."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from catalogue import batches
from catalogue.entry import Entry

FIXED = """
convmixer_768_32 convnext_atto convnextv2_atto crossvit_tiny_240 cs3darknet_focus_s cspresnet50 davit_tiny dla34 dpn68
dm_nfnet_f0 edgenext_xx_small efficientnet_lite0 efficientvit_b0 fastvit_t8 fasternet_t0 focalnet_tiny_srf
ghostnetv2_100 hardcorenas_a hgnetv2_b0 hrnet_w18_small inception_next_atto inception_resnet_v2 inception_v4 lcnet_050
mambaout_femto mixnet_s mobilenetv4_conv_small nasnetalarge nextvit_small nf_regnet_b0 pnasnet5large poolformer_s12
pvt_v2_b0 rdnet_tiny regnetx_002 repghostnet_050 res2net50_14w_8s resnest14d resnetv2_50 rexnet_100 selecsls42
seresnet18 shvit_s1 skresnet18 starnet_s1 tf_efficientnetv2_b0 tiny_vit_5m_224 tinynet_e tresnet_m vovnet39a xception41
"""
"""Models that take images of any size."""
SIZED = """
bat_resnext26ts beit_base_patch16_224 botnet26t_256 cait_xxs24_224 coat_lite_tiny coatnet_nano_rw_224 convit_tiny
deit_tiny_patch16_224 efficientformer_l1 efficientformerv2_s0 efficientvit_m0 eva02_tiny_patch14_224 gcvit_xxtiny
gernet_s gmlp_ti16_224 hiera_tiny_224 lambda_resnet26t levit_128s maxvit_nano_rw_256 mixer_s32_224 mobileone_s0
mobilevit_xxs mobilevitv2_050 mvitv2_tiny naflexvit_base_patch16_gap nest_tiny pit_ti_224 repvgg_a0 repvit_m0_9
resmlp_12_224 samvit_base_patch16_224 sequencer2d_s swiftformer_xs swin_tiny_patch4_window7_224 swinv2_tiny_window8_256
tnt_s_patch16_224 twins_pcpvt_small visformer_tiny vit_small_patch16_dinov3 vit_tiny_patch16_224 vitamin_small_224
volo_d1_224 xcit_nano_12_p16_224
"""
"""Models that are built for one size of image."""
SIZES = {"bat_resnext26ts": 256, "inception_resnet_v2": 96, "inception_v4": 96, "efficientformer_l1": 224}
"""Sizes where 64 pixels are too few."""


def entries() -> Iterator[Entry]:
    """Yield all of them, in alphabetical order."""
    sized = set(SIZED.split())
    for name in sorted([*FIXED.split(), *sized]):
        size = SIZES.get(name, 64)
        options = {"img_size": size} if name in sized else {}
        batch = 2 if size > 96 else 4
        yield Entry(name, "timm", partial(_build, name, options), partial(batches.images, size, batch))


def _build(name: str, options: dict[str, Any]) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=batches.CLASSES, **options)
