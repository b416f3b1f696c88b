#!/usr/bin/env python3
"""Compares adapters of `ptst` with PEFT on random models and random adapter configurations.

    pip install torch transformers peft safetensors
    cc -O2 -pthread -o ptst tools/ptst.c -lm
    python3 tools/adapter_fuzz.py --ptst ./ptst [--cases N] [--seed N] [--keep DIR]
            [--tokenizer DIR]

Each case is a small model of one of the nine families, and an adapter that PEFT makes of a random
configuration: target_modules as list, regular expression or "all-linear", exclude_modules,
rank_pattern, alpha_pattern, layers_to_transform, modules_to_save, rsLoRA. Compared are the logits
    read     of PEFT's adapter, in ptst and in PEFT
    written  of an adapter that ptst went on training from it (one step), in ptst and in PEFT
    merged   of the folder `ptst merge` writes, in transformers, and of PEFT's merge_and_unload in
             float32 rounded to the type of the file
Each figure is max |difference| / max |logit|. Ends with 1 if a bound is exceeded or if one side
refuses what the other one takes.
"""
import argparse
import collections
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

VOCAB = 512  # of the tokenizer of tests/golden/stories260K
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "gemma", "gemma2",
            "gemma3_text"]
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Sums in float32. Merged weights that lie between two numbers of the file's type may fall to
# different sides, by one unit of its last place (F16 2^-11, BF16 2^-8); few do.
BOUNDS = {"read": 1e-4, "written": 1e-4, "F32": 1e-4, "F16": 1e-3, "BF16": 1e-2}


def random_model(rng, family, folder):
    """Writes a model folder; returns (model in float32, type of the file)."""
    heads = rng.choice([2, 4])
    change = {"vocab_size": VOCAB, "hidden_size": heads * rng.choice([6, 8]),
              "intermediate_size": rng.choice([20, 24, 36]),
              "num_hidden_layers": rng.choice([1, 2, 3, 12]), "num_attention_heads": heads,
              "num_key_value_heads": rng.choice([k for k in (1, 2, 4) if heads % k == 0]),
              "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
              "pad_token_id": None, "tie_word_embeddings": rng.random() < 0.5}
    if family not in ("phi3", "smollm3", "llama", "qwen2"):
        change["head_dim"] = rng.choice([4, 6, 10])
    if family == "llama":
        change["attention_bias"] = rng.random() < 0.5
    torch.manual_seed(rng.randrange(1 << 30))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **change))
    for key, value in model.named_parameters():
        value.data.normal_(0, 0.3)
        value.data += 1 if "norm" in key and not family.startswith("gemma") else 0
    dtype = rng.choice(sorted(DTYPES))
    model.to(DTYPES[dtype]).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                attn_implementation="eager"), dtype


def linear_names(model):
    head = model.get_output_embeddings()
    return [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head]


def random_end(rng, path):
    """A path or an end of it."""
    parts = path.split(".")
    return ".".join(parts[rng.choice([-1, -1, -1, -2, -4, 0]):])


def random_regex(rng, paths):
    path = rng.choice(paths)
    short = path.split(".")[-1]
    some = {p.split(".")[-1]: 0 for p in rng.sample(paths, min(3, len(paths)))}
    return rng.choice([
        r".*\.(%s)" % "|".join(some),
        r".*%s" % short, r"model\.layers\.\d+\..*_proj", r".*layers\.(0|1|11)\..*proj",
        r"^model\.layers\.[0-9]{1,2}\.(self_attn|mlp)\.%s$" % short, r"(.*self_attn.*)",
        r".*\.[^.]*%s" % short[-6:], r".*?mlp\..+?_proj", r"model.*(?:%s|%s)" % (short, "o_proj"),
        r"\S+\.(?!q)\w+_proj", r"model\.layers\.(?:[0-9]|1[01])\.[a-z_]+\.[a-z_]+"])


def random_pattern(rng, paths, values):
    pattern = {}
    for _ in range(rng.choice([1, 2, 4])):
        path = rng.choice(paths)
        key = rng.choice([random_end(rng, path), random_end(rng, path), path.split(".")[-1],
                          random_regex(rng, paths), "^" + path.replace(".", r"\."),
                          r"layers\.%s\..*" % path.split(".")[2], "_proj",
                          "mlp.*|self_attn.q_proj"])
        pattern[key] = rng.choice(values)
    return pattern


def random_lora(rng, paths):
    kind = rng.random()
    lora = {"r": rng.choice([1, 2, 3, 5, 8]), "lora_alpha": rng.choice([1, 4, 7, 16, 2.5]),
            "use_rslora": rng.random() < 0.3}
    if kind < 0.5:
        ends = [random_end(rng, rng.choice(paths)) for _ in range(rng.choice([1, 2, 3, 6]))]
        lora["target_modules"] = ends + rng.choice([[], ["c_attn"]])
        if rng.random() < 0.4:
            layers = len({p.split(".")[2] for p in paths})
            some = rng.sample(range(layers), rng.choice([1, max(1, layers // 2)]))
            lora["layers_to_transform"] = rng.choice([some, some[0], some + [layers + 3]])
            lora["layers_pattern"] = rng.choice([None, "layers", ["layers"], ["h", "layers"],
                                                 "model.layers"])
    else:
        lora["target_modules"] = (random_regex(rng, paths) if kind < 0.8
                                  else rng.choice(["all-linear", "All-Linear"]))
    if rng.random() < 0.3:
        lora["exclude_modules"] = rng.choice([[random_end(rng, rng.choice(paths))],
                                              random_regex(rng, paths), ["proj"], []])
    if rng.random() < 0.4:
        lora["rank_pattern"] = random_pattern(rng, paths, [1, 2, 4, 9])
    if rng.random() < 0.4:
        lora["alpha_pattern"] = random_pattern(rng, paths, [1, 6, 0.5, 20])
    if rng.random() < 0.25:
        lora["modules_to_save"] = rng.choice([["lm_head"], ["embed_tokens"],
                                              ["embed_tokens", "lm_head"], ["model.embed_tokens"]])
    return lora


def ptst(args, *command):
    done = subprocess.run([args.ptst, *command, "--quiet", "--threads", "1"], capture_output=True,
                          text=True)
    if done.returncode != 0:
        raise RuntimeError("ptst %s: %s" % (command[0], done.stderr.strip()))


def ptst_logits(args, folder, model, adapter, ids):
    out = os.path.join(folder, "logits.safetensors")
    more = [] if adapter is None else ["--adapter", adapter]
    ptst(args, "logits", "--model", model, "--ids", ",".join(map(str, ids)), "--out", out, *more)
    return load_file(out)["logits"]


def peft_logits(model, adapter, ids, dtype=None):
    """With dtype: merged and rounded to it."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32,
                                                attn_implementation="eager").eval()
    if adapter is not None:
        base = PeftModel.from_pretrained(base, adapter).eval()
    if dtype is not None:
        base = base.merge_and_unload()
        for value in base.parameters():
            value.data = value.data.to(dtype).float()
    with torch.no_grad():
        return base(torch.tensor([ids])).logits[0].float()


def error(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def make_adapter(rng, model, lora, folder):
    """Saves an adapter as PEFT writes it; None if PEFT itself refuses the configuration."""
    try:
        tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
    except (ValueError, TypeError) as refusal:
        return str(refusal)
    for key, value in tuned.named_parameters():
        if "lora_B" in key:
            value.data.normal_(0, 0.2)
        elif "modules_to_save" in key:
            value.data += torch.randn_like(value) * 0.1
    tuned.save_pretrained(folder)
    cast = rng.choice([None, None, torch.float16, torch.bfloat16])
    if cast is not None:
        path = os.path.join(folder, "adapter_model.safetensors")
        save_file({k: v.to(cast).contiguous() for k, v in load_file(path).items()}, path,
                  {"format": "pt"})
    return None


def one_case(args, number, work, worst):
    rng = random.Random("%d %d" % (args.seed, number))
    family = FAMILIES[number % len(FAMILIES)]
    folder = os.path.join(work, "model")
    model, dtype = random_model(rng, family, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(os.path.join(args.tokenizer, name), folder)
    lora = random_lora(rng, linear_names(model))
    adapter, again, merged = (os.path.join(work, n) for n in ("adapter", "again", "merged"))
    refusal = make_adapter(rng, model, lora, adapter)
    if refusal is not None:
        return "skipped"
    # As the user wrote it: PEFT saves "all-linear" as a list, a reader must know the word itself.
    path = os.path.join(adapter, "adapter_config.json")
    with open(path) as file:
        config = json.load(file)
    if rng.random() < 0.5:
        config["target_modules"] = lora["target_modules"]
        with open(path, "w") as file:
            json.dump(config, file)
    ids = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 9, 40]))]
    label = "%s %s %s" % (family, dtype, json.dumps(lora))
    tied = model.config.tie_word_embeddings and "modules_to_save" in lora
    results = {}
    try:
        wanted = peft_logits(folder, adapter, ids)
    except RuntimeError:  # PEFT writes rank_pattern in another order, and the first match counts
        return "skipped"
    try:
        results["read"] = error(ptst_logits(args, work, folder, adapter, ids),
                                wanted), BOUNDS["read"]
        data = os.path.join(work, "train.jsonl")
        with open(data, "w") as file:
            file.write('{"question": "What is a dog?", "answer": "It is a pet."}\n')
        ptst(args, "finetune", "--model", folder, "--init-adapter", adapter, "--train", data,
             "--template", "TV", "--out", again, "--max-steps", "1", "--lr", "1e-2",
             "--dropout", "0")
        results["written"] = error(ptst_logits(args, work, folder, again, ids),
                                   peft_logits(folder, again, ids)), BOUNDS["written"]
        ptst(args, "merge", "--model", folder, "--adapter", adapter, "--out", merged)
        wanted = peft_logits(folder, adapter, ids, DTYPES[dtype])
        results["merged " + dtype] = error(peft_logits(merged, None, ids), wanted), BOUNDS[dtype]
        weights = load_file(os.path.join(merged, "model.safetensors"))
        found = {str(v.dtype) for v in weights.values()}
        if found != {str(DTYPES[dtype])}:
            raise RuntimeError("merged file has %s" % found)
    except RuntimeError as failure:
        print("case %d: %s: %s%s" % (number, label, failure, " (tied)" if tied else ""), flush=True)
        return "failed"
    bad = False
    for key, (value, bound) in results.items():
        worst[key] = max(worst[key], value)
        if not value <= bound:
            print("case %d: %s: %s %.3g" % (number, label, key, value), flush=True)
            bad = True
    return "failed" if bad else "passed"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ptst", default="./ptst")
    parser.add_argument("--cases", type=int, default=90)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", help="folder of the last case, kept")
    parser.add_argument("--tokenizer", default="tests/golden/stories260K")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    worst, counts = collections.defaultdict(float), collections.Counter()
    for number in range(args.first, args.first + args.cases):
        with tempfile.TemporaryDirectory() as work:
            counts[one_case(args, number, work, worst)] += 1
            if args.keep:
                shutil.rmtree(args.keep, ignore_errors=True)
                shutil.copytree(work, args.keep)
    print("seed %d: %d passed, %d failed, %d that PEFT refuses" %
          (args.seed, counts["passed"], counts["failed"], counts["skipped"]))
    for key in sorted(worst):
        print("  %-12s worst %.2g" % (key, worst[key]))
    return counts["failed"] != 0


if __name__ == "__main__":
    sys.exit(main())
