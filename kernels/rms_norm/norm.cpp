// RMSNorm of rows, plain or of x SiLU(z) in groups of channels, forward and backward.
// The README has the letters. `common.h` comes before this text.

namespace {

constexpr int64_t ROWS = 64;  // rows whose gradients of the weight are summed together

struct Sizes {
  int64_t rows, groups, width;  // channels of a group

  int64_t channels() const { return groups * width; }
  int64_t blocks() const { return (rows + ROWS - 1) / ROWS; }
};

// Rows that are `row` apart; data is null if there is no such tensor.
template <typename T>
struct View {
  T* data;
  int64_t row;

  T* at(int64_t i) const { return data + i * row; }
};

// r = (mean(u^2) + eps)^(-1/2)
float inverse(float squares, int64_t width, float eps) {
  return 1.f / std::sqrt(squares / width + eps);
}

template <typename T>
void forward(const Sizes& s, View<const T> x, View<const T> z, const float* weight, View<T> y, float* r, float eps) {
  parallel(s.blocks(), [&](int64_t begin, int64_t end) {
    Memory own;
    float* u = own.get<float>(s.width + WIDTH);
    for (int64_t i = begin * ROWS; i < std::min(s.rows, end * ROWS); ++i)
      for (int64_t g = 0; g < s.groups; ++g) {
        const int64_t from = g * s.width;
        Vec squares(0.f);
        for (int64_t c = 0; c < s.width; c += WIDTH) {
          Vec value = load(x.at(i) + from + c, s.width - c);
          if (z.data) {
            const Vec gate = load(z.at(i) + from + c, s.width - c);
            value = value * gate * sigmoid<T>(gate);
          }
          store(value, u + c);
          squares = at::vec::fmadd(value, value, squares);
        }
        const float scale = r[i * s.groups + g] = inverse(squares.reduce_add(), s.width, eps);
        for (int64_t c = 0; c < s.width; c += WIDTH)
          store(load(u + c) * Vec(scale) * load(weight + from + c, s.width - c), y.at(i) + from + c, s.width - c);
      }
  });
}

// dweight is (blocks, channels). With v = w dy: du = r v - u r^3 mean(u v).
template <typename T>
void backward(const Sizes& s, View<const T> x, View<const T> z, const float* weight, const float* r, View<const T> dy,
              View<T> dx, View<T> dz, float* dweight) {
  parallel(s.blocks(), [&](int64_t begin, int64_t end) {
    Memory own;
    float *u = own.get<float>(s.width + WIDTH), *v = own.get<float>(s.width + WIDTH);
    float* opened = own.get<float>(s.width + WIDTH);  // sigmoid(z)
    for (int64_t block = begin; block < end; ++block) {
      float* sums = dweight + block * s.channels();
      std::fill(sums, sums + s.channels(), 0.f);
      for (int64_t i = block * ROWS; i < std::min(s.rows, (block + 1) * ROWS); ++i)
        for (int64_t g = 0; g < s.groups; ++g) {
          const int64_t from = g * s.width;
          const Vec scale(r[i * s.groups + g]);
          Vec inner(0.f);
          for (int64_t c = 0; c < s.width; c += WIDTH) {
            const int64_t n = s.width - c;
            Vec value = load(x.at(i) + from + c, n);
            if (z.data) {
              const Vec gate = load(z.at(i) + from + c, n), open = sigmoid<T>(gate);
              value = value * gate * open;
              store(open, opened + c);
            }
            const Vec d = load(dy.at(i) + from + c, n), weighted = d * load(weight + from + c, n);
            store(at::vec::fmadd(value * scale, d, load(sums + from + c, n)), sums + from + c, n);
            inner = at::vec::fmadd(value, weighted, inner);
            store(value, u + c);
            store(weighted, v + c);
          }
          const Vec shrunk = Vec(inner.reduce_add() / s.width) * scale * scale * scale;
          for (int64_t c = 0; c < s.width; c += WIDTH) {
            const int64_t n = s.width - c;
            Vec du = load(v + c) * scale - load(u + c) * shrunk;
            if (z.data) {
              const Vec gate = load(z.at(i) + from + c, n), open = load(opened + c);
              store(du * load(x.at(i) + from + c, n) * open * (Vec(1.f) + gate * (Vec(1.f) - open)),
                    dz.at(i) + from + c, n);
              du = du * gate * open;
            }
            store(du, dx.at(i) + from + c, n);
          }
        }
    }
  });
}

template <typename T>
View<T> view(const int64_t* tensor) {
  return {reinterpret_cast<T*>(tensor[0]), tensor[1]};
}

template <typename T>
void call_forward(const Sizes& s, const int64_t* t, float eps) {
  forward<T>(s, view<const T>(t), view<const T>(t + 2), view<const float>(t + 4).data, view<T>(t + 6),
             view<float>(t + 8).data, eps);
}

template <typename T>
void call_backward(const Sizes& s, const int64_t* t) {
  backward<T>(s, view<const T>(t), view<const T>(t + 2), view<const float>(t + 4).data, view<const float>(t + 6).data,
              view<const T>(t + 8), view<T>(t + 10), view<T>(t + 12), view<float>(t + 14).data);
}

}  // namespace

extern "C" {

// tensors: x, z, weight, y, r; z may be null
void norm_forward(bool bf16, const Sizes* sizes, const int64_t* tensors, const double* eps) {
  bf16 ? call_forward<BFloat16>(*sizes, tensors, *eps) : call_forward<float>(*sizes, tensors, *eps);
}

// tensors: x, z, weight, r, dy, dx, dz, dweight
void norm_backward(bool bf16, const Sizes* sizes, const int64_t* tensors) {
  bf16 ? call_backward<BFloat16>(*sizes, tensors) : call_backward<float>(*sizes, tensors);
}
}
