#!/usr/bin/env python3
"""Wall time of `moecompress prune` against copying the bytes that it keeps.

    python tests/bench/bench_prune.py --build BUILD_DIR --model MODEL [--reps 5] [--remove 50%] [--out DIR]

The two alternate. Before each the file systems are synced, the time ends with another sync, and the checkpoint is in the
page cache (it is read once before). The bytes kept are those of the pruned folder itself, copied with cp -r; prune also
verifies its output before it gives it its name: that is in its time.
"""
import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time


def timed(words):
    subprocess.run(["sync"], check=True)
    start = time.perf_counter()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    subprocess.run(["sync"], check=True)
    return time.perf_counter() - start


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--build", required=True)
    ap.add_argument("--model", required=True)
    ap.add_argument("--reps", type=int, default=5)
    ap.add_argument("--remove", default="50%")
    ap.add_argument("--out", help="folder to work in; needs twice the pruned size")
    a = ap.parse_args()
    program = os.path.join(a.build, "moecompress")
    with tempfile.TemporaryDirectory(dir=a.out) as folder:
        stats, small, copy = (os.path.join(folder, n) for n in ("stats.h5", "small", "copy"))
        subprocess.run([program, "calibrate", a.model, "--text", os.path.join(a.model, "windows.ids"), "--tokens", "512", "-q",
                        "--floor", "1", "-o", stats], check=True, stderr=subprocess.DEVNULL)
        words = [program, "prune", a.model, "--stats", stats, "--remove", a.remove, "-o", small, "-q"]
        timed(words)  # warm-up; what it wrote is what is copied first
        size = sum(os.path.getsize(os.path.join(small, f)) for f in os.listdir(small))
        ours, theirs = [], []
        for _ in range(a.reps):
            theirs.append(timed(["cp", "-r", small, copy]))
            shutil.rmtree(copy)
            shutil.rmtree(small)
            ours.append(timed(words))
    mine, cp = statistics.median(ours), statistics.median(theirs)
    print(f"| {size / 1e9:.2f} GB kept | seconds (median of {a.reps}) | all | GB/s |\n|---|---|---|---|")
    for name, took, all_of in (("moecompress prune, with verifying", mine, ours), ("cp -r of the result", cp, theirs)):
        print(f"| {name} | {took:.2f} | {' '.join(f'{t:.2f}' for t in sorted(all_of))} | {size / took / 1e9:.2f} |")
    print(f"\nprune takes {mine / cp:.2f} times the copy")
    return 0


if __name__ == "__main__":
    sys.exit(main())
