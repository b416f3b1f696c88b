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
   Not complete yet: only what >>template links against. */

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

PTST_API ptst_jinja *ptst_jinja_compile(ptst_ctx *c, const char *source, size_t size,
                                        const char *name) {
    (void)source;
    (void)size;
    ptst__fail(c, PTST_ERR_UNSUPPORTED, "%s: chat templates are not supported yet", name);
    return NULL;
}

PTST_API void ptst_jinja_free(ptst_ctx *c, ptst_jinja *t) {
    (void)c;
    (void)t;
}

static ptst_code ptst__jinja_run(ptst_ctx *c, const ptst_jinja *t, const ptst__jvar *vars,
                                 size_t count, const ptst_jinja_desc *desc, ptst_text *out,
                                 ptst_text *marks) {
    (void)t;
    (void)vars;
    (void)count;
    (void)desc;
    (void)out;
    (void)marks;
    return ptst__fail(c, PTST_ERR_UNSUPPORTED, "chat templates are not supported yet");
}

PTST_API ptst_code ptst_jinja_render(ptst_ctx *c, const ptst_jinja *t, const ptst_json *context,
                                     const ptst_jinja_desc *desc, ptst_text *out,
                                     ptst_text *marks) {
    (void)context;
    return ptst__jinja_run(c, t, NULL, 0, desc, out, marks);
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
