/* Tests of >>template. The strings of the paper's code are in golden/templates.json, chat templates
   with what transformers renders in golden/chat_templates.json. */
#include "test.h"

/* The template's text for a question, or NULL. */
static const char *template_text(ptst_ctx *c, const char *name, const char *model,
                                 const char *question, ptst_prompt *p) {
    ptst_template *t = ptst_template_load(c, name, model);
    ptst_code code = PTST_ERR_ARGUMENT;
    if (t != NULL) {
        code = ptst_template_prompt(c, t, question, strlen(question), p);
    }
    ptst_template_free(c, t);
    return code == PTST_OK ? p->text.data : NULL;
}

static void template_paper(void) {
    ptst_ctx *c = test_open(1, NULL);
    ptst_json *j = ptst_json_load(c, "tests/golden/templates.json");
    int32_t key, list = ptst_json_get(j, 0, "llama_mistral");
    int found = 0;
    CHECK(j != NULL);
    for (key = ptst_json_first(j, list); key >= 0;) {
        const char *name = ptst_json_string(j, key, NULL), *short_name, *other, *text;
        int32_t entry = ptst_json_next(j, key);
        ptst_prompt p;
        size_t i;
        memset(&p, 0, sizeof p);
        short_name = ptst_json_string(j, ptst_json_get(j, entry, "short"), NULL);
        text = ptst_json_string(j, ptst_json_get(j, entry, "template"), NULL);
        CHECK_TEXT(template_text(c, name, NULL, "%s", &p), text);
        if (short_name != NULL) {
            CHECK_TEXT(template_text(c, short_name, NULL, "%s", &p), text);
        }
        for (i = 0; (other = ptst_template_at(i, NULL, NULL)) != NULL; i++) {
            const char *at_short, *at_text;
            if (strcmp(other, name) == 0) {
                ptst_template_at(i, &at_short, &at_text);
                CHECK_TEXT(at_text, text);
                CHECK((at_short == NULL) == (short_name == NULL));
                CHECK(at_short == NULL || strcmp(at_short, short_name) == 0);
                found++;
            }
        }
        ptst_prompt_free(c, &p);
        key = ptst_json_next(j, entry);
    }
    CHECK(found == 9);
    ptst_json_free(c, j);
    ptst_close(c);
}

/* Compares marks and learn with digits; NULL = not looked at. */
static void template_check(int line, const ptst_prompt *p, const char *marks, const char *learn) {
    char digits[512];
    size_t i, k;
    CHECK(p->marks.size == p->text.size && p->learn.size == p->text.size);
    for (k = 0; k < 2; k++) {
        const ptst_text *t = k == 0 ? &p->marks : &p->learn;
        for (i = 0; i < t->size && i < sizeof digits - 1; i++) {
            digits[i] = (char)('0' + t->data[i]);
        }
        digits[i] = 0;
        if ((k == 0 ? marks : learn) != NULL) {
            test_text(__FILE__, line, digits, k == 0 ? marks : learn);
        }
    }
}

static void template_question(void) {
    static const char user[] = "[{\"role\": \"user\", \"content\": \"x\"}]";
    static const char system[] = "[{\"role\": \"system\", \"content\": \"x\"}]";
    ptst_ctx *c = test_open(1, NULL);
    ptst_template *t = ptst_template_load(c, "CV", NULL);
    ptst_prompt p;
    ptst_json *j;
    memset(&p, 0, sizeof p);
    CHECK_TEXT(ptst_template_name(t), "gsm:chat:vanilla");
    CHECK_TEXT(ptst_template_short_name(t), "CV");
    CHECK(!ptst_template_is_chat(t));
    CHECK(ptst_template_prompt(c, t, "a%s\n", 4, &p) == PTST_OK);
    CHECK_TEXT(p.text.data, "[INST] Question: a%s\n [/INST]");
    template_check(__LINE__, &p, "00000000000000000111100000000", "00000000000000000000000000000");
    CHECK(!p.own_bos);
    CHECK(ptst_template_prompt(c, t, "", 0, &p) == PTST_OK);
    CHECK_TEXT(p.text.data, "[INST] Question:  [/INST]");
    j = ptst_json_parse(c, user, sizeof user - 1, "m");
    CHECK(ptst_template_messages(c, t, j, true, &p) == PTST_OK);
    CHECK_TEXT(p.text.data, "[INST] Question: x [/INST]");
    CHECK(ptst_template_context(c, t, j, &p) == PTST_ERR_ARGUMENT);
    ptst_json_free(c, j);
    j = ptst_json_parse(c, system, sizeof system - 1, "m");
    CHECK(ptst_template_messages(c, t, j, true, &p) == PTST_ERR_MISMATCH);
    CHECK(p.text.size == 0);
    ptst_json_free(c, j);
    ptst_template_free(c, t);
    CHECK(ptst_template_at(100, NULL, NULL) == NULL);
    ptst_prompt_free(c, &p);
    ptst_close(c);
}

/* "loose:" before a name: the same text, and no byte counts as content. */
static void template_loose(void) {
    static const char *const names[][2] = {{"loose:CV", "loose:gsm:chat:vanilla"},
                                           {"loose:text", "loose:text"}};
    ptst_ctx *c = test_open(1, NULL);
    ptst_prompt p;
    size_t i, k;
    memset(&p, 0, sizeof p);
    for (i = 0; i < PTST__COUNT(names); i++) {
        ptst_template *t = ptst_template_load(c, names[i][0], NULL);
        CHECK_TEXT(ptst_template_name(t), names[i][1]);
        CHECK(ptst_template_short_name(t) == NULL);
        CHECK(ptst_template_prompt(c, t, "a</s>", 5, &p) == PTST_OK);
        CHECK(strstr(p.text.data, "a</s>") != NULL && p.marks.size == p.text.size);
        for (k = 0; k < p.marks.size; k++) {
            CHECK(p.marks.data[k] == PTST_TEMPLATE);
        }
        ptst_template_free(c, t);
    }
    CHECK(ptst_template_load(c, "loose:", NULL) == NULL);
    ptst_prompt_free(c, &p);
    ptst_close(c);
}

/* ---- folders ---- */

static char template_dir[64];

static void template_make_dir(void) {
    memcpy(template_dir, "/tmp/ptst_test_XXXXXX", 22);
    CHECK(mkdtemp(template_dir) != NULL);
}

/* Writes folder/name. */
static void template_write(ptst_ctx *c, const char *name, const char *text) {
    ptst_text path = {NULL, 0, 0};
    ptst__path_join(c, &path, template_dir, name);
    CHECK(ptst__write_file(c, path.data, text, strlen(text)) == PTST_OK);
    ptst_text_free(c, &path);
}

static void template_remove_dir(ptst_ctx *c) {
    static const char *const names[] = {
        "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "own.json",
        "chat_templates/tool_use.jinja", "chat_templates/default.jinja", "chat_templates",
        "additional_chat_templates/tool_use.jinja", "additional_chat_templates/default.jinja",
        "additional_chat_templates/rag.jinja", "additional_chat_templates",
        "chat_template.json", "one.json", "bad.jinja"};
    ptst_text path = {NULL, 0, 0};
    size_t i;
    for (i = 0; i < sizeof names / sizeof names[0]; i++) {
        ptst__path_join(c, &path, template_dir, names[i]);
        remove(path.data);
    }
    ptst_text_free(c, &path);
    CHECK(remove(template_dir) == 0);
}

static uint64_t template_fnv(const char *s, size_t size) {
    uint64_t h = 1469598103934665603u;
    size_t i;
    for (i = 0; i < size; i++) {
        h = (h ^ (unsigned char)s[i]) * 1099511628211u;
    }
    return h;
}

/* Is the text the one of the golden file: a string, {"size", "fnv"}, or null (refused)? */
static bool template_is(const ptst_json *j, int32_t node, ptst_code code, const ptst_text *text) {
    size_t size = 0;
    const char *expected = ptst_json_string(j, node, &size), *fnv;
    if (ptst_json_kind(j, node) == PTST_JSON_NULL || code != PTST_OK) {
        return code != PTST_OK && ptst_json_kind(j, node) == PTST_JSON_NULL;
    }
    if (expected != NULL) {
        return text->size == size && (size == 0 || memcmp(text->data, expected, size) == 0);
    }
    fnv = ptst_json_string(j, ptst_json_get(j, node, "fnv"), NULL);
    return (double)text->size == ptst_json_number(j, ptst_json_get(j, node, "size"), -1) &&
           template_fnv(text->data, text->size) == strtoull(fnv, NULL, 16);
}

/* One row of the golden file: the template from a folder, over every conversation. */
static void template_family(ptst_ctx *c, const ptst_json *j, int32_t row,
                            const ptst_json *conversations) {
    ptst_text text = {NULL, 0, 0};
    ptst_template *t;
    ptst_prompt p;
    int32_t special = ptst_json_get(j, row, "special"), k, want;
    int number = 0;
    const char *name = ptst_json_string(j, ptst_json_get(j, row, "name"), NULL);
    memset(&p, 0, sizeof p);
    test_put_json(c, j, special, &text);
    text.size--; /* the closing brace */
    ptst__text_add(c, &text, ", \"chat_template\": ");
    test_put_json(c, j, ptst_json_get(j, row, "source"), &text);
    ptst__text_add(c, &text, "}");
    template_write(c, "tokenizer_config.json", text.data);
    t = ptst_template_load(c, template_dir, NULL);
    CHECK(t != NULL);
    want = ptst_json_first(j, ptst_json_get(j, row, "texts"));
    for (k = ptst_json_first(conversations, 0); k >= 0 && t != NULL; number++) {
        ptst_json *conversation;
        ptst_code code;
        text.size = 0;
        test_put_json(c, conversations, k, &text);
        conversation = ptst_json_parse(c, text.data, text.size, "conversation");
        code = ptst_template_messages(c, t, conversation, number % 2 == 0, &p);
        if (!template_is(j, want, code, &p.text)) {
            CHECK(false);
            fprintf(stderr, "%s, conversation %d: %s\n", name, number,
                    code == PTST_OK ? p.text.data : ptst_error_text(c));
        }
        CHECK(p.marks.size == p.text.size && p.learn.size == p.text.size);
        ptst_json_free(c, conversation);
        k = ptst_json_next(conversations, k);
        want = ptst_json_next(j, want);
    }
    CHECK(number >= 20 && want == -1);
    ptst_template_free(c, t);
    ptst_prompt_free(c, &p);
    ptst_text_free(c, &text);
}

static void template_families(void) {
    ptst_ctx *c = test_open(1, NULL);
    ptst_json *j = ptst_json_load(c, "tests/golden/chat_templates.json");
    ptst_json *conversations = ptst_json_load(c, "tests/golden/conversations.json");
    int32_t k;
    int count = 0;
    CHECK(j != NULL && conversations != NULL);
    template_make_dir();
    for (k = ptst_json_first(j, 0); k >= 0; k = ptst_json_next(j, k)) {
        template_family(c, j, k, conversations);
        count++;
    }
    CHECK(count >= 8);
    template_remove_dir(c);
    ptst_json_free(c, j);
    ptst_json_free(c, conversations);
    ptst_close(c);
}

/* The text of the folder's template for one message and these tools (JSON), or NULL. */
static const char *template_chosen(ptst_ctx *c, const char *tools, ptst_prompt *p) {
    ptst_text talk = {NULL, 0, 0};
    ptst_template *t = ptst_template_load(c, template_dir, NULL);
    ptst_code code = ptst_error_code(c);
    if (t != NULL) {
        ptst_json *j;
        ptst__text_format(c, &talk, "{\"messages\": [{\"role\": \"user\", \"content\": \"q\"}]%s%s}",
                          tools == NULL ? "" : ", \"tools\": ", tools == NULL ? "" : tools);
        j = ptst_json_parse(c, talk.data, talk.size, "talk");
        code = ptst_template_messages(c, t, j, false, p);
        ptst_json_free(c, j);
    }
    ptst_text_free(c, &talk);
    ptst_template_free(c, t);
    return code == PTST_OK ? p->text.data : NULL;
}

/* What transformers chooses where there are several (see tools/template_fuzz.py). */
static void template_precedence(void) {
    ptst_ctx *c = test_open(1, NULL);
    ptst_text path = {NULL, 0, 0};
    ptst_prompt p;
    memset(&p, 0, sizeof p);
    template_make_dir();
    ptst__path_join(c, &path, template_dir, "chat_templates");
    CHECK(ptst__make_folders(c, path.data) == PTST_OK);
    template_write(c, "chat_templates/default.jinja", "other folder");
    CHECK_TEXT(template_chosen(c, NULL, &p), "other folder");
    template_write(c, "tokenizer_config.json",
                   "{\"chat_template\": [{\"name\": \"default\", \"template\": \"first\"}, {\"name\": "
                   "\"tool_use\", \"template\": \"tools\"}, {\"name\": \"default\", "
                   "\"template\": \"last\"}]}");
    CHECK_TEXT(template_chosen(c, NULL, &p), "last");
    CHECK_TEXT(template_chosen(c, "null", &p), "last");
    CHECK_TEXT(template_chosen(c, "[]", &p), "tools");
    template_write(c, "tokenizer_config.json",
                   "{\"chat_template\": {\"default\": \"of object\", \"tool_use\": \"its tools\"}}");
    CHECK_TEXT(template_chosen(c, NULL, &p), "of object");
    CHECK_TEXT(template_chosen(c, "[{}]", &p), "its tools");
    template_write(c, "tokenizer_config.json", "{\"chat_template\": {\"rag\": \"documents\"}}");
    CHECK_TEXT(template_chosen(c, NULL, &p), "other folder");
    template_write(c, "tokenizer_config.json", "{\"chat_template\": \"config\"}");
    CHECK_TEXT(template_chosen(c, "[{}]", &p), "config");
    ptst__path_join(c, &path, template_dir, "additional_chat_templates");
    CHECK(ptst__make_folders(c, path.data) == PTST_OK);
    CHECK_TEXT(template_chosen(c, NULL, &p), "config");
    template_write(c, "additional_chat_templates/rag.jinja", "documents");
    CHECK(template_chosen(c, NULL, &p) == NULL); /* files replace the config, whatever their names */
    CHECK(strstr(ptst_error_text(c), "none of its chat templates is called default") != NULL);
    template_write(c, "chat_template.jinja", "file");
    CHECK_TEXT(template_chosen(c, "[{}]", &p), "file");
    template_write(c, "additional_chat_templates/tool_use.jinja", "tools of files");
    CHECK_TEXT(template_chosen(c, NULL, &p), "file");
    CHECK_TEXT(template_chosen(c, "[{}]", &p), "tools of files");
    template_write(c, "additional_chat_templates/default.jinja", "first of files");
    CHECK_TEXT(template_chosen(c, NULL, &p), "first of files");
    template_remove_dir(c);
    ptst_text_free(c, &path);
    ptst_prompt_free(c, &p);
    ptst_close(c);
}

/* Where a chat template is taken from, and the special tokens. */
static void template_sources(void) {
    static const char config[] =
        "{\"bos_token\": {\"content\": \"<B>\", \"lstrip\": false}, \"eos_token\": \"<E>\", "
        "\"pad_token\": null, \"chat_template\": [{\"name\": \"default\", \"template\": "
        "\"config {{ bos_token }}{{ eos_token }}{{ pad_token }}\"}, {\"name\": \"tool_use\", "
        "\"template\": \"config tools\"}]}";
    static const char tools[] = "{\"messages\": [{\"role\": \"user\", \"content\": \"q\"}], "
                                "\"tools\": [{\"name\": \"f\"}]}";
    ptst_ctx *c = test_open(1, NULL);
    ptst_json *j = ptst_json_parse(c, tools, sizeof tools - 1, "tools");
    ptst_template *t;
    ptst_prompt p;
    ptst_text path = {NULL, 0, 0};
    memset(&p, 0, sizeof p);
    template_make_dir();
    CHECK(ptst_template_load(c, template_dir, NULL) == NULL);
    CHECK(ptst_error_code(c) == PTST_ERR_UNSUPPORTED);
    template_write(c, "chat_template.json", "{\"chat_template\": \"processor\"}");
    CHECK_TEXT(template_text(c, template_dir, NULL, "q", &p), "processor");
    template_write(c, "tokenizer_config.json", config);
    CHECK_TEXT(template_text(c, template_dir, NULL, "q", &p), "config <B><E>");
    CHECK_TEXT(template_text(c, "model:none", template_dir, "q", &p), "config <B><E>");
    CHECK(p.own_bos); /* a chat template decides alone: apply_chat_template adds nothing */
    t = ptst_template_load(c, template_dir, NULL);
    CHECK(t != NULL && ptst_template_messages(c, t, j, true, &p) == PTST_OK);
    CHECK_TEXT(p.text.data, "config tools");
    ptst_template_free(c, t);
    template_write(c, "special_tokens_map.json", "{\"pad_token\": \"<P>\", \"bos_token\": \"x\"}");
    CHECK_TEXT(template_text(c, template_dir, NULL, "q", &p), "config <B><E><P>");
    template_write(c, "chat_template.jinja", "{{ bos_token }}file {{ messages[0].content }}");
    CHECK_TEXT(template_text(c, template_dir, NULL, "q", &p), "<B>file q");
    CHECK(p.own_bos);
    template_check(__LINE__, &p, "000000001", "000000000");
    ptst__path_join(c, &path, template_dir, "additional_chat_templates");
    CHECK(ptst__make_folders(c, path.data) == PTST_OK);
    template_write(c, "additional_chat_templates/tool_use.jinja", "file tools {{ tools|length }}");
    t = ptst_template_load(c, template_dir, NULL);
    CHECK(t != NULL && ptst_template_messages(c, t, j, true, &p) == PTST_OK);
    CHECK_TEXT(p.text.data, "file tools 1");
    ptst_template_free(c, t);
    ptst__path_join(c, &path, template_dir, "chat_template.jinja");
    CHECK_TEXT(template_text(c, path.data, NULL, "q", &p), "file q");
    CHECK_TEXT(template_text(c, path.data, template_dir, "<B>", &p), "<B>file <B>");
    template_write(c, "chat_template.jinja", "{{ messages[0].content }}");
    CHECK_TEXT(template_text(c, path.data, template_dir, "<B>", &p), "<B>");
    CHECK(p.own_bos);
    CHECK_TEXT(template_text(c, "TV", template_dir, "<B>", &p), "Question: <B>\nAnswer:");
    CHECK(!p.own_bos);
    template_remove_dir(c);
    ptst_text_free(c, &path);
    ptst_prompt_free(c, &p);
    ptst_json_free(c, j);
    ptst_close(c);
}

/* What training learns of a conversation. */
static void template_learn(void) {
    static const char talk[] =
        "[{\"role\": \"user\", \"content\": \"q\"}, {\"role\": \"assistant\", \"content\": \"aa\"}, "
        "{\"role\": \"user\", \"content\": \"r<E>\"}, {\"role\": \"assistant\", \"content\": \"b\", "
        "\"tool_calls\": [1]}]";
    static const char quiet[] =
        "[{\"role\": \"assistant\", \"think\": \"t\", \"content\": \"b\"}, {\"role\": \"user\", "
        "\"content\": \"\"}, {\"role\": \"assistant\", \"think\": \"t\", \"content\": \"d\", "
        "\"open\": true}, {\"role\": \"assistant\", \"think\": \"\", \"content\": \"e\"}]";
    ptst_ctx *c = test_open(1, NULL);
    ptst_json *j2, *j = ptst_json_parse(c, talk, sizeof talk - 1, "talk");
    ptst_template *t;
    ptst_prompt p;
    memset(&p, 0, sizeof p);
    template_make_dir();
    template_write(c, "tokenizer_config.json", "{\"eos_token\": \"<E>\"}");
    template_write(c, "chat_template.jinja",
                   "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{% if m.tool_calls %}[{{ "
                   "m.tool_calls|tojson }}]{% endif %}<E>\n{% endfor %}.");
    t = ptst_template_load(c, template_dir, NULL);
    CHECK(t != NULL && ptst_template_messages(c, t, j, false, &p) == PTST_OK);
    CHECK_TEXT(p.text.data, "u:q<E>\na:aa<E>\nu:r<E><E>\na:b[[1]]<E>\n.");
    template_check(__LINE__, &p, "10100001022000010111100001020222000000",
                   "00000000011111000000000000011111111100");
    ptst_template_free(c, t);
    template_write(c, "chat_template.jinja", "{% for m in messages %}{{ m.role[0] }}:{% if m.role "
                                             "== 'assistant' %}{% generation %}{{ m.content }}!{% "
                                             "endgeneration %}{% else %}{{ m.content }}{% endif %} "
                                             "{% endfor %}");
    t = ptst_template_load(c, template_dir, NULL);
    CHECK(t != NULL && ptst_template_messages(c, t, j, false, &p) == PTST_OK);
    CHECK_TEXT(p.text.data, "u:q a:aa! u:r<E> a:b! ");
    template_check(__LINE__, &p, "1010102200101111010200", "0000001110000000000110");
    ptst_template_free(c, t);
    t = ptst_template_load(c, "loose:model:none", template_dir);
    CHECK(t != NULL && ptst_template_messages(c, t, j, false, &p) == PTST_OK);
    template_check(__LINE__, &p, "0000000000000000000000", "0000001110000000000110");
    ptst_template_free(c, t);
    /* a turn ends with a marker that is not the end-of-text, as in Phi-3 and Gemma */
    template_write(c, "chat_template.jinja",
                   "{% for m in messages %}{{ m.role[0] }}:{{ m.content "
                   "}}<end>{% endfor %}<E>");
    t = ptst_template_load(c, template_dir, NULL);
    CHECK(t != NULL && ptst_template_messages(c, t, j, false, &p) == PTST_OK);
    CHECK_TEXT(p.text.data, "u:q<end>a:aa<end>u:r<E><end>a:b<end><E>");
    template_check(__LINE__, &p, "101000001022000001011110000010200000000",
                   "000000000011111110000000000000111111000");
    ptst_template_free(c, t);
    /* what stands between the words of two messages is neither's, though no user says anything */
    j2 = ptst_json_parse(c, quiet, sizeof quiet - 1, "quiet");
    template_write(c, "chat_template.jinja",
                   "{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}<end>{% else %}"
                   " <a>{{ m.think }}/{{ m.content }}{% if not m.open %}<end>{% endif %}{% endif %}"
                   "{% endfor %}");
    t = ptst_template_load(c, template_dir, NULL);
    CHECK(t != NULL && ptst_template_messages(c, t, j2, false, &p) == PTST_OK);
    CHECK_TEXT(p.text.data, " <a>t/b<end><u><end> <a>t/d <a>/e<end>");
    template_check(__LINE__, &p, "00002020000000000000000020200000200000",
                   "00001111111100000000000011100000111111");
    ptst_template_free(c, t);
    ptst_json_free(c, j2);
    template_remove_dir(c);
    ptst_prompt_free(c, &p);
    ptst_json_free(c, j);
    ptst_close(c);
}

/* model: templates, also where the chat template takes no system message. */
static void template_model(void) {
    ptst_ctx *c = test_open(1, NULL);
    ptst_template *t;
    ptst_prompt p;
    memset(&p, 0, sizeof p);
    template_make_dir();
    template_write(c, "chat_template.jinja",
                   "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if "
                   "add_generation_prompt %}<assistant>{% endif %}");
    CHECK_TEXT(template_text(c, "model:none", template_dir, "q", &p), "<user>q\n<assistant>");
    CHECK_TEXT(template_text(c, "model:vanilla", template_dir, "q\"\n", &p),
               "<user>Question: q\"\n\n<assistant>");
    CHECK_TEXT(template_text(c, "model:mpt", template_dir, "q", &p),
               "<system>A conversation between a user and an LLM-based AI assistant. The assistant "
               "gives helpful and honest answers.\n<user>Question: q\n<assistant>");
    CHECK_TEXT(template_text(c, "model:alpaca", template_dir, "%s", &p),
               "<system>Below is an instruction that describes a task. Write a response that "
               "appropriately completes the request.\n<user>### Instruction:\n%s\n\n### "
               "Response:\n\n<assistant>");
    t = ptst_template_load(c, "model:llama", template_dir);
    CHECK_TEXT(ptst_template_name(t), "model:llama");
    CHECK(t != NULL && ptst_template_short_name(t) == NULL && ptst_template_is_chat(t));
    ptst_template_free(c, t);
    template_write(c, "chat_template.jinja",
                   "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system "
                   "role') }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}");
    CHECK_TEXT(template_text(c, "model:mpt", template_dir, "q", &p),
               "<user>A conversation between a user and an LLM-based AI assistant. The assistant "
               "gives helpful and honest answers.\n\nQuestion: q");
    template_write(c, "chat_template.jinja", "{% for m in messages %}{% if m.role == 'user' %}<{{ "
                                             "m.role }}>{{ m.content }}{% endif %}{% endfor %}");
    CHECK_TEXT(template_text(c, "model:mpt", template_dir, "q", &p),
               "<user>A conversation between a user and an LLM-based AI assistant. The assistant "
               "gives helpful and honest answers.\n\nQuestion: q");
    CHECK(template_text(c, "model:mpt", NULL, "q", &p) == NULL);
    CHECK(ptst_error_code(c) == PTST_ERR_ARGUMENT);
    template_remove_dir(c);
    ptst_prompt_free(c, &p);
    ptst_close(c);
}

/* Templates of the user's own, and what is wrong with others. */
static void template_own(void) {
    ptst_ctx *c = test_open(1, NULL);
    ptst_text path = {NULL, 0, 0};
    ptst_prompt p;
    ptst_template *t;
    memset(&p, 0, sizeof p);
    template_make_dir();
    template_write(c, "own.json", "{\"mine\": \"Q %s A %s %d\", \"other\": \"x\", \"n\": 3}");
    template_write(c, "one.json", "{\"only\": \"<<%s>>\"}");
    template_write(c, "bad.jinja", "a\n{{ b");
    ptst__path_join(c, &path, template_dir, "own.json#mine");
    t = ptst_template_load(c, path.data, NULL);
    CHECK(t != NULL);
    CHECK_TEXT(ptst_template_name(t), "mine");
    ptst_template_free(c, t);
    CHECK_TEXT(template_text(c, path.data, NULL, "%s", &p), "Q %s A %s %d");
    template_check(__LINE__, &p, "001100011000", NULL);
    ptst__path_join(c, &path, template_dir, "own.json:mine");
    CHECK_TEXT(template_text(c, path.data, NULL, "1", &p), "Q 1 A 1 %d");
    ptst__path_join(c, &path, template_dir, "one.json");
    CHECK_TEXT(template_text(c, path.data, NULL, "1", &p), "<<1>>");
    ptst__path_join(c, &path, template_dir, "own.json#other");
    CHECK(template_text(c, path.data, NULL, "1", &p) == NULL);
    CHECK(strstr(ptst_error_text(c), "has no %s") != NULL);
    CHECK(ptst_error_code(c) == PTST_ERR_FORMAT);
    ptst__path_join(c, &path, template_dir, "own.json#n");
    CHECK(template_text(c, path.data, NULL, "1", &p) == NULL);
    ptst__path_join(c, &path, template_dir, "own.json#nobody");
    CHECK(template_text(c, path.data, NULL, "1", &p) == NULL);
    ptst__path_join(c, &path, template_dir, "own.json");
    CHECK(template_text(c, path.data, NULL, "1", &p) == NULL);
    CHECK(ptst_error_code(c) == PTST_ERR_ARGUMENT);
    ptst__path_join(c, &path, template_dir, "absent.json#x");
    CHECK(template_text(c, path.data, NULL, "1", &p) == NULL);
    CHECK(ptst_error_code(c) == PTST_ERR_NOT_FOUND);
    ptst__path_join(c, &path, template_dir, "absent.jinja");
    CHECK(template_text(c, path.data, NULL, "1", &p) == NULL);
    CHECK(ptst_error_code(c) == PTST_ERR_NOT_FOUND);
    ptst__path_join(c, &path, template_dir, "bad.jinja");
    CHECK(template_text(c, path.data, NULL, "1", &p) == NULL);
    CHECK(strstr(ptst_error_text(c), "bad.jinja: line 2, column") != NULL);
    CHECK(template_text(c, "gsm:chat:nobody", NULL, "1", &p) == NULL);
    CHECK(ptst_error_code(c) == PTST_ERR_ARGUMENT);
    CHECK(strstr(ptst_error_text(c), "gsm:chat:llama-short") != NULL);
    template_remove_dir(c);
    ptst_text_free(c, &path);
    ptst_prompt_free(c, &p);
    ptst_close(c);
}

/* Conversations that are none. */
static void template_bad_messages(void) {
    static const char *const bad[] = {
        "[]", "{}", "3", "\"x\"", "{\"messages\": []}", "{\"messages\": 3}", "[1]", "[[]]", "null",
        "[\"x\"]"};
    ptst_ctx *c = test_open(1, NULL);
    ptst_template *t;
    ptst_prompt p;
    size_t i;
    memset(&p, 0, sizeof p);
    template_make_dir();
    template_write(c, "chat_template.jinja", "{% for m in messages %}{{ m.content }}{% endfor %}");
    t = ptst_template_load(c, template_dir, NULL);
    CHECK(t != NULL);
    for (i = 0; i < sizeof bad / sizeof bad[0] && t != NULL; i++) {
        ptst_json *j = ptst_json_parse(c, bad[i], strlen(bad[i]), "bad");
        CHECK(ptst_template_messages(c, t, j, true, &p) == PTST_ERR_FORMAT);
        CHECK(p.text.size == 0);
        ptst_json_free(c, j);
    }
    ptst_template_free(c, t);
    template_remove_dir(c);
    ptst_prompt_free(c, &p);
    ptst_close(c);
}

/* A model whose template may not be copied; its conversation by hand. */
static void template_shared(void) {
    static const char folder[] = "../shared/tokenizers/gemma-3-config";
    static const char talk[] = "[{\"role\": \"system\", \"content\": \"S\"}, {\"role\": \"user\", "
                               "\"content\": \" q \"}, {\"role\": \"assistant\", \"content\": \"a\"}]";
    ptst_ctx *c;
    ptst_template *t;
    ptst_prompt p;
    ptst_json *j;
    if (ptst__path_kind(folder) != 2) {
        SKIP("no ../shared/tokenizers/gemma-3-config");
    }
    c = test_open(1, NULL);
    memset(&p, 0, sizeof p);
    j = ptst_json_parse(c, talk, sizeof talk - 1, "talk");
    t = ptst_template_load(c, "model:none", folder);
    CHECK(t != NULL && ptst_template_messages(c, t, j, true, &p) == PTST_OK);
    CHECK_TEXT(p.text.data, "<start_of_turn>user\nS\n\nq<end_of_turn>\n<start_of_turn>model\na"
                            "<end_of_turn>\n<start_of_turn>model\n");
    ptst_template_free(c, t);
    ptst_json_free(c, j);
    ptst_prompt_free(c, &p);
    ptst_close(c);
}

static ptst_code template_work(ptst_ctx *c, void *arg) {
    ptst_template *t = ptst_template_load(c, (const char *)arg, template_dir);
    ptst_prompt p;
    ptst_code code = ptst_error_code(c);
    memset(&p, 0, sizeof p);
    if (t != NULL) {
        code = ptst_template_prompt(c, t, "question", 8, &p);
    }
    ptst_template_free(c, t);
    ptst_prompt_free(c, &p);
    return code;
}

static void template_memory(void) {
    static char chat[] = "model:mpt", paper[] = "CL", loose[] = "loose:CL";
    ptst_ctx *c = test_open(1, NULL);
    template_make_dir();
    template_write(c, "tokenizer_config.json",
                   "{\"eos_token\": \"<E>\", \"chat_template\": [{\"name\": \"default\", "
                   "\"template\": \"{% for m in messages %}{{ m.content }}{% endfor %}\"}, "
                   "{\"name\": \"tool_use\", \"template\": \"{{ tools }}\"}]}");
    test_memory_sweep(template_work, chat);
    test_memory_sweep(template_work, paper);
    test_memory_sweep(template_work, loose);
    template_remove_dir(c);
    ptst_close(c);
}

static void suite_template(void) {
    RUN(template_paper);
    RUN(template_question);
    RUN(template_loose);
    RUN(template_families);
    RUN(template_sources);
    RUN(template_precedence);
    RUN(template_learn);
    RUN(template_model);
    RUN(template_own);
    RUN(template_bad_messages);
    RUN(template_shared);
    RUN(template_memory);
}

MAIN(template)
