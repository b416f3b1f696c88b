/* Tests of >>data. */
#include "test.h"

static ptst_rows *rows_of(ptst_ctx *c, const char *text, const char *name, const char *column) {
    ptst_rows_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.column = column;
    return ptst_rows_parse(c, text, strlen(text), name, &desc);
}

/* Rows as "prompt|answer;prompt|answer;", or the error. */
static void check_rows(const char *text, const char *name, const char *column,
                       const char *expected) {
    ptst_ctx *c = test_open(1, NULL);
    ptst_rows *r = rows_of(c, text, name, column);
    ptst_text out = {NULL, 0, 0};
    size_t i;
    for (i = 0; r != NULL && i < ptst_rows_count(r); i++) {
        const ptst_row *row = ptst_rows_at(r, i);
        CHECK(strlen(row->prompt) == row->prompt_size);
        CHECK(ptst__text_add(c, &out, row->prompt) == PTST_OK);
        if (row->answer != NULL) {
            CHECK(strlen(row->answer) == row->answer_size);
            CHECK(ptst__text_format(c, &out, "|%s", row->answer) == PTST_OK);
        }
        CHECK(ptst__text_add(c, &out, ";") == PTST_OK);
    }
    CHECK_TEXT(r == NULL ? ptst_error_text(c) : out.data, expected);
    ptst_text_free(c, &out);
    ptst_rows_free(c, r);
    ptst_close(c);
}

static void data_jsonl(void) {
    check_rows("{\"question\": \"a\", \"answer\": \"b\"}\n\n{\"question\": \"c\"}", "x.jsonl", NULL,
               "a|b;c;");
    check_rows("\xEF\xBB\xBF{\"Goal\": \"a\"}\r\n{\"Goal\": \"\\u00e9[{\\\"\"}\r\n", "x.JSONL",
               NULL, "a;\xC3\xA9[{\";");
    check_rows("{\"instruction\": \"a\", \"input\": \"\", \"output\": \"o\"}\n"
               "{\"instruction\": \"a\", \"input\": \"b\", \"output\": \"p\"}\n",
               "x.jsonl", NULL, "a|o;a\n\nb|p;");
    check_rows("{\"messages\": [{\"role\": \"system\", \"content\": \"s\"}, {\"role\": \"user\", "
               "\"content\": \"q\"}, {\"role\": \"assistant\", \"content\": \"a\"}]}\n"
               "{\"messages\": [{\"role\": \"user\", \"content\": \"r\"}]}\n",
               "x.jsonl", NULL, "q|a;r;");
    check_rows("{\"prompt\": \"p\", \"other\": \"o\", \"answer\": 18}", "x.jsonl", "other",
               "o|18;");
    check_rows("{\"instruction\": \"a\", \"input\": 7, \"output\": \"o\"}\n"
               "{\"instruction\": \"a\", \"input\": null, \"output\": \"p\"}",
               "x.jsonl", NULL, "a\n\n7|o;a|p;");
    check_rows("\"a\"\n\"b\"\n", "x.jsonl", NULL, "a;b;");
}

static const char *or_none(const char *s) { return s == NULL ? "(none)" : s; }

/* Conversations and plain text to be learned: what rows hold when answers are needed. */
static void data_conversations(void) {
    static const struct {
        const char *text, *prompt, *answer, *messages; /* NULL prompt, answer: several turns */
        bool whole;
    } cases[] = {
        {"{\"messages\": [{\"role\": \"user\", \"content\": \"q\"}, {\"role\": \"assistant\", "
         "\"content\": \"a\"}]}",
         "q", "a",
         "[{\"role\": \"user\", \"content\": \"q\"}, {\"role\": \"assistant\", \"content\": "
         "\"a\"}]",
         false},
        {"{\"messages\": [{\"role\": \"system\", \"content\": \"s\"}, {\"role\": \"user\", "
         "\"content\": \"q\"}, {\"role\": \"assistant\", \"content\": \"a\", \"tool_calls\": "
         "null}]}",
         "q", "a",
         "[{\"role\": \"system\", \"content\": \"s\"}, {\"role\": \"user\", \"content\": \"q\"}, "
         "{\"role\": \"assistant\", \"content\": \"a\"}]",
         false},
        {"{\"conversations\": [{\"from\": \"human\", \"value\": \"q\\n\"}, {\"from\": \"gpt\", "
         "\"value\": \"a\"}, {\"from\": \"human\", \"value\": \"r\"}, {\"from\": \"gpt\", "
         "\"value\": \"b\"}], \"id\": 7}",
         NULL, NULL,
         "[{\"role\": \"user\", \"content\": \"q\\n\"}, {\"role\": \"assistant\", \"content\": "
         "\"a\"}, "
         "{\"role\": \"user\", \"content\": \"r\"}, {\"role\": \"assistant\", \"content\": \"b\"}]",
         false},
        {"{\"text\": \"t\"}", "", "t", NULL, true},
        {"{\"prompt\": \"p\", \"completion\": \"c\"}", "p", "c", NULL, false}};
    static const char *const bad[][2] = {
        {"{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}",
         "x.jsonl: line 1: \"messages\" has no message of the assistant"},
        {"{\"prompt\": \"a\", \"completion\": \"b\"}\n{\"prompt\": \"a\"}",
         "x.jsonl: line 2: \"completion\" is missing"},
        {"{\"prompt\": \"a\", \"completion\": \"b\", \"completion\": \"c\"}",
         "x.jsonl: line 1: \"completion\" is there twice"},
        {"{\"prompt\": \"a\"}",
         "x.jsonl: line 1: no answer: one of the keys answer, output, response was expected"},
        {"{\"instruction\": \"a\", \"output\": \"b\"}\n{\"question\": \"a\", \"answer\": \"b\"}",
         "x.jsonl: line 2: \"instruction\" is missing"},
        {"{\"messages\": [{\"role\": \"assistant\", \"content\": \"a\"}, {\"role\": \"user\", "
         "\"content\": \"a\"}]}",
         "x.jsonl: line 1: \"messages\" must be an optional system message and then user and "
         "assistant by turns"},
        {"{\"text\": \"a\"}\n{\"messages\": []}", "x.jsonl: line 2: \"text\" is missing"},
        {"{\"messages\": [{\"role\": \"user\", \"content\": \"q\"}, {\"role\": \"assistant\", "
         "\"content\": \"a\", \"tool_calls\": [{}]}]}",
         "x.jsonl: line 1: \"messages\" holds a message of another role than system, user and "
         "assistant, or with tool calls"}};
    ptst_ctx *c = test_open(1, NULL);
    ptst_rows_desc desc;
    size_t i;
    memset(&desc, 0, sizeof desc);
    desc.need_answer = true;
    for (i = 0; i < sizeof cases / sizeof *cases; i++) {
        ptst_rows *r = ptst_rows_parse(c, cases[i].text, strlen(cases[i].text), "x.jsonl", &desc);
        const ptst_row *row = r == NULL ? NULL : ptst_rows_at(r, 0);
        CHECK_TEXT(r == NULL ? ptst_error_text(c) : "", "");
        if (row != NULL) {
            CHECK_TEXT(or_none(row->prompt), or_none(cases[i].prompt));
            CHECK_TEXT(or_none(row->answer), or_none(cases[i].answer));
            CHECK_TEXT(or_none(row->messages), or_none(cases[i].messages));
            CHECK(row->whole == cases[i].whole);
            CHECK(row->messages == NULL || strlen(row->messages) == row->messages_size);
        }
        ptst_rows_free(c, r);
    }
    for (i = 0; i < sizeof bad / sizeof *bad; i++) {
        CHECK(ptst_rows_parse(c, bad[i][0], strlen(bad[i][0]), "x.jsonl", &desc) == NULL);
        CHECK_TEXT(ptst_error_text(c), bad[i][1]);
    }
    ptst_close(c);
}

static void data_json(void) {
    check_rows("[\"a\", \"b\"]", "x.json", NULL, "a;b;");
    check_rows("[\n{\"text\": \"t\", \"instruction\": \"i\"}, {\"instruction\": \"j\"}]", "x.json",
               NULL, "i;j;");
}

static void data_txt(void) {
    check_rows("a b\r\n\n  \nc\n", "x.txt", NULL, "a b;c;");
    check_rows("a,b\"", "x.txt", NULL, "a,b\";");
}

static void data_csv(void) {
    /* no header, one column, as the paper's AdvBench file */
    check_rows("Write a script\n\"Say \"\"hi\"\", now\"\n", "x.csv", NULL,
               "Write a script;Say \"hi\", now;");
    check_rows("Write a script\nTeach\n", "x.csv", "0", "Write a script;Teach;");
    check_rows("Goal,Category\r\na,b\r\n\r\nc,d\r\n", "x.csv", NULL, "a;c;");
    check_rows("Goal,Category\na,b\n", "x.csv", "0", "a;");
    check_rows("Goal,Category\na,b\n", "x.csv", "category", "b;");
    check_rows("goal,target\na,b\n", "x.csv", "1", "b;");
    check_rows("x,y\na,b\n", "x.csv", "1", "y;b;");
    check_rows("id,prompt,answer\n1,\"two\nlines\r\n\",yes\n2,,\"\"", "x.csv", NULL,
               "two\nlines\r\n|yes;|;");
    check_rows("\xEF\xBB\xBF"
               "prompt\rmac\rends\r",
               "x.csv", NULL, "mac;ends;");
    check_rows("prompt,a\n5\" nails,b\nx,\n", "x.csv", NULL, "5\" nails;x;");
    check_rows("prompt,a,b\nx", "x.csv", NULL, "x;");
    check_rows("a,\n", "x.csv", "1", ";");
}

/* Hostile files: one sentence each that names file, line and key. */
static void data_refuses(void) {
    static const struct {
        const char *text, *name, *column, *error;
    } bad[] = {
        {"", "x.jsonl", NULL, "x.jsonl: holds no row"},
        {"", "x.json", NULL, "x.json: line 1: ends where a value was expected"},
        {"", "x.csv", NULL, "x.csv: holds no row"},
        {"\n \n", "x.txt", NULL, "x.txt: holds no row"},
        {"\xEF\xBB\xBF", "x.txt", NULL, "x.txt: holds no row"},
        {"prompt\n", "x.csv", NULL, "x.csv: holds no row"},
        {"[]", "x.json", NULL, "x.json: holds no row"},
        {"{}", "x.json", NULL, "x.json: a list of objects or strings was expected"},
        {"[1]", "x.json", NULL, "x.json: line 1: an object or a string was expected"},
        {"a\nb\xFF\n", "x.txt", NULL, "x.txt: line 2: not valid UTF-8"},
        {"a\n\xED\xA0\x80", "x.csv", NULL, "x.csv: line 2: not valid UTF-8"},
        {"{\"prompt\": \"\xC0\x80\"}", "x.jsonl", NULL, "x.jsonl: line 1: not valid UTF-8"},
        {"{\"prompt\": \"a\"}\n{\"prompt\": \"b\"", "x.jsonl", NULL,
         "x.jsonl: line 2: a JSON value does not end on its line"},
        {"{\"prompt\": \"a\n\"}", "x.jsonl", NULL,
         "x.jsonl: line 1: a JSON value does not end on its line"},
        {"{\"prompt\": \"a\"}{\"prompt\": \"b\"}", "x.jsonl", NULL,
         "x.jsonl: line 1: ',' or ']' was expected"},
        {"{\"prompt\": \"a\"},{\"prompt\": \"b\"}", "x.jsonl", NULL,
         "x.jsonl: line 1: more than one JSON value"},
        {"{\"prompt\": \"a\"}\n\n{\"prompt\": \"a\"},{\"prompt\": \"b\"}\n\"c\"", "x.jsonl", NULL,
         "x.jsonl: line 3: more than one JSON value"},
        {"{\"prompt\": \"a\"}\n\"b\"", "x.jsonl", NULL,
         "x.jsonl: line 2: an object was expected, as in the first row"},
        {"\"a\"\n\n{\"prompt\": \"b\"}", "x.jsonl", NULL,
         "x.jsonl: line 3: a string was expected, as in the first row"},
        {"{\"prompt\": \"a\", \"x\": 1, \"prompt\": \"b\"}", "x.jsonl", NULL,
         "x.jsonl: line 1: \"prompt\" is there twice"},
        {"{\"instruction\": \"a\", \"input\": [1]}", "x.jsonl", NULL,
         "x.jsonl: line 1: \"input\" is not text"},
        {"{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}\n{\"prompt\": \"a\"}", "x.jsonl",
         NULL, "x.jsonl: line 2: \"messages\" is missing"},
        {"{\"messages\": \"a\"}", "x.jsonl", NULL,
         "x.jsonl: line 1: \"messages\" must be a list of messages"},
        {"{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}], \"tools\": [{}]}", "x.jsonl",
         NULL, "x.jsonl: line 1: \"tools\" of a conversation are not supported"},
        {"[\n]", "x.jsonl", NULL, "x.jsonl: line 1: a JSON value does not end on its line"},
        {"],[", "x.jsonl", NULL, "x.jsonl: line 1: a JSON value does not end on its line"},
        {"]", "x.jsonl", NULL, "x.jsonl: line 1: more text after the end of the value"},
        {"{\"prompt\": \"a\"}\nnull", "x.jsonl", NULL,
         "x.jsonl: line 2: an object or a string was expected"},
        {"{\"a\": 1}", "x.jsonl", NULL,
         "x.jsonl: line 1: no key for the question: one of question, instruction, goal, prompt was "
         "expected"},
        {"{\"prompt\": \"a\"}\n\n{\"goal\": \"b\"}", "x.jsonl", NULL,
         "x.jsonl: line 3: \"prompt\" is missing"},
        {"{\"prompt\": [\"a\"]}", "x.jsonl", NULL, "x.jsonl: line 1: \"prompt\" is not text"},
        {"{\"prompt\": \"a\", \"answer\": {}}", "x.jsonl", NULL,
         "x.jsonl: line 1: \"answer\" is not text"},
        {"{\"prompt\": \"a\"}", "x.jsonl", "goal", "x.jsonl: line 1: \"goal\" is missing"},
        {"{\"messages\": []}", "x.jsonl", NULL,
         "x.jsonl: line 1: \"messages\" has no message of the user"},
        {"{\"messages\": [{\"role\": \"user\"}]}", "x.jsonl", NULL,
         "x.jsonl: line 1: \"messages\" holds a message without role and content as strings"},
        {"{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"user\", "
         "\"content\": \"b\"}]}",
         "x.jsonl", NULL,
         "x.jsonl: line 1: \"messages\" must be an optional system message and then user and "
         "assistant by turns"},
        {"{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", "
         "\"content\": \"b\"}, {\"role\": \"user\", \"content\": \"c\"}]}",
         "x.jsonl", NULL, "x.jsonl: line 1: \"messages\" must be one question and one answer"},
        {"{\"conversations\": [{\"from\": \"tool\", \"value\": \"a\"}]}", "x.jsonl", NULL,
         "x.jsonl: line 1: \"conversations\" holds a message of another role than system, user and "
         "assistant, or with tool calls"},
        {"prompt\n\"open\nand more", "x.csv", NULL, "x.csv: line 2: a quoted field without end"},
        {"\"", "x.csv", NULL, "x.csv: line 1: a quoted field without end"},
        {"\"a\"b\n", "x.csv", NULL, "x.csv: line 1: text after the closing quote of a field"},
        {"prompt\n\"a\n\"\rb\n\"c\" ,d\n", "x.csv", NULL,
         "x.csv: line 5: text after the closing quote of a field"},
        {"a,b\nc,d\n", "x.csv", NULL,
         "x.csv: which of its 2 columns is the question? None has a known name; give the column by "
         "name or number"},
        {"a,b\nc,d\n", "x.csv", "goal", "x.csv: the header has no column \"goal\""},
        {"a,b\nc,d\n", "x.csv", "2", "x.csv: line 1: 2 columns, column 2 (from 0) is needed"},
        {"prompt,x\na,b\n", "x.csv", "99999999999999999999",
         "x.csv: the header has no column \"99999999999999999999\""},
        {"id,prompt\n1,a\n2\n", "x.csv", NULL,
         "x.csv: line 3: 1 columns, column 1 (from 0) is needed"},
        {"a", "x.parquet", NULL, "x.parquet: the ending must be .jsonl, .json, .csv or .txt"},
        {"a", "jsonl", NULL, "jsonl: the ending must be .jsonl, .json, .csv or .txt"},
    };
    ptst_ctx *c = test_open(1, NULL);
    ptst_rows_desc desc;
    size_t i;
    for (i = 0; i < sizeof bad / sizeof *bad; i++) {
        check_rows(bad[i].text, bad[i].name, bad[i].column, bad[i].error);
    }
    memset(&desc, 0, sizeof desc);
    CHECK(ptst_rows_parse(c, "a\0b", 3, "x.txt", &desc) == NULL);
    CHECK_TEXT(ptst_error_text(c), "x.txt: line 1: a NUL byte in a text file");
    desc.need_answer = true;
    CHECK(ptst_rows_parse(c, "a\nb", 3, "x.txt", &desc) == NULL);
    CHECK_TEXT(ptst_error_text(c),
               "x.txt: line 1: no answer: one of the keys answer, output, response was expected");
    CHECK(ptst_rows_load(c, "tests/absent.csv", NULL) == NULL);
    CHECK(ptst_error_code(c) == PTST_ERR_NOT_FOUND);
    CHECK(ptst_rows_load(c, "tests", NULL) == NULL);
    ptst_close(c);
}

static void data_limit_where_fields(void) {
    static const char text[] = "id,prompt,label\n1,a,safe\n2,b,unsafe\n3,c,safe\n4,d,safe\n";
    ptst_ctx *c = test_open(1, NULL);
    ptst_rows_desc desc;
    ptst_rows *r;
    size_t size;
    int32_t node;
    memset(&desc, 0, sizeof desc);
    desc.limit = 2;
    desc.where = "label";
    desc.equals = "safe";
    r = ptst_rows_parse(c, text, sizeof text - 1, "x.csv", &desc);
    CHECK(r != NULL && ptst_rows_count(r) == 2);
    CHECK_TEXT(ptst_rows_at(r, 1)->prompt, "c");
    CHECK(ptst_rows_at(r, 1)->line == 4 && ptst_rows_at(r, 2) == NULL);
    CHECK_TEXT(ptst_rows_field(r, 1, "ID", &size), "3");
    CHECK(size == 1 && ptst_rows_field(r, 1, "x", NULL) == NULL);
    CHECK(ptst_rows_json(r, 0, &node) == NULL && node == -1);
    ptst_rows_free(c, r);
    desc.equals = "neither";
    CHECK(ptst_rows_parse(c, text, sizeof text - 1, "x.csv", &desc) == NULL);
    CHECK_TEXT(ptst_error_text(c), "x.csv: holds no row of those asked for");
    desc.where = NULL;
    /* the whole file is read, whatever the limit */
    CHECK(rows_of(c, "{\"prompt\": \"p\"}\n{\"prompt\": \"q\"}\n\"x", "x.jsonl", NULL) == NULL);
    r = rows_of(c, "{\"prompt\": \"p\", \"n\": 5}", "x.jsonl", NULL);
    CHECK(r != NULL && ptst_rows_json(r, 0, &node) != NULL && node == 1);
    CHECK(strncmp(ptst_rows_field(r, 0, "n", &size), "5", 1) == 0 && size == 1);
    ptst_rows_free(c, r);
    ptst_close(c);
}

/* Every cut and every changed byte of small files: no crash, and an error or rows. */
static void data_mutations(void) {
    static const char *const texts[] = {
        "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}\n{\"messages\": []}\n",
        "id,\"pro\"\"mpt\",x\r\n1,\"a\r\n\",\"\"\r\n,,\r\n",
        "[{\"prompt\": \"\\u00e9\", \"answer\": 1.5e3}, {\"prompt\": 1}]"};
    static const char *const names[] = {"x.jsonl", "x.csv", "x.json"};
    static const char bytes[] = "\"\\,\n\r{}[]:\xC3\x01 0a";
    ptst_ctx *c = test_open(1, NULL);
    size_t f, i, k, count = 0;
    for (f = 0; f < 3; f++) {
        size_t n = strlen(texts[f]);
        char copy[256];
        for (i = 0; i <= n; i++) {
            ptst_rows *r = ptst_rows_parse(c, texts[f], i, names[f], NULL);
            CHECK(r != NULL || ptst_error_text(c)[0] != 0);
            ptst_rows_free(c, r);
            for (k = 0; bytes[k] != 0 && i < n; k++) {
                memcpy(copy, texts[f], n);
                copy[i] = bytes[k];
                r = ptst_rows_parse(c, copy, n, names[f], NULL);
                count += r != NULL;
                CHECK(r != NULL || ptst_error_text(c)[0] != 0);
                ptst_rows_free(c, r);
            }
        }
    }
    CHECK(count > 100);
    ptst_close(c);
}

static ptst_code sweep_rows(ptst_ctx *c, void *arg) {
    static const char *const texts[] = {
        "{\"instruction\": \"a\", \"input\": \"b\", \"output\": 5}\n",
        "[\"a\", \"b\"]", "id,prompt\n1,a\n2,\"b\"\n", "a\nb\n",
        "{\"messages\": [{\"role\": \"system\", \"content\": \"s\"}, {\"role\": \"user\", "
        "\"content\": "
        "\"q\"}, {\"role\": \"assistant\", \"content\": \"a\"}]}\n"};
    static const char *const names[] = {"x.jsonl", "x.json", "x.csv", "x.txt", "x.jsonl"};
    size_t i;
    (void)arg;
    for (i = 0; i < 5; i++) {
        ptst_rows_desc desc;
        ptst_rows *r;
        memset(&desc, 0, sizeof desc);
        desc.need_answer = i == 4;
        r = ptst_rows_parse(c, texts[i], strlen(texts[i]), names[i], &desc);
        if (r == NULL) {
            return ptst_error_code(c);
        }
        ptst_rows_free(c, r);
    }
    return PTST_OK;
}

static void data_memory(void) { test_memory_sweep(sweep_rows, NULL); }

/* The published files have the rows that are known of them. */
static void data_published(void) {
    static const struct {
        const char *path, *column;
        size_t rows;
    } files[] = {
        {"gsm8k/train.jsonl", NULL, 7473},
        {"gsm8k/test.jsonl", NULL, 1319},
        {"advbench/advbench-harmful-behaviors.csv", NULL, 520},
        {"advbench/advbench-harmful-behaviors.csv", "0", 520},
        {"advbench/harmful_behaviors.csv", NULL, 520},
        {"directharm4/directHarm4.csv", NULL, 400},
        {"xstest/xstest_prompts.csv", "prompt", 450},
        {"xstest/xstest_v2_completions_mistralguard.csv", NULL, 450},
        {"xstest/xstest_v2_completions_mistralinstruct.csv", NULL, 450},
        {"harmbench/harmbench_behaviors_text_all.csv", NULL, 400},
        {"jailbreakbench/jailbreakbench_behaviors.csv", NULL, 100},
        {"strongreject/strongreject_dataset.csv", NULL, 313},
    };
    ptst_ctx *c = test_open(1, NULL);
    size_t i;
    if (ptst__path_kind("../shared/data/gsm8k/train.jsonl") == 0) {
        ptst_close(c);
        SKIP("../shared/data is not there");
    }
    for (i = 0; i < sizeof files / sizeof *files; i++) {
        char path[200];
        ptst_rows_desc desc;
        ptst_rows *r;
        memset(&desc, 0, sizeof desc);
        desc.column = files[i].column;
        snprintf(path, sizeof path, "../shared/data/%s", files[i].path);
        r = ptst_rows_load(c, path, &desc);
        CHECK_TEXT(r == NULL ? ptst_error_text(c) : "", "");
        CHECK(r != NULL && ptst_rows_count(r) == files[i].rows);
        ptst_rows_free(c, r);
    }
    ptst_close(c);
}

static void suite_data(void) {
    RUN(data_jsonl);
    RUN(data_conversations);
    RUN(data_json);
    RUN(data_txt);
    RUN(data_csv);
    RUN(data_refuses);
    RUN(data_limit_where_fields);
    RUN(data_mutations);
    RUN(data_memory);
    RUN(data_published);
}

MAIN(data)
