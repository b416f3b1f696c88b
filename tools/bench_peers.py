#!/usr/bin/env python3
"""Speed and memory beside PyTorch + PEFT, transformers, NumPy and Hugging Face tokenizers.

    cc -O2 -pthread -o ptst tools/ptst.c -lm
    python3 tools/bench_peers.py --install --tokenizer LLAMA2 GPT2 LLAMA3 QWEN --readme README.md

Parts, all or those that --only names:

    lora        LoRA r 8 on q_proj and v_proj: tokens/s, peak memory, model FLOPs utilisation
    all-linear  LoRA r 16 on all linear layers
    full        full fine-tuning of examples/tiny-chat
    long        one row of 4096 tokens; utilisation and memory over the length
    gsm8k       rows of GSM8K, 8 a batch, loss on the answers, the peer with dynamic padding
    gemm        matrix products of 135M, 1.1B and 7B models against MKL (torch) and OpenBLAS (numpy)
    generate    answers to 64 prompts of AdvBench, against transformers with left padding
    single      one prompt of 512 tokens, 64 new ones, for each type of weights
    tokenizers  GSM8K's training text, first pass, and loading of tokenizer.json
    start       from the start of the process to the end of an answer of one token

gsm8k, generate, tokenizers and start need --tokenizer: folders with a tokenizer.json, the first one
Llama 2's or another one of at most 49152 tokens.

Models of SmolLM2-135M's shape with random weights are made once in --work. Both sides take turns
inside each round, so that what else the machine does hits both; rows show medians and their ratio
(ptst is better with N above 1 in "N x" of speeds, "1/N" of times and memory). Each measurement
is a process of its own, for its peak memory. Absolute numbers differ between machines: compare
ratios only.

--install puts the peers into a virtual environment in --work and goes on in it. --readme rewrites
the table between the two marks in a file. Rows are kept in WORK/rows.json, so that parts can be
run one by one: another build of ptst, machine or setting begins a new table.
"""
import argparse
import hashlib
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import textwrap
import time

HERE = os.path.dirname(os.path.abspath(__file__))
EXAMPLES = os.path.join(os.path.dirname(HERE), "examples")
GSM8K = os.path.join(EXAMPLES, "data", "gsm8k", "train.jsonl")
ADVBENCH = os.path.join(EXAMPLES, "data", "advbench", "advbench-harmful-behaviors.csv")
TINY_CHAT = os.path.join(EXAMPLES, "tiny-chat")

PACKAGES = ["torch", "transformers", "peft", "tokenizers", "safetensors", "numpy"]
BEGIN, END = "<!-- bench_peers.py: begin -->", "<!-- bench_peers.py: end -->"
TABLE_HEAD = "\n\n| | ptst | peer | ratio |\n|---|---|---|---|"

SHAPE = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
         "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
         "max_position_embeddings": 8192, "rope_theta": 100000.0, "tie_word_embeddings": True}
SHAPE_15M = {"vocab_size": 32000, "hidden_size": 288, "intermediate_size": 768,
             "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 6,
             "max_position_embeddings": 1024, "tie_word_embeddings": True}
END_TOKEN = 2
ATTENTION_TARGETS = ["q_proj", "v_proj"]
LINEAR_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# Outputs x inputs of the weights; products are named rows x outputs x inputs.
SMALL = [(576, 576), (1536, 576), (576, 1536)]
LARGE = [(2048, 2048), (5632, 2048), (2048, 5632), (4096, 4096), (11008, 4096), (4096, 11008)]
PRODUCTS = ([(1024, n, k) for n, k in SMALL] + [(512, n, k) for n, k in SMALL + LARGE])
PRODUCT_RUNS = 10

GSM8K_ROWS, GSM8K_BATCHES = 8, 7
FULL_BATCH, FULL_SEQ, FULL_STEPS = 32, 64, 20
SMALL_BATCH, SMALL_SEQ, SMALL_STEPS = 8, 256, 3
PEER_ANSWERS = 16  # prompts at once of transformers' generate
START_RUNS = 10


# ---- peers: each runs in a process of its own and returns a dict; keywords come as JSON ----

def peak_mb():
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def load_peer(folder, threads):
    """The model in transformers, float32, with the library's fastest attention on CPUs."""
    import torch
    from transformers import AutoModelForCausalLM
    torch.set_num_threads(threads)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                attn_implementation="sdpa")


def with_lora(model, rank, targets):
    """The model with an adapter of PEFT, ready to train."""
    from peft import LoraConfig, get_peft_model
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=32,
                                             target_modules=targets))
    return model.train()


def adamw(model):
    """AdamW over what learns."""
    import torch
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def seconds_of_step(model, optimizer, **batch):
    """Forward, backward and update."""
    start = time.perf_counter()
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start


def peer_make(folder, dtype, silent, shape):
    """A random model. The rows of `silent` ids are zero: their logits are 0, never the largest of
    tens of thousands of random ones, so that answers neither end early nor have ids without
    text."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape))
    with torch.no_grad():
        model.get_input_embeddings().weight[silent] = 0
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return {}


def peer_train(folder, batch, seq, steps, rank, targets, threads):
    """Median step after a warm-up; rank 0 trains all weights."""
    import torch
    model = load_peer(folder, threads)
    model = with_lora(model, rank, targets) if rank > 0 else model.train()
    optimizer = adamw(model)
    ids = torch.randint(0, model.config.vocab_size, (batch, seq))
    times = [seconds_of_step(model, optimizer, input_ids=ids, labels=ids)
             for _ in range(steps + 1)]
    return {"tokens_per_second": batch * seq / statistics.median(times[1:]),
            "peak_rss_mb": peak_mb()}


def gsm8k_batch(tokenizer, text, rows):
    """Ids, labels and mask of rows, each padded to the longest of them."""
    import torch
    batch = []
    for row in rows:
        prompt = tokenizer.encode(text.replace("%s", row["question"])).ids
        answer = tokenizer.encode(row["answer"], add_special_tokens=False).ids + [END_TOKEN]
        batch.append((prompt + answer, [-100] * len(prompt) + answer))
    longest = max(len(ids) for ids, _ in batch)
    return {"input_ids": torch.tensor([i + [END_TOKEN] * (longest - len(i)) for i, _ in batch]),
            "labels": torch.tensor([j + [-100] * (longest - len(j)) for _, j in batch]),
            "attention_mask": torch.tensor([[1] * len(i) + [0] * (longest - len(i))
                                            for i, _ in batch])}


def peer_gsm8k(folder, text, threads):
    """Mean seconds of the steps but the first."""
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
    model = with_lora(load_peer(folder, threads), 8, ATTENTION_TARGETS)
    optimizer, rows, times = adamw(model), gsm8k_rows(), []
    for step in range(GSM8K_BATCHES):
        batch = gsm8k_batch(tokenizer, text, rows[GSM8K_ROWS * step:GSM8K_ROWS * (step + 1)])
        times.append(seconds_of_step(model, optimizer, **batch))
    return {"seconds": statistics.mean(times[1:])}


def gflops(product, run):
    """Median speed of a product after two warm-ups."""
    times = []
    for _ in range(PRODUCT_RUNS + 2):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    m, n, k = product
    return 2e-9 * m * n * k / statistics.median(times[2:])


def peer_torch_gemm(threads):
    import torch
    torch.set_num_threads(threads)
    speeds = {}
    for m, n, k in PRODUCTS:
        a, b = torch.randn(m, k), torch.randn(n, k)
        speeds[product_name(m, n, k)] = gflops((m, n, k), lambda: torch.nn.functional.linear(a, b))
    return speeds


def peer_numpy_gemm():
    """Its threads are set by the environment."""
    import numpy
    random = numpy.random.default_rng(0)
    speeds = {}
    for m, n, k in PRODUCTS:
        a = random.random((m, k), dtype=numpy.float32)
        b = random.random((n, k), dtype=numpy.float32)
        speeds[product_name(m, n, k)] = gflops((m, n, k), lambda: a @ b.T)
    return speeds


def greedy(model, ids, mask, count):
    """Exactly `count` new tokens a row."""
    import torch
    model.generation_config.eos_token_id = None
    with torch.inference_mode():
        out = model.generate(input_ids=ids, attention_mask=mask, do_sample=False,
                             min_new_tokens=count, max_new_tokens=count, pad_token_id=END_TOKEN)
    assert out.shape[1] == ids.shape[1] + count
    return out


def peer_generate(folder, texts, count, threads):
    """Seconds of all answers, padded on the left; neither loading nor tokenizing is counted."""
    import torch
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
    model = load_peer(folder, threads).eval()
    prompts = [tokenizer.encode(text).ids for text in texts]
    start = time.perf_counter()
    for at in range(0, len(prompts), PEER_ANSWERS):
        batch = prompts[at:at + PEER_ANSWERS]
        longest = max(map(len, batch))
        ids = torch.tensor([[END_TOKEN] * (longest - len(i)) + i for i in batch])
        mask = torch.tensor([[0] * (longest - len(i)) + [1] * len(i) for i in batch])
        greedy(model, ids, mask, count)
    return {"seconds": time.perf_counter() - start}


def peer_single(folder, prompt, count, threads):
    """Reading the prompt is a call with one new token; writing is what a call with more adds."""
    import torch
    model = load_peer(folder, threads).eval()
    ids = torch.randint(3, model.config.vocab_size, (1, prompt))
    seconds = []
    for new in (1, 1, count):  # the first is the warm-up
        start = time.perf_counter()
        greedy(model, ids, torch.ones_like(ids), new)
        seconds.append(time.perf_counter() - start)
    return {"prefill_tokens_per_second": prompt / seconds[1],
            "decode_tokens_per_second": (count - 1) / (seconds[2] - seconds[1])}


def peer_tokenizer(path, text):
    """Loading, and the first pass over the lines by the faster one of two calls, on one thread."""
    from tokenizers import Tokenizer
    with open(text, encoding="utf-8") as f:
        lines = f.read().split("\n")
    loads, passes = [], []
    for encode in (lambda t: [t.encode(line) for line in lines],
                   lambda t: t.encode_batch_fast(lines)):
        start = time.perf_counter()
        tokenizer = Tokenizer.from_file(path)
        loads.append(time.perf_counter() - start)
        start = time.perf_counter()
        encode(tokenizer)
        passes.append(time.perf_counter() - start)
    return {"mb_per_second": os.path.getsize(text) / min(passes) / 1e6, "load_seconds": min(loads)}


def peer_start(folder, text, threads):
    """One new token; the caller takes the time."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM
    torch.set_num_threads(threads)
    tokenizer = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    ids = torch.tensor([tokenizer.encode(text).ids])
    out = greedy(model, ids, torch.ones_like(ids), 1)
    return {"text": tokenizer.decode(out[0, ids.shape[1]:].tolist())}


PEERS = {"make": peer_make, "train": peer_train, "gsm8k": peer_gsm8k, "torch-gemm": peer_torch_gemm,
         "numpy-gemm": peer_numpy_gemm, "generate": peer_generate, "single": peer_single,
         "tokenizer": peer_tokenizer, "start": peer_start}


# ---- running both sides ----

def call(command, env=None):
    """Runs a command; the JSON object of its last line."""
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=env)
    return json.loads(done.stdout.strip().splitlines()[-1])


def peer_command(name, **keywords):
    return [sys.executable, os.path.abspath(__file__), "--peer", name, json.dumps(keywords)]


def peer(name, env=None, **keywords):
    """One of PEERS. This process imports none of them: on Linux a child begins with the peak memory
    of its parent."""
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
             "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false",
             "PYTHONWARNINGS": "ignore"}
    return call(peer_command(name, **keywords), {**(os.environ if env is None else env), **quiet})


def bench(o, what, *options):
    """`ptst bench`."""
    return call([o.ptst, "bench", what, "--threads", str(o.threads), *map(str, options)])


def seconds_of(command, **options):
    """Wall time of a whole command."""
    start = time.perf_counter()
    subprocess.run(command, check=True, **options)
    return time.perf_counter() - start


def turns(o, **sides):
    """Calls each side once in every round; of each side a dict of the medians."""
    results = {name: [] for name in sides}
    for _ in range(o.rounds):
        for name, run in sides.items():
            results[name].append(run())
    return {name: {key: statistics.median(r[key] for r in rows) for key, value in rows[0].items()
                   if isinstance(value, (int, float))} for name, rows in results.items()}


def product_name(m, n, k):
    return "%d x %d x %d" % (m, n, k)


def number(value):
    """Three digits, or all before the point."""
    return "%.0f" % value if value >= 100 else "%.3g" % value


def row(what, ours, theirs=None, ratio=None):
    """A line of the table; cells are texts or numbers."""
    cells = ["" if c is None else c if isinstance(c, str) else number(c) for c in (ours, theirs)]
    times = "" if ratio is None else ratio if isinstance(ratio, str) else "%.2f x" % ratio
    return "| %s | %s | %s | %s |" % (what, *cells, times)


def more(what, ours, theirs, note=""):
    """A row of which more is better."""
    return row(what, ours, number(theirs) + note, ours / theirs)


def less(what, ours, theirs, note=""):
    """A row of which less is better."""
    return row(what, ours, number(theirs) + note, "1/%.1f" % (theirs / ours))


# ---- models, data ----

def model_folder(o, name="smollm2-135m-shape", dtype="float32", silent=(), shape=None):
    """A model that is made once; see peer_make."""
    folder = os.path.join(o.work, name)
    if not os.path.exists(os.path.join(folder, "model.safetensors")):
        peer("make", folder=folder, dtype=dtype, silent=list(silent), shape=shape or SHAPE)
    return folder


def add_tokenizer(o, folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = os.path.join(o.tokenizer[0], name)
        if os.path.exists(path):
            shutil.copyfile(path, os.path.join(folder, name))
    return folder


def answering_model(o, dtype):
    """A model whose greedy answers never end and have a text."""
    with open(os.path.join(o.tokenizer[0], "tokenizer.json"), encoding="utf-8") as f:
        tokens = json.load(f)
    used = set(tokens["model"]["vocab"].values()) | {t["id"] for t in tokens["added_tokens"]}
    special = {t["id"] for t in tokens["added_tokens"] if t["special"]}
    silent = [i for i in range(SHAPE["vocab_size"]) if i not in used or i in special]
    return add_tokenizer(o, model_folder(o, "answers-" + dtype, dtype, silent))


def gsm8k_rows():
    with open(GSM8K, encoding="utf-8") as f:
        return [json.loads(next(f)) for _ in range(GSM8K_ROWS * GSM8K_BATCHES)]


def write(path, text):
    with open(path, "w", encoding="utf-8") as f:
        f.write(text)
    return path


def rendered(o, template, question="%s"):
    return subprocess.run([o.ptst, "render", "--template", template, question], check=True,
                          stdout=subprocess.PIPE, text=True).stdout


# ---- parts: each yields rows ----

def train_turns(o, model, batch, seq, steps, rank, targets, **others):
    """ptst and the peer train with the same shape; others are more sides."""
    lora = ("--rank", rank, "--targets", ",".join(targets)) if rank > 0 else ("--full",)
    options = ("--model", model, "--batch", batch, "--seq", seq, "--steps", steps, *lora)
    extra = {name: lambda flags=flags: bench(o, "train", *options, *flags)
             for name, flags in others.items()}
    sides = turns(o, ours=lambda: bench(o, "train", *options), **extra,
                  theirs=lambda: peer("train", folder=model, batch=batch, seq=seq, steps=steps,
                                      rank=rank, targets=targets, threads=o.threads))
    return [sides[name] for name in ("ours", "theirs", *others)]


def part_lora(o):
    a, b, c = train_turns(o, model_folder(o), o.batch, o.seq, 3, 8, ATTENTION_TARGETS,
                          checkpointing=("--gradient-checkpointing",))
    what = "LoRA r 8 on q_proj, v_proj, %d x %d tokens" % (o.batch, o.seq)
    yield more(what + ", tokens/s", a["tokens_per_second"], b["tokens_per_second"])
    yield less("its peak memory, MB", a["peak_rss_mb"], b["peak_rss_mb"])
    yield row("its model FLOPs utilisation", "%.2f" % a["mfu"])
    yield more("with `--gradient-checkpointing`, tokens/s", c["tokens_per_second"],
               b["tokens_per_second"], " (without)")
    yield less("its peak memory, MB", c["peak_rss_mb"], b["peak_rss_mb"], " (without)")


def part_all_linear(o):
    a, b = train_turns(o, model_folder(o), o.batch, o.seq, 3, 16, LINEAR_TARGETS)
    what = "LoRA r 16 on all linear layers, %d x %d tokens" % (o.batch, o.seq)
    yield more(what + ", tokens/s", a["tokens_per_second"], b["tokens_per_second"])
    yield less("its peak memory, MB", a["peak_rss_mb"], b["peak_rss_mb"])


def part_full(o):
    a, b = train_turns(o, TINY_CHAT, FULL_BATCH, FULL_SEQ, FULL_STEPS, 0, [])
    what = "full fine-tuning of the tiny chat model, %d x %d tokens" % (FULL_BATCH, FULL_SEQ)
    yield more(what + ", tokens/s", a["tokens_per_second"], b["tokens_per_second"])
    model = model_folder(o, "15m-shape", shape=SHAPE_15M)
    a, b = train_turns(o, model, SMALL_BATCH, SMALL_SEQ, SMALL_STEPS, 0, [])
    what = "full fine-tuning of 15 million weights, %d x %d tokens" % (SMALL_BATCH, SMALL_SEQ)
    yield more(what + ", tokens/s", a["tokens_per_second"], b["tokens_per_second"])
    yield less("its peak memory, MB", a["peak_rss_mb"], b["peak_rss_mb"])


def part_long(o):
    """Memory over the length: what a token costs more than at the length before."""
    model = model_folder(o)
    lengths = [o.long // 8, o.long // 4, o.long // 2]
    a, b = train_turns(o, model, 1, o.long, 1, 8, ATTENTION_TARGETS)
    by_length = [turns(o, ours=lambda: bench(o, "train", "--model", model, "--batch", 1, "--seq",
                                             seq, "--steps", 3))["ours"] for seq in lengths] + [a]
    yield more("LoRA r 8, 1 x %d tokens, tokens/s" % o.long, a["tokens_per_second"],
               b["tokens_per_second"])
    yield less("its peak memory, MB", a["peak_rss_mb"], b["peak_rss_mb"])
    before = None
    for seq, r in zip(lengths + [o.long], by_length):
        text = "%.2f, %.0f" % (r["mfu"], r["peak_rss_mb"])
        if before is not None:
            grown = r["peak_rss_mb"] - before[1]["peak_rss_mb"]
            text += " (%.0f KB a token more)" % (1024 * grown / (seq - before[0]))
        yield row("1 x %d tokens: model FLOPs utilisation, peak memory in MB" % seq, text)
        before = (seq, r)


def our_gsm8k(o, folder, template):
    """Mean seconds of the steps but the first, from the log that `finetune` writes."""
    data = write(os.path.join(o.work, "gsm8k.jsonl"),
                 "".join(json.dumps(r) + "\n" for r in gsm8k_rows()))
    out = os.path.join(o.work, "gsm8k-adapter")
    shutil.rmtree(out, ignore_errors=True)
    subprocess.run([o.ptst, "finetune", "--quiet", "--model", folder, "--train", data, "--template",
                    template, "--batch", str(GSM8K_ROWS), "--no-shuffle", "--mask", "separate",
                    "--dropout", "0", "--max-steps", str(GSM8K_BATCHES), "--threads",
                    str(o.threads), "--out", out], check=True)
    with open(os.path.join(out, "log.jsonl"), encoding="utf-8") as f:
        log = [json.loads(line) for line in f][1:]
    return {"seconds": statistics.mean(r["tokens"] / r["tokens_per_second"] for r in log)}


def part_gsm8k(o):
    folder = os.path.join(o.work, "gsm8k-model")
    os.makedirs(folder, exist_ok=True)
    model = model_folder(o)
    for name in os.listdir(model):
        if not os.path.lexists(os.path.join(folder, name)):
            os.symlink(os.path.abspath(os.path.join(model, name)), os.path.join(folder, name))
    add_tokenizer(o, folder)
    for template in ("gsm:chat:llama", "gsm:chat:vanilla"):
        text = rendered(o, template)
        sides = turns(o, ours=lambda: our_gsm8k(o, folder, template),
                      theirs=lambda: peer("gsm8k", folder=folder, text=text, threads=o.threads))
        yield less("GSM8K, %d rows a step, %s, seconds" % (GSM8K_ROWS, template),
                   sides["ours"]["seconds"], sides["theirs"]["seconds"])


def our_gemm(o):
    out = {}
    for m, n, k in PRODUCTS:
        r = bench(o, "gemm", "--m", m, "--n", n, "--k", k, "--runs", PRODUCT_RUNS)
        out[product_name(m, n, k)] = r["gflops"]
        out[product_name(m, n, k) + " ratio"] = r["ratio"]
    return out


def openblas_environment(threads):
    """OpenBLAS as it chooses its kernels itself."""
    env = {name: value for name, value in os.environ.items()
           if name not in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")}
    return {**env, "OPENBLAS_NUM_THREADS": str(threads)}


def part_gemm(o):
    sides = turns(o, ours=lambda: our_gemm(o),
                  torch=lambda: peer("torch-gemm", threads=o.threads),
                  numpy=lambda: peer("numpy-gemm", env=openblas_environment(o.threads)))
    for name in (product_name(*p) for p in PRODUCTS):
        ours, torch, numpy = (sides[side][name] for side in ("ours", "torch", "numpy"))
        yield row("product %s, GFLOP/s (of the peak)" % name,
                  "%.0f (%.2f)" % (ours, sides["ours"][name + " ratio"]),
                  "MKL %.0f, OpenBLAS %.0f" % (torch, numpy), ours / max(torch, numpy))


def part_generate(o):
    """The whole command of ours, loading included, against the peer's calls of generate alone."""
    model = answering_model(o, "float32")
    with open(ADVBENCH, encoding="utf-8") as f:
        prompts = [next(f).strip() for _ in range(o.prompts)]
    data = write(os.path.join(o.work, "prompts.txt"), "\n".join(prompts) + "\n")
    text = rendered(o, "gsm:chat:llama")
    out = os.path.join(o.work, "answers.jsonl")
    command = [o.ptst, "generate", "--quiet", "--model", model, "--template", "gsm:chat:llama",
               "--prompts", data, "--max-new-tokens", str(o.new), "--temperature", "0", "--threads",
               str(o.threads), "--out", out]

    def ours():
        for path in (out, out + ".part"):
            if os.path.exists(path):
                os.remove(path)
        return {"seconds": seconds_of(command)}
    sides = turns(o, ours=ours,
                  theirs=lambda: peer("generate", folder=model, count=o.new, threads=o.threads,
                                      texts=[text.replace("%s", p) for p in prompts]))
    a, b = sides["ours"]["seconds"], sides["theirs"]["seconds"]
    what = "answers of %d tokens to %d prompts, gsm:chat:llama" % (o.new, o.prompts)
    yield less(what + ", seconds", a, b)
    yield more("the same, new tokens/s", o.new * o.prompts / a, o.new * o.prompts / b)


def part_single(o):
    model = model_folder(o)
    types = {"F32": "f32", "BF16": "bf16", "F16": "f16", "int8": "int8", "int4": "int4"}
    ours = {name: lambda dtype=dtype: bench(o, "generate", "--model", model, "--dtype", dtype,
                                            "--prompt", o.prompt, "--new", o.new)
            for name, dtype in types.items()}
    sides = turns(o, **ours, theirs=lambda: peer("single", folder=model, prompt=o.prompt,
                                                 count=o.new, threads=o.threads))
    keys = ("prefill_tokens_per_second", "decode_tokens_per_second")
    b = [sides["theirs"][key] for key in keys]
    for name in types:
        a = [sides[name][key] for key in keys]
        yield row("one sequence, %s, prefill of %d / decode of %d, tokens/s" %
                  (name, o.prompt, o.new), " / ".join(map(number, a)),
                  " / ".join(map(number, b)) + " (F32)",
                  " / ".join("%.1f" % (x / y) for x, y in zip(a, b)) + " x")


def part_tokenizers(o):
    with open(GSM8K, encoding="utf-8") as f:
        text = write(os.path.join(o.work, "gsm8k.txt"),
                     "".join(r["question"] + "\n" + r["answer"] + "\n"
                             for r in map(json.loads, f)))
    for folder in o.tokenizer:
        path = os.path.join(folder, "tokenizer.json")
        name = os.path.basename(os.path.normpath(folder))
        sides = turns(o, ours=lambda: bench(o, "tokenize", "--tokenizer", path, "--file", text,
                                            "--runs", 1),
                      theirs=lambda: peer("tokenizer", path=path, text=text))
        a, b = sides["ours"], sides["theirs"]
        yield more("tokenizing with %s, MB/s" % name, a["mb_per_second"], b["mb_per_second"])
        yield less("loading its tokenizer.json, ms", 1e3 * a["load_seconds"],
                   1e3 * b["load_seconds"])


def read_again(folder):
    """Drops files from the page cache and reads them: those just written by a peer were measured
    to map ten times slower (ext4, Linux 6.18), which is not what a user's model does."""
    if not hasattr(os, "posix_fadvise"):
        return
    for name in os.listdir(folder):
        with open(os.path.join(folder, name), "rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while f.read(1 << 24):
                pass


def part_start(o):
    """Each side after one run that warms the page cache; the peer, which takes seconds, once."""
    model = answering_model(o, "bfloat16")
    read_again(model)
    question = "What is 2 + 2?"
    data = write(os.path.join(o.work, "question.txt"), question + "\n")
    command = [o.ptst, "generate", "--quiet", "--model", model, "--template", "gsm:chat:vanilla",
               "--prompts", data, "--max-new-tokens", "1", "--threads", str(o.threads)]
    theirs = peer_command("start", folder=model, threads=o.threads,
                          text=rendered(o, "gsm:chat:vanilla", question))

    def milliseconds(command, runs):
        times = [seconds_of(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                 for _ in range(runs + 1)]
        return {"ms": 1e3 * statistics.median(times[1:])}
    sides = turns(o, ours=lambda: milliseconds(command, START_RUNS),
                  theirs=lambda: milliseconds(theirs, 1))
    yield less("process start to the end of an answer of one token, BF16, ms", sides["ours"]["ms"],
               sides["theirs"]["ms"])


PARTS = {"lora": part_lora, "all-linear": part_all_linear, "full": part_full, "long": part_long,
         "gsm8k": part_gsm8k, "gemm": part_gemm, "generate": part_generate, "single": part_single,
         "tokenizers": part_tokenizers, "start": part_start}
NEED_TOKENIZER = ("gsm8k", "generate", "tokenizers", "start")


# ---- the table ----

def machine(o):
    """Model, cores and instruction set, from /proc/cpuinfo where there is one."""
    info = {}
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            for line in f:
                key, _, value = line.partition(":")
                info.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    flags = (info.get("flags") or info.get("Features") or "").split()
    names = {"avx512f": "AVX-512", "avx512_bf16": "AVX512-BF16", "avx512_vnni": "AVX512-VNNI",
             "amx_tile": "AMX", "asimd": "NEON"}
    if "avx512f" not in flags:
        names["avx2"] = "AVX2"
    has = [name for flag, name in names.items() if flag in flags]
    return "%s, %d of %d cores, %s" % (info.get("model name", platform.machine()), o.threads,
                                       os.cpu_count(), ", ".join(has) or "scalar")


def settings(o):
    """What rows of one table have in common."""
    with open(o.ptst, "rb") as f:
        build = hashlib.sha256(f.read()).hexdigest()
    return {"machine": machine(o), "build": build, "rounds": o.rounds, "batch": o.batch,
            "seq": o.seq, "long": o.long, "prompts": o.prompts, "prompt": o.prompt, "new": o.new,
            "tokenizer": [os.path.abspath(t) for t in o.tokenizer]}


def kept_rows(o):
    """Rows of earlier runs with the same settings, by part."""
    try:
        with open(os.path.join(o.work, "rows.json"), encoding="utf-8") as f:
            kept = json.load(f)
    except FileNotFoundError:
        return {}
    return kept["rows"] if kept["settings"] == settings(o) else {}


def keep_rows(o, rows):
    path = os.path.join(o.work, "rows.json")
    write(path + ".new", json.dumps({"settings": settings(o), "rows": rows}, indent=1) + "\n")
    os.replace(path + ".new", path)


def heading(o):
    text = ("%s; both sides by turns, float32 where no type is named, medians of %d round%s. Only "
            "the ratios mean anything on another machine:" %
            (machine(o), o.rounds, "" if o.rounds == 1 else "s"))
    return "\n".join(textwrap.wrap(text, 100)) + TABLE_HEAD


def rewrite(o, rows):
    """Puts the table between the marks of --readme."""
    with open(o.readme, encoding="utf-8") as f:
        text = f.read()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        sys.exit("%s: the marks %s and %s were expected" % (o.readme, BEGIN, END))
    table = "\n".join([heading(o)] + [r for name in PARTS for r in rows.get(name, [])])
    write(o.readme, "%s%s\n%s\n%s%s" % (before, begin, table, end, after))


def chosen_parts(o):
    """The names that --only gives, or all that can be run."""
    if o.tokenizer:
        return o.only or list(PARTS)
    for name in o.only or []:
        if name in NEED_TOKENIZER:
            sys.exit("--only %s needs --tokenizer FOLDER" % name)
    if not o.only:
        print("without --tokenizer: %s are left out" % ", ".join(NEED_TOKENIZER), file=sys.stderr)
    return o.only or [name for name in PARTS if name not in NEED_TOKENIZER]


def install(o):
    """Makes the virtual environment and goes on in its Python."""
    folder = os.path.abspath(os.path.join(o.work, "venv"))
    python = os.path.join(folder, "bin", "python")
    if not os.path.exists(python):
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    os.execv(python, [python] + [a for a in sys.argv if a != "--install"])


def arguments():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0],
                                     allow_abbrev=False)
    parser.add_argument("--ptst", default="./ptst", help="the program [%(default)s]")
    parser.add_argument("--work", default="bench-peers", help="folder for models [%(default)s]")
    parser.add_argument("--install", action="store_true", help="install the peers in --work first")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), metavar="PART",
                        help="some parts: " + ", ".join(PARTS))
    parser.add_argument("--tokenizer", nargs="+", default=[], metavar="FOLDER",
                        help="folders with tokenizer.json")
    parser.add_argument("--readme", metavar="FILE", help="rewrite the table in FILE")
    for name, value, text in (("rounds", 3, "turns of both sides"),
                              ("threads", cores, "threads of both sides"),
                              ("batch", 4, "rows of lora and all-linear"),
                              ("seq", 256, "tokens a row of lora and all-linear"),
                              ("long", 4096, "tokens of long"),
                              ("prompts", 64, "prompts of generate"),
                              ("prompt", 512, "tokens of the prompt of single"),
                              ("new", 64, "new tokens of generate and single")):
        parser.add_argument("--" + name, type=int, default=value, help=text + " [%(default)s]")
    parser.add_argument("--peer", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    o = arguments()
    if o.peer:
        print(json.dumps(PEERS[o.peer[0]](**json.loads(o.peer[1]))))
        return
    if o.install:
        install(o)
    os.makedirs(o.work, exist_ok=True)
    chosen = chosen_parts(o)
    rows = kept_rows(o)
    print(heading(o))
    for name in PARTS:
        if name in chosen:
            start = time.perf_counter()
            rows[name] = list(PARTS[name](o))
            print("\n".join(rows[name]), flush=True)
            print("%s: %.0f s" % (name, time.perf_counter() - start), file=sys.stderr)
            keep_rows(o, rows)
    if o.readme:
        rewrite(o, rows)


if __name__ == "__main__":
    main()
