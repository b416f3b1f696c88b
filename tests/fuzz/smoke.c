/* A short run of the fuzz targets without libFuzzer: seeds and random changes of them, for a number
   of seconds; with a random start, and a text that the seeds taken contain. Any compiler; best with
   its sanitizers.

       cc -O1 -g -fsanitize=address,undefined -DTARGET='"fuzz_text.c"' tests/fuzz/smoke.c -o smoke \
          -lm -pthread && ./smoke 20 [1 [model_type]]                  (from the top folder) */
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
    "0{\"model_type\":\"qwen2\",\"vocab_size\":23,\"hidden_size\":12,\"intermediate_size\":10,"
    "\"num_hidden_layers\":2,\"num_attention_heads\":2,\"num_key_value_heads\":2,\"rope_scaling\":{"
    "\"rope_type\":\"yarn\",\"factor\":2,\"truncate\":false,\"mscale\":1,\"mscale_all_dim\":0.5},"
    "\"use_sliding_window\":true,\"sliding_window\":3,\"max_window_layers\":1,\"eos_token_id\":[1,2],"
    "\"layer_types\":[\"full_attention\",\"sliding_attention\"]}",
    "0{\"model_type\":\"phi3\",\"vocab_size\":9,\"hidden_size\":8,\"intermediate_size\":5,"
    "\"num_hidden_layers\":1,\"num_attention_heads\":2,\"rope_scaling\":{\"type\":\"su\",\"short_factor\""
    ":[1,1],\"long_factor\":[2,3]},\"original_max_position_embeddings\":7,\"sliding_window\":null,"
    "\"partial_rotary_factor\":1.0,\"tie_word_embeddings\":true}",
    "0{\"model_type\":\"gemma3_text\",\"vocab_size\":9,\"hidden_size\":6,\"intermediate_size\":5,"
    "\"num_hidden_layers\":3,\"num_attention_heads\":2,\"num_key_value_heads\":1,\"head_dim\":4,"
    "\"rope_parameters\":{\"full_attention\":{\"rope_type\":\"linear\",\"factor\":8.0,\"rope_theta\":1e6"
    "},\"sliding_attention\":{\"rope_type\":\"default\"}},\"sliding_window_pattern\":2,"
    "\"query_pre_attn_scalar\":4,\"final_logit_softcapping\":30,\"no_rope_layers\":[1,0]}",
    "0{\"model_type\":\"llama\",\"vocab_size\":9,\"hidden_size\":8,\"intermediate_size\":5,\"nu"
    "m_hidden_layers\":2,\"num_attention_heads\":2,\"num_key_value_heads\":1,\"rope_scaling\":{"
    "\"rope_type\":\"llama3\",\"factor\":8.0,\"low_freq_factor\":1.0,\"high_freq_factor\":4.0,"
    "\"original_max_position_embeddings\":8192},\"rope_theta\":500000.0,\"head_dim\":4,\"attent"
    "ion_bias\":false,\"mlp_bias\":true,\"max_position_embeddings\":99,\"torch_dtype\":\"bfloat"
    "16\"}",
    "0{\"model_type\":\"llama\",\"vocab_size\":9,\"hidden_size\":8,\"intermediate_size\":5,\"nu"
    "m_hidden_layers\":2,\"num_attention_heads\":2,\"num_key_value_heads\":1,\"rope_parameters"
    "\":{\"rope_type\":\"dynamic\",\"factor\":2.0,\"rope_theta\":10000.0},\"tie_word_embeddings"
    "\":true,\"dtype\":\"float32\",\"initializer_range\":0.02,\"bos_token_id\":1,\"pad_token_id"
    "\":null}",
    "0{\"model_type\":\"mistral\",\"vocab_size\":9,\"hidden_size\":8,\"intermediate_size\":5,\""
    "num_hidden_layers\":2,\"num_attention_heads\":2,\"num_key_value_heads\":1,\"sliding_window"
    "\":4,\"rope_theta\":10000.0,\"head_dim\":null}",
    "0{\"model_type\":\"mistral\",\"vocab_size\":9,\"hidden_size\":8,\"intermediate_size\":5,\""
    "num_hidden_layers\":2,\"num_attention_heads\":2,\"num_key_value_heads\":1,\"sliding_window"
    "\":null,\"rope_parameters\":{\"rope_type\":\"linear\",\"factor\":4.0,\"rope_theta\":100000"
    "0.0}}",
    "0{\"model_type\":\"qwen2\",\"vocab_size\":9,\"hidden_size\":8,\"intermediate_size\":5,\"nu"
    "m_hidden_layers\":2,\"num_attention_heads\":2,\"num_key_value_heads\":1,\"rope_parameters"
    "\":{\"rope_type\":\"default\",\"rope_theta\":1000000.0},\"layer_types\":[\"full_attention"
    "\",\"full_attention\"],\"sliding_window\":null,\"use_sliding_window\":false}",
    "0{\"model_type\":\"qwen3\",\"vocab_size\":9,\"hidden_size\":8,\"intermediate_size\":5,\"nu"
    "m_hidden_layers\":2,\"num_attention_heads\":2,\"num_key_value_heads\":1,\"head_dim\":6,\"a"
    "ttention_bias\":false,\"rope_scaling\":{\"type\":\"yarn\",\"factor\":4.0,\"original_max_po"
    "sition_embeddings\":32,\"beta_fast\":32,\"beta_slow\":1},\"sliding_window\":null}",
    "0{\"model_type\":\"qwen3\",\"vocab_size\":9,\"hidden_size\":8,\"intermediate_size\":5,\"nu"
    "m_hidden_layers\":2,\"num_attention_heads\":2,\"num_key_value_heads\":1,\"head_dim\":4,\"r"
    "ope_parameters\":{\"rope_type\":\"yarn\",\"factor\":4.0,\"attention_factor\":1.2,\"rope_th"
    "eta\":1000000.0},\"layer_types\":[\"sliding_attention\",\"full_attention\"],\"sliding_wind"
    "ow\":3,\"use_sliding_window\":true,\"max_window_layers\":0}",
    "0{\"model_type\":\"smollm3\",\"vocab_size\":9,\"hidden_size\":8,\"intermediate_size\":5,\""
    "num_hidden_layers\":2,\"num_attention_heads\":2,\"num_key_value_heads\":1,\"no_rope_layers"
    "\":[1,0],\"no_rope_layer_interval\":2,\"pad_token_id\":0,\"rope_theta\":5000000.0,\"use_sl"
    "iding_window\":false}",
    "0{\"model_type\":\"smollm3\",\"vocab_size\":9,\"hidden_size\":8,\"intermediate_size\":5,\""
    "num_hidden_layers\":2,\"num_attention_heads\":2,\"num_key_value_heads\":1,\"no_rope_layer_"
    "interval\":2,\"pad_token_id\":0,\"rope_parameters\":{\"rope_type\":\"default\",\"rope_thet"
    "a\":2000000.0},\"layer_types\":[\"full_attention\",\"sliding_attention\"],\"sliding_window"
    "\":2}",
    "0{\"model_type\":\"phi3\",\"vocab_size\":9,\"hidden_size\":8,\"intermediate_size\":5,\"num"
    "_hidden_layers\":2,\"num_attention_heads\":2,\"num_key_value_heads\":1,\"pad_token_id\":0,"
    "\"rope_parameters\":{\"rope_type\":\"longrope\",\"short_factor\":[1.0,1.1],\"long_factor\""
    ":[4.0,8.0],\"rope_theta\":10000.0,\"partial_rotary_factor\":1.0},\"original_max_position_e"
    "mbeddings\":16,\"max_position_embeddings\":64,\"partial_rotary_factor\":1.0,\"sliding_wind"
    "ow\":7}",
    "0{\"model_type\":\"gemma\",\"vocab_size\":9,\"hidden_size\":8,\"intermediate_size\":5,\"nu"
    "m_hidden_layers\":2,\"num_attention_heads\":2,\"num_key_value_heads\":1,\"head_dim\":4,\"h"
    "idden_act\":\"gelu\",\"hidden_activation\":null,\"rope_theta\":10000.0}",
    "0{\"model_type\":\"gemma\",\"vocab_size\":9,\"hidden_size\":8,\"intermediate_size\":5,\"nu"
    "m_hidden_layers\":2,\"num_attention_heads\":2,\"num_key_value_heads\":1,\"head_dim\":4,\"h"
    "idden_activation\":\"gelu_pytorch_tanh\",\"rope_parameters\":{\"rope_type\":\"default\",\""
    "rope_theta\":10000.0},\"attention_bias\":true}",
    "0{\"model_type\":\"gemma2\",\"vocab_size\":9,\"hidden_size\":8,\"intermediate_size\":5,\"n"
    "um_hidden_layers\":2,\"num_attention_heads\":2,\"num_key_value_heads\":1,\"head_dim\":4,\""
    "query_pre_attn_scalar\":4,\"attn_logit_softcapping\":50.0,\"final_logit_softcapping\":30.0"
    ",\"sliding_window\":5,\"hidden_activation\":\"gelu_pytorch_tanh\",\"cache_implementation\""
    ":\"hybrid\"}",
    "0{\"model_type\":\"gemma2\",\"vocab_size\":9,\"hidden_size\":8,\"intermediate_size\":5,\"n"
    "um_hidden_layers\":2,\"num_attention_heads\":2,\"num_key_value_heads\":1,\"head_dim\":4,\""
    "query_pre_attn_scalar\":7,\"final_logit_softcapping\":null,\"layer_types\":[\"sliding_atte"
    "ntion\",\"full_attention\"],\"sliding_window\":3,\"rope_parameters\":{\"rope_type\":\"defa"
    "ult\",\"rope_theta\":10000.0}}",
    "0{\"model_type\":\"gemma3_text\",\"vocab_size\":9,\"hidden_size\":8,\"intermediate_size\":"
    "5,\"num_hidden_layers\":2,\"num_attention_heads\":2,\"num_key_value_heads\":1,\"head_dim\""
    ":4,\"query_pre_attn_scalar\":4,\"rope_local_base_freq\":10000.0,\"rope_theta\":1000000.0,"
    "\"rope_scaling\":{\"rope_type\":\"linear\",\"factor\":8.0},\"sliding_window\":3,\"sliding_"
    "window_pattern\":2}",
    "1{\"eos_token_id\":[5,6],\"temperature\":0.6,\"top_p\":0.9,\"top_k\":20,\"do_sample\":true,"
    "\"repetition_penalty\":1.1,\"max_new_tokens\":99,\"min_p\":0.1,\"num_beams\":null}",
    "{\"t\":{\"dtype\":\"F32\",\"shape\":[2,1],\"data_offsets\":[0,8]},\"u\":{\"dtype\":\"BF16\","
    "\"shape\":[],\"data_offsets\":[8,10]},\"__metadata__\":{\"k\":\"v\"}}\n0123456789"};

enum { SMOKE_SEEDS = (int)(sizeof smoke_seeds / sizeof smoke_seeds[0]) };

/* One random change: a byte, a piece left out, doubled or moved, a piece of another seed. */
static size_t smoke_change(ptst_rng *r, uint8_t *p, size_t n, size_t room) {
    static const char bytes[] = "{}[]()\",:|%#-0123456789eE\\\x00\xFF\xC3 \n";
    size_t at = ptst_rng_below(r, (uint32_t)n + 1), size = 1 + ptst_rng_below(r, 24);
    const char *other = smoke_seeds[ptst_rng_below(r, SMOKE_SEEDS)];
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
        const char *seed = smoke_seeds[ptst_rng_below(&r, SMOKE_SEEDS)];
        uint8_t *exact, input[ROOM];
        size_t n = strlen(seed), changes = ptst_rng_below(&r, 12);
        if (argc > 3 && strstr(seed, argv[3]) == NULL) {
            continue;
        }
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
