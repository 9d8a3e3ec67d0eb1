/* Qwen3.5 and 3.6 MoE, their text model: as Qwen3-Next with flat projections of the delta net, every layer with a router,
 * weights always divided by their sum, experts joined on the hub. */
#include "model/family_names.h"

const moec_family moec_family_qwen3_5_moe = {
    .model_type = "qwen3_5_moe_text",
    .alias = {"qwen3_5_moe"},
    .architecture = "Qwen3_5MoeForCausalLM",
    .source = "transformers 5.23 modeling_qwen3_5_moe",
    .models = "Qwen3.5-MoE, Qwen3.6-MoE",
    MOEC_NAMES_ENDS,
    .mat = {MOEC_NAMES_QWEN3_NEXT, [MOEC_MAT_DELTA_QKV] = P "linear_attn.in_proj_qkv.weight",
            [MOEC_MAT_DELTA_Z] = P "linear_attn.in_proj_z.weight", [MOEC_MAT_DELTA_B] = P "linear_attn.in_proj_b.weight",
            [MOEC_MAT_DELTA_A] = P "linear_attn.in_proj_a.weight"},
    MOEC_RULES_QWEN3_NEXT,
    .default_experts = 256,
    .default_top_k = 8,
    .renorm = MOEC_RENORM_ALWAYS,
    .loads_transformers = true,
    .loads_gptq = true,
    .loads_compressed = true,
    .loads_vllm = true,
    .loads_sglang = true,
    .loads_llama_cpp = true,
};
