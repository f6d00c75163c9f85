// Attention over the paged cache, for one row as for a long chunk, in the order of FlashAttention (arXiv:2205.14135):
// keys are visited in chunks, each row keeps a running maximum, sum and mix.
//
// The query heads that share a KV head, of neighbouring rows, are the rows of a tile; the keys of a chunk are packed as
// the panels of a weight would be, and so are its values with keys as inputs. Both products are then those of gemm.h.
// A part of the work is a KV head of some rows of a sequence over some of its keys: long chunks are cut by rows, and by
// keys if there would be fewer parts than threads can share.
#pragma once

#include <cmath>
#include <limits>

#include "gemm.h"
#include "rope.h"

namespace slipstream {

constexpr int64_t kChunkKeys = 256;
constexpr int64_t kShortChunkKeys = 64;  // for a single tile, which needs what is packed only once
constexpr int64_t kPartRows = 64;
constexpr float kLog2E = 1.44269504f;
constexpr int64_t kSplitKeys = 1024;  // keys are not cut finer

struct Span {  // one sequence of the step
  int64_t row, rows;  // its rows in the step
  int64_t context;    // keys before the step; row j is key context + j
  const int64_t* blocks;
  const uint8_t* mask;  // [rows][width] from key `mask_start` on; null: a chain
  int64_t mask_start, mask_width;
};

struct Attention {
  const bf16* queries;  // [rows][row_stride]
  int64_t row_stride;
  Heads heads;
  CacheLayer cache;
  int64_t block_shift;  // a block holds 2^block_shift slots
  float scale, softcap;  // softcap 0: none
  int64_t window;        // 0: none

  int64_t group() const { return heads.queries / heads.keys; }
  const bf16* key(const Span& span, int64_t index, int64_t head) const {
    const int64_t within = index & ((int64_t{1} << block_shift) - 1);
    const int64_t slot = (span.blocks[index >> block_shift] << block_shift) + within;
    return cache.data + slot * cache.slot + head * heads.size;
  }

  // The keys that a row of a sequence sees, as far as a range can say it.
  int64_t first_seen(const Span& span, int64_t row) const {
    if (span.mask != nullptr) return span.mask_start;
    return window > 0 ? std::max<int64_t>(0, span.context + row - window + 1) : 0;
  }
  int64_t end_seen(const Span& span, int64_t row) const {
    return span.context + (span.mask != nullptr ? span.rows : row + 1);
  }
};

struct Part {
  int64_t span, head, heads, first_row, rows, first_key, keys, split;
};

// Into the second-level cache: the first has too few slots for lines under way.
inline void fetch(const bf16* line) { _mm_prefetch(reinterpret_cast<const char*>(line), _MM_HINT_T1); }

inline void transpose_16x16(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// 32 keys as a panel, [size / 2][32][2]. Keys from `count` on are zero. The keys `upcoming` are asked for on the way: they
// lie all over the cache, where no hardware foresees them.
inline void pack_keys(const bf16* const* keys, int64_t count, int64_t size, bf16* panel, const bf16* const* upcoming) {
  const int64_t pairs = size / 2;
  for (int64_t half = 0; half < 2; ++half)
    for (int64_t pair = 0; pair < pairs; pair += 16) {
      const __mmask16 mask = first_lanes(pairs - pair);
      __m512i rows[16];
      for (int64_t k = 0; k < 16; ++k)
        rows[k] = half * 16 + k < count ? _mm512_maskz_loadu_epi32(mask, keys[half * 16 + k] + pair * 2)
                                        : _mm512_setzero_si512();
      for (int64_t k = 0; k < 16; ++k) fetch(upcoming[half * 16 + k] + pair * 2);
      transpose_16x16(rows);
      for (int64_t i = 0; i < std::min<int64_t>(16, pairs - pair); ++i)
        _mm512_storeu_si512(panel + (pair + i) * 2 * kPanel + half * 32, rows[i]);
    }
}

// A pair of values into the panels of 32 dimensions, `panel` apart, at their place along the keys.
inline void pack_value_pair(const bf16* first, const bf16* second, int64_t size, bf16* to, int64_t panel,
                            const bf16* const* upcoming) {
  alignas(64) static const uint16_t order[64] = {
      0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47,
      16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
  const __m512i low = _mm512_load_si512(order), high = _mm512_load_si512(order + 32);
  for (int64_t d = 0; d < size; d += kPanel, to += panel) {
    const __mmask32 mask = size - d >= 32 ? ~0u : (1u << (size - d)) - 1;
    const __m512i a = first != nullptr ? _mm512_maskz_loadu_epi16(mask, first + d) : _mm512_setzero_si512();
    const __m512i b = second != nullptr ? _mm512_maskz_loadu_epi16(mask, second + d) : _mm512_setzero_si512();
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, low, b));
    _mm512_storeu_si512(to + 32, _mm512_permutex2var_epi16(a, high, b));
    fetch(upcoming[0] + d);
    fetch(upcoming[1] + d);
  }
}

// What a thread works in, for one part.
class Workspace {
 public:
  void prepare(int64_t rows, int64_t size) {
    const int64_t padded = (size + kPanel - 1) / kPanel * kPanel;
    queries_.resize(rows * size / 2);
    keys_.resize(kChunkKeys * size);
    values_.resize(kChunkKeys * padded);
    scores_.resize(kTileRows * kChunkKeys);
    weights_.resize(kTileRows * kChunkKeys / 2);
  }
  uint32_t* queries() { return queries_.data(); }
  bf16* keys() { return keys_.data(); }
  bf16* values() { return values_.data(); }
  float* scores() { return scores_.data(); }
  uint32_t* weights() { return weights_.data(); }

 private:
  std::vector<uint32_t> queries_, weights_;
  std::vector<bf16> keys_, values_;
  std::vector<float> scores_;
};

struct Result {  // of one part: [heads][rows * group] maxima (in units of ln 2) and sums, [heads][rows * group][size] mixes
  float* maxima;
  float* sums;
  float* mixes;
};

class PartRun {
 public:
  PartRun(const Attention& attention, const Span& span, const Part& part, Workspace& work, const Result& result)
      : a_(attention), span_(span), part_(part), work_(work), result_(result), group_(a_.group()),
        pairs_(a_.heads.size / 2), tiling_(part.rows * group_, kTileRows) {}

  void operator()() {
    const int64_t queries = part_.heads * tiling_.rows, end = part_.first_key + part_.keys;
    work_.prepare(queries, a_.heads.size);
    std::fill_n(result_.maxima, queries, -std::numeric_limits<float>::infinity());
    std::fill_n(result_.sums, queries, 0.0f);
    std::fill_n(result_.mixes, queries * a_.heads.size, 0.0f);
    for (int64_t head = 0; head < part_.heads; ++head) pack_queries(head);
    chunk_ = tiling_.count == 1 ? kShortChunkKeys : kChunkKeys;
    locate(0, part_.first_key, upcoming_);
    for (int64_t key = part_.first_key; key < end; key += chunk_)
      for (int64_t head = 0; head < part_.heads; ++head) visit(head, key, std::min(chunk_, end - key));
  }

 private:
  void pack_queries(int64_t head) {
    uint32_t* packed = work_.queries() + head * tiling_.rows * pairs_;
    for (int64_t tile = 0; tile < tiling_.count; ++tile)
      for (int64_t row = 0; row < tiling_.size(tile); ++row) {
        const int64_t query = tiling_.start(tile) + row;
        const bf16* x = a_.queries + (span_.row + part_.first_row + query / group_) * a_.row_stride +
                        ((part_.head + head) * group_ + query % group_) * a_.heads.size;
        pack_row(x, a_.heads.size, Norm{}, packed + tiling_.start(tile) * pairs_ + row, tiling_.size(tile));
      }
  }

  void visit(int64_t head, int64_t first, int64_t count) {
    const int64_t panels = (count + kPanel - 1) / kPanel, values = a_.cache.values;
    const int64_t value_panel = panels * kPanel * kPanel;  // a panel of 32 dimensions over the keys of the chunk
    const bf16 *keys[kPanel], *next_values[kPanel], *value[kPanel];
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t here = std::min(kPanel, count - p * kPanel);
      std::copy_n(upcoming_, kPanel, keys);
      if (p + 1 < panels) locate(head, first + (p + 1) * kPanel, upcoming_);
      else if (head + 1 < part_.heads) locate(head + 1, first, upcoming_);
      else locate(0, first + count, upcoming_);
      for (int64_t k = 0; k < kPanel; ++k) {
        next_values[k] = upcoming_[k] + values;
        value[k] = k < here ? keys[k] + values : nullptr;
      }
      pack_keys(keys, here, a_.heads.size, work_.keys() + p * kPanel * a_.heads.size, upcoming_);
      for (int64_t k = 0; k < kPanel; k += 2)
        pack_value_pair(value[k], value[k + 1], a_.heads.size, work_.values() + (p * kPanel + k) * kPanel, value_panel,
                        next_values + k);
    }
    for (int64_t tile = 0; tile < tiling_.count; ++tile) visit_tile(head, tile, first, count, value_panel);
  }

  // Where the panel of keys from `first` on is; what is no key of the part points to the part's last.
  void locate(int64_t head, int64_t first, const bf16** keys) const {
    const int64_t last = part_.first_key + part_.keys - 1;
    for (int64_t k = 0; k < kPanel; ++k) keys[k] = a_.key(span_, std::min(first + k, last), part_.head + head);
  }

  void visit_tile(int64_t head, int64_t tile, int64_t first, int64_t count, int64_t value_panel) {
    const int64_t start = tiling_.start(tile), rows = tiling_.size(tile), base = head * tiling_.rows + start;
    const int64_t top = part_.first_row + start / group_, bottom = part_.first_row + (start + rows - 1) / group_;
    const int64_t from = std::max<int64_t>(0, a_.first_seen(span_, top) - first) / kPanel;
    const int64_t to = (std::min(count, a_.end_seen(span_, bottom) - first) + kPanel - 1) / kPanel;
    if (from >= to) return;
    const uint32_t* queries = work_.queries() + base * pairs_;
    float* scores = work_.scores();
    __m512 highest[kTileRows];
    std::fill_n(highest, rows, hidden());
    for (int64_t p = from; p < to; ++p) {
      const bf16* panel = work_.keys() + p * kPanel * a_.heads.size;
      const int64_t key = first + p * kPanel;
      const bool all_seen =
          span_.mask == nullptr && key >= a_.first_seen(span_, bottom) && key + kPanel <= a_.end_seen(span_, top);
      multiply_rows<2, 0>(rows, queries, &panel, pairs_, Ahead{}, [&](int64_t row, const __m512* sums) {
        for (int64_t half = 0; half < 2; ++half) {
          __m512 score = scaled(sums[half]);
          if (!all_seen) score = _mm512_mask_mov_ps(hidden(), seen(own(start + row), key + half * 16), score);
          highest[row] = _mm512_max_ps(highest[row], score);
          _mm512_storeu_ps(scores + row * kChunkKeys + p * kPanel + half * 16, score);
        }
      });
    }
    float rescale[kTileRows];
    for (int64_t row = 0; row < rows; ++row) rescale[row] = soften(base + row, row, highest[row], from, to);
    for (int64_t d = 0, p = 0; d < a_.heads.size; d += kPanel, ++p) {
      const bf16* panel = work_.values() + p * value_panel + from * kPanel * kPanel;
      multiply_rows<2, kChunkKeys / 2>(
          rows, work_.weights() + from * kPanel / 2, &panel, (to - from) * kPanel / 2, Ahead{},
          [&](int64_t row, const __m512* sums) {
            float* mix = result_.mixes + (base + row) * a_.heads.size + d;
            const __m512 factor = _mm512_set1_ps(rescale[row]);
            for (int half = 0; half < 2; ++half) {
              const __mmask16 mask = first_lanes(a_.heads.size - d - half * 16);
              const __m512 before = _mm512_maskz_loadu_ps(mask, mix + half * 16);
              _mm512_mask_storeu_ps(mix + half * 16, mask, _mm512_fmadd_ps(before, factor, sums[half]));
            }
          });
    }
  }

  // Scores are in units of ln 2, so that a weight is a power of two.
  __m512 scaled(__m512 score) const {
    if (a_.softcap <= 0.0f) return _mm512_mul_ps(score, _mm512_set1_ps(a_.scale * kLog2E));
    const __m512 bent = tanh_ps(_mm512_mul_ps(score, _mm512_set1_ps(a_.scale / a_.softcap)));
    return _mm512_mul_ps(bent, _mm512_set1_ps(a_.softcap * kLog2E));
  }

  static __m512 hidden() { return _mm512_set1_ps(-std::numeric_limits<float>::infinity()); }
  int64_t own(int64_t query) const { return part_.first_row + query / group_; }

  // Which of the 16 keys from `key` on a row sees.
  __mmask16 seen(int64_t row, int64_t key) const {
    return first_lanes(a_.end_seen(span_, row) - key) & ~first_lanes(a_.first_seen(span_, row) - key) & tree(row, key);
  }

  // Scores of a row to weights 2^(score - maximum), in panels from .. to; returns what earlier mixes shrink by.
  float soften(int64_t query, int64_t row, __m512 highest, int64_t from, int64_t to) {
    const float* scores = work_.scores() + row * kChunkKeys;
    uint32_t* weights = work_.weights() + row * kChunkKeys / 2;
    float& maximum = result_.maxima[query];
    const float before = maximum;
    maximum = std::max(before, _mm512_reduce_max_ps(highest));
    const bool none = maximum == -std::numeric_limits<float>::infinity();
    const __m512 base = _mm512_set1_ps(none ? 0.0f : maximum);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t k = from * kPanel; k < to * kPanel; k += 16) {
      const __m512 weight = exp2_ps(_mm512_sub_ps(_mm512_loadu_ps(scores + k), base));
      sum = _mm512_add_ps(sum, weight);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights + k / 2), narrow(weight));
    }
    const float rescale = before == -std::numeric_limits<float>::infinity() ? 0.0f : std::exp2(before - maximum);
    result_.sums[query] = result_.sums[query] * rescale + _mm512_reduce_add_ps(sum);
    return rescale;
  }

  __mmask16 tree(int64_t row, int64_t key) const {
    if (span_.mask == nullptr) return 0xffff;
    const int64_t at = key - span_.mask_start;
    __mmask16 seen = 0;
    for (int64_t lane = std::max<int64_t>(0, -at); lane < std::min<int64_t>(16, span_.mask_width - at); ++lane)
      seen |= static_cast<__mmask16>(span_.mask[row * span_.mask_width + at + lane] != 0) << lane;
    return seen;
  }

  const Attention& a_;
  const Span& span_;
  const Part& part_;
  Workspace& work_;
  const Result& result_;
  const int64_t group_, pairs_;
  const Tiling tiling_;
  int64_t chunk_ = kChunkKeys;
  const bf16* upcoming_[kPanel];
};

}  // namespace slipstream
