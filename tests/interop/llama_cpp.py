"""GGUF against llama.cpp itself, for who has its source: not part of the suite, which cannot download it.

    python tests/interop/llama_cpp.py --build BUILD_DIR --llama-cpp SOURCE [--bin FOLDER] [--text FILE]

SOURCE is llama.cpp's folder (the source package llama-cpp-python has one in vendor/). Of each architecture that is written: a small random
model as F32 GGUF by us and by its convert_hf_to_gguf.py; every tensor must be the same bits, every key that both write equal, and what only
one writes is printed. With --bin, the folder of llama-perplexity, and a --text: llama.cpp runs the files on the text, and its mean
log-probability must be that of transformers (within 0.1 %) on the tokens that llama.cpp made of it, which must be the tokenizer's; then
files of all types, random and the demo model's, must run, and on the demo model llama.cpp's KL of a quantized file to the F32 one must be
what transformers gives with the decoded weights (within 3 % and 0.0003: llama.cpp rounds activations to 8 bits). Exit 0: nothing differs.
"""
import argparse
import glob
import importlib
import os
import re
import shutil
import struct
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

CONTEXT = 128
OTHER = re.compile(r"general\.(name|size_label|file_type|basename|quantized_by|finetune|type|tags|license|base_model.*)$|tokenizer\.|split\.")


def convert(source, folder, out):
    """Runs in a process of its own, with llama.cpp's gguf: the converter as it is, but for vocabularies, which random models do not have."""
    sys.path.insert(0, source)
    base = importlib.import_module("conversion.base")
    for path in glob.glob(os.path.join(source, "conversion", "*.py")):
        try:
            importlib.import_module("conversion." + os.path.basename(path)[:-3])
        except ImportError:
            pass  # needs packages that are not here
    todo = [base.TextModel]
    while todo:
        c = todo.pop()
        c.set_vocab = lambda self: self._set_vocab_none()
        todo += c.__subclasses__()
    script = os.path.join(source, "convert_hf_to_gguf.py")
    sys.argv = [script, folder, "--outfile", out, "--outtype", "f32"]
    with open(script) as f:
        exec(compile(f.read(), script, "exec"), {"__name__": "__main__", "__file__": script})


def keys(reader):
    return {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.") and not OTHER.match(k)}


def alike(a, b):
    return a == b or (isinstance(a, float) and isinstance(b, (int, float)) and abs(a - b) <= 1e-6 * abs(a))


def compare(name, ours, theirs):
    a, b = gguf.GGUFReader(ours), gguf.GGUFReader(theirs)
    x, y = keys(a), keys(b)
    for k in sorted(set(x) & set(y)):
        check(alike(x[k], y[k]), f"{name}: {k} is {x[k]}, {y[k]} of llama.cpp's converter")
    print(f"{name}: keys of ours alone: {sorted(set(x) - set(y))}, of theirs: {({k: y[k] for k in sorted(set(y) - set(x))})}")
    s, t = ({u.name: u for u in r.tensors} for r in (a, b))
    check(set(s) == set(t), f"{name}: tensors {sorted(set(s) ^ set(t))}")
    for k in sorted(set(s) & set(t)):
        check(np.array_equal(s[k].data.reshape(-1), t[k].data.reshape(-1)), f"{name}: {k} differs")


def perplexity(folder, model, text, *more):
    p = subprocess.run([os.path.join(folder, "llama-perplexity"), "-m", model, "-f", text, "-c", str(CONTEXT), "-b", str(CONTEXT), "-t", "1",
                        "--no-warmup", "-ctk", "f32", "-ctv", "f32", "-fa", "off", *more], capture_output=True, text=True, errors="replace")
    out = p.stdout + p.stderr
    check(p.returncode == 0, f"{model}: llama-perplexity ends with {p.returncode}: {out[-800:]}")
    return out


def scored(model, tokens):
    """Mean log-probability of the second half of each context, as llama-perplexity scores, and log-probabilities there."""
    sums, rows = [], []
    with torch.no_grad():
        for at in range(0, len(tokens), CONTEXT):
            ids = torch.tensor(tokens[at:at + CONTEXT]).reshape(1, -1)
            logs = torch.log_softmax(model(ids).logits[0, CONTEXT // 2:-1].double(), -1)
            sums.append(logs.gather(1, ids[0, CONTEXT // 2 + 1:, None]))
            rows.append(logs)
    return float(torch.cat(sums).mean()), torch.cat(rows)


def decoded(model, path, build, tmp):
    """transformers' model with the weights of a GGUF."""
    out = os.path.join(tmp, "decoded")
    shutil.rmtree(out, ignore_errors=True)
    r = subprocess.run([os.path.join(build, "moecompress"), "convert", path, "-o", out, "--dtype", "f32", "-q"], capture_output=True)
    check(r.returncode == 0, f"convert {path}: {r.stderr.decode()}")
    return transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()


def runs(build, folder, tmp, text):
    """Random models of each architecture with the demo's vocabulary, and the demo model."""
    demo = os.path.join(whole.ROOT, "recipes", "demo-model")
    short = os.path.join(tmp, "short.txt")
    with open(text, errors="replace") as f, open(short, "w") as g:
        g.write(f.read(6000))
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo)
    with open(short) as f:
        ids = tokenizer(f.read()).input_ids
    whole.COMMON["vocab_size"] = 4096
    for name in [*whole.MODELS, "demo"]:
        source = demo
        if name != "demo":
            source = os.path.join(tmp, name + ".words")
            torch.manual_seed(1)
            whole.make(name, source)
            for f in ("tokenizer.json", "tokenizer_config.json"):
                if os.path.exists(os.path.join(demo, f)):
                    shutil.copy(os.path.join(demo, f), source)
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        stem = os.path.join(tmp, name + ".words")
        r = whole.dump(build, source, stem)
        check(r.returncode == 0, f"{name}: {r.stderr.decode()}")
        base = os.path.join(tmp, "logits")
        out = perplexity(folder, stem + ".gguf", short, "--kl-divergence-base", base)
        found = re.search(r"Final estimate: PPL = ([0-9.]+)", out)
        if not found:
            check(False, f"{name}: no perplexity: {out[-400:]}")
            continue
        with open(base, "rb") as f:
            _, context, vocab, chunks = struct.unpack("<8sIii", f.read(20))
            tokens = list(np.fromfile(f, np.int32, context * chunks))
        check(tokens == ids[:len(tokens)], f"{name}: llama.cpp cuts the text into other tokens")
        mean, rows = scored(model, tokens)
        ours = float(np.exp(-mean))
        check(abs(ours / float(found[1]) - 1) < 1e-3, f"{name}: perplexity {found[1]} in llama.cpp, {ours:.4f} in transformers")
        print(f"{name}: perplexity {found[1]} in llama.cpp, {ours:.4f} in transformers, {len(tokens)} tokens")
        for kind in ("q8_0", "q5_1", "iq4_nl", "mxfp4"):
            small = os.path.join(tmp, f"{name}.{kind}.gguf")
            r = subprocess.run([os.path.join(build, "moecompress"), "quantize", source, "--format", "gguf", "--types", kind, "-q", "-o", small],
                               capture_output=True)
            check(r.returncode == 0, f"{name} {kind}: {r.stderr.decode()}")
            out = perplexity(folder, small, short, "--kl-divergence", "--kl-divergence-base", base)
            found = re.search(r"Mean\s+KLD:\s*([-0-9.e]+)", out)
            check(found is not None, f"{name} {kind}: no KL: {out[-400:]}")
            if name == "demo" and found:
                _, changed = scored(decoded(model, small, build, tmp), tokens)
                kl = float((rows.exp() * (rows - changed)).sum(-1).mean())
                print(f"demo {kind}: KL {found[1]} in llama.cpp, {kl:.6f} in transformers with the decoded weights")
                check(abs(float(found[1]) - kl) < 0.03 * kl + 3e-4, f"demo {kind}: KL {found[1]}, {kl:.6f} expected")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--build", required=True)
    p.add_argument("--llama-cpp", required=True)
    p.add_argument("--bin")
    p.add_argument("--text", default=os.path.join(whole.ROOT, "recipes", "demo-model", "samples.txt"))
    p.add_argument("--convert", nargs=2, help=argparse.SUPPRESS)
    a = p.parse_args()
    source, build = os.path.abspath(a.llama_cpp), os.path.abspath(a.build)
    if a.convert:
        convert(source, *a.convert)
        return 0
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as tmp:
        for name in whole.MODELS:
            folder = os.path.join(tmp, name)
            whole.make(name, folder)
            r = whole.dump(build, folder, folder)
            check(r.returncode == 0, f"{name}: {r.stderr.decode()}")
            theirs = folder + ".theirs.gguf"
            r = subprocess.run([sys.executable, __file__, "--build", build, "--llama-cpp", source, "--convert", folder, theirs],
                               capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.path.join(source, "gguf-py")})
            if r.returncode != 0:
                check(False, f"{name}: llama.cpp's converter: {r.stderr[-600:]}")
                continue
            compare(name, folder + ".gguf", theirs)
        if a.bin:
            runs(build, os.path.abspath(a.bin), tmp, a.text)
    print("llama_cpp:", "ok" if not checks.failed else f"{checks.failed} failed")
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
