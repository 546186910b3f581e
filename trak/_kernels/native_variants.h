/* The kernels of one type of sum, for every instruction set; included by native.c, which
   defines REAL, WORD, and KIND(x), a name of this type's. */

#define LANES (16 / (int)sizeof(REAL))
#define TARGET
#define NAME(x) JOIN(KIND(x), portable)
#define SHIFTS 0 /* whether every lane can be shifted by its own amount */
#include "native.h"
#undef LANES
#undef TARGET
#undef NAME
#undef SHIFTS

#ifdef __x86_64__
#define LANES (32 / (int)sizeof(REAL))
#define TARGET __attribute__((target("avx2,fma")))
#define NAME(x) JOIN(KIND(x), avx2)
#define SHIFTS 1
#include "native.h"
#undef LANES
#undef TARGET
#undef NAME
#undef SHIFTS

#define LANES (64 / (int)sizeof(REAL))
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#define NAME(x) JOIN(KIND(x), avx512)
#define SHIFTS 1
#include "native.h"
#undef LANES
#undef TARGET
#undef NAME
#undef SHIFTS
#endif
