#!/usr/bin/env python3
"""Compares the template language of ptst.h with Jinja2 as transformers sets it up.

    pip install transformers jinja2
    python3 tools/jinja_fuzz.py [--cases N] [--seed N] [--header ptst.h] [--cc cc]
            [--templates N FOLDER|FILE.jinja ...] [--shrink]

Random templates from a grammar over every filter, test, method, operator and statement, and random
changes of the recorded cases (tests/golden/jinja_cases.json): the same text, or both refuse. What
ptst.h refuses by choice (integers beyond 64 bits, complex numbers, a few filters) is counted by
itself, and so are slips of Jinja2's compiler, which writes constants into Python's source: a negative
one before ** binds weaker there than computed (-2 ** z), inf and nan are unknown names, and a slice
of a number is undefined if Jinja2 computes it while compiling, an error if Python does. --templates renders each file over N random conversations instead.
Prints what differs and ends with 1 if anything does; --shrink makes the templates shorter first.
"""
import argparse
import collections
import ctypes
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


# ---- the two sides ----
class Text(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("size", ctypes.c_size_t), ("room", ctypes.c_size_t)]


class Ptst:
    """ptst.h as a shared library."""

    def __init__(self, header, cc):
        self.folder = tempfile.TemporaryDirectory()
        path = header
        if not header.endswith(".so"):
            path = os.path.join(self.folder.name, "ptst.so")
            subprocess.run([cc, "-O1", "-shared", "-fPIC", "-pthread", "-DPTST_IMPLEMENTATION", "-x",
                            "c", header, "-o", path, "-lm"], check=True)
        lib = self.lib = ctypes.CDLL(path)
        p, n, s = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p
        for name, result, args in (
                ("open", ctypes.c_int, [p, p]), ("error_text", s, [p]), ("error_code", ctypes.c_int, [p]),
                ("jinja_compile", p, [p, s, n, s]), ("jinja_free", None, [p, p]),
                ("json_parse", p, [p, s, n, s]), ("json_free", None, [p, p]),
                ("jinja_render", ctypes.c_int, [p, p, p, p, p, p]), ("text_free", None, [p, p])):
            f = getattr(lib, "ptst_" + name)
            f.restype, f.argtypes = result, args
        self.c = ctypes.c_void_p()
        assert lib.ptst_open(None, ctypes.byref(self.c)) == 0
        self.out = Text()
        self.json = None, None

    def render(self, source, context):
        """(text, None) or (None, sentence); context is JSON text."""
        lib, c = self.lib, self.c
        if self.json[0] != context:
            lib.ptst_json_free(c, self.json[1])
            data = context.encode()
            self.json = context, lib.ptst_json_parse(c, data, len(data), b"context")
            assert self.json[1], lib.ptst_error_text(c)
        data = source.encode()
        t = lib.ptst_jinja_compile(c, data, len(data), b"t")
        if not t:
            return None, lib.ptst_error_text(c).decode("utf-8", "replace")
        good = lib.ptst_jinja_render(c, t, self.json[1], None, ctypes.byref(self.out), None) == 0
        lib.ptst_jinja_free(c, t)
        if not good:
            return None, lib.ptst_error_text(c).decode("utf-8", "replace")
        return ctypes.string_at(self.out.data, self.out.size).decode() if self.out.size else "", None


class Oracle:
    """Jinja2 in the environment of transformers, compiled once."""

    def __init__(self):
        from transformers.utils import chat_template_utils
        self.environment = chat_template_utils._cached_compile_jinja_template("").environment
        self.last = None, None
        warnings.filterwarnings("ignore", category=SyntaxWarning)
        signal.signal(signal.SIGVTALRM, self.stop)

    @staticmethod
    def stop(number, frame):
        raise TimeoutError

    def slips(self, source, reason):
        """Whether Python's source of the template means something else than the template."""
        if reason is not None and re.search("NameError: name '(inf|nan)'", reason):
            return True
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                self.environment.from_string(source)
            if "is not subscriptable" in (reason or "") and "is not subscriptable" in str([w.message for w in seen]):
                return True
            return bool(SLIP.search(self.environment.compile(source, raw=True)))
        except Exception:
            return False

    def render(self, source, context):
        """(text, None) or (None, sentence)"""
        signal.setitimer(signal.ITIMER_VIRTUAL, 5)
        try:
            if self.last[0] != source:
                self.last = source, self.environment.from_string(source)
            text = self.last[1].render(**json.loads(context))
            text.encode()
            return text, None
        except (Exception, RecursionError) as e:
            return None, "%s: %s" % (type(e).__name__, str(e)[:200])
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)


# What ptst.h does not do on purpose, by its sentence. (Jinja2 computes constants while compiling, where
# a slice of what has none is undefined; elsewhere it is an error.)
CHOICE = re.compile(r"an integer beyond 64 bits|complex numbers|the limit on|is not supported|"
                    r"not supported|nested too deeply|cannot be sliced")
# A negative constant that Jinja2's compiler put before **.
SLIP = re.compile(r"\(-[0-9][0-9.e+-]* \*\* ")
# What only Python has: addresses, and the order of what is hashed.
PYTHON = re.compile(r" at 0x[0-9a-f]+>|<built-in |<bound method|<class |&lt;built-in ", re.I)


# ---- random templates ----
CONTEXT = {
    "s": "Hello, World", "e": "", "u": "na\u00efve \u4f60\u597d \U0001f600 x", "w": "  two  words\t\n",
    "h": "<b>\"it's\" & more</b>", "n": "a\nb\n\n  c\r\nd", "i": 7, "z": 0, "neg": -3, "big": 9007199254740993,
    "f": 2.5, "g": -0.125, "t": True, "o": False, "none_": None, "l": [3, 1, 2], "empty": [],
    "ls": ["b", "A", "c", "a"], "lm": [1, "a", None, 2.5, True, [1]], "lf": [1.5, -2.0, 3.25],
    "ld": [{"k": "x", "v": 2, "d": {"q": 1}}, {"k": "y", "v": 1, "d": {"q": 3}}, {"k": "x", "v": 3}],
    "d": {"b": 1, "a": "two", "C": [1, 2], "items": "odd"}, "dd": {"x": {"y": {"z": "deep"}}}, "de": {},
    "ll": [[1, 2], [3, 4]], "pairs": [["p", 1], ["q", 2]],
    "tree": [{"n": 1, "c": [{"n": 2, "c": []}, {"n": 3, "c": [{"n": 4, "c": []}]}]}, {"n": 5, "c": []}],
    "messages": [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi\nthere"},
                 {"role": "assistant", "content": "", "tool_calls": [{"function": {
                     "name": "f", "arguments": {"a": 1, "b": ["x", None]}}}]},
                 {"role": "tool", "content": "42"}, {"role": "assistant", "content": "Done.\u2028"}],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {
        "a": {"type": "integer", "enum": [1, 2]}}, "required": ["a"]}}}],
    "bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True,
}
NAMES = {"str": ["s", "e", "u", "w", "h", "n", "bos_token"], "int": ["i", "z", "neg", "big"], "float": ["f", "g"],
         "bool": ["t", "o", "add_generation_prompt"], "list": ["l", "empty", "ls", "lm", "lf", "ll", "pairs"],
         "dicts": ["ld", "messages", "tree", "tools"], "dict": ["d", "dd", "de"], "none": ["none_"],
         "undefined": ["nope", "d.nope", "messages[0].nope", "l[9]", "nope2"]}
STRINGS = ["''", "'a'", "\"it's\"", "'say \"x\"'", "'a,b,,c'", "' x '", "'%s'", "'\\n'", "'a\\nb'", "'\\\\'", "'\u00e9\u00df\u0130'",
           "'\\u4f60'", "'12'", "'-3'", "' 4.5 '", "'1e3'", "'0x1F'", "'abcabc'", "'Foo bar-baz (qux)'", "'<a>&'",
           "'|'", "','", "' '", "'b'", "'k'", "'role'", "'content'", "'x' 'y'", "'\\t'", "'\U0001f600'",
           "'\\x41\\101'", "'\u01c5\ufb01\u03a3'", "'A\u0301'", "'\u0661\u00b2\u2167'", "'inf'", "'nan'", "'True'"]
INTS = ["0", "1", "2", "3", "-1", "5", "7", "10", "-2", "100", "1_000", "0x1f", "0b11", "0o7", "255", "9007199254740993",
        "2147483648", "4611686018427387904"]
FLOATS = ["0.0", "1.0", "0.5", "2.5", "-1.5", "1e16", "1e-5", "0.1", "123456.789", "1e22", "3.14159", "1E3", "2.675",
          "1e15", "9999999999999998.0", "1.5e300", "5e-324"]
TYPES = ["str", "int", "float", "bool", "list", "dicts", "dict", "none", "undefined"]
WEIGHT = [30, 18, 8, 6, 18, 8, 8, 2, 3]
SPECS = ["d", "s", "x", "X", "o", "e", "E", "f", "F", "g", "G", "c", "r", "a", "i", "u", "%"]
FILTERS = """abs attr batch capitalize center count d default dictsort e escape first float forceescape format groupby
indent int items join last length list lower map max min reject rejectattr replace reverse round safe select selectattr
slice sort string sum title tojson trim truncate unique upper wordcount""".split()
TESTS = """boolean callable defined divisibleby eq equalto escaped even false filter float ge greaterthan gt in integer
iterable le lessthan lower lt mapping ne none number odd sameas sequence string test true undefined upper""".split()
STR_METHODS = """capitalize casefold center count endswith expandtabs find format index isalnum isalpha isascii isdecimal
isdigit islower isnumeric isspace istitle isupper join ljust lower lstrip partition removeprefix removesuffix replace
rfind rindex rjust rpartition rsplit rstrip split splitlines startswith strip swapcase title upper zfill""".split()
OTHER_METHODS = "append pop update keys values items get copy index count insert clear extend sort remove".split()


class Grammar:
    def __init__(self, rnd):
        self.r = rnd
        self.locals = []      # names that were set
        self.macros = []      # (name, parameters)
        self.loops = 0

    def pick(self, *choices):
        return self.r.choice(choices)

    def kind(self):
        return self.r.choices(TYPES, WEIGHT)[0]

    def atom(self, kind):
        r = self.r
        if r.random() < 0.12 and self.locals:
            return r.choice(self.locals)
        if kind == "str":
            return r.choice(STRINGS) if r.random() < 0.55 else r.choice(NAMES["str"])
        if kind == "int":
            return r.choice(INTS[:10] if r.random() < 0.7 else INTS) if r.random() < 0.7 else r.choice(NAMES["int"])
        if kind == "float":
            return r.choice(FLOATS) if r.random() < 0.7 else r.choice(NAMES["float"])
        if kind == "bool":
            return self.pick("true", "false", "True", "False", "t", "o")
        if kind == "none":
            return self.pick("none", "None", "none_")
        return r.choice(NAMES[kind])

    def expr(self, depth, kind=None):
        r = self.r
        kind = kind or self.kind()
        if r.random() < 0.04:
            kind = self.kind()
        if depth <= 0 or r.random() < 0.15:
            return self.atom(kind)
        if r.random() < 0.16:
            return self.filtered(depth - 1)
        if r.random() < 0.03 and self.macros:
            return self.call_macro(depth - 1)
        if r.random() < 0.04:
            return "(%s if %s%s)" % (self.expr(depth - 1, kind), self.expr(depth - 1, "bool"),
                                     " else " + self.expr(depth - 1, kind) if r.random() < 0.8 else "")
        if r.random() < 0.04:
            return "(%s %s %s)" % (self.expr(depth - 1), self.pick("and", "or"), self.expr(depth - 1, kind))
        if r.random() < 0.03:
            return "(%s)" % self.expr(depth - 1, kind)
        return getattr(self, "of_" + kind)(depth - 1)

    def of_str(self, d):
        r = self.r
        x = r.random()
        if x < 0.4:
            return self.method(d)
        if x < 0.5:
            return "(%s ~ %s)" % (self.expr(d), self.expr(d))
        if x < 0.58:
            return "(%s + %s)" % (self.expr(d, "str"), self.expr(d, "str"))
        if x < 0.62:
            return "(%s * %s)" % (self.expr(d, "str"), self.expr(d, "int") if r.random() < 0.2 else self.pick(0, 1, 2, 3, -1))
        if x < 0.72:
            return "%s%s" % (self.post(self.expr(d, "str")), self.slice(d))
        if x < 0.82:
            return self.percent(d)
        if x < 0.9:
            return self.braces(d)
        return self.atom("str")

    def post(self, e):
        """e so that an attribute or item may follow"""
        return e if re.fullmatch(r"[a-z_A-Z0-9]+|'[^']*'|\(.*\)|[a-z.]+\[[0-9]\]", e) and not e[0].isdigit() else "(%s)" % e

    def slice(self, d):
        r = self.r
        part = lambda: self.pick("", "", "1", "-1", "0", "2", "-2", "-3", "5", "100", "-100", self.expr(0, "int"), "none")
        x = r.random()
        if x < 0.35:
            return "[%s]" % (self.expr(d, "int") if r.random() < 0.3 else self.pick(0, -1, 1, 2, -2))
        if x < 0.7:
            return "[%s:%s]" % (part(), part())
        return "[%s:%s:%s]" % (part(), part(), self.pick("", "1", "-1", "2", "-2", "3", "0", part()))

    def percent(self, d):
        r = self.r
        out, values = "", []
        for _ in range(r.randint(1, 3)):
            spec = r.choice(SPECS[:9] if r.random() < 0.8 else SPECS)
            flags = "".join(r.sample("-+ #0", r.randint(0, 2))) if r.random() < 0.5 else ""
            width = str(r.randint(1, 14)) if r.random() < 0.4 else ""
            precision = "." + self.pick("", "0", "1", "2", "3", "5", "10") if r.random() < 0.4 else ""
            out += self.pick("", "a", " ", "\\n", "%%") + "%" + flags + width + precision + spec
            values.append(self.expr(d, self.pick("str", "int") if spec in "scra%" else self.pick("int", "float")))
        form = "'%s'" % out
        if r.random() < 0.05:
            values.append("1")
        if r.random() < 0.2:
            return "(%s|format(%s))" % (form, ", ".join(values))
        if len(values) == 1 and r.random() < 0.5:
            return "(%s %% %s)" % (form, values[0])
        return "(%s %% (%s,))" % (form, ", ".join(values))

    def braces(self, d):
        r = self.r
        out, values = "", []
        for k in range(r.randint(1, 3)):
            spec = ""
            kind = self.pick("str", "int", "float", "int", "float", "bool", "list", "none", "dict")
            if r.random() < 0.7:
                spec = ":" + (self.pick("", "*", "0", "\u4f60") + self.pick("<", ">", "^", "=") if r.random() < 0.4 else "")
                spec += self.pick("", "", "+", "-", " ") + self.pick("", "", "", "#") + self.pick("", "", "0")
                spec += self.pick("", str(r.randint(1, 14))) + self.pick("", "", "", ",", "_")
                spec += "." + self.pick("0", "1", "2", "4", "10") if r.random() < 0.3 else ""
                spec += self.pick("", "", {"str": "s", "int": "d"}.get(kind, "f"), r.choice("dsxXobeEfFgGn%c"))
            conversion = self.pick("!r", "!s", "!a") if r.random() < 0.1 else ""
            name = self.pick("", "", "", str(k)) if r.random() < 0.9 else self.pick("0", "1", "a", "0[0]", "0.x", "0[k]")
            out += self.pick("", "x", "{{", "}}", " ") + "{" + name + conversion + spec + "}"
            values.append(self.expr(d, kind))
        return "'%s'.format(%s)" % (out, ", ".join(values))

    def method(self, d):
        r = self.r
        name = r.choice(STR_METHODS)
        a = lambda k="str": self.expr(d if r.random() < 0.3 else 0, k)
        few = lambda: str(self.pick(0, 1, 2, 3, -1, 5, 8, 12, -2))
        args = {
            "center": [few(), "'*'"], "ljust": [few(), "'\u00e9'"], "rjust": [few(), "'-'"], "zfill": [few()],
            "count": [a(), few(), few()], "find": [a(), few(), few()], "rfind": [a(), few(), few()],
            "index": [a(), few(), few()], "rindex": [a(), few(), few()], "startswith": [a(), few(), few()],
            "endswith": [a(), few(), few()], "expandtabs": [few()], "format": [a(), a("int")],
            "join": [self.expr(d, self.pick("list", "list", "str", "dict"))], "lstrip": [a()], "rstrip": [a()], "strip": [a()],
            "partition": [a()], "rpartition": [a()], "removeprefix": [a()], "removesuffix": [a()],
            "replace": [a(), a(), few()], "split": [a(), few()], "rsplit": [a(), few()], "splitlines": [a("bool")]}.get(name, [])
        least = {"zfill": 1, "center": 1, "ljust": 1, "rjust": 1, "count": 1, "find": 1, "rfind": 1, "index": 1, "rindex": 1,
                 "startswith": 1, "endswith": 1, "join": 1, "partition": 1, "rpartition": 1, "removeprefix": 1,
                 "removesuffix": 1, "replace": 2}.get(name, 0)
        return "%s.%s(%s)" % (self.post(self.expr(d, "str")), name, ", ".join(self.some(args, least)))

    def some(self, args, least):
        """The first few of the arguments; now and then too few, too many, or wrong ones."""
        r = self.r
        n = r.randint(min(least, len(args)), len(args))
        if r.random() < 0.03:
            n = r.randint(0, len(args))
        out = args[:n]
        if r.random() < 0.04:
            out = out + [self.expr(0)]
        if out and r.random() < 0.06:
            out[r.randrange(len(out))] = self.expr(1)
        return out

    def of_int(self, d):
        r = self.r
        x = r.random()
        if x < 0.4:
            return "(%s %s %s)" % (self.expr(d, "int"), self.pick("+", "-", "*", "//", "%", "/"), self.expr(d, "int"))
        if x < 0.46:
            return "(%s ** %s)" % (self.expr(d, "int"), self.pick("0", "1", "2", "3", "-1", self.expr(0, "int")))
        if x < 0.54:
            return "%s%s" % (self.pick("-", "+", "- ", "not "), self.expr(d, self.pick("int", "int", "bool")))
        if x < 0.7:
            return "%s|%s" % (self.expr(d, self.pick("str", "list", "dict", "dicts")), self.pick("length", "count", "wordcount"))
        if x < 0.8:
            return "%s|int%s" % (self.expr(d), self.pick("", "(7)", "(base=16)", "(0, 2)", "(default=none)", "(base=8)"))
        return self.atom("int")

    def of_float(self, d):
        r = self.r
        x = r.random()
        if x < 0.5:
            a, b = self.expr(d, "float"), self.expr(d, self.pick("int", "float"))
            return "(%s %s %s)" % ((a, self.pick("+", "-", "*", "//", "%", "/", "**"), b) if r.random() < 0.7 else
                                   (b, self.pick("+", "-", "*", "//", "%", "/"), a))
        if x < 0.7:
            return "%s|round%s" % (self.expr(d, self.pick("int", "float")), self.pick("", "(1)", "(2)", "(-1)", "(0, 'floor')",
                                                                                     "(1, 'ceil')", "(method='common')", "(3)"))
        if x < 0.8:
            return "%s|float%s" % (self.expr(d), self.pick("", "(1.5)", "(default=0)"))
        return self.atom("float")

    def of_bool(self, d):
        r = self.r
        x = r.random()
        if x < 0.3:
            k = self.kind()
            out = "(%s" % self.expr(d, k)
            for _ in range(1 + (r.random() < 0.2)):
                out += " %s %s" % (self.pick("==", "!=", "<", ">", "<=", ">="), self.expr(d, k))
            return out + ")"
        if x < 0.5:
            return "(%s %s %s)" % (self.expr(d), self.pick("in", "not in"), self.expr(d, self.pick("str", "list", "dict", "list")))
        if x < 0.85:
            return self.test(d)
        return "not " + self.expr(d)

    def test(self, d):
        r = self.r
        name = r.choice(TESTS)
        few = {"divisibleby": "int", "in": "list", "eq": None, "equalto": None, "ge": "int", "greaterthan": "int", "gt": "float",
               "le": "str", "lessthan": "int", "lt": "int", "ne": None, "sameas": None}
        kind = {"even": "int", "odd": "int", "divisibleby": "int", "lower": "str", "upper": "str", "filter": "str", "test": "str"}
        args = ""
        if name in few:
            v = self.expr(d if r.random() < 0.5 else 0, few[name])
            args = "(%s)" % v if r.random() < 0.6 or not re.fullmatch(r"[\w'.]+", v) else " " + v
        elif r.random() < 0.03:
            args = "(1)"
        return "(%s is %s%s%s)" % (self.expr(d, kind.get(name) or (few.get(name) if name not in ("in", "divisibleby") else None)),
                                   "not " if r.random() < 0.2 else "", name, args)

    def of_list(self, d):
        r = self.r
        x = r.random()
        if x < 0.25:
            k = self.kind()
            items = [self.expr(d, k if r.random() < 0.8 else None) for _ in range(r.randint(0, 4))]
            if r.random() < 0.7:
                return "[%s%s]" % (", ".join(items), "," if items and r.random() < 0.1 else "")
            return "(%s%s)" % (", ".join(items), "," if len(items) == 1 else "")
        if x < 0.35:
            return "(%s + %s)" % (self.expr(d, "list"), self.expr(d, "list"))
        if x < 0.5:
            return self.post(self.expr(d, "list")) + self.slice(d)
        if x < 0.6:
            return "range(%s)" % ", ".join(self.some([str(self.pick(0, 1, 3, 5, -2)), str(self.pick(0, 6, 9, -4)),
                                                      str(self.pick(1, 2, -1, 3, 0))], 1))
        if x < 0.7:
            return "%s.split(%s)" % (self.post(self.expr(d, "str")), self.pick("", "' '", "','", "'b'", "none, 1", "'a', 1"))
        if x < 0.8:
            return "%s.%s()" % (self.post(self.expr(d, "dict")), self.pick("keys", "values", "items"))
        if x < 0.84:
            return "(%s * %s)" % (self.expr(d, "list"), self.pick(0, 1, 2, -1))
        return self.filtered(d, "list")

    def of_dicts(self, d):
        r = self.r
        if r.random() < 0.5:
            k = self.pick("k", "v", "role", "content", "d.q", "nope")
            return "%s|%s('%s'%s)" % (self.atom("dicts"), self.pick("selectattr", "rejectattr"), k,
                                      self.pick("", ", 'defined'", ", 'equalto', " + self.expr(0), ", 'in', ls", ", '==', 'x'",
                                                ", 'string'", ", 'none'", ", 'gt', 1", ", 'undefined'")) + self.pick("|list", "")
        return self.atom("dicts")

    def of_dict(self, d):
        r = self.r
        x = r.random()
        if x < 0.4:
            return "{%s}" % ", ".join("%s: %s" % (self.pick("'a'", "'b'", "1", "1.0", "true", "none", "'k'", self.expr(d, "str"),
                                                            "(1, 2)"), self.expr(d)) for _ in range(r.randint(0, 3)))
        if x < 0.5:
            return "dict(%s)" % self.pick("a=1, b=%s" % self.expr(d), "d", "pairs", "d, z=2", "", "[(1, 2)]", "a=d")
        if x < 0.6:
            return "%s%s" % (self.atom("dicts"), self.pick("[0]", "[-1]", "|first", "|last"))
        if x < 0.7:
            return "namespace(a=%s, b=%s)" % (self.expr(d), self.expr(d))
        return self.atom("dict")

    def of_none(self, d):
        return self.atom("none")

    def of_undefined(self, d):
        e = self.post(self.expr(d, self.pick("dict", "dicts", "str", "list", "int")))
        return e + self.pick(".nope", "['nope']", ".items", "[99]", "['a']", ".a", ".k", ".b", ".get('a')", ".get('q', %s)" %
                             self.expr(0), ".x.y.z", "[0]", ".0", "[none]", ".__class__", "." + self.r.choice(OTHER_METHODS),
                             ".%s(%s)" % (self.r.choice(OTHER_METHODS), self.expr(0)), ".%s()" % self.r.choice(OTHER_METHODS))

    def filtered(self, d, kind=None):
        r = self.r
        name = r.choice(FILTERS)
        a = lambda k=None: self.expr(d if r.random() < 0.3 else 0, k)
        few = lambda: str(self.pick(0, 1, 2, 3, -1, 5, 8))
        yes = lambda: self.pick("true", "false")
        take = {"abs": "int", "attr": "dict", "batch": "list", "dictsort": "dict", "first": "list", "float": "str", "groupby": "dicts",
                "indent": "str", "int": "str", "items": "dict", "join": "list", "last": "list", "length": "list", "map": "list",
                "max": "list", "min": "list", "reject": "list", "rejectattr": "dicts", "reverse": "list", "round": "float",
                "select": "list", "selectattr": "dicts", "slice": "list", "sort": "list", "sum": "list", "unique": "list"}
        key = self.pick("'k'", "'v'", "'role'", "'d.q'", "'content'", "'n'", "0", "'nope'")
        args, least = {
            "attr": (["'a'"], 1), "batch": ([few(), a("str")], 1), "center": ([few()], 0), "d": ([a(), yes()], 0),
            "default": ([a(), yes()], 0), "dictsort": ([yes(), self.pick("'key'", "'value'"), yes()], 0), "float": ([a()], 0),
            "format": ([a(), a()], 0), "groupby": ([key, a("str"), yes()], 1), "indent": ([self.pick("2", "0", "'> '"), yes(), yes()], 0),
            "int": ([a("int"), self.pick("10", "16", "2", "0")], 0), "join": ([a("str"), key], 0),
            "map": ([self.pick("'upper'", "'int'", "'string'", "'length'", "'first'", "attribute='k'", "attribute='v', default=0",
                               "'default', 'x'", "'trim'", "'replace', 'a', 'b'", "attribute=0", "'tojson'", "'abs'", "'float'", "'list'",
                               "'join', '-'", "attribute='d.q'", "'indent', width=2")], 1),
            "max": ([yes(), key], 0), "min": ([yes(), key], 0),
            "replace": ([a("str"), a("str"), few()], 2), "round": ([few(), self.pick("'ceil'", "'floor'", "'common'")], 0),
            "slice": ([few(), a("str")], 1), "sort": ([yes(), yes(), key], 0), "sum": ([key, a()], 0),
            "tojson": ([yes(), self.pick("none", "2", "0", "4", "'\\t'"), "(',', ':')", yes()], 0),
            "trim": ([a("str")], 0), "truncate": ([few(), yes(), a("str"), few()], 0), "unique": ([yes(), key], 0)}.get(name, ([], 0))
        if name in ("select", "reject", "selectattr", "rejectattr"):
            t = self.pick("'odd'", "'even'", "'string'", "'defined'", "'none'", "'in', l", "'eq', " + self.expr(0), "'number'",
                          "'divisibleby', 2", "'true'", "'gt', 1", "'mapping'", "'sameas', none", "'lower'")
            args, least = ([key] if name.endswith("attr") else []), (1 if name.endswith("attr") else 0)
            args = args + [t]
        take = take.get(name, "str")
        if take == "list" and r.random() < 0.3:
            take = self.pick("str", "dict", "dicts")
        if name in ("max", "min", "sort", "sum", "unique", "join", "map") and (key in str(args) or "attribute" in str(args)) and \
                r.random() < 0.5:
            take = "dicts"
        base = self.expr(d, take if r.random() < 0.85 else None)
        args = self.some(args, least)
        names = {"sort": ["reverse", "case_sensitive", "attribute"], "tojson": ["ensure_ascii", "indent", "separators", "sort_keys"],
                 "indent": ["width", "first", "blank"], "default": ["default_value", "boolean"], "join": ["d", "attribute"],
                 "sum": ["attribute", "start"], "unique": ["case_sensitive", "attribute"], "dictsort": ["case_sensitive", "by", "reverse"],
                 "max": ["case_sensitive", "attribute"], "min": ["case_sensitive", "attribute"], "int": ["default", "base"],
                 "round": ["precision", "method"], "truncate": ["length", "killwords", "end", "leeway"], "batch": ["linecount", "fill_with"],
                 "groupby": ["attribute", "default", "case_sensitive"], "replace": ["old", "new", "count"]}.get(name, [])
        if args and len(args) <= len(names) and r.random() < 0.35:
            at = r.randrange(len(args))
            keep = sorted(r.sample(range(at, len(args)), r.randint(1, len(args) - at)))
            args = args[:at] + ["%s=%s" % (names[j], args[j]) for j in keep]
        more = ", ".join(args)
        out = "%s|%s%s" % (base, name, "(%s)" % more if more or r.random() < 0.1 else "")
        if name in ("batch", "map", "reject", "rejectattr", "reverse", "select", "selectattr", "slice", "unique", "items") and \
                r.random() < 0.8:
            out += self.pick("|list", "|list", "|join(',')", "|first", "|sort|list")
        if kind == "list" and r.random() < 0.3:
            out += "|list"
        return "(%s)" % out if r.random() < 0.7 else out

    def call_macro(self, d):
        name, params = self.r.choice(self.macros)
        args = [self.expr(min(d, 1)) for _ in range(self.r.randint(0, len(params)))]
        if self.r.random() < 0.1:
            args.append(self.expr(0))
        if self.r.random() < 0.3 and params:
            args.append("%s=%s" % (self.r.choice(params + ["other"]), self.expr(0)))
        return "%s(%s)" % (name, ", ".join(args))

    # ---- statements ----
    def open(self):
        return self.pick("{%", "{%", "{%", "{%-", "{%-", "{%+") + self.pick(" ", " ", "")

    def close(self):
        return self.pick(" ", " ", "") + self.pick("%}", "%}", "%}", "-%}", "-%}", "+%}")

    def tag(self, text):
        return self.open() + text + self.close()

    def text(self):
        return "".join(self.pick("a", " ", "\n", "\n  ", "  ", "b.", "\t", "x\n", "\r\n", "}", "{", "\u00e9", "\n\n", "", "# ", "-")
                       for _ in range(self.r.randint(0, 3)))

    def name(self):
        return self.pick("x", "y", "v1", "_p", "s", "l", "ns", "item")

    def output(self, d):
        return self.pick("{{ ", "{{ ", "{{- ", "{{", "{{+ "[:2] + " ") + self.expr(d) + self.pick(" }}", " }}", " -}}", "}}")

    def body(self, d, n=3):
        saved = list(self.locals)
        out = ""
        for _ in range(self.r.randint(0, n)):
            out += self.text() + self.statement(d)
        self.locals = saved
        return out + self.text()

    def statement(self, d):
        r = self.r
        if d <= 0 or r.random() < 0.3:
            return self.output(2)
        kind = r.choices(["if", "for", "set", "block set", "namespace", "macro", "call", "filter", "with", "raw", "comment", "generation",
                          "loop", "recursive", "control", "unpack"], [20, 22, 14, 5, 8, 8, 5, 4, 5, 3, 5, 3, 14, 4, 5, 5])[0]
        return getattr(self, "make_" + kind.replace(" ", "_"))(d - 1)

    def make_if(self, d):
        out = self.tag("if " + self.expr(2, "bool")) + self.body(d)
        while self.r.random() < 0.3:
            out += self.tag("elif " + self.expr(1, "bool")) + self.body(d, 1)
        if self.r.random() < 0.4:
            out += self.tag("else") + self.body(d, 2)
        return out + self.tag("endif")

    def make_for(self, d):
        r = self.r
        name = self.name()
        target = name
        what = self.expr(1, self.pick("list", "list", "dicts", "str", "dict"))
        if r.random() < 0.2:
            target, what = "%s, y" % name, self.pick("d.items()", "pairs", "ll", "d|dictsort", "ld|groupby('k')", "dd|items", what)
        self.locals.append(name)
        self.loops += 1
        out = self.tag("for %s in %s%s" % (target, what, " if " + self.expr(1, "bool") if r.random() < 0.25 else ""))
        out += self.body(d) + ("{{ %s }}" % target.split(",")[0] if r.random() < 0.5 else "")
        self.loops -= 1
        self.locals.remove(name)
        if r.random() < 0.25:
            out += self.tag("else") + self.body(d, 1)
        return out + self.tag("endfor")

    def make_loop(self, d):
        """What is known in a loop"""
        e = self.pick("loop.index", "loop.index0", "loop.first", "loop.last", "loop.length", "loop.revindex", "loop.revindex0",
                      "loop.previtem", "loop.nextitem", "loop.cycle('a', 'b', 'c')", "loop.depth", "loop.depth0", "loop.changed(x)",
                      "loop.previtem is defined", "loop.nextitem|default('end')", "loop", "loop.nope", "loop.cycle()",
                      "loop.changed()", "loop.index % 2", "loop.nextitem.k")
        if self.loops == 0:
            return "{%% for x in %s %%}{{ %s }}%s{%% endfor %%}" % (self.expr(1, self.pick("list", "list", "dicts", "str")), e,
                                                                   self.pick("", ",", "{{ x }}"))
        return "{{ %s }}" % e

    def make_recursive(self, d):
        return self.tag("for x in tree recursive") + self.pick("{{ x.n }}", "{{ loop.depth }}", "{{ loop.index }}", "{{ loop.previtem.n }}") + \
            self.pick("", self.text()) + "{% if x.c %}" + self.pick("({{ loop(x.c) }})", "{{ loop(x.c)|upper }}", "{{- loop(x.c) -}}",
                                                                    "{{ loop(x.c[:1]) }}") + "{% endif %}" + self.tag("endfor")

    def make_control(self, d):
        if self.loops == 0 and self.r.random() < 0.9:
            return self.make_for(d)
        return self.tag("if " + self.expr(1, "bool")) + self.tag(self.pick("break", "continue")) + self.tag("endif")

    def make_set(self, d):
        name = self.name()
        out = self.tag("set %s = %s" % (name, self.expr(2)))
        self.locals.append(name)
        return out

    def make_unpack(self, d):
        out = self.tag(self.pick("set x, y = ", "set (x, y) = ", "set x, (y, v1) = ", "set ns.x, y = ", "set x, = ") +
                       self.pick("1, 2", "[1, 'a']", "pairs[0]", "'ab'", "(1, (2, 3))", self.expr(1, "list"), "1, (2, 3)", "{'a': 1, 'b': 2}"))
        self.locals += ["x", "y"]
        return out

    def make_block_set(self, d):
        name = self.name()
        out = self.tag("set %s%s" % (name, self.pick("", "", " | upper", " | trim | replace('a', 'b')", "|length"))) + self.body(d, 2) + \
            self.tag("endset")
        self.locals.append(name)
        return out

    def make_namespace(self, d):
        self.locals += ["ns.a", "ns.b", "ns"]
        return self.tag("set ns = namespace(a=%s, b=%s)" % (self.expr(1), self.expr(1))) + self.pick(
            "", "{%% for x in %s %%}{%% set ns.a = %s %%}{%% endfor %%}{{ ns.a }}" % (
                self.expr(1, "list"), self.pick("ns.a + x", "ns.a ~ x", "[ns.a] + [x]", "x", self.expr(1))),
            self.tag("set ns.b = " + self.expr(1)), "{{ ns.nope is defined }}", "{{ ns['a'] }}", self.tag("set ns.c") + "q" + self.tag("endset"))

    def make_macro(self, d):
        r = self.r
        name = self.pick("m", "m2", "render")
        params = r.sample(["p", "q", "r"], r.randint(0, 3))
        start = r.randint(0, len(params))
        head = ", ".join(p if j < start else "%s=%s" % (p, self.expr(1)) for j, p in enumerate(params))
        saved, loops = list(self.locals), self.loops
        self.locals += params + ["varargs", "kwargs"] * (r.random() < 0.15)
        self.loops = 0
        out = self.tag("macro %s(%s)" % (name, head)) + self.body(d, 2) + "".join("{{ %s }}" % p for p in params if r.random() < 0.6) + \
            (self.pick("{{ caller() }}", "{{ caller(1) }}", "{% if caller %}{{ caller() }}{% endif %}") if r.random() < 0.3 else "") + \
            self.tag("endmacro")
        self.locals, self.loops = saved, loops
        self.macros.append((name, params))
        return out + "{{ %s }}" % self.call_macro(1) if r.random() < 0.7 else out

    def make_call(self, d):
        out = "" if self.macros and self.r.random() < 0.7 else \
            "{% macro m(p='d') %}<{{ p }}{{ caller(" + self.pick("", "p", "1, 2") + ") }}>{% endmacro %}"
        if out:
            self.macros.append(("m", ["p"]))
        self.locals.append("k")
        out += self.tag("call%s %s" % (self.pick("", "", "(k)", "(k, j=2)"), self.call_macro(1))) + self.body(d, 2) + \
            self.pick("{{ k }}", "") + self.tag("endcall")
        self.locals.remove("k")
        return out

    def make_filter(self, d):
        return self.tag("filter %s" % self.pick("upper", "trim", "replace('a', 'b')", "indent(2)", "upper|replace('A', 'b')", "length",
                                                "title", "default('x')", "escape", "tojson")) + self.body(d, 2) + self.tag("endfilter")

    def make_with(self, d):
        return self.tag("with " + self.pick("", "x = " + self.expr(1), "x = 1, y = " + self.expr(1), "x = 1, y = x")) + \
            self.body(d, 2) + self.pick("{{ x }}{{ y }}", "") + self.tag("endwith")

    def make_raw(self, d):
        return self.tag("raw") + self.pick("{{ x }}", "{% if %}", " {# c #} ", "\n a\n", self.text()) + self.tag("endraw")

    def make_comment(self, d):
        return self.pick("{#", "{#-", "{#+") + self.pick(" c ", "", "\n", " {{ x }} ", " {% ", "-", "+") + self.pick("#}", "-#}", "+#}")

    def make_generation(self, d):
        return self.tag("generation") + self.body(d, 2) + self.tag("endgeneration")

    def template(self):
        if self.r.random() < 0.5:
            return "{{ %s }}" % self.expr(self.r.choice([1, 2, 2, 3, 3, 4]))
        return self.body(2, 3)


PIECES = re.compile(r"\{%[-+]?|[-+]?%\}|\{\{[-+]?|[-+]?\}\}|\{#[-+]?|[-+]?#\}|\w+|'[^'\n]*'|\"[^\"\n]*\"|\s+|\*\*|//|[<>=!]=|.", re.S)


def changed(rnd, sources):
    """A recorded or random template with some pieces left out, doubled, swapped or taken from another."""
    pieces = PIECES.findall(rnd.choice(sources))
    others = PIECES.findall(rnd.choice(sources))
    for _ in range(rnd.choice([1, 1, 1, 2, 3])):
        if not pieces:
            break
        at = rnd.randrange(len(pieces))
        what = rnd.random()
        if what < 0.25:
            del pieces[at]
        elif what < 0.4:
            pieces.insert(at, pieces[rnd.randrange(len(pieces))])
        elif what < 0.55:
            to = rnd.randrange(len(pieces))
            pieces[at], pieces[to] = pieces[to], pieces[at]
        elif what < 0.85 and others:
            start = rnd.randrange(len(others))
            pieces[at:at + rnd.randint(0, 2)] = others[start:start + rnd.randint(1, 4)]
        else:
            pieces.insert(at, rnd.choice("|.,:()[]{}-+*/%~=<>!'\" \n0" + "axe"))
    return "".join(pieces)


# ---- random conversations ----
WORDS = ["hello", "na\u00efve", "\u4f60\u597d", "\U0001f600", "  ", "\n", "\n\n", " trailing ", "", "<|im_end|>", "<think>", "</think>", "a\tb",
         "[INST]", "{{ x }}", "\"q\"", "it's", "1,000", "\u00a0", "\r\n", "<tool_call>", "```py\nx=1\n```", "\\n", "&amp;", "\u2028",
         "<b>", "A", "e\u0301", "null", "</s>", "#", "### Response:", "final", "analysis"]


def words(rnd):
    return rnd.choice(["", " "]).join(rnd.choice(WORDS) for _ in range(rnd.randint(0, 5)))


def value(rnd, depth=2):
    if depth == 0 or rnd.random() < 0.5:
        return rnd.choice([1, -2, 2.5, True, False, None, "text", "", words(rnd), 10**15, 1e20, 0.1])
    if rnd.random() < 0.5:
        return [value(rnd, depth - 1) for _ in range(rnd.randint(0, 3))]
    return {rnd.choice(["a", "b", "name", "\u00e9", "x y", "type"]): value(rnd, depth - 1) for _ in range(rnd.randint(0, 3))}


def tool(rnd):
    kind = rnd.choice(["string", "integer", "number", "boolean", "array", "object", ["string", "null"]])
    one = {"type": kind, "description": words(rnd)}
    if rnd.random() < 0.3:
        one["enum"] = ["a", "b"]
    if kind == "array":
        one["items"] = {"type": "string"}
    if rnd.random() < 0.2:
        one["default"] = value(rnd, 1)
    function = {"name": rnd.choice(["get_weather", "f", "a_b"]), "description": words(rnd),
                "parameters": {"type": "object", "properties": {"p": one, "q": {"type": "integer"}}, "required": ["p"]}}
    if rnd.random() < 0.2:
        function["return"] = {"type": "string", "description": "d"}
    if rnd.random() < 0.15:
        function["parameters"] = {"type": "object", "properties": {}}
    if rnd.random() < 0.1:
        del function["description"]
    return {"type": "function", "function": function} if rnd.random() < 0.9 else function


def content(rnd):
    x = rnd.random()
    if x < 0.72:
        return words(rnd)
    if x < 0.92:
        return [rnd.choice([{"type": "text", "text": words(rnd)}, {"type": "image"}, {"type": "image_url", "image_url": {"url": "u"}},
                            {"type": "video"}, {"type": "audio"}, {"type": "thinking", "thinking": words(rnd)}, words(rnd)])
                for _ in range(rnd.randint(0, 3))]
    return rnd.choice([None, 5, True, {"a": words(rnd)}, "\n", " "])


def message(rnd, role):
    m = {"role": role, "content": content(rnd)}
    if role == "assistant":
        if rnd.random() < 0.35:
            arguments = value(rnd) if rnd.random() < 0.2 else {"p": value(rnd), "q": 3}
            if rnd.random() < 0.25:
                arguments = json.dumps(arguments, ensure_ascii=False)
            call = {"name": rnd.choice(["get_weather", "f"]), "arguments": arguments}
            m["tool_calls"] = [rnd.choice([{"type": "function", "id": "abcdefghi", "function": call}, {"function": call}, call,
                                           {"type": "function", "id": "call_1", "function": call}])
                               for _ in range(rnd.choice([1, 1, 1, 2, 0]))]
            if rnd.random() < 0.5:
                m["content"] = rnd.choice(["", None])
        if rnd.random() < 0.15:
            m[rnd.choice(["reasoning_content", "thinking", "reasoning", "thought"])] = words(rnd)
        if rnd.random() < 0.05:
            m["prefix"] = True
    if role == "tool":
        m.update(rnd.choice([{"name": "f"}, {"tool_call_id": "abcdefghi"}, {"name": "f", "tool_call_id": "call_1"}, {}]))
        if rnd.random() < 0.1:
            m["content"] = value(rnd)
    if rnd.random() < 0.04:
        del m[rnd.choice(list(m))]
    return m


def conversation(rnd):
    """The variables of a chat template."""
    messages = []
    if rnd.random() < 0.5:
        messages.append(message(rnd, rnd.choice(["system"] * 6 + ["developer"])))
    role = "user"
    for _ in range(rnd.choice([0, 1, 1, 2, 3, 3, 4, 5, 6, 8])):
        messages.append(message(rnd, role if rnd.random() < 0.95 else rnd.choice(["user", "assistant", "system", "tool", "alien"])))
        role = "assistant" if role != "assistant" else rnd.choice(["user"] * 4 + ["tool"])
        if messages[-1].get("tool_calls"):
            role = "tool"
    v = {"messages": messages, "add_generation_prompt": rnd.random() < 0.5, "bos_token": "<s>", "eos_token": "</s>",
         "unk_token": "<unk>", "pad_token": "<pad>", "tools": None, "documents": None}
    if rnd.random() < 0.4:
        v["tools"] = [tool(rnd) for _ in range(rnd.choice([1, 1, 2, 0]))]
    if rnd.random() < 0.12:
        v["documents"] = [{"title": words(rnd), "text": words(rnd)} for _ in range(2)]
    for name, values in (("enable_thinking", [True, False]), ("reasoning_effort", ["low", "high", "none"]),
                         ("thinking", [True, False]), ("date_string", ["1 May 2024"]), ("custom_tools", [[tool(rnd)], None]),
                         ("tools_in_user_message", [True, False]), ("builtin_tools", [["code_interpreter", "brave_search"], None]),
                         ("controls", [{"length": "short"}, {}]), ("add_default_system_prompt", [True, False]),
                         ("xml_tools", [[tool(rnd)]]), ("python_tools", [["f"]]), ("today", ["x"]), ("model_identity", [words(rnd)]),
                         ("preserve_thinking", [True, False]), ("citation_mode", ["fast"]), ("safety_mode", ["strict", "none"])):
        if rnd.random() < 0.08:
            v[name] = rnd.choice(values)
    return v


# ---- comparing ----
class Run:
    def __init__(self, options):
        self.ptst, self.oracle = Ptst(options.header, options.cc), Oracle()
        self.counts, self.why, self.bad = collections.Counter(), collections.Counter(), []

    def compare(self, source, text):
        """'' or what differs"""
        expected, reason = self.oracle.render(source, text)
        got, error = self.ptst.render(source, text)
        if expected == got:
            self.counts["both refuse" if got is None else "equal"] += 1
            return ""
        if reason is not None and ("TimeoutError" in reason or "MemoryError" in reason or "RecursionError" in reason):
            self.counts["Jinja2 gave up"] += 1
            return ""
        if got is None and CHOICE.search(error):
            self.counts["refused by choice"] += 1
            self.why[CHOICE.search(error).group()] += 1
            return ""
        if self.oracle.slips(source, reason):
            self.counts["Jinja2's compiler slips"] += 1
            return ""
        if expected is not None and (PYTHON.search(expected) or (error and "printing a " in error)):
            self.counts["Python's own text"] += 1
            return ""
        return "Jinja2: %s\n  ptst:   %s" % (repr(expected) if reason is None else "(%s)" % reason,
                                            repr(got) if error is None else "(%s)" % error)

    def shrink(self, source, text):
        """Leaves out what is not needed for the difference."""
        size = max(len(source) // 2, 1)
        before = time.monotonic()
        while size >= 1 and time.monotonic() < before + 20:
            at = 0
            while at < len(source):
                shorter = source[:at] + source[at + size:]
                if self.compare(shorter, text):
                    source = shorter
                else:
                    at += size
            size //= 2
        return source

    def report(self, name, source, text, options):
        counts = self.counts.copy()
        if options.shrink:
            source = self.shrink(source, text)
        self.bad.append((name, source))
        print("%s %r\n  %s" % (name, source, self.compare(source, text)), flush=True)
        self.counts = counts
        self.counts["differ"] += 1


def language(run, options):
    text = json.dumps(CONTEXT)
    with open(os.path.join(TOP, "tests/golden/jinja_cases.json"), encoding="utf-8") as file:
        recorded = [c["source"] for c in json.load(file)]
    recent = list(recorded)
    for number in range(options.cases):
        rnd = random.Random("%d/%d" % (options.seed, number))
        if rnd.random() < 0.75:
            source = Grammar(rnd).template()
            recent[rnd.randrange(len(recent))] = source
            if rnd.random() < 0.3:
                recent[rnd.randrange(len(recent))] = rnd.choice(recorded)
        else:
            source = changed(rnd, recent)
        if run.compare(source, text):
            run.report("case %d:" % number, source, text, options)
        if len(run.bad) >= options.most:
            break


def templates(run, options):
    files = []
    for path in options.files:
        files += sorted(os.path.join(path, n) for n in os.listdir(path)) if os.path.isdir(path) else [path]
    for path in files:
        with open(path, encoding="utf-8", newline="") as file:
            source = file.read()
        source = re.sub(r"strftime_now\((\"[^\"]*\"|'[^']*')\)", "'26 Jul 2024'", source)
        before = run.counts.copy()
        for number in range(options.templates):
            v = conversation(random.Random("%d/%s/%d" % (options.seed, os.path.basename(path), number)))
            text = json.dumps(v, ensure_ascii=False)
            if run.compare(source, text):
                run.counts["differ"] += 1
                run.bad.append(path)
                print("%s, conversation %d of seed %d: %s\n  %s" % (os.path.basename(path), number, options.seed, text[:1500],
                                                                    run.compare(source, text)[:3000]), flush=True)
        if (run.counts - before)["equal"] == 0:
            print("%s: Jinja2 renders none of them" % os.path.basename(path))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--header", default=os.path.join(TOP, "ptst.h"), help="or a library made of it, .so")
    parser.add_argument("--cc", default="cc")
    parser.add_argument("--cases", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--templates", type=int, default=0, help="conversations for each file")
    parser.add_argument("--shrink", action="store_true")
    parser.add_argument("--most", type=int, default=200, help="stops after so many that differ")
    parser.add_argument("files", nargs="*")
    options = parser.parse_args()
    run = Run(options)
    with open("/proc/self/statm", encoding="ascii") as file:  # a template may ask Jinja2 for anything
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), used + (1 << 30)))
    (templates if options.files else language)(run, options)
    for name, n in sorted(run.counts.items()):
        print("%8d %s" % (n, name))
    for name, n in run.why.most_common():
        print("%8d refused by choice: %s" % (n, name))
    return 1 if run.bad else 0


if __name__ == "__main__":
    sys.exit(main())
