"""Checks repair against numpy on transformers' own activations.

    python tests/interop/test_repair.py --build BUILD_DIR

1. BUILD_DIR/moecompress prunes the demo model by half with --repair ridge. The up and down projections of its first layer must be
   those that plain numpy gives (block Gauss-Seidel over experts with a held-out test: normal equations for down, a few conjugate
   gradients for up, written here from the formulas in lib/method/repair.h), from the input, residual streams and router of
   transformers' model.
   So must those with --grain neurons, which start from what is left of each expert by --repair none.
2. With --repair-router refit, the rows of that layer's router must be those of numpy's solution behind its projections.
3. Repaired models (ridge, deep, refit, narrow) load in transformers without a missing or unexpected key, and the mean log-likelihood there is
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
SEQ, WINDOWS, EVERY, SWEEPS, UP_SWEEPS, UP_STEPS, LAMBDA = 128, 40, 8, 2, 1, 3, 1e-2
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


def routed(model_dir, keep, x, h, after, top_k):
    """Weights of the kept experts [K][gate, up, down], router weights [tokens,K], what is wanted, token weights, who is held out."""
    name = "model.layers.0.mlp.experts.%d.%s_proj.weight"
    experts = [[tensor(model_dir, name % (e, part)) for part in ("gate", "up", "down")] for e in keep]
    logits = x @ tensor(model_dir, "model.layers.0.mlp.gate.weight")[keep].T
    order = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
    g = np.zeros_like(logits)
    top = np.take_along_axis(logits, order, 1)
    p = np.exp(top - top.max(1, keepdims=True))
    np.put_along_axis(g, order, p / p.sum(1, keepdims=True), 1)
    held = np.arange(len(x)) // SEQ % EVERY == EVERY - 1
    w = 1.0 / (after ** 2).mean(1)
    w *= (~held).sum() / w[~held].sum()
    return experts, g, after - h, w, held


def silu(a):
    return a / (1 + np.exp(-a))


def new_down(b, down, rest, w):
    gram = (b * w[:, None]).T @ b
    mu = LAMBDA * np.trace(gram) / len(gram)
    return down + np.linalg.solve(gram + mu * np.eye(len(gram)), (b * w[:, None]).T @ rest).T


def new_up(slope, x, white, up, down, rest, w):
    """UP_STEPS conjugate gradients from 0 on the change of up, with whitened inputs x' = x white and neurons of like size."""
    root = np.sqrt(w)[:, None]
    size = ((root * slope) ** 2).sum(0) * (down ** 2).sum(0)
    scale = 1 / np.sqrt(size + 1e-2 * size.mean())
    s, x = root * slope * scale, x @ white
    res = (s * ((root * rest) @ down)).T @ x
    q, step = np.zeros_like(res), res.copy()
    for _ in range(UP_STEPS):
        image = (s * (s * (x @ step.T) @ (down.T @ down))).T @ x + LAMBDA * step
        rr = (res ** 2).sum()
        alpha = rr / (step * image).sum()
        q, res = q + alpha * step, res - alpha * image
        step = res + (res ** 2).sum() / rr * step
    return up + scale[:, None] * (q @ white.T)


def ridge(model_dir, keep, x, h, after, top_k):
    experts, g, rest, w, held = routed(model_dir, keep, x, h, after, top_k)
    cov = (x[~held] * w[~held, None]).T @ x[~held] / w[~held].sum()
    white = np.linalg.cholesky(np.linalg.inv(cov + 1e-2 * np.trace(cov) / len(cov) * np.eye(len(cov))))
    taken = 0

    def features(k):
        return g[:, k:k + 1] * silu(x @ experts[k][0].T) * (x @ experts[k][1].T)

    def settle(k, part, value, moved):
        nonlocal rest, taken
        left = rest - moved
        if (w[held, None] * left[held] ** 2).sum() < (w[held, None] * rest[held] ** 2).sum():
            rest, experts[k][part], taken = left, value, taken + 1

    rest = rest - sum(features(k) @ experts[k][2].T for k in range(len(keep)))
    for sweep in range(SWEEPS):
        for k in range(len(keep)):
            gate, up, down = experts[k]
            fit = ~held & (g[:, k] > 0)
            b = features(k)
            value = bf16(new_down(b[fit], down, rest[fit], w[fit]))
            settle(k, 2, value, b @ (value - down).T)
            if sweep >= UP_SWEEPS:
                continue
            down, slope = experts[k][2], g[:, k:k + 1] * silu(x @ gate.T)
            value = bf16(new_up(slope[fit], x[fit], white, up, down, rest[fit], w[fit]))
            settle(k, 1, value, (slope * (x @ (value - up).T)) @ down.T)
    fit = ~held
    state = dict(x=x[fit], rest=rest[fit], g=g[fit], w=w[fit], acts=[features(k)[fit] for k in range(len(keep))],
                 order=np.argsort(-g[fit], axis=1, kind="stable")[:, :top_k])
    return experts, taken, state


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


def compare(what, made, before, keep, sample, top_k):
    """Layer 0 of `made` against numpy's solution, which starts from experts `keep` of `before`."""
    want, taken, state = ridge(before, keep, *sample, top_k)
    for i, part in enumerate(("gate", "up", "down")):
        name = f"model.layers.0.mlp.experts.%d.{part}_proj.weight"
        have = [tensor(made, name % k) for k in range(len(keep))]
        old = [tensor(before, name % e) for e in keep]
        moved = np.sqrt(sum(((a[i] - b) ** 2).sum() for a, b in zip(want, old)))
        apart = np.sqrt(sum(((a[i] - b) ** 2).sum() for a, b in zip(want, have)))
        check(taken > 0 and apart <= 0.02 * moved and (moved > 0) == (part != "gate"),
              f"{what}, layer 0, {part}: numpy moved it by {moved:.4g} in {taken} changes of up and down, ours is {apart:.2g} from that")
    return want, state


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
        subprocess.run([program, "calibrate", DEMO, "--tier", "1", "-o", "stats.h5", *text], check=True)
        common = [program, "prune", DEMO, "--stats", "stats.h5", "--method", "energy", "--remove", "50%"]
        for kind, how in (("ridge", ["ridge"]), ("deep", ["deep"]), ("refit", ["ridge", "--repair-router", "refit"])):
            subprocess.run([*common, "-o", kind, "--repair", *how, *text], check=True, stdout=subprocess.DEVNULL)
        common[-4:] = ["--grain", "neurons", "--keep-width", "40"]
        subprocess.run([*common, "-o", "thin", "-q"], check=True, stdout=subprocess.DEVNULL)
        subprocess.run([*common, "-o", "narrow", "--repair", "ridge", *text], check=True, stdout=subprocess.DEVNULL)

        original = load(DEMO)
        keep = json.load(open("ridge/moecompress.json"))["plan"]["layers"][0]["keep"]
        sample, top_k = first_layer(original, windows), original.config.num_experts_per_tok
        want, state = compare("experts", "ridge", DEMO, keep, sample, top_k)
        compare("neurons", "narrow", "thin", list(range(original.config.num_experts)), sample, top_k)
        name = "model.layers.0.mlp.gate.weight"
        old, have = tensor(DEMO, name)[keep], tensor("refit", name)
        want = bf16(refit(old, [e[2] for e in want], state))
        moved, apart = np.sqrt(((want - old) ** 2).sum()), np.sqrt(((want - have) ** 2).sum())
        told = json.load(open("refit/moecompress.json"))["plan"]["layers"][0]
        check(told["router_refit"] and 0 < told["load_shift"] < 0.1 and apart < 0.05 * moved,
              f"layer 0: load shifts by {told['load_shift']:.4f}; numpy's rows moved {moved:.4g}, ours are {apart:.2g} from them")
        for kind in ("ridge", "deep", "refit", "narrow"):
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
