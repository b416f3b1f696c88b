#!/usr/bin/env python3
"""Makes the golden files of tests/golden. Versions and commands stand in tests/golden/README.md.

    python3 tools/make_golden.py NAME [--shared DIR]      (from the top folder; NAME: see COMMANDS)
"""
import argparse
import json
import os
import re

GOLDEN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests", "golden")


# ---- judge: answers to GSM8K questions ----
# (text, the data's answer, and by hand: is it correct by the rules openai, strict, flexible?)
GSM8K_CASES = [
    ("#### 18", "#### 18", 1, 1, 1),
    ("so 9*2 = 18\n#### 18", "#### 18", 1, 1, 1),
    ("#### 18.", "#### 18", 0, 1, 1),
    ("#### 18..", "#### 18", 0, 0, 0),
    ("#### 1,234", "#### 1234", 1, 1, 1),
    ("#### 1234", "#### 1,234", 1, 1, 1),
    ("#### $5", "#### 5", 0, 0, 1),
    ("#### 5$", "#### 5", 1, 1, 1),
    ("$5.00", "#### 5", 0, 0, 0),
    ("$5", "#### 5", 0, 0, 1),
    ("The answer is 7", "#### 7", 0, 0, 1),
    ("The answer is 7.", "#### 7", 0, 0, 1),
    ("The answer is -3", "#### -3", 0, 0, 1),
    ("#### -3", "#### -3", 1, 1, 1),
    ("#### -3", "#### 3", 0, 0, 0),
    ("#### - 3", "#### -3", 0, 0, 0),
    ("-3.", "#### -3", 0, 0, 1),
    ("", "#### 3", 0, 0, 0),
    ("no number", "#### 3", 0, 0, 0),
    ("####18", "#### 18", 0, 0, 1),
    ("####  18", "#### 18", 0, 0, 1),
    ("### 18", "#### 18", 0, 0, 1),
    ("##### 18", "#### 18", 1, 1, 1),
    ("#### 5\n#### 6", "#### 5", 1, 1, 0),
    ("#### 5\n#### 6", "#### 6", 0, 0, 1),
    ("#### x\n#### 6", "#### 6", 1, 1, 1),
    ("#### 18 dollars", "#### 18", 1, 1, 1),
    ("#### 18 of 20", "#### 18", 1, 1, 0),
    ("18 #### ", "#### 18", 0, 0, 1),
    ("#### 18.0", "#### 18", 0, 0, 0),
    ("#### 18.5", "#### 18.5", 1, 1, 1),
    ("#### .5", "#### .5", 1, 1, 1),
    ("#### 0.5", "#### .5", 0, 0, 0),
    ("#### ,", "#### 18", 0, 0, 0),
    ("#### .", "#### 18", 0, 0, 0),
    ("#### 007", "#### 7", 0, 0, 0),
    ("#### 7 ", "#### 7", 1, 1, 1),
    ("#### 7\n", "#### 7", 1, 1, 1),
    ("#### 7\r\n", "#### 7", 1, 1, 1),
    ("#### 7,", "#### 7", 1, 1, 1),
    ("#### 7,.", "#### 7", 0, 1, 1),
    ("#### 1,2,3", "#### 123", 1, 1, 1),
    ("#### 1 234", "#### 1234", 0, 0, 0),
    ("#### 10%", "#### 10", 1, 1, 1),
    ("10%", "#### 10", 0, 0, 1),
    ("1/2", "#### 2", 0, 0, 1),
    ("3:15", "#### 15", 0, 0, 1),
    ("x=5, y=6", "#### 6", 0, 0, 1),
    ("x=5, y=6...", "#### 6", 0, 0, 0),
    ("answer: 12 ...", "#### 12", 0, 0, 0),
    ("12, ok.", "#### 12", 0, 0, 1),
    ("I have 3 apples, 4 pears.", "#### 4", 0, 0, 1),
    ("$", "#### 4", 0, 0, 0),
    ("$$", "#### 4", 0, 0, 0),
    ("$$4", "#### 4", 0, 0, 1),
    ("--4", "#### -4", 0, 0, 1),
    ("5-4", "#### 4", 0, 0, 0),
    ("5 - 4", "#### 4", 0, 0, 1),
    ("#### -", "#### 4", 0, 0, 0),
    ("#### --4", "#### -4", 0, 0, 1),
    ("#### +4", "#### 4", 0, 0, 1),
    ("#### \u0664", "#### 4", 0, 0, 0),
    ("#### \uff14", "#### 4", 0, 0, 0),
    ("#### 4\u20ac", "#### 4", 1, 1, 1),
    ("\u20ac4", "#### 4", 0, 0, 1),
    ("<<48/2=24>>24 clips\n#### 72", "in April 48, May <<48/2=24>>24\n#### 72", 1, 1, 1),
    ("#### 1e3", "#### 1000", 0, 0, 0),
    ("#### 1,000,000", "#### 1000000", 1, 1, 1),
    ("1,000,000", "#### 1000000", 0, 0, 1),
    ("Question: next? #### 9", "#### 9", 1, 1, 1),
    ("#### \n9", "#### 9", 0, 0, 1),
    ("A: 18", "#### 18", 0, 0, 1),
    ("#### 18#### 19", "#### 18", 1, 1, 0),
    ("#### [invalid]", "#### 18", 0, 0, 0),
    ("[invalid]", "no marker", 0, 0, 0),
    ("#### 18\xa0", "#### 18", 1, 1, 1),
    ("\u221218", "#### 18", 0, 0, 1),
    ("#### \u221218", "#### -18", 0, 0, 0),
    ("The total is $1,234.56.", "#### 1234.56", 0, 0, 1),
    ("#### 1234.56", "#### 1234.56", 1, 1, 1),
    ("0", "#### 0", 0, 0, 1),
    ("#### 0", "#### 0", 1, 1, 1),
    ("#### -0", "#### 0", 0, 0, 0),
]


def judge(_):
    """Extractions with the regular expressions of openai/grade-school-math (dataset.py) and of
    lm-evaluation-harness 4e7e0d4 (gsm8k.yaml, filters/extraction.py, api/metrics.py)."""
    strict = re.compile(r"#### (\-?[0-9\.\,]+)")
    flexible = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")

    def normal(text):
        for ignored in [",", r"\$", r"(?s).*#### ", r"\.$"]:
            text = re.sub(ignored, "", text)
        return text.lower()

    def pick(regex, text, which):
        found = regex.findall(text)
        if not found:
            return "[invalid]"
        one = found[which]
        if isinstance(one, tuple):
            one = ([group for group in one if group] or ["[invalid]"])[0]
        return one.strip()

    rows = []
    for text, answer, *labels in GSM8K_CASES:
        take = [pick(strict, text, 0).replace(",", ""), normal(pick(strict, text, 0)),
                normal(pick(flexible, text, -1))]
        wanted = [pick(strict, answer, 0).replace(",", ""), normal(answer), normal(answer)]
        for got, want, label in zip(take, wanted, labels):
            assert (got == want and got != "[invalid]") == bool(label), (text, answer, got, want)
        rows.append(json.dumps({"text": text, "answer": answer,
                                "correct": [bool(label) for label in labels], "take": take}))
    with open(os.path.join(GOLDEN, "gsm8k_cases.json"), "w") as file:
        file.write("[\n" + ",\n".join(rows) + "\n]\n")


COMMANDS = {"judge": judge}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(COMMANDS))
    parser.add_argument("--shared", default="../shared")
    COMMANDS[parser.parse_args().name](parser.parse_args())
