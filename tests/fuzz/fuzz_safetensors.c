/* Any bytes as a safetensors file: a verdict, no harm, and what is accepted lies inside the bytes.

       clang -O1 -g -fsanitize=fuzzer,address,undefined tests/fuzz/fuzz_safetensors.c -o fuzz -lm \
             -pthread && ./fuzz -max_len=4096                            (from the top folder)

   Inputs begin with the header: the length field is put before them, so that changes get past it. */
#define PTST_IMPLEMENTATION
#include "../../ptst.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    const uint8_t *end = size == 0 ? NULL : (const uint8_t *)memchr(data, '\n', size);
    size_t header = end == NULL ? size : (size_t)(end - data), i, k;
    uint8_t *file = (uint8_t *)malloc(size + 8);
    static ptst_ctx *c; /* for all runs: opening one takes longer than a run */
    volatile uint8_t sum = 0;
    ptst_desc desc;
    ptst_tensors *t;
    memset(&desc, 0, sizeof desc);
    desc.threads = 1;
    if (c == NULL && ptst_open(&desc, &c) != PTST_OK) {
        return 0;
    }
    for (i = 0; i < 8; i++) {
        file[i] = (uint8_t)((uint64_t)header >> (8 * i));
    }
    if (size != 0) {
        memcpy(file + 8, data, size);
    }
    t = ptst_tensors_parse(c, file, size + 8, "fuzz");
    for (i = 0; t != NULL && i < ptst_tensors_count(t); i++) {
        const ptst_tensor *v = ptst_tensors_at(t, i);
        for (k = 0; k < v->bytes; k++) {
            sum = (uint8_t)(sum + ((const uint8_t *)v->data)[k]);
        }
        if (ptst_tensors_find(t, v->name) != v) {
            abort();
        }
    }
    ptst_tensors_close(c, t);
    free(file);
    return 0;
}
