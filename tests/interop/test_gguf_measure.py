"""What block types cost the matrices of a GGUF, against transformers and gguf: inputs' mean squares by hooks, errors from bytes that gguf
reads, KL of models of transformers in which one matrix is replaced by what the grid makes of it.

    python tests/interop/test_gguf_measure.py --build BUILD_DIR

Then: the same bytes from two threads, with little memory, and after kills. Exit 0: nothing differs.
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile

import gguf
import h5py
import numpy as np
import checks
from checks import check
import test_gguf_model as models
import torch

NAMES = ["qwen3_moe", "mixtral", "deepseek_v2", "gpt_oss"]
TYPES = ["q4_0", "q8_0", "q5_1", "iq4_nl"]
GROUP, PRIOR, PROBES = 32, 32, (2, 4)
SQUARE_LIMIT, ERROR_LIMIT, KL_LIMIT = 1e-4, 1e-5, 2e-3
WEIGHTS = [1.0, 3.0]


def run(build, *args, threads="1"):
    return subprocess.run([os.path.join(build, "moecompress"), *args], capture_output=True, text=True,
                          env=dict(os.environ, OMP_NUM_THREADS=threads, OMP_WAIT_POLICY="passive"))


def filtered(build, program, *args, rows):
    return subprocess.run([os.path.join(build, "tests", program), *map(str, args)], input=b"".join(np.ascontiguousarray(
        r, np.float32).tobytes() for r in rows), capture_output=True, check=True).stdout


def on_grid(build, w, bits):
    """Rows of a matrix, or of several, on a probe's grid."""
    flat = w.reshape(-1, w.shape[-1])
    return np.frombuffer(filtered(build, "dump_quant", *flat.shape, GROUP, bits, rows=[flat]), np.float32).reshape(w.shape)


def in_blocks(build, w, importance, kind):
    """w [rows,cols] as gguf reads our bytes."""
    rows = [w] if importance is None else [importance, w]
    raw = np.frombuffer(filtered(build, "dump_blocks", kind, w.shape[-1], "write" if importance is None else "weighted", rows=rows),
                        np.uint8)
    return gguf.dequantize(raw.reshape(len(w), -1), getattr(gguf.GGMLQuantizationType, kind.upper()))


class Case:
    def __init__(self, build, tmp, name):
        self.build, self.tmp, self.name = build, tmp, name
        self.folder = os.path.join(tmp, name)
        self.model = models.make(name, self.folder)
        with torch.no_grad():  # new models say next to nothing: what a matrix does must be more than rounding
            for p in self.model.parameters():
                if p.ndim > 1:
                    p.mul_(5.0)
        self.model.save_pretrained(self.folder)
        with open(os.path.join(self.folder, "config.json")) as f:
            self.config = json.load(f)
        self.values = models.expected(self.folder, models.MODELS[name][2], self.config)
        rng = np.random.default_rng(5)
        self.texts = [[rng.integers(0, 96, n).tolist() for n in sizes] for sizes in ((40, 9, 33), (2, 50))]
        self.args = ["--text"]
        for i, windows in enumerate(self.texts):
            path = os.path.join(tmp, f"{name}-{i}.ids")
            with open(path, "w", encoding="ascii") as f:
                f.writelines(" ".join(map(str, w)) + "\n" for w in windows)
            self.args.append(f"t{i}={path}:{WEIGHTS[i]:g}")

    def calibrate(self, out, *more, threads="1"):
        return run(self.build, "calibrate", self.folder, *self.args, "-o", out, "--gguf", "--gguf-tokens", "100000", "-q", *more,
                   threads=threads)

    def read(self, path):
        with h5py.File(path) as f:
            g = f["gguf"]
            names = bytes(g["name"][:]).decode().split("\n")[:-1]
            types, square, at, self.rows = g.attrs["types"], g["square"][:], 0, {}
            types = (types.decode() if isinstance(types, bytes) else types).split()
            for i, name in enumerate(names):
                cols, has = g["size"][i]
                self.rows[name] = dict(cols=int(cols), square=square[at:at + has] if has else None, probe=g["probe"][i], kl=g["kl"][i],
                                       error=dict(zip(types, g["error"][i])))
                at += has
            layers = [int(l) for l in f["meta"].attrs["moe_layer"]]
            part = lambda t, kind: f[f"domains/t{t}/{kind}"][:].astype(np.float64)
            weighted = {k: sum(w * part(t, k) for t, w in enumerate(WEIGHTS)) for k in ("t0/selected", "t1/xin_sq", "t1/act_sq")}
            seen = sum(part(t, "t0/selected") for t in range(len(WEIGHTS)))
            self.seen = {l: seen[i] for i, l in enumerate(layers)}
            self.sums = {k: {l: v[i] for i, l in enumerate(layers)} for k, v in weighted.items()}
            self.tokens = int(g.attrs["tokens"])

    # --- mean squares ---

    @torch.no_grad()
    def forward(self):
        """Log-probabilities of all windows, text by text."""
        return [[self.model(torch.tensor([w])).logits[0].double().log_softmax(-1) for w in windows] for windows in self.texts]

    def module_of(self, name):
        """The nn.Linear or nn.Embedding whose weight a GGUF tensor is, or the half of."""
        tensors = gguf.get_tensor_name_map(next(n for n, t in gguf.MODEL_ARCH_NAMES.items() if t == models.MODELS[self.name][2]),
                                           self.config["num_hidden_layers"])
        for module, m in self.model.named_modules():
            if not isinstance(m, (torch.nn.Linear, torch.nn.Embedding)):
                continue
            if module.endswith("kv_b_proj") and name in (f"blk.{module.split('.')[2]}.attn_{x}_b.weight" for x in "kv"):
                return m
            if tensors.get_name(module + ".weight", try_suffixes=(".weight",)) == name:
                return m
        return None

    def squares(self):
        sums, hooks = {}, []

        def take(m, args, name):
            x = args[0].detach().reshape(-1, args[0].shape[-1]).double()
            sums[name] = sums.get(name, 0.0) + self.weight * x.square().sum(0).numpy()
        wanted = {n for n, r in self.rows.items() if r["square"] is not None}
        for name in wanted:
            hooks.append(self.module_of(name).register_forward_pre_hook(lambda m, a, n=name: take(m, a, n)))
        with torch.no_grad():
            for self.weight, windows in zip(WEIGHTS, self.texts):
                for w in windows:
                    self.model(torch.tensor([w]))
        for hook in hooks:
            hook.remove()
        total = sum(w * sum(map(len, windows)) for w, windows in zip(WEIGHTS, self.texts))
        for name in wanted:
            got, want = self.rows[name]["square"], sums[name] / total
            check(np.allclose(got, want, rtol=SQUARE_LIMIT), f"{self.name}: {name}: mean squares differ by {abs(got / want - 1).max():.2g}")
        without = {n for n in self.rows if n not in wanted}
        check(without == {n for n in self.rows if "_exps" in n or n == "token_embd.weight" or "attn_k_b" in n},
              f"{self.name}: no mean squares of {sorted(without)}")

    # --- errors ---

    def importance(self, name):
        """[matrices or 1][cols] or None."""
        if self.rows[name]["square"] is not None:
            return [self.rows[name]["square"].astype(np.float32)]
        if "_exps" not in name:
            return None
        layer, down = int(name.split(".")[1]), "down" in name
        n, s = self.sums["t0/selected"][layer], self.sums["t1/act_sq" if down else "t1/xin_sq"][layer]
        mean = s.sum(0) / n.sum()
        if down:
            mean = np.full_like(mean, mean.mean())
        seen = self.seen[layer]
        own = np.divide(s, n[:, None], out=np.zeros_like(s), where=n[:, None] > 0)
        return ((seen[:, None] * own + PRIOR * mean) / (seen[:, None] + PRIOR)).astype(np.float32)

    def errors(self, names):
        for name in names:
            w, importance = self.values[name], self.importance(name)
            parts = list(w) if "_exps" in name else [w.reshape(-1, w.shape[-1])]
            by = importance if importance is not None else [None] * len(parts)
            row = self.rows[name]
            one = [np.ones(w.shape[-1]) if m is None else m.astype(np.float64) for m in by]
            whole = sum((m * p.astype(np.float64) ** 2).sum() for m, p in zip(one, parts))

            def close(got, made, what):
                want = sum((m * (p.astype(np.float64) - q) ** 2).sum() for m, p, q in zip(one, parts, made)) / whole
                check(abs(got - want) <= ERROR_LIMIT * want, f"{self.name}: {name} {what}: error {got:.8g}, expected {want:.8g}")
            for kind in TYPES:
                if row["cols"] % 32:
                    check(np.isnan(row["error"][kind]), f"{self.name}: {name}: {kind} does not divide {row['cols']} columns")
                else:
                    close(row["error"][kind], [in_blocks(self.build, p, m, kind) for m, p in zip(by, parts)], kind)
            check(np.isnan(row["error"]["q4_k"]), f"{self.name}: {name}: q4_k")
            for b, bits in enumerate(PROBES):
                close(row["probe"][b], [on_grid(self.build, p, bits) for p in parts], f"{bits} bits")

    # --- KL ---

    def place_of(self, name):
        """The parameter that a tensor is in as a view [.., rows, cols] of the GGUF, rows in any order."""
        if "_exps" not in name:
            w = self.module_of(name).weight.data
            if "attn_k_b" in name or "attn_v_b" in name:
                n, v = self.config["qk_nope_head_dim"], self.config["v_head_dim"]
                w = w.view(-1, n + v, w.shape[-1])
                w = w[:, :n].transpose(1, 2) if "attn_k_b" in name else w[:, n:]
            return w
        experts = self.model.model.layers[int(name.split(".")[1])].mlp.experts
        if self.name == "gpt_oss":
            both = experts.gate_up_proj.data.transpose(1, 2)
            return experts.down_proj.data.transpose(1, 2) if "down" in name else both[:, "up_exps" in name::2]
        if "down" in name:
            return experts.down_proj.data
        width = experts.gate_up_proj.shape[1] // 2
        return experts.gate_up_proj.data[:, :width] if "gate" in name else experts.gate_up_proj.data[:, width:]

    def kl(self, names):
        before = self.forward()
        for name in names:
            w = self.place_of(name)
            old = w.clone()
            for b, bits in enumerate(PROBES):
                w.copy_(torch.from_numpy(on_grid(self.build, np.ascontiguousarray(old.numpy()), bits).copy()))
                after, total, weight = self.forward(), 0.0, 0.0
                w.copy_(old)
                for by, x, y in zip(WEIGHTS, before, after):
                    total += by * sum((p[:-1].exp() * (p[:-1] - q[:-1])).sum().item() for p, q in zip(x, y))
                    weight += by * sum(len(p) - 1 for p in x)
                got, want = self.rows[name]["kl"][b], total / weight
                check(abs(got - want) <= KL_LIMIT * want + 1e-9, f"{self.name}: {name} {bits} bits: KL {got:.6g}, transformers {want:.6g}")
        check(all(np.all(r["kl"] >= 0) for r in self.rows.values()), f"{self.name}: a KL is missing")
        check(self.tokens == sum(len(w) - 1 for t in self.texts for w in t), f"{self.name}: tokens {self.tokens}")


def same_bytes(c, first):
    """Threads, memory, kills."""
    with open(first, "rb") as f:
        want = f.read()

    def check_file(path, what):
        with open(path, "rb") as f:
            check(f.read() == want, f"{what}: other bytes")
        check(not os.path.exists(path + ".gguf.partial"), f"{what}: the folder stays")
    two, little, out = (os.path.join(c.tmp, n + ".h5") for n in ("two", "little", "killed"))
    check(c.calibrate(two, threads="2").returncode == 0, "two threads")
    check_file(two, "two threads")
    p = c.calibrate(little, "--max-memory", "64MiB")
    if os.environ.get("MOEC_SANITIZED", "OFF") in ("", "OFF"):
        check(p.returncode == 0, f"little memory: {p.stderr}")
        check_file(little, "little memory")
    kills, delay = 0, 0.02
    while kills < 40:
        p = subprocess.Popen([os.path.join(c.build, "moecompress"), "calibrate", c.folder, *c.args, "-o", out, "--gguf", "--gguf-tokens",
                              "100000", "-q"], stderr=subprocess.PIPE, text=True)
        try:
            told = p.communicate(timeout=delay)[1]
            check(p.returncode == 0 or "give --overwrite" in told or "--overwrite" in told, f"after {kills} kills: {told.strip()}")
            break
        except subprocess.TimeoutExpired:
            p.send_signal(signal.SIGKILL)
            p.communicate()
            kills, delay = kills + 1, delay * 1.3
    check(kills >= 2, f"only {kills} kills")
    check_file(out, f"{kills} kills")


def verbs(c, first):
    told = json.loads(run(c.build, "stats", "show", first, "--json").stdout)["gguf"]
    check(told == {"tokens": c.tokens, "tensors": len(c.rows), "measured": len(c.rows)}, f"stats show: {told}")
    both = os.path.join(c.tmp, "both.h5")
    p = run(c.build, "stats", "merge", first, first, "-o", both)
    check("gguf" in p.stderr, f"merging says: {p.stderr.strip()}")
    with h5py.File(both) as f:
        check("gguf" not in f, "merged statistics have /gguf")
    later = os.path.join(c.tmp, "later.h5")  # a file without it is completed
    run(c.build, "calibrate", c.folder, *c.args, "-o", later, "--tier", "1", "-q")
    check(c.calibrate(later).returncode == 0, "a file is not completed")
    with open(first, "rb") as a, open(later, "rb") as b:
        check(a.read() == b.read(), "a completed file has other bytes")


def of_blocks(c):
    """A GGUF whose matrices are in blocks, embedding too, costs what the folder of its values does."""
    packed, plain, kl = os.path.join(c.tmp, "packed.gguf"), os.path.join(c.tmp, "plain"), []
    run(c.build, "quantize", c.folder, "--format", "gguf", "--types", "q8_0", "-q", "-o", packed)
    run(c.build, "convert", packed, "--dtype", "f32", "-q", "-o", plain)
    for model in (packed, plain):
        p = run(c.build, "calibrate", model, *c.args, "-o", model + ".h5", "--gguf", "--gguf-tokens", "32", "-q")
        check(p.returncode == 0, f"{model}: {p.stderr.strip()}")
        if p.returncode == 0:
            with h5py.File(model + ".h5") as f:
                kl.append(f["gguf/kl"][:])
    check(len(kl) == 2 and np.array_equal(*kl), "KL of a GGUF's matrices is not that of its values")


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--build", required=True)
    a = ap.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as tmp:
        for name in NAMES:
            c, first = Case(a.build, tmp, name), os.path.join(tmp, name + ".h5")
            p = c.calibrate(first)
            if p.returncode:
                check(False, f"{name}: {p.stderr.strip()}")
                continue
            c.read(first)
            check(set(c.rows) == {n for n, x in c.values.items() if x.ndim > 1 and "ffn_gate_inp" not in n and ".bias" not in n},
                  f"{name}: tensors {sorted(c.rows)}")
            c.squares()
            some = ["attn_k_b", "attn_v_b", "ffn_up_shexp"] if name == "deepseek_v2" else ["attn_q"]
            some = [f"blk.1.{x}.weight" for x in (*some, "ffn_gate_exps", "ffn_down_exps")] + ["token_embd.weight", "output.weight"]
            c.errors(some)
            c.kl(some)
            if name == NAMES[0]:
                same_bytes(c, first)
                verbs(c, first)
                of_blocks(c)
    print("ok" if checks.failed == 0 else f"{checks.failed} failures")
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
