// The arithmetic of tree.DraftBatch, which defines it: loops over nodes that NumPy would take level by level.
#include <cstdint>
#include <vector>

namespace {
constexpr int64_t kRoot = -1;   // tree.ROOT
constexpr int64_t kNoNode = -1;  // walk.NO_NODE
}  // namespace

extern "C" {

// arrays: [6, nodes], those of shape.Shape. 0, or 1 if offsets or parents are not as they must be, and then nothing is
// said.
int64_t shape_of(int64_t requests, int64_t nodes, const int64_t* parents, const int64_t* offsets, int64_t* arrays) {
  int64_t *request_of = arrays, *ranks = request_of + nodes, *parent_nodes = ranks + nodes,
          *parent_rows = parent_nodes + nodes, *depths = parent_rows + nodes, *sibling_ranks = depths + nodes;
  thread_local std::vector<int64_t> children;
  if (offsets[0] != 0 || offsets[requests] != nodes) return 1;
  children.assign(nodes + requests, 0);
  for (int64_t r = 0; r < requests; ++r) {
    if (offsets[r] > offsets[r + 1] || offsets[r + 1] > nodes) return 1;
    for (int64_t node = offsets[r]; node < offsets[r + 1]; ++node) {
      const int64_t rank = node - offsets[r], parent = parents[node];
      if (parent < kRoot || parent >= rank) return 1;
      const int64_t above = parent == kRoot ? kRoot : offsets[r] + parent, row = offsets[r] + r + parent + 1;
      request_of[node] = r;
      ranks[node] = rank;
      parent_nodes[node] = above;
      parent_rows[node] = row;
      depths[node] = above == kRoot ? 1 : depths[above] + 1;
      sibling_ranks[node] = children[row]++;
    }
  }
  return 0;
}

// [nodes] the product of factors over each node and those above it.
void path_products(int64_t nodes, const int64_t* parent_nodes, const double* factors, double* products) {
  for (int64_t node = 0; node < nodes; ++node)
    products[node] = parent_nodes[node] == kRoot ? factors[node] : products[parent_nodes[node]] * factors[node];
}

// walk.follow: which nodes [nodes] are accepted where each row's token is `tokens` [rows], and the last token of each
// request.
void follow(int64_t requests, int64_t nodes, const int64_t* drafted, const int64_t* parent_rows, const int64_t* offsets,
            const int64_t* tokens, uint8_t* accepted, int64_t* last) {
  thread_local std::vector<int64_t> following;  // [rows]
  following.assign(nodes + requests, kNoNode);
  for (int64_t node = nodes - 1; node >= 0; --node) {  // so that the first of equals stays
    accepted[node] = 0;
    if (drafted[node] == tokens[parent_rows[node]]) following[parent_rows[node]] = node;
  }
  for (int64_t r = 0; r < requests; ++r) {
    int64_t row = offsets[r] + r;
    for (int64_t node; (node = following[row]) != kNoNode; row = node + r + 1) accepted[node] = 1;
    last[r] = tokens[row];
  }
}

// Acceptance._count of the requests that are `wanted` [requests]: counts are asked, proposed and accepted by rank [ranks]
// each, then first children that were judged, and those of them that were accepted.
void count_ranks(int64_t requests, int64_t ranks, const int64_t* offsets, const int64_t* parent_nodes,
                 const int64_t* sibling_ranks, const uint8_t* accepted, const int64_t* asked, const uint8_t* wanted,
                 double* counts) {
  double *proposed = counts + ranks, *right = counts + 2 * ranks, *firsts = counts + 3 * ranks;
  for (int64_t r = 0; r < requests; ++r) {
    if (!wanted[r]) continue;
    for (int64_t rank = 0; rank < ranks && rank < asked[r]; ++rank) ++counts[rank];
    for (int64_t node = offsets[r]; node < offsets[r + 1]; ++node) {
      const int64_t rank = node - offsets[r];
      ++proposed[rank], right[rank] += accepted[node];
      if (sibling_ranks[node] == 0 && (parent_nodes[node] == kRoot || accepted[parent_nodes[node]]))
        ++firsts[0], firsts[1] += accepted[node];
    }
  }
}
}
