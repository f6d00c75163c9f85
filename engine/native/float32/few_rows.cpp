// y = x W^T + b in float32 for few rows of x, where reading W takes longer than computing: W is read once, as it lies,
// three outputs at a time, and x, which stays in the cache, once for each of these. Up to four rows and three outputs
// give twelve sums, held in registers over all inputs, as many as two fused multiply-adds a cycle need to be kept busy.
// While three outputs are computed memory is asked for the next.
#include <immintrin.h>

#include <cstdint>

namespace {

constexpr int kOutputs = 3;
constexpr int kRows = 4;
constexpr int kLanes = 8;

struct Rows {  // of x or y, the first of several that are `stride` numbers apart
  int64_t count, stride;
};

// The first `count` lanes.
__m256i lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

float sum(__m256 v) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}

template <int kO, int kR>
void tile(const float* x, int64_t stride, const float* w, int64_t inputs, const float* bias, float* y, int64_t outputs) {
  __m256 sums[kO][kR];
  for (auto& of_output : sums)
    for (auto& s : of_output) s = _mm256_setzero_ps();
  const auto step = [&](int64_t k, auto load) {
    __m256 weights[kO];
    for (int o = 0; o < kO; ++o) weights[o] = load(w + o * inputs + k);
    for (int r = 0; r < kR; ++r) {
      const __m256 v = load(x + r * stride + k);
      for (int o = 0; o < kO; ++o) sums[o][r] = _mm256_fmadd_ps(weights[o], v, sums[o][r]);
    }
  };
  int64_t k = 0;
  for (; k + kLanes <= inputs; k += kLanes) {
    if (k % (2 * kLanes) == 0)  // a cache line; beyond the last weight nothing comes of it
      for (int o = 0; o < kO; ++o) _mm_prefetch(reinterpret_cast<const char*>(w + (kO + o) * inputs + k), _MM_HINT_T0);
    step(k, [](const float* from) { return _mm256_loadu_ps(from); });
  }
  if (k < inputs) {
    const __m256i rest = lanes(inputs - k);
    step(k, [&](const float* from) { return _mm256_maskload_ps(from, rest); });
  }
  for (int r = 0; r < kR; ++r)
    for (int o = 0; o < kO; ++o) y[r * outputs + o] = sum(sums[o][r]) + (bias == nullptr ? 0.0f : bias[o]);
}

// All rows, in tiles as equal as can be.
template <int kO>
void all_rows(const float* x, Rows rows, const float* w, int64_t inputs, const float* bias, float* y, int64_t outputs) {
  constexpr decltype(&tile<kO, 1>) kTiles[kRows] = {tile<kO, 1>, tile<kO, 2>, tile<kO, 3>, tile<kO, 4>};
  int64_t left = (rows.count + kRows - 1) / kRows;
  for (int64_t r = 0, count; left > 0; r += count, --left) {
    count = (rows.count - r + left - 1) / left;
    kTiles[count - 1](x + r * rows.stride, rows.stride, w, inputs, bias, y + r * outputs, outputs);
  }
}

}  // namespace

// x: [rows][inputs], `stride` numbers from row to row; w: [outputs][inputs]; bias: [outputs] or none; y: [rows][outputs].
extern "C" void few_rows(const float* x, int64_t rows, int64_t stride, const float* w, int64_t outputs, int64_t inputs,
                         const float* bias, float* y, int threads) {
  constexpr decltype(&all_rows<1>) kWidths[kOutputs] = {all_rows<1>, all_rows<2>, all_rows<3>};
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t first = 0; first < outputs; first += kOutputs) {
    const int64_t count = outputs - first < kOutputs ? outputs - first : kOutputs;
    kWidths[count - 1](x, {rows, stride}, w + first * inputs, inputs, bias == nullptr ? nullptr : bias + first,
                       y + first, outputs);
  }
}
