// 64 bytes that are moved and summed together: a register of AVX-512, or two of AVX2.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace slipstream {

#ifdef __AVX512F__

struct Stripe {
  __m512i all;

  static Stripe load(const void* from) { return {_mm512_loadu_si512(from)}; }
  static Stripe set(const uint64_t (&lanes)[8]) { return load(lanes); }
  static Stripe set(uint64_t lane) { return {_mm512_set1_epi64(static_cast<int64_t>(lane))}; }

  void store(void* to) const { _mm512_store_si512(to, all); }
  void stream(void* to) const { _mm512_stream_si512(reinterpret_cast<__m512i*>(to), all); }

  Stripe operator^(Stripe other) const { return {_mm512_xor_si512(all, other.all)}; }
  Stripe operator+(Stripe other) const { return {_mm512_add_epi64(all, other.all)}; }

  template <int kBits>
  Stripe right() const { return {_mm512_srli_epi64(all, kBits)}; }
  template <int kBits>
  Stripe left() const { return {_mm512_slli_epi64(all, kBits)}; }

  // Of each lane the lower half, times that of the other.
  Stripe times_low(Stripe other) const { return {_mm512_mul_epu32(all, other.all)}; }

  // Of each pair of lanes the other.
  Stripe swapped() const { return {_mm512_shuffle_epi32(all, static_cast<_MM_PERM_ENUM>(0x4e))}; }
};

#else

struct Stripe {
  __m256i low, high;

  static Stripe load(const void* from) {
    const __m256i* at = static_cast<const __m256i*>(from);
    return {_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
  }
  static Stripe set(const uint64_t (&lanes)[8]) { return load(lanes); }
  static Stripe set(uint64_t lane) {
    const __m256i half = _mm256_set1_epi64x(static_cast<int64_t>(lane));
    return {half, half};
  }

  void store(void* to) const {
    __m256i* at = static_cast<__m256i*>(to);
    _mm256_store_si256(at, low);
    _mm256_store_si256(at + 1, high);
  }
  void stream(void* to) const {
    __m256i* at = static_cast<__m256i*>(to);
    _mm256_stream_si256(at, low);
    _mm256_stream_si256(at + 1, high);
  }

  Stripe operator^(Stripe other) const {
    return {_mm256_xor_si256(low, other.low), _mm256_xor_si256(high, other.high)};
  }
  Stripe operator+(Stripe other) const {
    return {_mm256_add_epi64(low, other.low), _mm256_add_epi64(high, other.high)};
  }

  template <int kBits>
  Stripe right() const { return {_mm256_srli_epi64(low, kBits), _mm256_srli_epi64(high, kBits)}; }
  template <int kBits>
  Stripe left() const { return {_mm256_slli_epi64(low, kBits), _mm256_slli_epi64(high, kBits)}; }

  Stripe times_low(Stripe other) const {
    return {_mm256_mul_epu32(low, other.low), _mm256_mul_epu32(high, other.high)};
  }

  Stripe swapped() const { return {_mm256_shuffle_epi32(low, 0x4e), _mm256_shuffle_epi32(high, 0x4e)}; }
};

#endif

}  // namespace slipstream
