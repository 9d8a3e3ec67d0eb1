"""Grains of pruning other than whole experts, on the demo model and a small checkpoint of every family, loaded with transformers.

    python tests/interop/test_grains.py --build BUILD_DIR [--only NAME] [--keep DIR]

Neurons: the output must load and give the logits of the source in which the other neurons do nothing (their columns of
down_proj are zero), within 1e-3 of the largest; who was kept is found by comparing the columns. Only REFUSED are refused.
With --repair ridge only up and down of layers that are run differ from that, with deep gate and router, too; `eval` gives the
cross-entropy of transformers.
Weights: half of each expert's are zero (2:4: the smaller two of every four), all else is the source's. Blocks: for every layer, the
logits are those of the source in which it passes its input on. top-k: those of the source with fewer. Exit 0: nothing differs.
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile

import families
import torch
import transformers

LIMIT = 1e-3
DEMO = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), "recipes", "demo-model")
DOWN = re.compile(r"experts.*(down_proj|w2)$|output_linear\.weight$|\.w2$")
# neurons: another part of the model follows the same key of config.json, or experts that are no MLPs
REFUSED = {"llama4_text": "shared expert", "llama4-hub": "shared expert", "hunyuan_v1_moe": "shared expert",
           "hunyuan_v1_moe-hub": "shared expert", "jetmoe": "attention experts", "dynamic_moe": "dense layers"}
# neurons: by every score; who goes is chosen alike in all families, and the others go by one
SCORED = {"demo", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "dbrx", "granitemoe", "adamoe"}
# blocks: rules that count layers and have no list
COUNTED = {"llama4_text": None, "llama4-hub": None, "dynamic_moe": None}


class Row:
    def __init__(self, a, spec, seed, work):
        self.build, self.spec, self.work, self.wrong = a.build, spec, work, []
        dialect = "5" if spec["config"] == "DbrxConfig" else spec["dialects"][-1]
        self.source = os.path.join(work, "source")
        if spec["name"] == "demo":
            shutil.copytree(DEMO, self.source)
        else:
            families.write(spec, self.source, dialect, seed=100 + seed)
        self.windows = families.windows_of(1000 + seed)
        self.ids = os.path.join(work, "windows.ids")
        with open(self.ids, "w", encoding="ascii") as f:
            f.writelines(" ".join(map(str, w)) + "\n" for w in self.windows)
        self.twice = os.path.join(work, "twice.ids")  # the window that is held out is one of those that are fitted to: noise has no rule
        with open(self.twice, "w", encoding="ascii") as f:
            f.writelines(" ".join(map(str, w)) + "\n" for w in [*self.windows, self.windows[-1]])
        self.stats = os.path.join(work, "stats.h5")
        self.tool("calibrate", self.source, "--text", self.ids, "--tier", "1", "-o", self.stats, "-q")

    def check(self, ok, what):
        if not ok:
            self.wrong.append(what)

    def tool(self, *args, fails=None):
        p = subprocess.run([os.path.join(self.build, "moecompress"), *args], capture_output=True, text=True)
        if p.returncode < 0 or (p.returncode != 0) != (fails is not None) or (fails and fails not in p.stderr):
            raise ValueError(f"{' '.join(args)}: exit {p.returncode}: {p.stderr.strip()}")
        return p.stdout

    def model(self, folder):
        return families.load(self.spec, folder, os.path.join(self.work, "plain-" + os.path.basename(folder)))

    def logits(self, model):
        return families.observe(self.spec, model, self.windows)["logits"]

    def near(self, got, want, what):
        off, scale = (got - want).abs().max().item(), want.abs().max().item()
        self.check(off <= LIMIT * scale, f"{what}: logits differ by {off:.3g} of {scale:.3g}")
        return off / scale

    def neurons(self, method):
        out = os.path.join(self.work, method)
        options = ["--stats", self.stats, "--grain", "neurons", "--method", method, "--remove", "50%", "-o", out, "-q"]
        if self.spec["name"] in REFUSED:
            self.tool("prune", self.source, *options, fails=REFUSED[self.spec["name"]])
            return 0.0
        if self.spec["make"] and re.search("fp8|mxfp4", self.spec["make"]):
            self.tool("prune", self.source, *options, fails="--dtype")
            options += ["--dtype", "f32"]
        self.tool("prune", self.source, *options)
        self.tool("verify", out, self.source, "-q")
        want, got = self.model(self.source), self.model(out)
        whole = self.logits(want)
        theirs = dict(got.named_parameters())
        matched = 0
        for name, p in want.named_parameters():
            n = theirs[name]
            if p.shape == n.shape:
                continue
            if not DOWN.search(name):
                continue
            flat = p.dim() == 2  # dbrx: the neurons of all experts one below another
            e = got.config.get_text_config().ffn_config.moe_num_experts if flat else p.shape[0]
            a, b = (p.view(e, -1, p.shape[1]), n.view(e, -1, n.shape[1])) if flat else (p, n)
            axis = next(i for i in (1, 2) if a.shape[i] != b.shape[i])
            a, b = (a.data.transpose(1, 2), b.data.transpose(1, 2)) if axis == 2 else (a.data, b.data)
            for x, y in zip(a, b):  # [I, H] [I', H]
                same = (x[:, None] == y[None]).all(-1)
                self.check(bool((same.sum(0) == 1).all()), f"{name}: a neuron is not one of the source")
                at = same.float().argmax(0)
                self.check(bool((at[1:] > at[:-1]).all()), f"{name}: neurons do not stand in their order")
                x[~same.any(1)] = 0.0
                matched += 1
        self.check(matched > 0, "no experts were found")
        self.check(not torch.equal(self.logits(want), whole), "the neurons that were removed do nothing")
        return self.near(self.logits(got), self.logits(want), method)

    def repaired(self, kind):
        """Like the output of the last neurons() but for what was fitted."""
        plain, out = os.path.join(self.work, "gate-weighted"), os.path.join(self.work, kind)
        if self.spec["name"] in REFUSED:
            return 0.0
        args = ["--stats", self.stats, "--grain", "neurons", "--remove", "50%", "--repair", kind, "--text", self.twice]
        if self.spec["make"] and re.search("fp8|mxfp4", self.spec["make"]):
            args += ["--dtype", "f32"]
        self.tool("prune", self.source, *args, "-o", out, "-q")
        self.tool("verify", out, self.source, "-q")
        old, new = families.read_tensors(plain), families.read_tensors(out)
        changed = [n for n in new if not torch.equal(old[n], new[n])]
        expert = re.compile(r"experts|(input|output)_linear")
        gate = re.compile(r"gate_proj|\.w1\b|bias|shared|self_attention")
        for name in changed:
            fitted = expert.search(name) and not gate.search(name) if kind == "ridge" else \
                expert.search(name) or re.search("router|gate", name)
            self.check(bool(fitted) and not (self.spec["mtp"] and name.startswith(self.spec["mtp"])), f"{kind}: {name} has changed")
        self.check(len(changed) > 0, f"{kind}: nothing was fitted")
        logits, ids = self.logits(self.model(out)).double(), torch.tensor([i for w in self.windows for i in w])
        nll = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
        first = torch.tensor([len(w) for w in self.windows]).cumsum(0)[:-1] - 1  # of another window
        nll[first] = 0.0
        want = nll.sum().item() / (len(nll) - len(first))
        got = json.loads(self.tool("eval", out, "--text", self.ids, "--json", "-q"))["overall"]["cross_entropy"]
        self.check(abs(got - want) < 1e-4, f"{kind}: cross-entropy {got:.6f}, transformers {want:.6f}")
        return abs(got - want)

    def weights(self):
        out = os.path.join(self.work, "sparse")
        for options in (["--sparsity", "50%"], ["--pattern", "2:4"]):
            args = ["--grain", "weights", "--method", "magnitude", *options, "--overwrite", "-o", out, "-q", "--json"]
            if self.spec["make"] and re.search("fp8|mxfp4", self.spec["make"]):
                args += ["--dtype", "f32"]
            told = json.loads(self.tool("prune", self.source, *args))
            half = told["expert_weights"] / 2  # MXFP4 has zeros of its own
            self.check(half <= told["zeros"] <= half * (1.1 if "mxfp4" in self.spec["name"] else 1.0), f"{options}: {told['zeros']} of {told['expert_weights']}")
            old, new = families.read_tensors(self.source), families.read_tensors(out)
            if self.spec["make"] and re.search("fp8|mxfp4", self.spec["make"]):
                continue
            for name, t in new.items():
                s = old[name].float()
                kept = t != 0
                self.check(torch.equal(t.float()[kept], s[kept]), f"{name}: a weight that stays has changed")
                expert = re.search(r"experts|(input|output)_linear", name) and t.dim() > 1 and "shared" not in name and \
                    "bias" not in name and not re.search("self_attention|router|gate\\.", name)
                self.check(bool(expert) == (not torch.equal(t.float(), s)), f"{name}: is not an expert's, or kept whole")
                if self.spec["name"] in ("mixtral", "qwen3_moe") and expert and options[0] == "--pattern":
                    g, w = kept.view(kept.shape[0], -1, 4), s.abs().view(s.shape[0], -1, 4)
                    self.check(bool((g.sum(-1) == 2).all()), f"{name}: not 2 of 4")
                    low = w.masked_fill(~g, float("inf")).amin(-1) >= w.masked_fill(g, 0).amax(-1)
                    self.check(bool(low.all()), f"{name}: not the two largest of 4")
        return 0.0

    def blocks(self):
        """The layer of highest similarity, and every other one by a plan that was edited."""
        out, file = os.path.join(self.work, "blocks"), os.path.join(self.work, "blocks.json")
        self.tool("prune", self.source, "--stats", self.stats, "--grain", "blocks", "--remove", "1", "--plan-only", "-o", file, "-q")
        with open(file, encoding="utf-8") as f:
            plan = json.load(f)
        similar = plan["options"]["similarity"]
        self.check(plan["drop_layers"] == [max(range(len(similar)), key=lambda i: similar[i])], "not the most similar layer")
        worst, done, want = 0.0, 0, self.model(self.source)
        for layer in range(len(similar)):
            plan["drop_layers"] = [layer]
            with open(file, "w", encoding="utf-8") as f:
                json.dump(plan, f)
            args = [os.path.join(self.build, "moecompress"), "apply", self.source, file, "--overwrite", "-o", out, "-q"]
            p = subprocess.run(args, capture_output=True, text=True)
            if p.returncode == 3 and ("no layer with experts" in p.stderr or
                                      (self.spec["name"] in COUNTED and "counts layers" in p.stderr)):
                continue
            if p.returncode:
                raise ValueError(f"without layer {layer}: exit {p.returncode}: {p.stderr.strip()}")
            worst = max(worst, self.without(want, out, layer, len(similar)))
            done += 1
        self.check(done > 0 or self.spec["name"] in COUNTED, "no layer can be dropped")
        return worst

    def without(self, want, out, layer, layers):
        self.tool("verify", out, self.source, "-q")
        theirs = self.spec["mtp"]
        if theirs and theirs.startswith("model"):
            self.spec["mtp"] = theirs.replace(str(layers), str(layers - 1))
        got = self.model(out)
        self.spec["mtp"] = theirs
        passed = []
        for name, module in want.named_modules():
            m = re.search(r"(?:layers|blocks)\.(\d+)$", name)
            if m and int(m[1]) == layer and "vis" not in name:
                passed.append((module, module.forward))
                module.forward = passing(module.forward)
        near = self.near(self.logits(got), self.logits(want), f"without layer {layer}")
        for module, forward in passed:
            module.forward = forward
        return near

    def top_k(self):
        out = os.path.join(self.work, "top-k")
        fixed = self.spec["name"].startswith(("phimoe", "jetmoe"))
        varies = self.spec["make"] in ("relu", "top_p")
        k = 1
        args = ["prune", self.source, "--top-k", str(k), "-o", out, "-q"]
        if fixed or varies:
            self.tool(*args, fails="varies" if varies else "cannot change")
            return 0.0
        self.tool(*args)
        self.tool("verify", out, self.source, "-q")
        old, new = families.read_tensors(self.source), families.read_tensors(out)
        self.check(old.keys() == new.keys() and all(torch.equal(old[n].view(torch.uint8), new[n].view(torch.uint8)) for n in old
                                                    if old[n].dim()), "top-k: a tensor has changed")
        want = self.model(self.source)
        for module in want.modules():
            for name in ("top_k", "num_experts_per_tok", "topk"):
                if isinstance(getattr(module, name, None), int):
                    setattr(module, name, k)
        return self.near(self.logits(self.model(out)), self.logits(want), "top-k")


def passing(forward):
    """A layer that gives what it gets, in the form of its own output."""
    def through(*args, **kwargs):
        y, x = forward(*args, **kwargs), args[0] if args else kwargs["hidden_states"]
        return (x, *y[1:]) if isinstance(y, tuple) else x
    return through


def run_row(a, spec, seed, work):
    row, worst = None, {}
    try:
        row = Row(a, spec, seed, work)
        for method in ("out-norm", "mean-abs", "gate-weighted") if spec["name"] in SCORED else ("gate-weighted",):
            worst[method] = row.neurons(method)
        for kind in ("ridge", "deep"):
            worst[kind] = row.repaired(kind)
        worst["weights"] = row.weights()
        worst["blocks"] = row.blocks()
        worst["top-k"] = row.top_k()
    except (ValueError, KeyError, RuntimeError, AttributeError, StopIteration, IndexError, TypeError) as e:
        worst["stopped"] = 1.0
        if row:
            row.wrong.append(f"{type(e).__name__}: {e}")
    wrong = row.wrong if row else ["no checkpoint"]
    print(f"{spec['name']:24s} " + ", ".join(f"{k} {v:.1e}" for k, v in worst.items())
          + "".join(f"\n  WRONG {w}" for w in wrong[:8]), flush=True)
    return not wrong


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--build", required=True)
    ap.add_argument("--only", help="rows whose name contains this")
    ap.add_argument("--keep", help="leave everything in this folder")
    a = ap.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    print(f"transformers {transformers.__version__}, torch {torch.__version__}; logits, of the largest")
    # transformers has no class for MoE++, and families' own names its parts otherwise
    rows = [families.row("demo", "Qwen3MoeConfig"), *(r for r in families.ROWS if not r["name"].startswith("MoE++"))]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        return families.run_rows(rows, a, folder, run_row)


if __name__ == "__main__":
    sys.exit(main())
