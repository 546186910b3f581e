/* Sparse sketches that are added to their outputs one coordinate run at a time: of few
   coordinates, and of segments; included by native.h. */

/* Add signed numbers to consecutive outputs. */
FN void NAME(add_run)(REAL *restrict out, const REAL *restrict x, num n,
                      const uint32_t *words, num bit, REAL scale) {
  const UVEC first = NAME(lanes)(0);
  num i = 0;
  for (; i + LANES <= n; i += LANES) {
    const UVEC flip = NAME(flips)(bits_at(words, bit + i), first) & SIGN;
    *(AVEC *)(out + i) += scale * (VEC)((UVEC) * (const AVEC *)(x + i) ^ flip);
  }
  for (; i < n; i++) {
    const num at = bit + i;
    out[i] += scale * (words[at >> 5] >> (at & 31) & 1 ? -x[i] : x[i]);
  }
}

/* Add coordinates start..start+n of one row to its sketch. */
FN void NAME(scatter)(REAL *out, const REAL *x, num n, num start,
                      const struct sparse *job, const struct plan *plan) {
  const num m = job->m;
  const REAL scale = (REAL)job->scale;
  for (num r = 0; r < job->blocks; r++, out += m) {
    const uint32_t *words = block_signs(plan, r);
    for (num i = 0; i < n;) {
      const num chunk = (start + i) / m, inside = (start + i) % m;
      const num by = rotation(plan, r, chunk, m);
      const num to = inside + by < m ? inside + by : inside + by - m;
      const num run = smaller(smaller(m - inside, m - to), n - i);
      NAME(add_run)(out + to, x + i, run, words, start + i - plan->start, scale);
      i += run;
    }
  }
}

/* The sketch of few chunks, which needs no sums of its own. */
FN void NAME(small_share)(void *argument, char *memory, num index, num count) {
  const struct sparse *job = argument;
  num used = 0;
  REAL *x = take(memory, &used, (num)sizeof(REAL) * job->k);
  uint32_t *words = take(memory, &used, 0);
  const struct plan plan =
      NAME(draw)(words, job, job->offset, job->offset + job->k);
  for (num row = 0; row < job->b; row++) {
    NAME(load)(x, &job->grads, row, 0, job->k);
    NAME(scatter)((REAL *)job->out + row * job->out_stride + job->column, x, job->k,
                  job->offset, job, &plan);
  }
}

/* Share `index` of the segments: those of its share of the sketch's rows. */
FN void NAME(segments_share)(void *argument, char *memory, num index, num count) {
  const struct segments *all = argument;
  const struct task *task = all->task;
  const num low = task->out_rows * index / count;
  const num high = task->out_rows * (index + 1) / count;
  num used = 0;
  REAL *x = take(memory, &used, (num)sizeof(REAL) * task->columns);
  uint32_t *words = take(memory, &used, 0);
  for (num i = 0; i < task->rows; i++) {
    const num row = task->examples[i], start = task->positions[i];
    if (row < low || row >= high) continue;
    NAME(load)(x, &all->jobs[0].grads, i, 0, task->columns);
    for (int k = 0; k < all->kinds; k++) {
      const struct sparse *job = &all->jobs[k];
      const struct plan plan = NAME(draw)(words, job, start, start + task->columns);
      REAL *out = (REAL *)job->out + row * job->out_stride + job->column;
      NAME(scatter)(out, x, task->columns, start, job, &plan);
    }
  }
}

FN int NAME(sparse_segments)(struct segments *all, num threads) {
  num draws = 0;
  for (int k = 0; k < all->kinds; k++) {
    const struct sparse *job = &all->jobs[k];
    const num each = all->task->columns / 128 + all->task->columns / job->m / 4 + 6;
    draws = larger(draws, job->blocks * each + DRAWS);
  }
  const num bytes = (num)sizeof(REAL) * all->task->columns + 64 + 16 * draws;
  return run_shares(NAME(segments_share), all, smaller(threads, all->task->out_rows),
                    bytes);
}
