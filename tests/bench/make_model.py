#!/usr/bin/env python3
"""Writes a random Qwen3-MoE checkpoint of any size with numpy alone, shard by shard, and token ids to run it on.

    python tests/bench/make_model.py OUT [--preset moe1024|big4g] [--hidden N] [--layers N] [--experts N] [--top-k N]
           [--width N] [--heads N] [--kv-heads N] [--head-dim N] [--vocab N] [--dtype bf16|f16|f32] [--seed N]
           [--windows N] [--seq-len N]

One shard for each layer is in memory at a time. Options given beside a preset replace its numbers. OUT/windows.ids holds
--windows lines of --seq-len uniformly random ids.
"""
import argparse
import json
import os

import numpy as np

PRESETS = {
    "moe1024": dict(hidden=1024, layers=8, experts=32, top_k=4, width=512, heads=16, kv_heads=4, head_dim=64, vocab=4096),
    # 4.3 GB in bf16, a layer of 107 MB: many layers, so that one layer is a small part of the whole
    "big4g": dict(hidden=1024, layers=40, experts=32, top_k=4, width=512, heads=16, kv_heads=4, head_dim=64, vocab=8192),
}
TYPES = {"bf16": ("BF16", 2, "bfloat16"), "f16": ("F16", 2, "float16"), "f32": ("F32", 4, "float32")}


def encode(x, dtype):
    """Bytes of float32 values in the file's format; bf16 by rounding to nearest, ties to even."""
    if dtype == "f32":
        return x.astype("<f4")
    if dtype == "f16":
        return x.astype("<f2")
    bits = x.astype("<f4").view("<u4")
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")


def write_shard(path, tensors, dtype, rng):
    """tensors: (name, shape, spread); spread None: a norm's weight, near 1."""
    name, size, _ = TYPES[dtype]
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for key, shape, _ in tensors:
        n = int(np.prod(shape)) * size
        header[key] = {"dtype": name, "shape": list(shape), "data_offsets": [at, at + n]}
        at += n
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for _, shape, spread in tensors:
            x = rng.standard_normal(shape, dtype=np.float32)
            encode(1.0 + 0.1 * x if spread is None else spread * x, dtype).tofile(f)
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
    os.makedirs(a.out, exist_ok=True)
    rng = np.random.default_rng(a.seed)
    shards = [[("model.embed_tokens.weight", (a.vocab, a.hidden), 1.0)]]
    shards += [layer_tensors(a, i) for i in range(a.layers)]
    shards.append([("model.norm.weight", (a.hidden,), None), ("lm_head.weight", (a.vocab, a.hidden), a.hidden ** -0.5)])
    where, total = {}, 0
    for i, tensors in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        total += write_shard(os.path.join(a.out, name), tensors, a.dtype, rng)
        where.update({key: name for key, _, _ in tensors})
    with open(os.path.join(a.out, "model.safetensors.index.json"), "w", encoding="utf-8") as f:
        json.dump({"metadata": {"total_size": total}, "weight_map": where}, f, indent=1)
    with open(os.path.join(a.out, "config.json"), "w", encoding="utf-8") as f:
        json.dump(config(a), f, indent=1)
    with open(os.path.join(a.out, "windows.ids"), "w", encoding="ascii") as f:
        for _ in range(a.windows):
            f.write(" ".join(map(str, rng.integers(0, a.vocab, a.seq_len))) + "\n")
    print(f"{a.out}: {total / 1e9:.2f} GB, {len(shards)} shards, {a.windows} windows of {a.seq_len}")


if __name__ == "__main__":
    main()
