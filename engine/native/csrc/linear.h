// Linear layers over packed weights, with what surrounds them in a decoder: RMSNorm before, and after the product a bias,
// the residual, or the gate of a gated MLP (arXiv:2002.05202).
#pragma once

#include <cmath>

#include "gemm.h"

namespace slipstream {

struct Input {
  const bf16* data;
  int64_t rows, size, stride;
  Norm norm;
};

struct Scratch {  // grows to what the largest call needs, and is kept: a step must not wait for pages
  std::vector<uint32_t> words;

  uint32_t* at_least(int64_t count) {
    if (static_cast<int64_t>(words.size()) < count) words.resize(count);
    return words.data();
  }
};

// What to ask for while tile `index` of `count` is multiplied by a unit of V / 2 panels: all tiles together ask for as much
// as the unit has, and keep ahead of the first tile, which reads it all. A single tile asks for one panel of a pair; the
// other, which is read beside it, is left to the hardware, or both would wait for each other.
template <int V>
Ahead ahead_of(const bf16* unit, int64_t bytes, int64_t index, int64_t count) {
  const char* from = reinterpret_cast<const char*>(unit);
  if (count == 1) return {from + kPrefetchBytes, 2 * kPrefetchPairs};
  const int64_t read = V > 2 ? bytes : bytes - bytes / count + kPrefetchBytes;
  return {from + read + index * bytes / count, (V * kPrefetchPairs + count - 1) / count};
}

// Calls epilogue(row, unit, sums) for all rows and units; a unit is V / 2 neighbouring panels. Threads share the units of
// all blocks of rows evenly.
template <int V, class Epilogue>
void multiply(const Input& x, const bf16* packed, int64_t units, int threads, Scratch& scratch, Epilogue&& epilogue) {
  const int64_t pairs = (x.size + 1) / 2, panel = pairs * 2 * kPanel;
  const Tiling tiling(x.rows, 2 * kTileRows / V);
  const Tiling blocks(tiling.count, std::max<int64_t>(1, kBlockRows * V / 2 / kTileRows));
  uint32_t* tiles = scratch.at_least(x.rows * pairs);
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    for (int64_t tile = thread * tiling.count / team; tile < (thread + 1) * tiling.count / team; ++tile) {
      const int64_t start = tiling.start(tile), rows = tiling.size(tile);
      for (int64_t row = 0; row < rows; ++row)
        pack_row(x.data + (start + row) * x.stride, x.size, x.norm, tiles + start * pairs + row, rows);
    }
#pragma omp barrier
    const int64_t work = blocks.count * units;
    for (int64_t item = thread * work / team; item < (thread + 1) * work / team; ++item) {
      const int64_t block = item / units, count = blocks.size(block);
      const bf16* weights = packed + item % units * (V / 2) * panel;
      const bf16* panels[2] = {weights, weights + (V / 2 - 1) * panel};
      for (int64_t index = 0; index < count; ++index) {
        const int64_t tile = blocks.start(block) + index, start = tiling.start(tile);
        multiply_rows<V, 0>(tiling.size(tile), tiles + start * pairs, panels, pairs,
                         ahead_of<V>(weights, V / 2 * panel * sizeof(bf16), index, count),
                         [&](int64_t row, const __m512* sums) { epilogue(start + row, item % units, sums); });
      }
    }
  }
}

// y = norm(x) W^T + bias + residual; `residual` has the shape of y. Out is bf16 or float.
template <class Out>
void linear(const Input& x, const bf16* packed, int64_t outputs, const float* bias, const bf16* residual, Out* y,
            int threads, Scratch& scratch) {
  multiply<2>(x, packed, (outputs + kPanel - 1) / kPanel, threads, scratch,
              [=](int64_t row, int64_t unit, const __m512* sums) {
                for (int half = 0; half < 2; ++half) {
                  const int64_t column = unit * kPanel + half * 16, at = row * outputs + column;
                  const __mmask16 mask = first_lanes(outputs - column);
                  __m512 sum = sums[half];
                  if (bias != nullptr) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, bias + column));
                  if (residual != nullptr) sum = _mm512_add_ps(sum, load_bf16(residual + at, mask));
                  if constexpr (sizeof(Out) == sizeof(float)) {
                    _mm512_mask_storeu_ps(y + at, mask, sum);
                  } else {
                    store_bf16(y + at, sum, mask);
                  }
                }
              });
}

// y = activation(gate(norm(x))) * up(norm(x)), panels of gate and up by turns. `bias` is of gate, then of up.
template <Activation A>
void gated_linear(const Input& x, const bf16* packed, int64_t inner, const float* bias, bf16* y, int threads,
                  Scratch& scratch) {
  multiply<4>(x, packed, (inner + kPanel - 1) / kPanel, threads, scratch,
              [=](int64_t row, int64_t unit, const __m512* sums) {
                for (int half = 0; half < 2; ++half) {
                  const int64_t column = unit * kPanel + half * 16;
                  const __mmask16 mask = first_lanes(inner - column);
                  __m512 gate = sums[half], up = sums[half + 2];
                  if (bias != nullptr) {
                    gate = _mm512_add_ps(gate, _mm512_maskz_loadu_ps(mask, bias + column));
                    up = _mm512_add_ps(up, _mm512_maskz_loadu_ps(mask, bias + inner + column));
                  }
                  gate = A == Activation::kSilu ? silu_ps(gate) : gelu_tanh_ps(gate);
                  store_bf16(y + row * inner + column, _mm512_mul_ps(gate, up), mask);
                }
              });
}

}  // namespace slipstream
