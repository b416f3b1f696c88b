#!/usr/bin/env python3
"""Writes the Unicode tables of ptst.h's section >>unicode.

    pip install unicodedata2==16.0.0 tokenizers==0.23.3 && python3 tools/gen_unicode.py > tables.txt

Paste the output between the two "generated" lines of the section. Hugging Face tokenizers takes its
character properties from several libraries of several Unicode versions (Oniguruma for patterns,
Rust's standard library for Digits and Lowercase, older tables for Punctuation, StripAccents and the
normal forms), so what differs from Unicode 16 is asked of the library itself, character by
character.
"""
import unicodedata2 as u
from tokenizers import Regex, normalizers, pre_tokenizers

POINTS = [p for p in range(0x110000) if not 0xD800 <= p < 0xE000]
CATEGORIES = ("Lu Ll Lt Lm Lo Mn Mc Me Nd Nl No Pc Pd Ps Pe Pi Pf Po Sm Sc Sk So Zs Zl Zp Cc Cf Cs "
              "Co Cn").split()
SCRIPTS = "Arabic Cyrillic Devanagari Greek Han Hangul Hebrew Hiragana Katakana Latin Thai".split()


def ranges(points):
    """first, last, first, last, ... of a set of code points."""
    out = []
    for p in sorted(points):
        if out and out[-1] == p - 1:
            out[-1] = p
        else:
            out += [p, p]
    return out


def show(name, values, comment, kind="uint32_t"):
    print(f"/* {comment} */")
    print(f"static const {kind} {name}[] = {{")
    line = "   "
    for v in values:
        if len(line) + len(f" {v},") > 98:
            print(line)
            line = "   "
        line += f" {v},"
    print(line.rstrip(","))
    print("};")
    print()


def pattern(text):
    """The code points that Oniguruma matches with a pattern of one character."""
    left = normalizers.Replace(Regex(text), "").normalize_str("".join(map(chr, POINTS)))
    return set(POINTS) - set(map(ord, left))


def category(p):
    return u.category(chr(p))


def categories():
    out = []
    for p in range(0x110000):
        k = CATEGORIES.index(category(p))
        if not out or out[-1] % 32 != k:
            out.append(p * 32 + k)
    show("ptst__categories", out,
         "General category (Unicode 16): first * 32 + category, up to the next first.")


def properties():
    word = pattern(r"\w")
    plain = {p for p in POINTS if category(p)[0] in "LM" or category(p) in ("Nd", "Pc")}
    assert plain <= word
    show("ptst__word_more", ranges(word - plain), r"\w beyond L, M, Nd, Pc: first, last, ...")
    cut = pre_tokenizers.Punctuation("removed")
    show("ptst__punctuation", ranges(p for p in POINTS if not cut.pre_tokenize_str(chr(p))),
         "What the pre-tokenizer Punctuation takes for it: first, last, ...")
    cut = pre_tokenizers.Digits(True)
    digits = {p for p in POINTS if len(cut.pre_tokenize_str("a" + chr(p))) == 2}
    show("ptst__digits_more", ranges(digits - {p for p in POINTS if category(p)[0] == "N"}),
         "What the pre-tokenizer Digits cuts beyond N: first, last, ...")
    strip = normalizers.StripAccents()
    show("ptst__accents", ranges(p for p in POINTS if strip.normalize_str("a" + chr(p)) == "a"),
         "What the normalizer StripAccents takes away: first, last, ...")
    triples = []
    for i, name in enumerate(SCRIPTS):
        r = ranges(pattern(r"\p{%s}" % name))
        for k in range(0, len(r), 2):
            triples += [r[k], r[k + 1], i]
    show("ptst__scripts", triples, "Scripts (" + ", ".join(SCRIPTS) + "): first, last, script, ...")


def lowercase():
    lower = normalizers.Lowercase()
    out = []  # first, last, step, difference
    for p in POINTS:
        text = lower.normalize_str(chr(p))
        if text == chr(p) or p == 0x130:
            continue
        assert len(text) == 1
        d = ord(text) - p
        if out and out[-1][3] == d and out[-1][1] + out[-1][2] == p:
            out[-1][1] = p
        elif out and out[-1][3] == d and out[-1][0] == out[-1][1] and p - out[-1][1] == 2:
            out[-1][1:3] = [p, 2]
        else:
            out.append([p, p, 1, d])
    show("ptst__lowercase", [x for row in out for x in row],
         "Lower case (U+0130 aside): first, last, step, difference, ...", "int32_t")


def marks():
    """Canonical combining classes, of those marks that the library reorders."""
    nfd = normalizers.NFD()
    out = []
    for p in POINTS:
        k = u.combining(chr(p))
        if k == 0 or len(nfd.normalize_str(chr(p))) != 1:
            continue
        low, high = "\u0334", "\u0345"  # classes 1 and 240
        a = nfd.normalize_str("a" + high + chr(p)) == "a" + chr(p) + high
        b = k > 1 and nfd.normalize_str("a" + chr(p) + low) == "a" + low + chr(p)
        if not a and not b:
            continue
        if out and out[-1][1] == p - 1 and out[-1][2] == k:
            out[-1][1] = p
        else:
            out.append([p, p, k])
    show("ptst__combining", [x for row in out for x in row],
         "Canonical combining class: first, last, class, ...")


def decompositions():
    nfd, nfc, nfkd = normalizers.NFD(), normalizers.NFC(), normalizers.NFKD()
    pairs, excluded, runs, long, parts = [], [], [], [], []
    for p in POINTS:
        if 0xAC00 <= p <= 0xD7A3:
            continue
        d, k = nfd.normalize_str(chr(p)), nfkd.normalize_str(chr(p))
        if d != chr(p):
            x = [int(s, 16) for s in u.decomposition(chr(p)).split()]
            pairs += [p, x[0], x[1] if len(x) > 1 else 0]
            if len(x) > 1 and nfc.normalize_str(chr(p)) != chr(p):
                excluded.append(p)
        if k != d and len(k) == 1:
            if runs and runs[-1][1] == p - 1 and runs[-1][2] + p - runs[-1][0] == ord(k):
                runs[-1][1] = p
            else:
                runs.append([p, p, ord(k)])
        elif k != d:
            text = list(map(ord, k))
            long += [p, len(parts) * 32 + len(text)]
            parts += text
    show("ptst__decompositions", pairs, "Canonical decomposition: point, first, second or 0, ...")
    show("ptst__excluded", excluded, "Pairs that composition leaves alone.")
    show("ptst__compat_runs", [x for row in runs for x in row],
         "Compatibility decomposition to one point: first, last, that of the first, ...")
    show("ptst__compat", long,
         "Compatibility decomposition to several: point, place in the next table * 32 + number, ...")
    show("ptst__compat_parts", parts, "The points that they become.")


print(f"/* Generated by tools/gen_unicode.py from Unicode {u.unidata_version}. */")
print("// clang-format off")
categories()
properties()
lowercase()
marks()
decompositions()
print("// clang-format on")
