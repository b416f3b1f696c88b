#!/usr/bin/env python3
"""Compares `ptst tokenize` and `ptst detokenize` with Hugging Face tokenizers on random text.

    pip install tokenizers==0.23.3
    cc -O2 -pthread -o ptst tools/ptst.c -lm
    python3 tools/tokenizer_fuzz.py --ptst ./ptst [--texts N] [--seed N] [--points]
            [--mix N] [--train N] [--record FILE] TOKENIZER.JSON ...

For every tokenizer: N random strings (all planes, runs of white space, control characters, line
breaks, combining marks, emoji sequences, digits, code, tokens of the vocabulary, added tokens and
pieces of them, words of up to 10 kB), ids with and without special tokens, and the text of these ids and of random ids. --points adds every
code point for itself and between letters. --mix makes N further tokenizers out of each: its
vocabulary with normalizers, pre-tokenizers, decoders and added tokens of many models, drawn at
random; --train as many out of vocabularies made here, with marks of subwords and of ends of words.
--record writes some of the cases that are most telling to a file for the tests.
Prints a line for each tokenizer and ends with 1 if anything differs.
"""
import argparse
import copy
import json
import os
import random
import subprocess
import sys
import tempfile

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
# Patterns of public tokenizer.json files and of tiktoken encodings.
PATTERNS = [
    GPT2, LLAMA3, LLAMA3.replace("{1,3}", ""),
    # o200k (gpt-4o, Phi-4, Tekken of Mistral-Nemo)
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|"
    r"'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?"
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+",
    # Kimi-style, with an intersection
    r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}"
    r"\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    # DeepSeek-V3
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}"
    r"\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "[一-龥\u3040-ゟ゠-ヿ]+", r"\p{N}{1,3}", r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+",
    # Bloom, GPT-SW3-like
    r" ?[^(\s|[.,!?…。，、।۔،])]+",
    # GPT-4 as tiktoken has it: possessive
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*+|"
    r"\s++$|\s*[\r\n]|\s+(?!\S)|\s".replace(r"\s++$|", ""),
    r"\d{3}", r"[0-9][0-9][0-9]", r"\w+|[^\w\s]+", r"(?<a>x)"[0:0] + r"a+?b*|c", r"\S+", r"\d+?", r".",
    r"(?=\p{Lu})", r"[^\x00-\x7F]+", r"\u0020+(?=\p{L})", r"x{2,}|y{,2}z|(ab|a)(c|bcd)?",
]
BEHAVIOURS = ["Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"]
NORMALIZERS = [{"type": "NFC"}, {"type": "NFD"}, {"type": "NFKC"}, {"type": "NFKD"},
               {"type": "Lowercase"}, {"type": "StripAccents"},
               {"type": "Strip", "strip_left": True, "strip_right": False},
               {"type": "Strip", "strip_left": True, "strip_right": True},
               {"type": "Prepend", "prepend": "▁"},
               {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
               {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
               {"type": "Replace", "pattern": {"Regex": r"[\p{P}]"}, "content": "-"},
               {"type": "Replace", "pattern": {"String": "``"}, "content": "\""}]


def split(rnd):
    pattern = rnd.choice(PATTERNS)
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": rnd.choice(BEHAVIOURS),
            "invert": rnd.random() < 0.2}


def level(rnd):
    return {"type": "ByteLevel", "add_prefix_space": rnd.random() < 0.3, "trim_offsets": True,
            "use_regex": rnd.random() < 0.5}


def cutter(rnd):
    return rnd.choice([
        lambda: split(rnd), lambda: split(rnd), lambda: split(rnd),
        lambda: {"type": "Digits", "individual_digits": rnd.random() < 0.5},
        lambda: {"type": "Punctuation", "behavior": rnd.choice(BEHAVIOURS)},
        lambda: {"type": "Whitespace"}, lambda: {"type": "WhitespaceSplit"},
        lambda: {"type": "Split", "pattern": {"String": rnd.choice([" ", "e", "the", "."])},
                 "behavior": rnd.choice(BEHAVIOURS), "invert": rnd.random() < 0.2}])()


def trained(rnd):
    """A small tokenizer of its own: prefixes of subwords, ends of words, any unknown token."""
    prefix, suffix = rnd.choice(["", "##", "-"]), rnd.choice(["", "</w>", "_"])
    parts = {"unk_token": rnd.choice([None, "<unk>"])}
    parts.update({"continuing_subword_prefix": prefix} if prefix else {})
    parts.update({"end_of_word_suffix": suffix} if suffix else {})
    t = Tokenizer(models.BPE(**parts))
    t.pre_tokenizer = rnd.choice([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Whitespace(),
                                  pre_tokenizers.ByteLevel(add_prefix_space=False)])
    parts.pop("unk_token")
    corpus = [string(rnd, []) for _ in range(300)] + WORDS * 3 + PIECES * 2
    t.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=rnd.randrange(300, 900), special_tokens=["<unk>", "<s>", "</s>"], show_progress=False,
        limit_alphabet=rnd.choice([100, 400]), **parts))
    base = json.loads(t.to_str())
    base["decoder"] = {"type": "BPEDecoder", "suffix": suffix or "</w>"}
    return base


def around(t, rnd):
    """A post-processor with tokens of the vocabulary."""
    a, b = (rnd.choice(list(t["model"]["vocab"].items())) for _ in range(2))
    special = [{"SpecialToken": {"id": x[0], "type_id": 0}} for x in (a, b)]
    text = {"Sequence": {"id": "A", "type_id": 0}}
    template = {"type": "TemplateProcessing",
                "single": rnd.choice([[text], [special[0], text], [text, special[1]],
                                      [special[0], special[1], text, special[0]]]),
                "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {x[0]: {"id": x[0], "ids": [x[1]], "tokens": [x[0]]} for x in (a, b)}}
    level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    roberta = {"type": "RobertaProcessing", "sep": list(a), "cls": list(b), "trim_offsets": True,
               "add_prefix_space": False}
    return rnd.choice([None, level, template, roberta, {"type": "BertProcessing", "sep": list(a), "cls": list(b)},
                       {"type": "Sequence", "processors": [level, template]}])


def mixed(base, rnd):
    """A tokenizer with the vocabulary of base and other parts drawn at random."""
    t = copy.deepcopy(base)
    t["post_processor"] = around(t, rnd)
    if rnd.random() < 0.5:  # the other spelling
        t["model"]["merges"] = [m if isinstance(m, list) else m.split(" ") for m in t["model"]["merges"]]
    if rnd.random() < 0.3:
        t["decoder"] = rnd.choice([
            None, {"type": "BPEDecoder", "suffix": rnd.choice(["</w>", "e"])}, {"type": "Fuse"},
            {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"Regex": "[a-d]+"}, "content": "*"}, {"type": "ByteFallback"},
                {"type": "Fuse"}, {"type": "Strip", "content": rnd.choice([" ", "T"]),
                                   "start": rnd.randrange(3), "stop": rnd.randrange(3)}]},
            {"type": "Strip", "content": rnd.choice([" ", "e", "▁"]), "start": 1, "stop": 1}])
    byte_level = "Ġ" in t["model"]["vocab"]
    scheme = ""
    steps = [cutter(rnd) for _ in range(rnd.choice([0, 0, 1, 1, 2, 3]))]
    if byte_level:
        steps.append(level(rnd))
        steps += [cutter(rnd) for _ in range(rnd.choice([0, 0, 0, 1]))]
        if rnd.random() < 0.9:
            t["decoder"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                            "use_regex": True}
    elif rnd.random() < 0.6:
        scheme = rnd.choice(["always", "first", "never"])
        meta = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme,
                "split": rnd.random() < 0.5}
        steps.insert(0 if scheme == "first" else rnd.randrange(len(steps) + 1), meta)
        t["decoder"] = rnd.choice([meta, base["decoder"]])
    t["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps} if steps else None
    norm = [rnd.choice(NORMALIZERS) for _ in range(rnd.choice([0, 1, 1, 2, 3]))]
    if scheme == "first":  # which characters it counts as the first depends on their offsets
        norm = [n for n in norm if n["type"] not in ("StripAccents", "NFKC", "NFKD", "Replace")]
    strips = any(n["type"] in ("Strip", "StripAccents") for n in norm)
    t["normalizer"] = {"type": "Sequence", "normalizers": norm} if norm else None
    model = t["model"]
    model["ignore_merges"] = rnd.random() < 0.3
    model["fuse_unk"] = rnd.random() < 0.5
    if rnd.random() < 0.15:
        model["unk_token"] = None
    if rnd.random() < 0.3:  # whatever the file says, the reference gives ids in order
        for a in t["added_tokens"]:
            a["id"] += rnd.randrange(3)
    if not byte_level:
        model["byte_fallback"] = rnd.random() < 0.7
    most = max(list(model["vocab"].values()) + [a["id"] for a in t["added_tokens"]])
    contents = {a["content"] for a in t["added_tokens"]} | set(model["vocab"])
    for text in ["<|x|>", "<|x", "Foo", "foo bar", " pad", "ÀB", "\n\n", "fi", "ab_", "<sep>"]:
        if strips and not text.strip():  # normalised to nothing: the reference does not end
            continue
        if rnd.random() < 0.5 and text not in contents:
            most += 1
            t["added_tokens"].append({"id": most, "content": text,
                                      "single_word": rnd.random() < 0.3,
                                      "lstrip": rnd.random() < 0.3, "rstrip": rnd.random() < 0.3,
                                      "normalized": rnd.random() < 0.5,
                                      "special": rnd.random() < 0.5})
    return t


def character(rnd):
    return chr(rnd.choice([
        rnd.randrange(0x80), rnd.randrange(0x20), rnd.randrange(0x80, 0x300),
        rnd.randrange(0x300, 0x370), rnd.randrange(0x370, 0x2000), rnd.randrange(0x2000, 0x3100),
        rnd.randrange(0x3100, 0xD800), rnd.randrange(0xE000, 0x10000),
        rnd.randrange(0x10000, 0x20000), rnd.randrange(0x20000, 0x110000)]))


PIECES = ["the ", "Hello", " world", "'s", "'LL", "'ſ", "'Re", "I'm", "don’t", "123", "4567890", "١٢",
          "½", "²", "a1b2", " 7", "...", "?!", "e\u0301", "\u1100\u1161\u11a8", "👍🏽", "👨‍👩‍👧", "🇩🇪", "  ",
          "\t", "\r\n", "\n\n", "\u00a0", "\u3000", "\u2028", "\u200d", "def f(x):\n    return x\n",
          "</", "<|", "|>", "<0x0A>", "▁", "Ġ", "ﬁ", "①", "ＡＢ", "한국어", "日本語テキスト", "中文", "हिन्दी", "ไทย",
          "Straße", "İstanbul", "ΑΣ", "café", "naïve", "_x_", "foo", "Foo bar", " pad", "ÀB", "xx", "yz",
          "abcd", "http://a.b/c?d=1&e=%20", "{\"k\": [1, 2]}", "#include <stdio.h>\n", "``quote''"]


SPACES = " \t\n\r\x0b\x0c\x1c\x1f\x85\u00a0\u1680\u2000\u2003\u2009\u2028\u2029\u202f\u205f\u3000" \
         "\u180e\u200b\ufeff"  # the last three look like white space and are none
MARKS = [0x300, 0x301, 0x308, 0x323, 0x327, 0x338, 0x345, 0x5b0, 0x651, 0x93c, 0x94d, 0xe38, 0xf71, 0x1037,
         0x1ab0, 0x1dc0, 0x20d0, 0x20dd, 0x302a, 0x3099, 0x309a, 0xfb1e, 0xfe20, 0x1d165, 0x1e8d0]
EMOJI = "👍👨👩👧👦❤☺✈🏳🏴🌈⚕🧑🚀😀🫠"
WORDS = ["the", "model", "Answer", "QUESTION", "über", "été", "слово", "λόγος", "שלום", "مرحبا", "नमस्ते", "日本",
         "한국", "ภาษา", "x1", "camelCase", "snake_case", "<<", ">>", "####", "$", "1,234.56", "'", "’"]


def emoji(rnd):
    """A sequence: skin tones, variation selectors, joiners, flags, keycaps, tags."""
    kind = rnd.randrange(5)
    if kind == 0:
        return "".join(chr(0x1F1E6 + rnd.randrange(26)) for _ in range(rnd.randrange(1, 6)))
    if kind == 1:
        return rnd.choice("0123456789#*") + rnd.choice(["\ufe0f", ""]) + "\u20e3"
    if kind == 2:
        return "🏴" + "".join(chr(0xE0000 + ord(x)) for x in "gbsct") + "\U000e007f"
    return "\u200d".join(rnd.choice(EMOJI) + rnd.choice(["", "\ufe0f", chr(0x1F3FB + rnd.randrange(5))])
                         for _ in range(rnd.randrange(1, 5)))


def combined(rnd):
    """Letters with marks in any order, Hangul in pieces."""
    if rnd.random() < 0.3:
        return "".join(chr(0x1100 + rnd.randrange(19)) + chr(0x1161 + rnd.randrange(21)) +
                       rnd.choice(["", chr(0x11A8 + rnd.randrange(27))]) for _ in range(rnd.randrange(1, 5)))
    return "".join(rnd.choice("aeoAOuکяか한 1") + "".join(chr(rnd.choice(MARKS)) for _ in range(rnd.randrange(5)))
                   for _ in range(rnd.randrange(1, 5)))


def long_word(rnd):
    """Up to 10 kB without a place to cut, or with only few."""
    size = rnd.choice([100, 1000, 10000])
    kind = rnd.randrange(6)
    if kind == 0:
        return rnd.choice(["a", " ", "1", "ab", "é", "中", "\n", "?", "\u00a0", "\r\n", "▁", "Ġ", "=", "\u0301",
                           "\x00", "\u3000", "ab1", "\t", "👍"]) * rnd.randrange(1, size)
    letters = ["abcdefghijklmnopqrstuvwxyz", "etaoinshr", "ACGT", "0123456789", SPACES,
               "абвгдежзийклмнопрстуфхцчшщ", "的一是不了人我在有他"][rnd.randrange(7)]
    if kind < 4:
        return "".join(rnd.choice(letters) for _ in range(rnd.randrange(1, size)))
    return rnd.choice(["", "-", "_", "."]).join(rnd.choice(WORDS) for _ in range(rnd.randrange(1, size // 5)))


def code(rnd):
    out = ""
    for _ in range(rnd.randrange(1, 6)):
        out += rnd.choice([" ", "\t"]) * rnd.randrange(9) + rnd.choice(
            ["if (x == 0) {", "for i in range(10):", "return self._x[i];", "}", "#define N 0x1F", "// TODO?",
             "a->b += *p++;", "<div class=\"x\">&nbsp;</div>", "SELECT * FROM t;", "x := <-ch", "r'\\d+\\s*'",
             "print(f'{x!r:>10}')", "", "λ x → x", "std::vector<int>&&"]) + rnd.choice(["\n", "\r\n", "\n\n", ""])
    return out


def string(rnd, added, vocab=()):
    """One text. added: contents of added tokens; vocab: texts of tokens as they stand in the file."""
    kind = rnd.random()
    if kind < 0.01:
        return long_word(rnd)
    if kind < 0.05:
        word = "".join(rnd.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rnd.randrange(1, 300)))
        return word
    out = []
    for _ in range(rnd.randrange(0, 24)):
        k = rnd.random()
        if k < 0.25:
            out.append(rnd.choice(PIECES))
        elif k < 0.3:
            out.append(rnd.choice(WORDS) + rnd.choice(["", " ", "  "]))
        elif k < 0.4 and vocab:
            out.append(rnd.choice(vocab).replace("Ġ", " ").replace("▁", rnd.choice([" ", "▁"])))
        elif k < 0.44:
            out.append("".join(rnd.choice("0123456789") for _ in range(rnd.randrange(1, 12))))
        elif k < 0.48:
            out.append(emoji(rnd))
        elif k < 0.52:
            out.append(combined(rnd))
        elif k < 0.54:
            out.append(code(rnd))
        elif k < 0.64:
            out.append(chr(rnd.randrange(32, 127)))
        elif k < 0.7:
            out.append(rnd.choice(" \n\t\r" + SPACES) * rnd.randrange(1, 5))
        elif k < 0.72:
            out.append("".join(rnd.choice(SPACES) for _ in range(rnd.randrange(1, 6))))
        elif k < 0.8 and added:
            text = rnd.choice(added)
            if rnd.random() < 0.2:  # a piece of one, perhaps with a piece of another one behind it
                text = text[:rnd.randrange(len(text) + 1)] + rnd.choice(["", rnd.choice(added)[1:]])
            out.append(rnd.choice(["", "", " ", "\n"]) + text)
        else:
            out.append(character(rnd))
    return "".join(out)


def points():
    for p in range(0x110000):
        if not 0xD800 <= p < 0xE000:
            yield chr(p)
            yield "a" + chr(p) + "b 1" + chr(p)


def lines(command, values):
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.write("".join(json.dumps(v) + "\n" for v in values))
        file.flush()
        run = subprocess.run(command + ["--jsonl", file.name], capture_output=True, text=True)
    if run.returncode != 0:
        return None, run.stderr.strip()
    return [json.loads(x) for x in run.stdout.split("\n")[:-1]], ""


def chunks(values, n=20000):
    part = []
    for v in values:
        part.append(v)
        if len(part) == n:
            yield part
            part = []
    if part:
        yield part


def reference(theirs, texts, special):
    """Ids of each text; None where the reference itself gives up (it panics on some mixes)."""
    try:
        return [x.ids for x in theirs.encode_batch(texts, add_special_tokens=special)]
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
    out = []
    for text in texts:
        try:
            out.append(theirs.encode(text, add_special_tokens=special).ids)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            out.append(None)
    return out


def compare(options, path, texts, rnd):
    """(cases, differences, refusal, cases worth keeping)."""
    try:
        theirs = Tokenizer.from_file(path)
    except Exception as error:  # of Rust: the parts do not fit each other
        return 0, [], "not opened by tokenizers: %s" % error, []
    cases, bad, keep = 0, [], []
    vocab = theirs.get_vocab_size(with_added_tokens=True)
    for part in chunks(texts):
        for special in (False, True):
            expected = reference(theirs, part, special)
            ours, why = lines([options.ptst, "tokenize", "--tokenizer", path] +
                              ([] if special else ["--no-special"]), part)
            if ours is None:
                return cases, bad, why, keep
            for text, a, b in zip(part, ours, expected):
                cases += b is not None
                if b is not None and a != b:
                    bad.append(("ids", text, b, a))
        ids = [x for x in expected if x is not None]
        ids += [[rnd.randrange(vocab) for _ in range(rnd.randrange(9))] for _ in range(len(part) // 4)]
        for skip in (False, True):
            ours, why = lines([options.ptst, "detokenize", "--tokenizer", path] +
                              (["--no-special"] if skip else []), ids)
            if ours is None:
                return cases, bad, why, keep
            for x, a, b in zip(ids, ours, theirs.decode_batch(ids, skip_special_tokens=skip)):
                if a != b:
                    bad.append(("text", x, b, a))
        keep += [t for t in part if 0 < len(t) < 60]
    return cases, bad, "", keep


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ptst", default="./ptst")
    parser.add_argument("--texts", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--points", action="store_true")
    parser.add_argument("--mix", type=int, default=0)
    parser.add_argument("--train", type=int, default=0)
    parser.add_argument("--only-mix", action="store_true")
    parser.add_argument("--record", help="for the tests: mixed tokenizers are small enough to keep")
    parser.add_argument("files", nargs="*")
    options = parser.parse_args()
    os.environ["RUST_BACKTRACE"] = "0"
    rnd = random.Random(options.seed)
    total = failures = 0
    record = []
    for path in options.files + ["trained"] * (options.train != 0):
        todo = [] if options.only_mix or path == "trained" else [(path, None)]
        if path == "trained":
            base = trained(rnd)
            todo += [("trained, mix %d" % i, mixed(trained(rnd), rnd)) for i in range(options.train)]
        else:
            with open(path, encoding="utf-8") as file:
                base = json.load(file)
        if options.record and path != "trained":
            base = small(base)
        if path != "trained":
            todo += [("%s, mix %d" % (path, i), mixed(base, rnd)) for i in range(options.mix)]
        for name, t in todo:
            added = [a["content"] for a in (t or base)["added_tokens"]]
            vocab = list((t or base)["model"]["vocab"])
            texts = [string(rnd, added, vocab) for _ in range(options.texts)]
            if options.points:
                texts = texts + list(points())
            with tempfile.TemporaryDirectory() as folder:
                where = path
                if t is not None:
                    where = os.path.join(folder, "tokenizer.json")
                    with open(where, "w", encoding="utf-8") as file:
                        json.dump(t, file, ensure_ascii=False)
                cases, bad, why, keep = compare(options, where, texts, rnd)
                if options.record and t is not None and not why and not bad:
                    record.append({"tokenizer": t, "texts": rnd.sample(keep, min(len(keep), 12))})
            total += cases
            failures += len(bad)
            print("%s: %d texts, %d differ%s" % (name, cases, len(bad), "; " + why if why else ""),
                  flush=True)
            for kind, what, want, got in bad[:3]:
                print("   %s of %s\n      expected %s\n      got      %s" %
                      (kind, repr(what)[:300], repr(want)[:300], repr(got)[:300]))
            if bad and t is not None:
                print("   ", json.dumps({k: t[k] for k in ("normalizer", "pre_tokenizer", "decoder")},
                                        ensure_ascii=False)[:1500])
                print("   ", json.dumps(t["added_tokens"][-8:], ensure_ascii=False)[:900])
    if options.record:
        write_record(options.record, record)
    print("%d texts, %d differ" % (total, failures))
    sys.exit(1 if failures else 0)


def small(base, merges=80):
    """The tokenizer with its first merges only, numbered anew: small enough to be kept."""
    t = copy.deepcopy(base)
    model = t["model"]
    pairs = []
    keep = {a["content"] for a in t["added_tokens"]}
    for a, b in (m if isinstance(m, list) else m.split(" ") for m in model["merges"]):
        if len(pairs) < merges and all(x in keep or len(x) == 1 for x in (a, b)):
            pairs.append([a, b])
            keep.add(a + b)
    vocab = [v for v in model["vocab"] if v in keep or len(v) == 1 or v.startswith("<0x")]
    model["vocab"] = {v: i for i, v in enumerate(vocab)}
    model["merges"] = [" ".join(m) for m in pairs]
    for a in t["added_tokens"]:
        a["id"] = model["vocab"][a["content"]]
    t["post_processor"] = None
    return t


def write_record(path, record):
    """[{tokenizer, texts, ids, special, decoded}, ...] with what tokenizers gives."""
    for r in record:
        t = Tokenizer.from_str(json.dumps(r["tokenizer"]))
        r["tokenizer"] = json.dumps(r["tokenizer"], ensure_ascii=False, separators=(",", ":"))
        r["ids"] = [t.encode(x, add_special_tokens=False).ids for x in r["texts"]]
        r["special"] = [t.encode(x).ids for x in r["texts"]]
        r["decoded"] = [t.decode(x, skip_special_tokens=True) for x in r["special"]]
    with open(path, "w", encoding="utf-8") as file:
        json.dump(record, file, ensure_ascii=False, separators=(",", ":"))
        file.write("\n")


main()
