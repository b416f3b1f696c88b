#!/usr/bin/env python3
"""Compares the answers of `ptst generate` with those of transformers' generate, token for token, on
random small models of every family whose generation_config.json says how to answer.

    pip install torch==2.15.0 transformers==5.24.0 peft==0.21.2 safetensors==0.8.0
    cc -O2 -pthread -o ptst tools/ptst.c -lm
    python3 tools/generate_fuzz.py --ptst ./ptst [--count N] [--seed N] [FAMILY ...]

The models are those of tools/model_fuzz.py; each token is one character. generation_config.json has
any of: one end token or several, max_new_tokens, repetition_penalty, temperature and top_p without
do_sample (which then mean nothing). No option is given on the command line. Ends with 1 if an answer
differs before a place where the two best logits of transformers are nearly equal.
"""
import argparse
import json
import os
import random
import subprocess
import sys
import tempfile

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig

import model_fuzz


def letter(i):
    return chr(0x4E00 + i)


def write_tokenizer(folder, size):
    vocab = {letter(i): i for i in range(size)}
    t = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
         "normalizer": None, "pre_tokenizer": None, "post_processor": None,
         "decoder": {"type": "Fuse"},
         "model": {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False,
                   "continuing_subword_prefix": None, "end_of_word_suffix": None,
                   "byte_fallback": False, "vocab": vocab, "merges": []}}
    with open(os.path.join(folder, "tokenizer.json"), "w") as file:
        json.dump(t, file)


def random_generation(rnd, size):
    out = {"eos_token_id": rnd.choice([3, [5, 7], [4, 9, 11, 12]]),
           "max_new_tokens": rnd.randint(5, 60)}
    if rnd.random() < 0.6:
        out["repetition_penalty"] = rnd.choice([1.0, 1.1, 1.5, 0.8])
    if rnd.random() < 0.3:
        out["do_sample"] = False
        out.update({"temperature": 0.6, "top_p": 0.9, "top_k": 20})
    if rnd.random() < 0.2:
        out = {k: v for k, v in out.items() if k != "eos_token_id"}
    return out


def expected(model, ids):
    """Tokens of transformers, and how close a second one was at each place."""
    with torch.no_grad():
        out = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)).long(),
                             pad_token_id=0, return_dict_in_generate=True, output_scores=True)
    close = []
    for s in out.scores:
        best = s[0].topk(2).values
        close.append(float((best[0] - best[1]) / s[0][s[0] > -1e30].abs().max()))
    return out.sequences[0][len(ids):].tolist(), close


def trial(rnd, family, options, folder):
    model_fuzz.make_model(rnd, folder, family)
    with open(os.path.join(folder, "config.json")) as file:
        config = json.load(file)
    if config.get("sliding_window") == 1:
        raise ValueError("with a window of 1 its cache keeps all keys")
    write_tokenizer(folder, config["vocab_size"])
    generation = random_generation(rnd, config["vocab_size"])
    with open(os.path.join(folder, "generation_config.json"), "w") as file:
        json.dump(generation, file)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                 attn_implementation="eager").eval()
    prompts = [[rnd.randrange(config["vocab_size"]) for _ in range(rnd.randint(1, 20))]
               for _ in range(4)]
    with open(os.path.join(folder, "plain.json"), "w") as file:
        json.dump({"plain": "%s"}, file)
    with open(os.path.join(folder, "prompts.jsonl"), "w") as file:
        for p in prompts:
            file.write(json.dumps({"question": "".join(map(letter, p))}) + "\n")
    run = subprocess.run(
        [options.ptst, "generate", "--model", folder, "--template", folder + "/plain.json",
         "--prompts", folder + "/prompts.jsonl", "--out", folder + "/answers.jsonl", "--quiet",
         "--threads", "1"], capture_output=True, text=True)
    if run.returncode != 0:
        return len(prompts), [run.stderr[-500:]]
    bad = []
    with open(os.path.join(folder, "answers.jsonl")) as file:
        answers = [json.loads(line) for line in file]
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    for p, a in zip(prompts, answers):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                     attn_implementation="eager").eval()
        want, close = expected(model, p)
        got = [ord(x) - 0x4E00 for x in a["answer"]]
        if want and want[-1] in ends:
            want = want[:-1]
        at = next((i for i, (x, y) in enumerate(zip(want, got)) if x != y), None)
        at = min(len(want), len(got)) if at is None and len(want) != len(got) else at
        if at is not None and not (at < len(close) and close[at] < 1e-4):
            bad.append("%s: %s for %s, expected %s" % (json.dumps(generation), got, p, want))
    return len(prompts), bad


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ptst", default="./ptst")
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("families", nargs="*", default=model_fuzz.FAMILIES)
    options = parser.parse_args()
    model_fuzz.quiet()
    failures = 0
    for family in options.families or model_fuzz.FAMILIES:
        answers, differ = 0, 0
        for number in range(options.count):
            seed = "generate/%s/%d/%d" % (family, options.seed, number)
            rnd = random.Random(seed)
            torch.manual_seed(rnd.randrange(2 ** 31))
            with tempfile.TemporaryDirectory() as folder:
                try:
                    count, bad = trial(rnd, family, options, folder)
                except Exception as error:  # not a model for transformers
                    print("   not for transformers: %s: %s" % (seed, str(error)[:150]))
                    continue
                if bad:
                    with open(os.path.join(folder, "config.json")) as file:
                        print(seed, bad[0], file.read().replace("\n", "")[:1500], flush=True)
            answers += count
            differ += len(bad)
        print("%s: %d answers, %d differ" % (family, answers, differ), flush=True)
        failures += differ
    sys.exit(1 if failures else 0)


main()
