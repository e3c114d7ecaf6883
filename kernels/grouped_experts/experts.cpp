// Routed experts with squared ReLU: sorting, gathering, both products and the weighted sum, forward and backward.
// The README has the derivation and the letters. `common.h` comes before this text.

namespace {

constexpr int64_t ROWS = 128;  // choices of an expert that are computed together

struct Sizes {
  int64_t t, k, e, d, f;

  int64_t choices() const { return t * k; }
};

// Calls f(i, memory of the thread) for each expert i. Threads take the next expert when they have finished one.
template <typename F>
void each_expert(const Sizes& s, const F& f) {
  std::atomic<int64_t> next{0};
  parallel(at::get_num_threads(), [&](int64_t, int64_t) {
    Memory own;
    auto call = f(own);
    for (int64_t i = next++; i < s.e; i = next++) call(i);
  });
}

// Sorts choices by expert, in the order of tokens within an expert. Choice c is the c-th entry of `chosen`, (t, k).
void sort(const Sizes& s, const int64_t* chosen, int64_t* first, int64_t* order, int64_t* row_of) {
  std::fill(first, first + s.e + 1, 0);
  for (int64_t c = 0; c < s.choices(); ++c) ++first[chosen[c] + 1];
  for (int64_t i = 0; i < s.e; ++i) first[i + 1] += first[i];
  std::vector<int64_t> next(first, first + s.e);
  for (int64_t c = 0; c < s.choices(); ++c) {
    row_of[c] = next[chosen[c]]++;
    order[row_of[c]] = c;
  }
}

// y_t = sum over the choices of a token of its rows, times weights if there are any.
template <typename T>
void combine(const Sizes& s, const T* rows, const int64_t* row_of, const float* weights, T* y) {
  parallel(s.t, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t c = 0; c < s.d; c += WIDTH) {
        Vec sum(0.f);
        for (int64_t i = t * s.k; i < (t + 1) * s.k; ++i)
          sum = at::vec::fmadd(load(rows + row_of[i] * s.d + c, s.d - c), Vec(weights ? weights[i] : 1.f), sum);
        store(sum, y + t * s.d + c, s.d - c);
      }
  });
}

template <typename T>
void gather(const Sizes& s, const T* x, int64_t row, const int64_t* order, int64_t n, T* out) {
  for (int64_t i = 0; i < n; ++i) std::memcpy(out + i * s.d, x + order[i] / s.k * row, sizeof(T) * s.d);
}

template <typename T>
void forward(const Sizes& s, const T* x, int64_t row, const int64_t* chosen, const float* weights, const T* up,
             const T* down, int64_t* first, int64_t* order, int64_t* row_of, T* rows, T* y) {
  sort(s, chosen, first, order, row_of);
  each_expert(s, [&](Memory& own) {
    T *up_packed = own.get<T>(s.d * s.f), *down_packed = own.get<T>(s.f * s.d);
    T *inputs = own.get<T>(ROWS * s.d), *inner = own.get<T>(ROWS * s.f);
    float *u = own.get<float>(ROWS * s.f + WIDTH), *out = own.get<float>(ROWS * s.d + WIDTH);
    return [=, &s](int64_t i) {
      if (first[i] == first[i + 1]) return;
      pack(up + i * s.d * s.f, s.f, s.d, s.f, s.d, up_packed);
      pack(down + i * s.f * s.d, s.d, s.f, s.d, s.f, down_packed);
      for (int64_t start = first[i]; start < first[i + 1]; start += ROWS) {
        const int64_t n = std::min(ROWS, first[i + 1] - start);
        gather(s, x, row, order + start, n, inputs);
        product(n, s.f, s.d, inputs, s.d, up_packed, s.f, u, s.f);
        for (int64_t c = 0; c < n * s.f; c += WIDTH) {
          const Vec positive = at::vec::maximum(load(u + c), Vec(0.f));
          store(positive * positive, inner + c, n * s.f - c);
        }
        product(n, s.d, s.f, inner, s.f, down_packed, s.d, out, s.d);
        convert(out, n * s.d, rows + start * s.d);
      }
    };
  });
  combine(s, rows, row_of, weights, y);
}

template <typename T>
void backward(const Sizes& s, const T* x, int64_t row, const float* weights, const T* up, const T* down,
              const int64_t* first, const int64_t* order, const int64_t* row_of, const T* dy, int64_t row_dy, T* dx,
              float* dweights, T* dup, T* ddown, T* rows) {
  each_expert(s, [&](Memory& own) {
    T *up_transposed = own.get<T>(s.f * s.d), *inputs = own.get<T>(ROWS * s.d), *douts = own.get<T>(ROWS * s.d);
    T *packed = own.get<T>(ROWS * s.d), *inner = own.get<T>(s.f * ROWS), *du = own.get<T>(s.f * ROWS);
    T* du_packed = own.get<T>(s.f * ROWS);
    float *u = own.get<float>(s.f * ROWS), *g = own.get<float>(s.f * ROWS), *dx_transposed = own.get<float>(s.d * ROWS);
    float *dup_sum = own.get<float>(s.f * s.d + WIDTH), *ddown_sum = own.get<float>(s.f * s.d + WIDTH);
    float* turned = own.get<float>(ROWS * s.d + WIDTH);
    float *weight = own.get<float>(ROWS), *dweight = own.get<float>(ROWS);
    return [=, &s](int64_t i) {
      const T *up_here = up + i * s.d * s.f, *down_here = down + i * s.f * s.d;
      std::fill(dup_sum, dup_sum + s.f * s.d, 0.f);
      std::fill(ddown_sum, ddown_sum + s.f * s.d, 0.f);
      transpose(up_here, s.f, s.d, s.f, s.d, up_transposed);
      for (int64_t start = first[i]; start < first[i + 1]; start += ROWS) {
        const int64_t n = std::min(ROWS, first[i + 1] - start), even = (n + 1) / 2 * 2;
        gather(s, x, row, order + start, n, inputs);
        gather(s, dy, row_dy, order + start, n, douts);
        for (int64_t c = 0; c < ROWS; ++c) weight[c] = c < n ? weights[order[start + c]] : 0.f;
        std::fill(dweight, dweight + ROWS, 0.f);
        // Transposed: row j is an inner channel, column c a choice; columns beyond n are zero.
        pack_transposed(inputs, s.d, n, s.d, ROWS, packed);
        product(s.f, ROWS, s.d, up_transposed, s.d, packed, ROWS, u, ROWS);
        pack_transposed(douts, s.d, n, s.d, ROWS, packed);
        product(s.f, ROWS, s.d, down_here, s.d, packed, ROWS, g, ROWS);
        for (int64_t j = 0; j < s.f * ROWS; j += ROWS)
          for (int64_t c = 0; c < even; c += WIDTH) {
            const Vec positive = at::vec::maximum(load(u + j + c), Vec(0.f)), square = positive * positive;
            const Vec gradient = load(g + j + c);
            store(square, inner + j + c);
            store(at::vec::fmadd(square, gradient, load(dweight + c)), dweight + c);
            store(Vec(2.f) * positive * gradient * load(weight + c), du + j + c);
          }
        for (int64_t c = 0; c < n; ++c) {
          dweights[order[start + c]] = dweight[c];
          for (int64_t m = 0; m < s.d; m += WIDTH)
            store(load(douts + c * s.d + m, s.d - m) * Vec(weight[c]), douts + c * s.d + m, s.d - m);
        }
        pack(douts, s.d, n, s.d, even, packed);
        product(s.f, s.d, even, inner, ROWS, packed, s.d, ddown_sum, s.d, true);
        pack(inputs, s.d, n, s.d, even, packed);
        product(s.f, s.d, even, du, ROWS, packed, s.d, dup_sum, s.d, true);
        pack(du, ROWS, s.f, ROWS, s.f, du_packed);
        product(s.d, ROWS, s.f, up_here, s.f, du_packed, ROWS, dx_transposed, ROWS);
        turn(dx_transposed, ROWS, s.d, n, turned, s.d);
        convert(turned, n * s.d, rows + start * s.d);
      }
      convert(ddown_sum, s.f * s.d, ddown + i * s.f * s.d);
      turn(dup_sum, s.d, s.f, s.d, ddown_sum, s.f);
      convert(ddown_sum, s.f * s.d, dup + i * s.d * s.f);
    };
  });
  combine(s, rows, row_of, nullptr, dx);
}

template <typename T>
T* data(const int64_t* tensors, int64_t i) {
  return reinterpret_cast<T*>(tensors[2 * i]);
}

template <typename T>
void call_forward(const Sizes& s, const int64_t* t) {
  forward<T>(s, data<const T>(t, 0), t[1], data<const int64_t>(t, 1), data<const float>(t, 2), data<const T>(t, 3),
             data<const T>(t, 4), data<int64_t>(t, 5), data<int64_t>(t, 6), data<int64_t>(t, 7), data<T>(t, 8),
             data<T>(t, 9));
}

template <typename T>
void call_backward(const Sizes& s, const int64_t* t) {
  backward<T>(s, data<const T>(t, 0), t[1], data<const float>(t, 1), data<const T>(t, 2), data<const T>(t, 3),
              data<const int64_t>(t, 4), data<const int64_t>(t, 5), data<const int64_t>(t, 6), data<const T>(t, 7),
              t[15], data<T>(t, 8), data<float>(t, 9), data<T>(t, 10), data<T>(t, 11), data<T>(t, 12));
}

}  // namespace

extern "C" {

// tensors, each with the distance of its rows: x, chosen, weights, up, down, first rows of the experts, choice of each
// row, row of each choice, outputs by row, y
void experts_forward(bool bf16, const Sizes* sizes, const int64_t* tensors) {
  bf16 ? call_forward<BFloat16>(*sizes, tensors) : call_forward<float>(*sizes, tensors);
}

// tensors: x, weights, up, down, first rows, choice of each row, row of each choice, dy, dx, dweights, dup, ddown, and
// memory for the gradients by row
void experts_backward(bool bf16, const Sizes* sizes, const int64_t* tensors) {
  bf16 ? call_backward<BFloat16>(*sizes, tensors) : call_backward<float>(*sizes, tensors);
}
}
