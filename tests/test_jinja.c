/* Tests of >>jinja: Jinja2's own answers (golden/jinja_cases.json), marks, limits, hostile
   templates, mutations, and no memory. */
#include "test.h"

static ptst_json *jinja_parse(ptst_ctx *c, const char *text) {
    return ptst_json_parse(c, text, strlen(text), "context");
}

/* Renders; the code says what went wrong. */
static ptst_code jinja_render(ptst_ctx *c, const char *source, const char *context,
                              const ptst_jinja_desc *desc, ptst_text *out, ptst_text *marks) {
    ptst_jinja *t = ptst_jinja_compile(c, source, strlen(source), "t.jinja");
    ptst_json *j = jinja_parse(c, context);
    ptst_code code = ptst_error_code(c);
    if (t != NULL && j != NULL) {
        code = ptst_jinja_render(c, t, j, desc, out, marks);
    }
    ptst_json_free(c, j);
    ptst_jinja_free(c, t);
    return code;
}

/* Each case: the same text as Jinja2, or both refuse. */
static void jinja_language(void) {
    ptst_ctx *c = test_open(1, NULL);
    ptst_json *cases = ptst_json_load(c, "tests/golden/jinja_cases.json");
    ptst_text context = {NULL, 0, 0}, out = {NULL, 0, 0};
    int32_t k, node;
    int count = 0;
    CHECK(cases != NULL);
    for (k = ptst_json_first(cases, 0); k >= 0; k = ptst_json_next(cases, k)) {
        size_t size = 0, expected_size = 0;
        const char *source = ptst_json_string(cases, ptst_json_get(cases, k, "source"), &size);
        const char *expected =
            ptst_json_string(cases, ptst_json_get(cases, k, "text"), &expected_size);
        ptst_jinja *t = ptst_jinja_compile(c, source, size, "case");
        ptst_json *j;
        bool done = false, good;
        node = ptst_json_get(cases, k, "context");
        context.size = 0;
        if (node < 0) {
            ptst__text_add(c, &context, "{}");
        } else {
            test_put_json(c, cases, node, &context);
        }
        j = ptst_json_parse(c, context.data, context.size, "context");
        CHECK(j != NULL);
        if (t != NULL) {
            done = ptst_jinja_render(c, t, j, NULL, &out, NULL) == PTST_OK;
        }
        good = done ? expected != NULL && out.size == expected_size &&
                          (out.size == 0 || memcmp(out.data, expected, out.size) == 0)
                    : expected == NULL;
        CHECK(good);
        if (!good) {
            fprintf(stderr, "%s\n  got \"%s\", expected \"%s\"\n", source,
                    done ? out.data : ptst_error_text(c), expected == NULL ? "(error)" : expected);
        }
        ptst_json_free(c, j);
        ptst_jinja_free(c, t);
        count++;
    }
    CHECK(count >= 500);
    ptst_text_free(c, &context);
    ptst_text_free(c, &out);
    ptst_json_free(c, cases);
    ptst_close(c);
}

/* Text and marks ("0", "1", "2" for each byte) of a template. */
static void jinja_check_marks(ptst_ctx *c, int line, const char *source, const char *context,
                              const char *text, const char *digits) {
    ptst_text out = {NULL, 0, 0}, marks = {NULL, 0, 0};
    size_t i;
    ptst_code code = jinja_render(c, source, context, NULL, &out, &marks);
    CHECK(code == PTST_OK);
    CHECK(out.size == marks.size);
    for (i = 0; i < marks.size; i++) {
        marks.data[i] = (char)('0' + marks.data[i]);
    }
    test_text(__FILE__, line, out.data == NULL ? "" : out.data, text);
    test_text(__FILE__, line, marks.data == NULL ? "" : marks.data, digits);
    ptst_text_free(c, &out);
    ptst_text_free(c, &marks);
}

/* Where each byte comes from, through every kind of operation. */
static void jinja_marks(void) {
    static const char context[] =
        "{\"u\": \"ab c\", \"bos_token\": \"<s>\", \"n\": 12, \"messages\": [{\"role\": \"user\", "
        "\"content\": \"Q<s>\"}, {\"role\": \"assistant\", \"content\": \" A \", \"name\": \"N\", "
        "\"tool_calls\": [{\"f\": {\"x\": 1}}]}]}";
    ptst_ctx *c = test_open(1, NULL);
#define MARKS(source, text, digits) jinja_check_marks(c, __LINE__, source, context, text, digits)
    MARKS("x{{ u }}y", "xab cy", "011110");
    MARKS("{{ bos_token }}{{ u }}", "<s>ab c", "0001111");
    MARKS("{{ '[' + u + ']' }}", "[ab c]", "011110");
    MARKS("{{ '[' ~ u ~ n ~ ']' }}", "[ab c12]", "01111110");
    MARKS("{{ u|upper|replace('B', '-') }}", "A- C", "1011");
    MARKS("{{ u.split(' ')|join('+') }}", "ab+c", "1101");
    MARKS("{{ ('<' + u + '>')[1:-1][::-1] }}", "c ba", "1111");
    MARKS("{{ ('<' + u)[::-1] }}", "c ba<", "11110");
    MARKS("{{ '%s|%5s|%d' % (u, 'x', n) }}", "ab c|    x|12", "1111000000011");
    MARKS("{{ '{}-{}'.format(u, 'x') }}", "ab c-x", "111100");
    MARKS("{{ u|title|trim|indent(2, true) }}", "  Ab C", "001111");
    MARKS("{{ (' ' + u)|trim ~ u|length }}", "ab c4", "11111");
    MARKS("{{ [u, 'x'] }}", "['ab c', 'x']", "0111111000000");
    MARKS("{{ {'k': u}|tojson }}", "{\"k\": \"ab c\"}", "0000001111110");
    MARKS("{% set x %}<{{ u }}>{% endset %}{{ x * 2 }}", "<ab c><ab c>", "011110011110");
    MARKS("{% macro m(a) %}[{{ a }}]{% endmacro %}{{ m(u)|upper }}", "[AB C]", "011110");
    MARKS("{% for ch in '-' + u %}{{ ch }}{% endfor %}", "-ab c", "01111");
    MARKS("{% filter upper %}x{{ u }}{% endfilter %}", "XAB C", "01111");
    MARKS("{{ (u + '!').center(9, '*') }}", "**ab c!**", "111111011");
    MARKS("{% for m in messages %}{{ m.role }}:{{ m.content.strip() }};{% endfor %}",
          "user:Q<s>;assistant:A;", "1111011110111111111020");
    MARKS("{{ messages[1].name }}{{ messages[1].tool_calls|tojson }}", "N[{\"f\": {\"x\": 1}}]",
          "122222222222222222");
    MARKS("{{ 'ok' if u == 'ab c' }}{{ u is string }}", "okTrue", "000000");
    MARKS("{% generation %}{{ messages[1].content }}!{% endgeneration %}", " A !", "2220");
#undef MARKS
    ptst_close(c);
}

/* A failure names file, line and column. */
static void jinja_positions(void) {
    static const char *const cases[][2] = {
        {"a\n\n  {{ 1 +  }}", "t.jinja: line 3, column 11: expected an expression, got '}}'"},
        {"{% if x %}\n\n", "t.jinja: line 2, column 1: Unexpected end of template. Jinja was looking "
                           "for the following tags: elif else endif."},
        {"x\n {{ a.b.c }}", "t.jinja: line 2, column 6: 'a' is undefined"},
        {"{{ 1 }}\n{{ 'a' +\n 1 }}",
         "t.jinja: line 2, column 8: unsupported operand type(s) for +: 'str' and 'int'"},
        {"{{ raise_exception('no system') }}", "t.jinja: line 1, column 19: no system"},
        {"{% for i in 3 %}{% endfor %}",
         "t.jinja: line 1, column 13: 'int' object is not iterable"},
        {"{{ 'x'|nope }}", "t.jinja: line 1, column 8: No filter named 'nope'."},
        {"{{ 7 ! 3 }}", "t.jinja: line 1, column 6: unexpected char '!'"},
        {"{{ {}.x.y }}", "t.jinja: line 1, column 8: 'dict object' has no attribute 'x'"}};
    ptst_ctx *c = test_open(1, NULL);
    ptst_text out = {NULL, 0, 0};
    size_t i;
    for (i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        CHECK(jinja_render(c, cases[i][0], "{}", NULL, &out, NULL) != PTST_OK);
        CHECK_TEXT(ptst_error_text(c), cases[i][1]);
        CHECK(out.size == 0);
    }
    CHECK(jinja_render(c, "{{ raise_exception('x') }}", "{}", NULL, &out, NULL) ==
          PTST_ERR_MISMATCH);
    CHECK(ptst_jinja_compile(c, "a\xff", 2, "t") == NULL);
    CHECK(ptst_error_code(c) == PTST_ERR_FORMAT);
    ptst_text_free(c, &out);
    ptst_close(c);
}

/* head + middle * n + tail */
static char *jinja_long(const char *head, const char *middle, size_t n, const char *tail) {
    size_t h = strlen(head), m = strlen(middle), i;
    char *s = (char *)malloc(h + n * m + strlen(tail) + 1);
    memcpy(s, head, h);
    for (i = 0; i < n; i++) {
        memcpy(s + h + i * m, middle, m);
    }
    memcpy(s + h + n * m, tail, strlen(tail) + 1);
    return s;
}

/* Counts the bytes that are in use. */
typedef struct jinja_meter {
    size_t now, most;
} jinja_meter;

static void *jinja_alloc(void *user, size_t size) {
    jinja_meter *m = (jinja_meter *)user;
    m->now += size;
    m->most = m->now > m->most ? m->now : m->most;
    return malloc(size);
}

static void jinja_release(void *user, void *pointer, size_t size) {
    jinja_meter *m = (jinja_meter *)user;
    m->now -= pointer == NULL ? 0 : size;
    free(pointer);
}

/* A template that was made to exhaust something: it ends quickly and in little memory, in an error
   (expected NULL) or with the right text. The time is only printed: the machine may be busy. */
static void jinja_hostile_case(const char *name, const char *source, const char *expected) {
    jinja_meter meter = {0, 0};
    ptst_desc desc;
    ptst_ctx *c;
    ptst_text out = {NULL, 0, 0};
    size_t before;
    ptst_code code;
    double start = ptst__seconds(), seconds;
    memset(&desc, 0, sizeof desc);
    desc.threads = 1;
    desc.allocator.alloc = jinja_alloc;
    desc.allocator.release = jinja_release;
    desc.allocator.user = &meter;
    if (ptst_open(&desc, &c) != PTST_OK) {
        CHECK(false);
        return;
    }
    before = meter.most = meter.now;
    code = jinja_render(c, source, "{}", NULL, &out, NULL);
    seconds = ptst__seconds() - start;
    if (expected == NULL ? code == PTST_OK
                         : code != PTST_OK || strcmp(out.data == NULL ? "" : out.data, expected)) {
        fprintf(stderr, "%s: %s\n", name, code == PTST_OK ? "no error" : ptst_error_text(c));
        CHECK(false);
    }
    CHECK(meter.most - before < (size_t)64 << 20);
    if (meter.most - before >= (size_t)64 << 20 || seconds > 0.05) {
        fprintf(stderr, "%s: %.0f MiB, %.3f s\n", name, (double)(meter.most - before) / 1048576,
                seconds);
    }
    CHECK(seconds < 5); /* an endless loop, not a slow machine */
    ptst_text_free(c, &out);
    CHECK(meter.now <= before);
    ptst_close(c);
}

static void jinja_hostile_long(const char *name, const char *head, const char *middle, size_t n,
                               const char *tail, const char *expected) {
    char *source = jinja_long(head, middle, n, tail);
    jinja_hostile_case(name, source, expected);
    free(source);
}

static void jinja_hostile(void) {
    static const char *const cases[][3] = {
        {"macro recursion", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", NULL},
        {"caller recursion",
         "{% macro m() %}{% call m() %}{{ caller() }}{% endcall %}{% endmacro %}{{ m() }}", NULL},
        {"range(1e9)", "{% for i in range(1000000000) %}x{% endfor %}", NULL},
        {"nested ranges",
         "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", NULL},
        {"'x' * 1e10", "{{ 'x' * 10000000000 }}", NULL},
        {"[1] * 1e10", "{{ [1] * 10000000000 }}", NULL},
        {"doubling", "{% set ns = namespace(s='x') %}{% for i in range(64) %}{% set ns.s = ns.s + "
                     "ns.s %}{% endfor %}{{ ns.s|length }}",
         NULL},
        {"doubling a list", "{% set ns = namespace(s=[1]) %}{% for i in range(64) %}{% set ns.s = "
                            "ns.s + ns.s %}{% endfor %}{{ ns.s|length }}",
         NULL},
        {"1/0", "{{ 1/0 }}", NULL},
        {"5//0", "{{ 5//0 }}", NULL},
        {"5%0", "{{ 5%0 }}", NULL},
        {"INT64_MIN // -1", "{{ (-9223372036854775807 - 1) // -1 }}", NULL},
        {"INT64_MIN % -1", "{{ (-9223372036854775807 - 1) % -1 }}", "0"},
        {"abs of INT64_MIN", "{{ (-9223372036854775807 - 1)|abs }}", NULL},
        {"negative of INT64_MIN", "{{ -(-9223372036854775807 - 1) }}", NULL},
        {"wide format", "{{ '%1000000000d' % 3 }}", NULL},
        {"precise format", "{{ '%.1000000000f' % 3 }}", NULL},
        {"wide format 2", "{{ '{:>1000000000}'.format('x') }}", NULL},
        {"center(1e9)", "{{ 'x'|center(1000000000) }}", NULL},
        {"append self", "{% set a = [1] %}{{ a.append(a) }}{{ a }}", NULL},
        {"9**9**9", "{{ 9**9**9 }}", NULL},
        {"2**62", "{{ 2**62 }}", "4611686018427387904"},
        {"unclosed comment", "{# x", NULL},
        {"unclosed print", "{{ x", NULL},
        {"unclosed block", "{% if x", NULL},
        {"unclosed string", "{{ 'x }}", NULL},
        {"slice step 0", "{{ [1][::0] }}", NULL},
        {"slice step min", "{{ [1,2,3][::-9223372036854775807] }}", "[3]"},
        {"__class__", "{{ ''.__class__.__mro__ }}", NULL},
        {"undefined", "{{ a.b.c }}", NULL},
        {"namespace cycle", "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}",
         "<Namespace {'a': <Namespace {...}>}>"},
        {"[::-1]", "{{ [1,2,3][::-1] }}", "[3, 2, 1]"},
        {"ns + [x]", "{% set ns = namespace(a=[]) %}{% for i in range(3000) %}{% set ns.a = ns.a + "
                     "[i] %}{% endfor %}{{ ns.a|length }}",
         "3000"},
        {"ns + text", "{% set ns = namespace(a='') %}{% for i in range(20000) %}{% set ns.a = ns.a "
                      "+ 'xxxxxxxxxxxxxxxxxxxx' %}{% endfor %}{{ ns.a|length }}",
         "400000"},
        {"raise_exception", "{{ raise_exception('x') }}", NULL},
        {"indent(1e9)", "{{ 'a\nb'|indent(1000000000) }}", NULL},
        {"nested values", "{% set ns = namespace(a=[]) %}{% for i in range(99999) %}{% set ns.a = "
                          "[ns.a] %}{% endfor %}{{ ns.a }}",
         NULL},
        {"compare nested", "{% set ns = namespace(a=[], b=[]) %}{% for i in range(30000) %}{% set "
                           "ns.a = [ns.a] %}{% set ns.b = [ns.b] %}{% endfor %}{{ ns.a == ns.b }}",
         NULL},
        {"tojson nested", "{% set ns = namespace(a=[]) %}{% for i in range(30000) %}{% set ns.a = "
                          "[ns.a] %}{% endfor %}{{ ns.a|tojson(indent=9) }}",
         NULL},
        {"tojson wide", "{{ [[1]*1000]*1000|tojson(indent=100000) }}", NULL},
        {"billion laughs", "{% set a = ['x']*99 %}{% set b = [a]*99 %}{% set c = [b]*99 %}{% set d "
                           "= [c]*99 %}{{ d }}",
         NULL},
        {"replace empty", "{{ ('x'*100000).replace('', 'y'*1000) }}", NULL},
        {"slow find", "{% set a = 'a'*200000 %}{% set b = 'a'*100000 + 'b' %}{% for i in range(999) "
                      "%}{{ b in a }}{% endfor %}",
         NULL},
        {"slow rfind", "{% set a = 'a'*200000 %}{% set b = 'b' + 'a'*100000 %}{{ a.rfind(b) }}",
         "-1"},
        {"slow strip", "{{ ('a'*200000).strip('b'*200000 + 'a') }}", NULL},
        {"slow sort", "{% for i in range(999) %}{{ range(99999)|sort|length }}{% endfor %}", NULL},
        {"slow unique", "{{ range(99999)|unique|list|length }}", NULL},
        {"join", "{{ range(99999)|join('x'*10000) }}", NULL},
        {"output", "{% for i in range(99999) %}{{ 'x'*1000 }}{% endfor %}", NULL},
        {"recursive loop", "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}", NULL},
        {"dict of many", "{% set ns = namespace(d={}) %}{% for i in range(9999) %}{% set ns.d = "
                         "dict(ns.d, **{i|string: i}) %}{% endfor %}",
         NULL},
        {"deep set blocks", "{% for i in range(99999) %}{% set x %}{{ x }}{{ x }}y{% endset %}{% "
                            "endfor %}",
         NULL},
        {"batch fill", "{{ [1]|batch(1000000000, 0)|list|length }}", NULL},
        {"slice fill", "{{ [1]|slice(1000000000)|list|length }}", NULL},
        {"zfill", "{{ '1'.zfill(1000000000) }}", NULL},
        {"expandtabs", "{{ '\t'.expandtabs(1000000000) }}", NULL},
        {"big integer", "{{ 99999999999999999999 }}", NULL},
        {"format fields", "{{ '{0.__class__}'.format('x') }}", ""},
        {"strftime", "{{ strftime_now('%1000000000d') }}", NULL}};
    size_t i;
    for (i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        jinja_hostile_case(cases[i][0], cases[i][1], cases[i][2]);
    }
    jinja_hostile_long("brackets x 150", "{{ ", "(", 150, "1", NULL);
    jinja_hostile_long("brackets x 20000", "{{ ", "(", 20000, "1", NULL);
    jinja_hostile_long("lists x 20000", "{{ ", "[", 20000, "1", NULL);
    jinja_hostile_long("dicts x 20000", "{{ ", "{1:", 20000, "1", NULL);
    jinja_hostile_long("if x 5000", "", "{% if 1 %}", 5000, "x", NULL);
    jinja_hostile_long("not x 20000", "{{ ", "not ", 20000, "1 }}", NULL);
    jinja_hostile_long("signs x 20000", "{{ ", "- ", 20000, "1 }}", NULL);
    jinja_hostile_long("else x 20000", "{{ ", "1 if 0 else ", 20000, "1 }}", NULL);
    jinja_hostile_long("sum x 20000", "{{ ", "1 + ", 20000, "1 }}", NULL);
    jinja_hostile_long("sum x 500", "{{ ", "1 + ", 500, "1 }}", "501");
    jinja_hostile_long("~ x 20000", "{{ (", "'a' ~ ", 20000, "'a')|length }}", "20001");
    jinja_hostile_long("and x 20000", "{{ ", "1 and ", 20000, "1 }}", NULL);
    jinja_hostile_long("items x 20000", "{{ x", "[0]", 20000, " }}", NULL);
    jinja_hostile_long("filters x 20000", "{{ 1", "|string", 20000, " }}", NULL);
    jinja_hostile_long("elif x 20000", "{% if 0 %}", "{% elif 0 %}", 20000, "x{% endif %}", "");
    jinja_hostile_long("blanks x 200000", "{{ 1 }}", " ", 200000, "{%- if 1 %}{% endif %}", "1");
    jinja_hostile_long("braces x 200000", "", "{", 200001, "", NULL);
}

/* Limits are settable, and each says what it is. */
static void jinja_limits(void) {
    ptst_ctx *c = test_open(1, NULL);
    ptst_text out = {NULL, 0, 0};
    ptst_jinja_desc d;
    memset(&d, 0, sizeof d);
    d.steps = 100;
    CHECK(jinja_render(c, "{% for i in range(9) %}x{% endfor %}", "{}", &d, &out, NULL) == PTST_OK);
    CHECK(jinja_render(c, "{% for i in range(99) %}x{% endfor %}", "{}", &d, &out, NULL) ==
          PTST_ERR_LIMIT);
    CHECK(strstr(ptst_error_text(c), "steps") != NULL);
    memset(&d, 0, sizeof d);
    d.output = 10;
    CHECK(jinja_render(c, "0123456789", "{}", &d, &out, NULL) == PTST_OK);
    CHECK(jinja_render(c, "0123456789a", "{}", &d, &out, NULL) == PTST_ERR_LIMIT);
    CHECK(strstr(ptst_error_text(c), "output") != NULL);
    memset(&d, 0, sizeof d);
    d.memory = 10000;
    CHECK(jinja_render(c, "{{ 'x' * 100000 }}", "{}", &d, &out, NULL) == PTST_ERR_LIMIT);
    CHECK(strstr(ptst_error_text(c), "memory") != NULL);
    memset(&d, 0, sizeof d);
    d.depth = 10;
    CHECK(jinja_render(c, "{{ 1+1+1+1+1+1+1+1+1+1+1+1 }}", "{}", &d, &out, NULL) == PTST_ERR_LIMIT);
    CHECK(strstr(ptst_error_text(c), "deep") != NULL);
    memset(&d, 0, sizeof d);
    d.now = 1700000000; /* 2023-11-14 22:13:20 UTC */
    CHECK(jinja_render(c, "{{ strftime_now('%d %b %Y %H:%M:%S %j %-d%%') }}", "{}", &d, &out,
                       NULL) == PTST_OK);
    CHECK_TEXT(out.data, "14 Nov 2023 22:13:20 318 14%");
    ptst_text_free(c, &out);
    ptst_close(c);
}

/* Templates of the golden file with bytes changed, cut and doubled: any error, but nothing worse.
   Seeds are fixed. */
static void jinja_mutations(void) {
    ptst_ctx *c = test_open(1, NULL);
    ptst_json *cases = ptst_json_load(c, "tests/golden/jinja_cases.json");
    static const char context[] = "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}], "
                                  "\"x\": [1, {\"a\": null}], \"d\": {\"a\": 1}, \"s\": \"abc\"}";
    static const char bits[] = "{}%#-+()[].,|~'\"0 9:=<>!*/\\naeiofrs_\xC3\xA9";
    ptst_json *j = jinja_parse(c, context);
    ptst_text out = {NULL, 0, 0};
    ptst_jinja_desc desc;
    ptst_rng rng = {42, 7, 0};
    int rounds = getenv("TEST_QUICK") != NULL ? 4000 : 20000, i, good = 0;
    memset(&desc, 0, sizeof desc);
    desc.steps = 20000;
    desc.memory = 4 << 20;
    for (i = 0; i < rounds; i++) {
        size_t size = 0, n, k;
        uint32_t count = (uint32_t)ptst_json_size(cases, 0);
        const char *from = ptst_json_string(
            cases,
            ptst_json_get(cases, ptst_json_at(cases, 0, ptst_rng_below(&rng, count)), "source"),
            &size);
        char *s = (char *)malloc(2 * size + 8);
        ptst_jinja *t;
        memcpy(s, from, size);
        for (n = 1 + ptst_rng_below(&rng, 4); n > 0 && size > 0; n--) {
            size_t at = ptst_rng_below(&rng, (uint32_t)size);
            char bit = bits[ptst_rng_below(&rng, sizeof bits - 1)];
            switch (ptst_rng_below(&rng, 4)) {
            case 0:
                s[at] = bit;
                break;
            case 1: /* cut one out */
                memmove(s + at, s + at + 1, size - at - 1);
                size--;
                break;
            case 2: /* put one in */
                memmove(s + at + 1, s + at, size - at);
                s[at] = bit;
                size++;
                break;
            default: /* cut the end off */
                size = n == 1 ? at : size;
            }
            if (size > strlen(from) + 4) {
                break;
            }
        }
        for (k = 0; k < size; k++) {
            s[k] = s[k] == 0 ? ' ' : s[k];
        }
        t = ptst_jinja_compile(c, s, size, "mutant");
        good += t != NULL && ptst_jinja_render(c, t, j, &desc, &out, NULL) == PTST_OK;
        ptst_jinja_free(c, t);
        free(s);
    }
    CHECK(good > rounds / 50); /* not all of them are nonsense */
    ptst_text_free(c, &out);
    ptst_json_free(c, j);
    ptst_json_free(c, cases);
    ptst_close(c);
}

static ptst_code jinja_work(ptst_ctx *c, void *arg) {
    static const char source[] =
        "{% macro m(a, b=1) %}<{{ a }}{{ varargs }}{{ kwargs }}>{% endmacro %}"
        "{% set ns = namespace(l=[], s='') %}{% for x in messages if x.role %}"
        "{% set ns.l = ns.l + [x.content|trim|upper] %}{% set ns.s = ns.s + x|tojson(indent=2) %}"
        "{{ loop.index }}{{ m(x.role, 2, 3, c=4) }}{% endfor %}{{ ns.l|sort|join(', ') }}"
        "{{ ns.s }}{{ '%s-%05d' % ('a', 4) }}{{ '{:>8}'.format('x') }}{{ {'a': [1, 2.5]} }}"
        "{% set t %}{{ 'y' * 9000 }}{% endset %}{{ t|length }}{{ [3,1,2]|map('string')|list }}";
    static const char context[] = "{\"messages\": [{\"role\": \"a\", \"content\": \" b \"}, "
                                  "{\"role\": \"c\", \"content\": \"d\", \"e\": [1, null]}]}";
    ptst_text out = {NULL, 0, 0}, marks = {NULL, 0, 0};
    ptst_code code = jinja_render(c, source, context, NULL, &out, &marks);
    (void)arg;
    ptst_text_free(c, &out);
    ptst_text_free(c, &marks);
    return code;
}

static void jinja_memory(void) { test_memory_sweep(jinja_work, NULL); }

static void suite_jinja(void) {
    RUN(jinja_language);
    RUN(jinja_marks);
    RUN(jinja_positions);
    RUN(jinja_limits);
    RUN(jinja_hostile);
    RUN(jinja_mutations);
    RUN(jinja_memory);
}

MAIN(jinja)
