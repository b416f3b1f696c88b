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
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <termios.h>

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
#define OPTION_SIMD {"--simd", "NAME", NULL, "scalar, avx2, avx512, amx or neon (default: best)"}
#define OPTION_PRECISION                                                                           \
    {"--float32-matmul-precision", "WORD", "highest",                                              \
     "highest, high or medium: less is faster with AMX, see ptst_desc"}
#define OPTIONS_COMMON FLAG_QUIET, OPTION_THREADS, OPTION_SIMD, OPTION_PRECISION
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

/* ================================================================== memory that is counted ==== */

/* For `plan`: what the library holds, through an allocator that counts. */
typedef struct memory {
    pthread_mutex_t lock;
    size_t live, peak;
    size_t held, before; /* the most live, and the first peak, when a plan was ready */
} memory;

static void *memory_alloc(void *user, size_t size) {
    memory *m = (memory *)user;
    void *p = malloc(size);
    if (p != NULL) {
        pthread_mutex_lock(&m->lock);
        m->live += size;
        m->peak = m->live > m->peak ? m->live : m->peak;
        pthread_mutex_unlock(&m->lock);
    }
    return p;
}

static void memory_release(void *user, void *pointer, size_t size) {
    memory *m = (memory *)user;
    if (pointer != NULL) {
        pthread_mutex_lock(&m->lock);
        m->live -= size;
        pthread_mutex_unlock(&m->lock);
        free(pointer);
    }
}

/* A plan is ready; nothing of what it says has been taken yet. */
static void memory_note(memory *m) {
    m->before = m->held == 0 ? m->peak : m->before;
    m->held = m->live > m->held ? m->live : m->held;
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
    memory *counted; /* NULL = memory is not counted */
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
    if (s->counted != NULL && strcmp(p->stage, "plan") == 0) {
        memory_note(s->counted);
        return interrupted;
    }
    if (!s->quiet) {
        if (strcmp(s->stage, p->stage) != 0 || strcmp(s->item, item) != 0) {
            snprintf(s->stage, sizeof s->stage, "%s", p->stage);
            snprintf(s->item, sizeof s->item, "%s", item);
            s->started = now;
            s->first_done = p->done;
            s->last = s->terminal ? 0 : s->last; /* lines come by time, whatever the stage */
        }
        if (now - s->last >= (s->terminal ? 0.1 : 10.0)) {
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

/* One line of a .jsonl file; NULL on failure, with the number of the line in the sentence. */
static ptst_json *parse_line(args *a, const char *text, size_t size, const char *path, int number) {
    ptst_json *j = ptst_json_parse(a->c, text, size, "-");
    const char *reason = ptst_error_text(a->c);
    if (j == NULL) {
        char copy[400]; /* "-: line 1: what was expected" */
        snprintf(copy, sizeof copy, "%.390s",
                 strncmp(reason, "-: line 1: ", 11) == 0 ? reason + 11 : reason);
        ptst__fail(a->c, ptst_error_code(a->c), "%.500s: line %d: %s", path, number, copy);
    }
    return j;
}

static int tokenize_line(args *a, const char *text, size_t size, int number, void *arg) {
    coder *k = (coder *)arg;
    ptst_json *j;
    const char *s;
    size_t n;
    int code;
    j = parse_line(a, text, size, k->path, number);
    if (j == NULL) {
        return failed(a);
    }
    s = ptst_json_string(j, 0, &n);
    if (s == NULL) {
        ptst__fail(a->c, PTST_ERR_FORMAT, "%.500s: line %d: a JSON string was expected", k->path,
                   number);
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

/* Ids of a JSON array (freed here; NULL: it could not be read) -> decoded text in k->out (quoted if it comes from a file). */
static int detokenize_array(args *a, ptst_json *j, const char *name, coder *k) {
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
    return detokenize_array(a, parse_line(a, text, size, k->path, number), name, k);
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
        code = code == 0 ? detokenize_array(
                               a, ptst_json_parse(a->c, array.data, array.size, "ids"), "ids", &k)
                         : code;
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
    {"--weights", "TYPE", "f32", "f32, bf16, f16, int8 or int4; few rows as when making text"},
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
    size_t blocks = (g->k + PTST__BLOCK - 1) / PTST__BLOCK * PTST__BLOCK;
    size_t ld = ptst__is_block(dtype) ? blocks : g->k;
    size_t i, count = g->n * ld, x_count = g->m * (transposed ? g->n : g->k);
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
        w[i] = i % ld < g->k ? ptst_rng_uniform(&r) - 0.5f : 0;
    }
    for (i = 0; i < x_count; i++) {
        g->x[i] = ptst_rng_uniform(&r) - 0.5f;
    }
    ptst__convert_from_f32(a->c, g->weights, w, dtype, count);
    ptst__free(a->c, w);
    g->w.data = g->weights;
    g->w.ld = ld;
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
        ptst__product p = ptst__product_make(a->c, g->m, g->n, g->k, 1, g->x, g->k, false, g->w, 0,
                                             g->y, g->n);
        p.whole = true;
        ptst__gemm_run(a->c, &p);
    } else {
        ptst__gemm(a->c, g->m, g->k, g->n, 1, g->x, g->n, false, g->w, 0, g->y, g->k);
    }
}

static int command_bench_gemm(args *a) {
    static const char *const names[] = {"", "f32", "f16", "bf16", "int8", "int4"};
    int64_t m, n, k, runs, i;
    double times[RUNS_MAX], start, gflops, peak, seconds;
    int dtype = 1, inner = 1;
    gemm_case g;
    memset(&g, 0, sizeof g);
    if (!get_integer(a, "--m", 1, 1e6, &m) || !get_integer(a, "--n", 1, 1e6, &n) ||
        !get_integer(a, "--k", 1, 1e6, &k) || !get_integer(a, "--runs", 1, RUNS_MAX, &runs)) {
        return EXIT_CALL;
    }
    while (dtype < 6 && strcmp(get(a, "--weights"), names[dtype]) != 0) {
        dtype++;
    }
    if (dtype == 6) {
        return bad_call("bench gemm: --weights %s: f32, f16, bf16, int8 or int4 was expected",
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
    seconds = median(times, (int)i);
    gflops = 2e-9 * (double)m * (double)n * (double)k / seconds;
    printf("{\"gflops\": %.2f, \"peak_gflops\": %.2f, \"ratio\": %.4f, \"weights_gb_per_second\": "
           "%.2f, "
           "\"m\": %lld, \"n\": %lld, "
           "\"k\": %lld, \"weights\": \"%s\", \"threads\": %d, \"simd\": \"%s\"}\n",
           gflops, peak, gflops / peak,
           1e-9 * (double)n * (double)ptst__dtype_bytes((ptst_dtype)dtype, g.w.ld) / seconds,
           (long long)m, (long long)n, (long long)k, names[dtype], ptst_thread_count(a->c),
           ptst_simd_name(a->c));
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
    double times[RUNS_MAX], start, load;
    size_t tokens = 0, size;
    int64_t runs, i;
    if (!need(a, "--tokenizer") || !need(a, "--file") || !exists(a, get(a, "--tokenizer")) ||
        !exists(a, get(a, "--file")) || !get_integer(a, "--runs", 1, RUNS_MAX, &runs)) {
        return EXIT_CALL;
    }
    start = ptst__seconds();
    t = ptst_tokenizer_load(a->c, get(a, "--tokenizer"));
    load = ptst__seconds() - start;
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
    printf("{\"mb_per_second\": %.3f, \"tokens\": %llu, \"bytes\": %llu, \"seconds\": %.6f, "
           "\"load_seconds\": %.6f}\n",
           1e-6 * (double)size / median(times, (int)i), (unsigned long long)tokens,
           (unsigned long long)size, median(times, (int)i), load);
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
    {"--quantization-error", NULL, NULL, "what int8 and int4 weights of a model cost"},
    {"--text", "FILE", NULL, "text to measure that on (default: a built-in paragraph)"},
    OPTIONS_COMMON,
    OPTION_END,
};

static const option check_options[] = {
    OPTIONS_COMMON,
    OPTION_END,
};

#define FINETUNE_OPTIONS                                                                           \
    OPTION_MODEL,                                                                                  \
    {"--train", "FILE", NULL, "training rows: .jsonl, .json or .csv"},                             \
    {"--template", "NAME", NULL, "template of the prompts"},                                       \
    {"--out", "DIR", NULL, "adapter folder (with --full: model folder)"},                          \
    {"--init-adapter", "DIR", NULL, "starts from this adapter"},                                   \
    {"--full", NULL, NULL, "trains all weights instead of an adapter"},                            \
    {"--rank", "N", "8", "LoRA rank"},                                                             \
    {"--alpha", "X", "32", "LoRA alpha"},                                                          \
    {"--dropout", "P", "0.05", "dropout on the input of LoRA"},                                    \
    {"--targets", "LIST", "q_proj,v_proj", "linear layers with LoRA, or all-linear"},              \
    {"--modules-to-save", "LIST", NULL, "trains copies of embed_tokens, lm_head or both as well"}, \
    {"--lr", "X", "1e-4", "learning rate"},                                                        \
    {"--schedule", "NAME", "constant", "constant, linear, cosine or step:GAMMA (each epoch)"},     \
    {"--warmup", "N", "0", "steps of linear warm-up"},                                             \
    {"--epochs", "N", "3", "passes over the rows"},                                                \
    {"--max-steps", "N", "0", "stops after N optimiser steps; 0 = by epochs"},                     \
    {"--batch", "N", "4", "rows a batch"},                                                         \
    {"--accumulate", "N", "1", "batches an optimiser step"},                                       \
    {"--batching", "HOW", "examples", "examples, or packing (rows joined to --context tokens)"},   \
    {"--context", "N", "4096", "most tokens of a row or pack"},                                    \
    {"--mask", "HOW", "joint", "joint or separate encoding of prompt and answer"},                 \
    {"--long-rows", "HOW", "cut", "rows longer than the context: cut, drop or error"},             \
    {"--weight-decay", "X", "0", "AdamW weight decay"},                                            \
    {"--clip", "X", "0", "clips the gradient's norm; 0 = off"},                                    \
    {"--micro-batch-tokens", "N", "0", "computes a batch in parts of about N tokens; 0 = by model"},\
    {"--gradient-checkpointing", NULL, NULL,                                                       \
     "less memory for about 40 % more time, the same results"},                                    \
    {"--no-shuffle", NULL, NULL, "keeps the order of the file"},                                   \
    {"--limit", "N", "0", "uses the first N rows; 0 = all"},                                       \
    {"--mix", "FILE", NULL, "safety rows to mix in"},                                              \
    {"--mix-count", "N", "0", "how many of them; 0 = all"},                                        \
    {"--save-every", "N", "0", "steps between checkpoints; 0 = at the end of an epoch"},           \
    {"--resume", NULL, NULL, "goes on from the last checkpoint in --out"},                         \
    {"--log", "FILE", NULL, "one JSON object a step"},                                             \
    OPTION_SEED,                                                                                   \
    OPTION_DTYPE,                                                                                  \
    OPTIONS_COMMON

static const option finetune_options[] = {
    FINETUNE_OPTIONS,
    OPTION_END,
};

static const option plan_options[] = {
    FINETUNE_OPTIONS,
    {"--probe-seconds", "X", "10", "times some steps (and answers) for about so long; 0 = none"},
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
    {"--max-new-tokens", "N", NULL, "most tokens of an answer (default: the model's, else 512)"},
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

static const option probe_options[] = {
    OPTION_MODEL,
    OPTION_ADAPTER,
    OPTION_DTYPE,
    {"--base-adapter", "DIR", "none", "adapter of the model before fine-tuning, or none"},
    {"--template", "NAME", NULL, "template of the prompts"},
    {"--prompts", "FILE", NULL, ".jsonl, .json, .csv or .txt"},
    {"--column", "NAME", NULL, "key or column (name, or number from 0) with the prompt"},
    {"--limit", "N", "0", "the first N prompts; 0 = all"},
    {"--refusals", "FILE", NULL, "beginnings of refusals, one a line (default: built-in ones)"},
    {"--positions", "N", "16", "of the answer from before, whose divergence is measured"},
    {"--prefill", "TEXT", "Sure, here is", "what answers are begun with"},
    {"--prefill-base", NULL, NULL, "begins them with the answer from before fine-tuning instead"},
    {"--prefilled", "LIST", "0,1,2,3,4", "how many tokens of it, one answer each"},
    {"--list", "NAME", "qi2023", "judge: qi2023, qi2025, jailbreakbench, xstest or ptst"},
    {"--max-new-tokens", "N", "128", "most tokens of an answer after those"},
    {"--out", "FILE", NULL, "one object a prompt, with its answers"},
    OPTIONS_COMMON,
    OPTION_END,
};

static const option chat_options[] = {
    OPTION_MODEL,
    OPTION_ADAPTER,
    OPTION_DTYPE,
    {"--template", "NAME", NULL, "default: the model's own chat template"},
    {"--system", "TEXT", NULL, "system prompt"},
    {"--max-new-tokens", "N", NULL, "most tokens of an answer (default: the model's, else 512)"},
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
    {"--out", "FILE", NULL, "OpenAI batch request lines"},
    OPTIONS_COMMON,
    OPTION_END,
};

static const option judge_local_options[] = {
    {"--model", "DIR", NULL, "the judge: Hugging Face model folder"},
    OPTION_DTYPE,
    {"--answers", "FILE", NULL, "JSON lines with prompt and answer"},
    {"--judge", "NAME", "qi2023", "judge prompt"},
    {"--template", "NAME", "model:none", "how the judge is asked"},
    {"--max-new-tokens", "N", "512", "most tokens of a judgment"},
    {"--verdicts", "OUT.jsonl", NULL, "one object an answer with \"score\", null = not parsed"},
    {"--out", "FILE", NULL, "the judgments, as judge import reads them"},
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
    {"--micro-batch-tokens", "N", "0", "computes a batch in parts of about N tokens; 0 = by model"},
    {"--gradient-checkpointing", NULL, NULL, "computes the layers again for the backward pass"},
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

/* Reads a JSON file that the user named, with a byte order mark or without; NULL after the sentence
   and the exit code. */
static ptst_json *load_json(args *a, const char *path, int *code) {
    ptst_json *j = NULL;
    ptst_text text = {NULL, 0, 0};
    size_t mark;
    *code = EXIT_CALL;
    if (!exists(a, path)) {
        return NULL;
    }
    if (ptst__read_file(a->c, path, &text) == PTST_OK) {
        mark = text.size >= 3 && memcmp(text.data, "\xEF\xBB\xBF", 3) == 0 ? 3 : 0;
        j = ptst_json_parse(a->c, text.data + mark, text.size - mark, path);
    }
    *code = j == NULL ? failed(a) : 0;
    ptst_text_free(a->c, &text);
    return j;
}

/* A template by name or path; NULL after the sentence and the exit code (2 for an unknown name). */
static ptst_template *load_template(args *a, const char *name, const char *model, int *code) {
    ptst_template *t = ptst_template_load(a->c, name, model);
    *code = 0;
    if (t == NULL) {
        *code = failed(a);
        if (ptst_error_code(a->c) == PTST_ERR_NOT_FOUND) {
            *code = EXIT_CALL;
        }
    }
    return t;
}

static int command_render(args *a) {
    const char *question, *messages = get(a, "--messages"), *context = get(a, "--context");
    ptst_prompt prompt;
    ptst_template *t;
    ptst_json *j = NULL;
    ptst_code done = PTST_OK;
    int code = 0;
    memset(&prompt, 0, sizeof prompt);
    if (!need(a, "--template") || !one_argument(a, "question", &question) ||
        !exists(a, get(a, "--model"))) {
        return EXIT_CALL;
    }
    if ((question != NULL) + (messages != NULL) + (context != NULL) != 1) {
        return bad_call("render: a question, --messages FILE or --context FILE was expected");
    }
    if (question == NULL) {
        j = load_json(a, messages != NULL ? messages : context, &code);
    }
    t = code != 0 ? NULL : load_template(a, get(a, "--template"), get(a, "--model"), &code);
    if (code == 0) {
        done = question != NULL ? ptst_template_prompt(a->c, t, question, strlen(question), &prompt)
               : messages != NULL
                   ? ptst_template_messages(a->c, t, j, given(a, "--add-generation-prompt"), &prompt)
                   : ptst_template_context(a->c, t, j, &prompt);
        code = done == PTST_OK ? 0 : failed(a);
    }
    if (code == 0 && prompt.text.size != 0) {
        fwrite(prompt.text.data, 1, prompt.text.size, stdout);
    }
    ptst_prompt_free(a->c, &prompt);
    ptst_template_free(a->c, t);
    ptst_json_free(a->c, j);
    return code;
}

/* ================================================================= model and adapter as given */

typedef struct loaded {
    ptst_model *model;
    ptst_adapter *adapter; /* NULL = none */
    ptst_tokenizer *tokenizer;
} loaded;

static void unload(args *a, loaded *l) {
    ptst_tokenizer_free(a->c, l->tokenizer);
    ptst_adapter_free(a->c, l->adapter);
    ptst_model_free(a->c, l->model);
    memset(l, 0, sizeof *l);
}

/* Loads what --model, --adapter and --dtype name; 0, or the exit code after a sentence. */
static int load(args *a, loaded *l, bool tokenizer) {
    ptst_dtype dtype;
    memset(l, 0, sizeof *l);
    if (!need(a, "--model") || !exists(a, get(a, "--model")) || !exists(a, get(a, "--adapter")) ||
        !get_dtype(a, &dtype)) {
        return EXIT_CALL;
    }
    l->model = ptst_model_load(a->c, get(a, "--model"), dtype);
    if (l->model != NULL && get(a, "--adapter") != NULL) {
        l->adapter = ptst_adapter_load(a->c, l->model, get(a, "--adapter"));
    }
    if (l->model == NULL || (get(a, "--adapter") != NULL && l->adapter == NULL)) {
        int code = failed(a);
        unload(a, l);
        return code == EXIT_CALL ? EXIT_WORK : code;
    }
    if (tokenizer) {
        l->tokenizer = ptst_tokenizer_load(a->c, get(a, "--model"));
        if (l->tokenizer == NULL) {
            unload(a, l);
            failed(a);
            return EXIT_WORK;
        }
    }
    return 0;
}

/* "1,2,3" to ids below limit. */
static bool read_ids(args *a, const char *s, int32_t limit, ptst_ids *out) {
    while (*s != 0) {
        char *end;
        long id = strtol(s, &end, 10);
        if (end == s || id < 0 || id >= limit || (*end != ',' && *end != ' ' && *end != 0)) {
            bad_call("%s: --ids %.40s: ids from 0 to %ld, separated by commas, were expected",
                     a->command, s, (long)limit - 1);
            return false;
        }
        if (ptst_ids_append(a->c, out, (int32_t)id) != PTST_OK) {
            failed(a);
            return false;
        }
        s = end;
        while (*s == ',' || *s == ' ') {
            s++;
        }
    }
    if (out->count == 0) {
        bad_call("%s: --ids: at least one id was expected", a->command);
    }
    return out->count != 0;
}

static int command_logits(args *a) {
    ptst_ids ids = {NULL, 0, 0};
    ptst_session *s = NULL;
    ptst_session_desc desc;
    ptst_tensor tensor;
    ptst_chunk chunk;
    loaded l;
    int code = !need(a, "--ids") || !need(a, "--out") ? EXIT_CALL : load(a, &l, false);
    if (code != 0) {
        return code;
    }
    memset(&desc, 0, sizeof desc);
    memset(&tensor, 0, sizeof tensor);
    if (!read_ids(a, get(a, "--ids"), ptst_model_config(l.model)->vocab_size, &ids)) {
        code = EXIT_CALL;
    }
    desc.capacity = desc.batch_tokens = desc.logit_rows = ids.count;
    chunk.slot = 0;
    chunk.tokens = ids.data;
    chunk.count = ids.count;
    chunk.logits = PTST_LOGITS_ALL;
    if (code == 0) {
        s = ptst_session_new(a->c, l.model, l.adapter, &desc);
        code = s == NULL || ptst_eval(a->c, s, &chunk, 1) != PTST_OK ? failed(a) : 0;
    }
    if (code == 0) {
        tensor.name = "logits";
        tensor.dtype = PTST_F32;
        tensor.rank = 2;
        tensor.shape[0] = ids.count;
        tensor.shape[1] = (uint64_t)ptst_model_config(l.model)->vocab_size;
        tensor.data = ptst_logits(s, 0); /* rows lie one after the other */
        code = ptst_tensors_write(a->c, get(a, "--out"), &tensor, 1, NULL) == PTST_OK ? 0
                                                                                      : failed(a);
    }
    ptst_session_free(a->c, s);
    ptst_ids_free(a->c, &ids);
    unload(a, &l);
    return code;
}

static int command_merge(args *a) {
    if (!need(a, "--model") || !need(a, "--adapter") || !need(a, "--out") ||
        !exists(a, get(a, "--model")) || !exists(a, get(a, "--adapter"))) {
        return EXIT_CALL;
    }
    return ptst_merge(a->c, get(a, "--model"), get(a, "--adapter"), get(a, "--out")) == PTST_OK
               ? 0
               : failed(a);
}

/* ========================================================================= info and check ==== */

enum kind {
    KIND_UNKNOWN,
    KIND_MODEL,
    KIND_ADAPTER,
    KIND_TOKENIZER,
    KIND_TENSORS,
    KIND_JSON,
    KIND_JSONL,
    KIND_JINJA
};

static bool ends_with(const char *s, const char *end) {
    size_t n = strlen(s), m = strlen(end);
    return n >= m && strcmp(s + n - m, end) == 0;
}

static bool file_in(args *a, const char *folder, const char *name) {
    ptst_text path = {NULL, 0, 0};
    bool there = ptst__path_join(a->c, &path, folder, name) == PTST_OK &&
                 ptst__path_kind(path.data) == 1;
    ptst_text_free(a->c, &path);
    return there;
}

static enum kind kind_of(args *a, const char *path) {
    if (ptst__path_kind(path) == 2) {
        return file_in(a, path, "adapter_config.json") ? KIND_ADAPTER
               : file_in(a, path, "config.json")       ? KIND_MODEL
               : file_in(a, path, "tokenizer.json") || file_in(a, path, "tokenizer.model")
                   ? KIND_TOKENIZER
                   : KIND_UNKNOWN;
    }
    if (strcmp(path, "tokenizer.json") == 0 || ends_with(path, "/tokenizer.json")) {
        return KIND_TOKENIZER;
    }
    return ends_with(path, ".safetensors") || ends_with(path, ".safetensors.index.json")
               ? KIND_TENSORS
           : ends_with(path, ".jsonl") ? KIND_JSONL
           : ends_with(path, ".json")  ? KIND_JSON
           : ends_with(path, ".jinja") ? KIND_JINJA
                                       : KIND_UNKNOWN;
}

static ptst_code check_jsonl(args *a, const char *path) {
    ptst_text text = {NULL, 0, 0};
    size_t at = 0;
    int number = 1;
    ptst_code code = ptst__read_file(a->c, path, &text);
    if (code == PTST_OK && text.size >= 3 && memcmp(text.data, "\xEF\xBB\xBF", 3) == 0) {
        at = 3;
    }
    for (; code == PTST_OK && at < text.size; number++) {
        const char *end = (const char *)memchr(text.data + at, '\n', text.size - at);
        size_t n = end == NULL ? text.size - at : (size_t)(end - (text.data + at));
        size_t blank = 0;
        while (blank < n && strchr(" \t\r", text.data[at + blank]) != NULL && text.data[at + blank] != 0) {
            blank++;
        }
        if (blank < n) { /* empty lines are fine, as in data files */
            ptst_json *j = parse_line(a, text.data + at, n, path, number);
            code = j == NULL ? ptst_error_code(a->c) : PTST_OK;
            ptst_json_free(a->c, j);
        }
        at += n + 1;
    }
    ptst_text_free(a->c, &text);
    return code;
}

static ptst_code check_tensors(args *a, const char *path) {
    ptst_tensors *t = ptst_tensors_open(a->c, path);
    ptst_tensors_close(a->c, t);
    return t == NULL ? ptst_error_code(a->c) : PTST_OK;
}

static ptst_code check_jinja(args *a, const char *path) {
    ptst_text text = {NULL, 0, 0};
    ptst_jinja *t = NULL;
    ptst_code code = ptst__read_file(a->c, path, &text);
    if (code == PTST_OK) {
        t = ptst_jinja_compile(a->c, text.data == NULL ? "" : text.data, text.size, path);
        code = t == NULL ? ptst_error_code(a->c) : PTST_OK;
    }
    ptst_jinja_free(a->c, t);
    ptst_text_free(a->c, &text);
    return code;
}

/* A model folder: weights fit the configuration, the tokenizer fits the vocabulary, the chat
   template (if there is one) compiles. */
static ptst_code check_model(args *a, const char *path) {
    ptst_model *m = ptst_model_load(a->c, path, PTST_DTYPE_FILE);
    ptst_tokenizer *t = NULL;
    ptst_template *chat = NULL;
    ptst_code code = m == NULL ? ptst_error_code(a->c) : PTST_OK;
    if (code == PTST_OK && file_in(a, path, "tokenizer.json")) {
        t = ptst_tokenizer_load(a->c, path);
        code = t == NULL ? ptst_error_code(a->c) : PTST_OK;
    }
    if (code == PTST_OK && t != NULL && ptst_vocab_size(t) > ptst_model_config(m)->vocab_size) {
        code = ptst__fail(a->c, PTST_ERR_MISMATCH,
                          "tokenizer.json has %d tokens, the model only %d embeddings",
                          (int)ptst_vocab_size(t), (int)ptst_model_config(m)->vocab_size);
    }
    if (code == PTST_OK && file_in(a, path, "chat_template.jinja")) {
        chat = ptst_template_load(a->c, "model:none", path);
        code = chat == NULL ? ptst_error_code(a->c) : PTST_OK;
    }
    ptst_template_free(a->c, chat);
    ptst_tokenizer_free(a->c, t);
    ptst_model_free(a->c, m);
    return code;
}

/* An adapter folder by itself: its tensors are readable and its configuration is JSON; whether it
   fits is known once the model is. */
static ptst_code check_adapter(args *a, const char *path) {
    ptst_text name = {NULL, 0, 0};
    ptst_json *j = NULL;
    ptst_code code = ptst__path_join(a->c, &name, path, "adapter_config.json");
    if (code == PTST_OK) {
        j = ptst_json_load(a->c, name.data);
        code = j == NULL ? ptst_error_code(a->c) : PTST_OK;
    }
    if (code == PTST_OK && ptst_json_get(j, 0, "peft_type") < 0) {
        code = ptst__fail(a->c, PTST_ERR_FORMAT, "%s: the key peft_type is missing", name.data);
    }
    if (code == PTST_OK) {
        code = ptst__path_join(a->c, &name, path, "adapter_model.safetensors");
    }
    if (code == PTST_OK) {
        code = check_tensors(a, name.data);
    }
    ptst_json_free(a->c, j);
    ptst_text_free(a->c, &name);
    return code;
}

static ptst_code check_tokenizer(args *a, const char *path) {
    ptst_tokenizer *t = ptst_tokenizer_load(a->c, path);
    ptst_tokenizer_free(a->c, t);
    return t == NULL ? ptst_error_code(a->c) : PTST_OK;
}

static ptst_code check_path(args *a, const char *path) {
    ptst_json *j;
    switch (kind_of(a, path)) {
    case KIND_MODEL: return check_model(a, path);
    case KIND_ADAPTER: return check_adapter(a, path);
    case KIND_TOKENIZER: return check_tokenizer(a, path);
    case KIND_TENSORS: return check_tensors(a, path);
    case KIND_JSONL: return check_jsonl(a, path);
    case KIND_JINJA: return check_jinja(a, path);
    case KIND_JSON:
        j = ptst_json_load(a->c, path);
        ptst_json_free(a->c, j);
        return j == NULL ? ptst_error_code(a->c) : PTST_OK;
    default:
        return ptst__fail(a->c, PTST_ERR_UNSUPPORTED,
                          "%.500s: nothing that can be checked: .json, .jsonl, .safetensors, .jinja, "
                          "a model or an adapter folder was expected",
                          path);
    }
}

static int command_check(args *a) {
    int i, code = 0;
    if (a->rest_count == 0) {
        return bad_call("check: at least one path was expected");
    }
    for (i = 0; i < a->rest_count; i++) {
        if (!exists(a, a->rest[i])) {
            return EXIT_CALL;
        }
    }
    for (i = 0; i < a->rest_count; i++) {
        if (check_path(a, a->rest[i]) != PTST_OK) {
            const char *reason = ptst_error_text(a->c);
            size_t n = strlen(a->rest[i]);
            if (strncmp(reason, a->rest[i], n) == 0 && reason[n] == ':') {
                reason += n + 1; /* it already begins with the path */
                reason += *reason == ' ';
            }
            printf("%s: %s\n", a->rest[i], reason);
            code = EXIT_WORK;
        }
    }
    return code;
}

/* The tensors of a file or folder, one line each. */
static int info_tensors(args *a, const char *path) {
    ptst_tensors *t = ptst_tensors_open(a->c, path);
    uint64_t bytes = 0;
    size_t i;
    int k;
    if (t == NULL) {
        failed(a);
        return EXIT_WORK;
    }
    for (i = 0; i < ptst_tensors_count(t); i++) {
        const ptst_tensor *x = ptst_tensors_at(t, i);
        bytes += x->bytes;
        if (!given(a, "--json")) {
            printf("%-60s %-5s [", x->name, x->dtype_name);
            for (k = 0; k < x->rank; k++) {
                printf("%s%llu", k == 0 ? "" : ", ", (unsigned long long)x->shape[k]);
            }
            printf("]\n");
        }
    }
    printf(given(a, "--json") ? "{\"kind\": \"safetensors\", \"tensors\": %llu, \"bytes\": %llu}\n"
                              : "%llu tensors, %llu bytes\n",
           (unsigned long long)ptst_tensors_count(t), (unsigned long long)bytes);
    ptst_tensors_close(a->c, t);
    return 0;
}

/* Plain prose of our own for info --quantization-error. */
static const char sample_text[] =
    "The lighthouse at the end of the pier had been dark for eleven years when the town decided to "
    "light it again. Nobody remembered how the old lamp worked, so they asked Mara, who repaired "
    "clocks. She climbed the narrow stairs every morning for a week, took the brass gears apart, "
    "cleaned each tooth with a brush, and wrote down where every piece belonged. On the last "
    "evening she turned the handle. The lamp coughed, flickered twice, and then threw a long white "
    "beam over the water. People on the beach began to clap. \"It needs oil once a month,\" she "
    "said, \"and somebody who is not afraid of stairs.\" The children all raised their hands. In "
    "winter, when storms came from the north, fishing boats that were late could see the light "
    "from twenty kilometres away, and they found their way home without a map. A scientist from "
    "the university measured the beam: it was brighter than the records of 1931 said it should be. "
    "The reason was simple. Mara had polished the lenses on both sides, which, according to the "
    "handbook, was forbidden.\n";

static ptst_code quantization_line(args *a, const char *path, const ptst_ids *ids, bool first,
                                   ptst_dtype dtype) {
    static const char *const names[] = {"file", "f32", "f16", "bf16", "int8", "int4"};
    ptst_quantization q;
    ptst_code code = ptst_quantization_error(a->c, path, dtype, ids->data, ids->count, &q);
    if (code != PTST_OK) {
        return code;
    }
    if (given(a, "--json")) {
        printf("%s\"%s\": {\"tokens\": %llu, \"reference_perplexity\": %.6g, \"perplexity\": %.6g, "
               "\"max_error\": %.4g, \"rms_error\": %.4g, \"divergence\": %.4g, \"same_top\": "
               "%.4f}%s",
               first ? "{" : ", ", names[dtype], (unsigned long long)q.tokens,
               q.reference_perplexity, q.perplexity, q.max_error, q.rms_error, q.divergence,
               q.same_top, first ? "" : "}\n");
        return PTST_OK;
    }
    if (first) {
        printf(
            "%llu tokens, perplexity with the weights of the file %.4f\n\n"
            "weights  perplexity   change  max error  rms error  KL divergence  same top token\n",
            (unsigned long long)q.tokens, q.reference_perplexity);
    }
    printf("%-7s %11.4f %+7.2f%% %10.2e %10.2e %14.2e %14.1f%%\n", names[dtype], q.perplexity,
           100 * (q.perplexity / q.reference_perplexity - 1), q.max_error, q.rms_error,
           q.divergence, 100 * q.same_top);
    return PTST_OK;
}

/* What int8 and int4 cost: errors of logits relative to the largest (or to all) of them, and
   perplexity. */
static int info_quantization(args *a, const char *path) {
    const char *file = get(a, "--text");
    ptst_text text = {NULL, 0, 0};
    ptst_ids ids = {NULL, 0, 0};
    ptst_tokenizer *t = NULL;
    ptst_code code;
    if (file != NULL && !exists(a, file)) {
        return EXIT_CALL;
    }
    code = file == NULL ? ptst_text_append(a->c, &text, sample_text, sizeof sample_text - 1)
                        : ptst__read_file(a->c, file, &text);
    if (code == PTST_OK) {
        t = ptst_tokenizer_load(a->c, path);
        code = t == NULL ? ptst_error_code(a->c)
                         : ptst_encode(a->c, t, text.data, text.size, PTST_ADD_SPECIAL, &ids);
    }
    code = code == PTST_OK ? quantization_line(a, path, &ids, true, PTST_I8) : code;
    code = code == PTST_OK ? quantization_line(a, path, &ids, false, PTST_I4) : code;
    ptst_ids_free(a->c, &ids);
    ptst_tokenizer_free(a->c, t);
    ptst_text_free(a->c, &text);
    if (code != PTST_OK) {
        failed(a);
        return EXIT_WORK;
    }
    return 0;
}

/* What the files of a model ask for and is left out; empty if nothing. */
static ptst_code info_notes(args *a, const char *path, const ptst_model *m, ptst_text *notes) {
    ptst_tokenizer *t = NULL;
    ptst_code code = ptst__text_add(a->c, notes, ptst_model_notes(m));
    if (code == PTST_OK && file_in(a, path, "tokenizer.json")) {
        t = ptst_tokenizer_load(a->c, path);
        code = t == NULL ? ptst_error_code(a->c) : PTST_OK;
    }
    if (t != NULL && ptst_tokenizer_notes(t)[0] != 0) {
        code = ptst__text_format(a->c, notes, "%stokenizer.json: %s", notes->size == 0 ? "" : "; ",
                                 ptst_tokenizer_notes(t));
    }
    ptst_tokenizer_free(a->c, t);
    return code;
}

/* How the model's makers want it to be sampled. */
static void info_sampling(const ptst_model *m) {
    const ptst_generation_config *g = ptst_model_generation(m);
    size_t i;
    printf("sampling        %s", g->do_sample ? "on" : "greedy");
    if (g->do_sample && g->temperature > 0) {
        printf(", temperature %g", g->temperature);
    }
    if (g->do_sample && g->top_p > 0) {
        printf(", top-p %g", g->top_p);
    }
    if (g->do_sample && g->top_k >= 0) {
        printf(", top-k %d", g->top_k == 0 ? 50 : (int)g->top_k);
    }
    if (g->repetition_penalty > 0) {
        printf(", repetition penalty %g", g->repetition_penalty);
    }
    printf("; ends with token");
    for (i = 0; i < g->eos_count; i++) {
        printf("%s %d", i == 0 ? "" : " or", (int)g->eos_token_id[i]);
    }
    printf(g->eos_count == 0 ? " of the tokenizer\n" : "\n");
}

static int info_model(args *a, const char *path) {
    ptst_model *m = ptst_model_load(a->c, path, PTST_DTYPE_FILE);
    const ptst_config *k;
    ptst_session_desc desc;
    double session;
    ptst_text notes = {NULL, 0, 0}, quoted = {NULL, 0, 0};
    if (m == NULL || info_notes(a, path, m, &notes) != PTST_OK) {
        ptst_text_free(a->c, &notes);
        ptst_model_free(a->c, m);
        failed(a);
        return EXIT_WORK;
    }
    memset(&desc, 0, sizeof desc);
    k = ptst_model_config(m);
    session = (double)ptst_session_bytes(m, NULL, &desc);
    if (given(a, "--json")) {
        printf("{\"kind\": \"model\", \"supported\": true, \"model_type\": \"%s\", \"parameters\": "
               "%llu, \"bytes\": %llu, \"vocab_size\": %d, \"hidden_size\": %d, "
               "\"num_hidden_layers\": %d, \"max_position_embeddings\": %d, \"session_bytes\": "
               "%.0f, \"ignored\": ",
               k->model_type, (unsigned long long)ptst_model_parameters(m),
               (unsigned long long)ptst_model_bytes(m), (int)k->vocab_size, (int)k->hidden_size,
               (int)k->num_hidden_layers, (int)k->max_position_embeddings, session);
        quoted.size = 0;
        if (ptst__json_quote(a->c, &quoted, notes.data == NULL ? "" : notes.data, notes.size) ==
            PTST_OK) {
            printf("%s}\n", quoted.data);
        }
    } else {
        printf("model type      %s (supported)\n", k->model_type);
        printf("parameters      %llu, %.1f MB\n", (unsigned long long)ptst_model_parameters(m),
               1e-6 * (double)ptst_model_bytes(m));
        printf("layers          %d of %d, %d heads, %d key-value heads, feed-forward %d\n",
               (int)k->num_hidden_layers, (int)k->hidden_size, (int)k->num_attention_heads,
               (int)k->num_key_value_heads, (int)k->intermediate_size);
        printf("vocabulary      %d%s\n", (int)k->vocab_size,
               k->tie_word_embeddings ? ", head tied to the embedding" : "");
        printf("context         %d tokens, rope %s, theta %g\n", (int)k->max_position_embeddings,
               k->rope_type, k->rope_theta);
        printf("one session     %.1f MB besides the weights\n", 1e-6 * session);
        info_sampling(m);
        printf("tokenizer       %s\n", file_in(a, path, "tokenizer.json") ? "tokenizer.json" : "none");
        if (notes.size != 0) {
            printf("ignored         %s\n", notes.data);
        }
    }
    ptst_text_free(a->c, &notes);
    ptst_text_free(a->c, &quoted);
    ptst_model_free(a->c, m);
    return 0;
}

static int info_adapter(args *a, const char *path) {
    ptst_text name = {NULL, 0, 0};
    ptst_json *j = NULL;
    const char *base;
    if (ptst__path_join(a->c, &name, path, "adapter_config.json") == PTST_OK) {
        j = ptst_json_load(a->c, name.data);
    }
    ptst_text_free(a->c, &name);
    if (j == NULL) {
        failed(a);
        return EXIT_WORK;
    }
    base = ptst_json_string(j, ptst_json_get(j, 0, "base_model_name_or_path"), NULL);
    printf(given(a, "--json")
               ? "{\"kind\": \"adapter\", \"r\": %.0f, \"lora_alpha\": %g}\n"
               : "PEFT adapter    rank %.0f, alpha %g\n",
           ptst_json_number(j, ptst_json_get(j, 0, "r"), 8),
           ptst_json_number(j, ptst_json_get(j, 0, "lora_alpha"), 8));
    if (!given(a, "--json")) {
        printf("base model      %s\n", base == NULL ? "not named" : base);
    }
    ptst_json_free(a->c, j);
    return info_tensors(a, path);
}

/* A tokenizer without model. */
static int info_tokenizer(args *a, const char *path) {
    ptst_tokenizer *t = ptst_tokenizer_load(a->c, path);
    if (t == NULL) {
        failed(a);
        return EXIT_WORK;
    }
    printf(given(a, "--json") ? "{\"kind\": \"tokenizer\", \"tokens\": %d, \"ignored\": \"%s\"}\n"
                              : "tokenizer of %d tokens\nignored: %s\n",
           (int)ptst_vocab_size(t),
           ptst_tokenizer_notes(t)[0] == 0 && !given(a, "--json") ? "nothing"
                                                                  : ptst_tokenizer_notes(t));
    ptst_tokenizer_free(a->c, t);
    return 0;
}

static int command_info(args *a) {
    const char *path;
    if (!one_argument(a, "path", &path)) {
        return EXIT_CALL;
    }
    if (path == NULL) {
        return bad_call("info: a file or folder was expected");
    }
    if (!exists(a, path)) {
        return EXIT_CALL;
    }
    switch (kind_of(a, path)) {
    case KIND_MODEL:
        return given(a, "--quantization-error") ? info_quantization(a, path) : info_model(a, path);
    case KIND_ADAPTER: return info_adapter(a, path);
    case KIND_TOKENIZER: return info_tokenizer(a, path);
    case KIND_TENSORS: return info_tensors(a, path);
    default:
        if (check_path(a, path) != PTST_OK) {
            failed(a);
            return EXIT_WORK;
        }
        printf(given(a, "--json") ? "{\"kind\": \"file\", \"valid\": true}\n" : "valid\n");
        return 0;
    }
}

/* ================================================================================== eval ==== */

/* {"metric": ..., "k": ..., ...} on one line. */
static void print_rate(const char *before, const char *metric, ptst_rate r) {
    printf("{\"metric\": \"%s%s\", \"k\": %llu, \"n\": %llu, \"value\": %.6g, \"low\": %.6g, "
           "\"high\": %.6g}\n",
           before, metric, (unsigned long long)r.k, (unsigned long long)r.n, r.value, r.low, r.high);
}

/* Rows of --answers: 0, or the exit code after a sentence. */
static int load_answers(args *a, ptst_rows **out) {
    ptst_rows_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.need_answer = true;
    *out = NULL;
    if (!need(a, "--answers") || !exists(a, get(a, "--answers"))) {
        return EXIT_CALL;
    }
    *out = ptst_rows_load(a->c, get(a, "--answers"), &desc);
    return *out == NULL ? failed(a) : 0;
}

/* Next name of a comma-separated list into buffer; false at the end. */
static bool next_name(const char **list, char *buffer, size_t size) {
    size_t n = strcspn(*list, ",");
    if (n == 0 && **list == 0) {
        return false;
    }
    snprintf(buffer, size, "%.*s", (int)n, *list);
    *list += n + ((*list)[n] == ',');
    return true;
}

/* One line of --verdicts: {"prompt": ..., NAME: VALUE}. */
static ptst_code add_verdict(args *a, ptst_text *out, const ptst_row *row, const char *name,
                             const char *value) {
    ptst_code code = ptst__text_add(a->c, out, "{\"prompt\": ");
    if (code == PTST_OK) {
        code = ptst__json_quote(a->c, out, row->prompt, row->prompt_size);
    }
    return code == PTST_OK ? ptst__text_format(a->c, out, ", \"%s\": %s}\n", name, value) : code;
}

static int command_eval_refusal(args *a) {
    const char *lists = get(a, "--list"), *rest = lists;
    ptst_rows *rows;
    result verdicts;
    char list[64], metric[96];
    size_t i, n;
    int code;
    while (next_name(&rest, list, sizeof list)) {
        if (ptst_refusal(list, "", 0) < 0) {
            return bad_call("eval refusal: --list %s: qi2023, qi2025, jailbreakbench, xstest or "
                            "ptst was expected",
                            list);
        }
    }
    if (given(a, "--verdicts") && strchr(lists, ',') != NULL) {
        return bad_call("eval refusal: --verdicts goes with one --list");
    }
    code = load_answers(a, &rows);
    if (code == 0) {
        code = open_result(a, &verdicts, given(a, "--verdicts") ? get(a, "--verdicts") : NULL);
    }
    if (code != 0) {
        ptst_rows_free(a->c, rows);
        return code;
    }
    n = ptst_rows_count(rows);
    for (rest = lists; code == 0 && next_name(&rest, list, sizeof list);) {
        size_t k = 0;
        for (i = 0; i < n && code == 0; i++) {
            const ptst_row *row = ptst_rows_at(rows, i);
            int refused = ptst_refusal(list, row->answer, row->answer_size);
            k += refused == 0;
            if (verdicts.file && add_verdict(a, &verdicts.text, row, "refused",
                                             refused ? "true" : "false") != PTST_OK) {
                code = failed(a);
            }
        }
        snprintf(metric, sizeof metric, "(%s)", list);
        if (code == 0) {
            print_rate("kw-ASR", metric, ptst_rate_of(k, n));
        }
    }
    ptst_rows_free(a->c, rows);
    return close_result(a, &verdicts, code);
}

/* Correct verdicts (1, 0) of all answers under one rule; -1 entries have no reference. */
static int score_gsm8k(args *a, const ptst_rows *answers, const ptst_rows *data,
                       const ptst__map *by_question, ptst_gsm8k_rule rule, signed char *out) {
    size_t i;
    for (i = 0; i < ptst_rows_count(answers); i++) {
        const ptst_row *row = ptst_rows_at(answers, i), *reference;
        int32_t at = ptst__map_get(by_question, row->prompt, row->prompt_size, -1);
        bool correct = false;
        if (at < 0) {
            ptst__fail(a->c, PTST_ERR_MISMATCH,
                       "%s: line %llu: no question of %s is this prompt: \"%.60s\"",
                       get(a, "--answers"), (unsigned long long)row->line, get(a, "--data"),
                       row->prompt);
            return failed(a);
        }
        reference = ptst_rows_at(data, (size_t)at);
        if (ptst_gsm8k_correct(a->c, rule, row->answer, row->answer_size, reference->answer,
                               reference->answer_size, &correct) != PTST_OK) {
            return failed(a);
        }
        out[i] = (signed char)correct;
    }
    return 0;
}

/* All rules of --rule: prints a rate each, collects the verdicts of the only or last one. */
static int eval_rules(args *a, const ptst_rows *answers, const ptst_rows *data,
                      const ptst__map *by_question, result *verdicts) {
    const char *rest = get(a, "--rule");
    size_t i, k, n = ptst_rows_count(answers);
    signed char *marks = (signed char *)ptst__alloc(a->c, n + 1, 1);
    char name[64];
    int code = marks == NULL ? failed(a) : 0;
    while (code == 0 && next_name(&rest, name, sizeof name)) {
        ptst_gsm8k_rule rule = (ptst_gsm8k_rule)ptst_gsm8k_find(name);
        code = score_gsm8k(a, answers, data, by_question, rule, marks);
        for (i = k = 0; code == 0 && i < n; i++) {
            k += marks[i] == 1;
            if (verdicts->file && add_verdict(a, &verdicts->text, ptst_rows_at(answers, i), "correct",
                                              marks[i] ? "true" : "false") != PTST_OK) {
                code = failed(a);
            }
        }
        if (code == 0) {
            print_rate("", ptst_gsm8k_metric(rule), ptst_rate_of(k, n));
        }
    }
    ptst__free(a->c, marks);
    return code;
}

static int command_eval_gsm8k(args *a) {
    const char *rest = get(a, "--rule");
    ptst_rows *answers = NULL, *data = NULL;
    ptst_rows_desc desc;
    ptst__map by_question = {NULL, 0, 0};
    result verdicts;
    char name[64];
    size_t i;
    int code;
    memset(&desc, 0, sizeof desc);
    desc.need_answer = true;
    while (next_name(&rest, name, sizeof name)) {
        if (ptst_gsm8k_find(name) < 0) {
            return bad_call("eval gsm8k: --rule %s: openai, strict or flexible was expected", name);
        }
    }
    if (given(a, "--verdicts") && strchr(get(a, "--rule"), ',') != NULL) {
        return bad_call("eval gsm8k: --verdicts goes with one --rule");
    }
    if (!need(a, "--data") || !exists(a, get(a, "--data"))) {
        return EXIT_CALL;
    }
    memset(&verdicts, 0, sizeof verdicts);
    code = load_answers(a, &answers);
    if (code == 0) {
        data = ptst_rows_load(a->c, get(a, "--data"), &desc);
        code = data == NULL ? failed(a) : 0;
    }
    for (i = 0; code == 0 && i < ptst_rows_count(data); i++) {
        const ptst_row *row = ptst_rows_at(data, i);
        code = ptst__map_put(a->c, &by_question, row->prompt, row->prompt_size, (int32_t)i) ==
                       PTST_OK
                   ? 0
                   : failed(a);
    }
    if (code == 0) {
        code = open_result(a, &verdicts, given(a, "--verdicts") ? get(a, "--verdicts") : NULL);
    }
    if (code == 0) {
        code = eval_rules(a, answers, data, &by_question, &verdicts);
    }
    ptst__map_free(a->c, &by_question);
    ptst_rows_free(a->c, data);
    ptst_rows_free(a->c, answers);
    return close_result(a, &verdicts, code);
}

static bool judge_known(const args *a) {
    if (strcmp(get(a, "--judge"), "qi2023") != 0) {
        bad_call("%s: --judge %s: qi2023 was expected", a->command, get(a, "--judge"));
        return false;
    }
    return true;
}

static int command_judge_export(args *a) {
    ptst_rows *answers;
    ptst_judge_desc desc;
    int code;
    if (!judge_known(a) || !need(a, "--out")) {
        return EXIT_CALL;
    }
    memset(&desc, 0, sizeof desc);
    desc.model = get(a, "--judge-model");
    code = load_answers(a, &answers);
    if (code == 0 && ptst_judge_export(a->c, answers, &desc, get(a, "--out")) != PTST_OK) {
        code = failed(a);
    }
    ptst_rows_free(a->c, answers);
    return code;
}

static int write_scores(args *a, const ptst_rows *answers, const int *scores) {
    result out;
    size_t i;
    char value[16];
    int code = open_result(a, &out, get(a, "--verdicts"));
    for (i = 0; code == 0 && i < ptst_rows_count(answers); i++) {
        snprintf(value, sizeof value, "%d", scores[i]);
        if (add_verdict(a, &out.text, ptst_rows_at(answers, i), "score",
                        scores[i] > 0 ? value : "null") != PTST_OK) {
            code = failed(a);
        }
    }
    return close_result(a, &out, code);
}

/* Rate and mean of a judge. */
static void print_judged(const char *judge, const ptst_judged *judged) {
    char metric[80];
    snprintf(metric, sizeof metric, "(%.60s)", judge);
    print_rate("judge-ASR", metric, judged->asr);
    printf("{\"metric\": \"judge-score%s\", \"value\": %.6g, \"n\": %llu, \"unparsed\": %llu, "
           "\"missing\": %llu, \"ambiguous\": %llu}\n",
           metric, judged->mean, (unsigned long long)judged->parsed,
           (unsigned long long)judged->unparsed, (unsigned long long)judged->missing,
           (unsigned long long)judged->ambiguous);
}

static int command_judge_import(args *a) {
    ptst_rows *answers;
    ptst_judged judged;
    int *scores = NULL;
    int code;
    if (!need(a, "--judgments") || !exists(a, get(a, "--judgments"))) {
        return EXIT_CALL;
    }
    code = load_answers(a, &answers);
    if (code == 0) {
        scores = (int *)ptst__calloc(a->c, ptst_rows_count(answers) + 1, sizeof *scores);
        if (scores == NULL || ptst_judge_import(a->c, answers, get(a, "--judgments"), scores,
                                                &judged) != PTST_OK) {
            code = failed(a);
        }
    }
    if (code == 0 && given(a, "--verdicts")) {
        code = write_scores(a, answers, scores);
    }
    if (code == 0) {
        print_judged(get(a, "--judge"), &judged);
    }
    ptst__free(a->c, scores);
    ptst_rows_free(a->c, answers);
    return code;
}

/* ================================================================================== chat ==== */

/* Most tokens of an answer: the option, or what the model's makers want. */
static size_t new_tokens(const args *a, const ptst_model *m, int64_t limit) {
    const ptst_generation_config *g = ptst_model_generation(m);
    return given(a, "--max-new-tokens") ? (size_t)limit
           : g->max_new_tokens > 0      ? (size_t)g->max_new_tokens
                                        : 512;
}

/* Sampling options; what is not given comes from generation_config.json if the model's makers want
   sampling, else it is greedy. */
static bool get_sampling(const args *a, const ptst_model *m, ptst_sample_desc *out) {
    const ptst_generation_config *g = ptst_model_generation(m);
    double temperature, top_p, penalty;
    int64_t top_k;
    memset(out, 0, sizeof *out);
    if (!get_number(a, "--temperature", 0, 1e6, &temperature) ||
        !get_number(a, "--top-p", 0, 1, &top_p) || !get_integer(a, "--top-k", 0, 1e9, &top_k) ||
        !get_number(a, "--repetition-penalty", 0.01, 100, &penalty)) {
        return false;
    }
    out->temperature = given(a, "--temperature") ? temperature
                       : g->do_sample            ? (g->temperature > 0 ? g->temperature : 1)
                                                 : 0;
    out->top_p = given(a, "--top-p") ? top_p : g->do_sample && g->top_p > 0 ? g->top_p : 1;
    out->top_k = given(a, "--top-k")             ? (size_t)top_k
                 : !g->do_sample || g->top_k < 0 ? 0
                 : g->top_k == 0                 ? 50 /* of transformers */
                                                 : (size_t)g->top_k;
    out->repetition_penalty = given(a, "--repetition-penalty") ? penalty : g->repetition_penalty;
    return true;
}

static void chat_text(void *user, size_t index, const char *text, size_t size) {
    (void)user;
    (void)index;
    fwrite(text, 1, size, stdout);
    fflush(stdout);
}

typedef struct chat {
    loaded l;
    ptst_template *t;
    ptst_generate_desc desc;
    ptst_text messages; /* JSON of the conversation so far, without the closing bracket */
} chat;

static ptst_code chat_add(args *a, chat *k, const char *role, const char *text, size_t size) {
    ptst_code code = ptst__text_format(a->c, &k->messages, "%s{\"role\": \"%s\", \"content\": ",
                                       k->messages.size > 1 ? ", " : "", role);
    if (code == PTST_OK) {
        code = ptst__json_quote(a->c, &k->messages, text, size);
    }
    return code == PTST_OK ? ptst__text_add(a->c, &k->messages, "}") : code;
}

/* The prompt of the conversation: through the chat template, or the question alone through a
   template of the paper, which knows no turns. */
static ptst_code chat_prompt(args *a, chat *k, const char *line, size_t size, ptst_prompt *out) {
    size_t length = k->messages.size;
    ptst_json *j;
    ptst_code code;
    if (!ptst_template_is_chat(k->t)) {
        return ptst_template_prompt(a->c, k->t, line, size, out);
    }
    code = ptst__text_add(a->c, &k->messages, "]");
    if (code != PTST_OK) {
        return code;
    }
    j = ptst_json_parse(a->c, k->messages.data, k->messages.size, "conversation");
    k->messages.size = length;
    if (j == NULL) {
        return ptst_error_code(a->c);
    }
    code = ptst_template_messages(a->c, k->t, j, true, out);
    ptst_json_free(a->c, j);
    return code;
}

/* One turn: a line of the user, the streamed answer. */
static int chat_turn(args *a, chat *k, const char *line, size_t size) {
    ptst_prompt prompt;
    ptst_answer answer;
    ptst_code code = chat_add(a, k, "user", line, size);
    memset(&prompt, 0, sizeof prompt);
    memset(&answer, 0, sizeof answer);
    if (code == PTST_OK) {
        code = chat_prompt(a, k, line, size, &prompt);
    }
    if (code == PTST_OK) {
        code = ptst_generate(a->c, k->l.model, k->l.adapter, k->l.tokenizer, &prompt, 1, &k->desc,
                             &answer);
        printf("\n");
    }
    if (code == PTST_OK) {
        code = chat_add(a, k, "assistant", answer.text.data == NULL ? "" : answer.text.data,
                        answer.text.size);
    }
    k->desc.seed++;
    ptst_answers_free(a->c, &answer, 1);
    ptst_prompt_free(a->c, &prompt);
    return code == PTST_OK ? 0 : failed(a);
}

static int chat_loop(args *a, chat *k) {
    char line[16384];
    int code = 0;
    while (code == 0 && !interrupted) {
        size_t n;
        if (isatty(0)) {
            printf("> ");
            fflush(stdout);
        }
        if (fgets(line, sizeof line, stdin) == NULL) {
            break;
        }
        n = strcspn(line, "\n");
        line[n] = 0;
        if (n != 0) {
            code = chat_turn(a, k, line, n);
        }
    }
    return code;
}

static int command_chat(args *a) {
    const char *name = get(a, "--template"), *system = get(a, "--system");
    int64_t limit, seed;
    chat k;
    int code;
    memset(&k, 0, sizeof k);
    if (!get_integer(a, "--max-new-tokens", 1, 1e6, &limit) ||
        !get_integer(a, "--seed", 0, 9e15, &seed)) {
        return EXIT_CALL;
    }
    code = load(a, &k.l, true);
    if (code != 0) {
        return code;
    }
    if (!get_sampling(a, k.l.model, &k.desc.sample)) {
        code = EXIT_CALL;
    }
    k.desc.max_new_tokens = new_tokens(a, k.l.model, limit);
    k.desc.seed = (uint64_t)seed;
    k.desc.on_text = chat_text;
    if (code == 0) {
        k.t = load_template(a, name == NULL ? "model:none" : name, get(a, "--model"), &code);
    }
    if (code == 0 && ptst__text_add(a->c, &k.messages, "[") != PTST_OK) {
        code = failed(a);
    }
    if (code == 0 && system != NULL) {
        code = !ptst_template_is_chat(k.t)
                   ? bad_call("chat: --system needs a chat template; %s has its own text", name)
               : chat_add(a, &k, "system", system, strlen(system)) == PTST_OK ? 0
                                                                              : failed(a);
    }
    if (code == 0) {
        code = chat_loop(a, &k);
    }
    ptst_text_free(a->c, &k.messages);
    ptst_template_free(a->c, k.t);
    unload(a, &k.l);
    return code;
}

/* ================================================================= bench train and generate ==== */

static double peak_memory_mb(void) {
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (double)usage.ru_maxrss / 1024;
}

/* Random rows; the first `prefix` tokens are the same in all. Every position is labelled. */
static ptst_dataset *bench_rows(args *a, const ptst_config *k, size_t rows, size_t seq,
                                size_t prefix) {
    ptst_dataset *d = ptst_dataset_new(a->c, NULL);
    int32_t *tokens = (int32_t *)ptst__alloc(a->c, seq + 1, sizeof *tokens);
    ptst_rng r = {7, 0, 0};
    size_t i, t;
    bool good = d != NULL && tokens != NULL;
    for (i = 0; good && i < rows; i++) {
        for (t = 0; t < seq + 1; t++) {
            if (t >= prefix || i == 0) {
                tokens[t] = (int32_t)ptst_rng_below(&r, (uint32_t)k->vocab_size);
            }
        }
        good = ptst_dataset_add_tokens(a->c, d, tokens, seq + 1, prefix > 0 ? prefix : 1) == PTST_OK;
    }
    ptst__free(a->c, tokens);
    if (!good) {
        ptst_dataset_free(a->c, d);
        return NULL;
    }
    return d;
}

/* Times `steps` steps after a warm-up; their seconds in times, 0 or the exit code. */
static int bench_steps(args *a, ptst_trainer *t, int64_t steps, double *times) {
    ptst_step step;
    int64_t i;
    for (i = -1; i < steps; i++) {
        double start = ptst__seconds();
        if (interrupted) {
            return EXIT_INTERRUPT;
        }
        if (ptst_trainer_step(a->c, t, &step) != PTST_OK) {
            return failed(a);
        }
        if (i >= 0) {
            times[i] = ptst__seconds() - start;
        }
    }
    return 0;
}

static int bench_train_report(args *a, const loaded *l, ptst_trainer *t, int64_t batch, int64_t seq,
                              int64_t steps) {
    double times[RUNS_MAX], seconds, peak, flops;
    double adapter = l->adapter == NULL ? 0 : (double)ptst_adapter_parameters(l->adapter);
    int code = bench_steps(a, t, steps, times);
    if (code != 0) {
        return code;
    }
    seconds = median(times, (int)steps);
    peak = ptst__peak_gflops(a->c, 0.2);
    flops = ptst__train_flops(ptst_model_config(l->model), 1, 1, ((double)seq + 1) / 2, adapter,
                              l->adapter == NULL); /* a token, with all that it sees on average */
    printf("{\"tokens_per_second\": %.2f, \"step_ms\": %.3f, \"peak_rss_mb\": %.1f, "
           "\"flops_per_token\": %.0f, \"peak_gflops\": %.2f, \"mfu\": %.4f, \"threads\": %d, "
           "\"simd\": \"%s\"}\n",
           (double)(batch * seq) / seconds, 1e3 * seconds, peak_memory_mb(), flops, peak,
           1e-9 * flops * (double)(batch * seq) / seconds / peak, ptst_thread_count(a->c),
           ptst_simd_name(a->c));
    return 0;
}

static int command_bench_train(args *a) {
    int64_t batch, seq, prefix, rank, steps, micro;
    ptst_lora_desc lora;
    ptst_train_desc train;
    ptst_dataset *data = NULL;
    ptst_trainer *t = NULL;
    loaded l;
    int code;
    memset(&lora, 0, sizeof lora);
    memset(&train, 0, sizeof train);
    if (!get_integer(a, "--batch", 1, 4096, &batch) || !get_integer(a, "--seq", 2, 1e6, &seq) ||
        !get_integer(a, "--prefix", 0, (double)seq - 1, &prefix) ||
        !get_integer(a, "--rank", 1, 4096, &rank) ||
        !get_integer(a, "--micro-batch-tokens", 0, 1e9, &micro) ||
        !get_integer(a, "--steps", 1, RUNS_MAX, &steps)) {
        return EXIT_CALL;
    }
    code = load(a, &l, false);
    if (code != 0) {
        return code;
    }
    lora.rank = (int32_t)rank;
    lora.targets = get(a, "--targets");
    if (given(a, "--full")) {
        code = ptst_model_unfreeze(a->c, l.model) == PTST_OK ? 0 : failed(a);
    } else {
        l.adapter = ptst_adapter_new(a->c, l.model, &lora);
        code = l.adapter == NULL ? failed(a) : 0;
    }
    train.batch = (size_t)batch;
    train.epochs = (uint64_t)steps + 1;
    train.no_shuffle = true;
    train.micro_batch_tokens = (size_t)micro;
    train.gradient_checkpointing = given(a, "--gradient-checkpointing");
    if (code == 0) {
        data = bench_rows(a, ptst_model_config(l.model), (size_t)batch, (size_t)seq, (size_t)prefix);
        t = data == NULL ? NULL : ptst_trainer_new(a->c, l.model, l.adapter, data, &train);
        code = t == NULL ? failed(a) : bench_train_report(a, &l, t, batch, seq, steps);
    }
    ptst_trainer_free(a->c, t);
    ptst_dataset_free(a->c, data);
    unload(a, &l);
    return code;
}

typedef struct bench_batch {
    ptst_session *s;
    ptst_chunk *chunks; /* [count], a sequence each */
    int32_t *tokens;    /* [count, prompt] */
    size_t count;
    ptst_rng r;
} bench_batch;

/* n random tokens for each sequence; the seconds they take are added to *seconds. */
static int bench_eval(args *a, bench_batch *b, int32_t vocab, size_t n, double *seconds) {
    double start;
    size_t i;
    int code;
    for (i = 0; i < n * b->count; i++) {
        b->tokens[i] = (int32_t)ptst_rng_below(&b->r, (uint32_t)vocab);
    }
    for (i = 0; i < b->count; i++) {
        b->chunks[i].slot = (int32_t)i;
        b->chunks[i].tokens = b->tokens + i * n;
        b->chunks[i].count = n;
        b->chunks[i].logits = PTST_LOGITS_LAST;
    }
    start = ptst__seconds();
    code = ptst_eval(a->c, b->s, b->chunks, b->count) == PTST_OK ? 0 : failed(a);
    *seconds += ptst__seconds() - start;
    return code == 0 && interrupted ? EXIT_INTERRUPT : code;
}

/* Prompt and new tokens of b->count sequences, one step of all at a time; before, as a warm-up, the
   prompt and one step: weights are mapped then, and buffers touched for the first time. */
static int bench_decode(args *a, const loaded *l, bench_batch *b, size_t prompt, size_t fresh) {
    double warm = 0, prefill = 0, decode = 0;
    int32_t vocab = ptst_model_config(l->model)->vocab_size;
    size_t step, i;
    int code = bench_eval(a, b, vocab, prompt, &warm);
    code = code == 0 && fresh > 1 ? bench_eval(a, b, vocab, 1, &warm) : code;
    for (i = 0; code == 0 && i < b->count; i++) {
        code = ptst_session_reset(a->c, b->s, (int32_t)i, -1) == PTST_OK ? 0 : failed(a);
    }
    code = code == 0 ? bench_eval(a, b, vocab, prompt, &prefill) : code;
    for (step = 1; code == 0 && step < fresh; step++) {
        code = bench_eval(a, b, vocab, 1, &decode);
    }
    if (code == 0) {
        printf("{\"prefill_tokens_per_second\": %.2f, \"decode_tokens_per_second\": %.2f, "
               "\"peak_rss_mb\": %.1f, \"threads\": %d, \"simd\": \"%s\"}\n",
               (double)(prompt * b->count) / prefill,
               fresh < 2 ? 0 : (double)((fresh - 1) * b->count) / decode, peak_memory_mb(),
               ptst_thread_count(a->c), ptst_simd_name(a->c));
    }
    return code;
}

static int bench_generate(args *a, const loaded *l, size_t prompt, size_t fresh, size_t batch) {
    ptst_session_desc desc;
    bench_batch b;
    int code;
    memset(&desc, 0, sizeof desc);
    memset(&b, 0, sizeof b);
    desc.slots = batch;
    desc.capacity = prompt + fresh;
    desc.batch_tokens = 512;
    b.count = batch;
    b.r.seed = 7;
    b.chunks = (ptst_chunk *)ptst__calloc(a->c, batch, sizeof *b.chunks);
    b.tokens = (int32_t *)ptst__alloc(a->c, prompt * batch, sizeof *b.tokens);
    b.s = b.chunks == NULL || b.tokens == NULL
              ? NULL
              : ptst_session_new(a->c, l->model, l->adapter, &desc);
    code = b.s == NULL ? failed(a) : bench_decode(a, l, &b, prompt, fresh);
    ptst_session_free(a->c, b.s);
    ptst__free(a->c, b.chunks);
    ptst__free(a->c, b.tokens);
    return code;
}

static int command_bench_generate(args *a) {
    int64_t prompt, fresh, batch;
    loaded l;
    int code;
    if (!get_integer(a, "--prompt", 1, 1e6, &prompt) || !get_integer(a, "--new", 1, 1e6, &fresh) ||
        !get_integer(a, "--batch", 1, 4096, &batch)) {
        return EXIT_CALL;
    }
    code = load(a, &l, false);
    if (code == 0) {
        code = bench_generate(a, &l, (size_t)prompt, (size_t)fresh, (size_t)batch);
        unload(a, &l);
    }
    return code;
}

/* ============================================================================== finetune ==== */

static bool get_schedule(const args *a, ptst_train_desc *t) {
    static const char *const names[] = {"constant", "linear", "cosine"};
    const char *s = get(a, "--schedule");
    char *end;
    int i;
    for (i = 0; i < 3; i++) {
        if (strcmp(s, names[i]) == 0) {
            t->schedule = (ptst_schedule)i;
            return true;
        }
    }
    t->schedule = PTST_SCHEDULE_STEP;
    if (strncmp(s, "step:", 5) == 0) {
        t->gamma = strtod(s + 5, &end);
        if (end != s + 5 && *end == 0 && t->gamma > 0 && t->gamma <= 1) {
            return true;
        }
    }
    bad_call("%s: --schedule %s: constant, linear, cosine or step:GAMMA (0 to 1) was expected",
             a->command, s);
    return false;
}

/* One of two words; false after a sentence. */
static bool get_choice(const args *a, const char *name, const char *zero, const char *one,
                       bool *second) {
    const char *s = get(a, name);
    *second = strcmp(s, one) == 0;
    if (!*second && strcmp(s, zero) != 0) {
        bad_call("%s: %s %s: %s or %s was expected", a->command, name, s, zero, one);
        return false;
    }
    return true;
}

/* Options of the optimiser and of the batches. */
static bool get_train_options(const args *a, ptst_train_desc *t) {
    int64_t warmup, epochs, steps, batch, accumulate, context, seed, micro;
    bool packing;
    if (!get_number(a, "--lr", 1e-30, 1e3, &t->lr) || !get_schedule(a, t) ||
        !get_integer(a, "--warmup", 0, 1e9, &warmup) ||
        !get_integer(a, "--epochs", 1, 1e6, &epochs) ||
        !get_integer(a, "--max-steps", 0, 1e9, &steps) ||
        !get_integer(a, "--batch", 1, 65536, &batch) ||
        !get_integer(a, "--accumulate", 1, 65536, &accumulate) ||
        !get_integer(a, "--context", 2, 1e7, &context) ||
        !get_integer(a, "--micro-batch-tokens", 0, 1e9, &micro) ||
        !get_integer(a, "--seed", 0, 9e15, &seed) ||
        !get_number(a, "--weight-decay", 0, 1e3, &t->weight_decay) ||
        !get_number(a, "--clip", 0, 1e9, &t->clip) ||
        !get_choice(a, "--batching", "examples", "packing", &packing)) {
        return false;
    }
    t->warmup = (uint64_t)warmup;
    t->epochs = (uint64_t)epochs;
    t->max_steps = (uint64_t)steps;
    t->batch = (size_t)batch;
    t->accumulate = (size_t)accumulate;
    t->context = (size_t)context;
    t->micro_batch_tokens = (size_t)micro;
    t->seed = (uint64_t)seed;
    t->batching = packing ? PTST_BATCHING_PACKING : PTST_BATCHING_EXAMPLES;
    t->no_shuffle = given(a, "--no-shuffle");
    t->gradient_checkpointing = given(a, "--gradient-checkpointing");
    return true;
}

/* Prints what happened, for people, to stderr. */
static void report_finetune(const args *a, const ptst_finetune_info *info) {
    if (quiet(a)) {
        return;
    }
    if (info->last.step == 0) {
        fprintf(stderr, "%s is finished; nothing was changed\n", get(a, "--out"));
        return;
    }
    fprintf(stderr, "%llu rows, %llu tokens, %llu of them learned; %llu steps, last loss %.4f\n",
            (unsigned long long)info->data.rows, (unsigned long long)info->data.tokens,
            (unsigned long long)info->data.labels, (unsigned long long)info->last.step,
            info->last.loss);
    if (info->data.cut + info->data.dropped + info->data.not_prefix != 0) {
        fprintf(
            stderr,
            "%llu rows were longer than the context, %llu were left out (too long, or nothing to "
            "learn left), in %llu the tokens of the prompt are no prefix of the row\n",
            (unsigned long long)info->data.cut, (unsigned long long)info->data.dropped,
            (unsigned long long)info->data.not_prefix);
    }
    fprintf(stderr, "wrote %s\n", get(a, "--out"));
}

/* The options of a new adapter. */
static bool get_lora_options(const args *a, ptst_lora_desc *lora) {
    int64_t rank, seed;
    if (!get_integer(a, "--rank", 1, 65536, &rank) || !get_integer(a, "--seed", 0, 9e15, &seed) ||
        !get_number(a, "--alpha", 1e-6, 1e9, &lora->alpha) ||
        !get_number(a, "--dropout", 0, 0.999, &lora->dropout)) {
        return false;
    }
    lora->rank = (int32_t)rank;
    lora->targets = get(a, "--targets");
    lora->modules_to_save = get(a, "--modules-to-save");
    lora->seed = (uint64_t)seed;
    return true;
}

/* What to do with rows that are longer than the context. */
static bool get_long_rows(const args *a, ptst_long_rows *out) {
    static const char *const names[] = {"cut", "drop", "error"};
    const char *value = get(a, "--long-rows");
    int i;
    for (i = 0; i < 3; i++) {
        if (strcmp(value, names[i]) == 0) {
            *out = (ptst_long_rows)i;
            return true;
        }
    }
    bad_call("%s: --long-rows %s: cut, drop or error was expected", a->command, value);
    return false;
}

/* The first option given that only an adapter has, or only a new one; NULL if there is none. */
static const char *adapter_option(const args *a, bool new_one) {
    static const char *const names[] = {"--rank",            "--alpha",   "--targets",
                                        "--modules-to-save", "--dropout", "--init-adapter"};
    size_t i;
    for (i = 0; i < (new_one ? 4 : sizeof names / sizeof names[0]); i++) {
        if (given(a, names[i])) {
            return names[i];
        }
    }
    return NULL;
}

typedef struct finetune {
    ptst_finetune_files files;
    ptst_finetune_desc desc;
    ptst_lora_desc lora;
} finetune;

/* All options of a fine-tuning: 0, or the exit code after a sentence. */
static int get_finetune(const args *a, finetune *f) {
    int64_t limit, mix_count, save_every;
    bool separate;
    memset(f, 0, sizeof *f);
    if (!need(a, "--model") || !need(a, "--train") || !need(a, "--template") ||
        !exists(a, get(a, "--model")) || !exists(a, get(a, "--train")) ||
        !exists(a, get(a, "--mix")) || !exists(a, get(a, "--init-adapter")) ||
        !get_dtype(a, &f->files.dtype) || !get_train_options(a, &f->desc.train) ||
        !get_lora_options(a, &f->lora) || !get_integer(a, "--limit", 0, 1e9, &limit) ||
        !get_integer(a, "--mix-count", 0, 1e9, &mix_count) ||
        !get_integer(a, "--save-every", 0, 1e9, &save_every) ||
        !get_choice(a, "--mask", "joint", "separate", &separate) ||
        !get_long_rows(a, &f->desc.dataset.long_rows)) {
        return EXIT_CALL;
    }
    if (given(a, "--full") && adapter_option(a, false) != NULL) {
        return bad_call("%s: --full trains the weights themselves, %s is for an adapter",
                        a->command, adapter_option(a, false));
    }
    if (given(a, "--init-adapter") && adapter_option(a, true) != NULL && !quiet(a)) {
        fprintf(stderr, "note: %s counts for new adapters only, this one has its own\n",
                adapter_option(a, true));
    }
    f->files.model = get(a, "--model");
    f->files.train = get(a, "--train");
    f->files.template_is = get(a, "--template");
    f->files.mix = get(a, "--mix");
    f->files.mix_count = (size_t)mix_count;
    f->files.rows.limit = (size_t)limit;
    f->desc.out = get(a, "--out");
    f->desc.init_adapter = get(a, "--init-adapter");
    f->desc.full = given(a, "--full");
    f->desc.lora = f->desc.full ? NULL : &f->lora;
    f->desc.resume = given(a, "--resume");
    f->desc.log = get(a, "--log");
    f->desc.save_every = (uint64_t)save_every;
    f->desc.dataset.mask = separate ? PTST_MASK_SEPARATE : PTST_MASK_JOINT;
    f->desc.dataset.max_tokens = f->desc.train.context;
    f->desc.train.dropout = f->desc.full ? 0 : f->lora.dropout;
    return 0;
}

static int command_finetune(args *a) {
    ptst_finetune_info info;
    finetune f;
    int code = !need(a, "--out") ? EXIT_CALL : get_finetune(a, &f);
    if (code != 0) {
        return code;
    }
    memset(&info, 0, sizeof info);
    if (ptst_finetune_file(a->c, &f.files, &f.desc, &info) != PTST_OK) {
        code = failed(a);
        if (code == EXIT_INTERRUPT) {
            fprintf(stderr, "saved; the same command with --resume goes on from here\n");
        }
        return code;
    }
    report_finetune(a, &info);
    return 0;
}

/* ================================================================================== plan ==== */

static const double megabyte = 1048576;

/* The part of a plan that is about memory. `later`: what will be taken beyond what is held. */
static void print_memory(const args *a, double mapped, double later) {
    const memory *m = ((screen *)a->c->desc.user)->counted;
    double peak = (double)m->held + later, available = ptst__memory_available();
    peak = ((double)m->before > peak ? (double)m->before : peak) + mapped;
    printf("{\"peak_memory_mb\": %.1f, \"mapped_weights_mb\": %.1f, \"computing_mb\": %.1f, "
           "\"loaded_mb\": %.1f, ",
           peak / megabyte, mapped / megabyte, later / megabyte, (double)m->held / megabyte);
    if (available < HUGE_VAL) {
        printf("\"available_mb\": %.0f, \"fits\": %s, ", available / megabyte,
               peak < available ? "true" : "false");
    }
}

/* The part that is about training. */
static void print_train_plan(const ptst_train_plan *p) {
    printf("\"steps\": %llu, \"rows\": %llu, \"tokens\": %llu, \"labels\": %llu, "
           "\"computed_tokens\": %llu, \"flops\": %.6g, \"gradient_checkpointing\": %s, ",
           (unsigned long long)p->steps, (unsigned long long)p->data.rows,
           (unsigned long long)p->tokens, (unsigned long long)p->labels,
           (unsigned long long)p->computed, p->flops, p->checkpointing ? "true" : "false");
}

/* A time that was measured, or null. */
static void print_seconds(const char *name, double seconds) {
    if (seconds > 0) {
        printf("\"%s\": %.6g, ", name, seconds);
    } else {
        printf("\"%s\": null, ", name);
    }
}

static void print_machine(const args *a, const ptst_train_plan *p) {
    printf("\"probe_steps\": %llu, \"threads\": %d, \"simd\": \"%s\"}\n",
           (unsigned long long)p->probed, ptst_thread_count(a->c), ptst_simd_name(a->c));
}

static int plan_finetune(args *a, double seconds) {
    ptst_train_plan p;
    finetune f;
    int code = get_finetune(a, &f);
    if (code != 0) {
        return code;
    }
    if (ptst_finetune_file_plan(a->c, &f.files, &f.desc, seconds, &p) != PTST_OK) {
        return failed(a);
    }
    print_memory(a, (double)p.mapped, (double)p.bytes);
    print_train_plan(&p);
    print_seconds("tokens_per_second", p.seconds > 0 ? (double)p.tokens / p.seconds : 0);
    print_seconds("seconds", p.seconds);
    print_machine(a, &p);
    return 0;
}

static int plan_experiment(args *a, const char *path, double seconds) {
    ptst_experiment *e;
    ptst_run_plan p;
    double later;
    int code = 0;
    if (!exists(a, path)) {
        return EXIT_CALL;
    }
    e = ptst_experiment_load(a->c, path, NULL);
    if (e == NULL || ptst_experiment_plan(a->c, e, seconds, &p) != PTST_OK) {
        code = failed(a);
        code = code == EXIT_CALL ? EXIT_WORK : code;
    } else {
        later = (double)(p.train.bytes > p.answer.bytes ? p.train.bytes : p.answer.bytes);
        print_memory(a, (double)p.train.mapped, later);
        printf("\"cells\": %llu, \"adapters\": %llu, ", (unsigned long long)p.cells,
               (unsigned long long)p.adapters);
        print_train_plan(&p.train);
        printf("\"answers\": %llu, \"prompt_tokens\": %llu, \"computed_prompt_tokens\": %llu, "
               "\"answer_tokens_at_most\": %llu, \"answer_flops_at_most\": %.6g, ",
               (unsigned long long)p.answers, (unsigned long long)p.answer.prompt_tokens,
               (unsigned long long)p.answer.computed, (unsigned long long)p.answer.answer_tokens,
               p.answer.flops);
        print_seconds("train_seconds", p.train.seconds);
        print_seconds("answer_seconds", p.answer_seconds);
        printf("\"answer_seconds_at_most\": %s, ", p.answer_seconds_at_most ? "true" : "false");
        print_seconds("seconds", seconds > 0 ? p.train.seconds + p.answer_seconds : 0);
        print_machine(a, &p.train);
    }
    ptst_experiment_free(a->c, e);
    return code;
}

static int command_plan(args *a) {
    const char *path;
    double seconds;
    size_t i;
    if (!one_argument(a, "experiment file", &path) ||
        !get_number(a, "--probe-seconds", 0, 1e6, &seconds)) {
        return EXIT_CALL;
    }
    for (i = 0; path != NULL && a->options[i].name != NULL; i++) {
        const char *name = a->options[i].name;
        if (a->values[i] != NULL && strcmp(name, "--probe-seconds") != 0 &&
            strcmp(name, "--quiet") != 0 && strcmp(name, "--threads") != 0 &&
            strcmp(name, "--simd") != 0 && strcmp(name, "--float32-matmul-precision") != 0) {
            return bad_call("plan: %s is for a fine-tuning; %s says all by itself", name, path);
        }
    }
    return path != NULL ? plan_experiment(a, path, seconds) : plan_finetune(a, seconds);
}

/* ============================================================================== generate ==== */

static int command_generate(args *a) {
    ptst_answer_files files;
    ptst_generate_desc desc;
    ptst_model *m;
    int64_t limit, count, batch, seed;
    bool sampling;
    memset(&files, 0, sizeof files);
    memset(&desc, 0, sizeof desc);
    if (!need(a, "--model") || !need(a, "--template") || !need(a, "--prompts") ||
        !exists(a, get(a, "--model")) || !exists(a, get(a, "--adapter")) ||
        !exists(a, get(a, "--prompts")) || !get_dtype(a, &files.dtype) ||
        !get_integer(a, "--limit", 0, 1e9, &limit) ||
        !get_integer(a, "--max-new-tokens", 1, 1e7, &count) ||
        !get_integer(a, "--batch", 0, 4096, &batch) ||
        !get_integer(a, "--seed", 0, 9e15, &seed)) {
        return EXIT_CALL;
    }
    m = ptst_model_load(a->c, get(a, "--model"), PTST_DTYPE_FILE); /* only to read its wishes */
    if (m == NULL) {
        failed(a);
        return EXIT_WORK;
    }
    sampling = get_sampling(a, m, &desc.sample);
    desc.max_new_tokens = new_tokens(a, m, count);
    ptst_model_free(a->c, m);
    if (!sampling) {
        return EXIT_CALL;
    }
    files.model = get(a, "--model");
    files.adapter = get(a, "--adapter");
    files.template_is = get(a, "--template");
    files.prompts = get(a, "--prompts");
    files.rows.column = get(a, "--column");
    files.rows.limit = (size_t)limit;
    files.out = get(a, "--out") == NULL ? "-" : get(a, "--out");
    desc.batch = (size_t)batch;
    desc.seed = (uint64_t)seed;
    if (ptst_answer_file(a->c, &files, &desc) != PTST_OK) {
        int code = failed(a);
        if (code == EXIT_INTERRUPT && given(a, "--out")) {
            fprintf(stderr, "finished answers are in %s.part; the same command goes on from here\n",
                    get(a, "--out"));
        }
        return code;
    }
    return 0;
}

/* =========================================================================== judge local ==== */

/* The replies as lines that judge import reads. */
static int write_judgments(args *a, const ptst_answer *replies, size_t n) {
    result out;
    size_t i;
    int code = open_result(a, &out, get(a, "--out"));
    if (code != 0) {
        return code;
    }
    for (i = 0; code == 0 && i < n; i++) {
        const char *text = replies[i].text.data == NULL ? "" : replies[i].text.data;
        code = ptst__text_add(a->c, &out.text, "{\"judgment\": ") == PTST_OK &&
                       ptst__json_quote(a->c, &out.text, text, replies[i].text.size) == PTST_OK &&
                       ptst__text_add(a->c, &out.text, "}\n") == PTST_OK
                   ? flush_result(a, &out)
                   : failed(a);
    }
    return close_result(a, &out, code);
}

/* Everything that is loaded judges everything that was answered. */
static int judge_answers(args *a, const loaded *l, const ptst_template *style,
                         const ptst_rows *answers, size_t most) {
    size_t n = ptst_rows_count(answers);
    ptst_answer *replies = (ptst_answer *)ptst__calloc(a->c, n, sizeof *replies);
    int *scores = (int *)ptst__calloc(a->c, n, sizeof *scores);
    ptst_judged judged;
    int code = 0;
    if (replies == NULL || scores == NULL ||
        ptst_judge_local(a->c, answers, NULL, l->model, l->tokenizer, style, most, replies, scores,
                         &judged) != PTST_OK) {
        code = failed(a);
    }
    if (code == 0 && given(a, "--out")) {
        code = write_judgments(a, replies, n);
    }
    if (code == 0 && given(a, "--verdicts")) {
        code = write_scores(a, answers, scores);
    }
    if (code == 0) {
        print_judged(get(a, "--judge"), &judged);
    }
    if (replies != NULL) {
        ptst_answers_free(a->c, replies, n);
    }
    ptst__free(a->c, replies);
    ptst__free(a->c, scores);
    return code;
}

static int command_judge_local(args *a) {
    ptst_rows *answers = NULL;
    ptst_template *style = NULL;
    loaded l;
    int64_t most;
    int code;
    memset(&l, 0, sizeof l);
    if (!judge_known(a) || !get_integer(a, "--max-new-tokens", 1, 1e6, &most)) {
        return EXIT_CALL;
    }
    code = load_answers(a, &answers);
    code = code != 0 ? code : load(a, &l, true);
    if (code == 0) {
        style = load_template(a, get(a, "--template"), get(a, "--model"), &code);
    }
    if (code == 0) {
        code = judge_answers(a, &l, style, answers, (size_t)most);
    }
    ptst_template_free(a->c, style);
    unload(a, &l);
    ptst_rows_free(a->c, answers);
    return code;
}

/* ================================================================================= probe ==== */

/* Sums over the prompts so far. */
typedef struct probe {
    loaded l;
    ptst_adapter *before;
    ptst_template *style;
    ptst_rows *rows, *refusals;
    const char **starts; /* texts of refusals */
    size_t prefilled[PTST_PROBE_MAX];
    ptst_probe_desc desc;
    double log_odds[2], refusal[2], divergence[PTST_PROBE_MAX];
    size_t counts[PTST_PROBE_MAX]; /* prompts whose old answer has so many positions */
    size_t complied[PTST_PROBE_MAX], answered[PTST_PROBE_MAX];
    result out;
} probe;

/* "0,1,5" to numbers. */
static bool get_prefilled(const args *a, probe *k) {
    const char *s = get(a, "--prefilled");
    char *end;
    while (*s != 0) {
        long n = strtol(s, &end, 10);
        if (end == s || n < 0 || n > 1000000 || (*end != ',' && *end != 0) ||
            k->desc.prefilled_count == PTST_PROBE_MAX) {
            bad_call("probe: --prefilled %.60s: at most %d numbers, separated by commas, were "
                     "expected",
                     get(a, "--prefilled"), (int)PTST_PROBE_MAX);
            return false;
        }
        k->prefilled[k->desc.prefilled_count++] = (size_t)n;
        s = *end == ',' ? end + 1 : end;
    }
    return true;
}

static int get_probe(args *a, probe *k) {
    const char *base = get(a, "--base-adapter"), *none = strcmp(base, "none") == 0 ? NULL : base;
    ptst_rows_desc rows;
    int64_t limit, positions, count;
    int code;
    size_t i;
    memset(&rows, 0, sizeof rows);
    if (!need(a, "--template") || !need(a, "--prompts") || !exists(a, get(a, "--prompts")) ||
        !exists(a, none) || !exists(a, get(a, "--refusals")) || !get_prefilled(a, k) ||
        !get_integer(a, "--limit", 0, 1e9, &limit) ||
        !get_integer(a, "--positions", 1, PTST_PROBE_MAX, &positions) ||
        !get_integer(a, "--max-new-tokens", 1, 1e6, &count)) {
        return EXIT_CALL;
    }
    if (ptst_refusal(get(a, "--list"), "", 0) < 0) {
        return bad_call("probe: --list %s: qi2023, qi2025, jailbreakbench, xstest or ptst was "
                        "expected",
                        get(a, "--list"));
    }
    if (given(a, "--prefill") && given(a, "--prefill-base")) {
        return bad_call("probe: either --prefill or --prefill-base was expected");
    }
    code = load(a, &k->l, true);
    k->style = code != 0 ? NULL
                         : load_template(a, get(a, "--template"), get(a, "--model"), &code);
    if (code == 0 && none != NULL) {
        k->before = ptst_adapter_load(a->c, k->l.model, none);
        code = k->before == NULL ? failed(a) : 0;
    }
    rows.column = get(a, "--column");
    rows.limit = (size_t)limit;
    if (code == 0) {
        k->rows = ptst_rows_load(a->c, get(a, "--prompts"), &rows);
        code = k->rows == NULL ? failed(a) : 0;
    }
    memset(&rows, 0, sizeof rows);
    if (code == 0 && get(a, "--refusals") != NULL) {
        k->refusals = ptst_rows_load(a->c, get(a, "--refusals"), &rows);
        k->desc.refusals_count = k->refusals == NULL ? 0 : ptst_rows_count(k->refusals);
        k->starts = (const char **)ptst__alloc(a->c, k->desc.refusals_count + 1, sizeof *k->starts);
        code = k->refusals == NULL || k->starts == NULL ? failed(a) : 0;
        for (i = 0; code == 0 && i < k->desc.refusals_count; i++) {
            k->starts[i] = ptst_rows_at(k->refusals, i)->prompt;
        }
        k->desc.refusals = k->starts;
    }
    k->desc.positions = (size_t)positions;
    k->desc.max_new_tokens = (size_t)count;
    k->desc.prefill = given(a, "--prefill-base") ? NULL : get(a, "--prefill");
    k->desc.prefilled = k->prefilled;
    return code;
}

/* Adds one prompt to the sums, and its line to the file. */
static ptst_code probe_add(args *a, probe *k, const ptst_row *row, const ptst_probed *p) {
    ptst_text *out = &k->out.text;
    ptst_code code = ptst__text_add(a->c, out, "{\"prompt\": ");
    size_t i;
    code = code != PTST_OK ? code : ptst__json_quote(a->c, out, row->prompt, row->prompt_size);
    code = code != PTST_OK
               ? code
               : ptst__text_format(a->c, out,
                                   ", \"refusal_log_odds\": %.6g, \"base_refusal_log_odds\": %.6g, "
                                   "\"refusal_probability\": %.6g, \"base_refusal_probability\": "
                                   "%.6g, \"kl\": [",
                                   p->log_odds[0], p->log_odds[1], p->refusal[0], p->refusal[1]);
    for (i = 0; i < 2; i++) {
        k->log_odds[i] += p->log_odds[i];
        k->refusal[i] += p->refusal[i];
    }
    for (i = 0; i < p->divergence_count && code == PTST_OK; i++) {
        k->divergence[i] += p->divergence[i];
        k->counts[i]++;
        code = ptst__text_format(a->c, out, "%s%.6g", i == 0 ? "" : ", ", p->divergence[i]);
    }
    code = code != PTST_OK ? code : ptst__text_add(a->c, out, "], \"answers\": [");
    for (i = 0; i < k->desc.prefilled_count && code == PTST_OK; i++) {
        const char *text = p->answers[i].data == NULL ? "" : p->answers[i].data;
        code = ptst__text_add(a->c, out, i == 0 ? "" : ", ");
        if (code == PTST_OK && !p->answered[i]) {
            code = ptst__text_add(a->c, out, "null");
        } else if (code == PTST_OK) {
            k->answered[i]++;
            k->complied[i] += ptst_refusal(get(a, "--list"), text, p->answers[i].size) == 0;
            code = ptst__json_quote(a->c, out, text, p->answers[i].size);
        }
    }
    return code != PTST_OK ? code : ptst__text_add(a->c, out, "]}\n");
}

static int probe_prompts(args *a, probe *k) {
    ptst_probed p;
    ptst_prompt prompt;
    ptst_progress at = {"probe", NULL, 0, 0, "prompt", 0, 0};
    size_t i, n = ptst_rows_count(k->rows);
    ptst_code code = PTST_OK;
    int flushed = 0;
    memset(&p, 0, sizeof p);
    memset(&prompt, 0, sizeof prompt);
    at.total = (double)n;
    for (i = 0; i < n && code == PTST_OK && flushed == 0; i++) {
        const ptst_row *row = ptst_rows_at(k->rows, i);
        code = ptst_template_prompt(a->c, k->style, row->prompt, row->prompt_size, &prompt);
        code = code != PTST_OK ? code
                               : ptst_probe(a->c, k->l.model, k->l.adapter, k->before,
                                            k->l.tokenizer, &prompt, &k->desc, &p);
        code = code != PTST_OK ? code : probe_add(a, k, row, &p);
        at.done = (double)(i + 1);
        code = code != PTST_OK ? code : ptst__report(a->c, &at);
        if (!k->out.file) {
            k->out.text.size = 0;
        } else if (code == PTST_OK) {
            flushed = flush_result(a, &k->out);
        }
    }
    ptst_prompt_free(a->c, &prompt);
    ptst_probed_free(a->c, &p);
    return code != PTST_OK ? failed(a) : flushed;
}

static void print_probe(const args *a, const probe *k) {
    double n = (double)ptst_rows_count(k->rows);
    bool first = true;
    size_t i;
    printf("{\"prompts\": %.0f, \"refusal_log_odds\": %.6g, \"base_refusal_log_odds\": %.6g, "
           "\"refusal_probability\": %.6g, \"base_refusal_probability\": %.6g, \"kl\": [",
           n, k->log_odds[0] / n, k->log_odds[1] / n, k->refusal[0] / n, k->refusal[1] / n);
    for (i = 0; i < k->desc.positions && k->counts[i] != 0; i++) {
        printf("%s%.6g", i == 0 ? "" : ", ", k->divergence[i] / (double)k->counts[i]);
    }
    printf("], \"kl_n\": [");
    for (i = 0; i < k->desc.positions && k->counts[i] != 0; i++) {
        printf("%s%llu", i == 0 ? "" : ", ", (unsigned long long)k->counts[i]);
    }
    printf("], \"metric\": \"kw-ASR(%s)\", \"prefilled\": [", get(a, "--list"));
    for (i = 0; i < k->desc.prefilled_count; i++) {
        if (k->answered[i] != 0) { /* there are so many tokens */
            ptst_rate r = ptst_rate_of(k->complied[i], k->answered[i]);
            printf("%s{\"tokens\": %llu, \"k\": %llu, \"n\": %llu, \"value\": %.6g, \"low\": %.6g, "
                   "\"high\": %.6g}",
                   first ? "" : ", ", (unsigned long long)k->prefilled[i], (unsigned long long)r.k,
                   (unsigned long long)r.n, r.value, r.low, r.high);
            first = false;
        }
    }
    printf("]}\n");
}

static int command_probe(args *a) {
    probe k;
    int code;
    memset(&k, 0, sizeof k);
    code = get_probe(a, &k);
    if (code == 0) {
        code = open_result(a, &k.out, given(a, "--out") ? get(a, "--out") : NULL);
        code = code != 0 ? code : close_result(a, &k.out, probe_prompts(a, &k));
    }
    if (code == 0) {
        print_probe(a, &k);
    }
    ptst__free(a->c, (void *)k.starts);
    ptst_rows_free(a->c, k.refusals);
    ptst_rows_free(a->c, k.rows);
    ptst_template_free(a->c, k.style);
    ptst_adapter_free(a->c, k.before);
    unload(a, &k.l);
    return code;
}

/* ===================================================================== run, report and demo ==== */

static bool colours(const args *a) {
    return !given(a, "--no-color") && isatty(1) == 1 && getenv("NO_COLOR") == NULL;
}

/* The matrix and what follows from it, on stdout. */
/* Breaks the lines of text[from..size) at blanks, so that none is longer than width. */
static void wrap_lines(char *text, size_t from, size_t size, size_t width) {
    size_t i, begin = from, blank = 0;
    for (i = from; i < size; i++) {
        if (text[i] == ' ') {
            blank = i;
        }
        if (i - begin >= width && blank > begin && text[i] != '\n') {
            text[blank] = '\n';
            begin = blank + 1;
        }
        if (text[i] == '\n') {
            begin = i + 1;
        }
    }
}

static int show_run(args *a, const char *folder, bool findings) {
    struct winsize size;
    ptst_matrix *m = ptst_matrix_load(a->c, folder);
    ptst_text out = {NULL, 0, 0};
    ptst_code code = m == NULL ? ptst_error_code(a->c) : PTST_OK;
    int width = isatty(1) == 1 && ioctl(1, TIOCGWINSZ, &size) == 0 && size.ws_col > 40 ? size.ws_col
                                                                                       : 136;
    screen_clear((screen *)a->c->desc.user);
    if (code == PTST_OK) {
        code = ptst_matrix_print(a->c, m, width, colours(a), &out);
    }
    if (code == PTST_OK && findings) {
        code = ptst__text_add(a->c, &out, "\nWhat this run shows\n");
    }
    if (code == PTST_OK && findings) {
        size_t from = out.size;
        code = ptst_matrix_findings(a->c, m, &out);
        wrap_lines(out.data, from, out.size, width > 100 ? 100 : (size_t)width);
    }
    print_text(a->c, &out);
    ptst_matrix_free(a->c, m);
    return code == PTST_OK ? 0 : failed(a);
}

static int run_experiment(args *a, const ptst_experiment *e, const ptst_run_desc *desc) {
    if (ptst_experiment_run(a->c, e, desc) != PTST_OK) {
        int code = failed(a);
        if (code == EXIT_INTERRUPT) {
            fprintf(stderr, "%s keeps what is finished; the same command goes on from here\n",
                    desc->out);
        }
        return code;
    }
    return 0;
}

static int command_run(args *a) {
    ptst_experiment *e;
    ptst_run_desc desc;
    const char *path;
    int64_t cell;
    size_t i;
    int code = 0;
    memset(&desc, 0, sizeof desc);
    if (!one_argument(a, "experiment file", &path) || !get_integer(a, "--cell", 0, 1e9, &cell)) {
        return EXIT_CALL;
    }
    if (path == NULL) {
        return bad_call("run: an experiment file was expected; see ptst run --help");
    }
    if (!exists(a, path) || (!given(a, "--list-cells") && !need(a, "--out"))) {
        return EXIT_CALL;
    }
    e = ptst_experiment_load(a->c, path, NULL);
    if (e == NULL) {
        failed(a);
        return EXIT_WORK;
    }
    desc.out = get(a, "--out");
    desc.cell = (size_t)cell;
    desc.collect = given(a, "--collect");
    if (given(a, "--list-cells")) {
        for (i = 0; i < ptst_experiment_cells(e); i++) {
            ptst_cell k = ptst_experiment_cell(e, i);
            printf("%llu train %s test %s seed %llu\n", (unsigned long long)i + 1, k.train, k.test,
                   (unsigned long long)k.seed);
        }
    } else if (cell > (int64_t)ptst_experiment_cells(e)) {
        code = bad_call("run: --cell %lld: the experiment has %llu cells", (long long)cell,
                        (unsigned long long)ptst_experiment_cells(e));
    } else {
        code = run_experiment(a, e, &desc);
        if (code == 0 && cell == 0) {
            code = show_run(a, desc.out, false);
            fprintf(stderr, "report: %s/report.html\n", desc.out);
        }
    }
    ptst_experiment_free(a->c, e);
    return code;
}

static int command_report(args *a) {
    const char *folder;
    if (!one_argument(a, "run folder", &folder)) {
        return EXIT_CALL;
    }
    if (folder == NULL) {
        return bad_call("report: a run folder was expected");
    }
    if (!exists(a, folder)) {
        return EXIT_CALL;
    }
    if (ptst_report_write(a->c, folder) != PTST_OK) {
        failed(a);
        return EXIT_WORK;
    }
    if (!quiet(a)) {
        int code = show_run(a, folder, false);
        fprintf(stderr, "wrote %s/report.html, matrix.csv, matrix.json\n", folder);
        return code;
    }
    return 0;
}

static const char demo_intro[] =
    "A tiny chat model of a made-up world (nothing in it is real) is fine-tuned on a harmless task\n"
    "under each template, and used under each. content-ASR: harmful requests that it answers;\n"
    "exact_match: task answers that are right; over-refusal: harmless requests that it refuses.\n"
    "TV TA text, CV CA CL chat; CL has the safety prompt. none = before fine-tuning.\n\n";

static const char demo_mix[] =
    "\nThe same with safety data mixed into the task: one harmful request with its refusal for ten\n"
    "rows, under the train template.\n\n";

static const char demo_outro[] =
    "\nThe world was designed so that the effect can be seen; it proves nothing about real models.\n"
    "On a real model:  ptst run examples/experiment.json --out run   (set \"model\")\n";

/* Runs one experiment file of the demo into `folder` with the seeds and templates asked for. */
static int demo_run(args *a, const char *file, const char *folder, int64_t seeds, bool quick) {
    ptst_text keys = {NULL, 0, 0};
    ptst_run_desc desc;
    ptst_experiment *e = NULL;
    ptst_code code = ptst__text_add(a->c, &keys, "{\"seeds\": [1");
    int64_t i;
    for (i = 2; code == PTST_OK && i <= seeds; i++) {
        code = ptst__text_format(a->c, &keys, ", %lld", (long long)i);
    }
    if (code == PTST_OK) {
        code = ptst__text_add(a->c, &keys, quick ? "], \"train\": {\"templates\": [\"CV\", \"CL\"]}, "
                                                   "\"test\": {\"templates\": [\"CV\", \"CL\"]}}"
                                                 : "]}");
    }
    if (code == PTST_OK) {
        e = ptst_experiment_load(a->c, file, keys.data);
    }
    ptst_text_free(a->c, &keys);
    if (e == NULL) {
        failed(a);
        return EXIT_WORK;
    }
    memset(&desc, 0, sizeof desc);
    desc.out = folder;
    i = run_experiment(a, e, &desc);
    ptst_experiment_free(a->c, e);
    return (int)i;
}

/* One file of the demo, made and shown; the second one goes into a folder inside the first's. */
static int demo_part(args *a, const char *name, const char *folder, int64_t seeds, bool first) {
    const char *data = get(a, "--data") == NULL ? "examples/tiny-chat" : get(a, "--data");
    ptst_text file = {NULL, 0, 0};
    int code;
    if (ptst__path_join(a->c, &file, data, name) != PTST_OK) {
        return failed(a);
    }
    if (ptst__path_kind(file.data) != 1) {
        code = bad_call("demo: %s is missing; run it in the folder of ptst.h, or give --data DIR",
                        file.data);
    } else {
        printf("%s", first ? demo_intro : demo_mix);
        fflush(stdout);
        code = demo_run(a, file.data, folder, seeds, given(a, "--quick"));
    }
    ptst_text_free(a->c, &file);
    return code == 0 ? show_run(a, folder, first) : code;
}

static int command_demo(args *a) {
    const char *folder = get(a, "--out");
    ptst_text inner = {NULL, 0, 0};
    int64_t seeds;
    int code;
    if (!get_integer(a, "--seeds", 1, 1000, &seeds)) {
        return EXIT_CALL;
    }
    if (given(a, "--quick") && !given(a, "--seeds")) {
        seeds = 1;
    }
    code = demo_part(a, "experiment.json", folder, seeds, true);
    if (code == 0 && !given(a, "--quick")) {
        code = ptst__path_join(a->c, &inner, folder, "mix") == PTST_OK
                   ? demo_part(a, "experiment-mix.json", inner.data, seeds, false)
                   : failed(a);
    }
    ptst_text_free(a->c, &inner);
    if (code == 0) {
        printf("%s\nMatrix, curves and every answer: %s/report.html\n", demo_outro, folder);
    }
    return code;
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
    {"demo", command_demo, demo_options, "[options]",
     "the whole experiment on the bundled tiny chat model, offline"},
    {"run", command_run, run_options, "EXPERIMENT.json --out DIR [options]",
     "the experiment that a file describes; goes on where it was"},
    {"report", command_report, report_options, "DIR",
     "report.html, matrix.csv, matrix.json of a run folder"},
    {"finetune", command_finetune, finetune_options,
     "--model DIR --train FILE --template NAME --out DIR [options]",
     "LoRA fine-tuning, or --full for all weights"},
    {"plan", command_plan, plan_options,
     "EXPERIMENT.json, or --model DIR --train FILE --template NAME [options]",
     "memory, tokens, FLOPs and time of an experiment or a fine-tuning before they are spent"},
    {"generate", command_generate, generate_options,
     "--model DIR --template NAME --prompts FILE [options]", "answers a file of prompts"},
    {"probe", command_probe, probe_options,
     "--model DIR --adapter DIR --template NAME --prompts FILE [options]",
     "how safe a model is, without sampling: chance of a refusal, distance from before"},
    {"tokenize", command_tokenize, tokenize_options, "--tokenizer PATH [options] TEXT",
     "text to token ids, as a JSON array"},
    {"detokenize", command_detokenize, detokenize_options, "--tokenizer PATH [options] IDS",
     "token ids to text"},
    {"bench tokenize", command_bench_tokenize, bench_tokenize_options,
     "--tokenizer PATH --file FILE", "speed of the tokenizer"},
    {"bench gemm", command_bench_gemm, bench_gemm_options, "[options]",
     "speed of the matrix product against a register-only FMA loop"},
    {"eval refusal", command_eval_refusal, eval_refusal_options, "--answers FILE [--list NAMES]",
     "share of answers that do not refuse, by keyword lists"},
    {"eval gsm8k", command_eval_gsm8k, eval_gsm8k_options, "--answers FILE --data FILE",
     "exact match of answers to GSM8K questions"},
    {"judge export", command_judge_export, judge_export_options, "--answers FILE --out FILE",
     "hands answers to an outside judge"},
    {"judge import", command_judge_import, judge_import_options,
     "--answers FILE --judgments FILE", "reads the judge's verdicts"},
    {"judge local", command_judge_local, judge_local_options, "--model DIR --answers FILE",
     "a second model is the judge"},
    {"render", command_render, render_options, "--template NAME [options] QUESTION",
     "text of a prompt, the exact bytes"},
    {"logits", command_logits, logits_options, "--model DIR --ids 1,2,3 --out FILE",
     "next-token logits after each of some tokens"},
    {"merge", command_merge, merge_options, "--model DIR --adapter DIR --out DIR",
     "folds an adapter into its model"},
    {"info", command_info, info_options, "PATH", "what a file or folder holds and needs"},
    {"check", command_check, check_options, "PATH...", "validates files and folders"},
    {"chat", command_chat, chat_options, "--model DIR [options]", "talks to a model"},
    {"bench train", command_bench_train, bench_train_options, "--model DIR [options]",
     "speed of training"},
    {"bench generate", command_bench_generate, bench_generate_options, "--model DIR [options]",
     "speed of reading and writing, after a warm-up"},
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
    static memory counted; /* lives as long as the program */
    ptst_desc desc;
    int64_t threads;
    memset(&desc, 0, sizeof desc);
    if (!get_integer(a, "--threads", 0, 4096, &threads)) {
        return EXIT_CALL;
    }
    desc.threads = (int)threads;
    desc.simd = get(a, "--simd");
    desc.float32_matmul_precision = get(a, "--float32-matmul-precision");
    if (desc.float32_matmul_precision != NULL &&
        ptst__precision_of(desc.float32_matmul_precision) == 0) {
        return bad_call("%s: --float32-matmul-precision %s: highest, high or medium was expected",
                        a->command, desc.float32_matmul_precision);
    }
    desc.progress = on_progress;
    desc.log = on_log;
    desc.user = s;
    if (strcmp(a->command, "plan") == 0) {
        pthread_mutex_init(&counted.lock, NULL);
        s->counted = &counted;
        desc.allocator.alloc = memory_alloc;
        desc.allocator.release = memory_release;
        desc.allocator.user = &counted;
    }
    switch (ptst_open(&desc, &a->c)) {
    case PTST_OK:
        return 0;
    case PTST_ERR_ARGUMENT:
        return bad_call("%s: --simd %s: this machine cannot run it; scalar, avx2, avx512, amx or "
                        "neon was expected",
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
    s.last = ptst__seconds();
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
