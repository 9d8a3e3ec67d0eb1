"""A GGUF read as a model and converted back: tensors and config against the checkpoint that it was made from, logits of transformers
(nothing missing, nothing unexpected) and of our own forward pass on the file itself, ids of the tokenizer; blocks that the gguf
package wrote against its own dequantize.

    python tests/interop/test_gguf_convert.py --build BUILD_DIR

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
import tokenizers
import torch
import transformers
from safetensors.torch import load_file

import checks
from checks import check
import test_gguf_model as models

ROOT = models.ROOT
IDS = torch.arange(40).reshape(1, -1) * 7 % 96
# what transformers writes on its own, spells in another way, or has no use for here
UNSAID = {"transformers_version", "dtype", "torch_dtype", "initializer_range", "use_cache", "attention_dropout", "router_aux_loss_coef",
          "output_router_logits", "pad_token_id", "bos_token_id", "eos_token_id", "return_dict", "rope_parameters", "rope_scaling",
          "rope_theta", "head_dim", "layer_types", "num_local_experts", "num_experts", "mlp_only_layers", "architectures",
          "_name_or_path", "num_nextn_predict_layers"}


def convert(build, file, out, *more):
    r = subprocess.run([os.path.join(build, "moecompress"), "convert", file, "-o", out, "-q", *more], capture_output=True)
    check(r.returncode == 0, f"convert {file}: {r.stderr.decode()}")
    return r.returncode == 0


def tensors(folder):
    out = {}
    for path in glob.glob(os.path.join(folder, "*.safetensors")):
        out.update(load_file(path))
    return models.stacked({k: v.float().numpy() for k, v in out.items()})


def same_tensors(name, folder, out):
    want, got = tensors(folder), tensors(out)
    if name == "mixtral":  # the two spellings of transformers
        def hub(n):
            n = n.replace("block_sparse_moe.gate.", "mlp.gate.").replace("block_sparse_moe.experts", "mlp.experts")
            return n.replace("experts.w1.", "experts.gate_proj.").replace("experts.w3.", "experts.up_proj.").replace(
                "experts.w2.", "experts.down_proj.")
        want, got = {hub(k): v for k, v in want.items()}, {hub(k): v for k, v in got.items()}
    check(set(want) == set(got), f"{name}: missing {sorted(set(want) - set(got))}, more {sorted(set(got) - set(want))}")
    for k in set(want) & set(got):
        check(want[k].shape == got[k].shape and np.array_equal(want[k], got[k]), f"{name}: {k} differs")


def same_config(name, folder, out):
    a, b = (transformers.AutoConfig.from_pretrained(d).to_dict() for d in (folder, out))
    for k, v in a.items():
        if k not in UNSAID and v is not None:
            check(b.get(k) == v, f"{name}: config {k} is {b.get(k)}, was {v}")
    for k, v in (a.get("rope_parameters") or {}).items():
        mine = (b.get("rope_parameters") or {}).get(k)
        if v is not None:
            check(mine == v or (isinstance(v, float) and mine is not None and abs(mine - v) < 1e-6 * abs(v)), f"{name}: rope {k} is {mine}, was {v}")


def same_logits(name, model, out):
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    for k in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        check(not info[k], f"{name}: {k} {sorted(info[k])[:3]}")
    with torch.no_grad():
        a, b = model(IDS).logits, theirs.eval()(IDS).logits
    check(torch.equal(a, b) or torch.allclose(a, b, atol=1e-5), f"{name}: logits differ by {float((a - b).abs().max())}")


def forward(build, tmp, model):
    """Our own logits, of a folder or a GGUF."""
    ids, out = os.path.join(tmp, "x.ids"), os.path.join(tmp, "x.safetensors")
    with open(ids, "w") as f:
        f.write(" ".join(map(str, IDS[0].tolist())) + "\n")
    r = subprocess.run([os.path.join(build, "tests", "dump_forward"), "--seq-len", "40", model, ids, out], capture_output=True)
    if r.returncode != 0:
        return check(False, f"forward of {model}: {r.stderr.decode()}")
    return load_file(out)["logits"]


def compare(build, tmp, name):
    folder, stem, out = (os.path.join(tmp, name + tail) for tail in ("", "", ".hf"))
    model = models.make(name, folder)
    r = models.dump(build, folder, stem)
    if r.returncode != 0:
        return check(False, f"{name}: {r.stderr.decode()}")
    if not convert(build, stem + ".gguf", out):
        return
    same_tensors(name, folder, out)
    same_config(name, folder, out)
    same_logits(name, model, out)
    a, b = forward(build, tmp, folder), forward(build, tmp, stem + ".gguf")
    check(a is not None and b is not None and torch.equal(a, b), f"{name}: our logits of the folder and the GGUF differ")


def again(build, tmp, name):
    """The GGUF, read and written again, and a series of files."""
    stem, twice = os.path.join(tmp, name), os.path.join(tmp, name + ".twice")
    r = models.dump(build, stem + ".gguf", twice)
    check(r.returncode == 0, f"{name}: {r.stderr.decode()}")
    with open(stem + ".gguf", "rb") as a, open(twice + ".gguf", "rb") as b:
        check(a.read() == b.read(), f"{name}: the GGUF of the GGUF differs")
    check(models.dump(build, os.path.join(tmp, name), stem + ".split", "F32", 100000).returncode == 0, f"{name}: split")
    out = os.path.join(tmp, name + ".series")
    if convert(build, sorted(glob.glob(stem + ".split.dir/*.gguf"))[0], out):
        same_tensors(name, os.path.join(tmp, name), out)


def rewrite(source, to, kinds):
    """The same file with matrices whose name matches a pattern in another type, by the gguf package."""
    reader = gguf.GGUFReader(source)
    arch = reader.fields["general.architecture"].contents()
    w = gguf.GGUFWriter(to, arch)
    for k, f in reader.fields.items():
        if k.startswith(("GGUF.", "general.architecture")):
            continue
        v, t = f.contents(), f.types[0]
        if t == gguf.GGUFValueType.ARRAY:
            w.add_array(k, v)
        else:
            w.add_key_value(k, v, t)
    for t in reader.tensors:
        x = gguf.dequantize(t.data, t.tensor_type).reshape(tuple(int(n) for n in t.shape[::-1]))
        kind = next((q for pattern, q in kinds if re.search(pattern, t.name)), None)
        if kind is None:
            w.add_tensor(t.name, np.ascontiguousarray(x))
        else:
            w.add_tensor(t.name, gguf.quantize(np.ascontiguousarray(x), kind), raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def blocks(build, tmp, name, kinds):
    """Quantized tensors: the folder has their values to BF16, F32 has them as they are; our forward pass is the same on both."""
    file, out = os.path.join(tmp, name + ".q.gguf"), os.path.join(tmp, name + ".q")
    rewrite(os.path.join(tmp, name + ".gguf"), file, kinds)
    if not convert(build, file, out) or not convert(build, file, out + "32", "--dtype", "f32", "--shard-size", "100kB"):
        return
    check(len(glob.glob(out + "32/*.safetensors")) > 1, f"{name}: one shard")
    again = os.path.join(tmp, name + ".again")
    r = models.dump(build, out + "32", again)
    check(r.returncode == 0, f"{name}: {r.stderr.decode()}")
    back = {t.name: models.values(t) for t in gguf.GGUFReader(again + ".gguf").tensors}
    for t in gguf.GGUFReader(file).tensors:
        check(np.array_equal(models.values(t), back[t.name]), f"{name}: {t.name} differs from gguf's dequantize")
    f32, bf16 = tensors(out + "32"), tensors(out)
    for k in f32:
        x = f32[k] if "e_score" in k else torch.from_numpy(np.ascontiguousarray(f32[k])).bfloat16().float().numpy()
        check(np.array_equal(x, bf16[k]), f"{name}: {k} is not its value to BF16")
    a, b = forward(build, tmp, file), forward(build, tmp, out + "32")
    check(a is not None and b is not None and torch.equal(a, b), f"{name}: our logits of blocks and of their values differ")


def wide(build, tmp):
    """K types need rows of 256."""
    folder, stem = os.path.join(tmp, "wide"), os.path.join(tmp, "wide")
    config = transformers.MixtralConfig(**{**models.COMMON, "hidden_size": 256, "num_hidden_layers": 2, "num_local_experts": 4,
                                           "intermediate_size": 256, "sliding_window": None})
    torch.manual_seed(5)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    check(models.dump(build, folder, stem, "BF16").returncode == 0, "wide")
    # the package reads K types and writes none: our own bytes
    rng = np.random.default_rng(2)
    kind = gguf.GGMLQuantizationType
    sizes = gguf.GGML_QUANT_SIZES

    def random_blocks(shape, q):
        n, size = sizes[q]
        raw = rng.integers(0, 256, (int(np.prod(shape)) // n, size), dtype=np.uint8)
        at = {kind.Q4_K: [0, 2], kind.Q6_K: [size - 2], kind.Q3_K: [size - 2], kind.Q5_K: [0, 2], kind.Q2_K: [size - 4, size - 2]}[q]
        for k in at:
            raw[:, k:k + 2] = np.frombuffer(np.float16(0.001).tobytes(), np.uint8)
        return raw.reshape(*shape[:-1], -1)

    reader = gguf.GGUFReader(stem + ".gguf")
    file = os.path.join(tmp, "wide.q.gguf")
    w = gguf.GGUFWriter(file, "llama")
    for k, f in reader.fields.items():
        if not k.startswith(("GGUF.", "general.architecture", "tokenizer")):
            w.add_key_value(k, f.contents(), f.types[0])
    kinds = {"attn_q": kind.Q4_K, "attn_k": kind.Q6_K, "ffn_gate_exps": kind.Q4_K, "ffn_up_exps": kind.Q3_K, "ffn_down_exps": kind.Q5_K,
             "token_embd": kind.Q2_K, "output.weight": kind.Q6_K}
    for t in reader.tensors:
        q = next((q for n, q in kinds.items() if n in t.name), None)
        shape = tuple(int(n) for n in t.shape[::-1])
        if q is None:
            w.add_tensor(t.name, models.values(t).astype(np.float32))
        else:
            w.add_tensor(t.name, random_blocks(shape, q), raw_dtype=q)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    out = os.path.join(tmp, "wide.hf")
    if not convert(build, file, out, "--dtype", "f32"):
        return
    got = tensors(out)
    want = {t.name: models.values(t) for t in gguf.GGUFReader(file).tensors}
    for i in range(2):
        for mine, theirs in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            check(np.array_equal(got[f"model.layers.{i}.block_sparse_moe.experts.{mine}.weight"], want[f"blk.{i}.ffn_{theirs}_exps.weight"]),
                  f"wide: {mine}")
        for p, heads in (("q", 4), ("k", 2)):
            x = got[f"model.layers.{i}.self_attn.{p}_proj.weight"]
            check(np.array_equal(models.permuted(x, heads), want[f"blk.{i}.attn_{p}.weight"]), f"wide: {p}")
    check(np.array_equal(got["model.embed_tokens.weight"], want["token_embd.weight"]), "wide: embeddings")
    a, b = forward(build, tmp, file), forward(build, tmp, out)
    check(a is not None and b is not None and torch.equal(a, b), "wide: our logits of blocks and of their values differ")


TEXTS = ["Hello there, 123 words.\n\n  And more?", "def f(x):\n    return x", "na\u00efve caf\u00e9 \u4f60\u597d \U0001f600", "<|endoftext|>x", "  two",
         "It's 12345 o'clock \t\r\n"]


def same_ids(what, a, b):
    for text in TEXTS:
        for special in (False, True):
            x, y = (t.encode(text, add_special_tokens=special).ids for t in (a, b))
            check(x == y, f"{what}: ids of {text!r}: {x[:8]} {y[:8]}")
            check(a.decode(x) == b.decode(x), f"{what}: text of {text!r}")


def tokenizer(build, tmp):
    demo, stem, out = (os.path.join(tmp, "demo" + tail) for tail in ("", "", ".hf"))
    shutil.copytree(os.path.join(ROOT, "recipes", "demo-model"), demo)
    with open(os.path.join(demo, "chat_template.jinja"), "w") as f:
        f.write("{% for m in messages %}{{ m.content }}{% endfor %}")
    check(models.dump(build, demo, stem, "BF16").returncode == 0, "demo")
    if not convert(build, stem + ".gguf", out):
        return
    same_tensors("demo", demo, out)
    theirs, mine = (tokenizers.Tokenizer.from_file(os.path.join(d, "tokenizer.json")) for d in (demo, out))
    same_ids("demo", theirs, mine)
    a, b = (transformers.AutoTokenizer.from_pretrained(d) for d in (demo, out))
    check(a.eos_token == b.eos_token, f"eos {b.eos_token}")
    check(b.chat_template == "{% for m in messages %}{{ m.content }}{% endfor %}", "chat template")
    for text in TEXTS:
        check(a(text).input_ids == b(text).input_ids, f"transformers: ids of {text!r}")


def pieces(build, tmp):
    """BPE with bytes as SentencePiece has it, trained here."""
    folder, stem, out = (os.path.join(tmp, "pieces" + tail) for tail in ("", "", ".hf"))
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    t = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    t.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")])
    # without a pre-tokenizer merges would grow over words; SentencePiece's do not
    t.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=560, special_tokens=["<unk>", "<s>", "</s>"] + bytes_, show_progress=False)
    with open(os.path.join(ROOT, "recipes", "demo-model", "samples.txt")) as f:
        t.train_from_iterator(f.read().splitlines(), trainer)
    file = json.loads(t.to_str())
    file["pre_tokenizer"] = None
    file["added_tokens"] = file["added_tokens"][:3]
    decoder = tokenizers.decoders
    file["decoder"] = json.loads(decoder.Sequence([decoder.Replace("\u2581", " "), decoder.ByteFallback(), decoder.Fuse(),
                                                   decoder.Strip(" ", 1, 0)]).__getstate__())
    file["post_processor"] = json.loads(tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]).__getstate__())
    n = max(file["model"]["vocab"].values()) + 1
    cls, settings, _, _ = models.MODELS["mixtral"]
    config = transformers.MixtralConfig(**{**models.COMMON, **settings, "vocab_size": n + 3, "num_hidden_layers": 1})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    with open(os.path.join(folder, "tokenizer.json"), "w") as f:
        json.dump(file, f)
    with open(os.path.join(folder, "tokenizer_config.json"), "w") as f:
        json.dump({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, f)
    r = models.dump(build, folder, stem)
    check(r.returncode == 0, f"pieces: {r.stderr.decode()}")
    if convert(build, stem + ".gguf", out):
        same_ids("pieces", *(tokenizers.Tokenizer.from_file(os.path.join(d, "tokenizer.json")) for d in (folder, out)))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--build", required=True)
    build = os.path.abspath(parser.parse_args().build)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as tmp:
        cls, settings, arch, _ = models.MODELS["deepseek_v3"]
        models.MODELS["latent"] = (cls, {**settings, "kv_lora_rank": 32, "qk_nope_head_dim": 32}, arch, {})
        for name in models.MODELS:
            compare(build, tmp, name)
        q = gguf.GGMLQuantizationType
        blocks(build, tmp, "qwen3_moe", [(r"_exps\.weight", q.Q8_0), (r"attn_[qk]\.", q.Q4_0), (r"token_embd|output\.weight", q.Q5_1)])
        # kv_b of two parts in blocks; a router and a norm as nobody quantizes them
        blocks(build, tmp, "latent", [(r"ffn_down_exps", q.Q8_0), (r"ffn_(gate|up)_exps\.w", q.Q5_0), (r"attn_[kv]_b", q.Q4_1),
                                      (r"ffn_gate_inp|output_norm", q.Q8_0)])
        blocks(build, tmp, "gpt_oss", [(r"ffn_(gate|up|down)_exps\.weight", q.MXFP4), (r"attn_output\.w", q.Q8_0)])
        wide(build, tmp)
        for name in ("mixtral", "gpt_oss", "latent"):
            again(build, tmp, name)
        tokenizer(build, tmp)
        pieces(build, tmp)
    print("GGUF to folders: " + ("nothing differs" if checks.failed == 0 else f"{checks.failed} differ"))
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
