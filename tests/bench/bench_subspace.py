#!/usr/bin/env python3
"""Sub-MoE's merge of a group of experts: torch.linalg.svd of the matrices side by side against eigenvectors of one Gram matrix.

    python tests/bench/bench_subspace.py --build BUILD_DIR [--members 2 15] [--hidden 2048] [--width 1408] [--rank 0.5 0.1]
           [--threads 2] [--out DIR]

Both merge the three float32 matrices of random experts that have a part in common, with the same threads: torch makes U S (sum w V^T)
of [W_1 .. W_n] with the leading r, dump_fill reads the experts, merges and writes one. Times are of the merge alone, wall and CPU;
rank 1 is the weighted mean on either side. Exit 1 when results are more than 1e-4 apart (of the largest value). 15 members of
2048 x 1408 are a file of 0.5 GB, below --out.
"""
import argparse
import os
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch


def write_group(path, random, members, hidden, width):
    """gate, up [n,I,H] and down [n,H,I], and weights; experts beyond `members` there are none."""
    common = [random.standard_normal(s).astype(np.float32) for s in ((width, hidden), (width, hidden), (hidden, width))]
    weight = random.uniform(1, 2, members)
    weight /= weight.sum()
    experts = []
    with open(path, "wb") as f:
        f.write(np.array([members, hidden, width, 0, 1], np.int64).tobytes() + np.zeros(members, np.int32).tobytes())
        f.write(weight.tobytes() + np.ones(members).tobytes() + np.zeros((members, hidden), np.float32).tobytes())
        for _ in range(members):
            experts.append([c + random.standard_normal(c.shape).astype(np.float32) for c in common])
            for m in experts[-1]:
                f.write(m.tobytes())
    return [torch.from_numpy(np.stack(m)) for m in zip(*experts)], torch.from_numpy(weight.astype(np.float32))


def union(matrices, weight, rank):
    if rank >= 1:
        return torch.einsum("n,nij->ij", weight, matrices)
    n, rows, cols = matrices.shape
    r = max(1, int(np.ceil(rank * min(rows, cols))))
    u, s, v = torch.linalg.svd(torch.cat(list(matrices), dim=1), full_matrices=False)
    v = torch.einsum("n,rni->ri", weight, v[:r].reshape(r, n, cols))
    return (u[:, :r] * s[:r]) @ v


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--build", required=True)
    ap.add_argument("--members", type=int, nargs="+", default=[2, 15])
    ap.add_argument("--hidden", type=int, default=2048)
    ap.add_argument("--width", type=int, default=1408)
    ap.add_argument("--rank", type=float, nargs="+", default=[1.0, 0.5, 0.1])
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--out")
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    random, bad = np.random.default_rng(3), 0
    print(f"hidden {a.hidden}, width {a.width}, {a.threads} threads")
    print("members  rank   torch wall, CPU s   here wall, CPU s   ratio wall / CPU   apart")
    with tempfile.TemporaryDirectory(dir=a.out) as work:
        into, out = os.path.join(work, "in"), os.path.join(work, "out")
        for members in a.members:
            matrices, weight = write_group(into, random, members, a.hidden, a.width)
            for rank in a.rank:
                wall, cpu = time.perf_counter(), time.process_time()
                want = [union(m, weight, rank) for m in matrices]
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                p = subprocess.run([os.path.join(a.build, "tests", "dump_fill"), into, out, "--threads", str(a.threads),
                                    "fill=subspace", f"rank={rank}"], capture_output=True, text=True,
                                   env={**os.environ, "OMP_WAIT_POLICY": "passive"})
                if p.returncode:
                    sys.exit(p.stderr)
                here = [float(v) for v in p.stdout.split()[:2]]
                got = np.fromfile(out, np.float32, count=3 * a.hidden * a.width, offset=4 * members * a.hidden).reshape(3, -1)
                apart = max(float(np.abs(g - w.numpy().ravel()).max() / w.abs().max()) for g, w in zip(got, want))
                bad += not apart < 1e-4
                print(f"{members:7} {rank:5} {wall:10.2f} {cpu:8.2f} {here[0]:9.2f} {here[1]:8.2f} {wall / here[0]:10.1f} "
                      f"{cpu / here[1]:6.1f} {apart:12.1e}", flush=True)
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
