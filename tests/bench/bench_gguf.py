#!/usr/bin/env python3
"""quantize --format gguf of a whole model: MB of the checkpoint a CPU second and a second, and peak memory.

    python tests/bench/bench_gguf.py --build BUILD_DIR [--model MODEL] [--preset qwen3-30b-layer] [--layers 1] [--tokens 1024]
           [--types q2_k q3_k q4_k q4_0 q8_0] [--threads 1] [--rival LLAMA_QUANTIZE] [--out DIR]

Without --model it is made by make_model.py in a temporary folder below --out; its weights are random, so only time and memory mean
something. Each type is written twice: without statistics, and weighted by those of --tokens tokens (calibrate --tier 1, its time not
counted). Whole runs: reading the checkpoint, writing, syncing and checking the file included. --rival: llama-quantize of llama.cpp, which
makes the same types (--pure, head and embeddings too) from a BF16 GGUF, and weighted ones by our importance matrix. Exit 1 when a run fails, its peak is above
1 GiB, or a file has another size than the same type's before.
"""
import argparse
import os
import subprocess
import sys
import tempfile

from bench_deepseek import run


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--build", required=True)
    ap.add_argument("--model")
    ap.add_argument("--preset", default="qwen3-30b-layer")
    ap.add_argument("--layers", type=int, default=1)
    ap.add_argument("--tokens", type=int, default=1024)
    ap.add_argument("--types", nargs="+", default=["q2_k", "q3_k", "q4_k", "q4_0", "q8_0"])
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--rival")
    ap.add_argument("--out")
    a = ap.parse_args()
    program = os.path.abspath(os.path.join(a.build, "moecompress"))
    here = os.path.dirname(os.path.abspath(__file__))
    bad = 0
    with tempfile.TemporaryDirectory(dir=a.out) as work:
        model, stats, out = a.model or os.path.join(work, "model"), os.path.join(work, "stats.h5"), os.path.join(work, "out.gguf")
        if not a.model:
            subprocess.run([sys.executable, os.path.join(here, "make_model.py"), model, "--preset", a.preset, "--layers", str(a.layers),
                            "--windows", str(-(-a.tokens // 256)), "--seq-len", "256"], check=True, stdout=subprocess.DEVNULL)
        subprocess.run([program, "calibrate", model, "--tier", "1", "--text", os.path.join(model, "windows.ids"), "--seq-len", "256", "-q",
                        "-o", stats], check=True, stderr=subprocess.DEVNULL)
        whole, matrix = os.path.join(work, "bf16.gguf"), os.path.join(work, "imatrix.gguf")
        if a.rival:
            subprocess.run([program, "quantize", model, "--format", "gguf", "--types", "bf16", "-q", "-o", whole], check=True,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            subprocess.run([program, "stats", "export", stats, "--imatrix", matrix, "-q"], check=True, stdout=subprocess.DEVNULL)
        size = sum(os.path.getsize(os.path.join(model, f)) for f in os.listdir(model) if f.endswith(".safetensors"))
        print(f"{size / 1e6:.0f} MB, {a.threads} threads\n")
        print("| type | wall s | CPU s | MB a CPU s | MB a s | peak MiB |\n|---|---|---|---|---|---|", flush=True)
        for kind in a.types:
            written = set()
            for weighted in (False, True):
                code, wall, cpu, peak, _, said = run([program, "quantize", model, "--format", "gguf", "--types", kind, "--threads",
                                                      str(a.threads), "-q", "-o", out, *(["--stats", stats] if weighted else [])])
                name = kind + (", weighted" if weighted else "")
                print(f"| {name} | {wall:.1f} | {cpu:.1f} | {size / cpu / 1e6:.0f} | {size / wall / 1e6:.0f} | {peak / 2 ** 20:.0f} |", flush=True)
                if code != 0 or peak > 2 ** 30:
                    print(f"\nFAILED: exit code {code}, {said}\n")
                    bad += 1
                if a.rival:
                    code, wall, cpu, peak, _, said = run([a.rival, *(["--imatrix", matrix] if weighted else []), "--pure", whole, out + ".theirs",
                                                          kind.upper(), str(a.threads)])
                    print(f"| llama-quantize {name} | {wall:.1f} | {cpu:.1f} | {size / cpu / 1e6:.0f} | {size / wall / 1e6:.0f} | "
                          f"{peak / 2 ** 20:.0f} |", flush=True)
                    bad += code != 0
                if os.path.exists(out):
                    written.add(os.path.getsize(out) // 4096)  # the keys differ by some bytes
                    os.remove(out)
            bad += len(written) > 1
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
