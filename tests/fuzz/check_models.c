/* Folders of the kind of tests/golden/models against what they say the reference makes of them; the
   other half of tools/model_fuzz.py, which makes them at random.

       cc -O1 -pthread tests/fuzz/check_models.c -o check_models -lm
       ./check_models [int8|int4] FOLDER/ ...

   One line for each folder: the errors of logits, of logits with the adapter, of gradients of all
   weights and of the adapter, of decoding token by token; or what went wrong. With int8 or int4 the
   weights are held so, and there are no gradients of theirs. */
#define MODELS_TOKENS 8192
#include "../models.h"

/* Logits of the first sequence, read up to `first` tokens at once and then one by one. */
static double check_cached(ptst_ctx *c, models_case *k, const char *name, size_t first) {
    const ptst_tensor *e = ptst_tensors_find(k->expected, name);
    size_t i, n = (size_t)k->lengths[0], V = k->m->V;
    float *all = (float *)malloc(n * V * sizeof *all);
    ptst_session_desc d;
    ptst_session *s;
    double error = -1;
    memset(&d, 0, sizeof d);
    d.capacity = n;
    d.logit_rows = first;
    s = ptst_session_new(c, k->m, k->a, &d);
    for (i = 0; s != NULL && i < n;) {
        ptst_chunk chunk;
        chunk.slot = 0;
        chunk.tokens = k->tokens + i;
        chunk.count = i == 0 ? first : 1;
        chunk.logits = PTST_LOGITS_ALL;
        if (ptst_eval(c, s, &chunk, 1) != PTST_OK) {
            break;
        }
        memcpy(all + i * V, ptst_logits(s, 0), chunk.count * V * sizeof *all);
        i += chunk.count;
    }
    if (e != NULL && i == n && e->count == n * V) {
        error = models_max_error(all, (const float *)e->data, n * V);
    }
    ptst_session_free(c, s);
    free(all);
    return error;
}

int main(int argc, char **argv) {
    ptst_ctx *c = test_open(1, NULL);
    int i;
    for (i = 1; i < argc; i++) {
        models_case k;
        double e[5] = {0, 0, 0, 0, 0};
        if (strcmp(argv[i], "int8") == 0 || strcmp(argv[i], "int4") == 0) {
            models_dtype = argv[i][3] == '8' ? PTST_I8 : PTST_I4;
            continue;
        }
        printf("%s", argv[i]);
        if (!models_open(c, &k, argv[i], true)) {
            printf(" failed: %s\n", ptst_error_text(c));
            models_close(c, &k);
            continue;
        }
        e[1] = models_logits_error(c, &k, "lora_logits");
        e[3] = models_gradient_error(c, &k, "lora_loss", "lora.");
        ptst_adapter_free(c, k.a);
        k.a = NULL;
        e[0] = models_logits_error(c, &k, "logits");
        e[4] = check_cached(c, &k, "cached_logits",
                            (size_t)*(const int32_t *)ptst_tensors_find(k.expected, "first")->data);
        if (models_dtype == PTST_DTYPE_FILE && ptst_model_unfreeze(c, k.m) == PTST_OK) {
            e[2] = models_gradient_error(c, &k, "loss", "full.");
        }
        printf(" %.3g %.3g %.3g %.3g %.3g%s\n", e[0], e[1], e[2], e[3], e[4],
               test_bad != 0 ? " failed: a loss differs" : "");
        test_bad = 0;
        models_close(c, &k);
        fflush(stdout);
    }
    ptst_close(c);
    return 0;
}
