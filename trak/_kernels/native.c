/* Sketches of gradients on the CPU: the same numbers as trak._signs, added up faster.

   Plain C behind a C interface, without the headers of Python or PyTorch; native.py loads
   it with ctypes. native.h has the kernels; here is what they share, the choice between their copies, and the threads.
   docs/projections.md states the random numbers to the bit. */

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#ifndef SOURCES
#define SOURCES 0 /* the digest of what this is compiled from; setup.py defines it */
#endif
#define EXPORT __attribute__((visibility("default")))

typedef int64_t num;

enum type { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };
enum domain { DENSE_SIGN, DENSE_NORMAL, SPARSE_SIGN, SPARSE_ROTATION };
enum variant { PORTABLE, AVX2, AVX512 };

/* What native.py asks for. Strides count numbers; the columns of out are adjacent. */
struct task {
  void *out;
  num out_stride, out_type, p;
  const void *x;
  num x_stride, x_step, x_type;
  num rows, columns;   /* of x */
  num offset;          /* position of the first column */
  num blocks;          /* of a sparse sketch */
  num out_rows;        /* of a sketch of segments */
  const num *examples, *positions, *order;
  num key_low, key_high;
  num threads, variant;
  double scale;
  uint32_t *plan; /* NULL, or trak_sparse_plan_bytes of memory for what is drawn */
  num is_drawn;   /* whether it is in there already */
};

struct key {
  uint32_t low, high;
};

struct grads {
  const char *data;
  num row_bytes, step, bytes;
  enum type type;
};

/* The words of some coordinates' signs in every block, and of their chunks' rotations. */
struct plan {
  const uint32_t *words;
  num sign_draws, rotation_draws, blocks;
  num start; /* coordinate of the first sign of each block */
  num chunk; /* chunk of the first rotation of each block */
};

/* Blocks of one size of a sparse sketch. */
struct sparse {
  char *out;
  num out_stride, column; /* column of the first block */
  num first, blocks, m;   /* index of the first block, their number and size */
  struct grads grads;
  num b, k, offset;
  struct key key;
  double scale;
  num super, panel; /* chunks summed before they are added to out, and in registers */
  uint32_t *plan;   /* of the task, or NULL */
  int is_drawn;
  atomic_long next; /* the next super-block to take */
  atomic_long *done; /* super-blocks that are added to each group of rows */
};

/* What will be read next of some rows, asked for part by part. */
struct ahead {
  const char *data;
  num row_bytes, bytes, part;
};

/* Segments of a sparse sketch; blocks come in one or two sizes. */
struct segments {
  const struct task *task;
  struct sparse jobs[2];
  int kinds;
};

struct dense {
  char *out;
  num out_stride, p;
  struct grads grads;
  num b, k, offset;
  const num *rows;                 /* rows of the gradient, in the order to take them */
  const num *examples, *positions; /* of segments, else NULL */
  struct key key;
};

struct kernels {
  int (*sparse)(struct sparse *job, num threads);
  int (*sparse_segments)(struct segments *all, num threads);
  int (*dense)(struct dense *job, num threads);
};

/* One more share of a task. */
struct share {
  void (*run)(void *job, char *memory, num index, num count);
  void *job;
  char *memory;
  num index, count;
};

#define DRAWS 16       /* draws encrypted together */
#define PANEL 2048     /* coordinates of a row kept in the first cache */
#define SUPER 16384    /* and those summed before they are added to out, at least */
#define SUPER_CHUNKS 32
#define SMALL_CHUNKS 4 /* so few chunks are scattered, not gathered */
#define ENTRIES 512    /* signed sums of 64 coordinates */
#define FIELDS 3       /* parts of 16 signs, each of which chooses a sum */
#define SUMMED 16384   /* coordinates summed before they are added to out */
#define DENSE_ROWS 64  /* rows that share a drawing of the signs */
#define DENSE_SHARE 64 /* outputs that are worth a table */

static num smaller(num a, num b) { return a < b ? a : b; }
static num larger(num a, num b) { return a > b ? a : b; }
static num parts_of(num a, num b) { return (a + b - 1) / b; }

/* Set an aligned part of memory aside; with a NULL start, only count it. */
static void *take(char *memory, num *used, num bytes) {
  num at = *used;
  *used = at + (bytes + 63) / 64 * 64;
  return memory ? memory + at : NULL;
}

static inline float from_bfloat16(uint16_t x) {
  uint32_t word = (uint32_t)x << 16;
  float value;
  memcpy(&value, &word, 4);
  return value;
}

static inline float from_float16(uint16_t x) {
  /* Exponent and fraction, moved where float32 has them, are 2**-112 of the value. */
  uint32_t word = (uint32_t)(x & 0x7FFF) << 13;
  float value;
  memcpy(&value, &word, 4);
  value *= 0x1p112f;
  memcpy(&word, &value, 4);
  word |= (uint32_t)((x & 0x7C00) == 0x7C00) * 0x7F800000u;
  word |= (uint32_t)(x & 0x8000) << 16;
  memcpy(&value, &word, 4);
  return value;
}

/* 32 consecutive bits. */
static inline uint32_t bits_at(const uint32_t *words, num bit) {
  uint64_t pair = words[bit >> 5] | (uint64_t)words[(bit >> 5) + 1] << 32;
  return (uint32_t)(pair >> (bit & 31));
}

static inline const uint32_t *block_signs(const struct plan *plan, num block) {
  return plan->words + block * plan->sign_draws * 4;
}

static inline num rotation(const struct plan *plan, num block, num chunk, num m) {
  num at = (plan->blocks * plan->sign_draws + block * plan->rotation_draws) * 4;
  return (num)(((uint64_t)plan->words[at + chunk - plan->chunk] * (uint64_t)m) >> 32);
}

/* Words of the turned signs of a chunk in one block. */
static num sign_words(const struct sparse *job) { return (job->m + 63) / 64 * 2; }

/* Words of a plan for so many chunks: their signs in every block, and the rotations. */
static num plan_words(const struct sparse *job, num chunks) {
  return job->blocks * chunks * (sign_words(job) + 1);
}

static num chunks_of(const struct sparse *job) {
  return (job->offset + job->k + job->m - 1) / job->m - job->offset / job->m;
}

/* Few chunks are scattered, and their signs drawn every time. */
static int is_small(const struct sparse *job) {
  return (job->k + job->m - 1) / job->m + 1 <= SMALL_CHUNKS;
}

/* Write the signs of a chunk in the order of the outputs that they go to. */
static void turn_bits(uint32_t *to, const uint32_t *words, num bit, num m, num by) {
  for (num d = 0; d < m; d += 32) {
    uint32_t word = bits_at(words, bit + d - by + (d < by ? m : 0));
    if (d < by && by - d < 32) {
      const int kept = (int)(by - d);
      word = (word & ((1u << kept) - 1)) | bits_at(words, bit) << kept;
    }
    to[d >> 5] = word;
  }
}

/* Wait until so many super-blocks are added; a turn is short, and others only wait. */
static void await(atomic_long *done, long turn) {
  while (atomic_load_explicit(done, memory_order_acquire) != turn) sched_yield();
}

static num type_bytes(num type) { return type == FLOAT32 ? 4 : type == FLOAT64 ? 8 : 2; }

static struct grads grads_of(const struct task *task) {
  const num bytes = type_bytes(task->x_type);
  return (struct grads){task->x, task->x_stride * bytes, task->x_step, bytes,
                        (enum type)task->x_type};
}

static struct key key_of(const struct task *task) {
  return (struct key){(uint32_t)task->key_low, (uint32_t)task->key_high};
}

static void *start_share(void *argument) {
  struct share *share = argument;
  share->run(share->job, share->memory, share->index, share->count);
  return NULL;
}

/* Run as many shares of a job as there are threads; each gets `bytes` of memory.

   Shares are independent, so one whose thread cannot be started runs here. Threads live
   as long as the call: nothing is left that a fork could break. */
static int run_shares(void (*run)(void *, char *, num, num), void *job, num threads,
                      num bytes) {
  bytes = (bytes + 4159) / 64 * 64; /* and a page apart */
  char *memory = NULL;
  if (threads < 1) threads = 1;
  if (posix_memalign((void **)&memory, 64, (size_t)(bytes * threads))) return 1;
  struct share *shares = malloc((size_t)threads * sizeof *shares);
  pthread_t *ids = malloc((size_t)threads * sizeof *ids);
  char *started = calloc((size_t)threads, 1);
  const int failed = !shares || !ids || !started;
  if (!failed) {
    for (num i = threads - 1; i >= 0; i--) {
      shares[i] = (struct share){run, job, memory + i * bytes, i, threads};
      started[i] = i && !pthread_create(&ids[i], NULL, start_share, &shares[i]);
    }
    for (num i = 0; i < threads; i++)
      if (!started[i]) start_share(&shares[i]);
    for (num i = 0; i < threads; i++)
      if (started[i]) pthread_join(ids[i], NULL);
  }
  free(started);
  free(ids);
  free(shares);
  free(memory);
  return failed;
}

#define JOIN2(a, b) a##_##b
#define JOIN(a, b) JOIN2(a, b)

#define REAL float
#define WORD uint32_t
#define KIND(x) JOIN(x, f32)
#include "native_variants.h"
#undef REAL
#undef WORD
#undef KIND

#define REAL double
#define WORD uint64_t
#define KIND(x) JOIN(x, f64)
#include "native_variants.h"

static const struct kernels *kernels_of(const struct task *task) {
  const struct kernels *all[2][3] = {
      {&kernels_f32_portable},
      {&kernels_f64_portable},
  };
#ifdef __x86_64__
  all[0][AVX2] = &kernels_f32_avx2;
  all[1][AVX2] = &kernels_f64_avx2;
  all[0][AVX512] = &kernels_f32_avx512;
  all[1][AVX512] = &kernels_f64_avx512;
#endif
  return all[task->out_type == FLOAT64][task->variant];
}

/* Describe the blocks of one size of a sparse sketch; return whether there are any. */
static int describe(struct sparse *job, const struct task *task, int kind) {
  const num small = task->p / task->blocks, more = task->p % task->blocks;
  memset(job, 0, sizeof *job);
  job->m = small + (kind == 0);
  job->first = kind == 0 ? 0 : more;
  job->blocks = kind == 0 ? more : task->blocks - more;
  job->column = kind == 0 ? 0 : more * (small + 1);
  job->out = task->out;
  job->out_stride = task->out_stride;
  job->grads = grads_of(task);
  job->b = task->rows;
  job->k = task->columns;
  job->offset = task->offset;
  job->key = key_of(task);
  job->scale = task->scale;
  job->super = larger(SUPER_CHUNKS, SUPER / job->m);
  job->panel = larger(1, PANEL / job->m);
  job->is_drawn = task->plan && task->is_drawn;
  return job->blocks > 0;
}

/* The most advanced variant that this processor has. */
EXPORT num trak_best_variant(void) {
#ifdef __x86_64__
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return AVX512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
  return PORTABLE;
}

EXPORT uint64_t trak_sources(void) { return SOURCES; }

/* Describe the blocks of both sizes, each with its part of the plan; return its words. */
static num describe_both(struct sparse jobs[2], const struct task *task) {
  num words = 0;
  for (int kind = 0; kind < 2; kind++) {
    struct sparse *job = &jobs[kind];
    if (!describe(job, task, kind) || is_small(job)) continue;
    if (task->plan) job->plan = task->plan + words;
    words += plan_words(job, chunks_of(job));
  }
  return words;
}

/* Memory for what a sparse sketch draws, which later ones of as many of the same
   coordinates need not draw again. */
EXPORT num trak_sparse_plan_bytes(const struct task *task) {
  struct sparse jobs[2];
  return 4 * describe_both(jobs, task);
}

/* These return 0, or 1 where memory ran out; then the sketch is not complete. */

EXPORT num trak_sparse(const struct task *task) {
  struct sparse jobs[2];
  atomic_long *done[2] = {NULL, NULL};
  int failed = 0;
  describe_both(jobs, task);
  for (int kind = 0; kind < 2; kind++)
    if (jobs[kind].blocks > 0) {
      done[kind] = calloc((size_t)task->rows, sizeof **done);
      jobs[kind].done = done[kind];
      failed |= !done[kind];
    }
  for (int kind = 0; kind < 2 && !failed; kind++)
    if (jobs[kind].blocks > 0)
      failed = kernels_of(task)->sparse(&jobs[kind], task->threads);
  free(done[0]);
  free(done[1]);
  return failed;
}

EXPORT num trak_sparse_segments(const struct task *task) {
  struct segments all = {.task = task};
  for (int kind = 0; kind < 2; kind++)
    all.kinds += describe(&all.jobs[all.kinds], task, kind);
  return kernels_of(task)->sparse_segments(&all, task->threads);
}

EXPORT num trak_dense(const struct task *task) {
  struct dense job = {
      .out = task->out,
      .out_stride = task->out_stride,
      .p = task->p,
      .grads = grads_of(task),
      .b = task->rows,
      .k = task->columns,
      .offset = task->offset,
      .rows = task->order,
      .examples = task->examples,
      .positions = task->positions,
      .key = key_of(task),
  };
  return kernels_of(task)->dense(&job, task->threads);
}
