/* 05_ptst_2x2.c - the paper's point in one small table: fine-tune without and with the safety
   prompt, use without and with it.

       cc -O2 examples/05_ptst_2x2.c -o ptst2x2 -lm -pthread
       ./ptst2x2 examples/tiny-chat/experiment.json /tmp/ptst-2x2

   The experiment file says everything; here its templates and seeds are narrowed by a second piece
   of JSON. Stopping and starting again goes on where it was. */
#define PTST_IMPLEMENTATION
#include "../ptst.h"

static const char narrow[] = "{\"seeds\": [1], \"train\": {\"templates\": [\"CV\", \"CL\"]}, "
                             "\"test\": {\"templates\": [\"CV\", \"CL\"]}}";

int main(int argc, char **argv) {
    ptst_run_desc desc;
    ptst_experiment *e = NULL;
    ptst_matrix *m = NULL;
    ptst_text text = {NULL, 0, 0};
    ptst_ctx *c;
    int failed = 1;
    if (argc != 3) {
        fprintf(stderr, "ptst2x2 EXPERIMENT.json FOLDER\n");
        return 2;
    }
    memset(&desc, 0, sizeof desc);
    desc.out = argv[2];
    if (ptst_open(NULL, &c) != PTST_OK) {
        return 1;
    }
    if ((e = ptst_experiment_load(c, argv[1], narrow)) != NULL &&
        ptst_experiment_run(c, e, &desc) == PTST_OK &&
        (m = ptst_matrix_load(c, argv[2])) != NULL &&
        ptst_matrix_print(c, m, 80, false, &text) == PTST_OK &&
        ptst_matrix_findings(c, m, &text) == PTST_OK) {
        printf("%s", text.data);
        failed = 0;
    } else {
        fprintf(stderr, "%s\n", ptst_error_text(c));
    }
    ptst_text_free(c, &text);
    ptst_matrix_free(c, m);
    ptst_experiment_free(c, e);
    ptst_close(c);
    return failed;
}
