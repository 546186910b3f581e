/* Look-ups of signed sums, with SPLIT rows in the lanes; included by native.h, which
   defines DENSE(x), a name of this inclusion.

   16 coordinates have 2**16 signs: 6 of them take a table of 64 sums, 5 and 5 take 32. A
   set bit makes a coordinate negative, as everywhere. */

typedef REAL DENSE(vec) __attribute__((vector_size(SPLIT * sizeof(REAL))));
#define DVEC DENSE(vec)

/* All signs of 2 numbers, of 3, and of two such groups. */
INLINE void DENSE(two)(DVEC *t, DVEC a, DVEC b) {
  t[0] = a + b;
  t[1] = b - a;
  t[2] = a - b;
  t[3] = -t[0];
}

INLINE void DENSE(three)(DVEC *t, DVEC a, DVEC b, DVEC c) {
  DENSE(two)(t + 4, a, b);
  for (int i = 0; i < 4; i++) {
    t[i] = t[4 + i] + c;
    t[4 + i] -= c;
  }
}

INLINE void DENSE(pairs)(DVEC *t, const DVEC *a, int na, const DVEC *b, int nb) {
  for (int j = 0; j < nb; j++)
    for (int i = 0; i < na; i++) t[j * na + i] = a[i] + b[j];
}

/* Make the tables of 64 coordinates: 128 sums for each 16. */
FN void DENSE(build)(DVEC *restrict t, const REAL *restrict x) {
  for (int q = 0; q < 4; q++, t += 128, x += 16) {
    DVEC c[16] = {}, a[8], b[8];
    for (int f = 0; f < 16; f++)
      for (int lane = 0; lane < SPLIT; lane++) c[f][lane] = x[lane * 128 + f];
    DENSE(three)(a, c[0], c[1], c[2]);
    DENSE(three)(b, c[3], c[4], c[5]);
    DENSE(pairs)(t, a, 8, b, 8);
    for (int f = 6; f < 16; f += 5) {
      DENSE(two)(a, c[f], c[f + 1]);
      DENSE(three)(b, c[f + 2], c[f + 3], c[f + 4]);
      DENSE(pairs)(t + (f == 6 ? 64 : 96), a, 4, b, 8);
    }
  }
}

/* The sum that the bits of w from `bit` on choose from a table. */
INLINE DVEC DENSE(chosen)(const DVEC *t, uint64_t w, int bit, int entries) {
  return t[(w >> bit) & (uint64_t)(entries - 1)];
}

/* Add 128 coordinates of SPLIT rows to all outputs. */
FN void DENSE(look_up)(REAL *restrict sums, const REAL *restrict x,
                       REAL *restrict tables, const uint64_t *restrict words, num width,
                       num outputs) {
  DVEC *restrict acc = (DVEC *)sums, *restrict t = (DVEC *)tables;
  for (int half = 0; half < 2; half++, words += width) {
    DENSE(build)(t, x + 64 * half);
    for (num j = 0; j < outputs; j++) {
      const uint64_t w = words[j];
      DVEC part[4];
      for (int q = 0; q < 4; q++)
        part[q] = DENSE(chosen)(t + 128 * q, w, 16 * q, 64) +
                  DENSE(chosen)(t + 128 * q + 64, w, 16 * q + 6, 32) +
                  DENSE(chosen)(t + 128 * q + 96, w, 16 * q + 11, 32);
      acc[j] += (part[0] + part[1]) + (part[2] + part[3]);
    }
  }
}
