#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/List.h>
#include <ATen/ops/empty.h>
#include <ATen/record_function.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <bit>
#include <optional>

#include "attend.h"
#include "likeliest.h"
#include "linear.h"
#include "rope.h"

namespace slipstream {
namespace {

thread_local Scratch scratch;

// The kernels trust pointers and counts, so all of them pass here: a wrong one is an error, not somebody's memory.
void check_bf16(const at::Tensor& t) {
  TORCH_CHECK(t.scalar_type() == at::kBFloat16, "the kernels compute in bfloat16, not ", t.scalar_type());
}

const bf16* data(const at::Tensor& t) {
  check_bf16(t);
  return static_cast<const bf16*>(t.const_data_ptr());
}

bf16* mutable_data(at::Tensor& t) {
  check_bf16(t);
  return static_cast<bf16*>(t.mutable_data_ptr());
}

const float* floats(const std::optional<at::Tensor>& t, int64_t count) {
  if (!t) return nullptr;
  TORCH_CHECK(t->is_contiguous() && t->numel() == count, "expected ", count, " numbers side by side, not ", t->sizes());
  return t->const_data_ptr<float>();
}

const bf16* panels(const at::Tensor& packed, int64_t count, int64_t inputs) {
  const int64_t panel = (inputs + 1) / 2 * 2 * kPanel;
  TORCH_CHECK(packed.is_contiguous() && packed.numel() == count * panel, "packed weights of shape ", packed.sizes(),
              " are not ", count, " panels of ", inputs, " inputs");
  return data(packed);
}

int64_t panels_of(int64_t outputs) { return (outputs + kPanel - 1) / kPanel; }

void check_range(const int64_t* values, int64_t count, int64_t end, const char* what) {
  int64_t lowest = 0, highest = -1;
  for (int64_t i = 0; i < count; ++i) {
    lowest = std::min(lowest, values[i]);
    highest = std::max(highest, values[i]);
  }
  TORCH_CHECK(lowest >= 0 && highest < end, what, " ", lowest < 0 ? lowest : highest, " is not one of ", end);
}

Input input(const at::Tensor& x, const std::optional<at::Tensor>& norm, double eps) {
  TORCH_CHECK(x.dim() == 2 && x.stride(1) == 1 && x.scalar_type() == at::kBFloat16, "x must be rows of bfloat16");
  return {data(x), x.size(0), x.size(1), x.stride(0), {floats(norm, x.size(1)), static_cast<float>(eps)}};
}

at::Tensor linear_op(const at::Tensor& x, const at::Tensor& packed, int64_t outputs,
                     const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& norm, double eps,
                     const std::optional<at::Tensor>& residual, bool wide) {
  const Input in = input(x, norm, eps);
  at::Tensor y = at::empty({in.rows, outputs}, x.options().dtype(wide ? at::kFloat : at::kBFloat16));
  TORCH_CHECK(!residual || (residual->is_contiguous() && residual->sizes() == y.sizes()),
              "residual must be contiguous and of the shape of the output");
  const bf16* weights = panels(packed, panels_of(outputs), in.size);
  const bf16* added = residual ? data(*residual) : nullptr;
  const float* offsets = floats(bias, outputs);
  if (wide)
    linear(in, weights, outputs, offsets, added, y.mutable_data_ptr<float>(), at::get_num_threads(), scratch);
  else
    linear(in, weights, outputs, offsets, added, mutable_data(y), at::get_num_threads(), scratch);
  return y;
}

at::Tensor gated_op(const at::Tensor& x, const at::Tensor& packed, int64_t inner,
                    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& norm, double eps,
                    int64_t activation) {
  const Input in = input(x, norm, eps);
  const bf16* weights = panels(packed, 2 * panels_of(inner), in.size);
  const float* offsets = floats(bias, 2 * inner);
  at::Tensor y = at::empty({in.rows, inner}, x.options());
  if (static_cast<Activation>(activation) == Activation::kSilu)
    gated_linear<Activation::kSilu>(in, weights, inner, offsets, mutable_data(y), at::get_num_threads(), scratch);
  else
    gated_linear<Activation::kGeluTanh>(in, weights, inner, offsets, mutable_data(y), at::get_num_threads(), scratch);
  return y;
}

void rotate_op(at::Tensor& heads, const at::Tensor& cosines, const at::Tensor& sines,
               const std::optional<at::Tensor>& norms, double eps) {
  TORCH_CHECK(heads.dim() == 3 && heads.stride(2) == 1 && heads.stride(1) == heads.size(2),
              "heads must be [tokens, heads, size] with heads side by side");
  const int64_t rotated = cosines.size(-1);
  TORCH_CHECK(rotated % 2 == 0 && rotated <= heads.size(2) && cosines.numel() == heads.size(0) * rotated &&
                  cosines.is_contiguous() && sines.is_contiguous() && sines.sizes() == cosines.sizes(),
              "cosines and sines must be [tokens, 1, an even number within a head]");
  rotate(mutable_data(heads), heads.size(0), heads.stride(0), heads.size(1), heads.size(2),
         {data(cosines), data(sines), rotated}, {floats(norms, heads.size(1) * heads.size(2)), static_cast<float>(eps)},
         at::get_num_threads());
}

// What the numbers of a sequence say, within what there is of rows, block tables and masks.
Span span_of(const int64_t* numbers, int64_t rows, int64_t block_shift, const at::Tensor& blocks,
             const std::optional<at::Tensor>& masks) {
  const int64_t row = numbers[0], count = numbers[1], context = numbers[2], table = numbers[3], mask = numbers[4];
  const int64_t first = mask < 0 ? 0 : numbers[5], keys = context + count, width = keys - first;
  TORCH_CHECK(row >= 0 && count >= 0 && row + count <= rows && context >= 0 && table >= 0 && first >= 0 && width >= 0,
              "a sequence must be among the rows of the step, with keys that are counted from 0");
  TORCH_CHECK(table + ((keys - 1) >> block_shift) < blocks.numel(), "a sequence of ", keys, " keys needs more blocks");
  TORCH_CHECK(mask < 0 || (masks && mask + count * width <= masks->numel()), "a mask is too short for its sequence");
  return {row, count, context, blocks.const_data_ptr<int64_t>() + table,
          mask < 0 ? nullptr : masks->const_data_ptr<uint8_t>() + mask, first, width};
}

// spans: [sequences][6]: row, rows, context, where its blocks begin in `blocks`, where its mask begins in `masks` or -1,
// the key that its mask begins with.
at::Tensor attention_op(const at::Tensor& query, const at::Tensor& kv, at::Tensor& cache, const at::Tensor& slots,
                        const at::Tensor& spans, const at::Tensor& blocks, const std::optional<at::Tensor>& masks,
                        double scale, double softcap, int64_t window) {
  TORCH_CHECK(query.dim() == 3 && kv.dim() == 4 && cache.dim() == 5 && spans.dim() == 2 && spans.size(1) == 6,
              "query must be [rows, heads, size], kv [rows, 2, heads, size], spans [sequences, 6] and cache [2, blocks, "
              "block size, heads, size]");
  const Heads heads{query.size(1), cache.size(3), cache.size(4)};
  const int64_t rows = query.size(0), block = cache.size(2);
  TORCH_CHECK(heads.size % 2 == 0 && heads.keys > 0 && heads.queries % heads.keys == 0 && query.size(2) == heads.size &&
                  kv.sizes() == at::IntArrayRef({rows, 2, heads.keys, heads.size}) && cache.size(0) == 2,
              "heads must be of one even size, so many of query for each of kv and cache");
  TORCH_CHECK(block > 0 && std::has_single_bit(static_cast<uint64_t>(block)), "block size ", block,
              " is no power of two");
  TORCH_CHECK(slots.numel() == rows && slots.is_contiguous() && spans.is_contiguous() && blocks.is_contiguous() &&
                  (!masks || masks->is_contiguous()),
              "slots, one for each row, spans, blocks and masks must be contiguous");
  TORCH_CHECK(query.stride(2) == 1 && query.stride(1) == heads.size && kv.stride(3) == 1 && kv.stride(2) == heads.size &&
                  kv.stride(1) == heads.keys * heads.size && cache.stride(4) == 1 && cache.stride(3) == heads.size &&
                  cache.stride(1) == cache.size(2) * cache.stride(2),
              "heads of query, kv and a slot of the cache must be side by side, and slots at equal distances");
  check_range(slots.const_data_ptr<int64_t>(), rows, cache.size(1) * block, "slot");
  check_range(blocks.const_data_ptr<int64_t>(), blocks.numel(), cache.size(1), "block");
  const int64_t shift = std::countr_zero(static_cast<uint64_t>(block));
  std::vector<Span> list(spans.size(0));
  const int64_t* numbers = spans.const_data_ptr<int64_t>();
  for (Span& span : list) {
    span = span_of(numbers, rows, shift, blocks, masks);
    numbers += 6;
  }
  const CacheLayer layer{mutable_data(cache), cache.stride(2), cache.stride(0)};
  write_cache(data(kv), rows, kv.stride(0), heads, slots.const_data_ptr<int64_t>(), layer, at::get_num_threads());
  const Attention attention{data(query), query.stride(0), heads, layer, shift,
                            static_cast<float>(scale), static_cast<float>(softcap), window};
  at::Tensor out = at::empty({rows, heads.queries * heads.size}, query.options());
  AttentionStep(attention, list, at::get_num_threads())(mutable_data(out));
  return out;
}

// A decoder layer, residual stream in and out. weights: packed qkv, out, gated and down; norms: before attention and MLP.
at::Tensor decoder_layer_op(const at::Tensor& hidden, at::TensorList weights,
                            const c10::List<std::optional<at::Tensor>>& biases, at::TensorList norms,
                            const std::optional<at::Tensor>& head_norms, double eps, int64_t queries, int64_t inner,
                            int64_t activation, const at::Tensor& cosines, const at::Tensor& sines, at::Tensor& cache,
                            const at::Tensor& slots, const at::Tensor& spans, const at::Tensor& blocks,
                            const std::optional<at::Tensor>& masks, double scale, double softcap, int64_t window) {
  const int64_t tokens = hidden.size(0), keys = cache.size(3), size = cache.size(4);
  const auto project = [&](const at::Tensor& x, int64_t which, int64_t outputs, const std::optional<at::Tensor>& norm,
                           const std::optional<at::Tensor>& residual) {
    RECORD_FUNCTION("slipstream::linear", std::vector<c10::IValue>{});
    return linear_op(x, weights[which], outputs, biases.get(which), norm, eps, residual, false);
  };
  at::Tensor qkv = project(hidden, 0, (queries + 2 * keys) * size, norms[0], std::nullopt);
  at::Tensor rotated = qkv.narrow(1, 0, (queries + keys) * size).view({tokens, queries + keys, size});
  rotate_op(rotated, cosines, sines, head_norms, eps);
  at::Tensor mixed;
  {
    RECORD_FUNCTION("slipstream::attention", std::vector<c10::IValue>{});
    mixed = attention_op(rotated.narrow(1, 0, queries),
                         qkv.narrow(1, queries * size, 2 * keys * size).view({tokens, 2, keys, size}), cache, slots,
                         spans, blocks, masks, scale, softcap, window);
  }
  const at::Tensor attended = project(mixed, 1, hidden.size(1), std::nullopt, hidden);
  at::Tensor gated;
  {
    RECORD_FUNCTION("slipstream::gated_linear", std::vector<c10::IValue>{});
    gated = gated_op(attended, weights[2], inner, biases.get(2), norms[1], eps, activation);
  }
  return project(gated, 3, hidden.size(1), std::nullopt, attended);
}

// [rows, count] ids and log-probabilities of the largest of these rows of logits.
std::tuple<at::Tensor, at::Tensor> likeliest_op(const at::Tensor& logits, const at::Tensor& rows, int64_t count) {
  TORCH_CHECK(logits.dim() == 2 && logits.stride(1) == 1 && count > 0 && count <= logits.size(1),
              "logits must be rows of at least ", count, " numbers side by side, not ", logits.sizes());
  TORCH_CHECK(rows.is_contiguous(), "rows must be contiguous");
  check_range(rows.const_data_ptr<int64_t>(), rows.numel(), logits.size(0), "row");
  at::Tensor ids = at::empty({rows.numel(), count}, rows.options());
  at::Tensor logprobs = at::empty({rows.numel(), count}, logits.options());
  const float* from = logits.const_data_ptr<float>();
  const int64_t* which = rows.const_data_ptr<int64_t>();
  int64_t* to_ids = ids.mutable_data_ptr<int64_t>();
  float* to_logprobs = logprobs.mutable_data_ptr<float>();
#pragma omp parallel num_threads(at::get_num_threads()) if (rows.numel() > 1)
  {
    Likeliest likeliest;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < rows.numel(); ++i)
      likeliest(from + which[i] * logits.stride(0), logits.size(1), count, to_ids + i * count, to_logprobs + i * count);
  }
  return {ids, logprobs};
}

}  // namespace
}  // namespace slipstream

TORCH_LIBRARY(slipstream, m) {
  m.def("linear(Tensor x, Tensor packed, int outputs, Tensor? bias, Tensor? norm, float eps, Tensor? residual, bool wide) -> Tensor");
  m.def("rotate(Tensor(a!) heads, Tensor cosines, Tensor sines, Tensor? norms, float eps) -> ()");
  m.def("attention(Tensor query, Tensor kv, Tensor(a!) cache, Tensor slots, Tensor spans, Tensor blocks, Tensor? masks, float scale, float softcap, int window) -> Tensor");
  m.def("decoder_layer(Tensor hidden, Tensor[] weights, Tensor?[] biases, Tensor[] norms, Tensor? head_norms, float eps, int queries, int inner, int activation, Tensor cosines, Tensor sines, Tensor(a!) cache, Tensor slots, Tensor spans, Tensor blocks, Tensor? masks, float scale, float softcap, int window) -> Tensor");
  m.def("likeliest(Tensor logits, Tensor rows, int count) -> (Tensor, Tensor)");
  m.def("gated_linear(Tensor x, Tensor packed, int inner, Tensor? bias, Tensor? norm, float eps, int activation) -> Tensor");
}

TORCH_LIBRARY_IMPL(slipstream, CPU, m) {
  m.impl("linear", &slipstream::linear_op);
  m.impl("rotate", &slipstream::rotate_op);
  m.impl("attention", &slipstream::attention_op);
  m.impl("decoder_layer", &slipstream::decoder_layer_op);
  m.impl("gated_linear", &slipstream::gated_op);
  m.impl("likeliest", &slipstream::likeliest_op);
}
