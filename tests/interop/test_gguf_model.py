"""Whole models as GGUF: every tensor against the checkpoint's own, brought over by numpy under the names that the gguf package maps,
keys against transformers' config, the tokenizer against tokenizer.json, logits where transformers loads the architecture.

    python tests/interop/test_gguf_model.py --build BUILD_DIR

Exit 0: nothing differs.
"""
import argparse
import glob
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile

import gguf
import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

import checks
from checks import check

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

COMMON = dict(vocab_size=96, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
              max_position_embeddings=512, num_experts_per_tok=2, tie_word_embeddings=False)
LATENT = dict(num_key_value_heads=4, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12, q_lora_rank=24,
              n_routed_experts=6, n_shared_experts=2, moe_intermediate_size=32, intermediate_size=96, first_k_dense_replace=1)
# config class, its settings, GGUF architecture, keys that the GGUF must have (without the architecture)
MODELS = {
    "qwen3_moe": ("Qwen3MoeConfig", dict(num_experts=6, moe_intermediate_size=32, intermediate_size=96, head_dim=16,
                                         norm_topk_prob=True, decoder_sparse_step=1),
                  "qwen3moe", {"expert_count": 6, "expert_feed_forward_length": 32, "attention.key_length": 16}),
    "qwen2_moe": ("Qwen2MoeConfig", dict(num_experts=6, moe_intermediate_size=32, intermediate_size=96, norm_topk_prob=False,
                                         shared_expert_intermediate_size=48, decoder_sparse_step=1),
                  "qwen2moe", {"expert_shared_feed_forward_length": 48, "expert_feed_forward_length": 32}),
    "mixtral": ("MixtralConfig", dict(num_local_experts=6, intermediate_size=32, sliding_window=None),
                "llama", {"feed_forward_length": 32, "expert_count": 6, "rope.dimension_count": 16}),
    "olmoe": ("OlmoeConfig", dict(num_experts=6, intermediate_size=32, norm_topk_prob=False, num_key_value_heads=4),
              "olmoe", {"feed_forward_length": 32, "expert_used_count": 2}),
    "deepseek_v2": ("DeepseekV2Config", dict(LATENT, topk_method="greedy", n_group=1, topk_group=1, norm_topk_prob=False,
                                             routed_scaling_factor=1.0),
                    "deepseek2", {"expert_gating_func": 1, "attention.key_length": 24, "attention.value_length": 16,
                                  "attention.key_length_mla": 16, "attention.value_length_mla": 12,
                                  "attention.head_count_kv": 1, "attention.q_lora_rank": 24,
                                  "leading_dense_block_count": 1, "expert_shared_count": 2}),
    "deepseek_v3": ("DeepseekV3Config", dict(LATENT, n_group=2, topk_group=1, routed_scaling_factor=2.5, norm_topk_prob=True),
                    "deepseek2", {"expert_gating_func": 2, "expert_weights_scale": 2.5, "expert_weights_norm": True,
                                  "expert_group_count": 2, "expert_group_used_count": 1}),
    "gpt_oss": ("GptOssConfig", dict(num_local_experts=6, intermediate_size=32, head_dim=16, sliding_window=32),
                "gpt-oss", {"attention.sliding_window": 32, "expert_feed_forward_length": 32, "rope.scaling.type": "yarn"}),
    "glm4_moe": ("Glm4MoeConfig", dict(n_routed_experts=6, n_shared_experts=1, moe_intermediate_size=32, intermediate_size=96,
                                       first_k_dense_replace=1, head_dim=16, n_group=1, topk_group=1, use_qk_norm=True,
                                       attention_bias=True, partial_rotary_factor=0.5, routed_scaling_factor=1.0,
                                       num_nextn_predict_layers=0),
                 "glm4moe", {"rope.dimension_count": 8, "expert_gating_func": 2, "leading_dense_block_count": 1}),
}


def checkpoint(folder):
    out = {}
    for path in sorted(glob.glob(os.path.join(folder, "*.safetensors"))):
        with safe_open(path, "pt") as f:
            for name in f.keys():
                out[name] = f.get_tensor(name).float().numpy()
    return out


def stacked(tensors):
    """Experts of a layer as one tensor, gate and up apart, whatever the layout."""
    out, experts = {}, {}
    for name, x in tensors.items():
        m = re.match(r"(.*\.experts)\.(\d+)\.(\w+)\.weight$", name)
        if m:
            experts.setdefault((m[1], m[3]), {})[int(m[2])] = x
        elif ".mlp.experts.gate_up_proj" in name and "router" not in name and re.search(r"gate_up_proj(_bias)?$", name):
            at = name[:name.index("gate_up_proj")]
            if name.endswith("_bias"):  # gpt-oss: in turns
                out[at + "gate_proj.bias"], out[at + "up_proj.bias"] = x[:, ::2], x[:, 1::2]
            elif at.replace("experts.", "router.weight") in tensors:
                x = x.swapaxes(1, 2)
                out[at + "gate_proj.weight"], out[at + "up_proj.weight"] = x[:, ::2], x[:, 1::2]
            else:
                half = x.shape[1] // 2
                out[at + "gate_proj.weight"], out[at + "up_proj.weight"] = x[:, :half], x[:, half:]
        elif re.search(r"experts\.down_proj(_bias)?$", name):
            oss = name[:name.index("experts.")] + "router.weight" in tensors
            if name.endswith("_bias"):
                out[name.replace("_bias", ".bias")] = x
            else:
                out[name + ".weight"] = x.swapaxes(1, 2) if oss else x
        else:
            out[name] = x
    for (at, what), rows in experts.items():
        out[f"{at}.{what}.weight"] = np.stack([rows[e] for e in range(len(rows))])
    return out


def permuted(x, heads):
    return x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def expected(folder, arch, config):
    """GGUF name -> array, by gguf's own map of names."""
    number = next(n for n, text in gguf.MODEL_ARCH_NAMES.items() if text == arch)
    names = gguf.get_tensor_name_map(number, config["num_hidden_layers"])
    out = {}
    for name, x in stacked(checkpoint(folder)).items():
        if name.endswith("kv_b_proj.weight"):
            heads, n, v = config["num_attention_heads"], config["qk_nope_head_dim"], config["v_head_dim"]
            both = x.reshape(heads, n + v, -1)
            at = name[:-len("kv_b_proj.weight")]
            out[names.get_name(at + "k_b_proj") + ".weight"] = both[:, :n].swapaxes(1, 2)
            out[names.get_name(at + "v_b_proj") + ".weight"] = both[:, n:]
            continue
        if name.endswith("sinks"):
            name += ".weight"
        if name.endswith("e_score_correction_bias"):
            name = name.replace("e_score_correction_bias", "e_score_correction.bias")
        if arch == "llama" and re.search(r"self_attn\.[qk]_proj\.weight$", name):
            x = permuted(x, config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"])
        if name.endswith("shared_expert_gate.weight"):
            x = x.reshape(-1)
        to = names.get_name(name, try_suffixes=(".weight", ".bias"))
        check(to is not None, f"{arch}: gguf has no name for {name}")
        out[to] = x
    return out


def values(tensor):
    x = gguf.dequantize(tensor.data, tensor.tensor_type)
    return x.reshape(tuple(int(n) for n in tensor.shape[::-1]))


def make(name, folder):
    cls, settings, _, _ = MODELS[name]
    torch.manual_seed(7)
    config = getattr(transformers, cls)(**{**COMMON, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in list(model.parameters()) + list(model.buffers()):
            if p.is_floating_point() and p.ndim <= 2 and p.dtype == torch.float32 and "inv_freq" not in str(p.shape):
                if p.ndim == 1 and p.numel() > 1 and not any(p is b for b in model.buffers()):
                    p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(folder)
    return model


def dump(build, folder, stem, kind="F32", shard=0):
    return subprocess.run([os.path.join(build, "tests", "dump_gguf_model"), folder, stem, kind, str(shard)], capture_output=True)


def compare(build, tmp, name):
    folder, stem = os.path.join(tmp, name), os.path.join(tmp, name)
    _, _, arch, keys = MODELS[name]
    model = make(name, folder)
    r = dump(build, folder, stem)
    if r.returncode != 0:
        check(False, f"{name}: {r.stderr.decode()}")
        return
    reader = gguf.GGUFReader(stem + ".gguf")
    with open(os.path.join(folder, "config.json")) as f:
        config = json.load(f)
    want = expected(folder, arch, config)
    got = {t.name: t for t in reader.tensors}
    check(set(got) == set(want), f"{name}: only in GGUF {sorted(set(got) - set(want))}, missing {sorted(set(want) - set(got))}")
    for k in sorted(set(got) & set(want)):
        x = values(got[k])
        check(x.shape == want[k].shape and np.array_equal(x, want[k]), f"{name}: {k} {x.shape} {want[k].shape} differs")
    common = {"block_count": 3, "context_length": 512, "embedding_length": 64, "vocab_size": 96, "attention.head_count": 4,
              "expert_used_count": 2, "attention.layer_norm_rms_epsilon": np.float32(config["rms_norm_eps"])}
    for k, v in {**common, **keys}.items():
        field = reader.fields.get(f"{arch}.{k}")
        check(field is not None and field.contents() == v, f"{name}: {k} is {field and field.contents()}, expected {v}")
    check(reader.fields["general.architecture"].contents() == arch, f"{name}: architecture")
    halves(build, tmp, name, folder, want)
    series(build, tmp, name, folder, want)
    return model


def halves(build, tmp, name, folder, want):
    for kind, to in (("BF16", torch.bfloat16), ("F16", torch.float16)):
        stem = os.path.join(tmp, f"{name}.{kind}")
        check(dump(build, folder, stem, kind).returncode == 0, f"{name}: {kind}")
        for t in gguf.GGUFReader(stem + ".gguf").tensors:
            x = want[t.name]
            whole = x.ndim < 2 or "ffn_gate_inp" in t.name or t.name.endswith("_exps.bias")
            check(t.tensor_type.name == ("F32" if whole else kind), f"{name}: {t.name} has type {t.tensor_type.name}")
            x = x if whole else torch.from_numpy(np.ascontiguousarray(x)).to(to).float().numpy()
            check(np.array_equal(values(t), x), f"{name}: {t.name} as {kind} differs")


def series(build, tmp, name, folder, want):
    stem = os.path.join(tmp, name + ".split")
    check(dump(build, folder, stem, "F32", 100000).returncode == 0, f"{name}: split")
    paths = sorted(glob.glob(os.path.join(stem + ".dir", "*.gguf")))
    got = {t.name: values(t) for p in paths for t in gguf.GGUFReader(p).tensors}
    check(len(paths) > 1 and set(got) == set(want) and all(np.array_equal(got[k], want[k]) for k in got), f"{name}: split differs")


def logits(tmp, name, model):
    """transformers' own reader of GGUF; the config is given because it does not read all of its keys."""
    ids = torch.arange(40).reshape(1, -1) * 7 % 96
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp, gguf_file=name + ".gguf", config=model.config,
                                                               dtype=torch.float32).eval()
    with torch.no_grad():
        a, b = model(ids).logits, theirs(ids).logits
    check(torch.allclose(a, b, atol=1e-4), f"{name}: logits differ by {float((a - b).abs().max())}")


def tokenizer(build, tmp):
    demo, stem = os.path.join(tmp, "demo"), os.path.join(tmp, "demo")
    shutil.copytree(os.path.join(ROOT, "recipes", "demo-model"), demo)
    with open(os.path.join(demo, "chat_template.jinja"), "w") as f:
        f.write("{% for m in messages %}{{ m.content }}{% endfor %}")
    r = dump(build, demo, stem, "BF16")
    if r.returncode != 0:
        return check(False, f"demo: {r.stderr.decode()}")
    fields = {k: f.contents() for k, f in gguf.GGUFReader(stem + ".gguf").fields.items()}
    with open(os.path.join(demo, "tokenizer.json")) as f:
        file = json.load(f)
    with open(os.path.join(demo, "config.json")) as f:
        rows = json.load(f)["vocab_size"]
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    vocab = {**{a["content"]: a["id"] for a in file["added_tokens"]}, **file["model"]["vocab"]}
    special = {a["id"] for a in file["added_tokens"] if a["special"]}
    check(len(tokens) == len(kinds) == rows, "number of tokens")
    check(all(tokens[i] == t for t, i in vocab.items()), "tokens")
    known = set(vocab.values())
    check(all(kinds[i] == (3 if i in special else 1 if i in known else 5) for i in range(rows)), "types of tokens")
    merges = [m if isinstance(m, str) else " ".join(m) for m in file["model"]["merges"]]
    check(fields["tokenizer.ggml.merges"] == merges, "merges")
    check(fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == "qwen2", "model and pre-tokenizer")
    check(tokens[fields["tokenizer.ggml.eos_token_id"]] == "<|endoftext|>", "eos")
    check(fields["tokenizer.ggml.add_bos_token"] is False, "add_bos_token")
    check(fields["tokenizer.chat_template"].startswith("{% for m"), "chat template")
    ours = transformers.AutoTokenizer.from_pretrained(tmp, gguf_file="demo.gguf")
    theirs = transformers.AutoTokenizer.from_pretrained(demo)
    for text in ("Hello there, 123 words.\n\n  And more?", "def f(x):\n    return x"):
        check(ours(text).input_ids == theirs(text).input_ids, f"ids of {text!r}")


def mxfp4(build, tmp):
    """gpt-oss as it is released: experts in blocks and scales keep their codes."""
    folder = os.path.join(tmp, "oss4")
    shutil.copytree(os.path.join(tmp, "gpt_oss"), folder)
    rng = np.random.default_rng(3)
    tensors = {k: torch.from_numpy(x) for k, x in checkpoint(folder).items()}
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    want = {}
    for name in [n for n in tensors if n.endswith("experts.gate_up_proj") or n.endswith("experts.down_proj")]:
        e, cols, rows = tensors.pop(name).shape  # [E, in, out]
        blocks = rng.integers(0, 256, (e, rows, cols // 32, 16), dtype=np.uint8)
        scales = rng.integers(118, 130, (e, rows, cols // 32), dtype=np.uint8)
        tensors[name + "_blocks"], tensors[name + "_scales"] = torch.from_numpy(blocks), torch.from_numpy(scales)
        x = np.stack([table[blocks & 15], table[blocks >> 4]], -1).reshape(e, rows, cols // 32, 32)
        x = (x * np.exp2(scales.astype(np.float32) - 127)[..., None]).reshape(e, rows, cols)
        at = f"blk.{name.split('.')[2]}.ffn_%s_exps.weight"
        want.update({at % "down": x} if "down" in name else {at % "gate": x[:, ::2], at % "up": x[:, 1::2]})
    for path in glob.glob(os.path.join(folder, "*.safetensors*")):
        os.remove(path)
    save_file({k: v.contiguous() for k, v in tensors.items()}, os.path.join(folder, "model.safetensors"))
    path = os.path.join(folder, "config.json")
    with open(path) as f:
        config = json.load(f)
    with open(path, "w") as f:
        json.dump({**config, "quantization_config": {"quant_method": "mxfp4"}}, f)
    r = dump(build, folder, folder, "BF16")
    if r.returncode != 0:
        return check(False, f"mxfp4: {r.stderr.decode()}")
    reader = gguf.GGUFReader(folder + ".gguf")
    got = {t.name: t for t in reader.tensors}
    for name, x in want.items():
        check(got[name].tensor_type.name == "MXFP4" and np.array_equal(values(got[name]), x), f"mxfp4: {name} differs")
    check(len(want) == 9 and reader.fields["general.file_type"].contents() == 38, "mxfp4: file type")


def refused(build, tmp):
    for name, change, says in (("qwen3_moe", {"norm_topk_prob": False}, b"always divides"),
                               ("olmoe", {"clip_qkv": 2.0}, b"clip_qkv"),
                               ("mixtral", {"sliding_window": 16}, b"sliding window")):
        folder = os.path.join(tmp, name + ".odd")
        shutil.copytree(os.path.join(tmp, name), folder)
        path = os.path.join(folder, "config.json")
        with open(path) as f:
            config = json.load(f)
        with open(path, "w") as f:
            json.dump({**config, **change}, f)
        r = dump(build, folder, folder)
        check(r.returncode == 2 and says in r.stderr, f"{name} {change}: {r.returncode} {r.stderr}")
    MODELS["olmoe"][1]["num_key_value_heads"] = 2
    make("olmoe", folder)
    MODELS["olmoe"][1]["num_key_value_heads"] = 4
    r = dump(build, folder, folder)
    check(r.returncode == 2 and b"2 key heads" in r.stderr, f"olmoe with fewer key heads: {r.returncode} {r.stderr}")


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--build", required=True)
    build = os.path.abspath(p.parse_args().build)
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as tmp:
        for name in MODELS:
            model = compare(build, tmp, name)
            if model is not None and name in ("qwen3_moe", "qwen2_moe"):  # gpt-oss: 5.23 takes lengths of keys for rope values
                logits(tmp, name, model)
        mxfp4(build, tmp)
        refused(build, tmp)
        tokenizer(build, tmp)
    print("test_gguf_model:", "ok" if not checks.failed else f"{checks.failed} failed")
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
