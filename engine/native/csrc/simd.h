// AVX-512 helpers. bfloat16 is the upper half of a float32, so widening is a shift.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace slipstream {

using bf16 = uint16_t;

inline __m512 widen(__m256i halves) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

inline __m512 load_bf16(const bf16* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

inline __m512 load_bf16(const bf16* p, __mmask16 mask) { return widen(_mm256_maskz_loadu_epi16(mask, p)); }

inline __m256i narrow(__m512 x) {  // rounds to nearest even
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
}

inline void store_bf16(bf16* p, __m512 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x)); }

inline void store_bf16(bf16* p, __m512 x, __mmask16 mask) { _mm256_mask_storeu_epi16(p, mask, narrow(x)); }

inline float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

inline __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

inline __m512 dot_pairs(__m512 acc, uint32_t pair, __m512i pairs) {
  return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(pair))),
                          reinterpret_cast<__m512bh>(pairs));
}

// e^x for x <= 0 or moderate x, about 2 units in the last place: 2^n from the exponent bits, the rest by a polynomial
// (Cephes' expf). Below -87.3 it is 0.
inline __m512 exp_ps(__m512 x) {
  const __m512 low = _mm512_set1_ps(-87.33654f);
  const __mmask16 alive = _mm512_cmp_ps_mask(x, low, _CMP_GE_OQ);
  x = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(88.37626f)), low);
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 y = _mm512_set1_ps(1.9875691500e-4f);
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.3981999507e-3f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(8.3334519073e-3f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(4.1665795894e-2f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.6666665459e-1f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(5.0000001201e-1f));
  y = _mm512_fmadd_ps(_mm512_mul_ps(y, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_maskz_scalef_ps(alive, y, n);
}

// 2^x for x <= 0, to 5e-5 of itself, which is finer than bfloat16: the exponent from the whole part, the rest by its
// series. Below -126 it is 0.
inline __m512 exp2_ps(__m512 x) {
  const __m512 low = _mm512_set1_ps(-126.0f);
  const __mmask16 alive = _mm512_cmp_ps_mask(x, low, _CMP_GE_OQ);
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_sub_ps(x, n);
  __m512 y = _mm512_set1_ps(9.6181291e-3f);
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(5.5504109e-2f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(2.4022651e-1f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(6.9314718e-1f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f));
  const __m512i shifted = _mm512_slli_epi32(_mm512_cvtps_epi32(n), 23);
  return _mm512_castsi512_ps(_mm512_maskz_add_epi32(alive, _mm512_castps_si512(y), shifted));
}

inline __m512 tanh_ps(__m512 x) {  // 1 - 2 / (e^2x + 1); e^2x is bounded by exp_ps
  const __m512 e = exp_ps(_mm512_add_ps(x, x));
  const __m512 two = _mm512_set1_ps(2.0f), one = _mm512_set1_ps(1.0f);
  return _mm512_sub_ps(one, _mm512_div_ps(two, _mm512_add_ps(e, one)));
}

inline __m512 silu_ps(__m512 x) {
  const __m512 e = exp_ps(_mm512_sub_ps(_mm512_setzero_ps(), x));
  return _mm512_div_ps(x, _mm512_add_ps(e, _mm512_set1_ps(1.0f)));
}

inline __m512 gelu_tanh_ps(__m512 x) {  // the tanh form, arXiv:1606.08415
  const __m512 cubic = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
  const __m512 inner = _mm512_mul_ps(_mm512_set1_ps(0.7978845608f),
                                     _mm512_fmadd_ps(cubic, _mm512_set1_ps(0.044715f), x));
  const __m512 half = _mm512_mul_ps(_mm512_set1_ps(0.5f), x);
  return _mm512_fmadd_ps(half, tanh_ps(inner), half);
}

}  // namespace slipstream
