// The two operators that a segment's attention calls, llama::custom_sdpa and llama::update_cache_with_indices, in float32.
//
// ExecuTorch's wheel has them only inside a library for Python that needs PyTorch; a runtime built from source has them
// in its `custom_ops` target, which is then linked in place of this file. Every row is computed by itself, in the same
// order of additions whatever the width of the batch.
#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/kernel/kernel_includes.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

namespace runner {

namespace {

using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::KernelRuntimeContext;

// Keys or values [1, slots, heads, size] as seen by one head.
struct HeadView {
  const float* first;
  int64_t stride;
  const float* at(int64_t slot) const { return first + slot * stride; }
};

float dot(const float* a, const float* b, int64_t size) {
  float sum = 0;
  for (int64_t i = 0; i < size; ++i) sum += a[i] * b[i];
  return sum;
}

// softmax(query·keys·scale + mask)·values over the first `count` slots; `mask` may be null. `scores` has room for count.
void attend(const float* query, HeadView keys, HeadView values, const float* mask, int64_t count, int64_t size,
            float scale, float* scores, float* out) {
  float best = -std::numeric_limits<float>::infinity();
  for (int64_t slot = 0; slot < count; ++slot) {
    const bool seen = !mask || mask[slot] != -std::numeric_limits<float>::infinity();
    scores[slot] = seen ? dot(query, keys.at(slot), size) * scale + (mask ? mask[slot] : 0.0f)
                        : -std::numeric_limits<float>::infinity();
    best = std::max(best, scores[slot]);
  }
  std::fill(out, out + size, 0.0f);
  float total = 0;
  for (int64_t slot = 0; slot < count; ++slot) {
    if (scores[slot] == -std::numeric_limits<float>::infinity()) continue;
    const float weight = std::exp(scores[slot] - best);
    const float* value = values.at(slot);
    total += weight;
    for (int64_t i = 0; i < size; ++i) out[i] += weight * value[i];
  }
  for (int64_t i = 0; i < size && total > 0; ++i) out[i] /= total;
}

bool is_float4(const Tensor& tensor) { return tensor.dim() == 4 && tensor.scalar_type() == ScalarType::Float; }

// query [1, n, heads, size]; keys and values [1, slots, key-value heads, size]; mask [n, slots]. With a mask the program
// hands in the slots alone that the mask shows.
Tensor& custom_sdpa(KernelRuntimeContext& context, const Tensor& query, const Tensor& keys, const Tensor& values,
                    int64_t start, std::optional<Tensor> mask, double /*dropout*/, bool causal,
                    std::optional<double> scaling, Tensor& out) {
  ET_KERNEL_CHECK(context, is_float4(query) && is_float4(keys) && is_float4(values), InvalidArgument, out);
  const int64_t rows = query.size(1), heads = query.size(2), size = query.size(3);
  const int64_t slots = keys.size(1), groups = keys.size(2);
  ET_KERNEL_CHECK(context, groups > 0 && heads % groups == 0 && keys.size(3) == size, InvalidArgument, out);
  ET_KERNEL_CHECK(context, keys.size(0) == 1 && keys.sizes() == values.sizes(), InvalidArgument, out);
  ET_KERNEL_CHECK(context, start >= 0 && start + (causal ? rows : 0) <= slots, InvalidArgument, out);
  ET_KERNEL_CHECK(context, query.size(0) == 1 && causal != mask.has_value(), InvalidArgument, out);
  ET_KERNEL_CHECK(context, !mask || (mask->dim() == 2 && mask->scalar_type() == ScalarType::Float), InvalidArgument, out);
  ET_KERNEL_CHECK(context, !mask || (mask->size(0) == rows && mask->size(1) == slots), InvalidArgument, out);
  ET_KERNEL_CHECK(context, out.scalar_type() == ScalarType::Float, InvalidArgument, out);
  ET_KERNEL_CHECK(context, resize_tensor(out, query.sizes()) == Error::Ok, InvalidArgument, out);
  const auto scale = static_cast<float>(scaling.value_or(1.0 / std::sqrt(static_cast<double>(size))));
  const auto* q = query.const_data_ptr<float>();
  const auto* masks = mask ? mask->const_data_ptr<float>() : nullptr;
  auto* result = out.mutable_data_ptr<float>();
  const int64_t per_group = heads / groups;
  const auto work = [&](int64_t begin, int64_t end) {
    std::vector<float> scores(static_cast<size_t>(slots));
    for (int64_t index = begin; index < end; ++index) {  // one head of one row
      const int64_t row = index / heads, group = index % heads / per_group;
      const HeadView k{keys.const_data_ptr<float>() + group * size, groups * size};
      const HeadView v{values.const_data_ptr<float>() + group * size, groups * size};
      attend(q + index * size, k, v, masks ? masks + row * slots : nullptr, causal ? start + row + 1 : slots, size,
             scale, scores.data(), result + index * size);
    }
  };
  const bool done = executorch::extension::parallel_for(0, rows * heads, std::max<int64_t>(1, heads / 2), work);
  ET_KERNEL_CHECK(context, done, Internal, out);
  return out;
}

// Rows of `value` [1, n, heads, size] to the slots `indices` [1, n] of `cache` [1, slots, heads, size].
Tensor& update_cache_with_indices(KernelRuntimeContext& context, const Tensor& value, Tensor& cache, int64_t start,
                                  const Tensor& indices, Tensor& out) {
  ET_KERNEL_CHECK(context, is_float4(value) && is_float4(cache) && start == 0, InvalidArgument, out);
  ET_KERNEL_CHECK(context, cache.size(0) == 1, InvalidArgument, out);
  ET_KERNEL_CHECK(context, value.size(0) == 1 && value.size(2) == cache.size(2) && value.size(3) == cache.size(3),
                  InvalidArgument, out);
  ET_KERNEL_CHECK(context, indices.scalar_type() == ScalarType::Long && indices.numel() == value.size(1),
                  InvalidArgument, out);
  const int64_t row_size = value.size(2) * value.size(3);
  const auto* slots = indices.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < value.size(1); ++row) {
    ET_KERNEL_CHECK(context, slots[row] >= 0 && slots[row] < cache.size(1), InvalidArgument, out);
    std::memcpy(cache.mutable_data_ptr<float>() + slots[row] * row_size, value.const_data_ptr<float>() + row * row_size,
                static_cast<size_t>(row_size) * sizeof(float));
  }
  return out;
}

}  // namespace

EXECUTORCH_LIBRARY(llama, "custom_sdpa.out", custom_sdpa);
EXECUTORCH_LIBRARY(llama, "update_cache_with_indices.out", update_cache_with_indices);

}  // namespace runner
