/* Tests of >>model. Run from the top folder; see test.h. */
#include "test.h"

#define STORIES "tests/golden/stories260K"

/* ---- the real stories260K weights ---- */

/* Reads the greedy ids of reference.json. Returns their number. */
static size_t stories_ids(ptst_ctx *c, int32_t *ids, size_t max) {
    ptst_json *j = ptst_json_load(c, STORIES "/reference.json");
    int32_t list = j == NULL ? -1 : ptst_json_get(j, 0, "greedy_ids"), k;
    size_t n = 0;
    for (k = list < 0 ? -1 : ptst_json_first(j, list); k >= 0 && n < max; k = ptst_json_next(j, k)) {
        ids[n++] = (int32_t)ptst_json_number(j, k, -1);
    }
    ptst_json_free(c, j);
    return n;
}

static int32_t model_argmax(const float *x, size_t n) {
    size_t i, best = 0;
    for (i = 1; i < n; i++) {
        best = x[i] > x[best] ? i : best;
    }
    return (int32_t)best;
}

/* The greedy text of the reference, token for token: one token at a time, and all at once. */
static void stories_greedy_with(const char *simd) {
    enum { MAX = 300 };
    int32_t ids[MAX], token;
    ptst_ctx *c = test_open(2, simd);
    ptst_model *m = ptst_model_load(c, STORIES, PTST_DTYPE_FILE);
    ptst_session_desc d;
    ptst_session *s;
    ptst_chunk chunk;
    size_t i, n = stories_ids(c, ids, MAX);
    memset(&d, 0, sizeof d);
    d.slots = 2;
    d.logit_rows = MAX;
    CHECK(n == 257);
    CHECK(m != NULL);
    s = m == NULL ? NULL : ptst_session_new(c, m, NULL, &d);
    CHECK(s != NULL);
    if (s != NULL && n == 257) {
        token = ids[0];
        chunk.slot = 0;
        chunk.tokens = &token;
        chunk.count = 1;
        chunk.logits = PTST_LOGITS_LAST;
        for (i = 1; i < n; i++) {
            CHECK(ptst_eval(c, s, &chunk, 1) == PTST_OK);
            token = model_argmax(ptst_logits(s, 0), 512);
            CHECK(token == ids[i]);
            token = ids[i];
        }
        chunk.slot = 1;
        chunk.tokens = ids;
        chunk.count = n - 1;
        chunk.logits = PTST_LOGITS_ALL;
        CHECK(ptst_eval(c, s, &chunk, 1) == PTST_OK);
        CHECK(ptst_logits(s, n - 1) == NULL);
        for (i = 1; i < n; i++) {
            CHECK(model_argmax(ptst_logits(s, i - 1), 512) == ids[i]);
        }
    }
    ptst_session_free(c, s);
    ptst_model_free(c, m);
    ptst_close(c);
}

static void stories_greedy(void) {
    static const char *const levels[] = {"scalar", "avx2", "avx512", "neon"};
    size_t i;
    for (i = 0; i < 4; i++) {
        ptst_desc d;
        ptst_ctx *c;
        memset(&d, 0, sizeof d);
        d.simd = levels[i];
        d.threads = 1;
        if (ptst_open(&d, &c) == PTST_OK) {
            ptst_close(c);
            stories_greedy_with(levels[i]);
        }
    }
}

static void suite_model(void) { RUN(stories_greedy); }

MAIN(model)
