/* Gramian and combination of task gradients at the speed of memory.

   Gradients come as a table of pointers, tasks by parameters; a null pointer is a gradient of
   zeros. For the Gramian each chunk of columns is read once into the cache and multiplied there, in
   float32 within the chunk and in float64 across chunks, so that long sums lose nothing. The
   combination adds in float64 and rounds once: memory is slower than that. */

#include <stdint.h>
#include <string.h>

#define CHUNK 4096
#define BLOCK 4
#define MAX_TASKS 128
/* For less work than reading so many numbers (some 50 microseconds), one thread is enough: another
   saves little, and has to be scheduled before the first can go on. */
#define SERIAL 524288

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define DISPATCH __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DISPATCH
#endif
#define INLINE static inline __attribute__((always_inline))

enum type { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };
static const int WIDTH[] = {4, 8, 2, 2};
static const char ZEROS[CHUNK * sizeof(double)];

typedef float floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef float half_floats __attribute__((vector_size(32), aligned(4), may_alias));
typedef double doubles __attribute__((vector_size(64), aligned(8), may_alias));

struct table {
  int64_t tasks, columns;
  const void *const *pointers; /* tasks by columns */
  const int64_t *lengths;      /* by column */
  enum type type;
};

/* ---- numbers in and out ---- */

INLINE float from_bfloat16(uint16_t value) {
  uint32_t bits = (uint32_t)value << 16;
  float result;
  memcpy(&result, &bits, 4);
  return result;
}

INLINE uint16_t to_bfloat16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if (value != value) return (uint16_t)(bits >> 16 | 0x40);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16); /* to nearest, ties to even */
}

#define FOR_EACH(expression) for (int64_t i = 0; i < n; i++) expression
INLINE void widen(const void *source, enum type type, double *target, int64_t n) {
  switch (type) {
    case FLOAT32: FOR_EACH(target[i] = ((const float *)source)[i]); break;
    case FLOAT64: FOR_EACH(target[i] = ((const double *)source)[i]); break;
    case BFLOAT16: FOR_EACH(target[i] = from_bfloat16(((const uint16_t *)source)[i])); break;
    case FLOAT16: FOR_EACH(target[i] = ((const _Float16 *)source)[i]); break;
  }
}

INLINE void add_scaled(const void *source, enum type type, double weight, double *sum, int64_t n) {
  switch (type) {
    case FLOAT32: FOR_EACH(sum[i] += weight * ((const float *)source)[i]); break;
    case FLOAT64: FOR_EACH(sum[i] += weight * ((const double *)source)[i]); break;
    case BFLOAT16: FOR_EACH(sum[i] += weight * from_bfloat16(((const uint16_t *)source)[i])); break;
    case FLOAT16: FOR_EACH(sum[i] += weight * (double)((const _Float16 *)source)[i]); break;
  }
}

INLINE void narrow(const double *source, enum type type, void *target, int64_t n) {
  switch (type) {
    case FLOAT32: FOR_EACH(((float *)target)[i] = (float)source[i]); break;
    case FLOAT64: FOR_EACH(((double *)target)[i] = source[i]); break;
    case BFLOAT16: FOR_EACH(((uint16_t *)target)[i] = to_bfloat16((float)source[i])); break;
    case FLOAT16: FOR_EACH(((_Float16 *)target)[i] = (_Float16)(float)source[i]); break;
  }
}

/* ---- the Gramian of one chunk, a tile of at most BLOCK by BLOCK tasks at a time ---- */

INLINE double total_floats(floats v) {
  double sum = 0;
  for (int lane = 0; lane < 16; lane++) sum += v[lane];
  return sum;
}

INLINE double total_doubles(doubles v) {
  double sum = 0;
  for (int lane = 0; lane < 8; lane++) sum += v[lane];
  return sum;
}

#define TILE(name, number, vector, lanes, total)                                           \
  INLINE void name(const number *const *a, const number *const *b, const int size, int64_t n, \
                   double *out, int64_t stride) {                                             \
    vector sums[BLOCK][BLOCK] = {0};                                                          \
    int64_t k = 0;                                                                            \
    for (; k + lanes <= n; k += lanes)                                                        \
      for (int i = 0; i < size; i++) {                                                        \
        const vector left = *(const vector *)(a[i] + k);                                      \
        for (int j = 0; j < size; j++) sums[i][j] += left * *(const vector *)(b[j] + k);      \
      }                                                                                       \
    for (int i = 0; i < size; i++)                                                            \
      for (int j = 0; j < size; j++) {                                                        \
        double sum = total(sums[i][j]);                                                       \
        for (int64_t t = k; t < n; t++) sum += (double)a[i][t] * b[j][t];                     \
        out[i * stride + j] += sum;                                                           \
      }                                                                                       \
  }                                                                                           \
  INLINE void name##s(const number *const *rows, int64_t tasks, int64_t n, double *out) {     \
    /* The size of a tile is a constant, so that its loops unroll into registers. */          \
    if (tasks == 2) {                                                                         \
      name(rows, rows, 2, n, out, tasks);                                                     \
      return;                                                                                 \
    }                                                                                         \
    for (int64_t i = 0; i < tasks; i += BLOCK)                                                \
      for (int64_t j = 0; j <= i; j += BLOCK)                                                 \
        name(rows + i, rows + j, BLOCK, n, out + i * tasks + j, tasks);                       \
  }
TILE(tile_float, float, floats, 16, total_floats)
TILE(tile_double, double, doubles, 8, total_doubles)

/* Tasks are padded with rows of zeros to fill the last tile; `padded` is their number then. */
DISPATCH void gramian_chunk(const struct table *table, int64_t column, int64_t start, int64_t n,
                            int64_t padded, double *scratch, double *out) {
  const void *rows[MAX_TASKS];
  const enum type type = table->type;
  for (int64_t task = 0; task < padded; task++) {
    const char *pointer =
        task < table->tasks ? table->pointers[task * table->columns + column] : 0;
    rows[task] = pointer ? pointer + start * WIDTH[type] : ZEROS;
    if (scratch && pointer) {
      widen(rows[task], type, scratch + task * CHUNK, n);
      rows[task] = scratch + task * CHUNK;
    }
  }
  if (scratch || type == FLOAT64)
    tile_doubles((const double *const *)rows, padded, n, out);
  else
    tile_floats((const float *const *)rows, padded, n, out);
}

#define AHEAD 256
#define WAVE 64 /* float32 numbers that are summed in registers, in float64, at a time */
INLINE void combine_floats(const float *const *rows, int64_t count, const double *weights,
                           float *target, int accumulate, int64_t n) {
  int64_t k = 0;
  for (; k + WAVE <= n; k += WAVE) {
    doubles sum[WAVE / 8] = {0};
    if (accumulate)
      for (int i = 0; i < WAVE / 8; i++)
        sum[i] = __builtin_convertvector(*(const half_floats *)(target + k + 8 * i), doubles);
    for (int64_t task = 0; task < count; task++)
      for (int i = 0; i < WAVE / 8; i++) {
        const half_floats row = *(const half_floats *)(rows[task] + k + 8 * i);
        sum[i] += weights[task] * __builtin_convertvector(row, doubles);
        /* Many rows at once are more streams than the processor would foresee by itself. */
        if (i % 2 == 0) __builtin_prefetch(rows[task] + k + AHEAD + 8 * i);
      }
    for (int i = 0; i < WAVE / 8; i++)
      *(half_floats *)(target + k + 8 * i) = __builtin_convertvector(sum[i], half_floats);
  }
  for (; k < n; k++) {
    double sum = accumulate ? target[k] : 0;
    for (int64_t task = 0; task < count; task++) sum += weights[task] * rows[task][k];
    target[k] = (float)sum;
  }
}

INLINE void combine_others(const void *const *rows, int64_t count, const double *weights,
                           enum type type, void *target, int accumulate, int64_t n) {
  double sum[CHUNK];
  if (accumulate)
    widen(target, type, sum, n);
  else
    memset(sum, 0, n * sizeof(double));
  for (int64_t task = 0; task < count; task++) add_scaled(rows[task], type, weights[task], sum, n);
  narrow(sum, type, target, n);
}

DISPATCH void combine_chunk(const struct table *table, int64_t column, int64_t start, int64_t n,
                            const double *weights, char *target, int accumulate) {
  const void *rows[MAX_TASKS];
  double present[MAX_TASKS];
  const int64_t offset = start * WIDTH[table->type];
  int64_t count = 0;
  for (int64_t task = 0; task < table->tasks; task++) {
    const char *pointer = table->pointers[task * table->columns + column];
    if (!pointer) continue;
    rows[count] = pointer + offset;
    present[count++] = weights[task];
  }
  if (table->type == FLOAT32)
    combine_floats((const float *const *)rows, count, present, (float *)(target + offset),
                   accumulate, n);
  else
    combine_others(rows, count, present, table->type, target + offset, accumulate, n);
}

/* ---- work shared among threads: each takes an equal stretch of all columns laid end to end ---- */

struct stretch {
  int64_t column, start, left;
};

static struct stretch stretch_of(const struct table *table, int64_t thread, int64_t threads) {
  int64_t total = 0;
  for (int64_t column = 0; column < table->columns; column++) total += table->lengths[column];
  const int64_t share = ((total + threads - 1) / threads + CHUNK - 1) / CHUNK * CHUNK;
  const int64_t begin = thread * share;
  struct stretch result = {0, begin < total ? begin : total, 0};
  result.left = total - result.start < share ? total - result.start : share;
  while (result.column < table->columns && result.start >= table->lengths[result.column])
    result.start -= table->lengths[result.column++];
  return result;
}

static int64_t next_chunk(const struct table *table, struct stretch *at) {
  while (at->column < table->columns && at->start == table->lengths[at->column]) {
    at->column++;
    at->start = 0;
  }
  int64_t n = table->lengths[at->column] - at->start;
  if (n > at->left) n = at->left;
  return n < CHUNK ? n : CHUNK;
}

static int threads_for(const struct table *table, int64_t work_each, int threads) {
  int64_t total = 0;
  for (int64_t column = 0; column < table->columns; column++) total += table->lengths[column];
  return total * table->tasks * work_each < SERIAL ? 1 : threads;
}

/* Writes the inner products of the tasks to `gramian`, tasks by tasks. `partial` is threads by padded
   by padded, zeroed by the caller. `scratch` is threads by padded by CHUNK to work in float64, else
   null; half precision needs it. Returns whether all squared norms are finite and at least
   `smallest`. */
int esper_gramian(int64_t tasks, int64_t columns, const void *const *pointers,
                  const int64_t *lengths, int type, int threads, double *scratch, double *partial,
                  double smallest, double *gramian) {
  const struct table table = {tasks, columns, pointers, lengths, (enum type)type};
  const int64_t padded = tasks <= 2 ? 2 : (tasks + BLOCK - 1) / BLOCK * BLOCK;
  /* Each number is multiplied with half of the tasks'; about eight products take as long as a read. */
  const int64_t used = threads_for(&table, 1 + tasks / 16, threads);
#pragma omp parallel for schedule(static, 1) num_threads(used) if (used > 1)
  for (int64_t thread = 0; thread < used; thread++) {
    struct stretch at = stretch_of(&table, thread, used);
    double *own = scratch ? scratch + thread * padded * CHUNK : 0;
    while (at.left > 0) {
      const int64_t n = next_chunk(&table, &at);
      gramian_chunk(&table, at.column, at.start, n, padded, own,
                    partial + thread * padded * padded);
      at.start += n;
      at.left -= n;
    }
  }
  int sound = 1;
  for (int64_t i = 0; i < tasks; i++) {
    for (int64_t j = 0; j <= i; j++) {
      double sum = 0;
      for (int64_t thread = 0; thread < used; thread++)
        sum += partial[(thread * padded + i) * padded + j];
      gramian[i * tasks + j] = gramian[j * tasks + i] = sum;
    }
    const double square = gramian[i * tasks + i];
    sound &= square >= smallest && square - square == 0;
  }
  return sound;
}

/* Writes, or adds, the weighted sum of the tasks to each column's target. */
void esper_combine(int64_t tasks, int64_t columns, const void *const *pointers,
                   const int64_t *lengths, int type, int threads, const double *weights,
                   void *const *targets, const int8_t *accumulate) {
  const struct table table = {tasks, columns, pointers, lengths, (enum type)type};
  const int64_t used = threads_for(&table, 1, threads);
#pragma omp parallel for schedule(static, 1) num_threads(used) if (used > 1)
  for (int64_t thread = 0; thread < used; thread++) {
    struct stretch at = stretch_of(&table, thread, used);
    while (at.left > 0) {
      const int64_t n = next_chunk(&table, &at);
      combine_chunk(&table, at.column, at.start, n, weights, targets[at.column],
                    accumulate[at.column]);
      at.start += n;
      at.left -= n;
    }
  }
}

/* PCGrad in task space: adds up the weight of each gradient. `orders` is tasks by tasks; row t holds
   the partners of task t in the order they are projected against, itself included and passed over.
   Projected gradient t counts `preferences[t]` times. `products` is room for one row. */
void esper_pcgrad(int64_t tasks, const double *gramian, const int64_t *orders, double epsilon,
                  const double *preferences, double *products, double *weights) {
  for (int64_t task = 0; task < tasks; task++) {
    memcpy(products, gramian + task * tasks, tasks * sizeof(double));
    const double smallest = epsilon * epsilon * products[task];
    weights[task] += preferences[task];
    for (int64_t k = 0; k < tasks; k++) {
      const int64_t other = orders[task * tasks + k];
      const double *row = gramian + other * tasks;
      if (other == task || !(products[other] < 0) || !(row[other] > smallest)) continue;
      const double share = products[other] / row[other];
      weights[other] -= preferences[task] * share;
      for (int64_t i = 0; i < tasks; i++) products[i] -= share * row[i];
    }
  }
}

/* Raise it with every change of the arguments above; native.py compares. */
int esper_version(void) { return 1; }
int64_t esper_chunk(void) { return CHUNK; }
int64_t esper_max_tasks(void) { return MAX_TASKS; }
