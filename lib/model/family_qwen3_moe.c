/* Qwen3-MoE (30B-A3B, 235B-A22B, Coder): grouped-query attention with an RMS norm per head on q and k; softmax over all
 * experts, then top-k; the kept weights are divided by their sum when norm_topk_prob is set; no shared expert. */
#include "model/family_names.h"

const moec_family moec_family_qwen3_moe = {
    .model_type = "qwen3_moe",
    .architecture = "Qwen3MoeForCausalLM",
    .source = "Qwen3 Technical Report, arXiv:2505.09388; transformers 5.23 modeling_qwen3_moe",
    .models = "Qwen3-30B-A3B, 235B-A22B, Coder",
    /* transformers 5 writes num_local_experts where every hub release has num_experts */
    .key_experts = {"num_experts", "num_local_experts"},
    .key_top_k = {"num_experts_per_tok"},
    .key_expert_width = {"moe_intermediate_size"},
    .key_dense_width = "intermediate_size",
    .default_experts = 128,
    .default_top_k = 8,
    MOEC_NAMES_ENDS,
    .mat = {MOEC_NAMES_QKVO, MOEC_NAMES_DENSE, [MOEC_MAT_ROUTER] = P "mlp.gate.weight"},
    .vec = {MOEC_NAMES_NORMS, MOEC_NAMES_QK_NORMS},
    .experts = {MOEC_EXPERTS_SPLIT("mlp."), MOEC_EXPERTS_JOINED("mlp.")},
    .default_kv_heads = 4,
    .default_window = 4096,
    .default_rope_theta = 10000.0,
    .default_norm_eps = 1e-6,
    .renorm = MOEC_RENORM_KEY,
    .dense = MOEC_DENSE_MLP_ONLY,
    .window = MOEC_WINDOW_IF_USED,
    .loads_transformers = true,
    .loads_gptq = true,
    .loads_compressed = true,
    .loads_vllm = true,
    .loads_sglang = true,
    .loads_llama_cpp = true,
    .gguf = {.arch = "qwen3moe", .renorm = MOEC_GGUF_RENORM_ALWAYS, .expert_width = true,
             .config = MOEC_GGUF_QWEN, .key_bias = "attention_bias"},
};
