#include "program.h"

#include <executorch/runtime/backend/interface.h>
#include <executorch/runtime/platform/platform.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>

#include "error.h"
#include "signature.h"

namespace runner {

namespace {

using executorch::aten::ScalarType;
using executorch::aten::SizesType;
using executorch::extension::from_blob;
using executorch::extension::Module;
using executorch::extension::TensorPtr;

// Targets as a manifest names them, and the delegate that runs each.
constexpr std::pair<const char*, const char*> kDelegates[] = {
    {"xnnpack", "XnnpackBackend"}, {"vulkan", "VulkanBackend"}, {"coreml", "CoreMLBackend"}};

// ExecuTorch writes the reason of a failure to its log; the last one becomes the end of our own line.
std::string& last_log_line() {
  static std::string line;
  return line;
}

void keep_log_line(et_timestamp_t, et_pal_log_level_t level, const char*, const char*, size_t, const char* message,
                   size_t length) {
  if (level == kError || level == kFatal) last_log_line().assign(message, length);
}

void silence_log() {
  using executorch::runtime::PalImpl;
  executorch::runtime::register_pal(PalImpl::create(&keep_log_line, __FILE__));
}

template <typename Outcome>
void require(const Outcome& error, const std::string& what) {
  if (error == executorch::runtime::Error::Ok) return;
  const std::string reason = last_log_line().empty() ? "error " + std::to_string(static_cast<int>(error)) : last_log_line();
  throw Error(what + ": " + reason);
}

std::vector<int64_t> counting(int64_t first, int64_t count) {
  std::vector<int64_t> numbers(static_cast<size_t>(count));
  std::iota(numbers.begin(), numbers.end(), first);
  return numbers;
}

// Where `count` rows in the slots from `start` on may look, [width, start + count]: at the context and at each other as a
// chain does. It ends at the last of them: slots past it cost nothing. Rows that only fill the batch up see the context, or
// the first slot where there is none, since a softmax over nothing has no value.
std::vector<float> chain_mask(int64_t width, int64_t count, int64_t start) {
  const int64_t slots = start + count;
  std::vector<float> mask(static_cast<size_t>(width * slots), -std::numeric_limits<float>::infinity());
  for (int64_t row = 0; row < width; ++row) {
    const int64_t seen = row < count ? start + row + 1 : std::max<int64_t>(start, 1);
    std::fill_n(mask.begin() + static_cast<ptrdiff_t>(row * slots), seen, 0.0f);
  }
  return mask;
}

TensorPtr as_tensor(std::vector<int64_t>& values) {
  return from_blob(values.data(), {1, static_cast<SizesType>(values.size())}, ScalarType::Long);
}

}  // namespace

Program::Program(const Bundle& bundle, const ProgramOptions& options)
    : bundle_(bundle),
      masked_(options.masked),
      module_((silence_log(), bundle.program.string()), Module::LoadMode::Mmap, nullptr, nullptr, nullptr,
              options.shared_state) {
  check_target();
  load_methods();
  check_signatures(module_, bundle_);
}

void Program::check_target() const {
  std::string present;
  for (const auto& [target, delegate] : kDelegates) {
    if (!executorch::runtime::get_backend_class(delegate)) continue;
    if (bundle_.target == target) return;
    present += (present.empty() ? "" : ", ") + std::string(target);
  }
  throw Error(bundle_.program.string() + ": lowered for " + bundle_.target + "; this runner's ExecuTorch runs " +
              (present.empty() ? "no target" : present) + "; export with --device cpu, or run it on the device");
}

void Program::load_methods() {
  using Verification = executorch::runtime::Program::Verification;
  const std::string file = bundle_.program.string();
  require(module_.load(Verification::InternalConsistency), file + ": cannot be loaded");
  const auto names = module_.method_names();
  require(names.error(), file + ": names no methods");
  for (const auto& name : bundle_.methods) {
    if (!names->count(name)) throw Error(file + ": has no method " + name + ", which the manifest names");
  }
  for (const auto& name : *names) {
    const auto& known = bundle_.methods;
    if (std::find(known.begin(), known.end(), name) == known.end()) {
      throw Error(file + ": has a method " + name + ", which the manifest does not name");
    }
  }
  for (const auto& name : bundle_.methods) require(module_.load_method(name), file + ": method " + name);
}

executorch::aten::Tensor Program::call(const std::string& method, const std::vector<TensorPtr>& inputs) {
  std::vector<executorch::runtime::EValue> values(inputs.begin(), inputs.end());
  last_log_line().clear();
  auto outputs = module_.execute(method, values);
  require(outputs.error(), method);
  return outputs->at(0).toTensor();
}

int64_t Program::rows_of(const Hidden& hidden) const {
  return static_cast<int64_t>(hidden.size()) / bundle_.hidden_size;
}

// The last row repeated up to the reference width. Padding stands behind every row of the batch, so none sees it, and its
// K and V are overwritten by the rows that come to stand there.
Hidden Program::padded(const Hidden& hidden) const {
  const auto width = static_cast<size_t>(std::max(rows_of(hidden), bundle_.reference_width));
  const auto size = static_cast<size_t>(bundle_.hidden_size);
  Hidden wide = hidden;
  while (wide.size() < width * size) wide.insert(wide.end(), hidden.end() - static_cast<ptrdiff_t>(size), hidden.end());
  return wide;
}

Hidden Program::embed(const std::vector<int64_t>& tokens) {
  std::vector<int64_t> ids = tokens;
  const auto out = call("embed", {as_tensor(ids)});
  const auto* first = out.const_data_ptr<float>();
  return {first, first + out.numel()};
}

Hidden Program::segment(int64_t index, const Hidden& hidden, int64_t start) {
  Hidden wide = padded(hidden);
  const auto width = static_cast<SizesType>(rows_of(wide));
  const int64_t count = rows_of(hidden);
  std::vector<int64_t> places = counting(start, width);
  int64_t first = masked_ ? 0 : start, tree = masked_;
  // A chain's mask is not read, but a tensor must be given: the narrowest.
  std::vector<float> mask = masked_ ? chain_mask(width, count, start) : std::vector<float>(static_cast<size_t>(width));
  const int64_t mask_slots = static_cast<int64_t>(mask.size()) / width;
  mask_slots_ = std::max(mask_slots_, mask_slots);
  const auto out = call("segment_" + std::to_string(index),
                        {from_blob(wide.data(), {1, width, static_cast<SizesType>(bundle_.hidden_size)}),
                         as_tensor(places), as_tensor(places), from_blob(&first, {1}, ScalarType::Long),
                         from_blob(mask.data(), {width, static_cast<SizesType>(mask_slots)}),
                         from_blob(&tree, {1}, ScalarType::Long)});
  const auto* data = out.const_data_ptr<float>();
  return {data, data + hidden.size()};
}

std::vector<int64_t> Program::best_rows(const std::string& head, const Hidden& hidden) {
  Hidden wide = padded(hidden);
  const auto width = static_cast<SizesType>(rows_of(wide));
  const auto out = call(head, {from_blob(wide.data(), {1, width, static_cast<SizesType>(bundle_.hidden_size)})});
  const auto* logits = out.const_data_ptr<float>();
  const auto columns = static_cast<ptrdiff_t>(out.size(2));
  std::vector<int64_t> best;
  for (int64_t row = 0; row < rows_of(hidden); ++row, logits += columns) {
    best.push_back(std::max_element(logits, logits + columns) - logits);
  }
  return best;
}

std::vector<int64_t> Program::best_tokens(const Hidden& hidden) { return best_rows("head", hidden); }

std::vector<int64_t> Program::best_draft_tokens(const Hidden& hidden) {
  std::vector<int64_t> tokens = best_rows("draft_head", hidden);
  for (auto& token : tokens) token = bundle_.draft_vocabulary.at(static_cast<size_t>(token));
  return tokens;
}

}  // namespace runner
