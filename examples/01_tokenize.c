/* 01_tokenize.c - text to token ids and back.

       cc -O2 examples/01_tokenize.c -o tokenize -lm -pthread
       ./tokenize examples/tiny-chat "How can I help?"

   Prints each id with the text of its token, then the text that the ids decode to. */
#define PTST_IMPLEMENTATION
#include "../ptst.h"

int main(int argc, char **argv) {
    ptst_ctx *c;
    ptst_tokenizer *t;
    ptst_ids ids = {NULL, 0, 0};
    ptst_text text = {NULL, 0, 0};
    size_t i;
    int failed = 1;
    if (argc != 3) {
        fprintf(stderr, "tokenize FOLDER TEXT\n");
        return 2;
    }
    if (ptst_open(NULL, &c) != PTST_OK) {
        return 1;
    }
    t = ptst_tokenizer_load(c, argv[1]);
    if (t != NULL &&
        ptst_encode(c, t, argv[2], strlen(argv[2]), PTST_ADD_SPECIAL, &ids) == PTST_OK &&
        ptst_decode(c, t, ids.data, ids.count, PTST_SKIP_SPECIAL, &text) == PTST_OK) {
        for (i = 0; i < ids.count; i++) {
            printf("%6d  %s\n", (int)ids.data[i], ptst_token_text(t, ids.data[i], NULL));
        }
        printf("%s\n", text.data);
        failed = 0;
    } else {
        fprintf(stderr, "%s\n", ptst_error_text(c));
    }
    ptst_text_free(c, &text);
    ptst_ids_free(c, &ids);
    ptst_tokenizer_free(c, t);
    ptst_close(c);
    return failed;
}
