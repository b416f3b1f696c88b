/* Tests of >>kernels: conversion and matrix products. */
#include "test.h"

/* The instruction sets of this machine; NULL ends the list. */
static const char *const kernels_simds[] = {"scalar", "avx2", "avx512", "amx", "neon", NULL};

/* A context, or NULL if this machine cannot run simd. */
static ptst_ctx *kernels_open(const char *simd, int threads) {
    return ptst__kernels_choose(simd) == NULL ? NULL : test_open(threads, simd);
}

/* ---- convert ---- */

/* Value of an F16 (mantissa 10, bias 15) or BF16 (mantissa 7, bias 127), from the definition. */
static double kernels_value(uint16_t h, int mantissa, int bias) {
    int fields = h & 0x7FFF, e = fields >> mantissa, m = fields & ((1 << mantissa) - 1);
    double v =
        e == 0 ? ldexp(m, 1 - bias - mantissa) : ldexp(m + (1 << mantissa), e - bias - mantissa);
    return h & 0x8000 ? -v : v;
}

static bool kernels_special(uint16_t h, int mantissa) {
    return (h & 0x7FFF) >> mantissa == 0x7FFF >> mantissa; /* infinity or NaN */
}

static void kernels_convert_one(ptst_ctx *c, ptst_dtype dtype, int mantissa, int bias) {
    uint16_t *all = (uint16_t *)malloc(65536 * sizeof *all);
    uint16_t *back = (uint16_t *)malloc(65536 * sizeof *back);
    float *f = (float *)malloc(65536 * sizeof *f);
    int i, bad = 0;
    for (i = 0; i < 65536; i++) {
        all[i] = (uint16_t)i;
    }
    ptst__convert_to_f32(c, f, all, dtype, 65536);
    ptst__convert_from_f32(c, back, f, dtype, 65536);
    for (i = 0; i < 65536; i++) {
        uint16_t h = all[i], payload = (uint16_t)(h & ((1 << mantissa) - 1));
        if (kernels_special(h, mantissa)) {
            uint16_t quiet = (uint16_t)(1 << (mantissa - 1)); /* NaN may become quiet */
            bool nan = f[i] != f[i];
            bad += nan != (payload != 0) || (!nan && fabs((double)f[i]) <= 3.5e38);
            bad += (back[i] | (nan ? quiet : 0)) != (h | (nan ? quiet : 0));
            bad += (ptst__bits_of(f[i]) >> 31) != (uint32_t)h >> 15;
        } else {
            bad += (double)f[i] != kernels_value(h, mantissa, bias);
            bad += (ptst__bits_of(f[i]) >> 31) != (uint32_t)h >> 15; /* -0 */
            bad += back[i] != h;
        }
    }
    CHECK(bad == 0);
    free(all);
    free(back);
    free(f);
}

static void convert_all_values(void) {
    int i;
    for (i = 0; kernels_simds[i] != NULL; i++) {
        ptst_ctx *c = kernels_open(kernels_simds[i], 1);
        if (c != NULL) {
            kernels_convert_one(c, PTST_F16, 10, 15);
            kernels_convert_one(c, PTST_BF16, 7, 127);
            ptst_close(c);
        }
    }
}

/* Between each value and the next: the middle goes to the even one, its neighbours to the nearer
   one. All positive values up to the largest finite one, whose middle goes to infinity. */
static void kernels_round_one(ptst_ctx *c, ptst_dtype dtype, int mantissa, int bias) {
    int i, bad = 0, last = (0x7FFF >> mantissa << mantissa) - 1;
    for (i = 0; i <= last; i++) {
        double low = kernels_value((uint16_t)i, mantissa, bias), high, middle;
        float x[6];
        uint16_t h[6];
        int even = i & 1 ? i + 1 : i, j;
        high = i == last ? 2 * low - kernels_value((uint16_t)(i - 1), mantissa, bias)
                         : kernels_value((uint16_t)(i + 1), mantissa, bias);
        middle = (low + high) / 2;
        x[0] = (float)middle;
        x[1] = nextafterf((float)middle, 0);
        x[2] = nextafterf((float)middle, INFINITY);
        for (j = 0; j < 3; j++) {
            x[j + 3] = -x[j];
        }
        ptst__convert_from_f32(c, h, x, dtype, 6);
        bad += h[0] != even || h[1] != i || h[2] != i + 1;
        bad += h[3] != (0x8000 | even) || h[4] != (0x8000 | i) || h[5] != (0x8000 | (i + 1));
    }
    CHECK(bad == 0);
}

static void convert_rounding(void) {
    int i;
    for (i = 0; kernels_simds[i] != NULL; i++) {
        ptst_ctx *c = kernels_open(kernels_simds[i], 1);
        if (c != NULL) {
            kernels_round_one(c, PTST_F16, 10, 15);
            kernels_round_one(c, PTST_BF16, 7, 127);
            ptst_close(c);
        }
    }
}

/* Every length 0..70 at an odd address gives the scalar bits, and nothing beyond is written. */
static void convert_lengths(void) {
    static const ptst_dtype dtypes[] = {PTST_F32, PTST_F16, PTST_BF16, PTST_I8, PTST_I4};
    ptst_rng r = {7, 0, 0};
    float x[80], y[80], expected[80];
    uint16_t h[164], scalar[164];
    int i, d;
    size_t n, k;
    for (k = 0; k < 80; k++) { /* all exponents, NaN and infinity included */
        x[k] = ptst__float_of(ptst_rng_u32(&r));
    }
    for (i = 0; kernels_simds[i] != NULL; i++) {
        ptst_ctx *c = kernels_open(kernels_simds[i], 1);
        for (d = 0; d < 5 && c != NULL; d++) {
            for (n = 0; n <= 70; n++) {
                memset(h, 0x55, sizeof h);
                memset(scalar, 0x55, sizeof scalar);
                ptst__convert_from_f32(c, h + 1, x + 1, dtypes[d], n);
                ptst__from_f32__scalar(scalar + 1, x + 1, dtypes[d], n);
                CHECK(memcmp(h, scalar, sizeof h) == 0);
                memset(y, 0x55, sizeof y);
                memset(expected, 0x55, sizeof expected);
                ptst__convert_to_f32(c, y + 1, h + 1, dtypes[d], n);
                ptst__to_f32__scalar(expected + 1, h + 1, dtypes[d], n);
                CHECK(memcmp(y, expected, sizeof y) == 0);
            }
        }
        ptst_close(c);
    }
}

/* Blocks: every variant writes and reads the scalar bits; the error is at most half a step of the
   scale (I4: a whole one at the other end of the range, 8 against -8); special blocks. */
static void convert_blocks(void) {
    enum { N = 40 * PTST__BLOCK };
    static float x[N], y[N], expected[N];
    static char blocks[N * 2], scalar[N * 2];
    ptst_rng r = {9, 0, 0};
    size_t i, k;
    int s, d;
    for (i = 0; i < N; i++) {
        x[i] = ptst_rng_normal(&r) * (float)ldexp(1, (int)(i / PTST__BLOCK) - 20);
    }
    for (i = 0; i < PTST__BLOCK; i++) {
        x[i] = 0;
        x[PTST__BLOCK + i] = 1e-31f * (float)i;
        x[2 * PTST__BLOCK + i] = i == 5 ? NAN : (float)i;
        x[3 * PTST__BLOCK + i] = i == 31 ? -INFINITY : (float)i;
        x[4 * PTST__BLOCK + i] = i % 2 == 0 ? 3.0f : -3.0f; /* both ends */
        x[5 * PTST__BLOCK + i] = 0.5f * (float)i;           /* halves: ties */
        x[6 * PTST__BLOCK + i] = -(float)i;
        x[7 * PTST__BLOCK + i] = 1e38f * (i % 3 == 0 ? 1.0f : -0.99f);
    }
    for (s = 0; kernels_simds[s] != NULL; s++) {
        ptst_ctx *c = kernels_open(kernels_simds[s], 1);
        for (d = 0; d < 2 && c != NULL; d++) {
            ptst_dtype dtype = d == 0 ? PTST_I8 : PTST_I4;
            size_t bytes = ptst__dtype_bytes(dtype, N);
            CHECK(bytes == (d == 0 ? 40 * 34u : 40 * 18u));
            ptst__convert_from_f32(c, blocks, x, dtype, N);
            ptst__from_f32__scalar(scalar, x, dtype, N);
            CHECK(memcmp(blocks, scalar, bytes) == 0);
            ptst__convert_to_f32(c, y, blocks, dtype, N);
            ptst__to_f32__scalar(expected, scalar, dtype, N);
            for (i = 0; i < N; i++) { /* one NaN is as good as another */
                y[i] = y[i] != y[i] ? (float)NAN : y[i];
                expected[i] = expected[i] != expected[i] ? (float)NAN : expected[i];
            }
            CHECK(memcmp(y, expected, sizeof y) == 0);
            for (k = 0; k < N / PTST__BLOCK; k++) {
                const float *a = x + k * PTST__BLOCK, *b = y + k * PTST__BLOCK;
                double step = fabs((double)ptst__block_scale(scalar + bytes / 40 * k)), worst = 0;
                for (i = 0; i < PTST__BLOCK; i++) {
                    CHECK((b[i] != b[i]) == (k == 2 || k == 3));
                    worst = fmax(worst, fabs((double)a[i] - (double)b[i]));
                }
                CHECK(k == 2 || k == 3 || k < 2 || worst <= step * (d == 0 ? 0.5000001 : 1.07));
                CHECK(k > 1 || worst < 1e-29);
            }
            for (i = 0; i < 70; i++) { /* from the middle of blocks */
                for (k = 0; k < 70; k++) {
                    memset(y, 0x55, 71 * sizeof *y);
                    ptst__read_f32(c->kernels, y, blocks, dtype, 8 * PTST__BLOCK + i, k);
                    CHECK(memcmp(y, expected + 8 * PTST__BLOCK + i, k * sizeof *y) == 0);
                    CHECK(ptst__bits_of(y[k]) == 0x55555555u);
                }
            }
        }
        ptst_close(c);
    }
}

/* ---- matmul ---- */

typedef struct kernels_case {
    size_t M, N, K;
    bool a_transposed, b_transposed;
    ptst_dtype dtype;
    float alpha, beta;
    size_t pad; /* of every row, and elements before the data, so nothing is aligned */
} kernels_case;

typedef struct kernels_data {
    float *A, *Y, *Y0;
    char *B;
    double *sums, *bounds; /* the product in double, and sum |a b| */
    size_t lda, ldb, ldy, size;
} kernels_data;

/* Random operands, and the product by its definition in double precision. */
static void kernels_fill(const kernels_case *k, kernels_data *d, uint64_t seed) {
    size_t i, m, n, a_rows = k->a_transposed ? k->K : k->M, b_rows = k->b_transposed ? k->N : k->K;
    bool blocks = ptst__is_block(k->dtype);
    size_t b_pad = blocks ? k->pad * PTST__BLOCK : k->pad, all; /* blocks begin at blocks */
    ptst_rng r = {0, 0, 0};
    float *b32;
    r.seed = seed;
    d->lda = (k->a_transposed ? k->M : k->K) + k->pad;
    d->ldb = (k->b_transposed ? k->K : k->N) + b_pad;
    d->ldb = blocks ? ptst__ceil_div(d->ldb, PTST__BLOCK) * PTST__BLOCK : d->ldb;
    all = b_pad + b_rows * d->ldb;
    d->ldy = k->N + k->pad;
    d->size = k->pad + k->M * d->ldy;
    d->A = (float *)malloc((k->pad + a_rows * d->lda + 1) * sizeof *d->A);
    d->B = (char *)malloc(4 * (all + 1));
    b32 = (float *)malloc((all + 1) * sizeof *b32);
    d->Y = (float *)malloc((d->size + 1) * sizeof *d->Y);
    d->Y0 = (float *)malloc((d->size + 1) * sizeof *d->Y);
    d->sums = (double *)calloc(k->M * k->N + 1, sizeof *d->sums);
    d->bounds = (double *)calloc(k->M * k->N + 1, sizeof *d->sums);
    for (i = 0; i < k->pad + a_rows * d->lda; i++) {
        d->A[i] = ptst_rng_uniform(&r) * 2 - 1;
    }
    for (i = 0; i < all; i++) { /* rows end with 0 */
        size_t cols = k->b_transposed ? k->K : k->N, at = i < b_pad ? 0 : (i - b_pad) % d->ldb;
        b32[i] = blocks && at >= cols ? 0 : ptst_rng_uniform(&r) * 2 - 1;
    }
    ptst__from_f32__scalar(d->B, b32, k->dtype, all);
    ptst__to_f32__scalar(b32, d->B, k->dtype, all);
    for (i = 0; i < d->size; i++) { /* with beta = 0 the old Y may be anything */
        d->Y0[i] = k->beta == 0 ? NAN : ptst_rng_uniform(&r) - 0.5f;
    }
    for (m = 0; m < k->M; m++) {
        for (i = 0; i < k->K; i++) {
            double a = (double)d->A[k->pad + (k->a_transposed ? i * d->lda + m : m * d->lda + i)];
            const float *b = b32 + b_pad + (k->b_transposed ? i : i * d->ldb);
            size_t step = k->b_transposed ? d->ldb : 1;
            for (n = 0; n < k->N; n++) {
                d->sums[m * k->N + n] += a * (double)b[n * step];
                d->bounds[m * k->N + n] += fabs(a * (double)b[n * step]);
            }
        }
    }
    free(b32);
}

static void kernels_release(kernels_data *d) {
    free(d->A);
    free(d->B);
    free(d->Y);
    free(d->Y0);
    free(d->sums);
    free(d->bounds);
}

static void kernels_multiply(ptst_ctx *c, const kernels_case *k, kernels_data *d) {
    ptst__matrix B;
    B.data = ptst__element(d->B, k->dtype, k->pad * (ptst__is_block(k->dtype) ? PTST__BLOCK : 1));
    B.ld = d->ldb;
    B.dtype = k->dtype;
    B.transposed = k->b_transposed;
    memcpy(d->Y, d->Y0, d->size * sizeof *d->Y);
    ptst__gemm(c, k->M, k->N, k->K, k->alpha, d->A + k->pad, d->lda, k->a_transposed, B, k->beta,
               d->Y + k->pad, d->ldy);
}

/* Bound: adding K products in any order and float precision is off by at most K eps sum|a b|
   (Higham, "Accuracy and Stability of Numerical Algorithms", 3.1; eps = 2^-24), and alpha, beta
   and the blocks of K add a few roundings of the terms of the result. */
static int kernels_compare(const kernels_case *k, const kernels_data *d) {
    const double eps = 1.0 / 16777216;
    size_t m, n;
    int bad = 0;
    for (m = 0; m < k->M; m++) {
        for (n = 0; n < d->ldy; n++) {
            size_t at = k->pad + m * d->ldy + n, i = m * k->N + n;
            double old = (double)d->Y0[at], expected, bound;
            if (n >= k->N) { /* between the rows nothing is written */
                bad += ptst__bits_of(d->Y[at]) != ptst__bits_of(d->Y0[at]);
                continue;
            }
            old = k->beta == 0 ? 0 : (double)k->beta * old;
            expected = old + (double)k->alpha * d->sums[i];
            bound =
                eps * (((double)k->K + 4) * fabs((double)k->alpha) * d->bounds[i] + 4 * fabs(old));
            bad += !(fabs((double)d->Y[at] - expected) <= bound);
        }
    }
    return bad;
}

static bool kernels_check(ptst_ctx *c, const kernels_case *k, uint64_t seed) {
    kernels_data d;
    int bad;
    kernels_fill(k, &d, seed);
    kernels_multiply(c, k, &d);
    bad = kernels_compare(k, &d);
    if (bad != 0) {
        fprintf(stderr, "%s: M %d N %d K %d, A %d, B %d dtype %d, alpha %g beta %g: %d wrong\n",
                ptst_simd_name(c), (int)k->M, (int)k->N, (int)k->K, k->a_transposed,
                k->b_transposed, (int)k->dtype, (double)k->alpha, (double)k->beta, bad);
    }
    kernels_release(&d);
    return bad == 0;
}

/* Each variant of transposition and dtype (20 of them), alpha, beta and padding varying along. */
static void kernels_variant(kernels_case *k, size_t v) {
    static const ptst_dtype dtypes[] = {PTST_F32, PTST_F16, PTST_BF16, PTST_I8, PTST_I4};
    static const float alphas[] = {1, -0.5f, 1, 2}, betas[] = {0, 1, 0.25f, 0, 1};
    k->a_transposed = (v & 1) != 0;
    k->b_transposed = (v & 2) != 0;
    k->dtype = dtypes[v / 4 % 5];
    k->alpha = alphas[v % 4];
    k->beta = betas[v % 5];
    k->pad = v % 3 * 3;
}

static void matmul_sizes(void) {
    static const size_t sizes[] = {1,  2,  3,  4,  5,  6,  7,  8,  9,  11, 12, 13, 14, 15,
                                   16, 17, 24, 28, 29, 31, 32, 33, 47, 48, 49, 63, 65, 71};
    const size_t count = sizeof sizes / sizeof sizes[0];
    bool quick = getenv("TEST_QUICK") != NULL;
    int s;
    size_t i, v;
    for (s = 0; kernels_simds[s] != NULL; s++) {
        ptst_ctx *c = kernels_open(kernels_simds[s], 1);
        ptst_rng r = {11, 0, 0};
        if (c == NULL) {
            continue;
        }
        for (i = 0; i < (quick ? 300u : 3000u); i++) {
            kernels_case k;
            k.M = sizes[ptst_rng_below(&r, (uint32_t)count)];
            k.N = sizes[ptst_rng_below(&r, (uint32_t)count)];
            k.K = sizes[ptst_rng_below(&r, (uint32_t)count)];
            kernels_variant(&k, i);
            CHECK(kernels_check(c, &k, i));
        }
        for (v = 0; v < 20; v++) { /* every number of rows, columns and steps */
            for (i = 1; i <= (quick ? 20u : 70u); i++) {
                kernels_case k;
                k.M = v % 3 == 0 ? i : 19;
                k.N = v % 3 == 1 ? i : 37;
                k.K = v % 3 == 2 ? i : 21;
                kernels_variant(&k, v);
                CHECK(kernels_check(c, &k, i));
            }
        }
        ptst_close(c);
    }
}

/* Beyond one block of K, N and M, and beyond one task, for each kind of product. */
static void matmul_blocks(void) {
    static const size_t shapes[][3] = {{PTST__FEW_MOST + 6, 33, PTST__BLOCK_K + 1}, /* swap */
                                       {PTST__SWAP_MOST, 71, 2 * PTST__BLOCK_K + 19},
                                       {PTST__SWAP_LEAST, 1030, 70},
                                       {32, 10, PTST__BLOCK_K + 6},     /* panels of 16 */
                                       {PTST__SWAP_MOST, 9, 17200},     /* but too long, or too */
                                       {PTST__SWAP_LEAST + 1, 9, 2042}, /* far apart (6 more): few */
                                       {PTST__SWAP_MOST + 1, 33, PTST__BLOCK_K + 1},
                                       {PTST__SWAP_LEAST - 1, 50, PTST__BLOCK_K + 23}, /* few */
                                       {PTST__SWAP_LEAST - 3, 37, 3 * PTST__BLOCK_K + 9},
                                       {16, 37, 3 * PTST__BLOCK_K + 9},
                                       {PTST__DOTS - 1, 29, PTST__BLOCK_K + 11},
                                       {11, 2060, 50},
                                       {9, 90000, 3}, /* more columns than a buffer has lines for */
                                       {6, 5, PTST__OWN * PTST__BLOCK_K / 3 + 9}, /* but too long */
                                       {2, 40, 2 * PTST__BLOCK_K + 7},
                                       {PTST__SHORT, 17, 14 * PTST__BLOCK_K + 3},
                                       {PTST__DOTS, 3, PTST__BLOCK_K * 3 + 5}, /* dots */
                                       {3, 2049, 34},
                                       {2 * PTST__BLOCK_M + 9, PTST__DOTS, 40}, /* or turned */
                                       {300, 7, PTST__BLOCK_K + 30},
                                       {PTST__SHORT + 20, 16, PTST__BLOCK_K + 3}, /* a narrow tile */
                                       {PTST__SHORT + 1, 2053, 19}, /* packed, many rows */
                                       {PTST__BLOCK_M + 3, 21, 23},
                                       {171, 70, PTST__BLOCK_K + 18},
                                       {280, PTST__OWN + 50, 2 * PTST__BLOCK_K + 5},
                                       {PTST__BLOCK_M, 4100, 30}, /* A packed by all kernels */
                                       {PTST__PARTS_M + 17, 70, 60}, /* or in parts */
                                       {40, 230, 2 * PTST__PARTS_K + 33}};
    int s;
    size_t i, v;
    for (s = 0; kernels_simds[s] != NULL; s++) {
        ptst_ctx *c = kernels_open(kernels_simds[s], 2);
        for (i = 0; i < sizeof shapes / sizeof shapes[0] && c != NULL; i++) {
            bool quick = getenv("TEST_QUICK") != NULL; /* each order of A and B once */
            for (v = quick ? 2 : 0; v < 20; v += quick ? 5 : 1) {
                kernels_case k;
                k.M = shapes[i][0];
                k.N = shapes[i][1];
                k.K = shapes[i][2];
                kernels_variant(&k, v);
                CHECK(kernels_check(c, &k, i));
            }
        }
        ptst_close(c);
    }
}

/* Panels of I8 and I4, of each width and part of a matrix, are those that to_f32 gives, bit for bit
   (so a product is that of the F32 matrix, which matmul_blocks compares). */
static void matmul_pack_blocks(void) {
    enum { ROWS = 40, LD = 96, WIDTH = 32, ROOM = LD * WIDTH };
    static float w[ROWS * LD], panel[ROOM], wanted[ROOM];
    static unsigned char blocks[ROWS * LD * 2];
    ptst_rng r = {8, 0, 0};
    size_t i, s, v, differ = 0, used = 0;
    for (s = 0; kernels_simds[s] != NULL; s++) {
        ptst_ctx *c = kernels_open(kernels_simds[s], 1);
        for (v = 0; v < 2000 && c != NULL; v++) {
            struct ptst__kernels plain = *c->kernels;
            ptst__matrix B = {blocks, LD, v & 1 ? PTST_I8 : PTST_I4, (v & 2) != 0};
            size_t widths[] = {16, 32, c->kernels->a_width, c->kernels->tile_cols};
            size_t width = widths[ptst_rng_below(&r, 4)], most = B.transposed ? ROWS : LD;
            size_t at = ptst_rng_below(&r, (uint32_t)(most / 8)) * 8, k0, kc, cols;
            plain.pack_blocks = NULL;
            if (v % 100 < 2) { /* zeros among them, and scales of both signs */
                for (i = 0; i < ROWS * LD; i++) {
                    w[i] = ptst_rng_below(&r, 4) == 0 ? 0 : ptst_rng_uniform(&r) - 0.5f;
                }
            }
            ptst__convert_from_f32(c, blocks, w, B.dtype, ROWS * LD);
            cols = ptst__min(1 + ptst_rng_below(&r, (uint32_t)width), most - at);
            cols = ptst_rng_below(&r, 3) == 0 ? cols : ptst__min(width, most - at);
            k0 = B.transposed ? ptst_rng_below(&r, LD / 32) * 32 : ptst_rng_below(&r, ROWS);
            kc = 1 + ptst_rng_below(&r, (uint32_t)((B.transposed ? LD : ROWS) - k0));
            memset(panel, 1, sizeof panel);
            memset(wanted, 1, sizeof wanted);
            ptst__pack_panel(c->kernels, panel, width, B, at, cols, k0, kc);
            ptst__pack_panel(&plain, wanted, width, B, at, cols, k0, kc);
            differ += memcmp(panel, wanted, sizeof panel) != 0;
            used += c->kernels->pack_blocks != NULL;
        }
        ptst_close(c);
    }
    CHECK(differ == 0);
    CHECK(used == 0 || used >= 2000);
}

/* A number of all 24 bits (the last one is 1), with one of `powers` powers of 2 around 1. */
static float kernels_any(ptst_rng *r, uint32_t powers) {
    float x = (float)(0x800001u | (ptst_rng_u32(r) & 0x7FFFFFu));
    int power = (int)ptst_rng_below(r, powers) - (int)powers / 2 - 23;
    return ldexpf(ptst_rng_below(r, 2) == 0 ? x : -x, power);
}

/* Each element of A, of all magnitudes and with all 24 bits, arrives unchanged through a B of one 1
   in each column: with a part missing or in the wrong place it would not. The other way round the
   numbers are those of B. */
static void matmul_bits(void) {
    enum { SIZE = 80 };
    static float numbers[SIZE * SIZE], ones[SIZE * SIZE], y[SIZE * SIZE];
    ptst_rng r = {5, 0, 0};
    size_t i, j, s, v;
    for (i = 0; i < SIZE * SIZE; i++) {
        numbers[i] = kernels_any(&r, 120);
        ones[i] = i / SIZE == i % SIZE ? 1.0f : 0.0f;
    }
    for (s = 0; kernels_simds[s] != NULL; s++) {
        ptst_ctx *c = kernels_open(kernels_simds[s], 2);
        for (v = 0; v < 8 && c != NULL; v++) {
            const float *A = v & 1 ? ones : numbers, *B = v & 1 ? numbers : ones;
            bool turned = ((v & 1) != 0 && (v & 2) != 0) || ((v & 1) == 0 && (v & 4) != 0);
            size_t wrong = 0;
            ptst__gemm(c, SIZE, SIZE, SIZE, 1, A, SIZE, (v & 4) != 0,
                       ptst__matrix_f32(B, SIZE, (v & 2) != 0), 0, y, SIZE);
            for (i = 0; i < SIZE; i++) {
                for (j = 0; j < SIZE; j++) {
                    wrong += y[i * SIZE + j] != numbers[turned ? j * SIZE + i : i * SIZE + j];
                }
            }
            CHECK(wrong == 0);
        }
        ptst_close(c);
    }
}

/* Numbers of the types that are not F32 arrive unchanged, too: with a part too few they would not.
   Of I8 and I4 there are large and small values of many scales. */
static void matmul_types_exact(void) {
    enum { SIZE = 96, ROWS = 80 };
    static const ptst_dtype dtypes[] = {PTST_F16, PTST_BF16, PTST_I8, PTST_I4};
    static float ones[SIZE * SIZE], numbers[SIZE * SIZE], y[SIZE * SIZE];
    static char B[SIZE * SIZE * 4];
    static const size_t rows[] = {20, 60, ROWS};
    ptst_rng r = {6, 0, 0};
    size_t i, j, s, v;
    for (i = 0; i < SIZE * SIZE; i++) {
        ones[i] = i / SIZE == i % SIZE ? 1.0f : 0.0f;
    }
    for (s = 0; kernels_simds[s] != NULL; s++) {
        ptst_ctx *c = kernels_open(kernels_simds[s], 1);
        for (v = 0; v < 24 && c != NULL; v++) {
            ptst__matrix X;
            size_t M = rows[v / 8], wrong = 0;
            X.data = B;
            X.ld = SIZE;
            X.dtype = dtypes[v % 4];
            X.transposed = v / 4 % 2 != 0;
            for (i = 0; i < SIZE * SIZE; i++) {
                numbers[i] = ptst__is_block(X.dtype) ? (float)(i % 32 * 8 + i / 32 % 8) - 128
                                                     : kernels_any(&r, 12);
                numbers[i] *= ptst__is_block(X.dtype) ? 0.7f + 0.0037f * (float)(i / 256) : 1;
            }
            ptst__from_f32__scalar(B, numbers, X.dtype, SIZE * SIZE);
            ptst__to_f32__scalar(numbers, B, X.dtype, SIZE * SIZE);
            ptst__gemm(c, M, SIZE, SIZE, 1, ones, SIZE, false, X, 0, y, SIZE);
            for (i = 0; i < M; i++) {
                for (j = 0; j < SIZE; j++) {
                    wrong += y[i * SIZE + j] != numbers[X.transposed ? j * SIZE + i : i * SIZE + j];
                }
            }
            CHECK(wrong == 0);
        }
        ptst_close(c);
    }
}

/* Products of two numbers of 24 bits, each alone in its sum: off by no more than what is left out
   of a product in parts, 2^-23, and the rounding of six sums, 2^-24 each, so less than 2^-21. Any of
   the six products of parts is larger than that in most of them. */
static void matmul_single(void) {
    enum { SIZE = 80 };
    static float A[SIZE * SIZE], B[SIZE * SIZE], y[SIZE * SIZE];
    ptst_rng r = {8, 0, 0};
    size_t i, j, s;
    int turned;
    for (i = 0; i < SIZE * SIZE; i++) {
        B[i] = kernels_any(&r, 40);
        A[i] = i / SIZE == i % SIZE ? kernels_any(&r, 40) : 0;
    }
    for (s = 0; kernels_simds[s] != NULL; s++) {
        ptst_ctx *c = kernels_open(kernels_simds[s], 1);
        for (turned = 0; turned < 2 && c != NULL; turned++) {
            double worst = 0;
            ptst__gemm(c, SIZE, SIZE, SIZE, 1, A, SIZE, false,
                       ptst__matrix_f32(B, SIZE, turned != 0), 0, y, SIZE);
            for (i = 0; i < SIZE; i++) {
                for (j = 0; j < SIZE; j++) {
                    double b = (double)B[turned != 0 ? j * SIZE + i : i * SIZE + j];
                    double exact = (double)A[i * SIZE + i] * b;
                    double off = fabs(((double)y[i * SIZE + j] - exact) / exact);
                    worst = off > worst ? off : worst;
                }
            }
            CHECK(worst < 1.0 / (1 << 21));
        }
        ptst_close(c);
    }
}

enum { KERNELS_SINGLE = 96 };

/* Y [M, 96] = products of two numbers, each alone in its sum; returns the largest error. */
static double kernels_single(ptst_ctx *c, size_t M, ptst_dtype dtype, bool transposed, float *y) {
    enum { SIZE = KERNELS_SINGLE };
    static float A[SIZE * SIZE], B[SIZE * SIZE];
    static char b[SIZE * SIZE * 4];
    ptst_rng r = {9, 0, 0};
    ptst__matrix X;
    double worst = 0;
    size_t i, j;
    for (i = 0; i < SIZE * SIZE; i++) {
        B[i] = kernels_any(&r, 20);
        A[i] = i / SIZE == i % SIZE ? kernels_any(&r, 20) : 0;
    }
    ptst__from_f32__scalar(b, B, dtype, SIZE * SIZE);
    ptst__to_f32__scalar(B, b, dtype, SIZE * SIZE);
    X.data = b;
    X.ld = SIZE;
    X.dtype = dtype;
    X.transposed = transposed;
    ptst__gemm(c, M, SIZE, SIZE, 1, A, SIZE, false, X, 0, y, SIZE);
    for (i = 0; i < M; i++) {
        for (j = 0; j < SIZE; j++) {
            double exact = (double)A[i * SIZE + i];
            exact *= (double)B[transposed ? j * SIZE + i : i * SIZE + j];
            if (exact != 0) {
                double off = fabs(((double)y[i * SIZE + j] - exact) / exact);
                worst = off > worst ? off : worst;
            }
        }
    }
    return worst;
}

/* "high" and "medium": with AMX the error of a product is below the bound that ptst_desc states, and
   above what the next better precision would have; two parts of a number are off by up to 2^-17,
   one is by 2^-9, and "high" leaves out a product of 2^-18. Elsewhere nothing changes. Results are the
   same on one thread and on two. */
static void matmul_precision(void) {
    static const char *const words[] = {"medium", "high"};
    static const double below[] = {1.0 / (1 << 7), 1.0 / (1 << 15)};
    static const double above[] = {1.0 / (1 << 11), 1.0 / (1 << 20)};
    static const ptst_dtype dtypes[] = {PTST_F32, PTST_F16, PTST_BF16, PTST_I8};
    static const size_t rows[] = {20, 60, KERNELS_SINGLE};
    static float y[KERNELS_SINGLE * KERNELS_SINGLE], other[KERNELS_SINGLE * KERNELS_SINGLE];
    size_t s, w, v;
    for (s = 0; kernels_simds[s] != NULL; s++) {
        for (w = 0; w < 2; w++) {
            ptst_ctx *plain = kernels_open(kernels_simds[s], 1), *less = NULL, *two = NULL;
            bool amx = plain != NULL && plain->kernels->split != NULL;
            ptst_desc desc;
            memset(&desc, 0, sizeof desc);
            desc.simd = kernels_simds[s];
            desc.float32_matmul_precision = words[w];
            desc.threads = 1;
            if (plain == NULL || ptst_open(&desc, &less) != PTST_OK) {
                CHECK(plain == NULL);
                continue;
            }
            desc.threads = 2;
            CHECK(ptst_open(&desc, &two) == PTST_OK);
            CHECK((strcmp(ptst_simd_name(less), ptst_simd_name(plain)) != 0) == amx);
            CHECK(!amx || strstr(ptst_simd_name(less), words[w]) != NULL);
            for (v = 0; v < 24; v++) {
                ptst_dtype dtype = dtypes[v % 4];
                bool turned = v / 4 % 2 != 0, same;
                size_t size = rows[v / 8] * KERNELS_SINGLE * sizeof *y;
                double off = kernels_single(less, rows[v / 8], dtype, turned, y);
                kernels_single(two, rows[v / 8], dtype, turned, other);
                CHECK(memcmp(y, other, size) == 0);
                kernels_single(plain, rows[v / 8], dtype, turned, other);
                same = memcmp(y, other, size) == 0;
                CHECK(amx ? off < below[w] && off > above[w] : same);
            }
            ptst_close(plain);
            ptst_close(less);
            ptst_close(two);
        }
    }
}

static void matmul_precision_words(void) {
    ptst_desc desc;
    ptst_ctx *c = NULL;
    memset(&desc, 0, sizeof desc);
    desc.float32_matmul_precision = "low";
    CHECK(ptst_open(&desc, &c) == PTST_ERR_ARGUMENT && c == NULL);
    desc.float32_matmul_precision = "highest";
    CHECK(ptst_open(&desc, &c) == PTST_OK);
    CHECK(strchr(ptst_simd_name(c), ' ') == NULL);
    ptst_close(c);
}

/* A row in whole numbers: the same in all instruction sets; each number to half of a step and the
   0.004 of one by which the product that is rounded may be off; and a step that is no number where
   one of the numbers is not finite. */
static void whole_numbers(void) {
    enum { MOST = 100 };
    static ptst__whole want[MOST / PTST__BLOCK + 1], got[MOST / PTST__BLOCK + 1];
    const float odd[] = {0, 1e-38f, 2e-30f, 3e38f, INFINITY, -INFINITY, NAN}; /* not static: tcc */
    float x[MOST];
    ptst_rng r = {21, 0, 0};
    size_t i, s, K, v;
    for (K = 1; K <= MOST; K++) {
        for (v = 0; v < 1 + sizeof odd / sizeof odd[0]; v++) {
            size_t bad = 0, blocks = (K + PTST__BLOCK - 1) / PTST__BLOCK;
            for (i = 0; i < K; i++) { /* the last block is one of odd numbers */
                bool last = v > 0 && i / PTST__BLOCK == blocks - 1;
                x[i] = last ? odd[v - 1] * (i % 2 == 0 ? 1.0f : 0.5f) : kernels_any(&r, 24);
            }
            ptst__whole__scalar(want, x, K);
            for (i = 0; i < K; i++) {
                const ptst__whole *b = &want[i / PTST__BLOCK];
                double off = fabs((double)x[i] - (double)b->d * b->q[i % PTST__BLOCK]);
                bool finite = v < 5 || i / PTST__BLOCK < blocks - 1;
                bad += finite ? !(off <= 0.505 * (double)b->d + 1.1e-30) : b->d == b->d;
            }
            CHECK(bad == 0);
            for (s = 0; kernels_simds[s] != NULL; s++) {
                const struct ptst__kernels *kernels = ptst__kernels_choose(kernels_simds[s]);
                size_t same = v < 5 ? blocks : blocks - 1;
                if (kernels != NULL) {
                    kernels->whole(got, x, K);
                    CHECK(memcmp(got, want, same * sizeof *got) == 0);
                    CHECK(v < 5 || got[same].d != got[same].d);
                }
            }
        }
    }
}

/* M rows [K] times w [N, K] of blocks in y [M, N]; whole allows whole numbers. */
static void kernels_rows(ptst_ctx *c, const kernels_case *k, const float *x, const void *w,
                         bool whole, float *y) {
    ptst__matrix B;
    ptst__product p;
    B.data = w;
    B.ld = (k->K + PTST__BLOCK - 1) / PTST__BLOCK * PTST__BLOCK;
    B.dtype = k->dtype;
    B.transposed = true;
    p = ptst__product_make(c, k->M, k->N, k->K, k->alpha, x, k->K, false, B, k->beta, y, k->N);
    p.whole = whole;
    ptst__gemm_run(c, &p);
}

/* The sum of a row of w and x, and by how much whole numbers of x may be off: half of a step for each
   element, and for rounding 2^-22 of what is added. */
static double kernels_row_sum(const float *x, const float *w, size_t K, double *bound) {
    double sum = 0, most = 0, weights = 0;
    size_t k;
    *bound = 0;
    for (k = 0; k < K; k++) {
        sum += (double)x[k] * (double)w[k];
        most = fabs((double)x[k]) > most ? fabs((double)x[k]) : most;
        weights += fabs((double)w[k]);
        *bound += fabs((double)x[k] * (double)w[k]) / (1 << 22);
        if (k % PTST__BLOCK == PTST__BLOCK - 1 || k == K - 1) {
            *bound += most / 32767 * 0.51 * weights;
            most = weights = 0;
        }
    }
    return sum;
}

/* Products of one row with blocks: as far off as ptst_model_load says and no further, further than
   without whole numbers, and the same for any number of threads. */
static void matmul_whole(void) {
    static const size_t sizes[][2] = {{1, 1},   {3, 31},  {4, 32},   {5, 33},  {8, 64},
                                      {31, 95}, {66, 96}, {300, 40}, {701, 577}};
    static float x[577], w[701 * 608], y[3][701];
    static char blocks[701 * 608 * 2];
    ptst_rng r = {22, 0, 0};
    size_t i, j, s, n, v;
    for (s = 0; kernels_simds[s] != NULL; s++) {
        ptst_ctx *c[2];
        double rounded = 0, plain = 0;
        c[0] = kernels_open(kernels_simds[s], 1);
        c[1] = kernels_open(kernels_simds[s], 2);
        for (n = 0; n < sizeof sizes / sizeof sizes[0] * 20 && c[0] != NULL; n++) {
            kernels_case k;
            size_t ld, bad = 0;
            kernels_variant(&k, n);
            k.M = 1;
            k.dtype = n % 2 == 0 ? PTST_I8 : PTST_I4;
            k.N = sizes[n / 20][0];
            k.K = sizes[n / 20][1];
            ld = (k.K + PTST__BLOCK - 1) / PTST__BLOCK * PTST__BLOCK;
            for (i = 0; i < k.N * ld; i++) {
                w[i] = i % ld < k.K ? (float)ptst_rng_normal(&r) : 0;
            }
            ptst__from_f32__scalar(blocks, w, k.dtype, k.N * ld);
            ptst__to_f32__scalar(w, blocks, k.dtype, k.N * ld);
            for (i = 0; i < k.K; i++) {
                x[i] = (float)ptst_rng_normal(&r) * (i % 32 == 7 ? 50.0f : 1.0f);
            }
            for (v = 0; v < 3; v++) { /* one thread, two, without whole numbers */
                for (j = 0; j < k.N; j++) {
                    y[v][j] = 0.5f + (float)j;
                }
                kernels_rows(c[v % 2], &k, x, blocks, v < 2, y[v]);
            }
            CHECK(memcmp(y[0], y[1], k.N * sizeof(float)) == 0);
            for (j = 0; j < k.N; j++) {
                double bound, sum = kernels_row_sum(x, w + j * ld, k.K, &bound), off;
                sum = (double)k.beta * (0.5 + (double)j) + (double)k.alpha * sum;
                bound = bound * fabs((double)k.alpha) + fabs(sum) / (1 << 22);
                off = fabs((double)y[0][j] - sum);
                bad += !(off <= bound);
                rounded += off;
                plain += fabs((double)y[2][j] - sum);
            }
            CHECK(bad == 0);
        }
        CHECK(c[0] == NULL || rounded > 4 * plain);
        ptst_close(c[0]);
        ptst_close(c[1]);
    }
}

/* In whole numbers, too, a row does not depend on how many rows there are; with more than whole_rows
   of them none are used; and of a row with a number that is not finite nothing is finite. */
static void matmul_whole_rows(void) {
    enum { N = 43, K = 115, M = PTST__DOTS + 1, LD = 128 };
    static float x[M * K], w[N * LD], y[M * N], plain[M * N], alone[N];
    static char blocks[N * LD * 2];
    ptst_rng r = {23, 0, 0};
    size_t i, m, s, v, finite = 0;
    kernels_case k;
    memset(&k, 0, sizeof k);
    k.N = N;
    k.K = K;
    k.alpha = 1;
    for (i = 0; i < N * LD; i++) {
        w[i] = i % LD < K ? (float)ptst_rng_normal(&r) : 0;
    }
    for (s = 0; kernels_simds[s] != NULL; s++) {
        ptst_ctx *c = kernels_open(kernels_simds[s], 2);
        for (v = 0; v < 2 && c != NULL; v++) {
            k.dtype = v == 0 ? PTST_I8 : PTST_I4;
            ptst__from_f32__scalar(blocks, w, k.dtype, N * LD);
            for (i = 0; i < M * K; i++) {
                x[i] = (float)ptst_rng_normal(&r);
            }
            for (k.M = 1; k.M <= M; k.M++) {
                size_t rows = k.M;
                bool whole = rows <= c->kernels->whole_rows;
                kernels_rows(c, &k, x, blocks, true, y);
                kernels_rows(c, &k, x, blocks, false, plain);
                CHECK((memcmp(y, plain, rows * sizeof alone) != 0) == whole);
                for (m = 0; m < rows && rows < M; m++) {
                    k.M = 1;
                    kernels_rows(c, &k, x + m * K, blocks, whole, alone);
                    CHECK(memcmp(alone, y + m * N, sizeof alone) == 0);
                }
                k.M = rows;
            }
            k.M = 2;
            for (i = 0; i < 2; i++) {
                x[2 * K - 1] = i == 0 ? INFINITY : NAN;
                kernels_rows(c, &k, x, blocks, true, y);
                for (m = 0; m < 2 * N; m++) {
                    finite += (y[m] - y[m] == 0) != (m < N);
                }
            }
        }
        ptst_close(c);
    }
    CHECK(finite == 0);
}

/* The error of a product of normal numbers, against sums in double, is at most twice that of adding
   one product after the other in F32 (root mean square; measured: 0.1 to 0.7 of it, AMX 0.3). */
static void matmul_error(void) {
    enum { M = 48, N = 64, K = 1000 };
    static float A[M * K], B[N * K], y[M * N];
    static double exact[M * N];
    double plain = 0;
    ptst_rng r = {6, 0, 0};
    size_t i, k, s;
    for (i = 0; i < M * K; i++) {
        A[i] = (float)ptst_rng_normal(&r);
    }
    for (i = 0; i < N * K; i++) {
        B[i] = (float)ptst_rng_normal(&r);
    }
    for (i = 0; i < M * N; i++) {
        float sum = 0;
        for (k = 0; k < K; k++) {
            float a = A[i / N * K + k], b = B[i % N * K + k];
            exact[i] += (double)a * (double)b;
            sum += a * b;
        }
        plain += ((double)sum - exact[i]) * ((double)sum - exact[i]);
    }
    for (s = 0; kernels_simds[s] != NULL; s++) {
        ptst_ctx *c = kernels_open(kernels_simds[s], 1);
        double error = 0;
        if (c == NULL) {
            continue;
        }
        ptst__gemm(c, M, N, K, 1, A, K, false, ptst__matrix_f32(B, K, true), 0, y, N);
        for (i = 0; i < M * N; i++) {
            error += ((double)y[i] - exact[i]) * ((double)y[i] - exact[i]);
        }
        CHECK(sqrt(error) <= 2 * sqrt(plain));
        ptst_close(c);
    }
}

/* Nothing to multiply: Y = beta Y, whatever A and B hold (they may be NULL). */
static void matmul_empty(void) {
    int s;
    for (s = 0; kernels_simds[s] != NULL; s++) {
        ptst_ctx *c = kernels_open(kernels_simds[s], 2);
        float y[6] = {1, 2, 3, 4, 5, NAN}, nan[6] = {NAN, NAN, NAN, NAN, NAN, NAN};
        if (c == NULL) {
            continue;
        }
        ptst__gemm(c, 0, 3, 4, 1, NULL, 4, false, ptst__matrix_f32(NULL, 4, true), 0, y, 3);
        ptst__gemm(c, 3, 0, 4, 1, NULL, 4, false, ptst__matrix_f32(NULL, 4, true), 0, y, 0);
        CHECK(y[0] == 1 && y[4] == 5);
        ptst__gemm(c, 2, 2, 0, 1, NULL, 0, false, ptst__matrix_f32(NULL, 0, true), 0.5f, y, 3);
        CHECK(y[0] == 0.5f && y[1] == 1 && y[2] == 3 && y[3] == 2 && y[4] == 2.5f);
        ptst__gemm(c, 2, 3, 2, 0, nan, 2, false, ptst__matrix_f32(nan, 2, true), 0, y, 3);
        CHECK(y[0] == 0 && y[2] == 0 && y[5] == 0);
        ptst_close(c);
    }
}

/* Rows of A and of w that change places have the bits of packed ones. */
static void matmul_swap(void) {
    int s;
    size_t M;
    for (s = 0; kernels_simds[s] != NULL; s++) {
        ptst_ctx *c = kernels_open(kernels_simds[s], 2);
        for (M = PTST__SWAP_LEAST; c != NULL && M <= PTST__SWAP_MOST; M++) {
            const struct ptst__kernels *own = c->kernels;
            struct ptst__kernels plain = *own;
            kernels_case k;
            kernels_data d;
            float *first;
            memset(&k, 0, sizeof k);
            k.M = M;
            k.N = 27 + M % 4;
            k.K = PTST__BLOCK_K + 33;
            k.b_transposed = true;
            k.dtype = PTST_F32;
            k.alpha = -0.5f;
            k.beta = 0.25f;
            kernels_fill(&k, &d, M);
            first = (float *)malloc(d.size * sizeof *first);
            kernels_multiply(c, &k, &d);
            memcpy(first, d.Y, d.size * sizeof *first);
            plain.tile_turned = NULL;
            plain.tile_dots = NULL;
            c->kernels = &plain;
            kernels_multiply(c, &k, &d);
            c->kernels = own;
            CHECK(memcmp(first, d.Y, d.size * sizeof *first) == 0);
            free(first);
            kernels_release(&d);
        }
        ptst_close(c);
    }
}

/* The same bits for 1, 2 and 3 threads, on every path. */
static void matmul_threads(void) {
    static const size_t shapes[][3] = {{130, 70, 1400}, {7, 330, 700}, {1, 900, 333},
                                       {400, 8, 577},   {9, 70, 640},  {200, 2100, 40},
                                       {97, 16, 1400},  {96, 64, 1400}, {41, 150, 1400}};
    int s, threads;
    size_t i, v;
    for (s = 0; kernels_simds[s] != NULL; s++) {
        if (ptst__kernels_choose(kernels_simds[s]) == NULL) {
            continue;
        }
        for (i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
            for (v = 0; v < 20; v += getenv("TEST_QUICK") != NULL ? 7 : 5) {
                kernels_case k;
                kernels_data d;
                float *first = NULL;
                k.M = shapes[i][0];
                k.N = shapes[i][1];
                k.K = shapes[i][2];
                kernels_variant(&k, v);
                kernels_fill(&k, &d, i);
                first = (float *)malloc(d.size * sizeof *first);
                for (threads = 1; threads <= 3; threads++) {
                    ptst_ctx *c = test_open(threads, kernels_simds[s]);
                    kernels_multiply(c, &k, &d);
                    if (threads == 1) {
                        memcpy(first, d.Y, d.size * sizeof *first);
                    }
                    CHECK(memcmp(first, d.Y, d.size * sizeof *first) == 0);
                    ptst_close(c);
                }
                free(first);
                kernels_release(&d);
            }
        }
    }
}

/* Right, and the same bits on one thread and on two. */
static void kernels_same(ptst_ctx *one, ptst_ctx *two, const kernels_case *k, uint64_t seed) {
    kernels_data d;
    float *first;
    CHECK(kernels_check(two, k, seed));
    kernels_fill(k, &d, seed);
    first = (float *)malloc(d.size * sizeof *first);
    kernels_multiply(one, k, &d);
    memcpy(first, d.Y, d.size * sizeof *first);
    kernels_multiply(two, k, &d);
    CHECK(memcmp(first, d.Y, d.size * sizeof *first) == 0);
    free(first);
    kernels_release(&d);
}

/* What is known of a product in parts of a case when its first block is cut. */
static ptst__product kernels_first_block(const kernels_case *k) {
    ptst__product p;
    memset(&p, 0, sizeof p);
    p.mc = k->M;
    p.N = k->N;
    p.kc = ptst__ceil_div(k->K, ptst__ceil_div(k->K, PTST__PARTS_K));
    p.B.dtype = k->dtype;
    p.B.transposed = k->b_transposed;
    p.precision = PTST__PRECISION;
    return p;
}

/* Products in parts of each kind of sharing. */
static void matmul_parts(void) {
    static const struct {
        size_t M, N, K;
        int keep;
    } shapes[] = {{250, 70, 1600, PTST__KEEP_A},
                  {330, 40, 760, PTST__KEEP_B},
                  {300, 330, 760, PTST__KEEP_NONE},   /* rows in blocks that can be kept */
                  {300, 1030, 760, PTST__KEEP_NONE}}; /* or shared */
    static const size_t variants[] = {0, 9, 14};
    ptst_ctx *one = kernels_open("amx", 1), *two = kernels_open("amx", 2);
    size_t i, v;
    for (i = 0; i < sizeof shapes / sizeof *shapes && one != NULL && two != NULL; i++) {
        for (v = 0; v < 3; v += getenv("TEST_QUICK") != NULL ? 3 : 1) {
            kernels_case k;
            ptst__product p;
            k.M = shapes[i].M;
            k.N = shapes[i].N;
            k.K = shapes[i].K;
            kernels_variant(&k, variants[v]);
            p = kernels_first_block(&k);
            CHECK(ptst__parts_keep(&p) == shapes[i].keep || k.dtype != PTST_F32);
            kernels_same(one, two, &k, i);
        }
    }
    ptst_close(one);
    ptst_close(two);
}

/* Few rows in parts: each number of strips of A, strips of B that are not full, several tasks, blocks
   of K and types. */
static void matmul_few_parts(void) {
    static const size_t rows[] = {9, 16, 32, 33, 48, 63, PTST__PARTS_FEW};
    static const size_t shapes[][2] = {{33, 64}, {50, 96}, {64, 768}, {70, 1600}, {850, 64}};
    ptst_ctx *one = kernels_open("amx", 1), *two = kernels_open("amx", 2);
    size_t i, m, v, few = 0;
    for (i = 0; i < sizeof shapes / sizeof *shapes && one != NULL && two != NULL; i++) {
        for (m = 0; m < sizeof rows / sizeof *rows; m += getenv("TEST_QUICK") != NULL ? 3 : 1) {
            for (v = i % 2; v < 20; v++) {
                kernels_case k;
                ptst__product p;
                k.M = rows[m];
                k.N = shapes[i][0];
                k.K = shapes[i][1];
                kernels_variant(&k, v);
                k.b_transposed = true;
                p = kernels_first_block(&k);
                few += ptst__parts_few(&p);
                kernels_same(one, two, &k, i);
            }
        }
    }
    CHECK(one == NULL || two == NULL || few > 0);
    ptst_close(one);
    ptst_close(two);
}

/* A row of a product with few rows does not depend on how many rows there are (decoding several
   prompts at once gives what each gives alone). */
static void matmul_few_rows_alone(void) {
    static const ptst_dtype dtypes[] = {PTST_F32, PTST_F16, PTST_BF16, PTST_I8, PTST_I4};
    int s;
    size_t M, m, v;
    for (s = 0; kernels_simds[s] != NULL; s++) {
        ptst_ctx *c = kernels_open(kernels_simds[s], 2);
        kernels_case k;
        kernels_data d;
        float y[50];
        if (c == NULL) {
            continue;
        }
        for (v = 0; v < 5; v++) {
            memset(&k, 0, sizeof k);
            k.M = PTST__DOTS;
            k.N = 50;
            k.K = 203;
            k.b_transposed = true;
            k.dtype = dtypes[v];
            k.alpha = 1;
            kernels_fill(&k, &d, 5);
            for (M = 1; M <= PTST__DOTS; M++) {
                k.M = M;
                kernels_multiply(c, &k, &d);
                for (m = 0; m < M; m++) {
                    ptst__matrix B;
                    B.data = d.B;
                    B.ld = d.ldb;
                    B.dtype = k.dtype;
                    B.transposed = true;
                    ptst__gemm(c, 1, k.N, k.K, 1, d.A + m * d.lda, d.lda, false, B, 0, y, 50);
                    CHECK(memcmp(y, d.Y + m * d.ldy, sizeof y) == 0);
                }
            }
            kernels_release(&d);
        }
        ptst_close(c);
    }
}

/* loss = sum_i u[i] y[i]; central differences of the scalar reference against the gradients.
   y is linear in each operand, so the difference has no error but rounding: of values around 3,
   over 2 h = 1/8, that is about 3 * 2^-24 * 8 < 1e-5 times a few. */
static void matmul_gradients(void) {
    enum { M = 3, N = 5, K = 7 };
    ptst_ctx *c = test_open(1, "scalar");
    float x[M * K], w[N * K], u[M * N], y[M * N], dx[M * K], dw[N * K];
    ptst_rng r = {3, 0, 0};
    size_t i, j;
    for (i = 0; i < M * K; i++) {
        x[i] = ptst_rng_normal(&r);
        dx[i] = 1; /* gradients are added to what is there */
    }
    for (i = 0; i < N * K; i++) {
        w[i] = ptst_rng_normal(&r);
        dw[i] = 2;
    }
    for (i = 0; i < M * N; i++) {
        u[i] = ptst_rng_uniform(&r) - 0.5f;
    }
    ptst_matmul_backward(c, M, N, K, x, w, u, dx, dw);
    ptst_matmul_backward(c, M, N, K, x, w, u, NULL, NULL);
    for (i = 0; i < M * K + N * K; i++) {
        float *value = i < M * K ? &x[i] : &w[i - M * K], old = *value;
        double got = i < M * K ? (double)dx[i] - 1 : (double)dw[i - M * K] - 2, loss[2] = {0, 0};
        int side;
        for (side = 0; side < 2; side++) {
            *value = old + (side ? 0.0625f : -0.0625f);
            ptst_matmul_forward(c, M, N, K, x, w, y);
            for (j = 0; j < M * N; j++) {
                loss[side] += (double)u[j] * (double)y[j];
            }
        }
        *value = old;
        CHECK_NEAR(got, (loss[1] - loss[0]) / 0.125, 5e-5);
    }
    ptst_close(c);
}

static void peak_is_positive(void) {
    int s;
    for (s = 0; kernels_simds[s] != NULL; s++) {
        ptst_ctx *c = kernels_open(kernels_simds[s], 2);
        if (c != NULL) {
            double peak = ptst__peak_gflops(c, 0.001);
            CHECK(peak > 1e-3 && peak < 1e6);
            ptst_close(c);
        }
    }
}

static void suite_kernels(void) {
    RUN(convert_all_values);
    RUN(convert_rounding);
    RUN(convert_lengths);
    RUN(convert_blocks);
    RUN(matmul_sizes);
    RUN(matmul_blocks);
    RUN(matmul_pack_blocks);
    RUN(matmul_bits);
    RUN(matmul_single);
    RUN(matmul_error);
    RUN(matmul_empty);
    RUN(matmul_swap);
    RUN(matmul_threads);
    RUN(matmul_parts);
    RUN(matmul_few_parts);
    RUN(matmul_types_exact);
    RUN(matmul_precision);
    RUN(whole_numbers);
    RUN(matmul_whole);
    RUN(matmul_whole_rows);
    RUN(matmul_precision_words);
    RUN(matmul_few_rows_alone);
    RUN(matmul_gradients);
    RUN(peak_is_positive);
}

MAIN(kernels)
