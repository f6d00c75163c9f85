// Rows of the KV cache copied and summed in one pass over memory: what a hand-off within a host costs.
//
// The sum is XXH3's 64 bits with seed 0 and its default secret (Y. Collet, xxHash, XXH3 in doc/xxhash_spec.md), for
// inputs of more than 240 bytes that are whole stripes of 64.

#include <cstddef>
#include <cstdint>

#include "stripe.h"

namespace slipstream {
namespace {

constexpr int64_t kStripe = 64;

class Xxh3 {
 public:
  explicit Xxh3(int64_t bytes) : bytes_(bytes), left_(bytes / kStripe) {}

  void add(Stripe stripe) {
    if (--left_ == 0) {
      mix(stripe, kSecret + sizeof kSecret - kStripe - 7);
      return;
    }
    mix(stripe, kSecret + 8 * in_block_);
    if (++in_block_ == kBlock) scramble();
  }

  uint64_t digest() const {
    alignas(kStripe) uint64_t lanes[8];
    lanes_.store(lanes);
    uint64_t sum = static_cast<uint64_t>(bytes_) * kPrime64[0];
    for (int pair = 0; pair < 4; ++pair) {
      const unsigned __int128 product = static_cast<unsigned __int128>(lanes[2 * pair] ^ word(11 + 16 * pair)) *
                                        (lanes[2 * pair + 1] ^ word(19 + 16 * pair));
      sum += static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
    }
    sum ^= sum >> 37;
    sum *= 0x165667919E3779F9u;
    return sum ^ (sum >> 32);
  }

 private:
  static constexpr int kBlock = 16;  // stripes, each with the secret from 8 bytes further on
  static constexpr uint32_t kPrime32[3] = {0x9E3779B1u, 0x85EBCA77u, 0xC2B2AE3Du};
  static constexpr uint64_t kPrime64[5] = {0x9E3779B185EBCA87u, 0xC2B2AE3D27D4EB4Fu, 0x165667B19E3779F9u,
                                           0x85EBCA77C2B2AE63u, 0x27D4EB2F165667C5u};
  static constexpr uint8_t kSecret[192] = {
      0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
      0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
      0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
      0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
      0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
      0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
      0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
      0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
      0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
      0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
      0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
      0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e};

  static uint64_t word(int at) {
    uint64_t value;
    __builtin_memcpy(&value, kSecret + at, sizeof value);
    return value;
  }

  void mix(Stripe stripe, const uint8_t* secret) {
    const Stripe key = stripe ^ Stripe::load(secret);
    lanes_ = lanes_ + key.times_low(key.right<32>()) + stripe.swapped();
  }

  void scramble() {
    const Stripe mixed = lanes_ ^ lanes_.right<47>() ^ Stripe::load(kSecret + sizeof kSecret - kStripe);
    const Stripe prime = Stripe::set(kPrime32[0]);
    lanes_ = mixed.times_low(prime) + mixed.right<32>().times_low(prime).left<32>();
    in_block_ = 0;
  }

  Stripe lanes_ = Stripe::set({kPrime32[2], kPrime64[0], kPrime64[1], kPrime64[2], kPrime64[3], kPrime32[1],
                               kPrime64[4], kPrime32[0]});
  int64_t bytes_, left_;
  int in_block_ = 0;
};

// `slots` rows of `row` bytes; layer l's keys begin at l * layer_stride, its values value_stride further on.
struct Rows {
  uint8_t* data;
  int64_t layers, slots, row, layer_stride, value_stride;

  uint8_t* plane(int64_t index) const { return data + (index >> 1) * layer_stride + (index & 1) * value_stride; }
};

struct Run {
  int64_t source, target, length;  // rows
};

// A pool's rows are stored past the caches (`kStreamed`): they are wanted on another core, later. Runs lie anywhere, and
// a page walk costs as much as a copied page: while one run is moved the next is asked for, into the second cache: the
// first has places for few lines that are still to come.
template <bool kCopied, bool kSummed, bool kStreamed>
uint64_t move(const Rows& source, const Rows* target, const Run* runs, int64_t count) {
  int64_t rows = 0;
  for (int64_t i = 0; i < count; ++i) rows += runs[i].length;
  Xxh3 sum(2 * source.layers * rows * source.row);
  for (int64_t plane = 0; plane < 2 * source.layers; ++plane) {
    const uint8_t* from = source.plane(plane);
    for (int64_t i = 0; i < count; ++i) {
      const uint8_t* here = from + runs[i].source * source.row;
      const uint8_t* next = i + 1 < count ? from + runs[i + 1].source * source.row : here;
      uint8_t* there = kCopied ? target->plane(plane) + runs[i].target * target->row : nullptr;
      for (int64_t at = 0; at < runs[i].length * source.row; at += kStripe) {
        _mm_prefetch(reinterpret_cast<const char*>(next + at), _MM_HINT_T1);
        const Stripe stripe = Stripe::load(here + at);
        if constexpr (kCopied && kStreamed) stripe.stream(there + at);
        if constexpr (kCopied && !kStreamed) stripe.store(there + at);
        if constexpr (kSummed) sum.add(stripe);
      }
    }
  }
  if constexpr (kStreamed) _mm_sfence();
  return kSummed ? sum.digest() : 0;
}

bool within(int64_t first, int64_t length, int64_t slots) {
  return first >= 0 && length > 0 && length <= slots && first <= slots - length;
}

}  // namespace
}  // namespace slipstream

// Copies `runs` of rows into `target` unless it is null, and writes the sum of what was read to `sum` unless that is
// null. Returns -1, or the place of the first run that is not in the caches, of which nothing was done then.
extern "C" int64_t move_rows(const slipstream::Rows* source, const slipstream::Rows* target,
                             const slipstream::Run* runs, int64_t count, bool streamed, uint64_t* sum) {
  using namespace slipstream;
  for (int64_t i = 0; i < count; ++i) {
    if (!within(runs[i].source, runs[i].length, source->slots)) return i;
    if (target && !within(runs[i].target, runs[i].length, target->slots)) return i;
  }
  if (!target) {
    *sum = move<false, true, false>(*source, target, runs, count);
  } else if (sum) {
    *sum = (streamed ? move<true, true, true> : move<true, true, false>)(*source, target, runs, count);
  } else {
    (streamed ? move<true, false, true> : move<true, false, false>)(*source, target, runs, count);
  }
  return -1;
}
