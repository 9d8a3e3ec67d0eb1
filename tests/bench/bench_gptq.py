"""GPTQ of one expert against the published algorithm in torch, on the same data in the same run, one thread each.

    python tests/bench/bench_gptq.py --build BUILD_DIR [--hidden D] [--width I] [--tokens N] [--group G] [--bits B ...] [--repeat N]

torch: float32, H by one product, damping of 1 %, cholesky, cholesky_inverse, cholesky, for each matrix as the published program does,
or once for gate and up, which have the same inputs; scales from the largest value at the start of each group, columns one after the
other, the rest updated behind each block of 128. Ours: Hessian in float64, factor, scales by search with importance, static groups in
order of the diagonal, the loss, and rows to nearest where that is better, the memory of one expert used again for the next;
without sweeps and with two. What the whole loss of rounding to nearest costs besides is given apart: torch does not compute it. Medians. Losses are tr(D H D^T) of all
three matrices over tr(W H W^T). Exit 0: without sweeps it takes less CPU time than torch with one H.
"""
import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch

BLOCK = 128


def inverse_factor(x):
    h = x.T @ x
    diag = torch.arange(len(h))
    h[diag, diag] += 0.01 * h.diagonal().mean()
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)


def gptq(w, u, bits, group):
    """W' of w [rows,cols] without zero points."""
    w, out, top = w.clone(), torch.empty_like(w), 2 ** bits - 1
    zero, scale = 2 ** (bits - 1), None
    for lo in range(0, w.shape[1], BLOCK):
        hi = min(lo + BLOCK, w.shape[1])
        part, error, factor = w[:, lo:hi].clone(), torch.empty(len(w), hi - lo), u[lo:hi, lo:hi]
        for i in range(hi - lo):
            if (lo + i) % group == 0:
                scale = 2 * w[:, lo + i:lo + i + group].abs().amax(1) / top
            v = part[:, i]
            q = scale * (torch.clamp(torch.round(v / scale) + zero, 0, top) - zero)
            out[:, lo + i] = q
            e = (v - q) / factor[i, i]
            part[:, i:] -= e.unsqueeze(1) @ factor[i, i:].unsqueeze(0)
            error[:, i] = e
        w[:, hi:] -= error @ u[lo:hi, hi:]
    return out


def theirs(gate, up, down, x, y, bits, group, once):
    u = inverse_factor(x)
    a = [gptq(gate, u, bits, group), gptq(up, u if once else inverse_factor(x), bits, group)]
    return a + [gptq(down, inverse_factor(y), bits, group)]


def loss(w, v, x):
    return float((x.double() @ (w.double() - v.double()).T).square().sum())


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--build", required=True)
    ap.add_argument("--hidden", type=int, default=2048)
    ap.add_argument("--width", type=int, default=768)
    ap.add_argument("--tokens", type=int, default=512)
    ap.add_argument("--group", type=int, default=128)
    ap.add_argument("--bits", type=int, nargs="+", default=[4])
    ap.add_argument("--repeat", type=int, default=3)
    a = ap.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(1)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)
    spread = np.exp(0.5 * normal(a.hidden))
    mats = [0.02 * normal(a.width, a.hidden), 0.02 * normal(a.width, a.hidden), 0.02 * normal(a.hidden, a.width)]
    mix = normal(a.hidden // 4, a.hidden) / a.hidden ** 0.5 * 2
    x = ((normal(a.tokens, a.hidden // 4) @ mix + 0.3 * normal(a.tokens, a.hidden)) * spread).astype(np.float32)
    gate = x @ mats[0].T
    y = (gate / (1 + np.exp(-gate)) * (x @ mats[1].T)).astype(np.float32)
    data = [torch.from_numpy(t) for t in (*mats, x, y)]
    whole = sum(loss(w, 0 * w, i) for w, i in zip(data[:3], (data[3], data[3], data[4])))
    print("| bits | what | CPU s | wall s | times torch (CPU, each and one H / wall) | Hessian, factor, scales, rounding; loss of nearest (CPU s) | loss |")
    print("|---|---|---|---|---|---|---|")
    slow = False
    with tempfile.NamedTemporaryFile(suffix=".f32") as f:
        for t in (*mats, x, y):
            f.write(np.ascontiguousarray(t, np.float32).tobytes())
        f.flush()
        for bits in a.bits:
            best = None
            for once in (False, True):
                cpu, wall = [], []
                for _ in range(a.repeat):
                    c, s = time.process_time(), time.perf_counter()
                    v = theirs(*data, bits, a.group, once)
                    cpu.append(time.process_time() - c)
                    wall.append(time.perf_counter() - s)
                cpu, wall = statistics.median(cpu), statistics.median(wall)
                lost = sum(loss(w, q, i) for w, q, i in zip(data[:3], v, (data[3], data[3], data[4])))
                what = "one H for gate and up" if once else "an H for each"
                print(f"| {bits} | torch, {what} | {cpu:.2f} | {wall:.2f} | | | {lost / whole:.3g} |", flush=True)
                best = best or (cpu, wall)
            first, wall_first = best
            for sweeps, mode in ((0, "f32"), (0, "bf16"), (2, "f32"), (2, "bf16")):
                words = (a.hidden, a.width, a.tokens, bits, a.group, sweeps, mode, a.repeat, f.name)
                p = subprocess.run([os.path.join(a.build, "bench", "gptq"), *map(str, words)], check=True, capture_output=True, text=True)
                t = [float(z) for z in p.stdout.split()]
                slow = slow or (sweeps == 0 and cpu < t[5])
                print(f"| {bits} | here, {sweeps} sweeps, {mode} | {t[5]:.3f} | {t[11]:.3f} | {first / t[5]:.1f}, {cpu / t[5]:.1f} / {wall_first / t[11]:.1f}, {wall / t[11]:.1f} | "
                      f"{', '.join(f'{z:.3f}' for z in t[:5])} | {t[12] / whole:.3g} (nearest {t[13] / whole:.3g}) |", flush=True)
    return slow


if __name__ == "__main__":
    sys.exit(main())
