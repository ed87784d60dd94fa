/* The optimizer's step on a CPU: one read of a group's gradients, weights and moments, one write of the last two.

   step.py says what is handed in; what a program writes depends on its own elements alone. */

#include "memory.h"

enum { SGD, NESTEROV, ADAM, RMSPROP };
enum { A = 1, B = 2, C = 4 };
enum { GRADIENT = 1, COLUMNS = 5 }; /* of a table: weight, gradient, and a, b and c */
enum { SHORT = 512 };               /* a row of which all columns fit the first cache, in both dtypes at once */

/* As in rule.py; `decay` is 0 where it is not in the gradient, `keep` is 1 where it is not outside. */
typedef struct {
    float lr, keep, decay, sign, past, fresh, past2, fresh2, eps;
} Numbers;

/* Of one parameter: the limits of its gradient and of its update, and the terms of its rule. */
typedef struct {
    float scale, bound, after, limit, term, root;
} Own;

/* The moments of an element advance by its gradient g; the update. `kept` are those moments that there are. */
INLINE float advance(int rule, int kept, float g, float *a, float *b, float *c, Numbers of, Own own)
{
    if (rule == ADAM) {
        *a = of.past * *a + of.fresh * g;
        *b = of.past2 * *b + of.fresh2 * g * g;
        if (kept & C)
            *c = (*c >= *b) | (*c != *c) ? *c : *b; /* NaN stays */
        return own.term * (*a / (__builtin_sqrtf(kept & C ? *c : *b) / own.root + of.eps));
    }
    if (rule == RMSPROP) {
        *a = of.past2 * *a + of.fresh2 * g * g;
        *b += of.fresh2 * (g - *b); /* settles at g, so that the variance does not fall below 0 */
        const float u = g / (__builtin_sqrtf(kept & B ? *a - *b * *b : *a) / own.root + of.eps);
        *c = of.past * *c + u;
        return kept & C ? *c : u;
    }
    *a = of.past * *a + own.term * g;
    return !(kept & A) ? g : rule == NESTEROV ? g + of.past * *a : *a;
}

/* n elements: a step; or with `measures`, into `update`, the update before its own clip and nothing else. No branch is
   left in the loop, or a processor without masks would go through it element by element. */
INLINE void row(
    int rule, int kept, int measures, float *restrict w, const float *restrict g, float *restrict a, float *restrict b,
    float *restrict c, int64_t n, Numbers of, Own own, float *restrict update)
{
    for (int64_t k = 0; k < n; k++) {
        float a_k = kept & A ? a[k] : 0, b_k = kept & B ? b[k] : 0, c_k = kept & C ? c[k] : 0;
        float g_k = of.sign * clamped(g[k] * own.scale, own.bound);
        g_k = of.decay != 0 ? g_k + of.decay * w[k] : g_k;
        const float u = advance(rule, kept, g_k, &a_k, &b_k, &c_k, of, own);
        if (measures) {
            update[k] = u;
            continue;
        }
        if (kept & A)
            a[k] = a_k;
        if (kept & B)
            b[k] = b_k;
        if (kept & C)
            c[k] = c_k;
        const float moved = w[k] * of.keep - of.lr * clamped(u * own.after, own.limit);
        w[k] = of.lr != 0 ? moved : w[k]; /* else nothing moves, also where the update is not finite */
    }
}

/* The same with rule and moments as constants: a loop for each that there is. */
INLINE void any_row(int64_t rule, void *const x[COLUMNS], int64_t n, Numbers of, Own own, float *update)
{
#define CASE(RULE, KEPT)                                                                                               \
    case 8 * (RULE) + (KEPT):                                                                                          \
        if (update)                                                                                                    \
            row(RULE, KEPT, 1, x[0], x[1], x[2], x[3], x[4], n, of, own, update);                                      \
        else                                                                                                           \
            row(RULE, KEPT, 0, x[0], x[1], x[2], x[3], x[4], n, of, own, 0);                                           \
        break
    switch (8 * rule + (x[2] ? A : 0) + (x[3] ? B : 0) + (x[4] ? C : 0)) {
        CASE(SGD, 0);
        CASE(SGD, A);
        CASE(NESTEROV, A);
        CASE(ADAM, A | B);
        CASE(ADAM, A | B | C);
        CASE(RMSPROP, A);
        CASE(RMSPROP, A | B);
        CASE(RMSPROP, A | C);
        CASE(RMSPROP, A | B | C);
    }
#undef CASE
}

/* n elements of two bytes as float32: the lower ones of each pair, then the higher ones, then one that is left. */
INLINE void widen(float *restrict wide, const void *restrict x, int64_t n)
{
    const int64_t half = n / 2;
    for (int64_t k = 0; k < half; k++) {
        const uint32_t two = ((const Pair *)x)[k];
        wide[k] = number(two << 16);
        wide[half + k] = number(two & 0xffff0000);
    }
    if (n % 2)
        wide[n - 1] = get(x, n - 1, 2);
}

INLINE void narrow(void *restrict x, const float *restrict wide, int64_t n)
{
    const int64_t half = n / 2;
    for (int64_t k = 0; k < half; k++)
        ((Pair *)x)[k] = rounded_or_nan(wide[k]) >> 16 | (rounded_or_nan(wide[half + k]) & 0xffff0000);
    if (n % 2)
        set(x, n - 1, 2, wide[n - 1]);
}

/* The same of memory in bfloat16 too, through buffers that stay in the first cache: one copy of the loops for both. */
INLINE void any_row_of(
    int bytes, int64_t rule, void *const x[COLUMNS], int64_t n, Numbers of, Own own, float *update)
{
    float wide[COLUMNS][SHORT];
    void *y[COLUMNS];
    for (int r = 0; r < COLUMNS; r++) {
        y[r] = bytes == 2 && x[r] ? wide[r] : x[r];
        if (bytes == 2 && x[r])
            widen(wide[r], x[r], n);
    }
    any_row(rule, y, n, of, own, update);
    for (int r = 0; r < COLUMNS; r++)
        if (bytes == 2 && x[r] && r != GRADIENT && !update)
            narrow(x[r], wide[r], n);
}

INLINE float at_or(const float *number_S, int64_t stride, int64_t place, float missing)
{
    return number_S ? number_S[place * stride] : missing;
}

/* With sumsq_C the updates are measured and nothing else is written. */
EVERY_CPU void gradclip_step(
    int64_t first, int64_t last, const int64_t *address_RS, const int64_t *numel_S, const int32_t *kind_S,
    const int32_t *first_S, const int32_t *segment_C, const int32_t *bytes_K, int64_t chunk, int64_t segments,
    const int64_t *place_S, const float *term_S, const float *scale_S, int64_t scale_stride, const float *bound_S,
    int64_t bound_stride, const float *after_S, int64_t after_stride, const float *limit_S, int64_t limit_stride,
    int64_t rule, const Numbers *numbers, double *sumsq_C, float *max_C)
{
    float update[SHORT];
    for (int64_t p = first; p < last; p++) {
        const int64_t s = segment_C[p], start = (p - first_S[s]) * chunk, left = numel_S[s] - start;
        const int64_t n = left < chunk ? left : chunk, here = place_S[2 * s], there = place_S[2 * s + 1];
        const Own own = {
            at_or(scale_S, scale_stride, here, 1), at_or(bound_S, bound_stride, here, number(INF)),
            at_or(after_S, after_stride, there, 1), at_or(limit_S, limit_stride, there, number(INF)),
            at_or(term_S, 2, s, 1), term_S ? term_S[2 * s + 1] : 1};
        const int bytes = bytes_K[kind_S[s]];
        uint32_t most = 0, top;
        double sum = 0;
        for (int64_t i = 0; i < n; i += SHORT) {
            const int64_t some = n - i < SHORT ? n - i : SHORT;
            void *x[COLUMNS];
            for (int r = 0; r < COLUMNS; r++) {
                char *memory = (char *)address_RS[r * segments + s];
                x[r] = memory ? memory + (start + i) * bytes : 0;
            }
            any_row_of(bytes, rule, x, some, *numbers, own, sumsq_C ? update : 0);
            if (sumsq_C) {
                sum += sum_of_squares((const char *)update, some, 4, &top);
                most = top > most ? top : most;
            }
        }
        if (sumsq_C) {
            sumsq_C[p] = sum;
            max_C[p] = number(most < INF ? most : INF);
        }
    }
}
