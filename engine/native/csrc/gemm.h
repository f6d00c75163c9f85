// y = x W^T in bfloat16 with float32 sums, for one row as for thousands.
//
// W is kept in panels of 32 outputs, [panels][inputs / 2][32][2]: one step along the inputs reads two registers of
// neighbouring outputs, each lane with a pair of inputs, which is what vdpbf16ps multiplies. x is packed before use into
// tiles of at most 12 rows, [tiles][inputs / 2][rows of the tile][2], where RMSNorm can be applied on the way. A tile and
// a panel give up to 24 sums, held in registers over all inputs, so weights are read once per tile from cache and once
// per block of rows from memory (Goto and van de Geijn, 2008).
#pragma once

#include <omp.h>

#include <algorithm>
#include <vector>

#include "simd.h"

namespace slipstream {

constexpr int64_t kPanel = 32;
constexpr int64_t kTileRows = 12;
constexpr int64_t kPrefetchBytes = 8192;  // weights are asked for so far ahead: beyond the page, where no hardware does
constexpr int64_t kPrefetchPairs = 2;     // inputs between requests
constexpr int64_t kBlockRows = 192;  // rows of x that stay in the second-level cache while panels pass by

enum class Activation : int64_t { kSilu = 0, kGeluTanh = 1 };

struct Norm {  // RMSNorm, arXiv:1910.07467; no weight: none
  const float* weight = nullptr;
  float eps = 0.0f;
};

// The tiles that `rows` are cut into: as equal as can be, none above `limit`.
struct Tiling {
  int64_t rows, count, base, larger;

  Tiling(int64_t rows_, int64_t limit) : rows(rows_), count((rows_ + limit - 1) / limit) {
    base = rows / std::max<int64_t>(count, 1);
    larger = rows - base * count;
  }
  int64_t start(int64_t tile) const { return tile * base + std::min(tile, larger); }
  int64_t size(int64_t tile) const { return base + (tile < larger ? 1 : 0); }
};

inline float inverse_rms(const bf16* x, int64_t size, float eps) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < size; i += 16) {
    const __m512 v = load_bf16(x + i, first_lanes(size - i));
    sum = _mm512_fmadd_ps(v, v, sum);
  }
  return 1.0f / std::sqrt(_mm512_reduce_add_ps(sum) / static_cast<float>(size) + eps);
}

// One row of x into its place in a tile: pairs of inputs, `stride` (the rows of the tile) apart.
inline void pack_row(const bf16* x, int64_t inputs, const Norm& norm, uint32_t* tile, int64_t stride) {
  alignas(64) uint32_t pairs[8];
  const float scale = norm.weight != nullptr ? inverse_rms(x, inputs, norm.eps) : 1.0f;
  for (int64_t i = 0; i < inputs; i += 16) {
    const __mmask16 mask = first_lanes(inputs - i);
    __m256i halves = _mm256_maskz_loadu_epi16(mask, x + i);
    if (norm.weight != nullptr) {
      const __m512 scaled = _mm512_mul_ps(widen(halves), _mm512_set1_ps(scale));
      halves = narrow(_mm512_mul_ps(scaled, _mm512_maskz_loadu_ps(mask, norm.weight + i)));
    }
    uint32_t* to = tile + i / 2 * stride;
    if (stride == 1) {
      if (mask == 0xffff) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
        continue;
      }
    }
    _mm256_store_si256(reinterpret_cast<__m256i*>(pairs), halves);
    const int64_t count = std::min<int64_t>(8, (inputs - i + 1) / 2);
    for (int64_t pair = 0; pair < count; ++pair) to[pair * stride] = pairs[pair];
  }
}

// Cache lines to ask memory for while a tile is computed: `lines` of them for every kPrefetchPairs pairs of inputs.
struct Ahead {
  const char* at = nullptr;
  int64_t lines = 0;
};

// R rows times V registers of 16 outputs, two from each panel. The rows are a packed tile, or with a Stride lie so many
// pairs apart. `store(row, sums)` gets V registers for each row.
template <int R, int V, int64_t Stride, class Store>
inline void multiply_tile(const uint32_t* a, const bf16* const* panels, int64_t pairs, Ahead ahead,
                          Store&& store) {
  __m512 sums[R][V];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[r][v] = _mm512_setzero_ps();
  const bf16* b0 = panels[0];
  const bf16* b1 = V > 2 ? panels[1] : nullptr;
  for (int64_t p = 0; p < pairs;) {
    for (const char* end = ahead.at + ahead.lines * 64; ahead.at < end; ahead.at += 64)
      _mm_prefetch(ahead.at, _MM_HINT_T1);
    for (const int64_t end = std::min(pairs, p + kPrefetchPairs); p < end; ++p) {
      __m512i weights[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) weights[v] = _mm512_loadu_si512((v < 2 ? b0 : b1) + (v & 1) * 32);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sums[r][v] = dot_pairs(sums[r][v], a[Stride > 0 ? r * Stride : r], weights[v]);
      a += Stride > 0 ? 1 : R;
      b0 += 2 * kPanel;
      if (V > 2) b1 += 2 * kPanel;
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) store(r, sums[r]);
}

template <int V, int64_t Stride, class Store>
inline void multiply_rows(int64_t rows, const uint32_t* a, const bf16* const* panels, int64_t pairs, Ahead ahead,
                          Store&& store) {
  switch (rows) {
    case 1: return multiply_tile<1, V, Stride>(a, panels, pairs, ahead, store);
    case 2: return multiply_tile<2, V, Stride>(a, panels, pairs, ahead, store);
    case 3: return multiply_tile<3, V, Stride>(a, panels, pairs, ahead, store);
    case 4: return multiply_tile<4, V, Stride>(a, panels, pairs, ahead, store);
    case 5: return multiply_tile<5, V, Stride>(a, panels, pairs, ahead, store);
    case 6: return multiply_tile<6, V, Stride>(a, panels, pairs, ahead, store);
    default: break;
  }
  if constexpr (V == 2) {
    switch (rows) {
      case 7: return multiply_tile<7, V, Stride>(a, panels, pairs, ahead, store);
      case 8: return multiply_tile<8, V, Stride>(a, panels, pairs, ahead, store);
      case 9: return multiply_tile<9, V, Stride>(a, panels, pairs, ahead, store);
      case 10: return multiply_tile<10, V, Stride>(a, panels, pairs, ahead, store);
      case 11: return multiply_tile<11, V, Stride>(a, panels, pairs, ahead, store);
      case 12: return multiply_tile<12, V, Stride>(a, panels, pairs, ahead, store);
      default: break;
    }
  }
}

}  // namespace slipstream
