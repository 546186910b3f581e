/* The dense projection by the method of four Russians: sums of a few coordinates under
   all their signs are made once, and looked up for every output. Rows are in the lanes.

   Included by native.h, whose macros it uses. */


/* All signs of 2 numbers, of 3, and of two such groups. */
INLINE void NAME(two)(VEC *t, VEC a, VEC b) {
  t[0] = a + b;
  t[1] = b - a;
  t[2] = a - b;
  t[3] = -t[0];
}

INLINE void NAME(three)(VEC *t, VEC a, VEC b, VEC c) {
  NAME(two)(t + 4, a, b);
  for (int i = 0; i < 4; i++) {
    t[i] = t[4 + i] + c;
    t[4 + i] -= c;
  }
}

INLINE void NAME(pairs)(VEC *t, const VEC *a, int na, const VEC *b, int nb) {
  for (int j = 0; j < nb; j++)
    for (int i = 0; i < na; i++) t[j * na + i] = a[i] + b[j];
}

/* Make the tables of 64 coordinates of the rows in the lanes. For each 16 of them, whose
   signs are 2**16: a table of 6 coordinates, or 64 sums, and two of 5. */
FN void NAME(build)(VEC *restrict t, const REAL *restrict x) {
  for (int q = 0; q < 4; q++, t += 128, x += 16) {
    VEC c[16], a[8], b[8];
    for (int f = 0; f < 16; f++) {
      VEC v = {};
      for (int lane = 0; lane < LANES; lane++) v[lane] = x[lane * 128 + f];
      c[f] = v;
    }
    NAME(three)(a, c[0], c[1], c[2]);
    NAME(three)(b, c[3], c[4], c[5]);
    NAME(pairs)(t, a, 8, b, 8);
    for (int f = 6; f < 16; f += 5) {
      NAME(two)(a, c[f], c[f + 1]);
      NAME(three)(b, c[f + 2], c[f + 3], c[f + 4]);
      NAME(pairs)(t + (f == 6 ? 64 : 96), a, 4, b, 8);
    }
  }
}

/* Add 128 coordinates of the rows in the lanes to outputs 0..width. */
FN void NAME(look_up)(REAL *restrict sums, const REAL *restrict x,
                      REAL *restrict tables, const uint16_t *restrict offsets,
                      num width) {
  for (int half = 0; half < 2; half++) {
    NAME(build)((VEC *)tables, x + 64 * half);
    VEC *restrict acc = (VEC *)sums;
    const uint16_t *at = offsets + half * 2 * FIELDS * 2 * DRAWS;
    for (num j = 0; j < width; j += DRAWS, at += 4 * FIELDS * 2 * DRAWS)
      for (int i = 0; i < DRAWS; i++, acc++) {
        VEC part[4];
        for (int q = 0; q < 4; q++) {
          const REAL *table = tables + 128 * q * LANES;
          const uint16_t *field = at + (q / 2 * FIELDS * DRAWS + i) * 2 + q % 2;
          part[q] = *(const VEC *)(table + field[0]) +
                    *(const VEC *)(table + 64 * LANES + field[2 * DRAWS]) +
                    *(const VEC *)(table + 96 * LANES + field[4 * DRAWS]);
        }
        *acc += (part[0] + part[1]) + (part[2] + part[3]);
      }
  }
}

/* What a share of a dense sketch needs. */
struct NAME(room) {
  uint16_t *offsets; /* where each output's sums are in the tables */
  REAL *x;           /* 128 coordinates of the rows in the lanes */
  REAL *tables, *acc;
  num width; /* outputs, in whole draws */
  num bytes;
};

static struct NAME(room) NAME(rooms)(num rows, num outputs, char *memory) {
  struct NAME(room) s = {.width = (outputs + DRAWS - 1) / DRAWS * DRAWS};
  const num lanes = (rows + LANES - 1) / LANES * LANES, real = sizeof(REAL);
  s.offsets = take(memory, &s.bytes, 2 * 8 * FIELDS * s.width);
  s.x = take(memory, &s.bytes, real * LANES * 128);
  s.tables = take(memory, &s.bytes, real * LANES * ENTRIES);
  s.acc = take(memory, &s.bytes, real * lanes * s.width);
  return s;
}

/* Draw the signs of 128 coordinates for outputs low and on, as offsets into tables. */
FN void NAME(draw_dense)(const struct NAME(room) *s, const struct dense *job, num draw,
                         num low) {
  static const uint16_t first[FIELDS] = {0, 6, 11}, mask[FIELDS] = {63, 31, 31};
  uint64_t c[4][DRAWS] __attribute__((aligned(64)));
  uint32_t drawn[4][DRAWS] __attribute__((aligned(64)));
  HALF *to = (HALF *)s->offsets;
  for (num j = 0; j < s->width; j += DRAWS) {
    for (int i = 0; i < DRAWS; i++) {
      c[0][i] = (uint64_t)draw;
      c[1][i] = (uint64_t)draw >> 32;
      c[2][i] = (uint64_t)(low + j + i);
      c[3][i] = DENSE_SIGN;
    }
    NAME(philox)(c, drawn, job->key);
    for (int w = 0; w < 4; w++)
      for (int field = 0; field < FIELDS; field++)
        for (int i = 0; i < DRAWS * 4 / VECTOR; i++) {
          HALF entry = ((const HALF *)drawn[w])[i] >> first[field];
          entry &= mask[field];
          *to++ = entry * (uint16_t)LANES;
        }
  }
}

/* Add the sketch of coordinates start..stop, at most SUMMED of them, of some rows of the
   gradient: those that `rows` lists. */
FN void NAME(dense_piece)(const struct dense *job, const struct NAME(room) *s,
                          const num *rows, num n, num position, num start, num stop,
                          num low, num high) {
  const num outputs = high - low;
  memset(s->acc, 0, sizeof(REAL) * (size_t)((n + LANES - 1) / LANES * LANES * s->width));
  for (num draw = start / 128; draw * 128 < stop; draw++) {
    const num begin = larger(start, draw * 128), end = smaller(stop, draw * 128 + 128);
    NAME(draw_dense)(s, job, draw, low);
    for (num g = 0; g < n; g += LANES) {
      const num count = smaller(n - g, LANES);
      memset(s->x, 0, sizeof(REAL) * LANES * 128);
      for (num i = 0; i < count; i++)
        NAME(load)(s->x + i * 128 + begin - draw * 128, &job->grads, rows[g + i],
                   begin - position, end - begin);
      NAME(look_up)(s->acc + g * s->width, s->x, s->tables, s->offsets, s->width);
    }
  }
  for (num i = 0; i < n; i++) {
    const num g = i / LANES * LANES;
    const num to = job->examples ? job->examples[rows[i]] : rows[i];
    REAL *restrict out = (REAL *)job->out + to * job->out_stride + low;
    const REAL *restrict acc = s->acc + g * s->width + (i - g);
    for (num j = 0; j < outputs; j++) out[j] += acc[j * LANES];
  }
}

/* Share `index` of a dense sketch: those outputs, of every row. */
FN void NAME(dense_share)(void *argument, char *memory, num index, num count) {
  const struct dense *job = argument;
  const num low = job->p * index / count, high = job->p * (index + 1) / count;
  const struct NAME(room) s = NAME(rooms)(DENSE_ROWS, high - low, memory);
  for (num done = 0; done < job->b;) {
    const num position = job->positions ? job->positions[job->rows[done]] : job->offset;
    num n = 1;
    while (n < DENSE_ROWS && done + n < job->b &&
           (!job->positions || job->positions[job->rows[done + n]] == position))
      n++;
    const num stop = position + job->k;
    for (num start = position; start < stop;) {
      const num end = smaller(stop, (start / SUMMED + 1) * SUMMED);
      NAME(dense_piece)(job, &s, job->rows + done, n, position, start, end, low, high);
      start = end;
    }
    done += n;
  }
}

FN int NAME(dense)(struct dense *job, num threads) {
  const num shares = larger(1, smaller(threads, job->p / DENSE_SHARE));
  const num outputs = (job->p + shares - 1) / shares;
  const num rows = smaller(job->b, DENSE_ROWS);
  return run_shares(NAME(dense_share), job, shares,
                    NAME(rooms)(rows, outputs, NULL).bytes);
}
