// Causal attention of one block of queries and one block of keys at a time, forward and backward, in fp32 or bf16.
// The README has the derivation and the letters. `common.h` comes before this text.

namespace {

constexpr int64_t QUERIES = 64;  // rows of a block
constexpr int64_t KEYS = 512;    // columns of a block; the scores of a block fit into the second-level cache
constexpr int64_t PAD = 32;      // keys are padded to a multiple, with zeros: two vectors, and whole pairs
constexpr float HIDDEN = -std::numeric_limits<float>::infinity();

int64_t padded(int64_t n) {
  return (n + PAD - 1) / PAD * PAD;
}

struct Sizes {
  int64_t b, g, r, l, n, d, e, window;  // window 0 is none

  int64_t groups() const { return b * g; }
  int64_t blocks() const { return (l + QUERIES - 1) / QUERIES; }
  float scale() const { return 1.f / std::sqrt(static_cast<float>(d)); }
  // The keys from `first` up to `last` are those that a query sees.
  int64_t last(int64_t query) const { return n - l + query + 1; }
  int64_t first(int64_t query) const { return window ? std::max<int64_t>(0, last(query) - window) : 0; }
};

// A tensor of batch, heads, positions and channels; the channels of a position are adjacent.
template <typename T>
struct View {
  T* data;
  int64_t batch, head, position;

  T* at(int64_t b, int64_t h, int64_t i) const { return data + b * batch + h * head + i * position; }
};

// Hides the scores of a line outside of [from, to).
void hide(float* line, int64_t n, int64_t from, int64_t to) {
  std::fill(line, line + std::clamp<int64_t>(from, 0, n), HIDDEN);
  std::fill(line + std::clamp<int64_t>(to, 0, n), line + n, HIDDEN);
}

// Weights exp(scale s - top) of a line of scores, and their sum.
template <typename T>
float weigh(const float* line, int64_t n, float scale, float top, T* weights) {
  Vec sum(0.f);
  for (int64_t j = 0; j < n; j += WIDTH) {
    const Vec weight = exponential<T>(load(line + j) * Vec(scale) - Vec(top));
    sum = sum + weight;
    store(weight, weights + j);
  }
  return sum.reduce_add();
}

float largest(const float* line, int64_t n) {
  Vec top(HIDDEN);
  for (int64_t j = 0; j < n; j += WIDTH) top = at::vec::maximum(top, load(line + j));
  return top.reduce_max();
}

template <typename T>
void forward(const Sizes& s, View<const T> q, View<const T> k, View<const T> v, const float* sinks, View<T> y,
             View<float> logsum) {
  const int64_t n_out = padded(s.n);
  Memory shared;
  T* keys_packed = shared.get<T>(s.groups() * s.d * n_out);
  T* values_packed = shared.get<T>(s.groups() * s.e * n_out);
  parallel(s.groups(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      pack_transposed(k.at(i / s.g, i % s.g, 0), k.position, s.n, s.d, n_out, keys_packed + i * s.d * n_out);
      pack(v.at(i / s.g, i % s.g, 0), v.position, s.n, s.e, n_out, values_packed + i * s.e * n_out);
    }
  });
  parallel(s.groups() * s.r * s.blocks(), [&](int64_t begin, int64_t end) {
    Memory own;
    float* scores = own.get<float>(QUERIES * KEYS);
    T* weights = own.get<T>(QUERIES * KEYS);
    float* sums = own.get<float>(QUERIES * s.e);
    float top[QUERIES], total[QUERIES];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / s.blocks() / s.r, b = group / s.g;
      const int64_t h = group % s.g * s.r + task / s.blocks() % s.r;
      const int64_t row = task % s.blocks() * QUERIES, rows = std::min(QUERIES, s.l - row);
      const int64_t start = s.first(row) / PAD * PAD, stop = padded(s.last(row + rows - 1));
      // A sink is a key with a score of its own and no value.
      std::fill(top, top + rows, sinks ? sinks[h] : HIDDEN);
      std::fill(total, total + rows, sinks ? 1.f : 0.f);
      for (int64_t j = start; j < stop; j += KEYS) {
        const int64_t keys = std::min(KEYS, stop - j);
        product(rows, keys, s.d, q.at(b, h, row), q.position, keys_packed + group * s.d * n_out + PAIR<T> * j, n_out,
                scores, KEYS);
        for (int64_t i = 0; i < rows; ++i) {
          float* line = scores + i * KEYS;
          hide(line, keys, s.first(row + i) - j, s.last(row + i) - j);
          const float most = std::max(top[i], s.scale() * largest(line, keys));
          const float shift = most == HIDDEN ? 0.f : most;  // the query sees no key of this block and of those before
          const float kept = std::exp(top[i] - shift);
          total[i] = total[i] * kept + weigh(line, keys, s.scale(), shift, weights + i * KEYS);
          top[i] = most;
          if (j > start && kept != 1.f)
#pragma omp simd
            for (int64_t c = 0; c < s.e; ++c) sums[i * s.e + c] *= kept;
        }
        product(rows, s.e, keys, weights, KEYS, values_packed + (group * n_out + j) * s.e, s.e, sums, s.e, j > start);
      }
      for (int64_t i = 0; i < rows; ++i) {
        T* to = y.at(b, h, row + i);
        const float inverse = 1.f / total[i];
#pragma omp simd
        for (int64_t c = 0; c < s.e; ++c) store(sums[i * s.e + c] * inverse, to + c);
        *logsum.at(b, h, row + i) = top[i] + std::log(total[i]);
      }
    }
  });
}

// Transposed weights P^T and gradients of scores dS^T, (keys, QUERIES), from the scores S^T and the gradients dP^T.
template <typename T>
void differentiate(const Sizes& s, int64_t row, int64_t rows, int64_t key, int64_t keys, const float* logsum,
                   const float* delta, float* scores, const float* dweights, T* weights, T* dscores) {
  for (int64_t j = 0; j < keys; ++j) {
    const int64_t at = j * QUERIES, first = key + j - (s.n - s.l) - row;  // the first query that sees the key
    hide(scores + at, QUERIES, first, s.window ? std::min(rows, first + s.window) : rows);
    for (int64_t i = 0; i < QUERIES; i += WIDTH) {
      const Vec weight = exponential<T>(load(scores + at + i) * Vec(s.scale()) - load(logsum + i));
      store(weight, weights + at + i);
      store(weight * (load(dweights + at + i) - load(delta + i)), dscores + at + i);
    }
  }
}

template <typename T>
void backward(const Sizes& s, View<const T> q, View<const T> k, View<const T> v, View<const T> y, View<float> logsum,
              View<const T> dy, View<float> delta, View<T> dq, View<T> dk, View<T> dv) {
  const int64_t n_out = padded(s.n);
  parallel(s.groups(), [&](int64_t begin, int64_t end) {
    Memory own;
    float *scores = own.get<float>(KEYS * QUERIES), *dweights = own.get<float>(KEYS * QUERIES);
    T *weights = own.get<T>(KEYS * QUERIES), *dscores = own.get<T>(KEYS * QUERIES);
    T* dscores_packed = PAIR<T> == 2 ? own.get<T>(KEYS * QUERIES) : dscores;
    T *q_transposed = own.get<T>(s.d * QUERIES), *q_packed = own.get<T>(s.d * QUERIES);
    T *dy_transposed = own.get<T>(s.e * QUERIES), *dy_packed = own.get<T>(s.e * QUERIES);
    T *keys_copied = own.get<T>(s.d * n_out), *keys_transposed = own.get<T>(s.d * n_out);
    T* values_copied = own.get<T>(s.e * n_out);
    float *dkeys = own.get<float>(s.d * n_out), *dvalues = own.get<float>(s.e * n_out);
    float *dqueries = own.get<float>(s.d * QUERIES), *turned = own.get<float>(QUERIES * s.d);  // the first transposed
    alignas(64) float logsums[QUERIES], deltas[QUERIES];
    for (int64_t group = begin; group < end; ++group) {
      const int64_t b = group / s.g, g = group % s.g;
      copy(k.at(b, g, 0), k.position, s.n, s.d, n_out, keys_copied);
      copy(v.at(b, g, 0), v.position, s.n, s.e, n_out, values_copied);
      transpose(k.at(b, g, 0), k.position, s.n, s.d, n_out, keys_transposed);
      std::fill(dkeys, dkeys + s.d * n_out, 0.f);
      std::fill(dvalues, dvalues + s.e * n_out, 0.f);
      for (int64_t task = 0; task < s.r * s.blocks(); ++task) {
        const int64_t h = g * s.r + task / s.blocks(), row = task % s.blocks() * QUERIES;
        const int64_t rows = std::min(QUERIES, s.l - row);
        pack_transposed(q.at(b, h, row), q.position, rows, s.d, QUERIES, q_transposed);
        pack_transposed(dy.at(b, h, row), dy.position, rows, s.e, QUERIES, dy_transposed);
        pack(q.at(b, h, row), q.position, rows, s.d, QUERIES, q_packed);
        pack(dy.at(b, h, row), dy.position, rows, s.e, QUERIES, dy_packed);
        std::fill(logsums, logsums + QUERIES, 0.f);
        std::fill(deltas, deltas + QUERIES, 0.f);
        for (int64_t i = 0; i < rows; ++i) {
          const T *dy_row = dy.at(b, h, row + i), *y_row = y.at(b, h, row + i);
          float sum = 0;
#pragma omp simd reduction(+ : sum)
          for (int64_t c = 0; c < s.e; ++c) sum += value(dy_row[c]) * value(y_row[c]);
          *delta.at(b, h, row + i) = deltas[i] = sum;
          logsums[i] = *logsum.at(b, h, row + i);
        }
        const int64_t start = s.first(row) / PAD * PAD, stop = padded(s.last(row + rows - 1));
        for (int64_t j = start; j < stop; j += KEYS) {
          const int64_t keys = std::min(KEYS, stop - j);
          product(keys, QUERIES, s.d, keys_copied + j * s.d, s.d, q_transposed, QUERIES, scores, QUERIES);
          product(keys, QUERIES, s.e, values_copied + j * s.e, s.e, dy_transposed, QUERIES, dweights, QUERIES);
          differentiate(s, row, rows, j, keys, logsums, deltas, scores, dweights, weights, dscores);
          if (PAIR<T> == 2) pack(dscores, QUERIES, keys, QUERIES, keys, dscores_packed);
          product(keys, s.e, QUERIES, weights, QUERIES, dy_packed, s.e, dvalues + j * s.e, s.e, true);
          product(keys, s.d, QUERIES, dscores, QUERIES, q_packed, s.d, dkeys + j * s.d, s.d, true);
          product(s.d, QUERIES, keys, keys_transposed + j, n_out, dscores_packed, QUERIES, dqueries, QUERIES, j > start);
        }
        turn(dqueries, QUERIES, s.d, rows, turned, s.d);
        for (int64_t i = 0; i < rows; ++i) {
          T* to = dq.at(b, h, row + i);
#pragma omp simd
          for (int64_t c = 0; c < s.d; ++c) store(turned[i * s.d + c] * s.scale(), to + c);
        }
      }
      for (int64_t j = 0; j < s.n; ++j) {
        T *dk_row = dk.at(b, g, j), *dv_row = dv.at(b, g, j);
#pragma omp simd
        for (int64_t c = 0; c < s.d; ++c) store(dkeys[j * s.d + c] * s.scale(), dk_row + c);
#pragma omp simd
        for (int64_t c = 0; c < s.e; ++c) store(dvalues[j * s.e + c], dv_row + c);
      }
    }
  });
}

// Every tensor comes as the address and the three strides of a View.
template <typename T>
View<T> view(const int64_t* tensor) {
  return {reinterpret_cast<T*>(tensor[0]), tensor[1], tensor[2], tensor[3]};
}

template <typename T>
void call_forward(const Sizes& s, const int64_t* t, const float* sinks) {
  forward<T>(s, view<const T>(t), view<const T>(t + 4), view<const T>(t + 8), sinks, view<T>(t + 12),
             view<float>(t + 16));
}

template <typename T>
void call_backward(const Sizes& s, const int64_t* t) {
  backward<T>(s, view<const T>(t), view<const T>(t + 4), view<const T>(t + 8), view<const T>(t + 12),
              view<float>(t + 16), view<const T>(t + 20), view<float>(t + 24), view<T>(t + 28), view<T>(t + 32),
              view<T>(t + 36));
}

}  // namespace

extern "C" {

// tensors: q, k, v, y, logsum; sinks may be null
void attention_forward(bool bf16, const Sizes* sizes, const int64_t* tensors, const int64_t* sinks) {
  auto logits = reinterpret_cast<const float*>(*sinks);
  bf16 ? call_forward<BFloat16>(*sizes, tensors, logits) : call_forward<float>(*sizes, tensors, logits);
}

// tensors: q, k, v, y, logsum, dy, delta, dq, dk, dv
void attention_backward(bool bf16, const Sizes* sizes, const int64_t* tensors) {
  bf16 ? call_backward<BFloat16>(*sizes, tensors) : call_backward<float>(*sizes, tensors);
}
}
