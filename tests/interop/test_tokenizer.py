"""Compares the C tokenizer with the Python package `tokenizers`, id for id.

    python tests/interop/test_tokenizer.py --build BUILD_DIR [--strings 2000] [--seed 1] [--only NAME]

Every chain of nodes below (the demo model's own tokenizer.json and small ones trained here on samples.txt and on text made
here) encodes the same hand-made and random Unicode strings in both; ids without special tokens, of every fourth string with
them, and decoded text are compared. Code points are those assigned in Unicode 14, the version of PCRE2 10.42 and of Python 3.11's
unicodedata: `tokenizers` knows a newer Unicode, and classes of newer code points differ by necessity. Exit 0: no difference.
"""
import argparse
import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import unicodedata

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"
import tokenizers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
DEMO = os.path.join(ROOT, "recipes", "demo-model")

LL = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN = LL.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN35 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
_UP, _LOW = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UP}*{_LOW}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{{L}}\p{{N}}]?{_UP}+{_LOW}*"
         r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
TEKKEN = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UP}*{_LOW}+|[^\r\n\p{{L}}\p{{N}}]?{_UP}+{_LOW}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
DSV3 = (r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
        r"|\s*[\r\n]+|\s+(?!\S)|\s+")
LING = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+")
EXAONE = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]?"
          r"|\s*[\r\n]|\s+(?!\S)|\s+")
HAN_FIRST = r"\p{Han}+|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"

_KUP, _KLOW, _CON = _UP[:-1] + r"&&[^\p{Han}]]", _LOW[:-1] + r"&&[^\p{Han}]]", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
KIMI = (rf"[\p{{Han}}]+|[^\r\n\p{{L}}\p{{N}}]?{_KUP}*{_KLOW}+{_CON}|[^\r\n\p{{L}}\p{{N}}]?{_KUP}+{_KLOW}*{_CON}"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
THOUSANDS = r"\d{1,3}(?=(?:\d{3})*\b)"  # groups of three digits counted from the right
ASIAN = "[一-鿿㐀-䶿豈-﫿぀-ゟ゠-ヿ･-ﾟ⼀-⿟เ-๿຀-໿ក-៿က-႟ꩠ-ꩿꧠ-꧿가-힯ᄀ-ᇿ]+"
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"  # a class in a class

def split(regex, behavior="Isolated", invert=False, kind="Regex"):
    return {"type": "Split", "pattern": {kind: regex}, "behavior": behavior, "invert": invert}


def byte_level(prefix=False, regex=False):
    return {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": regex}


def sequence(*nodes, key="pretokenizers"):
    return {"type": "Sequence", key: list(nodes)}


def metaspace(scheme, cut):
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": cut}


def added(id_, content, **flags):
    row = {"id": id_, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
           "special": True}
    return row | flags


def many(first, *contents):
    return [added(first + i, text) for i, text in enumerate(contents)]


def template(before, after=()):
    ids = {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in list(before) + list(after)}
    part = lambda name: {"SpecialToken": {"id": name, "type_id": 0}}
    single = [part(n) for n, _ in before] + [{"Sequence": {"id": "A", "type_id": 0}}] + [part(n) for n, _ in after]
    return {"type": "TemplateProcessing", "single": single, "pair": single + [{"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": ids}


def document(vocab, merges, **parts):
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
             "fuse_unk": False, "byte_fallback": False, "ignore_merges": False} | parts.pop("model", {})
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
             "pre_tokenizer": None, "post_processor": None, "decoder": None}
    return whole | parts | {"model": model | {"vocab": vocab, "merges": merges}}


# ---- text ----

def code_points():
    """All code points that Unicode 14 assigns, without surrogates."""
    ucd = unicodedata if unicodedata.unidata_version.startswith("14.") else unicodedata.ucd_3_2_0
    return [c for c in range(0x110000) if ucd.category(chr(c)) not in ("Cn", "Cs")]


def alike(c):
    """The large range of code points that c is in, or None."""
    if not 0 <= c < 0x110000:
        return None
    name = unicodedata.name(chr(c), "")
    return "private" if unicodedata.category(chr(c)) == "Co" else \
        next((n for n in ("CJK UNIFIED IDEOGRAPH", "HANGUL SYLLABLE", "TANGUT IDEOGRAPH") if name.startswith(n)), None)


NASTY = (list("abcxyzABCXYZ'stmdSTMDrelv0123456789 \t\n\r\v\f.,;:!?/\\-_+*()[]{}<>=@#$%^&|~`\"") + [" "] * 12 + ["\n"] * 4 +
         list("éèüßñÅÆøİıſKΩµªºπΣσςЖжйёאבשׁעربيةकिखीกำ的中文漢字ひらカナ々〇ー゙゚한국어조") +
         list("\u0300\u0301\u0308\u0323\u0327\u0345\u05b0\u064b\u0e38\u0f71\u0f72\u3099\u1100\u1161\u11a8") +
         list("\u00a0\u1680\u180e\u2003\u2009\u200b\u200c\u200d\u2028\u2029\u202f\u205f\u3000\u0085\ufeff\u00ad\u2060") +
         list("①Ⅷ½²٣५๓𝟘〡㉑ǅʰͅ₂“”‘’…—¡¿«»€£©®™°§¶†★♥✓→∞≠𝒜𝔸😀👍🏽👨‍👩‍👧🇩🇪☕️🏳️‍🌈▁Ġ\x00\x07\x1b\x7f"))

HAND = [
    "", " ", "  ", "a", " a", "a ", "\n", "\n\n\n", " \n ", "Hello, world!", "I'm you're they'LL we've he'd it's can't",
    "x = [i**2 for i in range(10)]\n\tif x:\r\n\t\treturn {'a': 1}\n", "#include <stdio.h>\nint main(void)\n{\n    return 0;\n}\n",
    "1234567890", "12345 67 890,123.45", "３.１４ ٣٫١٤ ½ ② Ⅷ", "日本語のテキスト。漢字かな交じり文、カタカナ。", "中文文本，没有空格。１２３",
    "한국어 텍스트입니다. ㄱㄴㄷ", "Привет, мир! ёЁ Й", "שָׁלוֹם עולם", "مرحبا بالعالم ٣", "नमस्ते दुनिया", "สวัสดีชาวโลก", "Ελληνικά Σίσυφος ς",
    "e\u0301 a\u0308\u0323 \u0344 \u1e9b\u0323 q\u0307\u0323 ﬁ ﬃ Å \u212b", "\u1100\u1161\u11a8 \u1112\u1161\u11ab",
    "👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 👍🏽 ☕️ 😀😀😀", "a\u200bb\u200cc\u200dd\ufeffe", "\ufeffstart", "tab\tsep\t\t\tx", "    indented\n        more\n",
    " " * 100, " " * 1000 + "x", "x" + " " * 333 + "\n" + " " * 50 + "y", "\n" * 200, "\t" * 77, "a" * 500, "ab" * 600, "é" * 300,
    "的" * 400, "😀" * 200, "-" * 300, "=" * 64 + "\n" + "=" * 64, "<s></s><unk>", "<|endoftext|>a<|im_start|> b <|im_end|>",
    "< |endoftext|>", "<|endoftext|", "<|endoftext|><|endoftext|>", "QR aQR QRQRa  QR  qr éab ab. xab abé -ab- ab", "a ... b...c .. d....  .....", "<x>a <x> a<x>", "É éÉ  É  x", "MASK [MASK] x[MASK] [MASK]y a [MASK] b  [MASK]  c", "wordword word WORD",
    "▁ ▁▁ a▁b", "Ġ ĠĠ aĠb", "<0x41><0xE2>", "\x00\x01\x02\x7f\x80\x9f", "\r\r\n\n\r", "a\u180eb \u180e c", "\u2028\u2029", "K\u212a s\u017f 'ſ 'S",
    "http://example.com/a?b=c&d=%20e#f", "ﷺ ﷽ Ǆ ǅ", "\u0f71\u0f72\u0f74\u0f80" * 20, "a" + "\u0301\u0323" * 40, "…" * 50, "\U0010ffff\U000e0001\ue000",
]


def random_string(rng, points):
    kind, out = rng.random(), []
    n = rng.choice((1, 2, 3, 5, 8, 13, 21, 34, 55, 80))
    while len(out) < n:
        r = rng.random()
        if kind < 0.15:
            out.append(chr(rng.choice(points)))
        elif r < 0.08:
            out.extend(rng.choice(NASTY) * rng.randint(1, 12))
        elif r < 0.14:
            out.append(chr(rng.choice(points)))
        elif r < 0.2 and kind > 0.5:
            out.extend(rng.choice(HAND)[:20])
        else:
            out.append(rng.choice(NASTY))
    return "".join(out)


def sample_lines():
    with open(os.path.join(DEMO, "samples.txt"), encoding="utf-8", newline="") as f:
        return f.read().split("\n")


def strings_for(rng, points, count):
    lines = sample_lines()
    hand = HAND + [a + b for a in HAND[:40] for b in rng.sample(HAND, 12)] + rng.sample(lines, min(len(lines), 500))
    hand += ["\n".join(lines[i:i + 40]) for i in range(0, len(lines), 97)]
    return hand + [random_string(rng, points) for _ in range(count)]


# ---- tokenizers ----

def train(texts, pre, size, alphabet=()):
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre
    t.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, show_progress=False, initial_alphabet=list(alphabet)))
    model = json.loads(t.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return tokens, [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]


def number(*lists):
    vocab = {}
    for tokens in lists:
        for t in tokens:
            vocab.setdefault(t, len(vocab))
    return vocab


BYTES = [f"<0x{b:02X}>" for b in range(256)]
BYTE_DECODER = byte_level(True, True)
SP_DECODER = {"type": "Sequence", "decoders": [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}
SP_NORMALIZER = sequence({"type": "Prepend", "prepend": "▁"},
                         {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}, key="normalizers")


def byte_chains(texts):
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokens, merges = train(texts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True), 2500, alphabet)
    wide, wide_merges = train(texts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), 2000, alphabet)
    vocab = number(tokens)
    words = number(tokens, ["ĠThe", "returns", "Ġwhich", "1234", "123", "ĠĠĠĠĠĠĠ", "Hello", "çļĦ", "xyzzy"])
    end = len(vocab)
    bytes_ = dict(decoder=BYTE_DECODER)
    spaces = [added(end + i, " " * (24 - i), special=False, normalized=True) for i in range(20)]
    chains = {
        "gpt2": dict(pre_tokenizer=byte_level(False, True), added_tokens=[added(end, "<|endoftext|>")]),
        "gpt2-prefix": dict(pre_tokenizer=byte_level(True, True), added_tokens=[added(end, "<|endoftext|>", rstrip=True)]),
        "olmoe": dict(normalizer={"type": "NFC"}, pre_tokenizer=byte_level(False, True), added_tokens=spaces,
                      post_processor=template([], [("<|endoftext|>", 0)])),
        "starcoder": dict(pre_tokenizer=sequence({"type": "Digits", "individual_digits": True}, byte_level(False, True))),
        "digits": dict(pre_tokenizer=sequence({"type": "Digits", "individual_digits": False}, byte_level(True, False))),
        "qwen": dict(normalizer={"type": "NFC"}, pre_tokenizer=sequence(split(QWEN), byte_level())),
        "qwen3.5": dict(normalizer={"type": "NFC"}, pre_tokenizer=sequence(split(QWEN35), byte_level())),
        "o200k": dict(pre_tokenizer=sequence(split(O200K), byte_level())),
        "tekken": dict(pre_tokenizer=sequence(split(TEKKEN), byte_level())),
        "ling": dict(pre_tokenizer=sequence(split(LING), byte_level())),
        "exaone": dict(normalizer={"type": "NFC"}, pre_tokenizer=sequence(split(EXAONE), byte_level())),
        "han": dict(pre_tokenizer=sequence(split(HAN_FIRST), byte_level())),
        "deepseek-v3": dict(
            normalizer=sequence(key="normalizers"),
            pre_tokenizer=sequence(split(r"\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"), split(DSV3), byte_level()),
            added_tokens=[added(end, "<｜begin▁of▁sentence｜>"), added(end + 1, "<｜end▁of▁sentence｜>"),
                          added(end + 2, "<think>", special=False), added(end + 3, "<s>", special=False, normalized=True)]),
        "deepseek-v2": dict(
            normalizer=sequence(key="normalizers"),
            pre_tokenizer=sequence(split(r"[\r\n]"), split(r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷΑ-Ρа-яА-Я]+"),
                                   split(r"\s?[!-/:-~！-／：-～‘-‟　-。]+"), split(r"\s+$"), split("[一-龥ࠀ-一가-퟿]+"),
                                   {"type": "Digits", "individual_digits": True}, byte_level())),
        "llama3": dict(pre_tokenizer=sequence(split(LL), byte_level()), model={"ignore_merges": True},
                       added_tokens=[added(len(words), "<|begin_of_text|>"), added(len(words) + 1, "<|eot_id|>")],
                       post_processor=sequence(byte_level(True, True), template([("<|begin_of_text|>", len(words))]),
                                               key="processors")),
        "gpt-oss": dict(pre_tokenizer=sequence(split(O200K), byte_level()), model={"ignore_merges": True},
                        added_tokens=many(len(words), "<|startoftext|>", "<|endoftext|>", "<|return|>", "<|channel|>", "<|start|>",
                                          "<|end|>", "<|message|>", *(f"<|reserved_{200000 + i}|>" for i in range(1100)))),
        "glm4": dict(pre_tokenizer=sequence(split(LL), byte_level()), model={"ignore_merges": True},
                     added_tokens=many(len(words), "<|endoftext|>", "[MASK]", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "/nothink")
                     + [added(len(words) + 7, "<think>", special=False), added(len(words) + 8, "<tool_call>", special=False)],
                     post_processor=sequence(byte_level(True, True), template([("[gMASK]", len(words) + 2), ("<sop>", len(words) + 3)]),
                                             key="processors")),
        "granite": dict(pre_tokenizer=sequence(split(r"\p{N}"), byte_level(False, True)),
                        added_tokens=many(end, "<|start_of_role|>", "<|end_of_role|>", "<fim_prefix>", "<fim_suffix>")),
        "hunyuan": dict(pre_tokenizer=sequence(split(QWEN), byte_level()), added_tokens=many(
            end, "<|startoftext|>", "<|extra_0|>", *(f"<|extra_{i}|>" for i in range(1, 210)))),
        "kimi": dict(pre_tokenizer=sequence(split(KIMI), byte_level()), added_tokens=many(
            end, "[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>", *(f"<|reserved_token_{end + i}|>" for i in range(4, 256)))),
        "afmoe": dict(pre_tokenizer=sequence(split(THOUSANDS), split(ASIAN), split(DSV3), byte_level())),
        "afmoe-digits": dict(pre_tokenizer=sequence(split(r"\p{Nd}{1,3}(?=(?:\p{Nd}{3})*(?!\p{Nd}))"), split(ASIAN), split(DSV3),
                                                    byte_level())),
        "superbpe": dict(pre_tokenizer=sequence(split(r"\p{N}+"), split(r"(?=(\d{3})+(?!\d))"), byte_level())),
        "cohere": dict(pre_tokenizer=sequence(split(THOUSANDS), split(O200K), byte_level())),
        "exaone-moe": dict(normalizer={"type": "NFC"}, pre_tokenizer=sequence(split(EXAONE.replace("{1,3}", "")), byte_level())),
        "gap-ids": dict(pre_tokenizer=byte_level(), added_tokens=[added(end + 70, "<y>"), added(end + 50, "<s>")]),
    }
    docs = {n: document(words if c.get("model") else vocab, [list(m) for m in merges], **(bytes_ | c)) for n, c in chains.items()}
    docs["whole-text"] = document(number(wide), [" ".join(m) for m in wide_merges], pre_tokenizer=byte_level(), **bytes_)
    return docs


def sp_chains(texts):
    joined = [" ".join(texts[i:i + 8]) for i in range(0, len(texts), 8)]
    words, merges = train([t.replace(" ", "▁") for t in texts], pre_tokenizers.Split("▁", "merged_with_next"), 2200)
    wide, wide_merges = train([t.replace(" ", "▁") for t in joined], pre_tokenizers.Split("\n", "isolated"), 1500)
    heads = ["<unk>", "<s>", "</s>"]
    vocab = number(heads, BYTES, words)
    plain, wide_vocab = number(heads, words), number(heads, BYTES, wide)
    some = number(heads, BYTES[:0x80] + BYTES[0xc0:0xe0] + BYTES[0xa0:0xc0], words)
    specials = [added(0, "<unk>"), added(1, "<s>"), added(2, "</s>")]
    common = dict(added_tokens=specials, decoder=SP_DECODER, post_processor=template([("<s>", 1)]))
    full = dict(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    ms_decoder = lambda scheme: metaspace(scheme, True)
    sp = lambda v, m, model, **parts: document(v, [list(x) for x in m], model=model, **(common | parts))
    docs = {
        "mixtral": sp(vocab, merges, full, normalizer=SP_NORMALIZER),
        "mixtral-wide": sp(wide_vocab, wide_merges, full, normalizer=SP_NORMALIZER),
        "llama2-strings": document(vocab, [" ".join(m) for m in merges], model=full, normalizer=SP_NORMALIZER, **common),
        "phi": sp(vocab, merges, full, normalizer=SP_NORMALIZER,
                  added_tokens=[added(0, "<unk>"), added(1, "<s>"), added(2, "</s>", rstrip=True),
                                added(len(vocab), "<|user|>", rstrip=True), added(len(vocab) + 1, "[MASK]", lstrip=True, rstrip=True)]),
        "ernie": sp(vocab, merges, full, normalizer=sequence({"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
                                                             key="normalizers"),
                    pre_tokenizer=split(" ", "MergedWithPrevious", kind="String"), post_processor=None,
                    decoder=sequence(*SP_DECODER["decoders"][:3], key="decoders"),
                    added_tokens=specials + many(len(vocab), *(f"<|IMAGE_{i}|>" for i in range(100)), "<mask:1>", "<|CROSS|>")),
        "metaspace-old": sp(vocab, merges, full, pre_tokenizer={"type": "Metaspace", "replacement": "▁", "add_prefix_space": True},
                            decoder={"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}),
        "no-fallback": sp(plain, merges, dict(unk_token="<unk>", fuse_unk=True), normalizer=SP_NORMALIZER),
        "no-fuse": sp(plain, merges, dict(unk_token="<unk>"), normalizer=SP_NORMALIZER),
        "some-bytes": sp(some, merges, full, normalizer=SP_NORMALIZER),
        "some-bytes-no-fuse": sp(some, merges, full | dict(fuse_unk=False), normalizer=SP_NORMALIZER),
        "dropped": sp(plain, merges, {}, normalizer=SP_NORMALIZER, post_processor=None),
        "ignore-merges": sp(vocab, merges[:300], full | dict(ignore_merges=True), pre_tokenizer=metaspace("first", True)),
    }
    for scheme in ("always", "first", "never"):
        for cut in (True, False):
            docs[f"metaspace-{scheme}-{'split' if cut else 'whole'}"] = sp(
                vocab, merges, full, pre_tokenizer=metaspace(scheme, cut), decoder=ms_decoder(scheme))
    docs["strip-metaspace"] = sp(vocab, merges, full, pre_tokenizer=metaspace("first", True),
                                 normalizer=sequence({"type": "Strip", "strip_left": True, "strip_right": True},
                                                     {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
                                                     key="normalizers"))
    return docs


def node_chains():
    """Small tables that tell every character by its bytes, so that any difference in a split or a rewriting shows: pieces
    are kept apart by merges that join any two bytes."""
    vocab = number(["<unk>"], BYTES)
    chars = [chr(c) for c in range(0x20, 0x7f)] + list("éß的▁")
    merges = [[a, b] for a in chars for b in "abcdeXYZ019 .-▁é"]
    vocab = number(["<unk>"], BYTES, chars, [a + b for a, b in merges])
    full = dict(unk_token="<unk>", fuse_unk=False, byte_fallback=True)
    docs = {}
    for behavior in ("Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous"):
        for invert in (False, True):
            for name, kind, pattern in (("space", "String", " "), ("dot", "String", "."), ("word", "Regex", r"\w+"),
                                        ("empty", "Regex", r"\d*"), ("letters", "Regex", r"[a-zA-Z]")):
                docs[f"split-{behavior}-{name}{'-invert' if invert else ''}"] = document(
                    vocab, merges, model=full, pre_tokenizer=split(pattern, behavior, invert, kind))
    patterns = [r"\w", r"\W", r"\s", r"\S", r"\d", r"\D", r"\h+", r"\bx", r"\b", r"\B.", r"^.", r".$", r"[\w.]+", r"[^\s\d]+", r"\p{Han}+",
                r"\p{Greek}+|\p{^Cyrillic}", r"\p{Alphabetic}", r"\p{Uppercase_Letter}\p{Lower}*", r"\p{N}{1,3}+", r"\p{N}{2}?x|a{,2}b", r"(?i)traSe|K",
                r"a+?b|(?:ab){2,3}", r"(?m:a.b)|a.b", r"\u0041|\x{e9}|\x20", r"(?=[A-Z])", r"(?<=[a-z])(?=[A-Z])|\s+", r"(?>a|ab)c", r"\v|\f",
                r"\A.|.\z", r"[\-\]\[\\]", r"[a-c-]", r"\p{L}++", r"(?:\p{L}\p{M}*)+",
                THOUSANDS, r"\b\d+\b", BLOOM, r"(?:\r?\n)+(?!\r?\n)", r"[a-z&&[^aeiou]]+", r"[\w&&[^\d_]&&[^a-f]]+", r"[^\p{L}&&[^\p{Lu}]]+",
                r"[[a-c][x-z]1-3]+", r"[^[a-c]\W]+", r"[-[0-9]z]+", r"[[a-c-]-z]", r"[\p{Ll}&&[a-zé]x-z]{2,}?", r"[&a&]+", r"[a^b]|[a&&^b]",
                r"(?i:k[a-z])[\p{L}&&\p{Latin}]", r"[[^a-z]&&[^ ]]+", r"[^[^a-z]]++", r"[\H&&\S]+", r"(?:[^\s&&[^-]])", r"[\s\S&&[^\n]]+$", r"[a&&&b]|[ab&&[b]&]"]
    for i, p in enumerate(patterns):
        docs[f"regex-{i}-{p}"] = document(vocab, merges, model=full, pre_tokenizer=split(p))
    # Left out because younger Unicode versions changed old code points: \p{Alphabetic} (38), \p{Lowercase} (5), \p{Mn} (2).
    for p in (r"\w", r"[\w]", r"\W", r"[^\w]", r"\s", r"\S", r"[\s]", r"[^\s]", r"\d", r"\D", r"[\d]", r"\h", r"[\h]", r"\v", r"\bx?.", r"\B.", r"a\b.",
              r"\p{L}", r"\p{Lu}", r"\p{Ll}", r"\p{Lt}", r"\p{Lm}", r"\p{Lo}", r"\p{M}", r"\p{N}", r"\p{Nd}", r"\p{Nl}", r"\p{No}", r"\p{P}", r"\p{S}",
              r"\p{Z}", r"\p{C}", r"\p{Cf}", r"\P{L}", r"\p{^N}", r"[\p{L}\p{M}]", r"[^\s\p{L}\p{N}]", r"\p{Han}", r"\p{Hiragana}", r"\p{Katakana}", r"\p{Greek}",
              r"\p{Cyrillic}", r"\p{Arabic}", r"\p{Thai}", r"\p{Hangul}", r"\p{Latin}", r"\p{Common}", r"\p{Upper}", r"\p{Uppercase}", r"\p{Space}", r"\p{White_Space}", r"\p{Digit}", r"\p{Letter}", r"\p{Other_Number}",
              r"[\W]", r"[^\W]", r"[\w&&[^\p{Han}]]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]", r"[^\p{L}&&\p{Latin}]", r"[^(\s|[.,!?…])]", r"[\p{L}&&[\p{Greek}\p{Han}]]",
              r"(?i:[sdmtk])", r"(?i:é|σ|ǆ)", r"(?i:[a-z])", r"(?i:[\p{L}])", r"(?i:[^\p{M}])", r"(?i:[^\s\p{L}\p{N}])", r"(?i:\p{Lu})", r".", r"[^a]"):
        docs[f"class-{p}"] = document(vocab, merges, model=full, pre_tokenizer=split(p, "Removed"))
    for kind in ({"type": "Whitespace"}, {"type": "WhitespaceSplit"}, {"type": "CharDelimiterSplit", "delimiter": "-"},
                 {"type": "Punctuation", "behavior": "Isolated"}, {"type": "Punctuation", "behavior": "Contiguous"}):
        docs[f"pre-{kind['type']}-{kind.get('behavior', '')}"] = document(vocab, merges, model=full, pre_tokenizer=kind)
    replace = lambda regex, text: {"type": "Replace", "pattern": {"Regex": regex}, "content": text}
    flags = [added(1, "<x>", single_word=True), added(2, "ab", special=False, normalized=True, single_word=True),
             added(3, "QR", special=False, normalized=True, lstrip=True), added(4, "É", special=False, normalized=True, rstrip=True),
             added(5, "...", special=False, normalized=False, lstrip=True, rstrip=True), added(6, "..", special=False)]
    for normalizer in ([{"type": "NFC"}], [{"type": "NFD"}], [{"type": "NFKC"}], [{"type": "NFKD"}], [{"type": "Lowercase"}],
                       [{"type": "Strip", "strip_left": True, "strip_right": False}], [{"type": "Prepend", "prepend": "é"}],
                       [replace(r"\s+", " ")], [replace(r"x*", "-")], [replace(r"^\s+", "")], [{"type": "NFD"}, replace(r"\p{M}", ""), {"type": "Lowercase"}],
                       [{"type": "NFKC"}, {"type": "Lowercase"}, {"type": "Prepend", "prepend": "▁"}]):
        name = "+".join(n["type"] for n in normalizer)
        for tokens in ([], flags):
            docs[f"norm-{len(docs)}-{name}{'-added' if tokens else ''}"] = document(
                vocab, merges, model=full, normalizer=sequence(*normalizer, key="normalizers"), added_tokens=tokens)
    return docs


# ---- comparing ----

def frames(items):
    return b"".join(struct.pack("<I", len(b)) + b for b in items)


def run(tool, mode, path, items):
    out = subprocess.run([tool, *mode, path], input=frames(items), stdout=subprocess.PIPE, check=False).stdout
    lines = out.decode("utf-8", "replace").split("\n")[:-1]
    if len(lines) != len(items):
        raise SystemExit(f"{path}: {len(lines)} answers to {len(items)} strings: {lines[-1:]}")
    return lines


def compare(tool, name, doc, strings, folder, rng, ids_only=False, lists_of=400):
    path = os.path.join(folder, "tokenizer.json")
    if isinstance(doc, str):
        path = doc
    else:
        with open(path, "w", encoding="utf-8") as f:
            json.dump(doc, f, ensure_ascii=rng.random() < 0.5)
    ref = Tokenizer.from_file(path)
    bad = []
    tokens = [] if isinstance(doc, str) or ids_only else [a["content"] for a in doc["added_tokens"]]
    between = ["", "", " ", "  ", "\n", "a", "Hello", " x", "é", "的", "12345", ".", "<", "<|", "|>", "\t ", "'s", "▁"]
    strings = strings + ["".join(rng.choice(tokens)[:rng.choice((99, 99, 99, 5))] + rng.choice(between) + rng.choice(between)
                                 for _ in range(rng.randint(1, 9))) for _ in range(300 if tokens else 0)]
    for mode in ([],) if ids_only else ([], ["--special"]):
        some = strings[::4] if mode else strings  # what stands around the ids does not depend on the text
        got = run(tool, mode, path, [s.encode() for s in some])
        want = [" ".join(map(str, e.ids)) for e in ref.encode_batch(some, add_special_tokens=bool(mode))]
        bad += [(mode, s, g, w) for s, g, w in zip(some, got, want) if g != w]
    for mode, s, g, w in bad[:3] if ids_only else []:
        print(f"  DIFFERS {name} {mode} {s[:40]!r}\n    ours       {g[:300]}\n    tokenizers {w[:300]}")
    if ids_only:
        return len(strings), 0, len(bad)
    known = sorted(set(ref.get_vocab().values()))
    lists = [[int(i) for i in w.split()] for w in want[:lists_of]]
    lists += [[rng.choice(known) for _ in range(rng.randint(0, 12))] for _ in range(lists_of)]
    lists = [l for l in lists if all(ref.id_to_token(i) is not None for i in l)]
    for mode, skip in (["--decode"], False), (["--decode-skip"], True):
        got = run(tool, mode, path, [struct.pack(f"<{len(l)}i", *l) for l in lists])
        want = [ref.decode(l, skip_special_tokens=skip).encode().hex() for l in lists]
        bad += [(mode, l, g, w) for l, g, w in zip(lists, got, want) if g != w]
    for mode, s, g, w in bad[:3]:
        print(f"  DIFFERS {name} {mode} {s!r}\n    ours       {g[:300]}\n    tokenizers {w[:300]}")
    return len(strings), len(lists), len(bad)


def compare_invalid(tool, path, rng, count):
    """Ill-formed bytes against bytes.decode("utf-8", "replace")."""
    ref, items = Tokenizer.from_file(path), []
    seeds = [bytes([a, b, c, d]) for a in (0xc1, 0xc2, 0xe0, 0xed, 0xef, 0xf0, 0xf4, 0xf5) for b in (0x7f, 0x80, 0x8f, 0x90, 0x9f, 0xa0, 0xbf)
             for c in (0x41, 0x80, 0xff) for d in (0x41, 0xbf)]
    for i in range(count):
        text = bytearray(random_string(rng, [0xe9, 0x4e00, 0x1f600]).encode())
        for _ in range(rng.randint(1, 6)):
            if text:
                text[rng.randrange(len(text))] = rng.randrange(256)
        items.append(bytes(text[: rng.randint(0, len(text))]))
    items += seeds + [s[:k] for s in seeds[:200] for k in (1, 2, 3)]
    got = run(tool, [], path, items)
    want = [" ".join(map(str, ref.encode(b.decode("utf-8", "replace"), add_special_tokens=False).ids)) for b in items]
    bad = [(b, g, w) for b, g, w in zip(items, got, want) if g != w]
    for b, g, w in bad[:3]:
        print(f"  DIFFERS ill-formed {b!r}\n    ours       {g}\n    tokenizers {w}")
    return len(items), len(bad)


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--build", required=True)
    ap.add_argument("--strings", type=int, default=2000, help="random strings for each chain of a model family")
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--only", help="chains whose name contains this")
    a = ap.parse_args()
    tool = os.path.join(a.build, "tests", "tokenize")
    rng, points = random.Random(a.seed), code_points()
    print(f"tokenizers {tokenizers.__version__}, {len(points)} code points of Unicode "
          f"{'14' if unicodedata.unidata_version.startswith('14.') else '3.2'}, seed {a.seed}")
    texts = [t for t in sample_lines() if t] + HAND * 3
    texts += ["".join(chr(rng.choice(points)) if rng.random() < 0.1 else rng.choice(NASTY) for _ in range(60)) for _ in range(300)]
    texts = [t.replace("\0", "") for t in texts]  # our JSON reader refuses NUL in a key, so no token may spell it
    families = {"demo-model": os.path.join(DEMO, "tokenizer.json")} | byte_chains(texts) | sp_chains(texts)
    nodes = node_chains()
    total = decoded = wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        for group, docs, count in (("families", families, a.strings), ("nodes", nodes, max(100, a.strings // 10))):
            for name, doc in docs.items():
                if a.only and a.only not in name:
                    continue
                strings = strings_for(rng, points, count)
                if group == "nodes":
                    strings = strings[:len(HAND)] + strings[-count:]
                n, d, bad = compare(tool, name, doc, strings, folder, rng, lists_of=20 if group == "nodes" else 400)  # nodes have one decoder
                total, decoded, wrong = total + n, decoded + d, wrong + bad
                if group == "families" or bad:
                    print(f"{name}: {n} strings, {d} lists of ids decoded, {bad} differences")
        print(f"nodes: {len(nodes)} chains of single nodes and patterns")
        # every code point through the normal forms, and through every escape and class; there of the large ranges that are alike
        # throughout the ends and every eighth
        few = [c for c in points if c % 8 == 0 or not (alike(c) and alike(c - 8) == alike(c) == alike(c + 8))]
        sweep = ["".join(map(chr, points[i:i + 512])) for i in range(0, len(points), 512)]
        sweep += ["".join("a" + chr(c) for c in points[i:i + 512]) for i in range(0, len(points), 512)]
        thin = ["".join(map(chr, few[i:i + 512])) for i in range(0, len(few), 512)]
        for name, doc in nodes.items():
            if (a.only and a.only not in name) or not name.startswith(("class-", "norm-", "pre-")) or name.endswith("-added"):
                continue
            some = sweep if name.startswith("norm-") else thin
            n, _, bad = compare(tool, "sweep-" + name, doc, some, folder, rng, ids_only=True)
            total, wrong = total + n, wrong + bad
            if bad:
                print(f"sweep-{name}: {bad} differences")
    n, bad = compare_invalid(tool, os.path.join(DEMO, "tokenizer.json"), rng, 3000)
    total, wrong = total + n, wrong + bad
    print(f"ill-formed UTF-8: {n} strings, {bad} differences")
    print(f"{total} strings encoded, {decoded} lists decoded, {wrong} differences")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
