/* Tests of >>lora. Run from the top folder; see test.h. */
#include "models.h"

/* ---- parity with PEFT ---- */

static void adapter_logits_with(ptst_ctx *c) {
    models_case k;
    int i;
    for (i = 0; i < MODELS; i++) {
        CHECK(models_open(c, &k, models_names[i], true));
        CHECK_NEAR(models_logits_error(c, &k, "lora_logits"), 0, 1e-4); /* sums in float32 */
        models_close(c, &k);
    }
}

static void adapter_logits(void) { models_each_level(adapter_logits_with); }

static void adapter_gradients_with(ptst_ctx *c) {
    models_case k;
    int i;
    for (i = 0; i < MODELS; i++) {
        CHECK(models_open(c, &k, models_names[i], true));
        CHECK_NEAR(models_gradient_error(c, &k, "lora_loss", "lora."), 0, 1e-3);
        models_close(c, &k);
    }
}

static void adapter_gradients(void) { models_each_level(adapter_gradients_with); }

static void suite_lora(void) {
    RUN(adapter_logits);
    RUN(adapter_gradients);
}

MAIN(lora)
