// HSTU attention on a CPU in float32: forward and backward over jagged rows, nothing padded (README.md, "Native form").
//
// A unit of work is one (row, head). Its queries are taken a block at a time; a block's scores against the keys that it
// sees stay in the caches, between matrix products made by one small kernel (`micro`) and a pass over each score row
// that adds the bias, applies SiLU and the mask. Units are dealt into a fixed number of chunks with their own sums for
// the tables, added up in order: the same bits for any number of threads.
//
// Plain C++ with vector extensions (GCC, Clang); no header but the language's.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
constexpr int MICRO_ROWS = 12;  // 12 x 2 accumulators, 2 loads, 1 broadcast: 27 of 32 registers
#else
constexpr int64_t LANES = 8;
constexpr int MICRO_ROWS = 6;  // 15 of 16 registers
#endif
constexpr int64_t BLOCK_QUERIES = 48;
constexpr int64_t NUM_CHUNKS = 64;
constexpr int64_t SUMMED = 64;  // terms added up in one accumulator

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef float LooseVec __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t IntVec __attribute__((vector_size(LANES * 4)));

inline Vec load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<LooseVec*>(p) = v; }
inline Vec splat(float x) { return x - Vec{}; }  // x + 0 would be computed, for the sake of -0
inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// ---- Matrix products ------------------------------------------------------------------------------------------------

// c[r][0 : C * LANES] (+)= sum over p of a[r * a_row + p * a_step] * b[p * b_step + 0 : C * LANES]. What is added is summed
// from 0 first: long sums are sums of short ones, which keeps float32 as exact as a library's product.
template <int R, int C, bool ADD>
inline void micro(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step, int64_t depth, float* c,
                  int64_t c_row) {
  Vec sum[R][C];
  for (int r = 0; r < R; ++r)
    for (int k = 0; k < C; ++k) sum[r][k] = Vec{};
  for (int64_t p = 0; p < depth; ++p) {
    Vec right[C];
    for (int k = 0; k < C; ++k) right[k] = load(b + p * b_step + k * LANES);
    for (int r = 0; r < R; ++r) {
      const Vec left = splat(a[r * a_row + p * a_step]);
      for (int k = 0; k < C; ++k) sum[r][k] += left * right[k];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int k = 0; k < C; ++k) {
      float* to = c + r * c_row + k * LANES;
      store(to, ADD ? load(to) + sum[r][k] : sum[r][k]);
    }
}

template <int R, bool ADD>
inline void micro_rows(int64_t rows, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step,
                       int64_t depth, float* c, int64_t c_row, int64_t width) {
  if constexpr (R > 0) {
    if (rows != R) return micro_rows<R - 1, ADD>(rows, a, a_row, a_step, b, b_step, depth, c, c_row, width);
    int64_t column = 0;
    for (; column + 2 * LANES <= width; column += 2 * LANES)
      micro<R, 2, ADD>(a, a_row, a_step, b + column, b_step, depth, c + column, c_row);
    if (column < width) micro<R, 1, ADD>(a, a_row, a_step, b + column, b_step, depth, c + column, c_row);
  }
}

// At most MICRO_ROWS rows of c, all its columns; width is a multiple of LANES.
template <bool ADD>
inline void product(int64_t rows, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step,
                    int64_t depth, float* c, int64_t c_row, int64_t width) {
  micro_rows<MICRO_ROWS, ADD>(rows, a, a_row, a_step, b, b_step, depth, c, c_row, width);
}

// ---- SiLU -----------------------------------------------------------------------------------------------------------

// e^x to about 1 ulp for x in [-87, 88]; beyond, the value at the end. 2^n e^r with |r| <= ln(2) / 2, Taylor to r^7.
inline Vec exponential(Vec x) {
  const Vec low = splat(-87.0f), high = splat(88.0f);
  x = x > low ? x : low;  // a NaN becomes -87: it is caught by the caller's own product with x
  x = x < high ? x : high;
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const Vec shifted = x * 1.44269504f + magic;
  const Vec n = shifted - magic;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first with few bits
  Vec sum = splat(1.0f / 5040);
  for (float factor : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) sum = sum * r + factor;
  IntVec exponent;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  exponent = (exponent - 0x4B400000 + 127) << 23;
  Vec scale;
  std::memcpy(&scale, &exponent, sizeof scale);
  return sum * scale;
}

// Below -87 it is 0, so that a large negative score times it is 0 and not the score times 1e-38.
inline Vec sigmoid(Vec x) {
  const Vec found = 1.0f / (1.0f + exponential(-x)), none{};
  return x < splat(-87.0f) ? none : found;
}

// ---- One row and head -----------------------------------------------------------------------------------------------

struct Matrix {  // rows of one head in a (T, H, d) tensor
  const float* data;
  int64_t row;
  const float* operator[](int64_t i) const { return data + i * row; }
};

}  // namespace

// Mirrored field by field in native.py.
extern "C" struct Call {
  int64_t batch, heads, dim_qk, dim_v;
  const int64_t *q_offsets, *k_offsets;
  const float *q, *k, *v;
  int64_t q_token, q_head, k_token, k_head, v_token, v_head;  // strides
  float alpha;
  int64_t causal, window, full_tail, target_group;  // 0 is none
  const int64_t *num_contextual, *num_targets;      // or null
  const float* inverse_divisor;                     // (T_q,), or null: keys that the query sees
  const float* position_table;                      // or null
  int64_t position_entries, position_stride, position_clamped_ids;  // stride 0: shared; 16 readable entries behind
  const float* time_table;  // or null
  int64_t time_buckets, time_stride, num_edges;  // stride 0: shared
  const int64_t *edges, *query_times, *key_times;
  int64_t threads;
};

namespace {

struct Run {  // keys begin:end of a score row share a time bucket
  int64_t begin, end, bucket;
};

struct Scratch {
  std::vector<float> key_t, value_t, key, value, query, grad, scores, d_weights, out, d_key, d_value, d_position;
  std::vector<uint8_t> seen;
  std::vector<int64_t> ids;
  std::vector<Run> runs;
  std::vector<int64_t> run_ends;
};

float* sized(std::vector<float>& buffer, int64_t count) {
  if (static_cast<int64_t>(buffer.size()) < count) buffer.resize(count);
  return buffer.data();
}

// (n, d) -> (n, width) with zeros behind each row
float* packed(std::vector<float>& buffer, const Matrix& from, int64_t n, int64_t d, int64_t width) {
  float* to = sized(buffer, n * width);
  for (int64_t i = 0; i < n; ++i) {
    std::memcpy(to + i * width, from[i], d * sizeof(float));
    std::memset(to + i * width + d, 0, (width - d) * sizeof(float));
  }
  return to;
}

// (n, d) -> (d, width) with zeros behind each row
float* transposed(std::vector<float>& buffer, const Matrix& from, int64_t n, int64_t d, int64_t width) {
  float* to = sized(buffer, d * width);
  for (int64_t begin = 0; begin < n; begin += 16) {  // 16 rows stay in the first cache, and a line is written whole
    const int64_t count = std::min<int64_t>(16, n - begin);
    for (int64_t x = 0; x < d; ++x)
      for (int64_t j = 0; j < count; ++j) to[x * width + begin + j] = from[begin + j][x];
  }
  for (int64_t x = 0; x < d; ++x) std::memset(to + x * width + n, 0, (width - n) * sizeof(float));
  return to;
}

class Unit {
 public:
  Unit(const Call& call, int64_t row, int64_t head, Scratch& scratch) : c(call), s(scratch), head(head) {
    q_begin = c.q_offsets[row];
    k_begin = c.k_offsets[row];
    num_queries = c.q_offsets[row + 1] - q_begin;
    num_keys = c.k_offsets[row + 1] - k_begin;
    shift = num_keys - num_queries;  // position of query 0 (0 unless in the delta form)
    context = c.num_contextual ? c.num_contextual[row] : 0;
    targets = c.num_targets ? c.num_targets[row] : 0;
    plain = c.causal && !c.window && context == 0 && targets == 0;
    const int64_t lost = std::max<int64_t>(context - 1, 0);
    last = num_keys - lost - targets;
    query = {c.q + q_begin * c.q_token + head * c.q_head, c.q_token};
    key = {c.k + k_begin * c.k_token + head * c.k_head, c.k_token};
    value = {c.v + k_begin * c.v_token + head * c.v_head, c.v_token};
    const bool by_ids = c.position_table && c.position_clamped_ids;
    if (!plain || by_ids) {
      s.ids.resize(num_keys);
      for (int64_t j = 0; j < num_keys; ++j) s.ids[j] = std::min(std::max<int64_t>(j - lost, 0), last);
    }
    if (c.position_table) position = c.position_table + head * c.position_stride;
    if (c.time_table) {
      time = c.time_table + head * c.time_stride;
      rising = std::is_sorted(c.key_times + k_begin, c.key_times + k_begin + num_keys);
    }
  }

  // Keys that queries begin:end see: [low, high), and which of them each sees (for masks that are not plain).
  void look(int64_t begin, int64_t end) {
    if (plain) {
      low = 0;
      high = shift + end;
      return;
    }
    s.seen.resize((end - begin) * num_keys);
    low = num_keys;
    high = 0;
    for (int64_t i = begin; i < end; ++i) {
      uint8_t* seen = s.seen.data() + (i - begin) * num_keys;
      mark(shift + i, seen);
      int64_t first = 0, behind = num_keys;
      while (first < num_keys && !seen[first]) ++first;
      while (behind > first && !seen[behind - 1]) --behind;
      if (first == num_keys) continue;
      low = std::min(low, first);
      high = std::max(high, behind);
    }
    if (high <= low) low = high = 0;
  }

  int64_t count(int64_t begin, int64_t i) const {  // keys seen by query i of the block looked at
    if (plain) return shift + i + 1;
    const uint8_t* seen = s.seen.data() + (i - begin) * num_keys;
    return std::max<int64_t>(std::accumulate(seen, seen + num_keys, int64_t{0}), 1);
  }

  float inverse_divisor(int64_t begin, int64_t i) const {
    return c.inverse_divisor ? c.inverse_divisor[q_begin + i] : 1.0f / static_cast<float>(count(begin, i));
  }

  // scores[0 : high - low] of query i: times alpha, plus bias. Returns the end of what may be seen, relative to low.
  int64_t add_bias(int64_t i, float* scores) {
    const int64_t end = (plain ? shift + i + 1 : high) - low;
    const int64_t wide = round_up(end, LANES);
    if (position && !c.position_clamped_ids) {
      const float* row = position + c.position_entries / 2 + low - (shift + i);  // entry of distance low - i
      for (int64_t j = 0; j < wide; j += LANES) store(scores + j, load(scores + j) * c.alpha + load(row + j));
    } else {
      for (int64_t j = 0; j < wide; j += LANES) store(scores + j, load(scores + j) * c.alpha);
      if (position)
        for (int64_t j = 0; j < end; ++j) scores[j] += position[entry(i, low + j)];
    }
    if (time) {
      find_runs(i, end);
      for (const Run& run : s.runs) {
        const float bias = time[run.bucket];
        for (int64_t j = run.begin; j < run.end; ++j) scores[j] += bias;
      }
    }
    return end;
  }

  void hide(int64_t begin, int64_t i, int64_t end, int64_t width, float* values) const {
    if (!plain) {
      const uint8_t* seen = s.seen.data() + (i - begin) * num_keys + low;
      for (int64_t j = 0; j < end; ++j) values[j] = seen[j] ? values[j] : 0.0f;
    }
    std::memset(values + end, 0, (width - end) * sizeof(float));
  }

  void add_table_gradients(int64_t i, int64_t end, const float* d_scores, float* d_distance, double* d_position,
                           double* d_time) const {
    if (position && !c.position_clamped_ids) {
      float* row = d_distance + (num_keys - 1) + low - (shift + i);
      int64_t j = 0;
      for (; j + LANES <= end; j += LANES) store(row + j, load(row + j) + load(d_scores + j));
      for (; j < end; ++j) row[j] += d_scores[j];
    } else if (position) {
      for (int64_t j = 0; j < end; ++j) d_position[entry(i, low + j)] += d_scores[j];
    }
    if (time)
      for (const Run& run : s.runs) d_time[run.bucket] += total(d_scores + run.begin, run.end - run.begin);
  }

  const Call& c;
  Scratch& s;
  int64_t head, q_begin, k_begin, num_queries, num_keys, shift, context, targets, last, low = 0, high = 0;
  bool plain, rising = false;
  Matrix query, key, value;
  const float *position = nullptr, *time = nullptr;

 private:
  // The rules of README.md, "Mask", for the query at position p.
  void mark(int64_t p, uint8_t* seen) const {
    const int64_t* ids = s.ids.data();
    const int64_t own = ids[p], first_target = num_keys - targets;
    for (int64_t j = 0; j < num_keys; ++j) seen[j] = c.causal ? own > ids[j] : ids[j] < last;
    seen[p] = 1;
    if (c.target_group && p >= first_target) {
      const int64_t begin = first_target + (p - first_target) / c.target_group * c.target_group;
      const int64_t end = c.causal ? p + 1 : begin + std::min(c.target_group, num_keys - begin);
      std::fill(seen + begin, seen + end, 1);
    }
    if (c.window && !(c.full_tail && own >= last - c.full_tail))
      for (int64_t j = 0; j < num_keys; ++j) seen[j] &= std::abs(own - ids[j]) <= c.window;
    if (context > 0 && own == 0)
      for (int64_t j = 0; j < num_keys; ++j) seen[j] |= ids[j] < last;
  }

  int64_t entry(int64_t i, int64_t j) const {
    const int64_t half = c.position_entries / 2;
    return std::min(std::max<int64_t>(s.ids[j] - s.ids[shift + i] + half, 0), 2 * half);
  }

  // Stretches of equal buckets among keys low : low + end. Times mostly rise along a row, so stretches are long.
  void find_runs(int64_t i, int64_t end) {
    s.runs.clear();
    const int64_t own = c.query_times[q_begin + i];
    const int64_t* times = c.key_times + k_begin + low;
    const int64_t* edges = c.edges;
    int64_t bucket = 0;
    for (int64_t j = 0; j < end;) {
      const int64_t begin = j, x = std::abs(own - times[j]);
      while (bucket < c.num_edges && x >= edges[bucket]) ++bucket;
      while (bucket > 0 && x < edges[bucket - 1]) --bucket;
      const uint64_t floor = bucket > 0 ? edges[bucket - 1] : 0;
      const uint64_t ceiling = bucket < c.num_edges ? edges[bucket] : std::numeric_limits<int64_t>::max();
      const uint64_t span = ceiling - floor;
      if (rising && times[end - 1] <= own) {  // differences fall: the bucket ends where a time is too late for it
        const int64_t latest = own - static_cast<int64_t>(floor);
        int64_t leap = 1;
        while (j + leap < end && times[j + leap] <= latest) leap *= 2;
        j = std::upper_bound(times + j + leap / 2, times + std::min(j + leap, end), latest) - times;
        s.runs.push_back({begin, j, bucket});
        continue;
      }
      for (++j; j < end && static_cast<uint64_t>(std::abs(own - times[j])) - floor < span;) ++j;
      s.runs.push_back({begin, j, bucket});
    }
  }

  static double total(const float* values, int64_t count) {
    Vec sums{};
    int64_t j = 0;
    for (; j + LANES <= count; j += LANES) sums += load(values + j);
    double sum = 0;
    for (int64_t lane = 0; lane < LANES; ++lane) sum += sums[lane];
    for (; j < count; ++j) sum += values[j];
    return sum;
  }
};

// scores (rows, stride) = left (rows, depth) @ right_t (depth, width); a causal row needs no more than its own keys.
void multiply_scores(const Unit& u, int64_t begin, int64_t end, const Matrix& left, int64_t depth, const float* right_t,
                     int64_t right_width, float* scores, int64_t stride) {
  for (int64_t i = begin; i < end; i += MICRO_ROWS) {
    const int64_t rows = std::min<int64_t>(MICRO_ROWS, end - i);
    const int64_t keys = (u.plain ? u.shift + i + rows : u.high) - u.low;
    product<false>(rows, left[i], left.row, 1, right_t + u.low, right_width, depth, scores + (i - begin) * stride, stride,
                   round_up(keys, LANES));
  }
}

// out (rows, width) = scores (rows, keys) @ right (keys, width), for queries begin:end
void multiply_keys(const Unit& u, int64_t begin, int64_t end, const float* scores, int64_t stride, const float* right,
                   int64_t width, float* out) {
  for (int64_t i = begin; i < end; i += MICRO_ROWS) {
    const int64_t rows = std::min<int64_t>(MICRO_ROWS, end - i);
    const int64_t keys = (u.plain ? u.shift + i + rows : u.high) - u.low;
    const float* left = scores + (i - begin) * stride;
    float* to = out + (i - begin) * width;
    product<false>(rows, left, stride, 1, right + u.low * width, width, std::min(keys, SUMMED), to, width, width);
    for (int64_t j = SUMMED; j < keys; j += SUMMED)
      product<true>(rows, left + j, stride, 1, right + (u.low + j) * width, width, std::min(keys - j, SUMMED), to, width,
                    width);
  }
}

// total (keys, width) += scores.T (keys, rows) @ left (rows, width), for queries begin:end
void add_to_keys(const Unit& u, int64_t begin, int64_t end, const float* scores, int64_t stride, const float* left,
                 int64_t width, float* total) {
  for (int64_t j = u.low; j < u.high; j += MICRO_ROWS) {
    const int64_t rows = std::min<int64_t>(MICRO_ROWS, u.high - j);
    const int64_t from = u.plain ? std::max(begin, j - u.shift) : begin;  // earlier queries do not see key j
    if (from >= end) break;
    product<true>(rows, scores + (from - begin) * stride + (j - u.low), 1, stride, left + from * width, width, end - from,
                  total + j * width, width, width);
  }
}

int64_t block_size(const Unit& u) {  // long rows take fewer queries at a time, so that a block stays in the caches
  return std::max<int64_t>(MICRO_ROWS, std::min<int64_t>(BLOCK_QUERIES, 65536 / std::max<int64_t>(u.num_keys, 1)));
}

void forward_unit(Unit& u, Scratch& s, float* out) {
  const Call& c = u.c;
  const int64_t keys_wide = round_up(u.num_keys, LANES) + LANES, width = round_up(c.dim_v, LANES);
  const float* key_t = transposed(s.key_t, u.key, u.num_keys, c.dim_qk, keys_wide);
  const float* value = packed(s.value, u.value, u.num_keys, c.dim_v, width);
  const int64_t step = block_size(u);
  float* scores = sized(s.scores, step * keys_wide);
  float* sums = sized(s.out, step * width);
  for (int64_t begin = 0; begin < u.num_queries; begin += step) {
    const int64_t end = std::min(begin + step, u.num_queries);
    u.look(begin, end);
    const int64_t used = round_up(u.high - u.low, LANES);
    multiply_scores(u, begin, end, u.query, c.dim_qk, key_t, keys_wide, scores, keys_wide);
    for (int64_t i = begin; i < end; ++i) {
      float* row = scores + (i - begin) * keys_wide;
      const int64_t seen = u.add_bias(i, row);
      for (int64_t j = 0; j < seen; j += LANES) {
        const Vec x = load(row + j);
        store(row + j, x * sigmoid(x));
      }
      u.hide(begin, i, seen, used, row);
    }
    multiply_keys(u, begin, end, scores, keys_wide, value, width, sums);
    for (int64_t i = begin; i < end; ++i) {
      float* to = out + ((u.q_begin + i) * c.heads + u.head) * c.dim_v;
      const float scale = u.inverse_divisor(begin, i);
      for (int64_t x = 0; x < c.dim_v; ++x) to[x] = sums[(i - begin) * width + x] * scale;
    }
  }
}

struct Gradients {
  float *d_q, *d_k, *d_v;
  double *d_position, *d_time;
};

void backward_unit(Unit& u, Scratch& s, const Matrix& grad_out, const Gradients& to) {
  const Call& c = u.c;
  const int64_t keys_wide = round_up(u.num_keys, LANES) + LANES;
  const int64_t width_qk = round_up(c.dim_qk, LANES), width_v = round_up(c.dim_v, LANES);
  const float* key_t = transposed(s.key_t, u.key, u.num_keys, c.dim_qk, keys_wide);
  const float* value_t = transposed(s.value_t, u.value, u.num_keys, c.dim_v, keys_wide);
  const float* key = packed(s.key, u.key, u.num_keys, c.dim_qk, width_qk);
  const float* query = packed(s.query, u.query, u.num_queries, c.dim_qk, width_qk);
  float* grad = packed(s.grad, grad_out, u.num_queries, c.dim_v, width_v);
  const int64_t step = block_size(u);
  float* scores = sized(s.scores, step * keys_wide);
  float* d_scores = sized(s.d_weights, step * keys_wide);
  float* d_query = sized(s.out, step * width_qk);
  float* d_key = sized(s.d_key, u.num_keys * width_qk);
  float* d_value = sized(s.d_value, u.num_keys * width_v);
  std::memset(d_key, 0, u.num_keys * width_qk * sizeof(float));
  std::memset(d_value, 0, u.num_keys * width_v * sizeof(float));
  const bool distances = u.position && !c.position_clamped_ids;
  float* d_distance = sized(s.d_position, 2 * u.num_keys + LANES);
  if (distances) std::memset(d_distance, 0, 2 * u.num_keys * sizeof(float));
  for (int64_t begin = 0; begin < u.num_queries; begin += step) {
    const int64_t end = std::min(begin + step, u.num_queries);
    u.look(begin, end);
    for (int64_t i = begin; i < end; ++i) {
      const float scale = u.inverse_divisor(begin, i);
      for (int64_t x = 0; x < c.dim_v; ++x) grad[i * width_v + x] *= scale;
    }
    const int64_t used = round_up(u.high - u.low, LANES);
    multiply_scores(u, begin, end, {query, width_qk}, c.dim_qk, key_t, keys_wide, scores, keys_wide);
    multiply_scores(u, begin, end, {grad, width_v}, c.dim_v, value_t, keys_wide, d_scores, keys_wide);
    for (int64_t i = begin; i < end; ++i) {
      float *row = scores + (i - begin) * keys_wide, *d_row = d_scores + (i - begin) * keys_wide;
      const int64_t seen = u.add_bias(i, row);
      for (int64_t j = 0; j < seen; j += LANES) {
        const Vec x = load(row + j), sigma = sigmoid(x), silu = x * sigma;
        store(row + j, silu);
        store(d_row + j, load(d_row + j) * (sigma * (1.0f + x * (1.0f - sigma))));
      }
      u.hide(begin, i, seen, used, row);
      u.hide(begin, i, seen, used, d_row);
      u.add_table_gradients(i, seen, d_row, d_distance, to.d_position, to.d_time);
    }
    multiply_keys(u, begin, end, d_scores, keys_wide, key, width_qk, d_query);
    for (int64_t i = begin; i < end; ++i) {
      float* row = to.d_q + ((u.q_begin + i) * c.heads + u.head) * c.dim_qk;
      for (int64_t x = 0; x < c.dim_qk; ++x) row[x] = d_query[(i - begin) * width_qk + x] * c.alpha;
    }
    add_to_keys(u, begin, end, d_scores, keys_wide, query, width_qk, d_key);
    add_to_keys(u, begin, end, scores, keys_wide, grad, width_v, d_value);
  }
  for (int64_t j = 0; j < u.num_keys; ++j) {
    float* row = to.d_k + ((u.k_begin + j) * c.heads + u.head) * c.dim_qk;
    for (int64_t x = 0; x < c.dim_qk; ++x) row[x] = d_key[j * width_qk + x] * c.alpha;
    std::memcpy(to.d_v + ((u.k_begin + j) * c.heads + u.head) * c.dim_v, d_value + j * width_v, c.dim_v * sizeof(float));
  }
  if (distances)
    for (int64_t e = 0; e < 2 * u.num_keys - 1; ++e)
      to.d_position[c.position_entries / 2 - (u.num_keys - 1) + e] += d_distance[e];
}

// Units in NUM_CHUNKS lists of about the same cost: sorted by cost, dealt forth and back.
std::vector<std::vector<int64_t>> deal(const Call& c) {
  std::vector<int64_t> rows;
  for (int64_t b = 0; b < c.batch; ++b)
    if (c.q_offsets[b + 1] > c.q_offsets[b]) rows.push_back(b);
  auto cost = [&](int64_t b) { return (c.q_offsets[b + 1] - c.q_offsets[b]) * (c.k_offsets[b + 1] - c.k_offsets[b]); };
  std::stable_sort(rows.begin(), rows.end(), [&](int64_t a, int64_t b) { return cost(a) > cost(b); });
  std::vector<std::vector<int64_t>> chunks(NUM_CHUNKS);
  int64_t number = 0;
  for (int64_t b : rows)
    for (int64_t h = 0; h < c.heads; ++h, ++number) {
      const int64_t place = number % (2 * NUM_CHUNKS);
      chunks[place < NUM_CHUNKS ? place : 2 * NUM_CHUNKS - 1 - place].push_back(b * c.heads + h);
    }
  return chunks;
}

}  // namespace

extern "C" void hstu_attention_forward(const Call* call, float* out) {
  const Call& c = *call;
  const auto chunks = deal(c);
#pragma omp parallel num_threads(c.threads)
  {
    Scratch scratch;
#pragma omp for schedule(dynamic, 1)
    for (int64_t chunk = 0; chunk < NUM_CHUNKS; ++chunk)
      for (int64_t number : chunks[chunk]) {
        Unit unit(c, number / c.heads, number % c.heads, scratch);
        forward_unit(unit, scratch, out);
      }
  }
}

// d_position: (1 or H, position_entries) and d_time: (1 or H, time_buckets), both float64.
extern "C" void hstu_attention_backward(const Call* call, const float* grad, float* d_q, float* d_k, float* d_v,
                                        double* d_position, double* d_time) {
  const Call& c = *call;
  const auto chunks = deal(c);
  const int64_t positions = c.position_table ? c.position_entries * (c.position_stride ? c.heads : 1) : 0;
  const int64_t times = c.time_table ? c.time_buckets * (c.time_stride ? c.heads : 1) : 0;
  std::vector<std::vector<double>> sums(NUM_CHUNKS);
#pragma omp parallel num_threads(c.threads)
  {
    Scratch scratch;
#pragma omp for schedule(dynamic, 1)
    for (int64_t chunk = 0; chunk < NUM_CHUNKS; ++chunk) {
      if (chunks[chunk].empty()) continue;
      sums[chunk].assign(positions + times, 0.0);
      double *position = sums[chunk].data(), *time = position + positions;
      for (int64_t number : chunks[chunk]) {
        const int64_t head = number % c.heads;
        Unit unit(c, number / c.heads, head, scratch);
        const Matrix rows = {grad + (unit.q_begin * c.heads + head) * c.dim_v, c.heads * c.dim_v};
        backward_unit(unit, scratch, rows,
                      {d_q, d_k, d_v, position + (c.position_stride ? head * c.position_entries : 0),
                       time + (c.time_stride ? head * c.time_buckets : 0)});
      }
    }
  }
  for (const auto& sum : sums) {
    if (sum.empty()) continue;
    for (int64_t e = 0; e < positions; ++e) d_position[e] += sum[e];
    for (int64_t e = 0; e < times; ++e) d_time[e] += sum[positions + e];
  }
}
