/* DBRX: q, k and v in one matrix and cut at clip_qkv, LayerNorm without bias; softmax routing, weights divided by their sum;
 * experts flat, the down projection transposed. rope_theta is that of attn_config, where the releases have it;
 * transformers 5.23 looks for it at the top level only and takes 10000. */
#include "model/family_names.h"

#define B "transformer.blocks.%d."

const moec_family moec_family_dbrx = {
    .model_type = "dbrx",
    .architecture = "DbrxForCausalLM",
    .source = "transformers 5.23 modeling_dbrx",
    .models = "DBRX",
    .key_experts = {"ffn_config.moe_num_experts"},
    .key_top_k = {"ffn_config.moe_top_k"},
    .key_expert_width = {"ffn_config.ffn_hidden_size"},
    .key_renorm = "ffn_config.moe_normalize_expert_weights",
    .default_experts = 4,
    .default_top_k = 1,
    .embed = "transformer.wte.weight",
    .final_norm = "transformer.norm_f.weight",
    .head = "lm_head.weight",
    .qkv = B "norm_attn_norm.attn.Wqkv.weight",
    .mat = {[MOEC_MAT_O] = B "norm_attn_norm.attn.out_proj.weight", [MOEC_MAT_ROUTER] = B "ffn.router.layer.weight"},
    .vec = {[MOEC_VEC_NORM_ATTN] = B "norm_attn_norm.norm_1.weight", [MOEC_VEC_NORM_MLP] = B "norm_attn_norm.norm_2.weight"},
    .experts = {{.layout = MOEC_LAYOUT_FLAT, .gate = B "ffn.experts.mlp.w1", .up = B "ffn.experts.mlp.v1",
                 .down = B "ffn.experts.mlp.w2"}},
    .default_kv_heads = 1,
    .default_rope_theta = 10000.0,
    .default_norm_eps = 1e-5,
    .norm = MOEC_NORM_LAYER,
    .renorm = MOEC_RENORM_KEY,
    .default_renorm = true,
    .loads_transformers = true,
    .loads_vllm = true,
    .loads_sglang = true,
    .loads_llama_cpp = true,
};
