#!/usr/bin/env python3
"""Writes a random checkpoint of any size with numpy alone, tensor by tensor, and token ids to run it on.

    python tests/bench/make_model.py OUT [--preset moe1024|big4g|deepseek-layer|deepseek-small] [--hidden N] [--layers N]
           [--experts N] [--top-k N] [--width N] [--heads N] [--kv-heads N] [--head-dim N] [--vocab N]
           [--dtype bf16|f16|f32] [--seed N] [--windows N] [--seq-len N]

moe1024 and big4g are Qwen3-MoE. deepseek-layer is one layer of DeepSeek-V3 as it is published, FP8 with 128x128 block
scales (11.7 GB), deepseek-small one with the same parts and an eighth of the experts' number and of the widths (60 MB);
there --kv-heads, --head-dim and --dtype say nothing. One tensor is in memory at a time. Options given beside a preset
replace its numbers. OUT/windows.ids holds --windows lines of --seq-len uniformly random ids.
"""
import argparse
import json
import os

import numpy as np

PRESETS = {
    "moe1024": dict(hidden=1024, layers=8, experts=32, top_k=4, width=512, heads=16, kv_heads=4, head_dim=64, vocab=4096),
    # 4.3 GB in bf16, a layer of 107 MB: many layers, so that one layer is a small part of the whole
    "big4g": dict(hidden=1024, layers=40, experts=32, top_k=4, width=512, heads=16, kv_heads=4, head_dim=64, vocab=8192),
    # one layer of Qwen3-30B-A3B
    "qwen3-30b-layer": dict(hidden=2048, layers=1, experts=128, top_k=8, width=768, heads=32, kv_heads=4, head_dim=128, vocab=4096),
    "deepseek-layer": dict(hidden=7168, layers=1, experts=256, top_k=8, width=2048, heads=128, kv_heads=128, head_dim=192,
                           vocab=8192),
    "deepseek-small": dict(hidden=896, layers=1, experts=32, top_k=8, width=256, heads=16, kv_heads=16, head_dim=192,
                           vocab=8192),
}
LATENT = {"deepseek-layer": dict(q_rank=1536, kv_rank=512), "deepseek-small": dict(q_rank=192, kv_rank=64)}
NOPE, ROPE, VALUE, BLOCK = 128, 64, 128, 128
SHARD = 4 << 30
TYPES = {"bf16": ("BF16", 2, "bfloat16"), "f16": ("F16", 2, "float16"), "f32": ("F32", 4, "float32")}


def encode(x, dtype):
    """Bytes of float32 values in the file's format; bf16 by rounding to nearest, ties to even."""
    if dtype == "f32":
        return x.astype("<f4")
    if dtype == "f16":
        return x.astype("<f2")
    bits = x.astype("<f4").view("<u4")
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")


def e4m3(n, rng):
    """n random bytes, all codes of e4m3 alike but for its two NaN, and what to multiply the values with for a spread of 1."""
    bits = np.frombuffer(rng.bytes(n), np.uint8).copy()
    bits -= (bits & 0x7F) == 0x7F
    code = np.arange(127)
    exponent, rest = code >> 3, (code & 7) / 8
    values = np.where(exponent > 0, np.ldexp(1 + rest, np.maximum(exponent, 1) - 7), np.ldexp(rest, -6))
    return bits, 1 / float(np.sqrt(np.mean(values ** 2)))


def fp8_tensors(key, shape, spread):
    """A matrix as DeepSeek-V3 has it: e4m3 bytes and one float32 scale for each block of 128 rows and columns."""
    blocks = tuple(-(-n // BLOCK) for n in shape)
    return [(key, shape, spread, "fp8"), (key + "_scale_inv", blocks, spread, "scale")]


def kind_of(tensor, dtype):
    """Name and bytes of a value in the file."""
    kind = tensor[3] if len(tensor) > 3 else dtype
    return {"fp8": ("F8_E4M3", 1), "scale": ("F32", 4)}.get(kind) or TYPES[kind][:2]


def values_of(tensor, dtype, rng):
    _, shape, spread, kind = tensor if len(tensor) > 3 else (*tensor, dtype)
    if kind == "fp8":
        return e4m3(int(np.prod(shape)), rng)[0]
    if kind == "scale": # blocks differ, by up to a third to either side
        return (spread * e4m3(0, rng)[1] * rng.uniform(2 / 3, 4 / 3, shape)).astype("<f4")
    x = rng.standard_normal(shape, dtype=np.float32)
    return encode(1.0 + 0.1 * x if spread is None else spread * x, kind)


def write_shard(path, tensors, dtype, rng):
    """tensors: (name, shape, spread) or (name, shape, spread, kind); spread None: a norm's weight, near 1."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for tensor in tensors:
        name, size = kind_of(tensor, dtype)
        n = int(np.prod(tensor[1])) * size
        header[tensor[0]] = {"dtype": name, "shape": list(tensor[1]), "data_offsets": [at, at + n]}
        at += n
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            values_of(tensor, dtype, rng).tofile(f)
    return at


def layer_tensors(a, layer):
    p, h, q, kv = f"model.layers.{layer}.", a.hidden, a.heads * a.head_dim, a.kv_heads * a.head_dim
    at = [(p + "input_layernorm.weight", (h,), None), (p + "post_attention_layernorm.weight", (h,), None),
          (p + "self_attn.q_proj.weight", (q, h), h ** -0.5), (p + "self_attn.k_proj.weight", (kv, h), h ** -0.5),
          (p + "self_attn.v_proj.weight", (kv, h), h ** -0.5), (p + "self_attn.o_proj.weight", (h, q), 0.3 * q ** -0.5),
          (p + "self_attn.q_norm.weight", (a.head_dim,), None), (p + "self_attn.k_norm.weight", (a.head_dim,), None),
          (p + "mlp.gate.weight", (a.experts, h), h ** -0.5)]
    for e in range(a.experts):
        x = f"{p}mlp.experts.{e}."
        at += [(x + "gate_proj.weight", (a.width, h), h ** -0.5), (x + "up_proj.weight", (a.width, h), h ** -0.5),
               (x + "down_proj.weight", (h, a.width), 0.5 * a.width ** -0.5)]
    return at


def config(a):
    return {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": a.hidden,
            "num_hidden_layers": a.layers, "num_attention_heads": a.heads, "num_key_value_heads": a.kv_heads,
            "head_dim": a.head_dim, "num_experts": a.experts, "num_experts_per_tok": a.top_k,
            "moe_intermediate_size": a.width, "intermediate_size": 4 * a.width, "vocab_size": a.vocab,
            "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "tie_word_embeddings": False,
            "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_scaling": None, "attention_bias": False,
            "attention_dropout": 0.0, "max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": None,
            "initializer_range": 0.02, "bos_token_id": 0, "eos_token_id": 0, "torch_dtype": TYPES[a.dtype][2]}


def mlp_tensors(x, hidden, width, spread):
    return (fp8_tensors(x + "gate_proj.weight", (width, hidden), spread) +
            fp8_tensors(x + "up_proj.weight", (width, hidden), spread) +
            fp8_tensors(x + "down_proj.weight", (hidden, width), spread))


def deepseek_tensors(a, layer, spread=0.02):
    """Names and shapes of deepseek-ai/DeepSeek-V3."""
    p, h = f"model.layers.{layer}.", a.hidden
    at = [(p + "input_layernorm.weight", (h,), None), (p + "post_attention_layernorm.weight", (h,), None),
          (p + "self_attn.q_a_layernorm.weight", (a.q_rank,), None),
          (p + "self_attn.kv_a_layernorm.weight", (a.kv_rank,), None),
          (p + "mlp.gate.weight", (a.experts, h), spread), (p + "mlp.gate.e_score_correction_bias", (a.experts,), 0.01, "f32")]
    at += fp8_tensors(p + "self_attn.q_a_proj.weight", (a.q_rank, h), spread)
    at += fp8_tensors(p + "self_attn.q_b_proj.weight", (a.heads * (NOPE + ROPE), a.q_rank), spread)
    at += fp8_tensors(p + "self_attn.kv_a_proj_with_mqa.weight", (a.kv_rank + ROPE, h), spread)
    at += fp8_tensors(p + "self_attn.kv_b_proj.weight", (a.heads * (NOPE + VALUE), a.kv_rank), spread)
    at += fp8_tensors(p + "self_attn.o_proj.weight", (h, a.heads * VALUE), spread)
    at += mlp_tensors(p + "mlp.shared_experts.", h, a.width, spread)
    for e in range(a.experts):
        at += mlp_tensors(f"{p}mlp.experts.{e}.", h, a.width, spread)
    return at


def deepseek_config(a):
    return {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": a.hidden,
            "num_hidden_layers": a.layers, "num_attention_heads": a.heads, "num_key_value_heads": a.heads,
            "q_lora_rank": a.q_rank, "kv_lora_rank": a.kv_rank, "qk_nope_head_dim": NOPE, "qk_rope_head_dim": ROPE,
            "v_head_dim": VALUE, "n_routed_experts": a.experts, "num_experts_per_tok": a.top_k, "n_shared_experts": 1,
            "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True,
            "routed_scaling_factor": 2.5, "first_k_dense_replace": 0, "moe_layer_freq": 1, "moe_intermediate_size": a.width,
            "intermediate_size": 9 * a.width, "num_nextn_predict_layers": 0, "vocab_size": a.vocab,
            "tie_word_embeddings": False, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
            "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
                             "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
            "attention_bias": False, "attention_dropout": 0.0, "max_position_embeddings": 163840, "initializer_range": 0.02,
            "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "bfloat16",
            "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                                    "weight_block_size": [BLOCK, BLOCK]}}


def in_shards(tensors, dtype):
    """Consecutive tensors of up to SHARD bytes together."""
    shards, room = [], 0
    for tensor in tensors:
        n = int(np.prod(tensor[1])) * kind_of(tensor, dtype)[1]
        if n > room:
            shards.append([])
            room = SHARD
        shards[-1].append(tensor)
        room -= n
    return shards


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("out")
    ap.add_argument("--preset", choices=PRESETS, default="moe1024")
    for name in PRESETS["moe1024"]:
        ap.add_argument("--" + name.replace("_", "-"), type=int)
    ap.add_argument("--dtype", choices=TYPES, default="bf16")
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--windows", type=int, default=64)
    ap.add_argument("--seq-len", type=int, default=512)
    a = ap.parse_args()
    for name, value in PRESETS[a.preset].items():
        if getattr(a, name) is None:
            setattr(a, name, value)
    latent = LATENT.get(a.preset)
    for name, value in (latent or {}).items():
        setattr(a, name, value)
    if latent:
        a.dtype = "bf16"
    layer_of = deepseek_tensors if latent else layer_tensors
    os.makedirs(a.out, exist_ok=True)
    rng = np.random.default_rng(a.seed)
    shards = [[("model.embed_tokens.weight", (a.vocab, a.hidden), 1.0)]]
    for i in range(a.layers):
        shards += in_shards(layer_of(a, i), a.dtype)
    shards.append([("model.norm.weight", (a.hidden,), None), ("lm_head.weight", (a.vocab, a.hidden), a.hidden ** -0.5)])
    where, total = {}, 0
    for i, tensors in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        total += write_shard(os.path.join(a.out, name), tensors, a.dtype, rng)
        where.update({tensor[0]: name for tensor in tensors})
    with open(os.path.join(a.out, "model.safetensors.index.json"), "w", encoding="utf-8") as f:
        json.dump({"metadata": {"total_size": total}, "weight_map": where}, f, indent=1)
    with open(os.path.join(a.out, "config.json"), "w", encoding="utf-8") as f:
        json.dump((deepseek_config if latent else config)(a), f, indent=1)
    with open(os.path.join(a.out, "windows.ids"), "w", encoding="ascii") as f:
        for _ in range(a.windows):
            f.write(" ".join(map(str, rng.integers(0, a.vocab, a.seq_len))) + "\n")
    print(f"{a.out}: {total / 1e9:.2f} GB, {len(shards)} shards, {a.windows} windows of {a.seq_len}")


if __name__ == "__main__":
    main()
