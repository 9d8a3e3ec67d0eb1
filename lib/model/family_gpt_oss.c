/* gpt-oss (20b, 120b): attention sinks, every other layer sliding, biases everywhere; the k largest router logits, softmax
 * over these; experts with a clamped gate, joined, gate and up interleaved; released in MXFP4 (blocks and scales). */
#include "model/family_names.h"

const moec_family moec_family_gpt_oss = {
    .model_type = "gpt_oss",
    .architecture = "GptOssForCausalLM",
    .source = "gpt-oss model card, arXiv:2508.10925; transformers 5.23 modeling_gpt_oss",
    .models = "gpt-oss-20b, 120b",
    .key_experts = {"num_local_experts", "num_experts"},
    .key_top_k = {"num_experts_per_tok", "experts_per_token"},
    .key_expert_width = {"intermediate_size"},
    .default_experts = 128,
    .default_top_k = 4,
    MOEC_NAMES_ENDS,
    .mat = {MOEC_NAMES_QKVO, [MOEC_MAT_ROUTER] = P "mlp.router.weight"},
    .vec = {MOEC_NAMES_NORMS, [MOEC_VEC_SINKS] = P "self_attn.sinks"},
    .experts = {{.layout = MOEC_LAYOUT_MXFP4_PAIRS, .gate = P "mlp.experts.gate_up_proj_blocks",
                 .down = P "mlp.experts.down_proj_blocks", .gate_bias = P "mlp.experts.gate_up_proj_bias",
                 .down_bias = P "mlp.experts.down_proj_bias"},
                {.layout = MOEC_LAYOUT_IN_OUT_PAIRS, .gate = P "mlp.experts.gate_up_proj", .down = P "mlp.experts.down_proj",
                 .gate_bias = P "mlp.experts.gate_up_proj_bias", .down_bias = P "mlp.experts.down_proj_bias"}},
    .default_rope_theta = 150000.0,
    .default_rope = "{\"rope_scaling\": {\"rope_type\": \"yarn\", \"factor\": 32.0, \"beta_fast\": 32.0, \"beta_slow\": 1.0, "
                    "\"truncate\": false, \"original_max_position_embeddings\": 4096}, \"rope_theta\": 150000.0}",
    .default_norm_eps = 1e-5,
    .choice = MOEC_CHOOSE_TOP_K_SOFTMAX,
    .renorm = MOEC_RENORM_NEVER,
    .activation = MOEC_ACT_SWIGLU_CLAMPED,
    .window = MOEC_WINDOW_TYPES,
    .types = MOEC_TYPES_FULL_EVERY,
    .full_every = 2,
    .loads_transformers = true,
    .loads_vllm = true,
    .loads_sglang = true,
    .loads_llama_cpp = true,
};
