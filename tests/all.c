/* All suites in one program, so that the implementation is compiled once (see test.h). */
#define TEST_ALL
#include "test_core.c"
#include "test_data.c"
#include "test_experiment.c"
#include "test_json.c"
#include "test_judge.c"
#include "test_kernels.c"
#include "test_lora.c"
#include "test_model.c"
#include "test_safetensors.c"
#include "test_generate.c"
#include "test_train.c"
#include "test_ops.c"
#include "test_jinja.c"
#include "test_template.c"
#include "test_tokenizer.c"

int main(int argc, char **argv) {
    test_filter = argc > 1 ? argv[1] : NULL;
    suite_core();
    suite_json();
    suite_data();
    suite_judge();
    suite_experiment();
    suite_kernels();
    suite_safetensors();
    suite_generate();
    suite_train();
    suite_ops();
    suite_model();
    suite_jinja();
    suite_lora();
    suite_template();
    suite_tokenizer();
    return test_summary();
}
