/* tiny.h - a tokenizer of bytes and a small random model, for tests of training and generation. */
#ifndef TEST_TINY_H
#define TEST_TINY_H
#include "test.h"

static char tiny_folder[] = "/tmp/ptst_test_XXXXXX";
static char tiny_buffer[4][600];

/* Path of a file in the test's folder; four results live at a time. */
static const char *tiny_path(const char *name) {
    static int turn;
    turn = (turn + 1) % 4;
    snprintf(tiny_buffer[turn], sizeof tiny_buffer[0], "%s/%s", tiny_folder, name);
    return tiny_buffer[turn];
}

static void tiny_remove(const char *folder) {
    DIR *d = opendir(folder);
    struct dirent *e;
    char path[1000];
    while (d != NULL && (e = readdir(d)) != NULL) {
        if (strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0) {
            snprintf(path, sizeof path, "%s/%s", folder, e->d_name);
            if (ptst__path_kind(path) == 2) {
                tiny_remove(path);
            } else {
                unlink(path);
            }
        }
    }
    if (d != NULL) {
        closedir(d);
    }
    rmdir(folder);
}

/* A new, empty folder for a test. */
static void tiny_begin(void) {
    memcpy(tiny_folder + sizeof tiny_folder - 7, "XXXXXX", 6);
    CHECK(mkdtemp(tiny_folder) != NULL);
}

static void tiny_end(void) { tiny_remove(tiny_folder); }

/* tokenizer.json and tokenizer_config.json: byte b is token b + 3, "ab" is 259; <unk> 0, <s> 1,
   </s> 2; <s> is put before every text. */
static void tiny_write_tokenizer(ptst_ctx *c, const char *folder) {
    static const char special[] = "{\"id\":%d,\"content\":\"%s\",\"single_word\":false,\"lstrip\":"
                                  "false,\"rstrip\":false,\"normalized\":false,\"special\":true}";
    static const char *const names[] = {"<unk>", "<s>", "</s>"};
    static const char config[] = "{\"bos_token\":\"<s>\",\"eos_token\":\"</s>\"}";
    ptst_text t = {NULL, 0, 0}, path = {NULL, 0, 0};
    char letter[8];
    int i;
    uint32_t extra = 256;
    ptst__text_add(c, &t,
                   "{\"version\":\"1.0\",\"truncation\":null,\"padding\":null,"
                   "\"added_tokens\":[");
    for (i = 0; i < 3; i++) {
        ptst__text_add(c, &t, i == 0 ? "" : ",");
        ptst__text_format(c, &t, special, i, names[i]);
    }
    ptst__text_add(
        c, &t,
        "],\"normalizer\":null,\"pre_tokenizer\":{\"type\":\"ByteLevel\",\"add_prefix_space\":"
        "false,"
        "\"trim_offsets\":true,\"use_regex\":false},\"post_processor\":{\"type\":"
        "\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"<s>\",\"type_id\":0}},"
        "{\"Sequence\":{\"id\":\"A\",\"type_id\":0}}],\"pair\":[{\"Sequence\":{\"id\":\"A\","
        "\"type_id\":0}},{\"Sequence\":{\"id\":\"B\",\"type_id\":1}}],\"special_tokens\":{\"<s>\":"
        "{\"id\":\"<s>\",\"ids\":[1],\"tokens\":[\"<s>\"]}}},\"decoder\":{\"type\":\"ByteLevel\","
        "\"add_prefix_space\":true,\"trim_offsets\":true,\"use_regex\":true},\"model\":{\"type\":"
        "\"BPE\",\"dropout\":null,\"unk_token\":null,\"continuing_subword_prefix\":null,"
        "\"end_of_word_suffix\":null,\"fuse_unk\":false,\"byte_fallback\":false,"
        "\"ignore_merges\":false,\"vocab\":{\"<unk>\":0,\"<s>\":1,\"</s>\":2");
    for (i = 0; i < 256; i++) { /* GPT-2's printable stand-ins for bytes */
        bool plain = (i >= 33 && i <= 126) || (i >= 161 && i <= 172) || i >= 174;
        letter[ptst__utf8_write(letter, plain ? (uint32_t)i : extra++)] = 0;
        ptst__text_add(c, &t, ",");
        ptst__json_quote(c, &t, letter, strlen(letter));
        ptst__text_format(c, &t, ":%d", i + 3);
    }
    CHECK(ptst__text_add(c, &t, ",\"ab\":259},\"merges\":[\"a b\"]}}") == PTST_OK);
    CHECK(ptst__path_join(c, &path, folder, "tokenizer.json") == PTST_OK);
    CHECK(ptst__write_file(c, path.data, t.data, t.size) == PTST_OK);
    CHECK(ptst__path_join(c, &path, folder, "tokenizer_config.json") == PTST_OK);
    CHECK(ptst__write_file(c, path.data, config, sizeof config - 1) == PTST_OK);
    ptst_text_free(c, &t);
    ptst_text_free(c, &path);
}

/* Two layers, grouped queries, odd sizes; `window` tokens at most. */
static ptst_model *tiny_model(ptst_ctx *c, int window) {
    ptst_config k;
    memset(&k, 0, sizeof k);
    k.vocab_size = 260;
    k.hidden_size = 24;
    k.intermediate_size = 40;
    k.num_hidden_layers = 2;
    k.num_attention_heads = 4;
    k.num_key_value_heads = 2;
    k.head_dim = 6;
    k.max_position_embeddings = window;
    k.initializer_range = 0.3;
    k.bos_token_id = 1;
    k.pad_token_id = -1;
    k.eos_token_id[0] = 2;
    k.eos_count = 1;
    return ptst_model_new(c, &k, 7);
}

#endif
