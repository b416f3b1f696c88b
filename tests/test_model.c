/* Tests of >>model. Run from the top folder; see test.h. */
#include "models.h"

#define STORIES "tests/golden/stories260K"

/* ---- the real stories260K weights ---- */

/* Reads the greedy ids of reference.json. Returns their number. */
static size_t stories_ids(ptst_ctx *c, int32_t *ids, size_t max) {
    ptst_json *j = ptst_json_load(c, STORIES "/reference.json");
    int32_t list = j == NULL ? -1 : ptst_json_get(j, 0, "greedy_ids"), k;
    size_t n = 0;
    for (k = list < 0 ? -1 : ptst_json_first(j, list); k >= 0 && n < max;
         k = ptst_json_next(j, k)) {
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
static void stories_greedy_with(ptst_ctx *c) {
    enum { MAX = 300 };
    int32_t ids[MAX], token;
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
}

static void stories_greedy(void) { models_each_level(stories_greedy_with); }

/* ---- parity with transformers ---- */

static void golden_logits_with(ptst_ctx *c) {
    models_case k;
    int i;
    for (i = 0; i < MODELS; i++) {
        CHECK(models_open(c, &k, models_names[i], false));
        CHECK_NEAR(models_logits_error(c, &k, "logits"), 0, 1e-4); /* both sides sum in float32 */
        models_close(c, &k);
    }
}

static void golden_logits(void) { models_each_level(golden_logits_with); }

static void golden_gradients_with(ptst_ctx *c) {
    models_case k;
    int i;
    for (i = 0; i < MODELS; i++) {
        CHECK(models_open(c, &k, models_names[i], false));
        if (ptst_tensors_find(k.expected, "full.model.norm.weight") != NULL) {
            CHECK(!ptst_model_trainable(k.m));
            CHECK(ptst_model_unfreeze(c, k.m) == PTST_OK);
            CHECK_NEAR(models_gradient_error(c, &k, "loss", "full."), 0, 1e-3);
        }
        models_close(c, &k);
    }
}

static void golden_gradients(void) { models_each_level(golden_gradients_with); }

static void suite_model(void) {
    RUN(stories_greedy);
    RUN(golden_logits);
    RUN(golden_gradients);
}

MAIN(model)
