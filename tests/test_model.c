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

/* ---- gradients against finite differences ---- */

/* A pass over three sequences, the third of which shares a prefix with the second. */
typedef struct model_trial {
    ptst_model *m;
    ptst_adapter *a;
    ptst__pass *p;
    int32_t tokens[24], labels[24];
    ptst_segment segments[4];
    ptst_batch batch;
    double dropout;
} model_trial;

static void model_trial_close(ptst_ctx *c, model_trial *t) {
    ptst__pass_free(c, t->p);
    ptst_adapter_free(c, t->a);
    ptst_model_free(c, t->m);
}

static bool model_trial_open_with(ptst_ctx *c, model_trial *t, const ptst_config *g,
                                  const char *targets, const char *modules_to_save) {
    static const ptst_segment segments[4] = {{0, 7, -1}, {7, 5, -1}, {12, 4, 1}, {16, 8, 1}};
    ptst_lora_desc d;
    size_t i;
    memset(t, 0, sizeof *t);
    memset(&d, 0, sizeof d);
    d.rank = 3;
    d.alpha = 2; /* small, so that the loss is smooth enough for finite differences */
    d.targets = targets;
    d.modules_to_save = modules_to_save;
    t->m = ptst_model_new(c, g, 5);
    t->a = t->m == NULL || targets == NULL ? NULL : ptst_adapter_new(c, t->m, &d);
    for (i = 0; t->a != NULL && i < t->a->values_count; i++) {
        t->a->values[i] += 0.05f * (float)((int)(i * 7 % 11) - 5); /* B as well */
    }
    for (i = 0; i < 24; i++) {
        t->tokens[i] = (int32_t)(i * 5 % 23);
        t->labels[i] = i % 3 == 0 ? -1 : (int32_t)(i * 11 % 23);
    }
    memcpy(t->segments, segments, sizeof segments);
    t->batch.tokens = t->tokens;
    t->batch.labels = t->labels;
    t->batch.count = 24;
    t->batch.segments = t->segments;
    t->batch.segments_count = 4;
    t->p = t->m == NULL ? NULL : ptst__pass_new(c, t->m, t->a, 24, 24, 4, false);
    CHECK(t->p != NULL && (targets == NULL || t->a != NULL));
    return t->p != NULL;
}

static bool model_trial_open(ptst_ctx *c, model_trial *t, const ptst_config *g,
                             const char *targets) {
    return model_trial_open_with(c, t, g, targets, NULL);
}

static double model_trial_loss(ptst_ctx *c, model_trial *t, bool backward) {
    double sum = -1;
    size_t labels = 0;
    CHECK(ptst__pass_run(c, t->p, &t->batch, backward, t->dropout, 11, 22, &sum, &labels) ==
          PTST_OK);
    CHECK(labels == 16);
    return sum;
}

/* Each tensor: the slope of the loss along a direction, half of it the gradient (so that the slope
   is large), half of it random (so that a wrong gradient shows), against gradient x direction. */
static void model_trial_slopes(ptst_ctx *c, model_trial *t) {
    const ptst__param *list = NULL;
    size_t i, k, n;
    ptst_rng r = {1, 2, 0};
    ptst__pass_zero(t->p);
    model_trial_loss(c, t, true);
    n = ptst__pass_params(t->p, &list);
    CHECK(n != 0);
    for (i = 0; i < n; i++) {
        const ptst__param *q = &list[i];
        float *old = (float *)malloc(2 * q->count * sizeof *old), *u = old + q->count;
        double norm = models_norm(q->grad, q->count), expected = 0, got = 0, h = 1.0 / 512, one;
        int side;
        CHECK(norm > 1e-3); /* nothing is left out */
        for (k = 0; k < q->count; k++) {
            u[k] = ptst_rng_normal(&r);
        }
        one = models_norm(u, q->count);
        for (k = 0; k < q->count; k++) {
            u[k] = (float)((double)u[k] / one + (double)q->grad[k] / norm);
            expected += (double)u[k] * (double)q->grad[k];
        }
        memcpy(old, q->value, q->count * sizeof *old);
        for (side = -2; side <= 2; side++) { /* fourth order: errors of h^4 and of rounding / h */
            static const double weight[5] = {1.0 / 12, -2.0 / 3, 0, 2.0 / 3, -1.0 / 12};
            for (k = 0; k < q->count; k++) {
                q->value[k] = old[k] + (float)(side * h) * u[k];
            }
            got += weight[side + 2] * (side == 0 ? 0 : model_trial_loss(c, t, false)) / h;
        }
        memcpy(q->value, old, q->count * sizeof *old);
        if (!(fabs(got - expected) <= 2e-3 * norm)) {
            fprintf(stderr, "%s\n", q->name);
        }
        /* the loss, about 50, is good to about 1e-6: 1e-3 in a slope with h = 1/512 */
        CHECK_NEAR(got, expected, 2e-3 * norm + 2e-3);
        free(old);
    }
}

static void differences_full(void) {
    ptst_ctx *c = test_open(1, "scalar");
    ptst_config g;
    model_trial t;
    int i;
    for (i = 0; i < 4; i++) {
        g = models_config(i == 1 ? "mistral" : i == 2 ? "qwen2" : "llama");
        g.tie_word_embeddings = i == 0;
        g.sliding_window = i == 1 ? 3 : 0;
        g.attention_bias = g.mlp_bias = i == 3;
        if (model_trial_open(c, &t, &g, NULL)) {
            model_trial_slopes(c, &t);
        }
        model_trial_close(c, &t);
    }
    ptst_close(c);
}

static void differences_adapter(void) {
    static const char *const targets[] = {"all-linear", "o_proj", "model.layers.1.mlp.down_proj",
                                          "model.layers.2.self_attn.k_proj,gate_proj"};
    ptst_ctx *c = test_open(1, "scalar");
    ptst_config g = models_config("llama");
    model_trial t;
    int i;
    for (i = 0; i < 8; i++) {
        if (model_trial_open(c, &t, &g, targets[i / 2])) {
            t.dropout = i % 2 == 0 ? 0 : 0.3;
            model_trial_slopes(c, &t);
        }
        model_trial_close(c, &t);
    }
    ptst_close(c);
}

/* The same with an embedding and a head of the adapter's own, also where the model ties them. */
static void differences_saved(void) {
    static const char *const saved[] = {"lm_head", "embed_tokens", "embed_tokens,lm_head"};
    ptst_ctx *c = test_open(1, "scalar");
    model_trial t;
    int i;
    for (i = 0; i < 6; i++) {
        ptst_config g = models_config(i < 3 ? "llama" : "qwen2");
        g.tie_word_embeddings = i < 3;
        if (model_trial_open_with(c, &t, &g, "model.layers.1.mlp.down_proj", saved[i % 3])) {
            const ptst__param *list = NULL;
            CHECK(ptst__pass_params(t.p, &list) == (i % 3 == 2 ? 4 : 3));
            CHECK_TEXT(list[2].name, i % 3 == 0 ? "base_model.model.lm_head.weight"
                                                : "base_model.model.model.embed_tokens.weight");
            CHECK(ptst_adapter_parameters(t.a) ==
                  3u * (10 + 12) + (i % 3 == 2 ? 2 : 1) * 23u * 12u);
            model_trial_slopes(c, &t);
        }
        model_trial_close(c, &t);
    }
    ptst_close(c);
}

/* ---- packing, prefixes, threads ---- */

static void model_copy_grads(const ptst__pass *p, float *to) {
    memcpy(to, p->grads, p->grads_count * sizeof *to);
}

/* Runs several batches one after the other; the sum of their losses. */
static double model_run_each(ptst_ctx *c, ptst__pass *p, const ptst_batch *b, size_t count) {
    double sum, total = 0;
    size_t i;
    ptst__pass_zero(p);
    for (i = 0; i < count; i++) {
        CHECK(ptst__pass_run(c, p, &b[i], true, 0, 0, 0, &sum, NULL) == PTST_OK);
        total += sum;
    }
    return total;
}

/* Losses and gradients of two ways to compute the same differ by rounding only. */
static void model_same_result(const ptst__pass *p, double loss, const float *grads,
                              double expected_loss) {
    CHECK_NEAR(loss, expected_loss, 1e-5 * expected_loss);
    CHECK_NEAR(models_norm_error(p->grads, grads, p->grads_count), 0, 1e-4);
}

static void packed_is_separate(void) {
    ptst_ctx *c = test_open(2, NULL);
    models_case k;
    int i, s;
    for (i = 0; i < MODELS; i++) {
        ptst_batch each[3];
        ptst_segment one[3];
        ptst__pass *p;
        float *grads;
        double packed;
        CHECK(models_open(c, &k, models_names[i], true));
        p = ptst__pass_new(c, k.m, k.a, MODELS_TOKENS, MODELS_TOKENS, 3, false);
        grads = (float *)malloc(p->grads_count * sizeof *grads);
        for (s = 0; s < 3; s++) {
            one[s].begin = 0;
            one[s].count = k.segments[s].count;
            one[s].prefix = -1;
            each[s].tokens = k.tokens + k.segments[s].begin;
            each[s].labels = k.labels + k.segments[s].begin;
            each[s].count = one[s].count;
            each[s].segments = &one[s];
            each[s].segments_count = 1;
        }
        packed = model_run_each(c, p, &k.batch, 1);
        model_copy_grads(p, grads);
        model_same_result(p, model_run_each(c, p, each, 3), grads, packed);
        free(grads);
        ptst__pass_free(c, p);
        models_close(c, &k);
    }
    ptst_close(c);
}

/* Two sequences with a common head of 6 tokens, computed twice, or once for both. */
static void prefix_is_repetition(void) {
    enum { HEAD = 6, A = 9, B = 4 };
    static const ptst_segment apart[2] = {{0, HEAD + A, -1}, {HEAD + A, HEAD + B, -1}};
    static const ptst_segment shared[3] = {{0, HEAD, -1}, {HEAD, A, 0}, {HEAD + A, B, 0}};
    ptst_ctx *c = test_open(2, NULL);
    int32_t tokens[2][MODELS_TOKENS], labels[2][MODELS_TOKENS];
    ptst_batch two, one;
    models_case k;
    int i, j;
    for (i = 0; i < MODELS - MODELS_WHOLE; i++) { /* see models.h */
        ptst__pass *p;
        float *grads;
        double expected;
        CHECK(models_open(c, &k, models_names[i], true));
        for (j = 0; j < 2 * HEAD + A + B; j++) { /* head, a, head, b */
            tokens[0][j] =
                j < HEAD + A ? k.tokens[j] : k.tokens[j < 2 * HEAD + A ? j - HEAD - A : j];
            labels[0][j] = (j < HEAD || (j >= HEAD + A && j < 2 * HEAD + A)) ? -1 : k.tokens[j + 1];
        }
        memcpy(tokens[1], tokens[0], (HEAD + A) * sizeof(int32_t));
        memcpy(labels[1], labels[0], (HEAD + A) * sizeof(int32_t));
        memcpy(tokens[1] + HEAD + A, tokens[0] + 2 * HEAD + A, B * sizeof(int32_t));
        memcpy(labels[1] + HEAD + A, labels[0] + 2 * HEAD + A, B * sizeof(int32_t));
        two.tokens = tokens[0];
        two.labels = labels[0];
        two.count = 2 * HEAD + A + B;
        two.segments = apart;
        two.segments_count = 2;
        one.tokens = tokens[1];
        one.labels = labels[1];
        one.count = HEAD + A + B;
        one.segments = shared;
        one.segments_count = 3;
        p = ptst__pass_new(c, k.m, k.a, MODELS_TOKENS, A + B, 3, false);
        grads = (float *)malloc(p->grads_count * sizeof *grads);
        expected = model_run_each(c, p, &two, 1);
        model_copy_grads(p, grads);
        model_same_result(p, model_run_each(c, p, &one, 1), grads, expected);
        free(grads);
        ptst__pass_free(c, p);
        models_close(c, &k);
    }
    ptst_close(c);
}

/* Gradients of all weights, those of the embedding first, of a small model in which `pad` is the
   padding, and of its head in *head; the head is the embedding or equal to it. */
static float *model_padded(ptst_ctx *c, int32_t pad, bool tied, float **head, size_t *count) {
    static const int32_t tokens[] = {3, 5, 7, 5, 2, 9, 5, 3}, labels[] = {5, 7, 5, 2, 9, 5, 3, 1};
    static const ptst_segment segment = {0, 8, -1};
    ptst_config g = models_config("llama");
    ptst_batch b;
    ptst_model *m;
    ptst__pass *p;
    float *grads;
    g.pad_token_id = pad;
    g.tie_word_embeddings = tied;
    m = ptst_model_new(c, &g, 4);
    memcpy((float *)(uintptr_t)m->head->data, m->embedding->data, m->V * m->C * sizeof(float));
    b.tokens = tokens;
    b.labels = labels;
    b.count = segment.count;
    b.segments = &segment;
    b.segments_count = 1;
    p = ptst__pass_new(c, m, NULL, b.count, b.count, 1, false);
    CHECK(p != NULL && ptst__pass_run(c, p, &b, true, 0, 0, 0, NULL, NULL) == PTST_OK);
    CHECK(m->embedding == m->weights);
    *count = p->grads_count;
    grads = (float *)malloc(p->grads_count * sizeof *grads);
    model_copy_grads(p, grads);
    *head = grads + (p->weight_grads[m->head - m->weights] - p->grads);
    ptst__pass_free(c, p);
    ptst_model_free(c, m);
    return grads;
}

/* The row of pad_token_id in the embedding learns nothing, as with padding_idx of torch's Embedding;
   if the embedding is also the head it learns what the head does. All else learns the same. */
static void padding_learns_nothing(void) {
    enum { PAD = 5 };
    ptst_ctx *c = test_open(2, NULL);
    size_t C = (size_t)models_config("llama").hidden_size, n, i;
    float *head, *tied_head;
    float *none = model_padded(c, -1, false, &head, &n);
    float *pad = model_padded(c, PAD, false, &head, &n);
    float *tied = model_padded(c, PAD, true, &tied_head, &i);
    CHECK(models_norm(none + PAD * C, C) != 0 && models_norm(pad + PAD * C, C) == 0);
    memset(none + PAD * C, 0, C * sizeof *none);
    CHECK(memcmp(none, pad, n * sizeof *none) == 0);
    CHECK(tied_head == tied && models_norm(head + PAD * C, C) != 0);
    CHECK(memcmp(tied + PAD * C, head + PAD * C, C * sizeof *head) == 0);
    free(none);
    free(pad);
    free(tied);
    ptst_close(c);
}

/* Gradient checkpointing: less memory, the same bits; adapters, also with dropout, and all weights. */
static void again_same_bits(void) {
    ptst_ctx *c = test_open(2, NULL);
    int i, k, full;
    for (i = 0; i < MODELS; i++) {
        for (full = 0; full < 2; full++) {
            models_case m;
            float *grads = NULL;
            double sum[2];
            CHECK(models_open(c, &m, models_names[i], !full));
            CHECK(!full || ptst_model_unfreeze(c, m.m) == PTST_OK);
            for (k = 0; k < 2; k++) {
                ptst__pass *p = ptst__pass_new(c, m.m, m.a, m.batch.count, m.batch.count,
                                               m.batch.segments_count, k == 1);
                CHECK(p != NULL);
                if (p == NULL) {
                    continue;
                }
                grads = grads == NULL ? (float *)malloc(p->grads_count * sizeof *grads) : grads;
                CHECK(ptst__pass_run(c, p, &m.batch, true, full ? 0 : 0.25, 3, 4, &sum[k], NULL) ==
                      PTST_OK);
                if (k == 0) {
                    memcpy(grads, p->grads, p->grads_count * sizeof *grads);
                }
                CHECK(memcmp(grads, p->grads, p->grads_count * sizeof *grads) == 0);
                ptst__pass_free(c, p);
            }
            CHECK(memcmp(&sum[0], &sum[1], sizeof *sum) == 0);
            CHECK(m.m->L < 3 || ptst__pass_bytes(m.m, m.a, 4096, 4096, 1, true) <
                                    ptst__pass_bytes(m.m, m.a, 4096, 4096, 1, false));
            free(grads);
            models_close(c, &m);
        }
    }
    ptst_close(c);
}

/* A model large enough for several tasks in every operation; the bits of loss, gradients, logits
   and new weights on 1, 2 and 3 threads. */
static void threads_same_bits(void) {
    enum { N = 150 };
    static const ptst_segment segments[4] = {{0, 40, -1}, {40, 60, 0}, {100, 30, 0}, {130, 20, -1}};
    int32_t tokens[N], labels[N];
    float *first = NULL, *logits = NULL;
    double loss = 0;
    ptst_config g = models_config("qwen2");
    ptst_batch b;
    size_t i, size = 0;
    int threads, full;
    g.vocab_size = 1500;
    g.hidden_size = 96;
    g.intermediate_size = 160;
    g.head_dim = 24;
    for (i = 0; i < N; i++) {
        tokens[i] = (int32_t)(i * 37 % 1500);
        labels[i] = i < 40 ? -1 : (int32_t)(i * 101 % 1500);
    }
    b.tokens = tokens;
    b.labels = labels;
    b.count = N;
    b.segments = segments;
    b.segments_count = 4;
    for (full = 0; full < 2; full++) {
        for (threads = 1; threads <= 3; threads++) {
            ptst_ctx *c = test_open(threads, NULL);
            ptst_lora_desc d;
            ptst_session_desc sd;
            ptst_model *m = ptst_model_new(c, &g, 1);
            ptst_adapter *a;
            ptst__pass *p;
            ptst_session *s;
            ptst_chunk chunk;
            double sum = 0;
            memset(&d, 0, sizeof d);
            memset(&sd, 0, sizeof sd);
            d.targets = "all-linear";
            a = full ? NULL : ptst_adapter_new(c, m, &d);
            p = ptst__pass_new(c, m, a, N, N, 4, false);
            s = ptst_session_new(c, m, a, &sd);
            chunk.slot = 0;
            chunk.tokens = tokens;
            chunk.count = N;
            chunk.logits = PTST_LOGITS_LAST;
            CHECK(ptst_eval(c, s, &chunk, 1) == PTST_OK);
            CHECK(ptst__pass_run(c, p, &b, true, full ? 0 : 0.1, 3, 4, &sum, NULL) == PTST_OK);
            if (threads == 1) {
                size = p->grads_count;
                free(first);
                free(logits);
                first = (float *)malloc(size * sizeof *first);
                logits = (float *)malloc(1500 * sizeof *logits);
                model_copy_grads(p, first);
                memcpy(logits, ptst_logits(s, 0), 1500 * sizeof *logits);
                loss = sum;
            }
            CHECK(sum == loss && models_norm(first, size) > 0);
            CHECK(memcmp(first, p->grads, size * sizeof *first) == 0);
            CHECK(memcmp(logits, ptst_logits(s, 0), 1500 * sizeof *logits) == 0);
            ptst_session_free(c, s);
            ptst__pass_free(c, p);
            ptst_adapter_free(c, a);
            ptst_model_free(c, m);
            ptst_close(c);
        }
    }
    free(first);
    free(logits);
}

/* ---- sessions ---- */

/* A prefix slot, two slots on it that advance at different speeds in common calls, one slot
   without a prefix, in pieces of 5 tokens: all give the logits of one pass over everything. */
static void cached_is_full_with(ptst_ctx *c) {
    models_case k;
    int i;
    for (i = 0; i < MODELS - MODELS_WHOLE; i++) { /* see models.h */
        ptst_session_desc d;
        ptst_session *s, *all;
        ptst_chunk whole, chunks[3];
        size_t V, n, head = 7, at[3] = {7, 7, 0}, j, row;
        CHECK(models_open(c, &k, models_names[i], true));
        n = k.segments[0].count;
        V = (size_t)ptst_model_config(k.m)->vocab_size;
        memset(&d, 0, sizeof d);
        d.logit_rows = n;
        all = ptst_session_new(c, k.m, k.a, &d);
        d.slots = 4;
        d.capacity = n;
        d.batch_tokens = 5;
        d.logit_rows = 3;
        s = ptst_session_new(c, k.m, k.a, &d);
        whole.slot = 0;
        whole.tokens = k.tokens;
        whole.count = n;
        whole.logits = PTST_LOGITS_ALL;
        CHECK(ptst_eval(c, all, &whole, 1) == PTST_OK);
        whole.count = head;
        whole.logits = PTST_LOGITS_NONE;
        CHECK(ptst_eval(c, s, &whole, 1) == PTST_OK);
        CHECK(ptst_logits(s, 0) == NULL);
        CHECK(ptst_session_reset(c, s, 1, 0) == PTST_OK);
        CHECK(ptst_session_reset(c, s, 2, 0) == PTST_OK);
        while (at[0] < n) {
            for (j = 0; j < 3; j++) {
                chunks[j].slot = (int32_t)j + 1;
                chunks[j].tokens = k.tokens + at[j];
                chunks[j].count = ptst__min(j + 1, n - at[j]);
                chunks[j].logits = PTST_LOGITS_LAST;
                at[j] += chunks[j].count;
            }
            CHECK(ptst_eval(c, s, chunks, 3) == PTST_OK);
            for (j = 0, row = 0; j < 3; j++) { /* 1e-4: other kernels for few rows, other sums */
                CHECK_NEAR(chunks[j].count == 0 ? 0
                                                : models_max_error(ptst_logits(s, row),
                                                                   ptst_logits(all, at[j] - 1), V),
                           0, 1e-4);
                row += chunks[j].count != 0;
            }
        }
        CHECK(ptst_session_length(s, 1) == n - head && ptst_session_length(s, 0) == head);
        ptst_session_free(c, s);
        ptst_session_free(c, all);
        models_close(c, &k);
    }
}

static void cached_is_full(void) { models_each_level(cached_is_full_with); }

/* Going back and asking for all logits over several pieces. */
static void session_rewinds(void) {
    ptst_ctx *c = test_open(1, NULL);
    models_case k;
    ptst_session_desc d;
    ptst_session *s, *t;
    ptst_chunk h;
    size_t i;
    CHECK(models_open(c, &k, "llama_tied", false));
    memset(&d, 0, sizeof d);
    d.logit_rows = 23;
    d.capacity = 23;
    s = ptst_session_new(c, k.m, NULL, &d);
    d.batch_tokens = 4;
    t = ptst_session_new(c, k.m, NULL, &d);
    h.slot = 0;
    h.tokens = k.tokens;
    h.count = 23;
    h.logits = PTST_LOGITS_ALL;
    CHECK(ptst_eval(c, s, &h, 1) == PTST_OK);
    h.tokens = k.tokens + 3; /* other tokens first */
    h.count = 20;
    CHECK(ptst_eval(c, t, &h, 1) == PTST_OK);
    CHECK(ptst_session_rewind(c, t, 0, 21) == PTST_ERR_ARGUMENT);
    CHECK(ptst_session_rewind(c, t, 0, 0) == PTST_OK);
    h.tokens = k.tokens;
    h.count = 10;
    CHECK(ptst_eval(c, t, &h, 1) == PTST_OK);
    CHECK(ptst_session_rewind(c, t, 0, 6) == PTST_OK);
    h.tokens = k.tokens + 6;
    h.count = 17;
    CHECK(ptst_eval(c, t, &h, 1) == PTST_OK);
    for (i = 0; i < 17; i++) {
        CHECK_NEAR(models_max_error(ptst_logits(t, i), ptst_logits(s, 6 + i), 61), 0, 1e-4);
    }
    CHECK(ptst_logits(t, 17) == NULL);
    ptst_session_free(c, s);
    ptst_session_free(c, t);
    models_close(c, &k);
    ptst_close(c);
}

/* Everything that a caller can do wrong, and that nothing changes then. */
static void session_refuses(void) {
    static const int32_t good[4] = {1, 2, 3, 4}, bad[2] = {1, 61}, negative[1] = {-1};
    ptst_ctx *c = test_open(1, NULL);
    models_case k;
    ptst_session_desc d;
    ptst_session *s;
    ptst_chunk h[2] = {{0, good, 4, PTST_LOGITS_NONE}, {0, good, 4, PTST_LOGITS_NONE}};
    CHECK(models_open(c, &k, "llama_tied", false));
    memset(&d, 0, sizeof d);
    d.slots = 3;
    d.capacity = 7;
    s = ptst_session_new(c, k.m, NULL, &d);
    CHECK(ptst_eval(c, s, h, 2) == PTST_ERR_LIMIT); /* 8 into 7 */
    CHECK_TEXT(ptst_error_text(c), "slot 0: 4 more tokens do not fit into its capacity of 7");
    CHECK(ptst_session_length(s, 0) == 0);
    h[1].count = 3;
    h[1].logits = PTST_LOGITS_ALL;
    CHECK(ptst_eval(c, s, h, 2) == PTST_OK);
    CHECK(ptst_session_length(s, 0) == 7 && ptst_logits(s, 2) != NULL && ptst_logits(s, 3) == NULL);
    h[0].slot = 3;
    CHECK(ptst_eval(c, s, h, 1) == PTST_ERR_ARGUMENT);
    CHECK_TEXT(ptst_error_text(c), "slot 3: the session has 3 slots");
    h[0].slot = -1;
    CHECK(ptst_eval(c, s, h, 1) == PTST_ERR_ARGUMENT);
    h[0].slot = 1;
    h[0].tokens = bad;
    h[0].count = 2;
    CHECK(ptst_eval(c, s, h, 1) == PTST_ERR_ARGUMENT);
    CHECK_TEXT(ptst_error_text(c), "slot 1: token 61 is not in the vocabulary of 61");
    h[0].tokens = negative;
    h[0].count = 1;
    CHECK(ptst_eval(c, s, h, 1) == PTST_ERR_ARGUMENT);
    h[0].tokens = good;
    h[0].count = 4;
    h[0].logits = PTST_LOGITS_ALL; /* 4 rows, 3 slots */
    CHECK(ptst_eval(c, s, h, 1) == PTST_ERR_LIMIT);
    CHECK(ptst_session_length(s, 1) == 0);
    CHECK(ptst_session_reset(c, s, 1, 1) == PTST_ERR_ARGUMENT);
    CHECK(ptst_session_reset(c, s, 1, 5) == PTST_ERR_ARGUMENT);
    CHECK(ptst_session_reset(c, s, 1, 0) == PTST_OK);
    CHECK(ptst_session_reset(c, s, 2, 1) == PTST_ERR_ARGUMENT); /* 1 has a prefix */
    CHECK(ptst_session_reset(c, s, 0, -1) == PTST_ERR_ARGUMENT);
    CHECK_TEXT(ptst_error_text(c), "slot 0: is the prefix of 1 other slots and cannot change");
    CHECK(ptst_session_rewind(c, s, 0, 1) == PTST_ERR_ARGUMENT);
    h[0].slot = 0;
    h[0].logits = PTST_LOGITS_NONE;
    CHECK(ptst_eval(c, s, h, 1) == PTST_ERR_ARGUMENT);
    CHECK(ptst_session_reset(c, s, 1, -1) == PTST_OK);
    CHECK(ptst_session_reset(c, s, 0, -1) == PTST_OK);
    CHECK(ptst_session_length(s, 0) == 0 && ptst_session_length(s, 9) == 0);
    CHECK(ptst_eval(c, s, h, 1) == PTST_OK);
    CHECK(ptst_eval(c, s, NULL, 0) == PTST_OK);
    ptst_session_free(c, s);
    d.capacity = SIZE_MAX / 2;
    CHECK(ptst_session_bytes(k.m, NULL, &d) == 0);
    CHECK(ptst_session_new(c, k.m, NULL, &d) == NULL && ptst_error_code(c) == PTST_ERR_MEMORY);
    models_close(c, &k);
    ptst_close(c);
}

/* ---- passes: what they refuse ---- */

static void pass_refuses(void) {
    ptst_ctx *c = test_open(1, NULL);
    ptst_config g = models_config("llama");
    model_trial t;
    ptst__pass *p;
    ptst_batch b;
    double sum;
    size_t labels;
    CHECK(model_trial_open(c, &t, &g, NULL));
    b = t.batch;
    b.count = 25;
    CHECK(ptst__pass_run(c, t.p, &b, false, 0, 0, 0, NULL, NULL) == PTST_ERR_ARGUMENT);
    CHECK(ptst__pass_run(c, t.p, &t.batch, false, 1, 0, 0, NULL, NULL) == PTST_ERR_ARGUMENT);
    CHECK(ptst__pass_run(c, t.p, &t.batch, false, -0.1, 0, 0, NULL, NULL) == PTST_ERR_ARGUMENT);
    b.count = 23;
    CHECK(ptst__pass_run(c, t.p, &b, false, 0, 0, 0, NULL, NULL) == PTST_ERR_ARGUMENT);
    b = t.batch;
    b.segments_count = 3;
    CHECK(ptst__pass_run(c, t.p, &b, false, 0, 0, 0, NULL, NULL) == PTST_ERR_ARGUMENT);
    CHECK_TEXT(ptst_error_text(c), "the segments cover 16 of 24 tokens");
    t.segments[3].prefix = 2; /* which has one itself */
    CHECK(ptst__pass_run(c, t.p, &t.batch, false, 0, 0, 0, NULL, NULL) == PTST_ERR_ARGUMENT);
    t.segments[3].prefix = 3;
    CHECK(ptst__pass_run(c, t.p, &t.batch, false, 0, 0, 0, NULL, NULL) == PTST_ERR_ARGUMENT);
    t.segments[3].prefix = -2;
    CHECK(ptst__pass_run(c, t.p, &t.batch, false, 0, 0, 0, NULL, NULL) == PTST_ERR_ARGUMENT);
    t.segments[3].prefix = -1;
    t.tokens[4] = 23;
    CHECK(ptst__pass_run(c, t.p, &t.batch, false, 0, 0, 0, NULL, NULL) == PTST_ERR_ARGUMENT);
    t.tokens[4] = 0;
    t.labels[4] = 23;
    CHECK(ptst__pass_run(c, t.p, &t.batch, false, 0, 0, 0, NULL, NULL) == PTST_ERR_ARGUMENT);
    memset(t.labels, -1, sizeof t.labels); /* nothing to learn: no loss, no gradient */
    ptst__pass_zero(t.p);
    CHECK(ptst__pass_run(c, t.p, &t.batch, true, 0, 0, 0, &sum, &labels) == PTST_OK);
    CHECK(sum == 0 && labels == 0 && models_norm(t.p->grads, t.p->grads_count) == 0);
    p = ptst__pass_new(c, t.m, NULL, 24, 2, 4, false);
    memset(t.labels, 0, 3 * sizeof t.labels[0]);
    CHECK(ptst__pass_run(c, p, &t.batch, true, 0, 0, 0, &sum, &labels) == PTST_ERR_ARGUMENT);
    CHECK_TEXT(ptst_error_text(c), "the batch has more than 2 labels");
    ptst__pass_free(c, p);
    t.m->trainable = false;
    p = ptst__pass_new(c, t.m, NULL, 24, 24, 4, false);
    CHECK(ptst__pass_run(c, p, &t.batch, false, 0, 0, 0, &sum, &labels) == PTST_OK && sum > 0);
    CHECK(ptst__pass_run(c, p, &t.batch, true, 0, 0, 0, &sum, &labels) == PTST_ERR_ARGUMENT);
    ptst__pass_free(c, p);
    t.m->trainable = true;
    CHECK(ptst__pass_bytes(t.m, NULL, SIZE_MAX / 8, 1, 1, false) == 0);
    CHECK(ptst__pass_new(c, t.m, NULL, SIZE_MAX / 8, 1, 1, false) == NULL);
    model_trial_close(c, &t);
    ptst_close(c);
}

/* ---- weights: types, saving ---- */

/* Converting while loading changes what rounding changes: F32 not at all, F16 and BF16 files hold
   their own numbers exactly. */
static void dtypes_convert(void) {
    static const ptst_dtype types[3] = {PTST_F32, PTST_F16, PTST_BF16};
    static const double bounds[3] = {1e-4, 2e-2, 0.15}; /* roundings of 2^-11, 2^-8, added up */
    ptst_ctx *c = test_open(2, NULL);
    models_case k;
    int i, j;
    for (i = 0; i < MODELS; i++) {
        for (j = 0; j < 3; j++) {
            CHECK(models_open(c, &k, models_names[i], false));
            ptst_model_free(c, k.m);
            k.m = ptst_model_load(c, k.folder, types[j]);
            CHECK(k.m != NULL && k.m->embedding->dtype == types[j]);
            CHECK_NEAR(models_logits_error(c, &k, "logits"), 0, bounds[j]);
            models_close(c, &k);
        }
    }
    CHECK(ptst_model_load(c, STORIES, (ptst_dtype)9) == NULL);
    CHECK(ptst_error_code(c) == PTST_ERR_ARGUMENT);
    ptst_close(c);
}

/* Logits [rows, V] of the first sequence of a case. */
static bool models_logits_of(ptst_ctx *c, const models_case *k, const ptst_model *m, float *out) {
    ptst_session_desc d;
    ptst_session *s;
    ptst_chunk chunk;
    bool good;
    memset(&d, 0, sizeof d);
    d.logit_rows = d.capacity = MODELS_TOKENS;
    s = ptst_session_new(c, m, NULL, &d);
    chunk.slot = 0;
    chunk.tokens = k->tokens;
    chunk.count = (size_t)k->lengths[0];
    chunk.logits = PTST_LOGITS_ALL;
    good = s != NULL && ptst_eval(c, s, &chunk, 1) == PTST_OK;
    if (good) {
        memcpy(out, ptst_logits(s, 0), chunk.count * m->V * sizeof *out);
    }
    ptst_session_free(c, s);
    return good;
}

/* -log p(label) behind one token: by a pass as training makes it, and by a session. */
static void models_one(ptst_ctx *c, ptst_model *m, int32_t token, int32_t label, double loss[2]) {
    static const ptst_segment segment = {0, 1, -1};
    ptst_session_desc d;
    ptst_session *s;
    ptst_chunk chunk;
    ptst_batch b;
    ptst__pass *p = ptst__pass_new(c, m, NULL, 1, 1, 1, false);
    b.tokens = &token;
    b.labels = &label;
    b.count = 1;
    b.segments = &segment;
    b.segments_count = 1;
    CHECK(p != NULL && ptst__pass_run(c, p, &b, false, 0, 0, 0, &loss[0], NULL) == PTST_OK);
    ptst__pass_free(c, p);
    memset(&d, 0, sizeof d);
    d.capacity = d.logit_rows = 1;
    s = ptst_session_new(c, m, NULL, &d);
    memset(&chunk, 0, sizeof chunk);
    chunk.tokens = &token;
    chunk.count = 1;
    chunk.logits = PTST_LOGITS_LAST;
    CHECK(s != NULL && ptst_eval(c, s, &chunk, 1) == PTST_OK);
    if (s != NULL) {
        const float *x = ptst_logits(s, 0);
        double sum = 0;
        size_t i;
        for (i = 0; i < m->V; i++) {
            sum += exp((double)x[i]);
        }
        loss[1] = log(sum) - (double)x[label];
    }
    ptst_session_free(c, s);
}

/* Gradients of a new adapter on all linear layers; *count of them. */
static float *models_adapter_gradients(ptst_ctx *c, models_case *k, ptst_model *m, size_t *count) {
    ptst_lora_desc lora;
    ptst_adapter *a;
    ptst__pass *p;
    float *out = NULL;
    size_t i;
    memset(&lora, 0, sizeof lora);
    lora.targets = "all-linear";
    a = ptst_adapter_new(c, m, &lora);
    for (i = 0; a != NULL && i < a->values_count; i++) {
        a->values[i] += 0.05f * (float)((int)(i * 7 % 11) - 5);
    }
    p = ptst__pass_new(c, m, a, k->batch.count, k->batch.count, k->batch.segments_count, false);
    if (p != NULL && ptst__pass_run(c, p, &k->batch, true, 0, 0, 0, NULL, NULL) == PTST_OK) {
        *count = p->grads_count;
        out = (float *)malloc(*count * sizeof *out);
        memcpy(out, p->grads, *count * sizeof *out);
    }
    ptst__pass_free(c, p);
    ptst_adapter_free(c, a);
    return out;
}

/* A model in blocks computes what the same model with the values of its blocks in F32 does: logits
   and the gradients of an adapter, and with one row only what training needs. */
static void dtypes_blocks(void) {
    ptst_ctx *c = test_open(2, NULL);
    double passes = 0, sessions = 0;
    int i, j;
    for (i = 0; i < MODELS; i++) {
        for (j = 0; j < 2; j++) {
            models_case k;
            ptst_model *m[2];
            float *x[2], *g[2];
            double one[2][2], pass, session;
            size_t w, r, n[2] = {0, 0}, count;
            CHECK(models_open(c, &k, models_names[i], false));
            m[0] = ptst_model_load(c, k.folder, j == 0 ? PTST_I8 : PTST_I4);
            m[1] = ptst_model_load(c, k.folder, PTST_F32);
            CHECK(m[0] != NULL && m[1] != NULL && ptst_model_unfreeze(c, m[1]) == PTST_OK);
            CHECK(ptst_model_unfreeze(c, m[0]) == PTST_ERR_UNSUPPORTED);
            CHECK(m[0]->head->dtype == (j == 0 ? PTST_I8 : PTST_I4));
            for (w = 0; w < m[0]->weights_count; w++) {
                const ptst__weight *q = &m[0]->weights[w], *f = &m[1]->weights[w];
                CHECK((q->dtype == m[0]->head->dtype) ==
                      (!q->vector && (q != m[0]->embedding || q == m[0]->head)));
                for (r = 0; r < q->rows; r++) {
                    ptst__convert_to_f32(c, (float *)(uintptr_t)f->data + r * f->ld,
                                         ptst__element(q->data, q->dtype, r * q->ld), q->dtype,
                                         q->cols);
                }
            }
            count = (size_t)k.lengths[0] * m[0]->V;
            for (w = 0; w < 2; w++) {
                x[w] = (float *)malloc(count * sizeof(float));
                CHECK(models_logits_of(c, &k, m[w], x[w]));
                g[w] = models_adapter_gradients(c, &k, m[w], &n[w]);
            }
            CHECK_NEAR(models_max_error(x[0], x[1], count), 0, 2e-5); /* other orders of sums */
            models_one(c, m[0], k.tokens[0], k.tokens[1], one[0]);
            models_one(c, m[1], k.tokens[0], k.tokens[1], one[1]);
            pass = fabs(one[0][0] - one[1][0]);
            session = fabs(one[0][1] - one[1][1]);
            CHECK(pass <= 1e-5);    /* other orders of sums; measured: up to 2.3e-6 */
            CHECK(session <= 2e-3); /* whole numbers, 2^-16 of the largest; up to 3.4e-4 */
            passes += pass;
            sessions += session;
            CHECK(n[0] == n[1] && g[0] != NULL && g[1] != NULL);
            for (w = 0; w < n[0] && n[0] == n[1]; w++) {
                g[0][w] -= g[1][w];
            }
            CHECK(models_norm(g[0], n[0]) <= 1e-4 * models_norm(g[1], n[1]));
            for (w = 0; w < 2; w++) {
                free(x[w]);
                free(g[w]);
                ptst_model_free(c, m[w]);
            }
            models_close(c, &k);
        }
    }
    CHECK(sessions > 20 * passes); /* only a session multiplies in whole numbers */
    ptst_close(c);
}

/* Stories: int8 hardly changes what is predicted, int4 does; the file's own type not at all. */
static void quantization(void) {
    static const char text[] = "Once upon a time, there was a little girl named Lily. She loved to "
                               "play outside in the park. One day, she saw a big red ball.";
    static const ptst_dtype dtypes[] = {PTST_DTYPE_FILE, PTST_I8, PTST_I4};
    ptst_ctx *c = test_open(2, NULL);
    ptst_tokenizer *t = ptst_tokenizer_load(c, STORIES);
    ptst_ids ids = {NULL, 0, 0};
    ptst_quantization q[3];
    int i;
    CHECK(t != NULL && ptst_encode(c, t, text, sizeof text - 1, PTST_ADD_SPECIAL, &ids) == PTST_OK);
    for (i = 0; i < 3; i++) {
        CHECK(ptst_quantization_error(c, STORIES, dtypes[i], ids.data, ids.count, &q[i]) ==
              PTST_OK);
        CHECK(q[i].tokens == ids.count - 1 && q[i].reference_perplexity < 8);
    }
    CHECK(q[0].max_error == 0 && q[0].divergence == 0 && q[0].same_top == 1);
    CHECK_NEAR(q[0].perplexity, q[0].reference_perplexity, 0);
    CHECK_NEAR(q[1].perplexity / q[1].reference_perplexity, 1, 0.01);
    CHECK_NEAR(q[2].perplexity / q[2].reference_perplexity, 1, 0.5);
    CHECK(q[1].rms_error > 0 && q[1].rms_error < 0.02 && q[1].same_top > 0.95);
    CHECK(q[2].rms_error > q[1].rms_error && q[2].divergence > q[1].divergence);
    CHECK(ptst_quantization_error(c, STORIES, PTST_I8, ids.data, 1, q) == PTST_ERR_ARGUMENT);
    ptst_ids_free(c, &ids);
    ptst_tokenizer_free(c, t);
    ptst_close(c);
}

/* Saved and loaded again: the same configuration, the same bits of every weight. */
static void saves_and_loads(void) {
    ptst_ctx *c = test_open(2, NULL);
    models_folder f;
    models_case k;
    size_t i, w;
    CHECK(models_folder_make(&f));
    for (i = 0; i < MODELS; i++) {
        ptst_model *m;
        bool frozen = i % 2 == 0; /* a trainable model forgets no file type either */
        CHECK(models_open(c, &k, models_names[i], false));
        CHECK(frozen || ptst_model_unfreeze(c, k.m) == PTST_OK);
        CHECK(ptst_model_save(c, k.m, f.path, PTST_DTYPE_FILE) == PTST_OK);
        m = ptst_model_load(c, f.path, PTST_DTYPE_FILE);
        CHECK(m != NULL);
        CHECK(m != NULL && memcmp(&m->config, &k.m->config, sizeof m->config) == 0);
        CHECK(m != NULL && m->weights_count == k.m->weights_count);
        for (w = 0; m != NULL && w < m->weights_count; w++) {
            const ptst_tensor *t, *was;
            ptst_tensors *old = ptst_tensors_open(c, k.folder);
            size_t e;
            t = ptst_tensors_find(m->tensors, m->weights[w].name);
            was = ptst_tensors_find(old, t->name);
            CHECK(t->bytes == was->bytes);
            if (!frozen && m->weights[w].offset && t->dtype == PTST_F32) {
                for (e = 0; e < m->weights[w].cols; e++) { /* 1 was added and taken away again */
                    CHECK_NEAR((double)((const float *)t->data)[e],
                               (double)((const float *)was->data)[e], 2.4e-7);
                }
            } else {
                CHECK(memcmp(t->data, was->data, t->bytes) == 0);
            }
            ptst_tensors_close(c, old);
        }
        ptst_model_free(c, m);
        models_close(c, &k);
        models_folder_empty(&f, true);
    }
    models_folder_empty(&f, false);
    ptst_close(c);
}

/* A new model: its size, its spread, the same for the same seed. */
static void new_model(void) {
    ptst_ctx *c = test_open(2, NULL);
    ptst_config g = models_config("llama");
    ptst_model *m, *n;
    double sum = 0, squares = 0;
    const float *p;
    size_t i, count;
    g.vocab_size = 1000;
    g.attention_bias = true;
    g.initializer_range = 0;
    m = ptst_model_new(c, &g, 7);
    n = ptst_model_new(c, &g, 7);
    CHECK(m != NULL && n != NULL && ptst_model_trainable(m));
    CHECK(ptst_model_config(m)->initializer_range == 0.02);
    CHECK(ptst_model_parameters(m) ==
          2 * 12000 + 12 + 3 * (2 * 12 + 2 * (12 * 16 + 12 * 8) + 3 * 120 + 2 * 8 + 16 + 12));
    CHECK(ptst_model_bytes(m) == 4 * ptst_model_parameters(m));
    p = (const float *)m->embedding->data;
    count = ptst__weight_count(m->embedding);
    for (i = 0; i < count; i++) {
        sum += (double)p[i];
        squares += (double)p[i] * (double)p[i];
    }
    /* 12000 draws: the mean is good to 0.02 / 110, the deviation to 0.7 % (one sigma) */
    CHECK_NEAR(sum / (double)count, 0, 5 * 0.02 / 110);
    CHECK_NEAR(sqrt(squares / (double)count), 0.02, 5 * 0.02 * 0.007);
    for (i = 0; i < m->weights_count; i++) {
        CHECK(memcmp(m->weights[i].data, n->weights[i].data,
                     ptst__weight_count(&m->weights[i]) * 4) == 0);
    }
    CHECK(((const float *)m->norm->data)[3] == 1);
    CHECK(((const float *)m->layers[1].linears[PTST__Q].b->data)[3] == 0);
    ptst_model_free(c, m);
    ptst_model_free(c, n);
    ptst_model_free(c, NULL);
    ptst_close(c);
}

/* Soft caps: small scores keep their digits (bound: exp, its sum and the series in float). */
static void caps_keep_digits_with(ptst_ctx *c) {
    enum { N = 300 };
    float x[N], y[N], slope[N];
    double worst = 0;
    size_t i;
    for (i = 0; i < N; i++) {
        x[i] = (i % 2 == 0 ? 1.0f : -1.0f) * (float)pow(10, (double)i / 40 - 6);
        y[i] = x[i];
    }
    ptst__cap_row(c->kernels, N, 0.5f, 2, y, slope);
    for (i = 0; i < N; i++) {
        double t = tanh(0.5 * (double)x[i]), d = fabs((double)y[i] - 2 * t) / fabs(2 * t);
        worst = d > worst ? d : worst;
        CHECK_NEAR((double)slope[i], 1 - t * t, 5e-7);
    }
    CHECK_NEAR(worst, 0, 6e-7);
    x[0] = y[0] = 1e9f;
    ptst__cap_row(c->kernels, 1, 0.5f, 2, y, NULL);
    CHECK(y[0] == 2);
}

static void caps_keep_digits(void) { models_each_level(caps_keep_digits_with); }

/* ---- configurations ---- */

static const char config_base[] =
    "{\"model_type\": \"llama\", \"vocab_size\": 23, \"hidden_size\": 12, "
    "\"intermediate_size\": 10, \"num_hidden_layers\": 2, \"num_attention_heads\": 4, "
    "\"num_key_value_heads\": 2, \"head_dim\": 4, \"rms_norm_eps\": 1e-05, \"rope_theta\": 500.0, "
    "\"rope_scaling\": null, \"bos_token_id\": 1, \"eos_token_id\": [2, 3], \"more\": {}}";

/* Parses config_base with `from` replaced by `to`. */
static ptst_code config_parse_with(ptst_ctx *c, const char *from, const char *to, ptst_config *g) {
    char text[2000];
    const char *at = strstr(config_base, from);
    ptst_text notes = {NULL, 0, 0};
    ptst_json *j;
    ptst_code code;
    CHECK(at != NULL);
    if (at == NULL) {
        return PTST_OK;
    }
    snprintf(text, sizeof text, "%.*s%s%s", (int)(at - config_base), config_base, to,
             at + strlen(from));
    j = ptst_json_parse(c, text, strlen(text), "config.json");
    code = j == NULL ? ptst_error_code(c) : ptst__config_parse(c, j, "config.json", g, &notes);
    CHECK(code != PTST_OK || strstr(notes.data == NULL ? "" : notes.data, "vocab_size") == NULL);
    ptst_text_free(c, &notes);
    ptst_json_free(c, j);
    return code;
}

typedef struct config_case {
    const char *from, *to;
    ptst_code code;
    const char *sentence; /* begins the error text; NULL = it names the file */
} config_case;

#define WHOLE(key, max) "config.json: " key ": expected a whole number from 1 to " max

static const config_case config_bad[] = {
    {"\"llama\"", "\"gpt2\"", PTST_ERR_UNSUPPORTED,
     "config.json: model_type: \"gpt2\" is not supported, expected \"llama\", \"mistral\","},
    {"\"model_type\": \"llama\", ", "", PTST_ERR_UNSUPPORTED,
     "config.json: model_type: absent is not supported, expected"},
    {"\"llama\"", "7", PTST_ERR_UNSUPPORTED, "config.json: model_type: absent"},
    {"\"vocab_size\": 23", "\"vocab_size\": 0", PTST_ERR_FORMAT, WHOLE("vocab_size", "16777216")},
    {"\"vocab_size\": 23", "\"vocab_size\": -5", PTST_ERR_FORMAT, WHOLE("vocab_size", "")},
    {"\"vocab_size\": 23", "\"vocab_size\": 1e99", PTST_ERR_FORMAT, WHOLE("vocab_size", "")},
    {"\"vocab_size\": 23", "\"vocab_size\": 9223372036854775807", PTST_ERR_FORMAT,
     WHOLE("vocab_size", "")},
    {"\"vocab_size\": 23", "\"vocab_size\": null", PTST_ERR_FORMAT,
     "config.json: vocab_size: is 0, expected a whole number from 1"},
    {"\"vocab_size\": 23, ", "", PTST_ERR_FORMAT, "config.json: vocab_size: is 0, expected"},
    {"\"vocab_size\": 23", "\"vocab_size\": \"23\"", PTST_ERR_FORMAT, WHOLE("vocab_size", "")},
    {"\"hidden_size\": 12", "\"hidden_size\": 12.5", PTST_ERR_FORMAT, WHOLE("hidden_size", "")},
    {"\"hidden_size\": 12", "\"hidden_size\": [12]", PTST_ERR_FORMAT, WHOLE("hidden_size", "")},
    {"\"hidden_size\": 12", "\"hidden_size\": true", PTST_ERR_FORMAT, WHOLE("hidden_size", "")},
    {"\"intermediate_size\": 10, ", "", PTST_ERR_FORMAT, "config.json: intermediate_size: is 0"},
    {"\"num_hidden_layers\": 2", "\"num_hidden_layers\": 513", PTST_ERR_FORMAT,
     WHOLE("num_hidden_layers", "512")},
    {"\"num_hidden_layers\": 2", "\"num_hidden_layers\": 2000000000", PTST_ERR_FORMAT,
     WHOLE("num_hidden_layers", "512")},
    {"\"num_attention_heads\": 4", "\"num_attention_heads\": 3", PTST_ERR_FORMAT,
     "config.json: num_key_value_heads: does not divide num_attention_heads"},
    {"\"num_key_value_heads\": 2", "\"num_key_value_heads\": 8", PTST_ERR_FORMAT,
     "config.json: num_key_value_heads: does not divide num_attention_heads"},
    {"\"num_key_value_heads\": 2", "\"num_key_value_heads\": 0", PTST_ERR_FORMAT,
     WHOLE("num_key_value_heads", "4096")},
    {"\"head_dim\": 4", "\"head_dim\": 5", PTST_ERR_FORMAT, "config.json: head_dim: is odd"},
    {"\"head_dim\": 4", "\"head_dim\": 0", PTST_ERR_FORMAT,
     "config.json: head_dim: expected a whole number from 2 to 4096"},
    {"\"hidden_size\": 12, \"intermediate_size\": 10, \"num_hidden_layers\": 2, "
     "\"num_attention_heads\": 4, \"num_key_value_heads\": 2, \"head_dim\": 4",
     "\"hidden_size\": 13, \"intermediate_size\": 10, \"num_hidden_layers\": 2, "
     "\"num_attention_heads\": 4, \"num_key_value_heads\": 2",
     PTST_ERR_FORMAT, "config.json: hidden_size: is no multiple of num_attention_heads"},
    {"\"head_dim\": 4", "\"head_dim\": null", PTST_ERR_FORMAT, "config.json: head_dim: is odd"},
    {"1e-05", "-1", PTST_ERR_FORMAT, "config.json: rms_norm_eps: expected a number from"},
    {"1e-05", "\"small\"", PTST_ERR_FORMAT, "config.json: rms_norm_eps: expected a number from"},
    {"\"rope_theta\": 500.0", "\"rope_theta\": 0", PTST_ERR_FORMAT,
     "config.json: rope_theta: expected a number from"},
    {"\"rope_scaling\": null", "\"rope_scaling\": 8", PTST_ERR_FORMAT,
     "config.json: rope_scaling: expected an object or null"},
    {"\"rope_scaling\": null", "\"rope_scaling\": {\"rope_type\": \"longrope\", \"factor\": 4}",
     PTST_ERR_FORMAT, "config.json: short_factor: expected a list of at most 256 numbers"},
    {"\"rope_scaling\": null",
     "\"rope_scaling\": {\"rope_type\": \"longrope\", \"short_factor\": [1], \"long_factor\": [1, "
     "2]}",
     PTST_ERR_FORMAT, "config.json: long_factor: expected as many numbers"},
    {"\"rope_scaling\": null",
     "\"rope_scaling\": {\"rope_type\": \"longrope\", \"short_factor\": [1, 0], \"long_factor\": "
     "[1, 2]}",
     PTST_ERR_FORMAT, "config.json: short_factor: expected numbers above 0"},
    {"\"rope_scaling\": null", "\"rope_scaling\": {\"type\": \"ntk\", \"factor\": 4}",
     PTST_ERR_UNSUPPORTED, "config.json: rope_type: \"ntk\" is not supported, expected"},
    {"\"rope_scaling\": null", "\"rope_scaling\": {\"rope_type\": \"longlonglonglongrope\"}",
     PTST_ERR_UNSUPPORTED, "config.json: rope_type: expected"},
    {"\"rope_scaling\": null", "\"rope_scaling\": {\"rope_type\": 3}", PTST_ERR_UNSUPPORTED,
     "config.json: rope_type: expected"},
    {"\"rope_scaling\": null", "\"rope_scaling\": {\"type\": \"linear\"}", PTST_ERR_FORMAT,
     "config.json: factor: is missing for rope type linear"},
    {"\"rope_scaling\": null",
     "\"rope_scaling\": {\"type\": \"llama3\", \"factor\": 8, \"low_freq_factor\": 4, "
     "\"high_freq_factor\": 4}",
     PTST_ERR_FORMAT, "config.json: low_freq_factor, high_freq_factor: are needed"},
    {"\"rope_scaling\": null",
     "\"rope_parameters\": {\"full_attention\": {}, \"sliding_attention\": {\"rope_theta\": 1}}",
     PTST_ERR_UNSUPPORTED, "config.json: rope_parameters: different ones"},
    {"\"more\": {}", "\"partial_rotary_factor\": 0.5", PTST_ERR_UNSUPPORTED,
     "config.json: partial_rotary_factor: is not supported for this model_type, only for phi3"},
    {"\"llama\"", "\"phi3\", \"partial_rotary_factor\": 0.3", PTST_ERR_UNSUPPORTED,
     "config.json: partial_rotary_factor: turns 1 of the 4 elements of a head"},
    {"\"llama\"", "\"phi3\", \"rope_parameters\": {\"rope_type\": \"linear\", \"factor\": 2}",
     PTST_ERR_UNSUPPORTED, "config.json: rope_type: \"linear\" is not supported for phi3, expected"},
    {"\"llama\"", "\"gemma3_text\", \"rope_parameters\": {\"rope_theta\": 5}", PTST_ERR_FORMAT,
     "config.json: rope_parameters: expected full_attention and sliding_attention"},
    {"\"llama\"",
     "\"gemma3_text\", \"rope_parameters\": {\"sliding_attention\": {\"rope_type\": \"linear\"}}",
     PTST_ERR_UNSUPPORTED, "config.json: sliding_attention: expected rope_type \"default\""},
    {"\"rope_theta\": 500.0", "\"rope_theta\": NaN", PTST_ERR_FORMAT, NULL},
    {"\"rope_theta\": 500.0", "\"rope_theta\": 1e999", PTST_ERR_FORMAT,
     "config.json: rope_theta: expected a number from"},
    {"\"rope_theta\": 500.0", "\"rope_theta\": -500.0", PTST_ERR_FORMAT,
     "config.json: rope_theta: expected a number from"},
    {"\"rope_theta\": 500.0", "\"rope_theta\": 500.0, \"rope_theta\": 600.0", PTST_ERR_FORMAT,
     "config.json: rope_theta: is there twice"},
    {"\"rope_scaling\": null", "\"rope_scaling\": {\"factor\": 1, \"factor\": 2}", PTST_ERR_FORMAT,
     "config.json: factor: is there twice"},
    {"\"rope_scaling\": null", "\"rope_scaling\": {\"type\": \"linear\", \"factor\": -2}",
     PTST_ERR_FORMAT, "config.json: factor: expected a number from"},
    {"\"rope_scaling\": null",
     "\"rope_scaling\": {\"type\": \"yarn\", \"factor\": 2, \"truncate\": 1}", PTST_ERR_FORMAT,
     "config.json: truncate: expected true or false"},
    {"\"rope_scaling\": null",
     "\"rope_scaling\": {\"type\": \"yarn\", \"factor\": 2, \"original_max_position_embeddings\": "
     "-4}",
     PTST_ERR_FORMAT, "config.json: original_max_position_embeddings: expected a whole number"},
    {"\"more\": {}", "\"quantization_config\": {\"quant_method\": \"awq\"}", PTST_ERR_UNSUPPORTED,
     "config.json: quantization_config: quantised files are not supported"},
    {"\"more\": {}", "\"hidden_act\": \"gelu\"", PTST_ERR_UNSUPPORTED,
     "config.json: hidden_act: only \"silu\" is supported"},
    {"\"llama\"", "\"gemma\", \"hidden_act\": \"silu\"", PTST_ERR_UNSUPPORTED,
     "config.json: hidden_act: only \"gelu_pytorch_tanh\" is supported"},
    {"\"llama\"", "\"gemma2\", \"hidden_activation\": \"gelu\"", PTST_ERR_UNSUPPORTED,
     "config.json: hidden_activation: only \"gelu_pytorch_tanh\" is supported"},
    {"\"llama\"", "\"gemma3\", \"text_config\": {\"model_type\": \"gemma3_text\"}",
     PTST_ERR_UNSUPPORTED,
     "config.json: model_type: \"gemma3\" is a text model (text_config) together with others, which "
     "is not supported; expected a folder with the text model alone"},
    {"\"more\": {}", "\"per_layer_config\": {\"0\": {\"intermediate_size\": 5}}",
     PTST_ERR_UNSUPPORTED,
     "config.json: per_layer_config: layers of different sizes are not supported"},
    {"\"more\": {}", "\"num_local_experts\": 8", PTST_ERR_UNSUPPORTED,
     "config.json: num_local_experts: mixtures of experts are not supported"},
    {"\"more\": {}", "\"num_experts\": 4", PTST_ERR_UNSUPPORTED,
     "config.json: num_experts: mixtures of experts are not supported"},
    {"\"more\": {}", "\"n_routed_experts\": 4", PTST_ERR_UNSUPPORTED,
     "config.json: n_routed_experts: mixtures of experts are not supported"},
    {"\"more\": {}", "\"kv_lora_rank\": 4", PTST_ERR_UNSUPPORTED,
     "config.json: kv_lora_rank: latent attention is not supported"},
    {"\"more\": {}", "\"q_lora_rank\": 4", PTST_ERR_UNSUPPORTED,
     "config.json: q_lora_rank: latent attention is not supported"},
    {"\"more\": {}", "\"attention_chunk_size\": 4", PTST_ERR_UNSUPPORTED,
     "config.json: attention_chunk_size: attention in chunks is not supported"},
    {"\"llama\"", "\"gemma2\", \"use_bidirectional_attention\": true", PTST_ERR_UNSUPPORTED,
     "config.json: use_bidirectional_attention: is not supported"},
    {"\"more\": {}", "\"attn_logit_softcapping\": 50.0", PTST_ERR_UNSUPPORTED,
     "config.json: attn_logit_softcapping: is not supported for this model_type"},
    {"\"llama\"", "\"qwen3\", \"final_logit_softcapping\": 30", PTST_ERR_UNSUPPORTED,
     "config.json: final_logit_softcapping: is not supported for this model_type"},
    {"\"llama\"", "\"gemma2\", \"final_logit_softcapping\": -1", PTST_ERR_FORMAT,
     "config.json: final_logit_softcapping: expected a number from"},
    {"\"llama\"", "\"gemma2\", \"query_pre_attn_scalar\": 0", PTST_ERR_FORMAT,
     "config.json: query_pre_attn_scalar: expected a number from"},
    {"\"llama\"", "\"gemma2\", \"sliding_window\": null", PTST_ERR_FORMAT,
     "config.json: sliding_window: is off, but there are layers that need it"},
    {"\"llama\"", "\"gemma3_text\", \"sliding_window_pattern\": 0", PTST_ERR_FORMAT,
     "config.json: sliding_window_pattern: expected a whole number from 1"},
    {"\"llama\"",
     "\"qwen2\", \"layer_types\": [\"full_attention\", \"sliding_attention\"], \"sliding_window\": 5",
     PTST_ERR_FORMAT, "config.json: sliding_window: is off, but there are layers that need it"},
    {"\"llama\"", "\"mistral\", \"layer_types\": [\"full_attention\", \"chunked_attention\"]",
     PTST_ERR_UNSUPPORTED, "config.json: layer_types: expected \"full_attention\" or"},
    {"\"llama\"", "\"smollm3\", \"no_rope_layers\": [1]", PTST_ERR_FORMAT,
     "config.json: no_rope_layers: expected a list with a number for each layer"},
    {"\"llama\"", "\"smollm3\", \"no_rope_layers\": [1, 2]", PTST_ERR_FORMAT,
     "config.json: no_rope_layers: expected a whole number from 0 to 1"},
    {"\"llama\"", "\"smollm3\", \"no_rope_layer_interval\": 0", PTST_ERR_FORMAT,
     "config.json: no_rope_layer_interval: expected a whole number from 1"},
    {"\"more\": {}", "\"attention_bias\": 1", PTST_ERR_FORMAT,
     "config.json: attention_bias: expected true or false"},
    {"\"more\": {}", "\"mlp_bias\": \"no\"", PTST_ERR_FORMAT,
     "config.json: mlp_bias: expected true or false"},
    {"\"more\": {}", "\"max_position_embeddings\": -1", PTST_ERR_FORMAT,
     "config.json: max_position_embeddings: expected a whole number from 1"},
    {"\"more\": {}", "\"initializer_range\": -1", PTST_ERR_FORMAT,
     "config.json: initializer_range: expected a number from 0 to 1"},
    {"\"more\": {}", "\"hidden_act\": 1", PTST_ERR_UNSUPPORTED, "config.json: hidden_act: only"},
    {"\"more\": {}", "\"tie_word_embeddings\": \"yes\"", PTST_ERR_FORMAT,
     "config.json: tie_word_embeddings: expected true or false"},
    {"[2, 3]", "[2, -3]", PTST_ERR_FORMAT, "config.json: eos_token_id: expected a whole number"},
    {"[2, 3]", "[2, [3]]", PTST_ERR_FORMAT, "config.json: eos_token_id: expected a whole number"},
    {"[2, 3]", "\"</s>\"", PTST_ERR_FORMAT, "config.json: eos_token_id: expected a whole number"},
    {"[2, 3]", "[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17]", PTST_ERR_LIMIT,
     "config.json: eos_token_id: expected at most 16 ids"},
    {"\"bos_token_id\": 1", "\"bos_token_id\": 1.5", PTST_ERR_FORMAT, "config.json: bos_token_id"},
    {"\"llama\"", "\"mistral\", \"sliding_window\": 0", PTST_ERR_FORMAT,
     "config.json: sliding_window: expected a whole number from 1"},
    {"\"llama\"", "\"qwen2\", \"max_window_layers\": -1", PTST_ERR_FORMAT,
     "config.json: max_window_layers: expected a whole number from 0"},
    {"\"llama\"", "\"qwen2\", \"use_sliding_window\": 1", PTST_ERR_FORMAT,
     "config.json: use_sliding_window: expected true or false"},
    {"\"llama\"", "\"qwen2\", \"layer_types\": [\"full_attention\"]", PTST_ERR_FORMAT,
     "config.json: layer_types: expected a list with one name for each layer"},
    {"\"llama\"", "\"qwen2\", \"layer_types\": [\"full_attention\", \"mamba\"]",
     PTST_ERR_UNSUPPORTED, "config.json: layer_types: expected \"full_attention\" or"},
    {"\"llama\"", "\"qwen2\", \"layer_types\": {}", PTST_ERR_FORMAT,
     "config.json: layer_types: expected a list"},
};

#undef WHOLE

static void config_refuses(void) {
    ptst_ctx *c = test_open(1, NULL);
    ptst_config g;
    size_t i;
    ptst_json *j = ptst_json_parse(c, "[1]", 3, "config.json");
    CHECK(ptst__config_parse(c, j, "config.json", &g, NULL) == PTST_ERR_FORMAT);
    CHECK_TEXT(ptst_error_text(c), "config.json: expected an object");
    ptst_json_free(c, j);
    for (i = 0; i < sizeof config_bad / sizeof config_bad[0]; i++) {
        const config_case *k = &config_bad[i];
        if (config_parse_with(c, k->from, k->to, &g) != k->code) {
            CHECK_TEXT(k->to, "refused by another code");
        }
        if (k->sentence == NULL) { /* of >>json */
            CHECK(strncmp(ptst_error_text(c), "config.json", 11) == 0);
        } else if (strncmp(ptst_error_text(c), k->sentence, strlen(k->sentence)) != 0) {
            CHECK_TEXT(ptst_error_text(c), k->sentence);
        }
    }
    ptst_close(c);
}

/* What the fields mean, and their defaults. */
static void config_means(void) {
    ptst_ctx *c = test_open(1, NULL);
    ptst_config g;
    CHECK(config_parse_with(c, "\"more\": {}", "\"more\": 1", &g) == PTST_OK);
    CHECK(g.vocab_size == 23 && g.hidden_size == 12 && g.intermediate_size == 10);
    CHECK(g.num_hidden_layers == 2 && g.num_attention_heads == 4 && g.num_key_value_heads == 2);
    CHECK(g.head_dim == 4 && g.max_position_embeddings == 2048 && g.rms_norm_eps == 1e-5);
    CHECK(g.rope_theta == 500 && strcmp(g.rope_type, "default") == 0 && g.sliding_window == 0);
    CHECK(g.bos_token_id == 1 && g.pad_token_id == -1 && g.eos_count == 2);
    CHECK(g.eos_token_id[0] == 2 && g.eos_token_id[1] == 3 && !g.tie_word_embeddings);
    CHECK(config_parse_with(c, "\"num_key_value_heads\": 2", "\"num_key_value_heads\": null", &g) ==
              PTST_OK &&
          g.num_key_value_heads == 4);
    CHECK(config_parse_with(c, "\"num_key_value_heads\": 2, ", "", &g) == PTST_OK &&
          g.num_key_value_heads == 4);
    CHECK(config_parse_with(c, "\"vocab_size\": 23", "\"vocab_size\": 23.0", &g) == PTST_OK);
    CHECK(config_parse_with(c, "\"rope_scaling\": null",
                            "\"rope_scaling\": {}, \"rope_parameters\": {\"rope_theta\": 7, "
                            "\"rope_type\": \"linear\", \"factor\": 3}",
                            &g) == PTST_OK &&
          g.rope_theta == 7 && g.rope_factor == 3 && strcmp(g.rope_type, "linear") == 0);
    CHECK(config_parse_with(c, "\"rope_scaling\": null",
                            "\"rope_scaling\": {\"type\": \"llama3\", \"factor\": 8, "
                            "\"low_freq_factor\": 1, \"high_freq_factor\": 4}",
                            &g) == PTST_OK &&
          g.original_max_position_embeddings == 2048);
    CHECK(config_parse_with(c, "\"llama\"", "\"mistral\"", &g) == PTST_OK &&
          g.sliding_window == 4096 && g.sliding_layers[0] && g.sliding_layers[1]);
    CHECK(config_parse_with(c, "\"llama\"", "\"mistral\", \"sliding_window\": null", &g) ==
              PTST_OK &&
          g.sliding_window == 0 && !g.sliding_layers[0]);
    CHECK(config_parse_with(c, "\"llama\"",
                            "\"mistral\", \"layer_types\": [\"full_attention\", "
                            "\"sliding_attention\"]",
                            &g) == PTST_OK &&
          g.sliding_window == 4096 && !g.sliding_layers[0] && g.sliding_layers[1]);
    CHECK(config_parse_with(c, "\"llama\"", "\"qwen2\", \"sliding_window\": 5", &g) == PTST_OK &&
          g.sliding_window == 0 && g.max_position_embeddings == 32768);
    CHECK(config_parse_with(c, "\"llama\"",
                            "\"qwen2\", \"sliding_window\": 5, \"use_sliding_window\": true, "
                            "\"max_window_layers\": 1",
                            &g) == PTST_OK &&
          g.sliding_window == 5 && !g.sliding_layers[0] && g.sliding_layers[1]);
    ptst_close(c);
}

/* What differs between families that look alike. */
static void config_families(void) {
    ptst_ctx *c = test_open(1, NULL);
    ptst_config g;
    CHECK(config_parse_with(c, "\"llama\"", "\"gemma\", \"hidden_act\": \"gelu\"", &g) == PTST_OK);
    CHECK(config_parse_with(c, "\"llama\"", "\"gemma2\", \"sliding_window_pattern\": 1", &g) ==
              PTST_OK &&
          g.sliding_layers[0] && !g.sliding_layers[1]); /* every second, whatever the key says */
    CHECK(config_parse_with(c, "\"llama\"", "\"gemma3_text\", \"sliding_window_pattern\": 1", &g) ==
              PTST_OK &&
          !g.sliding_layers[0] && !g.sliding_layers[1]);
    CHECK(config_parse_with(c, "\"llama\"", "\"gemma3_text\", \"attn_logit_softcapping\": 9", &g) ==
              PTST_OK &&
          g.attn_logit_softcapping == 0); /* transformers does not use it */
    CHECK(config_parse_with(c, "\"llama\"", "\"gemma2\", \"attn_logit_softcapping\": 9", &g) ==
              PTST_OK &&
          g.attn_logit_softcapping == 9 && g.final_logit_softcapping == 30);
    CHECK(config_parse_with(c, "\"llama\"",
                            "\"smollm3\", \"sliding_window\": 3, \"use_sliding_window\": false, "
                            "\"layer_types\": [\"sliding_attention\", \"full_attention\"]",
                            &g) == PTST_OK &&
          g.sliding_window == 3 && g.sliding_layers[0] && !g.sliding_layers[1]);
    CHECK(config_parse_with(c, "\"llama\"", "\"smollm3\", \"no_rope_layers\": [0, 1, 0, 0]", &g) ==
              PTST_OK &&
          g.unrotated_layers[0] && !g.unrotated_layers[1]);
    CHECK(config_parse_with(c, "\"rope_scaling\": null",
                            "\"original_max_position_embeddings\": 9, \"rope_scaling\": {\"type\": "
                            "\"yarn\", \"factor\": 2, \"original_max_position_embeddings\": 7}",
                            &g) == PTST_OK &&
          g.original_max_position_embeddings == 9);
    CHECK(config_parse_with(c, "\"llama\"",
                            "\"phi3\", \"rope_parameters\": {\"rope_type\": \"su\", "
                            "\"short_factor\": [1, 1], \"long_factor\": [2, 2], "
                            "\"original_max_position_embeddings\": 7}",
                            &g) == PTST_OK &&
          g.original_max_position_embeddings == 4096 && strcmp(g.rope_type, "longrope") == 0);
    CHECK(config_parse_with(c, "\"bos_token_id\": 1, \"eos_token_id\": [2, 3], ", "", &g) == PTST_OK &&
          g.bos_token_id == 1 && g.eos_count == 1 && g.eos_token_id[0] == 2 && g.pad_token_id == -1);
    CHECK(config_parse_with(c, "\"llama\"", "\"gemma\"", &g) == PTST_OK && g.pad_token_id == 0);
    CHECK(config_parse_with(c, "\"llama\"", "\"gemma\", \"pad_token_id\": null", &g) == PTST_OK &&
          g.pad_token_id == -1);
    ptst_close(c);
}

/* Keys that are set and not read are listed, also those within an object that is read. */
static void config_lists(void) {
    static const char text[] =
        "{\"model_type\": \"llama\", \"vocab_size\": 23, \"hidden_size\": 12, "
        "\"intermediate_size\": 10, \"num_hidden_layers\": 2, \"num_attention_heads\": 3, "
        "\"sliding_window\": 8, \"attention_dropout\": 0.1, \"use_mup\": false, \"scale_emb\": 12, "
        "\"list\": [], \"layer_types\": [\"x\"], \"rope_interleaved\": true, \"name\": \"\", "
        "\"rope_scaling\": {\"type\": \"linear\", \"factor\": 2.0, \"finetuned\": true}}";
    ptst_ctx *c = test_open(1, NULL);
    ptst_config g;
    ptst_text notes = {NULL, 0, 0};
    ptst_json *j = ptst_json_parse(c, text, sizeof text - 1, "config.json");
    CHECK(ptst__config_parse(c, j, "config.json", &g, &notes) == PTST_OK);
    CHECK_TEXT(notes.data, "config.json: sliding_window, attention_dropout, scale_emb, layer_types, "
                           "rope_interleaved, rope_scaling.finetuned");
    ptst_text_free(c, &notes);
    ptst_json_free(c, j);
    ptst_close(c);
}

/* A folder with a configuration and tensors of its own making. */
static ptst_code model_try(ptst_ctx *c, models_folder *f, const char *config,
                           const char *generation, const ptst_tensor *list, size_t count) {
    ptst_model *m;
    CHECK(ptst__write_file(c, models_file(f, "config.json"), config, strlen(config)) == PTST_OK);
    if (generation != NULL) {
        CHECK(ptst__write_file(c, models_file(f, "generation_config.json"), generation,
                               strlen(generation)) == PTST_OK);
    }
    if (list != NULL) {
        CHECK(ptst_tensors_write(c, models_file(f, "model.safetensors"), list, count, NULL) ==
              PTST_OK);
    }
    m = ptst_model_load(c, f->path, PTST_DTYPE_FILE);
    ptst_model_free(c, m);
    return m == NULL ? ptst_error_code(c) : PTST_OK;
}

/* Does the error name the folder and end with this? */
static void model_error_ends(ptst_ctx *c, const models_folder *f, const char *end) {
    const char *text = ptst_error_text(c);
    size_t n = strlen(text), k = strlen(end);
    CHECK(strncmp(text, f->path, strlen(f->path)) == 0);
    CHECK_TEXT(n < k ? text : text + n - k, end);
}

static void weights_refuse(void) {
    ptst_ctx *c = test_open(1, NULL);
    models_folder f;
    ptst_model *m;
    ptst_config g = models_config("llama");
    ptst_tensor list[40], *v = &list[3];
    ptst_tensors *t;
    size_t i, n;
    static const float zeros[600] = {0};
    CHECK(models_folder_make(&f));
    CHECK(ptst_model_load(c, f.path, PTST_DTYPE_FILE) == NULL);
    CHECK(ptst_error_code(c) == PTST_ERR_NOT_FOUND);
    g.num_hidden_layers = 2;
    m = ptst_model_new(c, &g, 3);
    CHECK(ptst_model_save(c, m, f.path, PTST_DTYPE_FILE) == PTST_OK);
    ptst_model_free(c, m);
    t = ptst_tensors_open(c, f.path);
    n = ptst_tensors_count(t);
    CHECK(n == 21);
    for (i = 0; i < n; i++) {
        list[i] = *ptst_tensors_at(t, i);
    }
    for (v = list; strcmp(v->name, "model.layers.1.self_attn.k_proj.weight") != 0; v++) {
    }
    CHECK(model_try(c, &f, config_base, NULL, list, n) == PTST_OK);
    CHECK(model_try(c, &f, config_base, "{", NULL, 0) == PTST_ERR_FORMAT);
    CHECK(model_try(c, &f, config_base, "[]", NULL, 0) == PTST_ERR_FORMAT);
    CHECK(model_try(c, &f, config_base, "{\"top_p\": 2}", NULL, 0) == PTST_ERR_FORMAT);
    model_error_ends(c, &f, "generation_config.json: top_p: expected a number from 0 to 1");
    CHECK(model_try(c, &f, "{\"model_type\"", "{}", NULL, 0) == PTST_ERR_FORMAT);
    CHECK(model_try(c, &f, config_base, NULL, list + 1, n - 1) == PTST_ERR_MISMATCH);
    model_error_ends(c, &f, "tensor lm_head.weight is missing");
    v->name = "model.layers.2.self_attn.k_proj.weight";
    CHECK(model_try(c, &f, config_base, NULL, list, n) == PTST_ERR_MISMATCH);
    model_error_ends(c, &f, "tensor model.layers.1.self_attn.k_proj.weight is missing");
    v->name = "model.layers.1.self_attn.k_proj.weight";
    list[n] = *v;
    list[n].name = "model.layers.1.self_attn.k_proj.bias";
    CHECK(model_try(c, &f, config_base, NULL, list, n + 1) == PTST_ERR_MISMATCH);
    model_error_ends(c, &f,
                     "1 tensors belong to no weight of a llama model, the first is "
                     "model.layers.1.self_attn.k_proj.bias");
    list[n].name = "model.layers.1.self_attn.rotary_emb.inv_freq"; /* of old files: ignored */
    CHECK(model_try(c, &f, config_base, NULL, list, n + 1) == PTST_OK);
    v->shape[0] = 12;
    v->shape[1] = 8;
    CHECK(model_try(c, &f, config_base, NULL, list, n) == PTST_ERR_MISMATCH);
    model_error_ends(c, &f,
                     "tensor model.layers.1.self_attn.k_proj.weight has rank 2 and shape [12, 8], "
                     "expected [8, 12]");
    v->rank = 1;
    v->shape[0] = 96;
    CHECK(model_try(c, &f, config_base, NULL, list, n) == PTST_ERR_MISMATCH);
    v->rank = 0;
    v->data = zeros;
    CHECK(model_try(c, &f, config_base, NULL, list, n) == PTST_ERR_MISMATCH);
    v->rank = 3;
    v->shape[0] = 8;
    v->shape[1] = 12;
    v->shape[2] = 1;
    CHECK(model_try(c, &f, config_base, NULL, list, n) == PTST_ERR_MISMATCH);
    v->rank = 2;
    v->shape[0] = 0;
    CHECK(model_try(c, &f, config_base, NULL, list, n) == PTST_ERR_MISMATCH);
    v->shape[0] = 8;
    v->dtype_name = "I32";
    CHECK(model_try(c, &f, config_base, NULL, list, n) == PTST_ERR_UNSUPPORTED);
    model_error_ends(c, &f, "k_proj.weight is I32, expected F32, F16 or BF16");
    v->dtype_name = "F8_E4M3";
    CHECK(model_try(c, &f, config_base, NULL, list, n) == PTST_ERR_UNSUPPORTED);
    v->dtype_name = "F16"; /* one matrix of another type is fine */
    CHECK(model_try(c, &f, config_base, NULL, list, n) == PTST_OK);
    for (v = list; strcmp(v->name, "model.norm.weight") != 0; v++) {
    }
    v->rank = 2;
    v->shape[1] = 1;
    CHECK(model_try(c, &f, config_base, NULL, list, n) == PTST_ERR_MISMATCH);
    v->rank = 0;
    CHECK(model_try(c, &f, config_base, NULL, list, n) == PTST_ERR_MISMATCH);
    v->rank = 1;
    v->shape[0] = 11;
    CHECK(model_try(c, &f, config_base, NULL, list, n) == PTST_ERR_MISMATCH);
    model_error_ends(c, &f, "tensor model.norm.weight has rank 1 and first size 11, expected [12]");
    ptst_tensors_close(c, t);
    CHECK(ptst__write_file(c, models_file(&f, "model.safetensors"), "damaged", 7) == PTST_OK);
    CHECK(model_try(c, &f, config_base, NULL, NULL, 0) == PTST_ERR_FORMAT);
    unlink(models_file(&f, "model.safetensors"));
    CHECK(model_try(c, &f, config_base, NULL, NULL, 0) == PTST_ERR_NOT_FOUND);
    models_folder_empty(&f, false);
    ptst_close(c);
}

/* A tied model that brings a head: tied if it is equal, the head's if not. */
static void tied_head(void) {
    ptst_ctx *c = test_open(1, NULL);
    models_folder f;
    models_case k;
    ptst_model *m;
    ptst_tensor list[40];
    float head[61 * 16];
    size_t i, n;
    char config[MODELS_PATH];
    ptst_text text = {NULL, 0, 0};
    CHECK(models_folder_make(&f));
    CHECK(models_open(c, &k, "llama_tied", false));
    snprintf(config, sizeof config, "tests/golden/models/llama_tied/config.json");
    CHECK(ptst__read_file(c, config, &text) == PTST_OK);
    n = ptst_tensors_count(k.m->tensors);
    for (i = 0; i < n; i++) {
        list[i] = *ptst_tensors_at(k.m->tensors, i);
    }
    list[n] = *ptst_tensors_find(k.m->tensors, "model.embed_tokens.weight");
    list[n].name = "lm_head.weight";
    CHECK(model_try(c, &f, text.data, NULL, list, n + 1) == PTST_OK);
    m = ptst_model_load(c, f.path, PTST_DTYPE_FILE);
    CHECK(m != NULL && m->head == m->embedding && m->config.tie_word_embeddings);
    ptst_model_free(c, m);
    memcpy(head, list[n].data, sizeof head);
    head[5] += 1;
    list[n].data = head;
    CHECK(model_try(c, &f, text.data, NULL, list, n + 1) == PTST_OK);
    m = ptst_model_load(c, f.path, PTST_DTYPE_FILE);
    CHECK(m != NULL && m->head != m->embedding && !m->config.tie_word_embeddings);
    CHECK(m != NULL && ((const float *)m->head->data)[5] == head[5]);
    ptst_model_free(c, m);
    ptst_text_free(c, &text);
    models_close(c, &k);
    models_folder_empty(&f, false);
    ptst_close(c);
}

static void generation_config(void) {
    static const char text[] =
        "{\"eos_token_id\": [5, 6, 7], \"temperature\": 0.6, \"top_p\": 0.9, \"top_k\": 20, "
        "\"do_sample\": true, \"repetition_penalty\": 1.1, \"max_new_tokens\": 99, \"min_p\": 0.1, "
        "\"num_beams\": null, \"transformers_version\": \"5\", \"typical_p\": 0.9}";
    static const char off[] = "{\"top_k\": 0, \"do_sample\": true}";
    ptst_ctx *c = test_open(1, NULL);
    models_folder f;
    ptst_model *m;
    ptst_config g = models_config("llama");
    const ptst_generation_config *n;
    CHECK(models_folder_make(&f));
    g.eos_count = 1;
    g.eos_token_id[0] = 2;
    g.bos_token_id = 1;
    m = ptst_model_new(c, &g, 3);
    CHECK(ptst_model_generation(m)->eos_count == 1);
    CHECK(ptst_model_save(c, m, f.path, PTST_F16) == PTST_OK);
    ptst_model_free(c, m);
    m = ptst_model_load(c, f.path, PTST_DTYPE_FILE);
    CHECK(m != NULL && m->embedding->dtype == PTST_F16);
    n = ptst_model_generation(m);
    CHECK(n->eos_count == 1 && n->eos_token_id[0] == 2 && n->bos_token_id == 1);
    CHECK(n->temperature == 0 && !n->do_sample && n->pad_token_id == -1);
    ptst_model_free(c, m);
    CHECK(ptst__write_file(c, models_file(&f, "generation_config.json"), text, strlen(text)) ==
          PTST_OK);
    m = ptst_model_load(c, f.path, PTST_DTYPE_FILE);
    n = ptst_model_generation(m);
    CHECK(n->eos_count == 3 && n->eos_token_id[2] == 7 && n->bos_token_id == 1);
    CHECK(n->temperature == 0.6 && n->top_p == 0.9 && n->top_k == 20 && n->do_sample);
    CHECK(n->repetition_penalty == 1.1 && n->max_new_tokens == 99);
    CHECK(ptst_model_config(m)->eos_count == 1);
    CHECK_TEXT(ptst_model_notes(m), "generation_config.json: min_p, typical_p");
    ptst_model_free(c, m);
    CHECK(ptst__write_file(c, models_file(&f, "generation_config.json"), off, strlen(off)) ==
          PTST_OK);
    m = ptst_model_load(c, f.path, PTST_DTYPE_FILE);
    CHECK(ptst_model_generation(m)->top_k == -1); /* off is not the same as not given */
    CHECK(ptst_model_generation(m)->eos_count == 0 && ptst_model_config(m)->eos_count == 1);
    CHECK_TEXT(ptst_model_notes(m), "");
    ptst_model_free(c, m);
    models_folder_empty(&f, false);
    ptst_close(c);
}

static void new_model_refuses(void) {
    ptst_ctx *c = test_open(1, NULL);
    ptst_config g = models_config("gpt2");
    CHECK(ptst_model_new(c, &g, 0) == NULL && ptst_error_code(c) == PTST_ERR_UNSUPPORTED);
    g = models_config("llama");
    g.num_attention_heads = -4;
    CHECK(ptst_model_new(c, &g, 0) == NULL && ptst_error_code(c) == PTST_ERR_FORMAT);
    g = models_config("llama");
    g.hidden_size = 0;
    CHECK(ptst_model_new(c, &g, 0) == NULL && ptst_error_code(c) == PTST_ERR_FORMAT);
    g = models_config("mistral");
    g.sliding_window = -1;
    CHECK(ptst_model_new(c, &g, 0) == NULL && ptst_error_code(c) == PTST_ERR_FORMAT);
    g = models_config("llama");
    snprintf(g.rope_type, sizeof g.rope_type, "linear");
    CHECK(ptst_model_new(c, &g, 0) == NULL && ptst_error_code(c) == PTST_ERR_FORMAT);
    ptst_close(c);
}

/* ---- no memory ---- */

/* The frequencies of transformers' _compute_llama3_parameters, which rounds each step to float; the
   third pair lies between the limits. Bound: one rounding of the last bit. */
static void rope_llama3_rounds(void) {
    static const double expected[2][4] = {{1, 0.444015592, 0.00771783106, 0.00273555075},
                                          {1, 0.444015592, 0.00693938183, 0.00273555075}};
    ptst_ctx *c = test_open(1, NULL);
    int i, pair;
    for (i = 0; i < 2; i++) {
        ptst_config g = models_config("llama");
        ptst_model *m;
        g.head_dim = 12;
        g.rope_theta = 130.5;
        memcpy(g.rope_type, "llama3", 7);
        g.rope_factor = 32;
        g.rope_low_freq_factor = 2;
        g.rope_high_freq_factor = i == 0 ? 3 : 4;
        g.original_max_position_embeddings = 64;
        m = ptst_model_new(c, &g, 1);
        for (pair = 0; m != NULL && pair < 4; pair++) {
            double e = expected[i][pair];
            CHECK_NEAR((double)m->frequencies[pair], e, 1.2e-7 * e);
        }
        CHECK(m != NULL);
        ptst_model_free(c, m);
    }
    ptst_close(c);
}

static ptst_code sweep_load(ptst_ctx *c, void *arg) {
    static const int32_t tokens[5] = {1, 2, 3, 4, 5};
    static const ptst_segment segment = {0, 5, -1};
    ptst_batch b = {tokens, tokens, 5, &segment, 1};
    ptst_chunk h = {0, tokens, 5, PTST_LOGITS_LAST};
    ptst_session *s = NULL;
    ptst__pass *p = NULL;
    ptst_model *m = ptst_model_load(c, "tests/golden/models/qwen2_window", PTST_BF16);
    ptst_code code = m == NULL ? ptst_error_code(c) : ptst_model_unfreeze(c, m);
    (void)arg;
    if (code == PTST_OK) {
        p = ptst__pass_new(c, m, NULL, 5, 5, 1, false);
        code = p == NULL ? ptst_error_code(c) : ptst__pass_run(c, p, &b, true, 0, 0, 0, NULL, NULL);
    }
    if (code == PTST_OK) {
        s = ptst_session_new(c, m, NULL, NULL);
        code = s == NULL ? ptst_error_code(c) : ptst_eval(c, s, &h, 1);
    }
    ptst_session_free(c, s);
    ptst__pass_free(c, p);
    ptst_model_free(c, m);
    return code;
}

static ptst_code sweep_save(ptst_ctx *c, void *arg) {
    const char *folder = (const char *)arg;
    ptst_config g = models_config("llama");
    ptst_model *m = ptst_model_new(c, &g, 1);
    ptst_code code = m == NULL ? ptst_error_code(c) : ptst_model_save(c, m, folder, PTST_BF16);
    ptst_model_free(c, m);
    return code;
}

static void memory(void) {
    models_folder f;
    CHECK(models_folder_make(&f));
    test_memory_sweep(sweep_load, NULL);
    test_memory_sweep(sweep_save, f.path);
    models_folder_empty(&f, false); /* and no temporary file is left */
}

/* What is sized beforehand is what is taken: nothing is allocated while running. */
static void runs_without_allocating(void) {
    test_memory counts = {0, 0, -1, false, 0, 0};
    ptst_desc desc;
    ptst_ctx *c;
    models_case k;
    ptst__pass *p;
    ptst_session *s;
    ptst_chunk h;
    long calls;
    memset(&desc, 0, sizeof desc);
    desc.threads = 2;
    desc.allocator.alloc = test_alloc;
    desc.allocator.release = test_release;
    desc.allocator.user = &counts;
    CHECK(ptst_open(&desc, &c) == PTST_OK);
    CHECK(models_open(c, &k, "llama_bias", true));
    p = ptst__pass_new(c, k.m, k.a, MODELS_TOKENS, MODELS_TOKENS, 3, false);
    s = ptst_session_new(c, k.m, k.a, NULL);
    h.slot = 0;
    h.tokens = k.tokens;
    h.count = 9;
    h.logits = PTST_LOGITS_LAST;
    calls = counts.calls;
    CHECK(ptst__pass_run(c, p, &k.batch, true, 0.1, 1, 2, NULL, NULL) == PTST_OK);
    CHECK(ptst_eval(c, s, &h, 1) == PTST_OK);
    CHECK(counts.calls == calls);
    ptst_session_free(c, s);
    ptst__pass_free(c, p);
    models_close(c, &k);
    ptst_close(c);
    CHECK(counts.live == 0);
}

static void suite_model(void) {
    RUN(stories_greedy);
    RUN(golden_logits);
    RUN(golden_gradients);
    RUN(differences_full);
    RUN(differences_adapter);
    RUN(differences_saved);
    RUN(packed_is_separate);
    RUN(prefix_is_repetition);
    RUN(padding_learns_nothing);
    RUN(again_same_bits);
    RUN(threads_same_bits);
    RUN(cached_is_full);
    RUN(session_rewinds);
    RUN(session_refuses);
    RUN(pass_refuses);
    RUN(dtypes_convert);
    RUN(dtypes_blocks);
    RUN(quantization);
    RUN(saves_and_loads);
    RUN(new_model);
    RUN(new_model_refuses);
    RUN(caps_keep_digits);
    RUN(config_refuses);
    RUN(config_means);
    RUN(config_families);
    RUN(config_lists);
    RUN(weights_refuse);
    RUN(tied_head);
    RUN(rope_llama3_rounds);
    RUN(generation_config);
    RUN(memory);
    RUN(runs_without_allocating);
}

MAIN(model)
