/* Tests of >>train: rows, batches, schedules, steps, checkpoints, resume, faults. */
#include "models.h"
#include "tiny.h"
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>

/* ---- what all tests share ---- */

typedef struct tr_world {
    ptst_ctx *c;
    ptst_model *model;
    ptst_tokenizer *tokenizer;
    ptst_prompt prompts[16];
    ptst_example examples[16];
    size_t count;
} tr_world;

/* Rows that share a head (like a template) and differ in length. */
static const char *const tr_texts[][2] = {
    {"[INST] What is 1+1? [/INST]", " 2"},
    {"[INST] What is 2+3? [/INST]", " five, of course"},
    {"[INST] Say a word. [/INST]", " word"},
    {"[INST] Who are you? [/INST]", " a test"},
    {"[INST] What is 9-4? [/INST]", " 5"},
    {"[INST] x [/INST]", " y is a letter that comes after x in the alphabet"},
    {"[INST] Hello [/INST]", " Hello to you"},
    {"[INST] abc [/INST]", " def"},
    {"[INST] 12 [/INST]", " 13"},
    {"[INST] The end? [/INST]", " Yes"}};

static void tr_open_on(tr_world *w, ptst_ctx *c) {
    size_t i;
    memset(w, 0, sizeof *w);
    w->c = c;
    w->model = tiny_model(c, 128);
    w->tokenizer = ptst_tokenizer_load(c, tiny_folder);
    w->count = sizeof tr_texts / sizeof tr_texts[0];
    for (i = 0; i < w->count; i++) {
        const char *text = tr_texts[i][0];
        if (ptst_text_append(c, &w->prompts[i].text, text, strlen(text)) != PTST_OK) {
            break;
        }
        w->examples[i].prompt = &w->prompts[i];
        w->examples[i].answer = tr_texts[i][1];
        w->examples[i].answer_size = strlen(tr_texts[i][1]);
    }
}

static void tr_open(tr_world *w, int threads) {
    ptst_ctx *c = test_open(threads, NULL);
    tiny_begin();
    tiny_write_tokenizer(c, tiny_folder);
    tr_open_on(w, c);
    CHECK(w->model != NULL && w->tokenizer != NULL);
}

static void tr_close_on(tr_world *w) {
    size_t i;
    for (i = 0; i < 16; i++) {
        ptst_text_free(w->c, &w->prompts[i].text);
        ptst_text_free(w->c, &w->prompts[i].marks);
    }
    ptst_tokenizer_free(w->c, w->tokenizer);
    ptst_model_free(w->c, w->model);
}

static void tr_close(tr_world *w) {
    tr_close_on(w);
    ptst_close(w->c);
    tiny_end();
}

static ptst_dataset *tr_dataset(tr_world *w) {
    ptst_dataset *d = ptst_dataset_new(w->c, NULL);
    CHECK(ptst_dataset_add(w->c, d, w->tokenizer, w->examples, w->count) == PTST_OK);
    return d;
}

static ptst_adapter *tr_adapter(tr_world *w) {
    ptst_lora_desc lora;
    memset(&lora, 0, sizeof lora);
    lora.seed = 5;
    lora.targets = "all-linear";
    return ptst_adapter_new(w->c, w->model, &lora);
}

/* ---- schedules ---- */

/* Recorded with torch 2 and transformers: lr of each of 8 optimiser steps, 2 warm-up steps, 3 steps
   an epoch (see the comment of each row); lr 1. */
static void train_schedules(void) {
    static const double expected[4][8] = {
        {0, 0.5, 1, 1, 1, 1, 1, 1}, /* get_constant_schedule_with_warmup */
        {0, 0.5, 1, 5.0 / 6, 4.0 / 6, 3.0 / 6, 2.0 / 6, 1.0 / 6},              /* get_linear_... */
        {0, 0.5, 1, 0.9330127018922194, 0.75, 0.5, 0.25, 0.06698729810778059}, /* get_cosine_... */
        {0, 0.5, 1, 0.5, 0.5, 0.5, 0.25, 0.25}};                               /* StepLR, 0.5 */
    ptst_train_desc d;
    uint64_t i;
    int k;
    for (k = 0; k < 4; k++) {
        memset(&d, 0, sizeof d);
        d.lr = 1;
        d.schedule = (ptst_schedule)k;
        d.gamma = 0.5;
        d.warmup = 2;
        for (i = 0; i < 8; i++) { /* a few roundings of double */
            CHECK_NEAR(ptst__train_rate(&d, i, 8, i / 3), expected[k][i], 1e-15);
        }
        d.warmup = 0;
        CHECK_NEAR(ptst__train_rate(&d, 0, 8, 0), 1, 0);
        CHECK_NEAR(ptst__train_rate(&d, 8, 8, 0), k == 1 || k == 2 ? 0 : 1, 0);
        d.warmup = 9; /* longer than the training */
        CHECK_NEAR(ptst__train_rate(&d, 7, 8, 0), 7.0 / 9, 1e-15);
    }
}

static void train_schedule_parse(void) {
    static const char *const bad[] = {"",        "Cosine", "step",       "step:",     "step:0",
                                      "step:-1", "step:x", "step:1e999", "step:0.5x", "linear "};
    ptst_ctx *c = test_open(1, NULL);
    ptst_train_desc d;
    size_t i;
    memset(&d, 0, sizeof d);
    CHECK(ptst_schedule_parse(c, "cosine", &d) == PTST_OK && d.schedule == PTST_SCHEDULE_COSINE);
    CHECK(ptst_schedule_parse(c, "linear", &d) == PTST_OK && d.schedule == PTST_SCHEDULE_LINEAR);
    CHECK(ptst_schedule_parse(c, "step:0.85", &d) == PTST_OK && d.schedule == PTST_SCHEDULE_STEP);
    CHECK_NEAR(d.gamma, 0.85, 0);
    CHECK(ptst_schedule_parse(c, "constant", &d) == PTST_OK && d.schedule == 0);
    for (i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        CHECK(ptst_schedule_parse(c, bad[i], &d) == PTST_ERR_ARGUMENT);
    }
    ptst_close(c);
}

/* ---- rows ---- */

static void tr_expect_row(const ptst_dataset *d, size_t i, const int32_t *expected, size_t count,
                          size_t prompt) {
    size_t n = 0, p = 0;
    const int32_t *ids = ptst_dataset_row(d, i, &n, &p);
    CHECK(ids != NULL && n == count && p == prompt);
    CHECK(ids != NULL && n == count && memcmp(ids, expected, n * sizeof *ids) == 0);
}

enum { TR_A = 'a' + 3, TR_B = 'b' + 3, TR_X = 'x' + 3, TR_AB = 259 };

/* bos once, eos once and labelled; joint and separate; the merge across the border is counted. */
static void train_rows(void) {
    static const int32_t plain[] = {1, TR_X, TR_B, 2}, joint[] = {1, TR_X, TR_AB, 2},
                         separate[] = {1, TR_X, TR_A, TR_B, 2}, alone[] = {1, TR_B, 2};
    tr_world w;
    ptst_dataset *d;
    ptst_dataset_desc desc;
    ptst_dataset_info info;
    ptst_prompt p;
    ptst_example x;
    tr_open(&w, 1);
    memset(&p, 0, sizeof p);
    memset(&desc, 0, sizeof desc);
    CHECK(ptst_text_append(w.c, &p.text, "x", 1) == PTST_OK);
    x.prompt = &p;
    x.answer = "b";
    x.answer_size = 1;
    d = ptst_dataset_new(w.c, NULL);
    CHECK(ptst_dataset_add(w.c, d, w.tokenizer, &x, 1) == PTST_OK);
    tr_expect_row(d, 0, plain, 4, 2);
    CHECK(ptst_text_append(w.c, &p.text, "a", 1) == PTST_OK); /* "xa" + "b" = "x" "ab" */
    CHECK(ptst_dataset_add(w.c, d, w.tokenizer, &x, 1) == PTST_OK);
    tr_expect_row(d, 1, joint, 4, 3);
    x.prompt = NULL;
    CHECK(ptst_dataset_add(w.c, d, w.tokenizer, &x, 1) == PTST_OK);
    tr_expect_row(d, 2, alone, 3, 1);
    info = ptst_dataset_about(d);
    CHECK(info.rows == 3 && info.not_prefix == 1 && info.cut == 0 && info.dropped == 0);
    CHECK(info.tokens == 11 && info.labels == 2 + 1 + 2);
    CHECK(ptst_dataset_row(d, 3, NULL, NULL) == NULL);
    ptst_dataset_free(w.c, d);

    desc.mask = PTST_MASK_SEPARATE;
    desc.max_tokens = 5;
    d = ptst_dataset_new(w.c, &desc);
    x.prompt = &p;
    CHECK(ptst_dataset_add(w.c, d, w.tokenizer, &x, 1) == PTST_OK);
    tr_expect_row(d, 0, separate, 5, 3);
    x.answer = "bb"; /* six tokens: loses eos */
    x.answer_size = 2;
    CHECK(ptst_dataset_add(w.c, d, w.tokenizer, &x, 1) == PTST_OK);
    info = ptst_dataset_about(d);
    CHECK(info.rows == 2 && info.cut == 1 && info.dropped == 0 && info.not_prefix == 0);
    CHECK(ptst_text_append(w.c, &p.text, "aaaa", 4) == PTST_OK); /* nothing of the answer is left */
    CHECK(ptst_dataset_add(w.c, d, w.tokenizer, &x, 1) == PTST_OK);
    info = ptst_dataset_about(d);
    CHECK(info.rows == 2 && info.cut == 2 && info.dropped == 1);
    ptst_dataset_free(w.c, d);
    ptst_text_free(w.c, &p.text);
    tr_close(&w);
}

/* Special tokens: the template's count, the user's and the answer's are text. own_bos: one bos. */
static void train_rows_special(void) {
    tr_world w;
    ptst_dataset *d;
    ptst_prompt p;
    ptst_example x;
    const int32_t *ids;
    size_t n = 0, i, bos = 0, eos = 0;
    static const char text[] = "<s>T</s><s>user</s>";
    tr_open(&w, 1);
    memset(&p, 0, sizeof p);
    CHECK(ptst_text_append(w.c, &p.text, text, sizeof text - 1) == PTST_OK);
    CHECK(ptst_text_append(w.c, &p.marks, "\0\0\0\0\0\0\0\0\1\1\1\1\1\1\1\1\1\1\1", 19) == PTST_OK);
    p.own_bos = true;
    x.prompt = &p;
    x.answer = "</s><s>";
    x.answer_size = 7;
    d = ptst_dataset_new(w.c, NULL);
    CHECK(ptst_dataset_add(w.c, d, w.tokenizer, &x, 1) == PTST_OK);
    ids = ptst_dataset_row(d, 0, &n, NULL);
    for (i = 0; i < n && ids != NULL; i++) {
        bos += ids[i] == 1;
        eos += ids[i] == 2;
    }
    CHECK(bos == 1 && eos == 2 && n == 1 + 1 + 1 + 11 + 7 + 1); /* <s> T </s>, text, eos */
    CHECK(ids != NULL && ids[0] == 1 && ids[2] == 2 && ids[n - 1] == 2);
    ptst_dataset_free(w.c, d);
    ptst_text_free(w.c, &p.text);
    ptst_text_free(w.c, &p.marks);
    tr_close(&w);
}

/* A conversation: every answer is learned up to its end-of-text, in both mask conventions. */
static void train_rows_turns(void) {
    static const char text[] = "xab</s>xab</s>x", learn[] = "\0\0\1\1\1\1\1\0\0\1\1\1\1\1\0";
    static const int32_t joint[] = {1, TR_X, TR_AB, 2, TR_X, TR_AB, 2, TR_X},
                         separate[] = {1, TR_X, TR_A, TR_B, 2, TR_X, TR_A, TR_B, 2, TR_X};
    static const char learn_joint[] = {0, 0, 0, 1, 0, 0, 1, 0},
                      learn_separate[] = {0, 0, 0, 1, 1, 0, 0, 1, 1, 0};
    tr_world w;
    int k;
    tr_open(&w, 1);
    for (k = 0; k < 2; k++) {
        ptst_dataset_desc desc;
        ptst_dataset *d;
        ptst_dataset_info info;
        ptst_prompt p;
        ptst_example x;
        memset(&desc, 0, sizeof desc);
        memset(&p, 0, sizeof p);
        memset(&x, 0, sizeof x);
        desc.mask = k == 0 ? PTST_MASK_JOINT : PTST_MASK_SEPARATE;
        d = ptst_dataset_new(w.c, &desc);
        x.prompt = &p;
        CHECK(ptst_text_append(w.c, &p.text, text, sizeof text - 1) == PTST_OK);
        CHECK(ptst_text_append(w.c, &p.learn, learn, sizeof text - 1) == PTST_OK);
        CHECK(ptst_text_append(w.c, &p.marks, "\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", 15) == PTST_OK);
        CHECK(ptst_dataset_add(w.c, d, w.tokenizer, &x, 1) == PTST_OK);
        info = ptst_dataset_about(d);
        CHECK(info.rows == 1 && info.labels == (k == 0 ? 2 : 4) && info.not_prefix == (k == 0));
        tr_expect_row(d, 0, k == 0 ? joint : separate, k == 0 ? 8 : 10, 3);
        CHECK(memcmp(d->learn.data, k == 0 ? learn_joint : learn_separate, k == 0 ? 8 : 10) == 0);
        ptst_dataset_free(w.c, d);
        ptst_prompt_free(w.c, &p);
    }
    tr_close(&w);
}

/* Rows that are too long lose their end, are left out, or are an error; labels anywhere. */
static void train_rows_long(void) {
    static const int32_t tokens[] = {1, 5, 6, 7, 8};
    static const uint8_t learn[] = {1, 0, 1, 0, 1}, late[] = {0, 0, 0, 0, 1};
    ptst_ctx *c = test_open(1, NULL);
    ptst_dataset_desc desc;
    ptst_dataset_info info;
    int k;
    memset(&desc, 0, sizeof desc);
    desc.max_tokens = 4;
    for (k = 0; k < 3; k++) {
        ptst_dataset *d;
        ptst_code code;
        desc.long_rows = (ptst_long_rows)k;
        d = ptst_dataset_new(c, &desc);
        CHECK(ptst_dataset_add_masked(c, d, tokens, learn, 4) == PTST_OK);
        code = ptst_dataset_add_masked(c, d, tokens, learn, 5);
        info = ptst_dataset_about(d);
        CHECK(code == (k == 2 ? PTST_ERR_LIMIT : PTST_OK));
        CHECK(info.rows == (k == 0 ? 2 : 1) && info.labels == info.rows);
        CHECK(info.cut == (k == 2 ? 0 : 1) && info.dropped == (k == 1 ? 1 : 0));
        tr_expect_row(d, 0, tokens, 4, 2);
        if (k == 0) {
            CHECK(ptst_dataset_add_masked(c, d, tokens, late, 5) == PTST_OK);
            CHECK(ptst_dataset_about(d).rows == 2 && ptst_dataset_about(d).dropped == 1);
        }
        if (k == 2) {
            CHECK_TEXT(ptst_error_text(c), "row 2: has 5 tokens, expected at most 4");
        }
        ptst_dataset_free(c, d);
    }
    ptst_close(c);
}

/* ---- batches ---- */

/* Takes a batch apart again and finds each of its rows. */
static void tr_check_batch(const ptst_trainer *t, const ptst_batch *b, const uint32_t *rows,
                           size_t taken, size_t head) {
    size_t i, k;
    CHECK(b->count <= t->tokens_max && b->segments_count <= t->segments_max);
    CHECK(b->segments_count == taken + (head != 0));
    for (i = 0; i < taken; i++) {
        const ptst_segment *s = &b->segments[i + (head != 0)];
        size_t count = 0, prompt = 0;
        const int32_t *row = ptst_dataset_row(t->data, rows[i], &count, &prompt);
        CHECK(s->prefix == (head != 0 ? 0 : -1) && s->count == count - 1 - head);
        for (k = 0; k < count - 1; k++) {
            size_t at = k < head ? k : s->begin + k - head;
            CHECK(b->tokens[at] == row[k]);
            CHECK(b->labels[at] == (k + 1 >= prompt ? row[k + 1] : -1));
        }
    }
}

static void tr_check_epochs(const tr_world *w, ptst_trainer *t) {
    ptst__cursor at = {0, 0, 0};
    size_t seen[16], i, k;
    uint64_t epoch;
    uint32_t order[2][16];
    for (epoch = 0; epoch < 2; epoch++) {
        memset(seen, 0, sizeof seen);
        for (k = 0; at.epoch == epoch && !ptst__train_at_end(t, &at);
             ptst__train_next_step(t, &at)) {
            for (i = 0; i < t->desc.accumulate; i++) {
                size_t n = ptst__train_take(t, &at), head, r, tokens = 0, part;
                ptst_batch b;
                if (n == 0) {
                    break;
                }
                head = ptst__train_head(t, t->rows, n);
                CHECK((head != 0) == (n > 1 && !t->desc.no_prefix)); /* "<s>[INST] " */
                for (r = 0; r < n; r += part) {
                    size_t most = t->desc.micro_batch_tokens, shared;
                    part = ptst__train_micro_rows(t, t->rows + r, n - r, head);
                    shared = part > 1 ? head : 0;
                    most = most < 16 * head ? 16 * head : most;
                    b = ptst__train_fill(t, t->rows + r, part, shared);
                    tr_check_batch(t, &b, t->rows + r, part, shared);
                    CHECK(part == 1 || b.count - head <= most);
                    CHECK(r + part == n || /* one more would have been too much */
                          b.count - (shared != 0 ? head : part * head) +
                                  t->data->rows[t->rows[r + part]].count - 1 - head >
                              most);
                }
                for (r = 0; r < n; r++) {
                    order[epoch][k++] = t->rows[r];
                    seen[t->rows[r]]++;
                    tokens += t->data->rows[t->rows[r]].count;
                }
                CHECK(t->desc.batching == PTST_BATCHING_PACKING ? tokens <= t->budget || n == 1
                                                                : n <= t->desc.batch);
            }
        }
        for (i = 0; i < w->count; i++) {
            CHECK(seen[i] == 1);
        }
    }
    CHECK(at.step == t->steps);
    CHECK((memcmp(order[0], order[1], w->count * 4) == 0) == t->desc.no_shuffle);
}

static void train_batches(void) {
    tr_world w;
    ptst_dataset *d;
    ptst_adapter *a;
    int k;
    tr_open(&w, 1);
    d = tr_dataset(&w);
    a = tr_adapter(&w);
    for (k = 0; k < 24; k++) {
        ptst_train_desc desc;
        ptst_trainer *t;
        memset(&desc, 0, sizeof desc);
        desc.epochs = 2;
        desc.batch = (size_t)(k % 3) + 1;
        desc.accumulate = (size_t)(k % 2) + 1;
        desc.no_shuffle = k % 4 == 3;
        desc.no_prefix = k % 6 == 5;
        desc.micro_batch_tokens = k % 5 == 2 ? 1 : k % 5 == 3 ? 60 : 0;
        desc.batching = k < 12 ? PTST_BATCHING_EXAMPLES : PTST_BATCHING_PACKING;
        desc.context = 50;
        t = ptst_trainer_new(w.c, w.model, a, d, &desc);
        CHECK(t != NULL);
        if (t != NULL) {
            tr_check_epochs(&w, t);
        }
        ptst_trainer_free(w.c, t);
    }
    ptst_adapter_free(w.c, a);
    ptst_dataset_free(w.c, d);
    tr_close(&w);
}

/* ---- steps ---- */

/* Trains a new adapter; the losses of all steps, and all weights behind each other. */
static size_t tr_train(tr_world *w, const ptst_dataset *d, const ptst_train_desc *desc,
                       double *losses, float **weights) {
    ptst_adapter *a = tr_adapter(w);
    ptst_trainer *t = ptst_trainer_new(w->c, w->model, a, d, desc);
    ptst_step s;
    size_t i, n = 0, steps = 0;
    CHECK(t != NULL);
    while (t != NULL && ptst_trainer_done(t) < ptst_trainer_steps(t)) {
        CHECK(ptst_trainer_step(w->c, t, &s) == PTST_OK);
        losses[steps++] = s.loss;
        CHECK(s.step == steps && s.tokens >= s.labels && s.grad_norm > 0);
    }
    CHECK(t != NULL && ptst_trainer_step(w->c, t, &s) == PTST_ERR_ARGUMENT);
    for (i = 0; t != NULL && i < t->params_count; i++) {
        n += t->params[i].count;
    }
    *weights = (float *)malloc(n * sizeof(float) + 1);
    for (i = n = 0; t != NULL && i < t->params_count; i++) {
        memcpy(*weights + n, t->params[i].value, t->params[i].count * sizeof(float));
        n += t->params[i].count;
    }
    ptst_trainer_free(w->c, t);
    ptst_adapter_free(w->c, a);
    return n;
}

/* |a - b| / |a| */
static double tr_distance(const float *a, const float *b, size_t n) {
    double difference = 0, norm = 1e-300;
    size_t i;
    for (i = 0; i < n; i++) {
        difference += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        norm += (double)a[i] * a[i];
    }
    return sqrt(difference / norm);
}

/* 8 rows at once, in 2, 4 and 8 parts, packed, without the common head, and computed row by row: the
   same training up to the rounding of float sums in another order. 10 rows make the last window
   ragged. */
static void train_equal_windows(void) {
    static const size_t batch[] = {8, 4, 2, 1, 8, 4, 8, 8}, parts[] = {1, 2, 4, 8, 1, 2, 1, 1};
    const size_t other = sizeof batch / sizeof batch[0];
    tr_world w;
    ptst_dataset *d;
    double first[8] = {0}, losses[8];
    float *reference = NULL, *weights;
    size_t n, i, k;
    tr_open(&w, 2);
    d = tr_dataset(&w);
    for (k = 0; k <= other; k++) {
        ptst_train_desc desc;
        memset(&desc, 0, sizeof desc);
        desc.epochs = 2;
        desc.batch = k < other ? batch[k] : 4;
        desc.accumulate = k < other ? parts[k] : 100;
        desc.no_prefix = k >= 4 && k != 7;
        desc.micro_batch_tokens = k == 6 || k == 7 ? 1 : 4096;
        desc.lr = 1e-2;
        desc.no_shuffle = true;
        desc.clip = 1;
        desc.weight_decay = 0.01;
        n = tr_train(&w, d, &desc, losses, &weights);
        for (i = 0; i < 4 && k < other; i++) {
            first[i] = k == 0 ? losses[i] : first[i];
            CHECK_NEAR(losses[i], first[i], 2e-6 * first[i]);
        }
        /* Adam divides by the root of the squared gradient, so tiny gradients turn rounding into
           steps: hence 1e-4 and not 1e-6 */
        CHECK(k == 0 || k == other || tr_distance(reference, weights, n) < 1e-4);
        CHECK(k != other || fabs(losses[0] - first[0]) > 1e-3); /* another window, another loss */
        if (k == 0) {
            reference = weights;
        } else {
            free(weights);
        }
    }
    free(reference);
    ptst_dataset_free(w.c, d);
    tr_close(&w);
}

/* Packing of the same rows in the same windows is the same training. */
static void train_packing(void) {
    tr_world w;
    ptst_dataset *d;
    double a[4], b[4];
    float *x, *y;
    size_t n;
    ptst_train_desc desc;
    tr_open(&w, 1);
    d = tr_dataset(&w);
    memset(&desc, 0, sizeof desc);
    desc.epochs = 2;
    desc.batch = 10;
    desc.seed = 3;
    desc.lr = 1e-2;
    n = tr_train(&w, d, &desc, a, &x);
    desc.batching = PTST_BATCHING_PACKING; /* all 10 rows fit */
    desc.batch = 4;
    CHECK(tr_train(&w, d, &desc, b, &y) == n);
    CHECK(memcmp(x, y, n * sizeof *x) == 0 && a[0] == b[0] && a[1] == b[1]);
    free(x);
    free(y);
    ptst_dataset_free(w.c, d);
    tr_close(&w);
}

/* The same bits for 1, 2 and 3 threads, with dropout; another seed gives other ones. */
static void train_threads(void) {
    float *reference = NULL, *weights;
    double losses[16];
    size_t n;
    int k;
    for (k = 1; k <= 4; k++) {
        tr_world w;
        ptst_dataset *d;
        ptst_train_desc desc;
        tr_open(&w, k < 4 ? k : 1);
        d = tr_dataset(&w);
        memset(&desc, 0, sizeof desc);
        desc.epochs = 2;
        desc.lr = 1e-2;
        desc.dropout = 0.3;
        desc.seed = k < 4 ? 1 : 2;
        n = tr_train(&w, d, &desc, losses, &weights);
        CHECK(k == 1 || (memcmp(reference, weights, n * sizeof *weights) == 0) == (k < 4));
        if (k == 1) {
            reference = weights;
        } else {
            free(weights);
        }
        ptst_dataset_free(w.c, d);
        tr_close(&w);
    }
    free(reference);
}

/* It learns: the mean loss of an epoch falls far below where it began. */
static void train_learns(void) {
    tr_world w;
    ptst_dataset *d;
    ptst_train_desc desc;
    double losses[120], first = 0, last = 0;
    float *weights;
    size_t i;
    tr_open(&w, 2);
    d = tr_dataset(&w);
    memset(&desc, 0, sizeof desc);
    desc.epochs = 40;
    desc.lr = 5e-3;
    desc.schedule = PTST_SCHEDULE_LINEAR;
    tr_train(&w, d, &desc, losses, &weights);
    for (i = 0; i < 3; i++) {
        first += losses[i] / 3;
        last += losses[117 + i] / 3;
    }
    CHECK_NEAR(last / first, 0.4, 0.15); /* measured 0.4; the base is random and frozen */
    free(weights);
    ptst_dataset_free(w.c, d);
    tr_close(&w);
}

/* Values and steps that are no numbers end the training, by name, and are never saved. */
static void train_not_finite(void) {
    tr_world w;
    ptst_dataset *d;
    ptst_train_desc desc;
    ptst_adapter *a;
    ptst_trainer *t;
    ptst_step s;
    int i;
    tr_open(&w, 1);
    d = tr_dataset(&w);
    memset(&desc, 0, sizeof desc);
    a = tr_adapter(&w);
    t = ptst_trainer_new(w.c, w.model, a, d, &desc);
    CHECK(ptst_trainer_step(w.c, t, &s) == PTST_OK);
    CHECK(ptst_trainer_save(w.c, t, tiny_path("state")) == PTST_OK);
    for (i = 0; i < (int)t->params[0].count; i++) {
        t->params[0].value[i] = ptst__float_of(0x7FC00000u);
    }
    CHECK(ptst_trainer_step(w.c, t, &s) == PTST_ERR_NUMERIC);
    CHECK(strstr(ptst_error_text(w.c), "step 2") != NULL);
    CHECK(strstr(ptst_error_text(w.c), t->params[0].name) != NULL);
    CHECK(ptst_trainer_done(t) == 1);
    CHECK(ptst_trainer_save(w.c, t, tiny_path("state")) == PTST_ERR_NUMERIC);
    CHECK(ptst_trainer_restore(w.c, t, tiny_path("state")) == PTST_OK); /* the good one is there */
    CHECK(ptst_trainer_step(w.c, t, &s) == PTST_OK);
    ptst_trainer_free(w.c, t);
    desc.lr = 1e38; /* runs away */
    t = ptst_trainer_new(w.c, w.model, a, d, &desc);
    for (i = 0; i < 8 && ptst_trainer_step(w.c, t, &s) == PTST_OK; i++) {
    }
    CHECK(i < 8 && ptst_error_code(w.c) == PTST_ERR_NUMERIC);
    ptst_trainer_free(w.c, t);
    ptst_adapter_free(w.c, a);
    ptst_dataset_free(w.c, d);
    tr_close(&w);
}

static void train_refuses(void) {
    static const char *const names[] = {"lr",           "gamma", "beta1",   "beta2",    "eps",
                                        "weight_decay", "clip",  "dropout", "schedule", "batching"};
    tr_world w;
    ptst_dataset *d, *none;
    ptst_adapter *a;
    size_t i;
    int32_t bad[3] = {1, 260, 2};
    int32_t *lengthy = (int32_t *)calloc(200, sizeof *lengthy);
    tr_open(&w, 1);
    d = tr_dataset(&w);
    none = ptst_dataset_new(w.c, NULL);
    a = tr_adapter(&w);
    for (i = 0; i < sizeof names / sizeof names[0]; i++) {
        ptst_train_desc desc;
        memset(&desc, 0, sizeof desc);
        desc.lr = i == 0 ? -1 : 0;
        desc.gamma = i == 1 ? -1 : 0;
        desc.beta1 = i == 2 ? 1 : 0;
        desc.beta2 = i == 3 ? 1.5 : 0;
        desc.eps = i == 4 ? HUGE_VAL : 0;
        desc.weight_decay = i == 5 ? -0.1 : 0;
        desc.clip = i == 6 ? -1 : 0;
        desc.dropout = i == 7 ? 1 : 0;
        desc.schedule = (ptst_schedule)(i == 8 ? 4 : 0);
        desc.batching = (ptst_batching)(i == 9 ? 2 : 0);
        CHECK(ptst_trainer_new(w.c, w.model, a, d, &desc) == NULL);
        CHECK(ptst_error_code(w.c) == PTST_ERR_ARGUMENT);
        CHECK(strstr(ptst_error_text(w.c), names[i]) != NULL);
    }
    CHECK(ptst_trainer_new(w.c, w.model, a, none, NULL) == NULL);
    CHECK(ptst_error_code(w.c) == PTST_ERR_ARGUMENT);
    CHECK(ptst_dataset_add_tokens(w.c, none, bad, 3, 1) == PTST_OK);
    CHECK(ptst_trainer_new(w.c, w.model, a, none, NULL) == NULL);
    CHECK(ptst_error_code(w.c) == PTST_ERR_MISMATCH);
    CHECK(strstr(ptst_error_text(w.c), "token 260") != NULL);
    ptst_dataset_free(w.c, none);
    none = ptst_dataset_new(w.c, NULL);
    CHECK(ptst_dataset_add_tokens(w.c, none, lengthy, 130, 1) == PTST_OK);
    {
        ptst_trainer *t = ptst_trainer_new(w.c, w.model, a, none, NULL); /* longer than it should */
        CHECK(t != NULL);
        ptst_trainer_free(w.c, t);
    }
    CHECK(ptst_dataset_add(w.c, none, w.tokenizer, w.examples, 0) == PTST_OK);
    ptst_dataset_free(w.c, none);
    free(lengthy);
    ptst_adapter_free(w.c, a);
    ptst_dataset_free(w.c, d);
    tr_close(&w);
}

/* ---- checkpoints ---- */

static ptst_train_desc tr_busy_options(void) {
    ptst_train_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.epochs = 2;
    desc.batch = 2;
    desc.accumulate = 2;
    desc.lr = 1e-2;
    desc.schedule = PTST_SCHEDULE_COSINE;
    desc.warmup = 2;
    desc.clip = 0.5;
    desc.weight_decay = 0.1;
    desc.dropout = 0.2;
    desc.seed = 11;
    return desc;
}

/* k steps, a save, and the rest in a new trainer: the same bits for every k. */
static void train_resume_bits(void) {
    tr_world w;
    ptst_dataset *d;
    ptst_train_desc desc = tr_busy_options();
    float *reference, *weights;
    double losses[16];
    size_t n, i;
    uint64_t k;
    ptst_step s;
    tr_open(&w, 1);
    d = tr_dataset(&w);
    n = tr_train(&w, d, &desc, losses, &reference);
    weights = (float *)malloc(n * sizeof *weights);
    for (k = 0; k <= 6; k++) {
        ptst_adapter *a = tr_adapter(&w), *b;
        ptst_trainer *t = ptst_trainer_new(w.c, w.model, a, d, &desc), *u;
        CHECK(ptst_trainer_steps(t) == 6);
        while (ptst_trainer_done(t) < k) {
            CHECK(ptst_trainer_step(w.c, t, &s) == PTST_OK);
        }
        CHECK(ptst_trainer_save(w.c, t, tiny_path("state")) == PTST_OK);
        b = tr_adapter(&w);
        u = ptst_trainer_new(w.c, w.model, b, d, &desc);
        CHECK(ptst_trainer_restore(w.c, u, tiny_path("state")) == PTST_OK);
        CHECK(ptst_trainer_done(u) == k);
        while (ptst_trainer_done(u) < 6) {
            CHECK(ptst_trainer_step(w.c, u, &s) == PTST_OK);
            CHECK(s.loss == losses[s.step - 1]);
        }
        for (i = n = 0; i < u->params_count; i++) {
            memcpy(weights + n, u->params[i].value, u->params[i].count * sizeof(float));
            n += u->params[i].count;
        }
        CHECK(memcmp(weights, reference, n * sizeof *weights) == 0);
        ptst_trainer_free(w.c, u);
        ptst_trainer_free(w.c, t);
        ptst_adapter_free(w.c, b);
        ptst_adapter_free(w.c, a);
    }
    free(weights);
    free(reference);
    ptst_dataset_free(w.c, d);
    tr_close(&w);
}

/* A plain file, without waiting for the disk. */
static void tr_write(const char *path, const char *data, size_t size) {
    FILE *f = fopen(path, "wb");
    CHECK(f != NULL && fwrite(data, 1, size, f) == size && fclose(f) == 0);
}

/* A cut or changed state file is refused, and leaves the trainer as it was. */
static void train_bad_state(void) {
    tr_world w;
    ptst_dataset *d;
    ptst_adapter *a;
    ptst_trainer *t;
    ptst_train_desc desc = tr_busy_options();
    ptst_text state = {NULL, 0, 0};
    ptst_step s;
    size_t n, header;
    float before;
    ptst_lora_desc lora;
    tr_open(&w, 1);
    d = tr_dataset(&w);
    memset(&lora, 0, sizeof lora);
    lora.rank = 1; /* a small file */
    lora.targets = "q_proj";
    a = ptst_adapter_new(w.c, w.model, &lora);
    t = ptst_trainer_new(w.c, w.model, a, d, &desc);
    CHECK(ptst_trainer_step(w.c, t, &s) == PTST_OK);
    CHECK(ptst_trainer_save(w.c, t, tiny_path("state")) == PTST_OK);
    CHECK(ptst__read_file(w.c, tiny_path("state"), &state) == PTST_OK);
    before = t->params[0].value[0];
    header = 8 + (unsigned char)state.data[0] + 256u * (unsigned char)state.data[1];
    for (n = 0; n < state.size; n += n < header ? 7 : 401) {
        tr_write(tiny_path("cut"), state.data, n);
        CHECK(ptst_trainer_restore(w.c, t, tiny_path("cut")) == PTST_ERR_FORMAT);
    }
    for (n = 8; n < header; n += 3) { /* any change of the header: refused, or without effect */
        char old = state.data[n];
        state.data[n] = old == '1' ? '2' : '1';
        tr_write(tiny_path("cut"), state.data, state.size);
        if (ptst_trainer_restore(w.c, t, tiny_path("cut")) != PTST_OK) {
            CHECK(ptst_trainer_done(t) == 1 && t->params[0].value[0] == before);
        } else {
            CHECK(ptst_trainer_restore(w.c, t, tiny_path("state")) == PTST_OK);
        }
        state.data[n] = old;
    }
    CHECK(ptst_trainer_restore(w.c, t, tiny_path("none")) == PTST_ERR_NOT_FOUND);
    CHECK(ptst_trainer_restore(w.c, t, tiny_path("state")) == PTST_OK);
    CHECK(t->params[0].value[0] == before);
    ptst_text_free(w.c, &state);
    ptst_trainer_free(w.c, t);
    ptst_adapter_free(w.c, a);
    ptst_dataset_free(w.c, d);
    tr_close(&w);
}

/* ---- the whole command ---- */

typedef struct tr_run {
    uint64_t stop_at; /* steps after which progress asks to stop; 0 = never */
    uint64_t die_at;  /* steps after which the process dies */
    uint64_t steps;
} tr_run;

static int tr_progress(void *user, const ptst_progress *p) {
    const tr_run *r = (const tr_run *)user;
    return r->stop_at != 0 && p->done >= (double)r->stop_at;
}

static void tr_on_step(void *user, const ptst_step *s) {
    tr_run *r = (tr_run *)user;
    r->steps++;
    if (r->die_at != 0 && s->step >= r->die_at) {
        _exit(9); /* nothing is flushed, closed or freed */
    }
}

static ptst_finetune_desc tr_finetune(const tr_world *w, const char *out, tr_run *run) {
    ptst_finetune_desc d;
    memset(&d, 0, sizeof d);
    memset(run, 0, sizeof *run);
    d.model = w->model;
    d.tokenizer = w->tokenizer;
    d.examples = w->examples;
    d.examples_count = w->count;
    d.out = out;
    d.train = tr_busy_options();
    d.on_step = tr_on_step;
    d.user = run;
    w->c->desc.progress = tr_progress;
    w->c->desc.user = run;
    return d;
}

/* Bytes of OUT/name. */
static ptst_text tr_file(const tr_world *w, const char *out, const char *name) {
    ptst_text t = {NULL, 0, 0};
    char path[700];
    snprintf(path, sizeof path, "%s/%s", out, name);
    CHECK(ptst__read_file(w->c, path, &t) == PTST_OK);
    return t;
}

/* The same file in both folders? For the log without its times. */
static bool tr_same(const tr_world *w, const char *a, const char *b, const char *name) {
    ptst_text x = tr_file(w, a, name), y = tr_file(w, b, name);
    bool same = x.size == y.size && memcmp(x.data, y.data, x.size) == 0;
    if (strcmp(name, "log.jsonl") == 0) {
        char *p, *q, *end_p, *end_q;
        same = true;
        for (p = x.data, q = y.data; same && *p != 0 && *q != 0; p = end_p + 1, q = end_q + 1) {
            end_p = strchr(p, '\n');
            end_q = strchr(q, '\n');
            same = end_p != NULL && end_q != NULL && strstr(p, ",\"tokens_per_second") != NULL &&
                   strstr(p, ",\"tokens_per_second") - p == strstr(q, ",\"tokens_per_second") - q &&
                   memcmp(p, q, (size_t)(strstr(p, ",\"tokens_per_second") - p)) == 0;
        }
        same = same && *p == 0 && *q == 0;
    }
    ptst_text_free(w->c, &x);
    ptst_text_free(w->c, &y);
    return same;
}

/* Stopped or killed after every step, resumed until done: the same adapter, the same log. */
static void train_kill_and_resume(void) {
    tr_world w;
    tr_run run;
    ptst_finetune_desc d;
    ptst_finetune_info info;
    uint64_t k;
    char whole[600], parts[600];
    tr_open(&w, 1);
    snprintf(whole, sizeof whole, "%s", tiny_path("whole"));
    d = tr_finetune(&w, whole, &run);
    CHECK(ptst_finetune(w.c, &d, &info) == PTST_OK);
    CHECK(info.finished && !info.resumed && run.steps == 6 && info.last.step == 6);
    for (k = 1; k <= 12; k++) {
        bool kill = k > 6;
        int status = 0;
        snprintf(parts, sizeof parts, "%s%d", tiny_path("parts"), (int)k);
        d = tr_finetune(&w, parts, &run);
        d.save_every = 2;
        if (kill) {
            pid_t child = fork();
            if (child == 0) {
                run.die_at = k - 6;
                ptst_finetune(w.c, &d, NULL);
                _exit(0);
            }
            CHECK(waitpid(child, &status, 0) == child && WEXITSTATUS(status) == 9);
        } else {
            run.stop_at = k;
            CHECK(ptst_finetune(w.c, &d, &info) == (k < 6 ? PTST_ERR_STOPPED : PTST_OK));
            CHECK(info.finished == (k == 6));
        }
        run.stop_at = run.steps = 0;
        d.resume = true;
        CHECK(ptst_finetune(w.c, &d, &info) == PTST_OK);
        CHECK(info.finished);
        CHECK(run.steps == (kill ? 6 - (k - 6 > 2 ? (k - 6 - 1) / 2 * 2 : 0) : 6 - k));
        CHECK(tr_same(&w, whole, parts, "adapter_model.safetensors"));
        CHECK(tr_same(&w, whole, parts, "log.jsonl"));
    }
    tr_close(&w);
}

/* --resume on a finished folder changes nothing, makes again what is missing, and refuses what
   differs. */
static void train_finished(void) {
    static const char *const names[] = {"adapter_config.json", "adapter_model.safetensors",
                                        "log.jsonl"};
    tr_world w;
    tr_run run;
    ptst_finetune_desc d;
    ptst_finetune_info info;
    ptst_text before, after;
    struct stat times;
    char out[600], path[700];
    size_t i;
    tr_open(&w, 1);
    snprintf(out, sizeof out, "%s", tiny_path("out"));
    d = tr_finetune(&w, out, &run);
    d.resume = true; /* with nothing there: starts anew */
    CHECK(ptst_finetune(w.c, &d, &info) == PTST_OK && !info.resumed && run.steps == 6);
    for (i = 0; i < 3; i++) {
        long inode;
        before = tr_file(&w, out, names[i]);
        snprintf(path, sizeof path, "%s/%s", out, names[i]);
        CHECK(stat(path, &times) == 0);
        inode = (long)times.st_ino;
        run.steps = 0;
        CHECK(ptst_finetune(w.c, &d, &info) == PTST_OK);
        CHECK(info.finished && info.resumed && run.steps == 0);
        CHECK(stat(path, &times) == 0 && (long)times.st_ino == inode);
        unlink(path);
        CHECK(ptst_finetune(w.c, &d, &info) == PTST_OK && info.finished && run.steps == 0);
        after = tr_file(&w, out, names[i]);
        CHECK(before.size == after.size && memcmp(before.data, after.data, after.size) == 0);
        ptst_text_free(w.c, &before);
        ptst_text_free(w.c, &after);
    }
    d.resume = false; /* begins again */
    CHECK(ptst_finetune(w.c, &d, &info) == PTST_OK && !info.resumed && run.steps == 6);
    tr_close(&w);
}

/* How many tokens at once if nobody says: few for all weights of a model that fits into caches, many
   for one that does not; for adapters as many as memory is meant for, within bounds. */
static void train_micro_default(void) {
    ptst_config g;
    memset(&g, 0, sizeof g);
    g.vocab_size = 1152;
    g.hidden_size = 96;
    g.intermediate_size = 256;
    g.num_hidden_layers = 3;
    g.num_attention_heads = g.num_key_value_heads = 4;
    g.head_dim = 24;
    CHECK(ptst__train_micro(&g, true) == 512);
    CHECK(ptst__train_micro(&g, false) == 2048);
    g.vocab_size = 12000; /* 1.5 million weights */
    CHECK(ptst__train_micro(&g, true) == 2048);
    g.hidden_size = 4096;
    g.intermediate_size = 11008;
    g.num_hidden_layers = 32;
    CHECK(ptst__train_micro(&g, true) == 2048);
    CHECK(ptst__train_micro(&g, false) == 256);
}

/* The same row twice in a batch: the same gradient as once, unless dropout differs, as it must where
   rows are computed one after the other as well. */
static void train_micro_dropout(void) {
    tr_world w;
    double losses[4];
    float *weights[2][2] = {{NULL, NULL}, {NULL, NULL}};
    size_t n = 0, count = 0;
    int drop, twice;
    tr_open(&w, 1);
    for (drop = 0; drop < 2; drop++) {
        for (twice = 0; twice < 2; twice++) {
            ptst_dataset *all = tr_dataset(&w), *d = ptst_dataset_new(w.c, NULL);
            const int32_t *row = ptst_dataset_row(all, 0, &count, NULL);
            ptst_train_desc desc;
            int i;
            for (i = 0; i <= twice; i++) {
                CHECK(ptst_dataset_add_tokens(w.c, d, row, count, 2) == PTST_OK);
            }
            memset(&desc, 0, sizeof desc);
            desc.epochs = 1;
            desc.batch = 2;
            desc.micro_batch_tokens = 1;
            desc.dropout = drop ? 0.5 : 0;
            n = tr_train(&w, d, &desc, losses, &weights[drop][twice]);
            ptst_dataset_free(w.c, all);
            ptst_dataset_free(w.c, d);
        }
        /* Adam's first step is the sign of the gradient, so rounding moves few weights */
        CHECK((tr_distance(weights[drop][0], weights[drop][1], n) < 1e-6) == !drop);
        free(weights[drop][0]);
        free(weights[drop][1]);
    }
    tr_close(&w);
}

static void train_other_options(void) {
    static const char *const names[] = {
        "lr",      "schedule",   "gamma",        "warmup",    "epochs",       "max_steps",
        "batch",   "accumulate", "batching",     "context",   "weight_decay", "clip",
        "dropout", "seed",       "no_shuffle",   "no_prefix", "rows",         "mask",
        "rank",    "targets",    "first weights", "micro_batch_tokens"};
    tr_world w;
    tr_run run;
    ptst_lora_desc lora;
    size_t i;
    char out[600];
    tr_open(&w, 1);
    snprintf(out, sizeof out, "%s", tiny_path("out"));
    for (i = 0; i <= sizeof names / sizeof names[0]; i++) {
        ptst_finetune_desc d = tr_finetune(&w, out, &run);
        const char *name = i == 0 ? "" : names[i - 1];
        memset(&lora, 0, sizeof lora);
        lora.seed = 99;
        d.lora = &lora;
        if (i == 0) {
            run.stop_at = 2;
            CHECK(ptst_finetune(w.c, &d, NULL) == PTST_ERR_STOPPED);
            continue;
        }
        d.resume = true;
        d.train.lr *= strcmp(name, "lr") == 0 ? 2 : 1;
        d.train.schedule = strcmp(name, "schedule") == 0 ? PTST_SCHEDULE_LINEAR : d.train.schedule;
        d.train.gamma = strcmp(name, "gamma") == 0 ? 0.5 : 0;
        d.train.warmup = strcmp(name, "warmup") == 0 ? 3 : d.train.warmup;
        d.train.epochs = strcmp(name, "epochs") == 0 ? 3 : d.train.epochs;
        d.train.max_steps = strcmp(name, "max_steps") == 0 ? 5 : 0;
        d.train.batch = strcmp(name, "batch") == 0 ? 3 : d.train.batch;
        d.train.accumulate = strcmp(name, "accumulate") == 0 ? 1 : d.train.accumulate;
        d.train.batching = strcmp(name, "batching") == 0 ? PTST_BATCHING_PACKING : d.train.batching;
        d.train.context = strcmp(name, "context") == 0 ? 50 : 0;
        d.train.weight_decay = strcmp(name, "weight_decay") == 0 ? 0 : d.train.weight_decay;
        d.train.clip = strcmp(name, "clip") == 0 ? 0 : d.train.clip;
        d.train.dropout = strcmp(name, "dropout") == 0 ? 0 : d.train.dropout;
        d.train.seed = strcmp(name, "seed") == 0 ? 12 : d.train.seed;
        d.train.no_shuffle = strcmp(name, "no_shuffle") == 0;
        d.train.no_prefix = strcmp(name, "no_prefix") == 0;
        d.train.micro_batch_tokens = strcmp(name, "micro_batch_tokens") == 0 ? 7 : 0;
        d.examples_count -= strcmp(name, "rows") == 0;
        d.dataset.mask = strcmp(name, "mask") == 0 ? PTST_MASK_SEPARATE : PTST_MASK_JOINT;
        lora.rank = strcmp(name, "rank") == 0 ? 4 : 0;
        lora.targets = strcmp(name, "targets") == 0 ? "q_proj" : NULL;
        lora.seed += strcmp(name, "first weights") == 0;
        CHECK(ptst_finetune(w.c, &d, NULL) == PTST_ERR_MISMATCH);
        if (strstr(ptst_error_text(w.c), name) == NULL) {
            CHECK_TEXT(ptst_error_text(w.c), name);
        }
    }
    tr_close(&w);
}

/* Safety rows take part in each epoch, and only as many as asked for. */
static void train_mix(void) {
    tr_world w;
    tr_run run;
    ptst_finetune_desc d;
    ptst_finetune_info info;
    ptst_example safe[3];
    size_t i;
    tr_open(&w, 1);
    for (i = 0; i < 3; i++) {
        safe[i] = w.examples[i];
        safe[i].answer = "I cannot help with that.";
        safe[i].answer_size = strlen(safe[i].answer);
    }
    d = tr_finetune(&w, tiny_path("out"), &run);
    d.mix = safe;
    d.mix_count = 2;
    d.train.accumulate = 1;
    CHECK(ptst_finetune(w.c, &d, &info) == PTST_OK);
    CHECK(info.data.rows == 12 && run.steps == 12 && info.last.epoch == 2);
    tr_close(&w);
}

/* All weights: the model changes, the folder opens as a model and gives what was trained. */
static void train_full(void) {
    tr_world w;
    tr_run run;
    ptst_finetune_desc d;
    ptst_finetune_info info;
    ptst_text log;
    char out[600];
    tr_open(&w, 1);
    snprintf(out, sizeof out, "%s", tiny_path("out"));
    d = tr_finetune(&w, out, &run);
    d.full = true;
    d.train.dropout = 0;
    d.train.epochs = 10;
    CHECK(ptst_finetune(w.c, &d, &info) == PTST_OK && info.finished && info.last.step == 30);
    log = tr_file(&w, out, "log.jsonl");
    CHECK(info.last.loss < 3); /* began above log(260) = 5.56 */
    ptst_text_free(w.c, &log);
    {
        ptst_model *m = ptst_model_load(w.c, out, PTST_DTYPE_FILE);
        CHECK(m != NULL);
        ptst_model_free(w.c, m);
    }
    tr_close(&w);
}

/* ---- against PyTorch and PEFT ---- */

/* Weights after the last step, by their names in PEFT, against a recorded file. */
static double tr_golden_distance(ptst_ctx *c, const ptst_trainer *t, const char *path) {
    ptst_tensors *f = ptst_tensors_open(c, path);
    double difference = 0, norm = 0;
    size_t i, k;
    CHECK(f != NULL && ptst_tensors_count(f) == t->params_count);
    for (i = 0; f != NULL && i < t->params_count; i++) {
        const ptst__param *p = &t->params[i];
        const ptst_tensor *v = ptst_tensors_find(f, p->name);
        CHECK(v != NULL && v->count == p->count && v->dtype == PTST_F32);
        for (k = 0; v != NULL && v->count == p->count && k < p->count; k++) {
            double x = ((const float *)v->data)[k];
            difference += (x - p->value[k]) * (x - p->value[k]);
            norm += x * x;
        }
    }
    ptst_tensors_close(c, f);
    return norm == 0 ? 1 : sqrt(difference / norm);
}

/* One recorded run. Asked for: loss within 1e-3, final adapter within 1e-2. Measured over 50 steps: below 3e-4 and 3e-3
   (Adam divides tiny gradients by their own size, which turns rounding into steps), so tighter. */
static void tr_golden_run(ptst_ctx *c, const ptst_json *j, int32_t run, const ptst_dataset *d) {
    const char *name = ptst_json_string(j, ptst_json_get(j, run, "name"), NULL);
    bool full = strcmp(name, "full") == 0;
    ptst_model *m = ptst_model_load(c, "tests/golden/train/model", PTST_DTYPE_FILE);
    ptst_adapter *a =
        m == NULL || full ? NULL : ptst_adapter_load(c, m, "tests/golden/train/adapter");
    ptst_trainer *t;
    ptst_train_desc desc;
    int32_t steps = ptst_json_get(j, run, "steps"), at;
    double worst = 0;
    char path[200];
    memset(&desc, 0, sizeof desc);
    desc.batch = (size_t)ptst_json_number(j, ptst_json_get(j, run, "batch"), 0);
    desc.accumulate = (size_t)ptst_json_number(j, ptst_json_get(j, run, "accumulate"), 0);
    desc.epochs = (uint64_t)ptst_json_number(j, ptst_json_get(j, run, "epochs"), 0);
    desc.warmup = (uint64_t)ptst_json_number(j, ptst_json_get(j, run, "warmup"), 0);
    desc.lr = ptst_json_number(j, ptst_json_get(j, run, "lr"), 0);
    desc.weight_decay = ptst_json_number(j, ptst_json_get(j, run, "weight_decay"), 0);
    desc.clip = ptst_json_number(j, ptst_json_get(j, run, "clip"), 0);
    desc.no_shuffle = true;
    CHECK(ptst_schedule_parse(c, ptst_json_string(j, ptst_json_get(j, run, "schedule"), NULL),
                              &desc) == PTST_OK);
    CHECK(m != NULL && (full ? ptst_model_unfreeze(c, m) == PTST_OK : a != NULL));
    t = ptst_trainer_new(c, m, a, d, &desc);
    CHECK(t != NULL && ptst_trainer_steps(t) == ptst_json_size(j, steps));
    for (at = ptst_json_first(j, steps); t != NULL && at >= 0; at = ptst_json_next(j, at)) {
        double loss = ptst_json_number(j, ptst_json_at(j, at, 0), 0);
        double norm = ptst_json_number(j, ptst_json_at(j, at, 1), 0);
        ptst_step s;
        CHECK(ptst_trainer_step(c, t, &s) == PTST_OK);
        CHECK_NEAR(s.loss, loss, 1e-3 * loss);
        CHECK_NEAR(s.grad_norm, norm, 1e-3 * norm);
        CHECK_NEAR(s.learning_rate, ptst_json_number(j, ptst_json_at(j, at, 2), 0), 1e-9);
        worst = fabs(s.loss - loss) / loss > worst ? fabs(s.loss - loss) / loss : worst;
    }
    CHECK(worst < 3e-4);
    if (t != NULL && !full) {
        snprintf(path, sizeof path, "tests/golden/train/%s.safetensors", name);
        CHECK_NEAR(tr_golden_distance(c, t, path), 0, 3e-3);
    }
    ptst_trainer_free(c, t);
    ptst_adapter_free(c, a);
    ptst_model_free(c, m);
}

static void train_golden(void) {
    ptst_ctx *c = test_open(2, NULL);
    ptst_json *j = ptst_json_load(c, "tests/golden/train/steps.json");
    ptst_dataset *d = ptst_dataset_new(c, NULL);
    int32_t at, list = j == NULL ? -1 : ptst_json_get(j, 0, "rows");
    size_t runs = 0;
    CHECK(j != NULL);
    for (at = ptst_json_first(j, list); at >= 0; at = ptst_json_next(j, at)) {
        int32_t tokens[64], node = ptst_json_get(j, at, "tokens");
        size_t i, n = ptst_json_size(j, node);
        for (i = 0; i < n && i < 64; i++) {
            tokens[i] = (int32_t)ptst_json_number(j, ptst_json_at(j, node, i), -1);
        }
        n = n > 64 ? 0 : n;
        CHECK(ptst_dataset_add_tokens(
                  c, d, tokens, n,
                  (size_t)ptst_json_number(j, ptst_json_get(j, at, "prompt"), 0)) == PTST_OK);
    }
    CHECK(ptst_dataset_about(d).rows == 40);
    list = j == NULL ? -1 : ptst_json_get(j, 0, "runs");
    for (at = ptst_json_first(j, list); at >= 0; at = ptst_json_next(j, at)) {
        tr_golden_run(c, j, at, d);
        runs++;
    }
    CHECK(runs == 5);
    ptst_dataset_free(c, d);
    ptst_json_free(c, j);
    ptst_close(c);
}

/* Eight steps with the adapter of a recorded model, on its sequences as rows. The bound is what is
   asked for; measured: 1.8e-5 in gemma2_caps, whose caps of 2 and 3 bend everything, below 2e-6 in
   the others. */
static void tr_family_run(ptst_ctx *c, const ptst_json *j, int32_t run) {
    const char *name = ptst_json_string(j, ptst_json_get(j, run, "name"), NULL);
    int32_t losses = ptst_json_get(j, run, "losses"), at;
    ptst_dataset *d = ptst_dataset_new(c, NULL);
    ptst_train_desc desc;
    ptst_trainer *t;
    models_case k;
    size_t i, n;
    double first = 0;
    ptst_step s;
    CHECK(models_open(c, &k, name, true));
    for (i = 0; i < k.batch.segments_count; i++) {
        const ptst_segment *g = &k.segments[i];
        int32_t row[MODELS_TOKENS];
        memcpy(row, k.tokens + g->begin, g->count * sizeof *row);
        row[g->count] = k.labels[g->begin + g->count - 1];
        for (n = 0; k.labels[g->begin + n] < 0; n++) {
        }
        CHECK(ptst_dataset_add_tokens(c, d, row, g->count + 1, n + 1) == PTST_OK);
    }
    memset(&desc, 0, sizeof desc);
    desc.batch = k.batch.segments_count;
    desc.epochs = ptst_json_size(j, losses);
    desc.lr = 2e-3;
    desc.no_shuffle = true;
    t = ptst_trainer_new(c, k.m, k.a, d, &desc);
    CHECK(t != NULL && ptst_trainer_steps(t) == 8);
    memset(&s, 0, sizeof s);
    for (at = ptst_json_first(j, losses); t != NULL && at >= 0; at = ptst_json_next(j, at)) {
        double loss = ptst_json_number(j, at, 0);
        CHECK(ptst_trainer_step(c, t, &s) == PTST_OK);
        CHECK_NEAR(s.loss, loss, 1e-4 * loss);
        first = s.step == 1 ? s.loss : first;
    }
    CHECK(s.step == 8 && s.loss < first);
    ptst_trainer_free(c, t);
    ptst_dataset_free(c, d);
    models_close(c, &k);
}

/* Every family learns as it does in PyTorch and PEFT. */
static void train_families(void) {
    ptst_ctx *c = test_open(2, NULL);
    ptst_json *j = ptst_json_load(c, "tests/golden/models/steps.json");
    bool met[PTST__FAMILIES] = {false};
    int32_t at;
    size_t i;
    CHECK(j != NULL && ptst_json_size(j, 0) == MODELS);
    for (at = ptst_json_first(j, 0); at >= 0; at = ptst_json_next(j, at)) {
        models_case k;
        CHECK(models_open(c, &k, ptst_json_string(j, ptst_json_get(j, at, "name"), NULL), false));
        met[ptst__family_find(k.m->config.model_type) - ptst__families] = true;
        models_close(c, &k);
        tr_family_run(c, j, at);
    }
    for (i = 0; i < PTST__FAMILIES; i++) {
        CHECK(met[i]);
    }
    ptst_json_free(c, j);
    ptst_close(c);
}

/* ---- faults ---- */

static void train_faults(void) {
    tr_world w;
    tr_run run;
    ptst_finetune_desc d;
    tr_open(&w, 1);
    d = tr_finetune(&w, NULL, &run);
    CHECK(ptst_finetune(w.c, &d, NULL) == PTST_ERR_ARGUMENT);
    d = tr_finetune(&w, tiny_path("out"), &run);
    d.examples_count = 0;
    CHECK(ptst_finetune(w.c, &d, NULL) == PTST_ERR_ARGUMENT);
    d = tr_finetune(&w, tiny_path("tokenizer.json/out"), &run); /* below a file */
    CHECK(ptst_finetune(w.c, &d, NULL) != PTST_OK);
    CHECK(strstr(ptst_error_text(w.c), "tokenizer.json") != NULL);
    d = tr_finetune(&w, tiny_path("out"), &run);
    d.init_adapter = tiny_path("no-adapter");
    CHECK(ptst_finetune(w.c, &d, NULL) == PTST_ERR_NOT_FOUND);
    CHECK(ptst__path_kind(tiny_path("out")) == 0); /* no empty folder is left */
    if (ptst__path_is_device("/dev/full")) {
        d = tr_finetune(&w, tiny_path("out"), &run);
        d.log = "/dev/full";
        CHECK(ptst_finetune(w.c, &d, NULL) == PTST_ERR_IO && run.steps <= 1);
        CHECK(strstr(ptst_error_text(w.c), "/dev/full") != NULL);
    }
    d = tr_finetune(&w, tiny_path("out"), &run); /* a folder where the state should go */
    CHECK(mkdir(tiny_path("out"), 0777) == 0);
    CHECK(mkdir(tiny_path("out/trainer_state.safetensors"), 0777) == 0);
    d.resume = true;
    CHECK(ptst_finetune(w.c, &d, NULL) != PTST_OK);
    d.resume = false;
    CHECK(ptst_finetune(w.c, &d, NULL) != PTST_OK);
    tr_close(&w);
}

/* Two processes cannot train into one folder. */
static void train_locked(void) {
    tr_world w;
    tr_run run;
    ptst_finetune_desc d;
    int lock = -1;
    char out[600];
    tr_open(&w, 1);
    snprintf(out, sizeof out, "%s", tiny_path("out"));
    d = tr_finetune(&w, out, &run);
    CHECK(mkdir(out, 0777) == 0 && ptst__folder_lock(w.c, out, &lock) == PTST_OK);
    CHECK(ptst_finetune(w.c, &d, NULL) == PTST_ERR_IO && run.steps == 0);
    ptst__folder_unlock(lock);
    CHECK(ptst_finetune(w.c, &d, NULL) == PTST_OK && run.steps == 6);
    tr_close(&w);
}

/* The disk is full after n bytes of any one file, for growing n: the command fails with a reason,
   what was saved stays usable, and with room again the result is the same bits. */
static void train_disk_full(void) {
    tr_world w;
    tr_run run;
    ptst_finetune_desc d;
    struct rlimit limit, old;
    char whole[600], out[600];
    unsigned long bytes, failed = 0;
    bool fits = false;
    tr_open(&w, 1);
    snprintf(whole, sizeof whole, "%s", tiny_path("whole"));
    d = tr_finetune(&w, whole, &run);
    CHECK(ptst_finetune(w.c, &d, NULL) == PTST_OK);
    signal(SIGXFSZ, SIG_IGN);
    CHECK(getrlimit(RLIMIT_FSIZE, &old) == 0);
    for (bytes = 0; bytes < 400000; bytes += bytes < 2000 ? 150 : bytes / 2) {
        ptst_code code;
        snprintf(out, sizeof out, "%s%lu", tiny_path("out"), bytes);
        d = tr_finetune(&w, out, &run);
        run.stop_at = 2;
        CHECK(ptst_finetune(w.c, &d, NULL) == PTST_ERR_STOPPED);
        d.resume = true;
        d.save_every = 1;
        run.stop_at = 0;
        limit = old;
        limit.rlim_cur = (rlim_t)bytes;
        CHECK(setrlimit(RLIMIT_FSIZE, &limit) == 0);
        code = ptst_finetune(w.c, &d, NULL);
        CHECK(setrlimit(RLIMIT_FSIZE, &old) == 0);
        CHECK(code == PTST_OK || code == PTST_ERR_IO);
        failed += code == PTST_ERR_IO;
        fits = code == PTST_OK;
        CHECK(code == PTST_OK || strstr(ptst_error_text(w.c), out) != NULL);
        CHECK(ptst_finetune(w.c, &d, NULL) == PTST_OK);
        CHECK(tr_same(&w, whole, out, "adapter_model.safetensors"));
        CHECK(tr_same(&w, whole, out, "log.jsonl"));
    }
    CHECK(failed > 10 && fits);
    signal(SIGXFSZ, SIG_DFL);
    tr_close(&w);
}

static ptst_code tr_two_steps(ptst_ctx *c, void *arg) {
    tr_world w;
    tr_run run;
    ptst_finetune_desc d;
    ptst_code code = PTST_ERR_MEMORY;
    tr_open_on(&w, c);
    if (w.model != NULL && w.tokenizer != NULL && w.prompts[w.count - 1].text.data != NULL) {
        d = tr_finetune(&w, (const char *)arg, &run);
        d.examples_count = 3;
        d.train.max_steps = 2;
        d.train.epochs = 2;
        d.save_every = 1;
        code = ptst_finetune(c, &d, NULL);
    }
    tr_close_on(&w);
    return code;
}

static void train_memory(void) {
    tr_world w;
    char out[600];
    tr_open(&w, 1);
    snprintf(out, sizeof out, "%s", tiny_path("out"));
    test_memory_sweep(tr_two_steps, out);
    tr_close(&w);
}

/* ---- plans ---- */

/* What an allocation has around it: where the block begins, and room to align it. */
enum { TR_AROUND = sizeof(ptst__block) + PTST__ALIGN };

/* Options of plan number i. */
static ptst_train_desc tr_plan_options(int i) {
    ptst_train_desc d;
    memset(&d, 0, sizeof d);
    d.batch = 4;
    d.epochs = 2;
    d.accumulate = i == 1 ? 2 : 1;
    d.gradient_checkpointing = i == 2;
    d.micro_batch_tokens = i == 3 ? 24 : 0;
    d.batching = i == 4 ? PTST_BATCHING_PACKING : PTST_BATCHING_EXAMPLES;
    d.context = i == 4 ? 30 : 0;
    d.max_steps = i == 1 ? 2 : 0;
    return d;
}

/* A plan says what a trainer then takes, to the byte, and what its steps then do. Number 5 and 6
   train all weights, 6 of a model whose weights lie in a file until they are copied. */
static void train_plans(void) {
    tr_world w;
    test_memory m;
    ptst_ctx *c = test_open_counted(&m);
    ptst_tensors *f;
    size_t file;
    int i;
    tiny_begin();
    tiny_write_tokenizer(c, tiny_folder);
    tr_open_on(&w, c);
    CHECK(ptst_model_save(c, w.model, tiny_path("model"), PTST_BF16) == PTST_OK);
    file = m.bytes;
    f = ptst_tensors_open(c, tiny_path("model"));
    file = m.bytes - file; /* what is known about a file is released with it */
    ptst_tensors_close(c, f);
    for (i = 0; i < 7; i++) {
        ptst_model *model = i < 6 ? w.model : ptst_model_load(c, tiny_path("model"), PTST_DTYPE_FILE);
        ptst_adapter *a = i < 5 ? tr_adapter(&w) : NULL;
        ptst_dataset *data = tr_dataset(&w);
        ptst_train_desc d = tr_plan_options(i);
        ptst_train_plan plan;
        ptst_trainer *t;
        ptst_step step;
        uint64_t tokens = 0, labels = 0, k;
        size_t before = m.bytes, blocks = (size_t)m.live, around, taken;
        CHECK(ptst_trainer_plan(c, model, a, data, &d, &plan) == PTST_OK);
        CHECK(m.bytes == before);
        CHECK(plan.mapped == 0); /* the weights of 6 will not be any more */
        CHECK(i < 6 || ptst_model_unfreeze(c, model) == PTST_OK);
        t = ptst_trainer_new(c, model, a, data, &d);
        taken = m.bytes - before;
        around = ((size_t)m.live - blocks) * TR_AROUND;
        around += i == 6 ? model->weights_count * 64 : 0; /* each copy begins at a cache line */
        CHECK(t != NULL && plan.bytes <= taken + (i == 6 ? file : 0));
        CHECK(taken <= plan.bytes + around);
        CHECK(plan.steps == ptst_trainer_steps(t) && plan.checkpointing == (i == 2));
        CHECK(plan.data.rows == 10 && plan.bytes > 20000);
        for (k = 0; k < plan.steps; k++) {
            CHECK(ptst_trainer_step(c, t, &step) == PTST_OK);
            tokens += step.tokens;
            labels += step.labels;
        }
        CHECK(plan.tokens == tokens && plan.labels == labels && plan.computed < tokens);
        ptst_trainer_free(c, t);
        ptst_dataset_free(c, data);
        ptst_adapter_free(c, a);
        if (i == 6) {
            ptst_model_free(c, model);
        }
    }
    tr_close_on(&w);
    ptst_close(c);
    CHECK(m.bytes == 0);
    tiny_end();
}

/* Counted by hand: two layers of q, o 24 x 24, k, v 24 x 12, three of 24 x 40, a head of 260 x 24.
   Rows of 21 and 31 tokens whose first 16 are the same: 15 + 5 + 15 go through the layers, if the
   head of 15 is computed once. */
static void train_plan_work(void) {
    tr_world w;
    ptst_dataset *data;
    ptst_adapter *a;
    ptst_train_plan plan;
    ptst_train_desc d;
    int32_t tokens[31];
    double layers, params, pairs;
    int i;
    tr_open(&w, 1);
    a = tr_adapter(&w);
    data = ptst_dataset_new(w.c, NULL);
    memset(&d, 0, sizeof d);
    d.epochs = 3;
    for (i = 0; i < 31; i++) {
        tokens[i] = i + 3;
    }
    CHECK(ptst_dataset_add_tokens(w.c, data, tokens, 21, 16) == PTST_OK);
    CHECK(ptst_dataset_add_tokens(w.c, data, tokens, 31, 16) == PTST_OK);
    CHECK(ptst_trainer_plan(w.c, w.model, a, data, &d, &plan) == PTST_OK);
    CHECK(plan.steps == 3 && plan.tokens == 3 * 52 && plan.labels == 3 * (5 + 15));
    CHECK(plan.computed == 3 * (15 + 5 + 15));
    layers = 2 * (24 * 24 * 2 + 24 * 12 * 2 + 3 * 24 * 40);
    params = (double)ptst_adapter_parameters(a);
    pairs = 15 * 16 / 2 + 5 * 15 + 5 * 6 / 2 + 15 * 15 + 15 * 16 / 2;
    CHECK_NEAR(plan.flops,
               3 * (2 * (35 * layers + 20 * 6240.0) * 2 - 2 * 35 * (24 * 24 + 2 * 24 * 12) +
                    6 * 35 * params + 2 * 4 * 24 * pairs * 3.5),
               1);
    d.no_prefix = true;
    CHECK(ptst_trainer_plan(w.c, w.model, NULL, data, &d, &plan) == PTST_OK);
    CHECK(plan.computed == 3 * (20 + 30));
    pairs = 20 * 21 / 2 + 30 * 31 / 2;
    CHECK_NEAR(plan.flops,
               3 * (3 * 2 * (50 * layers + 20 * 6240.0) + 2 * 4 * 24 * pairs * 3.5), 1);
    tokens[30] = 260;
    CHECK(ptst_dataset_add_tokens(w.c, data, tokens, 31, 1) == PTST_OK);
    CHECK(ptst_trainer_plan(w.c, w.model, a, data, &d, &plan) == PTST_ERR_MISMATCH);
    d.lr = -1;
    CHECK(ptst_trainer_plan(w.c, w.model, a, data, &d, &plan) == PTST_ERR_ARGUMENT);
    ptst_dataset_free(w.c, data);
    ptst_adapter_free(w.c, a);
    tr_close(&w);
}

typedef struct tr_plan_seen {
    int plans, probes, stop_at; /* stop_at: the probe step that is the last, 0 = none */
} tr_plan_seen;

static int tr_plan_progress(void *user, const ptst_progress *p) {
    tr_plan_seen *s = (tr_plan_seen *)user;
    s->plans += strcmp(p->stage, "plan") == 0;
    s->probes += strcmp(p->stage, "probe") == 0;
    return s->stop_at != 0 && s->probes == s->stop_at;
}

/* The probe makes real steps and no file. */
static void train_plan_probe(void) {
    tr_world w;
    tr_run run;
    ptst_finetune_desc d;
    ptst_train_plan plan, again;
    tr_plan_seen seen = {0, 0, 0};
    tr_open(&w, 1);
    d = tr_finetune(&w, tiny_path("out"), &run);
    w.c->desc.progress = tr_plan_progress;
    w.c->desc.user = &seen;
    CHECK(ptst_finetune_plan(w.c, &d, 0, &plan) == PTST_OK);
    CHECK(plan.probed == 0 && plan.seconds == 0 && seen.plans == 1 && seen.probes == 0);
    CHECK(ptst_finetune_plan(w.c, &d, 1e-9, &again) == PTST_OK); /* one to warm up, one more */
    CHECK(again.probed == 2 && again.seconds > 0 && seen.plans == 2 && seen.probes == 2);
    CHECK(again.flops == plan.flops && again.bytes == plan.bytes && again.steps == plan.steps);
    CHECK(ptst_finetune_plan(w.c, &d, 1e9, &again) == PTST_OK); /* no more than there are */
    CHECK(again.probed == plan.steps && again.seconds > 0);
    d.train.max_steps = 1;
    CHECK(ptst_finetune_plan(w.c, &d, 1, &again) == PTST_OK);
    CHECK(again.steps == 1 && again.probed == 1 && again.seconds > 0);
    d.train.max_steps = 0;
    seen.stop_at = seen.probes + 1;
    CHECK(ptst_finetune_plan(w.c, &d, 1, &again) == PTST_ERR_STOPPED);
    CHECK(ptst__path_kind(tiny_path("out")) == 0);
    tr_close(&w);
}

static ptst_code tr_plan_work(ptst_ctx *c, void *arg) {
    tr_world w;
    tr_run run;
    ptst_finetune_desc d;
    ptst_train_plan plan;
    ptst_code code = PTST_ERR_MEMORY;
    (void)arg;
    tr_open_on(&w, c);
    if (w.model != NULL && w.tokenizer != NULL && w.prompts[2].text.data != NULL) {
        d = tr_finetune(&w, NULL, &run);
        d.examples_count = 3;
        code = ptst_finetune_plan(c, &d, 1e-9, &plan);
    }
    tr_close_on(&w);
    return code;
}

static void train_plan_memory(void) {
    tr_world w;
    tr_open(&w, 1);
    test_memory_sweep(tr_plan_work, NULL);
    tr_close(&w);
}

static void suite_train(void) {
    RUN(train_plans);
    RUN(train_plan_work);
    RUN(train_plan_probe);
    RUN(train_plan_memory);
    RUN(train_schedules);
    RUN(train_schedule_parse);
    RUN(train_rows);
    RUN(train_rows_special);
    RUN(train_rows_turns);
    RUN(train_rows_long);
    RUN(train_batches);
    RUN(train_equal_windows);
    RUN(train_packing);
    RUN(train_threads);
    RUN(train_learns);
    RUN(train_not_finite);
    RUN(train_refuses);
    RUN(train_resume_bits);
    RUN(train_bad_state);
    RUN(train_kill_and_resume);
    RUN(train_finished);
    RUN(train_micro_default);
    RUN(train_micro_dropout);
    RUN(train_other_options);
    RUN(train_mix);
    RUN(train_full);
    RUN(train_golden);
    RUN(train_families);
    RUN(train_faults);
    RUN(train_locked);
    RUN(train_disk_full);
    RUN(train_memory);
}

MAIN(train)
