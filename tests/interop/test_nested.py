"""Nested codes (lib/run/nested.md) against a reader in numpy, and one file at every width against models of plain weights.

    python tests/interop/test_nested.py --build BUILD_DIR

The demo model is written by quantize --format nested at 4 bits. Then, for each width that it is read at:
  - numpy, by the formula of nested.md and reading no more than the pieces of that width, gives weights; written as a plain model in
    float32 they give the perplexity that moecompress eval --read-bits gives, to the last digits that float32 sums keep;
  - so does config.json's read_bits, and moecompress reads no bytes of the planes that are left out: these are overwritten;
  - what is left of the weights gets smaller with each bit, and the base is nearly as good as a 2-bit file of its own.
A plane that is missing, a scale too few and a width that there is not are refused. Exit 0: nothing differs.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile

import numpy as np
from safetensors.numpy import save_file

HERE = os.path.dirname(os.path.abspath(__file__))
DEMO = os.path.join(HERE, "..", "..", "recipes", "demo-model")


def run(program, *args, fails=None):
    p = subprocess.run([program, *args], capture_output=True, text=True)
    if fails is None:
        assert p.returncode == 0, f"{args}: {p.stderr}"
    else:
        assert p.returncode != 0 and fails in p.stderr, f"{args}: expected '{fails}': {p.stderr}"
    return p.stdout


def bf16(a):
    """U16 of bfloat16 as float32."""
    return (a.astype(np.uint32) << 16).view(np.float32)


def load(path):
    """Tensors as numpy has them, bfloat16 as float32."""
    with open(path, "rb") as f:
        n = int.from_bytes(f.read(8), "little")
        head, data = json.loads(f.read(n)), f.read()
    kinds = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32, "U8": np.uint8}
    out = {}
    for name, t in head.items():
        if name == "__metadata__":
            continue
        a = np.frombuffer(data[slice(*t["data_offsets"])], kinds[t["dtype"]]).reshape(t["shape"])
        out[name] = bf16(a) if t["dtype"] == "BF16" else a
    return out


def tensors(folder):
    out = {}
    for name in sorted(os.listdir(folder)):
        if name.endswith(".safetensors"):
            out |= load(os.path.join(folder, name))
    return out


def read(t, module, width):
    base, scales = t[module + ".nested_base"], t[module + ".nested_scales"]
    width = min(width, 1 + len(scales))
    scales = scales[:width - 1].astype(np.float32)
    rows, cols = base.shape[0], 4 * base.shape[1]
    group = cols // scales.shape[2]
    u = (base[:, :, None] >> np.array([0, 2, 4, 6], np.uint8) & 3).reshape(rows, cols)
    w = np.repeat(scales[0], group, 1) * (u.astype(np.float32) - 2)
    if width > 2:
        bits = np.unpackbits(t[module + ".nested_planes"][:width - 2], axis=2, bitorder="little").astype(np.float32)
        for k in range(width - 2):
            w += np.repeat(scales[k + 1], group, 1) * (bits[k] - np.float32(0.5))
    return w


def plain(folder, t, width, out):
    """A model in float32 of the weights at one width."""
    os.makedirs(out)
    modules = [k[:-len(".nested_base")] for k in t if k.endswith(".nested_base")]
    made = {k: np.ascontiguousarray(v, np.float32) for k, v in t.items() if ".nested_" not in k}
    for m in modules:
        made[m + ".weight"] = read(t, m, width)
    save_file(made, os.path.join(out, "model.safetensors"))
    config = json.load(open(os.path.join(folder, "config.json")))
    del config["quantization_config"]
    json.dump(config, open(os.path.join(out, "config.json"), "w"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(os.path.join(DEMO, name), out)
    return made


def cross_entropy(program, folder, text, *more):
    out = json.loads(run(program, "eval", folder, "--text", text, "--seq-len", "128", "--max-windows", "4", "--json", "-q", *more))
    return out["overall"]["cross_entropy"]


def edit(folder, change):
    path = os.path.join(folder, "config.json")
    config = json.load(open(path))
    change(config["quantization_config"])
    json.dump(config, open(path, "w"))


def spoil(folder, change):
    """Rewrites the shards as one, through a change of the tensors as they are in the file (raw)."""
    from safetensors import safe_open
    import torch
    from safetensors.torch import save_file as save
    t = {}
    for name in sorted(os.listdir(folder)):
        if name.endswith(".safetensors"):
            with safe_open(os.path.join(folder, name), "pt") as f:
                t |= {k: f.get_tensor(k) for k in f.keys()}
            os.remove(os.path.join(folder, name))
    change(t, torch)
    save({k: v.contiguous() for k, v in t.items()}, os.path.join(folder, "model.safetensors"))
    os.remove(os.path.join(folder, "model.safetensors.index.json"))


def main():
    args = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    args.add_argument("--build", required=True)
    program = os.path.join(args.parse_args().build, "moecompress")
    work = tempfile.mkdtemp(prefix="moec-nested-")
    try:
        text, nested = os.path.join(work, "text.txt"), os.path.join(work, "nested")
        open(text, "w").writelines(open(os.path.join(DEMO, "samples.txt")).readlines()[100:160])
        run(program, "quantize", DEMO, "--method", "clip", "--bits", "4", "--format", "nested", "--group-size", "32", "-q", "-o", nested)
        run(program, "verify", nested)
        t, original = tensors(nested), tensors(DEMO)
        last, errors = np.inf, []
        for width in (2, 3, 4):
            made = plain(nested, t, width, os.path.join(work, f"plain-{width}"))
            want = cross_entropy(program, os.path.join(work, f"plain-{width}"), text)
            got = cross_entropy(program, nested, text, "--read-bits", str(width))
            assert abs(got - want) < 1e-6, f"{width} bits: cross-entropy {got}, numpy's weights have {want}"
            error = sum(float(((made[k] - original[k]) ** 2).sum()) for k in made if ".experts." in k)
            assert error < 0.5 * last, f"{width} bits: error {error}, with one less {last}"
            last = error
            errors.append(error)
            if width == 4:
                assert cross_entropy(program, nested, text) == got
        alone = os.path.join(work, "alone")
        run(program, "quantize", DEMO, "--method", "clip", "--bits", "2", "--format", "nested", "--group-size", "32", "-q", "-o", alone)
        t2 = tensors(alone)
        assert not any(k.endswith(".nested_planes") for k in t2)
        two = sum(float(((read(t2, k[:-7], 2) - original[k]) ** 2).sum()) for k in original if ".experts." in k)
        assert two < errors[0] < 1.3 * two, f"the base has an error of {errors[0]}, a file of 2 bits {two}"

        narrow = os.path.join(work, "narrow")  # planes behind the width that is read are not looked at
        shutil.copytree(nested, narrow)
        edit(narrow, lambda q: q.update(read_bits=3))

        def dirty(t, torch):
            for k in t:
                if k.endswith(".nested_planes"):
                    t[k][1:] = 255
                if k.endswith(".nested_scales"):
                    t[k][2:] = 7.0
        spoil(narrow, dirty)
        assert cross_entropy(program, narrow, text) == cross_entropy(program, nested, text, "--read-bits", "3")
        edit(narrow, lambda q: q.update(read_bits=1))
        run(program, "inspect", narrow, fails="read_bits is 1")
        edit(narrow, lambda q: q.update(read_bits=9))
        run(program, "inspect", narrow, fails="read_bits")
        run(program, "eval", DEMO, "--text", text, "--read-bits", "3", fails="no matrix is nested")

        key = "model.layers.1.mlp.experts.3.up_proj.nested_"
        for what, change in (("planes", lambda t, torch: t.pop(key + "planes")),
                             ("planes", lambda t, torch: t.update({key + "planes": t[key + "planes"][:1]})),
                             ("scales", lambda t, torch: t.update({key + "scales": t[key + "scales"][:, :-1]})),
                             ("base", lambda t, torch: t.update({key + "base": t[key + "base"][:, :-1]}))):
            bad = os.path.join(work, "bad")
            shutil.copytree(nested, bad)
            spoil(bad, change)
            run(program, "inspect", bad, fails=key + "base")
            shutil.rmtree(bad)
        print(f"nested: widths 2, 3, 4 are read as written down; squared errors {errors[0]:.1f}, {errors[1]:.1f}, {errors[2]:.1f}, "
              f"of a 2-bit file {two:.1f}")
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    sys.exit(main())
