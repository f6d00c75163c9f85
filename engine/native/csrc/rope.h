// Rotary embedding (arXiv:2104.09864, half-split) of a step's query and key heads, after RMSNorm of each head where the
// model has that; and the way of keys and values to their slots in the cache.
#pragma once

#include <cmath>
#include <cstring>

#include "gemm.h"

namespace slipstream {

constexpr int64_t kAloneTokens = 16;  // fewer are done sooner than other threads wake up

struct Heads {
  int64_t queries, keys, size;
};

struct Rotation {  // [tokens][size], the first half of the sines negated; no more than a head has, and 0 rotates nothing
  const bf16* cosines;
  const bf16* sines;
  int64_t size;
};

struct CacheLayer {  // slots, each with key heads of one size side by side; values are so far behind keys
  bf16* data;
  int64_t slot, values;  // strides
};

inline void normalize_head(bf16* x, int64_t size, const float* weight, float eps) {
  const __m512 scale = _mm512_set1_ps(inverse_rms(x, size, eps));
  for (int64_t i = 0; i < size; i += 16) {
    const __mmask16 mask = first_lanes(size - i);
    const __m512 scaled = _mm512_mul_ps(load_bf16(x + i, mask), scale);
    store_bf16(x + i, _mm512_mul_ps(scaled, _mm512_maskz_loadu_ps(mask, weight + i)), mask);
  }
}

inline void rotate_head(bf16* x, const bf16* cosines, const bf16* sines, int64_t rotated) {
  const int64_t half = rotated / 2;
  for (int64_t i = 0; i < half; i += 16) {
    const __mmask16 mask = first_lanes(half - i);
    const __m512 a = load_bf16(x + i, mask), b = load_bf16(x + half + i, mask);
    const __m512 low = _mm512_mul_ps(b, load_bf16(sines + i, mask));
    const __m512 high = _mm512_mul_ps(a, load_bf16(sines + half + i, mask));
    store_bf16(x + i, _mm512_fmadd_ps(a, load_bf16(cosines + i, mask), low), mask);
    store_bf16(x + half + i, _mm512_fmadd_ps(b, load_bf16(cosines + half + i, mask), high), mask);
  }
}

// x: [tokens][heads][size] with `stride` between tokens, in place. The weight of `norm` is [heads][size].
inline void rotate(bf16* x, int64_t tokens, int64_t stride, int64_t heads, int64_t size, const Rotation& rotation,
                   const Norm& norm, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens > kAloneTokens)
  for (int64_t token = 0; token < tokens; ++token) {
    const int64_t angle = token * rotation.size;
    for (int64_t head = 0; head < heads; ++head) {
      bf16* own = x + token * stride + head * size;
      if (norm.weight != nullptr) normalize_head(own, size, norm.weight + head * size, norm.eps);
      rotate_head(own, rotation.cosines + angle, rotation.sines + angle, rotation.size);
    }
  }
}

// kv: [tokens][2][key heads][size] with `stride` between tokens, to `slots`.
inline void write_cache(const bf16* kv, int64_t tokens, int64_t stride, const Heads& heads, const int64_t* slots,
                        const CacheLayer& cache, int threads) {
  const int64_t width = heads.keys * heads.size;
#pragma omp parallel for num_threads(threads) if (tokens > kAloneTokens)
  for (int64_t token = 0; token < tokens; ++token)
    for (int64_t part = 0; part < 2; ++part)
      std::memcpy(cache.data + part * cache.values + slots[token] * cache.slot, kv + token * stride + part * width,
                  width * sizeof(bf16));
}

}  // namespace slipstream
