/* Mixtral (8x7B, 8x22B): grouped-query attention, optionally sliding; softmax over all experts, top-k, always divided by
 * the sum of the kept weights; every layer has a router; w1 is gate, w3 up, w2 down. */
#include "model/family_names.h"

const moec_family moec_family_mixtral = {
    .model_type = "mixtral",
    .architecture = "MixtralForCausalLM",
    .source = "Mixtral of Experts, arXiv:2401.04088; transformers 5.23 modeling_mixtral",
    .models = "Mixtral 8x7B, 8x22B",
    .key_experts = {"num_local_experts"},
    .key_top_k = {"num_experts_per_tok"},
    .key_expert_width = {"intermediate_size"},
    .default_experts = 8,
    .default_top_k = 2,
    MOEC_NAMES_ENDS,
    .mat = {MOEC_NAMES_QKVO, [MOEC_MAT_ROUTER] = P "block_sparse_moe.gate.weight|" P "mlp.gate.weight"},
    .vec = {MOEC_NAMES_NORMS},
    .experts = {MOEC_EXPERTS_W123("block_sparse_moe."), MOEC_EXPERTS_JOINED("mlp."),
                MOEC_EXPERTS_SPLIT("mlp.") /* as transformers 5 calls them */},
    .default_kv_heads = 8,
    .default_rope_theta = 1e6,
    .default_norm_eps = 1e-5,
    .renorm = MOEC_RENORM_ALWAYS,
    .window = MOEC_WINDOW_ALL,
    .loads_transformers = true,
    .loads_gptq = true,
    .loads_compressed = true,
    .loads_vllm = true,
    .loads_sglang = true,
    .loads_llama_cpp = true,
    .gguf = {.arch = "llama", .renorm = MOEC_GGUF_RENORM_ALWAYS, .permute = true,
             .config = "{\"sliding_window\": null}"},
};
