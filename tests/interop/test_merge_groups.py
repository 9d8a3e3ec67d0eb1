"""Compares masses and distances of experts (moec_merge_mass_of, moec_merge_distances) with torch, from transformers' own activations.

    python tests/interop/test_merge_groups.py --build BUILD_DIR

For small checkpoints of families.py, hooks take what the routers of transformers get and say; outputs of all experts for all tokens are
computed from its weights in float64. BUILD_DIR/tests/dump_merge must say the same within 1e-5 of each value. Exit 0: nothing differs.
"""
import argparse
import os
import subprocess
import sys
import tempfile

import checks
from checks import check
import families
import numpy as np
import torch

LIMIT = 1e-5
NAMES = ("qwen3_moe", "mixtral", "qwen2_moe", "deepseek_v3")


def moe_layers(model):
    return [(i, layer.mlp) for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]


@torch.no_grad()
def activations(model, windows):
    """{layer: (x [T,H], weights [T,k], experts [T,k])} of what the experts are called with."""
    got, hooks = {}, []

    def hook(layer):
        def call(_, args, kwargs):
            x, *others = [a for a in (*args, *kwargs.values()) if torch.is_tensor(a)]
            ids, = [a for a in others if not a.is_floating_point()]
            weights, = [a for a in others if a.is_floating_point()]
            got.setdefault(layer, []).append((x.reshape(-1, x.shape[-1]), weights, ids))
        return call
    for layer, mlp in moe_layers(model):
        hooks.append(mlp.experts.register_forward_pre_hook(hook(layer), with_kwargs=True))
    for w in windows:
        model(input_ids=torch.tensor([w]), use_cache=False)
    for h in hooks:
        h.remove()
    return {layer: [torch.cat(part) for part in zip(*parts)] for layer, parts in got.items()}


def outputs(experts, x):
    """[E,T,H]"""
    gate, up = experts.gate_up_proj.detach().double().chunk(2, 1)
    a = torch.nn.functional.silu(torch.einsum("th,eih->eti", x, gate)) * torch.einsum("th,eih->eti", x, up)
    return torch.einsum("eti,ehi->eth", a, experts.down_proj.detach().double())


def masses(f, z, weights, ids, sigmoid):
    g = torch.zeros_like(z).scatter(1, ids, weights)
    on = torch.zeros_like(z).scatter(1, ids, 1.0)
    p = z.sigmoid() if sigmoid else z.softmax(-1)
    size, n = f.norm(dim=-1).T, on.sum(0)
    mean = n.clamp(min=1)
    return {"count": n, "gate": g.sum(0), "gate-sq": (g * g).sum(0), "reap": (g * size).sum(0) / mean,
            "energy": (g * size).square().sum(0), "ream": (on * p * p * size).sum(0) / mean, "equal": (n > 0).double()}


def between(a):
    return (a[:, None] - a[None]).flatten(2).norm(dim=-1)


def cosines(a):
    u = torch.nn.functional.normalize(a.flatten(1), dim=-1, eps=1e-300)
    return u @ u.T


def distances(f, z, experts, router, sigmoid):
    p = z.sigmoid() if sigmoid else z.softmax(-1)
    units = between(torch.nn.functional.normalize(z, dim=0).T)
    gated = (p.T[..., None] * f).mean(1)
    per_token = torch.stack([cosines(f[:, t]) for t in range(f.shape[1])]).mean(0)
    weights = experts.gate_up_proj.detach().double()
    found = {"logits": (1 - cosines(z.T)) / 2, "centred-logits": (1 - cosines((z - z.mean(1, keepdim=True)).T)) / 2,
             "mean-output": between(f.mean(1)), "output-cosine": 1 - per_token,
             "output": torch.stack([(f - one).square().sum(-1).mean(-1) for one in f]),
             "gated": 1 - ((1 + cosines(gated)) / 2 + 1 - units / units.max()) / 2,
             "weights": between(weights), "router-rows": between(router)}
    for d in found.values():
        d.fill_diagonal_(0.0)
    return found


def ours(a, folder, layer, x, z, weights, ids):
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        for t in (x.float(), z.float(), weights.float(), ids.int()):
            file.write(t.contiguous().numpy().tobytes())
        file.flush()
        p = subprocess.run([os.path.join(a.build, "tests", "dump_merge"), folder, str(layer), str(len(x)), file.name],
                           capture_output=True, text=True)
    check(p.returncode == 0, f"dump_merge: exit {p.returncode}: {p.stderr.strip()}")
    return {line.split()[0]: np.array(line.split()[1:], dtype=float) for line in p.stdout.splitlines()}


def compare(a, spec, work):
    folder = os.path.join(work, spec["name"])
    families.write(spec, folder, "5")
    model = families.load(spec, folder, work)
    windows = families.windows_of(families.seed_of(spec))
    sigmoid, worst = spec["name"].startswith("deepseek_v3"), 0.0
    for layer, (x, weights, ids) in activations(model, windows).items():
        mlp = model.model.layers[layer].mlp
        router = mlp.gate.weight.detach().double()
        z = (x.double() @ router.T).float().double()
        args = (outputs(mlp.experts, x.double()), z)
        want = {**masses(*args, weights.double(), ids, sigmoid), **distances(*args, mlp.experts, router, sigmoid)}
        got = ours(a, folder, layer, x, z, weights, ids)
        check(set(got) == set(want), f"{spec['name']}: {sorted(set(got) ^ set(want))}")
        for name in set(got) & set(want):
            b = want[name].numpy().flatten()
            off = np.abs(got[name] - b) / np.maximum(np.abs(b), 1e-30)
            worst = max(worst, off.max())
            check(off.max() <= LIMIT, f"{spec['name']}, layer {layer}, {name}: {off.max():.1e}")
    print(f"{spec['name']}: {len(x)} tokens, {len(got)} masses and distances, the largest difference is {worst:.1e}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--build", required=True)
    a = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        for spec in families.ROWS:
            if spec["name"] in NAMES:
                compare(a, spec, work)
    sys.exit(checks.failed != 0)


main()
