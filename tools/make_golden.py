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


# ---- train: 20 steps of PyTorch + PEFT ----
TRAIN_RUNS = {  # name: (batch, accumulate, epochs, lr, schedule, warm-up, weight decay, clip)
    "plain": (4, 1, 2, 2e-3, "constant", 0, 0.0, 0.0),
    "linear": (2, 2, 2, 5e-3, "linear", 4, 0.1, 0.0),
    "cosine": (4, 2, 4, 5e-3, "cosine", 3, 0.1, 0.5),
    "step": (3, 1, 2, 2e-3, "step:0.5", 2, 0.0, 1.0),
    "full": (4, 1, 2, 1e-3, "constant", 2, 0.0, 1.0),
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


COMMANDS = {"generate": generate, "ops": ops, "sample": sample, "train": train,
            "judge": judge}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(COMMANDS))
    parser.add_argument("--shared", default="../shared")
    COMMANDS[parser.parse_args().name](parser.parse_args())
