"""Runs a small checkpoint of every family and compares it with transformers in float32: logits, selected experts, sizes.

    python tests/interop/test_families.py --build BUILD_DIR [--only NAME] [--keep DIR] [--json FILE]

Each row of families.ROWS is written here with the config.json of transformers 5, that of a release, and one without the keys
that have defaults in transformers, and run on windows of unequal length by transformers (eager attention and experts) and by
BUILD_DIR/tests/dump_forward. Logits must be within the row's limit and the selected experts the same; two experts whose scores
differ by rounding may change places, which is counted, printed, and leaves the tokens behind it out of the comparison.
`moecompress inspect` must count layers, experts, top-k and parameters as the tensors say. Exit 0: nothing differs.
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

TIE = 1e-4  # of the spread of a token's scores


def choice_scores(spec, model, ref, layer):
    """What the selection compares: logits, or scores plus the selection bias."""
    z = ref[f"router_logits.{layer}"]
    for name, t in model.state_dict().items():
        if re.search(rf"\.layers\.{layer}\..*(correction_bias|expert_bias)$", name):
            return (z.softmax(-1) if spec["config"].startswith("Ernie") else z.sigmoid()) + t.flatten()
    return z


def compare(spec, model, ref, got, windows, where):
    """(largest difference of logits, selections that differ by a near-tie, what is wrong)."""
    wrong, flips = [], 0
    good = torch.ones(sum(map(len, windows)), dtype=torch.bool)
    starts = torch.tensor([0] + [len(w) for w in windows]).cumsum(0).tolist()
    layers = sorted(int(k.split(".")[1]) for k in ref if k.startswith("chosen"))
    ours = sorted(int(k.split(".")[1]) for k in got if k.startswith("topk_index"))
    if layers != ours:
        return 0.0, 0, [f"routers in layers {ours}, transformers has {layers}"]
    for layer in layers:
        choice = choice_scores(spec, model, ref, layer)
        index, bad = got[f"topk_index.{layer}"], 0
        for t in torch.nonzero(good).flatten().tolist():
            mine, theirs = {int(e) for e in index[t] if e >= 0}, ref[f"chosen.{layer}"][t]
            if mine == theirs:
                continue
            off = [choice[t, e].item() for e in mine ^ theirs if e < choice.shape[1]]
            margin, spread = max(off) - min(off), (choice[t].max() - choice[t].min()).item()
            if len(off) > 1 and margin <= TIE * spread:
                flips += 1
                print(f"  near-tie {where}: layer {layer} token {t}: margin {margin:.2g} of {spread:.3g}")
            else:
                bad += 1
                if bad == 1:
                    wrong.append(f"layer {layer} token {t}: experts {sorted(mine)}, transformers {sorted(theirs)}, margin "
                                 f"{margin:.3g} of {spread:.3g}")
            end = next(hi for hi in starts[1:] if t < hi)
            good[t:end] = False
        if bad > 1:
            wrong.append(f"layer {layer}: {bad} windows with other experts")
    diff = (got["logits"].double() - ref["logits"].double()).abs()[good]
    worst = diff.max().item() if len(diff) else float("nan")
    if not worst <= spec["limit"]:
        wrong.append(f"logits differ by {worst:.3g}, limit {spec['limit']:g}")
    return worst, flips, wrong


def count(spec, folder):
    """Parameters of the checkpoint: values of all tensors, scales not counted, two values in a byte of blocks."""
    total = 0
    for name, t in families.read_tensors(folder).items():
        if name.endswith(("_scale_inv", "_scales")):
            continue
        total += t.numel() * (2 if name.endswith("_blocks") else 1)
    return total


def inspect(build, folder):
    out = subprocess.run([os.path.join(build, "moecompress"), "inspect", folder, "--json"], capture_output=True, text=True)
    if out.returncode != 0:
        raise ValueError(f"inspect: exit {out.returncode}: {out.stderr.strip()}")
    return json.loads(out.stdout)


def check_inspect(spec, build, folder, model, ref):
    text = model.config.get_text_config()
    said = inspect(build, folder)
    moe = sorted(k for k in ref if k.startswith("router_logits"))
    want = {"layers": text.num_hidden_layers, "moe_layers": len(moe), "experts": families.expert_count(model),
            "hidden_size": text.hidden_size, "vocab_size": text.vocab_size}
    if spec["make"] != "top_p":
        top = text.ffn_config.moe_top_k if spec["config"] == "DbrxConfig" else text.num_experts_per_tok
        want["top_k"] = top[0] if isinstance(top, list) else top
    wrong = [f"inspect: {k} {said.get(k)}, expected {v}" for k, v in want.items() if said.get(k) != v]
    total = count(spec, folder)
    if said["parameters"]["total"] != total:
        wrong.append(f"inspect: {said['parameters']['total']} parameters, the tensors hold {total}")
    return wrong


def run_row(spec, seed, build, work, keep, report):
    windows = families.windows_of(seed)
    ids, dump = os.path.join(work, "windows.ids"), os.path.join(work, "dump.safetensors")
    with open(ids, "w", encoding="ascii") as f:
        f.writelines(" ".join(map(str, w)) + "\n" for w in windows)
    model = ref = None
    smallest = not spec["make"] and (not spec["fused"] or spec["name"].endswith("-hub"))
    for dialect in spec["dialects"] + (("min",) if smallest else ()):
        folder = os.path.join(keep or work, spec["name"], dialect)
        result = {"name": spec["name"], "dialect": dialect, "dlogit": None, "flips": 0, "wrong": []}
        report.append(result)
        try:
            families.write(spec, folder, dialect, seed=100 + seed)
            if model is None:
                model = families.load(spec, folder, work)
                ref = families.observe(spec, model, windows)
                for key in [k for k in ref if k.startswith("chosen")]:
                    if len(set().union(*ref[key])) < families.expert_count(model):
                        result["wrong"].append(f"{key}: the fixture leaves an expert unused")
            p = subprocess.run([os.path.join(build, "tests", "dump_forward"), "--threads", "2", folder, ids, dump],
                               capture_output=True, text=True)
            if p.returncode != 0:
                raise ValueError(f"exit {p.returncode}: {p.stderr.strip()}")
            worst, flips, wrong = compare(spec, model, ref, load_file(dump), windows, f"{spec['name']}/{dialect}")
            result.update(dlogit=worst, flips=flips)
            result["wrong"] += wrong + check_inspect(spec, build, folder, model, ref)
        except (ValueError, KeyError, RuntimeError) as e:
            result["wrong"].append(f"{type(e).__name__}: {e}")
        size = f"{result['dlogit']:.1e}" if result["dlogit"] is not None else "-"
        print(f"{spec['name'] + '/' + dialect:28s} max |dlogit| {size:8s} flips {result['flips']}"
              + "".join(f"\n  WRONG {w}" for w in result["wrong"]), flush=True)


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--build", required=True)
    ap.add_argument("--only", help="rows whose name contains this")
    ap.add_argument("--keep", help="leave the checkpoints in this folder")
    ap.add_argument("--json", help="write the results to this file")
    a = ap.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    report = []
    with tempfile.TemporaryDirectory() as work:
        for spec in families.ROWS:
            if not a.only or a.only in spec["name"]:
                run_row(spec, families.seed_of(spec), a.build, work, a.keep, report)
    if a.json:
        with open(a.json, "w", encoding="utf-8") as f:
            json.dump(report, f, indent=1)
    failed = [r for r in report if r["wrong"]]
    print(f"{len(report)} checkpoints, {sum(r['flips'] for r in report)} near-ties, {len(failed)} wrong")
    return 1 if failed or not report else 0


if __name__ == "__main__":
    sys.exit(main())
