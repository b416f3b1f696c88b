/* 03_generate.c - a model answers a question; the text comes as it is written.

       cc -O2 examples/03_generate.c -o generate -lm -pthread
       ./generate examples/tiny-chat CL "What does a hammer cost?" [ADAPTER]

   Any Hugging Face folder will do (see `ptst info FOLDER`). The second argument is a template: a
   name of the paper's, or model:none for the model's own chat template. */
#define PTST_IMPLEMENTATION
#include "../ptst.h"

static void show(void *user, size_t index, const char *text, size_t size) {
    (void)user;
    (void)index;
    fwrite(text, 1, size, stdout);
    fflush(stdout);
}

int main(int argc, char **argv) {
    ptst_generate_desc desc;
    ptst_prompt prompt;
    ptst_answer answer;
    ptst_model *m = NULL;
    ptst_tokenizer *t = NULL;
    ptst_template *tpl = NULL;
    ptst_adapter *a = NULL;
    ptst_ctx *c;
    int failed = 1;
    memset(&desc, 0, sizeof desc);
    memset(&prompt, 0, sizeof prompt);
    memset(&answer, 0, sizeof answer);
    if (argc < 4) {
        fprintf(stderr, "generate MODEL TEMPLATE QUESTION [ADAPTER]\n");
        return 2;
    }
    if (ptst_open(NULL, &c) != PTST_OK) {
        return 1;
    }
    desc.max_new_tokens = 200;
    desc.on_text = show;
    if ((m = ptst_model_load(c, argv[1], PTST_DTYPE_FILE)) != NULL &&
        (t = ptst_tokenizer_load(c, argv[1])) != NULL &&
        (tpl = ptst_template_load(c, argv[2], argv[1])) != NULL &&
        (argc < 5 || (a = ptst_adapter_load(c, m, argv[4])) != NULL) &&
        ptst_template_prompt(c, tpl, argv[3], strlen(argv[3]), &prompt) == PTST_OK &&
        ptst_generate(c, m, a, t, &prompt, 1, &desc, &answer) == PTST_OK) {
        printf("\n");
        failed = 0;
    } else {
        fprintf(stderr, "%s\n", ptst_error_text(c));
    }
    ptst_answers_free(c, &answer, 1);
    ptst_prompt_free(c, &prompt);
    ptst_adapter_free(c, a);
    ptst_template_free(c, tpl);
    ptst_tokenizer_free(c, t);
    ptst_model_free(c, m);
    ptst_close(c);
    return failed;
}
