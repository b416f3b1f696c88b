/* Any bytes as JSON, as a tokenizer.json, as a chat template, as a file of rows: a verdict and no
   harm. The first byte says which.

       clang -O1 -g -fsanitize=fuzzer,address,undefined tests/fuzz/fuzz_text.c -o fuzz -lm -pthread
       ./fuzz -max_len=8192                                        (from the top folder) */
#define PTST_IMPLEMENTATION
#include "../../ptst.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const char fuzz_context[] =
    "{\"messages\": [{\"role\": \"system\", \"content\": \"s\"}, {\"role\": \"user\", \"content\": "
    "\"hi </s> \\u00e9\"}, {\"role\": \"assistant\", \"content\": \"a\"}], \"bos_token\": \"<s>\", "
    "\"eos_token\": \"</s>\", \"tools\": [{\"name\": \"f\", \"n\": 1.5}], "
    "\"add_generation_prompt\": true}";

static void fuzz_json(ptst_ctx *c, const char *text, size_t size) {
    ptst_json *j = ptst_json_parse(c, text, size, "fuzz");
    int32_t k = ptst_json_first(j, 0);
    for (; k >= 0; k = ptst_json_next(j, k)) {
        ptst_json_string(j, k, NULL);
        ptst_json_number(j, k, 0);
    }
    ptst_json_free(c, j);
}

static void fuzz_tokenizer(ptst_ctx *c, const char *text, size_t size) {
    ptst_tokenizer *t = ptst_tokenizer_parse(c, text, size, "fuzz");
    ptst_ids ids = {NULL, 0, 0};
    ptst_text out = {NULL, 0, 0};
    if (t != NULL && ptst_encode(c, t, text, size, PTST_ADD_SPECIAL, &ids) == PTST_OK) {
        ptst_decode(c, t, ids.data, ids.count, 0, &out);
    }
    ptst_ids_free(c, &ids);
    ptst_text_free(c, &out);
    ptst_tokenizer_free(c, t);
}

static void fuzz_jinja(ptst_ctx *c, const char *text, size_t size) {
    ptst_jinja *t = ptst_jinja_compile(c, text, size, "fuzz");
    ptst_json *context = ptst_json_parse(c, fuzz_context, sizeof fuzz_context - 1, "context");
    ptst_text out = {NULL, 0, 0}, marks = {NULL, 0, 0};
    ptst_jinja_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.steps = 20000;
    if (t != NULL && context != NULL &&
        ptst_jinja_render(c, t, context, &desc, &out, &marks) == PTST_OK &&
        out.size != marks.size) {
        abort(); /* each byte has a mark */
    }
    ptst_text_free(c, &out);
    ptst_text_free(c, &marks);
    ptst_json_free(c, context);
    ptst_jinja_free(c, t);
}

static void fuzz_rows(ptst_ctx *c, const char *text, size_t size, const char *name) {
    ptst_rows *r = ptst_rows_parse(c, text, size, name, NULL);
    size_t i;
    for (i = 0; r != NULL && i < ptst_rows_count(r); i++) {
        if (ptst_rows_at(r, i)->prompt == NULL) {
            abort();
        }
    }
    ptst_rows_free(c, r);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const char *const names[] = {"rows.csv", "rows.json", "rows.jsonl", "rows.txt"};
    static ptst_ctx *c; /* for all runs: opening one takes longer than a run */
    const char *text = (const char *)data + 1;
    ptst_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.threads = 1;
    if (size == 0 || (c == NULL && ptst_open(&desc, &c) != PTST_OK)) {
        return 0;
    }
    switch (data[0] % 8) {
    case 0: fuzz_json(c, text, size - 1); break;
    case 1: fuzz_tokenizer(c, text, size - 1); break;
    case 2:
    case 3: fuzz_jinja(c, text, size - 1); break;
    default: fuzz_rows(c, text, size - 1, names[data[0] % 4]); break;
    }
    return 0;
}
