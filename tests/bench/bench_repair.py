#!/usr/bin/env python3
"""prune --repair on one layer of Qwen3-30B-A3B's geometry: time as a multiple of that layer's plain forward, and peak memory.

    python tests/bench/bench_repair.py --build BUILD_DIR [--model MODEL] [--preset qwen3-30b-layer] [--tokens 16384]
           [--seq-len 2048] [--max-memory 4GiB] [--remove 50%] [--kinds ridge deep] [--threads 2] [--out DIR]

Without --model the layer is made by make_model.py in a temporary folder (1.3 GB, below --out) and removed in the end; its weights
are random, so only time and memory mean something. The plain forward is `eval` of the same tokens with the same number of
threads in float32 and bf16 (whole runs, reading and head included); the program runs with OMP_WAIT_POLICY=passive. A repair's own
time is the run less one with --repair none, which selects and writes the plan. Exit 1 when a run fails or its peak is above
--max-memory.
"""
import argparse
import os
import subprocess
import sys
import tempfile

from bench_deepseek import UNITS, run


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--build", required=True)
    ap.add_argument("--model")
    ap.add_argument("--preset", default="qwen3-30b-layer")
    ap.add_argument("--tokens", type=int, default=16384)
    ap.add_argument("--seq-len", type=int, default=2048)
    ap.add_argument("--max-memory", default="4GiB")
    ap.add_argument("--remove", default="50%")
    ap.add_argument("--kinds", nargs="+", default=["ridge", "deep"])
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--out")
    a = ap.parse_args()
    program = os.path.abspath(os.path.join(a.build, "moecompress"))
    here = os.path.dirname(os.path.abspath(__file__))
    limit = float(a.max_memory[:-3]) * UNITS[a.max_memory[-3:]]
    bad = 0
    with tempfile.TemporaryDirectory(dir=a.out) as work:
        model = a.model or os.path.join(work, "model")
        if not a.model:
            subprocess.run([sys.executable, os.path.join(here, "make_model.py"), model, "--preset", a.preset, "--windows",
                            str(a.tokens // a.seq_len), "--seq-len", str(a.seq_len)], check=True, stdout=subprocess.DEVNULL)
        ids = os.path.join(model, "windows.ids")
        text = ["--seq-len", str(a.seq_len), "--threads", str(a.threads), "--text", ids]

        def measure(name, words, unit=None):
            nonlocal bad
            code, wall, cpu, peak, _, said = run([program, *words])
            times = f"{wall / unit:6.2f} x" if unit else "        "
            print(f"{name:16} {wall:8.1f} s {times} {cpu:8.1f} CPU s  peak {peak / 2 ** 30:5.2f} GiB", "" if code == 0 else said, flush=True)
            bad += code != 0 or peak > limit
            return wall

        plain = measure("forward, f32", ["eval", model, "--compute", "f32", *text])
        measure("forward, bf16", ["eval", model, "--compute", "bf16", *text], plain)
        stats = os.path.join(work, "s.h5")
        measure("calibrate", ["calibrate", model, "--max-memory", a.max_memory, "-o", stats, *text], plain)
        for kind in a.kinds:
            measure(kind, ["prune", model, "--stats", stats, "--method", "energy", "--remove", a.remove, "--plan-only", "-o",
                           os.path.join(work, kind + ".json"), "--repair", kind, "--max-memory", a.max_memory, *text], plain)
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
