#!/usr/bin/env python3
"""Compares the probabilities that ptst_sample draws with to those that transformers' logits
processors leave, on random logits and options.

    pip install torch==2.15.0 transformers==5.24.0
    cc -O2 -pthread tests/fuzz/check_samples.c -o check_samples -lm
    python3 tools/sample_fuzz.py --check ./check_samples [--count N] [--seed N]

Options go through GenerationConfig and the list of processors that generate() makes of it, so their
order is that of transformers. Half of the logits are rounded to bfloat16 or halves: many are equal.
Ends with 1 if a draw lies more than 1e-5 outside of the part of its token (softmax and its sums are
float32 in transformers), unless the border of top_p is nearer than that to a sum.
"""
import argparse
import json
import os
import random
import subprocess
import sys
import tempfile

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

BOUND = 1e-5


def random_case(rnd, model):
    vocab = rnd.choice([2, 5, 12, 40, 300, 1000, 4000])
    logits = torch.randn(vocab) * rnd.choice([0.1, 1, 2, 5, 20]) + rnd.choice([0, -8, 8])
    rounded = rnd.choice([None, None, "bfloat16", "halves"])
    if rounded == "bfloat16":
        logits = logits.bfloat16().float()
    elif rounded == "halves":
        logits = (logits * 2).round() / 2
    out = {"temperature": rnd.choice([1.0, 0.7, 0.1, 1.3, rnd.uniform(0.05, 3)]),
           "top_k": rnd.choice([0, 0, 1, 2, 5, 50, vocab, vocab + 7, rnd.randint(1, vocab)]),
           "top_p": rnd.choice([1.0, 1.0, 0.9, 0.5, 0.0, 0.01, 0.999, rnd.random()]),
           "penalty": rnd.choice([1.0, 1.0, 1.1, 1.5, 0.7, rnd.uniform(0.3, 3)])}
    seen = [rnd.randrange(vocab) for _ in range(rnd.choice([1, 3, 10, 200]))]
    config = GenerationConfig(do_sample=True, temperature=out["temperature"], top_k=out["top_k"],
                              top_p=out["top_p"], repetition_penalty=out["penalty"],
                              eos_token_id=None)
    steps = model._get_logits_processor(config, input_ids_seq_length=len(seen),
                                        encoder_input_ids=torch.tensor([seen]))
    after = steps(torch.tensor([seen]), logits[None].clone())[0].double()
    before = before_top_p(logits, seen, steps)
    after = (greedy(before, after) if out["top_k"] == 1 or out["top_p"] == 0
             else lowest(before, after).softmax(-1))
    out.update(seen=seen, logits=logits.tolist(), probabilities=after.tolist())
    return out, near_border(out, before)


def before_top_p(logits, seen, steps):
    """What the processors before the one of top_p leave."""
    out = logits[None].clone()
    for step in steps:
        if type(step).__name__ == "TopPLogitsWarper":
            break
        out = step(torch.tensor([seen]), out)
    return out[0].double()


def greedy(before, after):
    """Of equal best ones ptst takes the lowest, where transformers draws one or takes the last."""
    assert bool((after[after > -float("inf")] == before.max()).all())
    out = torch.zeros_like(before)
    out[int((before == before.max()).nonzero()[0])] = 1
    return out


def lowest(before, after):
    """Which of equal tokens top_p keeps is chance in transformers, whose sort is not stable: here,
    as in ptst, as many of them with the lowest ids."""
    equal = (before == after[after > -float("inf")].min()).nonzero().flatten()
    kept = int((after[equal] > -float("inf")).sum())
    out = after.clone()
    out[equal[kept:]] = -float("inf")
    out[equal[:kept]] = before[equal[:kept]]
    return out


def near_border(case, before):
    """Does the sum of some best tokens come so near to top_p that float32 cannot tell?"""
    if case["top_p"] in (0.0, 1.0):
        return False
    sums = before.softmax(-1).sort(descending=True).values.cumsum(-1)
    return float((sums - case["top_p"]).abs().min()) < BOUND


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", default="./check_samples")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tiny = LlamaConfig(vocab_size=4, hidden_size=4, intermediate_size=4, num_hidden_layers=1,
                       num_attention_heads=1)
    model, cases = LlamaForCausalLM(tiny), []
    for number in range(options.count):
        rnd = random.Random("sample/%d/%d" % (options.seed, number))
        torch.manual_seed(rnd.randrange(2 ** 31))
        cases.append(random_case(rnd, model))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "cases.json")
        with open(path, "w") as file:
            json.dump([case for case, _ in cases], file)
        run = subprocess.run([options.check, path], capture_output=True, text=True)
    errors = [float(line) for line in run.stdout.split()]
    if run.returncode != 0 or len(errors) != len(cases):
        sys.exit("check_samples: " + run.stderr[-500:])
    worst, differ, unsure = 0.0, 0, 0
    for number, (error, (case, near)) in enumerate(zip(errors, cases)):
        if error <= BOUND:
            worst = max(worst, error)
        elif near:
            unsure += 1
        else:
            differ += 1
            shown = {k: case[k] for k in ("temperature", "top_k", "top_p", "penalty")}
            print("%d/%d: %g outside: vocab %d, %s" % (options.seed, number, error,
                                                       len(case["logits"]), shown))
    print("%d cases, %d differ, %d undecided (top_p at a sum), worst of the others %.2g" % (
        len(cases), differ, unsure, worst))
    sys.exit(1 if differ else 0)


main()
