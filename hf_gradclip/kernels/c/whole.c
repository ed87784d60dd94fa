/* Whole gradients on a CPU: one read measures them, one write scales those that change.

   whole.py says what each function does, and library.py hands in a range of the programs of a table, so that threads
   may share a call. What a program writes depends on its own elements alone: any number of threads gives the same
   bits. */

#include "memory.h"

/* Counts changes of a function's arguments, in all files; library.py compares it with its own. */
const int32_t gradclip_interface = 3;

EVERY_CPU void gradclip_measure(
    int64_t first, int64_t last, const int64_t *address_S, const int64_t *numel_S, const int32_t *kind_S,
    const int32_t *first_S, const int32_t *segment_C, const int32_t *bytes_K, int64_t chunk, double *sumsq_C, float *max_C)
{
    for (int64_t c = first; c < last; c++) {
        const int64_t s = segment_C[c], start = (c - first_S[s]) * chunk, left = numel_S[s] - start;
        const int64_t n = left < chunk ? left : chunk;
        uint32_t top;
        if (bytes_K[kind_S[s]] == 4)
            sumsq_C[c] = sum_of_squares((const char *)address_S[s] + start * 4, n, 4, &top);
        else
            sumsq_C[c] = sum_of_squares((const char *)address_S[s] + start * 2, n, 2, &top);
        max_C[c] = number(top < INF ? top : INF);
    }
}

EVERY_CPU void gradclip_finish(
    int64_t segments, const int32_t *first_S, const double *sumsq_C, const float *max_C, double *sumsq_S, double *max_S)
{
    for (int64_t s = 0; s < segments; s++) {
        sumsq_S[s] = max_S[s] = 0;
        for (int64_t c = first_S[s]; c < first_S[s + 1]; c++) {
            sumsq_S[s] += sumsq_C[c];
            max_S[s] = max_C[c] > max_S[s] ? max_C[c] : max_S[s];
        }
    }
}

EVERY_CPU void gradclip_apply(
    int64_t first, int64_t last, const int64_t *address_S, const int64_t *numel_S, const int32_t *kind_S,
    const int32_t *first_S, const int32_t *segment_C, const int32_t *bytes_K, int64_t chunk,
    const float *scale_S, int64_t scale_stride, const float *bound_S, int64_t bound_stride)
{
    for (int64_t c = first; c < last; c++) {
        const int64_t s = segment_C[c], start = (c - first_S[s]) * chunk, left = numel_S[s] - start;
        const float scale = scale_S[s * scale_stride], bound = bound_S ? bound_S[s * bound_stride] : number(INF);
        const int bytes = bytes_K[kind_S[s]];
        if (is_asked(scale, bound))
            scale_and_clamp((char *)address_S[s] + start * bytes, left < chunk ? left : chunk, bytes, scale, bound);
    }
}
