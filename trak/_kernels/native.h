/* The kernels, once for every type of sum and instruction set; included by
   native_variants.h, which defines

   REAL, WORD  a floating-point type, and the unsigned integer of its size;
   VECTOR      bytes of a vector register;
   MULTIPLY    a product of the low halves of 64-bit words, by a constant;
   ROWS        rows of a sparse sketch that share a sign;
   TARGET      a function attribute that names the instruction set;
   SHIFTS      whether that shifts every lane by its own amount;
   NAME(x)     a name of this inclusion.

   The order in which numbers are added depends neither on LANES nor on the number of
   threads, so all inclusions for one REAL return the same bits. */

typedef REAL NAME(vec) __attribute__((vector_size(VECTOR)));
typedef WORD NAME(uvec) __attribute__((vector_size(VECTOR)));
/* The same, at any address. */
typedef REAL NAME(avec) __attribute__((vector_size(VECTOR), aligned(sizeof(REAL)),
                                       may_alias));
#define VEC NAME(vec)
#define UVEC NAME(uvec)
#define AVEC NAME(avec)
typedef uint64_t NAME(draws) __attribute__((vector_size(VECTOR)));
typedef uint16_t NAME(halves) __attribute__((vector_size(VECTOR), may_alias));
#define DRAW NAME(draws)
#define HALF NAME(halves)
#define LANES (VECTOR / (int)sizeof(REAL)) /* numbers in a vector register */
#define BITS (8 * (int)sizeof(WORD))
#define SIGN ((WORD)1 << (BITS - 1))
#define FN static TARGET
#define INLINE static inline TARGET __attribute__((always_inline))
/* Vectors of outputs of a row that are summed together: of small blocks, and of others. */
#define FEW 2
#define MANY 4

/* Copy numbers of one row, of any type and stride, to consecutive REALs. */
FN void NAME(load)(REAL *restrict to, const struct grads *g, num row, num first, num n) {
  const char *at = g->data + row * g->row_bytes + first * g->step * g->bytes;
  const num step = g->step;
#define CONVERT(from, value)                                   \
  {                                                            \
    const from *restrict x = (const from *)at;                 \
    if (step == 1)                                             \
      for (num i = 0; i < n; i++) to[i] = (REAL)value(x[i]);   \
    else                                                       \
      for (num i = 0; i < n; i++) to[i] = (REAL)value(x[i * step]); \
    break;                                                     \
  }
  switch (g->type) {
    case FLOAT32: CONVERT(float, )
    case FLOAT64: CONVERT(double, )
    case BFLOAT16: CONVERT(uint16_t, from_bfloat16)
    case FLOAT16: CONVERT(uint16_t, from_float16)
  }
#undef CONVERT
}

/* Encrypt DRAWS counters at once, each word in the low half of a 64-bit one. */
FN void NAME(philox)(uint64_t c[4][DRAWS], uint32_t words[4][DRAWS], struct key key) {
  for (int i = 0; i < DRAWS; i += VECTOR / 8) {
    DRAW c0 = *(DRAW *)(c[0] + i), c1 = *(DRAW *)(c[1] + i);
    DRAW c2 = *(DRAW *)(c[2] + i), c3 = *(DRAW *)(c[3] + i);
    uint32_t low = key.low, high = key.high;
    for (int round = 0; round < 7; round++) {
      const DRAW first = MULTIPLY(c0, 0xD2511F53u), second = MULTIPLY(c2, 0xCD9E8D57u);
      c0 = (second >> 32) ^ c1 ^ (uint64_t)low;
      c2 = (first >> 32) ^ c3 ^ (uint64_t)high;
      c1 = second; /* what is in the high halves is never looked at */
      c3 = first;
      low += 0x9E3779B9u;
      high += 0xBB67AE85u;
    }
    const DRAW all[4] = {c0, c1, c2, c3};
    for (int w = 0; w < 4; w++)
      for (int n = 0; n < VECTOR / 8; n++) words[w][i + n] = (uint32_t)all[w][n];
  }
}

/* Draw the signs of coordinates start..stop, and the rotations of their chunks, for every
   block; `words` has room for DRAWS draws more than that. */
FN struct plan NAME(draw)(uint32_t *restrict words, const struct sparse *job, num start,
                          num stop) {
  uint64_t c[4][DRAWS] __attribute__((aligned(64)));
  uint32_t drawn[4][DRAWS] __attribute__((aligned(64)));
  const num first = start / 128, first_chunk = start / job->m / 4;
  struct plan plan = {
      .words = words,
      .sign_draws = (stop + 127) / 128 - first,
      .rotation_draws = ((stop + job->m - 1) / job->m + 3) / 4 - first_chunk,
      .blocks = job->blocks,
      .start = first * 128,
      .chunk = first_chunk * 4,
  };
  num block = 0, draw = 0, domain = SPARSE_SIGN;
  const num total = plan.blocks * (plan.sign_draws + plan.rotation_draws);
  for (num done = 0; done < total; done += DRAWS) {
    for (int i = 0; i < DRAWS; i++) {
      const num index = draw + (domain == SPARSE_SIGN ? first : first_chunk);
      c[0][i] = (uint64_t)index;
      c[1][i] = (uint64_t)index >> 32;
      c[2][i] = (uint64_t)(job->first + block);
      c[3][i] = (uint64_t)domain;
      if (++draw < (domain == SPARSE_SIGN ? plan.sign_draws : plan.rotation_draws))
        continue;
      draw = 0;
      if (++block < plan.blocks) continue;
      block = 0;
      domain = SPARSE_ROTATION;
    }
    NAME(philox)(c, drawn, job->key);
    for (int i = 0; i < DRAWS; i++)
      for (int w = 0; w < 4; w++) words[(done + i) * 4 + w] = drawn[w][i];
  }
  return plan;
}

/* Where the LANES bits of a word from `first` on are, at most its last. */
INLINE UVEC NAME(lanes)(num first) {
  UVEC lane;
#if SHIFTS
  for (int i = 0; i < LANES; i++) lane[i] = (WORD)(BITS - 1 - first - i);
#else
  for (int i = 0; i < LANES; i++) lane[i] = (WORD)1 << (first + i);
#endif
  return lane;
}

/* Numbers whose top bits are those bits of a word; the others are noise. */
INLINE UVEC NAME(flips)(uint32_t word, UVEC lanes) {
#if SHIFTS
  return ((UVEC){} + (WORD)word) << lanes;
#else
  return (UVEC)((((UVEC){} + (WORD)word) & lanes) == lanes);
#endif
}

/* What a share of a sparse sketch needs. */
struct NAME(space) {
  uint32_t *words;
  uint32_t *bits, *rotations; /* of the chunks of a super-block, in every block */
  num chunks, bits_stride;    /* their number, and words of a chunk's signs */
  REAL *x, *acc;
  num tile;   /* outputs that are summed together */
  num stride; /* numbers of a chunk, and of a block's sums */
  num bytes;
};

static struct NAME(space) NAME(spaces)(const struct sparse *job, char *memory) {
  struct NAME(space) s = {.tile = (job->m > FEW * LANES ? MANY : FEW) * LANES,
                          .bits_stride = sign_words(job)};
  s.stride = (parts_of(job->m, s.tile) + 1) * s.tile;
  const num m = job->m, n = job->super;
  const num draws = job->blocks * (n * m / 128 + 2 + n / 4 + 2) + DRAWS;
  s.words = take(memory, &s.bytes, job->is_drawn ? 0 : 16 * draws);
  s.bits = take(memory, &s.bytes, job->plan ? 0 : 4 * plan_words(job, n));
  s.x = take(memory, &s.bytes, (num)sizeof(REAL) * ROWS * job->panel * s.stride);
  s.acc = take(memory, &s.bytes, (num)sizeof(REAL) * ROWS * job->blocks * s.stride);
  return s;
}

/* Copy a chunk of one row, zero outside the gradient, and continue it cyclically. */
FN void NAME(load_chunk)(REAL *restrict to, const struct sparse *job, num tile,
                         num row, num chunk) {
  const num m = job->m, begin = chunk * m - job->offset;
  const num lo = larger(0, -begin), hi = smaller(m, job->k - begin);
  for (num i = 0; i < lo; i++) to[i] = 0;
  NAME(load)(to + lo, &job->grads, row, begin + lo, hi - lo);
  for (num i = hi; i < m; i++) to[i] = 0;
  for (num i = 0; i < tile; i++) to[m + i] = to[i];
}

/* Ask for a part of the numbers that the next panel will be loaded from, while there is
   something to compute. */
INLINE void NAME(ask)(const struct ahead *ahead, num part, int rows) {
  const num end = smaller(ahead->bytes, (part + 1) * ahead->part);
  for (num at = part * ahead->part; at < end; at += 64)
    for (int row = 0; row < rows; row++)
      __builtin_prefetch(ahead->data + row * ahead->row_bytes + at, 0, 2);
}

/* Add `n` chunks of `rows` rows, in s->x from the `at`-th of their super-block on, to
   one block's sums; an output is summed in a register. */
INLINE void NAME(gather)(const struct sparse *job, const struct NAME(space) *s,
                         num block, num at, num n, const int rows,
                         const int vectors, const struct ahead *ahead) {
  const num stride = s->stride, m = job->m;
  const uint32_t *by = s->rotations + block * s->chunks + at;
  const uint32_t *bits = s->bits + (block * s->chunks + at) * s->bits_stride;
  REAL *restrict acc = s->acc + block * stride;
  num part = block * parts_of(m, vectors * LANES);
  for (num d = 0; d < m; d += vectors * LANES) {
    VEC sum[ROWS][MANY] = {};
    UVEC lanes[MANY];
    for (int t = 0; t < vectors; t++)
      lanes[t] = NAME(lanes)((d & 31) + (t * LANES & 31));
    NAME(ask)(ahead, part++, rows);
    for (num c = 0; c < n; c++) {
      const num turned = d - (num)by[c];
      const REAL *from = s->x + c * rows * stride + turned + (turned < 0 ? m : 0);
      const uint32_t *words = bits + c * s->bits_stride + (d >> 5);
      for (int t = 0; t < vectors; t++) {
        const UVEC flip = NAME(flips)(words[t * LANES >> 5], lanes[t]) & SIGN;
        for (int row = 0; row < rows; row++) {
          const VEC v = *(const AVEC *)(from + row * stride + t * LANES);
          sum[row][t] += (VEC)((UVEC)v ^ flip);
        }
      }
    }
    for (int row = 0; row < rows; row++)
      for (int t = 0; t < vectors; t++)
        *(VEC *)(acc + row * job->blocks * stride + d + t * LANES) += sum[row][t];
  }
}

/* Sum chunks first..last of `rows` rows into s->acc. */
INLINE void NAME(sum_rows)(const struct sparse *job, const struct NAME(space) *s,
                           num row, const int rows, const int vectors, num first,
                           num last) {
  const struct grads *g = &job->grads;
  const num parts = job->blocks * parts_of(job->m, vectors * LANES);
  memset(s->acc, 0, sizeof(REAL) * (size_t)(rows * job->blocks * s->stride));
  for (num c = first; c < last; c += job->panel) {
    const num n = smaller(job->panel, last - c);
    const num next = (c + n) * job->m - job->offset;
    const num ahead_n = smaller(larger(0, job->k - next), job->panel * job->m);
    const struct ahead ahead = {
        .data = g->data + row * g->row_bytes + next * g->bytes,
        .row_bytes = g->row_bytes,
        .bytes = g->step == 1 ? ahead_n * g->bytes : 0,
        .part = (ahead_n * g->bytes / parts + 64) / 64 * 64,
    };
    for (num i = 0; i < n; i++)
      for (int j = 0; j < rows; j++)
        NAME(load_chunk)(s->x + (i * rows + j) * s->stride, job, s->tile, row + j, c + i);
    for (num r = 0; r < job->blocks; r++)
      NAME(gather)(job, s, r, c - first, n, rows, vectors, &ahead);
  }
}

FN void NAME(sum_many)(const struct sparse *job, const struct NAME(space) *s, num row,
                       num first, num last) {
  if (s->tile > FEW * LANES && ROWS <= 2)
    NAME(sum_rows)(job, s, row, ROWS, MANY, first, last);
  else /* there are no registers for more */
    NAME(sum_rows)(job, s, row, ROWS, FEW, first, last);
}

FN void NAME(sum_one)(const struct sparse *job, const struct NAME(space) *s, num row,
                      num first, num last) {
  if (s->tile > FEW * LANES)
    NAME(sum_rows)(job, s, row, 1, MANY, first, last);
  else
    NAME(sum_rows)(job, s, row, 1, FEW, first, last);
}

/* Add s->acc to the outputs of `rows` rows. */
FN void NAME(add_rows)(const struct sparse *job, const struct NAME(space) *s, num row,
                       int rows) {
  const REAL scale = (REAL)job->scale;
  for (int i = 0; i < rows; i++)
    for (num r = 0; r < job->blocks; r++) {
      REAL *restrict out =
          (REAL *)job->out + (row + i) * job->out_stride + job->column + r * job->m;
      const REAL *restrict acc = s->acc + (i * job->blocks + r) * s->stride;
      for (num d = 0; d < job->m; d++) out[d] += scale * acc[d];
    }
}

/* Draw the signs and rotations of chunks first..last, in the order of the outputs. */
FN void NAME(turn)(const struct sparse *job, const struct NAME(space) *s, num first,
                   num last) {
  const num m = job->m;
  const struct plan plan = NAME(draw)(s->words, job, first * m, last * m);
  for (num r = 0, at = 0; r < job->blocks; r++)
    for (num c = first; c < last; c++, at++) {
      const num by = rotation(&plan, r, c, m);
      s->rotations[at] = (uint32_t)by;
      turn_bits(s->bits + at * s->bits_stride, block_signs(&plan, r),
                c * m - plan.start, m, by);
    }
}

/* Sum super-blocks of chunks until none is left; each waits for its turn to be added. */
FN void NAME(sparse_share)(void *argument, char *memory, num index, num count) {
  struct sparse *job = argument;
  struct NAME(space) s = NAME(spaces)(job, memory);
  const num m = job->m, begin = job->offset / m;
  const num end = (job->offset + job->k + m - 1) / m, base = begin / job->super;
  for (;;) {
    const long turn = atomic_fetch_add(&job->next, 1);
    if ((base + turn) * job->super >= end) return;
    const num first = larger(begin, (base + turn) * job->super);
    const num last = smaller(end, (base + turn + 1) * job->super);
    if (job->plan) s.bits = job->plan + plan_words(job, first - begin);
    s.chunks = last - first;
    s.rotations = s.bits + job->blocks * s.chunks * s.bits_stride;
    if (!job->is_drawn) NAME(turn)(job, &s, first, last);
    for (num row = 0, group = 0; row < job->b; group++) {
      const int rows = job->b - row < ROWS ? 1 : ROWS;
      (rows == ROWS ? NAME(sum_many) : NAME(sum_one))(job, &s, row, first, last);
      await(&job->done[group], turn);
      NAME(add_rows)(job, &s, row, rows);
      atomic_store_explicit(&job->done[group], turn + 1, memory_order_release);
      row += rows;
    }
  }
}

#include "native_scatter.h"

FN int NAME(sparse)(struct sparse *job, num threads) {
  const num chunks = (job->k + job->m - 1) / job->m + 1;
  const num plan_draws = job->blocks * (job->k / 128 + chunks / 4 + 5) + DRAWS;
  if (is_small(job)) {
    const num bytes = (num)sizeof(REAL) * job->k + 64 + 16 * plan_draws;
    return run_shares(NAME(small_share), job, 1, bytes);
  }
  return run_shares(NAME(sparse_share), job, smaller(threads, chunks / job->super + 1),
                    NAME(spaces)(job, NULL).bytes);
}

#include "native_dense.h"

static const struct kernels NAME(kernels) = {NAME(sparse), NAME(sparse_segments),
                                             NAME(dense)};
