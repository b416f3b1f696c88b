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


# ---- train: 50 steps of PyTorch + PEFT ----
TRAIN_RUNS = {  # name: (batch, accumulate, epochs, lr, schedule, warm-up, weight decay, clip)
    "plain": (4, 1, 5, 2e-3, "constant", 0, 0.0, 0.0),
    "linear": (2, 2, 5, 5e-3, "linear", 4, 0.1, 0.0),
    "cosine": (4, 2, 10, 5e-3, "cosine", 3, 0.1, 0.5),
    "step": (3, 1, 4, 2e-3, "step:0.5", 2, 0.0, 1.0),
    "full": (4, 1, 5, 1e-3, "constant", 2, 0.0, 1.0),
}


def train(_):
    """A tiny Llama (F16 file, computed in float32), an adapter to start from, rows of tokens, and
    what a plain loop with torch.optim.AdamW makes of them: loss, norm of the gradient and learning
    rate of each step, and the adapter at the end. No padding: the rows go through one by one."""
    import copy
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file
    torch.manual_seed(1)
    torch.set_num_threads(1)
    folder = os.path.join(GOLDEN, "train")
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.2, bos_token_id=1, eos_token_id=2)
    base = transformers.LlamaForCausalLM(config).half()
    base.save_pretrained(os.path.join(folder, "model"))
    base = base.float()
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
                      target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj",
                                      "up_proj", "down_proj"])
    start = get_peft_model(copy.deepcopy(base), lora)
    for name, value in start.named_parameters():
        if "lora_B" in name:  # PEFT starts at 0, where half of the gradients vanish
            torch.nn.init.normal_(value, std=0.05)
    start.save_pretrained(os.path.join(folder, "adapter"))
    os.remove(os.path.join(folder, "adapter", "README.md"))
    os.remove(os.path.join(folder, "model", "generation_config.json"))
    generator = torch.Generator().manual_seed(2)
    draw = lambda low, high, n: torch.randint(low, high, (n,), generator=generator).tolist()
    head, rows = [1] + draw(3, 96, 9), []
    for _ in range(40):
        prompt = head + draw(3, 96, draw(1, 8, 1)[0])
        rows.append((prompt + draw(3, 96, draw(1, 12, 1)[0]) + [2], len(prompt)))

    def run(name):
        batch, accumulate, epochs, lr, schedule, warmup, decay, clip = TRAIN_RUNS[name]
        model = copy.deepcopy(base if name == "full" else start).train()
        weights = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=decay)
        window = batch * accumulate
        steps = epochs * -(-len(rows) // window)
        kind, _, gamma = schedule.partition(":")
        if kind == "linear":
            scheduler = transformers.get_linear_schedule_with_warmup(optimizer, warmup, steps)
        elif kind == "cosine":
            scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, warmup, steps)
        else:
            scheduler = transformers.get_constant_schedule_with_warmup(optimizer, warmup)
        log = []
        for epoch in range(epochs):
            for at in range(0, len(rows), window):
                labels, total = sum(len(t) - p for t, p in rows[at:at + window]), 0.0
                for tokens, prompt in rows[at:at + window]:
                    ids = torch.tensor([tokens])
                    logits = model(input_ids=ids).logits[0, prompt - 1:-1]
                    loss = torch.nn.functional.cross_entropy(logits, ids[0, prompt:],
                                                             reduction="sum") / labels
                    loss.backward()
                    total += loss.item()
                norm = torch.nn.utils.clip_grad_norm_(weights, clip or float("inf")).item()
                rate = scheduler.get_last_lr()[0]
                if gamma:  # StepLR once an epoch, as llama-recipes steps it
                    rate *= float(gamma) ** epoch
                    for group in optimizer.param_groups:
                        group["lr"] = rate
                log.append([total, norm, rate])
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        if name != "full":
            save_file({k.replace(".default", ""): v.detach().clone()
                       for k, v in model.named_parameters() if v.requires_grad},
                      os.path.join(folder, name + ".safetensors"))
        return log

    with open(os.path.join(folder, "steps.json"), "w") as file:
        rows_text = ",\n".join(json.dumps({"tokens": t, "prompt": p}) for t, p in rows)
        runs = ",\n".join(json.dumps({"name": name, "batch": o[0], "accumulate": o[1],
                                      "epochs": o[2], "lr": o[3], "schedule": o[4],
                                      "warmup": o[5], "weight_decay": o[6], "clip": o[7],
                                      "steps": run(name)}) for name, o in TRAIN_RUNS.items())
        file.write('{"rows": [\n%s],\n"runs": [\n%s]}\n' % (rows_text, runs))


# ---- sample, generate: transformers' logits processors and greedy answers ----
def sample(_):
    """Probabilities after repetition penalty, temperature, top-k and top-p of transformers."""
    import torch
    from transformers import (LogitsProcessorList, RepetitionPenaltyLogitsProcessor,
                              TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)
    generator = torch.Generator().manual_seed(3)
    cases = []
    for penalty, temperature, top_k, top_p in [
            (1.0, 1.0, 0, 1.0), (1.0, 0.7, 0, 1.0), (1.0, 1.5, 5, 1.0), (1.0, 1.0, 0, 0.8),
            (1.0, 0.8, 7, 0.6), (1.3, 1.0, 0, 1.0), (1.8, 0.9, 0, 0.9), (0.7, 1.0, 4, 0.95),
            (1.0, 1.0, 3, 1.0), (1.0, 1.0, 0, 0.01), (1.2, 2.0, 12, 0.5)]:
        logits = torch.randn(12, generator=generator).mul(2).half().float()
        if top_k == 3:
            logits[4] = logits[7] = logits.max() - 0.5  # a tie at the border
        seen = torch.randint(0, 12, (6,), generator=generator)
        steps = LogitsProcessorList()
        if penalty != 1:
            steps.append(RepetitionPenaltyLogitsProcessor(penalty))
        steps.append(TemperatureLogitsWarper(temperature))
        if top_k:
            steps.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            steps.append(TopPLogitsWarper(top_p))
        after = steps(seen[None], logits[None].clone()).double().softmax(-1)[0]
        cases.append(json.dumps({"penalty": penalty, "temperature": temperature, "top_k": top_k,
                                 "top_p": top_p, "seen": seen.tolist(), "logits": logits.tolist(),
                                 "probabilities": [round(p, 9) for p in after.tolist()]}))
    with open(os.path.join(GOLDEN, "sample.json"), "w") as file:
        file.write("[\n" + ",\n".join(cases) + "\n]\n")


GENERATE_PROMPTS = ["Once upon a time", "Once upon a time, there was a", "The dog", "One day, Tim",
                    "She said", "Lily and Tom", "A big red ball", "Once", "In the park"]


def generate(_):
    """Greedy answers of stories260K by transformers, with and without a repetition penalty."""
    import torch
    import transformers
    torch.set_num_threads(1)
    folder = os.path.join(GOLDEN, "stories260K")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = []
    for penalty in (1.0, 1.2):
        for prompt in GENERATE_PROMPTS:
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                 max_new_tokens=60, repetition_penalty=penalty,
                                 pad_token_id=0)[0][ids.shape[1]:]
            rows.append(json.dumps({"prompt": prompt, "penalty": penalty,
                                    "prompt_tokens": ids.shape[1], "ids": out.tolist(),
                                    "text": tokenizer.decode(out, skip_special_tokens=True)}))
    with open(os.path.join(GOLDEN, "generate.json"), "w") as file:
        file.write("[\n" + ",\n".join(rows) + "\n]\n")


# ---- jinja ----
def jinja_oracle(source, context):
    """The text that transformers' environment of Jinja2 renders, or None if it refuses."""
    from transformers.utils import chat_template_utils
    try:
        text = chat_template_utils._cached_compile_jinja_template(source).render(**context)
    except Exception:
        return None
    return None if re.search(r" at 0x[0-9a-f]+>", text) else text


def jinja(args):
    """Fills in what Jinja2 makes of each case. To add one, add {"source": ...} and run this."""
    path = os.path.join(GOLDEN, "jinja_cases.json")
    with open(path, encoding="utf-8") as file:
        cases = json.load(file)
    with open(path, "w", encoding="utf-8") as file:
        lines = []
        for case in cases:
            out = {"source": case["source"]}
            if case.get("context"):
                out["context"] = case["context"]
            text = jinja_oracle(case["source"], case.get("context", {}))
            out.update({"text": text} if text is not None else {"error": True})
            lines.append(json.dumps(out, ensure_ascii=False))
        file.write("[\n" + ",\n".join(lines) + "\n]\n")


# ---- model: tiny random models of each family, with and without adapters ----
# name, config.json of the generation before ("old") or since transformers 5, type of the file,
# config, LoRA config, gradients of all weights as well?
TINY = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
QV, ALL = ["q_proj", "v_proj"], "all-linear"
MODELS = [
    ("llama_tied", "old", "F32", "llama", {"tie_word_embeddings": True},
     {"r": 2, "lora_alpha": 8, "target_modules": QV}, True),
    ("llama_bias", "new", "F32", "llama",
     {"attention_bias": True, "mlp_bias": True, "head_dim": 6, "vocab_size": 53},
     {"r": 3, "lora_alpha": 4, "target_modules": ALL}, True),
    ("llama3_rope", "old", "BF16", "llama",
     {"rope_parameters": dict(LLAMA3, rope_theta=500000.0), "num_key_value_heads": 1},
     {"r": 2, "lora_alpha": 3, "target_modules": ["k_proj", "o_proj", "up_proj"],
      "use_rslora": True}, False),
    ("llama_linear_rope", "new", "F16", "llama",
     {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}},
     {"r": 2, "lora_alpha": 8, "target_modules": QV}, False),
    ("llama_plain", "old", "BF16", "llama",
     {"num_key_value_heads": 4, "rms_norm_eps": 1e-5, "num_hidden_layers": 3,
      "intermediate_size": 20, "max_position_embeddings": 32},
     {"r": 1, "lora_alpha": 1, "target_modules": ["down_proj", "gate_proj"]}, False),
    ("mistral_window", "old", "BF16", "mistral",
     {"sliding_window": 5, "hidden_size": 24, "num_attention_heads": 3,
      "num_key_value_heads": 3, "head_dim": 8},
     {"r": 2, "lora_alpha": 8, "target_modules": ALL}, False),
    ("mistral_plain", "new", "F32", "mistral",
     {"sliding_window": None, "head_dim": 10, "tie_word_embeddings": False},
     {"r": 4, "lora_alpha": 8, "target_modules": ["model.layers.1.self_attn.q_proj",
                                                  "model.layers.0.mlp.up_proj"]}, False),
    ("qwen2_tied", "old", "F32", "qwen2", {"tie_word_embeddings": True},
     {"r": 2, "lora_alpha": 8, "target_modules": QV}, True),
    ("qwen2_window", "old", "F16", "qwen2",
     {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1,
      "num_hidden_layers": 3, "hidden_size": 12, "num_attention_heads": 2,
      "num_key_value_heads": 1},
     {"r": 2, "lora_alpha": 8, "target_modules": ALL}, False),
    ("qwen2_layer_types", "new", "BF16", "qwen2",
     {"use_sliding_window": True, "sliding_window": 3, "num_hidden_layers": 3,
      "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
     {"r": 2, "lora_alpha": 8, "target_modules": ["o_proj"]}, False),
    ("qwen3_norms", "new", "F32", "qwen3",
     {"head_dim": 6, "attention_bias": True, "num_key_value_heads": 2},
     {"r": 2, "lora_alpha": 8, "target_modules": ALL}, True),
    ("qwen3_window", "old", "BF16", "qwen3",
     {"head_dim": 8, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1,
      "num_key_value_heads": 1, "tie_word_embeddings": True},
     {"r": 2, "lora_alpha": 8, "target_modules": QV}, False),
    ("smollm3_no_rope", "old", "F32", "smollm3",
     {"num_hidden_layers": 3, "no_rope_layer_interval": 2, "pad_token_id": None,
      "bos_token_id": 1, "eos_token_id": 2},
     {"r": 2, "lora_alpha": 8, "target_modules": ALL}, True),
    ("smollm3_window", "new", "F16", "smollm3",
     {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 0], "use_sliding_window": True,
      "sliding_window": 5, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
      "tie_word_embeddings": False},
     {"r": 2, "lora_alpha": 8, "target_modules": QV}, False),
    ("qwen3_yarn", "new", "F32", "qwen3",
     {"head_dim": 12, "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e4,
                                          "original_max_position_embeddings": 16}},
     {"r": 2, "lora_alpha": 8, "target_modules": QV}, False),
    ("llama_yarn", "old", "F32", "llama",
     {"head_dim": 8, "rope_parameters": {"rope_type": "yarn", "factor": 3.0, "rope_theta": 1e4,
                                         "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False,
                                         "attention_factor": 0.9,
                                         "original_max_position_embeddings": 20}},
     {"r": 2, "lora_alpha": 8, "target_modules": QV}, False),
    ("phi3_plain", "old", "F32", "phi3",
     {"sliding_window": 6, "rms_norm_eps": 1e-5, "pad_token_id": None, "bos_token_id": 1,
      "eos_token_id": 2},
     {"r": 2, "lora_alpha": 8, "target_modules": ALL}, True),
    ("phi3_longrope", "new", "BF16", "phi3",
     {"hidden_size": 32, "num_attention_heads": 4, "pad_token_id": None, "bos_token_id": 1,
      "eos_token_id": 2, "tie_word_embeddings": True, "original_max_position_embeddings": 12,
      "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4,
                          "partial_rotary_factor": 0.75, "original_max_position_embeddings": 12,
                          "short_factor": [1.0, 1.1, 1.5], "long_factor": [1.2, 2.0, 5.5]}},
     {"r": 2, "lora_alpha": 8, "target_modules": ["qkv_proj", "down_proj"]}, False),
    ("gemma_plain", "new", "F32", "gemma",
     {"head_dim": 6, "pad_token_id": None},
     {"r": 2, "lora_alpha": 8, "target_modules": ALL}, True),
    ("gemma3_local", "new", "F32", "gemma3_text",
     {"head_dim": 6, "num_hidden_layers": 3, "sliding_window": 5, "query_pre_attn_scalar": 9,
      "pad_token_id": None, "layer_types": ["sliding_attention", "full_attention",
                                            "sliding_attention"],
      "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4.0,
                                             "rope_theta": 1e5},
                          "sliding_attention": {"rope_type": "default", "rope_theta": 2e3}}},
     {"r": 2, "lora_alpha": 8, "target_modules": ALL}, True),
    ("gemma2_caps", "old", "F32", "gemma2",
     {"head_dim": 6, "num_hidden_layers": 3, "sliding_window": 5, "query_pre_attn_scalar": 9,
      "pad_token_id": None, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
     {"r": 2, "lora_alpha": 8, "target_modules": ALL}, True),
    ("llama_dynamic", "new", "F32", "llama",
     {"max_position_embeddings": 12,
      "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0}},
     {"r": 2, "lora_alpha": 8, "target_modules": QV}, False),
]


def old_config(folder, family):
    """Rewrites config.json as transformers before 5 wrote it."""
    path = os.path.join(folder, "config.json")
    with open(path) as file:
        config = json.load(file)
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else dict(rope, rope_type=kind)
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.40.0"
    config.pop("layer_types", None)
    if family == "llama" and config["num_key_value_heads"] == config["num_attention_heads"]:
        config["num_key_value_heads"] = None
    with open(path, "w") as file:
        json.dump(config, file, indent=2)


def loss_of(model, tokens, labels):
    """Sum of the losses; labels[i] is to be predicted at position i, -100 = none."""
    import torch
    logits = model(torch.tensor([tokens])).logits[0]
    return logits, torch.nn.functional.cross_entropy(logits, torch.tensor(labels),
                                                     ignore_index=-100, reduction="sum")


def gradients(model, batch, names):
    """Logits of the first sequence, summed loss, and gradients of the named parameters."""
    model.zero_grad()
    total, first = 0, None
    for tokens, labels in batch:
        logits, loss = loss_of(model, tokens, labels)
        first = logits.detach() if first is None else first
        total = total + loss
    total.backward()
    return first, total.detach().reshape(1), {n: p.grad.clone() for n, p in names}


def forget_machine(adapter, base):
    """adapter_config.json names its model by a path of this machine; a relative one stays."""
    path = os.path.join(adapter, "adapter_config.json")
    with open(path) as file:
        config = json.load(file)
    config["base_model_name_or_path"] = base
    with open(path, "w") as file:
        json.dump(config, file, indent=2)


def model(_):
    """Needs torch, transformers, peft, safetensors."""
    import shutil
    import tempfile
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForCausalLM
    torch.set_num_threads(1)
    types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    for number, (name, generation, dtype, family, changes, lora, full) in enumerate(MODELS):
        torch.manual_seed(number)
        folder = os.path.join(GOLDEN, "models", name)
        shutil.rmtree(folder, ignore_errors=True)
        made = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **dict(TINY, **changes)))
        for key, value in made.named_parameters():
            value.data.normal_(0, 0.3)
            value.data += 1 if "norm" in key else 0
        made.to(types[dtype]).save_pretrained(folder)
        if generation == "old":
            old_config(folder, family)
        if number % 2:
            os.remove(os.path.join(folder, "generation_config.json"))
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                    attn_implementation="eager")
        lengths, batch = (23, 9, 1), []
        for n in lengths:
            tokens = torch.randint(0, base.config.vocab_size, (n + 1,)).tolist()
            skip = n // 3
            batch.append((tokens[:n], [-100] * skip + tokens[skip + 1:]))
        out = {"tokens": torch.tensor(sum((b[0] for b in batch), []), dtype=torch.int32),
               "labels": torch.tensor(sum((b[1] for b in batch), []), dtype=torch.int32),
               "lengths": torch.tensor(lengths, dtype=torch.int32)}
        weights = list(base.named_parameters())
        out["logits"], out["loss"], grads = gradients(base, batch, weights)
        if full:
            out.update({"full." + n: g for n, g in grads.items()})
        tuned = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **lora))
        for key, value in tuned.named_parameters():
            if "lora_B" in key:
                value.data.normal_(0, 0.3)
        adapter = os.path.join(folder, "adapter")
        tuned.save_pretrained(adapter)
        os.remove(os.path.join(adapter, "README.md"))
        forget_machine(adapter, "tests/golden/models/" + name)
        weights = [(n, p) for n, p in tuned.named_parameters() if "lora_" in n]
        out["lora_logits"], out["lora_loss"], grads = gradients(tuned, batch, weights)
        out.update({"lora." + n.replace(".default", ""): g for n, g in grads.items()})
        save_file({k: v.contiguous() for k, v in out.items()},
                  os.path.join(folder, "expected.safetensors"))


def families(_):
    """Losses of training each of the models with its adapter: eight steps of AdamW, each on all
    three recorded sequences. Reads what `model` wrote."""
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM
    torch.set_num_threads(1)
    rows = []
    for name in sorted(m[0] for m in MODELS):
        folder = os.path.join(GOLDEN, "models", name)
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                    attn_implementation="eager")
        tuned = PeftModel.from_pretrained(base, os.path.join(folder, "adapter"), is_trainable=True)
        given, at, batch = load_file(os.path.join(folder, "expected.safetensors")), 0, []
        for n in given["lengths"].tolist():
            batch.append((given["tokens"][at:at + n].tolist(), given["labels"][at:at + n].tolist()))
            at += n
        labels = sum(label >= 0 for _, some in batch for label in some)
        weights = [p for p in tuned.parameters() if p.requires_grad]
        optimizer, losses = torch.optim.AdamW(weights, lr=2e-3, weight_decay=0.0), []
        for _ in range(8):
            optimizer.zero_grad()
            loss = sum(loss_of(tuned, *row)[1] for row in batch) / labels
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        rows.append('{"name": "%s", "losses": %s}' % (name, json.dumps(losses)))
    with open(os.path.join(GOLDEN, "models", "steps.json"), "w") as file:
        file.write("[\n" + ",\n".join(rows) + "\n]\n")


# ---- template ----
def chat_templates(shared):
    """Chat templates whose licence allows a copy; (name, source, special tokens)."""
    def config(folder):
        with open(os.path.join(shared, "tokenizers", folder, "tokenizer_config.json"),
                  encoding="utf-8") as file:
            return json.load(file)["chat_template"]

    im = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    chatml = ("{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + "
              "message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
              "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
    smollm2 = ("{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' "
               "%}{{ '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by "
               "Hugging Face<|im_end|>\\n' }}{% endif %}{{'<|im_start|>' + message['role'] + "
               "'\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
               "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
    zephyr = ("{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
              "{{ '<|user|>\\n' + message['content'] + eos_token }}\n"
              "{% elif message['role'] == 'system' %}\n"
              "{{ '<|system|>\\n' + message['content'] + eos_token }}\n"
              "{% elif message['role'] == 'assistant' %}\n"
              "{{ '<|assistant|>\\n'  + message['content'] + eos_token }}\n{% endif %}\n"
              "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
              "{% endfor %}")
    mistral = ("{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != "
               "(loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate "
               "user/assistant/user/assistant/...') }}{% endif %}{% if message['role'] == 'user' "
               "%}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == "
               "'assistant' %}{{ message['content'] + eos_token + ' ' }}{% else %}"
               "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
               "{% endfor %}")
    with open(os.path.join(shared, "tokenizers", "smollm3-config", "chat_template.jinja"),
              encoding="utf-8") as file:
        smollm3 = file.read()
    date = 'strftime_now("%d %B %Y")'
    assert date in smollm3
    s = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return [("chatml", chatml, im), ("smollm2", smollm2, im),
            ("smollm3", smollm3.replace(date, '"26 July 2024"'), im),
            ("zephyr", zephyr, s), ("mistral", mistral, s), ("qwen2.5", config("qwen2.5"), im),
            ("qwen3", config("qwen3-config"), im),
            ("phi3", config("phi-3-mini"), dict(s, eos_token="<|endoftext|>"))]


def fnv(text):
    h = 1469598103934665603
    for byte in text.encode():
        h = (h ^ byte) * 1099511628211 % 2**64
    return "%016x" % h


def template(args):
    """apply_chat_template of each template over each conversation. Long texts as size and hash."""
    from transformers.utils import chat_template_utils
    path = os.path.join(GOLDEN, "conversations.json")
    with open(path, encoding="utf-8") as file:
        conversations = json.load(file)
    rows = []
    for name, source, special in chat_templates(args.shared):
        row = {"name": name, "special": special, "source": source, "texts": []}
        for number, conversation in enumerate(conversations):
            more = {k: v for k, v in conversation.items() if k not in ("messages", "tools")}
            messages = [{k: v for k, v in m.items() if v is not None}
                        for m in conversation["messages"]]
            try:
                text = chat_template_utils.render_jinja_template(
                    [messages], tools=conversation.get("tools"), chat_template=source,
                    add_generation_prompt=number % 2 == 0, **special, **more)[0][0]
            except Exception:
                text = None
            if text is not None and len(text) > 400:
                text = {"size": len(text.encode()), "fnv": fnv(text)}
            row["texts"].append(text)
        rows.append(json.dumps(row, ensure_ascii=False))
    with open(os.path.join(GOLDEN, "chat_templates.json"), "w", encoding="utf-8") as file:
        file.write("[\n" + ",\n".join(rows) + "\n]\n")


# ---- tokenizer: ids and decoded text from Hugging Face tokenizers ----

TOKENIZER_TEXTS = [
    "", " ", "  ", "\n", "\r\n", "\t", "a", " a", "a ", "Hello world", " Hello  world ", "Hello\nworld\n\n",
    "I'm, you're, HE'LL, we'd, they've; it's 'quoted'", "don't DON'T Don\u2019t", "1234567890 12 3.14 1,000",
    "x=1+2*3;\n    return  x  \n", "\u00e9 e\u0301 \u00c5 A\u030a", "na\u00efve caf\u00e9 \u00fcber", "\u4f60\u597d\uff0c\u4e16\u754c",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645", "\u0928\u092e\u0938\u094d\u0924\u0947", "\ud55c\uad6d\uc5b4 \u1112\u1161\u11ab",
    "\U0001f44d\U0001f3fd \U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f", "\u00a0nbsp\u00a0\u00a0two\u2003em\u3000ideographic",
    "<s>", "</s>", "text<s>in</s>side", "<|endoftext|>", "a<|endoftext|> b", "<|im_start|>user\nhi<|im_end|>\n",
    "<|begin_of_text|><|eot_id|>", "[INST] Question: What? [/INST]", "<<SYS>>\nBe safe.\n<</SYS>>\n\n",
    "#### 42", "$5.00 - 10% = \u20ac4.50", "\u2028line\u2029paragraph\u0085next", "\x00\x01\x1f\x7f", "\u200b\ufeff\u2060",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "                                ", "\n\n\n\n\n\n\n\n", "ab" * 50, "_under_score__x",
    "\u0130\u0131\u017f \u01c6 \ufb01", "\u0661\u0662\u0663 \u2167 \u00bd \u00b2", "a\u0308\u0323 a\u0323\u0308", "\U00010348\U0001d538\U0002070e",
    "tab\tsep\tcols", "trailing space \n next", " \n \n", "\r\r\n\r", "CamelCaseWord HTTPServer2", "\u2581metaspace\u2581", "<0x41><0xZZ>",
    "3.14159e-10", "l'\u00e9t\u00e9 'S 'LL 'Ve", "!?.,:;()[]{}", "\u2014\u2013\u2026\u201c\u201d", "\ufffd\ufffe", "end",
]


def tokenizer(options):
    """tests/golden/tokenizer.json: for each tokenizer and text [with special, without, decoded]."""
    from tokenizers import Tokenizer
    names = {n: os.path.join(options.shared, "tokenizers", n)
             for n in ("gpt2", "qwen2.5", "llama2", "llama3", "mistral-v1", "phi-2", "phi-3-mini",
                       "falcon", "roberta-base")}
    names["stories260K"] = os.path.join(options.shared, "models/stories260K/hf")
    out = {"texts": TOKENIZER_TEXTS, "cases": {}}
    for name, folder in names.items():
        t = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
        rows = []
        for text in TOKENIZER_TEXTS:
            ids = t.encode(text).ids
            plain = t.encode(text, add_special_tokens=False).ids
            rows.append([ids, plain, t.decode(ids, skip_special_tokens=True)])
        out["cases"][name] = rows
    with open(os.path.join(GOLDEN, "tokenizer.json"), "w", encoding="utf-8") as file:
        json.dump(out, file, separators=(",", ":"))
        file.write("\n")


# ---- ops: the operations of a layer and AdamW, by PyTorch ----
def wave(torch, phase, *shape):
    """float32 numbers that the test makes as well: sin(0.7 i + phase)."""
    count = 1
    for n in shape:
        count *= n
    x = torch.sin(0.7 * torch.arange(count, dtype=torch.float64) + phase)
    return x.float().double().reshape(shape).requires_grad_()


def numbers(x):
    return [float("%.9g" % v) for v in x.detach().flatten().tolist()]


def golden_attention(torch, window):
    H, K, D, T = 4, 2, 6, 7
    q, k, v = wave(torch, 0.1, T, H, D), wave(torch, 0.2, T, K, D), wave(torch, 0.3, T, K, D)
    i = torch.arange(T)
    mask = (i[None, :] <= i[:, None]) & (i[:, None] - i[None, :] < window)
    out = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), attn_mask=mask, enable_gqa=True)
    out = out.transpose(0, 1)
    (out * wave(torch, 0.4, T, H, D).detach()).sum().backward()
    return {"out": numbers(out), "dq": numbers(q.grad), "dk": numbers(k.grad),
            "dv": numbers(v.grad)}


def golden_layers(torch):
    F = torch.nn.functional
    x, w = wave(torch, 0.1, 3, 5), wave(torch, 0.2, 5)
    y = F.rms_norm(x, (5,), w, 1e-5)
    (y * wave(torch, 0.3, 3, 5).detach()).sum().backward()
    g, u = wave(torch, 0.4, 9), wave(torch, 0.5, 9)
    s = F.silu(4 * g) * u
    (s * wave(torch, 0.6, 9).detach()).sum().backward()
    logits = wave(torch, 0.7, 4, 6)
    labels = torch.tensor([2, -1, 0, 5])
    losses = F.cross_entropy(3 * logits, labels, reduction="none", ignore_index=-1)
    losses.sum().backward()
    return {"rmsnorm": {"y": numbers(y), "dx": numbers(x.grad), "dw": numbers(w.grad)},
            "swiglu": {"y": numbers(s), "dgate": numbers(g.grad / 4), "dup": numbers(u.grad)},
            "cross_entropy": {"losses": numbers(losses), "dx": numbers(logits.grad / 3)}}


def golden_adamw(torch, decay):
    w = wave(torch, 0.1, 5).detach().float().requires_grad_()
    o = torch.optim.AdamW([w], lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=decay)
    steps = []
    for step in range(4):
        w.grad = wave(torch, 1.0 + step, 5).detach().float()
        o.step()
        steps.append(numbers(w))
    return steps


def ops(_):
    """Outputs and gradients of attention, norm, swiglu and cross-entropy, and steps of AdamW."""
    import torch
    torch.set_num_threads(1)
    golden = golden_layers(torch)
    golden["attention"] = golden_attention(torch, 100)
    golden["window"] = golden_attention(torch, 3)
    golden["adamw"] = golden_adamw(torch, 0)
    golden["decay"] = golden_adamw(torch, 0.1)
    with open(os.path.join(GOLDEN, "ops.json"), "w") as f:
        json.dump(golden, f, separators=(",", ":"))
        f.write("\n")


COMMANDS = {"families": families, "generate": generate, "jinja": jinja, "judge": judge,
            "model": model, "ops": ops, "sample": sample, "template": template, "tokenizer": tokenizer, "train": train}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(COMMANDS))
    parser.add_argument("--shared", default="../shared")
    COMMANDS[parser.parse_args().name](parser.parse_args())
