#!/usr/bin/env python3
"""How far --compute bf16 is from f32: selections, pruning scores, prune sets, perplexity.

    python tests/bench/bench_bf16_drift.py --build BUILD_DIR --model MODEL[:SEQ_LEN] ... [--tokens 32768]

A model's text is MODEL/windows.ids, else MODEL/samples.txt. Selections are compared token by token: another set of experts,
and another order of the same. Scores are those of each method's plan; their largest relative difference is that of experts
that at least 32 tokens selected.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile

import numpy as np

METHODS = ("frequency", "ean-sum", "reap", "easy-ep")


def tool(build, *words):
    return subprocess.run([os.path.join(build, "moecompress"), *words, "-q"], check=True, capture_output=True, text=True).stdout


def plan(build, model, stats, method, remove):
    return json.loads(tool(build, "prune", model, "--stats", stats, "--method", method, "--remove", remove, "--plan-only"))


def read_dump(path):
    from safetensors.numpy import load_file
    return load_file(path)


def flips(build, model, ids, folder):
    """Shares of token-layers with another set of experts, and with the same set in another order."""
    dumps = []
    for compute in ("f32", "bf16"):
        path = os.path.join(folder, compute + ".safetensors")
        subprocess.run([os.path.join(build, "tests", "dump_forward"), "--compute", compute, model, ids, path], check=True)
        dumps.append(read_dump(path))
    a, b = dumps
    other = order = total = 0
    for key in a:
        if key.startswith("topk_index"):
            sets = (np.sort(a[key], 1) != np.sort(b[key], 1)).any(1)
            other += int(sets.sum())
            order += int(((a[key] != b[key]).any(1) & ~sets).sum())
            total += len(sets)
    return other / total, order / total


def windows_file(path, model, seq_len, tokens):
    """Writes windows of the model's text, `tokens` in all at most, and returns how many there are."""
    source = os.path.join(model, "windows.ids")
    if os.path.exists(source):
        with open(source, encoding="ascii") as f:
            ids = [int(w) for line in f for w in line.split()]
    else:
        from tokenizers import Tokenizer
        with open(os.path.join(model, "samples.txt"), encoding="utf-8") as f:
            ids = Tokenizer.from_file(os.path.join(model, "tokenizer.json")).encode(f.read(), add_special_tokens=False).ids
    count = min(len(ids), tokens) // seq_len
    with open(path, "w", encoding="ascii") as f:
        for i in range(count):
            f.write(" ".join(map(str, ids[i * seq_len:(i + 1) * seq_len])) + "\n")
    return count * seq_len


def drift(build, model, seq_len, tokens):
    with tempfile.TemporaryDirectory() as folder:
        ids, short = os.path.join(folder, "all.ids"), os.path.join(folder, "short.ids")
        n = windows_file(ids, model, seq_len, tokens)
        windows_file(short, model, seq_len, min(n, 8192))
        other, order = flips(build, model, short, folder)
        text = ["--text", ids, "--seq-len", str(seq_len)]
        stats, loss = {}, {}
        for compute in ("f32", "bf16"):
            stats[compute] = os.path.join(folder, compute + ".h5")
            tool(build, "calibrate", model, *text, "-o", stats[compute], "--compute", compute, "--floor", "1")
            loss[compute] = json.loads(tool(build, "eval", model, *text, "--compute", compute, "--json"))["overall"]
        print(f"\n{os.path.basename(os.path.normpath(model))}, {n} tokens: {100 * other:.2f} % of selections are another set of "
              f"experts, {100 * order:.2f} % another order; perplexity {loss['f32']['perplexity']:.4f} (f32), "
              f"{loss['bf16']['perplexity']:.4f} (bf16)\n")
        print("| method | correlation of scores | largest relative difference | experts kept otherwise, of those removed: 25 % | 50 % |")
        print("|---|---|---|---|---|")
        counts = np.array([x["score"] for x in plan(build, model, stats["f32"], "frequency", "50%")["layers"]])
        seen = counts * (n if counts.max() <= 1 else 1) >= 32
        for method in METHODS:
            a, b = (plan(build, model, stats[c], method, "50%") for c in ("f32", "bf16"))
            x, y = (np.array([layer["score"] for layer in p["layers"]]) for p in (a, b))
            per_layer = [np.corrcoef(u, v)[0, 1] for u, v in zip(x, y)]
            cells = []
            for remove in ("25%", "50%"):
                p, q = (plan(build, model, stats[c], method, remove)["layers"] for c in ("f32", "bf16"))
                changed = sum(len(set(u["keep"]) - set(v["keep"])) for u, v in zip(p, q))
                cells.append(f"{changed} of {sum(u['experts'] - len(u['keep']) for u in p)}")
            relative = np.abs(x - y)[seen] / np.abs(x)[seen]
            print(f"| {method} | {min(per_layer):.6f} (worst layer) | {relative.max():.1e} | {cells[0]} | {cells[1]} |", flush=True)


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--build", required=True)
    ap.add_argument("--model", nargs="+", required=True)
    ap.add_argument("--tokens", type=int, default=32768)
    a = ap.parse_args()
    for model in a.model:
        name, _, seq_len = model.partition(":")
        drift(a.build, name, int(seq_len or 512), a.tokens)
    return 0


if __name__ == "__main__":
    sys.exit(main())
