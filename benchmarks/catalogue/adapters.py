"""Adapters of peft in small models of transformers: most parameters are frozen, and few are trained."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from catalogue import batches
from catalogue.entry import Entry, imported
from catalogue.language import build, label_loss, token_loss
from catalogue.small_configs import DECODERS, ENCODERS, SEQ2SEQ, VISION

FAMILY = PACKAGE = "peft"
NEEDS = (PACKAGE,)

_BERT_TARGETS = ["query", "value"]
_LORA = {"r": 4, "lora_alpha": 8}
_LYCORIS = {"r": 4, "alpha": 8}

# name -> model, configuration, its options
ADAPTERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "LoRA, bert": ("bert", "LoraConfig", {**_LORA, "task_type": "SEQ_CLS"}),
    "LoRA, bert, all layers": ("bert", "LoraConfig", {**_LORA, "target_modules": "all-linear"}),
    "LoRA, gpt2": ("gpt2", "LoraConfig", {**_LORA, "task_type": "CAUSAL_LM", "fan_in_fan_out": True}),
    "LoRA, llama": ("llama", "LoraConfig", {**_LORA, "task_type": "CAUSAL_LM"}),
    "LoRA, t5": ("t5", "LoraConfig", {**_LORA, "task_type": "SEQ_2_SEQ_LM"}),
    "LoRA, vit": ("vit", "LoraConfig", {**_LORA, "target_modules": ["q_proj", "v_proj"]}),
    "LoRA with dropout, bert": ("bert", "LoraConfig", {**_LORA, "task_type": "SEQ_CLS", "lora_dropout": 0.1}),
    "DoRA, bert": ("bert", "LoraConfig", {**_LORA, "task_type": "SEQ_CLS", "use_dora": True}),
    "AdaLoRA, bert": ("bert", "AdaLoraConfig", {"init_r": 4, "total_step": 10, "task_type": "SEQ_CLS"}),
    "VeRA, bert": ("bert", "VeraConfig", {"r": 4, "task_type": "SEQ_CLS", "target_modules": _BERT_TARGETS}),
    "LoHa, bert": ("bert", "LoHaConfig", {**_LYCORIS, "task_type": "SEQ_CLS", "target_modules": _BERT_TARGETS}),
    "LoKr, bert": ("bert", "LoKrConfig", {**_LYCORIS, "task_type": "SEQ_CLS", "target_modules": _BERT_TARGETS}),
    "OFT, bert": (
        "bert",
        "OFTConfig",
        {"oft_block_size": 8, "r": 0, "task_type": "SEQ_CLS", "target_modules": _BERT_TARGETS},
    ),
    "IA3, bert": ("bert", "IA3Config", {"task_type": "SEQ_CLS"}),
    "IA3, gpt2": ("gpt2", "IA3Config", {"task_type": "CAUSAL_LM"}),
    "prompt tuning, gpt2": ("gpt2", "PromptTuningConfig", {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}),
    "prompt tuning, bert": ("bert", "PromptTuningConfig", {"num_virtual_tokens": 4, "task_type": "SEQ_CLS"}),
    "layer norms, bert": ("bert", "LNTuningConfig", {"task_type": "SEQ_CLS", "target_modules": ["LayerNorm"]}),
}
CONFIGS = {**ENCODERS, **DECODERS, **SEQ2SEQ, **VISION}


def entries() -> Iterator[Entry]:
    """Yield all of them."""
    for name, (kind, config, options) in ADAPTERS.items():
        adapted = partial(_adapted, kind, config, options)
        if kind == "t5":
            yield Entry(name, FAMILY, adapted, batches.translations, loss=token_loss, needs=NEEDS)
        elif kind == "vit":
            yield Entry(name, FAMILY, adapted, batches.pixels, loss=label_loss, needs=NEEDS)
        elif kind in DECODERS:
            pair = partial(batches.sentences, per_token=True)
            yield Entry(name, FAMILY, adapted, pair, loss=last_tokens_loss, needs=NEEDS)
        else:
            yield Entry(name, FAMILY, adapted, batches.sentences, loss=label_loss, needs=NEEDS)


def last_tokens_loss(output: Any, target: Tensor) -> Tensor:
    """Return the cross entropy of one token a place, without the places of a prompt that was put in front."""
    return F.cross_entropy(output.logits[:, -target.shape[1] :].flatten(0, 1), target.flatten())


def _adapted(kind: str, config: str, options: dict[str, Any]) -> nn.Module:
    import peft

    task = {
        **dict.fromkeys(ENCODERS, "AutoModelForSequenceClassification"),
        **dict.fromkeys(DECODERS, "AutoModelForCausalLM"),
        **dict.fromkeys(SEQ2SEQ, "AutoModelForSeq2SeqLM"),
        **dict.fromkeys(VISION, "AutoModelForImageClassification"),
    }[kind]
    settings: Any = getattr(peft, config)(**options)
    return imported(PACKAGE, "get_peft_model", build(kind, task, CONFIGS[kind]), settings)
