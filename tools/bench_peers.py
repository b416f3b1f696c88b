#!/usr/bin/env python3
"""Speed and memory of LoRA training, of matrix products and of tokenizers beside PyTorch + PEFT and
Hugging Face tokenizers, in one run.

    cc -O2 -pthread -o ptst tools/ptst.c -lm
    pip install torch transformers peft safetensors        (tests and ptst need none of them)
    python3 tools/bench_peers.py [--rounds 3] [--work DIR] [--tokenizer FOLDER ...]

With --tokenizer (folders with a tokenizer.json, the first one of at most 49152 tokens) the real
workload is measured as well: rows of GSM8K, 8 a batch, loss on the answers, under gsm:chat:llama and
gsm:chat:vanilla, the peer with dynamic padding; and the encoding of the whole GSM8K training text.

A model of SmolLM2-135M's shape with random weights is made once in --work. Both sides take turns,
so that what else the machine does hits both; the table shows medians and ratios. Absolute numbers
differ between machines: compare ratios only.
"""
import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time

SHAPE = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
         "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
         "max_position_embeddings": 8192, "rope_theta": 100000.0, "tie_word_embeddings": True}
PRODUCTS = [(1024, 576, 576), (1024, 1536, 576), (1024, 576, 1536), (512, 2048, 2048)]


def make_model(folder):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.float32).save_pretrained(folder)


def peer_train(folder, batch, seq, steps, threads):
    """Runs in a process of its own, for its peak memory."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                 attn_implementation="sdpa")
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=32,
                                             target_modules=["q_proj", "v_proj"]))
    model.train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)
    ids = torch.randint(0, SHAPE["vocab_size"], (batch, seq))
    times = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    print(json.dumps({"tokens_per_second": batch * seq / statistics.median(times[1:]),
                      "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def peer_gemm(threads):
    import torch
    torch.set_num_threads(threads)
    out = []
    for m, n, k in PRODUCTS:
        a, b = torch.randn(m, k), torch.randn(n, k)
        times = []
        for _ in range(12):
            start = time.perf_counter()
            torch.nn.functional.linear(a, b)
            times.append(time.perf_counter() - start)
        out.append(2 * m * n * k / statistics.median(times[2:]) / 1e9)
    print(json.dumps(out))


GSM8K = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "examples", "data", "gsm8k",
                     "train.jsonl")
GSM8K_BATCHES = 7


def gsm8k_rows():
    with open(GSM8K) as f:
        return [json.loads(next(f)) for _ in range(8 * GSM8K_BATCHES)]


def peer_gsm8k(folder, text, threads):
    """Seconds of the steps but the first, each row padded to the longest of its batch."""
    import torch
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM
    torch.set_num_threads(threads)
    tokenizer = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                 attn_implementation="sdpa")
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=32,
                                             target_modules=["q_proj", "v_proj"]))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    rows, times = gsm8k_rows(), []
    for step in range(GSM8K_BATCHES):
        batch = []
        for row in rows[8 * step:8 * step + 8]:
            prompt = tokenizer.encode(text.replace("%s", row["question"])).ids
            answer = tokenizer.encode(row["answer"], add_special_tokens=False).ids + [2]
            batch.append((prompt + answer, [-100] * len(prompt) + answer))
        longest = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([i + [2] * (longest - len(i)) for i, _ in batch])
        labels = torch.tensor([j + [-100] * (longest - len(j)) for _, j in batch])
        mask = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i, _ in batch])
        start = time.perf_counter()
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    print(json.dumps({"seconds": statistics.mean(times[1:]), "peak_rss_mb":
                      resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def our_gsm8k(o, folder, template):
    data = os.path.join(o.work, "gsm8k.jsonl")
    out = os.path.join(o.work, "gsm8k-adapter")
    with open(data, "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in gsm8k_rows())
    shutil.rmtree(out, ignore_errors=True)
    command = [o.ptst, "finetune", "--quiet", "--model", folder, "--train", data, "--template",
               template, "--batch", "8", "--no-shuffle", "--mask", "separate", "--dropout", "0",
               "--max-steps", str(GSM8K_BATCHES), "--threads", str(o.threads), "--out", out]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    subprocess.run(command, check=True)
    with open(os.path.join(out, "log.jsonl")) as f:
        log = [json.loads(line) for line in f][1:]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {"seconds": statistics.mean(r["tokens"] / r["tokens_per_second"] for r in log),
            "peak_rss_mb": peak / 1024 if peak > before else None}


def gsm8k_table(o, model, me):
    folder = os.path.join(o.work, "gsm8k-model")
    os.makedirs(folder, exist_ok=True)
    for name in os.listdir(model):
        if not os.path.exists(os.path.join(folder, name)):
            os.symlink(os.path.abspath(os.path.join(model, name)), os.path.join(folder, name))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if os.path.exists(os.path.join(o.tokenizer[0], name)):
            shutil.copy(os.path.join(o.tokenizer[0], name), folder)
    for template in ("CL", "CV"):
        text = subprocess.run([o.ptst, "render", "--template", template, "%s"], check=True,
                              stdout=subprocess.PIPE, text=True).stdout
        ours, theirs = [], []
        for _ in range(o.rounds):
            ours.append(our_gsm8k(o, folder, template)["seconds"])
            theirs.append(call(*me, "--peer", "gsm8k", "--text", text)["seconds"])
        a, b = statistics.median(ours), statistics.median(theirs)
        print("| GSM8K, 8 rows under %s, seconds a step | %.2f | %.2f | %.2f x |" %
              (template, a, b, b / a))


def tokenizer_table(o):
    from tokenizers import Tokenizer
    text = os.path.join(o.work, "gsm8k.txt")
    with open(GSM8K) as f, open(text, "w") as to:
        for row in map(json.loads, f):
            to.write(row["question"] + "\n" + row["answer"] + "\n")
    with open(text) as f:
        lines = f.read().split("\n")
    size = os.path.getsize(text)
    for folder in o.tokenizer:
        path = os.path.join(folder, "tokenizer.json")
        peer = Tokenizer.from_file(path)
        ours, theirs = [], []
        for _ in range(o.rounds):
            ours.append(call(o.ptst, "bench", "tokenize", "--tokenizer", path, "--file", text,
                             "--runs", "1")["mb_per_second"])
            start = time.perf_counter()
            for line in lines:
                peer.encode(line)
            theirs.append(size / (time.perf_counter() - start) / 1e6)
        a, b = statistics.median(ours), statistics.median(theirs)
        print("| tokenizer %s, MB/s, one thread | %.1f | %.1f | %.1f x |" %
              (os.path.basename(os.path.normpath(folder)), a, b, a / b))


def call(*command):
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ptst", default="./ptst")
    parser.add_argument("--work", default="bench-peers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tokenizer", nargs="*", default=[], help="folders with tokenizer.json")
    parser.add_argument("--peer", choices=["train", "gemm", "gsm8k"], help=argparse.SUPPRESS)
    parser.add_argument("--text", help=argparse.SUPPRESS)
    o = parser.parse_args()
    model = os.path.join(o.work, "smollm2-135m-shape")
    if o.peer == "train":
        return peer_train(model, o.batch, o.seq, 3, o.threads)
    if o.peer == "gemm":
        return peer_gemm(o.threads)
    if o.peer == "gsm8k":
        return peer_gsm8k(os.path.join(o.work, "gsm8k-model"), o.text, o.threads)
    if not os.path.exists(os.path.join(model, "model.safetensors")):
        make_model(model)
    me = [sys.executable, __file__, "--work", o.work, "--batch", str(o.batch), "--seq", str(o.seq),
          "--threads", str(o.threads)]
    ours, theirs, gemm, peer, less = [], [], [], [], []
    for _ in range(o.rounds):
        ours.append(call(o.ptst, "bench", "train", "--model", model, "--batch", str(o.batch),
                         "--seq", str(o.seq), "--steps", "3", "--threads", str(o.threads)))
        less.append(call(o.ptst, "bench", "train", "--model", model, "--batch", str(o.batch),
                         "--seq", str(o.seq), "--steps", "3", "--threads", str(o.threads),
                         "--gradient-checkpointing"))
        theirs.append(call(*me, "--peer", "train"))
        gemm.append([call(o.ptst, "bench", "gemm", "--m", str(m), "--n", str(n), "--k", str(k),
                          "--threads", str(o.threads)) for m, n, k in PRODUCTS])
        peer.append(call(*me, "--peer", "gemm"))

    def median(rows, key):
        return statistics.median(r[key] for r in rows)
    print("LoRA r 8 on q_proj, v_proj; %d x %d tokens, all labelled; float32; %d threads; median of "
          "%d rounds" % (o.batch, o.seq, o.threads, o.rounds))
    print("| | ptst | PyTorch + PEFT | ratio |\n|---|---|---|---|")
    a, b = median(ours, "tokens_per_second"), median(theirs, "tokens_per_second")
    print("| training, tokens/s | %.0f | %.0f | %.2f x |" % (a, b, a / b))
    a, b = median(ours, "peak_rss_mb"), median(theirs, "peak_rss_mb")
    print("| peak memory, MB | %.0f | %.0f | 1/%.1f |" % (a, b, b / a))
    a, b = median(less, "tokens_per_second"), median(theirs, "tokens_per_second")
    print("| with gradient checkpointing, tokens/s | %.0f | %.0f (without) | %.2f x |" % (a, b, a / b))
    a, b = median(less, "peak_rss_mb"), median(theirs, "peak_rss_mb")
    print("| its peak memory, MB | %.0f | %.0f (without) | 1/%.1f |" % (a, b, b / a))
    print("| model FLOPs utilisation | %.2f | | |" % median(ours, "mfu"))
    for i, (m, n, k) in enumerate(PRODUCTS):
        a = statistics.median(r[i]["gflops"] for r in gemm)
        b = statistics.median(r[i] for r in peer)
        print("| product %d x %d x %d, GFLOP/s (of peak) | %.0f (%.2f) | %.0f | %.2f x |" %
              (m, n, k, a, statistics.median(r[i]["ratio"] for r in gemm), b, a / b))
    if o.tokenizer:
        gsm8k_table(o, model, me)
        tokenizer_table(o)
    return 0


if __name__ == "__main__":
    sys.exit(main())
