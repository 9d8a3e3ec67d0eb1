"""Writes what transformers computes, so that the base suite needs no Python: float32, eager attention and experts.

    python tests/interop/make_expected.py [--build BUILD_DIR]

tests/unit/data/demo_expected.h: the first 128 ids of the demo model's samples.txt, for tests/unit/test_forward.c.
With --build, tests/unit/data/families_expected.h: 24 logits of the checkpoint that BUILD_DIR/tests/write_tiny makes of every
family, for tests/unit/test_families.c; families that transformers does not have are computed by families.py.
"""
import argparse
import os
import subprocess
import tempfile

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")
import families
import torch
import transformers
from tokenizers import Tokenizer

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
DEMO = os.path.join(ROOT, "recipes", "demo-model")


def table(kind, name, values, form):
    lines, line = [], "   "
    for v in values:
        word = " " + form(v) + ","
        if len(line) + len(word) > 110:
            lines.append(line)
            line = "   "
        line += word
    return f"static const {kind} {name}[{len(values)}] = {{\n" + "\n".join(lines + [line]) + "\n};\n"


@torch.no_grad()
def demo():
    with open(os.path.join(DEMO, "samples.txt"), encoding="utf-8") as f:
        ids = Tokenizer.from_file(os.path.join(DEMO, "tokenizer.json")).encode(f.read(), add_special_tokens=False).ids[:128]
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32, attn_implementation="eager",
                                                              experts_implementation="eager").eval()
    logits = model(torch.tensor([ids]), use_cache=False).logits[0].double()
    nll = -logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    with open(os.path.join(ROOT, "tests", "unit", "data", "demo_expected.h"), "w", encoding="ascii") as f:
        f.write(f"/* Made by tests/interop/make_expected.py with transformers {transformers.__version__} and torch "
                f"{torch.__version__.split('+')[0]}: ids, the loss of\n * each next id (nats) and the most likely one at "
                "every position. */\n")
        f.write(table("int32_t", "expected_ids", ids, str))
        f.write(table("double", "expected_loss", nll.tolist(), "{:.7f}".format))
        f.write(table("int32_t", "expected_top", logits.argmax(-1).tolist(), str))



LENGTHS = (5, 2, 40, 17)


# families whose language model transformers loads inside a multimodal one only: tests/interop/test_families.py covers them
NOT_ALONE = ("qwen3_vl_moe_text",)


def spec_of(family):
    """The row of families.ROWS whose classes read this family."""
    for spec in families.ROWS:
        if spec["name"] == family:
            return spec
    for spec in families.ROWS:
        if getattr(transformers, spec["config"]).model_type == family and not spec["make"]:
            return spec
    raise SystemExit(f"no row of families.ROWS is a {family}")


@torch.no_grad()
def all_families(build):
    writer = os.path.join(build, "tests", "write_tiny")
    names = subprocess.run([writer], check=True, capture_output=True, text=True).stdout.split()
    windows = families.windows_of(77, LENGTHS, vocab=64)
    ids, ends = sum(windows, []), [sum(LENGTHS[:i + 1]) for i in range(len(LENGTHS))]
    rows = []
    for name in [n for n in names if n not in NOT_ALONE]:
        with tempfile.TemporaryDirectory() as work:
            folder = os.path.join(work, "tiny")
            subprocess.run([writer, name, folder], check=True)
            spec = spec_of(name)
            try:
                model = families.load(dict(spec, as_type=spec["as_type"] or name), folder, work)
            except (ValueError, RuntimeError, AttributeError, KeyError, TypeError) as e:
                print(f"{name}: {type(e).__name__}: {str(e)[:500]}")
                continue
            logits = families.observe(spec, model, windows)["logits"]
        got = [logits[(37 * i + 3) % len(ids), (29 * i + 1) % logits.shape[1]].item() for i in range(24)]
        print(f"{name}: logits std {logits.std():.3g}, largest {logits.abs().max():.3g}")
        text = ", ".join(f"{v:.8g}f" if "." in f"{v:.8g}" or "e" in f"{v:.8g}" else f"{v:.8g}.0f" for v in got).split(", ")
        lines = ["     " + ", ".join(text[i:i + 6]) for i in range(0, 24, 6)]
        rows.append(f'    {{"{name}", {{\n' + ",\n".join(lines) + "}},\n")
    with open(os.path.join(ROOT, "tests", "unit", "data", "families_expected.h"), "w", encoding="ascii") as f:
        f.write(f"/* Made by tests/interop/make_expected.py with transformers {transformers.__version__} and torch "
                f"{torch.__version__.split('+')[0]}: ids,\n * ends of the windows, and for every family the logits of token "
                "(37 i + 3) mod T for id (29 i + 1) mod vocab. */\n")
        f.write(table("int32_t", "families_ids", ids, str))
        f.write(table("int64_t", "families_ends", ends, str))
        f.write("\ntypedef struct families_row {\n    const char *family;\n    float logit[24];\n} families_row;\n")
        f.write("static const families_row families_expected[] = {\n" + "".join(rows) + "};\n")


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--build", help="folder with tests/write_tiny")
    a = ap.parse_args()
    transformers.utils.logging.disable_progress_bar()
    demo()
    if a.build:
        all_families(a.build)


if __name__ == "__main__":
    main()
