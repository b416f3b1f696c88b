/* Choosing a token against the probabilities that the reference leaves; the other half of
   tools/sample_fuzz.py, which makes the cases.

       cc -O1 -pthread tests/fuzz/check_samples.c -o check_samples -lm && ./check_samples CASES.json

   Of each draw the random number is known, and with it the token that must come of it: the one in
   whose part of [0, 1) it lies, with the parts as long as the expected probabilities and in the
   order in which the candidates were left. One line for each case: how far outside of its part the
   worst draw lies. */
#include "../test.h"

enum { SAMPLES_VOCAB = 4096, SAMPLES_DRAWS = 500 };

typedef struct samples_case {
    ptst_sample_desc d;
    size_t vocab, seen_count;
    float logits[SAMPLES_VOCAB], copy[SAMPLES_VOCAB];
    double expected[SAMPLES_VOCAB], begin[SAMPLES_VOCAB]; /* by id */
    int32_t seen[SAMPLES_VOCAB];
    ptst_candidate left[SAMPLES_VOCAB];
} samples_case;

static void samples_read(const ptst_json *j, int32_t at, samples_case *k) {
    int32_t logits = ptst_json_get(j, at, "logits"), p = ptst_json_get(j, at, "probabilities");
    int32_t seen = ptst_json_get(j, at, "seen"), x, y;
    size_t i = 0;
    k->d.temperature = ptst_json_number(j, ptst_json_get(j, at, "temperature"), 0);
    k->d.top_p = ptst_json_number(j, ptst_json_get(j, at, "top_p"), 0);
    k->d.top_k = (size_t)ptst_json_number(j, ptst_json_get(j, at, "top_k"), 0);
    k->d.repetition_penalty = ptst_json_number(j, ptst_json_get(j, at, "penalty"), 0);
    k->vocab = ptst_json_size(j, logits);
    k->seen_count = ptst_json_size(j, seen);
    CHECK(k->vocab <= SAMPLES_VOCAB && k->seen_count <= SAMPLES_VOCAB);
    for (x = ptst_json_first(j, logits), y = ptst_json_first(j, p); x >= 0; i++) {
        k->logits[i] = (float)ptst_json_number(j, x, 0);
        k->expected[i] = ptst_json_number(j, y, -1);
        x = ptst_json_next(j, x);
        y = ptst_json_next(j, y);
    }
    for (x = ptst_json_first(j, seen), i = 0; x >= 0; x = ptst_json_next(j, x)) {
        k->seen[i++] = (int32_t)ptst_json_number(j, x, -1);
    }
}

/* Where the part of each token begins: candidates are left with the best ones last if any were left
   out, else in order. */
static void samples_parts(samples_case *k) {
    bool last = k->d.top_p < 1 || (k->d.top_k != 0 && k->d.top_k < k->vocab);
    double sum = 0;
    size_t i;
    for (i = 0; i < k->vocab; i++) {
        int32_t id = k->left[last ? k->vocab - 1 - i : i].id;
        k->begin[id] = sum;
        sum += k->expected[id];
    }
}

static double samples_worst(samples_case *k, uint64_t stream) {
    ptst_rng r = {23, 0, 0};
    double worst = 0;
    int i;
    r.stream = stream;
    for (i = 0; i < SAMPLES_DRAWS; i++) {
        ptst_rng same = r;
        double u = ptst__sample_uniform(&same), out;
        int32_t id;
        memcpy(k->copy, k->logits, k->vocab * sizeof(float));
        id = ptst_sample(&k->d, k->copy, k->vocab, k->seen, k->seen_count, &r, k->left);
        if (k->d.top_p == 0 || k->d.top_k == 1) { /* nothing is drawn */
            return 1 - k->expected[id];
        }
        if (i == 0) {
            samples_parts(k);
        }
        if (k->expected[id] == 0) {
            return 1;
        }
        out = k->begin[id] - u;
        out = out > u - k->begin[id] - k->expected[id] ? out : u - k->begin[id] - k->expected[id];
        worst = out > worst ? out : worst;
    }
    return worst;
}

int main(int argc, char **argv) {
    ptst_ctx *c = test_open(1, NULL);
    ptst_json *j = argc > 1 ? ptst_json_load(c, argv[1]) : NULL;
    static samples_case k;
    uint64_t stream = 0;
    int32_t at;
    if (j == NULL) {
        fprintf(stderr, "%s\n", argc > 1 ? ptst_error_text(c) : "check_samples CASES.json");
        return 2;
    }
    for (at = ptst_json_first(j, 0); at >= 0; at = ptst_json_next(j, at)) {
        samples_read(j, at, &k);
        printf("%.3g\n", samples_worst(&k, stream++));
    }
    ptst_json_free(c, j);
    ptst_close(c);
    return test_bad != 0;
}
