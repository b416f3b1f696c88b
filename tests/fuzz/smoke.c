/* A short run of the fuzz targets without libFuzzer: seeds and random changes of them, for a number
   of seconds. Any compiler; best with its sanitizers.

       cc -O1 -g -fsanitize=address,undefined -DTARGET='"fuzz_text.c"' tests/fuzz/smoke.c -o smoke \
          -lm -pthread && ./smoke 20                                   (from the top folder) */
#include TARGET

static const char *const smoke_seeds[] = {
    "0{\"a\": [1, -2.5e3, \"x\\u00e9\\n\", true, null], \"b\": {\"c\": {}}}",
    "1{\"added_tokens\":[{\"id\":3,\"content\":\"<x>\",\"special\":true}],\"normalizer\":{\"type\":"
    "\"Sequence\",\"normalizers\":[{\"type\":\"NFC\"},{\"type\":\"Replace\",\"pattern\":{\"String\":"
    "\" \"},\"content\":\"_\"}]},\"pre_tokenizer\":{\"type\":\"ByteLevel\",\"add_prefix_space\":"
    "false},\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{"
    "\"id\":\"<x>\"}}],\"special_tokens\":{\"<x>\":{\"ids\":[3]}}},\"decoder\":{\"type\":"
    "\"ByteLevel\"},\"model\":{\"type\":\"BPE\",\"byte_fallback\":true,\"vocab\":{\"a\":0,\"b\":1,"
    "\"ab\":2},\"merges\":[\"a b\"]}}",
    "2{% for m in messages %}{{ m['role'] + ': ' + m.content | trim }}{% if not loop.last %}\n{% "
    "endif %}{% endfor %}{{ bos_token }}{{ tools | tojson(indent=2) }}",
    "3{% macro f(a, b=2) %}{{ a ~ b }}{% endmacro %}{% set ns = namespace(x=1) %}{{ f('q'[::-1]) }}{{ "
    "'%s-%05.2f' % ('a', 3) }}{{ range(3) | list | map('string') | join(',') }}",
    "4prompt,answer\n\"a \"\"quoted\"\" one\",b\nc,d\n",
    "5[{\"prompt\": \"a\", \"answer\": \"b\"}, \"c\"]",
    "6{\"question\": \"a\", \"answer\": \"b #### 3\"}\n{\"question\": \"c\", \"answer\": \"d\"}\n",
    "7one\ntwo\n\nthree",
    "{\"t\":{\"dtype\":\"F32\",\"shape\":[2,1],\"data_offsets\":[0,8]},\"u\":{\"dtype\":\"BF16\","
    "\"shape\":[],\"data_offsets\":[8,10]},\"__metadata__\":{\"k\":\"v\"}}\n0123456789"};

/* One random change: a byte, a piece left out, doubled or moved, a piece of another seed. */
static size_t smoke_change(ptst_rng *r, uint8_t *p, size_t n, size_t room) {
    static const char bytes[] = "{}[]()\",:|%#-0123456789eE\\\x00\xFF\xC3 \n";
    size_t at = ptst_rng_below(r, (uint32_t)n + 1), size = 1 + ptst_rng_below(r, 24);
    const char *other = smoke_seeds[ptst_rng_below(r, 9)];
    switch (ptst_rng_below(r, 4)) {
    case 0:
        if (at < n) {
            p[at] = (uint8_t)bytes[ptst_rng_below(r, sizeof bytes - 1)];
        }
        return n;
    case 1:
        size = size < n - at ? size : n - at;
        memmove(p + at, p + at + size, n - at - size);
        return n - size;
    case 2:
        size = size < n - at ? size : n - at;
        other = (const char *)p + at;
        break;
    default:
        other += ptst_rng_below(r, (uint32_t)strlen(other));
        size = size < strlen(other) ? size : strlen(other);
        break;
    }
    if (n + size <= room) {
        uint8_t piece[24];
        memcpy(piece, other, size);
        memmove(p + at + size, p + at, n - at);
        memcpy(p + at, piece, size);
        return n + size;
    }
    return n;
}

int main(int argc, char **argv) {
    enum { ROOM = 4096 };
    double seconds = argc > 1 ? strtod(argv[1], NULL) : 10, start = ptst__seconds();
    ptst_rng r = {argc > 2 ? strtoull(argv[2], NULL, 10) : 1, 0, 0};
    unsigned long runs = 0;
    while (ptst__seconds() - start < seconds) {
        const char *seed = smoke_seeds[ptst_rng_below(&r, 9)];
        uint8_t *exact, input[ROOM];
        size_t n = strlen(seed), changes = ptst_rng_below(&r, 12);
        memcpy(input, seed, n);
        for (; changes > 0; changes--) {
            n = smoke_change(&r, input, n, ROOM);
        }
        exact = (uint8_t *)malloc(n + 1); /* of its exact size, so that a read beyond it is seen */
        memcpy(exact, input, n);
        LLVMFuzzerTestOneInput(exact, n);
        free(exact);
        runs++;
    }
    printf("%lu inputs\n", runs);
    return 0;
}
