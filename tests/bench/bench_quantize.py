#!/usr/bin/env python3
"""calibrate --errors and quantize of a whole model under --max-memory: seconds, parameters a CPU second and peak memory.

    python tests/bench/bench_quantize.py --build BUILD_DIR [--model MODEL] [--preset qwen3-30b-layer] [--layers 1] [--tokens 4096]
           [--seq-len 512] [--max-memory 3GiB] [--runs errors gptq:4 direct:2.5] [--options "--sweeps 0"] [--threads 2]
           [--rival PYTHON] [--out DIR]

Without --model it is made by make_model.py in a temporary folder (a layer of Qwen3-30B-A3B is 1.3 GB, below --out) and removed in
the end; its weights are random, so only time and memory mean something. --runs: `errors`, or METHOD:BITS, which take the statistics
of `errors` where that ran before them, and otherwise measure what they need themselves. --options go to each METHOD:BITS. --rival: a
Python with llmcompressor, whose GPTQ (W4A16, all linears but router and head) rounds the same model by the same ids; its time is that
of oneshot() alone, imports and loading left out. Ours is of whole runs, the output's writing and checking included. Parameters are
those of all matrices that are rounded. A run that is refused with exit code 4 is said so and does not fail. Exit 1 when a run fails
or its peak is above --max-memory.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile

from bench_deepseek import UNITS, run

RIVAL = """
import json, os, resource, sys, time
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
folder, threads = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(threads)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
rows = [[int(i) for i in line.split()] for line in open(os.path.join(folder, "windows.ids"))]
text = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(r) for r in rows]})
how = GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head", "re:.*mlp.gate$"])
cpu, wall = time.process_time(), time.perf_counter()
oneshot(model=model, dataset=text, recipe=how, max_seq_length=len(rows[0]), num_calibration_samples=len(rows))
print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))
"""


def parameters(model, experts_only):
    """Of the routed experts' matrices; with all layers' other linears where a rival takes these, too."""
    with open(os.path.join(model, "config.json")) as f:
        c = json.load(f)
    n = 3 * c["num_experts"] * c["hidden_size"] * c["moe_intermediate_size"]
    if not experts_only:
        n += 2 * c["hidden_size"] * c["head_dim"] * (c["num_attention_heads"] + c["num_key_value_heads"])
    return n * c["num_hidden_layers"]


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--build", required=True)
    ap.add_argument("--model")
    ap.add_argument("--preset", default="qwen3-30b-layer")
    ap.add_argument("--layers", type=int, default=1)
    ap.add_argument("--tokens", type=int, default=4096)
    ap.add_argument("--seq-len", type=int, default=512)
    ap.add_argument("--max-memory", default="3GiB")
    ap.add_argument("--runs", nargs="+", default=["errors", "gptq:4", "direct:2.5"])
    ap.add_argument("--options", default="")
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--rival")
    ap.add_argument("--out")
    a = ap.parse_args()
    program = os.path.abspath(os.path.join(a.build, "moecompress"))
    here = os.path.dirname(os.path.abspath(__file__))
    limit, bad = float(a.max_memory[:-3]) * UNITS[a.max_memory[-3:]], 0
    with tempfile.TemporaryDirectory(dir=a.out) as work:
        model, out, stats = a.model or os.path.join(work, "model"), os.path.join(work, "out"), os.path.join(work, "stats.h5")
        if not a.model:
            subprocess.run([sys.executable, os.path.join(here, "make_model.py"), model, "--preset", a.preset, "--layers", str(a.layers),
                            "--windows", str(-(-a.tokens // a.seq_len)), "--seq-len", str(a.seq_len)], check=True,
                           stdout=subprocess.DEVNULL)
        ours = parameters(model, True)
        print(f"{ours / 1e6:.0f} M parameters in routed experts, {a.tokens} tokens, --max-memory {a.max_memory}, {a.threads} threads\n")
        print("| run | wall s | CPU s | M parameters a CPU s, a wall s | peak MiB |\n|---|---|---|---|---|", flush=True)

        def show(name, n, wall, cpu, peak):
            print(f"| {name} | {wall:.1f} | {cpu:.1f} | {n / cpu / 1e6:.2f}, {n / wall / 1e6:.2f} | {peak / 2 ** 20:.0f} |", flush=True)

        common = ["--text", os.path.join(model, "windows.ids"), "--tokens", str(a.tokens), "--seq-len", str(a.seq_len), "--max-memory",
                  a.max_memory, "--threads", str(a.threads), "-q"]
        for which in a.runs:
            if which == "errors":
                words = [program, "calibrate", model, "--errors", "-o", stats, *common]
            else:
                method, bits = which.split(":")
                known = ["--stats", stats] if os.path.exists(stats) else []
                words = [program, "quantize", model, "--method", method, "--bits", bits, *known, *common, *a.options.split(), "-o", out]
            code, wall, cpu, peak, _, said = run(words)
            show(which, ours, wall, cpu, peak)
            if code == 4:
                print(f"\nrefused: {said}\n")
            elif code != 0 or peak > limit:
                print(f"\nFAILED: exit code {code}, {said}\n")
                bad += 1
            shutil.rmtree(out, ignore_errors=True)
            if os.path.exists(out + ".stats.h5"):
                os.remove(out + ".stats.h5")
        if a.rival:
            p = subprocess.run([a.rival, "-c", RIVAL, model, str(a.threads)], capture_output=True, text=True, cwd=work)
            if p.returncode == 0:
                show("llm-compressor GPTQ, 4 bits", parameters(model, False), *json.loads(p.stdout.strip().splitlines()[-1]))
            else:
                print("the rival failed:", p.stderr.strip().splitlines()[-1:])
                bad += 1
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
