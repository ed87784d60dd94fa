/* Gradients by unit on a CPU: a program has its units whole, so that nothing is added by two.

   units.py says what each function does; see whole.c for programs and threads. */

#include "memory.h"

enum { STRETCH = 1024, FLUSH = 64 };

/* What one program has of a block: `count` lines, or a stretch of `width` units of every line of a matrix. */
typedef struct {
    char *x;
    int64_t unit, count, length, columns, width;
} Part;

INLINE Part part_of(
    int64_t c, const int64_t *address_S, const int32_t *first_S, int64_t s, const int64_t *place_S, int bytes)
{
    const int64_t j = c - first_S[s], programs = first_S[s + 1] - first_S[s];
    const int64_t unit = place_S[4 * s], matrices = place_S[4 * s + 1];
    const int64_t length = place_S[4 * s + 2], columns = place_S[4 * s + 3];
    if (columns == 0) {
        const int64_t each = (matrices + programs - 1) / programs, line = j * each, left = matrices - line;
        const Part lines = {
            (char *)address_S[s] + line * length * bytes, unit + line, left < each ? left : each, length, 0, 0};
        return lines;
    }
    const int64_t stretches = programs / matrices, each = (columns + stretches - 1) / stretches;
    const int64_t matrix = j / stretches, column = j % stretches * each, left = columns - column;
    const Part stretch = {
        (char *)address_S[s] + (matrix * length * columns + column) * bytes, unit + matrix * columns + column, 0, length,
        columns, left < each ? left : each};
    return stretch;
}

/* LANES at most. */
INLINE float sum_of_few(const char *x, int64_t n, int bytes)
{
    float sum = 0;
    for (int64_t k = 0; k < n; k++)
        sum += get(x, k, bytes) * get(x, k, bytes);
    return sum;
}

INLINE void sum_lines(Part part, int bytes, double *sum)
{
    const int64_t n = part.length, quarter = part.count / 4;
    double sums[4];
    Tops unused = {{0}, {0}};
    if (n <= LANES) {
        for (int64_t line = 0; line < part.count; line++)
            sum[line] = sum_of_few(part.x + line * n * bytes, n, bytes);
        return;
    }
    for (int64_t r = 0; r < quarter; r++)
        for (int64_t i = 0; i < n; i += ROW) {
            sum_four(part.x + (r * n + i) * bytes, quarter * n, n - i < ROW ? n - i : ROW, bytes, sums, &unused);
            for (int k = 0; k < 4; k++)
                sum[k * quarter + r] = sums[k] + (i ? sum[k * quarter + r] : 0);
        }
    for (int64_t line = 4 * quarter; line < part.count; line++) {
        sum[line] = 0;
        for (int64_t i = 0; i < n; i += ROW)
            sum[line] += sum_one(part.x + (line * n + i) * bytes, n - i < ROW ? n - i : ROW, bytes, &unused);
    }
}

/* Adds the squares of `rows` lines, four at a time where that divides them, to `some`. */
INLINE void add_rows(const char *x, int64_t rows, Part part, int bytes, float *some)
{
    const int64_t quarter = rows % 4 ? 0 : rows / 4, apart = quarter * part.columns;
    for (int64_t r = 0; r < quarter; r++) {
        const char *line = x + r * part.columns * bytes;
        for (int64_t i = 0; i < part.width; i++) {
            const float a = get(line, i, bytes), b = get(line, i + apart, bytes);
            const float c = get(line, i + 2 * apart, bytes), d = get(line, i + 3 * apart, bytes);
            some[i] += (a * a + b * b) + (c * c + d * d);
        }
    }
    for (int64_t r = 4 * quarter; r < rows; r++)
        for (int64_t i = 0; i < part.width; i++) {
            const float value = get(x, r * part.columns + i, bytes);
            some[i] += value * value;
        }
}

INLINE void sum_columns(Part part, int bytes, double *sum)
{
    float some[STRETCH];
    for (int64_t i = 0; i < part.width; i++)
        sum[i] = 0;
    for (int64_t r = 0; r < part.length; r += FLUSH) {
        const int64_t left = part.length - r;
        memset(some, 0, sizeof some);
        add_rows(part.x + r * part.columns * bytes, left < FLUSH ? left : FLUSH, part, bytes, some);
        for (int64_t i = 0; i < part.width; i++)
            sum[i] += some[i];
    }
}

EVERY_CPU void gradclip_unit_sums(
    int64_t first, int64_t last, const int64_t *address_S, const int32_t *kind_S, const int32_t *first_S,
    const int32_t *segment_C, const int32_t *bytes_K, const int64_t *place_S, double *sum_U)
{
    for (int64_t c = first; c < last; c++) {
        const int64_t s = segment_C[c];
        const int bytes = bytes_K[kind_S[s]];
        const Part part = part_of(c, address_S, first_S, s, place_S, bytes);
        if (part.columns == 0 && bytes == 4)
            sum_lines(part, 4, sum_U + part.unit);
        else if (part.columns == 0)
            sum_lines(part, 2, sum_U + part.unit);
        else if (bytes == 4)
            sum_columns(part, 4, sum_U + part.unit);
        else
            sum_columns(part, 2, sum_U + part.unit);
    }
}

/* Four lines at a time of those that something is asked of, from the four quarters as long as it is of all. */
INLINE void write_lines(Part part, int bytes, const float *scale, const float *bound, int bounded)
{
    const int64_t n = part.length, quarter = (part.count + 3) / 4;
    char *run[4];
    Change by[4];
    int found = 0;
    for (int64_t r = 0; r < quarter; r++)
        for (int64_t line = r; line < part.count; line += quarter) {
            const float limit = bounded ? bound[line] : number(INF);
            if (!is_asked(scale[line], limit))
                continue;
            run[found] = part.x + line * n * bytes;
            by[found++] = change(scale[line], limit);
            if (found == 4) {
                write_four(run, n, bytes, by, bounded);
                found = 0;
            }
        }
    for (int k = 0; k < found; k++)
        write_run(run[k], n, bytes, by[k], bounded);
}

INLINE void write_across(char *x, int64_t n, int bytes, const float *scale, const float *bound, int bounded)
{
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        const float value = get(x, i, bytes) * scale[i];
        set(x, i, bytes, bounded ? clamped(value, bound[i]) : value);
    }
}

INLINE void write_columns(Part part, int bytes, const float *scale, const float *bound)
{
    const int64_t quarter = (part.length + 3) / 4;
    int asked = 0;
    for (int64_t i = 0; i < part.width; i++)
        asked |= is_asked(scale[i], bound ? bound[i] : number(INF));
    for (int64_t r = 0; asked && r < quarter; r++)
        for (int64_t row = r; row < part.length; row += quarter) {
            char *line = part.x + row * part.columns * bytes;
            if (bound)
                write_across(line, part.width, bytes, scale, bound, 1);
            else
                write_across(line, part.width, bytes, scale, 0, 0);
        }
}

EVERY_CPU void gradclip_unit_apply(
    int64_t first, int64_t last, const int64_t *address_S, const int32_t *kind_S, const int32_t *first_S,
    const int32_t *segment_C, const int32_t *bytes_K, const int64_t *place_S, const float *scale_U, const float *bound_U)
{
    for (int64_t c = first; c < last; c++) {
        const int64_t s = segment_C[c];
        const int bytes = bytes_K[kind_S[s]];
        const Part part = part_of(c, address_S, first_S, s, place_S, bytes);
        const float *scale = scale_U + part.unit, *bound = bound_U ? bound_U + part.unit : 0;
        if (part.columns == 0 && bytes == 4 && bound)
            write_lines(part, 4, scale, bound, 1);
        else if (part.columns == 0 && bytes == 4)
            write_lines(part, 4, scale, bound, 0);
        else if (part.columns == 0 && bound)
            write_lines(part, 2, scale, bound, 1);
        else if (part.columns == 0)
            write_lines(part, 2, scale, bound, 0);
        else if (bytes == 4)
            write_columns(part, 4, scale, bound);
        else
            write_columns(part, 2, scale, bound);
    }
}
