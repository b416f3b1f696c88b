/* Tests of >>kernels: the operations besides matrix products. Finite differences prove the scalar
   reference, the scalar reference proves the SIMD versions. */
#include "test.h"

/* The instruction sets of this machine; NULL ends the list. */
static const char *const ops_simds[] = {"scalar", "avx2", "avx512", "amx", "neon", NULL};

/* A context, or NULL if this machine cannot run simd. */
static ptst_ctx *ops_open(const char *simd, int threads) {
    return ptst__kernels_choose(simd) == NULL ? NULL : test_open(threads, simd);
}

/* n random floats, mean 0, standard deviation `size`; 4 bytes off any alignment of 8 or more. */
static float *ops_random(size_t n, float size, uint64_t stream) {
    ptst_rng r = {11, 0, 0};
    float *x = (float *)malloc((n + 17) * sizeof *x) + 1;
    size_t i;
    r.stream = stream;
    for (i = 0; i < n + 16; i++) { /* 16 more: to see whether something writes beyond the end */
        x[i] = size * ptst_rng_normal(&r);
    }
    return x;
}

static void ops_free(float *x) {
    if (x != NULL) {
        free(x - 1);
    }
}

static double ops_project(size_t n, const float *w, const float *y) {
    double sum = 0;
    size_t i;
    for (i = 0; i < n; i++) {
        sum += (double)w[i] * (double)y[i];
    }
    return sum;
}

/* |a - b| / |b| in the 2-norm; a vector of zeros must be met exactly. */
static double ops_distance(size_t n, const float *a, const float *b) {
    double above = 0, below = 0;
    size_t i;
    for (i = 0; i < n; i++) {
        double d = (double)a[i] - (double)b[i];
        if (a[i] != b[i] && !(a[i] != a[i] && b[i] != b[i])) {
            above += d * d;
        }
        below += (double)b[i] * (double)b[i];
    }
    return above == 0 ? 0 : sqrt(above / below);
}

static bool ops_same(size_t n, const float *a, const float *b) {
    return memcmp(a, b, n * sizeof *a) == 0;
}

/* Central differences of loss(arg) for each of the n elements of x against gradient. With a step
   of 1/128 the truncation error is about step^2 / 6 = 1e-5 of the third derivative and float32
   rounding of the outputs contributes about 6e-8 / step = 1e-5: 1e-3 of the norm is far above
   both and far below any wrong formula. */
static void ops_check_gradient(const char *what, double (*loss)(void *arg), void *arg, float *x,
                               size_t n, const float *gradient) {
    const float step = 1.0f / 128;
    double above = 0, below = 0;
    size_t i;
    for (i = 0; i < n; i++) {
        float old = x[i], high = old + step, low = old - step;
        double up, down, slope;
        x[i] = high;
        up = loss(arg);
        x[i] = low;
        down = loss(arg);
        x[i] = old;
        slope = (up - down) / ((double)high - (double)low);
        above += (slope - (double)gradient[i]) * (slope - (double)gradient[i]);
        below += slope * slope;
    }
    if (!(below > 0 && sqrt(above / below) <= 1e-3)) {
        fprintf(stderr, "gradient of %s: relative error %g, norm %g\n", what, sqrt(above / below),
                sqrt(below));
        CHECK(!"gradient");
    }
}

/* ---- exp ---- */

/* exp of some hundred thousand floats over the whole range: within 1 ulp of the true value down to
   -86.9, 0 below, infinity where float32 ends; the scalar version is rounded from double. */
static void exp_accuracy(void) {
    enum { N = 1000 };
    int k;
    for (k = 0; ops_simds[k] != NULL; k++) {
        ptst_ctx *c = ops_open(ops_simds[k], 1);
        float x[N], y[N];
        double worst = 0, sum, total;
        uint32_t bits, i, sign;
        for (sign = 0; sign < 2 && c != NULL; sign++) {
            for (bits = 0; bits < 0x42C00000u; bits += N * 3001u) { /* up to 96 */
                for (i = 0; i < N; i++) {
                    x[i] = ptst__float_of((bits + i * 3001u) | sign << 31);
                }
                sum = c->kernels->row_exp(N, x, 0, y);
                for (i = 0, total = 0; i < N; i++) {
                    double e = exp((double)x[i]);
                    total += (double)y[i];
                    if (x[i] > 88.722f) {
                        CHECK(e < 3.402e38 || y[i] > 3e38f);
                    } else if (x[i] >= -86.9f) {
                        worst = fmax(worst, fabs((double)y[i] - e) / ldexp(1, ilogb(e) - 23));
                    } else {
                        CHECK((double)y[i] <= e * 1.0001 + 1e-45);
                    }
                }
                /* 1000 roundings at most, each of 6e-8 of the sum so far */
                CHECK(!(sum < 1e38) || fabs(sum - total) <= 1e-5 * total);
            }
        }
        CHECK(worst <= 1.0);
        if (c != NULL) {
            float special[5] = {NAN, INFINITY, -INFINITY, 1e30f, -1e30f};
            c->kernels->row_exp(5, special, 0, y);
            CHECK(y[0] != y[0] && y[1] == INFINITY && y[2] == 0 && y[3] == INFINITY && y[4] == 0);
            ptst_close(c);
        }
    }
}

/* ---- rmsnorm ---- */

enum { NORM_T = 5, NORM_C = 7 };

typedef struct ops_norm {
    ptst_ctx *c;
    size_t T, C;
    float *x, *w, *y, *dy, *rstd, *dx, *dw;
} ops_norm;

static ops_norm ops_norm_new(ptst_ctx *c, size_t T, size_t C) {
    ops_norm n;
    n.c = c;
    n.T = T;
    n.C = C;
    n.x = ops_random(T * C, 1, 1);
    n.w = ops_random(C, 1, 2);
    n.y = ops_random(T * C, 1, 3);
    n.dy = ops_random(T * C, 1, 4);
    n.rstd = ops_random(T, 1, 5);
    n.dx = ops_random(T * C, 1, 6);
    n.dw = ops_random(C, 1, 7);
    return n;
}

static void ops_norm_free(ops_norm *n) {
    float *all[7];
    int i;
    all[0] = n->x, all[1] = n->w, all[2] = n->y, all[3] = n->dy;
    all[4] = n->rstd, all[5] = n->dx, all[6] = n->dw;
    for (i = 0; i < 7; i++) {
        ops_free(all[i]);
    }
}

static double ops_norm_loss(void *arg) {
    ops_norm *n = (ops_norm *)arg;
    ptst_rmsnorm_forward(n->c, n->T, n->C, 1e-5f, n->x, n->w, n->y, n->rstd);
    return ops_project(n->T * n->C, n->dy, n->y);
}

static void rmsnorm_gradient(void) {
    ptst_ctx *c = test_open(1, "scalar");
    ops_norm n = ops_norm_new(c, NORM_T, NORM_C);
    (void)ops_norm_loss(&n);
    memset(n.dx, 0, NORM_T * NORM_C * sizeof(float));
    memset(n.dw, 0, NORM_C * sizeof(float));
    ptst_rmsnorm_backward(c, NORM_T, NORM_C, n.x, n.w, n.rstd, n.dy, n.dx, n.dw);
    ops_check_gradient("rmsnorm x", ops_norm_loss, &n, n.x, NORM_T * NORM_C, n.dx);
    ops_check_gradient("rmsnorm w", ops_norm_loss, &n, n.w, NORM_C, n.dw);
    /* by hand: mean(x^2) = 12.5, y = x / sqrt(12.5) */
    n.x[0] = 3, n.x[1] = 4, n.w[0] = 1, n.w[1] = 2;
    ptst_rmsnorm_forward(c, 1, 2, 0, n.x, n.w, n.y, NULL);
    CHECK_NEAR((double)n.y[0], 3 / sqrt(12.5), 1e-6);
    CHECK_NEAR((double)n.y[1], 8 / sqrt(12.5), 1e-6);
    ops_norm_free(&n);
    ptst_close(c);
}

/* Every version with 1, 2 and 3 threads against the scalar one. The bound: sums of up to 300
   terms in float32 in another order, each rounding 6e-8. */
static void rmsnorm_parity(void) {
    static const size_t sizes[] = {1, 2, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100, 300};
    size_t s;
    int i, threads;
    for (s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        size_t T = 1 + s * 3, C = sizes[s];
        ptst_ctx *r = test_open(1, "scalar");
        ops_norm e = ops_norm_new(r, T, C);
        (void)ops_norm_loss(&e);
        ptst_rmsnorm_backward(r, T, C, e.x, e.w, e.rstd, e.dy, e.dx, e.dw);
        for (i = 0; ops_simds[i] != NULL; i++) {
            ops_norm first = ops_norm_new(NULL, T, C);
            for (threads = 1; threads <= 3; threads++) {
                ptst_ctx *c = ops_open(ops_simds[i], threads);
                ops_norm n = ops_norm_new(c, T, C);
                if (c != NULL) {
                    (void)ops_norm_loss(&n);
                    ptst_rmsnorm_backward(c, T, C, n.x, n.w, n.rstd, n.dy, n.dx, n.dw);
                    CHECK(ops_distance(T * C + 16, n.y, e.y) <= 2e-6);
                    CHECK(ops_distance(T + 16, n.rstd, e.rstd) <= 2e-6);
                    CHECK(ops_distance(T * C + 16, n.dx, e.dx) <= 2e-6);
                    CHECK(ops_distance(C + 16, n.dw, e.dw) <= 2e-6);
                    if (threads == 1) {
                        memcpy(first.dx, n.dx, T * C * sizeof(float));
                        memcpy(first.dw, n.dw, C * sizeof(float));
                    }
                    CHECK(ops_same(T * C, n.dx, first.dx) && ops_same(C, n.dw, first.dw));
                    ptst_close(c);
                }
                ops_norm_free(&n);
            }
            ops_norm_free(&first);
        }
        ops_norm_free(&e);
        ptst_close(r);
    }
}

/* ---- rope ---- */

/* Turning back gives the old x; the pair (i, i + R/2) turns by the angle of its position; what
   lies beyond R or between rows is left alone; all versions agree to a rounding of each product. */
static void rope_gradient(void) {
    enum { T = 11, H = 3, LD = 40 };
    static const size_t Ds[] = {2, 6, 8, 12}, Rs[] = {2, 4, 8, 12};
    int32_t positions[T];
    size_t t, h, i, s;
    int k, threads;
    for (t = 0; t < T; t++) {
        positions[t] = (int32_t)(t * 5 % 7);
    }
    for (s = 0; s < 4; s++) {
        size_t D = Ds[s], R = Rs[s], half = R / 2;
        float *x = ops_random(T * LD, 1, 1), *angles = ops_random(T * half, 1, 2);
        float *cosines = ops_random(T * half, 1, 3), *sines = ops_random(T * half, 1, 4);
        for (i = 0; i < T * half; i++) {
            cosines[i] = (float)cos((double)angles[i]);
            sines[i] = (float)sin((double)angles[i]);
        }
        for (k = 0; ops_simds[k] != NULL; k++) {
            for (threads = 1; threads <= 3; threads++) {
                ptst_ctx *c = ops_open(ops_simds[k], threads);
                float *y = ops_random(T * LD, 1, 1);
                if (c != NULL) {
                    bool use = threads != 2; /* NULL: row t stands at position t */
                    ptst_rope(c, T, H, D, R, y, LD, cosines, sines, use ? positions : NULL, false);
                    for (t = 0; t < T; t++) {
                        for (h = 0; h < LD; h++) {
                            size_t head = h / D, e = h % D, low = e < half ? e : e - half;
                            const float *p = x + t * LD + head * D;
                            double a = angles[(use ? (size_t)positions[t] : t) * half + low];
                            double z = e < half ? p[low] * cos(a) - p[low + half] * sin(a)
                                                : p[low + half] * cos(a) + p[low] * sin(a);
                            z = head < H && e < R ? z : (double)x[t * LD + h];
                            CHECK_NEAR((double)y[t * LD + h], z, 1e-6);
                        }
                    }
                    ptst_rope(c, T, H, D, R, y, LD, cosines, sines, use ? positions : NULL, true);
                    CHECK(ops_distance(T * LD + 16, y, x) <= 1e-6);
                    ptst_close(c);
                }
                ops_free(y);
            }
        }
        ops_free(x), ops_free(angles), ops_free(cosines), ops_free(sines);
    }
}

/* ---- swiglu ---- */

typedef struct ops_swiglu {
    ptst_ctx *c;
    bool geglu; /* the other gate */
    size_t n;
    float *gate, *up, *dy, *y, *dgate, *dup;
} ops_swiglu;

static ops_swiglu ops_swiglu_new(ptst_ctx *c, size_t n, float size) {
    ops_swiglu s;
    s.c = c;
    s.geglu = false;
    s.n = n;
    s.gate = ops_random(n, size, 1);
    s.up = ops_random(n, 1, 2);
    s.dy = ops_random(n, 1, 3);
    s.y = ops_random(n, 1, 4);
    s.dgate = ops_random(n, 1, 5);
    s.dup = ops_random(n, 1, 6);
    return s;
}

static void ops_swiglu_free(ops_swiglu *s) {
    ops_free(s->gate), ops_free(s->up), ops_free(s->dy);
    ops_free(s->y), ops_free(s->dgate), ops_free(s->dup);
}

static double ops_swiglu_loss(void *arg) {
    ops_swiglu *s = (ops_swiglu *)arg;
    if (s->geglu) {
        ptst_geglu_forward(s->c, s->n, s->gate, s->up, s->y);
    } else {
        ptst_swiglu_forward(s->c, s->n, s->gate, s->up, s->y);
    }
    return ops_project(s->n, s->dy, s->y);
}

static void ops_swiglu_backward(const ops_swiglu *s, float *dgate, float *dup) {
    if (s->geglu) {
        ptst_geglu_backward(s->c, s->n, s->gate, s->up, s->dy, dgate, dup);
    } else {
        ptst_swiglu_backward(s->c, s->n, s->gate, s->up, s->dy, dgate, dup);
    }
}

/* 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) in double. */
static void geglu_values(void) {
    ptst_ctx *c = test_open(1, "scalar");
    ops_swiglu s = ops_swiglu_new(c, 200, 6);
    size_t i;
    s.geglu = true;
    (void)ops_swiglu_loss(&s);
    for (i = 0; i < s.n; i++) {
        double x = (double)s.gate[i];
        double y = 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
        CHECK_NEAR((double)s.y[i], y * (double)s.up[i], 1e-6 * (fabs(y * (double)s.up[i]) + 1e-3));
    }
    ops_swiglu_free(&s);
    ptst_close(c);
}

static void geglu_gradient(void) {
    ptst_ctx *c = test_open(1, "scalar");
    ops_swiglu s = ops_swiglu_new(c, 33, 2);
    s.geglu = true;
    ops_swiglu_backward(&s, s.dgate, s.dup);
    ops_check_gradient("geglu gate", ops_swiglu_loss, &s, s.gate, s.n, s.dgate);
    ops_check_gradient("geglu up", ops_swiglu_loss, &s, s.up, s.n, s.dup);
    ops_swiglu_free(&s);
    ptst_close(c);
}

static void swiglu_gradient(void) {
    ptst_ctx *c = test_open(1, "scalar");
    ops_swiglu s = ops_swiglu_new(c, 33, 2);
    ptst_swiglu_backward(c, s.n, s.gate, s.up, s.dy, s.dgate, s.dup);
    ops_check_gradient("swiglu gate", ops_swiglu_loss, &s, s.gate, s.n, s.dgate);
    ops_check_gradient("swiglu up", ops_swiglu_loss, &s, s.up, s.n, s.dup);
    ops_swiglu_free(&s);
    ptst_close(c);
}

/* Element by element: exp within 2 ulp, some roundings more; 1e-6 relative covers them. */
static void ops_glu_parity(bool geglu) {
    double bound = geglu ? 4e-5 : 1e-6; /* exp(t) with t to 80, a few roundings of which count */
    static const size_t sizes[] = {1, 5, 8, 16, 17, 40, 4095, 4096, 9001};
    size_t z, i;
    int k, threads;
    for (z = 0; z < sizeof sizes / sizeof *sizes; z++) {
        ptst_ctx *r = test_open(1, "scalar");
        ops_swiglu e = ops_swiglu_new(r, sizes[z], 8);
        float *dy = ops_random(sizes[z], 1, 3);
        e.geglu = geglu;
        (void)ops_swiglu_loss(&e);
        ops_swiglu_backward(&e, e.dgate, e.dup);
        for (k = 0; ops_simds[k] != NULL; k++) {
            for (threads = 1; threads <= 3; threads++) {
                ptst_ctx *c = ops_open(ops_simds[k], threads);
                ops_swiglu s = ops_swiglu_new(c, sizes[z], 8);
                if (c != NULL) {
                    s.geglu = geglu;
                    (void)ops_swiglu_loss(&s); /* the second call works in place */
                    ops_swiglu_backward(&s, s.dgate, s.dup);
                    ops_swiglu_backward(&s, s.gate, s.dy);
                    CHECK(ops_same(s.n, s.dgate, s.gate) && ops_same(s.n, s.dup, s.dy));
                    CHECK(ops_distance(s.n + 16, s.y, e.y) <= 1e-6);
                    CHECK(ops_distance(s.n + 16, s.dgate, e.dgate) <= 1e-6);
                    CHECK(ops_distance(s.n + 16, s.dup, e.dup) <= 1e-6);
                    for (i = 0; i < s.n; i++) {
                        CHECK_NEAR((double)s.y[i], (double)e.y[i], bound * fabs((double)e.y[i]));
                    }
                    ptst_close(c);
                }
                ops_swiglu_free(&s);
            }
        }
        ops_free(dy);
        ops_swiglu_free(&e);
        ptst_close(r);
    }
}

static void swiglu_parity(void) { ops_glu_parity(false); }

static void geglu_parity(void) { ops_glu_parity(true); }

/* Far out: silu(-1000) = -0, silu(1000) = 1000, no overflow; NaN and infinity come through. */
static void swiglu_extremes(void) {
    static const float gate[] = {-1000, 1000, -88, 88, 0, -3.4e38f, 3.4e38f, -104, -87.5f};
    float up[9], y[9], dgate[9], dup[9], one[9];
    size_t i;
    int k;
    for (k = 0; ops_simds[k] != NULL; k++) {
        ptst_ctx *c = ops_open(ops_simds[k], 1);
        if (c == NULL) {
            continue;
        }
        for (i = 0; i < 9; i++) {
            up[i] = one[i] = 1;
        }
        ptst_swiglu_forward(c, 9, gate, up, y);
        ptst_swiglu_backward(c, 9, gate, up, one, dgate, dup);
        for (i = 0; i < 9; i++) {
            double g = gate[i], s = 1 / (1 + exp(-g)), z = g * s;
            /* below -87.3 exp(-gate) may overflow to infinity, which gives the right 0 */
            CHECK_NEAR((double)y[i], z, 1e-6 * fabs(z) + 1e-36);
            CHECK_NEAR((double)dup[i], z, 1e-6 * fabs(z) + 1e-36);
            CHECK_NEAR((double)dgate[i], s * (1 + g * (1 - s)), 2e-6 + 1e-36);
        }
        for (i = 0; i < 9; i++) {
            up[i] = NAN;
        }
        ptst_swiglu_forward(c, 9, up, one, y);
        for (i = 0; i < 9; i++) {
            CHECK(y[i] != y[i]);
        }
        ptst_close(c);
    }
}

/* ---- attention ---- */

enum { SPANS = 60 };

/* A batch of spans that share a prefix (whose own span may be the first one), with buffers of
   everything. */
typedef struct ops_attention {
    ptst_ctx *c;
    ptst_attention a;
    ptst_span spans[SPANS];
    size_t rows, keys, q_size, out_size, kv_size, lse_size;
    float *q, *k, *v, *out, *lse, *dout, *dq, *dk, *dv;
    void *scratch;
} ops_attention;

typedef struct ops_shape {
    size_t H, K, D, window, prefix, spans;
    size_t count[SPANS], keys[SPANS]; /* queries and own keys of each span */
    bool first_is_prefix;             /* span 0 makes the prefix; the others share its keys */
    float softcap;
} ops_shape;

static ops_attention ops_attention_new(ptst_ctx *c, const ops_shape *s) {
    ops_attention t;
    size_t n, key = s->first_is_prefix ? 0 : s->prefix;
    memset(&t, 0, sizeof t);
    t.c = c;
    t.a.H = s->H;
    t.a.K = s->K;
    t.a.D = s->D;
    t.a.scale = 1 / sqrtf((float)s->D);
    t.a.softcap = s->softcap;
    t.a.window = s->window;
    t.a.q_ld = s->H * s->D + 3;
    t.a.kv_ld = s->K * s->D + 1;
    t.a.spans_count = s->spans;
    t.keys = key;
    for (n = 0; n < s->spans; n++) {
        t.rows += s->count[n];
        t.keys += s->keys[n];
    }
    t.q_size = t.rows * t.a.q_ld;
    t.kv_size = t.keys * t.a.kv_ld;
    t.out_size = t.rows * s->H * s->D;
    t.lse_size = t.rows * s->H;
    t.q = ops_random(t.q_size, 1, 1);
    t.k = ops_random(t.kv_size, 1, 2);
    t.v = ops_random(t.kv_size, 1, 3);
    t.out = ops_random(t.out_size, 1, 4);
    t.lse = ops_random(t.lse_size, 1, 5);
    t.dout = ops_random(t.out_size, 1, 6);
    t.dq = ops_random(t.q_size, 1, 7);
    t.dk = ops_random(t.kv_size, 1, 8);
    t.dv = ops_random(t.kv_size, 1, 9);
    t.rows = 0;
    for (n = 0; n < s->spans; n++) {
        ptst_span *p = &t.spans[n];
        p->query = t.rows;
        p->count = s->count[n];
        p->keys[0] = s->first_is_prefix && n == 0 ? 0 : s->prefix;
        p->keys[1] = s->keys[n];
        p->k[0] = t.k, p->v[0] = t.v, p->dk[0] = t.dk, p->dv[0] = t.dv;
        p->k[1] = t.k + key * t.a.kv_ld, p->v[1] = t.v + key * t.a.kv_ld;
        p->dk[1] = t.dk + key * t.a.kv_ld, p->dv[1] = t.dv + key * t.a.kv_ld;
        if (p->keys[0] == 0) {
            p->k[0] = p->v[0] = NULL;
            p->dk[0] = p->dv[0] = NULL;
        }
        t.rows += s->count[n];
        key += s->keys[n];
    }
    return t;
}

static void ops_attention_free(ops_attention *t) {
    ops_free(t->q), ops_free(t->k), ops_free(t->v), ops_free(t->out), ops_free(t->lse);
    ops_free(t->dout), ops_free(t->dq), ops_free(t->dk), ops_free(t->dv);
    free(t->scratch);
}

static void ops_attention_forward(ops_attention *t) {
    t->a.spans = t->spans;
    ptst_attention_forward(t->c, &t->a, t->q, t->out, t->lse);
}

static void ops_attention_backward(ops_attention *t) {
    size_t size;
    t->a.spans = t->spans;
    size = ptst_attention_backward_scratch(&t->a);
    CHECK(size <= ptst__attention_scratch(t->a.H, t->a.D, t->rows, t->keys, t->a.spans_count));
    free(t->scratch);
    t->scratch = malloc(size + 8);
    memset(t->scratch, 0x7F, size + 8); /* what lies there must not matter, nor the end be passed */
    ptst_attention_backward(t->c, &t->a, t->q, t->out, t->lse, t->dout, t->dq, t->scratch);
    CHECK(((unsigned char *)t->scratch)[size] == 0x7F);
}

static double ops_attention_loss(void *arg) {
    ops_attention *t = (ops_attention *)arg;
    ops_attention_forward(t);
    return ops_project(t->out_size, t->dout, t->out);
}

static void attention_gradient(void) {
    static const ops_shape shapes[] = {
        {2, 2, 3, 0, 0, 1, {5, 0, 0, 0}, {5, 0, 0, 0}, false, 0},
        {4, 2, 5, 0, 3, 3, {3, 4, 2, 0}, {3, 4, 6, 0}, false, 0}, /* 2 new queries on 6 keys */
        {3, 1, 4, 3, 4, 3, {4, 3, 5, 0}, {4, 3, 5, 0}, true, 0},  /* window over the seam */
        {4, 2, 5, 0, 3, 3, {3, 4, 2, 0}, {3, 4, 6, 0}, false, 0.8f},
    };
    ptst_ctx *c = test_open(1, "scalar");
    size_t i, j;
    for (i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        ops_attention t = ops_attention_new(c, &shapes[i]);
        float *dq = ops_random(t.q_size, 0, 1), *old = ops_random(t.q_size, 1, 7);
        for (j = 0; j < t.kv_size; j++) {
            t.dk[j] = t.dv[j] = 0;
        }
        ops_attention_forward(&t);
        ops_attention_backward(&t);
        for (j = 0; j < t.q_size; j++) { /* between rows nothing is written */
            bool gap = j % t.a.q_ld >= t.a.H * t.a.D;
            CHECK(!gap || t.dq[j] == old[j]);
            dq[j] = gap ? 0 : t.dq[j];
        }
        ops_check_gradient("attention q", ops_attention_loss, &t, t.q, t.q_size, dq);
        ops_check_gradient("attention k", ops_attention_loss, &t, t.k, t.kv_size, t.dk);
        ops_check_gradient("attention v", ops_attention_loss, &t, t.v, t.kv_size, t.dv);
        ops_free(dq);
        ops_free(old);
        ops_attention_free(&t);
    }
    ptst_close(c);
}

/* Shapes around the tile sizes, odd head sizes, windows, empty spans, decoding. */
static const ops_shape ops_shapes[] = {
    {1, 1, 1, 0, 0, 1, {1, 0, 0, 0}, {1, 0, 0, 0}, false, 0},
    {2, 1, 7, 0, 0, 1, {50, 0, 0, 0}, {50, 0, 0, 0}, false, 0},
    {3, 3, 8, 0, 1, 2, {47, 49, 0, 0}, {47, 49, 0, 0}, false, 0},
    {3, 1, 64, 0, 0, 2, {97, 40, 0, 0}, {97, 40, 0, 0}, false, 0},
    {4, 2, 64, 0, 70, 4, {70, 33, 1, 20}, {70, 33, 1, 20}, true, 0},
    {4, 2, 33, 0, 96, 3, {20, 96, 3, 0}, {20, 96, 99, 0}, false, 0},
    {4, 4, 16, 10, 20, 3, {64, 100, 7, 0}, {64, 100, 30, 0}, false, 0},
    {2, 1, 12, 1, 5, 2, {60, 10, 0, 0}, {60, 10, 0, 0}, false, 0},
    {1, 1, 24, 100, 0, 2, {300, 230, 0, 0}, {300, 230, 0, 0}, false, 0},
    {2, 1, 6, 0, 0, 1, {1070, 0, 0, 0}, {1070, 0, 0, 0}, false, 0}, /* two key ranges, groups */
    {1, 1, 5, 0, 0, 2, {250, 0, 0, 0}, {1100, 0, 0, 0}, false, 0},
    {2, 1, 4, 300, 1030, 2, {1030, 250, 0, 0}, {1030, 250, 0, 0}, true, 0},
    {9, 3, 64, 0, 0, 1, {256, 0, 0, 0}, {256, 0, 0, 0}, false, 0}, /* few heads: two key ranges */
    {3, 1, 8, 0, 200, 2, {210, 30, 0, 0}, {210, 30, 0, 0}, true, 0},
    {1, 1, 150, 0, 40, 2, {100, 160, 0, 0}, {110, 160, 0, 0}, false, 0},
    {2, 2, 128, 0, 10, 2, {65, 2, 0, 0}, {65, 2, 0, 0}, true, 0},
    {2, 1, 130, 0, 10, 2, {50, 6, 0, 0}, {50, 6, 0, 0}, true, 0},
    {3, 1, 256, 0, 0, 1, {55, 0, 0, 0}, {55, 0, 0, 0}, false, 0},
    {2, 1, 300, 0, 17, 2, {33, 9, 0, 0}, {33, 9, 0, 0}, true, 0},
    {6, 2, 64, 0, 37, 4, {1, 1, 0, 1}, {1, 600, 3, 33}, false, 0}, /* decoding; a span of no query */
    {4, 1, 80, 64, 37, 3, {1, 1, 2, 0}, {100, 20, 40, 0}, false, 0},
    {14, 2, 9, 300, 40, 3, {1, 2, 4, 0}, {700, 20, 4, 0}, false, 0},
    {2, 2, 16, 0, 0, 2, {9, 3, 0, 0}, {6, 0, 0, 0}, false, 0}, /* queries that see no key */
    {2, 2, 16, 0, 0, 0, {0, 0, 0, 0}, {0, 0, 0, 0}, false, 0},
    {4, 2, 33, 0, 96, 3, {20, 96, 3, 0}, {20, 96, 99, 0}, false, 0.5f},
    {2, 1, 6, 0, 0, 1, {1070, 0, 0, 0}, {1070, 0, 0, 0}, false, 3},
    {6, 2, 64, 20, 37, 4, {1, 1, 0, 1}, {1, 600, 3, 33}, false, 0.7f},
    {2, 1, 300, 0, 17, 2, {33, 9, 0, 0}, {33, 9, 0, 0}, true, 50},
};

/* Every version with 1, 2 and 3 threads against the scalar one, forward and backward; equal bits
   for any number of threads. The bound: sums of up to 1000 terms of float32 in another order and
   exp within 2 ulp, about 1e-6; gradients multiply errors of p and dp, twice that. */
static void ops_attention_parity(const ops_shape *shape) {
    ptst_ctx *r = test_open(1, "scalar");
    ops_attention e = ops_attention_new(r, shape);
    int k, threads;
    ops_attention_forward(&e);
    ops_attention_backward(&e);
    for (k = 0; ops_simds[k] != NULL; k++) {
        ops_attention first = ops_attention_new(NULL, shape);
        for (threads = 1; threads <= 3; threads += k == 0 ? 2 : 1) { /* scalar is slow */
            ptst_ctx *c = ops_open(ops_simds[k], threads);
            ops_attention t = ops_attention_new(c, shape);
            if (c != NULL) {
                ops_attention_forward(&t);
                CHECK(ops_distance(t.out_size + 16, t.out, e.out) <= 3e-6);
                CHECK(ops_distance(t.lse_size + 16, t.lse, e.lse) <= 3e-6);
                ops_attention_backward(&t);
                CHECK(ops_distance(t.q_size + 16, t.dq, e.dq) <= 5e-6);
                CHECK(ops_distance(t.kv_size + 16, t.dk, e.dk) <= 5e-6);
                CHECK(ops_distance(t.kv_size + 16, t.dv, e.dv) <= 5e-6);
                if (threads == 1) {
                    memcpy(first.out, t.out, t.out_size * sizeof(float));
                    memcpy(first.dq, t.dq, t.q_size * sizeof(float));
                    memcpy(first.dk, t.dk, t.kv_size * sizeof(float));
                    memcpy(first.dv, t.dv, t.kv_size * sizeof(float));
                }
                CHECK(ops_same(t.out_size, t.out, first.out));
                CHECK(ops_same(t.q_size, t.dq, first.dq));
                CHECK(ops_same(t.kv_size, t.dk, first.dk));
                CHECK(ops_same(t.kv_size, t.dv, first.dv));
                ptst_close(c);
            }
            ops_attention_free(&t);
        }
        ops_attention_free(&first);
    }
    ops_attention_free(&e);
    ptst_close(r);
}

static void attention_parity(void) {
    size_t i;
    for (i = 0; i < sizeof ops_shapes / sizeof *ops_shapes; i++) {
        int before = test_bad;
        ops_attention_parity(&ops_shapes[i]);
        if (test_bad != before) {
            fprintf(stderr, "in attention shape %d\n", (int)i);
        }
    }
}

/* Many rows that decode behind one prefix, which the SIMD versions meet as tiles of queries, and
   where that cannot be: a window that cuts the prefix off, few rows, rows that have a gap. */
static void attention_shared(void) {
    static const struct {
        size_t H, K, D, window, prefix, spans;
        bool first_is_prefix;
        float softcap;
        bool shared;
    } cases[] = {{6, 2, 16, 0, 100, 50, false, 0, true}, {2, 2, 33, 500, 33, 20, true, 0, true},
                 {2, 1, 9, 0, 40, 49, true, 0.7f, true}, {1, 1, 600, 0, 32, 14, false, 0, true},
                 {2, 1, 8, 40, 70, 20, false, 0, false}, {2, 1, 8, 0, 31, 20, false, 0, false},
                 {2, 2, 8, 0, 100, 11, false, 0, false}};
    size_t i, n, rows;
    for (i = 0; i < sizeof cases / sizeof *cases; i++) {
        ptst_ctx *c = test_open(1, NULL);
        ops_shape s;
        ops_attention t;
        ptst__attention_job j;
        memset(&s, 0, sizeof s);
        s.H = cases[i].H;
        s.K = cases[i].K;
        s.D = cases[i].D;
        s.window = cases[i].window;
        s.prefix = cases[i].prefix;
        s.spans = cases[i].spans;
        s.first_is_prefix = cases[i].first_is_prefix;
        s.softcap = cases[i].softcap;
        for (n = 0; n < s.spans; n++) {
            s.count[n] = n % 7 == 3 ? 2 : n % 11 == 5 ? 3 : 1;
            s.keys[n] = s.count[n] + n * 13 % 40;
        }
        if (s.first_is_prefix) {
            s.count[0] = s.keys[0] = s.prefix;
        }
        t = ops_attention_new(c, &s);
        t.a.spans = t.spans;
        ptst__attention_job_open(c, &j, &t.a, t.q);
        for (rows = 0, n = s.first_is_prefix; n < s.spans; n++) {
            rows += s.count[n];
        }
        CHECK(j.shared.count == (cases[i].shared ? rows : 0));
        t.spans[s.spans - 1].query++; /* a row between the last two belongs to nobody */
        ptst__attention_job_open(c, &j, &t.a, t.q);
        rows -= s.count[s.spans - 1];
        CHECK(j.shared.count == (cases[i].shared && rows >= PTST__SHARED ? rows : 0));
        ops_attention_free(&t);
        ptst_close(c);
        ops_attention_parity(&s);
    }
}

/* A span behind a shared prefix gives what the concatenated sequence gives for its rows, and the
   gradients of prefix keys add up over the spans; also with a window across the seam. */
static void attention_prefix(void) {
    enum { P = 61, T = 70, H = 4, K = 2, D = 24 };
    static const size_t windows[] = {0, 50};
    int k, w;
    for (k = 0; ops_simds[k] != NULL; k++) {
        ptst_ctx *c = ops_open(ops_simds[k], 2);
        for (w = 0; w < 2 && c != NULL; w++) {
            ops_shape split = {H, K, D, 0, P, 2, {P, T, 0, 0}, {P, T, 0, 0}, true, 0};
            ops_shape whole = {H, K, D, 0, 0, 1, {P + T, 0, 0, 0}, {P + T, 0, 0, 0}, false, 0};
            ops_attention a, b;
            split.window = whole.window = windows[w];
            a = ops_attention_new(c, &split);
            b = ops_attention_new(c, &whole);
            ops_attention_forward(&a);
            ops_attention_forward(&b);
            CHECK(ops_distance(a.out_size, a.out, b.out) <= 2e-6);
            CHECK(ops_distance(a.lse_size, a.lse, b.lse) <= 2e-6);
            ops_attention_backward(&a);
            ops_attention_backward(&b);
            CHECK(ops_distance(a.q_size, a.dq, b.dq) <= 4e-6);
            CHECK(ops_distance(a.kv_size, a.dk, b.dk) <= 4e-6);
            CHECK(ops_distance(a.kv_size, a.dv, b.dv) <= 4e-6);
            ops_attention_free(&a);
            ops_attention_free(&b);
        }
        ptst_close(c);
    }
}

/* Rows without a key give 0; huge scores do not overflow; NaN stays in the rows that see it. */
static void attention_extremes(void) {
    ops_shape shape = {2, 1, 16, 0, 0, 1, {60, 0, 0, 0}, {60, 0, 0, 0}, false, 0};
    ops_shape none = {2, 2, 16, 0, 0, 1, {5, 0, 0, 0}, {3, 0, 0, 0}, false, 0};
    size_t i;
    int k;
    for (k = 0; ops_simds[k] != NULL; k++) {
        ptst_ctx *c = ops_open(ops_simds[k], 1);
        ops_attention t;
        if (c == NULL) {
            continue;
        }
        t = ops_attention_new(c, &shape);
        for (i = 0; i < t.q_size; i++) {
            t.q[i] *= 1e4f;
        }
        ops_attention_forward(&t);
        ops_attention_backward(&t);
        for (i = 0; i < t.out_size; i++) {
            CHECK(fabs((double)t.out[i]) < 10);
        }
        for (i = 0; i < t.kv_size; i++) {
            CHECK(t.dv[i] == t.dv[i] && t.dk[i] == t.dk[i]);
        }
        t.k[55 * t.a.kv_ld] = NAN;
        ops_attention_forward(&t);
        ops_attention_backward(&t);
        for (i = 0; i < t.out_size; i++) {
            CHECK((t.out[i] != t.out[i]) == (i / (t.a.H * t.a.D) >= 55));
        }
        CHECK(t.dq[0] == t.dq[0] && t.dq[56 * t.a.q_ld] != t.dq[56 * t.a.q_ld]);
        ops_attention_free(&t);
        t = ops_attention_new(c, &none);
        ops_attention_forward(&t);
        ops_attention_backward(&t);
        for (i = 0; i < 2 * 2 * 16; i++) {
            CHECK(t.out[i] == 0 && t.dq[i % 32 + i / 32 * t.a.q_ld] == 0);
        }
        CHECK(t.lse[0] == -INFINITY && t.lse[3] == -INFINITY && t.lse[4] > -INFINITY);
        ops_attention_free(&t);
        ptst_close(c);
    }
}

/* ---- cross-entropy ---- */

typedef struct ops_loss {
    ptst_ctx *c;
    size_t rows, V;
    float *logits;
    const int32_t *labels;
    double losses[8];
} ops_loss;

static double ops_cross_entropy_loss(void *arg) {
    ops_loss *l = (ops_loss *)arg;
    double sum = 0;
    size_t r;
    ptst_cross_entropy(l->c, l->rows, l->V, l->logits, l->labels, l->losses, 0);
    for (r = 0; r < l->rows; r++) {
        sum += l->losses[r] * 0.5;
    }
    return sum;
}

static void cross_entropy_gradient(void) {
    static const int32_t labels[] = {3, -1, 0, 10};
    ops_loss l;
    float *d;
    size_t i;
    l.c = test_open(1, "scalar");
    l.rows = 4;
    l.V = 11;
    l.labels = labels;
    l.logits = ops_random(44, 2, 1);
    d = ops_random(44, 2, 1);
    ptst_cross_entropy(l.c, 4, 11, d, labels, l.losses, 0.5f);
    CHECK(l.losses[1] == 0);
    for (i = 0; i < 11; i++) {
        CHECK(d[11 + i] == 0);
    }
    ops_check_gradient("cross-entropy", ops_cross_entropy_loss, &l, l.logits, 44, d);
    ops_free(l.logits);
    ops_free(d);
    ptst_close(l.c);
}

/* Losses to 1e-6 (float32 rounding of the sum of exponentials) whatever the size of the logits;
   gradients to 2e-6 of their norm; equal bits for all numbers of threads. */
static void cross_entropy_parity(void) {
    static const size_t sizes[] = {1, 2, 7, 8, 9, 16, 33, 100, 1000, 5003};
    static const float scales[] = {1, 20, 1e6f};
    enum { ROWS = 5 };
    size_t s, z, r;
    int k, threads;
    for (s = 0; s < sizeof sizes / sizeof *sizes * 3; s++) {
        size_t V = sizes[s / 3], n = ROWS * V;
        int32_t labels[ROWS];
        double expected[ROWS], losses[ROWS];
        ptst_ctx *c = test_open(1, "scalar");
        float *e = ops_random(n, scales[s % 3], s), *first = ops_random(n, 1, 0);
        for (r = 0; r < ROWS; r++) {
            labels[r] = r == 2 ? -1 : (int32_t)(r * 7919 % V);
        }
        ptst_cross_entropy(c, ROWS, V, e, labels, expected, 0.25f);
        ptst_close(c);
        for (k = 0; ops_simds[k] != NULL; k++) {
            for (threads = 1; threads <= 3; threads++) {
                float *x = ops_random(n, scales[s % 3], s), *y = ops_random(n, scales[s % 3], s);
                c = ops_open(ops_simds[k], threads);
                if (c != NULL) {
                    ptst_cross_entropy(c, ROWS, V, x, labels, losses, 0);
                    CHECK(ops_same(n + 16, x, y)); /* only read */
                    for (r = 0, z = 0; r < ROWS; r++) {
                        CHECK_NEAR(losses[r], expected[r], 1e-6 + 1e-6 * fabs(expected[r]));
                    }
                    ptst_cross_entropy(c, ROWS, V, x, labels, losses, 0.25f);
                    for (z = 0; z < ROWS; z++) {
                        CHECK_NEAR(losses[z], expected[z], 1e-6 + 1e-6 * fabs(expected[z]));
                    }
                    CHECK(ops_distance(n, x, e) <= 2e-6);
                    CHECK(ops_same(16, x + n, y + n));
                    if (threads == 1) {
                        memcpy(first, x, n * sizeof *x);
                    }
                    CHECK(ops_same(n, x, first));
                    ptst_close(c);
                }
                ops_free(x);
                ops_free(y);
            }
        }
        ops_free(e);
        ops_free(first);
    }
}

static void cross_entropy_extremes(void) {
    int k;
    for (k = 0; ops_simds[k] != NULL; k++) {
        ptst_ctx *c = ops_open(ops_simds[k], 1);
        float x[40];
        double loss;
        int32_t label = 3;
        size_t i;
        if (c == NULL) {
            continue;
        }
        for (i = 0; i < 40; i++) {
            x[i] = i == 20 ? -INFINITY : i == 3 ? 3e38f : -3e38f;
        }
        ptst_cross_entropy(c, 1, 40, x, &label, &loss, 1);
        CHECK(loss == 0 && x[3] == 0 && x[20] == 0);
        for (i = 0; i < 40; i++) {
            x[i] = i == 35 ? NAN : 1;
        }
        ptst_cross_entropy(c, 1, 40, x, &label, &loss, 1);
        CHECK(loss != loss && x[0] != x[0] && x[39] != x[39]);
        label = 40; /* no label either */
        ptst_cross_entropy(c, 1, 40, x, &label, &loss, 1);
        CHECK(loss == 0 && x[0] == 0);
        ptst_cross_entropy(c, 0, 40, x, &label, &loss, 1);
        ptst_close(c);
    }
}

/* ---- adamw, sums ---- */

/* Two steps worked out by hand, in double. */
static void adamw_steps(void) {
    int k;
    for (k = 0; ops_simds[k] != NULL; k++) {
        ptst_ctx *c = ops_open(ops_simds[k], 1);
        float w = 1, g = 1, m = 0, v = 0;
        if (c == NULL) {
            continue;
        }
        /* g = 0.5, w = 0.99, m = 0.05, v = 0.00025, both moments corrected: 0.5 and 0.25; the step
           is lr 0.5 / (0.5 + eps) = 0.1 */
        ptst_adamw(c, 1, &w, &g, &m, &v, 0.1, 0.9, 0.999, 1e-8, 0.1, 1, 0.5);
        CHECK_NEAR((double)m, 0.05, 1e-8);
        CHECK_NEAR((double)v, 0.00025, 1e-10);
        CHECK_NEAR((double)w, 0.89, 1e-6);
        /* g = -1: m = 0.045 - 0.1 = -0.055, v = 0.00024975 + 0.001 = 0.00124975;
           corrected: -0.055 / 0.19 and 0.00124975 / 0.001999 */
        g = -1;
        ptst_adamw(c, 1, &w, &g, &m, &v, 0.1, 0.9, 0.999, 1e-8, 0, 2, 1);
        CHECK_NEAR((double)m, -0.055, 1e-8);
        CHECK_NEAR((double)v, 0.00124975, 1e-9);
        CHECK_NEAR((double)w, 0.89 + 0.1 * (0.055 / 0.19) / sqrt(0.00124975 / 0.001999), 1e-6);
        ptst_close(c);
    }
}

/* Element by element: a division, a root and some products, each within a rounding. */
static void adamw_parity(void) {
    static const size_t sizes[] = {1, 3, 8, 17, 4097, 8191};
    size_t s;
    int k, threads, step;
    for (s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        size_t n = sizes[s];
        float *all[2][4];
        int i;
        for (k = 0; ops_simds[k] != NULL; k++) {
            for (threads = 1; threads <= 3; threads++) {
                ptst_ctx *c = ops_open(ops_simds[k], threads), *r = test_open(1, "scalar");
                for (i = 0; i < 8; i++) {
                    all[i / 4][i % 4] = ops_random(n, i % 4 < 2 ? 1 : 0, (uint64_t)(i % 4));
                }
                for (step = 1; step <= 3 && c != NULL; step++) {
                    for (i = 0; i < 2; i++) {
                        ptst_adamw(i ? c : r, n, all[i][0], all[i][1], all[i][2], all[i][3], 1e-2,
                                   0.9, 0.99, 1e-6, 0.1, (uint64_t)step, 0.7);
                    }
                }
                for (i = 0; i < 4; i++) {
                    CHECK(c == NULL || ops_distance(n + 16, all[1][i], all[0][i]) <= 1e-6);
                }
                for (i = 0; i < 8; i++) {
                    ops_free(all[i / 4][i % 4]);
                }
                ptst_close(c);
                ptst_close(r);
            }
        }
    }
}

static void sums_parity(void) {
    static const size_t sizes[] = {0, 1, 9, 63, 64, 1000, 16384, 16385, 100003};
    size_t s, i;
    int k, threads;
    for (s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        size_t n = sizes[s];
        float *x = ops_random(n, 1e15f, 1); /* squares beyond the range of float32 sums of them */
        double expected = ops_project(n, x, x), first = 0;
        for (k = 0; ops_simds[k] != NULL; k++) {
            for (threads = 1; threads <= 3; threads++) {
                ptst_ctx *c = ops_open(ops_simds[k], threads);
                float *y = ops_random(n, 1e15f, 2), *z = ops_random(n, 1e15f, 2);
                if (c != NULL) {
                    double sum = ptst__sum_squares(c, n, x);
                    CHECK_NEAR(sum, expected, 1e-12 * expected);
                    first = threads == 1 ? sum : first;
                    CHECK(sum == first);
                    ptst__axpy(c, n, 0.5f, x, y);
                    for (i = 0; i < n; i++) { /* with or without a fused multiply-add: one rounding */
                        double a = (double)z[i] + 0.5 * (double)x[i];
                        CHECK_NEAR((double)y[i], a, 1.3e-7 * (fabs(a) + fabs((double)x[i])));
                    }
                    CHECK(ops_same(16, y + n, z + n));
                    ptst_close(c);
                }
                ops_free(y);
                ops_free(z);
            }
        }
        ops_free(x);
    }
}

/* ---- PyTorch ---- */

/* sin(0.7 i + phase), the inputs of ops.json. */
static void ops_wave(float *x, size_t n, double phase) {
    size_t i;
    for (i = 0; i < n; i++) {
        x[i] = (float)sin(0.7 * (double)i + phase);
    }
}

/* x against the numbers of an array in the golden file: 2e-6 of the largest one covers float32
   rounding of sums of some ten terms of size 1. */
static void ops_golden(const ptst_json *j, int32_t object, const char *key, const float *x) {
    int32_t array = ptst_json_get(j, object, key), e = ptst_json_first(j, array);
    size_t n = ptst_json_size(j, array), i;
    double largest = 0, worst = 0;
    for (i = 0; i < n; i++, e = ptst_json_next(j, e)) {
        double expected = ptst_json_number(j, e, NAN), d = fabs((double)x[i] - expected);
        largest = fmax(largest, fabs(expected));
        worst = d <= worst ? worst : d;
    }
    CHECK(n > 0);
    CHECK_NEAR(worst, 0, 2e-6 * largest);
}

static void ops_golden_attention(ptst_ctx *c, const ptst_json *j, const char *key, size_t window) {
    enum { H = 4, K = 2, D = 6, T = 7 };
    float q[T * H * D], k[T * K * D], v[T * K * D], dout[T * H * D], out[T * H * D], lse[T * H];
    float dq[T * H * D], dk[T * K * D], dv[T * K * D];
    int32_t golden = ptst_json_get(j, 0, key);
    ptst_attention a;
    ptst_span s;
    void *scratch;
    memset(&a, 0, sizeof a);
    memset(&s, 0, sizeof s);
    a.H = H, a.K = K, a.D = D;
    a.scale = (float)(1 / sqrt(6.0));
    a.window = window;
    a.q_ld = H * D;
    a.kv_ld = K * D;
    a.spans = &s;
    a.spans_count = 1;
    s.count = s.keys[1] = T;
    s.k[1] = k, s.v[1] = v, s.dk[1] = dk, s.dv[1] = dv;
    ops_wave(q, T * H * D, 0.1);
    ops_wave(k, T * K * D, 0.2);
    ops_wave(v, T * K * D, 0.3);
    ops_wave(dout, T * H * D, 0.4);
    memset(dk, 0, sizeof dk);
    memset(dv, 0, sizeof dv);
    scratch = malloc(ptst_attention_backward_scratch(&a));
    ptst_attention_forward(c, &a, q, out, lse);
    ptst_attention_backward(c, &a, q, out, lse, dout, dq, scratch);
    free(scratch);
    ops_golden(j, golden, "out", out);
    ops_golden(j, golden, "dq", dq);
    ops_golden(j, golden, "dk", dk);
    ops_golden(j, golden, "dv", dv);
}

static void ops_golden_layers(ptst_ctx *c, const ptst_json *j) {
    static const int32_t labels[] = {2, -1, 0, 5};
    float x[24], w[9], y[24], dy[24], dx[24] = {0}, dw[24] = {0}, rstd[3];
    double losses[4];
    size_t i;
    int32_t golden = ptst_json_get(j, 0, "rmsnorm");
    ops_wave(x, 15, 0.1);
    ops_wave(w, 5, 0.2);
    ops_wave(dy, 15, 0.3);
    ptst_rmsnorm_forward(c, 3, 5, 1e-5f, x, w, y, rstd);
    ptst_rmsnorm_backward(c, 3, 5, x, w, rstd, dy, dx, dw);
    ops_golden(j, golden, "y", y);
    ops_golden(j, golden, "dx", dx);
    ops_golden(j, golden, "dw", dw);
    golden = ptst_json_get(j, 0, "swiglu");
    ops_wave(x, 9, 0.4);
    ops_wave(w, 9, 0.5);
    ops_wave(dy, 9, 0.6);
    for (i = 0; i < 9; i++) {
        x[i] *= 4;
    }
    ptst_swiglu_forward(c, 9, x, w, y);
    ptst_swiglu_backward(c, 9, x, w, dy, dx, dw);
    ops_golden(j, golden, "y", y);
    ops_golden(j, golden, "dgate", dx);
    ops_golden(j, golden, "dup", dw);
    golden = ptst_json_get(j, 0, "cross_entropy");
    ops_wave(x, 24, 0.7);
    for (i = 0; i < 24; i++) {
        x[i] *= 3;
    }
    ptst_cross_entropy(c, 4, 6, x, labels, losses, 1);
    for (i = 0; i < 4; i++) {
        y[i] = (float)losses[i];
    }
    ops_golden(j, golden, "losses", y);
    ops_golden(j, golden, "dx", x);
}

/* Bit for bit the steps would need PyTorch's order of roundings; one rounding more or less in a
   step of 0.01 changes a weight of size 1 by 6e-8. */
static void ops_golden_adamw(ptst_ctx *c, const ptst_json *j, const char *key, double decay) {
    float w[5], g[5], m[5] = {0}, v[5] = {0};
    int32_t array = ptst_json_get(j, 0, key);
    uint64_t step;
    size_t i;
    CHECK(ptst_json_size(j, array) == 4);
    ops_wave(w, 5, 0.1);
    for (step = 1; step <= 4; step++) {
        int32_t golden = ptst_json_at(j, array, (size_t)step - 1);
        ops_wave(g, 5, (double)step);
        ptst_adamw(c, 5, w, g, m, v, 0.01, 0.9, 0.99, 1e-8, decay, step, 1);
        for (i = 0; i < 5; i++) {
            CHECK_NEAR((double)w[i], ptst_json_number(j, ptst_json_at(j, golden, i), NAN), 2.5e-7);
        }
    }
}

static void ops_against_pytorch(void) {
    int k;
    for (k = 0; ops_simds[k] != NULL; k++) {
        ptst_ctx *c = ops_open(ops_simds[k], 2);
        if (c != NULL) {
            ptst_json *j = ptst_json_load(c, "tests/golden/ops.json");
            CHECK(j != NULL);
            if (j != NULL) {
                ops_golden_attention(c, j, "attention", 0);
                ops_golden_attention(c, j, "window", 3);
                ops_golden_layers(c, j);
                ops_golden_adamw(c, j, "adamw", 0);
                ops_golden_adamw(c, j, "decay", 0.1);
            }
            ptst_json_free(c, j);
            ptst_close(c);
        }
    }
}

static void suite_ops(void) {
    RUN(exp_accuracy);
    RUN(rmsnorm_gradient);
    RUN(rmsnorm_parity);
    RUN(rope_gradient);
    RUN(swiglu_gradient);
    RUN(swiglu_parity);
    RUN(geglu_values);
    RUN(geglu_gradient);
    RUN(geglu_parity);
    RUN(swiglu_extremes);
    RUN(attention_gradient);
    RUN(attention_parity);
    RUN(attention_shared);
    RUN(attention_prefix);
    RUN(attention_extremes);
    RUN(cross_entropy_gradient);
    RUN(cross_entropy_parity);
    RUN(cross_entropy_extremes);
    RUN(adamw_steps);
    RUN(adamw_parity);
    RUN(sums_parity);
    RUN(ops_against_pytorch);
}

MAIN(ops)
