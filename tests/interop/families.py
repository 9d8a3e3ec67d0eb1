"""Small random checkpoints of every family of the table, for test_families.py and test_families_prune.py.

ROWS lists them: the transformers classes, the numbers that differ from the common ones, how config.json of a release differs
from what transformers 5 writes (`rename`, `drop`, `add`, by dotted path), and what is done to the tensors afterwards (`make`:
block quantization, multi-token-prediction layers, null experts). Windows, chunks and original context lengths are shorter than
the test's texts, so that every branch of every mask and every rotary table is taken; no norm, bias, sink or selection bias
keeps the value it was initialised with. Values are exact in bfloat16, so one checkpoint serves every dtype.

write() makes the folder that our side reads, plain() a copy of any such folder that transformers loads (quantized weights
multiplied out), load() the model, and observe() what it computes.
"""
import contextlib
import json
import math
import os
import re
import shutil
import zlib

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

GQA = dict(num_attention_heads=4, num_key_value_heads=2)
MLA = dict(num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=12)
DELTA = dict(linear_key_head_dim=8, linear_value_head_dim=12, linear_num_key_heads=2, linear_num_value_heads=4,
             layer_types=["linear_attention", "linear_attention", "full_attention"], shared_expert_intermediate_size=32)
V3 = dict(**MLA, q_lora_rank=20, intermediate_size=96, moe_intermediate_size=32, n_routed_experts=16, n_shared_experts=1,
          num_experts_per_tok=3, n_group=4, topk_group=2, first_k_dense_replace=1, routed_scaling_factor=2.5, norm_topk_prob=True,
          num_nextn_predict_layers=0)
V2 = dict(**MLA, q_lora_rank=None, intermediate_size=96, moe_intermediate_size=32, n_routed_experts=8, n_shared_experts=2,
          num_experts_per_tok=3, n_group=1, topk_group=1, topk_method="greedy", first_k_dense_replace=1,
          routed_scaling_factor=1.0, norm_topk_prob=False)
GLM = dict(**GQA, head_dim=16, attention_bias=True, use_qk_norm=True, intermediate_size=96, moe_intermediate_size=32,
           n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=3, n_group=1, topk_group=1, first_k_dense_replace=1,
           routed_scaling_factor=1.5, norm_topk_prob=True, num_nextn_predict_layers=0)
OSS = dict(**GQA, head_dim=16, intermediate_size=64, num_local_experts=8, num_experts_per_tok=4, sliding_window=16)
PHI = dict(**GQA, intermediate_size=48, num_local_experts=8, num_experts_per_tok=2, attention_bias=True, lm_head_bias=True,
           router_jitter_noise=0.01, sliding_window=None)
GRANITE = dict(**GQA, intermediate_size=32, num_local_experts=8, num_experts_per_tok=3, embedding_multiplier=6.0,
               logits_scaling=2.0, residual_multiplier=0.22, attention_multiplier=0.0625, tie_word_embeddings=True)
LLAMA4 = dict(**GQA, head_dim=16, intermediate_size=48, intermediate_size_mlp=96, num_local_experts=8, num_experts_per_tok=1,
              interleave_moe_layer_step=2, num_hidden_layers=4, no_rope_layer_interval=3, attention_chunk_size=16,
              attn_temperature_tuning=True, floor_scale=8, attn_scale=0.1, use_qk_norm=True, pad_token_id=0)
QWEN35 = dict(**GQA, head_dim=16, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=3, **DELTA)
MIXTRAL = dict(**GQA, intermediate_size=48, num_local_experts=8, num_experts_per_tok=2, sliding_window=16)
MINIMAX = dict(**GQA, head_dim=16, intermediate_size=32, num_local_experts=8, num_experts_per_tok=3, rotary_dim=8)

PLUS_PLUS = {**MIXTRAL, "sliding_window": None}

YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=32, beta_slow=1, rope_theta=10000.0)
YARN_V3 = dict(YARN, mscale=1.0, mscale_all_dim=1.0)
YARN_V2 = dict(YARN, mscale=0.707, mscale_all_dim=0.9)
YARN_OSS = dict(rope_type="yarn", factor=4.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
                original_max_position_embeddings=32, rope_theta=150000.0)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32,
              rope_theta=500000.0)
LONG = dict(rope_type="longrope", short_factor=[1.0, 1.05, 1.1, 1.2, 1.3, 1.5, 1.7, 2.0],
            long_factor=[1.0, 1.3, 2.0, 3.0, 5.0, 8.0, 12.0, 16.0], short_mscale=1.1, long_mscale=1.25,
            original_max_position_embeddings=64, rope_theta=10000.0)
ALPHA = dict(rope_type="dynamic", alpha=1000.0, factor=1.0, rope_theta=10000.0)

DS_HUB = dict(rename={"num_mtp_layers": "num_nextn_predict_layers"}, drop=["head_dim", "qk_head_dim"],
              add={"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1})
GLM_HUB = dict(rename={"num_mtp_layers": "num_nextn_predict_layers"})
MTP_V3 = r"model\.layers\.3\."
MTP_QWEN = r"mtp\."
FP8 = [24, 40]   # blocks that divide neither side of any matrix here


def theta(value, **more):
    return dict(rope_type="default", rope_theta=float(value), **more)


def row(name, config, rope=None, model=None, rename=None, drop=(), add=None, make=None, mtp=None, fused=False, dtype="float32",
        dialects=("5", "4"), limit=1e-3, as_type=None, note="", **numbers):
    """mtp: pattern of the tensors of multi-token prediction; fused: transformers' own names instead of the release's;
    limit: of |our logit - transformers'|; as_type: model_type to write."""
    return dict(name=name, config=config, rope=rope or theta(10000), model=model, rename=rename or {}, drop=drop, add=add or {},
                make=make, mtp=mtp, fused=fused, dtype=dtype, dialects=dialects, limit=limit, as_type=as_type, note=note,
                numbers=numbers)


QWEN3 = dict(**GQA, head_dim=24, intermediate_size=96, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=3,
             norm_topk_prob=True, mlp_only_layers=[1])
EXAONE = dict(**GQA, head_dim=16, intermediate_size=96, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=3,
              num_shared_experts=1, n_group=1, topk_group=1, routed_scaling_factor=2.5, sliding_window=16,
              sliding_window_pattern=3)
LFM2 = dict(**GQA, intermediate_size=96, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=3, num_dense_layers=1,
            layer_types=["conv", "full_attention", "conv"], use_expert_bias=True, norm_topk_prob=True, conv_L_cache=3,
            tie_word_embeddings=True)
ERNIE = dict(**GQA, intermediate_size=96, moe_intermediate_size=32, moe_num_experts=8, moe_k=3, moe_num_shared_experts=2,
             moe_layer_start_index=1, moe_layer_end_index=2, moe_layer_interval=1, tie_word_embeddings=True)
HUNYUAN = dict(**GQA, head_dim=16, intermediate_size=32, num_experts=8, moe_topk=3, tie_word_embeddings=True)
ROWS = [
    row("qwen3_moe", "Qwen3MoeConfig", theta(1e6), rename={"num_local_experts": "num_experts"}, **QWEN3),
    row("qwen3_moe-fused", "Qwen3MoeConfig", theta(1e6), fused=True, dtype="bfloat16", **QWEN3),
    row("qwen3_moe-fp8", "Qwen3MoeConfig", theta(1e6), make="fp8", dtype="bfloat16", **QWEN3),
    row("mixtral", "MixtralConfig", theta(1e6), **MIXTRAL),
    row("mixtral-fused", "MixtralConfig", theta(1e6), fused=True, **MIXTRAL),
    row("gpt_oss", "GptOssConfig", YARN_OSS, add={"experts_per_token": 4, "swiglu_limit": 7.0}, dtype="bfloat16", **OSS),
    row("gpt_oss-mxfp4", "GptOssConfig", YARN_OSS, add={"experts_per_token": 4}, make="mxfp4", dtype="bfloat16", **OSS),
    row("deepseek_v3", "DeepseekV3Config", YARN_V3, **DS_HUB, **V3),
    row("deepseek_v3-moonlight", "DeepseekV3Config", theta(50000), **DS_HUB,
        **{**V3, "q_lora_rank": None, "n_routed_experts": 8, "n_group": 1, "topk_group": 1}),
    row("deepseek_v3-kimi", "DeepseekV3Config", YARN_V3, **DS_HUB, as_type="kimi_k2", dialects=("4",),
        **{**V3, "n_routed_experts": 8, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827}),
    row("deepseek_v3-fused", "DeepseekV3Config", YARN_V3, fused=True, dtype="bfloat16", **V3),
    row("deepseek_v3-fp8", "DeepseekV3Config", YARN_V3, **DS_HUB, make="fp8", dtype="bfloat16", **V3),
    row("deepseek_v3-mtp", "DeepseekV3Config", YARN_V3, **DS_HUB, make="mtp_layer", mtp=MTP_V3, dialects=("4",), **V3),
    row("deepseek_v3-mtp-fp8", "DeepseekV3Config", YARN_V3, **DS_HUB, make="mtp_layer fp8", mtp=MTP_V3, dialects=("4",),
        dtype="bfloat16", **V3),
    row("deepseek_v32", "DeepseekV32Config", YARN_V3, index_topk=128, index_head_dim=16, index_n_heads=2, **DS_HUB, **V3),
    row("glm_moe_dsa", "GlmMoeDsaConfig", theta(1e6), drop=["head_dim", "qk_head_dim"], index_topk=128, index_head_dim=16,
        index_n_heads=2, **{**V3, "n_group": 1, "topk_group": 1, "n_routed_experts": 8}),
    row("deepseek_v2", "DeepseekV2Config", YARN_V2, drop=["head_dim", "qk_head_dim"],
        add={"scoring_func": "softmax", "moe_layer_freq": 1}, **V2),
    row("deepseek_v2-groups", "DeepseekV2Config", YARN_V2, drop=["head_dim", "qk_head_dim"],
        **{**V2, "q_lora_rank": 20, "n_routed_experts": 16, "n_group": 4, "topk_group": 2,
           "topk_method": "group_limited_greedy", "routed_scaling_factor": 4.0}),
    row("glm4_moe", "Glm4MoeConfig", theta(1e6, partial_rotary_factor=0.5), **GLM_HUB, **GLM),
    row("glm4_moe-mtp", "Glm4MoeConfig", theta(1e6, partial_rotary_factor=0.5), **GLM_HUB, make="mtp_layer", mtp=MTP_V3,
        dialects=("4",), dtype="bfloat16", **{**GLM, "attention_bias": False}),
    row("glm4_moe_lite", "Glm4MoeLiteConfig", theta(1e6), add={"first_k_dense_replace": 1}, drop=["head_dim", "qk_head_dim"],
        **MLA, q_lora_rank=20, intermediate_size=96, moe_intermediate_size=32, n_routed_experts=8, n_shared_experts=1,
        num_experts_per_tok=3, n_group=1, topk_group=1, routed_scaling_factor=1.8),
    row("qwen3_vl_moe-hub", "Qwen3VLMoeConfig", theta(1e6, mrope_section=[4, 4, 4]), model="Qwen3VLMoeForConditionalGeneration",
        make="in_out", **{**QWEN3, "moe_intermediate_size": 40}),
    row("qwen3_vl_moe-fused-hub", "Qwen3VLMoeConfig", theta(1e6, mrope_section=[4, 4, 4]),
        model="Qwen3VLMoeForConditionalGeneration", fused=True, **{**QWEN3, "moe_intermediate_size": 40}),
    row("qwen3_next", "Qwen3NextConfig", theta(1e7, partial_rotary_factor=0.5), limit=5e-3, **GQA, head_dim=16,
        intermediate_size=96, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=3, norm_topk_prob=True, **DELTA),
    row("qwen3_next-mtp", "Qwen3NextConfig", theta(1e7, partial_rotary_factor=0.5), limit=5e-3, make="mtp_prefix", mtp=MTP_QWEN,
        dialects=("4",), **GQA, head_dim=16, intermediate_size=96, moe_intermediate_size=32, num_experts=8,
        num_experts_per_tok=3, norm_topk_prob=True, **DELTA),
    row("qwen3_5_moe_text", "Qwen3_5MoeTextConfig", theta(1e7, partial_rotary_factor=0.5, mrope_section=[2, 1, 1]),
        model="Qwen3_5MoeForCausalLM", limit=5e-3, **QWEN35),
    row("qwen3_5_moe-hub", "Qwen3_5MoeConfig", theta(1e7, partial_rotary_factor=0.5, mrope_section=[2, 1, 1]),
        model="Qwen3_5MoeForConditionalGeneration", limit=5e-3, fused=True, dtype="bfloat16", **QWEN35),
    row("qwen3_5_moe-hub-mtp", "Qwen3_5MoeConfig", theta(1e7, partial_rotary_factor=0.5, mrope_section=[2, 1, 1]),
        model="Qwen3_5MoeForConditionalGeneration", limit=5e-3, fused=True, dialects=("4",), make="mtp_prefix", mtp=MTP_QWEN,
        add={"mtp_num_hidden_layers": 1}, **QWEN35),
    row("olmoe", "OlmoeConfig", num_attention_heads=4, num_key_value_heads=4, intermediate_size=32, num_experts=8,
        num_experts_per_tok=3, norm_topk_prob=False, clip_qkv=None),
    row("olmoe-clip", "OlmoeConfig", dict(rope_type="dynamic", factor=2.0, rope_theta=10000.0), num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=32, num_experts=8, num_experts_per_tok=3, norm_topk_prob=False, clip_qkv=1.5,
        max_position_embeddings=32),
    row("qwen2_moe", "Qwen2MoeConfig", theta(1e6), drop=["layer_types", "qkv_bias"], **GQA, intermediate_size=96,
        moe_intermediate_size=32, shared_expert_intermediate_size=48, num_experts=8, num_experts_per_tok=4,
        norm_topk_prob=False),
    row("minimax_m2", "MiniMaxM2Config", theta(5e6, partial_rotary_factor=0.5), drop=["partial_rotary_factor"],
        add={"rotary_dim": 8, "scoring_func": "sigmoid", "use_routing_bias": True, "use_qk_norm": True,
             "qk_norm_type": "per_layer"}, **MINIMAX),
    row("minimax_m2-fused", "MiniMaxM2Config", theta(5e6, partial_rotary_factor=0.5), fused=True, **MINIMAX),
    row("minimax_m2-fp8", "MiniMaxM2Config", theta(5e6, partial_rotary_factor=0.5), drop=["partial_rotary_factor"],
        add={"rotary_dim": 8}, make="fp8", dtype="bfloat16", **MINIMAX),
    row("phimoe", "PhimoeConfig", LONG, add={"original_max_position_embeddings": 64}, **PHI),
    row("phimoe-fused", "PhimoeConfig", fused=True, drop=["rope_scaling"], **PHI),
    row("phimoe-long", "PhimoeConfig", dict(LONG, original_max_position_embeddings=32), dtype="bfloat16",
        add={"original_max_position_embeddings": 32}, note="beyond the original length: as transformers 5.23, which keeps short_factor", **PHI),
    row("granitemoe", "GraniteMoeConfig", **GRANITE),
    row("granitemoe-fused", "GraniteMoeConfig", fused=True, **GRANITE),
    row("granitemoeshared", "GraniteMoeSharedConfig", shared_intermediate_size=48, dtype="bfloat16", **GRANITE),
    row("llama4_text", "Llama4TextConfig", LLAMA3, model="Llama4ForCausalLM", **LLAMA4),
    row("llama4-hub", "Llama4Config", LLAMA3, model="Llama4ForConditionalGeneration", dtype="bfloat16", **LLAMA4),
    row("ernie4_5_moe", "Ernie4_5_MoeConfig", theta(5e5), **ERNIE),
    row("ernie4_5_moe-fused", "Ernie4_5_MoeConfig", theta(5e5), fused=True, dtype="bfloat16", **ERNIE),
    row("hunyuan_v1_moe", "HunYuanMoEV1Config", ALPHA, **HUNYUAN),
    row("hunyuan_v1_moe-hub", "HunYuanMoEV1Config", ALPHA, dialects=("4",), dtype="bfloat16",
        add={"moe_topk": [3, 3, 3], "moe_intermediate_size": [32, 32, 32], "num_shared_expert": [1, 1, 1]}, **HUNYUAN),
    row("solar_open", "SolarOpenConfig", theta(1e6), **{k: v for k, v in GLM.items() if k not in ("use_qk_norm", "intermediate_size",
        "first_k_dense_replace", "num_nextn_predict_layers")}),
    row("hy_v3", "HYV3Config", theta(1e6), **GQA, head_dim=16, intermediate_size=96, moe_intermediate_size=32, num_experts=8,
        num_experts_per_tok=3, num_shared_experts=1, router_scaling_factor=2.5),
    row("dots1", "Dots1Config", theta(1e7), **GQA, head_dim=16, intermediate_size=96, moe_intermediate_size=32,
        n_routed_experts=8, n_shared_experts=2, num_experts_per_tok=3, n_group=1, topk_group=1, first_k_dense_replace=1,
        norm_topk_prob=True, routed_scaling_factor=2.5, sliding_window=None),
    row("exaone_moe", "ExaoneMoeConfig", theta(1e6), **EXAONE),
    row("exaone_moe-fused", "ExaoneMoeConfig", theta(1e6), fused=True, dtype="bfloat16", **EXAONE),
    row("exaone_moe-mtp", "ExaoneMoeConfig", theta(1e6), dialects=("4",), make="mtp_prefix", mtp=MTP_QWEN,
        add={"num_nextn_predict_layers": 1}, **EXAONE),
    row("lfm2_moe", "Lfm2MoeConfig", theta(1e6), **LFM2),
    row("lfm2_moe-fused", "Lfm2MoeConfig", theta(1e6), fused=True, dtype="bfloat16", **LFM2),
    row("afmoe", "AfmoeConfig", **GQA, head_dim=16, intermediate_size=96, moe_intermediate_size=32, num_experts=8,
        num_experts_per_tok=3, num_shared_experts=1, num_dense_layers=1, route_scale=2.0, sliding_window=16,
        global_attn_every_n_layers=3, mup_enabled=True),
    row("flex_olmo", "FlexOlmoConfig", theta(5e5), **GQA, intermediate_size=32, num_experts=8, num_experts_per_tok=3,
        pad_token_id=None),
    row("jetmoe", "JetMoeConfig", num_key_value_heads=4, kv_channels=16, intermediate_size=32, num_local_experts=8,
        num_experts_per_tok=2, tie_word_embeddings=True),
    row("dbrx", "DbrxConfig", theta(50000), drop=["rope_theta", "rope_scaling"], d_model=64, n_heads=4, n_layers=3, max_seq_len=128,
        attn_config=dict(kv_n_heads=2, clip_qkv=1.5, rope_theta=50000.0),
        ffn_config=dict(ffn_hidden_size=48, moe_num_experts=8, moe_top_k=3, moe_normalize_expert_weights=1.0)),
    row("adamoe", "MixtralConfig", theta(1e6), make="null_experts", **{**MIXTRAL, "num_experts_per_tok": 4}),
    row("remoe", "MixtralConfig", make="relu", **MIXTRAL),
    row("dynamic_moe", "MixtralConfig", make="top_p", dialects=("4",), **{**MIXTRAL, "sliding_window": None}),
    row("MoE++", "MixtralConfig", make="plus_plus", dialects=("4",), **PLUS_PLUS),
    row("MoE++-single", "MixtralConfig", make="plus_plus", dialects=("4",), add={"moe_2layer_gate": False}, **PLUS_PLUS),
    row("MoE++-mixtral", "MixtralConfig", make="plus_plus", dialects=("4",), add={"moe_use_mixtral_gating": True},
        **PLUS_PLUS),
    row("MoE++-norm", "MixtralConfig", make="plus_plus", dialects=("4",), dtype="bfloat16",
        add={"moe_use_logits_norm": True, "moe_gate_norm_std": 1.5, "moe_feature_no_mul_topk": True}, **PLUS_PLUS),
]


# --- models ---------------------------------------------------------------------------------------------------------

def text_numbers(spec):
    common = dict(vocab_size=320, hidden_size=64, num_hidden_layers=3, max_position_embeddings=128, bos_token_id=1, eos_token_id=2)
    if spec["config"] == "DbrxConfig":
        common = dict(vocab_size=320, bos_token_id=1, eos_token_id=2)
    return {**common, **spec["numbers"], "rope_parameters": dict(spec["rope"])}


def configure(spec):
    """The config object; multimodal classes get the text numbers as text_config and the smallest vision tower that works."""
    numbers = text_numbers(spec)
    if spec["config"] == "Qwen3_5MoeConfig":
        vision = dict(depth=1, hidden_size=32, num_heads=2, intermediate_size=32, patch_size=4, out_hidden_size=64,
                      num_position_embeddings=16)
        return transformers.Qwen3_5MoeConfig(text_config=numbers, vision_config=vision, image_token_id=316, video_token_id=317,
                                             vision_start_token_id=318, vision_end_token_id=319)
    if spec["config"] == "Qwen3VLMoeConfig":
        vision = dict(depth=1, hidden_size=32, num_heads=2, intermediate_size=32, patch_size=4, out_hidden_size=64,
                      num_position_embeddings=16, deepstack_visual_indexes=[0])
        return transformers.Qwen3VLMoeConfig(text_config=numbers, vision_config=vision, image_token_id=316, video_token_id=317,
                                             vision_start_token_id=318, vision_end_token_id=319)
    if spec["config"] == "Llama4Config":
        vision = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vision_output_dim=32,
                      image_size=16, patch_size=8, projector_input_dim=32, projector_output_dim=32)
        return transformers.Llama4Config(text_config=numbers, vision_config=vision, boi_token_index=317, eoi_token_index=318,
                                         image_token_index=319)
    return getattr(transformers, spec["config"])(**numbers)


def model_class(spec):
    if spec["model"]:
        return getattr(transformers, spec["model"])
    return transformers.AutoModelForCausalLM._model_mapping[getattr(transformers, spec["config"])]


@torch.no_grad()
def randomize(model, seed):
    """Values that survive bfloat16, of a size that keeps logits within a few units and every expert in use."""
    rng = torch.Generator().manual_seed(seed)
    for name, t in model.state_dict().items():
        if not t.is_floating_point():
            continue
        noise = torch.randn(t.shape, generator=rng)
        if name.endswith("A_log"):
            v = torch.log(torch.rand(t.shape, generator=rng) * 3 + 0.2)
        elif t.dim() == 1 and "norm" in name.split(".")[-2] and name.endswith("weight"):
            v = t + 0.2 * noise      # around the initial value, which is 0 where the family adds 1
        elif re.search("correction_bias|expert_bias", name):
            v = 0.1 * noise
        elif name.endswith(("sinks", "dt_bias")):
            v = 0.6 * noise
        elif t.dim() == 1:
            v = 0.2 * noise
        elif re.search(r"embed_tokens|lm_head|wte", name):
            v = 0.25 * noise
        elif re.search(r"\.(gate|router|wg|layer)\.weight$", name):
            v = 0.3 * noise
        elif "conv" in name and t.dim() == 3 and t.shape[1] == 1:
            v = 0.5 * noise
        else:
            v = noise * 1.1 / math.sqrt(t.shape[-1])
        t.copy_(v.to(torch.bfloat16).to(t.dtype))


# --- what is done to the tensors ---------------------------------------------------------------------------------------

def read_tensors(folder):
    tensors = {}
    for f in sorted(os.listdir(folder)):
        if f.endswith(".safetensors"):
            with safe_open(os.path.join(folder, f), "pt") as s:
                tensors.update({k: s.get_tensor(k) for k in s.keys()})
    return tensors


def write_tensors(folder, tensors):
    for f in os.listdir(folder):
        if f.endswith((".safetensors", ".safetensors.index.json")):
            os.remove(os.path.join(folder, f))
    save_file({k: v.contiguous() for k, v in tensors.items()}, os.path.join(folder, "model.safetensors"),
              metadata={"format": "pt"})


def blocks_of(scale, shape, block):
    """The scale of every value."""
    rows = torch.arange(shape[0]) // block[0]
    return scale.float()[rows][:, torch.arange(shape[1]) // block[1]]


FP8_NAMES = re.compile(r"(_proj|_proj_with_mqa|\.w[123])\.weight$")


def make_fp8(spec, tensors, config):
    """e4m3 with one scale for each block of every projection, as DeepSeek's releases; the blocks' edges are ragged."""
    for name in [n for n in tensors if FP8_NAMES.search(n) and tensors[n].dim() == 2]:
        w = tensors[name].float()
        rows, cols = (-(-w.shape[i] // FP8[i]) for i in (0, 1))
        padded = torch.zeros(rows * FP8[0], cols * FP8[1])
        padded[:w.shape[0], :w.shape[1]] = w.abs()
        scale = padded.view(rows, FP8[0], cols, FP8[1]).amax((1, 3)) / 448
        tensors[name] = (w / blocks_of(scale, w.shape, FP8)).to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = scale
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                                     "weight_block_size": FP8}


E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def make_mxfp4(spec, tensors, config):
    """Experts as gpt-oss releases hold them: out-in, two e2m1 values a byte, one e8m0 scale for 32 values."""
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        w = tensors.pop(name).float().transpose(1, 2).contiguous()
        groups = w.view(*w.shape[:2], -1, 32)
        exponent = groups.abs().amax(-1).clamp(min=1e-9).log2().floor() - 2
        x = groups / 2.0 ** exponent[..., None]
        code = (x.abs()[..., None] - E2M1).abs().argmin(-1).to(torch.uint8) | (x < 0).to(torch.uint8) << 3
        tensors[name + "_blocks"] = code[..., 0::2] | code[..., 1::2] << 4
        tensors[name + "_scales"] = (exponent + 127).to(torch.uint8)
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": [
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]}


def another(tensors, old, new, seed):
    """Copies of the tensors under `old`, with other values, under `new`."""
    rng = torch.Generator().manual_seed(seed)
    for name in [n for n in tensors if n.startswith(old)]:
        t = tensors[name].float()
        t = t + 0.05 * torch.randn(t.shape, generator=rng)
        tensors[new + name[len(old):]] = t.to(torch.bfloat16).to(tensors[name].dtype)


def make_mtp_layer(spec, tensors, config):
    """One layer behind the last, as in DeepSeek-V3 and GLM-4.5."""
    at, last = "model.layers.3.", "model.layers.2."
    h = tensors["model.norm.weight"]
    another(tensors, last, at, 5)
    rng = torch.Generator().manual_seed(6)
    for name, shape in (("eh_proj.weight", (64, 128)), ("enorm.weight", (64,)), ("hnorm.weight", (64,)),
                        ("shared_head.norm.weight", (64,)), ("shared_head.head.weight", (320, 64)),
                        ("embed_tokens.weight", (320, 64))):
        tensors[at + name] = (torch.randn(shape, generator=rng) * 0.1).to(torch.bfloat16).to(h.dtype)
    config["num_nextn_predict_layers"] = 1


def make_mtp_prefix(spec, tensors, config):
    """One layer and its own norms under "mtp.", as in Qwen3-Next, Qwen3.5 and K-EXAONE."""
    norm = next(n for n in tensors if re.fullmatch(r"model\.(language_model\.)?norm\.weight", n))
    h = tensors[norm]
    another(tensors, norm.replace("norm.weight", "layers.2."), "mtp.layers.0.", 5)
    rng = torch.Generator().manual_seed(6)
    for name, shape in (("fc.weight", (64, 128)), ("norm.weight", (64,)), ("pre_fc_norm_embedding.weight", (64,)),
                        ("pre_fc_norm_hidden.weight", (64,))):
        tensors["mtp." + name] = (torch.randn(shape, generator=rng) * 0.1).to(torch.bfloat16).to(h.dtype)


def make_null_experts(spec, tensors, config):
    """AdaMoE: a Mixtral with router rows `gate2` that stand for no expert."""
    rng = torch.Generator().manual_seed(7)
    for name in [n for n in tensors if n.endswith("block_sparse_moe.gate.weight")]:
        rows = torch.randn(3, tensors[name].shape[1], generator=rng) * 0.3
        tensors[name.replace("gate.", "gate2.")] = rows.to(torch.bfloat16).to(tensors[name].dtype)
    config["num_null_experts"] = 3


def make_relu(spec, tensors, config):
    """ReMoE in Mixtral's names."""
    config["moe_relu_routing"] = True


TOP_P = [("block_sparse_moe.gate.", "mlp.router."), ("block_sparse_moe.experts.", "mlp.experts."), (".w1.", ".gate_proj."),
         (".w3.", ".up_proj."), (".w2.", ".down_proj.")]


def make_top_p(spec, tensors, config):
    """Dynamic-MoE: a Llama with experts in every other layer, as many for a token as it takes to reach top_p_threshold."""
    for name in list(tensors):
        new = name
        for a, b in TOP_P:
            new = new.replace(a, b)
        t = tensors.pop(name)
        if ".layers.1." in new and ".mlp." in new:
            if ".experts.0." not in new:
                continue
            new = new.replace("mlp.experts.0.", "mlp.mlp.")
        tensors[new] = t
    config.pop("num_local_experts")
    config.update(model_type="llama", architectures=["LlamaForCausalLM"], num_experts=8, experts_topk=2, expert_frequency=2,
                  top_p_threshold=0.6)
    config.pop("num_experts_per_tok")


TAIL = 4  # MoE++: two constants, a copy, nothing


def make_plus_plus(spec, tensors, config):
    """MoE++: gate and up of an expert in one tensor, behind the experts two constants, a copy and nothing, routers in one step
    or two that get the logits of the layer before, kept in float32."""
    rng = torch.Generator().manual_seed(8)

    def noise(scale, *shape):
        return (scale * torch.randn(*shape, generator=rng)).to(torch.bfloat16)
    experts, hidden, to = config.pop("num_local_experts"), config["hidden_size"], tensors["model.norm.weight"].dtype
    every = experts + TAIL
    for i in range(config["num_hidden_layers"]):
        old, new = f"model.layers.{i}.block_sparse_moe.", f"model.layers.{i}.mlp.moe."
        tensors.pop(old + "gate.weight")
        for e in range(experts):
            own = [tensors.pop(f"{old}experts.{e}.{w}.weight") for w in ("w1", "w3", "w2")]
            tensors[f"{new}experts.experts.{e}.up_proj.weight"] = torch.cat(own[:2])
            tensors[f"{new}experts.experts.{e}.down_proj.weight"] = own[2]
        for e in (experts, experts + 1):
            tensors[f"{new}experts.experts.{e}.constant"] = noise(0.7, hidden).to(to)
            tensors[f"{new}experts.experts.{e}.wg.weight"] = noise(0.2, 2, hidden).to(to)
        if config.get("moe_2layer_gate", True):
            tensors[new + "gate.wg.0.weight"] = noise(0.2, 8 * every, hidden).float()
            tensors[new + "gate.wg.2.weight"] = noise(0.25, every, 8 * every).float()
        else:
            tensors[new + "gate.wg.weight"] = noise(0.2, every, hidden).float()
        tensors[new + "gate.gate_map.weight"] = noise(0.25, every, every).to(to)
    for key in ("num_experts_per_tok", "sliding_window", "router_aux_loss_coef", "output_router_logits", "router_jitter_noise"):
        config.pop(key, None)
    config.update(model_type="MoE++", architectures=["MoeForCausalLM"], num_experts=[every])


def make_in_out(spec, tensors, config):
    """Joined experts transposed, as Qwen3-VL's releases have them; transformers tells by the shape."""
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        tensors[name] = tensors[name].transpose(1, 2)


MAKE = {"fp8": make_fp8, "in_out": make_in_out, "mxfp4": make_mxfp4, "mtp_layer": make_mtp_layer, "mtp_prefix": make_mtp_prefix,
        "null_experts": make_null_experts, "relu": make_relu, "top_p": make_top_p, "plus_plus": make_plus_plus}


def hub_dialect(c, spec):
    """Key names and places of the releases that transformers 4 wrote."""
    text = c.get("text_config", c)
    rope = dict(text.pop("rope_parameters", None) or {})
    if spec["config"] != "DbrxConfig":
        text["rope_theta"] = rope.pop("rope_theta")
        for key in ("partial_rotary_factor",):
            if key in rope:
                text[key] = rope.pop(key)
        kind = rope.pop("rope_type")
        text["rope_scaling"] = None if kind == "default" and not rope else {**rope, "type": kind}
        if kind == "default" and rope:
            text["rope_scaling"]["rope_type"] = kind
    for part in (c, text):
        if "dtype" in part:
            part["torch_dtype"] = part.pop("dtype")
    for old, new in spec["rename"].items():
        if old in text:
            text[new] = text.pop(old)
    for key in spec["drop"]:
        text.pop(key, None)
    text.update(spec["add"])
    return c


def minimal(c, cls):
    """config.json without the keys that the class has the same values for: what our side must have as defaults too."""
    whole = cls.from_dict(json.loads(json.dumps(c))).to_dict()
    for key in [k for k in c if k not in ("model_type", "architectures", "dtype", "torch_dtype", "quantization_config", "note")]:
        if isinstance(c[key], dict) and key in cls.sub_configs:
            if key == "text_config":
                c[key] = minimal(c[key], cls.sub_configs[key])
            continue
        less = {k: v for k, v in c.items() if k != key}
        try:
            if cls.from_dict(json.loads(json.dumps(less))).to_dict() == whole:
                c = less
        except Exception:  # the class cannot do without it, whatever it calls that
            pass
    return c


def write(spec, folder, dialect, seed=1):
    """The checkpoint as a release would hold it. Dialects: "5", transformers 5; "4", the releases; "min", the smallest that
    reads the same."""
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(seed)
    model = model_class(spec)(configure(spec)).float().eval()
    randomize(model, seed)
    model.save_pretrained(folder, **({"save_original_format": False} if spec["fused"] else {}))
    tensors = read_tensors(folder)
    if spec["dtype"] != "float32":
        to = getattr(torch, spec["dtype"])
        tensors = {k: v.to(to) if v.is_floating_point() and not re.search("_bias|A_log|statics", k) else v
                   for k, v in tensors.items()}
    path = os.path.join(folder, "config.json")
    with open(path, encoding="utf-8") as f:
        config = json.load(f)
    config["dtype"] = spec["dtype"]
    config["note"] = {"unknown": [1, 2.5, "kept"]}
    if dialect != "5" and spec["config"] != "DbrxConfig" or dialect == "4":
        config = hub_dialect(config, spec)
    if dialect == "min":
        config = minimal(config, getattr(transformers, spec["config"]))
    if spec["as_type"]:
        config["model_type"] = spec["as_type"]
    for what in (spec["make"] or "").split():
        MAKE[what](spec, tensors, config)
    write_tensors(folder, tensors)
    with open(path, "w", encoding="utf-8") as f:
        json.dump(config, f, indent=2)


# --- reading back ------------------------------------------------------------------------------------------------------

def dequantize(tensors, block):
    out = {}
    for name, t in tensors.items():
        if name.endswith(("_scale_inv", "_scales")):
            continue
        if name + "_scale_inv" in tensors:
            out[name] = t.float() * blocks_of(tensors[name + "_scale_inv"], t.shape, block)
        elif name.endswith("_blocks"):
            scale = 2.0 ** (tensors[name[:-6] + "scales"].float() - 127)
            values = torch.cat((E2M1, -E2M1))
            w = torch.stack((values[(t & 15).long()], values[(t >> 4).long()]), -1).flatten(-2) * scale[..., None]
            out[name[:-7]] = w.flatten(-2).transpose(1, 2)
        else:
            out[name] = t
    return out


def plain(spec, folder, out):
    """A copy that transformers loads without help: values multiplied out, its own model_type."""
    shutil.rmtree(out, ignore_errors=True)
    os.makedirs(out)
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
        config = json.load(f)
    quantized = config.pop("quantization_config", None) or {}
    if spec["as_type"]:
        config["model_type"] = getattr(transformers, spec["config"]).model_type
    write_tensors(out, dequantize(read_tensors(folder), quantized.get("weight_block_size")))
    with open(os.path.join(out, "config.json"), "w", encoding="utf-8") as f:
        json.dump(config, f)
    return out


def null_router(router, gate2):
    """AdaMoE: one softmax over experts and nulls; nulls take slots, and the weights of the experts are divided by their sum."""
    def forward(x):
        x = x.reshape(-1, x.shape[-1])
        n = router.weight.shape[0]
        logits = torch.cat((torch.nn.functional.linear(x, router.weight), x @ gate2.T), -1)
        weight, index = logits.softmax(-1).topk(router.top_k, -1)
        weight = weight * (index < n)
        weight = weight / weight.sum(-1, keepdim=True).clamp(min=1e-30)
        return logits, weight, torch.where(index < n, index, torch.zeros_like(index))
    return forward


def relu_router(router):
    """ReMoE: every expert with a positive logit, weighted by it."""
    def forward(x):
        x = x.reshape(-1, x.shape[-1])
        logits = torch.nn.functional.linear(x, router.weight)
        return logits, logits.relu(), torch.arange(logits.shape[1]).expand(logits.shape)
    return forward


def top_p_router(router, p):
    """Dynamic-MoE: the fewest experts whose probabilities exceed p together, weighted by these."""
    def forward(x):
        x = x.reshape(-1, x.shape[-1])
        logits = torch.nn.functional.linear(x, router.weight)
        weight, index = logits.softmax(-1).sort(-1, descending=True)
        before = weight.cumsum(-1) - weight
        return logits, torch.where(before <= p, weight, torch.zeros_like(weight)), index
    return forward


def load_top_p(folder):
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
        c = json.load(f)
    experts, p = c["num_experts"], c["top_p_threshold"]
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
            "rms_norm_eps", "max_position_embeddings", "head_dim")
    config = transformers.MixtralConfig(**{k: c[k] for k in keys if k in c}, num_local_experts=experts, num_experts_per_tok=2,
                                        rope_parameters=theta(c["rope_theta"]), sliding_window=None)
    model = transformers.MixtralForCausalLM(config)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    dense = transformers.LlamaConfig(hidden_size=c["hidden_size"], intermediate_size=c["intermediate_size"])
    tensors = {k: v.float() for k, v in read_tensors(folder).items()}
    for i, layer in enumerate(model.model.layers):
        at = f"model.layers.{i}.mlp."
        if i % c["expert_frequency"]:
            layer.mlp = transformers.models.llama.modeling_llama.LlamaMLP(dense)
            for part in ("gate_proj", "up_proj", "down_proj"):
                tensors[f"{at}{part}.weight"] = tensors.pop(f"{at}mlp.{part}.weight")
            continue
        tensors[at + "gate.weight"] = tensors.pop(at + "router.weight")
        own = [[tensors.pop(f"{at}experts.{e}.{part}.weight") for part in ("gate_proj", "up_proj", "down_proj")]
               for e in range(experts)]
        tensors[at + "experts.gate_up_proj"] = torch.stack([torch.cat(w[:2]) for w in own])
        tensors[at + "experts.down_proj"] = torch.stack([w[2] for w in own])
        layer.mlp.gate.forward = top_p_router(layer.mlp.gate, p)
    model.load_state_dict(tensors)
    return model.eval()


class PlusPlus(torch.nn.Module):
    """A layer of MoE++ as the paper and its released code define it, every expert on every token. Of experts outside `keep`
    the logit is neither compared nor carried to the next layer, which is what pruning promises."""

    def __init__(self, layer, tensors, config, carried):
        super().__init__()
        at = f"model.layers.{layer}.mlp.moe."
        self.layer, self.own, self.config, self.carried = layer, {}, config, carried
        for name in [n for n in tensors if n.startswith(at)]:
            self.own[name[len(at):]] = tensors.pop(name)
        self.experts = config["num_experts"][0] - TAIL
        self.log = self.keep = None

    def logits(self, x):
        w = self.own
        two = self.config.get("moe_2layer_gate", True)
        z = torch.tanh(x @ w["gate.wg.0.weight"].T) @ w["gate.wg.2.weight"].T if two else x @ w["gate.wg.weight"].T
        return z if self.layer == 0 else z + self.carried["z"] @ w["gate.gate_map.weight"].T

    def weights(self, z, stays):
        """[tokens, experts + TAIL], 0 where an expert is not chosen; and who is chosen."""
        if self.config.get("moe_use_logits_norm", False):
            z = z / (z[:, stays].std(1, keepdim=True) / self.config["moe_gate_norm_std"])
        z = z.masked_fill(~stays, float("-inf"))
        if self.config.get("moe_use_mixtral_gating", False):
            top, index = z.topk(2, -1)
            g = top.softmax(-1)
        else:
            g, index = z.softmax(-1).topk(2, -1)
            g = g * (index != z.shape[1] - 1)
            g = g / g.sum(-1, keepdim=True)
        return torch.zeros_like(z).scatter(1, index, g), index

    def output(self, e, x):
        w, at = self.own, f"experts.experts.{e}."
        if e < self.experts:
            gate, up = (x @ w[at + "up_proj.weight"].T).chunk(2, -1)
            return (torch.nn.functional.silu(gate) * up) @ w[at + "down_proj.weight"].T
        if e < self.experts + 2:
            a = (x @ w[at + "wg.weight"].T).softmax(-1)
            return a[:, :1] * x + a[:, 1:] * w[at + "constant"]
        return x if e == self.experts + 2 else torch.zeros_like(x)

    def forward(self, hidden):
        x = hidden.reshape(-1, hidden.shape[-1])
        z = self.logits(x)
        stays = torch.ones(z.shape[1], dtype=torch.bool)
        if self.keep is not None:
            stays[:self.experts] = False
            stays[self.keep] = True
        self.carried["z"] = torch.where(stays, z, torch.zeros_like(z))
        g, index = self.weights(z, stays)
        if self.log is not None:
            true = torch.where(index < self.experts, g.gather(1, index), torch.zeros_like(index, dtype=z.dtype))
            self.log.update({f"router_logits.{self.layer}": z, f"topk_index.{self.layer}": index,
                             f"topk_weight.{self.layer}": true})
        plain = self.config.get("moe_use_mixtral_gating", False) or self.config.get("moe_feature_no_mul_topk", False)
        x = x if plain else 2 * x
        return sum(g[:, e:e + 1] * self.output(e, x) for e in range(z.shape[1])).reshape(hidden.shape)


def load_plus_plus(folder):
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
        c = json.load(f)
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
            "rms_norm_eps", "max_position_embeddings", "head_dim", "tie_word_embeddings")
    config = transformers.MixtralConfig(**{k: c[k] for k in keys if k in c}, num_local_experts=2, num_experts_per_tok=2,
                                        rope_parameters=theta(c["rope_theta"]), sliding_window=None)
    model = transformers.MixtralForCausalLM(config)
    model.set_attn_implementation("eager")
    tensors, carried = {k: v.float() for k, v in read_tensors(folder).items()}, {}
    for i, layer in enumerate(model.model.layers):
        layer.mlp = PlusPlus(i, tensors, c, carried)
    if c.get("tie_word_embeddings"):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors)
    return model.eval()


def load(spec, folder, work):
    """The model in float32 with plain kernels. Raises ValueError when a tensor is missing, of another shape or unknown."""
    if spec["make"] == "top_p":
        return load_top_p(folder)
    if spec["make"] == "plus_plus":
        return load_plus_plus(folder)
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
        config = json.load(f)
    if "quantization_config" in config or spec["as_type"]:
        folder = plain(spec, folder, os.path.join(work, "plain"))
    nulls = {k: v.float() for k, v in read_tensors(folder).items() if ".gate2." in k} if spec["make"] == "null_experts" else {}
    model, info = model_class(spec).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager",
                                                    experts_implementation="eager", output_loading_info=True)
    unknown = [k for k in info["unexpected_keys"] if not (spec["mtp"] and re.match(spec["mtp"], k)) and ".gate2." not in k]
    # an indexer that picks as many keys as there are changes nothing, whatever its weights
    missing = [k for k in info["missing_keys"] if ".indexer." not in k]
    for what, keys in (("missing", missing), ("mismatched", info["mismatched_keys"]), ("unexpected", unknown)):
        if keys:
            raise ValueError(f"{folder}: {what}: {sorted(map(str, keys))[:5]}")
    for name, rows in nulls.items():
        router = model.model.layers[int(name.split(".")[2])].mlp.gate
        router.forward = null_router(router, rows)
    if spec["make"] == "relu":
        for layer in model.model.layers:
            layer.mlp.gate.forward = relu_router(layer.mlp.gate)
    return model.eval()


# --- what a model computes -----------------------------------------------------------------------------------------------

ROUTER = re.compile(r"\.(?:layers|blocks)\.(\d+)\.(?:.*\.)?(?:gate|router|router\.gate|router\.layer|gate\.wg)\.weight$")


def routers(model, heads=False):
    """{layer: (name, weight)} of the MoE layers, or of the attention experts."""
    found = {}
    for name, p in model.named_parameters():
        m = ROUTER.search(name)
        if m and ("self_attention" in name) == heads:
            found[int(m[1])] = (name, p)
    return found


def own_layers(model):
    return [m for m in model.modules() if isinstance(m, PlusPlus)]


def expert_count(model):
    for m in own_layers(model):
        return m.experts
    return next(iter(routers(model).values()))[1].shape[0]


@contextlib.contextmanager
def seen(model, keep=None, keep_heads=None):
    """Within it, `log` receives what every router says; experts outside keep[layer] cannot be chosen."""
    log = {}
    by_id, mask = {}, {}
    saved = []
    for kept, heads in ((keep, False), (keep_heads, True)):
        for layer, (name, w) in routers(model, heads).items():
            if not heads:
                by_id[id(w)] = layer
            if kept is not None:
                out = torch.full((w.shape[0],), float("-inf"))
                out[kept[layer]] = 0.0
                mask[id(w)] = out
    if keep is not None:
        for name, t in model.state_dict().items():
            m = re.search(r"\.layers\.(\d+)\..*(correction_bias|expert_bias)$", name)
            if m:
                saved.append((t, t.clone()))
                gone = torch.ones(t.shape[-1], dtype=torch.bool)
                gone[keep[int(m[1])]] = False
                t[..., gone] = float("-inf")
    for m in own_layers(model):
        m.log, m.keep = log, keep and keep[m.layer]
    usual = torch.nn.functional.linear

    def linear(x, w, b=None):
        y = usual(x, w, b)
        if id(w) in mask:
            y = y + mask[id(w)]
        if id(w) in by_id:
            log[f"router_logits.{by_id[id(w)]}"] = y.reshape(-1, y.shape[-1])
        return y

    def chosen(layer):
        def hook(module, args, kwargs):
            got = [a for a in (*args, *kwargs.values()) if torch.is_tensor(a)]
            index = [a for a in got if not a.is_floating_point()]
            if index:
                weight = [a for a in got[1:] if a.is_floating_point()][0]
                log[f"topk_index.{layer}"] = index[0].reshape(-1, index[0].shape[-1])
                log[f"topk_weight.{layer}"] = weight.reshape(-1, weight.shape[-1])
        return hook
    handles = []
    for name, module in model.named_modules():
        m = re.search(r"\.(?:layers|blocks)\.(\d+)\.[\w.]*experts$", name)
        if m and "self_attention" not in name and "shared" not in name:
            handles.append(module.register_forward_pre_hook(chosen(int(m[1])), with_kwargs=True))
    torch.nn.functional.linear = linear
    try:
        yield log
    finally:
        torch.nn.functional.linear = usual
        for h in handles:
            h.remove()
        for m in own_layers(model):
            m.log = m.keep = None
        for t, old in saved:
            t.copy_(old)


@torch.no_grad()
def observe(spec, model, windows, keep=None, keep_heads=None):
    """logits [T,V] and, for every MoE layer L, router_logits.L [T,E] and chosen.L, a list of T sets."""
    parts = [None] * len(windows)
    top_k = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    with seen(model, keep, keep_heads) as log:
        # Shortest first: dynamic scaling keeps the frequencies of the longest window so far.
        for w in sorted(range(len(windows)), key=lambda i: len(windows[i])):
            log.clear()
            logits = model(input_ids=torch.tensor([windows[w]]), use_cache=False).logits[0]
            parts[w] = {"logits": logits, **{k: v.clone() for k, v in log.items()}}
    out = {"logits": torch.cat([p["logits"] for p in parts])}
    for key in [k for k in parts[0] if k.startswith("router_logits")]:
        layer = key.split(".")[1]
        out[key] = torch.cat([p[key] for p in parts])
        rows = []
        for p in parts:
            index, weight = p.get(f"topk_index.{layer}"), p.get(f"topk_weight.{layer}")
            if index is None:
                index = p[key].topk(top_k, -1).indices
            for t in range(len(index)):
                rows.append({int(e) for j, e in enumerate(index[t]) if weight is None or float(weight[t, j]) != 0})
        out[f"chosen.{layer}"] = rows
    return out


def seed_of(spec):
    """The same whatever else is in the table."""
    return zlib.crc32(spec["name"].encode()) % 10000


def windows_of(seed, lengths=(9, 70, 2, 33, 57), vocab=316):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab, (n,), generator=rng).tolist() for n in lengths]


def run_rows(rows, a, folder, run_row):
    """run_row(a, spec, seed, work) for every row whose name contains a.only, each in an emptied folder below a.keep or `folder`.
    Prints how many were as expected and returns an exit code: 0 when all were, and there was one."""
    good = bad = 0
    for spec in rows:
        if a.only and a.only not in spec["name"]:
            continue
        work = os.path.join(a.keep or folder, spec["name"])
        shutil.rmtree(work, ignore_errors=True)
        os.makedirs(work)
        if run_row(a, spec, seed_of(spec), work):
            good += 1
        else:
            bad += 1
    print(f"{good} families as expected, {bad} not")
    return 1 if bad or not good else 0
