#!/usr/bin/env python3
"""Speed and memory of LoRA training and of matrix products beside PyTorch + PEFT, in one run.

    cc -O2 -pthread -o ptst tools/ptst.c -lm
    pip install torch transformers peft safetensors        (tests and ptst need none of them)
    python3 tools/bench_peers.py [--rounds 3] [--work DIR]

A model of SmolLM2-135M's shape with random weights is made once in --work. Both sides take turns,
so that what else the machine does hits both; the table shows medians and ratios. Absolute numbers
differ between machines: compare ratios only.
"""
import argparse
import json
import os
import resource
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
    parser.add_argument("--peer", choices=["train", "gemm"], help=argparse.SUPPRESS)
    o = parser.parse_args()
    model = os.path.join(o.work, "smollm2-135m-shape")
    if o.peer == "train":
        return peer_train(model, o.batch, o.seq, 3, o.threads)
    if o.peer == "gemm":
        return peer_gemm(o.threads)
    if not os.path.exists(os.path.join(model, "model.safetensors")):
        make_model(model)
    me = [sys.executable, __file__, "--work", o.work, "--batch", str(o.batch), "--seq", str(o.seq),
          "--threads", str(o.threads)]
    ours, theirs, gemm, peer = [], [], [], []
    for _ in range(o.rounds):
        ours.append(call(o.ptst, "bench", "train", "--model", model, "--batch", str(o.batch),
                         "--seq", str(o.seq), "--steps", "3", "--threads", str(o.threads)))
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
    print("| model FLOPs utilisation | %.2f | | |" % median(ours, "mfu"))
    for i, (m, n, k) in enumerate(PRODUCTS):
        a = statistics.median(r[i]["gflops"] for r in gemm)
        b = statistics.median(r[i] for r in peer)
        print("| product %d x %d x %d, GFLOP/s (of peak) | %.0f (%.2f) | %.0f | %.2f x |" %
              (m, n, k, a, statistics.median(r[i]["ratio"] for r in gemm), b, a / b))
    return 0


if __name__ == "__main__":
    sys.exit(main())
