"""quantize --format gguf: every byte of the files against rows that numpy takes from the checkpoint and our blocks (num/blocks.h) write,
gguf-py's reading against our own, logits of transformers that loads the file against the model with the decoded weights.

    python tests/interop/test_gguf_quantize.py --build BUILD_DIR

Exit 0: nothing differs.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile

import gguf
import numpy as np
import torch
import transformers

import checks
from checks import check
import test_gguf_model as whole

# wide: rows of 256 in all but a few tensors, so that large blocks have their place
WIDE = dict(hidden_size=256, moe_intermediate_size=256, head_dim=64)
MODELS = {"qwen3_moe": dict(WIDE), "qwen2_moe": dict(hidden_size=256, moe_intermediate_size=256, shared_expert_intermediate_size=96),
          "gpt_oss": {}, "deepseek_v3": {}}
TYPES = {"qwen3_moe": ["q4_k", "q2_k,attn_(q|k|v)=q6_k,ffn_down_exps=q3_k,blk\\.1\\..*=iq4_xs,token_embd=q5_k,output=f16", "bf16,exps=q5_1"],
         "qwen2_moe": ["iq4_nl,shexp=q8_0,ffn_up_exps=q5_0"], "gpt_oss": ["q4_1,exps=mxfp4"], "deepseek_v3": ["q6_k,attn_k_b=q4_0"]}
FALL = {"q2_k": "iq4_nl", "q3_k": "iq4_nl", "iq4_xs": "iq4_nl", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}


def fallen(kind, cols):
    """What rows of so many columns get where `kind` is asked for."""
    if cols % 256 and kind in FALL:
        kind = FALL[kind]
    return kind if kind in ("f16", "bf16") or cols % 32 == 0 else "f16"


def asked(name, rules):
    out = None
    for rule in rules.split(","):
        pattern, _, kind = rule.rpartition("=")
        if not pattern or re.search(pattern, name):
            out = kind
    return out


def blocks(build, kind, n, how, data):
    p = subprocess.run([os.path.join(build, "tests", "dump_blocks"), kind, str(n), how], input=data, capture_output=True)
    check(p.returncode == 0, f"dump_blocks {kind}: {p.stderr.decode()}")
    return p.stdout


def compare(build, path, want, rules, what):
    decoded = {}
    for t in gguf.GGUFReader(path).tensors:
        x = np.ascontiguousarray(want[t.name], dtype=np.float32)
        check(tuple(int(n) for n in t.shape[::-1]) == x.shape, f"{what}: {t.name} has shape {t.shape}")
        values = gguf.dequantize(t.data, t.tensor_type).reshape(x.shape)
        decoded[t.name] = values
        if x.ndim < 2 or "ffn_gate_inp" in t.name or t.name.endswith("_exps.bias"):
            check(t.tensor_type.name == "F32" and np.array_equal(values, x), f"{what}: {t.name} is not as it was")
            continue
        kind = fallen(asked(t.name, rules), x.shape[-1])
        check(t.tensor_type.name == kind.upper(), f"{what}: {t.name} is {t.tensor_type.name}, not {kind}")
        stored = t.data.tobytes()
        check(stored == blocks(build, kind, x.shape[-1], "write", x.tobytes()), f"{what}: {t.name} ({kind}) has other bytes")
        ours = np.frombuffer(blocks(build, kind, x.shape[-1], "read", stored), dtype=np.float32).reshape(x.shape)
        check(np.array_equal(ours, values), f"{what}: {t.name} ({kind}): gguf-py reads other values")
    check(set(decoded) == set(want), f"{what}: tensors")
    return decoded


NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight", "output.weight": "lm_head.weight"}
PARTS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
         "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
         "ffn_gate_inp": "mlp.gate", "ffn_gate_inp_shexp": "mlp.shared_expert_gate", "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
         "ffn_up_shexp": "mlp.shared_expert.up_proj", "ffn_down_shexp": "mlp.shared_expert.down_proj"}


def put_back(model, decoded):
    """The decoded weights in the model, by names written out here."""
    state = {}
    for name, x in decoded.items():
        x = torch.from_numpy(np.array(x))
        if name in NAMES:
            state[NAMES[name]] = x
            continue
        _, layer, part, end = name.split(".")
        at = f"model.layers.{layer}."
        if part == "ffn_up_exps":
            continue
        if part == "ffn_gate_exps":
            up = torch.from_numpy(np.array(decoded[name.replace("gate", "up")]))
            state[at + "mlp.experts.gate_up_proj"] = torch.cat([x, up], 1)
        elif part == "ffn_down_exps":
            state[at + "mlp.experts.down_proj"] = x
        else:
            state[at + PARTS[part] + "." + end] = x.reshape(1, -1) if part == "ffn_gate_inp_shexp" else x
    missing = set(model.state_dict()) - set(state)
    check(not missing and set(state) <= set(model.state_dict()), f"names: {missing}")
    model.load_state_dict(state)


def logits(tmp, file, model, decoded, what):
    ids = torch.arange(40).reshape(1, -1) * 7 % 96
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp, gguf_file=file, config=model.config, dtype=torch.float32).eval()
    with torch.no_grad():
        original = model(ids).logits
        put_back(model, decoded)
        a, b = model(ids).logits, theirs(ids).logits
    check(torch.allclose(a, b, atol=1e-4), f"{what}: logits differ by {float((a - b).abs().max())}")
    check(float((a - original).abs().max()) > 1e-4, f"{what}: nothing was quantized")


def mxfp4(build, tmp):
    """gpt-oss as it is released: experts keep their codes unless a pattern takes them."""
    whole.mxfp4(build, tmp)
    folder, path = os.path.join(tmp, "oss4"), os.path.join(tmp, "oss4.types.gguf")
    codes = {t.name: t.data.tobytes() for t in gguf.GGUFReader(folder + ".gguf").tensors}
    for rules, kind, number in (("q8_0", "MXFP4", 38), ("q8_0,exps=q4_0", "Q4_0", 2)):
        if not quantize(build, folder, rules, path, "--overwrite"):
            continue
        reader = gguf.GGUFReader(path)
        for t in reader.tensors:
            if t.name.endswith("_exps.weight"):
                check(t.tensor_type.name == kind, f"{rules}: {t.name} is {t.tensor_type.name}")
                check((t.data.tobytes() == codes[t.name]) == (kind == "MXFP4"), f"{rules}: {t.name}: codes")
        check(reader.fields["general.file_type"].contents() == number, f"{rules}: file type")


def quantize(build, folder, rules, path, *more):
    tool = os.path.join(build, "moecompress")
    for r in (subprocess.run([tool, "quantize", folder, "--format", "gguf", "--types", rules, "-q", "-o", path, *more], capture_output=True),
              subprocess.run([tool, "verify", path, folder], capture_output=True)):
        check(r.returncode == 0, f"{folder} {rules}: {r.stdout.decode()} {r.stderr.decode()}")
    return os.path.exists(path)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--build", required=True)
    build = os.path.abspath(p.parse_args().build)
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as tmp:
        for name, settings in MODELS.items():
            cls, usual, arch, _ = whole.MODELS[name]
            whole.MODELS[name] = (cls, {**whole.COMMON, **usual, **settings}, arch, {})
            folder = os.path.join(tmp, name)
            model = whole.make(name, folder)
            with open(os.path.join(folder, "config.json")) as f:
                want = whole.expected(folder, arch, json.load(f))
            for i, rules in enumerate(TYPES[name]):
                file, what = f"{name}.{i}.gguf", f"{name} {rules}"
                if not quantize(build, folder, rules, os.path.join(tmp, file)):
                    continue
                decoded = compare(build, os.path.join(tmp, file), want, rules, what)
                if name in ("qwen3_moe", "qwen2_moe") and i < 2:  # gpt-oss: 5.23 takes lengths of keys for rope values
                    logits(tmp, file, model, decoded, what)
        mxfp4(build, tmp)
    print("test_gguf_quantize:", "ok" if not checks.failed else f"{checks.failed} failed")
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
