"""Hugging Face models as their users have them: padded batches with masks, caches on, labels of -100 at the padding."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

import sedona_fx
from sedona_fx.heads.context import HeadContext

transformers = pytest.importorskip("transformers")

VOCABULARY = 29
Batch = tuple[dict[str, Tensor], Tensor]


def tokens(seed: int, count: int = 4, length: int = 8) -> tuple[Tensor, Tensor]:
    """Return ids and a mask that hides the ends of two rows."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(count, length, dtype=torch.long)
    mask[1, length - 2 :] = 0
    mask[3, length // 2 :] = 0
    return torch.randint(4, VOCABULARY, (count, length), generator=generator), mask


def text(seed: int = 0) -> Batch:
    ids, mask = tokens(seed)
    return {"input_ids": ids, "attention_mask": mask}, ids.masked_fill(mask == 0, -100)


def next_token(output: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def gpt2(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    size = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 8, "n_layer": 3, "n_head": 2}
    config = transformers.GPT2Config(**size, **still, bos_token_id=1, eos_token_id=2, **options)
    return transformers.GPT2LMHeadModel(config).double()


def gpt2_block(block: Any, h: Tensor, visible: Tensor) -> Tensor:
    """One block of GPT-2, written anew."""
    q, k, v = (part.unflatten(2, (2, 4)).transpose(1, 2) for part in block.attn.c_attn(block.ln_1(h)).chunk(3, 2))
    weights = (q @ k.transpose(2, 3) / 2).masked_fill(~visible, -torch.inf).softmax(3)
    h = h + block.attn.c_proj((weights @ v).transpose(1, 2).flatten(2))
    return h + block.mlp(block.ln_2(h))


def test_gpt2_with_its_cache_and_padding_against_detach_by_hand():
    model, (inputs, labels) = gpt2(), text()
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    assert model.config.use_cache
    data = [text(seed) for seed in range(3)]
    net = sedona_fx.decouple(model, data, cuts=["transformer.h.0", "transformer.h.1"], loss=next_token)
    with torch.no_grad():  # the field of the cache has another name in each version: the model says which
        (cache,) = (name for name, value in model(**inputs).items() if type(value).__name__ == "DynamicCache")
    assert net.plan.capture.left_out == (f"{cache} (DynamicCache)",)
    assert f"{cache} (DynamicCache)" in str(net)
    for training in (False, True):
        expected, actual = model.train(training)(**inputs), net.train(training)(**inputs)
        assert type(actual) is type(expected)
        assert torch.equal(actual.logits, expected.logits)
        assert actual[cache] is None if cache in actual else getattr(actual, cache) is None
        assert expected[cache] is not None
        padding = net(input_ids=ids.masked_fill(~mask, 3), attention_mask=inputs["attention_mask"])
        assert torch.equal(padding.logits[mask], actual.logits[mask])
    net.backward(inputs, labels)

    heads = nn.ModuleList(block.head for block in net.blocks[:-1])
    found = [p.grad for p in heads.parameters()]
    heads.zero_grad()
    visible = torch.ones(8, 8, dtype=torch.bool).tril() & mask[:, None, None, :]
    body, losses = model.transformer, []
    h = body.wte(ids) + body.wpe(torch.arange(8))
    for block, head in zip(body.h[:2], heads, strict=True):
        h = gpt2_block(block, h, visible)
        losses.append(F.cross_entropy(head(h)[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))
        h = h.detach()
    logits = model.lm_head(body.ln_f(gpt2_block(body.h[2], h, visible)))
    losses.append(F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))
    sum(losses).backward()
    own = dict(net.model.named_parameters())
    pairs = [(name, own[name].grad, p.grad) for name, p in model.named_parameters()]
    pairs += [("a head", was, p.grad) for was, p in zip(found, heads.parameters(), strict=True)]
    for name, actual, expected in pairs:
        assert (actual - expected).norm() <= 1e-12 * expected.norm() + 1e-16, name


def sentences() -> Batch:
    ids, mask = tokens(0)
    kinds = (torch.arange(8) > 3).long().expand(4, 8)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": kinds}, torch.tensor([0, 1, 2, 0])


def translations() -> Batch:
    (ids, mask), (wanted, seen) = tokens(0), tokens(1, length=6)
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": wanted, "decoder_attention_mask": seen}
    return inputs, wanted.roll(-1, 1).masked_fill(seen == 0, -100)


def sounds() -> Batch:
    _, mask = tokens(0, length=800)
    wave = torch.randn(4, 800, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {"input_values": wave * mask, "attention_mask": mask}, torch.tensor([0, 1, 2, 0])


def per_token(output: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(output.logits.flatten(0, 1), labels.flatten())


def per_example(output: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(output.logits, labels)


class Summary(nn.Module):
    """A head for an encoder whose tokens are not those of the output: all logits from the mean of its tokens."""

    def __init__(self, context: HeadContext) -> None:
        super().__init__()
        self.tokens, self.classes = context.output_shape[1:]
        self.out = nn.Linear(context.shape[2], self.tokens * self.classes)

    def forward(self, h: Tensor) -> Tensor:
        return self.out(h.mean(1)).unflatten(1, (self.tokens, self.classes))


BERT = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "num_labels": 3}
BERT_STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LLAMA = {"num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
SOUND = {
    "conv_dim": (8, 8), "conv_kernel": (10, 8), "conv_stride": (5, 4), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "num_codevectors_per_group": 4,
    "codevector_dim": 4, "classifier_proj_size": 8, "feat_proj_dropout": 0.0, "final_dropout": 0.0,
    "hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
    "layerdrop": 0.0, "mask_time_prob": 0.0,  # both are drawn in Python, anew in each step
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any], Callable[[], Batch], Any, Any, dict[str, str]]] = {
    "bert": ("BertForSequenceClassification", {**BERT, **BERT_STILL}, sentences, per_example, None,
             {"bert.encoder.layer.0": "bert.encoder.layer.1"}),
    "llama": ("LlamaForCausalLM", {**BERT, **LLAMA}, text, next_token, None, {"model.layers.0": "model.layers.1"}),
    "t5": ("T5ForConditionalGeneration", T5, translations, per_token, [Summary, "logits-1"],
           {"encoder.block.0.layer.1": "encoder.block.1", "decoder.block.0.layer.2": "decoder.block.1"}),
    "wav2vec2": ("Wav2Vec2ForSequenceClassification", {**BERT, **SOUND}, sounds, per_example, None,
                 {"wav2vec2.encoder.layers.0": "wav2vec2.encoder.layers.1"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_masked_batches_of_other_kinds_against_detach_by_hooks(kind):
    """All that enters the layer behind a cut is detached by a hook; everything else is the untouched model."""
    maker, options, batch, loss, wanted, cuts = MODELS[kind]
    torch.manual_seed(0)
    model = getattr(transformers, maker)(transformers.AutoConfig.for_model(kind, vocab_size=VOCABULARY, **options))
    model, (inputs, target) = model.double(), batch()
    net = sedona_fx.decouple(model, (inputs, target), cuts=list(cuts), heads=wanted, loss=loss)
    for training in (False, True):
        assert torch.equal(net.train(training)(**inputs).logits, model.train(training)(**inputs).logits)
    whole = {name: torch.ones_like(value) if name.endswith("mask") else value for name, value in inputs.items()}
    assert not torch.equal(net(**whole).logits, net(**inputs).logits)
    net.backward(inputs, target)
    ends: list[Tensor] = []

    def keep(_module: nn.Module, _given: Any, output: Any) -> None:
        ends.append(output[0] if isinstance(output, tuple) else output)

    def detach(_module: nn.Module, given: Any, named: Any) -> Any:
        return tree_map_only(Tensor, Tensor.detach, (given, named))

    for path, behind in cuts.items():
        model.get_submodule(path).register_forward_hook(keep)
        model.get_submodule(behind).register_forward_pre_hook(detach, with_kwargs=True)
    final = model(**inputs)
    total = loss(final, target)
    for block, end in zip(net.blocks, ends, strict=False):
        total = total + loss(type(final)(logits=block.head(end)), target)
    assert len(ends) == len(cuts)
    total.backward()
    moved = 0
    for name, parameter in model.named_parameters():
        found = net.model.get_parameter(name).grad
        assert (found is None) == (parameter.grad is None), name
        if found is not None:
            assert (found - parameter.grad).norm() <= 1e-12 * parameter.grad.norm() + 1e-16, name
            moved += bool(parameter.grad.norm() > 0)
    assert moved > 12
