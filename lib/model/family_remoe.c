/* ReMoE: every expert whose router logit is above 0 is used, with the logit as its weight; no softmax, no top-k. Its
 * checkpoints are Megatron's; this is their llama-like Hugging Face form with Mixtral's names, told by Megatron's
 * option for it. */
#include "model/family_names.h"

const moec_family moec_family_remoe = {
    .model_type = "remoe",
    .detect = "moe_relu_routing",
    .architecture = "MixtralForCausalLM",
    .source = "ReMoE, arXiv:2412.14711; its released code (ReLU of the router's logits)",
    .models = "ReMoE (none released)",
    .key_experts = {"num_local_experts", "num_experts"},
    .key_top_k = {"num_experts_per_tok"},
    .key_expert_width = {"intermediate_size"},
    .default_top_k = 1,
    MOEC_NAMES_ENDS,
    .mat = {MOEC_NAMES_QKVO, [MOEC_MAT_ROUTER] = P "block_sparse_moe.gate.weight|" P "mlp.gate.weight"},
    .vec = {MOEC_NAMES_NORMS},
    .experts = {MOEC_EXPERTS_W123("block_sparse_moe."), MOEC_EXPERTS_SPLIT("mlp.")},
    .default_rope_theta = 10000.0,
    .default_norm_eps = 1e-5,
    .score = MOEC_SCORE_RELU,
    .choice = MOEC_CHOOSE_POSITIVE,
    .renorm = MOEC_RENORM_NEVER,
    .window = MOEC_WINDOW_ALL,
    .remote_code = true,
};
