#!/usr/bin/env python3
"""merge of a whole model under --max-memory: wall and CPU seconds, peak memory, and whether a killed run ends in the same bytes.

    python tests/bench/bench_merge.py --build BUILD_DIR [--model MODEL] [--preset qwen3-30b-layer] [--layers 3] [--tokens 4096]
           [--seq-len 512] [--max-memory 2GiB] [--remove 50%] [--runs m-smoe:none adaptive:ridge] [--kill] [--threads 2] [--out DIR]

Without --model it is made by make_model.py in a temporary folder (three layers of Qwen3-30B-A3B are 3.8 GB, below --out) and removed
in the end; its weights are random, so only time and memory mean something. --runs are METHOD:REPAIR. With --kill the first of them
is done once more, killed when its first layer has been written, and continued. Times are of the whole run, the model's writing and
checking included. Exit 1 when a run fails, its peak is above --max-memory, or a continued run wrote something else.
"""
import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time

from bench_deepseek import UNITS, run


def hashes(folder):
    """Of every file, a block at a time."""
    found = {}
    for name in sorted(os.listdir(folder)):
        with open(os.path.join(folder, name), "rb") as f:
            found[name] = hashlib.file_digest(f, "sha256").hexdigest()
    return found


def kill_midway(words, work):
    """Starts the run and kills it between its first layer and its last; False: it ended before."""
    child = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ, OMP_WAIT_POLICY="passive"))
    while child.poll() is None and not os.path.exists(os.path.join(work, "layer-00000.json")):
        time.sleep(0.05)
    ended = child.poll() is not None
    child.kill()
    child.wait()
    return not ended


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--build", required=True)
    ap.add_argument("--model")
    ap.add_argument("--preset", default="qwen3-30b-layer")
    ap.add_argument("--layers", type=int, default=3)
    ap.add_argument("--tokens", type=int, default=4096)
    ap.add_argument("--seq-len", type=int, default=512)
    ap.add_argument("--max-memory", default="2GiB")
    ap.add_argument("--remove", default="50%")
    ap.add_argument("--runs", nargs="+", default=["m-smoe:none", "adaptive:ridge"])
    ap.add_argument("--kill", action="store_true")
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--out")
    a = ap.parse_args()
    program = os.path.abspath(os.path.join(a.build, "moecompress"))
    here = os.path.dirname(os.path.abspath(__file__))
    limit, bad = float(a.max_memory[:-3]) * UNITS[a.max_memory[-3:]], 0
    with tempfile.TemporaryDirectory(dir=a.out) as work:
        model, out = a.model or os.path.join(work, "model"), os.path.join(work, "out")
        if not a.model:
            subprocess.run([sys.executable, os.path.join(here, "make_model.py"), model, "--preset", a.preset, "--layers", str(a.layers),
                            "--windows", str(-(-a.tokens // a.seq_len)), "--seq-len", str(a.seq_len)], check=True,
                           stdout=subprocess.DEVNULL)
        size = sum(os.path.getsize(os.path.join(model, f)) for f in os.listdir(model) if f.endswith(".safetensors"))
        print(f"{size / 1e9:.2f} GB, {a.tokens} tokens, --max-memory {a.max_memory}, {a.threads} threads", flush=True)

        def measure(name, words):
            nonlocal bad
            code, wall, cpu, peak, _, said = run(words)
            print(f"{name:20} {wall:8.1f} s {cpu:8.1f} CPU s  peak {peak / 2 ** 20:6.0f} MiB", "" if code == 0 else said, flush=True)
            bad += code != 0 or peak > limit

        for i, which in enumerate(a.runs):
            method, repair = which.split(":")
            words = [program, "merge", model, "--method", method, "--remove", a.remove, "--repair", repair, "--max-memory", a.max_memory,
                     "--threads", str(a.threads), "--seq-len", str(a.seq_len), "--tokens", str(a.tokens), "--text",
                     os.path.join(model, "windows.ids"), "-o", out]
            measure(which, words)
            whole = hashes(out) if i == 0 and a.kill else None
            shutil.rmtree(out, ignore_errors=True)
            if whole is None:
                continue
            if not kill_midway(words, out + ".repair.partial"):
                print("the run ended before it could be killed")
                bad += 1
                continue
            measure("... continued", words)
            same = hashes(out) == whole
            print("the same bytes" if same else "OTHER BYTES")
            bad += not same
            shutil.rmtree(out, ignore_errors=True)
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
