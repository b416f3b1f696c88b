/* Tests of >>template. The strings of the paper's code are in golden/templates.json. */
#include "test.h"

/* The template's text for a question, or NULL. */
static const char *template_text(ptst_ctx *c, const char *name, const char *question,
                                 ptst_prompt *p) {
    ptst_template *t = ptst_template_load(c, name, NULL);
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
        CHECK_TEXT(template_text(c, name, "%s", &p), text);
        if (short_name != NULL) {
            CHECK_TEXT(template_text(c, short_name, "%s", &p), text);
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

static void suite_template(void) { RUN(template_paper); }

MAIN(template)
