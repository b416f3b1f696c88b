/* Tests of >>generate: choosing tokens, and answers that do not depend on company. */
#include "test.h"
#include "tiny.h"

/* ---- choosing a token ---- */

static void sample_greedy(void) {
    static const ptst_sample_desc ways[] = {{0, 1, 0, 0}, {1, 0, 0, 0}, {1, 1, 1, 0}};
    float logits[6] = {-1, 3, 2, 3, -5, 3};
    int i;
    for (i = 0; i < 3; i++) { /* of equal ones the lowest id */
        CHECK(ptst_sample(&ways[i], logits, 6, NULL, 0, NULL, NULL) == 1);
    }
    logits[0] = 4;
    CHECK(ptst_sample(&ways[0], logits, 6, NULL, 0, NULL, NULL) == 0);
    CHECK(ptst_sample(&ways[0], logits, 1, NULL, 0, NULL, NULL) == 0);
}

static void sample_penalty(void) {
    static const int32_t seen[] = {0, 2, 0, 0, -1, 99, 2};
    ptst_sample_desc d = {0, 1, 0, 2};
    ptst_candidate scratch[4];
    float logits[4] = {3, 2, -1, -1.5f};
    /* once each, however often seen: 3 / 2, 2, -1 * 2, -1.5 */
    CHECK(ptst_sample(&d, logits, 4, seen, 7, NULL, scratch) == 1);
    CHECK(logits[0] == 1.5f && logits[1] == 2 && logits[2] == -2 && logits[3] == -1.5f);
}

/* The probabilities that transformers' processors leave: 20000 draws each stay within five standard
   errors, and what it removes is never drawn. */
static void sample_golden(void) {
    ptst_ctx *c = test_open(1, NULL);
    ptst_json *j = ptst_json_load(c, "tests/golden/sample.json");
    int32_t at, node, id;
    size_t cases = 0, i, n;
    CHECK(j != NULL);
    for (at = j == NULL ? -1 : ptst_json_first(j, 0); at >= 0; at = ptst_json_next(j, at)) {
        double expected[12], counts[12] = {0};
        float logits[12], copy[12];
        int32_t seen[12];
        ptst_candidate scratch[12];
        ptst_sample_desc d;
        ptst_rng rng = {17, 3, 0};
        rng.stream += cases++;
        d.temperature = ptst_json_number(j, ptst_json_get(j, at, "temperature"), 0);
        d.top_p = ptst_json_number(j, ptst_json_get(j, at, "top_p"), 0);
        d.top_k = (size_t)ptst_json_number(j, ptst_json_get(j, at, "top_k"), 0);
        d.repetition_penalty = ptst_json_number(j, ptst_json_get(j, at, "penalty"), 0);
        node = ptst_json_get(j, at, "seen");
        n = ptst_json_size(j, node);
        for (i = 0; i < n; i++) {
            seen[i] = (int32_t)ptst_json_number(j, ptst_json_at(j, node, i), -1);
        }
        for (i = 0; i < 12; i++) {
            node = ptst_json_get(j, at, "logits");
            logits[i] = (float)ptst_json_number(j, ptst_json_at(j, node, i), 0);
            node = ptst_json_get(j, at, "probabilities");
            expected[i] = ptst_json_number(j, ptst_json_at(j, node, i), 0);
        }
        for (i = 0; i < 20000; i++) {
            memcpy(copy, logits, sizeof copy);
            id = ptst_sample(&d, copy, 12, seen, n, &rng, scratch);
            CHECK(id >= 0 && id < 12);
            counts[id < 0 || id > 11 ? 0 : id]++;
        }
        for (i = 0; i < 12; i++) {
            double p = expected[i];
            CHECK_NEAR(counts[i] / 20000, p, 5 * sqrt(p * (1 - p) / 20000));
        }
    }
    CHECK(cases == 11);
    ptst_json_free(c, j);
    ptst_close(c);
}

/* Any number of candidates, ties everywhere: the choice is one that a plain definition allows. */
static void sample_hostile(void) {
    ptst_rng r = {5, 5, 0};
    float logits[40], copy[40];
    ptst_candidate scratch[40];
    int round;
    for (round = 0; round < 3000; round++) {
        size_t n = 1 + ptst_rng_below(&r, 40), i, above = 0;
        ptst_sample_desc d;
        int32_t id;
        for (i = 0; i < n; i++) {
            logits[i] = (float)ptst_rng_below(&r, round % 3 == 0 ? 2 : 1000) * 0.01f;
        }
        d.temperature = 0.5 + ptst_rng_uniform(&r);
        d.top_k = ptst_rng_below(&r, 45);
        d.top_p = round % 4 == 0 ? 1 : ptst_rng_uniform(&r);
        d.repetition_penalty = 1;
        memcpy(copy, logits, sizeof copy);
        id = ptst_sample(&d, copy, n, NULL, 0, &r, scratch);
        CHECK(id >= 0 && (size_t)id < n);
        for (i = 0; i < n; i++) {
            above += logits[i] > logits[id];
        }
        CHECK(d.top_k == 0 || above < d.top_k);
    }
}

/* ---- answers ---- */

enum { GEN_PROMPTS = 7 };

typedef struct gen_world {
    ptst_ctx *c;
    ptst_model *model;
    ptst_tokenizer *tokenizer;
    ptst_prompt prompts[GEN_PROMPTS];
} gen_world;

static void gen_open_on(gen_world *w, ptst_ctx *c) {
    static const char *const texts[GEN_PROMPTS] = {
        "The common head: one",   "The common head: three and more",
        "The common head: 5",     "The common head: one",
        "The common head: ",      "The common head: z z z z z",
        "The common head: ninety"};
    size_t i;
    memset(w, 0, sizeof *w);
    w->c = c;
    w->model = tiny_model(c, 96);
    w->tokenizer = ptst_tokenizer_load(c, tiny_folder);
    for (i = 0; i < GEN_PROMPTS; i++) {
        if (ptst_text_append(c, &w->prompts[i].text, texts[i], strlen(texts[i])) != PTST_OK) {
            break;
        }
    }
}

static void gen_open(gen_world *w, int threads) {
    ptst_ctx *c = test_open(threads, NULL);
    tiny_begin();
    tiny_write_tokenizer(c, tiny_folder);
    gen_open_on(w, c);
    CHECK(w->model != NULL && w->tokenizer != NULL);
}

static void gen_close_on(gen_world *w) {
    size_t i;
    for (i = 0; i < GEN_PROMPTS; i++) {
        ptst_text_free(w->c, &w->prompts[i].text);
    }
    ptst_tokenizer_free(w->c, w->tokenizer);
    ptst_model_free(w->c, w->model);
}

static void gen_close(gen_world *w) {
    gen_close_on(w);
    ptst_close(w->c);
    tiny_end();
}

static bool gen_same(const ptst_answer *a, const ptst_answer *b) {
    return a->ids.count == b->ids.count && a->finish == b->finish && a->text.size == b->text.size &&
           memcmp(a->ids.data, b->ids.data, a->ids.count * sizeof *a->ids.data) == 0 &&
           (a->text.size == 0 || memcmp(a->text.data, b->text.data, a->text.size) == 0);
}

/* The same answers one by one, three at a time, all at a time, with and without the common head, on
   any number of threads; and for each prompt alone. Greedy and drawn. */
static void generate_company(void) {
    static const size_t batches[] = {1, 3, 8, 2, 8};
    int drawn, threads;
    for (drawn = 0; drawn < 2; drawn++) {
        ptst_answer first[GEN_PROMPTS], answers[GEN_PROMPTS];
        memset(first, 0, sizeof first);
        memset(answers, 0, sizeof answers);
        for (threads = 1; threads <= 3; threads++) {
            gen_world w;
            ptst_generate_desc d;
            size_t i, k;
            gen_open(&w, threads);
            memset(&d, 0, sizeof d);
            d.max_new_tokens = 20;
            d.sample.temperature = drawn;
            d.sample.top_p = 0.9;
            d.seed = 4;
            for (k = 0; k < 5; k++) {
                ptst_answer *out = threads == 1 && k == 0 ? first : answers;
                d.batch = batches[k];
                d.no_prefix = k >= 3;
                CHECK(ptst_generate(w.c, w.model, NULL, w.tokenizer, w.prompts, GEN_PROMPTS, &d,
                                    out) == PTST_OK);
                for (i = 0; i < GEN_PROMPTS; i++) {
                    CHECK(gen_same(&first[i], &out[i]));
                    CHECK(out[i].finish == PTST_FINISH_EOS || out[i].ids.count == 20);
                }
            }
            for (i = 0; i < GEN_PROMPTS; i++) { /* prompt 3 is prompt 0 again: the second draw */
                CHECK(ptst_generate(w.c, w.model, NULL, w.tokenizer, &w.prompts[i], 1, &d,
                                    answers) == PTST_OK);
                CHECK(gen_same(&first[i], answers) == (i != 3 || drawn == 0));
            }
            ptst_answers_free(w.c, answers, GEN_PROMPTS);
            if (threads == 3) {
                ptst_answers_free(w.c, first, GEN_PROMPTS);
            }
            gen_close(&w);
        }
    }
}

typedef struct gen_watch {
    ptst_text told[GEN_PROMPTS];
    ptst_ctx *c;
    size_t finished, rounds, stop_after;
    bool split; /* a piece that is no whole UTF-8 */
} gen_watch;

static void gen_on_text(void *user, size_t index, const char *text, size_t size) {
    gen_watch *w = (gen_watch *)user;
    size_t i = 0, n;
    uint32_t point;
    while (i < size) {
        n = ptst__utf8_read(text + i, size - i, &point);
        w->split = w->split || n == 0;
        i += n == 0 ? 1 : n;
    }
    CHECK(ptst_text_append(w->c, &w->told[index], text, size) == PTST_OK);
}

static void gen_on_answer(void *user, size_t index, const ptst_answer *answer) {
    gen_watch *w = (gen_watch *)user;
    CHECK(index < GEN_PROMPTS && answer->finish != PTST_FINISH_NONE);
    w->finished++;
}

static int gen_progress(void *user, const ptst_progress *p) {
    gen_watch *w = (gen_watch *)user;
    CHECK(strcmp(p->stage, "generate") == 0 && p->done <= p->total);
    return w->stop_after != 0 && ++w->rounds >= w->stop_after;
}

/* What is streamed is the answer, in whole characters, whatever ends it. */
static void generate_stream(void) {
    gen_world w;
    gen_watch watch;
    ptst_generate_desc d;
    ptst_answer plain[GEN_PROMPTS], answers[GEN_PROMPTS];
    char stop[2] = {0, 0};
    const char *stops[2];
    size_t i, k, cut = 0;
    gen_open(&w, 1);
    memset(plain, 0, sizeof plain);
    memset(answers, 0, sizeof answers);
    memset(&d, 0, sizeof d);
    d.max_new_tokens = 40;
    d.sample.temperature = 1.5; /* all bytes, so many broken characters */
    d.sample.top_p = 1;
    d.batch = 3;
    CHECK(ptst_generate(w.c, w.model, NULL, w.tokenizer, w.prompts, GEN_PROMPTS, &d, plain) ==
          PTST_OK);
    for (k = 0; k < 2; k++) {
        memset(&watch, 0, sizeof watch);
        watch.c = w.c;
        d.on_text = gen_on_text;
        d.on_answer = gen_on_answer;
        d.user = &watch;
        for (i = 0; k == 1 && i < plain[1].text.size; i++) { /* an ASCII byte of answer 1 */
            stop[0] = plain[1].text.data[i] > ' ' ? plain[1].text.data[i] : stop[0];
        }
        stops[0] = stop;
        stops[1] = "never this";
        d.stop_strings = k == 1 ? stops : NULL;
        d.stop_strings_count = k == 1 ? 2 : 0;
        CHECK(ptst_generate(w.c, w.model, NULL, w.tokenizer, w.prompts, GEN_PROMPTS, &d, answers) ==
              PTST_OK);
        CHECK(watch.finished == GEN_PROMPTS && !watch.split);
        for (i = 0; i < GEN_PROMPTS; i++) {
            CHECK(answers[i].text.size == watch.told[i].size);
            CHECK(watch.told[i].size == 0 ||
                  memcmp(answers[i].text.data, watch.told[i].data, watch.told[i].size) == 0);
            CHECK(k == 1 || gen_same(&plain[i], &answers[i]));
            if (k == 1) { /* up to the stop string, and one of them was cut */
                const char *at = strchr(plain[i].text.data, stop[0]);
                size_t end = at == NULL ? plain[i].text.size : (size_t)(at - plain[i].text.data);
                CHECK(answers[i].text.size == end);
                CHECK(at == NULL || answers[i].finish == PTST_FINISH_EOS);
                cut += at != NULL;
            }
            ptst_text_free(w.c, &watch.told[i]);
        }
    }
    CHECK(cut > 0);
    ptst_answers_free(w.c, plain, GEN_PROMPTS);
    ptst_answers_free(w.c, answers, GEN_PROMPTS);
    gen_close(&w);
}

/* The limits: tokens, room, the caller's own end tokens. */
/* Phi 3 with longrope: an answer that grows beyond the original length goes on as if all of it had
   been read at once, which is not what was cached before. */
static void generate_switches(void) {
    enum { OLD = 30, NEW = 24 };
    gen_world w;
    ptst_config k;
    ptst_model *m;
    ptst_session *s;
    ptst_session_desc sd;
    ptst_generate_desc d;
    ptst_answer a;
    ptst_ids row = {NULL, 0, 0};
    size_t i, prompt;
    gen_open(&w, 1);
    k = *ptst_model_config(w.model);
    snprintf(k.model_type, sizeof k.model_type, "phi3");
    snprintf(k.rope_type, sizeof k.rope_type, "longrope");
    k.original_max_position_embeddings = OLD;
    k.rope_pairs = 3;
    k.rope_attention_factor = 1;
    for (i = 0; i < 3; i++) {
        k.rope_short_factor[i] = 1;
        k.rope_long_factor[i] = (float)(3 + 2 * i);
    }
    m = ptst_model_new(w.c, &k, 5);
    CHECK(m != NULL);
    memset(&a, 0, sizeof a);
    memset(&d, 0, sizeof d);
    memset(&sd, 0, sizeof sd);
    d.ignore_eos = true;
    d.max_new_tokens = NEW;
    CHECK(ptst_generate(w.c, m, NULL, w.tokenizer, w.prompts, 1, &d, &a) == PTST_OK);
    CHECK(ptst_encode(w.c, w.tokenizer, (const char *)w.prompts[0].text.data,
                      w.prompts[0].text.size, PTST_ADD_SPECIAL, &row) == PTST_OK);
    prompt = row.count;
    CHECK(a.ids.count == NEW && a.prompt_tokens == prompt && prompt < OLD && prompt + NEW > OLD + 5);
    sd.capacity = 96;
    s = ptst_session_new(w.c, m, NULL, &sd);
    for (i = 0; i < a.ids.count; i++) {
        ptst_chunk h = {0, row.data, row.count, PTST_LOGITS_LAST};
        CHECK(ptst_session_reset(w.c, s, 0, -1) == PTST_OK && ptst_eval(w.c, s, &h, 1) == PTST_OK);
        CHECK(ptst__sample_greedy(ptst_logits(s, 0), 260) == a.ids.data[i]);
        CHECK(ptst_ids_append(w.c, &row, a.ids.data[i]) == PTST_OK);
    }
    ptst_session_free(w.c, s);
    ptst_ids_free(w.c, &row);
    ptst_answers_free(w.c, &a, 1);
    ptst_model_free(w.c, m);
    gen_close(&w);
}

static void generate_ends(void) {
    gen_world w;
    ptst_generate_desc d;
    ptst_answer a[GEN_PROMPTS];
    int32_t stop;
    size_t i;
    gen_open(&w, 1);
    memset(a, 0, sizeof a);
    memset(&d, 0, sizeof d);
    d.ignore_eos = true;
    d.capacity = 96;
    CHECK(ptst_generate(w.c, w.model, NULL, w.tokenizer, w.prompts, GEN_PROMPTS, &d, a) == PTST_OK);
    for (i = 0; i < GEN_PROMPTS; i++) { /* 512 are wanted, there is room for 96 in all */
        CHECK(a[i].prompt_tokens + a[i].ids.count == 96 && a[i].finish == PTST_FINISH_LENGTH);
    }
    d.capacity = 40;
    d.max_new_tokens = 3;
    CHECK(ptst_generate(w.c, w.model, NULL, w.tokenizer, w.prompts, GEN_PROMPTS, &d, a) == PTST_OK);
    for (i = 0; i < GEN_PROMPTS; i++) {
        CHECK(a[i].ids.count == 3 && a[i].finish == PTST_FINISH_LENGTH);
    }
    stop = a[0].ids.data[1];
    d.stop_ids = &stop;
    d.stop_ids_count = 1;
    CHECK(ptst_generate(w.c, w.model, NULL, w.tokenizer, w.prompts, 1, &d, a) == PTST_OK);
    CHECK(a[0].ids.count <= 2 && a[0].finish == PTST_FINISH_EOS);
    d.capacity = 20; /* prompts of 21 tokens and more */
    CHECK(ptst_generate(w.c, w.model, NULL, w.tokenizer, w.prompts, GEN_PROMPTS, &d, a) ==
          PTST_ERR_LIMIT);
    CHECK(ptst_generate(w.c, w.model, NULL, w.tokenizer, w.prompts, 0, NULL, a) == PTST_OK);
    d.capacity = 0;
    d.max_new_tokens = 120; /* beyond the 96 positions the model was made for */
    d.stop_ids_count = 0;
    CHECK(ptst_generate(w.c, w.model, NULL, w.tokenizer, w.prompts, 1, &d, a) == PTST_OK);
    CHECK(a[0].ids.count == 120);
    d.max_new_tokens = SIZE_MAX;
    CHECK(ptst_generate(w.c, w.model, NULL, w.tokenizer, w.prompts, 1, &d, a) == PTST_ERR_LIMIT);
    d.max_new_tokens = 3;
    d.sample.temperature = -1;
    CHECK(ptst_generate(w.c, w.model, NULL, w.tokenizer, w.prompts, 1, &d, a) == PTST_ERR_ARGUMENT);
    d.sample.temperature = 1;
    d.sample.top_p = 1.5;
    CHECK(ptst_generate(w.c, w.model, NULL, w.tokenizer, w.prompts, 1, &d, a) == PTST_ERR_ARGUMENT);
    ptst_answers_free(w.c, a, GEN_PROMPTS);
    gen_close(&w);
}

static void generate_stopped(void) {
    gen_world w;
    gen_watch watch;
    ptst_generate_desc d;
    ptst_answer a[GEN_PROMPTS];
    size_t i, finished = 0, begun = 0;
    gen_open(&w, 1);
    memset(a, 0, sizeof a);
    memset(&d, 0, sizeof d);
    memset(&watch, 0, sizeof watch);
    watch.stop_after = 5;
    w.c->desc.progress = gen_progress;
    w.c->desc.user = &watch;
    d.ignore_eos = true;
    d.max_new_tokens = 4;
    d.batch = 3;
    CHECK(ptst_generate(w.c, w.model, NULL, w.tokenizer, w.prompts, GEN_PROMPTS, &d, a) ==
          PTST_ERR_STOPPED);
    for (i = 0; i < GEN_PROMPTS; i++) { /* five rounds: 3 answers of 4 tokens, 3 of 1 */
        finished += a[i].finish == PTST_FINISH_LENGTH;
        begun += a[i].ids.count == 1;
    }
    CHECK(finished == 3 && begun == 3);
    ptst_answers_free(w.c, a, GEN_PROMPTS);
    gen_close(&w);
}

static ptst_code gen_memory_work(ptst_ctx *c, void *arg) {
    gen_world w;
    gen_watch watch;
    ptst_generate_desc d;
    ptst_answer a[3];
    ptst_code code = PTST_ERR_MEMORY;
    static const char *const stop = "zz";
    (void)arg;
    memset(a, 0, sizeof a);
    memset(&d, 0, sizeof d);
    memset(&watch, 0, sizeof watch);
    gen_open_on(&w, c);
    if (w.model != NULL && w.tokenizer != NULL && w.prompts[2].text.data != NULL) {
        d.max_new_tokens = 4;
        d.sample.temperature = 1;
        d.sample.top_p = 0.9;
        d.stop_strings = &stop;
        d.stop_strings_count = 1;
        code = ptst_generate(c, w.model, NULL, w.tokenizer, w.prompts, 3, &d, a);
    }
    ptst_answers_free(c, a, 3);
    gen_close_on(&w);
    return code;
}

/* Each measure against a plain computation from full passes over prompt and answer. */
static double gen_log_p(gen_world *w, const ptst_adapter *a, const ptst_ids *ids, size_t at,
                        int32_t id, float *logits) {
    ptst_session_desc d;
    ptst_session *s;
    ptst_chunk chunk;
    double sum = 0;
    size_t i;
    memset(&d, 0, sizeof d);
    d.capacity = 96;
    s = ptst_session_new(w->c, w->model, a, &d);
    chunk.slot = 0;
    chunk.tokens = ids->data;
    chunk.count = at;
    chunk.logits = PTST_LOGITS_LAST;
    CHECK(s != NULL && ptst_eval(w->c, s, &chunk, 1) == PTST_OK);
    memcpy(logits, ptst_logits(s, 0), 260 * sizeof *logits);
    for (i = 0; i < 260; i++) {
        sum += exp(logits[i]);
    }
    ptst_session_free(w->c, s);
    return id < 0 ? log(sum) : logits[id] - log(sum);
}

static void generate_probe(void) {
    static const char *const refusals[] = {"No", "Nothing", "Nay"};
    static const size_t prefilled[] = {0, 2, 4, 3};
    gen_world w;
    ptst_lora_desc lora;
    ptst_adapter *a;
    ptst_probe_desc d;
    ptst_probed p, q;
    ptst_generate_desc g;
    ptst_answer old;
    ptst_ids ids = {NULL, 0, 0};
    float x[260], y[260];
    double first, no, nay;
    size_t i, k, n;
    gen_open(&w, 1);
    memset(&lora, 0, sizeof lora);
    memset(&d, 0, sizeof d);
    memset(&p, 0, sizeof p);
    memset(&q, 0, sizeof q);
    memset(&g, 0, sizeof g);
    memset(&old, 0, sizeof old);
    a = ptst_adapter_new(w.c, w.model, &lora);
    for (i = 0; i < a->values_count; i++) { /* B would be 0 */
        a->values[i] += 0.05f * (float)((int)(i % 7) - 3);
    }
    d.refusals = refusals;
    d.refusals_count = 3;
    d.positions = 6;
    d.prefill = "Sir";
    d.prefilled = prefilled;
    d.prefilled_count = 4;
    d.max_new_tokens = 5;
    CHECK(ptst_probe(w.c, w.model, a, NULL, w.tokenizer, &w.prompts[1], &d, &p) == PTST_OK);
    CHECK(ptst_encode(w.c, w.tokenizer, w.prompts[1].text.data, w.prompts[1].text.size,
                      PTST_ADD_SPECIAL, &ids) == PTST_OK);
    n = ids.count;
    /* N is byte 78 and token 81; a first token that is a blank does not count */
    first = gen_log_p(&w, a, &ids, n, 'N' + 3, x);
    CHECK_NEAR(p.log_odds[0], log(exp(first) + 1e-8) - log(1 - exp(first) + 1e-8), 1e-4);
    CHECK(ptst_ids_append(w.c, &ids, 'N' + 3) == PTST_OK);
    no = gen_log_p(&w, a, &ids, n + 1, 'o' + 3, x);
    nay = gen_log_p(&w, a, &ids, n + 1, 'a' + 3, x);
    CHECK(ptst_ids_append(w.c, &ids, 'a' + 3) == PTST_OK);
    nay += gen_log_p(&w, a, &ids, n + 2, 'y' + 3, x);
    /* "Nothing" begins with "No": once. Float logits of two ways of computing them */
    CHECK_NEAR(p.refusal[0], exp(first) * (exp(no) + exp(nay)), 1e-4 * p.refusal[0]);
    ids.count = n;
    g.max_new_tokens = 6;
    CHECK(ptst_generate(w.c, w.model, NULL, w.tokenizer, &w.prompts[1], 1, &g, &old) == PTST_OK);
    CHECK(p.divergence_count == old.ids.count && old.ids.count > 1);
    for (i = 0; i < p.divergence_count; i++) {
        double za = gen_log_p(&w, a, &ids, n + i, -1, x), zb = gen_log_p(&w, NULL, &ids, n + i, -1, y);
        double sum = 0;
        for (k = 0; k < 260; k++) {
            sum += exp(x[k] - za) * (x[k] - za - y[k] + zb);
        }
        CHECK(sum > 1e-4);
        CHECK_NEAR(p.divergence[i], sum, 1e-4 * sum + 1e-6);
        CHECK(ptst_ids_append(w.c, &ids, old.ids.data[i]) == PTST_OK);
    }
    CHECK(p.answered[0] && p.answered[1] && p.answered[3] && !p.answered[2]); /* 3 tokens */
    CHECK(p.answers[1].size >= 2 && memcmp(p.answers[1].data, "Si", 2) == 0);
    CHECK(p.answers[3].size >= 3 && memcmp(p.answers[3].data, "Sir", 3) == 0);
    g.max_new_tokens = 5;
    CHECK(ptst_generate(w.c, w.model, a, w.tokenizer, &w.prompts[1], 1, &g, &old) == PTST_OK);
    CHECK_TEXT(p.answers[0].data, old.text.data);
    d.prefill = NULL; /* the model's own answer, the same adapter twice: goes on as it would */
    CHECK(ptst_probe(w.c, w.model, a, a, w.tokenizer, &w.prompts[1], &d, &q) == PTST_OK);
    for (i = 0; i < q.divergence_count; i++) {
        CHECK(q.divergence[i] == 0);
    }
    CHECK(q.log_odds[0] == q.log_odds[1] && q.refusal[0] == q.refusal[1]);
    CHECK(q.log_odds[0] == p.log_odds[0] && q.log_odds[1] != p.log_odds[1]);
    CHECK(q.answered[1] && strncmp(q.answers[1].data, q.answers[0].data, q.answers[0].size) == 0);
    d.positions = PTST_PROBE_MAX + 1;
    CHECK(ptst_probe(w.c, w.model, a, a, w.tokenizer, &w.prompts[1], &d, &q) == PTST_ERR_ARGUMENT);
    for (i = 0; ptst_probe_refusal(i) != NULL; i++) {
        CHECK(ptst_refusal("ptst", ptst_probe_refusal(i), strlen(ptst_probe_refusal(i))) == 1);
    }
    ptst_probed_free(w.c, &p);
    ptst_probed_free(w.c, &q);
    ptst_answers_free(w.c, &old, 1);
    ptst_ids_free(w.c, &ids);
    ptst_adapter_free(w.c, a);
    gen_close(&w);
}

static ptst_code gen_probe_work(ptst_ctx *c, void *arg) {
    static const size_t prefilled[] = {0, 1};
    gen_world w;
    ptst_probe_desc d;
    ptst_probed p;
    ptst_code code = PTST_ERR_MEMORY;
    (void)arg;
    memset(&d, 0, sizeof d);
    memset(&p, 0, sizeof p);
    d.prefill = "a";
    d.prefilled = prefilled;
    d.prefilled_count = 2;
    d.max_new_tokens = 3;
    d.positions = 2;
    gen_open_on(&w, c);
    if (w.model != NULL && w.tokenizer != NULL && w.prompts[2].text.data != NULL) {
        code = ptst_probe(c, w.model, NULL, NULL, w.tokenizer, &w.prompts[2], &d, &p);
    }
    ptst_probed_free(c, &p);
    gen_close_on(&w);
    return code;
}

static void generate_probe_memory(void) {
    gen_world w;
    gen_open(&w, 1);
    test_memory_sweep(gen_probe_work, NULL);
    gen_close(&w);
}

/* Bytes for all prompts, `batch` at a time. */
static size_t gen_plan_bytes(ptst_ctx *c, const gen_world *w, size_t fresh, size_t batch) {
    ptst_generate_desc d;
    ptst_generate_needs plan;
    memset(&d, 0, sizeof d);
    d.max_new_tokens = fresh;
    d.batch = batch;
    CHECK(ptst_generate_plan(c, w->model, NULL, w->tokenizer, w->prompts, GEN_PROMPTS, &d, &plan) ==
          PTST_OK);
    return plan.bytes;
}

/* Sets the first weight of row `row` of the head. */
static void gen_head(const gen_world *w, size_t row, float x) {
    float *head = (float *)(uintptr_t)w->model->head->data;
    head[row * (size_t)ptst_model_config(w->model)->hidden_size] = x;
}

/* One logit that is not finite is an error, greedy or not; of equal ones the first is taken. */
static void generate_not_finite(void) {
    const float bad[3] = {NAN, INFINITY, -INFINITY};
    ptst_generate_desc d;
    ptst_answer a[GEN_PROMPTS];
    gen_world w;
    size_t i, k, n;
    gen_open(&w, 2);
    memset(a, 0, sizeof a);
    memset(&d, 0, sizeof d);
    d.max_new_tokens = 3;
    d.ignore_eos = true;
    for (k = 0; k < 6; k++) {
        d.sample.temperature = k < 3 ? 0 : 1;
        gen_head(&w, 259, bad[k % 3]); /* the last row */
        CHECK(ptst_generate(w.c, w.model, NULL, w.tokenizer, w.prompts, GEN_PROMPTS, &d, a) ==
              PTST_ERR_NUMERIC);
        CHECK(strstr(ptst_error_text(w.c), "prompt 1: after 0 tokens") != NULL);
    }
    n = (size_t)ptst_model_config(w.model)->hidden_size * sizeof(float);
    for (i = 1; i < 260; i++) { /* all rows the same */
        memcpy((float *)(uintptr_t)w.model->head->data + i * n / sizeof(float),
               w.model->head->data, n);
    }
    d.sample.temperature = 0;
    CHECK(ptst_generate(w.c, w.model, NULL, w.tokenizer, w.prompts, GEN_PROMPTS, &d, a) == PTST_OK);
    for (i = 0; i < GEN_PROMPTS; i++) {
        CHECK(a[i].ids.count == 3 && a[i].ids.data[0] == 0 && a[i].ids.data[2] == 0);
    }
    ptst_answers_free(w.c, a, GEN_PROMPTS);
    gen_close(&w);
}

/* If nobody says how many answers at a time: all while they are short, fewer than all but as many
   as 512 MB hold when they are long, one when even that is larger. */
static void generate_batch(void) {
    gen_world w;
    ptst_ctx *c = test_open(1, NULL);
    size_t some, two;
    tiny_begin();
    tiny_write_tokenizer(c, tiny_folder);
    gen_open_on(&w, c);
    CHECK(gen_plan_bytes(c, &w, 9, 0) == gen_plan_bytes(c, &w, 9, GEN_PROMPTS));
    some = gen_plan_bytes(c, &w, 600000, 0);
    two = gen_plan_bytes(c, &w, 600000, 2);
    CHECK((double)(some - gen_plan_bytes(c, &w, 600000, 1)) < 512e6);
    CHECK(some >= two && some < gen_plan_bytes(c, &w, 600000, GEN_PROMPTS));
    CHECK(gen_plan_bytes(c, &w, 20000000, 0) == gen_plan_bytes(c, &w, 20000000, 1));
    gen_close_on(&w);
    ptst_close(c);
    tiny_end();
}

/* A plan against what is then taken and made. Answers and their growing texts are the caller's, the
   arena has a chunk of 64 KB. */
static void generate_plans(void) {
    gen_world w;
    test_memory m;
    ptst_ctx *c = test_open_counted(&m);
    ptst_answer a[GEN_PROMPTS];
    ptst_generate_desc d;
    ptst_generate_needs plan;
    size_t i, n, before, prompt, answer;
    double pairs, layers = 2 * (24 * 24 * 2 + 24 * 12 * 2 + 3 * 24 * 40);
    tiny_begin();
    tiny_write_tokenizer(c, tiny_folder);
    gen_open_on(&w, c);
    memset(&d, 0, sizeof d);
    CHECK(ptst_generate_plan(c, w.model, NULL, w.tokenizer, w.prompts, 1, &d, &plan) == PTST_OK);
    for (n = 0; n < 4; n++) { /* from here on the context has its table of words */
        memset(a, 0, sizeof a);
        memset(&d, 0, sizeof d);
        d.max_new_tokens = 9;
        d.batch = n == 1 ? 2 : 0;
        d.no_prefix = n == 2;
        d.capacity = n == 3 ? 38 : 0;
        d.sample.temperature = n == 3 ? 1 : 0;
        d.ignore_eos = true;
        before = m.bytes;
        CHECK(ptst_generate_plan(c, w.model, NULL, w.tokenizer, w.prompts, GEN_PROMPTS, &d,
                                 &plan) == PTST_OK);
        CHECK(m.bytes == before);
        m.peak = before;
        CHECK(ptst_generate(c, w.model, NULL, w.tokenizer, w.prompts, GEN_PROMPTS, &d, a) ==
              PTST_OK);
        CHECK_NEAR((double)plan.bytes, (double)(m.peak - before), 70000);
        CHECK(plan.bytes > 140000); /* so that the bound above says something */
        prompt = answer = 0;
        pairs = 0;
        for (i = 0; i < GEN_PROMPTS; i++) {
            double end = (double)(a[i].prompt_tokens + a[i].ids.count);
            prompt += a[i].prompt_tokens;
            answer += a[i].ids.count;
            pairs += end * (end - 1) / 2;
        }
        CHECK(plan.prompt_tokens == prompt && plan.answer_tokens == answer);
        /* <s> and "The common head: " is in all; the fifth prompt keeps its last blank */
        CHECK(plan.computed == prompt - (n == 2 ? 0 : 6 * 17));
        pairs -= n == 2 ? 0 : 6 * 17 * 18 / 2;
        CHECK_NEAR(plan.flops,
                   2 * (layers * (double)(plan.computed + answer - 7) + 6240.0 * (double)answer) +
                       2 * 4 * 24 * pairs,
                   1);
        ptst_answers_free(c, a, GEN_PROMPTS);
    }
    d.capacity = 3;
    CHECK(ptst_generate_plan(c, w.model, NULL, w.tokenizer, w.prompts, GEN_PROMPTS, &d, &plan) ==
          PTST_ERR_LIMIT);
    gen_close_on(&w);
    ptst_close(c);
    tiny_end();
}

static void generate_memory(void) {
    gen_world w;
    gen_open(&w, 1);
    test_memory_sweep(gen_memory_work, NULL);
    gen_close(&w);
}

/* The answers of transformers on real weights: greedy, with and without a repetition penalty, nine
   prompts at a time in three slots. */
static void generate_stories(void) {
    ptst_ctx *c = test_open(2, NULL);
    ptst_model *m = ptst_model_load(c, "tests/golden/stories260K", PTST_DTYPE_FILE);
    ptst_tokenizer *t = ptst_tokenizer_load(c, "tests/golden/stories260K");
    ptst_json *j = ptst_json_load(c, "tests/golden/generate.json");
    int32_t at = j == NULL ? -1 : ptst_json_first(j, 0), ids;
    size_t group, i, k;
    CHECK(m != NULL && t != NULL && j != NULL && ptst_json_size(j, 0) == 18);
    for (group = 0; group < 2 && m != NULL && t != NULL; group++) {
        ptst_prompt prompts[9];
        ptst_answer a[9];
        ptst_generate_desc d;
        int32_t row = at;
        memset(prompts, 0, sizeof prompts);
        memset(a, 0, sizeof a);
        memset(&d, 0, sizeof d);
        d.max_new_tokens = 60;
        d.batch = 3;
        d.sample.repetition_penalty = ptst_json_number(j, ptst_json_get(j, at, "penalty"), 0);
        for (i = 0; i < 9; i++, row = ptst_json_next(j, row)) {
            const char *text = ptst_json_string(j, ptst_json_get(j, row, "prompt"), NULL);
            CHECK(ptst_text_append(c, &prompts[i].text, text, strlen(text)) == PTST_OK);
        }
        CHECK(ptst_generate(c, m, NULL, t, prompts, 9, &d, a) == PTST_OK);
        for (i = 0; i < 9; i++, at = ptst_json_next(j, at)) {
            ids = ptst_json_get(j, at, "ids");
            CHECK((double)a[i].prompt_tokens ==
                  ptst_json_number(j, ptst_json_get(j, at, "prompt_tokens"), 0));
            CHECK(a[i].ids.count == ptst_json_size(j, ids));
            for (k = 0; k < a[i].ids.count; k++) {
                CHECK(a[i].ids.data[k] ==
                      (int32_t)ptst_json_number(j, ptst_json_at(j, ids, k), -1));
            }
            CHECK_TEXT(a[i].text.data, ptst_json_string(j, ptst_json_get(j, at, "text"), NULL));
            ptst_text_free(c, &prompts[i].text);
        }
        ptst_answers_free(c, a, 9);
    }
    ptst_json_free(c, j);
    ptst_tokenizer_free(c, t);
    ptst_model_free(c, m);
    ptst_close(c);
}

static void suite_generate(void) {
    RUN(sample_greedy);
    RUN(sample_penalty);
    RUN(sample_golden);
    RUN(sample_hostile);
    RUN(generate_company);
    RUN(generate_stream);
    RUN(generate_switches);
    RUN(generate_ends);
    RUN(generate_stopped);
    RUN(generate_probe);
    RUN(generate_probe_memory);
    RUN(generate_not_finite);
    RUN(generate_batch);
    RUN(generate_plans);
    RUN(generate_memory);
    RUN(generate_stories);
}

MAIN(generate)
