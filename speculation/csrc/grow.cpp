#include "memory.h"

namespace slipstream {
namespace {

constexpr float kNegligible = 1e-3f;  // mixture.NEGLIGIBLE
constexpr int64_t kRoot = -1;         // tree.ROOT
constexpr int64_t kDeepest = 64;      // growth.MAX_DEPTH

// How contexts are mixed into one law (mixture.py), the most specific last.
struct Mixing {
  const float* doubts;  // [columns]
  float certainty;      // of what all of them say
  int64_t branches;     // 0: only the likeliest token of each window
};

struct Node {
  int64_t token, above;  // a place among the nodes of the request
  float worth, chance;
  int64_t depth;
};

// The law after the tokens before `end`, by token where it is not negligible; in no order.
void predict(const Memory& memory, const Columns& columns, const Mixing& mixing, const int64_t* end,
             const uint64_t* owners, const uint64_t* terms, std::vector<Choice>& law) {
  std::array<uint64_t, kLongest> keys;
  columns.keys(end, terms, keys.data());
  law.clear();
  for (int64_t column = 0; column < columns.count; ++column) __builtin_prefetch(memory.buckets + memory.bucket_of(keys[column]));
  float left = 1.0f;
  for (int64_t column = columns.count - 1; column >= 0; --column) {
    const int64_t at = memory.find(keys[column], owners[column]);
    if (at == kNowhere) continue;  // no evidence: all is left to the contexts before it
    const Row& row = memory.rows[at];
    float mass = 0.0f;
    for (const float weight : row.weights) mass += weight;
    const float part = left / (mass + mixing.doubts[column]);
    for (int64_t j = 0; j < kWidth; ++j)
      if (const float chance = row.weights[j] * part; chance > kNegligible) add_up(law, row.tokens[j], chance);
    left = part * mixing.doubts[column];
  }
}

// The worthiest nodes are at the top; of equals those that are less deep, and then those that were found first.
struct Worthier {
  const std::vector<Node>& nodes;
  bool operator()(int64_t one, int64_t other) const {
    const Node &a = nodes[one], &b = nodes[other];
    if (a.worth != b.worth) return a.worth < b.worth;
    return a.depth != b.depth ? a.depth > b.depth : one > other;
  }
};

}  // namespace
}  // namespace slipstream

using namespace slipstream;

// growth.grow for mixture.mixed, best node first: trees of at most budgets[r] nodes after windows [requests, width], none
// worth less than `floor`. offsets [requests + 1] and the nodes of all: tokens, parents within the request, chances.
extern "C" void grow(const Memory* memory, const Columns* columns, const Mixing* mixing, int64_t requests,
                     const int64_t* windows, const uint64_t* owners, const uint64_t* terms, const int64_t* budgets,
                     float floor, int64_t* tokens, int64_t* parents, float* chances, int64_t* offsets) {
  thread_local std::vector<Node> nodes;
  thread_local std::vector<int64_t> open;
  thread_local std::vector<int64_t> text;    // windows of the nodes that were chosen, one after the other
  thread_local std::vector<Choice> law;
  const int64_t width = columns->width;
  int64_t count = offsets[0] = 0;
  for (int64_t r = 0; r < requests; ++r) {
    const int64_t first = count;
    const Worthier worthier{nodes};
    nodes.clear(), open.clear();
    text.assign(windows + r * width, windows + (r + 1) * width);
    const auto expand = [&](int64_t place, int64_t depth, float worth) {  // the root, or the node chosen last
      if (depth >= kDeepest) return;
      predict(*memory, *columns, *mixing, text.data() + text.size(), owners + r * columns->count,
              terms + r * columns->count, law);
      if (!mixing->branches && law.size() > 1) {
        std::iter_swap(law.begin(), std::min_element(law.begin(), law.end(), heavier));
        law.resize(1);
      }
      for (const Choice& choice : law) {
        const float chance = choice.weight * mixing->certainty;
        if (worth * chance < floor) continue;
        nodes.push_back({choice.token, place, worth * chance, chance, depth + 1});
        open.push_back(static_cast<int64_t>(nodes.size()) - 1);
        std::push_heap(open.begin(), open.end(), worthier);
      }
    };
    if (budgets[r] > 0) expand(kRoot, 0, 1.0f);
    while (count - first < budgets[r] && !open.empty()) {
      std::pop_heap(open.begin(), open.end(), worthier);
      const Node node = nodes[open.back()];
      open.pop_back();
      const int64_t place = count - first;
      tokens[count] = node.token, parents[count] = node.above, chances[count] = node.chance;
      ++count;
      const int64_t from = (node.above + 1) * width;  // the window of what is above it
      for (int64_t i = 1; i < width; ++i) text.push_back(text[from + i]);
      text.push_back(node.token);
      if (place + 1 < budgets[r]) expand(place, node.depth, node.worth);
    }
    offsets[r + 1] = count;
  }
}
