/* Tests of >>json. */
#include "test.h"

static void json_walk(void) {
    static const char text[] =
        "{\"a\": [1, 2.5, -3e2], \"b\": {\"c\": null, \"d\": true}, \"e\": [], \"f\": \"x\\u00e9"
        "\\n\\uD83D\\uDE00\",\n \"a2\": {}, \"a\": \"last\"}";
    ptst_ctx *c = test_open(1, NULL);
    ptst_json *j = ptst_json_parse(c, text, sizeof text - 1, "t");
    int32_t b, k, n = 0;
    size_t size;
    CHECK(j != NULL);
    CHECK(ptst_json_size(j, 0) == 6);
    CHECK_TEXT(ptst_json_string(j, ptst_json_get(j, 0, "a"), NULL), "last");
    CHECK_TEXT(ptst_json_string(j, ptst_json_get(j, 0, "f"), &size), "x\xC3\xA9\n\xF0\x9F\x98\x80");
    CHECK(size == 8);
    b = ptst_json_get(j, 0, "b");
    CHECK(ptst_json_kind(j, ptst_json_get(j, b, "c")) == PTST_JSON_NULL);
    CHECK(ptst_json_get(j, b, "c") >= 0 && ptst_json_get(j, b, "x") == -1);
    CHECK(ptst_json_bool(j, ptst_json_get(j, b, "d"), false));
    CHECK(ptst_json_line(j, ptst_json_get(j, 0, "a2")) == 2);
    for (k = ptst_json_first(j, ptst_json_at(j, 0, 0)); k >= 0; k = ptst_json_next(j, k)) {
        n++;
    }
    CHECK(n == 0); /* 0 is an object, so ptst_json_at gives -1 */
    for (k = ptst_json_first(j, 2); k >= 0; k = ptst_json_next(j, k)) {
        n++;
    }
    CHECK(n == 3);
    CHECK(ptst_json_number(j, ptst_json_at(j, 2, 2), 0) == -300);
    CHECK(ptst_json_at(j, 2, 3) == -1);
    CHECK(ptst_json_first(j, ptst_json_get(j, 0, "e")) == -1);
    ptst_json_free(c, j);
    ptst_close(c);
}

/* Lines are counted over indentation of any width, also where the text ends in it. */
static void json_indents(void) {
    ptst_ctx *c = test_open(1, NULL);
    int k;
    for (k = 0; k < 70; k++) {
        char text[400];
        int n = snprintf(text, sizeof text, "[\n%*s\n%*s1\n%*s,\r\n%*s\t2]\n%*s", k, "", k, "", k,
                         "", k, "", k, "");
        ptst_json *j = ptst_json_parse(c, text, (size_t)n, "indents");
        CHECK(j != NULL && ptst_json_size(j, 0) == 2);
        CHECK(ptst_json_line(j, 1) == 3 && ptst_json_line(j, 2) == 5);
        ptst_json_free(c, j);
        n = snprintf(text, sizeof text, "[1,\n%*s", k, "");
        CHECK(ptst_json_parse(c, text, (size_t)n, "cut") == NULL);
        CHECK(strncmp(ptst_error_text(c), "cut: line 2:", 12) == 0);
    }
    ptst_close(c);
}

static void json_refuses(void) {
    static const char *const bad[] = {
        "",          "{",        "[1,]",      "{\"a\":1,}", "[1 2]",      "{\"a\" 1}", "{a:1}",
        "01",        "-",        "1.",        ".5",         "1e",         "+1",        "nul",
        "\"",        "\"\\x\"",  "\"\\u12\"", "\"\\ud800\"", "\"\\udc00\"", "\"\n\"",    "\"\xff\"",
        "[1]]",      "{}{}",     "[",         "]",          "'a'",        "NaN",       "\xEF\xBB\xBF{}",
        "\"\\ud800\\u0041\"", "[,1]", "{\"a\":}", "tru", "[1", "{\"a\":1", "\"\\", "\"\\u", "1 x"};
    ptst_ctx *c = test_open(1, NULL);
    size_t i;
    char *deep = (char *)malloc(200000);
    for (i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        ptst_json *j = ptst_json_parse(c, bad[i], strlen(bad[i]), "bad");
        if (j != NULL) {
            fprintf(stderr, "accepted: %s\n", bad[i]);
            CHECK(false);
        }
        CHECK(ptst_error_code(c) == PTST_ERR_FORMAT);
        CHECK(strncmp(ptst_error_text(c), "bad: line ", 10) == 0);
    }
    memset(deep, '[', 200000);
    CHECK(ptst_json_parse(c, deep, 200000, "deep") == NULL);
    CHECK(ptst_error_code(c) == PTST_ERR_LIMIT);
    free(deep);
    ptst_close(c);
}

static void json_quotes(void) {
    ptst_ctx *c = test_open(1, NULL);
    ptst_text t = {NULL, 0, 0};
    ptst__json_quote(c, &t, "a\"\\\n\x01\xC3\xA9\xff/", 9);
    CHECK_TEXT(t.data, "\"a\\\"\\\\\\n\\u0001\xC3\xA9\xEF\xBF\xBD/\"");
    t.size = 0;
    ptst__json_put_number(c, &t, 0.0 / 1);
    ptst__json_put_number(c, &t, HUGE_VAL);
    CHECK_TEXT(t.data, "0null");
    ptst_text_free(c, &t);
    ptst_close(c);
}

static ptst_code json_work(ptst_ctx *c, void *arg) {
    static const char text[] = "{\"a\": [1, 2, 3, [4, 5, 6, [7, 8, 9, 10, 11, 12, 13, 14]], {}]}";
    ptst_json *j = ptst_json_parse(c, text, sizeof text - 1, "t");
    (void)arg;
    if (j == NULL) {
        return ptst_error_code(c);
    }
    ptst_json_free(c, j);
    return PTST_OK;
}

static void json_out_of_memory(void) { test_memory_sweep(json_work, NULL); }

static void suite_json(void) {
    RUN(json_walk);
    RUN(json_indents);
    RUN(json_refuses);
    RUN(json_quotes);
    RUN(json_out_of_memory);
}

MAIN(json)
