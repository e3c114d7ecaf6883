// Causal depthwise convolution over a few positions, with or without SiLU, forward and backward.
// The README has the letters. `common.h` comes before this text.

namespace {

constexpr int64_t ROWS = 64;  // positions of a block

struct Sizes {
  int64_t b, l, c, k, silu;

  int64_t blocks() const { return (l + ROWS - 1) / ROWS; }
};

template <typename T>
struct View {
  T* data;
  int64_t batch, position;

  T* at(int64_t b, int64_t t) const { return data + b * batch + t * position; }
};

// Asks for the rows of a block. The passes over channels read them column by column, which the processor does not foresee.
template <typename T>
void fetch(const Sizes& s, const View<const T>& x, int64_t b, int64_t start, int64_t stop) {
  for (int64_t t = start; t < std::min(s.l, stop); ++t)
    for (int64_t c = 0; c < s.c; c += 64 / sizeof(T)) __builtin_prefetch(x.at(b, t) + c, 0, 2);
}

// Bias plus the sum of K taps times the last K inputs, oldest first.
template <int K>
Vec convolved(const Vec* taps, const Vec& bias, const Vec* inputs) {
  Vec u = bias;
  for (int i = 0; i < K; ++i) u = at::vec::fmadd(taps[i], inputs[i], u);
  return u;
}

// Drops the oldest of K values and appends the newest.
template <int K>
void append(Vec* values, const Vec& newest) {
  for (int i = 0; i + 1 < K; ++i) values[i] = values[i + 1];
  values[K - 1] = newest;
}

// The channels of one vector, n of them from c. They go through all positions of a block in registers.
template <int K>
struct Channels {
  int64_t c, n;
  Vec taps[K], bias;

  Channels(const Sizes& s, const float* all_taps, const float* all_bias, int64_t c)
      : c(c), n(s.c - c), bias(all_bias ? load(all_bias + c, s.c - c) : Vec(0.f)) {
    for (int i = 0; i < K; ++i) taps[i] = load(all_taps + i * s.c + c, n);
  }

  template <typename T>
  Vec read(const View<const T>& x, int64_t b, int64_t t) const {
    return t < 0 ? Vec(0.f) : load(x.at(b, t) + c, n);
  }

  // The last K - 1 inputs before position t, and room for the one at t.
  template <typename T>
  void read_before(const View<const T>& x, int64_t b, int64_t t, Vec* inputs) const {
    for (int i = 1; i < K; ++i) inputs[i] = read(x, b, t - K + i);
  }
};

template <typename T, int K>
void forward(const Sizes& s, View<const T> x, const float* taps, const float* bias, View<T> y) {
  parallel(s.b * s.blocks(), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / s.blocks(), start = task % s.blocks() * ROWS, stop = std::min(s.l, start + ROWS);
      fetch(s, x, b, start, stop);
      for (int64_t c = 0; c < s.c; c += WIDTH) {
        const Channels<K> channels(s, taps, bias, c);
        Vec inputs[K];
        channels.read_before(x, b, start, inputs);
        for (int64_t t = start; t < stop; ++t) {
          append<K>(inputs, channels.read(x, b, t));
          const Vec u = convolved<K>(channels.taps, channels.bias, inputs);
          store(s.silu ? u * sigmoid<T>(u) : u, y.at(b, t) + c, channels.n);
        }
      }
    }
  });
}

// dtaps is (tasks, K + 1, c): the gradients of the taps and of the bias from each block of positions.
template <typename T, int K>
void backward(const Sizes& s, View<const T> x, const float* taps, const float* bias, View<const T> dy, View<T> dx,
              float* dtaps) {
  parallel(s.b * s.blocks(), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / s.blocks(), start = task % s.blocks() * ROWS, stop = std::min(s.l, start + ROWS);
      fetch(s, x, b, start, stop + K - 1);
      fetch(s, dy, b, start, stop + K - 1);
      for (int64_t c = 0; c < s.c; c += WIDTH) {
        const Channels<K> channels(s, taps, bias, c);
        // du is the gradient before SiLU, of the last K positions. The input at t affects the K positions from t on.
        Vec inputs[K], du[K], sums[K + 1];
        channels.read_before(x, b, start, inputs);
        for (int i = 0; i < K; ++i) du[i] = sums[i] = Vec(0.f);
        sums[K] = Vec(0.f);
        for (int64_t t = start; t < stop + K - 1; ++t) {
          Vec d(0.f);
          if (t < s.l) {
            append<K>(inputs, channels.read(x, b, t));
            d = channels.read(dy, b, t);
            if (s.silu) {
              const Vec u = convolved<K>(channels.taps, channels.bias, inputs), gate = sigmoid<T>(u);
              d = d * gate * (Vec(1.f) + u * (Vec(1.f) - gate));
            }
          }
          append<K>(du, d);
          if (t < stop) {
            for (int i = 0; i < K; ++i) sums[i] = at::vec::fmadd(d, inputs[i], sums[i]);
            sums[K] = sums[K] + d;
          }
          if (t >= start + K - 1) {
            Vec sum(0.f);
            for (int i = 0; i < K; ++i) sum = at::vec::fmadd(channels.taps[K - 1 - i], du[i], sum);
            store(sum, dx.at(b, t - K + 1) + c, channels.n);
          }
        }
        for (int i = 0; i <= K; ++i) store(sums[i], dtaps + (task * (K + 1) + i) * s.c + c, channels.n);
      }
    }
  });
}

template <typename T>
View<T> view(const int64_t* tensor) {
  return {reinterpret_cast<T*>(tensor[0]), tensor[1], tensor[2]};
}

template <typename T, int K>
void call_forward(const Sizes& s, const int64_t* t) {
  forward<T, K>(s, view<const T>(t), view<const float>(t + 3).data, view<const float>(t + 6).data, view<T>(t + 9));
}

template <typename T, int K>
void call_backward(const Sizes& s, const int64_t* t) {
  backward<T, K>(s, view<const T>(t), view<const float>(t + 3).data, view<const float>(t + 6).data,
                 view<const T>(t + 9), view<T>(t + 12), view<float>(t + 15).data);
}

// Calls f with the number of taps as a constant.
template <typename F>
void with_taps(int64_t k, const F& f) {
  switch (k) {
    case 1: return f(std::integral_constant<int, 1>());
    case 2: return f(std::integral_constant<int, 2>());
    case 3: return f(std::integral_constant<int, 3>());
    case 4: return f(std::integral_constant<int, 4>());
  }
}

}  // namespace

extern "C" {

// tensors: x, taps, bias, y; bias may be null
void conv_forward(bool bf16, const Sizes* sizes, const int64_t* tensors) {
  with_taps(sizes->k, [&](auto k) {
    bf16 ? call_forward<BFloat16, k>(*sizes, tensors) : call_forward<float, k>(*sizes, tensors);
  });
}

// tensors: x, taps, bias, dy, dx, dtaps
void conv_backward(bool bf16, const Sizes* sizes, const int64_t* tensors) {
  with_taps(sizes->k, [&](auto k) {
    bf16 ? call_backward<BFloat16, k>(*sizes, tensors) : call_backward<float, k>(*sizes, tensors);
  });
}
}
