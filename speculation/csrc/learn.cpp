#include "memory.h"

namespace slipstream {
namespace {

// Evidence for one key, in the order in which it came: entries [begin, end) of a lesson sorted by keys.
struct Group {
  uint64_t key, owner;
  int64_t begin, end, row;
};

// Rows for keys in ascending order (KeyTable.claim): those that are there stay; of a bucket's others those go that were
// claimed longest ago, but for what this lesson claims itself.
void claim(const Memory& memory, std::vector<Group>& groups, int64_t now) {
  int64_t(*const claimed)[kWays] = memory.claimed;
  for (Group& group : groups) {
    group.row = memory.find(group.key, group.owner);
    if (group.row != kNowhere) claimed[group.row / kWays][group.row % kWays] = now;
  }
  for (Group& group : groups) {
    if (group.row != kNowhere) continue;
    const int64_t bucket = memory.bucket_of(group.key);
    const int64_t way = std::min_element(claimed[bucket], claimed[bucket] + kWays) - claimed[bucket];
    if (claimed[bucket][way] == now) continue;
    claimed[bucket][way] = now;
    memory.buckets[bucket].keys[way] = group.key;
    memory.buckets[bucket].owners[way] = group.owner;
    group.row = bucket * kWays + way;
    memory.rows[group.row].weights.fill(0.0f);
  }
}

}  // namespace
}  // namespace slipstream

using namespace slipstream;

// Successors.add: after windows [n, width] came tokens [n, k] with weights [n, k]; owners and terms are [n, columns].
extern "C" void learn(const Memory* memory, const Columns* columns, int64_t now, int64_t n, int64_t k,
                      const int64_t* windows, const uint64_t* owners, const uint64_t* terms, const int64_t* tokens,
                      const float* weights) {
  thread_local std::vector<uint64_t> keys;
  thread_local std::vector<int64_t> order;
  thread_local std::vector<Group> groups;
  thread_local std::vector<Choice> choices;
  const int64_t entries = n * columns->count;
  keys.resize(entries);
  for (int64_t i = 0; i < n; ++i)
    columns->keys(windows + (i + 1) * columns->width, terms + i * columns->count, &keys[i * columns->count]);
  order.resize(entries);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [](int64_t a, int64_t b) { return keys[a] != keys[b] ? keys[a] < keys[b] : a < b; });
  groups.clear();
  for (int64_t i = 0; i < entries; ++i) {
    const uint64_t key = keys[order[i]];
    if (groups.empty() || groups.back().key != key) groups.push_back({key, owners[order[i]], i, i, kNowhere});
    groups.back().end = i + 1;
  }
  claim(*memory, groups, now);
  for (const Group& group : groups) {
    if (group.row == kNowhere) continue;
    Row& row = memory->rows[group.row];
    choices.clear();
    float kept = std::pow(memory->fading, static_cast<float>(group.end - group.begin));
    for (int64_t j = 0; j < kWidth; ++j)
      if (row.weights[j] > 0) add_up(choices, row.tokens[j], row.weights[j] * kept);
    for (int64_t i = group.begin; i < group.end; ++i) {
      const int64_t from = order[i] / columns->count * k;
      kept = std::pow(memory->fading, static_cast<float>(group.end - 1 - i));
      for (int64_t j = from; j < from + k; ++j)
        if (weights[j] * kept > 0) add_up(choices, tokens[j], weights[j] * kept);
    }
    const auto most = choices.begin() + std::min<int64_t>(kWidth, choices.size());
    std::partial_sort(choices.begin(), most, choices.end(), heavier);
    row = Row{};
    for (auto choice = choices.begin(); choice != most; ++choice) {
      row.tokens[choice - choices.begin()] = static_cast<int32_t>(choice->token);
      row.weights[choice - choices.begin()] = choice->weight;
    }
  }
}
