// The likeliest tokens of rows of logits. Any among the `count` largest logits lie in the `count` parts of a row that
// have the largest maxima, so a row is read once for these, once for the sum of its exponentials, and hardly a third time.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "simd.h"

namespace slipstream {

constexpr int64_t kPart = 128;

inline float max_of(const float* x, int64_t count) {
  __m512 most = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 lanes = first_lanes(count - i);
    most = _mm512_mask_max_ps(most, lanes, most, _mm512_maskz_loadu_ps(lanes, x + i));
  }
  return _mm512_reduce_max_ps(most);
}

// As exact as exp2_ps is: for laws to learn from, not to draw from.
inline float sum_of_exp(const float* x, int64_t count, float most) {
  const __m512 log2_e = _mm512_set1_ps(1.44269504f), offset = _mm512_set1_ps(-1.44269504f * most);
  const auto powers = [&](__m512 some) { return exp2_ps(_mm512_fmadd_ps(some, log2_e, offset)); };
  __m512 sum = _mm512_setzero_ps(), other = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    sum = _mm512_add_ps(sum, powers(_mm512_loadu_ps(x + i)));
    other = _mm512_add_ps(other, powers(_mm512_loadu_ps(x + i + 16)));
  }
  for (; i < count; i += 16) {
    const __mmask16 lanes = first_lanes(count - i);
    sum = _mm512_mask_add_ps(sum, lanes, sum, powers(_mm512_maskz_loadu_ps(lanes, x + i)));
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(sum, other));
}

// Places and log-probabilities of the `count` largest of logits [vocab], from the top; of equals the first.
class Likeliest {
 public:
  void operator()(const float* logits, int64_t vocab, int64_t count, int64_t* ids, float* logprobs) {
    const int64_t parts = (vocab + kPart - 1) / kPart;
    maxima_.resize(parts);
    order_.resize(parts);
    for (int64_t p = 0; p < parts; ++p) {
      maxima_[p] = max_of(logits + p * kPart, std::min(kPart, vocab - p * kPart));
      order_[p] = p;
    }
    const auto larger = [&](int64_t a, int64_t b) { return maxima_[a] != maxima_[b] ? maxima_[a] > maxima_[b] : a < b; };
    const int64_t few = std::min(count, parts);
    std::partial_sort(order_.begin(), order_.begin() + few, order_.end(), larger);
    const float most = maxima_[order_[0]];
    const float total = std::max(0.0f, std::log(sum_of_exp(logits, vocab, most)));  // so that no chance is above 1
    found_.clear();
    for (int64_t i = 0; i < few; ++i) {
      const int64_t start = order_[i] * kPart;
      for (int64_t id = start; id < std::min(start + kPart, vocab); ++id) found_.push_back(id);
    }
    const auto likelier = [&](int64_t a, int64_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; };
    std::partial_sort(found_.begin(), found_.begin() + count, found_.end(), likelier);
    for (int64_t i = 0; i < count; ++i) {
      ids[i] = found_[i];
      logprobs[i] = logits[found_[i]] - most - total;
    }
  }

 private:
  std::vector<float> maxima_;
  std::vector<int64_t> order_, found_;
};

}  // namespace slipstream
