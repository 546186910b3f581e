/* The kernels of one type of sum, for every instruction set; included by native.c, which
   defines REAL, WORD, and KIND(x), a name of this type's. */

#define VECTOR 16
#ifdef __x86_64__
#define MULTIPLY(a, b) ((DRAW)_mm_mul_epu32((__m128i)(a), _mm_set1_epi64x(b)))
#else
#define MULTIPLY(a, b) (((a) & 0xFFFFFFFFu) * (uint64_t)(b))
#endif
#define TARGET
#define NAME(x) JOIN(KIND(x), portable)
#define ROWS 4
#define SHIFTS 0 /* whether every lane can be shifted by its own amount */
#include "native.h"
#undef VECTOR
#undef MULTIPLY
#undef TARGET
#undef NAME
#undef ROWS
#undef SHIFTS

#ifdef __x86_64__
#define VECTOR 32
#define MULTIPLY(a, b) ((DRAW)_mm256_mul_epu32((__m256i)(a), _mm256_set1_epi64x(b)))
#define TARGET __attribute__((target("avx2,fma")))
#define NAME(x) JOIN(KIND(x), avx2)
#define ROWS 2
#define SHIFTS 1
#include "native.h"
#undef VECTOR
#undef MULTIPLY
#undef TARGET
#undef NAME
#undef ROWS
#undef SHIFTS

#define VECTOR 64
#define MULTIPLY(a, b) ((DRAW)_mm512_mul_epu32((__m512i)(a), _mm512_set1_epi64(b)))
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#define NAME(x) JOIN(KIND(x), avx512)
#define ROWS 1
#define SHIFTS 1
#include "native.h"
#undef VECTOR
#undef MULTIPLY
#undef TARGET
#undef NAME
#undef ROWS
#undef SHIFTS
#endif
