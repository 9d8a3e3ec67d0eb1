/* OLMoE: q/k norms over the whole projection, q, k and v cut at clip_qkv; softmax routing, weights not divided by their
 * sum; every layer has a router. */
#include "model/family_names.h"

const moec_family moec_family_olmoe = {
    .model_type = "olmoe",
    .architecture = "OlmoeForCausalLM",
    .source = "OLMoE, arXiv:2409.02060; transformers 5.23 modeling_olmoe",
    .models = "OLMoE-1B-7B",
    .key_experts = {"num_experts", "num_local_experts"},
    .key_top_k = {"num_experts_per_tok"},
    .key_expert_width = {"intermediate_size"},
    .default_experts = 64,
    .default_top_k = 8,
    MOEC_NAMES_ENDS,
    .mat = {MOEC_NAMES_QKVO, [MOEC_MAT_ROUTER] = P "mlp.gate.weight"},
    .vec = {MOEC_NAMES_NORMS, MOEC_NAMES_QK_NORMS},
    .experts = {MOEC_EXPERTS_SPLIT("mlp."), MOEC_EXPERTS_JOINED("mlp.")},
    .default_rope_theta = 10000.0,
    .default_norm_eps = 1e-5,
    .renorm = MOEC_RENORM_KEY,
    .loads_transformers = true,
    .loads_gptq = true,
    .loads_compressed = true,
    .loads_vllm = true,
    .loads_sglang = true,
    .loads_llama_cpp = true,
    .gguf = {.arch = "olmoe", .equal_heads = true, .config = "{\"attention_bias\": false, \"clip_qkv\": null}"},
};
