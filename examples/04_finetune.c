/* 04_finetune.c - fine-tunes a model with LoRA on a file of questions and answers.

       cc -O2 examples/04_finetune.c -o finetune -lm -pthread
       ./finetune examples/tiny-chat examples/tiny-chat/task-train.jsonl CV /tmp/adapter

   The adapter folder opens in PEFT. Rows that the program is killed in the middle of are not lost:
   with `resume` the next run goes on from the last checkpoint, bit by bit. */
#define PTST_IMPLEMENTATION
#include "../ptst.h"

static void show(void *user, const ptst_step *s) {
    (void)user;
    if (s->step % 10 == 0) {
        printf("step %llu of %llu  loss %.4f\n", (unsigned long long)s->step,
               (unsigned long long)s->steps, s->loss);
    }
}

int main(int argc, char **argv) {
    ptst_finetune_files files;
    ptst_finetune_desc desc;
    ptst_lora_desc lora;
    ptst_ctx *c;
    int failed = 0;
    if (argc != 5) {
        fprintf(stderr, "finetune MODEL ROWS TEMPLATE OUT\n");
        return 2;
    }
    memset(&files, 0, sizeof files);
    memset(&desc, 0, sizeof desc);
    memset(&lora, 0, sizeof lora);
    files.model = argv[1];
    files.train = argv[2];
    files.template_is = argv[3];
    lora.rank = 8;
    lora.alpha = 32;
    lora.targets = "all-linear";
    desc.out = argv[4];
    desc.lora = &lora;
    desc.train.lr = 1e-3;
    desc.train.batch = 16;
    desc.train.max_steps = 60;
    desc.save_every = 20;
    desc.resume = true;
    desc.on_step = show;
    if (ptst_open(NULL, &c) != PTST_OK) {
        return 1;
    }
    if (ptst_finetune_file(c, &files, &desc, NULL) != PTST_OK) {
        fprintf(stderr, "%s\n", ptst_error_text(c));
        failed = 1;
    }
    ptst_close(c);
    return failed;
}
