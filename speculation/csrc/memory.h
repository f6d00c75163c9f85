// What has followed contexts, in the arrays of drafters/key_table.py and drafters/successors.py: the caches themselves
// belong to Python, which also defines what is done here.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

namespace slipstream {

constexpr int64_t kWays = 4;    // KeyTable.WAYS
constexpr int64_t kWidth = 8;   // Successors.WIDTH
constexpr int64_t kLongest = 16;  // contexts._LONGEST
constexpr int64_t kNowhere = -1;

// Tokens and their weights, the heaviest first; weights of 0 where there are no more.
struct Row {
  std::array<int32_t, kWidth> tokens;
  std::array<float, kWidth> weights;
};

struct Bucket {
  std::array<uint64_t, kWays> keys, owners;
};

struct Memory {
  Bucket* buckets;
  int64_t (*claimed)[kWays];
  Row* rows;
  int64_t shift;  // the high bits of a key number its bucket
  float fading;

  int64_t bucket_of(uint64_t key) const { return static_cast<int64_t>(key >> shift); }

  int64_t find(uint64_t key, uint64_t owner) const {
    const int64_t bucket = bucket_of(key);
    const Bucket& tags = buckets[bucket];
    for (int64_t way = 0; way < kWays; ++way)
      if (tags.keys[way] == key && tags.owners[way] == owner) return bucket * kWays + way;
    return kNowhere;
  }
};

// Which contexts are looked up, one in each column; keys as Contexts.keys makes them.
struct Columns {
  int64_t count, width;
  const int64_t* ends;       // [count] tokens of each, less one
  const uint64_t* tops;      // [count] the highest bit of its keys
  const uint64_t* factors;   // [width] of tokens, by their distance from the end
  uint64_t mixing;

  // `window` ends before `end`; terms [count] are of the owners.
  void keys(const int64_t* end, const uint64_t* terms, uint64_t* found) const {
    std::array<uint64_t, kLongest> sums;
    uint64_t sum = 0;
    for (int64_t back = 0; back < width; ++back)
      sums[back] = sum += (static_cast<uint64_t>(end[-1 - back]) + 1) * factors[back];
    for (int64_t column = 0; column < count; ++column) {
      uint64_t key = sums[ends[column]] + terms[column];
      key = (key ^ (key >> 32)) * mixing;
      found[column] = ((key ^ (key >> 32)) >> 1) | tops[column] | 1;
    }
  }
};

struct Choice {
  int64_t token;
  float weight;
};

// Every token once, in the order in which they came first.
inline void add_up(std::vector<Choice>& choices, int64_t token, float weight) {
  for (Choice& choice : choices)
    if (choice.token == token) {
      choice.weight += weight;
      return;
    }
  choices.push_back({token, weight});
}

inline bool heavier(const Choice& one, const Choice& other) {
  return one.weight != other.weight ? one.weight > other.weight : one.token < other.token;
}

}  // namespace slipstream
