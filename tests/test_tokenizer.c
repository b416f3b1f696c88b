/* Tests of >>unicode and >>tokenizer: ids and text recorded from Hugging Face tokenizers, marks,
   limits, files that are wrong, no memory. */
#include "test.h"

/* ---- unicode ---- */

static void tok_categories(void) {
    CHECK(ptst__is_letter('a') && ptst__is_letter(0xE9) && ptst__is_letter(0x4F60));
    CHECK(ptst__is_letter(0x2070E) && !ptst__is_letter('1') && !ptst__is_letter(0x0301));
    CHECK(ptst__is_number('7') && ptst__is_number(0x0661) && ptst__is_number(0x2167));
    CHECK(ptst__is_number(0xBD) && !ptst__is_number('x') && !ptst__is_number(0x10FFFF));
    CHECK(ptst__is_space(0xA0) && ptst__is_space(0x3000) && ptst__is_space(0x85));
    CHECK(!ptst__is_space(0x200B) && !ptst__is_space('a'));
}

static void tok_nfc(void) {
    static const char *const cases[][2] = {
        {"e\xCC\x81", "\xC3\xA9"},
        {"a\xCC\x88\xCC\xA3", "\xE1\xBA\xA1\xCC\x88"}, /* marks are ordered, then composed */
        {"\xE1\x84\x92\xE1\x85\xA1\xE1\x86\xAB", "\xED\x95\x9C"}, /* Hangul */
        {"\xE2\x84\xAB", "\xC3\x85"},                             /* the sign for angstrom */
        {"plain", "plain"},
        {"", ""}};
    ptst_ctx *c = test_open(1, NULL);
    size_t i;
    for (i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        ptst_text out = {NULL, 0, 0};
        CHECK(ptst_text_append(c, &out, "", 0) == PTST_OK);
        CHECK(ptst__unicode_normal(c, cases[i][0], strlen(cases[i][0]), true, false,
                                   &out) == PTST_OK);
        CHECK_TEXT(out.data, cases[i][1]);
        ptst_text_free(c, &out);
    }
    ptst_close(c);
}

/* ---- against the recorded ids ---- */

static bool tok_same(const ptst_json *j, int32_t array, const ptst_ids *ids) {
    size_t i = 0;
    int32_t k;
    if (ptst_json_size(j, array) != ids->count) {
        return false;
    }
    for (k = ptst_json_first(j, array); k >= 0; k = ptst_json_next(j, k)) {
        if ((int32_t)ptst_json_number(j, k, -1) != ids->data[i++]) {
            return false;
        }
    }
    return true;
}

/* One text: [ids with special tokens, ids without, decoded text]. */
static bool tok_case(ptst_ctx *c, const ptst_tokenizer *t, const ptst_json *j, int32_t text,
                     int32_t row) {
    size_t size = 0, wanted_size = 0;
    const char *s = ptst_json_string(j, text, &size);
    const char *wanted = ptst_json_string(j, ptst_json_at(j, row, 2), &wanted_size);
    ptst_ids with = {NULL, 0, 0}, without = {NULL, 0, 0};
    ptst_text out = {NULL, 0, 0};
    bool good = ptst_encode(c, t, s, size, PTST_ADD_SPECIAL, &with) == PTST_OK &&
                ptst_encode(c, t, s, size, 0, &without) == PTST_OK &&
                ptst_decode(c, t, with.data, with.count, PTST_SKIP_SPECIAL, &out) == PTST_OK &&
                tok_same(j, ptst_json_at(j, row, 0), &with) &&
                tok_same(j, ptst_json_at(j, row, 1), &without) && out.size == wanted_size &&
                memcmp(out.size == 0 ? "" : out.data, wanted, wanted_size) == 0;
    ptst_ids_free(c, &with);
    ptst_ids_free(c, &without);
    ptst_text_free(c, &out);
    return good;
}

static void tok_golden(const char *name, const char *path) {
    ptst_ctx *c;
    ptst_json *j;
    ptst_tokenizer *t;
    int32_t text, row;
    size_t cases = 0;
    if (ptst__path_kind(path) != 1) {
        SKIP(path);
    }
    c = test_open(1, NULL);
    j = ptst_json_load(c, "tests/golden/tokenizer.json");
    t = ptst_tokenizer_load(c, path);
    CHECK(j != NULL && t != NULL);
    text = ptst_json_first(j, ptst_json_get(j, 0, "texts"));
    row = ptst_json_first(j, ptst_json_get(j, ptst_json_get(j, 0, "cases"), name));
    for (; t != NULL && text >= 0 && row >= 0; cases++) {
        if (!tok_case(c, t, j, text, row)) {
            fprintf(stderr, "%s, text %d: \"%s\"\n", name, (int)cases,
                    ptst_json_string(j, text, NULL));
            CHECK(false);
        }
        text = ptst_json_next(j, text);
        row = ptst_json_next(j, row);
    }
    CHECK(cases == ptst_json_size(j, ptst_json_get(j, 0, "texts")));
    ptst_tokenizer_free(c, t);
    ptst_json_free(c, j);
    ptst_close(c);
}

static const char tok_stories[] = "tests/golden/stories260K/tokenizer.json";

static void tok_golden_stories260k(void) {
    tok_golden("stories260K", tok_stories);
}
#define TOK_SHARED(function, name)                                                                 \
    static void function(void) {                                                                   \
        tok_golden(name, "../shared/tokenizers/" name "/tokenizer.json");                          \
    }
TOK_SHARED(tok_golden_gpt2, "gpt2")
TOK_SHARED(tok_golden_qwen, "qwen2.5")
TOK_SHARED(tok_golden_llama2, "llama2")
TOK_SHARED(tok_golden_llama3, "llama3")
TOK_SHARED(tok_golden_mistral, "mistral-v1")
TOK_SHARED(tok_golden_phi2, "phi-2")
TOK_SHARED(tok_golden_phi3, "phi-3-mini")
TOK_SHARED(tok_golden_falcon, "falcon")
TOK_SHARED(tok_golden_roberta, "roberta-base")

/* ---- tokenizers put together at random by tools/tokenizer_fuzz.py ---- */

/* Texts of one of them: ids without and with special tokens, and the text of the latter. */
static bool tok_mix(ptst_ctx *c, const ptst_json *j, int32_t node) {
    size_t size = 0;
    const char *json = ptst_json_string(j, ptst_json_get(j, node, "tokenizer"), &size);
    ptst_tokenizer *t = ptst_tokenizer_parse(c, json, size, "mix");
    int32_t text = ptst_json_first(j, ptst_json_get(j, node, "texts"));
    int32_t plain = ptst_json_first(j, ptst_json_get(j, node, "ids"));
    int32_t special = ptst_json_first(j, ptst_json_get(j, node, "special"));
    int32_t decoded = ptst_json_first(j, ptst_json_get(j, node, "decoded"));
    bool good = t != NULL && text >= 0;
    for (; good && text >= 0; text = ptst_json_next(j, text)) {
        ptst_ids with = {NULL, 0, 0}, without = {NULL, 0, 0};
        ptst_text out = {NULL, 0, 0};
        size_t wanted_size = 0;
        const char *s = ptst_json_string(j, text, &size);
        const char *wanted = ptst_json_string(j, decoded, &wanted_size);
        good = ptst_encode(c, t, s, size, PTST_ADD_SPECIAL, &with) == PTST_OK &&
               ptst_encode(c, t, s, size, 0, &without) == PTST_OK &&
               ptst_decode(c, t, with.data, with.count, PTST_SKIP_SPECIAL, &out) == PTST_OK &&
               tok_same(j, special, &with) && tok_same(j, plain, &without) &&
               out.size == wanted_size && memcmp(out.data, wanted, wanted_size) == 0;
        if (!good) {
            fprintf(stderr, "\"%s\" gives \"%s\", expected \"%s\" with\n%.2000s\n", s, out.data,
                    wanted, strstr(json, "\"normalizer\""));
        }
        ptst_ids_free(c, &with);
        ptst_ids_free(c, &without);
        ptst_text_free(c, &out);
        plain = ptst_json_next(j, plain);
        special = ptst_json_next(j, special);
        decoded = ptst_json_next(j, decoded);
    }
    ptst_tokenizer_free(c, t);
    return good;
}

static void tok_golden_mixes(void) {
    ptst_ctx *c = test_open(1, NULL);
    ptst_json *j = ptst_json_load(c, "tests/golden/tokenizer_mixes.json");
    int32_t node;
    CHECK(j != NULL && ptst_json_size(j, 0) >= 50);
    for (node = ptst_json_first(j, 0); j != NULL && node >= 0; node = ptst_json_next(j, node)) {
        CHECK(tok_mix(c, j, node));
    }
    ptst_json_free(c, j);
    ptst_close(c);
}

/* ---- patterns ---- */

/* Where a pattern matches in a text, as "start-end ..." ; what Oniguruma finds. */
static void tok_find(const char *pattern, const char *text, const char *expected) {
    ptst_ctx *c = test_open(1, NULL);
    ptst__arena arena = {NULL};
    ptst__regex *x = ptst__regex_make(c, &arena, "t", pattern, strlen(pattern), PTST__REGEX_PATTERN);
    size_t from = 0, last = SIZE_MAX, end;
    char got[300] = "";
    CHECK(x != NULL);
    while (x != NULL && strlen(got) < 250 &&
           (end = ptst__regex_search(x, text, strlen(text), &from, last)) != SIZE_MAX) {
        snprintf(got + strlen(got), sizeof got - strlen(got), "%d-%d ", (int)from, (int)end);
        from = last = end;
    }
    CHECK_TEXT(got, expected);
    ptst__arena_free(c, &arena);
    ptst_close(c);
}

static void tok_patterns(void) {
    tok_find("a|ab", "ab", "0-1 ");          /* the first alternative, not the longest */
    tok_find("(a|ab)(c|bcd)?", "abcd", "0-4 ");
    tok_find("a+?b*", "aab", "0-1 1-3 ");
    tok_find("a{2,3}", "aaaaa", "0-3 3-5 ");
    tok_find("a{,2}b", "aaab", "1-4 ");
    tok_find("x*", "axb", "0-0 1-2 3-3 ");
    tok_find("\\s+(?!\\S)|\\s+", "a   b ", "1-3 3-4 5-6 ");
    tok_find("(?i:'LL|'s)", "'ll'S'\xC5\xBF", "0-3 3-5 5-8 ");
    tok_find("[^\\r\\n\\p{L}\\p{N}]?+\\p{L}++", " ab.c1", "0-3 3-5 ");
    tok_find("a*+a", "aaa", ""); /* possessive: nothing is given back */
    tok_find("[a-z&&[^aeiou]]+", "hello", "0-1 2-4 ");
    tok_find("[(\\s|[.,])]+", "a (.|b", "1-5 ");
    tok_find("\\p{Han}+|\\p{^L}", "\xE4\xB8\xAD\xE6\x96\x87" "a1", "0-6 7-8 ");
    tok_find("\\x{4e2d}|\\u0061|\\x41", "Aa\xE4\xB8\xAD", "0-1 1-2 2-5 ");
    tok_find("(a*)*b", "aaab", "0-4 ");
    tok_find("a{x}", "a{x}", "0-4 "); /* a brace that begins no repeat */
}

static void tok_patterns_refused(void) {
    static const char *const cases[][2] = {
        {"(", ")"}, {")", "parenthesis"}, {"[a", "]"}, {"a**b(?<=x)", "group"}, {"^a", "anchor"},
        {"a$", "anchor"}, {"(?=ab)", "lookahead"}, {"(ab)++", "possessive"}, {"\\p{Klingon}", "property"},
        {"\\p", "name"}, {"\\b", "escape"}, {"\\1", "escape"}, {"[z-a]", "backwards"}, {"*", "repeat"},
        {"(?i:\xC3\xA9)", "(?i)"}, {"[[:alpha:]]", "[:name:]"}, {"a{2}?", "{n}?"}, {"a{3,2}", "repeats"},
        {"(?>a)", "group"}, {"\\x{110000}", "hexadecimal"}, {"((((((((((a{99}){99}){99}))))))))", "long"},
        {"(a|b)*a(a|b)(a|b)(a|b)(a|b)(a|b)(a|b)(a|b)(a|b)(a|b)(a|b)(a|b)(a|b)(a|b)", "states"}};
    ptst_ctx *c = test_open(1, NULL);
    char deep[400];
    size_t i;
    for (i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        ptst__arena arena = {NULL};
        CHECK(ptst__regex_make(c, &arena, "t", cases[i][0], strlen(cases[i][0]),
                               PTST__REGEX_PATTERN) == NULL);
        if (strstr(ptst_error_text(c), cases[i][1]) == NULL) {
            fprintf(stderr, "%s: %s\n", cases[i][0], ptst_error_text(c));
            CHECK(false);
        }
        ptst__arena_free(c, &arena);
    }
    for (i = 0; i < 2; i++) { /* brackets a hundred deep */
        ptst__arena arena = {NULL};
        memset(deep, i == 0 ? '(' : '[', 300);
        CHECK(ptst__regex_make(c, &arena, "t", deep, 300, PTST__REGEX_PATTERN) == NULL);
        ptst__arena_free(c, &arena);
    }
    ptst_close(c);
}

/* ---- special tokens and marks ---- */

static size_t tok_count(ptst_ctx *c, const ptst_tokenizer *t, const char *text,
                        const uint8_t *marks, unsigned flags, int32_t id) {
    ptst_ids ids = {NULL, 0, 0};
    size_t i, n = 0;
    CHECK(ptst_encode_marked(c, t, text, strlen(text), marks, flags, &ids) == PTST_OK);
    for (i = 0; i < ids.count; i++) {
        n += ids.data[i] == id;
    }
    ptst_ids_free(c, &ids);
    return n;
}

/* "a</s>b": a special token if all its bytes come from the template, text otherwise. */
static void tok_marks(void) {
    ptst_ctx *c = test_open(1, NULL);
    ptst_tokenizer *t = ptst_tokenizer_load(c, tok_stories);
    uint8_t marks[6] = {0, 0, 0, 0, 0, 0};
    int i;
    CHECK(t != NULL);
    CHECK(tok_count(c, t, "a</s>b", NULL, 0, 2) == 1);
    CHECK(tok_count(c, t, "a</s>b", marks, 0, 2) == 1);
    CHECK(tok_count(c, t, "a</s>b", NULL, PTST_PLAIN, 2) == 0);
    for (i = 1; i < 5; i++) {
        marks[i] = 1;
        CHECK(tok_count(c, t, "a</s>b", marks, 0, 2) == 0);
        marks[i] = 0;
    }
    marks[0] = marks[5] = 1;
    CHECK(tok_count(c, t, "a</s>b", marks, 0, 2) == 1);
    CHECK(tok_count(c, t, "", NULL, PTST_ADD_SPECIAL, 1) == 1);
    ptst_tokenizer_free(c, t);
    ptst_close(c);
}

static void tok_lookup(void) {
    ptst_ctx *c = test_open(1, NULL);
    ptst_tokenizer *t = ptst_tokenizer_load(c, tok_stories);
    static const int32_t strange[] = {-1, 1 << 30, 1, INT32_MAX, INT32_MIN};
    ptst_text out = {NULL, 0, 0};
    int32_t i;
    CHECK(t != NULL && ptst_vocab_size(t) == 512);
    CHECK(ptst_token_id(t, "<s>") == 1 && ptst_token_id(t, "no such token") == -1);
    CHECK(ptst_token_text(t, -1, NULL) == NULL && ptst_token_text(t, 512, NULL) == NULL);
    for (i = 0; i < 512; i++) {
        const char *s = ptst_token_text(t, i, NULL);
        CHECK(s != NULL && ptst_token_id(t, s) == i);
    }
    CHECK(ptst_decode(c, t, strange, 5, PTST_SKIP_SPECIAL, &out) == PTST_OK && out.size == 0);
    ptst_text_free(c, &out);
    ptst_tokenizer_free(c, t);
    ptst_close(c);
}

/* A million letters without a blank: one word for the model; joined in n log n. */
static void tok_long_word(void) {
    enum { SIZE = 1000000 };
    ptst_ctx *c = test_open(1, NULL);
    ptst_tokenizer *t = ptst_tokenizer_load(c, tok_stories);
    char *text = (char *)malloc(SIZE);
    ptst_ids ids = {NULL, 0, 0};
    ptst_text out = {NULL, 0, 0};
    ptst_rng r = {1, 2, 0};
    size_t i;
    CHECK(t != NULL && text != NULL);
    for (i = 0; i < SIZE; i++) {
        text[i] = (char)('a' + ptst_rng_u32(&r) % 26);
    }
    CHECK(ptst_encode(c, t, text, SIZE, 0, &ids) == PTST_OK && ids.count > SIZE / 10);
    CHECK(ptst_decode(c, t, ids.data, ids.count, 0, &out) == PTST_OK && out.size == SIZE);
    CHECK(out.size == SIZE && memcmp(out.data, text, SIZE) == 0);
    ptst_ids_free(c, &ids);
    ptst_text_free(c, &out);
    free(text);
    ptst_tokenizer_free(c, t);
    ptst_close(c);
}

/* Bytes that are no UTF-8 count as U+FFFD; nothing is lost around them. */
static void tok_broken_text(void) {
    ptst_ctx *c = test_open(1, NULL);
    ptst_tokenizer *t = ptst_tokenizer_load(c, tok_stories);
    ptst_ids ids = {NULL, 0, 0};
    ptst_text out = {NULL, 0, 0};
    static const char text[] = "one \xFF two \xC3";
    CHECK(ptst_encode(c, t, text, sizeof text - 1, 0, &ids) == PTST_OK);
    CHECK(ptst_decode(c, t, ids.data, ids.count, 0, &out) == PTST_OK);
    CHECK_TEXT(out.data, "one \xEF\xBF\xBD two \xEF\xBF\xBD");
    ptst_ids_free(c, &ids);
    ptst_text_free(c, &out);
    ptst_tokenizer_free(c, t);
    ptst_close(c);
}

/* ---- parts of the pre-tokenizer ---- */

#define TOK_DIGITS                                                                                 \
    "\"model\":{\"type\":\"BPE\",\"vocab\":{\"1\":0,\"2\":1,\"12\":2,\"a\":3,\"1a\":4},\"merges\":"        \
    "[\"1 2\",\"1 a\"]}"
#define TOK_LEVEL "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"use_regex\":false}"

static void tok_check_ids(const char *json, const char *text, const char *expected) {
    ptst_ctx *c = test_open(1, NULL);
    ptst_tokenizer *t = ptst_tokenizer_parse(c, json, strlen(json), "t.json");
    ptst_ids ids = {NULL, 0, 0};
    char got[200] = "";
    size_t i;
    CHECK(t != NULL && ptst_encode(c, t, text, strlen(text), 0, &ids) == PTST_OK);
    for (i = 0; i < ids.count; i++) {
        snprintf(got + strlen(got), sizeof got - strlen(got), "%d ", (int)ids.data[i]);
    }
    CHECK_TEXT(got, expected);
    ptst_ids_free(c, &ids);
    ptst_tokenizer_free(c, t);
    ptst_close(c);
}

/* SmolLM and StarCoder cut at digits before ByteLevel; HF tokenizers gave these ids. */
static void tok_digits(void) {
    tok_check_ids("{" TOK_DIGITS ",\"pre_tokenizer\":" TOK_LEVEL "}", "121a", "2 4 ");
    tok_check_ids("{" TOK_DIGITS ",\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":[{"
                  "\"type\":\"Digits\",\"individual_digits\":false}," TOK_LEVEL "]}}",
                  "121a", "2 0 3 ");
    tok_check_ids("{" TOK_DIGITS ",\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":[{"
                  "\"type\":\"Digits\",\"individual_digits\":true}," TOK_LEVEL "]}}",
                  "121a", "0 1 0 3 ");
}

/* Gemma cuts at blanks that its normalizer has replaced: one word, so a merge reaches across. */
static void tok_idle_split(void) {
    tok_check_ids("{\"normalizer\":{\"type\":\"Replace\",\"pattern\":{\"String\":\" \"},\"content\":"
                  "\"_\"},\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"String\":\" \"},"
                  "\"behavior\":\"MergedWithPrevious\",\"invert\":false},\"model\":{\"type\":\"BPE\","
                  "\"vocab\":{\"a\":0,\"_\":1,\"_a\":2},\"merges\":[\"_ a\"]}}",
                  "a a", "0 2 ");
}

#define TOK_BPE "\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1,\"ab\":2},\"merges\":[\"a b\"]}"
#define TOK_ADDED(id, text, rest) "{\"id\":" id ",\"content\":\"" text "\"" rest "}"

/* Whatever id the file gives to an added token, it gets that of the same text, or the next one: HF
   tokenizers gave these ids. */
static void tok_added_ids(void) {
    ptst_ctx *c;
    ptst_tokenizer *t;
    static const char json[] =
        "{\"added_tokens\":[" TOK_ADDED("7", "<x>", "") "," TOK_ADDED("5", "<y>", "") "," TOK_ADDED(
            "1", "<z>", "") "," TOK_ADDED("9", "b", "") "]," TOK_BPE "}";
    static const int32_t ids[] = {3, 4, 5};
    ptst_text out = {NULL, 0, 0};
    tok_check_ids(json, "ab<x>b<y><z>", "0 1 3 1 4 5 ");
    c = test_open(1, NULL);
    t = ptst_tokenizer_parse(c, json, sizeof json - 1, "t.json");
    CHECK(t != NULL && ptst_vocab_size(t) == 6 && ptst_token_id(t, "<z>") == 5);
    CHECK(ptst_decode(c, t, ids, 3, 0, &out) == PTST_OK);
    CHECK_TEXT(out.data, "<x> <y> <z>");
    ptst_text_free(c, &out);
    ptst_tokenizer_free(c, t);
    ptst_close(c);
}

/* Both spellings of merges, and the first line of a merges.txt among them. */
static void tok_merge_spellings(void) {
    static const char vocab[] = "{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1,\"ab\":2,"
                                "\"c d\":3,\"abc d\":4,\"c\":5,\"d\":6,\" \":7,\"c \":8},\"merges\":";
    static const char *const merges[] = {
        "[\"a b\"]", "[[\"a\",\"b\"]]", "[ [ \"a\" , \"\\u0062\" ] ]", "[\"#version: 0.2\",\"a b\"]"};
    char json[400];
    size_t i;
    for (i = 0; i < sizeof merges / sizeof *merges; i++) {
        snprintf(json, sizeof json, "%s%s}}", vocab, merges[i]);
        tok_check_ids(json, "aab", "0 2 ");
    }
    snprintf(json, sizeof json, "%s[[\"a\",\"b\"],[\"c\",\" \"],[\"c \",\"d\"],[\"ab\",\"c d\"]]}}",
             vocab); /* blanks inside tokens */
    tok_check_ids(json, "abc d", "4 ");
    tok_check_ids("{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1,\"c\":2,\"bc\":3,\"ab\":4,"
                  "\"ab\":5},\"merges\":[\"b c\",\"a b\"]}}",
                  "abbc", "5 3 "); /* of two equal keys the last one counts */
}

/* ---- many merges: several tasks ----
   All texts of one to three letters. Merges: all pairs, the triples (a pair and a letter) in an
   order of their own with a comment among them, and once more the pair "a b", which counts. */

enum { TOK_PAIRS = 26 * 26, TOK_TRIPLES = 26 * 26 * 26 };

static int tok_triple_place(int i) { /* of a triple among the triples */
    return i * 7919 % TOK_TRIPLES;
}

static void tok_triple_text(char *to, int i, const char *between) {
    snprintf(to, 16, "%c%c%s%c", 'a' + i / 676, 'a' + i / 26 % 26, between, 'a' + i % 26);
}

/* bad: the merges at this place and later ones are wrong; -1 = none. */
static char *tok_many_json(int bad) {
    char *json = (char *)malloc(1 << 20), *to = json, text[16];
    int *order = (int *)malloc(TOK_TRIPLES * sizeof *order), i;
    to += sprintf(to, "{\"model\":{\"type\":\"BPE\",\"vocab\":{");
    for (i = 0; i < 26; i++) {
        to += sprintf(to, "\"%c\":%d,", 'a' + i, i);
    }
    for (i = 0; i < TOK_PAIRS; i++) {
        to += sprintf(to, "\"%c%c\":%d,\n", 'a' + i / 26, 'a' + i % 26, 26 + i);
    }
    for (i = 0; i < TOK_TRIPLES; i++) {
        order[tok_triple_place(i)] = i;
        tok_triple_text(text, i, "");
        to += sprintf(to, "%s\n         \"%s\":%d", i == 0 ? "" : ",", text, 26 + TOK_PAIRS + i);
    }
    to += sprintf(to, "},\"merges\":[");
    for (i = 0; i < TOK_PAIRS; i++) {
        to += sprintf(to, "\"%c %c\",", 'a' + i / 26, 'a' + i % 26);
    }
    for (i = 0; i < TOK_TRIPLES; i++) {
        tok_triple_text(text, order[i], bad == i ? "!" : bad >= 0 && i > bad ? "" : " ");
        to += sprintf(to, "\"%s\",%s", text, i == 5000 ? "\"#version: 0.2\"," : "");
    }
    sprintf(to, "\"a b\"]}}");
    free(order);
    return json;
}

/* Rank of the merge of two texts of one or two letters and of one letter; -1 = no merge. */
static int tok_many_rank(const char *a, size_t n, const char *b, size_t m) {
    if (n > 2 || m != 1) {
        return -1;
    }
    if (n == 1) {
        return a[0] == 'a' && b[0] == 'b' ? TOK_PAIRS + TOK_TRIPLES : (a[0] - 'a') * 26 + b[0] - 'a';
    }
    return TOK_PAIRS +
           tok_triple_place((a[0] - 'a') * 676 + (a[1] - 'a') * 26 + b[0] - 'a');
}

/* BPE as it is defined: again and again the first one of the merges of lowest rank. */
static size_t tok_many_encode(const char *s, size_t n, int32_t *ids) {
    size_t size[64], count = n, i, at, best;
    for (i = 0; i < n; i++) {
        size[i] = 1;
    }
    for (;;) {
        int rank, least = -1;
        for (i = at = best = 0; i + 1 < count; at += size[i], i++) {
            rank = tok_many_rank(s + at, size[i], s + at + size[i], size[i + 1]);
            if (rank >= 0 && (least < 0 || rank < least)) {
                least = rank;
                best = i;
            }
        }
        if (least < 0) {
            break;
        }
        size[best] += size[best + 1];
        memmove(size + best + 1, size + best + 2, (count - best - 2) * sizeof *size);
        count--;
    }
    for (i = at = 0; i < count; at += size[i], i++) {
        const char *t = s + at;
        ids[i] = size[i] == 1   ? t[0] - 'a'
                 : size[i] == 2 ? 26 + (t[0] - 'a') * 26 + t[1] - 'a'
                                : 26 + TOK_PAIRS + (t[0] - 'a') * 676 + (t[1] - 'a') * 26 + t[2] - 'a';
    }
    return count;
}

static void tok_many_merges(void) {
    int threads, round;
    for (threads = 1; threads <= 3; threads += 2) {
        ptst_ctx *c = test_open(threads, NULL);
        char *json = tok_many_json(-1), *wrong = tok_many_json(9000), says[16];
        ptst_tokenizer *t = ptst_tokenizer_parse(c, json, strlen(json), "t.json");
        ptst_ids ids = {NULL, 0, 0};
        uint32_t random = 1;
        int i;
        CHECK(t != NULL);
        for (round = 0; round < 200 && t != NULL; round++) {
            char text[64];
            int32_t expected[64];
            size_t n = 1 + (size_t)round % 60, k;
            for (k = 0; k < n; k++) {
                random = random * 1664525u + 1013904223u;
                text[k] = (char)('a' + (random >> 16) % (round % 3 == 0 ? 3 : 26));
            }
            ids.count = 0;
            CHECK(ptst_encode(c, t, text, n, 0, &ids) == PTST_OK);
            k = tok_many_encode(text, n, expected);
            CHECK(ids.count == k && memcmp(ids.data, expected, k * sizeof *expected) == 0);
        }
        CHECK(ptst_tokenizer_parse(c, wrong, strlen(wrong), "t.json") == NULL);
        for (i = 0; tok_triple_place(i) != 9000; i++) {
        }
        tok_triple_text(says, i, "!"); /* the first one that is wrong, as it stands there */
        CHECK(strstr(ptst_error_text(c), "a pair was expected") != NULL);
        CHECK(strstr(ptst_error_text(c), says) != NULL);
        ptst_ids_free(c, &ids);
        ptst_tokenizer_free(c, t);
        ptst_close(c);
        free(json);
        free(wrong);
    }
}

/* ---- files that are wrong ---- */


static void tok_refusals(void) {
    static const struct {
        const char *json, *says;
        ptst_code code;
    } cases[] = {
        {"[]", "an object", PTST_ERR_FORMAT},
        {"{}", "BPE", PTST_ERR_FORMAT},
        {"{\"model\":{\"type\":\"Unigram\"}}", "Unigram", PTST_ERR_UNSUPPORTED},
        {"{\"model\":{\"type\":\"WordPiece\"}}", "WordPiece", PTST_ERR_UNSUPPORTED},
        {"{\"model\":{\"type\":\"WordLevel\"}}", "WordLevel", PTST_ERR_UNSUPPORTED},
        {"{\"model\":{\"unk_id\":0,\"vocab\":[[\"a\",-1.5]]}}", "Unigram", PTST_ERR_UNSUPPORTED},
        {"{\"model\":{\"max_input_chars_per_word\":9,\"vocab\":{}}}", "WordPiece",
         PTST_ERR_UNSUPPORTED},
        {"{\"model\":{\"unk_token\":\"a\",\"vocab\":{\"a\":0}}}", "WordLevel",
         PTST_ERR_UNSUPPORTED},
        {"{\"model\":{\"type\":\"BPE\"}}", "vocab", PTST_ERR_FORMAT},
        {"{\"model\":{\"type\":\"BPE\",\"vocab\":{},\"merges\":3}}", "merges", PTST_ERR_FORMAT},
        {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":-1},\"merges\":[]}}", "a", PTST_ERR_FORMAT},
        {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":1e18},\"merges\":[]}}", "a",
         PTST_ERR_FORMAT},
        {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":\"x\"},\"merges\":[]}}", "a",
         PTST_ERR_FORMAT},
        {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0},\"merges\":[\"a\"]}}", "merge",
         PTST_ERR_FORMAT},
        {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0},\"merges\":[[\"a\"]]}}", "merge",
         PTST_ERR_FORMAT},
        {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0},\"merges\":[\"a z\"]}}", "merge",
         PTST_ERR_FORMAT},
        {"{\"model\":{\"type\":\"BPE\",\"dropout\":0.1,\"vocab\":{},\"merges\":[]}}", "dropout",
         PTST_ERR_UNSUPPORTED},
        {"{" TOK_BPE ",\"normalizer\":{\"type\":\"Precompiled\"}}", "Precompiled",
         PTST_ERR_UNSUPPORTED},
        {"{" TOK_BPE ",\"pre_tokenizer\":{\"type\":\"BertPreTokenizer\"}}", "BertPreTokenizer",
         PTST_ERR_UNSUPPORTED},
        {"{" TOK_BPE ",\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"Regex\":\"(\"},"
         "\"behavior\":\"Isolated\"}}",
         "Split", PTST_ERR_UNSUPPORTED},
        {"{" TOK_BPE ",\"pre_tokenizer\":{\"type\":\"Split\",\"pattern\":{\"String\":\" \"},"
         "\"behavior\":\"Merged\"}}",
         "MergedWithPrevious", PTST_ERR_FORMAT},
        {"{" TOK_BPE ",\"pre_tokenizer\":{\"type\":\"Split\",\"behavior\":\"Isolated\"}}",
         "a pattern was expected", PTST_ERR_FORMAT},
        {"{" TOK_BPE ",\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":"
         "\"ByteLevel\"},{\"type\":\"Metaspace\",\"replacement\":\"_\"}]}}",
         "behind ByteLevel", PTST_ERR_UNSUPPORTED},
        {"{" TOK_BPE ",\"decoder\":{\"type\":\"WordPiece\"}}", "WordPiece", PTST_ERR_UNSUPPORTED},
        {"{" TOK_BPE ",\"post_processor\":{\"type\":\"BertProcessing\"}}", "BertProcessing",
         PTST_ERR_UNSUPPORTED},
        {"{" TOK_BPE ",\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[{"
         "\"SpecialToken\":{\"id\":\"<s>\"}}],\"special_tokens\":{\"<s>\":{\"ids\":[77]}}}}",
         "post_processor", PTST_ERR_FORMAT},
        {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b c\":1,\"ab c\":2},\"merges\":[\"a b c\"]}}",
         "a pair", PTST_ERR_FORMAT},
        {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0},\"merges\":[[\"a\",\"a\",\"a\"]]}}", "merge",
         PTST_ERR_FORMAT},
        {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0},\"merges\":[[\"a\",1]]}}", "merge",
         PTST_ERR_FORMAT},
        {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":0},\"merges\":[]}}", "one id",
         PTST_ERR_FORMAT},
        {"{" TOK_BPE ",\"added_tokens\":[{\"id\":-5,\"content\":\"x\"}]}", "id", PTST_ERR_FORMAT}};
    ptst_ctx *c = test_open(1, NULL);
    size_t i;
    for (i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        ptst_tokenizer *t = ptst_tokenizer_parse(c, cases[i].json, strlen(cases[i].json), "t.json");
        if (t != NULL || ptst_error_code(c) != cases[i].code ||
            strncmp(ptst_error_text(c), "t.json", 6) != 0 ||
            strstr(ptst_error_text(c), cases[i].says) == NULL) {
            fprintf(stderr, "%s: %s\n", cases[i].json,
                    t != NULL ? "was accepted" : ptst_error_text(c));
            CHECK(false);
        }
        ptst_tokenizer_free(c, t);
    }
    {
        static const char json[] = "{" TOK_BPE ",\"truncation\":{\"max_length\":5},\"padding\":null}";
        ptst_tokenizer *t = ptst_tokenizer_parse(c, json, sizeof json - 1, "t.json");
        CHECK(t != NULL);
        CHECK_TEXT(ptst_tokenizer_notes(t), "truncation");
        ptst_tokenizer_free(c, t);
    }
    { /* an unk_token that is none: only a text that needs it fails */
        static const char json[] = "{\"model\":{\"type\":\"BPE\",\"unk_token\":\"<unk>\",\"vocab\":{"
                                   "\"a\":0},\"merges\":[]}}";
        ptst_tokenizer *t = ptst_tokenizer_parse(c, json, sizeof json - 1, "t.json");
        ptst_ids ids = {NULL, 0, 0};
        CHECK(t != NULL && ptst_encode(c, t, "aa", 2, 0, &ids) == PTST_OK && ids.count == 2);
        CHECK(ptst_encode(c, t, "ax", 2, 0, &ids) == PTST_ERR_FORMAT && ids.count == 2);
        CHECK(strstr(ptst_error_text(c), "<unk>") != NULL);
        ptst_ids_free(c, &ids);
        ptst_tokenizer_free(c, t);
    }
    CHECK(ptst_tokenizer_load(c, "/no/such/file") == NULL);
    CHECK(ptst_error_code(c) == PTST_ERR_NOT_FOUND);
    ptst_close(c);
}

/* A real file with bytes changed: refused, or loaded and then usable. */
static void tok_mutations(void) {
    ptst_ctx *c = test_open(1, NULL);
    ptst_text file = {NULL, 0, 0};
    ptst_rng r = {7, 1, 0};
    int round;
    CHECK(ptst__read_file(c, tok_stories, &file) == PTST_OK);
    for (round = 0; round < 120; round++) {
        char *copy = (char *)malloc(file.size);
        int i, changes = 1 + (int)(ptst_rng_u32(&r) % 4);
        size_t size = round % 5 == 0 ? ptst_rng_u32(&r) % file.size : file.size;
        ptst_tokenizer *t;
        memcpy(copy, file.data, file.size);
        for (i = 0; i < changes; i++) {
            static const char bytes[] = "{}[]\",:0-9eE\\u\x01\xFF n";
            size_t at = ptst_rng_u32(&r) % (round % 2 == 0 ? file.size : 2500);
            copy[at] = bytes[ptst_rng_u32(&r) % (sizeof bytes - 1)];
        }
        t = ptst_tokenizer_parse(c, copy, size, "t.json");
        if (t != NULL) {
            ptst_ids ids = {NULL, 0, 0};
            ptst_text out = {NULL, 0, 0};
            CHECK(ptst_encode(c, t, "Once upon a </s> time \xFF", 24, PTST_ADD_SPECIAL, &ids) ==
                  PTST_OK);
            CHECK(ptst_decode(c, t, ids.data, ids.count, 0, &out) == PTST_OK);
            ptst_ids_free(c, &ids);
            ptst_text_free(c, &out);
        } else {
            CHECK(ptst_error_text(c)[0] != 0);
        }
        ptst_tokenizer_free(c, t);
        free(copy);
    }
    ptst_text_free(c, &file);
    ptst_close(c);
}

/* ---- no memory ---- */

static ptst_code tok_work(ptst_ctx *c, void *arg) {
    static const char json[] =
        "{" TOK_BPE ",\"added_tokens\":[{\"id\":3,\"content\":\"<x>\",\"special\":true}],"
        "\"normalizer\":{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"NFC\"},{\"type\":\"Replace\","
        "\"pattern\":{\"Regex\":\"b{3}\"},\"content\":\"a\"}]},\"pre_tokenizer\":{\"type\":\"Sequence\","
        "\"pretokenizers\":[{\"type\":\"ByteLevel\",\"add_prefix_space\":true},{\"type\":\"Digits\"}]},"
        "\"decoder\":{\"type\":\"ByteLevel\"}}";
    ptst_tokenizer *t = ptst_tokenizer_parse(c, json, sizeof json - 1, "t.json");
    ptst_ids ids = {NULL, 0, 0};
    ptst_text out = {NULL, 0, 0};
    ptst_code code = t == NULL ? ptst_error_code(c) : PTST_OK;
    (void)arg;
    if (code == PTST_OK) {
        code = ptst_encode(c, t, "ab<x>abab e\xCC\x81 \xFF", 15, PTST_ADD_SPECIAL, &ids);
    }
    if (code == PTST_OK) {
        code = ptst_decode(c, t, ids.data, ids.count, 0, &out);
    }
    ptst_ids_free(c, &ids);
    ptst_text_free(c, &out);
    ptst_tokenizer_free(c, t);
    return code;
}

static void tok_no_memory(void) {
    test_memory_sweep(tok_work, NULL);
}

static void suite_tokenizer(void) {
    RUN(tok_categories);
    RUN(tok_nfc);
    RUN(tok_golden_stories260k);
    RUN(tok_golden_mixes);
    RUN(tok_patterns);
    RUN(tok_patterns_refused);
    RUN(tok_golden_gpt2);
    RUN(tok_golden_qwen);
    RUN(tok_golden_llama2);
    RUN(tok_golden_llama3);
    RUN(tok_golden_mistral);
    RUN(tok_golden_phi2);
    RUN(tok_golden_phi3);
    RUN(tok_golden_falcon);
    RUN(tok_golden_roberta);
    RUN(tok_digits);
    RUN(tok_added_ids);
    RUN(tok_merge_spellings);
    RUN(tok_many_merges);
    RUN(tok_idle_split);
    RUN(tok_marks);
    RUN(tok_lookup);
    RUN(tok_long_word);
    RUN(tok_broken_text);
    RUN(tok_refusals);
    RUN(tok_mutations);
    RUN(tok_no_memory);
}

MAIN(tokenizer)
