// The Mamba-2 recurrence in chunks, forward and backward, in fp32 or bf16, with sums, states and decays in fp32.
// The README has the derivation and the letters. `common.h` comes before this text.

namespace {

struct Sizes {
  int64_t b, l, g, r, p, n, q;  // r heads per group, q positions of a whole chunk

  int64_t heads() const { return g * r; }
  int64_t chunks() const { return (l + q - 1) / q; }
  int64_t columns() const { return r * p; }  // the heads of a group lie side by side
  int64_t stride() const { return (q + WIDTH - 1) / WIDTH * WIDTH; }  // of rows of q numbers
};

// A tensor of batch, positions and groups; all channels of a group are adjacent.
template <typename T>
struct View {
  T* data;
  int64_t batch, position, group;

  T* at(int64_t b, int64_t t, int64_t g) const { return data + b * batch + t * position + g * group; }
};

// Decays of a chunk, (r, stride): cum_i, the sum of dt A up to i; exp(cum_i); exp(cum_q - cum_i) dt_i. Beyond the last
// position dt is zero.
struct Decays {
  int64_t stride;
  float *dt, *cum, *from_start, *to_end, *whole;

  Decays(const Sizes& s, Memory& own)
      : stride(s.stride()), dt(own.get<float>(s.r * stride)), cum(own.get<float>(s.r * stride)),
        from_start(own.get<float>(s.r * stride)), to_end(own.get<float>(s.r * stride)), whole(own.get<float>(s.r)) {}

  void read(const Sizes& s, const float* all_dt, const float* A, int64_t b, int64_t g, int64_t start, int64_t q) {
    for (int64_t i = 0; i < s.r; ++i) {
      const int64_t h = g * s.r + i, line = i * stride;
      float sum = 0;
      for (int64_t t = 0; t < q; ++t) {
        dt[line + t] = all_dt[(b * s.l + start + t) * s.heads() + h];
        cum[line + t] = sum += dt[line + t] * A[h];
      }
      std::fill(dt + line + q, dt + line + stride, 0.f);
      std::fill(cum + line + q, cum + line + stride, sum);
      for (int64_t t = 0; t < stride; t += WIDTH) {
        const Vec c = load(cum + line + t);
        store(c.exp_u20(), from_start + line + t);
        store((Vec(sum) - c).exp_u20() * load(dt + line + t), to_end + line + t);
      }
      whole[i] = std::exp(sum);
    }
  }
};

// Calls f(head, column, n) for the columns of each head of a group, one vector at a time; n of its values are in use.
template <typename F>
void each_column(const Sizes& s, const F& f) {
  for (int64_t i = 0; i < s.r; ++i)
    for (int64_t c = 0; c < s.p; c += WIDTH) f(i, i * s.p + c, s.p - c);
}

// Scales x, (q, columns) in rows that are `row` apart, by a factor for each head and position, (r, stride).
template <typename T>
void scale(const Sizes& s, const T* x, int64_t row, const float* factors, int64_t q, T* out) {
  for (int64_t t = 0; t < q; ++t)
    each_column(s, [&](int64_t i, int64_t c, int64_t n) {
      store(load(x + t * row + c, n) * Vec(factors[i * s.stride() + t]), out + t * s.columns() + c, n);
    });
}

// From states as (r, p, n) to states as (n, columns), or to zeros.
void read_states(const Sizes& s, const float* states, float* out) {
  for (int64_t c = 0; c < s.columns(); ++c)
    for (int64_t m = 0; m < s.n; ++m) out[m * s.columns() + c] = states ? states[c * s.n + m] : 0.f;
}
void write_states(const Sizes& s, const float* states, float* out) {
  for (int64_t c = 0; c < s.columns(); ++c)
    for (int64_t m = 0; m < s.n; ++m) out[c * s.n + m] = states[m * s.columns() + c];
}

// S = decay S for each head of the states, (n, columns).
void decay_states(const Sizes& s, const float* decays, float* states) {
  for (int64_t m = 0; m < s.n; ++m)
    each_column(s, [&](int64_t i, int64_t c, int64_t n) {
      store(load(states + m * s.columns() + c, n) * Vec(decays[i]), states + m * s.columns() + c, n);
    });
}

template <typename T>
void forward(const Sizes& s, View<const T> X, const float* dt, const float* A, View<const T> B, View<const T> C,
             const float* D, const float* before, View<T> Y, float* after, T* states) {
  const int64_t stride = s.stride(), columns = s.columns(), size = s.n * columns;
  parallel(s.b * s.g, [&](int64_t begin, int64_t end) {
    Memory own;
    Decays decays(s, own);
    float *CB = own.get<float>(s.q * stride), *within = own.get<float>(s.q * columns);
    float *carried = own.get<float>(s.q * columns), *S = own.get<float>(size);
    T *M = own.get<T>(s.q * stride), *B_transposed = own.get<T>(s.n * stride), *B_packed = own.get<T>(s.n * stride);
    T *X_packed = own.get<T>(stride * columns), *scaled = own.get<T>(stride * columns), *S_packed = own.get<T>(size);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / s.g, g = task % s.g;
      read_states(s, before ? before + task * size : nullptr, S);
      for (int64_t chunk = 0; chunk < s.chunks(); ++chunk) {
        const int64_t start = chunk * s.q, q = std::min(s.q, s.l - start), even = (q + 1) / 2 * 2;
        const T *Xc = X.at(b, start, g), *Bc = B.at(b, start, g), *Cc = C.at(b, start, g);
        decays.read(s, dt, A, b, g, start, q);
        pack_transposed(Bc, B.position, q, s.n, stride, B_packed);
        product(q, stride, s.n, Cc, C.position, B_packed, stride, CB, stride);
        pack(Xc, X.position, q, columns, even, X_packed);
        for (int64_t i = 0; i < s.r; ++i) {
          const float *cum = decays.cum + i * stride, *step = decays.dt + i * stride;
          for (int64_t t = 0; t < q; ++t) {
            T* line = M + t * stride;
            const int64_t seen = t / WIDTH * WIDTH + WIDTH;
            for (int64_t j = 0; j < seen; j += WIDTH) {
              const Vec decay = exponential<T>(at::vec::minimum(Vec(cum[t]) - load(cum + j), Vec(0.f)));
              store(load(CB + t * stride + j) * decay * load(step + j), line + j);
            }
            std::fill(line + t + 1, line + stride, T{});
          }
          product(q, s.p, even, M, stride, X_packed + PAIR<T> * i * s.p, columns, within + i * s.p, columns);
        }
        T* kept = states + (task * s.chunks() + chunk) * size;
        convert(S, size, kept);
        pack(kept, columns, s.n, columns, s.n, S_packed);
        product(q, columns, s.n, Cc, C.position, S_packed, columns, carried, columns);
        for (int64_t t = 0; t < q; ++t)
          each_column(s, [&](int64_t i, int64_t c, int64_t n) {
            const Vec skip = Vec(D[g * s.r + i]) * load(Xc + t * X.position + c, n);
            const Vec from_before = Vec(decays.from_start[i * stride + t]) * load(carried + t * columns + c, n);
            store(load(within + t * columns + c, n) + from_before + skip, Y.at(b, start + t, g) + c, n);
          });
        scale(s, Xc, X.position, decays.to_end, q, scaled);
        pack(scaled, columns, q, columns, even, X_packed);
        transpose(Bc, B.position, q, s.n, stride, B_transposed);
        decay_states(s, decays.whole, S);
        product(s.n, columns, even, B_transposed, stride, X_packed, columns, S, columns, true);
      }
      write_states(s, S, after + task * size);
    }
  });
}

template <typename T>
void backward(const Sizes& s, View<const T> X, const float* dt, const float* A, View<const T> B, View<const T> C,
              const float* D, const T* states, View<const T> dY, const float* dafter, View<T> dX, float* ddt,
              View<T> dB, View<T> dC, float* dA, float* dD, float* dbefore) {
  const int64_t stride = s.stride(), columns = s.columns(), size = s.n * columns;
  parallel(s.b * s.g, [&](int64_t begin, int64_t end) {
    Memory own;
    Decays decays(s, own);
    float *CBt = own.get<float>(s.q * stride), *dMt = own.get<float>(s.q * stride);
    float *dCBt = own.get<float>(s.q * stride), *seen = own.get<float>(stride), *dcum = own.get<float>(s.r * stride);
    float *dB_sum = own.get<float>(s.q * s.n), *dC_sum = own.get<float>(s.q * s.n), *G = own.get<float>(size);
    float *dX_sum = own.get<float>(s.q * columns), *BG = own.get<float>(s.q * columns);
    float* carried = own.get<float>(s.q * columns);
    T *Mt = own.get<T>(s.q * stride), *dCBt_rounded = own.get<T>(s.q * stride), *dCB = own.get<T>(s.q * stride);
    T *C_transposed = own.get<T>(s.n * stride), *maps = own.get<T>(s.n * stride);
    T *G_rounded = own.get<T>(size), *state_packed = own.get<T>(size);
    T *scaled = own.get<T>(stride * columns), *dY_packed = own.get<T>(stride * columns);
    T* dY_transposed = own.get<T>(stride * columns);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / s.g, g = task % s.g;
      read_states(s, dafter ? dafter + task * size : nullptr, G);
      for (int64_t chunk = s.chunks() - 1; chunk >= 0; --chunk) {
        const int64_t start = chunk * s.q, q = std::min(s.q, s.l - start), even = (q + 1) / 2 * 2;
        const T *Xc = X.at(b, start, g), *Bc = B.at(b, start, g), *Cc = C.at(b, start, g), *dYc = dY.at(b, start, g);
        const T* state = states + (task * s.chunks() + chunk) * size;
        decays.read(s, dt, A, b, g, start, q);
        std::fill(dcum, dcum + s.r * stride, 0.f);
        std::fill(dCBt, dCBt + q * stride, 0.f);

        // Within the chunk, transposed: row j is an input, column i an output.
        pack_transposed(Cc, C.position, q, s.n, stride, maps);
        product(q, stride, s.n, Bc, B.position, maps, stride, CBt, stride);
        pack_transposed(dYc, dY.position, q, columns, stride, dY_transposed);
        pack(dYc, dY.position, q, columns, even, dY_packed);
        for (int64_t i = 0; i < s.r; ++i) {
          const float *cum = decays.cum + i * stride, *step = decays.dt + i * stride;
          float *dcum_here = dcum + i * stride, *ddt_here = ddt + (b * s.l + start) * s.heads() + g * s.r + i;
          product(q, stride, s.p, Xc + i * s.p, X.position, dY_transposed + i * s.p * stride, stride, dMt, stride);
          std::fill(seen, seen + stride, 0.f);
          for (int64_t j = 0; j < q; ++j) {
            float* line = dMt + j * stride;
            T* weights = Mt + j * stride;
            const int64_t first = j / WIDTH * WIDTH;  // the outputs from j on see the input j
            std::fill(line + first, line + j, 0.f);
            const float diagonal = line[j] * CBt[j * stride + j];
            Vec sum(0.f);
            for (int64_t t = first; t < stride; t += WIDTH) {
              const Vec decay = exponential<T>(at::vec::minimum(load(cum + t) - Vec(cum[j]), Vec(0.f)));
              const Vec cb = load(CBt + j * stride + t), left = decay * load(line + t);
              store(cb * decay * Vec(step[j]), weights + t);
              store(at::vec::fmadd(left, Vec(step[j]), load(dCBt + j * stride + t)), dCBt + j * stride + t);
              const Vec u = cb * left;
              sum = sum + u;
              store(at::vec::fmadd(u, Vec(step[j]), load(seen + t)), seen + t);
            }
            std::fill(weights, weights + j, T{});
            if (q < even) weights[q] = T{};
            // An input does not decay at its own position, so the diagonal does not enter the gradient of cum.
            const float total = sum.reduce_add();
            seen[j] -= diagonal * step[j];
            dcum_here[j] -= (total - diagonal) * step[j];
            ddt_here[j * s.heads()] = total;
          }
          for (int64_t t = 0; t < q; ++t) dcum_here[t] += seen[t];
          product(q, s.p, even, Mt, stride, dY_packed + PAIR<T> * i * s.p, columns, dX_sum + i * s.p, columns);
        }

        // Through the states. B G is the gradient of the scaled inputs of the state after the chunk.
        convert(G, size, G_rounded);
        pack(G_rounded, columns, s.n, columns, s.n, state_packed);
        product(q, columns, s.n, Bc, B.position, state_packed, columns, BG, columns);
        pack(state, columns, s.n, columns, s.n, state_packed);
        product(q, columns, s.n, Cc, C.position, state_packed, columns, carried, columns);
        for (int64_t t = 0; t < q; ++t)
          for (int64_t i = 0; i < s.r; ++i) {
            const int64_t h = g * s.r + i, at = i * stride + t, last = i * stride + q - 1;
            Vec of_input(0.f), of_state(0.f), of_skip(0.f);
            for (int64_t c = i * s.p; c < (i + 1) * s.p; c += WIDTH) {
              const int64_t n = (i + 1) * s.p - c;
              const Vec x = load(Xc + t * X.position + c, n), dy = load(dYc + t * dY.position + c, n);
              const Vec v = load(BG + t * columns + c, n);
              of_input = at::vec::fmadd(x, v, of_input);
              of_skip = at::vec::fmadd(x, dy, of_skip);
              of_state = at::vec::fmadd(dy, load(carried + t * columns + c, n), of_state);
              const Vec sum = at::vec::fmadd(Vec(D[h]), dy, load(dX_sum + t * columns + c, n));
              store(at::vec::fmadd(Vec(decays.to_end[at]), v, sum), dX.at(b, start + t, g) + c, n);
            }
            const float weight = of_input.reduce_add(), decayed = weight * decays.to_end[at];
            const int64_t place = (b * s.l + start + t) * s.heads() + h;
            dcum[at] += of_state.reduce_add() * decays.from_start[at] - decayed;
            dcum[last] += decayed;
            ddt[place] += weight * std::exp(decays.cum[last] - decays.cum[at]);
            dD[place] = of_skip.reduce_add();
          }
        // dB = dCB^T C + (w X) G^T and dC = dCB B + (exp(cum) dY) S^T, over all heads at once
        scale(s, Xc, X.position, decays.to_end, q, scaled);
        pack_transposed(G_rounded, columns, s.n, columns, s.n, state_packed);
        product(q, s.n, columns, scaled, columns, state_packed, s.n, dB_sum, s.n);
        convert(dCBt, q * stride, dCBt_rounded);
        pack(Cc, C.position, q, s.n, even, maps);
        product(q, s.n, even, dCBt_rounded, stride, maps, s.n, dB_sum, s.n, true);
        scale(s, dYc, dY.position, decays.from_start, q, scaled);
        pack_transposed(state, columns, s.n, columns, s.n, state_packed);
        product(q, s.n, columns, scaled, columns, state_packed, s.n, dC_sum, s.n);
        transpose(dCBt_rounded, stride, q, q, stride, dCB);
        pack(Bc, B.position, q, s.n, even, maps);
        product(q, s.n, even, dCB, stride, maps, s.n, dC_sum, s.n, true);
        for (int64_t t = 0; t < q; ++t) {
          convert(dB_sum + t * s.n, s.n, dB.at(b, start + t, g));
          convert(dC_sum + t * s.n, s.n, dC.at(b, start + t, g));
        }
        // The gradient of the states before the chunk: exp(cum_q) G + C^T (exp(cum) dY)
        for (int64_t i = 0; i < s.r; ++i) {
          Vec inner(0.f);
          for (int64_t m = 0; m < s.n; ++m)
            for (int64_t c = i * s.p; c < (i + 1) * s.p; c += WIDTH) {
              const int64_t n = (i + 1) * s.p - c;
              inner = at::vec::fmadd(load(G + m * columns + c, n), load(state + m * columns + c, n), inner);
            }
          dcum[i * stride + q - 1] += inner.reduce_add() * decays.whole[i];
        }
        pack(scaled, columns, q, columns, even, dY_packed);
        transpose(Cc, C.position, q, s.n, stride, C_transposed);
        decay_states(s, decays.whole, G);
        product(s.n, columns, even, C_transposed, stride, dY_packed, columns, G, columns, true);
        // cum_i is the sum of dt_k A over k <= i.
        for (int64_t i = 0; i < s.r; ++i) {
          float sum = 0;
          for (int64_t t = q - 1; t >= 0; --t) {
            const int64_t place = (b * s.l + start + t) * s.heads() + g * s.r + i;
            sum += dcum[i * stride + t];
            ddt[place] += A[g * s.r + i] * sum;
            dA[place] = decays.dt[i * stride + t] * sum;
          }
        }
      }
      if (dbefore) write_states(s, G, dbefore + task * size);
    }
  });
}

template <typename T>
View<T> view(const int64_t* tensor) {
  return {reinterpret_cast<T*>(tensor[0]), tensor[1], tensor[2], tensor[3]};
}

template <typename T>
T* data(const int64_t* tensor) {
  return reinterpret_cast<T*>(tensor[0]);
}

template <typename T>
void call_forward(const Sizes& s, const int64_t* v, const int64_t* d) {
  forward<T>(s, view<const T>(v), data<const float>(d), data<const float>(d + 1), view<const T>(v + 4),
             view<const T>(v + 8), data<const float>(d + 2), data<const float>(d + 3), view<T>(v + 12),
             data<float>(d + 4), data<T>(d + 5));
}

template <typename T>
void call_backward(const Sizes& s, const int64_t* v, const int64_t* d) {
  backward<T>(s, view<const T>(v), data<const float>(d), data<const float>(d + 1), view<const T>(v + 4),
              view<const T>(v + 8), data<const float>(d + 2), data<const T>(d + 3), view<const T>(v + 12),
              data<const float>(d + 4), view<T>(v + 16), data<float>(d + 5), view<T>(v + 20), view<T>(v + 24),
              data<float>(d + 6), data<float>(d + 7), data<float>(d + 8));
}

}  // namespace

extern "C" {

// views: X, B, C, Y; dense: dt, A, D, state before (or null), state after, states before the chunks
void ssd_forward(bool bf16, const Sizes* sizes, const int64_t* views, const int64_t* dense) {
  bf16 ? call_forward<BFloat16>(*sizes, views, dense) : call_forward<float>(*sizes, views, dense);
}

// views: X, B, C, dY, dX, dB, dC; dense: dt, A, D, states, gradient of the state after (or null), gradients of dt, of A
// and D by position, and of the state before (or null)
void ssd_backward(bool bf16, const Sizes* sizes, const int64_t* views, const int64_t* dense) {
  bf16 ? call_backward<BFloat16>(*sizes, views, dense) : call_backward<float>(*sizes, views, dense);
}
}
