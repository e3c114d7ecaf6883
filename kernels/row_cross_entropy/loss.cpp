// Cross-entropy of rows of logits and its gradient, which takes the place of the logits, in fp32 or bf16.
// The README has the letters. `common.h` comes before this text.

namespace {

template <typename T>
void cross_entropy(int64_t rows, int64_t n, T* logits, const int64_t* targets, int64_t ignored, float* losses) {
  parallel(rows, [&](int64_t begin, int64_t end) {
    Memory own;
    float* weights = own.get<float>(n + WIDTH);
    for (int64_t i = begin; i < end; ++i) {
      T* line = logits + i * n;
      if (targets[i] == ignored) {
        std::fill(line, line + n, T{});
        losses[i] = 0;
        continue;
      }
      const int64_t whole = n / WIDTH * WIDTH;
      Vec most(-std::numeric_limits<float>::infinity());
      for (int64_t c = 0; c < whole; c += WIDTH) most = at::vec::maximum(most, load(line + c));
      float top = most.reduce_max();
      for (int64_t c = whole; c < n; ++c) top = std::max(top, value(line[c]));
      Vec sums(0.f);
      for (int64_t c = 0; c < whole; c += WIDTH) {
        const Vec weight = (load(line + c) - Vec(top)).exp_u20();
        store(weight, weights + c);
        sums = sums + weight;
      }
      float sum = sums.reduce_add();
      for (int64_t c = whole; c < n; ++c) sum += weights[c] = std::exp(value(line[c]) - top);
      losses[i] = std::log(sum) + top - value(line[targets[i]]);
      const Vec inverse(1.f / sum);
      weights[targets[i]] -= sum;
      for (int64_t c = 0; c < n; c += WIDTH) store(load(weights + c) * inverse, line + c, n - c);
    }
  });
}

}  // namespace

extern "C" {

// sizes: rows, columns, target of ignored rows; tensors: logits, targets, losses
void cross_entropy_rows(bool bf16, const int64_t* sizes, const int64_t* tensors) {
  auto targets = reinterpret_cast<const int64_t*>(tensors[1]);
  auto losses = reinterpret_cast<float*>(tensors[2]);
  if (bf16)
    cross_entropy(sizes[0], sizes[1], reinterpret_cast<BFloat16*>(tensors[0]), targets, sizes[2], losses);
  else
    cross_entropy(sizes[0], sizes[1], reinterpret_cast<float*>(tensors[0]), targets, sizes[2], losses);
}
}
