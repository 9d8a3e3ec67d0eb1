"""Writes tests/unit/data/demo_expected.h: what transformers makes of the first 128 ids of the demo model's samples.txt.

    python tests/interop/make_expected.py

float32, eager attention and experts. tests/unit/test_forward.c compares with it, so that the base suite needs no Python.
"""
import os

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")
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
def main():
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


if __name__ == "__main__":
    main()
