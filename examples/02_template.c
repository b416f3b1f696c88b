/* 02_template.c - one question under every template of the paper.

       cc -O2 examples/02_template.c -o template -lm -pthread
       ./template "What is 2 + 2?"

   The templates differ only in what stands around the question; gsm:chat:llama (CL) carries the
   safety prompt. Which one is used for training, and which one in use, is what the experiment is
   about. */
#define PTST_IMPLEMENTATION
#include "../ptst.h"

int main(int argc, char **argv) {
    const char *question = argc > 1 ? argv[1] : "What is 2 + 2?", *name, *short_name, *text;
    ptst_prompt prompt;
    ptst_ctx *c;
    size_t i;
    int failed = 0;
    memset(&prompt, 0, sizeof prompt);
    if (ptst_open(NULL, &c) != PTST_OK) {
        return 1;
    }
    for (i = 0; !failed && (name = ptst_template_at(i, &short_name, &text)) != NULL; i++) {
        ptst_template *t;
        if (text == NULL) {
            continue; /* model:... needs a model's chat template */
        }
        t = ptst_template_load(c, name, NULL);
        if (t != NULL &&
            ptst_template_prompt(c, t, question, strlen(question), &prompt) == PTST_OK) {
            printf("---- %s%s%s\n%s\n", name, short_name == NULL ? "" : " = ",
                   short_name == NULL ? "" : short_name, prompt.text.data);
        } else {
            fprintf(stderr, "%s\n", ptst_error_text(c));
            failed = 1;
        }
        ptst_template_free(c, t);
    }
    ptst_prompt_free(c, &prompt);
    ptst_close(c);
    return failed;
}
