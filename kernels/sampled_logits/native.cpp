// Sampled logits on a CPU (see README.md). S queries, R draws each, U vectors, D numbers a vector; float32, row-major.
//
// Every sum has an order of its own that no number of threads changes: over a draw's products and over a query's draws
// because one thread owns the query, over a vector's draws because one thread owns those columns of all vectors.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

namespace {

typedef float Lanes __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));
constexpr int64_t kLanes = 8;
constexpr int64_t kWidest = 8;  // Lanes of a block: as many sums as stay in registers

#if defined(__clang__) || __GNUC__ >= 12
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (Ints){__VA_ARGS__})
#endif

inline Lanes all(float x) { return Lanes{x, x, x, x, x, x, x, x}; }
inline Lanes choose(Ints where, Lanes yes, Lanes no) { return (Lanes)((where & (Ints)yes) | (~where & (Ints)no)); }

struct Free {
  void operator()(Lanes* p) const { ::operator delete(p, std::align_val_t(64)); }
};
using Buffer = std::unique_ptr<Lanes, Free>;

Buffer buffer(int64_t count) {
  return Buffer(static_cast<Lanes*>(::operator new(std::max<int64_t>(count, 1) * sizeof(Lanes), std::align_val_t(64))));
}

struct Shape {
  int64_t queries, draws, vectors, width;
  int64_t padded_draws() const { return (draws + kLanes - 1) / kLanes * kLanes; }
  int64_t lanes() const { return (width + kLanes - 1) / kLanes; }
};

// The columns of a matrix in blocks of at most 8 Lanes, nearly equal.
struct Blocks {
  int64_t lanes, count;
  int64_t begin(int64_t block) const { return lanes * block / count; }
  int64_t width(int64_t block) const { return begin(block + 1) - begin(block); }
};

Blocks blocks_of(int64_t lanes, int64_t at_least) {
  return {lanes, std::max((lanes + kWidest - 1) / kWidest, std::min(lanes, at_least))};
}

// Calls body with a compile-time 1..8.
template <class Body>
inline void with_width(int64_t width, Body&& body) {
  switch (width) {
    case 1: return body(std::integral_constant<int, 1>());
    case 2: return body(std::integral_constant<int, 2>());
    case 3: return body(std::integral_constant<int, 3>());
    case 4: return body(std::integral_constant<int, 4>());
    case 5: return body(std::integral_constant<int, 5>());
    case 6: return body(std::integral_constant<int, 6>());
    case 7: return body(std::integral_constant<int, 7>());
    default: return body(std::integral_constant<int, 8>());
  }
}

// A row of floats as Lanes, zeros behind its end.
inline void pad(const float* from, int64_t width, Lanes* to) {
  const int64_t full = width / kLanes;
  std::memcpy(to, from, full * sizeof(Lanes));
  if (width % kLanes) {
    to[full] = all(0.0f);
    std::memcpy(to + full, from + full * kLanes, width % kLanes * sizeof(float));
  }
}

// Vectors block by block, (U, width of the block) Lanes each: no row has a tail, and none straddles two blocks.
Buffer pack(const float* vectors, const Shape& shape, const Blocks& blocks, int threads) {
  const int64_t lanes = shape.lanes();
  Buffer packed = buffer(shape.vectors * lanes);
  Lanes* const to = packed.get();
  // Waking threads for a small table costs more than they save.
#pragma omp parallel num_threads(threads) if (shape.vectors * lanes > 1 << 16)
  {
    std::vector<Lanes> row(lanes);
#pragma omp for schedule(static)
    for (int64_t u = 0; u < shape.vectors; ++u) {
      pad(vectors + u * shape.width, shape.width, row.data());
      for (int64_t b = 0; b < blocks.count; ++b) {
        const int64_t width = blocks.width(b), begin = blocks.begin(b);
        std::copy_n(row.data() + begin, width, to + shape.vectors * begin + u * width);
      }
    }
  }
  return packed;
}

// The draws of one query; those up to a multiple of 8 are row 0. False if one is out of range.
template <class Integer>
bool read_draws(const Integer* __restrict from, const Shape& shape, int64_t* __restrict rows) {
  int64_t seen = 0;  // negative once any draw is, or the last vector's number less any draw
  for (int64_t r = 0; r < shape.draws; ++r) {
    const int64_t row = from[r];
    rows[r] = row;
    seen |= row | (shape.vectors - 1 - row);
  }
  for (int64_t r = shape.draws; r < shape.padded_draws(); ++r) rows[r] = 0;
  return seen >= 0;
}

struct Index {
  const void* data;
  bool wide;
  bool read(int64_t query, const Shape& shape, int64_t* rows) const {
    const int64_t first = query * shape.draws;
    return wide ? read_draws(static_cast<const int64_t*>(data) + first, shape, rows)
                : read_draws(static_cast<const int32_t*>(data) + first, shape, rows);
  }
};

float inner(const float* x, const float* y, int64_t width) {
  float sums[kLanes] = {};
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes)
    for (int j = 0; j < kLanes; ++j) sums[j] += x[d + j] * y[d + j];
  for (; d < width; ++d) sums[d % kLanes] += x[d] * y[d];
  return (sums[0] + sums[1] + (sums[2] + sums[3])) + (sums[4] + sums[5] + (sums[6] + sums[7]));
}

// The sums of eight Lanes.
inline Lanes sums(const Lanes* x) {
  Lanes pairs[4], fours[2];
  for (int i = 0; i < 4; ++i)
    pairs[i] = PICK(x[2 * i], x[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14) +
               PICK(x[2 * i], x[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  for (int i = 0; i < 2; ++i)
    fours[i] = PICK(pairs[2 * i], pairs[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
               PICK(pairs[2 * i], pairs[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
  return PICK(fours[0], fours[1], 0, 1, 2, 3, 8, 9, 10, 11) + PICK(fours[0], fours[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

// out[r] (+)= query . table[rows[r]], eight draws at a time.
template <int W>
void dot(const Lanes* query, const Lanes* table, const int64_t* rows, int64_t groups, Lanes* out, bool add) {
  Lanes q[W];
  for (int k = 0; k < W; ++k) q[k] = query[k];
  for (int64_t g = 0; g < groups; ++g, rows += kLanes) {
    Lanes partial[kLanes];
    for (int j = 0; j < kLanes; ++j) {
      const Lanes* row = table + rows[j] * W;
      partial[j] = q[0] * row[0];
      for (int k = 1; k < W; ++k) partial[j] += q[k] * row[k];
    }
    out[g] = add ? out[g] + sums(partial) : sums(partial);
  }
}

// out = sum over r of weights[r] table[rows[r]].
template <int W>
void combine(const float* weights, const Lanes* table, const int64_t* rows, int64_t draws, Lanes* out) {
  Lanes even[W], odd[W];
  for (int k = 0; k < W; ++k) even[k] = odd[k] = all(0.0f);
  int64_t r = 0;
  for (; r + 2 <= draws; r += 2) {
    const Lanes *one = table + rows[r] * W, *two = table + rows[r + 1] * W;
    for (int k = 0; k < W; ++k) even[k] += all(weights[r]) * one[k];
    for (int k = 0; k < W; ++k) odd[k] += all(weights[r + 1]) * two[k];
  }
  if (r < draws) {
    const Lanes* one = table + rows[r] * W;
    for (int k = 0; k < W; ++k) even[k] += all(weights[r]) * one[k];
  }
  for (int k = 0; k < W; ++k) out[k] = even[k] + odd[k];
}

// table[rows[r]] += weights[r] query.
template <int W>
void spread(const float* weights, const Lanes* query, const int64_t* rows, int64_t draws, Lanes* table) {
  Lanes q[W];
  for (int k = 0; k < W; ++k) q[k] = query[k];
  for (int64_t r = 0; r < draws; ++r) {
    Lanes* row = table + rows[r] * W;
    const Lanes weight = all(weights[r]);
    for (int k = 0; k < W; ++k) row[k] += weight * q[k];
  }
}

// e^x for x <= 0 to two units in the last place: 2^n times a Taylor polynomial on |f| <= ln(2)/2. Below -87 it is 0;
// what is not a number stays so.
inline Lanes exponential(Lanes x) {
  const Ints tiny = x < all(-87.0f);
  x = choose(tiny, all(-87.0f), x);
  const Lanes shift = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  const Lanes shifted = x * all(1.44269504f) + shift;
  const Lanes n = shifted - shift;
  const Lanes f = (x - n * all(0.693359375f)) + n * all(2.12194440e-4f);  // ln 2 in two parts
  Lanes p = all(1.0f / 5040) * f + all(1.0f / 720);
  p = p * f + all(1.0f / 120);
  p = p * f + all(1.0f / 24);
  p = p * f + all(1.0f / 6);
  p = p * f + all(0.5f);
  p = (p * f) * f + f + all(1.0f);
  const Ints exponent = ((Ints)shifted - (Ints)shift) << 23;
  return choose(tiny, all(0.0f), (Lanes)((Ints)p + exponent));
}


// One query's loss from its logits: log(e^own + sum e^logit) - own, and each draw's share, in place of its logit.
// Returns the sum of the shares.
float normalise(Lanes* logits, int64_t groups, float own, float* loss) {
  Lanes most = logits[0];
  for (int64_t g = 1; g < groups; ++g) most = choose(logits[g] > most, logits[g], most);
  float largest = own;
  for (int j = 0; j < kLanes; ++j) largest = std::max(largest, most[j]);
  Lanes total = all(0.0f);
  for (int64_t g = 0; g < groups; ++g) total += logits[g] = exponential(logits[g] - all(largest));
  float others = 0.0f;
  for (int j = 0; j < kLanes; ++j) others += total[j];
  // Where the positive leads, 1 + others would round away what is left of the loss.
  const float norm = std::exp(own - largest) + others;
  *loss = own == largest ? std::log1p(others) : largest - own + std::log(norm);
  const Lanes inverse = all(1.0f / norm);
  for (int64_t g = 0; g < groups; ++g) logits[g] *= inverse;
  return others / norm;
}

// Logits of all queries, and what `then` makes of a query's: then(s, query, table, rows, logits).
template <class Then>
int for_each_query(const float* query, const float* vectors, const Index& index, const Shape& shape, int threads,
                   const Blocks& blocks, Then&& then) {
  const Buffer packed = pack(vectors, shape, blocks, threads);
  const Lanes* const table = packed.get();
  const int64_t groups = shape.padded_draws() / kLanes;
  std::atomic<int> bad{0};
#pragma omp parallel num_threads(threads)
  {
    std::vector<int64_t> rows(shape.padded_draws());
    std::vector<Lanes> q(shape.lanes()), logits(groups);
    // A few queries at a time: a thread that comes late, or has its core taken away, leaves its share to the others.
#pragma omp for schedule(dynamic, 16)
    for (int64_t s = 0; s < shape.queries; ++s) {
      if (!index.read(s, shape, rows.data())) {
        bad = 1;
        continue;
      }
      if (query != nullptr) {
        pad(query + s * shape.width, shape.width, q.data());
        for (int64_t b = 0; b < blocks.count; ++b)
          with_width(blocks.width(b), [&](auto W) {
            dot<W>(q.data() + blocks.begin(b), table + shape.vectors * blocks.begin(b), rows.data(), groups,
                   logits.data(), b > 0);
          });
      }
      then(s, q.data(), table, rows.data(), logits.data());
    }
  }
  return bad;
}

void combine_blocks(const float* weights, const Lanes* table, const int64_t* rows, const Shape& shape,
                    const Blocks& blocks, Lanes* out) {
  for (int64_t b = 0; b < blocks.count; ++b)
    with_width(blocks.width(b), [&](auto W) {
      combine<W>(weights, table + shape.vectors * blocks.begin(b), rows, shape.draws, out + blocks.begin(b));
    });
}

}  // namespace

extern "C" {

// out (S, R) = query (S, D) . vectors (U, D) at index (S, R). 1 if an index is out of range, else 0.
int sampled_scores(const float* query, const float* vectors, const void* index, int wide, int64_t S, int64_t R,
                   int64_t U, int64_t D, int threads, float* out) {
  const Shape shape{S, R, U, D};
  return for_each_query(query, vectors, {index, wide != 0}, shape, threads, blocks_of(shape.lanes(), 1),
                        [&](int64_t s, const Lanes*, const Lanes*, const int64_t*, const Lanes* logits) {
                          std::memcpy(out + s * R, logits, R * sizeof(float));
                        });
}

// out (S, D) = sum over r of weights (S, R) vectors[index].
int sampled_combine(const float* weights, const float* vectors, const void* index, int wide, int64_t S, int64_t R,
                    int64_t U, int64_t D, int threads, float* out) {
  const Shape shape{S, R, U, D};
  const Blocks blocks = blocks_of(shape.lanes(), 1);
  return for_each_query(nullptr, vectors, {index, wide != 0}, shape, threads, blocks,
                        [&](int64_t s, Lanes* sum, const Lanes* table, const int64_t* rows, const Lanes*) {
                          combine_blocks(weights + s * R, table, rows, shape, blocks, sum);
                          std::memcpy(out + s * D, sum, D * sizeof(float));
                        });
}

// out (U, D) = sum over the draws (s, r) of a vector of weights (S, R) query (S, D).
int sampled_spread(const float* weights, const float* query, const void* index, int wide, int64_t S, int64_t R,
                   int64_t U, int64_t D, int threads, float* out) {
  const Shape shape{S, R, U, D};
  const Index draws{index, wide != 0};
  const Blocks blocks = blocks_of(shape.lanes(), threads);
  std::atomic<int> bad{0};
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t b = 0; b < blocks.count; ++b)
    with_width(blocks.width(b), [&](auto W) {
      const Buffer sum = buffer(U * W);
      Lanes* const table = sum.get();
      std::fill_n(table, U * W, all(0.0f));
      std::vector<int64_t> rows(shape.padded_draws());
      const int64_t begin = blocks.begin(b) * kLanes, width = std::min<int64_t>(D - begin, W * kLanes);
      Lanes q[W];
      for (int64_t s = 0; s < S; ++s) {
        if (!draws.read(s, shape, rows.data())) {
          bad = 1;
          continue;
        }
        pad(query + s * D + begin, width, q);
        spread<W>(weights + s * R, q, rows.data(), R, table);
      }
      for (int64_t u = 0; u < U; ++u) std::memcpy(out + u * D + begin, table + u * W, width * sizeof(float));
    });
  return bad;
}

// The loss (S,) of each query against its draws, its gradient by the query (S, D), each draw's probability (S, R), and
// the probability (S,) of all but the positive. log_q (S, R), or (R,) with stride 0; the optional ones may be null.
int sampled_softmax(const float* query, const float* positive, const float* vectors, const void* index, int wide,
                    const uint8_t* collision, const float* log_q, int64_t log_q_stride, const float* positive_log_q,
                    int64_t S, int64_t R, int64_t U, int64_t D, int threads, float* loss, float* d_query,
                    float* probability, float* missed) {
  const Shape shape{S, R, U, D};
  const Blocks blocks = blocks_of(shape.lanes(), 1);
  const auto one = [&](int64_t s, Lanes* q, const Lanes* table, const int64_t* rows, Lanes* logits) {
    float* logit = reinterpret_cast<float*>(logits);
    if (log_q != nullptr)
      for (int64_t r = 0; r < R; ++r) logit[r] -= log_q[s * log_q_stride + r];
    if (collision != nullptr)
      for (int64_t r = 0; r < R; ++r) logit[r] = collision[s * R + r] ? -INFINITY : logit[r];
    for (int64_t r = R; r < shape.padded_draws(); ++r) logit[r] = -INFINITY;
    const float *x = query + s * D, *y = positive + s * D;
    float own = inner(x, y, D) - (positive_log_q == nullptr ? 0.0f : positive_log_q[s]);
    missed[s] = normalise(logits, shape.padded_draws() / kLanes, own, loss + s);
    std::memcpy(probability + s * R, logit, R * sizeof(float));
    combine_blocks(logit, table, rows, shape, blocks, q);
    const float* sum = reinterpret_cast<const float*>(q);
    for (int64_t d = 0; d < D; ++d) d_query[s * D + d] = sum[d] - missed[s] * y[d];
  };
  return for_each_query(query, vectors, {index, wide != 0}, shape, threads, blocks, one);
}

}  // extern "C"
