#!/usr/bin/env python3
"""Compares ptst.h with transformers and PEFT on random small models of every family.

    pip install torch==2.15.0 transformers==5.24.0 peft==0.21.2 safetensors==0.8.0
    cc -O2 -pthread tests/fuzz/check_models.c -o check_models -lm
    python3 tools/model_fuzz.py --check ./check_models [--count N] [--seed N] [--long N]
            [--dtype int8|int4] [--keep DIR] [FAMILY ...]

For every family N models of random sizes (odd multiples of 2 in a head, heads and vocabularies that
are no power of two), in F32, F16, BF16 or a mixture, in one file or in shards, with config.json of
both generations of transformers, every rope type that the family has, windows, biases, tied and
separate heads. Sequences are longer than the window and than the length before the rope was scaled;
--long makes the first one so long. Compared are the logits with and without a random adapter, the
gradients of all weights and of the adapter, and the logits of decoding token by token with a cache:
they must be those of the whole sequence (with dynamic rope and longrope, where the length decides
how a token turns, those of transformers with a cache). --dtype holds the weights in blocks here, and
gives transformers what these blocks mean; then weights have no gradients.
Prints the worst figures of each family and ends with 1 if one is beyond its bound.
"""
import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import warnings

import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "gemma", "gemma2",
            "gemma3_text"]
BOUNDS = {"logits": 1e-4, "lora_logits": 1e-4, "full": 1e-3, "lora": 1e-3, "cached": 1e-4}
ORDER = ["logits", "lora_logits", "full", "lora", "cached"]  # as check_models prints them


# ---- configurations ----
def rope(rnd, kind, pairs):
    """(rope_scaling, length before it was scaled) of a type."""
    old = rnd.choice([8, 12, 16, 24])
    factor = rnd.choice([1.0, 1.5, 2.0, 4.0, 8.0, 32.0])
    if kind in ("linear", "dynamic"):
        return {"rope_type": kind, "factor": factor}, None
    if kind == "llama3":
        low = rnd.choice([1.0, 0.5, 2.0])
        return {"rope_type": kind, "factor": factor, "low_freq_factor": low,
                "high_freq_factor": low * rnd.choice([1.5, 4.0]),
                "original_max_position_embeddings": old}, old
    if kind == "yarn":
        out = {"rope_type": kind, "factor": factor, "original_max_position_embeddings": old}
        for key, value in [("beta_fast", rnd.choice([32, 8.0, 2.5])),
                           ("beta_slow", rnd.choice([1, 0.5, 0.25])), ("truncate", False),
                           ("truncate", True), ("attention_factor", rnd.uniform(0.5, 1.5)),
                           ("mscale", rnd.choice([0.7, 1.0])),
                           ("mscale_all_dim", rnd.choice([0.5, 1.0]))]:
            if rnd.random() < 0.4:
                out[key] = value
        return out, old
    if kind == "longrope":
        out = {"rope_type": kind, "short_factor": [rnd.uniform(1, 1.5) for _ in range(pairs)],
               "long_factor": [rnd.uniform(1, 12) for _ in range(pairs)]}
        if rnd.random() < 0.5:
            out["attention_factor"] = rnd.uniform(0.7, 1.4)
        if rnd.random() < 0.3:
            out["factor"] = factor
        return out, old
    return None, None


def put_rope(rnd, family, config, new):
    """Chooses a rope type and writes it in the way of either generation."""
    theta = rnd.choice([10000.0, 500.0, 1e6, 5e5, 130.5])
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    kinds = ["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
    kinds = {"phi3": ["default", "longrope", "longrope"], "gemma3_text": kinds[:2] + ["yarn"]}.get(
        family, kinds)
    kind = rnd.choice(kinds)
    part = 1.0
    if family == "phi3" and rnd.random() < 0.5:
        part = rnd.choice([p for p in (0.25, 0.5, 0.75, 0.9, 1.0)
                           if int(head * p) % 2 == 0 and int(head * p) > 0])
    scaling, old = rope(rnd, kind, int(head * part) // 2)
    config["max_position_embeddings"] = rnd.choice([16, 24, 40, 64, 128])
    if family == "phi3" and kind == "longrope":
        config["original_max_position_embeddings"] = old
        if rnd.random() < 0.3:  # the key outside counts
            scaling["original_max_position_embeddings"] = old + 3
    elif kind == "longrope":
        scaling["original_max_position_embeddings"] = old
    elif kind in ("llama3", "yarn") and rnd.random() < 0.2 and family != "gemma3_text":
        if rnd.random() < 0.5:
            del scaling["original_max_position_embeddings"]
        else:
            config["original_max_position_embeddings"] = old + 2
    full = dict(scaling or {"rope_type": "default"}, rope_theta=theta)
    if family == "gemma3_text" and new:
        config["rope_parameters"] = {
            "full_attention": full,
            "sliding_attention": {"rope_type": "default", "rope_theta": rnd.choice([1e4, 2e3])}}
        return
    if part != 1.0:
        (full if new and rnd.random() < 0.5 else config)["partial_rotary_factor"] = part
    if new:
        config["rope_parameters"] = full
        return
    if rnd.random() < 0.8:
        config["rope_theta"] = theta
    if scaling is not None and rnd.random() < 0.4 and family != "gemma3_text":
        scaling["type"] = scaling.pop("rope_type")
        if family == "phi3" and rnd.random() < 0.5:
            scaling["type"] = rnd.choice(["su", "yarn"])
    config["rope_scaling"] = scaling
    if family == "gemma3_text" and rnd.random() < 0.8:
        config["rope_local_base_freq"] = rnd.choice([1e4, 3e3])


def put_window(rnd, family, config, new):
    """Which layers see how far."""
    layers = config["num_hidden_layers"]
    names = [rnd.choice(["full_attention", "sliding_attention"]) for _ in range(layers)]
    window = rnd.choice([1, 2, 3, 5, 7, 11, 40])
    if family in ("mistral", "phi3"):
        config["sliding_window"] = rnd.choice([None, window, window])
        if family == "mistral" and config["sliding_window"] and rnd.random() < 0.4:  # Ministral
            config["layer_types"] = names
            config["head_dim"] = config.get("head_dim") or (
                config["hidden_size"] // config["num_attention_heads"])
    elif family in ("qwen2", "qwen3"):
        config["use_sliding_window"] = rnd.random() < 0.6
        config["sliding_window"] = window
        config["max_window_layers"] = rnd.randint(0, layers + 1)
        if new and config["use_sliding_window"] and rnd.random() < 0.5:
            config["layer_types"] = names
    elif family == "smollm3":
        if rnd.random() < 0.6:
            config["no_rope_layers"] = [rnd.randint(0, 1) for _ in range(layers)]
        else:
            config["no_rope_layer_interval"] = rnd.randint(1, 3)
        config["use_sliding_window"] = rnd.random() < 0.5
        config["sliding_window"] = rnd.choice([None, window, window])
        if config["sliding_window"] and rnd.random() < 0.4:
            config["layer_types"] = names
    elif family in ("gemma2", "gemma3_text"):
        config["sliding_window"] = window
        pick = rnd.random()
        if pick < 0.4:
            config["layer_types"] = names
        elif pick < 0.8:
            config["sliding_window_pattern"] = rnd.randint(1, 4)


def random_config(rnd, family):
    """config.json of a random model, and which generation wrote it."""
    new = rnd.random() < 0.5
    kv = rnd.randint(1, 3)
    heads = kv * rnd.randint(1, 3)
    size = 2 * rnd.choice([1, 3, 5, 6, 7, 9, 11])
    own = family != "phi3" and (
        family in ("gemma", "gemma2", "gemma3_text", "qwen3") or rnd.random() < 0.4)
    hidden = heads * rnd.randint(2, 9) if own else heads * size
    config = {"model_type": family, "vocab_size": rnd.randint(33, 131), "hidden_size": hidden,
              "intermediate_size": rnd.randint(5, 50), "num_hidden_layers": rnd.randint(1, 4),
              "num_attention_heads": heads, "num_key_value_heads": kv,
              "rms_norm_eps": rnd.choice([1e-5, 1e-6, 1e-3]),
              "tie_word_embeddings": rnd.random() < 0.5, "bos_token_id": 1, "eos_token_id": 2,
              "pad_token_id": rnd.choice([None, 0]), "attention_dropout": 0.0, "use_cache": True,
              "initializer_range": 0.02, "transformers_version": "5.24.0" if new else "4.44.0"}
    if own:
        config["head_dim"] = size
    elif family != "qwen3" and rnd.random() < 0.3 and family not in ("phi3", "qwen2", "smollm3"):
        config["head_dim"] = None
    if kv == heads and rnd.random() < 0.3 and family in ("llama", "phi3"):
        del config["num_key_value_heads"]
    if family in ("llama", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text"):
        config["attention_bias"] = rnd.random() < 0.4
    if family in ("llama", "smollm3"):
        config["mlp_bias"] = rnd.random() < 0.4
    if family in ("gemma2", "gemma3_text"):
        config["query_pre_attn_scalar"] = rnd.choice([size, 7, 24])
        config["hidden_activation"] = "gelu_pytorch_tanh"
        if rnd.random() < 0.7:
            config["attn_logit_softcapping"] = rnd.choice([None, 2.0, 50.0])
            config["final_logit_softcapping"] = rnd.choice([None, 1.5, 30.0])
    elif family == "gemma":
        config["hidden_act"] = rnd.choice(["gelu", "gelu_pytorch_tanh"])
    else:
        config["hidden_act"] = "silu"
    put_rope(rnd, family, config, new)
    put_window(rnd, family, config, new)
    kind = (config.get("rope_parameters") or config.get("rope_scaling") or {}).get
    if config.get("sliding_window") == 1 and (kind("rope_type") or kind("type")) in (
            "dynamic", "longrope", "su", "yarn"):
        config["sliding_window"] = 2  # with 1, the cache of transformers 5.24 keeps all keys
    config["dtype" if new else "torch_dtype"] = rnd.choice(sorted(TYPES))
    if rnd.random() < 0.3:
        config = {k: v for k, v in config.items() if v is not None or k == "sliding_window" or
                  (k == "pad_token_id" and family in ("phi3", "smollm3"))}
    return config


# ---- a folder with a model and what transformers makes of it ----
def random_weights(rnd, model, config, mixed):
    kind = TYPES[config.get("dtype") or config.get("torch_dtype")]
    gain = rnd.uniform(0.7, 1.6)
    out = {}
    tied = model.config.tie_word_embeddings
    for name, value in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        if "norm" in name:
            one = torch.randn(value.shape) * 0.3 + (0 if "gemma" in config["model_type"] else 1)
        elif value.dim() == 1:
            one = torch.randn(value.shape) * 0.3
        else:
            one = torch.randn(value.shape) * (0.5 if "embed" in name else gain / value.shape[1] ** 0.5)
        out[name] = one.to(rnd.choice(list(TYPES.values())) if mixed else kind).contiguous()
    return out


def write_weights(rnd, folder, weights):
    """One file, or shards with an index; sometimes with the buffers of old files."""
    if rnd.random() < 0.2:
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    if rnd.random() < 0.5:
        save_file(weights, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
        return
    shards = rnd.randint(2, 4)
    parts = [{} for _ in range(shards)]
    for i, name in enumerate(rnd.sample(sorted(weights), len(weights))):
        parts[i % shards][name] = weights[name]
    index = {"metadata": {"total_size": sum(w.nbytes for w in weights.values())}, "weight_map": {}}
    for i, part in enumerate(p for p in parts if p):
        name = "model-%05d-of-%05d.safetensors" % (i + 1, shards)
        save_file(part, os.path.join(folder, name), metadata={"format": "pt"})
        index["weight_map"].update({k: name for k in part})
    with open(os.path.join(folder, "model.safetensors.index.json"), "w") as file:
        json.dump(index, file)


def gradients(model, batch, names):
    """Logits of the first sequence, summed loss, gradients of the named parameters."""
    model.zero_grad()
    total, first = 0, None
    for tokens, labels in batch:
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0]
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(labels),
                                                          ignore_index=-100, reduction="sum")
        first = logits.detach() if first is None else first
    total.backward()
    return first, total.detach().reshape(1), {n: (p.grad if p.grad is not None
                                                  else torch.zeros_like(p)).clone()
                                              for n, p in names}


def decode(model, tokens, first):
    """Logits of a sequence that is read with a cache: `first` tokens at once, then one by one."""
    with torch.no_grad():
        out = model(torch.tensor([tokens[:first]]), use_cache=True)
        rows, at = [out.logits[0]], first
        while at < len(tokens):
            cache = {"cache": out.cache} if hasattr(out, "cache") else {
                "past_key_values": out.past_key_values}
            out = model(torch.tensor([tokens[at:at + 1]]), use_cache=True, **cache)
            rows.append(out.logits[0])
            at += 1
        return torch.cat(rows)


def modules_of(config):
    fused = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    plain = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return fused if config["model_type"] == "phi3" else plain


def make_model(rnd, folder, family):
    """config.json and weights."""
    config = random_config(rnd, family)
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump(config, file, indent=2)
    empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    write_weights(rnd, folder, random_weights(rnd, empty, config, rnd.random() < 0.2))
    return config


def blocks(x, dtype):
    """What the blocks of 32 (>>kernels, convert, in ptst.h) that ptst makes of a matrix mean."""
    bits = torch.int32
    rows = torch.nn.functional.pad(x, (0, -x.shape[1] % 32)).view(-1, 32)
    largest = rows.abs().max(1, keepdim=True).values
    if dtype == "int8":  # d is rounded up to the upper half of a float32
        d = ((largest / 127).view(bits) + 0xFFFF >> 16 << 16).view(torch.float32)
        out = torch.round(rows * (1 / d)) * d
    else:
        d = torch.where((rows == -largest).any(1, keepdim=True), largest / 8, -largest / 8)
        d = d.bfloat16().float()
        out = (torch.round(rows * (1 / d)) + 8).clamp(0, 15) * d - 8 * d
    return torch.where(largest > 1e-30, out, 0).view(x.shape[0], -1)[:, :x.shape[1]]


def open_base(folder, dtype):
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                attn_implementation="eager").eval()
    for name, p in base.named_parameters():
        table = "embed_tokens" in name and not base.config.tie_word_embeddings
        if dtype and p.dim() == 2 and not table:
            p.data = blocks(p.data, dtype).contiguous()
    return base


def make(rnd, folder, family, long, dtype=None):
    """A random model in a folder, with adapter and expected.safetensors."""
    config = make_model(rnd, folder, family)
    base = open_base(folder, dtype)
    lengths, batch = (long or rnd.randint(20, 70), 9, 1), []
    for n in lengths:
        tokens = torch.randint(0, config["vocab_size"], (n + 1,)).tolist()
        skip = n // 3
        batch.append((tokens[:n], [-100] * skip + tokens[skip + 1:]))
    first = rnd.randint(1, lengths[0])
    out = {"tokens": torch.tensor(sum((b[0] for b in batch), []), dtype=torch.int32),
           "labels": torch.tensor(sum((b[1] for b in batch), []), dtype=torch.int32),
           "lengths": torch.tensor(lengths, dtype=torch.int32),
           "first": torch.tensor([first], dtype=torch.int32)}
    kind = (base.config.rope_parameters or {}).get("rope_type")
    out["cached_logits"] = decode(base, batch[0][0], first)
    base = open_base(folder, dtype)
    out["logits"], out["loss"], grads = gradients(base, batch, list(base.named_parameters()))
    if kind not in ("dynamic", "longrope"):  # where a cache changes nothing
        out["cached_logits"] = out["logits"].clone()
    out.update({"full." + n: g for n, g in grads.items()})
    modules = modules_of(config)
    tuned = get_peft_model(base, LoraConfig(
        task_type="CAUSAL_LM", r=rnd.randint(1, 5), lora_alpha=rnd.randint(1, 16),
        use_rslora=rnd.random() < 0.3,
        target_modules=rnd.sample(modules, rnd.randint(1, len(modules)))))
    for key, value in tuned.named_parameters():
        if "lora_B" in key:
            value.data.normal_(0, 0.1)
    tuned.save_pretrained(os.path.join(folder, "adapter"))
    weights = [(n, p) for n, p in tuned.named_parameters() if "lora_" in n]
    out["lora_logits"], out["lora_loss"], grads = gradients(tuned, batch, weights)
    out.update({"lora." + n.replace(".default", ""): g for n, g in grads.items()})
    save_file({k: v.contiguous() for k, v in out.items()},
              os.path.join(folder, "expected.safetensors"))
    return config


# ---- all families ----
def quiet():
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", default="./check_models")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--long", type=int, default=0)
    parser.add_argument("--dtype", choices=["int8", "int4"])
    parser.add_argument("--keep", help="folder for models that differ")
    parser.add_argument("families", nargs="*", default=FAMILIES)
    options = parser.parse_args()
    quiet()
    failures = 0
    for family in options.families or FAMILIES:
        worst, refused = dict.fromkeys(ORDER, 0.0), []
        for number in range(options.count):
            seed = "%s/%d/%d" % (family, options.seed, number)
            rnd = random.Random(seed)
            torch.manual_seed(rnd.randrange(2 ** 31))
            with tempfile.TemporaryDirectory() as folder:
                try:
                    config = make(rnd, folder, family, options.long, options.dtype)
                except Exception as error:  # not a model for transformers: printed below
                    refused.append("%s: %s" % (seed, str(error).strip().split("\n")[-1]))
                    continue
                run = subprocess.run([options.check] + ([options.dtype] if options.dtype else []) +
                                     [folder + "/"], capture_output=True, text=True)
                line = run.stdout.strip()[len(folder) + 2:]
                errors = {} if "failed" in line or not line else dict(
                    zip(ORDER, map(float, line.split()[:5])))
                bad = run.returncode != 0 or not errors or any(
                    not 0 <= errors[k] <= BOUNDS[k] for k in ORDER)
                for key in errors:
                    worst[key] = max(worst[key], errors[key])
                if bad:
                    failures += 1
                    print("%s: %s\n%s   %s" % (seed, line, run.stderr[-1500:], json.dumps(config)))
                    if options.keep:
                        shutil.copytree(folder, os.path.join(options.keep, seed.replace("/", "-")),
                                        dirs_exist_ok=True)
        print("%s: %d models, worst: %s" % (family, options.count - len(refused), ", ".join(
            "%s %.2g" % (k, worst[k]) for k in ORDER)), flush=True)
        for reason in refused:
            print("   refused by transformers: " + reason[:200])
    print("%d differ" % failures)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
