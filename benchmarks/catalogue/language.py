"""Models of transformers, in sizes that a laptop trains: text, images and sound."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from catalogue import batches, more_configs
from catalogue.entry import Entry
from catalogue.small_configs import CLIP, DECODERS, ENCODERS, SEQ2SEQ, SPEECH, VISION, WHISPER

FAMILY = "transformers"


def entries() -> Iterator[Entry]:
    """Yield all of them, kind by kind."""
    per_token = partial(batches.sentences, per_token=True)
    tables = (
        (ENCODERS, "AutoModelForSequenceClassification", batches.sentences, label_loss),
        (DECODERS, "AutoModelForCausalLM", per_token, token_loss),
        (SEQ2SEQ, "AutoModelForSeq2SeqLM", batches.translations, token_loss),
        (VISION, "AutoModelForImageClassification", batches.pixels, label_loss),
        (SPEECH, "AutoModelForAudioClassification", batches.waveforms, label_loss),
        (WHISPER, "AutoModelForSpeechSeq2Seq", batches.spectra, token_loss),
        (more_configs.ENCODERS, "AutoModelForSequenceClassification", batches.sentences, label_loss),
        (more_configs.DECODERS, "AutoModelForCausalLM", per_token, token_loss),
        (more_configs.SEQ2SEQ, "AutoModelForSeq2SeqLM", batches.translations, token_loss),
        (more_configs.VISION, "AutoModelForImageClassification", batches.pixels, label_loss),
        (more_configs.SPEECH, "AutoModelForAudioClassification", batches.waveforms, label_loss),
    )
    for configs, task, pair, loss in tables:
        for kind, options in configs.items():
            # Of DeiT, AutoModel knows the distilled classifier first, which cannot be trained.
            named = "DeiTForImageClassification" if kind == "deit" else task
            yield Entry(kind, FAMILY, partial(build, kind, named, options), pair, loss=loss)
    skipping = {**SPEECH["wav2vec2"], "layerdrop": 0.5}
    yield Entry(
        "wav2vec2 with layerdrop",
        FAMILY,
        partial(build, "wav2vec2", "AutoModelForAudioClassification", skipping),
        batches.waveforms,
        loss=label_loss,
        note="draws anew in each step which layers run: there is no fixed graph",
        refused="skip_the_layer",
    )
    yield Entry(
        "clip",
        FAMILY,
        partial(build, "clip", "CLIPModel", CLIP),
        batches.captions,
        loss=contrastive_loss,
        note="its output is the similarities of all images and texts of a batch, which no head gives",
        options={"output": "logits_per_image", "heads": False},
    )


def label_loss(output: Any, target: Tensor) -> Tensor:
    """Return the cross entropy of one label an example."""
    return F.cross_entropy(output.logits, target)


def token_loss(output: Any, target: Tensor) -> Tensor:
    """Return the cross entropy of one token a place."""
    return F.cross_entropy(output.logits.flatten(0, 1), target.flatten())


def contrastive_loss(output: Any, target: Tensor) -> Tensor:
    """Return the cross entropy of finding to each image its text."""
    return F.cross_entropy(output.logits_per_image, target)


def build(kind: str, task: str, options: Mapping[str, Any]) -> nn.Module:
    """Build a model of transformers from its type, the class for its task, and its configuration."""
    import transformers

    config = transformers.AutoConfig.for_model(kind, **options)
    maker: Any = getattr(transformers, task)
    return maker.from_config(config) if task.startswith("Auto") else maker(config)  # type: ignore[no-any-return]
