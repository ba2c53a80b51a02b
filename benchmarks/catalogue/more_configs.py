"""Configurations of more families of transformers, small, by model type: state spaces, experts, hybrids, older ones."""

from __future__ import annotations

from catalogue.small_configs import (
    BASE_BERT,
    BASE_GEMMA,
    BASE_IMAGE,
    BASE_LLAMA,
    BASE_SEQ2SEQ,
    BASE_SOUND,
    BASE_T5,
    BASE_TEXT,
    BASE_VIT,
    Configs,
)

_EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "experts_implementation": "batched_mm"}

ENCODERS: Configs = {
    "camembert": BASE_BERT,
    "ernie": BASE_BERT,
    "megatron-bert": BASE_BERT,
    "roformer": {**BASE_BERT, "embedding_size": 32},
    "nystromformer": {**BASE_BERT, "segment_means_seq_len": 12, "num_landmarks": 12, "conv_kernel_size": 3},
    "fnet": {**BASE_BERT, "use_tpu_fourier_optimizations": False},
    "mobilebert": {
        **BASE_BERT,
        "embedding_size": 16,
        "intra_bottleneck_size": 16,
        "true_hidden_size": 16,
        "num_feedforward_networks": 2,
    },
    "layoutlm": BASE_BERT,
    "ibert": {**BASE_BERT, "quant_mode": False},
    "xlnet": {**BASE_TEXT, "d_model": 32, "n_layer": 4, "n_head": 4, "d_inner": 64, "use_mems_train": False},
    "funnel": {**BASE_TEXT, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64, "block_sizes": [1, 1, 1]},
    "esm": {**BASE_BERT, "mask_token_id": 3, "position_embedding_type": "rotary"},
}
DECODERS: Configs = {
    "olmo2": BASE_LLAMA,
    "olmoe": {**BASE_LLAMA, **_EXPERTS},
    "cohere": BASE_LLAMA,
    "stablelm": BASE_LLAMA,
    "granite": BASE_LLAMA,
    "starcoder2": {**BASE_LLAMA, "sliding_window": 8},
    "gemma3_text": {**BASE_GEMMA, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "qwen3_moe": {**BASE_GEMMA, **_EXPERTS, "moe_intermediate_size": 32},
    "smollm3": BASE_LLAMA,
    "gptj": {
        **BASE_TEXT,
        "n_embd": 32,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 64,
        "rotary_dim": 4,
        "use_cache": False,
    },
    "codegen": {
        **BASE_TEXT,
        "n_embd": 32,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 64,
        "rotary_dim": 4,
        "use_cache": False,
    },
    "gpt_bigcode": {**BASE_TEXT, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "use_cache": False},
    "mamba2": {
        **BASE_TEXT,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "state_size": 8,
        "num_heads": 8,
        "head_dim": 8,
        "n_groups": 1,
        "chunk_size": 4,
        "use_cache": False,
    },
    "rwkv": {**BASE_TEXT, "hidden_size": 32, "num_hidden_layers": 4, "attention_hidden_size": 32, "use_cache": False},
    "biogpt": {**BASE_BERT, "layerdrop": 0.0, "use_cache": False},
    "xglm": {
        **BASE_TEXT,
        "d_model": 32,
        "num_layers": 4,
        "attention_heads": 4,
        "ffn_dim": 64,
        "max_position_embeddings": 64,
        "use_cache": False,
    },
}
SEQ2SEQ: Configs = {
    "mt5": BASE_T5,
    "m2m_100": {**BASE_SEQ2SEQ, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0},
    "blenderbot": BASE_SEQ2SEQ,
}
VISION: Configs = {
    "swinv2": {**BASE_IMAGE, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
    "pvt_v2": {
        **BASE_IMAGE,
        "hidden_sizes": [8, 16, 32, 32],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 2, 4, 4],
    },
    "focalnet": {**BASE_IMAGE, "embed_dim": 16, "depths": [1, 1, 2], "focal_levels": [1] * 3, "focal_windows": [3] * 3},
    "mobilenet_v2": {**BASE_IMAGE, "depth_multiplier": 0.35},
    "efficientnet": {**BASE_IMAGE, "width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320},
    "bit": {
        **BASE_IMAGE,
        "embedding_size": 16,
        "hidden_sizes": [16, 32, 64, 64],
        "depths": [1, 1, 2, 1],
        "num_groups": 8,
    },
    "dinov2_with_registers": {**BASE_VIT, "mlp_ratio": 2},
    "siglip": {"vision_config": {**BASE_VIT, "num_channels": 3}, "num_labels": 10},
}
SPEECH: Configs = {
    "data2vec-audio": {**BASE_SOUND, "conv_pos_kernel_size": 3, "num_conv_pos_embeddings": 2},
    "unispeech": {**BASE_SOUND, "num_codevectors_per_group": 8, "codevector_dim": 16},
    "sew": {**BASE_SOUND, "squeeze_factor": 2},
}
