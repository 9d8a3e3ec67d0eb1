"""Speed of the C tokenizer against `tokenizers` on one thread, in one run.

    python tests/bench/tokenizer.py --build BUILD_DIR [--rounds 5] [TEXT_FILE...]

Without files it takes the demo model's samples.txt. Both encode every file whole and then line by line, with the demo
model's tokenizer.json (byte-level, NFC, one Split) and with a SentencePiece-like one trained here (the whole text is one
piece). Prints megabytes a second, best of the rounds, and whether the numbers of ids agree.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(os.path.dirname(HERE), "interop"))
import test_tokenizer as chains
from tokenizers import Tokenizer


def theirs(path, texts, rounds):
    t, best, n = Tokenizer.from_file(path), float("inf"), 0
    for _ in range(rounds):
        start = time.perf_counter()
        n = sum(len(t.encode(s, add_special_tokens=False).ids) for s in texts)
        best = min(best, time.perf_counter() - start)
    return best, n


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--build", required=True)
    ap.add_argument("--rounds", type=int, default=5)
    ap.add_argument("files", nargs="*")
    a = ap.parse_args()
    files = a.files or [os.path.join(chains.DEMO, "samples.txt")]
    whole = []
    for f in files:
        with open(f, encoding="utf-8", newline="") as opened:
            whole.append(opened.read())
    lines = [l for s in whole for l in s.split("\n")]
    megabytes = sum(len(s.encode()) for s in whole) / 1e6
    disagree = 0
    with tempfile.TemporaryDirectory() as folder:
        sp = os.path.join(folder, "tokenizer.json")
        with open(sp, "w", encoding="utf-8") as out:
            json.dump(chains.sp_chains([l for l in lines if l])["mixtral"], out)
        for name, path in (("byte-level", os.path.join(chains.DEMO, "tokenizer.json")), ("sentencepiece-like", sp)):
            said = subprocess.run([os.path.join(a.build, "tests", "tokenize"), "--time", str(a.rounds), path, *files],
                                  stdout=subprocess.PIPE, check=True).stdout.decode().split()
            for kind, texts, at in (("whole files", whole, 1), ("lines", lines, 5)):
                ours, n_ours = float(said[at]), int(said[at + 2])
                took, n = theirs(path, texts, a.rounds)
                disagree += n != n_ours
                print(f"{name}, {kind}: ours {megabytes / ours:.1f} MB/s, tokenizers {megabytes / took:.1f} MB/s, "
                      f"{took / ours:.1f} times; {n_ours} ids, {'same number' if n == n_ours else f'theirs {n}'}")
    return 1 if disagree else 0


if __name__ == "__main__":
    sys.exit(main())
