"""Checks repair against numpy on transformers' own activations.

    python tests/interop/test_repair.py --build BUILD_DIR

1. BUILD_DIR/moecompress prunes the demo model by half with --repair ridge. The down projections of its first layer must be those
   that a plain numpy solution of the same normal equations gives (block Gauss-Seidel over experts with a held-out test, written
   here from the formulas in lib/method/repair.h), from the input, residual streams and router of transformers' model.
2. With --repair-router refit, the rows of that layer's router must be those of numpy's solution behind its projections.
3. Repaired models (ridge, deep, refit) load in transformers without a missing or unexpected key, and the mean log-likelihood there is
   that of `eval`.
Exit 0: nothing differs.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")
import numpy as np
import torch
import transformers
from safetensors import safe_open
from tokenizers import Tokenizer

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
DEMO = os.path.join(ROOT, "recipes", "demo-model")
SEQ, WINDOWS, EVERY, SWEEPS, LAMBDA = 128, 40, 8, 3, 1e-2
ROUTER_LAMBDA, REACH = 1e-3, 0.02

failed = 0


def check(ok, what):
    global failed
    print("ok:  " if ok else "FAIL:", what)
    failed += not ok


def load(path):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager", output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            check(False, f"{path}: {kind}: {info[kind]}")
    return model.eval()


def tensor(folder, name):
    for file in sorted(os.listdir(folder)):
        if file.endswith(".safetensors"):
            with safe_open(os.path.join(folder, file), "pt") as f:
                if name in f.keys():
                    return f.get_tensor(name).float().numpy().astype(np.float64)
    raise KeyError(name)


def bf16(a):
    return torch.tensor(a, dtype=torch.float32).bfloat16().double().numpy()


def first_layer(model, windows):
    """Input of the experts, stream in front of them and behind the layer, [tokens, hidden] each."""
    seen = {}
    layer = model.model.layers[0]
    hooks = [layer.post_attention_layernorm.register_forward_hook(lambda m, a, o: seen.update(h=a[0], x=o)),
             layer.register_forward_hook(lambda m, a, o: seen.update(after=o[0] if isinstance(o, tuple) else o))]
    with torch.no_grad():
        model(torch.tensor(windows))
    for hook in hooks:
        hook.remove()
    return [seen[k].reshape(-1, seen[k].shape[-1]).double().numpy() for k in ("x", "h", "after")]


def ridge(model_dir, keep, x, h, after, top_k):
    name = "model.layers.0.mlp.experts.%d.%s_proj.weight"
    gate, up, down = ([tensor(model_dir, name % (e, part)) for e in keep] for part in ("gate", "up", "down"))
    logits = x @ tensor(model_dir, "model.layers.0.mlp.gate.weight")[keep].T
    order = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
    g = np.zeros_like(logits)
    top = np.take_along_axis(logits, order, 1)
    p = np.exp(top - top.max(1, keepdims=True))
    np.put_along_axis(g, order, p / p.sum(1, keepdims=True), 1)
    window = np.arange(len(x)) // SEQ
    held = window % EVERY == EVERY - 1
    w = 1.0 / (after ** 2).mean(1)
    w *= (~held).sum() / w[~held].sum()
    acts = []
    for k in range(len(keep)):
        a = x @ gate[k].T
        acts.append(g[:, k:k + 1] * (a / (1 + np.exp(-a))) * (x @ up[k].T))
    rest = after - h - sum(b @ d.T for b, d in zip(acts, down))
    taken = 0
    for _ in range(SWEEPS):
        for k in range(len(keep)):
            b = acts[k][~held]
            gram = (b * w[~held, None]).T @ b
            mu = LAMBDA * np.trace(gram) / len(gram)
            change = np.linalg.solve(gram + mu * np.eye(len(gram)), (b * w[~held, None]).T @ rest[~held]).T
            new = bf16(down[k] + change)
            after_rest = rest - acts[k] @ (new - down[k]).T
            if (w[held, None] * after_rest[held] ** 2).sum() < (w[held, None] * rest[held] ** 2).sum():
                rest, down[k], taken = after_rest, new, taken + 1
    fit = ~held
    return down, taken, dict(x=x[fit], rest=rest[fit], g=g[fit], order=order[fit], acts=[b[fit] for b in acts], w=w[fit])


def refit(rows, down, s):
    """Rows of the router by moec_repair_router without targets: of the selected experts, what their logits want to move by."""
    given = np.stack([b @ d.T for b, d in zip(s["acts"], down)], 1)[np.arange(len(s["x"]))[:, None], s["order"]]
    r = given.sum(1)
    jacobian = given - np.take_along_axis(s["g"], s["order"], 1)[:, :, None] * r[:, None]
    gram = np.einsum("tah,tbh->tab", jacobian, jacobian)
    gram += REACH * ((r + s["rest"]) ** 2).sum(1)[:, None, None] * np.eye(gram.shape[1])
    wish = np.linalg.solve(gram, np.einsum("tah,th->ta", jacobian, s["rest"])[..., None])[..., 0]
    change = np.zeros_like(s["g"])
    np.put_along_axis(change, s["order"], wish.clip(-3, 3), 1)
    weighted = s["x"] * s["w"][:, None]
    a = weighted.T @ s["x"]
    a += ROUTER_LAMBDA * np.trace(a) / len(a) * np.eye(len(a))
    return rows + np.linalg.solve(a, weighted.T @ change).T


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", required=True)
    program = os.path.abspath(os.path.join(parser.parse_args().build, "moecompress"))
    ids = Tokenizer.from_file(os.path.join(DEMO, "tokenizer.json")).encode(
        open(os.path.join(DEMO, "samples.txt"), encoding="utf-8").read(), add_special_tokens=False).ids
    windows = [ids[i * SEQ:(i + 1) * SEQ] for i in range(WINDOWS)]
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        with open("text.ids", "w") as f:
            f.writelines(" ".join(map(str, w)) + "\n" for w in windows)
        text = ["--seq-len", str(SEQ), "--compute", "f32", "-q", "--text", "text.ids"]
        subprocess.run([program, "calibrate", DEMO, "-o", "stats.h5", *text], check=True)
        common = [program, "prune", DEMO, "--stats", "stats.h5", "--method", "energy", "--remove", "50%"]
        for kind, how in (("ridge", ["ridge"]), ("deep", ["deep"]), ("refit", ["ridge", "--repair-router", "refit"])):
            subprocess.run([*common, "-o", kind, "--repair", *how, *text], check=True, stdout=subprocess.DEVNULL)

        original = load(DEMO)
        keep = json.load(open("ridge/moecompress.json"))["plan"]["layers"][0]["keep"]
        x, h, after = first_layer(original, windows)
        want, taken, state = ridge(DEMO, keep, x, h, after, original.config.num_experts_per_tok)
        have = [tensor("ridge", f"model.layers.0.mlp.experts.{k}.down_proj.weight") for k in range(len(keep))]
        old = [tensor(DEMO, f"model.layers.0.mlp.experts.{e}.down_proj.weight") for e in keep]
        moved = np.sqrt(sum(((a - b) ** 2).sum() for a, b in zip(want, old)))
        apart = np.sqrt(sum(((a - b) ** 2).sum() for a, b in zip(want, have)))
        check(taken > 0 and apart < 0.02 * moved,
              f"layer 0: {taken} visits taken; numpy's projections moved {moved:.4g}, ours are {apart:.2g} from them")
        name = "model.layers.0.mlp.gate.weight"
        old, have = tensor(DEMO, name)[keep], tensor("refit", name)
        want = bf16(refit(old, want, state))
        moved, apart = np.sqrt(((want - old) ** 2).sum()), np.sqrt(((want - have) ** 2).sum())
        told = json.load(open("refit/moecompress.json"))["plan"]["layers"][0]
        check(told["router_refit"] and 0 < told["load_shift"] < 0.1 and apart < 0.05 * moved,
              f"layer 0: load shifts by {told['load_shift']:.4f}; numpy's rows moved {moved:.4g}, ours are {apart:.2g} from them")
        for kind in ("ridge", "deep", "refit"):
            model = load(kind)
            with torch.no_grad():
                logits = model(torch.tensor(windows)).logits.double()
            nll = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]),
                                                    torch.tensor(windows)[:, 1:].reshape(-1)).item()
            ours = json.loads(subprocess.run([program, "eval", kind, "--json", *text], check=True, capture_output=True,
                                             text=True).stdout)["overall"]["cross_entropy"]
            check(abs(ours - nll) < 1e-5, f"{kind}: cross-entropy {ours:.6f}, transformers {nll:.6f}")
    print("nothing differs" if not failed else f"{failed} checks failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
