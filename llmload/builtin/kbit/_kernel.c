/* bitsandbytes' 4-bit quantisation of whole blocks on the CPU, bit by bit: see _compiled.py.

   A value counts as value * (1 / largest magnitude of its block), rounded to float as there. Its code
   is counted down from the top one by what passing each bound takes away. A byte holds the codes of
   two values: the first ones of WIDTH pairs are looked at together, beside the second ones. */

#include <stdint.h>
#include <string.h>

#define BOUNDS 15
#define WIDTH 16 /* every block is a multiple of as many pairs */

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU
#endif

typedef float floats __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t words __attribute__((vector_size(4 * WIDTH)));

/* How stored values become floats; 2^112 moves an exponent from its bias of 15 to that of 127. */
#define FROM_bfloat16(bits) ((floats)((bits) << 16))
#define FROM_float16(bits)                                                                         \
    ((floats)((words)((floats)(((bits) & 0x7fff) << 13) * 0x1p112f) | ((bits) & 0x8000) << 16))
#define FROM_float32(bits) ((floats)(bits))

/* The first and the second ones of WIDTH pairs. */
#define SPLIT_uint16_t(pairs, even, odd)                                                           \
    memcpy(&odd, pairs, sizeof odd);                                                               \
    even = odd & 0xffff;                                                                           \
    odd >>= 16
#define SPLIT_uint32_t(pairs, even, odd)                                                           \
    for (int i = 0; i < WIDTH; i++) {                                                              \
        even[i] = (pairs)[2 * i];                                                                  \
        odd[i] = (pairs)[2 * i + 1];                                                               \
    }

/* Returns 1, or 0 at the first block that holds NaN or infinity.
   values: blocks * size of them; packed: half as many bytes; absmax: one for each block. */
#define QUANTISE(DTYPE, BITS, INFINITE)                                                            \
    FOR_EACH_CPU int quantise_##DTYPE(const BITS *values, int64_t blocks, int64_t size,            \
                                      const float *bounds, const int32_t *steps, int32_t top,      \
                                      uint8_t *packed, float *absmax) {                            \
        for (int64_t block = 0; block < blocks; block++, values += size) {                         \
            BITS largest = 0;                                                                      \
            for (int64_t i = 0; i < size; i++) {                                                   \
                BITS magnitude = values[i] & (BITS)((BITS)-1 >> 1);                                \
                largest = magnitude > largest ? magnitude : largest;                               \
            }                                                                                      \
            if (largest >= INFINITE)                                                               \
                return 0;                                                                          \
            words bits = {largest};                                                                \
            float magnitude = FROM_##DTYPE(bits)[0];                                               \
            float inverse = 1.0f / (magnitude < 1e-38f ? 1e-38f : magnitude);                      \
            absmax[block] = magnitude;                                                             \
            for (int64_t start = 0; start < size; start += 2 * WIDTH, packed += WIDTH) {           \
                words even, odd;                                                                   \
                SPLIT_##BITS(values + start, even, odd);                                           \
                floats first = FROM_##DTYPE(even) * inverse, second = FROM_##DTYPE(odd) * inverse; \
                words upper = {0}, lower = {0};                                                    \
                for (int j = 0; j < BOUNDS; j++) {                                                 \
                    upper += (words)(first <= bounds[j]) & (uint32_t)steps[j];                     \
                    lower += (words)(second <= bounds[j]) & (uint32_t)steps[j];                    \
                }                                                                                  \
                words codes = ((uint32_t)top - upper) << 4 | ((uint32_t)top - lower);              \
                for (int i = 0; i < WIDTH; i++)                                                    \
                    packed[i] = (uint8_t)codes[i];                                                 \
            }                                                                                      \
        }                                                                                          \
        return 1;                                                                                  \
    }

QUANTISE(bfloat16, uint16_t, 0x7f80)
QUANTISE(float16, uint16_t, 0x7c00)
QUANTISE(float32, uint32_t, 0x7f800000)
