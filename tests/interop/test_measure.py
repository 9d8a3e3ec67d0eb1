"""What widths cost experts, against transformers: checkpoints of families that differ in it, and the gains of a few layers.

    python tests/interop/test_measure.py --build BUILD_DIR [--only NAME] [--keep DIR]

One expert's matrices are replaced by what the grid makes of them (build/tests/dump_quant) in a model of transformers; what its MoE
block then returns for the original's inputs is compared with what it returned before. Sums over tokens, divided by the residual
stream's mean square, must be quant_sq, and sums over windows of their roots quant_fro, within 1e-4. All experts of a layer at 2
bits give quant_kl within 1e-3. Then: the same bytes from one thread and from two, with little memory, and after kills.
Exit 0: nothing differs.
"""
import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import families
import h5py
import numpy as np
import torch

LIMIT, KL_LIMIT = 1e-4, 1e-3
ROWS = ["qwen3_moe", "deepseek_v3", "qwen2_moe", "gpt_oss", "llama4_text", "granitemoeshared"]
WIDTHS = [1, 2, 3, 4, 8]
PARTS = [("gate",), ("up",), ("down",), ("gate", "up", "down")]
GROUP = 32


class Row:
    def __init__(self, a, spec, work):
        self.a, self.spec, self.work, self.wrong = a, dict(spec, dtype="float32"), work, []
        self.source = os.path.join(work, "source")
        families.write(self.spec, self.source, "5", seed=families.seed_of(spec))
        self.windows = families.windows_of(7)
        self.ids = os.path.join(work, "windows.ids")
        with open(self.ids, "w", encoding="ascii") as f:
            f.writelines(" ".join(map(str, w)) + "\n" for w in self.windows)
        self.tensors = families.read_tensors(self.source)

    def check(self, ok, what):
        if not ok:
            self.wrong.append(what)

    def tool(self, *args, threads="1"):
        return subprocess.run([os.path.join(self.a.build, "moecompress"), *args], capture_output=True, text=True,
                              env=dict(os.environ, OMP_NUM_THREADS=threads))

    def calibrate(self, out, *more, group=GROUP, threads="1"):
        p = self.tool("calibrate", self.source, "--text", "t=" + self.ids, "-o", out, "--errors", "--group-size", str(group), "-q",
                      *more, threads=threads)
        if p.returncode:
            raise RuntimeError(p.stderr.strip())
        return out

    # --- models with experts in few bits ---

    def grid(self, w, bits):
        """[out,in] of the grid."""
        w = np.ascontiguousarray(w.float().numpy())
        p = subprocess.run([os.path.join(self.a.build, "tests", "dump_quant"), *map(str, (*w.shape, GROUP, bits))], input=w.tobytes(),
                           capture_output=True, check=True)
        return torch.from_numpy(np.frombuffer(p.stdout, np.float32).reshape(w.shape).copy())

    def views(self, model, layer, e):
        """gate, up and down of an expert as transformers has them, as views [out,in] of its parameters."""
        x = block_of(model, layer).experts if hasattr(block_of(model, layer), "experts") else None
        if x is None:  # granite
            x = block_of(model, layer)
            both, down = x.input_linear.weight.data[e], x.output_linear.weight.data[e]
            n = both.shape[0] // 2
            return {"gate": both[:n], "up": both[n:], "down": down}
        both, down = x.gate_up_proj.data[e], x.down_proj.data[e]
        if self.spec["name"] == "gpt_oss":
            return {"gate": both[:, 0::2].T, "up": both[:, 1::2].T, "down": down.T}
        if self.spec["name"] == "llama4_text":
            n = both.shape[1] // 2
            return {"gate": both[:, :n].T, "up": both[:, n:].T, "down": down.T}
        n = both.shape[0] // 2
        return {"gate": both[:n], "up": both[n:], "down": down}

    def quantized(self, model, layer, e, part, bits):
        """Replaces; returns what was there."""
        old = {}
        for name, w in self.views(model, layer, e).items():
            if name in part:
                old[name] = w.clone()
                w.copy_(self.grid(w, bits))
        return old

    def restore(self, model, layer, e, old):
        for name, w in self.views(model, layer, e).items():
            if name in old:
                w.copy_(old[name])


def block_of(model, layer):
    x = model.model.layers[layer]
    for name in ("mlp", "feed_forward", "block_sparse_moe"):
        if hasattr(x, name):
            return getattr(x, name)
    raise ValueError("no MoE block")


def output(block, x):
    y = block(x)
    return (y[0] if isinstance(y, tuple) else y).reshape(x.shape).double()


def run(model, windows):
    """Inputs of every block, residual streams behind layers, log-probabilities; one list entry a window."""
    layers = range(len(model.model.layers))
    x, h, logp, hooks = {l: [] for l in layers}, {l: [] for l in layers}, [], []
    for l in layers:
        hooks.append(block_of(model, l).register_forward_pre_hook(lambda m, a, l=l: x[l].append(a[0].detach().clone())))
        hooks.append(model.model.layers[l].register_forward_hook(
            lambda m, a, o, l=l: h[l].append((o[0] if isinstance(o, tuple) else o).detach().reshape(-1, o.shape[-1]).double())))
    for w in windows:
        logp.append(model(torch.tensor([w])).logits[0].double().log_softmax(-1))
    for hook in hooks:
        hook.remove()
    return x, h, logp


def close(a, b, limit):
    return abs(a - b) <= limit * max(abs(a), abs(b)) + 1e-12


def experts_of(f, l, n):
    """The most and the least used, and some between."""
    used = f["domains/t/t0/selected"][l]
    order = [int(e) for e in np.argsort(used) if used[e]]
    return sorted({order[0], order[len(order) // 2], order[-1]})[:n]


def check_errors(row, model, f, x, h):
    worst = 0.0
    sq, fro = f["domains/t/t2/quant_sq"], f["domains/t/t2/quant_fro"]
    for l, layer in enumerate(f["meta"].attrs["moe_layer"]):
        before = [output(block_of(model, layer), v) for v in x[layer]]
        for e in experts_of(f, l, 2 if l else 3):
            for p, part in enumerate(PARTS):
                for b in range(len(WIDTHS)) if part == PARTS[3] else (1, 3):
                    old = row.quantized(model, layer, e, part, WIDTHS[b])
                    scale = getattr(model.config, "residual_multiplier", 1.0)
                    lost = [(output(block_of(model, layer), v) - y).reshape(-1, v.shape[-1]).square().sum(-1)
                            for v, y in zip(x[layer], before)]
                    row.restore(model, layer, e, old)
                    want = sum((d / s.square().mean(-1)).sum().item() for d, s in zip(lost, h[layer]))
                    worst = max(worst, abs(want / sq[l, e, p, b] - 1))
                    row.check(close(want, sq[l, e, p, b], LIMIT), f"layer {layer} expert {e} {'+'.join(part)} {WIDTHS[b]} bits: "
                              f"{sq[l, e, p, b]:.9g}, transformers {want:.9g}")
                    if part == PARTS[3]:
                        want = sum(d.sum().sqrt().item() for d in lost)
                        row.check(close(want, fro[l, e, b], LIMIT), f"layer {layer} expert {e} {WIDTHS[b]} bits: windows "
                                  f"{fro[l, e, b]:.9g}, transformers {want:.9g}")
    unseen = f["domains/t/t0/selected"][:] == 0
    row.check(not sq[:][unseen].any() and not fro[:][unseen].any(), "experts without tokens have errors")
    return worst


def check_gains(row, model, f, logp):
    for l, layer in enumerate(f["meta"].attrs["moe_layer"]):
        old = [row.quantized(model, layer, e, PARTS[3], 2) for e in range(f["meta"].attrs["experts"])]
        changed = run(model, row.windows)[2]
        for e, v in enumerate(old):
            row.restore(model, layer, e, v)
        want = sum((a[:-1].exp() * (a[:-1] - b[:-1])).sum().item() for a, b in zip(logp, changed))
        got = f["domains/t/t2/quant_kl"][l]
        row.check(close(want, got, KL_LIMIT), f"layer {layer}: KL {got:.9g}, transformers {want:.9g}")


def same_bytes(row, first):
    """Threads, memory, kills."""
    with open(first, "rb") as f:
        want = f.read()

    def check(path, what):
        with open(path, "rb") as f:
            row.check(f.read() == want, f"{what}: other bytes")
        row.check(not os.path.exists(path + ".errors.partial"), f"{what}: the folder stays")
    check(row.calibrate(os.path.join(row.work, "two.h5"), "--gains", threads="2"), "two threads")
    little = os.path.join(row.work, "little.h5")
    p = row.tool("calibrate", row.source, "--text", "t=" + row.ids, "-o", little, "--errors", "--max-memory", "1MiB")
    row.check(p.returncode and "is too little" in p.stderr, "--max-memory 1MiB is not refused")
    out = os.path.join(row.work, "killed.h5")
    args = [os.path.join(row.a.build, "moecompress"), "calibrate", row.source, "--text", "t=" + row.ids, "-o", out, "--errors", "--gains",
            "--group-size", str(GROUP), "-q"]
    kills, delay = 0, 0.01
    while True:
        p = subprocess.Popen(args, stderr=subprocess.PIPE, text=True)
        try:
            told = p.communicate(timeout=delay)[1]
            row.check(p.returncode == 0, f"after {kills} kills: {told.strip()}")
            break
        except subprocess.TimeoutExpired:
            p.send_signal(signal.SIGKILL)
            p.communicate()
            kills, delay = kills + 1, delay * 1.15
            if os.path.exists(out) and open(out, "rb").read() == want:
                break  # it came behind the last step
    row.check(kills >= 5, f"only {kills} kills")
    check(out, f"{kills} kills")
    p = row.tool(*args[1:])
    row.check(p.returncode and "--overwrite" in p.stderr, "a finished file is not refused")


def check_merge(row, first):
    other = row.calibrate(os.path.join(row.work, "plain.h5"), "--gains", group=16)
    both, mixed = os.path.join(row.work, "both.h5"), os.path.join(row.work, "mixed.h5")
    p = row.tool("stats", "merge", first, first, "-o", both)
    with h5py.File(first) as a, h5py.File(both) as b:
        for kind in ("quant_sq", "quant_fro", "quant_kl"):
            row.check(np.array_equal(2 * a["domains/t/t2/" + kind][:], b["domains/t/t2/" + kind][:]), f"merged {kind}")
    p = row.tool("stats", "merge", first, other, "-o", mixed)
    row.check("quant_sq quant_fro quant_kl" in p.stderr, f"merging other groups says: {p.stderr.strip()}")
    with h5py.File(mixed) as b:
        row.check("t2" not in b["domains/t"], "other groups are merged")
    p = row.tool("stats", "show", first)
    told = json.loads(row.tool("stats", "show", first, "--json").stdout)["errors"]
    with h5py.File(first) as f:
        lost, kl = f["domains/t/t2/quant_sq"][:, :, 3].sum(1), f["domains/t/t2/quant_kl"][:]
        size = f["meta"].attrs["hidden"] * f["domains/t"].attrs["tokens"]
    for l, one in enumerate(told["layers"]):
        row.check(np.allclose(one["relative"], np.sqrt(lost[l] / size), rtol=1e-12), f"stats show: relative {one['relative']}")
        row.check(np.isclose(one["gain"], kl[l] / lost[l, 1], rtol=1e-12), f"stats show: gain {one['gain']}")
    row.check("errors of experts" in p.stdout and f"a scale for {GROUP} columns" in p.stdout, "stats show")


@torch.no_grad()
def run_row(a, spec, work):
    row, worst, began = Row(a, spec, work), 0.0, time.time()
    try:
        first = row.calibrate(os.path.join(work, "one.h5"), "--gains")
        model = families.load(row.spec, row.source, os.path.join(work, "plain"))
        x, h, logp = run(model, row.windows)
        with h5py.File(first) as f:
            worst = check_errors(row, model, f, x, h)
            check_gains(row, model, f, logp)
        if spec["name"] == ROWS[0]:
            same_bytes(row, first)
            check_merge(row, first)
    except (ValueError, KeyError, RuntimeError, OSError) as e:
        row.wrong.append(f"{type(e).__name__}: {str(e)[:600]}")
    print(f"{spec['name']:20} {'FAIL' if row.wrong else 'ok':5} {worst:.1e}  {time.time() - began:.0f} s", flush=True)
    for what in row.wrong[:8]:
        print("   ", what)
    return not row.wrong


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--build", required=True)
    ap.add_argument("--only", help="rows whose name contains this")
    ap.add_argument("--keep", help="leave the files in this folder")
    a = ap.parse_args()
    torch.set_num_threads(1)
    good, n = True, 0
    with tempfile.TemporaryDirectory() as temporary:
        for spec in families.ROWS:
            if spec["name"] in ROWS and (not a.only or a.only in spec["name"]):
                work = os.path.join(a.keep or temporary, spec["name"])
                shutil.rmtree(work, ignore_errors=True)
                os.makedirs(work)
                good &= run_row(a, spec, work)
                n += 1
    return 0 if good and n else 1


if __name__ == "__main__":
    sys.exit(main())
