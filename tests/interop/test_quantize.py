"""Quantized models in transformers, and GPTQ as the program runs it against numpy.

    python tests/interop/test_quantize.py --build BUILD_DIR [--only NAME] [--keep DIR]

Small random families and the demo model are quantized by `moecompress quantize`: gptq in mixed widths with attention, shared experts and
dense layers at 4 bits, compressed-tensors at 4, and fake. transformers loads each in a process of its own without missing keys, and the
cross-entropy that it has on held-out windows is that of `moecompress eval` of the same folder within EXACT; auto-round makes the model
float16, by which routers of random weights flip: within ROUNDED, and within EXACT with the same weights in float32.

Then the first layer, before which nothing is quantized: transformers runs the original, hooks take what its experts are given, and numpy
makes of that, in float64, each expert's Hessian (g^2 x x^T, blended as gptq.h has it) and what classic GPTQ gives for the scales that
the output has. The loss in --record must be tr(D H D^T) of the codes in the output within 1e-3, and at most 1.02 times numpy's; so for
down, by the activations of gate and up as they were rounded, where an expert has tokens enough to be rounded by its own alone.
Exit 0: nothing differs.
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile

import numpy as np
from test_formats import decode, installed, load, modules_of, tensors

HERE = os.path.abspath(__file__)
DEMO = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(HERE))), "recipes", "demo-model")
NAMES = ["qwen3_moe", "mixtral", "deepseek_v3", "olmoe"]
EXACT, ROUNDED = 1e-6, 3e-3
FORMATS = {"gptq": ["--bits", "3", "--attention-bits", "4", "--shared-bits", "4", "--dense-bits", "4"],
           "compressed-tensors": ["--bits", "4"], "fake": ["--bits", "2.5"]}


# --- a client, in a process of its own ---------------------------------------------------------------------------------

def entropy(model, windows):
    import torch
    nats = n = 0
    with torch.no_grad():
        for w in windows:
            p = torch.log_softmax(model(torch.tensor([w])).logits[0].double(), -1)
            nats -= p[:-1].gather(1, torch.tensor(w[1:])[:, None]).sum().item()
            n += len(w) - 1
    return nats / n


def plain(source, folder):
    """The source in float32, where `folder` has codes with what numpy reads from them."""
    import torch
    model, t = load(source)[0], tensors(folder)
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name in modules_of(t):
            w, m = torch.from_numpy(decode(t, name)), re.match(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj$", name)
            if not m:
                modules[name].weight.copy_(w)
            elif m[3] == "down":
                modules[m[1]].down_proj[int(m[2])] = w
            else:
                modules[m[1]].gate_up_proj[int(m[2])].chunk(2)[m[3] == "up"].copy_(w)
    return model


def client(jobs):
    """[{"folder", "windows", "source" or None}]: cross-entropies, or what went wrong, to stdout."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    import torch
    torch.set_num_threads(1)
    results = []
    for job in jobs:
        try:
            if job["source"]:
                results.append(entropy(plain(job["source"], job["folder"]), job["windows"]))
                continue
            model, info = load(job["folder"])
            lost = [f"{k}: {sorted(map(str, v))[:2]}" for k, v in info.items() if v]
            results.append("; ".join(lost) or entropy(model, job["windows"]))
        except Exception as e:
            results.append(f"{type(e).__name__}: {str(e)[:200]}")
    print("RESULT " + json.dumps(results))


def run_client(jobs, folder):
    path = os.path.join(folder, "jobs.json")
    with open(path, "w") as f:
        json.dump(jobs, f)
    p = subprocess.run([sys.executable, HERE, "--client", path], capture_output=True, text=True,
                       env=dict(os.environ, PYTHONPATH=os.path.dirname(HERE)))
    line = [x for x in p.stdout.splitlines() if x.startswith("RESULT ")]
    return json.loads(line[-1][7:]) if line else [f"the client died: {p.stderr[-300:]}" for _ in jobs]


# --- our side ----------------------------------------------------------------------------------------------------------

class Case:
    """A model, windows to round by and windows to measure with."""
    def __init__(self, a, name, source, windows, held, work):
        self.tool, self.name, self.source, self.work, self.wrong = os.path.join(a.build, "moecompress"), name, source, work, []
        self.windows, self.held = windows, held
        self.text, self.other = (self.ids(n, w) for n, w in (("text.ids", windows), ("held.ids", held)))
        self.run("calibrate", source, "--text", self.text, "--compute", "f32", "--errors", "--gains", "-o", self.at("stats.h5"))

    def at(self, name):
        return os.path.join(self.work, name)

    def ids(self, name, windows):
        with open(self.at(name), "w") as f:
            f.writelines(" ".join(map(str, w)) + "\n" for w in windows)
        return self.at(name)

    def check(self, ok, what):
        if not ok:
            self.wrong.append(what)

    def run(self, *args):
        p = subprocess.run([self.tool, *args, "-q"], capture_output=True, text=True)
        if p.returncode:
            raise ValueError(f"{args[0]} {' '.join(args[2:])}: {p.stderr.strip()[-300:]}")
        return p.stdout

    def quantize(self, out, *more):
        self.run("quantize", self.source, "--stats", self.at("stats.h5"), "--text", self.text, "--compute", "f32", "--dtype", "f32",
                 "-o", self.at(out), *more)
        self.run("verify", self.at(out), self.source)
        return self.at(out)

    def measured(self, folder):
        return json.loads(self.run("eval", folder, "--text", self.other, "--compute", "f32", "--json"))["overall"]["cross_entropy"]


def fixtures(a, folder):
    import families
    for spec in families.ROWS:
        if spec["name"] not in NAMES or (a.only and a.only != spec["name"]):
            continue
        numbers = dict(spec["numbers"])
        if spec["config"] == "MixtralConfig":
            numbers["intermediate_size"] = 64  # streams take widths that are multiples of 32
        if spec["name"] == "qwen3_moe":
            numbers["head_dim"] = 32  # its attention is quantized, too
        work = os.path.join(a.keep or folder, spec["name"])
        shutil.rmtree(work, ignore_errors=True)
        os.makedirs(work)
        families.write(dict(spec, numbers=numbers), os.path.join(work, "source"), spec["dialects"][-1], seed=families.seed_of(spec))
        yield Case(a, spec["name"], os.path.join(work, "source"), families.windows_of(3, (64,) * 24), families.windows_of(4, (64,) * 6), work)
    if not a.only or a.only == "demo":
        from tokenizers import Tokenizer
        work = os.path.join(a.keep or folder, "demo")
        shutil.rmtree(work, ignore_errors=True)
        os.makedirs(work)
        with open(os.path.join(DEMO, "samples.txt"), encoding="utf-8") as f:
            ids = Tokenizer.from_file(os.path.join(DEMO, "tokenizer.json")).encode(f.read()).ids
        windows = [ids[i:i + 128] for i in range(0, 60 * 128, 128)]
        yield Case(a, "demo", DEMO, windows[:48], windows[48:], work)


# --- GPTQ ----------------------------------------------------------------------------------------------------------------

def expert_inputs(case):
    """What the first layer's experts are given: x [tokens, hidden], and of each token its experts and their weights."""
    import torch
    model, _ = load(case.source)
    block, seen = model.model.layers[0].mlp, []
    block.register_forward_pre_hook(lambda m, args: seen.append(args[0].reshape(-1, args[0].shape[-1]).double()))
    with torch.no_grad():
        for w in case.windows:
            model(torch.tensor([w]))
        x = torch.cat(seen)
        scores = torch.softmax(x @ block.gate.weight.double().T, -1)
        gates, picks = scores.topk(model.config.num_experts_per_tok, -1)
        if model.config.norm_topk_prob:
            gates = gates / gates.sum(-1, keepdim=True)
    return x.numpy(), picks.numpy(), gates.numpy()


def hessian(x, g, power):
    return (x * (g ** power)[:, None]).T @ x / (g ** power).sum()


def compare_gptq(case, power):
    """Every matrix of the first layer's experts; --weight-power 1 is the default."""
    from test_gptq import CLOSE, Case as Problem, gptq, nearest, row_losses, values
    x, picks, gates = expert_inputs(case)
    made_by = f"classic{power}"
    folder = case.quantize(made_by, "--bits", "3", "--sweeps", "0", "--no-original-target", "--record", case.at(made_by + ".record"),
                           *(["--weight-power", str(power)] if power != 1 else []))
    with open(case.at(made_by + ".record")) as f:
        record = {r["module"]: r for r in map(json.loads, f)}
    t, source = tensors(folder), tensors(case.source)
    n, layer, worst, ratios, blended = x.shape[1], x.T @ x / len(x), 0.0, [], 0
    for e in range(picks.max() + 1):
        rows, slots = np.nonzero(picks == e)
        g, xe = gates[rows, slots], x[rows]
        name = f"model.layers.0.mlp.experts.{e}."
        case.check(record[name + "up_proj"]["tokens"] == len(rows), f"{name}: {record[name + 'up_proj']['tokens']} tokens, {len(rows)} in torch")
        own = 1.0 if len(rows) >= 2 * n else len(rows) / (len(rows) + n / 8)
        blended += own < 1.0
        h = own * hessian(xe, g, power) + (1 - own) * layer if len(rows) else layer
        made = {k: decode(t, name + k).astype(np.float64) for k in ("gate_proj", "up_proj", "down_proj")}
        up = xe @ made["gate_proj"].T
        act = up / (1 + np.exp(-up)) * (xe @ made["up_proj"].T)
        for k in made:
            if k == "down_proj":
                if len(rows) < 2 * act.shape[1]:
                    continue
                h = hessian(act, g, power)
            w, r = source[name + k + ".weight"], record[name + k]
            s = np.repeat(t[name + k + ".scales"].T.astype(np.float64), r["group_size"], axis=1)
            problem = Problem(name + k, w, h, r["bits"], r["group_size"])
            z = np.full_like(s, 2.0 ** (r["bits"] - 1))
            d = w.astype(np.float64) - made[k]
            codes, margin = gptq(problem, s, z)
            ours, theirs = row_losses(d, h), row_losses(w - values(codes, s, z), h)
            clear = margin > CLOSE  # else the two may round to either side, and all behind that differs
            case.check(clear.mean() > 0.8 and ours[clear].sum() <= 1.005 * theirs[clear].sum(),
                       f"{name}{k}: loss {ours[clear].sum():.6g} in {clear.sum()} rows without ties, numpy's {theirs[clear].sum():.6g}")
            ours, theirs = ours.sum(), theirs.sum()
            plain = row_losses(w - values(nearest(w, s, z, 2 ** r["bits"] - 1)[0], s, z), h).sum()
            off = abs(r["loss"] / ours - 1)
            worst = max(worst, off)
            ratios.append((ours / theirs, ours / plain))
            case.check(off <= 1e-3, f"{name}{k}: loss {r['loss']:.6g}, of its codes {ours:.6g}")
            case.check(abs(r["loss_zero"] / row_losses(w.astype(np.float64), h).sum() - 1) <= 1e-3, f"{name}{k}: loss_zero")
    ratios = np.array(ratios)
    print(f"{case.name:14} --weight-power {power}: GPTQ of {len(ratios)} matrices ({blended} experts blended): reported loss off by {worst:.1e} at most; over numpy's "
          f"{ratios[:, 0].mean():.4f}, {ratios[:, 0].max():.4f} at most; over rounding to nearest {ratios[:, 1].mean():.3f}")
    case.check(len(ratios) >= 16, f"{len(ratios)} matrices were compared")


# --- all of it -----------------------------------------------------------------------------------------------------------

def run(a, folder):
    import torch
    torch.set_num_threads(1)
    cases, jobs = [], []
    for case in fixtures(a, folder):
        cases.append(case)
        try:
            for fmt, more in FORMATS.items():
                out = case.quantize(fmt, "--format", fmt, *more)
                if fmt == "gptq":
                    t = tensors(out)
                    case.check(len({v.shape[0] for k, v in t.items() if k.endswith("gate_proj.qweight")}) > 1, "gptq: widths are not mixed")
                    case.check(case.name != "demo" or any("self_attn" in k for k in t if k.endswith("qweight")), "gptq: attention has no codes")
                ours = case.measured(out)
                jobs += [(case, fmt, out, ours, s) for s in ([None, case.source] if fmt == "gptq" else [None])]
            if case.name in ("qwen3_moe", "demo"):
                for power in (1, 2):
                    compare_gptq(case, power)
        except ValueError as e:
            case.wrong.append(str(e))
    for package, formats in (("auto_round", ["gptq"]), ("compressed_tensors", ["compressed-tensors"]), ("torch", ["fake", "gptq"])):
        mine = [j for j in jobs if j[1] in formats and (j[4] is not None) == (package == "torch" and j[1] == "gptq")]
        if not installed(package):
            print(f"{package} is not installed: not loaded there")
            continue
        got = run_client([dict(folder=out, windows=case.held, source=source) for case, _, out, _, source in mine], folder)
        for (case, fmt, _, ours, source), theirs in zip(mine, got):
            what = fmt + (" in float32" if source else "")
            if isinstance(theirs, str):
                case.wrong.append(f"{what}: {theirs}")
                continue
            off = abs(theirs / ours - 1)
            print(f"{case.name:14} {what:18} cross-entropy {ours:.6f}, transformers' {theirs:.6f}: off by {off:.1e}")
            case.check(off <= (ROUNDED if package == "auto_round" else EXACT), f"{what}: cross-entropy {ours:.6f}, transformers' {theirs:.6f}")
    for case in cases:
        for what in case.wrong:
            print(f"    {case.name}: {what}")
    return cases and not any(c.wrong for c in cases)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--build")
    parser.add_argument("--only")
    parser.add_argument("--keep")
    parser.add_argument("--client")
    a = parser.parse_args()
    if a.client:
        with open(a.client) as f:
            client(json.load(f))
        return
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(0 if run(a, folder) else 1)


if __name__ == "__main__":
    main()
