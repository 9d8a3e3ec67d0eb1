"""Prunes a small checkpoint of every family and loads the output with transformers.

    python tests/interop/test_families_prune.py --build BUILD_DIR [--only NAME] [--keep DIR]

Each row of families.ROWS loses half of its experts by REAP (calibrated on ids written here). The output must load without a
missing, unexpected or mismatched tensor and give the logits of the source model whose removed experts cannot be chosen (router
logit and selection bias at minus infinity; MoE++: nor carried to the next layer's router), in transformers and in our own
forward pass, within 1e-3 of the largest. Every tensor must be the source's, byte for byte, or the kept parts of it; in config.json
only the keys that count experts may differ. Groups keep the same number each; multi-token-prediction layers are pruned or dropped;
--pad-to adds experts that are never chosen, as many of each group where there are any, and our forward pass gives the unpadded
output's logits bit for bit; --groups drop chooses among all. Exit 0: nothing differs.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile

import families
import torch
import transformers
from safetensors.torch import load_file

LIMIT = 1e-3
COUNTS = {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"}
PADDED = ["gpt_oss", "gpt_oss-mxfp4", "deepseek_v3", "deepseek_v3-fused", "deepseek_v3-mtp-fp8", "deepseek_v3-moonlight",
          "deepseek_v3-kimi", "deepseek_v32", "glm_moe_dsa", "glm4_moe", "glm4_moe_lite", "minimax_m2", "minimax_m2-fp8", "dots1",
          "solar_open", "hy_v3", "exaone_moe", "lfm2_moe", "afmoe"]
NOT_PADDED = ["mixtral", "qwen3_moe", "llama4_text", "deepseek_v2-groups", "jetmoe"]
UNGROUPED = ["deepseek_v3", "deepseek_v2-groups"]


class Row:
    def __init__(self, a, spec, seed, work):
        self.build, self.spec, self.work, self.wrong = a.build, spec, work, []
        self.tail = families.TAIL if spec["make"] == "plus_plus" else 0
        # dbrx: transformers reads the rotary base of a release from a place where it is not
        dialect = "5" if spec["config"] == "DbrxConfig" else spec["dialects"][-1]
        self.source = os.path.join(work, "source")
        families.write(spec, self.source, dialect, seed=100 + seed)
        self.model = families.load(spec, self.source, os.path.join(work, "plain-source"))
        self.windows = families.windows_of(1000 + seed)
        self.ids = os.path.join(work, "windows.ids")
        with open(self.ids, "w", encoding="ascii") as f:
            f.writelines(" ".join(map(str, w)) + "\n" for w in self.windows)

    def check(self, ok, what):
        if not ok:
            self.wrong.append(what)

    def tool(self, *args, fails=False):
        p = subprocess.run([os.path.join(self.build, "moecompress"), *args], capture_output=True, text=True)
        if fails != (p.returncode != 0) or p.returncode < 0:
            raise ValueError(f"{' '.join(args)}: exit {p.returncode}: {p.stderr.strip()}")
        return p.stderr

    def prune(self, name, *options):
        """(output, its plan), both made with the same options."""
        out, plan = os.path.join(self.work, name), os.path.join(self.work, name + ".json")
        self.tool("prune", self.source, *options, "--plan-only", "-o", plan, "-q")
        self.tool("prune", self.source, *options, "-o", out, "-q")
        with open(plan, encoding="utf-8") as f:
            return out, json.load(f)

    # --- logits

    def want(self, plan, ungrouped=False):
        keep = {l["layer"]: l["keep"] for l in plan["layers"]}
        heads = {l["layer"]: l["keep"] for l in plan.get("others", []) if l["kind"] == "attention"}
        routers = [m for m in self.model.modules() if hasattr(m, "topk_group")] if ungrouped else []
        saved = [(m, m.num_group, m.topk_group) for m in routers]
        for m in routers:
            m.num_group = m.topk_group = 1
        ref = families.observe(self.spec, self.model, self.windows, keep, heads or None)
        for m, groups, top in saved:
            m.num_group, m.topk_group = groups, top
        return ref["logits"]

    def near(self, got, want, what):
        off, scale = (got - want).abs().max().item(), want.abs().max().item()
        self.check(off <= LIMIT * scale, f"{what}: logits differ by {off:.3g} of {scale:.3g}")
        return off / scale

    def logits(self, folder):
        model = families.load(self.spec, folder, os.path.join(self.work, "plain-out"))
        return families.observe(self.spec, model, self.windows)["logits"]

    def ours(self, folder):
        dump = os.path.join(self.work, "dump.safetensors")
        p = subprocess.run([os.path.join(self.build, "tests", "dump_forward"), "--threads", "2", folder, self.ids, dump],
                           capture_output=True, text=True)
        if p.returncode != 0:
            raise ValueError(f"dump_forward {folder}: exit {p.returncode}: {p.stderr.strip()}")
        return load_file(dump)["logits"]

    def compare(self, out, plan, what, ungrouped=False):
        want = self.want(plan, ungrouped)
        self.tool("verify", out, self.source, "-q")
        return max(self.near(self.logits(out), want, f"{what}, transformers"), self.near(self.ours(out), want, f"{what}, ours"))

    # --- tensors and config

    def keep_of(self, name, plan):
        """Kept experts of the set that a tensor belongs to."""
        m = re.search(r"(?:^|\.)(mtp\.)?(?:layers|blocks)\.(\d+)\.", name)
        if not m:
            return None
        layer = int(m[2])
        kind = "attention" if "self_attention" in name else "mtp" if self.spec["mtp"] and re.match(self.spec["mtp"], name) else "moe"
        rows = plan["layers"] if kind == "moe" else [o for o in plan.get("others", []) if o["kind"] == kind]
        keep = next((r["keep"] for r in rows if r["layer"] == layer), None)
        # what stands behind the experts always stays
        return keep if keep is None else keep + list(range(rows[0]["experts"], rows[0]["experts"] + self.tail))

    def check_tensors(self, out, plan, dropped=None):
        old, new = families.read_tensors(self.source), families.read_tensors(out)
        experts, seen = plan["layers"][0]["experts"] + self.tail, set()
        for name, t in new.items():
            keep, at = self.keep_of(name, plan), re.search(r"experts\.(\d+)\.", name)
            was = name
            if at and keep is not None:
                was = f"{name[:at.start(1)]}{keep[int(at[1])]}{name[at.end(1):]}"
            if was not in old:
                self.check(False, f"{name} is not in the source")
                continue
            seen.add(was)
            s = old[was]
            if name.endswith("gate_map.weight"):  # its columns are the experts of the layer before
                layer = int(name.split(".")[2])
                s = s[:, self.keep_of(f"model.layers.{max(layer - 1, 0)}.", plan)]
            if s.shape != t.shape:
                axis = next(i for i in range(s.dim()) if s.shape[i] != t.shape[i])
                s = s.unflatten(axis, (experts, -1)).index_select(axis, torch.tensor(keep)).flatten(axis, axis + 1)
            same = s.dtype == t.dtype and s.shape == t.shape and torch.equal(s.contiguous().view(torch.uint8),
                                                                             t.contiguous().view(torch.uint8))
            self.check(same, f"{name} is not the kept part of {was}")
        for name in set(old) - seen:
            keep, at = self.keep_of(name, plan), re.search(r"experts\.(\d+)\.", name)
            gone = at and keep is not None and int(at[1]) not in keep
            self.check(gone or (dropped and re.match(dropped, name)), f"{name} is missing")

    def check_config(self, out, allowed):
        def walk(a, b, path):
            if type(a) is not type(b):
                yield path, a, b
            elif isinstance(a, dict):
                self.check(list(a) == list(b), f"config.json {path}: keys {list(a)} became {list(b)}")
                for k in a:
                    yield from walk(a[k], b.get(k), f"{path}.{k}" if path else k)
            elif a != b:
                yield path, a, b
        with open(os.path.join(self.source, "config.json"), encoding="utf-8") as f, \
                open(os.path.join(out, "config.json"), encoding="utf-8") as g:
            old, new = f.read(), g.read()
        changed = list(walk(json.loads(old), json.loads(new), ""))
        names = {p.split(".")[-1] for p, _, _ in changed}
        lines = [(a, b) for a, b in zip(old.split("\n"), new.split("\n")) if a != b]
        self.check(old.count("\n") == new.count("\n") and len(lines) == len(changed),
                   f"config.json: {len(changed)} values changed, but other text did too: {lines[:3]}")
        self.check(names & COUNTS and names <= COUNTS | allowed, f"config.json: changed {changed}")

    # --- what is tried

    def groups(self):
        return self.model.config.get_text_config().to_dict().get("n_group") or 1

    def half(self):
        stats = os.path.join(self.work, "stats.h5")
        self.tool("calibrate", self.source, "--text", self.ids, "-o", stats, "-q")
        options = ("--stats", stats, "--method", "reap", "--remove", "50%")
        out, plan = self.prune("half", *options)
        n = families.expert_count(self.model)
        sizes = {len(l["keep"]) for l in plan["layers"] + plan.get("others", [])}
        self.check(sizes == {n // 2}, f"plan keeps {sizes} of {n}")
        groups = self.groups()
        for l in plan["layers"] + plan.get("others", []):
            per = [sum(e // (n // groups) == g for e in l["keep"]) for g in range(groups)]
            self.check(len(set(per)) == 1, f"layer {l['layer']}: groups keep {per}")
        if self.spec["mtp"]:
            self.check(any(o["kind"] == "mtp" for o in plan.get("others", [])), "the plan has no set for the MTP layer")
        worst = self.compare(out, plan, "half")
        whole, want = families.observe(self.spec, self.model, self.windows)["logits"], self.want(plan)
        self.check((whole - want).abs().max() > 20 * LIMIT * want.abs().max(), "the removal changed nothing")
        self.check_tensors(out, plan)
        self.check_config(out, set())
        return out, plan, options, worst

    def mtp_drop(self, options):
        out, plan = self.prune("no-mtp", *options, "--mtp", "drop")
        self.check(not any(o["kind"] == "mtp" for o in plan.get("others", [])), "--mtp drop: the plan has a set for it")
        self.check(not any(re.match(self.spec["mtp"], n) for n in families.read_tensors(out)), "--mtp drop: tensors are left")
        worst = self.compare(out, plan, "without MTP")
        self.check_tensors(out, plan, self.spec["mtp"])
        keys = {"num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers"}
        self.check_config(out, keys)
        with open(os.path.join(out, "config.json"), encoding="utf-8") as f:
            said = {k: v for k, v in json.load(f).items() if k in keys}
        self.check(not any(said.values()), f"--mtp drop: config.json says {said}")
        return worst

    def pad(self, options, half, plan):
        n, groups = families.expert_count(self.model), self.groups()
        if self.spec["name"] in NOT_PADDED:
            self.tool("prune", self.source, *options, "--pad-to", str(n), "-o", os.path.join(self.work, "refused"), "-q", fails=True)
            return 0.0
        out, _ = self.prune("padded", *options, "--pad-to", str(n))
        worst = self.compare(out, plan, "padded")
        ours = self.ours(half).clone()  # the next one is written over it
        self.check(torch.equal(self.ours(out), ours), "--pad-to: not what the output computes without it")
        if groups > 1:
            refused = os.path.join(self.work, "refused")
            self.tool("prune", self.source, *options, "--pad-to", str(n - 1), "-o", refused, "-q", fails=True)
        self.check(families.expert_count(families.load(self.spec, out, os.path.join(self.work, "plain-out"))) == n,
                   "--pad-to: number of experts")
        return worst

    def cast(self, plan):
        """--dtype f32 multiplies quantized weights out; transformers then loads the output as it is."""
        out, again = self.prune("cast", "--stats", os.path.join(self.work, "stats.h5"), "--method", "reap", "--remove", "50%",
                                "--dtype", "f32")
        self.check(again["layers"] == plan["layers"], "--dtype: another plan")
        with open(os.path.join(out, "config.json"), encoding="utf-8") as f:
            self.check("quantization_config" not in json.load(f), "--dtype f32: quantization_config is left")
        odd = [n for n, t in families.read_tensors(out).items()
               if t.dtype in (torch.uint8, torch.float8_e4m3fn) or n.endswith("_scale_inv")
               or (re.search(r"(_proj|\.w[123])(\.weight)?$", n) and t.dim() > 1 and t.dtype != torch.float32)]
        self.check(not odd, f"--dtype f32: {odd[:3]}")
        return self.compare(out, plan, "cast")

    def ungroup(self):
        out, plan = self.prune("ungrouped", "--method", "random", "--seed", "3", "--remove", "50%", "--groups", "drop")
        worst = self.compare(out, plan, "ungrouped", ungrouped=True)
        self.check_config(out, {"n_group", "topk_group", "topk_method"})
        return worst


def run_row(a, spec, seed, work):
    row, worst = None, {}
    try:
        row = Row(a, spec, seed, work)
        half, plan, options, worst["half"] = row.half()
        if spec["mtp"]:
            worst["no mtp"] = row.mtp_drop(options)
        if spec["name"] in PADDED + NOT_PADDED:
            worst["padded"] = row.pad(options, half, plan)
        if spec["make"] and re.search("fp8|mxfp4", spec["make"]):
            worst["cast"] = row.cast(plan)
        if spec["name"] in UNGROUPED:
            worst["ungrouped"] = row.ungroup()
    except (ValueError, KeyError, RuntimeError) as e:
        (row.wrong if row else worst.setdefault("wrong", [])).append(f"{type(e).__name__}: {e}")
    wrong = (row.wrong if row else []) + worst.pop("wrong", [])
    print(f"{spec['name']:24s} " + ", ".join(f"{k} {v:.1e}" for k, v in worst.items())
          + "".join(f"\n  WRONG {w}" for w in wrong[:8]) + (f"\n  and {len(wrong) - 8} more" if len(wrong) > 8 else ""), flush=True)
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
    with tempfile.TemporaryDirectory() as folder:
        return families.run_rows(families.ROWS, a, folder, run_row)


if __name__ == "__main__":
    sys.exit(main())
