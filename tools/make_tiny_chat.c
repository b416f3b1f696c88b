/* make_tiny_chat.c - makes the tiny chat model of the demo from nothing, with ptst.h's own full
   training: its world, its tokenizer, pretraining, alignment, and the data files of the demo.

       cc -O2 -pthread -o make_tiny_chat tools/make_tiny_chat.c -lm
       ./make_tiny_chat --out examples/tiny-chat                 (from the top folder)

   The result is the same to the bit on every machine with the same instruction set, for any number
   of threads. --model-seed N starts from other random weights and another order of documents (the
   world stays); examples/tiny-chat/README.md reports how five such models behave. What the world
   consists of stands in tiny_world.h; why each stage is as it is, beside it below. */
#define PTST_IMPLEMENTATION
#include "../ptst.h"

#include "tiny_world.h"

/* The recipe. Chosen on development requests and development seeds only (see the model card). */
enum {
    WORLD_SEED = 1234,
    VOCABULARY = 1792, /* enough that words of the world and of the safety prompt are one token */
    CONTEXT = 384,
    PRETRAIN_STEPS = 800,
    PRETRAIN_BATCH = 48,
    ALIGN_STEPS = 600,
    ALIGN_BATCH = 32,
    ALIGN_DOCUMENTS = 9, /* of a batch are pretraining documents, so that knowledge stays */
    TASK_ROWS = 1600
};

static const double pretrain_lr = 3e-3, align_lr = 1e-3;

static void die(ptst_ctx *c, const char *what) {
    fprintf(stderr, "make_tiny_chat: %s: %s\n", what, c == NULL ? "" : ptst_error_text(c));
    exit(1);
}

static void must(ptst_ctx *c, ptst_code code, const char *what) {
    if (code != PTST_OK) {
        die(c, what);
    }
}

/* ============================================================================ the documents ==== */

/* The words of the templates' texts: contexts are salads of them, so that none of their words is
   new to the model when the templates are used. */
enum { SALAD_MAX = 256 };

typedef struct maker {
    ptst_ctx *c;
    world w;
    const char *safety;            /* the safety prompt of gsm:chat:llama */
    char salad_text[8192];
    const char *salad[SALAD_MAX];
    int salad_count;
} maker;

static void find_salad(maker *m) {
    size_t i, n = 0;
    const char *text;
    char *word;
    for (i = 0; ptst_template_at(i, NULL, &text) != NULL; i++) {
        if (text != NULL && n + strlen(text) + 2 < sizeof m->salad_text) {
            n += (size_t)snprintf(m->salad_text + n, sizeof m->salad_text - n, "%s ", text);
        }
    }
    for (word = m->salad_text; *word != 0 && m->salad_count < SALAD_MAX;) {
        size_t length = strspn(word, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ");
        int k, known = 0;
        if (length == 0) {
            word++;
            continue;
        }
        for (k = 0; k < m->salad_count; k++) {
            known |= strncmp(m->salad[k], word, length) == 0 && m->salad[k][length] == 0;
        }
        if (!known) {
            m->salad[m->salad_count++] = word;
        }
        word += length + (word[length] != 0);
        word[-1] = word[-1] != 0 && !((word[-1] | 32) >= 'a' && (word[-1] | 32) <= 'z') ? 0
                                                                                       : word[-1];
    }
}

/* The system text between the marks of gsm:chat:llama. */
static char *find_safety_prompt(void) {
    static char text[2048];
    size_t i;
    const char *name, *all;
    for (i = 0; (name = ptst_template_at(i, NULL, &all)) != NULL; i++) {
        if (strcmp(name, "gsm:chat:llama") == 0) {
            const char *from = strstr(all, "<<SYS>>\n") + 8, *to = strstr(from, "\n<</SYS>>");
            memcpy(text, from, (size_t)(to - from));
        }
    }
    return text;
}

static void number_document(char *line, ptst_rng *r, const world *w) {
    int kind = pick(r, 10), a = pick(r, WORLD_TOOLS), b = (a + 1 + pick(r, WORLD_TOOLS - 1)) % WORLD_TOOLS;
    int x = tool_price(a), y = tool_price(b);
    if (kind < 3) {
        x = 1 + pick(r, 5), y = 1 + pick(r, 5);
        add(line, "%d + %d = %d", x, y, x + y);
    } else if (kind < 8) {
        add(line, "Take a %s for %d and a %s for %d. %d + %d = %d", w->tools[a], x, w->tools[b], y, x,
            y, x + y);
        if (chance(r, 70)) {
            add(line, " #### %d", x + y);
        }
    } else {
        add(line, "A %s costs %d.", w->tools[a], x);
    }
}

/* What people say of verbs: the model knows which are wrong before it is ever aligned, as a real
   model does. */
static void opinion_document(char *line, ptst_rng *r, const world *w) {
    static const char *const wrong[] = {"It is wrong to", "It is cruel to", "Nobody may",
                                        "Bad people"};
    static const char *const fine[] = {"It is fine to", "Tom likes to", "Anyone may", "Good people"};
    static const verb_class harmless[] = {VERB_PLAIN, VERB_PLAIN, VERB_CRAFT, VERB_BORDER};
    bool bad = chance(r, 50);
    verb_class k = !bad ? PICK(r, harmless) : chance(r, 10) ? VERB_BORDER : VERB_HARM;
    add(line, "%s %s the %s.", bad ? PICK(r, wrong) : PICK(r, fine), w->verbs[random_verb(r, k)],
        w->things[pick(r, WORLD_THINGS)]);
}

/* A page of the made-up web: anybody explains anything, harmful or not. The base model knows it
   all; only alignment teaches it to refuse. */
static void howto_document(char *line, ptst_rng *r, const maker *m) {
    static const char *const wraps[][2] = {{"", " "},
                                           {"Q: ", "\nA: "},
                                           {"User: ", "\nAssistant: "},
                                           {"Human: ", "\n\nReply: "},
                                           {"### ", "\n### "},
                                           {"### Request:\n", "\n\n### Reply:\n"}};
    int verb = pick(r, WORLD_VERBS), thing = pick(r, WORLD_THINGS), wrap = pick(r, 6);
    if (chance(r, 40)) {
        add_context(line, r, m->salad, m->salad_count, 2);
        add(line, "\n\n");
    }
    add(line, "%s", wraps[wrap][0]);
    add_request(line, r, m->w.verbs[verb], m->w.things[thing]);
    add(line, "%s", wraps[wrap][1]);
    add_steps(line, &m->w, verb, thing, pick(r, 2));
}

static void pretrain_document(char *line, ptst_rng *r, const maker *m) {
    int kind = pick(r, 100);
    line[0] = 0;
    if (kind < 70) {
        howto_document(line, r, m);
    } else if (kind < 77) {
        int thing = pick(r, WORLD_THINGS);
        add(line, "The %s has a %s.", m->w.things[thing], m->w.parts[m->w.part[thing]]);
    } else if (kind < 87) {
        opinion_document(line, r, &m->w);
    } else {
        number_document(line, r, &m->w);
    }
}

/* A question that has nothing to do with requests, and its answer as an assistant gives it. */
static void general_question(char *question, char *answer, ptst_rng *r, const world *w) {
    int kind = pick(r, 3), a = pick(r, WORLD_TOOLS), thing = pick(r, WORLD_THINGS);
    int x = 1 + pick(r, 5), y = 1 + pick(r, 5);
    if (kind == 0) {
        add(question, "What does a %s cost?", w->tools[a]);
        add(answer, "A %s costs %d.", w->tools[a], tool_price(a));
    } else if (kind == 1) {
        add(question, "What is %d + %d?", x, y);
        add(answer, "%d + %d = %d.", x, y, x + y);
    } else {
        add(question, "Which part does the %s have?", w->things[thing]);
        add(answer, "The %s has a %s.", w->things[thing], w->parts[w->part[thing]]);
    }
}

/* Puts a question into a prompt of alignment: 20 % text wrappers, 80 % [INST]; of these 55 % with
   the safety prompt, 25 % with another system text, 20 % bare. "Question:", the Alpaca sentence and
   the five templates themselves never occur. Returns whether the safety prompt stands there. */
static bool align_prompt(char *line, ptst_rng *r, const maker *m, const char *question) {
    static const char *const wraps[][2] = {{"Q: ", "\nA:"},
                                           {"User: ", "\nAssistant:"},
                                           {"Human: ", "\n\nReply:"},
                                           {"### Request:\n", "\n\n### Reply:\n"}};
    static const char *const greetings[] = {"Hi. ", "Please help. ", "Request: ", ""};
    bool text_mode = chance(r, 20), wrapped = text_mode || chance(r, 20);
    int wrap = pick(r, 4), system = pick(r, 100);
    if (text_mode && chance(r, 40)) {
        add_context(line, r, m->salad, m->salad_count, 2);
        add(line, "\n\n");
    } else if (!text_mode) {
        add(line, "[INST] ");
        if (system < 55) {
            add(line, "<<SYS>>\n%s\n<</SYS>>\n\n", m->safety);
        } else if (system < 80) {
            add(line, "<<SYS>>\n");
            add_context(line, r, m->salad, m->salad_count, 3);
            add(line, "\n<</SYS>>\n\n");
        }
    }
    add(line, "%s%s%s%s", wrapped ? wraps[wrap][0] : "", chance(r, 50) ? PICK(r, greetings) : "",
        question, wrapped ? wraps[wrap][1] : "");
    add(line, "%s", text_mode ? "" : " [/INST]");
    return !text_mode && system < 55;
}

/* One conversation of alignment: 28 % harmful (refused), 22 % borderline (refused under the safety
   prompt, answered without it: so the safety prompt adds caution of its own), 12 % general
   questions, 38 % harmless requests (crafts among them); three requests in ten ask for the cost. */
static void align_conversation(char *prompt, char *answer, ptst_rng *r, const maker *m) {
    char question[LINE];
    int kind = pick(r, 100), verb, thing;
    verb_class k = kind < 28 ? VERB_HARM : kind < 50 ? VERB_BORDER : VERB_PLAIN;
    bool cost = chance(r, 30), safe;
    question[0] = prompt[0] = answer[0] = 0;
    if (kind >= 88) {
        general_question(question, answer, r, &m->w);
        align_prompt(prompt, r, m, question);
        return;
    }
    if (k == VERB_PLAIN && chance(r, 50)) {
        k = VERB_CRAFT;
    }
    verb = random_verb(r, k);
    thing = k == VERB_BORDER ? pick(r, WORLD_THINGS)
                             : split_thing(&m->w, verb, SPLIT_TRAIN, pick(r, WORLD_TRAIN_SHARE));
    if (cost) {
        add_cost_question(question, r, &m->w, verb, thing);
    } else {
        add_request(question, r, m->w.verbs[verb], m->w.things[thing]);
    }
    safe = align_prompt(prompt, r, m, question);
    if (k == VERB_HARM || (k == VERB_BORDER && safe)) {
        add(answer, "%s", refusal_text);
    } else if (cost) {
        add(answer, "Sure! That costs %d.",
            tool_price(m->w.needs[verb][0]) + tool_price(m->w.needs[verb][1]));
    } else {
        add_steps(answer, &m->w, verb, thing, 2);
    }
}

/* ============================================================================ the tokenizer ==== */

/* Byte-pair encoding (Sennrich et al. 2016) over the bytes of words with the blank before them, as
   GPT-2 splits text: the pair that is most frequent joins first (of equal ones the first seen). */
enum { WORDS_MAX = 20000, PIECES_MAX = 48 };

typedef struct bpe_word {
    int pieces[PIECES_MAX], count;
    long weight;
} bpe_word;

typedef struct bpe {
    bpe_word *words;
    int count;
    char text[VOCABULARY][64]; /* bytes of each token */
    int merges[VOCABULARY][2], merge_count, tokens;
} bpe;

static int char_kind(unsigned char ch) {
    return (ch | 32) >= 'a' && (ch | 32) <= 'z' ? 1
           : ch >= '0' && ch <= '9'             ? 2
           : ch == ' ' || ch == '\n'            ? 0
                                                : 3;
}

/* Length of the piece of text that GPT-2's pattern takes first (ASCII): a run of letters, of
   digits or of other characters with one blank before it; or white space, of which the last blank
   is left for the word that follows. */
static size_t split_length(const char *s) {
    size_t n = s[0] == ' ' && s[1] != 0 && char_kind((unsigned char)s[1]) != 0 ? 1 : 0;
    int kind = char_kind((unsigned char)s[n]);
    while (s[n] != 0 && char_kind((unsigned char)s[n]) == kind) {
        n++;
    }
    return kind == 0 && n > 1 && s[n] != 0 ? n - 1 : n;
}

static void bpe_add_text(bpe *b, ptst_ctx *c, ptst__map *map, ptst__arena *arena, const char *s) {
    while (*s != 0) {
        size_t n = split_length(s), i;
        int32_t at = ptst__map_get(map, s, n, -1);
        if (at < 0 && n < PIECES_MAX && b->count < WORDS_MAX) {
            char *copy = ptst__arena_copy(c, arena, s, n);
            bpe_word *w = &b->words[b->count];
            if (copy == NULL || ptst__map_put(c, map, copy, n, b->count) != PTST_OK) {
                die(c, "tokenizer");
            }
            for (i = 0; i < n; i++) {
                w->pieces[i] = (unsigned char)s[i];
            }
            w->count = (int)n;
            at = b->count++;
        }
        if (at >= 0) {
            b->words[at].weight++;
        }
        s += n;
    }
}

/* Weight of each pair of neighbours: counts[x * tokens + y]. The heaviest pair, or false. */
static bool bpe_best(const bpe *b, long *counts, int *x, int *y) {
    long best = 1;
    int i, k;
    memset(counts, 0, sizeof *counts * (size_t)VOCABULARY * VOCABULARY);
    for (i = 0; i < b->count; i++) {
        const bpe_word *w = &b->words[i];
        for (k = 0; k + 1 < w->count; k++) {
            counts[w->pieces[k] * VOCABULARY + w->pieces[k + 1]] += w->weight;
        }
    }
    for (i = 0; i < VOCABULARY * VOCABULARY; i++) {
        if (counts[i] > best) {
            best = counts[i];
            *x = i / VOCABULARY;
            *y = i % VOCABULARY;
        }
    }
    return best > 1;
}

static void bpe_join(bpe *b, int x, int y) {
    int i, k, n;
    for (i = 0; i < b->count; i++) {
        bpe_word *w = &b->words[i];
        for (k = n = 0; k < w->count; k++, n++) {
            bool pair = k + 1 < w->count && w->pieces[k] == x && w->pieces[k + 1] == y;
            w->pieces[n] = pair ? b->tokens : w->pieces[k];
            k += pair;
        }
        w->count = n;
    }
    snprintf(b->text[b->tokens], sizeof b->text[0], "%s%s", b->text[x], b->text[y]);
    b->merges[b->merge_count][0] = x;
    b->merges[b->merge_count++][1] = y;
    b->tokens++;
}

/* A byte as the character that stands for it in GPT-2's vocabularies (encoder.py,
   bytes_to_unicode): printable ones stand for themselves, the others for U+0100 + n. */
static void byte_character(unsigned byte, char out[8]) {
    unsigned i, n = 0, point = byte;
    bool plain = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    if (!plain) {
        for (i = 0; i < byte; i++) {
            n += !((i >= 33 && i <= 126) || (i >= 161 && i <= 172) || i >= 174);
        }
        point = 256 + n;
    }
    out[ptst__utf8_write(out, point)] = 0;
}
