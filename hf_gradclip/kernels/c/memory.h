/* What the kernels on a CPU share: elements of both dtypes, sums of squares, and writes that scale and clamp.

   Memory is float32 (4 bytes an element) or bfloat16 (2). Arithmetic is in float32, and what is stored is rounded once,
   to nearest. Four parts of a program's memory are read side by side, and asked for AHEAD bytes before: one alone, or
   what the processor itself foresees, does not keep the memory busy. */

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && __GNUC__ >= 12
#define EVERY_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EVERY_CPU
#endif
#define INLINE static inline __attribute__((always_inline))

enum { LANES = 16, ROW = 1024, AHEAD = 1024, BLOCK = 64 };

static const uint32_t INF = 0x7f800000, LARGE = 0x58800000 /* 2^50 */, SMALL = 0x26800000 /* 2^-50 */;

INLINE uint32_t bits(float value)
{
    uint32_t word;
    memcpy(&word, &value, 4);
    return word;
}

INLINE float number(uint32_t word)
{
    float value;
    memcpy(&value, &word, 4);
    return value;
}

INLINE float get(const char *memory, int64_t i, int bytes)
{
    return bytes == 4 ? ((const float *)memory)[i] : number((uint32_t)((const uint16_t *)memory)[i] << 16);
}

INLINE void set(char *memory, int64_t i, int bytes, float value)
{
    if (bytes == 4) {
        ((float *)memory)[i] = value;
        return;
    }
    uint32_t word = bits(value), rounded = word + 0x7fff + (word >> 16 & 1);
    ((uint16_t *)memory)[i] = ((word & 0x7fffffff) > INF ? word | 0x400000 : rounded) >> 16;
}

/* Comparisons, because they are false for NaN and so keep it. */
INLINE float clamped(float value, float bound)
{
    value = value > bound ? bound : value;
    return value < -bound ? -bound : value;
}

/* Adds the squares of n elements, each to the lane that it is in, and raises its largest bit pattern of an |element|, of
   which NaN has the highest. Lanes make the sum the same, and as close, whatever a compiler makes of the loop. */
INLINE void add_to_lanes(const char *x, int64_t n, int bytes, float sum[LANES], uint32_t top[LANES])
{
#pragma omp simd
    for (int64_t k = 0; k < n; k++) {
        const float value = get(x, k, bytes);
        const uint32_t word = bits(value) & 0x7fffffff;
        sum[k] += value * value;
        top[k] = word > top[k] ? word : top[k];
    }
}

INLINE double over_lanes(const float sum[LANES], const uint32_t top[LANES], uint32_t *most)
{
    double total = 0;
    *most = 0;
    for (int k = 0; k < LANES; k++) {
        total += sum[k];
        *most = top[k] > *most ? top[k] : *most;
    }
    return total;
}

/* Sums of squares of four runs of n elements, ROW at most, and the largest bit pattern of an |element| of each. The
   first elements of two runs are `apart` elements apart. */
INLINE void sum_four(const char *x, int64_t apart, int64_t n, int bytes, double sum[4], uint32_t top[4])
{
    float sums[4][LANES] = {{0}};
    uint32_t tops[4][LANES] = {{0}};
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES)
        for (int k = 0; k < 4; k++) {
            const char *run = x + (k * apart + j) * bytes;
            __builtin_prefetch(run + AHEAD);
            add_to_lanes(run, LANES, bytes, sums[k], tops[k]);
        }
    for (int k = 0; k < 4; k++) {
        add_to_lanes(x + (k * apart + j) * bytes, n - j, bytes, sums[k], tops[k]);
        sum[k] = over_lanes(sums[k], tops[k], &top[k]);
    }
}

INLINE double sum_one(const char *x, int64_t n, int bytes, uint32_t *top)
{
    float sums[LANES] = {0};
    uint32_t tops[LANES] = {0};
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES)
        add_to_lanes(x + j * bytes, LANES, bytes, sums, tops);
    add_to_lanes(x + j * bytes, n - j, bytes, sums, tops);
    return over_lanes(sums, tops, top);
}

/* Where squares may overflow in float32, or lose digits. */
INLINE double sum_in_double(const char *x, int64_t n, int bytes)
{
    double sum = 0;
    for (int64_t j = 0; j < n; j++)
        sum += (double)get(x, j, bytes) * get(x, j, bytes);
    return sum;
}

INLINE int is_extreme(uint32_t top)
{
    return (top > LARGE && top < INF) || (top < SMALL && top > 0);
}

/* Sum of squares of n elements, and the largest bit pattern of an |element|. */
INLINE double sum_of_squares(const char *x, int64_t n, int bytes, uint32_t *top)
{
    const int64_t part = n / (4 * ROW) * ROW;
    double sums[4];
    uint32_t tops[4], most = 0;
    double sum = 0;
    for (int64_t i = 0; i < part; i += ROW) {
        sum_four(x + i * bytes, part, ROW, bytes, sums, tops);
        for (int k = 0; k < 4; k++) {
            sum += sums[k];
            most = tops[k] > most ? tops[k] : most;
        }
    }
    for (int64_t i = 4 * part; i < n; i += ROW) {
        sum += sum_one(x + i * bytes, n - i < ROW ? n - i : ROW, bytes, tops);
        most = tops[0] > most ? tops[0] : most;
    }
    *top = most;
    return is_extreme(most) ? sum_in_double(x, n, bytes) : sum;
}

INLINE void write_run(char *x, int64_t n, int bytes, float scale, float bound, int bounded)
{
    for (int64_t j = 0; j < n; j++) {
        float value = get(x, j, bytes) * scale;
        set(x, j, bytes, bounded ? clamped(value, bound) : value);
    }
}

INLINE void write(char *x, int64_t n, int bytes, float scale, float bound, int bounded)
{
    const int64_t part = n / (4 * BLOCK) * BLOCK;
    for (int64_t i = 0; i < part; i += BLOCK)
        for (int k = 0; k < 4; k++) {
            char *run = x + (k * part + i) * bytes;
            for (int64_t line = 0; line < BLOCK * bytes; line += 64)
                __builtin_prefetch(run + line + AHEAD);
            write_run(run, BLOCK, bytes, scale, bound, bounded);
        }
    write_run(x + 4 * part * bytes, n - 4 * part, bytes, scale, bound, bounded);
}

INLINE void scale_and_clamp(char *x, int64_t n, int bytes, float scale, float bound)
{
    if (bytes == 4 && bound == number(INF))
        write(x, n, 4, scale, bound, 0);
    else if (bytes == 4)
        write(x, n, 4, scale, bound, 1);
    else if (bound == number(INF))
        write(x, n, 2, scale, bound, 0);
    else
        write(x, n, 2, scale, bound, 1);
}
