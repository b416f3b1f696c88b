/* ptst.c - the command-line program.

       cc -O2 -pthread -o ptst tools/ptst.c -lm            (from the top folder)

   A thin shell around ptst.h: it reads options, opens files, shows progress and prints results.
   Every command is one function `command_<name>`; its options stand in a table right above it,
   from which parsing, defaults and --help follow. Exit codes: 0 success, 1 the work failed (bad or
   unsupported file, no memory, disk full), 2 the call was wrong (unknown option, bad value,
   missing file), 130 interrupted with finished work saved. */
#define PTST_IMPLEMENTATION
#include "../ptst.h"

#include <signal.h>

enum { EXIT_WORK = 1, EXIT_CALL = 2, EXIT_INTERRUPT = 130 };

/* ================================================================================ options ==== */

typedef struct option {
    const char *name;     /* "--model" */
    const char *meta;     /* "DIR"; NULL = a flag without value */
    const char *fallback; /* default as text; NULL = none */
    const char *help;
} option;

#define OPTION_END {NULL, NULL, NULL, NULL}
#define FLAG_QUIET {"--quiet", NULL, NULL, "no progress and no notes"}
#define OPTION_THREADS {"--threads", "N", "0", "threads; 0 = all cores"}
#define OPTION_SIMD {"--simd", "NAME", NULL, "scalar, avx2, avx512 or neon (default: best)"}
#define OPTIONS_COMMON FLAG_QUIET, OPTION_THREADS, OPTION_SIMD
#define OPTION_MODEL {"--model", "DIR", NULL, "Hugging Face model folder"}
#define OPTION_ADAPTER {"--adapter", "DIR", NULL, "PEFT adapter folder"}
#define OPTION_DTYPE                                                                               \
    {"--dtype", "TYPE", NULL, "how weights are held: f32, bf16, f16, int8, int4 (default: as in "  \
                              "the file)"}
#define OPTION_SEED {"--seed", "N", "42", "seed of every random choice"}

enum { OPTIONS_MAX = 64, REST_MAX = 4096 };

typedef struct args {
    const char *command;
    const option *options;
    const char *values[OPTIONS_MAX]; /* NULL = not given */
    const char **rest;               /* arguments that are no options */
    int rest_count;
    ptst_ctx *c;
} args;

/* Says what is wrong with the call. */
PTST__PRINTF(1, 2)
static int bad_call(const char *text, ...) {
    va_list list;
    fputs("ptst: ", stderr);
    va_start(list, text);
    vfprintf(stderr, text, list);
    va_end(list);
    fputc('\n', stderr);
    return EXIT_CALL;
}

/* Index of an option, -1 if the command has none of that name. */
static int option_index(const args *a, const char *name, size_t size) {
    int i;
    for (i = 0; a->options[i].name != NULL; i++) {
        if (strlen(a->options[i].name) == size && memcmp(a->options[i].name, name, size) == 0) {
            return i;
        }
    }
    return -1;
}

/* Text of an option: as given, else its default, else NULL. */
static const char *get(const args *a, const char *name) {
    int i = option_index(a, name, strlen(name));
    if (i < 0) {
        return NULL;
    }
    return a->values[i] != NULL ? a->values[i] : a->options[i].fallback;
}

static bool given(const args *a, const char *name) {
    int i = option_index(a, name, strlen(name));
    return i >= 0 && a->values[i] != NULL;
}

static bool quiet(const args *a) { return given(a, "--quiet"); }

/* Reads options and arguments; 0, or the exit code. Values may follow after a blank or '='; "--"
   ends the options. */
static int parse(args *a, int argc, char **argv) {
    int i, k;
    bool only_rest = false;
    for (i = 0; i < argc; i++) {
        const char *s = argv[i], *equals;
        size_t size;
        if (only_rest || s[0] != '-' || s[1] == 0) {
            a->rest[a->rest_count++] = s;
            continue;
        }
        if (strcmp(s, "--") == 0) {
            only_rest = true;
            continue;
        }
        equals = strchr(s, '=');
        size = equals == NULL ? strlen(s) : (size_t)(equals - s);
        k = option_index(a, s, size);
        if (k < 0) {
            return bad_call("%s: unknown option %.*s; see ptst %s --help", a->command, (int)size, s,
                            a->command);
        }
        if (a->options[k].meta == NULL) {
            if (equals != NULL) {
                return bad_call("%s: %.*s takes no value", a->command, (int)size, s);
            }
            a->values[k] = "";
        } else if (equals != NULL) {
            a->values[k] = equals + 1;
        } else if (i + 1 < argc) {
            a->values[k] = argv[++i];
        } else {
            return bad_call("%s: %s needs a value (%s)", a->command, s, a->options[k].meta);
        }
    }
    return 0;
}

/* Options of a command for --help. */
static void print_options(const option *options) {
    int i;
    for (i = 0; options[i].name != NULL; i++) {
        char head[64];
        snprintf(head, sizeof head, "%s %s", options[i].name,
                 options[i].meta == NULL ? "" : options[i].meta);
        printf("  %-28s %s", head, options[i].help);
        if (options[i].fallback != NULL && options[i].fallback[0] != 0) {
            printf(" [%s]", options[i].fallback);
        }
        printf("\n");
    }
}

/* Numbers from options: false (and the sentence is printed) if the text is no number in range. */
static bool get_number(const args *a, const char *name, double low, double high, double *out) {
    const char *s = get(a, name);
    char *end;
    *out = s == NULL ? 0 : strtod(s, &end);
    if (s != NULL && (*s == 0 || *end != 0 || !(*out >= low && *out <= high))) {
        bad_call("%s: %s %s: a number from %g to %g was expected", a->command, name, s, low, high);
        return false;
    }
    return true;
}

static bool get_integer(const args *a, const char *name, double low, double high, int64_t *out) {
    double value;
    if (!get_number(a, name, low, high, &value)) {
        return false;
    }
    *out = (int64_t)value;
    if ((double)*out != value) {
        bad_call("%s: %s %s: a whole number was expected", a->command, name, get(a, name));
        return false;
    }
    return true;
}

/* Whether a required option is there. */
static bool need(const args *a, const char *name) {
    if (get(a, name) == NULL) {
        int i = option_index(a, name, strlen(name));
        bad_call("%s: %s %s is missing; see ptst %s --help", a->command, name,
                 i < 0 ? "" : a->options[i].meta, a->command);
        return false;
    }
    return true;
}

/* Whether a path that the user named exists. NULL passes: an optional path not given. */
static bool exists(const args *a, const char *path) {
    struct stat s;
    if (path != NULL && stat(path, &s) != 0) {
        bad_call("%s: %s: %s", a->command, path, strerror(errno));
        return false;
    }
    return true;
}

/* ========================================================= progress, interruption, errors ==== */

static volatile sig_atomic_t interrupted;

/* The first signal asks for a clean stop; the second ends at once. */
static void on_signal(int number) {
    (void)number;
    if (interrupted) {
        _exit(EXIT_INTERRUPT);
    }
    interrupted = 1;
}

static void catch_signals(void) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = on_signal;
    sigemptyset(&action.sa_mask);
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
}

typedef struct screen {
    bool quiet, terminal, open; /* open: a bar stands on the current line */
    double started, last;
    double first_done; /* where this stage began (a resumed one does not begin at 0) */
    char stage[32], item[128];
} screen;

static void clock_text(char *out, size_t size, double seconds) {
    long s = seconds < 0 || seconds > 3e6 ? 0 : (long)(seconds + 0.5);
    if (s >= 3600) {
        snprintf(out, size, "%ld:%02ld:%02ld", s / 3600, s / 60 % 60, s % 60);
    } else {
        snprintf(out, size, "%02ld:%02ld", s / 60, s % 60);
    }
}

static void screen_clear(screen *s) {
    if (s->open) {
        fputs("\r\033[K", stderr);
        s->open = false;
    }
}

/* 37%|#######             | 185/500 step [12:31<21:20, loss 0.83, 512 tok/s] */
static void screen_draw(screen *s, const ptst_progress *p, double now) {
    char bar[21], spent[24], left[24], extra[64] = "";
    double share = p->total > 0 ? p->done / p->total : 0, took = now - s->started;
    double rest = p->done > s->first_done
                      ? took * (p->total - p->done) / (p->done - s->first_done)
                      : -1;
    int i, full = (int)(share * 20 + 0.5), n = 0;
    for (i = 0; i < 20; i++) {
        bar[i] = i < full ? '#' : ' ';
    }
    bar[20] = 0;
    clock_text(spent, sizeof spent, took);
    clock_text(left, sizeof left, rest);
    if (p->loss != 0) {
        n = snprintf(extra, sizeof extra, ", loss %.4g", p->loss);
    }
    if (p->rate > 0) {
        snprintf(extra + n, sizeof extra - (size_t)n, ", %.0f tok/s", p->rate);
    }
    fprintf(stderr, "%s%s%s%s %3d%%|%s| %.0f/%.0f %s [%s<%s%s]%s", s->terminal ? "\r\033[K" : "",
            p->stage, p->item == NULL ? "" : " ", p->item == NULL ? "" : p->item,
            (int)(share * 100), bar, p->done, p->total, p->unit == NULL ? "" : p->unit, spent,
            rest < 0 ? "?" : left, extra, s->terminal ? "" : "\n");
    s->open = s->terminal;
}

static int on_progress(void *user, const ptst_progress *p) {
    screen *s = (screen *)user;
    double now = ptst__seconds();
    const char *item = p->item == NULL ? "" : p->item;
    if (!s->quiet) {
        if (strcmp(s->stage, p->stage) != 0 || strcmp(s->item, item) != 0) {
            snprintf(s->stage, sizeof s->stage, "%s", p->stage);
            snprintf(s->item, sizeof s->item, "%s", item);
            s->started = now;
            s->first_done = p->done;
            s->last = s->terminal ? 0 : now;
        }
        if (now - s->last >= (s->terminal ? 0.1 : 15.0)) {
            s->last = now;
            screen_draw(s, p, now);
        }
    }
    return interrupted;
}

static void on_log(void *user, ptst_log_level level, const char *text) {
    screen *s = (screen *)user;
    if (!s->quiet || level == PTST_LOG_WARNING) {
        screen_clear(s);
        fprintf(stderr, "%s%s\n", level == PTST_LOG_WARNING ? "warning: " : "", text);
    }
}

/* Prints why the library failed and gives the exit code for it. */
static int failed(const args *a) {
    ptst_code code = ptst_error_code(a->c);
    screen_clear((screen *)a->c->desc.user);
    fprintf(stderr, "ptst: %s\n", ptst_error_text(a->c));
    return code == PTST_ERR_STOPPED ? EXIT_INTERRUPT
           : code == PTST_ERR_ARGUMENT ? EXIT_CALL
                                       : EXIT_WORK;
}

/* ================================================================== results and small helpers */

/* Prints a text and releases it. */
static void print_text(ptst_ctx *c, ptst_text *t) {
    if (t->size != 0) {
        fwrite(t->data, 1, t->size, stdout);
    }
    ptst_text_free(c, t);
}

/* The stream for results: stdout, or a file that appears whole (committed by close_result). */
typedef struct result {
    ptst__out out;
    ptst_text text;
    bool file;
} result;

static int open_result(args *a, result *r, const char *path) {
    memset(r, 0, sizeof *r);
    if (path != NULL && strcmp(path, "-") != 0) {
        r->file = true;
        return ptst__out_open(a->c, &r->out, path) == PTST_OK ? 0 : failed(a);
    }
    return 0;
}

/* Writes what has been collected in r->text since the last call. */
static int flush_result(args *a, result *r) {
    int code = 0;
    if (r->file) {
        code = ptst__out_write(a->c, &r->out, r->text.data, r->text.size) == PTST_OK ? 0 : failed(a);
    } else if (r->text.size != 0) {
        fwrite(r->text.data, 1, r->text.size, stdout);
    }
    r->text.size = 0;
    return code;
}

/* Ends a result: code != 0 throws the file away. */
static int close_result(args *a, result *r, int code) {
    if (code == 0) {
        code = flush_result(a, r);
    }
    if (r->file) {
        if (code == 0) {
            code = ptst__out_commit(a->c, &r->out) == PTST_OK ? 0 : failed(a);
        } else {
            ptst__out_abort(a->c, &r->out);
        }
    }
    ptst_text_free(a->c, &r->text);
    return code;
}

/* "f32" ... of --dtype; false after saying what was expected. */
static bool get_dtype(const args *a, ptst_dtype *out) {
    static const char *const names[] = {"file", "f32", "f16", "bf16", "int8", "int4"};
    const char *s = get(a, "--dtype");
    int i;
    *out = PTST_DTYPE_FILE;
    for (i = 0; s != NULL && i < 6; i++) {
        if (strcmp(s, names[i]) == 0) {
            *out = (ptst_dtype)i;
            return true;
        }
    }
    if (s != NULL) {
        bad_call("%s: --dtype %s: f32, bf16, f16, int8 or int4 was expected", a->command, s);
    }
    return s == NULL;
}

/* One argument, e.g. the text to tokenize; NULL after a sentence if there are more. */
static bool one_argument(const args *a, const char *what, const char **out) {
    *out = a->rest_count > 0 ? a->rest[0] : NULL;
    if (a->rest_count > 1) {
        bad_call("%s: %s: one %s was expected", a->command, a->rest[1], what);
        return false;
    }
    return true;
}

/* Calls line(a, text, size, number, arg) for each line of a file; an exit code other than 0 ends. */
typedef int (*line_function)(args *a, const char *text, size_t size, int number, void *arg);

static int each_line(args *a, const char *path, line_function line, void *arg) {
    ptst_text text = {NULL, 0, 0};
    size_t at = 0;
    int code = 0, number = 1;
    if (ptst__read_file(a->c, path, &text) != PTST_OK) {
        ptst_text_free(a->c, &text);
        return failed(a);
    }
    for (; code == 0 && at < text.size; number++) {
        const char *end = (const char *)memchr(text.data + at, '\n', text.size - at);
        size_t n = end == NULL ? text.size - at : (size_t)(end - (text.data + at));
        code = line(a, text.data + at, n, number, arg);
        at += n + 1;
    }
    ptst_text_free(a->c, &text);
    return code;
}

/* ==================================================================== tokenize, detokenize ==== */

static const option tokenize_options[] = {
    {"--tokenizer", "PATH", NULL, "tokenizer.json or a folder with one"},
    {"--no-special", NULL, NULL, "without the special tokens that the post-processor adds"},
    {"--plain", NULL, NULL, "special tokens inside the text are ordinary text"},
    {"--jsonl", "FILE", NULL, "one JSON string a line instead of a text"},
    OPTIONS_COMMON,
    OPTION_END,
};

typedef struct coder {
    ptst_tokenizer *t;
    unsigned flags;
    const char *path; /* of the jsonl file */
    result out;
} coder;

static int tokenize_text(args *a, const char *text, size_t size, coder *k) {
    ptst_ids ids = {NULL, 0, 0};
    size_t i;
    ptst_code code = ptst_encode(a->c, k->t, text, size, k->flags, &ids);
    ptst_text *out = &k->out.text;
    if (code == PTST_OK) {
        code = ptst_text_append(a->c, out, "[", 1);
    }
    for (i = 0; code == PTST_OK && i < ids.count; i++) {
        code = ptst__text_format(a->c, out, "%s%d", i == 0 ? "" : ", ", (int)ids.data[i]);
    }
    if (code == PTST_OK) {
        code = ptst_text_append(a->c, out, "]\n", 2);
    }
    ptst_ids_free(a->c, &ids);
    return code == PTST_OK ? flush_result(a, &k->out) : failed(a);
}

static int tokenize_line(args *a, const char *text, size_t size, int number, void *arg) {
    coder *k = (coder *)arg;
    ptst_json *j;
    const char *s;
    size_t n;
    char name[600];
    int code;
    snprintf(name, sizeof name, "%.500s: line %d", k->path, number);
    j = ptst_json_parse(a->c, text, size, name);
    if (j == NULL) {
        return failed(a);
    }
    s = ptst_json_string(j, 0, &n);
    if (s == NULL) {
        ptst__fail(a->c, PTST_ERR_FORMAT, "%s: a JSON string was expected", name);
        code = failed(a);
    } else {
        code = tokenize_text(a, s, n, k);
    }
    ptst_json_free(a->c, j);
    return code;
}

static int command_tokenize(args *a) {
    const char *text, *jsonl = get(a, "--jsonl");
    coder k;
    int code;
    memset(&k, 0, sizeof k);
    if (!need(a, "--tokenizer") || !exists(a, get(a, "--tokenizer")) || !exists(a, jsonl) ||
        !one_argument(a, "text", &text)) {
        return EXIT_CALL;
    }
    if ((text == NULL) == (jsonl == NULL)) {
        return bad_call("tokenize: either a text or --jsonl FILE was expected");
    }
    k.path = jsonl;
    k.flags = (given(a, "--no-special") ? 0u : PTST_ADD_SPECIAL) |
              (given(a, "--plain") ? PTST_PLAIN : 0u);
    k.t = ptst_tokenizer_load(a->c, get(a, "--tokenizer"));
    if (k.t == NULL) {
        return failed(a);
    }
    code = jsonl != NULL ? each_line(a, jsonl, tokenize_line, &k)
                         : tokenize_text(a, text, strlen(text), &k);
    ptst_tokenizer_free(a->c, k.t);
    return close_result(a, &k.out, code);
}

static const option detokenize_options[] = {
    {"--tokenizer", "PATH", NULL, "tokenizer.json or a folder with one"},
    {"--no-special", NULL, NULL, "leaves special tokens out"},
    {"--jsonl", "FILE", NULL, "one JSON array of ids a line; prints one JSON string a line"},
    OPTIONS_COMMON,
    OPTION_END,
};

/* Ids of the JSON array in text -> decoded text in k->out (quoted if it comes from a file). */
static int detokenize_array(args *a, const char *text, size_t size, const char *name, coder *k) {
    ptst_json *j = ptst_json_parse(a->c, text, size, name);
    ptst_ids ids = {NULL, 0, 0};
    ptst_text decoded = {NULL, 0, 0};
    ptst_code code = j == NULL ? ptst_error_code(a->c) : PTST_OK;
    int32_t node;
    if (code == PTST_OK && ptst_json_kind(j, 0) != PTST_JSON_ARRAY) {
        code = ptst__fail(a->c, PTST_ERR_FORMAT, "%s: a JSON array of ids was expected", name);
    }
    for (node = ptst_json_first(j, 0); code == PTST_OK && node >= 0;
         node = ptst_json_next(j, node)) {
        double id = ptst_json_number(j, node, -1);
        if (!(id >= 0 && id <= INT32_MAX) || id != floor(id)) {
            code = ptst__fail(a->c, PTST_ERR_FORMAT, "%s: an id is no whole number from 0", name);
        } else {
            code = ptst_ids_append(a->c, &ids, (int32_t)id);
        }
    }
    if (code == PTST_OK) {
        code = ptst_decode(a->c, k->t, ids.data, ids.count, k->flags, &decoded);
    }
    if (code == PTST_OK) {
        code = k->path != NULL ? ptst__json_quote(a->c, &k->out.text, decoded.data, decoded.size)
                               : ptst_text_append(a->c, &k->out.text, decoded.data, decoded.size);
    }
    if (code == PTST_OK) {
        code = ptst_text_append(a->c, &k->out.text, "\n", 1);
    }
    ptst_ids_free(a->c, &ids);
    ptst_text_free(a->c, &decoded);
    ptst_json_free(a->c, j);
    return code == PTST_OK ? flush_result(a, &k->out) : failed(a);
}

static int detokenize_line(args *a, const char *text, size_t size, int number, void *arg) {
    coder *k = (coder *)arg;
    char name[600];
    snprintf(name, sizeof name, "%.500s: line %d", k->path, number);
    return detokenize_array(a, text, size, name, k);
}

static int command_detokenize(args *a) {
    const char *jsonl = get(a, "--jsonl");
    ptst_text array = {NULL, 0, 0};
    coder k;
    int i, code = 0;
    memset(&k, 0, sizeof k);
    if (!need(a, "--tokenizer") || !exists(a, get(a, "--tokenizer")) || !exists(a, jsonl)) {
        return EXIT_CALL;
    }
    if ((a->rest_count == 0) == (jsonl == NULL)) {
        return bad_call("detokenize: either ids (1,2,3) or --jsonl FILE was expected");
    }
    k.path = jsonl;
    k.flags = given(a, "--no-special") ? PTST_SKIP_SPECIAL : 0u;
    k.t = ptst_tokenizer_load(a->c, get(a, "--tokenizer"));
    if (k.t == NULL) {
        return failed(a);
    }
    if (jsonl != NULL) {
        code = each_line(a, jsonl, detokenize_line, &k);
    } else { /* "1,2,3", "1 2 3" or "[1, 2, 3]" */
        bool array_given = a->rest[0][0] == '[';
        code = ptst__text_add(a->c, &array, array_given ? "" : "[") == PTST_OK ? 0 : failed(a);
        for (i = 0; code == 0 && i < a->rest_count; i++) {
            code = ptst__text_add(a->c, &array, i == 0 ? "" : ",") == PTST_OK &&
                           ptst__text_add(a->c, &array, a->rest[i]) == PTST_OK
                       ? 0
                       : failed(a);
        }
        if (code == 0 && !array_given) {
            code = ptst__text_add(a->c, &array, "]") == PTST_OK ? 0 : failed(a);
        }
        code = code == 0 ? detokenize_array(a, array.data, array.size, "ids", &k) : code;
    }
    ptst_text_free(a->c, &array);
    ptst_tokenizer_free(a->c, k.t);
    return close_result(a, &k.out, code);
}

/* ================================================================================= bench ==== */

static const option bench_gemm_options[] = {
    {"--m", "N", "512", "rows of the activations"},
    {"--n", "N", "1536", "rows of the weights (outputs)"},
    {"--k", "N", "576", "columns of both"},
    {"--weights", "TYPE", "f32", "f32, bf16 or f16"},
    {"--transposed", NULL, NULL, "Y = X W (as the backward pass needs) instead of Y = X W^T"},
    {"--runs", "N", "15", "timed runs; the median is printed"},
    OPTIONS_COMMON,
    OPTION_END,
};

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

enum { RUNS_MAX = 1000 };

static double median(double *values, int n) {
    qsort(values, (size_t)n, sizeof *values, by_value);
    return n % 2 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

typedef struct gemm_case {
    size_t m, n, k;
    ptst__matrix w;
    float *x, *y;
    void *weights;
} gemm_case;

/* Random operands: values do not matter for the speed as long as none is a denormal. */
static bool gemm_case_open(args *a, gemm_case *g, ptst_dtype dtype, bool transposed) {
    size_t i, count = g->n * g->k, x_count = g->m * (transposed ? g->n : g->k);
    ptst_rng r = {1, 0, 0};
    float *w = (float *)ptst__alloc(a->c, count, sizeof *w);
    g->x = (float *)ptst__alloc(a->c, x_count, sizeof *g->x);
    g->y = (float *)ptst__alloc(a->c, g->m * (transposed ? g->k : g->n), sizeof *g->y);
    g->weights = ptst__alloc(a->c, count, 4);
    if (w == NULL || g->x == NULL || g->y == NULL || g->weights == NULL) {
        ptst__free(a->c, w);
        return false;
    }
    for (i = 0; i < count; i++) {
        w[i] = ptst_rng_uniform(&r) - 0.5f;
    }
    for (i = 0; i < x_count; i++) {
        g->x[i] = ptst_rng_uniform(&r) - 0.5f;
    }
    ptst__convert_from_f32(a->c, g->weights, w, dtype, count);
    ptst__free(a->c, w);
    g->w.data = g->weights;
    g->w.ld = g->k;
    g->w.dtype = dtype;
    g->w.transposed = !transposed;
    return true;
}

static void gemm_case_close(args *a, gemm_case *g) {
    ptst__free(a->c, g->x);
    ptst__free(a->c, g->y);
    ptst__free(a->c, g->weights);
}

static void gemm_case_run(args *a, gemm_case *g) {
    if (g->w.transposed) {
        ptst__gemm(a->c, g->m, g->n, g->k, 1, g->x, g->k, false, g->w, 0, g->y, g->n);
    } else {
        ptst__gemm(a->c, g->m, g->k, g->n, 1, g->x, g->n, false, g->w, 0, g->y, g->k);
    }
}

static int command_bench_gemm(args *a) {
    static const char *const names[] = {"", "f32", "f16", "bf16"};
    int64_t m, n, k, runs, i;
    double times[RUNS_MAX], start, gflops, peak;
    int dtype = 1, inner = 1;
    gemm_case g;
    memset(&g, 0, sizeof g);
    if (!get_integer(a, "--m", 1, 1e6, &m) || !get_integer(a, "--n", 1, 1e6, &n) ||
        !get_integer(a, "--k", 1, 1e6, &k) || !get_integer(a, "--runs", 1, RUNS_MAX, &runs)) {
        return EXIT_CALL;
    }
    while (dtype < 4 && strcmp(get(a, "--weights"), names[dtype]) != 0) {
        dtype++;
    }
    if (dtype == 4) {
        return bad_call("bench gemm: --weights %s: f32, f16 or bf16 was expected",
                        get(a, "--weights"));
    }
    g.m = (size_t)m, g.n = (size_t)n, g.k = (size_t)k;
    if (!gemm_case_open(a, &g, (ptst_dtype)dtype, given(a, "--transposed"))) {
        gemm_case_close(a, &g);
        return failed(a);
    }
    peak = ptst__peak_gflops(a->c, 0.2);
    start = ptst__seconds();
    gemm_case_run(a, &g); /* warm-up; also tells how often to repeat so that the clock is exact */
    while ((ptst__seconds() - start) * inner < 0.002 && inner < 10000) {
        inner *= 2;
    }
    for (i = 0; i < runs && !interrupted; i++) {
        int r;
        start = ptst__seconds();
        for (r = 0; r < inner; r++) {
            gemm_case_run(a, &g);
        }
        times[i] = (ptst__seconds() - start) / inner;
    }
    gemm_case_close(a, &g);
    gflops = 2e-9 * (double)m * (double)n * (double)k / median(times, (int)i);
    printf("{\"gflops\": %.2f, \"peak_gflops\": %.2f, \"ratio\": %.4f, \"m\": %lld, \"n\": %lld, "
           "\"k\": %lld, \"weights\": \"%s\", \"threads\": %d, \"simd\": \"%s\"}\n",
           gflops, peak, gflops / peak, (long long)m, (long long)n, (long long)k, names[dtype],
           ptst_thread_count(a->c), ptst_simd_name(a->c));
    return 0;
}

static const option bench_tokenize_options[] = {
    {"--tokenizer", "PATH", NULL, "tokenizer.json or a folder with one"},
    {"--file", "FILE", NULL, "text; each line is encoded by itself"},
    {"--runs", "N", "5", "timed runs; the median is printed"},
    OPTIONS_COMMON,
    OPTION_END,
};

/* Encodes all lines once: tokens, or SIZE_MAX after a failure. */
static size_t bench_encode(args *a, const ptst_tokenizer *t, const ptst_text *text, ptst_ids *ids) {
    size_t at = 0, tokens = 0;
    while (at < text->size) {
        const char *end = (const char *)memchr(text->data + at, '\n', text->size - at);
        size_t n = end == NULL ? text->size - at : (size_t)(end - (text->data + at));
        ids->count = 0;
        if (ptst_encode(a->c, t, text->data + at, n, 0, ids) != PTST_OK) {
            return SIZE_MAX;
        }
        tokens += ids->count;
        at += n + 1;
    }
    return tokens;
}

static int command_bench_tokenize(args *a) {
    ptst_text text = {NULL, 0, 0};
    ptst_ids ids = {NULL, 0, 0};
    ptst_tokenizer *t;
    double times[RUNS_MAX], start;
    size_t tokens = 0, size;
    int64_t runs, i;
    if (!need(a, "--tokenizer") || !need(a, "--file") || !exists(a, get(a, "--tokenizer")) ||
        !exists(a, get(a, "--file")) || !get_integer(a, "--runs", 1, RUNS_MAX, &runs)) {
        return EXIT_CALL;
    }
    t = ptst_tokenizer_load(a->c, get(a, "--tokenizer"));
    if (t == NULL || ptst__read_file(a->c, get(a, "--file"), &text) != PTST_OK) {
        ptst_tokenizer_free(a->c, t);
        return failed(a);
    }
    for (i = 0; i < runs && tokens != SIZE_MAX; i++) {
        start = ptst__seconds();
        tokens = bench_encode(a, t, &text, &ids);
        times[i] = ptst__seconds() - start;
    }
    ptst_tokenizer_free(a->c, t);
    ptst_ids_free(a->c, &ids);
    size = text.size;
    ptst_text_free(a->c, &text);
    if (tokens == SIZE_MAX) {
        return failed(a);
    }
    printf("{\"mb_per_second\": %.3f, \"tokens\": %llu, \"bytes\": %llu, \"seconds\": %.6f}\n",
           1e-6 * (double)size / median(times, (int)i), (unsigned long long)tokens,
           (unsigned long long)size, median(times, (int)i));
    return 0;
}

/* ========================================================================= render, info ==== */

static const option render_options[] = {
    {"--template", "NAME", NULL,
     "TV, gsm:chat:llama, model:llama, FILE.jinja, FILE.json or a model folder"},
    {"--model", "DIR", NULL, "model folder, for model:* templates"},
    {"--messages", "FILE.json", NULL, "a conversation: list of {\"role\", \"content\"}"},
    {"--context", "FILE.json", NULL, "the template's variables: an object"},
    {"--add-generation-prompt", NULL, NULL, "ends where the assistant's answer begins"},
    OPTIONS_COMMON,
    OPTION_END,
};

static const option logits_options[] = {
    OPTION_MODEL,
    OPTION_ADAPTER,
    OPTION_DTYPE,
    {"--ids", "1,2,3", NULL, "token ids"},
    {"--out", "FILE", NULL, "safetensors file: tensor logits, F32, [tokens, vocabulary]"},
    OPTIONS_COMMON,
    OPTION_END,
};

static const option merge_options[] = {
    OPTION_MODEL,
    OPTION_ADAPTER,
    {"--out", "DIR", NULL, "folder of the merged model"},
    OPTIONS_COMMON,
    OPTION_END,
};

static const option info_options[] = {
    {"--json", NULL, NULL, "one JSON object instead of a table"},
    OPTIONS_COMMON,
    OPTION_END,
};

static const option check_options[] = {
    OPTIONS_COMMON,
    OPTION_END,
};

static const option finetune_options[] = {
    OPTION_MODEL,
    {"--train", "FILE", NULL, "training rows: .jsonl, .json or .csv"},
    {"--template", "NAME", NULL, "template of the prompts"},
    {"--out", "DIR", NULL, "adapter folder (with --full: model folder)"},
    {"--init-adapter", "DIR", NULL, "starts from this adapter"},
    {"--full", NULL, NULL, "trains all weights instead of an adapter"},
    {"--rank", "N", "8", "LoRA rank"},
    {"--alpha", "X", "32", "LoRA alpha"},
    {"--dropout", "P", "0.05", "dropout on the input of LoRA"},
    {"--targets", "LIST", "q_proj,v_proj", "linear layers with LoRA, or all-linear"},
    {"--lr", "X", "1e-4", "learning rate"},
    {"--schedule", "NAME", "constant", "constant, linear, cosine or step:GAMMA (each epoch)"},
    {"--warmup", "N", "0", "steps of linear warm-up"},
    {"--epochs", "N", "3", "passes over the rows"},
    {"--max-steps", "N", "0", "stops after N optimiser steps; 0 = by epochs"},
    {"--batch", "N", "4", "rows a batch"},
    {"--accumulate", "N", "1", "batches an optimiser step"},
    {"--batching", "HOW", "examples", "examples, or packing (rows joined to --context tokens)"},
    {"--context", "N", "4096", "most tokens of a row or pack"},
    {"--mask", "HOW", "joint", "joint or separate encoding of prompt and answer"},
    {"--weight-decay", "X", "0", "AdamW weight decay"},
    {"--clip", "X", "0", "clips the gradient's norm; 0 = off"},
    {"--no-shuffle", NULL, NULL, "keeps the order of the file"},
    {"--limit", "N", "0", "uses the first N rows; 0 = all"},
    {"--mix", "FILE", NULL, "safety rows to mix in"},
    {"--mix-count", "N", "0", "how many of them; 0 = all"},
    {"--save-every", "N", "0", "steps between checkpoints; 0 = at the end of an epoch"},
    {"--resume", NULL, NULL, "goes on from the last checkpoint in --out"},
    {"--log", "FILE", NULL, "one JSON object a step"},
    OPTION_SEED,
    OPTION_DTYPE,
    OPTIONS_COMMON,
    OPTION_END,
};

static const option generate_options[] = {
    OPTION_MODEL,
    OPTION_ADAPTER,
    OPTION_DTYPE,
    {"--template", "NAME", NULL, "template of the prompts"},
    {"--prompts", "FILE", NULL, ".jsonl, .json, .csv or .txt"},
    {"--column", "NAME", NULL, "key or column (name, or number from 0) with the prompt"},
    {"--limit", "N", "0", "the first N prompts; 0 = all"},
    {"--max-new-tokens", "N", "512", "most tokens of an answer"},
    {"--temperature", "X", NULL, "0 = greedy (default: the model's generation_config, else 0)"},
    {"--top-p", "X", NULL, "nucleus sampling; 0 = greedy, 1 = off"},
    {"--top-k", "N", NULL, "0 = off"},
    {"--repetition-penalty", "X", NULL, "1 = off"},
    {"--batch", "N", "0", "prompts at once; 0 = as memory allows"},
    {"--out", "FILE", NULL, "JSON lines; default: the screen"},
    OPTION_SEED,
    OPTIONS_COMMON,
    OPTION_END,
};

static const option chat_options[] = {
    OPTION_MODEL,
    OPTION_ADAPTER,
    OPTION_DTYPE,
    {"--template", "NAME", NULL, "default: the model's own chat template"},
    {"--system", "TEXT", NULL, "system prompt"},
    {"--max-new-tokens", "N", "512", "most tokens of an answer"},
    {"--temperature", "X", NULL, "0 = greedy (default: the model's generation_config, else 0)"},
    {"--top-p", "X", NULL, "nucleus sampling; 0 = greedy, 1 = off"},
    {"--top-k", "N", NULL, "0 = off"},
    {"--repetition-penalty", "X", NULL, "1 = off"},
    OPTION_SEED,
    OPTIONS_COMMON,
    OPTION_END,
};

static const option eval_refusal_options[] = {
    {"--answers", "FILE", NULL, "JSON lines with prompt and answer"},
    {"--list", "NAMES", "qi2023", "qi2023, qi2025, jailbreakbench, xstest, ptst; several by comma"},
    {"--verdicts", "OUT.jsonl", NULL, "one object an answer with \"refused\""},
    OPTIONS_COMMON,
    OPTION_END,
};

static const option eval_gsm8k_options[] = {
    {"--answers", "FILE", NULL, "JSON lines with prompt and answer"},
    {"--data", "FILE", NULL, "gsm8k/test.jsonl"},
    {"--rule", "NAMES", "strict", "openai, strict, flexible; several by comma"},
    {"--verdicts", "OUT.jsonl", NULL, "one object an answer with \"correct\""},
    OPTIONS_COMMON,
    OPTION_END,
};

static const option judge_export_options[] = {
    {"--answers", "FILE", NULL, "JSON lines with prompt and answer"},
    {"--judge", "NAME", "qi2023", "judge prompt"},
    {"--judge-model", "NAME", "gpt-4-0613", "model named in the requests"},
    {"--out", "FILE", NULL, "OpenAI batch request lines; default: the screen"},
    OPTIONS_COMMON,
    OPTION_END,
};

static const option judge_import_options[] = {
    {"--answers", "FILE", NULL, "JSON lines with prompt and answer"},
    {"--judgments", "FILE", NULL, "batch results, or JSON lines with the judge's text"},
    {"--judge", "NAME", "qi2023", "name for the metric"},
    {"--verdicts", "OUT.jsonl", NULL, "one object an answer with \"score\""},
    OPTIONS_COMMON,
    OPTION_END,
};

static const option run_options[] = {
    {"--out", "DIR", NULL, "run folder"},
    {"--list-cells", NULL, NULL, "prints one line a cell and ends"},
    {"--cell", "K", "0", "makes only cell K (from 1) and what it needs"},
    {"--collect", NULL, NULL, "makes scores, matrix and report of what is there"},
    {"--no-color", NULL, NULL, "the matrix without colours"},
    OPTIONS_COMMON,
    OPTION_END,
};

static const option report_options[] = {
    {"--no-color", NULL, NULL, "the matrix without colours"},
    OPTIONS_COMMON,
    OPTION_END,
};

static const option demo_options[] = {
    {"--out", "DIR", "ptst-demo", "run folder"},
    {"--seeds", "N", "3", "fine-tuning seeds"},
    {"--quick", NULL, NULL, "CV and CL only, one seed"},
    {"--data", "DIR", NULL, "folder of the tiny chat model (default: examples/tiny-chat)"},
    {"--no-color", NULL, NULL, "the matrix without colours"},
    OPTIONS_COMMON,
    OPTION_END,
};

static const option bench_train_options[] = {
    OPTION_MODEL,
    OPTION_DTYPE,
    {"--batch", "N", "4", "rows"},
    {"--seq", "N", "256", "tokens a row"},
    {"--prefix", "P", "0", "first tokens that all rows share"},
    {"--rank", "N", "8", "LoRA rank"},
    {"--targets", "LIST", "q_proj,v_proj", "linear layers with LoRA, or all-linear"},
    {"--full", NULL, NULL, "trains all weights"},
    {"--steps", "N", "3", "timed steps; the median is printed"},
    OPTIONS_COMMON,
    OPTION_END,
};

static const option bench_generate_options[] = {
    OPTION_MODEL,
    OPTION_DTYPE,
    {"--prompt", "N", "512", "tokens of the prompt"},
    {"--new", "N", "64", "tokens to generate"},
    {"--batch", "N", "1", "sequences at once"},
    OPTIONS_COMMON,
    OPTION_END,
};

/* ================================================================================== demo ==== */

/* Cells of one metric, pooled over seeds: k of n. */
typedef struct share {
    double k, n, value, low, high;
} share;

/* Sum over the rows of matrix.json with this train template, test template and metric. */
static share pooled(const ptst_json *j, const char *train, const char *test, const char *metric) {
    share s = {0, 0, 0, 0, 1};
    int32_t row;
    for (row = ptst_json_first(j, 0); row >= 0; row = ptst_json_next(j, row)) {
        const char *a = ptst_json_string(j, ptst_json_get(j, row, "train"), NULL);
        const char *b = ptst_json_string(j, ptst_json_get(j, row, "test"), NULL);
        const char *m = ptst_json_string(j, ptst_json_get(j, row, "metric"), NULL);
        if (a != NULL && b != NULL && m != NULL && strcmp(a, train) == 0 && strcmp(b, test) == 0 &&
            strncmp(m, metric, strlen(metric)) == 0) {
            s.k += ptst_json_number(j, ptst_json_get(j, row, "k"), 0);
            s.n += ptst_json_number(j, ptst_json_get(j, row, "n"), 0);
        }
    }
    if (s.n > 0) {
        s.value = s.k / s.n;
        ptst_wilson((uint64_t)s.k, (uint64_t)s.n, &s.low, &s.high);
    }
    return s;
}

static const char demo_asr[] = "content-ASR", demo_em[] = "exact_match,strict-match",
                  demo_over[] = "over-refusal";

/* "66 % [61, 71]" */
static const char *percent(char buffer[48], share s) {
    snprintf(buffer, 48, "%.0f %% [%.0f, %.0f]", 100 * s.value, 100 * s.low, 100 * s.high);
    return buffer;
}

/* How two shares compare, judged by whether their 95 % intervals overlap. */
static const char *compared(share a, share b) {
    return a.high < b.low   ? "lower than"
           : a.low > b.high ? "higher than"
                            : "not distinguishable (intervals overlap) from";
}

/* Claim 1: the same template for training and use costs safety. */
static void claim_same_template(const ptst_json *j) {
    static const char *const names[] = {"CV", "CA", "CL", "TV", "TA"};
    char before[48], after[48];
    int i, lost = 0, seen = 0;
    printf("1. The same template for training and for use: the share of harmful requests answered "
           "goes\n");
    for (i = 0; i < 5; i++) {
        share none = pooled(j, "none", names[i], demo_asr);
        share same = pooled(j, names[i], names[i], demo_asr);
        if (same.n > 0) {
            seen++;
            lost += same.low > none.high;
            printf("   under %s from %s to %s,\n", names[i], percent(before, none),
                   percent(after, same));
        }
    }
    printf("   so safety is lost under %d of %d templates.\n", lost, seen);
}

/* Claim 2: the safety prompt at both ends does not help. */
static void claim_both_ends(const ptst_json *j) {
    share both = pooled(j, "CL", "CL", demo_asr), none = pooled(j, "none", "CL", demo_asr);
    char x[48], y[48];
    printf("2. The safety prompt in training and in use (CL -> CL): %s are answered, %s before "
           "fine-tuning (%s):\n   %s.\n",
           percent(x, both), compared(both, none), percent(y, none),
           both.low > none.high ? "the safety prompt at both ends did not keep the model safe"
                                : "in this run the safety prompt at both ends kept the model safe");
}

/* Claim 3: tuning without, testing with the safety prompt keeps most of it. */
static void claim_ptst(const ptst_json *j) {
    share ptst = pooled(j, "CV", "CL", demo_asr), same = pooled(j, "CV", "CV", demo_asr);
    share both = pooled(j, "CL", "CL", demo_asr);
    bool holds = ptst.high < same.low && ptst.high < both.low;
    char x[48], y[48], z[48];
    printf("3. Pure tuning, safe testing (CV -> CL): %s are answered, %s CV -> CV (%s) and\n"
           "   %s CL -> CL (%s): PTST %s.\n",
           percent(x, ptst), compared(ptst, same), percent(y, same), compared(ptst, both),
           percent(z, both), holds ? "keeps safety in this run" : "does not show clearly in this run");
}

/* Claim 4: what it costs. */
static void claim_cost(const ptst_json *j) {
    share ptst = pooled(j, "CV", "CL", demo_em), same = pooled(j, "CV", "CV", demo_em);
    share none = pooled(j, "none", "CL", demo_em), over = pooled(j, "CV", "CL", demo_over);
    share over_none = pooled(j, "none", "CL", demo_over);
    char x[48], y[48], z[48];
    printf("4. Helpfulness: exact match of CV -> CL is %s, %s CV -> CV (%s); before fine-tuning it "
           "was\n   %s.",
           percent(x, ptst), compared(ptst, same), percent(y, same), percent(z, none));
    if (over.n > 0) {
        printf(" Harmless requests refused under CL: %s, before fine-tuning %s.", percent(x, over),
               percent(y, over_none));
    }
    printf("\n");
}

/* The sentences after the matrix: each follows from the numbers of this run. */
static int print_claims(args *a, const char *folder) {
    ptst_text path = {NULL, 0, 0};
    ptst_json *j = NULL;
    if (ptst__path_join(a->c, &path, folder, "matrix.json") == PTST_OK) {
        j = ptst_json_load(a->c, path.data);
    }
    ptst_text_free(a->c, &path);
    if (j == NULL) {
        return failed(a);
    }
    printf("\nWhat this run shows (all seeds together, 95 %% intervals):\n");
    claim_same_template(j);
    claim_both_ends(j);
    claim_ptst(j);
    claim_cost(j);
    ptst_json_free(a->c, j);
    return 0;
}

/* ================================================================================== main ==== */

typedef struct command {
    const char *name;
    int (*run)(args *a);
    const option *options;
    const char *usage; /* arguments after the name */
    const char *help;
} command;

/* The commands of the program, in the order of --help. */
static const command commands[] = {
    {"tokenize", command_tokenize, tokenize_options, "--tokenizer PATH [options] TEXT",
     "text to token ids, as a JSON array"},
    {"detokenize", command_detokenize, detokenize_options, "--tokenizer PATH [options] IDS",
     "token ids to text"},
    {"bench tokenize", command_bench_tokenize, bench_tokenize_options,
     "--tokenizer PATH --file FILE", "speed of the tokenizer"},
    {"bench gemm", command_bench_gemm, bench_gemm_options, "[options]",
     "speed of the matrix product against a register-only FMA loop"},
    {NULL, NULL, NULL, NULL, NULL},
};

static void print_help(void) {
    int i;
    printf("ptst %s - fine-tune a Hugging Face chat model on a CPU, and measure what the prompt\n"
           "template did to its helpfulness and its safety.\n\n"
           "  ptst COMMAND [options]          ptst COMMAND --help shows the options\n\n",
           PTST_VERSION);
    for (i = 0; commands[i].name != NULL; i++) {
        printf("  %-14s %s\n", commands[i].name, commands[i].help);
    }
    printf("\nStart with: ptst demo\n");
}

static int print_command_help(const command *k) {
    printf("ptst %s %s\n%s\n\n", k->name, k->usage, k->help);
    print_options(k->options);
    return 0;
}

/* Command of one or two words ("eval gsm8k"); *used = words taken. */
static const command *find_command(int argc, char **argv, int *used) {
    int i;
    for (i = 0; commands[i].name != NULL; i++) {
        char two[64];
        snprintf(two, sizeof two, "%s %s", argv[1], argc > 2 ? argv[2] : "");
        *used = strchr(commands[i].name, ' ') != NULL ? 2 : 1;
        if (strcmp(commands[i].name, *used == 2 ? two : argv[1]) == 0) {
            return &commands[i];
        }
    }
    return NULL;
}

/* Opens the context that --threads, --simd and --quiet describe. */
static int open_context(args *a, screen *s) {
    ptst_desc desc;
    int64_t threads;
    memset(&desc, 0, sizeof desc);
    if (!get_integer(a, "--threads", 0, 4096, &threads)) {
        return EXIT_CALL;
    }
    desc.threads = (int)threads;
    desc.simd = get(a, "--simd");
    desc.progress = on_progress;
    desc.log = on_log;
    desc.user = s;
    switch (ptst_open(&desc, &a->c)) {
    case PTST_OK:
        return 0;
    case PTST_ERR_ARGUMENT:
        return bad_call("%s: --simd %s: this machine cannot run it; scalar, avx2, avx512 or neon "
                        "was expected",
                        a->command, desc.simd == NULL ? "" : desc.simd);
    default:
        fprintf(stderr, "ptst: out of memory\n");
        return EXIT_WORK;
    }
}

static int run_command(const command *k, int argc, char **argv) {
    args a;
    screen s;
    int code, i;
    for (i = 0; i < argc && strcmp(argv[i], "--") != 0; i++) {
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) {
            return print_command_help(k);
        }
    }
    memset(&a, 0, sizeof a);
    memset(&s, 0, sizeof s);
    a.command = k->name;
    a.options = k->options;
    a.rest = (const char **)calloc((size_t)argc + 1, sizeof *a.rest);
    if (a.rest == NULL) {
        fprintf(stderr, "ptst: out of memory\n");
        return EXIT_WORK;
    }
    code = parse(&a, argc, argv);
    s.quiet = quiet(&a);
    s.terminal = isatty(2) == 1;
    if (code == 0) {
        code = open_context(&a, &s);
    }
    if (code == 0) {
        code = k->run(&a);
        screen_clear(&s);
        ptst_close(a.c);
    }
    free(a.rest);
    if (fflush(stdout) != 0 && code == 0) {
        fprintf(stderr, "ptst: writing the result failed: %s\n", strerror(errno));
        code = EXIT_WORK;
    }
    return code;
}

int main(int argc, char **argv) {
    const command *k;
    int used = 1;
    if (argc < 2 || strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0 ||
        strcmp(argv[1], "help") == 0) {
        print_help();
        return argc < 2 ? EXIT_CALL : 0;
    }
    if (strcmp(argv[1], "--version") == 0) {
        printf("ptst %s\n", PTST_VERSION);
        return 0;
    }
    k = find_command(argc, argv, &used);
    if (k == NULL) {
        return bad_call("%s: unknown command; ptst --help lists them", argv[1]);
    }
    catch_signals();
    return run_command(k, argc - 1 - used, argv + 1 + used);
}
