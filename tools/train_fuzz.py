#!/usr/bin/env python3
"""Compares `ptst finetune` with a plain PyTorch + PEFT loop, from the same adapter, no dropout.

    pip install torch transformers peft safetensors tokenizers
    cc -O2 -pthread -o ptst tools/ptst.c -lm
    python3 tools/train_fuzz.py --ptst ./ptst [--cases N] [--first N] [--seed N] [--windows]
            [--tokenizer DIR]

Each case draws a small model of one of the nine families, rows of text, and the settings: schedule
with warm-up, weight decay, clipping, accumulation, mask (joint, separate), batching (examples,
packing), adapter or (--full) all weights. 50 steps are made on both sides. Compared are the losses
of all steps (relative), the norms of the gradients, and the trained weights at the end:
|ours - theirs| / |theirs| over all of them. --windows compares batch 8 x 1 = 4 x 2 = 2 x 4 = 1 x 8
of ptst with each other instead, with a ragged last window. Prints the worst figures of each
setting; ends with 1 if a loss differs by more than 1e-3 or weights by more than 1e-2.
"""
import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from adapter_fuzz import DTYPES, FAMILIES, VOCAB

STEPS, EOS = 50, 2
LOSS_BOUND, WEIGHT_BOUND = 1e-3, 1e-2  # what issue and manual promise
WORDS = ("the a dog cat boy girl tree house ran said big small red happy sad to and with Lily Tim "
         "was is in on day one saw ball play found 3 12 + = # \u00e9t\u00e9 \u4f60").split()


def random_model(rng, family, folder):
    """Writes a model folder of random weights; returns the type of its file."""
    heads = rng.choice([2, 4])
    change = {"vocab_size": VOCAB, "hidden_size": heads * rng.choice([8, 12]),
              "intermediate_size": rng.choice([24, 40]), "num_hidden_layers": rng.choice([2, 3]),
              "num_attention_heads": heads, "num_key_value_heads": rng.choice([1, 2]),
              "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": EOS,
              "pad_token_id": None, "tie_word_embeddings": rng.random() < 0.5}
    if family in ("mistral", "phi3", "gemma2", "gemma3_text"):
        change["sliding_window"] = rng.choice([7, 64])
    torch.manual_seed(rng.randrange(1 << 30))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **change))
    for key, value in model.named_parameters():
        value.data.normal_(0, 0.15)
        value.data += 1 if "norm" in key and not family.startswith("gemma") else 0
    dtype = rng.choice(sorted(DTYPES))
    model.to(DTYPES[dtype]).save_pretrained(folder)
    return dtype


def random_rows(rng, count):
    text = lambda low, high: " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))
    return [(text(1, 12), text(1, 16)) for _ in range(count)]


def random_settings(rng, full):
    s = {"schedule": rng.choice(["constant", "linear", "cosine", "step:0.5", "step:0.85"]),
         "warmup": rng.choice([0, 1, 5, 20]), "weight_decay": rng.choice([0, 0.01, 0.3]),
         "clip": rng.choice([0, 0.3, 1.0]), "mask": rng.choice(["joint", "separate"]),
         "batching": rng.choice(["examples", "examples", "packing"]),
         "lr": rng.choice([3e-4, 1e-3] if full else [1e-3, 5e-3])}
    if s["batching"] == "packing":
        s.update(batch=rng.choice([1, 2]), accumulate=rng.choice([1, 2, 3]),
                 context=rng.choice([96, 150]))
    else:
        s.update(batch=rng.choice([1, 2, 4]), accumulate=rng.choice([1, 2, 3]), context=200)
    return s


def tokenize(tokenizer, render, rows, mask):
    """(tokens, number of prompt tokens) of each row, as interface and manual define them."""
    out = []
    for question, answer in rows:
        prompt = render(question)
        head = tokenizer.encode(prompt).ids
        tokens = (tokenizer.encode(prompt + answer).ids if mask == "joint" else
                  head + tokenizer.encode(answer, add_special_tokens=False).ids)
        out.append((tokens + [EOS], len(head)))
    return out


def batches(rows, s):
    """Batches of one epoch: `batch` rows, or as many as fit batch x context tokens."""
    out, room = [], 0
    for row in rows:
        n = len(row[0])
        new = len(out[-1]) == s["batch"] if out and s["batching"] == "examples" else n > room
        if not out or new:
            out.append([])
            room = s["batch"] * s["context"]
        out[-1].append(row)
        room -= n
    return out


def rate_of(s, step, steps, epoch):
    """transformers' get_*_schedule_with_warmup and torch's StepLR."""
    kind, _, gamma = s["schedule"].partition(":")
    w = s["warmup"]
    rate = s["lr"] * (float(gamma) ** epoch if gamma else 1)
    if step < w:
        return rate * step / max(1, w)
    if kind == "linear":
        return rate * max(0.0, (steps - step) / max(1, steps - w))
    if kind == "cosine":
        return rate * max(0.0, 0.5 * (1 + math.cos(math.pi * (step - w) / max(1, steps - w))))
    return rate


def torch_loop(model, rows, s, steps):
    """The plain loop. The rows go through one by one: nothing is padded, nothing is shared."""
    named = [(k, p) for k, p in model.named_parameters() if p.requires_grad]
    weights = [p for _, p in named]
    still = [p for k, p in named if "norm" in k or k.endswith("bias")]  # as transformers' Trainer
    optimizer = torch.optim.AdamW([{"params": [p for p in weights if all(p is not q for q in still)],
                                    "weight_decay": s["weight_decay"]},
                                   {"params": still, "weight_decay": 0.0}], lr=s["lr"])
    log, epoch = [], 0
    while True:
        all_batches = batches(rows, s)
        for at in range(0, len(all_batches), s["accumulate"]):
            if len(log) == steps:
                return log
            window = sum(all_batches[at:at + s["accumulate"]], [])
            labels, total = sum(len(t) - p for t, p in window), 0.0
            for tokens, prompt in window:
                ids = torch.tensor([tokens])
                logits = model(input_ids=ids).logits[0, prompt - 1:-1]
                loss = torch.nn.functional.cross_entropy(logits, ids[0, prompt:],
                                                         reduction="sum") / labels
                loss.backward()
                total += loss.item()
            norm = torch.nn.utils.clip_grad_norm_(weights, s["clip"] or float("inf")).item()
            for group in optimizer.param_groups:
                group["lr"] = rate_of(s, len(log), steps, epoch)
            optimizer.step()
            optimizer.zero_grad()
            log.append((total, norm, group["lr"]))
        epoch += 1


def ptst(args, *command):
    done = subprocess.run([args.ptst, *map(str, command)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError("ptst %s: %s" % (command[0], done.stderr.strip()))
    return done.stdout


def ptst_train(args, model, adapter, data, out, s, steps, full):
    start = (["--full", "--dtype", "f32"] if full else
             ["--init-adapter", adapter, "--dropout", 0])
    options = ("lr", "schedule", "warmup", "weight_decay", "clip", "batch", "accumulate",
               "batching", "context", "mask")
    ptst(args, "finetune", "--quiet", "--threads", 1, "--model", model, *start, "--train", data,
         "--template", "TV", "--out", out, "--max-steps", steps, "--epochs", 1000, "--no-shuffle",
         *sum((["--" + o.replace("_", "-"), s[o]] for o in options), []))
    with open(os.path.join(out, "log.jsonl")) as file:
        return [json.loads(line) for line in file]


def distance(ours, theirs):
    assert set(ours) == set(theirs), set(ours) ^ set(theirs)
    square = lambda values: sum(v.double().pow(2).sum().item() for v in values)
    return math.sqrt(square(ours[k].float() - theirs[k] for k in theirs) / square(theirs.values()))


def note(worst, key, figures):
    count, old = worst.get(key, (0, (0, 0, 0)))
    worst[key] = count + 1, tuple(map(max, old, figures))


def prepare(args, rng, work, family, rows):
    folder, data = os.path.join(work, "model"), os.path.join(work, "train.jsonl")
    dtype = random_model(rng, family, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(os.path.join(args.tokenizer, name), folder)
    with open(data, "w") as file:
        for question, answer in rows:
            file.write(json.dumps({"question": question, "answer": answer}) + "\n")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                attn_implementation="eager")
    names = {n.split(".")[-1] for n, m in base.named_modules()
             if isinstance(m, torch.nn.Linear) and m is not base.get_output_embeddings()}
    targets = rng.sample(sorted(names), rng.randint(1, len(names)))
    tuned = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=rng.choice([1, 2, 4, 8]),
                                            lora_alpha=rng.choice([4, 8, 16]),
                                            use_rslora=rng.random() < 0.3, target_modules=targets))
    for key, value in tuned.named_parameters():
        if "lora_B" in key:  # PEFT starts at 0, where half of the gradients vanish
            value.data.normal_(0, 0.05)
    adapter = os.path.join(work, "adapter")
    tuned.save_pretrained(adapter)
    return folder, adapter, data, dtype


def one_case(args, number, work, worst):
    rng = random.Random("%d %d" % (args.seed, number))
    family, full = FAMILIES[number % len(FAMILIES)], rng.random() < 0.2
    rows, s = random_rows(rng, rng.randint(9, 30)), random_settings(rng, full)
    folder, adapter, data, dtype = prepare(args, rng, work, family, rows)
    out = os.path.join(work, "out")
    ours = ptst_train(args, folder, adapter, data, out, s, STEPS, full)
    render = lambda q: ptst(args, "render", "--template", "TV", "--", q)
    tokenizer = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                 attn_implementation="eager")
    model = model if full else PeftModel.from_pretrained(model, adapter, is_trainable=True)
    theirs = torch_loop(model.train(), tokenize(tokenizer, render, rows, s["mask"]), s, STEPS)
    assert len(ours) == len(theirs) == STEPS
    loss = max(abs(a["loss"] - b[0]) / b[0] for a, b in zip(ours, theirs))
    norm = max(abs(a["grad_norm"] - b[1]) / b[1] for a, b in zip(ours, theirs))
    rate = max(abs(a["learning_rate"] - b[2]) for a, b in zip(ours, theirs)) / s["lr"]
    if full:
        final = dict(model.named_parameters())
        saved = load_file(os.path.join(out, "model.safetensors"))
    else:
        final = {k.replace(".default", ""): v for k, v in model.named_parameters()
                 if v.requires_grad}
        saved = load_file(os.path.join(out, "adapter_model.safetensors"))
    weight = distance(saved, {k: v.detach() for k, v in final.items()})
    figures = (loss, norm, weight)
    for key in ("all", family, "file " + dtype, "all weights" if full else "adapter",
                s["schedule"], "mask " + s["mask"], s["batching"], "warm-up %d" % s["warmup"],
                "decay %g" % s["weight_decay"], "clip %g" % s["clip"],
                "accumulate %d" % s["accumulate"]):
        note(worst, key, figures)
    good = loss <= LOSS_BOUND and weight <= WEIGHT_BOUND and rate <= 1e-9
    if args.verbose or not good:
        print("case %d: %s %s%s %s: loss %.2g, gradient %.2g, weights %.2g, rate %.2g; "
              "loss %.3f to %.3f" % (number, family, dtype, " full" if full else "", json.dumps(s),
                                     loss, norm, weight, rate, theirs[0][0], theirs[-1][0]),
              flush=True)
    return good


def one_window(args, number, work, worst):
    """The same windows of 8 rows, split in four ways; the last one of an epoch is ragged."""
    rng = random.Random("window %d %d" % (args.seed, number))
    family = FAMILIES[number % len(FAMILIES)]
    rows, s = random_rows(rng, rng.choice([11, 13, 21, 27])), random_settings(rng, False)
    s["batching"] = "examples"
    folder, adapter, data, _ = prepare(args, rng, work, family, rows)
    runs = []
    for batch in (8, 4, 2, 1):
        out = os.path.join(work, "out%d" % batch)
        s.update(batch=batch, accumulate=8 // batch)
        log = ptst_train(args, folder, adapter, data, out, s, STEPS, False)
        runs.append((load_file(os.path.join(out, "adapter_model.safetensors")), log))
    for batch, (weights, log) in zip((4, 2, 1), runs[1:]):
        loss = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(log, runs[0][1]))
        norm = max(abs(a["grad_norm"] - b["grad_norm"]) / b["grad_norm"]
                   for a, b in zip(log, runs[0][1]))
        key = "%d x %d against 8 x 1" % (batch, 8 // batch)
        figures = loss, norm, distance(weights, runs[0][0])
        note(worst, key, figures)
        if figures[0] > LOSS_BOUND or figures[2] > WEIGHT_BOUND:
            print("case %d: %s %s: %s %s" % (number, family, json.dumps(s), key, figures))
            return False
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ptst", default="./ptst")
    parser.add_argument("--cases", type=int, default=45)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--windows", action="store_true")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--tokenizer", default="tests/golden/stories260K")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    worst, failed = {}, 0
    for number in range(args.first, args.first + args.cases):
        with tempfile.TemporaryDirectory() as work:
            failed += not (one_window if args.windows else one_case)(args, number, work, worst)
    print("seed %d: %d cases, %d failed; worst relative difference of" % (args.seed, args.cases,
                                                                           failed))
    print("  %-22s %5s  %-8s %-8s %-8s" % ("", "cases", "loss", "gradient", "weights"))
    for key, (count, figures) in worst.items():
        print("  %-22s %5d  %-8.1e %-8.1e %-8.1e" % ((key, count) + figures))
    return failed != 0


if __name__ == "__main__":
    sys.exit(main())
