/* test.h - the harness of all tests. Each tests/test_<section>.c includes it (and with it the
   implementation, so private functions can be tested), defines static functions without
   arguments, and one `static void suite_<section>(void)` that calls RUN(function) for each.
   It ends with MAIN(<section>), which becomes main() unless tests/all.c includes the file.

       cc -O1 -g tests/test_core.c -o /tmp/t -lm -pthread && /tmp/t        (from the top folder)

   A case passes if no CHECK in it fails. SKIP("reason") leaves a case as skipped. */
#ifndef TEST_H
#define TEST_H

#define PTST_IMPLEMENTATION
#include "../ptst.h"

static int test_passed, test_failed, test_skipped;
static int test_bad, test_skip; /* of the running case */
static const char *test_filter;

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            test_bad++;                                                                            \
            fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition);              \
        }                                                                                          \
    } while (0)

/* Equal strings; prints both if not. */
#define CHECK_TEXT(got, expected) test_text(__FILE__, __LINE__, (got), (expected))

/* |got - expected| <= bound; prints the values if not. NaN fails. */
#define CHECK_NEAR(got, expected, bound) test_near(__FILE__, __LINE__, (got), (expected), (bound))

#define SKIP(reason)                                                                               \
    do {                                                                                           \
        fprintf(stderr, "skipped: %s\n", reason);                                                  \
        test_skip = 1;                                                                             \
        return;                                                                                    \
    } while (0)

#define RUN(function) test_run(#function, function)

PTST__UNUSED static void test_text(const char *file, int line, const char *got,
                                   const char *expected) {
    if (got == NULL || expected == NULL || strcmp(got, expected) != 0) {
        test_bad++;
        fprintf(stderr, "%s:%d: got \"%s\", expected \"%s\"\n", file, line,
                got == NULL ? "(null)" : got, expected == NULL ? "(null)" : expected);
    }
}

PTST__UNUSED static void test_near(const char *file, int line, double got, double expected,
                                   double bound) {
    if (!(fabs(got - expected) <= bound)) {
        test_bad++;
        fprintf(stderr, "%s:%d: got %.9g, expected %.9g +- %.3g\n", file, line, got, expected,
                bound);
    }
}

PTST__UNUSED static void test_run(const char *name, void (*function)(void)) {
    if (test_filter != NULL && strstr(name, test_filter) == NULL) {
        return;
    }
    test_bad = test_skip = 0;
    function();
    if (test_bad != 0) {
        fprintf(stderr, "FAILED %s\n", name);
        test_failed++;
    } else if (test_skip) {
        test_skipped++;
    } else {
        test_passed++;
    }
}

/* A context with an error handler for the tests; ends the program if it cannot be opened. */
PTST__UNUSED static ptst_ctx *test_open(int threads, const char *simd) {
    ptst_ctx *c;
    ptst_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.threads = threads;
    desc.simd = simd;
    if (ptst_open(&desc, &c) != PTST_OK) {
        fprintf(stderr, "cannot open a context\n");
        exit(1);
    }
    return c;
}

/* ---- an allocator that counts, and fails on demand (for out-of-memory sweeps) ---- */

typedef struct test_memory {
    long live;       /* blocks not yet released */
    long calls;      /* allocations asked for */
    long fail_at;    /* number of the call that fails, counted from 0; -1 = none */
    bool fail_after; /* and all after it */
    size_t bytes, peak; /* of the live blocks; the most there were */
} test_memory;

static void *test_alloc(void *user, size_t size) {
    test_memory *m = (test_memory *)user;
    long call = m->calls++;
    void *p;
    if (m->fail_at >= 0 && (call == m->fail_at || (m->fail_after && call > m->fail_at))) {
        return NULL;
    }
    p = malloc(size);
    m->live += p != NULL;
    m->bytes += p != NULL ? size : 0;
    m->peak = m->bytes > m->peak ? m->bytes : m->peak;
    return p;
}

static void test_release(void *user, void *pointer, size_t size) {
    test_memory *m = (test_memory *)user;
    m->bytes -= pointer != NULL ? size : 0;
    m->live -= pointer != NULL;
    free(pointer);
}

/* A context of one thread whose memory is counted in m. */
PTST__UNUSED static ptst_ctx *test_open_counted(test_memory *m) {
    ptst_ctx *c = NULL;
    ptst_desc desc;
    memset(&desc, 0, sizeof desc);
    memset(m, 0, sizeof *m);
    m->fail_at = -1;
    desc.threads = 1;
    desc.allocator.alloc = test_alloc;
    desc.allocator.release = test_release;
    desc.allocator.user = m;
    CHECK(ptst_open(&desc, &c) == PTST_OK);
    return c;
}

/* Calls work(c, arg) again and again, letting allocation 0, 1, 2, ... fail, until it succeeds
   without a failure; each failure must be PTST_ERR_MEMORY and leave no block behind. */
PTST__UNUSED static void test_memory_sweep(ptst_code (*work)(ptst_ctx *c, void *arg), void *arg) {
    long n;
    for (n = 0; n < 100000; n++) {
        test_memory m = {0, 0, -1, (n & 1) != 0, 0, 0};
        ptst_desc desc;
        ptst_ctx *c;
        ptst_code code;
        memset(&desc, 0, sizeof desc);
        desc.threads = 1;
        desc.allocator.alloc = test_alloc;
        desc.allocator.release = test_release;
        desc.allocator.user = &m;
        if (ptst_open(&desc, &c) != PTST_OK) {
            CHECK(false);
            return;
        }
        m.fail_at = m.calls + n / 2; /* once with one failure, once with all from there on */
        code = work(c, arg);
        CHECK(code == PTST_OK || code == PTST_ERR_MEMORY);
        if (code != PTST_OK && code != PTST_ERR_MEMORY) {
            fprintf(stderr, "allocation %ld: %s\n", n / 2, ptst_error_text(c));
        }
        ptst_close(c);
        CHECK(m.live == 0);
        if (test_bad != 0) {
            fprintf(stderr, "while allocation %ld failed\n", n / 2);
            return;
        }
        if (code == PTST_OK && m.calls <= m.fail_at) {
            return;
        }
    }
    CHECK(n < 100000);
}

/* Appends a part of a document as JSON text. */
PTST__UNUSED static void test_put_json(ptst_ctx *c, const ptst_json *j, int32_t node, ptst_text *out) {
    size_t size;
    int32_t k;
    const char *s;
    switch (ptst_json_kind(j, node)) {
    case PTST_JSON_STRING:
        s = ptst_json_string(j, node, &size);
        ptst__json_quote(c, out, s, size);
        break;
    case PTST_JSON_NUMBER:
        s = ptst_json_number_text(j, node, &size);
        ptst_text_append(c, out, s, size);
        break;
    case PTST_JSON_ARRAY:
        ptst__text_add(c, out, "[");
        for (k = ptst_json_first(j, node); k >= 0; k = ptst_json_next(j, k)) {
            ptst__text_add(c, out, k == ptst_json_first(j, node) ? "" : ",");
            test_put_json(c, j, k, out);
        }
        ptst__text_add(c, out, "]");
        break;
    case PTST_JSON_OBJECT:
        ptst__text_add(c, out, "{");
        for (k = ptst_json_first(j, node); k >= 0; k = ptst_json_next(j, k)) {
            ptst__text_add(c, out, k == ptst_json_first(j, node) ? "" : ",");
            test_put_json(c, j, k, out);
            ptst__text_add(c, out, ":");
            k = ptst_json_next(j, k);
            test_put_json(c, j, k, out);
        }
        ptst__text_add(c, out, "}");
        break;
    default:
        ptst__text_add(c, out, ptst_json_kind(j, node) == PTST_JSON_TRUE    ? "true"
                               : ptst_json_kind(j, node) == PTST_JSON_FALSE ? "false"
                                                                            : "null");
    }
}

PTST__UNUSED static int test_summary(void) {
    printf("%d passed, %d failed, %d skipped\n", test_passed, test_failed, test_skipped);
    return test_failed != 0;
}

#ifdef TEST_ALL
#define MAIN(section)
#else
#define MAIN(section)                                                                              \
    int main(int argc, char **argv) {                                                              \
        test_filter = argc > 1 ? argv[1] : NULL;                                                   \
        suite_##section();                                                                         \
        return test_summary();                                                                     \
    }
#endif

#endif
