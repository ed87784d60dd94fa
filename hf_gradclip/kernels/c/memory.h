/* What the kernels on a CPU share: elements of both dtypes, sums of squares, and writes that scale and clamp.

   Memory is float32 (4 bytes an element) or bfloat16 (2). Arithmetic is in float32, and what is stored is rounded once,
   to nearest.

   Four parts of a program's memory are streamed side by side, a cache line of each in turn: one alone does not keep the
   memory busy. Each has instructions of its own, as a processor tells streams apart by those; that is why the four calls
   are written out. It is asked for some bytes before, as far as suits the processor. That alone depends on its maker:
   what is added to what does not. */

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && __GNUC__ >= 12
#define EVERY_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define AHEAD (__builtin_cpu_is("amd") ? 512 : 1024) /* bytes */
#else
#define EVERY_CPU
#define AHEAD 1024
#endif
#define INLINE static inline __attribute__((always_inline))

enum { LANES = 16, ROW = 1024, LINE = 64 /* bytes */ };

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

/* Rounds to two bytes, which are in the upper half; for numbers, and for a NaN whose lower half is 0. */
INLINE uint32_t rounded(float value)
{
    const uint32_t word = bits(value), even = (word & 0x10000) == 0 ? ~0u : 0;
    return word + 0x8000 + even;
}

INLINE uint32_t rounded_or_nan(float value)
{
    return value != value ? bits(value) | 0x400000 : rounded(value);
}

INLINE void set(char *memory, int64_t i, int bytes, float value)
{
    if (bytes == 4)
        ((float *)memory)[i] = value;
    else
        ((uint16_t *)memory)[i] = rounded_or_nan(value) >> 16;
}

/* Comparisons, because they are false for NaN and so keep it. */
INLINE float clamped(float value, float bound)
{
    value = value > bound ? bound : value;
    return value < -bound ? -bound : value;
}

/* Two elements of two bytes: each becomes a float32 by a shift or a mask, which is less than to move them apart. */
typedef uint32_t __attribute__((aligned(2), may_alias)) Pair;
enum { LOW = __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__ }; /* which of the two is in the lower half */

/* The largest bit patterns of an |element| so far, of which NaN has the highest; of two bytes in `half`. */
typedef struct {
    uint32_t whole[LANES];
    uint16_t half[LANES];
} Tops;

/* Where in a sum lane k is: of two bytes the even ones are first. */
INLINE int place(int k, int bytes)
{
    return bytes == 4 ? k : k % 2 * (LANES / 2) + k / 2;
}

/* Adds the squares of n elements, LANES at most, each to the lane that it is in, and raises the tops. Lanes make the sum
   the same, and as close, whatever a compiler makes of the loop. */
INLINE void add_some(const char *x, int64_t n, int bytes, float sum[LANES], Tops *top)
{
    for (int64_t k = 0; k < n; k++) {
        const float value = get(x, k, bytes);
        const uint32_t word = bits(value) & 0x7fffffff;
        sum[place(k, bytes)] += value * value;
        if (bytes == 4)
            top->whole[k] = word > top->whole[k] ? word : top->whole[k];
        else
            top->half[k] = word >> 16 > top->half[k] ? word >> 16 : top->half[k];
    }
}

/* The same for LANES elements. */
INLINE void add_lanes(const char *x, int bytes, float sum[LANES], Tops *top)
{
    if (bytes == 4) {
#pragma omp simd
        for (int k = 0; k < LANES; k++) {
            const float value = get(x, k, 4);
            const uint32_t word = bits(value) & 0x7fffffff;
            sum[k] += value * value;
            top->whole[k] = word > top->whole[k] ? word : top->whole[k];
        }
        return;
    }
    float *even = sum + LOW * (LANES / 2), *odd = sum + !LOW * (LANES / 2);
#pragma omp simd
    for (int k = 0; k < LANES / 2; k++) {
        const uint32_t two = ((const Pair *)x)[k];
        const float low = number(two << 16), high = number(two & 0xffff0000);
        even[k] += low * low;
        odd[k] += high * high;
    }
#pragma omp simd
    for (int k = 0; k < LANES; k++) {
        const uint16_t word = ((const uint16_t *)x)[k] & 0x7fff;
        top->half[k] = word > top->half[k] ? word : top->half[k];
    }
}

INLINE void add_line(const char *x, int bytes, float sum[LANES], Tops *top, int64_t ahead)
{
    __builtin_prefetch(x + ahead);
    for (int64_t j = 0; j < LINE; j += LANES * bytes)
        add_lanes(x + j, bytes, sum, top);
}

INLINE double over_lanes(const float sum[LANES], int bytes)
{
    double total = 0;
    for (int k = 0; k < LANES; k++)
        total += sum[place(k, bytes)];
    return total;
}

INLINE uint32_t highest(const Tops *top, int bytes)
{
    uint32_t most = 0;
    for (int k = 0; k < LANES; k++) {
        const uint32_t word = bytes == 4 ? top->whole[k] : (uint32_t)top->half[k] << 16;
        most = word > most ? word : most;
    }
    return most;
}

/* The rest of a run of n elements, of which j have been added; its sum. */
INLINE double sum_rest(const char *x, int64_t j, int64_t n, int bytes, float sum[LANES], Tops *top)
{
    for (; j + LANES <= n; j += LANES)
        add_lanes(x + j * bytes, bytes, sum, top);
    add_some(x + j * bytes, n - j, bytes, sum, top);
    return over_lanes(sum, bytes);
}

/* Sums of squares of four runs of n elements, ROW at most, whose first elements are `apart` elements apart. */
INLINE void sum_four(const char *x, int64_t apart, int64_t n, int bytes, double sum[4], Tops *top)
{
    const char *run[4] = {x, x + apart * bytes, x + 2 * apart * bytes, x + 3 * apart * bytes};
    const int64_t lines = n * bytes / LINE * LINE, ahead = AHEAD;
    float sums[4][LANES] = {{0}};
    for (int64_t i = 0; i < lines; i += LINE) {
        add_line(run[0] + i, bytes, sums[0], top, ahead);
        add_line(run[1] + i, bytes, sums[1], top, ahead);
        add_line(run[2] + i, bytes, sums[2], top, ahead);
        add_line(run[3] + i, bytes, sums[3], top, ahead);
    }
    for (int k = 0; k < 4; k++)
        sum[k] = sum_rest(run[k], lines / bytes, n, bytes, sums[k], top);
}

INLINE double sum_one(const char *x, int64_t n, int bytes, Tops *top)
{
    float sums[LANES] = {0};
    return sum_rest(x, 0, n, bytes, sums, top);
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
INLINE double sum_of_squares(const char *x, int64_t n, int bytes, uint32_t *most)
{
    const int64_t part = n / (4 * ROW) * ROW;
    double sums[4], sum = 0;
    Tops top = {{0}, {0}};
    for (int64_t i = 0; i < part; i += ROW) {
        sum_four(x + i * bytes, part, ROW, bytes, sums, &top);
        for (int k = 0; k < 4; k++)
            sum += sums[k];
    }
    for (int64_t i = 4 * part; i < n; i += ROW)
        sum += sum_one(x + i * bytes, n - i < ROW ? n - i : ROW, bytes, &top);
    *most = highest(&top, bytes);
    return is_extreme(*most) ? sum_in_double(x, n, bytes) : sum;
}

/* What is to be done to the elements of a run. */
typedef struct {
    float scale, bound;
} Change;

INLINE float changed(float value, Change by, int bounded)
{
    return bounded ? clamped(value * by.scale, by.bound) : value * by.scale;
}

INLINE void write_run(char *x, int64_t n, int bytes, Change by, int bounded)
{
    if (bytes == 4) {
        for (int64_t j = 0; j < n; j++)
            ((float *)x)[j] = changed(((float *)x)[j], by, bounded);
        return;
    }
    Pair *pairs = (Pair *)x;
    for (int64_t j = 0; j < n / 2; j++) {
        const uint32_t two = pairs[j];
        const float low = changed(number(two << 16), by, bounded);
        const float high = changed(number(two & 0xffff0000), by, bounded);
        pairs[j] = rounded(low) >> 16 | (rounded(high) & 0xffff0000);
    }
    if (n % 2)
        set(x, n - 1, 2, changed(get(x, n - 1, 2), by, bounded));
}

INLINE void write_line(char *x, int bytes, Change by, int bounded, int64_t ahead)
{
    __builtin_prefetch(x + ahead);
    write_run(x, LINE / bytes, bytes, by, bounded);
}

/* Four runs of n elements each. */
INLINE void write_four(char *const run[4], int64_t n, int bytes, const Change by[4], int bounded)
{
    const Change by0 = by[0], by1 = by[1], by2 = by[2], by3 = by[3];
    const int64_t lines = n * bytes / LINE * LINE, ahead = AHEAD;
    char *a = run[0], *b = run[1], *c = run[2], *d = run[3];
    for (int64_t i = 0; i < lines; i += LINE) {
        write_line(a + i, bytes, by0, bounded, ahead);
        write_line(b + i, bytes, by1, bounded, ahead);
        write_line(c + i, bytes, by2, bounded, ahead);
        write_line(d + i, bytes, by3, bounded, ahead);
    }
    for (int k = 0; k < 4; k++)
        write_run(run[k] + lines, n - lines / bytes, bytes, by[k], bounded);
}

/* A NaN is made one whose lower half is 0, so that `rounded` keeps it. */
INLINE Change change(float scale, float bound)
{
    return (Change){scale == scale ? scale : number(0x7fc00000), bound};
}

INLINE int is_asked(float scale, float bound)
{
    return scale != 1 || bound < number(INF);
}

INLINE void write(char *x, int64_t n, int bytes, Change by, int bounded)
{
    const int64_t part = n * bytes / (4 * LINE) * LINE;
    char *const run[4] = {x, x + part, x + 2 * part, x + 3 * part};
    const Change same[4] = {by, by, by, by};
    write_four(run, part / bytes, bytes, same, bounded);
    write_run(x + 4 * part, n - 4 * part / bytes, bytes, by, bounded);
}

INLINE void scale_and_clamp(char *x, int64_t n, int bytes, float scale, float bound)
{
    const Change by = change(scale, bound);
    if (bytes == 4 && bound == number(INF))
        write(x, n, 4, by, 0);
    else if (bytes == 4)
        write(x, n, 4, by, 1);
    else if (bound == number(INF))
        write(x, n, 2, by, 0);
    else
        write(x, n, 2, by, 1);
}
