"""Latent attention (MLA) in its two forms at calibration lengths: keys and values built from the latents, or their matrices
absorbed into queries and outputs. CPU microseconds a token and head, DeepSeek-V3's sizes, numpy with its BLAS, float32.

    python tests/bench/latent_forms.py [--heads N] [--repeat N]

Causal masking and softmax are the same in both and left out; so is everything before the latents.
"""
import argparse
import os
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
import numpy as np

RANK, NOPE, ROPE, VALUE = 512, 128, 64, 128


def built(latent, rope_key, q, kv_b, heads):
    out = np.empty((latent.shape[0], heads, VALUE), np.float32)
    for h in range(heads):
        kv = latent @ kv_b[h].T                      # [n, nope + value]
        k = np.concatenate((kv[:, :NOPE], rope_key), 1)
        out[:, h] = (q[:, h] @ k.T) @ kv[:, NOPE:]
    return out


def absorbed(latent, rope_key, q, kv_b, heads):
    out = np.empty((latent.shape[0], heads, VALUE), np.float32)
    k = np.concatenate((latent, rope_key), 1)        # [n, rank + rope], of all heads
    for h in range(heads):
        wide = np.concatenate((q[:, h, :NOPE] @ kv_b[h, :NOPE], q[:, h, NOPE:]), 1)
        out[:, h] = ((wide @ k.T) @ latent) @ kv_b[h, NOPE:].T
    return out


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--heads", type=int, default=8)
    ap.add_argument("--repeat", type=int, default=3)
    a = ap.parse_args()
    rng = np.random.default_rng(1)
    make = lambda *shape: rng.standard_normal(shape, np.float32)
    kv_b = make(a.heads, NOPE + VALUE, RANK) / np.float32(RANK ** 0.5)
    print("tokens  built  absorbed  ratio   largest relative difference")
    for n in (512, 1024, 2048, 4096):
        x = make(n, RANK), make(n, ROPE), make(n, a.heads, NOPE + ROPE)
        best, result = {}, {}
        for form in (built, absorbed):
            for _ in range(a.repeat):
                start = time.process_time()
                result[form] = form(*x, kv_b, a.heads)
                best[form] = min(best.get(form, 1e9), time.process_time() - start)
        off = np.abs(result[built] - result[absorbed]).max() / np.abs(result[built]).max()
        us = [best[f] / (n * a.heads) * 1e6 for f in (built, absorbed)]
        print(f"{n:6d} {us[0]:6.1f} {us[1]:9.1f} {us[1] / us[0]:6.2f}   {off:.1e}")


if __name__ == "__main__":
    main()
