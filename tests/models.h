/* models.h - the tiny models of tests/golden/models with what transformers and PEFT make of them;
   for test_model.c and test_lora.c. See tests/golden/README.md. */
#ifndef MODELS_H
#define MODELS_H

#include "test.h"

#ifndef MODELS_TOKENS
#define MODELS_TOKENS 64 /* of a batch, at most */
#endif

enum { MODELS = 22, MODELS_WHOLE = 2, MODELS_PATH = 300 };

/* The last have longrope and dynamic rope: in their sequences all tokens turn otherwise once there
   are more than 12, so there what was cached before, or is shared with a shorter sequence, is not what one pass over all
   tokens gives (nor in transformers). */
static const char *const models_names[MODELS] = {
    "llama_tied",     "llama_bias",    "llama3_rope", "llama_linear_rope", "llama_plain",
    "mistral_window", "mistral_plain", "qwen2_tied",  "qwen2_window",      "qwen2_layer_types",
    "qwen3_norms",    "qwen3_window",  "qwen3_yarn",  "smollm3_no_rope",   "smollm3_window",
    "llama_yarn",     "phi3_plain",    "gemma_plain", "gemma3_local",
    "gemma2_caps",    "phi3_longrope", "llama_dynamic"};

/* A model, its adapter, a batch of several sequences, and the reference's results for them. */
typedef struct models_case {
    ptst_model *m;
    ptst_adapter *a;
    ptst_tensors *expected;
    const int32_t *tokens, *lengths;
    int32_t labels[MODELS_TOKENS];
    ptst_segment segments[8];
    ptst_batch batch;
    char folder[200];
} models_case;

static ptst_dtype models_dtype = PTST_DTYPE_FILE; /* how models_open loads */

/* name: one of models_names, or the path of a folder of this kind. */
static bool models_open(ptst_ctx *c, models_case *k, const char *name, bool adapter) {
    char path[MODELS_PATH + 40];
    const ptst_tensor *labels, *lengths;
    size_t i, at = 0;
    memset(k, 0, sizeof *k);
    snprintf(k->folder, sizeof k->folder, "%s%s",
             strchr(name, '/') == NULL ? "tests/golden/models/" : "", name);
    snprintf(path, sizeof path, "%s/expected.safetensors", k->folder);
    k->expected = ptst_tensors_open(c, path);
    k->m = ptst_model_load(c, k->folder, models_dtype);
    snprintf(path, sizeof path, "%s/adapter", k->folder);
    k->a = k->m == NULL || !adapter ? NULL : ptst_adapter_load(c, k->m, path);
    if (k->expected == NULL || k->m == NULL || (adapter && k->a == NULL)) {
        fprintf(stderr, "%s: %s\n", name, ptst_error_text(c));
        return false;
    }
    labels = ptst_tensors_find(k->expected, "labels");
    lengths = ptst_tensors_find(k->expected, "lengths");
    k->tokens = (const int32_t *)ptst_tensors_find(k->expected, "tokens")->data;
    k->lengths = (const int32_t *)lengths->data;
    memcpy(k->labels, labels->data, labels->bytes);
    k->batch.tokens = k->tokens;
    k->batch.labels = k->labels;
    k->batch.count = (size_t)labels->count;
    k->batch.segments = k->segments;
    k->batch.segments_count = (size_t)lengths->count;
    for (i = 0; i < k->batch.segments_count; i++) {
        k->segments[i].begin = at;
        k->segments[i].count = (size_t)k->lengths[i];
        k->segments[i].prefix = -1;
        at += (size_t)k->lengths[i];
    }
    return true;
}

static void models_close(ptst_ctx *c, models_case *k) {
    ptst_adapter_free(c, k->a);
    ptst_model_free(c, k->m);
    ptst_tensors_close(c, k->expected);
}

/* max |got - expected| / max |expected|. */
static double models_max_error(const float *got, const float *expected, size_t n) {
    double worst = 0, largest = 0;
    size_t i;
    for (i = 0; i < n; i++) {
        double d = fabs((double)got[i] - (double)expected[i]), e = fabs((double)expected[i]);
        worst = d <= worst ? worst : d; /* NaN wins */
        largest = e > largest ? e : largest;
    }
    return worst / largest;
}

/* |got - expected| / |expected| in the Euclidean norm; the norm of got if expected is 0. */
static double models_norm_error(const float *got, const float *expected, size_t n) {
    double difference = 0, norm = 0;
    size_t i;
    for (i = 0; i < n; i++) {
        double d = (double)got[i] - (double)expected[i];
        difference += d * d;
        norm += (double)expected[i] * (double)expected[i];
    }
    return sqrt(difference / (norm == 0 ? 1 : norm));
}

PTST__UNUSED static double models_norm(const float *x, size_t n) {
    double sum = 0;
    size_t i;
    for (i = 0; i < n; i++) {
        sum += (double)x[i] * (double)x[i];
    }
    return sqrt(sum);
}

/* Logits of the first sequence against a tensor of the reference: largest error relative to the
   largest logit; negative if they could not be made. */
PTST__UNUSED static double models_logits_error(ptst_ctx *c, models_case *k, const char *name) {
    const ptst_tensor *e = ptst_tensors_find(k->expected, name);
    ptst_session_desc d;
    ptst_session *s;
    ptst_chunk chunk;
    double error = -1;
    memset(&d, 0, sizeof d);
    d.logit_rows = d.capacity = MODELS_TOKENS;
    s = ptst_session_new(c, k->m, k->a, &d);
    chunk.slot = 0;
    chunk.tokens = k->tokens;
    chunk.count = (size_t)k->lengths[0];
    chunk.logits = PTST_LOGITS_ALL;
    if (s != NULL && ptst_eval(c, s, &chunk, 1) == PTST_OK) {
        error = models_max_error(ptst_logits(s, 0), (const float *)e->data, (size_t)e->count);
    }
    ptst_session_free(c, s);
    return error;
}

/* Norm of all gradients of the reference whose names begin with prefix. */
PTST__UNUSED static double models_norm_all(const models_case *k, const char *prefix) {
    const ptst_tensor *t;
    double sum = 0;
    size_t i;
    for (i = 0; (t = ptst_tensors_at(k->expected, i)) != NULL; i++) {
        double norm = strncmp(t->name, prefix, strlen(prefix)) != 0 || t->dtype != PTST_F32
                          ? 0
                          : models_norm((const float *)t->data, (size_t)t->count);
        sum += norm * norm;
    }
    return sqrt(sum);
}

/* Loss and gradients of a pass against the reference: the largest relative error of the norm of a
   gradient; the loss is checked here. */
PTST__UNUSED static double models_gradient_error(ptst_ctx *c, models_case *k, const char *loss,
                                                 const char *prefix) {
    const ptst__param *list = NULL;
    size_t i, n, labels;
    double sum = 0, worst = 0;
    float expected = *(const float *)ptst_tensors_find(k->expected, loss)->data;
    double all = models_norm_all(k, prefix);
    ptst__pass *p = ptst__pass_new(c, k->m, k->a, k->batch.count, k->batch.count,
                                   k->batch.segments_count, false);
    if (p == NULL || ptst__pass_run(c, p, &k->batch, true, 0, 0, 0, &sum, &labels) != PTST_OK) {
        ptst__pass_free(c, p);
        return HUGE_VAL;
    }
    CHECK_NEAR(sum, (double)expected, 1e-5 * (double)expected); /* float32 sums of both sides */
    n = ptst__pass_params(p, &list);
    CHECK(n != 0);
    for (i = 0; i < n; i++) {
        char name[200];
        const ptst_tensor *e;
        double error, norm;
        snprintf(name, sizeof name, "%s%s", prefix, list[i].name);
        e = ptst_tensors_find(k->expected, name);
        if (e == NULL || e->count != list[i].count) {
            fprintf(stderr, "%s: no reference for %s\n", k->folder, name);
            worst = HUGE_VAL;
            continue;
        }
        error = models_norm_error(list[i].grad, (const float *)e->data, list[i].count);
        norm = models_norm((const float *)e->data, list[i].count);
        if (norm != 0 && norm < 1e-7 * all) { /* nothing but rounding: biases of k without rope */
            error *= norm / (1e-4 * all);
        }
        if (!(error <= 1e-3)) {
            fprintf(stderr, "%s: %s: error %g of norm %g\n", k->folder, name, error,
                    models_norm((const float *)e->data, list[i].count));
        }
        worst = error <= worst ? worst : error;
    }
    ptst__pass_free(c, p);
    return worst;
}

/* ---- a folder that a test may fill ---- */

typedef struct models_folder {
    char path[32];
    char file[MODELS_PATH];
} models_folder;

PTST__UNUSED static const char *models_file(models_folder *f, const char *name) {
    snprintf(f->file, sizeof f->file, "%s/%s", f->path, name);
    return f->file;
}

PTST__UNUSED static bool models_folder_make(models_folder *f) {
    snprintf(f->path, sizeof f->path, "/tmp/ptst_test_XXXXXX");
    return mkdtemp(f->path) != NULL;
}

/* Removes the files in it, and itself unless `keep`. */
PTST__UNUSED static void models_folder_empty(models_folder *f, bool keep) {
    DIR *d = opendir(f->path);
    struct dirent *e;
    while (d != NULL && (e = readdir(d)) != NULL) {
        if (strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0) {
            unlink(models_file(f, e->d_name));
        }
    }
    if (d != NULL) {
        closedir(d);
    }
    if (!keep) {
        CHECK(rmdir(f->path) == 0);
    }
}

/* Are two files the same, byte for byte? */
PTST__UNUSED static bool models_same_file(ptst_ctx *c, const char *a, const char *b) {
    ptst_text s = {NULL, 0, 0}, t = {NULL, 0, 0};
    bool same = ptst__read_file(c, a, &s) == PTST_OK && ptst__read_file(c, b, &t) == PTST_OK &&
                s.size == t.size && memcmp(s.data, t.data, s.size) == 0;
    ptst_text_free(c, &s);
    ptst_text_free(c, &t);
    return same;
}

/* A small trainable model in memory. */
PTST__UNUSED static ptst_config models_config(const char *type) {
    ptst_config g;
    memset(&g, 0, sizeof g);
    snprintf(g.model_type, sizeof g.model_type, "%s", type);
    g.vocab_size = 23;
    g.hidden_size = 12;
    g.intermediate_size = 10;
    g.num_hidden_layers = 3;
    g.num_attention_heads = 4;
    g.num_key_value_heads = 2;
    g.head_dim = 4;
    g.initializer_range = 0.4;
    g.bos_token_id = g.pad_token_id = -1;
    return g;
}

/* Runs f for each instruction set that this machine has, on one and on three threads. */
PTST__UNUSED static void models_each_level(void (*f)(ptst_ctx *c)) {
    static const char *const levels[] = {"scalar", "avx2", "avx512", "amx", "neon"};
    size_t i;
    for (i = 0; i < 2 * sizeof levels / sizeof levels[0]; i++) {
        ptst_desc d;
        ptst_ctx *c;
        memset(&d, 0, sizeof d);
        d.simd = levels[i / 2];
        d.threads = i % 2 == 0 ? 1 : 3;
        if (ptst_open(&d, &c) == PTST_OK) {
            f(c);
            ptst_close(c);
        }
    }
}

#endif
