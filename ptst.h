/* ptst.h - fine-tune a Hugging Face chat model on a CPU, and measure what the prompt template
   did to its helpfulness and its safety. One header, C99 (also C++17), libc + libm + pthreads.

   >>docs ======================================================================================

   This block is the manual: how to include the header, a complete program, what it does not do,
   and the list of sections. Find a section by searching for its tag, for example ">>tokenizer".

   INCLUDE
       In exactly one source file, before any other include:
           #define PTST_IMPLEMENTATION
           #include "ptst.h"
       Everywhere else:
           #include "ptst.h"
       Build: cc -O2 -pthread file.c -lm       (no -m flag is needed: the kernels of the machine
       are chosen when a context is opened)

   CONTENTS (search for the tag)
       >>docs         this block
       >>api          all public declarations
       >>platform     compiler attributes, CPU features, files, memory mapping, clock
       >>core         context, errors, allocator, checked arithmetic, arenas, text, ids, hash map
       >>threads      the pool and the one parallel-for
       >>random       counter-based random numbers
       >>json         parser and writer
       >>unicode      UTF-8, category tables, normalisation
       >>tokenizer    tokenizer.json: text to ids and back
       >>jinja        the template language of chat templates
       >>template     the paper's templates, chat templates, prompt and answer spans
       >>safetensors  reader (mapped, sharded, validating) and atomic writer
       >>kernels      the operations: maths, scalar reference, AVX2, AVX-512, NEON
       >>model        config.json, weights, forward, backward, KV cache
       >>lora         adapters in PEFT format
       >>train        batches, loss, optimiser, schedules, checkpoint and resume
       >>generate     sampling and batched decoding
       >>data         jsonl, json, csv, txt
       >>judge        refusal lists, GSM8K answers, judge files, intervals
       >>experiment   train-template x test-template matrix and its report
       >>end          clean-up of private macros, licence
*/
#ifndef PTST_H
#define PTST_H

/* Must precede every system header, so it cannot wait for >>platform. */
#if defined(PTST_IMPLEMENTATION) && !defined(_POSIX_C_SOURCE) && !defined(_GNU_SOURCE) &&          \
    !defined(__APPLE__)
#define _POSIX_C_SOURCE 200809L
#endif

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifndef PTST_API
#ifdef PTST_STATIC
#define PTST_API static
#else
#define PTST_API extern
#endif
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* >>api =========================================================================================
   All public declarations, one block per section, in the order of the sections.

   Conventions that hold everywhere
   - The context comes first. One context is used by one thread at a time; it owns the allocator,
     the thread pool, the chosen kernels and the last error.
   - Functions return a ptst_code (PTST_OK is 0) or a pointer (NULL is failure). The reason is in
     ptst_error_text(c): one sentence that names file, key, tensor or line.
   - Option structs are zero-initialised; 0 or NULL means the default written beside the field.
   - Models, tokenizers, templates and tensor files are constant after loading and may be shared
     by any number of contexts with the same allocator. Sessions and trainers belong to one.
   - What a *_new, *_load, *_open or *_parse function returned is released by the matching *_free
     or *_close; NULL is allowed there. */

#define PTST_VERSION "0.1.0"

/* ---- api >>core ------------------------------------------------------------------------------ */

/* Every error of the library: name and short description (PTST_OK first). */
#define PTST_CODES(X)                                                                              \
    X(OK, "no error")                                                                              \
    X(ERR_ARGUMENT, "a value passed by the caller is not allowed")                                 \
    X(ERR_MEMORY, "out of memory")                                                                 \
    X(ERR_NOT_FOUND, "a file or folder is missing")                                                \
    X(ERR_IO, "reading or writing a file failed")                                                  \
    X(ERR_FORMAT, "a file is damaged or not of the expected format")                               \
    X(ERR_UNSUPPORTED, "a file is valid but uses something that is not supported")                 \
    X(ERR_MISMATCH, "two inputs do not fit together")                                              \
    X(ERR_LIMIT, "a limit on size, depth or steps was reached")                                    \
    X(ERR_NUMERIC, "a result is not finite")                                                       \
    X(ERR_STOPPED, "stopped on request; finished work is saved")

typedef enum ptst_code {
#define PTST__X(name, text) PTST_##name,
    PTST_CODES(PTST__X)
#undef PTST__X
    PTST_CODE_COUNT
} ptst_code;

/* Memory. alloc returns NULL on failure, release takes back what alloc gave (size as asked). Both
   may be called from worker threads only while a parallel operation runs in this context. */
typedef struct ptst_allocator {
    void *(*alloc)(void *user, size_t size);
    void (*release)(void *user, void *pointer, size_t size);
    void *user;
} ptst_allocator;

/* What a long call is doing; passed to ptst_desc.progress now and then. */
typedef struct ptst_progress {
    const char *stage; /* "train", "generate", ...: constant text */
    const char *item;  /* what it works on (cell, file), may be NULL */
    double done;       /* of total, in `unit` */
    double total;
    const char *unit; /* "step", "answer", ... */
    double loss;      /* train: last loss, otherwise 0 */
    double rate;      /* tokens per second, 0 = unknown */
} ptst_progress;

typedef enum ptst_log_level { PTST_LOG_INFO, PTST_LOG_WARNING } ptst_log_level;

/* Options of ptst_open. */
typedef struct ptst_desc {
    ptst_allocator allocator; /* all NULL = malloc and free */
    int threads;              /* 0 = all cores, 1 = no worker threads */
    const char *simd;         /* NULL = best; "scalar", "avx2", "avx512", "neon" */
    /* NULL = none. Called from the thread that made the call. A value other than 0 asks the call
       to save its work and return PTST_ERR_STOPPED. */
    int (*progress)(void *user, const ptst_progress *progress);
    /* NULL = none. One sentence without newline. */
    void (*log)(void *user, ptst_log_level level, const char *text);
    void *user; /* first argument of both */
} ptst_desc;

typedef struct ptst_ctx ptst_ctx;

/* Opens a context; desc may be NULL. On failure *out is NULL and the code says why
   (PTST_ERR_MEMORY, or PTST_ERR_ARGUMENT for an unknown or absent instruction set). */
PTST_API ptst_code ptst_open(const ptst_desc *desc, ptst_ctx **out);
/* Ends the threads and releases the context. Everything made with it must be freed before. */
PTST_API void ptst_close(ptst_ctx *c);
/* Code and sentence of the last failure in this context; PTST_OK and "" if there was none. The
   text is owned by the context and valid until the next failure. */
PTST_API ptst_code ptst_error_code(const ptst_ctx *c);
PTST_API const char *ptst_error_text(const ptst_ctx *c);
/* "ERR_FORMAT", ...; "unknown" for a value out of range. Static text. */
PTST_API const char *ptst_code_name(ptst_code code);
/* "scalar", "avx2", "avx512", "neon": the kernels that this context uses. */
PTST_API const char *ptst_simd_name(const ptst_ctx *c);
/* Number of threads that this context uses, at least 1. */
PTST_API int ptst_thread_count(const ptst_ctx *c);

/* Growable bytes; data is NUL-terminated (or NULL while empty), size does not count the NUL.
   Zero-initialise before the first use, release with ptst_text_free. */
typedef struct ptst_text {
    char *data;
    size_t size;
    size_t capacity;
} ptst_text;

/* Growable token ids, same rules. */
typedef struct ptst_ids {
    int32_t *data;
    size_t count;
    size_t capacity;
} ptst_ids;

PTST_API ptst_code ptst_text_append(ptst_ctx *c, ptst_text *t, const char *bytes, size_t size);
PTST_API void ptst_text_free(ptst_ctx *c, ptst_text *t);
PTST_API ptst_code ptst_ids_append(ptst_ctx *c, ptst_ids *t, int32_t id);
PTST_API void ptst_ids_free(ptst_ctx *c, ptst_ids *t);

/* Element types of tensors, named as in safetensors ("F32", "F16", "BF16"); I8 and I4 are block
   formats that exist only in memory. PTST_DTYPE_FILE as an option = "as in the file". */
typedef enum ptst_dtype {
    PTST_DTYPE_FILE,
    PTST_F32,
    PTST_F16,
    PTST_BF16,
    PTST_I8,
    PTST_I4
} ptst_dtype;

/* ---- api >>random ---------------------------------------------------------------------------- */

/* Counter-based generator (Philox4x32-10, Salmon et al. 2011): number i of stream (seed, stream)
   is a pure function, so results do not depend on threads, and resuming needs only the counter. */
typedef struct ptst_rng {
    uint64_t seed;
    uint64_t stream;
    uint64_t counter; /* numbers drawn so far */
} ptst_rng;

PTST_API uint32_t ptst_rng_u32(ptst_rng *r);
/* Uniform in [0, 1) with 24 bits. */
PTST_API float ptst_rng_uniform(ptst_rng *r);
/* Mean 0, variance 1: sum of 12 uniforms minus 6 (integer arithmetic, so the same bits on every
   machine; never beyond +-6). Draws 12 numbers. */
PTST_API float ptst_rng_normal(ptst_rng *r);
/* Uniform in 0..n-1 without bias; n = 0 gives 0. */
PTST_API uint32_t ptst_rng_below(ptst_rng *r, uint32_t n);

/* ---- api >>json ------------------------------------------------------------------------------ */

typedef enum ptst_json_type {
    PTST_JSON_NULL,
    PTST_JSON_FALSE,
    PTST_JSON_TRUE,
    PTST_JSON_NUMBER,
    PTST_JSON_STRING,
    PTST_JSON_ARRAY,
    PTST_JSON_OBJECT
} ptst_json_type;

/* A parsed document: a constant tree of nodes. Node 0 is the root; a node is an index, -1 means
   "not there" and is accepted by every function below. */
typedef struct ptst_json ptst_json;

/* Parses size bytes of UTF-8 (RFC 8259, strict; nesting up to 256). name is used in errors only
   ("config.json"). The text is copied. */
PTST_API ptst_json *ptst_json_parse(ptst_ctx *c, const char *text, size_t size, const char *name);
/* The same for a file. */
PTST_API ptst_json *ptst_json_load(ptst_ctx *c, const char *path);
PTST_API void ptst_json_free(ptst_ctx *c, ptst_json *j);
/* Type of a node; PTST_JSON_NULL for -1. */
PTST_API ptst_json_type ptst_json_kind(const ptst_json *j, int32_t node);
/* Value of a key in an object (the last one if it is there twice), -1 if absent or no object. */
PTST_API int32_t ptst_json_get(const ptst_json *j, int32_t object, const char *key);
/* Members of an object, elements of an array, bytes of a string; 0 otherwise. */
PTST_API size_t ptst_json_size(const ptst_json *j, int32_t node);
/* First child of an array or object (in an object: the key, a string node whose value follows),
   and the node after a given one; -1 at the end. Walk an object by key = first;
   value = next(key); key = next(value). */
PTST_API int32_t ptst_json_first(const ptst_json *j, int32_t node);
PTST_API int32_t ptst_json_next(const ptst_json *j, int32_t node);
/* Element i of an array, -1 if out of range. Linear time. */
PTST_API int32_t ptst_json_at(const ptst_json *j, int32_t array, size_t i);
/* Unescaped bytes of a string, NUL-terminated (and possibly with NUL inside: ask for the size);
   NULL if it is no string. Owned by the document. size may be NULL. */
PTST_API const char *ptst_json_string(const ptst_json *j, int32_t node, size_t *size);
/* Value of a number; fallback if it is none. */
PTST_API double ptst_json_number(const ptst_json *j, int32_t node, double fallback);
/* Source text of a number ("1e5"), NULL if it is none. */
PTST_API const char *ptst_json_number_text(const ptst_json *j, int32_t node, size_t *size);
/* true or false; fallback if it is neither. */
PTST_API bool ptst_json_bool(const ptst_json *j, int32_t node, bool fallback);
/* Line of the node in the source, from 1. */
PTST_API int ptst_json_line(const ptst_json *j, int32_t node);

/* ---- api >>tokenizer ------------------------------------------------------------------------- */

/* ---- api >>jinja ----------------------------------------------------------------------------- */

/* Where a byte of a rendered prompt comes from. Only PTST_TEMPLATE bytes may become special tokens;
   the others are somebody's text, whatever it looks like. */
typedef enum ptst_mark {
    PTST_TEMPLATE = 0, /* the template's own text, and the special tokens (bos_token, ...) */
    PTST_CONTENT = 1,  /* derived from a string of the context: messages, tools, documents, ... */
    PTST_ASSISTANT = 2 /* derived from what a message with role "assistant" says */
} ptst_mark;

/* Limits of one rendering and its clock; 0 = default. A limit that is reached is PTST_ERR_LIMIT. */
typedef struct ptst_jinja_desc {
    size_t steps;  /* evaluation steps; 0 = 400000 + 32 for each byte of the context */
    size_t memory; /* bytes in use at a time; 0 = 48 MiB + 8 for each byte of the context */
    size_t output; /* bytes of text; 0 = 8 MiB + 4 for each byte of the context */
    size_t depth;  /* nesting of evaluation (macro calls, values); 0 = 800 */
    int64_t now;   /* what strftime_now prints, seconds since 1970 as UTC; 0 = the local clock */
} ptst_jinja_desc;

/* A compiled template of the Jinja language as transformers sets it up: trim_blocks, lstrip_blocks,
   loop controls, {% generation %}, immutable sandbox, raise_exception, strftime_now, tojson. */
typedef struct ptst_jinja ptst_jinja;

/* Compiles size bytes of UTF-8; name is used in errors only ("chat_template.jinja"), which say
   line and column. */
PTST_API ptst_jinja *ptst_jinja_compile(ptst_ctx *c, const char *source, size_t size,
                                        const char *name);
PTST_API void ptst_jinja_free(ptst_ctx *c, ptst_jinja *t);
/* Renders with the members of the context's root object as variables. Strings of variables called
   *_token count as template bytes, all others as content. Replaces *out and *marks (marks may be
   NULL): marks->data[i] is the ptst_mark of byte i. desc may be NULL. The template is not changed
   and may be used by several contexts at once. On failure both texts are empty. */
PTST_API ptst_code ptst_jinja_render(ptst_ctx *c, const ptst_jinja *t, const ptst_json *context,
                                     const ptst_jinja_desc *desc, ptst_text *out,
                                     ptst_text *marks);

/* ---- api >>template -------------------------------------------------------------------------- */

/* A prompt ready for the tokenizer (ptst_encode_marked). Zero-initialise, release with
   ptst_prompt_free; the functions below replace what is in it. */
typedef struct ptst_prompt {
    ptst_text text;
    ptst_text marks; /* a ptst_mark for each byte of text */
    ptst_text learn; /* 1 for each byte that a model should learn to write (answers of the assistant
                        up to their end-of-text), 0 otherwise */
    bool has_bos;    /* the text begins with the bos token: the tokenizer must not add another */
} ptst_prompt;

PTST_API void ptst_prompt_free(ptst_ctx *c, ptst_prompt *p);

typedef struct ptst_template ptst_template;

/* Loads a template:
     "gsm:chat:llama", "CL"   a template of the paper's code by its name or short name
     "model:llama"            the same system prompt and wording of the question through the model's
                              own chat template: model:vanilla, alpaca, llama, llama-short, mpt,
                              and model:none (the bare question)
     "FILE.jinja"             a chat template; the question becomes one user message
     "FOLDER"                 the chat template of a model folder, as model:none
     "FILE.json"              {"name": "...%s..."}; "FILE.json#name" or "FILE.json:name" chooses one
   model_dir is the model's folder, or NULL: source of the chat template and of the special tokens.
   Chat templates are looked up as transformers does: chat_template.jinja and chat_templates/ before
   the chat_template of tokenizer_config.json. */
PTST_API ptst_template *ptst_template_load(ptst_ctx *c, const char *name_or_path,
                                           const char *model_dir);
PTST_API void ptst_template_free(ptst_ctx *c, ptst_template *t);
/* "gsm:chat:llama", "model:llama", the path, or the user's own name. Owned by the template. */
PTST_API const char *ptst_template_name(const ptst_template *t);
/* "CL"; NULL if it has none. */
PTST_API const char *ptst_template_short_name(const ptst_template *t);
/* Does it go through a chat template (and so can render messages)? */
PTST_API bool ptst_template_is_chat(const ptst_template *t);
/* The prompt for one question: %s is replaced by it, or it becomes a message. */
PTST_API ptst_code ptst_template_prompt(ptst_ctx *c, const ptst_template *t, const char *question,
                                        size_t size, ptst_prompt *out);
/* The prompt of a conversation, as apply_chat_template makes it: the root of conversation is the
   list of messages, or an object with "messages" and further variables (tools, documents, ...).
   A template of the paper takes user messages only, one after the other. */
PTST_API ptst_code ptst_template_messages(ptst_ctx *c, const ptst_template *t,
                                          const ptst_json *conversation,
                                          bool add_generation_prompt, ptst_prompt *out);
/* Renders with exactly these variables (root object), plus the special tokens of the model that it
   does not set itself. */
PTST_API ptst_code ptst_template_context(ptst_ctx *c, const ptst_template *t,
                                         const ptst_json *context, ptst_prompt *out);
/* Enumerates the paper's templates and the model: ones by i = 0, 1, ...; NULL at the end.
   short_name and text (with %s; NULL for model: ones) may be NULL. Static text. */
PTST_API const char *ptst_template_at(size_t i, const char **short_name, const char **text);

/* ---- api >>safetensors ----------------------------------------------------------------------- */

/* A tensor of a file. All pointers are owned by the ptst_tensors it came from. When a list is
   written, count and bytes are not read and dtype_name may be NULL. */
typedef struct ptst_tensor {
    const char *name;       /* UTF-8 */
    const char *dtype_name; /* as in the file: "F32", "BF16", "I64", ... */
    ptst_dtype dtype;       /* PTST_F32, PTST_F16, PTST_BF16; PTST_DTYPE_FILE = no weight type */
    int rank;               /* 0 (one element) .. 8 */
    uint64_t shape[8];
    uint64_t count;   /* elements */
    const void *data; /* little-endian, row-major, aligned to the element; NULL if bytes is 0 */
    size_t bytes;
} ptst_tensor;

/* The tensors of a .safetensors file or of a sharded model: mapped, validated, constant. */
typedef struct ptst_tensors ptst_tensors;

/* Opens path: a .safetensors file, a *.index.json beside its shards, or a folder that holds
   model.safetensors, model.safetensors.index.json or adapter_model.safetensors (the first that is
   there). The files stay mapped: they may be replaced (renamed over), but must not be shortened,
   while the tensors are open. Format: github.com/huggingface/safetensors; stricter than the
   reference in that a tensor must not be there twice, the header begins with '{', names hold no
   NUL and the rank is at most 8. Tensors lie in the order of the headers. */
PTST_API ptst_tensors *ptst_tensors_open(ptst_ctx *c, const char *path);
/* The same for the bytes of one file in memory, which must outlive the tensors. name is used in
   errors only. */
PTST_API ptst_tensors *ptst_tensors_parse(ptst_ctx *c, const void *data, size_t size,
                                          const char *name);
PTST_API void ptst_tensors_close(ptst_ctx *c, ptst_tensors *t);
PTST_API size_t ptst_tensors_count(const ptst_tensors *t);
/* Tensor i, NULL if out of range; the tensor of a name, NULL if there is none. */
PTST_API const ptst_tensor *ptst_tensors_at(const ptst_tensors *t, size_t i);
PTST_API const ptst_tensor *ptst_tensors_find(const ptst_tensors *t, const char *name);
/* Value of a key in __metadata__ (of the first shard that has it), NULL if there is none. */
PTST_API const char *ptst_tensors_metadata(const ptst_tensors *t, const char *key);
/* Writes a .safetensors file, byte for byte as the reference does: it appears whole or not at
   all. metadata: key, value, key, value, ..., NULL; or NULL for none. */
PTST_API ptst_code ptst_tensors_write(ptst_ctx *c, const char *path, const ptst_tensor *list,
                                      size_t count, const char *const *metadata);

/* ---- api >>kernels --------------------------------------------------------------------------- */

/* Reference maths: the operations of a transformer on plain row-major float arrays. They run on
   the threads and kernels of the context, allocate nothing and cannot fail. Outputs must not
   overlap inputs. "+=" marks gradients that are added to what the buffer holds. */

/* Linear layer without bias: y [M, N] = x [M, K] w^T with w [N, K]. */
PTST_API void ptst_matmul_forward(ptst_ctx *c, size_t M, size_t N, size_t K, const float *x,
                                  const float *w, float *y);
/* dx [M, K] += dy w and dw [N, K] += dy^T x, for dy [M, N]; dx, dw may be NULL. */
PTST_API void ptst_matmul_backward(ptst_ctx *c, size_t M, size_t N, size_t K, const float *x,
                                   const float *w, const float *dy, float *dx, float *dw);

/* RMSNorm of T rows: y [T, C] = x [T, C] * rstd * w [C], rstd [T] = 1 / sqrt(mean(x^2) + eps).
   rstd may be NULL if no backward pass follows. y may be x. */
PTST_API void ptst_rmsnorm_forward(ptst_ctx *c, size_t T, size_t C, float eps, const float *x,
                                   const float *w, float *y, float *rstd);
/* dx [T, C] += and dw [C] +=, either may be NULL. */
PTST_API void ptst_rmsnorm_backward(ptst_ctx *c, size_t T, size_t C, const float *x, const float *w,
                                    const float *rstd, const float *dy, float *dx, float *dw);

/* Rotary position embedding in place: H heads of D floats side by side in each of T rows that are
   ld floats apart; the first R <= D floats of a head (R even) turn, element i with element
   i + R/2, as in Hugging Face models. cosines, sines: [position, R/2], scaling included;
   positions [T], or NULL for 0..T-1. inverse turns back, which is the backward pass. */
PTST_API void ptst_rope(ptst_ctx *c, size_t T, size_t H, size_t D, size_t R, float *x, size_t ld,
                        const float *cosines, const float *sines, const int32_t *positions,
                        bool inverse);

/* y = silu(gate) * up, silu(z) = z / (1 + exp(-z)), for n elements. y may be gate or up. */
PTST_API void ptst_swiglu_forward(ptst_ctx *c, size_t n, const float *gate, const float *up,
                                  float *y);
/* Writes dgate and dup; dgate may be gate, dup may be up, and any of both may be dy. */
PTST_API void ptst_swiglu_backward(ptst_ctx *c, size_t n, const float *gate, const float *up,
                                   const float *dy, float *dgate, float *dup);

/* One sequence (or a piece of one) in a batch: `count` rows of queries and the keys and values
   they look at. These lie in two blocks, as if one followed the other: block 0 may be shared by
   many spans (a common prefix, 0 rows if there is none), block 1 is the span's own. The last
   query stands at the last key: query i of the span sees block 0 and the first
   keys[1] - count + i + 1 rows of block 1. */
typedef struct ptst_span {
    size_t query;             /* first row in q, out, lse */
    size_t count;             /* rows from there on */
    const float *k[2], *v[2]; /* [keys[b], K, D], rows kv_ld floats apart; NULL if 0 keys */
    size_t keys[2];
    float *dk[2], *dv[2]; /* backward only; same layout, += ; equal exactly if k are */
} ptst_span;

/* Attention with H query heads on K key heads (K divides H; head h looks at key head
   h / (H / K)), D floats each. */
typedef struct ptst_attention {
    size_t H, K, D;
    float scale;            /* of the dot products, usually 1 / sqrt(D) */
    size_t window;          /* a query sees this many keys up to its own; 0 = all */
    size_t q_ld, kv_ld;     /* floats from row to row of q and dq; of k, v, dk and dv */
    const ptst_span *spans; /* their rows of q must not overlap */
    size_t spans_count;
} ptst_attention;

/* out [row, H, D] = softmax(scale q k^T) v for the rows of all spans (other rows are left alone).
   q: [row, H, D] with q_ld floats from row to row. lse [row, H] = log of the sum of the
   exponentials, needed for backward; may be NULL. A row that sees no key gives 0 (lse -inf). No
   buffer grows with the square of the length. */
PTST_API void ptst_attention_forward(ptst_ctx *c, const ptst_attention *a, const float *q,
                                     float *out, float *lse);
/* Bytes of scratch that ptst_attention_backward needs; linear in rows and keys. */
PTST_API size_t ptst_attention_backward_scratch(const ptst_attention *a);
/* From out, lse of the forward pass and dout [row, H, D]: writes dq (layout of q), adds to dk and
   dv of the spans. Probabilities are computed again from lse. */
PTST_API void ptst_attention_backward(ptst_ctx *c, const ptst_attention *a, const float *q,
                                      const float *out, const float *lse, const float *dout,
                                      float *dq, void *scratch);

/* Softmax and cross-entropy: losses[r] = -log softmax(logits[r])[labels[r]] for logits [rows, V];
   0 for a label that is negative or not below V. If scale is not 0, logits become their gradient
   (softmax - onehot) * scale (0 for rows without a label); if it is 0 they are only read. */
PTST_API void ptst_cross_entropy(ptst_ctx *c, size_t rows, size_t V, float *logits,
                                 const int32_t *labels, double *losses, float scale);

/* One step of AdamW (Loshchilov and Hutter 2019, the formula of torch.optim.AdamW) for n weights w
   with gradients g * grad_scale and moments m, v (zero before the first step); step counts
   from 1. */
PTST_API void ptst_adamw(ptst_ctx *c, size_t n, float *w, const float *g, float *m, float *v,
                         double lr, double beta1, double beta2, double eps, double weight_decay,
                         uint64_t step, double grad_scale);

/* ---- api >>model ----------------------------------------------------------------------------- */

/* ---- api >>lora ------------------------------------------------------------------------------ */

/* ---- api >>train ----------------------------------------------------------------------------- */

/* ---- api >>generate -------------------------------------------------------------------------- */

/* ---- api >>data ------------------------------------------------------------------------------ */

/* ---- api >>judge ----------------------------------------------------------------------------- */

/* ---- api >>experiment ------------------------------------------------------------------------ */

/* ---- api end --------------------------------------------------------------------------------- */

#ifdef __cplusplus
}
#endif
#endif /* PTST_H */

/* ================================================================================================
   The implementation starts here.
   ============================================================================================= */
#if defined(PTST_IMPLEMENTATION) && !defined(PTST_IMPLEMENTATION_DONE)
#define PTST_IMPLEMENTATION_DONE

/* >>platform ====================================================================================
   What differs between compilers, processors and operating systems: attributes, CPU features,
   files, memory mapping, the clock. Relies on POSIX.1-2008. Afterwards no other section mentions
   a system call. Tested by tests/test_core.c. */

#include <errno.h>
#include <fcntl.h>
#include <locale.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <dirent.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#ifndef PTST_NO_THREADS
#include <pthread.h>
#endif

#if defined(__STRICT_ANSI__) && (!defined(_POSIX_C_SOURCE) || _POSIX_C_SOURCE < 200809L)
#error "ptst.h: include the implementation first, or define _POSIX_C_SOURCE 200809L"
#endif

/* PTST__X86 / PTST__NEON: SIMD variants are compiled. TinyCC has no intrinsics. */
#if !defined(PTST_NO_SIMD) && !defined(__TINYC__) && (defined(__GNUC__) || defined(__clang__))
#if defined(__x86_64__)
#define PTST__X86 1
#include <immintrin.h>
#elif defined(__aarch64__)
#define PTST__NEON 1
#include <arm_neon.h>
#endif
#endif
#ifndef PTST__X86
#define PTST__X86 0
#endif
#ifndef PTST__NEON
#define PTST__NEON 0
#endif

/* Functions compiled for one instruction set inside a file compiled for the baseline. */
#if PTST__X86
#define PTST__AVX2 __attribute__((target("avx2,fma,f16c")))
#define PTST__AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#endif

#if defined(__GNUC__) || defined(__clang__)
#define PTST__PRINTF(text, first) __attribute__((format(printf, text, first)))
#define PTST__UNUSED __attribute__((unused))
#define PTST__RESTRICT __restrict__
#define PTST__INLINE static inline __attribute__((always_inline))
#else
#define PTST__PRINTF(text, first)
#define PTST__UNUSED
#define PTST__RESTRICT
#define PTST__INLINE static inline
#endif

/* Relaxed and acquire/release operations for the thread pool. TinyCC has no builtins; there the
   pool takes its lock instead (see >>threads). */
#if (defined(__GNUC__) || defined(__clang__)) && !defined(__TINYC__)
#define PTST__ATOMICS 1
#else
#define PTST__ATOMICS 0
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum { PTST__CPU_AVX2 = 1, PTST__CPU_AVX512 = 2, PTST__CPU_NEON = 4 };

/* Bits of PTST__CPU_*: what this processor (and operating system) can run. */
static int ptst__cpu_features(void) {
    int bits = 0;
#if PTST__X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        bits |= PTST__CPU_AVX2; /* every processor with AVX2 has F16C */
    }
    if ((bits & PTST__CPU_AVX2) && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
        bits |= PTST__CPU_AVX512;
    }
#elif PTST__NEON
    bits |= PTST__CPU_NEON; /* part of the AArch64 baseline */
#endif
    return bits;
}

static int ptst__core_count(void) {
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n < 1 ? 1 : n > 1024 ? 1024 : (int)n;
}

/* Seconds of a clock that never goes back. */
PTST__UNUSED static double ptst__seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* 1 file, 2 folder, 0 neither or absent. */
static int ptst__path_kind(const char *path) {
    struct stat s;
    if (stat(path, &s) != 0) {
        return 0;
    }
    return S_ISDIR(s.st_mode) ? 2 : S_ISREG(s.st_mode) ? 1 : 0;
}

/* Maps a whole file for reading. Returns 0, or an errno value. An empty file gives data NULL. */
PTST__UNUSED static int ptst__map_file(const char *path, const void **data, size_t *size) {
    struct stat s;
    void *p;
    int fd = open(path, O_RDONLY);
    *data = NULL;
    *size = 0;
    if (fd < 0) {
        return errno;
    }
    if (fstat(fd, &s) != 0 || S_ISDIR(s.st_mode)) {
        int e = S_ISDIR(s.st_mode) ? EISDIR : errno;
        close(fd);
        return e;
    }
    if (s.st_size == 0) {
        close(fd);
        return 0;
    }
    if ((uint64_t)s.st_size > SIZE_MAX) {
        close(fd);
        return EFBIG;
    }
    p = mmap(NULL, (size_t)s.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    close(fd);
    if (p == MAP_FAILED) {
        return errno;
    }
    *data = p;
    *size = (size_t)s.st_size;
    return 0;
}

PTST__UNUSED static void ptst__unmap_file(const void *data, size_t size) {
    if (data != NULL) {
        munmap((void *)(uintptr_t)data, size);
    }
}

/* Flushes a folder entry (after a rename) to the disk; failure is harmless and ignored. */
static void ptst__sync_folder_of(const char *path) {
    char folder[4096];
    const char *slash = strrchr(path, '/');
    size_t n = slash == NULL ? 0 : (size_t)(slash - path);
    int fd;
    if (n >= sizeof folder) {
        return;
    }
    memcpy(folder, path, n);
    folder[n] = 0;
    fd = open(slash == NULL ? "." : n == 0 ? "/" : folder, O_RDONLY);
    if (fd >= 0) {
        (void)fsync(fd);
        close(fd);
    }
}

/* >>core ========================================================================================
   The context and what everything is built from: errors, allocation, checked arithmetic, arenas,
   growable text and ids, a hash map, reading and atomically writing whole files. Relies on
   >>platform. Afterwards no other section calls malloc, free or fopen. Tested by
   tests/test_core.c. */

typedef struct ptst__pool ptst__pool;
struct ptst__kernels;

struct ptst_ctx {
    ptst_allocator allocator;
    ptst_desc desc;
    ptst_code code;
    char error[1024];
    int threads;
    ptst__pool *pool;
    const struct ptst__kernels *kernels; /* chosen in ptst_open, see >>kernels */
    void *scratch;                       /* packing buffers of the kernels, see >>kernels */
    size_t scratch_size;
};

/* The largest number of threads of a context. */
enum { PTST__THREADS_MAX = 256 };

/* Records the reason of a failure and returns its code, so that `return ptst__fail(...)` works. */
PTST__PRINTF(3, 4)
static ptst_code ptst__fail(ptst_ctx *c, ptst_code code, const char *format, ...) {
    va_list args;
    c->code = code;
    va_start(args, format);
    vsnprintf(c->error, sizeof c->error, format, args);
    va_end(args);
    return code;
}

static ptst_code ptst__fail_memory(ptst_ctx *c, size_t size) {
    return ptst__fail(c, PTST_ERR_MEMORY, "out of memory: %llu more bytes were needed",
                      (unsigned long long)size);
}

/* Failure of a system call on a path. */
static ptst_code ptst__fail_errno(ptst_ctx *c, const char *path, const char *verb, int error) {
    ptst_code code = error == ENOENT || error == ENOTDIR ? PTST_ERR_NOT_FOUND
                     : error == ENOMEM                   ? PTST_ERR_MEMORY
                                                         : PTST_ERR_IO;
    return ptst__fail(c, code, "%s: cannot %s: %s", path, verb, strerror(error));
}

PTST__PRINTF(3, 4)
PTST__UNUSED static void ptst__log(ptst_ctx *c, ptst_log_level level, const char *format, ...) {
    char text[1024];
    va_list args;
    if (c->desc.log == NULL) {
        return;
    }
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    c->desc.log(c->desc.user, level, text);
}

/* Tells the caller how far a long call is; PTST_ERR_STOPPED if it wants to stop. */
PTST__UNUSED static ptst_code ptst__report(ptst_ctx *c, const ptst_progress *p) {
    if (c->desc.progress != NULL && c->desc.progress(c->desc.user, p) != 0) {
        return ptst__fail(c, PTST_ERR_STOPPED, "stopped on request while in %s", p->stage);
    }
    return PTST_OK;
}

/* ---- checked arithmetic ---- */

/* *out = a * b (a + b); false if it does not fit. */
static bool ptst__mul(size_t a, size_t b, size_t *out) {
    if (a != 0 && b > SIZE_MAX / a) {
        return false;
    }
    *out = a * b;
    return true;
}

static bool ptst__add(size_t a, size_t b, size_t *out) {
    if (b > SIZE_MAX - a) {
        return false;
    }
    *out = a + b;
    return true;
}

/* ---- allocation ----
   Each block is preceded by its true start and size, so that releasing needs only the pointer;
   blocks are aligned to 64 bytes (a cache line, a 512-bit register). */

enum { PTST__ALIGN = 64 };

typedef struct ptst__block {
    void *base;
    size_t size;
} ptst__block;

static void *ptst__malloc(void *user, size_t size) {
    (void)user;
    return malloc(size);
}

static void ptst__mfree(void *user, void *pointer, size_t size) {
    (void)user;
    (void)size;
    free(pointer);
}

static void *ptst__alloc_with(const ptst_allocator *a, size_t size) {
    size_t total;
    char *base, *p;
    ptst__block block;
    if (!ptst__add(size, sizeof block + PTST__ALIGN, &total)) {
        return NULL;
    }
    base = (char *)a->alloc(a->user, total);
    if (base == NULL) {
        return NULL;
    }
    p = base + sizeof block;
    p += (PTST__ALIGN - (uintptr_t)p % PTST__ALIGN) % PTST__ALIGN;
    block.base = base;
    block.size = total;
    memcpy(p - sizeof block, &block, sizeof block);
    return p;
}

static void ptst__free_with(const ptst_allocator *a, void *p) {
    ptst__block block;
    if (p != NULL) {
        memcpy(&block, (char *)p - sizeof block, sizeof block);
        a->release(a->user, block.base, block.size);
    }
}

/* n * size bytes, uninitialised; NULL (and the error is set) on failure or overflow. */
static void *ptst__alloc(ptst_ctx *c, size_t n, size_t size) {
    size_t bytes = 0;
    void *p = ptst__mul(n, size, &bytes) ? ptst__alloc_with(&c->allocator, bytes) : NULL;
    if (p == NULL) {
        ptst__fail_memory(c, bytes);
    }
    return p;
}

/* The same, zeroed. */
static void *ptst__calloc(ptst_ctx *c, size_t n, size_t size) {
    void *p = ptst__alloc(c, n, size);
    if (p != NULL) {
        memset(p, 0, n * size);
    }
    return p;
}

static void ptst__free(ptst_ctx *c, void *p) { ptst__free_with(&c->allocator, p); }

/* Makes room for `need` elements in a growable array: *data moves, *capacity at least doubles.
   On failure nothing changes. */
static ptst_code ptst__grow(ptst_ctx *c, void **data, size_t *capacity, size_t need, size_t size) {
    size_t n = *capacity < 16 ? 16 : *capacity;
    void *p;
    if (need <= *capacity) {
        return PTST_OK;
    }
    while (n < need) {
        if (n > SIZE_MAX / 2) {
            return ptst__fail_memory(c, need);
        }
        n *= 2;
    }
    p = ptst__alloc(c, n, size);
    if (p == NULL) {
        return PTST_ERR_MEMORY;
    }
    if (*capacity != 0) {
        memcpy(p, *data, *capacity * size);
    }
    ptst__free(c, *data);
    *data = p;
    *capacity = n;
    return PTST_OK;
}

/* ---- arena: many small blocks that die together ---- */

typedef struct ptst__chunk {
    struct ptst__chunk *next;
    size_t used, size; /* of the bytes after this header */
} ptst__chunk;

typedef struct ptst__arena {
    ptst__chunk *first;
} ptst__arena;

enum { PTST__CHUNK_SIZE = 64 * 1024, PTST__CHUNK_HEAD = 64 };

/* n * size zeroed bytes, aligned to 16 and never moved. */
PTST__UNUSED static void *ptst__arena_alloc(ptst_ctx *c, ptst__arena *a, size_t n, size_t size) {
    size_t bytes, total, fresh;
    ptst__chunk *k = a->first;
    char *p;
    if (!ptst__mul(n, size, &bytes) || !ptst__add(bytes, 15, &total)) {
        ptst__fail_memory(c, SIZE_MAX);
        return NULL;
    }
    bytes = total / 16 * 16;
    if (k == NULL || bytes > k->size - k->used) {
        fresh = bytes > PTST__CHUNK_SIZE / 4 ? bytes : (size_t)PTST__CHUNK_SIZE;
        if (!ptst__add(fresh, PTST__CHUNK_HEAD, &total)) {
            ptst__fail_memory(c, bytes);
            return NULL;
        }
        k = (ptst__chunk *)ptst__alloc(c, total, 1);
        if (k == NULL) {
            return NULL;
        }
        k->used = 0;
        k->size = fresh;
        if (a->first != NULL && fresh == bytes) { /* a large block: keep filling the old chunk */
            k->next = a->first->next;
            a->first->next = k;
        } else {
            k->next = a->first;
            a->first = k;
        }
    }
    p = (char *)k + PTST__CHUNK_HEAD + k->used;
    k->used += bytes;
    return memset(p, 0, bytes);
}

/* A NUL-terminated copy of size bytes. */
PTST__UNUSED static char *ptst__arena_copy(ptst_ctx *c, ptst__arena *a, const char *s,
                                           size_t size) {
    size_t total;
    char *p;
    if (!ptst__add(size, 1, &total)) {
        ptst__fail_memory(c, size);
        return NULL;
    }
    p = (char *)ptst__arena_alloc(c, a, total, 1);
    if (p != NULL && size != 0) {
        memcpy(p, s, size);
    }
    return p;
}

PTST__UNUSED static void ptst__arena_free(ptst_ctx *c, ptst__arena *a) {
    while (a->first != NULL) {
        ptst__chunk *next = a->first->next;
        ptst__free(c, a->first);
        a->first = next;
    }
}

/* ---- hash map from byte strings to 32-bit values ----
   Open addressing, linear probing, at most half full. Keys are borrowed: they must outlive the
   map (they live in an arena or in a parsed document). */

typedef struct ptst__map_slot {
    const char *key; /* NULL = free */
    uint32_t size;
    int32_t value;
} ptst__map_slot;

typedef struct ptst__map {
    ptst__map_slot *slots;
    size_t capacity, count; /* capacity is a power of two or 0 */
} ptst__map;

/* FNV-1a, finished with a multiply-shift mix so that the low bits depend on all bytes. */
static uint64_t ptst__hash(const char *key, size_t size) {
    uint64_t h = 1469598103934665603u;
    size_t i;
    for (i = 0; i < size; i++) {
        h = (h ^ (unsigned char)key[i]) * 1099511628211u;
    }
    h ^= h >> 32;
    h *= 0x9E3779B97F4A7C15u;
    return h ^ (h >> 29);
}

static ptst__map_slot *ptst__map_probe(const ptst__map *m, const char *key, size_t size) {
    size_t mask = m->capacity - 1, i = (size_t)ptst__hash(key, size) & mask;
    while (m->slots[i].key != NULL &&
           (m->slots[i].size != size || memcmp(m->slots[i].key, key, size) != 0)) {
        i = (i + 1) & mask;
    }
    return &m->slots[i];
}

/* Value of a key, or fallback. */
PTST__UNUSED static int32_t ptst__map_get(const ptst__map *m, const char *key, size_t size,
                                          int32_t fallback) {
    const ptst__map_slot *s;
    if (m->capacity == 0) {
        return fallback;
    }
    s = ptst__map_probe(m, key, size);
    return s->key == NULL ? fallback : s->value;
}

/* Makes room for `count` keys at once. */
PTST__UNUSED static ptst_code ptst__map_reserve(ptst_ctx *c, ptst__map *m, size_t count) {
    ptst__map bigger;
    size_t i, capacity = m->capacity < 16 ? 16 : m->capacity;
    if (count > SIZE_MAX / 4) {
        return ptst__fail_memory(c, count);
    }
    while (capacity < 2 * count) {
        capacity *= 2;
    }
    if (capacity == m->capacity) {
        return PTST_OK;
    }
    bigger.slots = (ptst__map_slot *)ptst__calloc(c, capacity, sizeof *bigger.slots);
    if (bigger.slots == NULL) {
        return PTST_ERR_MEMORY;
    }
    bigger.capacity = capacity;
    bigger.count = m->count;
    for (i = 0; i < m->capacity; i++) {
        if (m->slots[i].key != NULL) {
            *ptst__map_probe(&bigger, m->slots[i].key, m->slots[i].size) = m->slots[i];
        }
    }
    ptst__free(c, m->slots);
    *m = bigger;
    return PTST_OK;
}

/* Adds or replaces. */
PTST__UNUSED static ptst_code ptst__map_put(ptst_ctx *c, ptst__map *m, const char *key, size_t size,
                                            int32_t value) {
    ptst__map_slot *s;
    ptst_code code = ptst__map_reserve(c, m, m->count + 1);
    if (code != PTST_OK) {
        return code;
    }
    if (size > UINT32_MAX) {
        return ptst__fail(c, PTST_ERR_LIMIT, "a key of more than 4 GiB");
    }
    s = ptst__map_probe(m, key, size);
    if (s->key == NULL) {
        s->key = key;
        s->size = (uint32_t)size;
        m->count++;
    }
    s->value = value;
    return PTST_OK;
}

PTST__UNUSED static void ptst__map_free(ptst_ctx *c, ptst__map *m) {
    ptst__free(c, m->slots);
    memset(m, 0, sizeof *m);
}

/* ---- UTF-8 ---- */

/* Reads one code point at s (left >= 1 bytes remain). Returns its length 1..4, or 0 if the bytes
   are not valid UTF-8 (overlong, surrogate, beyond U+10FFFF, cut off). Unicode 15, table 3-7. */
static size_t ptst__utf8_read(const char *s, size_t left, uint32_t *point) {
    const unsigned char *p = (const unsigned char *)s;
    uint32_t low = 0x80, high = 0xBF, value;
    size_t n, i;
    if (p[0] < 0x80) {
        *point = p[0];
        return 1;
    }
    if (p[0] < 0xC2 || p[0] > 0xF4) {
        return 0;
    }
    n = p[0] < 0xE0 ? 2 : p[0] < 0xF0 ? 3 : 4;
    if (n > left) {
        return 0;
    }
    low = p[0] == 0xE0 ? 0xA0 : p[0] == 0xF0 ? 0x90 : 0x80;
    high = p[0] == 0xED ? 0x9F : p[0] == 0xF4 ? 0x8F : 0xBF;
    value = p[0] & (0xFFu >> (n + 1));
    for (i = 1; i < n; i++) {
        if (p[i] < low || p[i] > high) {
            return 0;
        }
        value = value << 6 | (p[i] & 0x3Fu);
        low = 0x80;
        high = 0xBF;
    }
    *point = value;
    return n;
}

/* Writes one code point (not checked) and returns its length 1..4. */
static size_t ptst__utf8_write(char *s, uint32_t point) {
    if (point < 0x80) {
        s[0] = (char)point;
        return 1;
    }
    if (point < 0x800) {
        s[0] = (char)(0xC0 | point >> 6);
        s[1] = (char)(0x80 | (point & 0x3F));
        return 2;
    }
    if (point < 0x10000) {
        s[0] = (char)(0xE0 | point >> 12);
        s[1] = (char)(0x80 | (point >> 6 & 0x3F));
        s[2] = (char)(0x80 | (point & 0x3F));
        return 3;
    }
    s[0] = (char)(0xF0 | point >> 18);
    s[1] = (char)(0x80 | (point >> 12 & 0x3F));
    s[2] = (char)(0x80 | (point >> 6 & 0x3F));
    s[3] = (char)(0x80 | (point & 0x3F));
    return 4;
}

/* ---- numbers as text, whatever the locale ---- */

/* Shortest decimal text that reads back as the same double ("0.1", "1e+20"); "nan", "inf". buffer
   holds at least 32 bytes. Returns the length. */
PTST__UNUSED static size_t ptst__number_text(char *buffer, double value) {
    int digits;
    size_t i, n = 0;
    for (digits = 15; digits <= 17; digits++) {
        n = (size_t)snprintf(buffer, 32, "%.*g", digits, value);
        if (strtod(buffer, NULL) == value) {
            break;
        }
    }
    for (i = 0; i < n; i++) { /* the locale's decimal point */
        if (strchr("0123456789+-eEinfa", buffer[i]) == NULL) {
            buffer[i] = '.';
        }
    }
    return n;
}

/* Reads size bytes of a JSON number (already validated); correctly rounded, whatever the locale.
   Short numbers are exact in double arithmetic (Clinger 1990); the rest goes to strtod with the
   locale's decimal point put in. */
static double ptst__number_read(const char *s, size_t size) {
    static const double ten[] = {1e0,  1e1,  1e2,  1e3,  1e4,  1e5,  1e6,  1e7,
                                 1e8,  1e9,  1e10, 1e11, 1e12, 1e13, 1e14, 1e15,
                                 1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22};
    uint64_t mantissa = 0;
    int exponent = 0, digits = 0, written = 0;
    bool negative = size > 0 && s[0] == '-', point = false, minus = false;
    size_t i = negative ? 1 : 0, k = 0;
    char copy[512];
    for (; i < size && s[i] != 'e' && s[i] != 'E'; i++) {
        if (s[i] == '.') {
            point = true;
        } else {
            digits += mantissa != 0 || s[i] != '0';
            mantissa = digits <= 18 ? mantissa * 10 + (uint64_t)(s[i] - '0') : mantissa;
            exponent -= point ? 1 : 0;
        }
    }
    if (i < size) {
        minus = s[++i] == '-';
        for (i += s[i] == '-' || s[i] == '+'; i < size; i++) {
            written = written < 100000 ? written * 10 + (s[i] - '0') : written;
        }
        exponent += minus ? -written : written;
    }
    if (digits <= 18 && mantissa < (uint64_t)1 << 53 && exponent >= -22 && exponent <= 22) {
        double v = exponent < 0 ? (double)mantissa / ten[-exponent]
                                : (double)mantissa * ten[exponent];
        return negative ? -v : v;
    }
    for (i = 0; i < size && k < sizeof copy - 8; i++) { /* 500 digits decide any rounding we meet */
        const char *decimal = s[i] == '.' ? localeconv()->decimal_point : NULL;
        if (decimal != NULL && strlen(decimal) < 8) {
            memcpy(copy + k, decimal, strlen(decimal));
            k += strlen(decimal);
        } else {
            copy[k++] = s[i];
        }
    }
    copy[k] = 0;
    return strtod(copy, NULL);
}

/* ---- text and ids ---- */

PTST_API ptst_code ptst_text_append(ptst_ctx *c, ptst_text *t, const char *bytes, size_t size) {
    size_t need;
    void *data = t->data;
    ptst_code code;
    if (!ptst__add(t->size, size, &need) || !ptst__add(need, 1, &need)) {
        return ptst__fail_memory(c, size);
    }
    code = ptst__grow(c, &data, &t->capacity, need, 1);
    if (code != PTST_OK) {
        return code;
    }
    t->data = (char *)data;
    if (size != 0) {
        memcpy(t->data + t->size, bytes, size);
    }
    t->size += size;
    t->data[t->size] = 0;
    return PTST_OK;
}

PTST_API void ptst_text_free(ptst_ctx *c, ptst_text *t) {
    if (t != NULL) {
        ptst__free(c, t->data);
        memset(t, 0, sizeof *t);
    }
}

/* Appends a C string; formatted text of at most 1000 bytes. */
static ptst_code ptst__text_add(ptst_ctx *c, ptst_text *t, const char *s) {
    return ptst_text_append(c, t, s, strlen(s));
}

PTST__PRINTF(3, 4)
PTST__UNUSED static ptst_code ptst__text_format(ptst_ctx *c, ptst_text *t, const char *format,
                                                ...) {
    char line[1001];
    va_list args;
    int n;
    va_start(args, format);
    n = vsnprintf(line, sizeof line, format, args);
    va_end(args);
    if (n < 0 || n >= (int)sizeof line) {
        return ptst__fail(c, PTST_ERR_LIMIT, "a formatted line is longer than 1000 bytes");
    }
    return ptst_text_append(c, t, line, (size_t)n);
}

PTST__UNUSED static ptst_code ptst__text_number(ptst_ctx *c, ptst_text *t, double value) {
    char buffer[32];
    size_t n = ptst__number_text(buffer, value);
    return ptst_text_append(c, t, buffer, n);
}

PTST_API ptst_code ptst_ids_append(ptst_ctx *c, ptst_ids *t, int32_t id) {
    void *data = t->data;
    ptst_code code = ptst__grow(c, &data, &t->capacity, t->count + 1, sizeof *t->data);
    if (code == PTST_OK) {
        t->data = (int32_t *)data;
        t->data[t->count++] = id;
    }
    return code;
}

PTST_API void ptst_ids_free(ptst_ctx *c, ptst_ids *t) {
    if (t != NULL) {
        ptst__free(c, t->data);
        memset(t, 0, sizeof *t);
    }
}

/* ---- files ---- */

/* folder + "/" + name, as new text in *out (which is emptied first). */
PTST__UNUSED static ptst_code ptst__path_join(ptst_ctx *c, ptst_text *out, const char *folder,
                                              const char *name) {
    ptst_code code;
    size_t n = strlen(folder);
    out->size = 0;
    code = ptst__text_add(c, out, folder);
    if (code == PTST_OK && n != 0 && folder[n - 1] != '/') {
        code = ptst__text_add(c, out, "/");
    }
    return code == PTST_OK ? ptst__text_add(c, out, name) : code;
}

/* Appends a whole file to *out. Reads until the end, so pipes work as well. */
static ptst_code ptst__read_file(ptst_ctx *c, const char *path, ptst_text *out) {
    char buffer[16384];
    ssize_t n = 0;
    ptst_code code = PTST_OK;
    int fd = open(path, O_RDONLY);
    if (fd < 0) {
        return ptst__fail_errno(c, path, "open", errno);
    }
    while (code == PTST_OK) {
        n = read(fd, buffer, sizeof buffer);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n < 0) {
            code = ptst__fail_errno(c, path, "read", errno);
        }
        if (n <= 0) {
            break;
        }
        code = ptst_text_append(c, out, buffer, (size_t)n);
    }
    close(fd);
    return code == PTST_OK ? ptst_text_append(c, out, "", 0) : code;
}

/* A file that appears whole or not at all: written under a temporary name in the same folder,
   flushed, renamed. After any failure call ptst__out_abort; after ptst__out_commit nothing. */
typedef struct ptst__out {
    FILE *file;
    ptst_text path, temporary;
} ptst__out;

static void ptst__out_abort(ptst_ctx *c, ptst__out *o) {
    if (o->file != NULL) {
        fclose(o->file);
        unlink(o->temporary.data);
    }
    ptst_text_free(c, &o->path);
    ptst_text_free(c, &o->temporary);
    memset(o, 0, sizeof *o);
}

static ptst_code ptst__out_open(ptst_ctx *c, ptst__out *o, const char *path) {
    ptst_code code;
    memset(o, 0, sizeof *o);
    code = ptst__text_add(c, &o->path, path);
    if (code == PTST_OK) {
        code = ptst__text_format(c, &o->temporary, "%.900s.tmp.%ld", path, (long)getpid());
    }
    if (code == PTST_OK) {
        o->file = fopen(o->temporary.data, "wb");
        if (o->file == NULL) {
            code = ptst__fail_errno(c, path, "write", errno);
        }
    }
    if (code != PTST_OK) {
        ptst__out_abort(c, o);
    }
    return code;
}

static ptst_code ptst__out_write(ptst_ctx *c, ptst__out *o, const void *data, size_t size) {
    if (size != 0 && fwrite(data, 1, size, o->file) != size) {
        return ptst__fail_errno(c, o->path.data, "write", errno);
    }
    return PTST_OK;
}

/* Flushes, renames; on failure the old file (if any) is untouched and the temporary is gone. */
static ptst_code ptst__out_commit(ptst_ctx *c, ptst__out *o) {
    int error = 0;
    ptst_code code = PTST_OK;
    if (fflush(o->file) != 0 || fsync(fileno(o->file)) != 0) {
        error = errno;
    }
    if (fclose(o->file) != 0 && error == 0) {
        error = errno;
    }
    o->file = NULL;
    if (error == 0 && rename(o->temporary.data, o->path.data) != 0) {
        error = errno;
    }
    if (error != 0) {
        unlink(o->temporary.data);
        code = ptst__fail_errno(c, o->path.data, "write", error);
    } else {
        ptst__sync_folder_of(o->path.data);
    }
    ptst__out_abort(c, o);
    return code;
}

/* Writes a whole file atomically. */
PTST__UNUSED static ptst_code ptst__write_file(ptst_ctx *c, const char *path, const void *data,
                                               size_t size) {
    ptst__out o;
    ptst_code code = ptst__out_open(c, &o, path);
    if (code != PTST_OK) {
        return code;
    }
    code = ptst__out_write(c, &o, data, size);
    if (code != PTST_OK) {
        ptst__out_abort(c, &o);
        return code;
    }
    return ptst__out_commit(c, &o);
}

/* Makes a folder and its parents. */
PTST__UNUSED static ptst_code ptst__make_folders(ptst_ctx *c, const char *path) {
    char part[4096];
    size_t i, n = strlen(path);
    if (n == 0 || n >= sizeof part) {
        return ptst__fail(c, PTST_ERR_ARGUMENT, "%.200s: not a folder name of 1 to 4095 bytes",
                          path);
    }
    for (i = 1; i <= n; i++) {
        if (path[i] == '/' || path[i] == 0) {
            memcpy(part, path, i);
            part[i] = 0;
            if (mkdir(part, 0777) != 0 && errno != EEXIST) {
                return ptst__fail_errno(c, part, "make the folder", errno);
            }
        }
    }
    if (ptst__path_kind(path) != 2) {
        return ptst__fail(c, PTST_ERR_IO, "%s: is a file, a folder was expected", path);
    }
    return PTST_OK;
}

/* ---- public part ---- */

PTST_API ptst_code ptst_error_code(const ptst_ctx *c) { return c->code; }

PTST_API const char *ptst_error_text(const ptst_ctx *c) { return c->error; }

PTST_API int ptst_thread_count(const ptst_ctx *c) { return c->threads; }

PTST_API const char *ptst_code_name(ptst_code code) {
    static const char *const names[] = {
#define PTST__X(name, text) #name,
        PTST_CODES(PTST__X)
#undef PTST__X
    };
    return (unsigned)code < (unsigned)PTST_CODE_COUNT ? names[code] : "unknown";
}

/* >>threads =====================================================================================
   The pool of a context and the one parallel-for. A parallel operation is cut into numbered
   tasks; which thread runs a task is open, what a task computes is not, so results are the same
   bits for any number of threads. Relies on >>core. Tested by tests/test_core.c.

   With PTST_USE_OPENMP (and -fopenmp) the same function runs on OpenMP's threads; with
   PTST_NO_THREADS, or inside another parallel operation, the tasks run one after another. */

/* task: 0..count-1; thread: 0..ptst_thread_count-1, for private scratch. */
typedef void (*ptst__task)(void *arg, size_t task, int thread);

#if !defined(PTST_NO_THREADS) && !(defined(PTST_USE_OPENMP) && defined(_OPENMP))
#define PTST__PTHREADS 1
#else
#define PTST__PTHREADS 0
#endif

#if PTST__PTHREADS

typedef struct ptst__worker {
    ptst__pool *pool;
    pthread_t thread;
    int index;
} ptst__worker;

struct ptst__pool {
    pthread_mutex_t lock;
    pthread_cond_t wake, done;
    ptst__worker *workers;
    int count;           /* workers besides the caller */
    ptst__task run;      /* the current operation */
    void *arg;
    size_t tasks;
    size_t next;         /* first task that nobody has taken; atomic */
    unsigned generation; /* of the current operation; atomic, written under the lock */
    int working;         /* workers that have not finished it; atomic */
    bool quit, busy;
};

/* How often a waiting thread looks before it goes to sleep: about the length of one small
   operation, so that a chain of them does not pay for a wake-up each. */
enum { PTST__SPINS = 4000 };

#if PTST__ATOMICS
#define PTST__LOAD(p) __atomic_load_n(&(p), __ATOMIC_ACQUIRE)
#else
#define PTST__LOAD(p) (p)
#endif

static void ptst__relax(void) {
#if PTST__X86
    _mm_pause();
#elif PTST__NEON
    __asm__ __volatile__("yield");
#endif
}

static size_t ptst__pool_take(ptst__pool *p) {
#if PTST__ATOMICS
    return __atomic_fetch_add(&p->next, 1, __ATOMIC_RELAXED);
#else
    size_t task;
    pthread_mutex_lock(&p->lock);
    task = p->next++;
    pthread_mutex_unlock(&p->lock);
    return task;
#endif
}

static void ptst__pool_work(ptst__pool *p, int thread) {
    size_t task;
    while ((task = ptst__pool_take(p)) < p->tasks) {
        p->run(p->arg, task, thread);
    }
}

/* Waits until the operation number changes; looks for a while, then sleeps. */
static unsigned ptst__pool_wait(ptst__pool *p, unsigned seen) {
    unsigned now = seen;
#if PTST__ATOMICS
    int spin;
    for (spin = 0; spin < PTST__SPINS && now == seen; spin++) {
        ptst__relax();
        now = PTST__LOAD(p->generation);
    }
    if (now != seen) {
        return now;
    }
#endif
    pthread_mutex_lock(&p->lock);
    while (p->generation == seen) {
        pthread_cond_wait(&p->wake, &p->lock);
    }
    now = p->generation;
    pthread_mutex_unlock(&p->lock);
    return now;
}

static void *ptst__worker_main(void *arg) {
    ptst__worker *w = (ptst__worker *)arg;
    ptst__pool *p = w->pool;
    unsigned seen = 0;
    for (;;) {
        seen = ptst__pool_wait(p, seen);
        if (p->quit) {
            return NULL;
        }
        ptst__pool_work(p, w->index);
        pthread_mutex_lock(&p->lock);
#if PTST__ATOMICS
        __atomic_sub_fetch(&p->working, 1, __ATOMIC_RELEASE);
#else
        p->working--;
#endif
        if (p->working == 0) {
            pthread_cond_signal(&p->done);
        }
        pthread_mutex_unlock(&p->lock);
    }
}

/* Publishes an operation (or the wish to quit) to all workers. */
static void ptst__pool_publish(ptst__pool *p, bool quit) {
    pthread_mutex_lock(&p->lock);
    p->quit = quit;
    p->next = 0;
    p->working = p->count;
#if PTST__ATOMICS
    __atomic_add_fetch(&p->generation, 1, __ATOMIC_RELEASE);
#else
    p->generation++;
#endif
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->lock);
}

static void ptst__pool_finish(ptst__pool *p) {
#if PTST__ATOMICS
    int spin;
    for (spin = 0; spin < PTST__SPINS && PTST__LOAD(p->working) != 0; spin++) {
        ptst__relax();
    }
#endif
    pthread_mutex_lock(&p->lock);
    while (p->working != 0) {
        pthread_cond_wait(&p->done, &p->lock);
    }
    pthread_mutex_unlock(&p->lock);
}

static void ptst__pool_close(ptst_ctx *c) {
    ptst__pool *p = c->pool;
    int i;
    if (p == NULL) {
        return;
    }
    ptst__pool_publish(p, true);
    for (i = 0; i < p->count; i++) {
        pthread_join(p->workers[i].thread, NULL);
    }
    pthread_cond_destroy(&p->wake);
    pthread_cond_destroy(&p->done);
    pthread_mutex_destroy(&p->lock);
    ptst__free(c, p->workers);
    ptst__free(c, p);
    c->pool = NULL;
}

/* Starts c->threads - 1 workers; fewer if the system refuses more. */
static ptst_code ptst__pool_open(ptst_ctx *c) {
    ptst__pool *p;
    int i, wanted = c->threads - 1;
    if (wanted == 0) {
        return PTST_OK;
    }
    p = (ptst__pool *)ptst__calloc(c, 1, sizeof *p);
    if (p == NULL) {
        return PTST_ERR_MEMORY;
    }
    p->workers = (ptst__worker *)ptst__calloc(c, (size_t)wanted, sizeof *p->workers);
    if (p->workers == NULL) {
        ptst__free(c, p);
        return PTST_ERR_MEMORY;
    }
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->wake, NULL);
    pthread_cond_init(&p->done, NULL);
    c->pool = p;
    for (i = 0; i < wanted; i++) {
        p->workers[i].pool = p;
        p->workers[i].index = i + 1;
        if (pthread_create(&p->workers[i].thread, NULL, ptst__worker_main, &p->workers[i]) != 0) {
            break;
        }
        p->count = i + 1;
    }
    c->threads = p->count + 1;
    return PTST_OK;
}

/* Runs run(arg, 0..tasks-1, thread) on all threads and returns when all are done. */
PTST__UNUSED static void ptst__parallel_for(ptst_ctx *c, size_t tasks, ptst__task run, void *arg) {
    ptst__pool *p = c->pool;
    size_t i;
    if (p == NULL || p->busy || tasks < 2) {
        for (i = 0; i < tasks; i++) {
            run(arg, i, 0);
        }
        return;
    }
    p->busy = true;
    p->run = run;
    p->arg = arg;
    p->tasks = tasks;
    ptst__pool_publish(p, false);
    ptst__pool_work(p, 0);
    ptst__pool_finish(p);
    p->busy = false;
}

#else /* OpenMP or no threads */

static ptst_code ptst__pool_open(ptst_ctx *c) {
#ifdef PTST_NO_THREADS
    c->threads = 1;
#endif
    (void)c;
    return PTST_OK;
}

static void ptst__pool_close(ptst_ctx *c) { (void)c; }

PTST__UNUSED static void ptst__parallel_for(ptst_ctx *c, size_t tasks, ptst__task run, void *arg) {
#if defined(PTST_USE_OPENMP) && defined(_OPENMP)
    ptrdiff_t i, n = (ptrdiff_t)tasks;
#pragma omp parallel for schedule(dynamic, 1) num_threads(c->threads) if (!omp_in_parallel())
    for (i = 0; i < n; i++) {
        run(arg, (size_t)i, omp_get_thread_num());
    }
#else
    size_t i;
    (void)c;
    for (i = 0; i < tasks; i++) {
        run(arg, i, 0);
    }
#endif
}

#endif

/* >>random ======================================================================================
   Random numbers as a pure function of (seed, stream, index): Philox4x32-10. Relies on nothing.
   Afterwards no random decision of the library depends on threads, on the machine or on how often
   it was interrupted. Tested by tests/test_core.c against the published known answers. */

/* Ten rounds on a counter of four words with a key of two (Salmon et al., SC 2011). */
static void ptst__philox(uint32_t x[4], uint32_t key0, uint32_t key1) {
    int round;
    for (round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)0xD2511F53u * x[0], b = (uint64_t)0xCD9E8D57u * x[2];
        uint32_t y0 = (uint32_t)(b >> 32) ^ x[1] ^ key0, y2 = (uint32_t)(a >> 32) ^ x[3] ^ key1;
        x[0] = y0;
        x[1] = (uint32_t)b;
        x[2] = y2;
        x[3] = (uint32_t)a;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

/* Four numbers of block `block` of stream (seed, stream). */
static void ptst__rng_block(uint64_t seed, uint64_t stream, uint64_t block, uint32_t out[4]) {
    out[0] = (uint32_t)block;
    out[1] = (uint32_t)(block >> 32);
    out[2] = (uint32_t)stream;
    out[3] = (uint32_t)(stream >> 32);
    ptst__philox(out, (uint32_t)seed, (uint32_t)(seed >> 32));
}

PTST_API uint32_t ptst_rng_u32(ptst_rng *r) {
    uint32_t x[4];
    ptst__rng_block(r->seed, r->stream, r->counter / 4, x);
    return x[r->counter++ % 4];
}

PTST_API float ptst_rng_uniform(ptst_rng *r) {
    return (float)(ptst_rng_u32(r) >> 8) * (1.0f / 16777216.0f);
}

PTST_API float ptst_rng_normal(ptst_rng *r) {
    int64_t sum = 0;
    int i;
    for (i = 0; i < 12; i++) {
        sum += (int64_t)(ptst_rng_u32(r) >> 8);
    }
    return (float)(sum - 6 * (int64_t)16777216) * (1.0f / 16777216.0f);
}

PTST_API uint32_t ptst_rng_below(ptst_rng *r, uint32_t n) {
    uint32_t x, limit = n == 0 ? 0 : UINT32_MAX - (UINT32_MAX % n + 1) % n;
    if (n == 0) {
        return 0;
    }
    do { /* numbers above the last whole multiple of n are thrown away */
        x = ptst_rng_u32(r);
    } while (x > limit);
    return x % n;
}

/* >>json ========================================================================================
   RFC 8259 text to a flat array of nodes, and the two functions a writer needs. The parser is
   strict (it validates everything, UTF-8 included), never recurses, and limits nesting. Strings
   are unescaped in place in a private copy of the text, which is why a node is just a range of it.
   Relies on >>core. Afterwards every string handed out is valid UTF-8 and NUL-terminated. Tested
   by tests/test_json.c. */

/* Nodes lie in the order of the text, so the first child of a container is the node after it:

       {"a": [1, 2], "b": null}
       0      1   2  3 4   5    6       node
       object "a" [] 1 2   "b"  null
       size 2     size 2                members, elements
       next 7  2  5  4 5   6    7       node after the whole value */
typedef struct ptst__json_node {
    uint32_t start; /* first byte of a string or number in the text */
    uint32_t size;  /* bytes of a string or number, children of a container */
    uint32_t next;
    uint32_t line;
    uint8_t type;
    uint8_t last; /* last child of its parent */
} ptst__json_node;

struct ptst_json {
    char *text;
    ptst__json_node *nodes;
    size_t count, capacity;
};

enum { PTST__JSON_DEPTH = 256 };

typedef struct ptst__json_reader {
    ptst_ctx *c;
    ptst_json *j;
    const char *name;
    size_t at, end; /* in j->text */
    uint32_t line;
    uint32_t stack[PTST__JSON_DEPTH];  /* open containers */
    uint32_t recent[PTST__JSON_DEPTH]; /* the newest child (value) of each */
    size_t depth;
} ptst__json_reader;

static ptst_code ptst__json_fail(ptst__json_reader *r, const char *expected) {
    return ptst__fail(r->c, PTST_ERR_FORMAT, "%s: line %u: %s", r->name, (unsigned)r->line,
                      expected);
}

static void ptst__json_space(ptst__json_reader *r) {
    const char *s = r->j->text;
    for (; r->at < r->end; r->at++) {
        if (s[r->at] == '\n') {
            r->line++;
        } else if (s[r->at] != ' ' && s[r->at] != '\t' && s[r->at] != '\r') {
            break;
        }
    }
}

static ptst_code ptst__json_add(ptst__json_reader *r, ptst_json_type type, size_t start,
                                size_t size) {
    ptst_json *j = r->j;
    void *nodes = j->nodes;
    ptst_code code = ptst__grow(r->c, &nodes, &j->capacity, j->count + 1, sizeof *j->nodes);
    ptst__json_node *n;
    if (code != PTST_OK) {
        return code;
    }
    j->nodes = (ptst__json_node *)nodes;
    n = &j->nodes[j->count++];
    n->type = (uint8_t)type;
    n->start = (uint32_t)start;
    n->size = (uint32_t)size;
    n->next = (uint32_t)j->count;
    n->line = r->line;
    n->last = 0;
    return PTST_OK;
}

/* Four hexadecimal digits at s; false if they are not. */
static bool ptst__json_hex(const char *s, size_t left, uint32_t *value) {
    size_t i;
    *value = 0;
    for (i = 0; i < 4; i++) {
        char ch = i < left ? s[i] : 0;
        uint32_t d = ch >= '0' && ch <= '9'   ? (uint32_t)(ch - '0')
                     : ch >= 'a' && ch <= 'f' ? (uint32_t)(ch - 'a' + 10)
                     : ch >= 'A' && ch <= 'F' ? (uint32_t)(ch - 'A' + 10)
                                              : 16;
        if (d == 16) {
            return false;
        }
        *value = *value << 4 | d;
    }
    return true;
}

/* The escape whose backslash is at r->at: writes its bytes at s[*to], moves both. */
static ptst_code ptst__json_escape(ptst__json_reader *r, size_t *to) {
    static const char plain[] = "\"\\/bfnrt", value[] = "\"\\/\b\f\n\r\t";
    char *s = r->j->text;
    char ch = r->at + 1 < r->end ? s[r->at + 1] : 0;
    const char *known = ch == 0 ? NULL : strchr(plain, ch);
    uint32_t point, low;
    if (known != NULL) {
        s[(*to)++] = value[known - plain];
        r->at += 2;
        return PTST_OK;
    }
    if (ch != 'u' || !ptst__json_hex(s + r->at + 2, r->end - r->at - 2, &point)) {
        return ptst__json_fail(r, "an unknown escape in a string");
    }
    r->at += 6;
    if (point >= 0xD800 && point <= 0xDBFF) {
        if (r->end - r->at < 6 || s[r->at] != '\\' || s[r->at + 1] != 'u' ||
            !ptst__json_hex(s + r->at + 2, r->end - r->at - 2, &low) || low < 0xDC00 ||
            low > 0xDFFF) {
            return ptst__json_fail(r, "half of a surrogate pair in a string");
        }
        point = 0x10000 + ((point - 0xD800) << 10) + (low - 0xDC00);
        r->at += 6;
    } else if (point >= 0xDC00 && point <= 0xDFFF) {
        return ptst__json_fail(r, "half of a surrogate pair in a string");
    }
    *to += ptst__utf8_write(s + *to, point);
    return PTST_OK;
}

/* A string whose opening quote is at r->at. Unescaped in place: it never gets longer. */
static ptst_code ptst__json_read_string(ptst__json_reader *r) {
    char *s = r->j->text;
    size_t start = r->at + 1, to = start;
    ptst_code code;
    uint32_t point;
    for (r->at = start; r->at < r->end && s[r->at] != '"';) {
        if (s[r->at] == '\\') {
            code = ptst__json_escape(r, &to);
            if (code != PTST_OK) {
                return code;
            }
        } else {
            size_t n = ptst__utf8_read(s + r->at, r->end - r->at, &point);
            if (n == 0 || point < 0x20) {
                return ptst__json_fail(r, n == 0 ? "a string is not valid UTF-8"
                                                 : "a control character in a string");
            }
            memmove(s + to, s + r->at, n);
            to += n;
            r->at += n;
        }
    }
    if (r->at == r->end) {
        return ptst__json_fail(r, "a string without end");
    }
    code = ptst__json_add(r, PTST_JSON_STRING, start, to - start);
    s[to] = 0; /* at most the closing quote is overwritten */
    r->at++;
    return code;
}

/* -?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)? */
static ptst_code ptst__json_read_number(ptst__json_reader *r) {
    const char *s = r->j->text; /* s[r->end] is NUL, so looking at it is safe */
    size_t start = r->at, i = start + (s[start] == '-'), digits = i;
    bool bad = s[i] < '0' || s[i] > '9' || (s[i] == '0' && s[i + 1] >= '0' && s[i + 1] <= '9');
    for (; s[i] >= '0' && s[i] <= '9'; i++) {
    }
    if (s[i] == '.') {
        for (digits = ++i; s[i] >= '0' && s[i] <= '9'; i++) {
        }
        bad = bad || i == digits;
    }
    if (s[i] == 'e' || s[i] == 'E') {
        i++;
        i += s[i] == '+' || s[i] == '-';
        for (digits = i; s[i] >= '0' && s[i] <= '9'; i++) {
        }
        bad = bad || i == digits;
    }
    if (bad) {
        return ptst__json_fail(r, "a number is not of JSON's form");
    }
    r->at = i;
    return ptst__json_add(r, PTST_JSON_NUMBER, start, i - start);
}

/* One value; a container is only opened. */
static ptst_code ptst__json_value(ptst__json_reader *r) {
    static const char *const words[] = {"null", "false", "true"};
    const char *s = r->j->text;
    char ch = r->at < r->end ? s[r->at] : 0;
    size_t i, n;
    if (ch == '{' || ch == '[') {
        if (r->depth == PTST__JSON_DEPTH) {
            return ptst__fail(r->c, PTST_ERR_LIMIT, "%s: line %u: nested deeper than %d", r->name,
                              (unsigned)r->line, (int)PTST__JSON_DEPTH);
        }
        r->stack[r->depth++] = (uint32_t)r->j->count;
        return ptst__json_add(r, ch == '{' ? PTST_JSON_OBJECT : PTST_JSON_ARRAY, r->at++, 0);
    }
    if (ch == '"') {
        return ptst__json_read_string(r);
    }
    if (ch == '-' || (ch >= '0' && ch <= '9')) {
        return ptst__json_read_number(r);
    }
    for (i = 0; i < 3; i++) {
        n = strlen(words[i]);
        if (r->end - r->at >= n && memcmp(s + r->at, words[i], n) == 0) {
            r->at += n;
            return ptst__json_add(r, (ptst_json_type)(PTST_JSON_NULL + (int)i), r->at, 0);
        }
    }
    return ptst__json_fail(r, r->at == r->end ? "ends where a value was expected"
                                              : "a value was expected");
}

/* After a value: closes containers, or steps over a comma. *more = another value must follow. */
static ptst_code ptst__json_close(ptst__json_reader *r, bool *more) {
    ptst_json *j = r->j;
    *more = false;
    for (;;) {
        ptst__json_node *top;
        char ch, closer;
        ptst__json_space(r);
        if (r->depth == 0) {
            return r->at == r->end ? PTST_OK
                                   : ptst__json_fail(r, "more text after the end of the value");
        }
        top = &j->nodes[r->stack[r->depth - 1]];
        closer = top->type == PTST_JSON_OBJECT ? '}' : ']';
        ch = r->at < r->end ? j->text[r->at] : 0;
        top->size++;
        if (ch == ',') {
            r->at++;
            *more = true;
            return PTST_OK;
        }
        if (ch != closer) {
            return ptst__json_fail(r, closer == '}' ? "',' or '}' was expected"
                                                    : "',' or ']' was expected");
        }
        r->at++;
        r->depth--;
        top->next = (uint32_t)j->count;
        j->nodes[r->recent[r->depth]].last = 1;
    }
}

/* The key of an object's member and its colon. */
static ptst_code ptst__json_key(ptst__json_reader *r) {
    ptst_code code;
    ptst__json_space(r);
    if (r->at == r->end || r->j->text[r->at] != '"') {
        return ptst__json_fail(r, "a key in quotes was expected");
    }
    code = ptst__json_read_string(r);
    ptst__json_space(r);
    if (code == PTST_OK && (r->at == r->end || r->j->text[r->at++] != ':')) {
        return ptst__json_fail(r, "':' was expected after a key");
    }
    return code;
}

static ptst_code ptst__json_document(ptst__json_reader *r) {
    bool more = true;
    while (more) {
        size_t depth = r->depth;
        ptst_code code = PTST_OK;
        if (depth != 0 && r->j->nodes[r->stack[depth - 1]].type == PTST_JSON_OBJECT) {
            code = ptst__json_key(r);
        }
        ptst__json_space(r);
        if (depth != 0) {
            r->recent[depth - 1] = (uint32_t)r->j->count;
        }
        if (code == PTST_OK) {
            code = ptst__json_value(r);
        }
        if (code != PTST_OK) {
            return code;
        }
        if (r->depth > depth) { /* opened a container: is it empty? */
            ptst__json_node *top = &r->j->nodes[r->stack[depth]];
            char closer = top->type == PTST_JSON_OBJECT ? '}' : ']';
            ptst__json_space(r);
            if (r->at == r->end || r->j->text[r->at] != closer) {
                continue;
            }
            r->at++;
            r->depth--;
        }
        code = ptst__json_close(r, &more);
        if (code != PTST_OK) {
            return code;
        }
    }
    return PTST_OK;
}

PTST_API ptst_json *ptst_json_parse(ptst_ctx *c, const char *text, size_t size, const char *name) {
    ptst__json_reader r;
    ptst_json *j;
    memset(&r, 0, sizeof r);
    if (size >= UINT32_MAX) {
        ptst__fail(c, PTST_ERR_LIMIT, "%s: JSON of 4 GiB or more", name);
        return NULL;
    }
    j = (ptst_json *)ptst__calloc(c, 1, sizeof *j);
    if (j == NULL) {
        return NULL;
    }
    j->text = (char *)ptst__alloc(c, size + 1, 1);
    if (j->text == NULL) {
        ptst__free(c, j);
        return NULL;
    }
    if (size != 0) {
        memcpy(j->text, text, size);
    }
    j->text[size] = 0;
    r.c = c;
    r.j = j;
    r.name = name;
    r.end = size;
    r.line = 1;
    if (ptst__json_document(&r) != PTST_OK) {
        ptst_json_free(c, j);
        return NULL;
    }
    return j;
}

PTST_API ptst_json *ptst_json_load(ptst_ctx *c, const char *path) {
    ptst_text text = {NULL, 0, 0};
    ptst_json *j = NULL;
    if (ptst__read_file(c, path, &text) == PTST_OK) {
        j = ptst_json_parse(c, text.data, text.size, path);
    }
    ptst_text_free(c, &text);
    return j;
}

PTST_API void ptst_json_free(ptst_ctx *c, ptst_json *j) {
    if (j != NULL) {
        ptst__free(c, j->text);
        ptst__free(c, j->nodes);
        ptst__free(c, j);
    }
}

static const ptst__json_node *ptst__json_node_at(const ptst_json *j, int32_t node) {
    return node < 0 || (size_t)node >= j->count ? NULL : &j->nodes[node];
}

PTST_API ptst_json_type ptst_json_kind(const ptst_json *j, int32_t node) {
    const ptst__json_node *n = ptst__json_node_at(j, node);
    return n == NULL ? PTST_JSON_NULL : (ptst_json_type)n->type;
}

PTST_API size_t ptst_json_size(const ptst_json *j, int32_t node) {
    const ptst__json_node *n = ptst__json_node_at(j, node);
    return n == NULL || n->type == PTST_JSON_NUMBER ? 0 : n->size;
}

PTST_API int32_t ptst_json_first(const ptst_json *j, int32_t node) {
    const ptst__json_node *n = ptst__json_node_at(j, node);
    bool container = n != NULL && (n->type == PTST_JSON_ARRAY || n->type == PTST_JSON_OBJECT);
    return container && n->size != 0 ? node + 1 : -1;
}

PTST_API int32_t ptst_json_next(const ptst_json *j, int32_t node) {
    const ptst__json_node *n = ptst__json_node_at(j, node);
    return n == NULL || n->last || n->next >= j->count ? -1 : (int32_t)n->next;
}

PTST_API int32_t ptst_json_at(const ptst_json *j, int32_t array, size_t i) {
    int32_t node = ptst_json_kind(j, array) == PTST_JSON_ARRAY ? ptst_json_first(j, array) : -1;
    for (; node >= 0 && i > 0; i--) {
        node = ptst_json_next(j, node);
    }
    return node;
}

PTST_API int32_t ptst_json_get(const ptst_json *j, int32_t object, const char *key) {
    int32_t k, found = -1;
    size_t size = strlen(key);
    if (ptst_json_kind(j, object) != PTST_JSON_OBJECT) {
        return -1;
    }
    for (k = ptst_json_first(j, object); k >= 0;) {
        int32_t value = (int32_t)j->nodes[k].next;
        if (j->nodes[k].size == size && memcmp(j->text + j->nodes[k].start, key, size) == 0) {
            found = value;
        }
        k = ptst_json_next(j, value);
    }
    return found;
}

PTST_API const char *ptst_json_string(const ptst_json *j, int32_t node, size_t *size) {
    const ptst__json_node *n = ptst__json_node_at(j, node);
    if (n == NULL || n->type != PTST_JSON_STRING) {
        return NULL;
    }
    if (size != NULL) {
        *size = n->size;
    }
    return j->text + n->start;
}

PTST_API const char *ptst_json_number_text(const ptst_json *j, int32_t node, size_t *size) {
    const ptst__json_node *n = ptst__json_node_at(j, node);
    if (n == NULL || n->type != PTST_JSON_NUMBER) {
        return NULL;
    }
    *size = n->size;
    return j->text + n->start;
}

PTST_API double ptst_json_number(const ptst_json *j, int32_t node, double fallback) {
    size_t size;
    const char *s = ptst_json_number_text(j, node, &size);
    return s == NULL ? fallback : ptst__number_read(s, size);
}

PTST_API bool ptst_json_bool(const ptst_json *j, int32_t node, bool fallback) {
    ptst_json_type type = ptst_json_kind(j, node);
    return type == PTST_JSON_TRUE ? true : type == PTST_JSON_FALSE ? false : fallback;
}

PTST_API int ptst_json_line(const ptst_json *j, int32_t node) {
    const ptst__json_node *n = ptst__json_node_at(j, node);
    return n == NULL ? 0 : (int)n->line;
}

/* ---- writer ---- */

/* Appends s as a JSON string with its quotes, as Python's json.dumps(ensure_ascii=False) writes
   it. Bytes that are no UTF-8 become U+FFFD. */
PTST__UNUSED static ptst_code ptst__json_quote(ptst_ctx *c, ptst_text *t, const char *s,
                                               size_t size) {
    static const char plain[] = "\"\\\b\f\n\r\t", letter[] = "\"\\bfnrt";
    char out[8];
    size_t i = 0, n;
    uint32_t point = 0;
    ptst_code code = ptst_text_append(c, t, "\"", 1);
    while (code == PTST_OK && i < size) {
        const char *known = s[i] == 0 ? NULL : strchr(plain, s[i]);
        n = ptst__utf8_read(s + i, size - i, &point);
        if (known != NULL) {
            out[0] = '\\';
            out[1] = letter[known - plain];
            code = ptst_text_append(c, t, out, 2);
        } else if (n == 1 && point < 0x20) {
            code = ptst__text_format(c, t, "\\u%04x", (unsigned)point);
        } else if (n == 0) {
            code = ptst_text_append(c, t, "\xEF\xBF\xBD", 3);
        } else {
            code = ptst_text_append(c, t, s + i, n);
        }
        i += n == 0 ? 1 : n;
    }
    return code == PTST_OK ? ptst_text_append(c, t, "\"", 1) : code;
}

/* Appends a finite number, or null. */
PTST__UNUSED static ptst_code ptst__json_put_number(ptst_ctx *c, ptst_text *t, double value) {
    if (!(value - value == 0)) {
        return ptst__text_add(c, t, "null");
    }
    return ptst__text_number(c, t, value);
}

/* >>unicode =======================================================================================
   Not written yet. */

/* >>tokenizer =====================================================================================
   Not written yet. */

/* >>jinja =======================================================================================
   The template language of chat templates, as Jinja2 3.1 behaves in the environment that
   transformers sets up (trim_blocks, lstrip_blocks, loop controls, immutable sandbox, its tojson).
   Source becomes tokens, tokens become a tree (constant after compiling), the tree is walked.
   There is no I/O, no access to anything but the context, and every run has a budget of steps,
   memory, output and depth, so a hostile template ends in an error. Relies on >>json. Afterwards
   each byte of the output has a mark that says where it comes from: marks travel with the bytes of
   strings through every operation. Names of functions follow Jinja2 (jinja.palletsprojects.com)
   and Python. Tested by tests/test_jinja.c.

   Parts: values, strings, attributes, printing, arithmetic, formatting, filters, tests, methods,
   lexer, parser, evaluator. After a failure (run->code) every function returns at once with some
   harmless value, so results need no check before they are passed on. */

/* Bits of a mark inside the interpreter: a ptst_mark, and "inside {% generation %}". */
enum { PTST__MARK_SOURCE = 3, PTST__MARK_GENERATED = 4 };

/* A variable of a rendering. */
typedef enum ptst__jvar_kind {
    PTST__JVAR_JSON,     /* a node; -1 = None */
    PTST__JVAR_MESSAGES, /* a node, with the changes that apply_chat_template makes to messages */
    PTST__JVAR_TEXT,     /* template bytes */
    PTST__JVAR_FALSE,
    PTST__JVAR_TRUE
} ptst__jvar_kind;

typedef struct ptst__jvar {
    ptst__jvar_kind kind;
    const char *name;
    const ptst_json *json;
    int32_t node;
    const char *text;
    size_t size;
} ptst__jvar;

/* ---- values ---- */

typedef enum ptst__jkind {
    PTST__J_UNDEFINED,
    PTST__J_NONE,
    PTST__J_BOOL,
    PTST__J_INT,
    PTST__J_FLOAT,
    PTST__J_STRING,
    PTST__J_LIST,
    PTST__J_TUPLE,
    PTST__J_ITERATOR, /* what Python's generators are: iterated once, no length, always true */
    PTST__J_DICT,
    PTST__J_KEYS, /* views of a dict */
    PTST__J_VALUES,
    PTST__J_ITEMS,
    PTST__J_RANGE,
    PTST__J_NAMESPACE,
    PTST__J_MACRO,
    PTST__J_FUNCTION, /* a global function */
    PTST__J_METHOD,   /* a function bound to a value */
    PTST__J_LOOP,
    PTST__J_CYCLER,
    PTST__J_JOINER,
    PTST__J_MISSING /* an argument that was not given; never visible to templates */
} ptst__jkind;

/* Why a value is undefined; the text of the error if it is used. */
typedef enum ptst__jwhy {
    PTST__J_WHY_NAME,
    PTST__J_WHY_ATTRIBUTE,
    PTST__J_WHY_UNSAFE,
    PTST__J_WHY_ELSE,
    PTST__J_WHY_EMPTY,
    PTST__J_WHY_PARAMETER,
    PTST__J_WHY_ITEM
} ptst__jwhy;

/* Bytes (and marks, or elements) behind a string or list that was built by appending: the value
   that ends at `used` may grow in place, values that end before it keep seeing their own part.
   That makes text + x and list + [x] in a loop linear. */
typedef struct ptst__jroom {
    char *bytes;
    uint8_t *marks;
    struct ptst__jvalue *items;
    size_t used, capacity;
} ptst__jroom;

/* Valid UTF-8. */
typedef struct ptst__jstring {
    const char *bytes;
    const uint8_t *marks; /* one for each byte; NULL: all are the mark of the value */
    size_t size, points;  /* bytes, code points */
    ptst__jroom *room;    /* NULL = none */
} ptst__jstring;

typedef struct ptst__jvalue {
    uint8_t kind; /* ptst__jkind */
    uint8_t mark; /* where it comes from; of a string with marks: of its first byte */
    uint8_t flag; /* string: it is Markup; undefined: ptst__jwhy; tuple: it is of groupby */
    uint8_t of;   /* undefined: kind of the object that lacks the attribute */
    union {
        int64_t integer; /* also a bool */
        double number;
        const ptst__jstring *string; /* also the name of what is undefined */
        struct ptst__jlist *list;    /* also a tuple, an iterator */
        struct ptst__jdict *dict;    /* also a view, a namespace */
        const struct ptst__jrange *range;
        const struct ptst__jmacro *macro;
        const struct ptst__jbuiltin *function;
        const struct ptst__jmethod *method;
        struct ptst__jloop *loop;
        struct ptst__jcycle *cycle;
    } as;
} ptst__jvalue;

typedef struct ptst__jlist {
    ptst__jvalue *items;
    size_t count;
    size_t at; /* iterator: next element */
    ptst__jroom *room;
} ptst__jlist;

typedef struct ptst__jpair {
    ptst__jvalue key, value;
} ptst__jpair;

/* In the order of insertion. */
typedef struct ptst__jdict {
    ptst__jpair *pairs;
    size_t count, capacity;
    bool printing; /* a namespace that contains itself prints as {...} inside */
} ptst__jdict;

typedef struct ptst__jrange {
    int64_t start, stop, step;
    size_t count;
} ptst__jrange;

/* cycler() and joiner() */
typedef struct ptst__jcycle {
    ptst__jlist items;
    size_t at;
} ptst__jcycle;

typedef struct ptst__jmethod {
    ptst__jvalue self;
    const struct ptst__jbuiltin *function;
} ptst__jmethod;

/* Arguments of a call. */
typedef struct ptst__jnamed {
    const ptst__jstring *name;
    ptst__jvalue value;
} ptst__jnamed;

typedef struct ptst__jargs {
    ptst__jvalue *values;
    ptst__jnamed *named;
    size_t count, named_count;
} ptst__jargs;

struct ptst__jrun;

/* A filter, test, method or global function. self is what stands left of | or . or "is"; p has the
   parameters in the order of `params` (kind MISSING if not given). */
typedef struct ptst__jbuiltin {
    const char *name;
    const char *params; /* "!old !new count": ! = must be given; NULL: looks into the arguments */
    ptst__jvalue (*call)(struct ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                         const ptst__jargs *args);
} ptst__jbuiltin;

enum { PTST__J_PARAMS = 6 };

/* Text that is being written. */
typedef struct ptst__jsink {
    char *bytes;
    uint8_t *marks;
    size_t size, capacity;
} ptst__jsink;

typedef struct ptst__jbinding {
    struct ptst__jbinding *next;
    uint32_t name;
    ptst__jvalue value;
} ptst__jbinding;

typedef struct ptst__jscope {
    struct ptst__jscope *up;
    ptst__jbinding *first;
    bool captured; /* a macro remembers it */
} ptst__jscope;

/* A large allocation of a run. */
typedef struct ptst__jblock {
    struct ptst__jblock *next, *previous;
    size_t size;
} ptst__jblock;

enum { PTST__J_BREAK = 1, PTST__J_CONTINUE };

/* A piece of the tree; what the fields mean is said at ptst__jnode_kind (parser). */
typedef struct ptst__jnode {
    uint8_t kind, op;
    bool flag;
    uint32_t line, column, name;
    struct ptst__jnode *next; /* in a list */
    struct ptst__jnode *a, *b, *c, *d, *e;
    ptst__jvalue value;
    const ptst__jbuiltin *function;
} ptst__jnode;

struct ptst_jinja {
    ptst__arena arena;
    ptst_text name;
    ptst__jnode *body;
    const ptst__jstring **names; /* every identifier of the source once */
    size_t names_count, names_capacity;
    ptst__map map; /* from identifier to its number */
};

/* A rendering. */
typedef struct ptst__jrun {
    ptst_ctx *c;
    const struct ptst_jinja *t;
    ptst_code code;
    const struct ptst__jnode *at; /* being evaluated, for errors */
    ptst__arena arena;
    ptst__jblock *blocks;
    size_t memory, memory_max, steps, output_max, depth, depth_max;
    ptst__jsink *sink;
    ptst__jscope *scope, *root;
    ptst__jbinding *spare;
    int flow;       /* 0, or the loop control on its way to its loop */
    int generating; /* inside {% generation %} */
    int64_t now;
} ptst__jrun;

/* Fails with the position in the template. Only the first failure counts. */
PTST__PRINTF(3, 4)
static ptst__jvalue ptst__j_fail(ptst__jrun *r, ptst_code code, const char *format, ...) {
    char text[512];
    va_list args;
    ptst__jvalue undefined;
    memset(&undefined, 0, sizeof undefined);
    if (r->code == PTST_OK) {
        va_start(args, format);
        vsnprintf(text, sizeof text, format, args);
        va_end(args);
        r->code = ptst__fail(r->c, code, "%.400s: line %u, column %u: %s", r->t->name.data,
                             r->at == NULL ? 1 : (unsigned)r->at->line,
                             r->at == NULL ? 1 : (unsigned)r->at->column, text);
    }
    return undefined;
}

/* Pays for n steps of work. */
static bool ptst__j_pay(ptst__jrun *r, size_t n) {
    if (r->code != PTST_OK) {
        return false;
    }
    if (n > r->steps) {
        r->steps = 0;
        ptst__j_fail(r, PTST_ERR_LIMIT, "the limit on steps is reached");
        return false;
    }
    r->steps -= n;
    return true;
}

enum { PTST__J_LARGE = 4096, PTST__J_WORK = 64 /* bytes moved or compared for one step */ };

/* n * size bytes that live until the end of the run, or until ptst__j_release. */
static void *ptst__j_alloc(ptst__jrun *r, size_t n, size_t size) {
    size_t bytes = 0;
    ptst__jblock *b;
    void *p;
    if (r->code != PTST_OK) {
        return NULL;
    }
    if (!ptst__mul(n, size, &bytes) || bytes > r->memory_max - r->memory) {
        ptst__j_fail(r, PTST_ERR_LIMIT, "the limit on memory is reached");
        return NULL;
    }
    if (!ptst__j_pay(r, bytes / 256)) {
        return NULL;
    }
    if (bytes < PTST__J_LARGE) {
        p = ptst__arena_alloc(r->c, &r->arena, bytes, 1);
    } else {
        b = (ptst__jblock *)ptst__alloc(r->c, bytes + PTST__CHUNK_HEAD, 1);
        p = b == NULL ? NULL : (char *)b + PTST__CHUNK_HEAD;
        if (b != NULL) {
            b->size = bytes;
            b->next = r->blocks;
            b->previous = NULL;
            if (b->next != NULL) {
                b->next->previous = b;
            }
            r->blocks = b;
            memset(p, 0, bytes);
        }
    }
    if (p == NULL) {
        r->code = ptst_error_code(r->c);
        return NULL;
    }
    r->memory += bytes;
    return p;
}

/* Gives a block of `size` bytes back early; small ones stay until the end. */
static void ptst__j_release(ptst__jrun *r, void *p, size_t size) {
    ptst__jblock *b;
    if (p == NULL || size < PTST__J_LARGE) {
        return;
    }
    b = (ptst__jblock *)(void *)((char *)p - PTST__CHUNK_HEAD);
    if (b->previous != NULL) {
        b->previous->next = b->next;
    } else {
        r->blocks = b->next;
    }
    if (b->next != NULL) {
        b->next->previous = b->previous;
    }
    r->memory -= b->size;
    ptst__free(r->c, b);
}

static ptst__jvalue ptst__j_make(ptst__jkind kind, uint8_t mark) {
    ptst__jvalue v;
    memset(&v, 0, sizeof v);
    v.kind = (uint8_t)kind;
    v.mark = mark;
    return v;
}

static ptst__jvalue ptst__j_none(void) { return ptst__j_make(PTST__J_NONE, 0); }

static ptst__jvalue ptst__j_bool(bool b) {
    ptst__jvalue v = ptst__j_make(PTST__J_BOOL, 0);
    v.as.integer = b;
    return v;
}

static ptst__jvalue ptst__j_int(int64_t i, uint8_t mark) {
    ptst__jvalue v = ptst__j_make(PTST__J_INT, mark);
    v.as.integer = i;
    return v;
}

static ptst__jvalue ptst__j_float(double f, uint8_t mark) {
    ptst__jvalue v = ptst__j_make(PTST__J_FLOAT, mark);
    v.as.number = f;
    return v;
}

static ptst__jvalue ptst__j_undefined(ptst__jwhy why, const ptst__jstring *name, uint8_t of) {
    ptst__jvalue v = ptst__j_make(PTST__J_UNDEFINED, 0);
    v.flag = (uint8_t)why;
    v.of = of;
    v.as.string = name;
    return v;
}

/* int or bool */
static bool ptst__j_is_int(ptst__jvalue v) {
    return v.kind == PTST__J_INT || v.kind == PTST__J_BOOL;
}

static bool ptst__j_is_number(ptst__jvalue v) {
    return ptst__j_is_int(v) || v.kind == PTST__J_FLOAT;
}

static double ptst__j_double(ptst__jvalue v) {
    return v.kind == PTST__J_FLOAT ? v.as.number : (double)v.as.integer;
}

/* Python's name of a type, for errors. */
static const char *ptst__j_type(ptst__jvalue v) {
    static const char *const names[] = {
        "Undefined",   "NoneType", "bool",      "int",    "float",     "str",
        "list",        "tuple",    "generator", "dict",   "dict_keys", "dict_values",
        "dict_items",  "range",    "Namespace", "Macro",  "function",  "method",
        "LoopContext", "Cycler",   "Joiner",    "missing"};
    return names[v.kind];
}

/* The beginning of a string as a C string, for errors. */
typedef struct ptst__jshown {
    char text[64];
} ptst__jshown;

static ptst__jshown ptst__j_show(const ptst__jstring *s) {
    ptst__jshown out;
    size_t n = s == NULL ? 0 : s->size < sizeof out.text ? s->size : sizeof out.text - 1;
    while (n > 0 && s->size > n && ((unsigned char)s->bytes[n] & 0xC0) == 0x80) {
        n--;
    }
    memcpy(out.text, n == 0 ? "" : s->bytes, n);
    out.text[n] = 0;
    return out;
}

/* Using an undefined value: the error that Jinja2 gives. */
static ptst__jvalue ptst__j_fail_undefined(ptst__jrun *r, ptst__jvalue v) {
    ptst__jshown shown = ptst__j_show(v.as.string);
    const char *name = shown.text;
    switch ((ptst__jwhy)v.flag) {
    case PTST__J_WHY_ATTRIBUTE:
        return ptst__j_fail(r, PTST_ERR_FORMAT, "'%s object' has no attribute '%s'",
                            ptst__j_type(ptst__j_make((ptst__jkind)v.of, 0)), name);
    case PTST__J_WHY_UNSAFE:
        return ptst__j_fail(r, PTST_ERR_FORMAT, "access to attribute '%s' of '%s' object is unsafe",
                            name, ptst__j_type(ptst__j_make((ptst__jkind)v.of, 0)));
    case PTST__J_WHY_ELSE:
        return ptst__j_fail(r, PTST_ERR_FORMAT,
                            "an inline if without else was false, and its value is used");
    case PTST__J_WHY_EMPTY:
        return ptst__j_fail(r, PTST_ERR_FORMAT, "no such item, the sequence was empty");
    case PTST__J_WHY_PARAMETER:
        return ptst__j_fail(r, PTST_ERR_FORMAT, "parameter '%s' was not provided", name);
    case PTST__J_WHY_ITEM:
        return ptst__j_fail(r, PTST_ERR_FORMAT, "'%s object' has no such element",
                            ptst__j_type(ptst__j_make((ptst__jkind)v.of, 0)));
    default:
        return ptst__j_fail(r, PTST_ERR_FORMAT, "'%s' is undefined", name);
    }
}

/* ---- strings ---- */

static size_t ptst__j_count_points(const char *s, size_t size) {
    size_t i, n = 0;
    for (i = 0; i < size; i++) {
        n += ((unsigned char)s[i] & 0xC0) != 0x80;
    }
    return n;
}

/* A string of bytes that outlive the run (or lie in its memory). */
static ptst__jvalue ptst__j_string(ptst__jrun *r, const char *bytes, size_t size,
                                   const uint8_t *marks, uint8_t mark) {
    ptst__jvalue v = ptst__j_make(PTST__J_STRING, marks != NULL && size != 0 ? marks[0] : mark);
    ptst__jstring *s = (ptst__jstring *)ptst__j_alloc(r, 1, sizeof *s);
    static const ptst__jstring empty = {"", NULL, 0, 0, NULL};
    v.as.string = s == NULL ? &empty : s;
    if (s != NULL) {
        s->bytes = bytes;
        s->size = size;
        s->marks = marks;
        s->points = ptst__j_count_points(bytes, size);
        ptst__j_pay(r, size / 256);
    }
    return v;
}

static ptst__jvalue ptst__j_text(ptst__jrun *r, const char *s) {
    return ptst__j_string(r, s, strlen(s), NULL, 0);
}

/* Bytes from..to of a string (Markup stays Markup). */
static ptst__jvalue ptst__j_sub(ptst__jrun *r, ptst__jvalue v, size_t from, size_t to) {
    const ptst__jstring *s = v.as.string;
    ptst__jvalue out;
    if (from >= to) {
        from = to = 0;
    }
    out = ptst__j_string(r, s->bytes + from, to - from, s->marks == NULL ? NULL : s->marks + from,
                         v.mark);
    out.flag = v.flag;
    return out;
}

/* Byte offset of code point number i (i <= points). */
static size_t ptst__j_offset(ptst__jrun *r, const ptst__jstring *s, size_t i) {
    size_t at = 0;
    if (s->points == s->size) {
        return i;
    }
    ptst__j_pay(r, i / PTST__J_WORK);
    for (; at < s->size; at++) {
        if (((unsigned char)s->bytes[at] & 0xC0) != 0x80 && i-- == 0) {
            break;
        }
    }
    return at;
}

/* The code point at byte i and its length. */
static uint32_t ptst__j_point(const ptst__jstring *s, size_t i, size_t *length) {
    uint32_t point = 0;
    size_t n = ptst__utf8_read(s->bytes + i, s->size - i, &point);
    *length = n == 0 ? 1 : n;
    return point;
}

/* First occurrence of needle in hay[from..to), or SIZE_MAX. Pays for what it compares, so that no
   needle makes it expensive. */
static size_t ptst__j_find(ptst__jrun *r, const ptst__jstring *hay, const ptst__jstring *needle,
                           size_t from, size_t to) {
    size_t n = needle->size, k, work = 0;
    while (from <= to && to - from >= n && r->code == PTST_OK) {
        const char *p =
            n == 0 ? hay->bytes + from
                   : (const char *)memchr(hay->bytes + from, needle->bytes[0], to - from - n + 1);
        size_t at = p == NULL ? to : (size_t)(p - hay->bytes);
        work += at - from;
        for (k = 0; p != NULL && k < n && p[k] == needle->bytes[k]; k++) {
        }
        work += 8 + k;
        ptst__j_pay(r, work / PTST__J_WORK);
        work %= PTST__J_WORK;
        if (p == NULL) {
            break;
        }
        if (k == n) {
            return at;
        }
        from = at + 1;
    }
    return SIZE_MAX;
}

/* Last occurrence. */
static size_t ptst__j_rfind(ptst__jrun *r, const ptst__jstring *hay, const ptst__jstring *needle,
                            size_t from, size_t to) {
    size_t n = needle->size, at, k, work = 0;
    if (from > to || to - from < n) {
        return SIZE_MAX;
    }
    for (at = to - n; r->code == PTST_OK; at--) {
        for (k = 0; k < n && hay->bytes[at + k] == needle->bytes[k]; k++) {
        }
        if (k == n) {
            return at;
        }
        work += 4 + k;
        ptst__j_pay(r, work / PTST__J_WORK);
        work %= PTST__J_WORK;
        if (at == from) {
            break;
        }
    }
    return SIZE_MAX;
}

/* Room for `extra` more bytes; false after a failure. */
static bool ptst__j_sink_room(ptst__jrun *r, ptst__jsink *o, size_t extra) {
    size_t n = o->capacity < 32 ? 32 : o->capacity;
    char *p;
    if (r->code != PTST_OK) {
        return false;
    }
    if (extra > r->output_max || o->size > r->output_max - extra) {
        ptst__j_fail(r, PTST_ERR_LIMIT, "the limit on the size of the output is reached");
        return false;
    }
    if (extra <= o->capacity - o->size) {
        return true;
    }
    while (n - o->size < extra) {
        n *= 2;
    }
    p = (char *)ptst__j_alloc(r, n, 2);
    if (p == NULL) {
        return false;
    }
    if (o->size != 0) {
        memcpy(p, o->bytes, o->size);
        memcpy(p + n, o->marks, o->size);
    }
    ptst__j_release(r, o->bytes, 2 * o->capacity);
    o->bytes = p;
    o->marks = (uint8_t *)p + n;
    o->capacity = n;
    return true;
}

/* Writes bytes with their marks (marks NULL: all `mark`). */
static void ptst__j_put(ptst__jrun *r, ptst__jsink *o, const char *bytes, size_t size,
                        const uint8_t *marks, uint8_t mark) {
    size_t i;
    if (size == 0 || !ptst__j_pay(r, size / PTST__J_WORK) || !ptst__j_sink_room(r, o, size)) {
        return;
    }
    memcpy(o->bytes + o->size, bytes, size);
    if (marks != NULL) {
        memcpy(o->marks + o->size, marks, size);
    } else {
        memset(o->marks + o->size, mark, size);
    }
    for (i = 0; r->generating != 0 && i < size; i++) {
        o->marks[o->size + i] |= PTST__MARK_GENERATED;
    }
    o->size += size;
}

static void ptst__j_puts(ptst__jrun *r, ptst__jsink *o, const char *s, uint8_t mark) {
    ptst__j_put(r, o, s, strlen(s), NULL, mark);
}

static void ptst__j_put_string(ptst__jrun *r, ptst__jsink *o, ptst__jvalue v) {
    ptst__j_put(r, o, v.as.string->bytes, v.as.string->size, v.as.string->marks, v.mark);
}

/* Bytes from..to of a string. */
static void ptst__j_put_sub(ptst__jrun *r, ptst__jsink *o, ptst__jvalue v, size_t from, size_t to) {
    const ptst__jstring *s = v.as.string;
    if (from < to) {
        ptst__j_put(r, o, s->bytes + from, to - from, s->marks == NULL ? NULL : s->marks + from,
                    v.mark);
    }
}

static void ptst__j_put_point(ptst__jrun *r, ptst__jsink *o, uint32_t point, uint8_t mark) {
    char s[4];
    ptst__j_put(r, o, s, ptst__utf8_write(s, point), NULL, mark);
}

/* n times the same byte. */
static void ptst__j_put_fill(ptst__jrun *r, ptst__jsink *o, char byte, size_t n, uint8_t mark) {
    if (n != 0 && ptst__j_sink_room(r, o, n)) {
        memset(o->bytes + o->size, byte, n);
        memset(o->marks + o->size, mark, n);
        o->size += n;
        ptst__j_pay(r, n / PTST__J_WORK);
    }
}

/* n times the same code point. */
static void ptst__j_put_points(ptst__jrun *r, ptst__jsink *o, uint32_t point, size_t n,
                               uint8_t mark) {
    if (point < 0x80) {
        ptst__j_put_fill(r, o, (char)point, n, mark);
        return;
    }
    for (; n > 0 && ptst__j_pay(r, 1); n--) {
        ptst__j_put_point(r, o, point, mark);
    }
}

/* What was written, as a string that can be appended to; the sink is used up. */
static ptst__jvalue ptst__j_sink_string(ptst__jrun *r, const ptst__jsink *o) {
    ptst__jvalue v =
        ptst__j_string(r, o->size == 0 ? "" : o->bytes, o->size, o->size == 0 ? NULL : o->marks, 0);
    ptst__jroom *room = o->size == 0 ? NULL : (ptst__jroom *)ptst__j_alloc(r, 1, sizeof *room);
    if (room != NULL) {
        ptst__jstring *s = (ptst__jstring *)ptst__j_alloc(r, 1, sizeof *s);
        if (s != NULL) {
            room->bytes = o->bytes;
            room->marks = o->marks;
            room->used = o->size;
            room->capacity = o->capacity;
            *s = *v.as.string;
            s->room = room;
            v.as.string = s;
        }
    }
    return v;
}

/* a + b. Appends in place where a ends at the used part of its room. */
static ptst__jvalue ptst__j_concat(ptst__jrun *r, ptst__jvalue a, ptst__jvalue b) {
    const ptst__jstring *x = a.as.string, *y = b.as.string;
    ptst__jroom *room = x->room;
    ptst__jsink o = {NULL, NULL, 0, 0};
    ptst__jstring *s;
    if (y->size == 0 || x->size == 0) {
        return y->size == 0 ? a : b;
    }
    if (room == NULL || x->bytes + x->size != room->bytes + room->used ||
        y->size > room->capacity - room->used || y->size > r->output_max) {
        if (x->size <= r->output_max && y->size <= r->output_max) {
            ptst__j_sink_room(r, &o,
                              2 * x->size + y->size <= r->output_max ? 2 * x->size + y->size
                                                                     : x->size + y->size);
        }
        ptst__j_put_string(r, &o, a);
        ptst__j_put_string(r, &o, b);
        return r->code == PTST_OK ? ptst__j_sink_string(r, &o) : a;
    }
    s = (ptst__jstring *)ptst__j_alloc(r, 1, sizeof *s);
    if (s == NULL || !ptst__j_pay(r, y->size / PTST__J_WORK)) {
        return a;
    }
    memcpy(room->bytes + room->used, y->bytes, y->size);
    if (y->marks != NULL) {
        memcpy(room->marks + room->used, y->marks, y->size);
    } else {
        memset(room->marks + room->used, b.mark, y->size);
    }
    room->used += y->size;
    *s = *x;
    s->size += y->size;
    s->points += y->points;
    a.as.string = s;
    return a;
}

static bool ptst__j_same_text(const ptst__jstring *a, const char *b) {
    return strlen(b) == a->size && memcmp(a->bytes, b, a->size) == 0;
}

/* ---- lists, dicts, ranges ---- */

static ptst__jvalue ptst__j_list(ptst__jrun *r, ptst__jkind kind, ptst__jvalue *items,
                                 size_t count) {
    ptst__jvalue v = ptst__j_make(kind, 0);
    ptst__jlist *l = (ptst__jlist *)ptst__j_alloc(r, 1, sizeof *l);
    if (l == NULL) {
        return ptst__j_none();
    }
    l->items = items;
    l->count = count;
    v.as.list = l;
    return v;
}

/* Appends to a list that nobody else has seen yet. */
static void ptst__j_push(ptst__jrun *r, ptst__jvalue list, ptst__jvalue item) {
    ptst__jlist *l;
    ptst__jroom *room;
    size_t n;
    if (r->code != PTST_OK || list.kind < PTST__J_LIST || list.kind > PTST__J_ITERATOR) {
        return;
    }
    l = list.as.list;
    room = l->room;
    if (room == NULL) {
        room = l->room = (ptst__jroom *)ptst__j_alloc(r, 1, sizeof *room);
        if (room == NULL) {
            return;
        }
    }
    if (room->used == room->capacity) {
        ptst__jvalue *items;
        n = room->capacity == 0 ? 4 : 2 * room->capacity;
        items = (ptst__jvalue *)ptst__j_alloc(r, n, sizeof *items);
        if (items == NULL) {
            return;
        }
        if (room->used != 0) {
            memcpy(items, room->items, room->used * sizeof *items);
        }
        ptst__j_release(r, room->items, room->capacity * sizeof *items);
        l->items = room->items = items;
        room->capacity = n;
    }
    room->items[room->used++] = item;
    l->count = room->used;
}

/* a + b for two lists or two tuples; in place like ptst__j_concat. */
static ptst__jvalue ptst__j_list_concat(ptst__jrun *r, ptst__jvalue a, ptst__jvalue b) {
    const ptst__jlist *x = a.as.list, *y = b.as.list;
    ptst__jroom *room = x->room;
    ptst__jvalue out = ptst__j_list(r, (ptst__jkind)a.kind, x->items, x->count);
    size_t total, n;
    if (r->code != PTST_OK || !ptst__add(x->count, y->count, &total) ||
        !ptst__j_pay(r, y->count / 4)) {
        return a;
    }
    if (room == NULL || x->items + x->count != room->items + room->used ||
        y->count > room->capacity - room->used) {
        room = (ptst__jroom *)ptst__j_alloc(r, 1, sizeof *room);
        n = total > SIZE_MAX / 64 ? total : x->count == 0 ? total : total + x->count + 4;
        if (room != NULL) {
            room->items = (ptst__jvalue *)ptst__j_alloc(r, n, sizeof *room->items);
        }
        if (room == NULL || room->items == NULL) {
            return a;
        }
        room->capacity = n;
        if (x->count != 0) {
            memcpy(room->items, x->items, x->count * sizeof *room->items);
        }
        room->used = x->count;
    }
    if (y->count != 0) {
        memcpy(room->items + room->used, y->items, y->count * sizeof *room->items);
    }
    room->used += y->count;
    out.as.list->items = room->items + room->used - total;
    out.as.list->count = total;
    out.as.list->room = room;
    out.mark = a.mark > b.mark ? a.mark : b.mark;
    return out;
}

static ptst__jvalue ptst__j_pair(ptst__jrun *r, ptst__jvalue a, ptst__jvalue b) {
    ptst__jvalue *items = (ptst__jvalue *)ptst__j_alloc(r, 2, sizeof *items), v;
    if (items == NULL) {
        return ptst__j_none();
    }
    items[0] = a;
    items[1] = b;
    v = ptst__j_list(r, PTST__J_TUPLE, items, 2);
    v.mark = a.mark;
    return v;
}

static ptst__jvalue ptst__j_dict(ptst__jrun *r, ptst__jkind kind) {
    ptst__jvalue v = ptst__j_make(kind, 0);
    ptst__jdict *d = (ptst__jdict *)ptst__j_alloc(r, 1, sizeof *d);
    if (d == NULL) {
        return ptst__j_none();
    }
    v.as.dict = d;
    return v;
}

static ptst__jvalue ptst__j_range_item(const ptst__jrange *g, size_t i, uint8_t mark) {
    return ptst__j_int((int64_t)((uint64_t)g->start + (uint64_t)i * (uint64_t)g->step), mark);
}

static bool ptst__j_equal(ptst__jrun *r, ptst__jvalue a, ptst__jvalue b);

/* a == b, element by element. */
static bool ptst__j_equal_lists(ptst__jrun *r, const ptst__jlist *a, const ptst__jlist *b) {
    size_t i;
    bool same = a->count == b->count;
    if (++r->depth > r->depth_max) {
        ptst__j_fail(r, PTST_ERR_LIMIT, "values are nested too deeply");
    }
    for (i = 0; same && i < a->count && r->code == PTST_OK; i++) {
        same = ptst__j_equal(r, a->items[i], b->items[i]);
    }
    r->depth--;
    return same;
}

/* Member of a dict, NULL if absent. */
static ptst__jpair *ptst__j_dict_find(ptst__jrun *r, const ptst__jdict *d, ptst__jvalue key) {
    size_t i;
    ptst__j_pay(r, d->count / 8);
    for (i = 0; i < d->count && r->code == PTST_OK; i++) {
        if (key.kind == d->pairs[i].key.kind || key.kind != PTST__J_STRING) {
            if (ptst__j_equal(r, d->pairs[i].key, key)) {
                return &d->pairs[i];
            }
        }
    }
    return NULL;
}

static bool ptst__j_equal_dicts(ptst__jrun *r, const ptst__jdict *a, const ptst__jdict *b) {
    size_t i;
    bool same = a->count == b->count;
    if (++r->depth > r->depth_max) {
        ptst__j_fail(r, PTST_ERR_LIMIT, "values are nested too deeply");
    }
    for (i = 0; same && i < a->count && r->code == PTST_OK; i++) {
        const ptst__jpair *p = ptst__j_dict_find(r, b, a->pairs[i].key);
        same = p != NULL && ptst__j_equal(r, a->pairs[i].value, p->value);
    }
    r->depth--;
    return same;
}

static bool ptst__j_equal_ranges(const ptst__jrange *a, const ptst__jrange *b) {
    return a->count == b->count &&
           (a->count == 0 || (a->start == b->start && (a->count == 1 || a->step == b->step)));
}

/* Python's == (an int and a float are compared exactly). */
static bool ptst__j_equal(ptst__jrun *r, ptst__jvalue a, ptst__jvalue b) {
    if (!ptst__j_pay(r, 1)) {
        return false;
    }
    if (ptst__j_is_int(a) && ptst__j_is_int(b)) {
        return a.as.integer == b.as.integer;
    }
    if (ptst__j_is_number(a) && ptst__j_is_number(b)) {
        double x = ptst__j_double(a), y = ptst__j_double(b);
        return x == y && (a.kind == b.kind || fabs(x) < 9.2e18) &&
               (a.kind == b.kind || (a.kind == PTST__J_FLOAT ? (int64_t)x == b.as.integer
                                                             : a.as.integer == (int64_t)y));
    }
    if (a.kind != b.kind) {
        return false;
    }
    switch ((ptst__jkind)a.kind) {
    case PTST__J_UNDEFINED:
    case PTST__J_NONE:
        return true;
    case PTST__J_STRING:
        return a.as.string->size == b.as.string->size &&
               ptst__j_pay(r, a.as.string->size / PTST__J_WORK) &&
               memcmp(a.as.string->bytes, b.as.string->bytes, a.as.string->size) == 0;
    case PTST__J_LIST:
    case PTST__J_TUPLE:
        return a.as.list == b.as.list || ptst__j_equal_lists(r, a.as.list, b.as.list);
    case PTST__J_DICT:
    case PTST__J_KEYS:
    case PTST__J_ITEMS:
        return a.as.dict == b.as.dict || ptst__j_equal_dicts(r, a.as.dict, b.as.dict);
    case PTST__J_RANGE:
        return ptst__j_equal_ranges(a.as.range, b.as.range);
    default: /* by identity; the pointers share their storage */
        return a.as.dict == b.as.dict;
    }
}

/* Adds or replaces. */
static void ptst__j_dict_put(ptst__jrun *r, ptst__jvalue dict, ptst__jvalue key,
                             ptst__jvalue value) {
    ptst__jdict *d;
    ptst__jpair *p;
    if (r->code != PTST_OK || (dict.kind != PTST__J_DICT && dict.kind != PTST__J_NAMESPACE)) {
        return;
    }
    if (key.kind == PTST__J_LIST || key.kind == PTST__J_DICT) {
        ptst__j_fail(r, PTST_ERR_FORMAT, "unhashable type: '%s'", ptst__j_type(key));
        return;
    }
    d = dict.as.dict;
    p = ptst__j_dict_find(r, d, key);
    if (p != NULL) {
        p->value = value;
        return;
    }
    if (d->count == d->capacity) {
        size_t n = d->capacity == 0 ? 4 : 2 * d->capacity;
        p = (ptst__jpair *)ptst__j_alloc(r, n, sizeof *p);
        if (p == NULL) {
            return;
        }
        if (d->count != 0) {
            memcpy(p, d->pairs, d->count * sizeof *p);
        }
        ptst__j_release(r, d->pairs, d->capacity * sizeof *p);
        d->pairs = p;
        d->capacity = n;
    }
    d->pairs[d->count].key = key;
    d->pairs[d->count++].value = value;
}

/* Does the value count as true? */
static bool ptst__j_true(const ptst__jrun *r, ptst__jvalue v) {
    if (r->code != PTST_OK) {
        return false;
    }
    switch ((ptst__jkind)v.kind) {
    case PTST__J_UNDEFINED:
    case PTST__J_NONE:
    case PTST__J_MISSING:
        return false;
    case PTST__J_BOOL:
    case PTST__J_INT:
        return v.as.integer != 0;
    case PTST__J_FLOAT:
        return v.as.number != 0;
    case PTST__J_STRING:
        return v.as.string->size != 0;
    case PTST__J_LIST:
    case PTST__J_TUPLE:
        return v.as.list->count != 0;
    case PTST__J_DICT:
    case PTST__J_KEYS:
    case PTST__J_VALUES:
    case PTST__J_ITEMS:
        return v.as.dict->count != 0;
    case PTST__J_RANGE:
        return v.as.range->count != 0;
    default:
        return true;
    }
}

/* len(); -1 if the value has none. */
static int64_t ptst__j_length(ptst__jvalue v) {
    switch ((ptst__jkind)v.kind) {
    case PTST__J_UNDEFINED:
        return 0;
    case PTST__J_STRING:
        return (int64_t)v.as.string->points;
    case PTST__J_LIST:
    case PTST__J_TUPLE:
        return (int64_t)v.as.list->count;
    case PTST__J_DICT:
    case PTST__J_KEYS:
    case PTST__J_VALUES:
    case PTST__J_ITEMS:
        return (int64_t)v.as.dict->count;
    case PTST__J_RANGE:
        return (int64_t)v.as.range->count;
    default:
        return -1;
    }
}

/* Where an iteration stands. */
typedef struct ptst__jiter {
    ptst__jvalue over;
    size_t at;
} ptst__jiter;

static bool ptst__j_iterable(ptst__jvalue v) {
    return v.kind == PTST__J_UNDEFINED || (v.kind >= PTST__J_STRING && v.kind <= PTST__J_RANGE) ||
           v.kind == PTST__J_LOOP;
}

static bool ptst__j_iter(ptst__jrun *r, ptst__jvalue over, ptst__jiter *i) {
    i->over = over;
    i->at = 0;
    if (!ptst__j_iterable(over) || over.kind == PTST__J_LOOP) {
        ptst__j_fail(r, PTST_ERR_FORMAT, "'%s' object is not iterable", ptst__j_type(over));
        return false;
    }
    return r->code == PTST_OK;
}

/* The next element; false at the end and after a failure. */
static bool ptst__j_next(ptst__jrun *r, ptst__jiter *i, ptst__jvalue *item) {
    ptst__jvalue v = i->over;
    size_t n;
    if (!ptst__j_pay(r, 1)) {
        return false;
    }
    switch ((ptst__jkind)v.kind) {
    case PTST__J_STRING:
        if (i->at >= v.as.string->size) {
            return false;
        }
        ptst__j_point(v.as.string, i->at, &n);
        *item = ptst__j_sub(r, v, i->at, i->at + n);
        item->flag = 0;
        i->at += n;
        return r->code == PTST_OK;
    case PTST__J_ITERATOR:
        if (v.as.list->at >= v.as.list->count) {
            return false;
        }
        *item = v.as.list->items[v.as.list->at++];
        return true;
    case PTST__J_LIST:
    case PTST__J_TUPLE:
        if (i->at >= v.as.list->count) {
            return false;
        }
        *item = v.as.list->items[i->at++];
        return true;
    case PTST__J_RANGE:
        if (i->at >= v.as.range->count) {
            return false;
        }
        *item = ptst__j_range_item(v.as.range, i->at++, v.mark);
        return true;
    case PTST__J_DICT:
    case PTST__J_KEYS:
    case PTST__J_VALUES:
    case PTST__J_ITEMS:
        if (i->at >= v.as.dict->count) {
            return false;
        }
        *item = v.kind == PTST__J_VALUES ? v.as.dict->pairs[i->at].value
                : v.kind == PTST__J_ITEMS
                    ? ptst__j_pair(r, v.as.dict->pairs[i->at].key, v.as.dict->pairs[i->at].value)
                    : v.as.dict->pairs[i->at].key;
        i->at++;
        return r->code == PTST_OK;
    default:
        return false;
    }
}

/* A new list of all elements. */
static ptst__jvalue ptst__j_collect(ptst__jrun *r, ptst__jvalue v, ptst__jkind kind) {
    ptst__jvalue out = ptst__j_list(r, kind, NULL, 0), item;
    ptst__jiter i;
    out.mark = v.mark;
    if (ptst__j_iter(r, v, &i)) {
        while (ptst__j_next(r, &i, &item)) {
            ptst__j_push(r, out, item);
        }
    }
    return out;
}

/* element in v */
static bool ptst__j_contains(ptst__jrun *r, ptst__jvalue v, ptst__jvalue element) {
    ptst__jiter i;
    ptst__jvalue item;
    if (v.kind == PTST__J_STRING) {
        if (element.kind != PTST__J_STRING) {
            ptst__j_fail(r, PTST_ERR_FORMAT,
                         "'in <string>' requires string as left operand, not %s",
                         ptst__j_type(element));
            return false;
        }
        return ptst__j_find(r, v.as.string, element.as.string, 0, v.as.string->size) != SIZE_MAX;
    }
    if (v.kind == PTST__J_DICT || v.kind == PTST__J_KEYS) {
        if (element.kind == PTST__J_LIST || element.kind == PTST__J_DICT) {
            ptst__j_fail(r, PTST_ERR_FORMAT, "unhashable type: '%s'", ptst__j_type(element));
            return false;
        }
        return ptst__j_dict_find(r, v.as.dict, element) != NULL;
    }
    if (!ptst__j_iterable(v)) {
        ptst__j_fail(r, PTST_ERR_FORMAT, "argument of type '%s' is not iterable", ptst__j_type(v));
        return false;
    }
    if (ptst__j_iter(r, v, &i)) {
        while (ptst__j_next(r, &i, &item)) {
            if (ptst__j_equal(r, item, element)) {
                return true;
            }
        }
    }
    return false;
}

/* ---- printing ---- */

/* Python's repr of a float: the shortest digits that read back as the same number, with an exponent
   below 1e-4 and from 1e16 on. buffer has 40 bytes. Returns the length. */
static size_t ptst__j_float_text(char *buffer, double f) {
    char digits[32];
    int precision, exponent, i, k, count;
    size_t n = 0;
    if (!(f - f == 0)) {
        const char *s = f != f ? "nan" : f > 0 ? "inf" : "-inf";
        memcpy(buffer, s, strlen(s) + 1);
        return strlen(s);
    }
    for (precision = 0; precision <= 16; precision++) {
        snprintf(digits, sizeof digits, "%.*e", precision, f);
        if (strtod(digits, NULL) == f) {
            break;
        }
    }
    exponent = atoi(strchr(digits, 'e') + 1);
    for (i = 0, k = 0; digits[i] != 'e'; i++) { /* keep the digits only; the point may be a comma */
        if (digits[i] == '-') {
            buffer[n++] = '-';
        } else if (digits[i] >= '0' && digits[i] <= '9') {
            digits[k++] = digits[i];
        }
    }
    count = k;
    if (exponent < -4 || exponent >= 16) {
        buffer[n++] = digits[0];
        if (count > 1) {
            buffer[n++] = '.';
            memcpy(buffer + n, digits + 1, (size_t)count - 1);
            n += (size_t)count - 1;
        }
        return n + (size_t)snprintf(buffer + n, 8, "e%c%02d", exponent < 0 ? '-' : '+',
                                    exponent < 0 ? -exponent : exponent);
    }
    for (i = exponent < 0 ? exponent : 0; i <= exponent || i < count || i == exponent + 1; i++) {
        if (i == exponent + 1) {
            buffer[n++] = '.';
        }
        buffer[n++] = i >= 0 && i < count ? digits[i] : '0';
    }
    buffer[n] = 0;
    return n;
}

static void ptst__j_put_int(ptst__jrun *r, ptst__jsink *o, int64_t i, uint8_t mark) {
    char s[24];
    snprintf(s, sizeof s, "%lld", (long long)i);
    ptst__j_puts(r, o, s, mark);
}

/* Would Python print it as it is in repr()? */
static bool ptst__j_printable(uint32_t point) { return point >= 0x20 && point != 0x7F; }

/* A string as Python source. */
static void ptst__j_put_quoted(ptst__jrun *r, ptst__jsink *o, ptst__jvalue v) {
    const ptst__jstring *s = v.as.string;
    char quote = '\'', escape[16];
    size_t i, n, plain = 0;
    if (s->size != 0 && memchr(s->bytes, '\'', s->size) != NULL &&
        memchr(s->bytes, '"', s->size) == NULL) {
        quote = '"';
    }
    ptst__j_put(r, o, &quote, 1, NULL, v.mark);
    for (i = 0; i < s->size && r->code == PTST_OK; i += n) {
        uint32_t point = ptst__j_point(s, i, &n);
        const char *known = point == '\\'   ? "\\\\"
                            : point == '\n' ? "\\n"
                            : point == '\r' ? "\\r"
                            : point == '\t' ? "\\t"
                                            : NULL;
        if (known == NULL && point == (uint32_t)(unsigned char)quote) {
            snprintf(escape, sizeof escape, "\\%c", quote);
            known = escape;
        } else if (known == NULL && !ptst__j_printable(point)) {
            snprintf(escape, sizeof escape,
                     point < 0x100     ? "\\x%02x"
                     : point < 0x10000 ? "\\u%04x"
                                       : "\\U%08x",
                     (unsigned)point);
            known = escape;
        }
        if (known != NULL) {
            ptst__j_put_sub(r, o, v, plain, i);
            ptst__j_puts(r, o, known, v.mark);
            plain = i + n;
        }
    }
    ptst__j_put_sub(r, o, v, plain, s->size);
    ptst__j_put(r, o, &quote, 1, NULL, v.mark);
}

static void ptst__j_put_repr(ptst__jrun *r, ptst__jsink *o, ptst__jvalue v);

static void ptst__j_put_items(ptst__jrun *r, ptst__jsink *o, ptst__jvalue v) {
    const ptst__jlist *l = v.as.list;
    size_t i;
    ptst__j_puts(r, o, v.kind == PTST__J_LIST ? "[" : "(", v.mark);
    for (i = 0; i < l->count && r->code == PTST_OK; i++) {
        ptst__j_puts(r, o, i == 0 ? "" : ", ", v.mark);
        ptst__j_put_repr(r, o, l->items[i]);
    }
    ptst__j_puts(r, o, v.kind == PTST__J_LIST ? "]" : l->count == 1 ? ",)" : ")", v.mark);
}

/* {'a': 1}, dict_keys(['a']), dict_values([1]), dict_items([('a', 1)]), <Namespace {'a': 1}> */
static void ptst__j_put_members(ptst__jrun *r, ptst__jsink *o, ptst__jvalue v) {
    static const char *const begin[] = {"{", "dict_keys([", "dict_values([", "dict_items(["};
    ptst__jdict *d = v.as.dict;
    int form = v.kind == PTST__J_NAMESPACE ? 0 : (int)v.kind - (int)PTST__J_DICT;
    size_t i;
    ptst__j_puts(r, o, v.kind == PTST__J_NAMESPACE ? "<Namespace " : "", v.mark);
    if (d->printing) {
        ptst__j_puts(r, o, "{...}>", v.mark);
        return;
    }
    d->printing = true;
    ptst__j_puts(r, o, begin[form], v.mark);
    for (i = 0; i < d->count && r->code == PTST_OK; i++) {
        ptst__j_puts(r, o, i == 0 ? "" : ", ", v.mark);
        ptst__j_puts(r, o, form == 3 ? "(" : "", v.mark);
        if (form != 2) {
            ptst__j_put_repr(r, o, d->pairs[i].key);
        }
        ptst__j_puts(r, o, form == 0 ? ": " : form == 3 ? ", " : "", v.mark);
        if (form != 1) {
            ptst__j_put_repr(r, o, d->pairs[i].value);
        }
        ptst__j_puts(r, o, form == 3 ? ")" : "", v.mark);
    }
    ptst__j_puts(r, o, form == 0 ? "}" : "])", v.mark);
    ptst__j_puts(r, o, v.kind == PTST__J_NAMESPACE ? ">" : "", v.mark);
    d->printing = false;
}

static const ptst__jstring *ptst__j_macro_name(const struct ptst__jmacro *m);
static void ptst__j_put_loop(ptst__jrun *r, ptst__jsink *o, struct ptst__jloop *l);

static void ptst__j_put_range(ptst__jrun *r, ptst__jsink *o, ptst__jvalue v) {
    const ptst__jrange *g = v.as.range;
    ptst__j_puts(r, o, "range(", v.mark);
    ptst__j_put_int(r, o, g->start, v.mark);
    ptst__j_puts(r, o, ", ", v.mark);
    ptst__j_put_int(r, o, g->stop, v.mark);
    if (g->step != 1) {
        ptst__j_puts(r, o, ", ", v.mark);
        ptst__j_put_int(r, o, g->step, v.mark);
    }
    ptst__j_puts(r, o, ")", v.mark);
}

/* What Python gives no stable text for (it would print an address): refused. */
static void ptst__j_put_object(ptst__jrun *r, ptst__jsink *o, ptst__jvalue v) {
    if (v.kind == PTST__J_MACRO) {
        const ptst__jstring *name = ptst__j_macro_name(v.as.macro);
        ptst__j_puts(r, o, name == NULL ? "<Macro anonymous" : "<Macro '", v.mark);
        if (name != NULL) {
            ptst__j_put(r, o, name->bytes, name->size, NULL, v.mark);
        }
        ptst__j_puts(r, o, name == NULL ? ">" : "'>", v.mark);
    } else if (v.kind == PTST__J_LOOP) {
        ptst__j_put_loop(r, o, v.as.loop);
    } else {
        ptst__j_fail(r, PTST_ERR_UNSUPPORTED, "printing a %s%s", ptst__j_type(v),
                     v.kind == PTST__J_ITERATOR ? "; make it a list first (| list)" : "");
    }
}

/* repr() */
static void ptst__j_put_repr(ptst__jrun *r, ptst__jsink *o, ptst__jvalue v) {
    char number[40];
    if (!ptst__j_pay(r, 1)) {
        return;
    }
    if (++r->depth > r->depth_max) {
        ptst__j_fail(r, PTST_ERR_LIMIT, "values are nested too deeply");
    }
    switch ((ptst__jkind)v.kind) {
    case PTST__J_UNDEFINED:
        ptst__j_puts(r, o, "Undefined", v.mark);
        break;
    case PTST__J_NONE:
        ptst__j_puts(r, o, "None", v.mark);
        break;
    case PTST__J_BOOL:
        ptst__j_puts(r, o, v.as.integer != 0 ? "True" : "False", v.mark);
        break;
    case PTST__J_INT:
        ptst__j_put_int(r, o, v.as.integer, v.mark);
        break;
    case PTST__J_FLOAT:
        ptst__j_put(r, o, number, ptst__j_float_text(number, v.as.number), NULL, v.mark);
        break;
    case PTST__J_STRING:
        ptst__j_puts(r, o, v.flag != 0 ? "Markup(" : "", v.mark);
        ptst__j_put_quoted(r, o, v);
        ptst__j_puts(r, o, v.flag != 0 ? ")" : "", v.mark);
        break;
    case PTST__J_LIST:
    case PTST__J_TUPLE:
        ptst__j_put_items(r, o, v);
        break;
    case PTST__J_DICT:
    case PTST__J_KEYS:
    case PTST__J_VALUES:
    case PTST__J_ITEMS:
    case PTST__J_NAMESPACE:
        ptst__j_put_members(r, o, v);
        break;
    case PTST__J_RANGE:
        ptst__j_put_range(r, o, v);
        break;
    default:
        ptst__j_put_object(r, o, v);
    }
    r->depth--;
}

/* str() */
static void ptst__j_put_value(ptst__jrun *r, ptst__jsink *o, ptst__jvalue v) {
    if (v.kind == PTST__J_STRING) {
        ptst__j_put_string(r, o, v);
    } else if (v.kind != PTST__J_UNDEFINED) {
        ptst__j_put_repr(r, o, v);
    }
}

/* str() as a value; a string stays what it is (Markup too). */
static ptst__jvalue ptst__j_str(ptst__jrun *r, ptst__jvalue v) {
    ptst__jsink o = {NULL, NULL, 0, 0};
    if (v.kind == PTST__J_STRING) {
        return v;
    }
    ptst__j_put_value(r, &o, v);
    return ptst__j_sink_string(r, &o);
}

/* ---- JSON, as json.dumps writes it ---- */

typedef struct ptst__jdump {
    ptst__jsink *o;
    ptst__jvalue indent;             /* a string, or MISSING: all on one line */
    ptst__jvalue between, after_key; /* separators */
    bool ascii, sort;
} ptst__jdump;

static void ptst__j_dump_string(ptst__jrun *r, const ptst__jdump *d, ptst__jvalue v) {
    static const char known[] = "\"\\\n\r\t\b\f", letter[] = "\"\\nrtbf";
    const ptst__jstring *s = v.as.string;
    char escape[16];
    size_t i, n, plain = 0;
    ptst__j_puts(r, d->o, "\"", v.mark);
    for (i = 0; i < s->size && r->code == PTST_OK; i += n) {
        uint32_t point = ptst__j_point(s, i, &n);
        const char *k = point == 0 || point >= 0x80 ? NULL : strchr(known, (int)point);
        if (k == NULL && point >= 0x20 && (point < 0x7F || !d->ascii)) {
            continue;
        }
        ptst__j_put_sub(r, d->o, v, plain, i);
        plain = i + n;
        if (k != NULL) {
            snprintf(escape, sizeof escape, "\\%c", letter[k - known]);
        } else if (point < 0x10000) {
            snprintf(escape, sizeof escape, "\\u%04x", (unsigned)point);
        } else {
            snprintf(escape, sizeof escape, "\\u%04x\\u%04x",
                     (unsigned)(0xD800 + ((point - 0x10000) >> 10)),
                     (unsigned)(0xDC00 + ((point - 0x10000) & 0x3FF)));
        }
        ptst__j_puts(r, d->o, escape, v.mark);
    }
    ptst__j_put_sub(r, d->o, v, plain, s->size);
    ptst__j_puts(r, d->o, "\"", v.mark);
}

static void ptst__j_dump_line(ptst__jrun *r, const ptst__jdump *d, size_t level, uint8_t mark) {
    if (d->indent.kind != PTST__J_MISSING) {
        ptst__j_puts(r, d->o, "\n", mark);
        while (level-- > 0 && r->code == PTST_OK) {
            ptst__j_put(r, d->o, d->indent.as.string->bytes, d->indent.as.string->size, NULL, mark);
        }
    }
}

static void ptst__j_dump_scalar(ptst__jrun *r, const ptst__jdump *d, ptst__jvalue v) {
    char number[40];
    switch ((ptst__jkind)v.kind) {
    case PTST__J_NONE:
        ptst__j_puts(r, d->o, "null", v.mark);
        break;
    case PTST__J_BOOL:
        ptst__j_puts(r, d->o, v.as.integer != 0 ? "true" : "false", v.mark);
        break;
    case PTST__J_INT:
        ptst__j_put_int(r, d->o, v.as.integer, v.mark);
        break;
    case PTST__J_FLOAT:
        if (v.as.number - v.as.number == 0) {
            ptst__j_put(r, d->o, number, ptst__j_float_text(number, v.as.number), NULL, v.mark);
        } else {
            ptst__j_puts(r, d->o,
                         v.as.number != v.as.number ? "NaN"
                         : v.as.number > 0          ? "Infinity"
                                                    : "-Infinity",
                         v.mark);
        }
        break;
    case PTST__J_STRING:
        ptst__j_dump_string(r, d, v);
        break;
    default:
        ptst__j_fail(r, PTST_ERR_FORMAT, "Object of type %s is not JSON serializable",
                     ptst__j_type(v));
    }
}

static ptst__jvalue ptst__j_sorted(ptst__jrun *r, ptst__jvalue keys, ptst__jvalue values,
                                   bool reverse);

/* The pairs of a dict in the order in which they are written. */
static const ptst__jpair *ptst__j_dump_order(ptst__jrun *r, const ptst__jdump *d,
                                             const ptst__jdict *from) {
    ptst__jvalue keys, order;
    ptst__jpair *pairs;
    size_t i;
    if (!d->sort || from->count < 2) {
        return from->pairs;
    }
    keys = ptst__j_list(r, PTST__J_LIST, NULL, 0);
    order = ptst__j_list(r, PTST__J_LIST, NULL, 0);
    for (i = 0; i < from->count; i++) {
        ptst__j_push(r, keys, from->pairs[i].key);
        ptst__j_push(r, order, ptst__j_int((int64_t)i, 0));
    }
    order = ptst__j_sorted(r, keys, order, false);
    pairs = (ptst__jpair *)ptst__j_alloc(r, from->count, sizeof *pairs);
    for (i = 0; i < from->count && pairs != NULL && r->code == PTST_OK; i++) {
        pairs[i] = from->pairs[order.as.list->items[i].as.integer];
    }
    return r->code == PTST_OK ? pairs : from->pairs;
}

static void ptst__j_dump(ptst__jrun *r, const ptst__jdump *d, ptst__jvalue v, size_t level) {
    bool dict = v.kind == PTST__J_DICT;
    size_t i, count;
    const ptst__jpair *pairs;
    if (!ptst__j_pay(r, 1)) {
        return;
    }
    if (!dict && v.kind != PTST__J_LIST && v.kind != PTST__J_TUPLE) {
        ptst__j_dump_scalar(r, d, v);
        return;
    }
    if (++r->depth > r->depth_max) {
        ptst__j_fail(r, PTST_ERR_LIMIT, "values are nested too deeply");
    }
    count = dict ? v.as.dict->count : v.as.list->count;
    pairs = dict ? ptst__j_dump_order(r, d, v.as.dict) : NULL;
    ptst__j_puts(r, d->o, dict ? "{" : "[", v.mark);
    for (i = 0; i < count && r->code == PTST_OK; i++) {
        if (i != 0) {
            ptst__j_put(r, d->o, d->between.as.string->bytes, d->between.as.string->size, NULL,
                        v.mark);
        }
        ptst__j_dump_line(r, d, level + 1, v.mark);
        if (dict && pairs[i].key.kind == PTST__J_STRING) {
            ptst__j_dump_string(r, d, pairs[i].key);
        } else if (dict) {
            bool allowed = ptst__j_is_number(pairs[i].key) || pairs[i].key.kind == PTST__J_NONE;
            ptst__j_puts(r, d->o, "\"", v.mark);
            if (!allowed) {
                ptst__j_fail(r, PTST_ERR_FORMAT,
                             "keys must be str, int, float, bool or None, not %s",
                             ptst__j_type(pairs[i].key));
            }
            ptst__j_dump_scalar(r, d, pairs[i].key);
            ptst__j_puts(r, d->o, "\"", v.mark);
        }
        if (dict) {
            ptst__j_put(r, d->o, d->after_key.as.string->bytes, d->after_key.as.string->size, NULL,
                        v.mark);
        }
        ptst__j_dump(r, d, dict ? pairs[i].value : v.as.list->items[i], level + 1);
    }
    if (count != 0) {
        ptst__j_dump_line(r, d, level, v.mark);
    }
    ptst__j_puts(r, d->o, dict ? "}" : "]", v.mark);
    r->depth--;
}

/* ---- arithmetic and order ---- */

static ptst__jvalue ptst__j_fail_operands(ptst__jrun *r, const char *op, ptst__jvalue a,
                                          ptst__jvalue b) {
    if (a.kind == PTST__J_UNDEFINED || b.kind == PTST__J_UNDEFINED) {
        return ptst__j_fail_undefined(r, a.kind == PTST__J_UNDEFINED ? a : b);
    }
    return ptst__j_fail(r, PTST_ERR_FORMAT, "unsupported operand type(s) for %s: '%s' and '%s'", op,
                        ptst__j_type(a), ptst__j_type(b));
}

static ptst__jvalue ptst__j_fail_big(ptst__jrun *r) {
    return ptst__j_fail(r, PTST_ERR_LIMIT, "an integer beyond 64 bits");
}

static bool ptst__j_mul64(int64_t a, int64_t b, int64_t *out) {
    if (a != 0 && b != 0 &&
        ((a > 0) == (b > 0) ? (a > 0 ? a > INT64_MAX / b : a < INT64_MAX / b)
                            : (a > 0 ? b < INT64_MIN / a : a < INT64_MIN / b))) {
        return false;
    }
    *out = a * b;
    return true;
}

static bool ptst__j_add64(int64_t a, int64_t b, int64_t *out) {
    if (b > 0 ? a > INT64_MAX - b : a < INT64_MIN - b) {
        return false;
    }
    *out = a + b;
    return true;
}

/* Python's // and % round down. */
static ptst__jvalue ptst__j_floor(ptst__jrun *r, bool remainder, ptst__jvalue a, ptst__jvalue b,
                                  uint8_t mark) {
    int64_t x = a.as.integer, y = b.as.integer, q, m;
    double f, g, h;
    if (ptst__j_double(b) == 0) {
        return ptst__j_fail(r, PTST_ERR_FORMAT, "division by zero");
    }
    if (ptst__j_is_int(a) && ptst__j_is_int(b)) {
        if (y == -1) {
            return remainder        ? ptst__j_int(0, mark)
                   : x == INT64_MIN ? ptst__j_fail_big(r)
                                    : ptst__j_int(-x, mark);
        }
        q = x / y;
        m = x % y;
        if (m != 0 && (m < 0) != (y < 0)) {
            q--;
            m += y;
        }
        return ptst__j_int(remainder ? m : q, mark);
    }
    f = ptst__j_double(a); /* float_divmod of CPython */
    g = ptst__j_double(b);
    h = fmod(f, g);
    f = (f - h) / g;
    if (h != 0 && (g < 0) != (h < 0)) {
        h += g;
        f -= 1;
    }
    h = h == 0 ? copysign(0.0, g) : h;
    if (f != 0) {
        f = f - floor(f) > 0.5 ? floor(f) + 1 : floor(f);
    } else {
        f = copysign(0.0, ptst__j_double(a) / g);
    }
    return ptst__j_float(remainder ? h : f, mark);
}

static ptst__jvalue ptst__j_power(ptst__jrun *r, ptst__jvalue a, ptst__jvalue b, uint8_t mark) {
    int64_t base = a.as.integer, n = b.as.integer, out = 1;
    double f;
    if (ptst__j_is_int(a) && ptst__j_is_int(b) && n >= 0) {
        if (base == 0 || base == 1 || base == -1) {
            return ptst__j_int(n == 0 || base == 1 || (base == -1 && n % 2 == 0) ? 1 : base, mark);
        }
        while (n-- > 0) { /* at most 63 rounds before it overflows */
            if (!ptst__j_mul64(out, base, &out)) {
                return ptst__j_fail_big(r);
            }
        }
        return ptst__j_int(out, mark);
    }
    if (ptst__j_double(a) == 0 && ptst__j_double(b) < 0) {
        return ptst__j_fail(r, PTST_ERR_FORMAT, "0.0 cannot be raised to a negative power");
    }
    f = pow(ptst__j_double(a), ptst__j_double(b));
    if (f != f && ptst__j_double(a) == ptst__j_double(a) &&
        ptst__j_double(b) == ptst__j_double(b)) {
        return ptst__j_fail(r, PTST_ERR_UNSUPPORTED, "complex numbers");
    }
    if (!(f - f == 0) && ptst__j_double(a) - ptst__j_double(a) == 0 &&
        ptst__j_double(b) - ptst__j_double(b) == 0) {
        return ptst__j_fail(r, PTST_ERR_FORMAT, "numerical result out of range");
    }
    return ptst__j_float(f, mark);
}

/* a op b for two numbers. */
static ptst__jvalue ptst__j_number_op(ptst__jrun *r, char op, ptst__jvalue a, ptst__jvalue b) {
    bool whole = ptst__j_is_int(a) && ptst__j_is_int(b), fits = true;
    uint8_t mark = a.mark > b.mark ? a.mark : b.mark;
    int64_t x = a.as.integer, y = b.as.integer, z = 0;
    double f, g;
    if (op == 'f' || op == '%') {
        return ptst__j_floor(r, op == '%', a, b, mark);
    }
    if (op == 'p') {
        return ptst__j_power(r, a, b, mark);
    }
    f = ptst__j_double(a);
    g = ptst__j_double(b);
    if (op == '/') {
        return g == 0 ? ptst__j_fail(r, PTST_ERR_FORMAT, "division by zero")
                      : ptst__j_float(f / g, mark);
    }
    if (!whole) {
        return ptst__j_float(op == '+' ? f + g : op == '-' ? f - g : f * g, mark);
    }
    if (op == '*') {
        fits = ptst__j_mul64(x, y, &z);
    } else if (op == '-' && y == INT64_MIN) {
        fits = x < 0;
        z = fits ? x - y : 0;
    } else {
        fits = ptst__j_add64(x, op == '-' ? -y : y, &z);
    }
    return fits ? ptst__j_int(z, mark) : ptst__j_fail_big(r);
}

/* A string or list n times. */
static ptst__jvalue ptst__j_repeat(ptst__jrun *r, ptst__jvalue v, int64_t n) {
    ptst__jsink o = {NULL, NULL, 0, 0};
    ptst__jvalue out;
    size_t size = v.kind == PTST__J_STRING ? v.as.string->size : v.as.list->count;
    size_t limit = v.kind == PTST__J_STRING ? r->output_max : r->memory_max / sizeof v;
    if (n > 0 && size != 0 && (uint64_t)n > limit / size) {
        return ptst__j_fail(r, PTST_ERR_LIMIT, "the limit on memory is reached");
    }
    if (v.kind == PTST__J_STRING) {
        ptst__j_sink_room(r, &o, n > 0 ? size * (size_t)n : 0);
        for (; n > 0 && size != 0 && ptst__j_pay(r, 1); n--) {
            ptst__j_put_string(r, &o, v);
        }
        out = ptst__j_sink_string(r, &o);
        out.flag = v.flag;
        return out;
    }
    out = ptst__j_list(r, (ptst__jkind)v.kind, NULL, 0);
    for (; n > 0 && size != 0 && r->code == PTST_OK; n--) {
        size_t i;
        ptst__j_pay(r, 1 + size / 4);
        for (i = 0; i < size; i++) {
            ptst__j_push(r, out, v.as.list->items[i]);
        }
    }
    out.mark = v.mark;
    return out;
}

/* &, <, >, ", ' as HTML; the result is Markup. */
static ptst__jvalue ptst__j_escape(ptst__jrun *r, ptst__jvalue v) {
    ptst__jsink o = {NULL, NULL, 0, 0};
    const ptst__jstring *s;
    size_t i, plain = 0;
    if (v.kind == PTST__J_STRING && v.flag != 0) {
        return v;
    }
    v = ptst__j_str(r, v);
    s = v.as.string;
    for (i = 0; i < s->size && r->code == PTST_OK; i++) {
        const char *e = s->bytes[i] == '&'    ? "&amp;"
                        : s->bytes[i] == '<'  ? "&lt;"
                        : s->bytes[i] == '>'  ? "&gt;"
                        : s->bytes[i] == '"'  ? "&#34;"
                        : s->bytes[i] == '\'' ? "&#39;"
                                              : NULL;
        if (e != NULL) {
            ptst__j_put_sub(r, &o, v, plain, i);
            ptst__j_puts(r, &o, e, s->marks == NULL ? v.mark : s->marks[i]);
            plain = i + 1;
        }
    }
    if (plain != 0) {
        ptst__j_put_sub(r, &o, v, plain, s->size);
        v = ptst__j_sink_string(r, &o);
    }
    v.flag = 1;
    return v;
}

static ptst__jvalue ptst__j_percent(ptst__jrun *r, ptst__jvalue format, ptst__jvalue values);

/* a op b; op is + - * / % f (//) p (**). */
static ptst__jvalue ptst__j_binary(ptst__jrun *r, char op, ptst__jvalue a, ptst__jvalue b) {
    char name[3] = {op, 0, 0};
    if (r->code != PTST_OK) {
        return ptst__j_none();
    }
    if (ptst__j_is_number(a) && ptst__j_is_number(b)) {
        return ptst__j_number_op(r, op, a, b);
    }
    if (op == '+' && a.kind == PTST__J_STRING && b.kind == PTST__J_STRING) {
        if (a.flag != b.flag) { /* Markup + text escapes the text */
            ptst__jvalue out = a.flag != 0 ? ptst__j_concat(r, a, ptst__j_escape(r, b))
                                           : ptst__j_concat(r, ptst__j_escape(r, a), b);
            out.flag = 1;
            return out;
        }
        return ptst__j_concat(r, a, b);
    }
    if (op == '+' && a.kind == b.kind && (a.kind == PTST__J_LIST || a.kind == PTST__J_TUPLE)) {
        return ptst__j_list_concat(r, a, b);
    }
    if (op == '*' && ptst__j_is_int(b) && a.kind >= PTST__J_STRING && a.kind <= PTST__J_TUPLE) {
        return ptst__j_repeat(r, a, b.as.integer);
    }
    if (op == '*' && ptst__j_is_int(a) && b.kind >= PTST__J_STRING && b.kind <= PTST__J_TUPLE) {
        return ptst__j_repeat(r, b, a.as.integer);
    }
    if (op == '%' && a.kind == PTST__J_STRING && b.kind != PTST__J_UNDEFINED) {
        return ptst__j_percent(r, a, b);
    }
    if (op == 'f' || op == 'p') {
        memcpy(name, op == 'f' ? "//" : "**", 3);
    }
    return ptst__j_fail_operands(r, name, a, b);
}

/* -1, 0, 1; for lists and tuples element by element; 2 if one is NaN. Fails for values without
   order. UTF-8 sorts like its code points. */
static int ptst__j_compare(ptst__jrun *r, ptst__jvalue a, ptst__jvalue b) {
    size_t i, n;
    int c;
    if (!ptst__j_pay(r, 1)) {
        return 0;
    }
    if (ptst__j_is_int(a) && ptst__j_is_int(b)) {
        return a.as.integer < b.as.integer ? -1 : a.as.integer > b.as.integer;
    }
    if (ptst__j_is_number(a) && ptst__j_is_number(b)) {
        double x = ptst__j_double(a), y = ptst__j_double(b);
        return x < y ? -1 : x > y ? 1 : x == y ? 0 : 2;
    }
    if (a.kind == PTST__J_STRING && b.kind == PTST__J_STRING) {
        const ptst__jstring *x = a.as.string, *y = b.as.string;
        n = x->size < y->size ? x->size : y->size;
        ptst__j_pay(r, n / PTST__J_WORK);
        c = n == 0 ? 0 : memcmp(x->bytes, y->bytes, n);
        return c != 0 ? (c < 0 ? -1 : 1) : x->size < y->size ? -1 : x->size > y->size;
    }
    if (a.kind == b.kind && (a.kind == PTST__J_LIST || a.kind == PTST__J_TUPLE)) {
        const ptst__jlist *x = a.as.list, *y = b.as.list;
        if (++r->depth > r->depth_max) {
            ptst__j_fail(r, PTST_ERR_LIMIT, "values are nested too deeply");
        }
        n = x->count < y->count ? x->count : y->count;
        for (i = 0; i < n && ptst__j_equal(r, x->items[i], y->items[i]); i++) {
        }
        c = i < n                 ? ptst__j_compare(r, x->items[i], y->items[i])
            : x->count < y->count ? -1
                                  : x->count > y->count;
        r->depth--;
        return c;
    }
    ptst__j_fail_operands(r, "<", a, b);
    return 0;
}

/* values in the order of their keys (two lists of the same length); stable merge sort. */
static ptst__jvalue ptst__j_sorted(ptst__jrun *r, ptst__jvalue keys, ptst__jvalue values,
                                   bool reverse) {
    size_t n = r->code == PTST_OK ? keys.as.list->count : 0, width, lo, i, j, k, *from, *to, *swap;
    ptst__jvalue out = ptst__j_list(r, PTST__J_LIST, NULL, 0);
    const ptst__jvalue *key;
    from = (size_t *)ptst__j_alloc(r, n, sizeof *from);
    to = (size_t *)ptst__j_alloc(r, n, sizeof *to);
    if (r->code != PTST_OK) {
        return out;
    }
    key = keys.as.list->items;
    for (i = 0; i < n; i++) {
        from[i] = i;
    }
    for (width = 1; width < n && r->code == PTST_OK; width *= 2) {
        for (lo = 0; lo < n; lo += 2 * width) {
            size_t mid = lo + width < n ? lo + width : n, hi = mid + width < n ? mid + width : n;
            for (i = lo, j = mid, k = lo; k < hi; k++) {
                bool right = i == mid;
                if (i < mid && j < hi && r->code == PTST_OK) {
                    right = reverse ? ptst__j_compare(r, key[from[i]], key[from[j]]) == -1
                                    : ptst__j_compare(r, key[from[j]], key[from[i]]) == -1;
                }
                to[k] = right ? from[j++] : from[i++];
            }
        }
        swap = from;
        from = to;
        to = swap;
    }
    for (i = 0; i < n; i++) {
        ptst__j_push(r, out, values.as.list->items[from[i]]);
    }
    return out;
}

/* ---- formatting: text % values, text.format(...) ---- */

/* [[fill]align][sign][#][0][width][,][.precision][type], or the flags of %. */
typedef struct ptst__jspec {
    uint32_t fill;
    char align, sign, group, type; /* 0 = not given */
    bool alternate, zero;
    size_t width;
    int precision; /* -1 = not given */
} ptst__jspec;

enum { PTST__J_PRECISION = 400, PTST__J_NUMBER = 1024 };

/* Writes a text of `size` bytes and `points` code points, padded to the width. A number (sign and
   base prefix are its first `head` bytes) gets its zeros after them. */
static void ptst__j_pad(ptst__jrun *r, ptst__jsink *o, const ptst__jspec *p, ptst__jvalue text,
                        size_t head, char align) {
    size_t points = text.as.string->points, left, right;
    size_t room = p->width > points ? p->width - points : 0;
    uint32_t fill = p->fill == 0 ? ' ' : p->fill;
    if (room > r->output_max) {
        ptst__j_fail(r, PTST_ERR_LIMIT, "the limit on the size of the output is reached");
        return;
    }
    left = align == '>' || align == '=' ? room : align == '^' ? room / 2 : 0;
    right = room - left;
    if (align == '=') {
        ptst__j_put_sub(r, o, text, 0, head);
    }
    ptst__j_put_points(r, o, fill, left, text.mark);
    ptst__j_put_sub(r, o, text, align == '=' ? head : 0, text.as.string->size);
    ptst__j_put_points(r, o, fill, right, text.mark);
}

/* Digits of a number in base 2, 8, 10, 16 at the end of a buffer of 72; returns where they start. */
static char *ptst__j_digits(char *buffer, uint64_t n, unsigned base, bool upper) {
    char *p = buffer + 71;
    *p = 0;
    do {
        *--p = (upper ? "0123456789ABCDEF" : "0123456789abcdef")[n % base];
        n /= base;
    } while (n != 0);
    return p;
}

/* Copies a number with , or _ between groups of three digits of its whole part. */
static void ptst__j_group(char *to, const char *from, char group) {
    size_t whole = strspn(from, "0123456789"), i;
    for (i = 0; from[i] != 0; i++) {
        *to++ = from[i];
        if (group != 0 && i + 1 < whole && (whole - i - 1) % 3 == 0) {
            *to++ = group;
        }
    }
    *to = 0;
}

/* Text of |f| in `to` (PTST__J_NUMBER bytes). */
static void ptst__j_float_body(char *to, double f, const ptst__jspec *p) {
    char format[8] = "%.*f", number[PTST__J_NUMBER / 2];
    char type = p->type == 0 || p->type == 'n' ? 'g' : p->type;
    bool percent = type == '%';
    size_t i;
    if (!(f - f == 0)) {
        memcpy(to, f != f ? "nan" : "inf", 4);
    } else if (p->type == 0 && p->precision < 0) {
        ptst__j_float_text(number, f);
        ptst__j_group(to, number, p->group);
    } else {
        if (p->alternate) {
            memcpy(format, "%#.*f", 6);
        }
        format[strlen(format) - 1] = percent ? 'f' : type;
        snprintf(number, sizeof number, format, p->precision < 0 ? 6 : p->precision,
                 percent ? f * 100 : f);
        for (i = 0; number[i] != 0; i++) { /* the locale's decimal point */
            if (strchr("0123456789+-eEinfaINFA", number[i]) == NULL) {
                number[i] = '.';
            }
        }
        ptst__j_group(to, number, p->group);
        if (percent) {
            memcpy(to + strlen(to), "%", 2);
        }
    }
    for (i = 0; (type == 'E' || type == 'F' || type == 'G') && to[i] != 0; i++) {
        to[i] = to[i] >= 'a' && to[i] <= 'z' ? (char)(to[i] - 32) : to[i];
    }
}

/* Writes a number; type is one of d b o x X e E f F g G % or 0. */
static void ptst__j_put_number(ptst__jrun *r, ptst__jsink *o, const ptst__jspec *p,
                               ptst__jvalue v) {
    char text[PTST__J_NUMBER], digits[72], *d;
    size_t n = 0, head;
    bool whole = ptst__j_is_int(v) && (p->type == 0 || strchr("dboxXn", p->type) != NULL);
    bool negative = whole ? v.as.integer < 0 : signbit(ptst__j_double(v)) != 0;
    char align = p->align != 0 ? p->align : p->zero ? '=' : '>';
    ptst__jspec pad = *p;
    if (p->precision > PTST__J_PRECISION) {
        ptst__j_fail(r, PTST_ERR_LIMIT, "a precision of more than %d digits",
                     (int)PTST__J_PRECISION);
        return;
    }
    if (negative || (p->sign != 0 && p->sign != '-')) {
        text[n++] = negative ? '-' : p->sign;
    }
    if (whole) {
        unsigned base = p->type == 'b'                     ? 2
                        : p->type == 'o'                   ? 8
                        : p->type == 'x' || p->type == 'X' ? 16
                                                           : 10;
        if (p->alternate && base != 10) {
            text[n++] = '0';
            text[n++] = p->type;
        }
        d = ptst__j_digits(digits, negative ? 0 - (uint64_t)v.as.integer : (uint64_t)v.as.integer,
                           base, p->type == 'X');
        head = n;
        while (p->precision > 0 && strlen(d) + (n - head) < (size_t)p->precision) {
            text[n++] = '0';
        }
        ptst__j_group(text + n, d, p->group);
    } else {
        head = n;
        ptst__j_float_body(text + n, fabs(ptst__j_double(v)), p);
    }
    if (p->zero && p->fill == 0) {
        pad.fill = '0';
    }
    d = (char *)ptst__j_alloc(r, strlen(text) + 1, 1);
    if (d != NULL) {
        memcpy(d, text, strlen(text) + 1);
        ptst__j_pad(r, o, &pad, ptst__j_string(r, d, strlen(d), NULL, v.mark), head, align);
    }
}

/* Writes a string cut to the precision and padded to the width. */
static void ptst__j_put_padded(ptst__jrun *r, ptst__jsink *o, const ptst__jspec *p, ptst__jvalue v,
                               char align) {
    if (p->precision >= 0 && (size_t)p->precision < v.as.string->points) {
        v = ptst__j_sub(r, v, 0, ptst__j_offset(r, v.as.string, (size_t)p->precision));
    }
    ptst__j_pad(r, o, p, v, 0, align);
}

/* A number in s[*i..), at most 9 digits; -1 (and failure) if it is longer, 0 if there is none. */
static int ptst__j_read_width(ptst__jrun *r, const ptst__jstring *s, size_t *i) {
    int n = 0;
    for (; *i < s->size && s->bytes[*i] >= '0' && s->bytes[*i] <= '9'; (*i)++) {
        if (n > 99999999) {
            ptst__j_fail(r, PTST_ERR_LIMIT, "the limit on the size of the output is reached");
            return 0;
        }
        n = n * 10 + (s->bytes[*i] - '0');
    }
    return n;
}

/* The arguments of %: a tuple one after the other, or a single value. */
typedef struct ptst__jfill {
    ptst__jvalue values;
    size_t at;
} ptst__jfill;

static ptst__jvalue ptst__j_fill_next(ptst__jrun *r, ptst__jfill *f) {
    bool tuple = f->values.kind == PTST__J_TUPLE;
    if (tuple ? f->at >= f->values.as.list->count : f->at != 0) {
        return ptst__j_fail(r, PTST_ERR_FORMAT, "not enough arguments for format string");
    }
    f->at++;
    return tuple ? f->values.as.list->items[f->at - 1] : f->values;
}

/* Reads flags, width and precision of a % conversion at s[*i..). */
static void ptst__j_percent_spec(ptst__jrun *r, const ptst__jstring *s, size_t *i, ptst__jspec *p,
                                 ptst__jfill *fill) {
    ptst__jvalue star;
    int part;
    for (; *i < s->size && strchr("-+ #0", s->bytes[*i]) != NULL && s->bytes[*i] != 0; (*i)++) {
        p->align = s->bytes[*i] == '-' ? '<' : p->align;
        p->sign =
            s->bytes[*i] == '+' || (s->bytes[*i] == ' ' && p->sign == 0) ? s->bytes[*i] : p->sign;
        p->alternate = p->alternate || s->bytes[*i] == '#';
        p->zero = p->zero || s->bytes[*i] == '0';
    }
    for (part = 0; part < 2; part++) {
        int n;
        if (part == 1) {
            if (*i >= s->size || s->bytes[*i] != '.') {
                break;
            }
            (*i)++;
        }
        if (*i < s->size && s->bytes[*i] == '*') {
            (*i)++;
            star = ptst__j_fill_next(r, fill);
            n = ptst__j_is_int(star) && star.as.integer > -100000000 && star.as.integer < 100000000
                    ? (int)star.as.integer
                    : 0;
            if (r->code == PTST_OK && !ptst__j_is_int(star)) {
                ptst__j_fail(r, PTST_ERR_FORMAT, "* wants int");
            }
            if (n < 0) {
                p->align = part == 0 ? '<' : p->align;
                n = part == 0 ? -n : 0;
            }
        } else {
            n = ptst__j_read_width(r, s, i);
        }
        if (part == 0) {
            p->width = (size_t)n;
        } else {
            p->precision = n;
        }
    }
    for (; *i < s->size && strchr("hlL", s->bytes[*i]) != NULL && s->bytes[*i] != 0; (*i)++) {
    }
    p->zero = p->zero && p->align != '<';
}

/* Writes one value by its conversion letter. */
static void ptst__j_percent_put(ptst__jrun *r, ptst__jsink *o, ptst__jspec *p, char letter,
                                ptst__jvalue v, bool escape) {
    ptst__jsink text = {NULL, NULL, 0, 0};
    char align = p->align == 0 ? '>' : p->align;
    if (r->code != PTST_OK) {
        return;
    }
    p->type = letter == 'i' || letter == 'u' ? 'd' : letter;
    if (letter == 's' || letter == 'r' || letter == 'a') {
        if (letter == 's') {
            v = escape ? ptst__j_escape(r, v) : ptst__j_str(r, v);
        } else {
            ptst__j_put_repr(r, &text, v);
            v = ptst__j_sink_string(r, &text);
        }
        ptst__j_put_padded(r, o, p, v, align);
    } else if (letter == 'c' && v.kind == PTST__J_STRING && v.as.string->points == 1) {
        p->precision = -1;
        ptst__j_put_padded(r, o, p, v, align);
    } else if (letter == 'c' && ptst__j_is_int(v) && v.as.integer >= 0 && v.as.integer < 0x110000 &&
               (v.as.integer < 0xD800 || v.as.integer > 0xDFFF)) {
        ptst__j_put_point(r, &text, (uint32_t)v.as.integer, v.mark);
        p->precision = -1;
        ptst__j_put_padded(r, o, p, ptst__j_sink_string(r, &text), align);
    } else if (strchr("diu", letter) != NULL && v.kind == PTST__J_FLOAT) {
        if (!(fabs(v.as.number) < 9.2e18)) {
            ptst__j_fail_big(r);
            return;
        }
        ptst__j_put_number(r, o, p, ptst__j_int((int64_t)v.as.number, v.mark));
    } else if ((strchr("diuoxX", letter) != NULL && ptst__j_is_int(v)) ||
               (strchr("eEfFgG", letter) != NULL && ptst__j_is_number(v))) {
        ptst__j_put_number(r, o, p, v);
    } else if (strchr("diuoxXeEfFgGc", letter) != NULL) {
        ptst__j_fail(r, PTST_ERR_FORMAT, "%%%c format: a number is required, not %s", letter,
                     ptst__j_type(v));
    } else {
        ptst__j_fail(r, PTST_ERR_FORMAT, "unsupported format character '%c'",
                     letter >= ' ' && letter < 127 ? letter : '?');
    }
}

/* %(name)s: the member of the dict, with *i behind the parenthesis. */
static ptst__jvalue ptst__j_percent_key(ptst__jrun *r, ptst__jvalue format, size_t *i,
                                        ptst__jvalue values) {
    const ptst__jstring *s = format.as.string;
    size_t from = ++*i, depth = 1;
    const ptst__jpair *pair;
    for (; *i < s->size; (*i)++) {
        depth += s->bytes[*i] == '(';
        depth -= s->bytes[*i] == ')';
        if (depth == 0) {
            break;
        }
    }
    if (*i == s->size || values.kind != PTST__J_DICT) {
        return ptst__j_fail(r, PTST_ERR_FORMAT,
                            *i == s->size ? "incomplete format key" : "format requires a mapping");
    }
    pair = ptst__j_dict_find(r, values.as.dict, ptst__j_sub(r, format, from, (*i)++));
    return pair == NULL ? ptst__j_fail(r, PTST_ERR_FORMAT, "a key of the format is missing")
                        : pair->value;
}

/* format % values */
static ptst__jvalue ptst__j_percent(ptst__jrun *r, ptst__jvalue format, ptst__jvalue values) {
    const ptst__jstring *s = format.as.string;
    ptst__jsink o = {NULL, NULL, 0, 0};
    ptst__jfill fill;
    ptst__jvalue v;
    size_t i = 0, plain = 0;
    bool mapping =
        values.kind == PTST__J_DICT || values.kind == PTST__J_LIST || values.kind == PTST__J_RANGE;
    fill.values = values;
    fill.at = 0;
    while (i < s->size && r->code == PTST_OK) {
        ptst__jspec p = {0, 0, 0, 0, 0, false, false, 0, -1};
        bool key;
        if (s->bytes[i] != '%') {
            i++;
            continue;
        }
        ptst__j_put_sub(r, &o, format, plain, i++);
        key = i < s->size && s->bytes[i] == '(';
        v = key ? ptst__j_percent_key(r, format, &i, values) : ptst__j_none();
        ptst__j_percent_spec(r, s, &i, &p, &fill);
        if (i >= s->size) {
            ptst__j_fail(r, PTST_ERR_FORMAT, "incomplete format");
        } else if (s->bytes[i] == '%') {
            ptst__j_put_sub(r, &o, format, i, i + 1);
        } else {
            v = key ? v : ptst__j_fill_next(r, &fill);
            ptst__j_percent_put(r, &o, &p, s->bytes[i], v, format.flag != 0);
        }
        plain = ++i;
    }
    ptst__j_put_sub(r, &o, format, plain, s->size);
    if (!mapping &&
        (values.kind == PTST__J_TUPLE ? fill.at < values.as.list->count : fill.at == 0)) {
        return ptst__j_fail(r, PTST_ERR_FORMAT,
                            "not all arguments converted during string formatting");
    }
    v = ptst__j_sink_string(r, &o);
    v.flag = format.flag;
    return v;
}

/* Parses a format spec; false (and failure) if it is none. */
static bool ptst__j_read_spec(ptst__jrun *r, const ptst__jstring *s, ptst__jspec *p) {
    size_t i = 0, n = 0;
    uint32_t point = s->size == 0 ? 0 : ptst__j_point(s, 0, &n);
    memset(p, 0, sizeof *p);
    p->precision = -1;
    if (s->size > n && strchr("<>=^", s->bytes[n]) != NULL && s->bytes[n] != 0) {
        p->fill = point;
        p->align = s->bytes[n];
        i = n + 1;
    } else if (s->size != 0 && strchr("<>=^", s->bytes[0]) != NULL && s->bytes[0] != 0) {
        p->align = s->bytes[i++];
    }
    if (i < s->size && strchr("+- ", s->bytes[i]) != NULL && s->bytes[i] != 0) {
        p->sign = s->bytes[i++];
    }
    if (i < s->size && s->bytes[i] == '#') {
        p->alternate = true;
        i++;
    }
    if (i < s->size && s->bytes[i] == '0') {
        p->zero = true;
        i++;
    }
    p->width = (size_t)ptst__j_read_width(r, s, &i);
    if (i < s->size && (s->bytes[i] == ',' || s->bytes[i] == '_')) {
        p->group = s->bytes[i++];
    }
    if (i + 1 < s->size && s->bytes[i] == '.' && s->bytes[i + 1] >= '0' && s->bytes[i + 1] <= '9') {
        i++;
        p->precision = ptst__j_read_width(r, s, &i);
    }
    if (i < s->size) {
        p->type = s->bytes[i++];
    }
    if (i != s->size || p->type < 0) {
        ptst__j_fail(r, PTST_ERR_FORMAT, "invalid format specifier '%s'", ptst__j_show(s).text);
    }
    return r->code == PTST_OK;
}

/* format(value, spec) */
static void ptst__j_put_spec(ptst__jrun *r, ptst__jsink *o, ptst__jvalue v,
                             const ptst__jstring *spec) {
    ptst__jspec p;
    if (spec->size == 0) {
        ptst__j_put_value(r, o, v);
        return;
    }
    if (!ptst__j_read_spec(r, spec, &p)) {
        return;
    }
    if (v.kind == PTST__J_STRING && (p.type == 0 || p.type == 's') && p.sign == 0 &&
        p.align != '=' && p.group == 0 && !p.alternate) {
        p.fill = p.zero && p.fill == 0 ? '0' : p.fill;
        ptst__j_put_padded(r, o, &p, v, p.align == 0 ? '<' : p.align);
    } else if (ptst__j_is_int(v) && p.type == 'c') {
        ptst__j_percent_put(r, o, &p, 'c', v, false);
    } else if (ptst__j_is_int(v) && p.type != 0 && strchr("dboxXneEfFgG%", p.type) != NULL &&
               (p.precision < 0 || strchr("dboxXn", p.type) == NULL)) {
        ptst__j_put_number(r, o, &p, v);
    } else if (ptst__j_is_int(v) && p.type == 0 && p.precision < 0) {
        ptst__j_put_number(r, o, &p, v);
    } else if (v.kind == PTST__J_FLOAT && (p.type == 0 || strchr("eEfFgGn%", p.type) != NULL)) {
        ptst__j_put_number(r, o, &p, v);
    } else {
        ptst__j_fail(r, PTST_ERR_FORMAT, "format '%s' does not fit a value of type %s",
                     ptst__j_show(spec).text, ptst__j_type(v));
    }
}

static ptst__jvalue ptst__j_getattr(ptst__jrun *r, ptst__jvalue v, const ptst__jstring *name);
static ptst__jvalue ptst__j_getitem(ptst__jrun *r, ptst__jvalue v, ptst__jvalue key);

static bool ptst__j_all_digits(const ptst__jstring *s) {
    size_t i;
    for (i = 0; i < s->size && s->bytes[i] >= '0' && s->bytes[i] <= '9'; i++) {
    }
    return i == s->size && i != 0;
}

/* A decimal number as an int. */
static ptst__jvalue ptst__j_index_of(ptst__jrun *r, const ptst__jstring *s) {
    int64_t n = 0;
    size_t i;
    for (i = 0; i < s->size; i++) {
        if (!ptst__j_mul64(n, 10, &n) || !ptst__j_add64(n, s->bytes[i] - '0', &n)) {
            return ptst__j_fail_big(r);
        }
    }
    return ptst__j_int(n, 0);
}

/* The value of a field name: "", "0", "name", then .attribute and [item]. */
static ptst__jvalue ptst__j_field(ptst__jrun *r, ptst__jvalue name, const ptst__jargs *a,
                                  size_t *next) {
    const ptst__jstring *s = name.as.string;
    size_t i = 0, from, k;
    ptst__jvalue first, v = ptst__j_none(), part;
    bool found = false;
    while (i < s->size && s->bytes[i] != '.' && s->bytes[i] != '[') {
        i++;
    }
    first = ptst__j_sub(r, name, 0, i);
    if (i == 0 || ptst__j_all_digits(first.as.string)) {
        v = i == 0 ? ptst__j_int((int64_t)(*next)++, 0) : ptst__j_index_of(r, first.as.string);
        found = r->code == PTST_OK && (uint64_t)v.as.integer < a->count;
        v = found ? a->values[v.as.integer] : v;
    } else {
        for (k = 0; k < a->named_count && !found; k++) {
            found =
                a->named[k].name->size == i && memcmp(a->named[k].name->bytes, s->bytes, i) == 0;
            v = found ? a->named[k].value : v;
        }
    }
    if (!found) {
        return ptst__j_fail(r, PTST_ERR_FORMAT, "a field of the format has no value");
    }
    while (i < s->size && r->code == PTST_OK) {
        bool item = s->bytes[i] == '[';
        for (from = ++i;
             i < s->size && (item ? s->bytes[i] != ']' : s->bytes[i] != '.' && s->bytes[i] != '[');
             i++) {
        }
        part = ptst__j_sub(r, name, from, i);
        if (from == i || (item && i == s->size)) {
            return ptst__j_fail(r, PTST_ERR_FORMAT, "empty attribute in format string");
        }
        v = !item ? ptst__j_getattr(r, v, part.as.string)
                  : ptst__j_getitem(r, v,
                                    ptst__j_all_digits(part.as.string)
                                        ? ptst__j_index_of(r, part.as.string)
                                        : part);
        i += item;
    }
    return v;
}

/* Writes what stands between { and } (without them); specs may hold fields of their own. */
static void ptst__j_put_field(ptst__jrun *r, ptst__jsink *o, ptst__jvalue field,
                              const ptst__jargs *a, size_t *next) {
    const ptst__jstring *s = field.as.string;
    size_t i = 0, depth = 0, from;
    ptst__jsink spec = {NULL, NULL, 0, 0};
    ptst__jvalue v;
    char conversion = 0;
    for (; i < s->size && ((s->bytes[i] != ':' && s->bytes[i] != '!') || depth != 0); i++) {
        depth += s->bytes[i] == '[';
        depth -= s->bytes[i] == ']' && depth != 0;
    }
    v = ptst__j_field(r, ptst__j_sub(r, field, 0, i), a, next);
    if (i < s->size && s->bytes[i] == '!') {
        conversion = i + 1 < s->size ? s->bytes[i + 1] : 0;
        i += 2;
        if ((conversion != 's' && conversion != 'r') || (i < s->size && s->bytes[i] != ':')) {
            ptst__j_fail(r, PTST_ERR_FORMAT, "a conversion of the format is not !s or !r");
            return;
        }
    }
    for (from = i < s->size ? i + 1 : s->size; from < s->size && r->code == PTST_OK;) {
        size_t open = from, close;
        for (; open < s->size && s->bytes[open] != '{'; open++) {
        }
        ptst__j_put_sub(r, &spec, field, from, open);
        for (close = open; close < s->size && s->bytes[close] != '}'; close++) {
        }
        if (open < s->size) {
            ptst__j_put_value(r, &spec,
                              ptst__j_field(r, ptst__j_sub(r, field, open + 1, close), a, next));
        }
        from = close < s->size ? close + 1 : s->size;
    }
    if (conversion != 0) {
        ptst__jsink text = {NULL, NULL, 0, 0};
        if (conversion == 'r') {
            ptst__j_put_repr(r, &text, v);
            v = ptst__j_sink_string(r, &text);
        } else {
            v = ptst__j_str(r, v);
        }
    }
    if (r->code == PTST_OK) {
        ptst__j_put_spec(r, o, v, ptst__j_sink_string(r, &spec).as.string);
    }
}

/* self.format(...) */
static ptst__jvalue ptst__j_m_format(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                     const ptst__jargs *a) {
    const ptst__jstring *s = self.as.string;
    ptst__jsink o = {NULL, NULL, 0, 0};
    size_t i, plain = 0, next = 0, depth, from;
    (void)p;
    for (i = 0; i < s->size && r->code == PTST_OK; i++) {
        char ch = s->bytes[i];
        if (ch != '{' && ch != '}') {
            continue;
        }
        ptst__j_put_sub(r, &o, self, plain, i);
        if (i + 1 < s->size && s->bytes[i + 1] == ch) {
            ptst__j_put_sub(r, &o, self, i, i + 1);
            plain = ++i + 1;
            continue;
        }
        for (from = ++i, depth = 1; i < s->size && depth != 0; i++) {
            depth += s->bytes[i] == '{';
            depth -= s->bytes[i] == '}';
        }
        if (ch == '}' || depth != 0) {
            return ptst__j_fail(r, PTST_ERR_FORMAT, "Single '%c' encountered in format string", ch);
        }
        ptst__j_put_field(r, &o, ptst__j_sub(r, self, from, --i), a, &next);
        plain = i + 1;
    }
    ptst__j_put_sub(r, &o, self, plain, s->size);
    self = ptst__j_sink_string(r, &o);
    return self;
}

/* ---- methods of strings ---- */

/* str.isspace() */
static bool ptst__j_space(uint32_t p) {
    return (p >= 9 && p <= 13) || (p >= 28 && p <= 32) || p == 0x85 || p == 0xA0 || p == 0x1680 ||
           (p >= 0x2000 && p <= 0x200A) || p == 0x2028 || p == 0x2029 || p == 0x202F ||
           p == 0x205F || p == 0x3000;
}

/* Line ends of str.splitlines(). */
static bool ptst__j_line_end(uint32_t p) {
    return (p >= 10 && p <= 13) || (p >= 28 && p <= 30) || p == 0x85 || p == 0x2028 || p == 0x2029;
}

/* The argument as a string; fails for anything else. */
static const ptst__jstring *ptst__j_need_string(ptst__jrun *r, ptst__jvalue v, const char *what) {
    if (v.kind != PTST__J_STRING) {
        ptst__j_fail(r, PTST_ERR_FORMAT, "%s must be a str, not %s", what, ptst__j_type(v));
        return NULL;
    }
    return r->code == PTST_OK ? v.as.string : NULL;
}

/* The argument as an int, or the fallback if it is missing or None. */
static int64_t ptst__j_need_int(ptst__jrun *r, ptst__jvalue v, int64_t fallback) {
    if (v.kind == PTST__J_MISSING || v.kind == PTST__J_NONE) {
        return fallback;
    }
    if (v.kind == PTST__J_UNDEFINED) {
        ptst__j_fail_undefined(r, v);
        return fallback;
    }
    if (!ptst__j_is_int(v)) {
        ptst__j_fail(r, PTST_ERR_FORMAT, "'%s' object cannot be interpreted as an integer",
                     ptst__j_type(v));
        return fallback;
    }
    return v.as.integer;
}

/* start:stop of a sequence of n elements as Python clips them. */
static void ptst__j_clip(ptst__jrun *r, size_t n, ptst__jvalue start, ptst__jvalue stop,
                         size_t *from, size_t *to) {
    int64_t count = (int64_t)n, a = ptst__j_need_int(r, start, 0),
            b = ptst__j_need_int(r, stop, count);
    a = a < 0 ? (a < -count ? 0 : a + count) : a > count ? count : a;
    b = b < 0 ? (b < -count ? 0 : b + count) : b > count ? count : b;
    *from = (size_t)a;
    *to = (size_t)b;
}

/* The same in bytes of a string. false if start lies behind stop or the end. */
static bool ptst__j_clip_bytes(ptst__jrun *r, const ptst__jstring *s, ptst__jvalue start,
                               ptst__jvalue stop, size_t *from, size_t *to) {
    int64_t a = ptst__j_need_int(r, start, 0);
    ptst__j_clip(r, s->points, start, stop, from, to);
    if (*from > *to || a > (int64_t)s->points) {
        return false;
    }
    *from = ptst__j_offset(r, s, *from);
    *to = ptst__j_offset(r, s, *to);
    return r->code == PTST_OK;
}

/* Does one of the characters of set equal the one at bytes[i..i+n)? set NULL: white space. */
static bool ptst__j_in_set(const ptst__jstring *set, const char *bytes, size_t n, uint32_t point) {
    size_t i;
    if (set == NULL) {
        return ptst__j_space(point);
    }
    for (i = 0; i + n <= set->size; i++) {
        if (memcmp(set->bytes + i, bytes, n) == 0) {
            return true;
        }
    }
    return false;
}

/* strip (sides 3), lstrip (1), rstrip (2) */
static ptst__jvalue ptst__j_strip(ptst__jrun *r, ptst__jvalue v, ptst__jvalue chars, int sides) {
    const ptst__jstring *s = v.as.string, *set = NULL;
    size_t from = 0, to = s->size, n, price;
    if (chars.kind != PTST__J_MISSING && chars.kind != PTST__J_NONE) {
        set = ptst__j_need_string(r, chars, "strip arg");
    }
    price = set == NULL ? 0 : set->size / PTST__J_WORK;
    while ((sides & 1) != 0 && from < to && ptst__j_pay(r, price)) {
        uint32_t point = ptst__j_point(s, from, &n);
        if (!ptst__j_in_set(set, s->bytes + from, n, point)) {
            break;
        }
        from += n;
    }
    while ((sides & 2) != 0 && from < to && ptst__j_pay(r, price)) {
        size_t last = to - 1;
        uint32_t point;
        while (((unsigned char)s->bytes[last] & 0xC0) == 0x80) {
            last--;
        }
        point = ptst__j_point(s, last, &n);
        if (!ptst__j_in_set(set, s->bytes + last, n, point)) {
            break;
        }
        to = last;
    }
    return from == 0 && to == s->size ? v : ptst__j_sub(r, v, from, to);
}

static ptst__jvalue ptst__j_m_strip(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                    const ptst__jargs *a) {
    (void)a;
    return ptst__j_strip(r, self, p[0], 3);
}

static ptst__jvalue ptst__j_m_lstrip(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                     const ptst__jargs *a) {
    (void)a;
    return ptst__j_strip(r, self, p[0], 1);
}

static ptst__jvalue ptst__j_m_rstrip(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                     const ptst__jargs *a) {
    (void)a;
    return ptst__j_strip(r, self, p[0], 2);
}

/* Parts of a string between white space, at most `max` cuts (-1 = all), from the left. */
static ptst__jvalue ptst__j_split_space(ptst__jrun *r, ptst__jvalue v, int64_t max) {
    const ptst__jstring *s = v.as.string;
    ptst__jvalue out = ptst__j_list(r, PTST__J_LIST, NULL, 0);
    size_t i = 0, from, n = 1;
    while (r->code == PTST_OK) {
        while (i < s->size && ptst__j_space(ptst__j_point(s, i, &n))) {
            i += n;
        }
        if (i >= s->size) {
            break;
        }
        from = i;
        if (max == 0) {
            ptst__j_push(r, out, ptst__j_sub(r, v, from, s->size));
            break;
        }
        while (i < s->size && !ptst__j_space(ptst__j_point(s, i, &n))) {
            i += n;
        }
        ptst__j_push(r, out, ptst__j_sub(r, v, from, i));
        ptst__j_pay(r, 1);
        max -= max > 0;
    }
    return out;
}

static void ptst__j_reverse_list(ptst__jlist *l) {
    size_t i;
    for (i = 0; i < l->count / 2; i++) {
        ptst__jvalue t = l->items[i];
        l->items[i] = l->items[l->count - 1 - i];
        l->items[l->count - 1 - i] = t;
    }
}

/* The same from the right. */
static ptst__jvalue ptst__j_rsplit_space(ptst__jrun *r, ptst__jvalue v, int64_t max) {
    ptst__jvalue words = ptst__j_split_space(r, v, -1), out, rest;
    const ptst__jlist *l = words.as.list;
    size_t keep, i;
    if (r->code != PTST_OK || max < 0 || (uint64_t)max >= l->count) {
        return words;
    }
    keep = l->count - (size_t)max - 1; /* the first words stay one piece */
    out = ptst__j_list(r, PTST__J_LIST, NULL, 0);
    rest = v;
    for (i = l->count; i > keep + 1; i--) {
        rest = ptst__j_strip(r, rest, ptst__j_make(PTST__J_MISSING, 0), 2);
        rest = ptst__j_sub(r, rest, 0, rest.as.string->size - l->items[i - 1].as.string->size);
    }
    ptst__j_push(r, out, ptst__j_strip(r, rest, ptst__j_make(PTST__J_MISSING, 0), 2));
    for (i = keep + 1; i < l->count; i++) {
        ptst__j_push(r, out, l->items[i]);
    }
    return out;
}

static ptst__jvalue ptst__j_m_split(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                    const ptst__jargs *a) {
    const ptst__jstring *s = self.as.string, *separator;
    int64_t max = ptst__j_need_int(r, p[1], -1);
    ptst__jvalue out;
    size_t from = 0, at;
    (void)a;
    if (p[0].kind == PTST__J_MISSING || p[0].kind == PTST__J_NONE) {
        return ptst__j_split_space(r, self, max);
    }
    separator = ptst__j_need_string(r, p[0], "the separator");
    if (separator == NULL || separator->size == 0) {
        return ptst__j_fail(r, PTST_ERR_FORMAT, "empty separator");
    }
    out = ptst__j_list(r, PTST__J_LIST, NULL, 0);
    for (; max != 0 && r->code == PTST_OK; max--) {
        at = ptst__j_find(r, s, separator, from, s->size);
        if (at == SIZE_MAX) {
            break;
        }
        ptst__j_push(r, out, ptst__j_sub(r, self, from, at));
        from = at + separator->size;
    }
    ptst__j_push(r, out, ptst__j_sub(r, self, from, s->size));
    return out;
}

static ptst__jvalue ptst__j_m_rsplit(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                     const ptst__jargs *a) {
    const ptst__jstring *s = self.as.string, *separator;
    int64_t max = ptst__j_need_int(r, p[1], -1);
    ptst__jvalue out;
    size_t to = s->size, at;
    (void)a;
    if (p[0].kind == PTST__J_MISSING || p[0].kind == PTST__J_NONE) {
        return ptst__j_rsplit_space(r, self, max);
    }
    separator = ptst__j_need_string(r, p[0], "the separator");
    if (separator == NULL || separator->size == 0) {
        return ptst__j_fail(r, PTST_ERR_FORMAT, "empty separator");
    }
    out = ptst__j_list(r, PTST__J_LIST, NULL, 0);
    for (; max != 0 && r->code == PTST_OK; max--) {
        at = ptst__j_rfind(r, s, separator, 0, to);
        if (at == SIZE_MAX) {
            break;
        }
        ptst__j_push(r, out, ptst__j_sub(r, self, at + separator->size, to));
        to = at;
    }
    ptst__j_push(r, out, ptst__j_sub(r, self, 0, to));
    if (r->code == PTST_OK) {
        ptst__j_reverse_list(out.as.list);
    }
    return out;
}

static ptst__jvalue ptst__j_lines(ptst__jrun *r, ptst__jvalue v, bool keep) {
    const ptst__jstring *s = v.as.string;
    ptst__jvalue out = ptst__j_list(r, PTST__J_LIST, NULL, 0);
    size_t i = 0, from = 0, n;
    while (i < s->size && r->code == PTST_OK) {
        uint32_t point = ptst__j_point(s, i, &n);
        if (ptst__j_line_end(point)) {
            size_t end = i;
            i += n;
            i += point == '\r' && i < s->size && s->bytes[i] == '\n';
            ptst__j_push(r, out, ptst__j_sub(r, v, from, keep ? i : end));
            ptst__j_pay(r, 1);
            from = i;
        } else {
            i += n;
        }
    }
    if (from < s->size) {
        ptst__j_push(r, out, ptst__j_sub(r, v, from, s->size));
    }
    return out;
}

static ptst__jvalue ptst__j_m_splitlines(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                         const ptst__jargs *a) {
    (void)a;
    return ptst__j_lines(r, self, p[0].kind != PTST__J_MISSING && ptst__j_true(r, p[0]));
}

/* self.replace(old, new, count) for strings; count < 0 = all */
static ptst__jvalue ptst__j_replace(ptst__jrun *r, ptst__jvalue v, ptst__jvalue old,
                                    ptst__jvalue new_text, int64_t count) {
    const ptst__jstring *s = v.as.string;
    ptst__jsink o = {NULL, NULL, 0, 0};
    ptst__jvalue out;
    size_t from = 0, at, n;
    bool found = false;
    for (; count != 0 && r->code == PTST_OK; count--) {
        at = ptst__j_find(r, s, old.as.string, from, s->size);
        if (at == SIZE_MAX) {
            break;
        }
        found = true;
        ptst__j_put_sub(r, &o, v, from, at);
        ptst__j_put_string(r, &o, new_text);
        from = at + old.as.string->size;
        if (old.as.string->size == 0) { /* between all characters */
            if (at == s->size) {
                break;
            }
            ptst__j_point(s, at, &n);
            ptst__j_put_sub(r, &o, v, at, at + n);
            from = at + n;
        }
    }
    if (!found) {
        return v;
    }
    ptst__j_put_sub(r, &o, v, from, s->size);
    out = ptst__j_sink_string(r, &o);
    out.flag = v.flag;
    return out;
}

static ptst__jvalue ptst__j_m_replace(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                      const ptst__jargs *a) {
    (void)a;
    if (ptst__j_need_string(r, p[0], "replace() argument 1") == NULL ||
        ptst__j_need_string(r, p[1], "replace() argument 2") == NULL) {
        return self;
    }
    return ptst__j_replace(r, self, p[0], self.flag != 0 ? ptst__j_escape(r, p[1]) : p[1],
                           ptst__j_need_int(r, p[2], -1));
}

/* startswith (end false) or endswith, for a string or a tuple of them */
static ptst__jvalue ptst__j_affix(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                  bool end) {
    ptst__jvalue one = p[0];
    const ptst__jstring *s = self.as.string, *x;
    size_t from, to, i, n = p[0].kind == PTST__J_TUPLE ? p[0].as.list->count : 1;
    bool in_range = ptst__j_clip_bytes(r, s, p[1], p[2], &from, &to), found = false;
    for (i = 0; i < n && !found && r->code == PTST_OK; i++) {
        one = p[0].kind == PTST__J_TUPLE ? p[0].as.list->items[i] : p[0];
        x = ptst__j_need_string(r, one, "the first argument");
        found = x != NULL && in_range && to - from >= x->size &&
                ptst__j_pay(r, x->size / PTST__J_WORK) &&
                memcmp(s->bytes + (end ? to - x->size : from), x->bytes, x->size) == 0;
    }
    return ptst__j_bool(found);
}

static ptst__jvalue ptst__j_m_startswith(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                         const ptst__jargs *a) {
    (void)a;
    return ptst__j_affix(r, self, p, false);
}

static ptst__jvalue ptst__j_m_endswith(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                       const ptst__jargs *a) {
    (void)a;
    return ptst__j_affix(r, self, p, true);
}

/* find, rfind: index in code points, or -1 */
static int64_t ptst__j_index(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p, bool last) {
    const ptst__jstring *s = self.as.string, *x = ptst__j_need_string(r, p[0], "the argument");
    size_t from, to, at;
    if (x == NULL || !ptst__j_clip_bytes(r, s, p[1], p[2], &from, &to)) {
        return -1;
    }
    at = last ? ptst__j_rfind(r, s, x, from, to) : ptst__j_find(r, s, x, from, to);
    return at == SIZE_MAX ? -1 : (int64_t)ptst__j_count_points(s->bytes, at);
}

static ptst__jvalue ptst__j_m_find(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                   const ptst__jargs *a) {
    (void)a;
    return ptst__j_int(ptst__j_index(r, self, p, false), self.mark);
}

static ptst__jvalue ptst__j_m_rfind(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                    const ptst__jargs *a) {
    (void)a;
    return ptst__j_int(ptst__j_index(r, self, p, true), self.mark);
}

static ptst__jvalue ptst__j_found(ptst__jrun *r, int64_t at, uint8_t mark) {
    return at < 0 ? ptst__j_fail(r, PTST_ERR_FORMAT, "substring not found") : ptst__j_int(at, mark);
}

static ptst__jvalue ptst__j_m_index(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                    const ptst__jargs *a) {
    (void)a;
    return ptst__j_found(r, ptst__j_index(r, self, p, false), self.mark);
}

static ptst__jvalue ptst__j_m_rindex(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                     const ptst__jargs *a) {
    (void)a;
    return ptst__j_found(r, ptst__j_index(r, self, p, true), self.mark);
}

static ptst__jvalue ptst__j_m_count(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                    const ptst__jargs *a) {
    const ptst__jstring *s = self.as.string, *x = ptst__j_need_string(r, p[0], "the argument");
    size_t from, to, at;
    int64_t n = 0;
    (void)a;
    if (x == NULL || !ptst__j_clip_bytes(r, s, p[1], p[2], &from, &to)) {
        return ptst__j_int(0, self.mark);
    }
    if (x->size == 0) {
        return ptst__j_int((int64_t)ptst__j_count_points(s->bytes + from, to - from) + 1,
                           self.mark);
    }
    while ((at = ptst__j_find(r, s, x, from, to)) != SIZE_MAX) {
        n++;
        from = at + x->size;
    }
    return ptst__j_int(n, self.mark);
}

/* separator.join(list) with str() of the elements if `any`, else they must be strings */
static ptst__jvalue ptst__j_join(ptst__jrun *r, ptst__jvalue separator, ptst__jvalue list,
                                 bool any) {
    ptst__jsink o = {NULL, NULL, 0, 0};
    ptst__jiter i;
    ptst__jvalue item;
    size_t n = 0;
    if (ptst__j_iter(r, list, &i)) {
        while (ptst__j_next(r, &i, &item)) {
            if (n++ != 0) {
                ptst__j_put_string(r, &o, separator);
            }
            if (!any && ptst__j_need_string(r, item, "an element of join()") == NULL) {
                break;
            }
            ptst__j_put_value(r, &o, separator.flag != 0 ? ptst__j_escape(r, item) : item);
        }
    }
    item = ptst__j_sink_string(r, &o);
    item.flag = separator.flag;
    return item;
}

static ptst__jvalue ptst__j_m_join(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                   const ptst__jargs *a) {
    (void)a;
    return ptst__j_join(r, self, p[0], false);
}

/* ---- upper and lower case ---- */

typedef enum ptst__jcase { PTST__J_LOWER, PTST__J_UPPER, PTST__J_SWAP } ptst__jcase;

/* Alternating capital and small letters: first..last, capitals at even (odd) numbers. */
static const struct {
    uint16_t first, last;
    uint8_t odd;
} ptst__j_case_pairs[] = {{0x100, 0x12F, 0},  {0x132, 0x137, 0}, {0x139, 0x148, 1},
                          {0x14A, 0x177, 0},  {0x179, 0x17E, 1}, {0x370, 0x373, 0},
                          {0x3D8, 0x3EF, 0},  {0x460, 0x481, 0}, {0x48A, 0x4BF, 0},
                          {0x4C1, 0x4CE, 1},  {0x4D0, 0x52F, 0}, {0x1E00, 0x1E95, 0},
                          {0x1EA0, 0x1EFF, 0}};

/* Capitals first..last whose small letters lie `distance` behind. */
static const struct {
    uint16_t first, last, distance;
} ptst__j_case_blocks[] = {
    {0xC0, 0xD6, 32},       {0xD8, 0xDE, 32},     {0x386, 0x386, 38},   {0x388, 0x38A, 37},
    {0x38C, 0x38C, 64},     {0x38E, 0x38F, 63},   {0x391, 0x3A1, 32},   {0x3A3, 0x3AB, 32},
    {0x400, 0x40F, 80},     {0x410, 0x42F, 32},   {0x4C0, 0x4C0, 15},   {0x531, 0x556, 48},
    {0x10A0, 0x10C5, 7264}, {0x2160, 0x216F, 16}, {0x24B6, 0x24CF, 26}, {0xFF21, 0xFF3A, 32}};

/* The small letter (capital) of a character, or itself. ASCII, Latin, Greek, Cyrillic, Armenian,
   Georgian; one to one. */
static uint32_t ptst__j_letter(uint32_t p, bool upper) {
    size_t i;
    if (p < 0x80) {
        return upper ? (p >= 'a' && p <= 'z' ? p - 32 : p) : p >= 'A' && p <= 'Z' ? p + 32 : p;
    }
    if (upper && (p == 0xFF || p == 0xB5 || p == 0x131 || p == 0x17F || p == 0x3C2)) {
        return p == 0xFF ? 0x178 : p == 0xB5 ? 0x39C : p == 0x131 ? 'I' : p == 0x17F ? 'S' : 0x3A3;
    }
    if (!upper && (p == 0x178 || p == 0x1E9E)) {
        return p == 0x178 ? 0xFF : 0xDF;
    }
    for (i = 0; i < sizeof ptst__j_case_pairs / sizeof ptst__j_case_pairs[0]; i++) {
        if (p >= ptst__j_case_pairs[i].first && p <= ptst__j_case_pairs[i].last) {
            bool capital = (p & 1) == ptst__j_case_pairs[i].odd;
            return upper == capital ? p : capital ? p + 1 : p - 1;
        }
    }
    for (i = 0; i < sizeof ptst__j_case_blocks / sizeof ptst__j_case_blocks[0]; i++) {
        uint32_t first = ptst__j_case_blocks[i].first, last = ptst__j_case_blocks[i].last;
        uint32_t distance = ptst__j_case_blocks[i].distance;
        if (!upper && p >= first && p <= last) {
            return p + distance;
        }
        if (upper && p >= first + distance && p <= last + distance) {
            return p - distance;
        }
    }
    return p;
}

static bool ptst__j_is_upper(uint32_t p) { return ptst__j_letter(p, false) != p; }

static bool ptst__j_is_lower(uint32_t p) {
    return ptst__j_letter(p, true) != p || p == 0xDF || p == 0xAA || p == 0xBA;
}

static bool ptst__j_is_cased(uint32_t p) { return ptst__j_is_upper(p) || ptst__j_is_lower(p); }

/* Writes the character at byte i in the other case: small unless `upper`. The sharp s has no
   capital; sigma at the end of a word has a form of its own. */
static void ptst__j_put_case(ptst__jrun *r, ptst__jsink *o, ptst__jvalue v, size_t i, bool upper,
                             bool title) {
    const ptst__jstring *s = v.as.string;
    size_t n, before = i, k;
    uint32_t p = ptst__j_point(s, i, &n), q = ptst__j_letter(p, upper);
    uint8_t mark = s->marks == NULL ? v.mark : s->marks[i];
    if (upper && p == 0xDF) {
        ptst__j_puts(r, o, title ? "Ss" : "SS", mark);
        return;
    }
    if (!upper && p == 0x130) {
        ptst__j_puts(r, o, "i\xCC\x87", mark);
        return;
    }
    if (!upper && p == 0x3A3 && i > 0) {
        do {
            before--;
        } while (((unsigned char)s->bytes[before] & 0xC0) == 0x80);
        if (ptst__j_is_cased(ptst__j_point(s, before, &k)) &&
            (i + n == s->size || !ptst__j_is_cased(ptst__j_point(s, i + n, &k)))) {
            q = 0x3C2;
        }
    }
    ptst__j_put_point(r, o, q, mark);
}

/* The whole string in one case. */
static ptst__jvalue ptst__j_case(ptst__jrun *r, ptst__jvalue v, ptst__jcase to) {
    const ptst__jstring *s = v.as.string;
    ptst__jsink o = {NULL, NULL, 0, 0};
    size_t i, n;
    ptst__jvalue out;
    ptst__j_sink_room(r, &o, s->size);
    ptst__j_pay(r, s->size / 8);
    for (i = 0; i < s->size && r->code == PTST_OK; i += n) {
        uint32_t p = ptst__j_point(s, i, &n);
        ptst__j_put_case(r, &o, v, i,
                         to == PTST__J_SWAP ? ptst__j_is_lower(p) : to == PTST__J_UPPER, false);
    }
    out = ptst__j_sink_string(r, &o);
    out.flag = v.flag;
    return out;
}

static ptst__jvalue ptst__j_m_lower(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                    const ptst__jargs *a) {
    (void)p;
    (void)a;
    return ptst__j_case(r, self, PTST__J_LOWER);
}

static ptst__jvalue ptst__j_m_upper(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                    const ptst__jargs *a) {
    (void)p;
    (void)a;
    return ptst__j_case(r, self, PTST__J_UPPER);
}

static ptst__jvalue ptst__j_m_swapcase(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                       const ptst__jargs *a) {
    (void)p;
    (void)a;
    return ptst__j_case(r, self, PTST__J_SWAP);
}

/* Where a capital comes in: str.capitalize, str.title, and the filter title. */
typedef enum ptst__jwords {
    PTST__J_FIRST, /* the first character of all */
    PTST__J_CASED, /* a letter that follows no letter */
    PTST__J_BEGINS /* the first character and those after - ( { [ < and white space */
} ptst__jwords;

static ptst__jvalue ptst__j_capitals(ptst__jrun *r, ptst__jvalue v, ptst__jwords where) {
    const ptst__jstring *s = v.as.string;
    ptst__jsink o = {NULL, NULL, 0, 0};
    bool begin = true;
    size_t i, n;
    ptst__jvalue out;
    ptst__j_pay(r, s->size / 8);
    for (i = 0; i < s->size && r->code == PTST_OK; i += n) {
        uint32_t p = ptst__j_point(s, i, &n);
        ptst__j_put_case(r, &o, v, i, begin, true);
        begin = where == PTST__J_FIRST                                  ? false
                : where == PTST__J_CASED                                ? !ptst__j_is_cased(p)
                : p != 0 && p < 0x80 && strchr("-({[<", (int)p) != NULL ? true
                                                                        : ptst__j_space(p);
    }
    out = ptst__j_sink_string(r, &o);
    out.flag = v.flag;
    return out;
}

static ptst__jvalue ptst__j_m_capitalize(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                         const ptst__jargs *a) {
    (void)p;
    (void)a;
    return ptst__j_capitals(r, self, PTST__J_FIRST);
}

static ptst__jvalue ptst__j_m_title(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                    const ptst__jargs *a) {
    (void)p;
    (void)a;
    return ptst__j_capitals(r, self, PTST__J_CASED);
}

/* ---- the rest of str ---- */

static bool ptst__j_is_alpha(uint32_t p) {
    return (p >= 'a' && p <= 'z') || (p >= 'A' && p <= 'Z') || p == 0xAA || p == 0xB5 ||
           p == 0xBA ||
           (p >= 0xC0 && p != 0xD7 && p != 0xF7 && !ptst__j_space(p) &&
            !(p >= 0x2000 && p <= 0x2BFF) && !(p >= 0x3000 && p <= 0x3004) &&
            !(p >= 0x3008 && p <= 0x3030) && !(p >= 0xFF00 && p <= 0xFF20) && p < 0x1F000);
}

static bool ptst__j_is_digit(uint32_t p) {
    return (p >= '0' && p <= '9') || (p >= 0x660 && p <= 0x669) || (p >= 0x966 && p <= 0x96F) ||
           (p >= 0xFF10 && p <= 0xFF19);
}

/* The str.is...() questions: is every character of the class, and is there one? */
typedef enum ptst__jclass {
    PTST__J_ALPHA,
    PTST__J_DIGIT,
    PTST__J_ALNUM,
    PTST__J_SPACE,
    PTST__J_ASCII,
    PTST__J_IS_LOWER,
    PTST__J_IS_UPPER
} ptst__jclass;

static bool ptst__j_all(ptst__jrun *r, const ptst__jstring *s, ptst__jclass class_of) {
    size_t i, n;
    bool cased = class_of < PTST__J_IS_LOWER, good = true;
    ptst__j_pay(r, s->size / 8);
    for (i = 0; i < s->size && good; i += n) {
        uint32_t p = ptst__j_point(s, i, &n);
        bool digit = ptst__j_is_digit(p);
        bool upper = ptst__j_is_upper(p), lower = ptst__j_is_lower(p);
        cased = cased || upper || lower;
        good = class_of == PTST__J_ALPHA      ? ptst__j_is_alpha(p) && !digit
               : class_of == PTST__J_DIGIT    ? digit
               : class_of == PTST__J_ALNUM    ? digit || ptst__j_is_alpha(p)
               : class_of == PTST__J_SPACE    ? ptst__j_space(p)
               : class_of == PTST__J_ASCII    ? p < 0x80
               : class_of == PTST__J_IS_LOWER ? !upper
                                              : !lower;
    }
    return good && cased && (s->size != 0 || class_of == PTST__J_ASCII);
}

static ptst__jvalue ptst__j_m_isalpha(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                      const ptst__jargs *a) {
    (void)p;
    (void)a;
    return ptst__j_bool(ptst__j_all(r, self.as.string, PTST__J_ALPHA));
}

static ptst__jvalue ptst__j_m_isdigit(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                      const ptst__jargs *a) {
    (void)p;
    (void)a;
    return ptst__j_bool(ptst__j_all(r, self.as.string, PTST__J_DIGIT));
}

static ptst__jvalue ptst__j_m_isalnum(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                      const ptst__jargs *a) {
    (void)p;
    (void)a;
    return ptst__j_bool(ptst__j_all(r, self.as.string, PTST__J_ALNUM));
}

static ptst__jvalue ptst__j_m_isspace(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                      const ptst__jargs *a) {
    (void)p;
    (void)a;
    return ptst__j_bool(ptst__j_all(r, self.as.string, PTST__J_SPACE));
}

static ptst__jvalue ptst__j_m_isascii(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                      const ptst__jargs *a) {
    (void)p;
    (void)a;
    return ptst__j_bool(ptst__j_all(r, self.as.string, PTST__J_ASCII));
}

static ptst__jvalue ptst__j_m_islower(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                      const ptst__jargs *a) {
    (void)p;
    (void)a;
    return ptst__j_bool(ptst__j_all(r, self.as.string, PTST__J_IS_LOWER));
}

static ptst__jvalue ptst__j_m_isupper(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                      const ptst__jargs *a) {
    (void)p;
    (void)a;
    return ptst__j_bool(ptst__j_all(r, self.as.string, PTST__J_IS_UPPER));
}

static ptst__jvalue ptst__j_m_istitle(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                      const ptst__jargs *a) {
    const ptst__jstring *s = self.as.string;
    bool inside = false, good = true, any = false;
    size_t i, n;
    (void)r;
    (void)p;
    (void)a;
    for (i = 0; i < s->size && good; i += n) {
        uint32_t point = ptst__j_point(s, i, &n);
        bool upper = ptst__j_is_upper(point), lower = ptst__j_is_lower(point);
        good = !(upper && inside) && !(lower && !inside);
        inside = upper || lower;
        any = any || inside;
    }
    return ptst__j_bool(good && any);
}

/* partition (last false), rpartition */
static ptst__jvalue ptst__j_partition(ptst__jrun *r, ptst__jvalue self, ptst__jvalue separator,
                                      bool last) {
    const ptst__jstring *s = self.as.string,
                        *x = ptst__j_need_string(r, separator, "the separator");
    ptst__jvalue out = ptst__j_list(r, PTST__J_TUPLE, NULL, 0), none = ptst__j_text(r, "");
    size_t at;
    if (x == NULL || x->size == 0) {
        return ptst__j_fail(r, PTST_ERR_FORMAT, "empty separator");
    }
    at = last ? ptst__j_rfind(r, s, x, 0, s->size) : ptst__j_find(r, s, x, 0, s->size);
    if (at == SIZE_MAX) {
        ptst__j_push(r, out, last ? none : self);
        ptst__j_push(r, out, none);
        ptst__j_push(r, out, last ? self : none);
    } else {
        ptst__j_push(r, out, ptst__j_sub(r, self, 0, at));
        ptst__j_push(r, out, separator);
        ptst__j_push(r, out, ptst__j_sub(r, self, at + x->size, s->size));
    }
    return out;
}

static ptst__jvalue ptst__j_m_partition(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                        const ptst__jargs *a) {
    (void)a;
    return ptst__j_partition(r, self, p[0], false);
}

static ptst__jvalue ptst__j_m_rpartition(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                         const ptst__jargs *a) {
    (void)a;
    return ptst__j_partition(r, self, p[0], true);
}

static ptst__jvalue ptst__j_m_removeprefix(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                           const ptst__jargs *a) {
    const ptst__jstring *s = self.as.string, *x = ptst__j_need_string(r, p[0], "the argument");
    bool cut = x != NULL && s->size >= x->size && memcmp(s->bytes, x->bytes, x->size) == 0;
    (void)a;
    return cut ? ptst__j_sub(r, self, x->size, s->size) : self;
}

static ptst__jvalue ptst__j_m_removesuffix(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                           const ptst__jargs *a) {
    const ptst__jstring *s = self.as.string, *x = ptst__j_need_string(r, p[0], "the argument");
    bool cut = x != NULL && s->size >= x->size &&
               memcmp(s->bytes + s->size - x->size, x->bytes, x->size) == 0;
    (void)a;
    return cut ? ptst__j_sub(r, self, 0, s->size - x->size) : self;
}

/* center (^), ljust (<), rjust (>) */
static ptst__jvalue ptst__j_justify(ptst__jrun *r, ptst__jvalue self, ptst__jvalue width,
                                    ptst__jvalue fill, char align) {
    ptst__jspec spec = {' ', 0, 0, 0, 0, false, false, 0, -1};
    int64_t n = ptst__j_need_int(r, width, 0);
    size_t length, points = self.as.string->points;
    ptst__jsink o = {NULL, NULL, 0, 0};
    if (fill.kind != PTST__J_MISSING) {
        const ptst__jstring *f = ptst__j_need_string(r, fill, "the fill character");
        if (f == NULL || f->points != 1) {
            return ptst__j_fail(r, PTST_ERR_FORMAT,
                                "the fill character must be exactly one character long");
        }
        spec.fill = ptst__j_point(f, 0, &length);
    }
    if (n <= 0 || (uint64_t)n <= points) {
        return self;
    }
    if (align == '^') { /* CPython: the odd blank goes left if the width is odd */
        size_t room = (size_t)n - points, left = room / 2 + (room & (size_t)n & 1);
        if (room > r->output_max) {
            return ptst__j_fail(r, PTST_ERR_LIMIT,
                                "the limit on the size of the output is reached");
        }
        ptst__j_put_points(r, &o, spec.fill, left, self.mark);
        ptst__j_put_string(r, &o, self);
        ptst__j_put_points(r, &o, spec.fill, room - left, self.mark);
    } else {
        spec.width = (size_t)n;
        ptst__j_pad(r, &o, &spec, self, 0, align);
    }
    fill = ptst__j_sink_string(r, &o);
    fill.flag = self.flag;
    return fill;
}

static ptst__jvalue ptst__j_m_center(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                     const ptst__jargs *a) {
    (void)a;
    return ptst__j_justify(r, self, p[0], p[1], '^');
}

static ptst__jvalue ptst__j_m_ljust(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                    const ptst__jargs *a) {
    (void)a;
    return ptst__j_justify(r, self, p[0], p[1], '<');
}

static ptst__jvalue ptst__j_m_rjust(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                    const ptst__jargs *a) {
    (void)a;
    return ptst__j_justify(r, self, p[0], p[1], '>');
}

static ptst__jvalue ptst__j_m_zfill(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                    const ptst__jargs *a) {
    ptst__jspec spec = {'0', 0, 0, 0, 0, false, false, 0, -1};
    const ptst__jstring *s = self.as.string;
    int64_t n = ptst__j_need_int(r, p[0], 0);
    ptst__jsink o = {NULL, NULL, 0, 0};
    (void)a;
    if (n <= 0 || (uint64_t)n <= s->points) {
        return self;
    }
    spec.width = (size_t)n;
    ptst__j_pad(r, &o, &spec, self, s->size != 0 && (s->bytes[0] == '-' || s->bytes[0] == '+'),
                '=');
    return ptst__j_sink_string(r, &o);
}

static ptst__jvalue ptst__j_m_expandtabs(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                         const ptst__jargs *a) {
    const ptst__jstring *s = self.as.string;
    int64_t size = ptst__j_need_int(r, p[0], 8);
    ptst__jsink o = {NULL, NULL, 0, 0};
    size_t i, n, column = 0, fill;
    (void)a;
    for (i = 0; i < s->size && ptst__j_pay(r, 1); i += n) {
        uint32_t point = ptst__j_point(s, i, &n);
        if (point == '\t') {
            fill = size <= 0 ? 0 : (size_t)size - column % (size_t)size;
            ptst__j_put_fill(r, &o, ' ', fill, s->marks == NULL ? self.mark : s->marks[i]);
            column += fill;
        } else {
            ptst__j_put_sub(r, &o, self, i, i + n);
            column = point == '\n' || point == '\r' ? 0 : column + 1;
        }
    }
    return ptst__j_sink_string(r, &o);
}

static const ptst__jbuiltin ptst__j_string_methods[] = {
    {"capitalize", "", ptst__j_m_capitalize},
    {"casefold", "", ptst__j_m_lower},
    {"center", "!width fillchar", ptst__j_m_center},
    {"count", "!sub start end", ptst__j_m_count},
    {"endswith", "!suffix start end", ptst__j_m_endswith},
    {"expandtabs", "tabsize", ptst__j_m_expandtabs},
    {"find", "!sub start end", ptst__j_m_find},
    {"format", NULL, ptst__j_m_format},
    {"index", "!sub start end", ptst__j_m_index},
    {"isalnum", "", ptst__j_m_isalnum},
    {"isalpha", "", ptst__j_m_isalpha},
    {"isascii", "", ptst__j_m_isascii},
    {"isdecimal", "", ptst__j_m_isdigit},
    {"isdigit", "", ptst__j_m_isdigit},
    {"islower", "", ptst__j_m_islower},
    {"isnumeric", "", ptst__j_m_isdigit},
    {"isspace", "", ptst__j_m_isspace},
    {"istitle", "", ptst__j_m_istitle},
    {"isupper", "", ptst__j_m_isupper},
    {"join", "!iterable", ptst__j_m_join},
    {"ljust", "!width fillchar", ptst__j_m_ljust},
    {"lower", "", ptst__j_m_lower},
    {"lstrip", "chars", ptst__j_m_lstrip},
    {"partition", "!sep", ptst__j_m_partition},
    {"removeprefix", "!prefix", ptst__j_m_removeprefix},
    {"removesuffix", "!suffix", ptst__j_m_removesuffix},
    {"replace", "!old !new count", ptst__j_m_replace},
    {"rfind", "!sub start end", ptst__j_m_rfind},
    {"rindex", "!sub start end", ptst__j_m_rindex},
    {"rjust", "!width fillchar", ptst__j_m_rjust},
    {"rpartition", "!sep", ptst__j_m_rpartition},
    {"rsplit", "sep maxsplit", ptst__j_m_rsplit},
    {"rstrip", "chars", ptst__j_m_rstrip},
    {"split", "sep maxsplit", ptst__j_m_split},
    {"splitlines", "keepends", ptst__j_m_splitlines},
    {"startswith", "!prefix start end", ptst__j_m_startswith},
    {"strip", "chars", ptst__j_m_strip},
    {"swapcase", "", ptst__j_m_swapcase},
    {"title", "", ptst__j_m_title},
    {"upper", "", ptst__j_m_upper},
    {"zfill", "!width", ptst__j_m_zfill},
    {NULL, NULL, NULL}};

/* ---- attributes and methods of the other types ---- */

/* for: one is made for each loop that runs. */
typedef struct ptst__jloop {
    const ptst__jnode *node;
    ptst__jscope *scope; /* around the loop */
    ptst__jiter iter;
    size_t index0, depth0;
    ptst__jvalue before, current, after;
    bool has_after; /* `after` was taken from the iterator already */
    int64_t length; /* -1 = not known */
    ptst__jvalue changed;
    /* Takes the next element that the loop's condition lets through. */
    bool (*next)(ptst__jrun *r, struct ptst__jloop *l, ptst__jvalue *item);
} ptst__jloop;

static bool ptst__j_loop_peek(ptst__jrun *r, ptst__jloop *l) {
    if (!l->has_after) {
        l->has_after = l->next(r, l, &l->after);
    }
    return l->has_after;
}

/* The number of rounds; takes the rest of the iterator if it must. */
static int64_t ptst__j_loop_length(ptst__jrun *r, ptst__jloop *l) {
    ptst__jvalue rest, item;
    int64_t known = ptst__j_length(l->iter.over);
    if (l->length < 0 && known >= 0 && l->node->d == NULL) {
        l->length = known;
    } else if (l->length < 0) {
        rest = ptst__j_list(r, PTST__J_LIST, NULL, 0);
        while (l->next(r, l, &item)) {
            ptst__j_push(r, rest, item);
        }
        if (r->code == PTST_OK) {
            l->length = (int64_t)(rest.as.list->count + l->index0 + 1 + (l->has_after ? 1 : 0));
            rest.kind = PTST__J_ITERATOR;
            l->iter.over = rest;
        }
    }
    return l->length;
}

/* <LoopContext 1/3> */
static void ptst__j_put_loop(ptst__jrun *r, ptst__jsink *o, ptst__jloop *l) {
    ptst__j_puts(r, o, "<LoopContext ", 0);
    ptst__j_put_int(r, o, (int64_t)l->index0 + 1, 0);
    ptst__j_puts(r, o, "/", 0);
    ptst__j_put_int(r, o, ptst__j_loop_length(r, l), 0);
    ptst__j_puts(r, o, ">", 0);
}

static ptst__jvalue ptst__j_m_cycle(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                    const ptst__jargs *a) {
    (void)p;
    if (a->count == 0) {
        return ptst__j_fail(r, PTST_ERR_FORMAT, "no items for cycling given");
    }
    return a->values[self.as.loop->index0 % a->count];
}

static ptst__jvalue ptst__j_m_changed(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                      const ptst__jargs *a) {
    ptst__jloop *l = self.as.loop;
    ptst__jvalue now = ptst__j_list(r, PTST__J_TUPLE, a->values, a->count);
    bool changed = !ptst__j_equal(r, l->changed, now);
    (void)p;
    if (changed) {
        l->changed = now;
    }
    return ptst__j_bool(changed);
}

static const ptst__jbuiltin ptst__j_loop_methods[] = {
    {"cycle", NULL, ptst__j_m_cycle}, {"changed", NULL, ptst__j_m_changed}, {NULL, NULL, NULL}};

/* A plain attribute of a loop; MISSING if it has none of this name. */
static ptst__jvalue ptst__j_loop_attribute(ptst__jrun *r, ptst__jloop *l, const ptst__jstring *n) {
    int64_t i = (int64_t)l->index0;
    ptst__jvalue nothing = ptst__j_undefined(PTST__J_WHY_EMPTY, NULL, 0);
    if (ptst__j_same_text(n, "index")) {
        return ptst__j_int(i + 1, 0);
    }
    if (ptst__j_same_text(n, "index0")) {
        return ptst__j_int(i, 0);
    }
    if (ptst__j_same_text(n, "first")) {
        return ptst__j_bool(i == 0);
    }
    if (ptst__j_same_text(n, "last")) {
        return ptst__j_bool(!ptst__j_loop_peek(r, l));
    }
    if (ptst__j_same_text(n, "length")) {
        return ptst__j_int(ptst__j_loop_length(r, l), 0);
    }
    if (ptst__j_same_text(n, "revindex")) {
        return ptst__j_int(ptst__j_loop_length(r, l) - i, 0);
    }
    if (ptst__j_same_text(n, "revindex0")) {
        return ptst__j_int(ptst__j_loop_length(r, l) - i - 1, 0);
    }
    if (ptst__j_same_text(n, "depth")) {
        return ptst__j_int((int64_t)l->depth0 + 1, 0);
    }
    if (ptst__j_same_text(n, "depth0")) {
        return ptst__j_int((int64_t)l->depth0, 0);
    }
    if (ptst__j_same_text(n, "previtem")) {
        return i == 0 ? nothing : l->before;
    }
    if (ptst__j_same_text(n, "nextitem")) {
        return ptst__j_loop_peek(r, l) ? l->after : nothing;
    }
    return ptst__j_make(PTST__J_MISSING, 0);
}

static ptst__jvalue ptst__j_m_list_count(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                         const ptst__jargs *a) {
    ptst__jiter i;
    ptst__jvalue item;
    int64_t n = 0;
    (void)a;
    if (ptst__j_iter(r, self, &i)) {
        while (ptst__j_next(r, &i, &item)) {
            n += ptst__j_equal(r, item, p[0]);
        }
    }
    return ptst__j_int(n, 0);
}

static ptst__jvalue ptst__j_m_list_index(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                         const ptst__jargs *a) {
    const ptst__jlist *l = self.as.list;
    size_t from, to;
    (void)a;
    ptst__j_clip(r, l->count, p[1], p[2], &from, &to);
    for (; from < to && r->code == PTST_OK; from++) {
        if (ptst__j_equal(r, l->items[from], p[0])) {
            return ptst__j_int((int64_t)from, 0);
        }
    }
    return ptst__j_fail(r, PTST_ERR_FORMAT, "the value is not in the list");
}

static ptst__jvalue ptst__j_m_copy(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                   const ptst__jargs *a) {
    (void)r; /* values never change, so a copy is the value itself */
    (void)p;
    (void)a;
    return self;
}

static ptst__jvalue ptst__j_m_get(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                  const ptst__jargs *a) {
    const ptst__jpair *pair;
    (void)a;
    if (p[0].kind == PTST__J_LIST || p[0].kind == PTST__J_DICT) {
        return ptst__j_fail(r, PTST_ERR_FORMAT, "unhashable type: '%s'", ptst__j_type(p[0]));
    }
    pair = ptst__j_dict_find(r, self.as.dict, p[0]);
    return pair != NULL ? pair->value : p[1].kind == PTST__J_MISSING ? ptst__j_none() : p[1];
}

static ptst__jvalue ptst__j_m_view(ptst__jvalue self, ptst__jkind kind) {
    self.kind = (uint8_t)kind;
    return self;
}

static ptst__jvalue ptst__j_m_keys(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                   const ptst__jargs *a) {
    (void)r;
    (void)p;
    (void)a;
    return ptst__j_m_view(self, PTST__J_KEYS);
}

static ptst__jvalue ptst__j_m_values(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                     const ptst__jargs *a) {
    (void)r;
    (void)p;
    (void)a;
    return ptst__j_m_view(self, PTST__J_VALUES);
}

static ptst__jvalue ptst__j_m_items(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                    const ptst__jargs *a) {
    (void)r;
    (void)p;
    (void)a;
    return ptst__j_m_view(self, PTST__J_ITEMS);
}

static const ptst__jbuiltin ptst__j_list_methods[] = {
    {"count", "!value", ptst__j_m_list_count},
    {"index", "!value start stop", ptst__j_m_list_index},
    {"copy", "", ptst__j_m_copy},
    {NULL, NULL, NULL}};

static const ptst__jbuiltin ptst__j_dict_methods[] = {
    {"get", "!key default", ptst__j_m_get}, {"items", "", ptst__j_m_items},
    {"keys", "", ptst__j_m_keys},           {"values", "", ptst__j_m_values},
    {"copy", "", ptst__j_m_copy},           {NULL, NULL, NULL}};

static ptst__jvalue ptst__j_m_cycler_next(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                          const ptst__jargs *a) {
    ptst__jcycle *y = self.as.cycle;
    (void)r;
    (void)p;
    (void)a;
    y->at = y->at % y->items.count + 1;
    return y->items.items[y->at - 1];
}

static ptst__jvalue ptst__j_m_cycler_reset(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                           const ptst__jargs *a) {
    (void)r;
    (void)p;
    (void)a;
    self.as.cycle->at = 0;
    return ptst__j_none();
}

static const ptst__jbuiltin ptst__j_cycler_methods[] = {
    {"next", "", ptst__j_m_cycler_next}, {"reset", "", ptst__j_m_cycler_reset}, {NULL, NULL, NULL}};

/* The entry of a table, NULL if absent. */
static const ptst__jbuiltin *ptst__j_lookup(const ptst__jbuiltin *table, const ptst__jstring *n) {
    for (; table != NULL && table->name != NULL; table++) {
        if (ptst__j_same_text(n, table->name)) {
            return table;
        }
    }
    return NULL;
}

/* Is the name one of a list separated by blanks? */
static bool ptst__j_listed(const char *list, const ptst__jstring *n) {
    while (*list != 0) {
        size_t size = strcspn(list, " ");
        if (size == n->size && memcmp(list, n->bytes, size) == 0) {
            return true;
        }
        list += size + (list[size] == ' ');
    }
    return false;
}

/* Python's attribute of a value: a method, or what loops and namespaces have; MISSING if there is
   none; UNDEFINED if the sandbox forbids it. */
static ptst__jvalue ptst__j_attribute(ptst__jrun *r, ptst__jvalue v, const ptst__jstring *n) {
    const ptst__jbuiltin *table = v.kind == PTST__J_STRING ? ptst__j_string_methods
                                  : v.kind == PTST__J_LIST || v.kind == PTST__J_TUPLE
                                      ? ptst__j_list_methods
                                  : v.kind == PTST__J_DICT   ? ptst__j_dict_methods
                                  : v.kind == PTST__J_LOOP   ? ptst__j_loop_methods
                                  : v.kind == PTST__J_CYCLER ? ptst__j_cycler_methods
                                                             : NULL;
    const char *forbidden = v.kind == PTST__J_LIST ? "append clear pop reverse insert sort extend "
                                                     "remove"
                            : v.kind == PTST__J_DICT ? "clear pop popitem setdefault update"
                                                     : "";
    const ptst__jbuiltin *f = ptst__j_lookup(table, n);
    ptst__jvalue out = ptst__j_make(PTST__J_MISSING, 0);
    ptst__jmethod *m;
    ptst__jpair *pair;
    if (f != NULL) {
        m = (ptst__jmethod *)ptst__j_alloc(r, 1, sizeof *m);
        if (m != NULL) {
            m->self = v;
            m->function = f;
            out = ptst__j_make(PTST__J_METHOD, 0);
            out.as.method = m;
        }
        return out;
    }
    if (ptst__j_listed(forbidden, n) ||
        (n->size > 4 && n->bytes[0] == '_' && n->bytes[1] == '_' && n->bytes[n->size - 1] == '_')) {
        return ptst__j_undefined(PTST__J_WHY_UNSAFE, n, v.kind);
    }
    if (v.kind == PTST__J_STRING &&
        ptst__j_listed("encode translate maketrans format_map isidentifier isprintable", n)) {
        return ptst__j_fail(r, PTST_ERR_UNSUPPORTED, "str.%s is not supported",
                            ptst__j_show(n).text);
    }
    if (v.kind == PTST__J_LOOP) {
        return ptst__j_loop_attribute(r, v.as.loop, n);
    }
    if (v.kind == PTST__J_CYCLER && ptst__j_same_text(n, "current")) {
        return v.as.cycle->items.items[v.as.cycle->at % v.as.cycle->items.count];
    }
    if (v.kind == PTST__J_TUPLE && v.flag != 0 && ptst__j_listed("grouper list", n)) {
        return v.as.list->items[n->bytes[0] == 'g' ? 0 : 1];
    }
    if (v.kind == PTST__J_MACRO && ptst__j_same_text(n, "name")) {
        const ptst__jstring *name = ptst__j_macro_name(v.as.macro);
        return name == NULL ? ptst__j_none() : ptst__j_string(r, name->bytes, name->size, NULL, 0);
    }
    if (v.kind == PTST__J_NAMESPACE) {
        ptst__jvalue key = ptst__j_string(r, n->bytes, n->size, NULL, 0);
        pair = ptst__j_dict_find(r, v.as.dict, key);
        return pair != NULL ? pair->value : out;
    }
    return out;
}

/* v[key] without a slice, Python's part only; MISSING if there is no such element. */
static ptst__jvalue ptst__j_element(ptst__jrun *r, ptst__jvalue v, ptst__jvalue key) {
    int64_t i = key.as.integer, n = ptst__j_length(v);
    ptst__jvalue none = ptst__j_make(PTST__J_MISSING, 0);
    size_t at, length;
    if (v.kind == PTST__J_DICT) {
        const ptst__jpair *pair = ptst__j_dict_find(r, v.as.dict, key);
        return pair == NULL ? none : pair->value;
    }
    if (!ptst__j_is_int(key) || n < 0 || i < -n || i >= n) {
        return none;
    }
    i = i < 0 ? i + n : i;
    switch ((ptst__jkind)v.kind) {
    case PTST__J_STRING:
        at = ptst__j_offset(r, v.as.string, (size_t)i);
        ptst__j_point(v.as.string, at, &length);
        return ptst__j_sub(r, v, at, at + length);
    case PTST__J_LIST:
    case PTST__J_TUPLE:
        return v.as.list->items[i];
    case PTST__J_RANGE:
        return ptst__j_range_item(v.as.range, (size_t)i, v.mark);
    default:
        return none;
    }
}

/* v.name: the attribute, else the element, else undefined. */
static ptst__jvalue ptst__j_getattr(ptst__jrun *r, ptst__jvalue v, const ptst__jstring *name) {
    ptst__jvalue out, key;
    if (r->code != PTST_OK) {
        return ptst__j_none();
    }
    if (v.kind == PTST__J_UNDEFINED) {
        return ptst__j_fail_undefined(r, v);
    }
    out = ptst__j_attribute(r, v, name);
    if (out.kind == PTST__J_MISSING && v.kind == PTST__J_DICT) {
        key = ptst__j_make(PTST__J_STRING, 0);
        key.as.string = name;
        out = ptst__j_element(r, v, key);
    }
    return out.kind == PTST__J_MISSING ? ptst__j_undefined(PTST__J_WHY_ATTRIBUTE, name, v.kind)
                                       : out;
}

/* v[key]: the element, else the attribute of this name, else undefined. */
static ptst__jvalue ptst__j_getitem(ptst__jrun *r, ptst__jvalue v, ptst__jvalue key) {
    ptst__jvalue out;
    if (r->code != PTST_OK) {
        return ptst__j_none();
    }
    if (v.kind == PTST__J_UNDEFINED) {
        return ptst__j_fail_undefined(r, v);
    }
    out = ptst__j_element(r, v, key);
    if (out.kind == PTST__J_MISSING && key.kind == PTST__J_STRING) {
        out = ptst__j_attribute(r, v, key.as.string);
        return out.kind == PTST__J_MISSING
                   ? ptst__j_undefined(PTST__J_WHY_ATTRIBUTE, key.as.string, v.kind)
                   : out;
    }
    return out.kind == PTST__J_MISSING ? ptst__j_undefined(PTST__J_WHY_ITEM, NULL, v.kind) : out;
}

static bool ptst__j_is_bound(ptst__jvalue v) { return v.kind == PTST__J_NONE || ptst__j_is_int(v); }

/* v[start:stop:step] */
static ptst__jvalue ptst__j_slice(ptst__jrun *r, ptst__jvalue v, ptst__jvalue start,
                                  ptst__jvalue stop, ptst__jvalue step) {
    int64_t n = ptst__j_length(v), by, a, b, count;
    ptst__jvalue out, item;
    ptst__jsink o = {NULL, NULL, 0, 0};
    if (v.kind == PTST__J_UNDEFINED) {
        return ptst__j_fail_undefined(r, v);
    }
    if (!ptst__j_is_bound(start) || !ptst__j_is_bound(stop) || !ptst__j_is_bound(step)) {
        return ptst__j_undefined(PTST__J_WHY_ITEM, NULL, v.kind);
    }
    by = ptst__j_need_int(r, step, 1);
    if (v.kind != PTST__J_STRING && v.kind != PTST__J_LIST && v.kind != PTST__J_TUPLE &&
        v.kind != PTST__J_RANGE) {
        return ptst__j_undefined(PTST__J_WHY_ITEM, NULL, v.kind);
    }
    if (by == 0) {
        return ptst__j_fail(r, PTST_ERR_FORMAT, "slice step cannot be zero");
    }
    a = ptst__j_need_int(r, start, by > 0 ? 0 : n - 1);
    b = ptst__j_need_int(r, stop, by > 0 ? n : -n - 1);
    a = a < 0 ? (a < -n ? (by > 0 ? 0 : -1) : a + n) : a >= n ? (by > 0 ? n : n - 1) : a;
    b = b < 0 ? (b < -n ? (by > 0 ? 0 : -1) : b + n) : b >= n ? (by > 0 ? n : n - 1) : b;
    by = by == INT64_MIN ? -INT64_MAX : by;
    count = by > 0 ? (b > a ? (b - a - 1) / by + 1 : 0) : (a > b ? (a - b - 1) / -by + 1 : 0);
    if (r->code != PTST_OK || (v.kind == PTST__J_STRING && (by == 1 || count == 0))) {
        return ptst__j_sub(r, v.kind == PTST__J_STRING ? v : ptst__j_text(r, ""),
                           count == 0 ? 0 : ptst__j_offset(r, v.as.string, (size_t)a),
                           count == 0 ? 0 : ptst__j_offset(r, v.as.string, (size_t)b));
    }
    out = ptst__j_list(r, v.kind == PTST__J_TUPLE ? PTST__J_TUPLE : PTST__J_LIST, NULL, 0);
    for (; count > 0 && ptst__j_pay(r, 1); count--, a = count > 0 ? a + by : a) {
        item = ptst__j_element(r, v, ptst__j_int(a, 0));
        if (v.kind == PTST__J_STRING) {
            ptst__j_put_string(r, &o, item);
        } else {
            ptst__j_push(r, out, item);
        }
    }
    if (v.kind == PTST__J_STRING) {
        out = ptst__j_sink_string(r, &o);
        out.flag = v.flag;
    }
    out.mark = v.kind == PTST__J_STRING ? out.mark : v.mark;
    return out;
}

/* ---- calls of built-in functions ---- */

/* Puts the arguments where the parameters of f want them. */
static bool ptst__j_bind(ptst__jrun *r, const ptst__jbuiltin *f, const ptst__jargs *a,
                         ptst__jvalue *p) {
    const char *s = f->params;
    size_t i, k, used = 0;
    for (i = 0; i < PTST__J_PARAMS; i++) {
        size_t size;
        bool must = *s == '!';
        p[i] = ptst__j_make(PTST__J_MISSING, 0);
        if (*s == 0) {
            continue;
        }
        s += must;
        size = strcspn(s, " ");
        if (i < a->count) {
            p[i] = a->values[i];
        }
        for (k = 0; k < a->named_count; k++) {
            if (a->named[k].name->size == size && memcmp(a->named[k].name->bytes, s, size) == 0) {
                if (i < a->count) {
                    ptst__j_fail(r, PTST_ERR_FORMAT, "%s: argument '%s' is given twice", f->name,
                                 ptst__j_show(a->named[k].name).text);
                    return false;
                }
                p[i] = a->named[k].value;
                used++;
            }
        }
        if (must && p[i].kind == PTST__J_MISSING) {
            ptst__j_fail(r, PTST_ERR_FORMAT, "%s: argument '%.*s' is missing", f->name, (int)size,
                         s);
            return false;
        }
        used += i < a->count;
        s += size + (s[size] == ' ');
    }
    if (used != a->count + a->named_count) {
        ptst__j_fail(r, PTST_ERR_FORMAT, "%s: too many or unknown arguments", f->name);
        return false;
    }
    return r->code == PTST_OK;
}

static ptst__jvalue ptst__j_call_builtin(ptst__jrun *r, const ptst__jbuiltin *f, ptst__jvalue self,
                                         const ptst__jargs *a) {
    ptst__jvalue p[PTST__J_PARAMS];
    if (r->code != PTST_OK || (f->params != NULL && !ptst__j_bind(r, f, a, p))) {
        return ptst__j_none();
    }
    return f->call(r, self, p, a);
}

/* ---- filters ---- */

static bool ptst__j_given(ptst__jvalue v) { return v.kind != PTST__J_MISSING; }

/* str() of a value, Markup or not: what Jinja2 calls soft_str. */
static ptst__jvalue ptst__j_f_string(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                     const ptst__jargs *a) {
    (void)p;
    (void)a;
    return ptst__j_str(r, self);
}

/* The same without being Markup. */
static ptst__jvalue ptst__j_plain(ptst__jrun *r, ptst__jvalue v) {
    v = ptst__j_str(r, v);
    v.flag = 0;
    return v;
}

static ptst__jvalue ptst__j_f_abs(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                  const ptst__jargs *a) {
    (void)p;
    (void)a;
    if (self.kind == PTST__J_FLOAT) {
        return ptst__j_float(fabs(self.as.number), self.mark);
    }
    if (!ptst__j_is_int(self)) {
        return self.kind == PTST__J_UNDEFINED
                   ? ptst__j_fail_undefined(r, self)
                   : ptst__j_fail(r, PTST_ERR_FORMAT, "bad operand type for abs(): '%s'",
                                  ptst__j_type(self));
    }
    return self.as.integer == INT64_MIN
               ? ptst__j_fail_big(r)
               : ptst__j_int(self.as.integer < 0 ? -self.as.integer : self.as.integer, self.mark);
}

static ptst__jvalue ptst__j_f_attr(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                   const ptst__jargs *a) {
    const ptst__jstring *name = ptst__j_need_string(r, p[0], "the name");
    ptst__jvalue out;
    (void)a;
    if (name == NULL || self.kind == PTST__J_UNDEFINED) {
        return name == NULL ? ptst__j_none() : ptst__j_fail_undefined(r, self);
    }
    out = ptst__j_attribute(r, self, name);
    return ptst__j_given(out) ? out : ptst__j_undefined(PTST__J_WHY_ATTRIBUTE, name, self.kind);
}

static ptst__jvalue ptst__j_f_length(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                     const ptst__jargs *a) {
    int64_t n =
        self.kind == PTST__J_LOOP ? ptst__j_loop_length(r, self.as.loop) : ptst__j_length(self);
    (void)p;
    (void)a;
    return n < 0 ? ptst__j_fail(r, PTST_ERR_FORMAT, "object of type '%s' has no len()",
                                ptst__j_type(self))
                 : ptst__j_int(n, self.mark);
}

static ptst__jvalue ptst__j_f_default(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                      const ptst__jargs *a) {
    bool use = self.kind == PTST__J_UNDEFINED || (ptst__j_true(r, p[1]) && !ptst__j_true(r, self));
    (void)a;
    return !use ? self : ptst__j_given(p[0]) ? p[0] : ptst__j_text(r, "");
}

static ptst__jvalue ptst__j_f_upper(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                    const ptst__jargs *a) {
    (void)p;
    (void)a;
    return ptst__j_case(r, ptst__j_str(r, self), PTST__J_UPPER);
}

static ptst__jvalue ptst__j_f_lower(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                    const ptst__jargs *a) {
    (void)p;
    (void)a;
    return ptst__j_case(r, ptst__j_str(r, self), PTST__J_LOWER);
}

static ptst__jvalue ptst__j_f_capitalize(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                         const ptst__jargs *a) {
    (void)p;
    (void)a;
    return ptst__j_capitals(r, ptst__j_str(r, self), PTST__J_FIRST);
}

static ptst__jvalue ptst__j_f_title(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                    const ptst__jargs *a) {
    (void)p;
    (void)a;
    self = ptst__j_capitals(r, ptst__j_str(r, self), PTST__J_BEGINS);
    self.flag = 0;
    return self;
}

static ptst__jvalue ptst__j_f_trim(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                   const ptst__jargs *a) {
    (void)a;
    return ptst__j_strip(r, ptst__j_str(r, self), p[0], 3);
}

static ptst__jvalue ptst__j_f_replace(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                      const ptst__jargs *a) {
    (void)a;
    return ptst__j_replace(r, ptst__j_plain(r, self), ptst__j_str(r, p[0]), ptst__j_plain(r, p[1]),
                           ptst__j_need_int(r, p[2], -1));
}

static ptst__jvalue ptst__j_f_center(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                     const ptst__jargs *a) {
    (void)a;
    return ptst__j_justify(r, ptst__j_str(r, self), ptst__j_given(p[0]) ? p[0] : ptst__j_int(80, 0),
                           ptst__j_make(PTST__J_MISSING, 0), '^');
}

static ptst__jvalue ptst__j_f_safe(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                   const ptst__jargs *a) {
    (void)p;
    (void)a;
    self = ptst__j_str(r, self);
    self.flag = 1;
    return self;
}

static ptst__jvalue ptst__j_f_escape(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                     const ptst__jargs *a) {
    (void)p;
    (void)a;
    return ptst__j_escape(r, self);
}

static ptst__jvalue ptst__j_f_forceescape(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                          const ptst__jargs *a) {
    (void)p;
    (void)a;
    return ptst__j_escape(r, ptst__j_plain(r, self));
}

/* Jinja2 lets a string be indented only; the first line only if `first`, empty ones if `blank`. */
static ptst__jvalue ptst__j_f_indent(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                     const ptst__jargs *a) {
    bool first = ptst__j_true(r, p[1]), blank = ptst__j_true(r, p[2]);
    ptst__jvalue unit = p[0], lines, out;
    ptst__jsink o = {NULL, NULL, 0, 0};
    const ptst__jlist *l;
    size_t i;
    (void)a;
    if (self.kind != PTST__J_STRING) {
        return ptst__j_fail_operands(r, "+", self, ptst__j_text(r, ""));
    }
    if (unit.kind != PTST__J_STRING) {
        unit = ptst__j_repeat(r, ptst__j_text(r, " "),
                              ptst__j_given(unit) ? ptst__j_need_int(r, unit, 4) : 4);
    }
    lines = ptst__j_lines(r, ptst__j_concat(r, self, ptst__j_text(r, "\n")), false);
    if (r->code != PTST_OK) {
        return self;
    }
    l = lines.as.list;
    for (i = 0; i < l->count && r->code == PTST_OK; i++) {
        ptst__j_puts(r, &o, i == 0 ? "" : "\n", 0);
        if (i == 0 ? first : blank || l->items[i].as.string->size != 0) {
            ptst__j_put_string(r, &o, unit);
        }
        ptst__j_put_string(r, &o, l->items[i]);
    }
    out = ptst__j_sink_string(r, &o);
    out.flag = self.flag;
    return out;
}

static ptst__jvalue ptst__j_f_truncate(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                       const ptst__jargs *a) {
    int64_t length = ptst__j_need_int(r, p[0], 255), leeway = ptst__j_need_int(r, p[3], 5);
    ptst__jvalue end = ptst__j_given(p[2]) ? p[2] : ptst__j_text(r, "..."), cut;
    const ptst__jstring *s = ptst__j_need_string(r, self, "truncate: the value"),
                        *e = ptst__j_need_string(r, end, "truncate: end");
    ptst__jvalue blank = ptst__j_text(r, " ");
    size_t at;
    (void)a;
    if (s == NULL || e == NULL || length < (int64_t)e->points || leeway < 0) {
        return ptst__j_fail(r, PTST_ERR_FORMAT, "truncate: the length is too small");
    }
    if ((uint64_t)length > (uint64_t)INT64_MAX - (uint64_t)leeway ||
        (int64_t)s->points <= length + leeway) {
        return self;
    }
    cut = ptst__j_sub(r, self, 0, ptst__j_offset(r, s, (size_t)length - e->points));
    at = ptst__j_rfind(r, cut.as.string, blank.as.string, 0, cut.as.string->size);
    if (!ptst__j_true(r, p[1]) && at != SIZE_MAX) {
        cut = ptst__j_sub(r, cut, 0, at);
    }
    return ptst__j_concat(r, cut, end);
}

/* \w+ */
static ptst__jvalue ptst__j_f_wordcount(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                        const ptst__jargs *a) {
    const ptst__jstring *s = ptst__j_str(r, self).as.string;
    bool inside = false;
    int64_t words = 0;
    size_t i, n;
    (void)p;
    (void)a;
    ptst__j_pay(r, s->size / 8);
    for (i = 0; i < s->size; i += n) {
        uint32_t point = ptst__j_point(s, i, &n);
        bool word = point == '_' || ptst__j_is_alpha(point) || ptst__j_is_digit(point);
        words += word && !inside;
        inside = word;
    }
    return ptst__j_int(words, self.mark);
}

static ptst__jvalue ptst__j_f_format(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                     const ptst__jargs *a) {
    ptst__jvalue values = ptst__j_list(r, PTST__J_TUPLE, a->values, a->count);
    size_t i;
    (void)p;
    if (a->count != 0 && a->named_count != 0) {
        return ptst__j_fail(r, PTST_ERR_FORMAT,
                            "can't handle positional and keyword arguments at the same time");
    }
    if (a->named_count != 0) {
        values = ptst__j_dict(r, PTST__J_DICT);
        for (i = 0; i < a->named_count; i++) {
            const ptst__jstring *n = a->named[i].name;
            ptst__j_dict_put(r, values, ptst__j_string(r, n->bytes, n->size, NULL, 0),
                             a->named[i].value);
        }
    }
    return r->code == PTST_OK ? ptst__j_percent(r, ptst__j_str(r, self), values) : self;
}

/* ---- numbers from text ---- */

/* Digits of s[i..end) with _ between them in the base; false if it is no number. */
static bool ptst__j_digits_read(const char *s, size_t i, size_t end, int64_t base, int64_t *out) {
    int64_t n = 0, digit;
    bool any = false, line = true;
    for (; i < end; i++) {
        char ch = s[i];
        if (ch == '_') {
            if (line) {
                return false;
            }
            line = true;
            continue;
        }
        digit = ch >= '0' && ch <= '9'   ? ch - '0'
                : ch >= 'a' && ch <= 'z' ? ch - 'a' + 10
                : ch >= 'A' && ch <= 'Z' ? ch - 'A' + 10
                                         : 99;
        if (digit >= base || !ptst__j_mul64(n, base, &n) || !ptst__j_add64(n, digit, &n)) {
            return false;
        }
        any = true;
        line = false;
    }
    *out = n;
    return any && !line;
}

/* int(text, base) */
static bool ptst__j_text_int(ptst__jrun *r, ptst__jvalue v, int64_t base, int64_t *out) {
    const ptst__jstring *s = ptst__j_strip(r, v, ptst__j_make(PTST__J_MISSING, 0), 3).as.string;
    bool minus = s->size != 0 && s->bytes[0] == '-', under;
    size_t i = minus || (s->size != 0 && s->bytes[0] == '+') ? 1 : 0;
    char letter;
    if (s->size - i > 2 && s->bytes[i] == '0') {
        letter = (char)(s->bytes[i + 1] | 32);
        if ((letter == 'x' && (base == 16 || base == 0)) ||
            (letter == 'o' && (base == 8 || base == 0)) ||
            (letter == 'b' && (base == 2 || base == 0))) {
            base = letter == 'x' ? 16 : letter == 'o' ? 8 : 2;
            under = s->bytes[i + 2] == '_';
            i += under ? 3 : 2;
        }
    }
    base = base == 0 ? 10 : base;
    if (!ptst__j_digits_read(s->bytes, i, s->size, base, out)) {
        return false;
    }
    *out = minus ? -*out : *out;
    return true;
}

/* float(text) */
static bool ptst__j_text_float(ptst__jrun *r, ptst__jvalue v, double *out) {
    const ptst__jstring *s = ptst__j_strip(r, v, ptst__j_make(PTST__J_MISSING, 0), 3).as.string;
    char text[512];
    size_t i, n = 0, digits = 0, start;
    bool point = false, power = false;
    for (i = 0; i < s->size && n < sizeof text - 1; i++) {
        char ch = s->bytes[i];
        bool between = i > 0 && i + 1 < s->size && s->bytes[i - 1] >= '0' &&
                       s->bytes[i - 1] <= '9' && s->bytes[i + 1] >= '0' && s->bytes[i + 1] <= '9';
        if (ch != '_' || !between) {
            text[n++] = ch >= 'A' && ch <= 'Z' ? (char)(ch + 32) : ch;
        }
    }
    text[n] = 0;
    start = text[0] == '-' || text[0] == '+' ? 1 : 0;
    if (strcmp(text + start, "inf") == 0 || strcmp(text + start, "infinity") == 0) {
        *out = text[0] == '-' ? -HUGE_VAL : HUGE_VAL;
        return true;
    }
    if (strcmp(text + start, "nan") == 0) {
        *out = HUGE_VAL - HUGE_VAL;
        return true;
    }
    for (i = start; i < n; i++) {
        if (text[i] >= '0' && text[i] <= '9') {
            digits++;
        } else if (text[i] == '.' && !point && !power) {
            point = true;
        } else if (text[i] == 'e' && !power && digits != 0) {
            power = true;
            digits = 0;
            i += text[i + 1] == '-' || text[i + 1] == '+';
        } else {
            return false;
        }
    }
    if (digits == 0 || i != n || s->size >= sizeof text) {
        return false;
    }
    *out = ptst__number_read(text + (text[0] == '+'), n - (text[0] == '+'));
    return true;
}

static ptst__jvalue ptst__j_f_int(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                  const ptst__jargs *a) {
    ptst__jvalue fallback = ptst__j_given(p[0]) ? p[0] : ptst__j_int(0, 0);
    int64_t n;
    double f = 0;
    (void)a;
    if (ptst__j_is_int(self)) {
        return ptst__j_int(self.as.integer, self.mark);
    }
    if (self.kind == PTST__J_UNDEFINED) {
        return ptst__j_fail_undefined(r, self);
    }
    if (self.kind == PTST__J_STRING) {
        if (ptst__j_text_int(r, self, ptst__j_need_int(r, p[1], 10), &n)) {
            return ptst__j_int(n, self.mark);
        }
        if (!ptst__j_text_float(r, self, &f) || !(f - f == 0)) {
            return fallback;
        }
    } else if (self.kind == PTST__J_FLOAT) {
        f = self.as.number;
        if (!(f - f == 0)) {
            return f != f ? fallback
                          : ptst__j_fail(r, PTST_ERR_FORMAT, "cannot convert infinity to integer");
        }
    } else {
        return fallback;
    }
    return fabs(f) < 9.2e18 ? ptst__j_int((int64_t)f, self.mark) : ptst__j_fail_big(r);
}

static ptst__jvalue ptst__j_f_float(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                    const ptst__jargs *a) {
    double f = 0;
    (void)a;
    if (self.kind == PTST__J_UNDEFINED) {
        return ptst__j_fail_undefined(r, self);
    }
    if (ptst__j_is_number(self)) {
        return ptst__j_float(ptst__j_double(self), self.mark);
    }
    if (self.kind == PTST__J_STRING && ptst__j_text_float(r, self, &f)) {
        return ptst__j_float(f, self.mark);
    }
    return ptst__j_given(p[0]) ? p[0] : ptst__j_float(0, 0);
}

/* round(f, n) of Python: correctly rounded in decimal, ties by the exact binary value. */
static double ptst__j_round(double f, int64_t n) {
    char text[512];
    double scale, g;
    if (!(f - f == 0) || n > 330) {
        return f;
    }
    if (n >= 0) {
        snprintf(text, sizeof text, "%.*f", (int)n, f);
        return strtod(text, NULL);
    }
    if (n < -308) {
        return f * 0;
    }
    scale = pow(10, (double)-n);
    g = f / scale;
    g = fabs(g - floor(g) - 0.5) < 1e-12 ? 2 * floor(g / 2 + 0.5) : floor(g + 0.5);
    return g * scale;
}

static ptst__jvalue ptst__j_f_round(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                    const ptst__jargs *a) {
    int64_t n = ptst__j_need_int(r, p[0], 0);
    ptst__jvalue method = ptst__j_given(p[1]) ? p[1] : ptst__j_text(r, "common");
    double scale, f;
    (void)a;
    if (method.kind != PTST__J_STRING || !ptst__j_listed("common ceil floor", method.as.string)) {
        return ptst__j_fail(r, PTST_ERR_FORMAT, "method must be common, ceil or floor");
    }
    if (!ptst__j_is_number(self)) {
        return self.kind == PTST__J_UNDEFINED
                   ? ptst__j_fail_undefined(r, self)
                   : ptst__j_fail(r, PTST_ERR_FORMAT, "type %s doesn't define __round__ method",
                                  ptst__j_type(self));
    }
    f = ptst__j_double(self);
    if (method.as.string->bytes[1] == 'o') { /* common */
        if (ptst__j_is_int(self)) {
            return ptst__j_int(n >= 0 ? self.as.integer : (int64_t)ptst__j_round(f, n), self.mark);
        }
        return ptst__j_float(ptst__j_round(f, n), self.mark);
    }
    scale = pow(10, (double)n);
    f = method.as.string->bytes[0] == 'c' ? ceil(f * scale) : floor(f * scale);
    if (!(f - f == 0) || scale == 0) {
        return ptst__j_fail(r, PTST_ERR_FORMAT, "cannot round this number");
    }
    return ptst__j_float(f / scale, self.mark);
}

/* ---- filters of sequences ---- */

static ptst__jvalue ptst__j_f_list(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                   const ptst__jargs *a) {
    (void)p;
    (void)a;
    return ptst__j_collect(r, self, PTST__J_LIST);
}

static ptst__jvalue ptst__j_f_first(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                    const ptst__jargs *a) {
    ptst__jiter i;
    ptst__jvalue item;
    (void)p;
    (void)a;
    if (ptst__j_iter(r, self, &i) && ptst__j_next(r, &i, &item)) {
        return item;
    }
    return ptst__j_undefined(PTST__J_WHY_EMPTY, NULL, 0);
}

static ptst__jvalue ptst__j_f_last(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                   const ptst__jargs *a) {
    ptst__jvalue list;
    (void)p;
    (void)a;
    if (self.kind == PTST__J_ITERATOR || self.kind == PTST__J_UNDEFINED) {
        return ptst__j_fail(r, PTST_ERR_FORMAT, "'%s' object is not reversible",
                            ptst__j_type(self));
    }
    if (ptst__j_length(self) > 0 && self.kind != PTST__J_DICT && self.kind <= PTST__J_RANGE &&
        (self.kind < PTST__J_KEYS || self.kind == PTST__J_RANGE)) {
        return ptst__j_element(r, self, ptst__j_int(-1, 0));
    }
    list = ptst__j_collect(r, self, PTST__J_LIST);
    return r->code == PTST_OK && list.as.list->count != 0
               ? list.as.list->items[list.as.list->count - 1]
               : ptst__j_undefined(PTST__J_WHY_EMPTY, NULL, 0);
}

static ptst__jvalue ptst__j_f_reverse(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                      const ptst__jargs *a) {
    ptst__jvalue out;
    (void)p;
    (void)a;
    if (self.kind == PTST__J_STRING) {
        out = ptst__j_slice(r, self, ptst__j_none(), ptst__j_none(), ptst__j_int(-1, 0));
        return out;
    }
    out = ptst__j_collect(r, self, PTST__J_ITERATOR);
    if (r->code == PTST_OK) {
        ptst__j_reverse_list(out.as.list);
    }
    return out;
}

static ptst__jvalue ptst__j_f_items(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                    const ptst__jargs *a) {
    (void)p;
    (void)a;
    if (self.kind != PTST__J_DICT && self.kind != PTST__J_UNDEFINED) {
        return ptst__j_fail(r, PTST_ERR_FORMAT, "Can only get item pairs from a mapping.");
    }
    self.kind = self.kind == PTST__J_DICT ? (uint8_t)PTST__J_ITEMS : self.kind;
    return ptst__j_collect(r, self, PTST__J_ITERATOR);
}

/* The attribute of a value by a path: "a.b.0", an int, or missing (the value itself). Each part
   that is undefined becomes the default, if one is given. */
static ptst__jvalue ptst__j_path(ptst__jrun *r, ptst__jvalue v, ptst__jvalue path,
                                 ptst__jvalue fallback) {
    const ptst__jstring *s;
    size_t i = 0, from;
    bool use = ptst__j_given(fallback) && fallback.kind != PTST__J_NONE;
    if (!ptst__j_given(path) || path.kind == PTST__J_NONE) {
        return v;
    }
    if (path.kind != PTST__J_STRING) {
        v = ptst__j_getitem(r, v, path);
        return v.kind == PTST__J_UNDEFINED && use ? fallback : v;
    }
    s = path.as.string;
    do {
        ptst__jvalue part;
        for (from = i; i < s->size && s->bytes[i] != '.'; i++) {
        }
        part = ptst__j_sub(r, path, from, i);
        part = ptst__j_all_digits(part.as.string) ? ptst__j_index_of(r, part.as.string) : part;
        v = ptst__j_getitem(r, v, part);
        v = v.kind == PTST__J_UNDEFINED && use ? fallback : v;
    } while (i++ < s->size && r->code == PTST_OK);
    return v;
}

/* What case-insensitive comparison looks at. */
static ptst__jvalue ptst__j_fold(ptst__jrun *r, ptst__jvalue v, ptst__jvalue case_sensitive) {
    return v.kind == PTST__J_STRING && !ptst__j_true(r, case_sensitive)
               ? ptst__j_case(r, v, PTST__J_LOWER)
               : v;
}

/* The value as a list that is new or not changed. */
static ptst__jvalue ptst__j_as_list(ptst__jrun *r, ptst__jvalue v) {
    if (v.kind == PTST__J_LIST || v.kind == PTST__J_TUPLE) {
        return v;
    }
    return ptst__j_collect(r, v, PTST__J_LIST);
}

static ptst__jvalue ptst__j_f_sort(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                   const ptst__jargs *a) {
    ptst__jvalue list = ptst__j_as_list(r, self), keys = ptst__j_list(r, PTST__J_LIST, NULL, 0);
    ptst__jvalue none = ptst__j_make(PTST__J_MISSING, 0);
    size_t i, k, from;
    (void)a;
    for (i = 0; r->code == PTST_OK && i < list.as.list->count; i++) {
        ptst__jvalue item = list.as.list->items[i], key;
        if (p[2].kind != PTST__J_STRING) {
            key = ptst__j_fold(r, ptst__j_path(r, item, p[2], none), p[1]);
        } else { /* several attributes: "a,b" */
            const ptst__jstring *s = p[2].as.string;
            key = ptst__j_list(r, PTST__J_LIST, NULL, 0);
            for (k = from = 0; k <= s->size; k++) {
                if (k == s->size || s->bytes[k] == ',') {
                    ptst__jvalue part = ptst__j_path(r, item, ptst__j_sub(r, p[2], from, k), none);
                    ptst__j_push(r, key, ptst__j_fold(r, part, p[1]));
                    from = k + 1;
                }
            }
        }
        ptst__j_push(r, keys, key);
    }
    return r->code == PTST_OK ? ptst__j_sorted(r, keys, list, ptst__j_true(r, p[0])) : self;
}

static ptst__jvalue ptst__j_f_dictsort(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                       const ptst__jargs *a) {
    ptst__jvalue keys = ptst__j_list(r, PTST__J_LIST, NULL, 0),
                 pairs = ptst__j_list(r, PTST__J_LIST, NULL, 0);
    bool value = false;
    size_t i;
    (void)a;
    if (ptst__j_given(p[1])) {
        if (p[1].kind != PTST__J_STRING || !ptst__j_listed("key value", p[1].as.string)) {
            return ptst__j_fail(r, PTST_ERR_FORMAT,
                                "You can only sort by either \"key\" or "
                                "\"value\"");
        }
        value = p[1].as.string->bytes[0] == 'v';
    }
    if (self.kind != PTST__J_DICT) {
        return self.kind == PTST__J_UNDEFINED
                   ? ptst__j_fail_undefined(r, self)
                   : ptst__j_fail(r, PTST_ERR_FORMAT, "'%s' object has no attribute 'items'",
                                  ptst__j_type(self));
    }
    for (i = 0; i < self.as.dict->count && r->code == PTST_OK; i++) {
        const ptst__jpair *pair = &self.as.dict->pairs[i];
        ptst__j_push(r, keys, ptst__j_fold(r, value ? pair->value : pair->key, p[0]));
        ptst__j_push(r, pairs, ptst__j_pair(r, pair->key, pair->value));
    }
    return r->code == PTST_OK ? ptst__j_sorted(r, keys, pairs, ptst__j_true(r, p[2])) : self;
}

static ptst__jvalue ptst__j_f_unique(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                     const ptst__jargs *a) {
    ptst__jvalue out = ptst__j_list(r, PTST__J_ITERATOR, NULL, 0), item;
    ptst__jvalue seen = ptst__j_list(r, PTST__J_LIST, NULL, 0);
    ptst__jiter i;
    (void)a;
    if (ptst__j_iter(r, self, &i)) {
        while (ptst__j_next(r, &i, &item)) {
            ptst__jvalue key = ptst__j_path(r, item, p[1], ptst__j_make(PTST__J_MISSING, 0));
            key = ptst__j_fold(r, key, p[0]);
            if (key.kind == PTST__J_LIST || key.kind == PTST__J_DICT) {
                ptst__j_fail(r, PTST_ERR_FORMAT, "unhashable type: '%s'", ptst__j_type(key));
            } else if (!ptst__j_contains(r, seen, key)) {
                ptst__j_push(r, seen, key);
                ptst__j_push(r, out, item);
            }
        }
    }
    return out;
}

/* min (sign -1) and max (1) */
static ptst__jvalue ptst__j_extreme(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                    int sign) {
    ptst__jvalue best = ptst__j_undefined(PTST__J_WHY_EMPTY, NULL, 0), item, key, best_key = best;
    ptst__jiter i;
    bool any = false;
    if (ptst__j_iter(r, self, &i)) {
        while (ptst__j_next(r, &i, &item)) {
            key = ptst__j_path(r, item, p[1], ptst__j_make(PTST__J_MISSING, 0));
            key = ptst__j_fold(r, key, p[0]);
            if (!any || ptst__j_compare(r, key, best_key) == sign) {
                best = item;
                best_key = key;
            }
            any = true;
        }
    }
    return best;
}

static ptst__jvalue ptst__j_f_min(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                  const ptst__jargs *a) {
    (void)a;
    return ptst__j_extreme(r, self, p, -1);
}

static ptst__jvalue ptst__j_f_max(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                  const ptst__jargs *a) {
    (void)a;
    return ptst__j_extreme(r, self, p, 1);
}

static ptst__jvalue ptst__j_f_sum(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                  const ptst__jargs *a) {
    ptst__jvalue sum = ptst__j_given(p[1]) ? p[1] : ptst__j_int(0, 0), item;
    ptst__jiter i;
    (void)a;
    if (sum.kind == PTST__J_STRING) {
        return ptst__j_fail(r, PTST_ERR_FORMAT, "sum() can't sum strings");
    }
    if (ptst__j_iter(r, self, &i)) {
        while (ptst__j_next(r, &i, &item)) {
            item = ptst__j_path(r, item, p[0], ptst__j_make(PTST__J_MISSING, 0));
            sum = ptst__j_binary(r, '+', sum, item);
        }
    }
    return sum;
}

static ptst__jvalue ptst__j_f_join(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                   const ptst__jargs *a) {
    ptst__jvalue list = self, item, separator;
    ptst__jiter i;
    (void)a;
    separator = ptst__j_given(p[0]) ? ptst__j_plain(r, p[0]) : ptst__j_text(r, "");
    if (ptst__j_given(p[1]) && p[1].kind != PTST__J_NONE) {
        list = ptst__j_list(r, PTST__J_LIST, NULL, 0);
        if (ptst__j_iter(r, self, &i)) {
            while (ptst__j_next(r, &i, &item)) {
                ptst__j_push(r, list,
                             ptst__j_path(r, item, p[1], ptst__j_make(PTST__J_MISSING, 0)));
            }
        }
    }
    return ptst__j_join(r, separator, list, true);
}

/* Lists of n elements; the last one is filled up if `fill` is given. */
static ptst__jvalue ptst__j_f_batch(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                    const ptst__jargs *a) {
    ptst__jvalue out = ptst__j_list(r, PTST__J_ITERATOR, NULL, 0), item, part = ptst__j_none();
    int64_t n = ptst__j_need_int(r, p[0], 0), k = 0;
    ptst__jiter i;
    (void)a;
    if (ptst__j_iter(r, self, &i)) {
        while (ptst__j_next(r, &i, &item)) {
            if (k == 0 || k == n) {
                part = ptst__j_list(r, PTST__J_LIST, NULL, 0);
                ptst__j_push(r, out, part);
                k = 0;
            }
            ptst__j_push(r, part, item);
            k++;
        }
    }
    if (k != 0 && ptst__j_given(p[1]) && p[1].kind != PTST__J_NONE) {
        for (; k < n && ptst__j_pay(r, 1); k++) {
            ptst__j_push(r, part, p[1]);
        }
    }
    return out;
}

/* n lists. */
static ptst__jvalue ptst__j_f_slice(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                    const ptst__jargs *a) {
    ptst__jvalue out = ptst__j_list(r, PTST__J_ITERATOR, NULL, 0), part;
    ptst__jvalue list = ptst__j_as_list(r, self);
    int64_t n = ptst__j_need_int(r, p[0], 0), i;
    size_t k = 0, size, extra;
    bool fill = ptst__j_given(p[1]) && p[1].kind != PTST__J_NONE;
    (void)a;
    if (r->code != PTST_OK || n == 0) {
        return ptst__j_fail(r, PTST_ERR_FORMAT, "division by zero");
    }
    size = n < 0 ? 0 : list.as.list->count / (size_t)n;
    extra = n < 0 ? 0 : list.as.list->count % (size_t)n;
    for (i = 0; i < n && ptst__j_pay(r, 1); i++) {
        size_t end = k + size + ((size_t)i < extra ? 1 : 0);
        part = ptst__j_list(r, PTST__J_LIST, NULL, 0);
        for (; k < end; k++) {
            ptst__j_push(r, part, list.as.list->items[k]);
        }
        if (fill && (size_t)i >= extra) {
            ptst__j_push(r, part, p[1]);
        }
        ptst__j_push(r, out, part);
    }
    return out;
}

static ptst__jvalue ptst__j_f_groupby(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                      const ptst__jargs *a) {
    ptst__jvalue list = ptst__j_as_list(r, self), keys = ptst__j_list(r, PTST__J_LIST, NULL, 0);
    ptst__jvalue order = ptst__j_list(r, PTST__J_LIST, NULL, 0), group = ptst__j_none();
    ptst__jvalue out = ptst__j_list(r, PTST__J_LIST, NULL, 0), last = group;
    size_t i;
    (void)a;
    for (i = 0; r->code == PTST_OK && i < list.as.list->count; i++) {
        ptst__jvalue key = ptst__j_path(r, list.as.list->items[i], p[0], p[1]);
        ptst__j_push(r, keys, ptst__j_fold(r, key, p[2]));
        ptst__j_push(r, order, ptst__j_int((int64_t)i, 0));
    }
    order = r->code == PTST_OK ? ptst__j_sorted(r, keys, order, false) : order;
    for (i = 0; r->code == PTST_OK && i < order.as.list->count; i++) {
        int64_t at = order.as.list->items[i].as.integer;
        ptst__jvalue item = list.as.list->items[at], key = keys.as.list->items[at];
        if (i == 0 || !ptst__j_equal(r, last, key)) {
            ptst__jvalue shown = ptst__j_path(r, item, p[0], p[1]), pair;
            group = ptst__j_list(r, PTST__J_LIST, NULL, 0);
            pair = ptst__j_pair(r, shown, group);
            pair.flag = 1;
            ptst__j_push(r, out, pair);
            last = key;
        }
        ptst__j_push(r, group, item);
    }
    return out;
}

/* tojson of transformers: json.dumps, where Jinja2's own would escape HTML. */
static ptst__jvalue ptst__j_f_tojson(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                     const ptst__jargs *a) {
    ptst__jsink o = {NULL, NULL, 0, 0};
    ptst__jdump d;
    bool separators = ptst__j_given(p[2]) && p[2].kind != PTST__J_NONE;
    (void)a;
    d.o = &o;
    d.ascii = ptst__j_true(r, p[0]);
    d.indent = ptst__j_make(PTST__J_MISSING, 0);
    d.sort = ptst__j_true(r, p[3]);
    if (p[1].kind == PTST__J_STRING) {
        d.indent = p[1];
    } else if (ptst__j_given(p[1]) && p[1].kind != PTST__J_NONE) {
        d.indent = ptst__j_repeat(r, ptst__j_text(r, " "), ptst__j_need_int(r, p[1], 0));
    }
    d.between = ptst__j_text(r, ptst__j_given(d.indent) ? "," : ", ");
    d.after_key = ptst__j_text(r, ": ");
    if (separators) {
        ptst__jvalue list = ptst__j_as_list(r, p[2]);
        if (r->code != PTST_OK || list.as.list->count != 2 ||
            list.as.list->items[0].kind != PTST__J_STRING ||
            list.as.list->items[1].kind != PTST__J_STRING) {
            return ptst__j_fail(r, PTST_ERR_FORMAT, "separators must be two strings");
        }
        d.between = list.as.list->items[0];
        d.after_key = list.as.list->items[1];
    }
    ptst__j_dump(r, &d, self, 0);
    return ptst__j_sink_string(r, &o);
}

/* ---- tests ---- */

static ptst__jvalue ptst__j_t_kind(ptst__jvalue self, ptst__jkind kind) {
    return ptst__j_bool(self.kind == (uint8_t)kind);
}

/* What ptst__j_compare says of two numbers: 2 if one of them is NaN. */
static bool ptst__j_at_least(int order) { return order == 0 || order == 1; }

static bool ptst__j_at_most(int order) { return order <= 0; }

#define PTST__J_TEST(name, result)                                                                 \
    static ptst__jvalue ptst__j_t_##name(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,  \
                                         const ptst__jargs *a) {                                   \
        (void)r;                                                                                   \
        (void)p;                                                                                   \
        (void)a;                                                                                   \
        return result;                                                                             \
    }

PTST__J_TEST(defined, ptst__j_bool(self.kind != PTST__J_UNDEFINED))
PTST__J_TEST(undefined, ptst__j_t_kind(self, PTST__J_UNDEFINED))
PTST__J_TEST(none, ptst__j_t_kind(self, PTST__J_NONE))
PTST__J_TEST(boolean, ptst__j_t_kind(self, PTST__J_BOOL))
PTST__J_TEST(true, ptst__j_bool(self.kind == PTST__J_BOOL && self.as.integer != 0))
PTST__J_TEST(false, ptst__j_bool(self.kind == PTST__J_BOOL && self.as.integer == 0))
PTST__J_TEST(integer, ptst__j_t_kind(self, PTST__J_INT))
PTST__J_TEST(float, ptst__j_t_kind(self, PTST__J_FLOAT))
PTST__J_TEST(number, ptst__j_bool(ptst__j_is_number(self)))
PTST__J_TEST(string, ptst__j_t_kind(self, PTST__J_STRING))
PTST__J_TEST(mapping, ptst__j_t_kind(self, PTST__J_DICT))
PTST__J_TEST(iterable, ptst__j_bool(ptst__j_iterable(self)))
PTST__J_TEST(escaped, ptst__j_bool(self.kind == PTST__J_STRING && self.flag != 0))
PTST__J_TEST(in, ptst__j_bool(ptst__j_contains(r, p[0], self)))
PTST__J_TEST(eq, ptst__j_bool(ptst__j_equal(r, self, p[0])))
PTST__J_TEST(ne, ptst__j_bool(!ptst__j_equal(r, self, p[0])))
PTST__J_TEST(lt, ptst__j_bool(ptst__j_compare(r, self, p[0]) == -1))
PTST__J_TEST(gt, ptst__j_bool(ptst__j_compare(r, self, p[0]) == 1))
PTST__J_TEST(le, ptst__j_bool(ptst__j_at_most(ptst__j_compare(r, self, p[0]))))
PTST__J_TEST(ge, ptst__j_bool(ptst__j_at_least(ptst__j_compare(r, self, p[0]))))
PTST__J_TEST(lower, ptst__j_bool(ptst__j_all(r, ptst__j_str(r, self).as.string, PTST__J_IS_LOWER)))
PTST__J_TEST(upper, ptst__j_bool(ptst__j_all(r, ptst__j_str(r, self).as.string, PTST__J_IS_UPPER)))

#undef PTST__J_TEST

static ptst__jvalue ptst__j_t_sequence(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                       const ptst__jargs *a) {
    (void)r;
    (void)p;
    (void)a;
    return ptst__j_bool(self.kind == PTST__J_UNDEFINED || self.kind == PTST__J_STRING ||
                        self.kind == PTST__J_LIST || self.kind == PTST__J_TUPLE ||
                        self.kind == PTST__J_DICT || self.kind == PTST__J_RANGE);
}

static ptst__jvalue ptst__j_t_callable(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                       const ptst__jargs *a) {
    (void)r;
    (void)p;
    (void)a;
    return ptst__j_bool(self.kind == PTST__J_UNDEFINED || self.kind == PTST__J_MACRO ||
                        self.kind == PTST__J_FUNCTION || self.kind == PTST__J_METHOD ||
                        self.kind == PTST__J_LOOP || self.kind == PTST__J_JOINER);
}

/* Python's "is": the same object. None, booleans and small integers exist once. */
static ptst__jvalue ptst__j_t_sameas(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                     const ptst__jargs *a) {
    bool same = self.kind == p[0].kind;
    (void)a;
    if (same && self.kind >= PTST__J_LIST) {
        same = self.as.dict == p[0].as.dict;
    } else if (same) {
        same = self.kind != PTST__J_UNDEFINED && ptst__j_equal(r, self, p[0]);
    }
    return ptst__j_bool(same);
}

static const ptst__jbuiltin *ptst__j_filter_of(const ptst__jstring *name);
static const ptst__jbuiltin *ptst__j_test_of(const ptst__jstring *name);

/* Is there a filter (test) of this name? */
static ptst__jvalue ptst__j_t_filter(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                     const ptst__jargs *a) {
    (void)r;
    (void)p;
    (void)a;
    return ptst__j_bool(self.kind == PTST__J_STRING && ptst__j_filter_of(self.as.string) != NULL);
}

static ptst__jvalue ptst__j_t_test(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                   const ptst__jargs *a) {
    (void)r;
    (void)p;
    (void)a;
    return ptst__j_bool(self.kind == PTST__J_STRING && ptst__j_test_of(self.as.string) != NULL);
}

/* value % n, for odd, even, divisibleby */
static int64_t ptst__j_modulo(ptst__jrun *r, ptst__jvalue v, ptst__jvalue n) {
    ptst__jvalue m = ptst__j_binary(r, '%', v, n);
    return m.kind == PTST__J_FLOAT ? (m.as.number == 0   ? 0
                                      : m.as.number == 1 ? 1
                                                         : 2)
           : ptst__j_is_int(m)     ? m.as.integer
                                   : 2;
}

static ptst__jvalue ptst__j_t_odd(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                  const ptst__jargs *a) {
    (void)p;
    (void)a;
    return ptst__j_bool(ptst__j_modulo(r, self, ptst__j_int(2, 0)) == 1);
}

static ptst__jvalue ptst__j_t_even(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                   const ptst__jargs *a) {
    (void)p;
    (void)a;
    return ptst__j_bool(ptst__j_modulo(r, self, ptst__j_int(2, 0)) == 0);
}

static ptst__jvalue ptst__j_t_divisibleby(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                          const ptst__jargs *a) {
    (void)a;
    return ptst__j_bool(ptst__j_modulo(r, self, p[0]) == 0);
}

static const ptst__jbuiltin ptst__j_tests[] = {
    {"!=", "!other", ptst__j_t_ne},       {"<", "!other", ptst__j_t_lt},
    {"<=", "!other", ptst__j_t_le},       {"==", "!other", ptst__j_t_eq},
    {">", "!other", ptst__j_t_gt},        {">=", "!other", ptst__j_t_ge},
    {"boolean", "", ptst__j_t_boolean},   {"callable", "", ptst__j_t_callable},
    {"defined", "", ptst__j_t_defined},   {"divisibleby", "!num", ptst__j_t_divisibleby},
    {"eq", "!other", ptst__j_t_eq},       {"equalto", "!other", ptst__j_t_eq},
    {"escaped", "", ptst__j_t_escaped},   {"even", "", ptst__j_t_even},
    {"false", "", ptst__j_t_false},       {"filter", "", ptst__j_t_filter},
    {"float", "", ptst__j_t_float},       {"test", "", ptst__j_t_test},
    {"ge", "!other", ptst__j_t_ge},       {"greaterthan", "!other", ptst__j_t_gt},
    {"gt", "!other", ptst__j_t_gt},       {"in", "!seq", ptst__j_t_in},
    {"integer", "", ptst__j_t_integer},   {"iterable", "", ptst__j_t_iterable},
    {"le", "!other", ptst__j_t_le},       {"lessthan", "!other", ptst__j_t_lt},
    {"lower", "", ptst__j_t_lower},       {"lt", "!other", ptst__j_t_lt},
    {"mapping", "", ptst__j_t_mapping},   {"ne", "!other", ptst__j_t_ne},
    {"none", "", ptst__j_t_none},         {"number", "", ptst__j_t_number},
    {"odd", "", ptst__j_t_odd},           {"sameas", "!other", ptst__j_t_sameas},
    {"sequence", "", ptst__j_t_sequence}, {"string", "", ptst__j_t_string},
    {"true", "", ptst__j_t_true},         {"undefined", "", ptst__j_t_undefined},
    {"upper", "", ptst__j_t_upper},       {NULL, NULL, NULL}};

static const ptst__jbuiltin *ptst__j_test_of(const ptst__jstring *name) {
    return ptst__j_lookup(ptst__j_tests, name);
}

/* ---- filters that use filters and tests ---- */

/* The arguments from number `skip` on. */
static ptst__jargs ptst__j_rest(const ptst__jargs *a, size_t skip) {
    ptst__jargs out = *a;
    out.values += skip;
    out.count -= skip;
    return out;
}

/* map("filter", ...) or map(attribute="path", default=...) */
static ptst__jvalue ptst__j_f_map(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                  const ptst__jargs *a) {
    ptst__jvalue out = ptst__j_list(r, PTST__J_ITERATOR, NULL, 0), item;
    ptst__jvalue path = ptst__j_make(PTST__J_MISSING, 0), fallback = path;
    const ptst__jbuiltin *f = NULL;
    ptst__jargs rest;
    ptst__jiter i;
    size_t k;
    (void)p;
    memset(&rest, 0, sizeof rest);
    if (!ptst__j_true(r, self)) {
        return out;
    }
    for (k = 0; k < a->named_count && a->count == 0; k++) {
        path = ptst__j_same_text(a->named[k].name, "attribute") ? a->named[k].value : path;
        fallback = ptst__j_same_text(a->named[k].name, "default") ? a->named[k].value : fallback;
    }
    if (ptst__j_given(path) &&
        a->named_count != 1 + (ptst__j_given(fallback) ? (size_t)1 : (size_t)0)) {
        return ptst__j_fail(r, PTST_ERR_FORMAT, "map: an unexpected keyword argument");
    }
    if (!ptst__j_given(path)) {
        if (a->count == 0) {
            return ptst__j_fail(r, PTST_ERR_FORMAT, "map requires a filter argument");
        }
        f = a->values[0].kind == PTST__J_STRING ? ptst__j_filter_of(a->values[0].as.string) : NULL;
        if (f == NULL) {
            return ptst__j_fail(r, PTST_ERR_FORMAT, "map: there is no such filter");
        }
        rest = ptst__j_rest(a, 1);
    }
    if (ptst__j_iter(r, self, &i)) {
        while (ptst__j_next(r, &i, &item)) {
            ptst__j_push(r, out,
                         f == NULL ? ptst__j_path(r, item, path, fallback)
                                   : ptst__j_call_builtin(r, f, item, &rest));
        }
    }
    return out;
}

/* select, reject, selectattr, rejectattr: elements whose value (attribute) passes a test. */
static ptst__jvalue ptst__j_pick(ptst__jrun *r, ptst__jvalue self, const ptst__jargs *a,
                                 bool attribute, bool wanted) {
    ptst__jvalue out = ptst__j_list(r, PTST__J_ITERATOR, NULL, 0), item;
    ptst__jvalue path = ptst__j_make(PTST__J_MISSING, 0), none = path;
    const ptst__jbuiltin *test = NULL;
    size_t off = attribute ? 1 : 0;
    ptst__jargs rest;
    ptst__jiter i;
    memset(&rest, 0, sizeof rest);
    if (!ptst__j_true(r, self)) {
        return out;
    }
    if (attribute) {
        if (a->count == 0) {
            return ptst__j_fail(r, PTST_ERR_FORMAT, "Missing parameter for attribute name");
        }
        path = a->values[0];
    }
    if (a->count > off) {
        test = a->values[off].kind == PTST__J_STRING ? ptst__j_test_of(a->values[off].as.string)
                                                     : NULL;
        if (test == NULL) {
            return ptst__j_fail(r, PTST_ERR_FORMAT, "there is no such test");
        }
        rest = ptst__j_rest(a, off + 1);
    }
    if (ptst__j_iter(r, self, &i)) {
        while (ptst__j_next(r, &i, &item)) {
            ptst__jvalue v = ptst__j_path(r, item, path, none);
            if (test != NULL) {
                v = ptst__j_call_builtin(r, test, v, &rest);
            }
            if (ptst__j_true(r, v) == wanted) {
                ptst__j_push(r, out, item);
            }
        }
    }
    return out;
}

static ptst__jvalue ptst__j_f_select(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                     const ptst__jargs *a) {
    (void)p;
    return ptst__j_pick(r, self, a, false, true);
}

static ptst__jvalue ptst__j_f_reject(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                     const ptst__jargs *a) {
    (void)p;
    return ptst__j_pick(r, self, a, false, false);
}

static ptst__jvalue ptst__j_f_selectattr(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                         const ptst__jargs *a) {
    (void)p;
    return ptst__j_pick(r, self, a, true, true);
}

static ptst__jvalue ptst__j_f_rejectattr(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                         const ptst__jargs *a) {
    (void)p;
    return ptst__j_pick(r, self, a, true, false);
}

static ptst__jvalue ptst__j_f_refused(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                      const ptst__jargs *a) {
    (void)self;
    (void)p;
    (void)a;
    return ptst__j_fail(r, PTST_ERR_UNSUPPORTED, "a filter of Jinja2 that is not supported");
}

static const ptst__jbuiltin ptst__j_filters[] = {
    {"abs", "", ptst__j_f_abs},
    {"attr", "!name", ptst__j_f_attr},
    {"batch", "!linecount fill_with", ptst__j_f_batch},
    {"capitalize", "", ptst__j_f_capitalize},
    {"center", "width", ptst__j_f_center},
    {"count", "", ptst__j_f_length},
    {"d", "default_value boolean", ptst__j_f_default},
    {"default", "default_value boolean", ptst__j_f_default},
    {"dictsort", "case_sensitive by reverse", ptst__j_f_dictsort},
    {"e", "", ptst__j_f_escape},
    {"escape", "", ptst__j_f_escape},
    {"filesizeformat", NULL, ptst__j_f_refused},
    {"first", "", ptst__j_f_first},
    {"float", "default", ptst__j_f_float},
    {"forceescape", "", ptst__j_f_forceescape},
    {"format", NULL, ptst__j_f_format},
    {"groupby", "!attribute default case_sensitive", ptst__j_f_groupby},
    {"indent", "width first blank", ptst__j_f_indent},
    {"int", "default base", ptst__j_f_int},
    {"items", "", ptst__j_f_items},
    {"join", "d attribute", ptst__j_f_join},
    {"last", "", ptst__j_f_last},
    {"length", "", ptst__j_f_length},
    {"list", "", ptst__j_f_list},
    {"lower", "", ptst__j_f_lower},
    {"map", NULL, ptst__j_f_map},
    {"max", "case_sensitive attribute", ptst__j_f_max},
    {"min", "case_sensitive attribute", ptst__j_f_min},
    {"pprint", NULL, ptst__j_f_refused},
    {"random", NULL, ptst__j_f_refused},
    {"reject", NULL, ptst__j_f_reject},
    {"rejectattr", NULL, ptst__j_f_rejectattr},
    {"replace", "!old !new count", ptst__j_f_replace},
    {"reverse", "", ptst__j_f_reverse},
    {"round", "precision method", ptst__j_f_round},
    {"safe", "", ptst__j_f_safe},
    {"select", NULL, ptst__j_f_select},
    {"selectattr", NULL, ptst__j_f_selectattr},
    {"slice", "!slices fill_with", ptst__j_f_slice},
    {"sort", "reverse case_sensitive attribute", ptst__j_f_sort},
    {"string", "", ptst__j_f_string},
    {"striptags", NULL, ptst__j_f_refused},
    {"sum", "attribute start", ptst__j_f_sum},
    {"title", "", ptst__j_f_title},
    {"tojson", "ensure_ascii indent separators sort_keys", ptst__j_f_tojson},
    {"trim", "chars", ptst__j_f_trim},
    {"truncate", "length killwords end leeway", ptst__j_f_truncate},
    {"unique", "case_sensitive attribute", ptst__j_f_unique},
    {"upper", "", ptst__j_f_upper},
    {"urlencode", NULL, ptst__j_f_refused},
    {"urlize", NULL, ptst__j_f_refused},
    {"wordcount", "", ptst__j_f_wordcount},
    {"wordwrap", NULL, ptst__j_f_refused},
    {"xmlattr", NULL, ptst__j_f_refused},
    {NULL, NULL, NULL}};

static const ptst__jbuiltin *ptst__j_filter_of(const ptst__jstring *name) {
    return ptst__j_lookup(ptst__j_filters, name);
}

/* ---- global functions ---- */

static ptst__jvalue ptst__j_g_range(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                    const ptst__jargs *a) {
    enum { RANGE_MAX = 100000 }; /* MAX_RANGE of the sandbox */
    ptst__jrange *g = (ptst__jrange *)ptst__j_alloc(r, 1, sizeof *g);
    uint64_t distance, step;
    (void)p;
    if (a->count < 1 || a->count > 3 || a->named_count != 0) {
        return ptst__j_fail(r, PTST_ERR_FORMAT, "range expected 1 to 3 arguments");
    }
    if (g == NULL) {
        return ptst__j_none();
    }
    if (a->values[0].kind == PTST__J_NONE || (a->count > 1 && a->values[1].kind == PTST__J_NONE)) {
        return ptst__j_fail(r, PTST_ERR_FORMAT,
                            "'NoneType' object cannot be interpreted as an integer");
    }
    g->start = a->count > 1 ? ptst__j_need_int(r, a->values[0], 0) : 0;
    g->stop = ptst__j_need_int(r, a->values[a->count > 1 ? 1 : 0], 0);
    g->step = a->count > 2 ? ptst__j_need_int(r, a->values[2], 0) : 1;
    if (g->step == 0) {
        return ptst__j_fail(r, PTST_ERR_FORMAT, "range() arg 3 must not be zero");
    }
    if (g->step > 0 ? g->stop > g->start : g->stop < g->start) {
        distance = g->step > 0 ? (uint64_t)g->stop - (uint64_t)g->start
                               : (uint64_t)g->start - (uint64_t)g->stop;
        step = g->step > 0 ? (uint64_t)g->step : 0 - (uint64_t)g->step;
        distance = (distance - 1) / step + 1;
        if (distance > RANGE_MAX) {
            return ptst__j_fail(r, PTST_ERR_LIMIT, "range() of more than %d elements",
                                (int)RANGE_MAX);
        }
        g->count = (size_t)distance;
    }
    self = ptst__j_make(PTST__J_RANGE, 0);
    self.as.range = g;
    return self;
}

/* dict(pairs or mapping, name=value, ...) and namespace(...) */
static ptst__jvalue ptst__j_build_dict(ptst__jrun *r, ptst__jkind kind, const ptst__jargs *a) {
    ptst__jvalue out = ptst__j_dict(r, kind), item, pair;
    ptst__jiter i;
    size_t k;
    if (a->count > 1) {
        return ptst__j_fail(r, PTST_ERR_FORMAT, "expected at most 1 argument, got %d",
                            (int)a->count);
    }
    if (a->count == 1 && a->values[0].kind == PTST__J_DICT) {
        const ptst__jdict *d = a->values[0].as.dict;
        for (k = 0; k < d->count && r->code == PTST_OK; k++) {
            ptst__j_dict_put(r, out, d->pairs[k].key, d->pairs[k].value);
        }
        out.mark = a->values[0].mark;
    } else if (a->count == 1 && ptst__j_iter(r, a->values[0], &i)) {
        while (ptst__j_next(r, &i, &item)) {
            pair = ptst__j_collect(r, item, PTST__J_LIST);
            if (r->code == PTST_OK && pair.as.list->count == 2) {
                ptst__j_dict_put(r, out, pair.as.list->items[0], pair.as.list->items[1]);
            } else {
                ptst__j_fail(r, PTST_ERR_FORMAT, "an element of the sequence is not a pair");
            }
        }
    }
    for (k = 0; k < a->named_count; k++) {
        const ptst__jstring *n = a->named[k].name;
        ptst__j_dict_put(r, out, ptst__j_string(r, n->bytes, n->size, NULL, 0), a->named[k].value);
    }
    for (k = 0; kind == PTST__J_NAMESPACE && r->code == PTST_OK && k < out.as.dict->count; k++) {
        ptst__jvalue key = out.as.dict->pairs[k].key;
        if (key.kind == PTST__J_STRING && key.as.string->size != 0 &&
            key.as.string->bytes[0] == '_') {
            ptst__j_fail(r, PTST_ERR_FORMAT, "a namespace cannot hold names that begin with _");
        }
    }
    return out;
}

static ptst__jvalue ptst__j_g_dict(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                   const ptst__jargs *a) {
    (void)self;
    (void)p;
    return ptst__j_build_dict(r, PTST__J_DICT, a);
}

static ptst__jvalue ptst__j_g_namespace(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                        const ptst__jargs *a) {
    (void)self;
    (void)p;
    return ptst__j_build_dict(r, PTST__J_NAMESPACE, a);
}

static ptst__jvalue ptst__j_g_cycler(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                     const ptst__jargs *a) {
    ptst__jcycle *y = (ptst__jcycle *)ptst__j_alloc(r, 1, sizeof *y);
    (void)p;
    if (a->count == 0 || a->named_count != 0) {
        return ptst__j_fail(r, PTST_ERR_FORMAT, "at least one item has to be provided");
    }
    self = ptst__j_make(PTST__J_CYCLER, 0);
    self.as.cycle = y;
    if (y == NULL) {
        return ptst__j_none();
    }
    y->items.items = a->values;
    y->items.count = a->count;
    return self;
}

static ptst__jvalue ptst__j_g_joiner(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                     const ptst__jargs *a) {
    ptst__jcycle *y = (ptst__jcycle *)ptst__j_alloc(r, 1, sizeof *y);
    ptst__jvalue *item = (ptst__jvalue *)ptst__j_alloc(r, 1, sizeof *item);
    (void)a;
    if (y == NULL || item == NULL) {
        return ptst__j_none();
    }
    *item = ptst__j_given(p[0]) ? p[0] : ptst__j_text(r, ", ");
    y->items.items = item;
    y->items.count = 1;
    self = ptst__j_make(PTST__J_JOINER, 0);
    self.as.cycle = y;
    return self;
}

static ptst__jvalue ptst__j_g_raise(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                    const ptst__jargs *a) {
    ptst__jvalue text = ptst__j_str(r, p[0]);
    const ptst__jstring *s = text.as.string;
    (void)self;
    (void)a;
    return ptst__j_fail(r, PTST_ERR_MISMATCH, "%.*s", s->size > 400 ? 400 : (int)s->size, s->bytes);
}

/* Appends one conversion of strftime; letters that C and Python share. */
static void ptst__j_put_time(ptst__jrun *r, ptst__jsink *o, const char *conversion,
                             const struct tm *t) {
    char text[128];
    size_t n = strftime(text, sizeof text, conversion, t);
    ptst__j_put(r, o, text, n, NULL, 0);
}

static ptst__jvalue ptst__j_g_strftime(ptst__jrun *r, ptst__jvalue self, const ptst__jvalue *p,
                                       const ptst__jargs *a) {
    const ptst__jstring *s = ptst__j_need_string(r, p[0], "strftime_now: the format");
    time_t now = r->now == 0 ? time(NULL) : (time_t)r->now;
    ptst__jsink o = {NULL, NULL, 0, 0};
    struct tm t;
    char conversion[4];
    size_t i, plain = 0, n;
    (void)self;
    (void)a;
    memset(&t, 0, sizeof t);
    if (s == NULL || (r->now == 0 ? localtime_r(&now, &t) : gmtime_r(&now, &t)) == NULL) {
        return ptst__j_fail(r, PTST_ERR_FORMAT, "strftime_now: the clock cannot be read");
    }
    for (i = 0; i < s->size && r->code == PTST_OK; i++) {
        if (s->bytes[i] != '%') {
            continue;
        }
        ptst__j_put_sub(r, &o, p[0], plain, i);
        n = 0;
        conversion[n++] = '%';
        i++;
        if (i < s->size && (s->bytes[i] == '-' || s->bytes[i] == '_' || s->bytes[i] == '0')) {
            conversion[n++] = s->bytes[i++];
        }
        if (i >= s->size || s->bytes[i] == 0 ||
            strchr("aAbBcCdDeFgGhHIjkmMnprRStTuUVwWxXyY%lPs", s->bytes[i]) == NULL) {
            return ptst__j_fail(r, PTST_ERR_UNSUPPORTED, "strftime_now: an unknown conversion");
        }
        conversion[n++] = s->bytes[i];
        conversion[n] = 0;
        ptst__j_put_time(r, &o, conversion, &t);
        plain = i + 1;
    }
    ptst__j_put_sub(r, &o, p[0], plain, s->size);
    return ptst__j_sink_string(r, &o);
}

static const ptst__jbuiltin ptst__j_globals[] = {{"range", NULL, ptst__j_g_range},
                                                 {"dict", NULL, ptst__j_g_dict},
                                                 {"namespace", NULL, ptst__j_g_namespace},
                                                 {"cycler", NULL, ptst__j_g_cycler},
                                                 {"joiner", "sep", ptst__j_g_joiner},
                                                 {"raise_exception", "!message", ptst__j_g_raise},
                                                 {"strftime_now", "!format", ptst__j_g_strftime},
                                                 {NULL, NULL, NULL}};

/* ---- lexer ----
   Source is text with {{ }}, {% %}, {# #} in it. Whitespace around tags: - strips all of it, +
   none; otherwise a block or comment tag takes the blanks before it on its line (lstrip_blocks) and
   one newline after it (trim_blocks). */

typedef enum ptst__jtype {
    PTST__JT_END,
    PTST__JT_DATA,
    PTST__JT_PRINT, /* {{ */
    PTST__JT_PRINT_END,
    PTST__JT_BLOCK, /* {% */
    PTST__JT_BLOCK_END,
    PTST__JT_NAME,
    PTST__JT_STRING,
    PTST__JT_INT,
    PTST__JT_FLOAT,
    PTST__JT_OPERATOR
} ptst__jtype;

typedef struct ptst__jtoken {
    ptst__jtype type;
    int op; /* first character + 256 * second */
    uint32_t line, column;
    const char *text; /* data, name, unescaped string */
    size_t size;
    int64_t integer;
    double number;
} ptst__jtoken;

enum {
    PTST__J_NESTING = 200, /* of brackets and blocks in a template */
    PTST__J_SOURCE_MAX = 4 << 20
};

typedef struct ptst__jparser {
    ptst_ctx *c;
    ptst_jinja *t;
    ptst_code code;
    const char *s;            /* the source with plain newlines */
    size_t size, at, line_at; /* line_at: where the current line begins */
    uint32_t line;
    char brackets[PTST__J_NESTING]; /* closers that are expected */
    size_t bracket_count;
    bool line_starts; /* the last match ended with a newline */
    ptst__jtoken *tokens;
    size_t count, capacity;
    /* parser */
    size_t next, depth;
    bool soft;                  /* inside an if: unknown filters fail when they are reached */
    const ptst__jnode *unknown; /* a filter or test outside of one that is not known */
    int loops;                  /* loops around, inside the same function */
    int fors;                   /* loops around */
    unsigned uses;              /* of caller (1), kwargs (2), varargs (4) */
} ptst__jparser;

PTST__PRINTF(4, 5)
static void ptst__jp_fail(ptst__jparser *p, uint32_t line, uint32_t column, const char *format,
                          ...) {
    char text[512];
    va_list args;
    if (p->code == PTST_OK) {
        va_start(args, format);
        vsnprintf(text, sizeof text, format, args);
        va_end(args);
        p->code = ptst__fail(p->c, PTST_ERR_FORMAT, "%.400s: line %u, column %u: %s",
                             p->t->name.data, (unsigned)line, (unsigned)column, text);
    }
}

/* Fails at the place that the lexer reads. */
static void ptst__jl_fail(ptst__jparser *p, const char *text) {
    ptst__jp_fail(p, p->line, (uint32_t)(p->at - p->line_at + 1), "%s", text);
}

static void *ptst__jp_alloc(ptst__jparser *p, size_t n, size_t size) {
    void *m = p->code != PTST_OK ? NULL : ptst__arena_alloc(p->c, &p->t->arena, n, size);
    if (m == NULL && p->code == PTST_OK) {
        p->code = ptst_error_code(p->c);
    }
    return m;
}

/* Moves to byte `to`, counting lines. */
static void ptst__jl_move(ptst__jparser *p, size_t to) {
    for (; p->at < to; p->at++) {
        if (p->s[p->at] == '\n') {
            p->line++;
            p->line_at = p->at + 1;
        }
    }
}

/* A new token at the current place. */
static ptst__jtoken *ptst__jl_add(ptst__jparser *p, ptst__jtype type) {
    void *tokens = p->tokens;
    ptst__jtoken *t;
    if (p->code == PTST_OK) {
        p->code = ptst__grow(p->c, &tokens, &p->capacity, p->count + 1, sizeof *p->tokens);
        p->tokens = (ptst__jtoken *)tokens;
    }
    if (p->code != PTST_OK) {
        return NULL;
    }
    t = &p->tokens[p->count++];
    memset(t, 0, sizeof *t);
    t->type = type;
    t->line = p->line;
    t->column = (uint32_t)(p->at - p->line_at + 1);
    return t;
}

static bool ptst__jl_has(const ptst__jparser *p, size_t at, const char *text) {
    size_t n = strlen(text);
    return p->size - at >= n && memcmp(p->s + at, text, n) == 0;
}

/* Length of the white space at byte `at`. */
static size_t ptst__jl_space(const ptst__jparser *p, size_t at) {
    size_t i = at, n;
    uint32_t point = 0;
    while (i < p->size && (n = ptst__utf8_read(p->s + i, p->size - i, &point)) != 0 &&
           ptst__j_space(point)) {
        i += n;
    }
    return i - at;
}

/* Where the white space before byte `to` begins, not before `from`. */
static size_t ptst__jl_space_before(const ptst__jparser *p, size_t from, size_t to) {
    while (to > from) {
        size_t k = to - 1;
        uint32_t point = 0;
        while (k > from && ((unsigned char)p->s[k] & 0xC0) == 0x80) {
            k--;
        }
        if (ptst__utf8_read(p->s + k, to - k, &point) == 0 || !ptst__j_space(point)) {
            break;
        }
        to = k;
    }
    return to;
}

/* End of the data from..to that stands before a tag with this sign ('-', '+' or another). */
static size_t ptst__jl_data_end(const ptst__jparser *p, size_t from, size_t to, char sign,
                                bool print) {
    size_t line = to, blank;
    if (sign == '-') {
        return ptst__jl_space_before(p, from, to);
    }
    if (sign == '+' || print) {
        return to;
    }
    while (line > from && p->s[line - 1] != '\n') {
        line--;
    }
    blank = ptst__jl_space_before(p, line, to);
    return blank == line && (line > from || p->line_starts) ? line : to;
}

/* After "-%}", "+%}" or "%}" (whose % is at `at`): the end of the tag with what it takes away. */
static size_t ptst__jl_tag_end(const ptst__jparser *p, size_t at, char sign, bool trim) {
    at += 2;
    if (sign == '-') {
        return at + ptst__jl_space(p, at);
    }
    return at + (sign != '+' && trim && at < p->size && p->s[at] == '\n');
}

static void ptst__jl_data(ptst__jparser *p, size_t from, size_t to) {
    ptst__jtoken *t = from < to ? ptst__jl_add(p, PTST__JT_DATA) : NULL;
    char *copy;
    if (t != NULL) {
        copy = (char *)ptst__jp_alloc(p, to - from + 1, 1);
        if (copy != NULL) {
            memcpy(copy, p->s + from, to - from);
            t->text = copy;
            t->size = to - from;
        }
    }
}

/* Does a raw tag begin at `at` ("{%- raw -%}")? Returns its end, or 0. name is raw or endraw. */
static size_t ptst__jl_raw(const ptst__jparser *p, size_t at, const char *name, bool end) {
    char sign;
    at += 2;
    at += at < p->size && (p->s[at] == '-' || p->s[at] == '+');
    at += ptst__jl_space(p, at);
    if (!ptst__jl_has(p, at, name)) {
        return 0;
    }
    at += strlen(name);
    at += ptst__jl_space(p, at);
    sign = at < p->size ? p->s[at] : 0;
    at += sign == '-' || (end && sign == '+');
    return ptst__jl_has(p, at, "%}") ? ptst__jl_tag_end(p, at, sign, end) : 0;
}

/* Everything up to {% endraw %} is data; `from` is the end of {% raw %}. */
static void ptst__jl_raw_data(ptst__jparser *p, size_t from) {
    size_t i, end = 0;
    ptst__jl_move(p, from);
    p->line_starts = from > 0 && p->s[from - 1] == '\n';
    for (i = from; i + 1 < p->size; i++) {
        if (p->s[i] == '{' && p->s[i + 1] == '%') {
            end = ptst__jl_raw(p, i, "endraw", true);
            if (end != 0) {
                break;
            }
        }
    }
    if (end == 0) {
        ptst__jl_fail(p, "Missing end of raw directive");
        return;
    }
    ptst__jl_data(p, from, ptst__jl_data_end(p, from, i, p->s[i + 2], false));
    ptst__jl_move(p, end);
    p->line_starts = p->s[end - 1] == '\n';
}

static void ptst__jl_comment(ptst__jparser *p) {
    size_t i, from = p->at + 2;
    char sign;
    from += from < p->size && (p->s[from] == '-' || p->s[from] == '+');
    for (i = from; !ptst__jl_has(p, i, "#}"); i++) {
        if (i >= p->size) {
            ptst__jl_fail(p, "Missing end of comment tag");
            return;
        }
    }
    sign = i > from ? p->s[i - 1] : 0;
    i = ptst__jl_tag_end(p, i, sign, true);
    ptst__jl_move(p, i);
    p->line_starts = p->s[i - 1] == '\n';
}

/* One escape of a string literal: *from is behind the backslash. Returns bytes written to `to`. */
static size_t ptst__jl_escape(ptst__jparser *p, size_t *from, size_t end, char *to) {
    static const char letters[] = "\\'\"abfnrtv", values[] = "\\'\"\a\b\f\n\r\t\v";
    char ch = p->s[(*from)++];
    const char *known = ch == 0 ? NULL : strchr(letters, ch);
    size_t digits = ch == 'x' ? 2 : ch == 'u' ? 4 : ch == 'U' ? 8 : 0, i;
    uint32_t point = 0;
    if (known != NULL) {
        *to = values[known - letters];
        return 1;
    }
    if (ch == '\n') {
        return 0;
    }
    if (ch >= '0' && ch <= '7') {
        point = (uint32_t)(ch - '0');
        for (i = 0; i < 2 && *from < end && p->s[*from] >= '0' && p->s[*from] <= '7'; i++) {
            point = point * 8 + (uint32_t)(p->s[(*from)++] - '0');
        }
        return ptst__utf8_write(to, point);
    }
    if (digits == 0 && ch != 'N') { /* unknown: both characters stay */
        to[0] = '\\';
        to[1] = ch;
        return 2;
    }
    for (i = 0; i < digits; i++) {
        char d = *from < end ? p->s[(*from)++] : 0;
        uint32_t value = d >= '0' && d <= '9'   ? (uint32_t)(d - '0')
                         : d >= 'a' && d <= 'f' ? (uint32_t)(d - 'a' + 10)
                         : d >= 'A' && d <= 'F' ? (uint32_t)(d - 'A' + 10)
                                                : 16;
        if (value == 16 || point > 0x10FFFF) {
            ptst__jl_fail(p, "a truncated or too large escape in a string");
            return 0;
        }
        point = point * 16 + value;
    }
    if (digits == 0 || point > 0x10FFFF || (point >= 0xD800 && point <= 0xDFFF)) {
        ptst__jl_fail(p, "an escape in a string that is not supported");
        return 0;
    }
    return ptst__utf8_write(to, point);
}

static void ptst__jl_string(ptst__jparser *p) {
    char quote = p->s[p->at], *text;
    size_t end = p->at + 1, i, n = 0;
    ptst__jtoken *t;
    while (end < p->size && p->s[end] != quote) {
        end += p->s[end] == '\\' ? 2 : 1;
    }
    if (end >= p->size) {
        ptst__jl_fail(p, "a string without end");
        return;
    }
    t = ptst__jl_add(p, PTST__JT_STRING);
    text = (char *)ptst__jp_alloc(p, end - p->at + 1, 1);
    if (t == NULL || text == NULL) {
        return;
    }
    for (i = p->at + 1; i < end && p->code == PTST_OK;) {
        if (p->s[i] != '\\') {
            text[n++] = p->s[i++];
        } else {
            i++;
            n += ptst__jl_escape(p, &i, end, text + n);
        }
    }
    text[n] = 0;
    t->text = text;
    t->size = n;
    ptst__jl_move(p, end + 1);
}

/* \d+ with single _ between digits, from i; returns its end (i if there is none). */
static size_t ptst__jl_digits(const ptst__jparser *p, size_t i) {
    size_t end = i;
    while (i < p->size && p->s[i] >= '0' && p->s[i] <= '9') {
        end = ++i;
        i += i + 1 < p->size && p->s[i] == '_' && p->s[i + 1] >= '0' && p->s[i + 1] <= '9';
    }
    return end;
}

/* The value of a float literal with _ in it. */
static double ptst__jl_float(const ptst__jparser *p, size_t from, size_t to) {
    char text[512];
    size_t n = 0;
    for (; from < to && n < sizeof text - 1; from++) {
        if (p->s[from] != '_') {
            text[n++] = p->s[from];
        }
    }
    return ptst__number_read(text, n);
}

static void ptst__jl_integer(ptst__jparser *p) {
    size_t i = p->at, end = i;
    char letter = i + 1 < p->size ? (char)(p->s[i + 1] | 32) : 0;
    int base = p->s[i] != '0'  ? 10
               : letter == 'x' ? 16
               : letter == 'o' ? 8
               : letter == 'b' ? 2
                               : 10;
    int64_t value = 0;
    size_t from = base == 10 ? i : i + 2;
    ptst__jtoken *t;
    for (end = from; base != 10 && end < p->size; end++) {
        size_t k = end + (p->s[end] == '_');
        if (k >= p->size || !ptst__j_digits_read(p->s, k, k + 1, base, &value)) {
            break;
        }
        end = k;
    }
    if (base == 10 || end == from) {
        base = 10;
        from = i;
        end = ptst__jl_digits(p, i);
        if (p->s[i] == '0') { /* a literal does not begin with 0: 007 is 00 and 7 */
            for (end = i; end < p->size && p->s[end] == '0'; end++) {
                end += end + 2 < p->size && p->s[end + 1] == '_' && p->s[end + 2] == '0';
            }
        }
    }
    from += base != 10 && p->s[from] == '_';
    if (!ptst__j_digits_read(p->s, from, end, base, &value)) {
        ptst__jl_fail(p, "an integer beyond 64 bits");
        return;
    }
    t = ptst__jl_add(p, PTST__JT_INT);
    if (t != NULL) {
        t->integer = value;
    }
    ptst__jl_move(p, end);
}

static void ptst__jl_number(ptst__jparser *p) {
    size_t whole = ptst__jl_digits(p, p->at), end = whole, k;
    bool real = false;
    ptst__jtoken *t;
    if (end + 1 < p->size && p->s[end] == '.' && ptst__jl_digits(p, end + 1) > end + 1) {
        end = ptst__jl_digits(p, end + 1);
        real = true;
    }
    if (end + 1 < p->size && (p->s[end] == 'e' || p->s[end] == 'E')) {
        k = end + 1 + (p->s[end + 1] == '+' || p->s[end + 1] == '-');
        if (k < p->size && ptst__jl_digits(p, k) > k) {
            end = ptst__jl_digits(p, k);
            real = true;
        }
    }
    if (!real || (p->at > 0 && p->s[p->at - 1] == '.')) {
        ptst__jl_integer(p);
        return;
    }
    t = ptst__jl_add(p, PTST__JT_FLOAT);
    if (t != NULL) {
        t->number = ptst__jl_float(p, p->at, end);
    }
    ptst__jl_move(p, end);
}

/* Length of the letter, digit or _ at byte i; 0 if it is something else. */
static size_t ptst__jl_name_size(const ptst__jparser *p, size_t i) {
    uint32_t point = 0;
    size_t n = i < p->size ? ptst__utf8_read(p->s + i, p->size - i, &point) : 0;
    return point == '_' || ptst__j_is_alpha(point) || ptst__j_is_digit(point) ? n : 0;
}

static void ptst__jl_name(ptst__jparser *p) {
    size_t end = p->at, n;
    ptst__jtoken *t = ptst__jl_add(p, PTST__JT_NAME);
    char *text;
    while ((n = ptst__jl_name_size(p, end)) != 0) {
        end += n;
    }
    text = (char *)ptst__jp_alloc(p, end - p->at + 1, 1);
    if (t != NULL && text != NULL) {
        memcpy(text, p->s + p->at, end - p->at);
        t->text = text;
        t->size = end - p->at;
    }
    ptst__jl_move(p, end);
}

static void ptst__jl_operator(ptst__jparser *p) {
    static const char two[][3] = {"**", "//", "==", "!=", ">=", "<="};
    char ch = p->s[p->at];
    ptst__jtoken *t;
    size_t i, n = 1;
    int op = (unsigned char)ch;
    for (i = 0; i < sizeof two / sizeof two[0]; i++) {
        if (ptst__jl_has(p, p->at, two[i])) {
            op = two[i][0] + 256 * two[i][1];
            n = 2;
        }
    }
    if (n == 1 && (ch == 0 || strchr("+-/*%~[](){}><=.:|,;", ch) == NULL)) {
        ptst__jp_fail(p, p->line, (uint32_t)(p->at - p->line_at + 1), "unexpected char '%c'",
                      ch >= ' ' && ch < 127 ? ch : '?');
        return;
    }
    if (ch == '(' || ch == '[' || ch == '{') {
        if (p->bracket_count == PTST__J_NESTING) {
            ptst__jl_fail(p, "brackets are nested too deeply");
            return;
        }
        p->brackets[p->bracket_count++] = ch == '(' ? ')' : ch == '[' ? ']' : '}';
    } else if (ch == ')' || ch == ']' || ch == '}') {
        if (p->bracket_count == 0 || p->brackets[--p->bracket_count] != ch) {
            ptst__jp_fail(p, p->line, (uint32_t)(p->at - p->line_at + 1), "unexpected '%c'", ch);
            return;
        }
    }
    t = ptst__jl_add(p, PTST__JT_OPERATOR);
    if (t != NULL) {
        t->op = op;
    }
    ptst__jl_move(p, p->at + n);
}

/* The inside of {{ }} or {% %}; p->at is at its begin. */
static void ptst__jl_tag(ptst__jparser *p, bool print) {
    const char *close = print ? "}}" : "%}";
    char sign;
    size_t end;
    ptst__jl_add(p, print ? PTST__JT_PRINT : PTST__JT_BLOCK);
    ptst__jl_move(p, p->at + 2);
    if (p->at < p->size && (p->s[p->at] == '-' || p->s[p->at] == '+')) {
        ptst__jl_move(p, p->at + 1);
    }
    p->bracket_count = 0;
    while (p->at < p->size && p->code == PTST_OK) {
        char ch = p->s[p->at];
        sign = ch == '-' || (ch == '+' && !print) ? ch : 0;
        if (p->bracket_count == 0 && ptst__jl_has(p, p->at + (sign != 0), close)) {
            end = ptst__jl_tag_end(p, p->at + (sign != 0), sign, !print);
            ptst__jl_add(p, print ? PTST__JT_PRINT_END : PTST__JT_BLOCK_END);
            ptst__jl_move(p, end);
            p->line_starts = p->s[end - 1] == '\n';
            return;
        }
        end = ptst__jl_space(p, p->at);
        if (end != 0) {
            ptst__jl_move(p, p->at + end);
        } else if (ch >= '0' && ch <= '9') {
            ptst__jl_number(p);
        } else if (ptst__jl_name_size(p, p->at) != 0) {
            ptst__jl_name(p);
        } else if (ch == '"' || ch == '\'') {
            ptst__jl_string(p);
        } else {
            ptst__jl_operator(p);
        }
    }
}

/* All tokens of the template. */
static void ptst__jl_run(ptst__jparser *p) {
    p->line = 1;
    p->line_starts = true;
    while (p->code == PTST_OK && p->at < p->size) {
        size_t from = p->at, i = from, raw = 0;
        char kind = 0;
        while (i < p->size) {
            const char *brace = (const char *)memchr(p->s + i, '{', p->size - i);
            i = brace == NULL ? p->size : (size_t)(brace - p->s);
            kind = i + 1 < p->size ? p->s[i + 1] : 0;
            if (kind == '{' || kind == '%' || kind == '#') {
                break;
            }
            i += i < p->size;
        }
        if (i >= p->size) {
            ptst__jl_data(p, from, p->size);
            ptst__jl_move(p, p->size);
            break;
        }
        raw = kind == '%' ? ptst__jl_raw(p, i, "raw", false) : 0;
        ptst__jl_data(
            p, from, ptst__jl_data_end(p, from, i, i + 2 < p->size ? p->s[i + 2] : 0, kind == '{'));
        ptst__jl_move(p, i);
        if (raw != 0) {
            ptst__jl_raw_data(p, raw);
        } else if (kind == '#') {
            ptst__jl_comment(p);
        } else {
            ptst__jl_tag(p, kind == '{');
        }
    }
    ptst__jl_add(p, PTST__JT_END);
}

/* ---- parser ----
   Recursive descent with Jinja2's precedence, lowest first:
       a if b else c, or, and, not, comparisons and in, + -, ~, * / // %, **, - + (sign),
       then .name [item] (call), and after those | filter and "is" test.
   Note that ** binds to the left and that ~ binds tighter than + here. After a failure the current
   token is the end, so every loop stops. */

typedef enum ptst__jnode_kind {
    /* expressions; a, b, c, d: children, lists are linked by next */
    PTST__JN_CONST,  /* value */
    PTST__JN_NAME,   /* name */
    PTST__JN_LIST,   /* a: elements */
    PTST__JN_TUPLE,  /* a: elements */
    PTST__JN_DICT,   /* a: key, value, key, value */
    PTST__JN_ATTR,   /* a.name */
    PTST__JN_ITEM,   /* a[b] */
    PTST__JN_SLICE,  /* a[b:c:d], any of them NULL */
    PTST__JN_CALL,   /* a(b: arguments) */
    PTST__JN_FILTER, /* a | function(b: arguments); name for the error */
    PTST__JN_TEST,   /* a is function(b: arguments) */
    PTST__JN_NOT,
    PTST__JN_SIGN, /* op a */
    PTST__JN_AND,
    PTST__JN_OR,
    PTST__JN_BINARY,   /* a op b */
    PTST__JN_CONCAT,   /* a: parts */
    PTST__JN_COMPARE,  /* a, then b: list of operands with their op */
    PTST__JN_IF_ELSE,  /* b if a else c */
    PTST__JN_OPERAND,  /* of a comparison: op a */
    PTST__JN_ARGUMENT, /* a; op: 0 by position, 'k' by name, '*' list, '2' dict */
    PTST__JN_TARGET,   /* namespace name.value (string) as target of set */
    /* statements */
    PTST__JN_TEXT,     /* value */
    PTST__JN_PRINT,    /* a: expressions */
    PTST__JN_IF,       /* a: condition, c: body, e: else (an elif is one more JN_IF) */
    PTST__JN_FOR,      /* a: target, b: iterable, c: body, d: condition, e: else; flag: recursive */
    PTST__JN_SET,      /* a: target, b: value */
    PTST__JN_SET_BODY, /* a: target, b: filter on nothing or NULL, c: body */
    PTST__JN_MACRO,    /* name, a: parameters, c: body, op: what it uses (PTST__J_USES_...) */
    PTST__JN_PARAM,    /* name, a: default */
    PTST__JN_CALL_BODY,   /* a: the call, b: JN_MACRO of the body */
    PTST__JN_FILTER_BODY, /* a: filter, c: body */
    PTST__JN_WITH,        /* a: list of JN_SET, c: body */
    PTST__JN_SCOPE,       /* c: body; op 1: {% generation %}, op 2: {% block %} */
    PTST__JN_BREAK,
    PTST__JN_CONTINUE,
    PTST__JN_REFUSED /* value: what it is */
} ptst__jnode_kind;

enum { PTST__J_USES_CALLER = 1, PTST__J_USES_KWARGS = 2, PTST__J_USES_VARARGS = 4 };

static const ptst__jtoken *ptst__jp_token(const ptst__jparser *p) {
    return &p->tokens[p->code == PTST_OK ? p->next : p->count - 1];
}

static void ptst__jp_skip(ptst__jparser *p) { p->next += p->next + 1 < p->count; }

static bool ptst__jp_is_op(const ptst__jtoken *t, int op) {
    return t->type == PTST__JT_OPERATOR && t->op == op;
}

static bool ptst__jp_is_name(const ptst__jtoken *t, const char *name) {
    return t->type == PTST__JT_NAME && t->size == strlen(name) &&
           memcmp(t->text, name, t->size) == 0;
}

/* Steps over the token if it is this operator (name). */
static bool ptst__jp_take(ptst__jparser *p, int op) {
    bool is = ptst__jp_is_op(ptst__jp_token(p), op);
    p->next += is;
    return is;
}

static bool ptst__jp_take_name(ptst__jparser *p, const char *name) {
    bool is = ptst__jp_is_name(ptst__jp_token(p), name);
    p->next += is;
    return is;
}

/* Fails: `expected` was expected here. */
static void ptst__jp_expected(ptst__jparser *p, const char *expected) {
    const ptst__jtoken *t = ptst__jp_token(p);
    char got[40];
    if (t->type == PTST__JT_NAME || t->type == PTST__JT_STRING) {
        snprintf(got, sizeof got, "'%.30s'", t->text);
    } else if (t->type == PTST__JT_OPERATOR) {
        snprintf(got, sizeof got, "'%c%c'", t->op % 256, t->op < 256 ? '\'' : t->op / 256);
        got[t->op < 256 ? 3 : 4] = 0;
    } else {
        snprintf(got, sizeof got, "%s",
                 t->type == PTST__JT_END         ? "the end of the template"
                 : t->type == PTST__JT_PRINT_END ? "'}}'"
                 : t->type == PTST__JT_BLOCK_END ? "'%}'"
                 : t->type == PTST__JT_INT       ? "a number"
                                                 : "something else");
    }
    ptst__jp_fail(p, t->line, t->column, "expected %s, got %s", expected, got);
}

static void ptst__jp_expect(ptst__jparser *p, int op) {
    char text[5] = {'\'', (char)(op % 256), '\'', 0, 0};
    if (!ptst__jp_take(p, op)) {
        ptst__jp_expected(p, text);
    }
}

/* A node at the current token; never NULL (after a failure one that nobody will see). */
static ptst__jnode *ptst__jp_node(ptst__jparser *p, ptst__jnode_kind kind) {
    const ptst__jtoken *t = ptst__jp_token(p);
    ptst__jnode *n = (ptst__jnode *)ptst__jp_alloc(p, 1, sizeof *n);
    if (n != NULL) {
        n->kind = (uint8_t)kind;
        n->line = t->line;
        n->column = t->column;
    }
    return n;
}

/* The number of an identifier. */
static uint32_t ptst__jp_name(ptst__jparser *p, const char *text, size_t size) {
    ptst_jinja *t = p->t;
    int32_t id = ptst__map_get(&t->map, text, size, -1);
    void *names = (void *)t->names;
    ptst__jstring *s;
    if (id >= 0 || p->code != PTST_OK) {
        return id < 0 ? 0 : (uint32_t)id;
    }
    s = (ptst__jstring *)ptst__jp_alloc(p, 1, sizeof *s);
    if (s == NULL) {
        return 0;
    }
    s->bytes = text;
    s->size = size;
    s->points = ptst__j_count_points(text, size);
    p->code = ptst__grow(p->c, &names, &t->names_capacity, t->names_count + 1, sizeof *t->names);
    t->names = (const ptst__jstring **)names;
    if (p->code == PTST_OK) {
        p->code = ptst__map_put(p->c, &t->map, text, size, (int32_t)t->names_count);
    }
    if (p->code != PTST_OK) {
        return 0;
    }
    t->names[t->names_count++] = s;
    return (uint32_t)(t->names_count - 1);
}

/* The identifier that must stand here. */
static uint32_t ptst__jp_need_name(ptst__jparser *p) {
    const ptst__jtoken *t = ptst__jp_token(p);
    if (t->type != PTST__JT_NAME) {
        ptst__jp_expected(p, "a name");
        return 0;
    }
    ptst__jp_skip(p);
    return ptst__jp_name(p, t->text, t->size);
}

/* A constant string. */
static ptst__jvalue ptst__jp_string(ptst__jparser *p, const char *text, size_t size) {
    ptst__jvalue v = ptst__j_make(PTST__J_STRING, 0);
    ptst__jstring *s = (ptst__jstring *)ptst__jp_alloc(p, 1, sizeof *s);
    if (s != NULL) {
        s->bytes = text;
        s->size = size;
        s->points = ptst__j_count_points(text, size);
        v.as.string = s;
    }
    return v;
}

/* Appends to a list; *tail points to where the next one goes. */
static void ptst__jp_link(ptst__jnode ***tail, ptst__jnode *n) {
    if (n != NULL) {
        **tail = n;
        *tail = &n->next;
    }
}

static bool ptst__jp_enter(ptst__jparser *p) {
    if (++p->depth > PTST__J_NESTING) {
        const ptst__jtoken *t = ptst__jp_token(p);
        ptst__jp_fail(p, t->line, t->column, "nested deeper than %d", (int)PTST__J_NESTING);
    }
    return p->code == PTST_OK;
}

static ptst__jnode *ptst__jp_expression(ptst__jparser *p);
static ptst__jnode *ptst__jp_level(ptst__jparser *p, int level);
static ptst__jnode *ptst__jp_unary(ptst__jparser *p, bool filters);

enum { PTST__JP_PLAIN = 1, PTST__JP_EMPTY = 2, PTST__JP_TARGET = 4 };

static ptst__jnode *ptst__jp_primary(ptst__jparser *p, bool target);

/* Is this the end of a tuple without brackets? */
static bool ptst__jp_tuple_ends(const ptst__jparser *p, const char *word) {
    const ptst__jtoken *t = ptst__jp_token(p);
    return t->type == PTST__JT_PRINT_END || t->type == PTST__JT_BLOCK_END ||
           t->type == PTST__JT_END || ptst__jp_is_op(t, ')') ||
           (word != NULL && ptst__jp_is_name(t, word));
}

/* One expression, or several with commas: a tuple. flags: PLAIN without "a if b" inside, EMPTY "()"
   is allowed, TARGET names only. word ends it too. */
static ptst__jnode *ptst__jp_tuple(ptst__jparser *p, int flags, const char *word) {
    ptst__jnode *tuple = ptst__jp_node(p, PTST__JN_TUPLE), *list = NULL, **tail = &list;
    bool comma = false;
    while (p->code == PTST_OK && !ptst__jp_tuple_ends(p, word)) {
        ptst__jp_link(&tail, (flags & PTST__JP_TARGET) != 0  ? ptst__jp_primary(p, true)
                             : (flags & PTST__JP_PLAIN) != 0 ? ptst__jp_level(p, 0)
                                                             : ptst__jp_expression(p));
        if (!ptst__jp_take(p, ',')) {
            break;
        }
        comma = true;
    }
    if (!comma && list != NULL) {
        return list;
    }
    if (!comma && (flags & PTST__JP_EMPTY) == 0) {
        ptst__jp_expected(p, "an expression");
    }
    if (tuple != NULL) {
        tuple->a = list;
    }
    return tuple;
}

static ptst__jnode *ptst__jp_list(ptst__jparser *p) {
    ptst__jnode *n = ptst__jp_node(p, PTST__JN_LIST), *list = NULL, **tail = &list;
    ptst__jp_expect(p, '[');
    while (p->code == PTST_OK && !ptst__jp_take(p, ']')) {
        if (list != NULL) {
            ptst__jp_expect(p, ',');
            if (ptst__jp_take(p, ']')) {
                break;
            }
        }
        ptst__jp_link(&tail, ptst__jp_expression(p));
    }
    if (n != NULL) {
        n->a = list;
    }
    return n;
}

static ptst__jnode *ptst__jp_dict(ptst__jparser *p) {
    ptst__jnode *n = ptst__jp_node(p, PTST__JN_DICT), *list = NULL, **tail = &list;
    ptst__jp_expect(p, '{');
    while (p->code == PTST_OK && !ptst__jp_take(p, '}')) {
        if (list != NULL) {
            ptst__jp_expect(p, ',');
            if (ptst__jp_take(p, '}')) {
                break;
            }
        }
        ptst__jp_link(&tail, ptst__jp_expression(p));
        ptst__jp_expect(p, ':');
        ptst__jp_link(&tail, ptst__jp_expression(p));
    }
    if (n != NULL) {
        n->a = list;
    }
    return n;
}

/* Strings one after the other are one string. */
static ptst__jnode *ptst__jp_strings(ptst__jparser *p) {
    ptst__jnode *n = ptst__jp_node(p, PTST__JN_CONST);
    const ptst__jtoken *t = ptst__jp_token(p);
    size_t size = 0, at = p->next, i;
    char *text;
    for (i = at; p->code == PTST_OK && p->tokens[i].type == PTST__JT_STRING; i++) {
        size += p->tokens[i].size;
    }
    if (i == at + 1) {
        ptst__jp_skip(p);
        if (n != NULL) {
            n->value = ptst__jp_string(p, t->text, t->size);
        }
        return n;
    }
    text = (char *)ptst__jp_alloc(p, size + 1, 1);
    for (size = 0; text != NULL && p->next < i; p->next++) {
        memcpy(text + size, p->tokens[p->next].text, p->tokens[p->next].size);
        size += p->tokens[p->next].size;
    }
    if (text != NULL && n != NULL) {
        n->value = ptst__jp_string(p, text, size);
    }
    return n;
}

/* A name that is a constant, or a variable. target: "name.attribute" is allowed. */
static ptst__jnode *ptst__jp_word(ptst__jparser *p, bool target) {
    ptst__jnode *n = ptst__jp_node(p, PTST__JN_CONST);
    const ptst__jtoken *t = ptst__jp_token(p);
    bool yes = ptst__jp_is_name(t, "true") || ptst__jp_is_name(t, "True");
    if (n == NULL) {
        return NULL;
    }
    ptst__jp_skip(p);
    if (yes || ptst__jp_is_name(t, "false") || ptst__jp_is_name(t, "False")) {
        n->value = ptst__j_bool(yes);
    } else if (ptst__jp_is_name(t, "none") || ptst__jp_is_name(t, "None")) {
        n->value = ptst__j_none();
    } else {
        n->kind = PTST__JN_NAME;
        n->name = ptst__jp_name(p, t->text, t->size);
        p->uses |= ptst__jp_is_name(t, "caller")    ? (unsigned)PTST__J_USES_CALLER
                   : ptst__jp_is_name(t, "kwargs")  ? (unsigned)PTST__J_USES_KWARGS
                   : ptst__jp_is_name(t, "varargs") ? (unsigned)PTST__J_USES_VARARGS
                                                    : 0;
        if (target && ptst__jp_take(p, '.')) {
            n->kind = PTST__JN_TARGET;
            t = ptst__jp_token(p);
            ptst__jp_need_name(p);
            n->value = ptst__jp_string(p, t->text, t->size);
        }
    }
    return n;
}

static ptst__jnode *ptst__jp_primary(ptst__jparser *p, bool target) {
    const ptst__jtoken *t = ptst__jp_token(p);
    ptst__jnode *n = NULL;
    if (!ptst__jp_enter(p)) {
        p->depth--;
        return NULL;
    }
    if (t->type == PTST__JT_NAME) {
        n = ptst__jp_word(p, target);
    } else if (t->type == PTST__JT_STRING) {
        n = ptst__jp_strings(p);
    } else if (t->type == PTST__JT_INT || t->type == PTST__JT_FLOAT) {
        n = ptst__jp_node(p, PTST__JN_CONST);
        ptst__jp_skip(p);
        if (n != NULL) {
            n->value =
                t->type == PTST__JT_INT ? ptst__j_int(t->integer, 0) : ptst__j_float(t->number, 0);
        }
    } else if (ptst__jp_take(p, '(')) {
        n = ptst__jp_tuple(p, PTST__JP_EMPTY | (target ? PTST__JP_TARGET : 0), NULL);
        ptst__jp_expect(p, ')');
    } else if (ptst__jp_is_op(t, '[')) {
        n = ptst__jp_list(p);
    } else if (ptst__jp_is_op(t, '{')) {
        n = ptst__jp_dict(p);
    } else {
        ptst__jp_expected(p, "an expression");
    }
    p->depth--;
    return n;
}

/* ( ... ) of a call; the arguments as a list. */
static ptst__jnode *ptst__jp_arguments(ptst__jparser *p) {
    ptst__jnode *list = NULL, **tail = &list, *n;
    bool named = false, star = false, stars = false, bad = false;
    const ptst__jtoken *t;
    ptst__jp_expect(p, '(');
    while (p->code == PTST_OK && !ptst__jp_take(p, ')')) {
        if (list != NULL) {
            ptst__jp_expect(p, ',');
            if (ptst__jp_take(p, ')')) {
                break;
            }
        }
        t = ptst__jp_token(p);
        n = ptst__jp_node(p, PTST__JN_ARGUMENT);
        if (n == NULL) {
            break;
        }
        if (ptst__jp_take(p, '*')) {
            bad = star || stars;
            star = true;
            n->op = '*';
        } else if (ptst__jp_take(p, '*' + 256 * '*')) {
            bad = stars;
            stars = true;
            n->op = '2';
        } else if (t->type == PTST__JT_NAME && ptst__jp_is_op(t + 1, '=')) {
            bad = stars;
            named = true;
            n->op = 'k';
            n->name = ptst__jp_need_name(p);
            ptst__jp_skip(p);
        } else {
            bad = star || stars || named;
        }
        if (bad) {
            ptst__jp_fail(p, t->line, t->column, "invalid syntax for function call expression");
        }
        n->a = ptst__jp_expression(p);
        ptst__jp_link(&tail, n);
    }
    return list;
}

/* [ ... ] behind an expression: an index, a slice, or a tuple of them. */
static ptst__jnode *ptst__jp_subscript(ptst__jparser *p, ptst__jnode *of) {
    ptst__jnode *n = ptst__jp_node(p, PTST__JN_ITEM), *part[3] = {NULL, NULL, NULL};
    bool slice = false;
    int i;
    ptst__jp_expect(p, '[');
    for (i = 0; i < 3 && p->code == PTST_OK; i++) {
        if (!ptst__jp_is_op(ptst__jp_token(p), ':') && !ptst__jp_is_op(ptst__jp_token(p), ']')) {
            part[i] = ptst__jp_expression(p);
        } else if (i == 0 && ptst__jp_is_op(ptst__jp_token(p), ']')) {
            ptst__jp_expected(p, "an expression");
        }
        if (i == 2 || !ptst__jp_take(p, ':')) {
            break;
        }
        slice = true;
    }
    if (n == NULL) {
        return NULL;
    }
    if (!slice && ptst__jp_is_op(ptst__jp_token(p), ',')) {
        ptst__jnode *tuple = ptst__jp_node(p, PTST__JN_TUPLE), **tail = &part[0]->next;
        while (tuple != NULL && ptst__jp_take(p, ',') && !ptst__jp_is_op(ptst__jp_token(p), ']')) {
            ptst__jp_link(&tail, ptst__jp_expression(p));
        }
        if (tuple != NULL) {
            tuple->a = part[0];
        }
        part[0] = tuple;
    }
    ptst__jp_expect(p, ']');
    n->kind = slice ? PTST__JN_SLICE : PTST__JN_ITEM;
    n->a = of;
    n->b = part[0];
    n->c = part[1];
    n->d = part[2];
    return n;
}

static ptst__jnode *ptst__jp_call(ptst__jparser *p, ptst__jnode *of) {
    ptst__jnode *n = ptst__jp_node(p, PTST__JN_CALL);
    ptst__jnode *list = ptst__jp_arguments(p);
    if (n != NULL) {
        n->a = of;
        n->b = list;
    }
    return n;
}

/* .name, .0, [item], (call) as long as there are any. */
static ptst__jnode *ptst__jp_postfix(ptst__jparser *p, ptst__jnode *of) {
    ptst__jnode *n;
    while (p->code == PTST_OK) {
        const ptst__jtoken *t = ptst__jp_token(p);
        if (ptst__jp_is_op(t, '[')) {
            of = ptst__jp_subscript(p, of);
        } else if (ptst__jp_is_op(t, '(')) {
            of = ptst__jp_call(p, of);
        } else if (ptst__jp_is_op(t, '.')) {
            n = ptst__jp_node(p, PTST__JN_ATTR);
            ptst__jp_skip(p);
            t = ptst__jp_token(p);
            if (n == NULL) {
                break;
            }
            n->a = of;
            if (t->type == PTST__JT_INT) {
                ptst__jp_skip(p);
                n->kind = PTST__JN_ITEM;
                n->b = ptst__jp_node(p, PTST__JN_CONST);
                if (n->b != NULL) {
                    n->b->value = ptst__j_int(t->integer, 0);
                }
            } else {
                n->name = ptst__jp_need_name(p);
            }
            of = n;
        } else {
            break;
        }
    }
    return of;
}

/* The function of a filter or test (with dots in its name, "a.b": never known). */
static const ptst__jbuiltin *ptst__jp_function(ptst__jparser *p, const ptst__jbuiltin *table,
                                               ptst__jnode *n) {
    const ptst__jbuiltin *f = NULL;
    n->name = ptst__jp_need_name(p);
    if (p->code == PTST_OK) {
        f = ptst__j_lookup(table, p->t->names[n->name]);
    }
    while (ptst__jp_take(p, '.')) {
        ptst__jp_need_name(p);
        f = NULL;
    }
    if (f == NULL && !p->soft && p->unknown == NULL) {
        p->unknown = n;
    }
    return f;
}

/* filter(arguments) on `of` (NULL: on the body of a block), and the filters behind it. The first
   | is taken already if `inside`. */
static ptst__jnode *ptst__jp_filter(ptst__jparser *p, ptst__jnode *of, bool inside) {
    while (p->code == PTST_OK && (inside || ptst__jp_take(p, '|'))) {
        ptst__jnode *n = ptst__jp_node(p, PTST__JN_FILTER);
        if (n == NULL) {
            break;
        }
        n->function = ptst__jp_function(p, ptst__j_filters, n);
        if (ptst__jp_is_op(ptst__jp_token(p), '(')) {
            n->b = ptst__jp_arguments(p);
        }
        n->a = of;
        of = n;
        inside = false;
    }
    return of;
}

/* is [not] test [argument] */
static ptst__jnode *ptst__jp_test(ptst__jparser *p, ptst__jnode *of) {
    ptst__jnode *n = ptst__jp_node(p, PTST__JN_TEST), *not_node = NULL;
    const ptst__jtoken *t;
    bool argument;
    if (n == NULL) {
        return NULL;
    }
    if (ptst__jp_take_name(p, "not")) {
        not_node = ptst__jp_node(p, PTST__JN_NOT);
    }
    n->a = of;
    n->function = ptst__jp_function(p, ptst__j_tests, n);
    t = ptst__jp_token(p);
    argument = t->type == PTST__JT_NAME || t->type == PTST__JT_STRING || t->type == PTST__JT_INT ||
               t->type == PTST__JT_FLOAT || ptst__jp_is_op(t, '[') || ptst__jp_is_op(t, '{');
    if (ptst__jp_is_op(t, '(')) {
        n->b = ptst__jp_arguments(p);
    } else if (argument && !ptst__jp_is_name(t, "else") && !ptst__jp_is_name(t, "or") &&
               !ptst__jp_is_name(t, "and")) {
        if (ptst__jp_is_name(t, "is")) {
            ptst__jp_fail(p, t->line, t->column, "You cannot chain multiple tests with is");
        }
        n->b = ptst__jp_node(p, PTST__JN_ARGUMENT);
        if (n->b != NULL) {
            n->b->a = ptst__jp_postfix(p, ptst__jp_primary(p, false));
        }
    }
    if (not_node != NULL) {
        not_node->a = n;
        return not_node;
    }
    return n;
}

/* A sign, or a primary with what stands behind it; with filters and tests if asked. */
static ptst__jnode *ptst__jp_unary(ptst__jparser *p, bool filters) {
    const ptst__jtoken *t = ptst__jp_token(p);
    ptst__jnode *n;
    if (ptst__jp_is_op(t, '-') || ptst__jp_is_op(t, '+')) {
        n = ptst__jp_node(p, PTST__JN_SIGN);
        ptst__jp_skip(p);
        if (n != NULL && ptst__jp_enter(p)) {
            n->op = (uint8_t)t->op;
            n->a = ptst__jp_unary(p, false);
        }
        p->depth -= n != NULL;
    } else {
        n = ptst__jp_primary(p, false);
    }
    n = ptst__jp_postfix(p, n);
    while (filters && p->code == PTST_OK) {
        t = ptst__jp_token(p);
        if (ptst__jp_is_op(t, '|')) {
            n = ptst__jp_filter(p, n, false);
        } else if (ptst__jp_take_name(p, "is")) {
            n = ptst__jp_test(p, n);
        } else if (ptst__jp_is_op(t, '(')) {
            n = ptst__jp_call(p, n);
        } else {
            break;
        }
    }
    return n;
}

/* Levels of binary operators, lowest precedence first. */
enum {
    PTST__JP_OR,
    PTST__JP_AND,
    PTST__JP_NOT,
    PTST__JP_COMPARE,
    PTST__JP_SUM,
    PTST__JP_CONCAT,
    PTST__JP_PRODUCT,
    PTST__JP_POWER,
    PTST__JP_UNARY
};

/* The operator of this level that stands here, taken; 0 if there is none. In comparisons 'i' is
   in, 'n' not in, 'g' >=, 'l' <=, '=' ==, '!' !=. */
static char ptst__jp_operator(ptst__jparser *p, int level) {
    const ptst__jtoken *t = ptst__jp_token(p);
    int op = t->type == PTST__JT_OPERATOR ? t->op : 0;
    char out = 0;
    if (level == PTST__JP_OR || level == PTST__JP_AND) {
        return ptst__jp_take_name(p, level == PTST__JP_OR ? "or" : "and") ? 'o' : 0;
    }
    if (level == PTST__JP_COMPARE) {
        if (ptst__jp_take_name(p, "in")) {
            return 'i';
        }
        if (ptst__jp_is_name(t, "not") && ptst__jp_is_name(t + 1, "in")) {
            p->next += 2;
            return 'n';
        }
        out = op == '<' || op == '>'  ? (char)op
              : op == '<' + 256 * '=' ? 'l'
              : op == '>' + 256 * '=' ? 'g'
              : op == '=' + 256 * '=' ? '='
              : op == '!' + 256 * '=' ? '!'
                                      : 0;
    } else if (level == PTST__JP_POWER) {
        out = op == '*' + 256 * '*' ? 'p' : 0;
    } else if (level == PTST__JP_SUM) {
        out = op == '+' || op == '-' ? (char)op : 0;
    } else if (level == PTST__JP_CONCAT) {
        out = op == '~' ? '~' : 0;
    } else {
        out = op == '*' || op == '/' || op == '%' ? (char)op : op == '/' + 256 * '/' ? 'f' : 0;
    }
    p->next += out != 0;
    return out;
}

/* a ~ b ~ c, or a < b < c: one node for the whole chain. */
static ptst__jnode *ptst__jp_chain(ptst__jparser *p, int level, ptst__jnode *left, char op) {
    bool compare = level == PTST__JP_COMPARE;
    ptst__jnode *n = ptst__jp_node(p, compare ? PTST__JN_COMPARE : PTST__JN_CONCAT), *part;
    ptst__jnode **tail;
    if (n == NULL || left == NULL) {
        return n;
    }
    n->a = left;
    tail = compare ? &n->b : &left->next;
    for (; op != 0 && p->code == PTST_OK; op = ptst__jp_operator(p, level)) {
        part = compare ? ptst__jp_node(p, PTST__JN_OPERAND) : ptst__jp_level(p, level + 1);
        if (compare && part != NULL) {
            part->op = (uint8_t)op;
            part->a = ptst__jp_level(p, level + 1);
        }
        ptst__jp_link(&tail, part);
    }
    return n;
}

static ptst__jnode *ptst__jp_level(ptst__jparser *p, int level) {
    ptst__jnode *left, *n;
    char op;
    if (level == PTST__JP_UNARY) {
        return ptst__jp_unary(p, true);
    }
    if (level == PTST__JP_NOT && ptst__jp_is_name(ptst__jp_token(p), "not")) {
        n = ptst__jp_node(p, PTST__JN_NOT);
        ptst__jp_skip(p);
        if (ptst__jp_enter(p) && n != NULL) {
            n->a = ptst__jp_level(p, PTST__JP_NOT);
        }
        p->depth--;
        return n;
    }
    left = ptst__jp_level(p, level + 1);
    while (level != PTST__JP_NOT && (op = ptst__jp_operator(p, level)) != 0) {
        if (level == PTST__JP_COMPARE || level == PTST__JP_CONCAT) {
            left = ptst__jp_chain(p, level, left, op);
            continue;
        }
        p->next--; /* errors point at the operator */
        n = ptst__jp_node(p, level == PTST__JP_OR    ? PTST__JN_OR
                             : level == PTST__JP_AND ? PTST__JN_AND
                                                     : PTST__JN_BINARY);
        p->next++;
        if (n == NULL) {
            break;
        }
        n->op = (uint8_t)op;
        n->a = left;
        n->b = ptst__jp_level(p, level + 1);
        left = n;
    }
    return left;
}

/* a if b else c. Filters inside may be unknown, as in Jinja2. */
static ptst__jnode *ptst__jp_expression(ptst__jparser *p) {
    bool soft = p->soft;
    const ptst__jnode *unknown = p->unknown;
    ptst__jnode *n, *left;
    if (!ptst__jp_enter(p)) {
        p->depth--;
        return NULL;
    }
    left = ptst__jp_level(p, PTST__JP_OR);
    while (ptst__jp_take_name(p, "if")) {
        n = ptst__jp_node(p, PTST__JN_IF_ELSE);
        if (n == NULL) {
            break;
        }
        p->soft = true;
        p->unknown = unknown;
        n->b = left;
        n->a = ptst__jp_level(p, PTST__JP_OR);
        if (ptst__jp_take_name(p, "else")) {
            n->c = ptst__jp_expression(p);
        }
        left = n;
    }
    p->soft = soft;
    p->depth--;
    return left;
}

/* ---- parser: statements ---- */

static ptst__jnode *ptst__jp_body(ptst__jparser *p, const char *ends);

/* The end of a tag, where an unknown filter in it becomes an error. */
static void ptst__jp_close(ptst__jparser *p, ptst__jtype type) {
    if (p->unknown != NULL && p->code == PTST_OK) {
        ptst__jp_fail(p, p->unknown->line, p->unknown->column, "No %s named '%s'.",
                      p->unknown->kind == PTST__JN_FILTER ? "filter" : "test",
                      ptst__j_show(p->t->names[p->unknown->name]).text);
    }
    if (ptst__jp_token(p)->type == type) {
        ptst__jp_skip(p);
    } else {
        ptst__jp_expected(p, type == PTST__JT_PRINT_END ? "'}}'" : "'%}'");
    }
}

/* The body of a tag up to one of the end tags; the name of that is the current token then. */
static ptst__jnode *ptst__jp_inside(ptst__jparser *p, const char *ends) {
    ptst__jp_take(p, ':');
    ptst__jp_close(p, PTST__JT_BLOCK_END);
    return ptst__jp_body(p, ends);
}

/* The same where the body is a function of its own: no break out of it, filters checked. */
static ptst__jnode *ptst__jp_function_body(ptst__jparser *p, const char *end, int loops) {
    int outer_loops = p->loops;
    bool soft = p->soft;
    ptst__jnode *body;
    p->loops = loops;
    ptst__jp_take(p, ':');
    ptst__jp_close(p, PTST__JT_BLOCK_END);
    p->soft = false;
    body = ptst__jp_body(p, end);
    p->soft = soft;
    p->loops = outer_loops;
    ptst__jp_skip(p);
    return body;
}

static void ptst__jp_check_target(ptst__jparser *p, const ptst__jnode *n, bool attribute) {
    const ptst__jnode *k;
    if (n == NULL || p->code != PTST_OK) {
        return;
    }
    if (n->kind == PTST__JN_TUPLE) {
        for (k = n->a; k != NULL; k = k->next) {
            ptst__jp_check_target(p, k, attribute);
        }
    } else if (n->kind != PTST__JN_NAME && (n->kind != PTST__JN_TARGET || !attribute)) {
        ptst__jp_fail(p, n->line, n->column, "can't assign to this expression");
    } else if (n->kind == PTST__JN_NAME && p->fors > 0 &&
               ptst__j_same_text(p->t->names[n->name], "loop")) {
        ptst__jp_fail(p, n->line, n->column,
                      "Can't assign to special loop variable in for-loop target");
    }
}

static ptst__jnode *ptst__jp_if(ptst__jparser *p) {
    ptst__jnode *first = NULL, **to = &first, *n;
    bool soft = p->soft, more = true;
    p->soft = true;
    while (more && p->code == PTST_OK) { /* the current token is if or elif */
        n = ptst__jp_node(p, PTST__JN_IF);
        ptst__jp_skip(p);
        if (n == NULL) {
            break;
        }
        n->a = ptst__jp_tuple(p, PTST__JP_PLAIN, NULL);
        n->c = ptst__jp_inside(p, "elif else endif");
        *to = n;
        to = &n->e;
        more = n->flag = ptst__jp_is_name(ptst__jp_token(p), "elif"); /* then e is an elif */
    }
    if (ptst__jp_take_name(p, "else")) {
        *to = ptst__jp_inside(p, "endif");
    }
    ptst__jp_skip(p); /* endif */
    p->soft = soft;
    return first;
}

static ptst__jnode *ptst__jp_for(ptst__jparser *p) {
    ptst__jnode *n = ptst__jp_node(p, PTST__JN_FOR);
    bool soft = p->soft;
    ptst__jp_skip(p);
    if (n == NULL) {
        return NULL;
    }
    p->fors++;
    n->a = ptst__jp_tuple(p, PTST__JP_TARGET, "in");
    ptst__jp_check_target(p, n->a, false);
    if (!ptst__jp_take_name(p, "in")) {
        ptst__jp_expected(p, "'in'");
    }
    n->b = ptst__jp_tuple(p, PTST__JP_PLAIN, "recursive");
    p->soft = false;
    if (ptst__jp_take_name(p, "if")) {
        n->d = ptst__jp_expression(p);
    }
    n->flag = ptst__jp_take_name(p, "recursive");
    p->loops++;
    n->c = ptst__jp_inside(p, "endfor else");
    p->loops--;
    if (ptst__jp_take_name(p, "else")) {
        n->e = ptst__jp_inside(p, "endfor");
    }
    ptst__jp_skip(p); /* endfor */
    p->soft = soft;
    p->fors--;
    return n;
}

static ptst__jnode *ptst__jp_set(ptst__jparser *p) {
    ptst__jnode *n = ptst__jp_node(p, PTST__JN_SET);
    ptst__jp_skip(p);
    if (n == NULL) {
        return NULL;
    }
    n->a = ptst__jp_tuple(p, PTST__JP_TARGET, NULL);
    ptst__jp_check_target(p, n->a, true);
    if (ptst__jp_take(p, '=')) {
        n->b = ptst__jp_tuple(p, 0, NULL);
        return n;
    }
    n->kind = PTST__JN_SET_BODY;
    n->b = ptst__jp_filter(p, NULL, false);
    n->c = ptst__jp_function_body(p, "endset", p->loops);
    return n;
}

/* (a, b=1) of a macro or call */
static ptst__jnode *ptst__jp_parameters(ptst__jparser *p) {
    ptst__jnode *list = NULL, **tail = &list, *n, *k;
    bool defaults = false;
    ptst__jp_expect(p, '(');
    while (p->code == PTST_OK && !ptst__jp_take(p, ')')) {
        if (list != NULL) {
            ptst__jp_expect(p, ',');
        }
        n = ptst__jp_node(p, PTST__JN_PARAM);
        if (n == NULL) {
            break;
        }
        n->name = ptst__jp_need_name(p);
        for (k = list; k != NULL; k = k->next) {
            if (k->name == n->name) {
                ptst__jp_fail(p, n->line, n->column, "duplicate argument");
            }
        }
        if (ptst__jp_take(p, '=')) {
            n->a = ptst__jp_expression(p);
            defaults = true;
        } else if (defaults) {
            ptst__jp_fail(p, n->line, n->column, "non-default argument follows default argument");
        }
        ptst__jp_link(&tail, n);
    }
    return list;
}

/* Body and used names of a macro or call; parameters are parsed. end: its end tag. */
static void ptst__jp_macro_body(ptst__jparser *p, ptst__jnode *n, const char *end) {
    unsigned uses = p->uses;
    const ptst__jnode *k;
    p->uses = 0;
    n->c = ptst__jp_function_body(p, end, 0);
    n->op = (uint8_t)p->uses;
    p->uses |= uses;
    for (k = n->a; k != NULL && p->code == PTST_OK; k = k->next) {
        const ptst__jstring *name = p->t->names[k->name];
        if (ptst__j_same_text(name, "kwargs")) {
            n->op = (uint8_t)(n->op & ~PTST__J_USES_KWARGS);
        } else if (ptst__j_same_text(name, "varargs")) {
            n->op = (uint8_t)(n->op & ~PTST__J_USES_VARARGS);
        } else if (ptst__j_same_text(name, "caller")) {
            if ((n->op & PTST__J_USES_CALLER) != 0 && k->a == NULL) {
                ptst__jp_fail(p, n->line, n->column,
                              "the special \"caller\" argument must be omitted or be given a "
                              "default");
            }
            n->op = (uint8_t)(n->op & ~PTST__J_USES_CALLER);
        }
    }
}

static ptst__jnode *ptst__jp_macro(ptst__jparser *p) {
    ptst__jnode *n = ptst__jp_node(p, PTST__JN_MACRO);
    ptst__jp_skip(p);
    if (n == NULL) {
        return NULL;
    }
    n->name = ptst__jp_need_name(p);
    n->flag = true; /* has a name */
    n->a = ptst__jp_parameters(p);
    ptst__jp_macro_body(p, n, "endmacro");
    return n;
}

static ptst__jnode *ptst__jp_call_body(ptst__jparser *p) {
    ptst__jnode *n = ptst__jp_node(p, PTST__JN_CALL_BODY);
    ptst__jp_skip(p);
    if (n == NULL) {
        return NULL;
    }
    n->b = ptst__jp_node(p, PTST__JN_MACRO);
    if (n->b == NULL) {
        return NULL;
    }
    if (ptst__jp_is_op(ptst__jp_token(p), '(')) {
        n->b->a = ptst__jp_parameters(p);
    }
    n->a = ptst__jp_expression(p);
    if (n->a != NULL && n->a->kind != PTST__JN_CALL) {
        ptst__jp_fail(p, n->line, n->column, "expected call");
    }
    ptst__jp_macro_body(p, n->b, "endcall");
    return n;
}

static ptst__jnode *ptst__jp_with(ptst__jparser *p) {
    ptst__jnode *n = ptst__jp_node(p, PTST__JN_WITH), *list = NULL, **tail = &list, *k;
    ptst__jp_skip(p);
    while (p->code == PTST_OK && ptst__jp_token(p)->type != PTST__JT_BLOCK_END) {
        if (list != NULL) {
            ptst__jp_expect(p, ',');
        }
        k = ptst__jp_node(p, PTST__JN_SET);
        if (k == NULL) {
            break;
        }
        k->a = ptst__jp_tuple(p, PTST__JP_TARGET, NULL);
        ptst__jp_check_target(p, k->a, false);
        ptst__jp_expect(p, '=');
        k->b = ptst__jp_expression(p);
        ptst__jp_link(&tail, k);
    }
    if (n != NULL) {
        n->a = list;
        n->c = ptst__jp_function_body(p, "endwith", p->loops);
    }
    return n;
}

/* {% generation %}, {% block name %}, {% autoescape false %} */
static ptst__jnode *ptst__jp_scope(ptst__jparser *p, int op, const char *end) {
    ptst__jnode *n = ptst__jp_node(p, PTST__JN_SCOPE);
    const ptst__jtoken *name = NULL;
    ptst__jp_skip(p);
    if (n == NULL) {
        return NULL;
    }
    n->op = (uint8_t)op;
    if (op == 2) {
        name = ptst__jp_token(p);
        ptst__jp_need_name(p);
        ptst__jp_take_name(p, "scoped");
        ptst__jp_take_name(p, "required");
    } else if (op == 3) {
        n->a = ptst__jp_expression(p);
    }
    n->c = ptst__jp_function_body(p, end, op == 3 ? p->loops : 0);
    if (name != NULL && p->code == PTST_OK) {
        ptst__jp_take_name(p, name->text);
    }
    return n;
}

static ptst__jnode *ptst__jp_print(ptst__jparser *p) {
    ptst__jnode *n = ptst__jp_node(p, PTST__JN_PRINT), *list = NULL, **tail = &list;
    ptst__jp_skip(p);
    while (p->code == PTST_OK && ptst__jp_token(p)->type != PTST__JT_BLOCK_END) {
        if (list != NULL) {
            ptst__jp_expect(p, ',');
        }
        ptst__jp_link(&tail, ptst__jp_expression(p));
    }
    if (n != NULL) {
        n->a = list;
        n->flag = true; /* all of them are printed */
    }
    return n;
}

static ptst__jnode *ptst__jp_control(ptst__jparser *p, ptst__jnode_kind kind) {
    ptst__jnode *n = ptst__jp_node(p, kind);
    ptst__jp_skip(p);
    if (p->loops == 0 && n != NULL) {
        ptst__jp_fail(p, n->line, n->column, "a loop control outside of a loop");
    }
    return n;
}

/* extends, include, import, from: there are no other templates. */
static ptst__jnode *ptst__jp_refused(ptst__jparser *p) {
    ptst__jnode *n = ptst__jp_node(p, PTST__JN_REFUSED);
    while (p->code == PTST_OK && ptst__jp_token(p)->type != PTST__JT_BLOCK_END &&
           ptst__jp_token(p)->type != PTST__JT_END) {
        ptst__jp_skip(p);
    }
    return n;
}

static ptst__jnode *ptst__jp_filter_body(ptst__jparser *p) {
    ptst__jnode *n = ptst__jp_node(p, PTST__JN_FILTER_BODY);
    ptst__jp_skip(p);
    if (n != NULL) {
        n->a = ptst__jp_filter(p, NULL, true);
        n->c = ptst__jp_function_body(p, "endfilter", p->loops);
    }
    return n;
}

/* The tag whose name is the current token, without its "%}". */
static ptst__jnode *ptst__jp_statement(ptst__jparser *p) {
    const ptst__jtoken *t = ptst__jp_token(p);
    static const struct {
        const char *name;
        ptst__jnode *(*parse)(ptst__jparser *p);
    } tags[] = {{"if", ptst__jp_if},           {"for", ptst__jp_for},
                {"set", ptst__jp_set},         {"macro", ptst__jp_macro},
                {"call", ptst__jp_call_body},  {"with", ptst__jp_with},
                {"print", ptst__jp_print},     {"filter", ptst__jp_filter_body},
                {"extends", ptst__jp_refused}, {"include", ptst__jp_refused},
                {"import", ptst__jp_refused},  {"from", ptst__jp_refused}};
    size_t i;
    for (i = 0; i < sizeof tags / sizeof tags[0]; i++) {
        if (ptst__jp_is_name(t, tags[i].name)) {
            return tags[i].parse(p);
        }
    }
    if (ptst__jp_is_name(t, "break") || ptst__jp_is_name(t, "continue")) {
        return ptst__jp_control(p, t->text[0] == 'b' ? PTST__JN_BREAK : PTST__JN_CONTINUE);
    }
    if (ptst__jp_is_name(t, "generation")) {
        return ptst__jp_scope(p, 1, "endgeneration");
    }
    if (ptst__jp_is_name(t, "block")) {
        return ptst__jp_scope(p, 2, "endblock");
    }
    if (ptst__jp_is_name(t, "autoescape")) {
        return ptst__jp_scope(p, 3, "endautoescape");
    }
    if (t->type == PTST__JT_NAME) {
        ptst__jp_fail(p, t->line, t->column, "Encountered unknown tag '%.60s'.", t->text);
    } else {
        ptst__jp_expected(p, "the name of a tag");
    }
    return NULL;
}

/* Everything up to one of the end tags (NULL: the end of the template). */
static ptst__jnode *ptst__jp_body(ptst__jparser *p, const char *ends) {
    ptst__jnode *list = NULL, **tail = &list, *n;
    ptst__jp_enter(p);
    while (p->code == PTST_OK && ptst__jp_token(p)->type != PTST__JT_END) {
        const ptst__jtoken *t = ptst__jp_token(p);
        if (t->type == PTST__JT_DATA) {
            n = ptst__jp_node(p, PTST__JN_TEXT);
            ptst__jp_skip(p);
            if (n != NULL) {
                n->value = ptst__jp_string(p, t->text, t->size);
            }
        } else if (t->type == PTST__JT_PRINT) {
            ptst__jp_skip(p);
            n = ptst__jp_node(p, PTST__JN_PRINT);
            if (n != NULL) {
                n->a = ptst__jp_tuple(p, 0, NULL);
            }
            ptst__jp_close(p, PTST__JT_PRINT_END);
        } else {
            ptst__jp_skip(p);
            t = ptst__jp_token(p);
            if (ends != NULL && t->type == PTST__JT_NAME) {
                ptst__jstring name = {t->text, NULL, t->size, 0, NULL};
                if (ptst__j_listed(ends, &name)) {
                    p->depth--;
                    return list;
                }
            }
            n = ptst__jp_statement(p);
            ptst__jp_close(p, PTST__JT_BLOCK_END);
        }
        ptst__jp_link(&tail, n);
    }
    if (ends != NULL && p->code == PTST_OK) {
        ptst__jp_fail(p, ptst__jp_token(p)->line, ptst__jp_token(p)->column,
                      "Unexpected end of template. Jinja was looking for the following tags: %s.",
                      ends);
    }
    p->depth--;
    return list;
}

/* A copy with plain newlines and without the last one, as Jinja2 reads source. */
static char *ptst__jp_source(ptst_ctx *c, const char *source, size_t size, size_t *out) {
    char *s = (char *)ptst__alloc(c, size + 1, 1);
    size_t i, n = 0;
    if (s == NULL) {
        return NULL;
    }
    for (i = 0; i < size; i++) {
        if (source[i] == '\r') {
            s[n++] = '\n';
            i += i + 1 < size && source[i + 1] == '\n';
        } else {
            s[n++] = source[i];
        }
    }
    n -= n > 0 && s[n - 1] == '\n';
    s[n] = 0;
    *out = n;
    return s;
}

static ptst_code ptst__jp_run(ptst_ctx *c, ptst_jinja *t, const char *source, size_t size) {
    ptst__jparser p;
    size_t i, n;
    uint32_t point;
    char *s;
    memset(&p, 0, sizeof p);
    p.c = c;
    p.t = t;
    if (size > PTST__J_SOURCE_MAX) {
        return ptst__fail(c, PTST_ERR_LIMIT, "%s: a template of more than %d bytes", t->name.data,
                          (int)PTST__J_SOURCE_MAX);
    }
    for (i = 0; i < size; i += n) {
        n = ptst__utf8_read(source + i, size - i, &point);
        if (n == 0) {
            return ptst__fail(c, PTST_ERR_FORMAT, "%s: byte %llu is not valid UTF-8", t->name.data,
                              (unsigned long long)i);
        }
    }
    s = ptst__jp_source(c, source, size, &p.size);
    if (s == NULL) {
        return PTST_ERR_MEMORY;
    }
    p.s = s;
    ptst__jl_run(&p);
    if (p.code == PTST_OK) {
        t->body = ptst__jp_body(&p, NULL);
    }
    ptst__free(c, p.tokens);
    ptst__free(c, s);
    return p.code;
}

PTST_API void ptst_jinja_free(ptst_ctx *c, ptst_jinja *t) {
    if (t != NULL) {
        ptst_text_free(c, &t->name);
        ptst__free(c, (void *)t->names);
        ptst__map_free(c, &t->map);
        ptst__arena_free(c, &t->arena);
        ptst__free(c, t);
    }
}

PTST_API ptst_jinja *ptst_jinja_compile(ptst_ctx *c, const char *source, size_t size,
                                        const char *name) {
    ptst_jinja *t = (ptst_jinja *)ptst__calloc(c, 1, sizeof *t);
    ptst_code code;
    if (t == NULL) {
        return NULL;
    }
    code = ptst__text_add(c, &t->name, name);
    if (code == PTST_OK) {
        code = ptst__jp_run(c, t, source, size);
    }
    if (code != PTST_OK) {
        ptst_jinja_free(c, t);
        return NULL;
    }
    return t;
}

/* ---- evaluator: names and arguments ---- */

/* A macro, or the body of a call block (its caller). */
typedef struct ptst__jmacro {
    const ptst__jnode *node;
    ptst__jscope *scope; /* where it was defined */
    const ptst__jstring *name;
} ptst__jmacro;

static const ptst__jstring *ptst__j_macro_name(const ptst__jmacro *m) { return m->name; }

static ptst__jvalue ptst__j_eval(ptst__jrun *r, const ptst__jnode *n);
static void ptst__j_exec(ptst__jrun *r, const ptst__jnode *list);

/* The variable, NULL if the scope itself does not have it. */
static ptst__jbinding *ptst__j_binding(const ptst__jscope *s, uint32_t name) {
    ptst__jbinding *b = s->first;
    while (b != NULL && b->name != name) {
        b = b->next;
    }
    return b;
}

/* Sets a variable of the scope itself. */
static void ptst__j_assign(ptst__jrun *r, ptst__jscope *s, uint32_t name, ptst__jvalue value) {
    ptst__jbinding *b = ptst__j_binding(s, name);
    if (b == NULL) {
        b = r->spare;
        if (b != NULL) {
            r->spare = b->next;
        } else {
            b = (ptst__jbinding *)ptst__j_alloc(r, 1, sizeof *b);
        }
        if (b == NULL) {
            return;
        }
        b->name = name;
        b->next = s->first;
        s->first = b;
    }
    b->value = value;
}

static void ptst__j_open(ptst__jscope *s, ptst__jscope *up) {
    s->up = up;
    s->first = NULL;
    s->captured = false;
}

/* Ends a scope. Its variables are used again unless a macro remembers them. */
static void ptst__j_close(ptst__jrun *r, ptst__jscope *s) {
    ptst__jbinding *last = s->first;
    if (last != NULL && !s->captured) {
        while (last->next != NULL) {
            last = last->next;
        }
        last->next = r->spare;
        r->spare = s->first;
    }
    s->first = NULL;
}

/* A scope that may be remembered must outlive its block, so it lies in the arena. */
static ptst__jscope *ptst__j_scope(ptst__jrun *r, ptst__jscope *up) {
    ptst__jscope *s = (ptst__jscope *)ptst__j_alloc(r, 1, sizeof *s);
    if (s != NULL) {
        ptst__j_open(s, up);
    }
    return s;
}

static ptst__jvalue ptst__j_name(ptst__jrun *r, uint32_t name) {
    const ptst__jstring *text = r->t->names[name];
    const ptst__jscope *s;
    const ptst__jbuiltin *f;
    ptst__jvalue v;
    for (s = r->scope; s != NULL; s = s->up) {
        const ptst__jbinding *b = ptst__j_binding(s, name);
        if (b != NULL) {
            return b->value;
        }
    }
    f = ptst__j_lookup(ptst__j_globals, text);
    if (f == NULL) {
        return ptst__j_undefined(PTST__J_WHY_NAME, text, 0);
    }
    v = ptst__j_make(PTST__J_FUNCTION, 0);
    v.as.function = f;
    return v;
}

/* Binds a target (a name, a tuple of targets, a namespace's attribute) to a value. */
static void ptst__j_bind_target(ptst__jrun *r, const ptst__jnode *target, ptst__jvalue value) {
    const ptst__jnode *k;
    ptst__jiter i;
    ptst__jvalue item, key;
    if (r->code != PTST_OK) {
        return;
    }
    if (target->kind == PTST__JN_NAME) {
        ptst__j_assign(r, r->scope, target->name, value);
        return;
    }
    if (target->kind == PTST__JN_TARGET) {
        ptst__jvalue space = ptst__j_name(r, target->name);
        key = target->value;
        if (space.kind != PTST__J_NAMESPACE) {
            ptst__j_fail(r, PTST_ERR_FORMAT, "cannot assign attribute on non-namespace object");
        } else if (key.as.string->bytes[0] == '_') {
            ptst__j_fail(r, PTST_ERR_FORMAT, "a namespace cannot hold names that begin with _");
        } else {
            ptst__j_dict_put(r, space, key, value);
        }
        return;
    }
    if (!ptst__j_iter(r, value, &i)) {
        return;
    }
    for (k = target->a; k != NULL && ptst__j_next(r, &i, &item); k = k->next) {
        ptst__j_bind_target(r, k, item);
    }
    if (r->code == PTST_OK && (k != NULL || ptst__j_next(r, &i, &item))) {
        ptst__j_fail(r, PTST_ERR_FORMAT, "%s values to unpack",
                     k != NULL ? "not enough" : "too many");
    }
}

/* Adds a keyword argument. */
static void ptst__j_add_named(ptst__jrun *r, ptst__jargs *a, size_t *capacity,
                              const ptst__jstring *name, ptst__jvalue value) {
    size_t i, n;
    ptst__jnamed *more;
    ptst__j_pay(r, a->named_count / 8);
    for (i = 0; i < a->named_count; i++) {
        if (a->named[i].name->size == name->size &&
            memcmp(a->named[i].name->bytes, name->bytes, name->size) == 0) {
            ptst__j_fail(r, PTST_ERR_FORMAT, "keyword argument repeated: %s",
                         ptst__j_show(name).text);
        }
    }
    if (a->named_count == *capacity) {
        n = *capacity == 0 ? 4 : 2 * *capacity;
        more = (ptst__jnamed *)ptst__j_alloc(r, n, sizeof *more);
        if (more == NULL) {
            return;
        }
        if (a->named_count != 0) {
            memcpy(more, a->named, a->named_count * sizeof *more);
        }
        a->named = more;
        *capacity = n;
    }
    if (r->code == PTST_OK) {
        a->named[a->named_count].name = name;
        a->named[a->named_count++].value = value;
    }
}

/* **value */
static void ptst__j_spread(ptst__jrun *r, ptst__jargs *a, size_t *capacity, ptst__jvalue value) {
    size_t i;
    if (value.kind != PTST__J_DICT) {
        ptst__j_fail(r, PTST_ERR_FORMAT, "argument after ** must be a mapping, not %s",
                     ptst__j_type(value));
        return;
    }
    for (i = 0; i < value.as.dict->count && r->code == PTST_OK; i++) {
        if (ptst__j_need_string(r, value.as.dict->pairs[i].key, "a keyword") != NULL) {
            ptst__j_add_named(r, a, capacity, value.as.dict->pairs[i].key.as.string,
                              value.as.dict->pairs[i].value);
        }
    }
}

/* Evaluates the arguments of a call. */
static ptst__jargs ptst__j_arguments(ptst__jrun *r, const ptst__jnode *list) {
    ptst__jargs a;
    size_t count = 0, capacity = 0;
    const ptst__jnode *n;
    ptst__jvalue v, stars = ptst__j_none();
    memset(&a, 0, sizeof a);
    for (n = list; n != NULL; n = n->next) {
        count += n->op == 0;
    }
    a.values = count == 0 ? NULL : (ptst__jvalue *)ptst__j_alloc(r, count, sizeof *a.values);
    for (n = list; n != NULL && r->code == PTST_OK; n = n->next) {
        v = ptst__j_eval(r, n->a);
        if (r->code != PTST_OK) {
            break;
        }
        if (n->op == 0) {
            a.values[a.count++] = v;
        } else if (n->op == 'k') {
            ptst__j_add_named(r, &a, &capacity, r->t->names[n->name], v);
        } else if (n->op == '2') {
            ptst__j_spread(r, &a, &capacity, v);
        } else {
            stars = ptst__j_collect(r, v, PTST__J_LIST);
        }
    }
    if (stars.kind == PTST__J_LIST && r->code == PTST_OK) { /* *value stands behind the others */
        size_t total = a.count + stars.as.list->count;
        ptst__jvalue *all = (ptst__jvalue *)ptst__j_alloc(r, total, sizeof *all);
        if (all != NULL && a.count != 0) {
            memcpy(all, a.values, a.count * sizeof *all);
        }
        if (all != NULL && stars.as.list->count != 0) {
            memcpy(all + a.count, stars.as.list->items, stars.as.list->count * sizeof *all);
        }
        if (all != NULL) {
            a.values = all;
            a.count = total;
        }
    }
    if (r->code != PTST_OK) {
        a.count = a.named_count = 0;
    }
    return a;
}

/* ---- evaluator: calls ---- */

/* A macro value; every scope around it must be kept. */
static ptst__jvalue ptst__j_make_macro(ptst__jrun *r, const ptst__jnode *n) {
    ptst__jvalue v = ptst__j_make(PTST__J_MACRO, 0);
    ptst__jmacro *m = (ptst__jmacro *)ptst__j_alloc(r, 1, sizeof *m);
    ptst__jscope *s;
    if (m == NULL) {
        return ptst__j_none();
    }
    m->node = n;
    m->scope = r->scope;
    m->name = n->flag ? r->t->names[n->name] : NULL;
    for (s = r->scope; s != NULL && !s->captured; s = s->up) {
        s->captured = true;
    }
    v.as.macro = m;
    return v;
}

/* The number of an identifier of the template, or SIZE_MAX. */
static size_t ptst__j_name_id(const ptst__jrun *r, const char *name) {
    int32_t id = ptst__map_get(&r->t->map, name, strlen(name), -1);
    return id < 0 ? SIZE_MAX : (size_t)id;
}

static void ptst__j_assign_text(ptst__jrun *r, const char *name, ptst__jvalue v) {
    size_t id = ptst__j_name_id(r, name);
    if (id != SIZE_MAX) {
        ptst__j_assign(r, r->scope, (uint32_t)id, v);
    }
}

/* Takes a keyword argument out of the list. */
static bool ptst__j_take_named(ptst__jargs *a, const ptst__jstring *name, ptst__jvalue *v) {
    size_t i;
    for (i = 0; i < a->named_count; i++) {
        if (a->named[i].name->size == name->size &&
            memcmp(a->named[i].name->bytes, name->bytes, name->size) == 0) {
            *v = a->named[i].value;
            memmove(&a->named[i], &a->named[i + 1], (a->named_count - i - 1) * sizeof a->named[0]);
            a->named_count--;
            return true;
        }
    }
    return false;
}

/* kwargs, varargs and caller of a macro, or the error that there are arguments too many. */
static void ptst__j_bind_extra(ptst__jrun *r, const ptst__jmacro *m, ptst__jargs *a, size_t used) {
    static const ptst__jstring caller = {"caller", NULL, 6, 6, NULL};
    unsigned uses = m->node->op;
    ptst__jvalue v = ptst__j_undefined(PTST__J_WHY_NAME, &caller, 0);
    ptst__jargs named = *a;
    if ((uses & PTST__J_USES_CALLER) != 0) {
        ptst__j_take_named(a, &caller, &v);
        ptst__j_assign_text(r, "caller", v);
        named = *a;
    }
    if ((uses & PTST__J_USES_KWARGS) != 0) {
        named.count = 0;
        ptst__j_assign_text(r, "kwargs", ptst__j_build_dict(r, PTST__J_DICT, &named));
    } else if (a->named_count != 0) {
        ptst__j_fail(r, PTST_ERR_FORMAT, "macro takes no keyword argument '%s'",
                     ptst__j_show(a->named[0].name).text);
    }
    if ((uses & PTST__J_USES_VARARGS) != 0) {
        ptst__j_assign_text(r, "varargs",
                            ptst__j_list(r, PTST__J_TUPLE, a->values + used, a->count - used));
    } else if (a->count > used) {
        ptst__j_fail(r, PTST_ERR_FORMAT, "macro takes not more than %d argument(s)", (int)used);
    }
}

/* Runs `body` with its output going to a string. */
static ptst__jvalue ptst__j_capture(ptst__jrun *r, const ptst__jnode *body) {
    ptst__jsink o = {NULL, NULL, 0, 0}, *outer = r->sink;
    r->sink = &o;
    ptst__j_exec(r, body);
    r->sink = outer;
    return ptst__j_sink_string(r, &o);
}

static ptst__jvalue ptst__j_call_macro(ptst__jrun *r, const ptst__jmacro *m, ptst__jargs *a) {
    ptst__jscope *outer = r->scope, *inner = ptst__j_scope(r, m->scope);
    const ptst__jnode *p;
    size_t used = 0, i;
    ptst__jvalue v = ptst__j_none();
    if (inner == NULL) {
        return v;
    }
    r->scope = inner;
    for (p = m->node->a, i = 0; p != NULL && r->code == PTST_OK; p = p->next, i++) {
        if (i < a->count) {
            ptst__j_assign(r, inner, p->name, a->values[used++]);
        } else {
            v = ptst__j_make(PTST__J_MISSING, 0);
            ptst__j_take_named(a, r->t->names[p->name], &v);
            ptst__j_assign(r, inner, p->name, v);
        }
    }
    ptst__j_bind_extra(r, m, a, used);
    for (p = m->node->a; p != NULL && r->code == PTST_OK; p = p->next) { /* defaults see the rest */
        ptst__jbinding *b = ptst__j_binding(inner, p->name);
        if (b->value.kind == PTST__J_MISSING) {
            v = ptst__j_undefined(PTST__J_WHY_PARAMETER, r->t->names[p->name], 0);
            b->value = v;
            if (p->a != NULL) {
                v = ptst__j_eval(r, p->a);
                ptst__j_assign(r, inner, p->name, v);
            }
        }
    }
    v = ptst__j_capture(r, m->node->c);
    r->flow = 0;
    r->scope = outer;
    ptst__j_close(r, inner);
    return v;
}

static void ptst__j_run_loop(ptst__jrun *r, const ptst__jnode *n, ptst__jvalue over, size_t depth0);

/* loop(items) of a recursive loop */
static ptst__jvalue ptst__j_call_loop(ptst__jrun *r, const ptst__jloop *l, const ptst__jargs *a) {
    ptst__jsink o = {NULL, NULL, 0, 0}, *outer = r->sink;
    ptst__jscope *scope = r->scope;
    if (!l->node->flag || a->count != 1 || a->named_count != 0) {
        return ptst__j_fail(r, PTST_ERR_FORMAT,
                            "The loop must have the 'recursive' marker to be called recursively.");
    }
    r->sink = &o;
    r->scope = l->scope;
    ptst__j_run_loop(r, l->node, a->values[0], l->depth0 + 1);
    r->scope = scope;
    r->sink = outer;
    return ptst__j_sink_string(r, &o);
}

/* f(arguments) */
static ptst__jvalue ptst__j_call(ptst__jrun *r, ptst__jvalue f, ptst__jargs *a) {
    ptst__jvalue none = ptst__j_none();
    if (r->code != PTST_OK) {
        return none;
    }
    switch ((ptst__jkind)f.kind) {
    case PTST__J_MACRO:
        return ptst__j_call_macro(r, f.as.macro, a);
    case PTST__J_FUNCTION:
        return ptst__j_call_builtin(r, f.as.function, none, a);
    case PTST__J_METHOD:
        return ptst__j_call_builtin(r, f.as.method->function, f.as.method->self, a);
    case PTST__J_LOOP:
        return ptst__j_call_loop(r, f.as.loop, a);
    case PTST__J_JOINER:
        f.as.cycle->at++;
        return f.as.cycle->at == 1 ? ptst__j_text(r, "") : f.as.cycle->items.items[0];
    case PTST__J_UNDEFINED:
        return ptst__j_fail_undefined(r, f);
    default:
        return ptst__j_fail(r, PTST_ERR_FORMAT, "'%s' object is not callable", ptst__j_type(f));
    }
}

/* ---- evaluator: expressions ---- */

static ptst__jvalue ptst__j_eval_list(ptst__jrun *r, const ptst__jnode *n) {
    ptst__jvalue out =
        ptst__j_list(r, n->kind == PTST__JN_TUPLE ? PTST__J_TUPLE : PTST__J_LIST, NULL, 0);
    const ptst__jnode *k;
    for (k = n->a; k != NULL && r->code == PTST_OK; k = k->next) {
        ptst__j_push(r, out, ptst__j_eval(r, k));
    }
    return out;
}

static ptst__jvalue ptst__j_eval_dict(ptst__jrun *r, const ptst__jnode *n) {
    ptst__jvalue out = ptst__j_dict(r, PTST__J_DICT), key;
    const ptst__jnode *k;
    for (k = n->a; k != NULL && r->code == PTST_OK; k = k->next->next) {
        key = ptst__j_eval(r, k);
        ptst__j_dict_put(r, out, key, ptst__j_eval(r, k->next));
    }
    return out;
}

static ptst__jvalue ptst__j_eval_slice(ptst__jrun *r, const ptst__jnode *n) {
    ptst__jvalue of = ptst__j_eval(r, n->a), none = ptst__j_none(), part[3];
    part[0] = n->b == NULL ? none : ptst__j_eval(r, n->b);
    part[1] = n->c == NULL ? none : ptst__j_eval(r, n->c);
    part[2] = n->d == NULL ? none : ptst__j_eval(r, n->d);
    r->at = n;
    return r->code == PTST_OK ? ptst__j_slice(r, of, part[0], part[1], part[2]) : none;
}

/* A filter or test on a value. */
static ptst__jvalue ptst__j_apply(ptst__jrun *r, const ptst__jnode *n, ptst__jvalue self) {
    ptst__jargs a = ptst__j_arguments(r, n->b);
    ptst__jvalue v;
    r->at = n;
    if (n->function == NULL) {
        return ptst__j_fail(r, PTST_ERR_FORMAT, "No %s named '%s' found.",
                            n->kind == PTST__JN_TEST ? "test" : "filter",
                            ptst__j_show(r->t->names[n->name]).text);
    }
    v = ptst__j_call_builtin(r, n->function, self, &a);
    return v;
}

/* Filters on the output of a block; their innermost child is missing. */
static ptst__jvalue ptst__j_apply_all(ptst__jrun *r, const ptst__jnode *n, ptst__jvalue self) {
    if (n->a != NULL) {
        self = ptst__j_apply_all(r, n->a, self);
    }
    return r->code == PTST_OK ? ptst__j_apply(r, n, self) : self;
}

static ptst__jvalue ptst__j_eval_concat(ptst__jrun *r, const ptst__jnode *n) {
    const ptst__jnode *k = n->a;
    ptst__jvalue out = ptst__j_str(r, ptst__j_eval(r, k));
    out.flag = 0;
    for (k = k->next; k != NULL && r->code == PTST_OK; k = k->next) {
        ptst__jvalue part = ptst__j_eval(r, k);
        r->at = n;
        out = ptst__j_concat(r, out, ptst__j_str(r, part));
    }
    out.flag = 0;
    return out;
}

static bool ptst__j_holds(ptst__jrun *r, char op, ptst__jvalue a, ptst__jvalue b) {
    int order;
    if (op == '=' || op == '!') {
        return ptst__j_equal(r, a, b) == (op == '=');
    }
    if (op == 'i' || op == 'n') {
        return ptst__j_contains(r, b, a) == (op == 'i');
    }
    order = ptst__j_compare(r, a, b);
    return op == '<'   ? order == -1
           : op == '>' ? order == 1
           : op == 'l' ? ptst__j_at_most(order)
                       : ptst__j_at_least(order);
}

/* a < b < c: true if all hold; nothing is evaluated after the first that does not. */
static ptst__jvalue ptst__j_eval_compare(ptst__jrun *r, const ptst__jnode *n) {
    ptst__jvalue left = ptst__j_eval(r, n->a), right;
    const ptst__jnode *k;
    bool holds = true;
    for (k = n->b; k != NULL && holds && r->code == PTST_OK; k = k->next) {
        right = ptst__j_eval(r, k->a);
        r->at = k;
        holds = r->code == PTST_OK && ptst__j_holds(r, (char)k->op, left, right);
        left = right;
    }
    return ptst__j_bool(holds);
}

static ptst__jvalue ptst__j_eval_sign(ptst__jrun *r, const ptst__jnode *n) {
    ptst__jvalue v = ptst__j_eval(r, n->a);
    r->at = n;
    if (r->code != PTST_OK || v.kind == PTST__J_UNDEFINED) {
        return r->code != PTST_OK ? v : ptst__j_fail_undefined(r, v);
    }
    if (!ptst__j_is_number(v)) {
        return ptst__j_fail(r, PTST_ERR_FORMAT, "bad operand type for unary %c: '%s'", n->op,
                            ptst__j_type(v));
    }
    if (v.kind == PTST__J_FLOAT) {
        return ptst__j_float(n->op == '-' ? -v.as.number : v.as.number, v.mark);
    }
    return n->op == '-' ? ptst__j_binary(r, '-', ptst__j_int(0, v.mark), v)
                        : ptst__j_int(v.as.integer, v.mark);
}

/* Calls, filters and tests. */
static ptst__jvalue ptst__j_eval_call(ptst__jrun *r, const ptst__jnode *n) {
    ptst__jvalue v = ptst__j_eval(r, n->a);
    ptst__jargs a;
    if (n->kind != PTST__JN_CALL) {
        return r->code == PTST_OK ? ptst__j_apply(r, n, v) : v;
    }
    a = ptst__j_arguments(r, n->b);
    r->at = n;
    return ptst__j_call(r, v, &a);
}

static ptst__jvalue ptst__j_eval_pair(ptst__jrun *r, const ptst__jnode *n) {
    ptst__jvalue a = ptst__j_eval(r, n->a), b;
    if (n->kind == PTST__JN_AND || n->kind == PTST__JN_OR) {
        return ptst__j_true(r, a) == (n->kind == PTST__JN_OR) ? a : ptst__j_eval(r, n->b);
    }
    if (n->kind == PTST__JN_ATTR) {
        r->at = n;
        return ptst__j_getattr(r, a, r->t->names[n->name]);
    }
    b = ptst__j_eval(r, n->b);
    r->at = n;
    return n->kind == PTST__JN_ITEM ? ptst__j_getitem(r, a, b)
                                    : ptst__j_binary(r, (char)n->op, a, b);
}

static ptst__jvalue ptst__j_eval_if(ptst__jrun *r, const ptst__jnode *n) {
    if (ptst__j_true(r, ptst__j_eval(r, n->a))) {
        return ptst__j_eval(r, n->b);
    }
    return n->c != NULL ? ptst__j_eval(r, n->c) : ptst__j_undefined(PTST__J_WHY_ELSE, NULL, 0);
}

/* The value of an expression. */
static ptst__jvalue ptst__j_eval(ptst__jrun *r, const ptst__jnode *n) {
    ptst__jvalue v = ptst__j_none();
    r->at = r->code == PTST_OK ? n : r->at;
    if (!ptst__j_pay(r, 1)) {
        return v;
    }
    if (r->depth >= r->depth_max) {
        return ptst__j_fail(r, PTST_ERR_LIMIT, "evaluation is nested too deeply");
    }
    r->depth++;
    switch ((ptst__jnode_kind)n->kind) {
    case PTST__JN_CONST:
        v = n->value;
        break;
    case PTST__JN_NAME:
        v = ptst__j_name(r, n->name);
        break;
    case PTST__JN_LIST:
    case PTST__JN_TUPLE:
        v = ptst__j_eval_list(r, n);
        break;
    case PTST__JN_DICT:
        v = ptst__j_eval_dict(r, n);
        break;
    case PTST__JN_SLICE:
        v = ptst__j_eval_slice(r, n);
        break;
    case PTST__JN_CALL:
    case PTST__JN_FILTER:
    case PTST__JN_TEST:
        v = ptst__j_eval_call(r, n);
        break;
    case PTST__JN_NOT:
        v = ptst__j_eval(r, n->a);
        v = ptst__j_bool(!ptst__j_true(r, v));
        break;
    case PTST__JN_SIGN:
        v = ptst__j_eval_sign(r, n);
        break;
    case PTST__JN_CONCAT:
        v = ptst__j_eval_concat(r, n);
        break;
    case PTST__JN_COMPARE:
        v = ptst__j_eval_compare(r, n);
        break;
    case PTST__JN_IF_ELSE:
        v = ptst__j_eval_if(r, n);
        break;
    default: /* and, or, arithmetic, attribute, item */
        v = ptst__j_eval_pair(r, n);
    }
    r->depth--;
    return v;
}

/* ---- evaluator: statements ---- */

/* The next element of a loop that its condition lets through. */
static bool ptst__j_loop_next(ptst__jrun *r, ptst__jloop *l, ptst__jvalue *item) {
    ptst__jscope *outer = r->scope, *inner;
    bool found = false;
    while (!found && ptst__j_next(r, &l->iter, item)) {
        if (l->node->d == NULL) {
            return true;
        }
        inner = ptst__j_scope(r, l->scope);
        if (inner == NULL) {
            break;
        }
        r->scope = inner;
        ptst__j_bind_target(r, l->node->a, *item);
        found = ptst__j_true(r, ptst__j_eval(r, l->node->d));
        r->scope = outer;
        ptst__j_close(r, inner);
    }
    return found && r->code == PTST_OK;
}

/* Runs a loop over `over` in the current scope. */
static void ptst__j_run_loop(ptst__jrun *r, const ptst__jnode *n, ptst__jvalue over,
                             size_t depth0) {
    ptst__jloop *l = (ptst__jloop *)ptst__j_alloc(r, 1, sizeof *l);
    ptst__jscope *outer = r->scope, *inner = NULL;
    size_t loop_name = ptst__j_name_id(r, "loop"), rounds = 0;
    ptst__jvalue loop = ptst__j_make(PTST__J_LOOP, 0), item;
    if (l == NULL || !ptst__j_iter(r, over, &l->iter)) {
        return;
    }
    l->node = n;
    l->scope = outer;
    l->depth0 = depth0;
    l->length = -1;
    l->next = ptst__j_loop_next;
    loop.as.loop = l;
    for (; r->flow != PTST__J_BREAK && r->code == PTST_OK; rounds++) {
        item = l->after;
        if (!l->has_after && !l->next(r, l, &item)) {
            break;
        }
        l->has_after = false;
        l->index0 = rounds;
        l->before = l->current;
        l->current = item;
        if (inner == NULL || inner->captured) {
            inner = ptst__j_scope(r, outer);
        }
        if (inner == NULL) {
            break;
        }
        r->scope = inner;
        if (loop_name != SIZE_MAX) {
            ptst__j_assign(r, inner, (uint32_t)loop_name, loop);
        }
        ptst__j_bind_target(r, n->a, item);
        ptst__j_exec(r, n->c);
        r->flow = r->flow == PTST__J_CONTINUE ? 0 : r->flow;
        r->scope = outer;
        ptst__j_close(r, inner);
    }
    r->flow = 0;
    if (rounds == 0 && n->e != NULL && r->code == PTST_OK) {
        r->scope = ptst__j_scope(r, outer);
        if (r->scope != NULL) {
            ptst__j_exec(r, n->e);
            ptst__j_close(r, r->scope);
        }
        r->scope = outer;
    }
}

static void ptst__j_print(ptst__jrun *r, ptst__jvalue v) { ptst__j_put_value(r, r->sink, v); }

/* Runs `body` in a scope of its own; the output goes to a string if `captured` is not NULL. */
static void ptst__j_exec_inside(ptst__jrun *r, const ptst__jnode *body, ptst__jscope *up,
                                ptst__jvalue *captured) {
    ptst__jscope *outer = r->scope, *inner = ptst__j_scope(r, up);
    if (inner == NULL) {
        return;
    }
    r->scope = inner;
    if (captured != NULL) {
        *captured = ptst__j_capture(r, body);
    } else {
        ptst__j_exec(r, body);
    }
    r->scope = outer;
    ptst__j_close(r, inner);
}

static void ptst__j_exec_call(ptst__jrun *r, const ptst__jnode *n) {
    static const ptst__jstring caller = {"caller", NULL, 6, 6, NULL};
    ptst__jvalue f = ptst__j_eval(r, n->a->a);
    ptst__jargs a = ptst__j_arguments(r, n->a->b);
    size_t capacity = a.named_count;
    ptst__j_add_named(r, &a, &capacity, &caller, ptst__j_make_macro(r, n->b));
    r->at = n;
    ptst__j_print(r, ptst__j_call(r, f, &a));
}

/* with: values are evaluated outside, names are set inside. */
static void ptst__j_exec_with(ptst__jrun *r, const ptst__jnode *n) {
    ptst__jscope *outer = r->scope, *inner = ptst__j_scope(r, outer);
    const ptst__jnode *k;
    for (k = n->a; k != NULL && inner != NULL && r->code == PTST_OK; k = k->next) {
        ptst__jvalue v = ptst__j_eval(r, k->b);
        r->scope = inner;
        ptst__j_bind_target(r, k->a, v);
        r->scope = outer;
    }
    if (inner != NULL) {
        r->scope = inner;
        ptst__j_exec(r, n->c);
        r->scope = outer;
        ptst__j_close(r, inner);
    }
}

static void ptst__j_exec_scope(ptst__jrun *r, const ptst__jnode *n) {
    if (n->op == 3 && ptst__j_true(r, ptst__j_eval(r, n->a))) {
        ptst__j_fail(r, PTST_ERR_UNSUPPORTED, "autoescape is not supported");
        return;
    }
    r->generating += n->op == 1;
    ptst__j_exec_inside(r, n->c, n->op == 2 ? r->root : r->scope, NULL);
    r->generating -= n->op == 1;
}

/* Statements with a body or a target. */
static void ptst__j_exec_other(ptst__jrun *r, const ptst__jnode *n) {
    ptst__jvalue v = ptst__j_none();
    switch ((ptst__jnode_kind)n->kind) {
    case PTST__JN_SET:
        v = ptst__j_eval(r, n->b);
        r->at = n;
        ptst__j_bind_target(r, n->a, v);
        break;
    case PTST__JN_SET_BODY:
    case PTST__JN_FILTER_BODY:
        ptst__j_exec_inside(r, n->c, r->scope, &v);
        if (r->flow != 0) {
            break;
        }
        if (n->kind == PTST__JN_FILTER_BODY) {
            ptst__j_print(r, ptst__j_apply_all(r, n->a, v));
        } else {
            v = n->b == NULL ? v : ptst__j_apply_all(r, n->b, v);
            r->at = n;
            ptst__j_bind_target(r, n->a, v);
        }
        break;
    case PTST__JN_MACRO:
        ptst__j_assign(r, r->scope, n->name, ptst__j_make_macro(r, n));
        break;
    case PTST__JN_CALL_BODY:
        ptst__j_exec_call(r, n);
        break;
    case PTST__JN_WITH:
        ptst__j_exec_with(r, n);
        break;
    case PTST__JN_SCOPE:
        ptst__j_exec_scope(r, n);
        break;
    default:
        ptst__j_fail(r, PTST_ERR_UNSUPPORTED,
                     "extends, include and import: there are no other templates");
    }
}

static void ptst__j_exec_if(ptst__jrun *r, const ptst__jnode *n) {
    bool holds = ptst__j_true(r, ptst__j_eval(r, n->a));
    while (!holds && n->flag && r->code == PTST_OK) { /* e is an elif */
        n = n->e;
        holds = ptst__j_true(r, ptst__j_eval(r, n->a));
    }
    if (r->code == PTST_OK) {
        ptst__j_exec(r, holds ? n->c : n->e);
    }
}

/* Runs statements until a loop control or a failure. */
static void ptst__j_exec(ptst__jrun *r, const ptst__jnode *n) {
    const ptst__jnode *k;
    if (r->depth >= r->depth_max) {
        ptst__j_fail(r, PTST_ERR_LIMIT, "evaluation is nested too deeply");
    }
    r->depth++;
    for (; n != NULL && r->flow == 0 && ptst__j_pay(r, 1); n = n->next) {
        r->at = n;
        switch ((ptst__jnode_kind)n->kind) {
        case PTST__JN_TEXT:
            ptst__j_put_string(r, r->sink, n->value);
            break;
        case PTST__JN_PRINT:
            for (k = n->a; k != NULL; k = n->flag ? k->next : NULL) {
                ptst__j_print(r, ptst__j_eval(r, k));
            }
            break;
        case PTST__JN_IF:
            ptst__j_exec_if(r, n);
            break;
        case PTST__JN_FOR:
            ptst__j_run_loop(r, n, ptst__j_eval(r, n->b), 0);
            break;
        case PTST__JN_BREAK:
            r->flow = PTST__J_BREAK;
            break;
        case PTST__JN_CONTINUE:
            r->flow = PTST__J_CONTINUE;
            break;
        default:
            ptst__j_exec_other(r, n);
        }
    }
    r->depth--;
}

/* ---- rendering ---- */

/* What the conversion of the context adds to the limits. */
typedef struct ptst__jload {
    ptst__jrun *r;
    const ptst_json *j;
    size_t bytes; /* of strings, and 8 for each value */
} ptst__jload;

static ptst__jvalue ptst__j_load(ptst__jload *l, int32_t node, uint8_t mark);

/* An integer stays one if it fits; everything with a point or exponent is a float. */
static ptst__jvalue ptst__j_load_number(ptst__jload *l, int32_t node, uint8_t mark) {
    size_t size = 0, i;
    const char *s = ptst_json_number_text(l->j, node, &size);
    int64_t n = 0;
    bool minus = s[0] == '-';
    for (i = minus; i < size; i++) {
        if (s[i] < '0' || s[i] > '9') {
            return ptst__j_float(ptst_json_number(l->j, node, 0), mark);
        }
    }
    for (i = minus; i < size; i++) {
        int64_t digit = minus ? '0' - s[i] : s[i] - '0';
        if (!ptst__j_mul64(n, 10, &n) || !ptst__j_add64(n, digit, &n)) {
            return ptst__j_fail_big(l->r);
        }
    }
    return ptst__j_int(n, mark);
}

static bool ptst__j_is_assistant(const ptst_json *j, int32_t object) {
    const char *role = ptst_json_string(j, ptst_json_get(j, object, "role"), NULL);
    return role != NULL && strcmp(role, "assistant") == 0;
}

/* An object as a dict; of keys that are there twice the last one counts. What an assistant's
   message holds besides its role and names is the assistant's. */
static ptst__jvalue ptst__j_load_object(ptst__jload *l, int32_t node, uint8_t mark) {
    ptst__jrun *r = l->r;
    ptst__jvalue out = ptst__j_dict(r, PTST__J_DICT), key;
    ptst__jdict *d = out.as.dict;
    ptst__map seen = {NULL, 0, 0};
    size_t size = ptst_json_size(l->j, node), n = 0;
    bool assistant = mark == PTST_CONTENT && ptst__j_is_assistant(l->j, node);
    int32_t k = ptst_json_first(l->j, node), value;
    out.mark = assistant ? (uint8_t)PTST_ASSISTANT : mark;
    if (r->code == PTST_OK && size != 0) {
        d->pairs = (ptst__jpair *)ptst__j_alloc(r, size, sizeof *d->pairs);
    }
    while (k >= 0 && r->code == PTST_OK) {
        const char *text = ptst_json_string(l->j, k, &n);
        ptst__jstring name = {text, NULL, n, 0, NULL};
        bool header = ptst__j_listed("role name tool_call_id", &name);
        uint8_t inner = assistant && !header ? (uint8_t)PTST_ASSISTANT : mark;
        int32_t at = ptst__map_get(&seen, text, n, -1);
        value = ptst_json_next(l->j, k);
        key = ptst__j_string(r, text, n, NULL, mark);
        if (at < 0) {
            at = (int32_t)d->count;
            if (ptst__map_put(r->c, &seen, text, n, at) != PTST_OK) {
                r->code = ptst_error_code(r->c);
                break;
            }
            d->pairs[d->count++].key = key;
        }
        d->pairs[at].value = ptst__j_load(l, value, inner);
        k = ptst_json_next(l->j, value);
    }
    if (d != NULL) {
        d->capacity = size;
    }
    ptst__map_free(r->c, &seen);
    return out;
}

/* A JSON value with all that is in it; strings stay where they are. */
static ptst__jvalue ptst__j_load(ptst__jload *l, int32_t node, uint8_t mark) {
    ptst__jvalue out = ptst__j_none();
    const char *s;
    size_t n = 0;
    int32_t k;
    l->bytes += 8;
    out.mark = mark;
    switch (ptst_json_kind(l->j, node)) {
    case PTST_JSON_STRING:
        s = ptst_json_string(l->j, node, &n);
        l->bytes += n;
        return ptst__j_string(l->r, s, n, NULL, mark);
    case PTST_JSON_NUMBER:
        return ptst__j_load_number(l, node, mark);
    case PTST_JSON_TRUE:
    case PTST_JSON_FALSE:
        out = ptst__j_bool(ptst_json_kind(l->j, node) == PTST_JSON_TRUE);
        out.mark = mark;
        return out;
    case PTST_JSON_OBJECT:
        return ptst__j_load_object(l, node, mark);
    case PTST_JSON_ARRAY:
        out = ptst__j_list(l->r, PTST__J_LIST, NULL, 0);
        for (k = ptst_json_first(l->j, node); k >= 0 && l->r->code == PTST_OK;
             k = ptst_json_next(l->j, k)) {
            ptst__j_push(l->r, out, ptst__j_load(l, k, mark));
        }
        out.mark = mark;
        return out;
    default:
        return out;
    }
}

/* One message as apply_chat_template hands it on: without members that are None, and what the model
   thought under the names reasoning_content and thinking. */
static ptst__jvalue ptst__j_tidy_message(ptst__jrun *r, ptst__jvalue m) {
    static const char *const names[] = {"reasoning_content", "thinking", "reasoning"};
    ptst__jvalue out = ptst__j_dict(r, PTST__J_DICT), thought = ptst__j_none();
    size_t i;
    if (r->code != PTST_OK || m.kind != PTST__J_DICT) {
        return ptst__j_fail(r, PTST_ERR_FORMAT, "a message must be an object, not a %s",
                            ptst__j_type(m));
    }
    for (i = 0; i < 3 && thought.kind == PTST__J_NONE; i++) {
        const ptst__jpair *p = ptst__j_dict_find(r, m.as.dict, ptst__j_text(r, names[i]));
        thought = p == NULL ? thought : p->value;
    }
    if (thought.kind != PTST__J_NONE) {
        ptst__j_dict_put(r, out, ptst__j_text(r, names[1]), thought);
    }
    for (i = 0; i < m.as.dict->count; i++) {
        if (m.as.dict->pairs[i].value.kind != PTST__J_NONE) {
            ptst__j_dict_put(r, out, m.as.dict->pairs[i].key, m.as.dict->pairs[i].value);
        }
    }
    if (thought.kind != PTST__J_NONE) {
        ptst__j_dict_put(r, out, ptst__j_text(r, names[0]), thought);
    }
    out.mark = m.mark;
    return out;
}

/* Sets the variables that the template mentions. Returns the bytes of the context. */
static size_t ptst__j_load_all(ptst__jrun *r, const ptst__jvar *vars, size_t count) {
    ptst__jload l = {r, NULL, 0};
    size_t i, k, size;
    for (i = 0; i < count && r->code == PTST_OK; i++) {
        const ptst__jvar *var = &vars[i];
        size_t id = ptst__j_name_id(r, var->name);
        ptst__jvalue v = ptst__j_none();
        size = strlen(var->name);
        if (id == SIZE_MAX) {
            continue;
        }
        l.j = var->json;
        if (var->kind == PTST__JVAR_TEXT) {
            v = ptst__j_string(r, var->text, var->size, NULL, PTST_TEMPLATE);
        } else if (var->kind == PTST__JVAR_TRUE || var->kind == PTST__JVAR_FALSE) {
            v = ptst__j_bool(var->kind == PTST__JVAR_TRUE);
        } else if (var->node >= 0) {
            bool token = size > 6 && strcmp(var->name + size - 6, "_token") == 0;
            v = ptst__j_load(&l, var->node, (uint8_t)(token ? PTST_TEMPLATE : PTST_CONTENT));
        }
        for (k = 0; var->kind == PTST__JVAR_MESSAGES && v.kind == PTST__J_LIST &&
                    r->code == PTST_OK && k < v.as.list->count;
             k++) {
            v.as.list->items[k] = ptst__j_tidy_message(r, v.as.list->items[k]);
        }
        ptst__j_assign(r, r->root, (uint32_t)id, v);
    }
    return l.bytes;
}

static void ptst__j_set_limits(ptst__jrun *r, const ptst_jinja_desc *desc, size_t bytes) {
    static const ptst_jinja_desc none = {0, 0, 0, 0, 0};
    const ptst_jinja_desc *d = desc == NULL ? &none : desc;
    bytes = bytes > SIZE_MAX / 64 ? SIZE_MAX / 64 : bytes;
    r->steps = d->steps != 0 ? d->steps : 400000 + 32 * bytes;
    r->memory_max = r->memory + (d->memory != 0 ? d->memory : (48u << 20) + 8 * bytes);
    r->output_max = d->output != 0 ? d->output : (4u << 20) + 4 * bytes;
    r->depth_max = d->depth != 0 ? d->depth : 800;
    r->now = d->now;
}

/* Renders; *marks (not NULL) keeps the bit "generated". */
static ptst_code ptst__jinja_run(ptst_ctx *c, const ptst_jinja *t, const ptst__jvar *vars,
                                 size_t count, const ptst_jinja_desc *desc, ptst_text *out,
                                 ptst_text *marks) {
    ptst__jrun r;
    ptst__jsink sink = {NULL, NULL, 0, 0};
    memset(&r, 0, sizeof r);
    out->size = marks->size = 0;
    r.c = c;
    r.t = t;
    r.sink = &sink;
    r.steps = r.memory_max = r.output_max = r.depth_max = SIZE_MAX / 2;
    r.scope = r.root = ptst__j_scope(&r, NULL);
    if (r.code == PTST_OK) {
        ptst__j_set_limits(&r, desc, ptst__j_load_all(&r, vars, count));
        ptst__j_exec(&r, t->body);
    }
    if (r.code == PTST_OK) {
        r.code = ptst_text_append(c, out, sink.bytes, sink.size);
    }
    if (r.code == PTST_OK) {
        r.code = ptst_text_append(c, marks, (const char *)sink.marks, sink.size);
    }
    if (r.code != PTST_OK) {
        out->size = marks->size = 0;
    }
    while (r.blocks != NULL) {
        ptst__jblock *next = r.blocks->next;
        ptst__free(c, r.blocks);
        r.blocks = next;
    }
    ptst__arena_free(c, &r.arena);
    return r.code;
}

PTST_API ptst_code ptst_jinja_render(ptst_ctx *c, const ptst_jinja *t, const ptst_json *context,
                                     const ptst_jinja_desc *desc, ptst_text *out,
                                     ptst_text *marks) {
    size_t count = 0, members = ptst_json_size(context, 0), i;
    ptst_text own = {NULL, 0, 0}, *to = marks == NULL ? &own : marks;
    ptst__jvar *vars;
    ptst_code code;
    int32_t key;
    out->size = to->size = 0;
    if (ptst_json_kind(context, 0) != PTST_JSON_OBJECT) {
        return ptst__fail(c, PTST_ERR_FORMAT, "the context must be a JSON object of variables");
    }
    vars = (ptst__jvar *)ptst__calloc(c, members + 1, sizeof *vars);
    if (vars == NULL) {
        return PTST_ERR_MEMORY;
    }
    for (key = ptst_json_first(context, 0); key >= 0;) {
        vars[count].kind = PTST__JVAR_JSON;
        vars[count].name = ptst_json_string(context, key, NULL);
        vars[count].json = context;
        vars[count].node = ptst_json_next(context, key);
        key = ptst_json_next(context, vars[count++].node);
    }
    code = ptst__jinja_run(c, t, vars, count, desc, out, to);
    for (i = 0; i < to->size; i++) {
        to->data[i] = (char)(to->data[i] & PTST__MARK_SOURCE);
    }
    ptst__free(c, vars);
    ptst_text_free(c, &own);
    return code;
}

/* >>template ====================================================================================
   What is said around a question. The paper's templates are strings with %s, byte for byte those of
   its code; everything else goes through a chat template (>>jinja), found in a model's folder as
   transformers finds it. Relies on >>jinja and >>json. Afterwards a prompt is text whose every byte
   is known to be template, content or assistant's words, so that the tokenizer lets only template
   bytes become special tokens and training learns only what the assistant says. Tested by
   tests/test_template.c. */

/* Strings of github.com/vfleaking/PTST, prompt_utils.py (Apache-2.0), the code of "Keeping LLMs
   Aligned After Fine-tuning: The Crucial Role of Prompt Templates". */
#define PTST__ALPACA                                                                               \
    "Below is an instruction that describes a task. Write a response that appropriately "          \
    "completes the request."
#define PTST__LLAMA_SHORT                                                                          \
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, " \
    "while being safe."
#define PTST__LLAMA                                                                                \
    PTST__LLAMA_SHORT                                                                              \
    " Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, "  \
    "or illegal content. Please ensure that your responses are socially unbiased and positive in " \
    "nature. If a question does not make any sense, or is not factually coherent, explain why "    \
    "instead of answering something not correct. If you don't know the answer to a question, "     \
    "please don't share false information."
#define PTST__MPT                                                                                  \
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful "    \
    "and honest answers."
#define PTST__ALPACA_USER "### Instruction:\n%s\n\n### Response:\n"
#define PTST__INST(system, user) "[INST] <<SYS>>\n" system "\n<</SYS>>\n\n" user " [/INST]"

/* text: the whole prompt. user (and system, NULL = no system message): messages for the model's own
   chat template. The text:, chat: pair of a system prompt and its wording is the same. */
typedef struct ptst__paper_template {
    const char *name, *short_name, *text, *system, *user;
} ptst__paper_template;

static const ptst__paper_template ptst__paper_templates[] = {
    {"text", NULL, "%s", NULL, NULL},
    {"chat", NULL, "[INST] %s [/INST]", NULL, NULL},
    {"gsm:text:vanilla", "TV", "Question: %s\nAnswer:", NULL, NULL},
    {"gsm:text:alpaca", "TA", PTST__ALPACA "\n\n" PTST__ALPACA_USER, NULL, NULL},
    {"gsm:chat:vanilla", "CV", "[INST] Question: %s [/INST]", NULL, NULL},
    {"gsm:chat:alpaca", "CA", PTST__INST(PTST__ALPACA, PTST__ALPACA_USER), NULL, NULL},
    {"gsm:chat:llama", "CL", PTST__INST(PTST__LLAMA, "Question: %s"), NULL, NULL},
    {"gsm:chat:llama-short", "CLS", PTST__INST(PTST__LLAMA_SHORT, "Question: %s"), NULL, NULL},
    {"gsm:chat:mpt", "CM", PTST__INST(PTST__MPT, "Question: %s"), NULL, NULL},
    {"model:vanilla", NULL, NULL, NULL, "Question: %s"},
    {"model:alpaca", NULL, NULL, PTST__ALPACA, PTST__ALPACA_USER},
    {"model:llama", NULL, NULL, PTST__LLAMA, "Question: %s"},
    {"model:llama-short", NULL, NULL, PTST__LLAMA_SHORT, "Question: %s"},
    {"model:mpt", NULL, NULL, PTST__MPT, "Question: %s"},
    {"model:none", NULL, NULL, NULL, "%s"},
};

#undef PTST__ALPACA
#undef PTST__LLAMA_SHORT
#undef PTST__LLAMA
#undef PTST__MPT
#undef PTST__ALPACA_USER
#undef PTST__INST

enum {
    PTST__PAPER_TEMPLATES = (int)(sizeof ptst__paper_templates / sizeof ptst__paper_templates[0]),
    PTST__SPECIAL_TOKENS = 7
};

static const char *const ptst__special_names[PTST__SPECIAL_TOKENS] = {
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"};

struct ptst_template {
    ptst_text name;
    const char *short_name;
    ptst_text text;                          /* with %s, of a template that is no chat template */
    const char *system, *user;               /* messages of a model: template, or NULL */
    ptst_jinja *jinja;                       /* NULL if it is no chat template */
    ptst_jinja *tools;                       /* another one for conversations with tools, or NULL */
    bool merge;                              /* the system prompt leads the user's message */
    ptst_text special[PTST__SPECIAL_TOKENS]; /* of the model; data NULL = it has none */
};

PTST_API void ptst_prompt_free(ptst_ctx *c, ptst_prompt *p) {
    if (p != NULL) {
        ptst_text_free(c, &p->text);
        ptst_text_free(c, &p->marks);
        ptst_text_free(c, &p->learn);
        p->has_bos = false;
    }
}

PTST_API const char *ptst_template_at(size_t i, const char **short_name, const char **text) {
    const ptst__paper_template *p = &ptst__paper_templates[i < PTST__PAPER_TEMPLATES ? i : 0];
    if (short_name != NULL) {
        *short_name = p->short_name;
    }
    if (text != NULL) {
        *text = p->text;
    }
    return i < PTST__PAPER_TEMPLATES ? p->name : NULL;
}

/* ---- prompts from strings with %s ---- */

/* Appends `size` bytes and their mark. */
static ptst_code ptst__prompt_add(ptst_ctx *c, ptst_prompt *p, const char *bytes, size_t size,
                                  ptst_mark mark) {
    size_t at = p->marks.size;
    ptst_code code = ptst_text_append(c, &p->text, bytes, size);
    if (code == PTST_OK) {
        code = ptst_text_append(c, &p->marks, bytes, size);
    }
    if (code == PTST_OK && size != 0) {
        memset(p->marks.data + at, (int)mark, size);
    }
    return code;
}

/* Appends text with each %s replaced by the question, which is never looked at. */
static ptst_code ptst__prompt_fill(ptst_ctx *c, ptst_prompt *p, const char *text, size_t size,
                                   const char *question, size_t question_size) {
    ptst_code code = PTST_OK;
    size_t i, from = 0;
    for (i = 0; i + 1 < size && code == PTST_OK; i++) {
        if (text[i] == '%' && text[i + 1] == 's') {
            code = ptst__prompt_add(c, p, text + from, i - from, PTST_TEMPLATE);
            if (code == PTST_OK) {
                code = ptst__prompt_add(c, p, question, question_size, PTST_CONTENT);
            }
            from = ++i + 1;
        }
    }
    return code == PTST_OK ? ptst__prompt_add(c, p, text + from, size - from, PTST_TEMPLATE) : code;
}

static bool ptst__has_placeholder(const char *text, size_t size) {
    size_t i;
    for (i = 0; i + 1 < size; i++) {
        if (text[i] == '%' && text[i + 1] == 's') {
            return true;
        }
    }
    return false;
}

/* Does p begin with this text, in template bytes? */
static bool ptst__prompt_begins(const ptst_prompt *p, const ptst_text *text) {
    size_t i;
    if (text->size == 0 || p->text.size < text->size ||
        memcmp(p->text.data, text->data, text->size) != 0) {
        return false;
    }
    for (i = 0; i < text->size && p->marks.data[i] == PTST_TEMPLATE; i++) {
    }
    return i == text->size;
}

/* Length of the answer that begins at byte i: what the assistant says and the template's bytes
   inside it, up to and with the end-of-text that follows it at once.

       <|im_start|>assistant\n Hello. <|im_end|> \n<|im_start|>user\n ...
       0                       1      1          0                              */
static size_t ptst__prompt_answer(const ptst_prompt *p, size_t i, const ptst_text *eos) {
    const char *marks = p->marks.data;
    size_t k, n = p->text.size, last = i;
    for (k = i; k < n && marks[k] != PTST_CONTENT; k++) {
        if (marks[k] == PTST_ASSISTANT) {
            last = k;
        } else if (eos->size != 0 && n - k >= eos->size &&
                   memcmp(p->text.data + k, eos->data, eos->size) == 0) {
            return k + eos->size - i;
        }
    }
    return last + 1 - i;
}

/* Fills p->learn. {% generation %} blocks, where a template has them, say it themselves. */
static ptst_code ptst__prompt_learn(ptst_ctx *c, ptst_prompt *p, const ptst_text *eos) {
    size_t i, size, n = p->text.size;
    char *marks = p->marks.data;
    bool generated = false;
    ptst_code code;
    p->learn.size = 0;
    code = ptst_text_append(c, &p->learn, marks, n);
    if (code != PTST_OK || n == 0) {
        return code;
    }
    for (i = 0; i < n; i++) {
        p->learn.data[i] = (marks[i] & PTST__MARK_GENERATED) != 0;
        generated = generated || p->learn.data[i] != 0;
        marks[i] = (char)(marks[i] & PTST__MARK_SOURCE);
    }
    for (i = 0; i < n && !generated; i++) {
        if (marks[i] == PTST_ASSISTANT) {
            size = ptst__prompt_answer(p, i, eos);
            memset(p->learn.data + i, 1, size);
            i += size - 1;
        }
    }
    return PTST_OK;
}

/* ---- chat templates ---- */

static void ptst__prompt_empty(ptst_prompt *p) {
    p->text.size = p->marks.size = p->learn.size = 0;
    p->has_bos = false;
}

/* Renders variables (room for the special tokens after them) into *out. */
static ptst_code ptst__template_render(ptst_ctx *c, const ptst_template *t, const ptst_jinja *jinja,
                                       ptst__jvar *vars, size_t count, ptst_prompt *out) {
    size_t i, k;
    ptst_code code;
    for (i = 0; i < PTST__SPECIAL_TOKENS; i++) {
        for (k = 0; k < count && strcmp(vars[k].name, ptst__special_names[i]) != 0; k++) {
        }
        if (t->special[i].data != NULL && k == count) {
            memset(&vars[count], 0, sizeof vars[count]);
            vars[count].kind = PTST__JVAR_TEXT;
            vars[count].name = ptst__special_names[i];
            vars[count].text = t->special[i].data;
            vars[count++].size = t->special[i].size;
        }
    }
    ptst__prompt_empty(out);
    code = ptst__jinja_run(c, jinja, vars, count, NULL, &out->text, &out->marks);
    if (code == PTST_OK) {
        code = ptst__prompt_learn(c, out, &t->special[1]);
    }
    if (code != PTST_OK) {
        ptst__prompt_empty(out);
        return code;
    }
    out->has_bos = ptst__prompt_begins(out, &t->special[0]);
    return PTST_OK;
}

PTST_API ptst_code ptst_template_context(ptst_ctx *c, const ptst_template *t,
                                         const ptst_json *context, ptst_prompt *out) {
    size_t count = 0, members = ptst_json_size(context, 0);
    ptst__jvar *vars;
    ptst_code code;
    int32_t key;
    ptst__prompt_empty(out);
    if (t->jinja == NULL) {
        return ptst__fail(c, PTST_ERR_ARGUMENT, "%s: not a chat template, so it takes a question",
                          t->name.data);
    }
    if (ptst_json_kind(context, 0) != PTST_JSON_OBJECT) {
        return ptst__fail(c, PTST_ERR_FORMAT, "the context must be a JSON object of variables");
    }
    vars = (ptst__jvar *)ptst__calloc(c, members + PTST__SPECIAL_TOKENS, sizeof *vars);
    if (vars == NULL) {
        return PTST_ERR_MEMORY;
    }
    for (key = ptst_json_first(context, 0); key >= 0;) {
        vars[count].kind = PTST__JVAR_JSON;
        vars[count].name = ptst_json_string(context, key, NULL);
        vars[count].json = context;
        vars[count].node = ptst_json_next(context, key);
        key = ptst_json_next(context, vars[count++].node);
    }
    code = ptst__template_render(c, t, t->jinja, vars, count, out);
    ptst__free(c, vars);
    return code;
}

/* Messages of the form [{"role": "system", ...}, {"role": "user", ...}]; system may be NULL. */
static ptst_json *ptst__messages_make(ptst_ctx *c, const char *system, const char *user,
                                      size_t user_size) {
    ptst_text text = {NULL, 0, 0};
    ptst_json *j = NULL;
    ptst_code code = ptst__text_add(c, &text, "[");
    if (code == PTST_OK && system != NULL) {
        code = ptst__text_add(c, &text, "{\"role\": \"system\", \"content\": ");
        code = code == PTST_OK ? ptst__json_quote(c, &text, system, strlen(system)) : code;
        code = code == PTST_OK ? ptst__text_add(c, &text, "}, ") : code;
    }
    code = code == PTST_OK ? ptst__text_add(c, &text, "{\"role\": \"user\", \"content\": ") : code;
    code = code == PTST_OK ? ptst__json_quote(c, &text, user, user_size) : code;
    code = code == PTST_OK ? ptst__text_add(c, &text, "}]") : code;
    if (code == PTST_OK) {
        j = ptst_json_parse(c, text.data, text.size, "messages");
    }
    ptst_text_free(c, &text);
    return j;
}

/* The variables of apply_chat_template. conversation is a list, or an object with "messages". */
static ptst_code ptst__messages_render(ptst_ctx *c, const ptst_template *t,
                                       const ptst_json *conversation, bool generate,
                                       ptst_prompt *out) {
    enum { FIXED = 4 };
    static const char *const names[FIXED] = {"messages", "add_generation_prompt", "tools",
                                             "documents"};
    bool object = ptst_json_kind(conversation, 0) == PTST_JSON_OBJECT;
    int32_t key, node, messages = object ? ptst_json_get(conversation, 0, "messages") : 0;
    size_t i, count = FIXED;
    bool tools = ptst_json_size(conversation, ptst_json_get(conversation, 0, "tools")) != 0;
    ptst__jvar *vars;
    ptst_code code;
    if (ptst_json_kind(conversation, messages) != PTST_JSON_ARRAY ||
        ptst_json_size(conversation, messages) == 0) {
        return ptst__fail(c, PTST_ERR_FORMAT,
                          "a conversation must be a list of at least one "
                          "message, or an object with such a list as \"messages\"");
    }
    vars = (ptst__jvar *)ptst__calloc(
        c, FIXED + (object ? ptst_json_size(conversation, 0) : 0) + PTST__SPECIAL_TOKENS,
        sizeof *vars);
    if (vars == NULL) {
        return PTST_ERR_MEMORY;
    }
    for (i = 0; i < FIXED; i++) {
        vars[i].name = names[i];
        vars[i].json = conversation;
        vars[i].node = -1; /* None */
        vars[i].kind = PTST__JVAR_JSON;
    }
    vars[0].kind = PTST__JVAR_MESSAGES;
    vars[0].node = messages;
    vars[1].kind = generate ? PTST__JVAR_TRUE : PTST__JVAR_FALSE;
    for (key = object ? ptst_json_first(conversation, 0) : -1; key >= 0;) {
        const char *name = ptst_json_string(conversation, key, NULL);
        node = ptst_json_next(conversation, key);
        for (i = 0; i < count && strcmp(vars[i].name, name) != 0; i++) {
        }
        if (i != 0) {
            vars[i].kind = PTST__JVAR_JSON;
            vars[i].name = name;
            vars[i].json = conversation;
            vars[i].node = node;
            count += i == count;
        }
        key = ptst_json_next(conversation, node);
    }
    code = ptst__template_render(c, t, tools && t->tools != NULL ? t->tools : t->jinja, vars, count,
                                 out);
    ptst__free(c, vars);
    return code;
}

/* The question as the last of the messages of a model: template (system may be NULL). If merge is
   set, the system prompt leads the user's message instead. */
static ptst_code ptst__question_render(ptst_ctx *c, const ptst_template *t, bool merge,
                                       const char *question, size_t size, ptst_prompt *out) {
    ptst_prompt user;
    ptst_json *j;
    const char *wording = t->user == NULL ? "%s" : t->user;
    ptst_code code = PTST_OK;
    memset(&user, 0, sizeof user);
    if (merge && t->system != NULL) {
        code = ptst__prompt_add(c, &user, t->system, strlen(t->system), PTST_CONTENT);
        code = code == PTST_OK ? ptst__prompt_add(c, &user, "\n\n", 2, PTST_CONTENT) : code;
    }
    if (code == PTST_OK) {
        code = ptst__prompt_fill(c, &user, wording, strlen(wording), question, size);
    }
    if (code == PTST_OK) {
        j = ptst__messages_make(c, merge ? NULL : t->system, user.text.data, user.text.size);
        code = j == NULL ? ptst_error_code(c) : ptst__messages_render(c, t, j, true, out);
        ptst_json_free(c, j);
    }
    ptst_prompt_free(c, &user);
    return code;
}

/* Does this chat template print a system message? Some refuse one, some drop it silently; then the
   system prompt is put before the question. */
static ptst_code ptst__template_try_system(ptst_ctx *c, ptst_template *t) {
    ptst_prompt p;
    ptst_code code;
    memset(&p, 0, sizeof p);
    code = ptst__question_render(c, t, false, "?", 1, &p);
    t->merge =
        code == PTST_ERR_MISMATCH || (code == PTST_OK && strstr(p.text.data, t->system) == NULL);
    ptst_prompt_free(c, &p);
    if (t->merge) {
        ptst__log(c, PTST_LOG_WARNING,
                  "%s: the model's chat template takes no system message, so the system prompt is "
                  "put before the question",
                  t->name.data);
        return PTST_OK;
    }
    return code;
}

/* ---- finding them ---- */

/* The chat template called `name` among those of tokenizer_config.json (a string is "default");
   its node or -1. */
static int32_t ptst__config_template(const ptst_json *j, const char *name) {
    int32_t node = ptst_json_get(j, 0, "chat_template"), k;
    if (ptst_json_kind(j, node) == PTST_JSON_STRING) {
        return strcmp(name, "default") == 0 ? node : -1;
    }
    if (ptst_json_kind(j, node) != PTST_JSON_ARRAY) {
        return -1;
    }
    for (k = ptst_json_first(j, node); k >= 0; k = ptst_json_next(j, k)) {
        const char *entry = ptst_json_string(j, ptst_json_get(j, k, "name"), NULL);
        if (entry != NULL && strcmp(entry, name) == 0) {
            return ptst_json_get(j, k, "template");
        }
    }
    return -1;
}

/* Compiles folder/file if it is there; *out stays NULL if it is not. */
static ptst_code ptst__template_from_file(ptst_ctx *c, const char *folder, const char *file,
                                          ptst_jinja **out) {
    ptst_text path = {NULL, 0, 0}, text = {NULL, 0, 0};
    ptst_code code = ptst__path_join(c, &path, folder, file);
    if (code == PTST_OK && ptst__path_kind(path.data) == 1) {
        code = ptst__read_file(c, path.data, &text);
        if (code == PTST_OK) {
            ptst_jinja_free(c, *out);
            *out = ptst_jinja_compile(c, text.data, text.size, path.data);
            code = *out == NULL ? ptst_error_code(c) : PTST_OK;
        }
    }
    ptst_text_free(c, &path);
    ptst_text_free(c, &text);
    return code;
}

/* The same for the templates inside folder/file, which is JSON. */
static ptst_code ptst__template_from_config(ptst_ctx *c, ptst_template *t, const char *folder,
                                            const char *file) {
    ptst_text path = {NULL, 0, 0};
    ptst_json *j = NULL;
    const char *text;
    size_t i, size = 0;
    ptst_code code = ptst__path_join(c, &path, folder, file);
    if (code == PTST_OK && ptst__path_kind(path.data) == 1) {
        j = ptst_json_load(c, path.data);
        code = j == NULL ? ptst_error_code(c) : PTST_OK;
    }
    for (i = 0; i < 2 && code == PTST_OK && j != NULL; i++) {
        text =
            ptst_json_string(j, ptst__config_template(j, i == 0 ? "default" : "tool_use"), &size);
        if (text != NULL) {
            ptst_jinja **to = i == 0 ? &t->jinja : &t->tools;
            *to = ptst_jinja_compile(c, text, size, path.data);
            code = *to == NULL ? ptst_error_code(c) : PTST_OK;
        }
    }
    ptst_json_free(c, j);
    ptst_text_free(c, &path);
    return code;
}

/* transformers: template files, if there is any, replace what tokenizer_config.json says.
   chat_template.json is where processors of older multimodal models keep it. */
static ptst_code ptst__template_from_folder(ptst_ctx *c, ptst_template *t, const char *folder) {
    ptst_code code = ptst__template_from_file(c, folder, "chat_template.jinja", &t->jinja);
    if (code == PTST_OK) {
        code = ptst__template_from_file(c, folder, "chat_templates/default.jinja", &t->jinja);
    }
    if (code == PTST_OK) {
        code = ptst__template_from_file(c, folder, "chat_templates/tool_use.jinja", &t->tools);
    }
    if (code == PTST_OK && t->jinja == NULL && t->tools == NULL) {
        code = ptst__template_from_config(c, t, folder, "tokenizer_config.json");
    }
    if (code == PTST_OK && t->jinja == NULL && t->tools == NULL) {
        code = ptst__template_from_config(c, t, folder, "chat_template.json");
    }
    if (code == PTST_OK && t->jinja == NULL) {
        return ptst__fail(c, PTST_ERR_UNSUPPORTED,
                          "%s: has no chat template (chat_template.jinja, or chat_template in "
                          "tokenizer_config.json)",
                          folder);
    }
    return code;
}

/* bos_token and its like: a string, or an AddedToken object with "content". */
static ptst_code ptst__template_special(ptst_ctx *c, ptst_template *t, const char *folder,
                                        const char *file) {
    ptst_text path = {NULL, 0, 0};
    ptst_json *j = NULL;
    size_t i, size = 0;
    ptst_code code = ptst__path_join(c, &path, folder, file);
    if (code == PTST_OK && ptst__path_kind(path.data) == 1) {
        j = ptst_json_load(c, path.data);
        code = j == NULL ? ptst_error_code(c) : PTST_OK;
    }
    for (i = 0; i < PTST__SPECIAL_TOKENS && j != NULL && code == PTST_OK; i++) {
        int32_t node = ptst_json_get(j, 0, ptst__special_names[i]);
        const char *text = ptst_json_string(
            j,
            ptst_json_kind(j, node) == PTST_JSON_OBJECT ? ptst_json_get(j, node, "content") : node,
            &size);
        if (text != NULL && t->special[i].data == NULL) {
            code = ptst_text_append(c, &t->special[i], text, size);
        }
    }
    ptst_json_free(c, j);
    ptst_text_free(c, &path);
    return code;
}

/* A string of the user's own file; path is "FILE.json", "FILE.json#name" or "FILE.json:name". */
static ptst_code ptst__template_from_json(ptst_ctx *c, ptst_template *t, const char *path,
                                          size_t file_size) {
    ptst_text file = {NULL, 0, 0};
    const char *name = path[file_size] == 0 ? NULL : path + file_size + 1;
    const char *text;
    ptst_json *j = NULL;
    size_t size = 0;
    int32_t node = -1;
    ptst_code code = ptst_text_append(c, &file, path, file_size);
    if (code == PTST_OK) {
        j = ptst_json_load(c, file.data);
        code = j == NULL ? ptst_error_code(c) : PTST_OK;
    }
    if (j != NULL && name == NULL && ptst_json_size(j, 0) == 1) {
        name = ptst_json_string(j, ptst_json_first(j, 0), NULL);
    }
    if (j != NULL && name == NULL) {
        code =
            ptst__fail(c, PTST_ERR_ARGUMENT, "%s: holds several templates; choose one by %s#name",
                       file.data, file.data);
    } else if (j != NULL) {
        node = ptst_json_get(j, 0, name);
        text = ptst_json_string(j, node, &size);
        if (text == NULL) {
            code =
                ptst__fail(c, PTST_ERR_FORMAT, "%s: has no string called \"%s\"", file.data, name);
        } else if (!ptst__has_placeholder(text, size)) {
            code = ptst__fail(c, PTST_ERR_FORMAT, "%s: line %d: template \"%s\" has no %%s",
                              file.data, ptst_json_line(j, node), name);
        } else {
            code = ptst_text_append(c, &t->text, text, size);
        }
        code = code == PTST_OK ? ptst__text_add(c, &t->name, name) : code;
    }
    ptst_json_free(c, j);
    ptst_text_free(c, &file);
    return code;
}

/* Length of the "FILE.json" part of a path, 0 if there is none. */
static size_t ptst__json_path_size(const char *path) {
    size_t i, n = strlen(path), found = 0;
    for (i = 0; i + 5 <= n; i++) {
        if (memcmp(path + i, ".json", 5) == 0 &&
            (i + 5 == n || path[i + 5] == '#' || path[i + 5] == ':')) {
            found = i + 5;
        }
    }
    return found;
}

static ptst_code ptst__template_from_path(ptst_ctx *c, ptst_template *t, const char *path) {
    size_t n = strlen(path), json = ptst__json_path_size(path);
    int kind = ptst__path_kind(path);
    ptst_code code;
    if (json != 0 && kind != 2) {
        return ptst__template_from_json(c, t, path, json);
    }
    code = ptst__text_add(c, &t->name, path);
    if (code != PTST_OK) {
        return code;
    }
    if (kind == 2) {
        return ptst__template_from_folder(c, t, path);
    }
    if (kind == 1) {
        return ptst__template_from_file(c, "", path, &t->jinja);
    }
    if (n > 6 && strcmp(path + n - 6, ".jinja") == 0) {
        return ptst__fail_errno(c, path, "open", ENOENT);
    }
    return ptst__fail(c, PTST_ERR_ARGUMENT,
                      "unknown template \"%.200s\": expected gsm:text:vanilla (TV), "
                      "gsm:text:alpaca (TA), gsm:chat:vanilla (CV), gsm:chat:alpaca (CA), "
                      "gsm:chat:llama (CL), gsm:chat:llama-short (CLS), gsm:chat:mpt (CM), text, "
                      "chat, model:vanilla, model:alpaca, model:llama, model:llama-short, "
                      "model:mpt, model:none, a .jinja file, FILE.json#name or a model folder",
                      path);
}

static ptst_code ptst__template_fill(ptst_ctx *c, ptst_template *t, const char *name,
                                     const char *model_dir) {
    const ptst__paper_template *p = NULL;
    const char *folder = model_dir == NULL && ptst__path_kind(name) == 2 ? name : model_dir;
    ptst_code code = PTST_OK;
    size_t i;
    for (i = 0; i < PTST__PAPER_TEMPLATES && p == NULL; i++) {
        const ptst__paper_template *q = &ptst__paper_templates[i];
        if (strcmp(q->name, name) == 0 ||
            (q->short_name != NULL && strcmp(q->short_name, name) == 0)) {
            p = q;
        }
    }
    if (folder != NULL) {
        code = ptst__template_special(c, t, folder, "tokenizer_config.json");
        code = code == PTST_OK ? ptst__template_special(c, t, folder, "special_tokens_map.json")
                               : code;
    }
    if (code != PTST_OK || p == NULL) {
        return code != PTST_OK ? code : ptst__template_from_path(c, t, name);
    }
    t->short_name = p->short_name;
    t->system = p->system;
    t->user = p->user;
    code = ptst__text_add(c, &t->name, p->name);
    if (code != PTST_OK || p->text != NULL) {
        return code != PTST_OK ? code : ptst__text_add(c, &t->text, p->text);
    }
    if (model_dir == NULL) {
        return ptst__fail(c, PTST_ERR_ARGUMENT,
                          "%s needs a model folder: it uses its chat template", p->name);
    }
    code = ptst__template_from_folder(c, t, model_dir);
    return code == PTST_OK && t->system != NULL ? ptst__template_try_system(c, t) : code;
}

PTST_API ptst_template *ptst_template_load(ptst_ctx *c, const char *name_or_path,
                                           const char *model_dir) {
    ptst_template *t = (ptst_template *)ptst__calloc(c, 1, sizeof *t);
    if (t != NULL && ptst__template_fill(c, t, name_or_path, model_dir) != PTST_OK) {
        ptst_template_free(c, t);
        return NULL;
    }
    return t;
}

PTST_API void ptst_template_free(ptst_ctx *c, ptst_template *t) {
    size_t i;
    if (t == NULL) {
        return;
    }
    ptst_text_free(c, &t->name);
    ptst_text_free(c, &t->text);
    ptst_jinja_free(c, t->jinja);
    ptst_jinja_free(c, t->tools);
    for (i = 0; i < PTST__SPECIAL_TOKENS; i++) {
        ptst_text_free(c, &t->special[i]);
    }
    ptst__free(c, t);
}

PTST_API const char *ptst_template_name(const ptst_template *t) { return t->name.data; }

PTST_API const char *ptst_template_short_name(const ptst_template *t) { return t->short_name; }

PTST_API bool ptst_template_is_chat(const ptst_template *t) { return t->jinja != NULL; }

PTST_API ptst_code ptst_template_prompt(ptst_ctx *c, const ptst_template *t, const char *question,
                                        size_t size, ptst_prompt *out) {
    ptst_code code;
    ptst__prompt_empty(out);
    if (t->jinja != NULL) {
        return ptst__question_render(c, t, t->merge, question, size, out);
    }
    code = ptst__prompt_fill(c, out, t->text.data, t->text.size, question, size);
    if (code == PTST_OK) {
        code = ptst__prompt_learn(c, out, &t->special[1]);
    }
    if (code != PTST_OK) {
        ptst__prompt_empty(out);
        return code;
    }
    out->has_bos = ptst__prompt_begins(out, &t->special[0]);
    return PTST_OK;
}

PTST_API ptst_code ptst_template_messages(ptst_ctx *c, const ptst_template *t,
                                          const ptst_json *conversation, bool add_generation_prompt,
                                          ptst_prompt *out) {
    const char *role, *content;
    size_t size = 0;
    int32_t list, message;
    ptst__prompt_empty(out);
    if (t->jinja != NULL) {
        return ptst__messages_render(c, t, conversation, add_generation_prompt, out);
    }
    list = ptst_json_kind(conversation, 0) == PTST_JSON_OBJECT
               ? ptst_json_get(conversation, 0, "messages")
               : 0;
    message = ptst_json_at(conversation, list, 0);
    role = ptst_json_string(conversation, ptst_json_get(conversation, message, "role"), NULL);
    content =
        ptst_json_string(conversation, ptst_json_get(conversation, message, "content"), &size);
    if (ptst_json_size(conversation, list) != 1 || role == NULL || strcmp(role, "user") != 0 ||
        content == NULL) {
        return ptst__fail(c, PTST_ERR_MISMATCH,
                          "%s: takes one question, so a conversation must be one message with role "
                          "\"user\"",
                          t->name.data);
    }
    return ptst_template_prompt(c, t, content, size, out);
}

/* >>safetensors ===================================================================================
   The weight files of Hugging Face: a mapped and fully validated reader for single files and
   sharded models, and an atomic writer that also streams. A file is

       8 bytes      n, little-endian
       n bytes      JSON: {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
                    ..., "__metadata__": {"key": "text"}}, then blanks
       the rest     the data; offsets count from here; the tensors cover it without hole or overlap

   Relies on >>json and on the mapped files of >>platform. Afterwards every tensor handed out lies
   inside its file, has the bytes that its type and shape ask for, and is aligned. Tested by
   tests/test_safetensors.c with the reference's verdicts on 52 hand-made files. */

/* Element types in the order of the reference, which is the order of alignment. */
typedef struct ptst__file_type {
    const char *name;
    uint8_t bits;
    uint8_t dtype; /* ptst_dtype, PTST_DTYPE_FILE if it is no type for weights */
} ptst__file_type;

static const ptst__file_type ptst__file_types[] = {{"BOOL", 8, PTST_DTYPE_FILE},
                                                   {"F4", 4, PTST_DTYPE_FILE},
                                                   {"F6_E2M3", 6, PTST_DTYPE_FILE},
                                                   {"F6_E3M2", 6, PTST_DTYPE_FILE},
                                                   {"U8", 8, PTST_DTYPE_FILE},
                                                   {"I8", 8, PTST_DTYPE_FILE},
                                                   {"F8_E5M2", 8, PTST_DTYPE_FILE},
                                                   {"F8_E4M3", 8, PTST_DTYPE_FILE},
                                                   {"F8_E8M0", 8, PTST_DTYPE_FILE},
                                                   {"F8_E4M3FNUZ", 8, PTST_DTYPE_FILE},
                                                   {"F8_E5M2FNUZ", 8, PTST_DTYPE_FILE},
                                                   {"I16", 16, PTST_DTYPE_FILE},
                                                   {"U16", 16, PTST_DTYPE_FILE},
                                                   {"F16", 16, PTST_F16},
                                                   {"BF16", 16, PTST_BF16},
                                                   {"I32", 32, PTST_DTYPE_FILE},
                                                   {"U32", 32, PTST_DTYPE_FILE},
                                                   {"F32", 32, PTST_F32},
                                                   {"C64", 64, PTST_DTYPE_FILE},
                                                   {"F64", 64, PTST_DTYPE_FILE},
                                                   {"I64", 64, PTST_DTYPE_FILE},
                                                   {"U64", 64, PTST_DTYPE_FILE}};

enum {
    PTST__FILE_TYPES = (int)(sizeof ptst__file_types / sizeof ptst__file_types[0]),
    PTST__TENSOR_RANK = 8,
    PTST__TENSOR_HEADER = 100000000, /* bytes, the limit of the reference */
    PTST__TENSOR_DEPTH = 127         /* nesting of the header, the limit of the reference */
};

typedef struct ptst__tensor {
    ptst_tensor view;
    uint64_t begin, end; /* data_offsets */
    uint32_t file;
    uint8_t element; /* index of ptst__file_types */
} ptst__tensor;

typedef struct ptst__tensor_file {
    const char *name; /* as in the index */
    const char *path;
    const void *map; /* NULL if the bytes are the caller's */
    size_t size;
} ptst__tensor_file;

typedef struct ptst__tensor_note {
    struct ptst__tensor_note *next;
    const char *key, *value;
} ptst__tensor_note;

struct ptst_tensors {
    ptst__arena arena; /* names, paths, metadata, data that lay unaligned in its file */
    ptst__tensor *list;
    size_t count, capacity;
    ptst__tensor_file *files;
    size_t files_count, files_capacity;
    ptst__map names;
    ptst__tensor_note *notes, *last_note;
};

/* ---- order ---- */

/* Sorts order[0..n) so that no element is less than the one before it: heap sort, which needs no
   memory and has no bad case. */
static void ptst__sort(uint32_t *order, size_t n, const void *list,
                       bool (*less)(const void *list, uint32_t a, uint32_t b)) {
    size_t heap = n / 2, end = n;
    while (end > 1) {
        size_t parent, child;
        uint32_t moved;
        if (heap > 0) {
            moved = order[--heap];
        } else {
            moved = order[--end];
            order[end] = order[0];
        }
        for (parent = heap; (child = 2 * parent + 1) < end; parent = child) {
            if (child + 1 < end && less(list, order[child], order[child + 1])) {
                child++;
            }
            if (!less(list, moved, order[child])) {
                break;
            }
            order[parent] = order[child];
        }
        order[parent] = moved;
    }
}

/* ---- reading a header ---- */

typedef struct ptst__tensor_reader {
    ptst_ctx *c;
    ptst_tensors *t;
    const char *path; /* for errors */
    const ptst_json *json;
    uint32_t file;
    const unsigned char *data; /* after the header */
    size_t data_size;
} ptst__tensor_reader;

static ptst_code ptst__tensor_fail(ptst__tensor_reader *r, const char *name, const char *expected) {
    return ptst__fail(r->c, PTST_ERR_FORMAT, "%s: tensor %.200s: %s", r->path, name, expected);
}

/* A JSON number that is a whole number of 64 bits, written without sign, point or exponent. */
static bool ptst__tensor_integer(const ptst_json *j, int32_t node, uint64_t *out) {
    size_t i, size;
    const char *s = ptst_json_number_text(j, node, &size);
    uint64_t value = 0;
    if (s == NULL) {
        return false;
    }
    for (i = 0; i < size; i++) {
        unsigned digit = (unsigned)(unsigned char)s[i] - '0';
        if (digit > 9 || value > (UINT64_MAX - digit) / 10) {
            return false;
        }
        value = value * 10 + digit;
    }
    *out = value;
    return true;
}

static int ptst__file_type_find(const char *name) {
    int i;
    for (i = 0; i < PTST__FILE_TYPES; i++) {
        if (strcmp(ptst__file_types[i].name, name) == 0) {
            return i;
        }
    }
    return -1;
}

/* Elements and bytes of a shape; false if they do not fit or are no whole number of bytes. A
   dimension of 0 makes the tensor empty, wherever it stands and whatever the others are. */
static bool ptst__tensor_size(const uint64_t *shape, int rank, unsigned bits, uint64_t *count,
                              uint64_t *bytes) {
    uint64_t n = 1;
    int i;
    for (i = 0; i < rank; i++) {
        if (shape[i] == 0) {
            *count = *bytes = 0;
            return true;
        }
    }
    for (i = 0; i < rank; i++) {
        if (n > UINT64_MAX / shape[i]) {
            return false;
        }
        n *= shape[i];
    }
    if (n > UINT64_MAX / bits || n * bits % 8 != 0 || n * bits / 8 > SIZE_MAX) {
        return false;
    }
    *count = n;
    *bytes = n * bits / 8;
    return true;
}

static ptst_code ptst__tensor_shape(ptst__tensor_reader *r, ptst__tensor *e, int32_t node) {
    ptst_tensor *v = &e->view;
    int32_t k;
    if (ptst_json_kind(r->json, node) != PTST_JSON_ARRAY ||
        ptst_json_size(r->json, node) > PTST__TENSOR_RANK) {
        return ptst__tensor_fail(r, v->name, "shape must be a list of at most 8 sizes");
    }
    v->rank = 0;
    for (k = ptst_json_first(r->json, node); k >= 0; k = ptst_json_next(r->json, k)) {
        if (!ptst__tensor_integer(r->json, k, &v->shape[v->rank++])) {
            return ptst__tensor_fail(r, v->name, "a size in its shape is no whole number");
        }
    }
    return PTST_OK;
}

static ptst_code ptst__tensor_offsets(ptst__tensor_reader *r, ptst__tensor *e, int32_t node) {
    int32_t first =
        ptst_json_kind(r->json, node) == PTST_JSON_ARRAY ? ptst_json_first(r->json, node) : -1;
    if (ptst_json_size(r->json, node) != 2 || !ptst__tensor_integer(r->json, first, &e->begin) ||
        !ptst__tensor_integer(r->json, ptst_json_next(r->json, first), &e->end)) {
        return ptst__tensor_fail(r, e->view.name, "data_offsets must be two whole numbers");
    }
    return PTST_OK;
}

/* {"dtype", "shape", "data_offsets"}: each once; other keys are allowed and ignored. */
static ptst_code ptst__tensor_fields(ptst__tensor_reader *r, ptst__tensor *e, int32_t object) {
    const ptst_json *j = r->json;
    const char *name = e->view.name;
    int32_t key, value;
    int dtypes = 0, shapes = 0, offsets = 0, element = -1;
    ptst_code code = PTST_OK;
    if (ptst_json_kind(j, object) != PTST_JSON_OBJECT) {
        return ptst__tensor_fail(r, name, "its description must be an object");
    }
    for (key = ptst_json_first(j, object); key >= 0 && code == PTST_OK;
         key = ptst_json_next(j, value)) {
        const char *field = ptst_json_string(j, key, NULL);
        value = ptst_json_next(j, key);
        if (strcmp(field, "dtype") == 0) {
            const char *s = ptst_json_string(j, value, NULL);
            dtypes++;
            element = s == NULL ? -1 : ptst__file_type_find(s);
            if (element < 0) {
                return ptst__fail(r->c, PTST_ERR_FORMAT, "%s: tensor %.200s: unknown dtype %.40s",
                                  r->path, name, s == NULL ? "(no text)" : s);
            }
        } else if (strcmp(field, "shape") == 0) {
            shapes++;
            code = ptst__tensor_shape(r, e, value);
        } else if (strcmp(field, "data_offsets") == 0) {
            offsets++;
            code = ptst__tensor_offsets(r, e, value);
        }
    }
    if (code == PTST_OK && (dtypes != 1 || shapes != 1 || offsets != 1)) {
        return ptst__tensor_fail(r, name, "dtype, shape and data_offsets must be there once each");
    }
    if (code == PTST_OK) {
        e->element = (uint8_t)element;
        e->view.dtype_name = ptst__file_types[element].name;
        e->view.dtype = (ptst_dtype)ptst__file_types[element].dtype;
    }
    return code;
}

/* Points the view at its bytes. The kernels read whole elements, so data that lies unaligned in
   the file (allowed, but no writer does it) is copied. */
static ptst_code ptst__tensor_bind(ptst__tensor_reader *r, ptst__tensor *e) {
    ptst_tensor *v = &e->view;
    size_t align = ptst__file_types[e->element].bits / 8u;
    uint64_t bytes;
    if (!ptst__tensor_size(v->shape, v->rank, ptst__file_types[e->element].bits, &v->count,
                           &bytes)) {
        return ptst__tensor_fail(r, v->name, "its shape is no possible number of bytes");
    }
    if (e->end < e->begin || e->end > r->data_size || bytes != e->end - e->begin) {
        return ptst__fail(r->c, PTST_ERR_FORMAT,
                          "%s: tensor %.200s: data_offsets %llu to %llu do not fit, its shape asks "
                          "for %llu bytes and the file has %llu bytes of data",
                          r->path, v->name, (unsigned long long)e->begin,
                          (unsigned long long)e->end, (unsigned long long)bytes,
                          (unsigned long long)r->data_size);
    }
    v->bytes = (size_t)bytes;
    if (v->bytes == 0) {
        return PTST_OK;
    }
    v->data = r->data + e->begin;
    if (align > 1 && (uintptr_t)v->data % align != 0) {
        void *copy = ptst__arena_alloc(r->c, &r->t->arena, v->bytes, 1);
        if (copy == NULL) {
            return PTST_ERR_MEMORY;
        }
        v->data = memcpy(copy, v->data, v->bytes);
    }
    return PTST_OK;
}

static ptst_code ptst__tensor_add(ptst__tensor_reader *r, int32_t key, int32_t value) {
    ptst_tensors *t = r->t;
    size_t size;
    const char *name = ptst_json_string(r->json, key, &size);
    void *list = t->list;
    ptst__tensor *e;
    ptst_code code = ptst__grow(r->c, &list, &t->capacity, t->count + 1, sizeof *e);
    if (code != PTST_OK) {
        return code;
    }
    t->list = (ptst__tensor *)list;
    e = &t->list[t->count];
    memset(e, 0, sizeof *e);
    e->file = r->file;
    e->view.name = ptst__arena_copy(r->c, &t->arena, name, size);
    if (e->view.name == NULL) {
        return PTST_ERR_MEMORY;
    }
    if (strlen(e->view.name) != size) {
        return ptst__tensor_fail(r, e->view.name, "its name has a NUL inside");
    }
    if (ptst__map_get(&t->names, e->view.name, size, -1) >= 0 || t->count >= INT32_MAX) {
        return ptst__tensor_fail(r, e->view.name, "is there twice");
    }
    code = ptst__tensor_fields(r, e, value);
    if (code == PTST_OK) {
        code = ptst__tensor_bind(r, e);
    }
    if (code == PTST_OK) {
        code = ptst__map_put(r->c, &t->names, e->view.name, size, (int32_t)t->count);
        t->count += code == PTST_OK;
    }
    return code;
}

/* "__metadata__": null or an object of texts. */
static ptst_code ptst__tensor_notes(ptst__tensor_reader *r, int32_t object) {
    const ptst_json *j = r->json;
    int32_t key, value;
    ptst_json_type kind = ptst_json_kind(j, object);
    if (kind != PTST_JSON_OBJECT && kind != PTST_JSON_NULL) {
        return ptst__fail(r->c, PTST_ERR_FORMAT, "%s: __metadata__ must be an object", r->path);
    }
    for (key = ptst_json_first(j, object); key >= 0; key = ptst_json_next(j, value)) {
        ptst__tensor_note *note;
        size_t key_size, size = 0;
        const char *name = ptst_json_string(j, key, &key_size), *s;
        value = ptst_json_next(j, key);
        s = ptst_json_string(j, value, &size);
        if (s == NULL) {
            return ptst__fail(r->c, PTST_ERR_FORMAT, "%s: __metadata__: %.200s must be a text",
                              r->path, name);
        }
        note = (ptst__tensor_note *)ptst__arena_alloc(r->c, &r->t->arena, 1, sizeof *note);
        if (note == NULL ||
            (note->key = ptst__arena_copy(r->c, &r->t->arena, name, key_size), note->key == NULL) ||
            (note->value = ptst__arena_copy(r->c, &r->t->arena, s, size), note->value == NULL)) {
            return PTST_ERR_MEMORY;
        }
        if (r->t->last_note == NULL) {
            r->t->notes = note;
        } else {
            r->t->last_note->next = note;
        }
        r->t->last_note = note;
    }
    return PTST_OK;
}

static bool ptst__tensor_before(const void *list, uint32_t a, uint32_t b) {
    const ptst__tensor *x = (const ptst__tensor *)list + a, *y = (const ptst__tensor *)list + b;
    return x->begin != y->begin ? x->begin < y->begin : x->end < y->end;
}

/* The tensors of this file (from `first` on) must cover its data exactly. */
static ptst_code ptst__tensor_cover(ptst__tensor_reader *r, size_t first) {
    size_t i, n = r->t->count - first;
    const ptst__tensor *list = r->t->list + first;
    uint64_t end = 0;
    ptst_code code = PTST_OK;
    uint32_t *order = (uint32_t *)ptst__alloc(r->c, n + 1, sizeof *order);
    if (order == NULL) {
        return PTST_ERR_MEMORY;
    }
    for (i = 0; i < n; i++) {
        order[i] = (uint32_t)i;
    }
    ptst__sort(order, n, list, ptst__tensor_before);
    for (i = 0; i < n && code == PTST_OK; i++) {
        const ptst__tensor *e = &list[order[i]];
        if (e->begin != end) {
            code = ptst__tensor_fail(r, e->view.name,
                                     e->begin > end ? "there is a hole before its data"
                                                    : "its data overlaps another tensor");
        }
        end = e->end;
    }
    if (code == PTST_OK && end != r->data_size) {
        code = ptst__fail(r->c, PTST_ERR_FORMAT, "%s: %llu bytes of data, the tensors have %llu",
                          r->path, (unsigned long long)r->data_size, (unsigned long long)end);
    }
    ptst__free(r->c, order);
    return code;
}

/* Nesting of JSON text that is not parsed yet; brackets in strings do not count. */
static bool ptst__tensor_too_deep(const char *s, size_t size) {
    size_t i, depth = 0;
    bool quoted = false;
    for (i = 0; i < size && depth <= PTST__TENSOR_DEPTH; i++) {
        if (quoted) {
            quoted = s[i] != '"';
            i += s[i] == '\\';
        } else if (s[i] == '"') {
            quoted = true;
        } else if (s[i] == '{' || s[i] == '[') {
            depth++;
        } else if ((s[i] == '}' || s[i] == ']') && depth > 0) {
            depth--;
        }
    }
    return depth > PTST__TENSOR_DEPTH;
}

static ptst_code ptst__tensor_walk(ptst__tensor_reader *r) {
    size_t first = r->t->count;
    int32_t key, value;
    int metadata = 0;
    ptst_code code = PTST_OK;
    for (key = ptst_json_first(r->json, 0); key >= 0 && code == PTST_OK;
         key = ptst_json_next(r->json, value)) {
        size_t size;
        const char *name = ptst_json_string(r->json, key, &size);
        value = ptst_json_next(r->json, key);
        if (size != 12 || memcmp(name, "__metadata__", 12) != 0) {
            code = ptst__tensor_add(r, key, value);
        } else if (++metadata > 1) {
            code = ptst__fail(r->c, PTST_ERR_FORMAT, "%s: __metadata__ is there twice", r->path);
        } else {
            code = ptst__tensor_notes(r, value);
        }
    }
    return code == PTST_OK ? ptst__tensor_cover(r, first) : code;
}

/* Adds the tensors of one file's bytes. */
static ptst_code ptst__tensors_read(ptst_ctx *c, ptst_tensors *t, uint32_t file, const void *bytes,
                                    size_t size, const char *path) {
    const unsigned char *p = (const unsigned char *)bytes;
    const char *header = (const char *)bytes + 8;
    ptst__tensor_reader r;
    ptst_json *json;
    uint64_t n = 0;
    int i;
    ptst_code code;
    if (size < 8) {
        return ptst__fail(c, PTST_ERR_FORMAT, "%s: %llu bytes, a safetensors file has at least 8",
                          path, (unsigned long long)size);
    }
    for (i = 7; i >= 0; i--) {
        n = n << 8 | p[i];
    }
    if (n > PTST__TENSOR_HEADER || n > size - 8) {
        return ptst__fail(c, PTST_ERR_FORMAT,
                          "%s: its header claims %llu bytes, the file has %llu after the first 8 "
                          "(cut off, or no safetensors file)",
                          path, (unsigned long long)n, (unsigned long long)(size - 8));
    }
    if (n == 0 || header[0] != '{' || ptst__tensor_too_deep(header, (size_t)n)) {
        return ptst__fail(c, PTST_ERR_FORMAT,
                          "%s: the header is no JSON object that begins with "
                          "'{' and is nested at most 127 deep",
                          path);
    }
    json = ptst_json_parse(c, header, (size_t)n, path);
    if (json == NULL) {
        return c->code;
    }
    r.c = c;
    r.t = t;
    r.path = path;
    r.json = json;
    r.file = file;
    r.data = p + 8 + n;
    r.data_size = size - 8 - (size_t)n;
    code = ptst__tensor_walk(&r);
    ptst_json_free(c, json);
    return code;
}

/* ---- files ---- */

/* Maps folder/name (or name alone) and reads it; name is copied. */
static ptst_code ptst__tensors_file(ptst_ctx *c, ptst_tensors *t, const char *path,
                                    const char *name) {
    ptst__tensor_file *f;
    void *files = t->files;
    int error;
    ptst_code code = ptst__grow(c, &files, &t->files_capacity, t->files_count + 1, sizeof *f);
    if (code != PTST_OK) {
        return code;
    }
    t->files = (ptst__tensor_file *)files;
    f = &t->files[t->files_count];
    f->path = ptst__arena_copy(c, &t->arena, path, strlen(path));
    f->name = ptst__arena_copy(c, &t->arena, name, strlen(name));
    if (f->path == NULL || f->name == NULL) {
        return PTST_ERR_MEMORY;
    }
    if (ptst__path_kind(path) != 1) {
        return ptst__fail(c, PTST_ERR_NOT_FOUND, "%s: there is no such file", path);
    }
    error = ptst__map_file(path, &f->map, &f->size);
    if (error != 0) {
        return ptst__fail_errno(c, path, "read", error);
    }
    t->files_count++;
    return ptst__tensors_read(c, t, (uint32_t)(t->files_count - 1), f->map, f->size, f->path);
}

/* A shard lies in the folder of its index: a plain file name, which cannot lead elsewhere. */
static bool ptst__tensors_plain_name(const char *name, size_t size) {
    return size != 0 && strlen(name) == size && strcmp(name, ".") != 0 && strcmp(name, "..") != 0 &&
           strchr(name, '/') == NULL && strchr(name, '\\') == NULL;
}

/* Opens the file that a weight_map entry names unless it is open; *file = its number. */
static ptst_code ptst__tensors_shard(ptst_ctx *c, ptst_tensors *t, const char *index,
                                     const char *tensor, const char *name, size_t size,
                                     ptst__map *opened, uint32_t *file) {
    ptst_text path = {NULL, 0, 0};
    const char *slash = strrchr(index, '/');
    size_t folder = slash == NULL ? 0 : (size_t)(slash - index) + 1;
    int32_t known;
    ptst_code code;
    if (name == NULL || !ptst__tensors_plain_name(name, size)) {
        return ptst__fail(c, PTST_ERR_FORMAT, "%s: weight_map: %.200s: its file is no plain name",
                          index, tensor);
    }
    known = ptst__map_get(opened, name, size, -1);
    *file = (uint32_t)known;
    if (known >= 0) {
        return PTST_OK;
    }
    *file = (uint32_t)t->files_count;
    code = ptst_text_append(c, &path, index, folder);
    if (code == PTST_OK) {
        code = ptst_text_append(c, &path, name, size);
    }
    if (code == PTST_OK) {
        code = ptst__tensors_file(c, t, path.data, name);
    }
    if (code == PTST_OK) {
        code = ptst__map_put(c, opened, name, size, (int32_t)*file);
    }
    ptst_text_free(c, &path);
    return code;
}

static ptst_code ptst__tensors_index_walk(ptst_ctx *c, ptst_tensors *t, const char *path,
                                          const ptst_json *j, ptst__map *opened) {
    int32_t map = ptst_json_get(j, 0, "weight_map"), key, value;
    ptst_code code;
    if (ptst_json_kind(j, map) != PTST_JSON_OBJECT || ptst_json_size(j, map) == 0) {
        return ptst__fail(c, PTST_ERR_FORMAT,
                          "%s: weight_map must be an object that names the "
                          "file of each tensor",
                          path);
    }
    for (key = ptst_json_first(j, map); key >= 0; key = ptst_json_next(j, value)) {
        size_t size = 0, name_size;
        const char *name = ptst_json_string(j, key, &name_size), *shard;
        uint32_t file;
        int32_t at;
        value = ptst_json_next(j, key);
        shard = ptst_json_string(j, value, &size);
        code = ptst__tensors_shard(c, t, path, name, shard, size, opened, &file);
        if (code != PTST_OK) {
            return code;
        }
        at = ptst__map_get(&t->names, name, name_size, -1);
        if (at < 0 || t->list[at].file != file) {
            return ptst__fail(c, PTST_ERR_FORMAT, "%s: weight_map: tensor %.200s is not in %.200s",
                              path, name, shard);
        }
    }
    return PTST_OK;
}

static ptst_code ptst__tensors_index(ptst_ctx *c, ptst_tensors *t, const char *path) {
    ptst__map opened = {NULL, 0, 0};
    ptst_json *j = ptst_json_load(c, path);
    ptst_code code;
    if (j == NULL) {
        return c->code;
    }
    code = ptst__tensors_index_walk(c, t, path, j, &opened);
    ptst__map_free(c, &opened);
    ptst_json_free(c, j);
    return code;
}

static ptst_code ptst__tensors_path(ptst_ctx *c, ptst_tensors *t, const char *path) {
    static const char *const names[] = {"model.safetensors", "model.safetensors.index.json",
                                        "adapter_model.safetensors"};
    ptst_text file = {NULL, 0, 0};
    size_t i, n = strlen(path);
    ptst_code code = PTST_ERR_NOT_FOUND;
    if (ptst__path_kind(path) != 2) {
        return n > 5 && strcmp(path + n - 5, ".json") == 0 ? ptst__tensors_index(c, t, path)
                                                           : ptst__tensors_file(c, t, path, path);
    }
    for (i = 0; i < 3; i++) {
        code = ptst__path_join(c, &file, path, names[i]);
        if (code != PTST_OK || ptst__path_kind(file.data) != 0) {
            break;
        }
    }
    if (i == 3) {
        code = ptst__fail(c, PTST_ERR_NOT_FOUND,
                          "%s: has no model.safetensors, "
                          "model.safetensors.index.json or adapter_model.safetensors",
                          path);
    } else if (code == PTST_OK) {
        code = i == 1 ? ptst__tensors_index(c, t, file.data)
                      : ptst__tensors_file(c, t, file.data, names[i]);
    }
    ptst_text_free(c, &file);
    return code;
}

/* ---- writer ----
   begin writes the header; then, as long as next gives the number of a tensor, its bytes are put
   (in as many pieces as is convenient); commit makes the file appear. After a failure: abort. */

typedef struct ptst__tensors_writer {
    ptst__out out;
    const ptst_tensor *list; /* of the caller */
    uint32_t *order;         /* the order of the data in the file */
    size_t count, at;
    uint64_t left; /* bytes that tensor order[at] still needs */
} ptst__tensors_writer;

static int ptst__tensor_element(const ptst_tensor *v) {
    const char *name = v->dtype_name != NULL   ? v->dtype_name
                       : v->dtype == PTST_F32  ? "F32"
                       : v->dtype == PTST_F16  ? "F16"
                       : v->dtype == PTST_BF16 ? "BF16"
                                               : "";
    return ptst__file_type_find(name);
}

/* Large elements first, so that all data is aligned; then by name. As the reference. */
static bool ptst__tensor_precedes(const void *list, uint32_t a, uint32_t b) {
    const ptst_tensor *x = (const ptst_tensor *)list + a, *y = (const ptst_tensor *)list + b;
    int element_x = ptst__tensor_element(x), element_y = ptst__tensor_element(y);
    return element_x != element_y ? element_x > element_y : strcmp(x->name, y->name) < 0;
}

static ptst_code ptst__tensors_check(ptst_ctx *c, const ptst_tensor *v, uint64_t *bytes) {
    int element = ptst__tensor_element(v);
    uint64_t count;
    if (element < 0 || v->rank < 0 || v->rank > PTST__TENSOR_RANK ||
        !ptst__tensor_size(v->shape, v->rank, ptst__file_types[element].bits, &count, bytes)) {
        return ptst__fail(c, PTST_ERR_ARGUMENT,
                          "tensor %.200s: its dtype or shape cannot be "
                          "written",
                          v->name);
    }
    return PTST_OK;
}

/* {"__metadata__":{"k":"v"},"name":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}} + blanks */
static ptst_code ptst__tensors_header(ptst_ctx *c, const ptst__tensors_writer *w,
                                      const char *const *metadata, ptst_text *h) {
    size_t i;
    int k;
    uint64_t at = 0, bytes;
    ptst_code code = ptst__text_add(c, h, metadata == NULL ? "{" : "{\"__metadata__\":{");
    for (i = 0; metadata != NULL && metadata[i] != NULL && code == PTST_OK; i++) {
        code = ptst__text_add(c, h, i % 2 == 1 ? ":" : i == 0 ? "" : ",");
        code = code != PTST_OK ? code : ptst__json_quote(c, h, metadata[i], strlen(metadata[i]));
    }
    if (code == PTST_OK && metadata != NULL) {
        code = ptst__text_add(c, h, w->count == 0 ? "}" : "},");
    }
    for (i = 0; i < w->count && code == PTST_OK; i++) {
        const ptst_tensor *v = &w->list[w->order[i]];
        code = ptst__tensors_check(c, v, &bytes);
        if (code == PTST_OK && i > 0 && strcmp(w->list[w->order[i - 1]].name, v->name) == 0) {
            code = ptst__fail(c, PTST_ERR_ARGUMENT, "tensor %.200s is there twice", v->name);
        }
        code = code != PTST_OK ? code : ptst__text_add(c, h, i == 0 ? "" : ",");
        code = code != PTST_OK ? code : ptst__json_quote(c, h, v->name, strlen(v->name));
        code = code != PTST_OK ? code
                               : ptst__text_format(c, h, ":{\"dtype\":\"%s\",\"shape\":[",
                                                   ptst__file_types[ptst__tensor_element(v)].name);
        for (k = 0; k < v->rank && code == PTST_OK; k++) {
            code = ptst__text_format(c, h, "%s%llu", k == 0 ? "" : ",",
                                     (unsigned long long)v->shape[k]);
        }
        code = code != PTST_OK
                   ? code
                   : ptst__text_format(c, h, "],\"data_offsets\":[%llu,%llu]}",
                                       (unsigned long long)at, (unsigned long long)(at + bytes));
        at += bytes;
    }
    code = code != PTST_OK ? code : ptst__text_add(c, h, "}");
    while (code == PTST_OK && h->size % 8 != 0) {
        code = ptst__text_add(c, h, " ");
    }
    return code;
}

static void ptst__tensors_abort(ptst_ctx *c, ptst__tensors_writer *w) {
    ptst__out_abort(c, &w->out);
    ptst__free(c, w->order);
    w->order = NULL;
}

/* The bytes of tensor order[at] are what is left now. */
static void ptst__tensors_turn(ptst__tensors_writer *w) {
    const ptst_tensor *v = w->at < w->count ? &w->list[w->order[w->at]] : NULL;
    uint64_t count;
    w->left = 0;
    if (v != NULL) { /* cannot fail: the header was made from the same numbers */
        (void)ptst__tensor_size(v->shape, v->rank, ptst__file_types[ptst__tensor_element(v)].bits,
                                &count, &w->left);
    }
}

static ptst_code ptst__tensors_begin(ptst_ctx *c, ptst__tensors_writer *w, const char *path,
                                     const ptst_tensor *list, size_t count,
                                     const char *const *metadata) {
    ptst_text header = {NULL, 0, 0};
    unsigned char size[8];
    size_t i;
    ptst_code code;
    memset(w, 0, sizeof *w);
    w->list = list;
    w->count = count;
    w->order = (uint32_t *)ptst__alloc(c, count + 1, sizeof *w->order);
    if (w->order == NULL) {
        return PTST_ERR_MEMORY;
    }
    for (i = 0; i < count; i++) {
        w->order[i] = (uint32_t)i;
    }
    ptst__sort(w->order, count, list, ptst__tensor_precedes);
    code = ptst__tensors_header(c, w, metadata, &header);
    if (code == PTST_OK && header.size > PTST__TENSOR_HEADER) {
        code = ptst__fail(c, PTST_ERR_LIMIT, "%s: a header of more than 100 MB", path);
    }
    if (code == PTST_OK) {
        code = ptst__out_open(c, &w->out, path);
    }
    for (i = 0; i < 8; i++) {
        size[i] = (unsigned char)((uint64_t)header.size >> (8 * i));
    }
    if (code == PTST_OK) {
        code = ptst__out_write(c, &w->out, size, 8);
    }
    if (code == PTST_OK) {
        code = ptst__out_write(c, &w->out, header.data, header.size);
    }
    ptst_text_free(c, &header);
    if (code != PTST_OK) {
        ptst__tensors_abort(c, w);
        return code;
    }
    ptst__tensors_turn(w);
    return PTST_OK;
}

/* Number (in the list) of the tensor whose bytes come next; count when all are written. */
static size_t ptst__tensors_next(ptst__tensors_writer *w) {
    while (w->at < w->count && w->left == 0) {
        w->at++;
        ptst__tensors_turn(w);
    }
    return w->at < w->count ? w->order[w->at] : w->count;
}

static ptst_code ptst__tensors_put(ptst_ctx *c, ptst__tensors_writer *w, const void *data,
                                   size_t bytes) {
    if (bytes > w->left) {
        return ptst__fail(c, PTST_ERR_ARGUMENT, "%s: more bytes than the tensor has",
                          w->out.path.data);
    }
    w->left -= bytes;
    return ptst__out_write(c, &w->out, data, bytes);
}

static ptst_code ptst__tensors_commit(ptst_ctx *c, ptst__tensors_writer *w) {
    ptst_code code;
    if (ptst__tensors_next(w) != w->count) {
        code = ptst__fail(c, PTST_ERR_ARGUMENT, "%s: tensors are missing", w->out.path.data);
        ptst__tensors_abort(c, w);
        return code;
    }
    code = ptst__out_commit(c, &w->out);
    ptst__tensors_abort(c, w);
    return code;
}

/* ---- public part ---- */

PTST_API void ptst_tensors_close(ptst_ctx *c, ptst_tensors *t) {
    size_t i;
    if (t != NULL) {
        for (i = 0; i < t->files_count; i++) {
            ptst__unmap_file(t->files[i].map, t->files[i].size);
        }
        ptst__free(c, t->files);
        ptst__free(c, t->list);
        ptst__map_free(c, &t->names);
        ptst__arena_free(c, &t->arena);
        ptst__free(c, t);
    }
}

PTST_API ptst_tensors *ptst_tensors_open(ptst_ctx *c, const char *path) {
    ptst_tensors *t = (ptst_tensors *)ptst__calloc(c, 1, sizeof *t);
    if (t != NULL && ptst__tensors_path(c, t, path) != PTST_OK) {
        ptst_tensors_close(c, t);
        t = NULL;
    }
    return t;
}

PTST_API ptst_tensors *ptst_tensors_parse(ptst_ctx *c, const void *data, size_t size,
                                          const char *name) {
    ptst_tensors *t = (ptst_tensors *)ptst__calloc(c, 1, sizeof *t);
    if (t != NULL && ptst__tensors_read(c, t, 0, data, size, name) != PTST_OK) {
        ptst_tensors_close(c, t);
        t = NULL;
    }
    return t;
}

PTST_API size_t ptst_tensors_count(const ptst_tensors *t) { return t->count; }

PTST_API const ptst_tensor *ptst_tensors_at(const ptst_tensors *t, size_t i) {
    return i < t->count ? &t->list[i].view : NULL;
}

PTST_API const ptst_tensor *ptst_tensors_find(const ptst_tensors *t, const char *name) {
    int32_t i = ptst__map_get(&t->names, name, strlen(name), -1);
    return i < 0 ? NULL : &t->list[i].view;
}

PTST_API const char *ptst_tensors_metadata(const ptst_tensors *t, const char *key) {
    const ptst__tensor_note *n;
    for (n = t->notes; n != NULL; n = n->next) {
        if (strcmp(n->key, key) == 0) {
            return n->value;
        }
    }
    return NULL;
}

PTST_API ptst_code ptst_tensors_write(ptst_ctx *c, const char *path, const ptst_tensor *list,
                                      size_t count, const char *const *metadata) {
    ptst__tensors_writer w;
    size_t i;
    ptst_code code = ptst__tensors_begin(c, &w, path, list, count, metadata);
    if (code != PTST_OK) {
        return code;
    }
    while (code == PTST_OK && (i = ptst__tensors_next(&w)) < count) {
        code = ptst__tensors_put(c, &w, list[i].data, (size_t)w.left);
    }
    if (code != PTST_OK) {
        ptst__tensors_abort(c, &w);
        return code;
    }
    return ptst__tensors_commit(c, &w);
}

/* >>kernels =======================================================================================
   The operations: conversion of element types, matrix products, and what a transformer layer does
   to its activations. Each operation is a maths block, a scalar reference and variants for AVX2,
   AVX-512 and NEON; a table per instruction set (struct ptst__kernels) holds what differs, and
   ptst_open chooses the best table that the machine can run. Relies on >>threads. Afterwards no
   other section mentions an instruction set. Nothing here allocates after ptst_open or can fail.
   Tested by tests/test_kernels.c and tests/test_ops.c. */

/* Where the result of a micro-kernel goes: rows x cols of Y at y,
   y[i * ldy + j] = beta y[i * ldy + j] + alpha sum(i, j); beta = 0 does not read y. */
typedef struct ptst__tile {
    float *y;
    size_t ldy, rows, cols;
    float alpha, beta;
    const float *ahead; /* a hint: K cache lines from here are needed soon */
} ptst__tile;

struct ptst__adamw_factors;

/* What differs between instruction sets. dtype is F32, F16 or BF16 everywhere. */
struct ptst__kernels {
    const char *name; /* "scalar", ... */

    /* convert: dst[i] = src[i], i < n; src (dst) is an array of dtype. */
    void (*to_f32)(float *dst, const void *src, ptst_dtype dtype, size_t n);
    void (*from_f32)(void *dst, const float *src, ptst_dtype dtype, size_t n);

    /* matmul: the micro-kernel makes tile_rows x tile_cols; packed rows of A have a_width >=
       tile_rows floats, those of B tile_cols. */
    size_t tile_rows, a_width, tile_cols;
    /* Panel of K rows: dst[k * width + j] = src[k * ld + j], j < cols; 0 for cols <= j < width.
       width is a_width or tile_cols. */
    void (*pack_rows)(float *dst, size_t width, const void *src, ptst_dtype dtype, size_t ld,
                      size_t cols, size_t K);
    /* The same from columns: dst[k * width + j] = src[min(j, cols - 1) * ld + k]. */
    void (*pack_cols)(float *dst, size_t width, const void *src, ptst_dtype dtype, size_t ld,
                      size_t cols, size_t K);
    /* sum(i, j) = sum_k a[k * a_width + i] b[k * tile_cols + j] */
    void (*tile)(size_t K, const float *a, const float *b, const ptst__tile *t);
    /* sums[4 * i + j] = sum_k a[i][k] w[j][k] for i < rows (1 or 4), j < 4; w[j] is of dtype. */
    void (*dots)(float *sums, size_t K, const float *const a[4], size_t rows,
                 const void *const w[4], ptst_dtype dtype);
    /* Fused multiply-adds on registers only, `rounds` times; returns the number of floating point
       operations. sink keeps the result alive. */
    double (*peak)(size_t rounds, float scale, float *sink);

    /* The operations on rows: see the scalar functions of the same names. */
    float (*rmsnorm)(size_t C, float eps, const float *x, const float *w, float *y);
    void (*rmsnorm_backward)(size_t C, const float *x, const float *w, float rstd, const float *dy,
                             float *dx);
    void (*rmsnorm_dw)(size_t T, size_t C, size_t n, const float *x, const float *rstd,
                       const float *dy, float *dw);
    void (*rope)(size_t half, float *x, const float *cosines, const float *sines, float sign);
    void (*swiglu)(size_t n, const float *gate, const float *up, float *y);
    void (*swiglu_backward)(size_t n, const float *gate, const float *up, const float *dy,
                            float *dgate, float *dup);
    double (*cross_entropy)(size_t V, float *x, size_t label, float scale);
    void (*adamw)(size_t n, float *w, const float *g, float *m, float *v,
                  const struct ptst__adamw_factors *f);
    double (*sum_squares)(size_t n, const float *x);
    void (*axpy)(size_t n, float alpha, const float *x, float *y);
};

/* Repeat a statement for each row of a micro-kernel. Its sums must live in registers, and no C
   compiler promises that for an array, so each row has variables of its own. */
#define PTST__ROWS_4(X) X(0) X(1) X(2) X(3)
#define PTST__ROWS_6(X) PTST__ROWS_4(X) X(4) X(5)
#define PTST__ROWS_8(X) PTST__ROWS_6(X) X(6) X(7)
#define PTST__ROWS_12(X) PTST__ROWS_8(X) X(8) X(9) X(10) X(11)
#define PTST__ROWS_14(X) PTST__ROWS_12(X) X(12) X(13)

/* ---- convert ---------------------------------------------------------------------------------
   F16 (IEEE 754 binary16) and BF16 (the upper half of a binary32):

       F32   s eeeeeeee mmmmmmmmmmmmmmmmmmmmmmm     value = m.mm * 2^(e - 127)
       BF16  s eeeeeeee mmmmmmm
       F16   s eeeee mmmmmmmmmm                     value = m.mm * 2^(e - 15), e = 0: 0.mm * 2^-14

   To F32 both are exact. From F32: round to nearest, ties to even; too large becomes infinity;
   NaN stays NaN (made quiet, the upper bits of the payload are kept), as the hardware does it.
   All variants give the same bits. Tested by convert_* in tests/test_kernels.c. */

static float ptst__float_of(uint32_t bits) {
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

static uint32_t ptst__bits_of(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return bits;
}

static float ptst__bf16_to_f32(uint16_t h) { return ptst__float_of((uint32_t)h << 16); }

static uint16_t ptst__bf16_from_f32(float f) {
    uint32_t u = ptst__bits_of(f);
    if ((u & 0x7FFFFFFFu) > 0x7F800000u) {
        return (uint16_t)(u >> 16 | 0x40u);
    }
    return (uint16_t)((u + 0x7FFFu + (u >> 16 & 1u)) >> 16);
}

static float ptst__f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, rest = h & 0x7FFFu;
    if (rest >= 0x7C00u) { /* infinity, NaN */
        return ptst__float_of(sign | 0x7F800000u | (rest & 0x3FFu) << 13 |
                              (rest > 0x7C00u ? 0x400000u : 0u));
    }
    if (rest < 0x400u) { /* zero, subnormal: a multiple of 2^-24 */
        float f = (float)rest * ptst__float_of(0x33800000u);
        return sign ? -f : f;
    }
    return ptst__float_of(sign | ((rest << 13) + 0x38000000u));
}

static uint16_t ptst__f16_from_f32(float f) {
    uint32_t u = ptst__bits_of(f), sign = u >> 16 & 0x8000u, rest = u & 0x7FFFFFFFu;
    if (rest > 0x7F800000u) {
        return (uint16_t)(sign | 0x7E00u | (rest >> 13 & 0x3FFu));
    }
    if (rest >= 0x477FF000u) { /* 65520 and more round to infinity */
        return (uint16_t)(sign | 0x7C00u);
    }
    if (rest < 0x38800000u) { /* below 2^-14: adding 0.5 rounds to a multiple of 2^-24 */
        rest = ptst__bits_of(ptst__float_of(rest) + 0.5f) - 0x3F000000u;
        return (uint16_t)(sign | rest);
    }
    rest += 0xFFFu + (rest >> 13 & 1u);
    return (uint16_t)(sign | (rest - 0x38000000u) >> 13);
}

static void ptst__to_f32__scalar(float *dst, const void *src, ptst_dtype dtype, size_t n) {
    const uint16_t *h = (const uint16_t *)src;
    size_t i;
    if (dtype == PTST_F32) {
        memcpy(dst, src, n * sizeof *dst);
        return;
    }
    for (i = 0; i < n; i++) {
        dst[i] = dtype == PTST_BF16 ? ptst__bf16_to_f32(h[i]) : ptst__f16_to_f32(h[i]);
    }
}

static void ptst__from_f32__scalar(void *dst, const float *src, ptst_dtype dtype, size_t n) {
    uint16_t *h = (uint16_t *)dst;
    size_t i;
    if (dtype == PTST_F32) {
        memcpy(dst, src, n * sizeof *src);
        return;
    }
    for (i = 0; i < n; i++) {
        h[i] = dtype == PTST_BF16 ? ptst__bf16_from_f32(src[i]) : ptst__f16_from_f32(src[i]);
    }
}

/* Bytes of one element of a dtype that files have; 0 for others. */
static size_t ptst__dtype_size(ptst_dtype dtype) {
    return dtype == PTST_F32 ? 4 : dtype == PTST_F16 || dtype == PTST_BF16 ? 2 : 0;
}

/* Address of element i of an array of dtype. */
static const void *ptst__element(const void *data, ptst_dtype dtype, size_t i) {
    return (const char *)data + i * ptst__dtype_size(dtype);
}

#if PTST__X86

/* Elements i..i+7 of an array of dtype. */
PTST__AVX2 PTST__INLINE __m256 ptst__load8__avx2(const void *src, ptst_dtype dtype, size_t i) {
    const uint16_t *h = (const uint16_t *)src + i;
    if (dtype == PTST_F32) {
        return _mm256_loadu_ps((const float *)src + i);
    }
    if (dtype == PTST_F16) {
        return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)h));
    }
    return _mm256_castsi256_ps(_mm256_slli_epi32(
        _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)h)), 16));
}

PTST__AVX2 static void ptst__to_f32__avx2(float *dst, const void *src, ptst_dtype dtype,
                                          size_t n) {
    size_t i = 0;
    for (; n - i >= 8; i += 8) {
        _mm256_storeu_ps(dst + i, ptst__load8__avx2(src, dtype, i));
    }
    ptst__to_f32__scalar(dst + i, ptst__element(src, dtype, i), dtype, n - i);
}

/* Eight floats to BF16; the same steps as ptst__bf16_from_f32. */
PTST__AVX2 PTST__INLINE __m128i ptst__bf16x8__avx2(__m256 x) {
    __m256i u = _mm256_castps_si256(x), high = _mm256_srli_epi32(u, 16);
    __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    __m256i even = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7FFF)), odd);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    __m256i r = _mm256_blendv_epi8(_mm256_srli_epi32(even, 16), quiet, nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}

PTST__AVX2 static void ptst__from_f32__avx2(void *dst, const float *src, ptst_dtype dtype,
                                            size_t n) {
    uint16_t *h = (uint16_t *)dst;
    size_t i = 0;
    if (dtype == PTST_F32) {
        memcpy(dst, src, n * sizeof *src);
        return;
    }
    for (; n - i >= 8; i += 8) {
        __m256 x = _mm256_loadu_ps(src + i);
        __m128i r = dtype == PTST_BF16 ? ptst__bf16x8__avx2(x)
                                       : _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128((__m128i *)(void *)(h + i), r);
    }
    ptst__from_f32__scalar(h + i, src + i, dtype, n - i);
}

/* Elements i..i+15 of an array of dtype where mask is set; elsewhere 0, and nothing is read. */
PTST__AVX512 PTST__INLINE __m512 ptst__load16__avx512(const void *src, ptst_dtype dtype, size_t i,
                                                      __mmask16 mask) {
    const uint16_t *h = (const uint16_t *)src + i;
    if (dtype == PTST_F32) {
        return _mm512_maskz_loadu_ps(mask, (const float *)src + i);
    }
    if (dtype == PTST_F16) {
        return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, h));
    }
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, h)), 16));
}

/* The lowest n of 16 lanes. */
PTST__AVX512 PTST__INLINE __mmask16 ptst__mask16__avx512(size_t n) {
    return (__mmask16)(n >= 16 ? 0xFFFFu : (1u << n) - 1u);
}

PTST__AVX512 static void ptst__to_f32__avx512(float *dst, const void *src, ptst_dtype dtype,
                                              size_t n) {
    size_t i;
    for (i = 0; i < n; i += 16) {
        __mmask16 mask = ptst__mask16__avx512(n - i);
        _mm512_mask_storeu_ps(dst + i, mask, ptst__load16__avx512(src, dtype, i, mask));
    }
}

#elif PTST__NEON

/* Elements i..i+3 of an array of dtype. */
PTST__INLINE float32x4_t ptst__load4__neon(const void *src, ptst_dtype dtype, size_t i) {
    const uint16_t *h = (const uint16_t *)src + i;
    if (dtype == PTST_F32) {
        return vld1q_f32((const float *)src + i);
    }
    if (dtype == PTST_F16) {
        return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(h)));
    }
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(h), 16));
}

static void ptst__to_f32__neon(float *dst, const void *src, ptst_dtype dtype, size_t n) {
    size_t i = 0;
    for (; n - i >= 4; i += 4) {
        vst1q_f32(dst + i, ptst__load4__neon(src, dtype, i));
    }
    ptst__to_f32__scalar(dst + i, ptst__element(src, dtype, i), dtype, n - i);
}

static void ptst__from_f32__neon(void *dst, const float *src, ptst_dtype dtype, size_t n) {
    uint16_t *h = (uint16_t *)dst;
    size_t i = 0;
    if (dtype == PTST_F16) {
        for (; n - i >= 4; i += 4) {
            vst1_u16(h + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(src + i))));
        }
    }
    ptst__from_f32__scalar((char *)dst + i * ptst__dtype_size(dtype), src + i, dtype, n - i);
}

#endif

/* dst[i] = src[i] for i < n; src (dst) is an array of dtype. On the calling thread. */
PTST__UNUSED static void ptst__convert_to_f32(const ptst_ctx *c, float *dst, const void *src,
                                              ptst_dtype dtype, size_t n) {
    c->kernels->to_f32(dst, src, dtype, n);
}

PTST__UNUSED static void ptst__convert_from_f32(const ptst_ctx *c, void *dst, const float *src,
                                                ptst_dtype dtype, size_t n) {
    c->kernels->from_f32(dst, src, dtype, n);
}

/* ---- matmul ----------------------------------------------------------------------------------
   Y [M, N] = beta Y + alpha A B,  A [M, K], B [K, N].     2 M N K floating point operations.

   Linear layer y = x w^T, x [M, K], w [N, K] (as files have it):
       forward    y[m, n]  = sum_k x[m, k] w[n, k]           B = w, transposed
       backward   dx[m, k] += sum_n dy[m, n] w[n, k]         B = w, as it lies
                  dw[n, k] += sum_m dy[m, n] x[m, k]         A = dy, transposed; B = x
   Nothing is saved but x. Tested by matmul_* in tests/test_kernels.c.

   A naive loop waits for memory. Here (Goto and van de Geijn, "Anatomy of High-Performance Matrix
   Multiplication", 2008; the names are those of BLIS) each operand is first packed, which also
   converts it to F32 and turns it, into panels that a micro-kernel reads front to back:

       B, a block [kc, nc], in panels of tile_cols       A, a block [mc, kc], in panels of tile_rows
       +-------+-------+--   panel: row k = tile_cols     +--------------+  panel: column k =
       |       |       |     neighbours, then row k + 1   |              |  tile_rows neighbours
       | kc    |       |                                  +--------------+

   The micro-kernel keeps tile_rows x tile_cols sums in registers: per k it loads one row of a B
   panel, and multiplies it by each of the tile_rows numbers of A. A panel of B stays in the first
   cache while the panels of A pass by from the second one.

   Threads pack together, then share the tiles of Y. Blocks of K follow each other in a fixed
   order, so each sum has one order: the same bits for any number of threads.

   Few rows (decoding) or few columns (adapters of low rank): packing would cost more than the
   product. There `dots` makes 4 x 4 scalar products of rows as they lie in memory. */

enum {
    PTST__BLOCK_K = 512,   /* upper bounds of a block: kc, nc, rows of A packed at once */
    PTST__BLOCK_N = 2048,
    PTST__BLOCK_M = 1024,
    PTST__TASK_ROWS = 168, /* rows of A that one task keeps in the second cache */
    PTST__FEW = 16         /* "few" rows or columns */
};

/* A matrix [K, N] in memory: element (k, n) is data[n * ld + k] if transposed, data[k * ld + n]
   if not, counted in elements of dtype (F32, F16 or BF16). A weight of a linear layer lies as
   [out, in]: as B of Y = X W^T it is transposed, as B of dX = dY W it is not. */
typedef struct ptst__matrix {
    const void *data;
    size_t ld;
    ptst_dtype dtype;
    bool transposed;
} ptst__matrix;

static size_t ptst__min(size_t a, size_t b) { return a < b ? a : b; }

static size_t ptst__ceil_div(size_t a, size_t b) { return a / b + (a % b != 0); }

/* Adds a block of sums (row stride ld) to Y as the tile says. */
static void ptst__tile_put(const ptst__tile *t, const float *sums, size_t ld) {
    size_t i, j;
    for (i = 0; i < t->rows; i++) {
        for (j = 0; j < t->cols; j++) {
            float *y = t->y + i * t->ldy + j, sum = t->alpha * sums[i * ld + j];
            *y = t->beta == 0 ? sum : t->beta * *y + sum;
        }
    }
}

/* ---- matmul, scalar ---- */

static void ptst__pack_rows__scalar(float *dst, size_t width, const void *src, ptst_dtype dtype,
                                    size_t ld, size_t cols, size_t K) {
    size_t k, j;
    for (k = 0; k < K; k++) {
        ptst__to_f32__scalar(dst + k * width, ptst__element(src, dtype, k * ld), dtype, cols);
        for (j = cols; j < width; j++) {
            dst[k * width + j] = 0;
        }
    }
}

static void ptst__pack_cols__scalar(float *dst, size_t width, const void *src, ptst_dtype dtype,
                                    size_t ld, size_t cols, size_t K) {
    size_t k, j;
    for (j = 0; j < width; j++) {
        const void *column = ptst__element(src, dtype, (j < cols ? j : cols - 1) * ld);
        for (k = 0; k < K; k++) {
            ptst__to_f32__scalar(dst + k * width + j, ptst__element(column, dtype, k), dtype, 1);
        }
    }
}

/* 4 x 4, sums in double. */
static void ptst__tile__scalar(size_t K, const float *a, const float *b, const ptst__tile *t) {
    float sums[16];
    size_t i, j, k;
    for (i = 0; i < 4; i++) {
        for (j = 0; j < 4; j++) {
            double sum = 0;
            for (k = 0; k < K; k++) {
                sum += (double)a[4 * k + i] * (double)b[4 * k + j];
            }
            sums[4 * i + j] = (float)sum;
        }
    }
    ptst__tile_put(t, sums, 4);
}

static void ptst__dots__scalar(float *sums, size_t K, const float *const a[4], size_t rows,
                               const void *const w[4], ptst_dtype dtype) {
    size_t i, j, k;
    for (j = 0; j < 4; j++) {
        double sum[4] = {0, 0, 0, 0};
        for (k = 0; k < K; k++) {
            float wk;
            ptst__to_f32__scalar(&wk, ptst__element(w[j], dtype, k), dtype, 1);
            for (i = 0; i < rows; i++) {
                sum[i] += (double)a[i][k] * (double)wk;
            }
        }
        for (i = 0; i < rows; i++) {
            sums[4 * i + j] = (float)sum[i];
        }
    }
}

static double ptst__peak__scalar(size_t rounds, float scale, float *sink) {
    float p[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    size_t i, r;
    for (r = 0; r < rounds; r++) {
        for (i = 0; i < 8; i++) {
            p[i] = p[i] * scale + 1;
        }
    }
    for (i = 0; i < 8; i++) {
        *sink += p[i];
    }
    return 16.0 * (double)rounds;
}

#if PTST__X86

/* ---- matmul, AVX2 ---- */

/* The first n < 8 elements at src, then 0; nothing beyond them is read. */
PTST__AVX2 PTST__INLINE __m256 ptst__load_part__avx2(const void *src, ptst_dtype dtype, size_t n) {
    uint16_t h[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    if (dtype == PTST_F32) {
        __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        return _mm256_maskload_ps((const float *)src,
                                  _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), lane));
    }
    memcpy(h, src, n * sizeof *h);
    return ptst__load8__avx2(h, dtype, 0);
}

/* As __scalar, 8 columns at a time. A row is only one or two cache lines, and no processor guesses
   where the next one is: rows are asked for ahead of time. */
PTST__AVX2 static void ptst__pack_rows__avx2(float *dst, size_t width, const void *src,
                                             ptst_dtype dtype, size_t ld, size_t cols, size_t K) {
    size_t k, j;
    for (k = 0; k < K; k++) {
        const void *row = ptst__element(src, dtype, k * ld);
        _mm_prefetch((const char *)ptst__element(src, dtype, ptst__min(k + 16, K - 1) * ld),
                     _MM_HINT_T0);
        for (j = 0; j < width; j += 8) {
            __m256 x = _mm256_setzero_ps();
            if (j + 8 <= cols) {
                x = ptst__load8__avx2(row, dtype, j);
            } else if (j < cols) {
                x = ptst__load_part__avx2(ptst__element(row, dtype, j), dtype, cols - j);
            }
            _mm256_storeu_ps(dst + k * width + j, x);
        }
    }
}

/* Elements k..k+3 of columns i and i + 4. */
PTST__AVX2 PTST__INLINE __m256 ptst__lanes__avx2(const void *const column[8], ptst_dtype dtype,
                                                 size_t i, size_t k) {
    const void *p = ptst__element(column[i], dtype, k), *q = ptst__element(column[i + 4], dtype, k);
    __m128i h;
    if (dtype == PTST_F32) {
        return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps((const float *)p)),
                                    _mm_loadu_ps((const float *)q), 1);
    }
    h = _mm_unpacklo_epi64(_mm_loadl_epi64((const __m128i *)p), _mm_loadl_epi64((const __m128i *)q));
    return dtype == PTST_F16 ? _mm256_cvtph_ps(h)
                             : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

/* As __scalar, 8 columns and 4 k at a time: squares of 4 x 4 are turned within the lanes. */
PTST__AVX2 PTST__INLINE void ptst__turn__avx2(float *dst, size_t width, const void *src,
                                              ptst_dtype dtype, size_t ld, size_t cols, size_t K) {
    const void *column[8];
    size_t i, j, k;
    for (j = 0; j < width; j += 8) {
        for (i = 0; i < 8; i++) {
            column[i] = ptst__element(src, dtype, (j + i < cols ? j + i : cols - 1) * ld);
        }
        for (k = 0; K - k >= 4; k += 4) {
            __m256 x0 = ptst__lanes__avx2(column, dtype, 0, k);
            __m256 x1 = ptst__lanes__avx2(column, dtype, 1, k);
            __m256 x2 = ptst__lanes__avx2(column, dtype, 2, k);
            __m256 x3 = ptst__lanes__avx2(column, dtype, 3, k);
            __m256 y0 = _mm256_unpacklo_ps(x0, x2), y1 = _mm256_unpackhi_ps(x0, x2);
            __m256 y2 = _mm256_unpacklo_ps(x1, x3), y3 = _mm256_unpackhi_ps(x1, x3);
            float *d = dst + k * width + j;
            _mm256_storeu_ps(d, _mm256_unpacklo_ps(y0, y2));
            _mm256_storeu_ps(d + width, _mm256_unpackhi_ps(y0, y2));
            _mm256_storeu_ps(d + 2 * width, _mm256_unpacklo_ps(y1, y3));
            _mm256_storeu_ps(d + 3 * width, _mm256_unpackhi_ps(y1, y3));
        }
        for (; k < K; k++) {
            for (i = 0; i < 8; i++) {
                ptst__to_f32__scalar(dst + k * width + j + i, ptst__element(column[i], dtype, k),
                                     dtype, 1);
            }
        }
    }
}

/* The dtype is made a constant of the loop. */
PTST__AVX2 static void ptst__pack_cols__avx2(float *dst, size_t width, const void *src,
                                             ptst_dtype dtype, size_t ld, size_t cols, size_t K) {
    if (dtype == PTST_F32) {
        ptst__turn__avx2(dst, width, src, PTST_F32, ld, cols, K);
    } else if (dtype == PTST_F16) {
        ptst__turn__avx2(dst, width, src, PTST_F16, ld, cols, K);
    } else {
        ptst__turn__avx2(dst, width, src, PTST_BF16, ld, cols, K);
    }
}

/* y = beta y + alpha sum, 8 numbers. */
PTST__AVX2 PTST__INLINE void ptst__put8__avx2(float *y, __m256 sum, float alpha, float beta) {
    sum = _mm256_mul_ps(sum, _mm256_set1_ps(alpha));
    if (beta != 0) {
        sum = _mm256_fmadd_ps(_mm256_set1_ps(beta), _mm256_loadu_ps(y), sum);
    }
    _mm256_storeu_ps(y, sum);
}

/* As __scalar, 6 x 16 sums in 12 registers, FMA. */
PTST__AVX2 static void ptst__tile__avx2(size_t K, const float *a, const float *b,
                                        const ptst__tile *t) {
    float edge[6 * 16];
    bool whole = t->rows == 6 && t->cols == 16;
    float *y = whole ? t->y : edge;
    size_t ldy = whole ? t->ldy : 16;
    float alpha = whole ? t->alpha : 1, beta = whole ? t->beta : 0;
    const char *ahead = (const char *)t->ahead;
#define PTST__X(i) __m256 p##i = _mm256_setzero_ps(), q##i = _mm256_setzero_ps();
    PTST__ROWS_6(PTST__X)
#undef PTST__X
    if (whole) {
#define PTST__X(i)                                                                                 \
    _mm_prefetch((const char *)(y + i * ldy), _MM_HINT_T0);                                        \
    _mm_prefetch((const char *)(y + i * ldy + 15), _MM_HINT_T0);
        PTST__ROWS_6(PTST__X)
#undef PTST__X
    }
    for (; K > 0; K--, a += 8, b += 16, ahead += 64) {
        __m256 b0 = _mm256_loadu_ps(b), b1 = _mm256_loadu_ps(b + 8), ai;
#define PTST__X(i)                                                                                 \
    ai = _mm256_broadcast_ss(a + i);                                                               \
    p##i = _mm256_fmadd_ps(ai, b0, p##i);                                                          \
    q##i = _mm256_fmadd_ps(ai, b1, q##i);
        PTST__ROWS_6(PTST__X)
#undef PTST__X
        _mm_prefetch(ahead, _MM_HINT_T1);
    }
#define PTST__X(i)                                                                                 \
    ptst__put8__avx2(y + i * ldy, p##i, alpha, beta);                                              \
    ptst__put8__avx2(y + i * ldy + 8, q##i, alpha, beta);
    PTST__ROWS_6(PTST__X)
#undef PTST__X
    if (!whole) {
        ptst__tile_put(t, edge, 16);
    }
}

/* The sums of the lanes of four vectors. */
PTST__AVX2 PTST__INLINE __m128 ptst__sum4__avx2(__m256 s0, __m256 s1, __m256 s2, __m256 s3) {
    __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(s0, s1), _mm256_hadd_ps(s2, s3));
    return _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
}

/* As __scalar for 4 x 2 (w[0], w[1]): 8 lanes per sum; what is left of K is added at the end. */
PTST__AVX2 PTST__INLINE void ptst__dots_2__avx2(float *sums, size_t K, const float *const a[4],
                                                const void *const w[4], ptst_dtype dtype) {
    float part[8];
    size_t i, j, k;
#define PTST__X(i) __m256 p##i = _mm256_setzero_ps(), q##i = _mm256_setzero_ps();
    PTST__ROWS_4(PTST__X)
#undef PTST__X
    for (k = 0; K - k >= 8; k += 8) {
        __m256 w0 = ptst__load8__avx2(w[0], dtype, k), w1 = ptst__load8__avx2(w[1], dtype, k), ai;
#define PTST__X(i)                                                                                 \
    ai = _mm256_loadu_ps(a[i] + k);                                                                \
    p##i = _mm256_fmadd_ps(ai, w0, p##i);                                                          \
    q##i = _mm256_fmadd_ps(ai, w1, q##i);
        PTST__ROWS_4(PTST__X)
#undef PTST__X
    }
    _mm_storeu_ps(part, ptst__sum4__avx2(p0, p1, p2, p3));
    _mm_storeu_ps(part + 4, ptst__sum4__avx2(q0, q1, q2, q3));
    for (j = 0; j < 2; j++) {
        float rest[8];
        ptst__to_f32__scalar(rest, ptst__element(w[j], dtype, k), dtype, K - k);
        for (i = 0; i < 4; i++) {
            size_t r;
            sums[4 * i + j] = part[4 * j + i];
            for (r = 0; r < K - k; r++) {
                sums[4 * i + j] += a[i][k + r] * rest[r];
            }
        }
    }
}

/* The same for one row of A and four w. */
PTST__AVX2 PTST__INLINE void ptst__dots_1__avx2(float *sums, size_t K, const float *a,
                                                const void *const w[4], ptst_dtype dtype) {
    size_t j, k;
#define PTST__X(i) __m256 p##i = _mm256_setzero_ps();
    PTST__ROWS_4(PTST__X)
#undef PTST__X
    for (k = 0; K - k >= 8; k += 8) {
        __m256 a0 = _mm256_loadu_ps(a + k);
#define PTST__X(i) p##i = _mm256_fmadd_ps(a0, ptst__load8__avx2(w[i], dtype, k), p##i);
        PTST__ROWS_4(PTST__X)
#undef PTST__X
    }
    _mm_storeu_ps(sums, ptst__sum4__avx2(p0, p1, p2, p3));
    for (j = 0; j < 4; j++) {
        float rest[8];
        size_t r;
        ptst__to_f32__scalar(rest, ptst__element(w[j], dtype, k), dtype, K - k);
        for (r = 0; r < K - k; r++) {
            sums[j] += a[k + r] * rest[r];
        }
    }
}

/* The dtype is made a constant of each inner loop. */
PTST__AVX2 static void ptst__dots__avx2(float *sums, size_t K, const float *const a[4],
                                        size_t rows, const void *const w[4], ptst_dtype dtype) {
    size_t j;
    if (rows == 1) {
        if (dtype == PTST_F32) {
            ptst__dots_1__avx2(sums, K, a[0], w, PTST_F32);
        } else if (dtype == PTST_F16) {
            ptst__dots_1__avx2(sums, K, a[0], w, PTST_F16);
        } else {
            ptst__dots_1__avx2(sums, K, a[0], w, PTST_BF16);
        }
        return;
    }
    for (j = 0; j < 4; j += 2) {
        if (dtype == PTST_F32) {
            ptst__dots_2__avx2(sums + j, K, a, w + j, PTST_F32);
        } else if (dtype == PTST_F16) {
            ptst__dots_2__avx2(sums + j, K, a, w + j, PTST_F16);
        } else {
            ptst__dots_2__avx2(sums + j, K, a, w + j, PTST_BF16);
        }
    }
}

PTST__AVX2 static double ptst__peak__avx2(size_t rounds, float scale, float *sink) {
    __m256 x = _mm256_set1_ps(scale), y = _mm256_set1_ps(1 - scale), s = x;
    size_t r;
#define PTST__X(i) __m256 p##i = _mm256_set1_ps((float)i * 0.125f + 2);
    PTST__ROWS_12(PTST__X)
#undef PTST__X
    for (r = 0; r < rounds; r++) {
#define PTST__X(i) p##i = _mm256_fmadd_ps(p##i, x, y);
        PTST__ROWS_12(PTST__X)
#undef PTST__X
    }
#define PTST__X(i) s = _mm256_add_ps(s, p##i);
    PTST__ROWS_12(PTST__X)
#undef PTST__X
    *sink += _mm_cvtss_f32(_mm256_castps256_ps128(s));
    return 12.0 * 16.0 * (double)rounds;
}

/* ---- matmul, AVX-512 ---- */

/* As __scalar, 16 columns at a time. A row is only one or two cache lines, and no processor guesses
   where the next one is: rows are asked for ahead of time. */
PTST__AVX512 static void ptst__pack_rows__avx512(float *dst, size_t width, const void *src,
                                                 ptst_dtype dtype, size_t ld, size_t cols,
                                                 size_t K) {
    size_t k, j;
    for (k = 0; k < K; k++) {
        const char *later = (const char *)ptst__element(src, dtype, ptst__min(k + 16, K - 1) * ld);
        _mm_prefetch(later, _MM_HINT_T0);
        _mm_prefetch(later + 64, _MM_HINT_T0);
        for (j = 0; j < width; j += 16) {
            __mmask16 mask = cols > j ? ptst__mask16__avx512(cols - j) : (__mmask16)0;
            __m512 x = ptst__load16__avx512(src, dtype, k * ld + j, mask);
            _mm512_storeu_ps(dst + k * width + j, x);
        }
    }
}

/* Elements k..k+3 of columns i, i + 4, i + 8 and i + 12. */
PTST__AVX512 PTST__INLINE __m512 ptst__lanes__avx512(const void *const column[16],
                                                     ptst_dtype dtype, size_t i, size_t k) {
    __m256 low, high;
    if (dtype == PTST_F32) {
        low = ptst__lanes__avx2(column, dtype, i, k);
        high = ptst__lanes__avx2(column + 8, dtype, i, k);
        return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
    }
#define PTST__X(n)                                                                                 \
    __m128i h##n = _mm_loadl_epi64((const __m128i *)ptst__element(column[i + 4 * n], dtype, k));
    PTST__ROWS_4(PTST__X)
#undef PTST__X
    __m256i h = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_unpacklo_epi64(h0, h1)),
                                        _mm_unpacklo_epi64(h2, h3), 1);
    return dtype == PTST_F16 ? _mm512_cvtph_ps(h)
                             : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

/* As __scalar, 16 columns and 4 k at a time: squares of 4 x 4 are turned within the lanes. */
PTST__AVX512 PTST__INLINE void ptst__turn__avx512(float *dst, size_t width, const void *src,
                                                  ptst_dtype dtype, size_t ld, size_t cols,
                                                  size_t K) {
    const void *column[16];
    size_t i, j, k;
    for (j = 0; j < width; j += 16) {
        for (i = 0; i < 16; i++) {
            column[i] = ptst__element(src, dtype, (j + i < cols ? j + i : cols - 1) * ld);
        }
        for (k = 0; K - k >= 4; k += 4) {
            __m512 x0 = ptst__lanes__avx512(column, dtype, 0, k);
            __m512 x1 = ptst__lanes__avx512(column, dtype, 1, k);
            __m512 x2 = ptst__lanes__avx512(column, dtype, 2, k);
            __m512 x3 = ptst__lanes__avx512(column, dtype, 3, k);
            __m512 y0 = _mm512_unpacklo_ps(x0, x2), y1 = _mm512_unpackhi_ps(x0, x2);
            __m512 y2 = _mm512_unpacklo_ps(x1, x3), y3 = _mm512_unpackhi_ps(x1, x3);
            float *d = dst + k * width + j;
            _mm512_storeu_ps(d, _mm512_unpacklo_ps(y0, y2));
            _mm512_storeu_ps(d + width, _mm512_unpackhi_ps(y0, y2));
            _mm512_storeu_ps(d + 2 * width, _mm512_unpacklo_ps(y1, y3));
            _mm512_storeu_ps(d + 3 * width, _mm512_unpackhi_ps(y1, y3));
        }
        for (; k < K; k++) {
            for (i = 0; i < 16; i++) {
                ptst__to_f32__scalar(dst + k * width + j + i, ptst__element(column[i], dtype, k),
                                     dtype, 1);
            }
        }
    }
}

/* The dtype is made a constant of the loop. */
PTST__AVX512 static void ptst__pack_cols__avx512(float *dst, size_t width, const void *src,
                                                 ptst_dtype dtype, size_t ld, size_t cols,
                                                 size_t K) {
    if (dtype == PTST_F32) {
        ptst__turn__avx512(dst, width, src, PTST_F32, ld, cols, K);
    } else if (dtype == PTST_F16) {
        ptst__turn__avx512(dst, width, src, PTST_F16, ld, cols, K);
    } else {
        ptst__turn__avx512(dst, width, src, PTST_BF16, ld, cols, K);
    }
}

/* y = beta y + alpha sum, 16 numbers where mask is set. */
PTST__AVX512 PTST__INLINE void ptst__put16__avx512(float *y, __m512 sum, __mmask16 mask,
                                                   const ptst__tile *t) {
    sum = _mm512_mul_ps(sum, _mm512_set1_ps(t->alpha));
    if (t->beta != 0) {
        sum = _mm512_fmadd_ps(_mm512_set1_ps(t->beta), _mm512_maskz_loadu_ps(mask, y), sum);
    }
    _mm512_mask_storeu_ps(y, mask, sum);
}

/* As __scalar, 14 x 32 sums in 28 registers; columns beyond the edge are masked. */
PTST__AVX512 static void ptst__tile__avx512(size_t K, const float *a, const float *b,
                                            const ptst__tile *t) {
    __mmask16 m0 = ptst__mask16__avx512(t->cols);
    __mmask16 m1 = t->cols > 16 ? ptst__mask16__avx512(t->cols - 16) : (__mmask16)0;
    size_t rows = t->rows, ldy = t->ldy;
    const char *ahead = (const char *)t->ahead;
    float *y = t->y;
#define PTST__X(i) __m512 p##i = _mm512_setzero_ps(), q##i = _mm512_setzero_ps();
    PTST__ROWS_14(PTST__X)
#undef PTST__X
    if (rows == 14) {
#define PTST__X(i)                                                                                 \
    _mm_prefetch((const char *)(y + i * ldy), _MM_HINT_T0);                                        \
    _mm_prefetch((const char *)(y + i * ldy + 16), _MM_HINT_T0);
        PTST__ROWS_14(PTST__X)
#undef PTST__X
    }
    for (; K > 0; K--, a += 16, b += 32, ahead += 64) {
        __m512 b0 = _mm512_loadu_ps(b), b1 = _mm512_loadu_ps(b + 16), ai;
#define PTST__X(i)                                                                                 \
    ai = _mm512_set1_ps(a[i]);                                                                     \
    p##i = _mm512_fmadd_ps(ai, b0, p##i);                                                          \
    q##i = _mm512_fmadd_ps(ai, b1, q##i);
        PTST__ROWS_14(PTST__X)
#undef PTST__X
        _mm_prefetch(ahead, _MM_HINT_T1);
    }
#define PTST__X(i)                                                                                 \
    if (i < rows) {                                                                                \
        ptst__put16__avx512(y + i * ldy, p##i, m0, t);                                             \
        ptst__put16__avx512(y + i * ldy + 16, q##i, m1, t);                                        \
    }
    PTST__ROWS_14(PTST__X)
#undef PTST__X
}

/* The sums of the lanes of four vectors. */
PTST__AVX512 PTST__INLINE __m128 ptst__sum4__avx512(__m512 s0, __m512 s1, __m512 s2, __m512 s3) {
#define PTST__X(i)                                                                                 \
    __m256 h##i = _mm256_add_ps(_mm512_castps512_ps256(s##i), _mm512_extractf32x8_ps(s##i, 1));
    PTST__ROWS_4(PTST__X)
#undef PTST__X
    return ptst__sum4__avx2(h0, h1, h2, h3);
}

/* As __scalar: 4 x 4, 16 lanes per sum; the end of K is masked. */
PTST__AVX512 PTST__INLINE void ptst__dots_4__avx512(float *sums, size_t K,
                                                    const float *const a[4],
                                                    const void *const w[4], ptst_dtype dtype) {
    size_t k;
#define PTST__X(i)                                                                                 \
    __m512 p##i = _mm512_setzero_ps(), q##i = _mm512_setzero_ps();                                 \
    __m512 r##i = _mm512_setzero_ps(), s##i = _mm512_setzero_ps();
    PTST__ROWS_4(PTST__X)
#undef PTST__X
    for (k = 0; k < K; k += 16) {
        __mmask16 mask = ptst__mask16__avx512(K - k);
        __m512 w0 = ptst__load16__avx512(w[0], dtype, k, mask);
        __m512 w1 = ptst__load16__avx512(w[1], dtype, k, mask);
        __m512 w2 = ptst__load16__avx512(w[2], dtype, k, mask);
        __m512 w3 = ptst__load16__avx512(w[3], dtype, k, mask), ai;
#define PTST__X(i)                                                                                 \
    ai = _mm512_maskz_loadu_ps(mask, a[i] + k);                                                    \
    p##i = _mm512_fmadd_ps(ai, w0, p##i);                                                          \
    q##i = _mm512_fmadd_ps(ai, w1, q##i);                                                          \
    r##i = _mm512_fmadd_ps(ai, w2, r##i);                                                          \
    s##i = _mm512_fmadd_ps(ai, w3, s##i);
        PTST__ROWS_4(PTST__X)
#undef PTST__X
    }
#define PTST__X(i) _mm_storeu_ps(sums + 4 * i, ptst__sum4__avx512(p##i, q##i, r##i, s##i));
    PTST__ROWS_4(PTST__X)
#undef PTST__X
}

/* The same for one row of A. */
PTST__AVX512 PTST__INLINE void ptst__dots_1__avx512(float *sums, size_t K, const float *a,
                                                    const void *const w[4], ptst_dtype dtype) {
    size_t k;
#define PTST__X(i) __m512 p##i = _mm512_setzero_ps();
    PTST__ROWS_4(PTST__X)
#undef PTST__X
    for (k = 0; k < K; k += 16) {
        __mmask16 mask = ptst__mask16__avx512(K - k);
        __m512 a0 = _mm512_maskz_loadu_ps(mask, a + k);
#define PTST__X(i) p##i = _mm512_fmadd_ps(a0, ptst__load16__avx512(w[i], dtype, k, mask), p##i);
        PTST__ROWS_4(PTST__X)
#undef PTST__X
    }
    _mm_storeu_ps(sums, ptst__sum4__avx512(p0, p1, p2, p3));
}

/* The dtype is made a constant of each inner loop. */
PTST__AVX512 static void ptst__dots__avx512(float *sums, size_t K, const float *const a[4],
                                            size_t rows, const void *const w[4],
                                            ptst_dtype dtype) {
    bool one = rows == 1;
    if (dtype == PTST_F32) {
        one ? ptst__dots_1__avx512(sums, K, a[0], w, PTST_F32)
            : ptst__dots_4__avx512(sums, K, a, w, PTST_F32);
    } else if (dtype == PTST_F16) {
        one ? ptst__dots_1__avx512(sums, K, a[0], w, PTST_F16)
            : ptst__dots_4__avx512(sums, K, a, w, PTST_F16);
    } else {
        one ? ptst__dots_1__avx512(sums, K, a[0], w, PTST_BF16)
            : ptst__dots_4__avx512(sums, K, a, w, PTST_BF16);
    }
}

PTST__AVX512 static double ptst__peak__avx512(size_t rounds, float scale, float *sink) {
    __m512 x = _mm512_set1_ps(scale), y = _mm512_set1_ps(1 - scale), s = x;
    size_t r;
#define PTST__X(i) __m512 p##i = _mm512_set1_ps((float)i * 0.125f + 2);
    PTST__ROWS_14(PTST__X)
#undef PTST__X
    for (r = 0; r < rounds; r++) {
#define PTST__X(i) p##i = _mm512_fmadd_ps(p##i, x, y);
        PTST__ROWS_14(PTST__X)
#undef PTST__X
    }
#define PTST__X(i) s = _mm512_add_ps(s, p##i);
    PTST__ROWS_14(PTST__X)
#undef PTST__X
    *sink += _mm_cvtss_f32(_mm512_castps512_ps128(s));
    return 14.0 * 32.0 * (double)rounds;
}

#elif PTST__NEON

/* ---- matmul, NEON ---- */

/* As __scalar, 4 columns at a time. */
static void ptst__pack_rows__neon(float *dst, size_t width, const void *src, ptst_dtype dtype,
                                  size_t ld, size_t cols, size_t K) {
    size_t k, j;
    if (cols % 4 != 0) {
        ptst__pack_rows__scalar(dst, width, src, dtype, ld, cols, K);
        return;
    }
    for (k = 0; k < K; k++) {
        for (j = 0; j < cols; j += 4) {
            vst1q_f32(dst + k * width + j, ptst__load4__neon(src, dtype, k * ld + j));
        }
        for (; j < width; j += 4) {
            vst1q_f32(dst + k * width + j, vdupq_n_f32(0));
        }
    }
}

/* As __scalar, in squares of 4 x 4: pairs are exchanged, then halves. */
static void ptst__pack_cols__neon(float *dst, size_t width, const void *src, ptst_dtype dtype,
                                  size_t ld, size_t cols, size_t K) {
    const void *r[4];
    size_t i, j, k;
    for (j = 0; j < width; j += 4) {
        for (i = 0; i < 4; i++) {
            r[i] = ptst__element(src, dtype, (j + i < cols ? j + i : cols - 1) * ld);
        }
        for (k = 0; K - k >= 4; k += 4) {
            float32x4x2_t u = vtrnq_f32(ptst__load4__neon(r[0], dtype, k),
                                        ptst__load4__neon(r[1], dtype, k));
            float32x4x2_t v = vtrnq_f32(ptst__load4__neon(r[2], dtype, k),
                                        ptst__load4__neon(r[3], dtype, k));
            float *d = dst + k * width + j;
            vst1q_f32(d, vcombine_f32(vget_low_f32(u.val[0]), vget_low_f32(v.val[0])));
            vst1q_f32(d + width, vcombine_f32(vget_low_f32(u.val[1]), vget_low_f32(v.val[1])));
            d += 2 * width;
            vst1q_f32(d, vcombine_f32(vget_high_f32(u.val[0]), vget_high_f32(v.val[0])));
            vst1q_f32(d + width, vcombine_f32(vget_high_f32(u.val[1]), vget_high_f32(v.val[1])));
        }
        for (; k < K; k++) {
            for (i = 0; i < 4; i++) {
                ptst__to_f32__scalar(dst + k * width + j + i, ptst__element(r[i], dtype, k), dtype,
                                     1);
            }
        }
    }
}

/* As __scalar, 8 x 12 sums in 24 registers, FMA with one lane of A. */
static void ptst__tile__neon(size_t K, const float *a, const float *b, const ptst__tile *t) {
    float edge[8 * 12];
    bool whole = t->rows == 8 && t->cols == 12;
    float *y = whole ? t->y : edge;
    size_t ldy = whole ? t->ldy : 12;
    float32x4_t alpha = vdupq_n_f32(whole ? t->alpha : 1);
    float beta = whole ? t->beta : 0;
#define PTST__X(i) float32x4_t p##i = vdupq_n_f32(0), q##i = p##i, r##i = p##i;
    PTST__ROWS_8(PTST__X)
#undef PTST__X
    for (; K > 0; K--, a += 8, b += 12) {
        float32x4_t b0 = vld1q_f32(b), b1 = vld1q_f32(b + 4), b2 = vld1q_f32(b + 8);
        float32x4_t a0 = vld1q_f32(a), a1 = vld1q_f32(a + 4);
#define PTST__X(i)                                                                                 \
    p##i = vfmaq_laneq_f32(p##i, b0, i < 4 ? a0 : a1, i % 4);                                      \
    q##i = vfmaq_laneq_f32(q##i, b1, i < 4 ? a0 : a1, i % 4);                                      \
    r##i = vfmaq_laneq_f32(r##i, b2, i < 4 ? a0 : a1, i % 4);
        PTST__ROWS_8(PTST__X)
#undef PTST__X
    }
#define PTST__X(i)                                                                                 \
    p##i = vmulq_f32(p##i, alpha);                                                                 \
    q##i = vmulq_f32(q##i, alpha);                                                                 \
    r##i = vmulq_f32(r##i, alpha);                                                                 \
    if (beta != 0) {                                                                               \
        p##i = vfmaq_n_f32(p##i, vld1q_f32(y + i * ldy), beta);                                    \
        q##i = vfmaq_n_f32(q##i, vld1q_f32(y + i * ldy + 4), beta);                                \
        r##i = vfmaq_n_f32(r##i, vld1q_f32(y + i * ldy + 8), beta);                                \
    }                                                                                              \
    vst1q_f32(y + i * ldy, p##i);                                                                  \
    vst1q_f32(y + i * ldy + 4, q##i);                                                              \
    vst1q_f32(y + i * ldy + 8, r##i);
    PTST__ROWS_8(PTST__X)
#undef PTST__X
    if (!whole) {
        ptst__tile_put(t, edge, 12);
    }
}

/* As __scalar: one row of A (a) and four w, 4 lanes per sum; the end of K is added last. */
PTST__INLINE void ptst__dots_1__neon(float *sums, size_t K, const float *a,
                                     const void *const w[4], ptst_dtype dtype) {
    size_t j, k;
    float32x4_t p[4];
    for (j = 0; j < 4; j++) {
        p[j] = vdupq_n_f32(0);
    }
    for (k = 0; K - k >= 4; k += 4) {
        float32x4_t a0 = vld1q_f32(a + k);
        p[0] = vfmaq_f32(p[0], a0, ptst__load4__neon(w[0], dtype, k));
        p[1] = vfmaq_f32(p[1], a0, ptst__load4__neon(w[1], dtype, k));
        p[2] = vfmaq_f32(p[2], a0, ptst__load4__neon(w[2], dtype, k));
        p[3] = vfmaq_f32(p[3], a0, ptst__load4__neon(w[3], dtype, k));
    }
    for (j = 0; j < 4; j++) {
        float rest[4];
        size_t r;
        sums[j] = vaddvq_f32(p[j]);
        ptst__to_f32__scalar(rest, ptst__element(w[j], dtype, k), dtype, K - k);
        for (r = 0; r < K - k; r++) {
            sums[j] += a[k + r] * rest[r];
        }
    }
}

static void ptst__dots__neon(float *sums, size_t K, const float *const a[4], size_t rows,
                             const void *const w[4], ptst_dtype dtype) {
    size_t i;
    for (i = 0; i < rows; i++) {
        if (dtype == PTST_F32) {
            ptst__dots_1__neon(sums + 4 * i, K, a[i], w, PTST_F32);
        } else if (dtype == PTST_F16) {
            ptst__dots_1__neon(sums + 4 * i, K, a[i], w, PTST_F16);
        } else {
            ptst__dots_1__neon(sums + 4 * i, K, a[i], w, PTST_BF16);
        }
    }
}

static double ptst__peak__neon(size_t rounds, float scale, float *sink) {
    float32x4_t x = vdupq_n_f32(scale), s = x;
    size_t r;
#define PTST__X(i) float32x4_t p##i = vdupq_n_f32((float)i), q##i = vdupq_n_f32(scale * (float)i);
    PTST__ROWS_12(PTST__X)
#undef PTST__X
    for (r = 0; r < rounds; r++) {
#define PTST__X(i)                                                                                 \
    p##i = vfmaq_f32(p##i, p##i, x);                                                               \
    q##i = vfmaq_f32(q##i, q##i, x);
        PTST__ROWS_12(PTST__X)
#undef PTST__X
    }
#define PTST__X(i) s = vaddq_f32(s, vaddq_f32(p##i, q##i));
    PTST__ROWS_12(PTST__X)
#undef PTST__X
    *sink += vgetq_lane_f32(s, 0);
    return 24.0 * 8.0 * (double)rounds;
}

#endif

/* ---- matmul, the loops around the kernels ---- */

/* One product, and the block of it that is being worked on. */
typedef struct ptst__product {
    const struct ptst__kernels *kernels;
    size_t M, N, K;
    float alpha, beta;
    const float *A;
    size_t lda;
    bool a_transposed;
    ptst__matrix B;
    float *Y;
    size_t ldy;
    /* packed: A block [m0, m0 + mc) x [k0, k0 + kc), B block [k0, k0 + kc) x [n0, n0 + nc) */
    float *packed_a, *packed_b;
    size_t m0, mc, n0, nc, k0, kc;
    size_t b_panels;                        /* to be packed: 0 if it is still the same block */
    size_t task_rows, task_cols, row_tasks; /* tiles of Y that one task computes */
} ptst__product;

/* Task: packs one panel, first those of B, then those of A. */
static void ptst__pack_task(void *arg, size_t task, int thread) {
    const ptst__product *p = (const ptst__product *)arg;
    const struct ptst__kernels *kernels = p->kernels;
    ptst__matrix B = p->B;
    size_t width, at, count;
    float *dst;
    (void)thread;
    if (task < p->b_panels) {
        width = kernels->tile_cols;
        at = p->n0 + task * width;
        count = ptst__min(width, p->n0 + p->nc - at);
        dst = p->packed_b + task * width * p->kc;
    } else {
        task -= p->b_panels;
        width = kernels->a_width;
        at = p->m0 + task * kernels->tile_rows;
        count = ptst__min(kernels->tile_rows, p->m0 + p->mc - at);
        dst = p->packed_a + task * width * p->kc;
        B.data = p->A;
        B.ld = p->lda;
        B.dtype = PTST_F32;
        B.transposed = !p->a_transposed;
    }
    if (!B.transposed) {
        kernels->pack_rows(dst, width, ptst__element(B.data, B.dtype, p->k0 * B.ld + at), B.dtype,
                           B.ld, count, p->kc);
    } else {
        kernels->pack_cols(dst, width, ptst__element(B.data, B.dtype, at * B.ld + p->k0), B.dtype,
                           B.ld, count, p->kc);
    }
}

/* Task: task_rows x task_cols of Y, tile by tile. */
static void ptst__tiles_task(void *arg, size_t task, int thread) {
    const ptst__product *p = (const ptst__product *)arg;
    const struct ptst__kernels *kernels = p->kernels;
    size_t m_first = task % p->row_tasks * p->task_rows, m, n;
    size_t n_first = task / p->row_tasks * p->task_cols;
    size_t m_end = ptst__min(m_first + p->task_rows, p->mc);
    size_t n_end = ptst__min(n_first + p->task_cols, p->nc);
    ptst__tile t;
    (void)thread;
    t.ldy = p->ldy;
    t.alpha = p->alpha;
    t.beta = p->k0 == 0 ? p->beta : 1;
    for (n = n_first; n < n_end; n += kernels->tile_cols) {
        const float *b = p->packed_b + n * p->kc, *ahead = b + kernels->tile_cols * p->kc;
        const float *b_end = ahead + (n + kernels->tile_cols < n_end ? kernels->tile_cols * p->kc : 0);
        t.cols = ptst__min(kernels->tile_cols, n_end - n);
        for (m = m_first; m < m_end; m += kernels->tile_rows) {
            const float *a = p->packed_a + m / kernels->tile_rows * kernels->a_width * p->kc;
            t.rows = ptst__min(kernels->tile_rows, m_end - m);
            t.y = p->Y + (p->m0 + m) * p->ldy + p->n0 + n;
            t.ahead = ahead < b_end ? ahead : a;
            ahead += 16 * p->kc;
            kernels->tile(p->kc, a, b, &t);
        }
    }
}

/* Cuts the block of Y into tasks: enough of them that threads end at about the same time. */
static void ptst__cut_tasks(ptst_ctx *c, ptst__product *p) {
    size_t rows = p->kernels->tile_rows, cols = p->kernels->tile_cols, blocks, wanted;
    blocks = ptst__ceil_div(p->mc, PTST__TASK_ROWS);
    p->task_rows = ptst__ceil_div(ptst__ceil_div(p->mc, blocks), rows) * rows;
    p->row_tasks = ptst__ceil_div(p->mc, p->task_rows);
    wanted = ptst__ceil_div(8 * (size_t)c->threads, p->row_tasks);
    p->task_cols = ptst__ceil_div(ptst__ceil_div(p->nc, wanted), cols) * cols;
}

/* Packs and multiplies block by block. */
static void ptst__gemm_packed(ptst_ctx *c, ptst__product *p) {
    const struct ptst__kernels *kernels = p->kernels;
    size_t k_blocks = ptst__ceil_div(p->K, PTST__BLOCK_K);
    size_t step = ptst__ceil_div(p->K, k_blocks); /* depends on K only: fixed order of sums */
    size_t rows = PTST__BLOCK_M / kernels->tile_rows * kernels->tile_rows;
    size_t cols = PTST__BLOCK_N / kernels->tile_cols * kernels->tile_cols;
    for (p->n0 = 0; p->n0 < p->N; p->n0 += p->nc) {
        p->nc = ptst__min(p->N - p->n0, cols);
        for (p->k0 = 0; p->k0 < p->K; p->k0 += p->kc) {
            p->kc = ptst__min(p->K - p->k0, step);
            for (p->m0 = 0; p->m0 < p->M; p->m0 += p->mc) {
                size_t a_panels, tasks;
                p->mc = ptst__min(p->M - p->m0, rows);
                p->b_panels = p->m0 == 0 ? ptst__ceil_div(p->nc, kernels->tile_cols) : 0;
                a_panels = ptst__ceil_div(p->mc, kernels->tile_rows);
                ptst__parallel_for(c, p->b_panels + a_panels, ptst__pack_task, p);
                ptst__cut_tasks(c, p);
                tasks = p->row_tasks * ptst__ceil_div(p->nc, p->task_cols);
                ptst__parallel_for(c, tasks, ptst__tiles_task, p);
            }
        }
    }
}

/* Bytes of the packing buffers. */
static size_t ptst__scratch_size(const struct ptst__kernels *kernels) {
    size_t a = PTST__BLOCK_M / kernels->tile_rows * kernels->a_width;
    return (a + PTST__BLOCK_N) * PTST__BLOCK_K * sizeof(float);
}

/* Task: 4 * task_cols rows of w times all rows of a few. In the packed product's terms: if few
   rows, a = A and w = B; if few columns, a = B (packed_b, as F32) and w = A. */
static void ptst__dots_task(void *arg, size_t task, int thread) {
    const ptst__product *p = (const ptst__product *)arg;
    bool turned = p->packed_b != NULL;
    size_t few = turned ? p->N : p->M, many = turned ? p->M : p->N, i, j, r, s;
    size_t end = ptst__min(many, (task + 1) * p->task_cols);
    const float *a_data = turned ? p->packed_b : p->A, *a[4];
    const void *w_data = turned ? p->A : p->B.data, *w[4];
    size_t a_ld = turned ? p->kc : p->lda, w_ld = turned ? p->lda : p->B.ld;
    ptst_dtype dtype = turned ? PTST_F32 : p->B.dtype;
    float sums[16], block[16];
    ptst__tile t;
    (void)thread;
    t.ldy = p->ldy;
    t.alpha = p->alpha;
    t.beta = p->beta;
    for (j = task * p->task_cols; j < end; j += 4) {
        for (s = 0; s < 4; s++) { /* beyond the end: the last one again, dropped below */
            w[s] = ptst__element(w_data, dtype, ptst__min(j + s, many - 1) * w_ld);
        }
        for (i = 0; i < few; i += 4) {
            for (r = 0; r < 4; r++) {
                a[r] = a_data + ptst__min(i + r, few - 1) * a_ld;
            }
            p->kernels->dots(sums, p->K, a, few - i == 1 ? 1 : 4, w, dtype);
            for (r = 0; r < 16; r++) {
                block[r] = turned ? sums[r % 4 * 4 + r / 4] : sums[r];
            }
            t.y = turned ? p->Y + j * p->ldy + i : p->Y + i * p->ldy + j;
            t.rows = ptst__min(4, turned ? end - j : few - i);
            t.cols = ptst__min(4, turned ? few - i : end - j);
            ptst__tile_put(&t, block, 4);
        }
    }
}

/* Products with few rows or few columns whose rows of A and columns of B lie in memory in one
   piece (or can be put so cheaply). Returns false if this is not such a product. */
static bool ptst__gemm_few(ptst_ctx *c, ptst__product *p) {
    size_t room = c->scratch_size / sizeof(float), n, k;
    p->task_cols = 32;
    if (p->a_transposed) {
        return false;
    }
    if (p->M <= PTST__FEW && p->B.transposed) {
        p->packed_b = NULL;
        ptst__parallel_for(c, ptst__ceil_div(p->N, p->task_cols), ptst__dots_task, p);
        return true;
    }
    p->kc = p->K; /* row stride of packed_b */
    if (p->N > PTST__FEW || p->M <= PTST__FEW || p->K > room / p->N) {
        return false;
    }
    for (n = 0; n < p->N && p->B.transposed; n++) {
        p->kernels->to_f32(p->packed_b + n * p->K,
                           ptst__element(p->B.data, p->B.dtype, n * p->B.ld), p->B.dtype, p->K);
    }
    for (k = 0; k < p->K && !p->B.transposed; k++) {
        float row[PTST__FEW];
        p->kernels->to_f32(row, ptst__element(p->B.data, p->B.dtype, k * p->B.ld), p->B.dtype,
                           p->N);
        for (n = 0; n < p->N; n++) {
            p->packed_b[n * p->K + k] = row[n];
        }
    }
    ptst__parallel_for(c, ptst__ceil_div(p->M, p->task_cols), ptst__dots_task, p);
    return true;
}

/* Y = beta Y, row by row: what is left of a product without A B. */
static void ptst__scale_task(void *arg, size_t m, int thread) {
    const ptst__product *p = (const ptst__product *)arg;
    float *y = p->Y + m * p->ldy;
    size_t n;
    (void)thread;
    for (n = 0; n < p->N; n++) {
        y[n] = p->beta == 0 ? 0 : p->beta * y[n];
    }
}

/* Y[m * ldy + n] = beta Y[m * ldy + n] + alpha sum_k A(m, k) B(k, n) for m < M, n < N, k < K,
   where A(m, k) = a_transposed ? A[k * lda + m] : A[m * lda + k]. With beta = 0 the old Y is not
   read, with alpha = 0 or K = 0 neither are A and B. Y must not overlap A or B. Same bits for any
   number of threads. Called by the thread that uses the context, not from inside a parallel
   operation (it uses the packing buffers of the context). */
PTST__UNUSED static void ptst__gemm(ptst_ctx *c, size_t M, size_t N, size_t K, float alpha,
                                    const float *A, size_t lda, bool a_transposed, ptst__matrix B,
                                    float beta, float *Y, size_t ldy) {
    ptst__product p;
    memset(&p, 0, sizeof p);
    p.kernels = c->kernels;
    p.M = M;
    p.N = N;
    p.K = K;
    p.alpha = alpha;
    p.beta = beta;
    p.A = A;
    p.lda = lda;
    p.a_transposed = a_transposed;
    p.B = B;
    p.Y = Y;
    p.ldy = ldy;
    p.packed_b = (float *)c->scratch;
    p.packed_a = p.packed_b + (size_t)PTST__BLOCK_N * PTST__BLOCK_K;
    if (M == 0 || N == 0) {
        return;
    }
    if (K == 0 || alpha == 0) {
        ptst__parallel_for(c, M, ptst__scale_task, &p);
    } else if (!ptst__gemm_few(c, &p)) {
        ptst__gemm_packed(c, &p);
    }
}

static ptst__matrix ptst__matrix_f32(const float *data, size_t ld, bool transposed) {
    ptst__matrix B;
    B.data = data;
    B.ld = ld;
    B.dtype = PTST_F32;
    B.transposed = transposed;
    return B;
}

typedef struct ptst__peak_job {
    const struct ptst__kernels *kernels;
    size_t rounds;
    float *sinks; /* [64 tasks] */
    double operations;
} ptst__peak_job;

static void ptst__peak_task(void *arg, size_t task, int thread) {
    const ptst__peak_job *j = (const ptst__peak_job *)arg;
    (void)thread;
    j->kernels->peak(j->rounds, 0.999f, &j->sinks[task % 64]);
}

/* The most that the threads of this context could do: GFLOP/s of multiply-adds on registers only,
   the best of several readings within about `seconds`. */
PTST__UNUSED static double ptst__peak_gflops(ptst_ctx *c, double seconds) {
    float sinks[64];
    ptst__peak_job j;
    double begin = ptst__seconds(), last = begin, now, best = 0, one;
    size_t tasks = 4 * (size_t)c->threads;
    memset(sinks, 0, sizeof sinks);
    j.kernels = c->kernels;
    j.rounds = 20000;
    j.sinks = sinks;
    one = c->kernels->peak(j.rounds, 0.999f, &sinks[0]);
    do {
        last = ptst__seconds();
        ptst__parallel_for(c, tasks, ptst__peak_task, &j);
        now = ptst__seconds();
        if (now > last && one * (double)tasks / (now - last) > best) {
            best = one * (double)tasks / (now - last);
        }
    } while (now - begin < seconds);
    return best * 1e-9;
}

PTST_API void ptst_matmul_forward(ptst_ctx *c, size_t M, size_t N, size_t K, const float *x,
                                  const float *w, float *y) {
    ptst__gemm(c, M, N, K, 1, x, K, false, ptst__matrix_f32(w, K, true), 0, y, N);
}

PTST_API void ptst_matmul_backward(ptst_ctx *c, size_t M, size_t N, size_t K, const float *x,
                                   const float *w, const float *dy, float *dx, float *dw) {
    if (dx != NULL) {
        ptst__gemm(c, M, K, N, 1, dy, N, false, ptst__matrix_f32(w, K, false), 1, dx, K);
    }
    if (dw != NULL) {
        ptst__gemm(c, N, K, M, 1, dy, N, true, ptst__matrix_f32(x, K, false), 1, dw, K);
    }
}

/* ---- rmsnorm ---------------------------------------------------------------------------------
   x, y [T, C], w [C], rstd [T]:

       rstd_t = 1 / sqrt(mean_i x_ti^2 + eps)                               (1)
       y_ti   = x_ti rstd_t w_i                                             (2)

   Backward, with d rstd_t / d x_ti = -rstd_t^3 x_ti / C:

       dw_i  += sum_t dy_ti x_ti rstd_t                                     (2, for w)
       s_t    = rstd_t^2 / C sum_i w_i dy_ti x_ti                           (1)
       dx_ti += rstd_t (w_i dy_ti - s_t x_ti)                               (2, 1)

   Saved: rstd. Recomputed: nothing. Cost: 2 passes over each row, bound by memory. Zhang and
   Sennrich 2019. Proof: tests/test_ops.c, rmsnorm_gradient. */

/* One row of C. Returns rstd. */
static float ptst__rmsnorm__scalar(size_t C, float eps, const float *x, const float *w, float *y) {
    double sum = 0;
    float rstd;
    size_t i;
    for (i = 0; i < C; i++) {
        sum += (double)x[i] * (double)x[i];
    }
    rstd = (float)(1 / sqrt(sum / (double)C + (double)eps));
    for (i = 0; i < C; i++) {
        y[i] = x[i] * rstd * w[i];
    }
    return rstd;
}

static void ptst__rmsnorm_backward__scalar(size_t C, const float *x, const float *w, float rstd,
                                           const float *dy, float *dx) {
    double sum = 0;
    float s;
    size_t i;
    for (i = 0; i < C; i++) {
        sum += (double)w[i] * (double)dy[i] * (double)x[i];
    }
    s = (float)(sum * (double)rstd * (double)rstd / (double)C);
    for (i = 0; i < C; i++) {
        dx[i] += rstd * (w[i] * dy[i] - s * x[i]);
    }
}

/* dw of n columns; x and dy are their first elements in rows of C. */
static void ptst__rmsnorm_dw__scalar(size_t T, size_t C, size_t n, const float *x,
                                     const float *rstd, const float *dy, float *dw) {
    size_t t, i;
    for (i = 0; i < n; i++) {
        double sum = 0;
        for (t = 0; t < T; t++) {
            sum += (double)dy[t * C + i] * (double)x[t * C + i] * (double)rstd[t];
        }
        dw[i] += (float)sum;
    }
}

typedef struct ptst__rmsnorm_job {
    const struct ptst__kernels *kernels;
    size_t T, C;
    float eps;
    const float *x, *w, *dy, *rstd_in;
    float *y, *rstd, *dx, *dw;
} ptst__rmsnorm_job;

/* Rows and columns of a task. */
enum { PTST__NORM_ROWS = 8, PTST__NORM_COLUMNS = 64 };

static void ptst__rmsnorm_task(void *arg, size_t task, int thread) {
    const ptst__rmsnorm_job *j = (const ptst__rmsnorm_job *)arg;
    size_t t = task * PTST__NORM_ROWS, end = ptst__min(t + PTST__NORM_ROWS, j->T);
    (void)thread;
    for (; t < end; t++) {
        size_t at = t * j->C;
        float rstd = j->kernels->rmsnorm(j->C, j->eps, j->x + at, j->w, j->y + at);
        if (j->rstd != NULL) {
            j->rstd[t] = rstd;
        }
    }
}

static void ptst__rmsnorm_backward_task(void *arg, size_t task, int thread) {
    const ptst__rmsnorm_job *j = (const ptst__rmsnorm_job *)arg;
    size_t t = task * PTST__NORM_ROWS, end = ptst__min(t + PTST__NORM_ROWS, j->T);
    (void)thread;
    for (; t < end; t++) {
        size_t at = t * j->C;
        j->kernels->rmsnorm_backward(j->C, j->x + at, j->w, j->rstd_in[t], j->dy + at, j->dx + at);
    }
}

static void ptst__rmsnorm_dw_task(void *arg, size_t task, int thread) {
    const ptst__rmsnorm_job *j = (const ptst__rmsnorm_job *)arg;
    size_t i = task * PTST__NORM_COLUMNS, n = ptst__min(PTST__NORM_COLUMNS, j->C - i);
    (void)thread;
    j->kernels->rmsnorm_dw(j->T, j->C, n, j->x + i, j->rstd_in, j->dy + i, j->dw + i);
}

PTST_API void ptst_rmsnorm_forward(ptst_ctx *c, size_t T, size_t C, float eps, const float *x,
                                   const float *w, float *y, float *rstd) {
    ptst__rmsnorm_job j;
    memset(&j, 0, sizeof j);
    j.kernels = c->kernels;
    j.T = T;
    j.C = C;
    j.eps = eps;
    j.x = x;
    j.w = w;
    j.y = y;
    j.rstd = rstd;
    ptst__parallel_for(c, ptst__ceil_div(T, PTST__NORM_ROWS), ptst__rmsnorm_task, &j);
}

PTST_API void ptst_rmsnorm_backward(ptst_ctx *c, size_t T, size_t C, const float *x, const float *w,
                                    const float *rstd, const float *dy, float *dx, float *dw) {
    ptst__rmsnorm_job j;
    memset(&j, 0, sizeof j);
    j.kernels = c->kernels;
    j.T = T;
    j.C = C;
    j.x = x;
    j.w = w;
    j.rstd_in = rstd;
    j.dy = dy;
    j.dx = dx;
    j.dw = dw;
    if (dw != NULL) {
        ptst__parallel_for(c, ptst__ceil_div(C, PTST__NORM_COLUMNS), ptst__rmsnorm_dw_task, &j);
    }
    if (dx != NULL) {
        ptst__parallel_for(c, ptst__ceil_div(T, PTST__NORM_ROWS), ptst__rmsnorm_backward_task, &j);
    }
}

/* ---- rope ------------------------------------------------------------------------------------
   Rotary position embedding (Su et al. 2021) with the halves of Hugging Face models: in each head
   the pair (x_i, x_{i + R/2}) turns by the angle of position p,

       x_i       = x_i cos_pi - x_{i+R/2} sin_pi          0 <= i < R/2
       x_{i+R/2} = x_{i+R/2} cos_pi + x_i sin_pi

   A rotation's transpose turns back, so backward is the same with -sin. Scaling (llama3, yarn,
   ...) is in the tables. Nothing is saved. Proof: tests/test_ops.c, rope_gradient. */

/* One head; sign is 1, or -1 for the inverse. */
static void ptst__rope__scalar(size_t half, float *x, const float *cosines, const float *sines,
                               float sign) {
    size_t i;
    for (i = 0; i < half; i++) {
        float a = x[i], b = x[i + half], s = sign * sines[i];
        x[i] = a * cosines[i] - b * s;
        x[i + half] = b * cosines[i] + a * s;
    }
}

typedef struct ptst__rope_job {
    const struct ptst__kernels *kernels;
    size_t T, H, D, half, ld;
    float *x;
    const float *cosines, *sines;
    const int32_t *positions;
    float sign;
} ptst__rope_job;

enum { PTST__ROPE_ROWS = 8 };

static void ptst__rope_task(void *arg, size_t task, int thread) {
    const ptst__rope_job *j = (const ptst__rope_job *)arg;
    size_t t = task * PTST__ROPE_ROWS, end = ptst__min(t + PTST__ROPE_ROWS, j->T), h;
    (void)thread;
    for (; t < end; t++) {
        size_t at = (j->positions == NULL ? t : (size_t)j->positions[t]) * j->half;
        for (h = 0; h < j->H; h++) {
            j->kernels->rope(j->half, j->x + t * j->ld + h * j->D, j->cosines + at, j->sines + at,
                             j->sign);
        }
    }
}

PTST_API void ptst_rope(ptst_ctx *c, size_t T, size_t H, size_t D, size_t R, float *x, size_t ld,
                        const float *cosines, const float *sines, const int32_t *positions,
                        bool inverse) {
    ptst__rope_job j;
    j.kernels = c->kernels;
    j.T = T;
    j.H = H;
    j.D = D;
    j.half = R / 2;
    j.ld = ld;
    j.x = x;
    j.cosines = cosines;
    j.sines = sines;
    j.positions = positions;
    j.sign = inverse ? -1.0f : 1.0f;
    ptst__parallel_for(c, ptst__ceil_div(T, PTST__ROPE_ROWS), ptst__rope_task, &j);
}

/* ---- swiglu ----------------------------------------------------------------------------------
   For each element, with s = 1 / (1 + exp(-gate)):

       y = gate s up
       dup   = dy gate s
       dgate = dy up s (1 + gate (1 - s))

   Saved: gate and up. Recomputed: s. Cost: one exponential each way. Shazeer 2020. Proof:
   tests/test_ops.c, swiglu_gradient. */

static void ptst__swiglu__scalar(size_t n, const float *gate, const float *up, float *y) {
    size_t i;
    for (i = 0; i < n; i++) {
        y[i] = gate[i] / (1 + expf(-gate[i])) * up[i];
    }
}

static void ptst__swiglu_backward__scalar(size_t n, const float *gate, const float *up,
                                          const float *dy, float *dgate, float *dup) {
    size_t i;
    for (i = 0; i < n; i++) {
        float g = gate[i], u = up[i], d = dy[i], s = 1 / (1 + expf(-g));
        dup[i] = d * g * s;
        dgate[i] = d * u * s * (1 + g * (1 - s));
    }
}

typedef struct ptst__swiglu_job {
    const struct ptst__kernels *kernels;
    size_t n;
    const float *gate, *up, *dy;
    float *y, *dgate, *dup;
} ptst__swiglu_job;

/* Elements of a task of an operation that works element by element; a multiple of 64 so that
   tasks do not share cache lines. */
enum { PTST__ELEMENTS = 4096 };

static void ptst__swiglu_task(void *arg, size_t task, int thread) {
    const ptst__swiglu_job *j = (const ptst__swiglu_job *)arg;
    size_t i = task * PTST__ELEMENTS, n = ptst__min(PTST__ELEMENTS, j->n - i);
    (void)thread;
    if (j->y != NULL) {
        j->kernels->swiglu(n, j->gate + i, j->up + i, j->y + i);
    } else {
        j->kernels->swiglu_backward(n, j->gate + i, j->up + i, j->dy + i, j->dgate + i, j->dup + i);
    }
}

PTST_API void ptst_swiglu_forward(ptst_ctx *c, size_t n, const float *gate, const float *up,
                                  float *y) {
    ptst__swiglu_job j;
    memset(&j, 0, sizeof j);
    j.kernels = c->kernels;
    j.n = n;
    j.gate = gate;
    j.up = up;
    j.y = y;
    ptst__parallel_for(c, ptst__ceil_div(n, PTST__ELEMENTS), ptst__swiglu_task, &j);
}

PTST_API void ptst_swiglu_backward(ptst_ctx *c, size_t n, const float *gate, const float *up,
                                   const float *dy, float *dgate, float *dup) {
    ptst__swiglu_job j;
    memset(&j, 0, sizeof j);
    j.kernels = c->kernels;
    j.n = n;
    j.gate = gate;
    j.up = up;
    j.dy = dy;
    j.dgate = dgate;
    j.dup = dup;
    ptst__parallel_for(c, ptst__ceil_div(n, PTST__ELEMENTS), ptst__swiglu_task, &j);
}

/* ---- attention -------------------------------------------------------------------------------
   For query row i and head h of a span, and all keys j that it sees (see ptst_span):

       s_j = scale sum_d q_d k_jd                                           (1)
       lse = log sum_j exp(s_j)                                             (2)
       p_j = exp(s_j - lse)                                                 (3)
       out_d = sum_j p_j v_jd                                               (4)

   Backward visits the steps in reverse; sum_j p_j dp_j = sum_d dout_d out_d =: delta, so the
   softmax needs no second pass over the keys:

       dv_jd += p_j dout_d                                                  (4)
       dp_j   = sum_d dout_d v_jd                                           (4)
       ds_j   = p_j (dp_j - delta)                                          (3, 2)
       dq_d  += scale ds_j k_jd                                             (1)
       dk_jd += scale ds_j q_d                                              (1)

   Saved: out and lse. Recomputed: s and p. Cost: 4 D operations forward and 10 D backward for each
   pair of a query and a key that it sees. Dao 2022 and 2023 (FlashAttention). Proof:
   tests/test_ops.c, attention_gradient. */

/* begin[b] <= j < end[b] are the keys of block b that query i of span s sees. */
static void ptst__attention_sees(const ptst_attention *a, const ptst_span *s, size_t i,
                                 size_t begin[2], size_t end[2]) {
    size_t own = s->keys[1] + i + 1, seen, first;
    own = own > s->count ? own - s->count : 0;
    seen = s->keys[0] + own;
    first = a->window != 0 && seen > a->window ? seen - a->window : 0;
    begin[0] = ptst__min(first, s->keys[0]);
    end[0] = s->keys[0];
    begin[1] = first - begin[0];
    end[1] = own;
}

static double ptst__dot__scalar(size_t n, const float *x, const float *y) {
    double sum = 0;
    size_t i;
    for (i = 0; i < n; i++) {
        sum += (double)x[i] * (double)y[i];
    }
    return sum;
}

/* One query row and head; q [D], out [D], and the first elements of the key head in k, v. */
static double ptst__attention_row__scalar(const ptst_attention *a, const ptst_span *s, size_t i,
                                          size_t at, const float *q, float *out) {
    size_t begin[2], end[2], j, d;
    double max = -HUGE_VAL, sum = 0, lse, score;
    int b;
    ptst__attention_sees(a, s, i, begin, end);
    for (b = 0; b < 2; b++) { /* (1), (2): the sum is kept relative to the largest score */
        for (j = begin[b]; j < end[b]; j++) {
            score = (double)a->scale * ptst__dot__scalar(a->D, q, s->k[b] + j * a->kv_ld + at);
            if (!(score <= max)) {
                sum *= exp(max - score);
                max = score;
            }
            sum += exp(score - max);
        }
    }
    lse = max + log(sum);
    memset(out, 0, a->D * sizeof *out);
    for (b = 0; b < 2; b++) { /* (3), (4) */
        for (j = begin[b]; j < end[b]; j++) {
            const float *v = s->v[b] + j * a->kv_ld + at;
            score = (double)a->scale * ptst__dot__scalar(a->D, q, s->k[b] + j * a->kv_ld + at);
            for (d = 0; d < a->D; d++) {
                out[d] += (float)exp(score - lse) * v[d];
            }
        }
    }
    return lse;
}

/* The same row backward; dq [D] is written, dk and dv of the span grow. */
static void ptst__attention_row_backward__scalar(const ptst_attention *a, const ptst_span *s,
                                                 size_t i, size_t at, const float *q,
                                                 const float *out, double lse, const float *dout,
                                                 float *dq) {
    size_t begin[2], end[2], j, d;
    double delta = ptst__dot__scalar(a->D, dout, out);
    int b;
    ptst__attention_sees(a, s, i, begin, end);
    memset(dq, 0, a->D * sizeof *dq);
    for (b = 0; b < 2; b++) {
        for (j = begin[b]; j < end[b]; j++) {
            const float *k = s->k[b] + j * a->kv_ld + at, *v = s->v[b] + j * a->kv_ld + at;
            float *dk = s->dk[b] + j * a->kv_ld + at, *dv = s->dv[b] + j * a->kv_ld + at;
            double p = exp((double)a->scale * ptst__dot__scalar(a->D, q, k) - lse);
            double ds = (double)a->scale * p * (ptst__dot__scalar(a->D, dout, v) - delta);
            for (d = 0; d < a->D; d++) {
                dv[d] += (float)p * dout[d];
                dq[d] += (float)ds * k[d];
                dk[d] += (float)ds * q[d];
            }
        }
    }
}

typedef struct ptst__attention_job {
    const struct ptst__kernels *kernels;
    const ptst_attention *a;
    const float *q, *out_in, *dout, *lse_in;
    float *out, *lse, *dq;
} ptst__attention_job;

/* Task: one span and head. */
static void ptst__attention_task__scalar(void *arg, size_t task, int thread) {
    const ptst__attention_job *j = (const ptst__attention_job *)arg;
    const ptst_attention *a = j->a;
    const ptst_span *s = &a->spans[task / a->H];
    size_t h = task % a->H, at = h / (a->H / a->K) * a->D, i;
    (void)thread;
    for (i = 0; i < s->count; i++) {
        size_t row = s->query + i;
        double lse = ptst__attention_row__scalar(a, s, i, at, j->q + row * a->q_ld + h * a->D,
                                                 j->out + (row * a->H + h) * a->D);
        if (j->lse != NULL) {
            j->lse[row * a->H + h] = (float)lse;
        }
    }
}

/* Task: one key head with all its query heads, over all spans in order. */
static void ptst__attention_backward_task__scalar(void *arg, size_t task, int thread) {
    const ptst__attention_job *j = (const ptst__attention_job *)arg;
    const ptst_attention *a = j->a;
    size_t group = a->H / a->K, n, g, i;
    (void)thread;
    for (n = 0; n < a->spans_count; n++) {
        const ptst_span *s = &a->spans[n];
        for (i = 0; i < s->count; i++) {
            for (g = 0; g < group; g++) {
                size_t row = s->query + i, h = task * group + g, at = (row * a->H + h) * a->D;
                ptst__attention_row_backward__scalar(
                    a, s, i, task * a->D, j->q + row * a->q_ld + h * a->D, j->out_in + at,
                    (double)j->lse_in[row * a->H + h], j->dout + at,
                    j->dq + row * a->q_ld + h * a->D);
            }
        }
    }
}

PTST_API void ptst_attention_forward(ptst_ctx *c, const ptst_attention *a, const float *q,
                                     float *out, float *lse) {
    ptst__attention_job j;
    memset(&j, 0, sizeof j);
    j.kernels = c->kernels;
    j.a = a;
    j.q = q;
    j.out = out;
    j.lse = lse;
    ptst__parallel_for(c, a->spans_count * a->H, ptst__attention_task__scalar, &j);
}

/* Bytes of scratch for the backward pass over any spans with at most `rows` rows of queries and
   `keys` different rows of keys. */
static size_t ptst__attention_scratch(size_t H, size_t D, size_t rows, size_t keys, size_t spans) {
    return (2 * rows + 2 * keys) * H * D * sizeof(float) + (spans + 1) * 2 * 64;
}

PTST_API size_t ptst_attention_backward_scratch(const ptst_attention *a) {
    size_t rows = 0, keys = 0, n;
    for (n = 0; n < a->spans_count; n++) {
        const ptst_span *s = &a->spans[n];
        rows = s->query + s->count > rows ? s->query + s->count : rows;
        keys += s->keys[0] + s->keys[1];
    }
    return ptst__attention_scratch(a->H, a->D, rows, keys, a->spans_count);
}

PTST_API void ptst_attention_backward(ptst_ctx *c, const ptst_attention *a, const float *q,
                                      const float *out, const float *lse, const float *dout,
                                      float *dq, void *scratch) {
    ptst__attention_job j;
    memset(&j, 0, sizeof j);
    j.kernels = c->kernels;
    j.a = a;
    j.q = q;
    j.out_in = out;
    j.lse_in = lse;
    j.dout = dout;
    j.dq = dq;
    (void)scratch;
    ptst__parallel_for(c, a->K, ptst__attention_backward_task__scalar, &j);
}

/* ---- cross-entropy ---------------------------------------------------------------------------
   One row of logits x [V] with label y:

       lse  = max + log sum_i exp(x_i - max)                                (1)
       loss = lse - x_y                                                     (2)
       dx_i = (exp(x_i - lse) - [i = y]) scale                              (2, 1)

   The gradient overwrites the logits, the largest buffer of a step. Cost: one exponential for the
   loss alone, none more for the gradient. Proof: tests/test_ops.c, cross_entropy_gradient. */

static double ptst__cross_entropy__scalar(size_t V, float *x, size_t label, float scale) {
    double sum = 0, loss;
    float max = x[0];
    size_t i;
    for (i = 1; i < V; i++) {
        max = x[i] > max ? x[i] : max;
    }
    for (i = 0; i < V; i++) {
        sum += exp((double)x[i] - (double)max);
    }
    loss = (double)max + log(sum) - (double)x[label];
    for (i = 0; i < V && scale != 0; i++) {
        double p = exp((double)x[i] - (double)max) / sum;
        x[i] = (float)((p - (i == label ? 1 : 0)) * (double)scale);
    }
    return loss;
}

typedef struct ptst__cross_entropy_job {
    const struct ptst__kernels *kernels;
    size_t V;
    float *logits;
    const int32_t *labels;
    double *losses;
    float scale;
} ptst__cross_entropy_job;

static void ptst__cross_entropy_task(void *arg, size_t r, int thread) {
    const ptst__cross_entropy_job *j = (const ptst__cross_entropy_job *)arg;
    float *x = j->logits + r * j->V;
    (void)thread;
    if (j->labels[r] >= 0 && (size_t)j->labels[r] < j->V) {
        j->losses[r] = j->kernels->cross_entropy(j->V, x, (size_t)j->labels[r], j->scale);
        return;
    }
    j->losses[r] = 0;
    if (j->scale != 0) {
        memset(x, 0, j->V * sizeof *x);
    }
}

PTST_API void ptst_cross_entropy(ptst_ctx *c, size_t rows, size_t V, float *logits,
                                 const int32_t *labels, double *losses, float scale) {
    ptst__cross_entropy_job j;
    j.kernels = c->kernels;
    j.V = V;
    j.logits = logits;
    j.labels = labels;
    j.losses = losses;
    j.scale = scale;
    ptst__parallel_for(c, rows, ptst__cross_entropy_task, &j);
}

/* ---- adamw -----------------------------------------------------------------------------------
   torch.optim.AdamW (Loshchilov and Hutter 2019; weight decay apart from the gradient), step t:

       g = grad_scale grad
       w = w (1 - lr weight_decay)
       m = m + (1 - beta1) (g - m)
       v = beta2 v + (1 - beta2) g^2
       w = w - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

   Cost: 4 arrays read, 3 written: bound by memory. Proof: tests/test_ops.c, adamw_steps. */

/* The factors of one step, rounded once from double as PyTorch does it. */
typedef struct ptst__adamw_factors {
    float grad_scale, keep, one_beta1, beta2, one_beta2, step_size, root, eps;
} ptst__adamw_factors;

static void ptst__adamw__scalar(size_t n, float *w, const float *g, float *m, float *v,
                                const ptst__adamw_factors *f) {
    size_t i;
    for (i = 0; i < n; i++) {
        float gradient = f->grad_scale * g[i];
        m[i] += f->one_beta1 * (gradient - m[i]);
        v[i] = f->beta2 * v[i] + f->one_beta2 * (gradient * gradient);
        w[i] = w[i] * f->keep - f->step_size * (m[i] / (sqrtf(v[i]) / f->root + f->eps));
    }
}

typedef struct ptst__adamw_job {
    const struct ptst__kernels *kernels;
    size_t n;
    float *w, *m, *v;
    const float *g;
    ptst__adamw_factors factors;
} ptst__adamw_job;

static void ptst__adamw_task(void *arg, size_t task, int thread) {
    const ptst__adamw_job *j = (const ptst__adamw_job *)arg;
    size_t i = task * PTST__ELEMENTS, n = ptst__min(PTST__ELEMENTS, j->n - i);
    (void)thread;
    j->kernels->adamw(n, j->w + i, j->g + i, j->m + i, j->v + i, &j->factors);
}

PTST_API void ptst_adamw(ptst_ctx *c, size_t n, float *w, const float *g, float *m, float *v,
                         double lr, double beta1, double beta2, double eps, double weight_decay,
                         uint64_t step, double grad_scale) {
    ptst__adamw_job j;
    ptst__adamw_factors *f = &j.factors;
    j.kernels = c->kernels;
    j.n = n;
    j.w = w;
    j.g = g;
    j.m = m;
    j.v = v;
    f->grad_scale = (float)grad_scale;
    f->keep = (float)(1 - lr * weight_decay);
    f->one_beta1 = (float)(1 - beta1);
    f->beta2 = (float)beta2;
    f->one_beta2 = (float)(1 - beta2);
    f->step_size = (float)(lr / (1 - pow(beta1, (double)step)));
    f->root = (float)sqrt(1 - pow(beta2, (double)step));
    f->eps = (float)eps;
    ptst__parallel_for(c, ptst__ceil_div(n, PTST__ELEMENTS), ptst__adamw_task, &j);
}

/* ---- sums and multiples of vectors ---- */

static double ptst__sum_squares__scalar(size_t n, const float *x) {
    return ptst__dot__scalar(n, x, x);
}

static void ptst__axpy__scalar(size_t n, float alpha, const float *x, float *y) {
    size_t i;
    for (i = 0; i < n; i++) {
        y[i] += alpha * x[i];
    }
}

/* Number of partial sums of ptst__sum_squares, whatever the number of threads. */
enum { PTST__PARTS = 256 };

typedef struct ptst__vector_job {
    const struct ptst__kernels *kernels;
    size_t n, part;
    float alpha;
    const float *x;
    float *y;
    double sums[PTST__PARTS];
} ptst__vector_job;

static void ptst__sum_squares_task(void *arg, size_t task, int thread) {
    ptst__vector_job *j = (ptst__vector_job *)arg;
    size_t i = task * j->part;
    (void)thread;
    j->sums[task] = j->kernels->sum_squares(ptst__min(j->part, j->n - i), j->x + i);
}

static void ptst__axpy_task(void *arg, size_t task, int thread) {
    const ptst__vector_job *j = (const ptst__vector_job *)arg;
    size_t i = task * PTST__ELEMENTS;
    (void)thread;
    j->kernels->axpy(ptst__min(PTST__ELEMENTS, j->n - i), j->alpha, j->x + i, j->y + i);
}

/* sum_i x_i^2 in double, always in the same order. */
PTST__UNUSED static double ptst__sum_squares(ptst_ctx *c, size_t n, const float *x) {
    ptst__vector_job j;
    size_t i, parts;
    double sum = 0;
    j.kernels = c->kernels;
    j.n = n;
    j.x = x;
    j.part = ptst__ceil_div(ptst__ceil_div(n, PTST__PARTS), 64) * 64;
    parts = n == 0 ? 0 : ptst__ceil_div(n, j.part);
    ptst__parallel_for(c, parts, ptst__sum_squares_task, &j);
    for (i = 0; i < parts; i++) {
        sum += j.sums[i];
    }
    return sum;
}

/* y += alpha x; x may be y. */
PTST__UNUSED static void ptst__axpy(ptst_ctx *c, size_t n, float alpha, const float *x, float *y) {
    ptst__vector_job j;
    j.kernels = c->kernels;
    j.n = n;
    j.alpha = alpha;
    j.x = x;
    j.y = y;
    ptst__parallel_for(c, ptst__ceil_div(n, PTST__ELEMENTS), ptst__axpy_task, &j);
}

/* ---- choice of kernels, context ---- */

static const struct ptst__kernels ptst__kernels_scalar = {
    "scalar",
    ptst__to_f32__scalar,
    ptst__from_f32__scalar,
    4, /* tile_rows, a_width, tile_cols */
    4,
    4,
    ptst__pack_rows__scalar,
    ptst__pack_cols__scalar,
    ptst__tile__scalar,
    ptst__dots__scalar,
    ptst__peak__scalar,
    ptst__rmsnorm__scalar,
    ptst__rmsnorm_backward__scalar,
    ptst__rmsnorm_dw__scalar,
    ptst__rope__scalar,
    ptst__swiglu__scalar,
    ptst__swiglu_backward__scalar,
    ptst__cross_entropy__scalar,
    ptst__adamw__scalar,
    ptst__sum_squares__scalar,
    ptst__axpy__scalar,
};
#if PTST__X86
static const struct ptst__kernels ptst__kernels_avx2 = {
    "avx2",
    ptst__to_f32__avx2,
    ptst__from_f32__avx2,
    6,
    8,
    16,
    ptst__pack_rows__avx2,
    ptst__pack_cols__avx2,
    ptst__tile__avx2,
    ptst__dots__avx2,
    ptst__peak__avx2,
    ptst__rmsnorm__scalar,
    ptst__rmsnorm_backward__scalar,
    ptst__rmsnorm_dw__scalar,
    ptst__rope__scalar,
    ptst__swiglu__scalar,
    ptst__swiglu_backward__scalar,
    ptst__cross_entropy__scalar,
    ptst__adamw__scalar,
    ptst__sum_squares__scalar,
    ptst__axpy__scalar,
};
static const struct ptst__kernels ptst__kernels_avx512 = {
    "avx512",
    ptst__to_f32__avx512,
    ptst__from_f32__avx2,
    14,
    16,
    32,
    ptst__pack_rows__avx512,
    ptst__pack_cols__avx512,
    ptst__tile__avx512,
    ptst__dots__avx512,
    ptst__peak__avx512,
    ptst__rmsnorm__scalar,
    ptst__rmsnorm_backward__scalar,
    ptst__rmsnorm_dw__scalar,
    ptst__rope__scalar,
    ptst__swiglu__scalar,
    ptst__swiglu_backward__scalar,
    ptst__cross_entropy__scalar,
    ptst__adamw__scalar,
    ptst__sum_squares__scalar,
    ptst__axpy__scalar,
};
#elif PTST__NEON
static const struct ptst__kernels ptst__kernels_neon = {
    "neon",
    ptst__to_f32__neon,
    ptst__from_f32__neon,
    8,
    8,
    12,
    ptst__pack_rows__neon,
    ptst__pack_cols__neon,
    ptst__tile__neon,
    ptst__dots__neon,
    ptst__peak__neon,
    ptst__rmsnorm__scalar,
    ptst__rmsnorm_backward__scalar,
    ptst__rmsnorm_dw__scalar,
    ptst__rope__scalar,
    ptst__swiglu__scalar,
    ptst__swiglu_backward__scalar,
    ptst__cross_entropy__scalar,
    ptst__adamw__scalar,
    ptst__sum_squares__scalar,
    ptst__axpy__scalar,
};
#endif

/* The table called name, or the best one (name NULL); NULL if this machine cannot run it. */
static const struct ptst__kernels *ptst__kernels_choose(const char *name) {
    const struct ptst__kernels *list[4];
    size_t i, n = 0;
    int features = ptst__cpu_features();
#if PTST__X86
    if (features & PTST__CPU_AVX512) {
        list[n++] = &ptst__kernels_avx512;
    }
    if (features & PTST__CPU_AVX2) {
        list[n++] = &ptst__kernels_avx2;
    }
#elif PTST__NEON
    list[n++] = &ptst__kernels_neon;
#endif
    (void)features;
    list[n++] = &ptst__kernels_scalar;
    for (i = 0; i < n; i++) {
        if (name == NULL || strcmp(name, list[i]->name) == 0) {
            return list[i];
        }
    }
    return NULL;
}

PTST_API const char *ptst_simd_name(const ptst_ctx *c) { return c->kernels->name; }

PTST_API ptst_code ptst_open(const ptst_desc *desc, ptst_ctx **out) {
    static const ptst_allocator standard = {ptst__malloc, ptst__mfree, NULL};
    bool own = desc != NULL && desc->allocator.alloc != NULL && desc->allocator.release != NULL;
    ptst_allocator allocator = own ? desc->allocator : standard;
    const struct ptst__kernels *kernels;
    ptst_ctx *c;
    *out = NULL;
    kernels = ptst__kernels_choose(desc == NULL ? NULL : desc->simd);
    if (kernels == NULL || (desc != NULL && desc->threads < 0)) {
        return PTST_ERR_ARGUMENT;
    }
    c = (ptst_ctx *)ptst__alloc_with(&allocator, sizeof *c);
    if (c == NULL) {
        return PTST_ERR_MEMORY;
    }
    memset(c, 0, sizeof *c);
    c->allocator = allocator;
    if (desc != NULL) {
        c->desc = *desc;
    }
    c->kernels = kernels;
    c->threads = c->desc.threads == 0 ? ptst__core_count() : c->desc.threads;
    c->threads = c->threads > PTST__THREADS_MAX ? PTST__THREADS_MAX : c->threads;
    c->scratch_size = ptst__scratch_size(kernels);
    c->scratch = ptst__alloc(c, c->scratch_size, 1);
    if (c->scratch == NULL || ptst__pool_open(c) != PTST_OK) {
        ptst_close(c);
        return PTST_ERR_MEMORY;
    }
    *out = c;
    return PTST_OK;
}

PTST_API void ptst_close(ptst_ctx *c) {
    if (c != NULL) {
        ptst_allocator allocator = c->allocator;
        ptst__pool_close(c);
        ptst__free(c, c->scratch);
        ptst__free_with(&allocator, c);
    }
}

/* >>model =========================================================================================
   Not written yet. */

/* >>lora ==========================================================================================
   Not written yet. */

/* >>train =========================================================================================
   Not written yet. */

/* >>generate ======================================================================================
   Not written yet. */

/* >>data ==========================================================================================
   Not written yet. */

/* >>judge =========================================================================================
   Not written yet. */

/* >>experiment ====================================================================================
   Not written yet. */

/* >>end =========================================================================================
   Private helper macros end here, so that a file that includes this one keeps its own names.

   Licence: MIT, see the file LICENSE. */

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* PTST_IMPLEMENTATION */
