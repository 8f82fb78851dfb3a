"""Sizes of the tiny test models: what every configuration shares, and what a model type needs besides.

Data only. `tiny.py` applies it; a key of SIZES is used where the class's default configuration has it, at any depth.
"""

from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "d_model": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "max_position_embeddings": 128,
    # Shorter than the 12 test tokens, so that a window cuts something off.
    "sliding_window": 6,
    "attention_window_size": 6,
    "attention_chunk_size": 6,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "residual_dropout": 0.0,
    "dropout": 0.0,
    # Mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "intermediate_size_mlp": 48,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    # State-space and linear-attention layers
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_d_state": 8,
    "mamba_d_ssm": 64,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
    "ssm_state_size": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 1,
    "chunk_size": 16,
    # Gemma 3n and 4
    "num_kv_shared_layers": 0,
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 8,
    # Vision and audio towers
    "image_size": 32,
    "patch_size": 16,
    "depth": 1,
    "out_hidden_size": 32,
    "num_mel_bins": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "layerdrop": 0.0,
    "max_source_positions": 64,
    "num_position_embeddings": 16,
    "projector_hidden_size": 32,
    "alignment_intermediate_size": 64,
    # Encoder-decoders and older decoders
    "d_kv": 8,
    "d_ff": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 32,
    "n_heads": 4,
    "n_layers": 2,
    "n_positions": 128,
    "max_seq_len": 128,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "max_target_positions": 64,
}

# Every kind of layer that a default configuration names appears once in the tiny one.
LAYER_LISTS = ("layer_types", "layers_block_type", "mlp_layer_types")
SOFTMAX_KINDS = ("full_attention", "sliding_attention", "chunked_attention", "indexed_attention", "hybrid")

_SLIDING_FULL = {"layer_types": ["sliding_attention", "full_attention"]}
_CONV_FULL = {"layer_types": ["conv", "full_attention", "full_attention"], "num_hidden_layers": 3}
_LINEAR_FULL = {"layer_types": ["linear_attention", "full_attention", "full_attention"], "num_hidden_layers": 3}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_GEMMA4_TEXT = {"global_head_dim": 16}
_QWEN4_TEXT = {
    "hc_lowrank": 8,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "ngram_vocab_size_base": 50,
    "split_ngram_parts": 2,
}
_LLAMA_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_PARAKEET = {"hidden_size": 32, "subsampling_conv_channels": 8}
_MIMI = {
    "num_filters": 4,
    "upsampling_ratios": [2, 2],
    "codebook_size": 8,
    "codebook_dim": 8,
    "num_quantizers": 2,
    "vector_quantization_hidden_dimension": 8,
    "upsample_groups": 32,
}
_CODEC = {"num_filters": 4, "hidden_size": 8, "downsampling_ratios": [2], "depths": [1, 1]}
_GRANITE_SPEECH = {
    "encoder_config": {
        "input_dim": 16,
        "num_layers": 1,
        "hidden_dim": 32,
        "output_dim": 8,
        "context_size": 16,
        "max_pos_emb": 16,
    },
    "projector_config": {"encoder_hidden_size": 32},
}

# Layers that alternate by position, lists that must have a certain length, keys that must agree with each other.
OVERRIDES: dict[str, dict[str, Any]] = {
    "apertus1p5": {
        "text_config": {"rope_parameters": _LLAMA_ROPE},
        "vision_config": {"codebook_size": 8, "embed_dim": 8, "base_channels": 32, "latent_channels": 32, "num_res_blocks": 1}
        | {"channel_multiplier": [1, 1], "attn_resolutions": []},
        "audio_config": {"model_type": "wavtokenizer_encoder", "codebook_size": 8, "codebook_dim": 32, "num_filters": 4}
        | {"upsampling_ratios": [2, 2], "num_lstm_layers": 1, "decoder_num_layers": 1},
        # The markers of both lie at the top of the vocabulary, one range behind the other.
        "image_token_offset": 110,
        "audio_token_offset": 118,
    },
    "apertus1p5_text": {"rope_parameters": _LLAMA_ROPE},
    "cohere_compass": {
        "text_config": _SLIDING_FULL | {"rope_parameters": {"sliding_attention": _MROPE, "full_attention": _MROPE}},
        "vision_config": {"deepstack_visual_indexes": [0]},
    },
    "cosmos3_edge": {"text_config": {"rope_parameters": _MROPE}},
    "ernie4_5_vl_moe": {
        "text_config": {"moe_intermediate_size": [16, 16], "rope_parameters": _MROPE | {"mrope_section": [1, 1, 2]}}
    },
    "glm46v": {"text_config": {"rope_parameters": _MROPE}},
    "glm4v": {"text_config": {"rope_parameters": _MROPE}},
    "glm4v_moe": {"text_config": {"rope_parameters": _MROPE | {"partial_rotary_factor": 1.0}}},
    "glm_ocr": {"text_config": {"rope_parameters": _MROPE}},
    "glmga": {"text_config": {"rope_parameters": _MROPE}},
    "janus": {
        "vision_config": {"projection_dim": 32, "num_image_tokens": 4},
        "vq_config": {
            "embed_dim": 8,
            "num_embeddings": 16,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "image_token_embed_dim": 32,
            "projection_dim": 32,
            "num_patches": 2,
            "latent_channels": 32,
        },
    },
    "omniasr": {
        "audio_config": {"conv_dim": [8, 8], "conv_kernel": [3, 3], "conv_stride": [2, 2]}
        | {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "hidden_dropout": 0.0},
    },
    "paddleocr_vl": {"text_config": {"rope_parameters": _MROPE}},
    "qwen2_5_omni_thinker": {
        "text_config": {"rope_parameters": _MROPE},
        "vision_config": {"fullatt_block_indexes": [0]},
        "audio_config": {"output_dim": 32},
    },
    "qwen2_5_vl": {"text_config": {"rope_parameters": _MROPE}, "vision_config": {"fullatt_block_indexes": [0]}},
    "qwen2_vl": {"text_config": {"rope_parameters": _MROPE}, "vision_config": {"embed_dim": 32}},
    "muse_glimmer": {"vision_config": {"pos_emb_height": 4, "pos_emb_width": 4}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2, "max_img_size": 64}},
    "bamba": {"num_hidden_layers": 3, "attn_layer_indices": [1, 2]},
    "canary": {"encoder_config": _PARAKEET},
    "cohere_asr": {"encoder_config": _PARAKEET},
    "cohere_compass_text": _SLIDING_FULL | {"rope_parameters": {"sliding_attention": _MROPE, "full_attention": _MROPE}},
    "dbrx": {
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 4, "clip_qkv": 8.0, "rope_theta": 10_000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dia": {
        "delay_pattern": [0, 1],
        "decoder_config": {
            "num_channels": 2,
            "cross_num_attention_heads": 4,
            "cross_num_key_value_heads": 4,
            "cross_head_dim": 8,
            "cross_hidden_size": 32,
        },
    },
    "emu3": {
        "vocabulary_map": {"<image>": 100, "<|extra_200|>": 101} | {f"<|visual token {i:06d}|>": 102 + i for i in range(8)},
        "vq_config": {
            "codebook_size": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "attn_resolutions": [],
        },
    },
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 4, "bias": True},
    "fun_asr_nano": {
        "adaptor_config": {"intermediate_size": 8, "projector_hidden_size": 32},
        "audio_config": {"num_timestamp_prediction_layers": 1, "hidden_dropout": 0.0},
    },
    # A tower of its own, because its k_proj must be left alone.
    "gemma4": {"text_config": _GEMMA4_TEXT, "vision_config": {"model_type": "gemma4_vision", "position_embedding_size": 16}},
    "gemma4_text": _GEMMA4_TEXT,
    "gemma4_unified": {"text_config": _GEMMA4_TEXT},
    "gemma4_unified_text": _GEMMA4_TEXT,
    "got_ocr2": {"vision_config": {"output_channels": 8, "global_attn_indexes": [1], "mlp_dim": 48, "window_size": 2}},
    "gpt_bigcode": {"n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "multi_query": False},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "granite_speech": _GRANITE_SPEECH,
    "granite_speech_plus": _GRANITE_SPEECH,
    "granitemoehybrid": _LINEAR_FULL,
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "kyutai_speech_to_text": {"num_codebooks": 2, "codebook_vocab_size": 96, "codec_config": _MIMI},
    "laguna": _SLIDING_FULL,
    "lfm2": _CONV_FULL | {"block_auto_adjust_ff_dim": False},
    "lfm2_moe": _CONV_FULL,
    "llama4": {
        "vision_config": {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
    },
    "mellum": _SLIDING_FULL,
    # Its sliding layers have twice the key/value heads of its full layers.
    "mimo_v2_flash": {"num_attention_heads": 8, "head_dim": 16, "v_head_dim": 8},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "dense_intermediate_size": 48,
        "rotary_dim": 4,
        "index_head_dim": 8,
        "index_block_size": 2,
        "index_topk_blocks": 2,
    },
    "ministral": _SLIDING_FULL,
    "mllama": {
        "text_config": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
        "vision_config": {
            "num_global_layers": 1,
            "intermediate_layers_indices": [0],
            "vision_output_dim": 64,
            "attention_heads": 4,
        },
    },
    "moonshine": {
        "hidden_size": 64,
        "encoder_num_hidden_layers": 2,
        "decoder_num_hidden_layers": 2,
        "encoder_num_attention_heads": 4,
        "decoder_num_attention_heads": 4,
        "encoder_num_key_value_heads": 4,
        "decoder_num_key_value_heads": 4,
    },
    "moonshine_streaming": {"hidden_size": 64, "head_dim": 16, "num_key_value_heads": 4, "encoder_config": {"head_dim": 16}},
    "nemo_speechlm": {
        "audio_config": {"diarization_config": {"head_config": {"audio_hidden_size": 32}}},
        "word_timestamp_config": {"blank_token_id": 127},
    },
    "phi4_multimodal": {
        "vision_config": {"image_size": 28},
        "audio_config": {
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "nemo_conv_channels": 8,
            "nemo_final_size": 1,
            "input_size": 8,
            "num_blocks": 1,
        },
    },
    "qwen3_asr": {"audio_config": {"output_dim": 32, "downsample_hidden_size": 8}},
    "qwen4_exp": {"text_config": _QWEN4_TEXT},
    "qwen4_exp_text": _QWEN4_TEXT,
    "recurrent_gemma": {"num_hidden_layers": 4, "block_types": ["recurrent", "attention"]},
    "smollm3": {"no_rope_layer_interval": 2},
    "speech_to_text": {"input_feat_per_channel": 16, "conv_channels": 32},
    "vibevoice": {
        "audio_config": _CODEC,
        "semantic_model_config": _CODEC,
        "diffusion_head_config": {"latent_size": 8},
    },
    "ctrl": {"dff": 48},
    "xglm": {"attention_heads": 4, "ffn_dim": 48},
    "vibevoice_asr": {"acoustic_tokenizer_encoder_config": _CODEC, "semantic_tokenizer_encoder_config": _CODEC},
}

_TOKENS = (2, 12)
_AUDIO = (2, 64, 16)  # [batch, frames, mel bins]
_WAVE = (2, 4000)

# Shapes of what `forward` takes instead of input_ids alone; names ending in "_ids" hold tokens, others numbers.
INPUTS: dict[str, dict[str, tuple[int, ...]]] = {
    "canary": {"input_features": _AUDIO, "decoder_input_ids": _TOKENS},
    "cohere_asr": {"input_features": _AUDIO, "decoder_input_ids": _TOKENS},
    "dia": {"input_ids": _TOKENS, "decoder_input_ids": (*_TOKENS, 2)},
    "kyutai_speech_to_text": {"input_ids": (*_TOKENS, 3)},
    # Without image states the cross-attention layers are skipped.
    "mllama": {"input_ids": _TOKENS, "cross_attention_states": (2, 5, 32)},
    "moonshine": {"input_values": _WAVE, "decoder_input_ids": _TOKENS},
    "moonshine_streaming": {"input_values": _WAVE, "decoder_input_ids": _TOKENS},
    "speech_to_text": {"input_features": _AUDIO, "decoder_input_ids": _TOKENS},
    "voxtral_realtime": {"input_ids": _TOKENS, "input_features": (2, 16, 96)},
    "whisper": {"input_features": (2, 16, 128), "decoder_input_ids": _TOKENS},
}
_TEXT_TO_TEXT = """
    bart bigbird_pegasus blenderbot blenderbot-small led longt5 m2m_100 marian mbart mt5 mvp nllb-moe pegasus pegasus_x plbart
    pop2piano switch_transformers t5 t5gemma t5gemma2 umt5
"""
INPUTS |= dict.fromkeys(_TEXT_TO_TEXT.split(), {"input_ids": _TOKENS, "decoder_input_ids": _TOKENS})

# Where the text-level keys live, if neither in text_config nor at the top.
TEXT_LEVELS: dict[str, tuple[str, ...]] = {
    "canary": ("decoder_config",),
    "dia": ("encoder_config", "decoder_config"),
    "t5gemma": ("encoder", "decoder"),
    "t5gemma2": ("encoder.text_config", "decoder"),
}

# Every key that counts key/value heads, if it is not num_key_value_heads at the text level.
KV_HEADS: dict[str, tuple[str, ...]] = {
    "dia": (
        "encoder_config.num_key_value_heads",
        "decoder_config.num_key_value_heads",
        "decoder_config.cross_num_key_value_heads",
    ),
    "moonshine": ("encoder_num_key_value_heads", "decoder_num_key_value_heads"),
    "moonshine_streaming": ("num_key_value_heads", "encoder_config.num_key_value_heads"),
}

_ALL_SHARED = "no k_proj of its own: every layer reuses the keys of another model, which forward needs; 5.23 cannot build it"
_TIMM = "its vision tower is a timm model and timm is not a dependency"
_INCOMPLETE = "its default configuration is not complete, and says too little to make a small one"
UNBUILDABLE: dict[str, str] = {
    "deepseek_ocr2": _INCOMPLETE,
    "fast_vlm": _TIMM,
    "granite4_vision": _INCOMPLETE,
    "hunyuan_vl": _INCOMPLETE,
    "muse_spark": _INCOMPLETE,
    "perception_lm": _TIMM,
    "gemma3n": "its vision tower is a timm model and timm is not a dependency (gemma3n_text covers the text part)",
    "gemma4_assistant": _ALL_SHARED,
    "gemma4_unified_assistant": _ALL_SHARED,
}

# model type → (version of transformers, what its forward says there): that it loads is all that can be tried of it.
DOES_NOT_RUN: dict[str, tuple[str, str]] = {
    "llama4": ("5.24", "has no attribute 'image_outputs'"),
}

# Built and saved like the others, but not converted. Of some `forward` fails with fewer key/value heads than query heads.
_Q_BY_KV = "the decoder's forward reshapes the queries by num_key_value_heads, so the class only runs multi-head attention"
UNGROUPABLE: dict[str, str] = {
    "mimo_v2_flash": "its sliding layers have 2 * num_key_value_heads heads, whatever the config says",
    "moonshine": _Q_BY_KV,
    "moonshine_streaming": _Q_BY_KV,
}

_NAMES = """
    afmoe apertus apertus1p5 apertus1p5_text arcee aria aria_text audioflamingo3 aya_vision bamba beam bitnet canary cohere
    cohere2 cohere2_moe cohere2_vision cohere_asr cohere_compass cohere_compass_text cosmos3_edge cosmos3_omni cwm dbrx
    deepseek_ocr2 deepseek_vl deepseek_vl_hybrid dia diffllama dots1 emu3 ernie4_5 ernie4_5_moe ernie4_5_vl_moe exaone exaone4
    exaone4_5 exaone_moe falcon falcon_h1 fast_vlm flex_olmo flint fun_asr_nano gemma gemma2 gemma3 gemma3_text gemma3n
    gemma3n_text gemma4 gemma4_assistant gemma4_text gemma4_unified gemma4_unified_assistant gemma4_unified_text glm glm4
    glm46v glm4_moe glm4v glm4v_moe glm_ocr glmasr glmga got_ocr2 gpt_bigcode gpt_oss granite granite4_vision granite_docling
    granite_speech granite_speech_plus granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium
    hunyuan_v1_dense hunyuan_v1_moe hunyuan_vl hy_v3 hyperclovax hyperclovax_vision_v2 idefics2 idefics3 internlm3 internvl
    iquestcoder jais2 jamba janus kolibri1 kyutai_speech_to_text laguna lara_mini lfm2 lfm2_moe lfm2_vl lfm3 lfm3_vl
    lighton_ocr llama llama4 llama4_text llava llava_next llava_next_video llava_onevision mellum mimo_v2_flash minicpm_ocr
    minicpmv4_6 minicpmv4_7 minimax minimax_m2 minimax_m3_vl minimax_m3_vl_text ministral ministral3 mistral mistral3 mixtral
    mllama moonshine moonshine_streaming moshi moss_transcribe_diarize muse_glimmer muse_spark musicflamingo nanochat
    nemo_speechlm nemotron nemotron_h nemotron_h_omni olmo olmo2 olmo3 olmo_hybrid olmoe omniasr ovis2 paddleocr_vl paligemma
    perception_lm phi phi3 phi4_multimodal phimoe pp_chart2table qianfan_ocr qwen2 qwen2_5_omni_thinker qwen2_5_vl qwen2_audio
    qwen2_moe qwen2_vl qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_asr qwen3_moe qwen3_next
    qwen3_omni_moe_thinker qwen3_vl qwen3_vl_moe qwen4_exp qwen4_exp_text recurrent_gemma seed_oss smollm3 smolvlm solar_open
    stablelm starcoder2 step3p7 t5gemma t5gemma2 unlimited_ocr vaultgemma vibevoice vibevoice_asr video_llama_3 video_llava
    vipllava voxtral voxtral_realtime zamba zamba2
"""
# Those that become our own class.
_OWN = """
    bart bigbird_pegasus biogpt blenderbot blenderbot-small bloom ctrl gpt-sw3 gpt2 gpt_neo led longt5 m2m_100 marian mbart
    modernbert-decoder mpt mt5 mvp nllb-moe opt pegasus pegasus_x persimmon plbart pop2piano speech_to_text
    switch_transformers t5 trocr umt5 whisper xglm
"""

MODEL_TYPES: tuple[str, ...] = (*_NAMES.split(), *_OWN.split())
