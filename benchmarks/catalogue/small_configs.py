"""The configurations of transformers' models, small, by model type."""

from __future__ import annotations

from typing import Any

from catalogue.batches import CLASSES, VOCABULARY

Configs = dict[str, dict[str, Any]]

BASE_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BASE_TEXT = {"vocab_size": VOCABULARY, "num_labels": CLASSES, **BASE_SPECIAL}
BASE_SIZE = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
BASE_BERT = {**BASE_TEXT, **BASE_SIZE, "intermediate_size": 64, "max_position_embeddings": 64}
BASE_LLAMA = {**BASE_BERT, "num_key_value_heads": 2, "use_cache": False}
BASE_GEMMA = {**BASE_LLAMA, "head_dim": 8}
BASE_SEQ2SEQ = {
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
    **BASE_SPECIAL,
}
BASE_T5 = {
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
BASE_IMAGE = {"num_labels": CLASSES, "image_size": 32}
BASE_VIT = {**BASE_IMAGE, **BASE_SIZE, "intermediate_size": 64, "patch_size": 8}
BASE_STAGES = {"num_labels": CLASSES, "depths": [1, 1, 2, 1]}
BASE_SOUND = {
    "num_labels": CLASSES,
    "vocab_size": 32,
    **BASE_SIZE,
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
BASE_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}

ENCODERS: Configs = {
    "bert": BASE_BERT,
    "roberta": BASE_BERT,
    "distilbert": {
        **BASE_TEXT,
        "dim": 32,
        "n_layers": 4,
        "n_heads": 4,
        "hidden_dim": 64,
        "max_position_embeddings": 64,
    },
    "albert": {**BASE_BERT, "embedding_size": 16},
    "electra": {**BASE_BERT, "embedding_size": 16},
    "deberta": {**BASE_BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {**BASE_BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8},
    "mpnet": BASE_BERT,
    "xlm-roberta": BASE_BERT,
    "convbert": {**BASE_BERT, "embedding_size": 32, "head_ratio": 2, "conv_kernel_size": 3},
    "squeezebert": {**BASE_BERT, "embedding_size": 32},
    "modernbert": {**BASE_BERT, "cls_token_id": 1, "sep_token_id": 2, "reference_compile": False},
}
DECODERS: Configs = {
    "gpt2": {**BASE_TEXT, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "use_cache": False},
    "opt": {**BASE_BERT, "ffn_dim": 64, "word_embed_proj_dim": 32, "use_cache": False},
    "gpt_neox": {**BASE_BERT, "use_cache": False},
    "gpt_neo": {
        **BASE_TEXT,
        "hidden_size": 32,
        "num_layers": 4,
        "num_heads": 4,
        "max_position_embeddings": 64,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 8,
        "use_cache": False,
    },
    "bloom": {**BASE_TEXT, "hidden_size": 32, "n_layer": 4, "n_head": 4, "use_cache": False},
    "falcon": {**BASE_BERT, "num_kv_heads": 4, "use_cache": False},
    "llama": BASE_LLAMA,
    "mistral": {**BASE_LLAMA, "sliding_window": 8},
    # The default, a grouped product, has no float64.
    "mixtral": {**BASE_LLAMA, "num_local_experts": 2, "num_experts_per_tok": 1, "experts_implementation": "batched_mm"},
    "qwen2": BASE_LLAMA,
    "qwen3": BASE_GEMMA,
    "gemma": BASE_GEMMA,
    "gemma2": BASE_GEMMA,
    "phi": BASE_LLAMA,
    "phi3": BASE_LLAMA,
    "olmo": BASE_LLAMA,
    "mamba": {**BASE_TEXT, "hidden_size": 32, "num_hidden_layers": 4, "state_size": 8, "use_cache": False},
}
SEQ2SEQ: Configs = {
    "t5": BASE_T5,
    "bart": BASE_SEQ2SEQ,
    "mbart": BASE_SEQ2SEQ,
    "marian": BASE_SEQ2SEQ,
    "pegasus": BASE_SEQ2SEQ,
}
VISION: Configs = {
    "vit": BASE_VIT,
    "deit": BASE_VIT,
    "beit": BASE_VIT,
    "dinov2": {**BASE_VIT, "mlp_ratio": 2},
    "swin": {**BASE_IMAGE, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
    "convnext": {**BASE_STAGES, "hidden_sizes": [8, 16, 32, 64]},
    "convnextv2": {**BASE_STAGES, "hidden_sizes": [8, 16, 32, 64]},
    "segformer": {
        **BASE_STAGES,
        "hidden_sizes": [8, 16, 32, 64],
        "num_attention_heads": [1, 2, 2, 4],
        "decoder_hidden_size": 32,
    },
    "resnet": {**BASE_STAGES, "embedding_size": 16, "hidden_sizes": [16, 32, 64, 64]},
    "regnet": {**BASE_STAGES, "embedding_size": 16, "hidden_sizes": [16, 32, 64, 64], "groups_width": 8},
    "mobilevit": {**BASE_IMAGE, "hidden_sizes": [24, 32, 48], "neck_hidden_sizes": [8, 16, 16, 16, 16, 16, 32]},
    "poolformer": {**BASE_STAGES, "hidden_sizes": [8, 16, 32, 64]},
}
SPEECH: Configs = {
    "wav2vec2": {**BASE_SOUND, "num_codevectors_per_group": 8, "codevector_dim": 16},
    "hubert": BASE_SOUND,
    "wavlm": {**BASE_SOUND, "num_buckets": 16, "max_bucket_distance": 32},
}
WHISPER: Configs = {
    "whisper": {
        **BASE_SEQ2SEQ,
        "num_mel_bins": 16,
        "max_source_positions": 20,
        "max_target_positions": 32,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    },
}
CLIP: dict[str, Any] = {
    "text_config": {**BASE_TOWER, "vocab_size": VOCABULARY, "max_position_embeddings": 32, **BASE_SPECIAL},
    "vision_config": {**BASE_TOWER, "image_size": 32, "patch_size": 8},
    "projection_dim": 16,
}
