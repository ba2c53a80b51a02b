"""The configurations of transformers' models, small, by model type."""

from __future__ import annotations

from typing import Any

from catalogue.batches import CLASSES, VOCABULARY

Configs = dict[str, dict[str, Any]]

_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TEXT = {"vocab_size": VOCABULARY, "num_labels": CLASSES, **_SPECIAL}
_SIZE = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
_BERT = {**_TEXT, **_SIZE, "intermediate_size": 64, "max_position_embeddings": 64}
_LLAMA = {**_BERT, "num_key_value_heads": 2, "use_cache": False}
_GEMMA = {**_LLAMA, "head_dim": 8}
_SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "use_cache": False,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
    **_SPECIAL,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 3,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "use_cache": False,
    "decoder_start_token_id": 0,
}
_IMAGE = {"num_labels": CLASSES, "image_size": 32}
_VIT = {**_IMAGE, **_SIZE, "intermediate_size": 64, "patch_size": 8}
_STAGES = {"num_labels": CLASSES, "depths": [1, 1, 2, 1]}
_SOUND = {
    "num_labels": CLASSES,
    "vocab_size": 32,
    **_SIZE,
    "intermediate_size": 64,
    "layerdrop": 0.0,
    "conv_dim": (32, 32, 32),
    "conv_kernel": (10, 3, 3),
    "conv_stride": (5, 4, 4),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 32,
    "mask_time_prob": 0.0,  # masks are drawn by NumPy, anew in each step
}
_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}

ENCODERS: Configs = {
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": {**_TEXT, "dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64},
    "albert": {**_BERT, "embedding_size": 16},
    "electra": {**_BERT, "embedding_size": 16},
    "deberta": {**_BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {**_BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8},
    "mpnet": _BERT,
    "xlm-roberta": _BERT,
    "convbert": {**_BERT, "embedding_size": 32, "head_ratio": 2, "conv_kernel_size": 3},
    "squeezebert": {**_BERT, "embedding_size": 32},
    "modernbert": {**_BERT, "cls_token_id": 1, "sep_token_id": 2, "reference_compile": False},
}
DECODERS: Configs = {
    "gpt2": {**_TEXT, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "use_cache": False},
    "opt": {**_BERT, "ffn_dim": 64, "word_embed_proj_dim": 32, "use_cache": False},
    "gpt_neox": {**_BERT, "use_cache": False},
    "gpt_neo": {
        **_TEXT,
        "hidden_size": 32,
        "num_layers": 4,
        "num_heads": 4,
        "max_position_embeddings": 64,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 8,
        "use_cache": False,
    },
    "bloom": {**_TEXT, "hidden_size": 32, "n_layer": 4, "n_head": 4, "use_cache": False},
    "falcon": {**_BERT, "num_kv_heads": 4, "use_cache": False},
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "sliding_window": 8},
    # The default, a grouped product, has no float64.
    "mixtral": {**_LLAMA, "num_local_experts": 2, "num_experts_per_tok": 1, "experts_implementation": "batched_mm"},
    "qwen2": _LLAMA,
    "qwen3": _GEMMA,
    "gemma": _GEMMA,
    "gemma2": _GEMMA,
    "phi": _LLAMA,
    "phi3": _LLAMA,
    "olmo": _LLAMA,
    "mamba": {**_TEXT, "hidden_size": 32, "num_hidden_layers": 4, "state_size": 8, "use_cache": False},
}
SEQ2SEQ: Configs = {
    "t5": _T5,
    "bart": _SEQ2SEQ,
    "mbart": _SEQ2SEQ,
    "marian": _SEQ2SEQ,
    "pegasus": _SEQ2SEQ,
}
VISION: Configs = {
    "vit": _VIT,
    "deit": _VIT,
    "beit": _VIT,
    "dinov2": {**_VIT, "mlp_ratio": 2},
    "swin": {**_IMAGE, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
    "convnext": {**_STAGES, "hidden_sizes": [8, 16, 32, 64]},
    "convnextv2": {**_STAGES, "hidden_sizes": [8, 16, 32, 64]},
    "segformer": {
        **_STAGES,
        "hidden_sizes": [8, 16, 32, 64],
        "num_attention_heads": [1, 2, 2, 4],
        "decoder_hidden_size": 32,
    },
    "resnet": {**_STAGES, "embedding_size": 16, "hidden_sizes": [16, 32, 64, 64]},
    "regnet": {**_STAGES, "embedding_size": 16, "hidden_sizes": [16, 32, 64, 64], "groups_width": 8},
    "mobilevit": {**_IMAGE, "hidden_sizes": [24, 32, 48], "neck_hidden_sizes": [8, 16, 16, 16, 16, 16, 32]},
    "poolformer": {**_STAGES, "hidden_sizes": [8, 16, 32, 64]},
}
SPEECH: Configs = {
    "wav2vec2": {**_SOUND, "num_codevectors_per_group": 8, "codevector_dim": 16},
    "hubert": _SOUND,
    "wavlm": {**_SOUND, "num_buckets": 16, "max_bucket_distance": 32},
}
WHISPER: Configs = {
    "whisper": {
        **_SEQ2SEQ,
        "num_mel_bins": 16,
        "max_source_positions": 20,
        "max_target_positions": 32,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    },
}
CLIP: dict[str, Any] = {
    "text_config": {**_TOWER, "vocab_size": VOCABULARY, "max_position_embeddings": 32, **_SPECIAL},
    "vision_config": {**_TOWER, "image_size": 32, "patch_size": 8},
    "projection_dim": 16,
}
