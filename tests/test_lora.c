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

/* ---- writing ---- */

/* What PEFT wrote, read and written again, is the same file. */
static void written_as_peft(void) {
    ptst_ctx *c = test_open(2, NULL);
    models_folder f;
    int i;
    CHECK(models_folder_make(&f));
    for (i = 0; i < MODELS; i++) {
        models_case k;
        ptst_adapter *again;
        char path[MODELS_PATH + 40];
        CHECK(models_open(c, &k, models_names[i], true));
        CHECK(ptst_adapter_save(c, k.a, f.path, "some/model") == PTST_OK);
        snprintf(path, sizeof path, "%s/adapter/adapter_model.safetensors", k.folder);
        CHECK(models_same_file(c, path, models_file(&f, "adapter_model.safetensors")));
        again = ptst_adapter_load(c, k.m, f.path);
        CHECK(again != NULL && again->values_count == k.a->values_count);
        CHECK(again != NULL &&
              memcmp(again->values, k.a->values, again->values_count * sizeof *again->values) == 0);
        CHECK(again != NULL && again->desc.alpha == k.a->desc.alpha &&
              again->desc.rslora == k.a->desc.rslora && again->desc.rank == k.a->desc.rank);
        CHECK_TEXT(again == NULL ? NULL : again->desc.targets, k.a->desc.targets);
        ptst_adapter_free(c, again);
        models_close(c, &k);
    }
    models_folder_empty(&f, false);
    ptst_close(c);
}

/* The configuration to the byte: nothing in it that an old version of PEFT does not know. */
static void written_config(void) {
    static const char expected[] = "{\n"
                                   "  \"base_model_name_or_path\": \"a \\\"b\\\"\",\n"
                                   "  \"bias\": \"none\",\n"
                                   "  \"fan_in_fan_out\": false,\n"
                                   "  \"inference_mode\": true,\n"
                                   "  \"init_lora_weights\": true,\n"
                                   "  \"lora_alpha\": 32,\n"
                                   "  \"lora_dropout\": 0.05,\n"
                                   "  \"peft_type\": \"LORA\",\n"
                                   "  \"r\": 8,\n"
                                   "  \"target_modules\": [\n"
                                   "    \"q_proj\",\n"
                                   "    \"v_proj\"\n"
                                   "  ],\n"
                                   "  \"task_type\": \"CAUSAL_LM\",\n"
                                   "  \"use_rslora\": true\n"
                                   "}\n";
    ptst_ctx *c = test_open(1, NULL);
    ptst_config g = models_config("llama");
    ptst_model *m = ptst_model_new(c, &g, 1);
    ptst_lora_desc d;
    ptst_adapter *a;
    ptst_text text = {NULL, 0, 0};
    memset(&d, 0, sizeof d);
    d.dropout = 0.05;
    d.rslora = true;
    a = ptst_adapter_new(c, m, &d);
    CHECK(a != NULL && ptst__lora_write_config(c, a, "a \"b\"", &text) == PTST_OK);
    CHECK_TEXT(text.data, expected);
    ptst_text_free(c, &text);
    ptst_adapter_free(c, a);
    ptst_model_free(c, m);
    ptst_close(c);
}

/* ---- making ---- */

static void new_adapter(void) {
    ptst_ctx *c = test_open(2, NULL);
    ptst_config g = models_config("qwen2");
    ptst_model *m;
    ptst_adapter *a, *b;
    ptst_lora_desc d;
    const ptst__branch *q;
    double sum = 0, squares = 0, bound;
    size_t i, n;
    g.hidden_size = 400;
    m = ptst_model_new(c, &g, 1);
    a = ptst_adapter_new(c, m, NULL);
    d = ptst_adapter_about(a);
    CHECK(d.rank == 8 && d.alpha == 32 && d.dropout == 0 && !d.rslora);
    CHECK_TEXT(d.targets, "q_proj,v_proj");
    CHECK(ptst_adapter_parameters(a) == 3 * 8 * (400 + 16 + 400 + 8));
    CHECK(ptst__branch_of(a, 0, PTST__K) == NULL && ptst__branch_of(a, 2, PTST__V) != NULL);
    q = ptst__branch_of(a, 1, PTST__Q);
    CHECK(q->scale == 4 && q->in == 400 && q->out == 16);
    n = q->rank * q->in;
    bound = 1 / sqrt(400.0);
    for (i = 0; i < n; i++) {
        CHECK(fabs((double)q->A[i]) <= bound);
        sum += (double)q->A[i];
        squares += (double)q->A[i] * (double)q->A[i];
    }
    /* 3200 uniform draws: deviation of the mean bound / sqrt(3 n); of the mean square 1.6 % */
    CHECK_NEAR(sum / (double)n, 0, 5 * bound / sqrt(3.0 * (double)n));
    CHECK_NEAR(squares / (double)n, bound * bound / 3, 5 * 0.016 * bound * bound / 3);
    CHECK(models_norm(q->B, q->out * q->rank) == 0);
    b = ptst_adapter_copy(c, a);
    CHECK(memcmp(b->values, a->values, a->values_count * sizeof *a->values) == 0);
    a->values[0] += 1;
    CHECK(b->values[0] != a->values[0] && ptst__branch_of(b, 0, PTST__Q)->A == b->values);
    ptst_adapter_free(c, b);
    memset(&d, 0, sizeof d);
    b = ptst_adapter_new(c, m, &d); /* the same seed, the same adapter */
    a->values[0] = b->values[0];
    CHECK(memcmp(b->values, a->values, a->values_count * sizeof *a->values) == 0);
    ptst_adapter_free(c, b);
    d.seed = 1;
    d.rank = 4;
    d.alpha = 6;
    d.rslora = true;
    d.targets = " q_proj, v_proj,down_proj ,model.layers.1.mlp.up_proj";
    b = ptst_adapter_new(c, m, &d);
    CHECK(b != NULL && b->values[0] != a->values[0]);
    CHECK_TEXT(b == NULL ? NULL : ptst_adapter_about(b).targets,
               "q_proj,v_proj,model.layers.1.mlp.up_proj,down_proj");
    CHECK(b != NULL && ptst__branch_of(b, 0, PTST__Q)->scale == 3);
    ptst_adapter_free(c, b);
    ptst_adapter_free(c, a);
    ptst_adapter_free(c, NULL);
    ptst_model_free(c, m);
    ptst_close(c);
}

static void new_adapter_refuses(void) {
    static const char *const targets[] = {"",
                                          "lm_head",
                                          "q_proj,",
                                          "proj",
                                          "q_proj,,v_proj",
                                          "Q_proj",
                                          "embed_tokens",
                                          "model.layers.9.mlp.up_proj",
                                          ","};
    ptst_ctx *c = test_open(1, NULL);
    ptst_config g = models_config("llama");
    ptst_model *m = ptst_model_new(c, &g, 1), *other;
    ptst_adapter *a;
    ptst_lora_desc d;
    size_t i;
    for (i = 0; i < sizeof targets / sizeof targets[0]; i++) {
        memset(&d, 0, sizeof d);
        d.targets = targets[i];
        a = ptst_adapter_new(c, m, &d);
        CHECK((a != NULL) == (i == 2)); /* a comma at the end is no further target */
        CHECK(a != NULL || ptst_error_code(c) == PTST_ERR_ARGUMENT);
        ptst_adapter_free(c, a);
    }
    d.targets = "lm_head";
    CHECK(ptst_adapter_new(c, m, &d) == NULL);
    CHECK_TEXT(ptst_error_text(c),
               "target \"lm_head\": expected q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, "
               "down_proj or all-linear (phi3: qkv_proj, o_proj, gate_up_proj, down_proj)");
    memset(&d, 0, sizeof d);
    d.rank = -1;
    CHECK(ptst_adapter_new(c, m, &d) == NULL && ptst_error_code(c) == PTST_ERR_ARGUMENT);
    d.rank = 1 << 20;
    CHECK(ptst_adapter_new(c, m, &d) == NULL && ptst_error_code(c) == PTST_ERR_ARGUMENT);
    d.rank = 8;
    d.dropout = 1;
    CHECK(ptst_adapter_new(c, m, &d) == NULL && ptst_error_code(c) == PTST_ERR_ARGUMENT);
    d.dropout = 0;
    d.alpha = HUGE_VAL;
    CHECK(ptst_adapter_new(c, m, &d) == NULL && ptst_error_code(c) == PTST_ERR_ARGUMENT);
    a = ptst_adapter_new(c, m, NULL); /* for a model of another shape */
    g.num_hidden_layers = 2;
    other = ptst_model_new(c, &g, 1);
    CHECK(ptst_session_new(c, other, a, NULL) == NULL && ptst_error_code(c) == PTST_ERR_MISMATCH);
    CHECK_TEXT(ptst_error_text(c), "the adapter was made for 3 layers, the model has 2");
    ptst_model_free(c, other);
    g.num_hidden_layers = 3;
    g.hidden_size = 16;
    other = ptst_model_new(c, &g, 1);
    CHECK(ptst__pass_new(c, other, a, 4, 4, 1, false) == NULL &&
          ptst_error_code(c) == PTST_ERR_MISMATCH);
    CHECK_TEXT(ptst_error_text(c),
               "the adapter's self_attn.q_proj is for [16, 12], the model has [16, 16]");
    ptst_model_free(c, other);
    ptst_adapter_free(c, a);
    ptst_model_free(c, m);
    ptst_close(c);
}

/* ---- reading ---- */

typedef struct lora_case {
    const char *key, *value; /* added to a good configuration, where the last one of a key counts */
    ptst_code code;
    const char *sentence; /* after the path */
} lora_case;

static const lora_case lora_configs[] = {
    {"peft_type", "\"LOHA\"", PTST_ERR_UNSUPPORTED, "peft_type: only \"LORA\" is supported"},
    {"peft_type", "null", PTST_ERR_FORMAT, "peft_type: is missing, expected \"LORA\""},
    {"peft_type", "3", PTST_ERR_UNSUPPORTED, "peft_type: only \"LORA\" is supported"},
    {"r", "0", PTST_ERR_FORMAT, "r: expected a whole number from 1 to 65536"},
    {"r", "1e9", PTST_ERR_FORMAT, "r: expected a whole number from 1 to 65536"},
    {"r", "\"2\"", PTST_ERR_FORMAT, "r: expected a whole number from 1 to 65536"},
    {"r", "3", PTST_ERR_MISMATCH, NULL},
    {"lora_alpha", "\"8\"", PTST_ERR_FORMAT, "lora_alpha: expected a number from -1e+09 to 1e+09"},
    {"lora_alpha", "1e999", PTST_ERR_FORMAT, "lora_alpha: expected a number from -1e+09 to 1e+09"},
    {"lora_dropout", "2", PTST_ERR_FORMAT, "lora_dropout: expected a number from 0 to 1"},
    {"use_rslora", "1", PTST_ERR_FORMAT, "use_rslora: expected true or false"},
    {"bias", "\"all\"", PTST_ERR_UNSUPPORTED, "bias: only \"none\" is supported"},
    {"bias", "\"lora_only\"", PTST_ERR_UNSUPPORTED, "bias: only \"none\" is supported"},
    {"use_dora", "true", PTST_ERR_UNSUPPORTED, "use_dora: is switched on and not supported"},
    {"modules_to_save", "[\"score\"]", PTST_ERR_UNSUPPORTED,
     "modules_to_save: only embed_tokens and lm_head are supported"},
    {"modules_to_save", "\"lm_head\"", PTST_ERR_FORMAT,
     "modules_to_save: expected a list of names"},
    {"modules_to_save", "[\"lm_head\"], \"ensure_weight_tying\": true", PTST_ERR_UNSUPPORTED,
     "ensure_weight_tying: is switched on and not supported together with modules_to_save"},
    {"modules_to_save", "[\"model.embed_tokens\", \"lm_head\"]", PTST_ERR_MISMATCH, NULL},
    {"fan_in_fan_out", "true", PTST_ERR_UNSUPPORTED,
     "fan_in_fan_out: is switched on and not supported"},
    {"rank_pattern", "{\"q_proj\": 4}", PTST_ERR_MISMATCH, NULL},
    {"rank_pattern", "{\"q_proj\": 0}", PTST_ERR_FORMAT, "rank_pattern: expected a whole number"},
    {"rank_pattern", "[4]", PTST_ERR_FORMAT, "rank_pattern: expected an object"},
    {"rank_pattern", "{\"q(\": 4}", PTST_ERR_UNSUPPORTED, "rank_pattern: ) was expected"},
    {"alpha_pattern", "{\"q_proj\": \"4\"}", PTST_ERR_FORMAT, "alpha_pattern: expected numbers"},
    {"layers_to_transform", "[0]", PTST_ERR_MISMATCH, NULL},
    {"layers_to_transform", "7", PTST_ERR_MISMATCH, /* no such layer, so nothing is left */
     "target_modules: no linear layer is left"},
    {"layers_to_transform", "-1", PTST_ERR_FORMAT, "layers_to_transform: expected a whole number"},
    {"layers_to_transform", "[0, 1], \"layers_pattern\": \"h\"", PTST_ERR_UNSUPPORTED,
     "layers_pattern: expected \"layers\""},
    {"layers_to_transform", "1, \"target_modules\": \".*(q|v)_proj\"", PTST_ERR_FORMAT,
     "layers_to_transform: goes with target_modules as a list only"},
    {"exclude_modules", "\".*v_proj\"", PTST_ERR_MISMATCH, NULL},
    {"exclude_modules", "[\"q_proj\", \"v_proj\"]", PTST_ERR_MISMATCH,
     "target_modules: no linear layer is left"},
    {"exclude_modules", "[1]", PTST_ERR_FORMAT, "exclude_modules: expected a regular expression"},
    {"some_new_feature", "{\"a\": 1}", PTST_ERR_UNSUPPORTED,
     "some_new_feature: is switched on and not supported"},
    {"loftq_config", "{\"bits\": 4}", PTST_ERR_UNSUPPORTED,
     "loftq_config: is switched on and not supported"},
    {"lora_bias", "true", PTST_ERR_UNSUPPORTED, "lora_bias: is switched on and not supported"},
    {"init_lora_weights", "\"pissa\"", PTST_ERR_UNSUPPORTED,
     "init_lora_weights: this kind changes the weights of the model and is not supported"},
    {"target_modules", "\".*q_proj\"", PTST_ERR_MISMATCH, NULL},
    {"target_modules", "\"q_proj\"", PTST_ERR_MISMATCH, /* a string is matched as a whole */
     "target_modules: no linear layer is left"},
    {"exclude_modules", "\".*(?<=q)_proj\", \"r\": 3", PTST_ERR_MISMATCH, NULL},
    {"rank_pattern", "{\".*(?<=q)_proj\": 2}", PTST_ERR_UNSUPPORTED,
     "rank_pattern: a group of this kind is not supported"},
    {"target_modules", "null", PTST_ERR_FORMAT, "target_modules: expected q_proj, k_proj"},
    {"target_modules", "{}", PTST_ERR_FORMAT, "target_modules: expected q_proj, k_proj"},
    {"target_modules", "[]", PTST_ERR_MISMATCH, "target_modules: expected q_proj, k_proj"},
    {"target_modules", "[\"c_attn\", \"\"]", PTST_ERR_MISMATCH, "target_modules: expected q_proj"},
    {"target_modules", "[\"q_proj\", 1]", PTST_ERR_FORMAT, "target_modules: expected a list of"},
    {"target_modules", "[\"q_proj\", \"lm_head\"]", PTST_ERR_UNSUPPORTED,
     "target_modules: adapters on lm_head or embed_tokens are not supported"},
    {"target_modules", "[\"q_proj\", \"v_proj\", \"o_proj\"]", PTST_ERR_MISMATCH, NULL},
    {"target_modules", "[\"q_proj\"]", PTST_ERR_MISMATCH, NULL},
    {"target_modules", "\"all-linear\"", PTST_ERR_MISMATCH, NULL},
    /* what changes nothing */
    {"use_dora", "false", PTST_OK, NULL},
    {"lora_bias", "null", PTST_OK, NULL},
    {"rank_pattern", "{}", PTST_OK, NULL},
    {"rank_pattern", "{\"k_proj\": 4, \"q_p\": 3}", PTST_OK, NULL},
    {"alpha_pattern", "{\"o_proj\": 4.5}", PTST_OK, NULL},
    {"layers_to_transform", "[]", PTST_OK, NULL},
    {"layers_to_transform", "[0, 1, 9], \"layers_pattern\": [\"h\", \"model.layers\"]", PTST_OK,
     NULL},
    {"layers_to_transform", "[1, 0], \"layers_pattern\": \"\"", PTST_OK, NULL},
    {"target_modules", "\"All-Linear\", \"exclude_modules\": \".*[^qv]_proj\"", PTST_OK, NULL},
    /* beyond >>regex, so the tensors decide */
    {"target_modules",
     "\"\\\\bmodel\\\\.layers\\\\.[\\\\d]{1,}\\\\.(?:self_attn)\\\\.(?:q_proj|v_proj)\"", PTST_OK,
     NULL},
    {"target_modules",
     "\"(?!.*mlp).*\\\\.[qv]_proj\", \"exclude_modules\": \".*(?<=k)_proj\"", PTST_OK, NULL},
    {"init_lora_weights", "\"eva\", \"eva_config\": {\"rho\": 2.0}", PTST_OK, NULL},
    {"exclude_modules", "\"k_proj\"", PTST_OK, NULL},
    {"exclude_modules", "[\"k_proj\"]", PTST_OK, NULL},
    {"target_modules", "\"^model\\\\.layers\\\\.[0-9]+\\\\.self_attn\\\\.(q|v)_proj$\"", PTST_OK,
     NULL},
    {"some_new_feature", "null", PTST_OK, NULL},
    {"another_one", "[]", PTST_OK, NULL},
    {"megatron_core", "\"megatron.core\"", PTST_OK, NULL},
    {"qalora_group_size", "16", PTST_OK, NULL},
    {"peft_version", "\"0.99\"", PTST_OK, NULL},
    {"init_lora_weights", "\"gaussian\"", PTST_OK, NULL},
    {"init_lora_weights", "false", PTST_OK, NULL},
    {"target_modules", "[\"self_attn.q_proj\", \"v_proj\", \"c_attn\"]", PTST_OK, NULL},
};

static void config_refuses_adapter(void) {
    ptst_ctx *c = test_open(1, NULL);
    models_folder f;
    models_case k;
    size_t i;
    CHECK(models_folder_make(&f));
    CHECK(models_open(c, &k, "llama_tied", true));
    CHECK(ptst_adapter_load(c, k.m, f.path) == NULL && ptst_error_code(c) == PTST_ERR_NOT_FOUND);
    CHECK(ptst_adapter_save(c, k.a, f.path, NULL) == PTST_OK);
    for (i = 0; i < sizeof lora_configs / sizeof lora_configs[0]; i++) {
        const lora_case *t = &lora_configs[i];
        char config[500];
        const char *error;
        ptst_adapter *a;
        snprintf(config, sizeof config,
                 "{\"peft_type\": \"LORA\", \"r\": 2, \"lora_alpha\": 8, "
                 "\"target_modules\": [\"q_proj\", \"v_proj\"], \"%s\": %s}",
                 t->key, t->value);
        CHECK(ptst__write_file(c, models_file(&f, "adapter_config.json"), config, strlen(config)) ==
              PTST_OK);
        a = ptst_adapter_load(c, k.m, f.path);
        CHECK((a == NULL ? ptst_error_code(c) : PTST_OK) == t->code);
        error = strstr(ptst_error_text(c), "adapter_config.json: ");
        if (t->sentence != NULL &&
            (error == NULL || strncmp(error + 21, t->sentence, strlen(t->sentence)) != 0)) {
            CHECK_TEXT(ptst_error_text(c), t->sentence);
        }
        CHECK(a == NULL ||
              memcmp(a->values, k.a->values, a->values_count * sizeof *a->values) == 0);
        ptst_adapter_free(c, a);
    }
    CHECK(ptst__write_file(c, models_file(&f, "adapter_config.json"), "[]", 2) == PTST_OK);
    CHECK(ptst_adapter_load(c, k.m, f.path) == NULL && ptst_error_code(c) == PTST_ERR_FORMAT);
    CHECK(ptst__write_file(c, models_file(&f, "adapter_config.json"), "{", 1) == PTST_OK);
    CHECK(ptst_adapter_load(c, k.m, f.path) == NULL && ptst_error_code(c) == PTST_ERR_FORMAT);
    models_close(c, &k);
    models_folder_empty(&f, false);
    ptst_close(c);
}

/* Loads the adapter of llama_tied with its tensors changed. */
static ptst_code lora_try(ptst_ctx *c, const models_case *k, models_folder *f,
                          const ptst_tensor *list, size_t count) {
    ptst_adapter *a;
    CHECK(ptst_tensors_write(c, models_file(f, "adapter_model.safetensors"), list, count, NULL) ==
          PTST_OK);
    a = ptst_adapter_load(c, k->m, f->path);
    ptst_adapter_free(c, a);
    return a == NULL ? ptst_error_code(c) : PTST_OK;
}

static void lora_error_ends(ptst_ctx *c, const char *end) {
    const char *text = ptst_error_text(c);
    size_t n = strlen(text), m = strlen(end);
    CHECK_TEXT(n < m ? text : text + n - m, end);
}

static void tensors_refused(void) {
    ptst_ctx *c = test_open(1, NULL);
    models_folder f;
    models_case k;
    ptst_tensor list[10], *v = &list[2];
    ptst_tensors *t;
    size_t i;
    CHECK(models_folder_make(&f));
    CHECK(models_open(c, &k, "llama_tied", true));
    CHECK(ptst_adapter_save(c, k.a, f.path, NULL) == PTST_OK);
    t = ptst_tensors_open(c, models_file(&f, "adapter_model.safetensors"));
    CHECK(ptst_tensors_count(t) == 8);
    for (i = 0; i < 8; i++) {
        list[i] = *ptst_tensors_at(t, i);
    }
    CHECK(lora_try(c, &k, &f, list, 8) == PTST_OK);
    CHECK(lora_try(c, &k, &f, list, 7) == PTST_ERR_MISMATCH);
    lora_error_ends(c, "tensor base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight is "
                       "missing");
    list[8] = *v;
    list[8].name = "base_model.model.lm_head.weight";
    list[9] = *v;
    list[9].name = "base_model.model.model.layers.2.self_attn.v_proj.lora_A.weight";
    CHECK(lora_try(c, &k, &f, list, 10) == PTST_ERR_MISMATCH);
    lora_error_ends(c, "2 tensors belong to no target: base_model.model.lm_head.weight, "
                       "base_model.model.model.layers.2.self_attn.v_proj.lora_A.weight");
    v->name = "model.layers.0.self_attn.v_proj.lora_A.weight"; /* a typo in the prefix */
    CHECK(lora_try(c, &k, &f, list, 8) == PTST_ERR_MISMATCH);
    lora_error_ends(c, "tensor base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight is "
                       "missing");
    v->name = "base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight";
    v->dtype_name = "I32";
    CHECK(lora_try(c, &k, &f, list, 8) == PTST_ERR_UNSUPPORTED);
    lora_error_ends(c, "v_proj.lora_A.weight is I32, expected F32, F16 or BF16");
    v->dtype_name = "F16";
    CHECK(lora_try(c, &k, &f, list, 8) == PTST_OK);
    v->dtype_name = "F32";
    v->shape[0] = 16;
    v->shape[1] = 2;
    CHECK(lora_try(c, &k, &f, list, 8) == PTST_ERR_MISMATCH);
    lora_error_ends(c, "v_proj.lora_A.weight has rank 2 and shape [16, 2], expected [2, 16]");
    v->rank = 1;
    v->shape[0] = 32;
    CHECK(lora_try(c, &k, &f, list, 8) == PTST_ERR_MISMATCH);
    v->rank = 0;
    CHECK(lora_try(c, &k, &f, list, 8) == PTST_ERR_MISMATCH);
    CHECK(lora_try(c, &k, &f, list, 0) == PTST_ERR_MISMATCH);
    ptst_tensors_close(c, t);
    CHECK(ptst__write_file(c, models_file(&f, "adapter_model.safetensors"), "{", 1) == PTST_OK);
    CHECK(ptst_adapter_load(c, k.m, f.path) == NULL && ptst_error_code(c) == PTST_ERR_FORMAT);
    unlink(models_file(&f, "adapter_model.safetensors"));
    CHECK(ptst_adapter_load(c, k.m, f.path) == NULL && ptst_error_code(c) == PTST_ERR_NOT_FOUND);
    models_close(c, &k);
    models_folder_empty(&f, false);
    ptst_close(c);
}

static void lora_keep_log(void *user, ptst_log_level level, const char *text) {
    (void)level;
    snprintf((char *)user, 1024, "%s", text);
}

/* An adapter that changes nothing is noted; a regular expression that only Python knows is noted,
   and half of a pair is still missing then; a pickle has its own sentence. */
static void adapter_notes(void) {
    ptst_ctx *c = test_open(1, NULL);
    models_folder f;
    models_case k;
    ptst_tensor list[10];
    ptst_adapter *a;
    ptst_tensors *t;
    size_t i, n;
    static const char config[] = "{\"peft_type\": \"LORA\", \"r\": 2, \"lora_alpha\": 8, "
                                 "\"target_modules\": \".*\\\\b(q|v)_proj\"}";
    char log[1024] = "";
    CHECK(models_folder_make(&f));
    CHECK(models_open(c, &k, "llama_tied", true));
    c->desc.log = lora_keep_log;
    c->desc.user = log;
    a = ptst_adapter_new(c, k.m, NULL);
    CHECK(ptst_adapter_save(c, a, f.path, NULL) == PTST_OK);
    ptst_adapter_free(c, a);
    a = ptst_adapter_load(c, k.m, f.path);
    CHECK(a != NULL && strstr(log, "changes nothing, all of its lora_B are 0") != NULL);
    ptst_adapter_free(c, a);
    log[0] = 0;
    CHECK(ptst_adapter_save(c, k.a, f.path, NULL) == PTST_OK);
    a = ptst_adapter_load(c, k.m, f.path);
    CHECK(a != NULL && log[0] == 0);
    ptst_adapter_free(c, a);
    CHECK(ptst__write_file(c, models_file(&f, "adapter_config.json"), config, sizeof config - 1) ==
          PTST_OK);
    a = ptst_adapter_load(c, k.m, f.path);
    CHECK(a != NULL && memcmp(a->values, k.a->values, a->values_count * sizeof *a->values) == 0);
    CHECK(strstr(log, "target_modules: an escape that is not supported") != NULL);
    CHECK(strstr(log, "; the tensors say what is adapted") != NULL);
    ptst_adapter_free(c, a);
    t = ptst_tensors_open(c, models_file(&f, "adapter_model.safetensors"));
    for (i = n = 0; i < ptst_tensors_count(t); i++) { /* A or B alone */
        list[n] = *ptst_tensors_at(t, i);
        n += strstr(list[n].name, "0.self_attn.q_proj.lora_B") == NULL;
    }
    CHECK(n == 7 && lora_try(c, &k, &f, list, n) == PTST_ERR_MISMATCH);
    lora_error_ends(c, "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight is missing");
    ptst_tensors_close(c, t);
    unlink(models_file(&f, "adapter_model.safetensors"));
    CHECK(ptst__write_file(c, models_file(&f, "adapter_model.bin"), "PK", 2) == PTST_OK);
    CHECK(ptst_adapter_load(c, k.m, f.path) == NULL &&
          ptst_error_code(c) == PTST_ERR_UNSUPPORTED);
    CHECK(strstr(ptst_error_text(c), "adapter_model.bin: is a pickle") != NULL);
    models_close(c, &k);
    models_folder_empty(&f, false);
    ptst_close(c);
}

/* ---- dropout ---- */

/* The share of elements that stay and their scale; the same for the same stream, another for
   another; on two threads as on one. */
static void dropout_masks(void) {
    enum { N = 100003 };
    ptst_ctx *one = test_open(1, NULL), *two = test_open(2, NULL);
    float *x = (float *)malloc(4 * N * sizeof *x), *y = x + N, *z = y + N, *w = z + N;
    ptst__dropout d = {7, 8, 6554}; /* p = 0.1 */
    size_t i, kept = 0, same = 0;
    double largest = 0;
    for (i = 0; i < N; i++) {
        x[i] = 1;
    }
    ptst__dropout_apply(one, &d, N, x, y, false);
    ptst__dropout_apply(two, &d, N, x, z, false);
    CHECK(memcmp(y, z, N * sizeof *y) == 0);
    d.stream = 9;
    ptst__dropout_apply(two, &d, N, x, w, false);
    for (i = 0; i < N; i++) {
        kept += y[i] != 0;
        same += (y[i] != 0) == (w[i] != 0);
        largest = (double)y[i] > largest ? (double)y[i] : largest;
    }
    /* deviations of the counts: sqrt(N 0.1 0.9) = 95, sqrt(N 0.82 0.18) = 121 */
    CHECK_NEAR((double)kept, 0.9 * N, 5 * 95);
    CHECK_NEAR((double)same, 0.82 * N, 5 * 121);
    CHECK_NEAR(largest, 1 / 0.9, 1e-4);
    d.stream = 8;
    ptst__dropout_apply(one, &d, N, x, z, true); /* added to itself */
    for (i = 0; i < N; i++) {
        CHECK(z[i] == 2 * y[i]);
    }
    free(x);
    ptst_close(one);
    ptst_close(two);
}

/* Dropout only touches the side branches: with B = 0 the loss stays, with B it changes with the
   stream, and the same stream gives the same bits. */
static void dropout_in_pass(void) {
    ptst_ctx *c = test_open(2, NULL);
    models_case k;
    ptst__pass *p;
    double plain, a, b, again, none;
    ptst_adapter *zero;
    CHECK(models_open(c, &k, "llama_bias", true));
    p = ptst__pass_new(c, k.m, k.a, MODELS_TOKENS, MODELS_TOKENS, 3, false);
    CHECK(ptst__pass_run(c, p, &k.batch, false, 0, 0, 0, &plain, NULL) == PTST_OK);
    CHECK(ptst__pass_run(c, p, &k.batch, true, 0.2, 1, 1, &a, NULL) == PTST_OK);
    CHECK(ptst__pass_run(c, p, &k.batch, false, 0.2, 1, 2, &b, NULL) == PTST_OK);
    CHECK(ptst__pass_run(c, p, &k.batch, false, 0.2, 1, 1, &again, NULL) == PTST_OK);
    CHECK(a != plain && b != plain && a != b && a == again);
    ptst__pass_free(c, p);
    zero = ptst_adapter_new(c, k.m, NULL);
    p = ptst__pass_new(c, k.m, zero, MODELS_TOKENS, MODELS_TOKENS, 3, false);
    CHECK(ptst__pass_run(c, p, &k.batch, false, 0, 0, 0, &none, NULL) == PTST_OK);
    CHECK(ptst__pass_run(c, p, &k.batch, false, 0.2, 0, 0, &a, NULL) == PTST_OK);
    CHECK(a == none);
    ptst__pass_free(c, p);
    ptst_adapter_free(c, zero);
    models_close(c, &k);
    ptst_close(c);
}

/* ---- merging ---- */

/* The merged model alone gives the logits of model and adapter; all other files come along. */
static void merged(void) {
    static const double bounds[3] = {1e-4, 1e-2, 0.1}; /* one more rounding to F32, F16, BF16 */
    ptst_ctx *c = test_open(2, NULL);
    models_folder f;
    int i;
    CHECK(models_folder_make(&f));
    for (i = 0; i < MODELS; i++) {
        models_case k;
        ptst_dtype dtype;
        char adapter[MODELS_PATH + 20], config[MODELS_PATH];
        CHECK(models_open(c, &k, models_names[i], false));
        dtype = k.m->embedding->file_dtype;
        snprintf(adapter, sizeof adapter, "%s/adapter", k.folder);
        snprintf(config, sizeof config, "%s/config.json", k.folder);
        CHECK(ptst_merge(c, k.folder, adapter, f.path) == PTST_OK);
        CHECK(models_same_file(c, config, models_file(&f, "config.json")));
        snprintf(config, sizeof config, "%s/generation_config.json", k.folder);
        CHECK(ptst__path_kind(config) == 0 ||
              models_same_file(c, config, models_file(&f, "generation_config.json")));
        ptst_model_free(c, k.m);
        k.m = ptst_model_load(c, f.path, PTST_DTYPE_FILE);
        CHECK(k.m != NULL && k.m->embedding->file_dtype == dtype);
        if (k.m != NULL) {
            CHECK_NEAR(models_logits_error(c, &k, "lora_logits"), 0,
                       bounds[dtype == PTST_F32   ? 0
                              : dtype == PTST_F16 ? 1
                                                  : 2]);
        }
        models_close(c, &k);
        models_folder_empty(&f, true);
    }
    models_folder_empty(&f, false);
    ptst_close(c);
}

/* The model of a case in two files. */
static void lora_shards(ptst_ctx *c, const models_case *k, models_folder *f) {
    ptst_tensor list[40];
    ptst_text index = {NULL, 0, 0}, config = {NULL, 0, 0};
    size_t i, n = ptst_tensors_count(k->m->tensors);
    char path[MODELS_PATH + 20];
    CHECK(n <= 40 && ptst__text_add(c, &index, "{\"weight_map\": {") == PTST_OK);
    for (i = 0; i < n; i++) {
        list[i] = *ptst_tensors_at(k->m->tensors, i);
        CHECK(ptst__text_format(c, &index, "%s\"%s\": \"%s\"", i == 0 ? "" : ", ", list[i].name,
                                i < n / 2 ? "a.safetensors" : "b.safetensors") == PTST_OK);
    }
    CHECK(ptst__text_add(c, &index, "}}") == PTST_OK);
    CHECK(ptst_tensors_write(c, models_file(f, "a.safetensors"), list, n / 2, NULL) == PTST_OK);
    CHECK(ptst_tensors_write(c, models_file(f, "b.safetensors"), list + n / 2, n - n / 2, NULL) ==
          PTST_OK);
    CHECK(ptst__write_file(c, models_file(f, "model.safetensors.index.json"), index.data,
                           index.size) == PTST_OK);
    snprintf(path, sizeof path, "%s/config.json", k->folder);
    CHECK(ptst__read_file(c, path, &config) == PTST_OK);
    CHECK(ptst__write_file(c, models_file(f, "config.json"), config.data, config.size) == PTST_OK);
    ptst_text_free(c, &index);
    ptst_text_free(c, &config);
}

/* A sharded model stays sharded; files that are no weights are copied, other weights are not. */
static void merged_shards(void) {
    ptst_ctx *c = test_open(1, NULL);
    models_folder f, g;
    models_case k;
    CHECK(models_folder_make(&f) && models_folder_make(&g));
    CHECK(models_open(c, &k, "llama_tied", true));
    lora_shards(c, &k, &f);
    CHECK(ptst__write_file(c, models_file(&f, "tokenizer.json"), "{}", 2) == PTST_OK);
    CHECK(ptst__write_file(c, models_file(&f, "chat_template.jinja"), "hi", 2) == PTST_OK);
    CHECK(ptst__write_file(c, models_file(&f, "pytorch_model.bin"), "old", 3) == PTST_OK);
    CHECK(ptst__write_file(c, models_file(&f, ".hidden"), "x", 1) == PTST_OK);
    CHECK(ptst_merge(c, f.path, "tests/golden/models/llama_tied/adapter", f.path) ==
          PTST_ERR_ARGUMENT);
    CHECK(ptst_merge(c, f.path, "tests/golden/models/llama_tied/adapter", g.path) == PTST_OK);
    CHECK(ptst__path_kind(models_file(&g, "a.safetensors")) == 1);
    CHECK(ptst__path_kind(models_file(&g, "b.safetensors")) == 1);
    CHECK(ptst__path_kind(models_file(&g, "tokenizer.json")) == 1);
    CHECK(ptst__path_kind(models_file(&g, "chat_template.jinja")) == 1);
    CHECK(ptst__path_kind(models_file(&g, "pytorch_model.bin")) == 0);
    CHECK(ptst__path_kind(models_file(&g, ".hidden")) == 0);
    ptst_adapter_free(c, k.a);
    ptst_model_free(c, k.m);
    k.a = NULL;
    k.m = ptst_model_load(c, g.path, PTST_DTYPE_FILE);
    CHECK(k.m != NULL && k.m->tensors->files_count == 2);
    CHECK_NEAR(models_logits_error(c, &k, "lora_logits"), 0, 1e-4);
    CHECK(ptst_merge(c, g.path, f.path, "/nowhere") == PTST_ERR_NOT_FOUND);
    models_close(c, &k);
    models_folder_empty(&f, false);
    models_folder_empty(&g, false);
    ptst_close(c);
}

/* Logits [n] of the first sequence of a case with an adapter. */
static void lora_logits_of(ptst_ctx *c, const models_case *k, const ptst_adapter *a, float *out,
                           size_t n) {
    ptst_session_desc d;
    ptst_session *s;
    ptst_chunk chunk;
    memset(&d, 0, sizeof d);
    d.logit_rows = d.capacity = MODELS_TOKENS;
    s = ptst_session_new(c, k->m, a, &d);
    chunk.slot = 0;
    chunk.tokens = k->tokens;
    chunk.count = (size_t)k->lengths[0];
    chunk.logits = PTST_LOGITS_ALL;
    CHECK(s != NULL && ptst_eval(c, s, &chunk, 1) == PTST_OK);
    if (s != NULL) {
        memcpy(out, ptst_logits(s, 0), n * sizeof *out);
    }
    ptst_session_free(c, s);
}

/* modules_to_save: copies of the model's weights at first, then saved, loaded, copied and merged
   with the same logits. */
static void modules_to_save(void) {
    ptst_ctx *c = test_open(2, NULL);
    ptst_lora_desc d;
    models_folder f, g;
    int i;
    memset(&d, 0, sizeof d);
    CHECK(models_folder_make(&f) && models_folder_make(&g));
    for (i = 0; i < 2; i++) {
        models_case k;
        ptst_adapter *a, *b;
        size_t n, at;
        float *x, *y;
        CHECK(models_open(c, &k, i == 0 ? "phi3_plain" : "gemma_plain", false));
        n = (size_t)k.lengths[0] * k.m->V;
        x = (float *)malloc(n * sizeof *x);
        y = (float *)malloc(n * sizeof *y);
        d.targets = "all-linear";
        d.modules_to_save = "lm_head,nothing";
        CHECK(ptst_adapter_new(c, k.m, &d) == NULL);
        CHECK_TEXT(ptst_error_text(c),
                   "modules_to_save \"nothing\": expected embed_tokens or lm_head");
        d.modules_to_save = "lm_head,model.embed_tokens";
        a = ptst_adapter_new(c, k.m, &d);
        CHECK(a != NULL && k.a == NULL);
        CHECK_TEXT(ptst_adapter_about(a).modules_to_save, "embed_tokens,lm_head");
        lora_logits_of(c, &k, NULL, x, n);
        lora_logits_of(c, &k, a, y, n);
        CHECK(memcmp(x, y, n * sizeof *x) == 0); /* copies, and B is 0 */
        for (at = 0; at < a->values_count; at++) {
            a->values[at] += 0.02f * (float)((int)(at * 7 % 11) - 5);
        }
        lora_logits_of(c, &k, a, x, n);
        CHECK(models_max_error(x, y, n) > 1e-3);
        CHECK(ptst_adapter_save(c, a, f.path, "base") == PTST_OK);
        b = ptst_adapter_load(c, k.m, f.path);
        CHECK_TEXT(b == NULL ? ptst_error_text(c) : "", "");
        CHECK(b != NULL && memcmp(a->values, b->values, a->values_count * sizeof(float)) == 0);
        ptst_adapter_free(c, b);
        b = ptst_adapter_copy(c, a);
        ptst_adapter_free(c, a);
        lora_logits_of(c, &k, b, y, n);
        CHECK(memcmp(x, y, n * sizeof *x) == 0);
        CHECK(ptst_merge(c, k.folder, f.path, g.path) == PTST_OK);
        ptst_model_free(c, k.m);
        k.m = ptst_model_load(c, g.path, PTST_DTYPE_FILE);
        CHECK(k.m != NULL && k.m->head != k.m->embedding && k.m->head->dtype == PTST_F32);
        lora_logits_of(c, &k, NULL, y, n);
        CHECK(models_max_error(x, y, n) < 1e-5); /* W + scale B A rounded once, to F32 */
        ptst_adapter_free(c, b);
        free(x);
        free(y);
        models_close(c, &k);
    }
    models_folder_empty(&f, false);
    models_folder_empty(&g, false);
    ptst_close(c);
}

/* Merging is exact also for who trained with less precision: the same file (without AMX it is the
   same in any case). */
static void merged_exactly(void) {
    static const char *const words[2] = {"highest", "medium"};
    ptst_text text[2] = {{NULL, 0, 0}, {NULL, 0, 0}};
    ptst_ctx *c[2];
    ptst_desc desc;
    ptst_lora_desc d;
    ptst_model *m;
    ptst_adapter *a;
    models_folder f, g;
    size_t i;
    memset(&desc, 0, sizeof desc);
    memset(&d, 0, sizeof d);
    for (i = 0; i < 2; i++) {
        desc.float32_matmul_precision = words[i];
        CHECK(ptst_open(&desc, &c[i]) == PTST_OK);
    }
    CHECK(models_folder_make(&f) && models_folder_make(&g));
    m = ptst_model_load(c[0], "examples/tiny-chat", PTST_DTYPE_FILE);
    d.targets = "all-linear";
    d.rank = 64;
    a = ptst_adapter_new(c[0], m, &d);
    CHECK(a != NULL);
    for (i = 0; a != NULL && i < a->values_count; i++) {
        a->values[i] += 0.02f * (float)((int)(i * 7 % 11) - 5);
    }
    CHECK(ptst_adapter_save(c[0], a, f.path, "base") == PTST_OK);
    for (i = 0; i < 2; i++) {
        CHECK(ptst_merge(c[i], "examples/tiny-chat", f.path, g.path) == PTST_OK);
        CHECK(ptst__read_file(c[i], models_file(&g, "model.safetensors"), &text[i]) == PTST_OK);
    }
    CHECK(text[0].size > 100000 && text[0].size == text[1].size &&
          memcmp(text[0].data, text[1].data, text[0].size) == 0);
    ptst_adapter_free(c[0], a);
    ptst_model_free(c[0], m);
    for (i = 0; i < 2; i++) {
        ptst_text_free(c[i], &text[i]);
        ptst_close(c[i]);
    }
    models_folder_empty(&f, false);
    models_folder_empty(&g, false);
}

/* A tied model with an adapter that has an embedding, a head or both of its own: merged, it has
   both, config.json says so, and where there is an index the head is in it. */
static void merged_unties(void) {
    static const char *const saved[] = {"embed_tokens", "lm_head", "embed_tokens,lm_head"};
    ptst_ctx *c = test_open(1, NULL);
    models_folder f, g, s;
    ptst_lora_desc d;
    ptst_text text = {NULL, 0, 0};
    size_t i, n;
    memset(&d, 0, sizeof d);
    CHECK(models_folder_make(&f) && models_folder_make(&g) && models_folder_make(&s));
    for (i = 0; i < 6; i++) {
        models_case k;
        ptst_adapter *a;
        const char *folder;
        float *x, *y;
        CHECK(models_open(c, &k, "llama_tied", false));
        folder = i < 3 ? k.folder : s.path;
        if (i == 3) { /* the same model in two files */
            lora_shards(c, &k, &s);
        }
        n = (size_t)k.lengths[0] * k.m->V;
        x = (float *)malloc(n * sizeof *x);
        y = (float *)malloc(n * sizeof *y);
        d.modules_to_save = saved[i % 3];
        a = ptst_adapter_new(c, k.m, &d);
        CHECK(a != NULL);
        for (n = 0; n < a->values_count; n++) {
            a->values[n] += 0.02f * (float)((int)(n * 7 % 11) - 5);
        }
        n = (size_t)k.lengths[0] * k.m->V;
        lora_logits_of(c, &k, a, x, n);
        CHECK(ptst_adapter_save(c, a, f.path, "base") == PTST_OK);
        CHECK_TEXT(ptst_merge(c, folder, f.path, g.path) == PTST_OK ? "" : ptst_error_text(c), "");
        text.size = 0;
        CHECK(ptst__read_file(c, models_file(&g, "config.json"), &text) == PTST_OK);
        CHECK(strstr(text.data, "\"tie_word_embeddings\": false") != NULL);
        CHECK(strstr(text.data, "\"tie_word_embeddings\": true") == NULL);
        ptst_model_free(c, k.m);
        k.m = ptst_model_load(c, g.path, PTST_DTYPE_FILE);
        CHECK(k.m != NULL && k.m->head != k.m->embedding);
        CHECK(k.m != NULL && k.m->tensors->files_count == (i < 3 ? 1u : 2u));
        if (k.m != NULL) {
            lora_logits_of(c, &k, NULL, y, n);
            CHECK(models_max_error(x, y, n) < 1e-5); /* rounded once, to F32 */
        }
        ptst_adapter_free(c, a);
        free(x);
        free(y);
        models_close(c, &k);
        models_folder_empty(&g, true);
    }
    ptst_text_free(c, &text);
    models_folder_empty(&f, false);
    models_folder_empty(&g, false);
    models_folder_empty(&s, false);
    ptst_close(c);
}

/* The value of a key of config.json is found where it is, and only there. */
static void merged_config(void) {
    static const char *const texts[][2] = {
        {"{\"a\": 1}", "{\n  \"tie_word_embeddings\": false,\"a\": 1}"},
        {"{\"tie_word_embeddings\":true}", "{\"tie_word_embeddings\":false}"},
        {"{\"tie_word_embeddings\" :\n null\n, \"b\": \"}\"}",
         "{\"tie_word_embeddings\" :\n false\n, \"b\": \"}\"}"},
        {"{\"x\": {\"tie_word_embeddings\": true}, \"y\": \"tie_word_embeddings\"}",
         "{\n  \"tie_word_embeddings\": false,\"x\": {\"tie_word_embeddings\": true}, "
         "\"y\": \"tie_word_embeddings\"}"},
        {"{\"q\\\"{\": [\"{\"], \"tie_word_embeddings\": true, \"z\": 1}",
         "{\"q\\\"{\": [\"{\"], \"tie_word_embeddings\": false, \"z\": 1}"},
    };
    ptst_ctx *c = test_open(1, NULL);
    ptst_text text = {NULL, 0, 0};
    models_folder f;
    size_t i;
    char to[MODELS_PATH + 40];
    CHECK(models_folder_make(&f));
    for (i = 0; i < sizeof texts / sizeof texts[0]; i++) {
        snprintf(to, sizeof to, "%s", models_file(&f, "config.json"));
        CHECK(ptst__write_file(c, to, texts[i][0], strlen(texts[i][0])) == PTST_OK);
        CHECK(ptst__merge_config(c, to, to) == PTST_OK);
        text.size = 0;
        CHECK(ptst__read_file(c, to, &text) == PTST_OK);
        CHECK_TEXT(text.data, texts[i][1]);
    }
    ptst_text_free(c, &text);
    models_folder_empty(&f, false);
    ptst_close(c);
}

/* ---- no memory ---- */

static ptst_code sweep_adapter(ptst_ctx *c, void *arg) {
    const char *folder = (const char *)arg;
    ptst_config g = models_config("llama");
    ptst_lora_desc d;
    ptst_model *m = ptst_model_new(c, &g, 1);
    ptst_adapter *a = NULL, *b = NULL, *copy = NULL;
    ptst_code code = m == NULL ? ptst_error_code(c) : PTST_OK;
    memset(&d, 0, sizeof d);
    d.targets = "all-linear";
    d.modules_to_save = "embed_tokens,lm_head";
    if (code == PTST_OK) {
        a = ptst_adapter_new(c, m, &d);
        code = a == NULL ? ptst_error_code(c) : ptst_adapter_save(c, a, folder, "base");
    }
    if (code == PTST_OK) {
        b = ptst_adapter_load(c, m, folder);
        copy = b == NULL ? NULL : ptst_adapter_copy(c, b);
        code = copy == NULL ? ptst_error_code(c) : PTST_OK;
    }
    ptst_adapter_free(c, a);
    ptst_adapter_free(c, b);
    ptst_adapter_free(c, copy);
    ptst_model_free(c, m);
    return code;
}

static ptst_code sweep_merge(ptst_ctx *c, void *arg) {
    return ptst_merge(c, "tests/golden/models/qwen2_window",
                      "tests/golden/models/qwen2_window/adapter", (const char *)arg);
}

static ptst_code sweep_merge_untied(ptst_ctx *c, void *arg) {
    char **folders = (char **)arg;
    return ptst_merge(c, folders[0], folders[1], folders[2]);
}

/* A tied model in two files and an adapter with a head: index and config.json are written anew. */
static void memory_merge_untied(void) {
    ptst_ctx *c = test_open(1, NULL);
    models_folder f, g, s;
    models_case k;
    ptst_lora_desc d;
    ptst_adapter *a;
    char *folders[3];
    memset(&d, 0, sizeof d);
    d.modules_to_save = "lm_head";
    CHECK(models_folder_make(&f) && models_folder_make(&g) && models_folder_make(&s));
    CHECK(models_open(c, &k, "llama_tied", false));
    lora_shards(c, &k, &s);
    a = ptst_adapter_new(c, k.m, &d);
    CHECK(a != NULL && ptst_adapter_save(c, a, f.path, NULL) == PTST_OK);
    ptst_adapter_free(c, a);
    models_close(c, &k);
    folders[0] = s.path;
    folders[1] = f.path;
    folders[2] = g.path;
    test_memory_sweep(sweep_merge_untied, folders);
    models_folder_empty(&f, false);
    models_folder_empty(&g, false);
    models_folder_empty(&s, false);
    ptst_close(c);
}

static void memory_adapters(void) {
    models_folder f;
    CHECK(models_folder_make(&f));
    test_memory_sweep(sweep_adapter, f.path);
    models_folder_empty(&f, true);
    test_memory_sweep(sweep_merge, f.path);
    models_folder_empty(&f, false);
}

static void suite_lora(void) {
    RUN(adapter_logits);
    RUN(adapter_gradients);
    RUN(written_as_peft);
    RUN(written_config);
    RUN(new_adapter);
    RUN(new_adapter_refuses);
    RUN(config_refuses_adapter);
    RUN(tensors_refused);
    RUN(adapter_notes);
    RUN(dropout_masks);
    RUN(dropout_in_pass);
    RUN(merged);
    RUN(merged_shards);
    RUN(modules_to_save);
    RUN(merged_exactly);
    RUN(merged_unties);
    RUN(merged_config);
    RUN(memory_merge_untied);
    RUN(memory_adapters);
}

MAIN(lora)
