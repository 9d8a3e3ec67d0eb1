#!/usr/bin/env python3
"""calibrate on one layer of DeepSeek-V3's geometry: tokens a second, peak memory and bytes read, under --max-memory.

    python tests/bench/bench_deepseek.py --build BUILD_DIR [--model MODEL] [--preset deepseek-layer] [--tokens 16384]
           [--seq-len 2048] [--max-memory 6GiB] [--threads 2] [--compute bf16 f32] [--cold] [--out DIR]

Without --model the layer is made by make_model.py in a temporary folder (11.7 GB, below --out) and removed in the end. Peak
resident memory is what the kernel reports for the process, mapped checkpoint pages included. "Read from disk" is 0 for what
the page cache holds; with --cold the kernel is asked to forget the model before each run. Exit 1 when a run fails or its peak
is above --max-memory.
"""
import argparse
import os
import subprocess
import sys
import tempfile
import time

UNITS = {"KiB": 2 ** 10, "MiB": 2 ** 20, "GiB": 2 ** 30}


def forget(folder):
    """Asks the kernel to drop the files from the page cache, so that the disk is part of the measurement."""
    for name in os.listdir(folder):
        fd = os.open(os.path.join(folder, name), os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def run(words):
    """Exit code, wall and CPU seconds, peak resident bytes, bytes from the disk, last line said."""
    start = time.perf_counter()
    child = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                             env=dict(os.environ, OMP_WAIT_POLICY="passive"))
    text = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return (child.returncode, time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024,
            usage.ru_inblock * 512, text.strip().splitlines()[-1:])


def measure(a, model, folder):
    size = sum(os.path.getsize(os.path.join(model, f)) for f in os.listdir(model) if f.endswith(".safetensors"))
    limit, failed = float(a.max_memory[:-3]) * UNITS[a.max_memory[-3:]], 0
    print(f"{os.path.basename(os.path.normpath(model))}: {size / 1e9:.2f} GB, {a.tokens} tokens in windows of {a.seq_len}, "
          f"--max-memory {a.max_memory}, {a.threads} threads\n")
    print("| compute | tokens/s | tokens per CPU s | peak memory | read from disk |\n|---|---|---|---|---|", flush=True)
    for compute in a.compute:
        if a.cold:
            forget(model)
        code, wall, cpu, peak, read, said = run(
            [os.path.join(a.build, "moecompress"), "calibrate", model, "--text", os.path.join(model, "windows.ids"),
             "--seq-len", str(a.seq_len), "--tokens", str(a.tokens), "--compute", compute, "--threads", str(a.threads),
             "--max-memory", a.max_memory, "-o", os.path.join(folder, "stats.h5"), "--overwrite", "--no-resume", "-q"])
        print(f"| {compute} | {a.tokens / wall:.0f} | {a.tokens / cpu:.0f} | {peak / 1e9:.2f} GB | {read / 1e9:.1f} GB |",
              flush=True)
        if code != 0 or peak > limit:
            failed += 1
            print(f"\nFAILED: exit code {code}, {said}\n", flush=True)
    return failed


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--build", required=True)
    ap.add_argument("--model", help="what make_model.py made earlier; it stays")
    ap.add_argument("--preset", default="deepseek-layer", choices=["deepseek-layer", "deepseek-small"])
    ap.add_argument("--tokens", type=int, default=16384)
    ap.add_argument("--seq-len", type=int, default=2048)
    ap.add_argument("--max-memory", default="6GiB")
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--compute", nargs="+", default=["bf16", "f32"], choices=["bf16", "f32"])
    ap.add_argument("--cold", action="store_true", help="ask the kernel to forget the model before each run")
    ap.add_argument("--out", help="folder for what is written")
    a = ap.parse_args()
    with tempfile.TemporaryDirectory(dir=a.out) as folder:
        model = a.model
        if not model:
            model = os.path.join(folder, "model")
            maker = os.path.join(os.path.dirname(os.path.abspath(__file__)), "make_model.py")
            subprocess.run([sys.executable, maker, model, "--preset", a.preset, "--seq-len", str(a.seq_len), "--windows",
                            str(-(-a.tokens // a.seq_len))], check=True, stdout=sys.stderr)
        return 1 if measure(a, model, folder) else 0


if __name__ == "__main__":
    sys.exit(main())
