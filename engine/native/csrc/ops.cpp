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
#include "linear.h"
#include "rope.h"

namespace slipstream {
namespace {

thread_local Scratch scratch;

const bf16* data(const at::Tensor& t) { return static_cast<const bf16*>(t.const_data_ptr()); }
bf16* mutable_data(at::Tensor& t) { return static_cast<bf16*>(t.mutable_data_ptr()); }
const float* floats(const std::optional<at::Tensor>& t) { return t ? t->const_data_ptr<float>() : nullptr; }

Input input(const at::Tensor& x, const std::optional<at::Tensor>& norm, double eps) {
  TORCH_CHECK(x.dim() == 2 && x.stride(1) == 1 && x.scalar_type() == at::kBFloat16, "x must be rows of bfloat16");
  return {data(x), x.size(0), x.size(1), x.stride(0), {floats(norm), static_cast<float>(eps)}};
}

at::Tensor linear_op(const at::Tensor& x, const at::Tensor& packed, int64_t outputs,
                     const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& norm, double eps,
                     const std::optional<at::Tensor>& residual, bool wide) {
  TORCH_CHECK(!residual || residual->is_contiguous(), "residual must be contiguous");
  at::Tensor y = at::empty({x.size(0), outputs}, x.options().dtype(wide ? at::kFloat : at::kBFloat16));
  const bf16* added = residual ? data(*residual) : nullptr;
  if (wide)
    linear(input(x, norm, eps), data(packed), outputs, floats(bias), added, y.mutable_data_ptr<float>(),
           at::get_num_threads(), scratch);
  else
    linear(input(x, norm, eps), data(packed), outputs, floats(bias), added, mutable_data(y), at::get_num_threads(),
           scratch);
  return y;
}

at::Tensor gated_op(const at::Tensor& x, const at::Tensor& packed, int64_t inner,
                    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& norm, double eps,
                    int64_t activation) {
  at::Tensor y = at::empty({x.size(0), inner}, x.options());
  const Input in = input(x, norm, eps);
  if (static_cast<Activation>(activation) == Activation::kSilu)
    gated_linear<Activation::kSilu>(in, data(packed), inner, floats(bias), mutable_data(y), at::get_num_threads(), scratch);
  else
    gated_linear<Activation::kGeluTanh>(in, data(packed), inner, floats(bias), mutable_data(y), at::get_num_threads(), scratch);
  return y;
}

void rotate_op(at::Tensor& heads, const at::Tensor& cosines, const at::Tensor& sines,
               const std::optional<at::Tensor>& norms, double eps) {
  TORCH_CHECK(heads.dim() == 3 && heads.stride(2) == 1 && heads.stride(1) == heads.size(2),
              "heads must be [tokens, heads, size] with heads side by side");
  rotate(mutable_data(heads), heads.size(0), heads.stride(0), heads.size(1), heads.size(2),
         {data(cosines), data(sines), cosines.size(-1)}, {floats(norms), static_cast<float>(eps)},
         at::get_num_threads());
}

// spans: [sequences][6]: row, rows, context, where its blocks begin in `blocks`, where its mask begins in `masks` or -1,
// the key that its mask begins with.
at::Tensor attention_op(const at::Tensor& query, const at::Tensor& kv, at::Tensor& cache, const at::Tensor& slots,
                        const at::Tensor& spans, const at::Tensor& blocks, const std::optional<at::Tensor>& masks,
                        double scale, double softcap, int64_t window) {
  const Heads heads{query.size(1), cache.size(3), cache.size(4)};
  TORCH_CHECK(query.stride(2) == 1 && query.stride(1) == heads.size && kv.stride(3) == 1 && kv.stride(2) == heads.size &&
                  kv.stride(1) == heads.keys * heads.size && cache.stride(4) == 1 && cache.stride(3) == heads.size &&
                  cache.stride(1) == cache.size(2) * cache.stride(2),
              "heads of query, kv and a slot of the cache must be side by side, and slots at equal distances");
  const CacheLayer layer{mutable_data(cache), cache.stride(2), cache.stride(0)};
  write_cache(data(kv), kv.size(0), kv.stride(0), heads, slots.const_data_ptr<int64_t>(), layer, at::get_num_threads());
  const Attention attention{data(query), query.stride(0), heads, layer,
                            std::countr_zero(static_cast<uint64_t>(cache.size(2))),
                            static_cast<float>(scale), static_cast<float>(softcap), window};
  std::vector<Span> list(spans.size(0));
  const int64_t* numbers = spans.const_data_ptr<int64_t>();
  for (Span& span : list) {
    span = {numbers[0], numbers[1], numbers[2], blocks.const_data_ptr<int64_t>() + numbers[3],
            numbers[4] < 0 ? nullptr : masks->const_data_ptr<uint8_t>() + numbers[4], numbers[5],
            numbers[2] + numbers[1] - numbers[5]};
    numbers += 6;
  }
  at::Tensor out = at::empty({query.size(0), heads.queries * heads.size}, query.options());
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

}  // namespace
}  // namespace slipstream

TORCH_LIBRARY(slipstream, m) {
  m.def("linear(Tensor x, Tensor packed, int outputs, Tensor? bias, Tensor? norm, float eps, Tensor? residual, bool wide) -> Tensor");
  m.def("rotate(Tensor(a!) heads, Tensor cosines, Tensor sines, Tensor? norms, float eps) -> ()");
  m.def("attention(Tensor query, Tensor kv, Tensor(a!) cache, Tensor slots, Tensor spans, Tensor blocks, Tensor? masks, float scale, float softcap, int window) -> Tensor");
  m.def("decoder_layer(Tensor hidden, Tensor[] weights, Tensor?[] biases, Tensor[] norms, Tensor? head_norms, float eps, int queries, int inner, int activation, Tensor cosines, Tensor sines, Tensor(a!) cache, Tensor slots, Tensor spans, Tensor blocks, Tensor? masks, float scale, float softcap, int window) -> Tensor");
  m.def("gated_linear(Tensor x, Tensor packed, int inner, Tensor? bias, Tensor? norm, float eps, int activation) -> Tensor");
}

TORCH_LIBRARY_IMPL(slipstream, CPU, m) {
  m.impl("linear", &slipstream::linear_op);
  m.impl("rotate", &slipstream::rotate_op);
  m.impl("attention", &slipstream::attention_op);
  m.impl("decoder_layer", &slipstream::decoder_layer_op);
  m.impl("gated_linear", &slipstream::gated_op);
}
