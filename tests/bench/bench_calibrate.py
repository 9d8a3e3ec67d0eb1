#!/usr/bin/env python3
"""Speed of `moecompress calibrate` against transformers' forward pass on the CPU: same tokens, same threads, one run.

    python tests/bench/bench_calibrate.py --build BUILD_DIR --model MODEL[:SEQ_LEN] ... [--threads 1 2] [--reps 3]
           [--tokens N] [--text FILE] [--implementations eager grouped_mm batched_mm] [--batches 1 4 8 16]

A model's text is MODEL/windows.ids (make_model.py writes it), else MODEL/samples.txt.

transformers runs the decoder without its head (calibration needs none) and collects nothing; loading is not counted, the
first batch is warm-up, and for each dtype the fastest of its experts implementations and batch sizes is found first and
then measured. moecompress collects its statistics. Its time is that of the whole process; "net" leaves out what the same
command takes on one window (starting, reading the tokenizer, checking every weight, writing the file), which is what the
transformers figure leaves out as well. All figures are medians of repetitions that alternate between the contestants.
Tokens per CPU second are per second of process time and hardly disturbed by other work on the machine.
"% of sgemm": operations of the layers' matrix products per CPU second, relative to OpenBLAS's sgemm on 2048^3 measured in
the same run.
"""
import argparse
import ctypes
import ctypes.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

CHILD_ENV = dict(os.environ, OMP_WAIT_POLICY="passive")


def sgemm_rate(threads):
    """GFLOP per CPU second and per second of OpenBLAS, in a process of its own so that its threads are right."""
    out = subprocess.run([sys.executable, os.path.abspath(__file__), "--sgemm"], check=True, capture_output=True, text=True,
                         env=dict(CHILD_ENV, OPENBLAS_NUM_THREADS=str(threads), OMP_NUM_THREADS=str(threads))).stdout
    return json.loads(out)


def sgemm_main(n=2048):
    import numpy as np
    blas = ctypes.CDLL(ctypes.util.find_library("openblas"))
    a, b, c = (np.random.default_rng(i).standard_normal((n, n), dtype=np.float32) for i in range(3))
    p = [x.ctypes.data_as(ctypes.c_void_p) for x in (a, b, c)]
    one, zero, k = ctypes.c_float(1), ctypes.c_float(0), ctypes.c_int(n)
    cpu, wall = [], []
    for _ in range(5):
        t, u = time.perf_counter(), time.process_time()
        blas.cblas_sgemm(101, 111, 111, k, k, k, one, p[0], k, p[1], k, zero, p[2], k)
        wall.append(2e-9 * n ** 3 / (time.perf_counter() - t))
        cpu.append(2e-9 * n ** 3 / (time.process_time() - u))
    print(json.dumps({"cpu": max(cpu), "wall": max(wall)}))


def operations(c, seq_len):
    """Operations of a token in the layers' matrix products and attention (causal: half of the keys)."""
    h, d = c["hidden_size"], c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    q, kv = c["num_attention_heads"] * d, c["num_key_value_heads"] * d
    experts = c.get("num_experts") or c.get("num_local_experts")
    width = c.get("moe_intermediate_size") or c["intermediate_size"]
    layer = h * (2 * q + 2 * kv) + 3 * c["num_experts_per_tok"] * h * width + h * experts + 2 * q * (seq_len + 1) / 2
    return 2.0 * layer * c["num_hidden_layers"]


def read_windows(model, seq_len, tokens, text, folder):
    """Windows as lists, and an .ids file of them."""
    path = text or os.path.join(model, "windows.ids")
    if path.endswith(".ids") and os.path.exists(path):
        with open(path, encoding="ascii") as f:
            windows = [list(map(int, line.split()))[:seq_len] for line in f]
    else:
        from tokenizers import Tokenizer
        with open(text or os.path.join(model, "samples.txt"), encoding="utf-8") as f:
            ids = Tokenizer.from_file(os.path.join(model, "tokenizer.json")).encode(f.read(), add_special_tokens=False).ids
        windows = [ids[i:i + seq_len] for i in range(0, len(ids) - seq_len + 1, seq_len)]
    windows = [w for w in windows if len(w) == seq_len][:max(1, tokens // seq_len)]
    paths = []
    for name, part in (("all.ids", windows), ("one.ids", windows[:1])):
        paths.append(os.path.join(folder, name))
        with open(paths[-1], "w", encoding="ascii") as f:
            f.writelines(" ".join(map(str, w)) + "\n" for w in part)
    return windows, paths


def run_ours(build, model, ids, seq_len, compute, threads, folder):
    words = [os.path.join(build, "moecompress"), "calibrate", model, "--text", ids, "--seq-len", str(seq_len), "--compute",
             compute, "--threads", str(threads), "-o", os.path.join(folder, "stats.h5"), "--overwrite", "-q"]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=CHILD_ENV)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


class Theirs:
    """transformers' decoder in one dtype."""

    def __init__(self, model, dtype):
        import torch
        import transformers
        transformers.utils.logging.disable_progress_bar()
        self.torch = torch
        self.model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval().model

    def run(self, windows, batch, implementation):
        self.model.set_experts_implementation(implementation)
        with self.torch.no_grad():
            self.model(self.torch.tensor(windows[:batch]), use_cache=False)
            start, cpu = time.perf_counter(), time.process_time()
            for i in range(0, len(windows), batch):
                self.model(self.torch.tensor(windows[i:i + batch]), use_cache=False)
            return time.perf_counter() - start, time.process_time() - cpu

    def best(self, windows, batches, implementations):
        found, tried = None, []
        for implementation in implementations:
            for batch in batches:
                part = windows[:max(batch, min(len(windows), 4))]
                try:
                    wall, cpu = self.run(part, batch, implementation)
                except Exception as e:  # an implementation may not know this dtype on the CPU
                    tried.append(f"{implementation} does not run: {str(e).splitlines()[0][:80]}")
                    break
                rate = sum(map(len, part)) / cpu
                tried.append(f"{implementation}/{batch} {rate:.0f}")
                if found is None or rate > found[0]:
                    found = (rate, batch, implementation)
        return found[1], found[2], ", ".join(tried)


def measure(a, model, seq_len, folder):
    import torch
    windows, (ids, one) = read_windows(model, seq_len, a.tokens, a.text, folder)
    n = sum(map(len, windows))
    with open(os.path.join(model, "config.json"), encoding="utf-8") as f:
        flop = operations(json.load(f), seq_len)
    print(f"\n{os.path.basename(os.path.normpath(model))}: {n} tokens in windows of {seq_len}, "
          f"{flop / 1e6:.1f} million operations a token\n", flush=True)
    theirs = {d: Theirs(model, d) for d in ("float32", "bfloat16")}
    print("| threads | what | tokens/s | tokens per CPU s | times transformers (wall / CPU) | of sgemm |")
    print("|---|---|---|---|---|---|", flush=True)
    for threads in a.threads:
        torch.set_num_threads(threads)
        best, chosen = {}, {}
        for d, t in theirs.items():
            batch, implementation, tried = t.best(windows, a.batches, a.implementations)
            best[d] = (batch, implementation)
            chosen[d] = f"transformers {d}, {implementation}, batch {batch}"
            print(f"{threads} threads, {d}, tokens per CPU second: {tried}", file=sys.stderr, flush=True)
        took = {}
        peak = []
        for _ in range(a.reps):
            peak.append(sgemm_rate(threads))
            for compute in ("f32", "bf16"):
                whole = run_ours(a.build, model, ids, seq_len, compute, threads, folder)
                start = run_ours(a.build, model, one, seq_len, compute, threads, folder)
                took.setdefault(f"moecompress {compute}", []).append(whole)
                took.setdefault(f"moecompress {compute}, net", []).append(
                    tuple((x - y) * n / (n - seq_len) for x, y in zip(whole, start)))
            for d, t in theirs.items():
                took.setdefault(chosen[d], []).append(t.run(windows, *best[d]))
        rate = {k: (n / statistics.median(w for w, _ in v), n / statistics.median(c for _, c in v)) for k, v in took.items()}
        gemm = max(p["cpu"] for p in peak)
        for name, (wall, cpu) in rate.items():
            against = rate[chosen["bfloat16" if "bf16" in name else "float32"]]
            ratio = f"{wall / against[0]:.2f} / {cpu / against[1]:.2f}" if name.startswith("moecompress") else ""
            print(f"| {threads} | {name} | {wall:.0f} | {cpu:.0f} | {ratio} | {flop * cpu / gemm / 1e7:.0f} % |", flush=True)
        print(f"{threads} threads: sgemm {gemm:.1f} GFLOP per CPU second", file=sys.stderr, flush=True)


def main():
    if "--sgemm" in sys.argv:
        return sgemm_main()
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--build", required=True)
    ap.add_argument("--model", nargs="+", required=True, help="folder, with :SEQ_LEN when not 512")
    ap.add_argument("--text", help="an .ids file or a text, in place of the model's own")
    ap.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    ap.add_argument("--reps", type=int, default=3)
    ap.add_argument("--tokens", type=int, default=16384)
    ap.add_argument("--implementations", nargs="+", default=["eager", "grouped_mm", "batched_mm"])
    ap.add_argument("--batches", nargs="+", type=int, default=[1, 4, 8, 16])
    a = ap.parse_args()
    for model in a.model:
        name, _, seq_len = model.partition(":")
        with tempfile.TemporaryDirectory() as folder:
            measure(a, name, int(seq_len or 512), folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
