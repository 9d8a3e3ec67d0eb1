#!/usr/bin/env python3
"""Peak memory of calibrate, eval and prune on a checkpoint that is large compared with one of its layers.

    python tests/bench/bench_memory.py --build BUILD_DIR --model MODEL [--tokens 16384] [--limits 512MiB 768MiB] [--out DIR]

MODEL comes from make_model.py --preset big4g. Peak resident memory is what the kernel reports for the process, mapped
checkpoint pages included. Every limit given to --max-memory must hold: exit 1 when a peak is above it.
"""
import argparse
import os
import shutil
import subprocess
import sys
import tempfile

UNITS = {"KiB": 2 ** 10, "MiB": 2 ** 20, "GiB": 2 ** 30}


def run(words):
    """Exit code, peak resident bytes and CPU seconds of one child."""
    child = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    text = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return child.returncode, usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime, text.strip().splitlines()[-1:]


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--build", required=True)
    ap.add_argument("--model", required=True)
    ap.add_argument("--tokens", type=int, default=16384)
    ap.add_argument("--limits", nargs="*", default=["512MiB", "768MiB"])
    ap.add_argument("--threads", default="2")
    ap.add_argument("--out", help="folder for what is written; needs the model's size in space")
    ap.add_argument("--verbs", nargs="+", default=["calibrate", "eval", "prune"])
    a = ap.parse_args()
    size = sum(os.path.getsize(os.path.join(a.model, f)) for f in os.listdir(a.model) if f.endswith(".safetensors"))
    layers = max(os.path.getsize(os.path.join(a.model, f)) for f in os.listdir(a.model) if f.endswith(".safetensors"))
    program, failed = os.path.join(a.build, "moecompress"), 0
    print(f"{os.path.basename(os.path.normpath(a.model))}: {size / 1e9:.2f} GB, largest layer {layers / 1e6:.0f} MB, "
          f"{a.tokens} tokens in windows of 512, {a.threads} threads\n")
    print("| what | --max-memory | peak memory | of the checkpoint | CPU seconds |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(dir=a.out) as folder:
        stats, small = os.path.join(folder, "stats.h5"), os.path.join(folder, "small")
        common = ["--threads", a.threads, "-q"]
        text = ["--text", os.path.join(a.model, "windows.ids"), "--seq-len", "512", "--tokens", str(a.tokens)]
        verbs = {
            "calibrate": ["calibrate", a.model, *text, "-o", stats, "--overwrite", "--compute", "bf16"],
            "eval": ["eval", a.model, *text, "--compute", "bf16"],
            "prune": ["prune", a.model, "--stats", stats, "--remove", "50%", "-o", small],
        }
        if "prune" in a.verbs and "calibrate" not in a.verbs:
            run([program, *verbs["calibrate"], *common])
        for name in a.verbs:
            for limit in [None, *a.limits]:
                shutil.rmtree(small, ignore_errors=True)
                code, peak, cpu, said = run([program, *verbs[name], *common, *(["--max-memory", limit] if limit else [])])
                if code == 4 and limit:
                    print(f"| {name} | {limit} | refused: {said[0].split('error: ')[-1]} | | |", flush=True)
                    continue
                print(f"| {name} | {limit or 'none'} | {peak / 1e6:.0f} MB | {100 * peak / size:.1f} % | {cpu:.1f} |", flush=True)
                if code != 0 or (limit and peak > float(limit[:-3]) * UNITS[limit[-3:]]):
                    failed += 1
                    print(f"\nFAILED: exit code {code}, {said}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
