/* Any bytes as a config.json, or as a generation_config.json: a verdict that names the file, and no
   harm; what is accepted can be written and read again, and makes a model or is too large. The first
   byte says which.

       clang -O1 -g -fsanitize=fuzzer,address,undefined tests/fuzz/fuzz_config.c -o fuzz -lm -pthread
       ./fuzz -max_len=4096                                        (from the top folder) */
#define PTST_IMPLEMENTATION
#include "../../ptst.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void fuzz_model(ptst_ctx *c, const ptst_json *j) {
    ptst_text notes = {NULL, 0, 0}, text = {NULL, 0, 0};
    ptst_config g, again;
    ptst_json *k;
    if (ptst__config_parse(c, j, "fuzz", &g, &notes) != PTST_OK) {
        if (strncmp(ptst_error_text(c), "fuzz: ", 6) != 0) {
            abort();
        }
    } else {
        if (ptst__config_write(c, &g, PTST_F32, &text) != PTST_OK) {
            abort();
        }
        k = ptst_json_parse(c, text.data, text.size, "written");
        if (k == NULL || ptst__config_parse(c, k, "written", &again, &notes) != PTST_OK ||
            again.num_hidden_layers != g.num_hidden_layers || again.head_dim != g.head_dim ||
            again.sliding_window != g.sliding_window ||
            memcmp(again.sliding_layers, g.sliding_layers, sizeof g.sliding_layers) != 0) {
            fprintf(stderr, "%s\n%s\n", ptst_error_text(c), text.data);
            abort();
        }
        ptst_json_free(c, k);
        if ((int64_t)g.vocab_size * g.hidden_size < 10000 && g.intermediate_size < 1000 &&
            g.num_hidden_layers < 9 && (int64_t)g.num_attention_heads * g.head_dim < 1000) {
            ptst_model *m = ptst_model_new(c, &g, 1);
            if (m == NULL) {
                fprintf(stderr, "%s\n", ptst_error_text(c));
                abort();
            }
            ptst_model_free(c, m);
        }
    }
    ptst_text_free(c, &notes);
    ptst_text_free(c, &text);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static ptst_ctx *c; /* for all runs: opening one takes longer than a run */
    ptst_desc desc;
    ptst_json *j;
    memset(&desc, 0, sizeof desc);
    desc.threads = 1;
    if (size == 0 || (c == NULL && ptst_open(&desc, &c) != PTST_OK)) {
        return 0;
    }
    j = ptst_json_parse(c, (const char *)data + 1, size - 1, "fuzz");
    if (j != NULL && data[0] % 2 == 0) {
        fuzz_model(c, j);
    } else if (j != NULL) {
        ptst_generation_config g;
        ptst_text notes = {NULL, 0, 0};
        memset(&g, 0, sizeof g);
        (void)ptst__generation_parse(c, j, "fuzz", &g, &notes);
        ptst_text_free(c, &notes);
    }
    ptst_json_free(c, j);
    return 0;
}
