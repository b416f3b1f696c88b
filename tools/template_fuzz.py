#!/usr/bin/env python3
"""Compares what ptst.h learns of a conversation, and where it takes a chat template from, with
transformers and Jinja2.

    pip install transformers jinja2 tokenizers
    python3 tools/template_fuzz.py [--header ptst.h] [--cc cc] [--seed N] [--folders N] [--talks N]
            [FOLDER|FILE.jinja ...]

--folders: random model folders with chat_template.jinja, additional_chat_templates/*.jinja and a chat_template
of every kind in tokenizer_config.json: the one that apply_chat_template uses, or both refuse.
--talks: random conversations for each template (those of tests/golden/chat_templates.json and the
files given). Jinja2 renders the messages up to each answer, and with it; the answer lies between.
Learned must be what it says and the marker that follows it at once, or else all up to the
end-of-text, and nothing else; with {% generation %} what transformers' mask says. Conversations
whose beginning a template writes in another way when they go on are counted by themselves.
Prints what differs and ends with 1 if anything does.
"""
import argparse
import collections
import ctypes
import json
import os
import random
import re
import sys
import tempfile

from jinja_fuzz import TOP, Ptst, Text, words


class Prompt(ctypes.Structure):
    _fields_ = [("text", Text), ("marks", Text), ("learn", Text), ("own_bos", ctypes.c_bool)]


class Templates(Ptst):
    def __init__(self, header, cc):
        super().__init__(header, cc)
        p, s = ctypes.c_void_p, ctypes.c_char_p
        self.lib.ptst_template_load.restype, self.lib.ptst_template_load.argtypes = p, [p, s, s]
        self.lib.ptst_template_free.argtypes = [p, p]
        self.lib.ptst_template_messages.argtypes = [p, p, p, ctypes.c_bool, p]
        self.prompt = Prompt()

    def load(self, folder):
        return self.lib.ptst_template_load(self.c, folder.encode(), None)

    def free(self, template):
        self.lib.ptst_template_free(self.c, template)

    def messages(self, template, conversation):
        """(text, learn) as bytes, or (None, sentence)"""
        data, lib = json.dumps(conversation).encode(), self.lib
        j = lib.ptst_json_parse(self.c, data, len(data), b"conversation")
        code = lib.ptst_template_messages(self.c, template, j, False, ctypes.byref(self.prompt))
        lib.ptst_json_free(self.c, j)
        if code != 0:
            return None, lib.ptst_error_text(self.c).decode("utf-8", "replace")
        take = lambda t: ctypes.string_at(t.data, t.size) if t.size else b""
        return take(self.prompt.text), take(self.prompt.learn)


# ---- where it comes from ----
def named(rnd, where):
    names = [rnd.choice(["default", "default", "tool_use", "rag"]) for _ in range(rnd.randint(0, 3))]
    return [(name, "%s %s %d {{ messages|length }}" % (where, name, k)) for k, name in enumerate(names)]


def make_folder(rnd, folder):
    """Returns what is in it."""
    made = []
    if rnd.random() < 0.4:
        made.append(("chat_template.jinja", "file {{ messages|length }}\n"))
    if rnd.random() < 0.4:
        made += [("additional_chat_templates/%s.jinja" % name, text) for name, text in named(rnd, "folder")]
    kind = rnd.choice(["no file", "no key", "none", "string", "list", "list", "dict"])
    if kind != "no file":
        config, entries = {}, named(rnd, "config")
        if kind != "no key":
            config["chat_template"] = {
                "none": None, "string": rnd.choice(["config {{ messages|length }}", ""]), "dict": dict(entries),
                "list": [{"name": name, "template": text} for name, text in entries]}[kind]
        made.append(("tokenizer_config.json", json.dumps(config)))
    for name, text in made:
        os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            file.write(text)
    return made


def folders(ptst, options, counts):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    for number in range(options.folders):
        rnd = random.Random("%d/folder/%d" % (options.seed, number))
        with tempfile.TemporaryDirectory() as folder:
            Tokenizer(models.BPE()).save(os.path.join(folder, "tokenizer.json"))
            made = make_folder(rnd, folder)
            talk = {"messages": [{"role": "user", "content": "q"}]}
            tools = rnd.choice([0, None, [], [{"type": "function", "function": {"name": "f"}}]])
            if tools != 0:
                talk["tools"] = tools
            try:
                expected = PreTrainedTokenizerFast.from_pretrained(folder).apply_chat_template(
                    talk["messages"], tools=talk.get("tools"), tokenize=False)
            except Exception:
                expected = None
            template = ptst.load(folder)
            text, why = ptst.messages(template, talk) if template else (None, ptst.lib.ptst_error_text(ptst.c).decode())
            text = text if text is None else text.decode()
            if template:
                ptst.free(template)
            if text is None and why.endswith("called default"):  # transformers can use tool_use alone
                counts["folder: no default, refused"] += 1
            elif text == expected:
                counts["folder: " + ("both refuse" if text is None else "equal")] += 1
            else:
                counts["differ"] += 1
                print("folder %d: %r, tools %r\n  transformers: %r\n  ptst:         %r" % (
                    number, made, tools, expected, why if text is None else text))


# ---- what is learned ----
MARKER = re.compile(rb"<[^\x00-\x20<>]{0,61}>")


def talk_of(rnd):
    messages = [{"role": "system", "content": words(rnd)}] if rnd.random() < 0.4 else []
    for turn in range(rnd.randint(1, 4)):
        messages.append({"role": "user", "content": words(rnd) if rnd.random() < 0.8 else ""})
        for _ in range(2 if rnd.random() < 0.1 else 1):
            messages.append({"role": "assistant", "content": "%s%dw%d%s%s" % (  # a space of no template
                rnd.choice(["", "", "\u2003"]), turn, rnd.randrange(1 << 30), words(rnd).strip(),
                rnd.choice(["", "", "\u2003"]))})
    if rnd.random() < 0.2:
        messages.append({"role": "user", "content": words(rnd)})
    return messages


def expected_learn(render, messages, eos):
    """(text, learn), or None if a template does not write the beginning as it stands in the whole."""
    text = render(messages, False)
    learn = bytearray(len(text))
    for i, m in enumerate(messages):
        if m["role"] != "assistant":
            continue
        before, after = render(messages[:i], True), render(messages[:i + 1], False)
        if not (text.startswith(before) and text.startswith(after) and len(after) > len(before)):
            return None
        said = m["content"].encode()
        part = text[len(before):len(after)]
        said = next((s for s in (said, said.rstrip(), said.strip()) if s in part), None)
        if said is None or not said.strip():
            return None
        at = part.index(said) + len(said)
        end, first, at = part.find(eos, at), len(before) + part.index(said), len(before) + at
        marker = MARKER.match(text, at)  # some templates write it with the next message
        following = messages[i + 1]["content"].encode() if messages[i + 1:] else b""
        if marker and following and text.startswith(following, at):
            marker = None  # somebody's words
        last = marker.end() if marker else len(before) + end + len(eos) if end >= 0 else at
        learn[first:last] = b"\1" * (last - first)
    return text, bytes(learn)


def learned_text(text, learn):
    return [text[m.start():m.end()] for m in re.finditer(rb"\x01+", learn)]


def talks(ptst, options, counts):
    from transformers.utils import chat_template_utils as utils
    with open(os.path.join(TOP, "tests/golden/chat_templates.json"), encoding="utf-8") as file:
        sources = [(row["name"], row["source"]["chat_template"] if isinstance(row["source"], dict) else row["source"])
                   for row in json.load(file)]
    for path in options.files:
        names = sorted(os.path.join(path, n) for n in os.listdir(path)) if os.path.isdir(path) else [path]
        for name in names:
            with open(name, encoding="utf-8") as file:
                sources.append((os.path.basename(name), file.read()))
    for name, source in sources:
        if not isinstance(source, str):
            continue
        before = counts.copy()
        for number in range(options.talks):
            rnd = random.Random("%d/%s/%d" % (options.seed, name, number))
            messages, eos = talk_of(rnd), rnd.choice(["</s>", "<|im_end|>", "<|endoftext|>", "<eos>"])
            special = {"bos_token": "<s>", "eos_token": eos}
            try:
                compiled = utils._cached_compile_jinja_template(source)
                if re.search(r"\{%[-+]?\s*generation", source):
                    (text,), (spans,) = utils.render_jinja_template([messages], chat_template=source, tools=None,
                                                                    return_assistant_tokens_mask=True, **special)
                    learn = "".join("\1" if any(a <= k < b for a, b in spans) else "\0" for k in range(len(text)))
                    text, learn = text.encode(), b"".join(bytes([ord(x)]) * len(ch.encode()) for ch, x in zip(text, learn))
                    wanted = text, learn
                else:
                    wanted = expected_learn(lambda m, generate: compiled.render(
                        messages=m, add_generation_prompt=generate, tools=None, documents=None, **special).encode(),
                        messages, eos.encode())
            except Exception:
                counts["talk: Jinja2 refuses"] += 1
                continue
            if wanted is None:
                counts["talk: written in another way when it goes on"] += 1
                continue
            with tempfile.TemporaryDirectory() as folder:
                with open(os.path.join(folder, "chat_template.jinja"), "w", encoding="utf-8") as file:
                    file.write(source)
                with open(os.path.join(folder, "tokenizer_config.json"), "w", encoding="utf-8") as file:
                    json.dump(special, file)
                template = ptst.load(folder)
            got = ptst.messages(template, messages) if template else (None, "")
            if template:
                ptst.free(template)
            if got == wanted:
                counts["talk: equal"] += 1
                counts["talk: answers in them"] += sum(m["role"] == "assistant" for m in messages)
                continue
            counts["differ"] += 1
            if (counts - before)["differ"] <= 1:
                print("%s, talk %d, eos %s: %r\n  expected: %r\n  ptst:     %r" % (
                    name, number, eos, wanted[0], learned_text(*wanted), learned_text(*got) if got[0] else got))
        if (counts - before)["talk: equal"] == 0:
            counts["templates without a comparison"] += 1
        else:
            counts["templates compared"] += 1


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--header", default=os.path.join(TOP, "ptst.h"), help="or a library made of it, .so")
    parser.add_argument("--cc", default="cc")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folders", type=int, default=300)
    parser.add_argument("--talks", type=int, default=30)
    parser.add_argument("files", nargs="*")
    options = parser.parse_args()
    ptst, counts = Templates(options.header, options.cc), collections.Counter()
    folders(ptst, options, counts)
    talks(ptst, options, counts)
    for name, n in sorted(counts.items()):
        print("%8d %s" % (n, name))
    return 1 if counts["differ"] else 0


if __name__ == "__main__":
    sys.exit(main())
