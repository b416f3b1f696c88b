/* Tests of >>safetensors: verdicts on hand-made files, sharded models, the writer. */
#include "test.h"

/* Files are given as header, data, and what the length field says (-1 = the truth). */
typedef struct st_case {
    const char *what;
    bool accept;
    const char *header;
    size_t header_size; /* 0 = strlen */
    size_t data_size;   /* bytes of data, all zero */
    int64_t length;
} st_case;

/* Most files describe one tensor a. */
#define A(dtype, shape, begin, end)                                                                \
    "\"a\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":[" begin "," end "]}"
#define TEXT(s) s, sizeof s - 1

/* The first 17 are accepted by safetensors 0.8.0; of these ptst.h refuses four kinds (duplicate
   tensors, leading blanks, NUL in a name, rank over 8), marked "stricter". */
static const st_case st_cases[] = {
    {"plain", true, "{" A("F32", "[2]", "0", "8") "}", 0, 8, -1},
    {"stricter: the same tensor twice", false,
     "{" A("F32", "[2]", "0", "8") "," A("F32", "[2]", "0", "8") "}", 0, 8, -1},
    {"stricter: twice, the first one invalid", false,
     "{" A("F32", "[9]", "0", "4") "," A("F32", "[2]", "0", "8") "}", 0, 8, -1},
    {"a metadata key twice", true,
     "{\"__metadata__\":{\"k\":\"v\",\"k\":\"w\"}," A("F32", "[2]", "0", "8") "}", 0, 8, -1},
    {"metadata null", true, "{\"__metadata__\":null," A("F32", "[2]", "0", "8") "}", 0, 8, -1},
    {"a field more", true,
     "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1],\"x\":[1,{}]}}", 0, 1, -1},
    {"stricter: leading blank", false, " {" A("F32", "[2]", "0", "8") "}", 0, 8, -1},
    {"trailing blanks", true, "{" A("F32", "[2]", "0", "8") "} \n\t\r ", 0, 8, -1},
    {"nothing inside", true, "{}", 0, 0, -1},
    {"empty, zero first", true, "{" A("U8", "[0,9223372036854775807,9]", "0", "0") "}", 0, 0, -1},
    {"headers out of order", true,
     "{\"b\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[4,6]}," A("F32", "[1]", "0",
                                                                         "4") "}",
     0, 6, -1},
    {"unaligned", true,
     "{\"b\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}," A("F32", "[2]", "1",
                                                                         "9") "}",
     0, 9, -1},
    {"empty name", true, "{\"\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 0, 1,
     -1},
    {"stricter: NUL in a name", false,
     "{\"a\\u0000b\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 0, 1, -1},
    {"stricter: rank 9", false, "{" A("U8", "[1,1,1,1,1,1,1,1,1]", "0", "1") "}", 0, 1, -1},
    {"rank 8", true, "{" A("U8", "[1,1,1,1,1,1,1,1]", "0", "1") "}", 0, 1, -1},
    {"BOOL", true, "{" A("BOOL", "[1]", "0", "1") "}", 0, 1, -1},
    {"rank 0", true, "{" A("F64", "[]", "0", "8") "}", 0, 8, -1},
    /* ptst.h alone accepts this: an empty tensor is empty wherever the zero stands */
    {"empty, zero last", true, "{" A("U8", "[9223372036854775807,9,0]", "0", "0") "}", 0, 0, -1},

    {"a field twice", false,
     "{\"a\":{\"dtype\":\"U8\",\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 0, 1, -1},
    {"metadata twice", false, "{\"__metadata__\":{},\"__metadata__\":{}}", 0, 0, -1},
    {"metadata of numbers", false, "{\"__metadata__\":{\"k\":1}}", 0, 0, -1},
    {"metadata a text", false, "{\"__metadata__\":\"k\"}", 0, 0, -1},
    {"garbage behind", false, "{" A("U8", "[1]", "0", "1") "}x", 0, 1, -1},
    {"NULs behind", false, TEXT("{}\0\0"), 0, -1},
    {"byte order mark", false, "\xEF\xBB\xBF{}", 0, 0, -1},
    {"no header", false, "", 0, 0, -1},
    {"an array", false, "[]", 0, 0, -1},
    {"negative size", false, "{" A("U8", "[-1]", "0", "1") "}", 0, 1, -1},
    {"size 2.0", false, "{" A("U8", "[2.0]", "0", "2") "}", 0, 2, -1},
    {"offset 4e0", false, "{" A("F32", "[1]", "0", "4e0") "}", 0, 4, -1},
    {"size 2^64", false, "{" A("U8", "[18446744073709551616]", "0", "0") "}", 0, 0, -1},
    {"leading zero", false, "{" A("U8", "[01]", "0", "1") "}", 0, 1, -1},
    {"minus zero", false, "{" A("U8", "[1]", "-0", "1") "}", 0, 1, -1},
    {"product overflows", false, "{" A("U8", "[9223372036854775807,9]", "0", "0") "}", 0, 0, -1},
    {"bytes overflow", false, "{" A("F64", "[2305843009213693952]", "0", "0") "}", 0, 0, -1},
    {"a hole", false,
     "{" A("U8", "[1]", "0", "1") ",\"b\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[2,3]}}",
     0, 3, -1},
    {"an overlap", false,
     "{" A("U8", "[2]", "0", "2") ",\"b\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[1,3]}}",
     0, 3, -1},
    {"begin after end", false, "{" A("U8", "[1]", "1", "0") "}", 0, 1, -1},
    {"a byte too few", false, "{" A("F32", "[2]", "0", "8") "}", 0, 7, -1},
    {"a byte too many", false, "{" A("F32", "[2]", "0", "8") "}", 0, 9, -1},
    {"unknown dtype", false, "{" A("F31", "[1]", "0", "4") "}", 0, 4, -1},
    {"lower-case dtype", false, "{" A("f32", "[1]", "0", "4") "}", 0, 4, -1},
    {"three offsets", false, "{" A("U8", "[1]", "0,1", "1") "}", 0, 1, -1},
    {"no shape", false, "{\"a\":{\"dtype\":\"U8\",\"data_offsets\":[0,1]}}", 0, 1, -1},
    {"lone surrogate", false,
     "{\"\\ud800\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 0, 1, -1},
    {"no UTF-8", false, "{\"\xFF\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 0, 1,
     -1},
    {"half a byte", false, "{" A("F4", "[1]", "0", "1") "}", 0, 1, -1},
    {"two halves", true, "{" A("F4", "[2]", "0", "1") "}", 0, 1, -1},
    {"a number for a tensor", false, "{\"a\":1}", 0, 0, -1},
    {"length over 100 MB", false, "{}", 0, 0, 100000001},
    {"length 2^63", false, "{}", 0, 0, INT64_MIN},
    {"length 2^64 - 2", false, "{}", 0, 0, -2},
    {"length beyond the file", false, "{}", 0, 0, 3},
    {"length inside the header", false, "{" A("U8", "[1]", "0", "1") "}", 0, 1, 10}};

/* Writes the length field and the header behind it; returns the size of the whole. */
static size_t st_bytes(char *out, const char *header, size_t size, size_t data, int64_t length) {
    uint64_t n = length == -1 ? size : (uint64_t)length;
    size_t i;
    for (i = 0; i < 8; i++) {
        out[i] = (char)(unsigned char)(n >> (8 * i));
    }
    memcpy(out + 8, header, size);
    memset(out + 8 + size, 0, data);
    return 8 + size + data;
}

static void st_verdicts(void) {
    ptst_ctx *c = test_open(1, NULL);
    size_t i;
    for (i = 0; i < sizeof st_cases / sizeof st_cases[0]; i++) {
        const st_case *k = &st_cases[i];
        size_t header = k->header_size != 0 ? k->header_size : strlen(k->header);
        size_t size = 8 + header + k->data_size;
        char *bytes = (char *)malloc(size); /* exact, so that a sanitizer sees a step beyond */
        ptst_tensors *t;
        st_bytes(bytes, k->header, header, k->data_size, k->length);
        t = ptst_tensors_parse(c, bytes, size, "case");
        if ((t != NULL) != k->accept) {
            fprintf(stderr, "%s: %s\n", k->what, t != NULL ? "accepted" : ptst_error_text(c));
            CHECK(false);
        }
        if (t == NULL) {
            CHECK(ptst_error_code(c) == PTST_ERR_FORMAT);
            CHECK(strncmp(ptst_error_text(c), "case: ", 6) == 0);
        }
        ptst_tensors_close(c, t);
        free(bytes);
    }
    ptst_close(c);
}

/* Nesting: 127 levels are read, 128 refused (as the reference does), 100000 as well. */
static void st_deep(void) {
    static const char head[] =
        "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1],\"x\":";
    static const size_t depths[] = {125, 126, 200, 100000};
    ptst_ctx *c = test_open(1, NULL);
    size_t i, n = sizeof head - 1;
    for (i = 0; i < 4; i++) {
        size_t depth = depths[i], header = n + 2 * depth + 2;
        char *text = (char *)malloc(header), *bytes = (char *)malloc(header + 9);
        ptst_tensors *t;
        memcpy(text, head, n);
        memset(text + n, '[', depth);
        memset(text + n + depth, ']', depth);
        memcpy(text + header - 2, "}}", 2);
        t = ptst_tensors_parse(c, bytes, st_bytes(bytes, text, header, 1, -1), "deep");
        CHECK((t != NULL) == (i == 0));
        ptst_tensors_close(c, t);
        free(text);
        free(bytes);
    }
    ptst_close(c);
}

/* All 22 types of the format, each with the size that its bits ask for. */
static void st_types(void) {
    static const char *const names[] = {
        "BOOL",    "F4",          "F6_E2M3",     "F6_E3M2", "U8",  "I8",  "F8_E5M2", "F8_E4M3",
        "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I16",     "U16", "F16", "BF16",    "I32",
        "U32",     "F32",         "C64",         "F64",     "I64", "U64"};
    static const int bits[] = {8,  4,  6,  6,  8,  8,  8,  8,  8,  8,  8,
                               16, 16, 16, 16, 32, 32, 32, 64, 64, 64, 64};
    ptst_ctx *c = test_open(1, NULL);
    int i;
    for (i = 0; i < 22; i++) {
        char header[200], bytes[300];
        const ptst_tensor *v;
        ptst_tensors *t;
        snprintf(header, sizeof header,
                 "{\"a\":{\"dtype\":\"%s\",\"shape\":[4],\"data_offsets\":[0,%d]}}", names[i],
                 bits[i] / 2);
        t = ptst_tensors_parse(
            c, bytes, st_bytes(bytes, header, strlen(header), (size_t)bits[i] / 2, -1), "t");
        CHECK(t != NULL);
        v = t == NULL ? NULL : ptst_tensors_at(t, 0);
        CHECK(v != NULL && v->count == 4 && v->bytes == (size_t)bits[i] / 2);
        if (v != NULL) {
            CHECK_TEXT(v->dtype_name, names[i]);
            CHECK(v->dtype == (strcmp(names[i], "F32") == 0    ? PTST_F32
                               : strcmp(names[i], "F16") == 0  ? PTST_F16
                               : strcmp(names[i], "BF16") == 0 ? PTST_BF16
                                                               : PTST_DTYPE_FILE));
        }
        ptst_tensors_close(c, t);
    }
    ptst_close(c);
}

/* A tensor that lies unaligned in its file is handed out aligned, with the right values. */
static void st_unaligned(void) {
    static const char header[] =
        "{\"b\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}," A("F32", "[2]", "1",
                                                                            "9") "}";
    static const float values[] = {1.5f, -2.25f};
    ptst_ctx *c = test_open(1, NULL);
    char bytes[300];
    size_t i, size = st_bytes(bytes + 1, header, sizeof header - 1, 9, -1);
    memcpy(bytes + 1 + size - 8, values, 8);
    for (i = 0; i < 4; i++) { /* wherever the file begins in memory */
        ptst_tensors *t;
        const ptst_tensor *v;
        memmove(bytes + i, bytes + (i == 0 ? 1 : i - 1), size);
        t = ptst_tensors_parse(c, bytes + i, size, "t");
        v = t == NULL ? NULL : ptst_tensors_find(t, "a");
        CHECK(v != NULL && (uintptr_t)v->data % 4 == 0 && memcmp(v->data, values, 8) == 0);
        ptst_tensors_close(c, t);
    }
    ptst_close(c);
}

/* ---- files ---- */

static char st_folder[] = "/tmp/ptst_test_XXXXXX";
static char st_path_buffer[512];

static const char *st_path(const char *name) {
    snprintf(st_path_buffer, sizeof st_path_buffer, "%s/%s", st_folder, name);
    return st_path_buffer;
}

static bool st_make_folder(void) {
    memcpy(st_folder + sizeof st_folder - 7, "XXXXXX", 6);
    return mkdtemp(st_folder) != NULL;
}

static void st_remove_folder(void) {
    DIR *d = opendir(st_folder);
    struct dirent *e;
    while (d != NULL && (e = readdir(d)) != NULL) {
        if (e->d_name[0] != '.') {
            unlink(st_path(e->d_name));
        }
    }
    if (d != NULL) {
        closedir(d);
    }
    CHECK(rmdir(st_folder) == 0); /* nothing else is left, no temporary file either */
}

static ptst_tensor st_tensor(const char *name, const char *dtype, int rank, uint64_t d0,
                             uint64_t d1, const void *data) {
    ptst_tensor v;
    memset(&v, 0, sizeof v);
    v.name = name;
    v.dtype_name = dtype;
    v.rank = rank;
    v.shape[0] = d0;
    v.shape[1] = d1;
    v.data = data;
    return v;
}

/* The file must be what safetensors 0.8.0 writes for the same tensors: save() of b = zeros(2, 3)
   F32, a = ones(3) I64, c = 1.0 F16 (rank 0), d = empty U8, z BOOL, y I8, metadata. */
static void st_same_bytes(void) {
    static const char expected[] =
        "{\"__metadata__\":{\"format\":\"pt\",\"k\":\"\xC3\xA9\\\"\\n\\u0001\x7F/\"},"
        "\"a\":{\"dtype\":\"I64\",\"shape\":[3],\"data_offsets\":[0,24]},"
        "\"b\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[24,48]},"
        "\"c\":{\"dtype\":\"F16\",\"shape\":[],\"data_offsets\":[48,50]},"
        "\"y\":{\"dtype\":\"I8\",\"shape\":[1],\"data_offsets\":[50,51]},"
        "\"d\":{\"dtype\":\"U8\",\"shape\":[0,4],\"data_offsets\":[51,51]},"
        "\"z\":{\"dtype\":\"BOOL\",\"shape\":[1],\"data_offsets\":[51,52]}}";
    static const char *const metadata[] = {"format", "pt", "k", "\xC3\xA9\"\n\x01\x7F/", NULL};
    static const float b[6] = {0, 1, 2, 3, 4, 5};
    static const int64_t a[3] = {1, 2, 3};
    static const uint16_t one = 0x3C00;
    ptst_ctx *c = test_open(1, NULL);
    ptst_tensor list[6];
    ptst_text text = {NULL, 0, 0};
    ptst_tensors *t;
    size_t padded = (sizeof expected - 1 + 7) / 8 * 8;
    list[0] = st_tensor("b", "F32", 2, 2, 3, b);
    list[1] = st_tensor("a", "I64", 1, 3, 0, a);
    list[2] = st_tensor("c", NULL, 0, 0, 0, &one);
    list[2].dtype = PTST_F16;
    list[3] = st_tensor("d", "U8", 2, 0, 4, NULL);
    list[4] = st_tensor("z", "BOOL", 1, 1, 0, "\1");
    list[5] = st_tensor("y", "I8", 1, 1, 0, "\2");
    CHECK(st_make_folder());
    CHECK(ptst_tensors_write(c, st_path("x.safetensors"), list, 6, metadata) == PTST_OK);
    CHECK(ptst__read_file(c, st_path("x.safetensors"), &text) == PTST_OK);
    CHECK(text.size == 8 + padded + 52 && (unsigned char)text.data[0] == padded % 256 &&
          (unsigned char)text.data[1] == padded / 256);
    CHECK(text.size > 8 && memcmp(text.data + 8, expected, sizeof expected - 1) == 0);
    t = ptst_tensors_open(c, st_path("x.safetensors"));
    CHECK(t != NULL && ptst_tensors_count(t) == 6);
    if (t != NULL) {
        const ptst_tensor *v = ptst_tensors_find(t, "b");
        CHECK(v != NULL && v->rank == 2 && v->shape[0] == 2 && v->shape[1] == 3 && v->bytes == 24 &&
              memcmp(v->data, b, 24) == 0);
        v = ptst_tensors_find(t, "c");
        CHECK(v != NULL && v->rank == 0 && v->count == 1 && memcmp(v->data, &one, 2) == 0);
        v = ptst_tensors_find(t, "d");
        CHECK(v != NULL && v->count == 0 && v->bytes == 0);
        CHECK_TEXT(ptst_tensors_metadata(t, "format"), "pt");
        CHECK_TEXT(ptst_tensors_metadata(t, "k"), "\xC3\xA9\"\n\x01\x7F/");
        CHECK(ptst_tensors_metadata(t, "none") == NULL && ptst_tensors_find(t, "none") == NULL);
        CHECK(ptst_tensors_at(t, 6) == NULL);
    }
    ptst_tensors_close(c, t);
    ptst_text_free(c, &text);
    unlink(st_path("x.safetensors"));
    st_remove_folder();
    ptst_close(c);
}

/* Every prefix of a file is refused, and so is every file that is longer. */
static void st_truncation(void) {
    static const float b[6] = {0, 1, 2, 3, 4, 5};
    ptst_ctx *c = test_open(1, NULL);
    ptst_tensor list[2];
    ptst_text text = {NULL, 0, 0};
    size_t n;
    list[0] = st_tensor("b", "F32", 2, 2, 3, b);
    list[1] = st_tensor("layer.a", "F32", 1, 3, 0, b);
    CHECK(st_make_folder());
    CHECK(ptst_tensors_write(c, st_path("x"), list, 2, NULL) == PTST_OK);
    CHECK(ptst__read_file(c, st_path("x"), &text) == PTST_OK);
    for (n = 0; n < text.size; n++) {
        char *part = (char *)malloc(n == 0 ? 1 : n);
        memcpy(part, text.data, n);
        CHECK(ptst_tensors_parse(c, part, n, "part") == NULL);
        CHECK(ptst_error_code(c) == PTST_ERR_FORMAT);
        free(part);
    }
    CHECK(ptst_tensors_parse(c, text.data, text.size + 1, "longer") == NULL); /* the NUL */
    for (n = 0; n < text.size - 36;
         n++) { /* every bit of length and header: any verdict, no harm */
        int bit;
        for (bit = 0; bit < 8; bit++) {
            text.data[n] = (char)(text.data[n] ^ (1 << bit));
            ptst_tensors_close(c, ptst_tensors_parse(c, text.data, text.size, "bit"));
            text.data[n] = (char)(text.data[n] ^ (1 << bit));
        }
    }
    ptst_text_free(c, &text);
    st_remove_folder();
    ptst_close(c);
}

/* ---- sharded ---- */

static void st_index(ptst_ctx *c, const char *text) {
    CHECK(ptst__write_file(c, st_path("model.safetensors.index.json"), text, strlen(text)) ==
          PTST_OK);
}

static void st_sharded(void) {
    static const struct {
        const char *index;
        const char *error; /* part of the sentence, NULL = fine */
    } cases[] = {
        {"{\"metadata\":{},\"weight_map\":{\"a\":\"1.st\",\"b\":\"1.st\",\"c\":\"2.st\"}}", NULL},
        {"{\"weight_map\":{\"c\":\"2.st\",\"b\":\"1.st\"}}", NULL},
        {"{\"weight_map\":{\"a\":\"1.st\",\"x\":\"2.st\"}}", "tensor x is not in 2.st"},
        {"{\"weight_map\":{\"a\":\"1.st\",\"c\":\"1.st\",\"b\":\"2.st\"}}", "tensor c is not in"},
        {"{\"weight_map\":{\"a\":\"1.st\",\"b\":\"3.st\"}}", "tensor b: is there twice"},
        {"{\"weight_map\":{\"a\":\"0.st\"}}", "0.st"},
        {"{\"weight_map\":{\"a\":\"../1.st\"}}", "no plain name"},
        {"{\"weight_map\":{\"a\":\"/etc/passwd\"}}", "no plain name"},
        {"{\"weight_map\":{\"a\":\"..\"}}", "no plain name"},
        {"{\"weight_map\":{\"a\":\"x\\\\1.st\"}}", "no plain name"},
        {"{\"weight_map\":{\"a\":\"1.st\\u0000\"}}", "no plain name"},
        {"{\"weight_map\":{\"a\":\"\"}}", "no plain name"},
        {"{\"weight_map\":{\"a\":1}}", "no plain name"},
        {"{\"weight_map\":{}}", "weight_map"},
        {"{\"weight_map\":[]}", "weight_map"},
        {"{}", "weight_map"},
        {"{", "line 1"}};
    static const float v[4] = {1, 2, 3, 4};
    ptst_ctx *c = test_open(1, NULL);
    ptst_tensor list[2];
    size_t i;
    CHECK(st_make_folder());
    list[0] = st_tensor("a", "F32", 1, 4, 0, v);
    list[1] = st_tensor("b", "F32", 1, 2, 0, v);
    CHECK(ptst_tensors_write(c, st_path("1.st"), list, 2, NULL) == PTST_OK);
    CHECK(ptst_tensors_write(c, st_path("3.st"), list + 1, 1, NULL) == PTST_OK);
    list[0].name = "c";
    CHECK(ptst_tensors_write(c, st_path("2.st"), list, 1, NULL) == PTST_OK);
    CHECK(ptst_tensors_open(c, st_folder) == NULL && ptst_error_code(c) == PTST_ERR_NOT_FOUND);
    for (i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        ptst_tensors *t;
        st_index(c, cases[i].index);
        t = ptst_tensors_open(c, i % 2 == 0 ? st_folder : st_path("model.safetensors.index.json"));
        CHECK((t != NULL) == (cases[i].error == NULL));
        if (t == NULL && strstr(ptst_error_text(c), cases[i].error) == NULL) {
            CHECK_TEXT(ptst_error_text(c), cases[i].error);
        }
        if (t != NULL) {
            CHECK(ptst_tensors_count(t) == 3 && ptst_tensors_find(t, "c") != NULL);
        }
        ptst_tensors_close(c, t);
    }
    list[0].name = "single";
    CHECK(ptst_tensors_write(c, st_path("model.safetensors"), list, 1, NULL) == PTST_OK);
    {
        ptst_tensors *t = ptst_tensors_open(c, st_folder); /* the single file goes first */
        CHECK(t != NULL && ptst_tensors_find(t, "single") != NULL);
        /* replacing a mapped file leaves the mapping alone */
        list[0].name = "other";
        CHECK(ptst_tensors_write(c, st_path("model.safetensors"), list, 1, NULL) == PTST_OK);
        CHECK(t != NULL && memcmp(ptst_tensors_find(t, "single")->data, v, 16) == 0);
        ptst_tensors_close(c, t);
    }
    st_remove_folder();
    ptst_close(c);
}

static void st_missing(void) {
    ptst_ctx *c = test_open(1, NULL);
    CHECK(st_make_folder());
    CHECK(ptst_tensors_open(c, st_path("none.safetensors")) == NULL);
    CHECK(ptst_error_code(c) == PTST_ERR_NOT_FOUND);
    CHECK(ptst_tensors_open(c, st_path("none.json")) == NULL);
    CHECK(ptst_error_code(c) == PTST_ERR_NOT_FOUND);
    CHECK(ptst__write_file(c, st_path("empty.safetensors"), "", 0) == PTST_OK);
    CHECK(ptst_tensors_open(c, st_path("empty.safetensors")) == NULL);
    CHECK(ptst_error_code(c) == PTST_ERR_FORMAT);
    CHECK(mkfifo(st_path("pipe.safetensors"), 0600) == 0); /* nobody waits for a writer */
    CHECK(ptst_tensors_open(c, st_path("pipe.safetensors")) == NULL);
    CHECK(ptst_error_code(c) == PTST_ERR_NOT_FOUND);
    st_remove_folder();
    ptst_close(c);
}

/* ---- writer: what it refuses, streaming, memory ---- */

static void st_writer_refuses(void) {
    static const float v[4] = {1, 2, 3, 4};
    ptst_ctx *c = test_open(1, NULL);
    ptst_tensor list[2];
    ptst__tensors_writer w;
    CHECK(st_make_folder());
    list[0] = st_tensor("a", "F32", 1, 4, 0, v);
    list[1] = st_tensor("a", "F32", 1, 2, 0, v);
    CHECK(ptst_tensors_write(c, st_path("x"), list, 2, NULL) == PTST_ERR_ARGUMENT);
    list[1].name = "b";
    list[1].dtype_name = "F31";
    CHECK(ptst_tensors_write(c, st_path("x"), list, 2, NULL) == PTST_ERR_ARGUMENT);
    list[1].dtype_name = NULL;
    list[1].dtype = PTST_I8;
    CHECK(ptst_tensors_write(c, st_path("x"), list, 2, NULL) == PTST_ERR_ARGUMENT);
    list[1].dtype = PTST_BF16;
    list[1].rank = 9;
    CHECK(ptst_tensors_write(c, st_path("x"), list, 2, NULL) == PTST_ERR_ARGUMENT);
    list[1].rank = 2;
    list[1].shape[0] = list[1].shape[1] = (uint64_t)1 << 32;
    CHECK(ptst_tensors_write(c, st_path("x"), list, 2, NULL) == PTST_ERR_ARGUMENT);
    CHECK(ptst_tensors_write(c, st_path("no/folder"), list, 1, NULL) == PTST_ERR_NOT_FOUND);
    CHECK(ptst_tensors_write(c, st_path("x"), list, 1, NULL) == PTST_OK);

    list[1].shape[0] = list[1].shape[1] = 2; /* streaming: in pieces, in the order it asks for */
    CHECK(ptst__tensors_begin(c, &w, st_path("x"), list, 2, NULL) == PTST_OK);
    CHECK(ptst__tensors_next(&w) == 0 && w.left == 16);
    CHECK(ptst__tensors_put(c, &w, v, 4) == PTST_OK && ptst__tensors_next(&w) == 0);
    CHECK(ptst__tensors_put(c, &w, v + 1, 12) == PTST_OK && ptst__tensors_next(&w) == 1);
    CHECK(ptst__tensors_put(c, &w, v, 16) == PTST_ERR_ARGUMENT);
    CHECK(ptst__tensors_commit(c, &w) == PTST_ERR_ARGUMENT); /* b is missing: the old file stays */
    {
        ptst_tensors *t = ptst_tensors_open(c, st_path("x"));
        CHECK(t != NULL && ptst_tensors_count(t) == 1);
        ptst_tensors_close(c, t);
    }
    st_remove_folder();
    ptst_close(c);
}

static ptst_code st_round(ptst_ctx *c, void *arg) {
    static const char *const metadata[] = {"format", "pt", NULL};
    static const float v[4] = {1, 2, 3, 4};
    ptst_tensor list[2];
    ptst_tensors *t;
    ptst_code code;
    (void)arg;
    list[0] = st_tensor("a", "F32", 1, 4, 0, v);
    list[1] = st_tensor("b", "U8", 1, 3, 0, v);
    code = ptst_tensors_write(c, st_path("1.st"), list, 2, metadata);
    if (code == PTST_OK) {
        t = ptst_tensors_open(c, st_path("model.safetensors.index.json"));
        code = t == NULL ? ptst_error_code(c) : PTST_OK;
        CHECK(t == NULL || ptst_tensors_count(t) == 2);
        ptst_tensors_close(c, t);
    }
    return code;
}

static void st_memory(void) {
    static const char index[] = "{\"weight_map\":{\"a\":\"1.st\",\"b\":\"1.st\"}}";
    ptst_ctx *c = test_open(1, NULL);
    CHECK(st_make_folder());
    CHECK(ptst__write_file(c, st_path("model.safetensors.index.json"), index, sizeof index - 1) ==
          PTST_OK);
    test_memory_sweep(st_round, NULL);
    st_remove_folder();
    ptst_close(c);
}

/* Heap sort against the definition, on all sizes that have a different shape of the heap. */
static bool st_less(const void *list, uint32_t a, uint32_t b) {
    const uint32_t *v = (const uint32_t *)list;
    return v[a] < v[b];
}

static void st_sort(void) {
    uint32_t values[70], order[70];
    ptst_rng r = {1, 2, 0};
    uint32_t n, i, round;
    for (n = 0; n < 70; n++) {
        for (round = 0; round < 20; round++) {
            uint32_t sum = 0;
            for (i = 0; i < n; i++) {
                values[i] = ptst_rng_below(&r, round < 10 ? 5 : 1000);
                order[i] = i;
            }
            ptst__sort(order, n, values, st_less);
            for (i = 0; i < n; i++) {
                sum += order[i];
                CHECK(order[i] < n && (i == 0 || values[order[i - 1]] <= values[order[i]]));
            }
            CHECK(n == 0 || sum == n * (n - 1) / 2);
        }
    }
}

static void suite_safetensors(void) {
    RUN(st_verdicts);
    RUN(st_deep);
    RUN(st_types);
    RUN(st_unaligned);
    RUN(st_same_bytes);
    RUN(st_truncation);
    RUN(st_sharded);
    RUN(st_missing);
    RUN(st_writer_refuses);
    RUN(st_memory);
    RUN(st_sort);
}

MAIN(safetensors)
#undef A
#undef TEXT
